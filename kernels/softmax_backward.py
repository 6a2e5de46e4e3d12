"""Softmax attention, backward: gradients of o and of the log-sum-exp, without an atomic addition.

    p_ij = exp(s_ij − L_i),   Δ_i = Σ_e dO_ie·O_ie − dL_i
    dV = Pᵀ dO,   dS_ij = p_ij · (dO_i·v_j − Δ_i)
    dQ = scale · dS K,   dK = scale · dSᵀ Q,   dbias = Σ dS,   dsink_h = −Σ_i p_sink,i · Δ_i

(Dao et al., arXiv 2205.14135, Algorithm 4; the cotangent dL of the log-sum-exp enters by Δ, because
dL_i/ds_ij is p_ij; a sink is a logit whose value is 0.) With a cap, s = c·tanh(x), dS is multiplied by
1 − tanh² x before it meets K and Q. Δ is formed from the *stored* O. One program computes dK and dV of a tile
of keys for a whole group of query heads, one dQ of a tile of queries, one the part of a tile in the gradient
of the bias: every sum has one owner and one order. :mod:`attnproof.kernels.softmax_gradients` launches them.

What is kept on purpose:

* The forward pass leaves the maximum m_i and 1/Σ_j exp(s_ij − m_i) of a row, not their logarithm's sum: P
  from a rounded L has the relative error abs(L)·2⁻²⁴ (theory LSE-7), all of P at scores of 1e7.
* s − m is at most 0 in the forward pass, and is cut off at 0 here: a product that a backward tile sums in
  another order may exceed the maximum by its rounding, which overflows exp2 at scores of 1e10.
* A row without keys has m = 0 and the factor 0 in place of 1/0, and Δ = 0 whatever the cotangents are.
* 1 − tanh² x is computed as 4t/(1 + t)², t = exp(−2·abs(x)), which does not cancel where the cap saturates.
* float16 has 40 binades: P is stored times 2¹⁵, dS with its tile's largest entry brought to [2¹⁴, 2¹⁵), so
  that neither overflows and what is lost lies 2³⁹ below the largest entry. Both factors are powers of two.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from attnproof.kernels.softmax import capped, loaded, tile_range

__all__ = ["bias_kernel", "delta_kernel", "keys_kernel", "queries_kernel"]

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
INF: tl.constexpr = tl.constexpr(math.inf)
EVERY_TILE: tl.constexpr = tl.constexpr(2**30)

# Sizes and strides are run-time values, as in the forward pass.
RUNTIME = [
    "p_bias", "p_alibi", "p_cu", "p_max", "p_scale", "p_delta", "s_qb", "s_qh", "s_qm", "s_qd", "s_kb",
    "s_kh", "s_kn", "s_kd", "s_vb", "s_vh", "s_vn", "s_ve", "s_ob", "s_oh", "s_om", "s_oe", "s_bb", "s_bh",
    "s_bm", "s_bn", "H", "GROUP", "M", "N", "D", "E", "left", "right",
]  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "p_do", "p_dlse", "p_sinks", "p_o", "p_max", "p_scale", "p_delta", "p_dsinks", "s_ob", "s_oh", "s_om",
        "s_oe", "s_lb", "s_lh", "s_lm", "s_sink", "H", "M", "E",
    ]
)  # fmt: skip
def delta_kernel(
    p_do, p_dlse, p_sinks, p_o, p_max, p_scale, p_delta, p_dsinks,
    s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    s_lb: tl.int64, s_lh: tl.int64, s_lm: tl.int64, s_sink: tl.int64,
    H, M, E, SINK_UNIT: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Δ of a tile of rows, and the sum over it of the sink's gradient −p_sink Δ."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    o_e = tl.arange(0, BE)
    m_m = o_m < M
    o_row = i_bh.to(tl.int64) * M + o_m
    b_scale = tl.load(p_scale + o_row, mask=m_m, other=0.0)
    m_oe = m_m[:, None] & (o_e < E)[None, :]
    # [BM, BE]
    b_o = tl.load(p_o + (o_row * E)[:, None] + o_e[None, :], mask=m_oe, other=0.0).to(tl.float32)
    o_do = i_b * s_ob + i_h * s_oh + (o_m * s_om)[:, None] + (o_e * s_oe)[None, :]
    b_do = tl.load(p_do + o_do, mask=m_oe, other=0.0).to(tl.float32)
    # [BM]
    b_delta = tl.sum(b_o * b_do, 1)
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + i_b * s_lb + i_h * s_lh + o_m * s_lm, mask=m_m, other=0.0)
    b_delta = tl.where(b_scale == 0, 0.0, b_delta)
    tl.store(p_delta + o_row, b_delta, mask=m_m)
    if p_dsinks is not None:
        b_max = tl.load(p_max + o_row, mask=m_m, other=0.0)
        b_sink = tl.load(p_sinks + i_h * s_sink).to(tl.float32) * SINK_UNIT
        b_p = tl.exp2(tl.minimum((b_sink - b_max) * UNIT, 0.0)) * b_scale
        b_part = tl.sum(tl.where(m_m, -b_p * b_delta, 0.0), 0)
        tl.store(p_dsinks + i_bh.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), b_part)


@triton.jit
def slope_of_cap(b_x):
    """1 − tanh² b_x, to a few ulp."""
    b_t = tl.exp2(tl.abs(b_x) * (-2 * LOG2E))
    return 4 * b_t / ((1 + b_t) * (1 + b_t))


@triton.jit
def weights(
    b_x, b_max, b_scale, b_slope, p_bias, o_i, o_j, i_bos, s_bm, s_bn, n_q, n_k, left, right, cap,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """P of a tile from q·k times score_scale, which b_x holds.

    o_i and o_j are the positions of queries and keys, b_max and b_scale belong to queries; each has the shape
    of its side of the tile, whichever side the queries are. b_slope is ALiBi's, or None.
    """
    b_s = b_x
    if SOFTCAP:
        b_s = capped(b_x) * cap
    if b_slope is not None:
        b_s -= b_slope * tl.abs(o_i + (n_k - n_q) - o_j).to(tl.float32)
    if EDGE:
        m_s = (o_i < n_q) & (o_j < n_k)
        if LEFT:
            m_s = m_s & (o_j >= o_i + left)
        if RIGHT:
            m_s = m_s & (o_j <= o_i + right)
        if p_bias is not None:
            o_b = (i_bos + o_i) * s_bm + (i_bos + o_j) * s_bn
            b_s += tl.load(p_bias + o_b, mask=m_s, other=-INF).to(tl.float32)
        b_s = tl.where(m_s, b_s, -INF)
    return tl.exp2(tl.minimum((b_s - b_max) * UNIT, 0.0)) * b_scale


@triton.jit
def stored(b_ds, dtype: tl.constexpr):
    """b_ds as a matmul operand of ``dtype``, and the power of two by which the product is multiplied."""
    b_factor = 1.0
    if dtype == tl.float16:
        # the exponent of the largest entry, 2**(14 − exponent) and its inverse, both kept normal
        i_exponent = tl.max(tl.max(tl.abs(b_ds), 1), 0).to(tl.int32, bitcast=True) >> 23
        i_up = tl.minimum(tl.maximum(254 + 14 - i_exponent, 1), 253)
        b_factor = ((254 - i_up) << 23).to(tl.float32, bitcast=True)
        b_ds = b_ds * (i_up << 23).to(tl.float32, bitcast=True)
    return b_ds.to(dtype), b_factor


@triton.jit(do_not_specialize=[*RUNTIME, "p_dk", "p_dv", "p_dq"])
def keys_kernel(
    p_q, p_k, p_v, p_do, p_bias, p_alibi, p_cu, p_max, p_scale, p_delta, p_dk, p_dv, p_dq,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bm: tl.int64, s_bn: tl.int64,
    H, GROUP, M, N, D, E, left, right, scale, score_scale, cap,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    PAD_D: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one key head, over all query heads of its group and all queries that
    see the tile. Where p_dq is given, the tile's part in dQ is added to it, float32 (B,H,M,D), atomically.
    """
    i_bg, i_t = tl.program_id(0), tl.program_id(1)
    G = H // GROUP
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    if LAYOUT > 0:
        s_qd, s_kd, s_ve, s_oe = 1, 1, 1, 1
    if LAYOUT > 1:  # strides come divided by 16
        s_qb, s_qh, s_qm = s_qb * 16, s_qh * 16, s_qm * 16
        s_kb, s_kh, s_kn = s_kb * 16, s_kh * 16, s_kn * 16
        s_vb, s_vh, s_vn = s_vb * 16, s_vh * 16, s_vn * 16
        s_ob, s_oh, s_om = s_ob * 16, s_oh * 16, s_om * 16
    n_q, n_k = M, N
    i_bos = tl.zeros([], dtype=tl.int64)
    i_rows = i_b * H * M
    i_keys = i_bg.to(tl.int64) * N
    if p_cu is not None:
        i_bos = tl.load(p_cu + i_b).to(tl.int64)
        n_q = (tl.load(p_cu + i_b + 1) - i_bos).to(tl.int32)
        n_k = n_q
        i_rows = i_bos
        i_keys = i_g * N + i_bos

    o_n = i_t * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_n = o_n < n_k
    m_kd = m_n[:, None] & (o_d < D)[None, :] if PAD_D else m_n[:, None]
    m_ve = m_n[:, None] & (o_e < E)[None, :] if PAD_E else m_n[:, None]
    # [BN, BD], [BN, BE]
    o_k = i_b * s_kb + i_g * s_kh + i_bos * s_kn + (o_n.to(tl.int64) * s_kn)[:, None] + (o_d * s_kd)[None, :]
    o_v = i_b * s_vb + i_g * s_vh + i_bos * s_vn + (o_n.to(tl.int64) * s_vn)[:, None] + (o_e * s_ve)[None, :]
    b_k = tl.load(p_k + o_k, mask=m_kd, other=0.0)
    b_v = tl.load(p_v + o_v, mask=m_ve, other=0.0)
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BE], dtype=tl.float32)
    P_UP: tl.constexpr = 32768.0 if p_k.dtype.element_ty == tl.float16 else 1.0

    # query i sees key j when i + left ≤ j ≤ i + right, so when j − right ≤ i ≤ j − left
    t0, t1, f0, f1 = tile_range(i_t, 0, n_k, n_q, -right, -left, EVERY_TILE, RIGHT, LEFT, BN, BM)
    if p_bias is not None:
        f1 = f0
    for i_r in range(GROUP):
        i_h = i_g * GROUP + i_r
        i_row = i_rows + i_h * M
        p_qh = p_q + i_b * s_qb + i_h * s_qh + i_bos * s_qm
        p_oh = p_do + i_b * s_ob + i_h * s_oh + i_bos * s_om
        p_bh = None if p_bias is None else p_bias + i_b * s_bb + i_h * s_bh
        b_slope = None if p_alibi is None else tl.load(p_alibi + i_h) * (LOG2E / UNIT)
        for EDGE in tl.static_range(0 if p_bias is None else 1, 2):
            for i_s in range((t1 - t0) - (f1 - f0) if EDGE else f1 - f0):
                i_m = (t0 + i_s + (f1 - f0) * (i_s >= f0 - t0).to(tl.int32) if EDGE else f0 + i_s) * BM
                o_m = i_m + tl.arange(0, BM)
                m_m = o_m < n_q
                m_qd = m_m[:, None] & (o_d < D)[None, :] if PAD_D else m_m[:, None]
                m_oe = m_m[:, None] & (o_e < E)[None, :] if PAD_E else m_m[:, None]
                # [BM, BD], [BM, BE]
                o_q = (o_m.to(tl.int64) * s_qm)[:, None] + (o_d * s_qd)[None, :]
                o_o = (o_m.to(tl.int64) * s_om)[:, None] + (o_e * s_oe)[None, :]
                b_q = loaded(p_qh + o_q, m_qd, EDGE or PAD_D)
                b_do = loaded(p_oh + o_o, m_oe, EDGE or PAD_E)
                # [BM]
                b_max = loaded(p_max + i_row + o_m, m_m, EDGE)
                b_scale = loaded(p_scale + i_row + o_m, m_m, EDGE)
                b_delta = loaded(p_delta + i_row + o_m, m_m, EDGE)
                # [BN, BM]
                b_x = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * score_scale
                b_p = weights(
                    b_x, b_max[None, :], b_scale[None, :], b_slope, p_bh, o_m[None, :], o_n[:, None], i_bos,
                    s_bm, s_bn, n_q, n_k, left, right, cap, LEFT, RIGHT, SOFTCAP, EDGE, UNIT,
                )  # fmt: skip
                b_dv = tl.dot((b_p * P_UP).to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
                b_ds = b_p * (b_dp - b_delta[None, :])
                if SOFTCAP:
                    b_ds = b_ds * slope_of_cap(b_x)
                b_ds, b_factor = stored(b_ds, b_q.dtype)
                b_dk += tl.dot(b_ds, b_q, input_precision=PRECISION) * b_factor
                if p_dq is not None:
                    b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION) * (b_factor * scale)
                    o_dq = ((i_row + o_m) * D)[:, None] + o_d[None, :]
                    tl.atomic_add(p_dq + o_dq, b_dq, mask=m_m[:, None] & (o_d < D)[None, :], sem="relaxed")

    o_row = i_keys + o_n
    tl.store(p_dk + (o_row * D)[:, None] + o_d[None, :], (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_kd)
    tl.store(p_dv + (o_row * E)[:, None] + o_e[None, :], (b_dv / P_UP).to(p_dv.dtype.element_ty), mask=m_ve)


@triton.jit(do_not_specialize=[*RUNTIME, "p_dq"])
def queries_kernel(
    p_q, p_k, p_v, p_do, p_bias, p_alibi, p_cu, p_max, p_scale, p_delta, p_dq,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bm: tl.int64, s_bn: tl.int64,
    H, GROUP, M, N, D, E, left, right, scale, score_scale, cap,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    PAD_D: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head, over all keys that it sees."""
    i_bh, i_t = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = (i_bh % H // GROUP).to(tl.int64)
    if LAYOUT > 0:
        s_qd, s_kd, s_ve, s_oe = 1, 1, 1, 1
    if LAYOUT > 1:  # strides come divided by 16
        s_qb, s_qh, s_qm = s_qb * 16, s_qh * 16, s_qm * 16
        s_kb, s_kh, s_kn = s_kb * 16, s_kh * 16, s_kn * 16
        s_vb, s_vh, s_vn = s_vb * 16, s_vh * 16, s_vn * 16
        s_ob, s_oh, s_om = s_ob * 16, s_oh * 16, s_om * 16
    n_q, n_k = M, N
    i_bos = tl.zeros([], dtype=tl.int64)
    i_row = i_bh.to(tl.int64) * M
    if p_cu is not None:
        i_bos = tl.load(p_cu + i_b).to(tl.int64)
        n_q = (tl.load(p_cu + i_b + 1) - i_bos).to(tl.int32)
        n_k = n_q
        i_row = i_h * M + i_bos
    p_kh = p_k + i_b * s_kb + i_g * s_kh + i_bos * s_kn
    p_vh = p_v + i_b * s_vb + i_g * s_vh + i_bos * s_vn
    p_bh = None if p_bias is None else p_bias + i_b * s_bb + i_h * s_bh
    b_slope = None if p_alibi is None else tl.load(p_alibi + i_h) * (LOG2E / UNIT)

    o_m = i_t * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_m = o_m < n_q
    m_qd = m_m[:, None] & (o_d < D)[None, :] if PAD_D else m_m[:, None]
    m_oe = m_m[:, None] & (o_e < E)[None, :] if PAD_E else m_m[:, None]
    # [BM, BD], [BM, BE]
    o_q = i_b * s_qb + i_h * s_qh + i_bos * s_qm + (o_m.to(tl.int64) * s_qm)[:, None] + (o_d * s_qd)[None, :]
    o_o = i_b * s_ob + i_h * s_oh + i_bos * s_om + (o_m.to(tl.int64) * s_om)[:, None] + (o_e * s_oe)[None, :]
    b_q = tl.load(p_q + o_q, mask=m_qd, other=0.0)
    b_do = tl.load(p_do + o_o, mask=m_oe, other=0.0)
    # [BM]
    b_max = tl.load(p_max + i_row + o_m, mask=m_m, other=0.0)
    b_scale = tl.load(p_scale + i_row + o_m, mask=m_m, other=0.0)
    b_delta = tl.load(p_delta + i_row + o_m, mask=m_m, other=0.0)
    b_dq = tl.zeros([BM, BD], dtype=tl.float32)

    t0, t1, f0, f1 = tile_range(i_t, 0, n_q, n_k, left, right, EVERY_TILE, LEFT, RIGHT, BM, BN)
    if p_bias is not None:
        f1 = f0
    for EDGE in tl.static_range(0 if p_bias is None else 1, 2):
        for i_s in range((t1 - t0) - (f1 - f0) if EDGE else f1 - f0):
            i_n = (t0 + i_s + (f1 - f0) * (i_s >= f0 - t0).to(tl.int32) if EDGE else f0 + i_s) * BN
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < n_k
            m_kd = m_n[:, None] & (o_d < D)[None, :] if PAD_D else m_n[:, None]
            m_ve = m_n[:, None] & (o_e < E)[None, :] if PAD_E else m_n[:, None]
            # [BN, BD], [BN, BE]
            o_k = (o_n.to(tl.int64) * s_kn)[:, None] + (o_d * s_kd)[None, :]
            o_v = (o_n.to(tl.int64) * s_vn)[:, None] + (o_e * s_ve)[None, :]
            b_k = loaded(p_kh + o_k, m_kd, EDGE or PAD_D)
            b_v = loaded(p_vh + o_v, m_ve, EDGE or PAD_E)
            # [BM, BN]
            b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * score_scale
            b_p = weights(
                b_x, b_max[:, None], b_scale[:, None], b_slope, p_bh, o_m[:, None], o_n[None, :], i_bos,
                s_bm, s_bn, n_q, n_k, left, right, cap, LEFT, RIGHT, SOFTCAP, EDGE, UNIT,
            )  # fmt: skip
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if SOFTCAP:
                b_ds = b_ds * slope_of_cap(b_x)
            b_ds, b_factor = stored(b_ds, b_k.dtype)
            b_dq += tl.dot(b_ds, b_k, input_precision=PRECISION) * b_factor

    o_row = i_row + o_m
    tl.store(p_dq + (o_row * D)[:, None] + o_d[None, :], (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_qd)


@triton.jit(
    do_not_specialize=[*RUNTIME, "p_dbias", "s_wb", "s_wh", "s_wm", "s_wn", "HEADS", "SUM_B", "SUM_H"]
)
def bias_kernel(
    p_q, p_k, p_v, p_do, p_bias, p_alibi, p_cu, p_max, p_scale, p_delta, p_dbias,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bm: tl.int64, s_bn: tl.int64,
    s_wb: tl.int64, s_wh: tl.int64, s_wm: tl.int64, s_wn: tl.int64,
    H, GROUP, M, N, D, E, HEADS, SUM_B, SUM_H, left, right, scale, score_scale, cap,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    PAD_D: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dS of one tile, summed over SUM_B batch entries and SUM_H heads, and over its queries (SUM_M) or keys
    (SUM_N). HEADS is how many heads are kept apart.
    """
    i_m, i_n = tl.program_id(1), tl.program_id(2)
    i_wb, i_wh = (tl.program_id(0) // HEADS).to(tl.int64), (tl.program_id(0) % HEADS).to(tl.int64)
    if LAYOUT > 0:
        s_qd, s_kd, s_ve, s_oe = 1, 1, 1, 1
    if LAYOUT > 1:  # strides come divided by 16
        s_qb, s_qh, s_qm = s_qb * 16, s_qh * 16, s_qm * 16
        s_kb, s_kh, s_kn = s_kb * 16, s_kh * 16, s_kn * 16
        s_vb, s_vh, s_vn = s_vb * 16, s_vh * 16, s_vn * 16
        s_ob, s_oh, s_om = s_ob * 16, s_oh * 16, s_om * 16
    n_q, n_k = M, N
    i_bos = tl.zeros([], dtype=tl.int64)
    if p_cu is not None:
        i_bos = tl.load(p_cu + i_wb).to(tl.int64)
        n_q = (tl.load(p_cu + i_wb + 1) - i_bos).to(tl.int32)
        n_k = n_q
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_m, m_n = o_m < n_q, o_n < n_k
    o_row, o_key = i_bos + o_m, i_bos + o_n
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    for i_r in range(SUM_B * SUM_H):
        i_b, i_h = i_wb * SUM_B + i_r // SUM_H, i_wh * SUM_H + i_r % SUM_H
        i_g = i_h // GROUP
        i_row = i_h * M + o_row if p_cu is not None else (i_b * H + i_h) * M + o_row
        o_q = i_b * s_qb + i_h * s_qh + (o_row * s_qm)[:, None] + (o_d * s_qd)[None, :]
        o_o = i_b * s_ob + i_h * s_oh + (o_row * s_om)[:, None] + (o_e * s_oe)[None, :]
        o_k = i_b * s_kb + i_g * s_kh + (o_key * s_kn)[None, :] + (o_d * s_kd)[:, None]
        o_v = i_b * s_vb + i_g * s_vh + (o_key * s_vn)[None, :] + (o_e * s_ve)[:, None]
        # [BM, BD], [BD, BN], [BM, BE], [BE, BN]
        b_q = tl.load(p_q + o_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
        b_k = tl.load(p_k + o_k, mask=m_n[None, :] & (o_d < D)[:, None], other=0.0)
        b_do = tl.load(p_do + o_o, mask=m_m[:, None] & (o_e < E)[None, :], other=0.0)
        b_v = tl.load(p_v + o_v, mask=m_n[None, :] & (o_e < E)[:, None], other=0.0)
        b_max = tl.load(p_max + i_row, mask=m_m, other=0.0)
        b_scale = tl.load(p_scale + i_row, mask=m_m, other=0.0)
        b_delta = tl.load(p_delta + i_row, mask=m_m, other=0.0)
        b_slope = None if p_alibi is None else tl.load(p_alibi + i_h) * (LOG2E / UNIT)
        b_x = tl.dot(b_q, b_k, input_precision=PRECISION) * score_scale
        b_p = weights(
            b_x, b_max[:, None], b_scale[:, None], b_slope, p_bias + i_b * s_bb + i_h * s_bh, o_m[:, None],
            o_n[None, :], i_bos, s_bm, s_bn, n_q, n_k, left, right, cap, LEFT, RIGHT, SOFTCAP, True, UNIT,
        )  # fmt: skip
        b_dp = tl.dot(b_do, b_v, input_precision=PRECISION)
        b_sum += b_p * (b_dp - b_delta[:, None])
    p_w = p_dbias + i_wb * s_wb + i_wh * s_wh
    if SUM_M and SUM_N:
        tl.store(p_w + i_m * s_wm + i_n * s_wn, tl.sum(tl.sum(b_sum, 1), 0))
    elif SUM_M:
        tl.store(p_w + i_m * s_wm + o_key * s_wn, tl.sum(b_sum, 0), mask=m_n)
    elif SUM_N:
        tl.store(p_w + o_row * s_wm + i_n * s_wn, tl.sum(b_sum, 1), mask=m_m)
    else:
        o_w = (o_row * s_wm)[:, None] + (o_key * s_wn)[None, :]
        tl.store(p_w + o_w, b_sum, mask=m_m[:, None] & m_n[None, :])
