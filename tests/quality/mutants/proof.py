"""Proofs that mutants are wrong: against Arb, on the case that each mutant names, without the judge.

A mutant that nothing can tell from its base says nothing about the power of a tool; nor does one whose
wrongness was established by the tool itself. Here mutant and base run on the same inputs, and both are
measured against exact results with a proved radius. Where the trigger has cotangents, so are the gradients of
Σ outputs·cotangents, against the family's closed formulas; a mutant whose mechanism is "gradient" must leave
the outputs themselves as they are, bit for bit.

    python -m tests.quality.mutants.proof [NAME…]
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import attnproof
from attnproof.properties.arithmetic.balls import ArbArithmetic
from attnproof.properties.case import Case, Inputs, case_states, make_inputs
from attnproof.properties.contract import Contract, contract_of
from attnproof.properties.families import family_of
from attnproof.properties.families.base import Problem
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.oracle import evaluate
from attnproof.properties.signatures import SIGNATURES
from attnproof.targets import resolve
from tests.quality.mutants.built import build
from tests.quality.mutants.mutant import Mutant, MutantError, all_mutants

__all__ = ["Errors", "Proof", "prove"]

STRUCTURAL = 8.0
"""The largest error of a mutant is at least so many times its base's: more than reordering can explain."""

INACCURATE = 1.4
"""The rms error of an accuracy mutant is at least so many times its base's, on inputs of hundreds of rows."""

SIGNIFICANT = 8.0
"""Standard errors by which a signed mean must differ from 0: chance does that less than once in 10¹⁴."""

TARGET = "sm_90"

BITS = 128
"""Precision of the exact results; each comes with its own radius."""


@dataclass(frozen=True)
class Errors:
    """How far one output is from the exact result, over the elements that are determined and finite.

    Attributes:
        largest: largest |error|, the reference's radius taken off, and at least half an ulp of the largest
            exact value where it belongs to the base; inf for a value that is not what a literal rule asks,
            and for one that is not finite where it must be.
        rms: root mean square error.
        mean: mean of error · sign(exact), in standard errors; positive is away from zero.
    """

    largest: float
    rms: float
    mean: float


@dataclass(frozen=True)
class Proof:
    """What was measured.

    Attributes:
        mutant: name; wrong: whether it is proved wrong; how: "error", "rms", "mean", "mutation", "missing"
            where an input gets no gradient and ``shows`` announces that, or the name of an exception that the
            mutant raised, its base did not, and ``shows`` announces; "forward" where a mutant of the backward
            pass changes an output, which proves nothing of it.
        factor: largest ratio of mutant to base over the outputs, of what ``how`` names; inf where the base
            has no such error.
        errors: by output, and by gradient where the trigger has cotangents, the errors of (mutant, base).
    """

    mutant: str
    wrong: bool
    how: str
    factor: float
    errors: Mapping[str, tuple[Errors, Errors]] = dataclasses.field(default_factory=dict)


def prove(mutant: Mutant) -> Proof:
    """Hold mutant and base against exact results on the mutant's trigger, in this process.

    Raises:
        MutantError: for a deceiver, which must not be let into this process, and where the base itself
            raises, changes its inputs or returns another form.
    """
    if mutant.mechanism == "deception":
        raise MutantError(f"mutant {mutant.name}: deceivers only ever run in worker processes")
    case = Case.parse(mutant.trigger)
    base = _called(resolve(mutant.base), case)
    if isinstance(base, Exception) or base.changed or base.missing:
        raise MutantError(f"mutant {mutant.name}: its base {mutant.base} fails on {case.id}: {base}")
    found = _called(build(mutant), case)
    if isinstance(found, Exception):
        # A mutant that does not compile is no mutant: only what it says that it does counts.
        rule = "memory-fault" if isinstance(found, attnproof.MemoryFault) else "exception"
        return Proof(mutant.name, rule in mutant.shows, type(found).__name__, math.inf)
    if found.changed:
        return Proof(mutant.name, True, "mutation", math.inf)
    if found.missing:
        return Proof(mutant.name, "gradient" in mutant.shows, "missing", math.inf)
    if [x.shape for x in found.outputs.values()] != [x.shape for x in base.outputs.values()]:
        return Proof(mutant.name, True, "shape", math.inf)
    forward = family_of(case.family).returned(make_inputs(case).options)
    if mutant.mechanism == "gradient" and not all(_same(found.outputs[n], base.outputs[n]) for n in forward):
        return Proof(mutant.name, False, "forward", math.nan)
    exact = _exact(case, contract_of(resolve(mutant.base)))
    errors = {
        name: (
            _errors(found.outputs[name], exact[name]),
            _errors(base.outputs[name], exact[name], floor=True),
        )
        for name in base.outputs
    }
    return _accuracy(mutant.name, errors) if mutant.accuracy_only else _structure(mutant.name, errors)


