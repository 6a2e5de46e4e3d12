"""Correct implementations of the families with a state, for calibration: a recurrence and a chunkwise form.

Plain torch that autograd differentiates. ``recurrent_…`` take one step after another in float32 and round
once, at the boundary. ``chunked_…`` take chunks of 16 positions and round what a kernel for tensor cores
holds in the inputs' dtype: decayed queries and keys, weights, the state as an operand. Neither shares code
with the suite's kernels; the delta rule's chunks solve their triangular system by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from attnproof.healthy_gradients import Storage
from attnproof.properties.contract import Contract, promises

__all__ = [
    "chunked_delta",
    "chunked_gated_linear",
    "chunked_linear",
    "chunked_retention",
    "chunked_rwkv6",
    "recurrent_delta",
    "recurrent_gated_linear",
    "recurrent_linear",
    "recurrent_mlstm",
    "recurrent_retention",
    "recurrent_rwkv6",
]

_CHUNK = 16
_CARRYING = ("initial_state", "cu_seqlens", "return_state")
_GATED = Contract(family="gated_linear", options=_CARRYING, unseen_nonfinite="may-leak")
_DELTA = replace(_GATED, family="delta")
_LINEAR = replace(_GATED, family="linear", options=("causal", *_CARRYING))
_RETENTION = replace(_GATED, family="retention")
_RWKV6 = replace(_GATED, family="rwkv6")
_MLSTM = replace(_GATED, family="mlstm")

Tensors = tuple[torch.Tensor, ...]
# From sequences in float32 (B, H, N, ·) and a state (B, H, D, E) to outputs and the last state.
Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _by_sequence(
    run: Run,
    tensors: Tensors,
    dtype: torch.dtype,
    width: int,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Tensors:
    """``run`` on each sequence: (o, states), o in ``dtype``."""
    batch, heads, length = tensors[0].shape[:3]
    value = tensors[2].shape[3]
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for index, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if initial_state is None:
            state = tensors[0].new_zeros(batch, heads, width, value, dtype=torch.float32)
        else:
            state = initial_state if cu_seqlens is None else initial_state[index : index + 1]
        o, last = run(*(x[:, :, start:stop].float() for x in tensors), state.float())
        outputs.append(o)
        states.append(last)
    return torch.cat(outputs, 2).to(dtype), torch.cat(states, 0)


def _returned(found: Tensors, return_state: bool) -> Any:
    return found if return_state else found[0]


def _stacked(outputs: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(outputs, 2) if outputs else like[:, :, :0]


# ---- gated sums


def _gates(g: torch.Tensor) -> torch.Tensor:
    """Log decays as (B, H, N, D or 1)."""
    return g if g.dim() == 4 else g.unsqueeze(-1)


def _gated_steps(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for t in range(q.shape[2]):
        write = k[:, :, t, :, None] * v[:, :, t, None, :]
        state = torch.exp(_gates(g)[:, :, t, :, None]) * state + write
        outputs.append((q[:, :, t, None] @ state)[:, :, 0])
    return _stacked(outputs, v), state


def _segments(g: torch.Tensor) -> torch.Tensor:
    """Σ of g over the steps after j up to i, (B, H, C, C, D); −∞ above the diagonal."""
    length = g.shape[2]
    after = torch.ones(length, length, dtype=torch.bool).tril(-1)[:, :, None]
    sums = torch.where(after, g[:, :, :, None, :], 0.0).cumsum(2)
    return sums.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril()[:, :, None], -torch.inf)


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, _CHUNK):
        yield slice(start, min(start + _CHUNK, length))


def _gated_chunks(
    storage: Storage,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    gates, outputs = _gates(g), []
    for piece in _chunks(q.shape[2]):
        qc, kc, vc, gc = (x[:, :, piece] for x in (q, k, v, gates))
        segments = _segments(gc)
        decay = torch.exp(segments)
        weights = (qc[:, :, :, None] * kc[:, :, None] * decay).sum(-1)
        from_state = storage.operand(qc * torch.exp(gc.cumsum(2))) @ storage.operand(state)
        outputs.append(storage.operand(weights) @ vc + from_state)
        kept = storage.operand(kc * decay[:, :, -1])
        state = torch.exp(gc.sum(2))[..., None] * state + kept.mT @ vc
    return (torch.cat(outputs, 2) if outputs else v[:, :, :0]), state


def _gated(
    steps: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, **options: Any
) -> Any:
    scale, returned = options.pop("scale"), options.pop("return_state", False)
    width = k.shape[3]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        o, last = steps(*tensors)
        return scale * o, last

    given = options.pop("initial_state", None), options.pop("cu_seqlens", None)
    return _returned(_by_sequence(run, (q, k, v, g), q.dtype, width, *given), returned)


@promises(_GATED)
def recurrent_gated_linear(*tensors: torch.Tensor, **options: Any) -> Any:
    """Gated linear attention, step by step in float32."""
    return _gated(_gated_steps, *tensors, **options)


@promises(_GATED)
def chunked_gated_linear(*tensors: torch.Tensor, **options: Any) -> Any:
    """Gated linear attention by chunks of 16, operands in the inputs' dtype."""
    storage = Storage(tensors[0].dtype, True)
    return _gated(lambda *given: _gated_chunks(storage, *given), *tensors, **options)


