"""A failure as a stand-alone Python script: torch and the kernel are all that it needs.

The inputs are written out, the certified values that the outputs are held to stand in it as numbers, and its
exit status says whether the kernel is still wrong (1), right (0), or could not be run (2).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from attnproof import trials
from attnproof.judge import prepare
from attnproof.outcomes import CallRequest, Flooded, OutOfMemory, TimedOut
from attnproof.properties.case import Case, Inputs, case_states
from attnproof.protocol import raw_bytes
from attnproof.search import script_parts as parts
from attnproof.search.distortions import wrong_elements
from attnproof.search.evidence import Evidence
from attnproof.search.smaller_calls import numbers_of, tensors_of
from attnproof.statistics import thresholds_for
from attnproof.targets import Importable
from attnproof.trials import Subject

__all__ = ["script", "values_in_words"]

# Tensors of at most so many entries are written as lists, with at most so many nonzero ones as assignments.
_LISTED = 32
_ASSIGNED = 24
# Entries of a tensor that a line of words names.
_TOLD = 4
# Wrong elements that a script checks, worst first.
_CHECKED = 8
# Entries of poison on each side of a tensor in a script about writes beyond it.
_GUARD = 64
_COLUMNS = 88
_STATISTICS = {"probable-row": "rms", "probable-output": "rms", "bias": "mean"}


def script(evidence: Evidence, subject: Subject, sentences: tuple[str, ...]) -> str:
    """Python source that makes the failing call again and exits 1 while it is wrong.

    Args:
        evidence: the failure; its trial holds the reference and budgets that the script states.
        subject: the kernel. One that was judged in the emulator runs on a GPU where there is one, else by
            ``attnproof.emulate``; all others need torch alone.
        sentences: what is wrong, put at the top.
    """
    if evidence.invariant or evidence.judged.trial is None:
        return _by_judge(evidence, subject, sentences)
    return _Script(evidence, subject, sentences).text()


def _by_judge(evidence: Evidence, subject: Subject, sentences: tuple[str, ...]) -> str:
    """A script that asks attnproof itself: an invariant relates several calls."""
    failures = evidence.judged.event.failures
    if evidence.invariant and failures:
        body, right = failures[0].script, 'event.verdict == "PASS"'
    else:
        body, right = trials.reproduction(subject, evidence.case), "result"
    return f"{_docstring(evidence, sentences)}\n{body}raise SystemExit(0 if {right} else 1)\n"


def values_in_words(evidence: Evidence) -> tuple[str, ...]:
    """A line for each tensor of a call whose inputs are not its case's own: its nonzero entries."""
    inputs = evidence.judged.inputs
    if inputs is None:
        return ()
    lines = []
    for name, tensor in tensors_of(evidence.case, inputs).items():
        places = (tensor != 0).nonzero().tolist()
        if not places:
            lines.append(f"{name}: all {tensor.numel()} entries are 0")
            continue
        verb = "is" if len(places) == 1 else "are"
        told = [f"{name}{p} = {float(tensor[tuple(p)])!r}" for p in places[:_TOLD]]
        more = ", …" if len(places) > _TOLD else ""
        count = f"{len(places)} of {tensor.numel()} entries {verb} not 0"
        lines.append(f"{name}: {count}: {', '.join(told)}{more}")
    lines += [f"{name}: {value!r}" for name, value in numbers_of(inputs).items()]
    return tuple(lines)


