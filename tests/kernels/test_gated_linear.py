"""Gated linear attention and its gradients against the recurrence in float64: gates, sizes, packing."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.kernels.arguments import ContractError
from attnproof.kernels.gated_linear import attention, recurrent, with_chunk
from attnproof.kernels.states import Sequences
from attnproof.properties.contract import contract_of
from tests.kernels.gated_linear_reference import Inputs, assert_within, exact, inputs, results

pytestmark = pytest.mark.usefixtures("emulated")

SCALE = 0.3
INF = math.inf
FACES = {
    "attention": attention,
    "recurrent": recurrent,
    "chunk 16": with_chunk(16),
    "chunk 128": with_chunk(128),
}


def call(entry: Any, given: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v, g, _, initial, _, _, cu_seqlens = given
    o, state = entry(q, k, v, g, scale=SCALE, initial_state=initial, cu_seqlens=cu_seqlens, return_state=True)
    return o, state


def assert_exact(given: Inputs, entry: Any = attention) -> list[Tensor]:
    got = results(functools.partial(call, entry), given)
    for x, like in zip(got, (given.q, given.initial, *given[:4], given.initial), strict=True):
        assert x.dtype == like.dtype
    assert_within(got, exact(given, SCALE, given.q.dtype))
    return got


@pytest.mark.parametrize(
    ("n", "scalar"), [(0, False), (0, True), (1, True), (17, False), (17, True), (130, True)]
)
def test_lengths(n: int, scalar: bool) -> None:
    assert_exact(inputs(n=n, scalar=scalar))


@pytest.mark.parametrize(
    ("face", "dtype"),
    [
        ("attention", torch.float16),
        ("attention", torch.bfloat16),
        ("recurrent", torch.bfloat16),
        ("chunk 16", torch.float32),
        ("chunk 128", torch.float16),
    ],
    ids=str,
)
def test_faces(face: str, dtype: torch.dtype) -> None:
    assert_exact(inputs(dtype, n=140 if face == "chunk 128" else 70), FACES[face])


def alternating(g: Tensor) -> Tensor:
    g = torch.zeros_like(g)
    g[:, :, ::2] = -INF
    return g


def one_huge(g: Tensor) -> Tensor:
    """A huge gate, then small ones: a difference of cumulative sums would lose them (bugs B46)."""
    g = g / 1000
    g[:, :, 3] = -1e6
    g[:, :, 21] = -1e30
    return g


def one_closed(g: Tensor) -> Tensor:
    g = g.clone()
    g[:, :, 37] = -INF
    g[:, :1, 5] = -INF
    return g


GATES = {
    "0": torch.zeros_like,
    "-1e-6": lambda g: torch.full_like(g, -1e-6),
    "-5": lambda g: 10 * g,
    "-100": lambda g: torch.full_like(g, -100.0),
    "-1000": lambda g: torch.full_like(g, -1000.0),
    "-inf": lambda g: torch.full_like(g, -INF),
    "0 and -inf": alternating,
    "one huge": one_huge,
    "one closed": one_closed,
    "by channel": lambda g: g * torch.logspace(-6, 4, g.shape[-1]),
}
# more than the 64 positions of a chunk; in the others secondary chunks of 16 are enough
ACROSS_CHUNKS = ("0", "0 and -inf", "one closed")


@pytest.mark.parametrize(
    ("gates", "dtype"),
    [*((gates, torch.float32) for gates in GATES), ("one huge", torch.bfloat16)],
    ids=str,
)
def test_gates(gates: str, dtype: torch.dtype) -> None:
    given = inputs(dtype, n=70 if gates in ACROSS_CHUNKS else 40)
    given = given._replace(g=GATES[gates](given.g))
    o, _, *_, dg, dinitial = assert_exact(given)
    assert not dg[given.g.isinf()].any(), "the gradient of a gate of -inf is 0"
    if gates == "-inf":
        own = SCALE * (given.q.double() * given.k.double()).sum(-1, keepdim=True) * given.v.double()
        torch.testing.assert_close(o.double(), own, rtol=2e-3, atol=2e-3)
        assert not dinitial.any()


@pytest.mark.parametrize("gates", ["0 and -inf", "one huge"])
def test_gates_step_by_step(gates: str) -> None:
    given = inputs(n=40, scalar=True)
    assert_exact(given._replace(g=GATES[gates](given.g)), recurrent)


def test_gates_in_half_precision() -> None:
    given = inputs(torch.bfloat16, n=33)
    assert_exact(given._replace(g=given.g.bfloat16()))


@pytest.mark.parametrize("face", ["attention", "recurrent"])
@pytest.mark.parametrize("ends", [[0, 0, 17, 18, 18, 90], [0]], ids=str)
def test_packed_sequences(ends: list[int], face: str) -> None:
    assert_exact(inputs(n=ends[-1], cu_seqlens=ends), FACES[face])


@pytest.mark.parametrize(("d", "e"), [(1, 1), (40, 72)])
def test_widths(d: int, e: int) -> None:
    assert_exact(inputs(b=2, h=1, n=18, d=d, e=e))


def test_layouts() -> None:
    """Transposed inputs, gates and states, and cotangents with strides of 0."""
    given = inputs(b=2, h=2, n=37, d=16, e=16)
    turned = [x.mT.contiguous().mT for x in given[:4]]
    given = given._replace(**dict(zip(("q", "k", "v", "g"), turned, strict=True)))
    given = given._replace(initial=given.initial.mT, do=torch.randn(1, 2, 1, 1).expand(2, 2, 37, 16))
    assert_exact(given)
    assert_exact(given, recurrent)


def test_states_carry_on() -> None:
    """Two halves with the state between them are the whole."""
    given = inputs(n=70)
    whole, end = call(attention, given)
    q, k, v, g = given[:4]
    for cut in (16, 69):
        first, state = attention(*(x[:, :, :cut] for x in (q, k, v, g)), scale=SCALE,
                                 initial_state=given.initial, return_state=True)  # fmt: skip
        second, last = attention(*(x[:, :, cut:] for x in (q, k, v, g)), scale=SCALE,
                                 initial_state=state, return_state=True)  # fmt: skip
        torch.testing.assert_close(torch.cat((first, second), 2), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("face", ["attention", "recurrent"])
@pytest.mark.parametrize(
    ("name", "bad"), [("q", math.nan), ("k", math.nan), ("k", INF), ("v", math.nan), ("v", INF), ("g", INF)]
)
def test_values_that_a_row_does_not_see(name: str, bad: float, face: str) -> None:
    """What stands at position 20 of head 1 reaches no earlier position and no other head."""
    given = inputs(n=70)
    clean, end = call(FACES[face], given)
    spoilt = getattr(given, name).clone()
    spoilt[:, 1, 20, 3] = bad
    o, state = call(FACES[face], given._replace(**{name: spoilt}))
    assert torch.equal(o[:, 0], clean[:, 0])
    assert torch.equal(o[:, 1, :20], clean[:, 1, :20])
    assert torch.equal(state[:, 0], end[:, 0])
    assert not torch.equal(o[:, 1, 20:], clean[:, 1, 20:])


@pytest.mark.parametrize(("output", "asked"), [(0, "v"), (0, "g"), (1, "g"), (1, "initial")])
def test_single_gradients(output: int, asked: str) -> None:
    """One input that asks for a gradient, one output that gets a cotangent: as in the whole."""
    given = inputs(n=37)
    cotangents = {0: {"dstate": given.dstate * 0}, 1: {"do": given.do * 0}}[output]
    place = {"q": 2, "v": 4, "g": 5, "initial": 6}[asked]
    want = results(functools.partial(call, attention), given._replace(**cotangents))[place]
    leaf = getattr(given, asked).detach().requires_grad_()
    out = call(attention, given._replace(**{asked: leaf}))[output]
    cotangent = given.do if output == 0 else given.dstate
    (got,) = torch.autograd.grad(out, leaf, cotangent)
    assert torch.equal(got, want)


def test_range_of_float16() -> None:
    """States and scores beyond 65504, the outputs within."""
    given = inputs(torch.float16, n=33)
    given = given._replace(q=given.q * 2.0**-12, k=given.k * 2.0**9, v=given.v * 2.0**9, do=given.do / 4096)
    assert_exact(given._replace(initial=given.initial * 2.0**20, g=given.g / 8))
    assert_exact(given._replace(q=given.q * 2.0**20, k=given.k, v=given.v * 2.0**-20))


def test_runs_agree() -> None:
    given = inputs(torch.bfloat16, n=70)
    copies = [x.clone() for x in given[:8] if x is not None]
    first, second = (results(functools.partial(call, attention), given) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(
        torch.equal(x, y) for x, y in zip(copies, [x for x in given[:8] if x is not None], strict=True)
    )


def test_sequences_into_chunks() -> None:
    chunks = Sequences(3, 33, torch.tensor([0, 33, 33, 49], dtype=torch.int32)).chunks(16)
    assert chunks.count == 4
    assert chunks.first is not None and chunks.first.tolist() == [0, 3, 3, 4]
    assert chunks.owner is not None and chunks.owner.tolist() == [0, 0, 0, 2]
    assert Sequences(3, 33, None).chunks(16).count == 9


def test_declared() -> None:
    for face in FACES.values():
        contract = contract_of(face)
        assert contract is not None
        assert contract.family == "gated_linear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 5, 20)}, "as many queries as"),
        (
            {"k": torch.zeros(1, 1, 70, 20), "v": torch.zeros(1, 1, 70, 12)},
            "as many query heads as key heads",
        ),
        ({"g": torch.zeros(1, 2, 70, 5)}, r"g has shape \(1, 2, 70, 5\): expected \(1, 2, 70\) or"),
        ({"g": torch.zeros(1, 2, 70).half()}, "g is torch.float16 while q is torch.float32"),
        ({"g": None}, "g is a NoneType"),
        ({"initial": torch.zeros(1, 2, 12, 20)}, r"initial_state has shape .*expected \(1, 2, 20, 12\)"),
        ({"initial": torch.zeros(1, 2, 20, 12).half()}, "states are float32"),
        ({"initial": 0.0}, "initial_state is a float"),
        ({"cu_seqlens": torch.tensor([0, 71], dtype=torch.int32)}, "expected to rise from 0 to the length"),
    ],
)
def test_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        call(attention, inputs()._replace(**change))


def test_options() -> None:
    given = inputs()
    with pytest.raises(ContractError, match="chunk=48: expected one of 16, 32, 64, 128"):
        with_chunk(48)
    with pytest.raises(ContractError, match="scale=nan"):
        attention(*given[:4], scale=math.nan)
    with pytest.raises(NotImplementedError, match="float64"):
        attention(*(x.double() for x in given[:4]), scale=1.0)
