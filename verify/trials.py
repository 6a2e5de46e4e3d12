"""One case through one kernel.

The call in a worker, what came back, and the verdict on it as a record's event.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnproof.judge import Judgement, Trial, prepare
from attnproof.outcomes import (
    CallRequest,
    Crashed,
    Declined,
    Flooded,
    NotATensor,
    Outcome,
    OutOfMemory,
    Raised,
    Returned,
    TimedOut,
)
from attnproof.predictions import DOCUMENTED_ONLY, PREDICTIONS
from attnproof.properties.case import APART, Case, Inputs, case_states
from attnproof.properties.contract import Contract
from attnproof.properties.families.base import Family
from attnproof.properties.regimes import REGIMES
from attnproof.properties.signatures import SIGNATURES
from attnproof.reports.record import CaseJudged, CaseRecord, Failure
from attnproof.targets import Importable, KernelSource

__all__ = ["JudgedCall", "Subject", "case_record", "judge_call", "judge_case", "reproduction", "request_for"]

Caller = Callable[[CallRequest], Outcome]

# Every third case is called twice on the same tensors, to see whether a kernel that promises the same bits
# gives them.
_REPEATED = 3
_DEFAULTS: Mapping[str, Any] = {
    "causal": False,
    "return_lse": False,
    "return_state": False,
    "variance": True,
    "power": 1,
    "delta_softplus": False,
    "discretization": "euler",
}
_UNDIFFERENTIABLE = "declare differentiable=false if that is intended"


@dataclass(frozen=True)
class Subject:
    """A kernel under judgement.

    Attributes:
        name: how reports call it; target: how a worker gets hold of it.
        contract: what it promises; device: "cpu", "emulator:sm_90", "cuda", ...
        gradients: whether a kernel without gradients is at fault (True), is not asked for any (False), or is
            judged by those that it has (None).
        prediction: for a naive example that must be found out, the theory of ``predictions`` that says where.
    """

    name: str
    source: KernelSource
    contract: Contract
    device: str
    prediction: str = ""
    gradients: bool | None = None

    @property
    def differentiable(self) -> bool:
        """Whether gradients are asked for: not where the kernel declares that it has none."""
        return self.gradients is not False and self.contract.differentiable is not False

    @property
    def judged_by(self) -> Contract:
        """The contract as it is meant on the subject's device."""
        return self.contract.on(self.device)

    @property
    def options(self) -> tuple[str, ...]:
        """The options that cases for it may have: those of its contract, and those that are no keyword."""
        known = SIGNATURES[self.contract.family].options
        apart = [name for name in APART if name in known and name != "causal_alignment"]
        if not self.differentiable and "cotangents" in apart:
            apart.remove("cotangents")
        return (*self.contract.options, *apart)

    @property
    def example(self) -> bool:
        """Whether this is a naive variant that must be found out."""
        return bool(self.prediction)

    def expected(self, trial: Trial, verdict: str) -> str:
        """The verdict that the case must get: PASS, for examples what theory says.

        Where that is open, ``verdict``.
        """
        if not self.prediction:
            return "PASS"
        predicted = PREDICTIONS[self.prediction](trial)
        if predicted == "FAIL" and self.device.startswith("cuda") and self.prediction in DOCUMENTED_ONLY:
            return verdict
        return verdict if predicted == "OPEN" else predicted


def case_record(case: Case) -> CaseRecord:
    """The case as a record keeps it."""
    return CaseRecord(
        id=case.id,
        family=case.family,
        dtype=case.dtype,
        regime=case.regime,
        regime_class=REGIMES[case.regime].regime_class,
        shape=case.sizes,
        options=dict(case.options),
        view=case.view,
        seed=case.seed,
    )


@dataclass(frozen=True, eq=False)
class JudgedCall:
    """One call with its verdict, and what it was judged by.

    Attributes:
        case, inputs: what was called; ``inputs`` is None where they are the case's own.
        event: the verdict as the record keeps it.
        trial: reference and budgets; None where the checker failed before it had them.
        outputs: what came back by name, in layout bhnd; empty where that was not what the contract asks.
        outcome: how the call ended, None where there was none.
    """

    case: Case
    inputs: Inputs | None
    event: CaseJudged
    trial: Trial | None
    outputs: Mapping[str, torch.Tensor]
    outcome: Outcome | None


