"""σ by the hardware's tanh, ½ + ½·tanh.approx(x/2), where σ is small: at the bias −log n.

tanh.approx.f32 has a relative error of up to 2⁻¹¹ (PTX ISA), near −1 an absolute one. The code of
apple/ml-sigmoid-attention takes it. SIG-11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Final

import torch

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.sigmoid import LENGTHS, SUBJECT

__all__ = ["CLAIMS", "absolute_error", "allowed", "exponential", "first_zero", "rounded_tanh", "tanh_form"]

_DOCUMENTED = Fraction(1, 2**11)
# More than the rounding of a bfloat16 output, 0.4 %.
_TOO_MUCH = 0.01


def rounded_tanh(x: torch.Tensor, digits: int = 11) -> torch.Tensor:
    """tanh in float64 (any shape), rounded to ``digits`` binary digits.

    With 11 digits it is within PTX's bound 2⁻¹¹ of tanh.approx.f32, and near ±1 within half of it.
    """
    mantissa, exponent = torch.frexp(torch.tanh(x.double()))
    scale = 2.0**digits
    return torch.ldexp(torch.round(mantissa * scale) / scale, exponent)


def allowed(n: int) -> Fraction:
    """The relative error of σ(−log n) = 1/(n + 1) that the documented bound of tanh allows: (n − 1)/4096.

    |tanh(−½ log n)| = (n − 1)/(n + 1), of which σ takes half of 2⁻¹¹.
    """
    return _DOCUMENTED / 2 * Fraction(n - 1, n + 1) * (n + 1)


def first_zero() -> int:
    """The smallest n at which the documented bound allows σ(−log n) = 0 or less."""
    return next(n for n in range(2, 2**14) if allowed(n) >= 1)


def exponential(n: int) -> float:
    """Bound of the relative error of 1/(1 + e^−x) at x = −log n in float32, by the contract's default.

    The exponential errs by 2 ulp of 2⁻²³ and 2|x|·2⁻²⁴ for its argument, of which 1 − σ enters; the sum and
    the quotient round once each.
    """
    return n / (n + 1) * (2.0**-22 + 2.0 * math.log(n) * 2.0**-24) + 2.0 * 2.0**-24


def _sigma(tanh: Callable[[torch.Tensor], torch.Tensor], n: torch.Tensor) -> torch.Tensor:
    """½ + ½·tanh(x/2) in float64 at x = −log n held in float32; ``n`` int64."""
    x = (-n.double().log()).float()
    return 0.5 + 0.5 * tanh(0.5 * x).double()


def tanh_form(
    lengths: Sequence[int] = LENGTHS,
    tanh: Callable[[torch.Tensor], torch.Tensor] = rounded_tanh,
    name: str = "a tanh rounded to 11 digits",
) -> ClaimFinding:
    """Is σ by tanh.approx as accurate at −log n as σ by the exponential?

    Args:
        lengths: N, for the table; all n up to the last are tried.
        tanh: what is taken for tanh.approx.f32, of float32 tensors; name: what it is.
    """
    dense = torch.arange(2, lengths[-1] + 1)
    sigma = _sigma(tanh, dense)
    errors = (sigma * (dense + 1) - 1.0).abs()
    worst = [float(errors[: n - 1].max()) for n in lengths]
    correct = (_sigma(lambda x: rounded_tanh(x, 24), dense) * (dense + 1) - 1.0).abs()
    table: dict[str, list[Any]] = {
        "n": list(lengths),
        "allowed by the bound of tanh.approx": [float(allowed(n)) for n in lengths],
        f"{name}, largest up to n": worst,
        f"{name}, at n": [float(errors[n - 2]) for n in lengths],
        "tanh correctly rounded in float32, largest up to n": [
            float(correct[: n - 1].max()) for n in lengths
        ],
        "bound of the exponential form": [exponential(n) for n in lengths],
    }
    far, lost = dense[~(errors <= _TOO_MUCH)], dense[sigma <= 0]
    shown = [n for n in (64, 256, 1024, 4096, 16384) if n in lengths]
    evidence = (
        "relative error of σ that the documented bound allows, (n − 1)/4096: "
        + ", ".join(f"{float(allowed(n)):.2%} at n = {n}" for n in shown)
        + f"; σ ≤ 0 from n = {first_zero()}. With {name} it is up to {worst[-1]:.3g} over n ≤ {lengths[-1]}"
        + (f", first above 1 % at n = {int(far[0])}" if len(far) else "")
        + (f", and σ = 0 first at n = {int(lost[0])}" if len(lost) else "")
        + f". A tanh correctly rounded in float32 gives up to {float(correct.max()):.1g}, the exponential "
        f"form at most {exponential(lengths[-1]):.1g}"
    )
    if len(far):
        status = "REFUTED"
    else:
        status = "CONDITIONAL" if allowed(lengths[-1]) > _TOO_MUCH else "HOLDS"
    return ClaimFinding(
        status=status,
        evidence=evidence,
        table=table,
        counterexample=_lost(tanh, far, lengths[-1], name, status),
    )


def _lost(
    tanh: Callable[[torch.Tensor], torch.Tensor], far: torch.Tensor, last: int, name: str, status: str
) -> str:
    """The first n at which σ is more than 1 % off, or, where none is, what the documented bound allows."""
    if not len(far):
        allowance = (
            f"n = {last}: a tanh within its documented bound may be {float(allowed(last)):.2%} off in σ"
        )
        return allowance if status == "CONDITIONAL" else ""
    n = int(far[0])
    x = 0.5 * (-torch.tensor([n]).double().log()).float()
    t = float(tanh(x))
    return (
        f"n = {n}: x = −log n, x/2 = {float(x)!r} in float32, {name} there {t!r}\n"
        f"½ + ½·({t!r}) = {0.5 + 0.5 * t!r}, for 1/(n + 1) = {1 / (n + 1):.9g}: "
        f"{(0.5 + 0.5 * t) * (n + 1) - 1:+.3%}"
    )


def absolute_error(
    count: int = 20_001,
    tanh: Callable[[torch.Tensor], torch.Tensor] = rounded_tanh,
    name: str = "a tanh rounded to 11 digits",
) -> ClaimFinding:
    """Is σ by tanh.approx within 2⁻¹² of the truth, on ``count`` numbers of [−12, 12]?

    Args:
        count: evenly spaced numbers; tanh: of float32 tensors, taken for tanh.approx.f32; name: what it is.
    """
    x = torch.linspace(-12.0, 12.0, count)
    # 2⁻⁵⁰ covers the float64 sigmoid and the sums here.
    apart = (0.5 + 0.5 * tanh(0.5 * x).double() - torch.sigmoid(x.double())).abs()
    place, limit = int(apart.argmax()), 2.0**-12 + 2.0**-50
    relative = (tanh(x).double() / torch.tanh(x.double()) - 1).nan_to_num().abs().max()
    beyond = not float(apart[place]) <= limit
    return ClaimFinding(
        status="REFUTED" if beyond else "SUPPORTED",
        evidence=f"{count} numbers of [−12, 12], {name}: σ off by up to "
        f"{float(apart[place]) * 2**12:.4f}·2⁻¹², at x = {float(x[place]):.6g}; tanh itself by up to "
        f"{float(relative) * 2**11:.4f}·2⁻¹¹ relatively",
        counterexample=f"x = {float(x[place])!r}: σ off by {float(apart[place]):.4g}, above 2⁻¹²"
        if beyond
        else "",
    )


_HARDWARE: Final = "tanh.approx.f32"
_MODEL: Final = f"the emulator's {_HARDWARE}"
_SOURCE: Final = f"PTX ISA, {_HARDWARE}; code of apple/ml-sigmoid-attention"

CLAIMS: Final = (
    Claim(
        id="SIG-11a",
        subject=SUBJECT,
        title="σ by tanh.approx at −log n",
        statement="σ(x) = ½ + ½·tanh.approx(x/2) keeps σ(−log n) to a relative error of 1 %, as a σ by the "
        "exponential does.",
        source=_SOURCE,
        kind="measurement",
        check=lambda lab: tanh_form(tanh=lab.instruction(_HARDWARE), name=_MODEL),
        # tanh in float64: right at every n; only the documented bound would allow errors.
        control=lambda lab: tanh_form(LENGTHS[:6], lambda x: torch.tanh(x.double()), "tanh in float64"),
        covers=("SIG-11",),
    ),
    Claim(
        id="SIG-11b",
        subject=SUBJECT,
        title="absolute error of σ by tanh.approx",
        statement="A relative error of 2⁻¹¹ in tanh is an absolute error of at most 2⁻¹² in σ.",
        source=_SOURCE,
        kind="measurement",
        check=lambda lab: absolute_error(lab.choose(20_001, 2_000_001), lab.instruction(_HARDWARE), _MODEL),
        control=lambda lab: absolute_error(2001, lambda x: rounded_tanh(x, 8), "a tanh rounded to 8 digits"),
    ),
)
