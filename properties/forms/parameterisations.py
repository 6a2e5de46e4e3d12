"""The gates of table GLA-1, row by row, and each model's own recurrence in its own terms.

Yang et al., arXiv 2312.06635, table 1 (theory.md GLA-1). Gates are computed from pre-activations (the paper's
x_t W) by the elementary functions of any kind of numbers: ``math`` for floats, ``mpmath`` for mpf,
:class:`Balls` for flint's arb. Every row gives G (N, D or 1, E or 1), as a product of factors, for the common
recurrence of :mod:`.gated`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import flint
import numpy as np

from attnproof.properties.forms.base import Array, each, filled, start
from attnproof.properties.forms.numbers import Gaussian

__all__ = ["ROWS", "Activations", "Balls", "Elementary", "Parameterisation", "root_of_logistic"]


class Elementary(Protocol):
    """What the gates are made of."""

    def exp(self, x: Any, /) -> Any: ...
    def log(self, x: Any, /) -> Any: ...
    def cos(self, x: Any, /) -> Any: ...
    def sin(self, x: Any, /) -> Any: ...


class Balls:
    """Elementary functions of arb, at the context's precision."""

    def exp(self, x: flint.arb, /) -> flint.arb:
        """e^x."""
        return x.exp()

    def log(self, x: flint.arb, /) -> flint.arb:
        """The natural logarithm."""
        return x.log()

    def cos(self, x: flint.arb, /) -> flint.arb:
        """Of x in radians."""
        return x.cos()

    def sin(self, x: flint.arb, /) -> flint.arb:
        """Of x in radians."""
        return x.sin()


@dataclass(frozen=True)
class Activations:
    """What the gates of all rows are computed from, all of one kind of numbers.

    Attributes:
        keys: pre-activations (N, D); values: (N, E); scalar: (N, 1); phase: radians (N, D).
        A: Mamba's (D, E), a logarithm; a: Mamba-2's logarithm; gamma: RetNet's γ; floor: HGRN2's γ (D,).
    """

    keys: Array
    values: Array
    scalar: Array
    phase: Array
    A: Array
    a: Any
    gamma: Any
    floor: Array


FactorsOf = Callable[[Elementary, Activations], tuple[Array, ...]]
Recurrence = Callable[[Array, Array, Array, Array], Array]


@dataclass(frozen=True)
class Parameterisation:
    """One row.

    Attributes:
        model: name; formula: of G_t; factors: arrays whose product is G.
        own: the model's own recurrence (q, k, v, G) → o, in its terms: the row reduces to the common one if
            it gives the same output. keys: k where the gate fixes it (HGRN2's 1 − α), else None.
    """

    model: str
    formula: str
    factors: FactorsOf
    own: Recurrence
    keys: Callable[[Array], Array] | None = None


def _logistic(e: Elementary, x: Array) -> Array:
    return each(lambda z: 1 / (1 + e.exp(-z)), x)


def _softplus(e: Elementary, x: Array) -> Array:
    return each(lambda z: e.log(1 + e.exp(z)), x)


def root_of_logistic(e: Elementary, x: Array, tau: int) -> Array:
    """σ(x)^(1/τ), as GLA (τ = 16) and gated retention have it."""
    return each(lambda z: e.exp(-e.log(1 + e.exp(-z)) / tau), x)


def _mamba(e: Elementary, p: Activations) -> tuple[Array, ...]:
    rates = _softplus(e, p.values)[:, None, :] * each(e.exp, p.A)[None]
    return (each(lambda rate: e.exp(-rate), rates),)


def _mamba2(e: Elementary, p: Activations) -> tuple[Array, ...]:
    return (each(lambda rate: e.exp(-rate * e.exp(p.a)), _softplus(e, p.scalar))[:, :, None],)


def _retnet(e: Elementary, p: Activations) -> tuple[Array, ...]:
    gate = np.empty((len(p.scalar), 1, 1), dtype=object)
    gate[:] = p.gamma
    return (gate,)


def _gateloop(e: Elementary, p: Activations) -> tuple[Array, ...]:
    modulus = _logistic(e, p.keys)
    turns = zip(modulus.flat, p.phase.flat, strict=True)
    gate = filled(modulus.shape, (Gaussian(r * e.cos(angle), r * e.sin(angle)) for r, angle in turns))
    return (gate[:, :, None],)


