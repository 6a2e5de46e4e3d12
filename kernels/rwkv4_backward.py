"""RWKV-4's time mixing, backward: suffix sums per channel, from the last position to the first.

With p_ts the weight of position s in o_t and G_t its cotangent,

    dv_s = Σ_{t ≥ s} p_ts G_t,   dk_s = Σ_{t ≥ s} p_ts G_t (v_s − o_t),   du = Σ_t p_tt G_t (v_t − o_t)
    dw = Σ_t Σ_{s < t} (t − 1 − s) p_ts G_t (v_s − o_t)

The forward pass leaves for every t the reference of the set it read, a logit r_t of position i_t whose
exponent r_t + (t − 1 − i_t) w is the largest of the s < t, and c_t = e^(that exponent) over the normaliser,
so that p_ts = e^{(k_s − r_t) + (i_t − s) w} c_t. Neither factor of e^{k_s − s w} · e^{i_t w − r_t} need be a
number of the format, and neither is formed. Walking down, the sums over t > s of c_t G_t, c_t G_t o_t and of
both times t − 1 − s are held in units of the reference of t = s + 1. References never fall with t, so that
handing the sums on multiplies by at most 1, and k_s is at most the reference of t = s + 1: no exponent is
above 0, and what underflows is such a weight as well. Exponents are differences of logits plus a whole number
of decays, as in the forward pass.

The final state (a_N, b_N, p_N) takes cotangents da, db and p_N none, for whoever reads it on reads
e^{p_N} a_N and e^{p_N} b_N: p_N is held constant where it is made, and then p_0 where it is read. It is one
more row, N, whose c is 1: the walk begins with da in place of c_t G_t and −db in place of c_t G_t o_t, in
units of the reference of what row N reads. An initial state is one more position, −1, of logit p_0.

The moments grow by F ← f (F + G): all coefficients are ≥ 0, and no difference of large sums stands for a
small t − 1 − s. o is that of before its rounding. Every program owns its channels; the parts of batch entries
in dw and du are added from the first to the last.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.prefix_scan_backward import column_sums

__all__ = ["CHANNELS", "gradients", "lead"]

INF: tl.constexpr = tl.constexpr(math.inf)
# Channels of a program that goes position by position: one a thread.
CHANNELS = 32


@triton.jit
def lead(b_r, i_r, b_r2, i_r2, b_w):
    """(b_r − b_r2) + (i_r2 − i_r) b_w: how far, at any one time, the exponent of logit b_r of position i_r is
    above that of b_r2 of i_r2. Two neutral ones are level; no decays are 0 even of b_w = −inf.
    """
    b_gap = tl.where(b_r == b_r2, 0.0, b_r - b_r2)
    i_steps = i_r2 - i_r
    return b_gap + tl.where(i_steps == 0, 0.0, i_steps.to(tl.float32) * b_w)


@triton.jit(
    do_not_specialize=[
        *("p_r", "p_i", "p_c", "p_own", "p_da1", "p_db1", "p_a0", "p_b0", "p_p0", "p_dk", "p_dv", "p_dw"),
        *("p_du", "p_da0", "p_db0", "s_w", "s_kb", "s_kh", "s_kn", "s_vb", "s_vh", "s_vn", "s_ob", "s_oh"),
        *("s_on", "H", "N"),
    ]
)  # fmt: skip
def suffix_kernel(
    p_w, p_k, p_v, p_o, p_do, p_r, p_i, p_c, p_own, p_da1, p_db1, p_a0, p_b0, p_p0,
    p_dk, p_dv, p_dw, p_du, p_da0, p_db0, s_w: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_on: tl.int64, H, N, BH: tl.constexpr,
):  # fmt: skip
    """dk, dv, and the part of one batch entry in dw and du (B, H), of a block of channels.

    p_da1 and p_db1 (B, H) are the final state's cotangents. Where p_a0 is not None, gradients of the initial
    state go to p_da0 and p_db0, likewise.
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
    m_h = o_h < H
    b_w = tl.load(p_w + o_h * s_w, mask=m_h, other=0.0).to(tl.float32)
    o_end = i_b * H + o_h
    # row N reads what the last position read, and that position
    o_last = tl.zeros([], dtype=tl.int64) + (N - 1)
    b_k = tl.load(p_k + i_b * s_kb + o_h * s_kh + o_last * s_kn, mask=m_h, other=0.0).to(tl.float32)
    b_r = tl.load(p_r + o_end * N + o_last, mask=m_h, other=0.0)
    i_r = tl.load(p_i + o_end * N + o_last, mask=m_h, other=0)
    m_r = lead(b_r, i_r, b_k, N - 1, b_w) >= 0
    # [BH]: the reference, the sums of cG and cGo, their moments, and dw and du so far
    b_r, i_r = tl.where(m_r, b_r, b_k), tl.where(m_r, i_r, N - 1)
    b_g = tl.load(p_da1 + o_end, mask=m_h, other=0.0)
    b_go = -tl.load(p_db1 + o_end, mask=m_h, other=0.0)
    b_f, b_fo = tl.zeros([BH], dtype=tl.float32), tl.zeros([BH], dtype=tl.float32)
    b_dw, b_du = tl.zeros([BH], dtype=tl.float32), tl.zeros([BH], dtype=tl.float32)
    for i_t in range(N):
        i_s = N - 1 - i_t
        i_n = tl.zeros([], dtype=tl.int64) + i_s
        o_row = (i_b * H + o_h) * N + i_n
        b_k = tl.load(p_k + i_b * s_kb + o_h * s_kh + i_n * s_kn, mask=m_h, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + i_b * s_vb + o_h * s_vh + i_n * s_vn, mask=m_h, other=0.0).to(tl.float32)
        b_do = tl.load(p_do + i_b * s_ob + o_h * s_oh + i_n * s_on, mask=m_h, other=0.0).to(tl.float32)
        b_o = tl.load(p_o + o_row, mask=m_h, other=0.0)
        b_own = tl.load(p_own + o_row, mask=m_h, other=0.0) * b_do
        b_weight = tl.exp(tl.minimum(lead(b_k, i_s, b_r, i_r, b_w), 0.0))
        b_dv = b_weight * b_g + b_own
        b_dk = b_weight * (b_v * b_g - b_go) + b_own * (b_v - b_o)
        tl.store(p_dv + o_row, b_dv.to(p_dv.dtype.element_ty), mask=m_h)
        tl.store(p_dk + o_row, b_dk.to(p_dk.dtype.element_ty), mask=m_h)
        b_dw += b_weight * (b_v * b_f - b_fo)
        b_du += b_own * (b_v - b_o)
        # from t > s to t > s − 1: one decay more for all, and position s, which starts without any
        b_next = tl.load(p_r + o_row, mask=m_h, other=0.0)
        i_next = tl.load(p_i + o_row, mask=m_h, other=0)
        b_c = tl.load(p_c + o_row, mask=m_h, other=0.0) * b_do
        b_kept = tl.exp(tl.minimum(lead(b_next, i_next, b_r, i_r, b_w), 0.0))
        b_f, b_fo = b_kept * (b_f + b_g), b_kept * (b_fo + b_go)
        b_g, b_go = b_kept * b_g + b_c, b_kept * b_go + b_c * b_o
        b_r, i_r = b_next, i_next
    if p_a0 is not None:
        # what the first state holds decays from position −1 on
        b_p0 = tl.load(p_p0 + o_end, mask=m_h, other=-INF)
        b_weight = tl.exp(tl.minimum(lead(b_p0, -1, b_r, i_r, b_w), 0.0))
        b_a0, b_b0 = tl.load(p_a0 + o_end, mask=m_h, other=0.0), tl.load(p_b0 + o_end, mask=m_h, other=0.0)
        b_dw += b_weight * (b_a0 * b_f - b_b0 * b_fo)
        tl.store(p_da0 + o_end, b_weight * b_g, mask=m_h)
        tl.store(p_db0 + o_end, -b_weight * b_go, mask=m_h)
    tl.store(p_dw + o_end, b_dw, mask=m_h)
    tl.store(p_du + o_end, b_du, mask=m_h)


