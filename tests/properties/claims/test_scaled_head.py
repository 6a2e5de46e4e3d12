"""Attention-SH's claims by hand, and in worlds in which each is false."""

from __future__ import annotations

import pytest
import torch

from attnproof.properties.claims import batch_normalised, scaled_head


def test_constant_windows() -> None:
    finding = scaled_head.constant_windows()
    assert finding.status == "CONDITIONAL"
    assert scaled_head.constant_windows((1, 2, 3, 4), 12, 24).status == "HOLDS"


def test_a_shorter_last_window_weighs_as_much_as_the_others() -> None:
    # Three keys alike in windows of 2: half for the last one, which has a third in softmax attention.
    q, k = torch.zeros(1, 1, 1, 1).double(), torch.zeros(1, 1, 3, 1).double()
    v = torch.tensor([0.0, 0.0, 1.0]).double().reshape(1, 1, 3, 1)
    pooled = batch_normalised.outputs("scaled_head", q, k, v, scale=1.0, pool=(2,))
    softmax = batch_normalised.outputs("softmax", q, k, v, scale=1.0)
    assert float(pooled.value) == 0.5
    assert float(softmax.value) == pytest.approx(1 / 3)
    assert batch_normalised.apart(pooled, softmax) == pytest.approx(1 / 6)


def test_windows_are_constant_where_asked_only() -> None:
    _, k, _ = scaled_head.in_windows(12, (1, 3), constant=True)
    assert torch.equal(k[0, 1, 0], k[0, 1, 2])
    assert not torch.equal(k[0, 1, 2], k[0, 1, 3])
    assert not torch.equal(k[0, 0, 0], k[0, 0, 1])
    _, k, _ = scaled_head.in_windows(12, (1, 3), constant=False)
    assert not torch.equal(k[0, 1, 0], k[0, 1, 2])


def test_constant_windows_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = scaled_head.in_windows
    monkeypatch.setattr(
        scaled_head, "in_windows", lambda n, pool, *, constant: drawn(n, pool, constant=False)
    )
    assert scaled_head.constant_windows().status == "REFUTED"


def test_costs_are_those_of_a_masked_product() -> None:
    # Pooling as a matrix of means: its rows are the keys that each query meets.
    for n, width in ((12, 3), (11, 4), (5, 1)):
        pooling = torch.zeros(-(-n // width), n)
        for j in range(n):
            pooling[j // width, j] = 1.0
        scores = torch.ones(n, 1) @ (pooling @ torch.ones(n, 1)).mT
        assert scaled_head.scores_computed(n, (width,)) == scores.numel()


def test_the_formula_of_costs_needs_widths_that_divide() -> None:
    assert scaled_head.costs((12, 24)).status == "HOLDS"
    finding = scaled_head.costs((5, 12))
    assert finding.status == "CONDITIONAL"
    assert "60 scores" in finding.counterexample


def test_wrong_costs_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_head, "scores_computed", lambda n, pool: n * n * len(pool))
    assert scaled_head.costs((12,)).status == "REFUTED"
