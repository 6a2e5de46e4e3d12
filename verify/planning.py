"""Which kernels a run judges, and through which cases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources

import msgspec

from attnproof.campaign import InvariantAt, Item
from attnproof.equivalence import equal_forms
from attnproof.interface import make_subject
from attnproof.invariance import places
from attnproof.ledger import chosen, run
from attnproof.outcomes import CallRequest, Raised, Returned
from attnproof.properties.case import Case
from attnproof.properties.contract import ContractError
from attnproof.properties.families import FAMILIES, family_of
from attnproof.properties.regimes import plan
from attnproof.properties.regimes.opening import opening
from attnproof.reports.record import Finding
from attnproof.suite import STATE_FORMS, subjects
from attnproof.targets import TargetError
from attnproof.trials import Subject, judge_case
from attnproof.workers import WorkerPool

__all__ = ["DEFAULT_EXAMPLES", "default_plan", "findings", "target_subjects"]

# Cases for each of the suite's kernels in a default run. Forms of one family with a state take turns with its
# cases, so that together they go through all regimes, dtypes and pairs of options.
DEFAULT_EXAMPLES: Mapping[str, int] = {
    "softmax": 160,
    "logsumexp": 80,
    "softmax_rows": 80,
    **dict.fromkeys(STATE_FORMS, 12),
    **dict.fromkeys(("sigmoid", "relu", "batch_normalised", "scaled_head", "differential", "easy"), 64),
}
_STORED = ("calibration", "gradient_alarms", "growth", "long", "detection")
_FOR_AN_EXAMPLE = 66
_THOROUGH = 20
# Cases at which each invariant is put to a kernel.
_PLACES = 1


def target_subjects(
    targets: Sequence[str],
    families: Sequence[str],
    dtypes: tuple[str, ...] | None,
    options: tuple[str, ...] | None,
    declare: Mapping[str, str],
    precision: Mapping[str, str],
    device: str | None,
    timeout: float,
) -> list[Subject]:
    """The kernels of a run: the suite's own, or others under the contract that the arguments describe.

    Raises:
        ContractError, TargetError: arguments that name no family, dtype, option or declaration, a target that
            cannot be imported, or one that does not return what the contract says on a plain case.
    """
    for family in families:
        family_of(family)
    if not targets:
        if declare or precision or options:
            raise ContractError(
                "--declare, --precision and --options are for TARGETS; the suite's kernels declare theirs"
            )
        found = subjects(families)
        return [replace(subject, device=device) for subject in found] if device else found
    if len(families) != 1:
        raise ContractError(
            f"--family is needed once with TARGETS, to say what they compute: one of {', '.join(FAMILIES)}"
        )
    table = dict(declare) | ({"precision": precision} if precision else {})
    chosen = [make_subject(target, families[0], dtypes, options, None, device, table) for target in targets]
    with WorkerPool(jobs=1, spares=0, timeout=timeout) as pool:
        for subject in chosen:
            _try_out(subject, pool)
    return chosen


def _try_out(subject: Subject, pool: WorkerPool) -> None:
    """One plain call, so that a target that is no kernel of its family is a usage error, not a verdict."""
    contract = subject.contract
    case = plan(
        contract.family, dtypes=contract.dtypes[:1], options=(), supports=contract.supports, budget=1, seed=0
    )[0]
    case = _plain_case(case)
    seen: list[object] = []

    def call(request: CallRequest) -> object:
        outcome = pool.call(request)
        seen.append(outcome)
        return outcome

    event = judge_case(subject, case, call)  # type: ignore[arg-type]
    outcome = seen[0] if seen else None
    if isinstance(outcome, Raised) and outcome.phase == "import":
        raise TargetError(outcome.message if outcome.type.endswith("TargetError") else str(outcome))
    shape = [failure.reason for failure in event.failures if failure.rule == "shape"]
    if shape and isinstance(outcome, Returned):
        raise ContractError(f"{subject.name}, called as {contract.family}: {shape[0]}")


def _plain_case(case: Case) -> Case:
    sizes = {
        "B": 1,
        "H": 1,
        "G": 1,
        "M": 16,
        "N": 16,
        "D": case.sizes.get("D", 16),
        "E": case.sizes.get("E", 16),
        "R": 4,
    }
    shape = tuple((symbol, sizes[symbol]) for symbol in case.sizes)
    return replace(case, regime="normal", shape=shape, options=(), view="contiguous")


def default_plan(
    chosen: Sequence[Subject],
    *,
    seed: int,
    thorough: bool = False,
    examples: int | None = None,
    dtypes: tuple[str, ...] | None = None,
) -> list[tuple[Subject, list[Item]]]:
    """Cases for each kernel, and its invariants; fewer for examples: only their failures are of interest."""
    planned = []
    for subject in chosen:
        contract = subject.contract
        budget = examples or DEFAULT_EXAMPLES[contract.family] * (_THOROUGH if thorough else 1)
        if subject.example:
            budget = min(budget, _FOR_AN_EXAMPLE)
        forms = [s for s in chosen if s.contract.family == contract.family and not s.example]
        turns = len(forms) if contract.family in STATE_FORMS else 1
        turn = forms.index(subject) if turns > 1 else 0
        cases = plan(
            contract.family,
            dtypes=dtypes or contract.dtypes,
            options=subject.options,
            supports=contract.supports,
            causal_alignment=contract.causal_alignment,
            budget=budget * turns,
            seed=seed,
            thorough=thorough,
        )
        items: list[Item] = list(itertools.islice(cases, turn, budget * turns, turns))
        if not subject.example:
            small = opening(
                contract.family,
                dtypes=dtypes or contract.dtypes,
                options=subject.options,
                supports=contract.supports,
                causal_alignment=contract.causal_alignment,
                seed=seed,
            )
            items += [InvariantAt(i.name, case) for i, case in places(contract, small, _PLACES)]
        planned.append((subject, items))
    return planned


def findings(families: Sequence[str] = (), jobs: int = 2, *, claims: bool = True) -> Iterator[Finding]:
    """What a run of the suite tells beside its kernels, as it is found.

    Equal forms of families (all if none are named) against each other; findings of long runs that are stored
    with the package; the theory ledger, quickly, if ``claims``.
    """
    yield from equal_forms(families, jobs)
    for name in _STORED:
        stored = _stored_finding(name)
        if stored is not None:
            yield stored
    if claims:
        yield from run(chosen((), None), "quick", jobs)


def _stored_finding(name: str) -> Finding | None:
    """A finding of a long run that is committed with the package, or None before its first."""
    path = resources.files("attnproof.data").joinpath(f"{name}.json")
    return msgspec.json.decode(path.read_bytes(), type=Finding) if path.is_file() else None
