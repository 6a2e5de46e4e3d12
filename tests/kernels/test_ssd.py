"""Mamba-2's state space duality against its recurrence in float64: all forms, and all gradients.

Every output and every gradient is a sum of monomials C·B·dt·x·dy·exp(Σ dt A), so that rounding is measured
against the same sum of absolute values, the same loop on absolute values of everything but the gates. With
u = 2^-24, u_t the unit roundoff of the inputs' dtype and n the number of positions, the kernels' roundings of
one monomial are:

* its gates: products, in sums of at most 64 at a time and, pair by pair, of the tiles between: an argument
  off by (64 + n/64 + 6)·u of itself, which is no more than gates that are smaller by that factor;
* its exponentials, one a chunk of 64 and three more, or one a position, by 2 ulp, and the products with
  them: 6·u each;
* its sums over positions, heads of a group, D and E, and of dA over the batch: a roundoff u for each term,
  and 16·u for single products;
* operands of matmuls, 3·u_t for half precision: (dt x, B and S) on the way through a state to y or to
  gradients, (dt x, C and dS) likewise backwards;
* an exponential below float32's normal numbers: 2^-126, whatever the gates are;
* the result, u_t of itself and half its smallest subnormal.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnproof.kernels import gated_linear
from attnproof.kernels.ssd import attention, parallel, recurrent
from attnproof.properties.contract import ContractError, contract_of
from tests.kernels.native import assert_same_bits

pytestmark = pytest.mark.usefixtures("emulated")

U32 = 2.0**-24
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
HALF_SUBNORMAL = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
CHUNK = 64
NAMES = ("y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate")
FORMS = {"attention": attention, "recurrent": recurrent, "parallel": parallel}
HALVES = (torch.float16, torch.bfloat16)


class Inputs(NamedTuple):
    """One call and its cotangents: tensors as a kernel gets them; cu_seqlens may be None."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    initial: Tensor
    dy: Tensor
    dstate: Tensor
    cu_seqlens: Tensor | None = None


def inputs(
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 1,
    h: int = 4,
    g: int = 2,
    n: int = 70,
    d: int = 20,
    e: int = 12,
    cu_seqlens: list[int] | None = None,
) -> Inputs:
    """Normal numbers, steps between 0 and 1 and rates between −1 and 0, which a test then changes."""
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    return Inputs(
        torch.randn(b, h, n, e).to(dtype),
        torch.rand(b, h, n),
        -torch.rand(h),
        torch.randn(b, g, n, d).to(dtype),
        torch.randn(b, g, n, d).to(dtype),
        torch.randn(h).to(dtype),
        torch.randn(sequences, h, d, e),
        torch.randn(b, h, n, e).to(dtype),
        torch.randn(sequences, h, d, e),
        None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
    )


