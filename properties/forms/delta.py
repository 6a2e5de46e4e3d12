"""The delta rule in its forms: S' = α_t ∘ S_{t−1}, S_t = S' + β_t k_t (v_t − S'ᵀk_t)ᵀ, o_t = S_tᵀq_t.

States are (D, E), the transpose of the papers'; β (N,); α (N, D) (KDA), (N, 1) (Gated DeltaNet) or None for
ones (DeltaNet). arXiv 2102.11174, 2406.06484, 2412.06464; theory.md DN-1 to DN-4.
"""

from __future__ import annotations

import numpy as np

from attnproof.properties.forms.base import Array, chunks, products_after, products_up_to, start
from attnproof.properties.forms.gated import weights

__all__ = ["ORDERS", "chunkwise", "parallel", "printed", "recurrent", "solve", "step", "transition"]

ORDERS = ("decay, then read", "read, then decay", "erase, then decay")
"""Transitions (I − βkkᵀ)D (Gated DeltaNet, KDA), D − βkkᵀ (RWKV-7's with a = −b/β = −k), D(I − βkkᵀ)."""


def step(
    q: Array, k: Array, v: Array, beta: object, alpha: Array, state: Array, *, order: str = ORDERS[0]
) -> tuple[Array, Array]:
    """One position: q, k (D,), v (E,), β a number, α (D or 1,), state (D, E).

    Raises:
        ValueError: the order is not one of :data:`ORDERS`.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; give one of {ORDERS}")
    decayed = alpha[:, None] * state
    if order == ORDERS[0]:
        after = decayed + beta * np.outer(k, v - k @ decayed)
    elif order == ORDERS[1]:
        after = decayed + beta * np.outer(k, v - k @ state)
    else:
        after = alpha[:, None] * (state - beta * np.outer(k, k @ state)) + beta * np.outer(k, v)
    return q @ after, after


def recurrent(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    alpha: Array | None = None,
    state: Array | None = None,
    *,
    order: str = ORDERS[0],
) -> tuple[Array, Array]:
    """o (N, E) and the last state (D, E), one step after the other."""
    alpha = np.ones_like(k[:, :1]) if alpha is None else alpha
    state, o = start(state, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for t in range(len(v)):
        o[t], state = step(q[t], k[t], v[t], beta[t], alpha[t], state, order=order)
    return o, state


def transition(k: Array, beta: object) -> Array:
    """I − βkkᵀ (D, D).

    Its square is I − β(2 − β‖k‖²)kkᵀ, and it is symmetric: ‖x‖² − ‖(I − βkkᵀ)x‖² = β(2 − β‖k‖²)(k·x)². So
    ‖I − βkkᵀ‖ ≤ 1 exactly where β(2 − β‖k‖²) ≥ 0 or k = 0, that is 0 ≤ β‖k‖² ≤ 2; otherwise x = k is
    stretched by |1 − β‖k‖²| > 1. Products of such transitions and decays of at most 1 then have norm ≤ 1 too.
    """
    unit = np.zeros((len(k), len(k)), dtype=k.dtype)
    unit[np.diag_indices(len(k))] = 1
    moved: Array = unit - beta * np.outer(k, k)
    return moved


def parallel(
    q: Array, k: Array, v: Array, beta: Array, alpha: Array | None = None, state: Array | None = None
) -> tuple[Array, Array]:
    """The attention matrix of the delta rule: w_ij = β_j q_iᵀ A_i ⋯ A_{j+1} k_j with A = (I − βkkᵀ)D.

    Every row walks back through its transitions, no system is solved: independent of the WY form.
    """
    n, width = k.shape
    alpha = np.ones_like(k[:, :1]) if alpha is None else alpha
    state = start(state, width, v.shape[1], like=v)
    # Below the queries the unit vectors, read at the end: their outputs are the last state.
    unit = np.zeros((width, width), dtype=k.dtype)
    unit[np.diag_indices(width)] = 1
    reads = np.concatenate([q, unit])
    last = np.minimum(np.arange(n + width), n - 1)
    w = np.zeros((n + width, n), dtype=k.dtype)
    for j in reversed(range(n)):
        rows = last >= j
        w[rows, j] = (reads[rows] @ k[j]) * beta[j]
        reads[rows] = (reads[rows] - np.outer(w[rows, j], k[j])) * alpha[j]
    o = w @ v + reads @ state
    return o[:n], o[n:]


def solve(lower: Array, right: Array) -> Array:
    """x of (I + lower) x = right with lower strictly lower triangular: forward substitution."""
    x = right.copy()
    for i in range(1, len(right)):
        x[i] = x[i] - lower[i, :i] @ x[:i]
    return x


def chunkwise(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    alpha: Array | None = None,
    state: Array | None = None,
    *,
    chunk: int,
    block: int | None = None,
) -> tuple[Array, Array]:
    """WY/UT: U = T V, W = T (Λ∘K), T = [I + strictLower(diag(β) A)]⁻¹ diag(β) with the decayed A of the keys.

    O = (Q∘Λ)S + P(U − WS), S' = Λ_C∘S + (K∘Γ)ᵀ(U − WS) with the decayed weights P (DN-2, DN-3; with α (N, D)
    KDA's).
    """
    alpha = np.ones_like(k[:, :1]) if alpha is None else alpha
    state, o = start(state, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for piece in chunks(len(v), chunk):
        Q, K, V, a, b = q[piece], k[piece], v[piece], alpha[piece], beta[piece, None]
        into, after = products_up_to(a), products_after(a)
        lower = b * np.tril(weights(K, K, a, block=block), -1)
        # One system: T(V − (Λ∘K)S) is U − WS.
        new = solve(lower, b * (V - (K * into) @ state))
        o[piece] = (Q * into) @ state + weights(Q, K, a, block=block) @ new
        state = into[-1][:, None] * state + (K * after).T @ new
    return o, state


def printed(
    q: Array, k: Array, v: Array, beta: Array, alpha: Array, *, chunk: int, mask_only: bool
) -> tuple[Array, Array]:
    """Gated DeltaNet's chunk formula in the paper's terms (DN-3): W without gates, Γ_ij = γ_i/γ_j, α (N, 1).

    O = (γ∘Q)S + (QKᵀ ∘ Γ)(Ũ − (γ∘W)S), where the paper prints the mask M in place of Γ.

    Args:
        mask_only: M as printed.
    """
    state, o = start(None, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for piece in chunks(len(v), chunk):
        Q, K, V, b = q[piece], k[piece], v[piece], beta[piece, None]
        gamma = products_up_to(alpha[piece])
        ratio = np.tril(gamma / gamma.T)
        keys = K @ K.T
        U = solve(np.tril(b * keys * ratio, -1), b * V)
        W = solve(np.tril(b * keys, -1), b * K)
        new = U - (gamma * W) @ state
        shape = np.tril(np.ones_like(ratio)) if mask_only else ratio
        o[piece] = (gamma * Q) @ state + ((Q @ K.T) * shape) @ new
        state = gamma[-1] * state + (K * (gamma[-1] / gamma)).T @ new
    return o, state
