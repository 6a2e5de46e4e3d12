"""The worked example of the first source article: attention of three tokens of width 2, without scaling.

The article sets Q, K, V, forms S = Q·Kᵀ, assumes a matrix P where softmax(S) belongs, and prints O = P·V.
Both steps are checked: P against a certified softmax, O against P·V in exact rationals. The right output is
computed over the rational functions of e.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import flint
import torch

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.oracle import reference

__all__ = [
    "ASSUMED_P",
    "CLAIMS",
    "PRINTED_O",
    "K",
    "Q",
    "V",
    "certified_weights",
    "check_output",
    "check_weights",
    "exact_weights",
    "right_output",
    "scores",
]

Matrix = Sequence[Sequence[Fraction]]


def _rational(rows: Sequence[Sequence[str | int]]) -> list[list[Fraction]]:
    return [[Fraction(entry) for entry in row] for row in rows]


Q = _rational([[1, 0], [0, 1], [1, 1]])
K = _rational([[1, 0], [1, 1], [0, 1]])
V = _rational([[1, 2], [2, 3], [3, 4]])
ASSUMED_P = _rational([["0.5", "0.5", 0], [0, "0.5", "0.5"], ["0.2", "0.5", "0.3"]])
PRINTED_O = _rational([["1.5", "2.5"], ["2.5", "3.5"], ["2.3", "3.5"]])

_SOURCE = "first source article (log-sum-exp trick and flash attention), worked example"
_BITS = 128


def _product(a: Matrix, b: Matrix) -> list[list[Fraction]]:
    return [
        [sum((x * row[j] for x, row in zip(line, b, strict=True)), Fraction(0)) for j in range(len(b[0]))]
        for line in a
    ]


def scores() -> list[list[Fraction]]:
    """S = Q·Kᵀ, exactly."""
    return _product(Q, [list(column) for column in zip(*K, strict=True)])


def certified_weights() -> list[list[Fraction]]:
    """Rationals within the certified softmax of S."""
    exact = _softmax()
    return [[Fraction(x) for x in row] for row in exact.value.tolist()]


def _softmax() -> Enclosure:
    logits = torch.tensor([[float(entry) for entry in row] for row in scores()], dtype=torch.float64)
    exact = reference("softmax_rows", logits)
    assert isinstance(exact, Enclosure)
    return exact


def check_weights(p: Matrix = ASSUMED_P) -> ClaimFinding:
    """Is ``p`` the softmax of S? REFUTED by the entries of p that lie outside the certified softmax."""
    exact = _softmax()
    outside = []
    for i, row in enumerate(p):
        for j, entry in enumerate(row):
            distance = abs(Fraction(float(exact.value[i, j])) - entry)
            if distance > Fraction(float(exact.radius[i, j])):
                outside.append((i, j))
    softmax = [[f"{float(x):.4f}" for x in line] for line in exact.value]
    evidence = (
        f"{len(outside)} of {sum(map(len, p))} entries lie outside the certified softmax of S, with the rows "
        + "; ".join("(" + ", ".join(line) + ")" for line in softmax)
        + f" (radius below {float(exact.radius.max()):.1g}); a softmax has no zero entry"
    )
    return ClaimFinding(
        status="REFUTED" if outside else "HOLDS",
        evidence=evidence,
        table={
            "row": [i + 1 for i in range(len(p)) for _ in p[i]],
            "column": [j + 1 for row in p for j in range(len(row))],
            "article's P": [float(entry) for row in p for entry in row],
            "softmax(S)": [float(x) for line in exact.value for x in line],
        },
        counterexample=_third_row(p) if outside else "",
    )


def _third_row(p: Matrix) -> str:
    """What the last row of P would have to be."""
    s = scores()[2]
    told = ", ".join(str(float(x)) for x in p[-1])
    return (
        f"S = Q·Kᵀ has the third row ({', '.join(map(str, s))}): equal first and third scores have equal "
        "weights, and "
        f"e^s > 0 for every s. The article's rows have zeros, and its last one is ({told})."
    )


def check_output(p: Matrix = ASSUMED_P, o: Matrix = PRINTED_O) -> ClaimFinding:
    """Is ``o`` the product of ``p`` and V? REFUTED by the rows that differ, in exact rationals."""
    product = _product(p, V)
    wrong = [i for i, (ours, theirs) in enumerate(zip(product, o, strict=True)) if list(ours) != list(theirs)]
    words = "; ".join(
        f"row {i + 1} is ({', '.join(str(float(x)) for x in product[i])}), "
        f"printed ({', '.join(str(float(x)) for x in o[i])})"
        for i in wrong
    )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=words or "every row agrees exactly",
        table={
            "row": [i + 1 for i in range(len(o)) for _ in o[i]],
            "column": [j + 1 for row in o for j in range(len(row))],
            "article's O": [float(entry) for row in o for entry in row],
            "P·V": [float(entry) for row in product for entry in row],
        },
        counterexample=words,
    )


def exact_weights() -> list[list[flint.fmpq_poly]]:
    """exp(S), the softmax's numerators, as polynomials in e: e^s for the integers s of S."""
    return [[flint.fmpq_poly([0] * int(s) + [1]) for s in row] for row in scores()]


