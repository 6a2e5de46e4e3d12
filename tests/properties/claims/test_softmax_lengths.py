"""Errors of softmax by length: the stagnating sum by hand, and what a status needs."""

from __future__ import annotations

import numpy as np
import torch

from attnproof.laboratory import Bench
from attnproof.properties.claims import softmax_lengths
from attnproof.properties.claims.correct_rounding import BF16, FP16


def test_status() -> None:
    (claim,) = softmax_lengths.CLAIMS
    finding = claim.check(Bench("quick"))
    assert finding.status == "CONDITIONAL", finding
    assert finding.table["largest error / u"][0] < 7


def test_least_stagnating_row_in_torch() -> None:
    """bf16 sums stop at 256: n logits get weights 2^-8, off by n/256 − 1."""
    n, total = softmax_lengths.least_stagnating(BF16)
    sum_of_ones = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(n):
        sum_of_ones = sum_of_ones + torch.ones((), dtype=torch.bfloat16)
    assert float(sum_of_ones) == total == 256.0
    assert n / 256 - 1 > (np.sqrt(n) + 3) / 256
    assert (n - 1) / 256 - 1 <= (np.sqrt(n - 1) + 3) / 256


def test_errors_before_stagnation_refute(monkeypatch) -> None:
    monkeypatch.setattr(softmax_lengths, "worst_error", lambda form, n, rows: 2.0 * n)
    assert softmax_lengths.square_root_growth((FP16,), (16,), 4).status == "REFUTED"
    assert softmax_lengths.square_root_growth((BF16,), (256,), 4).status == "CONDITIONAL"
