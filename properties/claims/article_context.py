"""The fourth source article, on attention in context and as a recurrence: windows and constant memory.

The best window is bracketed by the sign of the error's derivative, enclosed in balls; prefixes are rational.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Final, Literal

import flint

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = ["CLAIMS", "prefix", "window"]

_BITS = 128
_SUBJECT = "source articles"
_SOURCE = "fourth source article (attention as a spline), {}"


def _error_slope(w: flint.arb, lipschitz: flint.arb, noise: flint.arb, n: int) -> flint.arb:
    """d/dw of the mean square error L²(1 − coth w + 1/w)²/3 + σ² w coth w/n of a linear function.

    On the sphere of R³ the kernel e^(w x·q) has the mean direction coth w − 1/w, and the mean of e^(2w x·q)
    over the square of that of e^(w x·q) is w coth w.
    """
    coth = (w.exp() + (-w).exp()) / (w.exp() - (-w).exp())
    away = 1 - coth + 1 / w
    slope = coth * coth - 1
    return 2 * lipschitz**2 * away * (slope - 1 / w**2) / 3 + noise**2 * (coth - w * slope) / n


def _bracket(lipschitz: flint.arb, noise: flint.arb, n: int) -> tuple[Fraction, Fraction]:
    """Multiples of 1/64 between which the error's slope turns from negative to positive."""

    def falling(i: int) -> bool:
        slope = _error_slope(flint.arb(i) / 64, lipschitz, noise, n)
        if slope.contains(0):
            raise ArithmeticError(f"the slope at w = {i}/64 could not be told from 0; give balls more bits")
        return bool(slope < 0)

    low, high = 8, 16
    while falling(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if falling(middle) else (low, middle)
    return Fraction(low, 64), Fraction(high, 64)


def window(vary: Literal["L", "noise"], n: int = 200) -> ClaimFinding:
    """Is the best w larger, the window 1/w narrower, for a larger Lipschitz constant?

    Args:
        vary: "L", the constant, at noise 1/4; or "noise", which has the other direction, at L = 1.
        n: examples in the context.
    """
    rows: list[tuple[str, float, float]] = []
    with _precision(_BITS):
        for number in (Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4)):
            varied = flint.arb(number.numerator) / number.denominator
            still = flint.arb(1) / 4 if vary == "L" else flint.arb(1)
            pair = (varied, still) if vary == "L" else (still, varied / 4)
            low, high = _bracket(*pair, n)
            rows.append((str(number if vary == "L" else number / 4), float(low), float(high)))
    rising = all(a[2] <= b[1] for a, b in itertools.pairwise(rows))
    return ClaimFinding(
        status="SUPPORTED" if rising else "REFUTED",
        evidence=f"d = 3, n = {n}, f(x) = L·a·x, {'σ = 1/4' if vary == 'L' else 'L = 1'}, error to "
        f"first order "
        "in 1/n, whose slope in w is enclosed: the best w lies "
        + ", ".join(f"in [{low:.4g}, {high:.4g}] for {vary} = {number}" for number, low, high in rows),
        table={title: [row[i] for row in rows] for i, title in enumerate((vary, "w above", "w below"))},
        counterexample="" if rising else f"w falls: {rows[0]}, {rows[1]} ({vary}, w above, w below)",
    )


def prefix(*, changing: bool = True) -> ClaimFinding:
    """Does a state of constant size give attention over a growing prefix? For a query that stays.

    Keys are 0 or 1, weights 2^(q·k). The state is (Σw, Σwv) for the query so far.

    Args:
        changing: ask with another query afterwards.
    """
    # Pairs of key and value.
    prefixes = (((0, 0), (1, 1)), ((1, 0), (0, 1)))
    rows = []
    for query, later in ((0, 0), (0, 1)) if changing else ((0, 0), (1, 1)):
        states, answers = [], []
        for pairs in prefixes:
            states.append(_state(query, pairs))
            answers.append(_attention(later, pairs))
        told = states[0] != states[1] or answers[0] == answers[1]
        if query == later:
            told = told and answers == [weighted / total for total, weighted in states]
        rows.append((query, later, str(states == states[::-1]), " and ".join(map(str, answers)), told))
    fixed = [row[4] for row in rows if row[0] == row[1]]
    if not all(fixed):
        status = "REFUTED"
    else:
        status = "HOLDS" if all(row[4] for row in rows) else "CONDITIONAL"
    return ClaimFinding(
        status=status,
        evidence="two prefixes of two tokens: "
        + "; ".join(
            f"state for q = {q}, asked with q = {later}: outputs {answers}, "
            f"{'told by the state' if told else 'not told by the state, which is the same'}"
            for q, later, _, answers, told in rows
        ),
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("q", "asked with", "states equal", "outputs", "told by the state"))
        },
        counterexample=""
        if status == "HOLDS"
        else "weights 2^(q·k). Keys (0, 1) and keys (1, 0), values (0, 1) both times: for q = 0 both have "
        "the state "
        "(Σw, Σwv) = (2, 1). For q = 1 the first gives 2/3, the second 1/3: a query of the new token needs "
        "all keys.",
    )


def _state(query: int, pairs: Sequence[tuple[int, int]]) -> tuple[Fraction, Fraction]:
    """(Σw, Σwv), one token at a time."""
    total, weighted = Fraction(0), Fraction(0)
    for key, value in pairs:
        w = Fraction(2) ** (query * key)
        total, weighted = total + w, weighted + w * value
    return total, weighted


def _attention(query: int, pairs: Sequence[tuple[int, int]]) -> Fraction:
    """Softmax attention over all the prefix's keys, in base 2."""
    weights = [Fraction(2) ** (query * key) for key, _ in pairs]
    return sum(w / sum(weights) * value for w, (_, value) in zip(weights, pairs, strict=True)) + Fraction(0)


CLAIMS: Final = (
    Claim(
        id="SEED3-8",
        subject=_SUBJECT,
        title="Lipschitz constant and window",
        statement="In-context softmax attention widens its window for functions of a lower Lipschitz "
        "constant.",
        source=_SOURCE.format("abstract of Collins et al., arXiv 2402.11639"),
        kind="enclosure",
        check=lambda lab: window("L", lab.choose(200, 2000)),
        control=lambda _: window("noise"),
        covers=("ICL-1",),
    ),
    Claim(
        id="SEED3-9",
        subject=_SUBJECT,
        title="attention in constant memory",
        statement="Attention over a growing prefix can be updated in constant memory, as a recurrent "
        "network.",
        source=_SOURCE.format("abstract of Feng et al., arXiv 2405.13956"),
        kind="exact",
        check=lambda _: prefix(),
        control=lambda _: prefix(changing=False),
        covers=("AAR-3",),
    ),
)
