"""Claims about attention as a regression's support-vector expansion: what the identity says, and what not."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Final

import mpmath

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.support_vectors import (
    Regression,
    Row,
    attention,
    conditions,
    expansion,
    for_values,
    solve,
)

__all__ = [
    "CLAIMS",
    "any_values",
    "dropped_keys",
    "expansion_is_attention",
    "in_the_dual",
    "instances",
    "solved",
    "targets_as_values",
]

_SEED = 3
_TUBE = Fraction(1, 50)
_QUERIES = ((-3, 1), (0, 0), (1, -2), (2, 2))
_TWO_KEYS = ((0, 0), (1, 0))


def instances(count: int, size: int = 3, bound: Fraction = Fraction(1)) -> Iterator[Regression]:
    """Regressions on distinct keys of width 2 in {−1, 0, 1}², targets multiples of 1/4."""
    draw = random.Random(_SEED)
    grid = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    for _ in range(count):
        keys = tuple(draw.sample(grid, size))
        targets = tuple(Fraction(draw.randint(-8, 8), 4) for _ in keys)
        yield Regression(keys, targets, bound, _TUBE)


def _values(problem: Regression, index: int) -> Row:
    draw = random.Random(_SEED + index)
    return tuple(Fraction(draw.randint(-8, 8), 4) for _ in problem.keys)


def _told(numbers: Sequence[Fraction]) -> str:
    return "(" + ", ".join(map(str, numbers)) + ")"


def _in_digits(size: int, *, divided: bool) -> mpmath.mpf:
    """Largest difference of both sides for random real keys and weights e^(q·k/√3), in 60 digits."""
    draw = random.Random(_SEED)
    with mpmath.workdps(60):
        keys = [[mpmath.mpf(draw.gauss(0, 1)) for _ in range(3)] for _ in range(size)]
        beta = [mpmath.mpf(draw.gauss(0, 1)) for _ in keys]

        def kernel(x: list[mpmath.mpf], y: list[mpmath.mpf]) -> mpmath.mpf:
            return mpmath.exp(mpmath.fdot(x, y) / mpmath.sqrt(3))

        below = [mpmath.fsum(kernel(x, y) for y in keys) for x in keys]
        values = [x / h if divided else x for x, h in zip(beta, below, strict=True)]
        gaps = []
        for _ in range(4):
            query = [mpmath.mpf(draw.gauss(0, 1)) for _ in range(3)]
            weights = [kernel(query, key) for key in keys]
            h = mpmath.fsum(weights)
            f = mpmath.fsum(x * w / (h * m) for x, w, m in zip(beta, weights, below, strict=True))
            gaps.append(abs(f - mpmath.fdot(values, weights) / h))
        return max(gaps)


def expansion_is_attention(count: int = 6, *, divided: bool = True) -> ClaimFinding:
    """Is f(q) softmax attention with v_j = β_j/h(k_j), for any multipliers and b = 0?

    Args:
        count: sets of keys.
        divided: whether v_j is divided by h(k_j); β_j alone is another function.
    """
    rows = []
    for index, problem in enumerate(instances(count, 4)):
        beta = _values(problem, index)
        values = tuple(
            x / problem.h(key) if divided else x for x, key in zip(beta, problem.keys, strict=True)
        )
        pairs = [
            (expansion(problem, beta, Fraction(0), q), attention(problem.weights(q), values))
            for q in _QUERIES
        ]
        rows.append(
            (index, len(pairs), all(x == y for x, y in pairs), float(max(abs(x - y) for x, y in pairs)))
        )
    gap = _in_digits(5, divided=divided)
    good = all(row[2] for row in rows) and gap < mpmath.mpf(10) ** -50
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"equal rationals at {sum(row[1] for row in rows if row[2])} of "
        f"{sum(row[1] for row in rows)} "
        f"queries, weights 2^(q·k); with weights e^(q·k/√3) of random real keys the sides differ by "
        f"{mpmath.nstr(gap, 2)} in 60 digits"
        + (". For all: term by term both are β_j Φ(q)·Φ(k_j)/(h(q)h(k_j))" if good else ""),
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("keys", "queries", "equal", "largest difference"))
        },
        counterexample="" if good else f"largest difference {max(row[3] for row in rows):.6g}",
        seed=_SEED,
    )


_OPTIMUM_PROOF: Final = (
    "For all: the primal problem is a convex quadratic with linear constraints, feasible by large slacks and "
    "bounded below, in the span of finitely many features; so it has a minimum (Frank and Wolfe), and with "
    "linear constraints its minimum has multipliers. Stationarity makes the normal Σ β_j Φ(k_j)/h(k_j), "
    "whose "
    "prediction is PD-1a's plus b"
)


def solved(count: int = 6, factor: Fraction = Fraction(1)) -> ClaimFinding:
    """Does a regression's exact solution satisfy its conditions, and predict softmax attention plus b?

    Args:
        count: regressions.
        factor: on the multipliers; any but 1 leaves the optimum.
    """
    rows = []
    for problem in instances(count):
        beta, b = solve(problem)
        beta = tuple(factor * x for x in beta)
        kept = conditions(problem, beta, b)
        values = tuple(x / problem.h(key) for x, key in zip(beta, problem.keys, strict=True))
        same = all(
            expansion(problem, beta, b, q) == attention(problem.weights(q), values) + b for q in _QUERIES
        )
        at_bound = sum(abs(x) == problem.bound for x in beta)
        rows.append((_told(beta), str(b), at_bound, sum(x != 0 for x in beta), all(kept.values()), same))
    good = all(row[4] and row[5] for row in rows)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{len(rows)} regressions of 3 keys, ε = {_TUBE}, C = 1, solved in rationals: box, "
        "equality, "
        f"complementarity and equal primal and dual values in {sum(row[4] for row in rows)}, softmax "
        "attention "
        f"with v_j = β_j/h(k_j) plus b at every query in {sum(row[5] for row in rows)}; "
        f"{sum(row[2] for row in rows)} "
        f"multipliers at the bound, intercepts b = {', '.join(row[1] for row in rows[:3])}, … are not 0"
        + (f". {_OPTIMUM_PROOF}" if good else ""),
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(
                ("β", "b", "at the bound", "support vectors", "optimal", "attention + b")
            )
        },
        counterexample="" if good else f"β = {rows[0][0]}, b = {rows[0][1]} violate a condition",
        seed=_SEED,
    )


def in_the_dual(count: int = 20, *, shifted: bool = False) -> ClaimFinding:
    """Do arbitrary values satisfy the dual's constraints Σ_j v_j h(k_j) = 0 and |v_j h(k_j)| ≤ C?

    Args:
        count: sets of keys and values.
        shifted: take the h-weighted mean off the values, and C as large as they need.
    """
    kept = {"equality": 0, "box": 0}
    for index, problem in enumerate(instances(count)):
        values, bound = _values(problem, index), problem.bound
        if shifted:
            made, beta, _ = for_values(problem, values)
            bound = made.bound
        else:
            beta = tuple(v * problem.h(key) for v, key in zip(values, problem.keys, strict=True))
        kept["equality"] += sum(beta) == 0
        kept["box"] += max(map(abs, beta)) <= bound
    good = all(found == count for found in kept.values())
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"of {count} random sets of 3 keys and values {kept['equality']} satisfy Σ v_j h(k_j) = 0, "
        f"{kept['box']} |v_j h(k_j)| ≤ C" + (" with C as large as needed" if shifted else " = 1"),
        table={"constraint": list(kept), "kept": list(kept.values()), "of": [count, count]},
        counterexample="" if good else _two_keys(),
        seed=_SEED,
    )


def _two_keys() -> str:
    problem = Regression(_TWO_KEYS, (Fraction(1), Fraction(0)), Fraction(1), _TUBE)
    h = [problem.h(key) for key in problem.keys]
    return (
        f"keys 0 and 1 with weights 2^(q·k): h = {_told(h)}. Values (1, 0): Σ v_j h(k_j) = {h[0]}, which is "
        "not 0, "
        f"and |v_1 h(k_1)| = {h[0]} > C = 1."
    )


def any_values(count: int = 12, share: Fraction = Fraction(1, 2)) -> ClaimFinding:
    """Is attention with arbitrary values the solution of a regression? With targets, b and C to suit.

    Args:
        count: sets of keys and values.
        share: C as a share of the largest multiplier needed; the box fails below 1.
    """
    enough = short = 0
    rows = []
    for index, problem in enumerate(instances(count)):
        values = _values(problem, index)
        made, beta, b = for_values(problem, values)
        right = all(conditions(made, beta, b).values())
        same = all(expansion(made, beta, b, q) == attention(made.weights(q), values) for q in _QUERIES)
        tight = conditions(replace(made, bound=share * made.bound), beta, b)["box"]
        enough += right and same
        short += tight
        rows.append((_told(values), str(b), str(made.bound), right and same, tight))
    if enough < count:
        status = "REFUTED"
    else:
        status = "HOLDS" if short == count else "CONDITIONAL"
    return ClaimFinding(
        status=status,
        evidence=f"{count} random sets of 3 keys and values: with b = Σ v_j h(k_j)/Σ h(k_j), "
        "β_j = (v_j − b) h(k_j), targets on the tube's edges and C = max|β_j| all conditions hold and the "
        "solution is "
        f"softmax attention with the given values in {enough}; with C = {share} of that the box holds in "
        f"{short}. "
        "Since weights sum to 1, b is a shift of all values and the equality Σ β_j = 0 excludes no function; "
        "the "
        "box does",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("values", "b", "C needed", "solution", f"box at {share} of C"))
        },
        counterexample="" if status == "HOLDS" else _one_function(),
        seed=_SEED,
    )


def _one_function() -> str:
    problem = Regression(_TWO_KEYS, (Fraction(0), Fraction(0)), Fraction(1), _TUBE)
    made, beta, b = for_values(problem, (Fraction(1), Fraction(0)))
    return (
        "keys 0 and 1, weights 1 and 2^q, values (1, 0), C = 1: o(q) = 1/(1 + 2^q). 1/(1 + 2^q) and 2^q/(1 + "
        "2^q) "
        "are linearly independent and sum to 1, so v_1 + b = 1 and v_2 + b = 0; with h = (2, 3) and "
        f"2 v_1 + 3 v_2 = 0 only b = {b}, β = {_told(beta)} is left: |β_1| > C. It needs C ≥ {made.bound}."
    )


def targets_as_values(count: int = 8, *, suited: bool = False) -> ClaimFinding:
    """Is the regression fitted to (k_j, v_j) attention with the values v_j?

    Args:
        count: regressions.
        suited: choose targets for which the solution has these values, in place of the values themselves.
    """
    rows = []
    for index, problem in enumerate(instances(count, bound=Fraction(100))):
        values = _values(problem, index)
        fitted = for_values(problem, values)[0] if suited else replace(problem, targets=values)
        if len(set(values)) == 1:
            continue
        beta, b = solve(fitted)
        found = tuple(x / fitted.h(key) + b for x, key in zip(beta, fitted.keys, strict=True))
        rows.append((_told(values), _told(found), found == values))
    good = all(row[2] for row in rows)
    two = Regression(_TWO_KEYS, (Fraction(1), Fraction(0)), Fraction(100), Fraction(0))
    beta, b = solve(two)
    found = tuple(x / two.h(key) + b for x, key in zip(beta, two.keys, strict=True))
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{sum(row[2] for row in rows)} of {len(rows)} regressions have the values asked for, "
        "β_j/h(k_j) + b",
        table={title: [row[i] for row in rows] for i, title in enumerate(("asked for", "found", "equal"))},
        counterexample=""
        if good
        else "keys 0 and 1, weights 2^(q·k), targets (1, 0), ε = 0, C = 100: the fit meets both with "
        f"β = {_told(beta)}, b = {b}, so the values of attention are {_told(found)}, not (1, 0).",
        seed=_SEED,
    )


def dropped_keys(count: int = 12, *, normalised: bool = True) -> ClaimFinding:
    """May keys that are no support vectors be left out, as in ordinary regression? h(q) still sums over them.

    Args:
        count: regressions.
        normalised: whether h divides; without it this is ordinary kernel regression.
    """
    rows = []
    for drawn in instances(count, bound=Fraction(1, 2)):
        problem = replace(drawn, normalised=normalised, tube=Fraction(1, 2))
        beta, b = solve(problem)
        support = [j for j, x in enumerate(beta) if x]
        if len(support) in (0, len(beta)):
            continue
        values = tuple(x / problem.h(key) for x, key in zip(beta, problem.keys, strict=True))
        for query in _QUERIES:
            weights = problem.weights(query)
            least = [weights[j] for j in support]
            below = sum(least, Fraction(0)) if normalised else Fraction(1)
            left = sum((w * values[j] for w, j in zip(least, support, strict=True)), Fraction(0)) / below + b
            rows.append((_told(beta), str(query), left == expansion(problem, beta, b, query)))
    same = sum(row[2] for row in rows)
    return ClaimFinding(
        status="HOLDS" if same == len(rows) else "REFUTED",
        evidence=f"{len(rows)} predictions of regressions with keys inside the tube (ε = 1/2): {same} stay "
        "the same "
        "without those keys" + (", which h(q) sums over" if normalised else ""),
        table={title: [row[i] for row in rows] for i, title in enumerate(("β", "query", "same"))},
        counterexample="" if same == len(rows) else _middle_key(),
        seed=_SEED,
    )


def _middle_key() -> str:
    """Three keys of which the middle one is no support vector, by symmetry."""
    plain = Regression(((-1,), (0,), (1,)), (Fraction(0),) * 3, Fraction(1), _TUBE)
    made, beta, b = for_values(plain, (Fraction(-2, 7), Fraction(0), Fraction(2, 7)))
    weights, values = made.weights((1,)), (Fraction(-2, 7), Fraction(2, 7))
    return (
        f"keys −1, 0, 1, weights 2^(q·k), targets {_told(made.targets)}, ε = {_TUBE}, C = {made.bound}: "
        f"β = {_told(beta)}, b = {b} {'is' if all(conditions(made, beta, b).values()) else 'is not'} "
        "optimal, so the key 0 is no support vector. At q = 1 the prediction is "
        f"{expansion(made, beta, b, (1,))}; without that key {attention((weights[0], weights[2]), values)}."
    )


_SUBJECT = "primal-dual framework"
_SOURCE = "Nguyen et al., arXiv 2406.13781 (ICLR 2023), {}, from memory"

CLAIMS: Final = (
    Claim(
        id="PD-1a",
        subject=_SUBJECT,
        title="the expansion is softmax attention",
        statement="With h(x) = Σ_j Φ(x)·Φ(k_j) and Φ(x)·Φ(y) = e^(x·y/√D), the support-vector expansion "
        "Σ_j (α_j − α̃_j) Φ(q)·Φ(k_j)/(h(q) h(k_j)) is softmax attention with v_j = (α_j − α̃_j)/h(k_j).",
        source=_SOURCE.format("derivation of softmax attention"),
        kind="exact",
        check=lambda lab: expansion_is_attention(lab.choose(6, 24)),
        control=lambda _: expansion_is_attention(divided=False),
    ),
    Claim(
        id="PD-1b",
        subject=_SUBJECT,
        title="a regression solved",
        statement="The ε-insensitive regression with a free intercept b has multipliers that satisfy the "
        "conditions of "
        "Karush, Kuhn and Tucker, and predicts softmax attention with v_j = β_j/h(k_j), plus b.",
        source=_SOURCE.format("primal and dual problem"),
        kind="exact",
        check=lambda lab: solved(lab.choose(6, 24)),
        control=lambda _: solved(factor=Fraction(9, 10)),
    ),
    Claim(
        id="PD-1c",
        subject=_SUBJECT,
        title="arbitrary values in the dual",
        statement="The values of softmax attention, taken as v_j = β_j/h(k_j) with b = 0, are multipliers of "
        "the "
        "regression's dual, whatever they are.",
        source=_SOURCE.format("values as learned multipliers"),
        kind="exact",
        check=lambda lab: in_the_dual(lab.choose(20, 200)),
        control=lambda _: in_the_dual(shifted=True),
    ),
    Claim(
        id="PD-1d",
        subject=_SUBJECT,
        title="arbitrary values as a solution",
        statement="Softmax attention with arbitrary keys and values is the solution of such a regression.",
        source=_SOURCE.format("attention as a solution, the reading of summaries"),
        kind="exact",
        check=lambda lab: any_values(lab.choose(12, 60)),
        control=lambda _: any_values(share=Fraction(1)),
    ),
    Claim(
        id="PD-1e",
        subject=_SUBJECT,
        title="targets are not values",
        statement="The regression fitted to pairs (k_j, v_j) is softmax attention with the values v_j.",
        source=_SOURCE.format("a reading of the derivation"),
        kind="exact",
        check=lambda lab: targets_as_values(lab.choose(8, 40)),
        control=lambda _: targets_as_values(suited=True),
    ),
    Claim(
        id="PD-1f",
        subject=_SUBJECT,
        title="keys that are no support vectors",
        statement="Keys that are no support vectors may be left out, so that the regression's sparsity is "
        "sparse "
        "attention.",
        source=_SOURCE.format("sparse attention from a subset of the keys; the reading as support vectors"),
        kind="exact",
        check=lambda lab: dropped_keys(lab.choose(12, 60)),
        control=lambda _: dropped_keys(normalised=False),
    ),
)
