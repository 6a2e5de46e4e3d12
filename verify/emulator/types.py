"""Types of Triton's IR and the torch dtypes that hold their values.

Signless integers are held signed; the few operations that read them unsigned reinterpret the bits themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch

SCALARS: dict[str, torch.dtype] = {
    "i1": torch.bool,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "index": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "f8E4M3FN": torch.float8_e4m3fn,
    "f8E5M2": torch.float8_e5m2,
    "f8E4M3FNUZ": torch.float8_e4m3fnuz,
    "f8E5M2FNUZ": torch.float8_e5m2fnuz,
}

# torch has no kernels for float8 beyond copies, and none at all for gathers of it: memory is moved as
# integers of the same width and reinterpreted.
CARRIERS: dict[int, torch.dtype] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Triton's own names, as they stand in a kernel's signature.
SIGNATURE_SCALARS: dict[str, torch.dtype] = {
    "i1": torch.bool,
    "u1": torch.bool,
    **{f"{sign}{bits}": SCALARS[f"i{bits}"] for sign in "iu" for bits in (8, 16, 32, 64)},
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "f32": torch.float32,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Type:
    """An IR type: the element's name and, for tensors, the shape (`()` for a scalar)."""

    element: str
    shape: tuple[int, ...] = ()

    @property
    def is_pointer(self) -> bool:
        """Whether the elements are pointers."""
        return self.element.startswith("!tt.ptr<")

    @property
    def is_descriptor(self) -> bool:
        """Whether the value is a tensor descriptor."""
        return self.element.startswith("!tt.tensordesc<")

    @property
    def pointee(self) -> Type:
        """What a pointer (or descriptor) points to: a scalar, or a tensor for a descriptor."""
        return parse_type(_pointee_text(self.element))

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.element[0] in "fb"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the elements; pointers are 64-bit addresses.

        Raises KeyError for an element type that torch cannot hold (f8E4M3B11FNUZ, i4, …).
        """
        return torch.int64 if self.element.startswith("!") else SCALARS[self.element]

    @property
    def size(self) -> int:
        """Bytes of one element in memory (a boolean takes one)."""
        return self.dtype.itemsize

    @property
    def bits(self) -> int:
        """Width of an integer or float element."""
        return 1 if self.element == "i1" else 8 * self.size


_TENSOR = re.compile(r"tensor<((?:\d+x)*)(.*)>$")


def _pointee_text(element: str) -> str:
    inner = element[element.index("<") + 1 : element.rindex(">")]
    # `!tt.ptr<f16, 3>` carries an address space; a descriptor spells its block either way (`64x64xf16` in
    # newer releases, `tensor<64x64xf16>` in older ones).
    inner = re.sub(r",\s*(\d+|#\S+)$", "", inner)
    if re.match(r"\d+x", inner):
        inner = f"tensor<{inner}>"
    return inner


@lru_cache(maxsize=4096)
def parse_type(text: str) -> Type:
    """Read one type, such as `tensor<64x64x!tt.ptr<f16>>` or `i32`."""
    text = text.strip()
    tensor = _TENSOR.match(text)
    if tensor is None:
        return Type(text)
    shape = tuple(int(size) for size in tensor.group(1).split("x") if size)
    element = tensor.group(2)
    # A layout (`tensor<64xf32, #blocked>`) does not occur before TTGIR; drop it where it does.
    element = re.sub(r",\s*#[^>]*$", "", element)
    return Type(element, shape)
