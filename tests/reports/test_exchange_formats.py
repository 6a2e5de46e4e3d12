"""Markdown, JUnit and SARIF: what other programs read agrees with the record, whatever its text holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnproof.reports import junit, markdown, sarif
from attnproof.reports.record import CaseJudged, Event, Failure, KernelJudged, RunFinished
from attnproof.reports.summary import summarize
from tests.reports.event_strategies import events as any_event
from tests.reports.synthetic import HOSTILE, KERNELS, build_events

Change = Callable[[Event], Event]


@pytest.fixture
def events() -> list[Event]:
    return list(build_events(720))


def count(events: list[Event], **fields: str) -> int:
    cases = [event for event in events if isinstance(event, CaseJudged)]
    return sum(all(getattr(event, name) == value for name, value in fields.items()) for event in cases)


def parsed(events: list[Event]) -> ElementTree.Element:
    return ElementTree.fromstring(junit.render(events))


def healthy(events: list[Event]) -> list[Event]:
    """The record of a run in which everything came out as listed."""

    def heal(event: Event) -> Event:
        if (
            isinstance(event, CaseJudged)
            and event.verdict in ("FAIL", "UNVERIFIED")
            and event.expected == "PASS"
        ):
            return msgspec.structs.replace(event, verdict="PASS", failures=())
        if isinstance(event, KernelJudged):
            return msgspec.structs.replace(event, as_expected=True)
        return RunFinished("PASS", 0, 1.0) if isinstance(event, RunFinished) else event

    return [heal(event) for event in events]


def changed(events: list[Event], kind: type, **fields: Any) -> list[Event]:
    """The record with the first event of ``kind`` changed."""
    at = next(i for i, event in enumerate(events) if isinstance(event, kind))
    return [*events[:at], msgspec.structs.replace(events[at], **fields), *events[at + 1 :]]


def test_junit_has_a_test_case_for_every_case(events: list[Event]) -> None:
    root = parsed(events)
    suites = [suite for suite in root if suite.get("name") in KERNELS]
    assert [suite.get("name") for suite in suites] == list(KERNELS)
    assert sum(len(suite.findall("testcase")) for suite in suites) == count(events)
    assert len(root.findall(".//failure")) == count(events, verdict="FAIL", expected="PASS")
    assert len(root.findall(".//error")) == count(events, verdict="UNVERIFIED")
    assert len(root.findall(".//skipped")) == count(events, verdict="DECLINED")
    listed = [out for out in root.findall(".//system-out") if (out.text or "").startswith("failed as listed")]
    assert len(listed) == count(events, verdict="FAIL", expected="FAIL") > 0


def test_junit_totals_are_those_of_its_parts(events: list[Event]) -> None:
    root = parsed(events)
    for name, tag in (
        ("tests", "testcase"),
        ("failures", "failure"),
        ("errors", "error"),
        ("skipped", "skipped"),
    ):
        assert root.get(name) == str(len(root.findall(f".//{tag}")))
        assert root.get(name) == str(sum(int(suite.get(name, "-1")) for suite in root))


def test_junit_gives_reason_and_script(events: list[Event]) -> None:
    failures = parsed(events).findall(".//failure")
    assert all("times the certain budget" in failure.get("message", "") for failure in failures)
    assert any("check(attention" in (failure.text or "") for failure in failures)
    assert all(HOSTILE in (failure.text or "") for failure in failures)


def broken(root: ElementTree.Element) -> int:
    return len(root.findall(".//failure")) + len(root.findall(".//error"))


def test_junit_is_green_when_everything_came_out_as_listed(events: list[Event]) -> None:
    assert broken(parsed(healthy(events))) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e[:-1], "incomplete"),
        (lambda e: changed(e, RunFinished, exit_code=1, verdict="DRIFT", reason="worse"), "worse"),
        (lambda e: changed(e, RunFinished, exit_code=3, verdict="UNVERIFIED"), "exit code 3"),
        (lambda e: changed(e, KernelJudged, as_expected=False, verdict="DRIFT", reason="slid"), "slid"),
        (lambda e: [event for event in e if not isinstance(event, KernelJudged)], "before this kernel"),
        (lambda e: [], "incomplete"),
    ],
    ids=["cut-off", "drift", "unverified", "kernel", "unjudged", "empty"],
)
def test_junit_is_red_for_what_no_case_explains(events: list[Event], change: Any, said: str) -> None:
    root = parsed(change(healthy(events)))
    assert broken(root) > 0
    messages = [mark.get("message", "") for mark in root.iter() if mark.tag in ("failure", "error")]
    assert any(said in message for message in messages)


def test_a_listed_failure_that_did_not_come_is_a_failure_unless_the_judge_accepts_it(
    events: list[Event],
) -> None:
    record = healthy(events)
    at = next(i for i, e in enumerate(record) if isinstance(e, CaseJudged) and e.expected == "FAIL")
    record[at] = msgspec.structs.replace(record[at], verdict="PASS", failures=())
    assert broken(parsed(record)) == 0
    kernel = record[at].kernel  # type: ignore[union-attr]
    judged = next(i for i, e in enumerate(record) if isinstance(e, KernelJudged) and e.kernel == kernel)
    record[judged] = msgspec.structs.replace(record[judged], as_expected=False)
    (failure,) = parsed(record).findall(".//failure")
    assert "listed to fail" in failure.get("message", "")


def test_junit_holds_only_what_xml_can(events: list[Event]) -> None:
    failure = Failure("crash", "bell \x07, escape \x1b[31m, null \x00, \ufffe", detail="\x0b")
    record = changed(events, CaseJudged, verdict="FAIL", failures=(failure,))
    messages = [mark.get("message", "") for mark in parsed(record).findall(".//failure")]
    assert any("escape \ufffd[31m" in message for message in messages)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(record=st.lists(any_event, max_size=8))
def test_any_events_are_rendered(record: list[Event]) -> None:
    ElementTree.fromstring(junit.render(record))
    json.loads(sarif.render(record))
    assert markdown.render(record).startswith("## attnproof: ")


def test_sarif_structure(events: list[Event]) -> None:
    log = json.loads(sarif.render(events))
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("attnproof", "0.1.0")
    assert run["invocations"][0] | {"toolExecutionNotifications": []} == {
        "executionSuccessful": True,
        "commandLine": "attnproof verify --jobs 2",
        "exitCode": 1,
        "toolExecutionNotifications": [],
    }
    fingerprints = set()
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] == "error" and result["message"]["text"]
        (location,) = result["locations"][0]["logicalLocations"]
        assert re.fullmatch(r"attnproof\.kernels\.\w+:\w+", location["fullyQualifiedName"])
        fingerprints.add(result["partialFingerprints"]["kernelRuleRegime/v1"])
    assert len(fingerprints) == len(run["results"])


def test_sarif_suppresses_what_is_listed(events: list[Event]) -> None:
    results = json.loads(sarif.render(events))["runs"][0]["results"]
    open_results = [result for result in results if "suppressions" not in result]
    summary = summarize(events)
    assert len(results) == len(summary.failures) > len(open_results) == len(summary.unexpected_failures) == 1
    assert open_results[0]["properties"]["kernel"] == "delta.chunked"


def test_sarif_tells_what_the_tool_could_not_do(events: list[Event]) -> None:
    (invocation,) = json.loads(sarif.render(events[:-1]))["runs"][0]["invocations"]
    assert invocation["executionSuccessful"] is False and "exitCode" not in invocation
    levels = [notice["level"] for notice in invocation["toolExecutionNotifications"]]
    assert levels == ["warning", "error"]


def test_sarif_reports_drift(events: list[Event]) -> None:
    record = changed(healthy(events), KernelJudged, verdict="DRIFT", as_expected=False, reason="0.2 was 0.1")
    results = [r for r in json.loads(sarif.render(record))["runs"][0]["results"] if "suppressions" not in r]
    assert [(r["ruleId"], r["properties"]["kernel"]) for r in results] == [("drift", "softmax.attention")]
    assert "0.2 was 0.1" in results[0]["message"]["text"]


def cells(row: str) -> list[str]:
    """The cells of a Markdown table row, split where GitHub splits."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_markdown_has_a_row_for_every_kernel(events: list[Event]) -> None:
    rows = [line for line in markdown.render(events).splitlines() if line.startswith("|")]
    assert {len(cells(row)) for row in rows} == {10}
    table = {cells(row)[0]: cells(row)[1:4] for row in rows[2:]}
    assert len(table) == len(KERNELS)
    assert table["delta.chunked"] == ["FAIL", "**no**", str(count(events, kernel="delta.chunked"))]
    assert table[r"examples.no\_max (example)"][:2] == ["FAIL", "yes"]


