"""Chunks of linear attention: states at the borders of chunks, and what a row takes from its own chunk.

    out_i = Σ_j (x_i·y_j) v_j + x_i S,   j in the chunk of i, S the state where the row's chunk begins

with the operands of :mod:`attnproof.kernels.linear_operands` (Yang et al., arXiv 2312.06635, section 2.2;
theory LIN-1). A chunk as long as the sequence gives the parallel form.

* A position beyond the end has k = 0, whose features are not 0: features are masked after the map.
* Operands of matmuls are rounded to the inputs' dtype, states and sums stay float32. Of float16 only inputs
  as they are fit float16: features, weights and states end at 65504 there. They enter their products in tf32,
  which rounds to the same 11 bits and ends where float32 ends (bugs B60).
* d divides a weight before that is rounded, so that neither 1/d nor dO/d has to fit a narrow dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attnproof.kernels.feature_maps import identity
from attnproof.kernels.linear_operands import COLUMN, ROW, Operand, Output, States
from attnproof.kernels.pointwise import strides
from attnproof.kernels.softmax import isolated
from attnproof.kernels.states import Chunks, Sequences, register_limit, sequence_bounds
from attnproof.kernels.tiles import ALIGNED, memory_layout, padded_width

__all__ = ["chunk_outputs", "chunk_states"]

SIDE_ROW: tl.constexpr = tl.constexpr(ROW)
SIDE_COLUMN: tl.constexpr = tl.constexpr(COLUMN)

STRIDES = [f"s_{tensor}{axis}" for tensor in "xyvg" for axis in "bhnc"]
RUNTIME = [
    "p_d", "p_r", "p_s", "p_z", "p_first", "p_owner", "p_cu", "p_o", "p_den", "p_gate", "p_s0", "p_z0",
    "p_sn", "p_zn", *STRIDES, "s_sk", "s_sv", "H", "N", "K", "V", "each", "chunk", "tiles",
]  # fmt: skip


@triton.jit
def tf32_rounded(b_x):
    """b_x as float32 of 11 bits, to nearest: tensor cores cut the low bits off. Inf and NaN take no carry."""
    b_x = b_x.to(tl.float32)
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_round = ((b_bits + 0x0FFF + ((b_bits >> 13) & 1)) & ~0x1FFF).to(tl.float32, bitcast=True)
    return tl.where((b_bits & 0x7F800000) == 0x7F800000, b_x, b_round)


@triton.jit
def product(b_a, b_b, b_c, DTYPE: tl.constexpr):
    """b_c + b_a·b_b, operands rounded to DTYPE, or to tf32 where that is float16 and they may exceed it."""
    if DTYPE == tl.float16:
        if b_a.dtype == tl.float16 and b_b.dtype == tl.float16:
            return tl.dot(b_a, b_b, b_c, input_precision="ieee")
        return tl.dot(tf32_rounded(b_a), tf32_rounded(b_b), b_c, input_precision="tf32")
    return tl.dot(b_a.to(DTYPE), b_b.to(DTYPE), b_c, input_precision="ieee")


@triton.jit
def block(p_x, o_n, o_c, s_n, s_c, m_n, C, MAP: tl.constexpr):
    """MAP of rows o_n, columns o_c of x, 0 beyond the end of either."""
    # [rows, columns]
    m_x = m_n[:, None] & (o_c < C)[None, :]
    b_x = MAP(tl.load(p_x + (o_n * s_n)[:, None] + (o_c * s_c)[None, :], mask=m_x, other=0.0))
    return tl.where(m_x, b_x, tl.zeros_like(b_x))


@triton.jit
def state_block(p_s, o_k, o_v, s_sk, s_sv, K, V):
    o_s = (o_k.to(tl.int64) * s_sk)[:, None] + (o_v.to(tl.int64) * s_sv)[None, :]
    return tl.load(p_s + o_s, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)


@triton.jit(do_not_specialize=RUNTIME)
def state_kernel(
    p_y, p_v, p_d, p_r, p_s0, p_z0, p_s, p_z, p_sn, p_zn, p_cu, p_first,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yc: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_vc: tl.int64,
    H, N, K, V, each, chunk,
    Y_MAP: tl.constexpr, REVERSE: tl.constexpr, DTYPE: tl.constexpr, LAYOUT: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S = Σ φ(y) (v/d)ᵀ and z = Σ φ(y) r of one sequence and head, at every chunk's beginning and at the end.

    r is 1 where p_r is None; chunks' states are stored where p_s is given, z where p_zn is.
    """
    i_sh = tl.program_id(0)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_bos, i_eos = sequence_bounds(p_cu, i_s, N)
    i_first = i_s * each
    if p_cu is not None:
        i_first = tl.load(p_first + i_s)
    s_yb, s_yh, s_yn, s_yc = strides(s_yb, s_yh, s_yn, s_yc, LAYOUT)
    s_vb, s_vh, s_vn, s_vc = strides(s_vb, s_vh, s_vn, s_vc, LAYOUT)
    p_y += i_b * s_yb + i_h * s_yh
    p_v += i_b * s_vb + i_h * s_vh
    i_row = (i_b * H + i_h) * N
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    m_z = (o_k < K) & (tl.program_id(2) == 0)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    # [BK, BV], [BK]
    o_s = (o_k * V)[:, None] + o_v[None, :]
    b_s = tl.zeros([BK, BV], dtype=tl.float32)
    b_z = tl.zeros([BK], dtype=tl.float32)
    if p_s0 is not None:
        b_s += tl.load(p_s0 + i_sh.to(tl.int64) * K * V + o_s, mask=m_s, other=0.0)
    if p_z0 is not None:
        b_z += tl.load(p_z0 + i_sh.to(tl.int64) * K + o_k, mask=o_k < K, other=0.0)
    i_chunks = ((i_eos - i_bos).to(tl.int32) + chunk - 1) // chunk
    for i_t in range(i_chunks):
        i_c = i_chunks - 1 - i_t if REVERSE else i_t
        i_ch = (i_first + i_c).to(tl.int64) * H + i_h
        if p_s is not None:
            tl.store(p_s + i_ch * K * V + o_s, b_s, mask=m_s)
            if p_z is not None:
                tl.store(p_z + i_ch * K + o_k, b_z, mask=m_z)
        i_start = i_bos + i_c * chunk
        i_stop = tl.minimum(i_start + chunk, i_eos)
        for i_n in range(((i_stop - i_start).to(tl.int32) + BT - 1) // BT):
            o_n = i_start + i_n * BT + tl.arange(0, BT)
            m_n = o_n < i_stop
            # [BT, BK], [BT, BV]
            b_y = block(p_y, o_n, o_k, s_yn, s_yc, m_n, K, Y_MAP)
            b_v = block(p_v, o_n, o_v, s_vn, s_vc, m_n, V, identity)
            if p_d is not None:
                b_d = tl.load(p_d + i_row + o_n, mask=m_n, other=1.0)
                b_s = product(tl.trans(b_y), b_v.to(tl.float32) / b_d[:, None], b_s, DTYPE)
            else:
                b_s = product(tl.trans(b_y), b_v, b_s, DTYPE)
            if p_zn is not None:
                b_f = b_y.to(tl.float32)
                if p_r is not None:
                    b_f *= tl.load(p_r + i_row + o_n, mask=m_n, other=0.0)[:, None]
                b_z += tl.sum(b_f, 0)
    if p_sn is not None:
        tl.store(p_sn + i_sh.to(tl.int64) * K * V + o_s, b_s, mask=m_s)
    if p_zn is not None:
        tl.store(p_zn + i_sh.to(tl.int64) * K + o_k, b_z, mask=m_z)


@triton.jit(do_not_specialize=RUNTIME)
def chunk_kernel(
    p_x, p_y, p_v, p_gate, p_d, p_r, p_s, p_z, p_cu, p_first, p_owner, p_o, p_den,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xc: tl.int64,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yc: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_vc: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gc: tl.int64,
    s_sk: tl.int64, s_sv: tl.int64, H, N, K, V, each, chunk, tiles,
    X_MAP: tl.constexpr, Y_MAP: tl.constexpr, V_MAP: tl.constexpr, SLOPE: tl.constexpr,
    WITHIN: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr, SIDE: tl.constexpr,
    PER_CHUNK: tl.constexpr, DTYPE: tl.constexpr, LAYOUT: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A tile of rows of out, columns of one block. SIDE says which side d and r are on.

    The row is divided by the normaliser Σ x·y where p_den is given, and multiplied by SLOPE of p_gate's entry
    where that is. States are one a chunk with PER_CHUNK, else one a sequence; none where p_s is None.
    """
    i_ct, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_c, i_v = i_ct // tiles, tl.program_id(2) * BV
    i_s = i_c // each
    i_n = i_c % each
    if p_cu is not None:
        i_s = tl.load(p_owner + i_c)
        i_n = i_c - tl.load(p_first + i_s)
    i_b, i_bos, i_eos = sequence_bounds(p_cu, i_s, N)
    i_start = i_bos + i_n * chunk
    i_stop = tl.minimum(i_start + chunk, i_eos)
    i_m = i_start + (i_ct % tiles) * BT
    s_xb, s_xh, s_xn, s_xc = strides(s_xb, s_xh, s_xn, s_xc, LAYOUT)
    s_yb, s_yh, s_yn, s_yc = strides(s_yb, s_yh, s_yn, s_yc, LAYOUT)
    s_vb, s_vh, s_vn, s_vc = strides(s_vb, s_vh, s_vn, s_vc, LAYOUT)
    p_x += i_b * s_xb + i_h * s_xh
    p_y += i_b * s_yb + i_h * s_yh
    p_v += i_b * s_vb + i_h * s_vh
    i_row = (i_b * H + i_h) * N

    o_m = i_m + tl.arange(0, BT)
    o_v = i_v + tl.arange(0, BV)
    m_m = o_m < i_stop
    b_d = tl.full([BT], 1.0, tl.float32)
    b_r = tl.full([BT], 1.0, tl.float32)
    if SIDE == SIDE_ROW and p_d is not None:
        b_d = tl.load(p_d + i_row + o_m, mask=m_m, other=1.0)
        b_r = tl.load(p_r + i_row + o_m, mask=m_m, other=0.0)
    # [BT]: the normaliser, and NaN in rows that saw a non-finite value
    b_den = tl.zeros([BT], dtype=tl.float32)
    b_nan = tl.zeros([BT], dtype=tl.float32)
    # [BT, BV]
    b_o = tl.zeros([BT, BV], dtype=tl.float32)
    if p_s is not None:
        i_state = ((i_c if PER_CHUNK else i_s).to(tl.int64)) * H + i_h
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            b_x = block(p_x, o_m, o_k, s_xn, s_xc, m_m, K, X_MAP)
            # [BK, BV]
            b_s = state_block(p_s + i_state * K * V, o_k, o_v, s_sk, s_sv, K, V)
            b_o = product(b_x, b_s, b_o, DTYPE)
            if p_den is not None:
                b_z = tl.load(p_z + i_state * K + o_k, mask=o_k < K, other=0.0)
                b_den += tl.sum(b_x.to(tl.float32) * b_z[None, :], 1)
        if SIDE == SIDE_ROW:
            b_o = b_o / b_d[:, None]
        if p_r is not None:
            b_z = tl.load(p_z + i_state * V + o_v, mask=o_v < V, other=0.0)
            b_o += b_r[:, None] * b_z[None, :]

    if WITHIN:
        lo, hi = i_start, i_stop
        if CAUSAL and REVERSE:
            lo = i_m
        if CAUSAL and not REVERSE:
            hi = tl.minimum(i_m + BT, i_stop)
        for i_t in range(tl.where(i_m < i_stop, ((hi - lo).to(tl.int32) + BN - 1) // BN, 0)):
            o_n = lo + i_t * BN + tl.arange(0, BN)
            m_n = o_n < i_stop
            # [BT, BN]
            b_p = tl.zeros([BT, BN], dtype=tl.float32)
            for i_k in range(0, K, BK):
                o_k = i_k + tl.arange(0, BK)
                b_x = block(p_x, o_m, o_k, s_xn, s_xc, m_m, K, X_MAP)
                b_y = block(p_y, o_n, o_k, s_yn, s_yc, m_n, K, Y_MAP)
                b_p = product(b_x, tl.trans(b_y), b_p, DTYPE)
            if SIDE == SIDE_ROW and p_d is not None:
                b_p = b_p / b_d[:, None] + b_r[:, None]
            if SIDE == SIDE_COLUMN and p_d is not None:
                b_p = b_p / tl.load(p_d + i_row + o_n, mask=m_n, other=1.0)[None, :]
                if p_r is not None:
                    b_p += tl.load(p_r + i_row + o_n, mask=m_n, other=0.0)[None, :]
            m_p = m_m[:, None] & m_n[None, :]
            if CAUSAL:
                m_p = m_p & (o_n[None, :] >= o_m[:, None] if REVERSE else o_n[None, :] <= o_m[:, None])
            b_p = tl.where(m_p, b_p, 0.0)
            b_den += tl.sum(b_p, 1)
            b_v = block(p_v, o_n, o_v, s_vn, s_vc, m_n, V, V_MAP)
            if CAUSAL and SIDE == 0:
                b_v, b_nan = isolated(b_v, m_p, b_nan)
            b_o = product(b_p, b_v, b_o, DTYPE)

    if p_den is not None:
        b_o = b_o / b_den[:, None]
        tl.store(p_den + i_row + o_m, b_den, mask=m_m & (i_v == 0))
    b_o += b_nan[:, None]
    if p_gate is not None:
        s_gb, s_gh, s_gn, s_gc = strides(s_gb, s_gh, s_gn, s_gc, LAYOUT)
        p_gate += i_b * s_gb + i_h * s_gh
        b_o *= SLOPE(block(p_gate, o_m, o_v, s_gn, s_gc, m_m, V, identity))
    m_o = m_m[:, None] & (o_v < V)[None, :]
    o_o = ((i_row + o_m) * V)[:, None] + o_v[None, :]
    tl.store(p_o + o_o, b_o.to(p_o.dtype.element_ty), mask=m_o)


class Tile(NamedTuple):
    """Sides of the tile of a launch: rows, columns of weights, widths of keys and of values."""

    rows: int
    columns: int
    keys: int
    values: int
    warps: int


def tile_for(dtype: torch.dtype, key_width: int, value_width: int) -> Tile:
    """The tile for matmuls in ``dtype``; exact float32 products are unrolled, so theirs are small.

    Measured by tests/quality/spills.py, which tells what holds on which target.
    """
    side = 32 if dtype == torch.float32 else 64
    keys, values = (min(side, padded_width(width)) for width in (key_width, value_width))
    return Tile(side, side, keys, values, warps=4 if dtype == torch.float32 else 8)


def launch_layout(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """LAYOUT and the strides of ``tensors`` as kernels take them."""
    layout = memory_layout(*tensors)
    unit = 16 if layout == ALIGNED else 1
    return layout, [s // unit if axis < 3 else s for x in tensors for axis, s in enumerate(x.stride())]


TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def chunk_states(
    y: Operand,
    v: torch.Tensor,
    initial: States,
    sequences: Sequences,
    chunks: Chunks,
    *,
    dtype: torch.dtype,
    normalize: bool,
    reverse: bool = False,
    stored: bool = True,
    d: torch.Tensor | None = None,
    r: torch.Tensor | None = None,
) -> tuple[States, States]:
    """States where chunks begin, (chunks,H,K,V) and (chunks,H,K), and the final ones, a sequence in place of
    a chunk.

    ``reverse``: chunks and their positions run from the last to the first, so that a chunk begins behind its
    end. ``stored`` is False where only the final ones are wanted; the first are None then.
    """
    heads, length, width = y.tensor.shape[1:]
    value_width = v.shape[3]
    tile = tile_for(dtype, width, value_width)
    # in float16 both operands are tf32's, twice as wide as what the tile is meant for
    rows = min(tile.rows, 32) if dtype == torch.float16 else tile.rows

    def empty(count: int, *shape: int) -> torch.Tensor:
        return torch.empty((count, heads, *shape), dtype=torch.float32, device=v.device)

    borders = States(
        empty(chunks.count, width, value_width) if stored else None,
        empty(chunks.count, width) if stored and normalize else None,
    )
    final = States(
        empty(sequences.count, width, value_width), empty(sequences.count, width) if normalize else None
    )
    layout, steps = launch_layout(y.tensor, v)
    if sequences.count * heads:
        grid = (
            sequences.count * heads,
            triton.cdiv(width, tile.keys),
            triton.cdiv(value_width, tile.values),
        )
        state_kernel[grid](
            y.tensor, v, d, r, *initial, *borders, *final, sequences.cu_seqlens, chunks.first, *steps,
            heads, length, width, value_width, chunks.each, chunks.size,
            Y_MAP=y.map, REVERSE=reverse, DTYPE=TRITON_DTYPES[dtype], LAYOUT=layout,
            BT=rows, BK=tile.keys, BV=tile.values,
            num_warps=tile.warps, num_stages=1, enable_fp_fusion=False, **register_limit(tile.warps),
        )  # fmt: skip
    return borders, final


def chunk_outputs(
    x: Operand,
    y: Operand,
    v: Operand,
    states: States,
    sequences: Sequences,
    chunks: Chunks,
    out: torch.Tensor,
    output: Output,
    *,
    dtype: torch.dtype,
    causal: bool,
    within: bool = True,
    per_chunk: bool = True,
) -> torch.Tensor:
    """``out`` (B,H,N,V), contiguous, filled with the row of the table that ``output`` describes.

    ``within``: a row takes from its own chunk. ``per_chunk``: ``states`` has one entry a chunk, not a
    sequence.
    """
    heads, length, width = x.tensor.shape[1:]
    value_width = v.tensor.shape[3]
    tile = tile_for(dtype, width, value_width)
    gate = output.gate
    tensors = (x.tensor, y.tensor, v.tensor, *(() if gate is None else (gate.tensor,)))
    layout, steps = launch_layout(*tensors)
    tiles = triton.cdiv(min(chunks.size, sequences.longest), tile.rows)
    if out.numel() == 0 or chunks.count == 0:
        return out
    grid = (chunks.count * tiles, heads, triton.cdiv(value_width, tile.values))
    chunk_kernel[grid](
        *tensors[:3], None if gate is None else gate.tensor, output.d, output.r, *states,
        sequences.cu_seqlens, chunks.first, chunks.owner, out, output.normaliser,
        *steps, *((0,) * 4 if gate is None else ()),
        *((1, width) if output.transposed else (value_width, 1)),
        heads, length, width, value_width, chunks.each, chunks.size, tiles,
        X_MAP=x.map, Y_MAP=y.map, V_MAP=v.map, SLOPE=identity if gate is None else gate.map,
        WITHIN=within, CAUSAL=causal, REVERSE=output.reverse, SIDE=output.side, PER_CHUNK=per_chunk,
        DTYPE=TRITON_DTYPES[dtype], LAYOUT=layout,
        BT=tile.rows, BN=tile.columns, BK=tile.keys, BV=tile.values,
        num_warps=tile.warps, num_stages=1, enable_fp_fusion=False, **register_limit(tile.warps),
    )  # fmt: skip
    return out
