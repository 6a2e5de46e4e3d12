"""Calls of the mLSTM's kernels, and :func:`mlstm`, which is the same call step by step in torch.

That is the recurrence of :mod:`attnproof.kernels.mlstm` and nothing else, with detached levels: no chunk, no
sum over pairs, no formula of a gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnproof.kernels.mlstm import attention, attention_recurrent, chunkwise

__all__ = [
    "DTYPES",
    "FORMS",
    "INPUTS",
    "STATE",
    "State",
    "carried",
    "inputs",
    "mlstm",
    "neutral_head",
    "options",
    "outputs",
]

INPUTS = ("q", "k", "v", "i", "f")
STATE = ("initial_state", "initial_n", "initial_m")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = {"chunks of 32": attention, "chunks of 16": chunkwise(16), "steps": attention_recurrent}


def inputs(
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 1,
    h: int = 2,
    n: int = 37,
    d: int = 16,
    e: int = 16,
    forget: float = 3.0,
) -> dict[str, Tensor]:
    """q, k (B,H,N,D), v, do (B,H,N,E), i, f (B,H,N)."""
    shapes = {"q": (d,), "k": (d,), "v": (e,), "i": (), "f": (), "do": (e,)}
    t = {name: torch.randn(b, h, n, *last) for name, last in shapes.items()}
    t["f"] = t["f"] + forget
    return {name: x.to(dtype) for name, x in t.items()}


def carried(t: dict[str, Tensor], cu_seqlens: list[int] | None = None) -> dict[str, Tensor]:
    """``t`` with an initial state of each sequence and head, and cotangents of the final ones."""
    _, h, _, d = t["q"].shape
    s, e = t["q"].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, t["v"].shape[3]
    states = {name: torch.randn(s, h, d, e) for name in ("initial_state", "dstate")}
    vectors = {name: torch.randn(s, h, d) for name in ("initial_n", "dn")}
    packed = {} if cu_seqlens is None else {"cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32)}
    return {**t, **states, **vectors, "initial_m": 2.0 * torch.randn(s, h), **packed}


def options(t: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keywords of a call but the scale."""
    found: dict[str, Any] = {"return_state": True}
    if STATE[0] in t:
        found["initial_state"] = tuple(t[name] for name in STATE)
    return {**found, "cu_seqlens": t["cu_seqlens"]} if "cu_seqlens" in t else found


def outputs(entry: Any, t: Mapping[str, Tensor], scale: float = 0.3) -> dict[str, Tensor]:
    """o, the final state, and the gradients by all tensors but levels."""
    sources = [name for name in (*INPUTS, *STATE[:2]) if name in t]
    leaves = {name: t[name].detach().requires_grad_() for name in sources}
    call = {**t, **leaves}
    found = dict(
        zip(
            ("o", "state", "n", "m"),
            entry(*(call[x] for x in INPUTS), scale=scale, **options(call)),
            strict=True,
        )
    )
    asked = [name for name in ("o", "state", "n") if f"d{name}" in t]
    gradients = torch.autograd.grad(
        [found[name] for name in asked],
        [leaves[name] for name in sources],
        [t[f"d{name}"] for name in asked],
        materialize_grads=True,
    )
    found = {name: x.detach() for name, x in found.items()}
    return {**found, **{f"d{name}": x for name, x in zip(sources, gradients, strict=True)}}


def neutral_head(t: dict[str, Tensor], head: int = 0) -> dict[str, Tensor]:
    """Nothing was written to one head before the call."""
    for name in STATE:
        t[name][:, head] = -math.inf if name == "initial_m" else 0.0
    return t


class State(NamedTuple):
    """C' (S,H,D,E), n' (S,H,D), m (S,H)."""

    c: Tensor
    n: Tensor
    m: Tensor


def neutral(sequences: int, q: Tensor, v: Tensor) -> State:
    """Of sequences that begin with nothing."""
    slots, width = (sequences, q.shape[1]), q.shape[3]
    return State(
        q.new_zeros(*slots, width, v.shape[3]),
        q.new_zeros(*slots, width),
        q.new_full(slots, -math.inf),
    )


def step(before: State, key: Tensor, value: Tensor, i: Tensor, log_f: Tensor) -> State:
    """The state behind one position of all heads, from (H,D), (H,E) and (H)."""
    m = torch.maximum(log_f + before.m, i).detach()
    kept, written = torch.exp(log_f + before.m - m), torch.exp(i - m)
    return State(
        kept[:, None, None] * before.c + written[:, None, None] * key[:, :, None] * value[:, None],
        kept[:, None] * before.n + written[:, None] * key,
        m,
    )


def read(state: State, query: Tensor) -> Tensor:
    """o of one position of all heads."""
    size = torch.maximum((query * state.n).sum(-1).abs(), torch.exp(-state.m))
    return (query[:, :, None] * state.c).sum(-2) / size[:, None]


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float,
    initial_state: Iterable[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, ...]:
    """(o, C', n', m) of a call as the kernels take it."""
    assert return_state
    batch, _, length, _ = q.shape
    if cu_seqlens is None:
        places = [(b, 0, length) for b in range(batch)]
    else:
        places = [(0, *ends) for ends in itertools.pairwise(cu_seqlens.tolist())]
    start = neutral(len(places), q, v) if initial_state is None else State(*initial_state)
    log_f = torch.nn.functional.logsigmoid(f)
    o = v * 0
    ends = []
    for number, (b, first, stop) in enumerate(places):
        state = State(*(x[number] for x in start))
        for t in range(first, stop):
            state = step(state, k[b, :, t], v[b, :, t], i[b, :, t], log_f[b, :, t])
            row = torch.zeros_like(o)
            row[b, :, t] = read(state, scale * q[b, :, t])
            o = o + row
        ends.append(state)
    return o, *(torch.stack(parts) for parts in zip(*ends, strict=True))
