"""Tensor cores, approximate instructions and orders of sums, against other arithmetic and by hand."""

from __future__ import annotations

from fractions import Fraction

import flint
import numpy as np
import pytest
import torch

from attnproof.properties.claims import hardware, reduction_order, tensor_core_sums, tensor_cores
from attnproof.properties.claims.base import Laboratory
from attnproof.properties.claims.tensor_cores import AMPERE, FLOAT8, HOPPER, VOLTA


class Models:
    """A laboratory of correctly rounded instructions, but for those given."""

    effort = "quick"

    def __init__(self, **other) -> None:
        exact = {"ex2": torch.exp2, "lg2": torch.log2, "tanh": torch.tanh, "rsqrt": torch.rsqrt}
        self.known = {**exact, "sin": torch.sin, "cos": torch.cos, **other}

    def choose(self, quick, default, thorough=None):
        return quick

    def run(self, target, *tensors, device="", **options):
        raise RuntimeError(target)

    def instruction(self, name):
        f = self.known[name.split(".")[0]]
        if f is None:
            raise ValueError(name)
        return lambda x: f(x.double()).float()


def laboratory(**other) -> Laboratory:
    return Models(**other)


def naive(c: Fraction, products: list[Fraction], bits: int) -> Fraction:
    """One block by Fractions and integers, powers of two only as products."""

    def floor_log2(x: Fraction) -> int:
        e = 0
        while Fraction(2) ** e > abs(x):
            e -= 1
        while Fraction(2) ** (e + 1) <= abs(x):
            e += 1
        return e

    step = Fraction(2) ** (max(floor_log2(x) for x in (c, *products)) - bits)
    total = sum((Fraction(int(x / step)) * step for x in (c, *products)), Fraction(0))
    if total == 0:
        return total
    grain = Fraction(2) ** (floor_log2(total) - 23)
    return Fraction(int(total / grain)) * grain


@pytest.mark.parametrize("unit", [VOLTA, AMPERE, HOPPER, FLOAT8], ids=lambda unit: unit.name)
def test_one_block_by_fractions(unit) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        powers = [int(p) for p in rng.integers(-28, 3, unit.length)]
        signs = [int(s) for s in rng.choice((-1, 1), unit.length)]
        c = Fraction(int(rng.integers(1, 2**24)), 2 ** int(rng.integers(10, 40)))
        found = unit.fused(
            flint.fmpq(c.numerator, c.denominator),
            [(s * flint.fmpq(2) ** p, flint.fmpq(1)) for s, p in zip(signs, powers, strict=True)],
        )
        due = naive(c, [s * Fraction(2) ** p for s, p in zip(signs, powers, strict=True)], unit.bits)
        assert Fraction(int(found.p), int(found.q)) == due


def test_sums_in_float64_are_the_exact_model() -> None:
    rng = np.random.default_rng(1)
    products = np.ldexp(rng.choice((-1.0, 1.0), (5, 96)), rng.integers(-12, 3, (5, 96)))
    for promote in (0, 32):
        found = tensor_core_sums.sums(products, FLOAT8, promote)
        for row, value in zip(products, found, strict=True):
            pairs = [(flint.fmpq(*float(x).as_integer_ratio()), flint.fmpq(1)) for x in row]
            due = tensor_cores.dot(FLOAT8, pairs, promote=promote)
            assert flint.fmpq(*float(value).as_integer_ratio()) == due


def test_vectors_by_fractions() -> None:
    for unit, c, count, power, due in tensor_cores.VECTORS:
        products = [Fraction(2) ** power] * count
        assert naive(Fraction(int(c.p), int(c.q)), products, unit.bits) == Fraction(int(due.p), int(due.q))


def test_order_of_blocks_in_a_unit_that_keeps_all() -> None:
    assert tensor_cores.blocks_commute(tensor_cores.Unit("23", 23, 4)).status == "REFUTED"
    # 2⁻²³ beside the running 4 = 2²: 25 fractional bits keep it, 24 do not.
    assert tensor_cores.blocks_commute(tensor_cores.Unit("25", 25, 4)).status == "HOLDS"
    assert tensor_cores.blocks_commute(tensor_cores.Unit("24", 24, 4)).status == "REFUTED"


