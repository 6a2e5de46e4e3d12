"""Atomic read-modify-write and compare-and-swap, one colliding element after another in program order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from attnproof.emulator.access import Access, resolve, spread
from attnproof.emulator.lowering import Lowering, Run, prepares
from attnproof.emulator.machine import Context
from attnproof.emulator.memory import Site
from attnproof.emulator.ops_arith import signless, unsigned
from attnproof.emulator.syntax import Op
from attnproof.emulator.types import CARRIERS
from attnproof.emulator.values import Pointer

Combine = Callable[[Tensor, Tensor], Tensor]

COMBINE: dict[str, Combine] = {
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "add": torch.add,
    "fadd": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "umax": lambda old, new: signless(np.maximum(unsigned(old), unsigned(new)), old.dtype),
    "umin": lambda old, new: signless(np.minimum(unsigned(old), unsigned(new)), old.dtype),
    "exch": lambda old, new: new,
}


def _rounds(index: Tensor) -> Iterator[Tensor]:
    """Positions in groups none of which names an address twice: by each element's rank among its equals."""
    if index.numel() < 2:
        yield torch.arange(index.numel())
        return
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    if bool(fresh.all()):
        yield order
        return
    place = torch.arange(ordered.numel())
    rank = place - torch.cummax(torch.where(fresh, place, 0), 0).values
    for r in range(int(rank.amax()) + 1):
        yield order[rank == r]


def apply(
    access: Access, shape: torch.Size, dtype: torch.dtype, change: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Update the active elements of an access and return what they held, over `shape` (zero where inactive).

    `change(old, positions)` gives the new values of the elements at `positions` of the flattened active ones.
    """
    flat = access.buffer.flat(access.size)
    place = torch.arange(shape.numel()).view(shape)
    index, places, _ = spread(access, place)
    assert places is not None
    before = torch.zeros(shape.numel(), dtype=flat.dtype)
    for positions in _rounds(index):
        where = index[positions]
        old = flat.index_select(0, where)
        before[places[positions]] = old
        flat.index_copy_(0, where, change(old.view(dtype), places[positions]).view(flat.dtype))
    return before.view(shape).view(dtype)


def _full_shape(context: Context, logical: tuple[int, ...]) -> torch.Size:
    # Every program takes part, also in an update that looks the same to all of them.
    return torch.Size((context.count, *logical))


def update(
    context: Context,
    pointer: Pointer,
    mask: Tensor | None,
    logical: tuple[int, ...],
    dtype: torch.dtype,
    site: Site,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Check and perform an atomic update over all programs of the context."""
    shape = _full_shape(context, logical)
    result = torch.zeros(shape, dtype=dtype)
    for access in resolve(context, pointer, mask, dtype.itemsize, site):
        old = apply(access, shape, dtype, change)
        result = old if access.mask is None else torch.where(access.mask, old, result)
    return result


@prepares("tt.atomic_rmw", pure=False)
def _atomic_rmw(op: Op, low: Lowering) -> Run:
    kind = op.operand_types[0]
    dtype = kind.pointee.dtype
    operation = op.attributes["words"].split()[0]
    if operation not in COMBINE:
        raise low.unsupported(op, f"unknown atomic operation {operation!r}")
    combine = COMBINE[operation]
    site = Site(op.name, op.location)

    def run(context: Context, pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> Tensor:
        values = value.expand(_full_shape(context, kind.shape)).reshape(-1)
        return update(
            context,
            pointer,
            mask,
            kind.shape,
            dtype,
            site,
            lambda old, places: combine(old, values[places]).to(dtype),
        )

    return run


@prepares("tt.atomic_cas", pure=False)
def _atomic_cas(op: Op, low: Lowering) -> Run:
    kind = op.operand_types[0]
    dtype, carrier = kind.pointee.dtype, CARRIERS[kind.pointee.size]
    site = Site(op.name, op.location)

    def run(context: Context, pointer: Pointer, expected: Tensor, value: Tensor) -> Tensor:
        shape = _full_shape(context, kind.shape)
        wanted = expected.expand(shape).reshape(-1).view(carrier)
        values = value.expand(shape).reshape(-1)

        def change(old: Tensor, places: Tensor) -> Tensor:
            # The hardware compares bits.
            return torch.where(old.view(carrier) == wanted[places], values[places], old)

        return update(context, pointer, None, kind.shape, dtype, site, change)

    return run


@prepares("tt.atomic_load", "tt.atomic_poll", pure=False)
def _atomic_load(op: Op, low: Lowering) -> Run:
    kind = op.operand_types[0]
    if op.name == "tt.atomic_poll":
        raise low.unsupported(op, "it waits for another program, and programs run in lock step")
    site = Site(op.name, op.location)

    def run(context: Context, pointer: Pointer, mask: Tensor | None = None) -> Tensor:
        return update(context, pointer, mask, kind.shape, kind.pointee.dtype, site, lambda old, _: old)

    return run


@prepares("tt.atomic_store", pure=False)
def _atomic_store(op: Op, low: Lowering) -> Run:
    kind = op.operand_types[0]
    site = Site(op.name, op.location)

    def run(context: Context, pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> tuple[()]:
        values = value.expand(_full_shape(context, kind.shape)).reshape(-1)
        update(context, pointer, mask, kind.shape, kind.pointee.dtype, site, lambda _, places: values[places])
        return ()

    return run
