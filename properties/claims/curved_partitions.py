"""Claims about partitions: encoders with curved kinks, and where Pierce–Birkhoff is a theorem."""

from __future__ import annotations

import itertools
from typing import Final

import flint

from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory
from attnproof.properties.forms.line_cells import along, cells
from attnproof.properties.forms.relu_encoder import Expression, compiled, maximum, variables

__all__ = ["CLAIMS", "encoders_beyond_hyperplanes"]

_SOURCE: Final = "Lai, Lim, Ren, manuscript (github 7pocheR/Pierce-Birkhoff), "


def encoders_beyond_hyperplanes(points: int = 8, function: Expression | None = None) -> ClaimFinding:
    """Does the ReLU encoder of max(x² − y, 0) have kinks that no finite set of lines holds?

    Args:
        points: places (a, a²), a = 0, 1, …, at which the kink is looked for along y.
        function: of x and y; its kinks are looked for wherever x = a.
    """
    x, y = variables(2)
    expression = maximum(x * x - y, 0) if function is None else function
    encoder = compiled(expression, 2)
    kinks, rows = [], []
    for a in range(points):
        start, direction = [flint.fmpq(a), flint.fmpq(0)], [flint.fmpq(0), flint.fmpq(1)]
        found = cells(lambda t, seen, s=start, d=direction: (encoder(along(s, d, t), seen=seen),))  # type: ignore[misc]
        for left, right in itertools.pairwise(found):
            (before,), (after,) = left.polynomials, right.polynomials
            if before != after and left.high is not None:
                b = -left.high.factor[0] / flint.fmpq(left.high.factor[1])
                kinks.append((a, b))
                rows.append((a, str(b), str(before.derivative()(b)), str(after.derivative()(b))))
    together = sum(
        (q[0] - p[0]) * (r[1] - p[1]) == (r[0] - p[0]) * (q[1] - p[1])
        for p, q, r in itertools.combinations(kinks, 3)
    )
    scattered = len(kinks) >= points and not together
    titles = ("x = a", "y of the kink", "slope below", "slope above")
    return ClaimFinding(
        status="HOLDS" if scattered else "REFUTED",
        evidence=f"{len(kinks)} kinks of the compiled encoder on the lines x = 0 … {points - 1}, exact; "
        "triples on "
        f"one line: {together} of {len(list(itertools.combinations(kinks, 3)))}"
        + (
            f"; so ≥ {len(kinks) // 2} lines are needed for these, and as three points of the parabola are "
            "never on "
            "a line (Vandermonde), no finite number is enough for all"
            if scattered
            else ""
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=""
        if scattered
        else f"kinks {', '.join(f'({a}, {b})' for a, b in kinks[:3])} on one line",
    )


def _straight(lab: Laboratory) -> ClaimFinding:
    x, y = variables(2)
    return encoders_beyond_hyperplanes(4, maximum(x - y, 0))


def _theorems(lab: Laboratory) -> ClaimFinding:
    return ClaimFinding(
        status="OPEN",
        evidence="general theorems whose proofs (texts not at hand) have no finite certificate that could be "
        "computed; n = 1 with rational breakpoints is settled constructively in SPL-8c",
    )


CLAIMS: Final = (
    Claim(
        id="SPL-9e",
        subject="splines",
        title="encoders beyond hyperplane partitions",
        statement="Splines on hyperplane partitions are strictly fewer than functions of ReLU encoders: "
        "max(x² − y, 0) is an encoder, and its kinks lie on no finite number of lines.",
        source=_SOURCE + "consequence",
        kind="exact",
        check=lambda lab: encoders_beyond_hyperplanes(lab.choose(8, 30, 60)),
        control=_straight,
    ),
    Claim(
        id="SPL-9g",
        subject="splines",
        title="Pierce–Birkhoff: where it is a theorem",
        statement="The conjecture is true for n ≤ 2, and for splines on hyperplane partitions in any "
        "dimension.",
        source="Mahé 1984; Lai and Lim, arXiv 2507.07976, Theorem 3.4",
        kind="none",
        check=_theorems,
        control=None,
    ),
)
