"""attnproof.reference: certified to what is asked, with errors that name the argument."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import attnproof
from attnproof.properties.contract import ContractError
from attnproof.properties.families import FAMILIES
from attnproof.properties.oracle import CertificationError, certify, reference


def qkv(m: int = 5, n: int = 9, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(1, 2, length, 8, generator=generator) * factor).to(dtype)
        for length, factor in ((m, scale), (n, scale), (n, 1.0))
    ]


def test_one_output_is_an_enclosure_and_several_are_a_tuple() -> None:
    q, k, v = qkv()
    o = attnproof.reference("softmax", q, k, v, scale=0.3)
    assert isinstance(o, attnproof.Enclosure)
    assert o.value.shape == o.radius.shape == (1, 2, 5, 8)
    assert o.value.dtype == o.radius.dtype == torch.float64
    both = attnproof.reference("softmax", q, k, v, scale=0.3, return_lse=True)
    assert isinstance(both, tuple)
    assert both[1].value.shape == (1, 2, 5)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e9, 1e18])
def test_auto_certifies_to_two_to_the_minus_forty_of_the_gauge(scale: float) -> None:
    q, k, v = qkv(scale=scale)
    o = reference("softmax", q, k, v, scale=0.3)
    assert isinstance(o, attnproof.Enclosure)
    float64 = reference("softmax", q, k, v, scale=0.3, arithmetic="float64")
    mpmath = reference("softmax", q, k, v, scale=0.3, arithmetic="mpmath")
    assert isinstance(float64, attnproof.Enclosure)
    assert isinstance(mpmath, attnproof.Enclosure)
    assert bool((o.radius <= 2.0**-40 * v.abs().max()).all())
    assert bool(((o.value - mpmath.value).abs() <= o.radius + mpmath.radius).all())
    if scale >= 1e9:
        assert bool((float64.radius > o.radius).any()), "float64 alone must not have sufficed here"


def test_only_the_rows_that_need_it_escalate() -> None:
    q, k, v = qkv(m=6)
    q[0, 0, 2] *= 1e12
    problem = FAMILIES["softmax"].problem(q, k, v, scale=0.3)
    found = certify(problem, lambda found: {"o": torch.full((1, 2, 6, 8), 1e-11, dtype=torch.float64)})
    assert found.arithmetic["float64"] == 11
    assert sum(count for name, count in found.arithmetic.items() if name.startswith("arb")) == 1


def test_a_relative_tolerance_is_met_where_values_cancel() -> None:
    q = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    k = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    v = torch.tensor([1e15, 1.0, -1e15], dtype=torch.float64).reshape(1, 1, 3, 1)
    loose = reference("softmax", q, k, v, scale=1.0)
    tight = reference("softmax", q, k, v, scale=1.0, tolerance=2.0**-50)
    assert isinstance(loose, attnproof.Enclosure)
    assert isinstance(tight, attnproof.Enclosure)
    assert float(loose.radius) > 1e-3
    assert float(tight.radius) <= 2.0**-50 / 3.0 * 1.01
    assert abs(Fraction(float(tight.value)) - Fraction(1, 3)) <= Fraction(float(tight.radius))


def test_an_absolute_tolerance_is_met() -> None:
    q, k, v = qkv()
    o = reference("softmax", q, k, v, scale=0.3, tolerance={"absolute": 1e-15})
    assert isinstance(o, attnproof.Enclosure)
    assert float(o.radius.max()) <= 1e-15


def test_what_float64_cannot_carry_is_refused_or_reported() -> None:
    q, k, v = qkv()
    with pytest.raises(ContractError, match=r"tolerance=1e-20 is below 2\*\*-52"):
        reference("softmax", q, k, v, scale=0.3, tolerance=1e-20)
    with pytest.raises(CertificationError, match="could not be certified"):
        reference("softmax", q, k, v, scale=0.3, tolerance={"absolute": 1e-40})


def test_rows_that_see_a_nan_are_unknown_and_others_are_not() -> None:
    q, k, v = qkv()
    v[0, 0, 8, 3] = math.nan
    o = reference("softmax", q, k, v, scale=0.3, window=(None, 2))
    assert isinstance(o, attnproof.Enclosure)
    seeing = torch.tensor([i + 9 - 5 + 2 >= 8 for i in range(5)])
    assert bool(o.value[0, 0, seeing].isnan().all())
    assert bool((o.radius[0, 0, seeing] == math.inf).all())
    assert bool(o.value[0, 0, ~seeing].isfinite().all())
    assert bool(o.value[0, 1].isfinite().all())


def test_empty_rows_and_sizes() -> None:
    q, k, v = qkv(m=5, n=3)
    o, lse = reference("softmax", q, k, v, scale=0.3, causal=True, return_lse=True)  # type: ignore[misc]
    assert bool((o.value[..., :2, :] == 0).all())
    assert bool((o.radius[..., :2, :] == 0).all())
    assert bool((lse.value[..., :2] == -math.inf).all())
    none = reference("softmax", q[..., :0, :], k, v, scale=0.3)
    assert isinstance(none, attnproof.Enclosure)
    assert none.value.shape == (1, 2, 0, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": "sofmax"}, ("sofmax", "softmax")),
        ({"q": torch.zeros(2, 3)}, ("q has shape (2, 3)", "4 axes")),
        ({"k": torch.zeros(1, 2, 9, 7)}, ("(1, 2, 9, 7)",)),
        ({"v": torch.zeros(1, 2, 8, 8)}, ("k has shape (1, 2, 9, 8) and v (1, 2, 8, 8)",)),
        ({"q": torch.zeros(1, 3, 5, 8)}, ("H must be a multiple of G",)),
        ({"q": torch.zeros(1, 2, 5, 8, dtype=torch.int64)}, ("q has dtype torch.int64",)),
        ({"q": torch.zeros(1, 2, 5, 8, dtype=torch.float16)}, ("one dtype",)),
        ({"scale": None}, ("scale",)),
        ({"scale": math.nan}, ("scale=nan", "finite")),
        ({"window": 3}, ("window=3", "(left, right)")),
        ({"window": (1.5, 2)}, ("window=(1.5, 2)",)),
        ({"softcap": 0.0}, ("softcap=0.0", "positive")),
        ({"bias": torch.zeros(3, 4)}, ("bias has shape (3, 4)", "(1, 2, 5, 9)")),
        ({"sinks": torch.zeros(3)}, ("sinks has shape (3,)", "(2,)")),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, ("cu_seqlens", "M = N")),
        ({"causal_alignment": "left"}, ("causal_alignment='left'",)),
        ({"dropout": 0.1}, ("no option 'dropout'",)),
        ({"arithmetic": "double"}, ("arithmetic='double'", "mpmath")),
        ({"tolerance": -1.0}, ("tolerance", "positive")),
    ],
)
def test_errors_name_the_argument_and_the_rule(change: dict[str, object], words: tuple[str, ...]) -> None:
    q, k, v = qkv()
    call: dict[str, object] = {"family": "softmax", "q": q, "k": k, "v": v, "scale": 0.3, **change}
    family, tensors = call.pop("family"), [call.pop(name) for name in "qkv"]
    with pytest.raises(ContractError) as raised:
        reference(family, *tensors, **call)  # type: ignore[arg-type]
    assert all(word in str(raised.value) for word in words), str(raised.value)
