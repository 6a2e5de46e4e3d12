"""Enclosures of the 2-norm of the Jacobian of self-attention, and a search for inputs where it is large.

Self-attention maps tokens x_1 … x_n to y_i = Σ_j p_ij W x_j, with p from the logits x_iᵀA x_j. With g = σ'
and c_ij = W x_j for sigmoid, g = p and c_ij = W x_j − y_i for softmax attention,
∂y_i/∂x_j = p_ij W + g_ij c_ij (Aᵀx_i)ᵀ + [i = j] Σ_k g_ik c_ik (A x_k)ᵀ. Every formula here runs on float64,
to search, and on Arb's balls, to prove.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.forms.base import Array, each

__all__ = [
    "Bound",
    "Instance",
    "Quantities",
    "Weighting",
    "climbed",
    "enclosed_ratio",
    "jacobian",
    "spectral_norm",
    "two_groups",
]

Weighting = Literal["sigmoid", "softmax"]
"""σ(s − log n), or softmax."""

_BITS = 128
_SHAPES = ((1, 1), (2, 1), (3, 1), (2, 2), (4, 1), (3, 2))


def exp(x: Any) -> Any:
    """e^x of a float, a ball, or an array of either."""
    if isinstance(x, np.ndarray):
        return np.exp(x) if x.dtype == np.float64 else each(flint.arb.exp, x)
    return x.exp() if isinstance(x, flint.arb) else math.exp(x)


def sqrt(x: Any) -> Any:
    """√x of a float or a ball."""
    return x.sqrt() if isinstance(x, flint.arb) else math.sqrt(x)


def largest(x: Array) -> Any:
    """The largest of an array of floats or balls."""
    if x.dtype == np.float64:
        return float(x.max())
    return functools.reduce(flint.arb.max, x.flat)


@dataclass(frozen=True)
class Instance:
    """Tokens x (n, d), A (d, d) and W (d, d), float64."""

    x: Array
    a: Array
    w: Array

    def in_balls(self) -> Instance:
        """The same numbers as exact balls."""
        return Instance(*(each(lambda y: flint.arb(float(y)), z) for z in (self.x, self.a, self.w)))


@dataclass(frozen=True)
class Quantities:
    """What bounds of the norm are made of, floats or balls.

    Attributes:
        n: tokens.
        weight, slope: largest p and largest g.
        logit: largest |s|.
        total, radius: Σ‖x_i‖² and the largest ‖x_i‖.
        a, w: ‖A‖ and ‖W‖.
    """

    n: int
    weight: Any
    slope: Any
    logit: Any
    total: Any
    radius: Any
    a: Any
    w: Any


Bound = Callable[[Quantities], Any]


def _weights(logits: Array, weighting: Weighting) -> tuple[Array, Array]:
    """p and g of logits (n, n)."""
    if weighting == "sigmoid":
        p = 1 / (1 + len(logits) * exp(-logits))
        return p, p * (1 - p)
    shift = each(float, logits).astype(np.float64).max(axis=1, keepdims=True)
    raised = exp(logits - shift)
    p = raised / raised.sum(axis=1, keepdims=True)
    return p, p


def jacobian(instance: Instance, weighting: Weighting) -> tuple[Array, Array, Array, Array]:
    """The Jacobian (n·d, n·d) at the instance, the logits, p and g (n, n), in the instance's numbers."""
    x, a, w = instance.x, instance.a, instance.w
    n, d = x.shape
    queries, keys, values = x @ a, x @ a.T, x @ w.T
    logits = queries @ x.T
    p, g = _weights(logits, weighting)
    c = np.broadcast_to(values[None], (n, n, d))
    if weighting == "softmax":
        c = c - (p @ values)[:, None]
    blocks = p[:, None, :, None] * w[None, :, None, :]
    blocks = blocks + (g[:, :, None] * c).transpose(0, 2, 1)[..., None] * queries[:, None, None, :]
    for i in range(n):
        blocks[i, :, i, :] = blocks[i, :, i, :] + (g[i][:, None] * c[i]).T @ keys
    return blocks.reshape(n * d, n * d), logits, p, g


def spectral_norm(matrix: Array) -> flint.arb:
    """A ball that holds ‖matrix‖_2, for a matrix of balls.

    From below by ‖Mv‖/‖v‖ at an approximate singular vector v; from above since the eigenvalues of MᵀM are
    those of Q⁻¹MᵀMQ for every invertible Q, at most its largest absolute row sum; Q is an approximate
    eigenbasis.
    """
    m = flint.arb_mat([list(row) for row in matrix])
    gram = m.transpose() * m
    size = gram.nrows()
    centre = np.array([[float(gram[i, j].mid()) for j in range(size)] for i in range(size)])
    _, vectors = np.linalg.eigh((centre + centre.T) / 2)
    basis = flint.arb_mat([[flint.arb(float(y)) for y in row] for row in vectors])
    similar = basis.inv() * gram * basis
    above = functools.reduce(
        flint.arb.max, (sum((abs(similar[i, j]) for j in range(size)), flint.arb(0)) for i in range(size))
    )
    v = flint.arb_mat([[flint.arb(float(y))] for y in vectors[:, -1]])
    below = (v.transpose() * gram * v)[0, 0] / (v.transpose() * v)[0, 0]
    return below.nonnegative_part().sqrt().union(above.nonnegative_part().sqrt())


