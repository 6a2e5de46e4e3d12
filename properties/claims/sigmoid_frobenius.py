"""Claims about the Frobenius norm of the matrix of weights, of softmax and of sigmoid attention.

Exact: with w = e^z the weights are w/Σw and w/(w + 1), and squares of norms are rational. SIG-14.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import flint

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.sigmoid import SUBJECT, weight
from attnproof.properties.claims.sigmoid_symmetries import Weights, softmax

__all__ = ["CLAIMS", "identities", "rows_between", "square_of_the_norm", "unbiased", "without_bias"]


def unbiased(row: Sequence[Fraction]) -> list[Fraction]:
    """σ(z) for a row of e^z."""
    return [weight(w, 1) for w in row]


def square_of_the_norm(matrix: Sequence[Sequence[Fraction]], weights: Weights) -> Fraction:
    """‖P‖_F² for a matrix of e^z (M, n)."""
    return sum((p * p for row in matrix for p in weights(row)), Fraction(0))


def identities(n: int) -> tuple[bool, bool]:
    """Whether nΣw² − (Σw)² = Σ_{i<j}(w_i − w_j)² and (Σw)² − Σw² = 2Σ_{i<j}w_iw_j, as polynomials in n names.

    For w > 0 they say 1/n ≤ Σp² ≤ 1 of p = w/Σw, with equality at equal w on the left.
    """
    context = flint.fmpq_mpoly_ctx.get([f"w{j}" for j in range(n)], "lex")
    w = context.gens()
    zero = context.constant(0)
    squares, total = sum((x * x for x in w), zero), sum(w, zero)
    pairs = list(itertools.combinations(w, 2))
    return (
        n * squares - total * total == sum(((a - b) * (a - b) for a, b in pairs), zero),
        total * total - squares == sum((2 * a * b for a, b in pairs), zero),
    )


def _matrices(n: int) -> dict[str, list[list[Fraction]]]:
    """e^z (n, n): equal, an integer range, one key of all rows far above the others."""
    return {
        "equal logits": [[Fraction(1)] * n for _ in range(n)],
        "e^z = 1 … n, shifted by row": [[Fraction((i + j) % n + 1) for j in range(n)] for i in range(n)],
        "one key at 2⁶⁰": [[Fraction(2) ** (60 * (j == 0)) for j in range(n)] for _ in range(n)],
    }


def rows_between(lengths: Sequence[int] = (1, 2, 3, 5, 8), weights: Weights = softmax) -> ClaimFinding:
    """Is every row's norm in [1/√n, 1], and so the matrix's in [1, √n]? Identities, and rational matrices.

    Args:
        lengths: n; weights: of a row of e^z.
    """
    rows, outside, unproved = [], [], [n for n in lengths if identities(n) != (True, True)]
    for n in lengths:
        for name, matrix in _matrices(n).items():
            square = square_of_the_norm(matrix, weights)
            each = [square_of_the_norm([row], weights) for row in matrix]
            good = 1 <= square <= n and all(Fraction(1, n) <= x <= 1 for x in each)
            # The ends: equal weights, and one weight of 1 in the limit.
            good = good and (square == 1 or name != "equal logits")
            rows.append((n, name, float(square) ** 0.5, float(n) ** 0.5, good))
            if not good:
                outside.append((n, name, square))
    titles = ("n", "e^z", "‖P‖_F", "√n", "inside")
    close = max(row[2] / row[3] for row in rows if row[1] == "one key at 2⁶⁰")
    return ClaimFinding(
        status="REFUTED" if outside or unproved else "HOLDS",
        evidence=f"nΣw² ≥ (Σw)² ≥ Σw² by identities of polynomials at n = {list(lengths)}; {len(rows)} "
        "rational matrices: "
        + (f"{len(outside)} outside" if outside else f"inside, 1 at equal logits, up to {close:.12f}·√n"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="; ".join(
            f"n = {n}, {name}: ‖P‖_F² = {square}, outside [1, {n}]" for n, name, square in outside[:1]
        ),
    )


def without_bias(lengths: Sequence[int] = (1, 2, 16, 256), weights: Weights = unbiased) -> ClaimFinding:
    """Is ‖P‖_F = n/2 at zero logits, and n its supremum, not attained? Over rational matrices of one e^z.

    Args:
        lengths: n; weights: of a row of e^z.
    """
    rows, wrong = [], []
    for n in lengths:
        # n equal rows
        half, larger, huge = (n * square_of_the_norm([[Fraction(w)] * n], weights) for w in (1, 2**20, 2**60))
        rows.append((n, float(half) ** 0.5, float(larger) ** 0.5 / n, float(n * n - huge)))
        near = larger < huge < n * n and n * n - huge < n * n * Fraction(2, 2**60)
        if half != Fraction(n * n, 4) or not near:
            wrong.append((n, half))
    titles = ("n", "‖P‖_F at zero logits", "over n at e^z = 2²⁰", "n² − ‖P‖_F² at e^z = 2⁶⁰")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"σ(0) = 1/2 and σ < 1 increases to 1: n = {list(lengths)}, squares of norms exact: "
        + "; ".join(
            f"n = {n}: {norm:g} at zero logits, {share:.7f}·n at e^z = 2²⁰" for n, norm, share, _ in rows
        )
        + ". At the bias −log n the norm at zero logits is n/(n + 1), below softmax's 1",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="; ".join(
            f"n = {n}, zero logits: ‖P‖_F² = {half}, not {n * n}/4" for n, half in wrong[:1]
        ),
    )


CLAIMS: Final = (
    Claim(
        id="SIG-14a",
        subject=SUBJECT,
        title="Frobenius norm of softmax's weights",
        statement="The matrix P of softmax attention over n positions has ‖P‖_F in [1, √n], each row in "
        "[1/√n, 1].",
        source="derived; arXiv 2410.18613 on the bound √n",
        kind="exact",
        check=lambda lab: rows_between(lab.choose((1, 2, 3, 5, 8), (1, 2, 3, 5, 8, 16))),
        control=lambda lab: rows_between((2, 3), unbiased),
        covers=("SIG-14",),
    ),
    Claim(
        id="SIG-14b",
        subject=SUBJECT,
        title="Frobenius norm of sigmoid's weights",
        statement="Without a bias the matrix P of sigmoid attention has ‖P‖_F = n/2 at zero logits, and "
        "values up to n, which it never reaches.",
        source="derived; arXiv 2410.18613",
        kind="exact",
        check=lambda lab: without_bias(),
        control=lambda lab: without_bias((2, 16), softmax),
    ),
    Claim(
        id="SIG-14c",
        subject=SUBJECT,
        title="what the bound √n is good for",
        statement="That ‖P‖_F ≤ √n, and not that weights are positive and sum to 1, is what makes softmax "
        "attention train well.",
        source="arXiv 2410.18613 (recalled)",
        kind="none",
        check=lambda lab: ClaimFinding(
            status="OPEN",
            evidence="a comparison of trained transformers: needed are training runs of the paper's size "
            "with each property broken by itself. The bounds themselves are SIG-14a and SIG-14b",
        ),
        control=None,
    ),
)
