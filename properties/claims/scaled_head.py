"""Claims about attention whose heads read keys and values at scales of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import torch

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.batch_normalised import agree, apart, outputs

__all__ = ["CLAIMS", "constant_windows", "costs", "in_windows", "scores_computed"]

_WIDTH = 3


def in_windows(
    length: int, pool: Sequence[int], *, constant: bool, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """q (1, H, 2, 3), k and v (1, H, N, 3), float64 multiples of 1/8, one head for each width in ``pool``.

    With ``constant``, keys and values are the same in each window of their head.
    """
    generator = torch.Generator().manual_seed(seed)

    def multiples(rows: int) -> torch.Tensor:
        return torch.randint(-16, 17, (1, len(pool), rows, _WIDTH), generator=generator).double() / 8.0

    q, k, v = multiples(2), multiples(length), multiples(length)
    if constant:
        first = torch.stack([torch.arange(length) // width * width for width in pool])
        heads = torch.arange(len(pool)).reshape(-1, 1)
        k, v = k[:, heads, first], v[:, heads, first]
    return q, k, v


def constant_windows(pool: Sequence[int] = (1, 2, 3, 4), length: int = 12, ragged: int = 11) -> ClaimFinding:
    """Is Attention-SH softmax attention where each window is constant? Where windows are of one size.

    Args:
        pool: widths of windows, by head, all of which divide ``length``.
        length: N of windows all alike; ragged: N that leaves a shorter last window in some heads.
    """
    rows = []
    radius = 0.0
    for n, constant in ((length, True), (ragged, True), (length, False)):
        tensors = in_windows(n, pool, constant=constant)
        pooled = outputs("scaled_head", *tensors, scale=1.0, pool=tuple(pool))
        softmax = outputs("softmax", *tensors, scale=1.0)
        for head, width in enumerate(pool):
            a, b = (type(x)(x.value[:, head], x.radius[:, head]) for x in (pooled, softmax))
            rows.append((n, width, math.ceil(n / width), constant, agree(a, b), apart(a, b)))
            radius = max(radius, float((a.radius + b.radius).max()))
    whole = [same for n, width, _, constant, same, _ in rows if n % width == 0 and (constant or width == 1)]
    rest = [same for n, width, _, constant, same, _ in rows if n % width and constant]
    varied = [same for n, width, _, constant, same, _ in rows if width > 1 and not constant]
    if not all(whole) or any(varied):
        status = "REFUTED"
    else:
        status = "HOLDS" if all(rest) else "CONDITIONAL"
    tail = max((row[-1] for row in rows if row[0] % row[1] and row[3]), default=0.0)
    return ClaimFinding(
        status=status,
        evidence=f"windows of {', '.join(map(str, pool))} positions: {sum(whole)} of {len(whole)} heads "
        f"agree where the width divides N, enclosed to {radius:.1g}. A shorter last window weighs as much as "
        f"the others, so that outputs differ by up to {tail:.3g} ({len(rest) - sum(rest)} of {len(rest)} "
        f"heads); where windows are not constant {len(varied) - sum(varied)} of {len(varied)} heads differ",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("N", "width", "windows", "constant", "equal", "difference, at least"))
        },
        counterexample="" if status == "HOLDS" else _three_keys(),
        seed=0,
    )


def _three_keys() -> str:
    """Three keys that are all the same, in windows of two: the last one is a window of its own."""
    q, k = (torch.zeros(1, 1, rows, 1, dtype=torch.float64) for rows in (1, 3))
    v = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).reshape(1, 1, 3, 1)
    pooled = outputs("scaled_head", q, k, v, scale=1.0, pool=(2,))
    softmax = outputs("softmax", q, k, v, scale=1.0)
    return (
        "q = 0, keys 0, 0, 0, values 0, 0, 1, windows of 2: the windows {1, 2} and {3} have mean values 0 "
        "and 1 "
        f"and equal weights, so Attention-SH gives {float(pooled.value):.6g}; softmax attention gives "
        f"{float(softmax.value):.6g}, a third for each key."
    )


def scores_computed(length: int, pool: Sequence[int]) -> int:
    """Products q_i·k_j that heads with windows of these widths compute, counted one by one."""
    count = 0
    for width in pool:
        for _ in range(length):
            for _ in range(0, length, width):
                count += 1
    return count


def costs(lengths: Sequence[int], pool: Sequence[int] = (1, 2, 4, 3)) -> ClaimFinding:
    """Do H heads with windows of s_h positions compute Σ N²/s_h scores? Where every s_h divides N."""
    rows = []
    for n in lengths:
        due = sum((Fraction(n * n, width) for width in pool), Fraction(0))
        rows.append((n, scores_computed(n, pool), float(due), scores_computed(n, pool) == due))
    divided = [same for n, _, _, same in rows if all(n % width == 0 for width in pool)]
    rest = [(n, found, due) for n, found, due, same in rows if not same]
    if not all(divided):
        status = "REFUTED"
    else:
        status = "CONDITIONAL" if rest else "HOLDS"
    told = ""
    if rest:
        n, found, formula = min(rest)
        told = (
            f"N = {n}, windows of {', '.join(map(str, pool))}: Σ N²/s_h = {formula:.6g}, but the heads read "
            f"{', '.join(str(math.ceil(n / width)) for width in pool)} pooled keys for each of {n} queries: "
            f"{found} scores."
        )
    return ClaimFinding(
        status=status,
        evidence=f"counted for windows of {', '.join(map(str, pool))}: equal to Σ N²/s_h at "
        f"{sum(divided)} of {len(divided)} lengths that all widths divide, and at {len(rows) - len(rest)} of "
        f"{len(rows)} in all; elsewhere a shorter last window costs as much as a whole one, Σ N·⌈N/s_h⌉",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("N", "scores counted", "Σ N²/s_h", "equal"))
        },
        counterexample=told,
    )


_SUBJECT = "primal-dual framework"
_SOURCE = "Nguyen et al., arXiv 2406.13781 (ICLR 2023), Attention-SH, from memory"

CLAIMS: Final = (
    Claim(
        id="PD-3a",
        subject=_SUBJECT,
        title="heads at scales of their own, constant windows",
        statement="Attention-SH, whose head h reads means of s_h keys and values, equals softmax attention "
        "where "
        "the keys and values of each window are the same, and where s_h = 1.",
        source=_SOURCE,
        kind="enclosure",
        check=lambda _: constant_windows(),
        control=lambda _: constant_windows((1, 2, 3, 4), 12, 24),
    ),
    Claim(
        id="PD-3b",
        subject=_SUBJECT,
        title="cost of heads at scales of their own",
        statement="Attention-SH with windows of s_h positions computes Σ_h N²/s_h scores.",
        source=_SOURCE,
        kind="count",
        check=lambda lab: costs((5, 12, 24, 30, *lab.choose((), (96, 100, 144)))),
        control=lambda _: costs((12, 24)),
    ),
)
