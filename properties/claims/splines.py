"""Claims that attention with ReLU in place of softmax is a cubic spline: plain, masked, encoder–decoder.

A spline is a continuous function that is a polynomial on each cell of a partition by the signs of polynomials
(Lai, Lim and Liu, arXiv 2408.09624). On random rational lines every cell is found, its polynomial built and
compared with the interpolation of exact evaluations, and neighbours compared at their common end.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.spline_check import BITS, Case, splines
from attnproof.properties.claims.spline_networks import (
    RELU,
    Activation,
    Affine,
    Attention,
    EncoderDecoder,
    exponential,
    line,
    relu,
    row_normalised,
    softmax,
)
from attnproof.properties.claims.spline_pieces import evaluations, newton
from attnproof.properties.forms.base import Array, each, filled
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "CLAIMS",
    "SOURCE",
    "SUBJECT",
    "SelfAttention",
    "causality",
    "cubic",
    "encoder_decoder",
    "identity",
    "softmax_is_cubic",
    "weights_are_cubic",
]

SUBJECT: Final = "splines"
SOURCE: Final = "Lai, Lim and Liu, arXiv 2408.09624, "


def identity(d: int = 1) -> Affine:
    """x ↦ x."""
    return Affine(filled((d, d), (flint.fmpq(int(x)) for x in np.eye(d).flat)), rationals_zero(d))


def rationals_zero(d: int) -> Array:
    """The zero vector of rationals."""
    return filled((d,), [flint.fmpq(0)] * d)


_CUBIC_PROOF: Final = (
    "where the signs of the scores are constant, each weight is 0 or its score, of degree 2, and values have "
    "degree 1: outputs have degree 3 at most; relu is continuous, and with it their sums of products"
)
_MASKED_PROOF: Final = f"{_CUBIC_PROOF}; weights of masked pairs are 0 everywhere"
_CROSS_PROOF: Final = (
    "as in SPL-1a, with scores of degree 1 in X and 1 in Y, and values of degree 1 in X: 3 together, 2 "
    "in X, 1 "
    "in Y"
)


def _self_attention(lines: int, *, causal: bool = False, degree: int = 3) -> list[Case]:
    cases = []
    for seed in range(lines):
        rng = np.random.default_rng([1, seed])
        n, d = ((3, 2), (2, 2), (4, 1), (3, 3))[seed % 4]
        attention = Attention.random(rng, d, causal=causal)
        network = SelfAttention(attention)
        cases.append(Case(f"n = {n}, d = {d}, line {seed + 1}", network, line(rng, n, d), degree))
    return cases


@dataclass(frozen=True)
class SelfAttention:
    """Attention of all tokens to all."""

    attention: Attention

    def __call__(self, x: Array, activation: Activation) -> Array:
        return self.attention(x, x, activation)


@dataclass(frozen=True)
class _Weights:
    """The weights of self-attention instead of its output."""

    attention: Attention

    def __call__(self, x: Array, activation: Activation) -> Array:
        scores = self.attention.scores(x, x)
        return activation.weigh(scores, np.ones(scores.shape, dtype=bool))


def _pattern_degrees(n: int, d: int) -> list[int]:
    """Largest degree in X of ReLU attention without biases for each pattern of signs, all weights unknown."""
    names = [f"x{i}" for i in range(n * d)] + [f"w{i}" for i in range(3 * d * d)]
    unknowns = flint.fmpq_mpoly_ctx.get(names, "lex").gens()
    x = filled((n, d), unknowns[: n * d])
    query, key, value = filled((3, d, d), unknowns[n * d :])
    scores, values = (x @ query) @ (x @ key).T, x @ value
    degrees = []
    for signs in itertools.product((0, 1), repeat=n * n):
        out = (np.array(signs, dtype=object).reshape(n, n) * scores) @ values
        powers = [sum(monomial[: n * d]) for p in out.flat for monomial in p.to_dict()]
        degrees.append(max(powers, default=0))
    return degrees


def cubic(lines: int, activation: Activation = RELU) -> ClaimFinding:
    """SPL-1: lines, and every pattern of signs at n = d = 2 with unknown weights."""
    found = splines(_self_attention(lines), activation, seed=1, proof=_CUBIC_PROOF)
    degrees = _pattern_degrees(2, 2)
    every = degrees[0] == 0 and set(degrees[1:]) == {3}
    return ClaimFinding(
        status=found.status if every else "REFUTED",
        evidence=f"{found.evidence}. With n = d = 2 and all 12 weights unknown, the polynomial of each of "
        f"the {len(degrees)} patterns of signs has degree {', '.join(map(str, sorted(set(degrees))))} in "
        "X (0: all scores negative)",
        table=found.table,
        plots=found.plots,
        counterexample=found.counterexample or ("" if every else f"degrees in X by pattern: {degrees}"),
        seed=1,
    )


_WEIGHT = """n = 1, d = 1, W_Q = W_K = W_V = 1, no biases: the weight of token x is relu(x·x) = x²,
of degree 2. The output is x²·x = x³, of degree 3: it is the module, not its weights, that is cubic."""


def weights_are_cubic(lines: int, *, weights: bool = True) -> ClaimFinding:
    """SPL-1b: the same lines, with the weights in place of the output."""
    cases = _self_attention(lines)
    if weights:
        cases = [
            Case(case.name, _Weights(case.network.attention), case.directions, case.degree)
            for case in cases
            if isinstance(case.network, SelfAttention)
        ]
    return splines(cases, example=_WEIGHT if weights else "", seed=1)


_SOFTMAX = """n = 2, d = 1, W_Q = W_K = W_V = 1, tokens x = (t, 1): row 2 is with softmax
f(t) = (t·eᵗ + e)/(eᵗ + e), the average of t and 1 with weights eᵗ and e. At t = 0, 1, 2, 3, 4:
{values}; the 4th difference is {difference}, and 0 for a cubic polynomial.
No choice of cells helps: f is analytic for all real t, so if it were a polynomial on one interval, it would
be that polynomial everywhere. But f(t) → 1 for t → −∞ and f(t) − t → 0 for t → ∞: no polynomial does both."""


def softmax_is_cubic(activation: Activation) -> ClaimFinding:
    """SPL-1c: two tokens (t, 1) with all weights 1."""
    one = identity()
    directions = (filled((2, 1), map(flint.fmpq, (0, 1))), filled((2, 1), map(flint.fmpq, (1, 0))))
    case = Case("tokens (t, 1), weights 1", SelfAttention(Attention(one, one, one)), directions, 3)
    points = [flint.fmpq(t) for t in range(5)]
    with _precision(BITS):
        row = [flint.arb(y) for y in evaluations(case.network, directions, points, activation)[1]]
        difference = 24 * newton(points, row)[-1]
        shown = [y.str(6, radius=False) for y in [*row, difference]]
    example = _SOFTMAX.format(values=", ".join(shown[:-1]), difference=shown[-1])
    return splines([case], activation, example=example)


def causality(tokens: int = 5, trials: int = 6, *, causal: bool = True) -> ClaimFinding:
    """SPL-2b: rows before a change of later tokens; zeroed weights against large negative scores."""
    rng = np.random.default_rng(2)
    moved, masked, leaks = [], 0, 0
    for trial in range(trials):
        attention = Attention.random(rng, 2, causal=causal)
        x, other = rationals(rng, tokens, 2), rationals(rng, tokens, 2)
        out = attention(x, x, RELU)
        for first in range(1, tokens):
            changed = np.concatenate([x[:first], other[first:]])
            if (attention(changed, changed, RELU)[:first] != out[:first]).any():
                moved.append((trial + 1, first + 1))
        scores, future = attention.scores(x, x), ~np.tri(tokens, dtype=bool)
        largest = max(scores[future].max(), flint.fmpq(0))
        added = [relu(np.where(future, scores - low, scores)) for low in (largest, largest / 2)]
        masked += bool((added[0] @ attention.value(x) == out).all())
        leaks += bool((added[1] @ attention.value(x) != out).any())
    good = not moved and masked == trials
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{trials} random rational maps, {tokens} tokens: {trials * (tokens - 1)} changes of all "
        f"later tokens change an earlier row {len(moved)} times; scores lowered by the largest masked "
        f"score give the masked output exactly {masked} of {trials} times, lowered by half of it "
        f"{trials - leaks} times"
        + (
            ". For all: weights of later tokens are 0 and the others do not contain these; relu(s − M) "
            "= 0 for "
            "every M ≥ s"
            if good
            else ""
        ),
        table={"maps": [trials], "rows moved": [len(moved)], "equal": [masked], "half leaks": [leaks]},
        counterexample=""
        if good
        else f"map and first changed token: {moved[:3]}; equal: {masked} of {trials}",
        seed=2,
    )


def encoder_decoder(lines: int, activation: Activation = RELU) -> ClaimFinding:
    """SPL-3: both inputs move, then X alone, then Y alone."""
    cases = []
    for seed in range(lines):
        rng = np.random.default_rng([3, seed])
        attention = Attention.random(rng, 2)
        start, direction = line(rng, 5, 2)
        for moving, rows, degree in (
            ("X and Y", slice(0, 5), 3),
            ("X", slice(0, 3), 2),
            ("Y", slice(3, 5), 1),
        ):
            moved = each(lambda _: flint.fmpq(0), direction)
            moved[rows] = direction[rows]
            name = f"map {seed + 1}, {moving} on a line"
            cases.append(Case(name, EncoderDecoder(attention, 3), (start, moved), degree))
    return splines(cases, activation, seed=3, proof=_CROSS_PROOF)


SOFTMAX: Final = Activation(weights=softmax)
_EXPONENTIAL: Final = Activation(weights=exponential)
_NORMALISED: Final = Activation(weights=row_normalised)

CLAIMS: Final = (
    Claim(
        id="SPL-1a",
        subject=SUBJECT,
        title="ReLU attention is a cubic spline",
        statement="relu((XW_Q)(XW_K)ᵀ)·XW_V is continuous and, where the signs of the n² scores are "
        "constant, a polynomial in X of degree 3.",
        source=SOURCE + "abstract and section 2 (numbering from memory)",
        kind="exact",
        check=lambda lab: cubic(lab.choose(4, 24, 120)),
        control=lambda lab: cubic(2, SOFTMAX),
        covers=("SPL-1",),
    ),
    Claim(
        id="SPL-1b",
        subject=SUBJECT,
        title="attention weights are a cubic spline",
        statement="With ReLU in place of softmax it is the attention weights that are a cubic spline of "
        "the input, of degree 3.",
        source="second-hand summary of arXiv 2408.09624 (fourth source article)",
        kind="exact",
        check=lambda lab: weights_are_cubic(lab.choose(3, 12)),
        control=lambda lab: weights_are_cubic(2, weights=False),
        covers=("SEED3-1",),
    ),
    Claim(
        id="SPL-1c",
        subject=SUBJECT,
        title="softmax attention is a cubic spline",
        statement="Applying softmax to the scores is equivalent to a cubic spline of the input (with "
        "pieces given by the keys).",
        source="second-hand summary of arXiv 2408.09624 (fourth source article)",
        kind="enclosure",
        check=lambda lab: softmax_is_cubic(SOFTMAX),
        control=lambda lab: softmax_is_cubic(RELU),
        covers=("SEED3-2",),
    ),
    Claim(
        id="SPL-2a",
        subject=SUBJECT,
        title="masked ReLU attention is a cubic spline",
        statement="ReLU attention with weights of masked pairs set to 0 (j ≤ i kept) is a cubic spline of X.",
        source=SOURCE + "masked attention (section from memory)",
        kind="exact",
        check=lambda lab: splines(
            _self_attention(lab.choose(4, 24, 120), causal=True), seed=1, proof=_MASKED_PROOF
        ),
        control=lambda lab: splines(_self_attention(2, causal=True), _EXPONENTIAL, seed=1),
        covers=("SPL-2",),
    ),
    Claim(
        id="SPL-2b",
        subject=SUBJECT,
        title="masks of ReLU attention: causal, and equal to scores of −∞",
        statement="Row i of causal ReLU attention depends on tokens 1 … i only, and equals ReLU "
        "attention with −M added to masked scores for every M at least the largest masked score (so for "
        "M = ∞).",
        source="derived; " + SOURCE + "masked attention",
        kind="exact",
        check=lambda lab: causality(trials=lab.choose(6, 40)),
        control=lambda lab: causality(causal=False),
    ),
    Claim(
        id="SPL-3",
        subject=SUBJECT,
        title="encoder–decoder ReLU attention: degree 2 in X, 1 in Y",
        statement="relu(Q(Y) K(X)ᵀ) V(X) is a cubic spline of (X, Y) jointly, quadratic in X alone and "
        "linear in Y alone.",
        source=SOURCE + "encoder–decoder attention (section from memory)",
        kind="exact",
        check=lambda lab: encoder_decoder(lab.choose(2, 12, 60)),
        control=lambda lab: encoder_decoder(1, _NORMALISED),
    ),
)
