"""Easy attention: the definition, its gradients in rational arithmetic, and their budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from mpmath.libmp import to_rational

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.easy import EASY
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences
from tests.properties.test_relu_family import exact_differences, rational
from tests.properties.test_sigmoid_family import HALF, OWN_ERROR, drawn, exact, judged

CASES = [
    ((2, 3, 4, 2), None),
    ((3, 2, 5, 3), 1),
    ((1, 1, 4, 1), 0),
    ((2, 2, 3, 2), 7),
    ((2, 2, 0, 2), 1),
    ((0, 2, 3, 2), None),
]


def shapes(sizes: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of alpha, v and do for B, H, N, E."""
    b, h, n, e = sizes
    return {"alpha": (h, n, n), "v": (b, h, n, e), "do": (b, h, n, e)}


def naive(t: Mapping[str, Any], number: Callable[[float], Any], band: int | None) -> Any:
    """o (B, H, N, E) by loops, Σ_j α_hij v_bhj over |i − j| ≤ band, in the type of ``number``."""
    alpha, v = t["alpha"], t["v"]
    o = np.full(v.shape, number(0.0), dtype=object)
    for b, h, i, e in np.ndindex(*v.shape):
        for j in range(v.shape[2]):
            if band is None or abs(i - j) <= band:
                o[b, h, i, e] += alpha[h, i, j] * v[b, h, j, e]
    return o


@pytest.mark.parametrize(("sizes", "band"), CASES)
def test_definition_and_gradients_hold_against_loops_and_differentiation(
    sizes: tuple[int, int, int, int], band: int | None
) -> None:
    tensors = drawn(shapes(sizes), torch.float16, seed=sum(sizes))
    cotangent = tensors.pop("do")
    problem = EASY.problem(*tensors.values(), band=band)
    arrays = {name: exact(x) for name, x in tensors.items()}
    weights, fractions = exact(cotangent), rational(cotangent)
    numerical = central_differences(
        lambda t: (naive(t, mpmath.mpf, band) * weights).sum() + mpmath.mpf(0), arrays
    )
    rationals = exact_differences(
        lambda t: (naive(t, Fraction, band) * fractions).sum() + Fraction(0),
        {name: rational(x) for name, x in tensors.items()},
    )
    with mpmath.workdps(60):
        o = naive(arrays, mpmath.mpf, band)
    for arithmetic in (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic(60)):
        forward = evaluate(problem, arithmetic, gauges=True)
        assert enclosure_contains(forward["o"], o, OWN_ERROR).all()
        found = evaluate(GradientProblem(problem, forward, {"o": cotangent}), arithmetic)
        for name, expected in numerical.items():
            assert tuple(found[f"d{name}"].value.shape) == tuple(tensors[name].shape)
            assert enclosure_contains(found[f"d{name}"], expected, OWN_ERROR).all(), (arithmetic.name, name)
            for place in np.ndindex(*expected.shape):
                distance = Fraction(float(found[f"d{name}"].value[place])) - rationals[name][place]
                assert abs(distance) <= Fraction(float(found[f"d{name}"].radius[place]))
    transparent = problem.differentiate(MpmathArithmetic(60), {"o": cotangent})
    for name, expected in rationals.items():
        for place in np.ndindex(*expected.shape):
            assert Fraction(*to_rational(transparent[f"d{name}"][place]._mpf_)) == expected[place]


def test_nothing_outside_the_band_has_a_gradient_or_an_effect() -> None:
    t = drawn(shapes((2, 2, 6, 3)), torch.float32, seed=1)
    problem = EASY.problem(t["alpha"], t["v"], band=1)
    outside = (torch.arange(6)[:, None] - torch.arange(6)[None]).abs() > 1
    found = evaluate(GradientProblem(problem, {}, {"o": t["do"]}), EnclosureArithmetic())["dalpha"]
    assert not bool(found.value[:, outside].any())
    assert not bool(found.radius[:, outside].any())
    t["alpha"][:, outside] = torch.nan
    poisoned = EASY.problem(t["alpha"], t["v"], band=1)
    assert not bool(poisoned.undetermined().any())
    forward = evaluate(poisoned, EnclosureArithmetic())
    assert torch.equal(forward["o"].value, evaluate(problem, EnclosureArithmetic())["o"].value)
    assert not bool(poisoned.budgets(forward, Contract(family="easy"))["o"].open.any())
    leaking = Contract(family="easy", unseen_nonfinite="may-leak")
    assert bool(poisoned.budgets(forward, leaking)["o"].open.all())
    assert poisoned.nonfinite


