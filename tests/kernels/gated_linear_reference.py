"""Gated linear attention, retention and RWKV-6 step by step in float64, and how far a kernel may be from it.

Every output and every gradient is a sum of monomials scale·q·k·v·do·exp(Σ g), so that rounding is measured
against the same sum of absolute values, the same loop on |q|, |k|, …. With u = 2^-24, u_t the unit roundoff
of the inputs' dtype and n the number of positions, the kernels' roundings of one monomial are:

* its gates: sums of at most 32 of them at a time, each exponent rounded twice more: an argument off by
  36·u of itself, which is no more than gates that are smaller by that factor;
* its exponentials, one for each of at most n/16 + 3 blocks, by 2 ulp, and the products with them: 6·u each;
* its sums over positions, key channels and value channels: (n + D + E)·u, and 16·u for single products;
* operands of matmuls, 3·u_t for half precision: (k, S and q) on the way from k through a state to o, (k, S)
  or (q, dS) to gradients of q, k and g;
* an exponential below float32's normal numbers: 2^-126, whatever the gates are;
* the result, u_t of itself and half its smallest subnormal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

U32 = 2.0**-24
ROUNDOFF = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
HALF_SUBNORMAL = {
    torch.float64: 0.0,
    torch.float32: 2.0**-150,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
}
GATE_STEPS = 36
NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dstate")
NAMES_WITH_BONUS = (*NAMES[:-1], "du", "dstate")


class Inputs(NamedTuple):
    """One call: tensors as a kernel gets them; u and cu_seqlens may be None."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    u: Tensor | None
    initial: Tensor
    do: Tensor
    dstate: Tensor
    cu_seqlens: Tensor | None = None


def inputs(
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 1,
    h: int = 2,
    n: int = 70,
    d: int = 20,
    e: int = 12,
    scalar: bool = False,
    bonus: bool = False,
    cu_seqlens: list[int] | None = None,
) -> Inputs:
    """Normal numbers and gates between −0.5 and 0, the tensors that a test then changes."""
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    return Inputs(
        torch.randn(b, h, n, d).to(dtype),
        torch.randn(b, h, n, d).to(dtype),
        torch.randn(b, h, n, e).to(dtype),
        -torch.rand(b, h, n, *(() if scalar else (d,))) / 2,
        torch.randn(h, d).to(dtype) if bonus else None,
        torch.randn(sequences, h, d, e),
        torch.randn(b, h, n, e).to(dtype),
        torch.randn(sequences, h, d, e),
        None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
    )


def naive(given: Inputs, scale: float) -> tuple[Tensor, Tensor]:
    """(o, final states) by the recurrence."""
    q, k, v, g, u, initial, _, _, cu_seqlens = given
    g = g[..., None] if g.ndim == 3 else g
    length = q.shape[2]
    if cu_seqlens is None:
        pieces = [(b, 0, length) for b in range(q.shape[0])]
    else:
        ends = cu_seqlens.tolist()
        pieces = [(0, start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]
    rows: list[list[Tensor]] = [[] for _ in range(q.shape[0])]
    states = []
    for (b, start, stop), state in zip(pieces, initial, strict=True):
        for t in range(start, stop):
            pair = k[b, :, t, :, None] * v[b, :, t, None, :]
            after = torch.exp(g[b, :, t])[..., None] * state + pair
            seen = after if u is None else state + u[:, :, None] * pair
            rows[b].append(scale * (q[b, :, t, :, None] * seen).sum(-2))
            state = after
        states.append(state)
    o = torch.stack([torch.stack(x, 1) for x in rows]) if length else v * 0
    return o, torch.stack(states) if states else initial


def results(call: Any, given: Inputs) -> list[Tensor]:
    """o, the final state, and the gradients of all floating inputs but those that are None."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in given[:6]]
    o, state = call(given._replace(**dict(zip(Inputs._fields, leaves, strict=False))))
    asked = [x for x in leaves if x is not None]
    found = torch.autograd.grad((o, state), asked, (given.do, given.dstate), materialize_grads=True)
    return [o.detach(), state.detach(), *found]


def exact(given: Inputs, scale: float, dtype: torch.dtype) -> list[list[Tensor]]:
    """[value, allowed error] of everything that :func:`results` returns."""
    wide = Inputs(*(x.double() if x is not None and x.is_floating_point() else x for x in given))
    want = results(lambda x: naive(x, scale), wide)
    sizes = Inputs(*(x if name in ("g", "cu_seqlens") or x is None else x.abs()
                     for name, x in zip(Inputs._fields, wide, strict=True)))  # fmt: skip

    def total(g: Tensor) -> list[Tensor]:
        return results(lambda x: naive(x, abs(scale)), sizes._replace(g=g))

    plain, slower, undecayed = (
        total(wide.g),
        total(wide.g * (1 - GATE_STEPS * U32)),
        total(torch.zeros_like(wide.g)),
    )
    n, d, e = given.q.shape[2], given.q.shape[3], given.v.shape[3]
    half = 0.0 if dtype == torch.float32 else 3 * ROUNDOFF[dtype]
    relative = 1.02 * half + (n + d + e + 16 + 6 * (n / 16 + 3)) * U32
    stored = [given.q, given.initial, given.q, given.k, given.v, given.g]
    stored += ([] if given.u is None else [given.u]) + [given.initial]
    bounds = []
    for value, a, b, c, like in zip(want, plain, slower, undecayed, stored, strict=True):
        error = (b - a).abs() + relative * b + 2.0**-126 * c
        bounds.append(
            [value, error + ROUNDOFF[like.dtype] * (value.abs() + error) + HALF_SUBNORMAL[like.dtype]]
        )
    return bounds


def assert_within(got: list[Tensor], bounds: list[list[Tensor]], *, names: tuple[str, ...] = NAMES) -> float:
    """The largest error in units of what is allowed; raises where that is above 1."""
    largest = 0.0
    for name, x, (value, error) in zip(names, got, bounds, strict=True):
        assert x.shape == value.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        worst = ((x.double() - value).abs() / error).max().item() if x.numel() else 0.0
        assert worst <= 1, f"{name} is off by {worst:.3g} times what rounding allows"
        largest = max(largest, worst)
    return largest
