"""``ssm``: definition, gradients and budgets, by loops over single numbers, healthy and wrong kernels.

``python -m tests.properties.test_ssm`` measures how loose certain budgets are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.ssm import SSM, SSMProblem
from attnproof.properties.families.state_kernel import Modes, StateKernel
from attnproof.properties.forms.state_space import convolved, kernel, recurrent
from attnproof.properties.oracle import evaluate

ANY = Contract(family="ssm")
FOURIER = Contract(family="ssm", causality="budget")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("u", "a", "b", "c", "d")


def drawn(
    sizes: tuple[int, int, int, int], *, pairs: bool, largest: float = 0.97, seed: int = 0
) -> list[torch.Tensor]:
    """u, a, b, c, d in float32; of the modes of each head the first has a = 1, or |a| ≤ 1 near π, 0."""
    batch, heads, length, width = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    end = (2,) if pairs else ()
    radius = largest * torch.rand(heads, width, generator=generator).sqrt()
    angle = torch.pi * torch.rand(heads, width, generator=generator)
    a = torch.stack((radius * angle.cos(), radius * angle.sin()), -1) if pairs else radius
    for mode, value in enumerate(((1.0, 0.0), (0.0, 0.0), (-0.999, 0.01))[:width]):
        a[:, mode] = torch.tensor(value) if pairs else value[0]
    return [
        normal(batch, heads, length),
        a,
        normal(heads, width, *end),
        normal(heads, width, *end),
        normal(heads),
    ]


def spans(u: Any, cu: list[int] | None) -> list[tuple[int, int, int]]:
    if cu is None:
        return [(b, 0, u.shape[2]) for b in range(u.shape[0])]
    return [(0, start, stop) for start, stop in itertools.pairwise(cu)]


def naive(t: dict[str, Any], cu: list[int] | None = None) -> tuple[Any, Any]:
    """y and the final states by the recurrence, over object arrays of mpmath numbers."""
    u, pairs = t["u"], t["a"].ndim == 3

    def number(x: Any) -> Any:
        return mpmath.mpc(*x) if pairs else x

    heads, width = t["a"].shape[:2]
    y = np.zeros(u.shape, dtype=object)
    parts = spans(u, cu)
    states = np.zeros((len(parts), *t["a"].shape), dtype=object)
    for (s, (batch, start, stop)), h in itertools.product(enumerate(parts), range(heads)):
        x = [number(t["initial_state"][s, h, m]) for m in range(width)]
        for i in range(start, stop):
            total = mpmath.mpf(0)
            for m in range(width):
                x[m] = number(t["a"][h, m]) * x[m] + number(t["b"][h, m]) * u[batch, h, i]
                total += mpmath.re(number(t["c"][h, m]) * x[m])
            y[batch, h, i] = total + t["d"][h] * u[batch, h, i]
        for m in range(width):
            states[s, h, m] = (x[m].real, x[m].imag) if pairs else x[m]
    return y, states


def objects(x: torch.Tensor) -> Any:
    return np.vectorize(mpmath.mpf, otypes=[object])(x.double().numpy())


def inside(found: Any, expected: Any) -> None:
    """Every number lies in its enclosure."""
    for value, radius, number in zip(
        found.value.flatten().tolist(), found.radius.flatten().tolist(), expected.flatten(), strict=True
    ):
        assert abs(mpmath.mpf(value) - number) <= radius
        assert radius <= 1e-9 * (1 + abs(number))


CALLS = [((2, 2, 5, 3), None), ((1, 2, 7, 3), [0, 3, 3, 7])]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("sizes", "cu"), CALLS)
def test_definition_and_gradients(sizes: tuple[int, ...], cu: list[int] | None, pairs: bool) -> None:
    tensors = drawn(sizes, pairs=pairs)  # type: ignore[arg-type]
    count = sizes[0] if cu is None else len(cu) - 1
    initial = torch.randn(count, *tensors[1].shape, generator=torch.Generator().manual_seed(1))
    packed = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    problem = SSM.problem(*tensors, initial_state=initial, cu_seqlens=packed, return_state=True)
    with mpmath.workdps(60):
        t = dict(zip(NAMES, map(objects, tensors), strict=True)) | {"initial_state": objects(initial)}
        y, states = naive(t, cu)
        for arithmetic in (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic()):
            found = evaluate(problem, arithmetic)
            inside(found["y"], y)
            inside(found["state"], states)
        generator = torch.Generator().manual_seed(2)
        cotangents = {
            name: torch.randn(problem.shape(name), generator=generator).double() for name in problem.outputs
        }
        exact = {name: objects(x) for name, x in cotangents.items()}
        gradients = evaluate(GradientProblem(problem, found, cotangents), EnclosureArithmetic())
        step = mpmath.mpf(10) ** -20
        for name, x in t.items():
            for place in list(np.ndindex(x.shape))[:: max(x.size // 4, 1)]:
                ends, old = [], x[place]
                for sign in (1, -1):
                    x[place] = old + sign * step
                    y, states = naive(t, cu)
                    ends.append((y * exact["y"]).sum() + (states * exact["state"]).sum())
                x[place] = old
                slope, ball = (ends[0] - ends[1]) / (2 * step), gradients[f"d{name}"]
                # The difference quotient is itself off by step² times a third derivative.
                error = abs(mpmath.mpf(float(ball.value[place])) - slope)
                assert error <= float(ball.radius[place]) + 1e-30 * (1 + abs(slope))


@pytest.mark.parametrize("pairs", [False, True])
def test_dyadic_rationals(pairs: bool) -> None:
    """Recurrence and convolution of the exact forms, real or as matrices of rotations and scalings."""
    u = torch.tensor([[[1.0, -2.0, 0.5, 3.0, 0.25, -1.0]]])
    real, imag = (0.5, -0.75), (0.25, 0.5)
    rows = [[(0.5, 0.25), (-0.75, 0.5)], [(1.0, 2.0), (0.5, -1.0)], [(2.0, 0.5), (-1.0, 0.25)]]
    a, b, c = (torch.tensor([[x if pairs else x[0] for x in row]]) for row in rows)
    size = 4 if pairs else 2
    A, B, C = (np.full(s, Fraction(0), dtype=object) for s in ((size, size), size, size))
    for m in range(2):
        if not pairs:
            A[m, m], B[m], C[m] = Fraction(real[m]), Fraction(rows[1][m][0]), Fraction(rows[2][m][0])
            continue
        r, i = Fraction(real[m]), Fraction(imag[m])
        at = slice(2 * m, 2 * m + 2)
        A[at, at] = [[r, -i], [i, r]]
        B[at] = [Fraction(x) for x in rows[1][m]]
        C[at] = [Fraction(rows[2][m][0]), -Fraction(rows[2][m][1])]
    exact_u = np.array([Fraction(x) for x in u.flatten().tolist()], dtype=object)
    y, _ = recurrent(A, B, C, exact_u)
    assert (convolved(kernel(A, B, C, 6), exact_u) == y).all()
    found = evaluate(SSM.problem(u, a, b, c), EnclosureArithmetic())["y"]
    for value, radius, number in zip(found.value.flatten(), found.radius.flatten(), y, strict=True):
        assert abs(Fraction(float(value)) - number) <= Fraction(float(radius))


def test_powers_of_long_calls() -> None:
    """At N = 65,536: |a| = 1 to rounding and near π, a = 1, 0 and 1/2, whose powers underflow."""
    length = 65536
    angle = torch.tensor(3.1415)
    a = torch.tensor([[[angle.cos(), angle.sin()], [1.0, 0.0], [0.0, 0.0], [0.5, 0.0]]])
    one = torch.zeros_like(a)
    one[..., 0] = 1.0
    powers = StateKernel(EnclosureArithmetic(), Modes(a, one, one), length)
    exponents = torch.tensor([0, 1, 2, 1500, 40_001, 65_535, 65_536])
    found = powers.power(exponents)
    with mpmath.workdps(40):
        for mode, (place, exponent) in itertools.product(range(4), enumerate(exponents.tolist())):
            expected = mpmath.mpc(*a[0, mode].tolist()) ** exponent
            for part, number in ((found.re, expected.real), (found.im, expected.imag)):
                radius = float(part.radius[0, mode, place])
                assert abs(mpmath.mpf(float(part.value[0, mode, place])) - number) <= radius
                assert radius <= 2.0**-42 * abs(expected) + 1e-300


# Healthy kernels: float32 states, outputs in the inputs' dtype.


def numbers(x: torch.Tensor, pairs: bool) -> torch.Tensor:
    return torch.view_as_complex(x.float().contiguous()) if pairs else x.float()


Kernel = Callable[..., torch.Tensor]


def stepwise(
    u: Any, a: Any, b: Any, c: Any, d: Any, *, conj: bool = False, late: bool = False
) -> torch.Tensor:
    """The recurrence; wrong with conj(c), or with what is written decayed once."""
    pairs = a.dim() == 3
    a, b, c = (numbers(x, pairs) for x in (a, b, c))
    x, outputs, c = torch.zeros(u.shape[0], *a.shape, dtype=a.dtype), [], c.conj() if conj else c
    for t in range(u.shape[2]):
        written = b * u[:, :, t, None].float()
        x = a * (x + written) if late else a * x + written
        outputs.append((c * x).sum(-1))
    y = torch.stack(outputs, -1)
    return (y.real if pairs else y) + d.float()[:, None] * u.float()


def doubling(u: Any, a: Any, b: Any, c: Any, d: Any) -> torch.Tensor:
    """An associative scan of log-depth."""
    pairs, length, offset = a.dim() == 3, u.shape[2], 1
    a, b, c = (numbers(x, pairs) for x in (a, b, c))
    x = b[..., None] * u[:, :, None].float()
    power = a[..., None]
    while offset < length:
        x = x + torch.nn.functional.pad(power * x[..., :-offset], (offset, 0))
        power, offset = power * power, 2 * offset
    y = (c[..., None] * x).sum(2)
    return (y.real if pairs else y) + d.float()[:, None] * u.float()


def explicit(a: Any, b: Any, c: Any, length: int, *, logs: bool = False) -> torch.Tensor:
    pairs = a.dim() == 3
    a, b, c = (numbers(x, pairs) for x in (a, b, c))
    i = torch.arange(length)
    if logs:
        logarithms = a.to(torch.complex64).log()[..., None] * i
        powers = torch.where((a == 0)[..., None], (i == 0).float(), logarithms.exp())
    else:
        powers = torch.cat(
            (torch.ones_like(a)[..., None], a[..., None].expand(*a.shape, length - 1)), -1
        ).cumprod(-1)
    k = ((c * b)[..., None] * powers).sum(1)
    return k.real if k.is_complex() else k


def direct(u: Any, a: Any, b: Any, c: Any, d: Any, *, logs: bool = False, wrap: bool = False) -> torch.Tensor:
    """Convolution with K in the inputs' dtype; wrong if circular."""
    length = u.shape[2]
    k = explicit(a, b, c, length, logs=logs).to(u.dtype).float()
    lags = torch.arange(length)[:, None] - torch.arange(length)
    matrix = k[:, lags.clamp(min=0)] * (lags >= 0) if not wrap else k[:, lags % length]
    return (matrix @ u.float()[..., None])[..., 0] + d.float()[:, None] * u.float()


