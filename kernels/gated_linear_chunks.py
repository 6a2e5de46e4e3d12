"""Triton kernels of gated linear attention: step by step, the states at the ends of chunks, and the outputs.

    S_t = exp(g_t) ∘ S_{t−1} + k_t v_tᵀ,   o_t = scale · q_tᵀ S_t                 (theory GLA-1)

or, EXCLUSIVE, o_t = scale · q_tᵀ (S_{t−1} + diag(u) k_t v_tᵀ) (theory RWK-2: a gate acts after the read).

:func:`states_kernel` walks over the chunks of a sequence and leaves the state at the beginning of each;
:func:`walk_kernel`, one program a chunk, takes it from there in secondary chunks of 16 rows (theory GLA-3):
what came before enters through the state, the pairs inside a secondary chunk one by one.

* Every exponent is a sum of gates, taken where it is needed: from the beginning of a (secondary) chunk to a
  row, from a row to its end, from row to row. No difference of two cumulative sums is formed and no
  exp(b_i)·exp(−b_j): nothing overflows (bugs B42, B45), a huge gate takes no digits from its neighbours
  (B46), and gates of −inf add up to −inf, never to inf − inf.
* Rows beyond the end have gates, keys and values of 0 in every sum (B43, B44).
* REVERSE runs time backwards: the gradient of the states, dS_{t−1} = exp(g_t) ∘ dS_t + …, obeys the same
  recurrence with (q, do) in place of (k, v), and dv is to dS what o is to S.
* A value that a row does not see is taken out of that row's matmul (0·NaN, bugs B21).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnproof.kernels.pointwise import strides
from attnproof.kernels.softmax import isolated
from attnproof.kernels.states import chunk_bounds, sequence_bounds

__all__ = [
    "ROWS",
    "decays",
    "product",
    "read",
    "recurrent_kernel",
    "segment",
    "states_kernel",
    "tile",
    "walk_kernel",
]

# Rows of a secondary chunk: the least that a matrix instruction takes.
ROWS: tl.constexpr = tl.constexpr(16)

RUNTIME = [
    "p_g", "p_u", "p_start", "p_states", "p_end", "p_out", "p_cu", "p_first", "p_owner", "s_xb", "s_xh",
    "s_xn", "s_xd", "s_yb", "s_yh", "s_yn", "s_yd", "s_zb", "s_zh", "s_zn", "s_ze", "s_gb", "s_gh", "s_gn",
    "s_gd", "each", "H", "N", "D", "E",
]  # fmt: skip


@triton.jit
def eleven_bits(b_x):
    """Float32 rounded to nearest on float16's 11 bits, with the exponents of float32; inf and NaN stay."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_round = ((b_bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
    return tl.where((b_bits & 0x7F800000) == 0x7F800000, b_x, b_round)


@triton.jit
def product(b_x, b_y, b_o, DTYPE: tl.constexpr):
    """b_o + b_x·b_y of float32 blocks, rounded to bfloat16 or to float16's precision where DTYPE says so.

    States, and scores without an upper bound, do not fit float16's range: there the matmul is one of tf32,
    whose numbers have as many bits and end where float32 ends.
    """
    if DTYPE == tl.bfloat16:
        return tl.dot(b_x.to(tl.bfloat16), b_y.to(tl.bfloat16), b_o)
    if DTYPE == tl.float16:
        return tl.dot(eleven_bits(b_x), eleven_bits(b_y), b_o, input_precision="tf32")
    return tl.dot(b_x, b_y, b_o, input_precision="ieee")


@triton.jit
def read(b_x, b_s, DTYPE: tl.constexpr, BY_ROW: tl.constexpr):
    """b_x·b_s, [R, K] and [K, W], over many K.

    Exact float32 products run without matrix instructions on NVIDIA and keep all K of both operands in
    registers; BY_ROW takes one row at a time, without rounding operands, where there is no room for that.
    """
    R: tl.constexpr = b_x.shape[0]
    b_o = tl.zeros([R, b_s.shape[1]], dtype=tl.float32)
    if BY_ROW:
        o_r = tl.arange(0, R)[:, None]
        for i_r in range(R):
            b_row = tl.sum(tl.where(o_r == i_r, b_x, 0.0), 0)
            b_o = tl.where(o_r == i_r, tl.sum(b_row[:, None] * b_s, 0)[None, :], b_o)
        return b_o
    return product(b_x, b_s, b_o, DTYPE)


