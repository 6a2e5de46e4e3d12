"""One failing call held against candidates: each that fails alike takes its place."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from attnproof.outcomes import Raised
from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Supports
from attnproof.search.evidence import Evidence, Probe, kinds_of
from attnproof.search.smaller_calls import supported, tensors_of
from attnproof.trials import JudgedCall

__all__ = ["Descent", "same_failure"]


def same_failure(evidence: Evidence, judged: JudgedCall) -> bool:
    """Whether ``judged`` failed in the way in which ``evidence`` did, and is proved if that is."""
    event = judged.event
    rules = [failure.rule for failure in event.failures]
    wanted = kinds_of(evidence.rules)[:1]
    if event.verdict != "FAIL" or not set(wanted) <= set(kinds_of(rules)):
        return False
    if "certain" in evidence.rules and wanted == ("numeric",) and "certain" not in rules:
        return False
    return _fault(evidence.judged) == _fault(judged)


def _fault(judged: JudgedCall) -> tuple[str, str]:
    """What was raised, numbers taken out: a shape error of another place is another failure."""
    if not isinstance(judged.outcome, Raised):
        return "", ""
    return judged.outcome.type, re.sub(r"\d+", "#", judged.outcome.message)[:80]


class Descent:
    """The best failing call so far, and what its next rival is held against.

    Attributes:
        original, best: the failure as it was found, and the plainest call so far that fails alike.
        deadline: of ``time.monotonic()``; supports: what the kernel accepts.
        cost, fresh_cost: seconds that a probe takes, in a running worker and in a new one.
        repeat: handed to the probe.
    """

    def __init__(
        self,
        evidence: Evidence,
        probe: Probe,
        deadline: float,
        supports: Supports,
        on_progress: Callable[[Evidence], None] | None,
    ) -> None:
        self.original = self.best = evidence
        self.deadline, self.supports = deadline, supports
        self._probe, self._tell = probe, on_progress
        self.cost = evidence.judged.event.seconds
        self.fresh_cost = 0.0
        self._tried = {_identity(evidence.case, evidence.judged.inputs)}
        self.repeat = True if evidence.kind == "determinism" else None

    @property
    def case(self) -> Case:
        """The case of the best call."""
        return self.best.case

    def attempt(self, case: Case, inputs: Inputs | None = None) -> bool:
        """Whether this call fails alike; if so it becomes the best."""
        key = _identity(case, inputs)
        if key in self._tried or not supported(case, self.supports) or not self.in_time(self.cost):
            return False
        self._tried.add(key)
        begun = time.monotonic()
        judged = self._probe(case, inputs, repeat=self.repeat)
        self.cost = max(0.75 * self.cost, time.monotonic() - begun)
        if not same_failure(self.original, judged):
            return False
        self.accept(replace(self.best, judged=judged))
        return True

    def accept(self, evidence: Evidence) -> None:
        """Make this the best call."""
        self.best = evidence
        if self._tell is not None:
            self._tell(evidence)

    def in_time(self, cost: float) -> bool:
        """Whether a probe of so many seconds ends before the deadline."""
        return time.monotonic() + cost < self.deadline

    def again(
        self, case: Case, inputs: Inputs | None, history: Sequence[Case], *, late: bool = False
    ) -> JudgedCall | None:
        """The call in a fresh process after ``history``, if it fails alike.

        ``late``: also where the probe may end after the deadline.
        """
        if not late and not self.in_time(max(self.fresh_cost, self.cost)):
            return None
        begun = time.monotonic()
        judged = self._probe(case, inputs, history=history, fresh=True, repeat=self.repeat)
        elapsed = time.monotonic() - begun
        self.fresh_cost = max(self.fresh_cost, elapsed)
        self.cost = min(self.cost, elapsed)
        return judged if same_failure(self.original, judged) else None

    def fails_fresh(self, evidence: Evidence, *, late: bool = False) -> bool:
        """Whether this call fails alike as the first of a new process."""
        return self.again(evidence.case, evidence.judged.inputs, (), late=late) is not None


def _identity(case: Case, inputs: Inputs | None) -> tuple[object, ...]:
    """What distinguishes one call from another."""
    if inputs is None:
        return (case.id,)
    values = tuple(t.double().numpy().tobytes() for t in tensors_of(case, inputs).values())
    return (replace(case, seed=0).id, inputs.options.get("scale"), values)
