"""What a kernel must not leave behind in its process, watched and put right after every call.

Three kinds of traces. *Settings* (default dtype, grad mode, working directory, environment, rounding mode,
...) and *patched names* of torch, builtins and a few modules are compared with what they were, put back, and
reported as effects. *Residue* (threads, child processes, an inference mode that was entered and never left)
cannot be undone; it is reported, and the judge replaces the worker. Everything here keeps its own references
to what it calls, taken before a kernel is imported, so that a patched name does not blind it.
"""

from __future__ import annotations

import builtins
import ctypes
import gc
import math
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional
from torch.utils import _device as torch_device

__all__ = ["ProcessState"]

_GRACE_S: Final = 0.2
"""A thread or a child that is about to end is given this long before it counts as left behind."""

_TEXT_LIMIT: Final = 120
_libm: Final = ctypes.CDLL(None)
_enumerate_threads, _join, _children_of = threading.enumerate, threading.Thread.join, os.listdir
_clock, _sleep = time.monotonic, time.sleep
_waitid, _PEEK = os.waitid, os.WEXITED | os.WNOHANG | os.WNOWAIT
_set_attribute, _get_attribute, _delete_attribute = setattr, getattr, delattr


@dataclass(frozen=True, slots=True)
class _Setting:
    """A piece of process state that can be read and put back."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _read_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "(deleted)"


def _write_environment(environment: dict[str, str]) -> None:
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _read_denormals() -> bool:
    smallest = sys.float_info.min
    return smallest / 2 == 0.0


def _signal_setting(number: signal.Signals) -> _Setting:
    return _Setting(
        f"handler of {number.name}", lambda: signal.getsignal(number), lambda h: signal.signal(number, h)
    )


def _stream_setting(name: str) -> _Setting:
    return _Setting(f"sys.{name}", lambda: getattr(sys, name), lambda stream: setattr(sys, name, stream))


_SETTINGS: Final = (
    _Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("default device", lambda: torch_device.CURRENT_DEVICE, torch.set_default_device),
    _Setting("grad mode", torch.is_grad_enabled, torch._C._set_grad_enabled),
    _Setting(
        "CPU autocast",
        lambda: torch.is_autocast_enabled("cpu"),
        lambda on: torch.set_autocast_enabled("cpu", on),
    ),
    _Setting("torch threads", torch.get_num_threads, torch.set_num_threads),
    _Setting(
        "deterministic algorithms",
        torch.are_deterministic_algorithms_enabled,
        lambda on: torch.use_deterministic_algorithms(
            on, warn_only=torch.is_deterministic_algorithms_warn_only_enabled()
        ),
    ),
    _Setting(
        "float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    _Setting("flush-to-zero", _read_denormals, torch.set_flush_denormal),
    _Setting("rounding mode", _libm.fegetround, _libm.fesetround),
    _Setting("numpy error state", np.geterr, lambda state: np.seterr(**state)),
    _Setting("working directory", _read_directory, os.chdir),
    _Setting("environment", lambda: dict(os.environ), _write_environment),
    _Setting("sys.path", lambda: list(sys.path), lambda path: sys.path.__setitem__(slice(None), path)),
    _Setting("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    _Setting("garbage collection", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    _Setting("trace function", sys.gettrace, sys.settrace),
    _Setting("profile function", sys.getprofile, sys.setprofile),
    _Setting("alarm", lambda: signal.getitimer(signal.ITIMER_REAL) > (0.0, 0.0), lambda _: signal.alarm(0)),
    *(_stream_setting(name) for name in ("stdin", "stdout", "stderr")),
    *(_signal_setting(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD)),
)


class _Names:
    """The callables of some namespaces, as they were; what a class inherits counts as absent from it."""

    def __init__(self) -> None:
        modules = (torch, functional, torch.linalg, torch.special, torch.autograd, builtins, math, time, os)
        optional = (sys.modules.get(name) for name in ("triton", "triton.language"))
        self._spaces: list[tuple[Any, list[str], list[Any]]] = []
        for space in (*modules, *(module for module in optional if module is not None)):
            names = [name for name, value in vars(space).items() if callable(value)]
            self._add(space, names)
        self._add(torch.Tensor, dir(torch.Tensor))

    def _add(self, space: Any, names: list[str]) -> None:
        self._spaces.append((space, names, list(map(vars(space).get, names))))

    def changed(self) -> list[tuple[Any, str, Any]]:
        """(namespace, name, what it was or None) of each name that now means something else."""
        found: list[tuple[Any, str, Any]] = []
        for space, names, values in self._spaces:
            # All in C while nothing changed: about 3,000 names in 0.1 ms.
            now = list(map(vars(space).get, names))
            if not all(map(operator.is_, now, values)):
                pairs = zip(names, now, values, strict=True)
                found.extend((space, name, was) for name, is_now, was in pairs if is_now is not was)
        return found


class ProcessState:
    """A record of the process, compared after each call.

    Make one before the kernel is imported; call :meth:`accept` after the import, :meth:`unpatch` as soon as
    the kernel returns, before its result is looked at, and :meth:`settle` at the end of each call.
    """

    def __init__(self) -> None:
        self._names = _Names()
        self._record()

    def _record(self) -> None:
        self._settings = [setting.read() for setting in _SETTINGS]
        self._threads = set(_enumerate_threads())
        self._children = set(_living_children())
        self._modes = _modes()

    def accept(self) -> tuple[str, ...]:
        """Take what an import changed as given; return it as text."""
        effects = (*self._changed_settings(restore=False), *self._changed_names(restore=False))
        self._names = _Names()
        self._record()
        return effects

    def unpatch(self) -> list[str]:
        """Put replaced names back; return which, as text."""
        return self._changed_names(restore=True)

    def settle(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Put back what a call changed; return (effects, residue) as text."""
        effects = (*self.unpatch(), *self._changed_settings(restore=True))
        return effects, (*self._left_modes(), *self._left_threads(), *self._left_children())

    def _changed_settings(self, *, restore: bool) -> list[str]:
        effects: list[str] = []
        for setting, was in zip(_SETTINGS, self._settings, strict=True):
            now = setting.read()
            if now is was or now == was:
                continue
            effects.append(f"{setting.name} changed{_change(was, now)}")
            if restore:
                try:
                    setting.write(was)
                except (OSError, ValueError, TypeError, RuntimeError) as error:
                    effects.append(f"{setting.name} could not be put back: {error}")
        return effects

    def _changed_names(self, *, restore: bool) -> list[str]:
        effects: list[str] = []
        for space, name, was in self._names.changed():
            effects.append(f"{_get_attribute(space, '__name__', space)}.{name} was replaced")
            if restore:
                try:
                    if was is None:
                        _delete_attribute(space, name)
                    else:
                        _set_attribute(space, name, was)
                except (AttributeError, TypeError) as error:
                    effects.append(f"{name} could not be put back: {error}")
        return effects

    def _left_modes(self) -> list[str]:
        return [
            f"{name} was entered and not left" for name, now in _modes().items() if now != self._modes[name]
        ]

    def _left_threads(self) -> list[str]:
        left = [thread for thread in _enumerate_threads() if thread not in self._threads]
        for thread in left:
            if not isinstance(
                thread, threading._DummyThread
            ):  # one that native code started cannot be joined
                _join(thread, _GRACE_S / len(left))
        left = [thread for thread in left if thread.is_alive()]
        self._threads.update(left)
        return [f"thread {thread.name!r} is still running" for thread in left]

    def _left_children(self) -> list[str]:
        deadline = _clock() + _GRACE_S
        while (left := set(_living_children()) - self._children) and _clock() < deadline:
            _sleep(_GRACE_S / 10)
        self._children |= left
        return [f"child process {pid} is still running" for pid in sorted(left)]


