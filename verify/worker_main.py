"""The process that runs one kernel: ``python -m attnproof.worker_main``, or a fork of
:mod:`attnproof.nursery_main` that has become the same; started by :mod:`attnproof.nursery` alone.

It talks over pipes of its own, moved to high descriptors and closed on exec; its stdin is empty, its stdout
and stderr belong to the kernel and are read by the judge. It ends when its command pipe closes, and the
kernel (of the operating system) kills its process group when the judge's end of the lifeline goes away,
whatever the worker is doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import cloudpickle  # type: ignore[import-untyped]
import torch

from attnproof.process_state import ProcessState
from attnproof.protocol import (
    Bind,
    Bound,
    Call,
    FrameReader,
    FromWorker,
    PeerClosed,
    Reply,
    ToWorker,
    Warm,
    encode_frame,
    read_frame,
    write_all,
)
from attnproof.targets import resolve
from attnproof.worker_call import device_context, perform, trouble_of

__all__ = ["STACK_SIGNAL", "TOKEN", "main"]

STACK_SIGNAL: Final = signal.SIGUSR2
"""The judge sends this before it kills a worker that hangs: the Python stacks then appear on its stderr."""

TOKEN: Final = "ATTNPROOF_WORKER_TOKEN"
"""The variable by which processes that a worker left behind are found."""

_FIRST_DESCRIPTOR: Final = 700
"""Own descriptors start here if the limit on open files allows it, away from the numbers that loops close."""

_F_SETSIG: Final = 10
_PR_SET_CHILD_SUBREAPER: Final = 36
_LOST_CONTACT: Final = 70
_PAYLOAD_LIMIT: Final = 1 << 30

# Taken before any kernel is imported, so that a patched os module does not take the worker's voice.
_exit, _getpid, _flush_c = os._exit, os.getpid, ctypes.CDLL(None).fflush
_setrlimit, _AS = resource.setrlimit, resource.RLIMIT_AS


class _Server:
    """Holds the pipes, the shared buffer and the bound kernel."""

    def __init__(self, commands: int, replies: int, shared: int, stack: int) -> None:
        self._commands, self._replies, self._shared, self._stack = commands, replies, shared, stack
        self._reader = FrameReader[ToWorker](ToWorker, _PAYLOAD_LIMIT)  # type: ignore[arg-type]
        self._pid = _getpid()
        self._state = ProcessState()
        self._buffer: mmap.mmap | None = None
        self._function: Callable[..., Any] | None = None
        self._bind: Bind | None = None
        self._baseline = 0

    def serve(self) -> None:
        """Answer until the judge closes the pipe."""
        self._send(Warm(self._pid), [])
        while True:
            try:
                message, body = read_frame(self._commands, self._reader)
            except PeerClosed:
                _exit(0)
            if isinstance(message, Bind):
                self._send(self._bound(message, body), [])
            else:
                self._send(*self._called(message))

    def _send(self, message: FromWorker, chunks: list[bytes]) -> None:
        if _getpid() != self._pid:
            _exit(0)  # a child that the kernel forked and let return must not speak for the worker
        _flush_c(None)
        try:
            write_all(self._replies, [encode_frame(message, sum(map(len, chunks))), *chunks])
        except OSError:
            _exit(_LOST_CONTACT)

    def _bound(self, bind: Bind, payload: bytearray) -> Bound:
        begin = time.perf_counter()
        self._bind = bind
        trouble = None
        try:
            sys.path[:] = bind.path
            os.chdir(bind.directory)
            self._state.accept()
            with device_context(bind.device):
                self._function = resolve(bind.target) if bind.target else cloudpickle.loads(bytes(payload))
            if bind.device.startswith("cuda"):
                torch.zeros(1, device=bind.device)
        except BaseException as error:
            trouble = trouble_of(error, "import")
        effects = self._state.accept()
        self._baseline = _address_space()
        return Bound(time.perf_counter() - begin, effects, trouble)

    def _called(self, call: Call) -> tuple[Reply, list[bytes]]:
        if self._function is None or self._bind is None:
            _exit(_LOST_CONTACT)
        if self._buffer is None or len(self._buffer) != call.shared_bytes:
            self._buffer = mmap.mmap(self._shared, call.shared_bytes)
        faulthandler.enable(self._stack)
        faulthandler.register(STACK_SIGNAL, self._stack)
        bind = self._bind
        return perform(
            self._function,
            call,
            self._buffer,
            bind.device,
            bind.result_limit,
            self._state,
            self._memory_limit,
        )

    @contextlib.contextmanager
    def _memory_limit(self) -> Iterator[None]:
        """Let the address space grow by the headroom over what imports and the shared buffer take."""
        headroom = self._bind.headroom if self._bind is not None else None
        if headroom is None:
            yield
            return
        hard = resource.getrlimit(_AS)[1]
        limit = self._baseline + headroom + (len(self._buffer) if self._buffer is not None else 0)
        _setrlimit(_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        try:
            yield
        finally:
            _setrlimit(_AS, (hard, hard))


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * mmap.PAGESIZE


def _hide(descriptor: int) -> int:
    """Move a descriptor out of the way, closed on exec, so that children do not keep a pipe open."""
    moved = _duplicate(descriptor)
    os.close(descriptor)
    return moved


def _duplicate(descriptor: int) -> int:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    first = _FIRST_DESCRIPTOR if most == resource.RLIM_INFINITY else min(_FIRST_DESCRIPTOR, most // 2)
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, first)


def _die_with_judge(lifeline: int) -> None:
    """Have the whole group killed when the lifeline's other end closes; no thread of ours needs to run for
    it.

    PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the worker ends.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    try:
        if os.read(lifeline, 1) == b"":
            _exit(0)  # the judge was gone before we listened
    except BlockingIOError:
        return


def main(descriptors: list[str]) -> None:
    """Serve calls; ``descriptors`` are the numbers of the command, reply, lifeline and shared-memory file."""
    commands, replies, lifeline, shared = (_hide(int(number)) for number in descriptors)
    stack = _duplicate(2)
    with contextlib.suppress(
        OSError
    ):  # a system without signal-driven pipes: the command pipe's end still ends us
        _die_with_judge(lifeline)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    faulthandler.enable(stack)
    faulthandler.register(STACK_SIGNAL, stack)
    _Server(commands, replies, shared, stack).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
