"""Budgets of the gradients of ``prefix_scan`` and ``rwkv4``: sums over rows of what each asks of its weights.

``decayed_softmax_rows`` has the errors of one row, of o or of the final state. Their sum over rows is taken
in any order, or by a recurrence or a tree that runs backwards. Autograd through the running maximum leaves
the rounding of a sum that is 0 with every position that may once have been the maximum, and with w by its
age. An initial level takes such a rest with it, as no gradient of it is looked at; but not the logit
m₀ + log u₀ of an initial state that is taken for one more key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from attnproof.properties.budgets.decayed_softmax import RowErrors
from attnproof.properties.budgets.decayed_softmax_rows import Asked, InitialPairs, Pairs
from attnproof.properties.budgets.decayed_softmax_states import FinalWeights
from attnproof.properties.budgets.propagation import Estimate, equal_terms
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.families.decayed_softmax import DecayedSoftmax
    from attnproof.properties.families.prefix_scan import PrefixScanProblem

__all__ = ["key_gradients", "weight_gradients"]


class _Sum:
    """A gradient that grows by blocks of rows.

    Attributes:
        value, certain, variance: so far; size: Σ of absolute terms; squares: Σ over rows of these squared.
        drift: what errors that grow step by step with one sign make of it.
        lost: bool, where an intermediate may overflow.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.value, self.certain, self.variance, self.size, self.squares = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(5)
        )
        self.drift = torch.zeros(shape, dtype=torch.float64)
        self.lost = torch.zeros(shape, dtype=torch.bool)

    def add(self, stop: int, *terms: torch.Tensor, drift: torch.Tensor, lost: torch.Tensor) -> None:
        """Adds (value, certain, variance, size, squares) to the first ``stop`` positions, axis 2."""
        self.drift[:, :, :stop] += drift
        totals = (self.value, self.certain, self.variance, self.size, self.squares)
        for total, term in zip(totals, terms, strict=True):
            total[:, :, :stop] += term
        self.lost[:, :, :stop] |= lost

    def add_alike(self, alike: torch.Tensor, total: torch.Tensor, r: Roundings) -> None:
        """Sums to ``total`` of equal terms, where ``alike`` (bool (B, H)) says that rows ask the same.

        Their number is what they have of the square of their sum over the sum of their squares.
        """
        count = self.size.square() / self.squares.clamp(min=1e-300)
        together = equal_terms(count, total, r)
        self.variance += torch.where(alike[:, :, None, None], together, 0.0)

    def estimate(self, terms: float, r: Roundings) -> Estimate:
        """With the rounding of a sum of ``terms`` rows."""
        certain = self.certain + growth(terms + 8.0, r.accumulate) * (self.size + self.certain)
        certain = certain + r.accumulate_tiny * (terms + 8.0)
        variance = (
            self.variance
            + self.drift.square()
            + r.accumulate**2 * MEAN_SQUARE * (self.value.square() * (terms / 3.0 + 2.0))
        )
        return Estimate(
            self.value,
            certain.nan_to_num(torch.inf, torch.inf),
            variance.nan_to_num(1e300, 1e300),
            self.lost if bool(self.lost.any()) else None,
        )


