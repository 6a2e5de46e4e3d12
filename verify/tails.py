"""How far a healthy statistic reaches: the tail of a sample, extrapolated, with the interval of the estimate.

An error is a sum of many independent bounded roundings, so that its tail is at most Gaussian (Hoeffding's
inequality), and the tail of its square, of a mean of squares, and of the largest of many such is at most
exponential: P(x² > s) falls at least as fast as e^(−s/β). Excesses of x² above a high quantile t of the
sample are therefore taken as exponential with mean β (peaks over threshold with shape 0), and the value that
one case in 1/p passes is

    T² = t + β · ln((1 − F(t)) / p).

Since 2 n β̂ / β has a χ² distribution with 2n degrees of freedom for n excesses of mean β̂, a central interval
of β, and with it of T, is exact however few they are. The threshold is the interval's upper end, so that a
small sample gives a high threshold. A sample may mix regimes of which a few have a heavier tail than the
rest; it then shows only above a higher quantile, and the largest upper end over several of them counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import chi2

__all__ = ["PER_CASE", "Tail", "tail"]

PER_CASE = 1e-6
"""Share of healthy cases that may pass a threshold."""

_QUANTILES = (0.8, 0.9, 0.95, 0.98, 0.99)
# A quantile above the first is tried with at least so many excesses: fewer say little of β.
_EXCESSES = 24
_CONFIDENCE = 0.95
# An extrapolation that ends nearer than this above the largest value seen is not trusted.
_BEYOND = 1.25


@dataclass(frozen=True)
class Tail:
    """A threshold, and the interval of the estimate from which it comes.

    Attributes:
        threshold: what the judge uses: the upper end, or 1.25 times the largest value seen if that is more.
        low, high: central 95 % interval of T at the quantile that gave the largest upper end.
        largest: the largest value of the sample.
    """

    threshold: float
    low: float
    high: float
    largest: float


def tail(values: Sequence[float]) -> Tail:
    """The tail of a sample of non-negative values.

    Raises:
        ValueError: for an empty sample.
    """
    if not values:
        raise ValueError("values is empty: a tail needs a sample")
    ordered = sorted(values)
    largest = ordered[-1]
    low, high = _interval(ordered, _QUANTILES[0])
    for quantile in _QUANTILES[1:]:
        if (1.0 - quantile) * len(ordered) >= _EXCESSES:
            low, high = max((low, high), _interval(ordered, quantile), key=lambda ends: ends[1])
    return Tail(max(high, _BEYOND * largest), low, high, largest)


def _interval(ordered: Sequence[float], quantile: float) -> tuple[float, float]:
    """The interval of T from the excesses over one quantile of a sample in ascending order."""
    base = ordered[int(quantile * (len(ordered) - 1))] ** 2
    excesses = [value**2 - base for value in ordered if value**2 > base]
    if not excesses:
        return math.sqrt(base), math.sqrt(base)
    total, count = sum(excesses), len(excesses)
    reach = math.log(count / len(ordered) / PER_CASE)
    ends = (chi2.ppf(0.5 + side * _CONFIDENCE / 2.0, 2 * count) for side in (1.0, -1.0))
    low, high = (math.sqrt(base + 2.0 * total / float(end) * reach) for end in ends)
    return low, high
