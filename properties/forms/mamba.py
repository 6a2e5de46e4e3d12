"""Mamba's selective scan, h_t = a_t ∘ h_{t−1} + b_t, y_t = C_t·h_t, in its forms and by parallel scans.

One channel: decays a and inputs b (T, N), read-outs C (T, N). How a and b come from Δ, A, B and x is left to
the caller: a = e^(ΔA), and b = B̄x with B̄ either A⁻¹(e^(ΔA) − 1)B (zero-order hold, the paper's equation 4) or
ΔB (the shipped code). Gu and Dao, arXiv 2312.00752, sections 2, 3.2 and 3.5; the scan operator is Blelloch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attnproof.properties.forms.base import Array, chunks, products_up_to, segments, start

__all__ = [
    "Combine",
    "Pair",
    "chunkwise",
    "combine",
    "doubling",
    "matrix",
    "recurrent",
    "sequential",
    "tree",
]

Pair = tuple[Any, Any]
"""A decay and what has been added since: the map h → a·h + b."""

Combine = Callable[[Pair, Pair], Pair]


def recurrent(a: Array, b: Array, C: Array, state: Array | None = None) -> tuple[Array, Array]:
    """y (T,) and the last state (N,)."""
    h, y = start(state, a.shape[1], like=b), np.empty(len(a), dtype=b.dtype)
    for t in range(len(a)):
        h = a[t] * h + b[t]
        y[t] = C[t] @ h
    return y, h


def chunkwise(a: Array, b: Array, C: Array, state: Array | None = None, *, chunk: int) -> tuple[Array, Array]:
    """Products of decays over segments inside chunks of length ``chunk``, the state between them."""
    h, y = start(state, a.shape[1], like=b), np.empty(len(a), dtype=b.dtype)
    for piece in chunks(len(a), chunk):
        own = (segments(a[piece]) * b[piece][None]).sum(axis=1) + products_up_to(a[piece]) * h
        y[piece], h = (C[piece] * own).sum(axis=1), own[-1]
    return y, h


def matrix(a: Array, gains: Array, C: Array) -> Array:
    """M (T, T) with y = M x where b_t = gains_t·x_t: M_ts = Σ_n C_tn (Π_{s<r≤t} a_rn) gains_sn."""
    table: Array = (C[:, None, :] * segments(a) * gains[None]).sum(axis=2)
    return table


def combine(first: Pair, second: Pair) -> Pair:
    """(a, b) ∘ (a', b') = (a'a, a'b + b'): the second map after the first."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def sequential(pairs: Sequence[Pair], operator: Combine = combine) -> list[Pair]:
    """All prefixes, one after the other."""
    out = [pairs[0]]
    for pair in pairs[1:]:
        out.append(operator(out[-1], pair))
    return out


def doubling(pairs: Sequence[Pair], operator: Combine = combine) -> list[Pair]:
    """All prefixes in ⌈log₂ T⌉ rounds (Hillis and Steele): every round doubles what a pair covers."""
    out, reach = list(pairs), 1
    while reach < len(out):
        out = [operator(out[i - reach], pair) if i >= reach else pair for i, pair in enumerate(out)]
        reach *= 2
    return out


def tree(pairs: Sequence[Pair], operator: Combine = combine) -> list[Pair]:
    """All prefixes in fewer than 2T operations (Blelloch): those of neighbours' pairs, then the rest."""
    if len(pairs) < 2:
        return list(pairs)
    joined = [operator(pairs[i], pairs[i + 1]) for i in range(0, len(pairs) - 1, 2)]
    above = tree(joined, operator)
    out = []
    for i, pair in enumerate(pairs):
        if i % 2:
            out.append(above[i // 2])
        else:
            out.append(operator(above[i // 2 - 1], pair) if i else pair)
    return out
