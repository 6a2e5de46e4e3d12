"""Claims about attention whose heads read keys and values at scales of their own. Theory.md PD-3."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.claims.batch_normalised import agree, apart, outputs

__all__ = ["constant_windows", "findings", "in_windows"]

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
        name="scaled heads: constant windows",
        status=status,
        statement="Attention-SH equals softmax attention where the keys and values of each window are the "
        "same, and where windows have one position.",
        source="Nguyen et al. 2023, arXiv 2406.13781, Attention-SH (theory.md PD-3)",
        evidence=f"windows of {', '.join(map(str, pool))} positions: {sum(whole)} of {len(whole)} heads "
        f"agree where the width divides N, enclosed to {radius:.1g}. A shorter last window weighs as much as "
        f"the others, so that outputs differ by up to {tail:.3g} ({len(rest) - sum(rest)} of {len(rest)} "
        f"heads); where windows are not constant {len(varied) - sum(varied)} of {len(varied)} heads differ",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("N", "width", "windows", "constant", "equal", "difference, at least"))
        },
    )


def findings() -> list[ClaimFinding]:
    """The finding, as every run shows it."""
    return [constant_windows()]
