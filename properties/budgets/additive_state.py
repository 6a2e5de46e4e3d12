"""Budgets of linear, gated linear and RWKV-6 attention and RetNet: closed forms, not a replay of steps.

Every output and gradient of these families is a sum of products Π x, each multiplied by the decays of the
positions that it crosses. A kernel multiplies each term by (1 + δ), where |δ| is at most, whatever its form:

* for each position crossed by a state: the rounding of a product and of a sum, of the state's storage, and
  the decay's own error, a declared number of ulps and 2|g|u for its argument;
* for each gate crossed, as part of a cumulative sum over a chunk of up to 128 positions and of differences of
  such: (128 + 8) u |g|; and, for gates up to 127 positions before the term's first one, which the difference
  of two cumulative sums has to cancel, 2·128 u |g| (none for a term that crosses no position);
* for operands, probabilities and the state as an operand, the roundings of the declared formats, and
  γ_n for the dot products over channels and over the positions of a chunk.

So the sum of |terms| with every decay raised by these relative errors, less the sum itself, bounds the error:
two evaluations of the definition on absolute values. The variance takes the same sources in quadrature over
squares of terms. Terms that agree err alike: where they do, their sum is as large as Σ|terms|, and its square
is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth

__all__ = ["CHUNK", "ComputedErrors", "GateErrors", "Runs", "StepErrors", "estimate"]

CHUNK = 128
"""Positions over which a kernel is allowed to sum gates, or products of operands, in one go."""

# e to more than this is beyond any budget, and e^709 the end of float64.
_LARGEST_EXPONENT = 600.0
# A gate below this has no effect on anything: e^−10⁶ = 0 in every format. Sums of them keep their digits.
_SMALLEST_GATE = -1e6


@dataclass(frozen=True)
class ComputedErrors:
    """What the computation of operands and gates from the inputs adds to the errors of a term.

    Attributes:
        rounded: how many more factors are rounded operands.
        factor: 1 + their relative error where it is the same everywhere.
        fixed, moving: mean square relative errors, of a term and for each position crossed.
    """

    rounded: int = 0
    factor: float = 1.0
    fixed: float = 0.0
    moving: float = 0.0


@dataclass(frozen=True)
class StepErrors:
    """Relative errors of one term.

    Attributes:
        step: for each position crossed; gate: for each unit of |g| crossed; before: for each unit of |g| in
            the chunk before the term.
        factor: 1 + the relative error of everything else.
        fixed, moving: mean square relative errors of the operands, and for each position crossed.
        shared: root mean square relative error for each position crossed that is the same everywhere.
        unit: unit roundoff outside products.
    """

    step: float
    gate: float
    before: float
    factor: float
    fixed: float
    moving: float
    shared: float
    unit: float

    @classmethod
    def of(
        cls, r: Roundings, *, gated: bool, rounded: int, stored: float, feature: float, terms: int
    ) -> StepErrors:
        """The errors of a kernel with roundings ``r``.

        Args:
            r: the roundings.
            gated: whether decays are exponentials of gates (and not powers of a constant, or 1).
            rounded: how many factors of a term are rounded operands.
            stored: unit roundoff of the weights as they are stored.
            feature: relative error of the features in a term, together.
            terms: of the longest sum that a kernel may take in one go, channels and positions.
        """
        u, acc = r.elementwise, r.accumulate
        stored = max(stored, r.operand)
        held = r.storage("state")[0]
        state = held if held > acc else 0.0
        factor = (1.0 + r.operand) ** rounded * (1.0 + stored) * (1.0 + r.input) ** 3
        factor *= (1.0 + u) ** 6 * (1.0 + r.exp) ** 3 * (1.0 + feature)
        # The state is stored once more than it crosses positions: with the term's own write.
        factor *= (1.0 + float(growth(float(terms), acc))) * (1.0 + state)
        operands = (
            (rounded + 1.0) * r.operand**2 + stored**2 + 3.0 * r.input**2 + 9.0 * u**2 + feature**2 + state**2
        )
        return cls(
            step=u + acc + (r.exp if gated else 2.0 * u) + state,
            gate=(CHUNK + 8.0) * u,
            before=2.0 * CHUNK * u if gated else 0.0,
            factor=factor,
            fixed=MEAN_SQUARE * operands + (r.exp**2 / 3.0 if gated else 0.0),
            moving=MEAN_SQUARE * (u**2 + acc**2 + state**2) + (r.exp**2 / 3.0 if gated else 0.0),
            shared=(u if gated else 0.25 * u) + (acc if r.truncated else 0.0),
            unit=u,
        )


@dataclass(frozen=True, eq=False)
class GateErrors:
    """Gates raised by the errors of decays.

    Attributes:
        raised: the gates with the relative errors of each position, (…, N, W).
        sums: Σ|g| over each position and the 127 before it, (…, N, W).
        before: factor of a term that starts at a position and crosses another, (…, N, W).
    """

    raised: torch.Tensor
    sums: torch.Tensor
    before: torch.Tensor

    @classmethod
    def of(cls, g: torch.Tensor, errors: StepErrors) -> GateErrors:
        """For gates ``g`` ≤ 0, (B, H, N, W) float64."""
        size = g.clamp(min=_SMALLEST_GATE).abs()
        raised = g + errors.step + errors.gate * size
        if not errors.before or not g.numel():
            return cls(raised, torch.zeros_like(g), torch.ones_like(g))
        batch, heads, length, width = g.shape
        lines = size.movedim(2, 3).reshape(1, batch * heads * width, length)
        window = torch.nn.functional.avg_pool1d(
            torch.nn.functional.pad(lines, (CHUNK - 1, 0)), CHUNK, stride=1
        )
        sums = (window * CHUNK).reshape(batch, heads, width, length).movedim(3, 2)
        return cls(raised, sums, (errors.before * sums).clamp(max=_LARGEST_EXPONENT).exp())


@dataclass(frozen=True, eq=False)
class Runs:
    """One output by its definition, evaluated on changed operands; float64 tensors of one shape.

    Attributes:
        actual: as it is; absolute: of absolute values; raised: of these with raised decays.
        squares: of squares; crossed: their sum weighted with the number of positions that each crosses.
        cancelled: their sum weighted with the square of Σ|g| before each, where one crosses a position.
    """

    actual: torch.Tensor
    absolute: torch.Tensor
    raised: torch.Tensor
    squares: torch.Tensor
    crossed: torch.Tensor
    cancelled: torch.Tensor


def estimate(
    runs: Runs,
    errors: StepErrors,
    r: Roundings,
    tiny: torch.Tensor | float,
    healthy: torch.Tensor | float | None = None,
) -> Estimate:
    """Value and errors of one output.

    Args:
        runs: its evaluations.
        errors, r: relative errors of its terms, and the roundings.
        tiny: absolute error by underflow; healthy: of kernels that make use of fewer formats.
    """
    certain = runs.raised * errors.factor - runs.absolute
    certain = certain.clamp(min=0.0) + tiny
    square = runs.actual.square()
    if square.dim() and square.shape[-1]:
        square = torch.maximum(square, square.mean(-1, keepdim=True))
    agreeing = runs.squares + square
    steps = 1.0 + runs.crossed / runs.squares.clamp(min=1e-300)
    variance = agreeing * (errors.fixed + errors.moving * steps + (errors.shared * steps).square())
    variance = variance + errors.unit**2 * runs.cancelled
    variance = variance + torch.as_tensor(tiny if healthy is None else healthy).square() / 12.0
    lost = runs.absolute * errors.factor + certain >= r.largest / 2.0
    certain = certain.nan_to_num(torch.inf, torch.inf)
    return Estimate(runs.actual, certain, variance.nan_to_num(1e300, 1e300), lost | ~certain.isfinite())
