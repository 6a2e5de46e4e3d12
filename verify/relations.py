"""Whether the results of several calls keep the relation that ties them in exact arithmetic.

What ties the results is exact, so that two correct results differ by no more than their budgets allow:

* **certain.** Each output that passes lies within certain + radius of its exact value. For Σ f_i y_i = c the
  results therefore miss c by at most Σ |f_i| (certain_i + radius_i) + the radius of c.
* **merged by log-sum-exp** (:func:`_merge_terms`). With w = σ(l₁ − l₂), o = w o₁ + (1 − w) o₂, and results
  ô_i = o_i + e_i, l̂_i = l_i + δ_i, the merged results err by ŵ e₁ + (1 − ŵ) e₂ + (ŵ − w)(o₁ − o₂), where
  |ŵ − w| ≤ w (1 − w)(e^δ − 1) ≤ w (1 − w) κ (|δ₁| + |δ₂|) for every |δ₁ − δ₂| ≤ δ ≤ Δ and κ = (e^Δ − 1)/Δ.
  The merged log-sum-exp errs by at most ŵ' |δ₁| + (1 − ŵ') |δ₂| for some weights between both, so by the
  larger one.
* **statistics.** Let a_i be error/probable as the judge takes it, and p² = Σ f_i² probable_i². By
  Cauchy–Schwarz (Σ f_i e_i)²/p² ≤ Σ a_i², whatever the ratios of the probable budgets. Summed over the
  elements of a row, and over an output, this is at most Σ_i n_i T_i², n_i the number of elements that call i
  was compared in and T_i the threshold that it stays below. A row or an output beyond that (√2 times the
  threshold for two calls of equal size) therefore accuses no kernel whose results each pass.

Elements that are open, overflow, or of which one value is asked are left out. Gradients are tied like
outputs, where every call of a relation returned them. A sum over an axis has the sums of certain budgets and
radii, and of squares of probable ones. Bounds that are strict ask for more than budgets do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnproof.judge import Trial
from attnproof.properties.invariants import (
    Balance,
    Bounds,
    Call,
    Invariant,
    Merge,
    Plan,
    Relation,
    Select,
    Term,
)
from attnproof.reports.record import Failure
from attnproof.statistics import Thresholds, deviation, thresholds_for
from attnproof.trials import JudgedCall

__all__ = ["Result", "broken", "known", "results_of"]

# Rounding of a sum of a few float64 terms, relative to their sizes.
_SUM = 2.0**-48
_TENSORS = ("got", "value", "exact", "radius", "certain", "probable", "usable", "open", "row_count")


@dataclass(frozen=True, eq=False)
class Result:
    """One output of one call beside its reference, float64 tensors of one shape.

    Attributes:
        got: as it came; value: in float64, 0 where it is not usable; exact, radius: the reference.
        certain, probable: budgets.
        usable: elements compared numerically; open: unjudged ones.
        row_count: number of compared elements in each element's row; count: in the output.
        limits: thresholds of a familiar call, or None.
        wide: whether the last axis lies within a row.
    """

    got: torch.Tensor
    value: torch.Tensor
    exact: torch.Tensor
    radius: torch.Tensor
    certain: torch.Tensor
    probable: torch.Tensor
    usable: torch.Tensor
    open: torch.Tensor
    row_count: torch.Tensor
    count: int
    limits: Thresholds | None
    wide: bool = True

    def selected(self, term: Term) -> Result:
        """The elements that a term takes."""
        chosen = self if term.select is None else self.mapped(term.select)
        return chosen.summed() if term.summed else chosen

    def summed(self) -> Result:
        """Sums over the last axis, whose errors add up; where one element is left out, so is the sum."""
        added = {name: getattr(self, name).sum(-1) for name in ("value", "exact", "radius", "certain")}
        return replace(
            self,
            **added,
            got=self.got.double().sum(-1),
            probable=self.probable.square().sum(-1).sqrt(),
            usable=self.usable.all(-1),
            open=self.open.any(-1),
            row_count=self.row_count.sum(-1) if not self.wide else self.row_count.amax(-1),
            wide=False,
        )

    def mapped(self, function: Select) -> Result:
        """Every tensor put through ``function``."""
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in _TENSORS}
        return replace(self, **tensors)


@dataclass(frozen=True, eq=False)
class _Part:
    """A result whose error enters a difference times ``factor`` (float64, 0 or more, broadcast)."""

    factor: torch.Tensor | float
    result: Result
    spread: int = 1
    """In how many elements of a row of the difference one element of the result stands."""


@dataclass(frozen=True, eq=False)
class _Difference:
    """What should be 0 in exact arithmetic, its parts, and where it is compared."""

    output: str
    value: torch.Tensor
    parts: tuple[_Part, ...]
    radius: torch.Tensor
    where: torch.Tensor
    words: str
    wide: bool


def results_of(planned: Call, judged: JudgedCall) -> dict[str, Result]:
    """The outputs of a call that returned what the contract asks, by name."""
    trial = judged.trial
    assert trial is not None
    return {name: _result(planned, trial, name, got) for name, got in judged.outputs.items()}


def _result(planned: Call, trial: Trial, name: str, got: torch.Tensor) -> Result:
    budget, reference = trial.budgets[name], trial.reference.outputs[name]
    found = deviation(got, reference, budget, trial.row_axes(name))
    compared = found.compared.reshape(got.shape)
    limits = None
    if planned.familiar:
        width = found.compared.shape[-1]
        limits = thresholds_for(trial.case.family, name, trial.case.dtype, trial.regime_class, width)
    usable = compared & ~budget.either
    rows = found.compared.sum(-1, keepdim=True).expand(found.compared.shape).reshape(got.shape)
    return Result(
        got=got,
        value=torch.where(usable, got.double(), 0.0),
        exact=torch.where(usable, reference.value, 0.0),
        radius=torch.where(usable, reference.radius, 0.0),
        certain=torch.where(usable, budget.certain, 0.0),
        probable=torch.where(usable, budget.probable, 0.0),
        usable=usable,
        open=budget.open,
        row_count=rows,
        count=int(compared.sum()),
        limits=limits,
        wide=got.dim() > trial.row_axes(name),
    )


def broken(
    invariant: Invariant, plan: Plan, relation: Relation, results: Sequence[Mapping[str, Result]]
) -> list[Failure]:
    """What breaks one relation, nothing where it holds or speaks of gradients that a kernel does not have."""
    if not known(relation, results):
        return []
    if isinstance(relation, Bounds):
        return _beyond_bounds(invariant, relation, results[relation.call][relation.output])
    if isinstance(relation, Merge):
        differences = _merge_terms(relation, results)
    else:
        if relation.bitwise and (failure := _different_bits(invariant, plan, relation, results)):
            return [failure]
        differences = [_balance_terms(plan, relation, results)]
    return [failure for difference in differences for failure in _too_far(invariant, difference)]


def known(relation: Relation, results: Sequence[Mapping[str, Result]]) -> bool:
    """Whether the outputs that a relation ties have come back: all but gradients always have."""
    if isinstance(relation, Merge):
        return True
    tied = relation.terms if isinstance(relation, Balance) else (relation,)
    return all(one.output in results[one.call] for one in tied)


def _balance_terms(plan: Plan, relation: Balance, results: Sequence[Mapping[str, Result]]) -> _Difference:
    chosen = [(term, results[term.call][term.output].selected(term)) for term in relation.terms]
    first = chosen[0][1]
    where = torch.ones_like(first.usable)
    value, size = torch.zeros_like(first.value), torch.zeros_like(first.value)
    for term, result in chosen:
        where = where & result.usable
        value = value + term.factor * result.value
        size = size + abs(term.factor) * result.value.abs()
    constant = torch.as_tensor(relation.constant, dtype=torch.float64)
    radius = torch.as_tensor(relation.radius, dtype=torch.float64) + _SUM * (size + constant.abs())
    parts = tuple(_Part(abs(term.factor), result) for term, result in chosen)
    words = ", ".join(plan.calls[term.call].words for term in relation.terms)
    return _Difference(relation.terms[0].output, value - constant, parts, radius, where, words, first.wide)


def _merge_terms(relation: Merge, results: Sequence[Mapping[str, Result]]) -> list[_Difference]:
    """The whole's o and lse less the merged ones; the formulas are in the module's docstring."""
    whole, (one, two) = results[relation.whole], (results[part] for part in relation.parts)
    l1, l2 = one["lse"], two["lse"]
    both = l1.usable & l2.usable
    merged_lse = torch.logaddexp(l1.value, l2.value)
    got_w = torch.sigmoid(l1.value - l2.value)[..., None]
    w = torch.sigmoid(l1.exact - l2.exact)[..., None]
    reach = (l1.certain + l1.radius + l2.certain + l2.radius).clamp(min=1e-12, max=50.0)
    steepness = (w * (1.0 - w)) * (torch.expm1(reach) / reach)[..., None]
    apart = steepness * (one["o"].exact - two["o"].exact).abs()
    merged_o = got_w * one["o"].value + (1.0 - got_w) * two["o"].value
    width = merged_o.shape[-1]
    shared = [
        _Part(apart, l.mapped(lambda tensor: tensor[..., None].expand(*tensor.shape, width)), width)
        for l in (l1, l2)
    ]
    o = _Difference(
        output="o",
        value=whole["o"].value - merged_o,
        parts=(_Part(1.0, whole["o"]), _Part(got_w, one["o"]), _Part(1.0 - got_w, two["o"]), *shared),
        radius=_SUM * (whole["o"].value.abs() + one["o"].value.abs() + two["o"].value.abs()),
        where=whole["o"].usable & one["o"].usable & two["o"].usable & both[..., None],
        words="all keys, less both parts of them merged by their log-sum-exp",
        wide=True,
    )
    lse = _Difference(
        output="lse",
        value=whole["lse"].value - merged_lse,
        parts=(_Part(1.0, whole["lse"]), _Part(1.0, l1), _Part(1.0, l2)),
        radius=_SUM * (1.0 + whole["lse"].value.abs() + l1.value.abs() + l2.value.abs()),
        where=whole["lse"].usable & both,
        words=o.words,
        wide=False,
    )
    return [o, lse]


def _too_far(invariant: Invariant, d: _Difference) -> list[Failure]:
    """A failure against the certain budgets, else those against the thresholds."""
    if not bool(d.where.any()):
        return []
    allowed = d.radius + torch.zeros_like(d.value)
    for part in d.parts:
        allowed = allowed + part.factor * (part.result.certain + part.result.radius)
    size = torch.where(d.where, d.value.abs(), 0.0)
    beyond = size > allowed
    if bool(beyond.any()):
        ratio = torch.where(beyond, size / allowed.clamp(min=1e-300), 0.0)
        index = _worst(ratio)
        words = f"{_measure(d, index)}, where budgets allow {float(allowed[index]):.3g} together"
        more = f"; {int(beyond.sum())} elements exceed theirs"
        return [_failure(invariant, d, index, float(ratio[index]), words + more)]
    return _improbable(invariant, d, size)


def _improbable(invariant: Invariant, d: _Difference, size: torch.Tensor) -> list[Failure]:
    """Failures of the sums of squares over rows and over the output; see the module's docstring."""
    radius, variance = d.radius + torch.zeros_like(size), torch.zeros_like(size)
    row_allowed, allowed = torch.zeros_like(size), 0.0
    for part in d.parts:
        result, limits = part.result, part.result.limits
        if limits is None:
            return []
        radius = radius + part.factor * result.radius
        variance = variance + (part.factor * result.probable) ** 2
        row_allowed = row_allowed + result.row_count * part.spread * limits.row**2
        allowed += result.count * part.spread * limits.output**2
    excess = (size - radius).clamp(min=0.0)
    ratio = torch.where(excess == 0, 0.0, excess / variance.sqrt().clamp(min=1e-300)).clamp(max=1e100)
    rows = ratio.square()
    if d.wide:
        rows, row_allowed = rows.sum(-1), row_allowed.amax(-1)
    relative = (rows / row_allowed.clamp(min=1.0)).sqrt()
    if float(relative.max()) > 1.0:
        row = _worst(relative)
        index = (*row, *_worst(ratio[row])) if d.wide else row
        over = f"{float(relative[row]):.3g} times what results allow that each pass"
        words = f"{_measure(d, index)}; in its row the rms of difference/probable is {over}"
        return [_failure(invariant, d, index, float(relative[row]), words)]
    overall = math.sqrt(float(ratio.square().sum()) / max(allowed, 1.0))
    if overall > 1.0:
        index = _worst(ratio)
        over = f"{overall:.3g} times what results allow that each pass"
        words = f"{_measure(d, index)}; over the output the rms of difference/probable is {over}"
        return [_failure(invariant, d, index, overall, words)]
    return []


