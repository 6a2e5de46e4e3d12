"""The kernel K_i = Re Σ_s c_s a_sⁱ b_s of a diagonal, time-invariant state space, and what follows from it.

Gu, Goel and Ré, arXiv 2111.00396 (S4); Gu, Gupta, Goel and Ré, arXiv 2206.11893 (S4D); theory S4-1. Shared
by ``ssm`` and ``h3``. Complex numbers are pairs of real values of the abstract arithmetic, real ones have no
imaginary part. Gradients by a pair are those by its two real parts, g = ∂L/∂Re + i·∂L/∂Im, for which z = w·v
gives g_w = conj(v)·g_z:

    db = Σ_i conj(aⁱ) M_i,  da = conj(b) Σ_i i·conj(aⁱ⁻¹) M_i,  dc = Σ_i dK_i conj(aⁱ b),  M_i = dK_i conj(c)

Boxes around the two parts of a product are √2 wider than what they enclose, so that a power by k successive
products is up to 2^(k/2) times as uncertain as it need be, and by repeated squaring as bad. In float64 the
numbers a^(2^k) are therefore taken from Arb, and a power is a product of at most 16 of them: its radius is
below 2⁻⁴²|a|ⁱ for every i < 2¹⁶, |a| = 1 included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, cast

import numpy as np
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic
from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.arithmetic.enclosures import Ball

__all__ = [
    "BLOCK",
    "Modes",
    "Numbers",
    "Pair",
    "StateKernel",
    "blocks_of_rows",
    "contracted",
    "joined",
    "over_batch",
    "padded",
    "rearranged",
]

BLOCK = 256
"""Lags that are taken together: sums over N go by blocks, so that radii grow with N/BLOCK + BLOCK."""

# Elements of one block of rows of a Toeplitz matrix, for all heads together.
_ELEMENTS = 2**22
_SQUARES_BITS = 192


@dataclass(frozen=True, eq=False)
class Pair(Generic[V]):
    """Complex numbers by their parts; ``im`` is None for real ones."""

    re: V
    im: V | None = None


def rearranged(x: V, change: Callable[[Any], Any]) -> V:
    """``change``, which indexes, transposes or flips, done to a value of any of the arithmetics."""
    if isinstance(x, Ball):
        return cast("V", Ball(change(x.value), None if x.radius is None else change(x.radius)))
    return cast("V", change(x))


def joined(parts: Sequence[V], axis: int) -> V:
    """Values one after the other along an axis; at least one."""
    if len(parts) == 1:
        return parts[0]
    found: list[Any] = list(parts)
    if isinstance(found[0], Ball):
        radii = [torch.zeros_like(x.value) if x.radius is None else x.radius for x in found]
        return cast("V", Ball(torch.cat([x.value for x in found], axis), torch.cat(radii, axis)))
    if isinstance(found[0], torch.Tensor):
        return cast("V", torch.cat(found, axis))
    return cast("V", np.concatenate(found, axis))


def _windows(x: Any, size: int) -> Any:
    """Every run of ``size`` elements of the last axis, as a view with one more axis."""
    if isinstance(x, torch.Tensor):
        return x.unfold(-1, size, 1)
    return np.lib.stride_tricks.sliding_window_view(x, size, axis=-1)


def padded(x: torch.Tensor, size: int) -> torch.Tensor:
    """(…, n) with zeros up to (…, size)."""
    return torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def blocks_of_rows(rows: torch.Tensor, columns: int, batch: int) -> list[torch.Tensor]:
    """``rows`` in runs that make matrices (batch, run, columns) of a bounded size."""
    size = max(_ELEMENTS // max(columns * batch, 1), 1)
    return list(torch.split(rows, min(size, BLOCK))) if len(rows) else []


def contracted(a: Arithmetic[V], w: V, x: V) -> V:
    """w x over the last axes, (…, R, n) × (…, n, X) → (…, R, X), in blocks of the inner axis.

    ``n`` is at most ``BLOCK`` or a multiple of it.
    """
    *outer, rows, inner = a.shape(w)
    *other, _, width = a.shape(x)
    if inner <= BLOCK or isinstance(w, torch.Tensor):  # without a radius there is nothing to keep small
        return a.matmul(w, x)
    count = inner // BLOCK
    first, axes = len(outer), tuple(range(len(outer)))
    left = a.permute(a.reshape(w, (*outer, rows, count, BLOCK)), (*axes, first + 1, first, first + 2))
    terms = a.matmul(left, a.reshape(x, (*other, count, BLOCK, width)))
    last = len(a.shape(terms)) - 3
    total = a.sum(a.permute(terms, (*range(last), last + 1, last + 2, last)))
    return a.reshape(total, (*a.shape(total)[:-1],))


def over_batch(a: Arithmetic[V], x: V) -> V:
    """Σ over the first axis: (B, H, …) to (H, …)."""
    shape = a.shape(x)
    return a.reshape(a.sum(a.permute(x, (*range(1, len(shape)), 0))), shape[1:])


class Numbers(Generic[V]):
    """Operations on pairs over an arithmetic."""

    def __init__(self, a: Arithmetic[V]) -> None:
        self.a = a

    def each(self, x: Pair[V], change: Callable[[V], V]) -> Pair[V]:
        """Both parts changed by a real linear map."""
        return Pair(change(x.re), None if x.im is None else change(x.im))

    def conj(self, x: Pair[V]) -> Pair[V]:
        """The complex conjugate."""
        return Pair(x.re, None if x.im is None else self.a.scaled(x.im, -1.0))

    def add(self, x: Pair[V], y: Pair[V]) -> Pair[V]:
        """x + y, both real or both complex."""
        if x.im is None or y.im is None:
            return Pair(self.a.add(x.re, y.re), y.im if x.im is None else x.im)
        return Pair(self.a.add(x.re, y.re), self.a.add(x.im, y.im))

    def combined(self, x: Pair[V], y: Pair[V], multiply: Callable[[V, V], V]) -> Pair[V]:
        """A bilinear product of x and y."""
        if x.im is None:
            return Pair(multiply(x.re, y.re), None if y.im is None else multiply(x.re, y.im))
        if y.im is None:
            return Pair(multiply(x.re, y.re), multiply(x.im, y.re))
        a = self.a
        re = a.sub(multiply(x.re, y.re), multiply(x.im, y.im))
        return Pair(re, a.add(multiply(x.re, y.im), multiply(x.im, y.re)))

    def mul(self, x: Pair[V], y: Pair[V]) -> Pair[V]:
        """x·y, element by element."""
        return self.combined(x, y, self.a.mul)

    def matmul(self, x: Pair[V], y: Pair[V]) -> Pair[V]:
        """The matrix product."""
        return self.combined(x, y, self.a.matmul)

    def total(self, x: Pair[V]) -> Pair[V]:
        """Σ over the last axis, which goes away, in blocks."""
        a = self.a

        def summed(part: V) -> V:
            *outer, inner = a.shape(part)
            if inner > BLOCK and inner % BLOCK == 0:
                part = a.reshape(a.sum(a.reshape(part, (*outer, inner // BLOCK, BLOCK))), (*outer, -1))
            return a.reshape(a.sum(part), tuple(outer))

        return self.each(x, summed)

    def real_product(self, x: Pair[V], y: Pair[V]) -> V:
        """Re of the matrix product: one product of real matrices of twice the inner size."""
        if x.im is None or y.im is None:
            return self.a.matmul(x.re, y.re)
        left = joined([x.re, self.a.scaled(x.im, -1.0)], -1)
        return self.a.matmul(left, joined([y.re, y.im], -2))

    def axis(self, x: Pair[V], place: int) -> Pair[V]:
        """A new axis of length 1 before axis ``place`` (negative: counted after it is put in)."""

        def widened(part: V) -> V:
            shape = list(self.a.shape(part))
            shape.insert(place if place >= 0 else len(shape) + 1 + place, 1)
            return self.a.reshape(part, tuple(shape))

        return self.each(x, widened)


@dataclass(frozen=True, eq=False)
class Modes:
    """The parameters of the modes of every head as they are given: finite, (H, D) or (H, D, 2) pairs.

    Attributes:
        a: what a state is multiplied by each position; b: how it is written; c: how it is read.
    """

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor

    @property
    def complex(self) -> bool:
        """Whether they are pairs."""
        return self.a.dim() == 3

    def pair(self, arithmetic: Arithmetic[V], x: torch.Tensor) -> Pair[V]:
        """A tensor of pairs (…, 2), or of real numbers, of this call as a :class:`Pair`."""
        if not self.complex:
            return Pair(arithmetic.exact(x))
        return Pair(arithmetic.exact(x[..., 0]), arithmetic.exact(x[..., 1]))

    def stacked(self, arithmetic: Arithmetic[V], x: Pair[V]) -> V:
        """The inverse of :meth:`pair`."""
        if x.im is None:
            return x.re
        shape = (*arithmetic.shape(x.re), 1)
        return joined([arithmetic.reshape(part, shape) for part in (x.re, x.im)], -1)


def _squarings(arithmetic: Arithmetic[V], modes: Modes, count: int) -> list[Pair[V]]:
    """a^(2^k), k < count, each (H, D)."""
    if isinstance(arithmetic, EnclosureArithmetic):
        fine = ArbArithmetic(_SQUARES_BITS)
        return [cast("Pair[V]", _as_balls(fine, x)) for x in _squarings(fine, modes, count)]
    numbers = Numbers(arithmetic)
    found = [modes.pair(arithmetic, modes.a)]
    for _ in range(count - 1):
        found.append(numbers.mul(found[-1], found[-1]))
    return found


def _as_balls(fine: ArbArithmetic, x: Pair[Any]) -> Pair[Ball]:
    def ball(part: Any) -> Ball:
        found = fine.enclosure(part)
        known = found.value.isfinite() & found.radius.isfinite()
        return Ball(torch.where(known, found.value, 0.0), torch.where(known, found.radius, torch.inf))

    return Pair(ball(x.re), None if x.im is None else ball(x.im))


class StateKernel(Generic[V]):
    """Powers of a and the kernel for lags 0 to ``length``, padded to ``size`` = ``blocks``·``block``.

    Args:
        arithmetic: of the values.
        modes: the parameters.
        length: N; powers up to N are made.
    """

    def __init__(self, arithmetic: Arithmetic[V], modes: Modes, length: int) -> None:
        self.arithmetic, self.numbers, self.modes = arithmetic, Numbers(arithmetic), modes
        self.length, self.block = length, min(BLOCK, length + 1)
        self.blocks = -(-(length + 1) // self.block)
        self.size = self.blocks * self.block
        self.first = self.size - self.block  # of the last block
        self.squares = _squarings(arithmetic, modes, max(self.size.bit_length(), 1))
        self.b = modes.pair(arithmetic, modes.b)
        self.c = modes.pair(arithmetic, modes.c)
        self.low = self.power(torch.arange(self.block))
        self.high = self.power(torch.arange(self.blocks) * self.block)

    def power(self, exponents: torch.Tensor) -> Pair[V]:
        """a to each of ``exponents`` (int64 (n,), from 0 to ``size``), (H, D, n); 0⁰ = 1."""
        a, numbers = self.arithmetic, self.numbers
        heads, width = self.modes.a.shape[:2]
        one = a.exact(torch.ones(heads, width, len(exponents), dtype=torch.float64))
        zero = a.exact(torch.zeros(heads, width, len(exponents), dtype=torch.float64))
        found = Pair(one, zero if self.modes.complex else None)
        for k, square in enumerate(self.squares):
            here = (exponents >> k) % 2 == 1
            if not here.any():
                continue
            wide = numbers.axis(square, -1)
            factor = Pair(
                a.masked(a.add(zero, wide.re), here, 1.0),
                None if wide.im is None else a.masked(a.add(zero, wide.im), here, 0.0),
            )
            found = numbers.mul(found, factor)
        return found

    def powers(self) -> Pair[V]:
        """a⁰, a¹, …, (H, D, size)."""
        numbers, a = self.numbers, self.arithmetic
        outer = numbers.mul(numbers.axis(self.high, -1), numbers.axis(self.low, -2))
        return numbers.each(outer, lambda x: a.reshape(x, (*a.shape(x)[:2], self.size)))

    def kernel(self) -> V:
        """K_0, K_1, …, (H, size)."""
        numbers, a = self.numbers, self.arithmetic
        left = numbers.mul(numbers.axis(numbers.mul(self.b, self.c), -1), self.high)
        left = numbers.each(left, a.transpose)
        product = numbers.real_product(left, self.low)
        return a.reshape(product, (a.shape(product)[0], self.size))

    def columns(self, rows: torch.Tensor) -> int:
        """How many positions, in whole blocks, the last of ``rows`` (rising) reaches."""
        return min(-(-(int(rows[-1]) + 1) // self.block) * self.block, self.size)

    def toeplitz(self, kernel: V, rows: torch.Tensor, columns: int) -> V:
        """K_{t−s} for t in ``rows`` and s < ``columns``, 0 where s > t; (H, R, columns)."""
        a, size = self.arithmetic, self.size
        heads = a.shape(kernel)[0]
        turned = rearranged(kernel, lambda x: x[:, np.arange(size - 1, -1, -1)])
        # Row t is a window of the kernel turned round, with zeros after it.
        line = joined([turned, a.exact(torch.zeros(heads, columns, dtype=torch.float64))], -1)
        starts = (size - 1 - rows).numpy()  # one index in a tensor would be taken for a number by NumPy
        return rearranged(line, lambda x: _windows(x, columns)[:, starts])

    def written(self, u: torch.Tensor) -> Pair[V]:
        """Σ_i aⁱ u_i for u (B, H, size): (B, H, D)."""
        a, numbers = self.arithmetic, self.numbers
        batch, heads = u.shape[:2]
        cut = a.exact(u.reshape(batch, heads, self.blocks, self.block).mT)
        inner = numbers.each(self.low, lambda x: a.matmul(x, cut))  # (B, H, D, blocks)
        return numbers.total(numbers.mul(inner, self.high))

    def gradients(
        self, dkernel: V, extra: Pair[V] | None, powers: Pair[V]
    ) -> tuple[Pair[V], Pair[V], Pair[V]]:
        """da, db, dc (H, D) of the kernel's gradient (H, size), and of Σ conj(extra_i) aⁱ b (H, D, size)."""
        a, numbers = self.arithmetic, self.numbers
        wide = Pair(a.reshape(dkernel, (a.shape(dkernel)[0], 1, self.size)))
        asked = numbers.mul(wide, numbers.axis(numbers.conj(self.c), -1))
        if extra is not None:
            asked = numbers.add(asked, extra)
        turned = numbers.conj(powers)
        db = numbers.total(numbers.mul(turned, asked))
        dc = numbers.mul(numbers.conj(self.b), numbers.total(numbers.mul(turned, wide)))
        slopes = numbers.conj(self.slopes(powers))
        da = numbers.mul(numbers.conj(self.b), numbers.total(numbers.mul(slopes, asked)))
        return da, db, dc

    def slopes(self, powers: Pair[V]) -> Pair[V]:
        """i·aⁱ⁻¹ of powers aⁱ (H, D, size)."""
        a = self.arithmetic
        index = (np.arange(self.size) - 1).clip(min=0)
        times = a.exact(torch.arange(self.size, dtype=torch.float64))
        return self.numbers.each(powers, lambda x: a.mul(rearranged(x, lambda y: y[..., index]), times))