def _structure(name: str, errors: Mapping[str, tuple[Errors, Errors]]) -> Proof:
    factor = max(_ratio(mine.largest, base.largest) for mine, base in errors.values())
    return Proof(name, factor >= STRUCTURAL, "error", factor, errors)


def _accuracy(name: str, errors: Mapping[str, tuple[Errors, Errors]]) -> Proof:
    factor = max(_ratio(mine.rms, base.rms) for mine, base in errors.values())
    if factor >= INACCURATE:
        return Proof(name, True, "rms", factor, errors)
    biased = [mine.mean for mine, base in errors.values() if abs(base.mean) <= SIGNIFICANT]
    worst = max(map(abs, biased), default=0.0)
    return Proof(name, worst > SIGNIFICANT, "mean" if worst > SIGNIFICANT else "rms", factor, errors)


def _ratio(mine: float, base: float) -> float:
    if math.isinf(base):
        return 0.0
    return math.inf if base == 0.0 < mine else mine / base if base else 0.0


@dataclass(frozen=True)
class _Returned:
    """Outputs and gradients by name, whether inputs were changed, and the inputs that got no gradient."""

    outputs: Mapping[str, torch.Tensor]
    changed: bool
    missing: tuple[str, ...]


def _called(function: Callable[..., Any], case: Case) -> _Returned | Exception:
    """One call on fresh inputs, under emulation; outputs, then gradients as "d" + the name of the input."""
    inputs, untouched = make_inputs(case), make_inputs(case)
    sources = _differentiated(inputs, case)
    for tensor in sources.values():
        tensor.requires_grad_(True)
    gradients: dict[str, torch.Tensor | None] = {}
    with attnproof.emulate(TARGET):
        try:
            value = function(*_arguments(inputs, case), **inputs.options)
            values = value if isinstance(value, tuple) else (value,)
            outputs = dict(zip(family_of(case.family).returned(inputs.options), values, strict=True))
            if sources:
                # Not every output has a cotangent: a state's level takes none.
                weighted = [outputs[name] for name in inputs.cotangents]
                weights = list(inputs.cotangents.values())
                found = torch.autograd.grad(weighted, list(sources.values()), weights, allow_unused=True)
                gradients = dict(zip(sources, found, strict=True))
        except Exception as error:
            return error
    for tensor in sources.values():
        tensor.requires_grad_(False)
    outputs |= {f"d{name}": x for name, x in gradients.items() if x is not None}
    outputs = {name: x.detach() for name, x in outputs.items()}
    changed = any(not _same(a, b) for a, b in _pairs(case, inputs, untouched))
    return _Returned(outputs, changed, tuple(name for name, x in gradients.items() if x is None))


def _arguments(inputs: Inputs, case: Case) -> tuple[torch.Tensor | None, ...]:
    """The positional arguments; a tensor that the case leaves out, such as delta's gate, is None."""
    return tuple(inputs.tensors.get(name) for name in family_of(case.family).inputs)


def _given(inputs: Inputs, case: Case) -> dict[str, torch.Tensor]:
    """All tensors of a call by name, each part of an initial state by its own."""
    found = {**inputs.tensors}
    for name, value in inputs.options.items():
        parts = {name: value}
        if name == "initial_state":
            held = value if isinstance(value, tuple) else (value,)
            parts = {f"initial_{part}": x for part, x in zip(case_states(case), held, strict=True)}
        found |= {part: x for part, x in parts.items() if isinstance(x, torch.Tensor)}
    return found


def _differentiated(inputs: Inputs, case: Case) -> dict[str, torch.Tensor]:
    """The tensors of the call that have a gradient, by name; none where the case has no cotangents."""
    if not inputs.cotangents:
        return {}
    given = _given(inputs, case)
    return {name: given[name] for name in _problem(case).differentiated}


