"""mLSTM with initial states and packed sequences: budgets of outputs and gradients, and torch's autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.contract import Contract
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.oracle import evaluate
from tests.properties.mlstm_calls import STATES, Bounds, call, chunks, cotangents_of, problem_of, steps
from tests.properties.test_sigmoid_family import HALF

CONTRACT = Contract(family="mlstm")
SIZES: list[tuple[tuple[int, ...], Bounds]] = [
    ((2, 2, 70, 5, 3), None),
    ((1, 2, 75, 4, 3), (0, 3, 3, 41, 75)),
]


def judged(
    t: Mapping[str, torch.Tensor], bounds: Bounds, found: Mapping[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """By output: the largest error/certain, and the mean square of error/probable."""
    problem, a, ratios = problem_of(t, bounds, 0.4), EnclosureArithmetic(), {}
    forward = evaluate(problem, a, gauges=True)
    gradients = GradientProblem(problem, forward, cotangents_of(t))
    reference = evaluate(gradients, a)
    budgets = {**problem.budgets(forward, CONTRACT), **gradients.budgets(reference, CONTRACT)}
    for name in (*problem.outputs, *gradients.outputs):
        exactly, budget = {**forward, **reference}[name], budgets[name]
        assert not bool(budget.open.any()), name
        limit = exactly.value.isinf()
        assert torch.equal(found[name][limit].double(), exactly.value[limit])
        error = torch.where(limit, 0.0, found[name].double() - exactly.value)
        worst = torch.where(error == 0, 0.0, error.abs() / budget.certain)
        square = torch.where(error == 0, 0.0, error / budget.probable).square()
        ratios[name] = (float(worst.max()), float(square.mean()))
    return ratios


@pytest.mark.parametrize(("sizes", "bounds"), SIZES)
def test_outputs_and_gradients_of_many_blocks_are_those_of_autograd(
    sizes: tuple[int, ...], bounds: Bounds
) -> None:
    t = call(sizes, bounds, torch.float64, seed=8, f=3.0)
    t["f"][..., 44] = -torch.inf
    problem, a, expected = problem_of(t, bounds, 0.4), EnclosureArithmetic(), steps(t, bounds, torch.float64)
    forward = evaluate(problem, a)
    gradients = evaluate(GradientProblem(problem, forward, cotangents_of(t)), a)
    for name, found in {**forward, **gradients}.items():
        value = expected[name]
        known = value.isfinite()
        assert torch.equal(found.value[~known], value[~known])
        value, found = value[known], Enclosure(found.value[known], found.radius[known])
        assert (found.value - value).abs().max() <= 1e-11 * value.abs().max(), name
        assert found.radius.max() <= 1e-11 * value.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_healthy_kernels_stay_within_the_certain_budget_and_near_the_probable_one(dtype: torch.dtype) -> None:
    squares: dict[str, list[float]] = {}
    for seed, (sizes, bounds) in enumerate(SIZES):
        for level, f in ((0.0, 1.0), (-20.0 if seed else 6.0, 4.0)):
            t = call(sizes, bounds, dtype, seed, level=level, f=f)
            for name, (worst, square) in judged(t, bounds, chunks(t, bounds, 32)).items():
                assert worst <= 1.0, (name, sizes, level)
                squares.setdefault(name, []).append(square)
    for name, values in squares.items():
        # n and its cotangent are counted as operands of matrix products, of which this form makes sums.
        least = 0.0 if name in ("n", "dinitial_n") else 0.05
        assert least <= math.sqrt(sum(values) / len(values)) <= 1.5, name


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_a_state_that_outweighs_the_positions_is_neither_over_nor_underestimated(
    dtype: torch.dtype,
) -> None:
    """All of o and dq is read of the initial state, which is rounded to the operands' format."""
    t = call((2, 1, 24, 16, 16), None, dtype, seed=1, level=8.0, f=8.0)
    t |= {name: 30.0 * t[name] for name in STATES}
    t |= {name: 0.0 * t[name] for name in ("dstate", "dn")}
    found = judged(t, None, chunks(t, None, 8))
    for name in ("o", "dq"):
        assert found[name][0] <= 1.0
        assert 0.3 <= math.sqrt(found[name][1]) <= 1.5, name


@pytest.mark.parametrize("level", [-90.0, 80.0])
@pytest.mark.parametrize("size", [1e-40, 1.0, 1e30])
def test_extreme_states_stay_within_the_budget(level: float, size: float) -> None:
    t = call((1, 2, 40, 4, 3), (0, 3, 40), torch.float32, seed=2, level=level, f=4.0)
    t |= {name: size * t[name] for name in STATES}
    for name, (worst, _) in judged(t, (0, 3, 40), steps(t, (0, 3, 40), torch.float32)).items():
        assert worst <= 1.0, name


@pytest.mark.parametrize(
    ("broken", "output"),
    [("leak", "o"), ("no initial n", "o"), ("level", "state"), ("level differentiated", "di")],
)
def test_broken_kernels_exceed_the_certain_budget(broken: str, output: str) -> None:
    bounds = (0, 3, 41, 75)
    t = call((1, 2, 75, 4, 3), bounds, torch.bfloat16, seed=3, level=1.0, f=4.0)
    assert judged(t, bounds, steps(t, bounds, torch.float32, broken))[output][0] > 1.0
