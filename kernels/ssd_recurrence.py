"""The Triton kernel of Mamba-2's recurrence, one position after the other.

    h_t = exp(dt_t A) h_{t−1} + B_t (dt_t x_t)ᵀ,   y_t = C_tᵀ h_t + D x_t

(Dao and Gu, arXiv 2405.21060, section 3.1; theory SSD-2.) Nothing is rounded below float32 but y.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnproof.kernels.pointwise import strides
from attnproof.kernels.ssd_chunks import RUNTIME
from attnproof.kernels.states import sequence_bounds

__all__ = ["recurrent_kernel"]


@triton.jit(do_not_specialize=RUNTIME)
def recurrent_kernel(
    p_x, p_b, p_c, p_dt, p_a, p_skip, p_start, p_out, p_end, p_cu,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xe: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bn: tl.int64, s_bd: tl.int64,
    s_cb: tl.int64, s_ch: tl.int64, s_cn: tl.int64, s_cd: tl.int64,
    s_tb: tl.int64, s_th: tl.int64, s_tn: tl.int64,
    H, GROUP, N, D, E,
    LAYOUT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """y and the final state of one sequence and head, BE columns of them."""
    i_sh, i_e = tl.program_id(0), tl.program_id(1)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    s_xb, s_xh, s_xn, s_xe = strides(s_xb, s_xh, s_xn, s_xe, LAYOUT)
    s_bb, s_bh, s_bn, s_bd = strides(s_bb, s_bh, s_bn, s_bd, LAYOUT)
    s_cb, s_ch, s_cn, s_cd = strides(s_cb, s_ch, s_cn, s_cd, LAYOUT)
    o_d, o_e = tl.arange(0, BD), i_e * BE + tl.arange(0, BE)
    m_d, m_e = o_d < D, o_e < E
    p_x += i_b * s_xb + i_h * s_xh + i_start * s_xn + o_e * s_xe
    p_b += i_b * s_bb + (i_h // GROUP) * s_bh + i_start * s_bn + o_d * s_bd
    p_c += i_b * s_cb + (i_h // GROUP) * s_ch + i_start * s_cn + o_d * s_cd
    p_dt += i_b * s_tb + i_h * s_th + i_start * s_tn
    p_out += ((i_b * H + i_h) * N + i_start) * E + o_e
    b_a = tl.load(p_a + i_h).to(tl.float32)
    b_skip = 0.0
    if p_skip is not None:
        b_skip = tl.load(p_skip + i_h).to(tl.float32)

    # [BD, BE]
    m_s = m_d[:, None] & m_e[None, :]
    o_s = i_sh.to(tl.int64) * D * E + o_d.to(tl.int64)[:, None] * E + o_e[None, :]
    b_s = tl.zeros([BD, BE], dtype=tl.float32)
    if p_start is not None:
        b_s = tl.load(p_start + o_s, mask=m_s, other=0.0)
    for i_n in range((i_stop - i_start).to(tl.int32)):
        b_dt = tl.load(p_dt + i_n * s_tn).to(tl.float32)
        b_x = tl.load(p_x + i_n * s_xn, mask=m_e, other=0.0).to(tl.float32)
        b_b = tl.load(p_b + i_n * s_bn, mask=m_d, other=0.0).to(tl.float32)
        b_c = tl.load(p_c + i_n * s_cn, mask=m_d, other=0.0).to(tl.float32)
        b_s = b_s * tl.exp(b_dt * b_a) + b_b[:, None] * (b_dt * b_x)[None, :]
        b_y = tl.sum(b_c[:, None] * b_s, 0)
        if p_skip is not None:
            b_y += b_skip * b_x
        tl.store(p_out + tl.cast(i_n, tl.int64) * E, b_y.to(p_out.dtype.element_ty), mask=m_e)
    tl.store(p_end + o_s, b_s, mask=m_s)
