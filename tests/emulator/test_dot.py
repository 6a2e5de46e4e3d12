"""tl.dot: which roundings the operands, the products and the sums get, by dtype, precision and target."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnproof.emulator import emulate
from attnproof.emulator.numerics import round_to_tf32


@triton.jit
def dot_kernel(
    p_a,
    p_b,
    p_o,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(p_a + i_p * M * K + o_m[:, None] * K + o_k[None, :])
    b_b = tl.load(p_b + i_p * K * N + o_k[:, None] * N + o_n[None, :])
    b_o = tl.dot(b_a, b_b, input_precision=PRECISION, out_dtype=OUT)
    tl.store(p_o + i_p * M * N + o_m[:, None] * N + o_n[None, :], b_o)


def run_dot(
    a: Tensor,
    b: Tensor,
    *,
    target: str = "sm_90",
    precision: str | None = None,
    out: torch.dtype = torch.float32,
) -> Tensor:
    """a·b, one program for each leading index."""
    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.int32: tl.int32}
    result = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=out)
    with emulate(target):
        dot_kernel[(a.shape[0],)](a, b, result, a.shape[1], b.shape[2], a.shape[2], precision, names[out])
    return result


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Three pairs of 16x32 and 32x16 matrices."""
    return torch.randn(3, 16, 32).to(dtype), torch.randn(3, 32, 16).to(dtype)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_float32_operands_are_tf32_by_default_on_nvidia(target: str) -> None:
    a, b = inputs()
    result = run_dot(a, b, target=target).double()
    rounded = round_to_tf32(a).double() @ round_to_tf32(b).double()
    assert (result - rounded).abs().max() < 1e-5
    assert (result - a.double() @ b.double()).abs().max() > 1e-4


def test_float32_operands_are_exact_by_default_on_amd() -> None:
    a, b = inputs()
    assert (run_dot(a, b, target="gfx942").double() - a.double() @ b.double()).abs().max() < 1e-5


@pytest.mark.parametrize(("precision", "bound"), [("ieee", 1e-5), ("tf32x3", 2e-5), ("tf32", 3e-2)])
def test_asked_precisions(precision: str, bound: float) -> None:
    a, b = inputs()
    error = (run_dot(a, b, precision=precision).double() - a.double() @ b.double()).abs().max()
    assert error < bound
    if precision == "tf32":
        assert error > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_products_are_exact_and_sums_float32(dtype: torch.dtype) -> None:
    a, b = inputs(dtype)
    exact = a.double() @ b.double()
    assert (run_dot(a, b).double() - exact).abs().max() < 32 * 2.0**-24 * (
        a.abs().double() @ b.abs().double()
    ).max()


def test_float16_result_is_rounded() -> None:
    a, b = inputs(torch.float16)
    result = run_dot(a, b, out=torch.float16)
    assert (result.double() - a.double() @ b.double()).abs().max() > 1e-4
    assert torch.allclose(result.double(), a.double() @ b.double(), atol=2e-2)


def test_int8_is_exact() -> None:
    a = torch.randint(-128, 128, (2, 16, 32), dtype=torch.int8)
    b = torch.randint(-128, 128, (2, 32, 16), dtype=torch.int8)
    assert torch.equal(run_dot(a, b, out=torch.int32), (a.long() @ b.long()).int())


def test_float8_operands() -> None:
    a, b = (x.to(torch.float8_e4m3fn) for x in inputs())
    exact = a.double() @ b.double()
    assert (run_dot(a, b).double() - exact).abs().max() < 1e-4


def test_tf32_rounds_ties_away_and_keeps_special_values() -> None:
    tie = 1 + 2.0**-11
    x = torch.tensor([tie, -tie, 1 + 2.0**-12, float("inf"), float("nan"), 0.0])
    rounded = round_to_tf32(x)
    assert rounded[:4].tolist() == [1 + 2.0**-10, -(1 + 2.0**-10), 1.0, float("inf")]
    assert bool(rounded[4].isnan())
    assert rounded[5] == 0
