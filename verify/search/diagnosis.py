"""What is wrong, in plain words: each sentence is supported by a computation on what the kernel returned.

Witnesses are the call at hand, calls that failed before it, and one or two larger calls with random values:
a cause is told only if it explains all of them, for on a minimal input many causes look alike.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from attnproof.outcomes import Crashed, OutOfMemory, Raised, TimedOut
from attnproof.properties.case import Case
from attnproof.properties.contract import Supports
from attnproof.search.alterations import alterations, explains, only_gradients
from attnproof.search.descent import same_failure
from attnproof.search.distortions import distortions
from attnproof.search.evidence import Evidence, Probe, kinds_of
from attnproof.search.places import places
from attnproof.search.smaller_calls import resized, supported, with_option
from attnproof.trials import JudgedCall

__all__ = ["diagnose"]

# Sizes at which a cause is told from its look-alikes: no multiple of a tile, M < N, two heads a group.
_RICH = {"B": 2, "H": 4, "G": 2, "M": 37, "N": 67, "D": 16, "E": 8, "R": 5}
# 67 tells padding to one tile from padding to another, 123 incomplete tiles that are left out.
_LONG = 123
_TILES = (256, 128, 64, 32, 16)
# Causes told at most.
_CAUSES = 2
# Fewer keys or queries than this are no boundary of anything.
_FEW = 4
_NUMERIC = ("numeric", "nonfinite", "empty-row")


def diagnose(
    evidence: Evidence, probe: Probe, *, deadline: float, others: Sequence[JudgedCall] = ()
) -> tuple[str, ...]:
    """Sentences on what is wrong, the most specific first.

    Args:
        evidence: the failing call, best a minimal one.
        probe: judges further calls of the kernel.
        deadline: of ``time.monotonic()``, in seconds; no probe is begun after it.
        others: calls that failed in the same way before, such as the one that was shrunk.
    """
    return tuple(dict.fromkeys(_Diagnosis(evidence, probe, deadline, others).sentences()))


class _Diagnosis:
    """Witnesses of one failure, and what can be said of them."""

    def __init__(
        self, evidence: Evidence, probe: Probe, deadline: float, others: Sequence[JudgedCall]
    ) -> None:
        self.evidence, self.probe, self.deadline = evidence, probe, deadline
        self.others = [judged for judged in others if judged.event.verdict == "FAIL"]
        self._rich: list[JudgedCall] | None = None

    def sentences(self) -> Iterator[str]:
        """All that is found, the most specific first."""
        yield from self._plainly()
        if self.evidence.history:
            yield self._history()
        elif kinds_of(self.evidence.rules)[:1] and kinds_of(self.evidence.rules)[0] in _NUMERIC:
            yield from self._causes()
            yield from self._places()
        if not self.evidence.history:
            yield from self._boundaries()
            yield from self._siblings()

    # ---- what needs no further call

    def _plainly(self) -> Iterator[str]:
        """Rules broken by the form of the call, and what ended it."""
        words = {
            "mutation": "The kernel writes into its own inputs",
            "aliasing": "An output lies in memory that is not its own",
            "determinism": "Two runs on the same tensors give different bits",
            "shape": "What is returned has not the form that the contract asks",
            "gradient": "The backward pass is incomplete",
            "memory-fault": "The kernel reads or writes outside its tensors",
            "output-flood": "The kernel prints without end",
        }
        for failure in self.evidence.judged.event.failures:
            if failure.rule in words:
                yield f"{words[failure.rule]}: {failure.reason}."
        ended = self.evidence.judged.outcome
        if isinstance(ended, Raised) and "memory-fault" not in self.evidence.rules:
            yield f"The kernel raises {ended.type}: {ended.message}{_line(ended)}."
        elif isinstance(ended, TimedOut):
            yield f"The kernel does not return within {ended.limit:g} seconds."
        elif isinstance(ended, OutOfMemory):
            yield f"The kernel takes more than {ended.limit >> 20} MiB: {ended.message}."
        elif isinstance(ended, Crashed):
            yield f"The process of the kernel dies: {ended}."
        if self.evidence.invariant:
            yield f"The invariant {self.evidence.invariant} does not hold."

    def _history(self) -> str:
        calls = self.evidence.history
        count = "one earlier call" if len(calls) == 1 else f"{len(calls)} earlier calls"
        alike = all(c.shape == self.evidence.case.shape for c in calls)
        same = " of the same shape, with other values," if alike else ""
        cause = "a result or a setting is kept between calls"
        got = self._stale()
        return f"Right in a fresh process, wrong after {count}{same} in the same process: {cause}{got}."

    def _stale(self) -> str:
        """Whether the exact outputs of an earlier call came back."""
        for earlier in self.evidence.history:
            if earlier.shape != self.evidence.case.shape or time.monotonic() > self.deadline:
                continue
            trial = self.probe(earlier, fresh=True).trial
            if trial is not None and self.evidence.judged.outputs:
                verdict = trial.judge(self.evidence.judged.outputs).verdict
                if verdict == "PASS":
                    return "; the result of that earlier call was returned again"
        return ""

    # ---- causes

    def _witnesses(self) -> list[JudgedCall]:
        """Every call to be explained: this one, others that failed alike, and rich ones."""
        if self._rich is None:
            self._rich = [j for j in map(self._judge, self._richer()) if j is not None]
        found = [self.evidence.judged, *self.others, *self._rich]
        return [judged for judged in found if judged.trial is not None and judged.outputs]

    def _richer(self) -> Iterator[Case]:
        """Larger cases with this one's options, with random values."""
        case = replace(self.evidence.case, regime="normal", seed=1)
        supports = self._supports
        sizes = {symbol: _RICH[symbol] for symbol in case.sizes}
        sizes["N"] = -(-sizes["N"] // supports.multiple_of) * supports.multiple_of
        for symbol in ("D", "E"):
            if symbol in sizes and supports.head_dims:
                sizes[symbol] = min(supports.head_dims)
        if case.option("cu_seqlens") is not None:
            third = sizes["N"] // 3
            lengths = (third, sizes["N"] - third)
            options = tuple((n, lengths if n == "cu_seqlens" else v) for n, v in case.options)
            shape = {**sizes, "B": 1, "M": sizes["N"]}
            yield replace(case, shape=tuple(shape.items()), options=options)
        else:
            yield resized(case, **sizes)
            long = -(-_LONG // supports.multiple_of) * supports.multiple_of
            yield resized(case, **{**sizes, "N": long, **({"B": 1} if "B" in sizes else {})})

    @property
    def _supports(self) -> Supports:
        trial = self.evidence.judged.trial
        return trial.contract.supports if trial is not None else Supports()

    def _judge(self, case: Case) -> JudgedCall | None:
        """The verdict on a case's own values; None for a case that cannot be, or when the time is up."""
        if time.monotonic() > self.deadline or not supported(case, self._supports):
            return None
        repeat = True if self.evidence.kind == "determinism" else None
        judged = self.probe(case, repeat=repeat)
        return judged if judged.event.verdict in ("PASS", "FAIL") else None

    def _causes(self) -> Iterator[str]:
        """Alterations of the problem, else distortions of the outputs, that explain every witness."""
        witnesses = self._witnesses()
        if self.evidence.judged not in witnesses:
            return
        causes = list(self._altered(witnesses))
        if not causes:
            largest = sorted(witnesses, key=_size, reverse=True)
            causes = list(distortions(largest))
            yield from (_sentence(words) for words in causes[:_CAUSES])
            return
        where = "in the backward pass " if only_gradients(self.evidence.judged) else ""
        yield from (_sentence(where + words) for words in causes[:_CAUSES])

    def _altered(self, witnesses: Sequence[JudgedCall]) -> Iterator[str]:
        """In words, each alteration that explains all witnesses, one of them beyond doubt.

        The smallest witness comes first: it costs least, and refutes most alterations.
        """
        left = {_name(words): words for words, _ in alterations(witnesses[0])}
        certain: set[str] = set()
        for judged in sorted(witnesses, key=_size):
            standing = {} if judged.event.verdict == "FAIL" else dict(left)
            for words, problem in alterations(judged):
                name = _name(words)
                if name not in left or time.monotonic() > self.deadline:
                    continue
                answer = explains(problem, judged)
                standing.pop(name, None)
                if answer is not False:
                    standing[name] = left[name]
                if answer:
                    certain.add(name)
            left = standing
        yield from (words for name, words in left.items() if name in certain)

    # ---- where

    def _places(self) -> Iterator[str]:
        """Which rows, heads, batches and columns are wrong, in the largest failing call."""
        failing = [judged for judged in self._witnesses() if judged.event.verdict == "FAIL"]
        if failing:
            yield from places(max(failing, key=_size))

    # ---- further calls

    def _boundaries(self) -> Iterator[str]:
        """Whether one query or key fewer is right: then the size lies just beyond a tile or a limit."""
        case = replace(self.evidence.case, regime="normal", seed=1)
        if case.option("cu_seqlens") is not None or not self._alike(case):
            return
        for symbol, name in (("N", "keys"), ("M", "queries")):
            size, step = case.sizes.get(symbol, 0), self._supports.multiple_of if symbol == "N" else 1
            if size - step < _FEW:
                continue
            fewer = self._judge(resized(case, **{symbol: size - step}))
            if fewer is not None and fewer.event.verdict == "PASS":
                tile = next((t for t in _TILES if (size - step) % t == 0), None)
                words = f"{size - step} {name} are right, {size} are wrong"
                yield f"{words}: beyond a tile of {tile}." if tile else f"{words}."

    def _alike(self, case: Case) -> bool:
        judged = self._judge(case)
        return judged is not None and same_failure(self.evidence, judged)

    def _siblings(self) -> Iterator[str]:
        """In which dtypes, options and views a failing case fails, one changed at a time."""
        bases = [*self.others, *(self._rich or ()), self.evidence.judged]
        base = next((j.case for j in bases if j.inputs is None and j.event.verdict == "FAIL"), None)
        trial = self.evidence.judged.trial
        if base is None or trial is None:
            return
        verdicts = {
            d: self._verdict(replace(base, dtype=d)) for d in trial.contract.dtypes if d != base.dtype
        }
        right = [dtype for dtype, verdict in verdicts.items() if verdict == "PASS"]
        wrong = [base.dtype, *[dtype for dtype, verdict in verdicts.items() if verdict == "FAIL"]]
        if right:
            yield f"Wrong in {_listed(wrong)}, right in {_listed(right)}."
        for name in [n for n, _ in base.options if n not in ("causal_alignment", "cotangents", "pool")]:
            if self._verdict(with_option(base, name)) == "PASS":
                yield f"Right without {name}, wrong with it."
        if base.view != "contiguous" and self._verdict(replace(base, view="contiguous")) == "PASS":
            yield f"Right on contiguous tensors, wrong in the memory layout {base.view!r}."

    def _verdict(self, case: Case) -> str:
        judged = self._judge(case)
        return "" if judged is None else judged.event.verdict


def _size(judged: JudgedCall) -> int:
    return sum(tensor.numel() for tensor in judged.outputs.values())


def _name(words: str) -> str:
    """What alterations of different calls have in common: their words up to the sizes in brackets."""
    return words.partition(" (")[0]


def _sentence(words: str) -> str:
    """A sentence; the name of an output stays as it is written."""
    return f"{words}." if re.match(r"(o|y|lse|d[a-z]+) ", words) else f"{words[0].upper()}{words[1:]}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _line(ended: Raised) -> str:
    """The kernel's own line that raised, as far as the traceback tells."""
    found = re.findall(r'File "([^"]+)", line (\d+)', ended.traceback)
    return f" ({found[-1][0]}:{found[-1][1]})" if found else ""
