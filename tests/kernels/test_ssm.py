"""Diagonal state spaces against their recurrence in float64: forms, decays, packing, discretisations.

Every output and gradient is a sum of monomials in u, a, b, c, d, dy and the states, so that rounding is
measured against the same recurrence on absolute values. A monomial has at most n + 1 powers of a; with
u = 2^-24 a complex product is off by √5 u at most (Brent, Percival and Zimmermann 2007), a sum by u for each
of its terms; the result by the unit roundoff of its dtype and half the smallest subnormal, and by float32's
subnormals for each term that goes below its normal numbers. A Fourier transform of size L adds to every
output alike: 8 u log₂L ‖K‖ ‖u‖ (theory S4-1).
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import mpmath
import pytest
import torch
from torch import Tensor

from attnproof.kernels import ssm
from attnproof.kernels.arguments import ContractError
from attnproof.kernels.ssm_convolution import responses
from attnproof.properties.contract import contract_of

pytestmark = pytest.mark.usefixtures("emulated")

U = 2.0**-24
ROUNDOFF = {torch.float32: U, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUBNORMAL = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
SMALLEST = 2.0**-126
FORMS = ("recurrent", "scan", "convolution", "fft")
NAMES = ("y", "state", "du", "da", "db", "dc", "dd", "dinitial")


class Inputs(NamedTuple):
    """One call, with cotangents of both outputs."""

    u: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    initial: Tensor
    dy: Tensor
    dend: Tensor
    ends: list[int] | None = None


def decays(h: int, d: int, *, pairs: bool) -> Tensor:
    """Decays of all angles, among them 0, 1 (pairs: −1), one near the angle π, and some that underflow."""
    size = torch.rand(h, d) ** 0.2
    size.view(-1)[:4] = torch.tensor([0.0, 1.0, 1.0, 1e-30])[: h * d]
    if not pairs:
        size.view(-1)[2:3] = 1e-41
        return size
    angle = 2 * math.pi * torch.rand(h, d)
    angle.view(-1)[1:3] = torch.tensor([math.pi, math.pi * (1 - 1e-3)])[: h * d - 1]
    return torch.stack((size * angle.cos(), size * angle.sin()), -1)


def inputs(
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 2,
    h: int = 2,
    n: int = 70,
    d: int = 5,
    pairs: bool = True,
    ends: list[int] | None = None,
) -> Inputs:
    a = decays(h, d, pairs=pairs).to(dtype)
    u, dy = torch.randn(2, b, h, n).to(dtype)
    initial, dend = torch.randn(2, b if ends is None else len(ends) - 1, *a.shape)
    weights = (torch.randn(a.shape).to(dtype) for _ in range(2))
    return Inputs(u, a, *weights, torch.randn(h).to(dtype), initial, dy, dend, ends)


def naive(given: Inputs) -> tuple[Tensor, Tensor]:
    u, a, b, c, d, initial = given[:6]
    if a.ndim == 3:
        a, b, c, initial = (torch.view_as_complex(x.contiguous()) for x in (a, b, c, initial))
    pieces = [(i, 0, u.shape[2]) for i in range(u.shape[0])]
    if given.ends is not None:
        pieces = [(0, start, stop) for start, stop in itertools.pairwise(given.ends)]
    rows: list[list[Tensor]] = [[] for _ in range(u.shape[0])]
    states = []
    for (i, start, stop), x in zip(pieces, initial, strict=True):
        for t in range(start, stop):
            x = a * x + b * u[i, :, t, None]
            read = (c * x).sum(-1)
            rows[i].append((read.real if read.is_complex() else read) + d * u[i, :, t])
        states.append(x)
    y = torch.stack([torch.stack(row, 1) for row in rows]) if u.numel() else u * d[:, None]
    end = torch.stack(states) if states else initial
    return y, torch.view_as_real(end) if end.is_complex() else end


def results(call: Any, given: Inputs) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given[:6]]
    outputs = call(Inputs(*leaves, *given[6:]))
    cotangents = (given.dy, given.dend)
    found = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
    return [*(x.detach() for x in outputs), *found]


def called(form: str, given: Inputs) -> list[Tensor]:
    packed = {}
    if given.ends is not None:
        packed["cu_seqlens"] = torch.tensor(given.ends, dtype=torch.int32)
    return results(
        lambda x: getattr(ssm, form)(*x[:5], initial_state=x.initial, return_state=True, **packed), given
    )


def sizes(given: Inputs) -> Inputs:
    """Absolute values in float64; pairs by their modulus."""
    pairs = given.a.ndim == 3

    def modulus(x: Tensor) -> Tensor:
        return x.double().norm(dim=-1) if pairs else x.double().abs()

    u, a, b, c, d, initial, dy, dend, ends = given
    return Inputs(
        u.double().abs(), modulus(a), modulus(b), modulus(c), d.double().abs(), modulus(initial),
        dy.double().abs(), modulus(dend), ends,
    )  # fmt: skip


def transform_errors(size: Inputs) -> list[Tensor]:
    """What Fourier transforms add to y, the state and all gradients, in units of u."""
    leaves = [x.detach().requires_grad_() for x in (size.a, size.b, size.c)]
    a, b, c = leaves
    n = size.u.shape[2]
    kernel = ((b * c)[..., None] * a[..., None] ** torch.arange(n)).sum(1)
    log = 8 * math.log2(4 * n)
    norm = kernel.detach().norm(dim=-1)[:, None]
    by_kernel = log * (size.dy.norm(dim=-1) * size.u.norm(dim=-1)).sum(0)
    da, db, dc = torch.autograd.grad(kernel, leaves, by_kernel[:, None].expand(kernel.shape))
    y, du = (log * norm * x.norm(dim=-1, keepdim=True) for x in (size.u, size.dy))
    none = torch.zeros(())
    return [y.expand(size.u.shape), none, du.expand(size.u.shape), da, db, dc, none, none]


def assert_exact(form: str, given: Inputs) -> list[Tensor]:
    got = called(form, given)
    wide = Inputs(*(x.double() for x in given[:8]), given.ends)
    want, size = results(naive, wide), sizes(given)
    total = results(naive, size)
    extra = transform_errors(size) if form == "fft" else [torch.zeros(())] * len(NAMES)
    batch, _, n = given.u.shape
    d = given.a.shape[1]
    relative = (math.sqrt(5) + 1) * (n + 4) + batch * n + d
    likes = [given.u, given.initial, *given[:6]]
    for name, x, value, terms, more, like in zip(NAMES, got, want, total, extra, likes, strict=True):
        assert x.dtype == like.dtype, name
        assert x.shape == value.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        pair = value.ndim > terms.ndim
        error = relative * U * terms + U * more + SMALLEST * (n + d)
        error = error[..., None] if pair else error
        error = error + ROUNDOFF[x.dtype] * (value.abs() + error) + SUBNORMAL[x.dtype] / 2
        worst = ((x.double() - value).abs() / error).max().item() if x.numel() else 0.0
        assert worst <= 1, f"{form}: {name} is off by {worst:.3g} times what rounding allows"
    return got


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "real"])
def test_forms(form: str, pairs: bool) -> None:
    assert_exact(form, inputs(n=70, d=5, pairs=pairs))


@pytest.mark.parametrize(
    ("form", "dtype", "n", "d", "pairs"),
    [
        ("scan", torch.bfloat16, 130, 20, True),
        ("scan", torch.float32, 64, 1, False),
        ("recurrent", torch.float16, 20, 33, True),
        ("convolution", torch.bfloat16, 65, 20, True),
        ("convolution", torch.float16, 1, 17, False),
        ("fft", torch.bfloat16, 33, 20, True),
    ],
    ids=str,
)
def test_sizes(form: str, dtype: torch.dtype, n: int, d: int, pairs: bool) -> None:
    assert_exact(form, inputs(dtype, n=n, d=d, pairs=pairs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("b", "n"), [(0, 5), (2, 0)])
def test_empty(form: str, b: int, n: int) -> None:
    given = inputs(b=b, n=n)
    got = called(form, given)
    want = results(naive, given)
    for name, x, value in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(x, value, msg=name)


@pytest.mark.parametrize("form", ["recurrent", "scan"])
@pytest.mark.parametrize("ends", [[0, 0, 17, 18, 18, 90], [0]], ids=str)
def test_packed_sequences(form: str, ends: list[int]) -> None:
    if ends == [0]:
        given = inputs(b=1, n=0, ends=ends)
        assert called(form, given)[1].shape == given.initial.shape
        return
    assert_exact(form, inputs(b=1, n=ends[-1], ends=ends))


@pytest.mark.parametrize("form", FORMS)
def test_layouts(form: str) -> None:
    """Tensors turned in memory, and cotangents with strides of 0."""
    given = inputs(n=37)
    turned = {name: getattr(given, name).transpose(0, 1).contiguous().transpose(0, 1) for name in "uabc"}
    given = given._replace(**turned, initial=given.initial.mT.contiguous().mT)
    given = given._replace(dy=torch.randn(1, 2, 1).expand(2, 2, 37), dend=torch.randn(()).expand(2, 2, 5, 2))
    assert_exact(form, given)


@pytest.mark.parametrize("form", FORMS)
def test_without_skip_and_states(form: str) -> None:
    given = inputs(n=40)
    y = getattr(ssm, form)(*given[:4])
    assert isinstance(y, Tensor)
    bare = given._replace(d=given.d * 0, initial=given.initial * 0)
    assert torch.equal(y, called(form, bare)[0])


@pytest.mark.parametrize("form", ["recurrent", "scan", "convolution"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_a_position_does_not_see(form: str, bad: float) -> None:
    given = inputs(n=70)
    clean, end = called(form, given)[:2]
    given.u[1, 1, 20] = bad
    y, state = called(form, given)[:2]
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[:, 0], clean[:, 0])
    assert torch.equal(y[1, 1, :20], clean[1, 1, :20])
    assert torch.equal(state[0], end[0])
    assert not y[1, 1, 20:].isfinite().any()


def test_decoding_is_the_recurrence() -> None:
    given = inputs(n=5)
    whole, end = called("recurrent", given)[:2]
    state, rows = given.initial, []
    for t in range(5):
        y, state = ssm.step(given.u[:, :, t], *given[1:5], state=state)
        rows.append(y)
    assert torch.equal(torch.stack(rows, 2), whole)
    assert torch.equal(state, end)


@pytest.mark.parametrize("form", ["scan", "convolution"])
def test_runs_agree(form: str) -> None:
    given = inputs(torch.bfloat16, n=70)
    copies = [x.clone() for x in given[:8]]
    first, second = (called(form, given) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(copies, given[:8], strict=True))


def on_the_circle(length: int) -> tuple[Tensor, Tensor]:
    """A decay of modulus close to 1, (1, 1, 2) float32, and its powers in float64."""
    a = torch.tensor([[[math.cos(0.7), math.sin(0.7)]]])
    steps = torch.arange(length, dtype=torch.float64)
    z = torch.view_as_complex(a[0, 0].double())
    turns = torch.remainder(steps * z.angle(), math.tau)
    powers = torch.polar(torch.exp(steps * torch.log(z.abs())), turns)
    return a, torch.view_as_real(powers)


def test_long_powers() -> None:
    """Powers are right to their last places: repeated squaring in float32 alone is off by thousands of u."""
    a, powers = on_the_circle(20000)
    one = torch.tensor([[[[1.0, 0.0]]]])
    got = responses(a, one, 20000)[0, 0].double()
    assert (got - powers[:, 0]).abs().max() <= 3 * U


def test_long_memory() -> None:
    """A state that crosses 64 blocks gathers what each rounding of it takes, not 64 times a power's error."""
    a, powers = on_the_circle(4096)
    one = torch.tensor([[[1.0, 0.0]]])
    y = ssm.scan(torch.zeros(1, 1, 4095), a, one, one, initial_state=one[None])
    assert isinstance(y, Tensor)
    # a block takes four roundings of products and four of sums, of numbers below 1: with a deviation of
    # u/√12 each, less than u altogether; 64 blocks √64 u, of which a maximum lies within five deviations
    assert (y[0, 0].double() - powers[1:, 0]).abs().max() <= 5 * 8 * U


