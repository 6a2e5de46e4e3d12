"""Sigmoid attention: the definition, its gradients and their budgets, against independent transcriptions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.budgets.base import Budget
from attnproof.properties.contract import Contract, ContractError, Precision
from attnproof.properties.families.base import Problem
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.sigmoid import SIGMOID
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences

# The numerical differentiation's own error, relative to gradients of order 1.
OWN_ERROR = 1e-30
HALF = (torch.float16, torch.bfloat16)
ANY = Contract(family="any")


def naive(
    t: Mapping[str, Any],
    *,
    scale: float,
    bias: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> Any:
    """o (B, H, M, E) by loops from the paper's formula, o_i = Σ_j v_j / (1 + e^−(scale q·k_j + b))."""
    q, k, v = t["q"], t["k"], t["v"]
    batch, heads, m, width = q.shape
    groups, n = k.shape[1], k.shape[2]
    o = np.full((batch, heads, m, v.shape[3]), mpmath.mpf(0), dtype=object)
    for b, h, i in np.ndindex(batch, heads, m):
        g = h * groups // heads
        for j in range(n):
            if causal and j > (i if top_left else i + n - m):
                continue
            s = sum((q[b, h, i, d] * k[b, g, j, d] for d in range(width)), mpmath.mpf(0)) * mpmath.mpf(scale)
            s += -mpmath.log(n) if bias is None else mpmath.mpf(bias)
            for e in range(v.shape[3]):
                o[b, h, i, e] += v[b, g, j, e] / (1 + mpmath.exp(-s))
    return o


def exact(tensor: torch.Tensor) -> Any:
    """A tensor as an object array of mpf."""
    numbers = np.empty(tuple(tensor.shape), dtype=object)
    for place in np.ndindex(*numbers.shape):
        numbers[place] = mpmath.mpf(float(tensor[place]))
    return numbers


