"""What FlashAttention reports of rows without a key and of NaN rows, and what its backward makes of it.

The finalisers are those of csrc/flash_attn/src/softmax.h and hopper/softmax.h.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.small_formats import Floats

__all__ = [
    "CLAIMS",
    "backward_sum",
    "backward_sums",
    "blank_probability",
    "finalised",
    "merged",
    "merges",
    "nan_is_seen",
]

_CODE: Final = "Dao-AILab/flash-attention, csrc/flash_attn/src/softmax.h and hopper/softmax.h"
INFINITE: Final = float("inf")
NAN: Final = float("nan")


def finalised(mass: float, top: float, kind: str) -> tuple[float, float]:
    """(factor of the unnormalised O, log-sum-exp) as the code ends a row.

    Args:
        kind: "FA2", "FA2 split" or "FA3".
    """
    lost = mass == 0 or math.isnan(mass)
    if kind == "FA3":
        return (0.0, -INFINITE) if lost else (1 / mass, top + math.log(mass))
    sentinel = -INFINITE if kind == "FA2 split" else INFINITE
    return (1.0, sentinel) if lost else (1 / mass, top + math.log(mass))


Part = tuple[flint.fmpq, float]
"""O of some keys, and the binary logarithm of their mass: an integer, or infinite."""


def _power(exponent: float) -> flint.fmpq:
    if exponent == -INFINITE:
        return flint.fmpq(0)
    return flint.fmpq(2) ** int(exponent)


def merged(parts: Sequence[Part]) -> tuple[flint.fmpq, flint.fmpq] | None:
    """(O, mass over 2^top) of the union by log-sum-exp weights, top 0 for −∞; None where a weight is ∞ −
    ∞.
    """
    top = max(lse for _, lse in parts)
    if top == INFINITE:
        return None
    top = 0.0 if top == -INFINITE else top
    shares = [_power(lse - top) for _, lse in parts]
    mass = sum(shares, flint.fmpq(0))
    out = sum((share * o for share, (o, _) in zip(shares, parts, strict=True)), flint.fmpq(0))
    return (out / mass if mass else flint.fmpq(0)), mass


def merges(kind: str) -> ClaimFinding:
    """Can parts of a row be merged by their log-sum-exp where some hold no key?

    Every part holds no key or one of mass 1/2, 1, 2, 4 and value 1, 2, 3: all triples of parts.
    """
    _, sentinel = finalised(0.0, -INFINITE, kind)
    choices: list[Part] = [(flint.fmpq(0), sentinel)]
    choices += [(flint.fmpq(value), float(lse)) for value in (1, 2, 3) for lse in (-1, 0, 1, 2)]
    wrong, count = [], 0
    for parts in itertools.product(choices, repeat=3):
        real = [(o, _power(lse)) for o, lse in parts if not math.isinf(lse)]
        mass = sum((w for _, w in real), flint.fmpq(0))
        exact = sum((o * w for o, w in real), flint.fmpq(0)) / mass if mass else flint.fmpq(0)
        found = merged(parts)
        count += 1
        if found is None or found[0] != exact:
            wrong.append(parts)
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"an empty part is reported with LSE = {sentinel} ({kind}); {count - len(wrong)} of {count} "
        "triples of parts merge to the exact O, rows without any key to 0",
        counterexample=(
            f"parts (O = 1, LSE = 0) and (O = 0, LSE = {sentinel}, no key): the largest LSE is ∞, the "
            "weights are e^(0 − ∞) = 0 and e^(∞ − ∞) = NaN; the exact O is 1"
            if wrong
            else ""
        ),
    )


def nan_is_seen(end: Callable[[float, float, str], tuple[float, float]] = finalised) -> ClaimFinding:
    """Is the log-sum-exp of a row with a NaN a NaN? By ``end``, which finalises a row."""
    rows = []
    for kind in ("FA2", "FA2 split", "FA3"):
        # The maximum passes over a NaN (fmaxf), the sum does not.
        factor, lse = end(NAN, 0.0, kind)
        rows.append((kind, lse, math.isnan(factor * NAN)))
    hidden = [(kind, lse) for kind, lse, _ in rows if not math.isnan(lse)]
    return ClaimFinding(
        status="REFUTED" if hidden else "HOLDS",
        evidence="a row with one NaN logit: "
        + "; ".join(f"{kind}: LSE = {lse}, O is NaN: {o}" for kind, lse, o in rows),
        table={
            "kernel": [row[0] for row in rows],
            "LSE": [str(row[1]) for row in rows],
            "O is NaN": [row[2] for row in rows],
        },
        counterexample="S = (0, NaN): ℓ = 1 + NaN = NaN, so LSE is set to "
        + ", ".join(f"{lse} ({kind})" for kind, lse in hidden)
        if hidden
        else "",
    )


def blank_probability(kind: str) -> ClaimFinding:
    """Does the backward's P = exp(S − LSE) vanish in a row without a key, masked logits being −∞?"""
    _, lse = finalised(0.0, -INFINITE, kind)
    masked, plain = -INFINITE - lse, 3.0 - lse
    p = [0.0 if x == -INFINITE else x if math.isnan(x) else math.inf for x in (masked, plain)]
    good = p == [0.0, 0.0]
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{kind}: LSE = {lse}; a masked logit gives exp({masked}) = {p[0]}, a logit of 3 "
        f"exp({plain}) = {p[1]}",
        counterexample="" if good else f"S = −∞, LSE = {lse}: S − LSE = {masked}, P = {p[0]}",
    )


