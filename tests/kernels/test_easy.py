"""Easy attention and its gradients against float64 autograd: sizes, bands, layouts, what must not leak."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.emulator import compile_launches, emulate
from attnproof.kernels.arguments import ContractError
from attnproof.kernels.easy import attention
from attnproof.properties.contract import contract_of
from tests.kernels.pointwise_reference import DTYPES, HALF_SUBNORMAL, ROUNDOFF, U32

pytestmark = pytest.mark.usefixtures("emulated")

SMALL_TILES = {"block_m": 16, "block_n": 16}


def inputs(
    dtype: torch.dtype = torch.float32, *, b: int = 2, h: int = 2, n: int = 37, e: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """alpha (H,N,N), v (B,H,N,E), dO like v."""
    return (
        torch.randn(h, n, n).to(dtype),
        torch.randn(b, h, n, e).to(dtype),
        torch.randn(b, h, n, e).to(dtype),
    )


def gradients(entry: Any, alpha: Tensor, v: Tensor, do: Tensor, **options: Any) -> list[Tensor]:
    """o, dalpha, dv of ``entry``."""
    leaves = [x.detach().requires_grad_() for x in (alpha, v)]
    o = entry(*leaves, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def exact(alpha: Tensor, v: Tensor, do: Tensor, band: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """o, dalpha, dv in float64, and their errors: n terms summed in float32, a result rounded once."""
    u, tiny = ROUNDOFF[v.dtype], HALF_SUBNORMAL[v.dtype]
    batch, _, length, width = v.shape
    i = torch.arange(length)
    used = ((i[:, None] - i).abs() <= (length if band is None else band)).double()

    def naive(alpha: Tensor, v: Tensor) -> Tensor:
        return (alpha * used) @ v

    alpha, v, do = (x.detach().double() for x in (alpha, v, do))
    want = gradients(naive, alpha, v, do)
    sizes = gradients(naive, alpha.abs(), v.abs(), do.abs())
    terms = (length, batch * width, length)
    errors = [n * U32 * size + u * x.abs() + tiny for n, size, x in zip(terms, sizes, want, strict=True)]
    return want, errors


def assert_exact(
    alpha: Tensor, v: Tensor, do: Tensor, *, band: int | None = None, **tiles: int
) -> list[Tensor]:
    want, errors = exact(alpha, v, do, band)
    got = gradients(attention, alpha, v, do, band=band, **tiles)
    for name, x, y, error in zip(("o", "dalpha", "dv"), got, want, errors, strict=True):
        assert x.dtype == v.dtype
        assert x.shape == y.shape
        worst = ((x.double() - y).abs() / error).max().item() if x.numel() else 0.0
        assert worst <= 1, f"{name} is off by {worst:.3g} times the tolerance"
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("band", [None, 0, 1, 15, 16, 17, 36, 37, 2**40])
def test_band(band: int | None, dtype: torch.dtype) -> None:
    _, dalpha, _ = assert_exact(*inputs(dtype), band=band, **SMALL_TILES)
    if band is not None:
        i = torch.arange(37)
        assert not dalpha[:, (i[:, None] - i).abs() > band].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 17, 33, 64, 65, 129])
def test_sizes(n: int, dtype: torch.dtype) -> None:
    assert_exact(*inputs(dtype, n=n))
    assert_exact(*inputs(dtype, n=n), band=20)


@pytest.mark.parametrize("tiles", [{"block_m": 16, "block_n": 64}, {"block_m": 64, "block_n": 16}])
@pytest.mark.parametrize("band", [None, 3, 20])
def test_tiles_of_unequal_sides(band: int | None, tiles: dict[str, int]) -> None:
    assert_exact(*inputs(n=150), band=band, **tiles)


@pytest.mark.parametrize("e", [1, 40, 64, 256])
@pytest.mark.parametrize("b", [0, 1, 5])
def test_widths_and_batches(b: int, e: int) -> None:
    _, dalpha, _ = assert_exact(*inputs(torch.bfloat16, b=b, n=20, e=e), band=4)
    assert bool(dalpha.any()) is (b > 0)


def test_layouts() -> None:
    alpha, v, do = inputs(n=48)
    alpha, v, do = alpha.mT, torch.randn(2, 48, 2, 40).transpose(1, 2)[..., 3:19], do.mT.contiguous().mT
    assert_exact(alpha, v, do, band=7)
    one = torch.randn(1, 1, 48).expand(2, 48, 48)
    assert_exact(one, v.contiguous(), torch.ones(1, 1, 1, 1).expand(2, 2, 48, 16))
    assert_exact(one.mT, torch.randn(1, 2, 1, 16).expand(3, 2, 48, 16), torch.randn(3, 2, 16, 48).mT)


def test_only_one_input_requires_a_gradient() -> None:
    alpha, v, do = inputs()
    _, *want = gradients(attention, alpha, v, do, band=5)
    for chosen in range(2):
        leaves = [x.clone().requires_grad_(i == chosen) for i, x in enumerate((alpha, v))]
        attention(*leaves, band=5).backward(do)
        assert torch.equal(leaves[chosen].grad, want[chosen])  # type: ignore[arg-type]
        assert leaves[1 - chosen].grad is None


def test_the_batch_is_summed_before_rounding() -> None:
    """2^12 + 4096 copies of 1/2 in float16: rounded after each addition the sum would stay at 2^12."""
    v, do = torch.full((65, 1, 1, 64), 0.5).half(), torch.ones(65, 1, 1, 64).half()
    v[0] = 64.0
    _, dalpha, _ = gradients(attention, torch.ones(1, 1, 1).half(), v, do)
    assert dalpha.item() == 64 * 64 + 64 * 64 * 0.5


def test_inputs_stay_and_runs_agree() -> None:
    given = inputs(torch.float16)
    before = [x.clone() for x in given]
    first = gradients(attention, *given, band=9)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first, gradients(attention, *given, band=9), strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_outside_the_band_nothing_is_read(poison: float) -> None:
    alpha, v, do = inputs()
    clean = gradients(attention, alpha, v, do, band=4, **SMALL_TILES)
    i = torch.arange(37)
    alpha[:, (i[:, None] - i).abs() > 4] = poison
    assert all(
        torch.equal(x, y)
        for x, y in zip(gradients(attention, alpha, v, do, band=4, **SMALL_TILES), clean, strict=True)
    )
    v[:, :, 20, 3] = poison
    o = attention(alpha, v, band=4, **SMALL_TILES)
    far = (i - 20).abs() > 4
    assert torch.equal(o[:, :, far], clean[0][:, :, far])
    assert o[:, :, ~far].isnan().all()


@pytest.mark.parametrize("band", [None, 6])
def test_memory_beyond_the_end_does_not_leak(band: int | None) -> None:
    alpha, v, do = (
        torch.full((2, 50, 50), math.nan),
        *(torch.full((2, 2, 50, 50), math.nan) for _ in range(2)),
    )
    views = alpha[:, :31, :31], v[:, :, :31, :21], do[:, :, :31, :21]
    for x in views:
        x.normal_()
    assert_exact(*views, band=band)


@pytest.mark.emulator
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_target(target: str) -> None:
    with emulate(target):
        for dtype in DTYPES:
            assert_exact(*inputs(dtype), band=20)


@pytest.mark.emulator
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles(target: str) -> None:
    alpha, v, _ = inputs(torch.float16, n=64, e=64)
    (kernel,) = compile_launches(attention, (alpha, v), {"band": 20}, [target])
    assert kernel.spill_bytes == 0
    assert kernel.matrix_instructions > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"band": -1}, "band=-1"),
        ({"band": 1.5}, "band=1.5"),
        ({"alpha": torch.zeros(2, 37, 36)}, r"alpha has shape \(2, 37, 36\)"),
        ({"alpha": torch.zeros(37, 37)}, "expected axes"),
        ({"alpha": torch.zeros(2, 37, 37).half()}, "float16"),
        ({"v": torch.zeros(2, 2, 37, 0)}, "width E is 0"),
        ({"block_m": 5}, "block_m=5"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    alpha, v, _ = inputs()
    with pytest.raises(ContractError, match=message):
        attention(**{"alpha": alpha, "v": v, **change})


def test_contract() -> None:
    contract = contract_of(attention)
    assert contract is not None
    assert (contract.family, contract.options) == ("easy", ("band",))
    wide = torch.zeros(1, 1, 3, 257)
    with pytest.raises(NotImplementedError, match="up to 256"):
        attention(torch.zeros(1, 3, 3), wide)
