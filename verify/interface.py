"""The Python face of the judge: one case, or a planned set of cases, with results that print themselves."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hypothesis.database import ExampleDatabase

from attnproof.campaign import Campaign, Limits, judge_kernel
from attnproof.properties.case import APART, Case, CaseError
from attnproof.properties.contract import DTYPES, Contract, ContractError, contract_of
from attnproof.properties.families import family_of
from attnproof.properties.invariants import check_names
from attnproof.properties.regimes import plan
from attnproof.properties.signatures import SIGNATURES
from attnproof.reports.record import CaseJudged, Counterexample, Failure, KernelJudged, RunFinished
from attnproof.suite import default_device
from attnproof.targets import Importable, describe, resolve
from attnproof.trials import Subject, judge_case
from attnproof.worker_replies import check_device
from attnproof.workers import WorkerPool

__all__ = ["CheckResult", "FuzzResult", "VerifyResult", "check", "fuzz", "make_subject", "verify"]

Kernel = Callable[..., Any] | str


@dataclass(frozen=True)
class CheckResult:
    """The verdict on one case.

    Attributes:
        verdict: "PASS", "FAIL", "UNVERIFIED" or "DECLINED".
        failures: what is wrong, each with a reason in words; vacuous: why the case could not have told a
            wrong kernel.
        event: all that was measured.
    """

    verdict: str
    failures: tuple[Failure, ...]
    vacuous: tuple[str, ...]
    event: CaseJudged

    def __bool__(self) -> bool:
        """Whether the verdict is PASS, so that ``assert check(...)`` states a test."""
        return self.verdict == "PASS"

    def __str__(self) -> str:
        lines = [f"{self.verdict}  {self.event.case.id}"]
        lines += [f"  {failure.rule}: {failure.reason}" for failure in self.failures]
        for name, numbers in self.event.outputs.items():
            worst, rms = numbers.worst_certain, numbers.rms_probable
            lines.append(f"  {name}: worst error/certain {worst:.3g}, rms error/probable {rms:.3g}")
        lines += [f"  vacuous: {reason}" for reason in self.vacuous]
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True)
class VerifyResult:
    """The verdict on a kernel over a planned set of cases.

    Attributes:
        verdict: "PASS", "FAIL" or "UNVERIFIED", with ``reason`` in words.
        results: one for each case; failures: those of all cases.
    """

    verdict: str
    reason: str
    results: tuple[CheckResult, ...]

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The failures of all cases, in order."""
        return tuple(
            failure for result in self.results for failure in result.failures if result.verdict == "FAIL"
        )

    def __bool__(self) -> bool:
        return self.verdict == "PASS"

    def __str__(self) -> str:
        bad = [str(result) for result in self.results if result.verdict in ("FAIL", "UNVERIFIED")]
        return "\n".join(
            [f"{self.verdict}: {len(self.results)} cases; {self.reason or 'nothing failed'}", *bad[:5]]
        )

    __repr__ = __str__


def check(
    fn: Kernel,
    case: Case | str,
    *,
    contract: Contract | None = None,
    device: str | None = None,
    isolation: str = "process",
    **declare: Any,
) -> CheckResult:
    """Judge one case of a kernel.

    Args:
        fn: the kernel: a callable, or "package.module:attribute".
        case: a :class:`Case` or its text.
        contract: what the kernel declares; by default the contract attached to it, else one that supports
            every option of the case and promises the contract's defaults.
        device: "cpu", "cuda" or "emulator:sm_80" …; by default the GPU if there is one, else "emulator:sm_90"
            (in which ordinary torch code runs as well).
        isolation: "process", or "none" to run the kernel inside this process for debugging.
        declare: further declarations, as in the contract ("layout", "empty_row", "precision" as a table, …).

    Raises:
        ContractError, CaseError, TargetError: the arguments, not the kernel, are wrong.
    """
    case = Case.parse(case) if isinstance(case, str) else case
    if not isinstance(case, Case):
        raise CaseError(f"case is a {type(case).__name__}; expected an attnproof.Case or its text")
    apart = (*APART, *SIGNATURES[case.family].required)
    options = tuple(name for name, _ in case.options if name not in apart)
    subject = make_subject(fn, case.family, (case.dtype,), options, contract, device, declare)
    if isolation not in ("process", "none"):
        raise ContractError(f"isolation={isolation!r}: expected 'process' or 'none'")
    event = judge_case(subject, case, _pool(isolation).call)
    return CheckResult(event.verdict, event.failures, event.vacuous, event)


def verify(
    fn: Kernel,
    family: str,
    *,
    dtypes: Iterable[str] | None = None,
    options: Iterable[str] | None = None,
    contract: Contract | None = None,
    device: str | None = None,
    examples: int = 120,
    seed: int = 0,
    jobs: int = 2,
    timeout: float = 60.0,
    **declare: Any,
) -> VerifyResult:
    """Judge a kernel over a planned set of cases: every regime, dtype, size class and pair of options.

    Args:
        fn: the kernel: a callable, or "package.module:attribute".
        family: a family of the contract.
        dtypes, options: what to try; by default what the contract attached to the kernel lists.
        contract, device, declare: as for :func:`check`.
        examples: number of cases; seed: of their inputs; jobs: judge processes; timeout: seconds a call.

    Raises:
        ContractError, TargetError: the arguments, not the kernel, are wrong.
    """
    subject = make_subject(fn, family, dtypes, options, contract, device, declare)
    if not isinstance(examples, int) or examples < 1:
        raise ContractError(f"examples={examples!r}: expected a positive number of cases")
    chosen = subject.contract
    cases = plan(
        family,
        dtypes=chosen.dtypes,
        options=subject.options,
        supports=chosen.supports,
        causal_alignment=chosen.causal_alignment,
        budget=examples,
        seed=seed,
    )
    campaign = Campaign([(subject, cases)], "attnproof.verify", seed=seed, jobs=jobs, limits=Limits(timeout))
    events = [event for event in campaign.run() if isinstance(event, CaseJudged)]
    results = tuple(CheckResult(e.verdict, e.failures, e.vacuous, e) for e in events)
    verdict = judge_kernel(subject, events)
    return VerifyResult(verdict.verdict, verdict.reason, results)


