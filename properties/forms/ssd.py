"""State space duality: sequentially semiseparable matrices, Mamba-2's equal forms, and sums over segments.

A time-varying SSM h_t = A_t h_{t−1} + B_t x_t, y_t = C_t·h_t is y = M x with M_ji = C_jᵀ A_j … A_{i+1} B_i
(j ≥ i). Dao and Gu, arXiv 2405.21060, sections 3 and 5, listing 1. The scalar recurrence and its parallel
form are those of :mod:`.gated` with one decay a position; the block decomposition is its own here.
"""

from __future__ import annotations

from typing import Any

import flint
import numpy as np

from attnproof.properties.forms.base import (
    Array,
    chunks,
    products_after,
    products_up_to,
    segments,
)

__all__ = [
    "Realisation",
    "block_ranks",
    "blocks",
    "materialised",
    "quadratic",
    "realised",
    "run",
    "segment_sums",
    "step",
]

Realisation = tuple[list[Array], list[Array], list[Array]]
"""A_t (N_t, N_{t−1}), B_t (N_t,), C_t (N_t,) by position."""


def materialised(parts: Realisation) -> Array:
    """M (T, T) of any SSM, one input after the other."""
    A, B, C = parts
    length = len(B)
    out = np.zeros((length, length), dtype=object)
    for i in range(length):
        h = B[i]
        out[i, i] = C[i] @ h if len(h) else 0
        for j in range(i + 1, length):
            h = A[j] @ h
            out[j, i] = C[j] @ h if len(h) else 0
    return out


def run(parts: Realisation, x: Array) -> Array:
    """y (T,) by the recurrence."""
    A, B, C = parts
    h, y = np.zeros(A[0].shape[1], dtype=object), np.empty_like(x)
    for t in range(len(x)):
        h = A[t] @ h + B[t] * x[t]
        y[t] = C[t] @ h
    return y


def block_ranks(M: Array) -> list[int]:
    """Ranks over the rationals of M[i:, :i+1], one of which holds any submatrix on or below the diagonal."""
    return [flint.fmpq_mat([list(row) for row in M[i:, : i + 1]]).rank() for i in range(len(M))]


def realised(M: Array) -> Realisation:
    """An SSM with the lower triangular matrix M, its state at i as wide as the rank of M[i:, :i+1].

    That block is O·R with R the rows of its reduced echelon form. The state is R times the inputs so far; R
    holds the identity at its pivots, so that A_{i+1} is the next R at them.
    """
    A, B, C = [], [], []
    pivots: list[int] = []
    for i in range(len(M)):
        block = M[i:, : i + 1]
        reduced, rank = flint.fmpq_mat([list(row) for row in block]).rref()
        rows = np.array(reduced.tolist(), dtype=object).reshape(block.shape)[:rank]
        A.append(rows[:, pivots])
        B.append(rows[:, i])
        pivots = [next(c for c in range(i + 1) if row[c] != 0) for row in rows]
        C.append(block[0, pivots])
    return A, B, C


def step(x: Array, a: Any, B: Array, C: Array, state: Array) -> tuple[Array, Array]:
    """One position of a head: x (P,), decay a, B and C (N,), state (N, P)."""
    after = a * state + np.outer(B, x)
    return C @ after, after


def quadratic(x: Array, a: Array, B: Array, C: Array) -> Array:
    """Y = (L ∘ CBᵀ)X with L_ij = Π_{j<r≤i} a_r: x (T, P), a (T,), B and C (T, N)."""
    product: Array = (segments(a[:, None])[:, :, 0] * (C @ B.T)) @ x
    return product


def blocks(x: Array, a: Array, B: Array, C: Array, *, chunk: int) -> tuple[Array, Array]:
    """Listing 1 in its four steps: diagonal blocks, chunks' states, the recurrence of these, their outputs.

    Returns:
        Y (T, P) and the last state (N, P).
    """
    pieces = list(chunks(len(x), chunk))
    own = [quadratic(x[p], a[p], B[p], C[p]) for p in pieces]
    written = [(B[p] * products_after(a[p, None])).T @ x[p] for p in pieces]
    whole = [products_up_to(a[p, None])[-1, 0] for p in pieces]
    state = written[0] * 0
    y = np.empty_like(x)
    for index, p in enumerate(pieces):
        y[p] = own[index] + (C[p] * products_up_to(a[p, None])) @ state
        state = whole[index] * state + written[index]
    return y, state


def segment_sums(g: Array, *, difference: bool) -> Array:
    """Σ_{j<r≤i} g_r for i ≥ j as (T, T), −∞ above the diagonal, in g's own floating type.

    Args:
        g: log decays (T,).
        difference: by cumulative sums, c_i − c_j, as listing 1's ``segsum_unstable``; else every segment by
            itself, as its ``segsum``: columns of g below the diagonal, summed downwards.
    """
    length = len(g)
    # ufunc.accumulate adds one after the other, each sum rounded to g's type.
    if difference:
        total = np.add.accumulate(g)
        with np.errstate(invalid="ignore"):
            table = total[:, None] - total[None, :]
    else:
        below = np.tril(np.ones((length, length), dtype=bool), -1)
        table = np.add.accumulate(np.where(below, g[:, None], g.dtype.type(0)), axis=0)
    return np.where(np.tril(np.ones((length, length), dtype=bool)), table, g.dtype.type(-np.inf))
