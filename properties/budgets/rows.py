"""Perturbed rows of weights: what every family with a softmax shares.

A row has logits x_j with weights p_j = e^{x_j} / Σ e^{x_k}. A kernel's weights are proportional to e^{x_j +
e_j} with |e_j| ≤ E_j, the same in numerator and normaliser. Exactly, with ξ_j = e^{e_j} − 1,

    ô − o = Σ p_j ξ_j (v_j − o) / (1 + Σ p_j ξ_j),

from which every bound below follows; no first-order term is dropped (theory.md EXA-3 is the case of equal
E_j).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings

__all__ = ["Row", "Spread", "normaliser_rounding", "normaliser_shift", "overtaking", "second_moment"]

# exp(700) is near the largest float64: beyond it a perturbation says nothing, and the hull of V takes over.
_LARGEST_EXPONENT = 700.0
# Weights below e^-300 have squares and products that float64 cannot hold.
_LARGEST_TINY = 300.0
# A weight of e^-200 times any float32 value is below the smallest float32.
_NEGLIGIBLE = 200.0


@dataclass(frozen=True, eq=False)
class Row:
    """Rows of logits and weights in float64, the last axis over keys (and the sink, last, if there is one).

    Attributes:
        x: logits, (…, N), −inf where unseen.
        p: weights, (…, N), 0 where unseen; a row without keys is all 0.
        log_p: their logarithms.
        top: index of the largest weight, (…, 1).
        lse: log of the normaliser, (…, 1); 0 for a row without keys.
        largest: the largest logit, (…, 1); 0 for a row without keys.
        count: number of keys seen, (…, 1).
    """

    x: torch.Tensor
    p: torch.Tensor
    log_p: torch.Tensor
    top: torch.Tensor
    lse: torch.Tensor
    largest: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Row:
        """Rows of logits ``x`` (…, N), −inf where unseen; N ≥ 1."""
        seen = x > -torch.inf
        largest = x.amax(-1, keepdim=True)
        largest = torch.where(largest.isfinite(), largest, 0.0)
        total = torch.where(seen, torch.exp(x - largest), 0.0).sum(-1, keepdim=True)
        lse = largest + torch.log(total.clamp(min=1e-300))
        lse = torch.where(seen.any(-1, keepdim=True), lse, 0.0)
        log_p = x - lse
        return cls(
            x=x,
            p=torch.where(seen, torch.exp(log_p.clamp(max=0.0)), 0.0),
            log_p=log_p,
            top=x.argmax(-1, keepdim=True),
            lse=lse,
            largest=largest,
            count=seen.sum(-1, keepdim=True).double(),
        )

    @property
    def distance(self) -> torch.Tensor:
        """How far each logit is below the largest, (…, N), 0 where unseen."""
        return torch.where(self.x > -torch.inf, self.largest - self.x, 0.0)

    def without_top(self) -> torch.Tensor:
        """p with the largest weight of each row set to 0."""
        return self.p.scatter(-1, self.top, 0.0)


def overtaking(row: Row, e: torch.Tensor) -> torch.Tensor:
    """How many logits of the row a kernel may find larger than each, (…, N), for logit errors ``e`` (…, N).

    An online algorithm scales what it has of key j by e^{m − m'} when its maximum rises from m ≥ x_j + e_j
    to m', and by exactly 1 when it does not. Each rise needs a key with a logit above all before, so that in
    any order, and on any path through a tree of merged parts, there are at most as many of them as keys k
    with x_k + E_k > x_j − E_j, key j itself not counted.
    """
    if not row.x.shape[-1]:
        return torch.zeros_like(row.x)
    # −inf where unseen, and where the errors are unbounded every key that is seen may be the larger.
    highest = torch.where(row.x > -torch.inf, row.x + e, -torch.inf).sort(-1).values.contiguous()
    lowest = torch.where(row.x > -torch.inf, row.x - e, -torch.inf).contiguous()
    above = row.x.shape[-1] - torch.searchsorted(highest, lowest, right=True).double()
    return torch.minimum(above, row.count - 1.0).clamp(min=0.0)


def normaliser_shift(row: Row, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds on Σ p|ξ| and on the error of the log-sum-exp, both (…, 1), for logit errors ``e`` (…, N).

    |log(1 + Σ p ξ)| ≤ min(max E, −log(1 − a)) with a = Σ p (e^E − 1).
    """
    raised = torch.where(row.x > -torch.inf, row.log_p + _log_expm1(e), -torch.inf)
    a = torch.exp(raised.clamp(max=_LARGEST_EXPONENT)).sum(-1, keepdim=True)
    largest = torch.where(row.x > -torch.inf, e, 0.0).amax(-1, keepdim=True)
    logarithm = torch.where(a < 1.0, -torch.log1p(-a.clamp(max=1.0 - 1e-9)), torch.inf)
    return a, torch.minimum(largest, logarithm)


def normaliser_rounding(row: Row, r: Roundings) -> torch.Tensor:
    """Variance, relative and (…, 1), of the rounding of Σ e^x where terms are added in some order.

    In random order that of n partial sums, n/3. Terms that agree to the last place of the sum are rounded
    alike wherever they come in, and those below half of it are lost together beside a large one: each errs by
    min(p, u/2) of the sum, and with all that are within u of it. The largest terms are 1 exactly, and so are
    their sums.
    """
    apart = row.count / 3.0 * MEAN_SQUARE * r.accumulate**2
    if r.truncated or not row.p.shape[-1]:
        return apart
    ordered, order = row.p.sort(-1)
    ordered = ordered.contiguous()
    error = ordered.clamp(max=r.accumulate / 2.0)
    error = torch.where(row.distance.gather(-1, order) == 0.0, 0.0, error)
    below = torch.nn.functional.pad(error.cumsum(-1), (1, 0))
    high = below.gather(-1, torch.searchsorted(ordered, ordered + r.accumulate, right=True))
    low = below.gather(-1, torch.searchsorted(ordered, ordered - r.accumulate, right=False))
    tied = MEAN_SQUARE * (error * (high - low)).sum(-1, keepdim=True)
    return torch.maximum(apart, tied)


@dataclass(frozen=True, eq=False)
class Spread:
    """What perturbed weights can do to the mean of ``v``: all but the logit errors, computed once.

    Attributes:
        row: the weights; v: values (…, N, E); o: their exact mean (…, E).
        moment: Σ p (v − o)², (…, E); rest: the same without each row's largest weight.
    """

    row: Row
    v: torch.Tensor
    o: torch.Tensor
    moment: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, row: Row, v: torch.Tensor, o: torch.Tensor) -> Spread:
        """The spread of values ``v`` (…, N, E) about ``o`` (…, E)."""
        centre = v.median(-2, keepdim=True).values
        d = v - centre
        squares, shift = d.square(), o - centre
        moments = (_moment(p, d, squares, shift) for p in (row.p, row.without_top()))
        return cls(row, v, o, *moments)

    def shift(self, e: torch.Tensor) -> torch.Tensor:
        """Bound on |ô − o| (…, E) for logit errors ``e`` (…, N).

        The smallest of three bounds: (1) all logits perturbed, Cauchy–Schwarz, divided by 1 − a; (2) the
        largest logit held fixed and the others perturbed by E_j + E_top, divided by p_top, sharp for rows
        that one key dominates; (3) the hull of V, which no positive weights leave.
        """
        row = self.row
        a, _ = normaliser_shift(row, e)
        everything = _times(_strength(row.p, row.log_p, e), self.moment) / (1.0 - a).clamp(min=1e-12)
        everything = torch.where(a < 1.0, everything, torch.inf)
        pinned = e + e.gather(-1, row.top)
        dominated = _times(_strength(row.without_top(), row.log_p, pinned), self.rest)
        dominated = dominated / row.p.gather(-1, row.top).clamp(min=1e-300)
        # A weight that float64 cannot hold, but that its error may raise to matter: only the hull is left.
        lost = (row.x > -torch.inf) & (row.log_p < -_LARGEST_TINY) & (row.log_p + pinned > -_NEGLIGIBLE)
        bound = torch.where(lost.any(-1, keepdim=True), torch.inf, torch.minimum(everything, dominated))
        return torch.minimum(bound, _hull(self.v, self.o))


