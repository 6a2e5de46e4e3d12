"""Claims about in-context learning: low-rank tasks, and what linear attention cannot do.

Setting and source: Collins et al., arXiv 2402.11639, as in :mod:`attnproof.properties.claims.in_context`;
here the scores are x_iᵀMq with a matrix M.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import flint
import numpy as np
from scipy import integrate

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.forms.base import Array, filled
from attnproof.properties.forms.kernel_window import Floats, sphere, variance_factor
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "CLAIMS",
    "adapting",
    "even_functions",
    "langevin_floor",
    "noise_factor",
    "projected_matrix",
    "projection_losses",
]

_SOURCE: Final = "Collins et al., arXiv 2402.11639"
_TIMES: Final = (0.0, 0.25, 0.5, 1.0)
"""M = w(BBᵀ + times · (I − BBᵀ)): the matrix that is claimed, two between, and w I."""

Domain = Literal["sphere", "two spheres"]


def _window_factor(d: int, w: float, at: float = 0.5) -> float:
    """E e^(−w(b − at)²)/(E e^(−w(b − at)²/2))² for one coordinate b of a point on the sphere in ℝ^d."""

    def mean(rate: float) -> float:
        reach = 12 / np.sqrt(rate)
        ends = (max(-1.0, at - reach), min(1.0, at + reach))
        density = lambda b: (1 - b * b) ** ((d - 3) / 2) * np.exp(-rate * (b - at) ** 2)  # noqa: E731
        whole = integrate.quad(lambda b: (1 - b * b) ** ((d - 3) / 2), -1, 1)[0]
        return float(integrate.quad(density, *ends)[0]) / float(whole)

    return mean(w) / mean(w / 2) ** 2


def noise_factor(
    settings: Sequence[tuple[int, int]] = ((3, 1), (6, 1), (6, 2)), *, window: bool = False
) -> ClaimFinding:
    """Does n Σ p_i² grow as w^(k/2) for M = w BBᵀ? Slope between w = 10⁴ and 10⁶ at |Bᵀq| = 1/2.

    x·BBᵀq is |Bᵀq| times one coordinate of x, so the factor is R(w |Bᵀq|), whatever k is: exactly.

    Args:
        settings: d and k.
        window: with weights e^(−w |Bᵀ(x − q)|²/2), which look for Bᵀx near Bᵀq, in place of softmax's; k = 1.
    """
    rows, wrong = [], ""
    for d, k in settings:
        of: Callable[[int, float], float] = (
            _window_factor if window else lambda d, w: variance_factor(d, w / 2)
        )
        slope = float(np.log(of(d, 1e6) / of(d, 1e4)) / np.log(100))
        rows.append((d, k, k / 2, slope, (d - 1) / 2))
        if abs(slope - k / 2) > 0.01:
            wrong = wrong or f"d = {d}, k = {k}: exponent {slope:.4f}, claimed {k / 2}"
    exact = (
        "d = 3, k = 1, Bᵀq = 1/2: x·BBᵀq = b/2 with b = Bᵀx uniform on [−1, 1] (Archimedes).\n"
        "E e^(w b) = sinh(w)/w and E e^(w b/2) = 2 sinh(w/2)/w, so the factor is\n"
        "(sinh(w)/w)/(2 sinh(w/2)/w)² = (w/2) coth(w/2): it grows as w, not as √w."
    )
    return ClaimFinding(
        status="REFUTED" if wrong else "SUPPORTED",
        evidence=("; ".join(f"d = {d}, k = {k}: slope {s:.4f}" for d, k, _, s, _ in rows))
        + ". The weights do not look for Bᵀx near Bᵀq: they pull Bᵀx to the far end in the direction of Bᵀq",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("d", "k", "k/2", "slope in w", "(d − 1)/2"))
        },
        counterexample=exact if wrong else "",
    )


def projection_losses(
    domain: Domain, d: int, k: int, samples: int, prompts: int, seed: int, noise: float = 0.1
) -> Floats:
    """Mean squared errors (prompts, matrices, widths) for f = a·Bᵀx, |a| = 1 in a random direction.

    Args:
        domain: x uniform on the sphere, or Bᵀx and the rest uniform on spheres of radius 1/√2 each.
        d, k: dimensions of x and of Bᵀx (B: the first k axes).
        samples: n.
        prompts: drawn.
        seed: of them.
        noise: σ.
    """
    rng = np.random.default_rng(seed)
    widths = np.geomspace(2, 120, 13)

    def drawn(*shape: int) -> Floats:
        if domain == "sphere":
            return sphere(rng, *shape, d)
        both = np.concatenate([sphere(rng, *shape, k), sphere(rng, *shape, d - k)], axis=-1)
        return np.asarray(both / np.sqrt(2))

    losses = np.empty((prompts, len(_TIMES), len(widths)))
    for i in range(prompts):
        x, q = drawn(samples), drawn()
        inside, outside = x[:, :k] @ q[:k], x[:, k:] @ q[k:]
        for j, times in enumerate(_TIMES):
            scores = inside + times * outside
            p = np.exp(np.outer(widths, scores - scores.max()))
            p /= p.sum(axis=1, keepdims=True)
            error = ((p @ x[:, :k] - q[:k]) ** 2).sum(axis=1) / k
            losses[i, j] = error + noise**2 * (p**2).sum(axis=1)
    return losses


def langevin_floor(steps: int = 96) -> tuple[float, float]:
    """Lower bound, over all w, of ∫₀¹ (coth(wρ) − 1/(wρ) − ρ)² dρ, and 1/(3·32²): both proved, d = 3, k = 1.

    The first is the error of M = w BBᵀ without noise as n → ∞ (ρ = |Bᵀq| is uniform); the second is above
    that of M = 32 I, (1 − coth 32 + 1/32)²/3. Boxes of w and ρ: the function increases in both.
    """
    with _precision(128):
        # Below 1/4 the function is under wρ/3 ≤ ρ/12; beyond 64 the last row is a lower bound of it.
        ratio = flint.fmpq(2 * steps + 9, 2 * steps)
        grid = [flint.fmpq(1, 4)]
        while grid[-1] < 64:
            scaled = (grid[-1] * ratio * 2**20).floor()
            grid.append(flint.fmpq(scaled, 2**20))

        def langevin(x: Any) -> Any:
            ball = flint.arb(x)
            return ball.coth() - 1 / ball if x > 0 else flint.arb(0)

        table = [[langevin(w * flint.fmpq(j, steps)) for j in range(steps + 1)] for w in grid]
        floors = [flint.arb(flint.fmpq(121, 432))]
        for i in range(len(grid)):
            total = flint.arb(0)
            for j in range(steps):
                low = table[i][j]
                high = table[i + 1][j + 1] if i + 1 < len(grid) else flint.arb(1)
                gap = (low - flint.fmpq(j + 1, steps)).max(flint.fmpq(j, steps) - high).max(flint.arb(0))
                total += gap.lower() ** 2 if gap > 0 else 0
            floors.append(total / steps)
        least = min((floor.lower() for floor in floors), key=float)
        return float(least), float((flint.arb(1) / 3 / 1024).upper())


def _ratio(losses: Floats, seed: int) -> tuple[float, float, float]:
    """Best error of w I over best error of w BBᵀ, with a 95 % bootstrap interval over prompts."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(losses), (300, len(losses)))
    best = losses[picks].mean(axis=1).min(axis=-1)
    low, high = np.percentile(best[:, -1] / best[:, 0], [2.5, 97.5])
    centre = losses.mean(axis=0).min(axis=-1)
    return float(centre[-1] / centre[0]), float(low), float(high)


