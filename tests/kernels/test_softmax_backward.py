"""Gradients of softmax attention against torch's autograd through its formula in float64.

The tolerance of each element follows from where the kernels round (`tolerances`), in first order and with
every rounding at its worst; certified gradients are the suite's work.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.emulator import emulate
from attnproof.kernels import softmax
from attnproof.kernels.softmax_gradients import Saved, gradients
from attnproof.properties.contract import ContractError, contract_of

pytestmark = pytest.mark.usefixtures("emulated")

attention: Any = softmax.attention
attention_atomic: Any = softmax.attention_atomic

U32 = 2.0**-24
ROUNDOFF = {torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
DTYPES = list(ROUNDOFF)
SMALL_TILES = {"block_m": 16, "block_n": 16}
TENSORS = ("q", "k", "v", "bias", "sinks")


def seen_keys(queries: int, keys: int, options: dict[str, Any]) -> Tensor:
    """Which of N keys each of M queries sees, by masks and by the cuts of a packed row; (M, N)."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    p = i + keys - queries
    left, right = options.get("window") or (None, None)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if options.get("causal"):
        seen &= j <= (i if options.get("causal_alignment") == "top-left" else p)
    if left is not None:
        seen &= j >= p - left
    if right is not None:
        seen &= j <= p + right
    if "cu_seqlens" in options:
        starts = options["cu_seqlens"][1:].contiguous()
        seen &= torch.bucketize(i, starts, right=True) == torch.bucketize(j, starts, right=True)
    return seen


class Formula:
    """Attention in float64, step by step, of tensors that may require gradients."""

    def __init__(self, x: dict[str, Tensor], options: dict[str, Any]) -> None:
        self.x, self.scale, self.cap = x, options["scale"], options.get("softcap")
        self.group = x["q"].shape[1] // x["k"].shape[1]
        q, (k, v) = x["q"], (x[name].repeat_interleave(self.group, 1) for name in "kv")
        self.q, self.k, self.v = q, k, v
        m, n = q.shape[2], k.shape[2]
        raw = self.scale * q @ k.mT
        s = raw if self.cap is None else self.cap * torch.tanh(raw / self.cap)
        self.slope = torch.ones_like(s) if self.cap is None else 1 - torch.tanh(raw / self.cap) ** 2
        self.size = abs(self.scale) * q.abs() @ k.abs().mT
        if "alibi_slopes" in options:
            away = (torch.arange(m)[:, None] + n - m - torch.arange(n)).abs()
            alibi = options["alibi_slopes"].double()[:, None, None] * away
            s, self.size = s - alibi, self.size + alibi.abs()
        seen = seen_keys(m, n, options).expand(s.shape)
        if "bias" in x:
            seen = seen & (x["bias"] != -math.inf)
            s, self.size = s + x["bias"], self.size + x["bias"].abs()
        s, self.size = s.masked_fill(~seen, -math.inf), self.size.masked_fill(~seen, 0.0)
        sink = x["sinks"][None, :, None, None].expand(*s.shape[:3], 1) if "sinks" in x else s[..., :0]
        logits = torch.cat([s, sink], -1)
        self.empty = (logits == -math.inf).all(-1)
        top = logits.detach().amax(-1) if logits.shape[-1] else torch.zeros(s.shape[:3], dtype=s.dtype)
        top = torch.where(self.empty, 0.0, top)
        e = torch.exp(logits - top[..., None])
        total = torch.where(self.empty, 1.0, e.sum(-1))
        self.p, self.p_sink = (e / total[..., None]).split([n, sink.shape[-1]], -1)
        self.o, self.lse = self.p @ v, top + total.log()


