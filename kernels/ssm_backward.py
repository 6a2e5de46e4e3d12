"""Gradients of diagonal state spaces that ran as a recurrence or a scan.

With l_t the gradient of x_t, as a complex number of the gradients of its two parts, and a* the conjugate:

    l_t = c* dy_t + a* l_{t+1},   du_t = Re Σ_s b* l_t + d dy_t,   dx_0 = a* l_1,
    da = Σ_t l_t x_{t−1}*,   db = Σ_t l_t u_t,   dc = Σ_t dy_t x_t*,   dd = Σ_t dy_t u_t

(the recurrence differentiated; nothing is divided by a, so that a = 0 and decays that underflow are numbers
like others). The states before all blocks come from a scan; this kernel walks back over the blocks, scans
each one forwards for x and backwards for l, and leaves the sums of one sequence, which the caller adds up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attnproof.kernels.ssm_recurrence import StateTiles, load_pair, store_pair, times
from attnproof.kernels.ssm_scan import BITS, BLOCK, across, powers, scanned, scanned_states
from attnproof.kernels.states import Sequences, register_limit, sequence_bounds

__all__ = ["StateSpaceGradients", "gradient_kernel", "gradients"]

RUNTIME = [
    "p_u", "p_dy", "p_a", "p_b", "p_c", "p_d", "p_states", "p_dend", "p_du", "p_da", "p_db", "p_dc", "p_dd",
    "p_dstart", "p_cu", "p_first", "s_ub", "s_uh", "s_un", "s_yb", "s_yh", "s_yn", "each", "B", "H", "N", "D",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def gradient_kernel(
    p_u, p_dy, p_a, p_b, p_c, p_d, p_states, p_dend, p_du, p_da, p_db, p_dc, p_dd, p_dstart, p_cu, p_first,
    s_ub: tl.int64, s_uh: tl.int64, s_un: tl.int64, s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64,
    each, B, H, N, D,
    COMPLEX: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """du (tiles of states, B, H, N), and da, db, dc, dx_0 and dd of one sequence."""
    i_sh, i_d = tl.program_id(0), tl.program_id(1)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    p_u += i_b * s_ub + i_h * s_uh
    p_dy += i_b * s_yb + i_h * s_yh
    p_du += ((i_d.to(tl.int64) * B + i_b) * H + i_h) * N
    i_c0 = (i_s * each if p_cu is None else tl.load(p_first + i_s)).to(tl.int64)

    # [BD, 1], [1, BT]
    o_d, o_t = (i_d * BD + tl.arange(0, BD))[:, None], tl.arange(0, BT)[None, :]
    m_d = o_d < D
    b_ar, b_ai = load_pair(p_a, i_h * D + o_d, m_d, COMPLEX)
    b_br, b_bi = load_pair(p_b, i_h * D + o_d, m_d, COMPLEX)
    b_cr, b_ci = load_pair(p_c, i_h * D + o_d, m_d, COMPLEX)
    b_skip = 0.0
    if p_d is not None:
        b_skip = tl.load(p_d + i_h).to(tl.float32)
    b_inr, b_ini, _, _ = powers(b_ar, b_ai, o_t, BITS, COMPLEX)
    b_outr, b_outi, _, _ = powers(b_ar, -b_ai, BT - 1 - o_t, BITS, COMPLEX)
    b_or, b_oi, b_er, b_ei = powers(b_ar, -b_ai, tl.full([1, 1], BT, dtype=tl.int32), BITS, COMPLEX)

    o_s = i_sh.to(tl.int64) * D + o_d
    b_zero = tl.zeros([BD, 1], dtype=tl.float32)
    # the final state's cotangent enters at the last position, what comes after a block behind its last row
    b_endr, b_endi = b_zero, b_zero
    if p_dend is not None:
        b_endr, b_endi = load_pair(p_dend, o_s, m_d, COMPLEX)
    b_nextr, b_nexti = b_zero, b_zero
    b_dar, b_dai, b_dbr, b_dbi, b_dcr, b_dci = b_zero, b_zero, b_zero, b_zero, b_zero, b_zero
    b_dd = tl.zeros([1, BT], dtype=tl.float32)
    n_blocks = ((i_stop - i_start + BT - 1) // BT).to(tl.int32)
    for i_back in range(n_blocks):
        i_c = n_blocks - 1 - i_back
        o_n = i_start + i_c * BT + o_t
        m_n = o_n < i_stop
        b_u = tl.load(p_u + o_n * s_un, mask=m_n, other=0.0).to(tl.float32)
        b_before = tl.load(p_u + (o_n - 1) * s_un, mask=m_n & (o_t > 0), other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + o_n * s_yn, mask=m_n, other=0.0).to(tl.float32)

        # [BD, BT]: the states before and after each position
        b_sr, b_si = load_pair(p_states, ((i_c0 + i_c) * H + i_h) * D + o_d, m_d, COMPLEX)
        b_wr, b_wi = scanned(b_ar, b_ai, b_br * b_before, b_bi * b_before, False, COMPLEX)
        b_xr, b_xi = times(b_inr, b_ini, b_sr, b_si, COMPLEX)
        b_wr += b_xr
        b_wi += b_xi
        b_xr, b_xi = times(b_wr, b_wi, b_ar, b_ai, COMPLEX)
        b_xr += b_br * b_u
        b_xi += b_bi * b_u

        # [BD, BT]: the gradients of the states after each position
        m_end = o_n == i_stop - 1
        b_zr = b_cr * b_dy + tl.where(m_end, b_endr, 0.0)
        b_zi = -b_ci * b_dy + tl.where(m_end, b_endi, 0.0)
        b_zr, b_zi = scanned(b_ar, -b_ai, b_zr, b_zi, True, COMPLEX)
        b_lr, b_li = times(b_outr, b_outi, b_nextr, b_nexti, COMPLEX)
        b_lr += b_zr
        b_li += b_zi

        b_du = b_br * b_lr
        b_dbr += tl.sum(b_lr * b_u, 1, keep_dims=True)
        b_dcr += tl.sum(b_dy * b_xr, 1, keep_dims=True)
        if COMPLEX:
            b_du += b_bi * b_li
            b_dar += tl.sum(b_lr * b_wr + b_li * b_wi, 1, keep_dims=True)
            b_dai += tl.sum(b_li * b_wr - b_lr * b_wi, 1, keep_dims=True)
            b_dbi += tl.sum(b_li * b_u, 1, keep_dims=True)
            b_dci -= tl.sum(b_dy * b_xi, 1, keep_dims=True)
        else:
            b_dar += tl.sum(b_lr * b_wr, 1, keep_dims=True)
        b_du = tl.sum(b_du, 0, keep_dims=True)
        if p_d is not None and i_d == 0:
            b_du += b_skip * b_dy
            b_dd += b_dy * b_u
        tl.store(p_du + o_n, b_du.to(p_du.dtype.element_ty), mask=m_n)

        b_firstr = tl.sum(tl.where(o_t == 0, b_zr, 0.0), 1, keep_dims=True)
        b_firsti = tl.sum(tl.where(o_t == 0, b_zi, 0.0), 1, keep_dims=True)
        b_firstr, b_firsti = times(b_firstr, b_firsti, b_ar, -b_ai, COMPLEX)
        b_nextr, b_nexti = across(b_nextr, b_nexti, b_or, b_oi, b_er, b_ei, b_firstr, b_firsti, COMPLEX)
        b_endr, b_endi = b_zero, b_zero
    store_pair(p_da, o_s, b_dar, b_dai, m_d, COMPLEX)
    store_pair(p_db, o_s, b_dbr, b_dbi, m_d, COMPLEX)
    store_pair(p_dc, o_s, b_dcr, b_dci, m_d, COMPLEX)
    # without positions, the cotangent of the final state is still there
    store_pair(p_dstart, o_s, b_nextr + b_endr, b_nexti + b_endi, m_d, COMPLEX)
    if p_d is not None and i_d == 0:
        tl.store(p_dd + i_sh, tl.sum(tl.sum(b_dd, 1), 0))


class StateSpaceGradients(NamedTuple):
    """Gradients by u, of u's dtype, and in float32 by a, b, c, d and the initial states."""

    u: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    d: torch.Tensor
    start: torch.Tensor


