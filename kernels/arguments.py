"""What every attention entry point checks before it launches, and the few numbers that its launch needs.

A kernel that reads a wrong shape reads wrong memory, so every check names the argument, what it was and what
``contract.md`` asks. Arguments that are legal but not supported here raise NotImplementedError: the suite
then records the case as declined instead of failing it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnproof.properties.contract import ContractError

__all__ = [
    "MAX_HEAD_DIM",
    "ContractError",
    "KeyBand",
    "check_alibi_slopes",
    "check_attention_tensors",
    "check_block",
    "check_choice",
    "check_cu_seqlens",
    "check_finite",
    "check_floating",
    "check_positive",
    "check_rows",
    "check_sinks",
    "check_splits",
    "key_band",
    "padded_bias",
]

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_floating(name: str, x: object, kernel: str) -> None:
    """Raise unless ``x`` is a tensor of a dtype that ``kernel`` computes in."""
    if not isinstance(x, torch.Tensor):
        raise ContractError(f"{kernel}: {name} is a {type(x).__name__}: expected a torch.Tensor")
    if x.dtype == torch.float64:
        raise NotImplementedError(
            f"{kernel}: {name} is float64: this kernel computes in float32; pass float32 or narrower"
        )
    if x.dtype not in DTYPES:
        raise ContractError(f"{kernel}: {name} has dtype {x.dtype}: expected float32, float16 or bfloat16")


def check_rows(x: torch.Tensor, kernel: str) -> torch.Tensor:
    """``x`` (…, N) as a matrix of rows (R, N), a view wherever its strides allow one."""
    check_floating("x", x, kernel)
    if x.ndim < 1:
        raise ContractError(f"{kernel}: x is a scalar: expected a tensor with at least one axis, (…, N)")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_attention_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str) -> None:
    """Raise unless q (B,H,M,D), k (B,G,N,D), v (B,G,N,E) fit together, G divides H, and D, E ≤ 256."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x, kernel)
        if x.ndim != 4:
            raise ContractError(
                f"{kernel}: {name} has shape {tuple(x.shape)}: expected 4 axes (batch, heads, length, width)"
            )
        if x.dtype != q.dtype:
            raise ContractError(
                f"{kernel}: {name} is {x.dtype} while q is {q.dtype}: cast all three to one dtype"
            )
        if x.device != q.device:
            raise ContractError(
                f"{kernel}: {name} is on {x.device} while q is on {q.device}: move all three to one device"
            )
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ContractError(f"{kernel}: {shapes}: the first axis, the batch, must be the same in all three")
    if k.shape[1:3] != v.shape[1:3]:
        raise ContractError(f"{kernel}: {shapes}: k and v must agree in heads and length")
    if q.shape[3] != k.shape[3]:
        raise ContractError(f"{kernel}: {shapes}: q and k must agree in the last axis, the width D")
    heads, groups = q.shape[1], k.shape[1]
    if heads < 1 or groups < 1 or heads % groups:
        raise ContractError(
            f"{kernel}: {shapes}: {heads} query heads must be a positive multiple of {groups} key heads"
        )
    for name, width in (("D", q.shape[3]), ("E", v.shape[3])):
        if width < 1:
            raise ContractError(f"{kernel}: {shapes}: width {name} is 0: expected 1 to {MAX_HEAD_DIM}")
        if width > MAX_HEAD_DIM:
            raise NotImplementedError(
                f"{kernel}: {shapes}: width {name} is {width}: this kernel goes up to {MAX_HEAD_DIM}"
            )


def check_positive(name: str, value: float | None, kernel: str) -> None:
    """Raise unless ``value`` is None or a finite number above zero."""
    if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ContractError(
            f"{kernel}: {name}={value!r}: expected a finite number above 0, or None for no {name}"
        )


