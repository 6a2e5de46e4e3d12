"""Softmax attention in two forms that theory calls wrong in some regimes: examples that must be found out.

They support scale, causal (aligned bottom right) and return_lse, one head per key head, contiguous inputs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import ContractError, check_attention_tensors, check_finite
from attnproof.kernels.tiles import padded_width
from attnproof.properties.contract import Contract, Supports, promises

__all__ = ["three_pass_attention", "unshifted_attention"]

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))
INF: tl.constexpr = tl.constexpr(math.inf)
BLOCK = 16
RUNTIME = ["p_q", "p_k", "p_v", "p_norm", "p_o", "p_lse", "M", "N", "D", "E"]


@triton.jit
def scores(
    p_q, p_k, i_bh, i_n, o_m, M, N, D, scale, CAUSAL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    """scale·q·k of a tile [BM, BN] of head i_bh, −inf where masked; and the offsets of its keys [BN]."""
    o_n = i_n + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_q = tl.load(
        p_q + ((i_bh * M + o_m) * D)[:, None] + o_d[None, :],
        mask=(o_m < M)[:, None] & m_d[None, :],
        other=0.0,
    )
    b_k = tl.load(
        p_k + ((i_bh * N + o_n) * D)[None, :] + o_d[:, None],
        mask=(o_n < N)[None, :] & m_d[:, None],
        other=0.0,
    )
    b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale
    m_s = (o_n < N)[None, :]
    if CAUSAL:
        m_s = m_s & (o_n[None, :] <= o_m[:, None] + N - M)
    return tl.where(m_s, b_s, -INF), o_n


@triton.jit(do_not_specialize=RUNTIME)
def unshifted_kernel(
    p_q, p_k, p_v, p_o, p_lse, M, N, D, E, scale,
    CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_e = tl.arange(0, BE)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_o = tl.zeros([BM, BE], dtype=tl.float32)
    for i_n in range(0, N, BN):
        b_s, o_n = scores(p_q, p_k, i_bh, i_n, o_m, M, N, D, scale, CAUSAL, BN, BD)
        b_p = tl.exp2(b_s * LOG2E)
        m_v = (o_n < N)[:, None] & (o_e < E)[None, :]
        b_v = tl.load(p_v + ((i_bh * N + o_n) * E)[:, None] + o_e[None, :], mask=m_v, other=0.0)
        b_sum += tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
    b_o = b_o / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    o_row = i_bh * M + o_m
    m_o = (o_m < M)[:, None] & (o_e < E)[None, :]
    tl.store(p_o + (o_row * E)[:, None] + o_e[None, :], b_o.to(p_o.dtype.element_ty), mask=m_o)
    tl.store(p_lse + o_row, tl.log2(b_sum) * LN2, mask=o_m < M)


@triton.jit(do_not_specialize=RUNTIME)
def normaliser_kernel(
    p_q, p_k, p_norm, M, N, D, scale,
    CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    b_max = tl.full([BM], -INF, dtype=tl.float32)
    for i_n in range(0, N, BN):
        b_s, _ = scores(p_q, p_k, i_bh, i_n, o_m, M, N, D, scale, CAUSAL, BN, BD)
        b_max = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = tl.where(b_max == -INF, 0.0, b_max)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    for i_n in range(0, N, BN):
        b_s, _ = scores(p_q, p_k, i_bh, i_n, o_m, M, N, D, scale, CAUSAL, BN, BD)
        b_sum += tl.sum(tl.exp2((b_s - b_shift[:, None]) * LOG2E), 1)
    b_norm = b_max + tl.log2(tl.where(b_sum == 0, 1.0, b_sum)) * LN2
    tl.store(p_norm + i_bh * M + o_m, b_norm.to(p_norm.dtype.element_ty), mask=o_m < M)


@triton.jit(do_not_specialize=RUNTIME)
def division_free_kernel(
    p_q, p_k, p_v, p_norm, p_o, M, N, D, E, scale,
    CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_e = tl.arange(0, BE)
    b_norm = tl.load(p_norm + i_bh * M + o_m, mask=o_m < M, other=0.0).to(tl.float32)
    b_norm = tl.where(b_norm == -INF, 0.0, b_norm)
    b_o = tl.zeros([BM, BE], dtype=tl.float32)
    for i_n in range(0, N, BN):
        b_s, o_n = scores(p_q, p_k, i_bh, i_n, o_m, M, N, D, scale, CAUSAL, BN, BD)
        b_p = tl.exp2((b_s - b_norm[:, None]) * LOG2E)
        m_v = (o_n < N)[:, None] & (o_e < E)[None, :]
        b_v = tl.load(p_v + ((i_bh * N + o_n) * E)[:, None] + o_e[None, :], mask=m_v, other=0.0)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
    m_o = (o_m < M)[:, None] & (o_e < E)[None, :]
    tl.store(p_o + ((i_bh * M + o_m) * E)[:, None] + o_e[None, :], b_o.to(p_o.dtype.element_ty), mask=m_o)


NAIVE = Contract(
    family="softmax",
    options=("causal", "return_lse"),
    unseen_nonfinite="may-leak",
    supports=Supports(max_head_dim=128),
    differentiable=False,
)


def prepared(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, kernel: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v contiguous, with one key head for each query head."""
    check_attention_tensors(q, k, v, kernel)
    check_finite("scale", scale, kernel)
    if max(q.shape[3], v.shape[3]) > 128:
        raise NotImplementedError(f"{kernel}: D={q.shape[3]}, E={v.shape[3]}: this example goes up to 128")
    if q.numel() >= 2**31 or k.numel() >= 2**31:
        raise ContractError(f"{kernel}: this example is for small tensors")
    group = q.shape[1] // k.shape[1]
    return (
        q.contiguous(),
        k.repeat_interleave(group, 1).contiguous(),
        v.repeat_interleave(group, 1).contiguous(),
    )