class _Script:
    """The pieces of one script."""

    def __init__(self, evidence: Evidence, subject: Subject, sentences: tuple[str, ...]) -> None:
        self.evidence, self.subject, self.sentences = evidence, subject, sentences
        assert evidence.judged.trial is not None
        self.trial = evidence.judged.trial
        self.rules = evidence.rules
        self.guarded = any(
            m.where != "element"
            for m in (evidence.judged.outcome.mutations if evidence.judged.outcome else ())
        )

    @property
    def _outputs(self) -> tuple[str, ...]:
        """Names of all that is judged: what the kernel returns, then gradients."""
        gradients = self.trial.gradients
        return (*self.trial.problem.outputs, *(() if gradients is None else gradients.outputs))

    def text(self) -> str:
        """The whole source."""
        device = self.subject.device
        # What dies, hangs, floods or takes the memory runs in a child process.
        contained = self.evidence.kind == "crash"
        emulated = device.startswith("emulator")
        place = parts.EMULATED if emulated else parts.PLAIN
        target = device.partition(":")[2] or "sm_90" if emulated else device
        named = isinstance(self.subject.source, Importable)
        calls = [self._call("inputs", self.evidence.case, self.evidence.judged.inputs), *self._history()]
        checks = self._checks()
        written = "\n".join((*calls, *checks))
        main = _filled(parts.MAIN_CONTAINED, _contained_limits(self.evidence)) if contained else parts.MAIN
        body = [
            self._source(),
            place.replace("@DEVICE@", repr(target)),
            parts.LOAD if named else parts.LOAD_PICKLED,
            *([parts.UNPACKED] if "unpacked(" in written else []),
            *([parts.LAID_OUT] if "laid_out(" in written else []),
            parts.MOVED,
            *calls,
            self._expectations(),
            parts.CALLING if self.trial.gradients is None else parts.DIFFERENTIATING,
            parts.CANONICAL,
            *checks,
            main,
        ]
        text = "\n\n".join(block.strip("\n") for block in (parts.PREAMBLE, *body)) + "\n"
        imports = [f"import {module}" for module in parts.MODULES if f"{module}." in text]
        return "\n".join((_docstring(self.evidence, self.sentences), "", *imports, "", text))

    def _source(self) -> str:
        source = self.subject.source
        if isinstance(source, Importable):
            return f"TARGET = {source.target!r}"
        payload = _wrapped(base64.b85encode(zlib.compress(source.payload)).decode())
        why = f"# {source.label} has no importable name: this is the function itself, by cloudpickle."
        return f"{why}\nTARGET = {payload}"

    # ---- inputs

    def _call(self, function: str, case: Case, inputs: Inputs | None) -> str:
        """A function that builds the arguments and keywords of one call, in the kernel's layout."""
        trial = self.trial if case is self.evidence.case else prepare(case, self.subject.judged_by, inputs)
        request: CallRequest = trials.request_for(self.subject, trial, repeat=False)
        lines = [f"def {function}():", f'    """The call of {case.id}."""']
        names = []
        for index, value in enumerate(request.arguments):
            name = request.names[index] if index < len(request.names) else f"argument{index}"
            names.append(name)
            lines += self._assigned(name, value)
        keywords = []
        for name, value in request.keywords.items():
            if isinstance(value, torch.Tensor):
                lines += self._assigned(name, value)
                keywords.append(f"{name!r}: {name}")
            elif isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
                parts_of = [f"{name}_{number}" for number in range(len(value))]
                for part, tensor in zip(parts_of, value, strict=True):
                    lines += self._assigned(part, tensor)
                keywords.append(f"{name!r}: ({', '.join(parts_of)})")
            else:
                keywords.append(f"{name!r}: {value!r}")
        weights = []
        for name, value in zip(trial.problem.outputs, request.cotangents, strict=False):
            weights.append("None" if value is None else f"d{name}")
            lines += [] if value is None else self._assigned(f"d{name}", value)
        call = f"[{', '.join(names)}], {{{', '.join(keywords)}}}, [{', '.join(weights)}]"
        lines.append(f"    return {call}")
        return "\n".join(lines)

    def _assigned(self, name: str, value: Any) -> list[str]:
        """Lines that make one argument: values, then strides where they are not the plain ones."""
        if not isinstance(value, torch.Tensor):
            return [f"    {name} = {value!r}"]
        lines = [f"    {line}" for line in _built(name, value)]
        guard = _GUARD if self.guarded else 0
        if guard or not value.is_contiguous() or value.storage_offset():
            size = value.untyped_storage().nbytes() // value.element_size() + 2 * guard
            place = f"{tuple(value.stride())}, {value.storage_offset() + guard}, {size}"
            lines.append(f"    {name} = laid_out({name}, {place})  # strides, offset, storage")
        return lines

    def _history(self) -> list[str]:
        """Earlier calls that must be made first."""
        found = [self._call(f"earlier{i}", case, None) for i, case in enumerate(self.evidence.history)]
        names = ", ".join(f"earlier{i}" for i in range(len(found)))
        return [*found, f"HISTORY = [{names}]"]

    # ---- what is asked

    def _expectations(self) -> str:
        """The form of the outputs, and the layout that they come in."""
        family, problem = self.trial.family, self.trial.problem
        dtypes = {name: family.output_dtype(name, self.trial.case.dtype) for name in problem.outputs}
        rows = [f"    ({name!r}, {problem.shape(name)}, torch.{dtype})," for name, dtype in dtypes.items()]
        gradients = self.trial.gradients
        asked = problem.differentiated if gradients is not None else ()
        for name in asked:
            dtype = str(problem.input_dtype(name)).removeprefix("torch.")
            rows.append(f"    ('d{name}', {problem.input_shape(name)}, torch.{dtype}),")
        moved = self.subject.contract.layout == "bnhd"
        swap = [n for n in problem.outputs if moved and n in family.sequence]
        swap += [f"d{n}" for n in asked if moved and n in family.sequence]
        order = list(self._request_names())
        places = [order.index(name) for name in asked]
        form = "\n".join(
            ["# name, shape in layout (B, H, M, …), dtype; gradients last", "OUTPUTS = [", *rows, "]"]
        )
        return f"{form}\nSWAPPED = {swap!r}  # outputs whose axes 1 and 2 come exchanged" + (
            f"\nDIFFERENTIATED = {places!r}  # tensors of the call whose gradients follow" if asked else ""
        )

    def _request_names(self) -> tuple[str, ...]:
        """Names of the tensors of the call in the order in which the script counts them."""
        request = trials.request_for(self.subject, self.trial, repeat=False)
        named = [
            n for n, v in zip(request.names, request.arguments, strict=False) if isinstance(v, torch.Tensor)
        ]
        for name, value in request.keywords.items():
            if name == "initial_state" and value is not None:
                named += [f"initial_{state}" for state in case_states(self.trial.case)]
            elif isinstance(value, torch.Tensor):
                named.append(name)
        return tuple(named)

    def _checks(self) -> list[str]:
        """Functions from (outputs, arguments, keywords) to complaints, and the list of them."""
        blocks, names = [], []
        elements = self._elements()
        if elements:
            blocks.append(parts.ELEMENTS.replace("@ELEMENTS@", elements))
            names.append("wrong_elements")
        for rule, block, name in (
            ("mutation", parts.MUTATION, "changed_inputs"),
            ("aliasing", parts.ALIASING, "shared_memory"),
            ("determinism", parts.DETERMINISM, "other_bits"),
        ):
            if rule in self.rules:
                blocks.append(block)
                names.append(name)
        for failure in self.evidence.judged.event.failures:
            if failure.rule in _STATISTICS and "wrong_statistics" not in names:
                blocks.append(self._statistics(failure.rule, failure.output, failure.index))
                names.append("wrong_statistics")
        return [*blocks, f"CHECKS = [{', '.join(names)}]"]

    def _elements(self) -> str:
        """Wrong elements with what is asked of each, worst first."""
        lines = []
        for number, name in enumerate(self._outputs):
            if name not in self.evidence.judged.outputs:
                continue
            wrong = wrong_elements(self.evidence.judged, name)
            exact, budget = self.trial.reference.outputs[name], self.trial.budgets[name]
            got = self.evidence.judged.outputs[name].double()
            error = (got - exact.value).abs() / budget.certain.clamp(min=1e-300)
            places = sorted(wrong.nonzero().tolist(), key=lambda p: -float(error[tuple(p)].nan_to_num(1e300)))
            for place in map(tuple, places[:_CHECKED]):
                literal = [v for v, where in budget.literal.items() if bool(where[place])]
                value, radius = float(exact.value[place]), float(exact.radius[place])
                bound = radius + float(budget.certain[place])
                if literal:
                    value, bound = literal[0], 0.0
                elif bool(budget.overflow[place]):
                    value, bound = float("inf") if value > 0 else float("-inf"), 0.0
                lines.append(f"    ({number}, {place!r}, {value!r}, {bound!r}),")
        return "\n".join(lines)

    def _statistics(self, rule: str, name: str, index: tuple[int, ...]) -> str:
        """Exact values and probable budgets of a row or of the whole output, with the threshold."""
        trial = self.trial
        exact, budget = trial.reference.outputs[name], trial.budgets[name]
        axes = trial.row_axes(name)
        wide = exact.value.dim() > axes
        limits = thresholds_for(
            trial.case.family,
            name,
            trial.case.dtype,
            trial.regime_class,
            exact.value.shape[-1] if wide else 1,
        )
        assert limits is not None
        place: tuple[int, ...] = ()
        if rule == "probable-row":
            place, limit = index[: axes if wide else axes - 1], limits.row
        else:
            limit = limits.output if rule == "probable-output" else limits.bias
        open_ = budget.open | budget.overflow
        for where in budget.literal.values():
            open_ = open_ | where
        probable = torch.where(open_, torch.inf, budget.probable)[place]
        fields = {
            "@NUMBER@": str(self._outputs.index(name)),
            "@PLACE@": repr(place),
            "@LIMIT@": repr(limit),
            "@STATISTIC@": repr(_STATISTICS[rule]),
            "@EXACT@": _packed(exact.value[place].contiguous()),
            "@PROBABLE@": _packed(probable.contiguous()),
        }
        return _filled(parts.STATISTICS, fields)


