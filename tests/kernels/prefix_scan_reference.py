"""Prefix attention and RWKV-4 as loops over positions in float64, and how far a kernel may be from them.

The loops are the formulas, one row of weights at a time; expected gradients are autograd's through them. Only
the sizes of errors come from the families' budgets, and their enclosures must hold what the loops found.

The recurrences carry a state, its level a constant wherever it is made, so that autograd goes through states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.contract import Contract
from attnproof.properties.families.base import Family, Problem
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.oracle import evaluate
from tests.kernels.native import DEVICE

State = tuple[Tensor, Tensor, Tensor]
# Of the loops in float64, relative to a budget.
SMALL = 2.0**-10
# Of the estimated deviation of a healthy kernel's error, whose largest of some thousand is about 4.
DEVIATIONS = 8.0
# Below which float32 holds no more digits; deviations count roundings of normal numbers.
SUBNORMAL = torch.finfo(torch.float32).tiny


def mixed(logits: Tensor, v: Tensor) -> Tensor:
    """Σ e^x v / Σ e^x over the last axis of logits x (…, n) and v (…, n, E)."""
    weights = torch.exp(logits - logits.amax(-1, keepdim=True).detach())
    return (weights[..., None] * v).sum(-2) / weights.sum(-1)[..., None]


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """o (B,H,N,E) of q (H,D), k (B,H,N,D), v (B,H,N,E) in float64."""
    s = scale * (q[:, None, :] * k).sum(-1)
    rows = [mixed(s[:, :, : t + 1], v[:, :, : t + 1]) for t in range(k.shape[2])]
    return torch.stack(rows, 2) if rows else v * (q.sum() + k.sum())


def time_mixing(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o (B,H,N) of w, u (H), k, v (B,H,N) in float64."""
    rows = []
    for t in range(k.shape[2]):
        gone = torch.arange(t - 1, -1, -1)
        x = torch.cat((k[:, :, :t] + gone * w[:, None], k[:, :, t : t + 1] + u[:, None]), -1)
        # w has no part in the first row, and autograd asks for a way to it
        rows.append(mixed(x, v[:, :, : t + 1, None])[..., 0] + 0 * w)
    return torch.stack(rows, 2) if rows else v * (w.sum() + u.sum() + k.sum())


def prefix_recurrence(q: Tensor, k: Tensor, v: Tensor, state: State, scale: float) -> tuple[Tensor, ...]:
    """(o, m, u, w) by way of m' = max(m, s): no position may be missing."""
    m, u, w = state
    s, rows = scale * (q[:, None, :] * k).sum(-1), []
    for t in range(k.shape[2]):
        top = torch.maximum(m, s[:, :, t]).detach()
        kept, taken = torch.exp(m - top), torch.exp(s[:, :, t] - top)
        m, u, w = top, u * kept + taken, w * kept[..., None] + taken[..., None] * v[:, :, t]
        rows.append(w / u[..., None])
    return torch.stack(rows, 2), m, u, w


def time_recurrence(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, ...]:
    """(o, a, b, p) by way of p' = max(w + p, k): no position may be missing."""
    a, b, p = state
    rows = []
    for t in range(k.shape[2]):
        own = u + k[:, :, t]
        top = torch.maximum(p, own).detach()
        kept, taken = torch.exp(p - top), torch.exp(own - top)
        rows.append((a * kept + taken * v[:, :, t]) / (b * kept + taken))
        top = torch.maximum(w + p, k[:, :, t]).detach()
        kept, taken = torch.exp(w + p - top), torch.exp(k[:, :, t] - top)
        a, b, p = a * kept + taken * v[:, :, t], b * kept + taken, top
    return torch.stack(rows, 2), a, b, p


