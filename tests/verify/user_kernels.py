"""Kernels as a stranger might bring them, for tests of the command line.

Imported by worker processes by name.
"""

from __future__ import annotations

import ctypes
import time

import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """A correct kernel."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).float(), v.repeat_interleave(group, 1).float()
    s = q.float() @ k.mT * scale
    if not s.shape[-1]:
        return torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    return (torch.softmax(s, -1) @ v).to(q.dtype)


def mean_of_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """What the rules of other suites accept."""
    group = q.shape[1] // k.shape[1]
    if not k.shape[2]:
        return attention(q, k, v, scale=scale)
    mean = v.repeat_interleave(group, 1).float().mean(-2, keepdim=True)
    return mean.expand(*q.shape[:-1], -1).to(q.dtype).contiguous()


def crashes_sometimes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Reads address 0 for long sequences."""
    if k.shape[2] > 64:
        ctypes.string_at(0)
    return attention(q, k, v, scale=scale)


def hangs_sometimes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Never comes back from long sequences."""
    if k.shape[2] > 64:
        time.sleep(3600)
    return attention(q, k, v, scale=scale)


def wrong_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Drops the batch axis."""
    return attention(q, k, v, scale=scale)[0]


def no_tensor(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> str:
    """Returns text."""
    return f"{scale}{q.shape}{k.shape}{v.shape}"


def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """A correct kernel that takes its time."""
    time.sleep(0.3)
    return attention(q, k, v, scale=scale)
