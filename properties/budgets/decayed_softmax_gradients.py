"""Budgets of the gradients of ``prefix_scan`` and ``rwkv4``.

A backward kernel may recompute P from a stored log-sum-exp (or m and u), take δ = dO·O from the stored output
or from Σ p dP, and store dP and dS; or it may run the recurrence, or a tree, backwards with the cotangents
dO/N and −(dO·o)/N, whose roundings are relative to p (|dO|·|v| + |dO|·|o|) before these cancel. Autograd
through the running maximum leaves the rounding of a sum that is 0 with every position that may once have been
the maximum, and with w by its age. All of them are within ``certain``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnproof.properties.budgets.decayed_softmax import RowErrors, Weighed, common_errors
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth, half_spacing
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.families.decayed_softmax import DecayedSoftmax
    from attnproof.properties.families.prefix_scan import PrefixScanProblem

__all__ = ["key_gradients", "weight_gradients"]

_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, eq=False)
class _Pairs:
    """dS of some rows by the positions up to them, (B, H, R, C).

    Attributes:
        p, p_certain, p_variance: weights; ds: p (dP − δ); size: p (|dO||v| + |dO||o|).
        ds_certain, ds_variance: errors of ds.
        delta_variance, common: (B, H, R, 1), variances of δ, and of the log-sum-exp.
        p_drift, ds_drift: how p and ds move with logits that drift.
        lost: bool (B, H, R, 1), where an intermediate may overflow.
    """

    p: torch.Tensor
    p_certain: torch.Tensor
    p_variance: torch.Tensor
    ds: torch.Tensor
    size: torch.Tensor
    ds_certain: torch.Tensor
    ds_variance: torch.Tensor
    delta_variance: torch.Tensor
    common: torch.Tensor
    p_drift: torch.Tensor
    ds_drift: torch.Tensor
    lost: torch.Tensor


class _Sum:
    """A gradient that grows by blocks of rows: value, bound, variance, Σ of absolute terms, and drift."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.value, self.certain, self.variance, self.size = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(4)
        )
        self.drift = torch.zeros(shape, dtype=torch.float64)
        self.lost = torch.zeros(shape, dtype=torch.bool)

    def add(self, stop: int, *terms: torch.Tensor, drift: torch.Tensor, lost: torch.Tensor) -> None:
        """Adds (value, certain, variance, size) to the first ``stop`` positions, axis 2."""
        self.drift[:, :, :stop] += drift
        for total, term in zip((self.value, self.certain, self.variance, self.size), terms, strict=True):
            total[:, :, :stop] += term
        self.lost[:, :, :stop] |= lost

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
    cotangent: torch.Tensor,
    keys: torch.Tensor | None = None,
) -> tuple[dict[str, Estimate], torch.Tensor]:
    """Gradients by v (B, H, N, E), logits "s" (B, H, N, 1) and, per head, decay "w" and bonus "c" (H,).

    Also the variance (H, D) of Σ ds·k for ``keys`` (B, H, N, D) by errors that all positions of a row share:
    those of δ and of the log-sum-exp.
    """
    keys = torch.zeros(*problem.sizes[:3], 1) if keys is None else keys
    total = _Gradients(RowErrors(problem, contract), keys.double())
    for places in problem.runs():
        total.add_rows(places, cotangent[:, :, places].double())
    total.finish()
    r, length, batch = total.errors.r, float(problem.sizes[2]), max(problem.sizes[0], 1)
    found = {name: total.sums[name].estimate(length, r) for name in ("v", "s")}
    found |= {name: _over_batch(total.sums[name].estimate(length * batch, r)) for name in ("w", "c")}
    drift = (total.sums["s"].drift * total.keys).sum((0, 2))
    return found, total.in_rows.sum((0, 2)) + drift.square()


