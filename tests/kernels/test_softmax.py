"""Softmax attention against its formula in float64: every option, size and layout, and what must not leak.

The reference here is a plain transcription in torch. Certified verification is the suite's work; these tests
say quickly that the kernel computes the right thing, at tolerances that follow from where it rounds
(`Expected.o_error`).
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnproof.emulator import emulate
from attnproof.kernels import softmax
from attnproof.kernels.merge import merged
from attnproof.properties.contract import contract_of

pytestmark = pytest.mark.usefixtures("emulated")

# what they return depends on return_lse, which their types do not say
attention: Any = softmax.attention
attention_split: Any = softmax.attention_split

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDOFF)
ENTRIES = [attention, attention_split]
SMALL_TILES = {"block_m": 16, "block_n": 16}


class Expected(NamedTuple):
    """The exact result in float64, and how far a kernel that rounds as ours does may be from it."""

    o: Tensor
    lse: Tensor
    o_error: Tensor
    lse_error: Tensor


def visible(queries: int, keys: int, causal: bool, window: Any, causal_alignment: str) -> Tensor:
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    p = i + keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= j <= (p if causal_alignment == "bottom-right" else i)
    left, right = window or (None, None)
    if left is not None:
        seen &= j >= p - left
    if right is not None:
        seen &= j <= p + right
    return seen


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: Any = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "bottom-right",
    matmul_roundoff: float = 0.0,
) -> Expected:
    """o = Σ p v and lse, with the errors of float32 scores, of sums, of P's storage and of the result's."""
    dtype, u32 = q.dtype, 2.0**-24
    heads, width, keys = q.shape[1], q.shape[3], k.shape[2]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    s = scale * q @ k.mT
    size = abs(scale) * q.abs() @ k.abs().mT
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.double()
        size = size + bias.double().nan_to_num(neginf=0.0).abs()
    seen = visible(q.shape[2], keys, causal, window, causal_alignment)
    s = s.masked_fill(~seen, -math.inf)
    sink = sinks.double()[None, :, None, None].expand(*s.shape[:3], 1) if sinks is not None else s[..., :0]
    logits = torch.cat([s, sink], -1)
    lse = (
        logits.logsumexp(-1) if logits.shape[-1] else torch.full(s.shape[:3], -math.inf, dtype=torch.float64)
    )
    p = torch.exp(s - lse.clamp(min=-1e300)[..., None]) if keys else s
    # an inner product of D terms and at most 8 more roundings of a score (scale, cap, bias, log2 e, exp)
    ds = ((width + 8) * u32 + 2 * matmul_roundoff) * size.masked_fill(~(s > -math.inf), 0.0)
    ds = ds.amax(-1) if keys else torch.zeros_like(lse)
    ds = ds + (0.0 if sinks is None else 4 * u32 * sinks.double().abs()[None, :, None])
    # relative: the scores of a weight and of its normaliser, both sums, P's storage
    relative = (
        2 * ds
        + 2 * (keys + 8) * u32
        + (0.0 if dtype == torch.float32 else ROUNDOFF[dtype])
        + matmul_roundoff * 2
    )
    o = p @ v
    o_error = torch.expm1(relative)[..., None] * (p @ v.abs()) + ROUNDOFF[dtype] * o.abs() + 2.0**-24
    lse_error = ds + (keys + 8) * u32 + 4 * u32 * lse.nan_to_num(neginf=0.0).abs()
    return Expected(o, lse, o_error, lse_error)


def packed(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def tensors(
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 1,
    h: int = 2,
    g: int = 2,
    m: int = 37,
    n: int = 53,
    d: int = 16,
    e: int = 16,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(b, h, m, d).to(dtype),
        torch.randn(b, g, n, d).to(dtype),
        torch.randn(b, g, n, e).to(dtype),
    )


def assert_exact(entry: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    tiles = options.pop("tiles", {})
    want = exact(q, k, v, **options)
    o, lse = entry(q, k, v, return_lse=True, **options, **tiles)
    assert o.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert o.shape == want.o.shape
    assert lse.shape == want.lse.shape
    worst = ((o.double() - want.o).abs() / want.o_error).max().item() if o.numel() else 0.0
    assert worst <= 1, f"o is off by {worst:.3g} times the tolerance"
    empty = want.lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert not o[empty].any()
    lse_error = (lse.double() - want.lse)[~empty].abs() / want.lse_error[~empty]
    assert not lse_error.numel() or lse_error.max() <= 1


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal top-left": {"causal": True, "causal_alignment": "top-left"},
    "window": {"window": (7, 3)},
    "window left": {"window": (20, None)},
    "window right": {"window": (None, 0)},
    "window of no keys to the side": {"window": (0, 0)},
    "window wider than anything": {"window": (2**40, 2**40)},
    "causal window": {"causal": True, "window": (18, None)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.3, -2.0])},
    "a sink of -inf": {"sinks": torch.tensor([-math.inf, 1.0])},
    "bias": {"bias": torch.linspace(-2, 2, 37 * 53).reshape(37, 53)},
    "bias of one value a key": {"bias": torch.linspace(-2, 2, 53)},
    "bias with -inf": {
        "bias": torch.where(torch.arange(2 * 37 * 53) % 3 == 0, -math.inf, 0.5).reshape(1, 2, 37, 53)
    },
    "everything": {
        "causal": True,
        "window": (30, 2),
        "softcap": 2.0,
        "sinks": torch.tensor([0.3, -2.0]),
        "bias": torch.linspace(-1, 1, 53),
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str, dtype: torch.dtype) -> None:
    options = {key: x.to(dtype) if isinstance(x, Tensor) else x for key, x in OPTIONS[name].items()}
    assert_exact(attention, *tensors(dtype), scale=0.3, **options, tiles=SMALL_TILES)
    options.pop("tiles", None)
    assert_exact(attention_split, *tensors(dtype), scale=0.3, **options)


@pytest.mark.parametrize("causal_alignment", ["bottom-right", "top-left"])
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 31])
@pytest.mark.parametrize("m", [0, 1, 2, 15, 16, 17, 31])
def test_sizes_around_a_tile(m: int, n: int, causal_alignment: str) -> None:
    q, k, v = tensors(m=m, n=n)
    assert_exact(
        attention, q, k, v, scale=0.25, causal=True, causal_alignment=causal_alignment, tiles=SMALL_TILES
    )


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127])
def test_sizes_around_the_default_tile(entry: Any, size: int) -> None:
    assert_exact(entry, *tensors(torch.float16, m=3, n=size), scale=0.25)
    assert_exact(entry, *tensors(torch.float16, m=size, n=5), scale=0.25)


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_batch(entry: Any) -> None:
    assert_exact(entry, *tensors(b=0), scale=0.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (5, 40), (40, 5), (64, 64), (72, 64), (256, 3), (16, 256)])
def test_widths(d: int, e: int, dtype: torch.dtype) -> None:
    assert_exact(attention, *tensors(dtype, m=17, n=35, d=d, e=e), scale=d**-0.5, causal=True)


@pytest.mark.parametrize("group", [1, 2, 7])
def test_grouped_heads(group: int) -> None:
    assert_exact(attention, *tensors(b=2, h=2 * group, g=2, m=5, n=9), scale=0.25)


def test_layouts() -> None:
    b, h, m, n, d = 2, 3, 20, 33, 16
    fused = torch.randn(b, n, h, 3 * d, dtype=torch.float32)
    q, k, v = (x.transpose(1, 2) for x in torch.split(fused, d, -1))  # rows of one projection (B12)
    assert_exact(attention, q, k, v, scale=0.25)
    q, k, v = (torch.randn(b, h, d, x).mT for x in (m, n, n))  # the last axis is not contiguous
    assert_exact(attention, q, k, v, scale=0.25)
    assert_exact(attention_split, q, k, v, scale=0.25, causal=True)
    q, k = torch.randn(b, h, m, d)[..., ::2], torch.randn(b, h, n, d)[..., 1::2]
    assert_exact(attention, q, k, torch.randn(b, h, n, d)[:, :, :, 3:9], scale=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_broadcast_keys_and_bias(dtype: torch.dtype) -> None:
    """Stride 0 in keys and in the bias, N ≡ 1 mod 32 (B22)."""
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(1, 1, 33, 16), torch.randn(1, 1, 1, 16)
    k, v = k.expand(2, 2, 33, 16), v.expand(2, 2, 33, 16)
    for shape in [(33,), (9, 1), (1, 4, 1, 1), (2, 1, 9, 33)]:
        bias = torch.randn(shape).to(dtype)
        assert_exact(attention, q.to(dtype), k.to(dtype), v.to(dtype), scale=0.25, bias=bias)
    assert_exact(attention, q.to(dtype), k.to(dtype), v.to(dtype), scale=0.25, bias=torch.randn(33))


def test_inputs_stay() -> None:
    q, k, v = tensors()
    before = [x.clone() for x in (q, k, v)]
    attention(q, k, v, scale=0.25, causal=True)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


HIDING: dict[str, tuple[dict[str, Any], int]] = {
    # options, and the row from which on key 40 is seen by 37 queries of 53 keys (query i stands at i + 16)
    "causal": ({"causal": True}, 24),
    "window": ({"window": (None, 4)}, 20),
    "bias": ({"bias": torch.where(torch.arange(53) > torch.arange(37)[:, None] + 16, -math.inf, 0.0)}, 24),
}


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", HIDING)
def test_unseen_nonfinite_values_do_not_leak(name: str, entry: Any, which: str, poison: float) -> None:
    options, first = HIDING[name]
    q, k, v = tensors(torch.bfloat16)
    clean, clean_lse = entry(q, k, v, scale=0.25, return_lse=True, **options)
    (k if which == "k" else v)[:, :, 40, 3] = poison
    o, lse = entry(q, k, v, scale=0.25, return_lse=True, **options)
    assert torch.equal(o[:, :, :first], clean[:, :, :first])
    assert torch.equal(lse[:, :, :first], clean_lse[:, :, :first])
    if which == "v":
        assert o[:, :, first:].isnan().all()


def test_bias_under_the_mask_does_not_leak() -> None:
    q, k, v = tensors()
    bias = torch.zeros(37, 53)
    clean = attention(q, k, v, scale=0.25, causal=True, bias=bias)
    bias[torch.arange(53) > torch.arange(37)[:, None] + 16] = math.nan
    assert torch.equal(attention(q, k, v, scale=0.25, causal=True, bias=bias), clean)


@pytest.mark.parametrize("n", [1, 31, 64, 65])
def test_memory_beyond_the_end_does_not_leak(n: int) -> None:
    """Keys, values, widths and queries are views into tensors of NaN (B21, B25, B27)."""
    q, k, v = (torch.full((1, 2, 70, 32), math.nan) for _ in range(3))
    views = q[:, :, :5, :20], k[:, :, :n, :20], v[:, :, :n, :24]
    for x in views:
        x.normal_()
    for entry in ENTRIES:
        assert_exact(entry, *views, scale=0.25)


def test_a_nonfinite_query_stays_in_its_row() -> None:
    q, k, v = tensors()
    clean = attention(q, k, v, scale=0.25)
    q[:, :, 11] = math.nan
    o = attention(q, k, v, scale=0.25)
    others = torch.arange(37) != 11
    assert torch.equal(o[:, :, others], clean[:, :, others])


def test_later_values_change_nothing_before() -> None:
    q, k, v = tensors(m=53)
    clean = attention(q, k, v, scale=0.25, causal=True, **SMALL_TILES)
    k[:, :, 30:], v[:, :, 30:], q[:, :, 30:] = 9.0, -7.0, 5.0
    o = attention(q, k, v, scale=0.25, causal=True, **SMALL_TILES)
    assert torch.equal(o[:, :, :30], clean[:, :, :30])
    assert not torch.equal(o[:, :, 30:], clean[:, :, 30:])


@pytest.mark.parametrize("entry", ENTRIES)
def test_rows_without_keys(entry: Any) -> None:
    """More queries than keys, aligned bottom right (B08, B20), and a bias of −inf over a whole row (B24)."""
    q, k, v = tensors(m=5, n=2)
    o, lse = entry(q, k, v, scale=0.25, causal=True, return_lse=True)
    assert not o[:, :, :3].any()
    assert (lse[:, :, :3] == -math.inf).all()
    assert lse[:, :, 3:].isfinite().all()
    bias = torch.zeros(5, 2)
    bias[1] = -math.inf
    assert_exact(entry, q, k, v, scale=0.25, bias=bias)
    # with a sink the normaliser is that of the sink alone
    o, lse = entry(q, k, v, scale=0.25, causal=True, return_lse=True, sinks=torch.tensor([1.5, -3.0]))
    assert not o[:, :, 0].any()
    assert torch.allclose(lse[0, :, 0], torch.tensor([1.5, -3.0]), rtol=2**-21)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (2, 1)}, {"sinks": torch.tensor([0.5, 1.0])}]
)
def test_packed_sequences(options: dict[str, Any]) -> None:
    ends = [0, 0, 17, 18, 18, 50, 50]
    q, k, v = tensors(m=50, n=50)
    bias = torch.randn(50, 50) if not options else None
    cuts = {"cu_seqlens": packed(*ends), "bias": bias, **options, **SMALL_TILES}
    o, lse = attention(q, k, v, scale=0.25, return_lse=True, **cuts)
    for start, stop in itertools.pairwise(ends):
        piece = slice(start, stop)
        want = exact(
            q[:, :, piece],
            k[:, :, piece],
            v[:, :, piece],
            scale=0.25,
            bias=None if bias is None else bias[piece, piece],
            **options,
        )
        assert ((o[:, :, piece].double() - want.o).abs() <= want.o_error).all()
        assert ((lse[:, :, piece].double() - want.lse).abs() <= want.lse_error).all()


def test_packed_sequences_do_not_see_each_other() -> None:
    q, k, v = tensors(m=50, n=50)
    ends = torch.tensor([0, 20, 50], dtype=torch.int32)
    clean = attention(q, k, v, scale=0.25, cu_seqlens=ends)
    k[:, :, 20:], v[:, :, 20:] = math.nan, math.inf
    assert torch.equal(attention(q, k, v, scale=0.25, cu_seqlens=ends)[:, :, :20], clean[:, :, :20])


@pytest.mark.parametrize("splits", [1, 2, 3, 100, None])
def test_splits(splits: int | None) -> None:
    """However the keys are cut; with a causal mask many splits have no key for many rows (B03)."""
    q, k, v = tensors(m=8, n=530)
    want = exact(q, k, v, scale=0.25, causal=True, window=(40, None))
    o, lse = attention_split(
        q, k, v, scale=0.25, causal=True, window=(40, None), return_lse=True, splits=splits
    )
    # merging normalised partials adds one rounding of a weight and of a product for each split
    slack = 1 + 0.1 * min(splits or 2, 20)
    assert ((o.double() - want.o).abs() <= slack * want.o_error).all()
    assert ((lse.double() - want.lse).abs() <= slack * want.lse_error).all()


def test_splits_do_not_depend_on_the_batch() -> None:
    """Thinking Machines' batch invariance (B34): a row alone, and the same row in a batch, bit for bit."""
    q, k, v = tensors(torch.bfloat16, b=5, m=1, n=1100)
    together = attention_split(q, k, v, scale=0.25)
    alone = attention_split(q[2:3], k[2:3], v[2:3], scale=0.25)
    assert torch.equal(together[2:3], alone)


