"""Pointwise attention in float64 by autograd, and how far a kernel that rounds as ours may be from it.

Everything follows from where the kernels round; nothing is tuned. With u = 2^-24 for float32 arithmetic and
u_t for the dtype t of the inputs (stored weights, dS and results):

* a score is an inner product of D terms, scaled, and has an offset added, constants rounded: its error is
  ds ≤ (D + 6)·u·(Σ |scale·q·k| + |offset|);
* a :class:`Weight` says how far that moves w and w', its own evaluation included;
* dP = dO Vᵀ has E terms: (E + 1)·u·|dO||V|ᵀ;
* a weight or dS stored for a matmul is off by u_t of itself more; float16 weights below 2^-14 by 2^-25;
* a sum of n terms by (n + 3)·u of the sum of their sizes; a result by u_t of itself, by half the smallest
  subnormal, and by nothing else.

Products of two such errors are below 2 % of their sum, since none exceeds 2^-8 of its term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

U32 = 2.0**-24
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
HALF_SUBNORMAL = {torch.float32: 2.0**-126, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-126}
DTYPES = list(ROUNDOFF)
NAMES = ("o", "dq", "dk", "dv")


class Weight(NamedTuple):
    """w and w' of exact scores s, and the errors of both for scores that are off by at most ds."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    value_error: Callable[[Tensor, Tensor], Tensor]
    slope_error: Callable[[Tensor, Tensor], Tensor]


def tensors(
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 1,
    h: int = 2,
    g: int = 2,
    m: int = 37,
    n: int = 53,
    d: int = 16,
    e: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(b, h, m, d).to(dtype),
        torch.randn(b, g, n, d).to(dtype),
        torch.randn(b, g, n, e).to(dtype),
    )


def visible(queries: int, keys: int, causal: bool) -> Tensor:
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    return (j <= i + keys - queries) | torch.tensor(not causal)


def gradients(entry: Any, q: Tensor, k: Tensor, v: Tensor, do: Tensor, **options: Any) -> list[Tensor]:
    """o, dq, dk, dv of ``entry``."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = entry(*leaves, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def exact(
    weight: Weight,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    *,
    scale: float,
    offset: float = 0.0,
    divisor: float = 1.0,
    causal: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """o, dq, dk, dv in float64, and the largest error of each that the rounding above allows."""
    group = q.shape[1] // k.shape[1]
    u, tiny = ROUNDOFF[q.dtype], HALF_SUBNORMAL[q.dtype]
    seen = visible(q.shape[2], k.shape[2], causal).double()

    def naive(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        return (weight.value(scale * q @ k.mT + offset) * seen) @ v / divisor

    q, k, v, do = (x.detach().double() for x in (q, k, v, do))
    want = gradients(naive, q, k, v, do)

    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = scale * q @ k.mT + offset
    ds = (q.shape[3] + 6) * U32 * (abs(scale) * q.abs() @ k.abs().mT + abs(offset))
    p, slope = weight.value(s).abs() * seen, weight.slope(s).abs() * seen
    stored = 0.0 if u == U32 else u
    # one sum: terms wrong by their own error, and the roundings of adding them
    dp = weight.value_error(s, ds) * seen + stored * p + (2.0**-25 * seen if u == 2.0**-11 else 0.0)
    size = do.abs() @ v.abs().mT
    dscore = (weight.slope_error(s, ds) * seen + (stored + (v.shape[3] + 2) * U32) * slope) * size

    def added(error: Tensor, term: Tensor, other: Tensor, factor: float, terms: int) -> Tensor:
        return factor * (error + (terms + 3) * U32 * term) @ other.abs()

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (x.shape[1] // group, group)).sum(2)

    rows, keys, factor = group * q.shape[2], k.shape[2], abs(scale / divisor)
    errors = [
        added(dp, p, v, 1 / divisor, keys),
        added(dscore, slope * size, k, factor, keys),
        grouped(added(dscore.mT, (slope * size).mT, q, factor, rows)),
        grouped(added(dp.mT, p.mT, do, 1 / divisor, rows)),
    ]
    return want, [1.02 * e + u * x.abs() + tiny for e, x in zip(errors, want, strict=True)]


def assert_within(got: list[Tensor], want: list[Tensor], errors: list[Tensor], dtype: torch.dtype) -> None:
    for name, x, y, error in zip(NAMES, got, want, errors, strict=True):
        assert x.dtype == dtype
        assert x.shape == y.shape
        assert x.isfinite().all(), f"{name} is not finite"
        worst = ((x.double() - y).abs() / error).max().item() if x.numel() else 0.0
        assert worst <= 1, f"{name} is off by {worst:.3g} times the tolerance"