def weight_gradients(
    problem: DecayedSoftmax,
    contract: Contract,
    cotangents: Mapping[str, torch.Tensor],
    keys: torch.Tensor | None = None,
) -> tuple[dict[str, Estimate], torch.Tensor]:
    """Gradients by v (B, H, N, E), logits "s" (B, H, N, 1) and, per head, decay "w" and bonus "c" (H,).

    With an initial state also those by it, under their names in the call with a "d" before. And the variance
    (H, D) of Σ ds·k for ``keys`` (B, H, N, D) by errors that all positions of a row share: those of δ and of
    the log-sum-exp.
    """
    keys = torch.zeros(*problem.sizes[:3], 1) if keys is None else keys
    do = cotangents.get("o", torch.zeros(problem.shape("o"))).reshape(problem.sizes)
    final = problem.state_cotangents(cotangents)
    total = _Gradients(RowErrors(problem, contract), keys.double())
    for places in problem.runs():
        total.add_rows(places, do[:, :, places].double())
    if final is not None and problem.sizes[2]:
        total.add_final(*final)
    total.finish()
    alike = (do == do[:, :, :1]).all((2, 3))
    for name, held in total.sums.items():
        # What reaches the logits is the difference of two sums, of dO/N and of (dO·o)/N.
        held.add_alike(alike, held.size if name == "s" else held.value, total.errors.r)
    r, length, batch = total.errors.r, float(problem.sizes[2]) + 1.0, max(problem.sizes[0], 1)
    found = {name: total.sums[name].estimate(length, r) for name in ("v", "s")}
    found |= {name: _over_batch(total.sums[name].estimate(length * batch, r)) for name in ("w", "c")}
    if problem.initial is not None:
        _, mass, weighted = problem.state_names
        initial = {
            f"dinitial_{name}": total.sums[kind].estimate(length, r)
            for name, kind in ((mass, "u0"), (weighted, "w0"))
        }
        if final is not None and not problem.sizes[2]:
            initial = {name: _handed_on(problem, x) for name, x in zip(initial, final, strict=True)}
        found |= initial
    drift = (total.sums["s"].drift * total.keys).sum((0, 2))
    return found, total.in_rows.sum((0, 2)) + drift.square()


def _handed_on(problem: DecayedSoftmax, cotangent: torch.Tensor) -> Estimate:
    """A cotangent (B, H, 1, X) that passes through a call without positions.

    Of a neutral state e^m is 0, so that no gradient of what it multiplies is wrong between 0 and that.
    """
    assert problem.initial is not None
    neutral = ~problem.initial.present[..., None, None]
    return Estimate(cotangent, torch.where(neutral, cotangent.abs(), 0.0))


