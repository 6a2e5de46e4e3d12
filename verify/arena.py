"""The shared buffer that a kernel's inputs live in, and what the judge knows about it.

The judge copies the *whole storage* of every tensor into one file of shared memory, each storage between two
guards of poison (0xFF bytes, which are NaN in every floating format), and keeps an image of what it wrote.
Tensors are then described by shape, strides and offset over their storage, so a stride of 0, a transpose, a
slice or an odd alignment reaches the kernel as it is, and two views of one storage still share it. After the
call the buffer is compared with the image: every changed byte is an input that was modified or a write out
of bounds.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from attnproof.outcomes import CallRequest, Mutation, Value
from attnproof.protocol import (
    DTYPES,
    Argument,
    Group,
    Plain,
    Segment,
    TensorRef,
    dtype_name,
)

__all__ = ["GUARD_BYTES", "POISON", "Packed", "mutations", "pack", "tensor_over", "tensors_of"]

GUARD_BYTES: Final = 16384
"""Poison on each side of a storage: a block of 64 rows of 128 float16 past an end stays inside it."""

POISON: Final = 0xFF
_ALIGNMENT: Final = 64
"""torch aligns CPU storages to 64 bytes; one that is not so aligned keeps its distance from the boundary."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A call's tensors as bytes and descriptions.

    Attributes:
        image: every byte of the shared buffer as the judge wrote it, guards included.
        segments: where the storages lie.
        arguments: positional arguments as they are sent.
        keywords: keyword arguments as they are sent.
        cotangents: cotangents as they are sent.
    """

    image: Bytes
    segments: tuple[Segment, ...]
    arguments: tuple[Argument, ...]
    keywords: dict[str, Argument]
    cotangents: tuple[Argument, ...]

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """Every tensor of the call, cotangents last."""
        return tensors_of((*self.arguments, *self.keywords.values(), *self.cotangents))


class _Layout:
    """Gives each distinct storage its place, in the order in which tensors name them."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.storages: list[Bytes] = []
        self._known: dict[tuple[int, int], int] = {}
        self._end = 0

    def place(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        size, address = storage.nbytes(), storage.data_ptr()
        key = (address, size)
        if size and key in self._known:
            return self._known[key]
        start = -(-(self._end + GUARD_BYTES) // _ALIGNMENT) * _ALIGNMENT + address % _ALIGNMENT
        self.segments.append(Segment(start, size))
        content = torch.empty(0, dtype=torch.uint8)
        content.set_(storage, 0, (size,), (1,))
        self.storages.append(content.numpy())
        self._known[key] = len(self.segments) - 1
        self._end = start + size + GUARD_BYTES
        return self._known[key]

    def image(self) -> Bytes:
        """Storages and poison; the size is a multiple of 64."""
        image = np.empty(-(-(self._end or 1) // _ALIGNMENT) * _ALIGNMENT, dtype=np.uint8)
        end = 0
        for segment, storage in zip(self.segments, self.storages, strict=True):
            image[end : segment.start] = POISON
            end = segment.start + segment.size
            image[segment.start : end] = storage
        image[end:] = POISON
        return image


def pack(request: CallRequest) -> Packed:
    """Lay out a call's tensors.

    Raises:
        TypeError: an argument that is neither a tensor nor a plain value nor a tuple of these.
        ValueError: a tensor that is no dense CPU tensor, or of a dtype that workers do not take, or a name in
            ``differentiate`` that no floating-point tensor has.
    """
    layout = _Layout()
    names = [*request.names, *(f"argument {i}" for i in range(len(request.names), len(request.arguments)))]
    packed = Packed(
        arguments=tuple(
            _describe(v, name, layout) for v, name in zip(request.arguments, names, strict=False)
        ),
        keywords={name: _describe(value, name, layout) for name, value in request.keywords.items()},
        cotangents=tuple(_describe(v, f"cotangent {i}", layout) for i, v in enumerate(request.cotangents)),
        image=layout.image(),
        segments=tuple(layout.segments),
    )
    floating = {ref.name for ref in packed.tensors if re.match(r"b?float|complex", ref.dtype)}
    for name in request.differentiate:
        if name not in floating:
            raise ValueError(
                f"differentiate names {name!r}; the floating-point tensors of the call are {floating}"
            )
    return packed


def _describe(value: Value, name: str, layout: _Layout) -> Argument:
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value, name, layout)
    if isinstance(value, tuple):
        return Group(tuple(_describe(item, f"{name}[{i}]", layout) for i, item in enumerate(value)))
    if value is None or isinstance(value, (bool, int, float, str)):
        return Plain(value)
    raise TypeError(
        f"{name} is a {type(value).__name__}: workers take tensors, None, bool, int, float, str, tuples"
    )


def _describe_tensor(tensor: torch.Tensor, name: str, layout: _Layout) -> TensorRef:
    dtype = dtype_name(tensor.dtype)
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or dtype is None:
        raise ValueError(
            f"{name} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}: the judge "
            f"hands over dense CPU tensors of {', '.join(DTYPES)}; the worker moves them to its device"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"{name} is a lazy conjugate or negative view: call resolve_conj() or resolve_neg() first"
        )
    shape, strides, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    return TensorRef(name, dtype, shape, strides, offset, layout.place(tensor))


def tensors_of(arguments: Sequence[Argument]) -> tuple[TensorRef, ...]:
    """The tensors among arguments, those in tuples included, in order."""
    found: list[TensorRef] = []
    for argument in arguments:
        if isinstance(argument, TensorRef):
            found.append(argument)
        elif isinstance(argument, Group):
            found.extend(tensors_of(argument.items))
    return tuple(found)


def tensor_over(
    buffer: bytearray | mmap.mmap | memoryview | Bytes, ref: TensorRef, segment: Segment
) -> torch.Tensor:
    """The tensor that a description gives over a buffer, without a copy.

    Its storage is exactly the segment, so torch itself refuses views that reach past it.
    """
    tensor = torch.empty(0, dtype=DTYPES[ref.dtype])
    if segment.size == 0:
        return tensor.new_empty(ref.shape).as_strided(ref.shape, ref.strides)
    whole: Any = torch.frombuffer(buffer, dtype=torch.uint8, count=segment.size, offset=segment.start)
    tensor.set_(whole.untyped_storage(), ref.offset, ref.shape, ref.strides)
    return tensor


def mutations(packed: Packed, shared: Bytes) -> tuple[Mutation, ...]:
    """Compare the shared buffer, as a call left it, with what was written into it.

    Args:
        packed: the call's own image.
        shared: at least as many bytes, from the start of the shared file.
    """
    image = packed.image
    shared = shared[: image.size]
    if np.array_equal(image.view(np.uint64), shared.view(np.uint64)):
        return ()
    left = shared.copy()
    changed = left != image
    found: list[Mutation] = []
    for number, segment in enumerate(packed.segments):
        refs = [ref for ref in packed.tensors if ref.segment == number]
        name = ", ".join(ref.name for ref in refs)
        inside = changed[segment.start : segment.start + segment.size]
        if inside.any():
            found.extend(_inside(packed, left, segment, refs, inside))
        found.extend(_guards(changed, packed.segments, number, name))
    return tuple(found)


def _inside(
    packed: Packed, left: Bytes, segment: Segment, refs: Sequence[TensorRef], inside: Bytes
) -> list[Mutation]:
    found: list[Mutation] = []
    unowned = inside.copy()
    for ref in refs:
        size = DTYPES[ref.dtype].itemsize
        elements = torch.from_numpy(np.add.reduceat(inside, np.arange(0, inside.size, size)) > 0)
        places = torch.as_strided(torch.arange(elements.numel()), ref.shape, ref.strides, ref.offset)
        hit = elements[places]
        owned = torch.zeros(elements.numel(), dtype=torch.bool)
        owned[places.reshape(-1)] = True
        unowned &= ~np.repeat(owned.numpy(), size)[: inside.size]
        if bool(hit.any()):
            index = tuple(hit.nonzero()[0].tolist())
            before = tensor_over(packed.image, ref, segment)[index].item()
            after = tensor_over(left, ref, segment)[index].item()
            found.append(Mutation("element", ref.name, index, int(hit.sum()), repr(before), repr(after)))
    if unowned.any():
        name = ", ".join(ref.name for ref in refs)
        found.append(Mutation("storage", name, (int(unowned.argmax()),), int(unowned.sum())))
    return found


def _guards(changed: Bytes, segments: Sequence[Segment], number: int, name: str) -> list[Mutation]:
    """The gap between two storages is divided in the middle: what was hit belongs to the nearer storage."""
    segment = segments[number]
    end = segment.start + segment.size
    low = (segments[number - 1].start + segments[number - 1].size + segment.start) // 2 if number else 0
    high = (end + segments[number + 1].start) // 2 if number + 1 < len(segments) else changed.size
    found: list[Mutation] = []
    before, after = changed[low : segment.start][::-1], changed[end:high]
    if before.any():
        found.append(Mutation("guard before", name, (int(before.argmax()),), int(before.sum())))
    if after.any():
        found.append(Mutation("guard after", name, (int(after.argmax()),), int(after.sum())))
    return found
