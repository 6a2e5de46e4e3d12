"""Gated linear attention in its forms: S_t = G_t ∘ S_{t−1} + k_t v_tᵀ, o_t = S_tᵀ q_t.

G_t = α_t β_tᵀ in the forms with matrix products (α (N, D) or (N, 1), β (N, E) or None for ones); the
recurrence takes any G. RWKV-6 reads before it decays, with a bonus u for the position itself:
o_t = (S_{t−1} + diag(u) k_t v_tᵀ)ᵀ q_t. Yang et al., arXiv 2312.06635; theory.md GLA-1 to GLA-3, RET-1,
RWK-2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnproof.properties.forms.base import (
    Array,
    chunks,
    products_after,
    products_up_to,
    segments,
    start,
)

__all__ = [
    "chunkwise",
    "factored",
    "gates",
    "parallel",
    "recurrent",
    "retention_chunkwise",
    "retention_parallel",
    "step",
    "weights",
]


def gates(alpha: Array, beta: Array | None = None) -> Array:
    """G (N, D or 1, E or 1) = α βᵀ at every position."""
    return alpha[:, :, None] if beta is None else alpha[:, :, None] * beta[:, None, :]


def step(
    q: Array, k: Array, v: Array, gate: Array, state: Array, bonus: Array | None = None
) -> tuple[Array, Array]:
    """One position: q, k (D,), v (E,), gate (D or 1, E or 1), state (D, E), bonus u (D,) or None."""
    added = np.outer(k, v)
    after = gate * state + added
    return q @ (after if bonus is None else state + bonus[:, None] * added), after


def recurrent(
    q: Array, k: Array, v: Array, gate: Array, state: Array | None = None, *, bonus: Array | None = None
) -> tuple[Array, Array]:
    """o (N, E) and the last state (D, E). gate (N, D or 1, E or 1): any G, of rank 1 or not."""
    state, o = start(state, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for t in range(len(v)):
        o[t], state = step(q[t], k[t], v[t], gate[t], state, bonus)
    return o, state


def weights(q: Array, k: Array, alpha: Array, *, block: int | None = None) -> Array:
    """w_ij = Σ_c q_ic k_jc Π_{j<r≤i} α_rc for j ≤ i, else 0: (N, N).

    Args:
        block: secondary chunks of this length (GLA-3): columns before a block through its first position, as
            a matrix product of decayed queries and decayed keys, both by factors of at most 1.
    """
    out = np.zeros((len(q), len(k)), dtype=q.dtype)
    for rows in chunks(len(q), block or max(len(q), 1)):
        out[rows, rows] = _near(q[rows], k[rows], alpha[rows])
        if before := rows.start:
            decayed = k[:before] * products_after(alpha[:before])
            out[rows, :before] = (q[rows] * products_up_to(alpha[rows])) @ decayed.T
    return out


def _near(q: Array, k: Array, alpha: Array) -> Array:
    table = segments(alpha)
    near: Array
    if alpha.shape[1] == 1:
        near = (q @ k.T) * table[:, :, 0]
    else:
        near = (q[:, None, :] * table * k[None]).sum(axis=2)
    return near


def _own(
    q: Array, k: Array, v: Array, alpha: Array, beta: Array | None, bonus: Array | None, block: int | None
) -> Array:
    """What a chunk's own positions add to its output."""
    if bonus is not None:
        o: Array = (q * bonus * k).sum(axis=1)[:, None] * v
        # A read before the decay: the query stands where the position before it stood.
        o[1:] += weights(q[1:], k[:-1], alpha[:-1], block=block) @ v[:-1]
        return o
    p = weights(q, k, alpha, block=block)
    return p @ v if beta is None else (p[:, :, None] * segments(beta) * v[None]).sum(axis=1)


def parallel(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array | None = None,
    state: Array | None = None,
    *,
    bonus: Array | None = None,
    block: int | None = None,
) -> tuple[Array, Array]:
    """The quadratic form with every decay as a product over its segment: no division, right for gates of 0.

    Raises:
        ValueError: both β and a bonus, which no model has.
    """
    if beta is not None and bonus is not None:
        raise ValueError("beta and bonus are both given; RWKV-6 has no gate on values, give one of them")
    state, into = start(state, k.shape[1], v.shape[1], like=v), products_up_to(alpha)
    if not len(v):
        return np.empty_like(v), state
    carried, kept, after = into, into[-1:].T, products_after(alpha)
    if bonus is not None:
        carried = np.ones_like(into)
        carried[1:] = into[:-1]
    old, written = (q * carried) @ state, v
    if beta is not None:
        into_values = products_up_to(beta)
        old, written = old * into_values, v * products_after(beta)
        kept = kept * into_values[-1:]
    o = old + _own(q, k, v, alpha, beta, bonus, block)
    return o, kept * state + (k * after).T @ written


def chunkwise(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array | None = None,
    state: Array | None = None,
    *,
    chunk: int,
    bonus: Array | None = None,
    block: int | None = None,
) -> tuple[Array, Array]:
    """The parallel form inside chunks of length ``chunk``, the state between them (GLA-3)."""
    state, o = start(state, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for piece in chunks(len(v), chunk):
        own = None if beta is None else beta[piece]
        o[piece], state = parallel(
            q[piece], k[piece], v[piece], alpha[piece], own, state, bonus=bonus, block=block
        )
    return o, state


def factored(q: Array, k: Array, v: Array, alpha: Array, beta: Array | None = None) -> Array:
    """GLA-2 as written: O = [((Q∘B)(K⊘B)ᵀ ∘ M)(V⊘B̃)] ∘ B̃ with cumulative products B of α and B̃ of β.

    Raises:
        ZeroDivisionError: a gate of 0, over exact numbers.
    """
    into = products_up_to(alpha)
    p = np.tril((q * into) @ (k / into).T)
    if beta is None:
        return p @ v
    into_values = products_up_to(beta)
    return (p @ (v / into_values)) * into_values


def retention_parallel(q: Array, k: Array, v: Array, gamma: Any) -> Array:
    """RetNet's (QKᵀ ∘ D)V with D_ij = γ^(i−j)."""
    n = len(v)
    decay = np.zeros((n, n), dtype=q.dtype)
    for i in range(n):
        for j in range(i + 1):
            decay[i, j] = gamma ** (i - j)
    return ((q @ k.T) * decay) @ v


def retention_chunkwise(
    q: Array, k: Array, v: Array, gamma: Any, state: Array | None = None, *, chunk: int
) -> tuple[Array, Array]:
    """RET-1: O = (QKᵀ ∘ D)V + diag(γ^(i+1))QS, S ← γ^B S + Kᵀdiag(γ^(B−1−j))V, from 0 in a chunk of B."""
    state, o = start(state, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for piece in chunks(len(v), chunk):
        length = piece.stop - piece.start
        powers = np.array([[gamma**i] for i in range(length + 1)], dtype=q.dtype)
        own = retention_parallel(q[piece], k[piece], v[piece], gamma)
        o[piece] = own + powers[1:] * (q[piece] @ state)
        state = powers[length] * state + k[piece].T @ (powers[length - 1 :: -1] * v[piece])
    return o, state