class _Gradients:
    """Sums over blocks of rows.

    Attributes:
        sums: by v, s, w and c, and by the initial state: u0 (B, H, 1, 1) and w0 (B, H, 1, E).
        in_rows, ages: (B, H, 1, D) and (B, H, 1, 1), variances of Σ ds·k and of dw by errors that all
            positions of a row share.
        mass: (B, H, N + 1, 1), Σ of the sizes of each row, that of the final state last; largest: bool
            (B, H, N), positions that may once have been the maximum; oldest: (B, H, 1, 1), the largest age of
            a maximum; as_key: bool (B, H, 1, 1), whether the initial state may be one if taken for a key.
    """

    def __init__(self, errors: RowErrors, keys: torch.Tensor) -> None:
        batch, heads, length, width = errors.problem.sizes
        self.errors, self.keys = errors, keys
        self.sums = {"v": _Sum((batch, heads, length, width)), "s": _Sum((batch, heads, length, 1))}
        self.sums |= {name: _Sum((batch, heads, 1, 1)) for name in ("w", "c", "u0")}
        self.sums["w0"] = _Sum((batch, heads, 1, width))
        self.in_rows = torch.zeros(batch, heads, 1, keys.shape[-1], dtype=torch.float64)
        self.ages, self.oldest = torch.zeros(2, batch, heads, 1, 1, dtype=torch.float64)
        self.mass = torch.zeros(batch, heads, length + 1, 1, dtype=torch.float64)
        self.largest = torch.zeros(batch, heads, length, dtype=torch.bool)
        self.as_key = torch.zeros(batch, heads, 1, 1, dtype=torch.bool)

    def add_rows(self, places: torch.Tensor, do: torch.Tensor) -> None:
        """What the rows ``places`` with the cotangent ``do`` (B, H, R, E) add."""
        self._add(Asked.of_output(self.errors, self.errors.weighed(places), do))

    def add_final(self, du: torch.Tensor, dw: torch.Tensor) -> None:
        """What the final state with the cotangents ``du`` (B, H, 1, 1) and ``dw`` (B, H, 1, E) adds."""
        self._add(Asked.of_final(self.errors, FinalWeights.of(self.errors), du, dw))

    def _add(self, asked: Asked) -> None:
        w, given, r = asked.weighed, asked.given, self.errors.r
        places, pairs = w.places, Pairs.of(r, asked)
        stop = min(int(places[-1]) + 1, self.errors.problem.sizes[2])
        lost = asked.lost.any(2, keepdim=True)
        p, certain, variance, drift = (x[..., :stop].mT for x in pairs.weights)
        self.sums["v"].add(
            stop,
            p @ given,
            certain @ given.abs() + (r.operand_tiny + r.accumulate_tiny) * len(places),
            variance @ given.square(),
            p @ given.abs(),
            p.square() @ given.square(),
            drift=drift @ given,
            lost=lost,
        )
        *terms, drift = pairs.terms
        by_position = [x[..., :stop].sum(2)[..., None] for x in pairs.terms]
        squares = terms[3][..., :stop].square().sum(2)[..., None]
        self.sums["s"].add(stop, *by_position[:-1], squares, drift=by_position[-1], lost=lost)
        age, own = _ages(places, terms[0].shape[-1], stop)
        for name, weight in (("w", age), ("c", own)):
            factors = (weight, weight, weight.square(), weight)
            totals = [(x * f).sum((2, 3), keepdim=True) for x, f in zip(terms, factors, strict=True)]
            squares = (terms[3] * weight).sum(3, keepdim=True).square().sum(2, keepdim=True)
            moved = (drift * weight).sum((2, 3), keepdim=True)
            self.sums[name].add(1, *totals, squares, drift=moved, lost=lost)
        if w.start is not None:
            parts = InitialPairs.of(r, asked, w.start, self.errors.values[:, :, -1:])
            for name, found in (("w0", parts.weighted), ("u0", parts.mass)):
                self.sums[name].add(1, *found[:-1], drift=found[-1], lost=lost)
        self._add_shared(asked, terms[0], age, stop)
        self._add_maxima(asked, terms[3], age, stop)

    def _add_shared(self, asked: Asked, ds: torch.Tensor, age: torch.Tensor, stop: int) -> None:
        """The response to errors of γ and of the log-sum-exp."""
        k, p = self.keys[:, :, :stop], asked.weights
        by_keys = asked.level_variance * (p[..., :stop] @ k).square()
        by_keys = by_keys + asked.common_variance * (ds[..., :stop] @ k).square()
        self.in_rows = self.in_rows + by_keys.sum(2, keepdim=True)
        by_age = asked.level_variance * (p * age).sum(-1, keepdim=True).square()
        by_age = by_age + asked.common_variance * (ds * age).sum(-1, keepdim=True).square()
        self.ages = self.ages + by_age.sum(2, keepdim=True)

    def _add_maxima(self, asked: Asked, size: torch.Tensor, age: torch.Tensor, stop: int) -> None:
        """Which positions may be the maximum of a row, how old, and what depends on it."""
        w = asked.weighed
        self.mass[:, :, w.places] = size.sum(-1, keepdim=True)
        # A kernel compares an initial state's level, or as a key m₀ + tw + log u₀.
        top = w.row.x + 2.0 * w.certain >= torch.minimum(w.frame, w.row.largest)
        self.largest[:, :, :stop] |= top[..., :stop].any(2)
        oldest = torch.where(top, age + 1.0, 0.0).amax((2, 3), keepdim=True)
        if w.start is not None:
            self.as_key = self.as_key | top[..., -1:].any(2, keepdim=True)
            first = w.start.x + 2.0 * w.start.certain >= w.frame
            since = torch.where(first, w.places[:, None] + 1.0, 0.0).amax((2, 3), keepdim=True)
            oldest = torch.maximum(oldest, since)
        self.oldest = torch.maximum(self.oldest, oldest)

    def finish(self) -> None:
        """What depends on all rows: autograd through the maximum, and errors of logits that all rows read."""
        errors, sums = self.errors, self.sums
        stepped = growth(2.0 * errors.problem.sizes[2] + 8.0, errors.r.elementwise)
        later = self.mass.flip(2).cumsum(2).flip(2)[:, :, :-1]
        sums["s"].certain += torch.where(self.largest[..., None], stepped * later, 0.0)
        sums["w"].certain += stepped * (self.oldest + 1.0) * self.mass.sum(2, keepdim=True)
        sums["w"].variance += self.ages
        if errors.problem.initial is not None:
            u = errors.problem.initial.u.double()[..., None, None]
            rest = stepped * self.mass.sum(2, keepdim=True) / u.clamp(min=5e-324)
            sums["u0"].certain += torch.where(self.as_key & (u > 0), rest, 0.0)
        spread = errors.logits.variance[..., None]
        for name in ("s", "v"):
            sums[name].variance += spread * sums[name].value.square()


