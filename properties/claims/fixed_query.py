"""Claims about attention as a recurrence: what a query that changes costs, the gradient, memory and time.

Numbers as in :mod:`attnproof.properties.claims.prefix_scan`. Source of all: Feng et al., arXiv 2405.13956.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory
from attnproof.properties.claims.prefix_scan import (
    SOURCE,
    TWO,
    State,
    attention,
    combine,
    leaf,
    nothing,
    running,
    score,
    tokens,
)
from attnproof.properties.forms.numbers import Dual, rationals

__all__ = ["CLAIMS", "changing_query", "costs", "gradient", "memory_for_all_queries"]


def changing_query(length: int = 20, *, queries: Sequence[int] = (0, 1)) -> ClaimFinding:
    """Is a cell of constant size enough for attention over prefixes, whatever the queries?

    Args:
        length: tokens of the comparison with random vectors.
        queries: two scalar queries; the first makes the states of two prefixes, the second reads them.
    """
    first, second = queries
    prefixes = {"A": [(0, 0), (1, 1)], "B": [(1, 0), (0, 1)]}
    states, outputs = [], []
    for pairs in prefixes.values():
        states.append(running([leaf(first * k, [flint.fmpq(v)]) for k, v in pairs], combine)[-1])
        outputs.append(
            attention([second * k for k, _ in pairs], [np.array([flint.fmpq(v)]) for _, v in pairs])[0]
        )
    collide = states[0] == states[1] and outputs[0] != outputs[1]
    q, k, v = tokens(length, 54)
    asked = q if first != second else [q[0]] * length
    own = running([leaf(score(a, b), x) for a, b, x in zip(asked, k, v, strict=True)], combine)
    fixed = running([leaf(score(q[0], b), x) for b, x in zip(k, v, strict=True)], combine)

    def wrong(run: list[State], query: Callable[[int], list[int]]) -> int:
        return sum(
            state.output != attention([score(query(t), b) for b in k[: t + 1]], v[: t + 1])
            for t, state in enumerate(run)
        )

    misses, kept = wrong(own, lambda t: asked[t]), wrong(fixed, lambda t: q[0])
    status = "CONDITIONAL" if misses and collide else "HOLDS"
    return ClaimFinding(
        status=status if not kept else "REFUTED",
        evidence=f"one query for all tokens: {kept} of {length} prefixes differ; each step's own query: "
        f"{misses} "
        f"differ (seed 54). Two prefixes with equal state (m, c, a) at query {first} have outputs "
        f"{outputs[0]} and "
        f"{outputs[1]} at query {second}",
        table={
            "queries": ["one for all", "a new one each step"],
            "prefixes": [length, length],
            "different": [kept, misses],
        },
        counterexample="weights 2^(q k). Prefix A: (k, v) = (0, 0), (1, 1); prefix B: (1, 0), (0, 1).\n"
        "At q = 0 both have m = 0, c = 2, a = 1. At q = 1: A gives (0 + 2)/3 = 2/3, B gives (0 + 1)/3 = "
        "1/3.\n"
        "No function of (m, c, a) and the new query gives both. Condition: the query is the same for all "
        "tokens."
        if status == "CONDITIONAL"
        else "",
        seed=54,
    )


def memory_for_all_queries(
    sizes: Sequence[int] = (2, 4, 8, 16), *, queries: int | None = None
) -> ClaimFinding:
    """How many numbers must be kept of N values, if any later query is to be answered? N: the rank.

    Args:
        sizes: N.
        queries: number of different queries that may come; None for N of them.
    """
    rows = []
    for n in sizes:
        asked = n if queries is None else queries
        table = [[TWO ** (i * j) for j in range(n)] for i in range(asked)]
        weights = flint.fmpq_mat([[x / sum(row) for x in row] for row in table])
        rows.append((n, asked, int(weights.rank())))
    short = [row for row in rows if row[2] < row[0]]
    return ClaimFinding(
        status="REFUTED" if short else "HOLDS",
        evidence="rank over ℚ of the attention weights of queries 0, 1, … on keys 0, …, N − 1 (weights 2^(q "
        "k), a "
        f"Vandermonde matrix with its rows normalised): {[row[2] for row in rows]} at N = "
        f"{[row[0] for row in rows]}"
        "; where it is N the outputs determine all N values, so that no continuous state of fewer numbers "
        "serves",
        table={title: [row[i] for row in rows] for i, title in enumerate(("N", "queries", "rank"))},
        counterexample=f"N = {short[0][0]} keys, {short[0][1]} query: rank {short[0][2]}" if short else "",
    )


def _exp(s: Dual) -> Dual:
    """e^(s ln 2) with its derivative in s ln 2, rational for an integer s."""
    value = TWO ** int(s.value)
    return Dual(value, value * s.slope)


def _differentiated(scores: list[Dual], values: list[Dual], slope: Callable[[Dual], Any]) -> dict[str, Any]:
    """Derivatives of o, c and L = m + ln c by the recurrence, m's own derivative being slope(m)."""
    m = Dual(scores[0].value, slope(scores[0]))
    c, a = _exp(scores[0] - m), _exp(scores[0] - m) * values[0]
    for s, v in zip(scores[1:], values[1:], strict=True):
        larger = s if s.value > m.value else m
        new = Dual(larger.value, slope(larger))
        old, weight = _exp(m - new), _exp(s - new)
        m, c, a = new, c * old + weight, a * old + weight * v
    o = a / c
    return {"o": o.slope, "c": c.slope, "L": m.slope + c.slope / c.value}


