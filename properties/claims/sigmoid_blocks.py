"""Claims about blocks of keys: what sigmoid attention can add up, what softmax has to merge, and gradients.

In exact rationals: with w = e^z the weights are w/(w + n) and w/Σw. SIG-9; the code of
apple/ml-sigmoid-attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.sigmoid import PAPER, SUBJECT
from attnproof.properties.forms.base import Array
from attnproof.properties.forms.numbers import Dual, rationals

__all__ = [
    "CLAIMS",
    "added",
    "blocks_add",
    "gradient",
    "merged",
    "output",
    "sigmoid",
    "softmax",
    "softmax_in_parts",
]

Weights = Callable[[Array, int], Array]
"""From e^z (M, block) of some of the keys and the number n of all keys to their weights (M, block)."""

State = tuple[int, Fraction, Fraction]
"""Of a set of keys: largest power s of their e^z = 2^s, Σ 2^(s_j − s), and Σ 2^(s_j − s) v_j."""

_QUERIES, _KEYS, _WIDTH = 3, 6, 2


def sigmoid(block: Array, n: int) -> Array:
    """σ(z − log n) = w/(w + n)."""
    found: Array = block / (block + flint.fmpq(n))
    return found


def softmax(block: Array, n: int) -> Array:
    """w/Σw over the keys that are given: softmax if they are all."""
    found: Array = block / block.sum(axis=1, keepdims=True)
    return found


def _inputs(seed: int) -> tuple[Array, Array, Array]:
    """Positive e^z (M, n), v (n, E) and do (M, E), rational."""
    rng = np.random.default_rng(seed)
    w = rationals(rng, _QUERIES, _KEYS, low=1, high=40)
    return w, rationals(rng, _KEYS, _WIDTH), rationals(rng, _QUERIES, _WIDTH)


def blocks_add(
    weights: Weights = sigmoid, sizes: Sequence[int] = (1, 2, 3, 4, 5), seed: int = 4
) -> ClaimFinding:
    """Is the output the sum of the outputs of blocks of keys, in every order, each formed without the others?

    Args:
        weights: of a block; sizes: lengths of blocks, of which the last may be shorter; seed: of the inputs.
    """
    w, v, _ = _inputs(seed)
    whole = weights(w, _KEYS) @ v
    rows, wrong = [], []
    for size in sizes:
        parts = [
            weights(w[:, first : first + size], _KEYS) @ v[first : first + size]
            for first in range(0, _KEYS, size)
        ]
        orders = list(itertools.permutations(parts))[:24]
        apart = [order for order in orders if (sum(order[1:], start=order[0]) != whole).any()]
        rows.append((size, len(orders), not apart))
        if apart:
            wrong.append((size, sum(parts[1:], start=parts[0])[0, 0]))
    titles = ("keys a block", "orders", "equal")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{_KEYS} keys, {_QUERIES} queries, seed {seed}, {sum(row[1] for row in rows)} sums of "
        f"blocks of {list(sizes)} keys: "
        + (f"differ at {[size for size, _ in wrong]}" if wrong else "all equal, exactly"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="; ".join(
            f"e^z = {', '.join(map(str, w[0]))}, v = {', '.join(map(str, v[:, 0]))}: {whole[0, 0]}, sum of "
            f"blocks of {size}: {found}"
            for size, found in wrong[-1:]
        ),
        seed=seed,
    )


def _fused(p: Array, dp: Array) -> Array:
    """fma(−a, ab, ab) of a = P and ab = P·dP, as the code has it: P(1 − P)dP."""
    ab = p * dp
    found: Array = -p * ab + ab
    return found


def gradient(weights: Weights = sigmoid, seed: int = 5) -> ClaimFinding:
    """Is dS = P∘(1 − P)∘dP, with dP = dO Vᵀ and no row sum D? Against exact derivatives by dual numbers.

    e^z has the derivative e^z by z, so that w + ε·w stands for a logit z + ε.

    Args:
        weights: of all keys; seed: of the inputs.
    """
    w, v, do = _inputs(seed)
    formula = _fused(weights(w, _KEYS), do @ v.T)
    rows, wrong = [], []
    for i, j in np.ndindex(w.shape):
        moved = w.copy()
        moved[i, j] = Dual(w[i, j], w[i, j])
        p = weights(moved, _KEYS)
        truth = sum((Dual.of(x).slope for x in ((p @ v) * do).flat), flint.fmpq(0))
        rows.append((int(i), int(j), float(truth), float(formula[i, j])))
        if truth != formula[i, j]:
            wrong.append((i, j, truth, formula[i, j]))
    titles = ("query", "key", "derivative of Σ do·o by the logit", "P(1 − P)dP")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(rows)} derivatives of Σ do·o over the rationals by dual numbers, seed {seed}: "
        + (f"{len(wrong)} differ" if wrong else "all equal to fma(−P, P·dP, P·dP)"),
        table={title: [row[k] for row in rows] for k, title in enumerate(titles)},
        counterexample="; ".join(
            f"query {i}, key {j}: derivative {truth}, P(1 − P)dP = {found}"
            for i, j, truth, found in wrong[:1]
        ),
        seed=seed,
    )


def merged(a: State, b: State) -> State:
    """The state of two sets of keys from their states: both scaled to the larger maximum."""
    top = max(a[0], b[0])
    x, y = Fraction(2) ** (a[0] - top), Fraction(2) ** (b[0] - top)
    return top, a[1] * x + b[1] * y, a[2] * x + b[2] * y


def added(a: State, b: State) -> State:
    """Two states without the rescaling, as if the maxima were equal."""
    return max(a[0], b[0]), a[1] + b[1], a[2] + b[2]


def _tree(leaves: Sequence[State], merge: Callable[[State, State], State]) -> State:
    """Pairs of neighbours at once, then pairs of pairs: as many steps as log₂ of the leaves."""
    while len(leaves) > 1:
        pairs = [merge(*leaves[i : i + 2]) for i in range(0, len(leaves) - 1, 2)]
        leaves = [*pairs, *leaves[2 * len(pairs) :]]
    return leaves[0]


def output(state: State) -> Fraction:
    """Softmax attention over the keys of a state, without their mass."""
    return state[2] / state[1]


def _collides(handed: Callable[[State], Any]) -> bool:
    """Do two rows of two keys hand over the same by halves, with different outputs? Then no merge exists.

    e^z = (1, 1) and (2, 1), both with the values (0, 1): softmax attention is 1/2 and 1/3.
    """
    rows = [[(s, Fraction(1), Fraction(0)), (0, Fraction(1), Fraction(1))] for s in (0, 1)]
    halves = [[handed(state) for state in row] for row in rows]
    return halves[0] == halves[1] and output(merged(*rows[0])) != output(merged(*rows[1]))


def _whole(state: State) -> State:
    """All of it."""
    return state


def softmax_in_parts(
    lengths: Sequence[int] = (2, 3, 8, 33),
    merge: Callable[[State, State], State] = merged,
    handed: Callable[[State], Any] = _whole,
) -> ClaimFinding:
    """Can rows of softmax be computed in parallel over keys? By merging states in a tree, exactly.

    Args:
        lengths: n; merge: of two states.
        handed: what a set of keys hands over; if that is too little, softmax attention does need the whole
            row, as claimed.
    """
    if _collides(handed):
        return ClaimFinding(
            status="HOLDS",
            evidence="two keys of e^z = 1, 1 and two of e^z = 2, 1, values 0, 1 both times, hand over "
            "the same "
            "by key, and softmax attention is 1/2 and 1/3: no merge of what is handed over gives both",
        )
    rows = []
    for n in lengths:
        powers, values = [(7 * j + 1) % 5 - 2 for j in range(n)], [Fraction(j * j % 7 - 3) for j in range(n)]
        whole = sum((Fraction(2) ** s * v for s, v in zip(powers, values, strict=True)), Fraction()) / sum(
            Fraction(2) ** s for s in powers
        )
        _, mass, out = _tree([(s, Fraction(1), v) for s, v in zip(powers, values, strict=True)], merge)
        rows.append((n, (n - 1).bit_length(), float(whole), float(out / mass), out / mass == whole))
    merges = all(row[-1] for row in rows)
    titles = ("n", "steps", "softmax attention", "merged in a tree", "equal")
    example = _tree([(0, Fraction(1), Fraction(0)), (1, Fraction(1), Fraction(1))], merge)
    return ClaimFinding(
        status="REFUTED" if merges else "OPEN",
        evidence=f"rows of {list(lengths)} keys merged pair by pair in ⌈log₂ n⌉ steps, every pair of a "
        "step at once: " + ("softmax attention exactly" if merges else "not softmax attention"),
        table={title: [row[k] for row in rows] for k, title in enumerate(titles)},
        counterexample="two keys of e^z = 1, 2 and v = 0, 1, each by itself (1, v); scaled to the larger "
        f"maximum {example[1]} and {example[2]}, of which the quotient {example[2] / example[1]} is "
        "softmax attention: two halves of a row need nothing of one another but their maxima and sums"
        if merges
        else "",
    )


CLAIMS: Final = (
    Claim(
        id="SIG-9a",
        subject=SUBJECT,
        title="blocks of keys add",
        statement="Sigmoid attention needs no row reduction: O = Σ over blocks of σ(S_block)V_block, in "
        "any order, with no maximum, no rescaling and no log-sum-exp.",
        source=f"{PAPER}, on FlashSigmoid; code of apple/ml-sigmoid-attention",
        kind="exact",
        check=lambda lab: blocks_add(),
        control=lambda lab: blocks_add(softmax),
        covers=("SIG-9",),
    ),
    Claim(
        id="SIG-9b",
        subject=SUBJECT,
        title="gradient without a row sum",
        statement="The gradient of sigmoid attention by its scores is dS = P∘(1 − P)∘dP with dP = dO Vᵀ, "
        "computed as fma(−P, P·dP, P·dP), without softmax's row sums D = rowsum(dO∘O).",
        source=f"{PAPER}, on FlashSigmoid; code of apple/ml-sigmoid-attention",
        kind="exact",
        check=lambda lab: gradient(),
        control=lambda lab: gradient(softmax),
    ),
    Claim(
        id="SIG-9c",
        subject=SUBJECT,
        title="softmax in parallel",
        statement="Sigmoid attention can be computed in parallel over keys, unlike softmax attention, "
        "which needs a normalisation over the whole row.",
        source=f"summary of {PAPER} among the source articles",
        kind="exact",
        check=lambda lab: softmax_in_parts(),
        # Blocks that hand over their outputs alone.
        control=lambda lab: softmax_in_parts(handed=output),
        covers=("SEED2-3",),
    ),
)
