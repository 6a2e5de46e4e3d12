"""Scaled-head attention against its formula and torch's autograd in float64, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.emulator import compile_launches, emulate
from attnproof.kernels import softmax as softmax_kernel
from attnproof.kernels.scaled_head import Packing, Pooling, attention
from attnproof.properties.contract import ContractError, contract_of
from tests.kernels.attention_bounds import (
    DTYPES,
    ROUNDOFF,
    SINGLE,
    UNDERFLOW,
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
    return [torch.randn(s).to(dtype) for s in ((b, h, m, d), (b, g, n, d), (b, g, n, e))]


def averaged(x: Tensor, pool: int) -> Tensor:
    """Means of x (B,N,D) over windows of ``pool`` positions, the last of what is left."""
    return torch.stack([window.sum(1) / window.shape[1] for window in x.split(pool, 1)], 1)


def definition(q: Tensor, k: Tensor, v: Tensor, scale: float, pool: tuple[int, ...]) -> Tensor:
    """o, head by head, as the formula stands."""
    if k.shape[2] == 0:
        return q.sum() * 0 + k.sum() + v.sum() + q.new_zeros(*q.shape[:3], v.shape[3])
    group = q.shape[1] // k.shape[1]
    heads = []
    for h, width in enumerate(pool):
        k_h, v_h = averaged(k[:, h // group], width), averaged(v[:, h // group], width)
        heads.append(softmax(scale * q[:, h] @ k_h.mT, visible(q.shape[2], k_h.shape[1], False)) @ v_h)
    return torch.stack(heads, 1)


def allowed(
    inputs: list[Tensor], g: Tensor, o: Tensor, gradients: Any, scale: float, pool: tuple[int, ...]
) -> list[Tensor]:
    """Errors of o and the gradients: of means (as many additions as a window has positions, a division, and
    their storage), of each head's attention, of its gradients' storage, and of the sum over a group.
    """
    q, k, v = (x.double() for x in inputs)
    dtype, groups, u = inputs[0].dtype, k.shape[1], SINGLE
    half, tiny, group = ROUNDOFF[dtype], UNDERFLOW[dtype], q.shape[1] // groups
    o_error, dq = torch.zeros_like(o), torch.zeros_like(q)
    dk, dv = (q.new_zeros(x.shape[0], q.shape[1], *x.shape[2:]) for x in (k, v))
    for h, width in enumerate(pool if k.shape[2] else ()):
        own = slice(h, h + 1)
        k_own, v_own = k[:, h // group], v[:, h // group]
        k_h, v_h = (averaged(x, width)[:, None] for x in (k_own, v_own))
        window = min(width, k.shape[2])
        k_error, v_error = (
            (window + 1) * u * averaged(x.abs(), width)[:, None] + half * y.abs() + tiny
            for x, y in ((k_own, k_h), (v_own, v_h))
        )
        errors = attention_errors(
            q[:, own], k_h, v_h, g[:, own], scale=scale, seen=visible(q.shape[2], k_h.shape[2], False),
            dtype=dtype, o_roundoff=half, k_error=k_error, v_error=v_error,
        )  # fmt: skip
        o_error[:, own], dq[:, own] = errors.o, errors.dq
        ds = errors.p * (g[:, own] @ v_h.mT - (g[:, own] * o[:, own]).sum(-1, keepdim=True))
        places = torch.arange(k.shape[2]) // width
        counts = torch.bincount(places)[places][:, None]
        for found, exact, error in (
            (dk, scale * ds.mT @ q[:, own], errors.dk),
            (dv, errors.p.mT @ g[:, own], errors.dv),
        ):
            # stored in the inputs' dtype, then shared by the window and added to the other heads' shares
            whole = error + (half + (group + 2) * u) * (exact.abs() + error) + tiny
            found[:, own] = whole[:, :, places] / counts
    per_tensor = ((o_error, o), (dq, gradients[0]), (per_group(dk, groups), gradients[1]))
    errors_of = (*per_tensor, (per_group(dv, groups), gradients[2]))
    return [rounded(error, exact, dtype) for error, exact in errors_of]


def assert_exact(
    inputs: list[Tensor], pool: tuple[int, ...], *, scale: float = 0.25, cotangent: Tensor | None = None
) -> None:
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = attention(*inputs, scale=scale, pool=pool)
    g = torch.randn(o.shape, dtype=o.dtype) if cotangent is None else cotangent
    got = torch.autograd.grad(o, inputs, g)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want_o = definition(*wide, scale, pool)
    want = torch.autograd.grad(want_o, wide, g.double())
    limits = allowed([x.detach() for x in inputs], g.double(), want_o.detach(), want, scale, pool)
    assert all(x.dtype == inputs[0].dtype for x in (o, *got))
    found = zip(("o", "dq", "dk", "dv"), (o.detach(), *got), (want_o.detach(), *want), limits, strict=True)
    ratios = {name: worst(*triple) for name, *triple in found}
    assert all(ratio <= 1 for ratio in ratios.values()), f"errors in units of what is allowed: {ratios}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(dtype: torch.dtype) -> None:
    """Heads of one group with different windows, equal windows in different groups, one wider than N."""
    assert_exact(tensors(dtype, b=2, h=6, g=2, n=53), (1, 3, 4, 3, 1, 100))


@pytest.mark.parametrize(
    ("m", "n"), [(0, 5), (5, 0), (1, 1), (3, 2), (1, 33), (33, 1), (31, 64), (65, 65), (5, 99)]
)
def test_sizes(m: int, n: int) -> None:
    assert_exact(tensors(m=m, n=n), (3, 2))


def test_no_batch() -> None:
    assert_exact(tensors(b=0), (2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (5, 40), (72, 3)])
def test_widths(d: int, e: int, dtype: torch.dtype) -> None:
    assert_exact(tensors(dtype, m=9, n=19, d=d, e=e), (2, 5), scale=d**-0.5)


def test_strides() -> None:
    """Fused projections, stride 0, and a cotangent that is a transposed or a broadcast view."""
    b, h, m, d = 2, 2, 18, 16
    fused = torch.randn(b, m, h, 3 * d)
    q, k, v = (x.transpose(1, 2) for x in fused.split(d, -1))
    assert_exact([q, k, v], (4, 1), cotangent=torch.randn(b, m, h, d).transpose(1, 2))
    k = torch.randn(1, 1, d, m).mT.expand(b, h, m, d)
    assert_exact([q, k, v], (5, 5), cotangent=torch.ones(1, 1, 1, 1).expand(b, h, m, d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_common_offset(dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype, n=53)
    assert_exact([q, k + 64, v + 64], (7, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_of_one_are_softmax_attention(dtype: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in tensors(dtype, h=4, g=4)]
    g = torch.randn(1, 4, 21, 16).to(dtype)
    pooled = attention(*inputs, scale=0.25, pool=(1, 1, 1, 1))
    plain: Any = softmax_kernel.attention(*inputs, scale=0.25)
    assert torch.equal(pooled, plain)
    pairs = zip(torch.autograd.grad(pooled, inputs, g), torch.autograd.grad(plain, inputs, g), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_keys_constant_in_each_window() -> None:
    """PD-3: then pooling loses nothing, and softmax attention over all positions is the same function."""
    q, k, v = tensors(n=9)
    k, v = (x.repeat_interleave(4, 2) for x in (k, v))
    pooled = attention(q, k, v, scale=0.25, pool=(4, 4))
    exact = softmax(0.25 * q.double() @ k.double().mT, visible(21, 36, False)) @ v.double()
    assert ((pooled.double() - exact).abs() <= 40 * SINGLE * v.abs().max() * (1 + q.norm(dim=-1).max())).all()


def test_ragged_tail_weighs_what_it_holds() -> None:
    """Means over 3, 3 and the last 1 of 7 positions, and the share of each position in the gradient."""
    x = torch.arange(7.0)[None, None, :, None].expand(1, 1, 7, 2).clone().requires_grad_()
    y = Pooling.apply(x, Packing.of((3, 2), 7))
    assert y[0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.0, 1.0, 4.0, 6.0]  # the head of the narrower window first
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 6.0, 5.0])[None, :, None].expand(1, 7, 2)
    (dx,) = torch.autograd.grad(y, x, weights)
    assert dx[0, 0, :, 1].tolist() == [1.5, 1.5, 1.5, 2.5, 2.5, 2.5, 6.0]


def test_nonfinite_keys_stay_in_their_heads() -> None:
    q, k, v = tensors(b=2, h=4, g=2)
    clean = attention(q, k, v, scale=0.25, pool=(3, 1, 2, 3))
    k[1, 0, 5] = float("nan")
    o = attention(q, k, v, scale=0.25, pool=(3, 1, 2, 3))
    assert o[1, :2].isnan().all()
    assert torch.equal(o[0], clean[0])
    assert torch.equal(o[1, 2:], clean[1, 2:])


@pytest.mark.emulator
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str) -> None:
    with emulate(target):
        assert_exact(tensors(torch.float16, m=17, n=33), (4, 1))


def test_runs_agree_bit_for_bit_and_inputs_stay() -> None:
    inputs = [x.requires_grad_() for x in tensors(torch.float16, b=2, h=4)]
    before = [x.detach().clone() for x in inputs]
    g = torch.randn(2, 4, 21, 16, dtype=torch.float16)
    runs = [
        torch.autograd.grad(attention(*inputs, scale=0.3, pool=(2, 3, 2, 3)), inputs, g) for _ in range(2)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_arguments() -> None:
    q, k, v = tensors()
    contract = contract_of(attention)
    assert contract is not None
    assert (contract.family, contract.options) == ("scaled_head", ())
    for pool in ((1,), (1, 0), (1, 2.0), (True, 1), 2):
        with pytest.raises(ContractError, match="pool"):
            attention(q, k, v, scale=0.3, pool=pool)


@pytest.mark.emulator
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_spills(dtype: torch.dtype, target: str) -> None:
    """The kernels of this module; those of softmax attention are compiled where they are tested."""

    def both_passes(x: Tensor) -> Tensor:
        x.requires_grad_()
        y = Pooling.apply(x, Packing.of((2, 3), x.shape[2]))
        torch.autograd.grad(y, x, torch.zeros_like(y))
        return y

    compiled = compile_launches(both_passes, (torch.zeros(1, 2, 64, 128, dtype=dtype),), {}, [target])
    assert {x.kernel for x in compiled} == {"pooling_kernel", "spreading_kernel"}
    assert {x.kernel: x.spill_bytes for x in compiled if x.spill_bytes} == {}
