"""Delta-rule attention by chunks and step by step, and its gradients, within derived bounds of float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.kernels import delta
from attnproof.kernels.arguments import ContractError
from attnproof.properties.contract import contract_of
from tests.kernels.delta_reference import Call, ratios

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GATES = ["none", "scalar", "vector"]


def drawn(
    dtype: torch.dtype = torch.float32,
    gate: str = "none",
    *,
    b: int = 1,
    h: int = 2,
    n: int = 37,
    d: int = 12,
    e: int = 20,
    cuts: list[int] | None = None,
    strength: float = 1.0,
) -> Call:
    """Unit keys, beta in [0, 2] and gates of mean −strength; an initial state for every sequence."""
    sequences = b if cuts is None else len(cuts) - 1
    k = torch.nn.functional.normalize(torch.randn(b, h, n, d), dim=-1)
    g = None if gate == "none" else -strength * 2 * torch.rand(b, h, n, *([d] if gate == "vector" else []))
    inputs = {
        "q": torch.randn(b, h, n, d).to(dtype),
        "k": k.to(dtype),
        "v": torch.randn(b, h, n, e).to(dtype),
        # the key may be a little longer than 1 after rounding
        "beta": (1.98 * torch.rand(b, h, n)).to(dtype),
        "g": g if g is None else g.to(dtype),
        "initial_state": torch.randn(sequences, h, d, e),
    }
    cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    do, dstate = torch.randn(b, h, n, e).to(dtype), torch.randn(sequences, h, d, e)
    return Call(inputs, do, dstate, 0.5, cu_seqlens)


def assert_within(call: Call, chunk: int | None) -> dict[str, Tensor]:
    """By chunks of ``chunk``, or step by step if it is None."""
    got = call.run(delta.recurrent if chunk is None else delta.with_chunk(chunk))
    for name, ratio in ratios(call, got, chunk or 1).items():
        assert ratio <= 1, f"{name} is off by {ratio:.3g} times the bound"
    return got


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_gates_and_chunks(dtype: torch.dtype, gate: str) -> None:
    """Dtypes by gates; each of them meets chunks and the recurrence, in turn."""
    stepwise = (DTYPES.index(dtype) + GATES.index(gate)) % 2
    assert_within(drawn(dtype, gate), None if stepwise else 16)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("n", [1, 17, 66])
def test_lengths(n: int, chunk: int | None) -> None:
    assert_within(drawn(gate="vector", n=n, h=1), chunk)


@pytest.mark.parametrize(("gate", "chunk"), [("none", 16), ("scalar", None), ("vector", 16)])
def test_packed_sequences(gate: str, chunk: int | None) -> None:
    assert_within(drawn(gate=gate, n=52, cuts=[0, 0, 17, 18, 52, 52]), chunk)


# Above 32 channels in float32 and 64 in float16 the state is read row by row.
@pytest.mark.parametrize(("d", "e", "chunk"), [(1, 1, None), (33, 40, 16), (50, 20, 16)])
def test_widths(d: int, e: int, chunk: int | None) -> None:
    assert_within(drawn(torch.float16, "vector", b=2, h=1, n=35, d=d, e=e), chunk)


def test_wide_states_in_half_precision() -> None:
    assert_within(drawn(torch.float16, "vector", n=18, d=100, e=20), 16)


def test_strides() -> None:
    """Sequence axes last in memory, a broadcast cotangent, and NaN wherever nothing was handed over."""
    call = drawn(gate="vector", n=35)
    inputs: dict[str, Tensor | None] = {}
    for name, x in call.inputs.items():
        if x is None:
            inputs[name] = None
            continue
        room = torch.full((*x.shape[:-2], x.shape[-1] + 3, x.shape[-2] + 5), math.nan)
        inputs[name] = room[..., 1:-2, 2:-3].mT.copy_(x)
    do = torch.randn(1, 1, 1, 1).expand(call.do.shape)
    assert_within(Call(inputs, do, call.dstate.mT.contiguous().mT), 16)


@pytest.mark.parametrize(
    ("strength", "gate", "chunk"),
    [(8.0, "scalar", 64), (8.0, "vector", 64), (200.0, "scalar", None), (200.0, "vector", 64)],
)
def test_strong_decay(strength: float, gate: str, chunk: int | None) -> None:
    """Decays beyond float32's range within a chunk: e^{b_i} and e^{−b_j} apart would be 0 and inf."""
    assert_within(drawn(gate=gate, strength=strength), chunk)


@pytest.mark.parametrize(
    ("dtype", "gate", "chunk"),
    [
        (torch.float32, "scalar", None),
        (torch.float32, "scalar", 64),
        (torch.float32, "vector", 64),
        (torch.bfloat16, "vector", 16),
    ],
    ids=str,
)
def test_infinite_gates(dtype: torch.dtype, gate: str, chunk: int | None) -> None:
    """Decays of 0, one after the other, at both ends of a block and of the sequence; gates of 0 elsewhere."""
    call = drawn(dtype, gate, strength=0.0)
    g = call.inputs["g"]
    assert g is not None
    closed = [0, 15, 16, 17, 30, 36]
    g[:, :, closed] = -math.inf
    if gate == "vector":
        g[..., 3] = 0.0
    got = assert_within(call, chunk)
    assert not got["g"][g == -math.inf].any()


