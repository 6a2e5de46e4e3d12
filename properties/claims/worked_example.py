"""The worked example of the first source article: attention of three tokens of width 2, without scaling.

The article sets Q, K, V, forms S = Q·Kᵀ, assumes a matrix P where softmax(S) belongs, and prints O = P·V.
Both steps are checked: P against a certified softmax, O against P·V in exact rationals (theory.md SEED0-1,
SEED0-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.oracle import reference

__all__ = ["ASSUMED_P", "PRINTED_O", "K", "Q", "V", "check_output", "check_weights", "findings", "scores"]

Matrix = Sequence[Sequence[Fraction]]


def _rational(rows: Sequence[Sequence[str | int]]) -> list[list[Fraction]]:
    return [[Fraction(entry) for entry in row] for row in rows]


Q = _rational([[1, 0], [0, 1], [1, 1]])
K = _rational([[1, 0], [1, 1], [0, 1]])
V = _rational([[1, 2], [2, 3], [3, 4]])
ASSUMED_P = _rational([["0.5", "0.5", 0], [0, "0.5", "0.5"], ["0.2", "0.5", "0.3"]])
PRINTED_O = _rational([["1.5", "2.5"], ["2.5", "3.5"], ["2.3", "3.5"]])

_SOURCE = "first source article, worked example (theory.md SEED0-1, SEED0-2)"


def _product(a: Matrix, b: Matrix) -> list[list[Fraction]]:
    return [
        [sum((x * row[j] for x, row in zip(line, b, strict=True)), Fraction(0)) for j in range(len(b[0]))]
        for line in a
    ]


def scores() -> list[list[Fraction]]:
    """S = Q·Kᵀ, exactly."""
    return _product(Q, [list(column) for column in zip(*K, strict=True)])


def check_weights(p: Matrix = ASSUMED_P) -> ClaimFinding:
    """Is ``p`` the softmax of S? REFUTED by the entries of p that lie outside the certified softmax."""
    logits = torch.tensor([[float(entry) for entry in row] for row in scores()], dtype=torch.float64)
    exact = reference("softmax_rows", logits)
    assert isinstance(exact, Enclosure)
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
        name="worked example: P = softmax(S)",
        status="REFUTED" if outside else "HOLDS",
        statement="The matrix P that the article sets is the row-wise softmax of S = Q·Kᵀ.",
        source=_SOURCE,
        evidence=evidence,
        table={
            "row": [i + 1 for i in range(len(p)) for _ in p[i]],
            "column": [j + 1 for row in p for j in range(len(row))],
            "article's P": [float(entry) for row in p for entry in row],
            "softmax(S)": [float(x) for line in exact.value for x in line],
        },
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
        name="worked example: O = P·V",
        status="REFUTED" if wrong else "HOLDS",
        statement="The output O that the article prints is the product of its own P with V.",
        source=_SOURCE,
        evidence=words or "every row agrees exactly",
        table={
            "row": [i + 1 for i in range(len(o)) for _ in o[i]],
            "column": [j + 1 for row in o for j in range(len(row))],
            "article's O": [float(entry) for row in o for entry in row],
            "P·V": [float(entry) for row in product for entry in row],
        },
    )


def findings() -> list[ClaimFinding]:
    """Both findings, as the report shows them."""
    return [check_weights(), check_output()]
