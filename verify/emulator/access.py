"""Checked access to memory: addresses to storage indices, gathers, scatters, atomic updates.

A tile whose last-varying axis is contiguous in memory is read row by row (`index_select` on overlapping
windows copies whole rows: 8 µs for 32 tiles of 64x64 float16 where an element-wise gather takes 120),
anything else element by element.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnproof.emulator.machine import Context
from attnproof.emulator.memory import Buffer, Site, fault
from attnproof.emulator.values import Pointer, broadcast, common_shape, remembered


def _bounds(part: Tensor) -> tuple[int, int]:
    if part.numel() == 1:
        value = int(part)
        return value, value
    least, most = torch.aminmax(part)
    return int(least), int(most)


def _extreme(parts: tuple[Tensor, ...]) -> tuple[int, int]:
    low = high = 0
    for part in parts:
        least, most = remembered(part, "bounds", _bounds)
        low, high = low + least, high + most
    return low, high


@dataclass(frozen=True)
class Access:
    """A checked access: the buffer, and element indices as a part plus an optional contiguous axis.

    `index` is int64 over the lazy shape (length 1 along `axis`); along `axis` (-1: none) the indices continue
    by 1, `width` times. `mask` is None where all elements are active; where it is not, inactive ones have a
    valid index.
    """

    buffer: Buffer
    size: int
    index: Tensor
    axis: int
    width: int
    mask: Tensor | None


def resolve(context: Context, pointer: Pointer, mask: Tensor | None, size: int, site: Site) -> list[Access]:
    """Check an access of elements of `size` bytes: one entry for each tensor that it reaches.

    There is none where no element is active.

    Raises MemoryFault for the first active element outside every storage, or misaligned.
    """
    if mask is not None:
        if bool(mask.all()):
            mask = None
        elif not bool(mask.any()):
            return []
    parts = pointer.parts
    if pointer.alignment < size and _misaligned(parts, mask, size):
        raise fault(context, site, *_spread(pointer, mask), size)
    low, high = _extreme(parts)
    buffer = context.memory.owner(low, high, size)
    if buffer is None:
        if mask is None:
            return _scattered(context, pointer, None, size, site)
        separable = _mask_one_part(context, parts, mask, size)
        if separable is None:
            return _scattered(context, pointer, mask, size, site)
        parts, buffer = separable
    axis = _contiguous_axis(parts, mask, size)
    if axis is None:
        index = _index(parts, buffer, size)
        return [Access(buffer, size, index, -1, 1, mask)]
    position, along = axis
    rest = tuple(part for i, part in enumerate(parts) if i != position)
    start = parts[position].select(along, 0).unsqueeze(along)
    index = _index((*rest, start), buffer, size)
    return [Access(buffer, size, index, along, parts[position].shape[along], mask)]


def _index(parts: tuple[Tensor, ...], buffer: Buffer, size: int) -> Tensor:
    total = min(parts, key=torch.Tensor.numel) - buffer.base
    smallest = min(range(len(parts)), key=lambda i: parts[i].numel())
    for i, part in enumerate(parts):
        if i != smallest:
            total = total + part
    return total if size == 1 else total >> (size.bit_length() - 1)


def _spread(pointer: Pointer, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    addresses = pointer.addresses()
    if mask is None:
        return addresses, None
    addresses, mask = broadcast(addresses, mask)
    return addresses, mask


def _misaligned(parts: tuple[Tensor, ...], mask: Tensor | None, size: int) -> bool:
    addresses, active = _spread(Pointer(parts, 1), mask)
    wrong = (addresses & (size - 1)) != 0
    return bool((wrong if active is None else wrong & active).any())


def _mask_one_part(
    context: Context, parts: tuple[Tensor, ...], mask: Tensor, size: int
) -> tuple[tuple[Tensor, ...], Buffer] | None:
    """Make all addresses valid by changing masked-out entries of the one part that varies as the mask."""
    for i, part in enumerate(parts):
        if all(m in (1, p) for p, m in zip(part.shape, mask.shape, strict=True)):
            active = part.masked_select(mask)
            safe = torch.where(mask, part, active.amin())
            candidate = (*parts[:i], safe, *parts[i + 1 :])
            buffer = context.memory.owner(*_extreme(candidate), size)
            if buffer is not None:
                return candidate, buffer
    return None


def _scattered(
    context: Context, pointer: Pointer, mask: Tensor | None, size: int, site: Site
) -> list[Access]:
    addresses, active = _spread(pointer, mask)
    chosen = addresses if active is None else addresses[active]
    low, high = int(chosen.amin()), int(chosen.amax())
    buffer = context.memory.owner(low, high, size)
    if buffer is not None:
        if active is not None:
            addresses = torch.where(active, addresses, low)
        return [Access(buffer, size, _index((addresses,), buffer, size), -1, 1, active)]
    # One access may reach several tensors (pointers chosen by `where`): it is valid tensor by tensor.
    accesses = []
    remaining = torch.ones_like(addresses, dtype=torch.bool) if active is None else active
    for buffer in context.memory.buffers:
        inside = (addresses >= buffer.base) & (addresses <= buffer.base + buffer.nbytes - size) & remaining
        if bool(inside.any()):
            remaining = remaining & ~inside
            index = _index((torch.where(inside, addresses, buffer.base),), buffer, size)
            accesses.append(Access(buffer, size, index, -1, 1, inside))
    if bool(remaining.any()):
        raise fault(context, site, addresses, active, size)
    return accesses


def _contiguous_axis(parts: tuple[Tensor, ...], mask: Tensor | None, size: int) -> tuple[int, int] | None:
    """(part, axis) such that the part alone varies along the axis, by one element, and the mask does not."""
    for position, part in enumerate(parts):
        long = [axis for axis in range(1, part.dim()) if part.shape[axis] > 1]
        if not long:
            continue
        axis = long[-1] if len(long) == 1 else _innermost_step(part, long, size)
        if axis is None or (mask is not None and mask.shape[axis] > 1):
            continue
        if any(other.shape[axis] > 1 for i, other in enumerate(parts) if i != position):
            continue
        if remembered(part, f"steps{axis}by{size}", partial(_steps_by, axis=axis, size=size)):
            return position, axis
    return None


def _innermost_step(part: Tensor, long: list[int], size: int) -> int | None:
    """The axis of a part with several along which neighbours in its first row differ by one element."""
    for axis in reversed(long):
        row = part[tuple(slice(None) if i == axis else 0 for i in range(part.dim()))]
        if int(row[1] - row[0]) == size:
            return axis
    return None


def _steps_by(part: Tensor, axis: int, size: int) -> bool:
    length = part.shape[axis]
    return bool((part.narrow(axis, 1, length - 1) - part.narrow(axis, 0, length - 1) == size).all())


def gather(access: Access) -> Tensor:
    """Read the elements as integers, in the lazy shape of the access."""
    flat, index = access.buffer.flat(access.size), access.index
    if access.axis < 0:
        return flat.index_select(0, index.reshape(-1)).view(index.shape)
    windows = flat.as_strided((flat.shape[0] - access.width + 1, access.width), (1, 1))
    rows = windows.index_select(0, index.reshape(-1))
    outer = index.shape[: access.axis] + index.shape[access.axis + 1 :]
    tile = rows.view(*outer, access.width)
    return tile if access.axis == index.dim() - 1 else tile.movedim(-1, access.axis)


def load(accesses: list[Access], other: Tensor | None, shape: torch.Size, carrier: torch.dtype) -> Tensor:
    """The elements that the accesses read, as integers; masked-out ones are `other`'s (zero where None)."""
    if not accesses:
        return torch.zeros((1,) * len(shape), dtype=carrier) if other is None else other
    result = other
    for access in accesses:
        values = gather(access)
        if access.mask is None:
            return values
        if result is None:
            # The gather is fresh memory: zeroing it in place saves a pass.
            if _covers(values.shape, access.mask.shape):
                result = values.masked_fill_(~access.mask, 0)
                continue
            result = torch.zeros((1,) * len(shape), dtype=carrier)
        result = torch.where(access.mask, values, result)
    assert result is not None
    return result