def test_merge_of_empty_sets() -> None:
    """(0, −inf) is the neutral element, also of itself (B03, B04)."""
    o, lse = torch.randn(3, 1, 2, 4, 5), torch.randn(3, 1, 2, 4)
    lse[1:, ..., 1:] = -math.inf
    lse[0, ..., 2:] = -math.inf
    o[lse == -math.inf] = 0
    got_o, got_lse = merged(o, lse, torch.float32)
    assert torch.allclose(got_o[..., 1, :], o[0, ..., 1, :], rtol=2**-22)
    assert torch.allclose(got_lse[..., 1], lse[0, ..., 1], rtol=2**-21, atol=2**-22)
    assert not got_o[..., 2:, :].any()
    assert (got_lse[..., 2:] == -math.inf).all()
    weights = torch.softmax(lse[..., 0].double(), 0)
    assert torch.allclose(got_o[..., 0, :].double(), (weights[..., None] * o[..., 0, :]).sum(0), atol=1e-6)


@pytest.mark.emulator
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_target(target: str) -> None:
    with emulate(target):
        for dtype in DTYPES:
            assert_exact(attention, *tensors(dtype), scale=0.25, causal=True)


def test_scores_of_1e10() -> None:
    """The rounding of a huge score must not come back as a residual (B07); largest numbers of a dtype."""
    x = torch.full((1, 1, 1, 64), 133120.0, dtype=torch.bfloat16)
    for entry in ENTRIES:
        assert torch.equal(entry(x, x, x, scale=0.125), x)
    q, k, v = tensors(torch.float16, m=16, n=32, d=64)
    q, k = q.sign() * 65504, k.sign() * 65504
    o = attention(q, k, v, scale=1.0)
    # scores are multiples of 2·65504² far apart: each row is its argmax, or the mean of tied ones
    s = q.double() @ k.double().mT
    tied = (s == s.amax(-1, keepdim=True)).double()
    want = (tied / tied.sum(-1, keepdim=True)) @ v.double()
    assert ((o.double() - want).abs() <= 2 * 2.0**-11 * v.abs().max()).all()


