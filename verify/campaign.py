"""Campaigns: many cases through many kernels, spread over judge processes, told as a stream of events.

Each job is a judge process with a worker process of its own for the kernel at hand, so that certifying
references and running kernels proceed side by side on all cores. Events reach the caller in the order in
which they happen.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import multiprocessing.connection
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from attnproof.processes import context, without_main
from attnproof.properties.case import Case
from attnproof.reports.record import (
    SCHEMA_VERSION,
    CaseJudged,
    Event,
    Failure,
    Finding,
    KernelJudged,
    KernelStarted,
    RunFinished,
    RunStarted,
)
from attnproof.targets import Importable
from attnproof.trials import Subject, case_record, judge_case
from attnproof.workers import WorkerPool

__all__ = [
    "Campaign",
    "Limits",
    "judge_kernel",
    "kernel_started",
    "run_finished",
    "run_started",
    "worst_verdict",
]

# A kernel that declines or cannot tell in more than this share of its cases has not been verified.
_DECLINED_SHARE = 0.5
_VACUOUS_SHARE = 0.2
_ORDER = ("PASS", "UNVERIFIED", "DRIFT", "FAIL")
# Regimes that the reason of a verdict names; the others are in the record.
_TOLD = 4
# Cases that one judge process takes at a time: starting a worker for a kernel costs seconds.
_UNIT = 60


@dataclass(frozen=True)
class Limits:
    """What a worker may use: seconds a call, bytes beyond the idle worker."""

    timeout: float = 60.0
    memory: int = 4 << 30


def worst_verdict(verdicts: Iterable[str]) -> str:
    """FAIL outranks DRIFT outranks UNVERIFIED outranks PASS; PASS for none."""
    return max(verdicts, key=_ORDER.index, default="PASS")


@dataclass(frozen=True)
class InvariantAt:
    """An invariant, by its name, to be put to a kernel at a case."""

    invariant: str
    case: Case


Item = Case | InvariantAt


@dataclass(frozen=True)
class Campaign:
    """Kernels with the cases that each shall go through.

    Attributes:
        plan: (subject, cases, or invariants at cases) in the order in which they are judged.
        command, seed: for the record; findings: told before the kernels.
        jobs: judge processes; limits: of each worker; seconds: no new case is begun after this many, or None.
    """

    plan: Sequence[tuple[Subject, Sequence[Item]]]
    command: str
    seed: int = 0
    findings: Iterable[Finding] = ()
    jobs: int = 2
    limits: Limits = field(default_factory=Limits)
    seconds: float | None = None

    def run(self) -> Iterator[Event]:
        """Judge everything; the last event is :class:`RunFinished` unless the caller stops before."""
        begun = time.perf_counter()
        yield run_started(self.command, self.seed, self.jobs)
        yield from self.findings
        for subject, cases in self.plan:
            yield kernel_started(subject, len(cases))
        judged: dict[str, list[CaseJudged]] = defaultdict(list)
        remaining = {subject.name: len(cases) for subject, cases in self.plan}
        subjects = {subject.name: subject for subject, _ in self.plan}
        results = []
        for event in self._judged_cases(begun):
            judged[event.kernel].append(event)
            yield event
            remaining[event.kernel] -= 1
            if remaining[event.kernel] == 0:
                results.append(judge_kernel(subjects[event.kernel], judged[event.kernel]))
                yield results[-1]
        for name, count in remaining.items():
            if count:
                results.append(judge_kernel(subjects[name], judged[name]))
                yield results[-1]
        yield run_finished(results, time.perf_counter() - begun)

    def _judged_cases(self, begun: float) -> Iterator[CaseJudged]:
        units = [
            (subject, list(cases[start : start + _UNIT]))
            for subject, cases in self.plan
            for start in range(0, len(cases), _UNIT)
        ]
        units.reverse()
        spawning = context()
        # A worker is started ahead only where another kernel follows.
        spares = int(len(self.plan) > 1)
        jobs = [_Job(spawning, self.limits, spares) for _ in range(max(1, min(self.jobs, len(units))))]
        try:
            for job in jobs:
                job.next_unit(units)
            while busy := [job for job in jobs if job.pending]:
                for job in _ready(busy):
                    yield from job.receive()
                    late = self.seconds is not None and time.perf_counter() - begun > self.seconds
                    if late:
                        units.clear()
                        job.abandon()
                    elif not job.pending:
                        job.next_unit(units)
        finally:
            for job in jobs:
                job.close()


class _Job:
    """The caller's end of one judge process."""

    def __init__(self, context: Any, limits: Limits, spares: int) -> None:
        self._context, self._limits, self._spares = context, limits, spares
        self.pending: list[Item] = []
        self._subject: Subject | None = None
        self._start()

    def _start(self) -> None:
        self.connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_judge_process, args=(theirs, self._limits, self._spares)
        )
        with without_main():
            self._process.start()
        theirs.close()

    def next_unit(self, units: list[tuple[Subject, list[Item]]]) -> None:
        """Take the next unit, one of the same kernel if there is one."""
        if not units:
            return
        same = [
            i for i, (subject, _) in enumerate(units) if self._subject and subject.name == self._subject.name
        ]
        self._subject, self.pending = units.pop(same[-1] if same else -1)
        self.connection.send((self._subject, self.pending))
        self.pending = list(self.pending)

    def receive(self) -> list[CaseJudged]:
        """The next judged case; if the judge process died, that case as UNVERIFIED, and a new process."""
        try:
            event = msgspec.msgpack.decode(self.connection.recv_bytes(), type=CaseJudged)
            self.pending.pop(0)
        except (EOFError, OSError):
            assert self._subject is not None
            item = self.pending.pop(0)
            case = item if isinstance(item, Case) else item.case
            failure = Failure("checker", f"the judge process died (exit code {self._process.exitcode})")
            event = CaseJudged(self._subject.name, case_record(case), "UNVERIFIED", "PASS", (failure,))
            self.close()
            self._start()
            self.connection.send((self._subject, self.pending))
        return [event]

    def abandon(self) -> None:
        """Leave the pending cases unjudged."""
        self.pending = []

    def close(self) -> None:
        """End the process, and with it its worker."""
        self.connection.close()
        self._process.join(timeout=5.0)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _ready(jobs: Sequence[_Job]) -> list[_Job]:
    by_connection: dict[Any, _Job] = {job.connection: job for job in jobs}
    return [by_connection[connection] for connection in multiprocessing.connection.wait(list(by_connection))]


