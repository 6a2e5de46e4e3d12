"""Triton kernels of Mamba-2's state space duality, forward: states at the ends of chunks, and outputs.

    h_t = exp(g_t) h_{t−1} + B_t v_tᵀ,   y_t = C_tᵀ h_t + D x_t,   g_t = dt_t A,   v_t = dt_t x_t

(Dao and Gu, arXiv 2405.21060, section 6; theory SSD-2): gated linear attention with one gate a position, in
the form that this allows. The decays between all pairs of a chunk are one matrix of exponentials, so that
pairs go through matrix instructions:

    y_i = exp(Σ_{t ≤ i} g_t) C_iᵀ h₀ + Σ_{j ≤ i} (C_i·B_j) exp(Σ_{j < t ≤ i} g_t) v_j + D x_i

* Every exponent is a sum of the gates between two positions (theory SSD-4), never a difference of two sums,
  which loses what a gate of −1000 leaves to 24 bits, and never exp(b_i)·exp(−b_j), which overflows.
* Positions beyond the end have dt = 0, hence gates of 0, and B, C and x of 0 (bugs B35).
* B and C are read by group: head h takes group h // (H/G), without a copy for every head.
* dt·A and dt·x are products in float32. dt·x becomes an operand of a matmul after that, never dt or A.
* A value that a row does not see is taken out of that row's matmul (0·NaN, bugs B21).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnproof.kernels.gated_linear_chunks import product, tile
from attnproof.kernels.pointwise import strides
from attnproof.kernels.softmax import isolated
from attnproof.kernels.states import chunk_bounds, sequence_bounds

__all__ = ["RUNTIME", "decayed", "gates", "output_kernel", "scores", "states_kernel"]

# Sizes and strides are run-time values: what depends on them is told to the compiler by LAYOUT alone.
RUNTIME = [
    "p_dt", "p_a", "p_skip", "p_start", "p_states", "p_end", "p_out", "p_cu", "p_first", "p_owner",
    "s_xb", "s_xh", "s_xn", "s_xe", "s_bb", "s_bh", "s_bn", "s_bd", "s_cb", "s_ch", "s_cn", "s_cd",
    "s_tb", "s_th", "s_tn", "s_yb", "s_yh", "s_yn", "s_yd", "s_zb", "s_zh", "s_zn", "s_ze",
    "each", "H", "GROUP", "N", "D", "E",
]  # fmt: skip


@triton.jit
def gates(p_dt, s_tn, b_a, i_n, i_stop, C: tl.constexpr):
    """Of the C positions from i_n on: dt, the gates, and the sums of those up to each and after each."""
    o_c = tl.arange(0, C)
    b_dt = tl.load(p_dt + (i_n + o_c) * s_tn, mask=i_n + o_c < i_stop, other=0.0).to(tl.float32)
    m_next = (o_c + 1 < C) & (i_n + o_c + 1 < i_stop)
    b_next = tl.load(p_dt + (i_n + o_c + 1) * s_tn, mask=m_next, other=0.0).to(tl.float32)
    b_g = b_dt * b_a
    return b_dt, b_g, tl.cumsum(b_g, 0), tl.cumsum(b_next * b_a, 0, reverse=True)


@triton.jit
def decayed(b_p, b_g, C: tl.constexpr):
    """b_p [C, C] times the decay exp(Σ_{j < t ≤ i} g_t) from column j to row i, and 0 for j > i."""
    o_c = tl.arange(0, C)
    b_terms = tl.where(o_c[:, None] > o_c[None, :], b_g[:, None], 0.0)
    return tl.where(o_c[:, None] >= o_c[None, :], b_p * tl.exp(tl.cumsum(b_terms, 0)), 0.0)


@triton.jit
def operand(p_x, s_n, s_c, o_n, m_n, o_c, m_c):
    """[o_n, o_c]: these rows and columns as they are, 0 outside the masks."""
    return tl.load(
        p_x + (o_n * s_n)[:, None] + (o_c * s_c)[None, :], mask=m_n[:, None] & m_c[None, :], other=0.0
    )


@triton.jit
def scores(p_x, s_xn, s_xd, o_x, m_x, p_y, s_yn, s_yd, o_y, m_y, D, BD: tl.constexpr):
    """x_i·y_j of rows o_x and o_y, of operands as they are."""
    b_s = tl.zeros([o_x.shape[0], o_y.shape[0]], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_x = operand(p_x, s_xn, s_xd, o_x, m_x, o_d, o_d < D)
        b_y = operand(p_y, s_yn, s_yd, o_y, m_y, o_d, o_d < D)
        b_s = tl.dot(b_x, tl.trans(b_y), b_s, input_precision="ieee")
    return b_s


@triton.jit(do_not_specialize=RUNTIME)
def states_kernel(
    p_y, p_z, p_dt, p_a, p_start, p_states, p_end, p_cu, p_first,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yd: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_ze: tl.int64,
    s_tb: tl.int64, s_th: tl.int64, s_tn: tl.int64,
    each, H, GROUP, N, D, E,
    REVERSE: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, of (B, x), and the one after the last; REVERSE: the gradient of the state
    after every chunk, of (C, dy), and that of the initial state.
    """
    i_sh = tl.program_id(0)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    s_yb, s_yh, s_yn, s_yd = strides(s_yb, s_yh, s_yn, s_yd, LAYOUT)
    s_zb, s_zh, s_zn, s_ze = strides(s_zb, s_zh, s_zn, s_ze, LAYOUT)
    p_y += i_b * s_yb + (i_h // GROUP) * s_yh
    p_z += i_b * s_zb + i_h * s_zh
    p_dt += i_b * s_tb + i_h * s_th
    b_a = tl.load(p_a + i_h).to(tl.float32)
    i_c0 = (i_s * each if p_cu is None else tl.load(p_first + i_s)).to(tl.int64)

    o_c = tl.arange(0, C)
    o_d, o_e = tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2) * BE + tl.arange(0, BE)
    m_d, m_e = o_d < D, o_e < E
    # [BD, BE]
    m_s = m_d[:, None] & m_e[None, :]
    o_s = o_d.to(tl.int64)[:, None] * E + o_e[None, :]
    i_area = i_sh.to(tl.int64) * D * E
    b_s = tl.zeros([BD, BE], dtype=tl.float32)
    if p_start is not None:
        b_s = tl.load(p_start + i_area + o_s, mask=m_s, other=0.0)
    n_chunks = ((i_stop - i_start + C - 1) // C).to(tl.int32)
    for i_t in range(n_chunks):
        i_c = n_chunks - 1 - i_t if REVERSE else i_t
        tl.store(p_states + ((i_c0 + i_c) * H + i_h) * D * E + o_s, b_s, mask=m_s)
        i_n = i_start + i_c * C
        o_n = i_n + o_c
        m_n = o_n < i_stop
        b_dt, b_g, b_head, b_tail = gates(p_dt, s_tn, b_a, i_n, i_stop, C)
        # [C, BD], [C, BE]
        b_y = tile(p_y, s_yn, s_yd, o_n, m_n, o_d, m_d) * tl.exp(b_head if REVERSE else b_tail)[:, None]
        b_z = tile(p_z, s_zn, s_ze, o_n, m_n, o_e, m_e)
        if not REVERSE:
            b_z *= b_dt[:, None]
        b_s = product(tl.trans(b_y), b_z, b_s * tl.exp(tl.sum(b_g, 0)), DTYPE)
    tl.store(p_end + i_area + o_s, b_s, mask=m_s)


@triton.jit(do_not_specialize=RUNTIME)
def output_kernel(
    p_x, p_b, p_c, p_dt, p_a, p_skip, p_states, p_out, p_cu, p_first, p_owner,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xe: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bn: tl.int64, s_bd: tl.int64,
    s_cb: tl.int64, s_ch: tl.int64, s_cn: tl.int64, s_cd: tl.int64,
    s_tb: tl.int64, s_th: tl.int64, s_tn: tl.int64,
    each, H, GROUP, N, D, E,
    LAYOUT: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """y of one chunk and head, from the state before it."""
    i_ch = tl.program_id(0)
    i_c, i_h = i_ch // H, (i_ch % H).to(tl.int64)
    i_b, i_n, i_stop, _ = chunk_bounds(p_cu, p_first, p_owner, i_c, each, N, C)
    s_xb, s_xh, s_xn, s_xe = strides(s_xb, s_xh, s_xn, s_xe, LAYOUT)
    s_bb, s_bh, s_bn, s_bd = strides(s_bb, s_bh, s_bn, s_bd, LAYOUT)
    s_cb, s_ch, s_cn, s_cd = strides(s_cb, s_ch, s_cn, s_cd, LAYOUT)
    p_x += i_b * s_xb + i_h * s_xh
    p_b += i_b * s_bb + (i_h // GROUP) * s_bh
    p_c += i_b * s_cb + (i_h // GROUP) * s_ch
    p_dt += i_b * s_tb + i_h * s_th
    p_states += i_ch.to(tl.int64) * D * E
    b_a = tl.load(p_a + i_h).to(tl.float32)

    o_c = tl.arange(0, C)
    o_n = i_n + o_c
    m_n = o_n < i_stop
    b_dt, b_g, b_head, _ = gates(p_dt, s_tn, b_a, i_n, i_stop, C)
    # [C, C]
    m_s = o_c[:, None] >= o_c[None, :]
    b_p = scores(p_c, s_cn, s_cd, o_n, m_n, p_b, s_bn, s_bd, o_n, m_n, D, BD)
    b_p = decayed(b_p, b_g, C)
    b_head = tl.exp(b_head)
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = o_e < E
        # [C, BE]
        b_y = tl.zeros([C, BE], dtype=tl.float32)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            m_d = o_d < D
            b_s = tl.load(
                p_states + o_d[:, None] * E + o_e[None, :], mask=m_d[:, None] & m_e[None, :], other=0.0
            )
            b_y = product(tile(p_c, s_cn, s_cd, o_n, m_n, o_d, m_d), b_s, b_y, DTYPE)
        b_x = tile(p_x, s_xn, s_xe, o_n, m_n, o_e, m_e)
        b_v, b_nan = isolated(b_x * b_dt[:, None], m_s, tl.zeros([C], dtype=tl.float32))
        b_y = product(b_p, b_v, b_y * b_head[:, None], DTYPE) + b_nan[:, None]
        if p_skip is not None:
            b_y += tl.load(p_skip + i_h).to(tl.float32) * b_x
        # of a contiguous (B,H,N,E)
        o_y = ((i_b * H + i_h) * N + o_n)[:, None] * E + o_e[None, :]
        tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_e[None, :])
