"""Floating-point formats of few digits, exactly: rationals rounded to nearest or towards zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import flint
import numpy as np
import numpy.typing as npt

__all__ = ["BFLOAT16", "E4M3", "E5M2", "FLOAT16", "FLOAT32", "Floats", "Format", "exponent"]

Floats = npt.NDArray[np.float64]


def exponent(x: Any) -> int:
    """⌊log₂|x|⌋ of a nonzero rational, exactly."""
    x = abs(flint.fmpq(x))
    guess = int(x.p.height_bits()) - int(x.q.height_bits())
    return guess if flint.fmpq(2) ** guess <= x else guess - 1


@dataclass(frozen=True)
class Format:
    """Binary numbers of ``digits`` significant digits, the least normal exponent, the largest number.

    Results beyond the largest saturate, as conversions on NVIDIA GPUs to 8-bit formats do.
    """

    name: str
    digits: int
    least: int
    largest: flint.fmpq

    def step(self, x: Any) -> flint.fmpq:
        """Distance of the format's numbers around the nonzero x."""
        return flint.fmpq(2) ** (max(exponent(x), self.least) - self.digits + 1)

    def nearest(self, x: Any) -> flint.fmpq:
        """x rounded to nearest, ties to even."""
        number = flint.fmpq(x)
        if number == 0:
            return number
        step = self.step(number)
        steps = abs(number) / step
        low = steps.floor()
        rest = steps - low
        half = flint.fmpq(1, 2)
        whole = low + (1 if rest > half or (rest == half and int(low) % 2) else 0)
        size: flint.fmpq = min(whole * step, self.largest)
        return size if number > 0 else -size

    def truncated(self, x: Any) -> flint.fmpq:
        """x rounded towards zero."""
        number = flint.fmpq(x)
        if number == 0:
            return number
        step = self.step(number)
        size: flint.fmpq = min((abs(number) / step).floor() * step, self.largest)
        return size if number > 0 else -size

    def positives(self) -> list[flint.fmpq]:
        """Every positive number of the format, in order; for formats of a few bits."""
        numbers, x = [], flint.fmpq(2) ** (self.least - self.digits + 1)
        while x <= self.largest:
            numbers.append(x)
            x += self.step(x)
        return numbers

    def array(self, x: Floats) -> Floats:
        """:meth:`nearest` of float64 numbers, exactly, for formats of at most 26 digits."""
        _, powers = np.frexp(x)
        steps = np.ldexp(1.0, np.maximum(powers - 1, self.least) - self.digits + 1)
        largest = float(self.largest.p) / float(self.largest.q)
        rounded: Floats = np.clip(np.rint(x / steps) * steps, -largest, largest)
        return rounded


def _largest(digits: int, top: int) -> flint.fmpq:
    return (2 - flint.fmpq(2) ** (1 - digits)) * flint.fmpq(2) ** top


E4M3: Final = Format("e4m3", 4, -6, flint.fmpq(448))
E5M2: Final = Format("e5m2", 3, -14, _largest(3, 15))
BFLOAT16: Final = Format("bfloat16", 8, -126, _largest(8, 127))
FLOAT16: Final = Format("float16", 11, -14, _largest(11, 15))
FLOAT32: Final = Format("float32", 24, -126, _largest(24, 127))
