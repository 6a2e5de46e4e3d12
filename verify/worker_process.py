"""A worker's process as the judge sees it: pipes, shared memory, limits, and the end of it.

:class:`WorkerProcess` moves frames and bytes and watches the clock and the memory; it knows nothing of
kernels. All waiting happens in the calling thread: no thread of the judge's own can be left behind or
blocked by a worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import psutil

from attnproof.arena import POISON
from attnproof.nursery import StartedWorker
from attnproof.outcomes import CapturedOutput
from attnproof.protocol import (
    FrameReader,
    FromWorker,
    PeerClosed,
    ProtocolError,
    ToWorker,
    encode_frame,
)
from attnproof.worker_main import STACK_SIGNAL, TOKEN

__all__ = [
    "ExceededMemoryError",
    "Limits",
    "LostContactError",
    "OutOfTimeError",
    "WorkerProcess",
    "worker_environment",
]

_TICK_S: Final = 0.05
"""Between two looks at a busy worker's memory and pulse; answers wake the judge at once."""

_STACK_GRACE_S: Final = 0.25
_EXIT_GRACE_S: Final = 1.0
_FAMILY_EVERY: Final = 10
_F_ADD_SEALS: Final = 1033
_F_SEAL_SHRINK: Final = 2
_PIPE_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker may use.

    Attributes:
        memory: bytes beyond those of the idle worker, kernel imported: address space from inside, resident
            bytes (children included) from outside.
        timeout: seconds of a call, its repeats and backward passes included.
        start_timeout: seconds for starting a process, and again for importing a kernel.
        output: bytes of stdout and stderr from which a call counts as flooding.
        tail: bytes of it that are kept.
        result: bytes of returned tensors.
    """

    memory: int = 4 << 30
    timeout: float = 60.0
    start_timeout: float = 120.0
    output: int = 16 << 20
    tail: int = 64 << 10
    result: int = 1 << 30


class LostContactError(Exception):
    """The worker died, closed its pipe, or wrote what is no frame."""


class OutOfTimeError(Exception):
    """The deadline passed."""


class ExceededMemoryError(Exception):
    """The worker's resident memory passed the limit."""

    def __init__(self, resident: int) -> None:
        super().__init__(f"{resident} bytes resident")
        self.resident = resident


