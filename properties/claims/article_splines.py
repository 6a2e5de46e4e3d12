"""The fourth source article, on attention as a spline.

ReLU attention along a rational line is a polynomial between sign changes of its scores: pieces, their degrees
and one-sided derivatives are exact. Exponentials are enclosed in balls.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final, Literal

import flint

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot

__all__ = [
    "CLAIMS",
    "degrees",
    "fitted",
    "gates",
    "one_sided",
    "piece",
    "recovered",
    "smoothness",
]

Polynomial = flint.fmpq_poly
Tokens = Sequence[Polynomial]

_BITS = 128
_SUBJECT = "source articles"
_SOURCE = "fourth source article (attention as a spline), {}"


def _line(*pairs: tuple[int, int]) -> list[Polynomial]:
    """Tokens x_j(t) = a_j + b_j t."""
    return [Polynomial([a, b]) for a, b in pairs]


def piece(tokens: Tokens, row: int, side: int) -> tuple[list[Polynomial], Polynomial]:
    """Scores x_i·x_j and the output Σ_j ReLU(x_i x_j) x_j of one row as polynomials next to t = 0.

    Args:
        tokens: scalars x_j(t), which are queries, keys and values alike.
        row: i.
        side: 1 for t > 0, −1 for t < 0.
    """
    scores = [tokens[row] * x for x in tokens]
    output = Polynomial([0])
    for score, value in zip(scores, tokens, strict=True):
        if _sign(score, side) > 0:
            output += score * value
    return scores, output


def _sign(p: Polynomial, side: int) -> int:
    """Sign of a polynomial for small t on one side of 0: that of its lowest term."""
    for power, c in enumerate(p.coeffs()):
        if c != 0:
            return (1 if c > 0 else -1) * (1 if power % 2 == 0 else side)
    return 0


def one_sided(tokens: Tokens, row: int, orders: int = 4) -> list[tuple[Fraction, Fraction]]:
    """Derivatives of order 0 … from the left and from the right of t = 0."""

    def derivatives(side: int) -> list[Fraction]:
        p, found = piece(tokens, row, side)[1], []
        for _ in range(orders):
            c = flint.fmpq(p[0])
            found.append(Fraction(int(c.p), int(c.q)))
            p = p.derivative()
        return found

    return list(zip(derivatives(-1), derivatives(1), strict=True))


def _in_t(p: Polynomial) -> str:
    return str(p).replace("x", "t")


def smoothness(tokens: Tokens, row: int) -> ClaimFinding:
    """Is ReLU attention twice continuously differentiable along this line, at t = 0?"""
    pairs = one_sided(tokens, row)
    first = next((order for order, (left, right) in enumerate(pairs) if left != right), None)
    told = ", ".join(_in_t(x) for x in tokens)
    left, right = (_in_t(piece(tokens, row, side)[1]) for side in (-1, 1))
    words = (
        f"tokens {told} of width 1, all maps 1, row {row + 1}: the output is {left} for t < 0 and {right} "
        "for "
        "t > 0"
    )
    return ClaimFinding(
        status="HOLDS" if first is None or first > 2 else "REFUTED",
        evidence=words
        + "; derivatives from the left and from the right at 0: "
        + ", ".join(f"order {i}: {a}, {b}" for i, (a, b) in enumerate(pairs)),
        table={
            "order": list(range(len(pairs))),
            "from the left": [str(a) for a, _ in pairs],
            "from the right": [str(b) for _, b in pairs],
        },
        counterexample=""
        if first is None or first > 2
        else f"{words}. At t = 0 both give {pairs[0][0]}; their derivatives of order {first} are "
        f"{pairs[first][0]} and "
        f"{pairs[first][1]}. So it is C{_POWERS[first - 1]} and no more.",
    )


def degrees(tokens: Tokens, of: Literal["weights", "output"]) -> ClaimFinding:
    """Has the attention a degree of exactly 3 between sign changes, as a cubic spline?"""
    rows = []
    for row in range(len(tokens)):
        scores, output = piece(tokens, row, 1)
        rows.append((row + 1, max(int(p.degree()) for p in scores), int(output.degree())))
    found = {row[1] if of == "weights" else row[2] for row in rows}
    return ClaimFinding(
        status="HOLDS" if found == {3} else "REFUTED",
        evidence="along a line, between sign changes: weights ReLU(q·k) have degree "
        f"{sorted({r[1] for r in rows})}, "
        f"the module's output {sorted({r[2] for r in rows})}",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("row", "degree of weights", "of output"))
        },
        counterexample=""
        if found == {3}
        else "x_1 = x_2 = t, all maps 1, t > 0: the weight ReLU(x_1·x_2) is t², a quadratic; the output "
        "Σ_j ReLU(x_1 x_j) x_j is 2t³.",
    )


def fitted(activation: Literal["softmax", "relu"], scales: Sequence[int]) -> ClaimFinding:
    """Is the output a cubic of the query along a line? Its fourth differences would be 0.

    Two keys 0 and 1 with values 0 and 1, a query t > 0: σ(t) with softmax, t with ReLU.

    Args:
        scales: m, for steps of 2⁻ᵐ from t = 1.
    """
    rows = []
    with _precision(4 * _BITS):
        for m in scales:
            points = [1 + flint.arb(i) / 2**m for i in range(5)]
            values = [1 / (1 + (-t).exp()) if activation == "softmax" else t for t in points]
            difference = sum((c * y for c, y in zip((1, -4, 6, -4, 1), values, strict=True)), flint.arb(0))
            rows.append((m, difference.str(4, radius=False), not difference.contains(0)))
    curved = all(row[2] for row in rows)
    return ClaimFinding(
        status="REFUTED" if curved else "HOLDS",
        evidence=f"{activation}, query 1 + i·2⁻ᵐ, fourth differences: "
        + ", ".join(f"m = {m}: {told}" for m, told, _ in rows)
        + (
            "; proved not to be 0. σ is analytic, bounded and not constant, so it is a polynomial on no "
            "interval; and "
            "no coefficient is fitted to anything"
            if curved
            else "; consistent with 0"
        ),
        table={
            title: [row[i] for row in rows] for i, title in enumerate(("m", "fourth difference", "not 0"))
        },
        counterexample="keys 0 and 1, values 0 and 1, query t: softmax attention is σ(t) = 1/(1 + e^(−t)). A "
        "cubic has "
        f"fourth differences 0; at t = 1, 1 + h, …, 1 + 4h, h = 2^(−{rows[0][0]}), that of σ is {rows[0][1]}."
        if curved
        else "",
    )


def gates(activations: Sequence[Literal["softmax", "relu"]]) -> ClaimFinding:
    """Are keys never just switched on or off? With softmax no weight is 0; with ReLU half of them are.

    Scores are integers from −4 to 4, in base 2 for softmax.
    """
    rows = []
    for name in activations:
        scores = range(-4, 5)
        weights = [Fraction(2) ** s if name == "softmax" else Fraction(max(s, 0)) for s in scores]
        off = sum(w == 0 for w in weights)
        gated = all(w == (max(0, s)) for w, s in zip(weights, scores, strict=True))
        rows.append((name, off, gated))
    never = [row for row in rows if row[1] == 0]
    return ClaimFinding(
        status="HOLDS" if len(never) == len(rows) else "CONDITIONAL" if never else "REFUTED",
        evidence="scores −4 … 4: "
        + ", ".join(
            f"{name}: {off} weights are "
            "0" + (", each weight is the score times a switch on its sign" if gated else "")
            for name, off, gated in rows
        ),
        table={
            title: [row[i] for row in rows] for i, title in enumerate(("activation", "weights of 0", "gated"))
        },
        counterexample=""
        if len(never) == len(rows)
        else "q = 1, keys −1 and 2: ReLU(q·k) = (0, 2): the first key is off, the second on with weight 2.",
    )


def recovered(family: Literal["softmax", "softplus"], betas: Sequence[int]) -> ClaimFinding:
    """Does a smoothing of ReLU attention approach it as β → ∞? One key, score s, value 1.

    Args:
        family: softmax(βs), which is 1 for one key, or ln(1 + e^(βs))/β.
        betas: β.
    """
    scores = [flint.arb(i) / 4 for i in range(-12, 13)]
    rows = []
    with _precision(_BITS):
        for beta in betas:
            gaps = []
            for s in scores:
                smooth = flint.arb(1) if family == "softmax" else (1 + (beta * s).exp()).log() / beta
                gaps.append(abs(smooth - s.max(flint.arb(0))))
            rows.append((beta, max(float(gap.abs_upper()) for gap in gaps)))
        limit = float(flint.arb(2).log().abs_upper())
    to_zero = all(gap <= limit / beta * (1 + 1e-12) for beta, gap in rows)
    return ClaimFinding(
        status="HOLDS" if to_zero else "REFUTED",
        evidence=f"{family}, scores from −3 to 3: largest distance from ReLU "
        + ", ".join(f"β = {beta}: {gap:.4g}" for beta, gap in rows)
        + (", ln 2/β, at s = 0" if to_zero else ", for every β alike"),
        table={"β": [beta for beta, _ in rows], "largest distance from ReLU": [gap for _, gap in rows]},
        plots=(
            Plot(
                f"Distance of {family} from ReLU",
                "line",
                {"β": [beta for beta, _ in rows], "distance": [gap for _, gap in rows]},
                x="β",
                y="distance",
                log=("β", "distance"),
            ),
        ),
        counterexample=""
        if to_zero
        else "one key, score 2, value 1: softmax attention is 1 for every β, ReLU attention is 2. Outputs of "
        "softmax "
        "attention lie between the values; those of ReLU attention do not.",
    )


_POWERS = "⁰¹²³"
_TWO_TOKENS = _line((1, 0), (0, 1))
_CUBIC = _line((0, 1), (0, 1), (0, 2))

CLAIMS: Final = (
    Claim(
        id="SEED3-1",
        subject=_SUBJECT,
        title="weights as a cubic spline",
        statement="Attention weights are a smoothed cubic spline.",
        source=_SOURCE.format("summary of Lai, Lim and Liu, arXiv 2408.09624"),
        kind="exact",
        check=lambda _: degrees(_CUBIC, "weights"),
        control=lambda _: degrees(_CUBIC, "output"),
    ),
    Claim(
        id="SEED3-2",
        subject=_SUBJECT,
        title="softmax as a fit of a cubic spline",
        statement="Applying softmax is fitting a cubic spline whose coefficients come from the keys.",
        source=_SOURCE.format("summary of Lai, Lim and Liu, arXiv 2408.09624"),
        kind="enclosure",
        check=lambda lab: fitted("softmax", lab.choose((2, 4, 8, 16), tuple(range(2, 42, 4)))),
        control=lambda _: fitted("relu", (2, 4, 8, 16)),
    ),
    Claim(
        id="SEED3-3",
        subject=_SUBJECT,
        title="not simply on or off",
        statement="Attention does not simply switch keys on or off.",
        source=_SOURCE.format("summary of Lai, Lim and Liu, arXiv 2408.09624"),
        kind="exact",
        check=lambda _: gates(("softmax", "relu")),
        control=lambda _: gates(("softmax",)),
    ),
    Claim(
        id="SEED3-6a",
        subject=_SUBJECT,
        title="a spline that is generally just C²",
        statement="ReLU attention is a cubic spline, and a spline is twice continuously differentiable.",
        source=_SOURCE.format("abstract of Lai, Lim and Liu, arXiv 2408.09624v1"),
        kind="exact",
        check=lambda _: smoothness(_TWO_TOKENS, 1),
        control=lambda _: smoothness(_line((0, 1)), 0),
        covers=("SPL-6",),
    ),
    Claim(
        id="SEED3-7",
        subject=_SUBJECT,
        title="smoothing by softmax",
        statement="Smoothing ReLU attention by softmax recovers the original transformer: ReLU attention is "
        "a limit of "
        "softmax(βS)V.",
        source=_SOURCE.format("abstract of Lai, Lim and Liu, arXiv 2408.09624"),
        kind="enclosure",
        check=lambda lab: recovered("softmax", (1, 10, 100, *lab.choose((), (1000, 10000)))),
        control=lambda _: recovered("softplus", (1, 10, 100)),
        covers=("SPL-7",),
    ),
)
