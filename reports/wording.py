"""How numbers and counts are put into words, the same in every report.

A ratio is error over budget, without unit. What is not finite is written out ("NaN", "inf"), never hidden,
and ranks above every number: an error that cannot be measured is no small error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

__all__ = [
    "ABSENT",
    "count",
    "counted",
    "duration",
    "log10_clipped",
    "ratio",
    "severity",
    "shape_text",
    "worst",
]

ABSENT = "–"
"""Stands where there is no value to show."""

_NUMBER = re.compile(r"[-+]?\d+(?:[.\d]*\d)?(?:e[-+]?\d+)?", re.IGNORECASE)


def severity(value: float) -> tuple[int, float]:
    """A sort key under which NaN ranks above infinity and infinity above every number."""
    return (1, 0.0) if math.isnan(value) else (0, value)


def worst(values: Iterable[float | None]) -> float | None:
    """The largest of ``values`` under :func:`severity`, None passed over; None where nothing is left."""
    return max((value for value in values if value is not None), key=severity, default=None)


def ratio(value: float | None, digits: int = 3) -> str:
    """``0.0123``, ``4.10``, ``1.2e+06``, ``inf``, ``NaN``; None gives a dash.

    Plain notation between 1e-3 and 1e4, with ``digits`` significant digits; two in scientific notation.
    """
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def log10_clipped(value: float, low: float, high: float) -> float:
    """log10 of ``value`` held within [low, high]; zero gives ``low``, NaN and infinity give ``high``."""
    if math.isnan(value) or value == math.inf:
        return high
    if value <= 0:
        return low
    return min(high, max(low, math.log10(value)))


def count(number: int) -> str:
    """Thousands set apart by commas."""
    return f"{number:,}"


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 case``, ``2 cases``, ``no cases``."""
    return f"{count(number) if number else 'no'} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """``0.42 s``, ``12 s``, ``3 min 05 s``, ``2 h 07 min``; what is not finite is a dash."""
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shape_text(shape: dict[str, int]) -> str:
    """``B=1 H=2 N=128``."""
    return " ".join(f"{symbol}={size}" for symbol, size in shape.items())


def alike(text: str) -> str:
    """``text`` with its numbers taken out: reasons that differ in their figures alone are one reason."""
    return _NUMBER.sub("#", text)
