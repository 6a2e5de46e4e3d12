"""A network of ReLUs on a rational line: every breakpoint isolated, every piece as a polynomial over ℚ.

At a rational point the signs of all that is rectified are known, and with them the polynomial that the
network equals until the next of these signs changes. Breakpoints are real algebraic numbers: an
irreducible integer polynomial and a rational interval with one of its roots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.spline_networks import Activation, Network, on
from attnproof.properties.forms.base import Array, each

__all__ = [
    "UNKNOWN",
    "OnBoundary",
    "Piece",
    "Root",
    "Trace",
    "contacts",
    "decompose",
    "evaluations",
    "inside",
    "interpolated",
    "newton",
    "order_of_contact",
    "real_roots",
]

UNKNOWN = flint.fmpq_poly([0, 1])
_BITS = 128
"""Of the first isolating intervals; roots that lie closer than 2^-128 are told apart by bisection."""


class OnBoundary(ValueError):
    """The signs were asked for at a point where one of them changes."""


@dataclass(frozen=True)
class Root:
    """A real algebraic number: the root ``index``, counted from the left, of an irreducible polynomial.

    Attributes:
        coefficients: of the primitive integer polynomial, constant first.
        low, high: rational; the only root in [low, high], equal for a rational root.
    """

    coefficients: tuple[int, ...]
    index: int
    low: flint.fmpq = field(compare=False)
    high: flint.fmpq = field(compare=False)

    def __float__(self) -> float:
        middle = (self.low + self.high) / 2
        return int(middle.p) / int(middle.q)

    @property
    def polynomial(self) -> flint.fmpq_poly:
        """The minimal polynomial, up to a factor."""
        return flint.fmpq_poly(list(self.coefficients))

    def halved(self) -> Root:
        """With half the interval."""
        if self.low == self.high:
            return self
        middle = (self.low + self.high) / 2
        p = self.polynomial
        if (p(middle) > 0) == (p(self.low) > 0):
            return Root(self.coefficients, self.index, middle, self.high)
        return Root(self.coefficients, self.index, self.low, middle)


def _rational(x: Any) -> flint.fmpq:
    mantissa, exponent = x.man_exp()
    two = flint.fmpq(2)
    return flint.fmpq(mantissa) * (two ** int(exponent) if exponent >= 0 else 1 / two ** int(-exponent))


def real_roots(p: flint.fmpz_poly) -> list[Root]:
    """The real roots, ascending, of an irreducible polynomial of degree ≥ 1.

    Arb isolates them all (real ones have imaginary part exactly 0); the sign of p changes between the ends of
    each interval, which is asserted.
    """
    coefficients = tuple(int(c) for c in p.coeffs())
    if p.degree() == 1:
        value = flint.fmpq(-coefficients[0], coefficients[1])
        return [Root(coefficients, 0, value, value)]
    with _precision(_BITS):
        roots: list[Any] = p.complex_roots()
        balls = [root.real for root, _ in roots if root.imag == 0]
        ends = sorted((_rational(ball.lower()), _rational(ball.upper())) for ball in balls)
    q = flint.fmpq_poly(p)
    assert all(q(low) * q(high) < 0 for low, high in ends)
    assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False))
    return [Root(coefficients, i, low, high) for i, (low, high) in enumerate(ends)]


class Isolation:
    """The points at which polynomials change sign, each factor's roots isolated once."""

    def __init__(self) -> None:
        self._roots: dict[tuple[int, ...], list[Root]] = {}
        self._changes: dict[str, list[Root]] = {}

    def sign_changes(self, p: flint.fmpq_poly) -> list[Root]:
        """Roots of odd multiplicity, in no order."""
        known = self._changes.get(key := str(p))
        if known is None:
            factors = [f for f, power in p.numer().factor()[1] if power % 2 and f.degree() > 0]
            known = self._changes[key] = [root for f in factors for root in self._of(f)]
        return known

    def _of(self, p: flint.fmpz_poly) -> list[Root]:
        key = tuple(int(c) for c in p.coeffs())
        if key not in self._roots:
            self._roots[key] = real_roots(p)
        return self._roots[key]


def _below(a: Root, b: Root) -> bool:
    """a < b of two different roots."""
    while not (a.high < b.low or b.high < a.low):
        a, b = a.halved(), b.halved()
    return bool(a.high < b.low)


def _apart(root: Root, point: flint.fmpq) -> Root:
    """The root with an interval that leaves out ``point``, which it is not equal to."""
    while root.low <= point <= root.high:
        root = root.halved()
    return root


@dataclass
class Trace:
    """A ReLU that follows the signs at a point: p stays if p(point) > 0 and else becomes 0; keeps every p."""

    point: tuple[flint.fmpq, ...]
    conditions: list[Any] = field(default_factory=list)
    signs: list[bool] = field(default_factory=list)

    def __call__(self, x: Array) -> Array:
        return each(self._one, x)

    def _one(self, p: Any) -> Any:
        if p == 0:
            return p
        value = p(*self.point)
        if value == 0:
            raise OnBoundary(f"a rectified polynomial vanishes at {self.point}")
        self.conditions.append(p)
        self.signs.append(bool(value > 0))
        return p if value > 0 else 0 * p