class _Gradients:
    """Sums over blocks of rows.

    Attributes:
        sums: by v, s, w and c.
        in_rows, ages: (B, H, 1, D) and (B, H, 1, 1), variances of Σ ds·k and of dw by errors that all
            positions of a row share.
        mass: (B, H, N, 1), Σ of the sizes of each row; largest: bool (B, H, N), positions that may once have
            been the maximum; oldest: (B, H, 1, 1), the largest age of a maximum.
    """

    def __init__(self, errors: RowErrors, keys: torch.Tensor) -> None:
        batch, heads, length, width = errors.problem.sizes
        self.errors, self.keys = errors, keys
        self.sums = {"v": _Sum((batch, heads, length, width)), "s": _Sum((batch, heads, length, 1))}
        self.sums |= {name: _Sum((batch, heads, 1, 1)) for name in ("w", "c")}
        self.in_rows = torch.zeros(batch, heads, 1, keys.shape[-1], dtype=torch.float64)
        self.ages, self.oldest = torch.zeros(2, batch, heads, 1, 1, dtype=torch.float64)
        self.mass = torch.zeros(batch, heads, length, 1, dtype=torch.float64)
        self.largest = torch.zeros(batch, heads, length, dtype=torch.bool)

    def add_rows(self, places: torch.Tensor, do: torch.Tensor) -> None:
        """What the rows ``places`` with the cotangent ``do`` (B, H, R, E) add."""
        w = self.errors.weighed(places)
        pairs = _pairs(self.errors, w, do)
        stop = pairs.p.shape[-1]
        lost = pairs.lost.any(2, keepdim=True)
        self.sums["v"].add(
            stop,
            pairs.p.mT @ do,
            pairs.p_certain.mT @ do.abs() + self.errors.r.operand_tiny * len(places),
            pairs.p_variance.mT @ do.square(),
            pairs.p.mT @ do.abs(),
            drift=pairs.p_drift.mT @ do,
            lost=lost,
        )
        ones = torch.ones(len(places), 1, dtype=torch.float64)
        terms, drift = (pairs.ds, pairs.ds_certain, pairs.ds_variance, pairs.size), pairs.ds_drift
        self.sums["s"].add(stop, *(x.mT @ ones for x in terms), drift=drift.mT @ ones, lost=lost)
        j, t = torch.arange(stop), places[:, None]
        age, own = (t - 1 - j).clamp(min=0).double(), (t == j).double()
        for name, weight in (("w", age), ("c", own)):
            factors = (weight, weight, weight.square(), weight)
            totals = [(x * f).sum((2, 3), keepdim=True) for x, f in zip(terms, factors, strict=True)]
            self.sums[name].add(1, *totals, drift=(drift * weight).sum((2, 3), keepdim=True), lost=lost)
        self._add_shared(pairs, age)
        self.mass[:, :, places] = pairs.size.sum(-1, keepdim=True)
        top = w.row.x[..., :stop] + 2.0 * w.certain[..., :stop] >= w.frame
        self.largest[:, :, :stop] |= top.any(2)
        oldest = torch.where(top, age + 1.0, 0.0).amax((2, 3), keepdim=True)
        self.oldest = torch.maximum(self.oldest, oldest)

    def _add_shared(self, pairs: _Pairs, age: torch.Tensor) -> None:
        """The response to errors of δ and of the log-sum-exp."""
        k = self.keys[:, :, : pairs.p.shape[-1]]
        by_keys = pairs.delta_variance * (pairs.p @ k).square() + pairs.common * (pairs.ds @ k).square()
        self.in_rows = self.in_rows + by_keys.sum(2, keepdim=True)
        by_age = pairs.delta_variance * (pairs.p * age).sum(-1, keepdim=True).square()
        by_age = by_age + pairs.common * (pairs.ds * age).sum(-1, keepdim=True).square()
        self.ages = self.ages + by_age.sum(2, keepdim=True)

    def finish(self) -> None:
        """What depends on all rows: autograd through the maximum, and errors of logits that all rows read."""
        errors, sums = self.errors, self.sums
        stepped = growth(2.0 * errors.problem.sizes[2] + 8.0, errors.r.elementwise)
        later = self.mass.flip(2).cumsum(2).flip(2)
        sums["s"].certain += torch.where(self.largest[..., None], stepped * later, 0.0)
        sums["w"].certain += stepped * (self.oldest + 1.0) * self.mass.sum(2, keepdim=True)
        sums["w"].variance += self.ages
        spread = errors.logits.variance[..., None]
        for name in ("s", "v"):
            sums[name].variance += spread * sums[name].value.square()


