"""Prefix attention in all its forms against the loop over positions in float64, and the monoid's laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.kernels.arguments import ContractError
from attnproof.kernels.prefix_scan import (
    PREFIX_SCAN,
    State,
    attention,
    blelloch,
    hillis_steele,
    recurrent,
    update,
)
from attnproof.properties.families import prefix_scan as family
from tests.kernels.native import assert_same_bits
from tests.kernels.prefix_scan_reference import (
    assert_gradients_of_states,
    assert_handed_over,
    judge,
    judge_outputs,
    prefix_attention,
    prefix_recurrence,
)

pytestmark = pytest.mark.usefixtures("emulated")

FORMS = {x.__name__: x for x in (attention, recurrent, hillis_steele, blelloch)}
SCALE = 0.3
Tensors = tuple[Tensor, Tensor, Tensor]


def inputs(n: int, dtype: torch.dtype = torch.float32, *, batch: int = 2, d: int = 5, e: int = 7) -> Tensors:
    shapes = ((3, d), (batch, 3, n, d), (batch, 3, n, e))
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, v


def with_logits(logits: Tensor) -> Tensors:
    """Heads of width 1 whose logits at scale 1 are ``logits`` (H,N), exactly."""
    heads, n = logits.shape
    return torch.ones(heads, 1), logits[None, ..., None], torch.randn(1, heads, n, 7)


def judged(entry: Callable[..., Any], tensors: Tensors, scale: float = SCALE) -> None:
    judge(family.PREFIX_SCAN, PREFIX_SCAN, entry, prefix_attention, tensors, scale=scale)


def judge_every_form(tensors: Tensors, **options: Any) -> None:
    """o and the final state of all forms against the same exact values, whatever the order of their sums."""
    for entry in FORMS.values():
        judge_outputs(family.PREFIX_SCAN, PREFIX_SCAN, entry, tensors, **options)


@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("name", FORMS)
def test_lengths(name: str, n: int) -> None:
    """One position, and several blocks with a ragged last one; D and E are no powers of two."""
    judged(FORMS[name], inputs(n))


@pytest.mark.parametrize(
    ("name", "dtype"), [("attention", torch.float16), ("blelloch", torch.bfloat16)], ids=str
)
def test_halves(name: str, dtype: torch.dtype) -> None:
    """D and E of more than one slice."""
    judged(FORMS[name], inputs(20, dtype, batch=1, d=40, e=36))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)], ids=str)
def test_nothing(name: str, shape: tuple[int, int]) -> None:
    """No position gives back the state before it, and its cotangents; no batch entry zeros for dq."""
    batch, n = shape
    q, k, v = (x.requires_grad_() for x in inputs(n, batch=batch))
    o, *state = FORMS[name](q, k, v, scale=SCALE, return_state=True)
    assert o.shape == v.shape
    if n == 0:
        assert (state[0] == -math.inf).all()
        assert not state[1].any()
        assert not state[2].any()
        # neutral in a head: nothing to exponentiate
        m = torch.tensor([0.5, -math.inf, 3.0]).repeat(batch, 1)
        start = State(m, (m > 0).float(), torch.randn(batch, 3, 7))
        sums = [x.requires_grad_() for x in start[1:]]
        _, *end = FORMS[name](q, k, v, scale=SCALE, initial_state=start, return_state=True)
        assert all(map(torch.equal, start, end))
        assert not {x.data_ptr() for x in start if x.numel()} & {x.data_ptr() for x in end}
        cotangents = [torch.randn(x.shape) for x in sums]
        assert all(map(torch.equal, torch.autograd.grad(end[1:], sums, cotangents), cotangents))
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert not dq.any()
    assert dk.shape == k.shape
    assert dv.shape == v.shape


LOGITS = {
    "a new maximum at every step": torch.arange(40.0) * 3,
    "far apart": torch.arange(40.0) * 200,
    "falling": torch.arange(40.0) * -3,
    "all equal": torch.full((40,), 7.0),
    "all zero": torch.zeros(40),
    "±1e4": torch.tensor([1e4, -1e4, -1e4, 1e4, 9999.0, 1e4, -1e4, 0.0, 1e4, -9999.0] * 4),
    "−1e4 first": torch.tensor([-1e4] * 20 + [1e4] * 20),
}


def test_logits() -> None:
    """A head each: every form forward, and the backward pass, which is the same for all, once."""
    tensors = with_logits(torch.stack([*LOGITS.values()]).to(torch.ones(1).device))
    judge_every_form(tensors, scale=1.0)
    judged(attention, tensors, 1.0)


def test_equal_logits_are_a_running_mean() -> None:
    q, k, v = with_logits(torch.full((1, 40), 12.5))
    want = v.double().cumsum(2) / torch.arange(1, 41)[:, None]
    for entry in FORMS.values():
        torch.testing.assert_close(entry(q, k, v, scale=1.0).double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", [0, 1, 16, 36])
def test_state_is_handed_over(split: int) -> None:
    """In two calls what one call gives, gradients too, whichever form makes either part."""
    q, k, v = leaves = [x.requires_grad_() for x in inputs(37)]
    want = attention(q, k, v, scale=SCALE, return_state=True)
    forms = itertools.cycle(itertools.permutations(FORMS.values(), 2))
    for _, (first, second) in zip(range(3), itertools.islice(forms, split, None, 3), strict=False):
        head, *state = first(q, k[:, :, :split], v[:, :, :split], scale=SCALE, return_state=True)
        tail, *end = second(
            q, k[:, :, split:], v[:, :, split:], scale=SCALE, initial_state=tuple(state), return_state=True
        )
        assert_handed_over(want, (torch.cat((head, tail), 2), *end), leaves)


@pytest.mark.parametrize("kind", ["neutral", "large", "random"])
def test_initial_states(kind: str) -> None:
    """Also the neutral element, which an initial state may be, in a head beside others."""
    tensors = inputs(37)
    m, u, w = torch.randn(2, 3), 1 + torch.rand(2, 3), torch.randn(2, 3, 7)
    if kind == "large":
        m = m + 1e4
    if kind == "neutral":
        m[0, 1], u[0, 1], w[0, 1] = -math.inf, 0.0, 0.0
    judge_every_form(tensors, scale=SCALE, initial_state=(m, u, w))


def state_before(e: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels among the logits, far above and below them, and a neutral head."""
    m, u, w = torch.randn(2, 3), 1 + torch.rand(2, 3), torch.randn(2, 3, e)
    m[1] = torch.tensor([3.0, 1e4, -1e4])
    m[0, 1], u[0, 1], w[0, 1] = -math.inf, 0.0, 0.0
    return m, u, w


