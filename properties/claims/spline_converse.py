"""Claims about splines as ReLU encoders: products, maxima, a compiler from max–min polynomials, the way back.

Source of all: Lai, Lim and Liu, arXiv 2408.09624, section 2.4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory, Plot
from attnproof.properties.forms.line_cells import Cell, along, cells
from attnproof.properties.forms.numbers import rationals
from attnproof.properties.forms.relu_encoder import (
    Expression,
    compiled,
    maximum,
    minimum,
    relu,
    softmax,
    variables,
)

__all__ = [
    "CLAIMS",
    "compiler",
    "examples",
    "head_as_lattice",
    "primitives",
    "random_spline",
    "splines_of_one_variable",
]

_SOURCE: Final = "Lai, Lim, Liu, arXiv 2408.09624, section 2.4"
_HALF: Final = flint.fmpq(1, 2)
Polynomial = flint.fmpq_mpoly
Identity = tuple[str, Polynomial, Callable[[Callable[[Polynomial], Polynomial]], Polynomial], Polynomial]


def _identities(negative_head: bool) -> list[Identity]:
    """Name, argument of ReLU, the right side in terms of ReLU, the left side (the same on both cells)."""
    context = flint.fmpq_mpoly_ctx.get(("v", "q", "k", "x", "y"), "lex")
    v, q, k, x, y = context.gens()
    other = 1 if negative_head else 0
    quarter = flint.fmpq(1, 4)

    def square(z: Polynomial, r: Callable[[Polynomial], Polynomial]) -> Polynomial:
        return z * r(z) - other * z * r(-z)

    return [
        ("vqk = v ReLU(qk) − v ReLU(−qk)", q * k, lambda r: v * r(q * k) - other * v * r(-q * k), v * q * k),
        ("z² = z ReLU(z) + (−z) ReLU(−z)", x, lambda r: square(x, r), x * x),
        ("(x + y)² by the same head", x + y, lambda r: square(x + y, r), (x + y) * (x + y)),
        ("(x − y)² by the same head", x - y, lambda r: square(x - y, r), (x - y) * (x - y)),
        ("xy = ((x + y)² − (x − y)²)/4", x, lambda r: quarter * ((x + y) ** 2 - (x - y) ** 2), x * y),
        ("x = ReLU(x) − ReLU(−x)", x, lambda r: r(x) - other * r(-x), x),
    ]


def _relu_on(switch: Polynomial, sign: int) -> Callable[[Polynomial], Polynomial]:
    """ReLU of ±switch on the cell where the switch has this sign."""

    def of(z: Polynomial) -> Polynomial:
        if z == switch:
            return z if sign > 0 else 0 * z
        if z == -switch:
            return z if sign < 0 else 0 * z
        raise ValueError(f"{z} is not the switch {switch}")

    return of


def primitives(*, negative_head: bool = True) -> ClaimFinding:
    """Do products and maxima come out of ReLU attention and feed-forward units, as polynomials on every cell?

    Args:
        negative_head: with the second head, of the opposite score.
    """
    rows = [
        (name, "≥ 0" if sign > 0 else "≤ 0", right(_relu_on(switch, sign)) == left)
        for name, switch, right, left in _identities(negative_head)
        for sign in (1, -1)
    ]
    context = flint.fmpq_mpoly_ctx.get(("a", "b"), "lex")
    a, b = context.gens()
    for sign, larger in ((1, b), (-1, a)):
        cell = "≥ 0" if sign > 0 else "≤ 0"
        rows.append(("max(a, b) = a + ReLU(b − a)", cell, a + _relu_on(b - a, sign)(b - a) == larger))
    wrong = [f"{name} where the argument is {cell}" for name, cell, same in rows if not same]
    titles = ("identity", "argument of ReLU", "equal as polynomials")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(rows)} polynomial identities over the rationals, one for each cell of ReLU's argument"
        + (f"; wrong: {'; '.join(wrong)}" if wrong else ", all equal"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="v = 1, q = 1, k = −1: one head gives ReLU(qk) = 0, the product is −1"
        if wrong
        else "",
    )


def examples(extra: int = 2) -> list[tuple[str, Expression, int]]:
    """Name, max–min polynomial and number of variables; ``extra`` random ones of each number of variables."""
    (t,) = variables(1)
    x, y = variables(2)
    s = t * t - 2
    rng = np.random.default_rng(31)

    def polynomial(of: Sequence[Expression]) -> Expression:
        """Three random terms of degree 0, 1 and up to 4."""
        total: Any = flint.fmpq(int(rng.integers(-9, 10)), 4)
        for degree in (1, int(rng.integers(2, 5))):
            term = flint.fmpq(int(rng.integers(1, 7)), 3) * of[int(rng.integers(len(of)))]
            for _ in range(degree - 1):
                term = term * of[int(rng.integers(len(of)))]
            total = total + term if rng.integers(2) else total - term
        return total  # type: ignore[no-any-return]

    drawn = [
        (
            f"random max of two mins of {3 - len(of) // 2}, {len(of)} variables",
            maximum(*(minimum(*(polynomial(of) for _ in range(3 - len(of) // 2))) for _ in range(2))),
            len(of),
        )
        for of in ((t,), (x, y))
        for _ in range(extra)
    ]
    return [
        ("|t|", maximum(t, -t), 1),
        ("t² − 2 from √2 on, else 0", maximum(0, minimum(s, t * (1 + s * s))), 1),
        ("max(t³ − t, min(t, 1 − t²))", maximum(t * t * t - t, minimum(t, 1 - t * t)), 1),
        ("max(x² − y, 0)", maximum(x * x - y, 0), 2),
        ("ReLU(x) ReLU(y) as max(0, min(xy, x(1 + y²)))", maximum(0, minimum(x * y, x * (1 + y * y))), 2),
        (
            "max(min(xy, 1 − x²), y³ − x)",
            maximum(minimum(x * y, 1 - x * x), y * y * y - x),
            2,
        ),
        *drawn,
    ]


def _equal_along(encoder: Any, expression: Expression, start: list[Any], direction: list[Any]) -> list[Cell]:
    """Cells on which encoder and expression are polynomials: [encoder's, expression's] each."""
    return cells(
        lambda t, seen: (
            encoder(point := along(start, direction, t), seen=seen),
            expression.value(point, seen),
        )
    )


def _lines(count: int, variables: int) -> list[tuple[list[Any], list[Any]]]:
    """The whole line of one variable; random rational lines of two."""
    if variables == 1:
        return [([flint.fmpq(0)], [flint.fmpq(1)])]
    rng = np.random.default_rng(32)
    return [(list(rationals(rng, 2)), list(rationals(rng, 2))) for _ in range(count)]


def _differ(a: Any, b: Any) -> bool:
    return not a.overlaps(flint.arb(b)) if isinstance(a, flint.arb) else bool(a != b)


def compiler(
    points: int = 12, lines: int = 1, extra: int = 1, weights: Callable[[Any], Any] = relu
) -> ClaimFinding:
    """Does the compiled encoder equal the max–min polynomial, at points and as polynomials along lines?

    Args:
        points: random rational points of every example.
        lines: random lines of every example of two variables (one variable: its whole line, once).
        extra: random examples of each number of variables.
        weights: attention weights; lines are walked for ReLU's only, which keep polynomials.
    """
    rng = np.random.default_rng(33)
    rows, wrong = [], ""
    for name, expression, count in examples(extra):
        encoder = compiled(expression, count)
        at = [list(rationals(rng, count, low=-30, high=30)) for _ in range(points)]
        apart = [p for p in at if _differ(encoder(p, weights), expression.value(p))]
        found: list[Cell] = []
        if weights is relu:
            for start, direction in _lines(lines, count):
                found += _equal_along(encoder, expression, start, direction)
        unequal = sum(cell.polynomials[0] != cell.polynomials[1] for cell in found)
        if (apart or unequal) and not wrong:
            where = ", ".join(map(str, apart[0])) if apart else "a cell of a line"
            wrong = f"{name} at ({where})"
            if apart:
                wrong += f": {encoder(apart[0], weights)}, not {expression.value(apart[0])}"
        rows.append((name, count, *encoder.size, points - len(apart), len(found), len(found) - unequal))
    titles = ("function", "variables", "blocks", "heads", "hidden units", "points equal", "cells", "equal")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(rows)} max–min polynomials compiled; {points} rational points each (seed 33), and "
        f"{sum(row[6] for row in rows)} cells of lines (one variable: all of ℝ; two: random rational lines, "
        "seed 32), the cells adjacent from −∞ to ∞ with exact algebraic ends: "
        + (
            f"differs: {wrong}"
            if wrong
            else "equal as polynomials on every cell. For all others it holds by "
            "induction over the nodes, as every node is computed by an identity of SPL-8a"
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=wrong,
        seed=33,
    )


Spline = tuple[list[Any], list[flint.fmpq_poly]]
"""Breakpoints in ascending order, and one piece more than breakpoints."""


def random_spline(seed: int, breakpoints: int, degree: int, smoothness: int = 0) -> Spline:
    """Continuous, with derivatives up to ``smoothness`` continuous too, of random rational numbers."""
    rng = np.random.default_rng(seed)
    steps = [flint.fmpq(int(n), 6) for n in rng.integers(1, 13, breakpoints)]
    breaks = [step - 4 for step in itertools.accumulate(steps)]
    pieces = [flint.fmpq_poly(list(rationals(rng, degree + 1)))]
    for b in breaks:
        factor = flint.fmpq_poly([-b, 1]) ** (smoothness + 1)
        pieces.append(pieces[-1] + factor * flint.fmpq_poly(list(rationals(rng, degree - smoothness))))
    return breaks, pieces


def _truncated(spline: Spline) -> Expression | None:
    """f₁ + Σ_k q_k(t) ReLU(t − b_k) with q_k = (f_{k+1} − f_k)/(t − b_k); None where that division fails."""
    (t,) = variables(1)

    def horner(polynomial: flint.fmpq_poly) -> Expression:
        total: Any = 0 * t
        for c in reversed(polynomial.coeffs()):
            total = total * t + c
        return total  # type: ignore[no-any-return]

    breaks, pieces = spline
    total = horner(pieces[0])
    for b, left, right in zip(breaks, pieces, pieces[1:], strict=False):
        quotient, rest = divmod(right - left, flint.fmpq_poly([-b, 1]))
        if not rest.is_zero():
            return None
        total = total + horner(quotient) * maximum(t - b, 0)
    return total


def _compare_spline(spline: Spline, expression: Expression) -> tuple[int, int]:
    """Cells on the whole line, and on how many the encoder is the spline's piece."""
    encoder = compiled(expression, 1)
    breaks, pieces = spline

    def both(t: Any, seen: list[Any]) -> tuple[Any, Any]:
        seen.extend(t - b for b in breaks)
        origin = t.polynomial[0]
        piece = pieces[sum(b <= origin for b in breaks)]
        return encoder([t], seen=seen), type(t)(piece(t.polynomial))

    found = cells(both)
    return len(found), sum(cell.polynomials[0] == cell.polynomials[1] for cell in found)


