"""The tables of a report, computed once from the events of a record; renderers only render.

:func:`summarize` reads the events once, in order, and keeps what the tables need: sums by kernel, regime and
dtype, failures and remarks without their repetitions, and one point a case for the charts. A record that was
cut off has no :class:`~attnproof.reports.record.RunFinished`; all that it holds is summarized all the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from attnproof.reports.record import (
    CaseJudged,
    Counterexample,
    Event,
    Failure,
    Finding,
    KernelJudged,
    KernelStarted,
    OutputStatistics,
    RunFinished,
    RunStarted,
)
from attnproof.reports.tables import (
    INCOMPLETE,
    Cell,
    FailureGroup,
    KernelSummary,
    Outcome,
    Point,
    Remark,
    Run,
    Summary,
    outcome_of,
)
from attnproof.reports.wording import alike, severity, worst

__all__ = ["POINT_LIMIT", "summarize"]

POINT_LIMIT = 3000
"""Points in all charts together; each costs about 250 bytes of page and an SVG element in two charts."""

CASE_IDS_SHOWN = 6
"""Case names kept with a group of failures."""

_UNEXPECTED = (Outcome.FAILED, Outcome.SURVIVED, Outcome.UNVERIFIED)


@dataclass(slots=True)
class _CellTally:
    """Sums over the cases of one kernel, regime and dtype."""

    regime: str
    regime_class: str
    dtype: str
    cases: int = 0
    failed: int = 0
    vacuous: int = 0
    unjudged: int = 0
    certain: float | None = None
    probable: float | None = None
    row: float | None = None
    bias: float | None = None
    square_sum: float = 0.0
    judged: int = 0

    def add(self, event: CaseJudged) -> None:
        self.cases += 1
        self.failed += event.verdict in ("FAIL", "DRIFT")
        self.vacuous += bool(event.vacuous)
        self.unjudged += sum(event.unjudged.values())
        for statistics in event.outputs.values():
            if statistics.judged:
                self._add_output(statistics)

    def _add_output(self, statistics: OutputStatistics) -> None:
        self.certain = worst((self.certain, statistics.worst_certain))
        self.probable = worst((self.probable, statistics.worst_probable))
        self.row = worst((self.row, statistics.row_probable))
        if self.bias is None or severity(abs(statistics.bias)) > severity(abs(self.bias)):
            self.bias = statistics.bias
        # Above about 1e154 the square of a float overflows; by then infinity tells the reader as much.
        rms = abs(statistics.rms_probable)
        self.square_sum += statistics.judged * (rms * rms if rms < 1e150 else rms * math.inf)
        self.judged += statistics.judged

    def frozen(self) -> Cell:
        return Cell(
            regime=self.regime,
            regime_class=self.regime_class,
            dtype=self.dtype,
            cases=self.cases,
            failed=self.failed,
            vacuous=self.vacuous,
            unjudged=self.unjudged,
            worst_certain=self.certain,
            worst_probable=self.probable,
            row_probable=self.row,
            rms_probable=math.sqrt(self.square_sum / self.judged) if self.judged else None,
            bias=self.bias,
        )


@dataclass(slots=True)
class _KernelTally:
    """One kernel, its events so far."""

    started: KernelStarted
    judged: KernelJudged | None = None
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    vacuous: int = 0
    unjudged: int = 0
    seconds: float = 0.0
    cells: dict[tuple[str, str], _CellTally] = field(default_factory=dict)

    def add(self, event: CaseJudged, outcome: Outcome) -> None:
        self.outcomes[outcome] += 1
        self.vacuous += bool(event.vacuous)
        self.unjudged += sum(event.unjudged.values())
        self.seconds += event.seconds
        case = event.case
        key = (case.regime, case.dtype)
        if key not in self.cells:
            self.cells[key] = _CellTally(case.regime, case.regime_class, case.dtype)
        self.cells[key].add(event)

    def frozen(self, index: int) -> KernelSummary:
        """The summary; counts are the judge's where it has spoken, our own where the record was cut off."""
        judged, cells = self.judged, tuple(tally.frozen() for tally in self.cells.values())
        failed = self.outcomes[Outcome.FAILED] + self.outcomes[Outcome.FAILED_AS_LISTED]
        return KernelSummary(
            index=index,
            name=self.started.kernel,
            target=self.started.target,
            family=self.started.family,
            device=self.started.device,
            example=self.started.example,
            contract=self.started.contract,
            planned=self.started.planned,
            verdict=judged.verdict if judged else INCOMPLETE,
            as_expected=judged.as_expected if judged else None,
            reason=judged.reason if judged else "the record ends before this kernel was judged",
            cases=judged.cases if judged else self.outcomes.total(),
            failed=judged.failed if judged else failed,
            unexpected=sum(self.outcomes[outcome] for outcome in _UNEXPECTED),
            vacuous=judged.vacuous if judged else self.vacuous,
            declined=judged.declined if judged else self.outcomes[Outcome.DECLINED],
            unverified=judged.unverified if judged else self.outcomes[Outcome.UNVERIFIED],
            unjudged=self.unjudged,
            seconds=judged.seconds if judged else self.seconds,
            worst_certain=worst(cell.worst_certain for cell in cells),
            row_probable=worst(cell.row_probable for cell in cells),
            cells=cells,
        )


