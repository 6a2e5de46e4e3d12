"""How a launch is laid out: what a kernel may assume of addresses, and the shape of its tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "ALIGNED",
    "ANY",
    "UNIT",
    "Tiles",
    "backward_tiles_for",
    "memory_layout",
    "padded_width",
    "tiles_for",
]

ANY, UNIT, ALIGNED = 0, 1, 2


def padded_width(width: int) -> int:
    """The power of two, at least 16, that holds a head of ``width``: what a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())


def memory_layout(*tensors: torch.Tensor) -> int:
    """How much a kernel may assume of these tensors' addresses: nothing (0), that the last axis is contiguous
    (1), or that besides every row starts at a multiple of 16 elements, so that loads may be vectors (2).

    One number in place of Triton's specialisation of each stride, which would compile a variant for every
    mixture.
    """
    if any(x.stride(-1) != 1 and x.shape[-1] != 1 for x in tensors):
        return ANY
    rows_aligned = all(stride % 16 == 0 for x in tensors for stride in x.stride()[:-1])
    bases_aligned = all(x.data_ptr() % 16 == 0 for x in tensors)
    return ALIGNED if rows_aligned and bases_aligned else UNIT


class Tiles(NamedTuple):
    """The shape of a launch: queries and keys a tile, warps a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles_for(
    dtype: torch.dtype, width: int, value_width: int, input_precision: str, *, scattered: bool = False
) -> Tiles:
    """The tile for inputs of ``dtype`` with D = ``width`` and E = ``value_width``.

    ``scattered`` says that a program holds an address for each element it loads: with a bias, and where rows
    of q, k or v are not aligned. It then takes half the keys and twice the warps. Exact float32 products run
    without matrix
    instructions on NVIDIA and are unrolled: small tiles. Measured with ``tests/kernels/test_compiled.py``: no
    register is spilled to memory up to a width of 128 on sm_80, sm_90, sm_100 and gfx942.
    """
    wide = max(padded_width(width), padded_width(value_width)) > 64
    exact = dtype == torch.float32 and input_precision == "ieee"
    block_n = 32 if wide or dtype == torch.float32 else 64
    return Tiles(
        block_m=32 if exact else 64,
        block_n=block_n // 2 if scattered else block_n,
        num_warps=8 if wide or scattered else 4,
        num_stages=1 if exact or scattered else 2,
    )


def backward_tiles_for(dtype: torch.dtype, width: int, value_width: int, input_precision: str) -> Tiles:
    """The tile of the backward kernels, for arguments as those of :func:`tiles_for`.

    A program of keys holds two tiles of inputs, two of accumulators and two of scores. Measured by compiling
    a backward pass of each dtype with :func:`attnproof.emulator.compile_launches`: no register is spilled up
    to a width of 128 on sm_80, sm_90, sm_100 and gfx942.
    """
    if max(padded_width(width), padded_width(value_width)) > 64:
        return Tiles(16, 32, num_warps=8, num_stages=1)
    exact = dtype == torch.float32 and input_precision == "ieee"
    return Tiles(16, 16, 8, 1) if exact else Tiles(32, 32, 8, 1)