def gradients(
    sequences: Sequences,
    u: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    d: torch.Tensor | None,
    start: torch.Tensor | None,
    cotangents: tuple[torch.Tensor, torch.Tensor | None],
) -> StateSpaceGradients:
    """All gradients, from the cotangents of y (B,H,N) and of the final states, contiguous or None."""
    dy, dend = cotangents
    a = parameters[0]
    batch, heads, length = u.shape
    tiles, chunks = StateTiles.of(a.shape[1]), sequences.chunks(BLOCK)
    states, _ = scanned_states(sequences, u, parameters, None, start, boundaries=True)
    du = tiles.parts(u)
    shape = (sequences.count, *a.shape)
    sums = [torch.empty(shape, dtype=torch.float32, device=u.device) for _ in range(4)]
    dd = torch.empty((sequences.count, heads), dtype=torch.float32, device=u.device)
    if sequences.count * heads:
        gradient_kernel[(sequences.count * heads, tiles.number)](
            u, dy, *parameters, d, states, dend, du, *sums[:3], dd, sums[3], sequences.cu_seqlens,
            chunks.first, *u.stride(), *dy.stride(), chunks.each, batch, heads, length, a.shape[1],
            COMPLEX=a.ndim == 3, BD=tiles.size, BT=BLOCK, BITS=BITS, num_warps=8, enable_fp_fusion=False,
            **register_limit(8),
        )  # fmt: skip
    da, db, dc = (x.sum(0) for x in sums[:3])
    return StateSpaceGradients(tiles.total(du, u.dtype), da, db, dc, dd.sum(0), sums[3])