def _constant_gates(q: torch.Tensor) -> torch.Tensor:
    """log(1 − 2^(−5 − h)), (B, H, N) float32."""
    heads = torch.arange(q.shape[1], dtype=torch.float64)
    decay = torch.log1p(-torch.exp2(-5.0 - heads)).float()
    return decay[None, :, None].expand(q.shape[:3])


@promises(_RETENTION)
def recurrent_retention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    """Retention, step by step in float32."""
    return _gated(_gated_steps, q, k, v, _constant_gates(q), **options)


@promises(_RETENTION)
def chunked_retention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    """Retention by chunks of 16, operands in the inputs' dtype."""
    storage = Storage(q.dtype, True)
    return _gated(lambda *given: _gated_chunks(storage, *given), q, k, v, _constant_gates(q), **options)


def _with_bonus(steps: Run, u: torch.Tensor) -> Run:
    """What RWKV-6 reads before it decays: the steps of a state one position behind, and the bonus."""

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bonus = (q * u.float()[None, :, None] * k).sum(-1, keepdim=True) * v
        if not q.shape[2]:
            return bonus, state
        # o_t reads S_{t−1}: the sum up to t − 1 with the next query.
        behind, _ = steps(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], g[:, :, :-1], state)
        first = q[:, :, :1] @ state
        _, last = steps(q, k, v, g, state)
        return torch.cat([first, behind], 2) + bonus, last

    return run


@promises(_RWKV6)
def recurrent_rwkv6(*tensors: torch.Tensor, **options: Any) -> Any:
    """RWKV-6, step by step in float32."""
    q, k, v, g, u = tensors
    return _gated(_with_bonus(_gated_steps, u), q, k, v, g, **options)


@promises(_RWKV6)
def chunked_rwkv6(*tensors: torch.Tensor, **options: Any) -> Any:
    """RWKV-6 by chunks of 16, operands in the inputs' dtype."""
    q, k, v, g, u = tensors
    storage = Storage(q.dtype, True)
    run = _with_bonus(lambda *given: _gated_chunks(storage, *given), u)
    return _gated(run, q, k, v, g, **options)


# ---- linear attention


def _features(x: torch.Tensor, name: str) -> torch.Tensor:
    """φ of the last axis."""
    width = x.shape[-1]
    if name == "elu1":
        return torch.where(x > 0, x + 1.0, torch.exp(x.clamp(max=0.0)))
    if name == "identity":
        return x
    if name in ("relu", "exp"):
        return torch.relu(x) if name == "relu" else torch.exp(x)
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2)
    if name == "squared":
        return pairs
    one = torch.ones_like(x[..., :1])
    return torch.cat([one, x * width**-0.25, pairs * (2.0 * width) ** -0.5], -1)


def _sums(storage: Storage, whole: bool) -> Run:
    """Sums of k vᵀ, causal by chunks or over the whole sequence."""

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = storage.operand(q), storage.operand(k)
        if whole:
            state = state + k.mT @ v
            return q @ storage.operand(state), state
        outputs = []
        for piece in _chunks(q.shape[2]):
            qc, kc, vc = (x[:, :, piece] for x in (q, k, v))
            weights = (qc @ kc.mT).tril()
            outputs.append(storage.operand(weights) @ vc + qc @ storage.operand(state))
            state = state + kc.mT @ vc
        return (torch.cat(outputs, 2) if outputs else v[:, :, :0]), state

    return run


def _step_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _gated_steps(q, k, v, q.new_zeros(q.shape[:3]), state)


