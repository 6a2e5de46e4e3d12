"""The thresholds: how they are fitted, and that healthy implementations stay below them."""

from __future__ import annotations

import math
import random

import pytest

from attnproof.calibration import (
    HELD_OUT_SEED,
    IMPLEMENTATIONS,
    Sample,
    alarms,
    fit,
    held_out,
    plans,
    sampled,
    stored_finding,
)
from attnproof.campaign import Campaign
from attnproof.properties.contract import contract_of
from attnproof.reach import EXEMPT, LIMIT, Reach, beyond, measure_reach
from attnproof.reports.record import CaseJudged
from attnproof.statistics import stored_thresholds
from attnproof.tails import PER_CASE, tail
from attnproof.targets import resolve

# The tail of a squared normal is e^(−s/2)/√s, a little steeper than its limit e^(−s/2) where it is fitted:
# the extrapolation may end short of the exact quantile by 3 %, at a chance of 2e-6 instead of 1e-6.
SHORT = 0.97


def test_the_tail_of_a_gaussian_error_is_extrapolated_on_the_safe_side() -> None:
    """|x| of a standard normal passes 4.89 once in a million times; samples end near 3."""
    source = random.Random(1)
    for size in (200, 400, 5000):
        found = tail([abs(source.gauss(0.0, 1.0)) for _ in range(size)])
        assert SHORT * 4.89 < found.threshold < 8.0, found
        assert found.low < found.high <= found.threshold
        assert found.largest < found.threshold


def test_more_data_narrow_the_interval_and_lower_the_threshold() -> None:
    source = random.Random(2)
    values = [math.sqrt(sum(source.gauss(0.0, 1.0) ** 2 for _ in range(16)) / 16) for _ in range(6000)]
    few, many = tail(values[:100]), tail(values)
    assert many.high - many.low < few.high - few.low
    assert many.threshold < few.threshold
    # chi² with 16 degrees of freedom passes 61.6 once in a million times.
    assert math.sqrt(61.6 / 16) < many.threshold < 1.4 * math.sqrt(61.6 / 16)


def test_a_heavy_part_of_a_mixture_is_not_lost_below_the_quantile() -> None:
    """One case in fifty of another regime with four times the spread: the 80 % quantile alone misses it."""
    source = random.Random(3)
    values = [abs(source.gauss(0.0, 4.0 if i % 50 == 0 else 1.0)) for i in range(6000)]
    exact = 4.0 * 4.06  # 4 σ of the heavy part: P(|z| > 4.06) = 50e-6
    assert tail(values).threshold > SHORT * exact


def test_a_threshold_is_above_everything_seen() -> None:
    assert tail([1.0] * 50).threshold >= 1.25
    assert tail([0.1] * 49 + [8.0]).threshold >= 10.0
    with pytest.raises(ValueError, match="values is empty"):
        tail([])
    assert PER_CASE == 1e-6


def test_held_out_implementations_are_drawn_and_no_family_is_without_either_kind() -> None:
    assert HELD_OUT_SEED == 20261122
    held = held_out()
    assert held == held_out(tuple(reversed(IMPLEMENTATIONS)))
    assert held != held_out(seed=HELD_OUT_SEED + 1)
    # A third of each family, rounded.
    assert len(held) == pytest.approx(len(IMPLEMENTATIONS) / 3, abs=4)
    for family in ("softmax", "logsumexp", "softmax_rows"):
        members = {t for t in IMPLEMENTATIONS if contract_of(resolve(t)).family == family}  # type: ignore[union-attr]
        assert members & set(held)
        assert members - set(held)


def test_there_are_fifteen_attention_implementations_and_plans_of_twenty_thousand_cases() -> None:
    attention = [t for t in IMPLEMENTATIONS if contract_of(resolve(t)).family == "softmax"]  # type: ignore[union-attr]
    assert len(set(attention)) >= 15
    planned = plans([IMPLEMENTATIONS[0], attention[-1]], 60, 1000)
    assert [len(cases) for _, cases in planned] == [21, 60]
    longest = max(case["N"] for _, cases in planned for case in cases)
    assert longest >= 1024
    assert {case.dtype for case in planned[1][1]} == {"float32", "float16", "bfloat16"}


