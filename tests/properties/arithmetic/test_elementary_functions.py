"""torch's float64 exp, expm1, log, sqrt and tanh stay within the two ulps that the enclosures allow.

Held against Arb on 60,000 samples of each regime below, 600,000 in all, in the vectorised path (long
contiguous tensors) and in the scalar one (what is left over at the end, and strided tensors).
"""

from __future__ import annotations

from collections.abc import Callable

import flint
import numpy as np
import numpy.typing as npt
import pytest
import torch

from attnproof.properties.arithmetic.enclosures import ELEMENTARY_ULPS, SMALLEST_NORMAL

Draw = Callable[[torch.Generator], torch.Tensor]
SAMPLES = 60_003
BITS = 120


def uniform(low: float, high: float) -> Draw:
    return lambda random: low + (high - low) * torch.rand(SAMPLES, generator=random, dtype=torch.float64)


def powers(low: int, high: int, *, signed: bool) -> Draw:
    def draw(random: torch.Generator) -> torch.Tensor:
        mantissas = 1.0 + torch.rand(SAMPLES, generator=random, dtype=torch.float64)
        signs = 2.0 * torch.randint(0, 2, (SAMPLES,), generator=random) - 1.0 if signed else 1.0
        return torch.ldexp(mantissas * signs, torch.randint(low, high, (SAMPLES,), generator=random))

    return draw


CASES = [
    pytest.param(torch.exp, flint.arb.exp, uniform(-745.2, 709.78), id="exp-everywhere"),
    pytest.param(torch.exp, flint.arb.exp, powers(-60, 6, signed=True), id="exp-about-0"),
    pytest.param(torch.exp, flint.arb.exp, uniform(-746.0, -707.0), id="exp-subnormal"),
    pytest.param(torch.expm1, flint.arb.expm1, powers(-60, 9, signed=False), id="expm1"),
    pytest.param(torch.log, flint.arb.log, powers(-1070, 1023, signed=False), id="log-everywhere"),
    pytest.param(torch.log, flint.arb.log, uniform(0.5, 2.0), id="log-about-1"),
    pytest.param(torch.tanh, flint.arb.tanh, powers(-60, 5, signed=True), id="tanh-everywhere"),
    pytest.param(torch.tanh, flint.arb.tanh, uniform(-3.0, 3.0), id="tanh-about-1"),
    pytest.param(torch.sqrt, flint.arb.sqrt, powers(-1074, 1023, signed=False), id="sqrt-everywhere"),
    pytest.param(torch.sqrt, flint.arb.sqrt, uniform(0.25, 4.0), id="sqrt-about-1"),
]


def errors(
    computed: torch.Tensor, exact: list[flint.arb]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The distances |computed − exact|, absolutely and in ulps of the exact result."""
    before = flint.ctx.prec
    flint.ctx.prec = BITS
    try:
        distances = [abs(x - c).mid() for x, c in zip(exact, computed.tolist(), strict=True)]
        nearest = np.abs(np.array([float(x.mid()) for x in exact]))
        steps = np.spacing(np.maximum(nearest, SMALLEST_NORMAL)).tolist()
        ulps = np.array([float((d / step).mid()) for d, step in zip(distances, steps, strict=True)])
    finally:
        flint.ctx.prec = before
    return np.array([float(d) for d in distances]), ulps


@pytest.mark.parametrize(("compute", "exactly", "draw"), CASES)
def test_torch_errs_by_less_than_two_ulps(
    compute: Callable[[torch.Tensor], torch.Tensor], exactly: Callable[[flint.arb], flint.arb], draw: Draw
) -> None:
    numbers = draw(torch.Generator().manual_seed(1))
    before = flint.ctx.prec
    flint.ctx.prec = BITS
    try:
        exact = [exactly(x) for x in map(flint.arb, numbers.tolist())]
    finally:
        flint.ctx.prec = before
    strided = torch.stack([numbers, numbers], dim=1)[:, 0]
    assert not strided.is_contiguous()
    for argument in (numbers, strided):
        computed = compute(argument)
        finite = torch.isfinite(computed).numpy()
        absolute, ulps = errors(torch.nan_to_num(computed, posinf=0.0), exact)
        normal = finite & np.array([abs(float(x.mid())) >= SMALLEST_NORMAL for x in exact])
        assert normal.sum() > SAMPLES // 30
        assert float(ulps[normal].max()) <= ELEMENTARY_ULPS
        # Below the smallest normal number only an absolute error is claimed: a flush to 0 is allowed for.
        assert float(absolute[finite & ~normal].max(initial=0.0)) <= SMALLEST_NORMAL


def test_the_measure_sees_an_error_of_three_ulps() -> None:
    numbers = uniform(-5.0, 5.0)(torch.Generator().manual_seed(2))[:1000]
    computed = torch.exp(numbers)
    wrong = computed * (1.0 + 4 * 2.0**-52)
    exact = [flint.arb(x).exp() for x in numbers.tolist()]
    assert float(errors(computed, exact)[1].max()) <= ELEMENTARY_ULPS
    assert float(errors(wrong, exact)[1].max()) > ELEMENTARY_ULPS
