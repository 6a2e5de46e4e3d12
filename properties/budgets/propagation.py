"""The arithmetic of budgets: a family's own formula, run with the roundings that a kernel declares.

Every value carries, beside itself in float64, a bound on its error in any kernel of the declared precision
(``certain``: worst cases, added) and an estimate of the error's variance in a healthy one (``variance``:
independent contributions, in quadrature). Where a formula says ``store``, the declared format of that
quantity is rounded to; sums and matrix products grow as n·u/(1 − n·u) and √n·u (Higham 2002, lemma 3.1;
Higham & Mary 2019). What may pass half the largest number of its format is marked ``lost``, and with it
everything computed from it: the contract leaves those elements unjudged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth, half_spacing

__all__ = [
    "Estimate",
    "Propagation",
    "ScaledOperands",
    "alike_terms",
    "coincidence",
    "equal_terms",
    "wider",
]

# A healthy kernel's decision at a kink is taken to be open within this many standard deviations of it: few
# cases in 10⁹ are decided otherwise.
_UNDECIDED = 6.0
_LARGEST_EXPONENT = 700.0
# Formats finer than this round numbers that are equal alike too, but by less than what is counted anyway.
_FINE = 2.0**-20


@dataclass(frozen=True, eq=False)
class Estimate:
    """Numbers and their errors in a kernel; float64 tensors of one shape, None where zero throughout.

    Attributes:
        value: the exact numbers, as far as float64 knows them.
        certain: no kernel of the declared precision errs by more.
        variance: of a healthy kernel's error.
        lost: bool, numbers of which nothing is asked since they, or what they come from, may overflow.
        unit: unit roundoff of the format in which the numbers are stored; 0 for the inputs themselves, None
            for numbers held in the accumulation's precision.
    """

    value: torch.Tensor
    certain: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    lost: torch.Tensor | None = None
    unit: float | None = None

    @property
    def bound(self) -> torch.Tensor:
        """``certain`` as a tensor."""
        return torch.zeros_like(self.value) if self.certain is None else self.certain

    @property
    def spread(self) -> torch.Tensor:
        """``variance`` as a tensor."""
        return torch.zeros_like(self.value) if self.variance is None else self.variance

    def columns(self, start: int, stop: int | None) -> Estimate:
        """The elements ``start:stop`` of the last axis."""
        return _each(self, lambda x: x[..., start:stop])

    @property
    def size(self) -> torch.Tensor:
        """The largest absolute value that a kernel may have in place of each number."""
        size = self.value.abs()
        return size if self.certain is None else size + self.certain


class Propagation(Arithmetic[Estimate]):
    """Errors of a kernel with roundings ``r``, operation by operation."""

    name = "propagation"

    def __init__(self, r: Roundings) -> None:
        self.r = r

    def exact(self, tensor: torch.Tensor) -> Estimate:
        return Estimate(tensor.double(), unit=0.0)

    def shape(self, a: Estimate) -> tuple[int, ...]:
        return tuple(a.value.shape)

    def add(self, a: Estimate, b: Estimate) -> Estimate:
        return self._sum_of_two(a, b, a.value + b.value)

    def sub(self, a: Estimate, b: Estimate) -> Estimate:
        return self._sum_of_two(a, b, a.value - b.value)

    def _sum_of_two(self, a: Estimate, b: Estimate, value: torch.Tensor) -> Estimate:
        u = self.r.elementwise
        certain = (a.bound + b.bound) * (1.0 + u) + u * value.abs()
        variance = a.spread + b.spread + u * u * MEAN_SQUARE * value.square()
        return self._checked(value, certain, variance, _either(a.lost, b.lost, value))

    def mul(self, a: Estimate, b: Estimate) -> Estimate:
        u, value = self.r.elementwise, a.value * b.value
        certain = a.value.abs() * b.bound + a.bound * b.size
        certain = certain * (1.0 + 2.0 * u) + u * value.abs() + self._underflow(a.size * b.size)
        variance = a.value.square() * b.spread + a.spread * (b.value.square() + b.spread)
        if a is b:  # a square: its two factors err alike
            variance = 2.0 * variance
        variance = variance + u * u * MEAN_SQUARE * value.square()
        variance = variance + self._underflow(a.size * b.size).double() ** 2 / 3.0
        return self._checked(value, certain, variance, _either(a.lost, b.lost, value))

    def div(self, a: Estimate, b: Estimate) -> Estimate:
        u, value = self.r.elementwise, a.value / b.value
        nearest_zero = b.value.abs() - b.bound
        certain = (a.bound + value.abs() * b.bound) / nearest_zero.clamp(min=5e-324)
        certain = certain * (1.0 + 4.0 * u) + 2.0 * u * value.abs() + self._underflow(a.size)
        variance = (a.spread + value.square() * b.spread) / b.value.square()
        variance = variance + u * u * MEAN_SQUARE * value.square()
        lost = _either(a.lost, b.lost, value)
        singular = (nearest_zero <= 0) & (a.size > 0)
        if bool(singular.any()):
            lost = singular if lost is None else lost | singular
        certain = torch.where(a.size == 0, 0.0, certain)
        return self._checked(torch.where(a.value == 0, 0.0, value), certain, variance, lost)

    def scaled(self, a: Estimate, factor: float) -> Estimate:
        """The factor is itself a rounded constant, or a product of such."""
        u, value = self.r.elementwise, a.value * factor
        if factor == 1.0:
            return a
        certain = abs(factor) * a.bound * (1.0 + 4.0 * u) + 3.0 * u * value.abs() + self._underflow(a.size)
        variance = factor * factor * a.spread + (2.0 * u * value).square() / 3.0
        return self._checked(value, certain, variance, a.lost)

    def matmul(self, a: Estimate, b: Estimate) -> Estimate:
        r, inner = self.r, a.value.shape[-1]
        value = a.value @ b.value
        if inner == 0 or not value.numel():
            return Estimate(value)
        left, right = a.size, b.size
        total = left @ right
        certain = torch.zeros_like(value)
        if a.certain is not None:
            certain = certain + a.certain @ right
        if b.certain is not None:
            certain = certain + a.value.abs() @ b.certain
        ua, ub = self._operand(a), self._operand(b)
        operands = (1.0 + ua) * (1.0 + ub) - 1.0
        terms = torch.minimum((left != 0).sum(-1, keepdim=True), (right != 0).sum(-2, keepdim=True)).double()
        sums = operands + growth(terms + 2.0, r.accumulate) * (1.0 + operands)
        certain = certain * (1.0 + operands) + torch.where(total == 0, 0.0, sums * total)
        tiny = r.accumulate_tiny * (terms + 2.0)
        for side, other, unit in (
            (left.sum(-1, keepdim=True), right, ua),
            (right.sum(-2, keepdim=True), left, ub),
        ):
            if unit and other.numel():
                tiny = tiny + r.operand_tiny * side
        certain = certain + torch.where(total == 0, 0.0, tiny)
        square = a.value.square() @ b.value.square()
        variance = (ua * ua + ub * ub) * MEAN_SQUARE * square + (r.accumulate_tiny**2 * terms) * (total > 0)
        # What an operand loses that is subnormal in the format it is rounded to.
        if ua:
            variance = variance + (a.value != 0).double() @ b.value.square() * (r.operand_tiny**2 / 3.0)
        if ub:
            variance = variance + a.value.square() @ (b.value != 0).double() * (r.operand_tiny**2 / 3.0)
        if a.variance is not None:
            variance = variance + a.variance @ b.value.square()
        if b.variance is not None:
            variance = variance + a.value.square() @ b.variance
        variance = variance + self._summation(terms, square, _partial(a.value, b.value, value), total)
        alike = (alike_terms(a.value, -1, r) + alike_terms(b.value, -2, r) - 1.0).clamp(min=0.0)
        variance = variance + equal_terms(terms * alike, value, r)
        for side, held, coarse in ((a.value, a.unit, ua), (b.value.mT, b.unit, ub)):
            rounded = max(held or 0.0, coarse)
            if held != 0.0 and rounded > _FINE:
                alike = coincidence(side, rounded)
                alike = alike if side is a.value else alike.mT
                variance = variance + alike * (rounded * value).square()
        lost = total >= r.largest / 2.0
        # Also through a factor of 0: 0·inf is NaN.
        if a.lost is not None:
            lost = lost | a.lost.any(-1, keepdim=True)
        if b.lost is not None:
            lost = lost | b.lost.any(-2, keepdim=True)
        return self._checked(value, certain, variance, lost)

    def _summation(
        self, n: torch.Tensor, square: torch.Tensor, total: torch.Tensor, absolute: torch.Tensor
    ) -> torch.Tensor:
        """Variance of the rounding of a sum of n terms with Σt², Σt and Σ|t|, in random order."""
        if self.r.truncated:
            return (2.0**-23 * n / 2.0 * absolute) ** 2
        return self.r.accumulate**2 * n * (square / 2.0 + total.square() / 3.0) * MEAN_SQUARE

    def _operand(self, a: Estimate) -> float:
        """Unit roundoff with which a matmul operand is rounded, beyond the format it already has."""
        if a.unit == 0.0:
            return self.r.input
        return self.r.operand if a.unit is None or self.r.operand > a.unit else 0.0

    def transpose(self, a: Estimate) -> Estimate:
        return _each(a, lambda x: x.mT)

    def reshape(self, a: Estimate, shape: tuple[int, ...]) -> Estimate:
        return _each(a, lambda x: x.expand(a.value.shape).reshape(shape))

    def permute(self, a: Estimate, axes: tuple[int, ...]) -> Estimate:
        return _each(a, lambda x: x.expand(a.value.shape).permute(axes))

    def sum(self, a: Estimate) -> Estimate:
        value = a.value.sum(-1, keepdim=True)
        if not a.value.shape[-1]:
            return Estimate(value)
        size = a.size
        total = size.sum(-1, keepdim=True)
        terms = (size != 0).sum(-1, keepdim=True).double()
        certain = (
            a.bound.sum(-1, keepdim=True) + growth((terms - 1.0).clamp(min=0.0), self.r.accumulate) * total
        )
        square = a.value.square().sum(-1, keepdim=True)
        variance = a.spread.sum(-1, keepdim=True)
        even = a.value[..., ::2].sum(-1, keepdim=True)
        partial = torch.maximum(value.abs(), torch.maximum(even.abs(), (value - even).abs()))
        variance = variance + torch.where(terms > 1, self._summation(terms, square, partial, total), 0.0)
        variance = variance + equal_terms(terms * alike_terms(a.value, -1, self.r), value, self.r)
        lost = total >= self.r.largest / 2.0
        if a.lost is not None:
            lost = lost | a.lost.any(-1, keepdim=True)
        return self._checked(value, certain, variance, lost)

    def exp(self, a: Estimate) -> Estimate:
        """2 |a| u for the argument (theory.md HW-2), and the declared ulps."""
        value = torch.exp(a.value.clamp(max=_LARGEST_EXPONENT))
        argument = 2.0 * self.r.elementwise * a.value.abs()
        relative = torch.expm1((a.bound + argument + self.r.exp).clamp(max=_LARGEST_EXPONENT))
        certain = value * relative + self.r.probabilities_tiny
        variance = value.square() * (a.spread + (argument.square() + self.r.exp**2) / 3.0) + self._flushed
        lost = a.value + a.bound > math.log(self.r.largest / 2.0)
        return self._checked(value, certain, variance, lost if a.lost is None else lost | a.lost)

    def log(self, a: Estimate) -> Estimate:
        u, value = self.r.elementwise, torch.log(a.value.clamp(min=5e-324))
        ratio = a.bound / a.value.clamp(min=5e-324)
        singular = (ratio >= 1.0) | (a.value <= 0)
        certain = -torch.log1p(-ratio.clamp(max=1.0 - 1e-12)) + 4.0 * u * (1.0 + value.abs())
        variance = (
            a.spread / a.value.square().clamp(min=5e-324) + (2.0 * u * (1.0 + value.abs())).square() / 3.0
        )
        return self._checked(value, certain, variance, singular if a.lost is None else singular | a.lost)

    def log1p(self, a: Estimate) -> Estimate:
        """By a function of its own, of a ≥ 0: d log(1 + a) = da / (1 + a), and a few u."""
        u, value = self.r.elementwise, torch.log1p(a.value)
        below = 1.0 + a.value - a.bound
        singular = below <= 0
        certain = a.bound / below.clamp(min=5e-324) + 4.0 * u * value.abs() + self.r.accumulate_tiny
        variance = a.spread / (1.0 + a.value).square().clamp(min=5e-324) + (2.0 * u * value).square() / 3.0
        return self._checked(value, certain, variance, singular if a.lost is None else singular | a.lost)

    def tanh(self, a: Estimate) -> Estimate:
        """Through an exponential: 1-Lipschitz in its argument, with an error of a few u of its own."""
        u, value = self.r.elementwise, torch.tanh(a.value)
        certain = torch.minimum(a.bound, torch.tensor(2.0, dtype=torch.float64)) + self.r.exp + 8.0 * u
        certain = torch.where(a.size == 0, 0.0, certain)
        variance = a.spread * (1.0 - value.square()).square() + (2.0 * u) ** 2 / 3.0
        return self._checked(value, certain, torch.where(a.size == 0, 0.0, variance), a.lost)

    def sigmoid(self, a: Estimate) -> Estimate:
        """1/(1 + t), t = e^−a: the error of t counts by t/(1 + t) = 1 − σ."""
        u, value = self.r.elementwise, torch.sigmoid(a.value)
        rest = torch.sigmoid(-a.value)
        moved = value * torch.expm1(a.bound.clamp(max=_LARGEST_EXPONENT))
        argument = 2.0 * u * a.value.abs() + self.r.exp
        own = value * (rest * torch.expm1(argument.clamp(max=_LARGEST_EXPONENT)) + 4.0 * u)
        certain = torch.minimum(moved, a.bound / 4.0).clamp(max=1.0) + own + self.r.probabilities_tiny
        variance = (value * rest).square() * (a.spread + argument.square() / 3.0) + (
            2.0 * u * value
        ) ** 2 / 3.0
        return self._checked(value, certain, variance + self._flushed, a.lost)

    def sigmoid_slope(self, a: Estimate) -> Estimate:
        """σ(1 − σ), also where a kernel computes it from a σ that is itself rounded: then it errs by u σ."""
        u, value = self.r.elementwise, torch.sigmoid(a.value) * torch.sigmoid(-a.value)
        moved = torch.minimum(value * torch.expm1(a.bound.clamp(max=_LARGEST_EXPONENT)), a.bound / 8.0)
        argument = 2.0 * u * a.value.abs() + self.r.exp
        own = value * (argument + 6.0 * u) + 2.0 * u * torch.sigmoid(a.value)
        certain = moved.clamp(max=0.25) + own + self.r.probabilities_tiny
        slope = value * (1.0 - 2.0 * torch.sigmoid(a.value))
        variance = (
            slope.square() * a.spread + (value * argument) ** 2 / 3.0 + (u * torch.sigmoid(a.value)) ** 2
        )
        return self._checked(value, certain, variance + self._flushed, a.lost)

    def sqrt(self, a: Estimate) -> Estimate:
        u, value = self.r.elementwise, a.value.clamp(min=0.0).sqrt()
        lower = (a.value - a.bound).clamp(min=0.0).sqrt()
        certain = torch.where(value + lower > 0, a.bound / (value + lower), a.bound.sqrt()) + 2.0 * u * value
        variance = a.spread / (4.0 * a.value).clamp(min=5e-324) + (u * value).square() * MEAN_SQUARE
        return self._checked(value, certain, variance, a.lost)

    def relu(self, a: Estimate) -> Estimate:
        value = a.value.clamp(min=0.0)
        certain = torch.maximum(
            (a.value + a.bound).clamp(min=0.0) - value, value - (a.value - a.bound).clamp(min=0.0)
        )
        reached = a.value > -_UNDECIDED * a.spread.sqrt()
        return self._checked(value, certain, torch.where(reached, a.spread, 0.0), a.lost)

    def step(self, a: Estimate) -> Estimate:
        """1 for a > 0, else 0; either where the sign of ``a`` is within its error."""
        value = (a.value > 0).double()
        undecided = (a.value + a.bound > 0) & (a.value - a.bound <= 0)
        near = undecided & (a.value.abs() <= _UNDECIDED * a.spread.sqrt())
        return self._checked(value, undecided.double() * (a.bound > 0), near.double(), a.lost)

    def masked(self, a: Estimate, keep: torch.Tensor, fill: float = 0.0) -> Estimate:
        if bool(keep.all()):
            return a
        lost = None if a.lost is None else a.lost & keep
        value = torch.where(keep, a.value, fill)
        certain = None if a.certain is None else torch.where(keep, a.certain, 0.0)
        variance = None if a.variance is None else torch.where(keep, a.variance, 0.0)
        return Estimate(value, certain, variance, lost, a.unit)

    def store(self, a: Estimate, kind: str) -> Estimate:
        """One rounding to the declared format of ``kind``, of an input to that of scaled operands."""
        unit, tiny, largest = self.r.storage(kind)
        if kind == "operand" and not max(unit, self.r.input):
            return a
        unit = max(unit, self.r.input) if kind == "operand" and a.unit == 0.0 else unit
        size = a.size
        certain = a.bound + torch.where(
            size == 0, 0.0, torch.maximum(unit * size, torch.tensor(tiny).double())
        )
        spacing = torch.where(
            a.value == 0, torch.where(size == 0, 0.0, tiny), half_spacing(a.value, unit, tiny)
        )
        variance = a.spread + spacing.square() / 3.0
        lost = size * (1.0 + unit) >= largest / 2.0
        lost = lost if a.lost is None else lost | a.lost
        return replace(self._checked(a.value, certain, variance, lost), unit=unit)

    def midpoint(self, a: Estimate) -> torch.Tensor:
        return a.value

    def enclosure(self, a: Estimate) -> Enclosure:
        return Enclosure(a.value, a.bound)

    @property
    def _flushed(self) -> float:
        """Variance of a result that may be flushed to zero where it is subnormal."""
        return self.r.probabilities_tiny**2 / 3.0

    def _underflow(self, size: torch.Tensor) -> torch.Tensor:
        return torch.where(size == 0, 0.0, self.r.accumulate_tiny)

    def _checked(
        self, value: torch.Tensor, certain: torch.Tensor, variance: torch.Tensor, lost: torch.Tensor | None
    ) -> Estimate:
        """An estimate whose bounds are numbers: what is none is infinite."""
        over = (value.abs() + certain) >= self.r.largest / 2.0
        if bool(over.any()):
            lost = over if lost is None else lost | over
        elif lost is not None and not bool(lost.any()):
            lost = None
        return Estimate(
            value, certain.nan_to_num(torch.inf, torch.inf), variance.nan_to_num(1e300, 1e300), lost
        )


class ScaledOperands(Propagation):
    """Budgets in which a stored operand may have been scaled before, and be subnormal by that."""

    def __init__(self, r: Roundings, scale: float) -> None:
        super().__init__(r)
        self.factor = min(abs(scale), 1.0)

    def store(self, a: Estimate, kind: str) -> Estimate:
        stored = super().store(a, kind)
        tiny = self.r.operand_tiny
        if kind != "operand" or not tiny or not self.factor:
            return stored
        present = (a.value != 0).double() / self.factor
        spacing = half_spacing(a.value * self.factor, self.r.operand, tiny) * present
        return replace(
            stored,
            certain=torch.maximum(stored.bound, tiny * present),
            variance=torch.maximum(stored.spread, spacing.square() / 3.0),
        )


def wider(a: Estimate, b: Estimate) -> Estimate:
    """The errors of a kernel that may compute the same numbers in either of two orders."""
    marks = [x for x in (a.lost, b.lost) if x is not None]
    lost = torch.stack([x.expand(a.value.shape) for x in marks]).any(0) if marks else None
    return Estimate(a.value, torch.maximum(a.bound, b.bound), torch.maximum(a.spread, b.spread), lost)


def coincidence(x: torch.Tensor, unit: float) -> torch.Tensor:
    """Σ_j π_j (mass of other entries that agree with x_j to u/4), π = |x|/Σ|x|, over the last axis; (…, 1).

    Numbers that agree so closely are rounded by the same amount, so that their errors in a sum add up instead
    of averaging out; where all are equal this is 1 − 1/n.
    """
    size = x.abs()
    share = size / size.sum(-1, keepdim=True).clamp(min=1e-300)
    ordered, order = torch.log(size.clamp(min=1e-300)).sort(-1)
    share = share.gather(-1, order)
    mass = torch.nn.functional.pad(share.cumsum(-1), (1, 0))
    ordered = ordered.contiguous()
    high = torch.searchsorted(ordered, ordered + unit / 4.0, right=True)
    low = torch.searchsorted(ordered, ordered - unit / 4.0, right=False)
    near = mass.gather(-1, high) - mass.gather(-1, low)
    return (share * (near - share)).sum(-1, keepdim=True).clamp(min=0.0)


def alike_terms(x: torch.Tensor, axis: int, r: Roundings) -> torch.Tensor:
    """The share of the numbers along ``axis``, which is kept, that a sum of all rounds alike.

    They agree to a quarter of the last place of that sum, n·u/2. Zeros do not count; of several numbers that
    repeat, the largest or the smallest is looked at.
    """
    count = (x != 0).sum(axis, keepdim=True).double()
    if not x.shape[axis]:
        return count
    near = (count * r.accumulate / 2.0).clamp(min=_FINE)
    high = torch.where(x == 0, -torch.inf, x).amax(axis, keepdim=True)
    low = torch.where(x == 0, torch.inf, x).amin(axis, keepdim=True)
    found = [(((x - y).abs() <= near * y.abs()) & (x != 0)).sum(axis, keepdim=True) for y in (high, low)]
    return torch.maximum(*found) / count.clamp(min=1.0)


def equal_terms(n: torch.Tensor, total: torch.Tensor, r: Roundings) -> torch.Tensor:
    """Variance of the rounding of n equal terms of a sum that are added one by one, in no random order.

    Adding one number to partial sums of one binade rounds alike each time; half of the terms fall into the
    last binade, where each errs by up to u times the total. Sums that truncate do so anyway.
    """
    if r.truncated:
        return torch.zeros_like(total)
    return MEAN_SQUARE * (r.accumulate * total * n / 2.0).square()


def _partial(a: torch.Tensor, b: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """The largest of |a b| and its sums over even and odd terms alone.

    Lanes that sum every second, fourth or eighth term do not see signs that alternate cancel.
    """
    if a.shape[-1] < 4:
        return product
    even = a[..., ::2] @ b[..., ::2, :]
    return torch.maximum(product.abs(), torch.maximum(even.abs(), (product - even).abs()))


def _either(a: torch.Tensor | None, b: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    if a is None and b is None:
        return None
    marks = [x for x in (a, b) if x is not None]
    return (marks[0] if len(marks) == 1 else marks[0] | marks[1]).expand(like.shape)


def _each(a: Estimate, change: Callable[[torch.Tensor], torch.Tensor]) -> Estimate:
    certain, variance, lost = (None if x is None else change(x) for x in (a.certain, a.variance, a.lost))
    return Estimate(change(a.value), certain, variance, lost, a.unit)