def _modes() -> dict[str, object]:
    return {
        "inference mode": torch.is_inference_mode_enabled(),
        "a torch function mode": torch._C._len_torch_function_stack(),
        "a torch dispatch mode": torch._C._len_torch_dispatch_stack(),
    }


def _living_children() -> list[int]:
    """Children that still run, daemons included, as the worker is their subreaper; none is reaped."""
    living: list[int] = []
    for thread in _children_of("/proc/self/task"):
        try:
            listed = Path(f"/proc/self/task/{thread}/children").read_text()
        except OSError:
            continue  # that thread just ended, or the kernel was built without CONFIG_PROC_CHILDREN
        for pid in map(int, listed.split()):
            try:
                ended = _waitid(os.P_PID, pid, _PEEK)
            except ChildProcessError:
                continue  # a thread reaped it in the meantime
            if ended is None:
                living.append(pid)
    return living


def _change(was: object, now: object) -> str:
    """The two values if they are short; an environment or a path names what differs."""
    if isinstance(was, dict) and isinstance(now, dict):
        return (
            ": "
            + ", ".join(sorted(str(k) for k in was.keys() | now.keys() if was.get(k) != now.get(k)))[
                :_TEXT_LIMIT
            ]
        )
    if isinstance(was, (str, int, float, bool, torch.dtype)) or was is None:
        return f" from {str(was)[:_TEXT_LIMIT]} to {str(now)[:_TEXT_LIMIT]}"
    return ""
