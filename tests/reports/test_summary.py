"""The aggregation: counts, worst figures and groups, held against a plain recount of the same events."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest

from attnproof.reports.record import (
    CaseJudged,
    Event,
    Failure,
    KernelJudged,
    KernelStarted,
    RunFinished,
    RunStarted,
)
from attnproof.reports.summary import POINT_LIMIT, summarize
from attnproof.reports.tables import INCOMPLETE, Outcome, outcome_of
from tests.reports.synthetic import build_events


@pytest.fixture
def events() -> list[Event]:
    return list(build_events(720))


def judged(events: list[Event]) -> list[CaseJudged]:
    return [event for event in events if isinstance(event, CaseJudged)]


@pytest.mark.parametrize(
    ("verdict", "expected", "outcome"),
    [
        ("PASS", "PASS", Outcome.PASSED),
        ("PASS", "FAIL", Outcome.SURVIVED),
        ("FAIL", "PASS", Outcome.FAILED),
        ("FAIL", "FAIL", Outcome.FAILED_AS_LISTED),
        ("DRIFT", "PASS", Outcome.FAILED),
        ("DECLINED", "PASS", Outcome.DECLINED),
        ("UNVERIFIED", "FAIL", Outcome.UNVERIFIED),
        ("of a later version", "PASS", Outcome.UNVERIFIED),
    ],
)
def test_outcome(events: list[Event], verdict: str, expected: str, outcome: Outcome) -> None:
    event = msgspec.structs.replace(judged(events)[0], verdict=verdict, expected=expected)
    assert outcome_of(event) is outcome


def test_counts_are_those_of_a_recount(events: list[Event]) -> None:
    summary = summarize(events)
    cases = judged(events)
    assert summary.cases == len(cases)
    for kernel in summary.kernels:
        own = [event for event in cases if event.kernel == kernel.name]
        assert kernel.cases == len(own) == sum(cell.cases for cell in kernel.cells)
        assert (
            kernel.failed
            == sum(event.verdict == "FAIL" for event in own)
            == sum(c.failed for c in kernel.cells)
        )
        assert kernel.unjudged == sum(sum(event.unjudged.values()) for event in own)
        assert (
            kernel.vacuous
            == sum(bool(event.vacuous) for event in own)
            == sum(c.vacuous for c in kernel.cells)
        )


def test_a_cell_holds_the_worst_and_the_pooled_rms(events: list[Event]) -> None:
    kernel = next(kernel for kernel in summarize(events).kernels if kernel.name == "delta.chunked")
    cell = next(cell for cell in kernel.cells if (cell.regime, cell.dtype) == ("cancelling", "float16"))
    outputs = [
        statistics
        for event in judged(events)
        if (event.kernel, event.case.regime, event.case.dtype) == ("delta.chunked", "cancelling", "float16")
        for statistics in event.outputs.values()
    ]
    assert len(outputs) > 0
    assert cell.worst_certain == max(statistics.worst_certain for statistics in outputs)
    pooled = sum(s.judged * s.rms_probable**2 for s in outputs) / sum(s.judged for s in outputs)
    assert cell.rms_probable == pytest.approx(math.sqrt(pooled))
    assert abs(cell.bias or 0) == max(abs(statistics.bias) for statistics in outputs)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_one_figure_that_is_not_finite_shows_in_every_total(events: list[Event], value: float) -> None:
    at = next(i for i, event in enumerate(events) if isinstance(event, CaseJudged) and event.outputs)
    event = judged(events)[0]
    broken = msgspec.structs.replace(
        event.outputs["o"], worst_certain=value, worst_probable=value, row_probable=value, rms_probable=value
    )
    events[at] = msgspec.structs.replace(event, outputs={"o": broken})
    kernel = summarize(events).kernels[0]
    cell = next(c for c in kernel.cells if (c.regime, c.dtype) == (event.case.regime, event.case.dtype))
    for figure in (kernel.worst_certain, kernel.row_probable, cell.worst_certain, cell.worst_probable):
        assert figure is not None and (figure == value or (math.isnan(figure) and math.isnan(value)))
    assert cell.rms_probable is not None and not cell.rms_probable < 1e290


def test_failures_are_grouped_by_kernel_rule_and_regime(events: list[Event]) -> None:
    groups = summarize(events).failures
    keys = [(group.kernel, group.rule, group.regime, group.listed) for group in groups]
    assert len(keys) == len(set(keys))
    failing = [event for event in judged(events) if event.verdict == "FAIL"]
    assert sum(group.count for group in groups) == len(failing)
    unexpected = [group for group in groups if not group.listed]
    assert [(group.kernel, group.regime) for group in unexpected] == [("delta.chunked", "cancelling")]
    ratios = [f.ratio or 0.0 for event in failing if event.kernel == "delta.chunked" for f in event.failures]
    assert unexpected[0].worst_ratio == max(ratios)


def test_the_failure_shown_is_the_smallest_with_a_script(events: list[Event]) -> None:
    group = summarize(events).unexpected_failures[0]
    with_script = [
        math.prod(event.case.shape.values())
        for event in judged(events)
        if (event.kernel, event.case.regime) == (group.kernel, group.regime) and event.failures[0].script
    ]
    assert group.failure.script
    assert math.prod(group.case.shape.values()) == min(with_script)
    assert group.case_ids[0] == group.case.id


def test_a_script_is_preferred_to_a_smaller_case(events: list[Event]) -> None:
    large = next(event for event in judged(events) if event.failures and event.failures[0].script)
    case = msgspec.structs.replace(large.case, id="small", shape={"N": 1})
    bare = msgspec.structs.replace(large.failures[0], script="")
    small = msgspec.structs.replace(large, case=case, failures=(bare,))
    for record in ([small, large], [large, small]):
        (group,) = summarize(record).failures
        assert group.count == 2 and group.failure.script and group.case.id == large.case.id


def test_a_failure_without_a_reason_is_not_lost(events: list[Event]) -> None:
    bare = msgspec.structs.replace(judged(events)[0], verdict="FAIL", failures=())
    (group,) = summarize([bare]).unexpected_failures
    assert group.count == 1 and "no reason" in group.failure.reason


def test_a_rule_broken_by_two_outputs_counts_one_case(events: list[Event]) -> None:
    two = (
        Failure("certain", "o is wrong", "o", ratio=3.0),
        Failure("certain", "lse is wrong", "lse", ratio=math.nan),
    )
    event = msgspec.structs.replace(judged(events)[0], verdict="FAIL", failures=two)
    (group,) = summarize([event]).unexpected_failures
    assert group.count == 1 and math.isnan(group.worst_ratio or 0.0)


def test_remarks_that_differ_in_figures_alone_are_one(events: list[Event]) -> None:
    summary = summarize(events)
    kernels = len(summary.kernels)
    assert len(summary.vacuous) == kernels
    assert sum(remark.cases for remark in summary.vacuous) == sum(
        bool(event.vacuous) for event in judged(events)
    )
    assert sum(remark.elements for remark in summary.unjudged) == sum(
        kernel.unjudged for kernel in summary.kernels
    )
    assert [remark.kernel for remark in summary.declined] == ["softmax.decode"]
    assert [remark.kernel for remark in summary.unverified] == ["ssm.convolution"]


def test_listed_failures_that_did_not_come_are_remarked(events: list[Event]) -> None:
    at = next(i for i, e in enumerate(events) if isinstance(e, CaseJudged) and e.expected == "FAIL")
    event = events[at]
    assert isinstance(event, CaseJudged)
    events[at] = msgspec.structs.replace(event, verdict="PASS", failures=())
    summary = summarize(events)
    assert summary.outcomes[Outcome.SURVIVED] == 1
    assert [(remark.kernel, remark.case_id) for remark in summary.survived] == [(event.kernel, event.case.id)]


def test_a_record_cut_off_is_summarized_as_far_as_it_goes(events: list[Event]) -> None:
    cut = next(i for i, event in enumerate(events) if isinstance(event, KernelJudged))
    summary = summarize(events[: cut - 3])
    assert not summary.complete and summary.verdict == INCOMPLETE
    (kernel,) = summary.kernels
    assert kernel.as_expected is None and kernel.verdict == INCOMPLETE
    assert kernel.cases == summary.cases == cut - 3 - 2


def test_several_runs_have_the_gravest_verdict(events: list[Event]) -> None:
    passed = [events[0], RunFinished("PASS", 0, 1.0)]
    assert summarize(passed).verdict == "PASS"
    assert summarize([*passed, *events]).verdict == "FAIL"
    assert summarize([*passed, events[0]]).verdict == INCOMPLETE
    assert summarize([*passed, events[0], RunFinished("UNVERIFIED", 3, 1.0)]).verdict == "UNVERIFIED"
    both = summarize([*events, *events])
    assert len(both.runs) == 2 and len(both.kernels) == 2 * len(summarize(events).kernels)


def test_nothing_at_all_is_an_incomplete_record() -> None:
    summary = summarize([])
    assert summary.verdict == INCOMPLETE and not summary.complete and summary.cases == 0


def test_points_are_thinned_and_the_worst_are_kept() -> None:
    summary = summarize(build_events(12_000))
    assert len(summary.points) <= POINT_LIMIT < summary.points_total
    worst = max(
        s.worst_certain for e in build_events(12_000) if isinstance(e, CaseJudged) for s in e.outputs.values()
    )
    assert max(point.certain for point in summary.points) == worst
    assert {point.kernel for point in summary.points} == {kernel.name for kernel in summary.kernels}


def test_events_are_read_once() -> None:
    stream = build_events(60)
    summarize(stream)
    assert next(stream, None) is None


def test_kernels_keep_what_was_said_of_them(events: list[Event]) -> None:
    started = next(event for event in events if isinstance(event, KernelStarted))
    kernel = summarize(events).kernels[0]
    assert (kernel.name, kernel.target, kernel.contract) == (started.kernel, started.target, started.contract)
    assert dataclasses.is_dataclass(kernel)
    assert isinstance(events[0], RunStarted) and summarize(events).runs[0].started == events[0]
