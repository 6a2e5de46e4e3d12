"""Claims about log-sum-exp and softmax as functions: range, condition numbers, Lipschitz constants.

Logits are logarithms of rational weights, so that e^x is rational and everything but the logarithm itself is
exact: softmax is w/Σw, a common shift of the logits is a common factor of the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = [
    "CLAIMS",
    "conditioning",
    "half_lipschitz",
    "jacobian",
    "jacobian_rows",
    "range_lemma",
    "softmax_conditioning",
    "strictly_half",
    "weights",
]

_BITS = 256
_SEED = 21
_Q = flint.fmpq
_HALF: Final = _Q(1, 2)


_RANGE_PROOF: Final = (
    "For all: Σw has n positive terms, one of them w_max and none above it; a second term makes it "
    "larger than "
    "w_max, a smaller one smaller than n·w_max"
)
_CONDITION_PROOF: Final = (
    "For all: to first order y moves by Σ g_i Δx_i with g = softmax(x) ≥ 0 of sum 1, at most max|Δx|, and by "
    "that if all move alike: cond = max|x|/|y|. Where Σ e^x = 1, y = 0. Where x_max = max|x|, y ≥ x_max ≥ 0 "
    "(LSE-1)"
)
_SOFTMAX_PROOF: Final = (
    "For all: cond = ‖J‖_∞ max|x|/max g with ‖J‖_∞ = max_i 2g_i(1 − g_i) (LSE-2b). With M = max g this is "
    "2M(1 − M): if M ≤ 1/2 because t(1 − t) rises up to 1/2, else because every other g_i is at most 1 "
    "− M. And "
    "M ≥ 1/n, with equality for equal logits"
)


def weights(longest: int, largest: int, shortest: int = 1) -> Iterator[tuple[Any, ...]]:
    """Every non-increasing row of ``shortest`` to ``longest`` integer weights 1 … ``largest``, as fmpq."""
    for n in range(shortest, longest + 1):
        for row in itertools.combinations_with_replacement(range(largest, 0, -1), n):
            yield tuple(map(_Q, row))


def range_lemma(longest: int, largest: int, most: Callable[[int], int] = lambda n: n) -> ClaimFinding:
    """w_max ≤ Σw ≤ ``most(n)``·w_max with equality as claimed, over all rows of integer weights."""
    rows, wrong = 0, ()
    for w in weights(longest, largest):
        total, n = sum(w, _Q(0)), len(w)
        fine = w[0] <= total <= most(n) * w[0]
        fine = fine and (total == w[0]) is (n == 1) and (total == n * w[0]) is (w[0] == w[-1])
        rows += 1
        if not fine and not wrong:
            wrong = w
    told = (
        f"w = ({', '.join(map(str, wrong))}): Σw = {sum(wrong, _Q(0))}, w_max = {wrong[0]}" if wrong else ""
    )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"e^y = Σw exactly, for all {rows} rows of up to {longest} integer weights up to {largest}: "
        + (told or f"never outside, and equal only where claimed. {_RANGE_PROOF}"),
        counterexample=told,
    )


def conditioning(longest: int, largest: int, factor: Any = 1) -> ClaimFinding:
    """Is the relative condition number of log-sum-exp ``factor``·max|x|/|y|?

    Changes of the logits by at most δ are factors of the weights in [1/t, t], t = e^δ: the sum of the weights
    then changes by a factor in [1/t, t], and by exactly t where all factors are t.
    """
    t, rows, wrong = _Q(3, 2), 0, ""
    for w in weights(longest, largest):
        total = sum(w, _Q(0))
        reached = max(
            max(change, 1 / change)
            for r in itertools.product((1 / t, _Q(1), t), repeat=len(w))
            for change in [sum((a * b for a, b in zip(w, r, strict=True)), _Q(0)) / total]
        )
        rows += 1
        # |f(x + Δ) − f(x)| ≤ factor·δ in weights: the change of the sum is at most t^factor.
        if reached != t**factor and not wrong:
            wrong = f"w = ({', '.join(map(str, w))}): logits moved by log(3/2) move y by log({reached})"
    surface = all(sum((_Q(1, n) for _ in range(n)), _Q(0)) == 1 for n in range(2, 10))
    largest_norm, draws = _where_positive_dominates()
    good = surface and bool(largest_norm <= 1) and not wrong
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"for all {rows} rows of up to {longest} weights up to {largest}, and all changes by −δ, "
        "0, δ "
        "with e^δ = 3/2, y moves by at most δ, and by δ where all logits "
        f"do{': not so at ' * bool(wrong)}{wrong}; "
        f"at x_i = −log n the sum is exactly 1, so y = 0, for n = 2 … 9; where max x = max|x| the largest "
        f"enclosure of max|x|/|y| over {draws} rows (seed {_SEED}) is {float(largest_norm.mid()):.6g}"
        + (f". {_CONDITION_PROOF}" if good else ""),
        counterexample=wrong,
        seed=_SEED,
    )


def _where_positive_dominates(draws: int = 60) -> tuple[Any, int]:
    """The largest max|x|/|y|, enclosed, over rows whose largest logit is also largest in absolute value."""
    rng, worst = np.random.default_rng(_SEED), flint.arb(0)
    for _ in range(draws):
        x = rng.uniform(-1.0, 1.0, int(rng.integers(1, 6))) * 2.0 ** rng.integers(-4, 6)
        x[0] = np.abs(x).max()
        with _precision(_BITS):
            y = sum((flint.arb(float(a)).exp() for a in x), flint.arb(0)).log()
            norm = flint.arb(float(x[0])) / abs(y)
            worst = norm if norm.upper() > worst.upper() else worst
    # A row of one logit has the ratio 1 exactly, known to the balls' radius.
    return (flint.arb(1) if worst.contains(1) else worst), draws


def jacobian(g: tuple[Any, ...]) -> list[list[Any]]:
    """∂g_i/∂x_j = g_i(1_{i=j} − g_j) of softmax."""
    return [[g[i] * ((1 if i == j else 0) - g[j]) for j in range(len(g))] for i in range(len(g))]


def jacobian_rows(longest: int, diagonal: Callable[[Any], Any] = lambda g: g * (1 - g)) -> ClaimFinding:
    """Σ_j |∂g_i/∂x_j| = 2g_i(1 − g_i) = ½ − 2(g_i − ½)², as polynomials in the weights."""
    wrong = []
    for n in range(2, longest + 1):
        context = flint.fmpq_mpoly_ctx.get([f"g{i}" for i in range(n - 1)], "lex")
        free = list(context.gens())
        last = 1 - sum(free, context.constant(0))
        g = [*free, last]
        for i in range(n):
            # All g lie in [0, 1]: the diagonal is not negative, the rest not positive.
            row = diagonal(g[i]) + sum((g[i] * g[j] for j in range(n) if j != i), context.constant(0))
            square = _Q(1, 2) - 2 * (g[i] - _Q(1, 2)) ** 2
            if row != 2 * g[i] * (1 - g[i]) or row != square:
                wrong.append((n, i))
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="equal as polynomials over the rationals, with g_n = 1 − Σ of the others, for n = 2 … "
        f"{longest}"
        if not wrong
        else f"not equal as polynomials at (n, i) = {wrong[:3]}",
        counterexample=f"n = {wrong[0][0]}, row {wrong[0][1]}: the polynomials differ" if wrong else "",
    )


def softmax_conditioning(longest: int, largest: int, constant: Any = 2) -> ClaimFinding:
    """Is cond_∞(g, x)/‖x‖_∞ = ``constant``·(1 − max g), and how far below the printed bound n is it?"""
    rows, wrong, highest = 0, "", _Q(0)
    table: dict[str, list[Any]] = {
        "n": [],
        "largest cond / max|x|": [],
        "2(n − 1)/n": [],
        "printed bound": [],
    }
    for n in range(1, longest + 1):
        highest = _Q(0)
        for w in weights(n, largest, n):
            total = sum(w, _Q(0))
            g = tuple(a / total for a in w)
            condition = max(sum(map(abs, row), _Q(0)) for row in jacobian(g)) / max(g)
            highest, rows = max(highest, condition), rows + 1
            if condition != constant * (1 - max(g)) and not wrong:
                wrong = f"w = ({', '.join(map(str, w))}): ‖J‖/‖g‖ = {condition}"
        if highest != constant * _Q(n - 1, n) and not wrong:
            wrong = f"n = {n}: the largest is {highest}"
        for column, entry in zip(table, (n, float(highest), 2 * (n - 1) / n, n), strict=True):
            table[column].append(entry)
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"exactly so for all {rows} rows of up to {longest} integer weights up to {largest}; "
        "largest at "
        f"equal logits, {highest} at n = {longest}, where the printed bound is {longest}. {_SOFTMAX_PROOF}"
        if not wrong
        else f"not so at {wrong}",
        table=table,
        counterexample=wrong,
    )


def half_lipschitz(longest: int, largest: int, draws: int, constant: Any = _HALF) -> ClaimFinding:
    """‖J‖_p ≤ ``constant`` for every p: exactly for p = 1 and ∞, hence between them; a search besides.

    J is symmetric, so ‖J‖_1 = ‖J‖_∞, and ‖J‖_p ≤ ‖J‖_1^{1/p} ‖J‖_∞^{1 − 1/p} (Riesz–Thorin).
    """
    rows, reached, wrong = 0, _Q(0), ""
    for w in weights(longest, largest, 2):
        total = sum(w, _Q(0))
        j = jacobian(tuple(a / total for a in w))
        norm = max(sum(map(abs, row), _Q(0)) for row in j)
        rows, reached = rows + 1, max(reached, norm)
        if norm > constant and not wrong:
            wrong = f"w = ({', '.join(map(str, w))}): ‖J‖_1 = ‖J‖_∞ = {norm} > {constant}"
    polynomial = jacobian_rows(4).status == "HOLDS"
    highest = {p: _searched(p, draws) for p in (1.0, 1.25, 1.5, 2.0, 3.0, 8.0)}
    over = [p for p, ratio in highest.items() if ratio > float(constant) * (1 + 1e-12)]
    fine = polynomial and constant >= _Q(1, 2) and not wrong and not over
    return ClaimFinding(
        status="HOLDS" if fine and reached == constant else "REFUTED" if wrong or over else "SUPPORTED",
        evidence=f"‖J‖_1 = ‖J‖_∞ = max 2g_i(1 − g_i) = ½ − 2(g_i − ½)² as polynomials, and {reached} is "
        "reached "
        f"among {rows} rows of integer weights; other p lie between by interpolation. Climbing over {draws} "
        f"rows (seed {_SEED}): largest ‖Jv‖_p/‖v‖_p "
        + ", ".join(f"{ratio:.6f} at p = {p:g}" for p, ratio in highest.items())
        + ". No smaller constant serves 1 < p < ∞ either: two equal logits have Jv = v/2 for v = (1, "
        "−1) (LSE-8b)",
        table={"p": list(highest), "largest ‖Jv‖/‖v‖ found": list(highest.values())},
        counterexample=wrong,
        seed=_SEED,
    )


def _searched(p: float, draws: int) -> float:
    """The largest ‖Jv‖_p/‖v‖_p over random rows of three logits, by the power method in the norm p."""
    rng = np.random.default_rng((_SEED, int(8 * p)))
    x = rng.normal(0.0, 3.0, (draws, 3))
    g = np.exp(x - x.max(axis=1, keepdims=True))
    g /= g.sum(axis=1, keepdims=True)
    v = rng.standard_normal(g.shape)
    best = 0.0
    for _ in range(12):
        image = g * (v - (g * v).sum(axis=1, keepdims=True))
        ratio = np.linalg.norm(image, p, axis=1) / np.linalg.norm(v, p, axis=1)
        best = max(best, float(ratio.max()))
        dual = np.sign(image) * np.abs(image) ** (p - 1)
        back = g * (dual - (g * dual).sum(axis=1, keepdims=True))
        size = np.abs(back) / np.abs(back).max(axis=1, keepdims=True)
        v = np.sign(back) * size ** (1 / (p - 1) if p > 1 else 8.0)
    return best


def strictly_half(longest: int, largest: int, shortest: int = 2) -> ClaimFinding:
    """Is ‖J‖_p < ½ at every finite x for 1 < p < ∞? By ½I − J positive definite, over the rationals.

    ‖J‖_2 < ½ gives ‖J‖_p < ½ for every p between 1 and ∞ by interpolation with p = 1 and p = ∞. Beyond the
    rows of the check: vᵀJv is the variance of v under g, at most (max v − min v)²/4 ≤ ½‖v‖², with equality
    only where g is ½ and ½ on two entries and 0 elsewhere.
    """
    rows, singular, indefinite = 0, [], []
    for w in weights(longest, largest, shortest):
        n, total = len(w), sum(w, _Q(0))
        j = jacobian(tuple(a / total for a in w))
        shifted = [[(_Q(1, 2) if a == b else _Q(0)) - j[a][b] for b in range(n)] for a in range(n)]
        minors = [flint.fmpq_mat([row[:k] for row in shifted[:k]]).det() for k in range(1, n + 1)]
        rows += 1
        if minors[-1] == 0 and all(minor > 0 for minor in minors[:-1]):
            singular.append(w)
        elif not all(minor > 0 for minor in minors):
            indefinite.append(w)
    lengths = sorted({len(w) for w in singular})
    definite = rows - len(singular) - len(indefinite)
    status = "REFUTED" if indefinite else "CONDITIONAL" if singular else "HOLDS"
    told = ""
    if singular:
        told = (
            f"n = {len(singular[0])}, equal logits: g = (1/2, 1/2), J = [[1/4, −1/4], [−1/4, 1/4]], v = (1, "
            "−1).\n"
            "Jv = (1/2, −1/2) = v/2, so ‖J‖_p ≥ 1/2 for every p, at a finite x."
        )
    return ClaimFinding(
        status=status,
        evidence=f"½I − J is positive definite, by exact leading minors, at {definite} "
        f"of {rows} rows of {shortest} to {longest} integer weights up to {largest}; singular at "
        f"{len(singular)}"
        + (f", all with n in {lengths} and equal logits: true for n ≥ 3 only" if singular else ""),
        counterexample=told,
    )


_PAPER = "Blanchard, Higham & Higham 2021, arXiv 1909.03469, {}"
CLAIMS: Final = (
    Claim(
        id="LSE-1",
        subject="log-sum-exp",
        title="range",
        statement="x_max ≤ log Σ e^{x_i} ≤ x_max + log n; the left is an equality only for n = 1, the right "
        "only "
        "for equal logits.",
        source=_PAPER.format("section 1"),
        kind="exact",
        check=lambda lab: range_lemma(*lab.choose((4, 6), (5, 9), (6, 10))),
        control=lambda lab: range_lemma(3, 4, lambda n: max(1, n - 1)),
    ),
    Claim(
        id="LSE-2a",
        subject="log-sum-exp",
        title="condition number of log-sum-exp",
        statement="cond_∞ of log-sum-exp is max|x_i|/|y|: infinite where Σ e^{x_i} = 1, and at most 1 where "
        "the "
        "largest logit is also the largest in absolute value.",
        source=_PAPER.format("section 2"),
        kind="exact",
        check=lambda lab: conditioning(*lab.choose((3, 4), (4, 6), (5, 6))),
        control=lambda lab: conditioning(2, 3, 2),
    ),
    Claim(
        id="LSE-2b",
        subject="log-sum-exp",
        title="rows of softmax's Jacobian",
        statement="Σ_j |∂g_i/∂x_j| = 2g_i(1 − g_i), so ‖J‖_∞ ≤ 1/2 (the paper uses the bound 1).",
        source=_PAPER.format("section 2; the constant 1/2 derived"),
        kind="exact",
        check=lambda lab: jacobian_rows(lab.choose(4, 6, 7)),
        control=lambda lab: jacobian_rows(3, lambda g: g),
    ),
    Claim(
        id="LSE-2c",
        subject="log-sum-exp",
        title="condition number of softmax",
        statement="cond_∞ of softmax is 2(1 − max g)·max|x|, at most 2(n − 1)/n·max|x| and that for equal "
        "logits: "
        "less than twice the logits, not the printed n times.",
        source=_PAPER.format("section 2 has n·max|x|; the exact value derived"),
        kind="exact",
        check=lambda lab: softmax_conditioning(*lab.choose((4, 6), (5, 8), (6, 9))),
        control=lambda lab: softmax_conditioning(3, 4, 1),
    ),
    Claim(
        id="LSE-8a",
        subject="log-sum-exp",
        title="softmax is 1/2-Lipschitz",
        statement="Softmax has the Lipschitz constant 1/2 in every ℓ_p norm, 1 ≤ p ≤ ∞.",
        source="arXiv 2510.23012, abstract",
        kind="exact",
        check=lambda lab: half_lipschitz(*lab.choose((4, 6, 300), (5, 8, 3000), (6, 9, 30000))),
        control=lambda lab: half_lipschitz(3, 4, 100, _Q(9, 20)),
    ),
    Claim(
        id="LSE-8b",
        subject="log-sum-exp",
        title="where 1/2 is attained",
        statement="1/2 is attained for p = 1 and p = ∞, and for 1 < p < ∞ only approached in a limit of "
        "logits.",
        source="arXiv 2510.23012, abstract",
        kind="exact",
        check=lambda lab: strictly_half(*lab.choose((4, 5), (5, 8), (6, 9))),
        control=lambda lab: strictly_half(4, 4, 3),
    ),
)
