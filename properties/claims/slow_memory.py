"""Attention run tile by tile on an off-chip memory that counts the numbers read and written.

FlashAttention's Algorithm 1 (arXiv 2205.14135), standard attention, and standard attention in square tiles;
with the formulas of their counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from attnproof.properties.claims.flash_attention import block_sizes
from attnproof.properties.claims.small_formats import Floats

__all__ = [
    "Memory",
    "flash",
    "flash_traffic",
    "side",
    "standard",
    "standard_in_tiles",
    "standard_traffic",
    "tiled_traffic",
]


@dataclass
class Memory:
    """Off-chip memory: arrays by name, and how many numbers were read from each and written to each."""

    arrays: dict[str, Floats]
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """Numbers read and written."""
        return sum(self.read.values()) + sum(self.written.values())

    def load(self, name: str, *place: slice) -> Floats:
        """A copy of a tile, counted."""
        tile = self.arrays[name][place].copy()
        self.read[name] = self.read.get(name, 0) + tile.size
        return tile

    def store(self, name: str, tile: Floats, *place: slice) -> None:
        """Write a tile, counted."""
        self.arrays[name][place] = tile
        self.written[name] = self.written.get(name, 0) + tile.size


def _memory(n: int, d: int, **more: Floats) -> Memory:
    rng = np.random.default_rng(12)
    operands = {name: rng.standard_normal((n, d)) for name in ("Q", "K", "V")}
    return Memory({**operands, "O": np.zeros((n, d)), **more})


def _tiles(n: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, n)) for start in range(0, n, length)]


def flash(n: int, d: int, size: int) -> Memory:
    """Algorithm 1 on (n, d) operands with ``size`` numbers on chip: outer loop over keys, inner over
    queries.
    """
    rows, columns = block_sizes(size, d)
    memory = _memory(n, d, l=np.zeros(n), m=np.full(n, -np.inf))
    for j in _tiles(n, columns):
        k, v = memory.load("K", j), memory.load("V", j)
        for i in _tiles(n, rows):
            q, o, mass, top = (memory.load(name, i) for name in ("Q", "O", "l", "m"))
            s = q @ k.T
            peak = s.max(axis=1)
            p = np.exp(s - peak[:, None])
            higher = np.maximum(top, peak)
            old, new = np.exp(top - higher) * mass, np.exp(peak - higher)
            total = old + new * p.sum(axis=1)
            memory.store("O", (old[:, None] * o + new[:, None] * (p @ v)) / total[:, None], i)
            memory.store("l", total, i)
            memory.store("m", higher, i)
    return memory


def standard(n: int, d: int, _size: int = 0) -> Memory:
    """Algorithm 0: S is written, read, P written, read; each operand is read once."""
    memory = _memory(n, d, S=np.zeros((n, n)), P=np.zeros((n, n)))
    memory.store("S", memory.load("Q") @ memory.load("K").T)
    s = memory.load("S")
    p = np.exp(s - s.max(axis=1, keepdims=True))
    memory.store("P", p / p.sum(axis=1, keepdims=True))
    memory.store("O", memory.load("P") @ memory.load("V"))
    return memory


def side(size: int) -> int:
    """The largest t with t² + 2t ≤ ``size``: a square tile of a product and a line of each factor."""
    return max(1, math.isqrt(size + 1) - 1)


def standard_in_tiles(n: int, d: int, size: int) -> Memory:
    """Standard attention with square tiles on chip, for a memory too small to hold an operand.

    S tile by tile; ℓ and m from one pass over S; O tile by tile from S read again.
    """
    t = side(size)
    memory = _memory(n, d, S=np.zeros((n, n)), l=np.zeros(n), m=np.full(n, -np.inf))
    for i in _tiles(n, t):
        for j in _tiles(n, t):
            memory.store("S", memory.load("Q", i) @ memory.load("K", j).T, i, j)
    for i in _tiles(n, t):
        top, mass = np.full(i.stop - i.start, -np.inf), np.zeros(i.stop - i.start)
        for j in _tiles(n, t):
            s = memory.load("S", i, j)
            higher = np.maximum(top, s.max(axis=1))
            mass = mass * np.exp(top - higher) + np.exp(s - higher[:, None]).sum(axis=1)
            top = higher
        memory.store("l", mass, i)
        memory.store("m", top, i)
    for i in _tiles(n, t):
        for c in _tiles(d, t):
            top, mass = memory.load("m", i)[:, None], memory.load("l", i)[:, None]
            total = np.zeros((i.stop - i.start, c.stop - c.start))
            for j in _tiles(n, t):
                total += np.exp(memory.load("S", i, j) - top) @ memory.load("V", j, c)
            memory.store("O", total / mass, i, c)
    return memory


def flash_traffic(n: int, d: int, size: int) -> int:
    """Numbers that Algorithm 1 moves: 2Nd + T_c(3Nd + 4N), T_c = ⌈N/B_c⌉."""
    _, columns = block_sizes(size, d)
    return 2 * n * d + -(-n // columns) * (3 * n * d + 4 * n)


def standard_traffic(n: int, d: int, _size: int = 0) -> int:
    """Numbers that Algorithm 0 moves at least: 4Nd + 4N²."""
    return 4 * n * d + 4 * n * n


def tiled_traffic(n: int, d: int, size: int) -> int:
    """Numbers that :func:`standard_in_tiles` moves."""
    across, along = -(-n // side(size)), -(-d // side(size))
    scores = 2 * across * n * d + n * n
    output = along * (n * n + 2 * n) + across * n * d + n * d
    return scores + (n * n + 2 * n) + output
