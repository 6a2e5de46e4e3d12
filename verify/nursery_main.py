"""The process that forks workers: ``python -m attnproof.nursery_main``, started by :mod:`attnproof.nursery`
alone.

It has imported what every worker imports, and nothing else: no kernel, no Triton; it has one thread and never
touches CUDA. A request is one message with descriptors; the child it forks unwinds to the top of this module
and becomes :func:`attnproof.worker_main.main` with the judge's environment, folder and limits of that moment,
in a session of its own. The parent tells over the request's channel the child's pid, then its exit status; as
an ended child stays unreaped until the judge hangs up, its pid cannot go to another process in the meantime.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from attnproof import worker_main
from attnproof.worker_main import TOKEN

__all__ = ["LIMITS", "NUMBER", "VACANT", "is_readable", "main"]

_REQUEST_DESCRIPTORS: Final = 8
"""Command, reply, lifeline and shared-memory file; then output, folder, particulars, channel."""

NUMBER: Final = struct.Struct("=i")
"""How a pid and an exit status (negative: the signal) are written to a channel."""

VACANT: Final = "0" * 32
"""What holds the place of a worker's token in the nursery's own environment."""

LIMITS: Final = tuple(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
"""Resources whose limits a worker takes over from the judge."""


@dataclass(frozen=True, slots=True)
class _Birth:
    """What a forked child needs to become a worker."""

    descriptors: tuple[int, ...]
    output: int
    folder: int
    particulars: dict[str, Any]


@dataclass(slots=True)
class _Child:
    """A worker as its parent knows it; it is reaped when it has ended and the judge has hung up."""

    pid: int
    pidfd: int
    channel: socket.socket
    ended: bool = False
    released: bool = False

    def tell_end(self) -> None:
        """Send the exit status and leave the child unreaped."""
        self.ended = True
        found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        assert found is not None
        status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        _send(self.channel, status)

    def reap(self) -> None:
        """Give the pid back, then hang up, which tells the judge so."""
        os.waitpid(self.pid, 0)
        self.close()

    def close(self) -> None:
        os.close(self.pidfd)
        self.channel.close()


class _Nursery:
    """Answers requests and reports deaths, until the judge ends or neither wants nor has any worker."""

    def __init__(self, requests: int, judge: int) -> None:
        self._requests = socket.socket(fileno=requests)
        self._judge = os.pidfd_open(judge)
        self._retired = False
        self._children: list[_Child] = []

    def serve(self) -> _Birth:
        """Return in a child that was just forked; the parent never returns."""
        while self._children or not self._retired:
            ready = self._wait()
            if self._judge in ready:
                break
            for child in tuple(self._children):
                child.released |= child.channel.fileno() in ready
                if child.pidfd in ready:
                    child.tell_end()
                if child.ended and child.released:
                    child.reap()
                    self._children.remove(child)
            if self._requests.fileno() in ready:
                birth = self._receive()
                if birth is not None:
                    return birth
        os._exit(0)

    def _wait(self) -> set[int]:
        """Descriptors on which something happened; a channel becomes readable when the judge hangs up."""
        poller = select.poll()
        poller.register(self._judge, select.POLLIN)
        if not self._retired:
            poller.register(self._requests, select.POLLIN)
        for child in self._children:
            if not child.released:
                poller.register(child.channel, select.POLLIN)
            if not child.ended:
                poller.register(child.pidfd, select.POLLIN)
        return {descriptor for descriptor, _ in poller.poll()}

    def _receive(self) -> _Birth | None:
        """Fork for the next request; None in the parent."""
        message, received, _, _ = socket.recv_fds(
            self._requests, 1, _REQUEST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        self._retired = not message
        if len(received) < _REQUEST_DESCRIPTORS:  # nothing more, or more open files than are allowed
            for descriptor in received:
                os.close(descriptor)
            return None
        *given, output, folder, particulars, number = received
        channel = socket.socket(fileno=number)
        pid = -1 if is_readable(channel, 0.0) else self._fork()  # readable: the judge has withdrawn it
        if pid == 0:
            content = os.pread(particulars, os.fstat(particulars).st_size, 0)
            os.close(particulars)
            self._let_go(channel)
            return _Birth(tuple(given), output, folder, json.loads(content))
        for descriptor in received[:-1]:
            os.close(descriptor)
        if pid < 0:
            channel.close()
        else:
            self._children.append(_Child(pid, os.pidfd_open(pid), channel))
            _send(channel, pid)
        return None

    def _fork(self) -> int:
        """Return when the child leads its session, so that its group can be killed; -1: no fork."""
        leads, tells = os.pipe()
        try:
            pid = os.fork()
        except OSError:  # no memory or no process is left
            pid = -1
        if pid == 0:
            os.setsid()
        os.close(tells)
        if pid > 0:
            os.read(leads, 1)
        os.close(leads)
        return pid

    def _let_go(self, channel: socket.socket) -> None:
        """Close in a child what belongs to its parent, whose end must be seen when it comes."""
        os.close(self._judge)
        self._requests.close()
        channel.close()
        for sibling in self._children:
            sibling.close()


def is_readable(channel: socket.socket | int, timeout: float | None) -> bool:
    """Wait up to ``timeout`` seconds (None: for ever) for content or the end of a channel."""
    poller = select.poll()  # select() would refuse descriptors beyond 1023
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(None if timeout is None else max(0.0, timeout) * 1000))


def _send(channel: socket.socket, number: int) -> None:
    try:
        channel.sendall(NUMBER.pack(number))
    except OSError:
        return  # the judge has hung up, which the next round sees


def _token_writer() -> Callable[[str], object]:
    """A function that puts a token into ``/proc/self/environ``, which a fork without exec does not change.

    Raises:
        RuntimeError: the place cannot be found; daemons that a kernel leaves behind would not be found.
    """
    library = ctypes.CDLL(None)
    library.getenv.restype = ctypes.c_void_p
    address = library.getenv(TOKEN.encode())

    def write(token: str) -> None:
        ctypes.memmove(address, token.encode(), len(VACANT))
        if f"{TOKEN}={token}".encode() not in Path("/proc/self/environ").read_bytes().split(b"\0"):
            raise RuntimeError(f"{TOKEN} is not where the kernel of the operating system reads it")

    if not address or ctypes.string_at(address) != VACANT.encode():
        raise RuntimeError(f"{TOKEN} must be {VACANT}")
    write(VACANT)
    return write


def _become(birth: _Birth, write_token: Callable[[str], object]) -> None:
    """Go on as the worker, as one that was started afresh by the judge at this moment."""
    for stream in (1, 2):
        os.dup2(birth.output, stream)
    os.close(birth.output)
    os.fchdir(birth.folder)
    os.close(birth.folder)
    given = birth.particulars
    os.umask(given["umask"])
    for limit, pair in zip(LIMITS, given["limits"], strict=True):
        if resource.getrlimit(limit) != tuple(pair):
            resource.setrlimit(limit, tuple(pair))
    if os.sched_getaffinity(0) != set(given["processors"]):
        os.sched_setaffinity(0, given["processors"])
    signal.pthread_sigmask(signal.SIG_SETMASK, given["blocked"])
    os.environ.clear()
    os.environ.update(given["environment"])
    write_token(given["environment"][TOKEN])
    sys.path_importer_cache.clear()  # folders may have changed within one tick of their time stamps
    importlib.invalidate_caches()
    numbers = [str(descriptor) for descriptor in birth.descriptors]
    sys.modules["__main__"] = worker_main
    sys.argv = [worker_main.__file__, *numbers]
    worker_main.main(numbers)


def main(requests: int, judge: int) -> None:
    """Fork workers for the process ``judge``, which asks for them over the socket ``requests``.

    Raises:
        RuntimeError: workers forked here would differ from fresh ones; the judge then starts them afresh.
    """
    write_token = _token_writer()
    threads = sum(1 for _ in Path("/proc/self/task").iterdir())
    if threads != 1 or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError(f"{threads} threads after the imports: what one of them holds, no child has")
    gc.collect()
    gc.freeze()  # the collector of a child would otherwise write to, and so copy, every page of the imports
    birth = _Nursery(requests, judge).serve()
    try:
        _become(birth, write_token)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
