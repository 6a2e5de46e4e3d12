"""Softmax attention: FlashAttention with an online softmax, and its split-KV form for decoding.

    o_i = Σ_j p_ij v_j,   p_ij = exp(s_ij − L_i),   L_i = log Σ_j exp s_ij,   s_ij = scale · q_i·k_j

(Dao et al., arXiv 2205.14135; the accumulator stays unscaled until the end as in arXiv 2307.08691; partial
results are merged as theory ONL-4 says.) One program computes one tile of queries of one head. It walks first
over the key tiles that every one of its rows sees whole, where nothing is masked, then over those on the edge
of a mask; tiles that nobody sees are skipped. Softmax does not care for the order.

What is kept on purpose:

* Scores are rounded *before* the maximum is taken and subtracted (and the kernels are launched without
  contraction of multiply and add), so that the argmax of a row gets p = 1 exactly: a fused s·scale − max
  leaves the rounding of the product as a residual, which overflows exp2 at scores of 1e10 (bugs B07).
* A row whose every score so far is masked keeps the maximum −inf and subtracts 0 (−inf − −inf would be NaN,
  B03).
* 0·NaN: a NaN or inf in V, where P is 0 because the key is masked, must not reach the row (B21). On edge
  tiles, and only when a V tile holds such a value, the value is taken out and the rows that do see it are set
  to NaN.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import (
    check_alibi_slopes,
    check_attention_tensors,
    check_block,
    check_choice,
    check_cu_seqlens,
    check_finite,
    check_positive,
    check_sinks,
    check_splits,
    key_band,
    padded_bias,
)
from attnproof.kernels.merge import merged
from attnproof.kernels.tiles import ALIGNED, Tiles, memory_layout, padded_width, tiles_for
from attnproof.properties.contract import Contract, Precision, Supports, promises

__all__ = ["attention", "attention_atomic", "attention_split"]

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))
INF: tl.constexpr = tl.constexpr(math.inf)
INF_BITS: tl.constexpr = tl.constexpr(0x7F800000)

# Sizes and strides are run-time values: what depends on them is told to the compiler by LAYOUT alone.
RUNTIME = [
    "p_bias", "p_sinks", "p_cu", "p_o", "p_lse", "p_alibi", "p_max", "p_scale", "s_qb", "s_qh", "s_qm",
    "s_qd", "s_kb", "s_kh", "s_kn", "s_kd", "s_vb", "s_vh", "s_vn", "s_ve", "s_bb", "s_bh", "s_bm",
    "s_bn", "s_sink", "s_split", "H", "GROUP", "M", "N", "D", "E", "left", "right", "split_tiles",
]  # fmt: skip


@triton.jit
def capped(b_x):
    """tanh(b_x) to a few ulp: 1 − exp cancels near 0, where an odd polynomial takes over (Cephes tanhf)."""
    b_z = b_x * b_x
    b_c = (
        ((-5.70498872745e-3 * b_z + 2.06390887954e-2) * b_z - 5.37397155531e-2) * b_z + 1.33314422036e-1
    ) * b_z
    b_small = b_x + b_x * b_z * (b_c - 3.33332819422e-1)
    b_t = tl.exp2(tl.abs(b_x) * (-2 * LOG2E))
    b_large = (1 - b_t) / (1 + b_t)
    return tl.where(tl.abs(b_x) < 0.625, b_small, tl.where(b_x < 0, -b_large, b_large))


@triton.jit
def tile_range(
    i_m, i_s, n_q, n_k, left, right, split_tiles,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Key tiles [t0, t1) that a row of query tile i_m sees, and [f0, f1) of them that all its rows see."""
    i_first = i_m * BM
    i_last = tl.minimum(i_first + BM, n_q) - 1
    lo, full_lo, hi, full_hi = 0, 0, n_k, n_k
    if LEFT:
        lo = tl.maximum(i_first + left, 0)
        full_lo = tl.maximum(i_last + left, 0)
    if RIGHT:
        hi = tl.minimum(tl.maximum(i_last + right + 1, 0), n_k)
        full_hi = tl.minimum(tl.maximum(i_first + right + 1, 0), n_k)
    t0 = tl.maximum(lo // BN, i_s * split_tiles)
    t1 = tl.maximum(tl.minimum((hi + BN - 1) // BN, (i_s + 1) * split_tiles), t0)
    f0 = tl.minimum(tl.maximum((full_lo + BN - 1) // BN, t0), t1)
    f1 = tl.maximum(tl.minimum(full_hi // BN, t1), f0)
    return t0, t1, f0, f1


@triton.jit
def loaded(p_x, m_x, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(p_x, mask=m_x, other=0.0)
    return tl.load(p_x)


@triton.jit
def isolated(b_v, m_s, b_nan):
    """V with its non-finite entries taken out, and the rows that see one of them marked by NaN in b_nan.

    Bits of absolute values are ordered like the values, with inf and then NaN on top.
    """
    b_bits = b_v.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_top = tl.max(b_bits, 1)
    if tl.max(b_top, 0) >= INF_BITS:
        b_v = tl.where(b_bits < INF_BITS, b_v, tl.zeros_like(b_v))
        b_hit = tl.max(tl.where(m_s, b_top[None, :], 0), 1)
        b_nan = tl.where(b_hit >= INF_BITS, float("nan"), b_nan)
    return b_v, b_nan


@triton.jit(do_not_specialize=RUNTIME)
def attention_kernel(
    p_q, p_k, p_v, p_bias, p_sinks, p_cu, p_o, p_lse,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bm: tl.int64, s_bn: tl.int64,
    s_sink: tl.int64, s_split: tl.int64,
    H, GROUP, M, N, D, E, left, right, split_tiles,
    score_scale, cap, p_alibi, p_max, p_scale,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    PAD_D: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    i_bh, i_m, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = (i_bh % H // GROUP).to(tl.int64)
    if LAYOUT > 0:
        s_qd, s_kd, s_ve = 1, 1, 1
    if LAYOUT > 1:  # strides come divided by 16: the multiplication tells the compiler that rows are aligned
        s_qb, s_qh, s_qm = s_qb * 16, s_qh * 16, s_qm * 16
        s_kb, s_kh, s_kn = s_kb * 16, s_kh * 16, s_kn * 16
        s_vb, s_vh, s_vn = s_vb * 16, s_vh * 16, s_vn * 16

    # the sequence: a batch entry, or the piece [i_bos, i_bos + n_q) of a packed row (batch strides 0)
    n_q, n_k = M, N
    i_bos = tl.zeros([], dtype=tl.int64)
    i_row = i_s * s_split + i_bh.to(tl.int64) * M
    if p_cu is not None:
        i_bos = tl.load(p_cu + i_b).to(tl.int64)
        n_q = (tl.load(p_cu + i_b + 1) - i_bos).to(tl.int32)
        n_k = n_q
        i_row = i_h * M + i_bos
    p_q += i_b * s_qb + i_h * s_qh + (i_bos + i_m * BM) * s_qm
    p_k += i_b * s_kb + i_g * s_kh + i_bos * s_kn
    p_v += i_b * s_vb + i_g * s_vh + i_bos * s_vn

    o_m = i_m * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_q = o_m < n_q
    # [BM, BD]
    m_qd = m_q[:, None] & (o_d < D)[None, :] if PAD_D else m_q[:, None]
    o_q = (tl.arange(0, BM).to(tl.int64) * s_qm)[:, None] + (o_d * s_qd)[None, :]
    b_q = tl.load(p_q + o_q, mask=m_qd, other=0.0)
    # [BD, BN], [BN, BE]
    o_k = (o_n.to(tl.int64) * s_kn)[None, :] + (o_d * s_kd)[:, None]
    o_v = (o_n.to(tl.int64) * s_vn)[:, None] + (o_e * s_ve)[None, :]

    # Scores are kept in bits, with log2 e folded into score_scale; with a bias in nats, so that a bias of
    # -finfo.max stays finite. UNIT is the number of bits in a unit of score.
    UNIT: tl.constexpr = 1.0 if p_bias is None else LOG2E
    # [BM]: running maximum, running Σ exp2(score − maximum), NaN in rows that saw a non-finite value
    b_max = tl.full([BM], -INF, dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_nan = tl.zeros([BM], dtype=tl.float32)
    # [BM, BE]: running Σ exp2(score − maximum) v
    b_o = tl.zeros([BM, BE], dtype=tl.float32)
    if p_sinks is not None:
        b_max = tl.zeros_like(b_max) + tl.load(p_sinks + i_h * s_sink).to(tl.float32) * (LOG2E / UNIT)
        b_sum += 1.0  # exp2(0); where the sink is −inf the first key scales it away
    if p_alibi is not None:
        b_slope = tl.load(p_alibi + i_h) * (LOG2E / UNIT)

    t0, t1, f0, f1 = tile_range(i_m, i_s, n_q, n_k, left, right, split_tiles, LEFT, RIGHT, BM, BN)
    if p_bias is not None:
        f1 = f0  # a bias may mask anywhere
    # EDGE 0: tiles seen whole; EDGE 1: tiles under a mask
    for EDGE in tl.static_range(0 if p_bias is None else 1, 2):
        for i_t in range((t1 - t0) - (f1 - f0) if EDGE else f1 - f0):
            # the edges lie on both sides of the tiles that are seen whole
            i_n = (t0 + i_t + (f1 - f0) * (i_t >= f0 - t0).to(tl.int32) if EDGE else f0 + i_t) * BN
            m_n = i_n + o_n < n_k
            m_kd = (o_d < D)[:, None] & m_n[None, :] if PAD_D else m_n[None, :]
            m_ve = (o_e < E)[None, :] & m_n[:, None] if PAD_E else m_n[:, None]
            # [BD, BN]
            b_k = loaded(p_k + i_n * s_kn + o_k, m_kd, EDGE or PAD_D)
            # [BM, BN]
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * score_scale
            if SOFTCAP:
                b_s = capped(b_s) * cap
            if p_alibi is not None:
                b_s -= b_slope * tl.abs(o_m[:, None] + (n_k - n_q) - i_n - o_n[None, :]).to(tl.float32)
            if EDGE:
                m_s = m_n[None, :]
                if LEFT:
                    m_s = m_s & (i_n + o_n[None, :] >= o_m[:, None] + left)
                if RIGHT:
                    m_s = m_s & (i_n + o_n[None, :] <= o_m[:, None] + right)
                if p_bias is not None:
                    o_b = ((i_bos + o_m) * s_bm)[:, None] + ((i_bos + i_n + o_n) * s_bn)[None, :]
                    b_b = tl.load(
                        p_bias + i_b * s_bb + i_h * s_bh + o_b, mask=m_s & m_q[:, None], other=-INF
                    ).to(tl.float32)
                    m_s = m_s & (b_b != -INF)
                    b_s += b_b
                b_s = tl.where(m_s, b_s, -INF)
            # [BM]
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_shift = tl.where(b_new == -INF, 0.0, b_new) if EDGE else b_new
            b_p = tl.exp2((b_s - b_shift[:, None]) * UNIT)
            b_alpha = tl.exp2((b_max - b_shift) * UNIT)
            b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
            b_max = b_new
            # [BN, BE]
            b_v = loaded(p_v + i_n * s_vn + o_v, m_ve, EDGE or PAD_E)
            if EDGE:
                b_v, b_nan = isolated(b_v, m_s, b_nan)
            b_o = b_o * b_alpha[:, None]
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)

    # a row that saw no key has b_sum = 0 and b_o = 0
    b_total = tl.where(b_sum == 0, 1.0, b_sum)
    b_o = b_o / b_total[:, None] + b_nan[:, None]
    b_lse = b_max * (LN2 * UNIT) + tl.log2(b_total) * LN2
    m_oe = m_q[:, None] & (o_e < E)[None, :] if PAD_E else m_q[:, None]
    o_row = i_row + o_m
    tl.store(p_o + (o_row * E)[:, None] + o_e[None, :], b_o.to(p_o.dtype.element_ty), mask=m_oe)
    tl.store(p_lse + o_row, b_lse, mask=m_q)
    if p_max is not None:  # for the backward pass; a row without keys leaves 0 and 0
        tl.store(p_max + o_row, tl.where(b_max == -INF, 0.0, b_max), mask=m_q)
        tl.store(p_scale + o_row, tl.where(b_max == -INF, 0.0, 1.0 / b_total), mask=m_q)


# Stricter than the default for half precision: q and k enter their matmul as they are, scaled afterwards.
SOFTMAX = Contract(
    family="softmax",
    precision=Precision(matmul_input="ieee"),
    options=("causal", "window", "softcap", "bias", "alibi_slopes", "sinks", "cu_seqlens", "return_lse"),
    supports=Supports(max_head_dim=256),
)


class Call(NamedTuple):
    """What a call of :func:`attention` asks for, apart from its tensors, and how dQ is summed."""

    scale: float
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    causal_alignment: str = "bottom-right"
    input_precision: str = "ieee"
    block_m: int | None = None
    block_n: int | None = None
    atomic: bool = False


@promises(SOFTMAX)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    causal_alignment: str = "bottom-right",
    input_precision: str = "ieee",
    block_m: int | None = None,
    block_n: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of q (B,H,M,D) over k (B,G,N,D), v (B,G,N,E), in one pass over the keys.

    Differentiable, once, in q, k, v, bias and sinks, by o and by lse; see
    :mod:`attnproof.kernels.softmax_backward`. Nothing is kept for that where no input requires a gradient.

    Args:
        q, k, v: float32, float16 or bfloat16, all three alike; any strides; D and E from 1 to 256; H a
            multiple of G.
        scale: factor of q·k.
        causal: query i sees key j when j ≤ i + N − M ("bottom-right") or j ≤ i ("top-left",
            ``causal_alignment``).
        window: (left, right): query i, at p = i + N − M, sees p − left ≤ j ≤ p + right; None lifts a limit.
        softcap: c > 0 turns scores s into c·tanh(s / c).
        bias: added to scores after the cap; broadcasts to (B,H,M,N); −inf masks; q's dtype or float32.
        sinks: (H,) one more logit in each row's normaliser, without a value.
        cu_seqlens: (P+1,) int32, for B = 1 and M = N: P sequences packed one after the other; a bias keeps
            the packed positions.
        alibi_slopes: (H,) float32, a constant: −slope_h·abs(i + N − M − j) is added to scores beside the
            bias.
        return_lse: also return the log of the normaliser.
        causal_alignment: see ``causal``.
        input_precision: "ieee", or "tf32" for float32 operands rounded to tf32.
        block_m, block_n: sides of the tile in place of those of :func:`tiles_for`.

    Returns:
        o (B,H,M,E) of q's dtype, or (o, lse) with lse (B,H,M) float32. A row without keys: o = 0, lse = −inf.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    call = Call(scale, causal, window, softcap, causal_alignment, input_precision, block_m, block_n)
    o, lse = attended(call, q, k, v, bias, sinks, alibi_slopes, cu_seqlens)
    return (o, lse) if return_lse else o


@promises(dataclasses.replace(SOFTMAX, deterministic=False))
def attention_atomic(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention` with a backward pass that adds the parts of dQ up by atomic additions in float32.

    Scores are recomputed once in place of twice, and additions happen in the order in which programs come to
    them: gradients in q differ from run to run by rounding.

    Args:
        q, k, v, scale, bias, sinks, cu_seqlens, alibi_slopes, return_lse: as there.
        options: the other keywords of :func:`attention`.

    Returns:
        o (B,H,M,E) of q's dtype, or (o, lse) with lse (B,H,M) float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    o, lse = attended(Call(scale, **options, atomic=True), q, k, v, bias, sinks, alibi_slopes, cu_seqlens)
    return (o, lse) if return_lse else o


def attended(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse), attached to autograd's graph where an input asks for that."""
    check_attention_tensors(q, k, v, "attention")
    if alibi_slopes is not None:
        alibi_slopes = check_alibi_slopes(alibi_slopes, q, "attention").contiguous()
    longest = q.shape[2]
    if cu_seqlens is not None:
        longest = check_cu_seqlens(cu_seqlens, q, k, "attention")
        cu_seqlens = cu_seqlens.contiguous()
    tensors = (q, k, v, bias, sinks, alibi_slopes, cu_seqlens)
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
        o, lse = Differentiable.apply(call, longest, *tensors)  # type: ignore[no-untyped-call]
    else:
        o, lse, *_ = forward(call, longest, *tensors)
    return o, lse


class Differentiable(torch.autograd.Function):
    """(o, lse) as a function of q, k, v, bias and sinks; its gradients are not differentiable again."""

    @staticmethod
    def forward(ctx: Any, call: Call, longest: int, *tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse, row_max, row_scale = forward(call, longest, *tensors, keep=True)
        ctx.call, ctx.longest = call, longest
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, o, row_max, row_scale)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        from attnproof.kernels.softmax_gradients import Saved, gradients  # which is built on this module

        saved = Saved(*ctx.saved_tensors)
        found = gradients(saved, ctx.call, ctx.longest, do, dlse, ctx.needs_input_grad[2:7])
        return (None, None, *found, None, None)


def forward(
    call: Call,
    longest: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    keep: bool = False,
) -> tuple[torch.Tensor, ...]:
    """(o, lse), and with ``keep`` each row's maximum and 1/Σ exp(score − maximum) for the backward pass."""
    scattered = bias is not None or memory_layout(q, k, v) != ALIGNED
    tiles = tiles_for(q.dtype, q.shape[3], v.shape[3], call.input_precision, scattered=scattered)
    tiles = tiles._replace(block_m=call.block_m or tiles.block_m, block_n=call.block_n or tiles.block_n)
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    rows = (torch.empty_like(lse), torch.empty_like(lse)) if keep else (None, None)
    launch(
        q, k, v, bias, sinks, cu_seqlens, o, lse, alibi_slopes, rows,
        scale=call.scale, causal=call.causal, window=call.window, softcap=call.softcap,
        causal_alignment=call.causal_alignment, input_precision=call.input_precision, tiles=tiles,
        longest=longest, kernel="attention",
    )  # fmt: skip
    return (o, lse, *(x for x in rows if x is not None))


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    alibi_slopes: torch.Tensor | None = None,
    rows: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    *,
    scale: float,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    causal_alignment: str,
    input_precision: str,
    tiles: Tiles,
    longest: int,
    kernel: str,
    splits: int = 1,
    split_tiles: int | None = None,
) -> None:
    """Check the options, then fill o (B,H,M,E) and lse (B,H,M), with one more axis in front for splits."""
    batch, heads, queries, width = q.shape
    keys, value_width = v.shape[2:]
    check_finite("scale", scale, kernel)
    check_positive("softcap", softcap, kernel)
    check_choice("causal_alignment", causal_alignment, ("bottom-right", "top-left"), kernel)
    check_choice("input_precision", input_precision, ("ieee", "tf32"), kernel)
    check_block("block_m", tiles.block_m, kernel)
    check_block("block_n", tiles.block_n, kernel)
    check_sinks(sinks, q, kernel)
    bias = padded_bias(bias, q, keys, kernel)
    band = key_band(
        queries, keys, causal=causal, window=window, causal_alignment=causal_alignment, kernel=kernel
    )
    pieces = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if o.numel() == 0 or longest == 0 or pieces == 0:
        return
    bits = LOG2E.value if bias is None else 1.0
    layout = memory_layout(q, k, v)
    strides = []
    for x in (q, k, v, bias):
        b, h, row, column = (0, 0, 0, 0) if x is None else x.stride()
        # a packed row has one batch entry: its sequences must not move along the batch axis
        b = b if cu_seqlens is None else 0
        unit = 16 if layout == ALIGNED and x is not bias else 1
        strides += [b // unit, h // unit, row // unit, column]
    attention_kernel[(pieces * heads, triton.cdiv(longest, tiles.block_m), splits)](
        q, k, v, bias, sinks, cu_seqlens, o, lse, *strides,
        0 if sinks is None else sinks.stride(0), batch * heads * queries,
        heads, heads // k.shape[1], queries, keys, width, value_width,
        band.left or 0, band.right or 0, split_tiles or max(1, triton.cdiv(keys, tiles.block_n)),
        score_scale=scale * bits if softcap is None else scale / softcap, cap=(softcap or 1.0) * bits,
        p_alibi=alibi_slopes, p_max=rows[0], p_scale=rows[1],
        LEFT=band.left is not None, RIGHT=band.right is not None, SOFTCAP=softcap is not None,
        PAD_D=width != padded_width(width), PAD_E=value_width != padded_width(value_width),
        LAYOUT=layout, PRECISION=input_precision,
        BM=tiles.block_m, BN=tiles.block_n, BD=padded_width(width), BE=padded_width(value_width),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False,
    )  # fmt: skip


SPLIT_KEYS = (
    512  # keys a split: fixed, so that a row's result does not depend on the batch that it comes with
)


@promises(
    dataclasses.replace(
        SOFTMAX,
        options=("causal", "window", "softcap", "bias", "alibi_slopes", "sinks", "return_lse"),
        differentiable=False,
    )
)
def attention_split(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    causal_alignment: str = "bottom-right",
    input_precision: str = "ieee",
    splits: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention` for few queries and many keys: programs share the keys, a second kernel merges their
    results.

    Each split leaves a normalised float32 output and its log-sum-exp; sinks enter once, in the merge.

    Args:
        q, k, v, scale, causal, window, softcap, bias, sinks, alibi_slopes, return_lse, causal_alignment,
            input_precision: as there.
        splits: into how many parts the keys are cut. None cuts them into parts of a fixed size, 512 keys,
            whatever the batch (Thinking Machines 2025, "Defeating nondeterminism in LLM inference"; bugs
            B34).

    Returns:
        o (B,H,M,E) of q's dtype, or (o, lse) with lse (B,H,M) float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    check_attention_tensors(q, k, v, "attention_split")
    check_splits(splits, "attention_split")
    if alibi_slopes is not None:
        alibi_slopes = check_alibi_slopes(alibi_slopes, q, "attention_split").contiguous()
    scattered = bias is not None or memory_layout(q, k, v) != ALIGNED
    tiles = tiles_for(q.dtype, q.shape[3], v.shape[3], input_precision, scattered=scattered)._replace(
        block_m=16
    )
    split_tiles = (
        triton.cdiv(triton.cdiv(k.shape[2], tiles.block_n), splits) if splits else SPLIT_KEYS // tiles.block_n
    )
    split_tiles = max(1, split_tiles)
    parts = max(1, triton.cdiv(k.shape[2], tiles.block_n * split_tiles))
    partial_o = torch.empty((parts, *q.shape[:3], v.shape[3]), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((parts, *q.shape[:3]), dtype=torch.float32, device=q.device)
    check_sinks(sinks, q, "attention_split")
    launch(
        q, k, v, bias, None, None, partial_o, partial_lse, alibi_slopes,
        scale=scale, causal=causal, window=window, softcap=softcap, causal_alignment=causal_alignment,
        input_precision=input_precision, tiles=tiles, longest=q.shape[2],
        splits=parts, split_tiles=split_tiles, kernel="attention_split",
    )  # fmt: skip
    o, lse = merged(partial_o, partial_lse, q.dtype, sinks)
    return (o, lse) if return_lse else o
