"""Kernels under test, called from outside: one process a kernel, killed when it hangs, replaced when it
breaks.

    with WorkerPool(jobs=2) as pool:
        outcome = pool.call(CallRequest(describe(attention), arguments=(q, k, v), keywords={"scale": 0.125}))

A :class:`Worker` is one process that serves one kernel on one device; a :class:`WorkerPool` hands calls of
several judge threads to workers, replaces those that died or were left dirty, and starts processes ahead,
because importing torch takes seconds. Every call gives exactly one outcome of :mod:`attnproof.outcomes`.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from dataclasses import replace
from types import TracebackType
from typing import Any, Final

from attnproof import arena
from attnproof.in_process import InProcess
from attnproof.nursery import UNKNOWN_STATUS
from attnproof.outcomes import (
    CallRequest,
    Crashed,
    Declined,
    Flooded,
    Isolation,
    Mutation,
    Outcome,
    OutOfMemory,
    Phase,
    Raised,
    Returned,
    TimedOut,
)
from attnproof.protocol import (
    Bind,
    Bound,
    Call,
    FromWorker,
    ProtocolError,
    Reply,
    Trouble,
    Warm,
    check_reply,
)
from attnproof.targets import Importable, KernelSource
from attnproof.worker_process import (
    ExceededMemoryError,
    Limits,
    LostContactError,
    OutOfTimeError,
    WorkerProcess,
)
from attnproof.worker_replies import (
    Circumstances,
    check_device,
    message_for,
    outcome_of_reply,
    outcome_of_trouble,
)

__all__ = ["CallRequest", "Limits", "Outcome", "Worker", "WorkerPool"]

_MIN_CALLS: Final = 100
_RESIDUE_RESTARTS: Final = 3
"""A kernel that leaves threads or children behind each time gets this many fresh workers, then keeps one."""

_BROKEN_ALLOCATION: Final = "std::bad_alloc"
_EndedCall = Returned | Declined | Raised | Crashed | TimedOut | OutOfMemory


class Worker:
    """One process for one kernel on one device; used by one thread at a time.

    Args:
        limits: what it may use.

    The process is started at once and warms up by itself; the first call binds it to that call's kernel and
    device.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._process = WorkerProcess(self._limits)
        self._numbers = itertools.count(int.from_bytes(os.urandom(4), "big"))
        self._bound: tuple[KernelSource, str] | None = None
        self._import_effects: tuple[str, ...] = ()
        self._warm = False
        self._failed_import: Trouble | None = None
        self.calls = 0
        """Calls answered so far."""
        self.alive = True
        """Whether it can take another call."""
        self.residue: tuple[str, ...] = ()
        """What calls left behind that could not be undone."""

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def call(self, request: CallRequest) -> Outcome:
        """Make one call and tell how it ended.

        Raises:
            ValueError: this worker serves another kernel or device, is closed, or cannot be sent these
                arguments.
            TypeError: an argument of a kind that cannot be sent.
        """
        key = (request.kernel, request.device)
        if not self.alive:
            raise ValueError("this worker has ended; ask the pool for another, or start a new Worker")
        if self._bound not in (None, key):
            raise ValueError(
                f"this worker serves {self._bound}; a worker serves one kernel on one device only"
            )
        check_device(request.device)
        packed = arena.pack(request)
        begin = time.monotonic()
        try:
            ended = self._ended(request, packed, begin)
        except BaseException:  # such as Ctrl-C: an answer that is still to come would go to the next call
            self.close()
            raise
        self.calls += 1
        if ended.output.size > self._limits.output:
            return Flooded(limit=self._limits.output, ended=ended, **Circumstances.of(ended).fields())
        return ended

    def _ended(self, request: CallRequest, packed: arena.Packed, begin: float) -> _EndedCall:
        phase: Phase = "start"
        limit = self._limits.start_timeout
        try:
            if not self._warm:
                self._receive(Warm, None, b"", limit)
                self._warm = True
            phase = "import"
            if self._bound is None:
                self._bind(request.kernel, request.device)
            if self._failed_import is not None:
                return outcome_of_trouble(
                    self._failed_import, self._circumstances(begin, ()), self._limits.memory
                )
            phase = "forward"
            limit = request.timeout or self._limits.timeout
            number = next(self._numbers)
            call = message_for(request, packed, number, self._process.write_shared(packed.image))
            reply, body = self._receive(Reply, call, b"", limit)
            check_reply(reply, len(body), number)
        except LostContactError as lost:
            return self._crashed(str(lost), phase, begin, packed)
        except ProtocolError as error:
            return self._crashed(f"the worker's reply contradicts itself: {error}", phase, begin, packed)
        except OutOfTimeError:
            self._process.ask_for_stack()
            return TimedOut(limit=limit, phase=phase, **self._end(begin, packed).fields())
        except ExceededMemoryError as exceeded:
            message = f"killed at {exceeded.resident} resident bytes"
            return OutOfMemory(
                limit=self._limits.memory,
                resident=exceeded.resident,
                phase=phase,
                message=message,
                **self._end(begin, packed).fields(),
            )
        self.residue += reply.residue
        changed = arena.mutations(packed, self._process.shared())
        circumstances = self._circumstances(
            begin, changed, reply.residue, (*self._import_effects, *reply.effects)
        )
        self._import_effects = ()
        if reply.trouble is not None:
            return outcome_of_trouble(reply.trouble, circumstances, self._limits.memory)
        return outcome_of_reply(reply, body, circumstances.fields())

    def _receive(
        self, expected: type[Any], message: Bind | Call | None, body: bytes, timeout: float
    ) -> tuple[Any, bytearray]:
        answer: FromWorker
        watch = not (self._bound is None or self._bound[1].startswith("cuda"))
        answer, content = self._process.exchange(message, body, timeout, watch_memory=watch)
        if not isinstance(answer, expected):
            raise ProtocolError(f"{type(answer).__name__} came where {expected.__name__} belongs")
        return answer, content

    def _bind(self, kernel: KernelSource, device: str) -> None:
        target, payload = (kernel.target, b"") if isinstance(kernel, Importable) else ("", kernel.payload)
        # CUDA maps address space far beyond what it uses.
        headroom = None if device.startswith("cuda") else self._limits.memory
        bind = Bind(target, device, tuple(sys.path), os.getcwd(), headroom, self._limits.result)
        bound, _ = self._receive(Bound, bind, payload, self._limits.start_timeout)
        self._bound = (kernel, device)
        self._failed_import, self._import_effects = (
            bound.trouble,
            tuple(f"import: {text}" for text in bound.effects),
        )
        self._process.mark_baseline()

    def _circumstances(
        self,
        begin: float,
        mutations: tuple[Mutation, ...],
        residue: tuple[str, ...] = (),
        effects: tuple[str, ...] = (),
    ) -> Circumstances:
        output = self._process.take_output()
        return Circumstances(
            output, mutations, time.monotonic() - begin, self.pid, "process", residue, effects
        )

    def _end(self, begin: float, packed: arena.Packed) -> Circumstances:
        """Kill the process, then look at the memory that it can no longer write to."""
        self.alive = False
        self._process.kill()
        shared = self._process.shared()
        changed = arena.mutations(packed, shared) if shared.size >= packed.image.size else ()
        circumstances = self._circumstances(begin, changed)
        self._process.close()
        return circumstances

    def _crashed(
        self, reason: str, phase: Phase, begin: float, packed: arena.Packed
    ) -> Crashed | OutOfMemory:
        status = self._process.wait_for_end()
        circumstances = self._end(begin, packed)
        if status is None:
            reason = f"{reason}, while it was still running; the judge killed it"
        elif status == UNKNOWN_STATUS:
            reason = "the process ended; how is not known, as the one that had forked it was killed"
        elif status < 0:
            reason = "the process was killed by a signal"
        else:
            reason = f"the process left with exit status {status}"
        signal = -status if status is not None and status < 0 else None
        if signal is not None and _BROKEN_ALLOCATION in circumstances.output.tail:
            words = "an allocation failed in native code, which aborted"
            return OutOfMemory(
                limit=self._limits.memory, resident=None, phase=phase, message=words, **circumstances.fields()
            )
        code = status if signal is None and status != UNKNOWN_STATUS else None
        return Crashed(signal=signal, exit_code=code, phase=phase, reason=reason, **circumstances.fields())

    def interrupt(self) -> None:
        """End the process from another thread; a call that waits for it comes back as crashed."""
        self._process.interrupt()

    def close(self) -> None:
        """End the process and everything it started."""
        self.alive = False
        self._process.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WorkerPool:
    """Workers for calls from several judge threads.

    Args:
        jobs: calls that run at the same time; further callers wait.
        limits: what each worker may use; the default is 4 GiB, 60 s a call, 16 MiB of output.
        calls_per_worker: calls of one kernel after which its worker is replaced, at least 100.
        spares: processes that are started ahead, so that the next kernel need not wait for torch to be
            imported.
        isolation: "process", or "none" to run everything in this process, one call at a time, for debugging.
        memory_limit: bytes, in place of ``limits.memory``.
        timeout: seconds of a call, in place of ``limits.timeout``.

    Raises:
        ValueError: no jobs, or fewer than 100 calls a worker.
    """

    def __init__(
        self,
        jobs: int = 1,
        *,
        limits: Limits | None = None,
        calls_per_worker: int = 1000,
        spares: int = 1,
        isolation: Isolation = "process",
        memory_limit: int | None = None,
        timeout: float | None = None,
    ) -> None:
        if jobs < 1 or spares < 0 or calls_per_worker < _MIN_CALLS:
            raise ValueError(
                f"jobs={jobs}, spares={spares}, calls_per_worker={calls_per_worker}: at least 1 job, "
                f"no negative number of spares, and at least {_MIN_CALLS} calls a worker, as fewer "
                "would hide what depends on history"
            )
        limits = limits or Limits()
        self._limits = replace(
            limits, memory=memory_limit or limits.memory, timeout=timeout or limits.timeout
        )
        self._jobs = 1 if isolation == "none" else jobs
        self._calls_per_worker = calls_per_worker
        self._wanted_spares = spares if isolation == "process" else 0
        self._in_process = InProcess(self._limits) if isolation == "none" else None
        self._slots = threading.Semaphore(self._jobs)
        self._lock = threading.Lock()
        self._idle: dict[tuple[KernelSource, str], list[Worker]] = {}
        self._spares: list[Worker] = []
        self._busy: set[Worker] = set()
        self._dirtied: dict[tuple[KernelSource, str], int] = {}
        self._closed = False
        self._add_spares()

    def call(self, request: CallRequest) -> Outcome:
        """Make a call in a worker of the request's kernel and device; waits while all jobs are busy.

        Raises:
            ValueError: the pool is closed, or what :meth:`Worker.call` says of the arguments.
            TypeError: likewise.
        """
        check_device(request.device)
        with self._slots:
            if self._in_process is not None:
                return self._in_process.call(request)
            key = (request.kernel, request.device)
            worker = self._take(key)
            try:
                return worker.call(request)
            finally:
                self._give(key, worker)

    def _take(self, key: tuple[KernelSource, str]) -> Worker:
        with self._lock:
            if self._closed:
                raise ValueError("this WorkerPool is closed; make calls inside its with block")
            waiting = self._idle.get(key)
            if waiting:
                worker, evicted = waiting.pop(), []
            else:
                worker = self._spares.pop(0) if self._spares else Worker(self._limits)
                evicted = self._surplus()
            self._busy.add(worker)
        for other in evicted:
            other.close()
        self._add_spares()
        return worker

    def _surplus(self) -> list[Worker]:
        """Idle workers beyond the number of jobs, the longest unused kernel first; takes them out."""
        evicted: list[Worker] = []
        for key in list(self._idle):
            idle = self._idle[key]
            while idle and len(self._busy) + 1 + sum(map(len, self._idle.values())) > self._jobs:
                evicted.append(idle.pop(0))
            if not idle:
                del self._idle[key]
        return evicted

    def _give(self, key: tuple[KernelSource, str], worker: Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            if worker.residue:
                self._dirtied[key] = self._dirtied.get(key, 0) + 1
                dirty = self._dirtied[key] <= _RESIDUE_RESTARTS
                worker.residue = ()
            else:
                dirty = False
            keep = worker.alive and not dirty and not self._closed and worker.calls < self._calls_per_worker
            if keep:
                self._idle.setdefault(key, []).append(worker)
                self._idle[key] = self._idle.pop(key)
        if not keep:
            worker.close()

    def _add_spares(self) -> None:
        with self._lock:
            while not self._closed and len(self._spares) < self._wanted_spares:
                self._spares.append(Worker(self._limits))

    def close(self) -> None:
        """End every worker; calls under way in other threads come back as crashed."""
        with self._lock:
            self._closed = True
            workers = [*self._spares, *(worker for idle in self._idle.values() for worker in idle)]
            self._spares, self._idle = [], {}
            busy = list(self._busy)
        for worker in busy:
            worker.interrupt()
        for worker in workers:
            worker.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