def _picture() -> Plot:
    """A cubic spline with continuous second derivative, as its encoder computes it, coloured by piece."""
    breaks, pieces = random_spline(1, 4, 3, 2)
    expression = _truncated((breaks, pieces))
    assert expression is not None
    encoder = compiled(expression, 1)
    at = [breaks[0] - 1 + flint.fmpq(i, 80) * (breaks[-1] - breaks[0] + 2) for i in range(81)]
    values = [encoder([t]) for t in at]
    columns: dict[str, list[Any]] = {
        "t": [int(t.p) / int(t.q) for t in at],
        "output": [int(y.p) / int(y.q) for y in values],
        "piece": [str(1 + sum(bool(b <= t) for b in breaks)) for t in at],
    }
    return Plot("a spline as its encoder computes it", "line", columns, "t", "output", "piece")


def splines_of_one_variable(count: int = 3, *, jump: int = 0) -> ClaimFinding:
    """Is every continuous spline of one variable with rational breakpoints an encoder's output, on all of ℝ?

    Args:
        count: random splines of every kind.
        jump: added to the last piece.
    """
    kinds = ((3, 2, 0), (4, 3, 2), (2, 5, 1))
    rows, wrong = [], ""
    for seed, (breakpoints, degree, smoothness) in itertools.product(range(count), kinds):
        breaks, pieces = random_spline(seed, breakpoints, degree, smoothness)
        pieces = [*pieces[:-1], pieces[-1] + jump]
        expression = _truncated((breaks, pieces))
        if expression is None:
            rows.append((seed, degree, f"C^{smoothness}, with a jump", 0, 0, 0))
            at = breaks[-1]
            wrong = wrong or f"at t = {at}: {pieces[-2](at)} from the left, {pieces[-1](at)} from the right"
            continue
        found, equal = _compare_spline((breaks, pieces), expression)
        if found != equal:
            wrong = wrong or f"seed {seed}, degree {degree}: {found - equal} cells differ"
        rows.append((seed, degree, f"C^{smoothness}", compiled(expression, 1).size[0], found, equal))
    titles = ("seed", "degree", "smoothness", "blocks", "cells", "equal")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(rows)} random splines (seeds 0 to {count - 1}), written as f₁ + Σ q_k ReLU(t − b_k) "
        "with "
        f"the exact quotients q_k = (f_(k+1) − f_k)/(t − b_k), compiled and compared on every cell of ℝ: "
        + (wrong or f"{sum(row[5] for row in rows)} cells, all equal as polynomials"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        plots=(_picture(),),
        counterexample=wrong,
        seed=0,
    )


