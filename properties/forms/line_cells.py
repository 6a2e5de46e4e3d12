"""The cells of piecewise polynomial functions along a whole line, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flint

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.forms.relu_encoder import Germ

__all__ = ["Cell", "Root", "along", "cells"]

_BITS = 256
"""Of the balls that order the roots; 256 bits separate those of every polynomial that occurs here."""


@dataclass(frozen=True)
class Root:
    """A real algebraic number: a ball that isolates it among the roots of an irreducible polynomial."""

    factor: flint.fmpz_poly
    ball: flint.arb

    def same(self, other: Root) -> bool:
        """The one number, not merely a near one."""
        return self.factor == other.factor and bool(self.ball.overlaps(other.ball))


@dataclass(frozen=True)
class Cell:
    """An open interval of t (None: unbounded) on which every function is the polynomial given, in t."""

    low: Root | None
    high: Root | None
    polynomials: tuple[flint.fmpq_poly, ...]


Evaluate = Callable[[Germ, list[Any]], tuple[Any, ...]]
"""Values of some functions at a germ t of the line; the list receives everything whose sign was asked for."""


def along(point: list[Any], direction: list[Any], t: Germ) -> list[Any]:
    """point + t · direction, as germs."""
    return [t * d + p for p, d in zip(point, direction, strict=True)]


def _simple_roots(factor: Any) -> list[Any]:
    """Isolating balls (acb) of an irreducible polynomial's roots; real ones have imaginary part 0 exactly."""
    return [root for root, _ in factor.complex_roots()]


def _roots(switches: list[Any], origin: Any) -> list[Root]:
    """All real roots, in t, of the polynomials that are not constant."""
    shift = flint.fmpq_poly([-origin, 1])
    factors: dict[str, flint.fmpz_poly] = {}
    for polynomial in {str(x): x for x in (s.polynomial for s in switches) if x.degree() > 0}.values():
        for factor, _ in polynomial(shift).numer().factor()[1]:
            factors[str(factor)] = factor
    return [
        Root(factor, root.real)
        for factor in factors.values()
        for root in _simple_roots(factor)
        if root.imag == 0
    ]


def _cell(evaluate: Evaluate, origin: Any) -> Cell:
    """The cell that begins at ``origin`` or holds it; no sign that was asked for changes inside it."""
    seen: list[Any] = []
    values = evaluate(Germ(flint.fmpq_poly([origin, 1])), seen)
    below, above = [], []
    for root in _roots(seen, origin):
        if root.ball > origin:
            above.append(root)
        elif root.ball < origin or root.factor(origin) == 0:
            below.append(root)
        else:
            raise ArithmeticError(f"{_BITS} bits do not order a root of {root.factor} and {origin}")
    shift = flint.fmpq_poly([-origin, 1])
    return Cell(
        max(below, key=_Ordered) if below else None,
        min(above, key=_Ordered) if above else None,
        tuple(Germ.of(value).polynomial(shift) for value in values),
    )


class _Ordered:
    """Order of roots that their balls decide."""

    def __init__(self, root: Root) -> None:
        self.ball = root.ball

    def __lt__(self, other: _Ordered) -> bool:
        return bool(self.ball < other.ball)

    def __gt__(self, other: _Ordered) -> bool:
        return bool(self.ball > other.ball)


def _beside(root: Root, exponent: int, *, right: bool) -> Any:
    """A rational of few digits, between 3/4 and 5/4 of 2**−exponent to the right or left of the root."""
    scale = 4 * 2**exponent
    nearest = (root.ball.mid().fmpq() * scale).floor()
    return flint.fmpq(nearest + (4 if right else -4), scale)


def _neighbour(evaluate: Evaluate, root: Root, *, right: bool) -> Cell:
    """The cell on the other side of ``root``: tried nearer and nearer until it reaches the root."""
    for exponent in range(2, _BITS // 2, 3):
        cell = _cell(evaluate, _beside(root, exponent, right=right))
        end = cell.low if right else cell.high
        if end is not None and end.same(root):
            return cell
    raise ArithmeticError(f"no cell beside the root {root.ball} of {root.factor}")


def cells(evaluate: Evaluate) -> list[Cell]:
    """All cells from −∞ to ∞; each shares its ends with its neighbours, so that none is left out.

    Raises:
        ArithmeticError: two breakpoints too near for balls of 256 bits.
    """
    with _precision(_BITS):
        found = [_cell(evaluate, flint.fmpq(0))]
        while (high := found[-1].high) is not None:
            found.append(_neighbour(evaluate, high, right=True))
        while (low := found[0].low) is not None:
            found.insert(0, _neighbour(evaluate, low, right=False))
    return found
