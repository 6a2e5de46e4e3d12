"""The Triton kernels of Mamba-2's gradients, chunk by chunk, for all its forms.

With L_ij the decay from j to i, S the state before a chunk, dS the gradient of the one after it, and l_i, w_j
the decays from the beginning of the chunk to i and from j to its end:

    dv_j = Σ_{i ≥ j} L_ij (C_i·B_j) dy_i + w_j dSᵀ B_j,   dx = dt dv + D dy,   ddt_t = x_t·dv_t + A dg_t,
    dC_i = Σ_{j ≤ i} L_ij (dy_i·v_j) B_j + l_i S dy_i,    dB_j = Σ_{i ≥ j} L_ij (dy_i·v_j) C_i + w_j dS v_j,
    dg_t = Σ_{j < t ≤ i} L_ij (C_i·B_j)(dy_i·v_j) + …,    dA = Σ dt_t dg_t,   dD = Σ dy_t·x_t

dg is summed over the pairs that cross t: both inside the chunk, one inside and one behind S or dS, or S∘dS.
Each carries exp(g_t), so that nothing is divided by it and nothing large is taken off again, as in the
reverse cumulative sum of C·dC − B·dB (theory GLA-4), where decay is strong.

A head has a program of its own for dx, ddt and its parts of dA and dD. dB and dC belong to a group: one
program adds up its heads, from the first to the last, in float32. No atomics: two runs agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnproof.kernels.gated_linear_chunks import product, tile
from attnproof.kernels.pointwise import strides
from attnproof.kernels.ssd_chunks import RUNTIME, decayed, gates, scores
from attnproof.kernels.states import chunk_bounds

__all__ = ["group_gradient_kernel", "head_gradient_kernel"]

FURTHER = [
    "p_dstates", "p_dx", "p_ddt", "p_da", "p_dskip", "p_db", "p_dc", "s_ob", "s_oh", "s_on", "s_oe", "G",
]  # fmt: skip


@triton.jit
def state_tile(p_s, o_d, m_d, o_e, m_e, E):
    """[o_d, o_e] of a contiguous state, 0 outside the masks."""
    return tl.load(p_s + o_d[:, None] * E + o_e[None, :], mask=m_d[:, None] & m_e[None, :], other=0.0)


@triton.jit
def values(p_x, s_n, s_e, b_dt, o_n, m_n, o_e, m_e):
    """v = dt x, in float32."""
    return tile(p_x, s_n, s_e, o_n, m_n, o_e, m_e) * b_dt[:, None]


@triton.jit
def weight_gradients(
    p_do, s_on, s_oe, p_x, s_xn, s_xe, b_dt, o_n, m_n, E,
    C: tl.constexpr, BE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[C, C]: dy_i·v_j of all rows i and columns j of a chunk."""
    b_dp = tl.zeros([C, C], dtype=tl.float32)
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = o_e < E
        b_do = tile(p_do, s_on, s_oe, o_n, m_n, o_e, m_e)
        b_v = values(p_x, s_xn, s_xe, b_dt, o_n, m_n, o_e, m_e)
        b_dp = product(b_do, tl.trans(b_v), b_dp, DTYPE)
    return b_dp


@triton.jit
def crossing(b_pairs, b_rows, b_columns, C: tl.constexpr):
    """[C]: of b_pairs [C, C] those with j < t ≤ i, of b_rows those from t on, of b_columns those before t."""
    o_c = tl.arange(0, C)
    # [t, j]
    m_before = o_c[:, None] > o_c[None, :]
    b_inside = tl.sum(tl.where(m_before, tl.cumsum(b_pairs, 0, reverse=True), 0.0), 1)
    b_into = tl.sum(tl.where(m_before, 0.0, b_rows[None, :]), 1)
    return b_inside + b_into + tl.sum(tl.where(m_before, b_columns[None, :], 0.0), 1)


