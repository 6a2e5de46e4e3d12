"""Kernels by name: from ``package.module:attribute`` to a callable, and from a callable to what a worker
loads.

A target is resolved where the kernel runs, in a worker, never in the judge. :func:`describe` goes the other
way: it turns a callable that a test holds into a target if a fresh interpreter can import it, and into
cloudpickle bytes if not. Those bytes only ever travel *to* a worker; nothing that a worker sends is
unpickled.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.machinery
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

__all__ = ["Importable", "KernelSource", "Pickled", "TargetError", "describe", "resolve"]

_NEAREST_NAMES = 4


class TargetError(ValueError):
    """A target that cannot be resolved; the message says which part of it failed, and why."""


@dataclass(frozen=True, slots=True)
class Importable:
    """A kernel that a fresh interpreter finds by name.

    Attributes:
        target: ``package.module:attribute``, the attribute dotted or not.
    """

    target: str

    @property
    def label(self) -> str:
        """How messages call this kernel."""
        return self.target


@dataclass(frozen=True, slots=True)
class Pickled:
    """A kernel that only exists in this process: a lambda, a closure, a partial, a function of ``__main__``.

    Attributes:
        payload: cloudpickle bytes, loaded in the worker alone.
        label: how messages call this kernel.
    """

    payload: bytes
    label: str


KernelSource = Importable | Pickled


def resolve(target: str) -> Callable[..., Any]:
    """Import the callable that a target names.

    Args:
        target: ``package.module:attribute``; the attribute may be dotted and may come from a module's
            ``__getattr__``.

    Raises:
        TargetError: the text is no target, the module cannot be imported (with the original error and its
            place), the attribute does not exist (with the nearest names), or what it names cannot be called.
    """
    module_name, separator, attribute = target.partition(":")
    if not separator or not module_name or not attribute or not all(attribute.split(".")):
        raise TargetError(
            f"{target!r} is no target: write package.module:attribute, such as mykernels.flash:attention"
        )
    found: Any = _import(module_name, target)
    path = module_name
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise TargetError(_missing_attribute(target, path, found, name, error)) from error
        except Exception as error:
            raise TargetError(
                f"target {target!r}: looking up {name!r} in {path} raised {_place(error)}"
            ) from error
        path = f"{path}.{name}"
    if not callable(found):
        raise TargetError(f"target {target!r} names a {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def describe(function: Callable[..., Any] | str) -> KernelSource:
    """State how a worker gets hold of a callable.

    Importable callables are named: the name must lead back to the same object, and a finder must see the
    module (a test module that pytest loaded in ``importlib`` mode is in ``sys.modules`` alone). All others
    are pickled by value, together with what they use of such an unreachable module.

    Args:
        function: the callable, or a target, which is passed on unread.

    Raises:
        TargetError: neither callable nor text, or a callable that cloudpickle cannot take apart.
    """
    if isinstance(function, str):
        return Importable(function)
    if not callable(function):
        raise TargetError(
            f"a kernel is a callable or a target such as 'package.module:name', got {_kind(function)}"
        )
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str) and _leads_to(module, name, function):
        return Importable(f"{module}:{name}")
    try:
        with _by_value(_unreachable_modules(function)):
            payload = cloudpickle.dumps(function)
    except Exception as error:
        raise TargetError(
            f"{function!r} can be neither imported by name nor pickled ({type(error).__name__}: {error}); "
            "move it to the top level of a module and pass that module's 'package.module:name'"
        ) from error
    return Pickled(payload, f"{module or '?'}:{name or _kind(function)}")


def _import(module_name: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise TargetError(
                f"target {target!r}: there is no module {missing!r}; install it into the environment of "
                f"{sys.executable}, or add its folder to PYTHONPATH (now in {os.getcwd()})"
            ) from error
        raise TargetError(
            f"target {target!r}: importing {module_name} needs {missing!r}: {_place(error)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise TargetError(f"target {target!r}: importing {module_name} raised {_place(error)}") from error


def _place(error: BaseException) -> str:
    """The error, and the last line that is not import machinery."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename
    ]
    outside = [frame for frame in frames if frame.filename != __file__]
    where = f" at {outside[-1].filename}:{outside[-1].lineno}" if outside else ""
    return f"{type(error).__name__}: {error}{where}"


def _missing_attribute(target: str, path: str, owner: Any, name: str, error: AttributeError) -> str:
    nearest = difflib.get_close_matches(
        name, [entry for entry in dir(owner) if entry != name], _NEAREST_NAMES
    )
    hint = f"; nearest names: {', '.join(nearest)}" if nearest else ""
    # An AttributeError that a module's own __getattr__ raised for another reason must not read like a
    # spelling mistake.
    cause = "" if getattr(error, "name", name) in (name, None) else f" ({error})"
    return f"target {target!r}: {path} has no attribute {name!r}{cause}{hint}"


def _leads_to(module_name: str, qualname: str, function: object) -> bool:
    """Whether importing the name, here and in a fresh interpreter, gives this very object."""
    if module_name == "__main__" or "<" in qualname or not _is_reachable(module_name):
        return False
    found: Any = sys.modules.get(module_name)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found is function


def _is_reachable(module_name: str) -> bool:
    """Whether the finders, asked anew, see the module that ``sys.modules`` holds under this name."""
    loaded = sys.modules.get(module_name)
    if loaded is None:
        return False
    search: Any = None
    spec: importlib.machinery.ModuleSpec | None = None
    parts = module_name.split(".")
    for depth in range(1, len(parts) + 1):
        spec = _find_spec(".".join(parts[:depth]), search)
        if spec is None:
            return False
        search = spec.submodule_search_locations
    file = getattr(loaded, "__file__", None)
    return file is None or (spec is not None and spec.origin == file)


def _find_spec(name: str, search: Any) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec: importlib.machinery.ModuleSpec | None = find(name, search, None) if find is not None else None
        if spec is not None:
            return spec
    return None


def _unreachable_modules(function: object) -> set[str]:
    """Modules of the callable, of its type and of what a partial wraps that a worker could not import."""
    modules: set[str] = set()
    while function is not None:
        for part in (function, type(function)):
            name = getattr(part, "__module__", None)
            if (
                isinstance(name, str)
                and name != "__main__"
                and name in sys.modules
                and not _is_reachable(name)
            ):
                modules.add(name)
        if isinstance(function, functools.partial):
            function = function.func
        else:
            function = getattr(function, "__wrapped__", None) or getattr(function, "__func__", None)
    return modules


@contextlib.contextmanager
def _by_value(modules: set[str]) -> Iterator[None]:
    added = [sys.modules[name] for name in modules if name not in cloudpickle.list_registry_pickle_by_value()]
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


def _kind(value: object) -> str:
    return type(value).__name__
