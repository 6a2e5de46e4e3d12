"""Attention whose backward passes lack something, for test_gradient_verdicts."""

from __future__ import annotations

import torch


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Every operation in the inputs' dtype, and its gradient as well."""
    return torch.softmax(q @ k.mT * scale, -1) @ v


def keys_cut_off(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Right, but no gradient reaches the keys."""
    group = q.shape[1] // k.shape[1]
    return eager(q, k.detach().repeat_interleave(group, 1), v.repeat_interleave(group, 1), scale=scale)


def mean_of_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Neither queries nor keys matter."""
    mean = v.repeat_interleave(q.shape[1] // k.shape[1], 1).mean(-2, keepdim=True)
    return mean.expand(*q.shape[:-1], -1).contiguous()
