"""ReLU attention, its square and their gradients against float64 autograd: sizes, layouts, kinks, range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.emulator import compile_launches, emulate
from attnproof.kernels.arguments import ContractError
from attnproof.kernels.relu import attention
from attnproof.properties.contract import contract_of
from tests.kernels.pointwise_reference import (
    DTYPES,
    NAMES,
    U32,
    Weight,
    assert_within,
    exact,
    gradients,
    tensors,
)

pytestmark = pytest.mark.usefixtures("emulated")

SMALL_TILES = {"block_m": 16, "block_n": 16}


def relu_weight(power: int) -> Weight:
    """relu^power: increasing and convex, so w(s + ds) − w(s) bounds its error; squaring rounds once more.

    The slope of relu is 0 or 1, and unknown where s may lie on either side of 0.
    """

    def value(s: Tensor) -> Tensor:
        return torch.relu(s) ** power

    def value_error(s: Tensor, ds: Tensor) -> Tensor:
        return value(s + ds) - value(s) + 2 * U32 * value(s + ds)

    if power == 1:
        return Weight(
            value,
            lambda s: (s > 0).double(),
            value_error,
            lambda s, ds: ((s.abs() <= ds) & (ds > 0)).double(),
        )
    return Weight(
        value,
        lambda s: 2 * torch.relu(s),
        value_error,
        lambda s, ds: 2 * (torch.relu(s + ds) - torch.relu(s)),
    )


def assert_exact(q: Tensor, k: Tensor, v: Tensor, do: Tensor | None = None, **options: Any) -> list[Tensor]:
    tiles = options.pop("tiles", {})
    do = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype) if do is None else do
    common = {"scale": options["scale"], "causal": options.get("causal", False)}
    divisor = options.get("normalizer") or 1.0
    want, errors = exact(relu_weight(options.get("power", 1)), q, k, v, do, divisor=divisor, **common)
    got = gradients(attention, q, k, v, do, **options, **tiles)
    assert_within(got, want, errors, q.dtype)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalizer", [None, 53.0, 0.5])
@pytest.mark.parametrize("power", [1, 2])
def test_option(power: int, normalizer: float | None, causal: bool, dtype: torch.dtype) -> None:
    options = {"causal": causal, "normalizer": normalizer, "power": power}
    assert_exact(*tensors(dtype), scale=0.3, **options, tiles=SMALL_TILES)


@pytest.mark.parametrize("n", [0, 1, 16, 17, 33])
@pytest.mark.parametrize("m", [0, 1, 16, 17, 33])
def test_sizes_around_a_tile(m: int, n: int) -> None:
    assert_exact(*tensors(m=m, n=n), scale=0.25, causal=True, tiles=SMALL_TILES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 129), (65, 33)])
def test_sizes_around_the_default_tile(m: int, n: int, dtype: torch.dtype) -> None:
    assert_exact(*tensors(dtype, m=m, n=n), scale=-0.25, power=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (40, 1), (64, 40), (5, 72)])
def test_widths(d: int, e: int, dtype: torch.dtype) -> None:
    assert_exact(*tensors(dtype, m=17, n=35, d=d, e=e), scale=d**-0.5, causal=True)


@pytest.mark.parametrize("group", [2, 7])
def test_grouped_heads(group: int) -> None:
    assert_exact(*tensors(b=2, h=2 * group, g=2, m=19, n=33), scale=0.25, causal=True, tiles=SMALL_TILES)


def test_layouts() -> None:
    b, h, m, n, d = 2, 3, 20, 33, 16
    q, k, v = (torch.randn(b, h, d, x).mT for x in (m, n, n))
    assert_exact(q, k, v, torch.randn(b, h, d, m).mT, scale=0.25)
    assert_exact(q, k, v, torch.randn(1, h, 1, 1).expand(b, h, m, d), scale=0.25, causal=True)


@pytest.mark.parametrize("power", [1, 2])
def test_derivative_at_zero_is_zero(power: int) -> None:
    """Scores of exactly 0, of both signs of zero (PyTorch's convention)."""
    q, k, v = tensors(m=9, n=20)
    for factor in (0.0, -0.0):
        o, dq, dk, dv = gradients(attention, q * factor, k, v, v[:, :, :9], scale=1.0, power=power)
        assert not any(x.any() for x in (o, dq, dk, dv))
    # orthogonal rows: scores are ±0 at half of the keys, 2 and −2 elsewhere
    q, k = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    q[..., 0], k[0, 0, :, 0] = 2.0, torch.tensor([0.0, 1.0, -1.0, -0.0])
    v = torch.arange(16.0).reshape(1, 1, 4, 4)
    do = torch.ones(1, 1, 4, 4)
    _, dq, dk, dv = gradients(attention, q, k, v, do, scale=1.0, power=1)
    assert torch.equal(dq[0, 0, :, 0], torch.full((4,), 22.0))
    assert torch.equal(dk[0, 0, :, 0], torch.tensor([0.0, 2 * 4 * 22.0, 0.0, 0.0]))
    assert torch.equal(dv[0, 0, :, 0], torch.tensor([0.0, 8.0, 0.0, 0.0]))


@pytest.mark.parametrize("power", [1, 2])
def test_weights_beyond_float16(power: int) -> None:
    """Scores of 1.3e8 and −1.3e8, values of 0 among others: float16 weights would be inf, and inf·0 NaN."""
    q, k, v = tensors(torch.float16, m=16, n=32, d=64)
    v[..., 3] = 0
    q, k, v, do = q.sign() * 1024, k.sign() * 2048, v / 1024, torch.randn(1, 2, 16, 16).half() / 1024
    normalizer = 2.0**20 if power == 1 else 2.0**45
    o, *_ = assert_exact(q, k, v, do, scale=1.0, normalizer=normalizer, power=power)
    assert o.any()


def test_runs_agree() -> None:
    given = (*tensors(torch.float16), torch.randn(1, 2, 37, 16).half())
    first = gradients(attention, *given, scale=0.25, power=2)
    again = gradients(attention, *given, scale=0.25, power=2)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_unseen_nonfinite_values_do_not_leak(which: int, poison: float, dtype: torch.dtype) -> None:
    """Query i stands at i + 16 of 53 keys: key 40 is seen from row 24 on, query 10 sees keys up to 26."""
    given, do = [*tensors(dtype)], torch.randn(1, 2, 37, 16).to(dtype)
    clean = gradients(attention, *given, do, scale=0.25, causal=True, **SMALL_TILES)
    given[which][:, :, 10 if which == 0 else 40, 3] = poison
    got = gradients(attention, *given, do, scale=0.25, causal=True, **SMALL_TILES)
    for name, x, y in zip(NAMES, got, clean, strict=True):
        if name in ("o", "dq"):
            same = torch.arange(37) != 10 if which == 0 else torch.arange(37) < 24
        else:
            same = torch.arange(53) > 26 if which == 0 else torch.arange(53) != 40
        assert torch.equal(x[:, :, same], y[:, :, same]), name


@pytest.mark.parametrize("power", [1, 2])
def test_a_nan_is_seen_as_one(power: int) -> None:
    """relu(NaN) is NaN, not max(NaN, 0) = 0."""
    q, k, v = tensors()
    k[:, :, 7, 0] = math.nan
    assert attention(q, k, v, scale=0.25, power=power).isnan().all()


def test_memory_beyond_the_end_does_not_leak() -> None:
    q, k, v, do = (torch.full((1, 2, 70, 32), math.nan) for _ in range(4))
    views = q[:, :, :5, :20], k[:, :, :31, :20], v[:, :, :31, :24], do[:, :, :5, :24]
    for x in views:
        x.normal_()
    assert_exact(*views, scale=0.25)


@pytest.mark.emulator
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_target(target: str) -> None:
    with emulate(target):
        for dtype in DTYPES:
            assert_exact(*tensors(dtype, m=20, n=33), scale=0.25, causal=True)


@pytest.mark.emulator
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles(target: str) -> None:
    q, k, v = tensors(torch.float16, m=64, n=64, d=64, e=64)
    (kernel,) = compile_launches(attention, (q, k, v), {"scale": 1.0, "causal": True, "power": 2}, [target])
    assert kernel.spill_bytes == 0
    assert kernel.matrix_instructions > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": math.inf}, "scale=inf"),
        ({"normalizer": 0.0}, "normalizer=0.0"),
        ({"normalizer": -1.0}, "normalizer=-1.0"),
        ({"power": 3}, "power=3"),
        ({"block_n": 8}, "block_n=8"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    q, k, v = tensors()
    with pytest.raises(ContractError, match=message):
        attention(q, k, v, **{"scale": 1.0, **change})


def test_contract() -> None:
    contract = contract_of(attention)
    assert contract is not None
    assert (contract.family, set(contract.options)) == ("relu", {"causal", "normalizer", "power"})
    assert contract.supports.max_head_dim == 256
