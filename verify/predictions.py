"""What theory says of the naive examples, case by case.

Must this case FAIL, must it PASS, or is it left open?

The predictions use the exact logits of a case and the constants of the number formats, never a kernel's
result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.budgets.base import EXP_OVERFLOW, EXP_UNDERFLOW, Budget
from attnproof.properties.families.logsumexp import RowsProblem
from attnproof.properties.families.pointwise import PointwiseProblem
from attnproof.properties.families.softmax import SoftmaxProblem

if TYPE_CHECKING:
    from attnproof.judge import Trial

__all__ = ["DOCUMENTED_ONLY", "PREDICTIONS", "division_free", "tanh_approx", "unshifted"]

# float16 weights: exp(s) rounds to infinity from 65520 on, and to 0 up to 2^-25 (theory.md, Formats).
_HALF_OVERFLOW, _HALF_UNDERFLOW = math.log(65520.0), -25.0 * math.log(2.0)
# Distance from a threshold within which the rounding of a logit decides.
_MARGIN = 0.1
# Unshifted float32 exponentials keep a row's weights to 1e-12 of their sum while the largest logit is above
# this.
_ACCURATE = -60.0


def _logits(trial: Trial) -> torch.Tensor:
    """Logits (rows…, N) of a case in float64, −inf where unseen."""
    problem = trial.problem
    if isinstance(problem, RowsProblem):
        return problem.x.double().masked_fill(~problem.seen, -torch.inf)
    assert isinstance(problem, SoftmaxProblem)
    arithmetic = EnclosureArithmetic()
    return arithmetic.midpoint(problem.scores(arithmetic)).masked_fill(~problem.seen, -torch.inf)


def _rows(trial: Trial, mask: torch.Tensor) -> torch.Tensor:
    """Rows in which ``mask``, of an output's shape, holds somewhere."""
    rows = len(trial.problem.row_shape)
    return mask.flatten(rows).any(-1) if mask.dim() > rows else mask


def _judged(trial: Trial, logits: torch.Tensor) -> torch.Tensor:
    """Rows with keys in which something is judged."""
    judged = torch.zeros(trial.problem.row_shape, dtype=torch.bool)
    for budget in trial.budgets.values():
        judged |= _rows(trial, ~budget.open)
    return judged & (logits > -torch.inf).any(-1)


def _nonzero(trial: Trial) -> torch.Tensor:
    """Rows in which returning 0 would exceed the certain budget."""
    found = torch.zeros(trial.problem.row_shape, dtype=torch.bool)
    for name, budget in trial.budgets.items():
        exact = trial.reference.outputs[name].value
        found |= _rows(trial, ~budget.open & (exact.abs() > 1.5 * budget.certain))
    return found


def _infinity_allowed(trial: Trial) -> torch.Tensor:
    """Rows whose exact result is so near the largest number, or beyond it, that an infinity is right."""
    allowed = torch.zeros(trial.problem.row_shape, dtype=torch.bool)
    for budget in trial.budgets.values():
        allowed |= _rows(trial, budget.overflow | budget.either)
    return allowed


def unshifted(trial: Trial) -> str:
    """Exponentials without the maximum subtracted (LSE-3, LSE-4).

    Overflow above 88.7, nothing left below −104.

    With weights stored in float16 before the second matmul, above 11.09 and below −17.3 already.
    """
    logits = _logits(trial)
    if not logits.numel():
        return "PASS"
    judged = _judged(trial, logits)
    largest, total = logits.amax(-1), torch.logsumexp(logits, -1)
    stored_half = trial.case.dtype == "float16" and isinstance(trial.problem, SoftmaxProblem)
    high, low = (_HALF_OVERFLOW, _HALF_UNDERFLOW) if stored_half else (EXP_OVERFLOW, EXP_UNDERFLOW)
    over = largest if stored_half else total
    fails = (over > high + _MARGIN) & ~_infinity_allowed(trial)
    fails |= (largest < low - _MARGIN) & _nonzero(trial)
    if bool((fails & judged).any()):
        return "FAIL"
    safe = (over < high - _MARGIN) & (total < EXP_OVERFLOW - _MARGIN)
    safe &= (total >= 0.0) if stored_half else (largest > _ACCURATE)
    if isinstance(trial.problem, SoftmaxProblem):
        # Σ exp(s) |v| is accumulated before the division.
        gauge = _row_maximum(trial.problem.gauge("o", trial.reference.outputs))
        safe &= total + torch.log(gauge.clamp(min=1e-300)) < EXP_OVERFLOW - _MARGIN
    return "PASS" if bool((safe | ~judged).all()) else "OPEN"


