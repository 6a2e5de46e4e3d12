"""One thread's way to a kernel: calls in a worker of its own, judged, with what was called before at hand."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence

from attnproof import campaign
from attnproof.invariance import judge_invariant
from attnproof.properties.case import Case, Inputs
from attnproof.properties.invariants import Invariant
from attnproof.trials import JudgedCall, Subject, judge_call
from attnproof.worker_process import Limits
from attnproof.workers import Worker, WorkerPool

__all__ = ["Prober"]

# Earlier calls that may have left a kernel in the state in which it fails.
_REMEMBERED = 64


class Prober:
    """Judges calls of one kernel in one worker process; used by one thread at a time.

    Args:
        subject: the kernel.
        limits: what the worker may use.
    """

    def __init__(self, subject: Subject, limits: campaign.Limits) -> None:
        self.subject = subject
        self._limits = Limits(timeout=limits.timeout, memory=limits.memory)
        self._pool = WorkerPool(jobs=1, spares=0, limits=self._limits)
        self._recent: deque[Case] = deque(maxlen=_REMEMBERED)
        self._ahead: Worker | None = None

    @property
    def recent(self) -> tuple[Case, ...]:
        """The last cases that this worker was called with, oldest first."""
        return tuple(self._recent)

    def __call__(
        self,
        case: Case,
        inputs: Inputs | None = None,
        *,
        history: Sequence[Case] = (),
        fresh: bool = False,
        repeat: bool | None = None,
    ) -> JudgedCall:
        """The verdict on one call; see :class:`attnproof.search.evidence.Probe`."""
        if not (fresh or history):
            judged = judge_call(self.subject, case, self._pool.call, inputs, repeat=repeat)
            self._recent.append(case)
            return judged
        with self._fresh_worker() as worker:
            for earlier in history:
                judge_call(self.subject, earlier, worker.call)
            return judge_call(self.subject, case, worker.call, inputs, repeat=repeat)

    def invariant(self, invariant: Invariant, case: Case) -> JudgedCall:
        """The verdict on an invariant at ``case``, in the form of a call without outputs."""
        event = judge_invariant(self.subject, invariant, case, self._pool.call)
        self._recent.append(case)
        return JudgedCall(case, None, event, None, {}, None)

    def start_ahead(self) -> None:
        """Begin to start a process for the next fresh call, which takes seconds to import torch."""
        if self._ahead is None:
            self._ahead = Worker(self._limits)

    @contextlib.contextmanager
    def _fresh_worker(self) -> Iterator[Worker]:
        """A worker that has answered no call; the next one is started on the way."""
        worker, self._ahead = self._ahead or Worker(self._limits), None
        self.start_ahead()
        try:
            yield worker
        finally:
            worker.close()

    def close(self) -> None:
        """End the workers; a call under way in another thread comes back as crashed."""
        self._pool.close()
        if self._ahead is not None:
            self._ahead.close()
