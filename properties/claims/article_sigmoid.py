"""The third source article, on sigmoid attention: cost against length, the doubling argument, parallel rows.

Costs are products counted by numbers that count. Scores are logarithms of rationals or powers of two, so that
every weight is rational and compared exactly.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Final

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.forms.numbers import Tally, counted

__all__ = [
    "CLAIMS",
    "doubled",
    "fixed_scores",
    "formula",
    "in_parallel",
    "linear_products",
    "linear_time",
    "merged",
    "quadratic_products",
    "whole_step",
]

Cost = Callable[[int, int], int]
Partial = tuple[int, Fraction, Fraction]
"""Maximum, sum of 2^(s − m), sum of 2^(s − m)·v."""

_SEED = 7
_SUBJECT = "source articles"
_SOURCE = "third source article (summary of sigmoid attention), {}"


def quadratic_products(n: int, d: int) -> int:
    """Products of (σ(QKᵀ))V: n²d for the scores, n²d for the output, as for softmax."""
    tally = Tally()
    q, k, v = (counted(tally, n, d) for _ in range(3))
    # σ acts on each score by itself and costs none of these products.
    (q @ k.T) @ v
    return tally.products


def linear_products(n: int, d: int) -> int:
    """Products of Q(KᵀV)."""
    tally = Tally()
    q, k, v = (counted(tally, n, d) for _ in range(3))
    q @ (k.T @ v)
    return tally.products


def linear_time(lengths: Sequence[int], cost: Cost = quadratic_products, width: int = 3) -> ClaimFinding:
    """Does the number of products double when the length does?"""
    rows = [(n, cost(n, width), cost(2 * n, width)) for n in lengths]
    ratios = [Fraction(twice, once) for _, once, twice in rows]
    return ClaimFinding(
        status="HOLDS" if all(ratio == 2 for ratio in ratios) else "REFUTED",
        evidence=f"products counted at d = {width}, n to 2n: "
        + ", ".join(f"{once} to {twice} (n = {n})" for n, once, twice in rows)
        + f"; factors {', '.join(map(str, ratios))}. One query alone costs 2nd, with softmax as with σ",
        table={
            "n": [row[0] for row in rows],
            "products at n": [row[1] for row in rows],
            "products at 2n": [row[2] for row in rows],
        },
        counterexample=""
        if all(ratio == 2 for ratio in ratios)
        else "n = 1, d = 1: one score q_1·k_1 and one product with v_1: 2 products. n = 2: 4 scores and 4 "
        "products "
        "with values: 8 = 4·2.",
    )


def _sum_of_weights(
    weights: Sequence[Sequence[Fraction]], values: Sequence[Fraction], alpha: int
) -> list[Fraction]:
    """n^(−α) Σ_j w_ij v_j."""
    n = Fraction(len(values))
    return [sum((w * v for w, v in zip(row, values, strict=True)), Fraction(0)) / n**alpha for row in weights]


def doubled(alphas: Sequence[int], cost: Cost = quadratic_products, length: int = 4) -> ClaimFinding:
    """Does the α for which a doubled sequence keeps its output, n^(−α)Σσ(…)v, tell that cost is linear?

    Args:
        alphas: α tried, integers.
        cost: products at a length and a width.
        length: n.
    """
    draw = random.Random(_SEED)
    odds = [[Fraction(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(length)] for _ in range(length)]
    weights = [[w / (1 + w) for w in row] for row in odds]
    values = [Fraction(draw.randint(1, 9)) for _ in range(length)]
    growth = Fraction(cost(2 * length, 2), cost(length, 2))
    rows = []
    for alpha in alphas:
        once = _sum_of_weights(weights, values, alpha)
        twice = _sum_of_weights([[*row, *row] for row in weights], [*values, *values], alpha)
        factors = {y / x for x, y in zip(once, twice, strict=True)}
        rows.append(
            (alpha, factors == {Fraction(2) / Fraction(2) ** alpha}, factors == {Fraction(1)}, str(growth))
        )
    kept = [row for row in rows if row[2]]
    true = [row[0] for row in rows if row[2]] == [1] and all(row[1] for row in rows)
    return ClaimFinding(
        status="HOLDS" if true and growth == 2 else "REFUTED",
        evidence=f"n = {length}: outputs of the doubled sequence are 2^(1 − α) times the first in "
        f"{sum(row[1] for row in rows)} of {len(rows)} cases, so that α = "
        f"{', '.join(str(row[0]) for row in kept)} "
        f"keeps them; products grow by {growth} for every α alike: the argument fixes the factor n^(−α) and "
        "says "
        "nothing of cost",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("α", "factor 2^(1 − α)", "output kept", "growth of products"))
        },
        counterexample=""
        if true and growth == 2
        else "d = 1, n = 1 doubled to n = 2, x = 0, σ = 1/2: with α = 1 the output v/2 stays (v/2 + v/2)/2, "
        "and "
        "products grow from 2 to 8, not from 2 to 4.",
        seed=_SEED,
    )


def merged(a: Partial, b: Partial, *, rescaled: bool = True) -> Partial:
    """Softmax over the union of two sets of keys; without rescaling the sums are of different units."""
    m = max(a[0], b[0])
    left, right = (Fraction(2) ** (x[0] - m) if rescaled else Fraction(1) for x in (a, b))
    return m, a[1] * left + b[1] * right, a[2] * left + b[2] * right


def _trees(parts: tuple[Partial, ...], *, rescaled: bool) -> Iterator[Partial]:
    """Every bracketing of the parts in their order."""
    if len(parts) == 1:
        yield parts[0]
    for cut in range(1, len(parts)):
        for a in _trees(parts[:cut], rescaled=rescaled):
            for b in _trees(parts[cut:], rescaled=rescaled):
                yield merged(a, b, rescaled=rescaled)


def in_parallel(blocks: int = 4, *, rescaled: bool = True) -> ClaimFinding:
    """Can a softmax row be computed in parallel, from blocks merged in any order and bracketing?

    Args:
        blocks: how many, of two keys each; all their orders and bracketings are tried.
        rescaled: whether blocks hand over their maxima, by which merging rescales; without them softmax could
            not be computed in parts, as claimed.
    """
    draw = random.Random(_SEED)
    keys = [(draw.randint(-6, 6), Fraction(draw.randint(-9, 9))) for _ in range(2 * blocks)]
    weights = [Fraction(2) ** s for s, _ in keys]
    exact = sum((w * v for w, (_, v) in zip(weights, keys, strict=True)), Fraction(0)) / sum(weights)
    parts = []
    for i in range(0, 2 * blocks, 2):
        m = max(s for s, _ in keys[i : i + 2])
        shifted = [(Fraction(2) ** (s - m), v) for s, v in keys[i : i + 2]]
        parts.append(
            (m, sum((w for w, _ in shifted), Fraction(0)), sum((w * v for w, v in shifted), Fraction(0)))
        )
    found = [
        o / total
        for order in itertools.permutations(parts)
        for _, total, o in _trees(order, rescaled=rescaled)
    ]
    same = sum(x == exact for x in found)
    # Two rows of two keys, scores (0, 0) and (1, 0) in base 2, values (0, 1), by keys (m, ℓ, o).
    rows = [((s, Fraction(1), Fraction(0)), (0, Fraction(1), Fraction(1))) for s in (0, 1)]
    told = [row if rescaled else tuple(part[1:] for part in row) for row in rows]
    outputs = [o / total for _, total, o in (merged(*row, rescaled=True) for row in rows)]
    collide = told[0] == told[1] and outputs[0] != outputs[1]
    return ClaimFinding(
        status="REFUTED" if same == len(found) else "HOLDS" if collide else "OPEN",
        evidence=f"{blocks} blocks of 2 keys, scores integers in base 2: {same} of {len(found)} orders and "
        "bracketings "
        "give the row of softmax attention exactly; rows do not depend on one another"
        + (
            "; without maxima keys of scores (0, 0) and (1, 0), values (0, 1), hand over the same (ℓ, "
            "o), and "
            f"softmax attention is {outputs[0]} and {outputs[1]}: no merge gives both"
            if collide
            else ""
        ),
        table={"orders and bracketings": [len(found)], "equal": [same]},
        counterexample="Two blocks of one key, scores 1 and 3 in base 2, values 1 and 0: (m, ℓ, o) = (1, 1, "
        "1) and "
        "(3, 1, 0), computed apart, merge to (3, 2^(−2) + 1, 2^(−2)): o/ℓ = 1/5 = 2¹/(2¹ + 2³). The merge is "
        "associative, so n keys take log₂ n rounds; the sum Σ σ v over keys takes as many."
        if same == len(found)
        else "",
        seed=_SEED,
    )


def formula(lengths: Sequence[int], *, complete: bool = False) -> ClaimFinding:
    """Are weights σ(q·k) those of σ(q·k/√d − log n)? Scores are logarithms of rationals, d = 4.

    Args:
        lengths: n.
        complete: apply the scale and the bias that the article leaves out.
    """
    rows = []
    for n in lengths:
        # e^(q·k) = w⁴, so that e^(q·k/√d) = w².
        for w in (Fraction(1), Fraction(2), Fraction(1, 3)):
            odds = w**2 / n if complete else w**4
            due = w**2 / n
            rows.append((n, str(w**4), str(odds / (1 + odds)), str(due / (1 + due))))
    same = [row[2] == row[3] for row in rows]
    return ClaimFinding(
        status="HOLDS" if all(same) else "REFUTED",
        evidence=f"d = 4: {sum(same)} of {len(rows)} weights are equal; at zero scores n weights sum to "
        + ", ".join(f"{n if complete else n * (n + 1) / 2:g}/{n + 1} (n = {n})" for n in lengths)
        + (" as they should" if complete else ", not to n/(n + 1)"),
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("n", "e^(q·k)", "weight", "σ(q·k/√d − log n)"))
        },
        counterexample=""
        if all(same)
        else "q·k = 0, n = 2: σ(0) = 1/2 for each key, a sum of 1; with the bias −log 2 it is 1/3 for each, "
        "2/3.",
    )


def whole_step(shares: Sequence[Fraction], forward: Fraction, backward: Fraction) -> ClaimFinding:
    """Is a step faster by the forward kernel's speed-up? For the forward kernel alone.

    Args:
        shares: of time that the backward kernel takes.
        forward, backward: published speed-ups, as factors above 1.
    """
    rows = []
    for share in shares:
        whole = 1 / ((1 - share) / forward + share / backward)
        rows.append((str(share), float(100 * (whole - 1)), whole == forward))
    alone = [row[2] for row, share in zip(rows, shares, strict=True) if share == 0]
    if not all(alone):
        status = "REFUTED"
    else:
        status = "HOLDS" if all(row[2] for row in rows) else "CONDITIONAL"
    return ClaimFinding(
        status=status,
        evidence="from the published figures, not measured here: "
        + ", ".join(f"backward share {share}: {percent:.2f} % faster" for share, percent, _ in rows),
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(
                ("backward kernel's share", "faster in percent", "as the forward kernel")
            )
        },
        counterexample=""
        if status == "HOLDS"
        else f"forward kernel 1, backward kernel 5/2 (its operations): 7/2 before; 1/{float(forward):g} + "
        f"2.5/{float(backward):g} after: "
        f"{float(1 / (Fraction(2, 7) / forward + Fraction(5, 7) / backward)):.4f} "
        "times as fast.",
    )


def fixed_scores(*, lookup: bool = True) -> ClaimFinding:
    """Are queries, keys and softmax not necessary? For what is linear in the input; not for a look-up.

    A look-up: the input (i, a, b) with i = ±1 asks for a or b. The best affine fit is found exactly.

    Args:
        lookup: include it; without it only the linear task is left.
    """
    inputs = [
        (Fraction(i), Fraction(a), Fraction(b)) for i in (1, -1) for a in (-1, 0, 1) for b in (-1, 0, 1)
    ]
    tasks: dict[str, list[Fraction]] = {"2a − b": [2 * a - b for _, a, b in inputs]}
    if lookup:
        tasks["a if i = 1, b if i = −1"] = [a if i == 1 else b for i, a, b in inputs]
    rows = [(name, _residual(inputs, wanted)) for name, wanted in tasks.items()]
    missed = [row for row in rows if row[1] != 0]
    if rows[0][1] != 0:
        status = "REFUTED"
    else:
        status = "CONDITIONAL" if missed else "HOLDS"
    return ClaimFinding(
        status=status,
        evidence="least mean square error of scores that do not depend on the input, with a constant added, "
        "exactly: "
        + ", ".join(f"{name}: {error}" for name, error in rows)
        + (
            ". Attention with keys ±1, the query i·β and values a, b has the look-up as its limit"
            if missed
            else ""
        ),
        table={
            "task": [name for name, _ in rows],
            "least mean square error": [str(error) for _, error in rows],
        },
        counterexample=""
        if not missed
        else "Inputs (i, a, b) = (1, 1, 0), (−1, 0, 1) ask for 1 and 1, (1, 0, 1), (−1, 1, 0) ask for 0 and "
        "0. Both "
        "pairs sum to (0, 1, 1), so a map linear in the input, with a constant, has the same sum of outputs "
        "for "
        "both: 2 for the one and 0 for the other.",
    )


def _residual(inputs: Sequence[tuple[Fraction, ...]], wanted: Sequence[Fraction]) -> Fraction:
    """Mean square distance from the best affine fit; the columns 1, i, a, b are orthogonal here."""
    columns = [[Fraction(1)] * len(inputs), *map(list, zip(*inputs, strict=True))]
    left = list(wanted)
    for column in columns:
        norm = sum((x * x for x in column), Fraction(0))
        part = sum((x * y for x, y in zip(column, wanted, strict=True)), Fraction(0)) / norm
        left = [y - part * x for x, y in zip(column, left, strict=True)]
    return sum((y * y for y in left), Fraction(0)) / len(left)


_FORWARD, _BACKWARD = Fraction(11739, 10000), Fraction(1027, 1000)

CLAIMS: Final = (
    Claim(
        id="SEED2-1",
        subject=_SUBJECT,
        title="sigmoid attention in linear time",
        statement="Sigmoid attention scales linearly with the sequence's length n: O(n) time.",
        source=_SOURCE.format("complexity"),
        kind="count",
        check=lambda lab: linear_time((1, 2, 4, 8, *lab.choose((), (16, 32)))),
        control=lambda _: linear_time((1, 2, 4, 8), linear_products),
        covers=("SIG-2",),
    ),
    Claim(
        id="SEED2-2",
        subject=_SUBJECT,
        title="the doubling argument",
        statement="That a doubled sequence keeps its output under the factor n^(−α) for α = 1 only shows "
        "that sigmoid "
        "attention's cost is linear in n.",
        source=_SOURCE.format("complexity, from a note in arXiv 2409.04431"),
        kind="exact",
        check=lambda lab: doubled((-1, 0, 1, 2, 3), length=lab.choose(4, 8)),
        control=lambda _: doubled((-1, 0, 1, 2, 3), linear_products),
        covers=("SIG-2",),
    ),
    Claim(
        id="SEED2-3",
        subject=_SUBJECT,
        title="parallel rows",
        statement="Sigmoid weights can be computed in parallel, softmax cannot: its rows must be normalised.",
        source=_SOURCE.format("comparison with softmax"),
        kind="exact",
        check=lambda lab: in_parallel(lab.choose(4, 5)),
        control=lambda _: in_parallel(rescaled=False),
    ),
    Claim(
        id="SEED2-5",
        subject=_SUBJECT,
        title="the formula of the weights",
        statement="Sigmoid attention has the weights a_i = σ(q·k_i), those of the paper, σ(q·k_i/√d − log "
        "n).",
        source=_SOURCE.format("definition; Ramapuram et al., arXiv 2409.04431"),
        kind="exact",
        check=lambda _: formula((2, 16, 1024)),
        control=lambda _: formula((2, 16, 1024), complete=True),
    ),
    Claim(
        id="SEED2-6b",
        subject=_SUBJECT,
        title="17 % faster",
        statement="FlashSigmoid makes attention 17 % faster, in training as in inference: the speed-ups "
        "published are "
        "17.39 % of the forward and 2.7 % of the backward kernel.",
        source=_SOURCE.format("results; figures of apple/ml-sigmoid-attention's README"),
        kind="exact",
        check=lambda _: whole_step((Fraction(0), Fraction(1, 2), Fraction(5, 7)), _FORWARD, _BACKWARD),
        control=lambda _: whole_step((Fraction(0),), _FORWARD, _BACKWARD),
    ),
    Claim(
        id="SEED2-7",
        subject=_SUBJECT,
        title="attention without queries, keys and softmax",
        statement="Queries, keys and softmax are not necessary: scores that are learned and fixed do as "
        "well.",
        source=_SOURCE.format("related abstracts; Sanchis-Agudo et al., arXiv 2308.12874"),
        kind="exact",
        check=lambda _: fixed_scores(),
        control=lambda _: fixed_scores(lookup=False),
    ),
)
