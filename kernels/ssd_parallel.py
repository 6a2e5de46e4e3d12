"""The Triton kernel of Mamba-2's quadratic form: attention under a mask of decays, tile by tile.

    y_i = Σ_{j ≤ i} (C_i·B_j) L_ij v_j + L_i0 C_iᵀ h₀ + D x_i,   L_ij = exp(Σ_{j < t ≤ i} dt_t A)

(Dao and Gu, arXiv 2405.21060, section 4; theory SSD-2.) A tile of rows walks back over the tiles of columns.
The exponent of a pair is the sum of three runs of gates: from its column to the end of that tile, the tiles
between, which grows by one tile a step, and from the beginning of its row's tile to the row. It never is a
difference of two cumulative sums (theory SSD-4).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnproof.kernels.gated_linear_chunks import product, tile
from attnproof.kernels.pointwise import strides
from attnproof.kernels.softmax import isolated
from attnproof.kernels.ssd_chunks import RUNTIME, decayed, gates, scores
from attnproof.kernels.states import sequence_bounds

__all__ = ["pairs_kernel"]


@triton.jit(do_not_specialize=RUNTIME)
def pairs_kernel(
    p_x, p_b, p_c, p_dt, p_a, p_skip, p_start, p_out, p_cu,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xe: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bn: tl.int64, s_bd: tl.int64,
    s_cb: tl.int64, s_ch: tl.int64, s_cn: tl.int64, s_cd: tl.int64,
    s_tb: tl.int64, s_th: tl.int64, s_tn: tl.int64,
    H, GROUP, N, D, E,
    LAYOUT: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One tile of C rows and BE columns of y."""
    i_sh, i_m, i_e = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    s_xb, s_xh, s_xn, s_xe = strides(s_xb, s_xh, s_xn, s_xe, LAYOUT)
    s_bb, s_bh, s_bn, s_bd = strides(s_bb, s_bh, s_bn, s_bd, LAYOUT)
    s_cb, s_ch, s_cn, s_cd = strides(s_cb, s_ch, s_cn, s_cd, LAYOUT)
    p_x += i_b * s_xb + i_h * s_xh
    p_b += i_b * s_bb + (i_h // GROUP) * s_bh
    p_c += i_b * s_cb + (i_h // GROUP) * s_ch
    p_dt += i_b * s_tb + i_h * s_th
    b_a = tl.load(p_a + i_h).to(tl.float32)

    o_c, o_e = tl.arange(0, C), i_e * BE + tl.arange(0, BE)
    m_e = o_e < E
    i_row = i_start + i_m * C
    o_m = i_row + o_c
    m_m = o_m < i_stop
    b_dt, b_g, b_head, _ = gates(p_dt, s_tn, b_a, i_row, i_stop, C)
    # the tile on the diagonal: [C, C], [C, BE]
    m_s = o_c[:, None] >= o_c[None, :]
    b_p = scores(p_c, s_cn, s_cd, o_m, m_m, p_b, s_bn, s_bd, o_m, m_m, D, BD)
    b_p = decayed(b_p, b_g, C)
    b_x = tile(p_x, s_xn, s_xe, o_m, m_m, o_e, m_e)
    b_v, b_nan = isolated(b_x * b_dt[:, None], m_s, tl.zeros([C], dtype=tl.float32))
    b_y = product(b_p, b_v, tl.zeros([C, BE], dtype=tl.float32), DTYPE)
    if p_skip is not None:
        b_y += tl.load(p_skip + i_h).to(tl.float32) * b_x

    # the sum of all gates between the tile of columns and the tile of rows
    b_between = 0.0
    for i_t in range(tl.where(i_row < i_stop, i_m, 0)):
        i_n = i_row - (i_t + 1) * C
        o_n = i_n + o_c
        m_n = o_n < i_stop
        b_dt, b_g, _, b_tail = gates(p_dt, s_tn, b_a, i_n, i_stop, C)
        b_decay = tl.exp((b_head + b_between)[:, None] + b_tail[None, :])
        b_p = scores(p_c, s_cn, s_cd, o_m, m_m, p_b, s_bn, s_bd, o_n, m_n, D, BD) * b_decay
        b_v = tile(p_x, s_xn, s_xe, o_n, m_n, o_e, m_e) * b_dt[:, None]
        b_y = product(b_p, b_v, b_y, DTYPE)
        b_between += tl.sum(b_g, 0)
    if p_start is not None:
        b_read = tl.zeros([C, BE], dtype=tl.float32)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            m_d = o_d < D
            o_s = i_sh.to(tl.int64) * D * E + o_d[:, None] * E + o_e[None, :]
            b_s = tl.load(p_start + o_s, mask=m_d[:, None] & m_e[None, :], other=0.0)
            b_read = product(tile(p_c, s_cn, s_cd, o_m, m_m, o_d, m_d), b_s, b_read, DTYPE)
        b_y += b_read * tl.exp(b_head + b_between)[:, None]
    # of a contiguous (B,H,N,E)
    o_y = ((i_b * H + i_h) * N + o_m)[:, None] * E + o_e[None, :]
    b_y += b_nan[:, None]
    tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_e[None, :])
