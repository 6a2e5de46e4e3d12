"""The driver: contexts, targets, autotuning, and the private interfaces of Triton that it rests on."""

from __future__ import annotations

import threading

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from attnproof.emulator import TARGETS, MemoryFault, emulate

RELEASE = f"triton {triton.__version__} changed an interface that attnproof.emulator.driver uses"


@triton.jit
def double_kernel(p_x, p_o, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p_o + o, 2 * tl.load(p_x + o, mask=o < n), mask=o < n)


@triton.autotune([triton.Config({"B": 16}), triton.Config({"B": 32}, num_warps=8)], key=["n"])
@triton.jit
def tuned_kernel(p_x, p_o, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p_o + o, 2 * tl.load(p_x + o, mask=o < n), mask=o < n)


@triton.heuristics({"EVEN": lambda args: args["n"] % args["B"] == 0})
@triton.jit
def heuristic_kernel(p_x, p_o, n, B: tl.constexpr, EVEN: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    if EVEN:
        tl.store(p_o + o, 2 * tl.load(p_x + o))
    else:
        tl.store(p_o + o, 2 * tl.load(p_x + o, mask=o < n), mask=o < n)


@triton.jit
def tuple_kernel(pointers, sizes, p_o, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_o + o, tl.load(pointers[0] + o) * sizes[0] + tl.load(pointers[1] + o) * sizes[1])


@triton.jit
def optional_kernel(p_x, p_bias, p_o, one, scale, B: tl.constexpr):
    o = tl.arange(0, B)
    b_x = tl.load(p_x + o * one) * scale
    if p_bias is not None:
        b_x += tl.load(p_bias + o)
    tl.store(p_o + o, b_x)


def works() -> bool:
    """One launch in the active driver."""
    x = torch.randn(40)
    out = torch.zeros(40)
    double_kernel[(triton.cdiv(40, 16),)](x, out, 40, 16)
    return torch.equal(out, 2 * x)


def test_previous_driver_comes_back_after_an_exception() -> None:
    before, hook = triton.runtime.driver._active, knobs.runtime.add_stages_inspection_hook
    with pytest.raises(MemoryFault), emulate():
        double_kernel[(3,)](torch.zeros(8), torch.zeros(48), 48, 16)
    with pytest.raises(KeyError), emulate():
        raise KeyError
    assert triton.runtime.driver._active is before
    assert knobs.runtime.add_stages_inspection_hook is hook
    assert torch.cuda.get_device_capability.__module__.startswith("torch")


def test_contexts_nest() -> None:
    with emulate("sm_90") as outer:
        assert works()
        with emulate("gfx942") as inner:
            assert triton.runtime.driver.active is inner
            assert works()
        assert triton.runtime.driver.active is outer
        assert works()


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str) -> None:
    with emulate(target):
        assert works()
        assert torch.cuda.get_device_capability() == TARGETS[target].capability
        with torch.cuda.device(0):
            assert torch.cuda.get_device_properties(0).multi_processor_count > 100


def test_unknown_names_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="unknown target 'sm_75': choose one of sm_80, sm_90, sm_100, gfx942"),
        emulate("sm_75"),
    ):
        pass
    with pytest.raises(ValueError, match="races must be"), emulate(races="maybe"):
        pass
    with pytest.raises(ValueError, match="memory_limit must be at least"), emulate(memory_limit=10):
        pass


def test_threads_wait_for_each_other() -> None:
    results: list[bool] = []

    def run(target: str) -> None:
        with emulate(target):
            results.append(works())

    threads = [threading.Thread(target=run, args=(name,)) for name in TARGETS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_autotuned_kernels() -> None:
    x, out = torch.randn(70), torch.zeros(70)
    with emulate():
        tuned_kernel[lambda meta: (triton.cdiv(70, meta["B"]),)](x, out, 70)
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize("n", [64, 70])
def test_heuristics(n: int) -> None:
    x, out = torch.randn(n), torch.zeros(n)
    with emulate():
        heuristic_kernel[(triton.cdiv(n, 16),)](x, out, n, B=16)
    assert torch.equal(out, 2 * x)


def test_tuples() -> None:
    x, y, out = torch.randn(16), torch.randn(16), torch.empty(16)
    with emulate():
        tuple_kernel[(1,)]((x, y), (2, 1), out, 16)
    assert torch.equal(out, 2 * x + y)


def test_optional_and_specialised_arguments() -> None:
    x, bias, out = torch.randn(16), torch.randn(16), torch.empty(16)
    with emulate():
        optional_kernel[(1,)](x, None, out, 1, 0.5, 16)
        assert torch.equal(out, x * 0.5)
        optional_kernel[(1,)](x, bias, out, 1, 0.5, 16)
        assert torch.equal(out, x * 0.5 + bias)


def test_tensors_elsewhere_are_refused() -> None:
    from attnproof.emulator import EmulationError

    with emulate(), pytest.raises(EmulationError, match="'p_x' of kernel double_kernel is on meta"):
        double_kernel[(1,)](torch.zeros(16, device="meta"), torch.zeros(16), 16, 16)


def test_private_interfaces_are_where_they_were() -> None:
    assert hasattr(triton.runtime.driver, "_active"), RELEASE
    assert hasattr(knobs.runtime, "add_stages_inspection_hook"), RELEASE
    from triton.compiler.compiler import CompiledKernel

    assert hasattr(CompiledKernel, "_init_handles"), RELEASE
    with emulate() as driver:
        out = torch.zeros(16)
        kernel = double_kernel[(1,)](torch.ones(16), out, 16, 16)
        assert set(kernel.asm) >= {"ttir", "cubin"}, RELEASE
        assert kernel.asm["cubin"].decode().lstrip().startswith(("#", "module")), RELEASE
        assert "ptx" not in kernel.asm, f"{RELEASE}: compilation no longer stops after TTIR"
        assert driver.get_current_target().arch == 90
