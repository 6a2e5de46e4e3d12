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

__all__ = ["Row", "mean_shift", "normaliser_shift"]

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


def normaliser_shift(row: Row, e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds on Σ p|ξ| and on the error of the log-sum-exp, both (…, 1), for logit errors ``e`` (…, N).

    |log(1 + Σ p ξ)| ≤ min(max E, −log(1 − a)) with a = Σ p (e^E − 1).
    """
    raised = torch.where(row.x > -torch.inf, row.log_p + _log_expm1(e), -torch.inf)
    a = torch.exp(raised.clamp(max=_LARGEST_EXPONENT)).sum(-1, keepdim=True)
    largest = torch.where(row.x > -torch.inf, e, 0.0).amax(-1, keepdim=True)
    logarithm = torch.where(a < 1.0, -torch.log1p(-a.clamp(max=1.0 - 1e-9)), torch.inf)
    return a, torch.minimum(largest, logarithm)


def mean_shift(row: Row, e: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """Bound on |ô − o| (…, E) for logit errors ``e`` (…, N), values ``v`` (…, N, E), exact ``o`` (…, E).

    The smallest of three bounds: (1) all logits perturbed, Cauchy–Schwarz, divided by 1 − a; (2) the largest
        logit
    held fixed and the others perturbed by E_j + E_top, divided by p_top, sharp for rows that one key
    dominates; (3) the hull of V, which no positive weights leave.
    """
    a, _ = normaliser_shift(row, e)
    everything = _spread(row.p, row.log_p, e, v, o) / (1.0 - a).clamp(min=1e-12)
    everything = torch.where(a < 1.0, everything, torch.inf)
    rest = row.without_top()
    pinned = e + e.gather(-1, row.top)
    dominated = _spread(rest, row.log_p, pinned, v, o) / row.p.gather(-1, row.top).clamp(min=1e-300)
    # A weight that float64 cannot hold, but that its error may raise to matter: only the hull is left.
    lost = (row.x > -torch.inf) & (row.log_p < -_LARGEST_TINY) & (row.log_p + pinned > -_NEGLIGIBLE)
    bound = torch.where(lost.any(-1, keepdim=True), torch.inf, torch.minimum(everything, dominated))
    return torch.minimum(bound, _hull(v, o))


def _spread(
    p: torch.Tensor, log_p: torch.Tensor, e: torch.Tensor, v: torch.Tensor, o: torch.Tensor
) -> torch.Tensor:
    """√(Σ p ξ²) · √(Σ p (v − o)²) ≥ Σ p ξ |v − o|, (…, E), rounding of the second factor included."""
    log_square = log_p + 2.0 * _log_expm1(e)
    square = torch.where(
        log_square > _LARGEST_EXPONENT, torch.inf, torch.exp(log_square.clamp(max=_LARGEST_EXPONENT))
    )
    strength = torch.where(p > 0, square, 0.0).sum(-1, keepdim=True)
    moment = second_moment(p, v, o)
    return torch.where(moment == 0, 0.0, strength.sqrt() * moment.sqrt())


def second_moment(p: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """Σ_j p_j (v_j − o)² (…, E), raised by what its own float64 evaluation may have lost.

    Values are centred by their mean over keys first, so that a common offset of V does not cancel.
    """
    centre = v.median(-2, keepdim=True).values
    d = v - centre
    shift = o - centre
    squares = p @ d.square()
    mass = p.sum(-1, keepdim=True)
    moment = squares - 2.0 * shift * (p @ d) + shift.square() * mass
    lost = (squares + shift.square() * mass) * 1e-13
    return moment.clamp(min=0.0) + lost


def _log_expm1(e: torch.Tensor) -> torch.Tensor:
    """log(e^x − 1) for x ≥ 0 without overflow; −inf at 0."""
    return torch.where(e > 30.0, e, torch.log(torch.expm1(e.clamp(max=30.0))))


def _hull(v: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """The farthest that a mean of ``v`` can be from ``o``, (…, E)."""
    return torch.maximum(v.amax(-2, keepdim=True) - o, o - v.amin(-2, keepdim=True)).clamp(min=0.0)
