"""Budgets of ``prefix_scan`` and ``rwkv4``: softmax rows whose logits decay.

What is counted for the logit D_tj of a row, relative to its weight (the errors E of ``rows.Spread``):

* the logit's own error: a dot product, or the storage of scores;
* one exponential for each time a kernel rescales what it has of position j. Without a decay that is at most
  once for each position with a larger logit (``rows.overtaking``), on any path through a recurrence or a
  tree, an initial state having its level for a logit, whatever its mass; with a decay a kernel may take one
  in every step, and in every level of a tree above the steps;
* with a decay the running exponent p = max(w + p, k), rounded in every step, Σ 2u(|p| + |w|) from j to t; or
  the products (t − 1 − j) w, or running sums of w that start up to 128 positions before j;
* arguments: their differences telescope to the distance from the largest logit.

These are common to numerator and denominator. As in ``budgets.softmax``, what is not is relative to Σ p|v|:
a product and a sum for every step, the storage of P (of kernels that use matrix products) and of the state.
Weights are taken relative to the largest exponent; where an initial state has one with hardly any mass, what
underflows beside it is lost, and rows of which nothing may be left are open (contract.md, singular cases).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.base import Budget, broadcast_mask, dtype_name
from attnproof.properties.budgets.logit_errors import LOG2E
from attnproof.properties.budgets.propagation import Estimate, coincidence
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth
from attnproof.properties.budgets.rows import Row, Spread, normaliser_shift, overtaking, second_moment
from attnproof.properties.budgets.softmax import upheaved_weights
from attnproof.properties.budgets.stored import sampled_budget, with_leaks
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.families.decayed_softmax import DecayedSoftmax

__all__ = ["CHUNK", "DROWNED", "Quotient", "RowErrors", "Start", "Weighed", "common_errors", "output_budget"]

CHUNK = 128
"""The longest run of positions over which a kernel may sum w before it takes differences."""

DROWNED = 600.0
"""How far above all logits a level without mass lies where nothing is left of a row beside it."""

_LARGEST_EXPONENT = 700.0
# A denominator of which less than this many times what may underflow is left says nothing.
_LEAST = 4.0


@dataclass(frozen=True, eq=False)
class Start:
    """The initial state's weight m₀ + t w in some rows, of a unit of mass, with its errors; all (B, H, R, 1).

    Attributes:
        x: −inf where the state is neutral; certain, variance, drift: as of :class:`Weighed`.
    """

    x: torch.Tensor
    certain: torch.Tensor
    variance: torch.Tensor
    drift: torch.Tensor


@dataclass(frozen=True, eq=False)
class Weighed:
    """Some rows and the errors of their logits; the last axis over positions, then the initial state if any.

    Attributes:
        places: int64 (R,), the rows; row: their weights (B, H, R, C).
        v: (B, H, C, E).
        certain, variance: of the logits, (B, H, R, C); rescales: what of ``certain`` are exponentials.
        drift: (B, H, R, C), standard deviation of errors that grow step by step with one sign: adding one w
            to exponents of one binade rounds alike each time, and so does rescaling by one factor.
        frame: (B, H, R, 1), the exponent that a kernel scales by, of an initial state without mass too.
        lost: bool (B, H, R, 1), where an intermediate may overflow.
        start: the initial state, whether it has mass or not; None without one.
    """

    places: torch.Tensor
    row: Row
    v: torch.Tensor
    certain: torch.Tensor
    rescales: torch.Tensor
    variance: torch.Tensor
    drift: torch.Tensor
    frame: torch.Tensor
    lost: torch.Tensor
    start: Start | None

    @property
    def lift(self) -> torch.Tensor:
        """1 over the denominator as a kernel scales it, (B, H, R, 1); at most 1 without an initial state."""
        return torch.exp((self.frame - self.row.lse).clamp(max=_LARGEST_EXPONENT))


@dataclass(frozen=True, eq=False)
class Quotient:
    """o of some rows (B, H, R, E) with the errors before it is stored; ``lost``: nothing is asked."""

    o: torch.Tensor
    certain: torch.Tensor
    variance: torch.Tensor
    lost: torch.Tensor


class RowErrors:
    """The errors of a kernel under ``contract`` on one problem."""

    def __init__(self, problem: DecayedSoftmax, contract: Contract) -> None:
        self.problem = problem
        self.r = Roundings.of(contract, dtype_name(problem.dtype))
        self.logits = problem.logit_errors(self.r)
        a = EnclosureArithmetic()
        batch, heads, length, _ = problem.sizes
        s = a.midpoint(problem.logits(a, length)).reshape(batch, heads, length)
        self.s = s
        initial = problem.initial
        self.values = problem.v.double()
        if initial is not None:
            mass = initial.u.double()[..., None]
            mean = torch.where(mass > 0, initial.w.double() / mass.clamp(min=5e-324), 0.0)
            self.values = torch.cat((self.values, mean[:, :, None, :]), 2)
        w = torch.zeros(heads, dtype=torch.float64) if problem.decay is None else problem.decay.double()
        p, rises = self._running(w, s)
        u, w = self.r.elementwise, w.abs()[None, :, None]
        rounded = u * p.abs() * (w > 0)
        self.path = torch.nn.functional.pad((2.0 * (rounded + u * w)).cumsum(-1), (1, 0))
        pattern = math.sqrt(MEAN_SQUARE) * rounded + u * rises
        self.pattern = torch.nn.functional.pad(pattern.cumsum(-1), (1, 0))

    def _running(self, w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """p after every position, by its recurrence, and whether it rises there; (B, H, N)."""
        found, rises, initial = torch.empty_like(s), torch.zeros_like(s), self.problem.initial
        last = torch.full(s.shape[:2], -torch.inf, dtype=torch.float64)
        if initial is not None:
            last = torch.where(initial.present, initial.m.double(), last)
        for t in range(s.shape[-1]):
            rises[..., t] = (s[..., t] > last + w).double()
            last = torch.maximum(last + w, s[..., t])
            found[..., t] = last
        return found, rises

    def weighed(self, places: torch.Tensor) -> Weighed:
        """Some rows; row N, of the final state, too."""
        problem, r, length = self.problem, self.r, self.problem.sizes[2]
        stop = min(int(places[-1]) + 1, length)
        j, t = torch.arange(stop), places[:, None]
        age, seen = (t - 1 - j).clamp(min=0).double(), j <= t
        x = self.s[:, :, None, :stop]
        certain = self.logits.certain[:, :, None, :stop].expand(*x.shape[:2], len(places), stop)
        variance = self.logits.variance[:, :, None, :stop].expand(certain.shape)
        if problem.bonus is not None:
            own = (j == t).double() * problem.bonus.double().reshape(1, -1, 1, 1)
            x = x + own
            bonus = 2.0 * r.elementwise * (x.abs() + own.abs()) * (own != 0)
            certain, variance = certain + bonus, variance + MEAN_SQUARE * (bonus / 2.0).square()
        if problem.decay is not None:
            w = problem.decay.double().reshape(1, -1, 1, 1)
            x = x + age * w
            walked, rounded = self._walked(age, places, stop)
            certain, variance = certain + walked, variance + rounded
        x = torch.where(seen, x, -torch.inf)
        certain, variance = certain * seen, variance * seen
        ends = self.pattern[:, :, (places + 1).clamp(max=length), None]
        drift = (ends - self.pattern[:, :, None, 1 : stop + 1]).clamp(min=0.0) * seen
        frame = x.amax(-1, keepdim=True) if stop else x.new_full((*x.shape[:-1], 1), -torch.inf)
        v, start = self.values[:, :, :stop], None
        if problem.initial is not None:
            start = self._start(places, ends.expand(frame.shape))
            x, certain = self._with_mass(start, x, certain)
            variance = torch.cat((variance, start.variance), -1)
            v = torch.cat((v, self.values[:, :, length:]), 2)
            drift = torch.cat((drift, start.drift), -1)
            frame = torch.maximum(frame, start.x)
        return self._with_exponentials(places, Row.of(x), v, (certain, variance, drift), frame, start)

    def _walked(
        self, age: torch.Tensor, places: torch.Tensor, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bound and variance, drift apart, of the error of (t − 1 − j) w in a kernel, (B, H, R, stop)."""
        assert self.problem.decay is not None
        u, w = self.r.elementwise, self.problem.decay.double().abs().reshape(1, -1, 1, 1)
        # Levels of a tree round exponents between s_j and D_tj, once each.
        depth = math.ceil(math.log2(stop + 1)) + 2
        walked = (self.path[:, :, places, None] - self.path[:, :, None, :stop]).clamp(min=0.0)
        sizes = 2.0 * self.s.abs()[:, :, None, :stop] + age * w
        direct = 2.0 * u * (depth * sizes + age * w)
        summed = growth(float(CHUNK), self.r.accumulate) * w * (age + CHUNK)
        exps = (age + depth) * self.r.exp
        moving = ((w > 0) & (age > 0)).double()
        variance = (u * age * w).square() / 3.0
        return walked * (w > 0) + moving * (direct + summed + exps), variance * (w > 0)

    def _start(self, places: torch.Tensor, drift: torch.Tensor) -> Start:
        """The initial state in some rows, its exponentials apart."""
        problem, initial, u = self.problem, self.problem.initial, self.r.elementwise
        assert initial is not None
        m = initial.m.double()[..., None, None]
        steps = places.double()[:, None]
        w = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        if problem.decay is not None:
            w = problem.decay.double().reshape(1, -1, 1, 1)
        present = initial.present[..., None, None]
        error = 4.0 * u * (m.abs() + steps * w.abs()) + u
        depth = math.ceil(math.log2(self.s.shape[-1] + 2)) + 2.0
        moved = self.path[:, :, places, None] + (steps + depth) * self.r.exp * (w != 0)
        moved = moved + growth(float(CHUNK), self.r.accumulate) * w.abs() * (steps + CHUNK) * (w != 0)
        spread = u * u * (m.square() + (steps * w).square()) / 3.0
        return Start(
            torch.where(present, m + steps * w, -torch.inf).expand(drift.shape),
            torch.where(present, error + moved, 0.0).expand(drift.shape),
            torch.where(present, spread, 0.0).expand(drift.shape),
            torch.where(present, drift, 0.0),
        )

    def _with_mass(
        self, start: Start, x: torch.Tensor, certain: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The initial state as one more key, last, of logit m₀ + t w + log u₀ and value w₀/u₀."""
        assert self.problem.initial is not None
        mass = self.problem.initial.u.double()[..., None, None]
        logarithm = torch.log(mass.clamp(min=5e-324))
        own = torch.where(mass > 0, start.x + logarithm, -torch.inf)
        # Its mass may be far from 1: the argument of its exponential is m₀ − m, not that and log u₀.
        error = torch.where(own > -torch.inf, start.certain + 4.0 * self.r.elementwise * logarithm.abs(), 0.0)
        return torch.cat((x, own), -1), torch.cat((certain, error), -1)

    def _with_exponentials(
        self,
        places: torch.Tensor,
        row: Row,
        v: torch.Tensor,
        errors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        frame: torch.Tensor,
        start: Start | None,
    ) -> Weighed:
        """The row with what its exponentials add to the bound, the variance and the drift of its logits."""
        r, (certain, variance, drift) = self.r, errors
        seen = row.x > -torch.inf
        frame = torch.where(frame > -torch.inf, frame, 0.0)
        # A kernel compares levels: of an initial state m₀ + t w, whatever its mass.
        levels = row.x if start is None else torch.cat((row.x[..., :-1], start.x), -1)
        counted = replace(row, x=levels, count=(levels > -torch.inf).sum(-1, keepdim=True).double())
        rescales = (overtaking(counted, certain) + 4.0) * r.exp
        argued, spread = self._exponential(row.x, frame)
        certain = torch.where(seen, certain + argued + rescales, 0.0)
        variance = torch.where(seen, variance + spread, 0.0)
        stop = min(int(places[-1]) + 1, self.problem.sizes[2])
        lost = (self.logits.lost[:, :, None, :stop] & seen[..., :stop]).any(-1, keepdim=True)
        high = torch.where(seen, row.x, 0.0).abs() * LOG2E >= r.largest / 4.0
        lost = lost | high.any(-1, keepdim=True) | (frame.abs() * LOG2E >= r.largest / 4.0)
        if start is not None:
            argued, spread = self._exponential(start.x, frame)
            present = start.x > -torch.inf
            start = replace(
                start,
                certain=torch.where(present, start.certain + argued + rescales[..., -1:], 0.0),
                variance=torch.where(present, start.variance + spread, 0.0),
            )
            lost = lost | (frame - row.lse > DROWNED - 20.0)
        return Weighed(places, row, v, certain, rescales, variance, drift, frame, lost, start)

    def _exponential(self, x: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bound and variance of the relative error of e^{x − frame} by its argument, and by itself."""
        distance = torch.where(x > -torch.inf, (frame - x).clamp(min=0.0), 0.0)
        argued = 2.0 * self.r.elementwise * (2.0 * distance + frame.abs())
        return argued, ((2.0 * distance * self.r.elementwise).square() + self.r.exp**2) / 3.0

    def quotient(self, w: Weighed) -> Quotient:
        """o of some rows."""
        r, row, v = self.r, w.row, w.v
        o, gauge, n = row.p @ v, row.p @ v.abs(), row.count
        state = r.storage("state")[0]
        sums = growth(2.0 * n + 8.0, r.accumulate)
        sums = sums + (growth(n + 1.0, state) if state > r.elementwise else 0.0)
        weights = max(r.probabilities, r.operand)
        size = row.lse.abs() + 1.0
        division_free = torch.expm1((6.0 * r.elementwise + 2.0 * r.lse) * size).clamp(max=1e300)
        relative = sums + r.input + 6.0 * r.elementwise + division_free
        lift = w.lift
        normaliser = growth(4.0 * n + 16.0, r.accumulate) / 2.0 + 2.0 * n * r.probabilities_tiny * lift
        normaliser = normaliser + (growth(n + 1.0, state) if state > r.elementwise else 0.0)
        seen_sum = (row.x > -torch.inf).double() @ v.abs()
        tiny = r.probabilities_tiny * seen_sum + r.accumulate_tiny * (2.0 * n + 8.0)
        tiny = tiny * lift + (r.operand_tiny if r.input else 0.0)
        spread, sizes = Spread.of(row, v, o), Spread.of(row, v.abs(), gauge)

        def undivided(e: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            """Error for logit errors ``e`` and errors ``own`` of the numerator's terms."""
            inflated = gauge + sizes.shift(e)
            numerator = torch.where((inflated == 0) | (seen_sum == 0), 0.0, own * inflated)
            return spread.shift(e) + numerator + tiny

        # A denominator that sums P as stored shares its rounding, which then is one more error of the logits.
        shared = torch.where(row.x > -torch.inf, -math.log1p(-min(weights, 0.5)), 0.0)
        certain = torch.maximum(
            undivided(w.certain, relative + weights), undivided(w.certain + shared, relative)
        )
        scaled = o.abs() + certain
        certain = certain + torch.where(scaled == 0, 0.0, normaliser * scaled)
        lost = w.lost | (lift * n * r.probabilities_tiny * _LEAST >= 1.0)
        mass = torch.exp((row.lse - w.frame).clamp(max=_LARGEST_EXPONENT))
        lost = lost | (gauge * mass >= r.largest / 2.0).any(-1, keepdim=True)
        return Quotient(o, certain, self._variance(w, o), lost)

    def _variance(self, w: Weighed, o: torch.Tensor) -> torch.Tensor:
        r, row, v, n = self.r, w.row, w.v, w.row.count
        p = row.p
        squares = p.square() @ v.square()
        variance = second_moment(p.square() * w.variance + upheaved_weights(row, w.variance), v, o)
        tilted = p * torch.where(p > 0, row.x, 0.0)
        stretch = tilted @ v - o * tilted.sum(-1, keepdim=True)
        variance = variance + (2.0 * r.elementwise * stretch).square() / 3.0
        drifted = p * w.drift
        variance = variance + (drifted @ v - drifted.sum(-1, keepdim=True) * o).square()
        stored = max(r.probabilities, r.operand)
        if stored > 2.0**-20:
            variance = variance + stored**2 * (MEAN_SQUARE * squares + coincidence(p, stored) * o.square())
        variance = variance + r.input**2 * MEAN_SQUARE * squares
        lift = w.lift
        lost = r.probabilities_tiny**2 * v.square().sum(-2, keepdim=True) + n * r.accumulate_tiny**2
        variance = variance + lift.square() * lost / 3.0
        sums = n * MEAN_SQUARE * (squares / 2.0 + 2.0 * o.square() / 3.0)
        if r.truncated:
            return variance + (2.0**-23 * n / 2.0 * (p @ v.abs())).square()
        return variance + r.accumulate**2 * sums


def output_budget(problem: DecayedSoftmax, reference: Mapping[str, Enclosure], contract: Contract) -> Budget:
    """The budget of o."""
    errors, dtype = RowErrors(problem, contract), dtype_name(problem.dtype)
    exact = reference["o"].value
    parts = [errors.quotient(errors.weighed(places)) for places in problem.runs()]
    estimate = Estimate(exact)
    if parts:
        held = [
            torch.cat([x.expand(part.o.shape) for part, x in zip(parts, xs, strict=True)], 2)
            for xs in (
                [part.certain for part in parts],
                [part.variance for part in parts],
                [part.lost for part in parts],
            )
        ]
        if problem.sample is not None:
            shape = (*problem.sizes[:2], problem.sizes[2], problem.sizes[3])
            held = [x.new_zeros(shape).index_copy_(2, problem.sample, x) for x in held]
        certain, variance, lost = (x.reshape(exact.shape) for x in held)
        estimate = Estimate(exact, certain.nan_to_num(torch.inf), variance.nan_to_num(1e300, 1e300), lost)
    left = problem.unjudged
    left = left if exact.dim() == 4 else left[:, 0]
    budget = sampled_budget(estimate, exact, contract, dtype, problem.closed("o"), left)
    return with_leaks(budget, contract, broadcast_mask(problem.tainted, problem.shape("o")))


def common_errors(w: Weighed, r: Roundings) -> tuple[torch.Tensor, torch.Tensor]:
    """Bound and variance of log of a row's normaliser, (B, H, R, 1), as a backward kernel has it stored."""
    row, size, state = w.row, w.row.lse.abs() + 1.0, r.storage("state")[0]
    _, shift = normaliser_shift(row, w.certain)
    certain = shift + growth(2.0 * row.count + 8.0, r.accumulate) + (8.0 * r.elementwise + 2.0 * r.lse) * size
    certain = certain + 2.0 * row.count * r.probabilities_tiny * w.lift
    certain = certain + (growth(row.count + 1.0, state) if state > r.elementwise else 0.0)
    variance = (row.p.square() * w.variance).sum(-1, keepdim=True)
    variance = variance + ((2.0 * r.elementwise + r.lse) * size).square() / 3.0
    return certain, variance + row.count / 3.0 * MEAN_SQUARE * r.accumulate**2
