"""The search for an input on which a kernel is wrong: its phases, its threads, and what it tells.

Phases, in this order: *replay* of failures that earlier searches found; the *opening* (the likeliest failures
first); the *plan* of regimes, dtypes and pairs of options, with *larger* sizes and the *invariants* dealt in
between; then, until the time is up, *random* structure in every thread but one, in which Hypothesis is
*climbing* towards the budget's edge. The first failure ends the search; it is made small, put into words and
into a script, and remembered for the next search.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from hypothesis.database import ExampleDatabase

from attnproof.campaign import Limits, judge_kernel, kernel_started, run_finished, run_started
from attnproof.invariance import invariants_for, places
from attnproof.outcomes import Raised
from attnproof.properties.case import Case, Inputs
from attnproof.properties.invariants import Invariant
from attnproof.properties.regimes import plan
from attnproof.properties.regimes.opening import larger, opening
from attnproof.reports.record import CaseJudged, Counterexample, Event, KernelJudged
from attnproof.search.diagnosis import diagnose
from attnproof.search.evidence import Evidence, Probe
from attnproof.search.known import Known, forget, recall, remember
from attnproof.search.lanes import Lanes, Result, Step
from attnproof.search.prober import Prober
from attnproof.search.scripts import script, values_in_words
from attnproof.search.shrinking import shrink
from attnproof.targets import Importable, TargetError
from attnproof.trials import JudgedCall, Subject, case_record

__all__ = ["DEFAULT_SECONDS", "Search"]

DEFAULT_SECONDS = 50.0
"""A default search ends within a minute on two cores: start and a late failure's shrinking come on top."""

# Of the time, at most this many seconds, and at most this share, are kept for making a failure small.
_RESERVED_SECONDS, _RESERVED_SHARE = 6.0, 0.3
# A failure is made small in at least this long, or this share of the time, and in at most that.
_SHRINKING_SECONDS, _LONGEST_SHRINKING = 10.0, 15.0
_SHRINKING_SHARE = 0.2
# One call may take at most this share of the search.
_CALL_SHARE = 0.3
# Cases of the plan: all regimes in all dtypes and all pairs of options of a softmax kernel take about 150.
_PLANNED = 150
# After this many cases of the plan comes one of the larger sizes or an invariant.
_DEALT_EVERY = 4
# A search that judged a smaller share of what it planned has not verified the kernel.
_FEWEST = 0.5