def _contained_limits(evidence: Evidence) -> dict[str, str]:
    """Seconds, bytes of output and bytes of memory beyond which a call is wrong."""
    outcome = evidence.judged.outcome
    seconds = outcome.limit if isinstance(outcome, TimedOut) else 600.0
    flood = outcome.limit if isinstance(outcome, Flooded) else 1 << 60
    memory = outcome.limit if isinstance(outcome, OutOfMemory) else 1 << 60
    return {"@SECONDS@": repr(seconds), "@FLOOD@": repr(flood), "@MEMORY@": repr(memory)}


def _docstring(evidence: Evidence, sentences: tuple[str, ...]) -> str:
    reasons = sentences or tuple(failure.reason for failure in evidence.judged.event.failures)
    text = "\n".join((*reasons, "", f"Case: {evidence.case.id}", f"Broken: {', '.join(evidence.rules)}"))
    escaped = text.replace("\\", "\\\\").replace('"""', "'''")
    how = "Run it where the kernel can be imported: it exits 1 while the kernel is wrong, 0 when it is right,"
    return f'"""{escaped}\n\n{how}\n2 when it could not be run.\n"""'


def _filled(template: str, fields: Mapping[str, str]) -> str:
    for mark, value in fields.items():
        template = template.replace(mark, value)
    return template


