"""The probable budget of dQ, one source of error at a time.

The budget's own machinery (``budgets.softmax_gradients``) is run with every unit roundoff zero but those of
one source. Variances add up: the sum over sources is the whole budget, to second order in the roundoffs.
:func:`whole_variance` is the budget as the judge uses it, against which tests hold the sum.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.propagation import Estimate, Propagation, ScaledOperands
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.softmax import weighing
from attnproof.properties.budgets.softmax_gradients import (
    _add_operand_response,
    _weights,
    _with_common_errors,
    alike_in_row,
)
from attnproof.properties.budgets.stored import stored_budget
from attnproof.properties.claims.dq_replay import Certified
from attnproof.properties.contract import Contract

__all__ = ["SOURCES", "silent", "source_variance", "split", "whole_variance"]

SOURCES = {
    "P": "P recomputed: rounding of scaled queries, logits, exponentials, the stored log-sum-exp",
    "dP": "dP stored in the inputs' dtype, where a kernel does so",
    "δ": "δ from the stored O: rounding of O, and of the forward's P within it",
    "dS": "dS stored in the inputs' dtype",
    "scaled K": "scaled keys rounded to the inputs' dtype, where a kernel scales them",
    "sums": "float32 sums and element-wise operations of the backward",
    "output": "dQ's last operations, and its one rounding",
}


def silent(r: Roundings) -> Roundings:
    """``r`` with every unit roundoff and smallest number 0."""
    zeros = dict.fromkeys(
        (
            *("operand", "input", "accumulate", "elementwise", "scores", "probabilities", "lse", "output"),
            *("exp", "operand_tiny", "scores_tiny", "probabilities_tiny", "accumulate_tiny", "output_tiny"),
            "operand_lean",
        ),
        0.0,
    )
    formats = {name: (0.0, 0.0, largest) for name, (_, _, largest) in r.formats.items()}
    return replace(r, truncated=False, formats=formats, **zeros)


def _storing(base: Roundings, r: Roundings, kind: str) -> Roundings:
    """``base`` with the storage ``kind`` of ``r``."""
    return replace(base, formats={**base.formats, kind: r.formats[kind]})


def source_variance(certified: Certified, source: str, contract: Contract | None = None) -> torch.Tensor:
    """Variance of dQ, (B, H, M, D), with the roundings of one of :data:`SOURCES` only."""
    contract = contract or Contract("softmax")
    problem, call = certified.problem, certified.call
    r = Roundings.of(contract, dtype_name(call.dtype))
    quiet = silent(r)
    if source == "output":
        return _stored(certified, contract)
    sums = quiet
    if source == "sums":
        sums = replace(
            quiet, accumulate=r.accumulate, elementwise=r.elementwise, accumulate_tiny=r.accumulate_tiny
        )
    a = Propagation(sums)
    q, k, v = problem.operands(a)
    do = a.exact(call.do)
    weights = r if source == "P" else quiet
    w = weighing(problem, weights)
    p, common = _weights(w, weights)
    products = _storing(quiet, r, "dscores") if source == "dP" else quiet
    dp = Propagation(products).store(a.matmul(do, a.transpose(v)), "dscores")
    delta = a.sum(a.mul(do, _output(certified, contract if source == "δ" else None)))
    ds = a.masked(a.mul(p, a.sub(dp, delta)), problem.seen)
    independent = replace(ds, variance=ds.spread + ds.value.square() * common)
    backward = ScaledOperands(_last(source, sums, r), call.scale)
    found = problem.backward(backward, (q, k), p, independent, do, None)
    shift = delta.spread + alike_in_row(p.value, dp)
    found["dq"] = _with_common_errors(problem, found["dq"], p, shift, common)
    if source == "P" and max(r.operand, r.input) > 2.0**-20:
        _add_operand_response(problem, r, w, p.value, dp.value, do.value, found)
    return found["dq"].spread


def _last(source: str, sums: Roundings, r: Roundings) -> Roundings:
    """What rounds from dS on."""
    if source == "dS":
        return _storing(sums, r, "dscores")
    if source == "scaled K":
        return replace(_storing(sums, r, "operand"), operand=r.operand, operand_tiny=r.operand_tiny)
    return sums


def _stored(certified: Certified, contract: Contract) -> torch.Tensor:
    """Variance that storage adds to an exact dQ."""
    dq = certified.dq.value
    # Without a certain bound, at which the probable one would be cut off.
    exact = Estimate(dq, certain=torch.full_like(dq, torch.inf))
    closed = torch.zeros_like(dq, dtype=torch.bool)
    return stored_budget(exact, dq, contract, dtype_name(certified.call.dtype), closed).probable.square()


def _output(certified: Certified, contract: Contract | None) -> Estimate:
    """O as the forward stores it under ``contract``, or exact."""
    o = certified.forward["o"].value
    if contract is None:
        return Estimate(o)
    budget = certified.problem.budgets(certified.forward, contract)["o"]
    return Estimate(o, budget.certain, budget.probable.square())


def split(certified: Certified, contract: Contract | None = None) -> dict[str, torch.Tensor]:
    """Variance of dQ by source."""
    return {source: source_variance(certified, source, contract) for source in SOURCES}


def whole_variance(certified: Certified, contract: Contract | None = None) -> torch.Tensor:
    """Variance of dQ, (B, H, M, D), of the whole probable budget."""
    return certified.budget(contract).probable.square()
