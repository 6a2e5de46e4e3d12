"""Proved results at any precision: every operation in Arb's ball arithmetic, by python-flint."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flint
import numpy as np
import torch

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

__all__ = ["ArbArithmetic"]

# Inputs are stored exactly whatever the precision, but one below float64's would widen every result.
FEWEST_BITS = 53
LARGEST = float(np.finfo(np.float64).max)


def _sigmoid_of_one(x: flint.arb) -> flint.arb:
    """σ increases: a ball's image lies between those of its ends, and in [0, 1] whatever is unknown of x."""
    if not x.is_finite():
        return flint.arb(0.5, 0.5)
    if not x.is_exact():
        return _sigmoid_of_one(x.lower()).union(_sigmoid_of_one(x.upper()))
    tail = (-abs(x)).exp()
    return (tail if x < 0 else 1) / (1 + tail)


def _sigmoid_slope_of_one(x: flint.arb) -> flint.arb:
    """σ' decreases from 1/4 to 0 as |x| grows: the nearest and the farthest point from 0 enclose it."""
    if not x.is_finite():
        return flint.arb(0.125, 0.125)
    if not x.is_exact():
        return _sigmoid_slope_of_one(x.abs_lower()).union(_sigmoid_slope_of_one(x.abs_upper()))
    tail = (-abs(x)).exp()
    return tail / (1 + tail) ** 2


def _relu_of_one(x: flint.arb) -> flint.arb:
    if x <= 0:
        return flint.arb(0)
    return x if x > 0 else x.max(flint.arb(0))


def _step_of_one(x: flint.arb) -> flint.arb:
    if x > 0:
        return flint.arb(1)
    return flint.arb(0) if x <= 0 else flint.arb(0.5, 0.5)


_exp = np.frompyfunc(flint.arb.exp, 1, 1)
_log = np.frompyfunc(flint.arb.log, 1, 1)
_log1p = np.frompyfunc(flint.arb.log1p, 1, 1)
_tanh = np.frompyfunc(flint.arb.tanh, 1, 1)
_sqrt = np.frompyfunc(flint.arb.sqrt, 1, 1)
_sigmoid = np.frompyfunc(_sigmoid_of_one, 1, 1)
_sigmoid_slope = np.frompyfunc(_sigmoid_slope_of_one, 1, 1)
_relu = np.frompyfunc(_relu_of_one, 1, 1)
_step = np.frompyfunc(_step_of_one, 1, 1)

_TURN = threading.RLock()


@contextmanager
def _precision(bits: int) -> Iterator[None]:
    """Arb's working precision, one global of python-flint, set to ``bits`` and put back afterwards.

    Judge threads take turns: with another thread's precision a result would be just as proved, but wider than
    asked.
    """
    with _TURN:
        before = flint.ctx.prec
        flint.ctx.prec = bits
        try:
            yield
        finally:
            flint.ctx.prec = before


