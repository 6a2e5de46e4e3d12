"""Loops and branches in which the programs of a grid go separate ways."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from attnproof.emulator import emulate


@triton.jit
def triangle_kernel(p_o, p_last, n, B: tl.constexpr):
    i_p = tl.program_id(0)
    b_s = tl.zeros([B], tl.float32)
    last = -1
    for j in range(i_p % n, n, 2):
        b_s += j
        last = j
    tl.store(p_o + i_p * B + tl.arange(0, B), b_s)
    tl.store(p_last + i_p, last)


@triton.jit
def nested_kernel(p_o, n):
    i_p = tl.program_id(0)
    total = 0
    for i in range(i_p):
        if i % 3 == i_p % 3:
            for j in range(i, n):
                total += j * (i_p + 1)
        else:
            total -= 1
    tl.store(p_o + i_p, total)


@triton.jit
def negative_step_kernel(p_o, n):
    total = 0
    step = 1
    for j in range(n, -1, -3):
        total = total * 7 + j * step
        step += 1
    tl.store(p_o + tl.program_id(0), total)


@triton.jit
def early_return_kernel(p_o, limit):
    i_p = tl.program_id(0)
    if i_p >= limit:
        return
    if i_p % 2 == 1:
        tl.store(p_o + i_p, 1.0)
        return
    tl.store(p_o + i_p, 2.0)


@triton.jit
def collatz_kernel(p_x, p_o):
    i_p = tl.program_id(0)
    x = tl.load(p_x + i_p)
    steps = 0
    while x != 1:
        if x % 2 == 0:
            x = x // 2
        else:
            x = 3 * x + 1
        steps += 1
    tl.store(p_o + i_p, steps)


@triton.jit(noinline=True)
def power(x, n):
    if n == 0:
        return x * 0 + 1
    r = x
    for _ in range(1, n):
        r = r * x
    return r


@triton.jit
def call_kernel(p_x, p_o):
    i_p = tl.program_id(0)
    tl.store(p_o + i_p, power(tl.load(p_x + i_p), i_p))


@triton.jit
def pointer_loop_kernel(p_x, p_o, stride, n, B: tl.constexpr):
    i_p = tl.program_id(0)
    p_row = p_x + i_p * B + tl.arange(0, B)
    b_s = tl.zeros([B], tl.float32)
    for _ in range(n - i_p):
        b_s += tl.load(p_row)
        p_row += stride
    tl.store(p_o + i_p * B + tl.arange(0, B), b_s)


@triton.jit
def guarded_store_kernel(p_x, p_o, B: tl.constexpr):
    i_p = tl.program_id(0)
    o = i_p * B + tl.arange(0, B)
    x = tl.load(p_x + o)
    if tl.sum(x, 0) > 0:
        y = x * 2
        tl.store(p_o + o, y)
    else:
        y = -x
    tl.store(p_o + 64 + o, y)


@pytest.mark.parametrize("programs", [1, 5, 16])
def test_loops_of_different_lengths(programs: int) -> None:
    out, last = torch.empty(programs, 8), torch.empty(programs, dtype=torch.int32)
    with emulate():
        triangle_kernel[(programs,)](out, last, 9, 8)
    for p in range(programs):
        values = list(range(p % 9, 9, 2))
        assert (out[p] == sum(values)).all()
        assert last[p] == values[-1]


def test_nested_divergence() -> None:
    out = torch.empty(20, dtype=torch.int32)
    with emulate():
        nested_kernel[(20,)](out, 12)
    expected = [
        sum(sum(j * (p + 1) for j in range(i, 12)) if i % 3 == p % 3 else -1 for i in range(p))
        for p in range(20)
    ]
    assert out.tolist() == expected


@pytest.mark.parametrize("n", [-1, 0, 7])
def test_negative_steps(n: int) -> None:
    out = torch.empty(2, dtype=torch.int32)
    with emulate():
        negative_step_kernel[(2,)](out, n)
    total, step = 0, 1
    for j in range(n, -1, -3):
        total, step = total * 7 + j * step, step + 1
    assert out.tolist() == [total] * 2


def test_early_return() -> None:
    out = torch.zeros(8)
    with emulate():
        early_return_kernel[(8,)](out, 5)
    assert out.tolist() == [2, 1, 2, 1, 2, 0, 0, 0]


def test_while_loops_end_program_by_program() -> None:
    x = torch.arange(1, 28, dtype=torch.int32)
    out = torch.empty_like(x)
    with emulate():
        collatz_kernel[(27,)](x, out)

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert out.tolist() == [steps(n) for n in range(1, 28)]


def test_calls_that_return_from_several_places() -> None:
    x = torch.rand(6)
    out = torch.empty_like(x)
    with emulate():
        call_kernel[(6,)](x, out)
    assert torch.allclose(out, x ** torch.arange(6))


def test_pointers_carried_through_a_divergent_loop() -> None:
    x, out = torch.randn(6, 4 * 16), torch.empty(4, 16)
    with emulate():
        pointer_loop_kernel[(4,)](x, out, 64, 6, 16)
    expected = torch.stack([x[: 6 - p, p * 16 : (p + 1) * 16].sum(0) for p in range(4)])
    assert torch.allclose(out, expected, atol=1e-6)


def test_branches_store_only_for_their_own_programs() -> None:
    x = torch.tensor([1.0, -1.0, 2.0, -3.0]).repeat_interleave(16)
    out = torch.zeros(128)
    with emulate():
        guarded_store_kernel[(4,)](x, out, 16)
    assert torch.equal(out[:64], torch.where(x > 0, 2 * x, 0))
    assert torch.equal(out[64:], torch.where(x > 0, 2 * x, -x))