def _row_maximum(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.amax(-1) if tensor.shape[-1] else tensor.new_zeros(tensor.shape[:-1])


def division_free(trial: Trial) -> str:
    """exp(s − L) with L stored in the inputs' dtype (LSE-5, LSE-7).

    Every weight is off by the factor exp(fl(L) − L).
    """
    logits = _logits(trial)
    if not logits.numel():
        return "PASS"
    judged = _judged(trial, logits)
    exact = torch.logsumexp(logits, -1)
    stored = exact.float().to(trial.case.torch_dtype).double()
    delta = torch.where(judged, exact - stored, 0.0)
    # L is computed in float32 before it is stored, and is itself off by a few of its roundings.
    computed = 2.0**-22 * (
        exact.abs() + logits.masked_fill(logits == -torch.inf, 0.0).abs().amax(-1)
    ).nan_to_num(0.0)
    least = delta.sign() * (delta.abs() - computed).clamp(min=0.0)
    fails, open_ = False, False
    for name, budget in trial.budgets.items():
        size = trial.reference.outputs[name].value.abs()
        fails |= bool((_error(name, least, size, budget) > 2.0 * budget.certain).any())
        most = torch.where(judged, delta.abs() + computed, 0.0)
        open_ |= bool((_error(name, most, size, budget) > 0.5 * budget.probable).any())
    return "FAIL" if fails else ("OPEN" if open_ else "PASS")


def _error(name: str, delta: torch.Tensor, size: torch.Tensor, budget: Budget) -> torch.Tensor:
    """What an error ``delta`` of L does to an output of magnitude ``size``; 0 where nothing is judged."""
    error = delta.abs() if name == "lse" else size * torch.expm1(delta).abs()[..., None]
    return torch.where(budget.open, 0.0, error.nan_to_num(0.0, posinf=torch.inf))


def tanh_approx(trial: Trial) -> str:
    """σ by a tanh with 11 bits (SIG-11): 0.5·tanh(x/2) + 0.5 is a multiple of 2⁻¹² below 1/4."""
    problem = trial.problem
    assert isinstance(problem, PointwiseProblem)
    if not problem.seen.numel():
        return "PASS"
    arithmetic = EnclosureArithmetic()
    x = arithmetic.midpoint(problem.scores(arithmetic))
    mantissa, exponent = torch.frexp(torch.tanh(x / 2.0))
    scaled = mantissa * 2.0**11
    coarse = 0.5 * torch.ldexp(torch.round(scaled) * 2.0**-11, exponent) + 0.5
    exact = torch.sigmoid(x)
    # Scores within a few roundings of the middle between two such numbers may go either way.
    near = (scaled - scaled.floor() - 0.5).abs() < 2.0**-8 * (1.0 + x.abs())
    drift = torch.where(problem.seen, coarse - exact, 0.0)
    loose = torch.where(problem.seen & near, torch.ldexp(torch.full_like(x, 2.0**-12), exponent), 0.0)
    values, budget = problem.values().double(), trial.budgets["o"]
    error = (drift @ values).abs()
    doubt = loose @ values.abs()
    fails = (error - doubt > 2.0 * budget.certain) & ~budget.open
    if bool(fails.any()):
        return "FAIL"
    clear = (error + doubt < 0.25 * budget.probable) | budget.open
    return "PASS" if bool(clear.all()) else "OPEN"


DOCUMENTED_ONLY = frozenset({"tanh-approx"})
"""Predictions from the bound that an instruction's documentation gives. A GPU is often better than that (an
H100's tanh.approx.f32 in ``nox -s gpu``), so that what must fail by the bound may pass there."""

PREDICTIONS: Mapping[str, Callable[[Trial], str]] = {
    "unshifted": unshifted,
    "division-free": division_free,
    "tanh-approx": tanh_approx,
}