def projected_matrix(
    domain: Domain = "sphere", runs: Sequence[tuple[int, int]] = ((100, 60), (1000, 30), (10000, 12))
) -> ClaimFinding:
    """Is M ∝ BBᵀ better than w I, for functions of one coordinate on a sphere or of two on a pair of them?

    Args:
        domain: see :func:`projection_losses`.
        runs: n and prompts.
    """
    d, k = (6, 1) if domain == "sphere" else (4, 2)
    rows = []
    for n, prompts in runs:
        losses = projection_losses(domain, d, k, n, prompts, 71)
        best = losses.mean(axis=0).min(axis=-1)
        rows.append((n, *map(float, best), *_ratio(losses, 72)))
    helps = [n for n, *_, low, _ in rows if low > 1]
    hurts = [n for n, *_, high in rows if high < 1]
    text = "; ".join(f"n = {row[0]}: {row[-3]:.3g} ({row[-2]:.3g} to {row[-1]:.3g})" for row in rows)
    floor, full = langevin_floor() if domain == "sphere" else (0.0, 0.0)
    stays = floor > full
    status = "SUPPORTED" if len(helps) == len(rows) and not stays else "CONDITIONAL" if helps else "REFUTED"
    limit = (
        f"As n → ∞ without noise in d = 3, k = 1 every w BBᵀ has an error ≥ {floor:.4f} (balls), 32 I one ≤ "
        f"{full:.6f}"
        if domain == "sphere"
        else "With |Bᵀx| constant the bias of w BBᵀ is that of w I, and its noise factor lacks the other "
        "sphere's ≥ 1"
    )
    failing = (
        "x uniform on the sphere in ℝ³, f = a x_1, no noise, n → ∞. With M = w BBᵀ the weights depend on "
        "x_1 only and\n"
        "predict a sign(q_1) r(w|q_1|), r(t) = coth t − 1/t; ρ = |q_1| is uniform on [0, 1]. No w makes "
        "r(wρ) = ρ for\n"
        f"all ρ: the mean square is ≥ {floor:.4f} for every w. M = w I predicts a q_1 r(w), of error (1 − "
        "r(w))²/3 =\n"
        "1/(3w²) → 0. So M ∝ BBᵀ is not the best for large n. Condition: |Bᵀx| constant, or n small."
    )
    return ClaimFinding(
        status=status,
        evidence=f"{domain}, d = {d}, k = {k}, σ = 0.1: best error of w I over best error of w BBᵀ (seed "
        "71, 95 % "
        f"bootstrap): {text}; above 1 at n = {helps}, below at {hurts}. {limit}",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(
                (
                    "n",
                    *(f"best error, w(BBᵀ + {times}(I − BBᵀ))" for times in _TIMES),
                    "w I over w BBᵀ",
                    "from",
                    "to",
                )
            )
        },
        plots=(
            Plot(
                "best error against n",
                "line",
                {
                    "n": [row[0] for row in rows for _ in _TIMES],
                    "error": [row[1 + j] for row in rows for j in range(len(_TIMES))],
                    "share of I − BBᵀ": [str(times) for _ in rows for times in _TIMES],
                },
                "n",
                "error",
                "share of I − BBᵀ",
                ("n", "error"),
            ),
        ),
        counterexample=failing if status == "CONDITIONAL" else "",
        seed=71,
    )