@dataclass(slots=True)
class _FailureTally:
    """Failures by one (kernel, rule, regime, listed); keeps the smallest case, of those with a script."""

    target: str
    event: CaseJudged
    failure: Failure
    count: int = 0
    ratio: float | None = None
    dtypes: dict[str, None] = field(default_factory=dict)
    case_ids: list[str] = field(default_factory=list)

    def add(self, event: CaseJudged, failure: Failure) -> None:
        self.ratio = worst((self.ratio, failure.ratio))
        self.dtypes[event.case.dtype] = None
        if _simplicity(event, failure) < _simplicity(self.event, self.failure):
            self.event, self.failure = event, failure
        # A rule broken by two outputs of one case is still one case.
        if not self.case_ids or self.case_ids[-1] != event.case.id:
            self.count += 1
            if len(self.case_ids) == CASE_IDS_SHOWN:
                self.case_ids.pop()
            self.case_ids.append(event.case.id)

    def frozen(self, kernel: str, rule: str, regime: str, listed: bool) -> FailureGroup:
        shown = self.event.case.id
        return FailureGroup(
            kernel=kernel,
            target=self.target,
            rule=rule,
            regime=regime,
            listed=listed,
            count=self.count,
            dtypes=tuple(self.dtypes),
            worst_ratio=self.ratio,
            failure=self.failure,
            case=self.event.case,
            case_ids=(shown, *(name for name in self.case_ids if name != shown)),
        )


def _simplicity(event: CaseJudged, failure: Failure) -> tuple[bool, int, int]:
    """Sort key: a script first, then few elements, then few options."""
    return (not failure.script, math.prod(event.case.shape.values()), len(event.case.options))


@dataclass(slots=True)
class _Remarks:
    """Remarks without their repetitions: texts that differ in their figures alone count as one."""

    rows: dict[tuple[str, str, str], tuple[str, int, int, str]] = field(default_factory=dict)

    def add(self, event: CaseJudged, text: str, elements: int = 0) -> None:
        key = (event.kernel, event.case.regime, alike(text))
        shown, cases, total, case_id = self.rows.get(key, (text, 0, 0, event.case.id))
        self.rows[key] = (shown, cases + 1, total + elements, case_id)

    def frozen(self) -> tuple[Remark, ...]:
        remarks = [Remark(kernel, regime, *row) for (kernel, regime, _), row in self.rows.items()]
        return tuple(sorted(remarks, key=lambda remark: (-remark.elements, -remark.cases)))


