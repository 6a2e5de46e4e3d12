"""Claims about attention as a recurrence: a fixed query, the monoid, prefix scans, the gradient, the costs.

Scores are integers and weights powers of two, so that everything is rational. The identities use nothing of
the exponential but e^(a + b) = e^a e^b, which 2^(a + b) has too.
Source of all: Feng et al., "Attention as an RNN" (Aaren), arXiv 2405.13956; formulas recalled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.forms.base import Array, chunks
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "CLAIMS",
    "SOURCE",
    "TWO",
    "State",
    "attention",
    "block_by_block",
    "combine",
    "hillis_steele",
    "leaf",
    "monoid",
    "nothing",
    "odd_even",
    "recurrence",
    "running",
    "scans",
    "score",
    "tokens",
]

SOURCE: Final = "Feng et al., arXiv 2405.13956"
TWO: Final = flint.fmpq(2)


@dataclass(frozen=True)
class State:
    """Of a set of tokens: maximum m of the scores, c = Σ 2^(s − m), a = Σ 2^(s − m) v. m None: no token."""

    m: int | None
    c: Any
    a: tuple[Any, ...]

    @property
    def output(self) -> tuple[Any, ...]:
        """a/c: attention over these tokens."""
        return tuple(x / self.c for x in self.a)


Combine = Callable[[State, State], State]


def leaf(score: int, value: Iterable[Any]) -> State:
    """One token."""
    return State(score, flint.fmpq(1), tuple(value))


def nothing(width: int) -> State:
    """The neutral element."""
    return State(None, flint.fmpq(0), (flint.fmpq(0),) * width)


def combine(x: State, y: State, *, rescale: bool = True) -> State:
    """The state of both sets of tokens; ``rescale`` False keeps each side's own maximum in its sums."""
    if x.m is None or y.m is None:
        return y if x.m is None else x
    m = max(x.m, y.m)
    p, r = (TWO ** (x.m - m), TWO ** (y.m - m)) if rescale else (1, 1)
    return State(m, p * x.c + r * y.c, tuple(p * u + r * w for u, w in zip(x.a, y.a, strict=True)))


def _forgetful(x: State, y: State) -> State:
    return combine(x, y, rescale=False)


def _average(x: State, y: State) -> State:
    """Means of means: what merging outputs without their weights does."""
    if x.m is None or y.m is None:
        return y if x.m is None else x
    half = flint.fmpq(1, 2)
    return State(max(x.m, y.m), flint.fmpq(1), tuple(half * (u + w) for u, w in zip(x.a, y.a, strict=True)))


def tokens(length: int, seed: int, width: int = 2) -> tuple[list[list[int]], list[list[int]], list[Array]]:
    """Queries and keys (length, 3) of small integers, values (length, width) rational; some scores tie."""
    rng = np.random.default_rng(seed)
    q, k = (rng.integers(-3, 4, (length, 3)) for _ in range(2))
    k[1::5] = k[0]
    return q.tolist(), k.tolist(), list(rationals(rng, length, width))


def score(q: Sequence[int], k: Sequence[int]) -> int:
    """q·k, an integer."""
    return sum(x * y for x, y in zip(q, k, strict=True))


def attention(scores: Sequence[int], values: Sequence[Array]) -> tuple[Any, ...]:
    """Attention over all tokens given, by its definition."""
    weights = [TWO**s for s in scores]
    total = sum(weights)
    return tuple(
        sum(w * v[c] for w, v in zip(weights, values, strict=True)) / total for c in range(len(values[0]))
    )


def running(leaves: Sequence[State], by: Combine) -> list[State]:
    """State after every token, one token at a time."""
    return list(itertools.accumulate(leaves, by))


def recurrence(length: int = 40, by: Combine = combine) -> ClaimFinding:
    """Does the cell give the attention over every prefix, with one query for all?"""
    q, k, v = tokens(length, 51)
    scores = [score(q[0], x) for x in k]
    states = running([leaf(s, x) for s, x in zip(scores, v, strict=True)], by)
    wrong = [t for t, state in enumerate(states) if state.output != attention(scores[: t + 1], v[: t + 1])]
    inside = all(1 <= state.c <= t + 1 for t, state in enumerate(states))
    failing = ""
    if wrong:
        t = wrong[0]
        failing = (
            f"scores {scores[: t + 1]}, first value entries {[str(x[0]) for x in v[: t + 1]]}: cell "
            f"{states[t].output[0]}, attention {attention(scores[: t + 1], v[: t + 1])[0]}"
        )
    return ClaimFinding(
        status="REFUTED" if wrong or not inside else "HOLDS",
        evidence=f"{length} prefixes, scores from {min(scores)} to {max(scores)} with ties (seed 51), "
        "rational: "
        f"{len(wrong)} differ; 1 ≤ c_k ≤ k: {inside}",
        table={
            "token": list(range(length)),
            "score": scores,
            "c": [float(state.c.p) / float(state.c.q) for state in states],
        },
        counterexample=failing,
        seed=51,
    )