@dataclass(frozen=True)
class FuzzResult:
    """What a search for a failure found.

    Attributes:
        verdict: "PASS", "FAIL" or "UNVERIFIED", with ``reason`` in words.
        counterexample: the smallest failing case, what is wrong in words, and a script; None without failure.
        results: one for each case judged; seconds: of the whole search.
    """

    verdict: str
    reason: str
    counterexample: Counterexample | None
    results: tuple[CheckResult, ...]
    seconds: float

    def __bool__(self) -> bool:
        return self.verdict == "PASS"

    def __str__(self) -> str:
        judged = f"{len(self.results)} cases in {self.seconds:.0f} s"
        lines = [f"{self.verdict}: {judged}; {self.reason or 'nothing failed'}"]
        if self.counterexample is not None:
            lines.append(f"  {self.counterexample.case.id}")
            lines += [f"  {line}" for line in (*self.counterexample.tensors, *self.counterexample.sentences)]
        return "\n".join(lines)

    __repr__ = __str__


def fuzz(
    fn: Kernel,
    family: str,
    *,
    dtypes: Iterable[str] | None = None,
    options: Iterable[str] | None = None,
    contract: Contract | None = None,
    device: str | None = None,
    examples: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    jobs: int = 2,
    timeout: float = 30.0,
    database: ExampleDatabase | None = None,
    minimise: bool = True,
    **declare: Any,
) -> FuzzResult:
    """Search for an input on which a kernel is wrong, and make the first one found as small as possible.

    Args:
        fn: the kernel: a callable, or "package.module:attribute".
        family: a family of the contract.
        dtypes, options, contract, device, declare: as for :func:`verify`.
        examples: cases to judge; seconds: of the whole search, 50 unless ``examples`` is given.
        seed: of inputs and choices; jobs: judge threads; timeout: seconds a call.
        database: a Hypothesis database in which failures are kept and from which they are replayed first,
            such as ``hypothesis.database.DirectoryBasedExampleDatabase(".hypothesis/examples")``.
        minimise: whether a failure is made small and put into words.

    Raises:
        ContractError, TargetError: the arguments, not the kernel, are wrong.
    """
    from attnproof.search.engine import DEFAULT_SECONDS, Search

    subject = make_subject(fn, family, dtypes, options, contract, device, declare)
    if examples is not None and (not isinstance(examples, int) or examples < 1):
        raise ContractError(f"examples={examples!r}: expected a positive number of cases, or None")
    if seconds is None and examples is None:
        seconds = DEFAULT_SECONDS
    search = Search(
        subject, "attnproof.fuzz", examples, seconds, seed, jobs, Limits(timeout), database, minimise
    )
    events = list(search.run())
    judged = tuple(
        CheckResult(e.verdict, e.failures, e.vacuous, e) for e in events if isinstance(e, CaseJudged)
    )
    verdict = next(e for e in events if isinstance(e, KernelJudged))
    found = next((e for e in events if isinstance(e, Counterexample)), None)
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    return FuzzResult(verdict.verdict, verdict.reason, found, judged, finished.seconds)


def make_subject(
    fn: Kernel,
    family: str,
    dtypes: Iterable[str] | None,
    options: Iterable[str] | None,
    contract: Contract | None,
    device: str | None,
    declare: Mapping[str, Any],
) -> Subject:
    """A kernel under the contract that its arguments describe.

    Raises:
        ContractError: a family, dtype, option or declaration that the contract does not know.
    """
    definition = family_of(family)
    if contract is None:
        attached = None if isinstance(fn, str) else contract_of(fn)
        attached = (
            _contract_of_target(fn) if isinstance(fn, str) and fn.startswith("attnproof.") else attached
        )
        contract = attached or Contract(family)
    if contract.family != family:
        raise ContractError(f"family={family!r}, but the kernel's contract says {contract.family!r}")
    if dtypes is not None:
        contract = replace(contract, dtypes=_names("dtypes", dtypes, DTYPES))
    if options is not None:
        chosen = _names("options", options, definition.options)
        keep = tuple(dict.fromkeys((*contract.options, *chosen))) if contract.options else chosen
        contract = replace(contract, options=keep)
    if declare:
        contract = contract.declare(declare)
    check_names(contract.without)
    _names("options", contract.options, definition.options)
    device = device or default_device()
    try:
        check_device(device)
    except ValueError as error:
        raise ContractError(str(error)) from None
    source = describe(fn)
    name = source.target if isinstance(source, Importable) else source.label
    return Subject(name, source, contract, device)


def _contract_of_target(target: str) -> Contract | None:
    """The contract beside one of the suite's own kernels.

    Other people's modules are imported in a worker only.
    """
    return contract_of(resolve(target))


def _names(argument: str, given: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    names = tuple([given] if isinstance(given, str) else given)
    allowed = tuple(known)
    for name in names:
        if name not in allowed:
            listed = ", ".join(allowed) or "none"
            raise ContractError(f"{argument}: {name!r} is not among those of the family: {listed}")
    return names


@functools.cache
def _pool(isolation: str) -> WorkerPool:
    """One worker for all checks of this process; closed when it ends."""
    pool = WorkerPool(jobs=1, spares=0, isolation=isolation)  # type: ignore[arg-type]
    atexit.register(pool.close)
    return pool
