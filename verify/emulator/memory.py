"""The memory that a launch may touch: the storages of its tensors, at virtual addresses far apart.

Every storage gets a virtual base of its own, 2^44 bytes from the next, so that no offset, however wrong,
reaches another tensor by accident: on the GPU such an access corrupts silently, here it is a `MemoryFault`.
Bounds are those of the storage, as for the hardware's own sanitizers: a view may reach around itself within
its storage.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnproof.emulator.errors import MemoryFault
from attnproof.emulator.machine import Context
from attnproof.emulator.types import CARRIERS
from attnproof.emulator.values import Pointer

SPACING_BITS = 44
# Real allocations are at least this aligned, so that virtual addresses keep the real ones' low bits.
_PAGE = 1 << 12


@dataclass(eq=False)
class Buffer:
    """One storage: virtual base, size in bytes, the arguments that live in it, flat views by width."""

    base: int
    nbytes: int
    storage: torch.UntypedStorage
    names: list[tuple[str, int]] = field(default_factory=list)
    views: dict[int, Tensor] = field(default_factory=dict)

    def flat(self, size: int) -> Tensor:
        """All whole elements of `size` bytes as integers."""
        if size not in self.views:
            view = torch.empty(0, dtype=CARRIERS[size])
            count = self.nbytes // size
            self.views[size] = view.set_(self.storage, 0, (count,), (1,))
        return self.views[size]


class AddressSpace:
    """Storages by virtual address. One is made for each launch."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.by_storage: dict[int, Buffer] = {}
        # For the race detector: the last writer of each element (program number + 1), by buffer and element
        # size.
        self.writers: dict[tuple[int, int], Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> Pointer:
        """Register a tensor argument's storage and return the pointer to its first element."""
        storage = tensor.untyped_storage()
        real = storage.data_ptr()
        buffer = self.by_storage.get(real) if real else None
        if buffer is None:
            base = ((len(self.buffers) + 1) << SPACING_BITS) + (1 << (SPACING_BITS - 1)) + real % _PAGE
            buffer = Buffer(base, storage.nbytes(), storage)
            self.buffers.append(buffer)
            self.by_storage[real] = buffer
        offset = int(tensor.storage_offset()) * tensor.element_size()
        buffer.names.append((name, offset))
        address = buffer.base + offset
        # Lowest set bit of the address, at most 16: what Triton itself specialises on.
        return Pointer((torch.tensor([address]),), min(address & -address, 16))

    def find(self, address: int) -> Buffer | None:
        """The buffer whose virtual range (not only its storage) holds the address."""
        index = (address >> SPACING_BITS) - 1
        return self.buffers[index] if 0 <= index < len(self.buffers) else None

    def owner(self, low: int, high: int, size: int) -> Buffer | None:
        """The buffer that holds all of the elements of `size` bytes from `low` to `high`, if one does."""
        buffer = self.find(low)
        if buffer is not None and low >= buffer.base and high + size <= buffer.base + buffer.nbytes:
            return buffer
        return None


@dataclass(frozen=True)
class Site:
    """Where in the source an access stands, for messages."""

    op: str
    location: str


def fault(context: Context, site: Site, addresses: Tensor, active: Tensor | None, size: int) -> MemoryFault:
    """Describe the first offending element of an access (`addresses`, `active`: one shape, `[P, …]`)."""
    memory = context.memory
    for flat in range(addresses.numel()):
        index = torch.unravel_index(torch.tensor(flat), addresses.shape)
        if active is not None and not bool(active[index]):
            continue
        address = int(addresses[index])
        if memory.owner(address, address, size) is None or address % size:
            break
    where = [int(i) for i in index]
    place = f"kernel {context.kernel}, {site.op} at {site.location}, program {context.coordinates(where[0])}"
    element = f", element {tuple(where[1:])}" if len(where) > 1 else ""
    buffer = memory.find(address)
    if buffer is None:
        why = f"address {address:#x} belongs to no tensor of this launch"
        if address < 1 << 16:
            why += " (a null pointer?)"
    else:
        name, start = min(
            buffer.names, key=lambda n: abs(buffer.base + n[1] - address) if len(buffer.names) > 1 else 0
        )
        offset = address - buffer.base - start
        if offset % size:
            why = f"misaligned address: {offset} bytes from the start of {name!r}, not a multiple of {size}"
        elif address < buffer.base:
            before = (buffer.base - address) // size
            why = f"offset {offset // size} of {name!r}, {before} elements before the start of its storage"
        else:
            held = buffer.nbytes // size
            beyond = (address - buffer.base) // size - held
            why = (
                f"offset {offset // size} of {name!r}, {beyond + 1} elements beyond the end of its storage "
                f"({held} elements of {size} bytes)"
            )
    return MemoryFault(f"{place}{element}: {why}")
