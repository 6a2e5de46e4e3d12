"""Run-time values: torch tensors with a leading program axis, and pointers kept as sums.

Shapes are lazy. A value of IR type `tensor<64x32xf32>` is a torch tensor of shape `[P | 1, 64 | 1, 32 | 1]`:
an axis along which it does not vary may have length 1, the leading one first of all (a value that does not
depend on the program). A scalar is `[P | 1]`. Splats and broadcasts are therefore free, and masks and offsets
stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def remembered(tensor: Tensor, key: str, compute: Callable[[Tensor], T]) -> T:
    """A fact about a tensor, kept with it: constants and loop invariants are asked the same again and again.

    Run-time values are never written in place, so that what was true of one stays true.
    """
    known = tensor.__dict__
    if key not in known:
        known[key] = compute(tensor)
    fact: T = known[key]
    return fact


class Pointer:
    """Addresses as a sum of int64 parts (bytes, in the launch's virtual addresses) that broadcast together.

    Keeping `row * stride` and `column` apart shows which axis of a tile is contiguous in memory, and lets
    bounds be checked on the parts. `alignment` divides every address, as far as the arithmetic alone shows.
    """

    __slots__ = ("alignment", "parts")

    def __init__(self, parts: tuple[Tensor, ...], alignment: int) -> None:
        self.parts = parts
        self.alignment = alignment

    def add(self, offset: Tensor, alignment: int) -> Pointer:
        """Move by `offset` bytes (int64), all of them multiples of `alignment`."""
        best = -1
        for i, part in enumerate(self.parts):
            # Summing parts is free where it does not make either of them larger.
            size = _broadcast_numel(part, offset)
            if size == max(part.numel(), offset.numel()) and (best < 0 or size < self.parts[best].numel()):
                best = i
        if best < 0:
            parts = (*self.parts, offset)
        else:
            parts = (*self.parts[:best], self.parts[best] + offset, *self.parts[best + 1 :])
        return Pointer(parts, min(self.alignment, alignment))

    def map(self, f: Callable[[Tensor], Tensor]) -> Pointer:
        """Apply a shape operation to every part."""
        return Pointer(tuple(f(part) for part in self.parts), self.alignment)

    def addresses(self) -> Tensor:
        """The sum, int64, broadcast over the parts."""
        total = self.parts[0]
        for part in self.parts[1:]:
            total = total + part
        return total


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor: base address, shape and strides in elements (each `[P | 1]`), padding."""

    base: Pointer
    shape: tuple[Tensor, ...]
    strides: tuple[Tensor, ...]
    block: tuple[int, ...]
    pad_with_nan: bool = False

    def map(self, f: Callable[[Tensor], Tensor]) -> Descriptor:
        """Apply an operation on the program axis to every field."""
        shape, strides = tuple(map(f, self.shape)), tuple(map(f, self.strides))
        return Descriptor(self.base.map(f), shape, strides, self.block, self.pad_with_nan)


Value: TypeAlias = Tensor | Pointer | Descriptor


def _broadcast_numel(a: Tensor, b: Tensor) -> int:
    numel = 1
    for x, y in zip(a.shape, b.shape, strict=True):
        numel *= max(x, y)
    return numel


def common_shape(*shapes: Sequence[int]) -> torch.Size:
    """The shape to which all of these, of one rank, broadcast (torch's own is 50 times slower)."""
    return torch.Size(max(axis) for axis in zip(*shapes, strict=True))


def broadcast(*tensors: Tensor) -> list[Tensor]:
    """The tensors over their common shape, as views."""
    shape = common_shape(*(tensor.shape for tensor in tensors))
    return [tensor.expand(shape) for tensor in tensors]


def map_tensors(value: Value, f: Callable[[Tensor], Tensor]) -> Value:
    """Apply `f` to the tensor, or to every tensor of a pointer or descriptor."""
    return f(value) if isinstance(value, Tensor) else value.map(f)


def full(value: Value, shape: tuple[int, ...]) -> Tensor:
    """The value with every logical axis at full length (the program axis stays as it is); a view."""
    tensor = value.addresses() if isinstance(value, Pointer) else value
    assert isinstance(tensor, Tensor)
    return tensor if tensor.shape[1:] == shape else tensor.expand(tensor.shape[0], *shape)


def take_programs(value: Value, index: Tensor) -> Value:
    """The value as seen by the programs at `index` (positions along the program axis)."""
    return map_tensors(value, lambda t: t if t.shape[0] == 1 else t.index_select(0, index))


def first_programs(value: Value, count: int) -> Value:
    """The value as seen by the first `count` programs, a view."""
    return map_tensors(value, lambda t: t if t.shape[0] == 1 else t[:count])


def last_programs(value: Value, start: int) -> Value:
    """The value as seen by the programs from position `start` on, a view."""
    return map_tensors(value, lambda t: t if t.shape[0] == 1 else t[start:])


def join_programs(values: list[Value], counts: list[int], order: Tensor | None) -> Value:
    """Put pieces of a value, computed for disjoint groups of programs, together along the program axis.

    `order[i]` is the position in the concatenation of program `i`; None where the pieces are in order
    already.
    """
    first = values[0]
    if len(values) == 1:
        return first if order is None else take_programs(first, order)
    if isinstance(first, Pointer):
        alignment = min(v.alignment for v in values if isinstance(v, Pointer))
        sums = [v.addresses() for v in values if isinstance(v, Pointer)]
        return Pointer((_join(sums, counts, order),), alignment)
    if isinstance(first, Descriptor):
        pieces = [v for v in values if isinstance(v, Descriptor)]
        base = join_programs([v.base for v in pieces], counts, order)
        assert isinstance(base, Pointer)
        shape = tuple(
            _join(list(column), counts, order) for column in zip(*(v.shape for v in pieces), strict=True)
        )
        strides = tuple(
            _join(list(column), counts, order) for column in zip(*(v.strides for v in pieces), strict=True)
        )
        return Descriptor(base, shape, strides, first.block, first.pad_with_nan)
    return _join([v for v in values if isinstance(v, Tensor)], counts, order)


def _join(values: list[Tensor], counts: list[int], order: Tensor | None) -> Tensor:
    if all(v is values[0] for v in values) and values[0].shape[0] == 1:
        return values[0]
    trailing = common_shape(*(v.shape[1:] for v in values))
    joined = torch.cat([v.expand(count, *trailing) for v, count in zip(values, counts, strict=True)])
    return joined if order is None else joined.index_select(0, order)