def judge_case(subject: Subject, case: Case, call: Caller) -> CaseJudged:
    """Run ``case`` through ``subject`` by ``call`` and judge what came back; see :func:`judge_call`."""
    return judge_call(subject, case, call).event


def judge_call(
    subject: Subject, case: Case, call: Caller, inputs: Inputs | None = None, *, repeat: bool | None = None
) -> JudgedCall:
    """Run ``case`` through ``subject`` by ``call`` and judge what came back.

    Args:
        subject, case, call: the kernel, the case, and a worker's or a pool's ``call``.
        inputs: values to take in place of the case's own.
        repeat: whether the kernel is called twice to compare the bits; None: in every third case.

    Never raises for what the kernel does; a failure of the checker itself gives UNVERIFIED with its reason.
    """
    begun = time.perf_counter()
    if subject.contract.causal_alignment == "top-left" and case.option("causal"):
        case = replace(case, options=(*case.options, ("causal_alignment", "top-left")))
    seconds, expected = 0.0, "PASS"
    trial: Trial | None = None
    outcome: Outcome | None = None
    outputs: dict[str, torch.Tensor] = {}
    try:
        trial = prepare(case, subject.judged_by, inputs)
        outcome = call(request_for(subject, trial, repeat))
        judgement, outputs, trial = _judge_outcome(subject, trial, outcome)
        if isinstance(outcome, Returned) and outcome.seconds:
            seconds = outcome.seconds[0]
        expected = subject.expected(trial, judgement.verdict)
    except Exception as error:
        failure = Failure("checker", f"the checker failed: {type(error).__name__}: {error}")
        judgement = Judgement("UNVERIFIED", (failure,))
    failures = tuple(_with_script(failure, subject, case) for failure in judgement.failures)
    event = CaseJudged(
        kernel=subject.name,
        case=case_record(case),
        verdict=judgement.verdict,
        expected=expected,
        failures=failures,
        vacuous=judgement.vacuous,
        unjudged=dict(judgement.unjudged),
        outputs=dict(judgement.outputs),
        seconds=time.perf_counter() - begun,
        kernel_seconds=seconds,
    )
    return JudgedCall(case, inputs, event, trial, outputs, outcome)


def request_for(subject: Subject, trial: Trial, repeat: bool | None) -> CallRequest:
    """The canonical call in the kernel's own layout.

    Keywords with a default only where the kernel lists them.
    """
    contract, family = subject.contract, trial.family
    tensors = trial.inputs.tensors
    # A positional tensor that the case leaves out is handed over as None.
    arguments = [
        _in_layout(subject, trial, name, tensors[name]) if name in tensors else None for name in family.inputs
    ]
    given = trial.inputs.options
    keywords = {key: given[key] for key in family.required}
    for key in family.options:
        if key in contract.options:
            keywords[key] = given.get(key, _default(family, key))
    repeat = (trial.case.seed + len(trial.case.id)) % _REPEATED == 0 if repeat is None else repeat
    cotangents: tuple[torch.Tensor | None, ...] = ()
    if subject.differentiable and trial.problem.differentiated and trial.inputs.cotangents:
        given_cotangents = trial.inputs.cotangents
        cotangents = tuple(
            _in_layout(subject, trial, name, given_cotangents[name]) if name in given_cotangents else None
            for name in trial.problem.outputs
        )
    return CallRequest(
        kernel=subject.source,
        device=subject.device,
        differentiate=tuple(_argument_name(trial, name) for name in trial.problem.differentiated)
        if cotangents
        else (),
        cotangents=cotangents,
        arguments=tuple(arguments),
        keywords=keywords,
        names=family.inputs,
        repeats=2 if repeat and contract.deterministic else 1,
        poison_outputs=True,
    )


def _default(family: Family, key: str) -> Any:
    """What a keyword is that the case leaves out: families with a state are causal unless told otherwise."""
    return True if key == "causal" and SIGNATURES[family.name].stateful else _DEFAULTS.get(key)


def _argument_name(trial: Trial, name: str) -> str:
    """A differentiated input as workers name it: initial states may come as a tuple."""
    states = trial.inputs.options.get("initial_state")
    if not isinstance(states, tuple) or not name.startswith("initial_"):
        return name
    return f"initial_state[{list(case_states(trial.case)).index(name.removeprefix('initial_'))}]"