def _at(polynomial: flint.fmpq_poly, x: flint.arb) -> flint.arb:
    return sum((flint.arb(c) * x**i for i, c in enumerate(polynomial.coeffs())), flint.arb(0))


def right_output(numerators: Sequence[Sequence[flint.fmpq_poly]] | None = None) -> ClaimFinding:
    """Is O as the corrected example has it: a third row of (2, 3), rows one apart in their columns?

    Args:
        numerators: weights before rows are divided by their sums, polynomials in e; exp(S) if left out.
    """
    weights = exact_weights() if numerators is None else numerators
    v = [[flint.fmpq(x.numerator, x.denominator) for x in row] for row in V]
    below = [sum(row, flint.fmpq_poly([0])) for row in weights]
    above = [
        [sum((w * x[j] for w, x in zip(row, v, strict=True)), flint.fmpq_poly([0])) for j in (0, 1)]
        for row in weights
    ]
    # O_i2 − O_i1 = 1, since V's columns are 1 apart; row 3 by symmetry; rows 1 and 2 mirror each other.
    facts = {
        "columns are 1 apart": all(row[1] - row[0] == total for row, total in zip(above, below, strict=True)),
        "row 3 is (2, 3)": above[2] == [2 * below[2], 3 * below[2]],
        "rows 1 and 2 sum to (4, 6)": all(
            above[0][j] * below[1] + above[1][j] * below[0] == total * below[0] * below[1]
            for j, total in ((0, 4), (1, 6))
        ),
    }
    with _precision(_BITS):
        e = flint.arb(1).exp()
        totals = [_at(total, e) for total in below]
        rows = [[_at(x, e) / total for x in row] for row, total in zip(above, totals, strict=True)]
        printed = all(
            abs(x - flint.arb(y)) < flint.arb("0.00005")
            for row, told in zip(rows[:2], _CORRECTED, strict=True)
            for x, y in zip(row, told, strict=True)
        )
        words = "; ".join("(" + ", ".join(x.str(6, radius=False) for x in row) + ")" for row in rows)
    good = all(facts.values()) and printed
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence="as rational functions of e: "
        + ", ".join(f"{name} {'yes' if true else 'no'}" for name, true in facts.items())
        + f"; O = {words}",
        table={"fact": list(facts), "true": list(facts.values())},
        counterexample="" if good else f"O = {words}",
    )


# Rows 1 and 2 of softmax(S)·V to four digits.
_CORRECTED = (("1.7330", "2.7330"), ("2.2670", "3.2670"))


def _as_constants(p: Matrix) -> list[list[flint.fmpq_poly]]:
    return [[flint.fmpq_poly([flint.fmpq(x.numerator, x.denominator)]) for x in row] for row in p]


def _corrected_output() -> Matrix:
    return _product(ASSUMED_P, V)


CLAIMS: Final = (
    Claim(
        id="SEED0-1",
        subject="source articles",
        title="worked example: P = softmax(S)",
        statement="The matrix P that the article sets is the row-wise softmax of S = Q·Kᵀ.",
        source=_SOURCE,
        kind="enclosure",
        check=lambda _: check_weights(),
        control=lambda _: check_weights(certified_weights()),
    ),
    Claim(
        id="SEED0-2",
        subject="source articles",
        title="worked example: O = P·V",
        statement="The output O that the article prints is the product of its own P with V.",
        source=_SOURCE,
        kind="exact",
        check=lambda _: check_output(),
        control=lambda _: check_output(o=_corrected_output()),
    ),
    Claim(
        id="SEED0-3",
        subject="source articles",
        title="worked example: the right output",
        statement="Softmax attention of the example's Q, K, V is O = (1.7331, 2.7331), (2.2669, 3.2669), (2, "
        "3).",
        source="correction of the first source article's worked example, derived",
        kind="exact",
        check=lambda _: right_output(),
        control=lambda _: right_output(_as_constants(ASSUMED_P)),
    ),
)
