"""Claims about the window of softmax attention in context: asymptotics of bias and noise, exponents by class.

Setting and source: Collins et al., arXiv 2402.11639, as in :mod:`attnproof.properties.claims.in_context`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.forms.kernel_window import BIASES, DEGREES, optimal_width

__all__ = ["CLAIMS", "asymptotics", "bounds", "columns", "exponents"]

_SOURCE: Final = "Collins et al., arXiv 2402.11639"
_EXPONENTS: Final = {"affine": 3, "rectified": 2, "cone at the query": 1}
"""Class of functions: its exponent is 2/(d + this)."""


def columns(titles: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """The table of these rows."""
    return {title: [row[i] for row in rows] for i, title in enumerate(titles)}


def _slopes(name: str, d: int, targets: Sequence[float]) -> list[tuple[float, float, float]]:
    """n for which w is about each target, the best w, and the slope of log w in log n from the one before."""
    exponent = 2 / (d + _EXPONENTS[name])
    samples = [target ** (1 / exponent) for target in targets]
    widths = [optimal_width(BIASES[name], d, n, between=(200, 1e7)) for n in samples]
    slopes = [float("nan"), *np.diff(np.log(widths)) / np.diff(np.log(samples))]
    return [(n, w, float(s)) for n, w, s in zip(samples, widths, slopes, strict=True)]


def exponents(
    dimensions: Sequence[int] = (3, 5),
    targets: Sequence[float] = (1e4, 1e5, 1e6),
    offsets: dict[str, int] | None = None,
) -> ClaimFinding:
    """Is the exponent 2/(d + 3), 2/(d + 2), 2/(d + 1) for affine, rectified and worst-case functions?

    A slope counts as the exponent if it is within a quarter of the gap to the next one.

    Args:
        dimensions: d.
        targets: rough widths at which the slope is taken.
        offsets: class of functions to the number added to d; None for the claim's own.
    """
    claimed = _EXPONENTS if offsets is None else offsets
    rows, wrong, lines = [], "", []
    for d, (name, offset) in itertools.product(dimensions, claimed.items()):
        exponent = 2 / (d + offset)
        found = _slopes(name, d, targets)
        slope = found[-1][2]
        gap = abs(exponent - 2 / (d + offset + 1))
        fits = abs(slope - exponent) < gap / 4
        rows.append((d, name, exponent, found[1][2], slope, fits))
        lines += [(f"{name}, d = {d}", n, w) for n, w, _ in found]
        if not fits:
            wrong = wrong or f"d = {d}, {name}: slope {slope:.4f}, claimed {exponent:.4f}"
    worst = max(abs(row[4] - row[2]) for row in rows)
    return ClaimFinding(
        status="REFUTED" if wrong else "SUPPORTED",
        evidence=f"best width of the population error (Bessel functions; rectified: {DEGREES} harmonics by "
        "Funk–Hecke) "
        f"at w about {', '.join(f'{x:.0e}' for x in targets)}: largest distance of a slope from its exponent "
        f"{worst:.4f}" + (f"; {wrong}" if wrong else ""),
        table=columns(("d", "class", "exponent", "slope before", "last slope", "fits"), rows),
        plots=(
            Plot(
                "width of least error against n",
                "line",
                columns(("class", "n", "w*"), lines),
                "n",
                "w*",
                "class",
                ("n", "w*"),
            ),
        ),
        counterexample=wrong,
    )


def bounds(
    classes: Sequence[str] = ("affine", "rectified"), dimensions: Sequence[int] = (3, 5)
) -> ClaimFinding:
    """Are the exponents between 1/(d + 2) and 2/(d + 2)? Slopes of the population loss at w about 10^5.

    Args:
        classes: of functions.
        dimensions: d.
    """
    rows, wrong = [], ""
    for name, d in itertools.product(classes, dimensions):
        slope = _slopes(name, d, (1e4, 1e5))[-1][2]
        inside = 1 / (d + 2) <= slope <= 2 / (d + 2)
        rows.append((name, d, 1 / (d + 2), slope, 2 / (d + 2), inside))
        if not inside:
            wrong = wrong or f"{name}, d = {d}: exponent {slope:.4f} is above 2/(d + 2) = {2 / (d + 2):.4f}"
    return ClaimFinding(
        status="REFUTED" if wrong else "SUPPORTED",
        evidence=f"slopes of log w* in log n at w about 10^5: "
        f"{', '.join(f'{row[0]}, d = {row[1]}: {row[3]:.4f}' for row in rows)}; {wrong or 'all inside'}. "
        "The worst "
        "case of all Lipschitz functions has 2/(d + 1) and is outside",
        table=columns(("class", "d", "1/(d + 2)", "slope", "2/(d + 2)", "inside"), rows),
        counterexample=wrong,
    )


_LIMIT_PROOF: Final = (
    "The limits, for every d, by Hankel's expansion I_ν(w) = e^w/√(2πw)·(1 − (4ν² − 1)/(8w) + O(w⁻²)): with "
    "ν = d/2 − 1 the quotient I_{ν+1}/I_ν is 1 − (2ν + 1)/(2w) + O(w⁻²), 2ν + 1 = d − 1; and R = "
    "(w/4)^ν I_ν(2w)/(Γ(d/2)I_ν(w)²) ~ (w/4)^ν √(πw)/Γ(d/2) = c_d w^((d−1)/2)"
)


def asymptotics(
    dimensions: Sequence[int] = (2, 3, 5, 9), widths: Sequence[int] = (100, 1000, 10000), shift: int = 0
) -> ClaimFinding:
    """Are 1 − r ~ (d − 1)/(2w) and R ~ c_d w^((d−1)/2), with relative distances below d/(2w) and d²/w?

    Args:
        dimensions: d.
        widths: w.
        shift: added to the exponent of 2 in c_d.
    """
    rows, wrong = [], ""
    with _precision(256):
        for d, w in itertools.product(dimensions, widths):
            order = flint.arb(flint.fmpq(d - 2, 2))
            once, next_one, twice = (
                flint.arb(x).bessel_i(y, scaled=True) for x, y in ((w, order), (w, order + 1), (2 * w, order))
            )
            factor = (flint.arb(w) / 4) ** order * twice / (order + 1).gamma() / once**2
            c = flint.arb.pi().sqrt() / flint.arb(2) ** (d - 2 + shift) / flint.arb(flint.fmpq(d, 2)).gamma()
            direction = abs((1 - next_one / once) * flint.arb(2 * w) / (d - 1) - 1)
            power = abs(factor / (c * flint.arb(w) ** flint.arb(flint.fmpq(d - 1, 2))) - 1)
            inside = bool(direction < flint.arb(d) / (2 * w) and power < flint.arb(d * d) / w)
            rows.append((d, w, float(direction.abs_upper()), float(power.abs_upper()), inside))
            if not inside:
                wrong = (
                    wrong or f"d = {d}, w = {w}: R/(c_d w^((d−1)/2)) is {float(power.mid()):.3g} away from 1"
                )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"balls of 256 bits at d = {list(dimensions)}, w = {list(widths)}: "
        + (
            wrong
            or f"both ratios are 1 within d/(2w) and d²/w; in d = 3 R is w coth w, and c_3 = 1. "
            f"{_LIMIT_PROOF}"
        ),
        table=columns(("d", "w", "|2w(1 − r)/(d − 1) − 1|", "|R/(c_d w^((d−1)/2)) − 1|", "inside"), rows),
        counterexample=wrong,
    )


CLAIMS: Final = (
    Claim(
        id="ICL-1b",
        subject="in-context learning",
        title="bounds of the window",
        statement="(n L²/σ²)^(1/(d+2)) ≲ w ≲ (n L²/σ²)^(2/(d+2)) for the affine and the ReLU class "
        "(recalled).",
        source=_SOURCE + ", the theorem on affine and ReLU functions",
        kind="measurement",
        check=lambda lab: bounds(dimensions=lab.choose((3, 5), (2, 3, 4, 5, 7, 9))),
        control=lambda lab: bounds(("cone at the query",), (3,)),
    ),
    Claim(
        id="ICL-2a",
        subject="in-context learning",
        title="bias and variance of the kernel on a sphere",
        statement="For large w: 1 − I_(d/2)(w)/I_(d/2−1)(w) ~ (d − 1)/(2w), and E e^(2wt)/(E e^(wt))² ~ c_d "
        "w^((d−1)/2) with c_d = √π/(2^(d−2) Γ(d/2)).",
        source="derived, for the setting of " + _SOURCE,
        kind="enclosure",
        check=lambda lab: asymptotics(lab.choose((2, 3, 5, 9), tuple(range(2, 13)))),
        control=lambda lab: asymptotics((3,), shift=1),
    ),
    Claim(
        id="ICL-2b",
        subject="in-context learning",
        title="the exponent of the window, by class of functions",
        statement="w* grows as (n L²/σ²)^e with e = 2/(d + 3) for affine functions, 2/(d + 2) for functions "
        "with a "
        "kink, 2/(d + 1) for the worst Lipschitz function.",
        source="derived, for the setting of " + _SOURCE,
        kind="measurement",
        check=lambda lab: exponents(lab.choose((3, 5), (2, 3, 5, 9))),
        control=lambda lab: exponents((3,), (1e4, 1e5), {"affine": 2, "cone at the query": 3}),
    ),
)