def tolerances(f: Formula, do: Tensor, dlse: Tensor, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """How far each gradient of a kernel that rounds as ours do may be from the exact one.

    u = 2⁻²⁴; a sum of n terms errs by (n + 2)·u times the sum of their sizes; matmul operands of half
    precision are rounded to it.
    """
    dtype = dtypes["q"]
    half = 0.0 if dtype == torch.float32 else ROUNDOFF[dtype]
    (m, d), (n, e) = f.q.shape[2:], f.v.shape[2:]
    rows = m * f.group
    do, dlse = do.double(), torch.where(f.empty, 0.0, dlse.double())
    p, p_sink, v, slope = (x.detach() for x in (f.p, f.p_sink, f.v, f.slope))
    # a score: D products and at most 10 more roundings (scale, cap, ALiBi, bias, log₂ e, the exponent)
    score = (d + 12) * U32 * f.size.detach()
    row = score.amax(-1, keepdim=True) if n else torch.zeros(*f.q.shape[:3], 1, dtype=torch.float64)
    if "sinks" in f.x:
        row = row + 4 * U32 * f.x["sinks"].detach().abs().nan_to_num(posinf=0.0)[:, None, None]
    # a weight, relative: its own score and that of the maximum, the normaliser's sum, exp2 and 1/Σ
    weight = torch.expm1(2 * row + 2 * (n + 8) * U32)
    o = torch.expm1(2 * row + 2 * (n + 8) * U32 + half) * (p @ v.abs()) + ROUNDOFF[dtype] * f.o.detach().abs()
    o = o + SMALLEST[dtype]
    delta = ((f.o.detach() * do).sum(-1) - dlse)[..., None]
    sizes = ((f.o.detach() * do).abs().sum(-1) + dlse.abs())[..., None]
    delta_error = (o * do.abs()).sum(-1, keepdim=True) + (e + 4) * U32 * sizes
    dp, dp_error = do @ v.mT, (e + 2) * U32 * do.abs() @ v.abs().mT
    ds = p * (dp - delta)
    ds_error = (weight + 4 * U32) * ds.abs() + p * (1 + weight) * (dp_error + delta_error)
    # d log(1 − tanh² x) is at most 2 dx; then the storage of dS, of which float16 loses 2⁻³⁸ of the largest
    # (and 2⁻⁵² is what 1 − tanh² x loses in float64, in autograd as here)
    cap_error = 0.0 if f.cap is None else slope * (torch.expm1(2 * score / f.cap) + 8 * U32) + 2.0**-52
    product, product_error = ds * slope, ds_error * slope + ds.abs() * cap_error
    product_error = product_error + half * (product.abs() + product_error)
    if dtype == torch.float16 and ds.numel():
        product_error = product_error + 2.0**-38 * ds.abs().max() * (p > 0)
    k, q = f.k.detach().abs(), f.q.detach().abs()
    scale = abs(f.scale)

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, f.group)).sum(2)

    errors = {
        "q": scale * (product_error + (n + 4) * U32 * product.abs()) @ k,
        "k": grouped(scale * (product_error + (rows + 4) * U32 * product.abs()).mT @ q),
        "v": grouped((p * (weight + half + (rows + 4) * U32) + 2.0**-40 * (p > 0)).mT @ do.abs()),
    }
    if "bias" in f.x:
        shape = f.x["bias"].shape
        count = ds.numel() / max(1, f.x["bias"].numel())
        errors["bias"] = (ds_error + (count + 2) * U32 * ds.abs()).sum_to_size(shape)
    if "sinks" in f.x:
        terms = p_sink * ((weight + 8 * U32) * delta.abs() + (1 + weight) * delta_error)
        terms = terms + (f.q.shape[0] * m + 2) * U32 * p_sink * delta.abs()
        errors["sinks"] = terms.sum((0, 2, 3))
    # the rounding of the result, and its subnormals
    return {
        name: error + ROUNDOFF[dtypes[name]] * (f.x[name].grad.abs() + error) + SMALLEST[dtypes[name]]
        for name, error in errors.items()
    }


def kernel_gradients(
    entry: Any, x: dict[str, Tensor], options: dict[str, Any], do: Tensor | None, dlse: Tensor | None
) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in x.items()}
    o, lse = entry(**leaves, **options, return_lse=True)
    outputs = [(y, dy) for y, dy in ((o, do), (lse, dlse)) if dy is not None]
    found = torch.autograd.grad([y for y, _ in outputs], list(leaves.values()), [dy for _, dy in outputs])
    return dict(zip(leaves, found, strict=True))