def check_finite(name: str, value: float, kernel: str) -> None:
    """Raise unless ``value`` is a finite Python number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ContractError(f"{kernel}: {name}={value!r}: expected a finite Python number")


def check_choice(name: str, value: object, choices: Sequence[str], kernel: str) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ContractError(f"{kernel}: {name}={value!r}: expected one of {', '.join(map(repr, choices))}")


def check_block(name: str, value: int, kernel: str) -> None:
    """Raise unless ``value`` can be a side of a tile: a power of two that a matrix instruction accepts."""
    if not isinstance(value, int) or value < 16 or value & (value - 1):
        raise ContractError(
            f"{kernel}: {name}={value!r}: expected a power of two from 16 on, or None for the kernel's choice"
        )


def check_sinks(sinks: torch.Tensor | None, q: torch.Tensor, kernel: str) -> None:
    """Raise unless ``sinks`` is None or one logit a query head, (H,)."""
    if sinks is None:
        return
    check_floating("sinks", sinks, kernel)
    if tuple(sinks.shape) != (q.shape[1],):
        raise ContractError(
            f"{kernel}: sinks has shape {tuple(sinks.shape)}: expected one a query head, ({q.shape[1]},)"
        )
    if sinks.device != q.device:
        raise ContractError(f"{kernel}: sinks is on {sinks.device} while q is on {q.device}: move it there")


def check_alibi_slopes(slopes: torch.Tensor, q: torch.Tensor, kernel: str) -> torch.Tensor:
    """``slopes``; raise unless it is a constant of one float32 number a query head, (H,)."""
    if (
        not isinstance(slopes, torch.Tensor)
        or slopes.dtype != torch.float32
        or tuple(slopes.shape) != (q.shape[1],)
    ):
        form = (
            f"{slopes.dtype} of shape {tuple(slopes.shape)}"
            if isinstance(slopes, torch.Tensor)
            else type(slopes).__name__
        )
        raise ContractError(
            f"{kernel}: alibi_slopes is {form}: expected float32, one a query head, ({q.shape[1]},)"
        )
    if slopes.device != q.device:
        raise ContractError(
            f"{kernel}: alibi_slopes is on {slopes.device} while q is on {q.device}: move it there"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ContractError(
            f"{kernel}: alibi_slopes requires a gradient, and gets none: pass alibi_slopes.detach()"
        )
    return slopes


def check_splits(splits: int | None, kernel: str) -> None:
    """Raise unless ``splits`` is None or a positive number of parts."""
    if splits is not None and (isinstance(splits, bool) or not isinstance(splits, int) or splits < 1):
        raise ContractError(
            f"{kernel}: splits={splits!r}: expected a positive integer, or None for parts of a fixed size"
        )


def padded_bias(bias: torch.Tensor | None, q: torch.Tensor, keys: int, kernel: str) -> torch.Tensor | None:
    """``bias`` viewed as (B,H,M,N): axes that it lacks, or has once, get stride 0; nothing is copied."""
    if bias is None:
        return None
    check_floating("bias", bias, kernel)
    if bias.dtype not in (q.dtype, torch.float32):
        raise ContractError(
            f"{kernel}: bias is {bias.dtype} while q is {q.dtype}: expected q's dtype or float32"
        )
    if bias.device != q.device:
        raise ContractError(f"{kernel}: bias is on {bias.device} while q is on {q.device}: move it there")
    shape = (*q.shape[:3], keys)
    try:
        return bias.expand(shape)
    except RuntimeError:
        raise ContractError(
            f"{kernel}: bias has shape {tuple(bias.shape)}: it must broadcast to (B, H, M, N) = {shape}"
        ) from None


def check_cu_seqlens(cu_seqlens: torch.Tensor, q: torch.Tensor, k: torch.Tensor, kernel: str) -> int:
    """Raise unless ``cu_seqlens`` (P+1,) int32 cuts the packed row of q and k; return the longest piece."""
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
        form = (
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, torch.Tensor)
            else type(cu_seqlens).__name__
        )
        raise ContractError(f"{kernel}: cu_seqlens is {form}: expected int32 of shape (P+1,)")
    if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise ContractError(
            f"{kernel}: cu_seqlens with q {tuple(q.shape)}, k {tuple(k.shape)}: it asks for B = 1 and M = N"
        )
    if cu_seqlens.device != q.device:
        raise ContractError(
            f"{kernel}: cu_seqlens is on {cu_seqlens.device} while q is on {q.device}: move it there"
        )
    ends = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    if not ends or ends[0] != 0 or ends[-1] != q.shape[2] or min(lengths, default=0) < 0:
        raise ContractError(
            f"{kernel}: cu_seqlens={ends}: expected to rise from 0 to the length {q.shape[2]}"
        )
    return max(lengths, default=0)


@dataclass(frozen=True, slots=True)
class KeyBand:
    """The keys that a mask lets query i see: i + left ≤ j ≤ i + right, None where a side has no limit."""

    left: int | None
    right: int | None


def key_band(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    causal_alignment: str,
    kernel: str,
) -> KeyBand:
    """Causal masking and a window as one band of the score matrix.

    The window is centred on p = i + N − M whatever the alignment of ``causal``, as the contract defines it.
    Limits that lie outside the matrix are clipped, so that no caller's 2**40 overflows the kernel's int32
    positions.
    """
    shift = keys - queries
    left: int | None = None
    right: int | None = None
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise ContractError(f"{kernel}: window={window!r}: expected a pair (left, right)")
        for side in window:
            if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
                raise ContractError(
                    f"{kernel}: window={window!r}: each side is a number of keys ≥ 0, or None for no limit"
                )
        left = None if window[0] is None else shift - window[0]
        right = None if window[1] is None else shift + window[1]
    if causal:
        diagonal = shift if causal_alignment == "bottom-right" else 0
        right = diagonal if right is None else min(right, diagonal)
    reach = queries + keys + 1
    return KeyBand(
        left=None if left is None else max(left, -reach), right=None if right is None else min(right, reach)
    )
