"""Claims on which exact oracles rest: dyadic weights, rational families, the sharp perturbation bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.correct_rounding import FP32, Rounded
from attnproof.properties.claims.equal_forms import SCHWARTZ_ZIPPEL
from attnproof.properties.claims.log_sum_exp import weights
from attnproof.properties.forms import delta, gated, linear
from attnproof.properties.forms.base import Array, difference, each
from attnproof.properties.forms.numbers import generic

__all__ = [
    "CLAIMS",
    "dyadic",
    "integer_weights",
    "online_blocks",
    "perturbation",
    "rational_families",
    "sharpness",
]

_SEED = 26
_BITS = 256
_Q = flint.fmpq


def integer_weights(longest: int, largest: int, base: int = 1) -> ClaimFinding:
    """softmax(log w)_j = w_j/Σw, enclosed, for rows of integer weights; log ``base`` is added to a logit."""
    rows, widest, wrong = 0, 0.0, ""
    with _precision(_BITS):
        for w in weights(longest, largest):
            logits = [flint.arb(x).log() for x in w]
            logits[0] += flint.arb(base).log()
            numerators = [x.exp() for x in logits]
            total = sum(numerators, flint.arb(0))
            rows += 1
            for numerator, weight in zip(numerators, w, strict=True):
                found, due = numerator / total, weight / sum(w, _Q(0))
                widest = max(widest, float(found.rad()))
                if not found.contains(due) and not wrong:
                    wrong = f"w = ({', '.join(map(str, w))}): {float(found.mid()):.10g}, not {due}"
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"balls of {_BITS} bits hold w_j/Σw in all {rows} rows of up to {longest} weights up to "
        f"{largest}, "
        f"radii up to {widest:.2g}" + (f"; not so: {wrong}" if wrong else ""),
        counterexample=wrong,
    )


def online_blocks(
    logits: Sequence[int], values: Sequence[int], blocks: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """ℓ and the unnormalised o of an online softmax in base 2 over blocks of keys, all operations in fp32."""
    r = Rounded(FP32)
    m, l, o = -np.inf, np.zeros(1), np.zeros(1)
    for block in blocks:
        top = max(m, *(float(logits[j]) for j in block))
        scale = FP32.rounded(np.exp2(np.array([m - top])))
        l, o = r.mul(l, scale), r.mul(o, scale)
        for j in block:
            p = FP32.rounded(np.exp2(np.array([logits[j] - top])))
            l = r.add(l, p)
            o = r.add(o, r.mul(p, np.array([float(values[j])])))
        m = top
    return float(l[0]), float(o[0])


def dyadic(rows: int, keys: int = 12, stretch: int = 1) -> ClaimFinding:
    """Integer logits in base 2 through every block length, and shuffled blocks, against exact sums.

    Queries and keys have entries in {0, ±1, ±2} and width 2, values in −8 … 8; ``stretch`` multiplies the
    logits, until sums no longer fit the 24 bits of fp32.
    """
    rng, wrong, runs, spread = np.random.default_rng(_SEED), "", 0, 0
    for _ in range(rows):
        q, k = rng.integers(-2, 3, 2), rng.integers(-2, 3, (keys, 2))
        x = (stretch * (k @ q)).tolist()
        v = rng.integers(-8, 9, keys).tolist()
        spread = max(spread, max(x) - min(x))
        due = [
            sum((_Q(2) ** (a - max(x)) * b for a, b in zip(x, column, strict=True)), _Q(0))
            for column in ([1] * keys, v)
        ]
        for length in range(1, keys + 1):
            blocks = [list(range(i, min(i + length, keys))) for i in range(0, keys, length)]
            for order in (blocks, [blocks[i] for i in rng.permutation(len(blocks))]):
                runs += 1
                computed = online_blocks(x, v, order)
                l, o = (_exactly(number) for number in computed)
                quotient = _exactly(float(FP32.rounded(computed[1] / computed[0])))
                if [l, o] != due and not wrong:
                    told = f"logits {x} (base 2), values {v}, blocks of {length}"
                    wrong = f"{told}: (ℓ, o) = ({l}, {o}), due ({due[0]}, {due[1]})"
                if abs(quotient - o / l) > abs(o / l) * _Q(1, 2**24) and not wrong:
                    wrong = f"logits {x}: o/ℓ is off by more than half an ulp"
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{runs} online runs in fp32, every operation rounded, over {rows} rows of {keys} keys "
        f"(seed {_SEED}), every "
        f"block length, in order and shuffled, logits spread by up to {spread}: ℓ and o "
        + (
            "are exact in all, the quotient within half an ulp" if not wrong else f"not always exact: {wrong}"
        ),
        counterexample=wrong,
        seed=_SEED,
    )


def _exactly(x: float) -> Any:
    numerator, denominator = x.as_integer_ratio()
    return _Q(numerator, denominator)


Runs = Callable[[np.random.Generator], Sequence[Array]]


def _linear(rng: np.random.Generator) -> Sequence[Array]:
    q, k, v = (abs(generic(rng, 7, 3)) + 1 for _ in range(3))
    return [
        linear.recurrent(q, k, v, normalize=True)[0],
        linear.parallel(q, k, v, normalize=True)[0],
        linear.chunkwise(q, k, v, chunk=3, normalize=True)[0],
    ]


def _gated(rng: np.random.Generator) -> Sequence[Array]:
    q, k, v = (generic(rng, 7, 3) for _ in range(3))
    alpha = generic(rng, 7, 3, low=1, high=6)
    forms = [gated.recurrent(q, k, v, gated.gates(alpha))[0], gated.parallel(q, k, v, alpha)[0]]
    return [*forms, gated.chunkwise(q, k, v, alpha, chunk=3)[0]]


def _delta(rng: np.random.Generator) -> Sequence[Array]:
    q, k, v = (generic(rng, 7, 3) for _ in range(3))
    beta = generic(rng, 7, low=1, high=6)
    return [form(q, k, v, beta)[0] for form in (delta.recurrent, delta.parallel)]


def _relu(rng: np.random.Generator) -> Sequence[Array]:
    """ReLU² attention by the matrix of weights, and key by key."""
    q, k, v = (generic(rng, 7, 3) for _ in range(3))
    scores = _positive(q @ k.T)
    by_key: Array = np.zeros_like(v)
    for j in range(7):
        by_key = by_key + np.outer(_positive(q @ k[j]) ** 2, v[j])
    return [(scores * scores) @ v, by_key]


def _positive(x: Array) -> Array:
    return each(lambda entry: max(entry, _Q(0)), x)


def _late(rng: np.random.Generator) -> Sequence[Array]:
    """Gated linear attention, its parallel form with every gate one position late: unequal forms."""
    q, k, v = (generic(rng, 7, 3) for _ in range(3))
    alpha = generic(rng, 7, 3, low=1, high=6)
    late = np.concatenate([alpha[:1], alpha[:-1]])
    return [gated.recurrent(q, k, v, gated.gates(alpha))[0], gated.parallel(q, k, v, late)[0]]


_FAMILIES: Final[dict[str, Runs]] = {
    "linear attention": _linear,
    "gated linear attention": _gated,
    "delta rule": _delta,
    "ReLU² attention": _relu,
}


def rational_families(families: dict[str, Runs] | None = None) -> ClaimFinding:
    """Do rational inputs give rational outputs, equal in every form?"""
    rows, wrong = [], ""
    for name, forms in (families or _FAMILIES).items():
        outputs = forms(np.random.default_rng(_SEED))
        rational = all(isinstance(x, (flint.fmpq, flint.fmpz, int)) for o in outputs for x in o.flat)
        apart = max((difference(outputs[0], o) for o in outputs[1:]), default=0) if rational else 0
        rows.append((name, len(outputs), outputs[0].size, rational, rational and apart == 0))
        if not rows[-1][-1] and not wrong:
            wrong = f"{name}: rational outputs: {rational}; largest difference {float(apart):.6g}"
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"rational inputs (seed {_SEED}), forms compared number by number without a tolerance: "
        + "; ".join(
            f"{name}: {forms} forms, {'equal' if equal else 'not so'}" for name, forms, _, _, equal in rows
        )
        + f" ({SCHWARTZ_ZIPPEL}; ReLU² on the pieces drawn, both forms summing the same products)",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("family", "forms", "numbers", "rational", "equal"))
        },
        counterexample=wrong,
        seed=_SEED,
    )


def sharpness(shrink: Any = 1) -> bool:
    """Is (t − 1)/(t + 1) minus the change of a subset's mass p a square over positive factors, for all t, p?

    Factors of the weights in [1/t, t] raise the mass p of a subset at most to t²p/(1 + (t² − 1)p): the
    subset's weights by t, the others by 1/t. The change is (t² − 1)p(1 − p)/(1 + (t² − 1)p), and
    (t − 1)(1 + (t² − 1)p) − (t + 1)(t² − 1)p(1 − p) = (t − 1)(1 − (t + 1)p)², which is 0 at p = 1/(1 + t).
    """
    context = flint.fmpq_mpoly_ctx.get(["t", "p"], "lex")
    t, p = context.gens()
    difference = shrink * (t - 1) * (1 + (t**2 - 1) * p) - (t + 1) * (t**2 - 1) * p * (1 - p)
    return bool(difference == (t - 1) * (1 - (t + 1) * p) ** 2)


def perturbation(longest: int, largest: int, shrink: Any = 1) -> ClaimFinding:
    """Total variation against ``shrink``·tanh(ε/2) for logits changed by −ε, 0, ε, exactly, e^ε = t rational.

    The change of a subset's mass is monotone in every factor, so its extremes are at ±ε.
    """
    worst, wrong, cases, attained = _Q(0), "", 0, 0
    for t in (_Q(3, 2), _Q(2), _Q(5)):
        bound = shrink * (t - 1) / (t + 1)
        rows = [*weights(longest, largest, 2), (t, _Q(1)), (t, _Q(1, 2), _Q(1, 2))]
        for w in rows:
            p = [x / sum(w, _Q(0)) for x in w]
            for r in itertools.product((1 / t, _Q(1), t), repeat=len(w)):
                moved = [x * y for x, y in zip(w, r, strict=True)]
                total = sum(moved, _Q(0))
                change = [x / total - y for x, y in zip(moved, p, strict=True)]
                variation = sum(map(abs, change), _Q(0)) / 2
                # Values on which an output moves most: 1 where the weight grows, 0 elsewhere.
                output = sum((x for x in change if x > 0), _Q(0))
                cases += 1
                worst, attained = max(worst, variation / bound), attained + (variation == bound)
                if max(variation, output) > bound and not wrong:
                    told = ", ".join(map(str, r))
                    wrong = (
                        f"e^ε = {t}, weights ({', '.join(map(str, w))}), factors "
                        f"({told}): total variation "
                        f"{variation} > {bound}"
                    )
    identity = sharpness(shrink)
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS" if identity and attained else "SUPPORTED",
        evidence=f"{cases} perturbed rows of up to {longest} weights, e^ε in 3/2, 2, 5, over the rationals: "
        "largest variation "
        f"by bound {worst}, reached {attained} times; for all t and p by the polynomial identity: {identity}",
        counterexample=wrong,
    )


def _claim(name: str, title: str, statement: str, check: Any, control: Any, **more: Any) -> Claim:
    kind = more.pop("kind", "exact")
    return Claim(name, "exact oracles", title, statement, "derived", kind, check, control, **more)


CLAIMS: Final = (
    _claim(
        "EXA-1a",
        "softmax of logarithms of integers",
        "Logits log w_j with positive integers w_j have the rational softmax w_j/Σw.",
        lambda lab: integer_weights(*lab.choose((4, 6), (5, 9), (6, 9))),
        lambda lab: integer_weights(2, 3, 2),
        kind="enclosure",
    ),
    _claim(
        "EXA-1b",
        "integer logits in base 2 are exact in fp32",
        "With integer logits in base 2 an online softmax in fp32 has the exact ℓ and unnormalised o for "
        "every block length "
        "and order of blocks, as long as sums fit 24 bits; after an IEEE division o/ℓ is within half an ulp.",
        lambda lab: dyadic(lab.choose(6, 60, 200)),
        lambda lab: dyadic(4, stretch=4),
    ),
    _claim(
        "EXA-2",
        "rational families",
        "Linear attention, gated linear attention, the delta rule and ReLU attention map rational inputs to "
        "rational "
        "outputs, so that their forms must be equal without any tolerance.",
        lambda lab: rational_families(),
        lambda lab: rational_families({"gated linear attention, gates late": _late}),
        covers=("LIN-1", "GLA-3", "DN-2"),
    ),
    _claim(
        "EXA-3",
        "sharp perturbation bound",
        "If every logit of a row changes by at most ε, the row's total variation changes by at most "
        "tanh(ε/2), so an output "
        "coordinate by at most tanh(ε/2)·(max V − min V); two groups with p = 1/(1 + e^ε) attain it.",
        lambda lab: perturbation(*lab.choose((3, 4), (4, 6), (5, 6))),
        lambda lab: perturbation(3, 3, _Q(9, 10)),
    ),
)
