"""How far softmax attention and its gradients may be from the exact ones, from where a kernel rounds.

First-order propagation, term by term, of the roundings of attnproof's kernels through the forward and
backward formulas, in float64, with every head's keys spelled out. The expected values come from torch's
autograd through the formula as a test writes it; only sizes of errors come from here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDOFF)
SINGLE = 2.0**-24
# half the distance of neighbouring subnormals: what rounding costs where a value is small
UNDERFLOW = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
# of the largest entry of a tile: what float16 loses of score gradients and weights scaled to its top binade
SCALED_UNDERFLOW = 2.0**-39


class Errors(NamedTuple):
    """Of one softmax attention, by query head: o (B,H,M,E), delta (B,H,M), and gradients before they are
    rounded to the inputs' dtype: dq (B,H,M,D), dk (B,H,N,D), dv (B,H,N,E); and the exact dS (B,H,M,N), P.
    """

    o: Tensor
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    p: Tensor
    p_error: Tensor


def visible(queries: int, keys: int, causal: bool) -> Tensor:
    """(M,N): which keys a query sees, aligned bottom right."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    return j <= i + keys - queries if causal else torch.ones(queries, keys, dtype=torch.bool)


def softmax(s: Tensor, seen: Tensor) -> Tensor:
    """P (B,H,M,N) in s's dtype; zeros in rows that see nothing, with zero gradients."""
    s = s.masked_fill(~seen, -1e300)
    e = torch.where(seen, torch.exp(s - s.detach().amax(-1, keepdim=True)), 0.0) if s.shape[-1] else s
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total)


def attention_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    seen: Tensor,
    dtype: torch.dtype,
    o_roundoff: float,
    q_error: Tensor | float = 0.0,
    k_error: Tensor | float = 0.0,
    v_error: Tensor | float = 0.0,
) -> Errors:
    """Errors for exact operands (B,H,·,·) in float64, of which the kernel holds some within an error.

    ``o_roundoff`` is that of the o from which the backward pass forms delta.
    """
    u, half, tiny = SINGLE, ROUNDOFF[dtype], UNDERFLOW[dtype]
    queries, width = q.shape[2:]
    keys, value_width = v.shape[2:]
    stored = 0.0 if dtype == torch.float32 else half
    q_error, k_error, v_error = (
        torch.zeros_like(x) + error for x, error in ((q, q_error), (k, k_error), (v, v_error))
    )
    # a score: D terms and at most 8 more roundings, of operands that are wrong themselves
    ds = (width + 8) * u * q.abs() @ k.abs().mT + q.abs() @ k_error.mT + q_error @ (k.abs() + k_error).mT
    ds = (abs(scale) * ds).masked_fill(~seen, 0.0)
    ds = ds.amax(-1, keepdim=True) if keys else ds.sum(-1, keepdim=True)
    # a weight: its own score and its normaliser's, both sums, exp, the division
    relative = torch.expm1(2 * ds + 2 * (keys + 8) * u)
    p = softmax(scale * q @ k.mT, seen)
    # the forward pass stores weights before their division by a sum of at least 1
    forward = (relative + stored) * p + tiny * seen
    o = p @ v
    o_error = forward @ (v.abs() + v_error) + p @ v_error
    o_held = o_error + o_roundoff * (o.abs() + o_error) + tiny
    dp, dp_size = g @ v.mT, g.abs() @ v.abs().mT
    dp_error = (value_width + 1) * u * dp_size + g.abs() @ v_error.mT
    delta = (g * o).sum(-1)
    delta_error = (g.abs() * (o_held + (value_width + 1) * u * o.abs())).sum(-1)
    gap = dp - delta[..., None]
    gap_error = dp_error + delta_error[..., None] + u * gap.abs()
    d_scores = p * gap
    d_error = relative * d_scores.abs() + p * (1 + relative) * gap_error
    d_error = d_error + (stored + 3 * u) * (d_scores.abs() + d_error)
    if d_error.numel():
        d_error = d_error + SCALED_UNDERFLOW * (d_scores.abs() + d_error).amax() * seen
    p_error = relative * p + u * p
    size = abs(scale)
    dq = d_error @ (k.abs() + k_error) + d_scores.abs() @ (k_error + (keys + 2) * u * k.abs())
    dk = d_error.mT @ (q.abs() + q_error) + d_scores.abs().mT @ (q_error + (queries + 2) * u * q.abs())
    weight = p_error + stored * p + SCALED_UNDERFLOW * seen
    dv = weight.mT @ g.abs() + (queries + 2) * u * p.mT @ g.abs()
    return Errors(o_error, delta_error, size * dq, size * dk, dv, p, p_error)


def rounded(error: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """``error`` and that of one rounding of the result to ``dtype``."""
    return error + ROUNDOFF[dtype] * (exact.abs() + error) + UNDERFLOW[dtype]


def per_group(x: Tensor, groups: int) -> Tensor:
    """(B,H,…) summed over the query heads of each of ``groups`` key/value heads."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).sum(2)


def worst(got: Tensor, exact: Tensor, allowed: Tensor) -> float:
    """The largest error in units of what is allowed; 0 for nothing."""
    assert got.shape == exact.shape == allowed.shape
    assert got.isfinite().all()
    return ((got.double() - exact).abs() / allowed).max().item() if got.numel() else 0.0
