"""The ones test: attention over V = 1 where the weights are rounded for the product but not for their sum.

Weights are known as numbers: P = e^(s − m) with the row's largest 1, in units that make sums exact rationals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.correct_rounding import BF16, FP16, FP32, Floats, Format, Rounded

__all__ = ["CLAIMS", "least_keys", "off_one", "rounded_sum", "within_a_roundoff", "worst_rounding"]

_SEED = 27
_Q = flint.fmpq


def _exactly(x: float) -> Any:
    numerator, denominator = float(x).as_integer_ratio()
    return _Q(numerator, denominator)


def off_one(weights: Sequence[float], counts: Sequence[int], form: Format) -> Any:
    """O − 1 = Σ fl(P)/ΣP − 1, exactly, of ``counts`` keys with each of the ``weights``."""
    rounded = form.rounded(np.array(weights))
    above = sum((c * _exactly(a) for a, c in zip(rounded, counts, strict=True)), _Q(0))
    return above / sum((c * _exactly(a) for a, c in zip(weights, counts, strict=True)), _Q(0)) - 1


def worst_rounding(form: Format, lowest: int) -> tuple[float, Any]:
    """The fp32 weight in [2^lowest, 1] with the largest relative rounding error, and that error (exact)."""
    ends = form.between(2.0**lowest, 1.0)
    middles = (ends[1:] + ends[:-1]) / 2
    # Next to a tie, the error is largest; which side of it is worse depends on the ends' sizes.
    near = np.concatenate(
        [middles, *(np.nextafter(middles.astype(np.float32), np.float32(x)) for x in (0, 2))]
    ).astype(np.float64)
    errors = np.abs(form.rounded(near) - near) / near
    worst = float(near[int(errors.argmax())])
    return worst, abs(_exactly(float(form.rounded(worst))) - _exactly(worst)) / _exactly(worst)


def least_keys(form: Format, exponent: int) -> int:
    """Keys with P = 2^exponent beside one with P = 1 that bring |O − 1| above u; 0 if 2^40 do not."""
    u = _Q(1, 2**form.precision)
    low, high = 1, 2**40
    weights = (1.0, 2.0**exponent)
    if abs(off_one(weights, (1, high), form)) <= u:
        return 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if abs(off_one(weights, (1, middle), form)) > u else (middle + 1, high)
    return low


def within_a_roundoff(formats: Sequence[Format], *, rescaled: bool = True) -> ClaimFinding:
    """Is |O − 1| ≤ u/(1 + u) for normal weights, and ≤ u whatever the weights?

    Args:
        formats: of the rounded weights.
        rescaled: False for the control: half of a row's sum is left in another unit (a factor of 2).
    """
    wrong, limits = "", []
    table: dict[str, list[Any]] = {"format": [], "worst relative rounding error": [], "u": []}
    for form in formats:
        u = _Q(1, 2**form.precision)
        at, error = worst_rounding(form, max(form.lowest, -20))
        if not rescaled:
            error = error + _Q(1, 2)
        # O − 1 is a mean of the weights' relative errors, weighted by P: it cannot exceed the largest.
        if error > u / (1 + u) and not wrong:
            wrong = f"{form.name}: P = {at!r}: relative error {error}"
        # The largest power of two that rounds to 0 (a tie, to even).
        least = least_keys(form, form.lowest - form.precision)
        if least:
            limits.append((form, form.lowest - form.precision, least))
        for column, entry in zip(table, (form.name, float(error), float(u)), strict=True):
            table[column].append(entry)
    told = "; ".join(
        f"{form.name}: {keys} keys with P = 2^{exponent}, which round to 0, beside one with P = 1 give |O − "
        "1| > u"
        for form, exponent, keys in limits
    )
    example = ""
    if limits:
        form, exponent, keys = limits[0]
        off = off_one((1.0, 2.0**exponent), (1, keys), form)
        example = (
            f"{form.name}: one key with P = 1 and {keys} with P = 2^{exponent} (a tie, rounded to 0), V = "
            "1.\n"
            f"Σ fl(P) = 1, ΣP = 1 + {keys}·2^{exponent}, so O − 1 = {off} = "
            f"{float(off.p) / float(off.q):.6g}.\n"
            f"|O − 1| > u = 2^-{form.precision} = {2.0**-form.precision:.6g}."
        )
    return ClaimFinding(
        status="REFUTED" if wrong else "CONDITIONAL" if limits else "HOLDS",
        evidence=f"next to every tie of {', '.join(form.name for form in formats)} between 2^-14 or less "
        "and 1 the relative "
        f"error of a normal weight is at most u/(1 + u), and O − 1 is a mean of those: "
        + ", ".join(f"{name} {value:.6g}" for name, value, _ in zip(*table.values(), strict=True))
        + (f"; weights below the smallest normal number need a condition: {told}" if told else "")
        + (f"; not so: {wrong}" if wrong else ""),
        table=table,
        counterexample=wrong or example,
    )


def approached(keys: int, form: Format = BF16, share: Any = 1) -> ClaimFinding:
    """How near to −u/(1 + u) does O − 1 come, with one key at P = 1 and the others just below a tie?"""
    tie = 0.5 * (1.0 + 2.0**-form.precision)
    # Just below the tie, in fp32: rounds down by almost half a unit.
    p = float(np.nextafter(np.float32(tie), np.float32(0)))
    off = off_one((1.0, p), (1, keys), form)
    limit = share * -_Q(1, 2**form.precision) / (1 + _Q(1, 2**form.precision))
    near = abs(off) <= abs(limit) and abs(off) >= abs(limit) * (1 - _Q(4, keys) - _Q(1, 1000))
    return ClaimFinding(
        status="HOLDS" if near else "REFUTED",
        evidence=f"{form.name}, {keys} keys with P = {p!r} beside one with P = 1: O − 1 = "
        f"{float(off.p) / float(off.q):.6g}, "
        f"exactly computed; −u/(1 + u) = {float(limit.p) / float(limit.q):.6g}",
        counterexample="" if near else f"O − 1 = {off}",
    )


def rounded_sum(rows: int, keys: int, *, of_rounded: bool = True) -> ClaimFinding:
    """O for ℓ summed from the rounded weights: fp32 accuracy? Gaussian logits, sums in fp32 in one order."""
    rng, r, worst = np.random.default_rng(_SEED), Rounded(FP32), {}
    for form in (BF16, FP16):
        x = rng.standard_normal((rows, keys))
        p: Floats = FP32.rounded(np.exp(x - x.max(axis=1, keepdims=True)))
        rounded = form.rounded(p)
        l, o = np.zeros(rows), np.zeros(rows)
        # The product's sum runs the other way, so that its roundings differ from those of ℓ.
        for j in range(keys):
            l = r.add(l, (rounded if of_rounded else p)[:, j])
            o = r.add(o, rounded[:, keys - 1 - j])
        worst[form.name] = float(np.abs(r.div(o, l) - 1.0).max())
    limit = 2.0 * keys * FP32.u
    over = {name: value for name, value in worst.items() if value > limit}
    return ClaimFinding(
        status="REFUTED" if over else "SUPPORTED",
        evidence=f"{rows} rows of {keys} Gaussian logits (seed {_SEED}), sums in fp32, every addition "
        "rounded, in opposite "
        "orders: largest |O − 1| "
        f"{', '.join(f'{value:.3g} for {name} weights' for name, value in worst.items())}; "
        f"the sums' own bound 2n·2^-24 = {limit:.3g}",
        counterexample="; ".join(f"{name}: |O − 1| = {value:.4g}" for name, value in over.items()),
        seed=_SEED,
    )


def _claim(name: str, title: str, statement: str, kind: str, check: Any, control: Any) -> Claim:
    return Claim(name, "exact oracles", title, statement, "derived", kind, check, control)


CLAIMS: Final = (
    _claim(
        "EXA-4a",
        "the ones test",
        "With V = 1, ℓ summed from weights P in fp32 and products with P rounded to a format of unit "
        "roundoff u (fp16 or "
        "bf16), the output differs from 1 by at most u.",
        "exact",
        lambda lab: within_a_roundoff((FP16, BF16)),
        lambda lab: within_a_roundoff((FP16, BF16), rescaled=False),
    ),
    _claim(
        "EXA-4b",
        "the ones test with bf16 weights",
        "For bf16 weights in the range of fp32's normal numbers |O − 1| ≤ u/(1 + u), which equal weights "
        "just below a tie "
        "approach: O − 1 → −2^-8/(1 + 2^-8) = −0.00389.",
        "exact",
        lambda lab: approached(lab.choose(1024, 65536)),
        lambda lab: approached(1024, share=2),
    ),
    _claim(
        "EXA-4c",
        "the ones test with a sum of rounded weights",
        "A kernel that sums ℓ from the rounded weights returns 1 to fp32 accuracy.",
        "search",
        lambda lab: rounded_sum(*lab.choose((8, 256), (64, 1024))),
        lambda lab: rounded_sum(8, 256, of_rounded=False),
    ),
)