def _different_bits(
    invariant: Invariant, plan: Plan, relation: Balance, results: Sequence[Mapping[str, Result]]
) -> Failure | None:
    """The two terms' elements compared by value, or the one's with the constant, where nothing is open.

    −0 equals +0.
    """
    ours, *others = relation.terms
    a = results[ours.call][ours.output].selected(ours)
    asked, hidden = torch.as_tensor(relation.constant, dtype=a.got.dtype).expand(a.got.shape), a.open
    for theirs in others:
        b = results[theirs.call][theirs.output].selected(theirs)
        asked, hidden = b.got, hidden | b.open
    differs = (a.got != asked) & ~(a.got.isnan() & asked.isnan()) & ~hidden
    if not bool(differs.any()):
        return None
    index = tuple(int(i) for i in differs.nonzero()[0])
    left, right = float(a.got[index]), float(asked[index])
    told = f"{right:.9g} ({plan.calls[others[0].call].words})" if others else f"should be {right:.9g}"
    words = (
        f"{_place(ours.output, index)} is {left:.9g} ({plan.calls[ours.call].words}) and {told}; "
        f"the contract asks for equal values, and {int(differs.sum())} of {differs.numel()} differ"
    )
    return Failure(
        invariant.name,
        f"{invariant.statement}: {words}",
        output=ours.output,
        index=index,
        expected=right,
        got=left,
    )


