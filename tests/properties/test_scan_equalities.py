"""Families that are one another's special cases: definitions agree, ball by ball, and so do gradients.

Dyadic inputs make derived tensors (dt·x, dt·A) exact, so that both definitions are asked the same question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnproof.properties.arithmetic import ArbArithmetic
from attnproof.properties.families import family_of
from attnproof.properties.oracle import evaluate

B, H, N, D, E = 1, 2, 12, 3, 2
A = ArbArithmetic(160)


def dyadic(seed: int, *shape: int) -> torch.Tensor:
    """Multiples of 1/8 between −2 and 2: products of three of them are float64 numbers."""
    drawn = torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(seed))
    return (drawn / 8.0).double()


def balls(
    family: str, tensors: tuple[Any, ...], gradients: Mapping[str, torch.Tensor] | None = None, **options: Any
) -> Any:
    """Outputs and, with cotangents, gradients of a call at 160 bits."""
    problem = family_of(family).problem(*tensors, **options)
    found = dict(evaluate(problem, A))
    if gradients:
        found |= {name: A.enclosure(x) for name, x in problem.differentiate(A, gradients).items()}
    return found


def same(x: Any, y: Any, factor: float | torch.Tensor = 1.0) -> None:
    """Both are narrow, and overlap."""
    assert float(x.radius.max()) < 1e-12
    assert float(y.radius.max()) < 1e-12
    apart = (x.value - factor * y.value).abs()
    assert bool((apart <= x.radius + y.radius + 1e-13).all()), float(apart.max())


def test_ssd_is_gated_linear_attention_with_one_gate_a_head() -> None:
    """Theory 6.2 (24): q = C, k = B, v = dt·x, g = dt·A; groups repeat their B and C."""
    x, read, write = dyadic(1, B, H, N, E), dyadic(2, B, 1, N, D), dyadic(3, B, 1, N, D)
    dt, rate = dyadic(4, B, H, N).abs(), -dyadic(5, H).abs()
    start, dy = dyadic(6, B, H, D, E), dyadic(7, B, H, N, E)
    ours = balls("ssd", (x, dt, rate, write, read, None), {"y": dy}, initial_state=start, return_state=True)
    q, k = (t.expand(B, H, N, D) for t in (read, write))
    v, g = dt[..., None] * x, dt * rate[:, None]
    theirs = balls("gated_linear", (q, k, v, g), {"o": dy}, scale=1.0, initial_state=start, return_state=True)
    same(ours["y"], theirs["o"])
    same(ours["state"], theirs["state"])
    same(ours["dx"], theirs["dv"], dt[..., None])
    same(ours["dinitial_state"], theirs["dinitial_state"])


def test_a_selective_scan_with_equal_rates_is_ssd() -> None:
    """One rate for all states of a channel: channels are heads with values of width 1."""
    u, delta = dyadic(8, B, H, N), dyadic(9, B, H, N).abs()
    rate, write, read = -dyadic(10, H).abs(), dyadic(11, B, D, N), dyadic(12, B, D, N)
    skip = dyadic(13, H)
    ours = balls("selective_scan", (u, delta, rate[:, None].expand(H, D), write, read, skip))
    theirs = balls("ssd", (u[..., None], delta, rate, write.mT[:, None], read.mT[:, None], skip))
    same(ours["y"], type(theirs["y"])(theirs["y"].value[..., 0], theirs["y"].radius[..., 0]))


def test_mambas_theorem_1_holds_under_zero_order_hold_and_not_as_shipped() -> None:
    """N = 1, A = −1, B = C = 1, Δ = softplus(z): h_t = (1 − g) h_{t−1} + g x_t, g = σ(z) (theory MAM-2).

    With f = 1 − g that is HGRN (theory 6.2, 27): the selective scan computes it, channel by channel.
    """
    x, z = dyadic(14, B, H, N), dyadic(15, B, H, N)
    one = torch.ones(B, 1, N).double()
    call = (x, z, -torch.ones(H, 1).double(), one, one, None)
    gate, state, rows = torch.sigmoid(z), torch.zeros(B, H).double(), []
    for t in range(N):
        state = (1.0 - gate[:, :, t]) * state + gate[:, :, t] * x[:, :, t]
        rows.append(state)
    theorem = torch.stack(rows, 2)
    held = balls("selective_scan", call, delta_softplus=True, discretization="zoh")["y"]
    assert float((held.value - theorem).abs().max()) < 1e-12
    shipped = balls("selective_scan", call, delta_softplus=True)["y"]
    assert float((shipped.value - theorem).abs().max()) > 0.1


def test_h3_with_an_identity_shift_and_an_accumulator_is_linear_attention() -> None:
    """Taps e_1, a = b = c = 1 (theory H3-1): unnormalised and causal, without forgetting."""
    q, k, v = dyadic(16, B, H, N, D), dyadic(17, B, H, N, D), dyadic(18, B, H, N, E)
    taps = torch.zeros(H, D, 3).double()
    taps[..., 0] = 1.0
    ones, do = torch.ones(H, 1).double(), dyadic(19, B, H, N, E)
    ours = balls("h3", (q, k, v, taps, ones, ones, ones), {"o": do})
    theirs = balls("linear", (q, k, v), {"o": do}, feature_map="identity", normalize=False)
    for name in ("o", "dq", "dk", "dv"):
        same(ours[name], theirs[name])


def test_gated_slot_attention_is_gated_linear_attention_twice() -> None:
    """Theory 6.2 (15): once with every slot as a head, whose states are its keys, and once over the slots."""
    slots, size = 4, (B, H, N)
    q, k, v = dyadic(40, *size, D), dyadic(41, *size, D), dyadic(42, *size, E)
    s, g = dyadic(43, *size, slots), -dyadic(44, *size, slots).abs()
    # Slot m of head h is head h·slots + m, with keys of width 1 that are its s, and values that are k.
    wide = (B, H * slots, N)
    alone = s.permute(0, 1, 3, 2).reshape(*wide, 1)
    gates = g.permute(0, 1, 3, 2).reshape(wide)
    held = balls(
        "gated_linear",
        (torch.ones_like(alone), alone, k.repeat_interleave(slots, 1), gates),
        scale=1.0,
    )["o"].value.reshape(B, H, slots, N, D)
    p = torch.softmax((held * q[:, :, None]).sum(-1).mT, -1)
    read = balls("gated_linear", (p, s, v, g), scale=1.0)["o"].value
    keys, values, rows = torch.zeros(B, H, D, slots).double(), torch.zeros(B, H, slots, E).double(), []
    for t in range(N):
        decay = torch.exp(g[:, :, t])
        keys = keys * decay[:, :, None] + k[:, :, t, :, None] * s[:, :, t, None]
        values = values * decay[..., None] + s[:, :, t, :, None] * v[:, :, t, None]
        weights = torch.softmax((q[:, :, t, None] @ keys)[:, :, 0], -1)
        rows.append((weights[:, :, None] @ values)[:, :, 0])
    assert float((read - torch.stack(rows, 2)).abs().max()) < 1e-12


def test_a_state_space_of_one_head_is_retention_without_queries() -> None:
    """a = 1 − 2^−5, b = c = 1: RetNet's first head with queries and keys of 1 (theory RET-1)."""
    u, ones = dyadic(20, B, 1, N), torch.ones(1, 1).double()
    ours = balls("ssm", (u, (1.0 - 2.0**-5) * ones, ones, ones, None), return_state=True)
    one = torch.ones(B, 1, N, 1).double()
    theirs = balls("retention", (one, one, u[..., None]), scale=1.0, return_state=True)
    same(ours["y"], type(theirs["o"])(theirs["o"].value[..., 0], theirs["o"].radius[..., 0]))


