"""The thresholds: how they are fitted, and that healthy implementations stay below them."""

from __future__ import annotations

import math
import random

import pytest

from attnproof.calibration import FIT, VALIDATION, alarms, fit, plans, stored_finding, tail_threshold
from attnproof.campaign import Campaign
from attnproof.reports.record import CaseJudged
from attnproof.statistics import stored_thresholds


def test_the_tail_of_a_known_distribution_is_extrapolated_on_the_safe_side() -> None:
    source = random.Random(1)
    for spread in (0.1, 0.2, 0.3):
        values = [math.exp(spread * source.gauss(0.0, 1.0)) for _ in range(400)]
        exact = math.exp(spread * 4.75)  # the normal quantile of 1 − 10⁻⁶
        assert exact < tail_threshold(values) < 3.0 * exact
    values = [abs(source.gauss(0.0, 1.0)) for _ in range(400)]
    assert 4.9 < tail_threshold(values) < 15.0


def test_a_threshold_is_above_everything_seen() -> None:
    assert tail_threshold([1.0] * 50) >= 1.5
    assert tail_threshold([0.1] * 49 + [8.0]) >= 12.0


def test_thresholds_are_stored_for_every_dtype_of_every_family() -> None:
    stored = stored_thresholds()
    for family, output in (("softmax", "o"), ("softmax", "lse"), ("logsumexp", "y"), ("softmax_rows", "y")):
        for dtype in ("float32", "float16", "bfloat16"):
            widths = ("narrow",) if output == "lse" or family == "logsumexp" else ("narrow", "wide")
            assert any(f"{family}/{output}/{dtype}/any/{width}" in stored for width in widths), (
                family,
                dtype,
            )


def test_the_committed_calibration_has_no_false_alarm_in_3000_cases() -> None:
    finding = stored_finding()
    assert finding is not None
    table = finding.series[1].columns
    assert sum(table["alarms"]) == 0
    assert sum(table["cases"]) >= 3000
    assert {"fit", "validation"} == set(table["used for"])


@pytest.mark.parametrize("target", [*FIT, *VALIDATION])
def test_a_fresh_sample_of_healthy_cases_raises_no_alarm(target: str) -> None:
    planned = plans([target], 24, seed=5_000)
    events = [e for e in Campaign(planned, "sample", jobs=1).run() if isinstance(e, CaseJudged)]
    counted = alarms(events, stored_thresholds())
    assert [c.alarms for c in counted.values()] == [0], [
        (e.case.id, e.failures) for e in events if e.verdict in ("FAIL", "UNVERIFIED")
    ]


def test_a_fit_needs_cases() -> None:
    assert fit([]) == {}