def _bracketings(leaves: Sequence[State], by: Combine) -> Iterator[State]:
    """The results of all ways to put brackets (Catalan many)."""
    if len(leaves) == 1:
        yield leaves[0]
    for split in range(1, len(leaves)):
        for x in _bracketings(leaves[:split], by):
            for y in _bracketings(leaves[split:], by):
                yield by(x, y)


def monoid(length: int = 6, by: Combine = combine) -> ClaimFinding:
    """Is the operator associative and commutative, with the empty state neutral, in exact arithmetic?"""
    q, k, v = tokens(length, 52)
    leaves = [leaf(score(q[0], x), y) for x, y in zip(k, v, strict=True)]
    results = list(_bracketings(leaves, by))
    orders = [running(order, by)[-1] for order in itertools.permutations(leaves)]
    empty = nothing(len(v[0]))
    neutral = all(by(empty, x) == x == by(x, empty) for x in [*leaves, empty])
    one = results[0]
    apart = [sum(x != one for x in group) for group in (results, orders)]
    failing = ""
    if any(apart):
        x, y, z = (leaf(s, [flint.fmpq(s)]) for s in (0, 1, 2))
        left, right = by(by(x, y), z), by(x, by(y, z))
        failing = (
            f"tokens (score, value) = (0, 0), (1, 1), (2, 2): ((x y) z) gives {left.output[0]}, (x (y z)) "
            "gives "
            f"{right.output[0]}"
        )
    return ClaimFinding(
        status="HOLDS" if neutral and not any(apart) else "REFUTED",
        evidence=f"{len(results)} bracketings and {len(orders)} orders of {length} tokens (seed 52): "
        f"{apart[0]} and "
        f"{apart[1]} differ from the first; the empty state is neutral: {neutral}",
        table={
            "kind": ["bracketing", "order"],
            "tried": [len(results), len(orders)],
            "different": apart,
        },
        counterexample=failing,
        seed=52,
    )


Item = tuple[State, int]
"""A state and the depth of the circuit that computes it."""


@dataclass
class _Count:
    """The operator, counting its uses and the depth of what it makes."""

    uses: int = 0

    def __call__(self, x: Item, y: Item) -> Item:
        self.uses += 1
        return combine(x[0], y[0]), max(x[1], y[1]) + 1


Scan = Callable[[list[Item], Callable[[Item, Item], Item]], list[Item]]


