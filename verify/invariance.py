"""Invariants put to a kernel: its calls on a case and on variants of it, each judged, then held together.

``relations`` says what results may differ by, and why no kernel is accused whose results each pass.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

from attnproof.campaign import worst_verdict
from attnproof.properties.case import Case, make_inputs
from attnproof.properties.contract import Contract
from attnproof.properties.invariants import INVARIANTS, Call, Invariant, Plan, check_names, invariants_for
from attnproof.relations import broken, results_of
from attnproof.reports.record import CaseJudged, Failure
from attnproof.targets import Importable
from attnproof.trials import Caller, JudgedCall, Subject, case_record, judge_call, reproduction

__all__ = ["INVARIANTS", "check_names", "invariants_for", "judge_invariant", "places"]

# Rules against calibrated thresholds, which hold for the kind of values that they were fitted on.
_STATISTICAL = ("probable-row", "probable-output", "bias")


def judge_invariant(
    subject: Subject, invariant: Invariant, case: Case, call: Caller, base: JudgedCall | None = None
) -> CaseJudged:
    """Call ``subject`` on ``case`` and its variants by ``call``, judge each call, then their relation.

    Args:
        subject, case, call: as for :func:`attnproof.trials.judge_call`.
        invariant: one of :func:`invariants_for`.
        base: the case already judged, in place of a call of its own where the invariant starts from it.

    Returns:
        The event of the case. A call that fails does so under its own rule, with the invariant and the
        variant in the reason; a broken relation under the invariant's name. DECLINED where the invariant does
        not apply, the kernel declines one of the calls, or it has none of the gradients that are compared.
        ``outputs`` and ``vacuous`` are those of the first call. Never raises for what the kernel does; a
        failure of the checker gives UNVERIFIED.
    """
    begun = time.perf_counter()
    judged: list[JudgedCall] = []
    try:
        inputs = base.inputs if base is not None and base.inputs is not None else make_inputs(case)
        plan = invariant.variants(case, inputs, subject.contract)
        if plan is None:
            failures: tuple[Failure, ...] = (_inapplicable(invariant),)
        else:
            for planned in plan.calls:
                judged.append(_called(subject, planned, call, base if planned.case is case else None))
                if judged[-1].event.verdict in ("DECLINED", "UNVERIFIED") or _untold(plan, judged[0]):
                    break
            failures = _failures(invariant, plan, judged)
    except Exception as error:
        failures = (Failure("checker", f"the checker failed: {type(error).__name__}: {error}"),)
    script = _script(subject, invariant, case)
    failures = tuple(
        failure if failure.rule in ("checker", "declined") else _changed(failure, script=script)
        for failure in failures
    )
    events = [one.event for one in judged]
    return CaseJudged(
        kernel=subject.name,
        case=case_record(case),
        verdict=_verdict(failures),
        expected=worst_verdict(event.expected for event in events if event.expected in ("PASS", "FAIL")),
        failures=failures,
        vacuous=events[0].vacuous if events else (),
        unjudged=dict(events[0].unjudged) if events else {},
        outputs=dict(events[0].outputs) if events else {},
        seconds=time.perf_counter() - begun,
        kernel_seconds=sum(event.kernel_seconds for event in events),
        invariant=invariant.name,
    )


def places(contract: Contract, cases: Sequence[Case], each: int) -> Iterator[tuple[Invariant, Case]]:
    """Every invariant that a kernel under ``contract`` promises, at ``each`` of the cases that it applies to.

    The cases chosen are of different dtypes where there are several, and not the same ones for all; every
    other one has cotangents where such cases are given.
    """
    for number, invariant in enumerate(invariants_for(contract.family, contract)):
        suited = [case for case in cases if invariant.applicable(case, contract)]
        start = number % max(len(suited), 1)
        by_dtype: dict[str, list[Case]] = {}
        for case in (*suited[start:], *suited[:start]):
            by_dtype.setdefault(case.dtype, []).append(case)
        for place, found in enumerate(itertools.islice(by_dtype.values(), each)):
            asked = (number + place) % 2 == 0
            yield (
                invariant,
                next((case for case in found if bool(case.option("cotangents")) == asked), found[0]),
            )


def _called(subject: Subject, planned: Call, call: Caller, base: JudgedCall | None) -> JudgedCall:
    if base is not None and not planned.repeat:
        return base
    return judge_call(subject, planned.case, call, planned.inputs, repeat=planned.repeat)


def _verdict(failures: Sequence[Failure]) -> str:
    rules = {failure.rule for failure in failures}
    if rules - {"declined", "checker"}:
        return "FAIL"
    if "checker" in rules:
        return "UNVERIFIED"
    return "DECLINED" if rules else "PASS"


def _failures(invariant: Invariant, plan: Plan, judged: Sequence[JudgedCall]) -> tuple[Failure, ...]:
    """Those of each call, then those of the relations between calls that returned what was asked."""
    failures: list[Failure] = []
    for planned, one in zip(plan.calls, judged, strict=False):
        for failure in one.event.failures:
            if planned.familiar or failure.rule not in _STATISTICAL:
                words = f"{invariant.name}, {planned.words} ({planned.case.id}): {failure.reason}"
                failures.append(_changed(failure, reason=words))
    if any(one.trial is None or not one.outputs for one in judged):
        return tuple(failures)
    if _untold(plan, judged[0]):
        return (
            *failures,
            Failure("declined", f"{invariant.name} is about gradients, and the kernel returned none"),
        )
    if len(judged) < len(plan.calls):
        return tuple(failures)
    results = [results_of(planned, one) for planned, one in zip(plan.calls, judged, strict=True)]
    for relation in plan.relations:
        failures += broken(invariant, plan, relation, results)
    return tuple(failures)


def _untold(plan: Plan, first: JudgedCall) -> bool:
    """Whether a kernel without gradients leaves nothing to compare: all relations are between gradients."""
    outputs = {name for relation in plan.relations for name in relation.outputs}
    return bool(first.outputs) and all(name.startswith("d") and name not in first.outputs for name in outputs)


def _changed(failure: Failure, **changes: str) -> Failure:
    fields = {name: getattr(failure, name) for name in failure.__struct_fields__}
    return Failure(**{**fields, **changes})


def _inapplicable(invariant: Invariant) -> Failure:
    return Failure("declined", f"{invariant.name} does not apply to this case under the kernel's contract")


def _script(subject: Subject, invariant: Invariant, case: Case) -> str:
    """A script that puts the invariant to the kernel again on the case, and prints verdict and failures."""
    target = subject.source.target if isinstance(subject.source, Importable) else subject.name
    declarations = reproduction(subject, case).rpartition("result = ")[0]
    return declarations + (
        "from attnproof.interface import make_subject\n"
        "from attnproof.invariance import INVARIANTS, judge_invariant\n"
        "from attnproof.workers import WorkerPool\n\n"
        f"subject = make_subject({target!r}, case.family, None, None, contract, {subject.device!r}, {{}})\n"
        "with WorkerPool(jobs=1, spares=0) as pool:\n"
        f"    event = judge_invariant(subject, INVARIANTS[{invariant.name!r}], case, pool.call)\n"
        "print(event.verdict, *(f'{f.rule}: {f.reason}' for f in event.failures), sep='\\n')\n"
    )
