"""Attention-BN's claims against plain torch, and in worlds in which each is false."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from attnproof.properties.claims import batch_normalised


def test_centring() -> None:
    assert batch_normalised.centring().status == "HOLDS"
    draw = next(iter(batch_normalised.draws(1)))
    q, k = draw.q[0, 0], draw.k[0, 0]
    beta, mean = float(draw.beta), k.mean(0)
    expected = (q - beta * mean) @ (k - 0.5 * mean).T
    found = torch.tensor([[float(x) for x in row] for row in draw.scores(draw.beta, Fraction(1, 2))]).double()
    torch.testing.assert_close(found, expected)
    assert not batch_normalised.same_softmax(draw.scores(draw.beta, 0), draw.scores(0, 0))


def test_attention_bn_is_softmax_with_a_key_bias_in_plain_torch() -> None:
    for draw in batch_normalised.draws():
        bias = torch.tensor([float(x) for x in draw.key_bias()], dtype=torch.float64)
        plain = torch.softmax(draw.q @ draw.k.mT + bias, -1) @ draw.v
        torch.testing.assert_close(draw.normalised(variance=False).value, plain, atol=1e-12, rtol=1e-12)


def test_centring_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = batch_normalised.Draw.key_bias
    monkeypatch.setattr(batch_normalised.Draw, "key_bias", lambda self: [2 * x for x in bias(self)])
    finding = batch_normalised.centring()
    assert finding.status == "REFUTED"
    assert "β = 1, first query" in finding.counterexample
    assert "keys centred alone 4, key bias −βμ·k_j 0, oracle, key bias 0" in finding.evidence


def test_a_common_shift_needs_beta_one() -> None:
    assert batch_normalised.common_shift().status == "CONDITIONAL"
    ones = [replace(draw, beta=Fraction(1)) for draw in batch_normalised.draws()]
    assert batch_normalised.common_shift(ones).status == "HOLDS"


def test_a_common_shift_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Softmax attention in the family's place.
    monkeypatch.setattr(
        batch_normalised.Draw, "normalised", lambda self, shift=0.0, *, variance=True: self.softmax(shift)
    )
    assert batch_normalised.common_shift().status == "REFUTED"


def test_both_identities_are_polynomial() -> None:
    assert all(batch_normalised.as_polynomials(n) for n in (1, 2, 5))
    # One key alone has no differences along its row: a wrong sign shows from two keys on.
    assert not batch_normalised.as_polynomials(2, sign=-1)


def test_the_smallest_call_that_a_common_shift_changes() -> None:
    # By hand: q = 0 and keys 0, 2 at β = 1/2, then all raised by 2.
    draw = batch_normalised.two_keys(Fraction(1, 2))
    assert draw.scores(Fraction(1, 2), Fraction(1, 2)) == [[Fraction(1, 4), Fraction(-3, 4)]]
    assert "1/4, 5/4" in batch_normalised.common_shift().counterexample