def pieces(given: Inputs) -> list[tuple[int, int, int]]:
    """(batch entry, first position, end) of every sequence."""
    if given.cu_seqlens is None:
        return [(b, 0, given.x.shape[2]) for b in range(given.x.shape[0])]
    ends = given.cu_seqlens.tolist()
    return [(0, start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]


def naive(given: Inputs, gates: Tensor) -> list[Tensor]:
    """[y, final states] by the recurrence, whose log decays are ``gates`` (B,H,N)."""
    heads_a_group = given.x.shape[1] // given.B.shape[1]
    B, C = (z.repeat_interleave(heads_a_group, 1) for z in (given.B, given.C))
    rows: list[list[Tensor]] = [[] for _ in range(given.x.shape[0])]
    states = []
    for (b, start, stop), state in zip(pieces(given), given.initial, strict=True):
        for t in range(start, stop):
            step = given.dt[b, :, t, None, None] * B[b, :, t, :, None] * given.x[b, :, t, None, :]
            state = torch.exp(gates[b, :, t])[:, None, None] * state + step
            rows[b].append((C[b, :, t, :, None] * state).sum(-2) + given.D[:, None] * given.x[b, :, t])
        states.append(state)
    y = torch.stack([torch.stack(z, 1) for z in rows]) if given.x.numel() else given.x * 0
    return [y, torch.stack(states) if states else given.initial]


def results(call: Any, given: Inputs) -> list[Tensor]:
    """y, the final state, and the gradients of all floating inputs."""
    leaves = [z.detach().requires_grad_() for z in given[:7]]
    y, state = call(given._replace(**dict(zip(Inputs._fields, leaves, strict=False))))
    found = torch.autograd.grad((y, state), leaves, (given.dy, given.dstate), materialize_grads=True)
    return [y.detach(), state.detach(), *found]


def sizes(given: Inputs, gates: list[Tensor]) -> list[list[Tensor]]:
    """The sums of absolute values of all monomials of :func:`results`, for each of these log decays.

    One loop for all of them, as heads side by side. A of the loop is the log decays: a gradient of theirs is
    one of dt and of A.
    """
    count, rates = len(gates), given.A.abs()[:, None]
    repeated = {
        name: torch.cat([getattr(given, name).abs()] * count, 0 if name == "D" else 1)
        for name in ("x", "dt", "B", "C", "D", "initial", "dy", "dstate")
    }
    found = results(lambda z: naive(z, z.A), given._replace(**repeated, A=torch.cat(gates, 1)))
    apart = [z.chunk(count, 0 if name == "dD" else 1) for name, z in zip(NAMES, found, strict=True)]
    return [
        [y, state, dx, ddt + rates * dg, (given.dt * dg).sum((0, 2)), *rest]
        for y, state, dx, ddt, dg, *rest in zip(*apart, strict=True)
    ]


def exact(given: Inputs, form: str) -> list[list[Tensor]]:
    """[value, allowed error] of everything that :func:`results` returns."""
    wide = Inputs(*(z.double() if z is not None and z.is_floating_point() else z for z in given))
    want = results(lambda z: naive(z, z.dt * z.A[:, None]), wide)
    gates = wide.dt * wide.A[:, None]
    b, h, n, e = given.x.shape
    off = (CHUNK + n / CHUNK + 6) * U32
    half = 3 * ROUNDOFF[given.x.dtype] if given.x.dtype in HALVES else 0.0
    exponentials = n if form == "recurrent" else n / CHUNK + 3
    terms = (b + 1) * n + given.B.shape[3] + e + h / given.B.shape[1] + 16
    relative = 1.02 * half + (terms + 6 * exponentials) * U32
    bounds = []
    for value, plain, slower, undecayed, like in zip(
        want, *sizes(wide, [gates, gates * (1 - off), gates * 0]),
        (given.x, given.initial, *given[:7]), strict=True,
    ):  # fmt: skip
        error = (slower - plain).abs() + relative * slower + 2.0**-126 * undecayed
        stored = ROUNDOFF[like.dtype] * (value.abs() + error) + HALF_SUBNORMAL[like.dtype]
        bounds.append([value, error + stored])
    return bounds


def call(form: str, given: Inputs) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, initial, _, _, cu_seqlens = given
    y, state = FORMS[form](x, dt, A, B, C, D, initial_state=initial, cu_seqlens=cu_seqlens, return_state=True)
    return y, state


def assert_within(got: list[Tensor], bounds: list[list[Tensor]]) -> None:
    for name, z, (value, error) in zip(NAMES, got, bounds, strict=False):
        assert z.shape == value.shape, name
        assert z.isfinite().all(), f"{name} is not finite"
        worst = ((z.double() - value).abs() / error).max().item() if z.numel() else 0.0
        assert worst <= 1, f"{name} is off by {worst:.3g} times what rounding allows"


def assert_exact(given: Inputs, form: str = "attention", *, also: tuple[str, ...] = ()) -> list[Tensor]:
    """Outputs and gradients of ``form``, and the outputs of the forms ``also``, within their bounds."""
    got = results(functools.partial(call, form), given)
    for name, z, like in zip(NAMES, got, (given.x, given.initial, *given[:7]), strict=True):
        assert z.dtype == like.dtype, name
    bounds = exact(given, "recurrent" if "recurrent" in also else form)
    assert_within(got, bounds)
    for other in also:
        assert_within(list(call(other, given)), bounds)
    return got


@pytest.mark.parametrize("n", [0, 1, 17, 64])
def test_lengths(n: int) -> None:
    assert_exact(inputs(n=n))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("attention", torch.float16),
        ("attention", torch.bfloat16),
        ("recurrent", torch.float32),
        ("recurrent", torch.bfloat16),
        ("parallel", torch.float32),
        ("parallel", torch.float16),
    ],
    ids=str,
)
def test_forms(form: str, dtype: torch.dtype) -> None:
    """With decays so slow that what was written more than a chunk ago still counts."""
    given = inputs(dtype, n=140, h=2, g=1)
    assert_exact(given._replace(A=given.A / 50), form)


