"""The gradients of the selective scan, block by block from the end of each sequence.

With p_t the cotangent of C_t·h_t + D u_t (dy_t silu(z_t), or dy_t) and g_t that of h_t,

    g_t = C_t p_t + exp(δ_{t+1} A) ∘ g_{t+1},     dC_t = Σ_h p_t h_t,     dB_t = Σ_h w_t u_t g_t,
    du_t = (w_t B_t)·g_t + D p_t,    dδ_t = g_t·(A exp(δ_t A) h_{t−1} + ∂w/∂δ B_t u_t),
    dA = Σ_t g_t (δ_t exp(δ_t A) h_{t−1} + ∂w/∂A B_t u_t),     ∂w/∂δ = exp(δA), ∂w/∂A = δ² (d/dx)((eˣ − 1)/x)

with x = δA for the zero-order hold, and 1 and 0 for Euler's rule (Gu and Dao, arXiv 2312.00752, appendix D;
derived here from the recurrence). A first kernel leaves the state before every block. From there a block
computes its states h_{t−1} again, by a scan over steps that begin one position earlier, and g by one that
runs backwards over decays that begin one position later: exp(δA) h_{t−1} is never taken as h_t − w B u, where
digits would cancel, and nothing is divided by a decay.

Sums have one owner and one order (no atomics; two runs agree bit for bit): sums over positions stay in a
program; those over blocks of channels (dB, dC) and over sequences (dA, dD, ddelta_bias) are taken by torch
from one part a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from attnproof.kernels.activations import (
    SERIES_END,
    expm1_ratio_slope_series,
    sigmoid,
    silu,
    silu_slope,
)
from attnproof.kernels.selective_scan_associative import (
    composed,
    run_scan,
    scan_tile,
    sequence_tile,
    width_tile,
)
from attnproof.kernels.selective_scan_recurrence import (
    ScanInputs,
    channel_values,
    step_sizes,
    transitions,
)
from attnproof.kernels.states import register_limit, sequence_bounds

__all__ = ["gradients"]

# As of selective_scan_associative, but a backward pass holds some ten such tiles at a time: of 2048 numbers
# sm_90 and sm_100 spill 8 to 40 bytes; measured by compiling, as tests/quality/spills.py.
AREA = 1024
POSITIONS = 32
WARPS = 8

# An exponent whose exponential is 0 and whose difference from 1 is finite.
LEAST: tl.constexpr = tl.constexpr(-1e30)

RUNTIME = [
    "p_u", "p_delta", "p_a", "p_b", "p_c", "p_d", "p_z", "p_bias", "p_start", "p_cu", "p_first", "p_saved",
    "p_dy", "p_dend", "p_du", "p_ddelta", "p_da", "p_db", "p_dc", "p_dd", "p_dz", "p_dbias", "p_dstart",
    "s_ub", "s_uh", "s_un", "s_eb", "s_eh", "s_en", "s_zb", "s_zh", "s_zn", "s_bb", "s_bd", "s_bn", "s_cb",
    "s_cd", "s_cn", "s_yb", "s_yh", "s_yn", "each", "batch", "H", "N", "D",
]  # fmt: skip


@triton.jit
def weight_slopes(b_step, b_a, b_decay, ZOH: tl.constexpr):
    """(∂w/∂δ, ∂w/∂A) of the weight w of :func:`transitions`."""
    if ZOH:
        b_x = b_step * b_a
        b_near = b_step * (b_step * expm1_ratio_slope_series(b_x, b_decay))
        # where δA overflows, its product with a decay of 0 is 0
        b_far = (1.0 - (1.0 - tl.maximum(b_x, LEAST)) * b_decay) / b_a / b_a
        return b_decay, tl.where(tl.abs(b_x) < SERIES_END, b_near, b_far)
    return tl.full(b_decay.shape, 1.0, tl.float32), tl.full(b_decay.shape, 0.0, tl.float32)


@triton.jit(do_not_specialize=RUNTIME)
def backward_kernel(
    p_u, p_delta, p_a, p_b, p_c, p_d, p_z, p_bias, p_start, p_cu, p_first, p_saved, p_dy, p_dend,
    p_du, p_ddelta, p_da, p_db, p_dc, p_dd, p_dz, p_dbias, p_dstart,
    s_ub: tl.int64, s_uh: tl.int64, s_un: tl.int64, s_eb: tl.int64, s_eh: tl.int64, s_en: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_bb: tl.int64, s_bd: tl.int64, s_bn: tl.int64,
    s_cb: tl.int64, s_cd: tl.int64, s_cn: tl.int64, s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64,
    each, batch, H, N, D,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All gradients whose pointers are given, of BC channels of one sequence."""
    i_s, i_c = tl.program_id(0), tl.program_id(1)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    o_c, o_d = (i_c * BC + tl.arange(0, BC)).to(tl.int64), tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    m_c, m_d = o_c < H, o_d < D
    p_u += i_b * s_ub
    p_delta += i_b * s_eb
    p_b += i_b * s_bb
    p_c += i_b * s_cb
    p_dy += i_b * s_yb
    if p_z is not None:
        p_z += i_b * s_zb
    # [BC]
    b_skip, b_bias = channel_values(p_d, o_c, m_c), channel_values(p_bias, o_c, m_c)
    b_dskip, b_dbias = tl.zeros([BC], dtype=tl.float32), tl.zeros([BC], dtype=tl.float32)
    # [BC, BD]
    m_h = m_c[:, None] & m_d[None, :]
    o_h = (o_c * D)[:, None] + o_d[None, :]
    i_state = i_s.to(tl.int64) * H * D
    b_a = tl.load(p_a + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_da = tl.zeros([BC, BD], dtype=tl.float32)
    # the cotangent of the state before the block that comes next in time
    b_dlast = tl.zeros([BC, BD], dtype=tl.float32)
    if p_dend is not None:
        b_dlast = tl.load(p_dend + i_state + o_h, mask=m_h, other=0.0)
    if p_first is None:
        i_block = (i_s * each).to(tl.int64)
    else:
        i_block = tl.load(p_first + i_s).to(tl.int64)
    n_blocks = ((i_stop - i_start + BT - 1) // BT).to(tl.int32)
    b_a3 = b_a[:, None, :]

    for i_r in range(n_blocks):
        i_t = n_blocks - 1 - i_r
        b_first = tl.load(p_saved + (i_block + i_t) * H * D + o_h, mask=m_h, other=0.0)
        o_n = i_start + i_t * BT + o_t
        m_n = o_n < i_stop
        m_before = (o_t > 0) & (o_n - 1 < i_stop)
        m_behind = (o_t < BT - 1) & (o_n + 1 < i_stop)
        m_x = m_c[:, None] & m_n[None, :]
        # [BC, BT]; masked rows of the last axis have steps of 0
        b_u = sequence_tile(p_u, s_uh, s_un, o_c, m_c, o_n, m_n)
        b_u1 = sequence_tile(p_u, s_uh, s_un, o_c, m_c, o_n - 1, m_before)
        b_raw = sequence_tile(p_delta, s_eh, s_en, o_c, m_c, o_n, m_n) + b_bias[:, None]
        b_raw1 = sequence_tile(p_delta, s_eh, s_en, o_c, m_c, o_n - 1, m_before) + b_bias[:, None]
        b_raw2 = sequence_tile(p_delta, s_eh, s_en, o_c, m_c, o_n + 1, m_behind) + b_bias[:, None]
        b_step = step_sizes(b_raw, 0.0, m_n[None, :], SOFTPLUS)
        b_step1 = step_sizes(b_raw1, 0.0, m_before[None, :], SOFTPLUS)
        b_step2 = step_sizes(b_raw2, 0.0, m_behind[None, :], SOFTPLUS)
        # [1, BT, BD]
        b_b = width_tile(p_b, s_bd, s_bn, o_d, m_d, o_n, m_n)[None, :, :]
        b_b1 = width_tile(p_b, s_bd, s_bn, o_d, m_d, o_n - 1, m_before)[None, :, :]
        b_c = width_tile(p_c, s_cd, s_cn, o_d, m_d, o_n, m_n)[None, :, :]

        # [BC, BT, BD]: h_{t−1}, then exp(δA) h_{t−1}
        b_decay1, b_weight1 = transitions(b_step1[:, :, None], b_a3, ZOH)
        b_decay1, b_h = tl.associative_scan((b_decay1, b_weight1 * b_u1[:, :, None] * b_b1), 1, composed)
        b_h += b_decay1 * b_first[:, None, :]
        b_decay, b_weight = transitions(b_step[:, :, None], b_a3, ZOH)
        b_wu = b_weight * b_u[:, :, None]
        b_h *= b_decay

        # [BC, BT]: p
        b_p = sequence_tile(p_dy, s_yh, s_yn, o_c, m_c, o_n, m_n)
        if p_z is not None:
            b_z = sequence_tile(p_z, s_zh, s_zn, o_c, m_c, o_n, m_n)
            if p_dz is not None:
                b_y = tl.sum((b_h + b_wu * b_b) * b_c, 2) + b_skip[:, None] * b_u
                o_z = ((i_b * H + o_c) * N)[:, None] + o_n[None, :]
                tl.store(p_dz + o_z, (b_p * b_y * silu_slope(b_z)).to(p_dz.dtype.element_ty), mask=m_x)
            b_p *= silu(b_z)
        if p_dd is not None:
            b_dskip += tl.sum(b_p * b_u, 1)
        # of contiguous (blocks of channels, B, D, N)
        o_w = ((i_c * batch + i_b) * D + o_d)[None, :] * N + o_n[:, None]
        m_w = m_n[:, None] & m_d[None, :]
        if p_dc is not None:
            tl.store(p_dc + o_w, tl.sum(b_p[:, :, None] * (b_h + b_wu * b_b), 0), mask=m_w)

        # [BC, BT, BD]: g
        b_decay2 = tl.exp(b_step2[:, :, None] * b_a3)
        b_decay2, b_g = tl.associative_scan((b_decay2, b_p[:, :, None] * b_c), 1, composed, reverse=True)
        b_g += b_decay2 * b_dlast[:, None, :]
        b_dlast = tl.sum(tl.where((o_t == 0)[None, :, None], b_decay * b_g, 0.0), 1)
        if p_db is not None:
            tl.store(p_db + o_w, tl.sum(b_wu * b_g, 0), mask=m_w)
        o_x = ((i_b * H + o_c) * N)[:, None] + o_n[None, :]
        if p_du is not None:
            b_du = tl.sum(b_weight * b_b * b_g, 2) + b_skip[:, None] * b_p
            tl.store(p_du + o_x, b_du.to(p_du.dtype.element_ty), mask=m_x)
        b_dstep, b_dweight = weight_slopes(b_step[:, :, None], b_a3, b_decay, ZOH)
        b_bu = b_b * b_u[:, :, None]
        if p_da is not None:
            b_da += tl.sum(b_g * (b_step[:, :, None] * b_h + b_dweight * b_bu), 1)
        if p_ddelta is not None or p_dbias is not None:
            b_ddelta = tl.sum(b_g * (b_a3 * b_h + b_dstep * b_bu), 2)
            if SOFTPLUS:
                b_ddelta *= sigmoid(b_raw)
            b_dbias += tl.sum(tl.where(m_x, b_ddelta, 0.0), 1)
            if p_ddelta is not None:
                tl.store(p_ddelta + o_x, b_ddelta.to(p_ddelta.dtype.element_ty), mask=m_x)

    o_s = i_s.to(tl.int64) * H + o_c
    if p_da is not None:
        tl.store(p_da + i_state + o_h, b_da, mask=m_h)
    if p_dd is not None:
        tl.store(p_dd + o_s, b_dskip, mask=m_c)
    if p_dbias is not None:
        tl.store(p_dbias + o_s, b_dbias, mask=m_c)
    if p_dstart is not None:
        tl.store(p_dstart + i_state + o_h, b_dlast, mask=m_h)


def gradients(
    x: ScanInputs, dy: torch.Tensor, dend: torch.Tensor | None, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and the initial state, each of its input's dtype;
    None for those that ``needs`` does not ask for. dy (B,H,N) has any strides, dend (S,H,D) is float32.
    """
    heads, width = x.A.shape
    batch, _, length = x.u.shape
    device = x.u.device
    tile = scan_tile(heads, width, POSITIONS, AREA)
    blocks = triton.cdiv(heads, tile.channels)
    chunks = x.sequences.chunks(tile.positions)

    def parts(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    count = x.sequences.count
    each = [
        *(torch.empty(x.u.shape, dtype=x.u.dtype, device=device) if need else None for need in needs[:2]),
        parts(count, heads, width) if needs[2] else None,
        *(parts(blocks, batch, width, length) if need else None for need in needs[3:5]),
        parts(count, heads) if needs[5] else None,
        torch.empty(x.u.shape, dtype=x.u.dtype, device=device) if needs[6] else None,
        parts(count, heads) if needs[7] else None,
        parts(count, heads, width) if needs[8] else None,
    ]
    if count:
        saved = parts(chunks.count, heads, width)
        run_scan(x, saved=(chunks, saved))
        launch: Any = backward_kernel[(count, blocks)]
        launch(
            *x.pointers, chunks.first, saved, dy, None if dend is None else dend.contiguous(), *each,
            *x.strides, *dy.stride(), chunks.each, batch, heads, length, width,
            SOFTPLUS=x.softplus, ZOH=x.zoh, BC=tile.channels, BT=tile.positions, BD=tile.width,
            num_warps=WARPS, num_stages=1, enable_fp_fusion=False, **register_limit(WARPS),
        )  # fmt: skip
    summed = (2, 3, 4, 5, 7)
    inputs = (x.u, x.delta, x.A, x.B, x.C, x.D, x.z, x.delta_bias, x.initial_state)
    return tuple(
        found if found is None or like is None else (found.sum(0) if i in summed else found).to(like.dtype)
        for i, (found, like) in enumerate(zip(each, inputs, strict=True))
    )
