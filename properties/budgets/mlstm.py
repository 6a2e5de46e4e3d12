"""Errors of the mLSTM's weights and quotients: closed forms over its quadratic form.

A kernel may step through the sequence, work on chunks of up to 128 positions, or form all scores at once.
What is counted for the weight of position j in row i, relative to scale·Σ|q||k|·e^{D_ij − m_i}, is the sum of

* i − j + 1 steps of a recurrence: an exponential, two products and a sum each, whose exponent is made of
  log σ(f_t), m_{t−1} and m_t (u times each; u also for log(1 + e^−|f|), which may be formed from 1 + e^−|f|);
* a running sum of log σ(f) that starts up to 128 positions before j: γ_128 Σ|log σ(f_t)|;
* three rounded operands on the way through a chunk's state (decayed q, decayed k, the state itself) or one on
  the way through P, in the declared format; the declared format of the state at every step;
* dot products over D and sums over the positions so far: γ_n;

an initial state is one position before the first, whose exponent is made of m₀ and all gates up to i;

and absolutely what underflows in those operands. Where |Σ P| is within its error of e^{−m}, either may be the
denominator; e^{−m} beyond the largest number makes o zero in a kernel that divides by it, which is allowed,
and where the denominator's error reaches 0 nothing is asked (contract.md, singular cases).

The probable error takes the same in quadrature, with the errors of decays and of the chunk's state, which
many positions share, counted as common to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.enclosures import Ball, EnclosureArithmetic
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.families.mlstm import MLSTMProblem
    from attnproof.properties.families.mlstm_rows import Rows, Tile

__all__ = ["CHUNK", "MLSTMErrors", "Quotient", "Weights"]

CHUNK = 128
"""The longest chunk over which a kernel may sum log gates before it takes differences."""

# How far before a position a healthy kernel's running sum of gates starts, typically.
_TYPICAL = 32
_LARGEST_EXPONENT = 700.0
# A healthy kernel's decision at a kink is open within this many standard deviations (as in propagation).
_UNDECIDED = 6.0


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of some rows by some columns, and their errors; float64 (B, H, rows, columns).

    Attributes:
        start, stop: the columns; of the initial state, where ``initial`` holds, its D channels.
        e, p: as in the family's tiles.
        keys, values, ones: float64 (B, H, columns, ·) of the columns, with what n sums in place of values.
        age: steps of a recurrence from a column to a row.
        size: |scale| Σ|q||k| e; square: scale² Σ q²k² e².
        certain: error of a weight in units of ``size``; core: without rounded operands; exponent: the
            exponent's part of that.
        variance: of a weight, without what is common to a row; drift: of its exponent.
    """

    start: int
    stop: int
    initial: bool
    e: torch.Tensor
    p: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    ones: torch.Tensor
    age: torch.Tensor
    size: torch.Tensor
    square: torch.Tensor
    certain: torch.Tensor
    core: torch.Tensor
    exponent: torch.Tensor
    variance: torch.Tensor
    drift: torch.Tensor


@dataclass(frozen=True, eq=False)
class Quotient:
    """Σ P v and Σ P of some rows, and the denominator; (B, H, rows, E) and (B, H, rows, 1).

    All are multiplied by e^{min(m, 0)}, ``factor``.

    Attributes:
        o, largest: the output, and the denominator N.
        certain, variance: of o before it is stored.
        relative, relative_variance: the error of 1/N relative to it.
        lost: bool, where N may be 0 or an intermediate may overflow.
        unbounded: bool, where e^{−m} may be no number, and 1/N zero.
        share: sign(Σ P) where it is the denominator, else 0; open: where either may be.
    """

    o: torch.Tensor
    factor: torch.Tensor
    largest: torch.Tensor
    certain: torch.Tensor
    variance: torch.Tensor
    relative: torch.Tensor
    relative_variance: torch.Tensor
    lost: torch.Tensor
    unbounded: torch.Tensor
    share: torch.Tensor
    open: torch.Tensor
    likely_open: torch.Tensor