@dataclass(frozen=True)
class Piece:
    """A cell of the line and what the network is on it.

    Attributes:
        left, right: its ends; None is −∞, or ∞.
        point: a rational point of it.
        values: the outputs as polynomials, in order of rows.
        conditions: number of polynomials whose signs make the cell.
    """

    left: Root | None
    right: Root | None
    point: flint.fmpq
    values: tuple[flint.fmpq_poly, ...]
    conditions: int

    @property
    def degree(self) -> int:
        """The largest degree of an output; −1 where all are 0."""
        return max(p.degree() for p in self.values)


def _bounds(left: Root | None, right: Root | None) -> tuple[flint.fmpq, flint.fmpq]:
    """Rational ends within the gap between two roots, or of length 2 next to one."""
    if left is None or right is None:
        if right is not None:
            return right.low - 2, right.low
        return (left.high, left.high + 2) if left is not None else (flint.fmpq(-1), flint.fmpq(1))
    assert _below(left, right)
    while not left.high < right.low:
        left, right = left.halved(), right.halved()
    return left.high, right.low


def _grid(low: flint.fmpq, high: flint.fmpq, count: int) -> list[flint.fmpq]:
    """``count`` points strictly between two rationals, multiples of one power of 1/2."""
    step = flint.fmpq(1)
    while step * (count + 1) > high - low:
        step = step / 2
    first = (low / step).floor() + 1
    return [(first + i) * step for i in range(count)]


def inside(piece: Piece, count: int) -> list[flint.fmpq]:
    """``count`` rational points of a cell."""
    return _grid(*_bounds(piece.left, piece.right), count)


def _candidates(left: Root | None, right: Root | None) -> Iterator[flint.fmpq]:
    low, high = _bounds(left, right)
    count = 1
    while True:
        yield from _grid(low, high, count)
        count = 2 * count + 1


def _piece(
    network: Network, directions: tuple[Array, ...], power: int, isolation: Isolation, gap: tuple[Any, Any]
) -> Piece:
    """The cell around the first point of the gap at which no sign changes."""
    x = on(directions, UNKNOWN)
    for point in _candidates(*gap):
        trace = Trace((point,))
        try:
            values = network(x, Activation(trace, power=power))
        except OnBoundary:
            continue
        left: Root | None = None
        right: Root | None = None
        for condition in trace.conditions:
            for root in isolation.sign_changes(condition):
                away = _apart(root, point)
                if away.high < point:
                    left = away if left is None or (left != away and _below(left, away)) else left
                else:
                    right = away if right is None or (right != away and _below(away, right)) else right
        polynomials = tuple(flint.fmpq_poly(0) + p for p in values.flat)
        return Piece(left, right, point, polynomials, len(trace.conditions))
    raise AssertionError("unreachable: candidates do not end")


def decompose(network: Network, directions: tuple[Array, ...], power: int = 1) -> list[Piece]:
    """All cells of the line X₀ + tX₁, from left to right, with the network's polynomials.

    A cell is a largest interval on which no rectified polynomial changes sign; neighbours share their end.

    Args:
        network: evaluated with ReLU.
        directions: X₀ and X₁.
        power: of the rectified scores.
    """
    isolation = Isolation()

    def cells(left: Root | None, right: Root | None) -> list[Piece]:
        piece = _piece(network, directions, power, isolation, (left, right))
        before = cells(left, piece.left) if piece.left != left else []
        after = cells(piece.right, right) if piece.right != right else []
        return [*before, piece, *after]

    return cells(None, None)


def newton(points: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Divided differences f[t₀], f[t₀, t₁], …: the coefficients of Newton's interpolation."""
    table = list(values)
    out = [table[0]]
    for order in range(1, len(points)):
        table = [
            (table[i + 1] - table[i]) / (points[i + order] - points[i]) for i in range(len(points) - order)
        ]
        out.append(table[0])
    return out


def interpolated(points: Sequence[flint.fmpq], values: Sequence[flint.fmpq]) -> flint.fmpq_poly:
    """The polynomial of degree < len(points) through rational values."""
    polynomial = flint.fmpq_poly(0)
    for coefficient, point in zip(reversed(newton(points, values)), reversed(points), strict=True):
        polynomial = polynomial * (UNKNOWN - point) + coefficient
    return polynomial


def contacts(left: Piece, right: Piece) -> list[int | None]:
    """For each output, how often the common end's minimal polynomial divides the difference of two pieces.

    0 is a jump; k ≥ 1 is a function with k − 1 continuous derivatives there, and a k-th one that jumps; None
    is one polynomial on both sides.
    """
    root = left.right
    assert root is not None
    assert root == right.left
    orders: list[int | None] = []
    for a, b in zip(left.values, right.values, strict=True):
        difference, order = b - a, 0
        if difference.degree() < 0:
            orders.append(None)
            continue
        while (difference % root.polynomial).degree() < 0:
            difference, order = difference // root.polynomial, order + 1
        orders.append(order)
    return orders


def order_of_contact(left: Piece, right: Piece) -> int | None:
    """The least of :func:`contacts`; None where no output changes."""
    return min((order for order in contacts(left, right) if order is not None), default=None)


def evaluations(
    network: Network, directions: tuple[Array, ...], points: Sequence[flint.fmpq], activation: Activation
) -> list[list[Any]]:
    """Outputs at every point, one list an output."""
    rows = [list(network(on(directions, t), activation).flat) for t in points]
    return [list(column) for column in np.array(rows, dtype=object).T]
