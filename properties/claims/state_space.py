"""Claims about time-invariant state space models: recurrence and convolution, discretisation, FFT.

Theory.md S4-1. Over the rationals a form equals another or does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.forms import hippo, state_space
from attnproof.properties.forms.base import Array, difference, filled
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "CLAIMS",
    "S4",
    "half_plane",
    "recurrence_is_convolution",
    "sampling",
    "systems",
    "transform_error",
]

SEED: Final = 41
S4: Final = (
    "Gu, Goel and Ré, Efficiently Modeling Long Sequences with Structured State Spaces, arXiv 2111.00396"
)
_BITS = 256
# At most this far apart may two enclosures of one number reach at 256 bits.
_NARROW = 1e-50

Convolve = Callable[[Array, Array], Array]
Discretise = Callable[[Array, Array, Any], tuple[Array, Array]]


def systems(rng: np.random.Generator) -> Iterator[tuple[str, Array, Array, Array, Any]]:
    """Name, A, B, C and Δ: LegS in rational coordinates, and matrices of no structure."""
    for size, delta in ((2, flint.fmpq(1)), (4, flint.fmpq(1, 10))):
        yield f"LegS, N = {size}", hippo.legs(size), rationals(rng, size) * 0 + 1, rationals(rng, size), delta
    for size, delta in ((3, flint.fmpq(1, 3)), (4, flint.fmpq(2))):
        yield (
            f"random, N = {size}",
            rationals(rng, size, size, denominator=5),
            rationals(rng, size),
            rationals(rng, size),
            delta,
        )


def recurrence_is_convolution(
    length: int = 16,
    convolve: Convolve = state_space.convolved,
    discretise: Discretise = state_space.bilinear,
) -> ClaimFinding:
    """Is y of the recurrence the convolution of u with CĀⁱB̄, number by number?"""
    rng = np.random.default_rng(SEED)
    rows, example = [], ""
    for name, A, B, C, delta in systems(rng):
        discrete = discretise(A, B, delta)
        u = rationals(rng, length)
        y, _ = state_space.recurrent(*discrete, C, u)
        found = convolve(state_space.kernel(*discrete, C, length), u)
        wrong = int(sum(a != b for a, b in zip(y, found, strict=True)))
        rows.append((name, str(delta), length, wrong, float(difference(y, found))))
        if wrong and not example:
            two = state_space.kernel(*discrete, C, 2)
            start = convolve(two, u[:2])
            example = (
                f"{name}, Δ = {delta}, u = ({u[0]}, {u[1]}), K = ({two[0]}, {two[1]}): the recurrence gives "
                f"({y[0]}, {y[1]}), the convolution ({start[0]}, {start[1]})"
            )
    titles = ("system", "Δ", "L", "outputs that differ", "largest difference")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"{length * len(rows)} rational outputs of {len(rows)} systems, bilinear rule: "
        f"{sum(row[3] for row in rows)} differ",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED,
    )


def half_plane(rule: str = "bilinear") -> ClaimFinding:
    """Does a discretisation map Re λ < 0 into |z| < 1 and nothing else? In Δλ/2 = a + ib."""
    ring = flint.fmpq_mpoly_ctx.get(("a", "b"), "lex")
    a, b = ring.gens()
    # z = numerator/denominator, each as its real and imaginary part.
    numerator, denominator = ((1 + a, b), (1 - a, -b)) if rule == "bilinear" else ((1 + 2 * a, 2 * b), (1, 0))
    margin = denominator[0] ** 2 + denominator[1] ** 2 - numerator[0] ** 2 - numerator[1] ** 2
    proved = margin == -4 * a
    rows, example = [], ""
    grid = [(re, im) for re in range(-8, 9) for im in range(9)]
    for re, im in sorted(grid, key=lambda p: abs(p[0]) + abs(p[1])):
        point = (flint.fmpq(re, 4), flint.fmpq(im, 4))
        left = margin(*point) > 0
        rows.append(left == (re < 0))
        if left != (re < 0) and re < 0 and not example:
            example = (
                f"Δλ = {2 * point[0]} + {2 * point[1]}i has a negative real part, and |denominator|² − "
                f"|numerator|² = {margin(*point)} ≤ 0, so that |z| ≥ 1 by the rule '{rule}'"
            )
    bad = rows.count(False)
    return ClaimFinding(
        status="HOLDS" if proved and not bad else "REFUTED",
        evidence=f"with Δλ/2 = a + ib, |denominator|² − |numerator|² of z is the polynomial {margin}"
        + (", which has the sign of −a" if proved else ", which has not the sign of −a everywhere")
        + f"; {bad} of {len(rows)} Gaussian rational points on the wrong side",
        table={
            "rule": [rule],
            "points": [len(rows)],
            "on the wrong side": [bad],
            "margin is −4a": [bool(proved)],
        },
        counterexample=example,
    )


def sampling(
    steps: tuple[tuple[int, int], ...] = ((1, 10), (1, 1), (3, 1)), *, hold: bool = True
) -> ClaimFinding:
    """Does the zero-order hold give the continuous state at the samples, for inputs constant in between?

    The continuous state over one step comes from another exponential, that of [[A, B], [0, 0]].
    """
    rows, example = [], ""
    with _precision(_BITS):
        for size in (2, 4):
            A = flint.arb_mat([[flint.arb(x) for x in row] for row in hippo.legs(size)])
            B = flint.arb_mat(size, 1, [flint.arb(1)] * size)
            one = flint.arb_mat(size, size, [int(i == j) for i in range(size) for j in range(size)])
            for p, q in steps:
                delta = flint.arb(flint.fmpq(p, q))
                decay = (A * delta).exp()
                gain = A.inv() * (decay - one) * B if hold else B * delta
                both = [[*row, flint.fmpq(1)] for row in hippo.legs(size)] + [[flint.fmpq(0)] * (size + 1)]
                whole = (flint.arb_mat(flint.fmpq_mat(both)) * delta).exp()
                # u changes from 1 to −2 to 5, the state carried along in both ways.
                x, z = flint.arb_mat(size, 1), flint.arb_mat(size + 1, 1)
                for u in (1, -2, 5):
                    x = decay * x + gain * u
                    z = whole * flint.arb_mat(size + 1, 1, [*z.entries()[:size], u])
                gaps = [s - t for s, t in zip(x.entries(), z.entries()[:size], strict=True)]
                most = max(float(gap.abs_upper()) for gap in gaps)
                apart = any(gap != 0 for gap in gaps)
                rows.append((size, f"{p}/{q}", most, apart))
                if apart and not example:
                    example = (
                        f"LegS of N = {size}, B = (1, …, 1), Δ = {p}/{q}, inputs 1, −2, 5: the first entry "
                        f"of the state is {z.entries()[0].str(10)}, the discrete recurrence gives "
                        f"{x.entries()[0].str(10)}"
                    )
    good = not example and all(row[2] < _NARROW for row in rows)
    titles = ("N", "Δ", "largest distance enclosed", "apart")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS" if good else "OPEN",
        evidence=f"LegS, three inputs, {len(rows)} pairs of N and Δ in balls of {_BITS} bits: states "
        + ("apart" if example else "agree")
        + f" by at most {max(row[2] for row in rows):.2g}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
    )


def _by_transform(taps: Array, u: Array, *, padded: bool) -> Array:
    """The convolution by numpy's float64 FFT, over 2L points or, wrongly, over L."""
    points = 2 * len(u) if padded else len(u)
    found: Array = np.fft.irfft(np.fft.rfft(taps, points) * np.fft.rfft(u, points), points)[: len(u)]
    return found


