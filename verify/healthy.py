"""Correct implementations by others' hands, for calibration.

Plain torch, and torch's own attention on the CPU.

None of them shares code with the suite's kernels. What they must declare stands beside each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnproof.properties.contract import Contract, promises

__all__ = ["plain_attention", "plain_logsumexp", "plain_softmax_rows", "sdpa_flash", "sdpa_math"]

# 0·NaN in the second matmul: what plain torch does with keys that are masked.
_LEAKING = Contract(
    family="softmax",
    options=("causal", "softcap", "bias", "return_lse"),
    unseen_nonfinite="may-leak",
    differentiable=False,
)


def _mask(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor | None:
    m, n = q.shape[2], k.shape[2]
    if not causal:
        return None
    return torch.arange(n)[None, :] <= torch.arange(m)[:, None] + (n - m)


@promises(_LEAKING)
def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with float32 internals, one torch operation a step; shapes as in the contract."""
    group = q.shape[1] // k.shape[1]
    s = (q.float() @ k.float().repeat_interleave(group, 1).transpose(-1, -2)) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.float()
    mask = _mask(q, k, causal)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.softmax(s, -1).masked_fill((lse == -torch.inf)[..., None], 0.0)
    o = (p @ v.float().repeat_interleave(group, 1)).to(q.dtype)
    return (o, lse) if return_lse else o


def _sdpa(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor:
    if not q.numel() or not k.numel() or not v.numel():
        raise NotImplementedError("torch's attention is not called with empty tensors here")
    group = q.shape[1] // k.shape[1]
    mask = _mask(q, k, options["causal"])
    bias = options["bias"]
    if bias is not None:
        shape = (*q.shape[:3], k.shape[2])
        bias = bias.expand(shape).contiguous()
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    try:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options["scale"])
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise NotImplementedError(str(error)) from error
        raise


_SDPA = Contract(
    family="softmax",
    options=("causal", "bias"),
    unseen_nonfinite="may-leak",
    empty_row="undefined",
    differentiable=False,
)


@promises(_SDPA)
def sdpa_math(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Torch's attention by its math backend."""
    return _sdpa(SDPBackend.MATH, q, k, v, scale=scale, causal=causal, bias=bias)


@promises(_SDPA)
def sdpa_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Torch's attention by its flash backend for CPUs; cases that it has no kernel for are declined."""
    return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, scale=scale, causal=causal, bias=bias)


@promises(Contract(family="logsumexp"))
def plain_logsumexp(x: torch.Tensor) -> torch.Tensor:
    """log Σ e^x over the last axis by torch, in float32."""
    if not x.shape[-1]:
        return x.new_full(x.shape[:-1], -torch.inf)
    return torch.logsumexp(x.float(), -1).to(x.dtype)


@promises(Contract(family="softmax_rows"))
def plain_softmax_rows(x: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis by torch, in float32; rows without entries are 0."""
    wide = x.float()
    empty = (wide == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(wide, -1).masked_fill(empty, 0.0).to(x.dtype)
