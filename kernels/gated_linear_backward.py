"""The Triton kernel of the gradients of gated linear attention in q, k and the gates (and RWKV-6's bonus).

With S the states, dS their gradients (dS_t = scale · q_t do_tᵀ + exp(g_{t+1}) ∘ dS_{t+1}) and e_ij the decay
from j to i:

    dq_i = scale · Σ_{j ≤ i} e_ij ∘ k_j (do_i·v_j) + …,   dk_j = scale · Σ_{i ≥ j} e_ij ∘ q_i (do_i·v_j) + …,
    dg_t = Σ_{j < t ≤ i} scale · q_i ∘ k_j ∘ e_ij (do_i·v_j) + …

dg is summed from the pairs that cross t. The reverse cumulative sum of q∘dq − k∘dk (theory GLA-4) is the same
number, but there every pair on either side of t enters twice, with opposite signs: where decay is strong,
their rounding, in half precision that of dq and dk, is all that remains. Here every term carries exp(g_t), so
that a gate of −inf gets 0 and nothing is lost. A pair comes in one of four ways for a secondary chunk: from
before it to behind it (S, dS), from before it into it (S), from it to behind it (dS), or inside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnproof.kernels.gated_linear_chunks import decays, product, read, segment, tile
from attnproof.kernels.pointwise import strides
from attnproof.kernels.states import chunk_bounds

__all__ = ["gradient_kernel"]

RUNTIME = [
    "p_g", "p_u", "p_states", "p_dstates", "p_dq", "p_dk", "p_dg", "p_du", "p_cu", "p_first", "p_owner",
    "s_qb", "s_qh", "s_qn", "s_qd", "s_kb", "s_kh", "s_kn", "s_kd", "s_vb", "s_vh", "s_vn", "s_ve", "s_ob",
    "s_oh", "s_on", "s_oe", "s_gb", "s_gh", "s_gn", "s_gd", "each", "H", "N", "D", "E",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def gradient_kernel(
    p_q, p_k, p_v, p_do, p_g, p_u, p_states, p_dstates, p_dq, p_dk, p_dg, p_du, p_cu, p_first, p_owner,
    s_qb: tl.int64, s_qh: tl.int64, s_qn: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_on: tl.int64, s_oe: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gd: tl.int64,
    each, H, N, D, E, scale,
    EXCLUSIVE: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg and this chunk's part of du for BD key channels of one chunk, walked from its end."""
    i_ch, i_d = tl.program_id(0), tl.program_id(1)
    i_c, i_h = i_ch // H, (i_ch % H).to(tl.int64)
    i_b, i_first, i_stop, _ = chunk_bounds(p_cu, p_first, p_owner, i_c, each, N, C)
    s_qb, s_qh, s_qn, s_qd = strides(s_qb, s_qh, s_qn, s_qd, LAYOUT)
    s_kb, s_kh, s_kn, s_kd = strides(s_kb, s_kh, s_kn, s_kd, LAYOUT)
    s_vb, s_vh, s_vn, s_ve = strides(s_vb, s_vh, s_vn, s_ve, LAYOUT)
    s_ob, s_oh, s_on, s_oe = strides(s_ob, s_oh, s_on, s_oe, LAYOUT)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_do += i_b * s_ob + i_h * s_oh
    p_g += i_b * s_gb + i_h * s_gh

    o_r, o_d, o_e = tl.arange(0, R), i_d * BD + tl.arange(0, BD), tl.arange(0, BE)
    m_d, m_e = o_d < D, o_e < E
    # [BD, BE]
    m_s = m_d[:, None] & m_e[None, :]
    o_s = i_ch.to(tl.int64) * D * E + o_d.to(tl.int64)[:, None] * E + o_e[None, :]
    b_ds = tl.load(p_dstates + o_s, mask=m_s, other=0.0)
    b_u = tl.full([BD], 1.0, dtype=tl.float32)
    if EXCLUSIVE:
        b_u = tl.load(p_u + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_du = tl.zeros([BD], dtype=tl.float32)
    # [R, R]: row i reads what is decayed at t
    m_reads = o_r[None, :] > o_r[:, None] if EXCLUSIVE else o_r[None, :] >= o_r[:, None]
    b_reads, b_before = m_reads.to(tl.float32), (o_r[None, :] < o_r[:, None]).to(tl.float32)
    n_rows = ((tl.minimum(i_first + C, i_stop) - i_first + R - 1) // R).to(tl.int32)
    for i_t in range(n_rows):
        i_last = n_rows - 1 - i_t
        # the state before these rows, from that before the chunk
        b_s = tl.load(p_states + o_s, mask=m_s, other=0.0)
        for i_w in range(i_last):
            i_n = i_first + i_w * R
            m_r = i_n + o_r < i_stop
            b_k = tile(p_k, s_kn, s_kd, i_n + o_r, m_r, o_d, m_d)
            b_v = tile(p_v, s_vn, s_ve, i_n + o_r, m_r, o_e, m_e)
            b_step, b_next, b_total = decays(p_g, s_gn, s_gd, i_n, i_stop, o_d, m_d, R, EXCLUSIVE)
            b_k *= tl.exp(tl.cumsum(b_next, 0, reverse=True))
            b_s = product(tl.trans(b_k), b_v, b_s * tl.exp(b_total)[:, None], DTYPE)

        i_n = i_first + i_last * R
        m_r = i_n + o_r < i_stop
        # [R, BD], [R, BE]
        b_q = tile(p_q, s_qn, s_qd, i_n + o_r, m_r, o_d, m_d) * scale
        b_k = tile(p_k, s_kn, s_kd, i_n + o_r, m_r, o_d, m_d)
        b_v = tile(p_v, s_vn, s_ve, i_n + o_r, m_r, o_e, m_e)
        b_do = tile(p_do, s_on, s_oe, i_n + o_r, m_r, o_e, m_e)
        b_step, b_next, b_total = decays(p_g, s_gn, s_gd, i_n, i_stop, o_d, m_d, R, EXCLUSIVE)
        b_in, b_out = tl.exp(tl.cumsum(b_step, 0)), tl.exp(tl.cumsum(b_next, 0, reverse=True))
        b_total = tl.exp(b_total)

        # pairs with one end in these rows, or none
        b_dq = read(b_do, tl.trans(b_s), DTYPE, BY_ROW) * b_in
        b_dk = read(b_v, tl.trans(b_ds), DTYPE, BY_ROW) * b_out
        b_dg = (b_total * tl.sum(b_s * b_ds, 1))[None, :]
        b_dg += tl.dot(b_reads, b_q * b_dq, input_precision="ieee")
        b_dg += tl.dot(b_before, b_k * b_dk, input_precision="ieee")

        # pairs inside, key by key
        b_p = read(b_do, tl.trans(b_v), DTYPE, BY_ROW)
        b_crossing = tl.zeros([R, BD], dtype=tl.float32)
        for i_j in range(R):
            m_j = m_d & (i_n + i_j < i_stop)
            b_kj = tl.load(p_k + (i_n + i_j) * s_kn + o_d * s_kd, mask=m_j, other=0.0).to(tl.float32)
            b_pj = tl.sum(tl.where(o_r[None, :] == i_j, b_p, 0.0), 1)
            # [BD]: the pairs of keys before j that are decayed at j
            m_i = o_r > i_j if EXCLUSIVE else o_r >= i_j
            b_dgj = tl.sum(tl.where(m_i[:, None], b_crossing, 0.0), 0)
            b_dg += tl.where(o_r[:, None] == i_j, b_dgj[None, :], 0.0)
            # [R, BD]
            b_w = tl.exp(segment(b_step, b_next, o_r, i_j, False, EXCLUSIVE))
            b_w = tl.where((o_r > i_j)[:, None], b_w * b_pj[:, None], 0.0)
            b_crossing += b_q * b_w * b_kj[None, :]
            b_same = tl.where((o_r == i_j)[:, None], b_pj[:, None] * b_u[None, :], 0.0)
            b_w += b_same
            b_dq += b_w * b_kj[None, :]
            b_dk += tl.where(o_r[:, None] == i_j, tl.sum(b_w * b_q, 0)[None, :], 0.0)
            if EXCLUSIVE:
                b_same = tl.where((o_r == i_j)[:, None], b_pj[:, None] * b_q, 0.0)
                b_du += tl.sum(b_same, 0) * b_kj

        # of contiguous (B,H,N,D)
        o_g = ((i_b * H + i_h) * N + i_n + o_r)[:, None] * D + o_d[None, :]
        m_g = m_r[:, None] & m_d[None, :]
        tl.store(p_dq + o_g, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_g)
        tl.store(p_dk + o_g, b_dk.to(p_dk.dtype.element_ty), mask=m_g)
        tl.store(p_dg + o_g, b_dg.to(p_dg.dtype.element_ty), mask=m_g)
        b_ds = product(tl.trans(b_q * b_in), b_do, b_ds * b_total[:, None], DTYPE)
    if EXCLUSIVE:
        tl.store(p_du + i_ch.to(tl.int64) * D + o_d, b_du, mask=m_d)
