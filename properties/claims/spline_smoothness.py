"""Claims about how smooth the spline of ReLU attention is: continuous, with kinks, hardly ever C²."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.spline_check import Case, picture
from attnproof.properties.claims.spline_networks import (
    Activation,
    Attention,
    Encoder,
    line,
    on,
)
from attnproof.properties.claims.spline_pieces import UNKNOWN, Piece, contacts, decompose
from attnproof.properties.claims.splines import SOURCE, SUBJECT, SelfAttention, identity
from attnproof.properties.forms.base import Array, filled

__all__ = ["CLAIMS", "TruncatedPowers", "jumps", "powers", "smoothness"]


@dataclass(frozen=True)
class TruncatedPowers:
    """t³ + Σ cₖ relu(t − kₖ)³ of one token of width 1: a classical cubic spline with simple knots."""

    knots: tuple[flint.fmpq, ...]
    coefficients: tuple[flint.fmpq, ...]

    def __call__(self, x: Array, activation: Activation) -> Array:
        t = x[0, 0]
        rectified = activation.rectify(filled((len(self.knots),), [t - knot for knot in self.knots]))
        powers = [c * p**3 for c, p in zip(self.coefficients, rectified, strict=True)]
        return filled((1, 1), [sum(powers, t**3)])


def _t_and_one() -> tuple[Array, Array]:
    """Tokens (t, 1) of width 1."""
    return filled((2, 1), map(flint.fmpq, (0, 1))), filled((2, 1), map(flint.fmpq, (1, 0)))


def _attention_cases(lines: int) -> list[Case]:
    """The example by hand, and random lines of one, two and three layers."""
    one = identity()
    ones = SelfAttention(Attention(one, one, one))
    cases = [Case("tokens (t, 1), weights 1", ones, _t_and_one(), 3)]
    # The kink hides: t·relu(t·t) = t³.
    alone = tuple(entries[:1] for entries in _t_and_one())
    cases.append(Case("one token t, weights 1", ones, alone, 3))
    for t, seed in itertools.product((1, 2, 3), range(lines)):
        rng = np.random.default_rng([9, t, seed])
        network = Encoder.random(rng, 2, t, residual=True)
        cases.append(Case(f"{t} layers, line {seed + 1}", network, line(rng, 2, 2), 3**t))
    return cases


def classical() -> list[Case]:
    """A cubic spline with simple knots at −1, 0, 1/2 and 2."""
    knots = tuple(flint.fmpq(a, b) for a, b in ((-1, 1), (0, 1), (1, 2), (2, 1)))
    network = TruncatedPowers(knots, tuple(flint.fmpq(c) for c in (2, -3, 5, 1)))
    directions = (filled((1, 1), [flint.fmpq(0)]), filled((1, 1), [flint.fmpq(1)]))
    return [Case("truncated powers", network, directions, 3)]


def _by_hand(case: Case, left: Piece, right: Piece, least: int) -> str:
    """The first output whose derivatives of an order below ``least`` differ at a breakpoint."""
    root = left.right
    assert root is not None
    orders = contacts(left, right)
    output = next(i for i, order in enumerate(orders) if order is not None and order < least)
    order = orders[output] or 0
    pieces = [left.values[output], right.values[output]]
    middle = (root.low + root.high) / 2
    slopes = pieces
    for _ in range(order):
        slopes = [p.derivative() for p in slopes]
    at = [p(middle) for p in slopes]
    where = f"t = {middle}" if root.low == root.high else f"t ≈ {float(root):.9g}"
    return (
        f"{case.name}, x for t: output {output + 1} is {pieces[0]} left of {where}, {pieces[1]} right.\n"
        f"At {where} the derivatives of order {order} are {at[0]} and {at[1]}; all lower ones are equal."
    )


_KINK = """n = 2 tokens x = (t, 1) of width d = 1, W_Q = W_K = W_V = 1, no biases. Row 1 of ReLU attention is
t·relu(t·t) + 1·relu(t·1) = t³ + relu(t): t³ for t < 0 and t³ + t for t > 0. Slope 0 left, 1 right.
"""


def smoothness(cases: Sequence[Case], derivatives: int = 2) -> ClaimFinding:
    """Are there ``derivatives`` continuous derivatives at every breakpoint of the cases?"""
    rows, example, first = [], "", ""
    picture_of: list[Piece] = []
    for case in cases:
        pieces = decompose(case.network, case.directions)
        picture_of = picture_of or pieces
        orders = [contacts(a, b) for a, b in itertools.pairwise(pieces)]
        least = [min((o for o in found if o is not None), default=None) for found in orders]
        short = [i for i, o in enumerate(least) if o is not None and o <= derivatives]
        if short and not example:
            first = case.name
            example = _by_hand(case, pieces[short[0]], pieces[short[0] + 1], derivatives + 1)
        seen = [o for o in least if o is not None]
        rows.append(
            (case.name, len(least), least.count(0), least.count(1), least.count(2), sum(o > 2 for o in seen))
        )
    found = sum(sum(row[2:]) for row in rows)
    kinks = sum(row[3] for row in rows)
    titles = ("case", "breakpoints", "jumps", "C⁰ but not C¹", "C¹ but not C²", "C² or smoother")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"{len(cases)} lines, {found} breakpoints at which the function changes its polynomial: "
        f"{sum(row[2] for row in rows)} jumps, {kinks} kinks (first derivative jumps), "
        f"{sum(row[4] for row in rows)} that are C¹ only, {sum(row[5] for row in rows)} that are C² "
        "(divisibility of the difference of pieces by powers of the breakpoint's minimal polynomial)"
        + (f"; the first that is not C^{derivatives}: {first}" if example else ""),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        plots=picture(picture_of, cases[0].name),
        counterexample=(_KINK if first.startswith("tokens (t, 1)") else "") + example if example else "",
        seed=9,
    )


@dataclass(frozen=True)
class _Jump:
    """A row of outputs at a breakpoint.

    Attributes:
        predicted: whether its pieces differ by the predicted polynomials.
        scores: how many of the row's scores change sign.
        contact: the least order of contact of the row's outputs; None if none of them changes.
        values_vanish: whether v_j is 0 at the breakpoint for each of these scores.
    """

    predicted: bool
    scores: int
    contact: int | None
    values_vanish: bool


def _jumps(attention: Attention, directions: tuple[Array, ...], power: int, claimed: int) -> list[_Jump]:
    """Each row's difference of pieces against ± Σ_j s_ij^claimed v_j over its scores that change sign."""
    pieces = decompose(SelfAttention(attention), directions, power)
    x = on(directions, UNKNOWN)
    scores, values = attention.scores(x, x), attention.value(x)
    out = []
    for left, right in itertools.pairwise(pieces):
        assert left.right is not None
        minimal = left.right.polynomial
        orders = np.array(contacts(left, right), dtype=object).reshape(values.shape)
        actual = filled(values.shape, [b - a for a, b in zip(left.values, right.values, strict=True)])
        for row, row_orders, row_actual in zip(scores, orders, actual, strict=True):
            predicted = filled((values.shape[1],), [flint.fmpq_poly(0)] * values.shape[1])
            changed = [j for j, s in enumerate(row) if (s(left.point) > 0) != (s(right.point) > 0)]
            for j in changed:
                change = row[j] ** claimed if row[j](right.point) > 0 else -(row[j] ** claimed)
                predicted += filled(predicted.shape, [change * v for v in values[j]])
            vanish = all((v % minimal).degree() < 0 for j in changed for v in values[j])
            contact = min((order for order in row_orders if order is not None), default=None)
            out.append(_Jump(list(row_actual) == list(predicted), len(changed), contact, vanish))
    return out