def continuous(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    sizes = torch.tensor([0.0, 1e-30, 1e-9, 1e-4, 0.3, 0.499, 0.501, 1.7, 30.0, 200.0])
    angles = torch.tensor([math.pi, 2.0, 1.6])
    A = (sizes[:, None] * torch.polar(torch.ones(3), angles)).reshape(1, -1)
    A = torch.view_as_real(A).contiguous().to(dtype)
    return A, torch.randn_like(A), torch.tensor([0.7])


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "real"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_discretisations(rule: str, pairs: bool, dtype: torch.dtype) -> None:
    A, B, delta = continuous(dtype)
    if not pairs:
        A, B = A[..., 0].contiguous(), B[..., 0].contiguous()
    a, b = getattr(ssm, f"discretize_{rule}")(A, B, delta)
    assert a.dtype == b.dtype == dtype
    u = U if dtype == torch.float32 else 2.0**-53
    with mpmath.workdps(50):
        step = mpmath.mpf(delta.item())
        for s in range(A.shape[1]):
            x, w = (mpmath.mpc(*y[0, s].tolist()) if pairs else mpmath.mpf(y[0, s].item()) for y in (A, B))
            z = step * x
            if rule == "zoh":
                want = mpmath.exp(z), w * (mpmath.expm1(z) / x if x else step)
            else:
                want = (1 + z / 2) / (1 - z / 2), w * step / (1 - z / 2)
            got = [mpmath.mpc(*y[0, s].tolist()) if pairs else mpmath.mpf(y[0, s].item()) for y in (a, b)]
            # of a float64 calculation: the argument's rounding, and some operations on each side of it
            allowed = (1 if dtype == torch.float32 else 0) * u + (abs(z) + 12) * 2.0**-53
            for g, exact in zip(got, want, strict=True):
                assert abs(g - exact) <= allowed * abs(exact) + SMALLEST * U


def test_declared() -> None:
    for form in FORMS:
        contract = contract_of(getattr(ssm, form))
        assert contract is not None
        assert contract.family == "ssm"
        assert ("cu_seqlens" in contract.options) == (form in ("recurrent", "scan"))
        assert (contract.causality == "budget") == (form == "fft")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 70)}, "u has shape .*expected 3 axes"),
        ({"a": torch.zeros(3, 5, 2)}, r"a has shape \(3, 5, 2\): expected \(2, 5\) or \(2, 5, 2\)"),
        ({"b": torch.zeros(2, 5)}, r"b has shape \(2, 5\): expected \(2, 5, 2\)"),
        ({"c": torch.zeros(2, 5, 2).half()}, "c is torch.float16 while the input is torch.float32"),
        ({"d": torch.zeros(3)}, r"d has shape \(3,\): expected \(2,\)"),
        ({"initial": torch.zeros(2, 2, 5)}, r"initial_state has shape .*expected \(2, 2, 5, 2\)"),
        ({"ends": [0, 71]}, "B = 1"),
    ],
)
def test_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        called("scan", inputs()._replace(**change))


def test_other_arguments() -> None:
    given = inputs()
    with pytest.raises(NotImplementedError, match="float64"):
        ssm.fft(*(x.double() for x in given[:4]))
    with pytest.raises(ContractError, match="step: u has shape"):
        ssm.step(*given[:4], state=given.initial)
    with pytest.raises(ContractError, match="discretize_zoh: delta has shape"):
        ssm.discretize_zoh(given.a, given.b, torch.ones(3))
    with pytest.raises(ContractError, match=r"expected both \(H, D\)"):
        ssm.discretize_bilinear(given.a, given.b[..., 0], torch.ones(2))
