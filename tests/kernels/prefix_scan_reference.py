"""Prefix attention and RWKV-4 as loops over positions in float64, and how far a kernel may be from them.

The loops are the formulas, one row of weights at a time; expected gradients are autograd's through them. Only
the sizes of errors come from the families' budgets, and their enclosures must hold what the loops found.
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

State = tuple[Tensor, Tensor, Tensor]
# Of the loops in float64, relative to a budget.
SMALL = 2.0**-10
# Of the estimated deviation of a healthy kernel's error, whose largest of some thousand is about 4.
DEVIATIONS = 8.0
# Below which float32 holds no more digits; deviations count roundings of normal numbers.
SUBNORMAL = torch.finfo(torch.float32).tiny


def mixed(logits: Tensor, v: Tensor, before: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
    """Σ e^x v / Σ e^x over the last axis of logits x (…, n) and v (…, n, E), after sums scaled by e^−p."""
    top = logits.amax(-1).detach()
    if before is None:
        weights = torch.exp(logits - top[..., None])
        return (weights[..., None] * v).sum(-2) / weights.sum(-1)[..., None]
    p, normaliser, total = before
    top = torch.maximum(top, p.detach())
    weights, kept = torch.exp(logits - top[..., None]), torch.exp(p - top)
    divided = (weights[..., None] * v).sum(-2) + kept[..., None] * total
    return divided / (weights.sum(-1) + kept * normaliser)[..., None]


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, initial: State | None = None
) -> Tensor:
    """o (B,H,N,E) of q (H,D), k (B,H,N,D), v (B,H,N,E) in float64; ``initial`` is m, u, w."""
    s = scale * (q[:, None, :] * k).sum(-1)
    before = None if initial is None else tuple(x.double() for x in initial)
    rows = [mixed(s[:, :, : t + 1], v[:, :, : t + 1], before) for t in range(k.shape[2])]
    return torch.stack(rows, 2) if rows else v * (q.sum() + k.sum())


def time_mixing(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, initial: State | None = None) -> Tensor:
    """o (B,H,N) of w, u (H), k, v (B,H,N) in float64; ``initial`` is a, b, p."""
    rows = []
    for t in range(k.shape[2]):
        gone = torch.arange(t - 1, -1, -1)
        x = torch.cat((k[:, :, :t] + gone * w[:, None], k[:, :, t : t + 1] + u[:, None]), -1)
        before = None
        if initial is not None:
            a, b, p = (y.double() for y in initial)
            before = (p + t * w, b, a[..., None])
        # w has no part in the first row, and autograd asks for a way to it
        rows.append(mixed(x, v[:, :, : t + 1, None], before)[..., 0] + 0 * w)
    return torch.stack(rows, 2) if rows else v * (w.sum() + u.sum() + k.sum())


def assert_within(
    problem: Problem, contract: Contract, got: Mapping[str, Tensor], loop: Mapping[str, Tensor]
) -> dict[str, Enclosure]:
    """Every output as near to its enclosure as budgets allow, and what the loop found inside it."""
    reference = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budgets = problem.budgets(reference, contract)
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
    problem = family.problem(*map(on_host, tensors), **options)
    forward = assert_within(problem, contract, {"o": o}, {"o": exact.detach()})
    names = [f"d{name}" for name in family.inputs]
    assert_within(
        GradientProblem(problem, forward, {"o": cotangent.cpu().double()}),
        contract,
        dict(zip(names, found, strict=True)),
        dict(zip(names, gradients, strict=True)),
    )
