"""Smooth functions in place of ReLU: against mpmath, and bounds made false."""

from __future__ import annotations

import flint
import mpmath
import numpy as np
import pytest

from attnproof.properties.claims import spline_smoothing
from attnproof.properties.forms.base import each, filled


@pytest.mark.parametrize("beta", [1, 10, 1000])
def test_softplus_is_mpmaths(beta) -> None:
    points = [flint.fmpq(k, 7) for k in (-300, -20, -1, 0, 1, 20, 300)]
    ours = spline_smoothing.softplus(beta)(filled((7,), points))
    with mpmath.workdps(60):
        for x, ball in zip(points, ours, strict=True):
            exact = mpmath.log1p(mpmath.exp(beta * mpmath.mpf(int(x.p)) / int(x.q))) / beta
            assert float(ball.mid()) == pytest.approx(float(exact), rel=1e-12, abs=1e-300)


def test_suprema() -> None:
    assert spline_smoothing.supremum().status == "HOLDS"
    half = spline_smoothing.supremum(lambda u: spline_smoothing._softplus_error(u) / 2)
    assert half.status == "REFUTED"
    # Equal at 0, but larger somewhere else: e(u) = ln(1 + e^{−u}) + u·e^{−u}.
    bump = spline_smoothing.supremum(lambda u: spline_smoothing._softplus_error(u) + u * (-u).exp())
    assert bump.status == "REFUTED"
    assert bump.table["supremum"][0] > 0.7


def test_softplus_attention_can_exceed_a_smaller_bound(monkeypatch) -> None:
    assert spline_smoothing.attention_error(5).status == "HOLDS"
    honest = spline_smoothing.softplus
    monkeypatch.setattr(
        spline_smoothing, "softplus", lambda beta: lambda x: each(lambda e: e * 2, honest(beta)(x))
    )
    finding = spline_smoothing.attention_error(5)
    assert finding.status == "REFUTED"
    assert "scores" in finding.counterexample


def test_softplus_closer_than_claimed_is_open() -> None:
    """With 2β the bound holds with room, so that it is not attained."""
    assert spline_smoothing.attention_error(5, slack=flint.fmpq(1, 2)).status == "OPEN"


def test_rows_of_softmax_in_the_limit() -> None:
    scores = filled((1, 4), [flint.fmpq(k, 2) for k in (1, 3, 3, -2)])
    assert list(spline_smoothing._average_of_maxima(scores).flat) == [
        0,
        flint.fmpq(1, 2),
        flint.fmpq(1, 2),
        0,
    ]
    weights = spline_smoothing._softmax_of(2)(scores).astype(float)
    exponentials = np.exp([1.0, 3.0, 3.0, -2.0])
    assert weights[0] == pytest.approx(exponentials / exponentials.sum(), rel=1e-14)


def test_a_single_key_has_the_same_error_for_every_beta() -> None:
    finding = spline_smoothing.softmax_as_limit(spline_smoothing._softmax_of)
    assert finding.table["least error"] == [0.5] * 5


def test_a_rate_is_told() -> None:
    """SoftPlus at √β falls as its root."""
    finding = spline_smoothing.rate(3, lambda beta: spline_smoothing._smooth_activation(round(beta**0.5)))
    assert finding.status == "REFUTED"
    assert "go as β^-0.499" in finding.evidence
