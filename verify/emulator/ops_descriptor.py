"""Tensor descriptors: blocks addressed by coordinates, with bounds of their own (outside is zero or NaN)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnproof.emulator.access import load, resolve, store
from attnproof.emulator.lowering import Lowering, Run, prepares
from attnproof.emulator.machine import Context
from attnproof.emulator.memory import Site
from attnproof.emulator.ops_atomic import COMBINE, update
from attnproof.emulator.races import note_store
from attnproof.emulator.syntax import Op
from attnproof.emulator.types import CARRIERS, Type
from attnproof.emulator.values import Descriptor, Pointer, full


def block_type(kind: Type) -> Type:
    """The block of a descriptor type, printed in full or as `<32x32xf32>`."""
    element = kind.element if kind.element.startswith("!") else f"!tt.tensordesc{kind.element}"
    return Type(element).pointee


@prepares("tt.make_tensor_descriptor")
def _make(op: Op, low: Lowering) -> Run:
    rank = (len(op.operands) - 1) // 2
    block = block_type(op.result_types[0]).shape
    pad = "nan" in f"{op.attributes.get('padding', '')} {op.attributes['words']}".lower()

    def run(_: Context, base: Pointer, *sizes: Tensor) -> Descriptor:
        return Descriptor(base, tuple(sizes[:rank]), tuple(sizes[rank:]), block, pad)

    return run


def _column(value: Tensor, rank: int) -> Tensor:
    return value.to(torch.int64).view(-1, *(1,) * rank)


def addresses(
    descriptor: Descriptor, coordinates: Sequence[Tensor], size: int, shape: tuple[int, ...]
) -> tuple[Pointer, Tensor]:
    """Pointers to the elements of a block, and which of them lie inside the tensor.

    `coordinates` has one index tensor per axis of the descriptor, each lazily shaped like the block plus a
    program axis.
    """
    rank = len(shape)
    pointer = descriptor.base.map(lambda t: t.view(-1, *(1,) * rank))
    inside: Tensor | None = None
    for coordinate, length, stride in zip(coordinates, descriptor.shape, descriptor.strides, strict=True):
        index = coordinate.to(torch.int64)
        pointer = pointer.add(index * _column(stride, rank) * size, size)
        valid = (index >= 0) & (index < _column(length, rank))
        inside = valid if inside is None else inside & valid
    assert inside is not None
    return pointer, inside


def _tile(origins: Sequence[Tensor], block: tuple[int, ...], shape: tuple[int, ...]) -> list[Tensor]:
    """Coordinates of a block at `origins`, lazily shaped like `shape` (no leading axes of length one)."""
    rank, dropped = len(shape), len(block) - len(shape)
    coordinates = []
    for axis, (origin, length) in enumerate(zip(origins, block, strict=True)):
        run = torch.arange(length)
        if axis >= dropped:
            run = run.view([-1 if i == axis - dropped else 1 for i in range(rank)])
        else:
            run = run.view([1] * rank)
        coordinates.append(_column(origin, rank) + run.unsqueeze(0))
    return coordinates


def _fill(pad_with_nan: bool, dtype: torch.dtype) -> Tensor | None:
    if not (pad_with_nan and dtype.is_floating_point):
        return None
    return torch.tensor([float("nan")]).to(dtype)


@prepares("tt.descriptor_load", pure=False)
def _load(op: Op, low: Lowering) -> Run:
    block = block_type(op.operand_types[0])
    result = op.result_types[0]
    site = Site(op.name, op.location)
    carrier = CARRIERS[block.size]
    ones = torch.Size((1,) * (1 + len(result.shape)))

    def run(context: Context, descriptor: Descriptor, *origins: Tensor) -> Tensor:
        tile = _tile(origins, _aligned(block.shape, result.shape), result.shape)
        pointer, inside = addresses(descriptor, tile, block.size, result.shape)
        fill = _fill(descriptor.pad_with_nan, block.dtype)
        other = None if fill is None else fill.view(carrier).view(ones)
        value = load(resolve(context, pointer, inside, block.size, site), other, ones, carrier)
        return value.view(block.dtype)

    return run


def _aligned(block: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The block's lengths; a rank-reducing load drops axes of length one, which must lead."""
    if tuple(n for n in block if n != 1) != tuple(n for n in shape if n != 1):
        raise ValueError(f"a descriptor block of shape {block} is loaded as {shape}")
    return (*(1,) * (len(block) - len(shape)), *shape)