def _in_layout(subject: Subject, trial: Trial, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the call in the layout that the kernel declares."""
    if subject.contract.layout != "bnhd" or name not in trial.family.sequence:
        return tensor
    moved = tensor.transpose(1, 2)
    return moved.contiguous() if trial.case.view == "contiguous" and tensor.is_contiguous() else moved


def _judge_outcome(
    subject: Subject, trial: Trial, outcome: Outcome
) -> tuple[Judgement, dict[str, torch.Tensor], Trial]:
    """The judgement, the outputs by name where they have the form that the contract asks, and the trial.

    The trial that comes back knows the gradients, where there are any to judge.
    """
    failures = [
        Failure("mutation", f"the call changed its inputs: {mutation}") for mutation in outcome.mutations
    ]
    tail = outcome.output.tail
    if isinstance(outcome, Flooded):
        words = (
            f"the call wrote {outcome.output.size} bytes to stdout and stderr; the limit is {outcome.limit}"
        )
        failures.append(Failure("output-flood", words, detail=tail))
        outcome = outcome.ended
    if isinstance(outcome, Declined):
        failure = Failure("declined", outcome.message)
        return Judgement("FAIL" if failures else "DECLINED", (*failures, failure)), {}, trial
    if not isinstance(outcome, Returned):
        return _ended_badly(outcome, failures, tail), {}, trial
    outputs, complaint = _outputs(subject, trial, outcome)
    if complaint:
        return Judgement("FAIL", (*failures, Failure("shape", complaint, detail=tail))), {}, trial
    gradients, notice, missing = _gradients(subject, trial, outcome)
    broken = None
    if gradients:
        trial = trial.with_gradients()
        # Where nothing depends on an input, its gradient is 0, which autograd may leave out.
        needed = [name for name in missing if not _is_zero(trial, f"d{name}")]
        if needed:
            words = f"no gradient reaches {', '.join(needed)}"
            broken = Failure("gradient", f"{words}; the contract asks for one of each floating tensor")
            if trial.gradients is not None:
                gradients = {name: x for name, x in gradients.items() if name[1:] not in missing}
        outputs = {**outputs, **gradients}
    elif missing:
        broken = Failure("gradient", f"{notice}, and gradients were asked for: {_UNDIFFERENTIABLE}")
        notice = ""
    for alias in outcome.aliases:
        if alias.shares == "memory" and outcome.outputs[alias.output].tensor.numel():
            failures.append(Failure("aliasing", f"output {alias.output} lies in memory of {alias.other}"))
    for difference in outcome.differences:
        words = f"{difference.what} differs in {difference.count} elements, first at {difference.index}"
        failures.append(
            Failure("determinism", f"two calls on the same tensors: {words} (run {difference.run})")
        )
    judgement = trial.judge(outputs)
    if notice:
        judgement = replace(
            judgement, unjudged={**judgement.unjudged, notice: len(trial.problem.differentiated)}
        )
    # A wrong output comes before a missing gradient: whoever mends the outputs may mend both.
    failures += judgement.failures + ((broken,) if broken is not None else ())
    if failures:
        judgement = replace(judgement, verdict="FAIL", failures=tuple(failures))
    return judgement, outputs, trial


def _gradients(
    subject: Subject, trial: Trial, outcome: Returned
) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """Gradients as outputs "d" + name in layout bhnd, 0 for inputs that none reaches, which are named last.

    Without any gradient a notice tells why, and names are given only if gradients were asked for.
    """
    found = outcome.gradients
    if found is None:
        return {}, "", []
    named = dict(zip(trial.problem.differentiated, found.values(), strict=True))
    missing = [name for name, gradient in named.items() if gradient is None]
    if len(missing) == len(found):
        return {}, "no output of the kernel requires a gradient", missing if subject.gradients else []
    gradients = {}
    for name, gradient in named.items():
        if gradient is None:
            shape, dtype = trial.problem.input_shape(name), trial.problem.input_dtype(name)
            gradients[f"d{name}"] = torch.zeros(shape, dtype=dtype)
            continue
        if subject.contract.layout == "bnhd" and name in trial.family.sequence:
            gradient = gradient.transpose(1, 2)
        gradients[f"d{name}"] = gradient
    return gradients, "", missing


def _is_zero(trial: Trial, name: str) -> bool:
    """Whether 0 is within the certain budget of every element of a gradient."""
    exact, budget = trial.reference.outputs[name], trial.budgets[name]
    return bool((budget.open | (exact.value.abs() <= budget.certain)).all())


def _ended_badly(
    outcome: Raised | Crashed | TimedOut | OutOfMemory, failures: list[Failure], tail: str
) -> Judgement:
    """A call that gave no result.

    FAIL, or UNVERIFIED where the emulator or the worker's start is at fault.
    """
    if isinstance(outcome, Raised):
        unsupported = outcome.type.rpartition(".")[2] == "EmulationError"
        rule = "memory-fault" if outcome.type.rpartition(".")[2] == "MemoryFault" else "exception"
        failure = Failure(rule, f"the kernel raised {outcome}", detail=outcome.traceback)
        if unsupported or outcome.phase == "start":
            return Judgement("UNVERIFIED", (_under_rule(failure, "checker"),))
    elif isinstance(outcome, TimedOut):
        failure = Failure("timeout", f"no answer within {outcome.limit:g} seconds", detail=tail)
    elif isinstance(outcome, OutOfMemory):
        failure = Failure(
            "memory", f"the call took more than {outcome.limit >> 20} MiB: {outcome.message}", detail=tail
        )
    else:
        failure = Failure("crash", f"the worker process died: {outcome}", detail=tail)
    if not isinstance(outcome, Raised) and outcome.phase == "start":
        return Judgement("UNVERIFIED", (_under_rule(failure, "checker"),))
    return Judgement("FAIL", (*failures, failure))


def _under_rule(failure: Failure, rule: str) -> Failure:
    return Failure(rule, failure.reason, detail=failure.detail)


def _outputs(subject: Subject, trial: Trial, outcome: Returned) -> tuple[dict[str, torch.Tensor], str]:
    """Outputs by name in layout bhnd, and what is wrong with the form of what came back ("" if nothing)."""
    names = trial.problem.outputs
    value = outcome.value
    if isinstance(value, NotATensor):
        return {}, f"returned {value.type} ({value.text}); the contract asks for {_asked(names)}"
    values = value if isinstance(value, tuple) else (value,)
    wrong = len(values) != len(names) or any(not isinstance(item, torch.Tensor) for item in values)
    if wrong or isinstance(value, tuple) != (len(names) > 1):
        return {}, f"returned a {outcome.container} of {len(values)}; the contract asks for {_asked(names)}"
    outputs = {}
    for name, tensor in zip(names, values, strict=True):
        assert isinstance(tensor, torch.Tensor)
        shape = trial.problem.shape(name)
        if subject.contract.layout == "bnhd" and name in trial.family.sequence and tensor.dim() >= 3:
            tensor = tensor.transpose(1, 2)
        if tuple(tensor.shape) != shape:
            got = tuple(tensor.shape)
            return {}, f"output {name} has shape {got} (in layout bhnd); the contract asks for {shape}"
        dtype = trial.family.output_dtype(name, trial.case.dtype)
        if tensor.dtype != getattr(torch, dtype):
            return {}, f"output {name} has dtype {tensor.dtype}; the contract asks for {dtype}"
        outputs[name] = tensor
    return outputs, ""


def _asked(names: tuple[str, ...]) -> str:
    return f"one tensor, {names[0]}" if len(names) == 1 else f"a tuple ({', '.join(names)})"


def _with_script(failure: Failure, subject: Subject, case: Case) -> Failure:
    if failure.rule == "checker":
        return failure
    fields = {name: getattr(failure, name) for name in failure.__struct_fields__}
    return Failure(**{**fields, "script": reproduction(subject, case)})


def reproduction(subject: Subject, case: Case) -> str:
    """A script that runs the case against the kernel again and prints the verdict with its reasons."""
    target = subject.source.target if isinstance(subject.source, Importable) else subject.name
    declared = ", ".join(f"{key}={value!r}" for key, value in _contract_arguments(subject.contract).items())
    return (
        "import attnproof\n"
        "from attnproof.properties.contract import Contract, Precision, Supports\n\n"
        f"case = attnproof.Case.parse({case.id!r})\n"
        f"contract = Contract({declared})\n"
        f"result = attnproof.check({target!r}, case, contract=contract, device={subject.device!r})\n"
        "print(result)\n"
    )


def _contract_arguments(contract: Contract) -> dict[str, Any]:
    """The fields in which a contract differs from the defaults."""
    plain = Contract(contract.family)
    fields = {name: getattr(contract, name) for name in contract.__dataclass_fields__}
    return {
        name: value for name, value in fields.items() if name == "family" or value != getattr(plain, name)
    }
