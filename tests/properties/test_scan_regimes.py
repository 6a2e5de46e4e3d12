"""Regimes of state spaces, selective scans and prefix scans: their inputs are what the regimes say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnproof.properties.case import Case, make_inputs
from attnproof.properties.regimes import REGIMES
from attnproof.properties.signatures import SIGNATURES

SIZES = {"B": 2, "H": 4, "G": 2, "N": 40, "D": 6, "E": 3, "T": 3, "P": 6}
STEPPED = ("selective_scan", "ssd")


def made(family: str, regime: str, dtype: str = "float32", **options: Any) -> dict[str, torch.Tensor]:
    """Tensors of a case in float64, those that are passed by keyword included."""
    shape = {symbol: SIZES[symbol] for symbol in SIGNATURES[family].symbols}
    inputs = make_inputs(Case(family, dtype, shape, regime, options))  # type: ignore[arg-type]
    named = {**inputs.tensors, **inputs.options}
    return {name: x.double() for name, x in named.items() if isinstance(x, torch.Tensor)}


def poles(regime: str, dtype: str = "float64", **options: Any) -> torch.Tensor:
    """The poles of a state space, (H, D) complex or real."""
    a = made("ssm", regime, dtype, **options)["a"]
    return torch.view_as_complex(a) if options.get("complex") else a


@pytest.mark.parametrize("paired", [{}, {"complex": True}], ids=["real", "complex"])
def test_poles_lie_where_the_regime_says(paired: dict[str, bool]) -> None:
    assert (poles("normal", **paired).abs() < 1).all()
    assert (poles("open-gates", **paired).abs() == 1).all(), "exactly, not almost"
    assert (poles("closed-gates", **paired) == 0).all()
    slow = poles("slow-decay", **paired).abs()
    assert torch.allclose(slow[:, 0], 1 - 2.0 ** -(5.0 + torch.arange(4, dtype=torch.float64)))
    strong = poles("strong-decay", **paired).abs()
    assert (strong**40).min() < 2.0**-149
    fast = poles("fast-oscillation", **paired)
    angle = fast.angle().abs() if paired else torch.where(fast < 0, math.pi, 0.0)
    assert (math.pi - angle < 2.0**-7).all()


def test_unit_poles_turn_by_quarters() -> None:
    a = made("ssm", "open-gates", complex=True)["a"][0]
    assert a[:4].tolist() == [[1, 0], [0, 1], [-1, 0], [0, -1]]


@pytest.mark.parametrize("softplus", [{}, {"delta_softplus": True}], ids=["as-it-is", "softplus"])
def test_steps_are_not_negative_and_of_the_size_that_the_regime_says(softplus: dict[str, bool]) -> None:
    def steps(regime: str) -> torch.Tensor:
        delta = made("selective_scan", regime, "float64", **softplus)["delta"]
        return torch.nn.functional.softplus(delta, threshold=300.0) if softplus else delta

    for regime in ("normal", "strong-decay", "small-steps", "no-steps"):
        assert (steps(regime) >= 0).all(), regime
    assert 0.01 < float(steps("normal").median()) < 0.2
    assert 1e-6 * 0.99 < float(steps("small-steps").min()) < float(steps("small-steps").max()) < 1.01e-3
    assert float(steps("strong-decay").max()) > 50


def test_steps_of_zero_are_exactly_zero() -> None:
    for family, name in (("selective_scan", "delta"), ("ssd", "dt")):
        delta = made(family, "no-steps")[name]
        assert ((delta == 0).sum(-1) == 26).all()


@pytest.mark.parametrize("family", STEPPED)
def test_rates_are_not_positive(family: str) -> None:
    for regime in REGIMES.values():
        if family in regime.families and not regime.needs:
            assert (made(family, regime.name)["A"] <= 0).all(), regime.name
    assert (made(family, "open-gates")["A"] == 0).all()


def test_the_tails_of_softplus_and_silu_are_reached() -> None:
    delta = made("selective_scan", "softplus-tails", delta_softplus=True)["delta"]
    assert delta.min() < -88
    assert delta.max() > 88
    z = made("selective_scan", "saturated-gates", z=True)["z"]
    assert z.min() < -17
    assert z.max() > 17


def exponents(family: str, regime: str, dtype: str = "float64") -> torch.Tensor:
    """The exponents of each position: of prefix attention scaled logits, of RWKV-4 keys."""
    shape = {symbol: SIZES[symbol] for symbol in SIGNATURES[family].symbols}
    inputs = make_inputs(Case(family, dtype, shape, regime))  # type: ignore[arg-type]
    k = inputs.tensors["k"].double()
    if family == "rwkv4":
        return k
    scale: float = inputs.options["scale"]
    return scale * (inputs.tensors["q"].double()[:, None] * k).sum(-1)


@pytest.mark.parametrize("family", ["prefix_scan", "rwkv4"])
def test_maxima_rise_fall_or_stay(family: str) -> None:
    assert (exponents(family, "rising-maxima").diff(dim=-1) > 0).all()
    assert (exponents(family, "falling-maxima").diff(dim=-1) < 0).all()
    equal = exponents(family, "equal-maxima", "float16")
    assert (equal == equal[..., :1]).all()
    wide = exponents(family, "wide-maxima")
    assert wide.min() < -104
    assert wide.max() > 89
    if family == "rwkv4":
        assert (made(family, "rising-maxima")["w"] == 0).all()
        assert (made(family, "strong-decay")["w"] == -1000).all()


@pytest.mark.parametrize("family", ["ssm", "h3", "selective_scan", "ssd", "prefix_scan", "rwkv4"])
def test_what_is_not_finite_is_where_the_regime_says(family: str) -> None:
    name = SIGNATURES[family].values
    last = made(family, "future-nonfinite")[name]
    assert last[:, :, :-1].isfinite().all()
    assert last[:, :, -1].isnan().all()
    middle = made(family, "past-nonfinite")[name]
    assert middle[:, :, SIZES["N"] // 2].isnan().all()