@triton.jit(do_not_specialize=[*RUNTIME, *FURTHER])
def head_gradient_kernel(
    p_x, p_b, p_c, p_do, p_dt, p_a, p_skip, p_states, p_dstates, p_dx, p_ddt, p_da, p_dskip,
    p_cu, p_first, p_owner,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xe: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bn: tl.int64, s_bd: tl.int64,
    s_cb: tl.int64, s_ch: tl.int64, s_cn: tl.int64, s_cd: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_on: tl.int64, s_oe: tl.int64,
    s_tb: tl.int64, s_th: tl.int64, s_tn: tl.int64,
    each, H, GROUP, N, D, E,
    LAYOUT: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dx and ddt of one chunk and head, and its parts of dA and dD."""
    i_ch = tl.program_id(0)
    i_c, i_h = i_ch // H, (i_ch % H).to(tl.int64)
    i_b, i_n, i_stop, _ = chunk_bounds(p_cu, p_first, p_owner, i_c, each, N, C)
    s_xb, s_xh, s_xn, s_xe = strides(s_xb, s_xh, s_xn, s_xe, LAYOUT)
    s_bb, s_bh, s_bn, s_bd = strides(s_bb, s_bh, s_bn, s_bd, LAYOUT)
    s_cb, s_ch, s_cn, s_cd = strides(s_cb, s_ch, s_cn, s_cd, LAYOUT)
    s_ob, s_oh, s_on, s_oe = strides(s_ob, s_oh, s_on, s_oe, LAYOUT)
    p_x += i_b * s_xb + i_h * s_xh
    p_b += i_b * s_bb + (i_h // GROUP) * s_bh
    p_c += i_b * s_cb + (i_h // GROUP) * s_ch
    p_do += i_b * s_ob + i_h * s_oh
    p_dt += i_b * s_tb + i_h * s_th
    p_states += i_ch.to(tl.int64) * D * E
    p_dstates += i_ch.to(tl.int64) * D * E
    b_a = tl.load(p_a + i_h).to(tl.float32)
    b_skip = 0.0
    if p_skip is not None:
        b_skip = tl.load(p_skip + i_h).to(tl.float32)

    o_n = i_n + tl.arange(0, C)
    m_n = o_n < i_stop
    b_dt, b_g, b_head, b_tail = gates(p_dt, s_tn, b_a, i_n, i_stop, C)
    b_head, b_tail, b_total = tl.exp(b_head), tl.exp(b_tail), tl.exp(tl.sum(b_g, 0))
    # [C, C], 0 for j > i
    b_p = decayed(scores(p_c, s_cn, s_cd, o_n, m_n, p_b, s_bn, s_bd, o_n, m_n, D, BD), b_g, C)
    b_dp = weight_gradients(
        p_do, s_on, s_oe, p_x, s_xn, s_xe, b_dt, o_n, m_n, E, C, BE, DTYPE
    )  # fmt: skip
    b_pairs = tl.where(b_p == 0, 0.0, b_p * b_dp)
    b_p = tl.trans(b_p)

    b_rows = tl.zeros([C], dtype=tl.float32)
    b_columns = tl.zeros([C], dtype=tl.float32)
    b_ddt = tl.zeros([C], dtype=tl.float32)
    b_dskip = tl.zeros([C], dtype=tl.float32)
    b_across = tl.zeros([BD], dtype=tl.float32)
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = o_e < E
        # [C, BE]
        b_dv = tl.zeros([C, BE], dtype=tl.float32)
        b_y = tl.zeros([C, BE], dtype=tl.float32)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            m_d = o_d < D
            b_s = state_tile(p_states, o_d, m_d, o_e, m_e, E)
            b_ds = state_tile(p_dstates, o_d, m_d, o_e, m_e, E)
            b_across += tl.sum(b_s * b_total * b_ds, 1)
            b_y = product(tile(p_c, s_cn, s_cd, o_n, m_n, o_d, m_d), b_s, b_y, DTYPE)
            b_dv = product(tile(p_b, s_bn, s_bd, o_n, m_n, o_d, m_d), b_ds, b_dv, DTYPE)
        b_do = tile(p_do, s_on, s_oe, o_n, m_n, o_e, m_e)
        b_x = tile(p_x, s_xn, s_xe, o_n, m_n, o_e, m_e)
        b_dv *= b_tail[:, None]
        b_rows += tl.sum(b_y * b_head[:, None] * b_do, 1)
        b_columns += tl.sum(b_dv * (b_x * b_dt[:, None]), 1)
        b_dv = product(b_p, b_do, b_dv, DTYPE)
        b_ddt += tl.sum(b_dv * b_x, 1)
        b_dx = b_dv * b_dt[:, None]
        if p_skip is not None:
            b_dx += b_skip * b_do
            b_dskip += tl.sum(b_do * b_x, 1)
        # of a contiguous (B,H,N,E)
        o_x = ((i_b * H + i_h) * N + o_n)[:, None] * E + o_e[None, :]
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_n[:, None] & m_e[None, :])

    b_dg = crossing(b_pairs, b_rows, b_columns, C) + tl.sum(b_across, 0)
    o_row = (i_b * H + i_h) * N + o_n
    tl.store(p_ddt + o_row, (b_ddt + b_a * b_dg).to(p_ddt.dtype.element_ty), mask=m_n)
    tl.store(p_da + i_ch, tl.sum(b_dt * b_dg, 0))
    if p_skip is not None:
        tl.store(p_dskip + i_ch, tl.sum(b_dskip, 0))


@triton.jit(do_not_specialize=[*RUNTIME, *FURTHER])
def group_gradient_kernel(
    p_x, p_b, p_c, p_do, p_dt, p_a, p_states, p_dstates, p_db, p_dc, p_cu, p_first, p_owner,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xe: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bn: tl.int64, s_bd: tl.int64,
    s_cb: tl.int64, s_ch: tl.int64, s_cn: tl.int64, s_cd: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_on: tl.int64, s_oe: tl.int64,
    s_tb: tl.int64, s_th: tl.int64, s_tn: tl.int64,
    each, G, GROUP, N, D, E,
    LAYOUT: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """BD channels of dB and dC of one chunk and group."""
    i_cg = tl.program_id(0)
    i_c, i_g = i_cg // G, (i_cg % G).to(tl.int64)
    i_b, i_n, i_stop, _ = chunk_bounds(p_cu, p_first, p_owner, i_c, each, N, C)
    s_xb, s_xh, s_xn, s_xe = strides(s_xb, s_xh, s_xn, s_xe, LAYOUT)
    s_bb, s_bh, s_bn, s_bd = strides(s_bb, s_bh, s_bn, s_bd, LAYOUT)
    s_cb, s_ch, s_cn, s_cd = strides(s_cb, s_ch, s_cn, s_cd, LAYOUT)
    s_ob, s_oh, s_on, s_oe = strides(s_ob, s_oh, s_on, s_oe, LAYOUT)
    p_b += i_b * s_bb + i_g * s_bh
    p_c += i_b * s_cb + i_g * s_ch

    o_n = i_n + tl.arange(0, C)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_n, m_d = o_n < i_stop, o_d < D
    # [C, BD]
    b_db = tl.zeros([C, BD], dtype=tl.float32)
    b_dc = tl.zeros([C, BD], dtype=tl.float32)
    for i_r in range(GROUP):
        i_h = i_g * GROUP + i_r
        i_state = (i_c.to(tl.int64) * (G * GROUP) + i_h) * D * E
        p_xh, p_oh = p_x + i_b * s_xb + i_h * s_xh, p_do + i_b * s_ob + i_h * s_oh
        b_a = tl.load(p_a + i_h).to(tl.float32)
        b_dt, b_g, b_head, b_tail = gates(p_dt + i_b * s_tb + i_h * s_th, s_tn, b_a, i_n, i_stop, C)
        b_dp = weight_gradients(
            p_oh, s_on, s_oe, p_xh, s_xn, s_xe, b_dt, o_n, m_n, E, C, BE, DTYPE
        )  # fmt: skip
        b_dp = decayed(b_dp, b_g, C)
        b_rows = tl.zeros([C, BD], dtype=tl.float32)
        b_columns = tl.zeros([C, BD], dtype=tl.float32)
        for i_e in range(0, E, BE):
            o_e = i_e + tl.arange(0, BE)
            m_e = o_e < E
            b_s = state_tile(p_states + i_state, o_d, m_d, o_e, m_e, E)
            b_rows = product(tile(p_oh, s_on, s_oe, o_n, m_n, o_e, m_e), tl.trans(b_s), b_rows, DTYPE)
            b_s = state_tile(p_dstates + i_state, o_d, m_d, o_e, m_e, E)
            b_v = values(p_xh, s_xn, s_xe, b_dt, o_n, m_n, o_e, m_e)
            b_columns = product(b_v, tl.trans(b_s), b_columns, DTYPE)
        b_dc += b_rows * tl.exp(b_head)[:, None]
        b_db += b_columns * tl.exp(b_tail)[:, None]
        b_dc = product(b_dp, tile(p_b, s_bn, s_bd, o_n, m_n, o_d, m_d), b_dc, DTYPE)
        b_db = product(tl.trans(b_dp), tile(p_c, s_cn, s_cd, o_n, m_n, o_d, m_d), b_db, DTYPE)
    # of a contiguous (B,G,N,D)
    o_o = ((i_b * G + i_g) * N + o_n)[:, None] * D + o_d[None, :]
    m_o = m_n[:, None] & m_d[None, :]
    tl.store(p_db + o_o, b_db.to(p_db.dtype.element_ty), mask=m_o)
    tl.store(p_dc + o_o, b_dc.to(p_dc.dtype.element_ty), mask=m_o)
