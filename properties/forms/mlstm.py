"""mLSTM in its forms: C_t = f_t C_{t−1} + i_t k_t v_tᵀ, n_t = f_t n_{t−1} + i_t k_t.

The output is C_tᵀq_t / max(|n_t·q_t|, 1). Gates i_t = e^(pre-activation) > 0 and f_t in (0, 1) are
given as numbers, and the stabiliser as M_t = e^(m_t), of which m_t = max(log f_t + m_{t−1}, pre-activation)
makes M_t = max(f_t M_{t−1}, i_t): all of it is rational. q holds the scale.
Beck et al., xLSTM, arXiv 2405.04517; theory.md 2.10.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnproof.properties.forms.base import Array, chunks, products_after, products_up_to, segments, start

__all__ = ["Stabilised", "chunkwise", "parallel", "recurrent", "stabilised", "stabilised_parallel"]

Stabilised = tuple[Array, Array, Any]
"""C/M (D, E), n/M (D,), M; M = 0 before the first position."""


def recurrent(
    q: Array, k: Array, v: Array, i: Array, f: Array, state: tuple[Array, Array] | None = None
) -> tuple[Array, tuple[Array, Array]]:
    """The definition, without a stabiliser. i, f (N,); states (C (D, E), n (D,))."""
    C, n = state or (None, None)
    C, n = start(C, k.shape[1], v.shape[1], like=v), start(n, k.shape[1], like=v)
    o = np.empty_like(v)
    for t in range(len(v)):
        C = f[t] * C + i[t] * np.outer(k[t], v[t])
        n = f[t] * n + i[t] * k[t]
        o[t] = (q[t] @ C) / max(abs(q[t] @ n), 1)
    return o, (C, n)


def _floor(M: Any, keep_one: bool) -> Any:
    """What the stabilised denominator may not fall below: e^(−m), or 1 in the variant that is wrong."""
    return 1 + 0 * M if keep_one else 1 / M


def stabilised(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    state: Stabilised | None = None,
    *,
    keep_one: bool = False,
) -> tuple[Array, Stabilised]:
    """Over C' = C/M and n' = n/M with i' = i/M_t and f' = f·M_{t−1}/M_t: o = C'ᵀq / max(|n'·q|, 1/M).

    Args:
        keep_one: max(|n'·q|, 1) as some implementations have it: another function.
    """
    C, n, M = state or (None, None, 0)
    C, n = start(C, k.shape[1], v.shape[1], like=v), start(n, k.shape[1], like=v)
    o = np.empty_like(v)
    for t in range(len(v)):
        largest = max(f[t] * M, i[t])
        forget, write, M = f[t] * M / largest, i[t] / largest, largest
        C = forget * C + write * np.outer(k[t], v[t])
        n = forget * n + write * k[t]
        o[t] = (q[t] @ C) / max(abs(q[t] @ n), _floor(M, keep_one))
    return o, (C, n, M)


def parallel(q: Array, k: Array, v: Array, i: Array, f: Array) -> Array:
    """The quadratic form, without a stabiliser: weights q_i·k_j Π_{j<r≤i} f_r i_j."""
    w = (q @ k.T) * segments(f[:, None])[:, :, 0] * i[None]
    o: Array = (w @ v) / np.maximum(abs(w.sum(axis=1)), 1)[:, None]
    return o


def stabilised_parallel(
    q: Array, k: Array, v: Array, i: Array, f: Array, state: Stabilised | None = None
) -> tuple[Array, Stabilised]:
    """The quadratic form with each row over its own largest decay: the recurrence's M there."""
    C, n, M = state or (None, None, 0)
    C, n = start(C, k.shape[1], v.shape[1], like=v), start(n, k.shape[1], like=v)
    if not len(v):
        return np.empty_like(v), (C, n, M)
    into, after = products_up_to(f), products_after(f[:, None])[:, 0]
    decay = segments(f[:, None])[:, :, 0] * i[None]
    rows = np.maximum(into * M, decay.max(axis=1))
    w, carried = (q @ k.T) * decay / rows[:, None], into * M / rows
    o = w @ v + carried[:, None] * (q @ C)
    mass = w.sum(axis=1) + carried * (q @ n)
    # The last row's weights are those of the state at the end.
    last, write, kept = rows[-1], after * i / rows[-1], into[-1] * M / rows[-1]
    C, n = kept * C + (k * write[:, None]).T @ v, kept * n + write @ k
    return o / np.maximum(abs(mass), 1 / rows)[:, None], (C, n, last)


def chunkwise(
    q: Array, k: Array, v: Array, i: Array, f: Array, state: Stabilised | None = None, *, chunk: int
) -> tuple[Array, Stabilised]:
    """The stabilised parallel form inside chunks of length ``chunk``, the state and its M between them."""
    o = np.empty_like(v)
    state = state or (
        start(None, k.shape[1], v.shape[1], like=v),
        start(None, k.shape[1], like=v),
        0,
    )
    for piece in chunks(len(v), chunk):
        o[piece], state = stabilised_parallel(q[piece], k[piece], v[piece], i[piece], f[piece], state)
    return o, state