def gradients(
    tensors: tuple[torch.Tensor, ...],
    start: tuple[torch.Tensor, ...] | None,
    o: torch.Tensor,
    rows: torch.Tensor,
    places: torch.Tensor,
    do: torch.Tensor,
    dend: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """dw, du (H), dk, dv (B,H,N), contiguous, in the inputs' dtypes; of an initial state's a and b (B,H) in
    float32, or None without one.

    Args:
        tensors: w, u, k, v.
        start: the initial state's a, b, p (B,H) float32, contiguous, or None.
        o: (B,H,N) float32, contiguous.
        rows: (3,B,H,N) float32: the reference of the state that each position reads, c and its own weight.
        places: (B,H,N) int32, the references' positions.
        do: the cotangent of o, any strides.
        dend: the cotangents of the final state's a and b (B,H), any strides.
    """
    w, u, k, v = tensors
    batch, heads, length = k.shape
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if not k.numel():
        dw, du = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (w, u))
        # the final state is the initial one
        return dw, du, dk, dv, *(dend if start else (None, None))
    parts = o.new_empty(2, batch, heads)
    da, db = o.new_empty(2, batch, heads)
    suffix_kernel[(batch, triton.cdiv(heads, CHANNELS))](
        w, k, v, o, do, rows[0], places, rows[1], rows[2], *(x.contiguous() for x in dend),
        *(start or (None, None, None)), dk, dv, *parts, da, db, w.stride(0), *k.stride(), *v.stride(),
        *do.stride(), heads, length, BH=CHANNELS, num_warps=1, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    dstart = (da, db) if start else (None, None)
    return column_sums(parts[0], w), column_sums(parts[1], u), dk, dv, *dstart
