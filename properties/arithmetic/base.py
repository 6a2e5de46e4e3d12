"""The interface over which every formula of the suite is written once.

An :class:`Arithmetic` evaluates tensor expressions over values of its own type ``V`` and can state any of
them as an :class:`Enclosure`. Three implementations give the same formula its meaning (mpmath), a proof (Arb)
and speed (float64 with radii); see the package's docstring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

__all__ = ["Arithmetic", "Enclosure", "V"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True, eq=False)
class Enclosure:
    """A set that contains the exact result: |exact − value| ≤ radius, element by element.

    Attributes:
        value: float64, any shape; ±inf marks an exact infinity (radius 0), such as the log of an empty sum.
        radius: float64, the shape of ``value``, ≥ 0; +inf where nothing is known.
    """

    value: torch.Tensor
    radius: torch.Tensor

    def __repr__(self) -> str:
        if self.value.numel() == 1:
            return f"Enclosure({float(self.value):.17g} ± {float(self.radius):.2g})"
        worst = float(self.radius.max()) if self.radius.numel() else 0.0
        return f"Enclosure(shape={tuple(self.value.shape)}, largest radius {worst:.2g})\n{self.value}"


class Arithmetic(ABC, Generic[V]):
    """Tensor operations on values that enclose, or very nearly are, exact real numbers.

    Values are immutable and have a shape; elementwise operations broadcast as torch does. Inputs must be
    finite: masks are applied by :meth:`masked`, never by infinities.
    """

    name: str

    @abstractmethod
    def exact(self, tensor: torch.Tensor) -> V:
        """The numbers that a floating tensor (float16 to float64, finite) stores, without error."""

    @abstractmethod
    def shape(self, a: V) -> tuple[int, ...]:
        """The shape of ``a``."""

    @abstractmethod
    def add(self, a: V, b: V) -> V:
        """a + b."""

    @abstractmethod
    def sub(self, a: V, b: V) -> V:
        """a − b."""

    @abstractmethod
    def mul(self, a: V, b: V) -> V:
        """a · b, element by element."""

    @abstractmethod
    def div(self, a: V, b: V) -> V:
        """a / b, element by element; where b's enclosure holds 0 nothing is known (infinite radius)."""

    @abstractmethod
    def scaled(self, a: V, factor: float) -> V:
        """a · factor for a Python float, taken exactly."""

    @abstractmethod
    def matmul(self, a: V, b: V) -> V:
        """Matrix product over the last two axes, (…, M, K) × (…, K, N) → (…, M, N).

        Leading axes broadcast.
        """

    @abstractmethod
    def transpose(self, a: V) -> V:
        """The last two axes exchanged."""

    @abstractmethod
    def sum(self, a: V) -> V:
        """Sum over the last axis, kept with length 1; an empty sum is 0."""

    @abstractmethod
    def exp(self, a: V) -> V:
        """e to the power a."""

    @abstractmethod
    def log(self, a: V) -> V:
        """Natural logarithm; where a's enclosure is not positive nothing is known of the result."""

    @abstractmethod
    def log1p(self, a: V) -> V:
        """log(1 + a), to relative accuracy also where a is tiny; nothing is known where 1 + a may be ≤ 0."""

    @abstractmethod
    def tanh(self, a: V) -> V:
        """Hyperbolic tangent."""

    @abstractmethod
    def sigmoid(self, a: V) -> V:
        """σ(a) = 1/(1 + e^−a), to relative accuracy also where it is tiny; for every finite a."""

    @abstractmethod
    def sigmoid_slope(self, a: V) -> V:
        """σ'(a) = σ(a)(1 − σ(a)) = t/(1 + t)² with t = e^−|a|, to relative accuracy on both sides of 0."""

    @abstractmethod
    def sqrt(self, a: V) -> V:
        """Square root; where a's enclosure holds a negative number nothing is known (infinite radius)."""

    @abstractmethod
    def relu(self, a: V) -> V:
        """The larger of a and 0."""

    @abstractmethod
    def step(self, a: V) -> V:
        """1 where a > 0 and 0 where a ≤ 0, the derivative of :meth:`relu` as PyTorch takes it.

        Where a's enclosure holds positive and other numbers, 1/2 ± 1/2.
        """

    @abstractmethod
    def reshape(self, a: V, shape: tuple[int, ...]) -> V:
        """The elements of ``a`` in row-major order, in another shape; one axis may be −1, as in torch.

        Raises:
            ValueError: ``shape`` does not hold as many elements as ``a``.
        """

    @abstractmethod
    def permute(self, a: V, axes: tuple[int, ...]) -> V:
        """Axis i of the result is axis ``axes[i]`` of ``a``; negative axes count from the end.

        Raises:
            ValueError: ``axes`` does not name each axis of ``a`` once.
        """

    def store(self, a: V, kind: str) -> V:
        """Where a kernel may store ``a`` in a declared format.

        Exact arithmetics return ``a`` itself; the one that computes budgets adds a rounding.

        Args:
            a: what is stored.
            kind: the field of ``Precision`` that declares the format ('scores', 'probabilities', 'dscores',
                'lse', 'state' or 'output'), or 'operand' for a computed operand of a matrix product.
        """
        return a

    @abstractmethod
    def masked(self, a: V, keep: torch.Tensor, fill: float = 0.0) -> V:
        """a where ``keep`` (bool, broadcastable to a's shape and back) holds, else exactly ``fill``."""

    @abstractmethod
    def midpoint(self, a: V) -> torch.Tensor:
        """A float64 approximation of a, for choices that need not be exact (a shift, a pivot).

        Finite where possible.
        """

    @abstractmethod
    def enclosure(self, a: V) -> Enclosure:
        """a as float64 centre and radius, the rounding of the centre to float64 included in the radius."""
