"""Element-wise operations against torch and numpy, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnproof.emulator import emulate

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@triton.jit
def binary_kernel(p_x, p_y, p_o, OP: tl.constexpr, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(p_x + o)
    y = tl.load(p_y + o)
    if OP == "add":
        r = x + y
    elif OP == "sub":
        r = x - y
    elif OP == "mul":
        r = x * y
    elif OP == "div":
        r = x / y
    elif OP == "floordiv":
        r = x // y
    elif OP == "mod":
        r = x % y
    elif OP == "and":
        r = x & y
    elif OP == "xor":
        r = x ^ y
    elif OP == "shl":
        r = x << y
    elif OP == "shr":
        r = x >> y
    elif OP == "less":
        r = x < y
    elif OP == "equal":
        r = x == y
    elif OP == "unequal":
        r = x != y
    elif OP == "max":
        r = tl.maximum(x, y)
    elif OP == "min":
        r = tl.minimum(x, y)
    elif OP == "max_nan":
        r = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "min_nan":
        r = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "umulhi":
        r = tl.umulhi(x, y)
    tl.store(p_o + o, r.to(p_o.dtype.element_ty))


@triton.jit
def unary_kernel(p_x, p_o, OP: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(p_x + o)
    if OP == "exp":
        r = tl.exp(x)
    elif OP == "exp2":
        r = tl.exp2(x)
    elif OP == "log":
        r = tl.log(x)
    elif OP == "log2":
        r = tl.log2(x)
    elif OP == "sqrt":
        r = tl.sqrt(x)
    elif OP == "sqrt_rn":
        r = tl.sqrt_rn(x)
    elif OP == "rsqrt":
        r = tl.rsqrt(x)
    elif OP == "sin":
        r = tl.sin(x)
    elif OP == "cos":
        r = tl.cos(x)
    elif OP == "erf":
        r = tl.erf(x)
    elif OP == "abs":
        r = tl.abs(x)
    elif OP == "floor":
        r = tl.floor(x)
    elif OP == "ceil":
        r = tl.ceil(x)
    elif OP == "sigmoid":
        r = tl.sigmoid(x)
    elif OP == "neg":
        r = -x
    tl.store(p_o + o, r)


@triton.jit
def cast_kernel(p_x, p_o, RTZ: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(p_x + o)
    if RTZ:
        r = x.to(p_o.dtype.element_ty, fp_downcast_rounding="rtz")
    else:
        r = x.to(p_o.dtype.element_ty)
    tl.store(p_o + o, r)


@triton.jit
def fma_kernel(p_x, p_y, p_z, p_o, CLAMP: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    x, y, z = tl.load(p_x + o), tl.load(p_y + o), tl.load(p_z + o)
    if CLAMP:
        r = tl.clamp(x, y, z)
    else:
        r = tl.fma(x, y, z)
    tl.store(p_o + o, r)


def run_binary(op: str, x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The kernel over two programs."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype)
    with emulate("sm_90"):
        binary_kernel[(2,)](x, y, out, op, x.numel() // 2)
    return out


def run_cast(x: Tensor, dtype: torch.dtype, *, rtz: bool = False) -> Tensor:
    """The conversion kernel over one program."""
    out = torch.empty(x.shape, dtype=dtype)
    with emulate("sm_90"):
        cast_kernel[(1,)](x, out, rtz, x.numel())
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal element by element, NaN with NaN, zeros with their signs."""
    a, b = a.double(), b.double()
    return bool(((a == b) & (torch.signbit(a) == torch.signbit(b)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_float_arithmetic_rounds_once_to_its_own_type(op: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 256).to(dtype)
    exact: Any = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[op](x.double(), y.double())
    assert same_bits(run_binary(op, x, y), exact.to(dtype))


def test_bfloat16_sums_are_rounded() -> None:
    one, small = torch.ones(16, dtype=torch.bfloat16), torch.full((16,), 2.0**-9, dtype=torch.bfloat16)
    # 1 + 2^-9 is not a bfloat16: an emulator that kept float32 would return it.
    assert torch.equal(run_binary("add", one, small), one)


def test_division_is_correctly_rounded_in_float32() -> None:
    x, y = torch.randn(2, 256)
    assert same_bits(run_binary("div", x, y), (x.double() / y.double()).float())


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint32], ids=str
)
@pytest.mark.parametrize(
    "op", ["add", "sub", "mul", "floordiv", "mod", "and", "xor", "less", "max", "min", "equal"]
)
def test_integers_wrap_and_divide_as_in_c(op: str, dtype: torch.dtype) -> None:
    kind = np.dtype(str(dtype).removeprefix("torch."))
    limits = np.iinfo(kind)
    generator = np.random.default_rng(7)
    x = generator.integers(limits.min, limits.max, 64, dtype=kind, endpoint=True)
    y = generator.integers(limits.min, limits.max, 64, dtype=kind, endpoint=True)
    y[y == 0] = 3
    y[:8] = 7
    with np.errstate(over="ignore"):
        wide_x, wide_y = x.astype(object), y.astype(object)
        expected = {
            "add": lambda: x + y,
            "sub": lambda: x - y,
            "mul": lambda: x * y,
            "and": lambda: x & y,
            "xor": lambda: x ^ y,
            # C truncates towards zero; Python's integers floor.
            "floordiv": lambda: np.array(
                [
                    int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)
                    for a, b in zip(wide_x, wide_y, strict=True)
                ]
            ).astype(kind),
            "mod": lambda: np.array(
                [int(abs(a) % abs(b)) * (-1 if a < 0 else 1) for a, b in zip(wide_x, wide_y, strict=True)]
            ).astype(kind),
            "less": lambda: x < y,
            "equal": lambda: x == y,
            "max": lambda: np.maximum(x, y),
            "min": lambda: np.minimum(x, y),
        }[op]()
    result = run_binary(op, torch.from_numpy(x), torch.from_numpy(y))
    assert np.array_equal(result.numpy(), np.asarray(expected).astype(kind))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32, torch.int64], ids=str)
