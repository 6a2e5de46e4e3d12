"""Linear attention in its forms: S_i = S_{i−1} + φ(k_i) v_iᵀ, z_i = z_{i−1} + φ(k_i), o_i = S_iᵀφ(q_i).

With a normaliser o_i is divided by φ(q_i)·z_i. Katharopoulos et al. 2020, arXiv
2006.16236; Based's and ReBased's maps: theory.md LIN-1, LIN-6. The forms take
features, already mapped: (N, F). States are pairs (S (F, E), z (F,)).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnproof.properties.forms.base import Array, chunks, start

__all__ = ["FEATURES", "State", "chunkwise", "features", "parallel", "quadratic", "recurrent", "step"]

State = tuple[Array, Array]
FEATURES = ("identity", "relu", "squared", "taylor")
"""The maps that are rational."""


def features(q: Array, k: Array, name: str, root: Any = 1) -> tuple[Array, Array]:
    """φ(q) and φ(k) of width F: their products are the map's weights, and rational where q, k and root are.

    "taylor" has the weights 1 + x + x²/2 of x = q·k/root, with root = √D in Based. The map that is the same
    on both sides, (1, x·D^(−1/4), vec(x xᵀ)·(2D)^(−1/2)), is irrational for most D; here all factors are q's,
    which changes no weight: (1, q/root, vec(q qᵀ)/(2·root²)) and (1, k, vec(k kᵀ)).

    Raises:
        ValueError: the map is not one of :data:`FEATURES`.
    """
    if name == "identity":
        return q, k
    if name == "relu":
        return np.maximum(q, 0), np.maximum(k, 0)
    if name == "squared":
        return _squares(q), _squares(k)
    if name == "taylor":
        one = np.ones((len(q), 1), dtype=q.dtype)
        return (
            np.concatenate([one, q / root, _squares(q) / (2 * root * root)], axis=1),
            np.concatenate([one, k, _squares(k)], axis=1),
        )
    raise ValueError(f"name={name!r} is no rational feature map; give one of {', '.join(FEATURES)}")


def _squares(x: Array) -> Array:
    return (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)


def _start(k: Array, v: Array, state: State | None) -> State:
    S, z = state or (None, None)
    return start(S, k.shape[1], v.shape[1], like=v), start(z, k.shape[1], like=v)


def step(q: Array, k: Array, v: Array, state: State, *, normalize: bool = False) -> tuple[Array, State]:
    """One position: features q, k (F,), v (E,)."""
    S, z = state[0] + np.outer(k, v), state[1] + k
    o = q @ S
    return o / (q @ z) if normalize else o, (S, z)


def recurrent(
    q: Array, k: Array, v: Array, state: State | None = None, *, normalize: bool = False
) -> tuple[Array, State]:
    """o (N, E) and the state after the last position, one step after the other.

    Raises:
        ZeroDivisionError: normalize, and a row's normaliser is 0 (theory.md LIN-7); likewise below.
    """
    state, o = _start(k, v, state), np.empty_like(v)
    for t in range(len(v)):
        o[t], state = step(q[t], k[t], v[t], state, normalize=normalize)
    return o, state


def parallel(
    q: Array, k: Array, v: Array, state: State | None = None, *, normalize: bool = False
) -> tuple[Array, State]:
    """The quadratic form: O = (QKᵀ ∘ M)V with M lower triangular, and what the state adds."""
    S, z = _start(k, v, state)
    weights = np.tril(q @ k.T)
    o = weights @ v + q @ S
    if normalize:
        o = o / (weights.sum(axis=1) + q @ z)[:, None]
    return o, (S + k.T @ v, z + k.sum(axis=0))


def chunkwise(
    q: Array, k: Array, v: Array, state: State | None = None, *, chunk: int, normalize: bool = False
) -> tuple[Array, State]:
    """The parallel form inside chunks of length ``chunk``, the state between them."""
    state, o = _start(k, v, state), np.empty_like(v)
    for piece in chunks(len(v), chunk):
        o[piece], state = parallel(q[piece], k[piece], v[piece], state, normalize=normalize)
    return o, state


def quadratic(q: Array, k: Array, v: Array, *, by_state: bool) -> Array:
    """Attention without a mask and without a normaliser: Q(KᵀV) or (QKᵀ)V, which are associative."""
    return q @ (k.T @ v) if by_state else (q @ k.T) @ v