@dataclass(frozen=True)
class Search:
    """A search for a failure of one kernel.

    Attributes:
        subject: the kernel under its contract.
        command: for the record.
        examples: cases to judge, or None for as many as the time allows.
        seconds: time of the whole search with shrinking, or None for no limit (with ``examples``).
        seed: of all inputs and choices; jobs: judge threads, each with a worker process.
        limits: of each worker; database: where failures are kept, or None.
        minimise: whether a failure is made small and put into words.
    """

    subject: Subject
    command: str = "attnproof.fuzz"
    examples: int | None = None
    seconds: float | None = DEFAULT_SECONDS
    seed: int = 0
    jobs: int = 2
    limits: Limits = field(default_factory=partial(Limits, timeout=20.0))
    database: ExampleDatabase | None = None
    minimise: bool = True

    def run(self) -> Iterator[Event]:
        """Search; the events end with KernelJudged and RunFinished.

        Raises:
            TargetError: the target cannot be imported.
        """
        begun = time.monotonic()
        torch.set_num_threads(1)
        yield run_started(self.command, self.seed, self.jobs)
        planned = self._planned()
        yield kernel_started(self.subject, self.examples or len(planned))
        reserve = min(_RESERVED_SECONDS, _RESERVED_SHARE * (self.seconds or 1e9))
        until = None if self.seconds is None else begun + self.seconds - reserve
        lanes = Lanes(
            self.subject,
            planned,
            limits=self.call_limits,
            jobs=self.jobs,
            seed=self.seed,
            examples=self.examples,
            until=until,
        )
        events: list[CaseJudged] = []
        planned_done = tried = 0
        failing: Result | None = None
        try:
            for result in lanes.results():
                self._raise_if_unusable(result)
                if result.step.known is not None and result.judged.event.verdict != "FAIL":
                    self._forget(result.step.known)
                if result.step.invariant is not None and result.judged.event.verdict == "DECLINED":
                    # It does not apply to what this kernel takes: nothing was declined that was promised.
                    planned_done += 1
                    continue
                by_chance = result.step.phase in ("replay", "random", "climbing")
                planned_done += not by_chance
                tried += 1
                # Chance may draw any number of cases that could not tell a wrong kernel: they count by their
                # failures only.
                if not by_chance or result.judged.event.verdict in ("FAIL", "UNVERIFIED"):
                    events.append(result.judged.event)
                yield result.judged.event
                if result.judged.event.verdict == "FAIL":
                    failing = result
                    break
            found_after = time.monotonic() - begun
            lanes.stop()
            if failing is not None:
                yield self._counterexample(failing, tried, found_after, begun, lanes)
        finally:
            lanes.close()
        verdict = self._verdict(events, planned_done, len(planned))
        yield verdict
        yield run_finished([verdict], time.monotonic() - begun)

    @property
    def call_limits(self) -> Limits:
        """The limits of a worker: one call must leave time for others."""
        if self.seconds is None:
            return self.limits
        return replace(self.limits, timeout=min(self.limits.timeout, _CALL_SHARE * self.seconds))

    def _planned(self) -> list[Step]:
        """Everything that is tried before chance takes over."""
        contract = self.subject.contract
        arguments: dict[str, Any] = {
            "dtypes": contract.dtypes,
            "options": self.subject.options,
            "supports": contract.supports,
            "causal_alignment": contract.causal_alignment,
            "seed": self.seed,
        }
        first = opening(contract.family, **arguments)
        steps = [Step("opening", case) for case in first]
        # What few families have first: it sees what no single call of theirs can show.
        put = sorted(places(contract, first, 2), key=lambda place: len(place[0].recipes))
        dealt = _dealt(
            [Step("larger", case) for case in larger(contract.family, **arguments)],
            [Step("invariants", case, invariant) for invariant, case in put],
        )
        cases = iter(plan(contract.family, budget=_PLANNED, **arguments))
        while batch := list(itertools.islice(cases, _DEALT_EVERY)):
            steps += [Step("plan", case) for case in batch]
            steps += list(itertools.islice(dealt, 1))
        steps += list(dealt)
        return self._replayed() + steps

    def _replayed(self) -> list[Step]:
        if self.database is None:
            return []
        contract = self.subject.contract
        known = recall(self.database, self._target, contract)
        invariants = {invariant.name: invariant for invariant in invariants_for(contract.family, contract)}
        return [
            Step("replay", k.case, invariants.get(k.invariant), k)
            for k in known
            if not k.invariant or k.invariant in invariants
        ]

    @property
    def _target(self) -> str:
        return self.subject.source.label

    def _forget(self, known: Known) -> None:
        assert self.database is not None
        forget(self.database, self._target, self.subject.contract, known)

    def _raise_if_unusable(self, result: Result) -> None:
        """A target that cannot be imported is a usage error, not a verdict."""
        outcome = result.judged.outcome
        if (
            isinstance(outcome, Raised)
            and outcome.phase == "import"
            and isinstance(self.subject.source, Importable)
        ):
            raise TargetError(outcome.message if outcome.type.endswith("TargetError") else str(outcome))

    def _counterexample(
        self, failing: Result, cases: int, found_after: float, begun: float, lanes: Lanes
    ) -> Counterexample:
        """The failure made small, in words and as a script, and remembered."""
        deadline = time.monotonic() + _LONGEST_SHRINKING
        if self.seconds is not None:
            least = time.monotonic() + min(_SHRINKING_SECONDS, _SHRINKING_SHARE * self.seconds)
            deadline = min(deadline, max(least, begun + self.seconds))
        invariant = failing.step.invariant
        known = failing.step.known
        evidence = Evidence(
            failing.judged, invariant.name if invariant else "", known.history if known else ()
        )
        if not self.minimise:
            return self._told(failing, evidence, (), cases, found_after, 0.0)
        prober = failing.prober
        prober.start_ahead()
        lanes.join()
        probe = partial(_probe_invariant, prober, invariant) if invariant else prober
        small, sentences = self._understood(failing, evidence, probe, deadline)
        if self.database is not None:
            kept = Known(small.case, small.judged.inputs, small.invariant, small.history)
            remember(self.database, self._target, self.subject.contract, kept)
        spent = time.monotonic() - begun - found_after
        return self._told(failing, small, sentences, cases, found_after, spent)

    def _understood(
        self, failing: Result, evidence: Evidence, probe: Probe, deadline: float
    ) -> tuple[Evidence, tuple[str, ...]]:
        """The smallest failure and what is wrong with it.

        The verdict stands whatever happens here: where shrinking or diagnosis fails, the rest is told.
        """
        small = evidence
        if evidence.kind == "crash" and "timeout" in evidence.rules:
            # Every further call would take as long.
            return small, (f"The kernel does not return within {self.call_limits.timeout:g} seconds.",)
        middle = time.monotonic() + 0.7 * (deadline - time.monotonic())
        try:
            supports = self.subject.contract.supports
            small = shrink(evidence, probe, deadline=middle, supports=supports, recent=failing.recent)
            return small, diagnose(small, probe, deadline=deadline, others=[failing.judged])
        except Exception as error:
            return small, (f"No diagnosis: the search itself failed ({type(error).__name__}: {error}).",)

    def _told(
        self,
        failing: Result,
        small: Evidence,
        sentences: tuple[str, ...],
        cases: int,
        seconds: float,
        shrinking_seconds: float,
    ) -> Counterexample:
        return Counterexample(
            kernel=self.subject.name,
            found=case_record(failing.judged.case),
            case=case_record(small.case),
            verdict=small.judged.event,
            sentences=sentences,
            script=script(small, self.subject, sentences),
            tensors=values_in_words(small),
            phase=failing.step.phase,
            invariant=small.invariant,
            cases=cases,
            seconds=seconds,
            shrinking_seconds=shrinking_seconds,
        )

    def _verdict(self, events: Sequence[CaseJudged], done: int, planned: int) -> KernelJudged:
        """The verdict on the kernel; a search that had no time for its plan has verified nothing."""
        verdict = judge_kernel(self.subject, events)
        too_few = self.examples is None and done < _FEWEST * planned
        if verdict.verdict == "PASS" and too_few:
            reason = f"time for {done} of {planned} planned cases; give --time more seconds"
            return _changed(verdict, reason)
        return verdict


def _changed(verdict: KernelJudged, reason: str) -> KernelJudged:
    fields = {name: getattr(verdict, name) for name in verdict.__struct_fields__}
    return KernelJudged(**{**fields, "verdict": "UNVERIFIED", "as_expected": False, "reason": reason})


def _dealt(*hands: Iterable[Step]) -> Iterator[Step]:
    """One step of each hand in turn, until all are empty."""
    for row in itertools.zip_longest(*hands):
        yield from (step for step in row if step is not None)


def _probe_invariant(
    prober: Prober, invariant: Invariant, case: Case, inputs: Inputs | None = None, **_: object
) -> JudgedCall:
    """An invariant is probed at cases only: its own variants decide about tensors."""
    judged = prober.invariant(invariant, case)
    return judged if inputs is None else replace(judged, inputs=None)