@dataclass(slots=True)
class _Tally:
    """All that is kept while the events go by."""

    runs: list[Run] = field(default_factory=list)
    kernels: list[_KernelTally] = field(default_factory=list)
    current: dict[str, _KernelTally] = field(default_factory=dict)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    failures: dict[tuple[str, str, str, bool], _FailureTally] = field(default_factory=dict)
    remarks: dict[str, _Remarks] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    counterexamples: list[Counterexample] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def take(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.runs.append(Run(event, None))
                self.current = {}
            case KernelStarted():
                self._kernel(event.kernel, event)
            case CaseJudged():
                self._case(event)
            case KernelJudged():
                self._kernel(event.kernel).judged = event
            case Counterexample():
                self.counterexamples.append(event)
            case Finding():
                self.findings.append(event)
            case RunFinished():
                started = self.runs.pop().started if self.runs and not self.runs[-1].finished else None
                self.runs.append(Run(started, event))

    def _kernel(self, name: str, started: KernelStarted | None = None) -> _KernelTally:
        """The tally of a kernel; one without a KernelStarted (a record pieced together) gets a bare one."""
        if started or name not in self.current:
            bare = KernelStarted(name, target="", family="", device="", contract={}, example=False, planned=0)
            self.current[name] = _KernelTally(started or bare)
            self.kernels.append(self.current[name])
        return self.current[name]

    def _case(self, event: CaseJudged) -> None:
        kernel, outcome = self._kernel(event.kernel), outcome_of(event)
        self.outcomes[outcome] += 1
        kernel.add(event, outcome)
        for text in event.vacuous:
            self._remark("vacuous").add(event, text)
        for text, elements in event.unjudged.items():
            self._remark("unjudged").add(event, text, elements)
        if outcome in (Outcome.DECLINED, Outcome.UNVERIFIED, Outcome.SURVIVED):
            self._remark(outcome.name.lower()).add(event, reason_of(event))
        else:
            self._failures(event, kernel.started.target, outcome is Outcome.FAILED_AS_LISTED)
        point = _point(event, kernel.started.example)
        if point:
            self.points.append(point)

    def _failures(self, event: CaseJudged, target: str, listed: bool) -> None:
        broken = event.failures
        if event.verdict != "PASS" and not broken:
            broken = (Failure(rule="unnamed", reason=reason_of(event)),)
        for failure in broken:
            key = (event.kernel, failure.rule, event.case.regime, listed)
            if key not in self.failures:
                self.failures[key] = _FailureTally(target, event, failure)
            self.failures[key].add(event, failure)

    def _remark(self, kind: str) -> _Remarks:
        return self.remarks.setdefault(kind, _Remarks())

    def frozen(self) -> Summary:
        groups = [tally.frozen(*key) for key, tally in self.failures.items()]
        groups.sort(key=lambda group: (group.kernel, group.regime, group.rule))
        return Summary(
            runs=tuple(self.runs),
            kernels=tuple(tally.frozen(index) for index, tally in enumerate(self.kernels)),
            outcomes=dict(self.outcomes),
            failures=tuple(groups),
            vacuous=self._remark("vacuous").frozen(),
            unjudged=self._remark("unjudged").frozen(),
            declined=self._remark("declined").frozen(),
            unverified=self._remark("unverified").frozen(),
            survived=self._remark("survived").frozen(),
            findings=tuple(self.findings),
            counterexamples=tuple(self.counterexamples),
            points=tuple(_thinned(self.points, POINT_LIMIT)),
            points_total=len(self.points),
        )


def summarize(events: Iterable[Event]) -> Summary:
    """The tables of the record ``events``, read once; it need not be complete, and may hold several runs."""
    tally = _Tally()
    for event in events:
        tally.take(event)
    return tally.frozen()


def reason_of(event: CaseJudged) -> str:
    """Why a case came out as it did, in words: the reasons of its failures, or that none was recorded."""
    return "; ".join(failure.reason for failure in event.failures) or "no reason was recorded"


def _point(event: CaseJudged, example: bool) -> Point | None:
    """The case as a point, or None where nothing in it was judged."""
    judged = [statistics for statistics in event.outputs.values() if statistics.judged]
    certain = worst(statistics.worst_certain for statistics in judged)
    row = worst(statistics.row_probable for statistics in judged)
    if certain is None or row is None:
        return None
    case = event.case
    return Point(
        kernel=event.kernel,
        example=example,
        regime=case.regime,
        dtype=case.dtype,
        length=case.shape.get("N"),
        logit=worst(statistics.logit_magnitude for statistics in judged),
        certain=certain,
        row=row,
        case_id=case.id,
    )


def _thinned(points: list[Point], limit: int) -> list[Point]:
    """At most ``limit`` points: the worst ones by error/certain of ever coarser bins of N and |logit|."""
    fineness = 4
    while len(points) > limit and fineness:
        kept: dict[tuple[object, ...], Point] = {}
        for point in points:
            length = round(math.log2(1 + (point.length or 0)) * fineness)
            logit = point.logit if point.logit is not None and math.isfinite(point.logit) else 0.0
            key = (
                point.kernel,
                point.regime,
                point.dtype,
                length,
                round(math.log2(1 + abs(logit)) * fineness),
            )
            if key not in kept or severity(point.certain) > severity(kept[key].certain):
                kept[key] = point
        points, fineness = list(kept.values()), fineness // 2
    return (
        sorted(points, key=lambda point: severity(point.certain))[-limit:] if len(points) > limit else points
    )