def _built(name: str, tensor: torch.Tensor) -> list[str]:
    """Statements that make a tensor's values, exactly."""
    dtype, shape = f"torch.{str(tensor.dtype).removeprefix('torch.')}", tuple(tensor.shape)
    flat = tensor.contiguous().flatten()
    if not tensor.dtype.is_floating_point or (0 < tensor.numel() <= _LISTED):
        # Python writes the shortest decimal that reads as the same float64, which holds all these exactly.
        return [f"{name} = torch.tensor({tensor.tolist()!r}, dtype={dtype})"]
    marked = (flat.double() != 0) | flat.signbit()
    if int(marked.sum()) <= _ASSIGNED:
        lines = [f"{name} = torch.zeros({shape!r}, dtype={dtype})"]
        for place in marked.reshape(shape).nonzero().tolist():
            lines.append(f"{name}[{', '.join(map(str, place))}] = {float(tensor[tuple(place)])!r}")
        return lines
    return [f"{name} = {_packed(tensor)}"]


def _packed(tensor: torch.Tensor) -> str:
    """An expression for a dense tensor: its bytes, compressed."""
    raw = raw_bytes(tensor)
    text = _wrapped(base64.b85encode(zlib.compress(raw, 9)).decode())
    dtype = f"torch.{str(tensor.dtype).removeprefix('torch.')}"
    return f"unpacked({dtype}, {tuple(tensor.shape)!r}, {text})"


def _wrapped(text: str) -> str:
    """A long string without line breaks of its own as adjacent literals in brackets."""
    lines = [repr(text[i : i + _COLUMNS]) for i in range(0, max(len(text), 1), _COLUMNS)]
    return lines[0] if len(lines) == 1 else "(\n        " + "\n        ".join(lines) + "\n    )"
