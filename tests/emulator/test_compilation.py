"""Kernels compiled to real binaries, without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from attnproof.emulator import EmulationError, compile_launches, emulate


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"emulator_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FLASH = _sibling("flash")


def tensors(dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    """Query, key and value of 2 heads, 128 rows, 64 columns."""
    return [torch.randn(2, 128, 64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("target", "matrix"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "mfma")]
)
def test_a_flash_forward_becomes_a_binary(target: str, matrix: str) -> None:
    (report,) = compile_launches(FLASH.flash, tensors(), targets=[target])
    assert (report.kernel, report.target, report.launches) == ("flash_kernel", target, 1)
    assert 32 < report.registers <= 512
    assert report.spill_bytes == 0
    assert 0 < report.shared_bytes < 232_448
    assert report.instructions[matrix] > 0
    assert report.matrix_instructions == report.instructions[matrix]
    assert report.binary_bytes > 1000


def test_spills_are_seen() -> None:
    def crowded() -> None:
        q, k, v = tensors()
        out = torch.empty_like(q)
        FLASH.flash_kernel[(1, 2)](q, k, v, out, 128, 1.0, 64, 128, False, maxnreg=64)

    (report,) = compile_launches(crowded, targets=["sm_80"])
    assert report.registers <= 64
    assert report.spill_bytes > 0
    assert report.instructions.get("STL", 0) > 0


def test_compiling_and_emulating_do_not_disturb_each_other() -> None:
    q, k, v = tensors()
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for _ in range(2):
        compile_launches(FLASH.flash, (q, k, v), targets=["sm_90"])
        with emulate("sm_90"):
            assert (FLASH.flash(q, k, v).double() - exact).abs().max() < 1e-3


def test_nothing_launched_is_an_error() -> None:
    with pytest.raises(EmulationError, match="launched no Triton kernel"):
        compile_launches(lambda: None, targets=["sm_90"])


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="unknown target 'h100'"):
        compile_launches(FLASH.flash, tensors(), targets=["h100"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("length", "dim", "tile"), [(128, 64, 64), (100, 32, 32), (77, 16, 16)])
def test_flash_forward(length: int, dim: int, tile: int, dtype: torch.dtype, causal: bool) -> None:
    q, k, v = (torch.randn(2, length, dim).to(dtype) for _ in range(3))
    with emulate("sm_90"):
        out = FLASH.flash(q, k, v, tile=tile, causal=causal)
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=causal
    )
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-11}[dtype]
    assert (out.double() - exact).abs().max() < 8 * unit