def test_a_part_of_a_problem_gives_the_rows_of_the_whole() -> None:
    t = drawn(shapes((2, 2, 6, 3)), torch.float32, seed=1)
    problem = EASY.problem(t["alpha"], t["v"], band=2)
    whole = evaluate(problem, ArbArithmetic(128))["o"].value.reshape(-1, 3)
    rows = torch.zeros(problem.row_shape, dtype=torch.bool)
    rows[0, 1, 0] = rows[1, 0, 2:4] = True
    for part, index in problem.split(rows):
        assert torch.equal(evaluate(part, ArbArithmetic(128))["o"].value.reshape(-1, 3), whole[index])


def kernel(t: Mapping[str, torch.Tensor], band: int | None, broken: str = "") -> dict[str, torch.Tensor]:
    """Output and autograd gradients with float32 internals and one rounding."""
    alpha, v = t["alpha"].float().requires_grad_(), t["v"].float().requires_grad_()
    places = torch.arange(v.shape[2])
    width = v.shape[2] if band is None else band + (broken == "band")
    mask = (places[:, None] - places[None]).abs() <= width
    o = torch.where(mask, alpha, 0.0) @ v
    do = t["do"].float()
    dalpha, dv = torch.autograd.grad(o, (alpha, v), do)
    if broken == "batch":
        dalpha = torch.where(mask, do[0] @ v[0].mT, 0.0)
    if broken == "transpose":
        dv = torch.where(mask, alpha, 0.0) @ do
    found = {"o": o, "dalpha": dalpha, "dv": dv}
    return {name: x.detach().to(t["v"].dtype) for name, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_healthy_kernels_stay_within_the_certain_budget_and_near_the_probable_one(dtype: torch.dtype) -> None:
    squares: dict[str, list[float]] = {}
    for seed, sizes in enumerate([(3, 2, 67, 19), (1, 3, 9, 65), (5, 1, 130, 1)]):
        for band in (None, 3):
            for shift in (0.0, 1.0):
                t = drawn(shapes(sizes), torch.float64, seed)
                t = {name: (x + shift).to(dtype) for name, x in t.items()}
                problem = EASY.problem(t["alpha"], t["v"], band=band)
                for name, (worst, square) in judged(problem, t["do"], kernel(t, band)).items():
                    assert worst <= 1.0, (name, sizes, band, shift)
                    squares.setdefault(name, []).append(square)
    for name, values in squares.items():
        assert 0.1 <= math.sqrt(sum(values) / len(values)) <= 1.5, name


@pytest.mark.parametrize(("broken", "output"), [("batch", "dalpha"), ("transpose", "dv"), ("band", "o")])
@pytest.mark.parametrize("dtype", HALF)
def test_broken_kernels_exceed_the_certain_budget(broken: str, output: str, dtype: torch.dtype) -> None:
    t = drawn(shapes((3, 2, 20, 19)), dtype, seed=3)
    problem = EASY.problem(t["alpha"], t["v"], band=3)
    assert judged(problem, t["do"], kernel(t, 3, broken))[output][0] > 1.0


def test_cases_that_tell_nothing_are_vacuous() -> None:
    t = drawn(shapes((1, 2, 5, 2)), torch.float32, seed=5)

    def reasons(alpha: torch.Tensor, band: int | None) -> list[str]:
        problem = EASY.problem(alpha, t["v"], band=band)
        forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
        return problem.vacuity(forward, problem.budgets(forward, Contract(family="easy")))

    assert reasons(t["alpha"], 1) == []
    assert reasons(t["alpha"], 4) == ["mask: the band holds every score"]
    assert "mean of V" in reasons(torch.ones_like(t["alpha"]), None)[0]
    assert "zero" in reasons(torch.zeros_like(t["alpha"]), None)[0]


def test_a_row_is_explained_by_its_scores() -> None:
    t = drawn(shapes((1, 2, 5, 2)), torch.float32, seed=5)
    problem = EASY.problem(t["alpha"], t["v"], band=1)
    assert "sees 2 of 5 positions" in problem.explain_row("o", (0, 1, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"band": -1}, "band=-1"),
        ({"band": True}, "band=True"),
        ({"scale": 1.0}, "no option 'scale'"),
        ({"alpha": torch.ones(5, 5)}, r"alpha has shape \(5, 5\)"),
        ({"alpha": torch.ones(2, 5, 4)}, r"shape \(2, 5, 5\)"),
        ({"alpha": torch.ones(2, 5, 5).half()}, "one dtype"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    t = drawn(shapes((1, 2, 5, 2)), torch.float32, seed=5)
    alpha = change.pop("alpha", t["alpha"])
    with pytest.raises(ContractError, match=message):
        EASY.problem(alpha, t["v"], **change)
