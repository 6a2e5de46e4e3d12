"""H3: a shift and a diagonal state space around a product, as attention without a softmax.

    k'_t = Σ_{i<T} taps_i ∘ k_{t−i} + d_shift ∘ k_t,
    o_t = Σ_{s ≤ t} (q_t·k'_s) (K_{t−s} + [s = t] d_diag) v_s,   K_i = Re Σ_r c_r a_r^i b_r

(Fu et al., "Hungry Hungry Hippos: Towards Language Modeling with State Space Models", arXiv 2212.14052;
theory H3-1.) :func:`attention` forms the scores q_t·k'_s in tiles and weights them by their lag, so that the
outer products k'_s v_sᵀ and their states are never stored; N² scores a head. :func:`composed` stores them:
the keys' filter is a Toeplitz product, each of the D·E products a channel of a state space that goes through
:func:`attnproof.kernels.ssm.scan`, and q contracts what comes out. Both compute in float32 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import check_floating
from attnproof.kernels.h3_backward import filtered, tap_gradients, weight_gradients, weighted
from attnproof.kernels.ssm import check_diagonal, check_like, scan
from attnproof.kernels.ssm_convolution import product, responses, toeplitz
from attnproof.properties.contract import Contract, ContractError, Supports, promises

__all__ = ["attention", "composed"]

H3 = Contract(family="h3")
# Every pair of a key's and a value's channel is a channel of the state space here.
COMPOSED = Contract(family="h3", supports=Supports(max_head_dim=16))

Diagonal = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    taps: torch.Tensor,
    diagonal: Diagonal,
    skips: tuple[torch.Tensor | None, torch.Tensor | None],
    kernel: str,
) -> None:
    """Raise unless the arguments of a call fit together."""
    check_floating("q", q, kernel)
    if q.ndim != 4:
        raise ContractError(
            f"{kernel}: q has shape {tuple(q.shape)}: expected 4 axes (batch, heads, length, width)"
        )
    batch, heads, length, width = q.shape
    check_like("k", k, (tuple(q.shape),), q, kernel)
    check_floating("v", v, kernel)
    check_like("v", v, ((batch, heads, length, v.shape[-1] if v.ndim else 0),), q, kernel)
    check_floating("taps", taps, kernel)
    check_like("taps", taps, ((heads, width, taps.shape[-1] if taps.ndim else 0),), q, kernel)
    check_diagonal(*diagonal, q, heads, kernel)
    for name, x, shape in (("d_shift", skips[0], (heads, width)), ("d_diag", skips[1], (heads,))):
        if x is not None:
            check_like(name, x, (shape,), q, kernel)


class Filter(torch.autograd.Function):
    """k (B,H,N,D), taps (H,D,T), d_shift (H,D) or None to k' (B,H,N,D) in float32."""

    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, taps: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(k, taps, skip)
        return filtered(k, taps, skip, reverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        k, taps, skip = ctx.saved_tensors
        dk = dtaps = dskip = None
        if ctx.needs_input_grad[0]:
            dk = filtered(dy, taps, skip, reverse=True).to(k.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            lags = tap_gradients(k, dy, max(1, taps.shape[2]))
            dtaps = lags[..., : taps.shape[2]].to(taps.dtype)
            dskip = None if skip is None else lags[..., 0].to(skip.dtype)
        return dk, dtaps, dskip


class LagAttention(torch.autograd.Function):
    """q, k' (B,H,N,D), v (B,H,N,E) and weights w (H,N) to Σ_{s ≤ t} (q_t·k'_s) w_{t−s} v_s."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, w)
        return weighted(q, k, v, w, q, reverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, w = ctx.saved_tensors
        need_q, need_k, need_v, need_w = ctx.needs_input_grad
        return (
            weighted(do, v, k, w, q, reverse=False) if need_q else None,
            weighted(v, do, q, w, k, reverse=True) if need_k else None,
            weighted(k, q, do, w, v, reverse=True) if need_v else None,
            weight_gradients(q, k, do, v) if need_w else None,
        )


@promises(H3)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    taps: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d_shift: torch.Tensor | None = None,
    d_diag: torch.Tensor | None = None,
) -> torch.Tensor:
    """H3 in tiles of scores weighted by their lag; differentiable once in every tensor.

    Args:
        q, k: (B,H,N,D), float32, float16 or bfloat16; any strides.
        v: (B,H,N,E).
        taps: filter of the keys, (H,D,T); the first belongs to the position itself.
        a, b, c: the diagonal state space, all (H,R), or all (H,R,2) pairs of real and imaginary part.
        d_shift: skip weights of the filter, (H,D), or None.
        d_diag: skip weight of the state space, (H), or None.

    Returns:
        o (B,H,N,E) of q's dtype.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64.
    """
    check_arguments(q, k, v, taps, (a, b, c), (d_shift, d_diag), "attention")
    wide_a, wide_b, wide_c = (x.float() for x in (a, b, c))
    w = responses(wide_a, product(wide_c, wide_b, pairs=a.ndim == 3)[None], q.shape[2])[0]
    if d_diag is not None:
        w = torch.cat((w[:, :1] + d_diag.float()[:, None], w[:, 1:]), 1)
    skip = None if d_shift is None else d_shift.contiguous()
    filtered_keys = Filter.apply(k, taps.contiguous(), skip)  # type: ignore[no-untyped-call]
    o: torch.Tensor = LagAttention.apply(q, filtered_keys, v, w)  # type: ignore[no-untyped-call]
    return o


@promises(COMPOSED)
def composed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    taps: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d_shift: torch.Tensor | None = None,
    d_diag: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`attention` out of the kernels of state spaces, with D·E channels a head and a state in each.

    Args:
        q, k, v, taps, a, b, c, d_shift, d_diag: as there.

    Returns:
        o (B,H,N,E) of q's dtype.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64.
    """
    check_arguments(q, k, v, taps, (a, b, c), (d_shift, d_diag), "composed")
    batch, heads, length, width = q.shape
    channels = width * v.shape[3]
    wide = k.float().transpose(2, 3)
    keys = toeplitz(taps.float().flatten(0, 1), wide.flatten(1, 2)).view(batch, heads, width, length)
    if d_shift is not None:
        keys = keys + d_shift.float()[:, :, None] * wide
    # (B, H, D, E, N)
    outer = keys[:, :, :, None] * v.float().transpose(2, 3)[:, :, None]

    def each(x: torch.Tensor) -> torch.Tensor:
        return x.float()[:, None].expand(heads, channels, *x.shape[1:]).flatten(0, 1)

    read = scan(
        outer.reshape(batch, heads * channels, length), each(a), each(b), each(c),
        None if d_diag is None else each(d_diag),
    )  # fmt: skip
    assert isinstance(read, torch.Tensor)
    states = read.view(outer.shape)
    return (states * q.float().transpose(2, 3)[:, :, :, None]).sum(2).transpose(2, 3).to(q.dtype)