def _covers(shape: torch.Size, mask: torch.Size) -> bool:
    return all(m in (1, n) for n, m in zip(shape, mask, strict=True))


def spread(access: Access, value: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Active elements of an access, flat and in program order: index, value (or None), program position."""
    index = access.index
    if access.axis >= 0:
        run = torch.arange(access.width)
        index = index + run.view([-1 if i == access.axis else 1 for i in range(index.dim())])
    others = [t for t in (value, access.mask) if t is not None]
    shape = common_shape(index.shape, *(t.shape for t in others))
    index = index.expand(shape)
    position = torch.arange(shape[0]).view(-1, *(1 for _ in shape[1:])).expand(shape)
    if value is not None:
        value = value.expand(shape)
    if access.mask is None:
        return index.reshape(-1), None if value is None else value.reshape(-1), position.reshape(-1)
    active = access.mask.expand(shape)
    return index[active], None if value is None else value[active], position[active]


def store(access: Access, value: Tensor) -> None:
    """Write integers to the elements of the access; where programs collide, the last one wins."""
    flat = access.buffer.flat(access.size)
    if access.axis >= 0 and _store_rows(access, flat, value):
        return
    index, values, _ = spread(access, value)
    assert values is not None
    flat.scatter_(0, index, values)


def _store_rows(access: Access, flat: Tensor, value: Tensor) -> bool:
    """Whole rows at once, where all of them start at the same phase of their width."""
    axis, width = access.axis, access.width
    run = [width if i == axis else n for i, n in enumerate(access.index.shape)]
    shape = common_shape(run, value.shape, *([access.mask.shape] if access.mask is not None else []))
    starts = access.index.expand([1 if i == axis else n for i, n in enumerate(shape)])
    rows = value.expand(shape).movedim(axis, -1)
    if access.mask is None:
        flat_starts, rows = starts.reshape(-1), rows.reshape(-1, width)
    else:
        active = access.mask.expand(starts.shape)
        flat_starts, rows = starts[active], rows[active.squeeze(axis)]
    phase = int(flat_starts[0]) % width
    if bool(((flat_starts - phase) % width).any()):
        return False
    count = (flat.shape[0] - phase) // width
    table = flat[phase : phase + count * width].view(count, width)
    table.index_copy_(0, (flat_starts - phase) // width, rows)
    return True