def backward_sum(x: Floats, scale: float) -> tuple[float, float]:
    """Σ_j P'_j as the backward recomputes it in float32, and what the roundings of m·scale and L explain.

    Exponentials, logarithm and sums are correctly rounded, so that the reported error is the arguments'
    alone.

    Args:
        x: logits before scaling, float32 numbers.
    """
    single = np.float32
    log2e = math.log2(math.e)
    by = float(single(scale * log2e))
    top = float(x.max())
    p = single(np.exp2((x * by - float(single(top * by))).astype(single)))
    mass = float(single(p.astype(float).sum()))
    lse = float(single(float(single(top * float(single(scale)))) + float(single(math.log(mass)))))
    again = np.exp2((x * by - float(single(lse * float(single(log2e))))).astype(single).astype(float))
    explained = (abs(top * scale) + abs(lse)) * 2.0**-23 + 2.0**-22
    return float(again.sum()) - 1.0, explained


def backward_sums(
    *, grows: bool = True, rows: int = 40, powers: Sequence[int] = tuple(range(15)), n: int = 64
) -> ClaimFinding:
    """Is |Σ_j P'_j − 1| bounded by (|m·scale| + |L|)·2⁻²³ + 2⁻²², and does it grow with the logits' common
    part?

    Args:
        grows: False tests the bound without the part that grows.
    """
    rng = np.random.default_rng(26)
    scale = 1 / math.sqrt(80)
    constants, errors, ratios = [], [], []
    for power in powers:
        worst, ratio = 0.0, 0.0
        for _ in range(rows):
            x = (rng.standard_normal(n) * 8 + 2.0**power / scale).astype(np.float32).astype(float)
            delta, explained = backward_sum(x, scale)
            worst, ratio = max(worst, abs(delta)), max(ratio, abs(delta) / (explained if grows else 2.0**-19))
        constants.append(2.0**power)
        errors.append(worst)
        ratios.append(ratio)
    far = [i for i, power in enumerate(powers) if power >= 4]
    slope = float(np.polyfit(np.log([constants[i] for i in far]), np.log([errors[i] for i in far]), 1)[0])
    within = max(ratios) <= 1
    worst_at = int(np.argmax(ratios))
    return ClaimFinding(
        status="SUPPORTED" if within and 0.8 < slope < 1.2 else "REFUTED",
        evidence=f"{rows} rows of {n} float32 logits for each common part c = 1 … 2^{powers[-1]} (scaled): "
        f"|Σ P' − 1| from {errors[0]:.2g} to {errors[-1]:.2g}, as c^{slope:.2f} from c = 16 on; at most "
        f"{max(ratios):.2f} of the bound",
        table={"c": constants, "largest |Σ P' − 1|": errors, "over the bound": ratios},
        plots=(
            Plot(
                "Sum of the backward's probabilities",
                "line",
                {"c": constants, "largest |Σ P' − 1|": errors},
                "c",
                "largest |Σ P' − 1|",
                log=("c", "largest |Σ P' − 1|"),
            ),
        ),
        counterexample=(
            ""
            if within
            else f"common part c = {constants[worst_at]:g}: |Σ P' − 1| = {errors[worst_at]:.3g} against 2⁻¹⁹"
        ),
        seed=26,
    )


def _honest(mass: float, top: float, _kind: str) -> tuple[float, float]:
    return 1 / mass, top + math.log(mass)


CLAIMS: Final = (
    Claim(
        id="FA2-4a",
        subject="FlashAttention",
        title="merging parts of FlashAttention-2's kernel",
        statement="Parts of a row from FlashAttention-2's unsplit kernel (LSE = +∞ for a part without a key) "
        "can be merged by their log-sum-exp.",
        source=f"{_CODE}, normalize_softmax_lse; with the merge of arXiv 1805.02867",
        kind="exact",
        check=lambda _: merges("FA2"),
        control=lambda _: merges("FA2 split"),
        covers=("FA2-4",),
    ),
    Claim(
        id="FA2-4b",
        subject="FlashAttention",
        title="merging parts whose empty rows have LSE = −∞",
        statement="With O = 0 and LSE = −∞ for a part without a key (FlashAttention-2's split kernel, "
        "FlashAttention-3) parts merge to the exact attention, rows without any key to 0.",
        source=f"{_CODE}, finalize",
        kind="exact",
        check=lambda _: merges("FA3"),
        control=lambda _: merges("FA2"),
    ),
    Claim(
        id="FA2-4c",
        subject="FlashAttention",
        title="a NaN shows in the log-sum-exp",
        statement="A row with a NaN has NaN as its reported log-sum-exp.",
        source=f"{_CODE}; the expectation of who monitors LSE",
        kind="exact",
        check=lambda _: nan_is_seen(),
        control=lambda _: nan_is_seen(_honest),
    ),
    Claim(
        id="FA2-4d",
        subject="FlashAttention",
        title="LSE = +∞ makes the backward's P vanish",
        statement="In a row without a key P = exp(S − LSE) is 0 with LSE = +∞ (and NaN with −∞, where S = "
        "−∞).",
        source=f"{_CODE}, and the backward's recomputation",
        kind="exact",
        check=lambda _: blank_probability("FA2"),
        control=lambda _: blank_probability("FA3"),
    ),
    Claim(
        id="FA2-6",
        subject="FlashAttention",
        title="the backward's probabilities do not sum to 1",
        statement="Σ_j P'_j = 1 + δ with |δ| ≲ (|m·scale| + |L|)·2⁻²³: the error of the recomputed rows "
        "grows linearly with a constant added to the logits.",
        source=f"derived from {_CODE}; the backward's exp2(S·scale·log₂e − L·log₂e)",
        kind="search",
        check=lambda lab: backward_sums(rows=lab.choose(40, 400)),
        control=lambda _: backward_sums(grows=False, rows=10),
    ),
)
