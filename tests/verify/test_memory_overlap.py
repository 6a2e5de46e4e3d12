"""Shared memory between strided tensors, against a set of byte addresses."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from attnproof.memory_overlap import Extent, shared_kind

BUFFER = torch.zeros(512, dtype=torch.uint8)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A strided view of one buffer, of any itemsize, empty and broadcast ones included."""
    dtype = draw(st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.complex64]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    strides = [draw(st.integers(0, 6)) for _ in shape]
    last = sum(max(n - 1, 0) * stride for n, stride in zip(shape, strides, strict=True))
    offset = draw(st.integers(0, 512 // dtype.itemsize - 1 - last))
    return BUFFER.view(dtype).as_strided(shape, strides, offset)


def addresses(tensor: torch.Tensor) -> set[int]:
    """Every byte that an element occupies."""
    size = tensor.element_size()
    steps = [
        range(0, n * stride or n, stride) if stride else [0] * n
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    firsts = {tensor.data_ptr() + size * sum(place) for place in itertools.product(*steps)}
    return {first + byte for first in firsts for byte in range(size)}


@given(views(), views())
def test_shared_bytes_are_found_exactly(a: torch.Tensor, b: torch.Tensor) -> None:
    kind = shared_kind(Extent.of_tensor(a), Extent.of_tensor(b))
    if not a.numel() or not b.numel():
        assert kind is None
    else:
        assert kind == ("memory" if addresses(a) & addresses(b) else "storage")


def test_large_neighbours_share_the_storage_alone() -> None:
    whole = torch.zeros(1 << 22, dtype=torch.uint8)
    halves = [Extent.of_tensor(half) for half in whole.chunk(2)]
    assert shared_kind(*halves) == "storage"
    assert shared_kind(Extent.of_tensor(whole[1:]), halves[0]) == "memory"


def test_other_storages_share_nothing() -> None:
    assert shared_kind(Extent.of_tensor(torch.zeros(4)), Extent.of_tensor(torch.zeros(4))) is None
