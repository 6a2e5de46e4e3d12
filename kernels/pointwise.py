"""Attention whose weights depend on each score alone: o_i = Σ_j w(s_ij) v_j / divisor, forward and backward.

    s_ij = scale · q_i·k_j + offset,   dV = Pᵀ dO,   dS = w'(S) ∘ (dO Vᵀ),   dQ = scale · dS K,
    dK = scale · dSᵀ Q,   each over the divisor, P = w(S)

(Ramapuram et al., arXiv 2409.04431; theory SIG-9.) No row needs a maximum, a normaliser or a delta: blocks of
keys simply add. What w is, a :class:`ScoreFunction` says; sigmoid and ReLU attention share everything else.

* Three kernels: output and dQ, one program a tile of queries; dK and dV, one program a tile of keys, which
  walks over the queries of all heads of its group. Sums have one owner and one order: no atomics, and two
  runs agree bit for bit.
* A key beyond the end is a key of zeros, whose weight w(offset) is not 0: weights are masked, not only loads.
* 0·NaN: a non-finite value that a mask hides from a row is taken out of the operands of that row's matmuls,
  as in softmax (bugs B21), in the gradients as well.
* dS, and weights without an upper bound, do not fit float16: its numbers end at 65504. They enter their
  matmuls in tf32, which rounds to the same 11 bits and ends where float32 ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_block
from attnproof.kernels.softmax import isolated, loaded
from attnproof.kernels.tiles import ALIGNED, Tiles, memory_layout, padded_width, tiles_for

__all__ = ["MAX_HEAD_DIM", "ScoreFunction", "Weighting", "pointwise_attention"]

# Sizes and strides are run-time values: what depends on them is told to the compiler by LAYOUT alone.
RUNTIME = [
    "p_o", "p_dq", "p_dk", "p_dv", "s_qb", "s_qh", "s_qm", "s_qd", "s_kb", "s_kh", "s_kn", "s_kd", "s_vb",
    "s_vh", "s_vn", "s_ve", "s_ob", "s_oh", "s_om", "s_oe", "H", "GROUP", "M", "N", "D", "E", "right",
]  # fmt: skip


@triton.jit
def strides(s_b, s_h, s_row, s_column, LAYOUT: tl.constexpr):
    """The strides of a tensor as LAYOUT lets the compiler know them."""
    if LAYOUT > 1:  # they come divided by 16: the multiplication says that rows are aligned
        s_b, s_h, s_row = s_b * 16, s_h * 16, s_row * 16
    if LAYOUT > 0:
        s_column = 1
    return s_b, s_h, s_row, s_column


@triton.jit
def weighted(b_p, b_x, b_o, WIDE: tl.constexpr):
    """b_o + b_p·b_x, b_p float32 rounded to b_x's dtype; to tf32 if that is float16 and WIDE is set."""
    if WIDE and b_x.dtype == tl.float16:
        # To nearest, here, because tensor cores cut the low bits off. Inf and NaN must not take the carry.
        b_bits = b_p.to(tl.int32, bitcast=True)
        b_round = ((b_bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
        b_p = tl.where((b_bits & 0x7F800000) == 0x7F800000, b_p, b_round)
        return tl.dot(b_p, b_x.to(tl.float32), b_o, input_precision="tf32")
    return tl.dot(b_p.to(b_x.dtype), b_x, b_o, input_precision="ieee")


@triton.jit
def key_tiles(i_m, M, N, right, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Query tile i_m sees key tiles [0, t1); all its rows see tiles [0, f1) whole."""
    hi, full = N, N
    if CAUSAL:
        hi = tl.minimum(tl.maximum(tl.minimum(i_m * BM + BM, M) + right, 0), N)
        full = tl.minimum(tl.maximum(i_m * BM + right + 1, 0), N)
    return full // BN, (hi + BN - 1) // BN


@triton.jit(do_not_specialize=RUNTIME)
def output_kernel(
    p_q, p_k, p_v, p_o,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    H, GROUP, M, N, D, E, right, score_scale, score_offset, divisor,
    WEIGHT: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr,
    PAD_D: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    i_bh, i_m = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = i_h // GROUP
    s_qb, s_qh, s_qm, s_qd = strides(s_qb, s_qh, s_qm, s_qd, LAYOUT)
    s_kb, s_kh, s_kn, s_kd = strides(s_kb, s_kh, s_kn, s_kd, LAYOUT)
    s_vb, s_vh, s_vn, s_ve = strides(s_vb, s_vh, s_vn, s_ve, LAYOUT)
    p_k += i_b * s_kb + i_g * s_kh
    p_v += i_b * s_vb + i_g * s_vh

    o_m, o_n = i_m * BM + tl.arange(0, BM), tl.arange(0, BN)
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)
    m_q = o_m < M
    # [BM, BD]
    m_qd = m_q[:, None] & (o_d < D)[None, :] if PAD_D else m_q[:, None]
    o_q = i_b * s_qb + i_h * s_qh + (o_m.to(tl.int64) * s_qm)[:, None] + (o_d * s_qd)[None, :]
    b_q = tl.load(p_q + o_q, mask=m_qd, other=0.0)
    # [BD, BN], [BN, BE]
    o_k = (o_n.to(tl.int64) * s_kn)[None, :] + (o_d * s_kd)[:, None]
    o_v = (o_n.to(tl.int64) * s_vn)[:, None] + (o_e * s_ve)[None, :]

    # [BM]: NaN in rows that saw a non-finite value
    b_nan = tl.zeros([BM], dtype=tl.float32)
    # [BM, BE]
    b_o = tl.zeros([BM, BE], dtype=tl.float32)
    f1, t1 = key_tiles(i_m, M, N, right, CAUSAL, BM, BN)
    # EDGE 0: tiles seen whole; EDGE 1: tiles under a mask
    for EDGE in tl.static_range(2):
        for i_t in range(f1 if EDGE else 0, t1 if EDGE else f1):
            i_n = i_t * BN
            m_n = i_n + o_n < N
            m_kd = (o_d < D)[:, None] & m_n[None, :] if PAD_D else m_n[None, :]
            m_ve = (o_e < E)[None, :] & m_n[:, None] if PAD_E else m_n[:, None]
            b_k = loaded(p_k + i_n * s_kn + o_k, m_kd, EDGE or PAD_D)
            b_v = loaded(p_v + i_n * s_vn + o_v, m_ve, EDGE or PAD_E)
            # [BM, BN]
            b_p = WEIGHT(tl.dot(b_q, b_k, input_precision="ieee") * score_scale + score_offset)
            if EDGE:
                m_s = m_n[None, :]
                if CAUSAL:
                    m_s = m_s & (i_n + o_n[None, :] <= o_m[:, None] + right)
                b_p = tl.where(m_s, b_p, 0.0)
                b_v, b_nan = isolated(b_v, m_s, b_nan)
            b_o = weighted(b_p, b_v, b_o, WIDE)

    b_o = b_o / divisor + b_nan[:, None]
    m_oe = m_q[:, None] & (o_e < E)[None, :] if PAD_E else m_q[:, None]
    o_row = i_bh.to(tl.int64) * M + o_m
    tl.store(p_o + (o_row * E)[:, None] + o_e[None, :], b_o.to(p_o.dtype.element_ty), mask=m_oe)


@triton.jit(do_not_specialize=RUNTIME)
def query_gradient_kernel(
    p_q, p_k, p_v, p_do, p_dq,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    H, GROUP, M, N, D, E, right, score_scale, score_offset, factor,
    WEIGHT_AND_SLOPE: tl.constexpr, CAUSAL: tl.constexpr,
    PAD_D: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    i_bh, i_m = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = i_h // GROUP
    s_qb, s_qh, s_qm, s_qd = strides(s_qb, s_qh, s_qm, s_qd, LAYOUT)
    s_kb, s_kh, s_kn, s_kd = strides(s_kb, s_kh, s_kn, s_kd, LAYOUT)
    s_vb, s_vh, s_vn, s_ve = strides(s_vb, s_vh, s_vn, s_ve, LAYOUT)
    s_ob, s_oh, s_om, s_oe = strides(s_ob, s_oh, s_om, s_oe, LAYOUT)
    p_k += i_b * s_kb + i_g * s_kh
    p_v += i_b * s_vb + i_g * s_vh

    o_m, o_n = i_m * BM + tl.arange(0, BM), tl.arange(0, BN)
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)
    m_q = o_m < M
    # [BM, BD], [BM, BE]
    m_qd = m_q[:, None] & (o_d < D)[None, :] if PAD_D else m_q[:, None]
    m_oe = m_q[:, None] & (o_e < E)[None, :] if PAD_E else m_q[:, None]
    o_q = i_b * s_qb + i_h * s_qh + (o_m.to(tl.int64) * s_qm)[:, None] + (o_d * s_qd)[None, :]
    o_o = i_b * s_ob + i_h * s_oh + (o_m.to(tl.int64) * s_om)[:, None] + (o_e * s_oe)[None, :]
    b_q = tl.load(p_q + o_q, mask=m_qd, other=0.0)
    b_do = tl.load(p_do + o_o, mask=m_oe, other=0.0)
    # [BN, BD], [BN, BE]
    o_k = (o_n.to(tl.int64) * s_kn)[:, None] + (o_d * s_kd)[None, :]
    o_v = (o_n.to(tl.int64) * s_vn)[:, None] + (o_e * s_ve)[None, :]

    b_nan = tl.zeros([BM], dtype=tl.float32)
    b_dq = tl.zeros([BM, BD], dtype=tl.float32)
    f1, t1 = key_tiles(i_m, M, N, right, CAUSAL, BM, BN)
    for EDGE in tl.static_range(2):
        for i_t in range(f1 if EDGE else 0, t1 if EDGE else f1):
            i_n = i_t * BN
            m_n = i_n + o_n < N
            m_kd = (o_d < D)[None, :] & m_n[:, None] if PAD_D else m_n[:, None]
            m_ve = (o_e < E)[None, :] & m_n[:, None] if PAD_E else m_n[:, None]
            b_k = loaded(p_k + i_n * s_kn + o_k, m_kd, EDGE or PAD_D)
            b_v = loaded(p_v + i_n * s_vn + o_v, m_ve, EDGE or PAD_E)
            # [BM, BN]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * score_scale + score_offset
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
            b_ds = WEIGHT_AND_SLOPE(b_s)[1] * b_dp
            if EDGE:
                m_s = m_n[None, :]
                if CAUSAL:
                    m_s = m_s & (i_n + o_n[None, :] <= o_m[:, None] + right)
                b_ds = tl.where(m_s, b_ds, 0.0)
                b_k, b_nan = isolated(b_k, m_s, b_nan)
            b_dq = weighted(b_ds, b_k, b_dq, True)

    b_dq = b_dq * factor + b_nan[:, None]
    o_row = i_bh.to(tl.int64) * M + o_m
    tl.store(p_dq + (o_row * D)[:, None] + o_d[None, :], b_dq.to(p_dq.dtype.element_ty), mask=m_qd)


@triton.jit(do_not_specialize=RUNTIME)
def key_gradient_kernel(
    p_q, p_k, p_v, p_do, p_dk, p_dv,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    H, GROUP, M, N, D, E, right, score_scale, score_offset, factor, divisor,
    WEIGHT_AND_SLOPE: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr,
    PAD_D: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    G = H // GROUP
    i_bg, i_n = tl.program_id(0), tl.program_id(1) * BN
    i_b, i_g = (i_bg // G).to(tl.int64), (i_bg % G).to(tl.int64)
    s_qb, s_qh, s_qm, s_qd = strides(s_qb, s_qh, s_qm, s_qd, LAYOUT)
    s_kb, s_kh, s_kn, s_kd = strides(s_kb, s_kh, s_kn, s_kd, LAYOUT)
    s_vb, s_vh, s_vn, s_ve = strides(s_vb, s_vh, s_vn, s_ve, LAYOUT)
    s_ob, s_oh, s_om, s_oe = strides(s_ob, s_oh, s_om, s_oe, LAYOUT)

    o_m, o_n = tl.arange(0, BM), i_n + tl.arange(0, BN)
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)
    m_n = o_n < N
    # [BN, BD], [BN, BE]
    m_kd = m_n[:, None] & (o_d < D)[None, :] if PAD_D else m_n[:, None]
    m_ve = m_n[:, None] & (o_e < E)[None, :] if PAD_E else m_n[:, None]
    o_k = i_b * s_kb + i_g * s_kh + (o_n.to(tl.int64) * s_kn)[:, None] + (o_d * s_kd)[None, :]
    o_v = i_b * s_vb + i_g * s_vh + (o_n.to(tl.int64) * s_vn)[:, None] + (o_e * s_ve)[None, :]
    b_k = tl.load(p_k + o_k, mask=m_kd, other=0.0)
    b_v = tl.load(p_v + o_v, mask=m_ve, other=0.0)
    # [BM, BD], [BM, BE]
    o_q = (o_m.to(tl.int64) * s_qm)[:, None] + (o_d * s_qd)[None, :]
    o_o = (o_m.to(tl.int64) * s_om)[:, None] + (o_e * s_oe)[None, :]

    # query tiles [t0, t1) see a key of this tile; all rows of tiles [f0, f1) see all of its keys
    t0, t1 = 0, (M + BM - 1) // BM
    f0, f1 = 0, M // BM
    if CAUSAL:
        t0 = tl.minimum(tl.maximum(i_n - right, 0) // BM, t1)
        f0 = tl.minimum((tl.maximum(tl.minimum(i_n + BN, N) - 1 - right, 0) + BM - 1) // BM, t1)
        f1 = tl.maximum(f1, f0)
    # [BN]: NaN for keys that saw a non-finite value
    b_k_nan = tl.zeros([BN], dtype=tl.float32)
    b_v_nan = tl.zeros([BN], dtype=tl.float32)
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BE], dtype=tl.float32)
    for i_r in range(GROUP):  # the query heads of this group, always in the same order
        p_qh = p_q + i_b * s_qb + (i_g * GROUP + i_r) * s_qh
        p_oh = p_do + i_b * s_ob + (i_g * GROUP + i_r) * s_oh
        for EDGE in tl.static_range(2):
            for i_t in range((t1 - t0) - (f1 - f0) if EDGE else f1 - f0):
                # the edges lie on both sides of the tiles that see every key
                i_m = (t0 + i_t + tl.where(i_t >= f0 - t0, f1 - f0, 0) if EDGE else f0 + i_t) * BM
                m_m = i_m + o_m < M
                m_qd = (o_d < D)[None, :] & m_m[:, None] if PAD_D else m_m[:, None]
                m_oe = (o_e < E)[None, :] & m_m[:, None] if PAD_E else m_m[:, None]
                b_q = loaded(p_qh + i_m * s_qm + o_q, m_qd, EDGE or PAD_D)
                b_do = loaded(p_oh + i_m * s_om + o_o, m_oe, EDGE or PAD_E)
                # [BN, BM]
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * score_scale + score_offset
                b_p, b_slope = WEIGHT_AND_SLOPE(b_s)
                b_ds = b_slope * tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
                if EDGE:
                    m_s = m_m[None, :]
                    if CAUSAL:
                        m_s = m_s & (o_n[:, None] <= i_m + o_m[None, :] + right)
                    b_p, b_ds = tl.where(m_s, b_p, 0.0), tl.where(m_s, b_ds, 0.0)
                    b_q, b_k_nan = isolated(b_q, m_s, b_k_nan)
                    b_do, b_v_nan = isolated(b_do, m_s, b_v_nan)
                b_dv = weighted(b_p, b_do, b_dv, WIDE)
                b_dk = weighted(b_ds, b_q, b_dk, True)

    b_dk = b_dk * factor + b_k_nan[:, None]
    b_dv = b_dv / divisor + b_v_nan[:, None]
    o_row = i_bg.to(tl.int64) * N + o_n
    tl.store(p_dk + (o_row * D)[:, None] + o_d[None, :], b_dk.to(p_dk.dtype.element_ty), mask=m_kd)
    tl.store(p_dv + (o_row * E)[:, None] + o_e[None, :], b_dv.to(p_dv.dtype.element_ty), mask=m_ve)


@dataclass(frozen=True, slots=True)
class ScoreFunction:
    """What turns a score into a weight, as Triton functions of a float32 block.

    Attributes:
        weight: x ↦ w(x).
        weight_and_slope: x ↦ (w(x), dw/ds), s the score in its own unit.
        unit: x = unit·s: log2 e for a function that takes its argument in bits.
        bounded: |w| ≤ 1, so that weights may be stored in float16.
    """

    weight: Any
    weight_and_slope: Any
    unit: float
    bounded: bool


@dataclass(frozen=True, slots=True)
class Weighting:
    """Scores and weights of one call: w(scale·q·k + offset) / divisor; ``causal`` is aligned bottom right."""

    function: ScoreFunction
    scale: float
    offset: float
    divisor: float
    causal: bool
    block_m: int | None
    block_n: int | None


def launched(
    kernel: Any,
    tensors: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, ...],
    weighting: Weighting,
    *scalars: float,
    rows: int,
    owner: str,
    **constants: Any,
) -> None:
    """Run ``kernel`` with one program for each of ``outputs``' heads and each tile of its ``rows``.

    ``owner`` is the side of the tile that these rows are cut by, "BM" or "BN".
    """
    q, k, v = tensors[:3]
    layout = memory_layout(*tensors)
    unit = 16 if layout == ALIGNED else 1
    steps = [s // unit if axis < 3 else s for x in tensors for axis, s in enumerate(x.stride())]
    width, value_width = q.shape[3], v.shape[3]
    tiles = tiles_of(weighting, tensors, owner)
    sides = {"BM": tiles.block_m, "BN": tiles.block_n}
    kernel[(outputs[0].shape[0] * outputs[0].shape[1], triton.cdiv(rows, sides[owner]))](
        *tensors, *outputs, *steps,
        q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], width, value_width,
        k.shape[2] - q.shape[2],
        weighting.scale * weighting.function.unit, weighting.offset * weighting.function.unit, *scalars,
        CAUSAL=weighting.causal,
        PAD_D=width != padded_width(width), PAD_E=value_width != padded_width(value_width), LAYOUT=layout,
        **sides, BD=padded_width(width), BE=padded_width(value_width),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False, **constants,
    )  # fmt: skip


def tiles_of(weighting: Weighting, tensors: tuple[torch.Tensor, ...], owner: str) -> Tiles:
    """The tile that ``weighting`` asks for, or that suits ``tensors``: q, k, v, and dO for a gradient.

    Without a maximum to wait for, the scores of several tiles are alive at once, and a gradient keeps up to
    two operands and two sums where the output keeps one of each: both take smaller tiles than softmax, the
    kernel of dK and dV (``owner`` "BN") the smallest.
    Measured with ``tests/kernels/test_compiled.py``: nothing is spilled to memory up to a width of 128 on the
    four targets.
    """
    q, _, v = tensors[:3]
    scattered = memory_layout(*tensors) != ALIGNED
    tiles = tiles_for(q.dtype, q.shape[3], v.shape[3], "ieee", scattered=scattered)
    block_m, block_n, warps, stages = tiles
    block_n = min(block_n, 32)
    if len(tensors) > 3:
        exact = q.dtype == torch.float32
        owned = 16 if exact or (scattered and owner == "BN") else 32
        walked = 16 if owner == "BN" else owned
        block_m, block_n = (owned, walked) if owner == "BM" else (walked, owned)
        warps, stages = 4 if exact and scattered else 8 if exact else warps, 1
    return Tiles(weighting.block_m or block_m, weighting.block_n or block_n, warps, stages)


class PointwiseAttention(torch.autograd.Function):
    """q, k, v and a :class:`Weighting` to o, with gradients recomputed from q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weighting: Weighting
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.weighting = weighting
        o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
        if o.numel():
            function = weighting.function
            launched(
                output_kernel, (q, k, v), (o,), weighting, weighting.divisor,
                rows=q.shape[2], owner="BM",
                WEIGHT=function.weight, WIDE=not function.bounded,
            )  # fmt: skip
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        weighting: Weighting = ctx.weighting
        need_q, need_k, need_v, _ = ctx.needs_input_grad
        tensors = (q, k, v, do)
        function = weighting.function
        factor = weighting.scale / weighting.divisor
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if need_q and q.numel():
            launched(
                query_gradient_kernel, tensors, (dq,), weighting, factor,
                rows=q.shape[2], owner="BM", WEIGHT_AND_SLOPE=function.weight_and_slope,
            )  # fmt: skip
        if (need_k or need_v) and k.numel():
            launched(
                key_gradient_kernel, tensors, (dk, dv), weighting, factor, weighting.divisor,
                rows=k.shape[2], owner="BN",
                WEIGHT_AND_SLOPE=function.weight_and_slope, WIDE=not function.bounded,
            )  # fmt: skip
        return dq if need_q else None, dk if need_k else None, dv if need_v else None, None


def pointwise_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weighting: Weighting, kernel: str
) -> torch.Tensor:
    """o (B,H,M,E) of q (B,H,M,D), k (B,G,N,D), v (B,G,N,E), differentiable in all three.

    Raises:
        ContractError: for sides of a tile that no matrix instruction takes, in the name of ``kernel``, which
            has checked everything else.
    """
    for name, side in (("block_m", weighting.block_m), ("block_n", weighting.block_n)):
        if side is not None:
            check_block(name, side, kernel)
    o: torch.Tensor = PointwiseAttention.apply(q, k, v, weighting)  # type: ignore[no-untyped-call]
    return o