def test_shifts_respect_signedness(dtype: torch.dtype) -> None:
    kind = np.dtype(str(dtype).removeprefix("torch."))
    x = np.random.default_rng(1).integers(np.iinfo(kind).min, np.iinfo(kind).max, 32, dtype=kind)
    y = (np.arange(32) % 31).astype(kind)
    assert np.array_equal(run_binary("shr", torch.from_numpy(x), torch.from_numpy(y)).numpy(), x >> y)
    assert np.array_equal(run_binary("shl", torch.from_numpy(x), torch.from_numpy(y)).numpy(), x << y)


@pytest.mark.parametrize("dtype", [torch.uint32, torch.uint64], ids=str)
def test_high_halves_of_products(dtype: torch.dtype) -> None:
    bits = dtype.itemsize * 8
    kind = np.dtype(f"u{dtype.itemsize}")
    x, y = np.random.default_rng(2).integers(0, 2**bits - 1, (2, 32), dtype=kind, endpoint=True)
    expected = np.array([(int(a) * int(b)) >> bits for a, b in zip(x, y, strict=True)], dtype=kind)
    assert np.array_equal(run_binary("umulhi", torch.from_numpy(x), torch.from_numpy(y)).numpy(), expected)


def test_nan_rules_of_minimum_and_maximum() -> None:
    nan = float("nan")
    x, y = torch.tensor([nan, 1.0, nan, 2.0]), torch.tensor([3.0, nan, nan, -1.0])
    assert same_bits(run_binary("max", x, y), torch.tensor([3.0, 1.0, nan, 2.0]))
    assert same_bits(run_binary("min", x, y), torch.tensor([3.0, 1.0, nan, -1.0]))
    assert same_bits(run_binary("max_nan", x, y), torch.tensor([nan, nan, nan, 2.0]))
    assert same_bits(run_binary("min_nan", x, y), torch.tensor([nan, nan, nan, -1.0]))


def test_float_comparisons_with_nan() -> None:
    nan = float("nan")
    x, y = torch.tensor([nan, 1.0, 2.0, nan]), torch.tensor([1.0, 1.0, 3.0, nan])
    assert run_binary("less", x, y, torch.int32).tolist() == [0, 0, 1, 0]
    assert run_binary("equal", x, y, torch.int32).tolist() == [0, 1, 0, 0]
    assert run_binary("unequal", x, y, torch.int32).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("op", "f"),
    [
        ("exp", torch.exp),
        ("exp2", torch.exp2),
        ("log", torch.log),
        ("log2", torch.log2),
        ("sqrt", torch.sqrt),
        ("sqrt_rn", torch.sqrt),
        ("rsqrt", torch.rsqrt),
        ("sin", torch.sin),
        ("cos", torch.cos),
        ("erf", torch.erf),
        ("abs", torch.abs),
        ("floor", torch.floor),
        ("ceil", torch.ceil),
        ("sigmoid", torch.sigmoid),
        ("neg", torch.neg),
    ],
)
def test_functions_are_within_two_ulp(op: str, f: Any) -> None:
    x = torch.rand(256) * 8 + 0.01
    out = torch.empty_like(x)
    with emulate("sm_90"):
        unary_kernel[(1,)](x, out, op, 256)
    exact = f(x.double())
    assert ((out.double() - exact).abs() <= 2 * 2.0**-23 * exact.abs() + 1e-7 * (op in ("sin", "cos"))).all()


