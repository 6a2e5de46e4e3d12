"""Does an enclosure, or a ball, contain a given multiprecision number? Decided without any rounding."""

from __future__ import annotations

from typing import Any

import flint
import numpy as np
import numpy.typing as npt
import torch

from attnproof.properties.arithmetic import Enclosure

# Differences of doubles and of multiprecision numbers of a few hundred bits are exact at this precision:
# their exponents lie within ±2200 wherever a float64 radius is finite.
EXACT_BITS = 8192


def ball_contains(ball: npt.NDArray[np.object_], number: npt.NDArray[np.object_]) -> torch.Tensor:
    """Whether each Arb ball contains the mpmath number in its place (bool, the arrays' shape)."""
    pairs = zip(ball.ravel(), number.ravel(), strict=True)
    answers = [b.contains(flint.arb(x)) if b.is_finite() else True for b, x in pairs]
    return torch.tensor(answers, dtype=torch.bool).reshape(ball.shape)


def enclosure_contains(
    enclosure: Enclosure, number: npt.NDArray[np.object_], slack: float = 0.0
) -> torch.Tensor:
    """Whether |number − value| ≤ radius + slack in each place (bool, the enclosure's shape).

    Args:
        enclosure: what is claimed.
        number: mpmath numbers, the enclosure's shape.
        slack: what the numbers themselves may be off by.
    """
    assert tuple(enclosure.value.shape) == tuple(enclosure.radius.shape) == number.shape
    values, radii = enclosure.value.flatten().tolist(), enclosure.radius.flatten().tolist()
    before = flint.ctx.prec
    flint.ctx.prec = EXACT_BITS
    try:
        answers = [_holds(v, r, slack, x) for v, r, x in zip(values, radii, number.ravel(), strict=True)]
    finally:
        flint.ctx.prec = before
    return torch.tensor(answers, dtype=torch.bool).reshape(number.shape)


def _holds(value: float, radius: float, slack: float, number: Any) -> bool:
    if np.isnan(value) or np.isnan(radius) or radius < 0:
        return False
    if np.isinf(radius):
        return True
    if np.isinf(value):
        return bool(number == value)
    distance = abs(flint.arb(number) - flint.arb(value))
    bound = flint.arb(radius) + flint.arb(slack)
    inside = bool(distance <= bound)
    # Beside an e^−10^300 an ordinary number leaves no exact difference; the answer must be certain still.
    assert distance.is_exact() or inside or distance > bound
    return inside


def widest_ulps(enclosure: Enclosure) -> float:
    """The largest radius in units in the last place of its value."""
    ulp = (
        torch.nextafter(enclosure.value.abs(), torch.tensor(torch.inf, dtype=torch.float64))
        - enclosure.value.abs()
    )
    return float((enclosure.radius / ulp).max())