def transform_error(lengths: tuple[int, ...] = (64, 256, 1024), *, padded: bool = True) -> ClaimFinding:
    """Error of a convolution by FFT: within u·log₂(2L)·‖K‖‖u‖ absolutely, and relatively of small outputs?"""
    rng = np.random.default_rng(SEED)
    rows = []
    for length in lengths:
        # A decaying kernel, and an input that starts at 2^−80 and then is of size 1.
        taps = 0.9 ** np.arange(length) * rng.uniform(0.5, 1.0, length)
        u = rng.uniform(-1.0, 1.0, length)
        u[0] = 2.0**-80
        with _precision(_BITS):
            exact = state_space.convolved(
                filled((length,), map(flint.arb, taps)), filled((length,), map(flint.arb, u))
            )
            found = _by_transform(taps, u, padded=padded)
            errors = [
                float(abs(flint.arb(float(f)) - e).abs_upper()) for f, e in zip(found, exact, strict=True)
            ]
            first = errors[0] / float(exact[0].mid())
        # Higham 2002, theorem 24.2: one transform errs by log₂(n)·η in the 2-norm, η ≈ 7u; there are three.
        bound = 3 * np.log2(2 * length) * 7 * 2.0**-53 * float(np.linalg.norm(taps) * np.linalg.norm(u))
        rows.append((length, max(errors), float(bound), max(errors) / float(bound), first))
    within, lost = all(row[3] <= 1 for row in rows), all(row[4] > 1 for row in rows)
    titles = ("L", "largest error", "bound", "share of the bound", "relative error of y_0 = K_0·2^−80")
    worst = max(rows, key=lambda row: row[3])
    return ClaimFinding(
        status="SUPPORTED" if within and lost else "REFUTED",
        evidence=f"float64, L = {list(lengths)}, against balls of {_BITS} bits: largest share of the bound "
        f"{worst[3]:.3g}; the first output, exactly K_0·2^−80, has a relative error of at least "
        f"{min(row[4] for row in rows):.2g}: later inputs reach it by rounding",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=""
        if within
        else f"L = {worst[0]}, FFT of {'2L' if padded else 'L'} points: error {worst[1]:.3g}, bound "
        f"{worst[2]:.3g}",
        seed=SEED,
    )


