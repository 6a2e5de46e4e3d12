"""How the positions of a sequence are taken in blocks: those that carry the state, and those that are read.

Up to ``LONGEST`` positions every row is evaluated, and both are the same blocks. Of longer calls a sample of
rows is: the state is carried by blocks of up to ``WRITES`` positions, one of which ends before each block of
``READS`` rows that holds a sampled one. Everything is then linear in N, and no other row is touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V

__all__ = [
    "LONGEST",
    "Layout",
    "block_length",
    "grouping",
    "sampled_rows",
    "scattered",
    "unknown",
    "unsampled",
]

LONGEST = 4096
"""Every row of a call of up to this many positions is judged, of a longer one a sample."""

WRITES, READS = 256, 4

# Positions in a block: with a decay for each channel it costs n² exponentials a channel, else one matrix.
CHANNEL_BLOCK, HEAD_BLOCK = 8, 64
# Blocks of which each sees each before it; more are taken in groups, whose states are carried alike.
GROUP = 16

# Around how many multiples of each of these a sample looks: lengths at which kernels change blocks.
_MULTIPLES = {16: 4, 64: 4, 128: 4, 4096: 4}
_ENDS, _ANYWHERE = 8, 38


def block_length(length: int, width: int) -> int:
    """Positions in a block for N = ``length`` and ``width`` decays a position."""
    return max(min(length, HEAD_BLOCK if width == 1 else CHANNEL_BLOCK), 1)


def grouping(count: int) -> tuple[int, ...]:
    """Sizes of groups of blocks, of groups of these and so on, that hold ``count`` blocks."""
    levels = 1
    while GROUP**levels < count:
        levels += 1
    sizes = []
    for level in range(levels, 1, -1):
        sizes.append(math.ceil(count ** (1.0 / level) - 1e-9))
        count = -(-count // sizes[-1])
    return (*sizes, count)


def _filled(positions: torch.Tensor) -> torch.Tensor:
    """Blocks (C, n) with empty ones after them, so that they fill their groups."""
    return torch.nn.functional.pad(
        positions, (0, 0, 0, math.prod(grouping(len(positions))) - len(positions)), value=-1
    )


@dataclass(frozen=True, eq=False)
class Layout:
    """The blocks of one sequence.

    Attributes:
        length: of the sequence.
        writes: int64 (C, n), positions of the blocks that carry the state; −1 after the end of a block.
        reads: int64 (R, m), of those whose rows are evaluated, likewise.
        chosen: float64 (R, C), 1 where a block of reads begins with one of writes; None where they are the
            same.
    """

    length: int
    writes: torch.Tensor
    reads: torch.Tensor
    chosen: torch.Tensor | None

    @classmethod
    def whole(cls, length: int, size: int) -> Layout:
        """All positions, in blocks of ``size``."""
        places = torch.arange(-(-length // size) * size).reshape(-1, size)
        blocks = _filled(torch.where(places < length, places, -1))
        return cls(length, blocks, blocks, None)

    @classmethod
    def sampled(cls, length: int, rows: torch.Tensor) -> Layout:
        """Reads of the blocks that hold ``rows`` (int64, rising)."""
        starts: list[int] = []
        for row in rows.tolist():
            if not starts or row >= starts[-1] + READS:
                starts.append(row)
        read = torch.tensor(starts, dtype=torch.int64)
        cuts = torch.tensor(sorted({*starts, *range(0, length, WRITES)}), dtype=torch.int64)
        ends = torch.cat((cuts[1:], torch.full((min(len(cuts), 1),), length)))
        places = cuts[:, None] + torch.arange(WRITES)
        writes = _filled(torch.where(places < ends[:, None], places, -1))
        reads = read[:, None] + torch.arange(READS)
        chosen = torch.zeros(len(read), len(writes), dtype=torch.float64)
        chosen[:, : len(cuts)] = (read[:, None] == cuts).double()
        return cls(length, writes, torch.where(reads < length, reads, -1), chosen)

    def cut(self, tensor: torch.Tensor, *, far: bool = False) -> torch.Tensor:
        """(B, H, N, X) in the blocks of reads, or with ``far`` of writes, (B, H, C, n, X); 0 after ends."""
        batch, heads, _, width = tensor.shape
        padded = torch.cat((tensor, tensor.new_zeros(batch, heads, 1, width)), 2)
        return padded[:, :, self.writes if far else self.reads]

    def along(self, blocks: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`cut` for blocks of writes."""
        batch, heads, _, _, width = blocks.shape
        tensor = blocks.new_zeros(batch, heads, self.length + 1, width)
        tensor[:, :, self.writes] = blocks
        return tensor[:, :, : self.length]

    def picked(self, rows: torch.Tensor) -> torch.Tensor:
        """Float64 (len(rows), R·m) with a 1 at the place of each of ``rows``, if it has one."""
        return (rows[:, None] == self.reads.flatten()).double()


def unsampled(rows: torch.Tensor | None, length: int) -> torch.Tensor:
    """Positions that are not judged, bool (N, 1); none where ``rows`` is None."""
    if rows is None:
        return torch.zeros(length, 1, dtype=torch.bool)
    return torch.ones(length, 1, dtype=torch.bool).index_fill_(0, rows, False)


def scattered(a: Arithmetic[V], x: V, rows: torch.Tensor | None, length: int) -> V:
    """What the rows (…, R, X) give as (…, N, X), 0 in others; ``x`` itself where ``rows`` is None."""
    if rows is None:
        return x
    return a.matmul(a.exact((torch.arange(length)[:, None] == rows).double()), x)


def unknown(a: Arithmetic[V], o: V, rows: torch.Tensor | None) -> V:
    """The output (…, N, E), of which nothing is known in rows other than ``rows``."""
    if rows is None:
        return o
    return a.div(o, a.exact((~unsampled(rows, a.shape(o)[-2])).double()))


def sampled_rows(length: int, segments: tuple[tuple[int, int, int], ...]) -> torch.Tensor | None:
    """Positions of a call of more than ``LONGEST`` that are judged, int64, rising; None where all are.

    The first and the last, those around multiples of lengths at which kernels change blocks (counted from
    the start of their sequence), ends of packed sequences, and others at random: at most 96, the same for
    every call of these sizes.

    Args:
        length: N; segments: (batch, start, stop) of the sequences of one batch entry.
    """
    if length <= LONGEST:
        return None
    generator = torch.Generator().manual_seed(length + 1_000_003 * len(segments))

    def drawn(count: int, bound: int) -> list[int]:
        found: list[int] = torch.randint(bound, (count,), generator=generator).tolist()
        return found

    rows = {0, length - 1, *drawn(_ANYWHERE, length)}
    spans = [(start, stop) for _, start, stop in segments if stop > start]
    rows |= {end for s in drawn(_ENDS // 2, len(spans)) for end in (spans[s][0], spans[s][1] - 1)}
    for multiple, count in _MULTIPLES.items():
        for near in drawn(count, length):
            start, stop = next(span for span in spans if span[0] <= near < span[1])
            middle = start + max(round((near - start) / multiple), 1) * multiple
            rows |= {row for row in (middle - 1, middle, middle + 1) if start <= row < stop}
    return torch.tensor(sorted(rows), dtype=torch.int64)