def _quantities(
    instance: Instance, weighting: Weighting, norm: Callable[[Array], Any]
) -> tuple[Any, Quantities]:
    """‖J‖ by ``norm``, and what bounds are made of."""
    matrix, logits, p, g = jacobian(instance, weighting)
    squares = (instance.x * instance.x).sum(axis=1)
    found = Quantities(
        n=len(squares),
        weight=largest(p),
        slope=largest(g),
        logit=largest(abs(logits)),
        total=squares.sum(),
        radius=sqrt(largest(squares)),
        a=norm(instance.a),
        w=norm(instance.w),
    )
    return norm(matrix), found


def _by_float(matrix: Array) -> float:
    return float(np.linalg.norm(matrix, 2))


def enclosed_ratio(instance: Instance, weighting: Weighting, bound: Bound) -> flint.arb:
    """‖J‖ over the bound as a ball, for an instance of float64 numbers taken exactly."""
    with _precision(_BITS):
        norm, quantities = _quantities(instance.in_balls(), weighting, spectral_norm)
        return flint.arb(norm / bound(quantities))


def climbed(
    weighting: Weighting,
    bound: Bound,
    starts: int,
    steps: int,
    seed: int,
    shapes: Sequence[tuple[int, int]] = _SHAPES,
) -> Iterator[Instance]:
    """Instances at which ‖J‖ over the bound is large, one of each start: random, then a climb in float64.

    Args:
        weighting, bound: of what is maximised; starts: of random normal x, A and W, of the (n, d) of
            ``shapes`` in turn; steps: changes tried of each, kept where the ratio grows; seed: of all.
    """
    rng = np.random.default_rng(seed)

    def ratio(instance: Instance) -> float:
        norm, quantities = _quantities(instance, weighting, _by_float)
        return float(norm / bound(quantities))

    for start in range(starts):
        n, d = shapes[start % len(shapes)]
        scale = 2.0 ** rng.uniform(-2, 1)
        best = Instance(
            scale * rng.standard_normal((n, d)), rng.standard_normal((d, d)), rng.standard_normal((d, d))
        )
        value = ratio(best)
        for _ in range(steps):
            tried = Instance(
                *(
                    z * (1 + 0.3 * rng.standard_normal(z.shape)) + 0.05 * rng.standard_normal(z.shape)
                    for z in (best.x, best.a, best.w)
                )
            )
            if (reached := ratio(tried)) > value:
                best, value = tried, reached
        yield best


def two_groups(
    a: flint.arb, b: flint.arb, copies: tuple[int, int], weighting: Weighting, factor: int = 1
) -> tuple[flint.arb, flint.arb]:
    """‖J‖ of scalar tokens, some equal to a and some (or none) to b, with W = 1, and ∂y_a/∂x_b.

    On vectors equal within each group, scaled to norm 1, J is a matrix of 2 by 2; on vectors of sum 0 within
    a group of two tokens or more it is a multiple of the identity.

    Args:
        a, b: tokens; copies: how many of each; weighting: sigmoid or softmax; factor: A.
    """
    tokens, n = (a, b), sum(copies)
    p: list[list[flint.arb]] = []
    for x in (factor * a, factor * b):
        if weighting == "sigmoid":
            p.append([1 / (1 + n * (-x * y).exp()) for y in tokens])
        else:
            p.append([1 / _total(((x * (z - y)).exp() for z in tokens), copies) for y in tokens])
    entries: list[list[flint.arb]] = []
    own = []
    for x, row in zip(tokens, p, strict=True):
        if weighting == "sigmoid":
            change = [factor * q * (1 - q) * y for q, y in zip(row, tokens, strict=True)]
        else:
            mean = _total((q * y for q, y in zip(row, tokens, strict=True)), copies)
            change = [factor * q * (y - mean) for q, y in zip(row, tokens, strict=True)]
        entries.append([q + change[j] * x for j, q in enumerate(row)])
        own.append(_total((c * y for c, y in zip(change, tokens, strict=True)), copies))
    first, second = copies[0] * entries[0][0] + own[0], copies[1] * entries[1][1] + own[1]
    if copies[1] == 0:
        second = flint.arb(0)
    root = (flint.arb(copies[0]) * copies[1]).sqrt()
    norm = _norm_of_two(first, root * entries[0][1], root * entries[1][0], second)
    for m, multiple in zip(copies, own, strict=True):
        if m > 1:
            norm = norm.max(abs(multiple))
    return norm, entries[0][1]


def _total(of_each: Iterable[flint.arb], copies: Sequence[int]) -> flint.arb:
    """The sum over all tokens of a number that each group has."""
    return sum((m * x for m, x in zip(copies, of_each, strict=True)), flint.arb(0))


def _norm_of_two(a: flint.arb, b: flint.arb, c: flint.arb, d: flint.arb) -> flint.arb:
    """‖((a, b), (c, d))‖_2 = (√((a + d)² + (b − c)²) + √((a − d)² + (b + c)²))/2."""
    # Products: Arb's power of a ball around 0 is undetermined.
    plus, minus, apart, both = a + d, b - c, a - d, b + c
    return ((plus * plus + minus * minus).sqrt() + (apart * apart + both * both).sqrt()) / 2