def _pairs(case: Case, a: Inputs, b: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(_given(a, case).values(), _given(b, case).values(), strict=True))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and bool(torch.equal(a.double().isnan(), b.double().isnan()))
        and bool(torch.equal(a.double().nan_to_num(), b.double().nan_to_num()))
    )


def _problem(case: Case) -> Problem:
    inputs = make_inputs(case)
    return family_of(case.family).problem(*_arguments(inputs, case), **inputs.options)


def _exact(case: Case, contract: Contract | None) -> dict[str, attnproof.Enclosure]:
    """Outputs, and gradients where the case has cotangents, with the radii of Arb.

    Families with a state say element by element, in their budgets, what saw an input that is not finite; the
    radius is infinite there.

    Raises:
        MutantError: for gradients of inputs that are not finite, which the contract leaves open.
    """
    inputs, options = make_inputs(case), make_inputs(case).options
    given = _arguments(inputs, case)
    found = attnproof.reference(case.family, *given, arithmetic="arb", **options)
    values = found if isinstance(found, tuple) else (found,)
    exact = dict(zip(family_of(case.family).returned(options), values, strict=True))
    problem = _problem(case)
    if problem.nonfinite and SIGNATURES[case.family].stateful:
        for name, budget in problem.budgets(exact, contract or Contract(family=case.family)).items():
            value, radius = exact[name].value, exact[name].radius
            exact[name] = attnproof.Enclosure(value, radius.masked_fill(budget.open, math.inf))
    if not inputs.cotangents:
        return exact
    if problem.nonfinite:
        raise MutantError(f"{case.id}: gradients of inputs that are not finite have no exact value")
    cotangents = {name: x.double() for name, x in inputs.cotangents.items()}
    gradients = GradientProblem(problem, exact, cotangents)
    for name, enclosure in evaluate(gradients, ArbArithmetic(BITS)).items():
        shape = gradients.shape(name)
        exact[name] = attnproof.Enclosure(enclosure.value.reshape(shape), enclosure.radius.reshape(shape))
    return exact


def _errors(got: torch.Tensor, exact: attnproof.Enclosure, *, floor: bool = False) -> Errors:
    value, radius = exact.value, exact.radius
    determined = ~radius.isinf()
    finite = determined & value.isfinite()
    missed = (determined & ~finite & (got.double() != value)) | (finite & ~got.isfinite())
    error = (got.double() - value)[finite & got.isfinite()]
    signed = error * value[finite & got.isfinite()].sign()
    size = (error.abs() - radius[finite & got.isfinite()]).clamp(min=0.0)
    largest = math.inf if bool(missed.any()) else float(size.max()) if size.numel() else 0.0
    if floor and bool(finite.any()):
        # Half an ulp of the largest value is what any kernel may make, also where the base made less.
        largest = max(largest, float(value[finite].abs().max()) * torch.finfo(got.dtype).eps / 2)
    count = max(error.numel(), 1)
    spread = float(signed.std()) / math.sqrt(count) if error.numel() > 1 else 0.0
    return Errors(
        largest=largest,
        rms=math.inf if bool(missed.any()) else float(error.square().mean().sqrt()) if error.numel() else 0.0,
        mean=float(signed.mean()) / spread if spread else 0.0,
    )


def main(names: list[str]) -> int:
    """Print a table of proofs of the named mutants, or of all but deceivers; 1 where one is not proved."""
    unproved = 0
    known = {mutant.name: mutant for mutant in all_mutants()}
    missing = [name for name in names if name not in known]
    if missing:
        print(f"no mutant is called {', '.join(missing)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in names] or [m for m in known.values() if m.mechanism != "deception"]
    for mutant in chosen:
        proof = prove(mutant)
        unproved += not proof.wrong
        verdict = "wrong" if proof.wrong else "NOT PROVED"
        detail = "  ".join(
            f"{name}: rms {_ratio(mine.rms, base.rms):.3g}x, mean {mine.mean:+.1f} se"
            for name, (mine, base) in proof.errors.items()
        )
        measured = f"{verdict:10} {proof.how:12} {proof.factor:9.4g}"
        print(f"{mutant.name:44} {mutant.mechanism:15} {measured}  {detail}", flush=True)
    return 1 if unproved else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
