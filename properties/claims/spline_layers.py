"""Claims about splines in layers: feed-forward networks, encoder blocks, decoders, normalisation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.spline_check import Case, splines
from attnproof.properties.claims.spline_networks import (
    RELU,
    Activation,
    Affine,
    Attention,
    Block,
    Decoder,
    Encoder,
    line,
    relu,
)
from attnproof.properties.claims.splines import SOURCE, SUBJECT
from attnproof.properties.forms.base import Array, each

__all__ = [
    "CLAIMS",
    "blocks",
    "decoders",
    "feed_forward",
    "layer_normalisation",
    "layer_normalised",
    "layers",
]


def feed_forward(lines: int, activation: Activation = RELU) -> ClaimFinding:
    """SPL-4a: one hidden layer, then two of them in a row."""
    cases = []
    for seed in range(lines):
        rng = np.random.default_rng([4, seed])
        depth = 1 + seed % 2
        block = [
            Block(None, (Affine.random(rng, 3, 5), Affine.random(rng, 5, 3)), residual=seed % 4 > 1)
            for _ in range(depth)
        ]
        cases.append(Case(f"{depth} networks, line {seed + 1}", Encoder(tuple(block)), line(rng, 2, 3), 1))
    proof = (
        "relu of an affine function is continuous and piecewise affine, and sums and compositions of such are"
    )
    return splines(cases, activation, seed=4, proof=proof)


def blocks(lines: int, activation: Activation = RELU) -> ClaimFinding:
    """SPL-4b: attention and a feed-forward network, with residuals and without."""
    cases = []
    for seed in range(lines):
        rng = np.random.default_rng([5, seed])
        n, residual = 2 + seed % 2, seed % 4 < 2
        network = Encoder.random(rng, 2, 1, wide=3, residual=residual)
        name = f"n = {n}, {'with' if residual else 'without'} residuals, line {seed + 1}"
        cases.append(Case(name, network, line(rng, n, 2), 3))
    proof = (
        "attention is a cubic spline (SPL-1a), and affine maps, relu and a residual neither raise the "
        "degree of "
        "a piece nor make a jump; relu cuts cells once more, by the signs of cubic polynomials"
    )
    return splines(cases, activation, seed=5, proof=proof)


def _seeds(layers: int, lines: int) -> list[int]:
    return list(range(lines if layers < 3 else max(1, lines // 2)))


def layers(deepest: int, lines: int, *, base: int = 3, product: bool = False) -> ClaimFinding:
    """SPL-4c: t layers on ``lines`` lines each (half as many from t = 3 on), alternately with residuals.

    Args:
        deepest: the largest t.
        lines: for each t.
        base: the degree claimed is base^t.
        product: claim base·t instead.
    """
    cases = []
    for t in range(1, deepest + 1):
        for seed in _seeds(t, lines):
            rng = np.random.default_rng([6, t, seed])
            residual = seed % 2 == 1
            network = Encoder.random(rng, 2, t, residual=residual)
            name = f"t = {t}, {'with' if residual else 'without'} residuals, line {seed + 1}"
            cases.append(Case(name, network, line(rng, 2, 2), base * t if product else base**t))
    proof = (
        "on a cell on which a layer's input has degree p and its scores have constant signs, these have "
        "degree "
        "2p and the output at most 3p, as in SPL-1a; by induction 3^t, without a jump"
    )
    return splines(cases, seed=6, proof=proof)


def decoders(
    kinds: Sequence[tuple[int, int]], lines: int, *, of_encoder: int = 2, of_decoder: int = 1
) -> ClaimFinding:
    """SPL-5a: cross-attention to encoders of degree p from decoder streams of degree q.

    Args:
        kinds: (layers of the encoder, whether there is a causal block before the cross-attention: 0 or 1).
        lines: for each kind.
        of_encoder, of_decoder: the degree claimed is of_encoder·p + of_decoder·q.
    """
    cases = []
    for (depth, causal), seed in itertools.product(kinds, range(lines)):
        rng = np.random.default_rng([7, depth, causal, seed])
        encoder = Encoder.random(rng, 2, depth, residual=True) if depth else None
        block = Block(Attention.random(rng, 2, causal=True), residual=True) if causal else None
        network = Decoder(encoder, block, Attention.random(rng, 2), split=2, residual=seed % 2 == 0)
        p, q = 3**depth, 3**causal
        degree = of_encoder * p + of_decoder * q
        cases.append(Case(f"p = {p}, q = {q}, line {seed + 1}", network, line(rng, 4, 2), degree))
    proof = (
        "scores have degree p + q and values p, so that pieces have at most 2p + q, as in SPL-1a; a "
        "residual of "
        "degree q does not raise it"
    )
    return splines(cases, seed=7, proof=proof)


def layer_normalised(x: Array) -> Array:
    """Rows of rationals minus their mean, by √(variance + 10⁻⁵), as balls."""
    d = x.shape[1]
    centred = x - x.sum(axis=1, keepdims=True) / flint.fmpq(d)
    variance = (centred * centred).sum(axis=1, keepdims=True) / flint.fmpq(d) + flint.fmpq(1, 10**5)
    return np.asarray(centred / each(lambda v: flint.arb(v).sqrt(), variance), dtype=object)


_NORMALISATION = """d = 2, one token x = (t, −t): mean 0, variance t², so the first output is
f(t) = t/√(t² + ε). It is analytic for all real t, so a polynomial on one interval would be f everywhere;
but f is bounded (f → ±1 for t → ±∞), and a bounded polynomial is constant, while f(0) = 0 and f(1) > 0.
With ε = 0 it is the sign of t, which jumps at 0. Neither is a spline."""


def layer_normalisation(lines: int, *, normalised: bool = True) -> ClaimFinding:
    """SPL-5b: encoder blocks of degree 3, followed by a layer normalisation."""
    cases = []
    for seed in range(lines):
        rng = np.random.default_rng([8, seed])
        attention = Attention.random(rng, 2)
        plain = Block(attention, residual=True)
        after = Block(attention, residual=True, after=layer_normalised) if normalised else None
        cases.append(Case(f"encoder block, line {seed + 1}", plain, line(rng, 2, 2), 3, evaluated=after))
    return splines(cases, example=_NORMALISATION, seed=8)


def _relu_squared(x: Array) -> Array:
    return np.asarray(relu(x) ** 2, dtype=object)


_DECODERS = ((0, 0), (0, 1), (1, 0), (1, 1))
_DEEPER = (*_DECODERS, (2, 0), (2, 1))

CLAIMS: Final = (
    Claim(
        id="SPL-4a",
        subject=SUBJECT,
        title="feed-forward networks with ReLU are linear splines",
        statement="x ↦ W₂ relu(W₁x + b₁) + b₂, and compositions of such maps, are continuous and "
        "piecewise affine.",
        source=SOURCE + "feed-forward networks (section from memory)",
        kind="exact",
        check=lambda lab: feed_forward(lab.choose(4, 20, 80)),
        control=lambda lab: feed_forward(2, Activation(rectify=_relu_squared)),
    ),
    Claim(
        id="SPL-4b",
        subject=SUBJECT,
        title="an encoder block with ReLU attention is a cubic spline",
        statement="Attention followed by a feed-forward network, each with a residual or not, is a cubic "
        "spline.",
        source=SOURCE + "encoders (section from memory)",
        kind="exact",
        check=lambda lab: blocks(lab.choose(4, 20, 80)),
        control=lambda lab: blocks(2, Activation(power=2)),
    ),
    Claim(
        id="SPL-4c",
        subject=SUBJECT,
        title="t layers: a spline of degree 3^t",
        statement="An encoder of t layers with ReLU attention is a spline of degree at most 3^t, "
        "attained, with residuals and without, here for t = 1, 2, 3.",
        source=SOURCE + "encoders (section from memory)",
        kind="exact",
        check=lambda lab: layers(lab.choose(3, 3, 4), lab.choose(2, 10, 12)),
        control=lambda lab: layers(2, 1, product=True),
        covers=("SPL-4",),
    ),
    Claim(
        id="SPL-5a",
        subject=SUBJECT,
        title="a decoder's degree is 2p + q",
        statement="Cross-attention from a decoder stream of degree q to an encoder's output of degree p "
        "is a spline of degree at most 2p + q, attained; decoders are splines.",
        source=SOURCE + "decoders and transformers (section from memory); degrees derived",
        kind="exact",
        check=lambda lab: decoders(lab.choose(_DECODERS, _DEEPER), lab.choose(2, 6)),
        control=lambda lab: decoders(_DECODERS[1:3], 1, of_encoder=1, of_decoder=2),
        covers=("SPL-5", "SEED3-5"),
    ),
    Claim(
        id="SPL-5b",
        subject=SUBJECT,
        title="transformers with layer normalisation are splines",
        statement="Encoder blocks with ReLU attention as they are built in practice, with layer "
        "normalisation, are splines.",
        source="what the theorem of arXiv 2408.09624 would say if read literally for built transformers; "
        "derived",
        kind="enclosure",
        check=lambda lab: layer_normalisation(lab.choose(1, 4)),
        control=lambda lab: layer_normalisation(1, normalised=False),
    ),
)
