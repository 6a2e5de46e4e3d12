"""Correct attention of every family that autograd differentiates, for the calibration of gradients.

Plain torch: tensors in the inputs' dtype are read into float32, every step is float32, and each output and
gradient is rounded once, at the boundary. The ``stored_…`` variants round what a kernel for tensor cores
holds in the inputs' dtype: computed operands, P, and in the backward pass dP and dS. None shares code with
the suite's kernels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from attnproof.properties.contract import Contract, Precision, promises

__all__ = [
    "autograd_attention",
    "autograd_batch_normalised",
    "autograd_differential",
    "autograd_easy",
    "autograd_relu",
    "autograd_scaled_head",
    "autograd_sigmoid",
    "flash_attention",
    "stored_attention",
    "stored_batch_normalised",
    "stored_differential",
    "stored_easy",
    "stored_relu",
    "stored_scaled_head",
    "stored_sigmoid",
]

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class _Stored(torch.autograd.Function):
    """Round what passes through to ``dtype``, forward, backward, or both."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype, values: bool, gradients: bool) -> torch.Tensor:
        ctx.dtype, ctx.gradients = dtype, gradients
        return x.to(dtype).float() if values else x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return (gradient.to(ctx.dtype).float() if ctx.gradients else gradient), None, None, None


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where an implementation rounds to the inputs' dtype; nowhere if ``on`` is false."""

    dtype: torch.dtype
    on: bool

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        """An operand that was computed."""
        return _Stored.apply(x, self.dtype, True, False) if self.on else x  # type: ignore[no-untyped-call]

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Scores, whose gradient dS is stored."""
        return _Stored.apply(x, self.dtype, False, True) if self.on else x  # type: ignore[no-untyped-call]

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights P, stored, and their gradient dP as well."""
        return _Stored.apply(x, self.dtype, True, True) if self.on else x  # type: ignore[no-untyped-call]


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Float32, each key/value head once for each query head that reads it."""
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def _positions(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(m)[:, None] + (n - m), torch.arange(n)[None, :]


def _seen(
    m: int, n: int, causal: bool, window: Any = None, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    i, j = _positions(m, n)
    seen = torch.ones(m, n, dtype=torch.bool)
    if causal:
        seen = seen & (j <= i)
    left, right = window or (None, None)
    if left is not None:
        seen = seen & (j >= i - left)
    if right is not None:
        seen = seen & (j <= i + right)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].long()
        piece = torch.searchsorted(ends, torch.arange(n), right=True)
        seen = seen & (piece[:, None] == piece[None, :])
    return seen


def _softmax(s: torch.Tensor, sinks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and log-sum-exp of scores that may be −inf throughout; gradients stay finite there."""
    column = s.new_full((*s.shape[:-1], 1), -torch.inf)
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(column.shape)
    s = torch.cat([s, column], -1)
    m = s.detach().amax(-1, keepdim=True)
    m = torch.where(m == -torch.inf, 0.0, m)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, m + torch.log(safe)).squeeze(-1)
    return (e / safe)[..., :-1], lse


_OPTIONS = ("causal", "window", "softcap", "bias", "alibi_slopes", "sinks", "cu_seqlens", "return_lse")
_SOFTMAX = Contract(family="softmax", options=_OPTIONS, unseen_nonfinite="may-leak")


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    stored: bool = False,
) -> Result:
    storage = Storage(q.dtype, stored)
    m, n, heads = q.shape[2], k.shape[2], q.shape[1]
    s = (
        storage.operand(q.float() * scale) @ _heads(k, heads).mT
        if stored
        else (q.float() @ _heads(k, heads).mT) * scale
    )
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.float()
    if alibi_slopes is not None:
        i, j = _positions(m, n)
        s = s - alibi_slopes.reshape(1, -1, 1, 1) * (i - j).abs()
    s = storage.scores(s).masked_fill(~_seen(m, n, causal, window, cu_seqlens), -torch.inf)
    p, lse = _softmax(s, sinks)
    o = (storage.weights(p) @ _heads(v, heads)).to(q.dtype)
    return (o, lse) if return_lse else o


@promises(_SOFTMAX)
def autograd_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Result:
    """Softmax attention, every step float32."""
    return _attention(q, k, v, **options)


@promises(_SOFTMAX)
def stored_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Result:
    """Softmax attention with scaled queries, P, dP and dS in the inputs' dtype."""
    return _attention(q, k, v, stored=True, **options)