def drawn(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Normal numbers of the shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def shapes(sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of q, k, v and do for B, H, G, M, N, D, E."""
    b, h, g, m, n, d, e = sizes
    return {"q": (b, h, m, d), "k": (b, g, n, d), "v": (b, g, n, e), "do": (b, h, m, e)}


CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 2, 1, 2, 3, 2, 3), {"scale": 0.7}),
    ((1, 4, 2, 3, 2, 2, 1), {"scale": -0.4, "causal": True, "bias": 0.3}),
    ((1, 2, 2, 2, 4, 3, 2), {"scale": 1.0, "causal": True}),
    ((1, 1, 1, 4, 2, 1, 2), {"scale": 2.0, "causal": True, "causal_alignment": "top-left"}),
    ((1, 2, 1, 2, 1, 2, 2), {"scale": 30.0, "bias": -60.0}),
    ((1, 2, 1, 3, 0, 2, 2), {"scale": 0.5}),
    ((1, 2, 1, 0, 3, 2, 2), {"scale": 0.5}),
]


@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_definition_and_gradients_hold_against_loops_and_numerical_differentiation(
    sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    tensors = drawn(shapes(sizes), torch.float32, seed=sum(sizes))
    cotangent = tensors.pop("do")
    problem = SIGMOID.problem(*tensors.values(), **options)
    loops = {key: value for key, value in options.items() if key != "causal_alignment"}
    loops["top_left"] = options.get("causal_alignment") == "top-left"
    weights = exact(cotangent)

    def loss(t: Mapping[str, Any]) -> Any:
        return (naive(t, **loops) * weights).sum() + mpmath.mpf(0)

    arrays = {name: exact(x) for name, x in tensors.items()}
    with mpmath.workdps(60):
        o = naive(arrays, **loops)
    gradients = central_differences(loss, arrays)
    for arithmetic in (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic(60)):
        forward = evaluate(problem, arithmetic, gauges=True)
        assert enclosure_contains(forward["o"], o, OWN_ERROR).all()
        found = evaluate(GradientProblem(problem, forward, {"o": cotangent}), arithmetic)
        for name, expected in gradients.items():
            assert found[f"d{name}"].value.shape == tensors[name].shape
            assert enclosure_contains(found[f"d{name}"], expected, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((found[f"d{name}"].radius <= 1e-9).all())


def test_a_part_of_a_problem_keeps_the_bias_of_the_whole() -> None:
    tensors = drawn(shapes((2, 2, 1, 3, 5, 2, 2)), torch.float32, seed=1)
    del tensors["do"]
    problem = SIGMOID.problem(*tensors.values(), scale=0.7, causal=True)
    whole = evaluate(problem, ArbArithmetic(128))["o"].value.reshape(-1, 2)
    rows = torch.zeros(problem.row_shape, dtype=torch.bool)
    rows[0, 1, 0] = rows[1, 0, :2] = True
    for part, index in problem.split(rows):
        assert torch.equal(evaluate(part, ArbArithmetic(128))["o"].value.reshape(-1, 2), whole[index])


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as ``dtype`` stores it."""
    return x.to(dtype).to(x.dtype)


def kernel(
    t: Mapping[str, torch.Tensor],
    *,
    scale: float,
    bias: float | None = None,
    causal: bool = False,
    stored: bool = True,
    kept: torch.dtype | None = None,
    broken: str = "",
) -> dict[str, torch.Tensor]:
    """Output and gradients with float32 internals; P, dP, dS stored in the inputs' dtype or as ``kept``."""
    q, k, v, do = t["q"], t["k"], t["v"], t["do"]
    dtype, n, m, group = q.dtype, k.shape[2], q.shape[2], q.shape[1] // k.shape[1]
    kept = kept or (dtype if stored else torch.float32)
    qf, dof = q.float(), do.float()
    kf, vf = (x.float().repeat_interleave(group, 1) for x in (k, v))
    seen = torch.ones(m, n, dtype=torch.bool)
    if causal:
        seen = torch.arange(n)[None] <= torch.arange(m)[:, None] + n - m
    b = -math.log(max(n, 1)) if bias is None else bias
    s = qf @ kf.mT * scale + (-b if broken == "sign of the bias" else b)
    p = torch.where(seen, torch.sigmoid(s), 0.0)
    slope = torch.where(seen, torch.sigmoid(s) * torch.sigmoid(-s), 0.0)
    p = rounded(p, torch.float32 if broken == "weights in full" else kept)
    if broken == "slope from the stored weights":
        slope = p * (1.0 - p)
    ds = rounded(slope * rounded(dof @ vf.mT, kept), kept)
    dk = ds.mT @ qf * (1.0 if broken == "dk without scale" else scale)
    found = {"o": p @ vf, "dq": ds @ kf * scale, "dk": dk, "dv": p.mT @ dof}
    for name in ("dk", "dv"):
        x = found[name]
        found[name] = x.reshape(x.shape[0], k.shape[1], group, *x.shape[2:]).sum(2)
    return {name: x.to(dtype) for name, x in found.items()}


def judged(
    problem: Problem,
    cotangent: torch.Tensor,
    found: Mapping[str, torch.Tensor],
    contract: Contract = ANY,
) -> dict[str, tuple[float, float]]:
    """By output: the largest error/certain, and the mean square of error/probable, of what is judged."""
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    gradients = GradientProblem(problem, forward, {"o": cotangent})
    reference = evaluate(gradients, EnclosureArithmetic())
    budgets: dict[str, Budget] = {
        **problem.budgets(forward, contract),
        **gradients.budgets(reference, contract),
    }
    ratios = {}
    for name, exactly in {**reference, "o": forward["o"]}.items():
        budget = budgets[name]
        assert not bool(budget.open.any())
        error = found[name].double() - exactly.value
        worst = torch.where(error == 0, 0.0, error.abs() / budget.certain)
        square = torch.where(error == 0, 0.0, error / budget.probable).square()
        ratios[name] = (float(worst.max()), float(square.mean()))
    return ratios


SIZES = [(1, 4, 2, 17, 129, 23, 19), (1, 2, 1, 5, 67, 64, 3), (1, 1, 1, 70, 9, 1, 33)]
REGIMES = ("normal", "not centred", "ones")


def in_regime(sizes: tuple[int, ...], dtype: torch.dtype, regime: str, seed: int) -> dict[str, torch.Tensor]:
    """Inputs whose errors average out, or, away from 0 or with a constant cotangent, do not."""
    t = drawn(shapes(sizes), torch.float64, seed)
    if regime != "normal":
        t = {name: x + 1.0 for name, x in t.items()}
    if regime == "ones":
        t["do"] = torch.ones_like(t["do"])
    return {name: x.to(dtype) for name, x in t.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("regime", REGIMES)
def test_healthy_kernels_stay_within_the_certain_budget_and_near_the_probable_one(
    dtype: torch.dtype, regime: str
) -> None:
    squares: dict[str, list[float]] = {}
    for seed, sizes in enumerate(SIZES):
        for options in ({}, {"bias": 0.3}, {"causal": sizes[4] >= sizes[3]}):
            t = in_regime(sizes, dtype, regime, seed)
            given = {"scale": sizes[5] ** -0.5, **options}
            for stored in (True, False):
                problem = SIGMOID.problem(t["q"], t["k"], t["v"], **given)
                ratios = judged(problem, t["do"], kernel(t, stored=stored, **given))
                for name, (worst, square) in ratios.items():
                    assert worst <= 1.0, (name, sizes, given, stored)
                    if stored:
                        squares.setdefault(name, []).append(square)
    # Measured: 0.2 to 1.0.
    for name, values in squares.items():
        assert 0.1 <= math.sqrt(sum(values) / len(values)) <= 1.5, name


@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_errors_that_all_terms_share_are_in_the_probable_budget(kept: str) -> None:
    """Constant values make all dP of a row alike: 1,600 errors of dQ's sum are one error 1,600 times."""
    contract = Contract(family="any", precision=Precision(dscores=kept))
    t = drawn(shapes((1, 2, 1, 16, 1600, 3, 2)), torch.float32, seed=0)
    t["v"], t["k"] = torch.full_like(t["v"], 1.3), t["k"] + 1.0
    problem = SIGMOID.problem(t["q"], t["k"], t["v"], scale=0.5)
    found = kernel(t, scale=0.5, kept=getattr(torch, kept), broken="weights in full")
    ratios = judged(problem, t["do"], found, contract)
    assert all(worst <= 1.0 and square <= 3.0 for worst, square in ratios.values()), ratios


@pytest.mark.parametrize(
    ("broken", "output", "bias"),
    [
        ("sign of the bias", "o", None),
        ("dk without scale", "dk", None),
        ("slope from the stored weights", "dq", 6.0),
    ],
)
@pytest.mark.parametrize("dtype", HALF)
def test_broken_kernels_exceed_the_certain_budget(
    broken: str, output: str, bias: float | None, dtype: torch.dtype
) -> None:
    t = in_regime(SIZES[0], dtype, "not centred", 3)
    options = {"scale": 0.2, "bias": bias}
    problem = SIGMOID.problem(t["q"], t["k"], t["v"], **options)
    assert judged(problem, t["do"], kernel(t, **options))[output][0] <= 1.0
    assert judged(problem, t["do"], kernel(t, broken=broken, **options))[output][0] > 1.0


def test_edges_of_rows_without_keys_and_of_unseen_values_that_are_not_finite() -> None:
    t = drawn(shapes((1, 2, 1, 4, 2, 2, 2)), torch.float32, seed=5)
    t["v"][0, 0, 1, 0] = torch.nan
    problem = SIGMOID.problem(t["q"], t["k"], t["v"], scale=1.0, causal=True)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    assert problem.nonfinite
    assert problem.undetermined()[0, 0].tolist() == [False, False, False, True]
    isolated = problem.budgets(forward, Contract(family="sigmoid"))["o"]
    assert isolated.literal[0.0][0, 0, :, 0].tolist() == [True, True, False, False]
    assert isolated.open[0, 0, :, 0].tolist() == [False, False, False, True]
    leaking = problem.budgets(forward, Contract(family="sigmoid", unseen_nonfinite="may-leak"))["o"]
    assert bool(leaking.open.all())
    assert not bool(leaking.literal[0.0].any())
    gradients = GradientProblem(problem, forward, {"o": t["do"]})
    reference = evaluate(gradients, EnclosureArithmetic())
    assert bool(gradients.budgets(reference, Contract(family="sigmoid"))["dq"].open.all())


def test_cases_that_tell_nothing_are_vacuous() -> None:
    t = drawn(shapes((1, 2, 1, 4, 6, 2, 2)), torch.float32, seed=5)

    def reasons(**options: Any) -> list[str]:
        problem = SIGMOID.problem(t["q"], t["k"], t["v"], **{"scale": 1.0, **options})
        forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
        return problem.vacuity(forward, problem.budgets(forward, Contract(family="sigmoid")))

    assert reasons() == []
    assert "mean of V" in reasons(scale=0.0)[0]
    assert "zero" in reasons(bias=-200.0)[0]
    t["q"] = t["q"][:, :, :1]
    assert reasons(causal=True) == ["mask: every query sees every key"]


def test_a_row_is_explained_by_its_keys() -> None:
    t = drawn(shapes((1, 2, 1, 4, 2, 2, 2)), torch.float32, seed=5)
    problem = SIGMOID.problem(t["q"], t["k"], t["v"], scale=1.0, causal=True)
    assert problem.explain_row("o", (0, 1, 0)) == "row (batch 0, head 1, query 0) sees no key"
    assert "sees 1 of 2 keys" in problem.explain_row("o", (0, 1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": torch.nan}, "scale="),
        ({"scale": 1.0, "bias": torch.ones(())}, "bias="),
        ({"scale": 1.0, "causal_alignment": "left"}, "causal_alignment='left'"),
        ({"scale": 1.0, "window": (1, 1)}, "window"),
        ({}, "needs scale"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    t = drawn(shapes((1, 2, 1, 4, 2, 2, 2)), torch.float32, seed=5)
    with pytest.raises(ContractError, match=message):
        SIGMOID.problem(t["q"], t["k"], t["v"], **options)
