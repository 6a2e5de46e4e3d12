"""Exact gradients of the gated forms: by differences, and the closed forms of the gates' (theory.md GLA-4).

The loss Σ o ∘ w + Σ S_N ∘ W of a gated recurrence is a polynomial of degree 1 in every single entry of q, k,
v, G and the initial state: the difference between its values at 1 and at 0 is its derivative there, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnproof.properties.forms import gated
from attnproof.properties.forms.base import Array

__all__ = ["GatedLoss", "derivative", "gate_gradient", "shifted_gate_gradient", "value_gate_gradient"]


@dataclass(frozen=True)
class GatedLoss:
    """Σ o ∘ w + Σ S_N ∘ W of a gated recurrence.

    Attributes:
        w: cotangent of o (N, E); W: of the last state (D, E), or None.
        bonus: RWKV-6's u (D,), which also reads before the decay; None: as GLA reads.
    """

    w: Array
    W: Array | None = None
    bonus: Array | None = None

    def __call__(
        self, q: Array, k: Array, v: Array, alpha: Array, beta: Array | None, state: Array | None
    ) -> Any:
        """The loss, an exact number; shapes as in :func:`.gated.parallel`."""
        o, last = gated.recurrent(q, k, v, gated.gates(alpha, beta), state, bonus=self.bonus)
        return (o * self.w).sum() + (0 if self.W is None else (last * self.W).sum())


def derivative(loss: Callable[..., Any], arguments: tuple[Array | None, ...], place: int) -> Array:
    """The derivative of ``loss`` with respect to argument ``place``, of degree 1 in each of its entries."""
    x = arguments[place]
    assert x is not None
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):
        ends = []
        for end in (1, 0):
            moved = x.copy()
            moved[index] = end
            ends.append(loss(*arguments[:place], moved, *arguments[place + 1 :]))
        out[index] = ends[0] - ends[1]
    return out


def _from_here(x: Array) -> Array:
    """Σ_{s ≥ t} of rows."""
    return np.add.accumulate(x[::-1], axis=0)[::-1]


def gate_gradient(q: Array, dq: Array, k: Array, dk: Array, last: Array | None, W: Array | None) -> Array:
    """GLA-4: d log α_t = Σ_{s≥t} (q_s ∘ dq_s − k_s ∘ dk_s) + Σ_e S_N ∘ W, (N, D)."""
    out = _from_here(q * dq - k * dk)
    return out if W is None else out + (last * W).sum(axis=1)


def value_gate_gradient(o: Array, w: Array, v: Array, dv: Array, last: Array, W: Array) -> Array:
    """The same for β of G = α βᵀ: d log β_t = Σ_{s≥t} (o_s ∘ do_s − v_s ∘ dv_s) + Σ_c S_N ∘ W, (N, E)."""
    found: Array = _from_here(o * w - v * dv) + (last * W).sum(axis=0)
    return found


def shifted_gate_gradient(q: Array, dq: Array, k: Array, dk: Array) -> Array:
    """RWKV-6, without a cotangent of the state: Σ_{s>t} q_s ∘ dq_s − Σ_{t≤s≤N−2} k_s ∘ dk_s.

    Args:
        dq, dk: without the terms of the bonus.
    """
    reads, writes = _from_here(q * dq), k * dk
    out = -_from_here(np.concatenate([writes[:-1], 0 * writes[-1:]]))
    out[:-1] = out[:-1] + reads[1:]
    return out
