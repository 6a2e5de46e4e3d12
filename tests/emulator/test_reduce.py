"""Reductions, scans, sorts and the operations that only move elements."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from attnproof.emulator import emulate


@triton.jit
def reduce_kernel(p_x, p_o, OP: tl.constexpr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_x = tl.load(p_x + tl.program_id(0) * M * N + o_m[:, None] * N + o_n[None, :])
    if OP == "sum":
        r = tl.sum(b_x, AXIS)
    elif OP == "max":
        r = tl.max(b_x, AXIS)
    elif OP == "min":
        r = tl.min(b_x, AXIS)
    elif OP == "argmax":
        r = tl.argmax(b_x, AXIS)
    elif OP == "argmin":
        r = tl.argmin(b_x, AXIS)
    elif OP == "xor_sum":
        r = tl.xor_sum(b_x, AXIS)
    if AXIS == 0:
        tl.store(p_o + tl.program_id(0) * N + o_n, r)
    else:
        tl.store(p_o + tl.program_id(0) * M + o_m, r)


@triton.jit
def affine(a0, b0, a1, b1):
    return a0 * a1, b0 * a1 + b1


@triton.jit
def scan_kernel(p_x, p_o, OP: tl.constexpr, REVERSE: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    b_x = tl.load(p_x + o)
    if OP == "sum":
        r = tl.cumsum(b_x, 0, reverse=REVERSE)
    elif OP == "prod":
        r = tl.cumprod(b_x, 0, reverse=REVERSE)
    elif OP == "affine":
        decay = tl.full([B], 0.5, tl.float32)
        _, r = tl.associative_scan((decay, b_x), 0, affine, reverse=REVERSE)
    elif OP == "sort":
        r = tl.sort(b_x, descending=REVERSE)
    elif OP == "flip":
        r = tl.flip(b_x, 0)
    elif OP == "softmax":
        r = tl.softmax(b_x)
    tl.store(p_o + o, r)


@triton.jit
def shape_kernel(p_x, p_y, p_o, OP: tl.constexpr, B: tl.constexpr):
    o = tl.arange(0, B)
    o2 = tl.arange(0, 2 * B)
    b_x, b_y = tl.load(p_x + o), tl.load(p_y + o)
    if OP == "interleave":
        tl.store(p_o + o2, tl.interleave(b_x, b_y))
    elif OP == "cat":
        tl.store(p_o + o2, tl.cat(b_x, b_y, can_reorder=True))
    elif OP == "split":
        first, second = tl.split(tl.reshape(b_x, (B // 2, 2)))
        half = tl.arange(0, B // 2)
        tl.store(p_o + half, first)
        tl.store(p_o + B // 2 + half, second)
        tl.store(p_o + B + o, b_y)
    elif OP == "gather":
        tl.store(p_o + o, tl.gather(b_x, (o * 3 + 1) % B, 0))
        tl.store(p_o + B + o, b_y)
    elif OP == "permute":
        b_t = tl.permute(tl.reshape(b_x, (2, B // 4, 2)), (2, 0, 1))
        tl.store(p_o + o, tl.reshape(b_t, (B,)))
        tl.store(p_o + B + o, b_y)
    elif OP == "constant":
        tl.store(p_o + o, tl.reshape(tl.full((B // 2, 2), 3.0, tl.float32), (B,)))
        tl.store(p_o + B + o, tl.sum(tl.full((B, 4), 2.0, tl.float32), 1))


@triton.jit
def histogram_kernel(p_x, p_o, B: tl.constexpr, BINS: tl.constexpr):
    b_x = tl.load(p_x + tl.arange(0, B))
    tl.store(p_o + tl.arange(0, BINS), tl.histogram(b_x, BINS))


@triton.jit
def random_kernel(p_o, seed, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_o + o, tl.rand(seed, o))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["sum", "max", "min", "argmax", "argmin"])
def test_reductions(op: str, axis: int) -> None:
    x = torch.randn(3, 16, 32)
    kind = torch.int32 if op.startswith("arg") else torch.float32
    out = torch.empty(3, 32 if axis == 0 else 16, dtype=kind)
    with emulate():
        reduce_kernel[(3,)](x, out, op, axis, 16, 32)
    expected = {
        "sum": torch.sum,
        "max": torch.amax,
        "min": torch.amin,
        "argmax": torch.argmax,
        "argmin": torch.argmin,
    }[op](x, axis + 1)
    assert torch.allclose(out, expected.to(kind), atol=1e-5)


def test_ties_go_to_the_first() -> None:
    x = torch.zeros(1, 16, 32)
    out = torch.empty(16, dtype=torch.int32)
    with emulate():
        reduce_kernel[(1,)](x, out, "argmax", 1, 16, 32)
    assert (out == 0).all()


def test_maximum_drops_nan() -> None:
    x = torch.randn(1, 16, 32)
    x[0, 3, 5] = float("nan")
    x[0, 4, :] = float("nan")
    out = torch.empty(16)
    with emulate():
        reduce_kernel[(1,)](x, out, "max", 1, 16, 32)
    expected = x[0].nan_to_num(nan=float("-inf")).amax(1)
    assert torch.equal(out[:4], expected[:4])
    assert bool(out[4].isnan())


def test_half_sums_round_at_each_step() -> None:
    x = torch.full((1, 16, 32), 1.0, dtype=torch.bfloat16)
    x[..., 0] = 512.0
    out = torch.empty(16, dtype=torch.bfloat16)
    with emulate():
        reduce_kernel[(1,)](x, out, "sum", 1, 16, 32)
    # bfloat16 has steps of 4 from 512 on. In a tree of neighbours 512 + 1 and 512 + 2 are rounded down, and
    # 4 + 8 + 16 are kept: 540, where one rounding of the exact 543 would give 544.
    assert (out == 540).all()


def test_general_regions() -> None:
    x = torch.randint(0, 1 << 30, (2, 16, 32), dtype=torch.int32)
    out = torch.empty(2, 16, dtype=torch.int32)
    with emulate():
        reduce_kernel[(2,)](x, out, "xor_sum", 1, 16, 32)
    expected = x[..., 0].clone()
    for i in range(1, 32):
        expected ^= x[..., i]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", ["sum", "prod", "affine", "sort"])
def test_scans(op: str, reverse: bool) -> None:
    x = torch.rand(32) + 0.5
    out = torch.empty(32)
    with emulate():
        scan_kernel[(1,)](x, out, op, reverse, 32)
    y = x.flip(0) if reverse and op != "sort" else x
    if op == "sum":
        expected = y.cumsum(0)
    elif op == "prod":
        expected = y.cumprod(0)
    elif op == "affine":
        expected, state = torch.empty(32), 0.0
        for i in range(32):
            state = 0.5 * state + float(y[i])
            expected[i] = state
    else:
        expected = x.sort(descending=reverse).values
    if reverse and op != "sort":
        expected = expected.flip(0)
    assert torch.allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize(("op", "f"), [("flip", lambda x: x.flip(0)), ("softmax", lambda x: x.softmax(0))])
def test_library_functions(op: str, f: object) -> None:
    x, out = torch.randn(32), torch.empty(32)
    with emulate():
        scan_kernel[(1,)](x, out, op, False, 32)
    assert callable(f)
    assert torch.allclose(out, f(x), atol=1e-6)


@pytest.mark.parametrize(
    "op",
    [
        "interleave",
        # Triton 3.9 announces that 3.10 drops the reordering form.
        pytest.param("cat", marks=pytest.mark.filterwarnings("ignore:.*can_reorder")),
        "split",
        "gather",
        "permute",
        "constant",
    ],
)
def test_shapes(op: str) -> None:
    x, y, out = torch.randn(16), torch.randn(16), torch.empty(32)
    with emulate():
        shape_kernel[(1,)](x, y, out, op, 16)
    expected = {
        "interleave": torch.stack([x, y], 1).flatten(),
        "cat": torch.cat([x, y]),
        "split": torch.cat([x[::2], x[1::2], y]),
        "gather": torch.cat([x[(torch.arange(16) * 3 + 1) % 16], y]),
        "permute": torch.cat([x.view(2, 4, 2).permute(2, 0, 1).flatten(), y]),
        "constant": torch.cat([torch.full((16,), 3.0), torch.full((16,), 8.0)]),
    }[op]
    assert torch.equal(out, expected)


def test_histogram() -> None:
    x = torch.randint(0, 8, (64,), dtype=torch.int32)
    out = torch.empty(8, dtype=torch.int32)
    with emulate():
        histogram_kernel[(1,)](x, out, 64, 8)
    assert torch.equal(out.long(), torch.bincount(x.long(), minlength=8))


def test_random_numbers_are_tritons() -> None:
    out = torch.empty(4096)
    with emulate():
        random_kernel[(1,)](out, 42, 4096)
    assert float(out.min()) >= 0
    assert float(out.max()) < 1
    assert abs(float(out.mean()) - 0.5) < 0.02
    assert out.unique().numel() > 4000
