"""How much faster the proved arithmetics are than mpmath, and what a proof costs over plain float64.

    python -m pytest tests/benchmarks/test_arithmetic_speed.py -s --benchmark-columns=min

prints each ratio. Design targets, one head 128×128×64: the float64 enclosure ≥ 300 times and Arb ≥ 20 times
faster than mpmath; one head 512×512×64: the enclosure at most 6 times slower than torch's own float64
attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, Arithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.families.softmax import SOFTMAX

SECONDS: dict[str, float] = {}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def head(length: int, width: int = 64) -> list[torch.Tensor]:
    """q, k, v of one head, (1, 1, length, width), normal float64."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, length, width, generator=random, dtype=torch.float64) for _ in range(3)]


def attention_in(arithmetic: Arithmetic[Any], length: int) -> Callable[[], Any]:
    """Evaluates the softmax family's definition and states the output's enclosure."""
    problem = SOFTMAX.problem(*head(length), scale=0.125)
    return lambda: arithmetic.enclosure(problem.evaluate(arithmetic)["o"])


def best(function: Callable[[], Any], rounds: int) -> float:
    """The least of the wall-clock seconds of a call: other processes only add to it."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@pytest.mark.parametrize(
    ("arithmetic", "rounds"),
    [
        pytest.param(MpmathArithmetic(), 1, id="mpmath"),
        pytest.param(ArbArithmetic(), 5, id="arb"),
        pytest.param(EnclosureArithmetic(), 50, id="float64"),
    ],
)
def test_one_head_of_128(benchmark: Any, arithmetic: Arithmetic[Any], rounds: int) -> None:
    evaluate = attention_in(arithmetic, 128)
    result = benchmark.pedantic(evaluate, rounds=rounds, iterations=1, warmup_rounds=int(rounds > 1))
    assert bool(result.radius.isfinite().all())
    SECONDS[arithmetic.name] = best(evaluate, rounds)
    if arithmetic.name != "mpmath" and "mpmath" in SECONDS:
        times = SECONDS["mpmath"] / SECONDS[arithmetic.name]
        print(f"\n128×128×64: {arithmetic.name} is {times:.0f} times as fast as mpmath")


def test_the_proof_of_one_head_of_512_against_plain_float64(benchmark: Any) -> None:
    q, k, v = head(512)
    evaluate = attention_in(EnclosureArithmetic(), 512)
    result = benchmark.pedantic(evaluate, rounds=20, iterations=1, warmup_rounds=2)
    assert float(result.radius.max()) < 1e-11
    plain = best(lambda: torch.softmax(q @ k.mT * 0.125, -1) @ v, 20)
    proved = best(evaluate, 20)
    times = f"{proved * 1e3:.1f} ms against {plain * 1e3:.1f} ms of torch's float64 attention"
    print(f"\n512×512×64: enclosure {times}: {proved / plain:.1f} times slower")