CLAIMS: Final = (
    Claim(
        id="S4-1a",
        subject="state space models",
        title="recurrence is convolution",
        statement="A time-invariant SSM x_t = Āx_{t−1} + B̄u_t, y_t = Cx_t is the causal convolution of u "
        "with K̄_i = CĀⁱB̄, as long as the input, and not a circular one; discretised by the bilinear rule.",
        source=f"{S4}, section 2.3, equations 3 to 5",
        kind="exact",
        check=lambda lab: recurrence_is_convolution(lab.choose(12, 32)),
        control=lambda lab: recurrence_is_convolution(6, state_space.wrapped),
        covers=("S4-1", "SEED1-8"),
    ),
    Claim(
        id="S4-1b",
        subject="state space models",
        title="the bilinear rule keeps stability",
        statement="z = (1 + Δλ/2)/(1 − Δλ/2) lies in |z| < 1 exactly where Re λ < 0, at every step Δ > 0.",
        source=f"{S4}, section 2.3 (the rule); the map is classical",
        kind="exact",
        check=lambda lab: half_plane("bilinear"),
        control=lambda lab: half_plane("euler"),
    ),
    Claim(
        id="S4-1c",
        subject="state space models",
        title="zero-order hold samples exactly",
        statement="Ā = e^(ΔA), B̄ = A⁻¹(e^(ΔA) − I)B give the continuous state at the samples for an input "
        "that is constant in between, at every Δ.",
        source="Gu and Dao, Mamba, arXiv 2312.00752, section 2, equation 4",
        kind="enclosure",
        check=lambda lab: sampling(lab.choose(((1, 10), (1, 1)), ((1, 10), (1, 1), (3, 1), (10, 1)))),
        control=lambda lab: sampling(((1, 1),), hold=False),
    ),
    Claim(
        id="S4-1d",
        subject="state space models",
        title="error of the convolution by FFT",
        statement="By a zero-padded FFT the convolution errs by at most 21·u·log₂(2L)·‖K‖‖u‖, absolutely: "
        "outputs that are small beside ‖K‖‖u‖ have no correct digit, and depend on later inputs.",
        source=f"{S4}, section 2.4 (convolution by FFT); the bound from Higham 2002, theorem 24.2",
        kind="measurement",
        check=lambda lab: transform_error(lab.choose((64, 256), (64, 256, 1024), (64, 256, 1024, 4096))),
        control=lambda lab: transform_error((64,), padded=False),
    ),
)
