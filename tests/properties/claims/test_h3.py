"""H3's exact form against naive sums, and its checks against broken forms."""

from __future__ import annotations

import flint
import numpy as np
import pytest

from attnproof.properties.claims import h3
from attnproof.properties.forms import h3 as forms
from attnproof.properties.forms import linear
from attnproof.properties.forms.numbers import rationals


def inputs(length: int = 6):
    rng = np.random.default_rng(3)
    return rationals(rng, length, 2), rationals(rng, length, 2), rationals(rng, length, 3)


def test_the_layer_is_its_double_sum() -> None:
    q, k, v = inputs()
    taps, skip = (flint.fmpq(2), flint.fmpq(-1, 3)), flint.fmpq(1, 5)
    decays, gains, outs = (flint.fmpq(1, 2), flint.fmpq(-1, 4)), (1, 3), (2, flint.fmpq(1, 7))
    found = forms.recurrent(
        q, k, v, forms.Shift(taps, skip), forms.Diagonal(decays, gains, outs, flint.fmpq(3))
    )
    for t in range(len(v)):
        total = 0 * v[0]
        for s in range(t + 1):
            key = skip * k[s] + sum(taps[i] * k[s - i] for i in range(2) if s >= i)
            weight = sum(c * a ** (t - s) * b for a, b, c in zip(decays, gains, outs, strict=True))
            total = total + (weight + (3 if s == t else 0)) * (q[t] @ key) * v[s]
        assert list(found[t]) == list(total)


def test_a_filter_is_a_product_of_polynomials() -> None:
    rng = np.random.default_rng(4)
    taps, u = rationals(rng, 3), rationals(rng, 5, 1)
    product = (flint.fmpq_poly(list(taps)) * flint.fmpq_poly(list(u[:, 0]))).coeffs()[:5]
    assert list(forms.filtered(u, tuple(taps))[:, 0]) == product
    assert list(forms.shifted(u, forms.Shift(tuple(taps)))[:, 0]) == product


def test_each_condition_counts_and_each_example_can_be_redone() -> None:
    finding = h3.as_linear_attention(5)
    assert finding.status == "CONDITIONAL"
    assert finding.table["equal to Σ v_j (k_j·q_i)"] == [True, *[False] * 5]
    assert len(finding.counterexample.splitlines()) == 5
    # A decay of 1/2 and ones: 1 + 1/2, where linear attention gives 2.
    assert "a decay of 1/2, T = 2, q = k = v = 1: o_T = 3/2, not 2" in finding.counterexample
    assert h3.as_linear_attention(5, ("a shift by one",)).status == "REFUTED"


def test_a_memory_that_forgets_is_found(monkeypatch) -> None:
    honest = forms.remembered
    monkeypatch.setattr(forms, "remembered", lambda u, ssm: honest(u, ssm) - u / 9)
    assert h3.special_case(3).status == "REFUTED"
    assert h3.as_linear_attention(3).status == "REFUTED"


def test_a_filter_off_by_one_is_found(monkeypatch) -> None:
    honest = forms.filtered
    monkeypatch.setattr(forms, "filtered", lambda u, taps: honest(u, taps[1:] + taps[:1]))
    assert h3.taps(5).status == "REFUTED"


@pytest.mark.parametrize(("model", "status"), [("H3", "HOLDS"), ("gated", "REFUTED")])
def test_gates_by_content_change_what_is_read(model, status) -> None:
    finding = h3.fixed_memory(4, model)
    assert finding.status == status
    assert finding.table["share of token 1 unchanged"] == [status == "HOLDS"] * 4


def test_what_the_first_value_contributes() -> None:
    q, k, v = inputs(3)
    found = h3._weight("gated", q, k, v)
    alpha = 1 / (1 + k * k)
    assert list(found) == list((q[2] * alpha[1] * alpha[2] * k[0]).sum() * v[0])


def test_a_normaliser_is_told_apart() -> None:
    q, k, v = inputs(3)
    assert list(linear.recurrent(abs(q) + 1, abs(k) + 1, v, normalize=True)[0][0]) == list(v[0])
    assert h3.special_case(3, reference=h3._normalised).status == "REFUTED"