def test_rwkv_4_without_decay_and_bonus_is_prefix_attention() -> None:
    """Channels are heads with a query of 1 and values of width 1; so are their gradients."""
    k, v, do = dyadic(21, B, H, N), dyadic(22, B, H, N), dyadic(23, B, H, N)
    zero = torch.zeros(H).double()
    ours = balls("rwkv4", (zero, zero, k, v), {"o": do})
    one = torch.ones(H, 1).double()
    theirs = balls("prefix_scan", (one, k[..., None], v[..., None]), {"o": do[..., None]}, scale=1.0)
    for name in ("o", "dk", "dv"):
        ball = theirs[name]
        same(ours[name], type(ball)(ball.value[..., 0], ball.radius[..., 0]))


def test_prefix_attention_is_causal_softmax_attention_of_one_query() -> None:
    """Another query at every step makes another function: the recurrence has one query (theory AAR-3)."""
    q, k, v = dyadic(24, H, D), dyadic(25, B, H, N, D), dyadic(26, B, H, N, E)
    ours = balls("prefix_scan", (q, k, v), scale=0.5)["o"]
    queries = q[None, :, None].expand(B, H, N, D)
    theirs = balls("softmax", (queries, k, v), scale=0.5, causal=True)["o"]
    same(ours, theirs)
    turned = queries * torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0)[:, None]
    other = balls("softmax", (turned, k, v), scale=0.5, causal=True)["o"]
    assert float((ours.value - other.value).abs().max()) > 0.1