def assert_exact(
    x: dict[str, Tensor],
    options: dict[str, Any],
    do: Tensor | None = None,
    dlse: Tensor | None = None,
    entry: Any = attention,
) -> dict[str, Tensor]:
    """The kernel's gradients, after comparing each element with its tolerance."""
    q, v = x["q"], x["v"]
    if do is None and dlse is None:
        do, dlse = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype), torch.randn(q.shape[:3])
    f = Formula({name: value.detach().double().requires_grad_() for name, value in x.items()}, options)
    zero_o, zero_lse = torch.zeros_like(f.o), torch.zeros_like(f.lse)
    do64, dlse64 = zero_o if do is None else do.double(), zero_lse if dlse is None else dlse.double()
    loss = (f.o * do64).sum() + torch.where(f.empty, 0.0, f.lse * dlse64.nan_to_num()).sum()
    loss.backward()
    wide = tolerances(f, do64, dlse64, {name: value.dtype for name, value in x.items()})
    found = kernel_gradients(entry, x, options, do, dlse)
    for name, got in found.items():
        assert got.shape == x[name].shape
        assert got.dtype == x[name].dtype
        if not got.numel():
            continue
        ratio = ((got.double() - f.x[name].grad).abs() / wide[name]).max().item()
        assert ratio <= 1, f"the gradient in {name} is off by {ratio:.3g} times the tolerance"
    return found


