"""What starting a worker costs: forked by the nursery, over a fresh interpreter, in one run.

    python -m pytest tests/benchmarks/test_worker_start.py -s

prints seconds and CPU seconds from asking for a process to its first answer, and their ratios.
"""

from __future__ import annotations

import statistics
import time

import psutil
import pytest
import torch

from attnproof import nursery
from attnproof.outcomes import CallRequest, Returned
from attnproof.targets import describe
from attnproof.workers import Worker


def once() -> tuple[float, float]:
    """Seconds up to the first answer, and CPU seconds that the worker took until then."""
    begin = time.perf_counter()
    with Worker() as worker:
        outcome = worker.call(CallRequest(describe(lambda x: x * 2), arguments=(torch.ones(3),)))
        assert isinstance(outcome, Returned)
        seconds = time.perf_counter() - begin
        used = psutil.Process(worker.pid).cpu_times()
    return seconds, used.user + used.system


def median(rounds: int) -> tuple[float, float]:
    seconds, used = zip(*(once() for _ in range(rounds)), strict=True)
    return statistics.median(seconds), statistics.median(used)


def test_start_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    once()  # the nursery itself starts as slowly as a worker
    forked, forked_cpu = median(15)
    monkeypatch.setattr(nursery._NURSERIES, "_impossible", True)
    fresh, fresh_cpu = median(3)
    print(
        f"\nfresh {fresh:.2f} s ({fresh_cpu:.2f} s CPU), forked {forked:.3f} s ({forked_cpu:.3f} s CPU): "
        f"{fresh / forked:.0f} times faster, {fresh_cpu / max(forked_cpu, 0.01):.0f} times less CPU"
    )
