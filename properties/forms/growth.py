"""How the error of a form grows with N: the forms themselves, run in float32 and held against float64.

The same code that is shown equal over the rationals runs here on float32 arrays (numpy, one rounding an
operation; matrix products by BLAS in float32). Theory.md GLA-5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnproof.properties.forms import delta, gated, linear
from attnproof.properties.forms.base import Array, chunks, start

__all__ = ["FAMILIES", "Example", "Measured", "by_logarithms", "examples", "measure"]

Run = Callable[[tuple[Any, ...], int], Array]
"""The output of a family's inputs in chunks of a length; 1 is the recurrence."""

UNIT_ROUNDOFF = 2.0**-24
# Secondary chunks: the decays of one position of a chunk to another only inside them.
_BLOCK = 16
_WIDTH = 16


@dataclass(frozen=True)
class Example:
    """A family's inputs in float32 and its form by chunk.

    ``parts`` gives the sums behind the output, as :func:`measure` bounds their errors; None where there is no
    such bound: decays by logarithms have an error of their own, and the delta rule's bounds are norm-wise.
    """

    name: str
    inputs: tuple[Array, ...]
    run: Run
    parts: Run | None


@dataclass(frozen=True)
class Measured:
    """The error of one form at one length.

    Attributes:
        error: root mean square of the error over that of the output, both over the last quarter of rows.
        share: largest error of any of these rows over its bound, NaN where there is none.
    """

    family: str
    chunk: str
    length: int
    error: float
    share: float


def _linear(x: tuple[Any, ...], chunk: int) -> Array:
    if chunk == 1:
        return linear.recurrent(*x, normalize=True)[0]
    return linear.chunkwise(*x, chunk=chunk, normalize=True)[0]


def _gated(x: tuple[Any, ...], chunk: int) -> Array:
    if chunk == 1:
        q, k, v, alpha = x
        return gated.recurrent(q, k, v, gated.gates(alpha))[0]
    return gated.chunkwise(*x, chunk=chunk, block=_BLOCK)[0]


def by_logarithms(q: Array, k: Array, v: Array, g: Array, *, chunk: int) -> Array:
    """The chunkwise form as kernels have it: g = log α (N, D), decays e^(b_i − b_j), b = Σ g in a chunk.

    In secondary chunks as :func:`.gated.weights`; every exponent is ≤ 0, but its rounding error is that of b.
    """
    state, o = start(None, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for piece in chunks(len(v), chunk):
        Q, K, V, b = q[piece], k[piece], v[piece], np.add.accumulate(g[piece], axis=0)
        o[piece] = (Q * np.exp(b)) @ state
        for rows in chunks(len(V), _BLOCK):
            exponent = np.minimum(b[rows, None] - b[None, rows], 0)
            near = np.tril((Q[rows, None] * np.exp(exponent) * K[None, rows]).sum(axis=2))
            o[piece][rows] += near @ V[rows]
            if before := rows.start:
                decayed = K[:before] * np.exp(b[before] - b[:before])
                o[piece][rows] += ((Q[rows] * np.exp(b[rows] - b[before])) @ decayed.T) @ V[:before]
        state = np.exp(b[-1])[:, None] * state + (K * np.exp(b[-1] - b)).T @ V
    return o


def _logarithms(x: tuple[Any, ...], chunk: int) -> Array:
    if chunk == 1:
        return _gated((*x[:3], np.exp(x[3])), chunk)
    return by_logarithms(*x, chunk=chunk)


def _delta(x: tuple[Any, ...], chunk: int) -> Array:
    if chunk == 1:
        return delta.recurrent(*x)[0]
    return delta.chunkwise(*x, chunk=chunk, block=_BLOCK)[0]


def examples(length: int, seed: int = 0) -> tuple[Example, ...]:
    """Inputs of every family at ``length``: slow decays, so that what came long ago still counts, and "
    "one fast.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape)

    def single(*arrays: Array) -> tuple[Array, ...]:
        return tuple(x.astype(np.float32) for x in arrays)

    q, k, v = (normal(length, _WIDTH) for _ in range(3))
    positive = [np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k)]
    unit = k / np.sqrt((k * k).sum(axis=1, keepdims=True))
    constant = np.full((length, 1), 31 / 32)
    slow = 1 - 0.03 * rng.random((length, _WIDTH))
    rate = rng.random(length)
    return (
        Example("linear, elu + 1, normalised", single(*positive, v), _linear, _linear),
        Example("retention, γ = 31/32", single(q, k, v, constant), _gated, _gated),
        Example("gated, 0.97 ≤ α ≤ 1", single(q, k, v, slow), _gated, _gated),
        Example("by logarithms, 0.97 ≤ α ≤ 1", single(q, k, v, np.log(slow)), _logarithms, None),
        Example(
            "by logarithms, e^(−4) ≤ α ≤ 1", single(q, k, v, -4 * rng.random(slow.shape)), _logarithms, None
        ),
        Example("delta rule, unit keys", single(q, unit, v, rate), _delta, None),
    )


FAMILIES = tuple(example.name for example in examples(1))


def _bounds(example: Example) -> Array | None:
    """A bound of the error of any of the additive forms in float32, row by row; exact inputs.

    A term q_c k_c v of position j passes at row t at most t − j products with decays and t − j + 1 sums of
    the state, its own product and D roundings of the read, or in a chunk the same number or fewer: with
    K = 2(t + 1) + D + 4 roundings, γ_K Σ|w||v|. The normaliser (positive features) doubles it, and divides.
    """
    if example.parts is None:
        return None
    doubled = tuple(abs(x).astype(np.float64) for x in example.inputs)
    roundings = 2 * np.arange(1, len(doubled[0]) + 1) + _WIDTH + 4
    gamma = roundings * UNIT_ROUNDOFF / (1 - roundings * UNIT_ROUNDOFF)
    factor = 2 if example.parts is _linear else 1
    # The sums of absolute values in float64: their own error is far below the last factor.
    return factor * (gamma + UNIT_ROUNDOFF)[:, None] * example.parts(doubled, _BLOCK) * (1 + 2.0**-20)


def measure(lengths: Sequence[int], tried: Sequence[int], seed: int = 0) -> list[Measured]:
    """The error of every family's forms: C of ``tried`` and C = N, at every length (ascending)."""
    found = []
    for example in examples(lengths[-1], seed):
        # The recurrence in float64 is exact next to float32's errors.
        exact = example.run(tuple(x.astype(np.float64) for x in example.inputs), 1)
        bounds = _bounds(example)
        for chunk in (*tried, 0):
            whole = example.run(example.inputs, chunk) if chunk else None
            for n in lengths:
                # All forms are causal: a shorter run is the beginning of a longer one, but for C = N.
                got = example.run(tuple(x[:n] for x in example.inputs), n) if whole is None else whole[:n]
                off = abs(got.astype(np.float64) - exact[:n])
                late = slice(n - max(n // 4, 1), n)
                error = float(np.sqrt((off[late] ** 2).mean() / (exact[late] ** 2).mean()))
                share = float("nan") if bounds is None else float((off[late] / bounds[late]).max())
                found.append(Measured(example.name, str(chunk or "N"), n, error, share))
    return found
