"""Linear attention in float64 by autograd, and how far a kernel that rounds as ours may be from it.

Everything follows from where the kernels round; nothing is tuned. With u = 2^-24 for float32 arithmetic, u_t
for the dtype t of the inputs where that is narrow (0 otherwise), and x the entries that a feature map meets:

* a feature is off by (2·max abs(x) + 4)·u of itself: exp to 2 ulp, its argument to 2·abs(x)·u, products;
* on its way into a result a term of a sum meets at most four roundings to t (two features, or one of them and
  the state; a weight; a value over its normaliser), and at most N + F + E + 16 of float32;
* so every sum of products is off by c times the sum of the products' sizes, c = 4 u_t + 2 e_φ + (…)·u;
* the normaliser d is such a sum; a quotient by it is off by δ = c·(its sum of sizes) / abs(d) more;
* r = −dO·o / d is off by what o is off by, times abs(dO) / abs(d), and by δ and c of its size;
* a result is rounded once, to u_t or u of itself, or by half the smallest subnormal.

Products of such errors are covered by dividing by 1 − 2(c + δ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.kernels.pointwise_reference import HALF_SUBNORMAL, ROUNDOFF, U32

MAPS = ("elu1", "relu", "exp", "identity", "taylor", "squared")


def phi(x: Tensor, feature_map: str) -> Tensor:
    """φ(x) (…,F)."""
    width = x.shape[-1]
    if feature_map == "elu1":
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))
    if feature_map == "relu":
        return x.relu()
    if feature_map == "exp":
        return x.exp()
    if feature_map == "identity":
        return x
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2)
    if feature_map == "squared":
        return pairs
    return torch.cat([torch.ones_like(x[..., :1]), x * width**-0.25, pairs * (2 * width) ** -0.5], -1)


@dataclass(frozen=True)
class Problem:
    """Inputs of one call, the cotangents of its outputs, and its options."""

    q: Tensor
    k: Tensor
    v: Tensor
    states: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    feature_map: str
    normalize: bool
    causal: bool

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, *self.states)

    def names(self) -> list[str]:
        states = ["state", "z"][: 2 if self.normalize else 1]
        return ["o", *states, "dq", "dk", "dv", *(f"d{name}" for name in states if self.states)]


def problem(
    dtype: torch.dtype = torch.float32,
    feature_map: str = "elu1",
    *,
    normalize: bool = True,
    causal: bool = True,
    b: int = 1,
    h: int = 2,
    n: int = 70,
    d: int = 12,
    e: int = 20,
    initial: bool = True,
) -> Problem:
    """A drawn problem; features that may be negative are drawn away from a vanishing normaliser."""
    q, k, v, do = (torch.randn(b, h, n, width).to(dtype) for width in (d, d, e, e))
    if normalize and feature_map in ("relu", "identity", "squared"):
        q, k = q.abs() + 0.25, k.abs() + 0.25
    width = phi(q, feature_map).shape[-1]
    shapes = ((b, h, width, e), (b, h, width))[: 2 if normalize else 1]
    states = tuple(torch.rand(shape) + 0.5 for shape in shapes) if initial else ()
    cotangents = (do, *(torch.randn(shape) for shape in shapes))
    return Problem(q, k, v, states, cotangents, feature_map, normalize, causal)


def results(entry: Any, p: Problem, **options: Any) -> list[Tensor]:
    """All outputs of ``entry`` and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in p.inputs]
    state = (tuple(leaves[3:]) if p.normalize else leaves[3]) if p.states else None
    outputs = entry(
        *leaves[:3], feature_map=p.feature_map, normalize=p.normalize, causal=p.causal, initial_state=state,
        return_state=True, **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(outputs, leaves, p.cotangents, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*outputs, *gradients)]


