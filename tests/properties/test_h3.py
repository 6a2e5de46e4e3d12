"""``h3``: definition, gradients and budgets, by loops over single numbers, healthy and wrong kernels."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.h3 import H3
from attnproof.properties.families.linear import LINEAR
from attnproof.properties.forms.h3 import Diagonal, Shift, recurrent
from attnproof.properties.oracle import evaluate
from tests.properties.naive_gradients import central_differences

ANY = Contract(family="h3")
NAMES = H3.inputs


def drawn(
    sizes: tuple[int, ...], *, pairs: bool, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.Tensor]:
    """All nine tensors for B, H, N, D, E, T, R; of the modes the first has a = 1, the second a = 0."""
    batch, heads, length, width, values, taps, modes = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    end = (2,) if pairs else ()
    angle = torch.pi * torch.rand(heads, modes, generator=generator)
    a = (
        0.97 * torch.stack((angle.cos(), angle.sin()), -1)
        if pairs
        else torch.rand(heads, modes, generator=generator)
    )
    a[:, 0] = torch.tensor((1.0, 0.0)) if pairs else 1.0
    a[:, 1:2] = 0.0
    rows = (batch, heads, length)
    found = [normal(*rows, width), normal(*rows, width), normal(*rows, values), normal(heads, width, taps), a]
    found += [normal(heads, modes, *end), normal(heads, modes, *end), normal(heads, width), normal(heads)]
    return [x.to(dtype) for x in found]


def naive(t: Any) -> Any:
    """o by the sum over pairs of positions with the explicit kernel, over object arrays of mpf."""
    q, k, v, taps, pairs = t["q"], t["k"], t["v"], t["taps"], t["a"].ndim == 3

    def number(x: Any) -> Any:
        return mpmath.mpc(*x) if pairs else x

    batch, heads, length, width = q.shape
    o = np.full(v.shape, mpmath.mpf(0), dtype=object)
    for b, h, i, j in itertools.product(range(batch), range(heads), range(length), range(length)):
        if j > i:
            continue
        score = mpmath.mpf(0)
        for d in range(width):
            key = t["d_shift"][h, d] * k[b, h, j, d]
            for lag in range(min(taps.shape[2], j + 1)):
                key += taps[h, d, lag] * k[b, h, j - lag, d]
            score += q[b, h, i, d] * key
        weight = t["d_diag"][h] if i == j else mpmath.mpf(0)
        for m in range(t["a"].shape[1]):
            a, left, right = (number(t[name][h, m]) for name in "acb")
            power = mpmath.mpf(1)
            for _ in range(i - j):
                power = power * a
            weight += mpmath.re(left * power * right)
        for e in range(v.shape[3]):
            o[b, h, i, e] += score * weight * v[b, h, j, e]
    return o


def objects(x: torch.Tensor) -> Any:
    return np.vectorize(mpmath.mpf, otypes=[object])(x.double().numpy())


def inside(found: Any, expected: Any) -> None:
    for value, radius, number in zip(
        found.value.flatten().tolist(), found.radius.flatten().tolist(), expected.flatten(), strict=True
    ):
        assert abs(mpmath.mpf(value) - number) <= radius + 1e-30
        assert radius <= 1e-9 * (1 + abs(number))


@pytest.mark.parametrize("pairs", [False, True])
def test_definition_and_gradients(pairs: bool) -> None:
    tensors = drawn((1, 2, 3, 2, 1, 2, 2), pairs=pairs)
    problem = H3.problem(*tensors)
    with mpmath.workdps(60):
        t = dict(zip(NAMES, map(objects, tensors), strict=True))
        for arithmetic in (EnclosureArithmetic(), ArbArithmetic(128)):
            inside(evaluate(problem, arithmetic)["o"], naive(t))
        cotangent = torch.randn(problem.shape("o"), generator=torch.Generator().manual_seed(4)).double()
        exact = objects(cotangent)
        expected = central_differences(lambda x: (naive(x) * exact).sum(), t)
        found = evaluate(GradientProblem(problem, {}, {"o": cotangent}), EnclosureArithmetic())
        for name in NAMES:
            inside(found[f"d{name}"], expected[name])


def test_exact_form() -> None:
    """The forms' recurrence over rationals, with two dyadic modes, taps and both skips."""
    q, k, v = (
        torch.randint(-8, 9, (1, 1, 6, width), generator=torch.Generator().manual_seed(width)) / 4.0
        for width in (2, 2, 3)
    )
    taps, skip = (0.5, -1.0, 0.25), 0.75
    decays, gains, outs, diagonal = (0.5, -0.25), (1.0, 2.0), (-1.0, 0.5), 1.5
    modes = [torch.tensor([x]) for x in (decays, gains, outs)]
    both = torch.tensor(taps).expand(1, 2, 3)
    problem = H3.problem(q, k, v, both, *modes, torch.full((1, 2), skip), torch.tensor([diagonal]))
    exact = [np.vectorize(Fraction, otypes=[object])(x[0, 0].double().numpy()) for x in (q, k, v)]

    def fractions(x: tuple[float, ...]) -> tuple[Fraction, ...]:
        return tuple(map(Fraction, x))

    o = recurrent(
        *exact,
        Shift(fractions(taps), Fraction(skip)),
        Diagonal(fractions(decays), fractions(gains), fractions(outs), Fraction(diagonal)),
    )
    found = evaluate(problem, EnclosureArithmetic())["o"]
    for value, radius, number in zip(found.value.flatten(), found.radius.flatten(), o.flatten(), strict=True):
        assert abs(Fraction(float(value)) - number) <= Fraction(float(radius))


