"""Correct implementations of prefix attention and RWKV-4, for calibration: a recurrence and another form.

Plain torch that autograd differentiates, in float32, with every largest exponent held constant: position by
position with a running maximum, over a table of all prefixes, or by pairs that double their reach at every
round. No code is shared with the suite's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnproof.healthy_gradients import Storage
from attnproof.properties.contract import Contract, promises

__all__ = ["doubling_rwkv4", "matrix_prefix_scan", "recurrent_prefix_scan", "recurrent_rwkv4"]

_STATES = ("initial_state", "return_state")
_PREFIX_SCAN = Contract(family="prefix_scan", options=_STATES, unseen_nonfinite="may-leak")
_RWKV4 = Contract(family="rwkv4", options=_STATES, unseen_nonfinite="may-leak")

Tensors = tuple[torch.Tensor, ...]


def _stacked(outputs: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(outputs, 2) if outputs else like[:, :, :0].float()


def _returned(o: torch.Tensor, states: Tensors, wanted: bool) -> Any:
    return (o, *states) if wanted else o


def _weighted_steps(
    logits: torch.Tensor, values: torch.Tensor, state: Tensors | None
) -> tuple[torch.Tensor, Tensors]:
    """o_t of all positions up to t, logits (B, H, N), values (B, H, N, E), by a running maximum."""
    m, u, w = _nothing(values) if state is None else state
    outputs = []
    for t in range(logits.shape[2]):
        before, m = m, torch.maximum(m, logits[:, :, t]).detach()
        decay, weight = torch.exp(before - m), torch.exp(logits[:, :, t] - m)
        u = decay * u + weight
        w = decay[..., None] * w + weight[..., None] * values[:, :, t]
        outputs.append(w / u[..., None])
    return _stacked(outputs, values), (m, u, w)


def _weighted_matrix(
    storage: Storage, logits: torch.Tensor, values: torch.Tensor, state: Tensors | None
) -> tuple[torch.Tensor, Tensors]:
    """The same in two passes over a table of all prefixes, beside which stands the state."""
    m, u, w = _nothing(values) if state is None else state
    length = logits.shape[2]
    if not length:
        return values, (m, u, w)
    unseen = ~torch.ones(length, length, dtype=torch.bool).tril()
    scores = logits[:, :, None].masked_fill(unseen, -torch.inf)
    top = torch.maximum(scores.amax(-1), m[..., None]).detach()
    weights, first = torch.exp(scores - top[..., None]), torch.exp(m[..., None] - top)
    sums = weights.sum(-1) + first * u[..., None]
    weighted = storage.operand(weights) @ values + first[..., None] * w[:, :, None]
    return weighted / sums[..., None], (top[:, :, -1], sums[:, :, -1], weighted[:, :, -1])


def _nothing(values: torch.Tensor) -> Tensors:
    """The neutral state."""
    m = torch.full(values.shape[:2], -torch.inf)
    return m, torch.zeros_like(m), torch.zeros(*m.shape, values.shape[3])


def _prefix(run: Callable[..., tuple[torch.Tensor, Tensors]], *tensors: torch.Tensor, **options: Any) -> Any:
    q, k, v = tensors
    logits = options["scale"] * (q.float()[:, None] * k.float()).sum(-1)
    o, last = run(logits, v.float(), options.get("initial_state"))
    return _returned(o.to(q.dtype), last, options.get("return_state", False))


@promises(_PREFIX_SCAN)
def recurrent_prefix_scan(*tensors: Any, **options: Any) -> Any:
    """Prefix attention of a learned query, position by position in float32."""
    return _prefix(_weighted_steps, *tensors, **options)


@promises(_PREFIX_SCAN)
def matrix_prefix_scan(*tensors: Any, **options: Any) -> Any:
    """Prefix attention in two passes over a table of all prefixes, weights in the inputs' dtype."""
    storage = Storage(tensors[0].dtype, True)
    return _prefix(lambda *given: _weighted_matrix(storage, *given), *tensors, **options)


def _rwkv4_steps(
    w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Tensors
) -> tuple[torch.Tensor, Tensors]:
    a, b, p = state
    outputs = []
    for t in range(k.shape[2]):
        key, value = k[:, :, t], v[:, :, t]
        top = torch.maximum(p, u + key).detach()
        old, own = torch.exp(p - top), torch.exp(u + key - top)
        outputs.append((old * a + own * value) / (old * b + own))
        following = torch.maximum(p + w, key).detach()
        old, own = torch.exp(p + w - following), torch.exp(key - following)
        a, b, p = old * a + own * value, old * b + own, following
    return _stacked(outputs, v), (a, b, p)


def _rwkv4_doubling(
    w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Tensors
) -> tuple[torch.Tensor, Tensors]:
    """The state as an element at the front; (p, b, a) of longer and longer stretches before a position."""
    p, b, a = (
        torch.cat([first[..., None], x], 2)
        for first, x in zip((state[2], state[1], state[0]), (k, torch.ones_like(k), v), strict=True)
    )
    reach = 1
    while reach < p.shape[2]:
        older, newer = (
            tuple(x[:, :, piece] for x in (p, b, a)) for piece in (slice(None, -reach), slice(reach, None))
        )
        moved = older[0] + reach * w[:, None]
        top = torch.maximum(moved, newer[0]).detach()
        # Both are −∞ where nothing has been written.
        top = torch.where(top == -torch.inf, 0.0, top)
        old, new = torch.exp(moved - top), torch.exp(newer[0] - top)
        joined = (
            torch.maximum(moved, newer[0]).detach(),
            old * older[1] + new * newer[1],
            old * older[2] + new * newer[2],
        )
        p, b, a = (torch.cat([x[:, :, :reach], y], 2) for x, y in zip((p, b, a), joined, strict=True))
        reach *= 2
    before = tuple(x[:, :, :-1] for x in (p, b, a))
    own = u[:, None] + k
    top = torch.maximum(before[0], own).detach()
    old, new = torch.exp(before[0] - top), torch.exp(own - top)
    o = (old * before[2] + new * v) / (old * before[1] + new)
    return o, (a[:, :, -1], b[:, :, -1], p[:, :, -1])


def _rwkv4(run: Callable[..., tuple[torch.Tensor, Tensors]], *tensors: torch.Tensor, **options: Any) -> Any:
    w, u, k, v = tensors
    state = options.get("initial_state")
    if state is None:
        zero = torch.zeros(k.shape[:2])
        state = zero, zero, torch.full(k.shape[:2], -torch.inf)
    o, last = run(w.float(), u.float(), k.float(), v.float(), state)
    return _returned(o.to(k.dtype), last, options.get("return_state", False))


@promises(_RWKV4)
def recurrent_rwkv4(*tensors: Any, **options: Any) -> Any:
    """RWKV-4, position by position in float32 with the running maximum."""
    return _rwkv4(_rwkv4_steps, *tensors, **options)


@promises(_RWKV4)
def doubling_rwkv4(*tensors: Any, **options: Any) -> Any:
    """RWKV-4 by Hillis' and Steele's rounds in float32."""
    return _rwkv4(_rwkv4_doubling, *tensors, **options)
