"""Budgets of the mLSTM's gradients: closed forms over the weights of its quadratic form.

A kernel recomputes the weights, takes δ from the stored o (or sums it anew), rounds dO/N, P and dS to the
declared formats, and carries the cotangent of the state from chunk to chunk as it carried the state. The
gradient of the forget gates is counted for the less accurate of two ways: reverse cumulative sums of q·dq and
of k·dk taken off each other, in which a pair of positions i ≥ j ≥ t counts twice although it cancels.

The final state is D rows more, of the last position, whose cotangents are given and whose weights have the
error of the level besides. The initial state's gradient is that of D columns.

Where |Σ P| is within its error of e^{−m}, δ may be there or not: the certain budget holds all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.enclosures import Ball, EnclosureArithmetic
from attnproof.properties.budgets.mlstm import MLSTMErrors, Quotient, Weights
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import MEAN_SQUARE, growth
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.families.mlstm import MLSTMProblem
    from attnproof.properties.families.mlstm_rows import Rows

__all__ = ["gradient_estimates"]


@dataclass(frozen=True, eq=False)
class _Cotangents:
    """Cotangents of Σ P v and Σ P of some rows: dO/N (B, H, rows, E) and δ (B, H, rows, 1), with errors.

    Attributes:
        relative, relative_variance: of 1/N, common to a row.
        values_certain: of dO/N by underflow, or because e^{−m} is no number and 1/N zero.
        delta_certain, delta_variance: of δ, without what ``relative`` holds.
        given: |dO|, or |dC'|, before it is divided by anything.
    """

    given: torch.Tensor
    values: torch.Tensor
    values_certain: torch.Tensor
    delta: torch.Tensor
    relative: torch.Tensor
    relative_variance: torch.Tensor
    delta_certain: torch.Tensor
    delta_variance: torch.Tensor


class _Sums:
    """Value, bound and variance of every gradient, filled block by block.

    ``lost`` is what products that are subnormal in the accumulation's format lose: all of them may be rounded
    the same way, so that it counts by its sum, not by that of its squares.
    """

    def __init__(self, problem: MLSTMProblem) -> None:
        batch, heads, length, width, value_width = problem.sizes
        shapes = {name: (batch, heads, length, size) for name, size in problem.widths.items()}
        shapes["dinitial_state"] = (batch, heads, width, value_width)
        shapes["dinitial_n"] = (batch, heads, width, 1)
        self.value, self.certain, self.variance, self.lost = (
            {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
            for _ in range(4)
        )

    def add(
        self,
        name: str,
        start: int,
        value: torch.Tensor,
        certain: torch.Tensor,
        variance: torch.Tensor,
        lost: torch.Tensor,
    ) -> None:
        """Add to the rows from ``start`` on."""
        tables = self.value, self.certain, self.variance, self.lost
        for table, x in zip(tables, (value, certain, variance, lost), strict=True):
            table[name][:, :, start : start + x.shape[2]] += x


def gradient_estimates(
    problem: MLSTMProblem, contract: Contract, cotangents: Mapping[str, torch.Tensor]
) -> dict[str, Estimate]:
    """All gradients with the errors of a kernel under ``contract``, before they are stored."""
    parts = [
        _of_sequence(MLSTMErrors(part, contract), problem.part_cotangents(s, cotangents))
        for s, (_, part) in enumerate(problem.parts())
    ]
    found = {}
    for name in problem.differentiated:
        key, shape = f"d{name}", problem.input_shape(name)
        axis = 0 if name.startswith("initial_") else 2
        value, certain, variance, mark = (torch.cat([x[key][i] for x in parts], axis) for i in range(4))
        found[key] = Estimate(
            value.reshape(shape),
            certain.reshape(shape).nan_to_num(torch.inf, torch.inf),
            variance.reshape(shape).nan_to_num(1e300, 1e300),
            mark.reshape(shape) if bool(mark.any()) else None,
        )
    return found


def _of_sequence(
    errors: MLSTMErrors, cotangents: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Value, bound, variance of every gradient of one part, and where nothing is asked of it."""
    problem, sums = errors.problem, _Sums(errors.problem)
    dstate, dn = (cotangents[name].double() for name in ("state", "n"))
    lost = torch.zeros((), dtype=torch.bool)
    if problem.sizes[2]:
        lost = _add_positions(errors, sums, {"o": cotangents["o"].double(), "state": dstate, "n": dn})
        _finish_gates(errors, sums)
    else:
        # The final state is the initial one. Of a neutral one e^m is 0, and so may be its gradient.
        sums.value |= {"dinitial_state": dstate, "dinitial_n": dn[..., None]}
        if problem.initial is not None:
            neutral = ~problem.initial.present[..., None, None]
            for name in ("dinitial_state", "dinitial_n"):
                size = sums.value[name].abs()
                sums.certain[name] = torch.where(neutral, size, torch.zeros_like(size))
                sums.variance[name] = sums.certain[name].square()
    # Every product and sum of a gradient may underflow.
    tiny = errors.r.accumulate_tiny * (problem.sizes[2] + 2)
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, value in sums.value.items():
        certain = sums.certain[name] + tiny
        over = value.abs() + certain >= errors.r.largest / 2.0
        variance = sums.variance[name] + sums.lost[name] ** 2 / 12.0
        found[name] = (value, certain, variance, over | lost)
    return found