class _Flash(torch.autograd.Function):
    """The backward pass of flash attention: P from the log-sum-exp, δ from the stored output."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s = ((q.float() @ _heads(k, q.shape[1]).mT) * scale).masked_fill(~seen, -torch.inf)
        p, lse = _softmax(s)
        o = (p.to(q.dtype).float() @ _heads(v, q.shape[1])).to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse, seen)
        ctx.scale = scale
        return o, lse

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        do, dlse = cotangents
        q, k, v, o, lse, seen = ctx.saved_tensors
        heads, groups, dtype = q.shape[1], k.shape[1], q.dtype
        keys, values = _heads(k, heads), _heads(v, heads)
        s = ((q.float() @ keys.mT) * ctx.scale).masked_fill(~seen, -torch.inf)
        p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        delta = (do.float() * o.float()).sum(-1) - dlse
        ds = (p * (do.float() @ values.mT - delta[..., None])).to(dtype).float()

        def together(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0], groups, heads // groups * x.shape[2], x.shape[3])

        dq = (ds @ keys) * ctx.scale
        dk = (together(ds).mT @ together(q.float())) * ctx.scale
        dv = together(p.to(dtype).float()).mT @ together(do.float())
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None


@promises(
    Contract(
        family="softmax",
        options=("causal", "window", "return_lse"),
        unseen_nonfinite="may-leak",
        precision=Precision(matmul_input="ieee"),
    )
)
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    return_lse: bool = False,
) -> Result:
    """Softmax attention whose backward pass is flash attention's (Dao et al. 2022, Algorithm 4)."""
    seen = _seen(q.shape[2], k.shape[2], causal, window)
    o, lse = _Flash.apply(q, k, v, scale, seen)  # type: ignore[no-untyped-call]
    return (o, lse) if return_lse else o


_SIGMOID = Contract(
    family="sigmoid",
    options=("causal", "bias"),
    unseen_nonfinite="may-leak",
    # torch's own backward is dP (1 − y) y, of a y that is rounded to float32.
    without=("saturated-slope",),
)


def _pointwise_scores(q: torch.Tensor, k: torch.Tensor, scale: float, storage: Storage) -> torch.Tensor:
    if storage.on:
        return storage.scores(storage.operand(q.float() * scale) @ _heads(k, q.shape[1]).mT)
    return (q.float() @ _heads(k, q.shape[1]).mT) * scale


def _mixed(
    weights: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, storage: Storage
) -> torch.Tensor:
    """Σ over the keys seen of weight times value, float32."""
    weights = weights.masked_fill(~_seen(q.shape[2], k.shape[2], causal), 0.0)
    return storage.weights(weights) @ _heads(v, q.shape[1])


def _sigmoid(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: float | None,
    causal: bool,
    stored: bool,
) -> torch.Tensor:
    storage = Storage(q.dtype, stored)
    shift = -math.log(max(k.shape[2], 1)) if bias is None else bias
    weights = torch.sigmoid(_pointwise_scores(q, k, scale, storage) + shift)
    return _mixed(weights, q, k, v, causal, storage).to(q.dtype)


@promises(_SIGMOID)
def autograd_sigmoid(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    bias: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Sigmoid attention, every step float32."""
    return _sigmoid(q, k, v, scale, bias, causal, stored=False)


@promises(_SIGMOID)
def stored_sigmoid(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    bias: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Sigmoid attention with scaled queries, P, dP and dS in the inputs' dtype."""
    return _sigmoid(q, k, v, scale, bias, causal, stored=True)


_RELU = Contract(family="relu", options=("causal", "normalizer", "power"), unseen_nonfinite="may-leak")


def _relu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    normalizer: float | None = None,
    power: int = 1,
    stored: bool = False,
) -> torch.Tensor:
    storage = Storage(q.dtype, stored)
    weights = torch.relu(_pointwise_scores(q, k, scale, storage))
    weights = weights * weights if power == 2 else weights
    return (_mixed(weights, q, k, v, causal, storage) / (normalizer or 1.0)).to(q.dtype)


@promises(_RELU)
def autograd_relu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """ReLU attention, every step float32."""
    return _relu(q, k, v, **options)


@promises(_RELU)
def stored_relu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """ReLU attention with scaled queries, P, dP and dS in the inputs' dtype."""
    return _relu(q, k, v, stored=True, **options)


_NORMALISED = Contract(family="batch_normalised", options=("beta", "variance"), unseen_nonfinite="may-leak")


def _batch_normalised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    eps: float,
    beta: torch.Tensor | None = None,
    variance: bool = True,
    stored: bool = False,
) -> torch.Tensor:
    storage, heads, n = Storage(q.dtype, stored), q.shape[1], max(k.shape[2], 1)
    keys = _heads(k, heads)
    mean = keys.sum(2, keepdim=True) / n
    # Two passes: E[x²] − E[x]² would cancel.
    deviation = torch.sqrt((keys - mean).square().sum(2, keepdim=True) / n + eps)
    shift = mean if beta is None else beta.float().reshape(1, -1, 1, 1) * mean
    divisor = deviation if variance else torch.ones_like(deviation)
    queries, keys = (q.float() - shift) / divisor, (keys - shift) / divisor
    s = storage.scores((storage.operand(queries) @ storage.operand(keys).mT) * scale)
    p, _ = _softmax(s)
    return (storage.weights(p) @ _heads(v, heads)).to(q.dtype)


