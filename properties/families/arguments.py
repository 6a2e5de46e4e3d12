"""Checks of a call's arguments against the contract, shared by the families; messages name the argument."""

from __future__ import annotations

import math
from typing import Any

import torch

from attnproof.properties.contract import ContractError
from attnproof.properties.families.base import dtype_name

__all__ = [
    "checked_alibi_slopes",
    "checked_bias",
    "checked_cu_seqlens",
    "checked_sinks",
    "checked_tensors",
    "checked_window",
    "finite",
    "number",
]


def finite(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with non-finite entries replaced by 0."""
    return torch.where(tensor.isfinite(), tensor, torch.zeros((), dtype=tensor.dtype))


def number(argument: str, value: Any) -> float:
    """A finite Python float."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or math.isnan(value)
        or abs(value) == float("inf")
    ):
        raise ContractError(f"{argument}={value!r}; the contract asks for a finite Python float")
    return float(value)


def checked_tensors(
    family: str, tensors: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of one dtype, of shapes that fit together."""
    if len(tensors) != 3:
        raise ContractError(f"{family} takes three tensors q, k, v; got {len(tensors)}")
    for name, tensor in zip("qkv", tensors, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            got = (
                f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise ContractError(
                f"{name} has {got}; the contract asks for a tensor of 4 axes (batch, heads, length, width)"
            )
        dtype_name(tensor.dtype, name)
    q, k, v = tensors
    if not q.dtype == k.dtype == v.dtype:
        raise ContractError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; the contract asks for one dtype"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ContractError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; batch, heads and length must be the same"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ContractError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; batch and width must be the same"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ContractError(f"q has {q.shape[1]} heads and k {k.shape[1]}; H must be a multiple of G")
    return q, k, v


def checked_window(window: Any) -> tuple[int | None, int | None] | None:
    """(left, right), or None."""
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ContractError(f"window={window!r}; the contract asks for (left, right), each an int or None")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise ContractError(f"window={window!r}; each side is an int or None")
    return window[0], window[1]


def checked_bias(bias: Any, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The bias expanded to (B, H, M, N), or None."""
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor):
        raise ContractError(
            f"bias is {type(bias).__name__}; the contract asks for a tensor broadcastable to {shape}"
        )
    dtype_name(bias.dtype, "bias")
    try:
        return bias.expand(shape)
    except RuntimeError:
        raise ContractError(
            f"bias has shape {tuple(bias.shape)}; it must broadcast to (B, H, M, N) = {shape}"
        ) from None


def checked_sinks(sinks: Any, heads: int) -> torch.Tensor | None:
    """One logit a query head, or None."""
    if sinks is None:
        return None
    if not isinstance(sinks, torch.Tensor) or tuple(sinks.shape) != (heads,):
        got = f"shape {tuple(sinks.shape)}" if isinstance(sinks, torch.Tensor) else type(sinks).__name__
        raise ContractError(
            f"sinks has {got}; the contract asks for one logit a query head, shape ({heads},)"
        )
    dtype_name(sinks.dtype, "sinks")
    return sinks


def checked_alibi_slopes(slopes: Any, heads: int) -> torch.Tensor | None:
    """One float32 slope a query head, or None."""
    if slopes is None:
        return None
    if (
        not isinstance(slopes, torch.Tensor)
        or tuple(slopes.shape) != (heads,)
        or slopes.dtype != torch.float32
    ):
        got = (
            f"{slopes.dtype} of shape {tuple(slopes.shape)}"
            if isinstance(slopes, torch.Tensor)
            else type(slopes).__name__
        )
        raise ContractError(
            f"alibi_slopes is {got}; the contract asks for float32, one slope a query head, shape ({heads},)"
        )
    if not bool(slopes.isfinite().all()):
        raise ContractError("alibi_slopes holds NaN or infinity; the contract asks for finite slopes")
    return slopes


def checked_cu_seqlens(cu: Any, b: int, m: int, n: int) -> torch.Tensor | None:
    """int32 offsets of packed sequences, or None."""
    if cu is None:
        return None
    if not isinstance(cu, torch.Tensor) or cu.dim() != 1 or cu.dtype != torch.int32 or cu.numel() < 2:
        raise ContractError("cu_seqlens: the contract asks for an int32 tensor of P + 1 offsets, P ≥ 1")
    ends = cu.tolist()
    if b != 1 or m != n:
        raise ContractError(f"cu_seqlens with B = {b}, M = {m}, N = {n}; packed batches have B = 1 and M = N")
    if ends[0] != 0 or ends[-1] != n or any(x > y for x, y in zip(ends, ends[1:], strict=False)):
        raise ContractError(f"cu_seqlens={ends}; offsets must rise from 0 to N = {n}")
    return cu
