"""RWKV-6 and its gradients against the recurrence in float64: the read before the decay, the bonus."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.kernels import gated_linear
from attnproof.kernels.arguments import ContractError
from attnproof.kernels.rwkv6 import attention, recurrent, with_chunk
from tests.kernels.gated_linear_reference import (
    NAMES_WITH_BONUS,
    Inputs,
    assert_within,
    exact,
    inputs,
    results,
)

pytestmark = pytest.mark.usefixtures("emulated")

SCALE = 0.3
INF = math.inf
FACES = {"attention": attention, "recurrent": recurrent, "chunk 16": with_chunk(16)}


def call(entry: Any, given: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v, g, u, initial, _, _, cu_seqlens = given
    o, state = entry(
        q, k, v, g, u, scale=SCALE, initial_state=initial, cu_seqlens=cu_seqlens, return_state=True
    )
    return o, state


def assert_exact(given: Inputs, entry: Any = attention) -> list[Tensor]:
    got = results(functools.partial(call, entry), given)
    assert got[6].dtype == given.q.dtype
    assert_within(got, exact(given, SCALE, given.q.dtype), names=NAMES_WITH_BONUS)
    return got


@pytest.mark.parametrize("n", [0, 1, 17, 130])
def test_lengths(n: int) -> None:
    assert_exact(inputs(n=n, bonus=True))


@pytest.mark.parametrize(
    ("face", "dtype"),
    [("attention", torch.float16), ("recurrent", torch.bfloat16), ("chunk 16", torch.float32)],
    ids=str,
)
def test_faces(face: str, dtype: torch.dtype) -> None:
    assert_exact(inputs(dtype, n=70, bonus=True), FACES[face])


@pytest.mark.parametrize("value", [0.0, -100.0, -INF])
def test_gates(value: float) -> None:
    """A gate acts after the read: with −inf everywhere, o_t still sees position t − 1."""
    given = inputs(n=37, bonus=True)
    given = given._replace(g=torch.full_like(given.g, value))
    o, *_, dg, _, _ = assert_exact(given)
    if value == -INF:
        assert not dg.any()
        (q, k, v), u = (x.double() for x in given[:3]), given.u.double()[:, None]
        own = (q * u * k).sum(-1, keepdim=True) * v
        last = (q[:, :, 1:] * k[:, :, :-1]).sum(-1, keepdim=True) * v[:, :, :-1]
        first = q[:, :, :1] @ given.initial.double()
        want = SCALE * (own + torch.cat((first, last), 2))
        torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=1e-5)


def test_alternating_gates() -> None:
    given = inputs(n=40, bonus=True)
    g = torch.where(torch.rand_like(given.g) < 0.2, -INF, given.g)
    *_, dg, _, _ = assert_exact(given._replace(g=g))
    assert not dg[g.isinf()].any()
    assert dg[~g.isinf()].any()


def test_packed_sequences() -> None:
    assert_exact(inputs(n=40, bonus=True, cu_seqlens=[0, 0, 17, 18, 40]))


def test_read_before_the_decay() -> None:
    """Without a bonus, position t reads what gated linear attention shows at t − 1 (theory RWK-2)."""
    given = inputs(n=37, bonus=True)
    q, k, v, g, u = given[:5]
    want = gated_linear.attention(q.roll(-1, 2), k, v, g, scale=SCALE)
    got = attention(q, k, v, g, u * 0, scale=SCALE)
    torch.testing.assert_close(got[:, :, 1:], want[:, :, :-1], rtol=1e-4, atol=1e-4)
    assert not got[:, :, 0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.zeros(1, 2, 70)}, r"g has shape \(1, 2, 70\): expected \(1, 2, 70, 20\)"),
        ({"u": torch.zeros(20, 2)}, r"u has shape \(20, 2\): expected \(H, D\) = \(2, 20\)"),
        ({"u": torch.zeros(2, 20).half()}, "u is torch.float16 while q is torch.float32"),
    ],
)
def test_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        call(attention, inputs(bonus=True)._replace(**change))
