"""Prefix attention, backward: suffix sums in one reverse scan of the forward pass's own monoid.

With p_tj = e^{s_j − m_t}/u_t, Δ_t = Σ_e dO_te o_te and x_t = (dO_t, Δ_t)/u_t,

    dv_j = Σ_{t ≥ j} p_tj dO_t,   ds_j = v_j·dv_j − Σ_{t ≥ j} p_tj Δ_t
    dk_j = scale ds_j q,          dq = scale Σ_{b, j} ds_j k_j

Both sums are e^{s_j} Σ_{t ≥ j} e^{−m_t} x_t. Neither factor need be a number of the format, so they are never
formed: the sum is that of the triples with logits −m_t and values x_t, each scaled by its own largest
exponent. m_t does not fall with t, so the largest exponent of t ≥ j is −m_j, the scan multiplies by
e^{m_j − m_t} ≤ 1, and what is left is e^{s_j − m_j} ≤ 1. What underflows is such a weight as well.

The final state (m_N, u_N, w_N) takes cotangents du, dw and its level m_N none, for whoever reads it on reads
e^{m_N} u_N and e^{m_N} w_N: m_N is held constant where it is made, and then m_0 where it is read. It is one
more row behind the last: the scan begins from (−m_N, −du, dw) and not from the neutral triple. An initial
state is one more position before the first, of logit m_0: its gradients are what the scan ends with, times
e^{m_0}.

What is kept on purpose:

* m and u are stored and not the logarithm of the sum, whose rounding is a relative error abs(s)·2⁻²⁴ of every
  weight; and the logits of the forward pass, so that s_j ≤ m_j holds as stored.
* Δ is formed from o as it was before it was rounded.
* All sums have one owner and one order: a slice of E leaves its part of ds and of the initial u's gradient, a
  block its part of dq.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.prefix_scan_blocks import COLUMNS, POSITIONS, WARPS, block_scan, joined_rows
from attnproof.kernels.states import register_limit

__all__ = ["column_sums", "gradients"]

INF: tl.constexpr = tl.constexpr(math.inf)
# Columns a program of the last sum.
SUM_COLUMNS = 128


@triton.jit(
    do_not_specialize=[
        *("p_m", "p_u", "p_dv", "p_ds", "p_du1", "p_dw1", "p_m0", "p_du0", "p_dw0", "s_vb", "s_vh", "s_vn"),
        *("s_ve", "s_ob", "s_oh", "s_on", "s_oe", "B", "H", "N", "E"),
    ]
)  # fmt: skip
def suffix_kernel(
    p_s, p_m, p_u, p_v, p_o, p_do, p_dv, p_ds, p_du1, p_dw1, p_m0, p_du0, p_dw0,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_on: tl.int64, s_oe: tl.int64,
    B, H, N, E, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dv of a slice of E, and its part of ds, to p_ds (slices, B, H, N): the last block first.

    p_du1 (B,H) and p_dw1 (B,H,E) are the final state's cotangents. Where p_m0 is not None, the gradients of
    an initial state as well: the slice's part of that of u, to p_du0 (slices, B, H), and its columns of w's.
    """
    i_bh, i_e = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    o_r, o_e = tl.arange(0, BN), i_e * BE + tl.arange(0, BE)
    m_e = o_e < E
    p_v += i_b * s_vb + i_h * s_vh
    p_do += i_b * s_ob + i_h * s_oh
    p_ds += i_e * (B * H).to(tl.int64) * N
    # [1], [1], [1, BE]; of the slices the first has du
    o_one = tl.arange(0, 1)
    b_cm = -tl.load(p_m + i_bh * N + (N - 1) + o_one)
    b_cu = tl.where(i_e == 0, -tl.load(p_du1 + i_bh + o_one), 0.0)
    b_cw = tl.load(p_dw1 + i_bh * E + o_e, mask=m_e, other=0.0)[None, :]
    i_blocks = (N + BN - 1) // BN
    for i_t in range(i_blocks):
        o_n = (i_blocks - 1 - i_t).to(tl.int64) * BN + o_r
        m_n = o_n < N
        o_row = i_bh * N + o_n
        b_s = tl.load(p_s + o_row, mask=m_n, other=0.0)
        b_m = tl.load(p_m + o_row, mask=m_n, other=INF)
        b_u = tl.load(p_u + o_row, mask=m_n, other=1.0)
        # [BN, BE]
        m_v = m_n[:, None] & m_e[None, :]
        b_v = tl.load(p_v + (o_n * s_vn)[:, None] + (o_e * s_ve)[None, :], mask=m_v, other=0.0)
        b_o = tl.load(p_o + (o_row * E)[:, None] + o_e[None, :], mask=m_v, other=0.0)
        b_do = tl.load(p_do + (o_n * s_on)[:, None] + (o_e * s_oe)[None, :], mask=m_v, other=0.0)
        b_do = b_do.to(tl.float32) / b_u[:, None]
        # sums of Δ, which may be of either sign, take the place of u
        b_sm, b_su, b_sw = block_scan(-b_m, tl.sum(b_do * b_o, 1), b_do, True)
        b_sm, b_su, b_sw = joined_rows(b_cm, b_cu, b_cw, b_sm, b_su, b_sw)
        b_own = tl.exp(tl.minimum(b_s + b_sm, 0.0, propagate_nan=tl.PropagateNan.ALL))
        b_dv = b_sw * b_own[:, None]
        b_ds = tl.sum(b_dv * b_v.to(tl.float32), 1) - b_su * b_own
        tl.store(p_dv + (o_row * E)[:, None] + o_e[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_v)
        tl.store(p_ds + o_row, b_ds, mask=m_n)
        b_cm = tl.sum(tl.where(o_r == 0, b_sm, 0.0), 0, keep_dims=True)
        b_cu = tl.sum(tl.where(o_r == 0, b_su, 0.0), 0, keep_dims=True)
        b_cw = tl.sum(tl.where((o_r == 0)[:, None], b_sw, 0.0), 0, keep_dims=True)
    if p_m0 is not None:
        # no later level is below m_0, which is −∞ in a neutral state, whose gradients are 0
        b_m0 = tl.load(p_m0 + i_bh + o_one)
        b_own = tl.exp(tl.minimum(b_m0 + b_cm, 0.0, propagate_nan=tl.PropagateNan.ALL))
        tl.store(p_du0 + i_e * (B * H).to(tl.int64) + i_bh + o_one, -b_cu * b_own)
        tl.store(p_dw0 + i_bh * E + o_e[None, :], b_cw * b_own[:, None], mask=m_e[None, :])


@triton.jit(
    do_not_specialize=[
        *("p_dk", "p_dq", "s_qh", "s_qd", "s_kb", "s_kh", "s_kn", "s_kd", "SLICES", "B", "H", "N", "D"),
    ]
)  # fmt: skip
def key_kernel(
    p_q, p_k, p_ds, p_dk, p_dq, s_qh: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64, SLICES, B, H, N, D, scale,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dk of a block of positions, and its part of dq, to p_dq (B, blocks, H, D)."""
    i_bh, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    o_row = i_bh * N + o_n
    # [BN]
    b_ds = tl.zeros([BN], dtype=tl.float32)
    for i_e in range(SLICES):
        b_ds += tl.load(p_ds + i_e * (B * H).to(tl.int64) * N + o_row, mask=m_n, other=0.0)
    p_dq += ((i_b * tl.num_programs(1) + i_n) * H + i_h) * D
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        # [BN, BD]
        m_k = m_n[:, None] & (o_d < D)[None, :]
        b_q = tl.load(p_q + i_h * s_qh + o_d * s_qd, mask=o_d < D, other=0.0).to(tl.float32)
        o_k = i_b * s_kb + i_h * s_kh + (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :]
        b_k = tl.load(p_k + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_dk = (b_ds * scale)[:, None] * b_q[None, :]
        tl.store(p_dk + (o_row * D)[:, None] + o_d[None, :], b_dk.to(p_dk.dtype.element_ty), mask=m_k)
        tl.store(p_dq + o_d, tl.sum(b_ds[:, None] * b_k, 0) * scale, mask=o_d < D)


@triton.jit(do_not_specialize=["p_y", "R", "C"])
def column_kernel(p_x, p_y, R, C, BC: tl.constexpr):
    """Sums over the first axis of x (R, C), from the first row to the last."""
    o_c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    b_sum = tl.zeros([BC], dtype=tl.float32)
    for i_r in range(R):
        b_sum += tl.load(p_x + i_r * C.to(tl.int64) + o_c, mask=o_c < C, other=0.0)
    tl.store(p_y + o_c, b_sum.to(p_y.dtype.element_ty), mask=o_c < C)


def column_sums(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Σ over the first axis of x (R, …), contiguous float32, of the dtype and shape of ``like``."""
    total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if total.numel():
        column_kernel[(triton.cdiv(total.numel(), SUM_COLUMNS),)](
            x, total, x.shape[0], total.numel(), BC=SUM_COLUMNS, num_warps=WARPS, enable_fp_fusion=False
        )
    return total


def gradients(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    s: torch.Tensor,
    rows: torch.Tensor,
    o: torch.Tensor,
    do: torch.Tensor,
    dend: tuple[torch.Tensor, torch.Tensor],
    level: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """dq (H,D), dk (B,H,N,D), dv (B,H,N,E), contiguous, in the dtypes of q, k and v; of an initial state's u
    (B,H) and w (B,H,E) in float32, or None without one.

    Args:
        tensors: q, k, v.
        scale: of the logits.
        s, rows: (B,H,N) logits and (2,B,H,N) m and u of every position, float32, from the forward pass.
        o: (B,H,N,E) float32, contiguous.
        do: the cotangent of o, any strides.
        dend: the cotangents of the final state's u (B,H) and w (B,H,E), any strides.
        level: the initial state's m (B,H), contiguous, or None without one.
    """
    q, k, v = tensors
    batch, heads, length, width = k.shape
    value_width = v.shape[3]
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if not s.numel():
        # the final state is the initial one
        return torch.zeros_like(q), dk, dv, *(dend if level is not None else (None, None))
    slices, blocks = triton.cdiv(value_width, COLUMNS), triton.cdiv(length, POSITIONS)
    ds = s.new_empty(slices, *s.shape)
    du, dw = (x.contiguous() for x in dend)
    # of an initial state: parts of the slices of E, and columns
    shares, columns = s.new_empty(slices, batch, heads), s.new_empty(batch, heads, value_width)
    suffix_kernel[(batch * heads, slices)](
        s, rows[0], rows[1], v, o, do, dv, ds, du, dw, level, shares, columns, *v.stride(), *do.stride(),
        batch, heads, length, value_width,
        BN=POSITIONS, BE=COLUMNS, num_warps=WARPS, num_stages=1, enable_fp_fusion=False,
        **register_limit(WARPS),
    )  # fmt: skip
    parts = s.new_empty(batch * blocks, heads, width)
    key_kernel[(batch * heads, blocks)](
        q, k, ds, dk, parts, *q.stride(), *k.stride(), slices, batch, heads, length, width, scale,
        BN=POSITIONS, BD=COLUMNS, num_warps=WARPS, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    dstart = (None, None) if level is None else (column_sums(shares, level), columns)
    return column_sums(parts, q), dk, dv, *dstart
