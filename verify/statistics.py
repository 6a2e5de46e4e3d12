"""Error over budget: per element, per row, over a whole output; and the thresholds that these are held to.

A ratio of 1 to the certain budget is a proof. Ratios to the probable budget are statistics: their thresholds
are fits to the tails of healthy kernels (``calibration``), stored as package data by family, output, dtype
and class of regime.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import msgspec
import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.families.base import Budget

__all__ = [
    "ANY_CLASS",
    "Deviation",
    "Thresholds",
    "deviation",
    "stored_thresholds",
    "threshold_key",
    "thresholds_for",
    "width_bin",
]

ANY_CLASS = "any"
# A signed mean counts only when it is this many of its standard errors from zero, in addition to its size.
_SIGNIFICANT = 6.0
# Independent roundings differ by some tenths of a probable budget, even where all go one way.
_ALIKE = 0.05


@dataclass(frozen=True, eq=False)
class Deviation:
    """How far an output is from its reference; float64, the output's shape, 0 where nothing is compared.

    Attributes:
        certain: |error| / certain, the reference's radius taken off the error.
        probable: signed error / probable, away from zero positive.
        compared: bool, elements that are compared numerically.
        nonfinite: bool, elements that should be finite and are not, or miss an infinity.
        misplaced: bool, elements of which one value is asked (0, nan, ±inf) and another came.
        beside: signed distance / probable from the exact result rounded to the output's dtype.
    """

    certain: torch.Tensor
    probable: torch.Tensor
    compared: torch.Tensor
    nonfinite: torch.Tensor
    misplaced: torch.Tensor
    beside: torch.Tensor

    @property
    def rms(self) -> float:
        """rms of error/probable over all compared elements; 0 for none."""
        return float((self.probable.square().sum() / self.compared.sum().clamp(min=1)).sqrt())

    @property
    def mean(self) -> float:
        """Mean of the signed error/probable over all compared elements; 0 for none."""
        return float(self.probable.sum() / self.compared.sum().clamp(min=1))

    @property
    def row_rms(self) -> torch.Tensor:
        """rms of error/probable over the last axis.

        Over single elements where rows have one. NaN where none.
        """
        square = self.probable.square()
        count = self.compared.sum(-1)
        return (square.sum(-1) / count.clamp(min=1)).sqrt().masked_fill(count == 0, torch.nan)


def deviation(got: torch.Tensor, reference: Enclosure, budget: Budget, row_axes: int) -> Deviation:
    """Compare ``got`` (the output's shape, any float dtype) with a certified reference.

    ``row_axes`` is the number of axes that index rows; an output with no axis beyond them has rows of one
    element, which are given an axis of length 1 here so that the last axis is always within a row.
    """
    g, value, radius = got.double(), reference.value, reference.radius
    literal = torch.zeros_like(budget.open)
    misplaced = torch.zeros_like(budget.open)
    for asked, where in budget.literal.items():
        literal = literal | where
        same = g.isnan() if math.isnan(asked) else g == asked
        misplaced = misplaced | (where & ~same)
    judged = ~budget.open & ~literal
    right_infinity = (g.abs() == torch.inf) & (g.sign() == value.sign())
    nonfinite = judged & budget.overflow & ~right_infinity
    expects_finite = judged & ~budget.overflow
    infinity_allowed = budget.either & right_infinity
    nonfinite = nonfinite | (expects_finite & ~g.isfinite() & ~infinity_allowed)
    compared = expects_finite & g.isfinite()
    error = torch.where(compared, g - value, 0.0)
    beyond = (error.abs() - torch.where(compared, radius, 0.0)).clamp(min=0.0)
    certain = _ratio(beyond, budget.certain)
    sign = torch.where(value == 0, 1.0, value.sign())
    probable = _ratio(beyond, budget.probable) * error.sign() * torch.where(compared, sign, 1.0)
    nearest = value.to(got.dtype).double()
    distance = torch.where(compared & nearest.isfinite(), g - nearest, 0.0)
    beside = _ratio(distance.abs(), budget.probable) * distance.sign() * torch.where(compared, sign, 1.0)
    result = (certain, probable, compared, nonfinite, misplaced, beside)
    if got.dim() == row_axes:
        result = tuple(tensor.unsqueeze(-1) for tensor in result)  # type: ignore[assignment]
    return Deviation(*result)


def _ratio(error: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """error / budget with 0/0 = 0 and x/0 = inf.

    Capped far above any threshold so that squares stay finite.
    """
    quotient = torch.where(error == 0, 0.0, error / budget.clamp(min=5e-324))
    return quotient.clamp(max=1e100)


class Thresholds(msgspec.Struct, frozen=True):
    """What healthy kernels stay below, for one family, output, dtype and class of regime.

    Attributes:
        row: largest row rms of error/probable in a case; output: rms over an output; bias: size of the signed
            mean.
        cases: number of cases behind the fit.
        intervals: by statistic, the 95 % interval of its estimate and the largest value seen (``tails``).
    """

    row: float
    output: float
    bias: float
    cases: int = 0
    intervals: dict[str, tuple[float, float, float]] = {}

    def biased(self, deviation: Deviation) -> bool:
        """Whether the signed mean is both larger than healthy kernels' and significant over the rows.

        Rows that are equal, as under a broadcast view, are one: only distinct means count, and eight of them.
        Exact results that coincide (equal weights) are all rounded alike to the output's dtype: the mean must
        therefore be as large about the rounded exact results, from which such a rounding does not stray.
        Errors that are all alike are one error, such as that of a scaled query that all rows share.
        """
        rows = deviation.row_rms.isfinite()
        elements = deviation.compared.sum(-1).clamp(min=1)
        means = (deviation.probable.sum(-1) / elements)[rows]
        count = len(set(means.tolist()))
        alike = float(deviation.probable[deviation.compared].std(correction=0)) < _ALIKE
        if count < 8 or alike:
            return False
        mean, spread = float(means.mean()), float(means.std())
        beside = float((deviation.beside.sum(-1) / elements)[rows].mean())
        large = min(abs(mean), abs(beside)) > self.bias and mean * beside > 0
        return large and abs(mean) * math.sqrt(count) > _SIGNIFICANT * max(spread, 1e-300)


def width_bin(width: int) -> str:
    """Bins of the number of elements in a row: the rms of few elements varies more, of one as its error."""
    if width < 2:
        return "single"
    return "narrow" if width < 8 else "wide"


@functools.cache
def stored_thresholds() -> Mapping[str, Thresholds]:
    """The committed thresholds by key (:func:`threshold_key`)."""
    text = resources.files("attnproof.data").joinpath("thresholds.json").read_bytes()
    stored: dict[str, Thresholds] = msgspec.json.decode(text, type=dict[str, Thresholds])
    return stored


def threshold_key(family: str, output: str, dtype: str, regime_class: str, width: int) -> str:
    """The name under which thresholds are stored."""
    return f"{family}/{output}/{dtype}/{regime_class}/{width_bin(width)}"


def thresholds_for(family: str, output: str, dtype: str, regime_class: str, width: int) -> Thresholds | None:
    """The stored thresholds, or None where nothing was calibrated (float64): then only certain budgets judge.

    Classes with too few cases for a fit of their own are held to that of all classes together.
    """
    stored = stored_thresholds()
    own = stored.get(threshold_key(family, output, dtype, regime_class, width))
    return own or stored.get(threshold_key(family, output, dtype, ANY_CLASS, width))
