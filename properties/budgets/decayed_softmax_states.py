"""Budgets of the final states of ``prefix_scan`` and ``rwkv4``: sums of e^{D_j − m} in the kernel's own m.

The weights are those of a row N without a bonus (``decayed_softmax.RowErrors.weighed``). What a kernel has
for m errs as the logits do that may be the largest, and all weights of the state err with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.budgets.base import Budget, broadcast_mask
from attnproof.properties.budgets.decayed_softmax import RowErrors, Weighed
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import MEAN_SQUARE, growth
from attnproof.properties.budgets.stored import stored_budget
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.families.decayed_softmax import DecayedSoftmax

__all__ = ["FinalWeights", "state_budgets"]

_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, eq=False)
class FinalWeights:
    """The weights of the final state of a call with positions.

    Attributes:
        weighed: its row; e: e^{D − m} (B, H, 1, C), the initial state's mass included.
        m_error, m_variance: of the largest exponent, (B, H, 1, 1).
    """

    weighed: Weighed
    e: torch.Tensor
    m_error: torch.Tensor
    m_variance: torch.Tensor

    @classmethod
    def of(cls, errors: RowErrors) -> FinalWeights:
        """Of the problem of ``errors``, with N ≥ 1."""
        w = errors.weighed(torch.tensor([errors.problem.sizes[2]]))
        row = w.row
        seen = row.x > -torch.inf
        e = torch.where(seen, torch.exp((row.x - w.frame).clamp(max=_LARGEST_EXPONENT)), 0.0)
        # The largest exponent errs as those do that may be the largest.
        distance = torch.where(seen, w.frame - row.x, torch.inf)
        own = w.certain - torch.where(seen, w.rescales, 0.0)
        m_error = _exponent_error(errors, distance, own, w)
        near = (distance <= 2.0 * m_error) & seen
        m_variance = torch.where(near, w.variance + w.drift.square(), 0.0).amax(-1, keepdim=True)
        return cls(w, e, m_error, m_variance)


def _exponent_error(errors: RowErrors, distance: torch.Tensor, own: torch.Tensor, w: Weighed) -> torch.Tensor:
    """How far a kernel's m may be from m, (B, H, 1, 1): by the errors of what may be the largest."""
    r, problem = errors.r, errors.problem
    worst = own.clamp(min=0.0).amax(-1, keepdim=True)
    near = torch.where(distance <= 2.0 * worst, own.clamp(min=0.0), 0.0).amax(-1, keepdim=True)
    # An initial exponent with no mass is no column of the row.
    if problem.initial is not None:
        near = near + 4.0 * r.elementwise * w.frame.abs()
        near = near + (errors.path[:, :, -1, None, None] if problem.decay is not None else 0.0)
    return near + r.elementwise * w.frame.abs()


def _estimates(errors: RowErrors) -> dict[str, Estimate]:
    """m, u and w after the last position, before they are stored."""
    problem, r = errors.problem, errors.r
    batch, heads, length, _ = problem.sizes
    names = problem.state_names
    if not length:
        zero = {name: torch.zeros(problem.shape(name), dtype=torch.float64) for name in names}
        return {name: Estimate(x) for name, x in zero.items()}
    final = FinalWeights.of(errors)
    w, e, n = final.weighed, final.e, final.weighed.row.count
    relative = torch.expm1((w.certain + final.m_error).clamp(max=_LARGEST_EXPONENT))
    state = r.storage("state")[0]
    sums = growth(2.0 * n + 8.0, r.accumulate) + max(r.probabilities, r.operand) + r.input
    sums = sums + (growth(n + 1.0, state) if state > r.elementwise else 0.0)
    tiny = r.probabilities_tiny + r.accumulate_tiny * (2.0 * n + 8.0)
    found = {names[0]: (w.frame, final.m_error, final.m_variance)}
    seen = (w.row.x > -torch.inf).double()
    for name, v in ((names[1], torch.ones_like(w.v[..., :1])), (names[2], w.v)):
        size = e @ v.abs()
        certain = (e * relative) @ v.abs() * (1.0 + sums) + sums * size
        certain = certain + tiny * (1.0 + seen @ v.abs())
        total = e @ v
        unit = max(r.probabilities, r.operand) ** 2 + r.accumulate**2 * n
        variance = (e.square() * (w.variance + unit * MEAN_SQUARE)) @ v.square()
        variance = variance + ((e * w.drift) @ v).square()
        # Every partial sum is rounded.
        summed = r.accumulate**2 * MEAN_SQUARE * n / 3.0
        variance = variance + total.square() * (final.m_variance + 4.0 * r.elementwise**2 + summed)
        found[name] = (total, certain, variance)
    lost = w.lost.reshape(batch, heads)
    estimates = {}
    for name, (value, certain, variance) in found.items():
        shape = problem.shape(name)
        mark = broadcast_mask(lost, shape) if bool(lost.any()) else None
        estimates[name] = Estimate(
            value.reshape(shape), certain.reshape(shape), variance.reshape(shape), mark
        )
    return estimates


def state_budgets(
    problem: DecayedSoftmax, reference: Mapping[str, Enclosure], contract: Contract
) -> dict[str, Budget]:
    """Budgets of the final state, by the call's names."""
    wide = "float64" if problem.dtype == torch.float64 else "float32"
    found = _estimates(RowErrors(problem, contract))
    budgets = {}
    for name in problem.state_order:
        value = reference[name].value
        empty = broadcast_mask(problem.empty, tuple(value.shape))
        value = torch.where(empty, 0.0, value)
        estimate = replace(found[name], value=value)
        budget = stored_budget(estimate, value, contract, wide, problem.closed(name))
        if name == problem.state_names[0]:
            budget = replace(budget, literal={-math.inf: empty & ~budget.open})
        budgets[name] = budget
    return budgets
