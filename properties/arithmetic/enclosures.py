"""Proved results at the speed of tensors: float64 centres, and how far from them the exact results can be.

Notation: u = 2^-53, the unit roundoff of float64, and η = 2^-1074, its smallest number. Every bound rests on
the standard model with underflow, fl(x ∘ y) = (x ∘ y)(1 + δ) + ε with |δ| ≤ u and |ε| ≤ η/2, ε = 0 for sums,
and on γ_n = n·u/(1 − n·u) for n roundings in any order, with or without fused multiply-add (Higham, Accuracy
and Stability of Numerical Algorithms, 2002, sections 2.2, 3.1 and 3.5; Rump, Acta Numerica 19, 2010, for
matrix products of balls). The bounds are themselves computed in float64 and must not come out too small:
their computation is followed by a factor that outweighs its own roundings (`_slack`) and by a few η for its
underflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure
from attnproof.properties.arithmetic.conversion import (
    check_axes,
    check_mask,
    check_matmul,
    finite_float64,
    resolved_shape,
)

__all__ = ["Ball", "EnclosureArithmetic"]

UNIT_ROUNDOFF = 2.0**-53
# Twice the unit roundoff bounds one rounding of a result v by EPSILON·|v|, with room for the roundings of
# that bound itself, also where v is so small that EPSILON·|v| is subnormal: below 2^-1021 sums are exact.
EPSILON = 2.0**-52
TINY = 2.0**-1074
SMALLEST_NORMAL = 2.0**-1022
LARGEST = float(torch.finfo(torch.float64).max)
# Error allowed to torch's float64 exp, expm1, log, sqrt and tanh, in ulps: 0.75 was the largest of 2.5
# million samples, drawn as in tests/properties/arithmetic/test_elementary_functions.py. Two ulps of a normal
# number v are ≤ 2·2^-52·|v|.
ELEMENTARY_ULPS = 2
ELEMENTARY = ELEMENTARY_ULPS * EPSILON


def _slack(roundings: int) -> float:
    """A factor ≥ (1 − u)^−(roundings + 16): undoes roundings downwards, and those of applying it."""
    return 1.0 + (2 * roundings + 32) * UNIT_ROUNDOFF


# Covers the handful of roundings of an elementwise bound.
SLACK = _slack(0)


def _growth(roundings: int) -> float:
    """An upper bound of γ_n for n = ``roundings`` ≥ 1."""
    return roundings * UNIT_ROUNDOFF * _slack(roundings)


@dataclass(frozen=True, slots=True, eq=False)
class Ball:
    """A tensor of exact results known to within a radius.

    Attributes:
        value: float64, the centres; finite, or ±inf where ``masked`` was told to fill so.
        radius: float64 of the same shape, ≥ 0, +inf where nothing is known; None where all radii are 0.
    """

    value: torch.Tensor
    radius: torch.Tensor | None = None


def _settled(value: torch.Tensor, radius: torch.Tensor, *, check_value: bool = False) -> Ball:
    """The ball of two fresh tensors, with infinite radii and finite centres where something overflowed.

    A radius that is a multiple of |value| shows by itself that the value is not finite; where it is not,
    ``check_value`` looks at the value too.
    """
    total = radius.sum() + value.sum() if check_value else radius.sum()
    if not math.isfinite(total.item()):
        radius.masked_fill_(~torch.isfinite(value), math.inf).nan_to_num_(nan=math.inf, posinf=math.inf)
        value.nan_to_num_(nan=0.0, posinf=LARGEST, neginf=-LARGEST)
    return Ball(value, radius)


class EnclosureArithmetic(Arithmetic[Ball]):
    """float64 tensors with rigorous componentwise radii: about a thousand times faster than mpmath.

    Overflow gives an infinite radius and never a NaN. Exact inputs carry no radius and cost nothing extra.

    Raises:
        RuntimeError: the calling thread flushes subnormal numbers to zero, so that the bounds would not hold.
    """

    name = "float64"

    def __init__(self) -> None:
        if (torch.full((16,), TINY, dtype=torch.float64) * 1.0).eq(0).any():
            raise RuntimeError(
                "this thread flushes subnormal numbers to zero, but the enclosures' bounds assume IEEE "
                "arithmetic; call torch.set_flush_denormal(False) first"
            )

    def __repr__(self) -> str:
        return "EnclosureArithmetic()"

    def exact(self, tensor: torch.Tensor) -> Ball:
        return Ball(finite_float64(tensor))

    def shape(self, a: Ball) -> tuple[int, ...]:
        return tuple(a.value.shape)

    def add(self, a: Ball, b: Ball) -> Ball:
        return _sum_of_two(a, b, torch.add(a.value, b.value))

    def sub(self, a: Ball, b: Ball) -> Ball:
        return _sum_of_two(a, b, torch.sub(a.value, b.value))

    def mul(self, a: Ball, b: Ball) -> Ball:
        value = a.value * b.value
        radius = value.abs().mul_(EPSILON)
        if b.radius is not None:
            radius.addcmul_(a.value.abs(), b.radius)
        if a.radius is not None:
            radius.addcmul_(a.radius, b.value.abs() if b.radius is None else b.value.abs().add_(b.radius))
        return _settled(value, radius.mul_(SLACK).add_(4 * TINY))

    def div(self, a: Ball, b: Ball) -> Ball:
        """The quotient; |A/B − a/b| ≤ (r_a + |a/b|·r_b) / (|b| − r_b) for every A and B in the balls."""
        value = a.value / b.value
        radius = value.abs()
        nearest_zero = b.value.abs()
        if b.radius is not None:
            # The quotient and the products below may underflow before a small divisor magnifies
            # what was lost.
            spread = radius.add(TINY).mul_(b.radius).add_(TINY)
            if a.radius is not None:
                spread.add_(a.radius)
            nearest_zero.sub_(b.radius)
            radius.mul_(EPSILON).add_(spread.div_(nearest_zero))
        elif a.radius is not None:
            radius.mul_(EPSILON).add_(a.radius / nearest_zero)
        else:
            radius.mul_(EPSILON)
        radius.mul_(SLACK).add_(4 * TINY)
        radius = torch.where(nearest_zero > 0, radius, math.inf)
        return _settled(value, radius)

    def scaled(self, a: Ball, factor: float) -> Ball:
        factor = float(factor)
        value = a.value * factor
        radius = value.abs().mul_(EPSILON)
        if a.radius is not None:
            radius.add_(a.radius, alpha=abs(factor))
        return _settled(value, radius.mul_(SLACK).add_(4 * TINY))

    def matmul(self, a: Ball, b: Ball) -> Ball:
        """The product's own error is ≤ γ_K |A||B| + K·η, whatever the order of its sums."""
        check_matmul(tuple(a.value.shape), tuple(b.value.shape))
        inner = a.value.shape[-1]
        value = torch.matmul(a.value, b.value)
        if inner == 0:
            return Ball(value)
        growth, slack = _growth(inner), _slack(inner)
        left, right = a.value.abs(), b.value.abs()
        if a.radius is not None:
            beside = None if b.radius is None else torch.matmul(left, b.radius)
            if b.radius is not None:
                right.add_(b.radius)
            radius = torch.matmul(_widened(left, growth, a.radius), right)
            if beside is not None:
                radius.add_(beside)
        elif b.radius is not None:
            radius = torch.matmul(left, _widened(right, growth, b.radius))
        else:
            radius = torch.matmul(left, right).mul_(growth)
        return _settled(value, radius.mul_(slack).add_((4 * inner + 8) * TINY), check_value=True)

    def transpose(self, a: Ball) -> Ball:
        return Ball(a.value.mT, None if a.radius is None else a.radius.mT)

    def sum(self, a: Ball) -> Ball:
        count = a.value.shape[-1]
        value = a.value.sum(-1, keepdim=True)
        if count == 0:
            return Ball(value)
        radius = torch.linalg.vector_norm(a.value, ord=1, dim=-1, keepdim=True).mul_(_growth(count))
        if a.radius is not None:
            radius.add_(a.radius.sum(-1, keepdim=True))
        return _settled(value, radius.mul_(_slack(count)).add_(4 * TINY), check_value=True)

    def exp(self, a: Ball) -> Ball:
        """e^a; |e^A − e^a| ≤ e^a (e^r − 1), and e^r − 1 ≤ r + r² for r ≤ 1."""
        value = torch.exp(a.value)
        if a.radius is None:
            relative = torch.full_like(value, ELEMENTARY)
        elif a.radius.numel() and a.radius.max().item() > 1.0:
            relative = torch.expm1(a.radius).mul_(1.0 + 4 * ELEMENTARY).add_(ELEMENTARY)
            # Far below 0 the largest value that the exponential can have says more than the product.
            largest = torch.exp(a.value + a.radius).mul_(1.0 + 2048 * EPSILON).add_(SMALLEST_NORMAL)
            product = relative.mul_(value + SMALLEST_NORMAL).nan_to_num_(nan=math.inf, posinf=math.inf)
            radius = torch.minimum(product, largest).mul_(SLACK).add_(2 * SMALLEST_NORMAL)
            return _settled(value, radius, check_value=True)
        else:
            relative = torch.addcmul(a.radius, a.radius, a.radius).add_(ELEMENTARY)
        # A result below the smallest normal number may have been flushed to 0: the radius starts from there.
        radius = relative.mul_(value + SMALLEST_NORMAL).mul_(SLACK).add_(2 * SMALLEST_NORMAL)
        return _settled(value, radius, check_value=True)

    def log(self, a: Ball) -> Ball:
        """The logarithm; |log A − log a| ≤ −log(1 − r/a) ≤ r / (a − r)."""
        value = torch.log(a.value)
        radius = value.abs().mul_(ELEMENTARY)
        lower = a.value
        if a.radius is not None:
            lower = a.value - a.radius
            radius.add_(a.radius / lower)
        radius.mul_(SLACK).add_(4 * TINY)
        return _settled(value, torch.where(lower > 0, radius, math.inf), check_value=True)

    def log1p(self, a: Ball) -> Ball:
        """log(1 + a); |log(1 + A) − log(1 + a)| ≤ r / (1 + a − r)."""
        value = torch.log1p(a.value)
        radius = value.abs().mul_(ELEMENTARY)
        lower = a.value + 1.0
        if a.radius is not None:
            lower = lower * (1.0 - 2.0 * EPSILON) - a.radius
            radius.add_(a.radius / lower)
        radius.mul_(SLACK).add_(4 * TINY)
        return _settled(value, torch.where(lower > 0, radius, math.inf), check_value=True)

    def tanh(self, a: Ball) -> Ball:
        """The hyperbolic tangent, which moves no further than its argument and never out of [−1, 1]."""
        value = torch.tanh(a.value)
        radius = value.abs().mul_(ELEMENTARY)
        if a.radius is not None:
            radius.add_(a.radius.clamp(max=2.0))
        return Ball(value, radius.mul_(SLACK).add_(4 * TINY))

    def sigmoid(self, a: Ball) -> Ball:
        """σ(a) = 1/(1 + t) or t/(1 + t), t = e^−|a|, whose errors add up to σ(a)·(2u + 4u·(1 − σ(a))).

        The error of t, ≤ 4u·t, carries on by |d log σ / d log t| = 1 − σ; the sum and the quotient add u
        each. For A within r of a, with m = min(σ(a), 1 − σ(a)) = t/(1 + t) and w = e^r − 1, |σ(A) − σ(a)| is
        at most σ(r − |a|) − σ(−|a|) = (1 − m)·mw/(1 + mw).
        """
        tail, floor = _tail(a.value)
        smaller = tail / (1.0 + tail)
        larger = 1.0 / (1.0 + tail)
        negative = a.value < 0
        value = torch.where(negative, smaller, larger)
        radius = (smaller * larger).mul_(ELEMENTARY).add_(value, alpha=EPSILON)
        if a.radius is not None:
            # Above 2^1000 the fraction is 1 in float64, and at infinity it would be a NaN.
            growth = (smaller + floor).mul_(torch.expm1(a.radius)).clamp_(max=2.0**1000)
            radius.add_(growth.div_(1.0 + growth).mul_(larger))
        return Ball(value, radius.mul_(_slack(16)).add_(floor))

    def sigmoid_slope(self, a: Ball) -> Ball:
        """σ'(a) = t/(1 + t)², t = e^−|a|, within 8u: four of t, two of 1 + t, two of the quotients.

        |σ''(x)| = σ'(x)·tanh(|x|/2), where σ' grows at most as e^|x − a| and tanh(|x|/2) at most by |x − a|/2
        and to 1, so that |σ'(A) − σ'(a)| ≤ σ'(a)·(e^r − 1)·min(tanh(|a|/2) + r/2, 1); it is also at most
        max |σ''|·r, with max |σ''| = 1/(6√3) < 0.0963, and at most 1/4.
        """
        tail, floor = _tail(a.value)
        below = 1.0 + tail
        value = (tail / below).div_(below)
        radius = value * (2 * ELEMENTARY)
        if a.radius is not None:
            steepness = (1.0 - tail).div_(below).add_(ELEMENTARY).add_(a.radius, alpha=0.5).clamp_(max=1.0)
            carried = (value + floor).mul_(torch.expm1(a.radius)).mul_(steepness)
            radius.add_(torch.minimum(carried, a.radius * 0.0963).clamp_(max=0.25))
        return Ball(value, radius.mul_(_slack(16)).add_(floor))

    def sqrt(self, a: Ball) -> Ball:
        """The square root; |√A − √a| = |A − a|/(√A + √a) ≤ r/(√(a − r) + √a).

        torch may take its roots from a vector library that does not round correctly: 0.53 ulp measured.
        """
        value = torch.sqrt(a.value)
        radius = value * (ELEMENTARY * SLACK)
        if a.radius is None:
            return _settled(value, torch.where(a.value >= 0, radius, math.inf), check_value=True)
        lower = a.value - a.radius
        # The divisor is 0 only where r is.
        radius.add_(a.radius / torch.sqrt(lower).add_(value).clamp_(min=TINY)).mul_(SLACK).add_(4 * TINY)
        return _settled(value, torch.where(lower >= 0, radius, math.inf), check_value=True)

    def relu(self, a: Ball) -> Ball:
        """max(a, 0), which moves no further than a; from a ≤ 0 no further than max(a + r, 0)."""
        value = a.value.clamp(min=0.0)
        if a.radius is None:
            return Ball(value)
        above = (a.value + a.radius).clamp_(min=0.0).mul_(SLACK)
        return Ball(value, torch.where(a.value > 0, a.radius, above))

    def step(self, a: Ball) -> Ball:
        """1, 0, or 1/2 ± 1/2 by comparisons of a with r, which are exact."""
        above = (a.value > 0).to(torch.float64)
        if a.radius is None:
            return Ball(above)
        undecided = (a.value > -a.radius) & (a.value <= a.radius)
        if not bool(undecided.any()):
            return Ball(above)
        return Ball(above.masked_fill_(undecided, 0.5), undecided.to(torch.float64).mul_(0.5))

    def reshape(self, a: Ball, shape: tuple[int, ...]) -> Ball:
        shape = resolved_shape(tuple(a.value.shape), shape)
        return Ball(a.value.reshape(shape), None if a.radius is None else a.radius.reshape(shape))

    def permute(self, a: Ball, axes: tuple[int, ...]) -> Ball:
        check_axes(a.value.dim(), axes)
        return Ball(a.value.permute(axes), None if a.radius is None else a.radius.permute(axes))

    def masked(self, a: Ball, keep: torch.Tensor, fill: float = 0.0) -> Ball:
        check_mask(keep)
        shape = tuple(a.value.shape)
        if bool(keep.all()) and np.broadcast_shapes(tuple(keep.shape), shape) == shape:
            return a
        value = torch.where(keep, a.value, fill)
        return Ball(value, None if a.radius is None else torch.where(keep, a.radius, 0.0))

    def midpoint(self, a: Ball) -> torch.Tensor:
        return a.value

    def enclosure(self, a: Ball) -> Enclosure:
        return Enclosure(a.value, torch.zeros_like(a.value) if a.radius is None else a.radius)


def _tail(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """t = e^−|value| and a bound of what underflow adds to the error of a formula in t.

    Where the computed t exceeds two smallest normal numbers the exact one is normal, and t errs by
    ELEMENTARY·t; elsewhere it may have been flushed to 0.
    """
    tail = torch.exp(-value.abs())
    floor = torch.full_like(tail, 8 * TINY).masked_fill_(tail <= 2 * SMALLEST_NORMAL, 4 * SMALLEST_NORMAL)
    return tail, floor


def _sum_of_two(a: Ball, b: Ball, value: torch.Tensor) -> Ball:
    radius = value.abs().mul_(EPSILON)
    if a.radius is not None:
        radius.add_(a.radius)
    if b.radius is not None:
        radius.add_(b.radius)
    return _settled(value, radius.mul_(SLACK))


def _widened(magnitude: torch.Tensor, growth: float, radius: torch.Tensor) -> torch.Tensor:
    """growth·magnitude + radius in place of ``magnitude``, and η for the product's underflow."""
    return magnitude.mul_(growth).add_(radius).add_(TINY)
