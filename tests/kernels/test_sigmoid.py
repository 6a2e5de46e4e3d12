"""Sigmoid attention and its gradients against float64 autograd: sizes, layouts, the bias, the tails of σ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnproof.emulator import compile_launches, emulate
from attnproof.kernels.arguments import ContractError
from attnproof.kernels.examples.sigmoid_tanh import tanh_sigmoid_attention
from attnproof.kernels.sigmoid import attention, sigmoid_and_slope
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

# |d log σ / ds| and |d log σ' / ds| are at most 1, so an error of a score is a relative error of both.
# exp2 to 2 ulp, a sum, a square and a division to 2 ulp: 8 more roundings. Below the last subnormal, 0
SIGMOID = Weight(
    lambda s: (
        1 / (1 + torch.exp(-s))
    ),  # torch.sigmoid's own gradient is σ(1 − σ): nothing left at s = 40 (B63)
    lambda s: torch.sigmoid(s) * torch.sigmoid(-s),
    lambda s, ds: torch.sigmoid(s) * torch.expm1(ds + 8 * U32) + 2.0**-140,
    lambda s, ds: torch.sigmoid(s) * torch.sigmoid(-s) * torch.expm1(ds + 8 * U32) + 2.0**-140,
)


def assert_exact(q: Tensor, k: Tensor, v: Tensor, do: Tensor | None = None, **options: Any) -> list[Tensor]:
    tiles = options.pop("tiles", {})
    do = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype) if do is None else do
    bias = options.pop("bias", None)
    given = {} if bias is None else {"bias": bias}
    offset = -math.log(max(k.shape[2], 1)) if bias is None else bias
    want, errors = exact(SIGMOID, q, k, v, do, offset=offset, **options)
    got = gradients(attention, q, k, v, do, **given, **options, **tiles)
    assert_within(got, want, errors, q.dtype)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [None, 0.0, -2.5, 3.0])
def test_bias(bias: float | None, causal: bool, dtype: torch.dtype) -> None:
    assert_exact(*tensors(dtype), scale=0.3, bias=bias, causal=causal, tiles=SMALL_TILES)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("m", [0, 1, 16, 17, 33])
def test_sizes_around_a_tile(m: int, n: int) -> None:
    assert_exact(*tensors(m=m, n=n), scale=0.25, causal=True, tiles=SMALL_TILES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 129), (65, 33), (129, 65), (3, 64)])
def test_sizes_around_the_default_tile(m: int, n: int, dtype: torch.dtype) -> None:
    assert_exact(*tensors(dtype, m=m, n=n), scale=0.25, causal=True)
    assert_exact(*tensors(dtype, m=m, n=n), scale=0.25)


@pytest.mark.parametrize("tiles", [{"block_m": 16, "block_n": 64}, {"block_m": 64, "block_n": 16}])
def test_tiles_of_unequal_sides(tiles: dict[str, int]) -> None:
    for m, n in [(70, 70), (20, 90), (90, 20), (64, 128)]:
        assert_exact(*tensors(m=m, n=n, d=3, e=2), scale=0.25, causal=True, tiles=tiles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (40, 1), (64, 40), (5, 72), (256, 3)])
def test_widths(d: int, e: int, dtype: torch.dtype) -> None:
    assert_exact(*tensors(dtype, m=17, n=35, d=d, e=e), scale=d**-0.5, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 2, 7])
def test_grouped_heads(group: int, causal: bool) -> None:
    assert_exact(*tensors(b=2, h=2 * group, g=2, m=19, n=33), scale=0.25, causal=causal, tiles=SMALL_TILES)


def test_no_batch() -> None:
    assert_exact(*tensors(b=0), scale=0.25)


def test_rows_and_keys_without_partners() -> None:
    """More queries than keys: rows that see nothing; fewer: no key is unseen, bottom right."""
    o, dq, *_ = assert_exact(*tensors(m=20, n=7), scale=0.25, causal=True)
    assert not o[:, :, :13].any()
    assert not dq[:, :, :13].any()
    o, dq, *_ = assert_exact(*tensors(m=20, n=0), scale=0.25)
    assert o.shape == (1, 2, 20, 16)
    assert not o.any()
    assert not dq.any()


def test_layouts() -> None:
    b, h, m, n, d = 2, 3, 20, 33, 16
    fused = torch.randn(b, n, h, 3 * d)
    q, k, v = (x.transpose(1, 2) for x in torch.split(fused, d, -1))
    assert_exact(q, k, v, torch.randn(b, n, h, d).transpose(1, 2), scale=0.25, causal=True)
    q, k, v = (torch.randn(b, h, d, x).mT for x in (m, n, n))  # the last axis is not contiguous
    assert_exact(q, k, v, torch.randn(b, h, d, m).mT, scale=0.25)
    q, k = torch.randn(b, h, m, d)[..., ::2], torch.randn(b, h, n, d)[..., 1::2]
    assert_exact(q, k, torch.randn(b, h, n, d)[..., 3:9], torch.randn(b, h, m, 40)[..., 1:7], scale=0.25)
    k, v = torch.randn(1, 1, n, d).expand(b, h, n, d), torch.randn(1, 1, 1, d).expand(b, h, n, d)
    for do in (torch.ones(1, 1, 1, 1), torch.randn(1, h, 1, d)):
        assert_exact(torch.randn(b, h, m, d), k, v, do.expand(b, h, m, d), scale=0.25)


def test_only_some_inputs_require_a_gradient() -> None:
    q, k, v = tensors()
    do = torch.randn(1, 2, 37, 16)
    _, *want = gradients(attention, q, k, v, do, scale=0.25)
    for chosen in range(3):
        leaves = [x.clone().requires_grad_(i == chosen) for i, x in enumerate((q, k, v))]
        attention(*leaves, scale=0.25).backward(do)
        assert [x.grad is not None for x in leaves] == [i == chosen for i in range(3)]
        assert torch.equal(leaves[chosen].grad, want[chosen])  # type: ignore[arg-type]
    assert not attention(q, k, v, scale=0.25).requires_grad


def test_inputs_stay_and_runs_agree() -> None:
    given = (*tensors(torch.float16), torch.randn(1, 2, 37, 16).half())
    before = [x.clone() for x in given]
    first = gradients(attention, *given, scale=0.25, causal=True)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    again = gradients(attention, *given, scale=0.25, causal=True)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", [-300.0, -95.0, -40.0, -17.0, 6.25, 17.0, 40.0, 95.0, 300.0])
def test_tails(logit: float, dtype: torch.dtype) -> None:
    """σ and σ' keep their digits at both ends, and neither overflows (B63). The bias is the logit."""
    q, k, v = tensors(dtype)
    got = assert_exact(q / 8, k / 8, v, scale=1.0, bias=logit)
    if dtype == torch.float32 and abs(logit) <= 40:
        assert all(x.all() for x in got[1:3]), "σ' is lost"


