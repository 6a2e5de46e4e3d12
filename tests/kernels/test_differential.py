"""Differential attention against its formula and torch's autograd in float64, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.emulator import compile_launches, emulate
from attnproof.kernels.differential import attention
from attnproof.properties.contract import ContractError, contract_of
from tests.kernels.attention_bounds import (
    DTYPES,
    SINGLE,
    attention_errors,
    per_group,
    rounded,
    softmax,
    visible,
    worst,
)

pytestmark = pytest.mark.usefixtures("emulated")

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def tensors(
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 1,
    h: int = 2,
    g: int = 2,
    m: int = 21,
    n: int = 37,
    d: int = 16,
    e: int = 16,
) -> list[Tensor]:
    shapes = (b, h, m, 2 * d), (b, g, n, 2 * d), (b, g, n, e)
    return [*(torch.randn(s).to(dtype) for s in shapes), torch.linspace(-0.5, 1.25, h).to(dtype)]


def definition(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, scale: float, causal: bool) -> Tensor:
    """o, head by head, as the formula stands."""
    half, group = q.shape[3] // 2, q.shape[1] // k.shape[1]
    seen = visible(q.shape[2], k.shape[2], causal)
    heads = []
    for h in range(q.shape[1]):
        k_h, v_h = k[:, h // group], v[:, h // group]
        first = softmax(scale * q[:, h, :, :half] @ k_h[..., :half].mT, seen)
        second = softmax(scale * q[:, h, :, half:] @ k_h[..., half:].mT, seen)
        heads.append((first - lam[h] * second) @ v_h)
    return torch.stack(heads, 1)


def allowed(inputs: list[Tensor], g: Tensor, o: Tensor, gradients: Any, scale: float, causal: bool) -> Any:
    """Errors of o and of the four gradients: those of two attentions, and of their difference."""
    q, k, v, lam = (x.double() for x in inputs)
    dtype, group, half = inputs[0].dtype, q.shape[1] // k.shape[1], q.shape[3] // 2
    seen = visible(q.shape[2], k.shape[2], causal)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    # o¹ and o² are held in float32, and delta is formed from them
    options: dict[str, Any] = {"scale": scale, "seen": seen, "dtype": dtype, "o_roundoff": SINGLE}
    one = attention_errors(q[..., :half], k[..., :half], v, g, **options)
    two = attention_errors(q[..., half:], k[..., half:], v, g, **options)
    by = lam.abs()[:, None, None]
    o_error = one.o + by * two.o + 3 * SINGLE * (one.p + by * two.p) @ v.abs()
    groups = inputs[1].shape[1]
    # dS² is multiplied by λ, and halves and heads are added: three more roundings
    dq = torch.cat([one.dq, by * two.dq], -1) + 4 * SINGLE * gradients[0].abs()
    dk = per_group(torch.cat([one.dk, by * two.dk], -1), groups) + 4 * SINGLE * gradients[1].abs()
    dv = per_group(one.dv + by * two.dv, groups) + 4 * SINGLE * per_group(
        (one.p + by * two.p).mT @ g.abs(), groups
    )
    delta = (g * (two.p @ v)).sum(-1).abs()
    rows = q.shape[0] * q.shape[2]
    dlam = two.delta.sum((0, 2)) + rows * SINGLE * delta.sum((0, 2))
    errors = zip((o_error, dq, dk, dv, dlam), (o, *gradients), strict=True)
    return [rounded(error, exact, dtype) for error, exact in errors]


def assert_exact(
    inputs: list[Tensor], *, scale: float = 0.3, causal: bool = False, cotangent: Tensor | None = None
) -> None:
    inputs = [x.requires_grad_() for x in inputs]
    o = attention(*inputs, scale=scale, causal=causal)
    g = torch.randn(o.shape, dtype=o.dtype) if cotangent is None else cotangent
    got = torch.autograd.grad(o, inputs, g)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want_o = definition(*wide, scale, causal)
    want = torch.autograd.grad(want_o, wide, g.double())
    limits = allowed([x.detach() for x in inputs], g.double(), want_o.detach(), want, scale, causal)
    assert all(x.dtype == y.dtype for x, y in zip((o, *got), (inputs[0], *inputs), strict=True))
    names = ("o", "dq", "dk", "dv", "dlam")
    found = zip((o.detach(), *got), (want_o.detach(), *want), limits, strict=True)
    ratios = {name: worst(*triple) for name, triple in zip(names, found, strict=True)}
    assert all(ratio <= 1 for ratio in ratios.values()), f"errors in units of what is allowed: {ratios}"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(dtype: torch.dtype, causal: bool) -> None:
    assert_exact(tensors(dtype, b=2, h=4, g=2, m=37, n=53), causal=causal)


@pytest.mark.parametrize(
    ("m", "n"), [(0, 5), (5, 0), (1, 1), (1, 33), (33, 1), (5, 2), (64, 65), (31, 32), (70, 17)]
)
def test_sizes(m: int, n: int) -> None:
    """Empty sides, sizes around a tile, and with M > N rows that see no key."""
    assert_exact(tensors(m=m, n=n), causal=True)


def test_no_batch() -> None:
    assert_exact(tensors(b=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (5, 40), (72, 3)])
def test_widths(d: int, e: int, dtype: torch.dtype) -> None:
    assert_exact(tensors(dtype, m=9, n=19, d=d, e=e), scale=d**-0.5)


def test_strides() -> None:
    """Fused projections, stride 0, and a cotangent that is a transposed or a broadcast view."""
    b, h, m, d = 2, 2, 18, 16
    fused = torch.randn(b, m, h, 5 * d)
    q, k, v = (x.transpose(1, 2) for x in fused.split((2 * d, 2 * d, d), -1))
    lam = torch.tensor([0.5, 0.0, -0.25])[::2]
    g = torch.randn(b, m, h, d).transpose(1, 2)
    assert_exact([q, k, v, lam], cotangent=g, causal=True)
    k = torch.randn(1, 1, 2 * d, m).mT.expand(b, h, m, 2 * d)
    assert_exact(
        [q.detach(), k, v.detach(), lam.detach()], cotangent=torch.ones(1, 1, 1, 1).expand(b, h, m, d)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cancelling_halves(dtype: torch.dtype) -> None:
    """Equal halves and λ = 1: the exact output is 0, and so must ours be, not what two roundings leave."""
    q, k, v, lam = tensors(dtype, h=2, g=1)
    q[..., 16:], k[..., 16:] = q[..., :16], k[..., :16]
    o = attention(q, k, v, torch.ones_like(lam), scale=0.3, causal=True)
    assert not o.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_difference_of_unrounded_outputs(dtype: torch.dtype) -> None:
    """o¹, the mean of two neighbouring numbers, is not one of the dtype; less their lower one it is exact."""
    eps = torch.finfo(dtype).eps
    q, k, v = torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 2, 32), torch.ones(1, 1, 2, 16)
    q[..., 16], k[:, :, 1, 16] = 1.0, -1000.0  # the first half weighs both keys alike, the second sees one
    v[:, :, 1] += eps
    q, k, v = (x.to(dtype) for x in (q, k, v))
    o = attention(q, k, v, torch.ones(1, dtype=dtype), scale=1.0)
    assert (o == eps / 2).all()


def test_unseen_keys_get_no_gradient_and_leak_nothing() -> None:
    q, k, v, lam = (x.requires_grad_() for x in tensors(m=20, n=40))
    g = torch.zeros(1, 2, 20, 16)
    g[:, :, :5] = 1.0  # the rows that stand at keys 20 to 24
    o = attention(q, k, v, lam, scale=0.3, causal=True)
    _, dk, dv, _ = torch.autograd.grad(o, (q, k, v, lam), g)
    assert not dk[:, :, 25:].any()
    assert not dv[:, :, 25:].any()
    assert dk[:, :, :25].any()
    poisoned = v.detach().clone()
    poisoned[:, :, 30:] = float("nan")
    again = attention(q, k, poisoned, lam, scale=0.3, causal=True)
    assert torch.equal(again[:, :, :10], o[:, :, :10])
    assert again[:, :, 10:].isnan().all()


def test_scores_of_1e10() -> None:
    """Recomputed scores may differ from the forward pass by their rounding, which must not overflow exp2."""
    x = torch.full((1, 1, 4, 32), 1e5)
    v = torch.randn(1, 1, 4, 16)
    q, k, v, lam = (y.requires_grad_() for y in (x, x.clone(), v, torch.tensor([0.5])))
    o = attention(q, k, v, lam, scale=1.0)
    assert ((o - 0.5 * v.mean(2, keepdim=True)).abs() <= 1e-6).all()
    assert all(y.isfinite().all() for y in torch.autograd.grad(o.sum(), (q, k, v, lam)))


@pytest.mark.emulator
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str) -> None:
    with emulate(target):
        assert_exact(tensors(torch.float16, m=17, n=33), causal=True)


def test_runs_agree_bit_for_bit_and_inputs_stay() -> None:
    inputs = [x.requires_grad_() for x in tensors(torch.float16, b=2, h=4, m=70, n=70)]
    before = [x.detach().clone() for x in inputs]
    g = torch.randn(2, 4, 70, 16, dtype=torch.float16)
    runs = [torch.autograd.grad(attention(*inputs, scale=0.3), inputs, g) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_arguments() -> None:
    q, k, v, lam = tensors()
    contract = contract_of(attention)
    assert contract is not None
    assert (contract.family, contract.options, contract.deterministic) == ("differential", ("causal",), True)
    with pytest.raises(ContractError, match="two halves"):
        attention(q[..., :31], k, v, lam, scale=0.3)
    with pytest.raises(ContractError, match="lam"):
        attention(q, k, v, lam[:1], scale=0.3)
    with pytest.raises(ContractError, match="scale"):
        attention(q, k, v, lam, scale=float("nan"))
    with pytest.raises(NotImplementedError, match="float64"):
        attention(*(x.double() for x in (q, k, v, lam)), scale=0.3)


@pytest.mark.emulator
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_spills(dtype: torch.dtype, target: str) -> None:
    def both_passes(*inputs: Tensor) -> Tensor:
        inputs = tuple(x.requires_grad_() for x in inputs)
        o = attention(*inputs, scale=1.0, causal=True)
        torch.autograd.grad(o, inputs, torch.zeros_like(o))
        return o

    zeros = tuple(
        torch.zeros(s, dtype=dtype) for s in ((1, 2, 64, 128), (1, 2, 64, 128), (1, 2, 64, 64), (2,))
    )
    compiled = compile_launches(both_passes, zeros, {}, [target])
    assert {x.kernel for x in compiled} == {
        "forward_kernel", "delta_kernel", "lam_gradient_kernel", "query_gradient_kernel",
        "key_gradient_kernel",
    }  # fmt: skip
    assert {x.kernel: x.spill_bytes for x in compiled if x.spill_bytes} == {}
