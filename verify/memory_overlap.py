"""Whether two tensors share memory, exactly where that is affordable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from attnproof.protocol import DTYPES, TensorRef

__all__ = ["Extent", "shared_kind"]

_EXACT_BELOW: Final = 1 << 20
"""Elements up to which interleaved views are compared address by address (8 MB of addresses, about 20 ms)."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a strided tensor lies.

    Attributes:
        address: of its first element, in bytes.
        shape: of the tensor.
        strides: in elements, never negative.
        itemsize: bytes of an element.
        storage: first and last address of its allocation, the last one excluded.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    storage: tuple[int, int]

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> Extent:
        """Where a dense tensor lies."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        return cls(
            tensor.data_ptr(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.element_size(),
            (start, start + storage.nbytes()),
        )

    @classmethod
    def of_reference(cls, ref: TensorRef, segment: int) -> Extent:
        """Where a described tensor lies if its segment begins at this address; its storage is itself."""
        itemsize = DTYPES[ref.dtype].itemsize
        own = cls(segment + ref.offset * itemsize, ref.shape, ref.strides, itemsize, (0, 0))
        return cls(own.address, ref.shape, ref.strides, itemsize, (own.address, own.end))

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last byte that an element occupies."""
        if not self.size:
            return self.address
        last = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        return self.address + (last + 1) * self.itemsize

    def _granules(self, width: int) -> npt.NDArray[np.int64]:
        """Every address occupied, in steps of ``width`` bytes, which divides the element size."""
        addresses = np.arange(0, self.itemsize, width, dtype=np.int64) + self.address
        for length, stride in zip(self.shape, self.strides, strict=True):
            steps = np.arange(length if stride else 1, dtype=np.int64) * (stride * self.itemsize)
            addresses = (addresses[:, None] + steps).reshape(-1)
        return addresses


def shared_kind(a: Extent, b: Extent) -> Literal["memory", "storage"] | None:
    """What two tensors share: a byte of memory, only the storage, or nothing.

    Interleaved views of more than about a million elements count as sharing memory when their ranges overlap.
    """
    if not a.size or not b.size:
        return None
    if a.address < b.end and b.address < a.end:
        width = math.gcd(a.itemsize, b.itemsize, abs(a.address - b.address) or a.itemsize)
        if max(a.size, b.size) > _EXACT_BELOW or np.intersect1d(a._granules(width), b._granules(width)).size:
            return "memory"
        return "storage"
    return "storage" if a.storage[0] < b.storage[1] and b.storage[0] < a.storage[1] else None
