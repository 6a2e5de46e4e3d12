"""Claims behind exact oracles: by fractions, by mpmath, and in worlds in which they fail."""

from __future__ import annotations

from fractions import Fraction

import flint
import mpmath
import numpy as np
import pytest
import torch

from attnproof.laboratory import Bench
from attnproof.properties.claims import (
    base_two_exponentials,
    exactness,
    invariances,
    rounded_weights,
    summation_orders,
)
from attnproof.properties.claims.correct_rounding import BF16, FP16
from attnproof.properties.forms.numbers import rationals

EXPECTED = {"EXA-4a": "CONDITIONAL", "EXA-4c": "SUPPORTED", "HW-2c": "REFUTED", "HW-2e": "SUPPORTED"}
MODULES = (exactness, invariances, rounded_weights, base_two_exponentials, summation_orders)


@pytest.mark.parametrize(
    "claim", [c for module in MODULES for c in module.CLAIMS], ids=lambda claim: claim.id
)
def test_status(claim) -> None:
    finding = claim.check(Bench("quick"))
    assert finding.status == EXPECTED.get(claim.id, "HOLDS"), finding
    assert len({len(column) for column in finding.table.values()}) <= 1


def test_online_blocks_against_fractions() -> None:
    x, v = [3, -2, 0, 7, 7], [1, -8, 5, 2, -3]
    l = sum(Fraction(2) ** (a - 7) for a in x)
    o = sum(Fraction(2) ** (a - 7) * b for a, b in zip(x, v, strict=True))
    for blocks in ([[0, 1, 2, 3, 4]], [[3], [0, 4], [1, 2]]):
        assert exactness.online_blocks(x, v, blocks) == (float(l), float(o))


def test_a_block_that_is_not_rescaled_is_found(monkeypatch) -> None:
    monkeypatch.setattr(exactness.Rounded, "mul", lambda self, a, b: b if (a == b).all() else a)
    assert exactness.dyadic(2).status == "REFUTED"


def test_families_that_differ_are_told() -> None:
    def off(rng):
        first, *rest = exactness._linear(rng)
        return [first + flint.fmpq(1, 10**30), *rest]

    finding = exactness.rational_families({"off": off})
    assert finding.status == "REFUTED"
    assert finding.table["rational"] == [True]


def test_forms_of_late_gates_differ_and_are_rational() -> None:
    finding = exactness.rational_families({"late": exactness._late})
    assert (finding.status, finding.table["rational"], finding.table["equal"]) == ("REFUTED", [True], [False])
    assert exactness.rational_families({"floats": lambda _: [np.array([0.5, 0.25])] * 2}).status == "REFUTED"


def test_an_allowance_below_the_proved_one_is_not_proved() -> None:
    def less(*row):
        return 0.99 * summation_orders._gamma(*row)

    assert summation_orders.order_spread(2, 8).status == "HOLDS"
    assert summation_orders.order_spread(2, 8, less).status == "SUPPORTED"


def test_every_property_of_attention_has_its_proof() -> None:
    assert list(invariances.PROOFS) == list(invariances.PROPERTIES)
    assert "For all: " in invariances.held("a", invariances.attention, 3).evidence
    assert "For all: " not in invariances.held("c", invariances.sigmoid, 3).evidence


def test_perturbation_of_two_groups() -> None:
    """e^ε = 2: 1/3 becomes 2/3, a change of tanh(log(2)/2) = 1/3."""
    assert exactness.sharpness()
    assert not exactness.sharpness(flint.fmpq(99, 100))
    assert float(mpmath.tanh(mpmath.log(2) / 2)) == pytest.approx(1 / 3)
    assert exactness.perturbation(2, 2).status == "HOLDS"


def test_attention_of_the_tests_world_is_softmax() -> None:
    rng = np.random.default_rng(5)
    w, v = rationals(rng, 3, 4, low=1, high=30), rationals(rng, 4, 2)
    floats = [torch.tensor([[float(x.p) / float(x.q) for x in row] for row in a]) for a in (w, v)]
    due = torch.softmax(floats[0].double().log(), dim=1) @ floats[1].double()
    found = torch.tensor([[float(x.p) / float(x.q) for x in row] for row in invariances.attention(w, v)])
    assert torch.allclose(found.double(), due, atol=1e-6)