def gradient(trials: int = 12, outputs: Sequence[str] = ("o", "L")) -> ClaimFinding:
    """Are derivatives through the recurrence exact whatever derivative the running maximum is given?

    Args:
        trials: random sequences of 9 tokens, with ties for the maximum in every other one.
        outputs: of "o" (attention), "L" (log-sum-exp), "c" (the normaliser, relative to the maximum).
    """
    rng = np.random.default_rng(56)
    wild = iter(rationals(rng, 10000).tolist())
    rules: dict[str, Callable[[Dual], Any]] = {
        "through m": lambda m: m.slope,
        "m held constant": lambda m: flint.fmpq(0),
        "any derivative": lambda m: next(wild),
    }
    wrong: dict[tuple[str, str], int] = dict.fromkeys(itertools.product(outputs, rules), 0)
    for trial in range(trials):
        s = [flint.fmpq(int(x)) for x in rng.integers(-6, 7, 9)]
        if trial % 2:
            s[3] = s[6] = max(s)
        scores = [Dual(x, d) for x, d in zip(s, rationals(rng, 9), strict=True)]
        values = [Dual(x, d) for x, d in zip(rationals(rng, 9), rationals(rng, 9), strict=True)]
        weights = [TWO ** int(x) for x in s]
        p = [w / sum(weights) for w in weights]
        o = sum(w * v.value for w, v in zip(p, values, strict=True))
        exact = {
            "o": sum(
                w * (x.slope * (v.value - o) + v.slope) for w, x, v in zip(p, scores, values, strict=True)
            ),
            "L": sum(w * x.slope for w, x in zip(p, scores, strict=True)),
        }
        exact["c"] = _differentiated(scores, values, rules["through m"])["c"]
        for name, rule in rules.items():
            found = _differentiated(scores, values, rule)
            for output in outputs:
                wrong[output, name] += found[output] != exact[output]
    bad = [f"{output}, {name}: {count}" for (output, name), count in wrong.items() if count]
    return ClaimFinding(
        status="REFUTED" if bad else "HOLDS",
        evidence=f"{trials} sequences of 9 tokens (seed 56), dual numbers over ℚ, against Σ p_j (ds_j (v_j "
        "− o) + "
        "dv_j) and Σ p_j ds_j: "
        + (f"differ: {'; '.join(bad)}" if bad else "equal under every rule, at ties too"),
        table={
            "output": [output for output, _ in wrong],
            "derivative of m": [name for _, name in wrong],
            "different": list(wrong.values()),
        },
        counterexample="c = 2^(s_1 − m) + 2^(s_2 − m) at s = (0, 1), ds = (0, 1) ln 2: dc is −½ ln 2 "
        "through m, "
        "and ln 2 with m constant"
        if bad
        else "",
        seed=56,
    )


