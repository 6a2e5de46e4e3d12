"""Acceptance rules as claims take them: against torch's own comparison, loops, and cases at their edges."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from attnproof.properties.claims.acceptance_rules import (
    allclose,
    constant_within,
    flash_limit,
    hidden_rows,
    mean_of_values,
    own_key_missing,
    probe,
    relative_rms,
    warns_only,
    zeros_accepted,
)


@pytest.mark.parametrize("scale", [0.5, 0.99, 1.01, 3.0])
def test_allclose_is_that_of_torch(scale: float) -> None:
    expected = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)
    out = expected + scale * (1e-2 + 1e-2 * expected.abs())
    assert allclose(1e-2)(out, expected) == torch.allclose(out, expected, rtol=1e-2, atol=1e-2)
    assert allclose(1e-2)(out, expected) == (scale < 1.0)


def test_a_relative_rms_is_one_of_all_elements() -> None:
    expected = torch.ones(400, 8, dtype=torch.float64)
    out = expected.clone()
    out[7] = 0.0
    total = sum(float(x) ** 2 for x in (out - expected).flatten()) / sum(
        float(x) ** 2 for x in expected.flatten()
    )
    assert total**0.5 == pytest.approx(0.05)
    assert relative_rms(0.0501)(out, expected)
    assert not relative_rms(0.0499)(out, expected)
    assert relative_rms(1e-9)(expected + 9e-7, expected)


def test_rows_are_hidden_from_the_number_on_that_the_claim_tells() -> None:
    limit = Fraction(1, 200)
    assert hidden_rows([limit], 40_000).status == "REFUTED"
    assert hidden_rows([limit], 40_001).status == "HOLDS"
    assert "0.005 from 40001 rows on" in hidden_rows([limit], 10).evidence


def test_the_flag_asks_for_both_to_be_exceeded() -> None:
    assert warns_only(Fraction(3, 10), Fraction(5))
    assert warns_only(Fraction(5), Fraction(1, 101))
    assert not warns_only(Fraction(31, 100), Fraction(1, 100))
    assert constant_within(Fraction(31, 100)).status == "REFUTED"
    assert constant_within(Fraction(2, 10), answer=Fraction(-1, 10)).status == "HOLDS"
    assert constant_within(Fraction(2, 10), answer=Fraction(2, 10)).status == "REFUTED"


def test_the_mean_is_told_from_attention_where_weights_differ() -> None:
    rule = allclose(1e-2)
    assert mean_of_values((256,), rule, spread=0.0).status == "SUPPORTED"
    found = mean_of_values((64, 256), rule, spread=20.0)
    assert found.status == "REFUTED"
    assert min(found.table["largest error of the mean of V"]) > 0.05


def test_the_probe_by_hand() -> None:
    tenth = torch.tensor(0.3).bfloat16()
    x = torch.tensor([0.0, 2.0**-11, -(2.0**-11), 0.0078125, 0.05]).bfloat16()
    # 0.3 is 154/512 in bfloat16, whose numbers from 1/4 to 1/2 are multiples of 1/512: 2⁻¹¹ is a quarter of
    # that and lost, 2⁻⁷ is four of them and kept, 0.05 is 0.050048828125 = 25.625/512 and goes to 26.
    assert probe(x, tenth).tolist() == [0.0, 2.0**-11, 2.0**-11, 0.0, 0.375 / 512]


def test_the_flash_limit_is_the_rule_of_its_tests() -> None:
    expected = torch.tensor([1.0, 0.25]).bfloat16()
    same = torch.tensor([1.0078125, 0.25]).bfloat16()
    own = 2.0 * float(probe(expected, torch.tensor(0.3)).max())
    assert flash_limit(same, expected) == pytest.approx(2.0 / 128 + own)
    assert flash_limit(same, expected, factor=3.0) == pytest.approx(3.0 / 128 + own)


def test_a_missing_key_shows_in_the_first_rows() -> None:
    assert own_key_missing((64,)).status == "REFUTED"
    assert own_key_missing((64, 8192)).status == "CONDITIONAL"


def test_sizes_up_to_which_zeros_pass() -> None:
    assert zeros_accepted(2.0**-11).status == "HOLDS"
    found = zeros_accepted(2.0**-10)
    # With 0.3 in bfloat16 all sizes pass; in float32 0.3 is 153.6/512, and ±0.00098 moves to 154 and 153.
    assert found.table["rejected"][0] == 0
    assert found.table["rejected"][1] > 0