def _strength(p: torch.Tensor, log_p: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """√(Σ p ξ²), (…, 1); with √(Σ p (v − o)²) it bounds Σ p ξ |v − o|."""
    log_square = log_p + 2.0 * _log_expm1(e)
    square = torch.where(
        log_square > _LARGEST_EXPONENT, torch.inf, torch.exp(log_square.clamp(max=_LARGEST_EXPONENT))
    )
    return torch.where(p > 0, square, 0.0).sum(-1, keepdim=True).sqrt()


def _times(strength: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Their product, with the root of ``moment``; 0 where values do not differ, however strong the errors."""
    return torch.where(moment == 0, 0.0, strength * moment.sqrt())


def second_moment(p: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """Σ_j p_j (v_j − o)² (…, E), raised by what its own float64 evaluation may have lost.

    Values are centred by their median over keys first, so that a common offset of V does not cancel.
    """
    centre = v.median(-2, keepdim=True).values
    d = v - centre
    return _moment(p, d, d.square(), o - centre)


def _moment(p: torch.Tensor, d: torch.Tensor, squares: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Σ p (d − shift)² from centred values ``d`` (…, N, E) and their squares."""
    square, mass = p @ squares, p.sum(-1, keepdim=True)
    moment = square - 2.0 * shift * (p @ d) + shift.square() * mass
    return moment.clamp(min=0.0) + (square + shift.square() * mass) * 1e-13


def _log_expm1(e: torch.Tensor) -> torch.Tensor:
    """log(e^x − 1) for x ≥ 0 without overflow; −inf at 0."""
    return torch.where(e > 30.0, e, torch.log(torch.expm1(e.clamp(max=30.0))))


def _hull(v: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """The farthest that a mean of ``v`` can be from ``o``, (…, E)."""
    return torch.maximum(v.amax(-2, keepdim=True) - o, o - v.amin(-2, keepdim=True)).clamp(min=0.0)