def _ages(places: torch.Tensor, columns: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each column has decayed in each row, and which is the row's own, float64 (R, C).

    The columns are ``stop`` positions and, if there is one more, an initial state.
    """
    j, t = torch.arange(stop), places[:, None]
    age, own = (t - 1 - j).clamp(min=0).double(), (t == j).double()
    if columns == stop:
        return age, own
    return torch.cat((age, t.double()), -1), torch.nn.functional.pad(own, (0, 1))


def _over_batch(x: Estimate) -> Estimate:
    """(B, H, 1, 1) summed over the batch, (H,)."""
    lost = None if x.lost is None else x.lost.sum((0, 2, 3)) > 0
    return Estimate(x.value.sum((0, 2, 3)), x.bound.sum((0, 2, 3)), x.spread.sum((0, 2, 3)), lost)


def key_gradients(
    problem: PrefixScanProblem, ds: Estimate, in_rows: torch.Tensor, r: Roundings
) -> dict[str, Estimate]:
    """dk (B, H, N, D) and dq (H, D) from the errors of the gradients by the logits (B, H, N, 1).

    ``in_rows``: the variance of dq / scale by errors that all positions of a row share.
    """
    scale = problem.scale
    q, k = problem.q.double()[None, :, None, :], problem.k.double()
    batch, _, length, _ = problem.sizes
    unit = max(r.operand, r.input, r.storage("dscores")[0]) + 6.0 * r.elementwise
    rounded = ds.bound + unit * ds.size
    spread = ds.spread + MEAN_SQUARE * (unit * ds.value).square()
    tiny = abs(scale) * r.operand_tiny + 4.0 * r.accumulate_tiny
    lost = ds.lost
    dk = Estimate(
        scale * ds.value * q,
        abs(scale) * rounded * q.abs() * (1.0 + unit) + tiny * (1.0 + q.abs()),
        (scale * q).square() * spread,
        None if lost is None else lost.expand(k.shape),
    )
    total = growth(float((length + 1) * (batch + 1) + 8), r.accumulate)
    certain = (rounded * (1.0 + total) + total * ds.size) * k.abs()
    dq = Estimate(
        scale * (ds.value * k).sum((0, 2)),
        abs(scale) * certain.sum((0, 2)) * (1.0 + unit) + tiny * (1.0 + k.abs().sum((0, 2))),
        scale**2 * ((spread * k.square()).sum((0, 2)) + in_rows),
        None if lost is None else lost.any(2).any(0).expand(k.shape[1], k.shape[3]),
    )
    over = [torch.as_tensor(x.size >= r.largest / 2.0) for x in (dk, dq)]
    marks = [mark if x.lost is None else mark | x.lost for mark, x in zip(over, (dk, dq), strict=True)]
    return {
        name: Estimate(x.value, x.certain, x.variance, mark if bool(mark.any()) else None)
        for name, x, mark in (("dk", dk, marks[0]), ("dq", dq, marks[1]))
    }
