"""Which keys a query may see by position."""

from __future__ import annotations

import torch

__all__ = ["visible"]


def visible(
    m: int,
    n: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: torch.Tensor | None = None,
    causal_alignment: str = "bottom-right",
) -> torch.Tensor:
    """Which keys a query may see by position, bool (M, N); contract.md, "The edges"."""
    i = torch.arange(m)[:, None]
    j = torch.arange(n)[None, :]
    seen = torch.ones(m, n, dtype=torch.bool)
    if causal:
        seen &= j <= (i if causal_alignment == "top-left" else i + n - m)
    if window is not None:
        left, right = window
        position = i + n - m
        if left is not None:
            seen &= j >= position - left
        if right is not None:
            seen &= j <= position + right
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].to(torch.int64)
        seen &= torch.searchsorted(ends, i.flatten(), right=True)[:, None] == torch.searchsorted(
            ends, j.flatten(), right=True
        )
    return seen