def _add_positions(errors: MLSTMErrors, sums: _Sums, cotangents: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What all rows and the final state add; whether an intermediate may overflow."""
    states = errors.states() if errors.operand else []
    blocks, weights = [], []
    lost = torch.zeros((), dtype=torch.bool)
    for number, rows in enumerate(errors.rows()):
        weights = errors.weights(rows)
        state = states[number] if states else None
        shared = None if state is None else errors.shared(rows.first, rows.stop, state)
        quotient = errors.quotient(rows, weights, shared)
        do = cotangents["o"][:, :, rows.first : rows.stop]
        found = _cotangents(errors, quotient, do)
        lost = lost | quotient.lost.any()
        lost = lost | _add_rows(errors, sums, rows, weights, found)
        blocks.append((rows.first, rows.stop, found))
    if bool(cotangents["state"].any() | cotangents["n"].any()):
        rows = errors.problem.final_rows(EnclosureArithmetic())
        given = _given_cotangents(errors, cotangents, errors.maximum_error(weights)[:, :, -1:])
        lost = lost | _add_rows(errors, sums, rows, errors.weights(rows), given)
    if errors.operand:
        _add_states(errors, sums, states, blocks, cotangents["state"])
    return lost


def _given_cotangents(
    errors: MLSTMErrors, cotangents: Mapping[str, torch.Tensor], moved: torch.Tensor
) -> _Cotangents:
    """Those of the final state's rows, in units of a level that errs by ``moved``."""
    values, delta = cotangents["state"], cotangents["n"][..., None]
    zero = torch.zeros_like(delta)
    common = zero + 16.0 * errors.r.elementwise**2
    given = torch.zeros_like(values)
    return _Cotangents(values.abs(), values, given, delta, moved + zero, common, zero, zero)


def _cotangents(errors: MLSTMErrors, quotient: Quotient, do: torch.Tensor) -> _Cotangents:
    r, width = errors.r, do.shape[-1]
    inverse = quotient.factor / quotient.largest
    dot = (do * quotient.o).sum(-1, keepdim=True)
    size = (do.abs() * quotient.o.abs()).sum(-1, keepdim=True)
    delta = -dot * inverse * quotient.share
    certain = (do.abs() * (quotient.certain + (r.output + r.operand) * quotient.o.abs() + r.output_tiny)).sum(
        -1, keepdim=True
    )
    certain = certain + growth(width + 4.0, r.accumulate) * size
    whole = inverse * (dot.abs() + certain)
    certain = torch.where(quotient.share != 0, inverse * certain, 0.0)
    certain = torch.where(quotient.open, whole, certain)
    stored = MEAN_SQUARE * (r.output**2 + r.accumulate**2 * width) * quotient.o.square()
    variance = (do.square() * (quotient.variance + stored)).sum(-1, keepdim=True) * inverse.square()
    variance = torch.where(quotient.share != 0, variance, 0.0)
    variance = torch.where(quotient.likely_open, (inverse * dot).square() + variance, variance)
    values = do * inverse
    vanished = errors.flush + torch.where(quotient.unbounded, values.abs(), 0.0)
    vanished = torch.where(do == 0, 0.0, vanished)
    certain = certain + errors.flush * (dot != 0) + torch.where(quotient.unbounded, delta.abs(), 0.0)
    return _Cotangents(
        do.abs(), values, vanished, delta, quotient.relative, quotient.relative_variance, certain, variance
    )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """G of some rows by some columns and its errors, (B, H, rows, columns); see the family's formulas.

    Attributes:
        g, certain: without what 1/N errs by; lost: of its bound, by underflow, as a sum.
        variance: without what is common to a row; alike: that.
        relative, rounded: errors of P, and of e, relative to their sizes, in a sum over rows.
        share: mean square of the relative error of e·G by rounding it and by e's exponent.
        seen: float64, 1 where a column is seen; tiny, least: what a product or sum loses by underflow, at
            most and typically.
    """

    g: torch.Tensor
    certain: torch.Tensor
    variance: torch.Tensor
    alike: torch.Tensor
    lost: torch.Tensor
    relative: torch.Tensor
    rounded: torch.Tensor
    share: torch.Tensor
    seen: torch.Tensor
    tiny: float
    least: float

    @classmethod
    def of(cls, errors: MLSTMErrors, w: Weights, c: _Cotangents) -> _Pairs:
        """Those of rows with cotangents ``c`` and columns with weights ``w``."""
        r, problem = errors.r, errors.problem
        v, ones, values, width = w.values, w.ones.mT, c.values.abs(), c.values.shape[-1]
        tiny, least = r.operand_tiny + r.accumulate_tiny * problem.sizes[2], 2.0 * r.accumulate_tiny
        # of sums over rows, and over the longer of two widths
        sum_error = growth(float(sum(problem.sizes[2:4]) + width + 8), r.accumulate)
        stored = r.storage("dscores")[0]
        g = c.values @ v.mT + c.delta * ones
        size = values @ v.abs().mT + c.delta.abs() * ones.abs()
        terms = v.abs().sum(-1)[:, :, None, :] + ones.abs()
        certain = (3.0 * errors.operand + sum_error) * size + c.relative * g.abs()
        certain = certain + c.delta_certain * ones.abs() + c.values_certain @ v.abs().mT + tiny * terms
        squares = c.values.square() @ v.square().mT
        return cls(
            g=g,
            certain=certain,
            variance=MEAN_SQUARE * (errors.operand**2 + r.accumulate**2 * width) * squares,
            alike=g.square() * c.relative_variance + c.delta_variance * ones.square(),
            lost=least * terms,
            relative=w.certain + errors.operand + stored + sum_error,
            rounded=w.core + errors.operand + stored + sum_error,
            share=MEAN_SQUARE * (stored**2 + errors.operand**2) + w.drift,
            seen=(w.e > 0).double(),
            tiny=tiny,
            least=least,
        )


def _add_rows(
    errors: MLSTMErrors, sums: _Sums, rows: Rows[Ball], weights: list[Weights], c: _Cotangents
) -> torch.Tensor:
    """What a block of rows adds to every gradient; df still by log σ(f), and as its rows' sums only.

    Returns:
        Whether dP or dS may be beyond the largest number of the format that they are stored in.
    """
    largest, beyond = errors.r.storage("dscores")[2], torch.zeros((), dtype=torch.bool)
    wide = math.sqrt(12.0 * sum(errors.problem.sizes[3:]))
    for w in weights:
        pairs = _Pairs.of(errors, w, c)
        products = c.given @ w.values.abs().mT
        # Scores are those of queries and keys; states are no operands of them.
        scores = (pairs.seen > 0) & (rows.q is not None and not w.initial)
        stored = torch.maximum(products, pairs.g.abs() + pairs.certain)
        beyond = beyond | ((stored >= largest / 2.0) & scores).any()
        _add_scores(errors, sums, rows, w, c, pairs)
        _add_values(errors, sums, w, c, pairs)
        dd, p_moved, size = w.p * pairs.g, w.size * pairs.relative, pairs.g.abs()
        tables = (
            dd,
            w.p.abs() * pairs.certain + p_moved * (size + pairs.certain) + pairs.tiny * pairs.seen,
            w.p.square() * (pairs.variance + pairs.alike + pairs.g.square() * pairs.share)
            + w.variance * pairs.g.square(),
            # also as Σ q∘dq or Σ v∘dv, over the widths
            w.p.abs() * pairs.lost + pairs.least * wide * pairs.seen,
        )
        if not w.initial:
            sums.add("di", w.start, *(x.sum(2)[..., None] for x in tables))
        of_rows = [x.sum(-1, keepdim=True) for x in tables]
        if rows.q is None:
            # All are rows of the last position.
            of_rows = [x.sum(2, keepdim=True) for x in of_rows]
        sums.add("df", rows.first, *of_rows)
    return beyond


def _add_scores(
    errors: MLSTMErrors, sums: _Sums, rows: Rows[Ball], w: Weights, c: _Cotangents, pairs: _Pairs
) -> None:
    """dq, and dk of columns that are positions."""
    k, scale, g = w.keys, rows.scale, pairs.g
    ds, factor = scale * w.e * g, abs(scale) * w.e
    certain = factor * (g.abs() * pairs.rounded + pairs.certain * (1.0 + pairs.rounded))
    certain = certain + pairs.tiny * pairs.seen
    variance = factor.square() * (pairs.variance + g.square() * pairs.share)
    variance = variance + torch.where(w.e < errors.flush, ds, torch.zeros_like(ds)).square()
    lost = factor * pairs.lost + pairs.least * pairs.seen
    if rows.q is not None:
        # what is common to a row does not average out over its columns
        coherent = c.relative_variance * (ds @ k).square()
        coherent = coherent + c.delta_variance * (scale * (w.e * w.ones.mT) @ k).square()
        spread = variance @ k.square() + coherent
        sums.add("dq", rows.first, ds @ k, certain @ k.abs(), spread, lost @ k.abs())
    if not w.initial:
        q = torch.eye(k.shape[-1], dtype=torch.float64)
        if rows.q is not None:
            q = errors.problem.q[:, :, rows.first : rows.stop].double()
        alone = variance + factor.square() * pairs.alike
        spread = alone.mT @ q.square()
        sums.add("dk", w.start, ds.mT @ q, certain.mT @ q.abs(), spread, lost.mT @ q.abs())


def _add_values(errors: MLSTMErrors, sums: _Sums, w: Weights, c: _Cotangents, pairs: _Pairs) -> None:
    """dv; of the initial state's columns dC'₀, and dn'₀ = Σ P δ."""
    values, delta = c.values.abs(), c.delta.abs()
    certain = w.size * (pairs.relative + c.relative) + pairs.tiny * pairs.seen
    variance = w.variance + w.p.square() * (c.relative_variance + MEAN_SQUARE * errors.operand**2)
    lost = pairs.least * w.size.sum(2)[..., None]
    sums.add(
        "dinitial_state" if w.initial else "dv",
        w.start,
        w.p.mT @ c.values,
        certain.mT @ values + w.size.mT @ c.values_certain,
        variance.mT @ c.values.square(),
        pairs.least * (pairs.seen.mT @ values) + lost,
    )
    if w.initial:
        delta_certain = c.delta_certain + pairs.tiny
        sums.add(
            "dinitial_n",
            0,
            w.p.mT @ c.delta,
            certain.mT @ delta + (w.size + certain).mT @ delta_certain,
            variance.mT @ c.delta.square() + w.p.square().mT @ c.delta_variance,
            pairs.least * (pairs.seen.mT @ delta) + lost,
        )


def _add_states(
    errors: MLSTMErrors,
    sums: _Sums,
    states: list[torch.Tensor],
    blocks: list[tuple[int, int, _Cotangents]],
    final: torch.Tensor,
) -> None:
    """Variance by rounding the state between blocks, its cotangent, and what is decayed to and from them."""
    problem, unit, cotangent = errors.problem, 2.0 * errors.operand**2 * MEAN_SQUARE, final
    for (first, stop, c), state in zip(reversed(blocks), reversed(states), strict=True):
        q, k, v = (x[:, :, first:stop].double() for x in (problem.q, problem.k, problem.v))
        kept, written = (x[..., None] for x in errors.boundary(first, stop))
        dq = unit * (problem.scale * kept).square() * (c.values.square() @ state.square().mT)
        dk = unit * written.square() * (v.square() @ cotangent.square().mT)
        dv = unit * written.square() * (k.square() @ cotangent.square())
        for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
            sums.variance[name][:, :, first:stop] += x
        for name, gate in (("di", dk * k.square()), ("df", dq * q.square())):
            sums.variance[name][:, :, first:stop] += gate.sum(-1, keepdim=True)
        last = kept[:, :, -1:]
        cotangent = last * cotangent + (q * kept * problem.scale).mT @ c.values


def _finish_gates(errors: MLSTMErrors, sums: _Sums) -> None:
    """df from rows' and columns' sums: differences of two reverse cumulative sums, times σ(−f)."""
    gates, r = errors.problem.gates, errors.r
    slope = torch.where(gates.cut, 0.0, torch.sigmoid(-gates.f.double()))[..., None]
    value = sums.value["df"] - sums.value["di"]
    total = value.flip(2).cumsum(2).flip(2)
    certain = (sums.certain["df"] + sums.certain["di"]).flip(2).cumsum(2).flip(2)
    variance = (sums.variance["df"] + sums.variance["di"]).flip(2).cumsum(2).flip(2)
    lost = (sums.lost["df"] + sums.lost["di"]).flip(2).cumsum(2).flip(2)
    argument = 2.0 * r.elementwise * gates.f.double().abs()[..., None] + r.exp + 6.0 * r.elementwise
    sums.value["df"] = slope * total
    sums.certain["df"] = slope * (certain * (1.0 + argument) + total.abs() * argument) + r.accumulate_tiny
    sums.lost["df"] = slope * lost
    sums.variance["df"] = slope.square() * (variance + total.square() * argument.square() / 3.0)
