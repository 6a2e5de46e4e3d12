"""The definition's meaning: every operation in mpmath, at a stated precision far beyond any kernel's."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import torch
from mpmath.libmp import from_float

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure
from attnproof.properties.arithmetic.conversion import (
    FloatArray,
    ObjectArray,
    as_objects,
    check_axes,
    finite_float64,
    keep_mask,
    products,
    resolved_shape,
    round_up,
    to_tensor,
)

__all__ = ["MpmathArithmetic"]

# Digits that a chain of rounded operations is assumed to lose at most, cancellation aside: the radius that
# `enclosure` states is 10**(GUARD_DIGITS - digits) of the value. It takes 10^8 roundings in a row to use
# it up.
GUARD_DIGITS = 8
# Fewer digits than this could not hold a float64 exactly.
FEWEST_DIGITS = 17
LARGEST = float(np.finfo(np.float64).max)
SMALLEST = float(np.finfo(np.float64).smallest_subnormal)


class MpmathArithmetic(Arithmetic[ObjectArray]):
    """Arbitrary precision by mpmath: slow, transparent, the word of last resort.

    A value is an object array of ``mpf`` of a context that belongs to this object; the precision of
    ``mpmath.mp`` is neither read nor changed. Matrix products and sums are accumulated exactly and rounded
    once.

    Args:
        digits: decimal digits of every operation, ≥ 17.

    Raises:
        ValueError: ``digits`` is below 17, where a float64 would not be stored exactly.
    """

    name = "mpmath"

    def __init__(self, digits: int = 50) -> None:
        if digits < FEWEST_DIGITS:
            raise ValueError(
                f"digits is {digits}; at least {FEWEST_DIGITS} are needed to hold a float64 exactly"
            )
        self.digits = digits
        self.context: Any = mpmath.MPContext()
        self.context.dps = digits
        self._nan = self.context.mpf("nan")
        self._exp = np.frompyfunc(self.context.exp, 1, 1)
        self._tanh = np.frompyfunc(self.context.tanh, 1, 1)
        self._log = np.frompyfunc(self._log_of_one, 1, 1)
        self._log1p = np.frompyfunc(self._log1p_of_one, 1, 1)
        self._sigmoid = np.frompyfunc(self._sigmoid_of_one, 1, 1)
        self._sigmoid_slope = np.frompyfunc(self._sigmoid_slope_of_one, 1, 1)
        self._sqrt = np.frompyfunc(self._sqrt_of_one, 1, 1)
        self._relu = np.frompyfunc(self._relu_of_one, 1, 1)
        self._step = np.frompyfunc(self._step_of_one, 1, 1)
        self._div = np.frompyfunc(self._quotient_of_two, 2, 1)

    def __repr__(self) -> str:
        return f"MpmathArithmetic(digits={self.digits})"

    def exact(self, tensor: torch.Tensor) -> ObjectArray:
        numbers = finite_float64(tensor)
        make = self.context.make_mpf
        return as_objects([make(from_float(x)) for x in numbers.flatten().tolist()], tuple(numbers.shape))

    def shape(self, a: ObjectArray) -> tuple[int, ...]:
        return a.shape

    def add(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        return np.asarray(np.add(a, b), dtype=object)

    def sub(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        return np.asarray(np.subtract(a, b), dtype=object)

    def mul(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        return np.asarray(np.multiply(a, b), dtype=object)

    def div(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        return np.asarray(self._div(a, b), dtype=object)

    def scaled(self, a: ObjectArray, factor: float) -> ObjectArray:
        return np.asarray(np.multiply(a, self.context.mpf(float(factor))), dtype=object)

    def matmul(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        return products(a, b, self._product)

    def transpose(self, a: ObjectArray) -> ObjectArray:
        return np.swapaxes(a, -1, -2)

    def sum(self, a: ObjectArray) -> ObjectArray:
        rows = (
            a.reshape(-1, a.shape[-1]) if a.size else np.empty((int(np.prod(a.shape[:-1])), 0), dtype=object)
        )
        return as_objects([self.context.fsum(row) for row in rows.tolist()], (*a.shape[:-1], 1))

    def exp(self, a: ObjectArray) -> ObjectArray:
        return np.asarray(self._exp(a), dtype=object)

    def log(self, a: ObjectArray) -> ObjectArray:
        return np.asarray(self._log(a), dtype=object)

    def log1p(self, a: ObjectArray) -> ObjectArray:
        return np.asarray(self._log1p(a), dtype=object)

    def tanh(self, a: ObjectArray) -> ObjectArray:
        return np.asarray(self._tanh(a), dtype=object)

    def sigmoid(self, a: ObjectArray) -> ObjectArray:
        return np.asarray(self._sigmoid(a), dtype=object)

    def sigmoid_slope(self, a: ObjectArray) -> ObjectArray:
        return np.asarray(self._sigmoid_slope(a), dtype=object)

    def sqrt(self, a: ObjectArray) -> ObjectArray:
        return np.asarray(self._sqrt(a), dtype=object)

    def relu(self, a: ObjectArray) -> ObjectArray:
        return np.asarray(self._relu(a), dtype=object)

    def step(self, a: ObjectArray) -> ObjectArray:
        return np.asarray(self._step(a), dtype=object)

    def reshape(self, a: ObjectArray, shape: tuple[int, ...]) -> ObjectArray:
        return a.reshape(resolved_shape(a.shape, shape))

    def permute(self, a: ObjectArray, axes: tuple[int, ...]) -> ObjectArray:
        check_axes(a.ndim, axes)
        return a.transpose(axes)

    def masked(self, a: ObjectArray, keep: torch.Tensor, fill: float = 0.0) -> ObjectArray:
        filler = np.empty((), dtype=object)
        filler[()] = self.context.mpf(fill)
        return np.where(keep_mask(keep), a, filler)

    def midpoint(self, a: ObjectArray) -> torch.Tensor:
        return to_tensor(self._nearest(a).reshape(a.shape))

    def enclosure(self, a: ObjectArray) -> Enclosure:
        """The value rounded to float64, with a radius that is an estimate and no proof.

        The radius is the rounding's own error plus 10**(8 − digits) of the value: room for 10^8 roundings in
        a row, but cancellation is not looked for. Use :class:`ArbArithmetic` where a proof is wanted.
        """
        nearest = self._nearest(a)
        mpf, is_finite = self.context.mpf, self.context.isfinite
        unbounded = mpf("inf")
        distances = [
            abs(x - mpf(f)) if is_finite(x) else (unbounded if x != x else mpf(0))  # noqa: PLR0124
            for x, f in zip(a.ravel().tolist(), nearest.tolist(), strict=True)
        ]
        rounding = round_up(
            np.array([float(d) for d in distances]), np.array([d == 0 for d in distances], dtype=bool)
        )
        magnitude = np.where(np.isinf(nearest), 0.0, np.abs(nearest) + SMALLEST)
        working = round_up(magnitude * 10.0 ** (GUARD_DIGITS - self.digits), magnitude == 0)
        radius = np.where(working == 0, rounding, round_up(rounding + working, rounding + working == 0))
        return Enclosure(to_tensor(nearest.reshape(a.shape)), to_tensor(radius.reshape(a.shape)))

    def _nearest(self, a: ObjectArray) -> FloatArray:
        """Flattened: finite float64 where a is finite, ±inf where it is that, 0 where it is NaN."""
        numbers = a.ravel().tolist()
        nearest = np.array([float(x) for x in numbers], dtype=np.float64)
        if not np.isfinite(nearest).all():
            overflowed = np.isinf(nearest) & np.array([bool(self.context.isfinite(x)) for x in numbers])
            nearest = np.where(
                overflowed, np.copysign(LARGEST, nearest), np.where(np.isnan(nearest), 0.0, nearest)
            )
        return nearest

    def _product(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        dot = self.context.fdot
        columns = b.T.tolist()
        return as_objects(
            [dot(row, column) for row in a.tolist() for column in columns], (a.shape[0], b.shape[1])
        )

    def _quotient_of_two(self, a: Any, b: Any) -> Any:
        return a / b if b else self._nan

    def _log_of_one(self, a: Any) -> Any:
        return self.context.log(a) if a > 0 else self._nan

    def _log1p_of_one(self, a: Any) -> Any:
        return self.context.log1p(a) if a > -1 else self._nan

    def _sqrt_of_one(self, a: Any) -> Any:
        return self.context.sqrt(a) if a >= 0 else self._nan

    def _sigmoid_of_one(self, a: Any) -> Any:
        tail = self.context.exp(-abs(a))
        return (tail if a < 0 else 1) / (1 + tail)

    def _sigmoid_slope_of_one(self, a: Any) -> Any:
        tail = self.context.exp(-abs(a))
        return tail / (1 + tail) ** 2

    def _relu_of_one(self, a: Any) -> Any:
        return self.context.zero if a <= 0 else a

    def _step_of_one(self, a: Any) -> Any:
        if self.context.isnan(a):
            return a
        return self.context.one if a > 0 else self.context.zero
