"""libdevice, inline assembly, assertions, prints, tensor descriptors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from attnproof.emulator import EmulationError, MemoryFault, emulate


@triton.jit
def libdevice_kernel(p_x, p_o, OP: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(p_x + o)
    if OP == "tanh":
        r = libdevice.tanh(x)
    elif OP == "log1p":
        r = libdevice.log1p(x)
    elif OP == "pow":
        r = libdevice.pow(x, x)
    elif OP == "exp":
        r = libdevice.exp(x)
    elif OP == "fast_expf":
        r = libdevice.fast_expf(x)
    elif OP == "rsqrt":
        r = libdevice.rsqrt(x)
    elif OP == "round":
        r = libdevice.round(x)
    elif OP == "j0":
        r = libdevice.j0(x)
    tl.store(p_o + o, r)


@triton.jit
def asm_kernel(p_x, p_o, ASM: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(p_x + o)
    r = tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(p_o + o, r)


@triton.jit
def assert_kernel(p_x, B: tl.constexpr):
    x = tl.load(p_x + tl.program_id(0) * B + tl.arange(0, B))
    tl.device_assert(x > 0, "must be positive")


@triton.jit
def print_kernel(p_x):
    tl.device_print("value", tl.load(p_x + tl.program_id(0)))


@triton.jit
def descriptor_kernel(p_x, p_o, M, N, B: tl.constexpr):
    d_x = tl.make_tensor_descriptor(p_x, [M, N], [N, 1], [B, B])
    d_o = tl.make_tensor_descriptor(p_o, [M, N], [N, 1], [B, B])
    i_m = tl.program_id(0) * B
    for i_n in range(0, N, B):
        d_o.store([i_m, i_n], d_x.load([i_m, i_n]) * 2)


@triton.jit
def host_descriptor_kernel(d_x, d_o, B: tl.constexpr):
    i_m = tl.program_id(0) * B
    d_o.store([i_m, 0], d_x.load([i_m, 0]) + 1)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("op", "f"),
    [
        ("tanh", torch.tanh), ("log1p", torch.log1p), ("pow", lambda x: x**x), ("exp", torch.exp),
        ("fast_expf", torch.exp), ("rsqrt", torch.rsqrt), ("round", torch.round),
    ],
)  # fmt: skip
def test_libdevice(op: str, f: Any, target: str) -> None:
    if target == "gfx942" and op == "round":
        pytest.skip("AMD's libdevice has no round")
    x = torch.rand(64) * 3 + 0.1
    out = torch.empty_like(x)
    with emulate(target):
        libdevice_kernel[(1,)](x, out, op, 64)
    assert torch.allclose(out, f(x), rtol=1e-6)


def test_unknown_libdevice_function_is_named() -> None:
    with (
        emulate(),
        pytest.raises(
            EmulationError,
            match=r"tt.extern_elementwise in kernel libdevice_kernel at .*test_foreign.py:\d+.*'__nv_j0f'",
        ),
    ):
        libdevice_kernel[(1,)](torch.zeros(16), torch.zeros(16), "j0", 16)


@pytest.mark.parametrize(
    ("asm", "f"),
    [
        ("ex2.approx.ftz.f32 $0, $1;", torch.exp2),
        ("rcp.approx.ftz.f32 $0, $1;", torch.reciprocal),
        ("lg2.approx.f32 $0, $1;", torch.log2),
        (
            "{\n .reg .f32 t;\n mul.f32 t, $1, 0f40000000;\n ex2.approx.f32 $0, t;\n }",
            lambda x: torch.exp2(2 * x),
        ),
    ],
)
def test_inline_assembly(asm: str, f: Any) -> None:
    x = torch.rand(32) + 0.5
    out = torch.empty_like(x)
    with emulate():
        asm_kernel[(1,)](x, out, asm, 32)
    assert torch.allclose(out, f(x), rtol=1e-6)


@pytest.mark.parametrize("modifier", ["", ".ftz"])
def test_subnormal_numbers_are_flushed_where_the_instruction_says_so(modifier: str) -> None:
    """PTX ISA: ex2.approx.ftz.f32 and mul.ftz.f32 take and give zeros of the sign for them."""
    tiny = 2.0**-126
    x = torch.tensor([-127.0, -126.0, -149.0, 1.0])
    out = torch.empty_like(x)
    with emulate():
        asm_kernel[(1,)](x, out, f"ex2.approx{modifier}.f32 $0, $1;", 4)
    assert out.tolist() == [0.0 if modifier else tiny / 2, tiny, 0.0 if modifier else 2.0**-149, 2.0]
    y = torch.tensor([tiny / 2, -tiny / 2, tiny, -tiny])
    with emulate():
        asm_kernel[(1,)](y, out, f"mul{modifier}.f32 $0, $1, 0f40000000;", 4)
    assert out.tolist() == (
        [0.0, 0.0, 2 * tiny, -2 * tiny] if modifier else [tiny, -tiny, 2 * tiny, -2 * tiny]
    )
    assert out.signbit().tolist() == [False, True, False, True]


def test_the_hardware_tanh_has_eleven_bits() -> None:
    x = torch.linspace(-9.0, 9.0, 1024)
    out = torch.empty_like(x)
    with emulate():
        asm_kernel[(1,)](x, out, "tanh.approx.f32 $0, $1;", 1024)
    exact = torch.tanh(x.double())
    relative = (out.double() - exact).abs() / exact.abs()
    assert 2.0**-12 < float(relative.max()) <= 2.0**-11
    mantissa, _ = torch.frexp(out.double())
    assert torch.equal(mantissa * 2.0**11, (mantissa * 2.0**11).round())


def test_other_assembly_is_refused() -> None:
    with emulate(), pytest.raises(EmulationError, match=r"inline assembly 'shfl\.sync"):
        asm_kernel[(1,)](torch.zeros(16), torch.zeros(16), "shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", 16)


def test_device_assert_names_the_program() -> None:
    x = torch.ones(32)
    x[21] = -1
    with (
        emulate(),
        pytest.raises(AssertionError, match=r"program \(1, 0, 0\), element \(5,\): must be positive"),
    ):
        assert_kernel[(2,)](x, 16, debug=True)


def test_device_print(capsys: pytest.CaptureFixture[str]) -> None:
    with emulate():
        print_kernel[(2,)](torch.tensor([3, 4], dtype=torch.int32))
    assert capsys.readouterr().out.splitlines() == ["pid (0, 0, 0) value: 3", "pid (1, 0, 0) value: 4"]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_device_descriptors(target: str) -> None:
    x = torch.randn(40, 24)
    out = torch.zeros_like(x)
    with emulate(target):
        descriptor_kernel[(3,)](x, out, 40, 24, 16)
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_host_descriptors(target: str) -> None:
    x = torch.randn(40, 16)
    out = torch.zeros_like(x)
    with emulate(target):
        host_descriptor_kernel[(3,)](
            TensorDescriptor.from_tensor(x, [16, 16]), TensorDescriptor.from_tensor(out, [16, 16]), 16
        )
    assert torch.equal(out, x + 1)


def test_descriptor_shapes_are_checked_against_the_storage() -> None:
    with emulate(), pytest.raises(MemoryFault, match=r"tt\.descriptor_load"):
        descriptor_kernel[(3,)](torch.zeros(39, 24), torch.zeros(40, 24), 40, 24, 16)
