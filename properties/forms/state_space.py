"""Linear time-invariant state space models: x_t = Ā x_{t−1} + B̄ u_t, y_t = C x_t, and S4's equal forms.

One channel: A (N, N), B and C (N,), inputs u (L,). Gu, Goel and Ré, arXiv 2111.00396, sections 2 and 3 and
appendix C.3. Over the rationals (or Gaussian rationals) recurrence, convolution and generating function are
equal or not, without a tolerance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnproof.properties.forms.base import Array, start

__all__ = [
    "bilinear",
    "cauchy_form",
    "convolved",
    "corrected_row",
    "euler",
    "generating",
    "identity",
    "kernel",
    "recurrent",
    "resolvent_form",
    "solve",
    "step",
    "wrapped",
]


def identity(like: Array) -> Array:
    """The identity of the size and the kind of numbers of ``like`` (N, N)."""
    zero = like[0, 0] - like[0, 0]
    out = np.empty_like(like)
    for i, j in np.ndindex(*like.shape):
        out[i, j] = zero + (1 if i == j else 0)
    return out


def solve(matrix: Array, right: Array) -> Array:
    """X with matrix X = right, by Gauss-Jordan elimination over any field of numbers with ``abs``.

    Args:
        matrix: (N, N).
        right: (N,) or (N, M).

    Raises:
        ZeroDivisionError: a column has no entry that is certainly not 0.
    """
    size = len(matrix)
    table = np.concatenate([matrix, right.reshape(size, -1)], axis=1)
    for i in range(size):
        pivot = next((r for r in range(i, size) if abs(table[r, i]) > 0), None)
        if pivot is None:
            raise ZeroDivisionError(f"the matrix is singular: no pivot in column {i}")
        table[[i, pivot]] = table[[pivot, i]]
        table[i] = table[i] / table[i, i]
        for r in range(size):
            if r != i:
                table[r] = table[r] - table[r, i] * table[i]
    return table[:, size:].reshape(right.shape)


def bilinear(A: Array, B: Array, delta: Any) -> tuple[Array, Array]:
    """Ā = (I − Δ/2·A)⁻¹(I + Δ/2·A) and B̄ = (I − Δ/2·A)⁻¹ΔB: the trapezoidal rule, as S4 discretises."""
    one, half = identity(A), A * (delta / 2)
    both = solve(one - half, np.concatenate([one + half, (delta * B)[:, None]], axis=1))
    return both[:, :-1], both[:, -1]


def euler(A: Array, B: Array, delta: Any) -> tuple[Array, Array]:
    """Ā = I + ΔA and B̄ = ΔB: the rule that turns decaying modes into growing ones at large steps."""
    return identity(A) + A * delta, B * delta


def step(A: Array, B: Array, C: Array, u: Any, state: Array) -> tuple[Any, Array]:
    """One position: the output C·x and the state x after input u."""
    after = A @ state + B * u
    return C @ after, after


def recurrent(A: Array, B: Array, C: Array, u: Array, state: Array | None = None) -> tuple[Array, Array]:
    """y (L,) and the last state, one step after the other; A and B are discrete already."""
    x, y = start(state, len(B), like=B), np.empty_like(u)
    for t in range(len(u)):
        y[t], x = step(A, B, C, u[t], x)
    return y, x


def kernel(A: Array, B: Array, C: Array, length: int) -> Array:
    """K_i = C Aⁱ B for i < length."""
    out, x = np.empty(length, dtype=B.dtype), B
    for i in range(length):
        out[i] = C @ x
        x = A @ x
    return out


def convolved(taps: Array, u: Array) -> Array:
    """The causal convolution y_t = Σ_{s ≤ t} K_{t−s} u_s, whose kernel is as long as the input at most."""
    y: Array = u * taps[0]
    for i in range(1, min(len(taps), len(u))):
        y[i:] = y[i:] + u[: len(u) - i] * taps[i]
    return y


def wrapped(taps: Array, u: Array) -> Array:
    """The circular convolution of one length: what a Fourier transform without padding computes."""
    y: Array = u * taps[0]
    for i in range(1, len(taps)):
        y = y + np.roll(u, i) * taps[i]
    return y


def generating(taps: Array, z: Any) -> Any:
    """Σ_{i<L} K_i zⁱ by Horner's rule."""
    total = taps[-1]
    for tap in taps[-2::-1]:
        total = total * z + tap
    return total


def corrected_row(A: Array, C: Array, length: int) -> Array:
    """C̃ = C(I − Ā^L), which takes the terms of i ≥ L out of C(I − Āz)⁻¹B̄ where z^L = 1."""
    row = C
    for _ in range(length):
        row = row @ A
    return C - row


def resolvent_form(A: Array, B: Array, row: Array, delta: Any, z: Any) -> Any:
    """2/(1 + z) · C̃ [g·I − A]⁻¹ B with g = (2/Δ)(1 − z)/(1 + z), in the continuous A and B.

    Raises:
        ZeroDivisionError: z = −1, over exact numbers.
    """
    g = (2 / delta) * ((1 - z) / (1 + z))
    return (2 / (1 + z)) * (row @ solve(identity(A) * g - A, B))


def cauchy_form(
    poles: Array, P: Array, Q: Array, B: Array, row: Array, delta: Any, z: Any, *, keep: bool = True
) -> Any:
    """The same for A = diag(poles) − P Qᵀ by Woodbury's formula and sums Σ x_j y_j / (g − λ_j).

    Args:
        poles: λ (N,).
        P: likewise.
        Q: the row of the rank-1 term itself; the paper's Q* conjugates, which is left to the caller.
        B: likewise.
        row: C̃, likewise not conjugated.
        delta: the step Δ.
        z: the point.
        keep: False drops the rank-1 term, which makes it S4D's.
    """
    g = (2 / delta) * ((1 - z) / (1 + z))

    def summed(x: Array, y: Array) -> Any:
        return (x * y / (g - poles)).sum()

    value = summed(row, B)
    if keep:
        value = value - summed(row, P) * summed(Q, B) / (1 + summed(Q, P))
    return (2 / (1 + z)) * value