class MLSTMErrors:
    """The errors of a kernel under ``contract`` on one problem."""

    def __init__(self, problem: MLSTMProblem, contract: Contract) -> None:
        self.problem = problem
        self.r = Roundings.of(contract, dtype_name(problem.dtype))
        self.wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
        self.flush = torch.finfo(self.wide).tiny
        self.operand = max(self.r.operand, self.r.input)
        gates = problem.gates
        f = gates.f.double()
        self.log_f = f.clamp(max=0.0) - torch.log1p(torch.exp(-f.abs()))
        begun = torch.zeros(*f.shape[:2], 1, dtype=torch.float64)
        # (B, H, 1): the initial level, 0 where there is none.
        self.level, self.begun = begun, begun > 0
        if problem.initial is not None:
            self.level = problem.initial.m.double()[..., None]
            self.begun = problem.initial.present[..., None]
        self.m = self._maxima()
        before = torch.cat((self.level, self.m[..., :-1]), -1) if self.m.shape[-1] else self.m
        u, size = self.r.elementwise, torch.maximum(self.m.abs(), before.abs())
        step = u * (6.0 + 4.0 * self.log_f.abs() + 4.0 * size) + self.r.exp
        self.steps = step.cumsum(-1)
        squares = u * u * (1.0 + MEAN_SQUARE * (self.log_f.square() + 2.0 * size.square()))
        self.step_squares = squares.cumsum(-1)
        self.decay = self.log_f.abs().cumsum(-1)

    def _maxima(self) -> torch.Tensor:
        """m_t, by its recurrence, (B, H, N)."""
        i, cut = self.problem.gates.i.double(), self.problem.gates.cut
        m = torch.empty_like(i)
        last = torch.where(self.begun, self.level, -math.inf)[..., 0]
        for t in range(i.shape[-1]):
            last = torch.where(cut[..., t], -math.inf, last + self.log_f[..., t])
            last = torch.maximum(last, i[..., t])
            m[..., t] = last
        return m

    def rows(self) -> Iterator[Rows[Ball]]:
        """The problem's rows that are judged, block by block."""
        a = EnclosureArithmetic()
        for first, stop in self.problem.runs():
            yield self.problem.rows(a, first, stop)

    def exponent(self, first: int, stop: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Bound and variance of the error of D_ij − m_i for rows ``first:stop``, columns ``start:end``."""
        u = self.r.elementwise
        i, j = torch.arange(first, stop), torch.arange(start, end)
        m_i, m_j = self.m[..., i, None].abs(), self.m[..., None, j].abs()
        gate = self.problem.gates.i.double()[..., None, j].abs()
        walked = (self.steps[..., i, None] - self.steps[..., None, j]).clamp(min=0.0)
        began = torch.nn.functional.pad(self.decay, (CHUNK, 0))[..., None, j]
        summed = growth(float(CHUNK), self.r.accumulate) * (self.decay[..., i, None] - began).clamp(min=0.0)
        summed = torch.where(i[:, None] > j[None, :], summed, 0.0)
        ends = 2.0 * u * (gate + m_j + m_i) + 2.0 * self.r.exp
        wandered = (self.step_squares[..., i, None] - self.step_squares[..., None, j]).clamp(min=0.0)
        partial = (
            self.decay[..., i, None] - torch.nn.functional.pad(self.decay, (_TYPICAL, 0))[..., None, j]
        ) * u
        partial = torch.where(i[:, None] > j[None, :], partial, 0.0)
        variance = wandered + 8.0 * MEAN_SQUARE * partial.square()
        variance = variance + u * u * MEAN_SQUARE * (gate.square() + m_j.square() + m_i.square() + 8.0)
        return walked + summed + ends, variance

    def initial_exponent(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for F_i + m₀ − m_i, (B, H, rows, 1)."""
        u, i = self.r.elementwise, torch.arange(first, stop)
        m_i, level, decay = self.m[..., i, None].abs(), self.level.abs()[..., None], self.decay[..., i, None]
        bound = self.steps[..., i, None] + growth(float(CHUNK), self.r.accumulate) * decay
        bound = bound + 2.0 * u * (2.0 * level + m_i) + 2.0 * self.r.exp
        variance = self.step_squares[..., i, None] + 8.0 * MEAN_SQUARE * (u * decay).square()
        return bound, variance + u * u * MEAN_SQUARE * (2.0 * level.square() + m_i.square() + 8.0)

    def weights(self, rows: Rows[Ball]) -> list[Weights]:
        """Of all columns that the rows see."""
        problem = self.problem
        unit = torch.eye(problem.sizes[3], dtype=torch.float64)
        q = unit if rows.q is None else problem.q[:, :, rows.first : rows.stop].double()
        return [self._of_tile(rows, tile, q, unit) for tile in rows.tiles]

    def _of_tile(self, rows: Rows[Ball], tile: Tile[Ball], q: torch.Tensor, unit: torch.Tensor) -> Weights:
        r, problem, scale = self.r, self.problem, rows.scale
        width, i = problem.sizes[3], torch.arange(rows.first, rows.stop)[:, None]
        p: torch.Tensor = tile.p.value
        e: torch.Tensor = tile.e.value.expand(p.shape)
        if tile.initial and problem.initial is not None:
            k, v = unit.expand(*p.shape[:2], -1, -1), problem.initial.state.double()
            ones, age = problem.initial.n.double()[..., None], i + 2
            exponent, drift = self.initial_exponent(rows.first, rows.stop)
        else:
            k, v = (x[:, :, tile.start : tile.stop].double() for x in (problem.k, problem.v))
            ones = torch.ones(*k.shape[:3], 1, dtype=torch.float64)
            age = (i - torch.arange(tile.start, tile.stop)[None, :] + 1).clamp(min=0)
            exponent, drift = self.exponent(rows.first, rows.stop, tile.start, tile.stop)
        size = abs(scale) * (q.abs() @ k.abs().mT) * e
        square = scale * scale * (q.square() @ k.square().mT) * e.square()
        # the argument of an exponential that is far below 1 is itself rounded
        exponent = exponent + 2.0 * r.elementwise * -torch.log(e.clamp(min=1e-308))
        state = r.storage("state")[0]
        core = (
            torch.expm1(exponent.clamp(max=_LARGEST_EXPONENT))
            + growth(i + float(width + CHUNK + 8), r.accumulate)
            + 3.0 * growth(age, r.elementwise)
            + (growth(age + 1.0, state) if state > r.elementwise else 0.0)
        )
        certain = core + (1.0 + self.operand) ** 3 * (1.0 + r.probabilities) - 1.0
        variance = p.square() * (MEAN_SQUARE * r.probabilities**2 + drift)
        variance = variance + square * MEAN_SQUARE * (
            self.operand**2 + r.accumulate**2 * width + (state**2 * age if state > r.elementwise else 0.0)
        )
        if self.operand:
            variance = variance + ((e > 0) & (p != 0)).double() * (r.operand_tiny**2 / 3.0)
        # exponentials below the smallest normal number are flushed to zero
        variance = variance + torch.where(e < self.flush, p, torch.zeros_like(p)).square()
        return Weights(
            tile.start, tile.stop, tile.initial, e, p, k, v, ones, age, size, square, certain, core, exponent,
            variance, drift,
        )  # fmt: skip

    def lost_operands(self, weights: list[Weights]) -> torch.Tensor:
        """Rows (B, H, rows, 1) in which a weight may overflow as an operand, or a score in float32.

        Or what is read of the initial state.
        """
        largest = min(self.r.storage("operand")[2], self.r.storage("probabilities")[2])
        over = [((w.size >= largest / 2.0) & (w.e > 0)).any(-1, keepdim=True) for w in weights]
        for w in weights:
            if w.initial:
                read = w.size @ torch.cat((w.values, w.ones), -1).abs()
                over.append((read >= self.r.largest / 2.0).any(-1, keepdim=True))
        return torch.stack(over).any(0)

    def sums(
        self, rows: Rows[Ball], weights: list[Weights], *, normaliser: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Σ P v, or with ``normaliser`` Σ P, the bound of its error and its variance."""
        r, problem = self.r, self.problem
        total = certain = variance = squares = aged = mass = torch.zeros((), dtype=torch.float64)
        q1 = abs(problem.scale) * problem.q[:, :, rows.first : rows.stop].double().abs().sum(-1, keepdim=True)
        places = torch.arange(rows.first, rows.stop, dtype=torch.float64)[:, None]
        for w in weights:
            v = w.ones if normaliser else w.values
            k1 = w.keys.abs().sum(-1)[:, :, None, :]
            seen = (w.e > 0).double()
            total = total + w.p @ v
            certain = certain + (w.size * w.certain) @ v.abs()
            # decayed operands that underflow: P, k, the state and q
            lost = r.operand_tiny * (
                (1.0 + q1) * (seen @ v.abs()) + abs(problem.scale) * (w.e * k1) @ v.abs()
            )
            # the decay may be v's in place of k's
            lost = lost + r.operand_tiny * q1 * _largest(k1) * seen.sum(-1, keepdim=True)
            certain = certain + lost + self.flush * q1 * _largest(k1) * (seen @ v.abs())
            variance = variance + w.variance @ v.square()
            squares = squares + w.p.square() @ v.square()
            aged = aged + (w.p.abs() * w.age).sum(-1, keepdim=True)
            mass = mass + w.p.abs().sum(-1, keepdim=True)
        certain = certain + (r.operand_tiny + r.accumulate_tiny * (places + 1.0)) * q1
        terms = (places + 1.0).clamp(max=float(CHUNK))
        variance = variance + r.accumulate**2 * terms * (squares / 2.0 + total.square() / 3.0) * MEAN_SQUARE
        # subnormal products: of keys and values in every step of a state that q reads, or of P and v
        steps = (places + 1.0) * (1.0 + q1.square()) + float(problem.sizes[3])
        variance = variance + steps * (r.accumulate_tiny**2 / 3.0)
        # decays err alike for all positions before them
        age = aged / mass.clamp(min=1e-300)
        variance = variance + total.square() * (r.elementwise**2 * age)
        return total, certain, variance

    def quotient(
        self, rows: Rows[Ball], weights: list[Weights], shared: torch.Tensor | None = None
    ) -> Quotient:
        """o of the rows with its errors; ``shared`` is variance of Σ P v that rounded states add."""
        u = self.r.elementwise
        num, num_certain, num_variance = self.sums(rows, weights, normaliser=False)
        den, den_certain, den_variance = self.sums(rows, weights, normaliser=True)
        if shared is not None:
            num_variance = num_variance + shared
        m = rows.shift
        factor, least = torch.exp(m.clamp(max=0.0)), torch.exp(-m.clamp(min=0.0))
        moved = self.maximum_error(weights)
        common = moved + 2.0 * u * m.abs() + self.r.exp
        least_certain = least * common + 2.0 * self.flush
        common_variance = (u * m).square() / 3.0 + u * u
        # hardware flushes an e^m that is subnormal to zero, and o with it
        common_variance = common_variance + (factor < 2.0 * self.flush).double()
        num, den = num * factor, den * factor
        num_certain = num_certain * factor * (1.0 + common) + num.abs() * common + self.flush
        den_certain = den_certain * factor * (1.0 + common) + den.abs() * common + self.flush
        largest = torch.maximum(den.abs(), least)
        nearest = den.abs() - least
        apart = den_certain + least_certain
        spread = (den_variance * factor.square()).sqrt() * _UNDECIDED + _UNDECIDED * u * least
        bound = torch.where(nearest > -apart, torch.maximum(den_certain, least_certain), least_certain)
        lower = torch.maximum(largest - bound, least - least_certain)
        lost = (lower <= 0) | self.lost_operands(weights)
        lower = lower.clamp(min=1e-300)
        o = num / largest
        certain = (num_certain + o.abs() * bound) / lower + 4.0 * u * o.abs() + self.r.accumulate_tiny
        # e^{−m} is no number in float32: dividing by it gives 0
        unbounded = -m > math.log(self.r.largest / 4.0)
        certain = torch.where(unbounded, torch.maximum(certain, o.abs()), certain)
        by_total = nearest > -spread
        relative_variance = torch.where(by_total, den_variance * factor.square(), 0.0) / largest.square()
        relative_variance = relative_variance + common_variance
        variance = num_variance * factor.square() / largest.square() + o.square() * relative_variance
        share = torch.where(nearest > 0, 1.0, torch.where(nearest == 0, 0.5, 0.0)) * den.sign()
        relative = bound / lower + common
        return Quotient(
            o, factor, largest, certain, variance, relative, relative_variance, lost, unbounded, share,
            nearest.abs() <= apart, nearest.abs() <= spread,
        )  # fmt: skip

    def maximum_error(self, weights: list[Weights]) -> torch.Tensor:
        """How far a kernel's m may be from m, (B, H, rows, 1): by the exponents of what may be largest."""
        far = torch.stack([torch.where(w.e == 0, 0.0, w.exponent).amax(-1, keepdim=True) for w in weights])
        near = torch.stack([torch.where(w.e < 0.5, 0.0, w.exponent).amax(-1, keepdim=True) for w in weights])
        worst = far.amax(0)
        return torch.where(worst > 0.3, worst, near.amax(0))

    def states(self) -> list[torch.Tensor]:
        """C' before each block of rows, (B, H, D, E), in the scale of m after the block before."""
        batch, heads, length, width, value_width = self.problem.sizes
        state = torch.zeros(batch, heads, width, value_width, dtype=torch.float64)
        if self.problem.initial is not None:
            state = self.problem.initial.state.double()
        found = []
        for first in range(0, length, self.problem.block):
            found.append(state)
            stop = min(first + self.problem.block, length)
            kept, written = self.boundary(first, stop)
            k, v = (x[:, :, first:stop].double() for x in (self.problem.k, self.problem.v))
            state = kept[..., -1:, None] * state + (k * written[..., None]).mT @ v
        return found

    def boundary(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """e^{F_i − F + m − m_i}, from before a block to each row, and e^{F' − F_j + i_j − m'}, to its end."""
        gates, log_f = self.problem.gates, self.log_f[..., first:stop]
        cuts = gates.cut[..., first:stop].cumsum(-1)
        sums = log_f.cumsum(-1)
        m = self.m[..., first:stop]
        before = self.m[..., first - 1 : first] if first else self.level
        kept = torch.exp((sums + before - m).clamp(max=0.0))
        if not first:
            kept = kept * self.begun
        written = torch.exp(
            (sums[..., -1:] - sums + gates.i.double()[..., first:stop] - m[..., -1:]).clamp(max=0.0)
        )
        return kept * (cuts == 0), written * (cuts == cuts[..., -1:])

    def shared(self, first: int, stop: int, state: torch.Tensor) -> torch.Tensor:
        """Variance of Σ P v by roundings of the state before the block and of q decayed from it."""
        start = first // self.problem.block * self.problem.block
        kept = self.boundary(start, stop)[0][..., first - start :]
        q = self.problem.q[:, :, first:stop].double() * (kept[..., None] * self.problem.scale)
        return 2.0 * self.operand**2 * MEAN_SQUARE * (q.square() @ state.square())


def _largest(x: torch.Tensor) -> float:
    """The largest entry, 0 of none."""
    return float(x.amax()) if x.numel() else 0.0
