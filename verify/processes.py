"""Judge processes: children that have imported this package, and nothing of the program that called it."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext
from types import ModuleType

__all__ = ["context", "pool", "without_main"]

_STARTING = threading.Lock()


def context() -> SpawnContext:
    """How judge processes are started: afresh, as they must not share what the caller's threads hold."""
    return multiprocessing.get_context("spawn")


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Children started within do not run the caller's script again.

    multiprocessing has every child import the parent's ``__main__``. A script that calls this package at its
    top level would so call it again in each, without end; and what a judge process needs is never there.
    """
    with _STARTING:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


@contextlib.contextmanager
def pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """``jobs`` judge processes for functions of this package, all started at once."""
    with ProcessPoolExecutor(max_workers=jobs, mp_context=context()) as executor:
        with without_main():
            # Processes are started by the first calls, one each.
            for started in [executor.submit(bool) for _ in range(jobs)]:
                started.cancel()
        yield executor
