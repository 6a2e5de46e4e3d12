"""The selective scan and its gradients against the recurrence in float64: options, packing, extremes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from attnproof.kernels import activations
from attnproof.kernels.selective_scan import recurrent, scan
from attnproof.properties.contract import ContractError, contract_of
from tests.kernels.selective_scan_reference import (
    Call,
    U,
    assert_exact,
    inputs,
    ratio,
    ratio_slope,
    results,
    run,
    softplus,
)

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize(
    ("entry", "dtype", "full", "zoh", "n", "d"),
    [
        (scan, torch.float32, True, False, 70, 12),
        (scan, torch.float32, False, True, 33, 1),
        (scan, torch.bfloat16, True, True, 35, 20),
        (recurrent, torch.float16, False, False, 20, 3),
        (recurrent, torch.float32, True, True, 20, 12),
        (recurrent, torch.bfloat16, True, False, 1, 12),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_exact(entry: Any, dtype: torch.dtype, full: bool, zoh: bool, n: int, d: int) -> None:
    assert_exact(inputs(dtype, b=2 if n < 40 else 1, n=n, d=d, full=full, zoh=zoh), entry)


@pytest.mark.parametrize("entry", [scan, recurrent])
def test_packed(entry: Any) -> None:
    """Every sequence begins with its own state, those without positions end with it."""
    call = inputs(n=50, cu_seqlens=(0, 0, 34, 34, 35, 50, 50))
    got = assert_exact(call, entry)
    assert torch.equal(got["state"][2], call.tensors["initial_state"][2])
    piece = {name: x[:, :, 35:].contiguous() for name, x in call.tensors.items() if x.ndim == 3}
    alone = Call({**call.tensors, **piece, "initial_state": call.tensors["initial_state"][4:5]})
    y, state = run(entry, alone, alone.tensors)
    assert torch.equal(y, got["y"][:, :, 35:])
    assert torch.equal(state, got["state"][4:5])


@pytest.mark.parametrize("entry", [scan, recurrent])
@pytest.mark.parametrize(("b", "n"), [(0, 5), (2, 0)])
def test_empty(entry: Any, b: int, n: int) -> None:
    call = inputs(b=b, n=n)
    leaves = {name: x.requires_grad_() for name, x in call.tensors.items()}
    y, state = run(entry, call, leaves)
    assert y.shape == call.tensors["u"].shape
    assert torch.equal(state, leaves["initial_state"])
    grads = torch.autograd.grad(state.sum() + y.sum(), list(leaves.values()))
    assert all(not g.any() for g in grads[:-1])
    assert bool((grads[-1] == 1).all())


def extremes() -> dict[str, Call]:
    """Cases beyond normal numbers."""
    base = inputs(n=18, zoh=True)
    shape = base.tensors["u"].shape
    sides = torch.linspace(-100, 100, shape[1] * shape[2]).reshape(shape)
    strong = torch.tensor([0.0, -1e-30, -1e-3, -3.0, -200.0, -1e4]).repeat(2).expand(5, 12)
    bare = replace(base, softplus=False)
    return {
        "softplus": base.changed(delta=sides, delta_bias=torch.zeros(5)),
        "softplus, euler": replace(base.changed(delta=sides), zoh=False),
        "A = 0": base.changed(A=torch.zeros(5, 12)),
        "strong decay": base.changed(A=strong),
        "strong decay, euler": replace(base.changed(A=strong), zoh=False),
        "small steps": bare.changed(delta=10.0 ** torch.linspace(-38, -3, 18).expand(shape),
                                    delta_bias=torch.zeros(5)),
        "steps beyond range": bare.changed(delta=torch.full(shape, 1e10), A=torch.full((5, 12), -1e30)),
        "no steps": bare.changed(delta=torch.zeros(shape), delta_bias=torch.zeros(5)),
        "saturated gates": base.changed(z=sides),
    }  # fmt: skip


@pytest.mark.parametrize("name", extremes())
def test_extremes(name: str) -> None:
    got = assert_exact(extremes()[name], recurrent if "euler" in name else scan)
    assert all(x.isfinite().all() for x in got.values())


def test_strides() -> None:
    """Views of every kind, broadcast and unaligned, give what their copies give, bit for bit."""
    call = inputs(b=2, n=20)
    spread = {name: torch.zeros(*(2 * s + 1 for s in x.shape)) for name, x in call.tensors.items()}
    views = {}
    for name, x in call.tensors.items():
        axes = tuple(reversed(range(x.ndim)))
        views[name] = spread[name].permute(axes).contiguous().permute(axes)[(slice(1, None, 2),) * x.ndim]
        views[name].copy_(x)
    views["delta"] = call.tensors["delta"]
    views["B"] = call.tensors["B"][:, :1].expand(-1, 12, -1)
    same = {**call.tensors, "B": views["B"].contiguous()}
    cotangents = [torch.randn(20, 5, 2).permute(2, 1, 0), torch.ones(1).expand(2, 5, 12)]
    got, want = (results(lambda x: run(scan, call, x), tensors, cotangents) for tensors in (views, same))
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize("entry", [scan, recurrent])
def test_isolation(entry: Any) -> None:
    """What comes after a position changes nothing before it; a NaN of one channel stays in it."""
    call = inputs(n=70)
    y, _ = run(entry, call, call.tensors)
    later = {name: call.tensors[name].clone() for name in ("u", "delta", "B", "C", "z")}
    for x in later.values():
        x[:, :, 41:] = 3.0
        x[:, -1 if x.shape[1] == 12 else 4, 50:] = math.nan
    changed, _ = run(entry, call, {**call.tensors, **later})
    assert torch.equal(changed[:, :, :41], y[:, :, :41])
    spoilt = call.tensors["u"].clone()
    spoilt[:, 2, 7] = math.nan
    changed, state = run(entry, call, {**call.tensors, "u": spoilt})
    rest = [0, 1, 3, 4]
    assert torch.equal(changed[:, rest], y[:, rest])
    assert torch.equal(changed[:, 2, :7], y[:, 2, :7])
    assert bool(changed[:, 2, 7:].isnan().all())
    assert bool(state[:, 2].isnan().all())


def test_gradients_on_demand() -> None:
    """Each input alone gets the gradient that it gets among the others; two runs agree bit for bit."""
    call = inputs(n=20, h=3)
    cotangents = [torch.randn(1, 3, 20), torch.randn(1, 3, 12)]
    every = results(lambda x: run(scan, call, x), call.tensors, cotangents)
    again = results(lambda x: run(scan, call, x), call.tensors, cotangents)
    assert all(torch.equal(again[name], x) for name, x in every.items())
    for names in (("B", "delta_bias"), ("C", "z", "A")):
        alone = {name: call.tensors[name] for name in names}
        got = results(lambda x: run(scan, call, {**call.tensors, **x}), alone, cotangents)
        assert all(torch.equal(x, every[name]) for name, x in got.items())


@triton.jit
def activations_kernel(p_x, p_o, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x)
    b_low = -tl.abs(b_x)
    b_near = tl.maximum(b_low, -1.5)
    tl.store(p_o + o_x, activations.softplus(b_x))
    tl.store(p_o + BLOCK + o_x, activations.sigmoid(b_x))
    tl.store(p_o + 2 * BLOCK + o_x, activations.silu(b_x))
    tl.store(p_o + 3 * BLOCK + o_x, activations.silu_slope(b_x))
    tl.store(p_o + 4 * BLOCK + o_x, activations.expm1_ratio_series(b_near))
    tl.store(p_o + 5 * BLOCK + o_x, activations.expm1_ratio_slope_series(b_near, tl.exp(b_near)))


def test_activations() -> None:
    """To the relative errors that their module states, with exponentials of (2 + |x|)·u, while those are
    normal numbers.
    """
    tiny = 10.0 ** torch.linspace(-30, -1, 512)
    x = torch.cat([torch.linspace(-87, 87, 2048), torch.linspace(-2, 2, 1024), tiny, -tiny])
    got = torch.empty(6, len(x))
    activations_kernel[(1,)](x, got, BLOCK=len(x))
    x = x.double()
    near = (-x.abs()).clamp(min=-1.5)
    s, other = x.sigmoid(), (-x).sigmoid()
    exponential = (2 + x.abs()) * U
    slope = s * (1 + x * other)
    cases = {
        "softplus": (softplus(x), exponential + 7 * U),
        "sigmoid": (s, exponential + 6 * U),
        "silu": (x * s, exponential + 7 * U),
        "silu_slope": (slope, (2 * exponential + 12 * U) * s * (1 + x.abs() * other) / slope.abs()),
        "expm1_ratio_series": (ratio(near), 5 * U),
        "expm1_ratio_slope_series": (ratio_slope(near), (2 + near.abs()) * U + 6 * U),
    }
    for y, (name, (want, bound)) in zip(got, cases.items(), strict=True):
        off = (y.double() / want - 1).abs()
        assert bool((off <= bound).all()), f"{name}: {(off / bound).max():.3g} bounds"


def wrong(call: Call, **changes: Any) -> dict[str, Any]:
    names = ("u", "delta", "A", "B", "C", "D")
    return {**{name: call.tensors[name] for name in names}, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": torch.ones(1, 5, 3)}, r"delta has shape \(1, 5, 3\)"),
        ({"A": torch.ones(4, 12)}, r"u \(1, 5, 4\), A \(4, 12\): expected"),
        ({"A": torch.ones(5)}, r"A has shape \(5,\): expected 2 axes"),
        ({"B": torch.ones(1, 12, 4).half()}, "B is torch.float16 while u is torch.float32"),
        ({"D": torch.ones(4)}, r"D has shape \(4,\): expected \(5,\)"),
        ({"z": [1.0]}, "z is a list"),
        ({"discretization": "bilinear"}, "discretization='bilinear': expected one of 'euler', 'zoh'"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "cu_seqlens=.0, 3.: expected to rise"),
        ({"initial_state": torch.ones(2, 5, 12)}, r"initial_state has shape \(2, 5, 12\)"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=f"recurrent: {message}"):
        recurrent(**wrong(inputs(n=4), **changes))


def test_declined() -> None:
    with pytest.raises(NotImplementedError, match="D is 300"):
        scan(**wrong(inputs(n=4, d=300)))
    with pytest.raises(NotImplementedError, match="u is float64"):
        scan(**wrong(inputs(n=4), u=torch.ones(1, 5, 4, dtype=torch.float64)))
    assert contract_of(scan).family == contract_of(recurrent).family == "selective_scan"