@pytest.mark.parametrize("chunk", [None, 16])
def test_small_gates_behind_a_huge_one(chunk: int | None) -> None:
    """e^{b_t − b_i} from differences of sums over the chunk would lose the small gates (bugs B46)."""
    call = drawn(gate="vector", n=16, strength=1e-3)
    g = call.inputs["g"]
    assert g is not None
    g[:, :, 1] = -1e6
    assert_within(call, chunk)


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float32, None), (torch.float16, 16)], ids=str)
def test_beta_zero_changes_nothing(dtype: torch.dtype, chunk: int | None) -> None:
    call = drawn(dtype)
    beta = call.inputs["beta"]
    assert beta is not None
    beta.zero_()
    got = assert_within(call, chunk)
    assert torch.equal(got["state"], call.inputs["initial_state"])


@pytest.mark.parametrize("chunk", [None, 16, 64])
def test_beta_one_recalls_exactly(chunk: int | None) -> None:
    """Keys that are unit vectors, each written several times: reading one gives its last value."""
    call = drawn(n=40, d=12)
    position = torch.randint(12, (1, 2, 40))
    call.inputs["k"] = torch.nn.functional.one_hot(position, 12).float()
    call.inputs["q"] = call.inputs["k"]
    call.inputs["beta"] = torch.ones(1, 2, 40)
    v = call.inputs["v"] = torch.randint(-8, 9, (1, 2, 40, 20)).float()
    call.inputs["initial_state"] = torch.randint(-8, 9, (1, 2, 12, 20)).float()
    entry: Any = delta.recurrent if chunk is None else delta.with_chunk(chunk)
    o = entry(call.inputs["q"], call.inputs["k"], v, call.inputs["beta"], None, scale=1.0,
              initial_state=call.inputs["initial_state"])  # fmt: skip
    assert torch.equal(o, v)


@pytest.mark.parametrize(
    ("dtype", "chunk", "n"),
    [(torch.float32, None, 70), (torch.float32, 128, 130), (torch.bfloat16, 16, 70)],
    ids=str,
)
def test_correlated_keys_with_beta_near_two(dtype: torch.dtype, chunk: int | None, n: int) -> None:
    """I + L has entries near 2 and is ill-conditioned (bugs B61); its inverse is bounded all the same."""
    call = drawn(dtype, n=n, h=1)
    k = torch.nn.functional.normalize(torch.rand(1, 1, n, 12) + 2, dim=-1)
    call.inputs["k"] = k.to(dtype)
    call.inputs["beta"] = torch.full((1, 1, n), 1.98).to(dtype)
    assert_within(call, chunk)


@pytest.mark.parametrize("gate", GATES)
def test_values_that_float16_does_not_hold(gate: str) -> None:
    """A state and u near 1e6: as float16 operands they would be inf."""
    call = drawn(torch.float16, gate, n=40, strength=0.01)
    s = call.inputs["initial_state"]
    assert s is not None
    call.inputs["initial_state"] = s * 2.0**20
    call.inputs["q"] = torch.randn(1, 2, 40, 12).half() / 4096
    # gradients are results of float16, and must stay within it
    assert_within(dataclasses.replace(call, do=call.do / 4096, dstate=call.dstate / 4096), 16)


@pytest.mark.parametrize("name", ["k", "v", "beta", "g"])
def test_later_nonfinite_values_do_not_leak(name: str) -> None:
    call = drawn(gate="vector", n=40)
    entry = delta.with_chunk(64)
    clean = entry(*(call.inputs[n] for n in ("q", "k", "v", "beta", "g")), scale=0.5)
    for poison in (math.nan, math.inf):
        poisoned = {n: None if x is None else x.clone() for n, x in call.inputs.items()}
        poisoned[name].view(1, 2, 40, -1)[:, :, 21, -1] = poison
        got = entry(*(poisoned[n] for n in ("q", "k", "v", "beta", "g")), scale=0.5)
        assert torch.equal(got[:, :, :21], clean[:, :, :21])


def test_runs_agree() -> None:
    call = drawn(torch.float16, "vector", b=2, h=1, n=35, d=33, e=40)
    first, again = call.run(delta.attention), call.run(delta.attention)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("b", "n"), [(0, 5), (2, 0)])
def test_nothing_to_do(b: int, n: int) -> None:
    call = drawn(b=b, n=n)
    got = call.run(delta.attention)
    assert torch.equal(got["state"], call.inputs["initial_state"])
    assert torch.equal(got["initial_state"], call.dstate)
    assert got["o"].shape == (b, 2, n, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.zeros(1, 2, 37, 12)}, "beta has shape"),
        ({"g": torch.zeros(1, 2, 36)}, "g has shape"),
        ({"initial_state": torch.zeros(1, 2, 20, 12)}, "initial_state has shape"),
        ({"k": torch.zeros(1, 1, 37, 12)}, "k and v must agree"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Tensor], message: str) -> None:
    given = {**drawn().inputs, **change}
    state = given.pop("initial_state")
    with pytest.raises(ContractError, match=message):
        delta.attention(**given, scale=1.0, initial_state=state)


def test_chunks_that_no_matrix_takes() -> None:
    with pytest.raises(ContractError, match="chunk=24"):
        delta.with_chunk(24)


def test_contract() -> None:
    for entry in (delta.attention, delta.recurrent, delta.with_chunk(16)):
        contract = contract_of(entry)
        assert contract is not None
        assert contract.family == "delta"
        assert set(contract.options) == {"initial_state", "cu_seqlens", "return_state"}