class ArbArithmetic(Arithmetic[ObjectArray]):
    """Ball arithmetic by Arb (Johansson 2017): every value is a ball that is proved to hold the exact result.

    A value is an object array of ``flint.arb``. The precision is set around each operation and restored after
    it; python-flint keeps it in a global, so two threads must not use balls at once.

    Args:
        bits: binary digits of the balls' centres, ≥ 53.

    Raises:
        ValueError: ``bits`` is below 53.
    """

    name = "arb"

    def __init__(self, bits: int = 128) -> None:
        if bits < FEWEST_BITS:
            raise ValueError(f"bits is {bits}; at least {FEWEST_BITS} are needed, float64's own precision")
        self.bits = bits

    def __repr__(self) -> str:
        return f"ArbArithmetic(bits={self.bits})"

    def exact(self, tensor: torch.Tensor) -> ObjectArray:
        numbers = finite_float64(tensor)
        return as_objects(list(map(flint.arb, numbers.flatten().tolist())), tuple(numbers.shape))

    def shape(self, a: ObjectArray) -> tuple[int, ...]:
        return a.shape

    def add(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        return self._elementwise(np.add, a, b)

    def sub(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        return self._elementwise(np.subtract, a, b)

    def mul(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        return self._elementwise(np.multiply, a, b)

    def div(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        return self._elementwise(np.divide, a, b)

    def scaled(self, a: ObjectArray, factor: float) -> ObjectArray:
        return self._elementwise(np.multiply, a, flint.arb(float(factor)))

    def matmul(self, a: ObjectArray, b: ObjectArray) -> ObjectArray:
        with _precision(self.bits):
            return products(a, b, _product)

    def transpose(self, a: ObjectArray) -> ObjectArray:
        return np.swapaxes(a, -1, -2)

    def sum(self, a: ObjectArray) -> ObjectArray:
        with _precision(self.bits):
            return np.asarray(np.add.reduce(a, axis=-1, keepdims=True, initial=flint.arb(0)), dtype=object)

    def exp(self, a: ObjectArray) -> ObjectArray:
        return self._elementwise(_exp, a)

    def log(self, a: ObjectArray) -> ObjectArray:
        return self._elementwise(_log, a)

    def log1p(self, a: ObjectArray) -> ObjectArray:
        return self._elementwise(_log1p, a)

    def tanh(self, a: ObjectArray) -> ObjectArray:
        return self._elementwise(_tanh, a)

    def sigmoid(self, a: ObjectArray) -> ObjectArray:
        return self._elementwise(_sigmoid, a)

    def sigmoid_slope(self, a: ObjectArray) -> ObjectArray:
        return self._elementwise(_sigmoid_slope, a)

    def sqrt(self, a: ObjectArray) -> ObjectArray:
        return self._elementwise(_sqrt, a)

    def relu(self, a: ObjectArray) -> ObjectArray:
        return self._elementwise(_relu, a)

    def step(self, a: ObjectArray) -> ObjectArray:
        return self._elementwise(_step, a)

    def reshape(self, a: ObjectArray, shape: tuple[int, ...]) -> ObjectArray:
        return a.reshape(resolved_shape(a.shape, shape))

    def permute(self, a: ObjectArray, axes: tuple[int, ...]) -> ObjectArray:
        check_axes(a.ndim, axes)
        return a.transpose(axes)

    def masked(self, a: ObjectArray, keep: torch.Tensor, fill: float = 0.0) -> ObjectArray:
        filler = np.empty((), dtype=object)
        filler[()] = flint.arb(fill)
        return np.where(keep_mask(keep), a, filler)

    def midpoint(self, a: ObjectArray) -> torch.Tensor:
        return to_tensor(_centres(a).reshape(a.shape))

    def enclosure(self, a: ObjectArray) -> Enclosure:
        centres = _centres(a)
        with _precision(self.bits):
            bounds = [
                (x - c).abs_upper() if x.is_finite() else None
                for x, c in zip(a.ravel().tolist(), centres.tolist(), strict=True)
            ]
        nearest = np.array([np.inf if bound is None else float(bound) for bound in bounds], dtype=np.float64)
        is_zero = np.array([bound is not None and bound == 0 for bound in bounds], dtype=bool)
        radii = np.where(np.isinf(centres), 0.0, round_up(nearest, is_zero))
        return Enclosure(to_tensor(centres.reshape(a.shape)), to_tensor(radii.reshape(a.shape)))

    def _elementwise(self, operation: Any, *arguments: Any) -> ObjectArray:
        with _precision(self.bits):
            return np.asarray(operation(*arguments), dtype=object)


def _product(a: ObjectArray, b: ObjectArray) -> ObjectArray:
    """The product of two matrices of balls, which Arb computes in blocks of like magnitude."""
    (rows, inner), columns = a.shape, b.shape[1]
    if inner == 0 or rows == 0 or columns == 0:
        return as_objects([flint.arb(0) for _ in range(rows * columns)], (rows, columns))
    product = flint.arb_mat(rows, inner, a.ravel().tolist()) * flint.arb_mat(
        inner, columns, b.ravel().tolist()
    )
    return as_objects(product.entries(), (rows, columns))


def _centres(a: ObjectArray) -> FloatArray:
    """The balls' centres in float64, flattened: 0 for an unbounded ball, ±inf for an exact infinity."""
    balls = a.ravel().tolist()
    nearest = np.array([float(x.mid()) for x in balls], dtype=np.float64)
    if not np.isfinite(nearest).all():
        for i in np.flatnonzero(~np.isfinite(nearest)).tolist():
            if balls[i].is_finite():
                nearest[i] = np.copysign(LARGEST, nearest[i])
            elif not balls[i].is_exact() or np.isnan(nearest[i]):
                nearest[i] = 0.0
    return np.where([x.is_finite() or x.is_exact() for x in balls], nearest, 0.0) if balls else nearest