def _beyond_bounds(invariant: Invariant, relation: Bounds, result: Result) -> list[Failure]:
    allowed = torch.zeros_like(result.value) if relation.strict else result.certain + result.radius
    excess = torch.maximum(relation.lower - result.value, result.value - relation.upper)
    excess = torch.where(result.usable, excess, -torch.inf)
    half = (relation.upper - relation.lower) / 2.0
    measure = allowed + half if relation.strict else allowed
    reach = excess + half if relation.strict else excess
    ratio = torch.where(excess > allowed, reach / measure.clamp(min=1e-300), 0.0)
    if not ratio.numel() or not bool((excess > allowed).any()):
        return []
    index = _worst(ratio)
    value, low, high = (float(x[index]) for x in (result.value, relation.lower, relation.upper))
    words = f"{_place(relation.output, index)} = {value:.9g} is outside [{low:.9g}, {high:.9g}]"
    if not relation.strict:
        words += f" by {float(excess[index]):.3g}, where its budget allows {float(allowed[index]):.3g}"
    bound = low if value < low else high
    return [
        Failure(
            invariant.name,
            f"{invariant.statement}: {words}",
            output=relation.output,
            index=index,
            expected=bound,
            got=value,
            ratio=float(ratio[index]),
        )
    ]


def _failure(
    invariant: Invariant, d: _Difference, index: tuple[int, ...], ratio: float, words: str
) -> Failure:
    got = float(d.parts[0].result.value[index])
    return Failure(
        invariant.name,
        f"{invariant.statement}: {words}",
        output=d.output,
        index=index,
        expected=got - float(d.value[index]),
        got=got,
        ratio=ratio,
    )


def _measure(d: _Difference, index: tuple[int, ...]) -> str:
    values = ", ".join(f"{float(part.result.value[index]):.9g}" for part in d.parts)
    return f"{_place(d.output, index)} = {values} ({d.words}) are {float(d.value[index]):.3g} off"


def _place(output: str, index: tuple[int, ...]) -> str:
    return f"{output}[{', '.join(map(str, index))}]"


def _worst(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(tensor.argmax(), tensor.shape))
