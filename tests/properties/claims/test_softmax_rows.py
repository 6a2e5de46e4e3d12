"""Claims about softmax rows in formats: thresholds by NumPy's float16, measured errors by hand."""

from __future__ import annotations

import numpy as np
import pytest

from attnproof.laboratory import Bench
from attnproof.properties.claims import softmax_rows
from attnproof.properties.claims.correct_rounding import BF16, FP16, Rounded

EXPECTED = {"LSE-9": "SUPPORTED", "LSE-10b": "REFUTED"}


@pytest.mark.parametrize("claim", softmax_rows.CLAIMS, ids=lambda claim: claim.id)
def test_status(claim) -> None:
    finding = claim.check(Bench("quick"))
    assert finding.status == EXPECTED.get(claim.id, "HOLDS"), finding
    assert len({len(column) for column in finding.table.values()}) <= 1


def halves() -> np.ndarray:
    """Every finite fp16 number."""
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    x = bits.view(np.float16).astype(np.float64)
    return np.unique(x[np.isfinite(x)])


def test_thresholds_of_fp16() -> None:
    x = halves()
    with np.errstate(over="ignore"):
        w = np.exp(x).astype(np.float16).astype(np.float64)
    overflow = softmax_rows.overflow_threshold().table
    assert overflow["last finite"][0] == x[np.isfinite(w)].max()
    assert overflow["first infinite"][0] == x[np.isinf(w)].min()
    flushed = softmax_rows.flushed().table
    assert flushed["first d with e^d rounded to 0"][0] == x[w == 0].max() == -17.34375
    assert flushed["first d with a subnormal e^d"][0] == x[w < 2.0**-14].max()


def test_distances_of_fp16() -> None:
    x = halves()
    due = x[(x <= 0) & (x >= -20) & ((np.abs(x) >= 2.0**-14) | (x == 0))]
    assert (np.sort(softmax_rows.distances(FP16, 20.0)) == due).all()


def test_a_sum_that_grows_beyond_its_terms_is_told(monkeypatch) -> None:
    honest = Rounded.add
    monkeypatch.setattr(Rounded, "add", lambda self, a, b: honest(self, a, b) + 0.5)
    assert softmax_rows.shifted_sum().status == "REFUTED"


def test_larger_losses_are_told(monkeypatch) -> None:
    """Exponentials flushed below the smallest normal number lose more than half the smallest number."""
    honest = Rounded.exp

    def flushing(self, a):
        w = honest(self, a)
        return np.where(w < 2.0**self.format.lowest, 0.0, w)

    monkeypatch.setattr(Rounded, "exp", flushing)
    assert softmax_rows.harmless().status == "REFUTED"


def test_recomputed_weights_by_hand() -> None:
    table = softmax_rows.recomputed().table
    place = [i for i, name in enumerate(table["format"]) if name == BF16.name][3]
    assert table["L"][place] == 8 * (1 + 2.0**-8)
    # The tie goes to 8, whose last digit is even.
    assert table["relative error of P"][place] == pytest.approx(np.expm1(8 * 2.0**-8), rel=1e-12)


def test_a_less_accurate_shift_is_told() -> None:
    finding = softmax_rows.accuracy_of_shifting(500, 64.0)
    assert finding.status == "REFUTED"
    errors = dict(zip(finding.table["algorithm"], finding.table["mean error / u"], strict=True))
    assert errors["shifted"] > 3 * errors["division"]


def test_log_probabilities_of_weights_are_infinite_where_these_vanish() -> None:
    finding = softmax_rows.log_probabilities(of_weights=True, depth=20.0)
    assert finding.status == "REFUTED"
    assert softmax_rows.log_probabilities(of_weights=True, depth=4.0).status == "HOLDS"