def jumps(lines: int, power: int = 1, claimed: int = 1) -> ClaimFinding:
    """SPL-6b: random maps, and maps of width 1 whose values vanish with the keys.

    Args:
        lines: of each sort.
        power: of the rectified scores.
        claimed: power in the predicted difference, and the order of contact where no value vanishes.
    """
    found: dict[str, list[_Jump]] = {}
    for seed in range(lines):
        rng = np.random.default_rng([10, seed])
        for sort, n, d in (("random maps", 3, 2), ("width 1", 3, 1), ("width 1, V = K", 3, 1)):
            attention = Attention.random(rng, d)
            if sort.endswith("V = K"):
                attention = Attention(attention.query, attention.key, attention.key)
            found.setdefault(sort, []).extend(_jumps(attention, line(rng, n, d), power, claimed))
    every = [jump for sort in found.values() for jump in sort]
    single = [jump for jump in every if jump.scores == 1 and jump.contact is not None]
    regular = [jump for jump in single if not jump.values_vanish]
    vanishing = [jump for jump in single if jump.values_vanish]
    kinks = sum(jump.contact == claimed for jump in regular)
    smoother = sum(jump.contact == claimed + 1 for jump in vanishing)
    others = sum(not jump.predicted for jump in every)
    good = others == 0 and kinks == len(regular) and smoother == len(vanishing) and bool(vanishing)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{len(every)} rows at breakpoints: the pieces differ by the predicted polynomials in "
        f"{len(every) - others}. Of {len(regular)} in which one score changes sign and its value is not "
        f"0, {kinks} have exactly {claimed - 1} continuous derivatives; of {len(vanishing)} in which its "
        f"value is 0 there, {smoother} have exactly {claimed}",
        table={
            "maps": list(found),
            "rows at breakpoints": [len(sort) for sort in found.values()],
            "as predicted": [sum(jump.predicted for jump in sort) for sort in found.values()],
            "one score changes sign": [sum(jump.scores == 1 for jump in sort) for sort in found.values()],
            "several do": [sum(jump.scores > 1 for jump in sort) for sort in found.values()],
            "its value is 0": [
                sum(jump.scores == 1 and jump.values_vanish for jump in sort) for sort in found.values()
            ],
        },
        counterexample=""
        if good
        else f"power {power}, predicted with {claimed}: {others} of {len(every)} differences are others; "
        f"{len(regular) - kinks} of {len(regular)} rows have another smoothness",
        seed=10,
    )


