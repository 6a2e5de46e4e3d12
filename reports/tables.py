"""The rows that reports show: plain immutable data, computed by :mod:`attnproof.reports.summary`.

Ratios are error over budget, without unit; None where no case gave one. Elements are tensor elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from attnproof.reports.record import (
    CaseJudged,
    CaseRecord,
    Counterexample,
    Failure,
    Finding,
    RunFinished,
    RunStarted,
)

__all__ = [
    "INCOMPLETE",
    "Cell",
    "FailureGroup",
    "KernelSummary",
    "Outcome",
    "Point",
    "Remark",
    "Run",
    "Summary",
    "outcome_of",
]

INCOMPLETE = "INCOMPLETE"
"""Stands for the verdict of a run whose record has no end, and of a kernel that was not judged to its end."""

_RANK = ("PASS", "UNVERIFIED", INCOMPLETE, "DRIFT", "FAIL")


class Outcome(StrEnum):
    """What came out of a case, held against what was listed for it."""

    PASSED = "passed"
    FAILED = "failed"
    FAILED_AS_LISTED = "failed as listed"
    SURVIVED = "passed, though listed to fail"
    UNVERIFIED = "unverified"
    DECLINED = "declined"


def outcome_of(event: CaseJudged) -> Outcome:
    """The outcome of one case; a verdict that this version does not know counts as unverified."""
    listed = event.expected == "FAIL"
    match event.verdict:
        case "PASS":
            return Outcome.SURVIVED if listed else Outcome.PASSED
        case "FAIL" | "DRIFT":
            return Outcome.FAILED_AS_LISTED if listed else Outcome.FAILED
        case "DECLINED":
            return Outcome.DECLINED
        case _:
            return Outcome.UNVERIFIED


@dataclass(frozen=True, slots=True)
class Cell:
    """One kernel in one regime and dtype, over all its cases and outputs.

    Attributes:
        failed: cases that failed, listed or not.
        vacuous: cases with at least one property that they cannot tell a wrong kernel by.
        unjudged: elements that the contract leaves open.
        worst_certain, worst_probable, row_probable: the largest over cases and outputs.
        rms_probable: root mean square of error/probable over all judged elements of all cases.
        bias: the mean signed error/probable that is farthest from 0.
    """

    regime: str
    regime_class: str
    dtype: str
    cases: int
    failed: int
    vacuous: int
    unjudged: int
    worst_certain: float | None
    worst_probable: float | None
    row_probable: float | None
    rms_probable: float | None
    bias: float | None


@dataclass(frozen=True, slots=True)
class KernelSummary:
    """One kernel of one run. ``index`` is its place among the kernels of the summary.

    ``verdict`` is INCOMPLETE and ``as_expected`` None where the record ends before the kernel was judged.
    ``unexpected`` counts cases that came out otherwise than listed: unlisted failures, listed ones that did
    not come, and what was left unverified.
    """

    index: int
    name: str
    target: str
    family: str
    device: str
    example: bool
    contract: dict[str, Any]
    planned: int
    verdict: str
    as_expected: bool | None
    reason: str
    cases: int
    failed: int
    unexpected: int
    vacuous: int
    declined: int
    unverified: int
    unjudged: int
    seconds: float
    worst_certain: float | None
    row_probable: float | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Failures of one kernel by one rule in one regime; ``failure`` is of the smallest case with a script.

    Attributes:
        listed: the suite lists these cases to fail.
        count: cases in which the rule was broken.
        worst_ratio: the largest error/budget among them.
        case_ids: some of the cases, the one shown first.
    """

    kernel: str
    target: str
    rule: str
    regime: str
    listed: bool
    count: int
    dtypes: tuple[str, ...]
    worst_ratio: float | None
    failure: Failure
    case: CaseRecord
    case_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Remark:
    """Cases of one kernel and regime about which the same was said, figures apart; ``case_id`` is one."""

    kernel: str
    regime: str
    text: str
    cases: int
    elements: int
    case_id: str


@dataclass(frozen=True, slots=True)
class Point:
    """One case in the charts: its length N, largest |logit|, and worst ratios over its outputs."""

    kernel: str
    example: bool
    regime: str
    dtype: str
    length: int | None
    logit: float | None
    certain: float
    row: float
    case_id: str


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the record; ``finished`` is None where the record was cut off."""

    started: RunStarted | None
    finished: RunFinished | None

    @property
    def verdict(self) -> str:
        """The recorded verdict, or INCOMPLETE."""
        return self.finished.verdict if self.finished else INCOMPLETE


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that a report shows.

    Attributes:
        outcomes: cases by outcome.
        vacuous, unjudged, declined, unverified, survived: remarks, most cases first.
        points: at most :data:`~attnproof.reports.summary.POINT_LIMIT`; ``points_total`` is what there were.
    """

    runs: tuple[Run, ...]
    kernels: tuple[KernelSummary, ...]
    outcomes: dict[Outcome, int]
    failures: tuple[FailureGroup, ...]
    vacuous: tuple[Remark, ...]
    unjudged: tuple[Remark, ...]
    declined: tuple[Remark, ...]
    unverified: tuple[Remark, ...]
    survived: tuple[Remark, ...]
    findings: tuple[Finding, ...]
    counterexamples: tuple[Counterexample, ...]
    points: tuple[Point, ...]
    points_total: int

    @property
    def verdict(self) -> str:
        """The gravest verdict of the runs: FAIL, DRIFT, INCOMPLETE, UNVERIFIED, PASS."""
        return max((run.verdict for run in self.runs), key=verdict_rank, default=INCOMPLETE)

    @property
    def complete(self) -> bool:
        """Whether every run has its end, and there is one."""
        return bool(self.runs) and all(run.finished for run in self.runs)

    @property
    def cases(self) -> int:
        """Cases in the record."""
        return sum(self.outcomes.values())

    @property
    def unexpected_failures(self) -> tuple[FailureGroup, ...]:
        """Failures that the suite does not list."""
        return tuple(group for group in self.failures if not group.listed)

    @property
    def listed_failures(self) -> tuple[FailureGroup, ...]:
        """Failures of examples, where the suite lists them."""
        return tuple(group for group in self.failures if group.listed)


def verdict_rank(verdict: str) -> int:
    """Gravity of a verdict; one that this version does not know ranks with UNVERIFIED."""
    return _RANK.index(verdict if verdict in _RANK else "UNVERIFIED")