@triton.jit
def tile(p_x, s_n, s_c, o_n, m_n, o_c, m_c):
    """[o_n, o_c]: these rows and columns as float32, 0 outside the masks."""
    b_x = tl.load(
        p_x + (o_n * s_n)[:, None] + (o_c * s_c)[None, :], mask=m_n[:, None] & m_c[None, :], other=0.0
    )
    return b_x.to(tl.float32)


@triton.jit
def decays(p_g, s_gn, s_gd, i_n, i_stop, o_d, m_d, R: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Gates of the R rows from i_n on, shifted for sums: (b_step, b_next, b_total), [R, BD] and [BD].

    b_step sums from the beginning to what decays a state before row i reads it, b_next from the end to what
    decays row i's own contribution; b_total is the sum over all rows.
    """
    o_r = tl.arange(0, R)
    m_r = i_n + o_r < i_stop
    b_g = tile(p_g, s_gn, s_gd, i_n + o_r, m_r, o_d, m_d)
    b_step = b_g
    if EXCLUSIVE:
        b_step = tile(p_g, s_gn, s_gd, i_n + o_r - 1, m_r & (o_r > 0), o_d, m_d)
    m_next = (o_r + 1 < R) & (i_n + o_r + 1 < i_stop)
    b_next = tile(p_g, s_gn, s_gd, i_n + o_r + 1, m_next, o_d, m_d)
    return b_step, b_next, tl.sum(b_g, 0)


@triton.jit
def segment(b_step, b_next, o_r, i_j, REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """[R, BD]: sums of gates from row i_j of a secondary chunk to each row after it (REVERSE: before it)."""
    if REVERSE:
        m_r = o_r + (2 if EXCLUSIVE else 1) <= i_j
        return tl.cumsum(tl.where(m_r[:, None], b_next, 0.0), 0, reverse=True)
    m_r = o_r > i_j + (1 if EXCLUSIVE else 0)
    return tl.cumsum(tl.where(m_r[:, None], b_step, 0.0), 0)


@triton.jit(do_not_specialize=RUNTIME)
def states_kernel(
    p_y, p_z, p_g, p_start, p_states, p_end, p_cu, p_first,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yd: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_ze: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gd: tl.int64,
    each, H, N, D, E, y_scale,
    REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The state before every chunk (REVERSE: its gradient after every chunk), and the one after the last;
    R rows enter at a time.
    """
    i_sh = tl.program_id(0)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    s_yb, s_yh, s_yn, s_yd = strides(s_yb, s_yh, s_yn, s_yd, LAYOUT)
    s_zb, s_zh, s_zn, s_ze = strides(s_zb, s_zh, s_zn, s_ze, LAYOUT)
    p_y += i_b * s_yb + i_h * s_yh
    p_z += i_b * s_zb + i_h * s_zh
    p_g += i_b * s_gb + i_h * s_gh
    i_c0 = (i_s * each if p_cu is None else tl.load(p_first + i_s)).to(tl.int64)

    o_r = tl.arange(0, R)
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
        for i_w in range(C // R):
            i_n = i_start + i_c * C + (C // R - 1 - i_w if REVERSE else i_w) * R
            m_r = i_n + o_r < i_stop
            # [R, BD], [R, BE]
            b_y = tile(p_y, s_yn, s_yd, i_n + o_r, m_r, o_d, m_d) * y_scale
            b_z = tile(p_z, s_zn, s_ze, i_n + o_r, m_r, o_e, m_e)
            b_step, b_next, b_total = decays(p_g, s_gn, s_gd, i_n, i_stop, o_d, m_d, R, EXCLUSIVE)
            b_decay = tl.exp(tl.cumsum(b_step, 0) if REVERSE else tl.cumsum(b_next, 0, reverse=True))
            b_s = product(tl.trans(b_y * b_decay), b_z, b_s * tl.exp(b_total)[:, None], DTYPE)
    tl.store(p_end + i_area + o_s, b_s, mask=m_s)


@triton.jit(do_not_specialize=RUNTIME)
def walk_kernel(
    p_x, p_y, p_z, p_g, p_u, p_states, p_out, p_cu, p_first, p_owner,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xd: tl.int64,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yd: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_ze: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gd: tl.int64,
    each, H, N, D, E, x_scale, y_scale,
    REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Rows of one chunk: out_i = Σ_{j ≤ i} (x_i ∘ exp(Σ gates))·y_j z_j + the state's part; REVERSE: j ≥ i.

    (x, y, z) is (q, k, v) for o, and (k, q, do) for dv.
    """
    i_ch, i_e = tl.program_id(0), tl.program_id(1)
    i_c, i_h = i_ch // H, (i_ch % H).to(tl.int64)
    i_b, i_first, i_stop, _ = chunk_bounds(p_cu, p_first, p_owner, i_c, each, N, C)
    s_xb, s_xh, s_xn, s_xd = strides(s_xb, s_xh, s_xn, s_xd, LAYOUT)
    s_yb, s_yh, s_yn, s_yd = strides(s_yb, s_yh, s_yn, s_yd, LAYOUT)
    s_zb, s_zh, s_zn, s_ze = strides(s_zb, s_zh, s_zn, s_ze, LAYOUT)
    p_x += i_b * s_xb + i_h * s_xh
    p_y += i_b * s_yb + i_h * s_yh
    p_z += i_b * s_zb + i_h * s_zh
    p_g += i_b * s_gb + i_h * s_gh

    o_r, o_d, o_e = tl.arange(0, R), tl.arange(0, BD), i_e * BE + tl.arange(0, BE)
    m_d, m_e = o_d < D, o_e < E
    # [BD, BE]
    m_s = m_d[:, None] & m_e[None, :]
    o_s = i_ch.to(tl.int64) * D * E + o_d.to(tl.int64)[:, None] * E + o_e[None, :]
    b_s = tl.load(p_states + o_s, mask=m_s, other=0.0)
    # [R, R]
    m_seen = o_r[:, None] <= o_r[None, :] if REVERSE else o_r[:, None] >= o_r[None, :]
    b_u = tl.full([BD], 1.0, dtype=tl.float32)
    if EXCLUSIVE:
        b_u = tl.load(p_u + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    n_rows = ((tl.minimum(i_first + C, i_stop) - i_first + R - 1) // R).to(tl.int32)
    for i_t in range(n_rows):
        i_n = i_first + (n_rows - 1 - i_t if REVERSE else i_t) * R
        m_r = i_n + o_r < i_stop
        # [R, BD], [R, BE]
        b_x = tile(p_x, s_xn, s_xd, i_n + o_r, m_r, o_d, m_d) * x_scale
        b_y = tile(p_y, s_yn, s_yd, i_n + o_r, m_r, o_d, m_d) * y_scale
        b_z = tile(p_z, s_zn, s_ze, i_n + o_r, m_r, o_e, m_e)
        b_step, b_next, b_total = decays(p_g, s_gn, s_gd, i_n, i_stop, o_d, m_d, R, EXCLUSIVE)

        b_a = tl.zeros([R, R], dtype=tl.float32)
        for i_j in range(R):
            m_y = m_d & (i_n + i_j < i_stop)
            b_yj = tl.load(p_y + (i_n + i_j) * s_yn + o_d * s_yd, mask=m_y, other=0.0).to(tl.float32)
            b_w = tl.exp(segment(b_step, b_next, o_r, i_j, REVERSE, EXCLUSIVE))
            b_w = tl.where(o_r[:, None] == i_j, b_u[None, :], b_w)
            m_j = o_r <= i_j if REVERSE else o_r >= i_j
            b_aj = tl.sum(tl.where(m_j[:, None], b_x * b_w * (b_yj * y_scale)[None, :], 0.0), 1)
            b_a = tl.where(o_r[None, :] == i_j, b_aj[:, None], b_a)

        b_prefix, b_suffix = tl.cumsum(b_step, 0), tl.cumsum(b_next, 0, reverse=True)
        b_in, b_out = (b_suffix, b_prefix) if REVERSE else (b_prefix, b_suffix)
        b_clean, b_nan = isolated(b_z, m_seen, tl.zeros([R], dtype=tl.float32))
        b_o = read(b_x * tl.exp(b_in), b_s, DTYPE, BY_ROW)
        b_o = product(b_a, b_clean, b_o, DTYPE) + b_nan[:, None]
        # [R, BE] of a contiguous (B,H,N,E)
        o_o = ((i_b * H + i_h) * N + i_n + o_r)[:, None] * E + o_e[None, :]
        tl.store(p_out + o_o, b_o.to(p_out.dtype.element_ty), mask=m_r[:, None] & m_e[None, :])
        b_s = product(tl.trans(b_y * tl.exp(b_out)), b_z, b_s * tl.exp(b_total)[:, None], DTYPE)


@triton.jit(do_not_specialize=RUNTIME)
def recurrent_kernel(
    p_x, p_y, p_z, p_g, p_u, p_start, p_out, p_end, p_cu,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xd: tl.int64,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yd: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_ze: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gd: tl.int64,
    H, N, D, E, scale,
    FACTORS: tl.constexpr, EXCLUSIVE: tl.constexpr, LAYOUT: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """q, k, v to o, position by position; FACTORS: g holds the decays themselves, not their logarithms."""
    i_sh, i_e = tl.program_id(0), tl.program_id(1)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    s_xb, s_xh, s_xn, s_xd = strides(s_xb, s_xh, s_xn, s_xd, LAYOUT)
    s_yb, s_yh, s_yn, s_yd = strides(s_yb, s_yh, s_yn, s_yd, LAYOUT)
    s_zb, s_zh, s_zn, s_ze = strides(s_zb, s_zh, s_zn, s_ze, LAYOUT)
    o_d, o_e = tl.arange(0, BD), i_e * BE + tl.arange(0, BE)
    m_d, m_e = o_d < D, o_e < E
    p_x += i_b * s_xb + i_h * s_xh + i_start * s_xn + o_d * s_xd
    p_y += i_b * s_yb + i_h * s_yh + i_start * s_yn + o_d * s_yd
    p_z += i_b * s_zb + i_h * s_zh + i_start * s_zn + o_e * s_ze
    p_g += i_b * s_gb + i_h * s_gh + i_start * s_gn + o_d * s_gd
    p_out += ((i_b * H + i_h) * N + i_start) * E + o_e

    # [BD, BE]
    m_s = m_d[:, None] & m_e[None, :]
    o_s = i_sh.to(tl.int64) * D * E + o_d.to(tl.int64)[:, None] * E + o_e[None, :]
    b_s = tl.zeros([BD, BE], dtype=tl.float32)
    if p_start is not None:
        b_s = tl.load(p_start + o_s, mask=m_s, other=0.0)
    if EXCLUSIVE:
        b_u = tl.load(p_u + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i_n in range((i_stop - i_start).to(tl.int32)):
        b_q = tl.load(p_x + i_n * s_xn, mask=m_d, other=0.0).to(tl.float32)
        b_k = tl.load(p_y + i_n * s_yn, mask=m_d, other=0.0).to(tl.float32)
        b_v = tl.load(p_z + i_n * s_zn, mask=m_e, other=0.0).to(tl.float32)
        b_g = tl.load(p_g + i_n * s_gn, mask=m_d, other=0.0).to(tl.float32)
        b_decayed = b_s * (b_g if FACTORS else tl.exp(b_g))[:, None]
        b_new = b_decayed + b_k[:, None] * b_v[None, :]
        b_read = b_new
        if EXCLUSIVE:
            b_read = b_s + (b_u * b_k)[:, None] * b_v[None, :]
        b_o = tl.sum(b_read * b_q[:, None], 0) * scale
        tl.store(p_out + tl.cast(i_n, tl.int64) * E, b_o.to(p_out.dtype.element_ty), mask=m_e)
        b_s = b_new
    tl.store(p_end + o_s, b_s, mask=m_s)
