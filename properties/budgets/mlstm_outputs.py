"""Budgets of the mLSTM's outputs: o, and the final state by the weights of its last row.

The errors are those of :mod:`attnproof.properties.budgets.mlstm`, part by part of a call: packed sequences,
or the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.budgets.base import Budget, broadcast_mask, dtype_name
from attnproof.properties.budgets.mlstm import CHUNK, MLSTMErrors, Weights
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import MEAN_SQUARE
from attnproof.properties.budgets.stored import sampled_budget, stored_budget
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.families.mlstm import MLSTMProblem

__all__ = ["output_budgets"]

_STATES = ("state", "n", "m")


def output_budgets(
    problem: MLSTMProblem, reference: Mapping[str, Enclosure], contract: Contract
) -> dict[str, Budget]:
    """Budgets of o and, where the call returns it, of the final state."""
    dtype = dtype_name(problem.dtype)
    rows: list[tuple[torch.Tensor, ...]] = []
    states: list[dict[str, Estimate]] = []
    for _, part in problem.parts():
        errors = MLSTMErrors(part, contract)
        found, weights = _of_rows(errors)
        rows += found
        if problem.with_state:
            states.append(_of_states(errors, weights))
    exact = reference["o"].value
    estimate = Estimate(exact)
    if rows:
        held = [torch.cat(x, 2) for x in zip(*rows, strict=True)]
        if problem.sample is not None:
            held = [x.new_zeros(exact.shape).index_copy_(2, problem.sample, x) for x in held]
        estimate = Estimate(exact, held[0], held[1], held[2])
    closed, left = problem.closed("o"), problem.unsampled
    budgets = {"o": sampled_budget(estimate, exact, contract, dtype, closed, left)}
    wide = "float64" if dtype == "float64" else "float32"
    for name in _STATES if states else ():
        # The level of nothing is −∞, of which the formulas have 0.
        nothing = broadcast_mask(problem.empty, problem.shape(name))
        value = torch.where(nothing, 0.0, reference[name].value)
        known = [getattr(state[name], field) for field in ("certain", "variance") for state in states]
        certain, variance = torch.cat(known[: len(states)]), torch.cat(known[len(states) :])
        budget = stored_budget(
            Estimate(value, certain, variance), value, contract, wide, problem.closed(name)
        )
        if name == "m" and bool(nothing.any()):
            budget = replace(budget, literal={-math.inf: nothing & ~budget.open})
        budgets[name] = budget
    return budgets


def _of_rows(errors: MLSTMErrors) -> tuple[list[tuple[torch.Tensor, ...]], list[Weights]]:
    """Bound, variance and whether nothing is asked, of o block by block; the last block's weights."""
    states = errors.states() if errors.operand else []
    found: list[tuple[torch.Tensor, ...]] = []
    weights: list[Weights] = []
    for rows in errors.rows():
        weights = errors.weights(rows)
        state = states[rows.first // errors.problem.block] if states else None
        shared = None if state is None else errors.shared(rows.first, rows.stop, state)
        quotient = errors.quotient(rows, weights, shared)
        lost = quotient.lost.expand(quotient.certain.shape)
        found.append((quotient.certain, quotient.variance, lost))
    return found, weights


def _of_states(errors: MLSTMErrors, weights: list[Weights]) -> dict[str, Estimate]:
    """C', n' and m, from the weights of the last block of rows, whose last is the final one."""
    problem, r = errors.problem, errors.r
    length = problem.sizes[2]
    if not length:
        # The initial state, as it is.
        return {name: _no_error(torch.zeros(problem.shape(name), dtype=torch.float64)) for name in _STATES}
    zero = torch.zeros((), dtype=torch.float64)
    sums = dict.fromkeys(("state", "n"), (zero, zero, zero))
    moved = errors.maximum_error(weights)[:, :, -1, 0]
    near = zero
    for w in weights:
        e, drift = w.e[:, :, -1:, :], w.drift[:, :, -1:, :]
        # What is carried is no operand: of the initial state, nothing is rounded to the operands' format.
        relative = (w.core if w.initial else w.certain)[:, :, -1:, :] + moved[..., None, None]
        operand = 0.0 if w.initial else errors.operand
        near = torch.maximum(near, torch.where(e >= 0.5, drift, 0.0).amax(-1)[..., 0])
        k = w.keys
        for name, value in (("state", w.values), ("n", w.ones)):
            size, certain, variance = sums[name]
            seen = (e > 0).double()
            certain = certain + (k.abs().mT * e * relative) @ value.abs()
            lost = ((1.0 + k.abs()).mT * seen) @ value.abs() + (k.abs().mT * seen).sum(-1, keepdim=True)
            certain = certain + (r.operand_tiny + errors.flush) * lost
            unit = (operand**2 + r.accumulate**2 * min(length, CHUNK)) * MEAN_SQUARE
            variance = variance + (k.square().mT * e.square() * (drift + unit)) @ value.square()
            sums[name] = (size + (k.mT * e) @ value, certain, variance)
    found = {}
    for name, (value, certain, variance) in sums.items():
        shape = problem.shape(name)
        certain = certain + r.accumulate_tiny * (length + 1.0)
        variance = variance + value.square() * (16.0 * r.elementwise**2)
        found[name] = Estimate(value.reshape(shape), certain.reshape(shape), variance.reshape(shape))
    m = errors.m[..., -1]
    return {**found, "m": Estimate(m, moved + r.elementwise * m.abs(), near)}


def _no_error(value: torch.Tensor) -> Estimate:
    return Estimate(value, torch.zeros_like(value), torch.zeros_like(value))