@pytest.mark.parametrize("name", FORMS)
def test_gradients_of_states(name: str) -> None:
    """Of the initial state and of all inputs by way of the final one; two slices of E, two blocks."""
    assert_gradients_of_states(
        FORMS[name], prefix_recurrence, inputs(37, e=40), state_before(40), 0, scale=SCALE
    )


@pytest.mark.parametrize("used", [(0,), (2,), (3,)])
def test_cotangents_of_some_outputs(used: tuple[int, ...]) -> None:
    """Of o alone, of u alone, of w alone: what nobody used has none."""
    assert_gradients_of_states(
        attention, prefix_recurrence, inputs(5), state_before(7), 0, used=used, scale=SCALE
    )


def test_what_needs_no_gradient() -> None:
    """Only the initial w asks for one; a level alone asks in vain, and keeps no graph."""
    tensors, (m, u, w) = inputs(5), state_before(7)
    o, *end = attention(*tensors, scale=SCALE, initial_state=(m, u, w.requires_grad_()), return_state=True)
    (dw,) = torch.autograd.grad((o.sum(), end[2].sum()), (w,))
    assert dw.shape == w.shape
    assert dw[0, 0].all()
    state = (m.requires_grad_(), u, w.detach())
    for x in attention(*tensors, scale=SCALE, initial_state=state, return_state=True):
        assert not x.requires_grad


@pytest.mark.parametrize("steps", [1, 5])
def test_update(steps: int) -> None:
    """Many to one: the state by few tokens at a time, and its quotient w/u the last output."""
    q, k, v = inputs(20)
    o, *want = attention(q, k, v, scale=SCALE, return_state=True)
    state = None
    for t in range(0, 20, steps):
        state = update(state, q, k[:, :, t : t + steps], v[:, :, t : t + steps], SCALE)
    assert state is not None
    for x, y in zip(state, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.w / state.u[..., None], o[:, :, -1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ContractError, match="update: state requires a gradient, and gets none"):
        update(State(state.m, state.u, state.w.requires_grad_()), q, k, v, SCALE)


@pytest.mark.parametrize("name", FORMS)
def test_strides(name: str) -> None:
    """Transposed, stepped and expanded inputs and cotangents give what their copies give, bit for bit."""
    q, k, v = inputs(20)
    given = (
        q.T.contiguous().T,
        k.transpose(1, 2).contiguous().transpose(1, 2),
        v.repeat(1, 1, 1, 2)[..., ::2],
    )
    given = (given[0], given[1], given[2].expand(2, 3, 20, 7))
    cotangent = torch.randn(3, 1, 7).expand(2, 3, 20, 7)
    results = []
    for tensors, do in ((given, cotangent), ([x.contiguous() for x in given], cotangent.contiguous())):
        leaves = [x.detach().requires_grad_() for x in tensors]
        before = [x.detach().clone() for x in leaves]
        o = FORMS[name](*leaves, scale=SCALE)
        results.append([o, *torch.autograd.grad(o, leaves, do)])
        assert all(map(torch.equal, before, leaves))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", FORMS)
def test_nothing_leaks_back(name: str) -> None:
    """Positions before a bad key or value are what they are without it."""
    q, k, v = inputs(40)
    want = FORMS[name](q, k, v, scale=SCALE)
    k[:, 0, 21], v[:, 1, 18] = math.nan, math.inf
    got = FORMS[name](q, k, v, scale=SCALE)
    assert torch.equal(got[:, 0, :21], want[:, 0, :21])
    assert torch.equal(got[:, 1, :18], want[:, 1, :18])
    assert torch.equal(got[:, 2], want[:, 2])
    assert not got[:, 1, 18:].isfinite().any()


STATE = (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, 7))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 4)}, ContractError, r"one query a head of k, \(H, D\) = \(3, 5\)"),
        ({"q": torch.zeros(1, 3, 4, 5)}, ContractError, r"q has shape .*: expected axes \(H, D\)"),
        ({"v": torch.zeros(2, 3, 5, 7)}, ContractError, "must agree in batch, heads and length"),
        ({"v": torch.zeros(2, 3, 4, 7).half()}, ContractError, "v is torch.float16"),
        ({"v": torch.zeros(2, 3, 4, 7).double()}, NotImplementedError, "float64"),
        ({"v": torch.zeros(2, 3, 4, 257)}, NotImplementedError, "width E is 257"),
        ({"scale": math.inf}, ContractError, "scale=inf"),
        ({"initial_state": STATE[:2]}, ContractError, r"expected a tuple \(m, u, w\)"),
        ({"initial_state": (*STATE[:2], STATE[0])}, ContractError, "w of initial_state has shape"),
    ],
)
def test_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = inputs(4)
    given = {"q": q, "k": k, "v": v, "scale": 1.0, **change}
    with pytest.raises(error, match=message):
        attention(**given)