def powers(highest: int, lines: int, *, shift: int = 0) -> ClaimFinding:
    """SPL-6c: relu^p for p = 1 … ``highest``; p − 1 + shift continuous derivatives are claimed."""
    rows = []
    for power in range(1, highest + 1):
        found: list[_Jump] = []
        degree = -1
        for seed in range(lines):
            rng = np.random.default_rng([11, seed])
            attention, directions = Attention.random(rng, 2), line(rng, 2, 2)
            pieces = decompose(SelfAttention(attention), directions, power)
            degree = max(degree, *(piece.degree for piece in pieces))
            found += _jumps(attention, directions, power, power)
        contact = [jump.contact for jump in found if jump.scores == 1 and not jump.values_vanish]
        right = sum(order == power + shift for order in contact)
        rows.append((power, degree, 2 * power + 1, len(contact), right, power - 1 + shift))
    good = all(row[1] == row[2] and row[3] == row[4] for row in rows)
    titles = ("p", "degree", "2p + 1", "kinks", "as smooth as claimed", "continuous derivatives claimed")
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence="; ".join(
            f"p = {row[0]}: degree {row[1]}, exactly {row[5]} continuous derivatives at {row[4]} of "
            f"{row[3]} breakpoints of a row at which one score changes sign"
            for row in rows
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="" if good else f"p = {rows[0][0]}: {rows[0][4]} of {rows[0][3]} breakpoints",
        seed=11,
    )


CLAIMS: Final = (
    Claim(
        id="SPL-6a",
        subject=SUBJECT,
        title="the spline is generally C²",
        statement="The spline that ReLU attention is, like splines generally, is just C²: it has two "
        "continuous derivatives where its pieces meet.",
        source=SOURCE + "abstract, version 1",
        kind="exact",
        check=lambda lab: smoothness(_attention_cases(lab.choose(2, 6))),
        control=lambda lab: smoothness(classical()),
        covers=("SPL-6", "SEED3-6"),
    ),
    Claim(
        id="SPL-6b",
        subject=SUBJECT,
        title="the spline is C⁰, with kinks of known size",
        statement="ReLU attention is continuous and generally not C¹: where of a row's scores s_ij alone "
        "changes sign on a line, the pieces of row i differ by ±s_ij·v_j, so that its derivative jumps "
        "by |s_ij'|·v_j; it is C¹, and not C², where v_j has a zero at the same point.",
        source="derived; corrects the abstract of arXiv 2408.09624, version 1",
        kind="exact",
        check=lambda lab: jumps(lab.choose(6, 40)),
        control=lambda lab: jumps(2, power=2),
    ),
    Claim(
        id="SPL-6c",
        subject=SUBJECT,
        title="relu^p attention is C^(p − 1), of degree 2p + 1",
        statement="With relu(s)^p for weights the spline has degree 2p + 1 and exactly p − 1 continuous "
        "derivatives at a breakpoint where v_j is not 0: C² asks for p = 3, and has degree 7.",
        source="derived; squared ReLU (p = 2) is So et al., arXiv 2109.08668",
        kind="exact",
        check=lambda lab: powers(3, lab.choose(2, 10)),
        control=lambda lab: powers(2, 1, shift=1),
    ),
)
