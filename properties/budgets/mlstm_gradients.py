"""Budgets of the mLSTM's gradients: closed forms over the weights of its quadratic form.

A kernel recomputes the weights, takes δ from the stored o (or sums it anew), rounds dO/N, P and dS to the
declared formats, and carries the cotangent of the state from chunk to chunk as it carried the state. The
gradient of the forget gates is counted for the less accurate of two ways: reverse cumulative sums of q·dq and
of k·dk taken off each other, in which a pair of positions i ≥ j ≥ t counts twice although it cancels.

Where |Σ P| is within its error of e^{−m}, δ may be there or not: the certain budget holds all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.enclosures import Ball
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
    """

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
        widths = {"dq": width, "dk": width, "dv": value_width, "di": 1, "df": 1}
        shapes = {name: (batch, heads, length, size) for name, size in widths.items()}
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
    problem: MLSTMProblem, contract: Contract, cotangent: torch.Tensor
) -> dict[str, Estimate]:
    """dq, dk, dv, di, df with the errors of a kernel under ``contract``, before they are stored."""
    errors = MLSTMErrors(problem, contract)
    sums = _Sums(problem)
    states = errors.states() if errors.operand else []
    blocks = []
    lost = torch.zeros((), dtype=torch.bool)
    for number, rows in enumerate(errors.rows()):
        weights = errors.weights(rows)
        state = states[number] if states else None
        shared = None if state is None else errors.shared(rows.first, rows.stop, state)
        quotient = errors.quotient(rows, weights, shared)
        do = cotangent[:, :, rows.first : rows.stop].double()
        found = _cotangents(errors, quotient, do)
        lost = lost | quotient.lost.any()
        _add_rows(errors, sums, rows, weights, found, do)
        blocks.append((rows.first, rows.stop, found))
    if errors.operand:
        _add_states(errors, sums, states, blocks)
    _finish_gates(errors, sums)
    estimates = {}
    # Every product and sum of a gradient may underflow.
    tiny = errors.r.accumulate_tiny * (problem.sizes[2] + 2)
    for name, value in sums.value.items():
        shape = problem.input_shape(name.removeprefix("d"))
        certain = sums.certain[name] + tiny
        over = value.abs() + certain >= errors.r.largest / 2.0
        mark = (over | lost).reshape(shape)
        estimates[name] = Estimate(
            value.reshape(shape),
            certain.reshape(shape).nan_to_num(torch.inf, torch.inf),
            (sums.variance[name] + sums.lost[name] ** 2 / 12.0).reshape(shape).nan_to_num(1e300, 1e300),
            mark if bool(mark.any()) else None,
        )
    return estimates


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
        values, vanished, delta, quotient.relative, quotient.relative_variance, certain, variance
    )


def _add_rows(
    errors: MLSTMErrors,
    sums: _Sums,
    rows: Rows[Ball],
    weights: list[Weights],
    c: _Cotangents,
    do: torch.Tensor,
) -> None:
    """What a block of rows adds to every gradient; df still by log σ(f), and as its rows' sums only."""
    r, problem = errors.r, errors.problem
    scale, length, width = problem.scale, problem.sizes[2], do.shape[-1]
    q = problem.q[:, :, rows.first : rows.stop].double()
    values, tiny = c.values.abs(), r.operand_tiny + r.accumulate_tiny * length
    # of sums over rows, and over the longer of two widths
    sum_error = growth(float(length + problem.sizes[3] + width + 8), r.accumulate)
    stored = r.storage("dscores")[0]
    least = 2.0 * r.accumulate_tiny
    for w in weights:
        k, v = (x[:, :, w.start : w.stop].double() for x in (problem.k, problem.v))
        seen = (w.e > 0).double()
        g = c.values @ v.mT + c.delta
        g_size = values @ v.abs().mT + c.delta.abs()
        g_certain = (3.0 * errors.operand + sum_error) * g_size + c.relative * g.abs() + c.delta_certain
        g_certain = g_certain + c.values_certain @ v.abs().mT + tiny * (1.0 + v.abs().sum(-1)[:, :, None, :])
        relative = w.certain + errors.operand + stored + sum_error
        rounded = w.core + errors.operand + stored + sum_error
        g_variance = (
            MEAN_SQUARE * (errors.operand**2 + r.accumulate**2 * width) * (c.values.square() @ v.square().mT)
        )
        alike = g.square() * c.relative_variance + c.delta_variance
        ds, factor = scale * w.e * g, abs(scale) * w.e
        ds_certain = factor * (g.abs() * rounded + g_certain * (1.0 + rounded)) + tiny * seen
        share = (
            MEAN_SQUARE * (stored**2 + errors.operand**2)
            + errors.exponent(rows.first, rows.stop, w.start, w.stop)[1]
        )
        ds_variance = factor.square() * (g_variance + g.square() * share)
        # what is common to a row does not average out over its columns
        coherent = c.relative_variance * (ds @ k).square() + c.delta_variance * (scale * w.e @ k).square()
        g_lost = least * (1.0 + v.abs().sum(-1)[:, :, None, :])
        ds_lost = factor * g_lost + least * seen
        dq_variance = ds_variance @ k.square() + coherent
        sums.add("dq", rows.first, ds @ k, ds_certain @ k.abs(), dq_variance, ds_lost @ k.abs())
        ds_alone = ds_variance + factor.square() * alike
        dk_variance = ds_alone.mT @ q.square()
        sums.add("dk", w.start, ds.mT @ q, ds_certain.mT @ q.abs(), dk_variance, ds_lost.mT @ q.abs())
        p_certain = w.size * (relative + c.relative) + tiny * seen
        p_variance = w.variance + w.p.square() * (c.relative_variance + MEAN_SQUARE * errors.operand**2)
        sums.add(
            "dv",
            w.start,
            w.p.mT @ c.values,
            p_certain.mT @ values + w.size.mT @ c.values_certain,
            p_variance.mT @ c.values.square(),
            least * (seen.mT @ values + w.size.sum(2)[..., None]),
        )
        dd, p_moved = w.p * g, w.size * relative
        dd_certain = w.p.abs() * g_certain + p_moved * (g.abs() + g_certain) + tiny * seen
        dd_variance = w.p.square() * (g_variance + alike + g.square() * share) + w.variance * g.square()
        ones, columns = torch.ones_like(c.delta), torch.ones_like(v[..., :1])
        dd_lost = w.p.abs() * g_lost + least * seen
        sums.add("di", w.start, dd.mT @ ones, dd_certain.mT @ ones, dd_variance.mT @ ones, dd_lost.mT @ ones)
        sums.add(
            "df", rows.first, dd @ columns, dd_certain @ columns, dd_variance @ columns, dd_lost @ columns
        )


def _add_states(
    errors: MLSTMErrors,
    sums: _Sums,
    states: list[torch.Tensor],
    blocks: list[tuple[int, int, _Cotangents]],
) -> None:
    """Variance by rounding the state between blocks, its cotangent, and what is decayed to and from them."""
    problem, unit = errors.problem, 2.0 * errors.operand**2 * MEAN_SQUARE
    batch, heads, _, width, value_width = problem.sizes
    cotangent = torch.zeros(batch, heads, width, value_width, dtype=torch.float64)
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
