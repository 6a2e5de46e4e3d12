"""ReLU attention: the definition, its gradients, rational where they are polynomials, and their budgets."""

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
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.relu import RELU
from attnproof.properties.families.sigmoid import SIGMOID
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences
from tests.properties.test_sigmoid_family import (
    HALF,
    OWN_ERROR,
    REGIMES,
    SIZES,
    drawn,
    exact,
    in_regime,
    judged,
    rounded,
    shapes,
)

# Scores of float16 inputs of ordinary size are multiples of a far larger number, so that none is passed.
RATIONAL_STEP = Fraction(1, 2**120)


def naive(
    t: Mapping[str, Any],
    number: Callable[[float], Any],
    *,
    scale: float,
    causal: bool = False,
    normalizer: float | None = None,
    power: int = 1,
) -> Any:
    """o (B, H, M, E) by loops, Σ_j max(scale q·k_j, 0)^power v_j / normalizer, in ``number``'s type."""
    q, k, v = t["q"], t["k"], t["v"]
    batch, heads, m, width = q.shape
    groups, n = k.shape[1], k.shape[2]
    o = np.full((batch, heads, m, v.shape[3]), number(0.0), dtype=object)
    for b, h, i in np.ndindex(batch, heads, m):
        g = h * groups // heads
        for j in range(n):
            s = sum((q[b, h, i, d] * k[b, g, j, d] for d in range(width)), number(0.0)) * number(scale)
            if s <= 0 or (causal and j > i + n - m):
                continue
            for e in range(v.shape[3]):
                o[b, h, i, e] += s**power * v[b, g, j, e] / number(1.0 if normalizer is None else normalizer)
    return o


def rational(tensor: torch.Tensor) -> Any:
    """A tensor as an object array of fractions."""
    numbers = np.empty(tuple(tensor.shape), dtype=object)
    for place in np.ndindex(*numbers.shape):
        numbers[place] = Fraction(float(tensor[place]))
    return numbers


def exact_differences(
    loss: Callable[[Mapping[str, Any]], Fraction], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """Derivatives of a polynomial of degree ≤ 2 in each entry, whose central differences are exact."""
    gradients = {}
    for name, array in tensors.items():
        gradient = np.empty(array.shape, dtype=object)
        for place in np.ndindex(*array.shape):
            here = array[place]
            array[place] = here + RATIONAL_STEP
            above = loss(tensors)
            array[place] = here - RATIONAL_STEP
            gradient[place] = (above - loss(tensors)) / (2 * RATIONAL_STEP)
            array[place] = here
        gradients[name] = gradient
    return gradients


CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 2, 1, 2, 3, 2, 3), {"scale": 0.5}),
    ((1, 4, 2, 3, 2, 2, 1), {"scale": -0.25, "causal": True, "normalizer": 2.0}),
    ((1, 2, 2, 2, 4, 3, 2), {"scale": 1.0, "causal": True, "power": 2}),
    ((1, 1, 1, 4, 2, 1, 2), {"scale": -2.0, "causal": True, "power": 2, "normalizer": 0.5}),
    ((1, 2, 1, 3, 0, 2, 2), {"scale": 0.5}),
    ((1, 2, 1, 0, 3, 2, 2), {"scale": 0.5, "power": 2}),
]
UNEVEN = [
    (CASES[0][0], {"scale": 0.3, "normalizer": 3.7}),
    (CASES[1][0], {"scale": 0.7, "causal": True, "power": 2, "normalizer": 0.1}),
]


