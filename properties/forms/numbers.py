"""Numbers for the forms: random rationals, Gaussian and dual numbers, numbers that count or hold degrees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.forms.base import Array, each

__all__ = [
    "GENERIC_BITS",
    "Counted",
    "Degree",
    "Dual",
    "Gaussian",
    "Tally",
    "counted",
    "generic",
    "rationals",
    "slopes",
]

GENERIC_BITS: Final = 96
"""Each entry of a generic point is drawn from 2 to this power values, or more."""


def rationals(
    rng: np.random.Generator,
    *shape: int,
    low: int = -12,
    high: int = 12,
    denominator: int = 7,
    bits: int = 0,
) -> Array:
    """Random fmpq between low/denominator and high/denominator.

    Args:
        bits: 0: numerators are the integers low … high, which can be redone by hand. Else a multiple of 8:
            numerators are the (high − low)·2^bits multiples of 2^−bits from low to below high.
    """
    if not bits:
        return each(lambda x: flint.fmpq(int(x), denominator), rng.integers(low, high + 1, shape))

    def finer(x: Any) -> flint.fmpq:
        part = int.from_bytes(rng.bytes(bits // 8), "little")
        return flint.fmpq((int(x) << bits) + part, denominator << bits)

    return each(finer, rng.integers(low, high, shape))


def generic(
    rng: np.random.Generator, *shape: int, low: int = -12, high: int = 12, denominator: int = 7
) -> Array:
    """:func:`rationals` on which identities are tested, from :data:`GENERIC_BITS` bits.

    A polynomial of degree d that is not 0 vanishes at such a point with probability at most d/2^96
    (Schwartz–Zippel), so a false identity of rational functions all but never passes.
    """
    return rationals(rng, *shape, low=low, high=high, denominator=denominator, bits=GENERIC_BITS)


class _Number:
    """Operators from sums, products and quotients. With an array, the array's own take each entry."""

    @classmethod
    def of(cls, x: Any) -> Any:
        """x itself, or the number that a plain x stands for."""
        return x if isinstance(x, cls) else cls(x)  # type: ignore[call-arg]

    def plus(self, other: Any) -> Any:
        raise NotImplementedError

    def times(self, other: Any) -> Any:
        raise NotImplementedError

    def over(self, other: Any) -> Any:
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, np.ndarray) else self.plus(self.of(other))

    def __mul__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, np.ndarray) else self.times(self.of(other))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Any:
        return self.times(self.of(-1))

    def __sub__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, np.ndarray) else self.plus(-self.of(other))

    def __rsub__(self, other: Any) -> Any:
        return self.of(other).plus(-self)

    def __truediv__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, np.ndarray) else self.over(self.of(other))

    def __rtruediv__(self, other: Any) -> Any:
        return self.of(other).over(self)


@dataclass(frozen=True)
class Gaussian(_Number):
    """re + i·im over any field of numbers; ``abs`` is the larger component in absolute value."""

    re: Any
    im: Any = 0

    def plus(self, other: Gaussian) -> Gaussian:
        return Gaussian(self.re + other.re, self.im + other.im)

    def times(self, other: Gaussian) -> Gaussian:
        re = self.re * other.re - self.im * other.im
        return Gaussian(re, self.re * other.im + self.im * other.re)

    def over(self, other: Gaussian) -> Gaussian:
        norm = other.re * other.re + other.im * other.im
        return self.times(Gaussian(other.re / norm, -other.im / norm))

    def __abs__(self) -> Any:
        return max(abs(self.re), abs(self.im))


@dataclass(frozen=True)
class Dual(_Number):
    """value + ε·slope with ε² = 0: a form run over these gives its exact derivative along with its value.

    Ordered by value: where two values are equal a maximum has no derivative, and none is claimed.
    """

    value: Any
    slope: Any = 0

    def plus(self, other: Dual) -> Dual:
        return Dual(self.value + other.value, self.slope + other.slope)

    def times(self, other: Dual) -> Dual:
        return Dual(self.value * other.value, self.value * other.slope + self.slope * other.value)

    def over(self, other: Dual) -> Dual:
        quotient = self.value / other.value
        return Dual(quotient, (self.slope - quotient * other.slope) / other.value)

    def __lt__(self, other: Any) -> bool:
        return bool(self.value < self.of(other).value)

    def __gt__(self, other: Any) -> bool:
        return bool(self.value > self.of(other).value)

    def __abs__(self) -> Dual:
        return -self if self.value < 0 else self


def slopes(x: Array) -> Array:
    """The derivatives held by an array of dual numbers (constants have 0)."""
    return each(lambda entry: Dual.of(entry).slope, x)


@dataclass
class Tally:
    """Operations counted so far."""

    products: int = 0
    sums: int = 0


@dataclass(frozen=True)
class Counted(_Number):
    """A number without a value that counts the products, quotients and sums it takes part in."""

    tally: Tally = field(repr=False)

    def plus(self, other: Any) -> Counted:
        self.tally.sums += 1
        return self

    def times(self, other: Any) -> Counted:
        self.tally.products += 1
        return self

    over = times

    def __sub__(self, other: Any) -> Any:
        return self + other

    __rsub__ = __sub__


def counted(tally: Tally, *shape: int) -> Array:
    """An array of numbers that count on ``tally``."""
    return each(lambda _: Counted(tally), np.empty(shape, dtype=object))


@dataclass(frozen=True)
class Degree(_Number):
    """Bounds on the degrees of a quotient of polynomials, brought to common denominators as they come.

    A form run over these gives the degree that :func:`generic`'s probability needs. Numbers are constants.
    """

    numerator: int = 0
    denominator: int = 0

    @classmethod
    def of(cls, x: Any) -> Degree:
        """x itself, or a constant's degrees."""
        return x if isinstance(x, cls) else cls()

    def plus(self, other: Degree) -> Degree:
        ends = (self.numerator + other.denominator, other.numerator + self.denominator)
        return Degree(max(ends), self.denominator + other.denominator)

    def times(self, other: Degree) -> Degree:
        return Degree(self.numerator + other.numerator, self.denominator + other.denominator)

    def over(self, other: Degree) -> Degree:
        return self.times(Degree(other.denominator, other.numerator))
