"""The first source article, on the log-sum-exp trick and flash attention: what the shift prevents.

Exponentials are enclosed in balls and held against the formats' thresholds: a number rounds to 0 if it is at
most half the smallest subnormal number, and overflows if it is at least half a unit beyond the largest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import flint

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = ["CLAIMS", "FORMATS", "harmless", "lost_terms", "overflows", "underflows"]

_BITS = 256
# Significant digits and exponents of the smallest subnormal number and of the largest power of two.
FORMATS: Final = {"float16": (11, -24, 15), "bfloat16": (8, -133, 127), "float32": (24, -149, 127)}

Scores = Sequence[int]


def _exponential(x: int) -> flint.arb:
    return flint.arb(x).exp()


def underflows(x: int, name: str) -> bool:
    """Whether e^x rounds to 0 in a format, to nearest even."""
    with _precision(_BITS):
        return bool(_exponential(x) < flint.arb(2) ** (FORMATS[name][1] - 1))


def overflows(x: flint.arb, name: str) -> bool:
    """Whether a positive number rounds to infinity in a format."""
    digits, _, largest = FORMATS[name]
    with _precision(_BITS):
        return bool(x >= flint.arb(2) ** (largest + 1) - flint.arb(2) ** (largest - digits))


def lost_terms(spread: int) -> ClaimFinding:
    """Do terms e^(x_i − max) underflow where scores are up to ``spread`` apart?"""
    rows = []
    for name in FORMATS:
        lost = [x for x in range(1, spread + 1) if underflows(-x, name)]
        rows.append((name, -min(lost) if lost else 0, len(lost)))
    first = [(name, x) for name, x, _ in rows if x]
    return ClaimFinding(
        status="REFUTED" if first else "HOLDS",
        evidence=f"scores 0 and −1 … −{spread}, shifted by their maximum 0: "
        + (
            "e^x rounds to 0 from " + ", ".join(f"x = {x} in {name}" for name, x in first)
            if first
            else "no term rounds to 0 in " + ", ".join(FORMATS)
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(("format", "first lost", "lost"))},
        counterexample=_half_a_subnormal(*first[0]) if first else "",
    )


def _half_a_subnormal(name: str, x: int) -> str:
    with _precision(_BITS):
        smallest = flint.arb(2) ** FORMATS[name][1]
        return (
            f"{name}, scores (0, {x}), maximum 0: e^{x} = {_exponential(x).str(4, radius=False)} is below "
            "half the "
            f"smallest subnormal number, 2^{FORMATS[name][1]}/2 = {(smallest / 2).str(4, radius=False)}, and "
            "rounds to "
            "0: the weight is lost and its logarithm is −∞, where the score less the log-sum-exp is "
            f"{(flint.arb(x) - (1 + _exponential(x)).log()).str(6, radius=False)}."
        )


def harmless(cases: Sequence[Scores], *, shifted: bool = True) -> ClaimFinding:
    """After the shift, is the sum in [1, n], and what underflow takes of it at most n·2^(smallest − 1)?"""
    rows = []
    for scores in cases:
        top = max(scores) if shifted else 0
        with _precision(_BITS):
            terms = [_exponential(x - top) for x in scores]
            total = sum(terms, flint.arb(0))
            inside = bool(total >= 1) and bool(total <= len(scores))
            over = [name for name in FORMATS if overflows(total, name)]
            small = all(
                sum(
                    (t for t, x in zip(terms, scores, strict=True) if underflows(x - top, name)), flint.arb(0)
                )
                <= len(scores) * flint.arb(2) ** (FORMATS[name][1] - 1) * total
                for name in FORMATS
            )
        rows.append((str(tuple(scores[:4])), len(scores), inside, ", ".join(over) or "none", small))
    good = all(row[2] and row[3] == "none" and row[4] for row in rows)
    wrong = next((row for row in rows if not (row[2] and row[4])), None)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{len(rows)} sets of scores: the sum lies in [1, n] in {sum(row[2] for row in rows)}, "
        "overflows in "
        f"{sum(row[3] != 'none' for row in rows)}; terms that round to 0 take at most n times half the "
        "smallest "
        f"subnormal number off it in {sum(row[4] for row in rows)}",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(
                ("first scores", "n", "sum in [1, n]", "overflows", "loss within bound")
            )
        },
        counterexample=f"scores {wrong[0]}: overflow in {wrong[3]}" if wrong else "",
    )


def _cases(count: int) -> list[Scores]:
    edges: list[Scores] = [(0,), (88, 88), (89, 0), (12, 11), (1000, 1000), (0, -104), (-17, 0), (-200, -200)]
    return edges + [
        tuple(Fraction(i * i * k).numerator % 211 - 105 for i in range(k)) for k in range(2, count)
    ]


_SUBJECT = "source articles"
_SOURCE = "first source article (log-sum-exp trick and flash attention, part 1), {}"

CLAIMS: Final = (
    Claim(
        id="SEED0-4a",
        subject=_SUBJECT,
        title="log-sum-exp: underflow",
        statement="Subtracting the maximum before exponentiating prevents underflow as well as overflow.",
        source=_SOURCE.format("the trick"),
        kind="enclosure",
        check=lambda _: lost_terms(120),
        control=lambda _: lost_terms(16),
    ),
    Claim(
        id="SEED0-4b",
        subject=_SUBJECT,
        title="log-sum-exp: what the shift does",
        statement="Subtracting the maximum prevents overflow: the sum of n exponentials lies in [1, n]; "
        "terms that "
        "underflow take a share of at most n·2^(e_min − 1) of it, 2^e_min the smallest subnormal number.",
        source="correction of the first source article, derived",
        kind="enclosure",
        check=lambda lab: harmless(_cases(lab.choose(20, 60))),
        control=lambda _: harmless(_cases(20), shifted=False),
    ),
)
