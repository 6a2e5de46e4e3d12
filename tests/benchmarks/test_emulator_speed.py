"""The emulator against Triton's own interpreter on the same flash-attention forward.

Run `pytest tests/benchmarks/test_emulator_speed.py -s` for the table of ratios and their geometric mean.
Nothing timed is asserted. The interpreter cannot share a process with the compiler: it runs in a subprocess
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

# The kernel lives in the emulator's tests, beside those that check its values.
_FLASH = Path(__file__).parents[1] / "emulator" / "flash.py"
# (rows, columns, tile); float16, one head, no mask.
SIZES = [(128, 64, 64), (512, 64, 64), (1024, 64, 128), (128, 64, 16), (2048, 16, 16)]
# A size that takes the interpreter longer than this is timed once instead of three times.
_PATIENCE_SECONDS = 2.0


def _flash() -> Any:
    spec = importlib.util.spec_from_file_location("emulator_flash", _FLASH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _inputs(length: int, dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length * dim)
    return [torch.randn(1, length, dim, generator=generator).half() for _ in range(3)]


def best_of(call: Any, repeats: int, patience: float = math.inf) -> float:
    """Seconds of the fastest call, after one that is not counted unless it takes longer than ``patience``."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first > patience:
        return first
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def time_interpreter() -> None:
    """Time every size in a process where TRITON_INTERPRET=1; one JSON line each."""
    module = _flash()
    for length, dim, tile in SIZES:
        q, k, v = _inputs(length, dim)
        seconds = best_of(lambda: module.flash(q, k, v, tile=tile), 3, _PATIENCE_SECONDS)
        print(json.dumps(seconds), flush=True)


def _interpreter_seconds() -> list[float]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True, timeout=900
    )
    return [float(line) for line in result.stdout.splitlines()]


def test_speed_against_tritons_interpreter(benchmark: Any, capsys: Any) -> None:
    from attnproof.emulator import emulate

    module = _flash()
    emulated = []
    with emulate("sm_90"):
        for length, dim, tile in SIZES:
            q, k, v = _inputs(length, dim)
            emulated.append(best_of(lambda: module.flash(q, k, v, tile=tile), 7))
        q, k, v = _inputs(512, 64)
        benchmark.pedantic(lambda: module.flash(q, k, v, tile=64), rounds=5, warmup_rounds=1)
    interpreted = _interpreter_seconds()
    ratios = [slow / fast for slow, fast in zip(interpreted, emulated, strict=True)]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    with capsys.disabled():
        print("\nflash forward, float16, one head: milliseconds")
        print(f"{'N, D, tile':>16} {'interpreter':>12} {'emulator':>10} {'ratio':>8}")
        for size, slow, fast, ratio in zip(SIZES, interpreted, emulated, ratios, strict=True):
            print(f"{', '.join(map(str, size)):>16} {slow * 1e3:>12.1f} {fast * 1e3:>10.2f} {ratio:>8.1f}")
        print(f"{'geometric mean':>40} {mean:>8.1f}")
    benchmark.extra_info["ratios"] = dict(zip(map(str, SIZES), ratios, strict=True))
    benchmark.extra_info["geometric_mean"] = mean


def test_overhead_of_a_launch(benchmark: Any, capsys: Any) -> None:
    """A tiny repeated launch: what the driver, the front end's cache and the binding of arguments cost."""
    from attnproof.emulator import emulate

    module = _flash()
    q, k, v = _inputs(16, 16)
    with emulate("sm_90"):
        module.flash(q, k, v, tile=16)
        benchmark(lambda: module.flash(q, k, v, tile=16))
    with capsys.disabled():
        print(f"\nlaunch of one 16x16 program: {benchmark.stats.stats.min * 1e3:.2f} ms")


if __name__ == "__main__":
    time_interpreter()
