"""RWKV-4's time mixing and its gradients against the loop over positions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.kernels.arguments import ContractError
from attnproof.kernels.rwkv4 import RWKV4, attention, recurrent
from attnproof.properties.families import rwkv4 as family
from tests.kernels.prefix_scan_reference import (
    assert_gradients_of_states,
    assert_handed_over,
    judge,
    judge_outputs,
    time_mixing,
    time_recurrence,
)

pytestmark = pytest.mark.usefixtures("emulated")

FORMS = {x.__name__: x for x in (attention, recurrent)}
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(n: int, dtype: torch.dtype = torch.float32, *, batch: int = 2, heads: int = 5) -> Tensors:
    w, u = -torch.rand(heads), torch.randn(heads)
    k, v = torch.randn(batch, heads, n), torch.randn(batch, heads, n)
    return w.to(dtype), u.to(dtype), k.to(dtype), v.to(dtype)


def judged(entry: Callable[..., Any], tensors: Tensors) -> None:
    judge(family.RWKV4, RWKV4, entry, time_mixing, tensors)


def judge_every_form(tensors: Tensors, **options: Any) -> None:
    """o and the final state of all forms against the same exact values, whatever the order of their sums."""
    for entry in FORMS.values():
        judge_outputs(family.RWKV4, RWKV4, entry, tensors, **options)


@pytest.mark.parametrize("n", [1, 70])
@pytest.mark.parametrize("name", FORMS)
def test_lengths(name: str, n: int) -> None:
    """One position, and a tile beside one that is not full."""
    judged(FORMS[name], inputs(n))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype: torch.dtype) -> None:
    name = "attention" if dtype == torch.float16 else "recurrent"
    judged(FORMS[name], inputs(20, dtype))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=str)
def test_nothing(name: str, shape: tuple[int, int]) -> None:
    """No position gives back the state before it, and its cotangents."""
    batch, n = shape
    leaves = [x.requires_grad_() for x in inputs(n, batch=batch)]
    o, a, b, p = FORMS[name](*leaves, return_state=True)
    assert o.shape == (batch, 5, n)
    if n == 0:
        assert not a.any()
        assert not b.any()
        assert (p == -math.inf).all()
        start = (torch.randn(batch, 5), torch.rand(batch, 5), torch.full((batch, 5), -math.inf))
        sums = [x.requires_grad_() for x in start[:2]]
        _, *end = FORMS[name](*leaves, initial_state=start, return_state=True)
        assert all(map(torch.equal, start, end))
        cotangents = [torch.randn(x.shape) for x in sums]
        assert all(map(torch.equal, torch.autograd.grad(end[:2], sums, cotangents), cotangents))
    for got, leaf in zip(torch.autograd.grad(o, leaves, torch.ones_like(o)), leaves, strict=True):
        assert got.shape == leaf.shape
        assert not got.any()


STEPS = torch.arange(40.0)
ALTERNATING = torch.tensor([1e4, -1e4, -1e4, 1e4, 9999.0, 1e4, -1e4, 0.0] * 5)
# (w, u, k) of one channel
EXTREMES = {
    "no decay": (0.0, 0.5, torch.randn(40)),
    "w = −1e3": (-1e3, 0.5, torch.randn(40)),
    "w = −1e3, rising as fast": (-1e3, 0.0, STEPS * -1e3),
    "a decay below the last place of k": (-1e-4, -3.0, torch.tensor([1e4] + [9990.0] * 39)),
    "all equal": (-0.125, 1.0, torch.full((40,), 5.0)),
    "a new maximum at every step": (-0.5, -1.0, STEPS * 3),
    "falling faster than the decay": (-0.5, -1.0, STEPS * -3),
    "±1e4": (-0.25, 0.0, ALTERNATING),
    "±1e4, no decay, own logit far above": (0.0, 1e4, ALTERNATING),
    "±1e4, own logit far below": (-0.25, -1e4, ALTERNATING),
}


def test_extremes() -> None:
    """One channel each; both forms forward, and the backward pass, which they share, once."""
    w, u, k = zip(*EXTREMES.values(), strict=True)
    tensors = (
        torch.tensor(w),
        torch.tensor(u),
        torch.stack(k)[None].to(torch.ones(1).device),
        torch.randn(1, len(w), 40),
    )
    judge_every_form(tensors)
    judged(attention, tensors)


@pytest.mark.parametrize("name", FORMS)
def test_slow_decays_are_not_lost(name: str) -> None:
    """p = 100 has no place for a decay of 3·10⁻⁶: subtracted step by step it never acts, counted it does.

    After n steps the first of two equal logits has lost 3n·10⁻⁶, and the two no longer weigh one half each.
    """
    n = 300
    k = torch.full((1, 1, n), -1e4)
    k[0, 0, 0] = k[0, 0, n - 1] = 100.0
    v = torch.zeros(1, 1, n)
    v[0, 0, 0] = 1.0
    o = FORMS[name](torch.tensor([-3e-6]), torch.tensor([0.0]), k, v)
    want = 1 / (1 + math.exp((n - 2) * 3e-6))
    assert abs(o[0, 0, -1].item() - want) < 2e-7
    assert abs(want - 0.5) > 2e-4


@pytest.mark.parametrize("split", [0, 1, 64])
def test_state_is_handed_over(split: int) -> None:
    """In two calls what one call gives, gradients too, whichever form makes either part."""
    w, u, k, v = leaves = [x.requires_grad_() for x in inputs(70)]
    want = attention(w, u, k, v, return_state=True)
    for first, second in ((attention, recurrent), (recurrent, attention)):
        head, *state = first(w, u, k[..., :split], v[..., :split], return_state=True)
        tail, *end = second(
            w, u, k[..., split:], v[..., split:], initial_state=tuple(state), return_state=True
        )
        assert_handed_over(want, (torch.cat((head, tail), 2), *end), leaves)


@pytest.mark.parametrize("kind", ["neutral", "large", "random"])
def test_initial_states(kind: str) -> None:
    a, b, p = torch.randn(2, 5), 1 + torch.rand(2, 5), torch.randn(2, 5)
    if kind == "large":
        p = p + 1e4
    if kind == "neutral":
        a[0, 1], b[0, 1], p[0, 1] = 0.0, 0.0, -math.inf
    judge_every_form(inputs(20), initial_state=(a, b, p))


def state_before() -> tuple[Tensor, Tensor, Tensor]:
    """Levels among the keys, far above and below them, and a neutral channel."""
    a, b, p = torch.randn(2, 5), 1 + torch.rand(2, 5), torch.randn(2, 5)
    p[1, :3] = torch.tensor([3.0, 1e4, -1e4])
    a[0, 1], b[0, 1], p[0, 1] = 0.0, 0.0, -math.inf
    return a, b, p


@pytest.mark.parametrize("n", [1, 70])
@pytest.mark.parametrize("name", FORMS)
def test_gradients_of_states(name: str, n: int) -> None:
    """Of the initial state and of all inputs by way of the final one; channels that decay slowly, not at all,
    and so fast that nothing is left, also at once.
    """
    w, u, k, v = inputs(n)
    w[:4] = torch.tensor([0.0, -0.01, -1e3, -math.inf])
    assert_gradients_of_states(FORMS[name], time_recurrence, (w, u, k, v), state_before(), 2)


@pytest.mark.parametrize("used", [(0,), (1,), (2,)])
def test_cotangents_of_some_outputs(used: tuple[int, ...]) -> None:
    """Of o alone, of a alone, of b alone: what nobody used has none."""
    assert_gradients_of_states(attention, time_recurrence, inputs(5), state_before(), 2, used=used)


def test_what_needs_no_gradient() -> None:
    """Only the initial a asks for one; a level alone asks in vain, and keeps no graph."""
    tensors, (a, b, p) = inputs(5), state_before()
    o, *end = attention(*tensors, initial_state=(a.requires_grad_(), b, p), return_state=True)
    (da,) = torch.autograd.grad((o.sum(), end[0].sum()), (a,))
    assert da.shape == a.shape
    assert da[0, 0].all()
    for x in attention(*tensors, initial_state=(a.detach(), b, p.requires_grad_()), return_state=True):
        assert not x.requires_grad


def test_strides() -> None:
    """Transposed, stepped and expanded inputs and cotangents give what their copies give, bit for bit."""
    w, u, k, v = inputs(20)
    given = (w.repeat(2, 1).T[:, 0], u[:1].expand(5), k.mT.contiguous().mT, v.repeat(1, 1, 2)[..., ::2])
    cotangent = torch.randn(5, 1).expand(2, 5, 20)
    for entry in FORMS.values():
        results = []
        for tensors, do in ((given, cotangent), ([x.contiguous() for x in given], cotangent.contiguous())):
            leaves = [x.detach().requires_grad_() for x in tensors]
            before = [x.detach().clone() for x in leaves]
            o = entry(*leaves)
            results.append([o, *torch.autograd.grad(o, leaves, do)])
            assert all(map(torch.equal, before, leaves))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", FORMS)
def test_nothing_leaks_back(name: str) -> None:
    """Positions before a bad key or value, and other channels, are what they are without it."""
    w, u, k, v = inputs(40)
    want = FORMS[name](w, u, k, v)
    k[:, 0, 21], v[:, 1, 18], k[:, 2, 30] = math.nan, math.inf, -math.inf
    got = FORMS[name](w, u, k, v)
    for channel, end in enumerate((21, 18, 30, 40, 40)):
        assert torch.equal(got[:, channel, :end], want[:, channel, :end])
    assert not got[:, 1, 18:].isfinite().any()


STATE = (torch.zeros(2, 5),) * 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": torch.zeros(4)}, ContractError, r"w has shape \(4,\) with k .*\(H,\) = \(5,\)"),
        ({"k": torch.zeros(5, 4)}, ContractError, r"k has shape \(5, 4\): expected axes \(B, H, N\)"),
        ({"v": torch.zeros(2, 5, 3)}, ContractError, "expected one shape"),
        ({"u": torch.zeros(5).half()}, ContractError, "u is torch.float16"),
        ({"v": torch.zeros(2, 5, 4).double()}, NotImplementedError, "float64"),
        ({"initial_state": STATE[:2]}, ContractError, r"expected a tuple \(a, b, p\)"),
    ],
)
def test_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    w, u, k, v = inputs(4)
    given = {"w": w, "u": u, "k": k, "v": v, **change}
    with pytest.raises(error, match=message):
        attention(**given)
