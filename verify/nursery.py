"""How a judge gets a worker's process: forked within milliseconds where it can be, else started afresh.

Importing torch takes seconds of CPU. A process that has done so once, :mod:`attnproof.nursery_main`, forks
every further worker of this judge. It is started with the first worker; it ends with the judge; if it dies,
the next worker gets a new one. What libraries read from the environment while they are loaded must be the
same as in a fresh process, so a nursery is replaced, too, when the judge's environment has changed: workers
see every change. What nurseries have imported stays as it was found on the ``sys.path`` of their start.

Where no nursery comes up (no fork, no pidfd, a second thread after the imports) and wherever one fails
before it has forked, the worker is a fresh ``python -m attnproof.worker_main``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from attnproof.nursery_main import LIMITS, NUMBER, VACANT, is_readable
from attnproof.worker_main import TOKEN

__all__ = ["UNKNOWN_STATUS", "StartedWorker"]

UNKNOWN_STATUS: Final = 1 << 16
"""In place of an exit status: the nursery was killed, and after it the worker ended."""

_ANSWER_S: Final = 60.0
"""A nursery that has not forked by then, imports included, is killed, and the worker started afresh."""

_REAPED_S: Final = 1.0
"""For reaping an ended worker a nursery needs no milliseconds, unless somebody has stopped it."""

_READ_AFTER_THE_FORK: Final = ("ATTNPROOF_", "TRITON_", "PYTHONPATH", "PYTEST_", "PWD", "OLDPWD")
"""Beginnings of variables that nothing reads while a nursery's modules are loaded."""


class _Nursery:
    """One nursery as its judge sees it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._read = _read_at_load(environment)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.setblocking(False)
        self.has_forked = False
        arguments = (str(theirs.fileno()), str(os.getpid()))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "attnproof.nursery_main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**environment, TOKEN: VACANT},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether it lives, and was loaded with what these variables say."""
        return self.process.poll() is None and self._read == _read_at_load(environment)

    def ask(self, descriptors: list[int]) -> bool:
        """Send a request; one message, so that threads need no lock for it."""
        try:
            socket.send_fds(self._requests, [b"w"], descriptors)
        except OSError:
            return False
        return True

    def retire(self) -> None:
        """Let it end as soon as the last of its workers has."""
        with contextlib.suppress(OSError):  # it has ended by itself
            self._requests.shutdown(socket.SHUT_RDWR)
        self._requests.close()

    def kill(self) -> None:
        """End it; its workers live on."""
        self.process.kill()
        self.process.wait()

    def disown(self) -> None:
        """Forget it in a fork of the judge, whose child it is not."""
        self._requests.close()
        self.process.returncode = 0


class _Nurseries:
    """The nursery of this process, and those it had before that still have workers."""

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._disown)
        atexit.register(self._end)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._current: _Nursery | None = None
        self._retired: list[_Nursery] = []
        self._impossible = not (hasattr(os, "pidfd_open") and hasattr(os, "fork"))
        self._owner = os.getpid()

    def _disown(self) -> None:
        for nursery in self._all():
            nursery.disown()
        self._forget()

    def _all(self) -> list[_Nursery]:
        return [*self._retired, *([self._current] if self._current is not None else [])]

    def ask(self, descriptors: list[int], environment: Mapping[str, str]) -> _Nursery | None:
        """The nursery that has been asked to fork, or None where there can be none."""
        if os.getpid() != self._owner:  # forked without Python's knowledge
            self._disown()
        with self._lock:
            self._retired = [nursery for nursery in self._retired if nursery.process.poll() is None]
            if self._impossible:
                return None
            if self._current is None or not self._current.suits(environment):
                self._retire()
                self._current = _Nursery(environment)
            if self._current.ask(descriptors):
                return self._current
            self._retire()  # it is just ending; the next worker gets a new one
            return None

    def _retire(self) -> None:
        if self._current is not None:
            self._current.retire()
            self._retired.append(self._current)
            self._current = None

    def failed(self, nursery: _Nursery) -> None:
        """Ask no more if one failed that had never forked, so that not every start waits for another."""
        with self._lock:
            self._impossible = self._impossible or not nursery.has_forked

    def _end(self) -> None:
        with self._lock:
            for nursery in self._all():
                nursery.kill()


_NURSERIES: Final = _Nurseries()


