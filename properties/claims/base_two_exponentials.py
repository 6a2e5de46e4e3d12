"""Claims about e^x computed as 2^(x·log2 e) in fp32, as kernels do with ex2.approx."""

from __future__ import annotations

from typing import Any, Final

import flint
import numpy as np
import torch

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory, Plot
from attnproof.properties.claims.correct_rounding import FP32, Floats

__all__ = [
    "CLAIMS",
    "argument_errors",
    "constant_error",
    "instruction_error",
    "logits",
    "near_eighty",
    "within",
]

_U: Final = 2.0**-24
_BITS = 128
_LOG2E = 1.4426950408889634
_HIGH: Final = float(np.float32(_LOG2E))
_LOW: Final = float(np.float32(_LOG2E - _HIGH))
"""log2 e − _HIGH, to fp32."""


def constant_error() -> Any:
    """|fl32(log2 e)/log2 e − 1| in units of 2^-24, enclosed."""
    with _precision(_BITS):
        return abs(flint.arb(_HIGH) * flint.arb(2).log() - 1) / _U


def logits(samples: int) -> Floats:
    """fp32 numbers −x: evenly spaced in the binades 2^-6 to 2^6, and where the product is next to 2^k."""
    grids = [2.0**k * (1.0 + np.arange(samples) / samples) for k in range(-6, 7)]
    steps = np.arange(-64, 65)
    edges = [(2.0**k / _LOG2E) * (1.0 + steps * 2.0**-23) for k in range(-5, 7)]
    x = FP32.rounded(np.concatenate(grids + edges))
    return np.asarray(-x[x < 87.0])


def argument_errors(x: Floats, *, split: bool = False) -> Floats:
    """|2^t/e^x − 1| for t = fl(x·fl(log2 e)), in units of |x|·2^-24, exact to 1e-7 of them.

    Args:
        x: fp32 numbers, not 0.
        split: t = fma(x, c, fl(x·c')) with c + c' = log2 e to 48 bits.
    """
    # Products of two fp32 numbers are exact in float64.
    t = FP32.rounded(x * _HIGH + (FP32.rounded(x * _LOW) if split else 0.0))
    # The part of x·log2 e that float64 would lose is added apart.
    exact_high = x * _HIGH
    gap = (t - exact_high) - x * (_LOG2E - _HIGH)
    return np.asarray(np.abs(np.expm1(gap * np.log(2.0))) / (np.abs(x) * _U))


