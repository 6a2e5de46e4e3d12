"""The selective scan in blocks of positions: an associative scan inside a block, the state between blocks.

Pairs (decay, addition) compose by (a, x)∘(a', x') = (a'a, a'x + x') (theory MAM-3), whichever way they are
bracketed: ``tl.associative_scan`` over the positions of a block gives the decay from its beginning and the
state that starts there from 0; the state before the block enters through the decay. No decay is divided by
and no exp(−Σ δA) formed, so a decay may underflow or be 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnproof.kernels.activations import silu
from attnproof.kernels.selective_scan_recurrence import (
    ScanInputs,
    channel_values,
    step_sizes,
    transitions,
)
from attnproof.kernels.states import Chunks, register_limit, sequence_bounds

__all__ = ["Tile", "composed", "run_scan", "scan_tile", "sequence_tile", "width_tile"]

# Numbers of state a program holds at a time, positions of a block, warps.
AREA = 4096
POSITIONS = 64
WARPS = 8

RUNTIME = [
    "p_u", "p_delta", "p_a", "p_b", "p_c", "p_d", "p_z", "p_bias", "p_start", "p_cu", "p_first", "p_y",
    "p_end", "p_saved", "s_ub", "s_uh", "s_un", "s_eb", "s_eh", "s_en", "s_zb", "s_zh", "s_zn", "s_bb",
    "s_bd", "s_bn", "s_cb", "s_cd", "s_cn", "each", "H", "N", "D",
]  # fmt: skip


class Tile(NamedTuple):
    """The shape of a launch: channels, positions and numbers of state a block, powers of two all of them."""

    channels: int
    positions: int
    width: int


def scan_tile(heads: int, width: int, positions: int, area: int) -> Tile:
    """At most ``area`` numbers: the whole state first, then up to ``positions``, then channels."""
    block_d = triton.next_power_of_2(width)
    block_t = min(positions, area // block_d)
    return Tile(min(triton.next_power_of_2(heads), area // (block_d * block_t)), block_t, block_d)


@triton.jit
def composed(b_a, b_x, b_a2, b_x2):
    """Two steps h ↦ a h + x, the left one first, as one step."""
    return b_a2 * b_a, b_a2 * b_x + b_x2


@triton.jit
def sequence_tile(p_x, s_c, s_n, o_c, m_c, o_n, m_n):
    """[BC, BT] of a tensor (H,N) with these strides, float32, 0 outside the masks."""
    o_x = (o_c * s_c)[:, None] + (o_n * s_n)[None, :]
    return tl.load(p_x + o_x, mask=m_c[:, None] & m_n[None, :], other=0.0).to(tl.float32)


@triton.jit
def width_tile(p_x, s_d, s_n, o_d, m_d, o_n, m_n):
    """[BT, BD] of a tensor (D,N) with these strides, float32, 0 outside the masks."""
    o_x = (o_n * s_n)[:, None] + (o_d * s_d)[None, :]
    return tl.load(p_x + o_x, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=RUNTIME)
def scan_kernel(
    p_u, p_delta, p_a, p_b, p_c, p_d, p_z, p_bias, p_start, p_cu, p_first, p_y, p_end, p_saved,
    s_ub: tl.int64, s_uh: tl.int64, s_un: tl.int64, s_eb: tl.int64, s_eh: tl.int64, s_en: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_bb: tl.int64, s_bd: tl.int64, s_bn: tl.int64,
    s_cb: tl.int64, s_cd: tl.int64, s_cn: tl.int64, each, H, N, D,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BC channels of one sequence: y and the final state, or the states before all blocks, p_saved."""
    i_s = tl.program_id(0)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    o_c, o_d = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64), tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    m_c, m_d = o_c < H, o_d < D
    p_u += i_b * s_ub
    p_delta += i_b * s_eb
    p_b += i_b * s_bb
    p_c += i_b * s_cb
    if p_z is not None:
        p_z += i_b * s_zb
    # [BC]
    b_skip, b_bias = channel_values(p_d, o_c, m_c), channel_values(p_bias, o_c, m_c)
    # [BC, BD]
    m_h = m_c[:, None] & m_d[None, :]
    o_h = (o_c * D)[:, None] + o_d[None, :]
    i_state = i_s.to(tl.int64) * H * D
    b_a = tl.load(p_a + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_last = tl.zeros([BC, BD], dtype=tl.float32)
    if p_start is not None:
        b_last = tl.load(p_start + i_state + o_h, mask=m_h, other=0.0)
    if p_saved is not None:
        if p_first is None:
            i_block = (i_s * each).to(tl.int64)
        else:
            i_block = tl.load(p_first + i_s).to(tl.int64)
        p_saved += i_block * H * D

    for i_t in range(((i_stop - i_start + BT - 1) // BT).to(tl.int32)):
        if p_saved is not None:
            tl.store(p_saved + o_h, b_last, mask=m_h)
            p_saved += H.to(tl.int64) * D
        o_n = i_start + i_t * BT + o_t
        m_n = o_n < i_stop
        # [BC, BT], [BT, BD]
        b_u = sequence_tile(p_u, s_uh, s_un, o_c, m_c, o_n, m_n)
        b_delta = sequence_tile(p_delta, s_eh, s_en, o_c, m_c, o_n, m_n)
        b_b = width_tile(p_b, s_bd, s_bn, o_d, m_d, o_n, m_n)
        b_step = step_sizes(b_delta, b_bias[:, None], m_n[None, :], SOFTPLUS)
        # [BC, BT, BD]
        b_decay, b_weight = transitions(b_step[:, :, None], b_a[:, None, :], ZOH)
        b_x = b_weight * b_u[:, :, None] * b_b[None, :, :]
        b_decay, b_h = tl.associative_scan((b_decay, b_x), 1, composed)
        b_h += b_decay * b_last[:, None, :]
        if p_y is not None:
            b_c = width_tile(p_c, s_cd, s_cn, o_d, m_d, o_n, m_n)
            b_y = tl.sum(b_h * b_c[None, :, :], 2)
            if p_d is not None:
                b_y += b_skip[:, None] * b_u
            if p_z is not None:
                b_y *= silu(sequence_tile(p_z, s_zh, s_zn, o_c, m_c, o_n, m_n))
            o_y = ((i_b * H + o_c) * N)[:, None] + o_n[None, :]
            tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_c[:, None] & m_n[None, :])
        # positions beyond the end have decayed by 1 and added 0
        b_last = tl.sum(tl.where((o_t == BT - 1)[None, :, None], b_h, 0.0), 1)
    if p_end is not None:
        tl.store(p_end + i_state + o_h, b_last, mask=m_h)


def run_scan(
    x: ScanInputs,
    *,
    y: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    saved: tuple[Chunks, torch.Tensor] | None = None,
) -> None:
    """Fill those of ``y`` (B,H,N), the final state ``end`` (S,H,D) and the states before each chunk,
    ``saved`` (chunks,H,D), that are given; blocks are of the chunks' size where there are chunks.
    """
    heads, width = x.A.shape
    chunks, states = saved if saved is not None else (None, None)
    if x.sequences.count:
        tile = scan_tile(heads, width, POSITIONS if chunks is None else chunks.size, AREA)
        launch: Any = scan_kernel[(x.sequences.count, triton.cdiv(heads, tile.channels))]
        launch(
            *x.pointers, None if chunks is None else chunks.first, y, end, states, *x.strides,
            0 if chunks is None else chunks.each, heads, x.u.shape[2], width,
            SOFTPLUS=x.softplus, ZOH=x.zoh, BC=tile.channels, BT=tile.positions, BD=tile.width,
            num_warps=WARPS, num_stages=1, enable_fp_fusion=False, **register_limit(WARPS),
        )  # fmt: skip
