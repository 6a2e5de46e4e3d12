"""A forked worker is what a fresh one would be, and nothing that befalls a nursery reaches a verdict."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from attnproof import nursery
from attnproof.nursery_main import is_readable
from attnproof.outcomes import CallRequest, Crashed, Outcome, Returned
from attnproof.targets import Importable, describe
from attnproof.workers import Worker

X = torch.ones(2)


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch) -> Iterator[nursery._Nurseries]:
    """No nursery so far; what one test does to its nursery stays its own."""
    made = nursery._Nurseries()
    monkeypatch.setattr(nursery, "_NURSERIES", made)
    yield made
    made._end()


def call(worker: Worker, function: Any) -> Outcome:
    return worker.call(CallRequest(describe(function), arguments=(X,)))


def told(worker: Worker, function: Any) -> Any:
    """What a kernel printed as JSON."""
    outcome = call(worker, function)
    assert isinstance(outcome, Returned), outcome
    return json.loads(outcome.output.tail)


def parent_of(x: torch.Tensor) -> torch.Tensor:
    print(json.dumps(os.getppid()))
    return x


def reporter() -> Callable[[torch.Tensor], torch.Tensor]:
    """A kernel that tells what it can find out about its process without looking at its parent.

    Not importable, so that it travels by value and the worker does not import this module.
    """

    def report(x: torch.Tensor) -> torch.Tensor:
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        masks = ("SigBlk", "SigIgn", "SigCgt", "SigPnd", "Umask", "Threads", "Cpus_allowed")
        files = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                files.append(os.readlink(f"/proc/self/fd/{number}"))
        names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
        limits = {name: resource.getrlimit(getattr(resource, name)) for name in names}
        native = ctypes.CDLL(None)
        native.getenv.restype = ctypes.c_char_p
        environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name}
        print(
            json.dumps(
                {
                    **{name: status[name] for name in masks},
                    "leads": (os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()),
                    "stdin": sys.stdin.read(),
                    "streams": [
                        (stream.encoding, stream.errors, stream.line_buffering, stream.write_through)
                        for stream in (sys.stdout, sys.stderr)
                    ],
                    "files": sorted(name.partition(":")[0] for name in files),
                    "limits": limits,
                    "environment": environment,
                    "native environment": [
                        name
                        for name, value in environment.items()
                        if native.getenv(name.encode()) != os.fsencode(value)
                    ],
                    "folder": os.getcwd(),
                    "path": sys.path,
                    "arguments": (len(sys.argv), sys.argv[0]),
                    "flags": repr(sys.flags),
                    "main": sys.modules["__main__"].__file__,
                    "threads": [thread.name for thread in threading.enumerate()],
                    "seed": torch.initial_seed(),
                    "hash": hash("a string"),
                    "modules": sorted(sys.modules),
                }
            )
        )
        return x

    return report


def test_a_forked_worker_is_like_a_fresh_one(
    new: nursery._Nurseries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in what the judge changed after the nursery had been started."""
    with Worker() as first:
        assert told(first, parent_of) != os.getpid()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNPROOF_TEST", "naïve \udcff")
    monkeypatch.syspath_prepend(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    processors, mask = os.sched_getaffinity(0), os.umask(0o027)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft // 2, hard))
    os.sched_setaffinity(0, {min(processors)})
    try:
        with Worker() as forked:
            found = told(forked, reporter())
            assert isinstance(forked._process._started.process(), nursery._Forked)
        monkeypatch.setattr(nursery._NURSERIES, "_impossible", True)
        with Worker() as fresh:
            expected = told(fresh, reporter())
            assert isinstance(fresh._process._started.process(), subprocess.Popen)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.sched_setaffinity(0, processors)
        os.umask(mask)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert set(found["modules"]) - set(expected["modules"]) == {"attnproof.worker_main"}  # there: __main__
    assert set(found.pop("modules")) >= set(expected.pop("modules"))
    # Counted from the address space in use, which differs by a few pages.
    spaces = [told["limits"].pop("RLIMIT_AS") for told in (found, expected)]
    assert abs(spaces[0][0] - spaces[1][0]) < 64 << 20
    assert found == expected
    assert (found["Umask"], found["native environment"], found["stdin"]) == ("0027", [], "")
    assert found["environment"]["ATTNPROOF_TEST"] == "naïve \udcff"


def test_what_one_worker_did_is_not_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left_behind.py").write_text(
        "import json, os, sys, torch\n"
        "names = [n for n in ('left_behind_too', 'triton') if n in sys.modules]\n"
        "import left_behind_too, triton\n"
        "def kernel(x):\n"
        "    print(json.dumps([names, getattr(torch, 'mark', 0), os.environ.get('MARK')]))\n"
        "    torch.mark, os.environ['MARK'] = 1, '1'\n"
        "    return x\n"
    )
    (tmp_path / "left_behind_too.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):
        with Worker() as worker:
            outcome = worker.call(CallRequest(Importable("left_behind:kernel"), arguments=(X,)))
            assert isinstance(outcome, Returned)
            assert json.loads(outcome.output.tail) == [[], 0, None]


def test_random_numbers_of_an_import_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process seeds Python's and NumPy's generators from the system; so must a fork."""
    (tmp_path / "drawing.py").write_text(
        "import random, numpy\n"
        "drawn = random.random(), float(numpy.random.rand())\n"
        "def kernel(x):\n"
        "    print(list(drawn))\n"
        "    return x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    drawn = []
    for _ in range(2):
        with Worker() as worker:
            outcome = worker.call(CallRequest(Importable("drawing:kernel"), arguments=(X,)))
            drawn += json.loads(outcome.output.tail)
    assert len(set(drawn)) == 4


def test_the_environment_of_the_moment_is_seen(
    new: nursery._Nurseries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that a library might read while it is loaded costs a new nursery; others do not."""

    def look(x: torch.Tensor) -> torch.Tensor:
        native = ctypes.CDLL(None)
        native.getenv.restype = ctypes.c_char_p
        values = [os.environ.get(name) for name in ("TRITON_OF_NOW", "LOCALE_OF_NOW")]
        print(json.dumps([os.getppid(), *values, native.getenv(b"LOCALE_OF_NOW") is None]))
        return x

    seen = []
    for variables in ({}, {"TRITON_OF_NOW": "1"}, {"LOCALE_OF_NOW": "2"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with Worker() as worker:
                seen.append(told(worker, look))
    assert [tuple(entry[1:]) for entry in seen] == [(None, None, True), ("1", None, True), (None, "2", False)]
    parents = [entry[0] for entry in seen]
    assert parents[0] == parents[1] != parents[2]
    assert _end_of(parents[0])


def _end_of(pid: int, seconds: float = 60.0) -> bool:
    """Whether a process has ended, zombies included, or does so soon."""
    deadline = time.monotonic() + seconds
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_a_worker_killed_by_a_signal_tells_it(number: int) -> None:
    with Worker() as worker:
        outcome = call(worker, lambda x: os.kill(os.getpid(), number))
    assert isinstance(outcome, Crashed)
    assert (outcome.signal, outcome.exit_code) == (number, None)
    assert not psutil.pid_exists(outcome.pid)


def test_an_exit_status_is_told() -> None:
    with Worker() as worker:
        outcome = call(worker, lambda x: os._exit(217))
    assert isinstance(outcome, Crashed)
    assert (outcome.signal, outcome.exit_code) == (None, 217)


def test_a_killed_nursery_is_replaced_and_its_workers_live_on(tmp_path: Path) -> None:
    """How one of them then ends, nobody can tell any more; it is not made up."""

    def count(x: torch.Tensor) -> None:
        with (tmp_path / "calls").open("a+") as calls:
            calls.write("x")
            if calls.tell() == 3:
                os._exit(5)
        print(os.getppid())

    with Worker() as worker:
        first = told(worker, count)
        os.kill(first, signal.SIGKILL)
        assert _end_of(first)
        with Worker() as other:
            second = told(other, parent_of)
        assert second not in (first, os.getpid())
        assert psutil.Process(second).ppid() == os.getpid()
        assert told(worker, count) not in (first, second)
        outcome = call(worker, count)
    assert isinstance(outcome, Crashed)
    assert (outcome.signal, outcome.exit_code) == (None, None)
    assert "how is not known" in outcome.reason
    assert not _is_alive(outcome.pid)


@pytest.mark.parametrize("dies", [False, True])
def test_a_daemon_that_was_forked_twice_is_killed(dies: bool, tmp_path: Path) -> None:
    """It never called exec, so that /proc shows the environment that the nursery began with."""
    file = tmp_path / "pid"

    def daemonise(x: torch.Tensor) -> torch.Tensor:
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork() == 0:
                file.write_text(str(os.getpid()))
                time.sleep(600)
            os._exit(0)
        os.waitpid(child, 0)
        while not file.exists() or not file.read_text():
            time.sleep(0.01)
        if dies:
            os._exit(4)
        return x

    with Worker() as worker:
        outcome = call(worker, daemonise)
        assert isinstance(outcome, Crashed if dies else Returned)
    assert _end_of(int(file.read_text()), 1.0)


def test_several_threads_start_workers_at_once(new: nursery._Nurseries) -> None:
    """And one worker is closed before the nursery has so much as imported torch."""
    count = 4
    start = threading.Barrier(count + 1)
    workers: list[tuple[int, int]] = []

    def work() -> None:
        start.wait()
        with Worker() as worker:
            workers.append((told(worker, parent_of), worker.pid))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    unwanted = Worker()
    unwanted.close()
    assert not any(nursery.has_forked for nursery in new._all())
    with pytest.raises(ValueError, match="before it had begun"):
        _ = unwanted.pid
    for thread in threads:
        thread.join()
    (parent,) = {parent for parent, _ in workers}
    assert len({pid for _, pid in workers}) == count
    assert psutil.Process(parent).ppid() == os.getpid()
    assert psutil.Process(parent).children() == []


def test_nothing_is_left_open() -> None:
    def open_files(pid: int) -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    with Worker() as worker:
        nursery_id = told(worker, parent_of)
    mine, its = open_files(os.getpid()), open_files(nursery_id)
    for function in (lambda x: print(1), lambda x: os._exit(1), lambda x: os.kill(os.getpid(), 9)):
        with Worker() as worker:
            call(worker, function)
    assert (open_files(os.getpid()), open_files(nursery_id)) == (mine, its)
    assert psutil.Process(nursery_id).children() == []


def test_a_nursery_that_does_not_come_up_is_done_without(
    new: nursery._Nurseries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "VACANT", "too short")
    with Worker() as worker:
        assert told(worker, parent_of) == os.getpid()
    assert new._impossible
    assert new._current is not None
    assert new._current.process.poll() == 1


def test_a_nursery_that_is_stopped_is_given_up(
    new: nursery._Nurseries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "_ANSWER_S", 0.5)
    with Worker() as worker:
        os.kill(new._current.process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        assert told(worker, parent_of) == os.getpid()


def test_a_fork_of_the_judge_does_not_use_its_nursery() -> None:
    with Worker() as worker:
        assert told(worker, parent_of) == nursery._NURSERIES._current.process.pid  # type: ignore[union-attr]
    held = nursery._NURSERIES._current
    assert held is not None
    child = os.fork()
    if child == 0:
        forgotten = nursery._NURSERIES._current is None and held._requests.fileno() < 0
        os._exit(0 if forgotten else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with Worker() as worker:
        assert told(worker, parent_of) == held.process.pid


def test_a_descriptor_beyond_those_of_select_is_awaited() -> None:
    mine, theirs = socket.socketpair()
    high = fcntl.fcntl(mine, fcntl.F_DUPFD, min(1500, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1))
    with mine, theirs:
        assert not is_readable(high, 0.0)
        theirs.send(b"x")
        assert is_readable(high, None)
    os.close(high)