def costs(lengths: Sequence[int] = (16, 32, 64, 128), *, fixed: bool = True) -> ClaimFinding:
    """Is memory constant and cumulative time linear with one query; linear and quadratic with a cache?

    Args:
        lengths: tokens that arrive one by one; after each the attention over all so far is asked for.
        fixed: the first method has one query for all; otherwise it gets a new one each step and must keep the
            keys and values.
    """
    rows = []
    for length in lengths:
        q, k, v = tokens(length, 57)
        work, held = [0, 0], [0, 0]
        state, cache = nothing(len(v[0])), 0
        for t in range(length):
            cache += len(k[t]) + len(v[t])
            work[1] += t + 1
            held[1] = max(held[1], cache)
            if fixed:
                state = combine(state, leaf(score(q[0], k[t]), v[t]))
                work[0] += 1
                held[0] = max(held[0], 2 + len(state.a))
            else:
                work[0] += t + 1
                held[0] = max(held[0], cache)
        rows.append((length, work[0], held[0], work[1], held[1]))
    ratios = [
        tuple(later[i] / earlier[i] / (later[0] / earlier[0]) for i in range(1, 5))
        for earlier, later in itertools.pairwise(rows)
    ]
    steps = [later[0] / earlier[0] for earlier, later in itertools.pairwise(rows)]
    linear = all(r[0] == 1 and r[1] * step == 1 for r, step in zip(ratios, steps, strict=True))
    grows = all(r[2] > 1.5 and r[3] == 1 for r in ratios)
    titles = ("N", "scores, one query", "numbers held", "scores, with a cache", "numbers cached")
    last = ", ".join(f"{title} {x}" for title, x in zip(titles, rows[-1], strict=True))
    return ClaimFinding(
        status="HOLDS" if linear and grows else "REFUTED",
        evidence="scores computed and numbers held while N tokens arrive (seed 57), counted; at the "
        f"largest: {last}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=""
        if linear
        else f"N = {rows[0][0]}: {rows[0][1]} scores; N = {rows[1][0]}: {rows[1][1]}",
        seed=57,
    )


def _reported(lab: Laboratory) -> ClaimFinding:
    more, parameters = 3_152_896 - 3_152_384, 3_152_384
    return ClaimFinding(
        status="OPEN",
        evidence="needs the 38 data sets, the authors' code and their training runs; the two counts "
        "(recalled) "
        f"differ by {more}, {more / parameters:.2%}. Memory and time are counted in AAR-6a",
    )


CLAIMS: Final = (
    Claim(
        id="AAR-3a",
        subject="attention as an RNN",
        title="attention is an RNN of constant memory",
        statement="Softmax attention over a growing sequence is a recurrence with a state of constant size, "
        "updated "
        "at constant cost as tokens arrive.",
        source=SOURCE + ", abstract",
        kind="exact",
        check=lambda lab: changing_query(lab.choose(20, 80)),
        control=lambda lab: changing_query(queries=(0, 0)),
        covers=("SEED3-9",),
    ),
    Claim(
        id="AAR-3b",
        subject="attention as an RNN",
        title="queries that change need all tokens",
        statement="If any query may come next, N tokens need N numbers per value channel: the weights of N "
        "queries "
        "on N keys have rank N, so a decoder with queries that depend on the input keeps its cache.",
        source="derived; the restriction to learned queries: " + SOURCE,
        kind="exact",
        check=lambda lab: memory_for_all_queries(lab.choose((2, 4, 8, 16), (2, 4, 8, 16, 32))),
        control=lambda lab: memory_for_all_queries((2, 4), queries=1),
    ),
    Claim(
        id="AAR-5",
        subject="attention as an RNN",
        title="no gradient through the running maximum",
        statement="The output does not depend on m, so treating m as a constant in backpropagation (detach) "
        "gives "
        "exact derivatives of o, and of L = m + ln c.",
        source="derived; the PyTorch port of " + SOURCE,
        kind="exact",
        check=lambda lab: gradient(lab.choose(12, 100)),
        control=lambda lab: gradient(4, ("c",)),
    ),
    Claim(
        id="AAR-6a",
        subject="attention as an RNN",
        title="constant memory, linear cumulative time",
        statement="While N tokens arrive, Aaren holds a constant number of numbers and computes N scores; a "
        "transformer with a cache holds O(N) and computes N(N + 1)/2.",
        source=SOURCE + ", the comparison of memory and cumulative time",
        kind="count",
        check=lambda lab: costs(lab.choose((16, 32, 64, 128), (64, 128, 256, 512, 1024))),
        control=lambda lab: costs((8, 16), fixed=False),
    ),
    Claim(
        id="AAR-6b",
        subject="attention as an RNN",
        title="reported parameters and accuracies",
        statement="3,152,896 parameters against the transformer's 3,152,384 (+512, one query vector per "
        "layer), and "
        "comparable accuracy on 38 data sets.",
        source=SOURCE + ", experiments (recalled)",
        kind="none",
        check=_reported,
        control=None,
    ),
)
