"""Claims about merging partial attention outputs: split-KV decoding, ring attention, cascades.

Exactly, over the rationals: a block of keys is known by e^L, the sum of its weights, and by its output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding

__all__ = ["CLAIMS", "Part", "merged", "merges", "no_operation", "partitions"]

_SEED = 25
_Q = flint.fmpq
Part = tuple[Any, Any]
"""(e^L, O) of a block of keys: the sum of its weights and its normalised output."""


def partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every partition of the items into non-empty blocks."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for parts in partitions(rest):
        yield [[first], *parts]
        for i in range(len(parts)):
            yield [*parts[:i], [first, *parts[i]], *parts[i + 1 :]]


def merged(a: Part, b: Part) -> Part:
    """Merge of normalised partial outputs (e^L, O): O = (e^{L_a} O_a + e^{L_b} O_b)/e^L, e^L the sum."""
    total = a[0] + b[0]
    return (total, (a[0] * a[1] + b[0] * b[1]) / total) if total != 0 else a


_MERGE_PROOF: Final = (
    "For all: both kinds of merge add the pairs (Σw, Σwv) = (e^L, e^L O) = (ℓe^m, o e^m), whatever m "
    "is; these "
    "are sums over keys, which may be taken in any order, and a masked block adds (0, 0)"
)


def merges(keys: int, merge: Callable[[Part, Part], Part] = merged) -> ClaimFinding:
    """Every partition of the keys, every order of its blocks: triples and normalised merges, exactly."""
    rng = np.random.default_rng(_SEED)
    w = [_Q(int(a), int(b)) for a, b in zip(rng.integers(1, 9, keys), rng.integers(1, 9, keys), strict=True)]
    v = [_Q(int(a), 7) for a in rng.integers(-20, 21, keys)]
    total = sum(w, _Q(0))
    due = sum((a * b for a, b in zip(w, v, strict=True)), _Q(0)) / total
    count, wrong = 0, ""
    masked = (_Q(0), _Q(12345))
    for parts in partitions(range(keys)):
        blocks = []
        for part in parts:
            size = sum((w[i] for i in part), _Q(0))
            blocks.append((size, sum((w[i] * v[i] for i in part), _Q(0)) / size))
        for order in itertools.permutations(blocks):
            count += 1
            results = [reduce(merge, order), reduce(merge, [*order, masked]), reduce(merge, [masked, *order])]
            triple = _triples(order)
            if (any(r != (total, due) for r in results) or triple != due) and not wrong:
                told = "; ".join(f"({a}, {b})" for a, b in order)
                wrong = f"blocks (e^L, O) = {told}: merged O = {results[0][1]}, due {due}"
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{count} ordered partitions of {keys} keys with rational weights and values (seed "
        f"{_SEED}), by triples "
        "(m, ℓ, o) and by normalised pairs (O, L), with a fully masked block before or after"
        + (f"; not so: {wrong}" if wrong else f": all equal the direct sum. {_MERGE_PROOF}"),
        counterexample=wrong,
        seed=_SEED,
    )


def _triples(blocks: Sequence[Part]) -> Any:
    """o/ℓ of the blocks' triples (m, ℓ, o), m an arbitrary number per block, combined from left to right."""
    m, l, o = _Q(0), _Q(0), _Q(0)
    for i, (size, mean) in enumerate(blocks):
        own = size / (i + 1)
        top = max(m, own)
        l = l * m / top + size / own * (own / top)
        o = o * m / top + size * mean / own * (own / top)
        m = top
    return o / l


def no_operation(outputs: Sequence[float] = (0.0, 1e30, math.inf, math.nan)) -> ClaimFinding:
    """Is merging a masked block (L = −∞) with output O a no-op in IEEE arithmetic, for each O?"""
    kept: list[float] = []
    changed: list[float] = []
    for o in outputs:
        weight = float(np.exp(-math.inf - 1.0))
        (kept if weight * o + 1.0 * 0.5 == 0.5 else changed).append(o)
    return ClaimFinding(
        status="HOLDS" if not changed else "CONDITIONAL" if kept else "REFUTED",
        evidence=f"e^(−∞ − L)·O + 1·O_a with O_a = 1/2: unchanged for O in {kept}"
        + (f", NaN for O in {changed}" if changed else ""),
        counterexample="O = NaN, as 0/0 of an empty row, and L = −∞: e^(−∞ − 1) = 0, 0·NaN = NaN, so the "
        "merged output is "
        "NaN. Skip blocks with L = −∞, or store O = 0 for them."
        if changed
        else "",
    )


CLAIMS: Final = (
    Claim(
        "ONL-4a",
        "online softmax",
        "merging partial outputs",
        "Attention over any partition of the keys, merged in any order by (m, ℓ, o) or by L = log(e^{L_a} + "
        "e^{L_b}), "
        "O = e^{L_a − L} O_a + e^{L_b − L} O_b, is attention over all keys; a fully masked block changes "
        "nothing.",
        "derived; split-KV decoding, ring attention",
        "exact",
        lambda lab: merges(lab.choose(4, 6, 6)),
        lambda lab: merges(3, lambda a, b: (a[0] + b[0], (a[1] + b[1]) / 2)),
        covers=("AAR-4",),
    ),
    Claim(
        "ONL-4b",
        "online softmax",
        "merging a masked block in floating point",
        "Merging a block with L = −∞ is a no-op in floating point, whatever its O.",
        "derived",
        "exact",
        lambda lab: no_operation(),
        lambda lab: no_operation((0.0, 1e30)),
    ),
)