def test_long_sums_lie_around_the_reported_error() -> None:
    assert tensor_core_sums.long_sums(16).status == "SUPPORTED"
    assert tensor_core_sums.long_sums(16, bits=16).status == "REFUTED"
    assert tensor_core_sums.long_sums(16, bits=11).status == "REFUTED"


def test_who_flushes_is_told() -> None:
    kept = hardware.flushed(laboratory())
    assert kept.status == "CONDITIONAL"
    assert "does not flush" in kept.evidence
    gone = hardware.flushed(
        laboratory(ex2=lambda x: torch.where(x < -126, torch.zeros_like(x), torch.exp2(x)))
    )
    assert gone.status == "CONDITIONAL"
    assert "flushes by itself" in gone.evidence


def test_promotion_is_what_helps() -> None:
    assert tensor_core_sums.long_sums(16, length=128).status == "REFUTED"


def test_bounds_are_applied() -> None:
    assert hardware.documented(laboratory(), count=256).status == "SUPPORTED"
    bad = {
        "ex2": lambda x: torch.exp2(x) * (1 + 2.0**-21),
        "lg2": lambda x: torch.log2(x) + 2.0**-21,
        "tanh": lambda x: torch.tanh(x) * (1 + 2.0**-10.9),
        "rsqrt": lambda x: torch.rsqrt(x) * (1 - 2.0**-22),
        "cos": lambda x: torch.cos(x) + 2.0**-20.4,
    }
    for name, f in bad.items():
        finding = hardware.documented(laboratory(**{name: f}), count=256)
        assert finding.status == "REFUTED"
        assert finding.counterexample.startswith(f"{name}.approx")


def test_special_values_count() -> None:
    positive = hardware.documented(laboratory(tanh=lambda x: torch.tanh(x) + 0.0), count=256)
    assert positive.status == "REFUTED"


def test_an_instruction_that_is_not_modelled_is_named() -> None:
    finding = hardware.documented(laboratory(sin=None), count=64)
    assert finding.status == "SUPPORTED"
    assert "not modelled: sin.approx.f32" in finding.evidence
    nothing = dict.fromkeys(("ex2", "lg2", "tanh", "rsqrt", "sin", "cos"))
    assert hardware.documented(laboratory(**nothing)).status == "OPEN"


def test_ulps() -> None:
    bound = hardware.DOCUMENTED[0]
    x = torch.tensor([0.0, 10.0, -149.0])
    above = torch.nextafter(torch.exp2(x), torch.tensor(torch.inf))
    assert bound.errors(x, above).tolist() == pytest.approx([1 / 2.5] * 3)


def test_split_bounds() -> None:
    assert reduction_order.split_bounds(7, splits=3) == [range(3), range(3, 6), range(6, 7)]
    assert reduction_order.split_bounds(7, size=4) == [range(4), range(4, 7)]


def test_a_row_against_float64() -> None:
    rng = np.random.default_rng(2)
    s, v = rng.standard_normal((3, 20)).astype(np.float32), rng.standard_normal(20).astype(np.float32)
    p = np.exp(s.astype(float))
    found = reduction_order.attention_row(s, v, reduction_order.split_bounds(20, size=6))
    np.testing.assert_allclose(found, p @ v / p.sum(axis=1), rtol=1e-5, atol=1e-6)


def test_atomic_sums_of_the_smallest_example() -> None:
    tiny = 2.0**-24
    assert reduction_order.atomic_sums([[1.0], [tiny], [tiny]]).status == "HOLDS"
    assert reduction_order.atomic_sums([[1.0], [2 * tiny], [2 * tiny]]).status == "REFUTED"
    assert reduction_order.atomic_sums([[1.0], [tiny]]).status == "REFUTED"