def test_thresholds_are_stored_for_every_dtype_of_every_family_with_their_intervals() -> None:
    stored = stored_thresholds()
    for family, output, width in (
        ("softmax", "o", "wide"),
        ("softmax", "o", "narrow"),
        ("softmax", "lse", "single"),
        ("logsumexp", "y", "single"),
        ("softmax_rows", "y", "wide"),
    ):
        for dtype in ("float32", "float16", "bfloat16"):
            found = stored[f"{family}/{output}/{dtype}/any/{width}"]
            assert found.cases >= 60
            assert {"row", "output"} <= found.intervals.keys()
    for key, found in stored.items():
        for name, (low, high, largest) in found.intervals.items():
            assert low <= high <= getattr(found, name) * 1.001, key
            assert largest < getattr(found, name), key


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("regime_class", ["plain", "tied", "real"])
def test_output_thresholds_in_half_precision_are_close_to_what_healthy_kernels_do(
    dtype: str, regime_class: str
) -> None:
    """Twice and more of a healthy kernel's error is found out in every plain, tied and real case."""
    stored = stored_thresholds()[f"softmax/o/{dtype}/{regime_class}/wide"]
    assert stored.output <= 2.0
    assert stored.bias <= 1.0


def test_the_committed_calibration_has_no_false_alarm_in_20000_cases() -> None:
    finding = stored_finding()
    assert finding is not None
    (table,) = [s.columns for s in finding.series if s.title == "False alarms by implementation"]
    assert sum(table["alarms"]) == 0
    assert sum(table["cases"]) >= 19_500  # of 20,000 and more that were planned, less those declined
    validated = {
        name for name, use in zip(table["implementation"], table["used for"], strict=True) if use != "fit"
    }
    assert validated == {subject.name for subject, _ in plans(held_out(), 1, 0)}


# Every sixth: nox -s calibrate goes through all of them, and a share of it runs in CI.
@pytest.mark.parametrize("target", IMPLEMENTATIONS[::12])
def test_a_fresh_sample_of_healthy_cases_raises_no_alarm(target: str) -> None:
    planned = plans([target], 8 if target.startswith("attnproof.healthy") else 20, seed=5_000)
    events = [e for e in Campaign(planned, "sample", jobs=1).run() if isinstance(e, CaseJudged)]
    counted = alarms(map(sampled, events), stored_thresholds())
    assert [c.alarms for c in counted.values()] == [0], [
        (e.case.id, e.failures) for e in events if e.verdict in ("FAIL", "UNVERIFIED")
    ]


def test_alarms_count_what_exceeds_a_threshold_or_a_certain_budget() -> None:
    case = "softmax:float16:normal:B1,H1,G1,M9,N33,D16,E16:-:contiguous:5"
    healthy = Sample("kernel", case, "PASS", {"o": (1.2, 0.9, 0.1, 0.5, 9)})
    wrong = [
        Sample("kernel", case, "FAIL", {"o": (1.2, 5.0, 0.1, 0.5, 9)}),
        Sample("kernel", case, "FAIL", {"o": (50.0, 0.9, 0.1, 0.5, 9)}),
        Sample("kernel", case, "FAIL", {"o": (1.2, 0.9, 3.0, 0.5, 9)}),
        Sample("kernel", case, "FAIL", {"o": (1.2, 0.9, 0.1, 1.5, 9)}),
        Sample("kernel", case, "UNVERIFIED", {}),
    ]
    declined = Sample("kernel", case, "DECLINED", {})
    counted = alarms([healthy, declined, *wrong], stored_thresholds())["kernel"]
    assert (counted.cases, counted.alarms) == (6, 5)


def test_a_fit_needs_cases() -> None:
    assert fit([]) == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_certain_budget_reaches_to_fifty_times_a_healthy_error_at_4096_keys(dtype: str) -> None:
    measured = list(measure_reach(("normal", "wide-values"), (dtype,), (4096,)))
    assert len(measured) == 4
    assert not beyond(measured), measured
    assert all(found.output > 1.0 for found in measured), "a healthy kernel would be accused"


def test_the_stored_reach_is_within_its_limit_but_where_it_is_exempt() -> None:
    finding = stored_finding()
    assert finding is not None
    (table,) = [s.columns for s in finding.series if s.title.startswith("Certain budget: times")]
    found = [
        Reach(*row)
        for row in zip(*(table[name] for name in ("regime", "dtype", "N", "D", "o", "lse")), strict=True)
    ]
    assert {(r.keys, r.width) for r in found} >= {
        (n, d) for n in (128, 512, 1024, 2048, 4096) for d in (64, 128)
    }
    assert not beyond(found)
    assert beyond([Reach("normal", "float16", 4096, 64, LIMIT, 1.0)])
    assert set(EXEMPT) == {"cancelling-values"}