def _judge_process(connection: Connection, limits: Limits, spares: int) -> None:
    """Judge units that arrive until the other end closes."""
    torch.set_num_threads(1)
    with WorkerPool(jobs=1, spares=spares, timeout=limits.timeout, memory_limit=limits.memory) as pool:
        try:
            while True:
                subject, items = connection.recv()
                for item in items:
                    connection.send_bytes(msgspec.msgpack.encode(_judge(subject, item, pool)))
        except (EOFError, OSError, KeyboardInterrupt):
            return


def _judge(subject: Subject, item: Item, pool: WorkerPool) -> CaseJudged:
    if isinstance(item, Case):
        return judge_case(subject, item, pool.call)
    # Imported here because the judge of invariants ranks verdicts as campaigns do.
    from attnproof.invariance import INVARIANTS, judge_invariant

    return judge_invariant(subject, INVARIANTS[item.invariant], item.case, pool.call)


def run_started(command: str, seed: int, jobs: int) -> RunStarted:
    """The first event of a run on this machine."""
    return RunStarted(
        schema=SCHEMA_VERSION,
        command=command,
        version=importlib.metadata.version("attnproof"),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=seed,
        platform={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "system": platform.system(),
            "jobs": str(jobs),
        },
    )


def judge_kernel(subject: Subject, cases: Sequence[CaseJudged]) -> KernelJudged:
    """The verdict on a kernel: PASS if nothing failed or stayed unverified and ≤ 20 % of cases are vacuous.

    An example is as expected when it FAILs in every case in which theory says so, in at least one, and in no
    other.
    """
    # An invariant that does not apply to what a kernel takes is none that it declines.
    cases = [case for case in cases if not (case.invariant and case.verdict == "DECLINED")]
    counts = {
        verdict: sum(c.verdict == verdict for c in cases) for verdict in ("FAIL", "UNVERIFIED", "DECLINED")
    }
    tried = [c for c in cases if c.verdict != "DECLINED"]
    vacuous = sum(any(reason.startswith("accuracy") for reason in c.vacuous) for c in tried)
    declined = counts["DECLINED"]
    if counts["FAIL"]:
        verdict, reason = "FAIL", f"{counts['FAIL']} of {len(cases)} cases failed"
    elif counts["UNVERIFIED"]:
        verdict, reason = "UNVERIFIED", f"{counts['UNVERIFIED']} cases could not be checked"
    elif not cases:
        verdict, reason = "UNVERIFIED", "no case was judged"
    elif declined > _DECLINED_SHARE * len(cases):
        verdict, reason = "UNVERIFIED", f"the kernel declined {declined} of {len(cases)} cases"
    elif vacuous > _VACUOUS_SHARE * len(tried):
        verdict, reason = "UNVERIFIED", f"{vacuous} of {len(tried)} cases could not have told a wrong kernel"
    else:
        verdict, reason = "PASS", ""
    unexpected = _unexpected(cases)
    as_expected = not unexpected and verdict == ("FAIL" if subject.example else "PASS")
    return KernelJudged(
        kernel=subject.name,
        verdict=verdict,
        as_expected=as_expected,
        reason="; ".join(filter(None, (reason, *unexpected))),
        cases=len(cases),
        failed=counts["FAIL"],
        vacuous=vacuous,
        declined=declined,
        unverified=counts["UNVERIFIED"],
        seconds=sum(c.seconds for c in cases),
    )