def strided(x: Tensor) -> Tensor:
    """A copy whose axes lie the other way round in memory."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def assert_gradients_of_states(
    entry: Callable[..., Any],
    recurrence: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    state: State,
    level: int,
    *,
    used: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """Gradients of ``tensors`` and of the initial sums from cotangents of o and of the final ones, or of the
    outputs ``used`` alone; ``state[level]`` is the level, which neither has nor takes a gradient.
    """
    leaves = [x.clone().requires_grad_() for x in tensors]
    start = [strided(x).requires_grad_() for x in state]
    found = entry(*leaves, initial_state=tuple(start), return_state=True, **options)
    assert not found[1 + level].requires_grad
    exact, first = ([x.detach().double().requires_grad_() for x in given] for given in (leaves, start))
    outputs = recurrence(*exact, first, **options)
    chosen = [i for i in (range(4) if used is None else used) if i != 1 + level]
    cotangents = [strided(torch.randn(outputs[i].shape)) for i in chosen]
    held, held_exact = leaves + start, exact + first
    got = torch.autograd.grad([found[i] for i in chosen], held, cotangents, allow_unused=True)
    want = torch.autograd.grad(
        [outputs[i] for i in chosen], held_exact, [x.double() for x in cotangents], allow_unused=True
    )
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        if i == len(tensors) + level:
            assert x is None
            continue
        y = torch.zeros_like(held_exact[i]) if y is None else y
        assert x.dtype == held[i].dtype
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5 * y.abs().max().item())


def assert_handed_over(whole: Sequence[Tensor], parts: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Outputs ``parts`` of two calls are those of one call, and so are the gradients that come of them."""
    chosen = [i for i, x in enumerate(whole) if x.requires_grad]
    cotangents = [torch.randn(whole[i].shape) for i in chosen]
    results = [
        torch.autograd.grad([outputs[i] for i in chosen], leaves, cotangents, retain_graph=True)
        for outputs in (parts, whole)
    ]
    for x, y in zip((*parts, *results[0]), (*whole, *results[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * max(1.0, y.abs().max().item()))


def assert_within(
    problem: Problem, contract: Contract, got: Mapping[str, Tensor], loop: Mapping[str, Tensor]
) -> dict[str, Enclosure]:
    """Every output as near to its enclosure as budgets allow, and what the loop found inside it."""
    with torch.device("cpu"):
        reference = evaluate(problem, EnclosureArithmetic(), gauges=True)
        budgets = problem.budgets(reference, contract.on(DEVICE))
    for name, found in got.items():
        budget, exact = budgets[name], reference[name]
        assert not budget.open.any(), name
        allowed = torch.minimum(budget.certain, DEVIATIONS * budget.probable + SUBNORMAL)
        if name in loop:
            distance = (loop[name].cpu() - exact.value).abs()
            assert (distance <= exact.radius + SMALL * allowed).all(), f"{name}: loop and enclosure differ"
        x = found.detach().cpu().double()
        error = (x - exact.value).abs()
        excess = ~((error <= allowed + exact.radius) | (x == exact.value))
        assert not excess.any(), f"{name}: {error[excess].max():.3g} at {excess.nonzero()[0].tolist()}"
    return reference


def on_host(x: Any) -> Any:
    """Tensors, and tuples of them, where the oracle computes."""
    if isinstance(x, tuple):
        return tuple(y.cpu() for y in x)
    return x.cpu() if isinstance(x, Tensor) else x


def judge_outputs(
    family: Family, contract: Contract, entry: Callable[..., Any], tensors: Sequence[Tensor], **options: Any
) -> None:
    """o and the final state of ``entry``."""
    given = {name: on_host(x) for name, x in options.items()}
    with torch.device("cpu"):
        problem = family.problem(*map(on_host, tensors), return_state=True, **given)
    outputs = entry(*tensors, return_state=True, **options)
    assert_within(problem, contract, dict(zip(problem.outputs, outputs, strict=True)), {})


def judge(
    family: Family,
    contract: Contract,
    entry: Callable[..., Any],
    loop: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    **options: Any,
) -> None:
    """o and the gradients of every tensor from ``entry``, and the enclosures against ``loop``."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    o = entry(*leaves, **options)
    assert o.dtype == tensors[0].dtype
    cotangent = torch.randn(o.shape).to(o.dtype)
    found = torch.autograd.grad(o, leaves, cotangent)
    exact_leaves = [x.detach().double().requires_grad_() for x in tensors]
    exact = loop(*exact_leaves, **options)
    gradients = torch.autograd.grad(exact, exact_leaves, cotangent.double())
    with torch.device("cpu"):
        problem = family.problem(*map(on_host, tensors), **options)
    forward = assert_within(problem, contract, {"o": o}, {"o": exact.detach()})
    names = [f"d{name}" for name in family.inputs]
    assert_within(
        GradientProblem(problem, forward, {"o": cotangent.cpu().double()}),
        contract,
        dict(zip(names, found, strict=True)),
        dict(zip(names, gradients, strict=True)),
    )
