"""The memory layouts in which tensors are handed to a kernel: same values, other strides and offsets.

Whatever lies in memory around the values is NaN, so that a kernel that reads beyond them shows it.
"""

from __future__ import annotations

import torch

__all__ = ["VIEWS", "lay_out", "unit_last_stride"]

VIEWS = ("contiguous", "sliced", "transposed", "columns", "broadcast", "unaligned")
"""contiguous: as the shape says. sliced: cut on every axis out of a larger tensor. transposed: (B, M, H, D)
in memory for four axes, the last two exchanged for two. columns: the last axis has the largest stride of the
last two.
broadcast: k and v (x) have stride 0 on their leading axes. unaligned: starts one element into its storage."""

# Tensors of keys and values are the ones that callers expand; x stands for the rows of the row-wise families.
_BROADCAST = frozenset({"k", "v", "x"})


def unit_last_stride(view: str, axes: int) -> bool:
    """Whether tensors of ``axes`` axes have unit stride on the last one under ``view``."""
    return view != "columns" and not (view == "transposed" and axes == 2)


def lay_out(values: torch.Tensor, view: str, name: str) -> torch.Tensor:
    """``values`` as a fresh tensor in the memory layout ``view``.

    Args:
        values: any floating tensor. For "broadcast", k and v are equal along all axes but the last two,
            x along all but the last.
        view: one of :data:`VIEWS`.
        name: the tensor's name in the call.

    Raises:
        ValueError: for an unknown view.
    """
    if view not in VIEWS:
        raise ValueError(f"view={view!r}: expected one of {', '.join(VIEWS)}")
    axes = values.dim()
    if view == "sliced":
        around = torch.full([size + 2 for size in values.shape], torch.nan, dtype=values.dtype)
        inner = around[tuple(slice(1, size + 1) for size in values.shape)]
    elif view == "unaligned":
        around = torch.full((values.numel() + 2,), torch.nan, dtype=values.dtype)
        inner = around[1:-1].view(values.shape)
    elif view == "broadcast" and name in _BROADCAST and axes >= 2:
        kept = 1 if axes == 2 else 2
        core = values[(slice(0, 1),) * (axes - kept)] if values.numel() else values.new_empty(0)
        return core.clone().expand(values.shape) if values.numel() else values.clone()
    elif (view == "columns" and axes >= 2) or (view == "transposed" and axes == 2):
        inner = values.transpose(-1, -2).contiguous().transpose(-1, -2)
        return inner.clone(memory_format=torch.preserve_format)
    elif view == "transposed" and axes == 4:
        return values.transpose(1, 2).contiguous().transpose(1, 2).clone(memory_format=torch.preserve_format)
    else:
        return values.clone(memory_format=torch.contiguous_format)
    return inner.copy_(values)