def head_as_lattice(lines: int = 6, *, bound: Any = 1) -> ClaimFinding:
    """Is v ReLU(s) the difference of max(0, min(±vs, ±v(c + s²))) for polynomials v and s?

    Args:
        lines: random rational lines through (v, q, k), on which both sides are compared cell by cell.
        bound: c; v(c + s²) must be at least vs where v > 0, so c ≥ 1/4 is what it takes.
    """
    context = flint.fmpq_mpoly_ctx.get(("v", "s"), "lex")
    v, s = context.gens()
    rest = bound - _HALF * _HALF
    certificate = v * (bound + s * s) - v * s == v * ((s - _HALF) * (s - _HALF) + rest)
    sound = certificate and rest >= 0
    V, Q, K = variables(3)
    score = Q * K
    cap = V * (bound + score * score)
    lattice = maximum(0, minimum(V * score, cap)) - maximum(0, minimum(-(V * score), -cap))
    rng = np.random.default_rng(34)
    found: list[Cell] = []
    for _ in range(lines):
        start, direction = list(rationals(rng, 3)), list(rationals(rng, 3))
        found += cells(
            lambda t, seen, start=start, direction=direction: (  # type: ignore[misc]
                _head(along(start, direction, t), seen),
                lattice.value(along(start, direction, t), seen),
            )
        )
    unequal = sum(cell.polynomials[0] != cell.polynomials[1] for cell in found)
    # v = 1, s = ½: the cap is c + ¼ and the head's output ½.
    failing = (
        "" if sound else f"v = 1, s = 1/2: v ReLU(s) = 1/2, the minimum takes c + s² = {bound + _HALF**2}"
    )
    return ClaimFinding(
        status="HOLDS" if sound and not unequal else "REFUTED",
        evidence=f"v(c + s²) − vs = v((s − ½)² + c − ¼) as polynomials: {certificate}, with c − ¼ = {rest}, "
        "so "
        "the minimum is vs where v, s > 0, and ≤ 0 where either is not; degree 3 of the head becomes 5. "
        f"{len(found)} cells of {lines} random lines (seed 34): {unequal} differ",
        table={"line cells": [len(found)], "equal": [len(found) - unequal]},
        counterexample=failing,
        seed=34,
    )


