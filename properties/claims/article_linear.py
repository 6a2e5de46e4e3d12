"""The second source article, on linearising attention: feature maps, what a state keeps, gates, filters.

Everything is rational and compared exactly, but for exponentials, which are enclosed in balls.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Final

import flint

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = [
    "CLAIMS",
    "composed",
    "elu_similarity",
    "kept",
    "neighbours",
    "ratio_spread",
    "separable",
    "smoother",
    "taylor_similarity",
]

Similarity = Callable[[int, int], flint.arb]

_BITS = 512
_SEED = 5
_SUBJECT = "source articles"
_SOURCE = "second source article (linearising attention), {}"


def elu_similarity(q: int, k: int) -> flint.arb:
    """φ(q)φ(k) with φ = elu + 1: x + 1 above 0, e^x below; one dimension."""
    f, g = (flint.arb(x + 1) if x > 0 else flint.arb(x).exp() for x in (q, k))
    return f * g


def taylor_similarity(degree: int) -> Similarity:
    """Σ_m (qk)^m/m! up to a degree, the map x^m/√m! of its width."""

    def similarity(q: int, k: int) -> flint.arb:
        return sum((flint.arb(q * k) ** m / flint.arb(m).fac() for m in range(degree + 1)), flint.arb(0))

    return similarity


def ratio_spread(similarity: Similarity, reach: int, limit: int = 2) -> ClaimFinding:
    """Is e^(qk) within a factor of φ(q)·φ(k), up to one constant, for |q|, |k| ≤ reach?

    The spread is the largest ratio over the smallest one, which no constant changes.

    Args:
        similarity: φ(q)·φ(k), positive.
        reach: largest |q|, |k| tried, integers.
        limit: largest spread that counts as an approximation.
    """
    rows = []
    with _precision(_BITS):
        for r in range(1, reach + 1):
            points = range(-r, r + 1)
            ratios = [flint.arb(q * k).exp() / similarity(q, k) for q, k in itertools.product(points, points)]
            low, high = min(x.lower() for x in ratios), max(x.upper() for x in ratios)
            rows.append((r, float(high / low), bool(low > 0 and high / low <= limit)))
    good = all(row[2] for row in rows)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence="e^(qk) over φ(q)φ(k), largest over smallest on the integers of [−r, r]²: "
        + ", ".join(f"r = {r}: {spread:.3g}" for r, spread, _ in rows[:6]),
        table={title: [row[i] for row in rows] for i, title in enumerate(("r", "spread", f"≤ {limit}"))},
        counterexample=""
        if good
        else "φ = elu + 1, q = k = t in one dimension: e^(qk)/φ(q)φ(k) = e^(t²)/(1 + t)²: 1 at t = 0, e/4 = "
        "0.680 at "
        "t = 1, e⁴/9 = 6.07 at t = 2, e⁹/16 = 506 at t = 3. No constant makes up for it.",
    )


def exponential_rank(n: int, kernel: Callable[[int, int], flint.arb]) -> bool:
    """Whether the matrix of a kernel at 0 … n − 1 is proved to have rank n."""
    with _precision(_BITS):
        return not flint.arb_mat([[kernel(i, j) for j in range(n)] for i in range(n)]).det().contains(0)


def _power(i: int, j: int) -> flint.arb:
    return flint.arb(2) ** (i * j)


def _series_gap(terms: int) -> float:
    """Largest distance of e^(xy) from Σ_m (xy)^m/m!, m < terms, on [−1, 1]², which |xy| = 1 attains."""
    points = [flint.arb(i) / 2 for i in range(-2, 3)]
    with _precision(_BITS):
        gaps = [
            abs((x * y).exp() - sum(((x * y) ** m / flint.arb(m).fac() for m in range(terms)), flint.arb(0)))
            for x, y in itertools.product(points, points)
        ]
        return max(float(gap.abs_upper()) for gap in gaps)


def separable(
    lengths: Sequence[int] = (2, 4, 8), kernel: Callable[[int, int], flint.arb] = _power
) -> ClaimFinding:
    """Is the kernel φ(q)·φ(k) for no map φ? For none of a finite width; for one of infinite width."""
    full = [n for n in lengths if exponential_rank(n, kernel)]
    gaps = {terms: _series_gap(terms) for terms in (2, 8, 32)}
    finite = len(full) == len(lengths)
    infinite = gaps[32] < 1e-30
    if not finite:
        status = "REFUTED"
    else:
        status = "CONDITIONAL" if infinite else "HOLDS"
    return ClaimFinding(
        status=status,
        evidence=f"the matrix of the kernel at n points has rank n for n in {full} of {list(lengths)}, so a "
        "map of "
        "width below n does not have it; "
        "with x^m/√m! the sum of 2, 8, 32 terms is within "
        f"{', '.join(f'{gap:.1g}' for gap in gaps.values())} of "
        "e^(xy) on [−1, 1]²",
        table={"terms": list(gaps), "distance from e^(xy)": list(gaps.values())},
        counterexample=""
        if status == "HOLDS"
        else "φ(x) = (1, x, x²/√2!, x³/√3!, …) of infinite width: φ(x)·φ(y) = Σ (xy)^m/m! = e^(xy). No "
        "finite width: "
        "at q, k = 0, log 2, with weights 2^(ij): ((1, 1), (1, 2)) has determinant 1, rank 2, and so on for "
        "n points.",
    )


def kept(cases: Sequence[tuple[int, bool]]) -> ClaimFinding:
    """Does the state Σ k_jᵀv_j of n = 20d tokens lose 19d² of the values' 20d² numbers?

    Args:
        cases: width d, and whether all keys are one key.
    """
    draw, rows = random.Random(_SEED), []
    for d, alike in cases:
        n = 20 * d
        keys = [[draw.randint(-9, 9) for _ in range(d)] for _ in range(1 if alike else n)]
        rank = int(flint.fmpz_mat(keys * n if alike else keys).rank())
        rows.append((d, alike, rank, (n - rank) * d, 19 * d * d))
    plain = [row[3] == row[4] for row in rows if row[2] == row[0]]
    good = all(row[3] == row[4] for row in rows)
    if not all(plain):
        status = "REFUTED"
    else:
        status = "HOLDS" if good else "CONDITIONAL"
    return ClaimFinding(
        status=status,
        evidence="for fixed keys V ↦ KᵀV is linear with a kernel of (n − rank K)·d dimensions: "
        + ", ".join(f"d = {d}, rank {rank}: {lost} for {due}" for d, _, rank, lost, due in rows)
        + ". Not counted in the article: the keys, and the normaliser's d numbers",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("d", "keys alike", "rank of K", "dimensions lost", "19d²"))
        },
        counterexample=""
        if status == "HOLDS"
        else "d = 2, n = 40 equal keys: K has rank 1, so KᵀV has 2 independent numbers and (40 − 1)·2 = 78 "
        "dimensions "
        "of V are lost, not 19·4 = 76. With 40 keys of rank 2 it is (40 − 2)·2 = 76.",
        seed=_SEED,
    )


def composed(steps: int, degrees: Sequence[int] = (1, 2)) -> ClaimFinding:
    """Do n steps S ↦ g(x_t)·S^p + x_t, with gates of the input only, compose into a map of the same size?"""
    draw, rows = random.Random(_SEED), []
    for power in degrees:
        whole = flint.fmpq_poly([0, 1])
        for _ in range(steps):
            gate, x = flint.fmpq(draw.randint(1, 5), 6), flint.fmpq(draw.randint(-5, 5), 3)
            whole = gate * whole**power + flint.fmpq_poly([x])
        rows.append((power, steps, int(whole.degree()), power == int(whole.degree())))
    linear = [row[3] for row in rows if row[0] == 1]
    if not all(linear):
        status = "REFUTED"
    else:
        status = "HOLDS" if all(row[3] for row in rows) else "CONDITIONAL"
    return ClaimFinding(
        status=status,
        evidence=f"{steps} steps with random rational gates as one polynomial in the first state: "
        + ", ".join(f"power {p}: degree {found}" for p, _, found, _ in rows)
        + ". Steps that are affine in the state compose into an affine map, which is what a parallel scan "
        "needs",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("power of the state", "steps", "degree of all steps", "same size"))
        },
        counterexample=""
        if status == "HOLDS"
        else "S_t = g(x_t)·S_{t−1}² + x_t has gates that depend on x_t only. Two steps with g = 1, x = 1: "
        "S ↦ (S² + 1)² + 1 = S⁴ + 2S² + 2: n steps have degree 2ⁿ, where n steps of g·S + x have degree 1.",
        seed=_SEED,
    )


def neighbours(sharpness: Sequence[int], *, hard: bool = False) -> ClaimFinding:
    """Are softmax weights those of the k nearest neighbours, 1/k each, for some k?

    Scores are −β, −2β, −3β, −4β in powers of two, keys of one norm by falling similarity.

    Args:
        sharpness: β.
        hard: give all weight to the nearest key, in softmax's place.
    """
    rows = []
    for beta in sharpness:
        raw = [Fraction(i == 0) if hard else Fraction(1, 2 ** (beta * i)) for i in range(4)]
        weights = [w / sum(raw) for w in raw]
        apart = [
            sum(abs(w - (Fraction(1, k) if i < k else 0)) for i, w in enumerate(weights)) / 2
            for k in range(1, 5)
        ]
        best = min(range(4), key=apart.__getitem__)
        rows.append((beta, best + 1, float(apart[best]), apart[best] == 0, str(apart[best])))
    exact = all(row[3] for row in rows)
    falling = all(a[2] > b[2] for a, b in itertools.pairwise(rows[1:]))
    if exact:
        status = "HOLDS"
    else:
        status = "CONDITIONAL" if falling and rows[-1][1] == 1 and rows[-1][2] < 1e-6 else "REFUTED"
    return ClaimFinding(
        status=status,
        evidence="distance in total variation from the closest of 1 to 4 nearest neighbours: "
        + ", ".join(f"β = {row[0]}: {row[2]:.3g} (k = {row[1]})" for row in rows)
        + ("; it goes to 0 as scores grow, with k = 1" if status == "CONDITIONAL" else ""),
        table={title: [row[i] for row in rows] for i, title in enumerate(("β", "closest k", "distance"))},
        counterexample=""
        if exact
        else "two keys, scores log 2 and 0: weights 2/3 and 1/3, neither (1, 0) nor (1/2, 1/2).",
    )


def smoother(*, one_norm: bool = True) -> ClaimFinding:
    """Are softmax weights e^(q·k) those of the kernel e^(−‖q − k‖²/2), divided by their sums?

    Args:
        one_norm: whether keys have one norm.
    """
    keys = [(3, 4), (5, 0), (0, -5), (-4, 3)] if one_norm else [(3, 4), (1, 0), (0, -2), (-4, 3)]
    queries = [(1, 0), (1, -1), (2, 3)]
    rows = []
    for q in queries:
        dots = [sum(a * b for a, b in zip(q, k, strict=True)) for k in keys]
        squares = [Fraction(-sum((a - b) ** 2 for a, b in zip(q, k, strict=True)), 2) for k in keys]
        # Equal softmax weights: exponents that differ by one number along the row.
        rows.append((str(q), len({x - y for x, y in zip(dots, squares, strict=True)}) == 1))
    good = all(same for _, same in rows)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"keys {keys}: exponents q·k and −‖q − k‖²/2 differ by one number along "
        f"{sum(same for _, same in rows)} of {len(rows)} rows, since −‖q − k‖²/2 = q·k − ‖q‖²/2 − ‖k‖²/2",
        table={"query": [row[0] for row in rows], "same weights": [row[1] for row in rows]},
        counterexample="" if good else f"keys {keys}: norms differ, and with them e^(−‖k‖²/2)",
    )


CLAIMS: Final = (
    Claim(
        id="SEED1-1",
        subject=_SUBJECT,
        title="elu + 1 approximates the exponential",
        statement="With φ = elu + 1 the product φ(q)·φ(k) approximates e^(q·k).",
        source=_SOURCE.format("feature maps; Katharopoulos et al., arXiv 2006.16236"),
        kind="enclosure",
        check=lambda lab: ratio_spread(elu_similarity, lab.choose(4, 8)),
        control=lambda _: ratio_spread(taylor_similarity(80), 3),
        covers=("LIN-2",),
    ),
    Claim(
        id="SEED1-2",
        subject=_SUBJECT,
        title="softmax is not separable",
        statement="The exponential e^(q·k) cannot be written as φ(q)·φ(k).",
        source=_SOURCE.format("why softmax is replaced"),
        kind="enclosure",
        check=lambda lab: separable(lab.choose((2, 4, 8), (2, 4, 8, 16, 24))),
        control=lambda _: separable(kernel=lambda i, j: flint.arb((1 + i * j) ** 2)),
    ),
    Claim(
        id="SEED1-3",
        subject=_SUBJECT,
        title="what the state loses",
        statement="A state of d² numbers that holds n = 20d values of width d has lost 19d² of their 20d² "
        "numbers.",
        source=_SOURCE.format("capacity of the state"),
        kind="exact",
        check=lambda lab: kept(
            [(d, alike) for d in lab.choose((2, 3, 4), (2, 4, 8)) for alike in (False, True)]
        ),
        control=lambda _: kept([(2, False), (3, False)]),
    ),
    Claim(
        id="SEED1-4",
        subject=_SUBJECT,
        title="gates of the input, and training in parallel",
        statement="Since gates depend on x_t only, and not on the state, the recurrence can be trained in "
        "parallel over "
        "time.",
        source=_SOURCE.format("remark on gates"),
        kind="exact",
        check=lambda lab: composed(lab.choose(5, 9)),
        control=lambda _: composed(5, degrees=(1,)),
    ),
    Claim(
        id="SEED1-7a",
        subject=_SUBJECT,
        title="attention as nearest neighbours",
        statement="Softmax attention is k-nearest-neighbour regression over keys.",
        source=_SOURCE.format("related views of attention"),
        kind="exact",
        check=lambda _: neighbours((1, 2, 4, 8, 16, 32)),
        control=lambda _: neighbours((1, 2, 4), hard=True),
    ),
    Claim(
        id="SEED1-7b",
        subject=_SUBJECT,
        title="attention as a kernel smoother",
        statement="For keys of one norm softmax attention is the Nadaraya–Watson smoother with a Gaussian "
        "kernel.",
        source="correction of the second source article, derived",
        kind="exact",
        check=lambda _: smoother(),
        control=lambda _: smoother(one_norm=False),
    ),
)