def _on_the_sphere(points: Array) -> Array:
    """Rational points of the sphere (count, d + 1) from rational ones (count, d): inverse stereographic."""
    rows = []
    for y in points:
        norm = sum(c * c for c in y)
        rows.append([2 * c / (norm + 1) for c in y] + [(norm - 1) / (norm + 1)])
    return np.array(rows, dtype=object)


def _design(d: int) -> Array:
    """±e_1 … ±e_d."""
    identity = np.array([[flint.fmpq(int(i == j)) for j in range(d)] for i in range(d)], dtype=object)
    return np.concatenate([identity, -identity])


def _linear(x: Array, y: Array, M: Array, q: Array) -> Any:
    """Σ_i y_i x_iᵀ M q."""
    return (y @ x) @ (M @ q)


def even_functions(trials: int = 20, f: Callable[[Array], Any] = lambda x: abs(x[0])) -> ClaimFinding:
    """Is linear attention's error at ±q never below 2f²? Random rational prompts, and ±e_j with M = I/2.

    Args:
        trials: random prompts of 7 points on the sphere in ℝ³, random M.
        f: the function learnt, |x_1| for one.
    """
    rng = np.random.default_rng(73)
    half = np.array([[flint.fmpq(int(i == j), 2) for j in range(3)] for i in range(3)], dtype=object)
    prompts = [(_design(3), half)] + [
        (_on_the_sphere(rationals(rng, 7, 2)), rationals(rng, 3, 3)) for _ in range(trials)
    ]
    rows, wrong = [], ""
    for trial, (x, M) in enumerate(prompts):
        y = filled((len(x),), map(f, x))
        q = _on_the_sphere(rationals(rng, 1, 2))[0]
        error = sum((f(s * q) - _linear(x, y, M, s * q)) ** 2 for s in (1, -1))
        bound = 2 * f(q) ** 2
        same = error == bound + 2 * _linear(x, y, M, q) ** 2
        rows.append((trial, float(error.p) / float(error.q), float(bound.p) / float(bound.q), bool(same)))
        if error < bound and not wrong:
            where = "±e_1, ±e_2, ±e_3 with M = I/2" if trial == 0 else f"random prompt {trial}"
            wrong = (
                f"{where}, q = ({', '.join(map(str, q))}): squared errors at ±q add up to {error} < {bound}"
            )
    # E x_1² = 1/d, since the d coordinates' squares add up to 1.
    return ClaimFinding(
        status="REFUTED" if wrong or not all(row[3] for row in rows) else "HOLDS",
        evidence=f"{len(rows)} rational prompts, exact: the prediction is odd in q, so (f − h)² + (f + h)² "
        "= 2f² + 2h² "
        f"≥ 2f² for even f: {'fails, ' + wrong if wrong else 'all equal'}. For f = |x_1| on the sphere in "
        "ℝ³ the "
        "error is ≥ E x_1² = 1/3, whatever M and n are",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("prompt", "error at q and −q", "2 f(q)²", "= 2f² + 2h²"))
        },
        counterexample=wrong,
        seed=73,
    )