def test_steps_and_rates_in_half_precision() -> None:
    given = inputs(torch.bfloat16, n=33)
    assert_exact(given._replace(dt=given.dt.bfloat16(), A=given.A.bfloat16()))


def constant(dt: float, A: float) -> Any:
    return lambda given: given._replace(dt=given.dt * 0 + dt, A=given.A * 0 + A)


def one_huge(given: Inputs) -> Inputs:
    """A huge step, then small ones: a difference of cumulative sums would lose them (bugs B46)."""
    dt = given.dt / 1000
    dt[:, :, 3] = 1e4
    dt[:, :, 81] = 1e6
    return given._replace(dt=dt)


def every_other(given: Inputs) -> Inputs:
    dt = given.dt.clone()
    dt[:, :, ::2] = 0
    return given._replace(dt=dt, A=given.A * 2000)


DECAYS = {
    "0": constant(1.0, 0.0),
    "-1e-6": constant(1.0, -1e-6),
    "-30": constant(30.0, -1.0),
    "-1000": constant(0.5, -2000.0),
    "none written": constant(0.0, -1.0),
    "beyond float32": constant(1e20, -1e30),
    "one huge": one_huge,
    "every other": every_other,
    "by head": lambda given: given._replace(A=-torch.logspace(-6, 4, given.A.shape[0])),
}


@pytest.mark.parametrize("decays", DECAYS)
def test_decays(decays: str) -> None:
    """All forms; the gradients are the same kernels in all."""
    assert_exact(DECAYS[decays](inputs(n=90, h=2, g=1, d=6, e=5)), also=("recurrent", "parallel"))


@pytest.mark.parametrize(("h", "g"), [(3, 1), (3, 3), (4, 2)])
def test_groups(h: int, g: int) -> None:
    assert_exact(inputs(b=2, h=h, g=g, n=18))


def test_packed_sequences() -> None:
    given = inputs(n=150, cu_seqlens=[0, 0, 17, 18, 18, 150], h=2, g=1)
    assert_exact(given, also=("recurrent", "parallel"))


@pytest.mark.parametrize("form", FORMS)
def test_empty(form: str) -> None:
    """No batch entry, no sequence, no position: the final state of the last is the initial one."""
    for given in (inputs(b=0, n=5), inputs(n=0, cu_seqlens=[0]), inputs(n=0, cu_seqlens=[0, 0])):
        _, state, *_ = assert_exact(given, form)
        assert torch.equal(state, given.initial)


@pytest.mark.parametrize(("d", "e"), [(1, 1), (40, 72)])
def test_widths(d: int, e: int) -> None:
    assert_exact(inputs(h=2, n=18, d=d, e=e), also=("recurrent", "parallel"))


def test_layouts() -> None:
    """Transposed inputs and states, steps, rates and cotangents with strides of 0."""
    given = inputs(b=2, h=4, n=37, d=16, e=16)
    turned = {name: getattr(given, name).mT.contiguous().mT for name in ("x", "B", "C")}
    assert_exact(
        given._replace(
            **turned,
            initial=given.initial.mT,
            dt=torch.rand(1, 4, 1).expand(2, 4, 37),
            A=-torch.rand(1).expand(4),
            D=torch.randn(8)[::2],
            dy=torch.randn(1, 4, 1, 1).expand(2, 4, 37, 16),
        ),
        also=("recurrent", "parallel"),
    )


@pytest.mark.parametrize("form", FORMS)
def test_optional_tensors(form: str) -> None:
    """Without D and an initial state it is as with zeros; without return_state, y alone."""
    given = inputs(n=20)
    leaves = [z.requires_grad_() for z in given[:5]]
    got = FORMS[form](*leaves)
    zeros = given._replace(D=given.D * 0, initial=given.initial * 0, dstate=given.dstate * 0)
    want = results(functools.partial(call, form), zeros)
    assert torch.equal(got, want[0])
    for z, dz in zip(torch.autograd.grad(got, leaves, given.dy), want[2:7], strict=True):
        assert torch.equal(z, dz)


@pytest.mark.parametrize(("output", "asked"), [(0, "x"), (0, "B"), (1, "dt"), (1, "A"), (1, "initial")])
def test_single_gradients(output: int, asked: str) -> None:
    """One input that asks for a gradient, one output that gets a cotangent: as in the whole."""
    given = inputs(n=37)
    silent = {"dstate": given.dstate * 0} if output == 0 else {"dy": given.dy * 0}
    want = results(functools.partial(call, "attention"), given._replace(**silent))
    leaf = getattr(given, asked).detach().requires_grad_()
    out = call("attention", given._replace(**{asked: leaf}))[output]
    (got,) = torch.autograd.grad(out, leaf, given.dy if output == 0 else given.dstate)
    assert_same_bits([got], [want[2 + Inputs._fields.index(asked)]])