def test_identity_shift_and_accumulator_are_linear_attention() -> None:
    q, k, v, taps, a, b, *_ = drawn((2, 2, 40, 3, 2, 3, 1), pairs=False)
    taps.zero_()[..., 0] = 1.0
    ones = torch.ones_like(b)
    found = evaluate(H3.problem(q, k, v, taps, a, ones, ones, torch.zeros(2, 3)), EnclosureArithmetic())["o"]
    linear = LINEAR.problem(q, k, v, feature_map="identity", normalize=False)
    other = evaluate(linear, EnclosureArithmetic())["o"]
    assert bool(((found.value - other.value).abs() <= found.radius + other.radius).all())
    assert float(found.radius.max()) < 1e-11
    # With another power of a it is not.
    decayed = evaluate(H3.problem(q, k, v, taps, 0.5 * a, ones, ones), EnclosureArithmetic())["o"]
    assert bool(((decayed.value - other.value).abs() > decayed.radius + other.radius).any())


def numbers(x: torch.Tensor, pairs: bool) -> torch.Tensor:
    return torch.view_as_complex(x.float().contiguous()) if pairs else x.float()


def shifted(k: torch.Tensor, taps: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    total = skip.float()[:, None] * k.float()
    for i in range(taps.shape[2]):
        moved = torch.nn.functional.pad(k.float(), (0, 0, i, 0))[:, :, : k.shape[2]]
        total = total + taps[..., i].float()[:, None] * moved
    return total


def stepwise(
    q: Any, k: Any, v: Any, taps: Any, a: Any, b: Any, c: Any, d_shift: Any, d_diag: Any
) -> torch.Tensor:
    """The recurrence over the outer products, state by state in float32."""
    pairs, keys, outputs = a.dim() == 3, shifted(k, taps, d_shift), []
    a, b, c = (numbers(x, pairs)[:, :, None, None] for x in (a, b, c))
    state = torch.zeros(*q.shape[:2], a.shape[1], q.shape[3], v.shape[3], dtype=a.dtype)
    for t in range(q.shape[2]):
        written = keys[:, :, t, :, None] * v[:, :, t, None, :].float()
        state = a * state + b * written[:, :, None]
        kept = (c * state).sum(2)
        kept = (kept.real if pairs else kept) + d_diag.float()[:, None, None] * written
        outputs.append((q[:, :, t, None, :].float() @ kept)[:, :, 0])
    return torch.stack(outputs, 2)


def quadratic(
    q: Any, k: Any, v: Any, taps: Any, a: Any, b: Any, c: Any, d_shift: Any, d_diag: Any
) -> torch.Tensor:
    """Masked attention, keys and weights rounded to the inputs' dtype."""
    pairs, length = a.dim() == 3, q.shape[2]
    keys = shifted(k, taps, d_shift).to(q.dtype).float()
    a, b, c = (numbers(x, pairs) for x in (a, b, c))
    powers = torch.cat(
        (torch.ones_like(a)[..., None], a[..., None].expand(*a.shape, length - 1)), -1
    ).cumprod(-1)
    kernel = ((c * b)[..., None] * powers).sum(1)
    kernel = kernel.real if pairs else kernel
    lags = torch.arange(length)[:, None] - torch.arange(length)
    mask = kernel[:, lags.clamp(min=0)] * (lags >= 0) + d_diag.float()[:, None, None] * (lags == 0)
    return ((q.float() @ keys.mT) * mask).to(q.dtype).float() @ v.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pairs", [False, True])
def test_healthy_and_wrong_kernels(pairs: bool, dtype: torch.dtype) -> None:
    call = drawn((1, 2, 70, 4, 3, 3, 3), pairs=pairs, dtype=dtype, seed=2)
    problem = H3.problem(*call)
    exact = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(exact, ANY)["o"]
    assert not budget.open.any()

    def error(*tensors: torch.Tensor, form: Any = stepwise) -> torch.Tensor:
        return (form(*tensors).to(dtype).double() - exact["o"].value).abs()

    for form in (stepwise, quadratic):
        assert float((error(*call, form=form) / budget.certain).max()) <= 1.0, form
        assert float((error(*call, form=form) / budget.probable).square().mean().sqrt()) <= 1.5, form
    q, k, v, taps, a, b, c, d_shift, d_diag = call
    wrong = {
        "taps turned round": (q, k, v, taps.flip(-1), a, b, c, d_shift, d_diag),
        "no shift skip": (q, k, v, taps, a, b, c, torch.zeros_like(d_shift), d_diag),
        "no diagonal skip": (q, k, v, taps, a, b, c, d_shift, torch.zeros_like(d_diag)),
        "decayed once": (q, k, v, taps, a, b, a * c if not pairs else c * 0.9, d_shift, d_diag),
    }
    for name, tensors in wrong.items():
        assert float((error(*tensors) / budget.certain).max()) > 2.0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healthy_gradients(dtype: torch.dtype) -> None:
    call = drawn((1, 2, 40, 3, 2, 3, 3), pairs=True, dtype=dtype, seed=6)
    do = torch.randn(1, 2, 40, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = GradientProblem(H3.problem(*call), {}, {"o": do.double()})
    exact = evaluate(gradients, EnclosureArithmetic())
    budgets = gradients.budgets(exact, ANY)
    for form in (stepwise, quadratic):
        leaves = [x.detach().clone().requires_grad_() for x in call]
        found = torch.autograd.grad((form(*leaves) * do.float()).sum(), leaves)
        for name, x in zip(NAMES, found, strict=True):
            budget, value = budgets[f"d{name}"], exact[f"d{name}"].value
            assert float(((x.double() - value).abs() / budget.certain).max()) <= 1.0, (form, name)
            assert float(((x.double() - value) / budget.probable).square().mean().sqrt()) <= 2.0, (form, name)
            assert float(((2.0 * x.double() - value).abs() / budget.certain).max()) > 1.0, (form, name)


def test_nonfinite_inputs_close_what_reads_them() -> None:
    call = drawn((1, 2, 5, 2, 2, 2, 2), pairs=False)
    call[0][0, 0, 1, 0] = torch.nan
    call[1][0, 1, 3, 0] = torch.inf
    problem = H3.problem(*call)
    assert problem.closed[0].tolist() == [[False, True, False, False, False], [False] * 3 + [True] * 2]
    assert bool(problem.budgets(evaluate(problem, EnclosureArithmetic()), ANY)["o"].open[0, 0, 1].all())
    call = drawn((1, 2, 5, 2, 2, 2, 2), pairs=False)
    call[3][1, 0, 0] = torch.nan
    assert H3.problem(*call).closed[0].all(-1).tolist() == [False, True]


def test_long_and_empty_calls() -> None:
    call = drawn((1, 1, 4100, 1, 1, 1, 2), pairs=False)
    problem = H3.problem(*call)
    found = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(found, ANY)["o"]
    judged = ~budget.open
    assert 0 < int(judged.sum()) <= 96
    error = (stepwise(*call).double() - found["o"].value).abs()[judged]
    assert float((error / budget.certain[judged]).max()) <= 1.0
    empty = H3.problem(*drawn((1, 1, 0, 2, 1, 2, 2), pairs=True))
    assert tuple(evaluate(empty, EnclosureArithmetic())["o"].value.shape) == (1, 1, 0, 1)


def test_wrong_calls_name_the_argument() -> None:
    call = drawn((1, 2, 4, 2, 2, 2, 2), pairs=True)
    with pytest.raises(ContractError, match="taps has"):
        H3.problem(*call[:3], call[3][0], *call[4:])
    with pytest.raises(ContractError, match="d_diag has"):
        H3.problem(*call[:8], call[8][:1])
    with pytest.raises(ContractError, match="7 to 9"):
        H3.problem(*call[:5])
