"""Batch-normalised attention against its formula and torch's autograd in float64, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.emulator import compile_launches, emulate
from attnproof.kernels.batch_normalised import Normalisation, attention
from attnproof.properties.contract import ContractError, contract_of
from tests.kernels.attention_bounds import (
    DTYPES,
    ROUNDOFF,
    SINGLE,
    UNDERFLOW,
    attention_errors,
    per_group,
    rounded,
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
    offset: float = 0.0,
) -> list[Tensor]:
    q, k, v = torch.randn(b, h, m, d), torch.randn(b, g, n, d), torch.randn(b, g, n, e)
    return [x.to(dtype) for x in (q + offset, k + offset, v)]


def betas(heads: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-0.5, 1.25, heads).to(dtype)


def definition(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, scale: float, eps: float, variance: bool
) -> Tensor:
    """o, head by head, as the formula stands."""
    if k.shape[2] == 0:
        return (q * 0).sum() + v.sum() + k.sum() + beta.sum() * 0 + q.new_zeros(*q.shape[:3], v.shape[3])
    heads = []
    for h in range(q.shape[1]):
        k_h, v_h = (x[:, h // (q.shape[1] // k.shape[1])] for x in (k, v))
        mean = k_h.sum(1, keepdim=True) / k_h.shape[1]
        s = ((k_h - mean).square().sum(1, keepdim=True) / k_h.shape[1] + eps).sqrt() if variance else 1.0
        normal_q, normal_k = (q[:, h] - beta[h] * mean) / s, (k_h - beta[h] * mean) / s
        heads.append(torch.softmax(scale * normal_q @ normal_k.mT, -1) @ v_h)
    return torch.stack(heads, 1)


def allowed(
    inputs: list[Tensor], g: Tensor, o: Tensor, gradients: Any, *, scale: float, eps: float, variance: bool
) -> list[Tensor]:
    """Errors of o, dq, dk, dv, dβ: of the statistics, of q' and k' as they are stored, of the attention, and
    of dq' and dk', which come back in the inputs' dtype.
    """
    q, k, v, beta = (x.double() for x in inputs)
    dtype, groups, keys, u = inputs[0].dtype, k.shape[1], k.shape[2], SINGLE
    half, group = ROUNDOFF[dtype], q.shape[1] // groups
    k_own, n = k, max(keys, 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    by = beta[:, None, None]
    mean = k.sum(2, keepdim=True) / n
    centred = k - mean
    spread = centred.abs().sum(2, keepdim=True) / n
    s = (centred.square().sum(2, keepdim=True) / n + eps).sqrt() if variance else torch.ones_like(mean)
    # the second step of the mean errs by N roundings of what the first one left; s by half of the N terms of
    # the variance and by that error of the mean; a product β·μ, two subtractions and a division
    of_mean = (n + 4) * u * spread + n * n * u * u * mean.abs()
    of_s = (n + 8) * u
    q_normal, k_normal = (q - by * mean) / s, centred / s
    q_single = (3 * u * (by * mean).abs() + by.abs() * of_mean) / s + (of_s + 4 * u) * q_normal.abs()
    k_single = of_mean / s + (of_s + 4 * u) * k_normal.abs()
    # float16 stores k' with up to 2**8 moved to it, and q' with as much less: its underflow is s's power off
    moved = torch.clamp(2 / s, min=1.0) if dtype == torch.float16 else torch.ones_like(s)
    tiny = UNDERFLOW[dtype] * moved
    errors = attention_errors(
        q_normal, k_normal, v, g, scale=scale, seen=visible(q.shape[2], keys, False), dtype=dtype,
        o_roundoff=half, q_error=q_single + half * q_normal.abs() + tiny,
        k_error=k_single + half * k_normal.abs() + tiny,
    )  # fmt: skip
    # the exact dq' and dk', from dS
    ds = errors.p * (g @ v.mT - (g * o).sum(-1, keepdim=True))
    dq, dk = scale * ds @ k_normal, per_group(scale * ds.mT @ q_normal, groups)
    dq_error = errors.dq + half * dq.abs() + tiny
    dk_error = per_group(errors.dk, groups) + group * u * per_group((scale * ds.mT @ q_normal).abs(), groups)
    s_own, moved_own, normal, normal_single = (
        x.unflatten(1, (groups, group))[:, :, 0] for x in (s, moved, k_normal, k_single)
    )
    dk_error = dk_error + half * dk.abs() + UNDERFLOW[dtype] * moved_own
    dq, dq_error = dq / s, dq_error / s + (of_s + 3 * u) * dq.abs() / s
    # sums over the queries, and over the keys
    rows = q.shape[2]
    sums, sums_error = dq.sum(2, keepdim=True), (dq_error + rows * u * dq.abs()).sum(2, keepdim=True)
    slope = (dk * normal).sum(2, keepdim=True)
    slope_error = (dk_error * normal.abs() + dk.abs() * (normal_single + n * u * normal.abs())).sum(
        2, keepdim=True
    )
    shift_error = per_group(by.abs() * (sums_error + (group + 2) * u * sums.abs()), groups) / n
    found = dk_error / s_own + (of_s + 4 * u) * dk.abs() / s_own + shift_error
    if variance:
        found = found + 2 / (n * s_own) * (
            slope_error * normal.abs() + slope.abs() * (normal_single + (of_s + 6 * u) * normal.abs())
        )
    size = k_own.shape[0] * q.shape[3] + 4
    dbeta = (mean.abs() * (sums_error + size * u * sums.abs()) + of_mean * sums.abs()).sum((0, 2, 3))
    dv = per_group(errors.dv + group * u * (errors.p.mT @ g.abs()), groups)
    per_tensor = zip((errors.o, dq_error, found, dv, dbeta), (o, *gradients), strict=True)
    return [rounded(error, exact, dtype) for error, exact in per_tensor]


def assert_exact(
    inputs: list[Tensor],
    *,
    beta: Tensor | None = None,
    scale: float = 0.25,
    eps: float = 1e-5,
    variance: bool = True,
    cotangent: Tensor | None = None,
) -> None:
    inputs = [x.detach().requires_grad_() for x in inputs]
    beta = None if beta is None else beta.detach().requires_grad_()
    o = attention(*inputs, scale=scale, eps=eps, beta=beta, variance=variance)
    asked = inputs if beta is None else [*inputs, beta]
    g = torch.randn(o.shape, dtype=o.dtype) if cotangent is None else cotangent
    got = torch.autograd.grad(o, asked, g)
    every = [*inputs, torch.ones(o.shape[1], dtype=o.dtype) if beta is None else beta]
    wide = [x.detach().double().requires_grad_() for x in every]
    options: dict[str, Any] = {"scale": scale, "eps": eps, "variance": variance}
    want_o = definition(*wide, **options)
    want = torch.autograd.grad(want_o, wide, g.double())
    limits = allowed([x.detach() for x in every], g.double(), want_o.detach(), want, **options)
    assert all(x.dtype == inputs[0].dtype for x in (o, *got))
    names = ("o", "dq", "dk", "dv", "dbeta")[: len(got) + 1]
    found = zip(names, (o.detach(), *got), (want_o.detach(), *want), limits, strict=False)
    ratios = {name: worst(*triple) for name, *triple in found}
    assert all(ratio <= 1 for ratio in ratios.values()), f"errors in units of what is allowed: {ratios}"


@pytest.mark.parametrize("variance", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(dtype: torch.dtype, learned: bool, variance: bool) -> None:
    beta = betas(4, dtype) if learned else None
    assert_exact(tensors(dtype, b=2, h=4, g=2, n=70), beta=beta, variance=variance)


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (1, 1), (3, 2), (1, 33), (33, 1), (31, 64), (65, 65)])
def test_sizes(m: int, n: int) -> None:
    assert_exact(tensors(m=m, n=n), beta=betas(2, torch.float32), eps=1e-2)


def test_no_batch() -> None:
    assert_exact(tensors(b=0), beta=betas(2, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (5, 40), (72, 3)])
def test_widths(d: int, e: int, dtype: torch.dtype) -> None:
    assert_exact(tensors(dtype, m=9, n=19, d=d, e=e), scale=d**-0.5, beta=betas(2, dtype))


def test_strides() -> None:
    """Fused projections, stride 0, and a cotangent that is a transposed or a broadcast view."""
    b, h, m, d = 2, 2, 18, 16
    fused = torch.randn(b, m, h, 3 * d)
    q, k, v = (x.transpose(1, 2) for x in fused.split(d, -1))
    beta = torch.tensor([0.5, 0.0, -0.25])[::2]
    assert_exact([q, k, v], beta=beta, cotangent=torch.randn(b, m, h, d).transpose(1, 2))
    k = torch.randn(1, 1, d, m).mT.expand(b, h, m, d)
    assert_exact([q, k, v], beta=beta, cotangent=torch.ones(1, 1, 1, 1).expand(b, h, m, d))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float32, 3000.0), (torch.float16, 100.0), (torch.bfloat16, 30.0)], ids=str
)
def test_large_common_offset(dtype: torch.dtype, offset: float, learned: bool) -> None:
    """Keys far from 0: E[x²] − E[x]² would leave nothing of the variance in float32."""
    assert_exact(tensors(dtype, n=53, offset=offset), beta=betas(2, dtype) if learned else None)


@pytest.mark.parametrize("offset", [0.0, 2.0**12, 2.0**20])
def test_a_common_shift_of_queries_and_keys_changes_nothing(offset: float) -> None:
    """PD-2 with β = 1: q − μ and k − μ stay. Values are eighths, so that shifted inputs are exact."""
    q, k, v = tensors(n=53)
    q, k = (torch.round(8 * x) / 8 for x in (q, k))
    plain = attention(q, k, v, scale=0.25, eps=1e-5)
    moved = attention(q + offset, k + offset, v, scale=0.25, eps=1e-5)
    # both means are right to N roundings of the spread of the keys; scores are below 16·scale·|q'||k'| ≤ 60
    assert (moved - plain).abs().max() <= 2 * 60 * (53 + 16) * SINGLE * v.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_keys(dtype: torch.dtype) -> None:
    """s = √eps and k' = 0: every key weighs the same, however far the query is (in float16, q' of 1e5)."""
    q, k, v = tensors(dtype, n=33)
    k[:] = 300.0
    o = attention(q, k, v, scale=0.25, eps=1e-5)
    mean = v.double().mean(2, keepdim=True).expand(o.shape)
    size = v.double().abs().mean(2, keepdim=True)
    assert ((o.double() - mean).abs() <= 2 * ROUNDOFF[dtype] * size + 40 * SINGLE * size).all()


def test_statistics_of_a_ramp() -> None:
    """Keys c, c + 1, …, c + N − 1 have the mean c + (N − 1)/2 and the variance (N² − 1)/12, exactly."""
    n, offset = 101, 2.0**20
    k = (torch.arange(n) + offset)[None, None, :, None].expand(1, 1, n, 16)
    normal_q, normal_k = Normalisation.apply(torch.full((1, 1, 1, 16), offset), k, None, 0.25, True)
    s = ((n * n - 1) / 12 + 0.25) ** 0.5
    want = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / s
    # of the second step of the mean, of the variance, and of the division
    limit = (n + 16) * SINGLE * (want.abs() + n / 4 / s)
    assert ((normal_k[0, 0].double() - want[:, None]).abs() <= limit[:, None]).all()
    assert abs(normal_q[0, 0, 0, 0].item() + (n - 1) / 2 / s) <= limit[0]


@pytest.mark.emulator
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str) -> None:
    with emulate(target):
        assert_exact(tensors(torch.float16, m=17, n=33), beta=betas(2, torch.float16))


def test_runs_agree_bit_for_bit_and_inputs_stay() -> None:
    inputs = [x.requires_grad_() for x in (*tensors(torch.float16, b=2, h=4), betas(4, torch.float16))]
    before = [x.detach().clone() for x in inputs]
    q, k, v, beta = inputs
    g = torch.randn(2, 4, 21, 16, dtype=torch.float16)
    runs = [
        torch.autograd.grad(attention(q, k, v, scale=0.3, eps=1e-5, beta=beta), inputs, g) for _ in range(2)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_arguments() -> None:
    q, k, v = tensors()
    contract = contract_of(attention)
    assert contract is not None
    assert (contract.family, contract.options) == ("batch_normalised", ("beta", "variance"))
    for eps in (0.0, -1.0, float("nan"), None):
        with pytest.raises(ContractError, match="eps"):
            attention(q, k, v, scale=0.3, eps=eps)
    with pytest.raises(NotImplementedError, match="eps"):
        attention(q, k, v, scale=0.3, eps=1e-40)
    with pytest.raises(ContractError, match="beta"):
        attention(q, k, v, scale=0.3, eps=1e-5, beta=torch.ones(3))
    with pytest.raises(ContractError, match="variance"):
        attention(q, k, v, scale=0.3, eps=1e-5, variance=1)


@pytest.mark.emulator
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_spills(dtype: torch.dtype, target: str) -> None:
    """The kernels of this module; those of softmax attention are compiled where they are tested."""

    def both_passes(q: Tensor, k: Tensor, beta: Tensor) -> Tensor:
        inputs = [x.requires_grad_() for x in (q, k, beta)]
        outputs = Normalisation.apply(*inputs, 1e-5, True)
        torch.autograd.grad(outputs, inputs, [torch.zeros_like(x) for x in outputs])
        return outputs[0]

    zeros = tuple(torch.zeros(s, dtype=dtype) for s in ((1, 2, 64, 128), (1, 2, 64, 128), (2,)))
    compiled = compile_launches(both_passes, zeros, {}, [target])
    assert {x.kernel for x in compiled} == {
        "statistics_kernel", "normalised_kernel", "query_gradient_kernel", "key_gradient_kernel",
        "beta_gradient_kernel",
    }  # fmt: skip
    assert {x.kernel: x.spill_bytes for x in compiled if x.spill_bytes} == {}