@pytest.mark.parametrize("form", FORMS)
def test_values_that_a_row_does_not_see(form: str) -> None:
    """What stands at position 20 reaches no earlier position and no head of another group, and not its own
    head where B or C is another group's.
    """
    given = inputs(n=70)
    clean, end = call(form, given)
    for name, bad in (("x", math.nan), ("x", math.inf), ("dt", math.nan), ("B", math.inf), ("C", math.nan)):
        spoilt = getattr(given, name).clone()
        spoilt[:, 1, 20, ...] = bad
        y, state = call(form, given._replace(**{name: spoilt}))
        heads = [2, 3] if name in ("B", "C") else [1]
        others = [head for head in range(4) if head not in heads]
        assert torch.equal(y[:, others], clean[:, others])
        assert torch.equal(state[:, others], end[:, others])
        assert torch.equal(y[:, :, :20], clean[:, :, :20])
        assert not y[:, heads, 20].isfinite().any()
        if name == "C":
            assert torch.equal(y[:, :, 21:], clean[:, :, 21:])
            assert torch.equal(state, end)


def test_gated_linear_attention() -> None:
    """It is gated linear attention with one gate a position."""
    given = inputs(n=70, h=2, g=2)
    want = gated_linear.attention(
        given.C, given.B, given.dt[..., None] * given.x, given.dt * given.A[:, None],
        scale=1.0, initial_state=given.initial,
    )  # fmt: skip
    got = attention(*given[:5], initial_state=given.initial)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_states_carry_on() -> None:
    """Two parts with the state between them are the whole."""
    given = inputs(n=130)
    x, dt, A, B, C, D, initial, *_ = given
    whole, end = call("attention", given)
    for cut in (16, 64, 129):
        state, parts = initial, []
        for rows in (slice(cut), slice(cut, None)):
            part, state = attention(
                x[:, :, rows], dt[:, :, rows], A, B[:, :, rows], C[:, :, rows], D,
                initial_state=state, return_state=True,
            )  # fmt: skip
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["attention", "parallel"])
def test_range_of_float16(form: str) -> None:
    """dt x, weights and states beyond 65504, the outputs within."""
    given = inputs(torch.float16, n=33, h=2, g=1)
    given = given._replace(B=given.B * 2.0**12, C=given.C * 2.0**-12, dy=given.dy * 2.0**-14)
    given = given._replace(initial=given.initial * 2.0**18, dstate=given.dstate * 2.0**-18)
    assert_exact(given._replace(dt=given.dt * 16, x=given.x * 2.0**6), form)


def test_runs_agree() -> None:
    given = inputs(torch.bfloat16, n=70)
    copies = [z.clone() for z in given[:9]]
    first, second = (results(functools.partial(call, "attention"), given) for _ in range(2))
    assert all(torch.equal(y, z) for y, z in zip(first, second, strict=True))
    assert all(torch.equal(y, z) for y, z in zip(copies, given[:9], strict=True))


WRONG = [
    ({"dt": torch.rand(1, 4, 5).half()}, r"dt is torch\.float16"),
    ({"A": torch.rand(2)}, r"A has shape \(2,\)"),
    ({"B": torch.rand(1, 3, 5, 20)}, "4 heads must be a positive multiple of 3 groups"),
    ({"C": torch.rand(1, 2, 5, 8)}, r"C has shape \(1, 2, 5, 8\)"),
    ({"D": torch.rand(4).double()}, "D is float64"),
    ({"x": torch.rand(1, 4, 5)}, r"x has shape \(1, 4, 5\): expected 4 axes"),
    ({"initial": torch.rand(1, 4, 12, 20)}, r"initial_state has shape \(1, 4, 12, 20\)"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_calls(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises((ContractError, NotImplementedError), match=message):
        call("attention", inputs(n=5)._replace(**changed))


def test_declared() -> None:
    for form in FORMS.values():
        contract = contract_of(form)
        assert contract is not None
        assert contract.family == "ssd"
        assert set(contract.options) == {"initial_state", "cu_seqlens", "return_state"}
        assert not contract.precision.matmul_input