def test_largest_numbers() -> None:
    q, k, v = tensors(torch.float16, m=16, n=32, d=64)
    got = gradients(attention, q.sign() * 65504, k.sign() * 65504, v, v[:, :, :16], scale=1.0)
    assert all(x.isfinite().all() for x in got)
    for bias in (-3e38, 3e38):
        got = gradients(attention, *tensors(), torch.ones(1, 2, 37, 16), scale=1.0, bias=bias)
        assert all(x.isfinite().all() for x in got)


def test_dscores_beyond_float16() -> None:
    """dS = σ' dP reaches 1.6e5, and dQ = dS K is 160: float16 would have stored inf."""
    q, k, v = (
        torch.zeros(1, 1, 4, 16),
        torch.full((1, 1, 20, 16), 2.0**-14),
        torch.full((1, 1, 20, 16), 200.0),
    )
    do = torch.full((1, 1, 4, 16), 200.0)
    assert_exact(*(x.half() for x in (q, k, v, do)), scale=1.0, bias=0.0)


@triton.jit
def sigmoid_of_block_kernel(p_x, p_o, p_slope, SIZE: tl.constexpr):
    o_x = tl.arange(0, SIZE)
    b_value, b_slope = sigmoid_and_slope(tl.load(p_x + o_x))
    tl.store(p_o + o_x, b_value)
    tl.store(p_slope + o_x, b_slope)


def test_sigmoid_to_a_few_ulp() -> None:
    """exp2 2 ulp, 1 + t, its square, a division of 2 ulp: within 8·u, of x in bits, over all of float32.

    exp2 flushes subnormal results to zero.
    """
    ends = torch.tensor([0.0, math.inf, -math.inf, 149.0, -149.0, -150.0, 3e38, -3e38, 2.0**-140, -1e-3])
    x = torch.cat([torch.linspace(-160, 160, 502), 2.0 ** torch.linspace(-149, 120, 512), ends])
    value, slope = torch.empty_like(x), torch.empty_like(x)
    sigmoid_of_block_kernel[(1,)](x, value, slope, SIZE=1024)
    nats = x.double() * math.log(2)
    want, want_slope = torch.sigmoid(nats), torch.sigmoid(nats) * torch.sigmoid(-nats)
    assert ((value.double() - want).abs() <= 8 * U32 * want + 2.0**-126).all()
    assert ((slope.double() - want_slope).abs() <= 8 * U32 * want_slope + 2.0**-126).all()


