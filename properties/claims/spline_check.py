"""Is a network on rational lines a spline of a given degree? Its pieces against exact evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import ClaimFinding, Plot
from attnproof.properties.claims.spline_networks import RELU, Activation, Network
from attnproof.properties.claims.spline_pieces import (
    Piece,
    contacts,
    decompose,
    evaluations,
    inside,
    interpolated,
    newton,
    order_of_contact,
)
from attnproof.properties.forms.base import Array

__all__ = ["BITS", "Case", "Examined", "examine", "picture", "splines"]

BITS = 512
"""Of the balls in which softmax is interpolated: differences of order 4 at points 2^-20 apart stay sharp."""


@dataclass(frozen=True)
class Case:
    """A network on a line.

    Attributes:
        name: of the row in tables.
        network: evaluated with ReLU, its pieces are found.
        directions: X₀ and X₁ of the line X₀ + tX₁.
        degree: that no piece is claimed to exceed, and some piece of some case of this degree to have.
        evaluated: what is interpolated; the network itself if None.
    """

    name: str
    network: Network
    directions: tuple[Array, ...]
    degree: int
    evaluated: Network | None = None


@dataclass(frozen=True)
class Examined:
    """What the pieces of a case are.

    Attributes:
        pieces: from left to right.
        agree: for each, whether the interpolation is that polynomial and no larger in degree than claimed;
            None where balls leave it open.
        contacts: at each breakpoint, how often its minimal polynomial divides the difference of the pieces.
        disagreement: the first one, in words.
    """

    case: Case
    pieces: list[Piece]
    agree: list[bool | None]
    contacts: list[int | None]
    disagreement: str

    @property
    def degree(self) -> int:
        """The largest of a piece."""
        return max(piece.degree for piece in self.pieces)

    @property
    def problem(self) -> str:
        """Why the case is no spline of at most its degree; empty if it is."""
        if self.disagreement:
            return self.disagreement
        if 0 in self.contacts:
            return f"{self.case.name}: a jump at t ≈ {_end(self.pieces[self.contacts.index(0)]):.6g}"
        return ""


def _end(piece: Piece) -> float:
    return float("inf") if piece.right is None else float(piece.right)


def _agreement(case: Case, piece: Piece, activation: Activation) -> tuple[bool | None, str]:
    """Interpolates with one point more than the degree needs: the last divided difference must be 0."""
    points = inside(piece, case.degree + 2)
    network = case.network if case.evaluated is None else case.evaluated
    verdict: bool | None = True
    for output, (values, expected) in enumerate(
        zip(evaluations(network, case.directions, points, activation), piece.values, strict=True)
    ):
        where = (
            f"{case.name}, output {output + 1}, on the cell from t ≈ "
            f"{'−∞' if piece.left is None else format(float(piece.left), '.6g')} to "
            f"{'∞' if piece.right is None else format(float(piece.right), '.6g')}"
        )
        if all(isinstance(value, flint.fmpq) for value in values):
            if interpolated(points, values) != expected or expected.degree() > case.degree:
                return False, f"{where}: the interpolation at {len(points)} points is another polynomial"
            continue
        last = newton(points, values)[-1]
        if not last.contains(0):
            return False, (
                f"{where}: the divided difference of order {len(points) - 1} at t = {points[0]}, …, "
                f"{points[-1]} is {last.str(6)}, and 0 for a polynomial of degree {case.degree}"
            )
        verdict = None
    return verdict, ""


def examine(case: Case, activation: Activation = RELU) -> Examined:
    """Finds the pieces, interpolates what ``activation`` gives on each, compares neighbours."""
    pieces = decompose(case.network, case.directions)
    with _precision(BITS):
        found = [_agreement(case, piece, activation) for piece in pieces]
    contacts = [order_of_contact(a, b) for a, b in itertools.pairwise(pieces)]
    first = next((words for _, words in found if words), "")
    return Examined(case, pieces, [agree for agree, _ in found], contacts, first)


def _window(pieces: Sequence[Piece]) -> tuple[float, float]:
    """Where the middle four fifths of the breakpoints lie, and a little more."""
    ends = [_end(piece) for piece in pieces[:-1]]
    low, high = (float(np.quantile(ends, share)) for share in (0.1, 0.9)) if ends else (-1.0, 1.0)
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin


def _at(piece: Piece, x: float, output: int) -> float:
    value = piece.values[output](flint.fmpq(round(x * 2**20), 2**20))
    return int(value.p) / int(value.q)


def picture(pieces: Sequence[Piece], name: str, output: int = 0, points: int = 300) -> tuple[Plot, ...]:
    """One output along the middle of the line, coloured by piece, and its breakpoints by smoothness."""
    ends = [_end(piece) for piece in pieces[:-1]]
    low, high = _window(pieces)
    t = np.linspace(low, high, points).tolist()
    cells = [int(np.searchsorted(ends, x)) for x in t]
    y = [_at(pieces[cell], x, output) for cell, x in zip(cells, t, strict=True)]
    columns = {"t": t, "output": y, "piece": [cell + 1 for cell in cells]}
    of = f"{name}: output {output + 1}"
    plots = [Plot(f"{of} on a line, by piece", "scatter", columns, "t", "output", "piece")]
    found = [
        (end, _at(left, end, output), order - 1)
        for end, (left, right) in zip(ends, itertools.pairwise(pieces), strict=True)
        if low <= end <= high and (order := contacts(left, right)[output]) is not None
    ][:points]
    if found:
        smooth = "continuous derivatives"
        titles = ("t", "output", smooth)
        columns = {title: [row[i] for row in found] for i, title in enumerate(titles)}
        plots.append(Plot(f"{of}, its breakpoints", "scatter", columns, "t", "output", smooth))
    return tuple(plots)


def _attained(found: Sequence[Examined]) -> str:
    """How many lines reach the degree claimed for them."""
    words = []
    for degree in sorted({one.case.degree for one in found}):
        lines = [one.degree == degree for one in found if one.case.degree == degree]
        words.append(f"{degree} attained on {sum(lines)} of {len(lines)} lines")
    return ", ".join(words)


def splines(
    cases: Sequence[Case],
    activation: Activation = RELU,
    *,
    example: str = "",
    seed: int | None = None,
    proof: str = "",
) -> ClaimFinding:
    """Is every case a continuous piecewise polynomial on its line, of a degree at most the claimed one?

    And does a case attain each degree claimed? Not all need to: on some lines scores are negative throughout.

    Args:
        cases: networks on lines.
        activation: what is interpolated on the cells of ReLU.
        example: a counterexample to be redone by hand, if one smaller than the search's is known.
        seed: of the cases.
        proof: why it is so on all lines and for all weights, told where it is so on these.
    """
    found = [examine(case, activation) for case in cases]
    problems = [one.problem for one in found if one.problem]
    reached: dict[int, int] = {}
    for one in found:
        reached[one.case.degree] = max(reached.get(one.case.degree, -1), one.degree)
    problems += [
        f"degree {claimed} is claimed, and {largest} the largest"
        for claimed, largest in reached.items()
        if largest != claimed
    ]
    undecided = any(None in one.agree for one in found)
    plain = activation is RELU and all(case.evaluated is None for case in cases)
    breakpoints = sum(len(one.contacts) for one in found)
    return ClaimFinding(
        status="REFUTED" if problems else "OPEN" if undecided else "HOLDS",
        evidence=f"{len(cases)} rational lines, {sum(len(one.pieces) for one in found)} cells: "
        f"{sum(agree is True for one in found for agree in one.agree)} interpolations of exact "
        "evaluations equal the cell's polynomial; "
        f"{sum(contact != 0 for one in found for contact in one.contacts)} of {breakpoints} breakpoints "
        "without a jump (the breakpoint's minimal polynomial divides the difference of the pieces); "
        f"degree {_attained(found)}"
        + ("" if plain else " (cells, breakpoints and degrees of the network with ReLU and nothing after it)")
        + (f". Not so in {len(problems)} places, the first: {problems[0]}" if problems else "")
        + (f". For all inputs: {proof}" if proof and not problems and not undecided else ""),
        table={
            "case": [one.case.name for one in found],
            "degree claimed": [one.case.degree for one in found],
            "largest degree": [one.degree for one in found],
            "smallest degree": [min(max(piece.degree, 0) for piece in one.pieces) for one in found],
            "cells": [len(one.pieces) for one in found],
            "pieces equal to the interpolation": [sum(a is True for a in one.agree) for one in found],
            "irrational breakpoints": [
                sum(p.right is not None and len(p.right.coefficients) > 2 for p in one.pieces)
                for one in found
            ],
            "breakpoints with a jump": [one.contacts.count(0) for one in found],
        },
        # The pieces are those of the network with ReLU: of anything else there is nothing to draw.
        plots=picture(found[0].pieces, found[0].case.name) if plain else (),
        counterexample=(example or problems[0]) if problems else "",
        seed=seed,
    )