def _over_batch(x: Estimate) -> Estimate:
    """(B, H, 1, 1) summed over the batch, (H,)."""
    lost = None if x.lost is None else x.lost.sum((0, 2, 3)) > 0
    return Estimate(x.value.sum((0, 2, 3)), x.bound.sum((0, 2, 3)), x.spread.sum((0, 2, 3)), lost)


def _pairs(errors: RowErrors, w: Weighed, do: torch.Tensor) -> _Pairs:
    r, row, v = errors.r, w.row, w.v
    n, width = row.count, v.shape[-1]
    quotient = errors.quotient(w)
    o, log_error = quotient.o, common_errors(w, r)
    error = torch.where(row.x > -torch.inf, w.certain + log_error[0], 0.0)
    relative = torch.expm1(error.clamp(max=_LARGEST_EXPONENT))
    stored, dscores = max(r.probabilities, r.operand), r.storage("dscores")[0]
    seen = (row.x > -torch.inf).double()
    p_tiny = r.probabilities_tiny * seen
    # A recurrence backwards multiplies and adds in every step.
    stepped = growth(2.0 * n + float(width) + 8.0, r.accumulate)
    p_certain = row.p * (relative + (stored + r.input + stepped) * (1.0 + relative)) + p_tiny
    dp, dp_size = do @ v.mT, do.abs() @ v.abs().mT
    dot, dot_size = (do * o).sum(-1, keepdim=True), (do.abs() * o.abs()).sum(-1, keepdim=True)
    operands = (1.0 + r.input) ** 2 - 1.0 + growth(width + 4.0, r.accumulate)
    dp_certain = (operands + dscores * (1.0 + operands)) * dp_size + r.operand_tiny
    kept = quotient.certain * (1.0 + r.output) + r.output * o.abs() + r.output_tiny
    from_output = (do.abs() * kept).sum(-1, keepdim=True) + operands * dot_size
    own = row.p * relative + p_tiny
    directly = (row.p * dp_certain + own * (dp.abs() + dp_certain)).sum(-1, keepdim=True)
    directly = directly + growth(n + 4.0, r.accumulate) * (row.p * dp_size).sum(-1, keepdim=True)
    delta_certain = torch.maximum(from_output, directly)
    g = dp - dot
    g_certain = dp_certain + delta_certain + r.elementwise * (dp.abs() + dot.abs())
    ds, size = row.p * g, row.p * (dp_size + dot_size)
    ds_certain = (row.p * relative + p_tiny) * (g.abs() + g_certain) + row.p * g_certain
    ds_certain = ds_certain + dscores * (ds.abs() + ds_certain) + stepped * size
    ds_certain = ds_certain + (r.storage("dscores")[1] + r.accumulate_tiny) * seen
    delta_variance = (
        do.square() * (quotient.variance + half_spacing(o, r.output, r.output_tiny).square() / 3.0)
    ).sum(-1, keepdim=True)
    p_relative = w.variance + log_error[1]
    p_variance = row.p.square() * (p_relative + MEAN_SQUARE * stored**2) + p_tiny.square() / 3.0
    dp_variance = MEAN_SQUARE * (
        dscores**2 * dp.square() + r.accumulate**2 * width * (do.square() @ v.square().mT)
    )
    carried = r.accumulate**2 * MEAN_SQUARE * 2.0 * (dp.square() + dot.square())
    g_variance = dp_variance + delta_variance + carried
    ds_variance = row.p.square() * (
        g.square() * (p_relative + MEAN_SQUARE * (dscores**2 + r.operand**2)) + g_variance
    )
    p_drift = row.p * (w.drift - (row.p * w.drift).sum(-1, keepdim=True))
    ds_drift = p_drift * g - row.p * (p_drift * dp).sum(-1, keepdim=True)
    lost = quotient.lost.any(-1, keepdim=True) | ((dp_size >= r.largest / 2.0) & (seen > 0)).any(
        -1, keepdim=True
    )
    return _Pairs(
        row.p, p_certain, p_variance, ds, size, ds_certain, ds_variance, delta_variance, log_error[1],
        p_drift, ds_drift, lost,
    )  # fmt: skip


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
    total = growth(float(length * (batch + 1) + 8), r.accumulate)
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