def _unexpected(cases: Sequence[CaseJudged]) -> list[str]:
    """Regimes and dtypes with a case whose verdict is not the one that it must get."""
    missed: dict[str, int] = defaultdict(int)
    for case in cases:
        if case.verdict in ("PASS", "FAIL") and case.verdict != case.expected:
            missed[f"{case.case.regime}/{case.case.dtype} {case.verdict} where {case.expected} is due"] += 1
    told = [f"{words} ({count} cases)" for words, count in sorted(missed.items())]
    more = len(told) - _TOLD
    return told if more <= 0 else [*told[:_TOLD], f"and {more} more regimes"]


def kernel_started(subject: Subject, planned: int) -> KernelStarted:
    """The event with which a kernel comes under judgement."""
    target = subject.source.target if isinstance(subject.source, Importable) else subject.source.label
    return KernelStarted(
        kernel=subject.name,
        target=target,
        family=subject.contract.family,
        device=subject.device,
        contract=asdict(subject.judged_by),
        example=subject.example,
        planned=planned,
    )


def run_finished(results: Sequence[KernelJudged], seconds: float) -> RunFinished:
    """The run's verdict: PASS when every kernel came out as listed."""
    wrong = [result for result in results if not result.as_expected]
    verdict = worst_verdict("FAIL" if r.failed or r.verdict == "PASS" else r.verdict for r in wrong)
    if not results:
        verdict = "UNVERIFIED"
    reason = "; ".join(f"{r.kernel}: {r.reason or r.verdict}" for r in wrong)
    return RunFinished(verdict, {"PASS": 0, "UNVERIFIED": 3}.get(verdict, 1), seconds, reason)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def run_events(campaign: Campaign, handlers: Sequence[Callable[[Event], None]]) -> RunFinished:
    """Run a campaign, hand every event to every handler, and return the last."""
    last: Event | None = None
    for event in campaign.run():
        for handler in handlers:
            handler(event)
        last = event
    assert isinstance(last, RunFinished)
    return last