@prepares("tt.descriptor_store", pure=False)
def _store(op: Op, low: Lowering) -> Run:
    block, kind = block_type(op.operand_types[0]), op.operand_types[1]
    site = Site(op.name, op.location)
    carrier = CARRIERS[block.size]

    def run(context: Context, descriptor: Descriptor, *rest: Tensor) -> tuple[()]:
        *origins, value = rest
        tile = _tile(origins, _aligned(block.shape, kind.shape), kind.shape)
        pointer, inside = addresses(descriptor, tile, block.size, kind.shape)
        bits = value.view(carrier)
        for access in resolve(context, pointer, inside, block.size, site):
            if context.settings.races != "ignore":
                note_store(context, access, bits, site)
            store(access, bits)
        return ()

    return run


@prepares("tt.descriptor_reduce", pure=False)
def _reduce(op: Op, low: Lowering) -> Run:
    block, kind = block_type(op.operand_types[0]), op.operand_types[1]
    site = Site(op.name, op.location)
    combine = COMBINE[op.attributes["words"].split()[0]]

    def run(context: Context, descriptor: Descriptor, *rest: Tensor) -> tuple[()]:
        *origins, value = rest
        tile = _tile(origins, _aligned(block.shape, kind.shape), kind.shape)
        pointer, inside = addresses(descriptor, tile, block.size, kind.shape)
        values = value.expand(context.count, *kind.shape).reshape(-1)

        def change(old: Tensor, places: Tensor) -> Tensor:
            return combine(old, values[places]).to(old.dtype)

        update(context, pointer, inside, kind.shape, block.dtype, site, change)
        return ()

    return run


def _rows(rows: Tensor, column: Tensor, width: int) -> list[Any]:
    """Coordinates of a gather or scatter: row `i` of the block is row `rows[i]` of the tensor."""
    return [rows.unsqueeze(-1), _column(column, 2) + torch.arange(width).view(1, 1, -1)]


@prepares("tt.descriptor_gather", pure=False)
def _gather(op: Op, low: Lowering) -> Run:
    block, result = block_type(op.operand_types[0]), op.result_types[0]
    site = Site(op.name, op.location)
    carrier = CARRIERS[block.size]

    def run(context: Context, descriptor: Descriptor, rows: Tensor, column: Tensor) -> Tensor:
        tile = _rows(full(rows, result.shape[:1]), column, result.shape[1])
        pointer, inside = addresses(descriptor, tile, block.size, result.shape)
        accesses = resolve(context, pointer, inside, block.size, site)
        return load(accesses, None, torch.Size((1, 1, 1)), carrier).view(block.dtype)

    return run


@prepares("tt.descriptor_scatter", pure=False)
def _scatter(op: Op, low: Lowering) -> Run:
    block, kind = block_type(op.operand_types[0]), op.operand_types[-1]
    site = Site(op.name, op.location)

    def run(
        context: Context, descriptor: Descriptor, rows: Tensor, column: Tensor, value: Tensor
    ) -> tuple[()]:
        tile = _rows(full(rows, kind.shape[:1]), column, kind.shape[1])
        pointer, inside = addresses(descriptor, tile, block.size, kind.shape)
        for access in resolve(context, pointer, inside, block.size, site):
            store(access, value.view(CARRIERS[block.size]))
        return ()

    return run