@promises(_NORMALISED)
def autograd_batch_normalised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Batch-normalised attention, every step float32."""
    return _batch_normalised(q, k, v, **options)


@promises(_NORMALISED)
def stored_batch_normalised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Batch-normalised attention with normalised q and k, P, dP and dS in the inputs' dtype."""
    return _batch_normalised(q, k, v, stored=True, **options)


_POOLED = Contract(family="scaled_head", unseen_nonfinite="may-leak")


def _scaled_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, pool: tuple[int, ...], stored: bool
) -> torch.Tensor:
    storage, heads, n = Storage(q.dtype, stored), q.shape[1], k.shape[2]
    keys, values = _heads(k, heads), _heads(v, heads)
    outputs = []
    for head, window in enumerate(pool):
        count = -(-n // window)
        member = (torch.arange(n)[None, :] // window == torch.arange(count)[:, None]).float()
        sizes = member.sum(1, keepdim=True)
        pooled_k = storage.operand((member @ keys[:, head]) / sizes)
        pooled_v = storage.operand((member @ values[:, head]) / sizes)
        s = storage.scores((q[:, head].float() @ pooled_k.mT) * scale)
        p, _ = _softmax(s)
        outputs.append(storage.weights(p) @ pooled_v)
    return torch.stack(outputs, 1).to(q.dtype)


@promises(_POOLED)
def autograd_scaled_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, pool: tuple[int, ...]
) -> torch.Tensor:
    """Scaled-head attention, every step float32."""
    return _scaled_head(q, k, v, scale, pool, stored=False)


@promises(_POOLED)
def stored_scaled_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, pool: tuple[int, ...]
) -> torch.Tensor:
    """Scaled-head attention with pooled k and v, P, dP and dS in the inputs' dtype."""
    return _scaled_head(q, k, v, scale, pool, stored=True)


_DIFFERENTIAL = Contract(family="differential", options=("causal",), unseen_nonfinite="may-leak")


def _differential(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    scale: float,
    causal: bool,
    stored: bool,
) -> torch.Tensor:
    storage, width, heads = Storage(q.dtype, stored), q.shape[3] // 2, q.shape[1]
    keys, values, parts = _heads(k, heads), _heads(v, heads), []
    hidden = ~_seen(q.shape[2], k.shape[2], causal)
    for half in (slice(0, width), slice(width, 2 * width)):
        s = storage.operand(q[..., half].float() * scale) if stored else q[..., half].float()
        s = s @ keys[..., half].mT * (1.0 if stored else scale)
        p, _ = _softmax(storage.scores(s).masked_fill(hidden, -torch.inf))
        parts.append(storage.weights(p) @ values)
    return (parts[0] - lam.float().reshape(1, -1, 1, 1) * parts[1]).to(q.dtype)


@promises(_DIFFERENTIAL)
def autograd_differential(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """Differential attention, every step float32."""
    return _differential(q, k, v, lam, scale, causal, stored=False)


@promises(_DIFFERENTIAL)
def stored_differential(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """Differential attention with scaled queries, P, dP and dS in the inputs' dtype."""
    return _differential(q, k, v, lam, scale, causal, stored=True)


_EASY = Contract(family="easy", options=("band",), unseen_nonfinite="may-leak")


def _banded(alpha: torch.Tensor, band: int | None) -> torch.Tensor:
    n = alpha.shape[-1]
    i, j = _positions(n, n)
    return alpha if band is None else alpha.masked_fill((i - j).abs() > band, 0.0)


@promises(_EASY)
def autograd_easy(alpha: torch.Tensor, v: torch.Tensor, *, band: int | None = None) -> torch.Tensor:
    """Easy attention by one matrix product."""
    return (_banded(alpha.float(), band) @ v.float()).to(v.dtype)


@promises(_EASY)
def stored_easy(alpha: torch.Tensor, v: torch.Tensor, *, band: int | None = None) -> torch.Tensor:
    """Easy attention by tiles of 32 keys, one after the other."""
    weights, values = _banded(alpha.float(), band), v.float()
    total = weights[..., :0] @ values[:, :, :0]
    for start in range(0, v.shape[2], 32):
        tile = slice(start, start + 32)
        total = total + weights[..., tile] @ values[:, :, tile]
    return total.to(v.dtype)
