"""Claims about the numbers that FlashAttention's Algorithm 1 and standard attention move. arXiv 2205.14135.

The formulas are held against walks over the tiles on a counting memory, and carry them to sizes that are not
worth walking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.flash_attention import attention, block_sizes
from attnproof.properties.claims.slow_memory import (
    flash,
    flash_traffic,
    side,
    standard,
    standard_in_tiles,
    standard_traffic,
    tiled_traffic,
)
from attnproof.properties.forms.base import each
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "CLAIMS",
    "counts",
    "crossover",
    "crossovers",
    "every_input_is_read",
    "optimal_at_each_size",
    "order_of_growth",
    "reported",
]

_PAPER: Final = "Dao et al., FlashAttention, arXiv 2205.14135"


Formula = Callable[[int, int, int], int]


def counts(
    formula: Formula = flash_traffic,
    sizes: Sequence[tuple[int, int, int]] = (
        (24, 4, 16),
        (24, 4, 40),
        (30, 4, 64),
        (33, 3, 99),
        (40, 8, 320),
    ),
) -> ClaimFinding:
    """Does the walk over the tiles move what ``formula`` says, and compute attention? ``sizes``: (N, d,
    M).
    """
    rows, furthest = [], 0.0
    for n, d, size in sizes:
        memory = flash(n, d, size)
        s = memory.arrays["Q"] @ memory.arrays["K"].T
        p = np.exp(s - s.max(axis=1, keepdims=True))
        exact = p @ memory.arrays["V"] / p.sum(axis=1, keepdims=True)
        furthest = max(furthest, float(abs(memory.arrays["O"] - exact).max()))
        rows.append((n, d, size, memory.moved, formula(n, d, size), standard(n, d).moved))
    wrong = [row for row in rows if row[3] != row[4] or row[5] != standard_traffic(row[0], row[1])]
    titles = ("N", "d", "M", "moved by Algorithm 1", "by the formula", "moved by standard attention")
    return ClaimFinding(
        status="REFUTED" if wrong or furthest > 1e-12 else "HOLDS",
        evidence=f"{len(rows)} walks, ragged tiles among them, outputs within {furthest:.1g} of attention: "
        + (f"counts differ from the formula at {len(wrong)}" if wrong else "every count equals the formula"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=(
            "N = {}, d = {}, M = {}: {} numbers moved, the formula says {}".format(*wrong[0][:5])
            if wrong
            else ""
        ),
    )


def crossover(n: int, d: int) -> int:
    """The smallest M from which on Algorithm 1 moves fewer numbers than standard attention."""
    whole = standard_traffic(n, d)
    # T_c falls as M grows: bisection.
    low, high = 0, n * d
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if flash_traffic(n, d, middle) < whole else (middle, high)
    return high


def crossovers(
    n: int = 16384, widths: Sequence[int] = (32, 64, 128), rival: Formula = flash_traffic
) -> ClaimFinding:
    """Does Algorithm 1 move fewer numbers than standard attention for every M of d ≤ M ≤ Nd?

    Args:
        rival: what is counted in place of Algorithm 1.
    """
    rows = [(d, crossover(n, d), 3 * d * d, d * (3 * d + 4)) for d in widths]
    sizes = {d: sorted({int(d * 2 ** (i / 4)) for i in range(4 * int(math.log2(n)) + 1)}) for d in widths}
    ratios = {d: [rival(n, d, size) / standard_traffic(n, d) for size in sizes[d]] for d in widths}
    more = [(d, size) for d in widths for size, r in zip(sizes[d], ratios[d], strict=True) if r > 1]
    fewer = sum(len(sizes[d]) for d in widths) - len(more)
    titles = ("d", "crossover M", "3d²", "3d² + 4d")
    plot = Plot(
        "Numbers moved by Algorithm 1 over standard attention's",
        "line",
        {
            "M": [float(size) for d in widths for size in sizes[d]],
            "ratio": [ratio for d in widths for ratio in ratios[d]],
            "d": [f"d = {d}" for d in widths for _ in sizes[d]],
        },
        "M",
        "ratio",
        "d",
        log=("M", "ratio"),
    )
    status = "HOLDS" if not more else "CONDITIONAL" if fewer else "REFUTED"
    d, size = (widths[0], widths[0] * widths[0])
    return ClaimFinding(
        status=status,
        evidence=f"N = {n}: fewer from M = "
        + ", ".join(f"{row[1]} (d = {row[0]}, 3d² + 4d = {row[3]})" for row in rows)
        + f" on; of {fewer + len(more)} sizes d ≤ M ≤ Nd more is moved at {len(more)}. T_c(3d + 4) < 4N + 2d "
        "with T_c ≈ 4Nd/M gives M > d(3d + 4)",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        plots=(plot,),
        counterexample=(
            f"N = {n}, d = {d}, M = d² = {size}: B_c = {block_sizes(size, d)[1]}, T_c = "
            f"{-(-n // block_sizes(size, d)[1])}; 2Nd + T_c(3Nd + 4N) = {flash_traffic(n, d, size)} numbers "
            f"against 4Nd + 4N² = {standard_traffic(n, d)}"
            if more
            else ""
        ),
    )


def order_of_growth(formula: Formula = flash_traffic) -> ClaimFinding:
    """Is the traffic Θ(N²d²/M) for d ≤ M ≤ Nd? Exact ratios over a grid, and slopes in N, d and M."""
    grid = [
        (2**a, 2**b, 2 ** (b + c) + e)
        for a in range(3, 21)
        for b in range(9)
        for c in range(a + 1)
        for e in (0, 1)
        if 2 ** (b + c) + e <= 2 ** (a + b)
    ]
    ratios = [(flint.fmpq(formula(n, d, m) * m, (n * d) ** 2), n, d, m) for n, d, m in grid]
    low, high = min(ratios), max(ratios)
    inside = low[0] >= flint.fmpq(12, 5) and high[0] <= 37
    base = formula(2**16, 64, 2**14)

    def slope(n: int, d: int, m: int) -> float:
        return math.log2(formula(n, d, m) / base) / 2

    slopes = {
        "N": slope(2**18, 64, 2**14),
        "d": slope(2**16, 256, 2**14),
        "M": slope(2**16, 64, 2**16),
    }
    return ClaimFinding(
        status="HOLDS" if inside else "REFUTED",
        evidence=f"traffic over N²d²/M at {len(grid)} sizes up to N = 2^20, d = 256: {float(low[0]):.3g} to "
        f"{float(high[0]):.3g}; slopes over a factor of 4 around N = 2^16, d = 64, M = 2^14: "
        + ", ".join(f"{x:.3f} in {name}" for name, x in slopes.items())
        + ". For all d ≤ M ≤ Nd: 4Nd/(5M) ≤ T_c ≤ 5Nd/M and 3Nd ≤ 3Nd + 4N ≤ 7Nd, so 12/5 ≤ ratio ≤ 37",
        table={"in": list(slopes), "slope": list(slopes.values())},
        counterexample=""
        if inside
        else f"N = {high[1]}, d = {high[2]}, M = {high[3]}: the ratio to N²d²/M is {float(high[0]):.4g}",
    )


def every_input_is_read(*, uniform: bool = False) -> ClaimFinding:
    """At M = Nd, is Ω(N²d²/M) = Ω(Nd) forced? Does the output depend on each of the 3Nd inputs?

    Args:
        uniform: weights that do not depend on Q and K, for which it does not.
    """
    rng = np.random.default_rng(13)
    n, d = 4, 3
    inputs: dict[str, Any] = {name: rationals(rng, n, d) for name in ("Q", "K", "V")}

    def output(given: dict[str, Any]) -> Any:
        x = given["Q"] @ given["K"].T
        w = each(lambda logit: flint.arb(0 if uniform else logit).exp(), x)
        return attention(w, each(flint.arb, given["V"]))

    before, unread = output(inputs), []
    for name, values in inputs.items():
        for place in np.ndindex(n, d):
            moved = values.copy()
            moved[place] += flint.fmpq(1, 3)
            if all(
                (a - b).contains(0)
                for a, b in zip(output({**inputs, name: moved}).flat, before.flat, strict=True)
            ):
                unread.append((name, place))
    ratios = [flash_traffic(n, d, n * d) / (4 * n * d) for n in (2**8, 2**14) for d in (16, 128)]
    good = not unread and max(ratios) < 4
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"the output moves with {3 * n * d - len(unread)} of {3 * n * d} inputs (n = {n}, d = {d}, "
        "balls that exclude 0), so 3Nd reads and Nd writes are needed; at M = Nd, where N²d²/M = Nd, "
        f"Algorithm 1 moves {min(ratios):.3g} to {max(ratios):.3g} times 4Nd",
        counterexample=f"{unread[0][0]}{list(unread[0][1])} moves no output" if unread else "",
        seed=13,
    )


def optimal_at_each_size(widths: Sequence[int] = (16, 64, 256, 1024), share: int = 1) -> ClaimFinding:
    """Is Algorithm 1 within a factor of the best for each M? Against tiled standard attention at M =
    ``share``·d.

    Args:
        share: M over d; 0 for M = 16d², where it is.
    """
    walked = {
        (n, d, m): standard_in_tiles(n, d, m).moved == tiled_traffic(n, d, m)
        for n, d, m in ((12, 4, 8), (15, 5, 24))
    }
    n = 2**16
    rows = []
    for d in widths:
        size = share * d if share else 16 * d * d
        rows.append((d, size, flash_traffic(n, d, size), tiled_traffic(n, d, size)))
    ratios = [row[2] / row[3] for row in rows]
    # Over the widths √(d_last/d_first) is expected of M = d.
    grows = ratios[-1] > 1 and ratios[-1] / ratios[0] > (widths[-1] / widths[0]) ** 0.25
    d, size, ours, theirs = rows[1]
    titles = ("d", "M", "moved by Algorithm 1", "by standard attention in square tiles")
    status = "REFUTED" if grows and all(walked.values()) else "SUPPORTED"
    return ClaimFinding(
        status=status,
        evidence=f"N = {n}: Algorithm 1 moves "
        + ", ".join(f"{r:.3g}" for r in ratios)
        + f" times as many numbers as standard attention in square tiles at d = {list(widths)}, M = "
        f"{[row[1] for row in rows]}; the tiled formula equals {sum(walked.values())} of {len(walked)} walks",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=(
            f"N = {n}, d = {d}, M = {size}: Algorithm 1 moves {ours}, standard attention in tiles of side "
            f"{side(size)} moves {theirs}; at M = d the ratio grows like √d"
            if status == "REFUTED"
            else ""
        ),
    )


def reported() -> ClaimFinding:
    """The measured table: only its ratios and a count of products can be computed here."""
    return ClaimFinding(
        status="OPEN",
        evidence="measured on an A100, which is not here, with operations that the paper does not itemise. "
        f"Printed: traffic 40.3 GB over 4.4 GB = {40.3 / 4.4:.2f}, time 41.7 ms over 7.3 ms = "
        f"{41.7 / 7.3:.2f}, operations 75.2 over 66.6 = {75.2 / 66.6:.3f} (matrix products alone, forward "
        f"and backward with QKᵀ recomputed: 7/6 = {7 / 6:.3f}). Needed: that GPU and its counters. The "
        "counts are checked as FA1-2a to FA1-2c",
    )


CLAIMS: Final = (
    Claim(
        id="FA1-2a",
        subject="FlashAttention",
        title="numbers moved by Algorithm 1",
        statement="Algorithm 1 moves 2Nd + ⌈N/B_c⌉(3Nd + 4N) numbers between off-chip and on-chip memory, "
        "standard attention 4Nd + 4N².",
        source=f"{_PAPER}, Algorithms 0 and 1, proof of Theorem 2; counted",
        kind="count",
        check=lambda _: counts(),
        control=lambda _: counts(lambda n, d, size: flash_traffic(n, d, size) - n * d),
        covers=("FA1-2",),
    ),
    Claim(
        id="FA1-2b",
        subject="FlashAttention",
        title="fewer memory accesses than standard attention",
        statement="For d ≤ M ≤ Nd Algorithm 1 needs fewer off-chip accesses than standard attention.",
        source=f"{_PAPER}, Theorem 2 and the sentence after it, without its condition on d² and M",
        kind="count",
        check=lambda _: crossovers(),
        control=lambda _: crossovers(rival=lambda n, d, size: 3 * n * d),
    ),
    Claim(
        id="FA1-2c",
        subject="FlashAttention",
        title="accesses grow as N²d²/M",
        statement="Algorithm 1 needs Θ(N²d²/M) accesses for d ≤ M ≤ Nd; standard attention Θ(Nd + N²).",
        source=f"{_PAPER}, Theorem 2",
        kind="count",
        check=lambda _: order_of_growth(),
        control=lambda _: order_of_growth(standard_traffic),
    ),
    Claim(
        id="FA1-3a",
        subject="FlashAttention",
        title="lower bound over the range of M",
        statement="No exact attention algorithm needs o(N²d²/M) accesses for every M of [d, Nd]: at M = Nd "
        "that would be o(Nd), fewer than the inputs to be read.",
        source=f"{_PAPER}, Proposition 3",
        kind="enclosure",
        check=lambda _: every_input_is_read(),
        control=lambda _: every_input_is_read(uniform=True),
        covers=("FA1-3",),
    ),
    Claim(
        id="FA1-3b",
        subject="FlashAttention",
        title="optimal for each M (as often retold)",
        statement="For each M of [d, Nd] Algorithm 1 is within a constant factor of the fewest accesses "
        "possible.",
        source=f"a reading of {_PAPER}, Proposition 3, that its proof does not give",
        kind="count",
        check=lambda _: optimal_at_each_size(),
        control=lambda _: optimal_at_each_size(share=0),
    ),
    Claim(
        id="FA1-4",
        subject="FlashAttention",
        title="measured traffic and time",
        statement="GPT-2 medium on an A100, forward and backward: 40.3 GB and 41.7 ms for standard "
        "attention, 4.4 GB and 7.3 ms for FlashAttention.",
        source=f"{_PAPER}, Figure 2",
        kind="none",
        check=lambda _: reported(),
        control=None,
    ),
)
