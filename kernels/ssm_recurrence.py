"""Diagonal state spaces step by step, and what all their kernels share: pairs of numbers, tiles of states.

    x_t = a ∘ x_{t−1} + b u_t,   y_t = Re Σ_s c_s x_ts + d u_t                    (theory S4-1, S4D)

A complex number is a pair of float32 tiles. Where states are real (COMPLEX is false) the second of a pair
is 0 and is never read. Parameters are contiguous (H,D) or (H,D,2), states (S,H,D) or (S,H,D,2) for S
sequences. A program takes BD states of one sequence and head; where there are more, each tile of states
writes its own part of an output, and the first adds what does not pass through the states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attnproof.kernels.states import Sequences, sequence_bounds

__all__ = ["STATES", "StateTiles", "load_pair", "recurrent_kernel", "stepped", "store_pair", "times"]

# States a program; the others of a head are other programs.
STATES = 16

RUNTIME = [
    "p_u", "p_a", "p_b", "p_c", "p_d", "p_start", "p_out", "p_end", "p_cu", "s_ub", "s_uh", "s_un", "B", "H",
    "N", "D",
]  # fmt: skip


@triton.jit
def times(b_xr, b_xi, b_yr, b_yi, COMPLEX: tl.constexpr):
    """The product of two numbers, every operation rounded by itself."""
    if COMPLEX:
        return b_xr * b_yr - b_xi * b_yi, b_xr * b_yi + b_xi * b_yr
    return b_xr * b_yr, b_xi


@triton.jit
def load_pair(p_x, o_x, m_x, COMPLEX: tl.constexpr):
    """(real, imaginary) parts of the numbers o_x as float32, 0 outside m_x."""
    if COMPLEX:
        b_r = tl.load(p_x + 2 * o_x, mask=m_x, other=0.0).to(tl.float32)
        b_i = tl.load(p_x + 2 * o_x + 1, mask=m_x, other=0.0).to(tl.float32)
        return b_r, b_i
    b_r = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    return b_r, tl.zeros_like(b_r)


@triton.jit
def store_pair(p_x, o_x, b_r, b_i, m_x, COMPLEX: tl.constexpr):
    """Store what :func:`load_pair` loads."""
    if COMPLEX:
        tl.store(p_x + 2 * o_x, b_r, mask=m_x)
        tl.store(p_x + 2 * o_x + 1, b_i, mask=m_x)
    else:
        tl.store(p_x + o_x, b_r, mask=m_x)


@triton.jit(do_not_specialize=RUNTIME)
def recurrent_kernel(
    p_u, p_a, p_b, p_c, p_d, p_start, p_out, p_end, p_cu,
    s_ub: tl.int64, s_uh: tl.int64, s_un: tl.int64, B, H, N, D,
    COMPLEX: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One position after the other; out is contiguous (tiles of states, B, H, N)."""
    i_sh, i_d = tl.program_id(0), tl.program_id(1)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    p_u += i_b * s_ub + i_h * s_uh + i_start * s_un
    p_out += ((i_d.to(tl.int64) * B + i_b) * H + i_h) * N + i_start

    # [BD]
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_ar, b_ai = load_pair(p_a, i_h * D + o_d, m_d, COMPLEX)
    b_br, b_bi = load_pair(p_b, i_h * D + o_d, m_d, COMPLEX)
    b_cr, b_ci = load_pair(p_c, i_h * D + o_d, m_d, COMPLEX)
    b_skip = 0.0
    if p_d is not None:
        b_skip = tl.load(p_d + i_h).to(tl.float32)
    o_s = i_sh.to(tl.int64) * D + o_d
    b_xr, b_xi = tl.zeros([BD], dtype=tl.float32), tl.zeros([BD], dtype=tl.float32)
    if p_start is not None:
        b_xr, b_xi = load_pair(p_start, o_s, m_d, COMPLEX)
    for i_n in range((i_stop - i_start).to(tl.int32)):
        b_u = tl.load(p_u + i_n * s_un).to(tl.float32)
        b_xr, b_xi = times(b_xr, b_xi, b_ar, b_ai, COMPLEX)
        b_xr += b_br * b_u
        b_y = b_cr * b_xr
        if COMPLEX:
            b_xi += b_bi * b_u
            b_y -= b_ci * b_xi
        b_y = tl.sum(b_y, 0)
        if p_d is not None and i_d == 0:
            b_y += b_skip * b_u
        tl.store(p_out + i_n, b_y.to(p_out.dtype.element_ty))
    store_pair(p_end, o_s, b_xr, b_xi, m_d, COMPLEX)


class StateTiles(NamedTuple):
    """How the D states of a head are cut up.

    Attributes:
        size: states a program, a power of two.
        number: programs a sequence and head.
    """

    size: int
    number: int

    @classmethod
    def of(cls, width: int) -> StateTiles:
        """The tiles of ``width`` states."""
        size = min(STATES, triton.next_power_of_2(max(1, width)))
        return cls(size, max(1, triton.cdiv(width, size)))

    def parts(self, u: torch.Tensor) -> torch.Tensor:
        """Room for what every tile adds to an output of u's shape: of u's dtype where there is one tile."""
        dtype = u.dtype if self.number == 1 else torch.float32
        return torch.empty((self.number, *u.shape), dtype=dtype, device=u.device)

    def total(self, parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The sum of :meth:`parts`, rounded once to ``dtype``."""
        return parts[0] if self.number == 1 else parts.sum(0).to(dtype)


def stepped(
    sequences: Sequences,
    u: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    d: torch.Tensor | None,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, final states) position by position; ``parameters`` a, b, c and ``start`` contiguous."""
    a = parameters[0]
    batch, heads, length = u.shape
    tiles = StateTiles.of(a.shape[1])
    out = tiles.parts(u)
    end = torch.empty((sequences.count, *a.shape), dtype=torch.float32, device=u.device)
    if sequences.count * heads:
        recurrent_kernel[(sequences.count * heads, tiles.number)](
            u, *parameters, d, start, out, end, sequences.cu_seqlens, *u.stride(), batch, heads, length,
            a.shape[1], COMPLEX=a.ndim == 3, BD=tiles.size, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return tiles.total(out, u.dtype), end
