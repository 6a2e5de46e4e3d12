"""The gadget behind universal approximation by sigmoid attention: four heads of width 1 shift chosen tokens.

With H the step, H(x)H(y) = (H(xy) + H(x) + H(y) − 1)/2, and the difference of this for two thresholds of x
needs four steps, each of a product of a query's and a key's number: four heads. σ(λt) is within e^(−λ|t|) of
H(t). SIG-8; Ramapuram et al., arXiv 2409.04431, Theorem 3.1 (recalled).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import flint

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory, Plot
from attnproof.properties.claims.sigmoid import PAPER, SUBJECT

__all__ = ["CLAIMS", "FOUR_HEADS", "selective_shift"]

Head = tuple[Fraction, str, str]
"""Factor of the value, the query's number and the key's: "low" and "high" stand for z_i − threshold."""

FOUR_HEADS: Final[tuple[Head, ...]] = (
    (Fraction(1, 2), "low", "key"),
    (Fraction(-1, 2), "high", "key"),
    (Fraction(1, 2), "low", "one"),
    (Fraction(-1, 2), "high", "one"),
)

_BITS = 256
_TOKENS = tuple(Fraction(x, 4) for x in (-7, -3, 1, 2, 5, 9))
_LOW, _HIGH, _KEY = Fraction(0), Fraction(1), Fraction(3, 4)


def _ball(x: Fraction) -> flint.arb:
    return flint.arb(flint.fmpq(x.numerator, x.denominator))


def _outputs(tokens: Sequence[Fraction], heads: Sequence[Head], slope: int) -> list[flint.arb]:
    """Σ over heads of Σ_j factor·σ(slope·query_i·key_j)·z_j for every token."""
    found = []
    for z in tokens:
        numbers = {"low": z - _LOW, "high": z - _HIGH}
        total = flint.arb(0)
        for factor, query, key in heads:
            for other in tokens:
                logit = slope * numbers[query] * (1 if key == "one" else other - _KEY)
                total += _ball(factor * other) / (1 + (-_ball(logit)).exp())
        found.append(total)
    return found


def selective_shift(
    slopes: Sequence[int] = (8, 16, 32, 64, 128),
    heads: Sequence[Head] = FOUR_HEADS,
    tokens: Sequence[Fraction] = _TOKENS,
) -> ClaimFinding:
    """Do the heads shift tokens of (0, 1) by the sum of tokens above ¾, and the others by nothing?

    The error is held against Σ_heads |factor| Σ_j |z_j|·e^(−slope·gap), gap the smallest |query·key|: this
    bound goes to 0 with a growing slope.

    Args:
        slopes: of the sigmoid; heads: factor, query and key of each; tokens: none of them at a threshold.
    """
    shift = sum((z for z in tokens if z > _KEY), Fraction(0))
    due = [shift if _LOW < z < _HIGH else Fraction(0) for z in tokens]
    ends: list[Fraction] = [abs(z - end) for z in tokens for end in (_LOW, _HIGH)]
    gap = min(ends) * min(Fraction(1), *(abs(z - _KEY) for z in tokens))
    heaviest = sum((abs(factor) for factor, _, _ in heads), Fraction(0))
    size = heaviest * sum((abs(z) for z in tokens), Fraction(0))
    rows, beyond = [], []
    for slope in slopes:
        with _precision(_BITS):
            found = _outputs(tokens, heads, slope)
            limit = _ball(size) * (-slope * _ball(gap)).exp()
            apart = [abs(x - _ball(y)) for x, y in zip(found, due, strict=True)]
            beyond += [
                (slope, z, x, y)
                for z, x, y, e in zip(tokens, found, due, apart, strict=True)
                if not e <= limit
            ]
            rows.append((slope, max(float(e.mid()) for e in apart), float(limit.mid())))
    titles = ("slope", "largest error", "bound")
    return ClaimFinding(
        status="REFUTED" if beyond else "HOLDS",
        evidence=f"tokens {', '.join(map(str, tokens))}, {len(heads)} heads: tokens in ({_LOW}, {_HIGH}) "
        f"are to be shifted by {shift}, the others by 0; gap {gap}: errors "
        + ", ".join(f"{error:.2g} at slope {slope}" for slope, error, _ in rows)
        + (
            f"; above the bound for {len(beyond)} outputs"
            if beyond
            else ", all within the bound, enclosed in Arb"
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        plots=(
            Plot(
                "error of the shift against the slope",
                "line",
                {title: [row[i] for row in rows] for i, title in enumerate(titles)},
                "slope",
                "largest error",
                log=("largest error",),
            ),
        ),
        counterexample="; ".join(
            f"slope {slope}, token {z}: shifted by {float(x.mid()):.6g}, not {y}"
            for slope, z, x, y in beyond[-1:]
        ),
    )


def _theorem(lab: Laboratory) -> ClaimFinding:
    """Existence for every function: no finite check decides it."""
    return ClaimFinding(
        status="OPEN",
        evidence="the statement is about every continuous function: no finite computation decides it, and "
        "the text of the theorem was not at hand. What it is built on, a shift of chosen tokens by four "
        "heads of width 1, is SIG-8a. Needed: a formal proof",
    )


CLAIMS: Final = (
    Claim(
        id="SIG-8a",
        subject=SUBJECT,
        title="selective shift by four heads",
        statement="Four sigmoid heads of width 1 shift the tokens of an interval by a sum over the tokens "
        "above a threshold, and leave the others, to within a bound that falls as e^(−slope·gap).",
        source=f"derived, in place of the lemmas of {PAPER}, Theorem 3.1 (recalled)",
        kind="enclosure",
        check=lambda lab: selective_shift(lab.choose((8, 32, 128), (8, 16, 32, 64, 128, 256))),
        # Two heads alone make the parity of the two steps, not their product.
        control=lambda lab: selective_shift((32, 128), FOUR_HEADS[:2]),
    ),
    Claim(
        id="SIG-8b",
        subject=SUBJECT,
        title="universal approximation",
        statement="For every continuous permutation-equivariant function of compact support and every ε "
        "there is a transformer of sigmoid attention with 4 heads of width 1 and a feed-forward width of 4 "
        "within ε in L_p.",
        source=f"{PAPER}, Theorem 3.1 (recalled)",
        kind="none",
        check=_theorem,
        control=None,
        covers=("SIG-8",),
    ),
)
