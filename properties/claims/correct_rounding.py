"""Arithmetic in which every operation is rounded correctly to a small format, on float64 tensors of numbers.

The checks of rounding-error bounds run their algorithms over this and over :class:`Traced`, which counts the
same roundings to first order. A result is rounded to nearest, ties to even, with gradual underflow and
overflow to infinity, after *every* operation and nowhere else: no fused operations, no wider accumulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import flint
import numpy as np
from numpy.typing import NDArray

from attnproof.properties.arithmetic.balls import _precision

__all__ = ["BF16", "FORMATS", "FP16", "FP32", "Floats", "Format", "Operations", "Rounded", "summed"]

Floats = NDArray[np.float64]
V = TypeVar("V")

# NumPy's float64 exp, log and log1p are taken to be within 8 units of 2^-53 of the exact value; where both
# ends of that bracket do not round alike, Arb decides.
_BRACKET = 2.0**-50


class Operations(Protocol[V]):
    """What the algorithms of a row of logits need."""

    def add(self, a: V, b: V) -> V:
        """a + b."""

    def sub(self, a: V, b: V) -> V:
        """a − b."""

    def div(self, a: V, b: V) -> V:
        """a / b."""

    def exp(self, a: V) -> V:
        """e^a."""

    def log(self, a: V) -> V:
        """Natural logarithm of a."""

    def log1p(self, a: V) -> V:
        """Natural logarithm of 1 + a."""


def summed(terms: Sequence[V], r: Operations[V]) -> V:
    """The terms added from left to right.

    Raises:
        ValueError: there are none.
    """
    if not terms:
        raise ValueError("a sum needs at least one term")
    total = terms[0]
    for term in terms[1:]:
        total = r.add(total, term)
    return total


@dataclass(frozen=True)
class Format:
    """A binary format: ``precision`` significant bits, exponents from ``lowest`` (normal) to ``highest``."""

    name: str
    precision: int
    lowest: int
    highest: int

    @property
    def u(self) -> float:
        """Unit roundoff 2^−precision."""
        return 2.0**-self.precision

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return 2.0**self.highest * (2.0 - 2.0 ** (1 - self.precision))

    @property
    def smallest(self) -> float:
        """The smallest positive number, subnormal."""
        return 2.0 ** (self.lowest - self.precision + 1)

    def rounded(self, x: Any) -> Floats:
        """Numbers nearest to the float64 x in this format, ties to even; any shape."""
        x = np.asarray(x, dtype=np.float64)
        _, exponent = np.frexp(np.where(np.isfinite(x), x, 0.0))
        quantum = np.maximum(exponent - 1, self.lowest) - (self.precision - 1)
        with np.errstate(invalid="ignore", over="ignore"):
            y = np.ldexp(np.rint(np.ldexp(x, -quantum)), quantum)
        return np.asarray(np.where(np.abs(y) > self.largest, np.copysign(np.inf, y), y))

    def between(self, low: float, high: float) -> Floats:
        """All numbers of this format in [low, high], 0 < low ≤ high both normal, ascending."""
        grids = []
        for exponent in range(int(np.frexp(low)[1]) - 1, int(np.frexp(high)[1])):
            steps = np.arange(2.0 ** (self.precision - 1), 2.0**self.precision)
            grids.append(np.ldexp(steps, exponent - self.precision + 1))
        grid = np.concatenate(grids)
        return np.asarray(grid[(grid >= low) & (grid <= high)], dtype=np.float64)


FP16: Final = Format("fp16", 11, -14, 15)
BF16: Final = Format("bf16", 8, -126, 127)
FP32: Final = Format("fp32", 24, -126, 127)
FORMATS: Final = (FP16, BF16, FP32)


class Rounded(Operations[Floats]):
    """:class:`Operations` on float64 tensors of a format's numbers.

    Sums, differences and quotients are rounded to float64 first: harmless from 2p + 2 ≤ 53 bits on
    (Figueroa, ACM SIGNUM 30(3), 1995). Exponentials and logarithms are correct by a bracket and, where that
    does not settle them, by Arb.
    """

    def __init__(self, form: Format) -> None:
        self.format = form

    def add(self, a: Floats, b: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            return self.format.rounded(a + b)

    def sub(self, a: Floats, b: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            return self.format.rounded(a - b)

    def mul(self, a: Floats, b: Floats) -> Floats:
        """a · b."""
        with np.errstate(invalid="ignore"):
            return self.format.rounded(a * b)

    def div(self, a: Floats, b: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.format.rounded(np.divide(a, b))

    def exp(self, a: Floats) -> Floats:
        return self._function(a, np.exp, lambda x: x.exp())

    def log(self, a: Floats) -> Floats:
        return self._function(a, np.log, lambda x: x.log())

    def log1p(self, a: Floats) -> Floats:
        return self._function(a, np.log1p, lambda x: x.log1p())

    def _function(self, a: Floats, quick: Callable[[Floats], Floats], proved: Callable[[Any], Any]) -> Floats:
        with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
            centre = np.asarray(quick(np.asarray(a, dtype=np.float64)))
            below = self.format.rounded(centre - np.abs(centre) * _BRACKET)
            above = self.format.rounded(centre + np.abs(centre) * _BRACKET)
        out = np.where(np.isfinite(centre), below, centre)
        unsettled = np.isfinite(centre) & (below != above)
        for place in zip(*np.nonzero(unsettled), strict=True):
            out[place] = self._settled(float(a[place]), float(below[place]), float(above[place]), proved)
        return out

    def _settled(self, x: float, below: float, above: float, proved: Callable[[Any], Any]) -> float:
        """Which of two neighbours is nearest to the exact value: never a tie, the value is transcendental."""
        largest = 2.0 ** (self.format.highest + 1)
        middle = (below + (above if np.isfinite(above) else largest)) / 2
        for bits in (128, 512, 2048):
            with _precision(bits):
                value = proved(flint.arb(x))
                if value > middle:
                    return above
                if value < middle:
                    return below
        raise ArithmeticError(f"2048 bits do not tell on which side of {middle!r} the value at {x!r} lies")
