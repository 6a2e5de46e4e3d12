"""The delta rule's recurrence and its adjoint: literally in any arithmetic, and norm-wise in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.arithmetic.enclosures import EPSILON, SLACK, Ball
from attnproof.properties.arithmetic.normwise import Adjoint, Recurrence, Stretch, growth
from attnproof.properties.budgets.delta_chunks import DeltaLanes
from attnproof.properties.families.arguments import finite

__all__ = ["Step", "gradients", "joined", "norm_wise", "norm_wise_gradients", "steps_of"]


@dataclass(frozen=True, eq=False)
class Step:
    """What one step leaves for the adjoint: S', S_t, r and e^g in the arithmetic's values."""

    decayed: Any
    state: Any
    read: Any
    decay: Any


def joined(parts: list[V], empty: V) -> V:
    """Values (L, 1, X) of every step as (L, N, X), of an arithmetic whose values are arrays."""
    if not parts:
        return empty
    return cast("V", np.concatenate(cast("list[Any]", parts), axis=1))


def steps_of(a: Arithmetic[V], x: DeltaLanes) -> list[Step]:
    """The recurrence, literally."""
    state, steps = a.exact(x.initial), []
    for t in range(x.k.shape[1]):
        key, beta = a.exact(x.k[:, t, None]), a.exact(x.beta[:, t, None, None])
        decay, decayed = None, state
        if x.g is not None:
            gate = x.gates[:, t, :, None]
            decay = a.masked(a.exp(a.exact(finite(gate))), gate.isfinite())
            decayed = a.mul(decay, state)
        read = a.sub(a.exact(x.v[:, t, None]), a.matmul(key, decayed))
        state = a.add(decayed, a.matmul(a.transpose(key), a.mul(beta, read)))
        steps.append(Step(decayed, state, read, decay))
    return steps


def gradients(a: Arithmetic[V], x: DeltaLanes, do: torch.Tensor, last: torch.Tensor) -> dict[str, V]:
    """The adjoint recurrence, literally."""
    steps, ds = steps_of(a, x), a.exact(last)
    rows: dict[str, list[V]] = {name: [] for name in ("dq", "dk", "dv", "dbeta", "dg")}
    for t in reversed(range(len(steps))):
        step = steps[t]
        key, beta = a.exact(x.k[:, t, None]), a.exact(x.beta[:, t, None, None])
        query, cotangent = a.exact(x.q[:, t, None]), a.exact(do[:, t, None])
        rows["dq"].append(a.scaled(a.matmul(cotangent, a.transpose(step.state)), x.scale))
        ds = a.add(ds, a.scaled(a.matmul(a.transpose(query), cotangent), x.scale))
        seen = a.matmul(key, ds)
        rows["dbeta"].append(a.matmul(step.read, a.transpose(seen)))
        written = a.mul(beta, seen)
        rows["dv"].append(written)
        by_read = a.mul(beta, a.matmul(step.read, a.transpose(ds)))
        rows["dk"].append(a.sub(by_read, a.matmul(written, a.transpose(step.decayed))))
        ds = a.sub(ds, a.matmul(a.transpose(key), written))
        if x.g is not None:
            product = a.transpose(a.sum(a.mul(step.decayed, ds)))
            rows["dg"].append(product if x.wide else a.sum(product))
            ds = a.mul(step.decay, ds)
    sizes = {"dq": x.q, "dk": x.k, "dv": x.v, "dbeta": x.beta[..., None]}
    if x.g is not None:
        sizes["dg"] = x.gates
    found = {n: joined(rows[n][::-1], a.exact(like[:, :0])) for n, like in sizes.items()}
    return {**found, "dinitial_state": ds}


def norm_wise(x: DeltaLanes) -> dict[str, Ball]:
    """o and the final state by the float64 trajectory, with the norms of its errors for radii."""
    run = Recurrence(x.k, x.v, x.beta, x.g, x.initial)
    size = torch.linalg.vector_norm(x.q, dim=-1, keepdim=True) * SLACK
    o, radius = torch.zeros_like(x.v), torch.zeros_like(x.v)
    state, error = x.initial, torch.zeros_like(x.initial[:, 0])
    for part in run.forward():
        span = slice(part.start, part.stop)
        o[:, span] = (x.q[:, span, None] @ part.states)[:, :, 0] * x.scale
        own = part.error + growth(x.q.shape[-1] + 1) * part.norms
        radius[:, span] = abs(x.scale) * size[:, span] * own
        state, error = part.states[:, -1], part.error[:, -1]
    radius = (radius + EPSILON * o.abs()) * SLACK + EPSILON**8
    return {
        "o": Ball(o, radius),
        "state": Ball(state.clone(), error[:, None].expand_as(state).clone()),
    }


def norm_wise_gradients(x: DeltaLanes, do: torch.Tensor, last: torch.Tensor) -> dict[str, Ball]:
    """Gradients by the float64 trajectory and its adjoint, stretch by stretch."""
    run = Recurrence(x.k, x.v, x.beta, x.g, x.initial)
    shapes = {"dq": x.q, "dk": x.k, "dv": x.v, "dbeta": x.beta[..., None]}
    if x.g is not None:
        shapes["dg"] = x.gates
    found = {n: Ball(torch.zeros_like(like), torch.zeros_like(like)) for n, like in shapes.items()}
    adjoint = Ball(last, torch.zeros_like(last[:, 0]))
    for part, back, earlier in run.backward(x.q * x.scale, do, last):
        adjoint = earlier
        span = slice(part.start, part.stop)
        for name, (value, radius) in _stretch_gradients(x, do[:, span], part, back).items():
            ball = found[name]
            assert ball.radius is not None
            ball.value[:, span] = value
            ball.radius[:, span] = (radius + EPSILON * value.abs()) * SLACK + EPSILON**8
    if x.g is not None:
        kept = shapes["dg"].isfinite()
        dg = found["dg"]
        assert dg.radius is not None
        found["dg"] = Ball(dg.value.where(kept, 0.0), dg.radius.where(kept, 0.0))
    assert adjoint.radius is not None
    radius = adjoint.radius[:, None].expand_as(adjoint.value)
    return {**found, "dinitial_state": Ball(adjoint.value, radius)}


def _stretch_gradients(
    x: DeltaLanes, do: torch.Tensor, part: Stretch, back: Adjoint
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Values and radii (L, n, ·) of the gradients of some steps.

    The error of an element of a column is at most the norm of the column's error.
    """
    span = slice(part.start, part.stop)
    width, depth = x.v.shape[-1], x.k.shape[-1]
    beta = x.beta[:, span, None]

    def rows(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """matrix (L, n, D, E) times vector (L, n, E)."""
        return (matrix @ vector[..., None])[..., 0]

    def paired(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Σ a b over the last axis, (L, n, 1)."""
        return (a * b).sum(-1, keepdim=True)

    total, states, decayed = back.total.abs(), part.states.abs(), part.decayed.abs()
    gamma = growth(width + 3)
    dv = beta * back.seen
    dv_error = beta.abs() * back.seen_error + EPSILON * dv.abs()
    found = {"dv": (dv, dv_error)}
    dq = rows(part.states, do) * x.scale
    dq_error = paired(part.error, do.abs()) + gamma * rows(states, do.abs())
    found["dq"] = (dq, abs(x.scale) * dq_error)
    size = part.read.abs() + part.read_error
    dk = beta * rows(back.total, part.read) - rows(part.decayed, dv)
    by_read = paired(back.total_error, size) + rows(total, part.read_error + gamma * size)
    by_state = paired(part.decayed_error, dv.abs() + dv_error)
    by_state = by_state + rows(decayed, dv_error + gamma * dv.abs())
    found["dk"] = (dk, beta.abs() * by_read + by_state)
    dbeta_error = paired(part.read_error, back.seen.abs()) + paired(size, back.seen_error)
    dbeta_error = dbeta_error + gamma * paired(part.read.abs(), back.seen.abs())
    found["dbeta"] = (paired(part.read, back.seen), dbeta_error)
    if x.g is None:
        return found
    product = part.decayed * back.decayed
    if x.wide:
        error = rows(back.decayed.abs(), part.decayed_error)
        error = error + rows(decayed, back.decayed_error)
        error = error + paired(part.decayed_error, back.decayed_error) + gamma * product.abs().sum(-1)
        found["dg"] = (product.sum(-1), error)
        return found
    before, after = (torch.linalg.vector_norm(y, dim=-2) for y in (part.decayed, back.decayed))
    error = paired(part.decayed_error, after + back.decayed_error) + paired(before, back.decayed_error)
    error = error + growth(width * depth + 3) * product.abs().sum((-2, -1))[..., None]
    found["dg"] = (product.sum((-2, -1))[..., None], error * (1.0 + growth(depth)))
    return found