def _by_matrices(q: Array, k: Array, v: Array, gate: Array) -> Array:
    """S ← diag(α) S + k vᵀ by a product of matrices, as GLA, HGRN2 and RWKV-6 write it."""
    state, o = start(None, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for t in range(len(v)):
        state = np.diag(gate[t, :, 0]) @ state + np.outer(k[t], v[t])
        o[t] = q[t] @ state
    return o


def _by_numbers(q: Array, k: Array, v: Array, gate: Array) -> Array:
    """S ← γ_t S + k vᵀ with one number a step, as weights q_i·k_j γ_i ⋯ γ_{j+1} of a sum over j."""
    o = np.empty_like(v)
    for i in range(len(v)):
        total, decay = 0 * v[i], gate[0, 0, 0] * 0 + 1
        for j in range(i, -1, -1):
            total = total + (q[i] @ k[j]) * decay * v[j]
            decay = decay * gate[j, 0, 0]
        o[i] = total
    return o


def _by_both_sides(q: Array, k: Array, v: Array, gate: Array) -> Array:
    """S ← diag(α) S diag(β) + k vᵀ, α and β from a row and a column of G: right only if G has rank 1."""
    state, o = start(None, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for t in range(len(v)):
        left, right = gate[t, :, 0], gate[t, 0] / gate[t, 0, 0]
        state = np.diag(left) @ state @ np.diag(right) + np.outer(k[t], v[t])
        o[t] = q[t] @ state
    return o


def _by_channels(q: Array, k: Array, v: Array, gate: Array) -> Array:
    """Mamba's h_t = exp(ΔA) ∘ h_{t−1} + B x_t, y_t = C·h_t for each value channel: h (D,), B = k, C = q."""
    o = np.empty_like(v)
    for e in range(v.shape[1]):
        h = start(None, k.shape[1], like=v)
        for t in range(len(v)):
            h = gate[t, :, e] * h + k[t] * v[t, e]
            o[t, e] = q[t] @ h
    return o


def _by_rotations(q: Array, k: Array, v: Array, gate: Array) -> Array:
    """GateLoop in reals: the state's real and imaginary parts, turned and shrunk; o = Re(q S), q and k "
    "real.
    """
    re = im = start(None, k.shape[1], v.shape[1], like=v)
    o = np.empty_like(v)
    for t in range(len(v)):
        x = np.array([[g.re] for g in gate[t, :, 0]], dtype=object)
        y = np.array([[g.im] for g in gate[t, :, 0]], dtype=object)
        re, im = x * re - y * im + np.outer(k[t], v[t]), x * im + y * re
        o[t] = q[t] @ re
    return o


ROWS = (
    Parameterisation("Mamba", "exp(−(1ᵀ softplus(x)) ∘ exp(A))", _mamba, _by_channels),
    Parameterisation(
        "DFW",
        "σ(x)ᵀσ(y)",
        lambda e, p: (_logistic(e, p.keys)[:, :, None], _logistic(e, p.values)[:, None, :]),
        _by_both_sides,
    ),
    Parameterisation("RetNet", "γ", _retnet, _by_numbers),
    Parameterisation("Mamba-2", "exp(−softplus(x)·exp(a))", _mamba2, _by_numbers),
    Parameterisation("mLSTM", "σ(x)", lambda e, p: (_logistic(e, p.scalar)[:, :, None],), _by_numbers),
    Parameterisation(
        "Gated retention",
        "σ(x)^(1/16)",
        lambda e, p: (root_of_logistic(e, p.scalar, 16)[:, :, None],),
        _by_numbers,
    ),
    Parameterisation("GateLoop", "σ(x)·exp(i y)", _gateloop, _by_rotations),
    Parameterisation(
        "HGRN2",
        "γ + (1 − γ)σ(x)",
        lambda e, p: ((p.floor + (1 - p.floor) * _logistic(e, p.keys))[:, :, None],),
        _by_matrices,
        lambda gate: 1 - gate[:, :, 0],
    ),
    Parameterisation(
        "RWKV-6",
        "exp(−exp(x))",
        lambda e, p: (each(lambda z: e.exp(-e.exp(z)), p.keys)[:, :, None],),
        _by_matrices,
    ),
    Parameterisation(
        "GLA", "σ(x)^(1/16)", lambda e, p: (root_of_logistic(e, p.keys, 16)[:, :, None],), _by_matrices
    ),
)
