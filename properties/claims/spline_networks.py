"""Transformers without normalisation over any numbers: rationals, balls, polynomials in one or two unknowns.

Rows are tokens: X (n, d), and attention is weigh(Q Kᵀ) V with affine Q, K, V (the transpose of the convention
of Lai, Lim and Liu, arXiv 2408.09624). What turns scores into weights is an argument, so that one network is
evaluated with ReLU, with softmax, or with a ReLU that follows the signs at a point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import flint
import numpy as np

from attnproof.properties.forms.base import Array, each, filled
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "RELU",
    "Activation",
    "Affine",
    "Attention",
    "Block",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "Network",
    "exponential",
    "line",
    "relu",
    "row_normalised",
    "softmax",
]

ZERO = flint.fmpq(0)


def relu(x: Array) -> Array:
    """max(x, 0) of rationals or exact balls."""
    return each(lambda entry: entry if entry > 0 else ZERO, x)


def _exponentials(scores: Array) -> Array:
    return each(lambda entry: flint.arb(entry).exp(), scores)


def exponential(scores: Array, keep: Array) -> Array:
    """exp of the scores, as balls, without a normaliser."""
    out = filled(scores.shape, [ZERO] * scores.size)
    out[keep] = _exponentials(scores[keep])
    return out


def softmax(scores: Array, keep: Array) -> Array:
    """Row-wise softmax, as balls; every row keeps a score."""
    weights = exponential(scores, keep)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=object)


def row_normalised(scores: Array, keep: Array) -> Array:
    """ReLU divided by the sum of its row; a row of zeros stays 0."""
    weights = RELU.weigh(scores, keep)
    return weights / each(lambda total: total if total != 0 else flint.fmpq(1), weights.sum(1, keepdims=True))


@dataclass(frozen=True)
class Activation:
    """What a network does that is not polynomial.

    Attributes:
        rectify: the feed-forward network's ReLU, and that of the weights unless ``weights`` is given.
        weights: scores and a mask (truth values, True is kept) to weights.
        power: of the rectified score, where ``weights`` is None.
    """

    rectify: Callable[[Array], Array] = relu
    weights: Callable[[Array, Array], Array] | None = None
    power: int = 1

    def weigh(self, scores: Array, keep: Array) -> Array:
        """Weights of the kept scores; 0 elsewhere, where nothing is rectified."""
        if self.weights is not None:
            return self.weights(scores, keep)
        out = filled(scores.shape, [ZERO] * scores.size)
        out[keep] = self.rectify(scores[keep]) ** self.power
        return out


RELU = Activation()


@dataclass(frozen=True)
class Affine:
    """x ↦ x · weight + bias: weight (d, e), bias (e,)."""

    weight: Array
    bias: Array

    @classmethod
    def random(cls, rng: np.random.Generator, d: int, e: int) -> Affine:
        """Integers from −3 to 3, halved."""
        return cls(rationals(rng, d, e, low=-3, high=3, denominator=2), rationals(rng, e, low=-3, high=3))

    def __call__(self, x: Array) -> Array:
        return np.asarray(x @ self.weight + self.bias, dtype=object)


@dataclass(frozen=True)
class Attention:
    """weigh(Q(y) K(x)ᵀ) V(x), with the mask j ≤ i if causal."""

    query: Affine
    key: Affine
    value: Affine
    causal: bool = False

    @classmethod
    def random(cls, rng: np.random.Generator, d: int, *, causal: bool = False) -> Attention:
        """All widths d."""
        query, key, value = (Affine.random(rng, d, d) for _ in range(3))
        return cls(query, key, value, causal)

    def scores(self, x: Array, y: Array) -> Array:
        """Q(y) K(x)ᵀ, (rows of y, rows of x)."""
        return np.asarray(self.query(y) @ self.key(x).T, dtype=object)

    def __call__(self, x: Array, y: Array, activation: Activation) -> Array:
        scores = self.scores(x, y)
        keep = np.ones(scores.shape, dtype=bool)
        keep = np.tril(keep) if self.causal else keep
        return np.asarray(activation.weigh(scores, keep) @ self.value(x), dtype=object)


class Network(Protocol):
    """From all tokens, (n, d), to the outputs, (n', d)."""

    def __call__(self, x: Array, activation: Activation) -> Array:
        """The outputs."""


@dataclass(frozen=True)
class Block:
    """Self-attention, then a network W₂ relu(W₁ x) of its own for every token; each with a residual, or not.

    Attributes:
        attention: None for the feed-forward network alone.
        forward: the two affine maps; None for attention alone.
        after: applied to the block's output, such as a normalisation.
    """

    attention: Attention | None
    forward: tuple[Affine, Affine] | None = None
    residual: bool = False
    after: Callable[[Array], Array] | None = None

    def __call__(self, x: Array, activation: Activation) -> Array:
        if self.attention is not None:
            mixed = self.attention(x, x, activation)
            x = x + mixed if self.residual else mixed
        if self.forward is not None:
            first, second = self.forward
            fed = second(activation.rectify(first(x)))
            x = x + fed if self.residual else fed
        return x if self.after is None else self.after(x)


@dataclass(frozen=True)
class Encoder:
    """Blocks in a row."""

    blocks: tuple[Block, ...]

    @classmethod
    def random(
        cls, rng: np.random.Generator, d: int, layers: int, *, wide: int = 0, residual: bool = False
    ) -> Encoder:
        """``layers`` blocks of width d, with feed-forward networks of width ``wide`` (none at 0)."""
        blocks = []
        for _ in range(layers):
            attention = Attention.random(rng, d)
            forward = (Affine.random(rng, d, wide), Affine.random(rng, wide, d)) if wide else None
            blocks.append(Block(attention, forward, residual))
        return cls(tuple(blocks))

    def __call__(self, x: Array, activation: Activation) -> Array:
        for block in self.blocks:
            x = block(x, activation)
        return x


@dataclass(frozen=True)
class EncoderDecoder:
    """Attention of the tokens after the first ``split`` (Y) to these first ones (X)."""

    attention: Attention
    split: int

    def __call__(self, x: Array, activation: Activation) -> Array:
        return self.attention(x[: self.split], x[self.split :], activation)


@dataclass(frozen=True)
class Decoder:
    """An encoder for the first ``split`` tokens; for the others, a causal block, then attention to the first.

    Without a block or without an encoder the tokens go through unchanged.
    """

    encoder: Encoder | None
    block: Block | None
    cross: Attention
    split: int
    residual: bool = False

    def __call__(self, x: Array, activation: Activation) -> Array:
        source, target = x[: self.split], x[self.split :]
        source = source if self.encoder is None else self.encoder(source, activation)
        target = target if self.block is None else self.block(target, activation)
        mixed = self.cross(source, target, activation)
        return target + mixed if self.residual else mixed


def line(rng: np.random.Generator, n: int, d: int, *, unknowns: int = 1) -> tuple[Array, ...]:
    """X₀ and the directions X₁ … of a random rational line or plane of tokens (n, d), in sevenths and thirds.

    The denominators are those of nothing else, so that breakpoints in special position are no habit.
    """
    start = rationals(rng, n, d, low=-9, high=9, denominator=7)
    return start, *(rationals(rng, n, d, low=-6, high=6, denominator=3) for _ in range(unknowns))


def on(directions: tuple[Array, ...], *unknowns: Any) -> Array:
    """X₀ + Σ tᵢ Xᵢ."""
    point, *others = directions
    for direction, t in zip(others, unknowns, strict=True):
        # Entry by entry: NumPy would take a polynomial for a sequence of coefficients.
        point = point + filled(direction.shape, [t * entry for entry in direction.flat])
    return point
