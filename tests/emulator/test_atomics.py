"""Atomic operations: colliding programs are served one after another."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from attnproof.emulator import MemoryFault, emulate


@triton.jit
def rmw_kernel(p_x, p_o, p_old, OP: tl.constexpr, B: tl.constexpr):
    i_p = tl.program_id(0)
    o = tl.arange(0, B)
    b_x = tl.load(p_x + i_p * B + o)
    if OP == "add":
        old = tl.atomic_add(p_o + o, b_x, mask=o != 3)
    elif OP == "max":
        old = tl.atomic_max(p_o + o, b_x, mask=o != 3)
    elif OP == "min":
        old = tl.atomic_min(p_o + o, b_x, mask=o != 3)
    elif OP == "xchg":
        old = tl.atomic_xchg(p_o + o, b_x, mask=o != 3)
    elif OP == "and":
        old = tl.atomic_and(p_o + o, b_x, mask=o != 3)
    elif OP == "or":
        old = tl.atomic_or(p_o + o, b_x, mask=o != 3)
    elif OP == "xor":
        old = tl.atomic_xor(p_o + o, b_x, mask=o != 3)
    tl.store(p_old + i_p * B + o, old)


@triton.jit
def ticket_kernel(p_counter, p_o):
    ticket = tl.atomic_add(p_counter, 1)
    tl.store(p_o + ticket, tl.program_id(0))


@triton.jit
def cas_kernel(p_lock, p_o):
    i_p = tl.program_id(0)
    old = tl.atomic_cas(p_lock, 0, i_p + 1)
    tl.store(p_o + i_p, old)


@triton.jit
def same_element_kernel(p_o, B: tl.constexpr):
    tl.atomic_add(p_o + tl.arange(0, B) * 0, tl.full([B], 1.0, tl.float32))


@pytest.mark.parametrize("op", ["add", "max", "min", "xchg", "and", "or", "xor"])
def test_integer_operations(op: str) -> None:
    x = torch.randint(-100, 100, (5, 8), dtype=torch.int32)
    out, old = torch.full((8,), 5, dtype=torch.int32), torch.empty(5, 8, dtype=torch.int32)
    with emulate():
        rmw_kernel[(5,)](x, out, old, op, 8)
    f = {
        "add": torch.add, "max": torch.maximum, "min": torch.minimum, "xchg": lambda _, b: b,
        "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor,
    }[op]  # fmt: skip
    state = torch.full((8,), 5, dtype=torch.int32)
    kept = torch.arange(8) != 3
    for p in range(5):
        assert torch.equal(old[p][kept], state[kept])
        state = torch.where(kept, f(state, x[p]), state)
    assert torch.equal(out, state)


@pytest.mark.parametrize("op", ["add", "max", "min"])
def test_float_operations(op: str) -> None:
    x, out, old = torch.randn(6, 8), torch.zeros(8), torch.empty(6, 8)
    with emulate():
        rmw_kernel[(6,)](x, out, old, op, 8)
    whole = torch.cat([torch.zeros(1, 8), x])
    expected = {"add": whole.sum(0), "max": whole.amax(0), "min": whole.amin(0)}[op]
    expected[3] = 0
    assert torch.allclose(out, expected, atol=1e-6)


def test_float16_additions_round_each_time() -> None:
    x = torch.full((8, 8), 1.0, dtype=torch.float16)
    out, old = torch.full((8,), 2048.0, dtype=torch.float16), torch.empty(8, 8, dtype=torch.float16)
    with emulate():
        rmw_kernel[(8,)](x, out, old, "add", 8)
    # 2048 + 1 rounds back to 2048, eight times over.
    assert (out == 2048).all()


def test_every_program_gets_its_own_ticket() -> None:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.full((16,), -1, dtype=torch.int32)
    with emulate():
        ticket_kernel[(16,)](counter, out)
    assert counter.item() == 16
    assert sorted(out.tolist()) == list(range(16))


def test_one_program_wins_a_swap() -> None:
    lock, out = torch.zeros(1, dtype=torch.int32), torch.empty(5, dtype=torch.int32)
    with emulate():
        cas_kernel[(5,)](lock, out)
    assert lock.item() == 1
    assert out.tolist() == [0, 1, 1, 1, 1]


def test_collisions_within_one_program() -> None:
    out = torch.zeros(1)
    with emulate():
        same_element_kernel[(3,)](out, 16)
    assert out.item() == 48


def test_faults() -> None:
    with emulate(), pytest.raises(MemoryFault, match=r"tt\.atomic_rmw"):
        rmw_kernel[(1,)](torch.zeros(8), torch.zeros(7), torch.zeros(8), "add", 8)
