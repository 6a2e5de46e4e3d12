"""Differential attention, backward (the forward pass is :mod:`attnproof.kernels.differential`).

With δ^t_i = dO_i·o^t_i and dP = dO Vᵀ:

    dS¹ = P¹∘(dP − δ¹),   dS² = −λ P²∘(dP − δ²),   dq^t = scale·dS^t k^t,   dk^t = scale·dS^tᵀ q^t,
    dv = (P¹ − λP²)ᵀ dO,   dλ_h = −Σ_{b,i} δ²_i

P is recomputed from the row's maximum and log-sum, kept apart so that a weight does not inherit the rounding
of a large log-sum-exp; o¹ and o² are kept in float32, so that δ is not that of a rounded output. In float16
weights and score gradients enter their matmuls scaled by a power of two (``stored`` of
:mod:`attnproof.kernels.softmax_backward`). Each gradient is summed by one program, in one order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.differential import SIZES, STRIDES, blocks, diagonal, sizes, strides
from attnproof.kernels.softmax_backward import stored
from attnproof.kernels.tiles import Tiles, memory_layout, padded_width

__all__ = ["gradients"]

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
INF: tl.constexpr = tl.constexpr(math.inf)
COTANGENT = ["s_gb", "s_gh", "s_gm", "s_ge"]
# Rows a program takes of what it only multiplies and sums, and rows a step of the sum over a whole head.
ROWS, COLUMNS = 16, 1024


@triton.jit(do_not_specialize=["B", "H", "M", "E", *COTANGENT])
def delta_kernel(
    p_g, p_partial, p_delta, s_gb: tl.int64, s_gh: tl.int64, s_gm: tl.int64, s_ge: tl.int64, B, H, M, E,
    BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """δ¹ and δ², (2,B,H,M): the inner products of a row's cotangent with its two partial outputs."""
    o_r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_e = tl.arange(0, BE)
    s_p = tl.cast(B, tl.int64) * H * M
    m_r = o_r < s_p
    m_re = m_r[:, None] & (o_e < E)[None, :]
    o_g = (o_r // M // H) * s_gb + (o_r // M % H) * s_gh + (o_r % M) * s_gm
    # [BM, BE]
    b_g = tl.load(p_g + o_g[:, None] + (o_e * s_ge)[None, :], mask=m_re, other=0.0).to(tl.float32)
    for i_t in tl.static_range(2):
        o_p = i_t * s_p + o_r
        b_o = tl.load(p_partial + (o_p * E)[:, None] + o_e[None, :], mask=m_re, other=0.0)
        tl.store(p_delta + o_p, tl.sum(b_g * b_o, 1), mask=m_r)


@triton.jit(do_not_specialize=["B", "H", "M"])
def lam_gradient_kernel(p_delta, p_dlam, B, H, M, BM: tl.constexpr):
    """dλ_h = −Σ_{b,i} δ²_i: one program a head, so that the order of the sum is fixed."""
    i_h = tl.program_id(0)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    for i_b in range(B):
        o_r = (tl.cast(B, tl.int64) + i_b) * H * M + i_h * M
        for i_m in range(0, M, BM):
            o_m = i_m + tl.arange(0, BM)
            b_sum += tl.load(p_delta + o_r + o_m, mask=o_m < M, other=0.0)
    tl.store(p_dlam + i_h, (-tl.sum(b_sum, 0)).to(p_dlam.dtype.element_ty))


@triton.jit
def recomputed(b_q, b_k, m_s, p_max, p_log, o_r, m_q, score_scale, PRECISION: tl.constexpr):
    """P of one half for a tile of queries b_q [BM, BD] and keys b_k [BN, BD]; 0 where m_s is not set."""
    # [BM]
    b_max = tl.load(p_max + o_r, mask=m_q, other=0.0)
    b_log = tl.load(p_log + o_r, mask=m_q, other=0.0)
    # [BM, BN]; a score summed in another order than the forward pass did may exceed the maximum by a rounding
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * score_scale
    b_s = tl.minimum(b_s - b_max[:, None], 0.0) - b_log[:, None]
    return tl.exp2(tl.where(m_s, b_s, -INF))


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *COTANGENT, "right"])
def query_gradient_kernel(
    p_q, p_k, p_v, p_lam, p_g, p_row, p_delta, p_dq,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gm: tl.int64, s_ge: tl.int64,
    s_lam: tl.int64, B, H, GROUP, M, N, D, E, right, scale,
    CAUSAL: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dq, a tile of queries a program: every key tile that one of its rows sees."""
    i_bh, i_m = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = (i_bh % H // GROUP).to(tl.int64)
    if LAYOUT > 0:
        s_qd, s_kd, s_ve, s_ge = 1, 1, 1, 1
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_g * s_kh
    p_v += i_b * s_vb + i_g * s_vh
    p_g += i_b * s_gb + i_h * s_gh
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_q = o_m < M
    m_qd = m_q[:, None] & (o_d < D)[None, :]
    o_q = (o_m * s_qm)[:, None] + (o_d * s_qd)[None, :]
    # [BM, BD], [BM, BE]
    b_q1 = tl.load(p_q + o_q, mask=m_qd, other=0.0)
    b_q2 = tl.load(p_q + D * s_qd + o_q, mask=m_qd, other=0.0)
    m_ge = m_q[:, None] & (o_e < E)[None, :]
    b_g = tl.load(p_g + (o_m * s_gm)[:, None] + (o_e * s_ge)[None, :], mask=m_ge, other=0.0)
    s_p = tl.cast(B, tl.int64) * H * M
    o_r = i_bh.to(tl.int64) * M + o_m
    # [BM]
    b_delta1 = tl.load(p_delta + o_r, mask=m_q, other=0.0)
    b_delta2 = tl.load(p_delta + s_p + o_r, mask=m_q, other=0.0)
    b_dq1 = tl.zeros([BM, BD], dtype=tl.float32)
    b_dq2 = tl.zeros([BM, BD], dtype=tl.float32)
    hi = N
    if CAUSAL:  # past the last key that the tile's last query sees
        hi = tl.minimum(tl.maximum(tl.minimum((i_m + 1) * BM, M) + right, 0), N)
    for i_t in range((hi + BN - 1) // BN):
        o_n = i_t * BN + tl.arange(0, BN)
        m_n = o_n < N
        m_kd = m_n[:, None] & (o_d < D)[None, :]
        m_ve = m_n[:, None] & (o_e < E)[None, :]
        # [BN, BD], [BN, BE]
        o_k = (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :]
        b_k1 = tl.load(p_k + o_k, mask=m_kd, other=0.0)
        b_k2 = tl.load(p_k + D * s_kd + o_k, mask=m_kd, other=0.0)
        b_v = tl.load(p_v + (o_n * s_vn)[:, None] + (o_e * s_ve)[None, :], mask=m_ve, other=0.0)
        m_s = m_q[:, None] & m_n[None, :]
        if CAUSAL:
            m_s = m_s & (o_n[None, :] <= o_m[:, None] + right)
        # [BM, BN]
        b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
        b_p = recomputed(b_q1, b_k1, m_s, p_row, p_row + 2 * s_p, o_r, m_q, scale * LOG2E, PRECISION)
        b_ds, b_factor = stored(b_p * (b_dp - b_delta1[:, None]), b_k1.dtype)
        b_dq1 += tl.dot(b_ds, b_k1, input_precision=PRECISION) * b_factor
        b_p = recomputed(b_q2, b_k2, m_s, p_row + s_p, p_row + 3 * s_p, o_r, m_q, scale * LOG2E, PRECISION)
        b_ds, b_factor = stored(b_p * (b_dp - b_delta2[:, None]), b_k2.dtype)
        b_dq2 += tl.dot(b_ds, b_k2, input_precision=PRECISION) * b_factor
    b_lam = tl.load(p_lam + i_h * s_lam).to(tl.float32)
    p_dq += (o_r * 2 * D)[:, None] + o_d[None, :]
    tl.store(p_dq, (b_dq1 * scale).to(p_dq.dtype.element_ty), mask=m_qd)
    tl.store(p_dq + D, (b_dq2 * scale * -b_lam).to(p_dq.dtype.element_ty), mask=m_qd)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *COTANGENT, "right"])
def key_gradient_kernel(
    p_q, p_k, p_v, p_lam, p_g, p_row, p_delta, p_dk, p_dv,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gm: tl.int64, s_ge: tl.int64,
    s_lam: tl.int64, B, H, GROUP, M, N, D, E, right, scale,
    CAUSAL: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dk and dv, a tile of keys a program: every query tile of every head of the group that sees it."""
    i_bg, i_t = tl.program_id(0), tl.program_id(1)
    G = H // GROUP
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    if LAYOUT > 0:
        s_qd, s_kd, s_ve, s_ge = 1, 1, 1, 1
    o_n = i_t * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_n = o_n < N
    m_kd = m_n[:, None] & (o_d < D)[None, :]
    m_ve = m_n[:, None] & (o_e < E)[None, :]
    p_k += i_b * s_kb + i_g * s_kh + (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :]
    p_v += i_b * s_vb + i_g * s_vh + (o_n * s_vn)[:, None] + (o_e * s_ve)[None, :]
    # [BN, BD], [BN, BE]
    b_k1 = tl.load(p_k, mask=m_kd, other=0.0)
    b_k2 = tl.load(p_k + D * s_kd, mask=m_kd, other=0.0)
    b_v = tl.load(p_v, mask=m_ve, other=0.0)
    b_dk1 = tl.zeros([BN, BD], dtype=tl.float32)
    b_dk2 = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BE], dtype=tl.float32)
    s_p = tl.cast(B, tl.int64) * H * M
    first = 0
    if CAUSAL:  # the first query that sees the first key of the tile
        first = tl.maximum(i_t * BN - right, 0) // BM * BM
    for i_group in range(GROUP):
        i_h = i_g * GROUP + i_group
        b_lam = tl.load(p_lam + i_h * s_lam).to(tl.float32)
        for i_m in range(first, M, BM):
            o_m = i_m + tl.arange(0, BM)
            m_q = o_m < M
            m_qd = m_q[:, None] & (o_d < D)[None, :]
            m_ge = m_q[:, None] & (o_e < E)[None, :]
            # [BM, BD], [BM, BE]
            o_q = i_b * s_qb + i_h * s_qh + (o_m * s_qm)[:, None] + (o_d * s_qd)[None, :]
            b_q1 = tl.load(p_q + o_q, mask=m_qd, other=0.0)
            b_q2 = tl.load(p_q + D * s_qd + o_q, mask=m_qd, other=0.0)
            o_g = i_b * s_gb + i_h * s_gh + (o_m * s_gm)[:, None] + (o_e * s_ge)[None, :]
            b_g = tl.load(p_g + o_g, mask=m_ge, other=0.0)
            o_r = (i_b * H + i_h) * M + o_m
            m_s = m_q[:, None] & m_n[None, :]
            if CAUSAL:
                m_s = m_s & (o_n[None, :] <= o_m[:, None] + right)
            # [BM, BN]
            b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
            b_p1 = recomputed(b_q1, b_k1, m_s, p_row, p_row + 2 * s_p, o_r, m_q, scale * LOG2E, PRECISION)
            b_delta = tl.load(p_delta + o_r, mask=m_q, other=0.0)
            b_ds, b_factor = stored(b_p1 * (b_dp - b_delta[:, None]), b_q1.dtype)
            b_dk1 += tl.dot(tl.trans(b_ds), b_q1, input_precision=PRECISION) * b_factor
            b_p2 = recomputed(
                b_q2, b_k2, m_s, p_row + s_p, p_row + 3 * s_p, o_r, m_q, scale * LOG2E, PRECISION
            )
            b_p2 = b_p2 * -b_lam
            b_delta = tl.load(p_delta + s_p + o_r, mask=m_q, other=0.0)
            b_ds, b_factor = stored(b_p2 * (b_dp - b_delta[:, None]), b_q2.dtype)
            b_dk2 += tl.dot(tl.trans(b_ds), b_q2, input_precision=PRECISION) * b_factor
            b_p, b_factor = stored(b_p1 + b_p2, b_g.dtype)
            b_dv += tl.dot(tl.trans(b_p), b_g, input_precision=PRECISION) * b_factor
    o_r = i_bg.to(tl.int64) * N + o_n
    p_dk += (o_r * 2 * D)[:, None] + o_d[None, :]
    tl.store(p_dk, (b_dk1 * scale).to(p_dk.dtype.element_ty), mask=m_kd)
    tl.store(p_dk + D, (b_dk2 * scale).to(p_dk.dtype.element_ty), mask=m_kd)
    tl.store(p_dv + (o_r * E)[:, None] + o_e[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_ve)


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    partial: torch.Tensor,
    row: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv and dλ.

    Args:
        q, k, v, lam, scale, causal: as the forward pass took them.
        partial: (2,B,H,M,E) float32, o¹ and o².
        row: (4,B,H,M) float32: maxima of the two scores in bits, and the base-2 logarithms of
            Σ exp2(score − maximum); 0 for a row without keys.
        g: (B,H,M,E) the cotangent of o, any strides.

    Returns:
        gradients of the shape and dtype of q, k, v and lam, contiguous.
    """
    delta = torch.empty(partial.shape[:-1], dtype=torch.float32, device=q.device)
    dq, dk, dv, dlam = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, lam))
    batch, heads, queries, width = g.shape
    if delta.numel():
        delta_kernel[(triton.cdiv(delta.numel() // 2, ROWS),)](
            g, partial, delta, *g.stride(), batch, heads, queries, width,
            BM=ROWS, BE=padded_width(width), enable_fp_fusion=False,
        )  # fmt: skip
    lam_gradient_kernel[(heads,)](delta, dlam, batch, heads, queries, BM=COLUMNS, enable_fp_fusion=False)
    tiles = backward_tiles(q.dtype, q.shape[3] // 2, width)
    shared = (*strides(q, k, v, g), lam.stride(0), *sizes(q, k, v), diagonal(q, k, causal), scale)
    options = {"CAUSAL": causal, "LAYOUT": min(memory_layout(q, k, v, g), 1), **blocks(q, v, tiles)}
    if dq.numel():
        query_gradient_kernel[(batch * heads, triton.cdiv(queries, tiles.block_m))](
            q, k, v, lam, g, row, delta, dq, *shared, **options
        )
    if dk.numel():
        key_gradient_kernel[(batch * k.shape[1], triton.cdiv(k.shape[2], tiles.block_n))](
            q, k, v, lam, g, row, delta, dk, dv, *shared, **options
        )
    return dq, dk, dv, dlam


def backward_tiles(dtype: torch.dtype, width: int, value_width: int) -> Tiles:
    """The tile of the gradients' kernels; a program of keys holds three tiles of inputs and three of sums.

    Measured as in :func:`attnproof.kernels.tiles.tiles_for`: no register is spilled up to a width of 128.
    """
    narrow = max(padded_width(width), padded_width(value_width)) <= 64
    rows, keys = (16, 32) if narrow and dtype == torch.float32 else (32, 16)
    return Tiles(rows, keys, num_warps=8, num_stages=1)
