"""Gradients as a problem of their own: the outputs are "d" + the name of an input.

A family gives its closed-form backward formulas over the abstract arithmetic (``Problem.differentiate``) and
what a kernel's roundings make of them (``Problem.gradient_estimates``); everything else is common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.stored import stored_budget
from attnproof.properties.contract import Contract
from attnproof.properties.families.base import Budget, Problem

__all__ = ["GradientProblem", "heads_together", "reduced"]


def heads_together(a: Arithmetic[V], x: V, groups: int) -> V:
    """(B, H, M, X) as (B, G, H/G·M, X): the rows of all query heads that share a key/value head."""
    batch, heads, rows, width = a.shape(x)
    return a.reshape(x, (batch, groups, heads // max(groups, 1) * rows, width))


def reduced(a: Arithmetic[V], x: V, shape: tuple[int, ...]) -> V:
    """Σ of x over the axes along which a tensor of ``shape`` was broadcast to x's shape."""
    full = a.shape(x)
    padded = (1,) * (len(full) - len(shape)) + tuple(shape)
    lost = tuple(axis for axis, (kept, size) in enumerate(zip(padded, full, strict=True)) if kept != size)
    if not lost:
        return a.reshape(x, tuple(shape))
    kept_axes = tuple(axis for axis in range(len(full)) if axis not in lost)
    moved = a.permute(x, (*kept_axes, *lost))
    rows = tuple(full[axis] for axis in kept_axes)
    terms = math.prod(full[axis] for axis in lost)
    return a.reshape(a.sum(a.reshape(moved, (*rows, terms))), tuple(shape))


@dataclass(frozen=True, eq=False)
class GradientProblem(Problem):
    """The gradients of Σ outputs·cotangents of a problem by its inputs.

    Attributes:
        problem: the forward problem; forward: its certified outputs.
        cotangents: by output, finite, of the output's shape.
    """

    problem: Problem
    forward: Mapping[str, Enclosure]
    cotangents: Mapping[str, torch.Tensor]

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """One for each differentiated input, "d" + its name."""
        return tuple(f"d{name}" for name in self.problem.differentiated)

    @property
    def row_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """One unit: every gradient of a key may depend on every row."""
        return (1,)

    def row_axes(self, output: str) -> int:
        """All but the last axis; the only one of a vector, whose elements are rows by themselves."""
        return max(len(self.shape(output)) - 1, 1)

    def shape(self, output: str) -> tuple[int, ...]:
        """The shape of the input."""
        return self.problem.input_shape(output.removeprefix("d"))

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """The gradients by the family's closed formulas."""
        return dict(self.problem.differentiate(arithmetic, self.cotangents))

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """The whole problem, which has one unit."""
        return [(self, torch.zeros(1, dtype=torch.int64))]

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """No gradient is a limit that the formulas leave out."""
        return {}

    def undetermined(self) -> torch.Tensor:
        """The unit, where some input is not finite: contract.md leaves such gradients unjudged."""
        return torch.tensor([self.problem.nonfinite])

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """The largest |gradient| of the row."""
        value = reference[output].value.abs()
        return value.amax(-1, keepdim=True).expand(value.shape) if value.numel() else value

    def estimates(self, contract: Contract) -> dict[str, Estimate]:
        """What a kernel under ``contract`` may make of each gradient, before it is stored."""
        if self.problem.nonfinite:
            return {name: Estimate(torch.zeros(self.shape(name)).double()) for name in self.outputs}
        found = self.problem.gradient_estimates(self.forward, contract, self.cotangents)
        return {name: found[name] for name in self.outputs}

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """Budgets of every gradient, stored once in its input's dtype."""
        budgets = {}
        for name, estimate in self.estimates(contract).items():
            dtype = dtype_name(self.problem.input_dtype(name.removeprefix("d")))
            exact = reference[name].value.reshape(self.shape(name))
            shaped = Propagation(Roundings.of(contract, dtype)).reshape(estimate, self.shape(name))
            closed = torch.full(exact.shape, self.problem.nonfinite)
            budgets[name] = stored_budget(shaped, exact, contract, dtype, closed)
        return budgets

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zero gradients would pass."""
        for name, budget in budgets.items():
            exact = reference[name].value
            if bool((~budget.open & (exact.abs() > budget.certain)).any()):
                return []
        return ["gradients: zero would be within the budget of every element"]

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Which row of the gradient it is."""
        where = ", ".join(map(str, row))
        return f"row ({where}) of the gradient of {output.removeprefix('d')}, shape {self.shape(output)}"