def tensors(
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 2,
    h: int = 4,
    g: int = 2,
    m: int = 37,
    n: int = 53,
    d: int = 16,
    e: int = 24,
) -> dict[str, Tensor]:
    shapes = {"q": (b, h, m, d), "k": (b, g, n, d), "v": (b, g, n, e)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def split_up(options: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Differentiable arguments in ``dtype``, and the others."""
    made = {name: value() if callable(value) else value for name, value in options.items()}
    return (
        {name: x.to(dtype) for name, x in made.items() if name in TENSORS},
        {name: x for name, x in made.items() if name not in TENSORS},
    )


def masking_bias() -> Tensor:
    return torch.randn(4, 37, 53).masked_fill(torch.rand(4, 37, 53) < 0.3, -math.inf)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal top-left": {"causal": True, "causal_alignment": "top-left"},
    "window": {"window": (7, 3)},
    "causal window": {"causal": True, "window": (18, None)},
    "window to the right": {"window": (None, 2)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": lambda: torch.tensor([0.3, -2.0, 5.0, -math.inf])},
    "bias": {"bias": lambda: torch.randn(37, 53)},
    "bias with -inf": {"bias": masking_bias},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.0, 0.01]), "causal": True},
    "everything": {
        "causal": True,
        "window": (30, 2),
        "softcap": 2.0,
        "sinks": lambda: torch.tensor([0.3, -2.0, 5.0, 0.0]),
        "bias": lambda: torch.randn(53),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.0, 0.01]),
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str, dtype: torch.dtype) -> None:
    more, options = split_up(OPTIONS[name], dtype)
    assert_exact(tensors(dtype) | more, {"scale": 0.3, **options, **SMALL_TILES})


@pytest.mark.parametrize("name", ["causal", "softcap", "everything"])
def test_atomic(name: str) -> None:
    for dtype in (torch.float32, torch.float16):
        more, options = split_up(OPTIONS[name], dtype)
        assert_exact(tensors(dtype) | more, {"scale": 0.3, **options, **SMALL_TILES}, entry=attention_atomic)


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 37), (1, 53))), ids=str)
def test_every_broadcast_of_the_bias(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape)
    assert_exact(tensors() | {"bias": bias}, {"scale": 0.3, "window": (9, 20), **SMALL_TILES})


@pytest.mark.parametrize("shape", [(), (53,), (37, 1), (4, 1, 53), (2, 1, 37, 53)], ids=str)
def test_a_float32_bias_beside_half_precision(shape: tuple[int, ...]) -> None:
    assert_exact(tensors(torch.bfloat16) | {"bias": torch.randn(shape)}, {"scale": 0.3})


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("m", [0, 1, 16, 17, 33])
def test_sizes_around_a_tile(m: int, n: int) -> None:
    x = tensors(b=1, h=2, m=m, n=n) | {"sinks": torch.randn(2)}
    alignment = "top-left" if (m + n) % 2 else "bottom-right"
    assert_exact(x, {"scale": 0.3, "causal": True, "causal_alignment": alignment, **SMALL_TILES})


@pytest.mark.parametrize("size", [1, 31, 32, 33, 65])
def test_sizes_around_the_default_tile(size: int) -> None:
    assert_exact(tensors(torch.float16, m=3, n=size), {"scale": 0.25})
    assert_exact(tensors(torch.float16, m=size, n=5), {"scale": 0.25})
    assert_exact(tensors(torch.float16, b=0, m=size, n=5), {"scale": 0.25})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (5, 40), (72, 64), (192, 128), (256, 3)])
def test_widths(d: int, e: int, dtype: torch.dtype) -> None:
    assert_exact(tensors(dtype, b=1, h=2, m=17, n=35, d=d, e=e), {"scale": d**-0.5, "causal": True})


@pytest.mark.parametrize(("h", "g"), [(3, 3), (4, 1), (14, 2)])
def test_grouped_heads(h: int, g: int) -> None:
    assert_exact(tensors(h=h, g=g, m=5, n=19), {"scale": 0.25, "causal": True})


def test_layouts_of_inputs_and_cotangents() -> None:
    b, h, m, n, d = 2, 4, 20, 33, 16
    fused = torch.randn(b, n, h, 3 * d)
    x = dict(zip("qkv", (y.transpose(1, 2) for y in torch.split(fused, d, -1)), strict=True))
    assert_exact(x, {"scale": 0.25})
    x = {name: torch.randn(b, h, d, length).mT for name, length in (("q", m), ("k", n), ("v", n))}
    lse = torch.randn(1, 1, m).expand(b, h, m)
    for do in (
        torch.ones(1).expand(b, h, m, d),
        torch.randn(d, m, h, b).permute(3, 2, 1, 0),
        torch.randn(b, 1, m, d).expand(b, h, m, d),
        torch.randn(b, h, 2 * m, 2 * d)[:, :, ::2, 1::2],
    ):
        assert_exact(x, {"scale": 0.25}, do, lse)
    assert_exact(x, {"scale": 0.25}, dlse=torch.randn(m, h, b).permute(2, 1, 0))
    assert_exact(x, {"scale": 0.25}, do=torch.randn(b, h, m, d))
    x = {
        "q": x["q"],
        "k": torch.randn(1, 1, n, d).expand(b, h, n, d),
        "v": torch.randn(n, d).expand(b, h, n, d),
    }
    assert_exact(x | {"bias": torch.randn(1, 1, 1, n).expand(b, h, m, n)}, {"scale": 0.25})


def test_memory_beyond_the_end_does_not_leak() -> None:
    """Inputs and cotangents are views into tensors of NaN (bugs B01, B02, B09, B13)."""
    for n, dtype in itertools.product((1, 31, 33), (torch.float32, torch.float16)):
        whole = [torch.full((1, 2, 70, 32), math.nan, dtype=dtype) for _ in range(4)]
        views = [
            x[:, :, :length, :width]
            for x, length, width in zip(whole, (5, n, n, 5), (20, 20, 24, 24), strict=True)
        ]
        for view in views:
            view.normal_()
        x = dict(zip("qkv", views, strict=False))
        assert_exact(x, {"scale": 0.25}, views[3], torch.randn(1, 2, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_have_no_gradient(dtype: torch.dtype) -> None:
    """Whatever their cotangents are, that of a log-sum-exp of −inf included (B08, B24)."""
    x = tensors(dtype, m=20, n=7)
    dlse = torch.randn(2, 4, 20)
    dlse[:, :, :13] = math.nan
    do = torch.randn(2, 4, 20, 24).to(dtype)
    found = assert_exact(x, {"scale": 0.25, "causal": True}, do, dlse)
    assert not found["q"][:, :, :13].any()
    bias = torch.zeros(20, 7, dtype=dtype)
    bias[3] = -math.inf
    found = assert_exact(x | {"bias": bias}, {"scale": 0.25}, do, torch.randn(2, 4, 20))
    assert not found["q"][:, :, 3].any()
    assert not found["bias"][3].any()


def test_unseen_keys_have_no_gradient() -> None:
    x = tensors(m=20, n=40)
    found = assert_exact(x, {"scale": 0.25, "causal": True, "causal_alignment": "top-left"})
    assert not found["k"][:, :, 20:].any()
    assert not found["v"][:, :, 20:].any()
    assert found["v"][:, :, 19].all()


def test_inputs_and_cotangents_stay() -> None:
    x = tensors() | {"bias": torch.randn(37, 53), "sinks": torch.randn(4)}
    do, dlse = torch.randn(2, 4, 37, 24), torch.randn(2, 4, 37)
    before = [y.clone() for y in (*x.values(), do, dlse)]
    kernel_gradients(attention, x, {"scale": 0.25}, do, dlse)
    assert all(torch.equal(y, z) for y, z in zip((*x.values(), do, dlse), before, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (2, 1), "alibi_slopes": torch.tensor([0.5, 0.1])}, {"softcap": 2.0}],
    ids=str,
)
def test_packed_sequences(options: dict[str, Any]) -> None:
    """Sequences without positions among them; a bias keeps the packed positions, in every broadcast."""
    cuts = torch.tensor([0, 0, 17, 18, 18, 50, 50], dtype=torch.int32)
    x = tensors(b=1, h=2, g=1, m=50, n=50) | {"sinks": torch.randn(2)}
    given = {"scale": 0.25, "cu_seqlens": cuts, **options, **SMALL_TILES}
    assert_exact(x, given)
    shapes = [(50, 50), (2, 50, 50), (50,), (2, 1, 50), (50, 1), (1,), (2, 1, 1)]
    for shape in shapes[1:] if not options else shapes[:1]:
        assert_exact(x | {"bias": torch.randn(shape)}, given)
    found = assert_exact(x, given, entry=attention_atomic)
    assert found["q"].any()


def test_packed_sequences_do_not_see_each_other() -> None:
    x = tensors(b=1, h=2, g=1, m=50, n=50)
    options = {"scale": 0.25, "cu_seqlens": torch.tensor([0, 20, 50], dtype=torch.int32)}
    do = torch.randn(1, 2, 50, 24)
    clean = kernel_gradients(attention, x, options, do, None)
    for y in x.values():
        y[:, :, 20:] = math.nan
    do[:, :, 20:] = math.inf
    found = kernel_gradients(attention, x, options, do, None)
    assert all(torch.equal(found[name][:, :, :20], clean[name][:, :, :20]) for name in "qkv")


def test_scores_of_1e10() -> None:
    """Products summed in another order may exceed the stored maximum (B07)."""
    y = torch.full((1, 1, 3, 64), 133120.0, dtype=torch.bfloat16)
    found = kernel_gradients(
        attention, {"q": y, "k": y, "v": y}, {"scale": 0.125}, torch.ones_like(y), torch.ones(1, 1, 3)
    )
    assert torch.equal(found["v"], torch.ones_like(y))
    assert all(x.isfinite().all() for x in found.values())


def test_a_score_above_the_stored_maximum_has_weight_1_at_most() -> None:
    """As on hardware that sums a product in another order backward than forward."""
    y = torch.full((1, 1, 3, 64), 133120.0, dtype=torch.bfloat16)
    score = 0.125 * 64 * 133120.0**2 * math.log2(math.e)
    rows = torch.full((1, 1, 3), score * (1 - 2**-22)), torch.full((1, 1, 3), 1 / 3)
    saved = Saved(y, y, y, None, None, None, None, y, *rows)
    do = torch.ones_like(y)
    dq, dk, dv, _, _ = gradients(saved, softmax.Call(0.125), 3, do, None, (True, True, True, False, False))
    for found in (dq, dk, dv):
        assert found is not None
        assert found.isfinite().all()
    assert torch.equal(dv, do)


def test_a_shift_of_the_scores_costs_nothing() -> None:
    """2²⁰ more in every score, exactly: a stored log-sum-exp would lose 2²⁰·2⁻²⁴ = 6 % of P (LSE-7)."""
    x = tensors(b=1, h=2, m=16, n=40)
    for name in "qk":
        x[name] = torch.randint(-3, 4, x[name].shape).float()
    x["q"][..., 0], x["k"][..., 0] = 1.0, 0.0
    x["bias"] = torch.zeros(40)  # scores are kept as they are, not in bits
    do, dlse = torch.randn(1, 2, 16, 24), torch.zeros(1, 2, 16)
    here = assert_exact(x, {"scale": 1.0}, do, dlse)
    x["k"][..., 0] = 2.0**20
    there = kernel_gradients(attention, x, {"scale": 1.0}, do, dlse)
    assert torch.equal(here["v"], there["v"])
    assert torch.equal(here["bias"], there["bias"])


def test_float16_does_not_overflow_in_between() -> None:
    """dS beyond 65504, where the gradients are numbers of float16."""
    sizes = {"q": 0.01, "k": 0.01, "v": 3000.0}
    x = {name: (y.float() * sizes[name]).half() for name, y in tensors(torch.float16).items()}
    do = (torch.randn(2, 4, 37, 24) * 300).half()
    dp = do.float() @ x["v"].float().repeat_interleave(2, 1).mT
    assert dp.abs().max() / 53 > 65504
    found = assert_exact(x, {"scale": 1.0}, do, torch.zeros(2, 4, 37))
    assert all(y.isfinite().all() for y in found.values())


def test_float16_does_not_underflow_in_between() -> None:
    """dS of about one quantum of float16's subnormals, and weights of 2⁻²⁰."""
    sizes = {"q": 0.01, "k": 100.0, "v": 1.0}
    x = {name: (y.float() * sizes[name]).half() for name, y in tensors(torch.float16).items()}
    do = (torch.randn(2, 4, 37, 24) * 1e-6).half()
    assert_exact(x, {"scale": 1.0}, do, torch.zeros(2, 4, 37))
    bias = torch.zeros(53, dtype=torch.float16)
    bias[::2] = -14.0
    do = (torch.rand(2, 4, 37, 24) * 1000).half()
    assert_exact(tensors(torch.float16) | {"bias": bias}, {"scale": 0.1}, do, torch.zeros(2, 4, 37))


def test_parts_of_the_bias_are_added_in_float32() -> None:
    """All weights are equal and the cotangents add up to nothing: what is left is the error of the sum."""
    x = tensors(torch.bfloat16, n=5) | {"bias": torch.zeros(5, dtype=torch.bfloat16)}
    x["q"].zero_()
    dlse = torch.randn(2, 4, 37)
    assert_exact(x, {"scale": 0.3, **SMALL_TILES}, dlse=dlse - dlse.mean())


def test_the_slope_of_a_saturated_cap_does_not_cancel() -> None:
    """1 − tanh² of 6 to 12 is 2e-5 to 2e-10, and every term of dQ and dK has it."""
    x = tensors(b=1, h=1, g=1, m=16, n=16, d=1, e=4)
    x["q"] = 2 + torch.rand(1, 1, 16, 1)
    x["k"] = (3 + torch.rand(1, 1, 16, 1)) * x["k"].sign()
    assert_exact(x, {"scale": 1.0, "softcap": 1.0})


@pytest.mark.parametrize("softcap", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_softcap_from_linear_to_saturated(softcap: float, size: float) -> None:
    x = tensors(b=1, h=2, m=16, n=16)
    x["q"] *= size
    assert_exact(x, {"scale": 1.0, "softcap": softcap})


def test_tf32() -> None:
    x = tensors()
    do, dlse = torch.randn(2, 4, 37, 24), torch.randn(2, 4, 37)
    ieee = kernel_gradients(attention, x, {"scale": 0.25}, do, dlse)
    tf32 = kernel_gradients(attention, x, {"scale": 0.25, "input_precision": "tf32"}, do, dlse)
    for name in "qkv":
        off = (tf32[name] - ieee[name]).abs().max() / ieee[name].abs().max()
        assert 2.0**-16 < off < 2.0**-7


def test_runs_agree_bit_for_bit() -> None:
    x = tensors(torch.float16) | {"bias": torch.randn(53), "sinks": torch.randn(4)}
    do, dlse = torch.randn(2, 4, 37, 24).half(), torch.randn(2, 4, 37)
    first, second = (kernel_gradients(attention, x, {"scale": 0.25}, do, dlse) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in x)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks"])
@pytest.mark.parametrize("entry", [attention, attention_atomic])
def test_one_gradient_alone(entry: Any, name: str) -> None:
    x = tensors() | {"bias": torch.randn(37, 53), "sinks": torch.randn(4)}
    do = torch.randn(2, 4, 37, 24)
    everything = kernel_gradients(attention, x, {"scale": 0.25}, do, None)
    x[name].requires_grad_()
    (entry(**x, scale=0.25) * do).sum().backward()
    assert all((y.grad is None) == (other != name) for other, y in x.items())
    # the emulator adds atomically in the order of programs, which is not that of the loop
    assert torch.allclose(x[name].grad, everything[name], rtol=1e-4, atol=1e-5)


def test_in_a_model() -> None:
    """Nothing is attached where nothing asks for a gradient; gradients meet through other operations."""
    x = tensors(d=16, e=16)
    assert not attention(**x, scale=0.25).requires_grad
    weight = torch.randn(16, 16, requires_grad=True)
    with torch.no_grad():
        assert not attention(x["q"] @ weight, x["k"], x["v"], scale=0.25).requires_grad
    o, lse = attention(x["q"] @ weight, x["k"] @ weight, x["v"], scale=0.25, return_lse=True)
    ((o @ weight).sum() + lse.sum()).backward()
    f = Formula(
        {
            **{n: y.double() for n, y in x.items()},
            "q": (x["q"].double() @ (w := weight.detach().double().requires_grad_())),
            "k": x["k"].double() @ w,
        },
        {"scale": 0.25},
    )
    ((f.o @ w).sum() + f.lse.sum()).backward()
    assert torch.allclose(weight.grad.double(), w.grad, rtol=1e-3, atol=1e-3 * w.grad.abs().max().item())


def test_no_second_derivative() -> None:
    x = {name: y.requires_grad_() for name, y in tensors().items()}
    (dq,) = torch.autograd.grad(attention(**x, scale=0.25).square().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.emulator
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_every_target(target: str) -> None:
    with emulate(target):
        for dtype in DTYPES:
            assert_exact(tensors(dtype, b=1, m=9, n=20), {"scale": 0.25, "causal": True})


@pytest.mark.parametrize(
    ("slopes", "message"),
    [
        ([0.5], "alibi_slopes is list"),
        (torch.zeros(3), r"alibi_slopes is torch.float32 of shape \(3,\): expected float32, .* \(4,\)"),
        (torch.zeros(4).half(), "alibi_slopes is torch.float16"),
        (torch.zeros(4, device="meta"), "alibi_slopes is on meta"),
        (torch.zeros(4).requires_grad_(), "alibi_slopes requires a gradient, and gets none"),
    ],
)
def test_errors_of_alibi_slopes(slopes: Any, message: str) -> None:
    for entry in (attention, softmax.attention_split):
        with pytest.raises(ContractError, match=message):
            entry(**tensors(), scale=0.25, alibi_slopes=slopes)


def test_contracts() -> None:
    whole, atomic, split = (contract_of(e) for e in (attention, attention_atomic, softmax.attention_split))
    assert whole is not None
    assert atomic is not None
    assert split is not None
    assert whole.deterministic
    assert not atomic.deterministic
    assert split.differentiable is False
