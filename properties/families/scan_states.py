"""States of ``prefix_scan`` and ``rwkv4``: (m, u, w), the largest exponent and two sums scaled by e^−m."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.contract import ContractError
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.sequences import checked_vector, state_dtype

__all__ = ["Initial", "checked_initial", "largest"]


@dataclass(frozen=True, eq=False)
class Initial:
    """An initial state, finite.

    Attributes:
        m, u: (B, H); w: (B, H, E); 0 where the state is neutral.
        present: bool (B, H), whether m is not −inf.
    """

    m: torch.Tensor
    u: torch.Tensor
    w: torch.Tensor
    present: torch.Tensor


def checked_initial(
    names: Sequence[str], state: Any, heads: tuple[int, int], width: int | None, dtype: torch.dtype
) -> tuple[Initial | None, torch.Tensor]:
    """An initial state (m, u, w), and the heads bool (B, H) in which it is not finite.

    Args:
        names: what the call names m, u and w.
        state: three tensors in that order, of shapes (B, H), (B, H) and (B, H, E); or None.
        heads: (B, H).
        width: E; None where w has no such axis.
        dtype: of the call.

    Raises:
        ContractError: shapes, dtypes; u < 0, or u = 0 and w not, which no sum of exponentials is.
    """
    if state is None:
        return None, torch.zeros(heads, dtype=torch.bool)
    m, u, w = state
    shapes = (heads, heads, heads if width is None else (*heads, width))
    for name, x, asked in zip(names, (m, u, w), shapes, strict=True):
        checked_vector(f"initial_state's {name}", x, asked, state_dtype(dtype))
    w = w[..., None] if width is None else w
    bad = ~u.isfinite() | ~w.isfinite().all(-1) | ~(m.isfinite() | (m == -torch.inf))
    negative = (u < 0) & ~bad
    if bool(negative.any()):
        raise ContractError(
            f"initial_state's {names[1]} holds {float(u[negative].min())}; a sum of exponentials is ≥ 0"
        )
    unlike = ((u == 0) | (m == -torch.inf)) & ((w != 0).any(-1) | ((u != 0) & (m == -torch.inf))) & ~bad
    if bool(unlike.any()):
        place = tuple(unlike.nonzero()[0].tolist())
        raise ContractError(
            f"initial_state at (batch, head) = {place} has {names[0]} = {float(m[place])}, {names[1]} = "
            f"{float(u[place])} and the largest |{names[2]}| = {float(w[place].abs().max())}; where "
            f"{names[0]} is −inf the others are 0, and {names[2]} is 0 where {names[1]} is"
        )
    present = (m > -torch.inf) & ~bad
    return Initial(finite(m), torch.where(present, finite(u), 0.0), finite(w), present), bad


def largest(a: Arithmetic[V], parts: Sequence[tuple[V, torch.Tensor]], shape: tuple[int, ...]) -> V:
    """The largest entry over the last axes of all parts (B, H, 1, X), where their masks hold; 0 of none.

    The entry whose float64 approximation is largest, and Σ max(x − it, 0): that is 0 if it is the right one,
    and where entries are as near as float64 resolves, the enclosure of the sum reaches from 0 to more than
    the largest of its terms. In finer arithmetics the differences choose again.
    """
    if not parts:
        return a.exact(torch.zeros(shape, dtype=torch.float64))
    best = _chosen(a, parts, [a.midpoint(x) for x, _ in parts])
    rises = [a.relu(a.masked(a.sub(x, best), kept)) for x, kept in parts]
    heights = [a.midpoint(rise) for rise in rises]
    wrong = torch.cat(heights, -1).amax(-1, keepdim=True) > 0
    if bool(wrong.any()):
        sizes = [torch.where(wrong, y, a.midpoint(x)) for y, (x, _) in zip(heights, parts, strict=True)]
        best = _chosen(a, parts, sizes)
        rises = [a.relu(a.masked(a.sub(x, best), kept)) for x, kept in parts]
    for rise in rises:
        best = a.add(best, a.sum(rise))
    return best


def _chosen(a: Arithmetic[V], parts: Sequence[tuple[V, torch.Tensor]], sizes: Sequence[torch.Tensor]) -> V:
    """The entry with the largest size of each row, (B, H, 1, 1); 0 where no mask holds."""
    hidden = [
        size.expand(kept.shape).masked_fill(~kept, -torch.inf)
        for size, (_, kept) in zip(sizes, parts, strict=True)
    ]
    whole = torch.cat(hidden, -1)
    here = (torch.arange(whole.shape[-1]) == whole.argmax(-1, keepdim=True)) & (whole > -torch.inf)
    best, start = None, 0
    for x, kept in parts:
        stop = start + kept.shape[-1]
        term = a.sum(a.masked(x, here[..., start:stop]))
        best, start = term if best is None else a.add(best, term), stop
    assert best is not None
    return best
