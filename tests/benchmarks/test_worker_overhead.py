"""What a call in a worker costs over the same call in this process; target: below 2 ms for small tensors.

    python -m pytest tests/benchmarks/test_worker_overhead.py -s

prints the overhead of a call for growing inputs, and the seconds of starting a process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from attnproof.outcomes import CallRequest, Returned
from attnproof.targets import describe
from attnproof.workers import WorkerPool


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    return torch.softmax(q @ k.mT * scale, -1) @ v


def median(call: Callable[[], Any], rounds: int = 50) -> float:
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(spares=0) as workers:
        yield workers


@pytest.mark.parametrize("length", [16, 256, 2048])
@pytest.mark.parametrize("repeats", [1, 2])
def test_overhead_of_a_call(pool: WorkerPool, length: int, repeats: int, benchmark: Any) -> None:
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 2, length, 64) for _ in range(3))
    call = CallRequest(
        describe(attention),
        arguments=(q, k, v),
        names=("q", "k", "v"),
        keywords={"scale": 0.125},
        repeats=repeats,
    )
    begin = time.perf_counter()
    assert isinstance(pool.call(call), Returned)
    first = time.perf_counter() - begin
    outside = median(lambda: pool.call(call))
    inside = repeats * median(lambda: attention(q, k, v, scale=0.125))
    megabytes = 4 * q.numel() * 4 / 1e6
    print(
        f"\n{length} positions, {repeats} runs, {megabytes:.2f} MB: {outside * 1e3:.2f} ms in a worker, "
        f"{inside * 1e3:.2f} ms here, overhead {(outside - inside) * 1e3:.2f} ms; first call {first:.2f} s"
    )
    benchmark(pool.call, call)