def worker_environment(token: str) -> dict[str, str]:
    """The judge's environment and import path, one thread a library, a Triton cache of the user's own."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        environment[name] = "1"
    cache = Path(tempfile.gettempdir()) / f"attnproof-triton-{os.getuid()}"
    if "TRITON_CACHE_DIR" not in environment:
        cache.mkdir(mode=0o700, exist_ok=True)
        environment["TRITON_CACHE_DIR"] = str(cache)
    # torch.compile's pool of compile processes would count as children left behind.
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment["PYTHONHASHSEED"] = "0"
    environment[TOKEN] = token
    return environment


class WorkerProcess:
    """A process that has just begun :func:`attnproof.worker_main.main`; used by one thread at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._token = uuid.uuid4().hex
        command_read, self._commands = os.pipe()
        self._replies, reply_write = os.pipe()
        lifeline_read, self._lifeline = os.pipe()
        self._printed, print_write = os.pipe()
        self._memory = os.memfd_create("attnproof-inputs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # A kernel that finds the file and cuts it short would otherwise kill the judge with SIGBUS.
        fcntl.fcntl(self._memory, _F_ADD_SEALS, _F_SEAL_SHRINK)
        self._map: mmap.mmap | None = None
        self._written = 0
        for descriptor in (self._replies, self._printed):
            with contextlib.suppress(
                OSError
            ):  # only a speed-up, refused where the user's pipe quota is used up
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        given = (command_read, reply_write, lifeline_read, self._memory)
        self._started = StartedWorker(given, print_write, worker_environment(self._token))
        for descriptor in (self._commands, self._replies, self._printed):
            os.set_blocking(descriptor, False)
        self._reader = FrameReader[FromWorker](FromWorker, limits.result + _CHUNK)  # type: ignore[arg-type]
        self._watched: psutil.Process | None = None
        self._baseline = 0
        self._tail = bytearray()
        self._size = 0
        self._closed = False

    @property
    def pid(self) -> int:
        """The process id, also after its end; waits until the process exists."""
        return self._started.process().pid

    def _monitor(self) -> psutil.Process:
        """The process, as psutil sees it; first asked for while the pid cannot be another process's."""
        if self._watched is None:
            self._watched = psutil.Process(self.pid)
        return self._watched

    @property
    def printed(self) -> int:
        """Bytes written to stdout and stderr since :meth:`take_output`."""
        return self._size

    def write_shared(self, image: npt.NDArray[np.uint8]) -> int:
        """Write an image to the shared file, and poison after it; return the file's size."""
        if self._map is None or len(self._map) < image.size:
            size = max(1 << 20, 1 << (image.size - 1).bit_length())
            os.ftruncate(self._memory, size)
            self._map = mmap.mmap(self._memory, size)
            self._written = size
        shared = self.shared()
        shared[: image.size] = image
        if self._written > image.size:
            shared[image.size : self._written] = POISON
        self._written = image.size
        return len(self._map)

    def shared(self) -> npt.NDArray[np.uint8]:
        """The shared file, as the worker sees it now."""
        return np.frombuffer(self._map, dtype=np.uint8) if self._map is not None else np.empty(0, np.uint8)

    def mark_baseline(self) -> None:
        """Count memory from what is resident now."""
        with contextlib.suppress(psutil.Error):  # it died in the meantime, which the next exchange finds out
            self._baseline = self._monitor().memory_info().rss

    def exchange(
        self, message: ToWorker | None, body: bytes, timeout: float, *, watch_memory: bool
    ) -> tuple[FromWorker, bytearray]:
        """Send a message, if any, and wait for the next one.

        Raises:
            LostContactError: the worker died, hung up, or broke the protocol.
            OutOfTimeError: no answer within ``timeout`` seconds.
            ExceededMemoryError: it holds more memory than its limit.
        """
        begin = time.monotonic()
        self._monitor()
        deadline, next_look, looks = begin + timeout, begin + _TICK_S, 0
        unsent = memoryview(encode_frame(message, len(body)) + body if message is not None else b"")
        poller = select.poll()
        poller.register(self._replies, select.POLLIN)
        poller.register(self._printed, select.POLLIN)
        if unsent:
            poller.register(self._commands, select.POLLOUT)
        while True:
            wait = min(next_look, deadline) - time.monotonic()
            for descriptor, _ in poller.poll(max(0.0, wait) * 1000):
                if descriptor == self._commands:
                    unsent = self._send_some(unsent)
                    if not unsent:
                        poller.unregister(self._commands)
                elif descriptor == self._printed and not self._drain():
                    poller.unregister(self._printed)
                elif descriptor == self._replies:
                    frame = self._receive()
                    if frame is not None:
                        self._drain()
                        return frame
            now = time.monotonic()
            if now >= deadline:
                raise OutOfTimeError
            if now >= next_look:
                looks, next_look = looks + 1, now + _TICK_S
                self._look(looks, watch_memory)

    def _send_some(self, unsent: memoryview) -> memoryview:
        try:
            return unsent[os.write(self._commands, unsent[:_PIPE_BYTES]) :]
        except BlockingIOError:
            return unsent
        except BrokenPipeError as error:
            raise LostContactError("the worker closed its command pipe") from error

    def _receive(self) -> tuple[FromWorker, bytearray] | None:
        try:
            return self._reader.advance(self._replies)
        except PeerClosed as error:
            raise LostContactError(f"the worker broke off: {error}") from error
        except ProtocolError as error:
            raise LostContactError(f"the worker did not keep to the protocol: {error}") from error

    def _drain(self) -> bool:
        """Take what was printed; False at the end of the pipe."""
        taken = 0
        while taken < 4 * _PIPE_BYTES:
            try:
                piece = os.read(self._printed, _CHUNK)
            except BlockingIOError:
                return True
            if not piece:
                return False
            taken += len(piece)
            self._size += len(piece)
            self._tail += piece
            del self._tail[: -self._limits.tail]
        return True

    def _look(self, looks: int, watch_memory: bool) -> None:
        if self._started.process().poll() is not None and not self._has_reply():
            raise LostContactError("the worker ended")
        if not watch_memory:
            return
        resident = 0
        with contextlib.suppress(psutil.Error):  # it, or a child, just ended
            resident = self._monitor().memory_info().rss
            if looks % _FAMILY_EVERY == 0:
                resident += sum(child.memory_info().rss for child in self._monitor().children(recursive=True))
        if resident > self._baseline + self._limits.memory + self._written:
            raise ExceededMemoryError(resident)

    def _has_reply(self) -> bool:
        return bool(select.select([self._replies], [], [], 0)[0])

    def take_output(self) -> CapturedOutput:
        """What was printed since this was last asked, and forget it."""
        self._drain()
        captured = CapturedOutput(self._tail.decode("utf-8", "backslashreplace"), self._size)
        self._tail, self._size = bytearray(), 0
        return captured

    def ask_for_stack(self) -> None:
        """Have Python print where it is; works while the worker hangs, unless it ignores the signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACK_SIGNAL)
        deadline = time.monotonic() + _STACK_GRACE_S
        before = self._size
        while time.monotonic() < deadline:
            ready = select.select([self._printed], [], [], _TICK_S)[0]
            if ready and not self._drain():
                return
            if not ready and self._size > before:
                return

    def wait_for_end(self) -> int | None:
        """Exit status (negative: the signal) of a process that broke off; None if it still runs.

        :data:`attnproof.nursery.UNKNOWN_STATUS` if the nursery that could tell it was killed.
        """
        try:
            return self._started.process().wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            return None

    def interrupt(self) -> None:
        """Kill the group and nothing else, for use from another thread than the one that waits."""
        with contextlib.suppress(ProcessLookupError, PermissionError, ValueError):  # ended before it began
            os.killpg(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the worker, its group and all its descendants, and keep what it printed last."""
        if self._started.withdraw():
            return
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family = self._monitor().children(recursive=True)
        self.interrupt()
        self._started.process().wait()
        relatives = {*family, *self._orphans()}
        for relative in relatives:
            with contextlib.suppress(psutil.Error):
                relative.kill()
        psutil.wait_procs(relatives, timeout=_EXIT_GRACE_S)
        if not self._closed:
            self._drain()

    def _orphans(self) -> list[psutil.Process]:
        """Daemons that outlived the worker: they inherited its token."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != self.pid and process.environ().get(TOKEN) == self._token:
                    found.append(process)
        return found

    def close(self) -> None:
        """Kill what still runs and give every descriptor back."""
        if self._closed:
            return
        self.kill()
        self._closed = True
        for descriptor in (self._commands, self._replies, self._lifeline, self._printed, self._memory):
            os.close(descriptor)
        self._map = None
