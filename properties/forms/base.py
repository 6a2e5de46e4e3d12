"""What the forms share: arrays of any numbers, products of decays over segments, chunks, exact comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Array",
    "chunks",
    "difference",
    "each",
    "filled",
    "products_after",
    "products_up_to",
    "segments",
    "start",
]

Array = NDArray[Any]
"""Numbers of one kind: dtype object, or a float dtype."""


def filled(shape: tuple[int, ...], entries: Iterable[Any]) -> Array:
    """An object array of ``shape`` with ``entries`` in order of rows."""
    out = np.empty(shape, dtype=object)
    for index, entry in zip(np.ndindex(*shape), entries, strict=True):
        out[index] = entry
    return out


def each(f: Callable[[Any], Any], x: Array) -> Array:
    """f of every entry, as an object array."""
    return filled(x.shape, map(f, x.flat))


def chunks(length: int, chunk: int) -> Iterator[slice]:
    """0 … length − 1 in pieces of ``chunk``, the last one ragged.

    Raises:
        ValueError: chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} holds no position; give at least 1")
    for first in range(0, length, chunk):
        yield slice(first, min(first + chunk, length))


def start(state: Array | None, *shape: int, like: Array) -> Array:
    """``state``, or zeros of ``shape`` of the kind of numbers that ``like`` holds."""
    return np.zeros(shape, dtype=like.dtype) if state is None else state


def products_up_to(factors: Array) -> Array:
    """Π_{r ≤ i} of factors (C, W) at every i: the decay from before a chunk to a position in it."""
    return np.multiply.accumulate(factors, axis=0)


def products_after(factors: Array) -> Array:
    """Π_{r > i} of factors (C, W) at every i: the decay from a position to the chunk's end. No division."""
    after = np.ones_like(factors)
    after[:-1] = np.multiply.accumulate(factors[:0:-1], axis=0)[::-1]
    return after


def segments(factors: Array) -> Array:
    """Π_{j < r ≤ i} of factors (C, W) as (C, C, W), 0 where j > i. Right for factors of 0 too."""
    length = len(factors)
    table = np.zeros((length, *factors.shape), dtype=factors.dtype)
    for i in range(length):
        if i:
            table[i, :i] = table[i - 1, :i] * factors[i]
        table[i, i] = 1
    return table


def difference(x: Array, y: Array) -> Any:
    """The largest |x − y| over all elements, exact where the numbers are; 0 exactly where x equals y.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"shapes {x.shape} and {y.shape} cannot be compared; give arrays of one shape")
    return max((abs(a - b) for a, b in zip(x.flat, y.flat, strict=True)), default=0)
