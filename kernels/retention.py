"""Retention (RetNet): linear attention whose state decays at a constant rate, another for each head.

    S_t = γ_h S_{t−1} + k_t v_tᵀ,   o_t = scale · q_tᵀ S_t = scale · Σ_{j ≤ t} γ_h^{t−j} (q_t·k_j) v_j,
    γ_h = 1 − 2^{−5−h},  h = 0 … H−1

(Sun et al., arXiv 2307.08621; theory RET-1.) The three forms of the paper: :func:`recurrent`,
:func:`parallel`, which computes every pair, and :func:`attention`, in chunks. The first and the last are
gated linear attention with constant gates. log γ is taken in float64 and rounded once; what a pair weighs is
exp2 of (t − j)·log₂γ, never a quotient of two powers.

All four matrices of the parallel form are one sum: with time running backwards where j ≥ i,

    o: (q, k, v),   dq: (do, v, k),   dv: (k, q, do) backwards,   dk: (v, do, q) backwards.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_finite
from attnproof.kernels.gated_linear import (
    Recurrence,
    attended,
    chunk_states,
    strided,
    triton_dtype,
)
from attnproof.kernels.gated_linear_chunks import product
from attnproof.kernels.pointwise import strides
from attnproof.kernels.softmax import isolated
from attnproof.kernels.states import (
    check_initial_state,
    check_state_tensors,
    register_limit,
    sequence_bounds,
    sequences_of,
)
from attnproof.kernels.tiles import memory_layout, padded_width
from attnproof.properties.contract import Contract, Supports, promises

__all__ = ["RETENTION", "attention", "parallel", "recurrent"]

RETENTION = Contract(
    family="retention",
    options=("initial_state", "cu_seqlens", "return_state"),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
)

RUNTIME = [
    "p_start", "p_out", "p_cu", "s_xb", "s_xh", "s_xn", "s_xd", "s_yb", "s_yh", "s_yn", "s_yd", "s_zb",
    "s_zh", "s_zn", "s_ze", "s_sd", "s_se", "H", "N", "D", "E",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def pairs_kernel(
    p_x, p_y, p_z, p_bits, p_start, p_out, p_cu,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xd: tl.int64,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yd: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_ze: tl.int64,
    s_sd: tl.int64, s_se: tl.int64,
    H, N, D, E, pair_scale, state_scale,
    REVERSE: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One tile of out_i = pair_scale · Σ_{j ≤ i} γ^{i−j} (x_i·y_j) z_j + state_scale · γ^{i+1} x_iᵀ S.

    REVERSE: j ≥ i, γ^{j−i}, and γ to the number of positions after i.
    """
    i_sh = tl.program_id(0)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    s_xb, s_xh, s_xn, s_xd = strides(s_xb, s_xh, s_xn, s_xd, LAYOUT)
    s_yb, s_yh, s_yn, s_yd = strides(s_yb, s_yh, s_yn, s_yd, LAYOUT)
    s_zb, s_zh, s_zn, s_ze = strides(s_zb, s_zh, s_zn, s_ze, LAYOUT)
    p_x += i_b * s_xb + i_h * s_xh + i_start * s_xn
    p_y += i_b * s_yb + i_h * s_yh + i_start * s_yn
    p_z += i_b * s_zb + i_h * s_zh + i_start * s_zn
    b_bits = tl.load(p_bits + i_h)

    n_rows = (i_stop - i_start).to(tl.int32)
    i_m = tl.program_id(1) * BM
    o_m, o_n = i_m + tl.arange(0, BM), tl.arange(0, BN)
    o_d, o_e = tl.arange(0, BD), tl.program_id(2) * BE + tl.arange(0, BE)
    m_m, m_d, m_e = o_m < n_rows, o_d < D, o_e < E
    # [BM, BD]
    o_x = (o_m.to(tl.int64) * s_xn)[:, None] + (o_d * s_xd)[None, :]
    b_x = tl.load(p_x + o_x, mask=m_m[:, None] & m_d[None, :], other=0.0)
    # [BM, BE]
    b_o = tl.zeros([BM, BE], dtype=tl.float32)
    if p_start is not None:
        o_s = i_sh.to(tl.int64) * D * E + (o_d * s_sd)[:, None] + (o_e * s_se)[None, :]
        b_s = tl.load(p_start + o_s, mask=m_d[:, None] & m_e[None, :], other=0.0)
        b_age = n_rows - 1 - o_m if REVERSE else o_m + 1
        b_read = product(b_x.to(tl.float32), b_s, b_o, DTYPE)
        b_o = b_read * (tl.exp2(tl.maximum(b_age, 0).to(tl.float32) * b_bits) * state_scale)[:, None]
    b_nan = tl.zeros([BM], dtype=tl.float32)
    first = i_m // BN if REVERSE else 0
    last = (n_rows if REVERSE else tl.minimum(i_m + BM, n_rows)) + BN - 1
    last = tl.where(i_m < n_rows, last // BN, first)
    for i_t in range(first, last):
        o_j = i_t * BN + o_n
        m_j = o_j < n_rows
        o_y = (o_j.to(tl.int64) * s_yn)[None, :] + (o_d * s_yd)[:, None]
        o_z = (o_j.to(tl.int64) * s_zn)[:, None] + (o_e * s_ze)[None, :]
        b_y = tl.load(p_y + o_y, mask=m_j[None, :] & m_d[:, None], other=0.0)
        b_z = tl.load(p_z + o_z, mask=m_j[:, None] & m_e[None, :], other=0.0)
        # [BM, BN]
        b_away = o_j[None, :] - o_m[:, None] if REVERSE else o_m[:, None] - o_j[None, :]
        m_s = (b_away >= 0) & m_j[None, :]
        b_w = tl.exp2(tl.maximum(b_away, 0).to(tl.float32) * b_bits) * pair_scale
        b_p = tl.where(m_s, tl.dot(b_x, b_y, input_precision="ieee") * b_w, 0.0)
        b_z, b_nan = isolated(b_z, m_s, b_nan)
        b_o = product(b_p, b_z.to(tl.float32), b_o, DTYPE)
    o_o = ((i_b * H + i_h) * N + i_start + o_m)[:, None] * E + o_e[None, :]
    b_o += b_nan[:, None]
    tl.store(p_out + o_o, b_o.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_e[None, :])


def pairs_tile(dtype: torch.dtype, width: int, value_width: int) -> tuple[int, int, int, int]:
    """Rows, columns and value channels of a tile of :func:`pairs_kernel`, and its warps.

    Exact float32 products keep whole rows of both operands in registers: beyond a width of 32, some hundred
    bytes of them are spilled with 32 rows or columns, and none with 16 (tests/quality/spills.py).
    """
    wide = padded_width(width) > (32 if dtype == torch.float32 else 64)
    side = 16 if wide and dtype == torch.float32 else 32
    return side, side, min(padded_width(value_width), 64), 8 if wide else 4


def paired(
    run: Recurrence,
    bits: torch.Tensor,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    state: torch.Tensor | None,
    *,
    state_scale: float,
    reverse: bool,
) -> torch.Tensor:
    """The sum of :func:`pairs_kernel` for x, y (B,H,N,X), z (B,H,N,Z) and a state (S,H,X,Z) or None."""
    x, y, z = tensors
    heads, length, width = x.shape[1:]
    value_width = z.shape[3]
    out = torch.empty((*x.shape[:3], value_width), dtype=x.dtype, device=x.device)
    if out.numel() and run.sequences.longest:
        block_m, block_n, block_e, warps = pairs_tile(x.dtype, width, value_width)
        layout = memory_layout(x, y, z)
        tiles = (triton.cdiv(run.sequences.longest, block_m), triton.cdiv(value_width, block_e))
        pairs_kernel[(run.sequences.count * heads, *tiles)](
            x, y, z, bits, state, out, run.sequences.cu_seqlens, *strided(layout, x, y, z),
            *((0, 0) if state is None else state.stride()[2:]),
            heads, length, width, value_width, run.scale, state_scale,
            REVERSE=reverse, LAYOUT=layout, DTYPE=triton_dtype(x),
            BM=block_m, BN=block_n, BD=padded_width(width), BE=block_e,
            num_warps=warps, num_stages=1, enable_fp_fusion=False, **register_limit(warps),
        )  # fmt: skip
    return out


class ParallelRetention(torch.autograd.Function):
    """(o, final state) of q, k, v and the initial state or None."""

    @staticmethod
    def forward(
        ctx: Any, run: Recurrence, bits: torch.Tensor, g: torch.Tensor, *given: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, start = given
        start = None if start is None else start.contiguous()
        ctx.run, ctx.bits, ctx.g = run, bits, g
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, start)
        o = paired(run, bits, (q, k, v), start, state_scale=run.scale, reverse=False)
        chunks = run.sequences.chunks(run.chunk)
        return o, chunk_states(run, chunks, k, v, g, start, reverse=False)[1]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dend: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        run, bits = ctx.run, ctx.bits
        q, k, v, start = ctx.saved_tensors
        if do is None:
            do = q.new_zeros(()).expand(*q.shape[:3], v.shape[3])
        dend = None if dend is None else dend.contiguous()
        need_q, need_k, need_v, need_start = ctx.needs_input_grad[3:]
        before = None if start is None else start.mT
        after = None if dend is None else dend.mT
        dq = dk = dv = dstart = None
        if need_q:
            dq = paired(run, bits, (do, v, k), before, state_scale=run.scale, reverse=False)
        if need_k:
            dk = paired(run, bits, (v, do, q), after, state_scale=1.0, reverse=True)
        if need_v:
            dv = paired(run, bits, (k, q, do), dend, state_scale=1.0, reverse=True)
        if need_start:
            chunks = run.sequences.chunks(run.chunk)
            _, dstart = chunk_states(run, chunks, q, do, ctx.g, dend, reverse=True)
        return None, None, None, dq, dk, dv, dstart


def rates(q: torch.Tensor) -> torch.Tensor:
    """1 − γ_h = 2^{−5−h} of q's heads, (H,) float64."""
    return torch.exp2(-5.0 - torch.arange(q.shape[1], dtype=torch.float64, device=q.device))


def constant(values: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(H,) as (B,H,N,D) in float32, without a copy."""
    return values.float()[None, :, None, None].expand(q.shape)


def called(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    return_state: bool,
    kernel: str,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The call of every entry point below, which ``kernel`` names."""
    check_state_tensors(q, k, v, kernel)
    check_finite("scale", scale, kernel)
    rate = rates(q)
    g = constant(torch.log1p(-rate), q)
    run = Recurrence(scale, sequences_of(cu_seqlens, q, k, kernel))
    if kernel == "parallel":
        shape = (run.sequences.count, q.shape[1], q.shape[3], v.shape[3])
        check_initial_state("initial_state", initial_state, shape, q, kernel)
        bits = (torch.log1p(-rate) / math.log(2)).float()
        o, state = ParallelRetention.apply(run, bits, g, q, k, v, initial_state)  # type: ignore[no-untyped-call]
    else:
        if kernel == "recurrent":
            run = run._replace(stepwise=True, factors=constant(1 - rate, q))
        o, state = attended(run, q, k, v, g, None, initial_state, kernel)
    return (o, state) if return_state else o


@promises(RETENTION)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Retention of q, k (B,H,N,D), v (B,H,N,E) in chunks of 64; differentiable once in every tensor.

    Args:
        q, k, v: float32, float16 or bfloat16, all three alike; any strides; D and E from 1 to 256.
        scale: factor of q·k.
        initial_state: (B,H,D,E) float32, or None for zeros; (P,H,D,E) with ``cu_seqlens``.
        cu_seqlens: (P+1,) int32, for B = 1: P sequences one after the other.
        return_state: also return the final state, of the initial state's shape.

    Returns:
        o (B,H,N,E) of q's dtype, or (o, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return called(
        q, k, v, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, return_state=return_state,
        kernel="attention",
    )  # fmt: skip


@promises(RETENTION)
def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention`, one position after the other; nothing is rounded below float32 but o.

    Args:
        q, k, v, scale, initial_state, cu_seqlens, return_state: as there.

    Returns:
        o (B,H,N,E) of q's dtype, or (o, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return called(
        q, k, v, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, return_state=return_state,
        kernel="recurrent",
    )  # fmt: skip


@promises(RETENTION)
def parallel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention`, pair by pair: work that grows as N², and no state between the rows.

    Args:
        q, k, v, scale, initial_state, cu_seqlens, return_state: as there.

    Returns:
        o (B,H,N,E) of q's dtype, or (o, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return called(
        q, k, v, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, return_state=return_state,
        kernel="parallel",
    )  # fmt: skip
