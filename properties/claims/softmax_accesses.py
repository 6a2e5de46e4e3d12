"""Memory accesses of softmax algorithms, counted by running them on a memory that counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = ["ALGORITHMS", "CLAIMED", "CLAIMS", "Counting", "Memory", "accesses", "naive", "online", "safe"]

_SEED = 24


@dataclass
class Counting:
    """Loads and stores so far."""

    loads: int = 0
    stores: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.loads + self.stores


@dataclass
class Memory:
    """Numbers in memory, each read and each write of which is counted."""

    count: Counting
    numbers: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Any:
        self.count.loads += 1
        return self.numbers[i]

    def __setitem__(self, i: int, value: Any) -> None:
        self.count.stores += 1
        self.numbers[i] = value


def _largest(x: Memory) -> float:
    return max(float(x[i]) for i in range(len(x)))


def _written(x: Memory, y: Memory, m: float, d: float) -> None:
    for i in range(len(x)):
        y[i] = math.exp(x[i] - m) / d


def naive(x: Memory, y: Memory) -> None:
    """Algorithm 1: one pass for the sum, one for the weights."""
    _written(x, y, 0.0, sum(math.exp(x[i]) for i in range(len(x))))


def safe(x: Memory, y: Memory) -> None:
    """Algorithm 2: a pass for the maximum before those."""
    m = _largest(x)
    _written(x, y, m, sum(math.exp(x[i] - m) for i in range(len(x))))


def _running(x: Memory, found: Callable[[float, int], None] | None = None) -> tuple[float, float]:
    """m and d of one pass; ``found`` is told every logit."""
    m, d = -math.inf, 0.0
    for i in range(len(x)):
        logit = x[i]
        before, m = m, max(m, logit)
        d = d * math.exp(before - m) + math.exp(logit - m)
        if found:
            found(logit, i)
    return m, d


def online(x: Memory, y: Memory) -> None:
    """Algorithm 3: maximum and sum in one pass."""
    _written(x, y, *_running(x))


class _Top:
    """The k largest so far, in registers."""

    def __init__(self, k: int) -> None:
        self.k, self.best = k, list[tuple[float, int]]()

    def __call__(self, value: float, place: int) -> None:
        self.best = sorted([*self.best, (value, place)], key=lambda pair: (-pair[0], pair[1]))[: self.k]


def _top_of(y: Memory, out: Memory, k: int) -> None:
    top = _Top(k)
    for i in range(len(y)):
        top(y[i], i)
    for i, pair in enumerate(top.best):
        out[i] = pair


def _unfused(softmax: Callable[[Memory, Memory], None], x: Memory, y: Memory, out: Memory, k: int) -> None:
    softmax(x, y)
    _top_of(y, out, k)


def _fused(x: Memory, y: Memory, out: Memory, k: int) -> None:
    """Algorithm 4: maximum, sum and the k largest logits in one pass; nothing of length V is written."""
    top = _Top(k)
    m, d = _running(x, top)
    for i, (logit, place) in enumerate(top.best):
        out[i] = (math.exp(logit - m) / d, place)


ALGORITHMS: Final[dict[str, Callable[[Memory, Memory, Memory, int], None]]] = {
    "naive softmax": lambda x, y, out, k: naive(x, y),
    "safe softmax": lambda x, y, out, k: safe(x, y),
    "online softmax": lambda x, y, out, k: online(x, y),
    "safe softmax, then top-k": lambda x, y, out, k: _unfused(safe, x, y, out, k),
    "online softmax, then top-k": lambda x, y, out, k: _unfused(online, x, y, out, k),
    "online softmax and top-k in one pass": _fused,
}
CLAIMED: Final = dict(zip(ALGORITHMS, (3, 4, 3, 5, 4, 1), strict=True))
"""Accesses per element, the k results of top-k not counted."""


def accesses(
    lengths: Sequence[int], k: int = 5, algorithms: dict[str, Callable[..., None]] | None = None
) -> ClaimFinding:
    """Are the accesses exactly c·V, and c·V + k with top-k, and the results right?"""
    rng = np.random.default_rng(_SEED)
    table: dict[str, list[Any]] = {"algorithm": [], "V": [], "loads": [], "stores": [], "per element": []}
    wrong = ""
    for length in lengths:
        logits = rng.normal(0.0, 2.0, length).tolist()
        weights = np.exp(logits) / np.exp(logits).sum()
        best = sorted(range(length), key=lambda i: -logits[i])[:k]
        for name, algorithm in (algorithms or ALGORITHMS).items():
            count = Counting()
            x, y, out = (Memory(count, list(row)) for row in (logits, [None] * length, [None] * k))
            algorithm(x, y, out, k)
            extra = k if "top-k" in name else 0
            per = (count.total - extra) / length
            if extra:
                right = [place for _, place in out.numbers] == best
                right = right and np.allclose([value for value, _ in out.numbers], weights[best], rtol=1e-12)
            else:
                right = np.allclose(y.numbers, weights, rtol=1e-12)
            if (per != CLAIMED[name] or not right) and not wrong:
                wrong = (
                    f"{name}, V = {length}: {count.loads} loads, {count.stores} stores, {per:g} an element"
                )
            for column, entry in zip(table, (name, length, count.loads, count.stores, per), strict=True):
                table[column].append(entry)
    counts = dict(zip(table["algorithm"], table["per element"], strict=True))
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"run on memories that count, V in {list(lengths)}, k = {k}, results compared with the "
        "direct ones: "
        + ", ".join(f"{name} {value:g}" for name, value in counts.items())
        + f" accesses an element, and {k} stores of top-k's results"
        + (f"; not so: {wrong}" if wrong else "; safe by online 4/3, with top-k 5"),
        table=table,
        counterexample=wrong,
        seed=_SEED,
    )


def _with_a_pass_too_many() -> dict[str, Callable[..., None]]:
    def slow(x: Memory, y: Memory, out: Memory, k: int) -> None:
        m = _largest(x)
        _written(x, y, m, _running(x)[1])

    return {**ALGORITHMS, "online softmax": slow}


CLAIMS: Final = (
    Claim(
        id="ONL-3a",
        subject="online softmax",
        title="memory accesses",
        statement="Per element softmax makes 3 memory accesses (naive), 4 (safe), 3 (online); with top-k 5 "
        "(safe, then "
        "top-k), 4 (online, then top-k), 1 (one pass): 4/3 and 5 times fewer.",
        source="Milakov & Gimelshein, arXiv 1805.02867, sections 2 to 4",
        kind="count",
        check=lambda lab: accesses(lab.choose((8, 100, 1000), (8, 100, 1000, 25000))),
        control=lambda lab: accesses((8, 100), algorithms=_with_a_pass_too_many()),
    ),
    Claim(
        id="ONL-3b",
        subject="online softmax",
        title="measured speeds",
        statement="On a V100, online softmax is about 1.3 times as fast as safe softmax for V ≥ 4000 at a "
        "batch of 4000, "
        "and fused with top-k (k = 5) up to 5 times at V = 25000.",
        source="Milakov & Gimelshein, arXiv 1805.02867, section 5",
        kind="none",
        check=lambda lab: ClaimFinding(
            status="OPEN",
            evidence="a timing on a V100 with the paper's kernels; neither is at hand. The accesses behind "
            "it are counted "
            "in ONL-3a: ratios of 4/3 and 5 are what memory traffic alone would give",
        ),
        control=None,
    ),
)