def naive(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: str, normalize: bool, causal: bool, initial_state: Any,
    return_state: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The definition, position by position, in the dtype of its inputs."""
    assert return_state
    x, y = phi(q, feature_map), phi(k, feature_map)
    state, z = initial_state if normalize and initial_state is not None else (initial_state, None)
    state = torch.zeros(*q.shape[:2], x.shape[3], v.shape[3], dtype=q.dtype) if state is None else state
    z = torch.zeros(*q.shape[:2], x.shape[3], dtype=q.dtype) if z is None else z
    after = []
    for t in range(q.shape[2]):
        state, z = state + y[:, :, t, :, None] * v[:, :, t, None, :], z + y[:, :, t]
        after.append((state, z))
    rows = []
    for t in range(q.shape[2]):
        seen, total = after[t] if causal else after[-1]
        o = (x[:, :, t, :, None] * seen).sum(2)
        rows.append(o / (x[:, :, t] * total).sum(2, keepdim=True) if normalize else o)
    o = torch.stack(rows, 2) if rows else v * 1.0
    return (o, state, z) if normalize else (o, state)


def widened(p: Problem) -> Problem:
    """``p`` in float64."""
    return Problem(
        p.q.double(), p.k.double(), p.v.double(), tuple(x.double() for x in p.states),
        tuple(x.double() for x in p.cotangents), p.feature_map, p.normalize, p.causal,
    )  # fmt: skip


def pulled_back(x: Tensor, feature_map: str, error: Tensor) -> Tensor:
    """abs(J)ᵀ error, J the Jacobian of φ at x: products of entries have theirs at abs(x) without a sign."""
    leaf = (x.abs() if feature_map in ("taylor", "squared") else x).detach().requires_grad_()
    return torch.autograd.grad(phi(leaf, feature_map), leaf, error)[0]


def errors(p: Problem, want: list[Tensor]) -> list[Tensor]:
    """The largest error of each of :func:`results` that the rounding above allows; ``want`` is exact."""
    dtype, p = p.q.dtype, widened(p)
    u, tiny = ROUNDOFF[dtype], HALF_SUBNORMAL[dtype]
    x, y = phi(p.q, p.feature_map).abs(), phi(p.k, p.feature_map).abs()
    v, do = p.v.abs(), p.cotangents[0].abs()
    length, wide, values = v.shape[2], x.shape[3], v.shape[3]
    zeros = (torch.zeros(*x.shape[:2], wide, values).double(), torch.zeros(*x.shape[:2], wide).double())
    s0, z0 = (*(s.abs() for s in p.states), *zeros[len(p.states) :])
    ds, dz = (*(s.abs() for s in p.cotangents[1:]), *zeros[len(p.cotangents) - 1 :])
    largest = max(p.q.abs().max().item(), p.k.abs().max().item()) if length else 0.0
    c = 4 * (0.0 if u == U32 else u) + (2 * (2 * largest + 4) + length + wide + values + 16) * U32

    i = torch.arange(length)
    seen = ((i <= i[:, None]) | torch.tensor(not p.causal)).double()
    weights = (x @ y.mT) * seen
    sizes = weights @ v + x @ s0
    o, inverse, delta = want[0].abs(), torch.ones_like(x[..., :1]), torch.zeros_like(x[..., :1])
    if p.normalize:
        signed = (phi(p.q, p.feature_map) @ phi(p.k, p.feature_map).mT) * seen
        signed_z0 = p.states[1] if p.states else zeros[1]
        d = signed.sum(-1, keepdim=True) + phi(p.q, p.feature_map) @ signed_z0[..., None]
        inverse = 1 / d.abs()
        delta = c * (weights.sum(-1, keepdim=True) + x @ z0[..., None]) * inverse
    error_o = c * sizes * inverse + (delta + 4 * U32) * o
    r = (do * o).sum(-1, keepdim=True) * inverse * float(p.normalize)
    error_r = (do * error_o).sum(-1, keepdim=True) * inverse * float(p.normalize) + r * (delta + c)
    error_s = ((do * inverse @ v.mT + r) * (c + delta) + error_r) * seen
    error_z0 = r * (c + delta) + error_r
    dx = error_s @ y + (c + delta) * inverse * (do @ s0.mT) + error_z0 * z0[:, :, None]
    dy = error_s.mT @ x + c * (v @ ds.mT) + c * dz[:, :, None]
    dv = (weights * (c + delta) * inverse).mT @ do + c * (y @ ds)
    out = [error_o, c * (s0 + y.mT @ v), c * (z0 + y.sum(2))][: len(p.cotangents)]
    out += [
        pulled_back(at, p.feature_map, error) + c * grad.abs()
        for at, error, grad in zip((p.q, p.k), (dx, dy), want[len(out) :], strict=False)
    ]
    out += [
        dv, c * ds + x.mT @ (do * inverse * (c + delta)), c * dz + (x * error_z0).sum(2)
    ][: 1 + len(p.states)]  # fmt: skip
    second = 1 - 2 * (c + delta.max().item() if length else c)
    assert second > 0.5
    wide_results = [name.lstrip("d") in ("state", "z") for name in p.names()]
    return [
        e / second + (U32 if state else u) * x.abs() + (2.0**-126 if state else tiny)
        for e, x, state in zip(out, want, wide_results, strict=True)
    ]


def assert_within(p: Problem, got: list[Tensor], **changes: Any) -> float:
    """Every result of ``got`` within its error of the exact one; the largest error over its bound."""
    want = results(naive, widened(p))
    worst = 0.0
    for name, x, y, error in zip(p.names(), got, want, errors(p, want), strict=True):
        assert x.dtype == (torch.float32 if name.lstrip("d") in ("state", "z") else p.q.dtype), name
        assert x.shape == y.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        ratio = ((x.double() - y).abs() / error).max().item() if x.numel() else 0.0
        assert ratio <= 1, f"{name} is off by {ratio:.3g} times the tolerance"
        worst = max(worst, ratio)
    return worst
