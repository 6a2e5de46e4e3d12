"""What the forms of linear attention cost: bytes moved, and floating-point operations inside matmuls.

Bytes are those that programs ask memory for, as if no cache held anything: every load and store of every
program, each time. The forms are walked tile by tile, and nothing is computed; feature maps are left out.
Counting the loads, stores and matmuls of Triton kernels of these shapes gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnproof.properties.claims.base import ClaimFinding

__all__ = ["Costs", "bytes_and_matmuls", "chunkwise", "findings", "recurrent", "stepwise"]

# States are float32.
_STATE_BYTES = 4


@dataclass
class Costs:
    """A running count: bytes read and written, operations of matmuls and of everything else."""

    read: int = 0
    written: int = 0
    in_matmuls: int = 0
    elsewhere: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def matmul_share(self) -> float:
        """Which part of the operations is in matmuls."""
        return self.in_matmuls / (self.in_matmuls + self.elsewhere)

    def matmul(self, rows: int, inner: int, columns: int) -> None:
        """Count (rows, inner) by (inner, columns)."""
        self.in_matmuls += 2 * rows * inner * columns


def recurrent(length: int, width: int, columns: int, item: int) -> Costs:
    """A kernel that goes position by position, its state in registers.

    One program holds ``columns`` columns of the state, and each reads all of q and k.
    """
    costs = Costs()
    for first in range(0, width, columns):
        own = min(columns, width - first)
        # of each position: q, k and the program's part of v; S + k vᵀ and qᵀS
        costs.read += length * (2 * width + own) * item
        costs.written += length * own * item
        costs.elsewhere += length * 4 * width * own
    return costs


def stepwise(length: int, width: int, item: int) -> Costs:
    """The same recurrence as one call a position: the state is read from memory and written back."""
    costs = recurrent(length, width, width, item)
    costs.read += length * width * width * _STATE_BYTES
    costs.written += length * width * width * _STATE_BYTES
    return costs


def chunkwise(length: int, width: int, chunk: int, item: int) -> Costs:
    """A pass over k and v that leaves the state before every chunk, then all chunks at once."""
    costs = Costs()
    state = width * width * _STATE_BYTES
    for first in range(0, length, chunk):
        rows = min(chunk, length - first)
        tile = rows * width * item
        costs.written += state
        costs.read += 2 * tile
        costs.matmul(width, rows, width)
        # q·S, then the pairs: q once more, k and v; the mask over pairs; o
        costs.read += state + 4 * tile
        costs.matmul(rows, width, width)
        costs.matmul(rows, width, rows)
        costs.matmul(rows, rows, width)
        costs.elsewhere += rows * rows
        costs.written += tile
    costs.written += state
    return costs


def bytes_and_matmuls(length: int = 4096, width: int = 64, chunk: int = 64, item: int = 2) -> ClaimFinding:
    """Does a chunkwise kernel move fewer bytes than a recurrent one, and do more of its work in matmuls?"""
    chunks = chunkwise(length, width, chunk, item)
    others = {
        "a call a position": stepwise(length, width, item),
        **{
            f"registers, {columns} columns a program": recurrent(length, width, columns, item)
            for columns in (8, 16, 32, width)
        },
    }
    cheaper = [name for name, costs in others.items() if chunks.moved < costs.moved]
    matmuls = all(chunks.matmul_share > costs.matmul_share for costs in others.values())
    rows = {f"chunks of {chunk}": chunks, **others}
    table: dict[str, list[Any]] = {
        "form": list(rows),
        "MB moved": [costs.moved / 1e6 for costs in rows.values()],
        "share of operations in matmuls": [costs.matmul_share for costs in rows.values()],
    }
    status = "CONDITIONAL"
    if not matmuls or not cheaper:
        status = "REFUTED"
    elif len(cheaper) == len(others):
        status = "HOLDS"
    dearer = [name for name in others if name not in cheaper]
    return ClaimFinding(
        name="linear attention: bytes and matmuls of the forms",
        status=status,
        statement="A chunkwise kernel moves fewer bytes than a recurrent one and does more of its operations "
        "in matmuls.",
        source="Yang et al. 2023, arXiv 2312.06635, section 3 (theory.md 2.2)",
        evidence=f"N = {length}, D = E = {width}, {item} bytes a number, states float32, one head: chunks "
        f"move {chunks.moved / 1e6:.2f} MB with {chunks.matmul_share:.1%} of operations in matmuls, no "
        "recurrence has any there. They move fewer bytes than: "
        + ("; ".join(f"{name} ({others[name].moved / 1e6:.2f} MB)" for name in cheaper) or "none")
        + ". More than: "
        + ("; ".join(f"{name} ({others[name].moved / 1e6:.2f} MB)" for name in dearer) or "none")
        + ". A state in registers costs no traffic; every further program that holds a part reads q and k",
        table=table,
    )


def findings() -> list[ClaimFinding]:
    """All of them, as every run shows them."""
    return [bytes_and_matmuls()]
