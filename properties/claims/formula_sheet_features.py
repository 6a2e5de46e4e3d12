"""Identities of attention's variants by features: positive random features, cosines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.claims.equal_forms import equality, row
from attnproof.properties.claims.formula_sheet import sheet_claim, turned
from attnproof.properties.forms import linear
from attnproof.properties.forms.base import filled
from attnproof.properties.forms.numbers import generic

__all__ = ["CLAIMS", "cosine_features", "cosine_signs", "random_features"]

_SEED: Final = 602
Polynomial = dict[tuple[int, int], Any]
"""Σ c_ab q^a k^b by (a, b)."""


def _times(x: Polynomial, y: Polynomial, degree: int) -> Polynomial:
    out: Polynomial = {}
    for (a, b), c in x.items():
        for (d, e), f in y.items():
            if a + b + d + e <= degree:
                out[a + d, b + e] = out.get((a + d, b + e), 0) + c * f
    return out


def _exponential(x: Polynomial, degree: int) -> Polynomial:
    """Σ xⁿ/n! up to a total degree, of x without a constant term."""
    power: Polynomial = {(0, 0): flint.fmpq(1)}
    out = dict(power)
    for n in range(1, degree + 1):
        power = {key: c / n for key, c in _times(power, x, degree).items()}
        for key, c in power.items():
            out[key] = out.get(key, flint.fmpq(0)) + c
    return out


def _mean_exponential(factor: int, degree: int) -> Polynomial:
    """E e^(factor·ω(q + k)) for ω ~ N(0, 1), from its moments E ωⁿ = (n − 1)·E ωⁿ⁻²."""
    out: Polynomial = {}
    moment = flint.fmpq(1)
    for n in range(0, degree + 1, 2):
        moment *= max(n - 1, 1)
        for a in range(n + 1):
            out[a, n - a] = moment * flint.fmpq(factor**n * math.comb(n, a), math.factorial(n))
    return out


def random_features(power: int = 1, degree: int = 12, *, normed: bool = True) -> ClaimFinding:
    """Is E (e^(ωq − q²/2) e^(ωk − k²/2))^power e^(qk) for power 1, and e^(2qk + (q + k)²) for 2?

    One coordinate, as formal power series up to a total degree, exactly.

    Args:
        normed: False leaves out −q²/2 and −k²/2.
    """
    half = flint.fmpq(-power if normed else 0, 2)
    norm = _exponential({(2, 0): half, (0, 2): half}, degree)
    mean = _times(_mean_exponential(power, degree), norm, degree)
    one = flint.fmpq(1)
    exponent: Polynomial = {(1, 1): one} if power == 1 else {(2, 0): one, (1, 1): 4 * one, (0, 2): one}
    due = _exponential(exponent, degree)
    keys = sorted({*mean, *due}, key=lambda key: (sum(key), key))
    wrong = [key for key in keys if mean.get(key, 0) != due.get(key, 0)]
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(keys)} coefficients up to degree {degree} of one coordinate, from the moments of "
        f"N(0, 1): {len(wrong)} differ. For every degree: E e^(aω) = e^(a²/2), by completing the square in "
        "∫e^(aω − ω²/2)dω, with a = q + k (mean) and a = 2(q + k) (second moment); coordinates are "
        "independent, so that exponents add to ‖q + k‖² and q·k; m independent features divide the variance "
        "by m",
        counterexample=f"coefficient of q^{wrong[0][0]} k^{wrong[0][1]}: {mean.get(wrong[0], 0)}, claimed "
        f"{due.get(wrong[0], 0)}"
        if wrong
        else "",
    )


def cosine_features(*, second: int = 1) -> ClaimFinding:
    """Is attention with weights φ(q)φ(k)cos(θ(i − j)) linear attention on the features φcos and φsin?

    Args:
        second: sign of the product of sines.
    """
    rng = np.random.default_rng(_SEED)
    n, width = 6, 2
    q, k, v = generic(rng, n, width, low=1), generic(rng, n, width, low=1), generic(rng, n, 2)
    t = generic(rng, 1)
    unit = np.stack([(1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)], axis=-1)
    start = filled((1, 2), [flint.fmpq(1), flint.fmpq(0)])

    def cosine(turns: int) -> Any:
        return turned(start, unit, turns)[0, 0]

    angle = filled((n, n), (cosine(i - j) for i in range(n) for j in range(n)))
    weights = np.tril((q @ k.T) * angle)
    due = (weights @ v) / weights.sum(axis=1)[:, None]
    circle = np.stack([turned(start, unit, i)[0] for i in range(n)])
    own, other = (
        np.concatenate([x * circle[:, :1], x * circle[:, 1:] * sign], axis=1)
        for x, sign in ((q, 1), (k, second))
    )
    found = linear.recurrent(own, other, v, normalize=True)[0]
    return equality(
        [row("causal", "two features a coordinate", due, [found])],
        seed=_SEED,
        example="i = j = 1, angle (3 + 4i)/5: cos 0 = 1 = (3/5)² + (4/5)², and not (3/5)² − (4/5)² = −7/25",
    )


def cosine_signs(lengths: Sequence[int], *, longer: int = 0) -> ClaimFinding:
    """Is cos(π(i − j)/(2M)) ≥ 0 for all positions 0 … M + ``longer``?"""
    wrong = []
    for m in lengths:
        for gap in range(m + longer + 1):
            value = flint.arb.cos_pi_fmpq(flint.fmpq(gap, 2 * m))
            if value < 0:
                wrong.append((m, gap, float(value.mid())))
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"M = {min(lengths)} … {max(lengths)}, |i − j| = 0 … M{f' + {longer}' if longer else ''}: "
        f"{len(wrong)} cosines enclosed below 0. For every M: |i − j| ≤ M gives an angle of at most π/2",
        counterexample=f"M = {wrong[0][0]}, |i − j| = {wrong[0][1]}: {wrong[0][2]:.4f}" if wrong else "",
    )


_PERFORMER: Final = "Choromanski et al., arXiv 2009.14794, lemmas 1 and 2 (recalled)"
CLAIMS: Final = (
    sheet_claim(
        "SHEET-6a",
        "positive random features are unbiased",
        "With φ(x) = m^(−1/2) e^(ω_r·x − ‖x‖²/2), ω_r ~ N(0, I), E φ(q)·φ(k) = e^(q·k).",
        _PERFORMER,
        "exact",
        (random_features, lambda: random_features(normed=False)),
    ),
    sheet_claim(
        "SHEET-6b",
        "variance of positive random features",
        "For m independent ω_r the variance of φ(q)·φ(k) relative to e^(2q·k) is (e^(‖q + k‖²) − 1)/m.",
        _PERFORMER,
        "exact",
        (lambda: random_features(2), lambda: random_features(2, normed=False)),
    ),
    sheet_claim(
        "SHEET-7a",
        "cosFormer splits",
        "Weights ReLU(q)ReLU(k)cos(π(i − j)/(2M)) are inner products of two features a coordinate, ReLU "
        "times cosine and sine of the own position: linear attention.",
        "Qin et al., arXiv 2202.08791, section 3.2 (recalled)",
        "exact",
        (cosine_features, lambda: cosine_features(second=-1)),
    ),
    sheet_claim(
        "SHEET-7b",
        "cosFormer's weights are not negative",
        "For positions at most M apart no weight of cosFormer is negative.",
        "Qin et al., arXiv 2202.08791, section 3.2 (recalled)",
        "enclosure",
        (lambda: cosine_signs(range(1, 65)), lambda: cosine_signs(range(1, 65), longer=1)),
    ),
)
