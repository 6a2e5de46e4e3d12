"""Claims about the Lipschitz constant of softmax self-attention on tokens of a ball (Castin et al.).

Norms are enclosed in Arb (:mod:`attnproof.properties.claims.jacobian_norms`). SIG-7; arXiv 2312.14820.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import flint

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.jacobian_norms import (
    Bound,
    Quantities,
    climbed,
    enclosed_ratio,
    exp,
    sqrt,
    two_groups,
)
from attnproof.properties.claims.sigmoid import SUBJECT

__all__ = ["CLAIMS", "crowds", "kept", "mean_field", "of_tokens"]

_PAPER: Final = "Castin, Ablin, Peyré, arXiv 2312.14820 (constants recalled)"
_BITS = 192
_SEED = 8


def of_tokens(q: Quantities) -> object:
    """√3‖V‖(‖A‖²R⁴(4n + 1) + n)^½."""
    return q.w * sqrt(3 * (q.a**2 * q.radius**4 * (4 * q.n + 1) + q.n))


def _of_one_token(q: Quantities) -> object:
    """The same with n = 1 whatever n is."""
    return q.w * sqrt(3 * (5 * q.a**2 * q.radius**4 + 1))


def mean_field(q: Quantities) -> object:
    """‖V‖(1 + 3‖A‖R²)e^(2‖A‖R²)."""
    square = q.a * q.radius**2
    return q.w * (1 + 3 * square) * exp(2 * square)


def _without_exponential(q: Quantities) -> object:
    """‖V‖(1 + 3‖A‖R²)."""
    return q.w * (1 + 3 * q.a * q.radius**2)


def crowds(radii: Sequence[int]) -> list[tuple[int, Quantities, flint.arb]]:
    """Radius, quantities and ‖J‖ at ⌈e^(R²/4)⌉ tokens R/2 and one R, where softmax is steep; A = V = 1."""
    found = []
    for r in radii:
        radius, zero = flint.arb(r), flint.arb(0)
        copies = (radius**2 / 4).exp().ceil().unique_fmpz()
        assert copies is not None
        norm, _ = two_groups(radius / 2, radius, (int(copies), 1), "softmax")
        n, one = int(copies) + 1, flint.arb(1)
        found.append((r, Quantities(n, zero, zero, zero, zero, radius, one, one), norm))
    return found


def kept(
    bound: Bound, starts: int = 12, steps: int = 25, radii: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8)
) -> ClaimFinding:
    """Does ‖J‖ keep a bound? At ends of climbs from random instances, and at crowds of tokens.

    Args:
        bound: of the quantities of an instance; starts, steps: of the climbs; radii: of the crowds.
    """
    rows: list[tuple[str, int, int, float]] = []
    broken = []
    for instance in climbed("softmax", bound, starts, steps, _SEED):
        ratio = enclosed_ratio(instance, "softmax", bound)
        rows.append(("climb", *instance.x.shape, float(ratio.mid())))
        if ratio > 1:
            numbers = "\n".join(f"{name} = {value.tolist()}" for name, value in vars(instance).items())
            broken.append((instance.x.size, f"{numbers}\nnorm over bound in {ratio.str(12)}"))
    with _precision(_BITS):
        for r, quantities, norm in crowds(radii):
            limit = flint.arb(bound(quantities))
            rows.append((f"crowd, R = {r}", quantities.n, 1, float((norm / limit).mid())))
            if norm > limit:
                told = f"{quantities.n - 1} tokens {r}/2, one {r}, A = V = 1: norm {norm.str(10)}"
                broken.append((quantities.n, f"{told}, bound {limit.str(10)}"))
    titles = ("instance", "n", "d", "norm over bound")
    return ClaimFinding(
        status="REFUTED" if broken else "SUPPORTED",
        evidence=f"{starts} climbs of {steps} steps (seed {_SEED}), and ⌈e^(R²/4)⌉ tokens R/2 with one R "
        f"at R = {list(radii)}, norms enclosed in Arb: largest ratio to the bound "
        f"{max(row[3] for row in rows):.6f}, {len(broken)} above 1",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=min(broken)[1] if broken else "",
        seed=_SEED,
    )


CLAIMS: Final = (
    Claim(
        id="SIG-7a",
        subject=SUBJECT,
        title="Lipschitz constant for n tokens",
        statement="On n tokens of the ball of radius R softmax self-attention has ‖J‖ ≤ √3‖V‖(‖A‖²R⁴(4n + "
        "1) + n)^½.",
        source=_PAPER,
        kind="search",
        check=lambda lab: kept(of_tokens, *lab.choose((12, 25), (60, 100))),
        # The same without n, which crowds of tokens break.
        control=lambda lab: kept(_of_one_token, 2, 2),
        covers=("SIG-7",),
    ),
    Claim(
        id="SIG-7b",
        subject=SUBJECT,
        title="mean-field Lipschitz constant",
        statement="On the ball of radius R softmax self-attention has ‖J‖ ≤ ‖V‖(1 + 3‖A‖R²)e^(2‖A‖R²) for "
        "every number of tokens.",
        source=_PAPER,
        kind="search",
        check=lambda lab: kept(mean_field, *lab.choose((12, 25), (60, 100))),
        control=lambda lab: kept(_without_exponential, 2, 2),
    ),
    Claim(
        id="SIG-7c",
        subject=SUBJECT,
        title="growth on real data",
        statement="On real data the norm of the Jacobian of softmax self-attention grows as n^(1/4).",
        source=_PAPER,
        kind="none",
        check=lambda lab: ClaimFinding(
            status="OPEN",
            evidence="a measurement on texts through trained models: needed are their weights and the "
            "texts. Bounds are SIG-7a and SIG-7b, a family of tokens on which the growth in R is "
            "exponential SIG-6a",
        ),
        control=None,
    ),
)
