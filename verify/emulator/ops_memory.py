"""Pointers, loads and stores."""

from __future__ import annotations

import torch
from torch import Tensor

from attnproof.emulator.access import load, resolve, store
from attnproof.emulator.lowering import Lowering, Run, prepares
from attnproof.emulator.machine import Context
from attnproof.emulator.memory import Site
from attnproof.emulator.races import note_store
from attnproof.emulator.syntax import Op
from attnproof.emulator.types import CARRIERS
from attnproof.emulator.values import Pointer, remembered


@prepares("tt.addptr")
def _addptr(op: Op, low: Lowering) -> Run:
    size = op.operand_types[0].pointee.size
    alignment = size & -size
    key = f"bytes{size}"

    def run(_: Context, pointer: Pointer, offset: Tensor) -> Pointer:
        return pointer.add(remembered(offset, key, lambda t: t.to(torch.int64) * size), alignment)

    return run


@prepares("tt.ptr_to_int")
def _ptr_to_int(op: Op, low: Lowering) -> Run:
    return lambda _, pointer: pointer.addresses()


@prepares("tt.int_to_ptr")
def _int_to_ptr(op: Op, low: Lowering) -> Run:
    return lambda _, address: Pointer((address.to(torch.int64),), 1)


def undefined(dtype: torch.dtype) -> Tensor:
    """What masked-out elements without `other` hold under `undefined_is_nan`: NaN, or a large odd integer."""
    if dtype.is_floating_point:
        return torch.tensor([float("nan")]).to(dtype)
    if dtype == torch.bool:
        return torch.ones(1, dtype=dtype)
    return torch.tensor([torch.iinfo(dtype).max // 3 * 2 + 1], dtype=dtype)


def _positive_zero(other: Tensor) -> bool:
    return float(other) == 0 and not bool(torch.signbit(other))


def _is_zero(other: Tensor) -> bool:
    return other.numel() == 1 and remembered(other, "zero", _positive_zero)


@prepares("tt.load", pure=False)
def _load(op: Op, low: Lowering) -> Run:
    kind = op.operand_types[0]
    dtype, size = kind.pointee.dtype, kind.pointee.size
    carrier = CARRIERS[size]
    dims = 1 + len(kind.shape)
    shape = torch.Size((1,) * dims)
    site = Site(op.name, op.location)
    poison = undefined(dtype).view(carrier).view(shape)

    def run(
        context: Context, pointer: Pointer, mask: Tensor | None = None, other: Tensor | None = None
    ) -> Tensor:
        accesses = resolve(context, pointer, mask, size, site)
        if other is not None:
            # Zero, by far the most common, is what a masked gather holds anyway.
            fill = None if _is_zero(other) else other.view(carrier)
        else:
            fill = poison if context.settings.undefined_is_nan else None
        value = load(accesses, fill, shape, carrier)
        return value if dtype == carrier else value.view(dtype)

    return run


@prepares("tt.store", pure=False)
def _store(op: Op, low: Lowering) -> Run:
    size = op.operand_types[0].pointee.size
    carrier = CARRIERS[size]
    site = Site(op.name, op.location)

    def run(context: Context, pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> tuple[()]:
        bits = value if value.dtype == carrier else value.view(carrier)
        for access in resolve(context, pointer, mask, size, site):
            if context.settings.races != "ignore":
                note_store(context, access, bits, site)
            store(access, bits)
        return ()

    return run
