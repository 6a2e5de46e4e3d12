"""Diagonal state spaces as an associative scan, block by block, and powers of their decays.

Inside a block of BT positions the pairs (decay, addition) are combined by ``tl.associative_scan``:
(a, z) then (a', z') is (a' a, a' z + z'). What came before the block enters as a^(t+1) times the state.

A decay that does not depend on the position makes every error of its powers systematic: if a^64 is off by
one rounding, the state that crosses 1024 blocks is off by 1024. Powers are therefore formed by repeated
squaring in pairs of float32 (a value and what rounding took from it; Dekker 1971, with a fused
multiply-add), and a state crosses a block by such a pair. What is left of the errors comes from the
additions, which do not agree with each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnproof.kernels.ssm_recurrence import StateTiles, load_pair, store_pair, times
from attnproof.kernels.states import Sequences, register_limit, sequence_bounds

__all__ = ["BLOCK", "across", "powers", "scan_kernel", "scanned", "scanned_states", "wide_times"]

# Positions a block.
BLOCK = 64
BITS = BLOCK.bit_length()

RUNTIME = [
    "p_u", "p_a", "p_b", "p_c", "p_d", "p_start", "p_states", "p_out", "p_end", "p_cu", "p_first", "s_ub",
    "s_uh", "s_un", "each", "B", "H", "N", "D",
]  # fmt: skip


@triton.jit
def exact_product(b_x, b_e, b_y, b_f):
    """(value, rest) of (x + e)(y + f), to about 2^-46 of itself."""
    b_p = b_x * b_y
    b_r = tl.fma(b_x, b_y, -b_p) + (b_x * b_f + b_e * b_y)
    b_s = b_p + b_r
    return b_s, b_r - (b_s - b_p)


@triton.jit
def exact_sum(b_x, b_e, b_y, b_f):
    """(value, rest) of (x + e) + (y + f)."""
    b_s = b_x + b_y
    b_v = b_s - b_x
    b_r = (b_x - (b_s - b_v)) + (b_y - b_v) + (b_e + b_f)
    b_t = b_s + b_r
    return b_t, b_r - (b_t - b_s)


@triton.jit
def wide_times(b_xr, b_xi, b_er, b_ei, b_yr, b_yi, b_fr, b_fi, COMPLEX: tl.constexpr):
    """The product of x + e and y + f as (real, imaginary, rest of the real, rest of the imaginary part)."""
    b_rr, b_rs = exact_product(b_xr, b_er, b_yr, b_fr)
    if COMPLEX:
        b_ii, b_is = exact_product(b_xi, b_ei, b_yi, b_fi)
        b_ri, b_rt = exact_product(b_xr, b_er, b_yi, b_fi)
        b_ir, b_it = exact_product(b_xi, b_ei, b_yr, b_fr)
        b_pr, b_sr = exact_sum(b_rr, b_rs, -b_ii, -b_is)
        b_pi, b_si = exact_sum(b_ri, b_rt, b_ir, b_it)
        return b_pr, b_pi, b_sr, b_si
    return b_rr, b_xi, b_rs, b_ei


@triton.jit
def powers(b_ar, b_ai, o_e, bits, COMPLEX: tl.constexpr):
    """a^e for a [BD, 1] and exponents 0 ≤ e < 2^bits [1, K]: [BD, K] as :func:`wide_times` returns it.

    a^0 is 1, that of 0 too; nothing is divided and no logarithm taken.
    """
    BD: tl.constexpr = b_ar.shape[0]
    K: tl.constexpr = o_e.shape[1]
    b_pr, b_pi = tl.full([BD, K], 1.0, dtype=tl.float32), tl.zeros([BD, K], dtype=tl.float32)
    b_er, b_ei = tl.zeros([BD, K], dtype=tl.float32), tl.zeros([BD, K], dtype=tl.float32)
    b_sr, b_si = b_ar, b_ai
    b_fr, b_fi = tl.zeros_like(b_ar), tl.zeros_like(b_ai)
    for i_bit in range(bits):
        b_nr, b_ni, b_mr, b_mi = wide_times(b_pr, b_pi, b_er, b_ei, b_sr, b_si, b_fr, b_fi, COMPLEX)
        m_e = ((o_e >> i_bit) & 1) == 1
        b_pr, b_er = tl.where(m_e, b_nr, b_pr), tl.where(m_e, b_mr, b_er)
        b_pi, b_ei = tl.where(m_e, b_ni, b_pi), tl.where(m_e, b_mi, b_ei)
        b_sr, b_si, b_fr, b_fi = wide_times(b_sr, b_si, b_fr, b_fi, b_sr, b_si, b_fr, b_fi, COMPLEX)
    return b_pr, b_pi, b_er, b_ei


@triton.jit
def after(b_a, b_z, b_next, b_y):
    """One real element and then another."""
    return b_a * b_next, b_z * b_next + b_y


@triton.jit
def after_complex(b_ar, b_ai, b_zr, b_zi, b_nr, b_ni, b_yr, b_yi):
    """One complex element and then another."""
    b_pr, b_pi = b_ar * b_nr - b_ai * b_ni, b_ar * b_ni + b_ai * b_nr
    return b_pr, b_pi, (b_zr * b_nr - b_zi * b_ni) + b_yr, (b_zr * b_ni + b_zi * b_nr) + b_yi


@triton.jit
def scanned(b_ar, b_ai, b_zr, b_zi, REVERSE: tl.constexpr, COMPLEX: tl.constexpr):
    """x_t = a x_{t−1} + z_t (REVERSE: x_{t+1}) along a block from 0; a [BD, 1], z [BD, BT]."""
    BD: tl.constexpr = b_zr.shape[0]
    BT: tl.constexpr = b_zr.shape[1]
    b_dr = tl.broadcast_to(b_ar, [BD, BT])
    if COMPLEX:
        b_di = tl.broadcast_to(b_ai, [BD, BT])
        _, _, b_xr, b_xi = tl.associative_scan((b_dr, b_di, b_zr, b_zi), 1, after_complex, reverse=REVERSE)
        return b_xr, b_xi
    _, b_xr = tl.associative_scan((b_dr, b_zr), 1, after, reverse=REVERSE)
    return b_xr, b_zi


@triton.jit
def across(b_xr, b_xi, b_pr, b_pi, b_er, b_ei, b_zr, b_zi, COMPLEX: tl.constexpr):
    """(p + e) x + z, all [BD, 1]: a state on its way through a block whose own additions come to z."""
    b_hr, b_hi = times(b_xr, b_xi, b_pr, b_pi, COMPLEX)
    b_lr, b_li = times(b_xr, b_xi, b_er, b_ei, COMPLEX)
    return b_hr + (b_lr + b_zr), b_hi + (b_li + b_zi)


@triton.jit(do_not_specialize=RUNTIME)
def scan_kernel(
    p_u, p_a, p_b, p_c, p_d, p_start, p_states, p_out, p_end, p_cu, p_first,
    s_ub: tl.int64, s_uh: tl.int64, s_un: tl.int64, each, B, H, N, D,
    COMPLEX: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Outputs (tiles of states, B, H, N) into p_out and the state before every block into p_states, each
    unless that is None, and the final states.
    """
    i_sh, i_d = tl.program_id(0), tl.program_id(1)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    p_u += i_b * s_ub + i_h * s_uh
    if p_out is not None:
        p_out += ((i_d.to(tl.int64) * B + i_b) * H + i_h) * N
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
    b_pr, b_pi, _, _ = powers(b_ar, b_ai, o_t + 1, BITS, COMPLEX)
    b_or, b_oi, b_er, b_ei = powers(b_ar, b_ai, tl.full([1, 1], BT, dtype=tl.int32), BITS, COMPLEX)

    o_s = i_sh.to(tl.int64) * D + o_d
    b_sr, b_si = tl.zeros([BD, 1], dtype=tl.float32), tl.zeros([BD, 1], dtype=tl.float32)
    if p_start is not None:
        b_sr, b_si = load_pair(p_start, o_s, m_d, COMPLEX)
    b_endr, b_endi = b_sr, b_si
    for i_c in range(((i_stop - i_start + BT - 1) // BT).to(tl.int32)):
        if p_states is not None:
            store_pair(p_states, ((i_c0 + i_c) * H + i_h) * D + o_d, b_sr, b_si, m_d, COMPLEX)
        o_n = i_start + i_c * BT + o_t
        b_u = tl.load(p_u + o_n * s_un, mask=o_n < i_stop, other=0.0).to(tl.float32)
        # [BD, BT]: what the block itself adds, and the states
        b_zr, b_zi = scanned(b_ar, b_ai, b_br * b_u, b_bi * b_u, False, COMPLEX)
        b_xr, b_xi = times(b_pr, b_pi, b_sr, b_si, COMPLEX)
        b_xr += b_zr
        b_xi += b_zi
        if p_out is not None:
            b_y = tl.sum(b_cr * b_xr - b_ci * b_xi if COMPLEX else b_cr * b_xr, 0, keep_dims=True)
            if p_d is not None and i_d == 0:
                b_y += b_skip * b_u
            tl.store(p_out + o_n, b_y.to(p_out.dtype.element_ty), mask=o_n < i_stop)
        m_end = o_n == tl.minimum(o_n - o_t + BT, i_stop) - 1
        b_endr = tl.sum(tl.where(m_end, b_xr, 0.0), 1, keep_dims=True)
        b_endi = tl.sum(tl.where(m_end, b_xi, 0.0), 1, keep_dims=True)
        b_lastr = tl.sum(tl.where(o_t == BT - 1, b_zr, 0.0), 1, keep_dims=True)
        b_lasti = tl.sum(tl.where(o_t == BT - 1, b_zi, 0.0), 1, keep_dims=True)
        b_sr, b_si = across(b_sr, b_si, b_or, b_oi, b_er, b_ei, b_lastr, b_lasti, COMPLEX)
    store_pair(p_end, o_s, b_endr, b_endi, m_d, COMPLEX)


def scanned_states(
    sequences: Sequences,
    u: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    d: torch.Tensor | None,
    start: torch.Tensor | None,
    *,
    boundaries: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, final states), or with ``boundaries`` (the states before all blocks, final states); ``parameters``
    a, b, c and ``start`` contiguous.
    """
    a = parameters[0]
    batch, heads, length = u.shape
    tiles, chunks = StateTiles.of(a.shape[1]), sequences.chunks(BLOCK)
    out = None if boundaries else tiles.parts(u)
    states = None
    if boundaries:
        states = torch.empty((chunks.count, *a.shape), dtype=torch.float32, device=u.device)
    end = torch.empty((sequences.count, *a.shape), dtype=torch.float32, device=u.device)
    if sequences.count * heads:
        scan_kernel[(sequences.count * heads, tiles.number)](
            u, *parameters, d, start, states, out, end, sequences.cu_seqlens, chunks.first, *u.stride(),
            chunks.each, batch, heads, length, a.shape[1], COMPLEX=a.ndim == 3, BD=tiles.size, BT=BLOCK,
            BITS=BITS, num_warps=4, enable_fp_fusion=False, **register_limit(4),
        )  # fmt: skip
    if states is not None:
        return states, end
    assert out is not None
    return tiles.total(out, u.dtype), end
