"""Loads and stores: masks, layouts, faults, poison, races, and grids too large for one batch."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnproof.emulator import MemoryFault, RaceFault, emulate


@triton.jit
def copy_kernel(p_x, p_o, n_read, n_write, shift, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    b_x = tl.load(p_x + o + shift, mask=o < n_read, other=-1.0)
    tl.store(p_o + o, b_x, mask=o < n_write)


@triton.jit
def undefined_kernel(p_x, p_o, n, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_o + o, tl.load(p_x + o, mask=o < n))


@triton.jit
def tile_kernel(
    p_x, p_o, M, N, s_xm, s_xn, s_om, s_on, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr
):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    if TRANSPOSED:
        m = (o_m[None, :] < M) & (o_n[:, None] < N)
        b_x = tl.load(p_x + o_m[None, :] * s_xm + o_n[:, None] * s_xn, mask=m, other=0.0)
        tl.store(p_o + o_m[None, :] * s_om + o_n[:, None] * s_on, b_x, mask=m)
    else:
        m = (o_m[:, None] < M) & (o_n[None, :] < N)
        b_x = tl.load(p_x + o_m[:, None] * s_xm + o_n[None, :] * s_xn, mask=m, other=0.0)
        tl.store(p_o + o_m[:, None] * s_om + o_n[None, :] * s_on, b_x, mask=m)


@triton.jit
def indirect_kernel(p_x, p_index, p_o, stride, M: tl.constexpr, N: tl.constexpr):
    i_p = tl.program_id(0)
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    o_tile = o_m[:, None] * N + o_n[None, :]
    b_index = tl.load(p_index + o_tile)
    o_row = i_p * stride + o_m
    tl.store(p_o + i_p * M * N + o_tile, tl.load(p_x + o_row[:, None] + b_index))


@triton.jit
def choose_kernel(p_x, p_y, p_o, B: tl.constexpr):
    i_p = tl.program_id(0)
    o = tl.arange(0, B)
    p_in = tl.where(o % 3 == i_p, p_x + o, p_y + o)
    tl.store(p_o + i_p * B + o, tl.load(p_in))


@triton.jit
def misaligned_kernel(p_x, p_o):
    p_bytes = p_x.to(tl.pointer_type(tl.int8)) + tl.program_id(0)
    tl.store(p_o, tl.load(p_bytes.to(tl.pointer_type(tl.float32))))


@triton.jit
def same_place_kernel(p_o, SAME: tl.constexpr):
    i_p = tl.program_id(0)
    tl.store(p_o + i_p // 2, 1.0 if SAME else i_p.to(tl.float32))


@triton.jit
def boolean_kernel(p_x, p_o, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_o + o, tl.load(p_x + o) & (o > 3))


def copy(x: Tensor, out: Tensor, n_read: int, n_write: int, *, shift: int = 0, programs: int = 2) -> None:
    """16 elements a program."""
    with emulate():
        copy_kernel[(programs,)](x, out, n_read, n_write, shift, 16)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32], ids=str
)
def test_masked_loads_take_other(dtype: torch.dtype) -> None:
    x, out = torch.arange(20).to(dtype), torch.zeros(32, dtype=dtype)
    copy(x, out, 20, 32)
    assert torch.equal(out, torch.cat([x, torch.full((12,), -1, dtype=dtype)]))


def test_masked_stores_leave_the_rest() -> None:
    out = torch.full((32,), 7.0)
    copy(torch.arange(32.0), out, 32, 19)
    assert torch.equal(out, torch.cat([torch.arange(19.0), torch.full((13,), 7.0)]))


@pytest.mark.parametrize(("poisoned", "expected"), [(False, 0.0), (True, float("nan"))])
def test_masked_loads_without_other(poisoned: bool, expected: float) -> None:
    x, out = torch.ones(8), torch.empty(8)
    with emulate(undefined_is_nan=poisoned):
        undefined_kernel[(1,)](x, out, 5, 8)
    assert torch.equal(out[:5], torch.ones(5))
    assert torch.allclose(out[5:], torch.full((3,), expected), equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided", "odd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tiles_of_any_layout(layout: str, transposed: bool, dtype: torch.dtype) -> None:
    m, n = (37, 19) if layout == "odd" else (32, 32)
    big = torch.randn(2 * m, 2 * n).to(dtype)
    x = {
        "rows": big[:m, :n],
        "columns": big.t()[:n, :m].t(),
        "strided": big[::2, ::2],
        "odd": big[1 : m + 1, 1 : n + 1],
    }[layout]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with emulate():
        tile_kernel[(triton.cdiv(m, 16), triton.cdiv(n, 16))](
            x, out, m, n, *x.stride(), *out.stride(), 16, 16, transposed
        )
    assert torch.equal(out, x)


def test_pointers_into_several_tensors() -> None:
    x, y, out = torch.randn(16), torch.randn(16), torch.empty(3, 16)
    with emulate():
        choose_kernel[(3,)](x, y, out, 16)
    o = torch.arange(16)
    assert torch.equal(out, torch.stack([torch.where(o % 3 == p, x, y) for p in range(3)]))


def test_booleans() -> None:
    x = torch.rand(8) > 0.5
    out = torch.empty(8, dtype=torch.bool)
    with emulate():
        boolean_kernel[(1,)](x, out, 8)
    assert torch.equal(out, x & (torch.arange(8) > 3))


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (1, ["1 elements beyond the end", "offset 32"]),
        (5, ["offset 32", "32 elements of 4 bytes"]),
        (-3, ["offset -3", "3 elements before"]),
    ],
)
def test_load_out_of_bounds(shift: int, words: list[str]) -> None:
    with pytest.raises(MemoryFault) as error:
        copy(torch.zeros(32), torch.zeros(32), 32, 32, shift=shift)
    line = copy_kernel.fn.__code__.co_firstlineno + 3
    for word in ["copy_kernel", "tt.load", f"test_memory.py:{line}", "'p_x'", *words]:
        assert word in str(error.value)
    assert f"program ({0 if shift < 0 else 1}, 0, 0)" in str(error.value)


def test_store_out_of_bounds_names_the_tensor_it_missed() -> None:
    with pytest.raises(
        MemoryFault, match=r"tt.store.*program \(1, 0, 0\), element \(4,\): offset 20 of 'p_o', 1 elements"
    ):
        copy(torch.zeros(32), torch.zeros(20), 32, 32)


def test_masked_out_addresses_are_not_checked() -> None:
    out = torch.zeros(20)
    copy(torch.zeros(32), out, 32, 20)


def test_an_access_without_active_elements_touches_nothing() -> None:
    out = torch.zeros(32)
    copy(torch.zeros(32), out, 0, 32, shift=1 << 20)
    assert torch.equal(out, torch.full((32,), -1.0))


def test_rows_stored_at_any_distance() -> None:
    x = torch.randn(32, 32)
    padded = torch.zeros(32, 40)
    with emulate():
        tile_kernel[(2, 2)](x, padded, 32, 32, 32, 1, 40, 1, 16, 16, False)
    assert torch.equal(padded, torch.cat([x, torch.zeros(32, 8)], 1))


def test_offsets_that_vary_along_a_contiguous_axis_too() -> None:
    x = torch.randn(3 * 64 + 300)
    index = torch.randint(0, 200, (16, 8), dtype=torch.int32)
    out = torch.empty(3, 16, 8)
    with emulate():
        indirect_kernel[(3,)](x, index, out, 64, 16, 8)
    rows = torch.arange(16)[:, None] + index
    assert torch.equal(out, torch.stack([x[p * 64 + rows] for p in range(3)]))


def test_bounds_are_those_of_a_views_storage() -> None:
    base = torch.arange(64.0)
    out = torch.empty(32)
    copy(base[32:48], out, 32, 32)
    assert torch.equal(out, base[32:])
    with pytest.raises(MemoryFault, match="offset 16 of 'p_x', 1 elements beyond the end of its storage"):
        copy(base[48:], out, 32, 32)


def test_neighbouring_tensors_do_not_hide_a_fault() -> None:
    # In one storage each: however close the allocator put them, running out of the first is a fault.
    x, out = torch.zeros(16), torch.zeros(32)
    with pytest.raises(MemoryFault):
        copy(x, out, 32, 32)


def test_misaligned_access() -> None:
    out = torch.zeros(1)
    with emulate(), pytest.raises(MemoryFault, match="misaligned address: 1 bytes from the start of 'p_x'"):
        misaligned_kernel[(2,)](torch.zeros(4), out)


def test_empties_are_poisoned_inside_only() -> None:
    with emulate():
        fresh = [
            torch.empty(3),
            torch.empty_like(torch.ones(2, dtype=torch.bfloat16)),
            torch.ones(1).new_empty(4),
        ]
        fresh += [torch.empty_strided((2, 2), (1, 2)), torch.empty(2, dtype=torch.float8_e4m3fn).float()]
        whole = torch.empty(2, dtype=torch.int32)
        kept = torch.zeros(3)
    assert all(bool(x.isnan().all()) for x in fresh)
    assert (whole > 1_000_000).all()
    assert torch.equal(kept, torch.zeros(3))
    with emulate(poison=False):
        assert not torch.empty(1000).fill_(0).isnan().any()


def test_what_a_kernel_forgets_stays_nan() -> None:
    with emulate():
        out = torch.empty(32)
        copy_kernel[(2,)](torch.zeros(32), out, 32, 20, 0, 16)
    assert out.isnan().tolist() == [False] * 20 + [True] * 12


@pytest.mark.parametrize("races", ["raise", "warn", "ignore"])
def test_races(races: str) -> None:
    out = torch.zeros(4)
    with emulate(races=races), warnings.catch_warnings():
        warnings.simplefilter("error")
        same_place_kernel[(8,)](out, True)
        if races == "ignore":
            same_place_kernel[(8,)](out, False)
        else:
            with pytest.raises(
                RaceFault if races == "raise" else RuntimeWarning,
                match="different values to element 0 of 'p_o'",
            ):
                same_place_kernel[(8,)](out, False)


@triton.jit
def heavy_kernel(p_x, p_o, B: tl.constexpr):
    i_p = tl.program_id(0) + 3 * tl.program_id(1)
    o = tl.arange(0, B)
    b_x = tl.load(p_x + i_p * B + o)
    b_s = b_x[:, None] * b_x[None, :]
    for i in range(i_p % 4):
        b_s += tl.exp2(b_s * 0.01) * i
    tl.store(p_o + i_p * B + o, tl.sum(b_s, 1))


def test_results_do_not_depend_on_batching(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnproof.emulator import launch

    x = torch.randn(12, 32)
    results = []
    for size in (1, 10_000, 30_000, 1 << 30):
        monkeypatch.setattr(launch, "_BATCH_BYTES", size)
        out = torch.empty_like(x)
        with emulate():
            heavy_kernel[(3, 4)](x, out, 32)
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])
