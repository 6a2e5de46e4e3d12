"""Budgets of a log-sum-exp and of the weights of a row: functions of logits that are given, not computed.

A logit's error before its exponential is the rounding of x·log2 e and of the difference to the maximum; a
running sum is rescaled at most once an element. The rest is as for the rows of attention (``softmax``),
without V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.budgets.base import ASKED, Budget, broadcast_mask, dtype_name
from attnproof.properties.budgets.rounding import LARGEST, Roundings, growth
from attnproof.properties.budgets.rows import Row, normaliser_rounding, normaliser_shift
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.families.logsumexp import RowsProblem

__all__ = ["logsumexp_budget", "weights_budget"]

_SLACK = 1.0 + 1e-6


def _row(problem: RowsProblem) -> Row:
    x = problem.x.double().masked_fill(~problem.seen, -torch.inf)
    return Row.of(x if x.shape[-1] else x.new_full((*x.shape[:-1], 1), -torch.inf))


def _errors(row: Row, r: Roundings) -> tuple[torch.Tensor, torch.Tensor]:
    """Certain logit errors E_j and variances of independent ones, both (…, N)."""
    size = torch.where(row.x > -torch.inf, row.x, 0.0).abs()
    argument = 2.0 * r.elementwise * (2.0 * row.distance + row.largest.abs() + size)
    stored = 2.0 * r.scores * size + r.scores_tiny
    certain = torch.where(row.x > -torch.inf, argument + stored + (row.count + 2.0) * r.exp, 0.0)
    variance = ((2.0 * row.distance * r.elementwise) ** 2 + r.exp**2 + (r.scores * size) ** 2) / 3.0
    # A maximum that is multiplied by log2 e apart from the logits leaves a rounding relative to their size.
    return certain, variance + (r.elementwise * size) ** 2 / 3.0


def logsumexp_budget(problem: RowsProblem, reference: Enclosure, contract: Contract) -> Budget:
    """Budget of log Σ e^x, shape (…,)."""
    dtype = dtype_name(problem.x.dtype)
    r = Roundings.of(contract, dtype)
    row = _row(problem)
    certain_e, variance_e = _errors(row, r)
    y = reference.value.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    n, m, size = row.count.squeeze(-1), row.largest.squeeze(-1).abs(), y.abs()
    logarithm = (row.lse - row.largest).squeeze(-1)
    _, shift = normaliser_shift(row, certain_e)
    steps = 8.0 * r.elementwise * (1.0 + logarithm) + 4.0 * r.elementwise * (m + size)
    error = shift.squeeze(-1) + growth(2.0 * n + 8.0, r.accumulate) + steps
    certain = (error * (1.0 + r.output) + r.output * size + r.output_tiny) * _SLACK
    variance = (row.p.square() * variance_e).sum(-1) + _sum_rounding(row, r).squeeze(-1)
    variance = variance + (r.elementwise * (1.0 + logarithm)).square() * 4.0 / 3.0
    variance = (
        variance
        + (2.0 * r.elementwise**2 * (m**2 + size**2) + r.output**2 * size**2 + r.output_tiny**2) / 3.0
    )
    return _limits(problem, "y", y, certain, variance.sqrt(), contract, r, row)


def _sum_rounding(row: Row, r: Roundings) -> torch.Tensor:
    """Variance, relative and (…, 1), of the rounding of Σ e^x."""
    return torch.maximum(row.count / 9.0 * r.accumulate**2, normaliser_rounding(row, r))


def weights_budget(problem: RowsProblem, reference: Enclosure, contract: Contract) -> Budget:
    """Budget of e^{x_j} / Σ e^x, shape (…, N)."""
    dtype = dtype_name(problem.x.dtype)
    r = Roundings.of(contract, dtype)
    row = _row(problem)
    certain_e, variance_e = _errors(row, r)
    width = problem.x.shape[-1]
    y = reference.value.nan_to_num(0.0)
    _, shift = normaliser_shift(row, certain_e)
    own = certain_e[..., :width]
    division = 6.0 * r.elementwise + 2.0 * r.lse * (row.lse.abs() + 1.0)
    exponent = own + shift + growth(2.0 * row.count + 8.0, r.accumulate) + division
    relative = torch.expm1(exponent.clamp(max=700.0))
    # Weights below float64's smallest number may be raised by their errors all the same.
    raised = torch.exp((row.log_p[..., :width] + exponent).clamp(max=0.0))
    raised = torch.where(exponent > 300.0, raised, 0.0)
    error = (
        torch.minimum(torch.maximum(relative * y, raised), torch.maximum(y, 1.0 - y))
        + 2.0 * r.probabilities_tiny
    )
    certain = (error * (1.0 + r.output) + r.output * y + r.output_tiny) * _SLACK
    shared = (row.p.square() * variance_e).sum(-1, keepdim=True) + _sum_rounding(row, r)
    variance = y.square() * (variance_e[..., :width] + shared + (3.0 * r.elementwise) ** 2 / 3.0)
    variance = variance + (r.output**2 * y.square() + r.output_tiny**2 + r.probabilities_tiny**2) / 3.0
    return _limits(problem, "y", y, certain, variance.sqrt(), contract, r, row)


def _limits(
    problem: RowsProblem,
    output: str,
    exact: torch.Tensor,
    certain: torch.Tensor,
    probable: torch.Tensor,
    contract: Contract,
    r: Roundings,
    row: Row,
) -> Budget:
    shape = problem.shape(output)
    poisoned = broadcast_mask(problem.undetermined(), shape)
    size = torch.where(row.x > -torch.inf, row.x, 0.0).abs().amax(-1) * 1.4426950408889634
    threatened = broadcast_mask(size >= min(r.largest, r.scores_largest) / 2.0, shape) & ~poisoned
    largest = LARGEST[dtype_name(problem.x.dtype)]
    overflow = exact.abs() - certain > largest
    empty = broadcast_mask(~problem.seen.any(-1), shape) & ~poisoned & ~threatened
    asked = contract.empty_lse if problem.kind == "logsumexp" else contract.empty_row
    left_open = empty if asked == "undefined" else torch.zeros_like(empty)
    reasons = {
        "the row sees a non-finite input": int(poisoned.sum()),
        "an intermediate may overflow": int(threatened.sum()),
        "the contract leaves rows without entries open": int(left_open.sum()),
    }
    return Budget(
        certain=certain,
        probable=probable,
        open=poisoned | threatened | left_open,
        overflow=overflow,
        either=(exact.abs() + certain > largest) & ~overflow,
        literal={} if asked == "undefined" else {ASKED[asked]: empty},
        reasons={reason: count for reason, count in reasons.items() if count},
    )
