"""What the budgets and the emulator assume of a GPU, measured on one (nox session ``gpu``).

PTX ISA documents ex2.approx and tanh.approx by bounds; how matrix units sum is known from the experiments
that theory.md HW-3 cites. Run with ``-s`` to read the figures.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.native import NATIVE

pytestmark = pytest.mark.skipif(not NATIVE, reason="measures a GPU: run nox -s gpu on a machine with one")

BLOCK = 1024
# Bit patterns in one launch; 64 of them are all of float32.
PART = 1 << 26
SMALLEST_NORMAL = 2.0**-126


@triton.jit
def function_kernel(p_x, p_o, TANH: tl.constexpr, B: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    b_x = tl.load(p_x + o_x)
    if TANH:
        b_o = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        b_o = tl.exp2(b_x)
    tl.store(p_o + o_x, b_o)


def every_float32(tanh: bool):
    """(x, f(x) on the GPU) for all bit patterns that are numbers, part by part."""
    for first in range(-(2**31), 2**31, PART):
        x = torch.arange(first, first + PART, dtype=torch.int64).to(torch.int32).view(torch.float32)
        found = torch.empty_like(x)
        function_kernel[(PART // BLOCK,)](x, found, tanh, BLOCK)
        keep = ~x.isnan()
        yield x[keep], found[keep]


def test_exp2_to_2_ulp_with_subnormal_numbers_flushed() -> None:
    """ex2.approx.ftz.f32 over all of float32: 2 ulp of the rounded result, 0 below the smallest normal.

    Budgets read the bound as a relative error of 2^-22.
    """
    worst, relative, flushed = 0.0, 0.0, 0
    for x, found in every_float32(False):
        exact = torch.exp2(x.double())
        small = exact < SMALLEST_NORMAL
        assert (found[small] == 0.0).all()
        flushed += int((small & (exact >= 2.0**-149)).sum())
        over = exact.float().isinf()
        assert found[over].isinf().all()
        kept = ~small & ~over
        if not bool(kept.any()):
            continue
        got, want = found[kept].double(), exact[kept]
        ulp = torch.exp2(torch.floor(torch.log2(want))) * 2.0**-23
        worst = max(worst, float(((got - want.float().double()).abs() / ulp).max()))
        relative = max(relative, float(((got - want) / want).abs().max()))
    print(
        f"\nex2.approx.ftz.f32: at most {worst:.3f} ulp from the rounded result, relative error at most "
        f"2^{math.log2(relative):.2f}; results of {flushed} arguments are flushed"
    )
    assert flushed > 0
    assert worst <= 2.0
    assert relative <= 2.0**-22


def test_tanh_to_11_bits() -> None:
    """tanh.approx.f32 over all of float32: a relative error of at most 2^-11."""
    worst = 0.0
    for x, found in every_float32(True):
        exact = torch.tanh(x.double())
        # Where x is subnormal float64's own tanh is x, and so is the instruction's.
        kept = exact.abs() >= SMALLEST_NORMAL
        if bool(kept.any()):
            worst = max(worst, float(((found[kept].double() - exact[kept]) / exact[kept]).abs().max()))
    print(f"\ntanh.approx.f32: relative error at most 2^{math.log2(worst):.2f}")
    assert worst <= 2.0**-11


@triton.jit
def dot_kernel(p_a, p_b, p_c, p_o, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    b_c = tl.dot(tl.load(p_a + o), tl.load(p_b + o), tl.load(p_c + o), input_precision=PRECISION)
    tl.store(p_o + o, b_c)


def one_and_products(each: float, count: int, dtype: torch.dtype, size: int) -> float:
    """(c + Σ a b − 1)·2^23 for c = 1 and ``count`` products a b = ``each``."""
    a, b = torch.zeros(size, size, dtype=dtype), torch.zeros(size, size, dtype=dtype)
    a[:, :count] = math.sqrt(each)
    b[:count] = math.sqrt(each)
    c, found = torch.ones(size, size), torch.empty(size, size)
    dot_kernel[(1,)](a, b, c, found, "tf32" if dtype == torch.float32 else "ieee", size)
    values = found.unique()
    assert values.numel() == 1
    return float(values.double() - 1.0) * 2.0**23


def exact_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize("size", [16, 64], ids=["16 wide", "64 wide, one warpgroup"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["f16", "bf16", "tf32"])
def test_matrix_units_align_and_truncate(dtype: torch.dtype, size: int) -> None:
    """Products beside a 1 keep 24 fractional bits at least on Hopper; the sum is cut, not rounded, to 23."""
    found = [one_and_products(4.0**-k, n, dtype, size) for k, n in ((12, 4), (13, 4), (12, 3), (11, 3))]
    # Sums beside the 1, in units of its last place: 2, 1/2, 3/2, 6. The third would be rounded to 2.
    print(f"\n{dtype}, {size}: 4·2^-24, 4·2^-26, 3·2^-24, 3·2^-22 beside 1 give {found} units of 2^-23")
    if not exact_hopper():
        pytest.skip("known of Hopper only")
    assert found == [2.0, 0.0, 1.0, 6.0]


def test_float32_products_are_fused_and_rounded() -> None:
    """input_precision="ieee" does not run on matrix units: 1 + 3·2^-24 is rounded, to even."""
    size = 16
    a, b = torch.zeros(size, size), torch.zeros(size, size)
    a[:, 0], b[0] = 3 * 2.0**-12, 2.0**-12
    c, found = torch.ones(size, size), torch.empty(size, size)
    dot_kernel[(1,)](a, b, c, found, "ieee", size)
    assert (found == 1.0 + 2 * 2.0**-23).all()


def summed(dtype: torch.dtype, length: int) -> Tensor:
    """Relative errors of x·1 over ``length`` random positive x, through one accumulator."""
    x = torch.rand(64, length).to(dtype)
    ones = torch.ones(length, 64, dtype=dtype)
    total = torch.zeros(64, 64)
    for i in range(0, length, 64):
        found = torch.empty(64, 64)
        dot_kernel[(1,)](
            x[:, i : i + 64].contiguous(), ones[i : i + 64].contiguous(), total, found, "ieee", 64
        )
        total = found
    exact = x.double().sum(1, keepdim=True)
    return (total.double() - exact) / exact


def test_sums_of_matrix_units_lean_toward_zero() -> None:
    """The reason for ``Contract.on``: errors have one sign, so that they grow with the length."""
    errors = summed(torch.float16, 4096)
    print(f"\n4096 positive float16 numbers: relative error {float(errors.mean()):.3g} on average")
    assert (errors <= 0).all()
    assert float(errors.mean()) < -4 * 2.0**-24
