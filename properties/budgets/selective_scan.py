"""Errors of computed step sizes, and of what a selective scan makes of them.

With x = delta + bias, rounded once, and δ = softplus(x): d log δ = σ(x)/softplus(x) dx, which is at most 1,
and 1/x for large x. A kernel takes e^x or e^−|x| (2|x|u for the argument, the declared ulps), log(1 + ·) of
it, and a sum. Below x = −87 the exponential is subnormal and may be flushed, an absolute error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnproof.properties.budgets.additive_state import ComputedErrors
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth

__all__ = ["StepSizeErrors"]

# Below this |A| the derivative of (e^(δA) − 1)/A by A has to be taken without its own quotient.
_SMALLEST_DIVISOR = 2.0**-12
# Steps of float32 that pass through subnormal exponentials, which hardware flushes (theory.md HW-1).
_TINY = 2.0**-124


@dataclass(frozen=True, eq=False)
class StepSizeErrors:
    """Relative errors, float64, (B, H, N, 1) or (B, H, N, D).

    Attributes:
        steps, weights, gates: of δ, w and δ A; slope: of σ(x); growth: of e^(δA).
        curve: absolute error of ∂w/∂A over δ, (1, H, 1, D); plain: δ.
        tiny: absolute error of what is subnormal; summed: 1 + the relative error of sums of gradients.
        unit: unit roundoff.
    """

    steps: torch.Tensor
    weights: torch.Tensor
    gates: torch.Tensor
    slope: torch.Tensor
    growth: torch.Tensor
    curve: torch.Tensor
    plain: torch.Tensor
    tiny: float
    summed: float
    unit: float

    @classmethod
    def of(
        cls, r: Roundings, raw: torch.Tensor, A: torch.Tensor, *, biased: bool, smooth: bool, zoh: bool
    ) -> StepSizeErrors:
        """For x = ``raw`` (B, H, N, 1) and ``A`` (1, H, 1, D).

        Args:
            r: the roundings.
            raw, A: float64.
            biased: whether x is a rounded sum; smooth: whether it goes through softplus.
            zoh: whether weights are quotients.
        """
        u = r.elementwise
        if smooth:
            plus = torch.nn.functional.softplus(raw, threshold=40.0)
            slope = torch.where(raw < -30.0, 1.0, torch.sigmoid(raw) / plus.clamp(min=1e-300))
            moved = (2.0 + float(biased)) * u * raw.abs() + r.exp
            steps, slopes = slope * moved + 6.0 * u, torch.sigmoid(-raw) * moved + 4.0 * u
        else:
            plus, slopes = raw.clamp(min=0.0), torch.zeros_like(raw)
            steps = torch.full_like(raw, u * float(biased))
        gates = steps + 2.0 * u
        count = float(raw.shape[0] * raw.shape[2] + raw.shape[1])
        return cls(
            steps=steps,
            weights=gates if not zoh else gates + r.exp + 8.0 * u,
            gates=gates,
            slope=slopes,
            growth=(plus * A.abs()) * (gates + 2.0 * u) + r.exp,
            curve=8.0 * (u + r.exp / 4.0) / A.abs().clamp(min=_SMALLEST_DIVISOR),
            tiny=_TINY if u > 2.0**-40 else 2.0**-1020,
            plain=plus,
            summed=1.0 + float(growth(count, r.accumulate)),
            unit=u,
        )

    def computed(self, k: torch.Tensor, g: torch.Tensor, *, factor: float) -> ComputedErrors:
        """Mean squares, where k (B, H, N, D) is large; of gates ``g`` where their decay is not 0 anyway."""
        weight = k.square().sum(-1, keepdim=True)
        total = float(weight.sum())
        rounding = 2.0 * self.unit
        fixed = float((weight * self.steps.square()).sum()) / total if total else 0.0
        sizes = (g.clamp(min=-1.0) * self.gates).square()
        moving = float(sizes.mean()) if sizes.numel() else 0.0
        return ComputedErrors(
            factor=factor, fixed=MEAN_SQUARE * (fixed + rounding**2), moving=MEAN_SQUARE * moving
        )

    def sized(
        self,
        name: str,
        size: torch.Tensor,
        cut: Callable[[torch.Tensor], torch.Tensor],
        power: int,
    ) -> torch.Tensor:
        """A factor of a gradient (…, n, ·) with its errors: "steps", "weights", "slope", "growth", "curve".

        Args:
            name: which.
            size: its size; cut: puts a tensor of this class into the same blocks.
            power: 1 for all its error, 2 for what outweighs ordinary roundings.
        """
        if name == "curve":
            # A difference of two terms of size δ/|A|.
            return size + (self.curve if power == 1 else self.curve / (8.0 * self.unit))[:, :, None] * cut(
                self.plain
            )
        if power == 2 or name in ("A", "B"):
            return size
        relative: torch.Tensor = getattr(self, name)
        return size * (1.0 + cut(relative)) + (self.tiny if name in ("steps", "weights", "slope") else 0.0)
