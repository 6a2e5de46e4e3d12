"""Which keys FlashAttention-2 looks at under a causal mask: work, skipped blocks, lengths, windows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.small_formats import Floats

__all__ = ["CLAIMS", "EXAMPLES", "causal_rows", "causal_work", "examples", "kept", "skipped_blocks"]

_PAPER: Final = "Dao, FlashAttention-2, arXiv 2307.08691"
INFINITE: Final = float("inf")
NAN: Final = float("nan")


def causal_work(masks_to_spare: int = 0, blocks: Sequence[int] = (1, 2, 3, 8, 64, 512)) -> ClaimFinding:
    """Blocks computed and blocks that need a mask, of T×T square blocks, from their indices one by one.

    Args:
        masks_to_spare: how many fewer masked blocks a row of blocks are claimed than there are.
    """
    rows = []
    for t in blocks:
        row, column = np.indices((t, t))
        done = int((column <= row).sum())
        # The last key of the block lies after the first query, for blocks of two and more.
        masked = int(((column <= row) & ((column + 1) * 2 - 1 > row * 2)).sum())
        rows.append((t, done, t * (t + 1) // 2, masked, t * (1 - masks_to_spare)))
    wrong = [row for row in rows if row[1] != row[2] or row[3] != row[4]]
    titles = ("T", "computed", "T(T + 1)/2", "masked", "one a row of blocks")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="square blocks: "
        + ", ".join(f"{r[1]} of {r[0] ** 2} computed, {r[3]} masked" for r in rows),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=f"T = {wrong[0][0]}: {wrong[0][3]} blocks need a mask" if wrong else "",
    )


def causal_rows(q: Floats, k: Floats, v: Floats, block: int, *, skips: bool = True) -> Floats:
    """Causal attention of (n, d) operands in square blocks; ``skips`` leaves blocks above the diagonal
    unread.
    """
    n = len(q)
    out = np.zeros_like(v)
    for first in range(0, n, block):
        rows = slice(first, min(first + block, n))
        i = np.arange(rows.start, rows.stop)[:, None]
        top, mass, total = np.full(i.shape, -np.inf), np.zeros(i.shape), np.zeros((len(i), v.shape[1]))
        for start in range(0, first + block if skips else n, block):
            columns = slice(start, min(start + block, n))
            s = np.where(np.arange(columns.start, columns.stop) <= i, q[rows] @ k[columns].T, -np.inf)
            higher = np.maximum(top, s.max(axis=1, keepdims=True))
            p, drop = np.exp(s - higher), np.exp(top - higher)
            mass, total, top = (
                mass * drop + p.sum(axis=1, keepdims=True),
                total * drop + p @ v[columns],
                higher,
            )
        out[rows] = total / mass
    return out


def skipped_blocks(*, skips: bool = True, n: int = 24, d: int = 4) -> ClaimFinding:
    """Does NaN in the keys and values of skipped blocks leave every output bit as it was?"""
    rng = np.random.default_rng(23)
    q, k, v = (rng.standard_normal((n, d)) for _ in range(3))
    touched, within, compared = [], 0, 0
    for block in (1, 3, 4, 8):
        clean = causal_rows(q, k, v, block)
        for end in range(block, n, block):
            x, y = k.copy(), v.copy()
            x[end:], y[end:] = NAN, NAN
            dirty = causal_rows(q, x, y, block, skips=skips)[:end]
            compared += dirty.size
            if dirty.tobytes() != clean[:end].tobytes():
                touched.append((block, end))
        y = v.copy()
        y[n - 1] = NAN
        within += int(np.isnan(causal_rows(q, k, y, block)[n - block : n - 1]).any())
    return ClaimFinding(
        status="REFUTED" if touched else "SUPPORTED",
        evidence=f"{compared} outputs of {n} queries in blocks of 1, 3, 4, 8 with NaN in all later blocks: "
        + (f"changed at {len(touched)} cuts" if touched else "no bit changed")
        + f"; a NaN value in the block on the diagonal does reach earlier queries (0·NaN), at {within} of 3 "
        "lengths",
        counterexample=(
            f"blocks of {touched[0][0]}, NaN from key {touched[0][1]} on: rows before it become NaN, as "
            "exp(−∞)·NaN = NaN"
            if touched
            else ""
        ),
        seed=23,
    )


def kept(i: int, j: int, queries: int, keys: int, left: float = INFINITE, right: float = 0) -> bool:
    """Is key j allowed to query i, aligned to the bottom right?"""
    return i + keys - queries - left <= j <= i + keys - queries + right


EXAMPLES: Final = {(2, 5): ("11110", "11111"), (5, 2): ("00", "00", "00", "10", "11")}
"""The two masks of the README, by (T_q, T_k)."""


def examples(rule: Callable[[int, int, int, int], bool] = kept) -> ClaimFinding:
    """Does ``rule``(i, j, T_q, T_k) give the README's two masks, row by row, and end at the last key?"""
    wrong, shown = [], []
    for (queries, keys), lines in EXAMPLES.items():
        found = tuple("".join("01"[rule(i, j, queries, keys)] for j in range(keys)) for i in range(queries))
        shown.append(f"T_q = {queries}, T_k = {keys}: {' '.join(found)}")
        if found != lines:
            wrong.append(f"T_q = {queries}, T_k = {keys}: {' '.join(found)}, documented {' '.join(lines)}")
    sizes = list(itertools.product(range(1, 7), repeat=2))
    last = sum(all(rule(a - 1, j, a, b) for j in range(b)) for a, b in sizes)
    windows = [
        [j for j in range(8) if kept(i, j, 4, 8, *sides)]
        == [j for j in range(8) if -sides[0] <= j - i - 4 <= sides[1]]
        for i in range(4)
        for sides in ((0, 0), (2, 0), (1, 3))
    ]
    return ClaimFinding(
        status="REFUTED" if wrong or last < len(sizes) or not all(windows) else "HOLDS",
        evidence="; ".join(shown)
        + f"; the last query sees every key in {last} of {len(sizes)} sizes up to 6; windows as documented "
        f"in {sum(windows)} of {len(windows)} rows",
        counterexample="\n".join(wrong),
    )


