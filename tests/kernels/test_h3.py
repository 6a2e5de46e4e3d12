"""H3 against its recurrence in float64, its two forms, and the linear attention that it contains.

Every output and gradient is a sum of monomials in all inputs; rounding is measured against the same
recurrence on absolute values. A monomial has at most n powers of a decay, each product off by √5 u at most
where it is complex (Brent, Percival and Zimmermann 2007), and passes through sums over the batch, positions,
taps, key, value and state channels; the result is rounded to its dtype.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnproof.kernels import h3, linear
from attnproof.kernels.arguments import ContractError
from attnproof.properties.contract import contract_of

pytestmark = pytest.mark.usefixtures("emulated")

U = 2.0**-24
ROUNDOFF = {torch.float32: U, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUBNORMAL = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
SMALLEST = 2.0**-126
FORMS = ("attention", "composed")


class Inputs(NamedTuple):
    """One call."""

    q: Tensor
    k: Tensor
    v: Tensor
    taps: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d_shift: Tensor
    d_diag: Tensor


def inputs(
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 2,
    h: int = 2,
    n: int = 40,
    d: int = 3,
    e: int = 2,
    taps: int = 4,
    r: int = 3,
    pairs: bool = True,
) -> Inputs:
    size = torch.rand(h, r) ** 0.2
    size.view(-1)[:3] = torch.tensor([0.0, 1.0, 1e-30])[: h * r]
    angle = 2 * math.pi * torch.rand(h, r)
    a = torch.stack((size * angle.cos(), size * angle.sin()), -1) if pairs else size
    shapes = [(b, h, n, d), (b, h, n, d), (b, h, n, e), (h, d, taps)]
    weights = [torch.randn(a.shape) for _ in range(2)]
    tensors = [*map(torch.randn, shapes), a, *weights, torch.randn(h, d), torch.randn(h)]
    return Inputs(*(x.to(dtype) for x in tensors))


def naive(given: Inputs) -> Tensor:
    q, k, v, taps, a, b, c, d_shift, d_diag = given
    if a.ndim == 3:
        a, b, c = (torch.view_as_complex(x.contiguous()) for x in (a, b, c))
    batch, heads, length, width = q.shape
    state = torch.zeros(batch, heads, width, v.shape[3], a.shape[1], dtype=a.dtype)
    rows = []
    for t in range(length):
        key = d_shift * k[:, :, t]
        for i in range(min(taps.shape[2], t + 1)):
            key = key + taps[:, :, i] * k[:, :, t - i]
        outer = key[..., None] * v[:, :, t, None, :]
        state = a[:, None, None] * state + b[:, None, None] * outer[..., None]
        read = (c[:, None, None] * state).sum(-1)
        read = (read.real if read.is_complex() else read) + d_diag[:, None, None] * outer
        rows.append((q[:, :, t, :, None] * read).sum(2))
    return torch.stack(rows, 2)


def results(call: Any, given: Inputs, do: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    o = call(Inputs(*leaves))
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def called(form: str, given: Inputs, do: Tensor) -> list[Tensor]:
    return results(lambda x: getattr(h3, form)(*x), given, do)


def assert_exact(form: str, given: Inputs, do: Tensor | None = None) -> list[Tensor]:
    do = torch.randn(given.v.shape).to(given.q.dtype) if do is None else do
    got = called(form, given, do)
    want = results(naive, Inputs(*(x.double() for x in given)), do.double())
    pairs = given.a.ndim == 3
    sizes = Inputs(*(
        x.double().norm(dim=-1) if pairs and name in "abc" else x.double().abs()
        for name, x in zip(Inputs._fields, given, strict=True)
    ))  # fmt: skip
    total = results(naive, sizes, do.double().abs())
    batch, _, n, d = given.q.shape
    widths = d + given.v.shape[3] + given.taps.shape[2] + given.a.shape[1]
    relative = (math.sqrt(5) + 2) * (n + 4) + batch * n + widths
    for name, x, value, terms in zip(("o", *Inputs._fields), got, want, total, strict=True):
        assert x.shape == value.shape, name
        assert x.dtype == given.q.dtype, name
        assert x.isfinite().all(), f"{name} is not finite"
        error = relative * U * terms + SMALLEST * (n + widths)
        error = error[..., None] if value.ndim > terms.ndim else error
        error = error + ROUNDOFF[x.dtype] * (value.abs() + error) + SUBNORMAL[x.dtype] / 2
        worst = ((x.double() - value).abs() / error).max().item()
        assert worst <= 1, f"{form}: {name} is off by {worst:.3g} times what rounding allows"
    return got


@pytest.mark.parametrize(
    ("form", "dtype", "sizes"),
    [
        ("attention", torch.float32, {"n": 70}),
        ("attention", torch.float32, {"n": 40, "d": 36, "e": 34, "pairs": False}),
        ("attention", torch.bfloat16, {"n": 33, "d": 1, "e": 1}),
        ("attention", torch.float16, {"n": 3, "b": 1, "taps": 5}),
        ("composed", torch.float32, {"n": 40}),
        ("composed", torch.bfloat16, {"n": 20, "d": 1, "e": 1, "taps": 1}),
    ],
    ids=str,
)
def test_forms(form: str, dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    assert_exact(form, inputs(dtype, **sizes))


@pytest.mark.parametrize("form", FORMS)
def test_unnormalised_linear_attention(form: str) -> None:
    """A shift that is the identity and a diagonal that accumulates: theory H3-1."""
    given = inputs(n=40, taps=1, r=1, pairs=False)
    one = torch.ones(2, 1)
    o = getattr(h3, form)(*given[:3], torch.ones(2, 3, 1), one, one, one)
    want = linear.attention(*given[:3], feature_map="identity", normalize=False)
    q, k, v = (x.double().abs() for x in given[:3])
    terms = torch.tril(q @ k.mT) @ v
    assert ((o - want).abs() <= 2 * U * (40 + 3 + 2) * terms).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("b", "n"), [(0, 5), (2, 0)])
def test_empty(form: str, b: int, n: int) -> None:
    given = inputs(b=b, n=n)
    o, *gradients = called(form, given, torch.zeros(b, 2, n, 2))
    assert o.shape == (b, 2, n, 2)
    assert not any(x.any() for x in gradients)


def test_layouts() -> None:
    """Tensors turned in memory, and a cotangent with strides of 0."""
    given = inputs(n=37)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in given[:8]]
    assert_exact("attention", Inputs(*turned, given.d_diag), torch.randn(1, 2, 1, 2).expand(2, 2, 37, 2))


@pytest.mark.parametrize("form", FORMS)
def test_without_skips(form: str) -> None:
    given = inputs(n=20)
    bare = getattr(h3, form)(*given[:7])
    zeros = given._replace(d_shift=given.d_shift * 0, d_diag=given.d_diag * 0)
    assert torch.equal(bare, getattr(h3, form)(*zeros))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "bad"), [("q", math.nan), ("k", math.inf), ("v", math.nan)])
def test_values_that_a_row_does_not_see(form: str, name: str, bad: float) -> None:
    given = inputs(n=40)
    clean = getattr(h3, form)(*given)
    getattr(given, name)[1, 1, 20, 1] = bad
    o = getattr(h3, form)(*given)
    assert torch.equal(o[0], clean[0])
    assert torch.equal(o[1, 0], clean[1, 0])
    assert torch.equal(o[1, 1, :20], clean[1, 1, :20])
    assert not o[1, 1, 20].isfinite().all()
    if name == "q":
        assert torch.equal(o[1, 1, 21:], clean[1, 1, 21:])


def test_runs_agree() -> None:
    given, do = inputs(torch.bfloat16, n=33), torch.randn(2, 2, 33, 2).bfloat16()
    first, second = (called("attention", given, do) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 2, 40)}, "q has shape .*expected 4 axes"),
        ({"k": torch.zeros(2, 1, 40, 3)}, r"k has shape .*expected \(2, 2, 40, 3\)"),
        ({"v": torch.zeros(2, 2, 41, 2)}, r"v has shape .*expected \(2, 2, 40, 2\)"),
        ({"taps": torch.zeros(2, 2, 4)}, r"taps has shape .*expected \(2, 3, 4\)"),
        ({"a": torch.zeros(2, 3)}, r"b has shape .*expected \(2, 3\)"),
        ({"d_shift": torch.zeros(2)}, r"d_shift has shape .*expected \(2, 3\)"),
        ({"d_diag": torch.zeros(2).half()}, "d_diag is torch.float16 while"),
    ],
)
def test_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        h3.attention(*inputs()._replace(**change))


def test_declared() -> None:
    for form in FORMS:
        contract = contract_of(getattr(h3, form))
        assert contract is not None
        assert (contract.family, contract.options) == ("h3", ())
