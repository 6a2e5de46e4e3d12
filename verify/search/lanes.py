"""The threads of a search, each with a worker process of its own: they share the planned steps, then chance.

While one thread waits for its worker, another certifies a reference; results come back in one queue.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from attnproof.campaign import Limits
from attnproof.properties.case import Case
from attnproof.properties.invariants import Invariant
from attnproof.properties.regimes import plan
from attnproof.reports.record import CaseJudged
from attnproof.search.climbing import Stopped, climb
from attnproof.search.known import Known
from attnproof.search.prober import Prober
from attnproof.trials import JudgedCall, Subject

__all__ = ["Lanes", "Result", "Step"]

# Seconds that a step may go on after the search has ended, and until the interpreter ends.
_GRACE_SECONDS = 2.0
_LONGEST_STEP = 60.0
_BY_CHANCE = ("random", "climbing")
_STATISTICS = frozenset({"probable-row", "probable-output", "bias"})


@dataclass(frozen=True)
class Step:
    """One thing to judge: a case, a failure of an earlier search, or an invariant at a case."""

    phase: str
    case: Case
    invariant: Invariant | None = None
    known: Known | None = None


@dataclass(frozen=True)
class Result:
    """A step judged, by which prober, and what its worker was called with before."""

    step: Step
    judged: JudgedCall
    prober: Prober
    recent: tuple[Case, ...]


class Lanes:
    """The judge threads, and the queue of their results.

    Args:
        subject: the kernel; planned: what to judge first, in order.
        limits: of each worker; jobs: number of threads; seed: of what chance draws.
        examples: steps to judge, or None; until: time.monotonic() after which none is begun, or None.
    """

    def __init__(
        self,
        subject: Subject,
        planned: Sequence[Step],
        *,
        limits: Limits,
        jobs: int,
        seed: int,
        examples: int | None,
        until: float | None,
    ) -> None:
        self._subject, self._seed = subject, seed
        self._until = until
        self._results: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        self._planned = iter(planned)
        self._random = _random_steps(subject, seed)
        self._lock = threading.Lock()
        self._left = examples
        self._stopping = threading.Event()
        self._probers = [Prober(subject, limits) for _ in range(jobs)]
        self._threads = [
            threading.Thread(target=self._serve, args=(number, prober), daemon=True)
            for number, prober in enumerate(self._probers)
        ]
        for thread in self._threads:
            thread.start()
        # A thread that is still in native code when the interpreter ends would abort the process.
        atexit.register(_wait_for, self._threads)

    def results(self) -> Iterator[Result]:
        """Results as they come, until every thread is done or the time is up.

        A step that is still under way then is given up: its worker ends with :meth:`close`.
        """
        running = len(self._threads)
        while running:
            left = None if self._until is None else max(0.0, self._until + _GRACE_SECONDS - time.monotonic())
            try:
                result = self._results.get(timeout=left)
            except queue.Empty:
                return
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            elif not self._stopping.is_set():
                yield result

    def stop(self) -> None:
        """No further step is begun."""
        self._stopping.set()

    def join(self) -> None:
        """Wait for the steps that are under way, but not for one that takes long to certify."""
        until = time.monotonic() + _GRACE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def close(self) -> None:
        """End threads and workers."""
        self.stop()
        for prober in self._probers:
            prober.close()
        self.join()

    def _serve(self, number: int, prober: Prober) -> None:
        try:
            while (step := self._next_planned()) is not None:
                self._judge(prober, step)
            if number == 0:
                climb(self._subject, 1000 * self._seed, partial(self._climbed, prober))
            while True:
                with self._lock:
                    step = next(self._random)
                self._judge(prober, step)
        except Stopped:
            pass
        except BaseException as error:
            self._results.put(error)
        self._results.put(None)

    def _next_planned(self) -> Step | None:
        with self._lock:
            return next(self._planned, None)

    def _climbed(self, prober: Prober, case: Case) -> CaseJudged:
        return self._judge(prober, Step("climbing", case))

    def _judge(self, prober: Prober, step: Step) -> CaseJudged:
        """Judge one step and hand on the result.

        Raises:
            Stopped: time or examples are used up.
        """
        with self._lock:
            if self._left is not None:
                self._left -= 1
            used_up = self._left is not None and self._left < 0
        late = self._until is not None and time.monotonic() > self._until
        if used_up or late or self._stopping.is_set():
            raise Stopped
        recent = prober.recent
        if step.invariant is not None:
            judged = prober.invariant(step.invariant, step.case)
        elif step.known is not None:
            judged = prober(step.case, step.known.inputs, history=step.known.history)
        else:
            judged = prober(step.case)
            if step.phase in _BY_CHANCE and _only_statistics(judged):
                # The search picks the most extreme of thousands: other values must confirm it.
                judged = prober(replace(step.case, seed=step.case.seed + 1_000_003))
        self._results.put(Result(step, judged, prober, recent))
        return judged.event


def _only_statistics(judged: JudgedCall) -> bool:
    rules = {failure.rule for failure in judged.event.failures}
    return judged.event.verdict == "FAIL" and rules <= _STATISTICS


def _wait_for(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(_LONGEST_STEP)


def _random_steps(subject: Subject, seed: int) -> Iterator[Step]:
    """Cases of random structure without end."""
    contract = subject.contract
    cases = plan(
        contract.family,
        dtypes=contract.dtypes,
        options=subject.options,
        supports=contract.supports,
        causal_alignment=contract.causal_alignment,
        budget=0,
        seed=seed + 7,
        thorough=True,
    )
    return (Step("random", case) for case in cases)