HIDDEN_UNTIL = 24  # 37 queries stand at the end of 53 keys: key 40 is seen from row 24 on


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
def test_unseen_nonfinite_values_do_not_leak(which: str, poison: float) -> None:
    """A row is as if what it does not see were finite, in o and dq; a key likewise in dk and dv."""
    q, k, v = tensors(torch.bfloat16)
    given = {"q": q, "k": k, "v": v, "do": torch.randn(1, 2, 37, 16).bfloat16()}
    clean = gradients(attention, *given.values(), scale=0.25, causal=True, **SMALL_TILES)
    row = 10 if which in ("q", "do") else 40
    given[which][:, :, row, 3] = poison
    got = gradients(attention, *given.values(), scale=0.25, causal=True, **SMALL_TILES)
    for name, x, y in zip(NAMES, got, clean, strict=True):
        if name in ("o", "dq"):
            same = torch.arange(37) != row if row == 10 else torch.arange(37) < HIDDEN_UNTIL
        else:  # query 10 stands at 26; the key itself may be anything
            same = torch.arange(53) > 26 if row == 10 else torch.arange(53) != row
        assert torch.equal(x[:, :, same], y[:, :, same]), name


@pytest.mark.parametrize("n", [1, 31, 33])
def test_memory_beyond_the_end_does_not_leak(n: int) -> None:
    """Inputs and cotangent are views into tensors of NaN; a key of zeros weighs σ(bias), not 0."""
    q, k, v, do = (torch.full((1, 2, 70, 32), math.nan) for _ in range(4))
    views = q[:, :, :5, :20], k[:, :, :n, :20], v[:, :, :n, :24], do[:, :, :5, :24]
    for x in views:
        x.normal_()
    assert_exact(*views, scale=0.25, bias=2.0)


def test_keys_that_nobody_sees_have_no_gradient() -> None:
    """M > N leaves no key unseen bottom right; a cotangent that is 0 from a row on hides keys."""
    q, k, v = tensors(m=40, n=40)
    do = torch.randn(1, 2, 40, 16)
    do[:, :, 25:] = 0
    _, _, dk, dv = assert_exact(q, k, v, do, scale=0.25, causal=True, tiles=SMALL_TILES)
    assert dk[:, :, :25].any()
    assert not dk[:, :, 25:].any()
    assert not dv[:, :, 25:].any()


def test_causal_bias_counts_all_keys() -> None:
    """Row i of a causal call weighs i + 1 keys of zero logit by 1 / (N + 1) each (SIG-1)."""
    n = 50
    q = torch.zeros(1, 1, n, 16)
    o = attention(q, q, torch.ones_like(q), scale=1.0, causal=True)[0, 0, :, 0]
    assert torch.allclose(o.double(), torch.arange(1, n + 1).double() / (n + 1), rtol=16 * U32)


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
    (kernel,) = compile_launches(attention, (q, k, v), {"scale": 1.0, "causal": True}, [target])
    assert kernel.spill_bytes == 0
    assert kernel.matrix_instructions > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": math.nan}, "scale=nan"),
        ({"bias": math.inf}, "bias=inf"),
        ({"bias": torch.zeros(3)}, "bias="),
        ({"block_m": 17}, "block_m=17"),
        ({"k": torch.zeros(2, 3)}, "k has shape"),
        ({"v": torch.zeros(1, 2, 5, 16)}, "must agree"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    q, k, v = tensors()
    with pytest.raises(ContractError, match=message):
        attention(**{"q": q, "k": k, "v": v, "scale": 1.0, **change})


def test_contract() -> None:
    contract = contract_of(attention)
    assert contract is not None
    assert (contract.family, set(contract.options)) == ("sigmoid", {"bias", "causal"})
    assert contract.supports.max_head_dim == 256


@pytest.mark.emulator  # whose tanh has the 11 bits that are documented; an H100's has 16 (test_hardware)
def test_tanh_example_is_right_where_sigmoid_is_large_and_wrong_where_it_is_small() -> None:
    """SIG-11: a tanh of 11 bits leaves an absolute error of 2⁻¹² after the subtraction, (N + 1)·2⁻¹² of σ."""
    q, k, v = tensors(n=64)
    want, errors = exact(SIGMOID, q, k, v, torch.zeros(1, 2, 37, 16), scale=0.25)
    o = tanh_sigmoid_attention(q, k, v, scale=0.25, bias=0.0)
    assert (
        (o.double() - want[0]).abs() <= errors[0] + 2.0**-12 * v.double().abs().sum(2, keepdim=True)
    ).all()
    off = []
    for n in (64, 4096):
        q, k, v = tensors(n=n)
        v[:] = torch.eye(n, 16)  # one weight an output
        want, errors = exact(SIGMOID, q, k, v, torch.zeros(1, 2, 37, 16), scale=0.25, offset=-math.log(n))
        good, naive = (f(q, k, v, scale=0.25).double() for f in (attention, tanh_sigmoid_attention))
        assert ((good - want[0]).abs() <= errors[0]).all()
        off.append(((naive - want[0]).abs() / want[0]).max().item())
    # 2⁻¹² of the smallest weight: a few percent of those of 64 keys, and all of it where 4096 share the mass
    assert off[0] < 0.25 < 0.9 < off[1]
    assert ((naive - want[0]).abs() > errors[0]).any()
