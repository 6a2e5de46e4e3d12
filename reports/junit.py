"""The JUnit XML report: one test suite a kernel, one test case a case.

What was listed to fail and failed is a passed test; what was listed and did not is a failed one. Unverified
cases are errors, declined ones skipped. A verdict that no case explains (drift, a record cut off, too many
vacuous cases) gets a test case of its own, so that the file holds a failure or an error whenever the run's
exit code is not 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.etree import ElementTree

from attnproof.reports.record import CaseJudged, Event, KernelJudged, KernelStarted, RunFinished, RunStarted
from attnproof.reports.summary import reason_of
from attnproof.reports.tables import Outcome, outcome_of

__all__ = ["render"]

DETAIL_LIMIT = 6000
"""Characters of a failure's text; the record holds all of it."""

# What XML 1.0 cannot hold, not even escaped: control characters, surrogates, U+FFFE and U+FFFF.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(slots=True)
class _Suite:
    """The test cases of one kernel."""

    name: str
    target: str = ""
    judged: KernelJudged | None = None
    cases: list[ElementTree.Element] = field(default_factory=list)
    survived: list[tuple[ElementTree.Element, CaseJudged]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, event: CaseJudged) -> None:
        seconds = event.seconds if math.isfinite(event.seconds) else 0.0
        element = _case(self.name, event.case.id, seconds)
        self.seconds += seconds
        self.cases.append(element)
        match outcome_of(event):
            case Outcome.FAILED:
                _mark(element, "failure", reason_of(event), _text(event), _rules(event))
            case Outcome.UNVERIFIED:
                _mark(element, "error", reason_of(event), _text(event), "UNVERIFIED")
            case Outcome.DECLINED:
                _mark(element, "skipped", reason_of(event))
            case Outcome.FAILED_AS_LISTED:
                note = ElementTree.SubElement(element, "system-out")
                note.text = _fit(f"failed as listed: {reason_of(event)}")
            case Outcome.SURVIVED:
                self.survived.append((element, event))

    def element(self) -> ElementTree.Element:
        """The suite; the judge's word decides whether a listed failure that did not come counts."""
        if not (self.judged and self.judged.as_expected):
            for element, event in self.survived:
                reason = f"listed to fail in {event.case.regime}, {event.case.dtype}, and it passed"
                _mark(element, "failure", reason, reason, "not caught")
        if self.judged is None:
            self._verdict("error", "the record ends before this kernel was judged", "INCOMPLETE")
        elif not self.judged.as_expected and not any(map(_broken, self.cases)):
            kind = "error" if self.judged.verdict == "UNVERIFIED" else "failure"
            self._verdict(kind, self.judged.reason or "not as expected", self.judged.verdict)
        return _suite_element(self.name, self.target, self.cases, self.seconds)

    def _verdict(self, kind: str, reason: str, verdict: str) -> None:
        element = _case(self.name, "verdict over all cases", 0.0)
        _mark(element, kind, reason, reason, verdict)
        self.cases.append(element)


def render(events: Iterable[Event]) -> str:
    """The record ``events`` as JUnit XML, declaration included; the events are read once."""
    suites: list[_Suite] = []
    current: dict[str, _Suite] = {}
    ends: list[RunFinished | None] = []
    for event in events:
        match event:
            case RunStarted():
                current = {}
                ends.append(None)
            case RunFinished():
                ends[-1:] = [event]
            case KernelStarted():
                current[event.kernel] = _Suite(event.kernel, event.target)
                suites.append(current[event.kernel])
            case CaseJudged() | KernelJudged():
                if event.kernel not in current:
                    current[event.kernel] = _Suite(event.kernel)
                    suites.append(current[event.kernel])
                if isinstance(event, CaseJudged):
                    current[event.kernel].add(event)
                else:
                    current[event.kernel].judged = event
    elements = [suite.element() for suite in suites]
    explained = any(_broken(case) for suite in elements for case in suite.iter("testcase"))
    elements.append(_run_suite(ends or [None], explained))
    root = ElementTree.Element("testsuites", _totals(elements))
    root.extend(elements)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _run_suite(ends: list[RunFinished | None], explained: bool) -> ElementTree.Element:
    """One test case a run: its record is complete, and its exit code is 0 or explained by the kernels."""
    cases = []
    for number, end in enumerate(ends, 1):
        element = _case("attnproof", f"run {number}" if len(ends) > 1 else "run", 0.0)
        if end is None:
            reason = "the record is incomplete: it ends before the run did"
            _mark(element, "error", reason, reason, "INCOMPLETE")
        elif end.exit_code and not explained:
            kind = "error" if end.verdict == "UNVERIFIED" else "failure"
            reason = end.reason or f"exit code {end.exit_code}"
            _mark(element, kind, reason, reason, end.verdict)
        cases.append(element)
    return _suite_element("attnproof", "", cases, 0.0)


def _case(kernel: str, name: str, seconds: float) -> ElementTree.Element:
    attributes = {"classname": _fit(kernel), "name": _fit(name), "time": f"{seconds:.4f}"}
    return ElementTree.Element("testcase", attributes)


def _mark(element: ElementTree.Element, kind: str, message: str, text: str = "", type_: str = "") -> None:
    """Put a failure, an error or a skip into a test case."""
    mark = ElementTree.SubElement(
        element, kind, {"message": _fit(message)} | ({"type": _fit(type_)} if type_ else {})
    )
    mark.text = _fit(text) or None


def _suite_element(
    name: str, target: str, cases: list[ElementTree.Element], seconds: float
) -> ElementTree.Element:
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": str(sum(case.find("error") is not None for case in cases)),
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
    }
    suite = ElementTree.Element("testsuite", {"name": _fit(name)} | counts | {"time": f"{seconds:.4f}"})
    if target:
        properties = ElementTree.SubElement(suite, "properties")
        ElementTree.SubElement(properties, "property", {"name": "target", "value": _fit(target)})
    suite.extend(cases)
    return suite


def _totals(suites: list[ElementTree.Element]) -> dict[str, str]:
    names = ("tests", "failures", "errors", "skipped")
    return {"name": "attnproof"} | {
        key: str(sum(int(suite.get(key, "0")) for suite in suites)) for key in names
    }


def _broken(case: ElementTree.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def _rules(event: CaseJudged) -> str:
    return ", ".join(dict.fromkeys(failure.rule for failure in event.failures)) or event.verdict


def _text(event: CaseJudged) -> str:
    """Reasons, details and scripts of a case's failures."""
    parts = [
        part
        for f in event.failures
        for part in (f"{f.rule}: {f.reason}", f.detail[:DETAIL_LIMIT], f.script)
        if part
    ]
    return "\n\n".join(parts)


def _fit(text: str) -> str:
    """``text`` with U+FFFD for every character that no XML file may hold."""
    return _UNFIT.sub("\ufffd", text)