def _linear(
    steps: Run,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str,
    normalize: bool,
    causal: bool = True,
    initial_state: Any = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> Any:
    values, dtype, width = v.float(), q.dtype, v.shape[3]
    q, k = _features(q.float(), feature_map), _features(k.float(), feature_map)
    if normalize:
        values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        if initial_state is not None:
            initial_state = torch.cat([initial_state[0], initial_state[1].unsqueeze(-1)], -1)
    given = initial_state, cu_seqlens
    o, state = _by_sequence(steps, (q, k, values), torch.float32, k.shape[3], *given)
    if not normalize:
        return _returned((o.to(dtype), state), return_state)
    o = (o[..., :width] / o[..., width:]).to(dtype)
    return (o, state[..., :width].contiguous(), state[..., width].contiguous()) if return_state else o


@promises(_LINEAR)
def recurrent_linear(*tensors: torch.Tensor, causal: bool = True, **options: Any) -> Any:
    """Linear attention, step by step in float32."""
    steps = _step_sums if causal else _sums(Storage(torch.float32, False), True)
    return _linear(steps, *tensors, **options)


@promises(_LINEAR)
def chunked_linear(*tensors: torch.Tensor, causal: bool = True, **options: Any) -> Any:
    """Linear attention by chunks of 16, features and states as operands in the inputs' dtype."""
    return _linear(_sums(Storage(tensors[0].dtype, True), not causal), *tensors, **options)


# ---- the delta rule


def _delta_steps(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for t in range(q.shape[2]):
        state = torch.exp(_gates(g)[:, :, t, :, None]) * state
        rest = v[:, :, t] - (k[:, :, t, None] @ state)[:, :, 0]
        state = state + k[:, :, t, :, None] * (beta[:, :, t, None] * rest)[:, :, None, :]
        outputs.append((q[:, :, t, None] @ state)[:, :, 0])
    return _stacked(outputs, v), state


def _delta_chunks(
    storage: Storage,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    gates, outputs = _gates(g), []
    for piece in _chunks(q.shape[2]):
        qc, kc, vc, gc = (x[:, :, piece] for x in (q, k, v, gates))
        bc = beta[:, :, piece, None]
        decay = torch.exp(_segments(gc))
        since = torch.exp(gc.cumsum(2))
        overlap = (kc[:, :, :, None] * kc[:, :, None] * decay).sum(-1).tril(-1)
        system = torch.eye(kc.shape[2]) + bc * overlap
        held = storage.operand(state)
        right = bc * (vc - storage.operand(kc * since) @ held)
        fresh = storage.operand(torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True))
        weights = (qc[:, :, :, None] * kc[:, :, None] * decay).sum(-1)
        outputs.append(storage.operand(weights) @ fresh + storage.operand(qc * since) @ held)
        state = torch.exp(gc.sum(2))[..., None] * state + storage.operand(kc * decay[:, :, -1]).mT @ fresh
    return (torch.cat(outputs, 2) if outputs else v[:, :, :0]), state


def _delta(
    steps: Run,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> Any:
    gates = torch.zeros(q.shape[:3]) if g is None else g

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        o, last = steps(*tensors)
        return scale * o, last

    found = _by_sequence(run, (q, k, v, beta, gates), q.dtype, k.shape[3], initial_state, cu_seqlens)
    return _returned(found, return_state)


@promises(_DELTA)
def recurrent_delta(*tensors: Any, **options: Any) -> Any:
    """The delta rule, step by step in float32."""
    return _delta(_delta_steps, *tensors, **options)


@promises(_DELTA)
def chunked_delta(*tensors: Any, **options: Any) -> Any:
    """The delta rule by chunks of 16: a triangular solve in float32, operands in the inputs' dtype."""
    storage = Storage(tensors[0].dtype, True)
    return _delta(lambda *given: _delta_chunks(storage, *given), *tensors, **options)


# ---- mLSTM


def _mlstm_steps(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    f: torch.Tensor,
    state: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """o and the last state, q scaled, in float32 with the running maximum, which has no gradient."""
    kept = torch.nn.functional.logsigmoid(f)
    m, outputs = m.detach(), []
    for t in range(q.shape[2]):
        before, m = m, torch.maximum(kept[:, :, t] + m, i[:, :, t]).detach()
        decay = torch.exp(kept[:, :, t] + before - m)
        key = torch.exp(i[:, :, t] - m)[..., None] * k[:, :, t]
        state = decay[..., None, None] * state + key[..., :, None] * v[:, :, t, None, :]
        n = decay[..., None] * n + key
        size = (q[:, :, t] * n).sum(-1).abs()
        total = torch.maximum(size, torch.exp(-m))
        outputs.append((q[:, :, t, None] @ state)[:, :, 0] / total[..., None])
    return _stacked(outputs, v), state, n, m


@promises(_MLSTM)
def recurrent_mlstm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    f: torch.Tensor,
    *,
    scale: float,
    initial_state: Tensors | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """mLSTM, step by step in float32 with the running maximum."""
    batch, heads, length, width = q.shape
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        count = batch if cu_seqlens is None else len(bounds) - 1
        zeros = torch.zeros(count, heads, width, v.shape[3] + 1)
        initial_state = (zeros[..., :-1], zeros[..., -1], torch.full((count, heads), -torch.inf))
    tensors = (scale * q.float(), k.float(), v.float(), i.float(), f.float())
    runs = []
    for index, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        state = (x if cu_seqlens is None else x[index : index + 1] for x in initial_state)
        runs.append(_mlstm_steps(*(x[:, :, start:stop] for x in tensors), *(x.float() for x in state)))
    o, *states = (torch.cat(x, 2 if number == 0 else 0) for number, x in enumerate(zip(*runs, strict=True)))
    return (o.to(q.dtype), *states) if return_state else o.to(q.dtype)