@promises(NAIVE)
def unshifted_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """exp(s) V / Σ exp(s), with no maximum subtracted.

    Fails, by theory LSE-4, where a logit exceeds ln(largest float32) = 88.7 (float16 inputs: where exp(s)
    exceeds 65504, a logit of 11.09, because P is stored in the input dtype), and where all logits of a row
    lie below −87: the sum underflows. Right elsewhere, and as accurate as the shifted form (LSE-9).

    Args:
        q, k, v: (B,H,M,D), (B,G,N,D), (B,G,N,E), float32, float16 or bfloat16; D and E up to 128.
        scale, causal, return_lse: as :func:`attnproof.kernels.softmax.attention`.

    Returns:
        o (B,H,M,E), or (o, lse) with lse (B,H,M) float32.
    """
    q, k, v = prepared(q, k, v, scale, "unshifted_attention")
    batch, heads, queries, width = q.shape
    keys, value_width = v.shape[2:]
    o = torch.empty((batch, heads, queries, value_width), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if lse.numel():
        unshifted_kernel[(batch * heads, triton.cdiv(queries, BLOCK))](
            q, k, v, o, lse, queries, keys, width, value_width, scale,
            CAUSAL=causal, BM=BLOCK, BN=BLOCK, BD=padded_width(width), BE=padded_width(value_width),
        )  # fmt: skip
    return (o, lse) if return_lse else o


@promises(NAIVE)
def three_pass_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """exp(s − L) V without a division, L = log Σ exp(s) written to memory *in the dtype of the inputs* in
    between.

    Three sweeps over the keys: maximum, normaliser, output. By theory LSE-5 and LSE-7 the rounding of L,
        u·|L|, comes
    back as a relative error of every output: 21 % at logits of 1000 in float16. It is wrong in float16 and
    bfloat16 as soon as |L| is a few units (its error exceeds that of P's own storage by the factor |L|), fine
    in float32.

    Args:
        q, k, v: (B,H,M,D), (B,G,N,D), (B,G,N,E), float32, float16 or bfloat16; D and E up to 128.
        scale, causal, return_lse: as :func:`attnproof.kernels.softmax.attention`.

    Returns:
        o (B,H,M,E), or (o, lse) with lse (B,H,M) float32, rounded to the dtype of the inputs before.
    """
    q, k, v = prepared(q, k, v, scale, "three_pass_attention")
    batch, heads, queries, width = q.shape
    keys, value_width = v.shape[2:]
    o = torch.empty((batch, heads, queries, value_width), dtype=q.dtype, device=q.device)
    norm = torch.empty((batch, heads, queries), dtype=q.dtype, device=q.device)
    if norm.numel():
        grid = (batch * heads, triton.cdiv(queries, BLOCK))
        blocks = {"CAUSAL": causal, "BM": BLOCK, "BN": BLOCK, "BD": padded_width(width)}
        normaliser_kernel[grid](q, k, norm, queries, keys, width, scale, **blocks)
        division_free_kernel[grid](
            q, k, v, norm, o, queries, keys, width, value_width, scale, **blocks,
            BE=padded_width(value_width), num_warps=2,
        )  # fmt: skip
    return (o, norm.float()) if return_lse else o