def test_markdown_shows_unexpected_failures_only(events: list[Event]) -> None:
    text = markdown.render(events)
    details = text.split("### Failures")[1].split("###")[0]
    assert details.count("<details>") == details.count("</details>") == 1
    assert "delta.chunked" in details and "examples" not in details and "check(attention" in details
    assert "incomplete" not in text and "incomplete" in markdown.render(events[:-1])


def test_markdown_reads_no_text_as_markup(events: list[Event]) -> None:
    script = "print('```')\n</details><script>"
    failure = Failure("exception", f"a | b `c` {HOSTILE}\n\n# title", script=script)
    record = changed(events, CaseJudged, verdict="FAIL", failures=(failure,))
    text = markdown.render(record)
    assert r"a \| b \`c\` \<script\>" in text and r"\# title" in text
    assert f"````python\n{script}\n````" in text


def test_markdown_stays_below_the_limit_of_a_summary(events: list[Event]) -> None:
    huge = Failure("exception", "x" * 100_000, detail="y" * 100_000, script="z" * 7_900)
    record = [
        msgspec.structs.replace(
            event, case=msgspec.structs.replace(event.case, regime=f"r{i}"), verdict="FAIL", failures=(huge,)
        )
        if isinstance(event, CaseJudged)
        else event
        for i, event in enumerate(events)
    ]
    # GitHub's limit for one step.
    assert len(markdown.render(record).encode()) < 2**20