def test_sigmoid_attention_keeps_only_some_properties() -> None:
    kept = [
        a for a in invariances.PROPERTIES if invariances.held(a, invariances.sigmoid, 12).status == "HOLDS"
    ]
    assert kept == ["c", "d"]


def test_off_one_by_hand() -> None:
    # 1 + 2^-9 is a tie of bf16 and goes to 1: (1 + 1)/(1 + 1 + 2^-9) − 1.
    off = rounded_weights.off_one((1.0, 1.0 + 2.0**-8), (1, 1), BF16)
    assert off == flint.fmpq(2) / (flint.fmpq(2) + flint.fmpq(1, 256)) - 1


def test_least_keys_is_least() -> None:
    u = flint.fmpq(1, 2**11)
    keys = rounded_weights.least_keys(FP16, -25)
    off = [abs(rounded_weights.off_one((1.0, 2.0**-25), (1, n), FP16)) for n in (keys - 1, keys)]
    assert off[0] <= u < off[1]
    assert rounded_weights.least_keys(BF16, -134) == 0


def test_worst_rounding_over_every_float() -> None:
    bits = torch.arange(0x3F000000, 0x3F010000, dtype=torch.int32)
    p = bits.view(torch.float32)
    error = ((p.bfloat16().double() - p.double()).abs() / p.double()).max()
    # The first interval of a binade has the largest error.
    assert float(error) == pytest.approx(float(2.0**-8 / (1 + 2.0**-8)), rel=1e-4)
    _, worst = rounded_weights.worst_rounding(BF16, -4)
    assert float(worst.p) / float(worst.q) == pytest.approx(float(error), rel=1e-12)


def test_constant_of_base_two() -> None:
    with mpmath.workdps(40):
        high = mpmath.mpf(base_two_exponentials._HIGH)
        due = abs(high * mpmath.log(2) - 1) * 2**24
        assert abs(mpmath.mpf(float(base_two_exponentials.constant_error().mid())) - due) < 1e-12
        assert abs(high + mpmath.mpf(base_two_exponentials._LOW) - 1 / mpmath.log(2)) < 2.0**-49


@pytest.mark.parametrize("split", [False, True])
def test_argument_errors_against_mpmath(split) -> None:
    x = base_two_exponentials.logits(7)[::9]
    found = base_two_exponentials.argument_errors(x, split=split)
    high, low = np.float32(base_two_exponentials._HIGH), np.float32(base_two_exponentials._LOW)
    with mpmath.workdps(50):
        for a, error in zip(x.tolist(), found.tolist(), strict=True):
            product = mpmath.mpf(a) * mpmath.mpf(float(high))
            if split:
                product += mpmath.mpf(float(np.float32(a) * low))
            t = np.float32(mpmath.nstr(product, 30))
            due = abs(mpmath.mpf(2) ** mpmath.mpf(float(t)) / mpmath.exp(mpmath.mpf(a)) - 1)
            assert error == pytest.approx(float(due / abs(a) * 2**24), abs=1e-6)


def test_an_inexact_instruction_is_told() -> None:
    class Coarse(Bench):
        def instruction(self, name):
            return lambda t: torch.exp2(t) * (1 + 2.0**-15)

    assert base_two_exponentials.instruction_error(Coarse("quick"), 50).status == "REFUTED"


def test_additions_and_sums_of_trees() -> None:
    assert summation_orders.additions(((0, 1), (2, (3, 4)))) == 3
    x = np.array([[2048.0, 1.0, 1.0]])
    assert summation_orders.ordered_sum(((0, 1), 2), x, FP16)[0] == 2048.0
    assert summation_orders.ordered_sum((0, (1, 2)), x, FP16)[0] == 2050.0


def test_random_trees_hold_every_leaf() -> None:
    def leaves(tree):
        return [tree] if isinstance(tree, int) else [*leaves(tree[0]), *leaves(tree[1])]

    tree = summation_orders.random_tree([4, 2, 0, 1, 3], np.random.default_rng(0))
    assert leaves(tree) == [4, 2, 0, 1, 3]


def test_a_tolerance_that_is_too_small_is_told() -> None:
    def tight(n, u, absolute, total):
        return 0.2 * summation_orders._gamma(n, u, absolute, total)

    finding = summation_orders.order_spread(2, 8, tight)
    assert finding.status == "REFUTED"
    assert "3 significant bits" in finding.counterexample