def adapting(constants: Sequence[int] = (1, 3, 100), *, even: bool = False) -> ClaimFinding:
    """Does one M serve affine functions of every Lipschitz constant? On ±e_j, without noise, exactly.

    Args:
        constants: L.
        even: with L |a·x| in place of L a·x.
    """
    rng = np.random.default_rng(74)
    x, M = (
        _design(3),
        np.array([[flint.fmpq(int(i == j), 2) for j in range(3)] for i in range(3)], dtype=object),
    )
    a = np.array([flint.fmpq(2, 3), flint.fmpq(-1, 3), flint.fmpq(2, 3)], dtype=object)
    rows = []
    for L, q in itertools.product(constants, _on_the_sphere(rationals(rng, 4, 2))):
        along = [abs(a @ z) if even else a @ z for z in (*x, q)]
        *labels, exact_value = (L * value for value in along)
        error = abs(exact_value - _linear(x, filled((len(x),), labels), M, q))
        rows.append((L, float(error.p) / float(error.q), bool(error == 0)))
    exact = sum(row[2] for row in rows)
    return ClaimFinding(
        status="CONDITIONAL" if exact == len(rows) else "HOLDS",
        evidence=f"M = I/2 on the prompt ±e_1, ±e_2, ±e_3 (seed 74 for q): exact at {exact} of {len(rows)} "
        "queries, for "
        f"L = {list(constants)} alike; for even functions the error is ≥ E f² (ICL-4a)",
        table={title: [row[i] for row in rows] for i, title in enumerate(("L", "error", "exact"))},
        counterexample="x_i = ±e_1, ±e_2, ±e_3, y_i = L a·x_i, M = I/2: Σ y_i x_iᵀ = 2L aᵀ, so Σ y_i x_iᵀMq "
        "= L a·q, "
        "exact\nfor every L with the one M. Condition for the failure: f has an even part."
        if exact == len(rows)
        else "",
        seed=74,
    )


CLAIMS: Final = (
    Claim(
        id="ICL-3a",
        subject="in-context learning",
        title="noise of a projected window",
        statement="For f(x) = aᵀBᵀx on the sphere with B ∈ ℝ^(d×k) and M = w BBᵀ the noise-variance factor "
        "is "
        "~ w^(k/2)/n, in place of w^((d−1)/2)/n.",
        source="a reading of the low-rank theorem of " + _SOURCE,
        kind="measurement",
        check=lambda lab: noise_factor(),
        control=lambda lab: noise_factor(((3, 1), (6, 1)), window=True),
    ),
    Claim(
        id="ICL-3b",
        subject="in-context learning",
        title="low-rank tasks give a low-rank matrix",
        statement="For f(x) = aᵀBᵀx, B ∈ ℝ^(d×k) with orthonormal columns, the M of least error is ∝ BBᵀ: "
        "nothing on "
        "the complement.",
        source=_SOURCE + ", the low-rank theorem (recalled; there the projection may have constant norm)",
        kind="enclosure",
        check=lambda lab: projected_matrix(
            "sphere",
            lab.choose(
                ((100, 60), (1000, 30), (10000, 12)),
                ((100, 400), (1000, 200), (10000, 60), (40000, 30)),
            ),
        ),
        control=lambda lab: projected_matrix("two spheres", ((100, 60), (1000, 30))),
    ),
    Claim(
        id="ICL-4a",
        subject="in-context learning",
        title="linear attention and even functions",
        statement="Σ y_i x_iᵀMq is odd in q, so for even f and symmetric q the mean squared error is ≥ E "
        "f², for every "
        "M, prompt and n.",
        source="derived; the failure of linear attention: " + _SOURCE,
        kind="exact",
        check=lambda lab: even_functions(lab.choose(20, 200)),
        control=lambda lab: even_functions(2, lambda x: x[0]),
    ),
    Claim(
        id="ICL-4b",
        subject="in-context learning",
        title="linear attention does not adapt",
        statement="Linear attention cannot adapt to the class of functions of its tasks: no M learns them "
        "for all "
        "Lipschitz constants.",
        source=_SOURCE + ", abstract (the contrast of softmax with linear attention)",
        kind="exact",
        check=lambda lab: adapting(),
        control=lambda lab: adapting(even=True),
    ),
)
