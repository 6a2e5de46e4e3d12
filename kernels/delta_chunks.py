"""The delta rule by chunks: inside a chunk a triangular system of equations, between chunks one state.

With S the state before a chunk, decays e^{b_t} since its beginning and e^{b_t − b_i} since position i:

    L_ti = β_t Σ_c k_tc k_ic e^{b_tc − b_ic} (i < t),   P_ti = scale · Σ_c q_tc k_ic e^{b_tc − b_ic} (i ≤ t)
    (I + L) U = β ∘ (V − (K ∘ e^b) S)
    O = scale · (Q ∘ e^b) S + P U,   S' = e^{b_C} ∘ S + (K ∘ e^{b_C − b})ᵀ U

(the WY or UT form of Yang et al., arXiv 2406.06484 and 2412.06464; theory DN-2, DN-3. The latter prints a
plain causal mask in place of the decays in P, which is wrong.) Three kernels: L and P of every block of 16
rows; T = (I + L)⁻¹ of every chunk, by forward substitution in float32; output and states, chunk after chunk.

* T has entries of at most β_t‖k_t‖‖k_i‖ where β‖k‖² ≤ 2, whatever the condition of I + L is, and forward
  substitution computes nothing larger on the way. Products of powers of L, which also invert it, do.
  U − W S with U = T(β ∘ V), W = T(β ∘ K) would save a dependent product, and cancel where S recalls V.
* Decays are sums of gates over just the segment they span, never differences of longer sums: no
  cancellation, no exponent above 0, and −inf − (−inf) does not occur. Between blocks a vector gate is taken
  apart at the beginning of the later block, e^{b_t − b_i} = e^{b_t − b_r} e^{b_r − b_i}; inside a block of 16
  it is formed for each pair.
* What is computed on the way enters matmuls as the inputs' dtype. float16 ends at 65504, which states and
  values of a healthy recurrence may exceed: it goes as tf32, of the same 11 bits and float32's range.
* 0·NaN: rows from a chunk's first non-finite position on are taken out of its matmuls and become NaN, so
  that earlier rows of the chunk do not see them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnproof.kernels.delta_recurrence import RUNTIME, DeltaInputs
from attnproof.kernels.gated_linear_chunks import read
from attnproof.kernels.pointwise import strides
from attnproof.kernels.states import Chunks, chunk_bounds, register_limit, sequence_bounds
from attnproof.kernels.tiles import padded_width

__all__ = ["BLOCK", "default_chunk", "run_chunks"]

# The side of a block inside which decays of a vector gate are formed pair by pair.
BLOCK = 16
SIDE: tl.constexpr = tl.constexpr(BLOCK)
INF: tl.constexpr = tl.constexpr(float("inf"))
CHUNK_RUNTIME = [*RUNTIME, "p_lower", "p_scores"]


@triton.jit
def operand(b_x, dtype: tl.constexpr):
    """b_x as a matmul operand beside inputs of ``dtype``."""
    if dtype == tl.float16:
        # To nearest, here, because tensor cores cut the low bits off. Inf and NaN must not take the carry.
        b_x = b_x.to(tl.float32)
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_round = ((b_bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
        b_x = tl.where((b_bits & 0x7F800000) == 0x7F800000, b_x, b_round)
    else:
        b_x = b_x.to(dtype)
    return b_x


@triton.jit(do_not_specialize=CHUNK_RUNTIME)
def scores_kernel(
    p_q, p_k, p_beta, p_g, p_cu, p_first, p_owner, p_lower, p_scores,
    s_qb: tl.int64, s_qh: tl.int64, s_qn: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bn: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gd: tl.int64,
    H, N, D, each, scale,
    GATE: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows of L and P for one block of 16 positions, against the positions of its chunk up to it."""
    i_h = tl.program_id(1).to(tl.int64)
    i_b, i_first, i_stop, i_s = chunk_bounds(p_cu, p_first, p_owner, tl.program_id(0), each, N, SIDE)
    _, i_start, _ = sequence_bounds(p_cu, i_s, N)
    blocks = ((i_first - i_start) % C // SIDE).to(tl.int32)  # of this chunk, before this one
    i_chunk = i_first - blocks * SIDE
    s_qb, s_qh, s_qn, s_qd = strides(s_qb, s_qh, s_qn, s_qd, LAYOUT)
    s_kb, s_kh, s_kn, s_kd = strides(s_kb, s_kh, s_kn, s_kd, LAYOUT)
    o_i, o_d = tl.arange(0, SIDE), tl.arange(0, BD)
    o_t, m_d = i_first + o_i, o_d < D
    m_t = o_t < i_stop
    # [16, BD]
    m_td = m_t[:, None] & m_d[None, :]
    dtype: tl.constexpr = p_q.dtype.element_ty
    p_k += i_b * s_kb + i_h * s_kh + o_d * s_kd
    b_q = tl.load(
        p_q + i_b * s_qb + i_h * s_qh + (o_t * s_qn)[:, None] + (o_d * s_qd)[None, :], mask=m_td, other=0.0
    )
    b_k = tl.load(p_k[None, :] + (o_t * s_kn)[:, None], mask=m_td, other=0.0)
    b_beta = tl.load(p_beta + i_b * s_bb + i_h * s_bh + o_t * s_bn, mask=m_t, other=0.0).to(tl.float32)
    if GATE == 1:
        p_g += i_b * s_gb + i_h * s_gh
        # [16]: decay since the block's beginning; b_gap: over blocks between
        b_g = tl.load(p_g + o_t * s_gn, mask=m_t, other=0.0).to(tl.float32)
        b_since = tl.cumsum(b_g, 0)
        b_gap = 0.0
    if GATE == 2:
        p_g += i_b * s_gb + i_h * s_gh + o_d * s_gd
        # [16, BD], [BD]
        b_g = tl.load(p_g[None, :] + (o_t * s_gn)[:, None], mask=m_td, other=0.0).to(tl.float32)
        b_since = tl.exp(tl.cumsum(b_g, 0))
        b_gap = tl.zeros([BD], dtype=tl.float32)
        b_q_since = operand(b_q.to(tl.float32) * b_since, dtype)
        b_k_since = operand(b_k.to(tl.float32) * b_since, dtype)
    o_row = ((i_b * H + i_h) * N + o_t) * C
    p_l = p_lower + o_row[:, None] + o_i[None, :]
    p_p = p_scores + o_row[:, None] + o_i[None, :]

    for i_j in range(blocks):
        i_n = (blocks - 1 - i_j) * SIDE
        o_n = i_chunk + i_n + o_i
        b_kn = tl.load(p_k[None, :] + (o_n * s_kn)[:, None], mask=m_d[None, :], other=0.0)
        # [16, 16]
        if GATE == 2:
            # decay from each key to the later block's beginning: of later positions of its own block, and gap
            m_next = (o_i < SIDE - 1)[:, None] & m_d[None, :]
            b_next = tl.load(p_g[None, :] + ((o_n + 1) * s_gn)[:, None], mask=m_next, other=0.0)
            b_until = tl.cumsum(b_next.to(tl.float32), 0, reverse=True) + b_gap[None, :]  # type: ignore[index]
            b_gn = tl.load(p_g[None, :] + (o_n * s_gn)[:, None], mask=m_d[None, :], other=0.0)
            b_gap += tl.sum(b_gn.to(tl.float32), 0)
            b_kn = tl.trans(operand(b_kn.to(tl.float32) * tl.exp(b_until), dtype))
            b_l = tl.dot(b_k_since, b_kn, input_precision=PRECISION)
            b_p = tl.dot(b_q_since, b_kn, input_precision=PRECISION)
        else:
            b_l = tl.dot(b_k, tl.trans(b_kn), input_precision="ieee")
            b_p = tl.dot(b_q, tl.trans(b_kn), input_precision="ieee")
            if GATE == 1:
                b_next = tl.load(p_g + (o_n + 1) * s_gn, mask=o_i < SIDE - 1, other=0.0)
                b_until = tl.cumsum(b_next.to(tl.float32), 0, reverse=True) + b_gap
                b_gap += tl.sum(tl.load(p_g + o_n * s_gn).to(tl.float32), 0)
                b_decay = tl.exp(b_since[:, None] + b_until[None, :])
                b_l, b_p = b_l * b_decay, b_p * b_decay
        tl.store(p_l + i_n, b_l * b_beta[:, None], mask=m_t[:, None])
        tl.store(p_p + i_n, b_p * scale, mask=m_t[:, None])

    m_before = o_i[:, None] > o_i[None, :]
    if GATE == 2:
        b_l = tl.zeros([SIDE, SIDE], dtype=tl.float32)
        b_p = tl.zeros([SIDE, SIDE], dtype=tl.float32)
        # [16, BD]: decay from key i_i to each row, one position longer with every earlier key
        b_decay = tl.zeros([SIDE, BD], dtype=tl.float32)
        b_k, b_q = b_k.to(tl.float32), b_q.to(tl.float32)
        for i_j in range(SIDE):
            i_i = SIDE - 1 - i_j
            m_i, m_next = i_first + i_i < i_stop, (i_i + 1 < SIDE) & (i_first + i_i + 1 < i_stop)
            b_ki = tl.load(p_k + (i_first + i_i) * s_kn, mask=m_d & m_i, other=0.0).to(tl.float32)
            b_gi = tl.load(p_g + (i_first + i_i + 1) * s_gn, mask=m_d & m_next, other=0.0).to(tl.float32)
            b_decay = tl.where(o_i[:, None] > i_i, b_decay + b_gi[None, :], 0.0)
            b_ki = b_ki[None, :] * tl.exp(b_decay)
            m_i = o_i[None, :] == i_i
            b_l = tl.where(m_i, tl.sum(b_k * b_ki, 1)[:, None], b_l)
            b_p = tl.where(m_i, tl.sum(b_q * b_ki, 1)[:, None], b_p)
    else:
        b_l = tl.dot(b_k, tl.trans(b_k), input_precision="ieee")
        b_p = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if GATE == 1:
            b_decay = tl.exp(tl.cumsum(tl.where(m_before, b_g[:, None], 0.0), 0))
            b_l, b_p = b_l * b_decay, b_p * b_decay
    i_n = blocks * SIDE
    tl.store(p_l + i_n, tl.where(m_before, b_l * b_beta[:, None], 0.0), mask=m_t[:, None])
    b_p = tl.where(m_before | (o_i[:, None] == o_i[None, :]), b_p * scale, 0.0)
    tl.store(p_p + i_n, b_p, mask=m_t[:, None])


@triton.jit(do_not_specialize=CHUNK_RUNTIME)
def inverse_kernel(p_cu, p_first, p_owner, p_lower, H, N, each, C: tl.constexpr):
    """(I + L)⁻¹ of one chunk, written over L: row t is e_t − Σ_{i<t} L_ti · row i."""
    i_h = tl.program_id(1).to(tl.int64)
    i_b, i_first, i_stop, _ = chunk_bounds(p_cu, p_first, p_owner, tl.program_id(0), each, N, C)
    o_r, o_c = tl.arange(0, C), tl.arange(0, C)
    steps = tl.minimum(i_stop - i_first, C).to(tl.int32)
    p_lower += ((i_b * H + i_h) * N + i_first) * C
    # [C, C]
    b_t = (o_r[:, None] == o_c[None, :]).to(tl.float32)
    for i_r in range(1, steps):
        b_l = tl.load(p_lower + i_r * C + o_r, mask=o_r < i_r, other=0.0)
        b_row = (o_c == i_r).to(tl.float32) - tl.sum(b_l[:, None] * b_t, 0)
        b_t = tl.where(o_r[:, None] == i_r, b_row[None, :], b_t)
    tl.debug_barrier()  # every row of L has been read
    m_t = (o_r < steps)[:, None] & (o_c[None, :] <= o_r[:, None])
    tl.store(p_lower + (o_r * C)[:, None] + o_c[None, :], b_t, mask=m_t)


@triton.jit(do_not_specialize=CHUNK_RUNTIME)
def chunk_kernel(
    p_q, p_k, p_v, p_beta, p_g, p_state0, p_cu, p_lower, p_scores, p_o, p_state,
    s_qb: tl.int64, s_qh: tl.int64, s_qn: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bn: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gd: tl.int64,
    H, N, D, E, scale,
    GATE: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr, BY_ROW: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """BE columns of o and of the state of one sequence and head, chunk after chunk."""
    i_sh, o_e = tl.program_id(0), tl.program_id(1) * BE + tl.arange(0, BE)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    s_qb, s_qh, s_qn, s_qd = strides(s_qb, s_qh, s_qn, s_qd, LAYOUT)
    s_kb, s_kh, s_kn, s_kd = strides(s_kb, s_kh, s_kn, s_kd, LAYOUT)
    s_vb, s_vh, s_vn, s_ve = strides(s_vb, s_vh, s_vn, s_ve, LAYOUT)
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    m_d, m_e = o_d < D, o_e < E
    dtype: tl.constexpr = p_q.dtype.element_ty
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_beta += i_b * s_bb + i_h * s_bh
    if p_g is not None:
        p_g += i_b * s_gb + i_h * s_gh
    i_row = (i_b * H + i_h) * N
    # [BD, BE]
    m_s = m_d[:, None] & m_e[None, :]
    o_s = i_sh.to(tl.int64) * D * E + (o_d * E)[:, None] + o_e[None, :]
    b_s = tl.zeros([BD, BE], dtype=tl.float32)
    if p_state0 is not None:
        b_s = tl.load(p_state0 + o_s, mask=m_s, other=0.0)

    for i_c in range(((i_stop - i_start + C - 1) // C).to(tl.int32)):
        # [C], [C, BD], [C, BE], [C, C]
        o_t = i_start + i_c * C + o_c
        m_t = o_t < i_stop
        m_td, m_te = m_t[:, None] & m_d[None, :], m_t[:, None] & m_e[None, :]
        o_tc = ((i_row + o_t) * C)[:, None] + o_c[None, :]
        p_kt = p_k + (o_t * s_kn)[:, None] + (o_d * s_kd)[None, :]
        b_beta = tl.load(p_beta + o_t * s_bn, mask=m_t, other=0.0).to(tl.float32)
        # [C]: 0, and NaN from the first non-finite position on
        b_nan = b_beta * 0.0
        b_since, p_gt = 1.0, p_g
        if GATE == 1:
            p_gt = p_g + o_t * s_gn
            m_next = (o_c < C - 1) & (o_t + 1 < i_stop)
            b_g = tl.load(p_gt, mask=m_t, other=0.0).to(tl.float32)
            b_nan += tl.where(b_g == -INF, 0.0, b_g * 0.0)
            b_since = tl.exp(tl.cumsum(b_g, 0))[:, None]
            b_whole = tl.exp(tl.sum(b_g, 0))
        if GATE == 2:
            p_gt = p_g + (o_t * s_gn)[:, None] + (o_d * s_gd)[None, :]
            m_next = ((o_c < C - 1) & (o_t + 1 < i_stop))[:, None] & m_d[None, :]
            b_g = tl.load(p_gt, mask=m_td, other=0.0).to(tl.float32)
            b_nan += tl.sum(tl.where(b_g == -INF, 0.0, b_g * 0.0), 1)
            b_since = tl.exp(tl.cumsum(b_g, 0))
            b_whole = tl.exp(tl.sum(b_g, 0))[:, None]

        # what queries and keys read from the state
        b_s_in = operand(b_s, dtype)
        b_q = tl.load(p_q + (o_t * s_qn)[:, None] + (o_d * s_qd)[None, :], mask=m_td, other=0.0)
        b_k = tl.load(p_kt, mask=m_td, other=0.0)
        b_nan += tl.sum(b_k.to(tl.float32) * 0.0, 1)
        if GATE == 2:
            b_q, b_k = b_q.to(tl.float32) * b_since, b_k.to(tl.float32) * b_since
        if BY_ROW:
            b_o = read(b_q.to(tl.float32), b_s, dtype, True) * scale
            b_u = read(b_k.to(tl.float32), b_s, dtype, True)
        else:
            b_o = tl.dot(operand(b_q, dtype), b_s_in, input_precision=PRECISION) * scale
            b_u = tl.dot(operand(b_k, dtype), b_s_in, input_precision=PRECISION)
        if GATE == 1:
            b_o, b_u = b_o * b_since, b_u * b_since

        b_v = tl.load(p_v + (o_t * s_vn)[:, None] + (o_e * s_ve)[None, :], mask=m_te, other=0.0).to(
            tl.float32
        )
        b_nan = tl.cumsum(b_nan + tl.sum(b_v * 0.0, 1), 0)
        m_finite = (b_nan == b_nan)[:, None]
        b_u = operand(tl.where(m_finite, (b_v - b_u) * b_beta[:, None], 0.0), dtype)
        m_tc = m_t[:, None] & m_finite & (o_c[None, :] <= o_c[:, None])
        b_t = operand(tl.load(p_lower + o_tc, mask=m_tc, other=0.0), dtype)
        b_u = tl.dot(b_t, b_u, input_precision=PRECISION)
        b_p = operand(tl.load(p_scores + o_tc, mask=m_tc, other=0.0), dtype)
        b_o = tl.dot(b_p, operand(b_u, dtype), b_o, input_precision=PRECISION) + b_nan[:, None]
        p_ot = p_o + ((i_row + o_t) * E)[:, None] + o_e[None, :]
        tl.store(p_ot, b_o.to(p_o.dtype.element_ty), mask=m_te)

        # what the chunk writes to the state; k is loaded again rather than kept
        b_k = tl.load(p_kt, mask=m_td & m_finite, other=0.0)
        if GATE != 0:
            b_until = tl.exp(
                tl.cumsum(tl.load(p_gt + s_gn, mask=m_next, other=0.0).to(tl.float32), 0, reverse=True)
            )
            b_s *= b_whole
        if GATE == 1:
            b_u *= b_until[:, None]
        if GATE == 2:
            b_k = tl.where(m_finite, b_k.to(tl.float32) * b_until, 0.0)
        b_k = tl.trans(operand(b_k, dtype))
        b_s = tl.dot(b_k, operand(b_u, dtype), b_s, input_precision=PRECISION) + tl.sum(b_nan, 0)
    if p_state is not None:
        tl.store(p_state + o_s, b_s, mask=m_s)


def default_chunk(dtype: torch.dtype) -> int:
    """Positions a chunk, as many as registers hold at D = 128.

    Exact float32 products run without matrix instructions and are unrolled; float16 has operands of tf32.
    """
    return 32 if dtype == torch.bfloat16 else 16


class ChunkTile(NamedTuple):
    """The shape of a launch of ``chunk_kernel``: columns of the state, warps, and how the state is read."""

    columns: int
    warps: int
    by_row: bool


def chunk_tile(x: DeltaInputs) -> ChunkTile:
    """The tile for ``x``.

    Exact float32 products are unrolled and keep all key channels of both operands in registers: beyond 32 of
    them the state is read row by row. So it is beyond 64 in float16, whose operands in tf32 are as wide. As
    matmuls these reads spill 8 to 48 bytes on sm_80, sm_90 or sm_100 (tests/quality/spills.py).
    """
    width, exact = padded_width(x.q.shape[3]), x.q.dtype == torch.float32
    columns = min(padded_width(x.v.shape[3]), 32 if exact and width <= 64 else 16)
    widest = {torch.float32: 32, torch.float16: 64}.get(x.q.dtype)
    return ChunkTile(columns, warps=8, by_row=widest is not None and width > widest)


def run_chunks(x: DeltaInputs, chunk: int, o: torch.Tensor, state: torch.Tensor) -> None:
    """Fill ``o`` (B,H,N,E) and the final ``state`` (S,H,D,E) by chunks of ``chunk`` positions."""
    batch, heads, length, width = x.q.shape
    value_width = x.v.shape[3]
    layout, tensor_strides = x.tensor_strides()
    precision = "tf32" if x.q.dtype == torch.float16 else "ieee"
    lower = torch.empty((batch, heads, length, chunk), dtype=torch.float32, device=x.q.device)
    scores = torch.empty_like(lower)
    block_d = padded_width(width)
    common: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": False}

    blocks, chunks = x.sequences.chunks(BLOCK), x.sequences.chunks(chunk)
    scores_kernel[(blocks.count, heads)](
        x.q, x.k, x.beta, x.g, *tables(x, blocks), lower, scores,
        *tensor_strides[:8], *x.scalar_strides(), heads, length, width, blocks.each, x.scale,
        GATE=x.gate, LAYOUT=layout, PRECISION=precision, C=chunk, BD=block_d, num_warps=8, **common,
        **register_limit(8),
    )  # fmt: skip
    inverse_warps = 4 if chunk <= 64 else 8
    inverse_kernel[(chunks.count, heads)](
        *tables(x, chunks), lower, heads, length, chunks.each, C=chunk, num_warps=inverse_warps, **common,
        **register_limit(inverse_warps),
    )  # fmt: skip
    tile = chunk_tile(x)
    chunk_kernel[(x.sequences.count * heads, triton.cdiv(value_width, tile.columns))](
        x.q, x.k, x.v, x.beta, x.g, x.initial_state, x.sequences.cu_seqlens, lower, scores, o, state,
        *tensor_strides, *x.scalar_strides(), heads, length, width, value_width, x.scale,
        GATE=x.gate, LAYOUT=layout, PRECISION=precision, BY_ROW=tile.by_row, C=chunk, BD=block_d,
        BE=tile.columns, num_warps=tile.warps, **common, **register_limit(tile.warps),
    )  # fmt: skip


def tables(x: DeltaInputs, chunks: Chunks) -> tuple[torch.Tensor | None, ...]:
    """What a kernel of one program a chunk looks its chunk up in."""
    return x.sequences.cu_seqlens, chunks.first, chunks.owner