@pytest.mark.parametrize(("target", "flushed"), [("sm_80", True), ("sm_90", True), ("gfx942", False)])
def test_exp2_flushes_on_cuda_and_exp_does_not(target: str, flushed: bool) -> None:
    # As Triton 3.6 and 3.9 compile them: ex2.approx.ftz.f32 and ex2.approx.f32. An H100 returned the former's
    # zeros for weights of an attention whose exact values are 2^-127.
    x = torch.tensor([-126.0, -126.5, -140.0, -float("inf"), float("nan"), 3.0, 0.0, 0.0])
    natural = x * math.log(2.0)
    got, kept = torch.empty_like(x), torch.empty_like(x)
    with emulate(target):
        unary_kernel[(1,)](x, got, "exp2", 8)
        unary_kernel[(1,)](natural, kept, "exp", 8)
    assert got[0] == 2.0**-126
    assert got[3] == 0.0
    assert got[4].isnan()
    assert got[5] == 8.0
    assert (got[1:3] == 0.0).all() == flushed
    assert (kept[1:3] > 0.0).all()


def test_fma_rounds_once() -> None:
    # (1 + 2^-12)² = 1 + 2^-11 + 2^-24: the last term is lost when the product is rounded to float32 by
    # itself.
    x = torch.full((16,), 1 + 2.0**-12)
    z = torch.full((16,), -(1 + 2.0**-11))
    out = torch.empty_like(x)
    with emulate("sm_90"):
        fma_kernel[(1,)](x, x, z, out, False, 16)
    assert (out == 2.0**-24).all()


@pytest.mark.parametrize(
    ("x", "y", "z", "expected"),
    [
        (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60, 1 + 2.0**-11 + 2.0**-23),
        (1 + 2.0**-12, 1 + 3 * 2.0**-12, -(2.0**-60), 1 + 2.0**-10 + 2.0**-23),
    ],
)
def test_fma_has_no_double_rounding(x: float, y: float, z: float, expected: float) -> None:
    # The product is a float32 tie; what decides it is too small for float64 to hold beside it.
    out = torch.empty(16)
    with emulate("sm_90"):
        fma_kernel[(1,)](*(torch.full((16,), value) for value in (x, y, z)), out, False, 16)
    assert (out == expected).all()


def test_clamp() -> None:
    x = torch.randn(64) * 3
    low, high = torch.full((64,), -1.0), torch.full((64,), 2.0)
    out = torch.empty(64)
    with emulate("sm_90"):
        fma_kernel[(1,)](x, low, high, out, True, 64)
    assert torch.equal(out, x.clamp(-1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrowing_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(254) * 100, torch.tensor([1e30, float("nan")])])
    assert same_bits(run_cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrowing_towards_zero(dtype: torch.dtype) -> None:
    x = torch.randn(256) * 10
    cut = run_cast(x, dtype, rtz=True).double()
    assert (cut.abs() <= x.double().abs()).all()
    assert (cut != x.to(dtype).double()).any()
    step = 2.0 ** -(10 if dtype == torch.float16 else 7)
    assert ((cut - x.double()).abs() < step * x.double().abs()).all()


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)], ids=["e4m3fn", "e5m2"]
)
def test_float8_saturates_and_rounds_to_even(dtype: torch.dtype, largest: float) -> None:
    x = torch.cat([torch.randn(60) * 20, torch.tensor([1e6, -1e6, float("inf"), float("nan")])])
    result = run_cast(x, dtype).float()
    assert torch.equal(result[:60], x[:60].to(dtype).float())
    assert result[60:63].tolist() == [largest, -largest, largest]
    assert bool(result[63].isnan())


def test_float8_widens_exactly() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert same_bits(run_cast(x, torch.float32), x.float())


def test_floats_to_integers_truncate_and_saturate() -> None:
    x = torch.tensor([1.9, -1.9, 3e9, -3e9, float("nan"), float("inf"), 0.0, -0.5])
    assert run_cast(x, torch.int32).tolist() == [1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1, 0, 0]


@pytest.mark.parametrize("source", [torch.int8, torch.int32, torch.uint8, torch.int64], ids=str)
def test_integers_to_floats(source: torch.dtype) -> None:
    info = torch.iinfo(source)
    x = torch.linspace(float(info.min), float(info.max) * 0.999, 64, dtype=torch.float64).to(source)
    assert same_bits(run_cast(x, torch.float32), x.float())