def within(samples: int, factor: float, *, split: bool = False) -> ClaimFinding:
    """Is the relative error of 2^t at most ``factor``·|x|·2^-24, t exact but for its roundings?"""
    x = logits(samples)
    errors = argument_errors(x, split=split)
    worst = int(errors.argmax())
    # One rounding of the product, and the constant's own error; a split constant has none to speak of.
    proved = 1.0 + (2.0**-20 if split else float(constant_error().upper()) + 2.0**-20)
    over = errors[worst] > factor
    return ClaimFinding(
        status="REFUTED" if over else "HOLDS" if proved <= factor else "SUPPORTED",
        evidence=f"the rounded constant is off by {float(constant_error().mid()):.6f}·2^-24 (enclosed), the "
        "product by at most "
        f"2^-24, so the error is at most {proved:.4f}·|x|·2^-24 for −87 < x ≤ −2^-6; over {len(x)} numbers "
        "there, "
        f"next to the products' powers of two included, it reaches {errors[worst]:.4f}·|x|·2^-24 at x = "
        f"{float(x[worst])!r}",
        counterexample=f"x = {float(x[worst])!r}: relative error {errors[worst]:.6f}·|x|·2^-24"
        if over
        else "",
        plots=(
            Plot(
                "Relative error of 2^(x·log2 e), exact but for the argument",
                "scatter",
                {
                    "−x": (-x[:: max(1, len(x) // 300)]).tolist(),
                    "units of |x|·2^-24": errors[:: max(1, len(x) // 300)].tolist(),
                },
                "−x",
                "units of |x|·2^-24",
                log=("−x",),
            ),
        ),
    )


def near_eighty(*, least: float, most: float = np.inf) -> ClaimFinding:
    """Is the largest error at all fp32 numbers from −81 to −79 between ``least`` and ``most``?"""
    # From 64 to 128 fp32 numbers are 2^-17 apart.
    x = -np.arange(79.0, 81.0, 2.0**-17)
    errors = argument_errors(x) * np.abs(x) * _U
    worst = int(errors.argmax())
    found = float(errors[worst])
    fine = least <= found <= most
    place = float(x[worst])
    return ClaimFinding(
        status="HOLDS" if fine else "REFUTED",
        evidence=f"all {len(x)} fp32 numbers in (−81, −79]: the largest relative error from the argument is "
        f"{found:.4g}, at "
        f"x = {place!r}; the two ulps of ex2.approx are {2.0**-22:.3g}",
        counterexample=""
        if fine
        else f"−81 < x ≤ −79, t = x·log2 e in (−128, −64): fl(t) is off by at most 2^-18.\n"
        f"The constant fl(log2 e) = {_HIGH!r} is off by {float(constant_error().mid()):.4f}·2^-24, "
        "relatively.\n"
        f"ln 2·2^-18 + 81·{float(constant_error().mid()):.4f}·2^-24 = "
        f"{np.log(2) * 2.0**-18 + 81 * float(constant_error().mid()) * _U:.4g}; largest found {found:.4g}, "
        f"at {place!r}.\n"
        f"Claimed: at least {least:.3g}.",
    )


def instruction_error(lab: Laboratory, samples: int, factor: float = 2.0) -> ClaimFinding:
    """e^x by the emulator's ex2.approx.ftz.f32 against ``factor``·|x|·2^-24 and the instruction's 2 ulps."""
    x = logits(samples)
    t = torch.from_numpy(FP32.rounded(x * _HIGH)).float()
    computed = lab.instruction("ex2.approx.ftz.f32")(t).double().numpy()
    due = np.exp(x)
    errors = np.abs(computed / due - 1.0)
    limits = factor * np.abs(x) * _U + 2.0 * 2.0**-23
    worst = int((errors / limits).argmax())
    over = errors[worst] > limits[worst]
    return ClaimFinding(
        status="REFUTED" if over else "SUPPORTED",
        evidence=f"{len(x)} numbers −87 < x ≤ −2^-6 through the emulator's model of ex2.approx.ftz.f32: "
        "largest error by "
        f"{factor:g}·|x|·2^-24 + 2·2^-23 is {errors[worst] / limits[worst]:.3f}, at x = "
        f"{float(x[worst])!r}; largest error "
        f"{errors.max():.3g}",
        counterexample=f"x = {float(x[worst])!r}: relative error {errors[worst]:.4g} > {limits[worst]:.4g}"
        if over
        else "",
    )


def _claim(name: str, title: str, statement: str, kind: str, check: Any, control: Any) -> Claim:
    return Claim(
        name,
        "hardware",
        title,
        statement,
        "derived; bounds of ex2.approx from the PTX ISA",
        kind,
        check,
        control,
    )


CLAIMS: Final = (
    _claim(
        "HW-2a",
        "e^x by a power of two",
        "Rounding the constant and the product of 2^(x·log2 e) gives e^x a relative error of at most "
        "2|x|·2^-24.",
        "enclosure",
        lambda lab: within(lab.choose(2000, 50000), 2.0),
        lambda lab: within(2000, 1.0),
    ),
    _claim(
        "HW-2b",
        "with a split constant",
        "With log2 e split in two numbers and a fused multiply-add the error is at most |x|·2^-24 (but for "
        "terms 2^-20 "
        "times smaller).",
        "enclosure",
        lambda lab: within(lab.choose(2000, 50000), 1.0 + 2.0**-20, split=True),
        lambda lab: within(2000, 1.0 + 2.0**-20),
    ),
    _claim(
        "HW-2c",
        "the error at x = −80",
        "At x = −80 the argument's roundings give a relative error of about 1e-5 (5e-6 at least).",
        "enclosure",
        lambda lab: near_eighty(least=5e-6),
        lambda lab: near_eighty(least=2e-6),
    ),
    _claim(
        "HW-2d",
        "the argument's error against ex2's own",
        "At x = −80 the argument's error is larger than the two ulps of ex2.approx, by more than ten times.",
        "enclosure",
        lambda lab: near_eighty(least=10 * 2.0**-22),
        lambda lab: near_eighty(least=20 * 2.0**-22),
    ),
    _claim(
        "HW-2e",
        "e^x by ex2.approx",
        "e^x by ex2.approx.ftz.f32 has a relative error of at most 2|x|·2^-24 and the instruction's 2 ulps.",
        "search",
        lambda lab: instruction_error(lab, lab.choose(500, 20000)),
        lambda lab: instruction_error(lab, 500, 0.0),
    ),
)