def test_every_score_below_a_finite_sentinel() -> None:
    """No finite number stands for −inf: scores below −5e4 (B06), a bias of −finfo.max over a whole row."""
    q, k = torch.full((1, 1, 3, 16), 100.0), torch.full((1, 1, 9, 16), -100.0)
    v = torch.randn(1, 1, 9, 16)
    assert_exact(attention, q, k, v, scale=1.0)
    for dtype in DTYPES:
        bias = torch.full((3, 9), -torch.finfo(dtype).max, dtype=dtype)
        o = attention(q.to(dtype), k.to(dtype) * 0, v.to(dtype), scale=1.0, bias=bias)
        assert torch.allclose(
            o.double(), v.to(dtype).double().mean(2, keepdim=True), atol=2 * ROUNDOFF[dtype]
        )


@pytest.mark.parametrize("softcap", [1e-4, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_softcap_from_linear_to_saturated(softcap: float, size: float) -> None:
    q, k, v = tensors(m=16, n=16)
    assert_exact(attention, q * size, k, v, scale=1.0, softcap=softcap)


def test_tf32_rounds_operands() -> None:
    q, k, v = tensors(m=16, n=40)
    want = exact(q, k, v, scale=0.25, matmul_roundoff=2.0**-11)
    o = attention(q, k, v, scale=0.25, input_precision="tf32")
    assert ((o.double() - want.o).abs() <= want.o_error).all()
    ieee = exact(q, k, v, scale=0.25)
    assert ((o.double() - ieee.o).abs() > ieee.o_error).any(), (
        "tf32 operands should be visible at float32's tolerance"
    )


def test_runs_agree_bit_for_bit() -> None:
    q, k, v = tensors(torch.float16, m=80, n=150)
    first = attention(q, k, v, scale=0.25, causal=True)
    assert torch.equal(attention(q, k, v, scale=0.25, causal=True), first)


def test_contract() -> None:
    contract = contract_of(attention)
    assert contract is not None
    assert contract.family == "softmax"
    assert contract.unseen_nonfinite == "isolated"
    split = contract_of(attention_split)
    assert split is not None
    assert set(contract.options) - set(split.options) == {"cu_seqlens"}