def _top_left(i: int, j: int, _queries: int, _keys: int) -> bool:
    return j <= i


CLAIMS: Final = (
    Claim(
        id="FA2-3a",
        subject="FlashAttention",
        title="causal work",
        statement="Of T×T square blocks T(T + 1)/2 are computed under a causal mask, about half, and one a "
        "row of blocks needs it elementwise.",
        source=f"{_PAPER}, Section 3.1.1",
        kind="count",
        check=lambda _: causal_work(),
        control=lambda _: causal_work(1),
        covers=("FA2-3",),
    ),
    Claim(
        id="FA2-3b",
        subject="FlashAttention",
        title="skipped blocks are not read",
        statement="The output does not depend on keys and values in skipped blocks, NaN among them.",
        source=f"{_PAPER}, Section 3.1.1; a consequence",
        kind="search",
        check=lambda _: skipped_blocks(),
        control=lambda _: skipped_blocks(skips=False),
    ),
    Claim(
        id="FA2-5",
        subject="FlashAttention",
        title="causal masks of unequal lengths",
        statement="The causal mask is aligned to the bottom right: T_q = 2, T_k = 5 keeps 11110, 11111; T_q "
        "= 5, T_k = 2 keeps 00, 00, 00, 10, 11; a window allows i + T_k − T_q − left ≤ j ≤ i + T_k − T_q + "
        "right.",
        source="Dao-AILab/flash-attention, README (change in 2.1)",
        kind="exact",
        check=lambda _: examples(),
        control=lambda _: examples(_top_left),
    ),
)