def odd_even(items: list[Item], by: Callable[[Item, Item], Item]) -> list[Item]:
    """All prefixes: of neighbouring pairs first, then of the ones between (Blelloch 1990, work-efficient)."""
    if len(items) == 1:
        return items
    pairs = [by(items[i], items[i + 1]) for i in range(0, len(items) - 1, 2)]
    done = odd_even(pairs, by)
    out = [items[0]]
    for i in range(1, len(items)):
        out.append(done[i // 2] if i % 2 else by(done[i // 2 - 1], items[i]))
    return out


def hillis_steele(items: list[Item], by: Callable[[Item, Item], Item]) -> list[Item]:
    """All prefixes in ⌈log2 N⌉ rounds of shifted combinations (Hillis and Steele 1986)."""
    shift = 1
    while shift < len(items):
        items = [by(items[i - shift], x) if i >= shift else x for i, x in enumerate(items)]
        shift *= 2
    return items


def scans(
    lengths: Sequence[int] = (8, 16, 64, 128), linear: Scan = odd_even, short: Scan = hillis_steele
) -> ClaimFinding:
    """Do scans give all prefix attentions, one in at most 2N operations, one in depth ⌈log2 N⌉?

    Args:
        lengths: numbers of tokens.
        linear: the scan of at most 2N operations and depth 2⌈log2 N⌉.
        short: the scan of at most N⌈log2 N⌉ operations and depth ⌈log2 N⌉.
    """
    rows, wrong = [], []
    for length in lengths:
        q, k, v = tokens(length, 53)
        leaves = [leaf(score(q[0], x), y) for x, y in zip(k, v, strict=True)]
        expected = running(leaves, combine)
        depth = (length - 1).bit_length()
        found: list[int] = []
        for scan, work, most in ((linear, 2 * length, 2 * depth), (short, length * depth, depth)):
            count = _Count()
            result = scan([(x, 0) for x in leaves], count)
            deepest = max(x[1] for x in result)
            if [x[0] for x in result] != expected or count.uses > work or deepest > most:
                wrong.append(
                    f"N = {length}: {count.uses} operations (at most {work}), depth {deepest} (at most "
                    f"{most})"
                )
            found += [count.uses, deepest]
        rows.append((length, length - 1, *found, length * (length - 1) // 2))
    titles = (
        "N",
        "one after another: operations",
        "odd–even: operations",
        "odd–even: depth",
        "Hillis–Steele: operations",
        "Hillis–Steele: depth",
        "every prefix anew: operations",
    )
    table = {title: [row[i] for row in rows] for i, title in enumerate(titles)}
    names = [title for title in titles if "operations" in title]
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"all prefixes exactly equal to the recurrence's at N = {list(lengths)} (seed 53), "
        "operations and "
        "depth counted: " + ("; ".join(wrong) or "within 2N and 2⌈log2 N⌉, and N⌈log2 N⌉ and ⌈log2 N⌉"),
        table=table,
        plots=(
            Plot(
                "operations for all prefixes",
                "line",
                {
                    "N": [row[0] for row in rows] * len(names),
                    "operations": [x for name in names for x in table[name]],
                    "scan": [name.split(":")[0] for name in names for _ in rows],
                },
                "N",
                "operations",
                "scan",
                ("N", "operations"),
            ),
        ),
        counterexample=wrong[0] if wrong else "",
        seed=53,
    )


def block_by_block(length: int = 23, by: Combine = combine) -> ClaimFinding:
    """Is the result the same for blocks of every size, the last one ragged, with b scores held at a time?"""
    q, k, v = tokens(length, 55)
    expected = attention([score(q[0], x) for x in k], v)
    rows = []
    for b in range(1, length + 1):
        state, held = nothing(len(v[0])), 0
        for piece in chunks(length, b):
            scores = [score(q[0], x) for x in k[piece]]
            held = max(held, len(scores) + len(state.a) + 2)
            m = max(scores)
            weights = [TWO ** (s - m) for s in scores]
            block = State(
                m,
                sum(weights),
                tuple(
                    sum(w * x[c] for w, x in zip(weights, v[piece], strict=True)) for c in range(len(v[0]))
                ),
            )
            state = by(state, block)
        rows.append((b, state.output == expected, held))
    wrong = [row[0] for row in rows if not row[1]]
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"blocks of 1 to {length} tokens (seed 55): {len(wrong)} differ from attention over all "
        f"{length}; "
        f"numbers held: b scores and the state's {2 + len(v[0])}",
        table={title: [row[i] for row in rows] for i, title in enumerate(("b", "equal", "numbers held"))},
        counterexample=f"b = {wrong[0]}" if wrong else "",
        seed=55,
    )


CLAIMS: Final = (
    Claim(
        id="AAR-1",
        subject="attention as an RNN",
        title="the cell with a fixed query",
        statement="m_k = max(m_(k−1), s_k), c_k = c_(k−1) e^(m_(k−1) − m_k) + e^(s_k − m_k), a_k likewise "
        "with "
        "v_k: a_k/c_k is the attention of the query over the first k tokens, for every k; 1 ≤ c_k ≤ k.",
        source=SOURCE + ", the RNN cell",
        kind="exact",
        check=lambda lab: recurrence(lab.choose(40, 200, 1000)),
        control=lambda lab: recurrence(12, _forgetful),
    ),
    Claim(
        id="AAR-2a",
        subject="attention as an RNN",
        title="the operator is a commutative monoid",
        statement="(m, u, w) ⊕ (m', u', w') = (max, rescaled sums) is associative and commutative with (−∞, "
        "0, 0) "
        "neutral, in exact arithmetic.",
        source=SOURCE + ", the scan operator; Milakov and Gimelshein, arXiv 1805.02867",
        kind="exact",
        check=lambda lab: monoid(lab.choose(5, 6, 7)),
        control=lambda lab: monoid(4, _average),
    ),
    Claim(
        id="AAR-2b",
        subject="attention as an RNN",
        title="all prefixes by a parallel scan",
        statement="A prefix scan of ⊕ gives the attention over all N prefixes with O(N) operations "
        "(Blelloch) or "
        "O(N log N) (Hillis and Steele), in depth O(log N).",
        source=SOURCE + ", many-to-many by the parallel prefix scan",
        kind="count",
        check=lambda lab: scans(lab.choose((8, 13, 64, 128), (8, 13, 64, 256, 1000, 1024))),
        control=lambda lab: scans((16, 64), linear=hillis_steele),
    ),
    Claim(
        id="AAR-4",
        subject="attention as an RNN",
        title="block by block",
        statement="Tokens may be taken b at a time with O(b) memory: the result is that of online softmax "
        "and does "
        "not depend on b.",
        source=SOURCE + ", the block-by-block form",
        kind="exact",
        check=lambda lab: block_by_block(lab.choose(23, 61)),
        control=lambda lab: block_by_block(9, _forgetful),
    ),
)
