"""H3: o = q ∘ SSM_diag(SSM_shift(k) ∘ v), with an outer product k vᵀ in heads wider than 1.

Fu et al., arXiv 2212.14052, section 3. One head: q, k (T, D), v (T, E). Both SSMs are time-invariant; their
parameters are the same for every channel here, which is no restriction of what is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnproof.properties.forms.base import Array

__all__ = ["Diagonal", "Shift", "filtered", "recurrent", "remembered", "shifted"]


@dataclass(frozen=True)
class Shift:
    """SSM_shift: A the sub-diagonal shift, B = e_1, output taps·x + skip·u; a state of len(taps) inputs."""

    taps: tuple[Any, ...]
    skip: Any = 0


@dataclass(frozen=True)
class Diagonal:
    """SSM_diag, discrete: x_t = decays ∘ x_{t−1} + gains·u_t, output outs·x + skip·u."""

    decays: tuple[Any, ...]
    gains: tuple[Any, ...]
    outs: tuple[Any, ...]
    skip: Any = 0


def shifted(u: Array, ssm: Shift) -> Array:
    """SSM_shift over u (T, D) as a recurrence whose state is the last inputs."""
    size = len(ssm.taps)
    shift, first = np.eye(size, k=-1, dtype=int).astype(object), np.eye(1, size, dtype=int)[0].astype(object)
    y = np.empty_like(u)
    for channel in range(u.shape[1]):
        x = np.zeros(size, dtype=object)
        for t in range(len(u)):
            x = shift @ x + first * u[t, channel]
            y[t, channel] = np.array(ssm.taps, dtype=object) @ x + ssm.skip * u[t, channel]
    return y


def filtered(u: Array, taps: tuple[Any, ...]) -> Array:
    """The finite impulse response Σ_i taps_i u_{t−i} over u (T, D)."""
    y = u * 0
    for i, tap in enumerate(taps[: len(u)]):
        y[i:] = y[i:] + u[: len(u) - i] * tap
    return y


def remembered(u: Array, ssm: Diagonal) -> Array:
    """SSM_diag over u (T, …), every channel by itself."""
    states = [u[0] * 0 for _ in ssm.decays]
    y = np.empty_like(u)
    for t in range(len(u)):
        states = [a * x + b * u[t] for a, b, x in zip(ssm.decays, ssm.gains, states, strict=True)]
        y[t] = sum((c * x for c, x in zip(ssm.outs, states, strict=True)), ssm.skip * u[t])
    return y


def recurrent(q: Array, k: Array, v: Array, shift: Shift, diagonal: Diagonal) -> Array:
    """o (T, E)."""
    kept = remembered(shifted(k, shift)[:, :, None] * v[:, None, :], diagonal)
    o: Array = (q[:, :, None] * kept).sum(axis=1)
    return o
