"""Claims about online softmax: its recurrence and its monoid, exactly and in floating point.

Exactly, over the rationals: a logit x is known by its weight e^x, a maximum m by e^m (0 for m = −∞), and
e^(a − b) is a quotient of weights, so that no exponential is computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.correct_rounding import BF16, FP16, FP32, Floats, Rounded

__all__ = [
    "CLAIMS",
    "Pair",
    "combined",
    "combined_rounded",
    "groupings",
    "monoid",
    "neutral",
    "recurrence",
    "storage",
    "theorem",
]

_SEED = 23
_Q = flint.fmpq
Pair = tuple[Any, Any]
"""(e^m, d): weight of the largest logit, and the sum of all weights in units of it."""
NEUTRAL: Final = (_Q(0), _Q(0))


def recurrence(w: Iterable[Any], *, rescale: bool = True) -> Iterator[Pair]:
    """m_j and d_j = d_{j−1} e^{m_{j−1} − m_j} + e^{x_j − m_j} after every element, as (e^{m_j}, d_j)."""
    largest, d = NEUTRAL
    for weight in w:
        before, largest = largest, max(largest, weight)
        d = d * (before / largest if rescale else 1) + weight / largest
        yield largest, d


_THEOREM_PROOF: Final = (
    "For all, by induction: d_j e^{m_j} = d_{j−1}e^{m_{j−1}} + e^{x_j} = Σ_{i≤j} e^{x_i}, a sum of j "
    "terms of "
    "which e^{m_j} is the largest, so 1 ≤ d_j ≤ j"
)


def theorem(longest: int, largest: int, length: int, *, rescale: bool = True) -> ClaimFinding:
    """m_j = max, d_j = Σ e^{x_i − m_j} and 1 ≤ d_j ≤ j, at every j, for all short rows and some long ones."""
    rng, rows, wrong = np.random.default_rng(_SEED), 0, ""
    short = (
        tuple(map(_Q, row))
        for n in range(1, longest + 1)
        for row in itertools.product(range(1, largest + 1), repeat=n)
    )
    powers = (tuple(_Q(2) ** int(k) for k in rng.integers(-30, 31, length)) for _ in range(8))
    for w in itertools.chain(short, powers):
        rows += 1
        total = _Q(0)
        for j, (m, d) in enumerate(recurrence(w, rescale=rescale), start=1):
            total += w[j - 1]
            if (m != max(w[:j]) or d * m != total or not 1 <= d <= j) and not wrong:
                due = total / max(w[:j])
                wrong = f"weights e^x = ({', '.join(map(str, w[:j]))}): e^m = {m}, d = {d}, due {due}"
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"exactly at every j, for all rows of up to {longest} weights 1 … {largest} and 8 rows of "
        f"{length} powers "
        f"of two (seed {_SEED}), {rows} rows" + (f"; not so: {wrong}" if wrong else f". {_THEOREM_PROOF}"),
        counterexample=wrong,
        seed=_SEED,
    )


def storage(doubled: int = 2) -> ClaimFinding:
    """d over ``doubled``·2^p equal logits, in formats of p bits: does it overflow, is it right?"""
    table: dict[str, list[Any]] = {"format": [], "elements": [], "d": []}
    for form in (FP16, BF16):
        r, d = Rounded(form), np.zeros(1)
        n = doubled * 2**form.precision
        for _ in range(n):
            d = r.add(d, np.ones(1))
        for column, entry in zip(table, (form.name, n, float(d[0])), strict=True):
            table[column].append(entry)
    # As many steps in fp32 would take minutes: the one step on which it stops growing, if that is asked for.
    full = np.array([2.0**FP32.precision])
    stays = doubled > 1 and Rounded(FP32).add(full, np.ones(1))[0] == full[0]
    overflow = not all(math.isfinite(d) for d in table["d"])
    short = [n for n, d in zip(table["elements"], table["d"], strict=True) if d != n]
    status = "REFUTED" if overflow else "CONDITIONAL" if short or stays else "HOLDS"
    return ClaimFinding(
        status=status,
        evidence="equal logits, one addition of 1 after another: "
        + ", ".join(f"{name}: d = {d:g} after {n}" for name, n, d in zip(*table.values(), strict=True))
        + ("; in fp32 2^24 + 1 rounds to 2^24" if stays else "")
        + (
            "; d cannot overflow at any length because it stops at 2/u, and is wrong from there"
            if short
            else ""
        ),
        table=table,
        counterexample="fp32, V = 2^24 + 1 equal logits: after 2^24 elements d = 2^24 = 16777216. The next "
        "step computes "
        "fl(16777216 + 1) = 16777216 (spacing 2, tie to even). Exact: 16777217; after 1.7e37 elements d is "
        "still 2^24."
        if status == "CONDITIONAL"
        else "",
    )


def combined(a: Pair, b: Pair, *, rescale: bool = True) -> Pair:
    """(m_a, d_a) ⊕ (m_b, d_b), exactly; 0/0 of two neutral elements is taken as 0, as kernels do."""
    m = max(a[0], b[0])
    if m == 0:
        return NEUTRAL
    return m, a[1] * a[0] / m + b[1] * (b[0] / m if rescale else 1)


def monoid(weights: Sequence[int], sums: Sequence[int], *, rescale: bool = True) -> ClaimFinding:
    """Associative, commutative, with a neutral element: all triples of states, over the rationals."""
    states = [NEUTRAL, *((_Q(w, 3), _Q(d, 2)) for w in weights for d in sums)]
    wrong, triples = "", 0

    def plus(a: Pair, b: Pair) -> Pair:
        return combined(a, b, rescale=rescale)

    for a, b, c in itertools.product(states, repeat=3):
        triples += 1
        fine = plus(plus(a, b), c) == plus(a, plus(b, c)) and plus(a, b) == plus(b, a)
        if not (fine and plus(a, NEUTRAL) == a == plus(NEUTRAL, a)) and not wrong:
            wrong = (
                f"(e^m, d): a = {a}, b = {b}, c = {c}: (a ⊕ b) ⊕ c = {plus(plus(a, b), c)}, "
                f"a ⊕ (b ⊕ c) = {plus(a, plus(b, c))}, a ⊕ b = {plus(a, b)}, b ⊕ a = {plus(b, a)}"
            )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{triples} triples of {len(states)} states (e^m, d), (0, 0) among them, over the rationals"
        + (f"; not so: {wrong}" if wrong else ": associative, commutative, (0, 0) neutral"),
        counterexample=wrong,
    )


def combined_rounded(a: tuple[Floats, Floats], b: tuple[Floats, Floats], r: Rounded) -> tuple[Floats, Floats]:
    """⊕ on (m, d) with every operation rounded, for arrays of finite m."""
    m = np.maximum(a[0], b[0])
    left, right = (r.mul(d, r.exp(r.sub(x, m))) for x, d in (a, b))
    return m, r.add(left, right)


def groupings(n: int) -> Iterator[Any]:
    """Every binary tree over the leaves 0 … n − 1 in order, as nested pairs."""

    def trees(low: int, high: int) -> list[Any]:
        if high - low == 1:
            return [low]
        return [
            (a, b) for middle in range(low + 1, high) for a in trees(low, middle) for b in trees(middle, high)
        ]

    yield from trees(0, n)


def rounding_of_groups(rows: int, n: int, *, dyadic: bool = False) -> ClaimFinding:
    """All groupings of n elements in fp16, bf16 and fp32: the spread of d in units of u·d."""
    rng, spread, example, swapped = np.random.default_rng(_SEED), {}, "", True
    for form in (FP16, BF16, FP32):
        r = Rounded(form)
        x = np.zeros((rows, n)) if dyadic else -rng.integers(0, 5, (rows, n)).astype(np.float64)
        leaves = [(x[:, i], np.ones(rows)) for i in range(n)]

        def value(tree: Any) -> tuple[Floats, Floats]:
            if isinstance(tree, int):
                return leaves[tree]  # noqa: B023
            return combined_rounded(value(tree[0]), value(tree[1]), r)  # noqa: B023

        sums = np.stack([value(tree)[1] for tree in groupings(n)])
        relative = (sums.max(axis=0) - sums.min(axis=0)) / sums.max(axis=0) / form.u
        spread[form.name] = float(relative.max())
        pair = [combined_rounded(leaves[i], leaves[1 - i], r)[1] for i in range(2)]
        swapped = swapped and bool((pair[0] == pair[1]).all())
        if form is FP16 and not dyadic:
            example = _least_grouping(r)
    differ = any(spread.values())
    return ClaimFinding(
        status="REFUTED" if differ else "HOLDS",
        evidence=f"all {len(list(groupings(n)))} groupings of {rows} rows of {n} logits (seed {_SEED}), "
        "every operation "
        "rounded: the results differ by up to "
        + ", ".join(f"{s:.3g} u in {name}" for name, s in spread.items())
        + f" of d ({2 * n} u would be two roundings an element); exchanging the operands changes "
        + ("nothing" if swapped else "the result"),
        counterexample=example if differ else "",
        seed=_SEED,
    )


def _least_grouping(r: Rounded) -> str:
    """Three logits 0 … −9 that two groupings sum differently, the least."""
    for x in sorted(itertools.product(range(10), repeat=3), key=lambda x: (sum(x), x)):
        a, b, c = ((np.array([0.0 - k]), np.ones(1)) for k in x)
        left = float(combined_rounded(combined_rounded(a, b, r), c, r)[1][0])
        right = float(combined_rounded(a, combined_rounded(b, c, r), r)[1][0])
        if left != right:
            inner = [
                f"({float(m[0]):g}, {float(d[0])!r})"
                for m, d in (combined_rounded(a, b, r), combined_rounded(b, c, r))
            ]
            return (
                f"fp16, x = ({', '.join(str(-k) for k in x)}), d = 1 each, every operation rounded.\n"
                f"a ⊕ b = {inner[0]}, (a ⊕ b) ⊕ c has d = {left!r}.\n"
                f"b ⊕ c = {inner[1]}, a ⊕ (b ⊕ c) has d = {right!r}.\n"
                f"Exactly {sum(math.exp(min(x) - k) for k in x):.8g}."
            )
    return ""


def _literal(a: tuple[float, float], b: tuple[float, float], *, guarded: bool) -> tuple[float, float]:
    """⊕ in float64 as printed; guarded, an infinite m is taken as 0 inside the exponents."""
    m = max(a[0], b[0])
    shift = 0.0 if guarded and m == -math.inf else m
    with np.errstate(invalid="ignore"):
        left, right = (d * float(np.exp(np.subtract(x, shift))) for x, d in (a, b))
    return m, left + right


def neutral(*, guarded: bool = False) -> ClaimFinding:
    """Is (−∞, 0) neutral in IEEE arithmetic, for other states and for itself?"""
    empty = (-math.inf, 0.0)
    states = [(0.0, 1.0), (-1e300, 2.0), (700.0, 1e300), empty]
    wrong = [
        state
        for state in states
        if _literal(state, empty, guarded=guarded) != state
        or _literal(empty, state, guarded=guarded) != state
    ]
    return ClaimFinding(
        status="HOLDS" if not wrong else "CONDITIONAL" if wrong == [empty] else "REFUTED",
        evidence=f"float64, {len(states)} states: "
        + (f"not neutral for {wrong}" if wrong else "neutral for all")
        + "; with m = −∞ taken as 0 in the exponents (as FlashAttention's code does) it is neutral for all",
        counterexample="(−∞, 0) ⊕ (−∞, 0): m = −∞, m − m = (−∞) − (−∞) = NaN, e^NaN = NaN, 0·NaN = NaN: d = "
        "NaN, not 0."
        if wrong
        else "",
    )


def _claim(
    name: str, title: str, statement: str, source: str, check: Any, control: Any, **more: Any
) -> Claim:
    return Claim(name, "online softmax", title, statement, source, "exact", check, control, **more)


_PAPER = "Milakov & Gimelshein, arXiv 1805.02867, {}"
CLAIMS: Final = (
    _claim(
        "ONL-1a",
        "theorem 1",
        "The recurrence m_j = max(m_{j−1}, x_j), d_j = d_{j−1} e^{m_{j−1} − m_j} + e^{x_j − m_j} ends with "
        "m = max x and "
        "d = Σ e^{x_i − m}; at every step 1 ≤ d_j ≤ j.",
        _PAPER.format("section 3, theorem 1"),
        lambda lab: theorem(*lab.choose((4, 5, 200), (5, 5, 1000), (5, 7, 4000))),
        lambda lab: theorem(3, 3, 20, rescale=False),
    ),
    _claim(
        "ONL-1b",
        "rows of 1.7e37 elements",
        "Because d_j ≤ j, a sum kept in fp32 serves rows of up to 1.7e37 elements.",
        _PAPER.format("section 3"),
        lambda lab: storage(),
        lambda lab: storage(1),
    ),
    _claim(
        "ONL-2a",
        "the monoid",
        "(m_a, d_a) ⊕ (m_b, d_b) = (max, d_a e^{m_a − m} + d_b e^{m_b − m}) is associative and commutative, "
        "with the "
        "neutral element (−∞, 0).",
        _PAPER.format("section 3.1"),
        lambda lab: monoid(*lab.choose(((1, 2, 5), (2, 3, 7)), ((1, 2, 5, 9), (2, 3, 7, 11)))),
        lambda lab: monoid((1, 2), (2, 3), rescale=False),
        covers=("AAR-2",),
    ),
    _claim(
        "ONL-2b",
        "the monoid in floating point",
        "⊕ is associative in floating point: the result does not depend on how the elements are grouped.",
        _PAPER.format("section 3.1, read for floating point"),
        lambda lab: rounding_of_groups(*lab.choose((32, 5), (256, 6), (256, 8))),
        lambda lab: rounding_of_groups(32, 5, dyadic=True),
    ),
    _claim(
        "ONL-2c",
        "the neutral element in floating point",
        "(−∞, 0) is neutral for ⊕ in floating point as the formula is written.",
        _PAPER.format("section 3.1") + "; FlashAttention's softmax.h replaces m = −∞ by 0",
        lambda lab: neutral(),
        lambda lab: neutral(guarded=True),
    ),
)
