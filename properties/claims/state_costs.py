"""Claims about what the forms of linear attention cost: operations, bytes moved, operations inside matmuls.

Operations are counted by running the forms on numbers that count what is done to them. Bytes are those that
programs ask memory for, as if no cache held anything: every load and store of every program, each time. For
bytes the forms are walked tile by tile, and nothing is computed; feature maps are left out. Counting the
loads, stores and matmuls of Triton kernels of these shapes gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.forms import gated, linear
from attnproof.properties.forms.numbers import Tally, counted

__all__ = [
    "CLAIMS",
    "Costs",
    "break_even",
    "bytes_and_matmuls",
    "chunk_costs",
    "chunkwise",
    "decoding",
    "recurrent",
    "stepwise",
]

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


def bytes_and_matmuls(
    length: int = 4096,
    width: int = 64,
    chunk: int = 64,
    item: int = 2,
    columns: Sequence[int] = (8, 16, 32, 64),
) -> ClaimFinding:
    """Does a chunkwise kernel move fewer bytes than recurrent ones, and do more of its work in matmuls?

    Args:
        columns: how many columns of the state a program holds, one recurrent kernel each; besides, the
            recurrence as one call a position.
    """
    chunks = chunkwise(length, width, chunk, item)
    others = {
        "a call a position": stepwise(length, width, item),
        **{f"registers, {own} columns a program": recurrent(length, width, own, item) for own in columns},
    }
    cheaper = [name for name, costs in others.items() if chunks.moved < costs.moved]
    matmuls = all(chunks.matmul_share > costs.matmul_share for costs in others.values())
    rows = {f"chunks of {chunk}": chunks, **others}
    status = "CONDITIONAL"
    if not matmuls or not cheaper:
        status = "REFUTED"
    elif len(cheaper) == len(others):
        status = "HOLDS"
    dearer = [name for name in others if name not in cheaper]

    def told(names: list[str]) -> str:
        return "; ".join(f"{name} ({others[name].moved / 1e6:.2f} MB)" for name in names) or "none"

    return ClaimFinding(
        status=status,
        evidence=f"N = {length}, D = E = {width}, {item} bytes a number, states float32, one head: chunks "
        f"move {chunks.moved / 1e6:.2f} MB with {chunks.matmul_share:.1%} of operations in matmuls, no "
        f"recurrence has any there. They move fewer bytes than: {told(cheaper)}. More than: {told(dearer)}. "
        "A state in registers costs no traffic; every further program that holds a part reads q and k",
        table={
            "form": list(rows),
            "MB moved": [costs.moved / 1e6 for costs in rows.values()],
            "share of operations in matmuls": [costs.matmul_share for costs in rows.values()],
        },
        counterexample=""
        if not dearer
        else f"A recurrence with the whole state in one program's registers reads q, k, v and writes o once: "
        f"4·{length}·{width}·{item} = {4 * length * width * item} bytes. Chunks read q twice, k and v twice, "
        f"write o, and write and read a {width} × {width} float32 state for each of {-(-length // chunk)} "
        f"chunks: {chunks.moved} bytes. Condition: the state does not fit one program's registers.",
    )


def _attention_operations(n: int, d: int, e: int, *, by_state: bool) -> int:
    tally = Tally()
    q, k, v = counted(tally, n, d), counted(tally, n, d), counted(tally, n, e)
    linear.quadratic(q, k, v, by_state=by_state)
    return tally.products + tally.sums


def break_even(widths: Sequence[int] = (2, 4), aspect: int = 1) -> ClaimFinding:
    """Does Q(KᵀV) cost less than (QKᵀ)V exactly where N > d? Counted around N = d.

    Args:
        aspect: d_v over d_k = d.
    """
    rows, wrong = [], []
    for d in widths:
        for n in sorted({1, d - 1, d, d + 1, 2 * d, 4 * d}):
            state, pairs = (_attention_operations(n, d, aspect * d, by_state=way) for way in (True, False))
            # About 4Nde and 2N²(d + e): as many sums as products, less the first of every sum.
            e = aspect * d
            due = (d * e * (2 * n - 1) + n * e * (2 * d - 1), n * n * (2 * d - 1) + n * e * (2 * n - 1))
            rows.append((d, n, state, pairs))
            if (state < pairs) is not (n > d) or (state == pairs) is not (n == d) or (state, pairs) != due:
                wrong.append((d, n, state, pairs))
    titles = ("d", "N", "operations by the state", "by the matrix of weights")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"products and sums of the forms run on counting numbers at {len(rows)} sizes: "
        + ", ".join(f"{r[2]} and {r[3]} at d = {r[0]}, N = {r[1]}" for r in rows[-3:]),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="d, N, operations by the state, by the weights: " + str(wrong[0]) if wrong else "",
    )


def _state_step(d: int, n: int) -> tuple[int, int]:
    """Operations of one decoding step with a normaliser at position n, and numbers kept between steps."""
    tally = Tally()
    q, k, v = (counted(tally, d) for _ in range(3))
    linear.step(q, k, v, (counted(tally, d, d), counted(tally, d)), normalize=True)
    return tally.products + tally.sums, d * d + d


def _cache_step(d: int, n: int) -> tuple[int, int]:
    """The same for weights q·k over all n positions, whose keys and values are kept (exponentials not
    counted).
    """
    tally = Tally()
    q, keys, values = counted(tally, d), counted(tally, n, d), counted(tally, n, d)
    weights = keys @ q
    _ = (weights @ values) / weights.sum()
    return tally.products + tally.sums, 2 * n * d


def decoding(step: Callable[[int, int], tuple[int, int]] = _state_step, d: int = 4) -> ClaimFinding:
    """Does a step (d, n) → (operations, numbers kept) cost the same at every n, 4d² + 3d − 1 operations?"""
    rows = [(n, *step(d, n)) for n in (1, 4, 16, 64)]
    wrong = [r for r in rows if r[1:] != (4 * d * d + 3 * d - 1, d * d + d)]
    titles = ("position", "operations", "numbers kept")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"counted at d = {d}: "
        + ", ".join(f"{r[1]} operations and {r[2]} numbers kept at position {r[0]}" for r in rows),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=f"position, operations, numbers kept: {wrong[-1]}" if wrong else "",
    )


def _chunk_operations(length: int, chunk: int, d: int) -> int:
    tally = Tally()
    q, k, v = (counted(tally, length, d) for _ in range(3))
    # Scalar gates, so that weights inside a chunk are a product of matrices.
    gated.chunkwise(q, k, v, counted(tally, length, 1), chunk=chunk)
    return tally.products + tally.sums


def chunk_costs(
    chunks: Sequence[int | None] = (1, 4, 8), lengths: Sequence[int] = (16, 32, 64)
) -> ClaimFinding:
    """Does the chunkwise form cost c(LCd + Ld²) operations with c in [1, 8], doubling with L at fixed C?

    Args:
        chunks: C; None for C = L, the parallel form.
    """
    d, rows = 4, []
    for chunk in chunks:
        counts = [_chunk_operations(n, chunk or n, d) for n in lengths]
        for n, count, before in zip(lengths, counts, [0, *counts[:-1]], strict=True):
            own = chunk or n
            growth = count / before if before else 2.0
            rows.append((str(chunk or "L"), n, count, count / (n * own * d + n * d * d), growth))
    wrong = [r for r in rows if not 1 <= r[3] <= 8 or r[4] != 2.0]
    titles = ("C", "L", "operations", "over LCd + Ld²", "over those at L/2")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"counted at d = {d}, scalar gates: "
        + "; ".join(
            f"C = {r[0]}, L = {r[1]}: {r[2]}, {r[3]:.3g} (LCd + Ld²)" for r in rows if r[1] == lengths[-1]
        )
        + (f"; not doubling: {wrong[-1]}" if wrong else "; twice as many at twice the length"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=f"C, L, operations, over LCd + Ld², over those at L/2: {wrong[-1]}" if wrong else "",
    )


CLAIMS: Final = (
    Claim(
        id="LIN-5a",
        subject="linear attention",
        title="break-even",
        statement="Without a mask and with d_k = d_v = d, Q(KᵀV) costs about 4Nd² operations and (QKᵀ)V "
        "about 4N²d: fewer exactly where N > d, as many at N = d.",
        source="Katharopoulos et al. 2020, arXiv 2006.16236, section 3.2; break-even counted",
        kind="count",
        check=lambda lab: break_even(lab.choose((2, 4), (2, 4, 8))),
        control=lambda lab: break_even((2,), 2),
    ),
    Claim(
        id="LIN-5b",
        subject="linear attention",
        title="a decoding step",
        statement="A decoding step with a normaliser costs the same at every position, 4d² + 3d − 1 "
        "operations, and keeps d² + d numbers: the state and z.",
        source="Katharopoulos et al. 2020, arXiv 2006.16236, section 3.4; counted",
        kind="count",
        check=lambda lab: decoding(),
        control=lambda lab: decoding(_cache_step),
    ),
    Claim(
        id="GLA-3b",
        subject="gated linear attention",
        title="cost of the chunkwise form",
        statement="The chunkwise form costs O(LCd + Ld²) operations: linear in L at a fixed chunk length C.",
        source="Yang et al. 2023, arXiv 2312.06635, section 2.2",
        kind="count",
        check=lambda lab: chunk_costs(),
        control=lambda lab: chunk_costs((None,)),
    ),
    Claim(
        id="GLA-3c",
        subject="gated linear attention",
        title="bytes and matmuls of the forms",
        statement="A chunkwise kernel moves fewer bytes than a recurrent one and does more of its operations "
        "in matmuls.",
        source="Yang et al. 2023, arXiv 2312.06635, section 3",
        kind="count",
        check=lambda lab: bytes_and_matmuls(),
        control=lambda lab: bytes_and_matmuls(columns=(8,)),
    ),
)