@pytest.mark.parametrize(("sizes", "options"), CASES + UNEVEN)
def test_definition_and_gradients_hold_against_loops_and_numerical_differentiation(
    sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    tensors = drawn(shapes(sizes), torch.float32, seed=sum(sizes))
    cotangent = tensors.pop("do")
    problem = RELU.problem(*tensors.values(), **options)
    weights, arrays = exact(cotangent), {name: exact(x) for name, x in tensors.items()}
    with mpmath.workdps(60):
        o = naive(arrays, mpmath.mpf, **options)
    gradients = central_differences(
        lambda t: (naive(t, mpmath.mpf, **options) * weights).sum() + mpmath.mpf(0), arrays
    )
    for arithmetic in (EnclosureArithmetic(), MpmathArithmetic(60)):
        forward = evaluate(problem, arithmetic, gauges=True)
        assert enclosure_contains(forward["o"], o, OWN_ERROR).all()
        found = evaluate(GradientProblem(problem, forward, {"o": cotangent}), arithmetic)
        for name, expected in gradients.items():
            assert enclosure_contains(found[f"d{name}"], expected, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((found[f"d{name}"].radius <= 1e-9).all())


@pytest.mark.parametrize(("sizes", "options"), CASES + UNEVEN)
def test_gradients_are_the_exact_rational_ones(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    tensors = drawn(shapes(sizes), torch.float16, seed=sum(sizes))
    cotangent = tensors.pop("do")
    problem = RELU.problem(*tensors.values(), **options)
    weights = rational(cotangent)
    expected = exact_differences(
        lambda t: (naive(t, Fraction, **options) * weights).sum() + Fraction(0),
        {name: rational(x) for name, x in tensors.items()},
    )
    proved = evaluate(GradientProblem(problem, {}, {"o": cotangent}), ArbArithmetic(128))
    transparent = problem.differentiate(MpmathArithmetic(60), {"o": cotangent})
    for name, array in expected.items():
        found = proved[f"d{name}"]
        for place in np.ndindex(*array.shape):
            distance = abs(Fraction(float(found.value[place])) - array[place])
            assert distance <= Fraction(float(found.radius[place])), (name, place)
            if (sizes, options) in CASES:
                assert Fraction(*to_rational(transparent[f"d{name}"][place]._mpf_)) == array[place]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_at_a_score_of_exactly_0_the_derivative_is_that_of_torch(power: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    q, k, v, do = (
        torch.randint(-2, 3, shape, generator=generator).double()
        for shape in shapes((2, 4, 2, 5, 7, 3, 2)).values()
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(2, 1) for x in leaves[1:])
    seen = torch.arange(7)[None] <= torch.arange(5)[:, None] + 2
    s = leaves[0] @ keys.mT * 0.5
    assert int((s == 0).sum()) > 20
    weights = torch.relu(s) ** power
    o = (torch.where(seen, weights, 0.0) if causal else weights) @ values / 4.0
    (o * do).sum().backward()
    problem = RELU.problem(q, k, v, scale=0.5, causal=causal, normalizer=4.0, power=power)
    forward = evaluate(problem, ArbArithmetic(128))
    assert torch.equal(forward["o"].value, o.detach())
    found = evaluate(GradientProblem(problem, forward, {"o": do}), ArbArithmetic(128))
    for name, leaf in zip("qkv", leaves, strict=True):
        assert torch.equal(found[f"d{name}"].value, leaf.grad)
        assert not bool(found[f"d{name}"].radius.any())


def test_scores_of_zero_vectors_leave_no_doubt_at_the_kink() -> None:
    t = drawn(shapes((1, 2, 1, 3, 4, 5, 2)), torch.float32, seed=2)
    t["q"][0, :, 1] = 0.0
    t["k"][0, 0, 2] = 0.0
    problem = RELU.problem(t["q"], t["k"], t["v"], scale=0.7)
    found = evaluate(GradientProblem(problem, {}, {"o": t["do"]}), EnclosureArithmetic())
    assert bool((found["dq"].radius < 1e-12).all())
    assert not bool(found["dq"].value[0, :, 1].any())
    assert not bool(found["dk"].value[0, 0, 2].any())


def kernel(
    t: Mapping[str, torch.Tensor],
    *,
    scale: float,
    causal: bool = False,
    normalizer: float | None = None,
    power: int = 1,
    early: bool = False,
    broken: str = "",
) -> dict[str, torch.Tensor]:
    """Output and gradients with float32 internals, P, dP and dS stored in the inputs' dtype.

    ``early`` applies 1/normalizer, and scale in the backward pass, before storage.
    """
    q, k, v, do = t["q"], t["k"], t["v"], t["do"]
    dtype, n, m, group = q.dtype, k.shape[2], q.shape[2], q.shape[1] // k.shape[1]
    qf, dof = q.float(), do.float()
    kf, vf = (x.float().repeat_interleave(group, 1) for x in (k, v))
    seen = torch.ones(m, n, dtype=torch.bool)
    if causal:
        seen = torch.arange(n)[None] <= torch.arange(m)[:, None] + n - m
    divisor = 1.0 if normalizer is None or broken == "normaliser forgotten" else normalizer
    s = qf @ kf.mT * scale
    r = s.clamp(min=0.0)
    step = (s >= 0.0 if broken == "step(0) = 1" else s > 0.0).float()
    p = torch.where(seen, r**power, 0.0)
    slope = torch.where(seen, step if power == 1 else 2.0 * r, 0.0)
    before, after = (divisor, 1.0) if early else (1.0, divisor)
    stretch = (scale, 1.0) if early else (1.0, scale)
    p = rounded(p / before, dtype)
    ds = rounded(slope * rounded(dof @ vf.mT, dtype) / before * stretch[0], dtype)
    dk = ds.mT @ qf * (1.0 if broken == "dk without scale" else stretch[1]) / after
    found = {"o": p @ vf / after, "dq": ds @ kf * stretch[1] / after, "dk": dk, "dv": p.mT @ dof / after}
    for name in ("dk", "dv"):
        x = found[name]
        found[name] = x.reshape(x.shape[0], k.shape[1], group, *x.shape[2:]).sum(2)
    return {name: x.to(dtype) for name, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("regime", REGIMES)
def test_healthy_kernels_stay_within_the_certain_budget_and_near_the_probable_one(
    dtype: torch.dtype, regime: str
) -> None:
    squares: dict[str, list[float]] = {}
    for seed, sizes in enumerate(SIZES):
        for options in ({}, {"power": 2, "normalizer": float(sizes[4])}, {"causal": sizes[4] >= sizes[3]}):
            t = in_regime(sizes, dtype, regime, seed)
            given: dict[str, Any] = {"scale": sizes[5] ** -0.5, **options}
            problem = RELU.problem(t["q"], t["k"], t["v"], **given)
            for early in {False, "normalizer" in options}:
                ratios = judged(problem, t["do"], kernel(t, early=early, **given))
                for name, (worst, square) in ratios.items():
                    assert worst <= 1.0, (name, sizes, given, early)
                    squares.setdefault(name, []).append(square)
    for name, values in squares.items():
        assert 0.1 <= math.sqrt(sum(values) / len(values)) <= 1.5, name


@pytest.mark.parametrize(
    ("broken", "output", "power"),
    [("normaliser forgotten", "o", 2), ("dk without scale", "dk", 1), ("step(0) = 1", "dq", 1)],
)
@pytest.mark.parametrize("dtype", HALF)
def test_broken_kernels_exceed_the_certain_budget(
    broken: str, output: str, power: int, dtype: torch.dtype
) -> None:
    t = in_regime(SIZES[0], dtype, "not centred", 3)
    t["q"][:, :, 3] = 0.0
    options: dict[str, Any] = {"scale": 0.2, "normalizer": 129.0, "power": power}
    problem = RELU.problem(t["q"], t["k"], t["v"], **options)
    assert judged(problem, t["do"], kernel(t, **options))[output][0] <= 1.0
    assert judged(problem, t["do"], kernel(t, broken=broken, **options))[output][0] > 1.0


def test_small_weights_that_are_subnormal_once_divided_are_within_the_budget() -> None:
    t = in_regime(SIZES[0], torch.float16, "normal", 4)
    options: dict[str, Any] = {"scale": 0.01, "normalizer": 5000.0}
    problem = RELU.problem(t["q"], t["k"], t["v"], **options)
    late, early = (judged(problem, t["do"], kernel(t, early=early, **options)) for early in (False, True))
    for name in late:
        assert late[name][0] <= 1.0
        assert early[name][0] <= 1.0


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 4, 2, 2), (1, 2, 1, 0, 4, 2, 2), (1, 2, 1, 3, 0, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_empty_calls_have_budgets_of_exact_zeros(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    t = drawn(shapes(sizes), dtype, seed=1)
    for problem in (
        SIGMOID.problem(t["q"], t["k"], t["v"], scale=0.5),
        RELU.problem(t["q"], t["k"], t["v"], scale=0.5, normalizer=3.0, power=2),
    ):
        forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
        gradients = GradientProblem(problem, forward, {"o": t["do"]})
        reference = evaluate(gradients, EnclosureArithmetic())
        budgets = gradients.budgets(reference, Contract(family="any"))
        for name, tensor in zip(("dq", "dk", "dv"), (t["q"], t["k"], t["v"]), strict=True):
            assert budgets[name].certain.shape == tensor.shape
            assert not bool(reference[name].value.any())
            assert bool((budgets[name].certain <= 1e-7).all())
        budget = problem.budgets(forward, Contract(family="any"))["o"]
        assert budget.certain.shape == forward["o"].value.shape
        assert bool(budget.literal[0.0].all()) == (sizes[4] == 0 or not budget.certain.numel())


def test_a_query_that_is_subnormal_once_scaled_is_within_the_budget() -> None:
    t = drawn(shapes((1, 1, 1, 4, 40, 4, 3)), torch.float64, seed=9)
    t = {name: (x * (2e-4 if name == "q" else 100.0 if name == "k" else 1.0)).half() for name, x in t.items()}
    scale = 2.0**-10
    problem = RELU.problem(t["q"], t["k"], t["v"], scale=scale)
    s = (t["q"].float() * scale).half().float() @ t["k"].float().mT
    p = s.clamp(min=0.0).half().float()
    dk = ((s > 0) * (t["do"].float() @ t["v"].float().mT)).half().float().mT
    dk = dk @ (t["q"].float() * scale).half().float()
    found = {"o": (p @ t["v"].float()).half(), "dk": dk.half(), "dv": (p.mT @ t["do"].float()).half()}
    ratios = judged(problem, t["do"], {"dq": torch.zeros_like(t["q"]), **found})
    assert all(ratios[name][0] <= 1.0 for name in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 1.0, "normalizer": 0.0}, "normalizer=0.0"),
        ({"scale": 1.0, "normalizer": "N"}, "normalizer='N'"),
        ({"scale": 1.0, "power": 3}, "power=3"),
        ({"scale": 1.0, "power": True}, "power=True"),
        ({"scale": 1.0, "bias": 0.0}, "no option 'bias'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    t = drawn(shapes((1, 2, 1, 4, 2, 2, 2)), torch.float32, seed=5)
    with pytest.raises(ContractError, match=message):
        RELU.problem(t["q"], t["k"], t["v"], **options)
