"""Claims about the Jacobian of sigmoid self-attention, and worst cases of softmax held beside it.

Norms are enclosed in Arb (:mod:`attnproof.properties.claims.jacobian_norms`). SIG-5, SIG-6; Ramapuram et al.,
arXiv 2409.04431, Theorem 3.2 (recalled).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import flint

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.jacobian_norms import (
    Bound,
    Instance,
    Quantities,
    Weighting,
    climbed,
    enclosed_ratio,
    exp,
    two_groups,
)
from attnproof.properties.claims.sigmoid import PAPER, SUBJECT, weight

__all__ = [
    "CLAIMS",
    "attained",
    "bounded",
    "exponential_growth",
    "globally_lipschitz",
    "lower_bound",
    "smaller_than_softmax",
    "without_length",
]

_BITS = 192
_SEED = 7


def attained(q: Quantities) -> object:
    """n‖W‖(max σ + 2 max σ'·‖A‖·mean‖x‖²)."""
    return q.w * (q.n * q.weight + 2 * q.slope * q.a * q.total)


def _once(q: Quantities) -> object:
    """The same with one of the two terms of the derivative of the logits."""
    return q.w * (q.n * q.weight + q.slope * q.a * q.total)


def without_length(q: Quantities) -> object:
    """‖W‖e^μ(1 + 2‖A‖·mean‖x‖²), μ the largest |logit|."""
    return q.w * exp(q.logit) * (1 + 2 * q.a * q.total / q.n)


def _without_logits(q: Quantities) -> object:
    """The same without e^μ."""
    return q.w * (1 + 2 * q.a * q.total / q.n)


def bounded(
    bound: Bound, weighting: Weighting = "sigmoid", starts: int = 12, steps: int = 25, seed: int = _SEED
) -> ClaimFinding:
    """Does ‖J‖ keep a bound? Norms enclosed where a climb made them largest against the bound.

    Args:
        bound: of the quantities of an instance; weighting: whose Jacobian; starts, steps, seed:
            of the climbs.
    """
    rows, broken, within = [], [], 0
    for instance in climbed(weighting, bound, starts, steps, seed):
        ratio = enclosed_ratio(instance, weighting, bound)
        within += bool(ratio < 1)
        rows.append((*instance.x.shape, float(ratio.mid()), float(ratio.rad())))
        if ratio > 1:
            broken.append((instance, ratio))
    smallest = min(broken, key=lambda case: case[0].x.size, default=None)
    titles = ("n", "d", "norm over bound", "radius")
    return ClaimFinding(
        status="REFUTED" if broken else "SUPPORTED",
        evidence=f"{starts} climbs of {steps} steps from random x, A, W (seed {seed}), norms enclosed in "
        f"Arb: largest ratio to the bound {max(row[2] for row in rows):.12f}; {within} proved below 1, "
        f"{len(broken)} above",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="" if smallest is None else _told(*smallest),
        seed=seed,
    )


def _told(instance: Instance, ratio: flint.arb) -> str:
    numbers = "\n".join(f"{name} = {value.tolist()}" for name, value in vars(instance).items())
    return f"{numbers}\nnorm over bound in {ratio.str(12)}"


def globally_lipschitz(
    slope: Fraction = Fraction(2, 9), radii: Sequence[int] = (1, 10, 100, 1000)
) -> ClaimFinding:
    """Is the Jacobian bounded over all inputs? At tokens x_1 = 0 and x_2 = R, with A = W = 1, exactly.

    There all logits of the first token are 0, and ∂y_1/∂x_1 = σ + σ'·R² at −log 2, where σ = 1/3, σ' = 2/9.

    Args:
        slope: σ'(−log 2); radii: R.
    """
    entries = [weight(1, 2) + slope * r * r for r in radii]
    unbounded = all(b > 10 * a for a, b in zip(entries, entries[1:], strict=False))
    told = ", ".join(f"{x} at R = {r}" for r, x in zip(radii, entries, strict=True))
    return ClaimFinding(
        status="REFUTED" if unbounded else "SUPPORTED",
        evidence=f"∂y_1/∂x_1 at tokens 0 and R: {told}",
        table={"R": list(radii), "∂y_1/∂x_1": [float(x) for x in entries]},
        counterexample="n = 2, d = 1, A = W = 1, b = −log 2, x = (0, R): ∂y_1/∂x_1 = σ + σ'·R² = 1/3 + "
        f"{slope}·R², {entries[-1]} at R = {radii[-1]}; no constant bounds it"
        if unbounded
        else "",
    )


def _crowd(radius: flint.arb) -> int:
    """⌈e^(R²/4)⌉ tokens at R/2. Raises ArithmeticError where the ball does not decide it."""
    found = (radius * radius / 4).exp().ceil().unique_fmpz()
    if found is None:
        raise ArithmeticError(f"⌈e^(R²/4)⌉ is not decided for R in {radius}; give a narrower ball")
    return int(found)


def _tail_is_positive(factor: Fraction) -> bool:
    """Whether the column of R alone has ``factor`` times the norm claimed for every R² ≥ 2, as polynomials.

    With s = R²/4, t = e^s and ⌈t⌉ = t(1 + δ), 0 ≤ δ ≤ 1, the square of the column's norm over the bound's is
    4(1 + δ)(2 + δ + (1 + δ)s)²/((2 + δ)⁴(1 + s/2)²). The difference of both sides in powers of s − 1/2 must
    have Bernstein coefficients ≥ 0 over δ in [0, 1].
    """
    delta = flint.fmpq_poly([0, 1])
    one, two = 1 + delta, 2 + delta
    fourth = two**4 * (flint.fmpq(factor.numerator, factor.denominator) ** 2)
    c0, c1, c2 = 4 * one * two**2 - fourth, 8 * one**2 * two - fourth, 4 * one**3 - fourth / 4
    return all(min(_bernstein(c)) >= 0 for c in (c2, c1 + c2, c0 + c1 / 2 + c2 / 4))


def _bernstein(polynomial: flint.fmpq_poly) -> list[flint.fmpq]:
    """Coefficients over [0, 1] in the Bernstein basis: none negative, the polynomial is not."""
    n = polynomial.degree()
    choose = flint.fmpz.bin_uiui
    return [
        sum((polynomial[i] * flint.fmpq(choose(j, i), choose(n, i)) for i in range(j + 1)), flint.fmpq(0))
        for j in range(n + 1)
    ]


def lower_bound(
    factor: Fraction = Fraction(1), radii: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
) -> ClaimFinding:
    """Is ‖J‖ ≥ (½ + R²/16)e^(R²/8) for softmax at ⌈e^(R²/4)⌉ tokens R/2 and one token R, for every R?

    R < 1.42 by balls of width 1/64, R² ≥ 2 by polynomials of the column of R, whose entries are compared with
    P(1 + (1 − P)R²/4), P = 1/(1 + ⌈e^(R²/4)⌉e^(−R²/4)), at the listed R.

    Args:
        factor: of the bound; radii: R of the table.
    """
    rows, below, known = [], [], []
    with _precision(_BITS):
        for r in radii:
            radius, copies = flint.arb(r), _crowd(flint.arb(r))
            norm, entry = two_groups(radius / 2, radius, (copies, 1), "softmax")
            bound = _claimed(radius, factor)
            share = 1 / (1 + copies * (-radius * radius / 4).exp())
            known.append(
                entry.overlaps(share * (1 + (1 - share) * radius * radius / 4)) and bool(norm >= bound)
            )
            rows.append((r, float(copies), float(norm.mid()), float(bound.mid())))
            if norm < bound:
                below.append((r, copies, norm, bound))
        near = [_near_zero(flint.arb(k).union(flint.arb(k + 1)) / 64, factor) for k in range(91)]
    proved = all(known) and all(near) and _tail_is_positive(factor)
    titles = ("R", "tokens at R/2", "norm of the Jacobian", "bound")
    columns = {title: [row[i] for row in rows] for i, title in enumerate(titles)}
    return ClaimFinding(
        status="REFUTED" if below else ("HOLDS" if proved else "OPEN"),
        evidence="; ".join(f"R = {r}: {norm:.6g} for {bound:.6g}" for r, _, norm, bound in rows)
        + f". {sum(near)} of {len(near)} balls up to R = 91/64 are above the bound; from R² = 2 on the "
        "sign of polynomials in δ = ⌈t⌉/t − 1 and R²/4, t = e^(R²/4), "
        f"{'decides' if proved else 'does not decide'}",
        table=dict(columns),
        plots=(
            Plot(
                "norm of softmax's Jacobian at ⌈e^(R²/4)⌉ + 1 tokens, more for larger R",
                "line",
                dict(columns),
                "R",
                titles[2],
                log=(titles[2],),
            ),
        ),
        counterexample="; ".join(
            f"R = {r}, {copies} tokens R/2 and one R: norm {norm.str(10)} below {bound.str(10)}"
            for r, copies, norm, bound in below[:1]
        ),
    )


def _claimed(radius: flint.arb, factor: Fraction) -> flint.arb:
    """factor·(½ + R²/16)e^(R²/8)."""
    square = radius * radius
    return (8 + square) / 16 * (square / 8).exp() * factor.numerator / factor.denominator


def _near_zero(radius: flint.arb, factor: Fraction) -> bool:
    """Whether the bound holds at every R > 0 of a ball, where two tokens are at R/2."""
    assert (radius * radius / 4).exp() < 2
    norm, _ = two_groups(radius / 2, radius, (2, 1), "softmax")
    return bool(norm > _claimed(radius, factor))


def exponential_growth(
    counts: Sequence[int] = (2, 16, 256, 4096, 2**16, 2**32, 2**64), tokens: int | None = None
) -> ClaimFinding:
    """Does sigmoid attention's ‖J‖ grow as e^(R²)/2? At n equal tokens R with R² = log n, b = −log n.

    All logits are log n, σ = 1/2 and σ' = 1/4: all entries are ½ + R²/4, those on the diagonal have n·R²/4
    more, and ‖J‖ = (n/2)(1 + log n). Softmax attention has ‖J‖ = 1 there.

    Args:
        counts: n, which sets R; tokens: how many there are, if not n.
    """
    rows, kept = [], []
    with _precision(_BITS):
        for n in counts:
            radius = flint.arb(n).log().sqrt()
            norm, softmax = (
                two_groups(radius, radius, (tokens or n, 0), which)[0] for which in ("sigmoid", "softmax")
            )
            exact = flint.arb(n) / 2 * (1 + flint.arb(n).log())
            kept.append(bool(norm > flint.arb(n) / 2) and norm.overlaps(exact))
            rows.append((float(radius.mid()), float(tokens or n), float(norm.mid()), float(softmax.mid())))
    titles = ("R", "n", "norm, sigmoid", "norm, softmax")
    columns = {title: [row[i] for row in rows] for i, title in enumerate(titles)}
    return ClaimFinding(
        status="REFUTED" if all(kept) else "SUPPORTED",
        evidence="n equal tokens R, A = W = 1, norms enclosed: "
        + "; ".join(f"R = {r:.4f}, n = {n:.6g}: {norm:.6g}, softmax {other:g}" for r, n, norm, other in rows)
        + f"; (n/2)(1 + log n) in {sum(kept)} of {len(kept)}. At a fixed n the norm is at most n(1 + "
        "mean‖x‖²/2)",
        table=dict(columns),
        plots=(
            Plot(
                f"norm of sigmoid's Jacobian at {tokens or 'n = e^(R²), more for larger R,'} tokens",
                "line",
                dict(columns),
                "R",
                titles[2],
                log=(titles[2],),
            ),
        ),
        counterexample="n equal tokens R = √log n, d = 1, A = W = 1, b = −log n: all logits are log n, σ = "
        "1/2, σ' = 1/4.\n∂y_i/∂x_j = 1/2 + R²/4, plus n·R²/4 where i = j: on (1, …, 1) the Jacobian is the "
        "factor\n"
        f"(n/2)(1 + log n) = (1 + R²)e^(R²)/2. n = {counts[0]}: {rows[0][2]:.6f}; n = {counts[2]}: "
        f"{rows[2][2]:.6g}"
        if all(kept)
        else "",
    )


def smaller_than_softmax(factor: Fraction = Fraction(1)) -> ClaimFinding:
    """Is the Jacobian of sigmoid attention smaller than softmax's? At sets of scalar tokens, W = 1, |A| = 1.

    Args:
        factor: of the output of sigmoid attention.
    """
    rows = []
    with _precision(_BITS):
        one, two = flint.arb(4).log().sqrt(), flint.arb(2)
        sets = [
            ("one token √log 4, A = 1", one, one, (1, 0), 1),
            ("63 tokens 2 and one −2, A = 1", two, -two, (63, 1), 1),
        ]
        for r in (2, 4, 6):
            crowd, radius = _crowd(flint.arb(r)), flint.arb(r)
            sets.append((f"{crowd} tokens {r // 2} and one {r}, A = 1", radius / 2, radius, (crowd, 1), 1))
        for r in (2, 3, 4):
            crowd = _crowd(2 * flint.arb(r * (r + 1)).sqrt())
            sets.append(
                (f"{crowd} tokens {r} and one −1, A = −1", flint.arb(r), -flint.arb(1), (crowd, 1), -1)
            )
        for name, a, b, copies, sign in sets:
            sigmoid, softmax = (two_groups(a, b, copies, w, sign)[0] for w in ("sigmoid", "softmax"))
            sigmoid = sigmoid * factor.numerator / factor.denominator
            order = "smaller" if sigmoid < softmax else ("larger" if sigmoid > softmax else "not decided")
            rows.append((name, float(sigmoid.mid()), float(softmax.mid()), order))
    found = {row[3] for row in rows}
    status = "CONDITIONAL"
    if found == {"smaller"}:
        status = "SUPPORTED"
    elif "smaller" not in found:
        status = "REFUTED"
    titles = ("tokens", "norm, sigmoid", "norm, softmax", "sigmoid's is")
    return ClaimFinding(
        status=status,
        evidence="norms enclosed, sigmoid and softmax: "
        + "; ".join(f"{name}: {a:.6g} and {b:.6g}" for name, a, b, _ in rows)
        + ". Which is smaller depends on the tokens; what the paper compares are bounds of worst cases",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="one token x = √log 4, d = 1, A = W = 1: softmax attention is y = x, derivative 1;\n"
        "sigmoid attention is y = σ(x²)x, σ = 4/5, derivative σ + 2x²σ(1 − σ) = 4/5 + (8/25)·log 4 = 1.2436…"
        if status != "SUPPORTED"
        else "",
    )


CLAIMS: Final = (
    Claim(
        id="SIG-5a",
        subject=SUBJECT,
        title="bound of the Jacobian",
        statement="The Jacobian of sigmoid self-attention has ‖J‖ ≤ n‖W_v‖(‖σ_b‖∞ + "
        "2‖σ_b'‖∞‖A‖·mean‖x_i‖²), suprema over the logits attained, A = W_qᵀW_k/√d.",
        source=f"{PAPER}, Theorem 3.2 (recalled; this form derived)",
        kind="search",
        check=lambda lab: bounded(attained, "sigmoid", *lab.choose((12, 25), (60, 100))),
        control=lambda lab: bounded(_once),
        covers=("SIG-5",),
    ),
    Claim(
        id="SIG-5b",
        subject=SUBJECT,
        title="bound of the Jacobian without n",
        statement="With b = −log n and |logits| ≤ μ the Jacobian of sigmoid self-attention has ‖J‖ ≤ "
        "‖W_v‖e^μ(1 + 2‖A‖·mean‖x_i‖²), whatever n.",
        source=f"{PAPER}, Theorem 3.2 (recalled; this form derived)",
        kind="search",
        check=lambda lab: bounded(without_length, "sigmoid", *lab.choose((12, 25), (60, 100))),
        control=lambda lab: bounded(_without_logits),
    ),
    Claim(
        id="SIG-5c",
        subject=SUBJECT,
        title="Lipschitz on all inputs",
        statement="Sigmoid self-attention is Lipschitz, without a bound on the tokens.",
        source=f"{PAPER}, on regularity, read without its conditions",
        kind="exact",
        check=lambda lab: globally_lipschitz(),
        # Weights that do not depend on the tokens.
        control=lambda lab: globally_lipschitz(Fraction(0)),
    ),
    Claim(
        id="SIG-6a",
        subject=SUBJECT,
        title="worst case of softmax",
        statement="Softmax self-attention on tokens of [0, R] has Jacobians of norm (½ + R²/16)e^(R²/8) "
        "and more for every R > 0: at ⌈e^(R²/4)⌉ tokens R/2 and one token R.",
        source=f"Castin et al., arXiv 2312.14820, as cited by {PAPER}; construction derived",
        kind="enclosure",
        check=lambda lab: lower_bound(),
        # Twice the bound.
        control=lambda lab: lower_bound(Fraction(2)),
        covers=("SIG-6",),
    ),
    Claim(
        id="SIG-6b",
        subject=SUBJECT,
        title="worst case of sigmoid",
        statement="The Jacobian of sigmoid self-attention with b = −log n grows polynomially in the radius "
        "R of the tokens whatever n, where softmax's grows as e^(cR²).",
        source=f"{PAPER}, remarks after Theorem 3.2 (recalled)",
        kind="enclosure",
        check=lambda lab: exponential_growth(),
        # At a fixed number of tokens the growth is polynomial.
        control=lambda lab: exponential_growth(tokens=5),
    ),
    Claim(
        id="SIG-6c",
        subject=SUBJECT,
        title="sigmoid's Jacobian against softmax's",
        statement="The Jacobian of sigmoid self-attention with b = −log n is smaller than that of softmax "
        "self-attention.",
        source=f"{PAPER}, remarks after Theorem 3.2 (recalled), read input by input",
        kind="enclosure",
        check=lambda lab: smaller_than_softmax(),
        control=lambda lab: smaller_than_softmax(Fraction(1, 1000)),
    ),
)
