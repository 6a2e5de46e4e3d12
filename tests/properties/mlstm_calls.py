"""Calls of the mLSTM with initial states and packed sequences, and forms of it in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from attnproof.properties.families.mlstm import MLSTM, MLSTMProblem
from tests.properties.test_sigmoid_family import drawn

INPUTS = ("q", "k", "v", "i", "f")
STATES = ("initial_state", "initial_n")
Bounds = Sequence[int] | None


def call(
    sizes: tuple[int, ...],
    bounds: Bounds,
    dtype: torch.dtype,
    seed: int,
    *,
    level: float = 0.0,
    f: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Inputs, an initial state and cotangents; every third state of the call is neutral."""
    b, h, n, d, e = sizes
    count = b if bounds is None else len(bounds) - 1
    keys, values, gates, state = (b, h, n, d), (b, h, n, e), (b, h, n), (count, h, d, e)
    t = drawn(
        {"q": keys, "k": keys, "v": values, "i": gates, "f": gates, "do": values}
        | {"initial_state": state, "initial_n": state[:3], "initial_m": state[:2]}
        | {"dstate": state, "dn": state[:3]},
        torch.float64,
        seed,
    )
    t["f"], t["initial_m"] = t["f"] + f, t["initial_m"] + level
    neutral = (torch.arange(count * h) % 3 == 2).reshape(count, h)
    t["initial_m"][neutral] = -torch.inf
    for name in STATES:
        t[name][neutral] = 0.0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: x.to(dtype if name in (*INPUTS, "do") else wide) for name, x in t.items()}


def problem_of(t: Mapping[str, torch.Tensor], bounds: Bounds, scale: float) -> MLSTMProblem:
    packed = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    initial = tuple(t[f"initial_{name}"] for name in ("state", "n", "m"))
    tensors = (t[name] for name in INPUTS)
    return MLSTM.problem(*tensors, scale=scale, initial_state=initial, return_state=True, **packed)


def spans(sizes: Sequence[int], bounds: Bounds) -> list[tuple[int, int, int]]:
    """(batch, start, stop) of every sequence."""
    if bounds is None:
        return [(b, 0, sizes[2]) for b in range(sizes[0])]
    return [(0, start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def cotangents_of(t: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"o": t["do"], "state": t["dstate"], "n": t["dn"]}


def differentiated(
    x: Mapping[str, torch.Tensor], t: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """o, C', n' and m, o in the inputs' dtype, with autograd's gradients by ``x``."""
    found = dict(zip(("o", "state", "n", "m"), outputs, strict=True))
    loss = sum((found[name] * c).sum() for name, c in cotangents_of(t).items())
    gradients = torch.autograd.grad(loss, list(x.values()))
    found["o"] = found["o"].to(t["q"].dtype)
    found |= {f"d{name}": y.to(t[name].dtype) for name, y in zip(x, gradients, strict=True)}
    return {name: y.detach() for name, y in found.items()}


def steps(
    t: Mapping[str, torch.Tensor], bounds: Bounds, dtype: torch.dtype, broken: str = ""
) -> dict[str, torch.Tensor]:
    """The recurrence in ``dtype`` with scale 0.4, levels detached."""
    x = {name: t[name].clone().to(dtype).requires_grad_() for name in (*INPUTS, *STATES)}
    kept, rows, states, m = torch.nn.functional.logsigmoid(x["f"]), [], [], torch.zeros(0)
    for s, (b, start, stop) in enumerate(spans(t["q"].shape, bounds)):
        if broken != "leak" or not s:
            m = t["initial_m"][s].to(dtype)
            c, n = x["initial_state"][s], x["initial_n"][s]
        n = 0.0 * n if broken == "no initial n" else n
        m = torch.where(m.isinf(), m, 0.0) if broken == "level" else m
        for i in range(start, stop):
            new = torch.maximum(kept[b, :, i] + m, x["i"][b, :, i])
            new = new if broken == "level differentiated" else new.detach()
            decay, write = torch.exp(kept[b, :, i] + m - new), torch.exp(x["i"][b, :, i] - new)
            m, key = new, write[:, None] * x["k"][b, :, i]
            c = decay[:, None, None] * c + key[..., None] * x["v"][b, :, i, None, :]
            n = decay[:, None] * n + key
            q = 0.4 * x["q"][b, :, i]
            total = torch.maximum((q * n).sum(-1).abs(), torch.exp(-m))
            rows.append((q[..., None] * c).sum(-2) / total[:, None])
        states.append((c, n, m))
    o = torch.stack(rows).unflatten(0, (-1, t["q"].shape[2])).transpose(1, 2)
    return differentiated(x, t, (o, *(torch.stack(y) for y in zip(*states, strict=True))))


def chunks(t: Mapping[str, torch.Tensor], bounds: Bounds, length: int) -> dict[str, torch.Tensor]:
    """The chunkwise form with scale 0.4, all operands of matrix products rounded to the inputs' dtype."""
    x = {name: t[name].clone().float().requires_grad_() for name in (*INPUTS, *STATES)}
    rows, states = [], []

    def stored(y: torch.Tensor) -> torch.Tensor:
        return y.to(t["q"].dtype).float()

    for s, (b, start, stop) in enumerate(spans(t["q"].shape, bounds)):
        m, c, n = t["initial_m"][s].float(), x["initial_state"][s], x["initial_n"][s]
        for first in range(start, stop, length):
            q, k, v, i, f = (x[name][b, :, first : min(first + length, stop)] for name in INPUTS)
            sums, below = (
                torch.nn.functional.logsigmoid(f).cumsum(-1),
                torch.ones(len(i[0]), len(i[0])).tril(),
            )
            d = sums[:, :, None] - sums[:, None, :] + i[:, None, :]
            d = d.masked_fill(below == 0, -torch.inf)
            top = torch.maximum(sums + m[:, None], d.amax(-1)).detach()
            p = 0.4 * (q @ k.mT) * torch.exp(d - top[..., None])
            kept = 0.4 * torch.exp(sums + m[:, None] - top)[..., None]
            total = p.sum(-1, keepdim=True) + kept * (q @ n[..., None])
            read = stored(p) @ v + kept * (q @ stored(c))
            rows.append(read / torch.maximum(total.abs(), torch.exp(-top)[..., None]))
            decay = torch.exp(sums[:, -1] + m - top[:, -1])
            m, key = top[:, -1], k * torch.exp(d[:, -1] - top[:, -1:])[..., None]
            c = decay[:, None, None] * c + stored(key).mT @ v
            n = decay[:, None] * n + key.sum(1)
        states.append((c, n, m))
    o = torch.cat(rows, 1).unflatten(1, (-1, t["q"].shape[2])).transpose(0, 1)
    return differentiated(x, t, (o, *(torch.stack(y) for y in zip(*states, strict=True))))
