"""Numbers in words: three digits, and nothing that is not finite is hidden or ranked low."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnproof.reports.wording import alike, counted, duration, log10_clipped, ratio, worst


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (0.0, "0"),
        (0.01234, "0.0123"),
        (0.999, "0.999"),
        (1.0, "1.00"),
        (12.34, "12.3"),
        (1234.5, "1234"),
        (123456.0, "1.2e+05"),
        (0.00012, "1.2e-04"),
        (-0.5, "-0.500"),
    ],
)
def test_ratio(value: float | None, text: str) -> None:
    assert ratio(value) == text


@given(st.floats(-1e300, 1e300))
def test_a_ratio_reads_back_within_its_digits(value: float) -> None:
    # Two significant digits are the least: half a unit of the second one.
    assert float(ratio(value)) == pytest.approx(value, rel=0.05)


def test_nan_outranks_infinity_outranks_numbers() -> None:
    assert math.isnan(worst([1.0, math.nan, math.inf]) or 0.0)
    assert worst([None, 3.0, math.inf]) == math.inf
    assert worst([None, -2.0, -3.0]) == -2.0
    assert worst([None]) is None


@given(st.floats())
def test_a_logarithm_stays_within_its_bounds(value: float) -> None:
    assert -3 <= log10_clipped(value, -3, 3) <= 3


def test_what_is_not_finite_is_drawn_as_the_largest() -> None:
    assert log10_clipped(math.nan, -3, 3) == log10_clipped(math.inf, -3, 3) == 3
    assert log10_clipped(0.0, -3, 3) == -3
    assert log10_clipped(10.0, -3, 3) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.40 s"), (12.3, "12 s"), (185.0, "3 min 05 s"), (7620.0, "2 h 07 min"), (math.nan, "–")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counted() -> None:
    assert [counted(n, "case") for n in (0, 1, 2000)] == ["no cases", "1 case", "2,000 cases"]


def test_reasons_that_differ_in_figures_alone_are_alike() -> None:
    assert alike("largest p 0.0163 of 12") == alike("largest p 1.2e-05 of 7")
    assert alike("largest p") != alike("largest q")