def _head(point: list[Any], seen: list[Any]) -> Any:
    v, q, k = point
    seen.append(q * k)
    weight = relu(np.array([q * k], dtype=object))[0]
    return v * weight


def _compiler(lab: Laboratory) -> ClaimFinding:
    return compiler(*lab.choose((12, 1, 1), (40, 4, 6), (200, 20, 30)))


CLAIMS: Final = (
    Claim(
        id="SPL-8a",
        subject="splines",
        title="products and maxima by ReLU attention",
        statement="Two ReLU heads of opposite scores give vqk = v ReLU(qk) − v ReLU(−qk), hence squares and "
        "products; a feed-forward unit gives max(a, b) = a + ReLU(b − a): the outputs of ReLU encoders are "
        "closed under sums, products and maxima.",
        source=_SOURCE,
        kind="exact",
        check=lambda lab: primitives(),
        control=lambda lab: primitives(negative_head=False),
    ),
    Claim(
        id="SPL-8b",
        subject="splines",
        title="every max–min polynomial is a ReLU encoder",
        statement="Every function max_i min_j p_ij of polynomials is the output of an encoder of ReLU "
        "attention "
        "and ReLU feed-forward layers, exactly: compiled here from products and maxima, one token for each "
        "variable.",
        source=_SOURCE + "; Theorem 3.8 as cited by the manuscript of Lai, Lim and Ren (github "
        "7pocheR/Pierce-Birkhoff)",
        kind="exact",
        check=_compiler,
        control=lambda lab: compiler(3, 0, 0, softmax),
    ),
    Claim(
        id="SPL-8c",
        subject="splines",
        title="every spline of one variable is a ReLU encoder",
        statement="A continuous piecewise polynomial function of one variable with breakpoints b_k is f₁(t) "
        "+ "
        "Σ_k q_k(t) ReLU(t − b_k) with polynomials q_k, hence a ReLU encoder; in one variable the converse "
        "needs "
        "no conjecture.",
        source="derived: f_(k+1) − f_k vanishes at b_k; the case n = 1 of Pierce–Birkhoff (Mahé for n ≤ 2); "
        + _SOURCE,
        kind="exact",
        check=lambda lab: splines_of_one_variable(lab.choose(1, 6, 30)),
        control=lambda lab: splines_of_one_variable(1, jump=1),
    ),
    Claim(
        id="SPL-8d",
        subject="splines",
        title="a ReLU head is a max–min polynomial",
        statement="Conversely v ReLU(s) = max(0, min(vs, v(1 + s²))) − max(0, min(−vs, −v(1 + s²))) for any "
        "real v and s = qk: a ReLU head is a difference of max–min polynomials, of degree 5 in place of 3.",
        source="derived; the statement that encoders are max-definable: " + _SOURCE,
        kind="exact",
        check=lambda lab: head_as_lattice(lab.choose(4, 20, 80)),
        control=lambda lab: head_as_lattice(1, bound=flint.fmpq(1, 8)),
    ),
)