def fourier(u: Any, a: Any, b: Any, c: Any, d: Any) -> torch.Tensor:
    """Zero-padded transforms in float32."""
    length = u.shape[2]
    k = torch.fft.rfft(explicit(a, b, c, length), 2 * length)
    y = torch.fft.irfft(k * torch.fft.rfft(u.float(), 2 * length), 2 * length)[..., :length]
    return y + d.float()[:, None] * u.float()


def logged(*tensors: Any) -> torch.Tensor:
    return direct(*tensors, logs=True)


HEALTHY: tuple[tuple[Kernel, Contract], ...] = (
    (stepwise, ANY), (doubling, ANY), (direct, ANY), (logged, ANY), (fourier, FOURIER),
)  # fmt: skip


def ratios(call: list[torch.Tensor], form: Kernel, contract: Contract) -> tuple[float, float]:
    """Largest |error|/certain, and root mean square of |error|/probable."""
    problem = SSM.problem(*call)
    exact = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(exact, contract)["y"]
    assert not budget.open.any()
    error = (form(*call).to(call[0].dtype).double() - exact["y"].value).abs()
    return float((error / budget.certain).max()), float((error / budget.probable).square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("length", [3, 200])
def test_healthy_kernels(length: int, pairs: bool, dtype: torch.dtype) -> None:
    for largest in (0.6, 1.0):
        call = [x.to(dtype) for x in drawn((1, 2, length, 4), pairs=pairs, largest=largest, seed=length)]
        for form, contract in HEALTHY:
            certain, probable = ratios(call, form, contract)
            assert certain <= 1.0, (form, largest)
            assert probable <= 1.5, (form, largest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_kernels(dtype: torch.dtype) -> None:
    call = [x.to(dtype) for x in drawn((1, 2, 200, 4), pairs=True, largest=0.99, seed=5)]
    wrong: dict[str, Kernel] = {
        "wrapped": lambda *t: direct(*t, wrap=True),
        "one power too many": lambda *t: stepwise(*t, late=True),
        "conjugate": lambda *t: stepwise(*t, conj=True),
        "no skip": lambda *t: stepwise(*t[:4], torch.zeros_like(t[4])),
        "modes counted twice": lambda *t: 2.0 * stepwise(*t),
    }
    for name, form in wrong.items():
        assert ratios(call, form, FOURIER)[0] > 2.0, name


def healthy_gradients(call: list[torch.Tensor], form: Kernel, dy: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in call]
    return list(torch.autograd.grad((form(*leaves) * dy).sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [False, True])
def test_healthy_gradients(pairs: bool, dtype: torch.dtype) -> None:
    """By autograd through the forms that have a derivative at a = 0; d(a) twice as large is outside."""
    call = [x.to(dtype) for x in drawn((2, 2, 60, 4), pairs=pairs, largest=1.0, seed=9)]
    dy = torch.randn(2, 2, 60, generator=torch.Generator().manual_seed(3)).to(dtype)
    problem = SSM.problem(*call)
    gradients = GradientProblem(problem, {}, {"y": dy.double()})
    exact = evaluate(gradients, EnclosureArithmetic())
    for form, contract in ((stepwise, ANY), (doubling, ANY), (fourier, FOURIER)):
        budgets = gradients.budgets(exact, contract)
        for name, found in zip(NAMES, healthy_gradients(call, form, dy.float()), strict=True):
            budget, error = budgets[f"d{name}"], (found.double() - exact[f"d{name}"].value).abs()
            assert float((error / budget.certain).max()) <= 1.0, (form, name)
            assert float((error / budget.probable).square().mean().sqrt()) <= 2.0, (form, name)
            wrong = (2.0 * found.double() - exact[f"d{name}"].value).abs()
            assert float((wrong / budget.certain).max()) > 1.0, (form, name)


def test_fourier_budget_is_needed_and_not_idle() -> None:
    """Where K decays and u is an impulse, small outputs have no relative accuracy through transforms."""
    call = drawn((1, 1, 256, 1), pairs=False)
    call[0].zero_()[..., 0] = 1.0
    call[1].fill_(0.5)
    call[4].zero_()
    assert ratios(call, fourier, ANY)[0] > 1.0
    assert ratios(call, fourier, FOURIER)[0] <= 1.0


def test_nonfinite_inputs() -> None:
    call = drawn((1, 2, 6, 2), pairs=True)
    call[0][0, 0, 3] = torch.nan
    problem = SSM.problem(*call, return_state=True)
    found = problem.budgets(evaluate(problem, EnclosureArithmetic()), ANY)
    assert found["y"].open[0, 0].tolist() == [False] * 3 + [True] * 3
    assert not found["y"].open[0, 1].any()
    assert found["state"].open[0, 0].all()
    assert not found["state"].open[0, 1].any()
    call = drawn((1, 2, 6, 2), pairs=True)
    call[3][1, 0, 0] = torch.inf
    problem = SSM.problem(*call, return_state=True)
    assert problem.closed_elements("y")[0].tolist() == [[False] * 6, [True] * 6]
    assert not problem.closed_elements("state").any()
    assert problem.nonfinite


def test_growth_is_left_open_where_it_overflows() -> None:
    call = drawn((1, 1, 300, 1), pairs=False)
    call[1].fill_(2.0)
    problem = SSM.problem(*call)
    opened = problem.budgets(evaluate(problem, EnclosureArithmetic(), gauges=True), ANY)["y"].open[0, 0]
    assert not opened[:100].any()
    assert opened[130:].all()


def test_wrong_calls_name_the_argument() -> None:
    u, a, b, c, d = drawn((1, 2, 4, 3), pairs=True)
    for tensors, options, message in (
        ((u, a[..., :1], b, c), {}, "a has shape"),
        ((u, a, b[..., 0], c), {}, "b has"),
        ((u[0], a, b, c), {}, "u has shape"),
        ((u, a, b, c, d[:1]), {}, "d has"),
        ((u, a, b, c, d), {"initial_state": torch.zeros(1, 2, 3)}, "initial_state has"),
        ((u, a, b, c, d), {"scale": 1.0}, "ssm has no option"),
    ):
        with pytest.raises(ContractError, match=message):
            SSM.problem(*tensors, **options)


def test_long_calls_are_sampled() -> None:
    call = drawn((1, 1, 4100, 2), pairs=True, largest=1.0)
    problem: SSMProblem = SSM.problem(*call)
    found = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(found, ANY)["y"]
    judged = ~budget.open
    assert 0 < int(judged.sum()) <= 96
    error = (doubling(*call).double() - found["y"].value).abs()[judged]
    assert float((error / budget.certain[judged]).max()) <= 1.0
    assert float((found["y"].radius / budget.probable)[judged].max()) < 1e-5


def main() -> None:
    """Print largest |error|/certain and the root mean square in probable units, by length and form."""
    for length in (64, 512, 4096):
        for largest in (0.6, 1.0):
            call = drawn((1, 2, length, 4), pairs=True, largest=largest, seed=7)
            call[1] = call[1] * largest
            call[4].zero_()
            for form, contract in HEALTHY:
                certain, probable = ratios(call, form, contract)
                print(f"N {length:5} |a| {largest} {form.__name__:9} {certain:8.1e} {probable:6.2f}")


if __name__ == "__main__":
    main()