class _Forked:
    """A process that the nursery forked, with the interface of :class:`subprocess.Popen`."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self._channel = channel
        self._pidfd = os.pidfd_open(pid)  # not reaped before the channel is hung up
        self._lock = threading.Lock()
        self._status: int | None = None

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and for the nursery to reap it.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        with self._lock:
            if self._status is None:
                if not is_readable(self._channel, timeout):
                    raise subprocess.TimeoutExpired("worker", timeout or 0.0)
                self._status = self._told_status(timeout)
                self._channel.close()
                os.close(self._pidfd)
            return self._status

    def _told_status(self, timeout: float | None) -> int:
        told = _receive(self._channel)
        if told is not None:
            self._channel.shutdown(socket.SHUT_WR)
            is_readable(self._channel, _REAPED_S)
        elif not is_readable(self._pidfd, timeout):
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return UNKNOWN_STATUS if told is None else told


class StartedWorker:
    """A worker's process from its start to its end.

    Args:
        descriptors: command, reply, lifeline and shared-memory file of the worker; the first three become
            this object's, and are closed here once the worker has them.
        output: where its stdout and stderr go; becomes this object's, too.
        environment: its environment, with its token.

    Nothing here waits for a nursery to come up but what needs the pid.
    """

    def __init__(
        self, descriptors: tuple[int, int, int, int], output: int, environment: Mapping[str, str]
    ) -> None:
        self._descriptors, self._output, self._environment = descriptors, output, environment
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | _Forked | None = None
        self._channel: socket.socket | None = None
        self._nursery = self._ask()
        if self._nursery is None:
            self._process = self._fresh()
            self._let_go()

    def _ask(self) -> _Nursery | None:
        mine, theirs = socket.socketpair()
        folder = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        particulars = os.memfd_create("attnproof-particulars", os.MFD_CLOEXEC)
        try:
            os.write(particulars, json.dumps(_particulars(self._environment)).encode())
            request = [*self._descriptors, self._output, folder, particulars, theirs.fileno()]
            nursery = _NURSERIES.ask(request, self._environment)
        finally:
            os.close(folder)
            os.close(particulars)
            theirs.close()
        if nursery is None:
            mine.close()
        else:
            self._channel = mine
        return nursery

    def _fresh(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "attnproof.worker_main", *map(str, self._descriptors)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            env=self._environment,
            pass_fds=self._descriptors,
            start_new_session=True,
        )

    @staticmethod
    def _forked(nursery: _Nursery, channel: socket.socket) -> _Forked | None:
        """The process whose pid came, or None if the nursery hung up instead."""
        pid = _receive(channel)
        if pid is None:
            channel.close()
            return None
        nursery.has_forked = True
        return _Forked(pid, channel)

    def _let_go(self) -> None:
        for descriptor in (*self._descriptors[:3], self._output):
            os.close(descriptor)

    def process(self) -> subprocess.Popen[bytes] | _Forked:
        """The process, as soon as it exists.

        Raises:
            ValueError: it was withdrawn before.
        """
        with self._lock:
            if self._process is None:
                if self._channel is None or self._nursery is None:
                    raise ValueError("this worker was ended before it had begun; start another")
                if not is_readable(self._channel, _ANSWER_S):
                    self._nursery.kill()
                self._process = self._forked(self._nursery, self._channel)
                if self._process is None:
                    _NURSERIES.failed(self._nursery)
                    self._process = self._fresh()
                self._let_go()
            return self._process

    def withdraw(self) -> bool:
        """Whether there is no process yet; then none will come, or it finds its pipes closed and ends."""
        with self._lock:
            if self._process is not None:
                return False
            if self._channel is not None and self._nursery is not None:
                if is_readable(self._channel, 0.0):
                    self._process = self._forked(self._nursery, self._channel)
                else:
                    self._channel.close()
                self._channel = None
                self._let_go()
            return self._process is None


def _receive(channel: socket.socket) -> int | None:
    """The next number, or None at the end of the channel."""
    try:
        content = channel.recv(NUMBER.size, socket.MSG_WAITALL)
    except ConnectionResetError:
        return None
    return NUMBER.unpack(content)[0] if len(content) == NUMBER.size else None


def _read_at_load(environment: Mapping[str, str]) -> dict[str, str]:
    return {n: value for n, value in environment.items() if not n.startswith(_READ_AFTER_THE_FORK)}


def _particulars(environment: Mapping[str, str]) -> dict[str, object]:
    """What a process started now inherits from this thread, and a fork of the nursery would not."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return {
        "environment": dict(environment),
        "umask": int(status.partition("Umask:")[2].split()[0], 8),
        "limits": [resource.getrlimit(limit) for limit in LIMITS],
        "processors": sorted(os.sched_getaffinity(0)),
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
    }
