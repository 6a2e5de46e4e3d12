"""The support-vector expansion: the exact solver against scipy's, its conditions, and worlds without them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import minimize

from attnproof.properties.claims import primal_dual, support_vectors
from attnproof.properties.claims.support_vectors import Regression

TUBE = Fraction(1, 50)


def by_scipy(problem: Regression) -> np.ndarray:
    """The dual's multipliers, α and α̃ apart, by sequential quadratic programming."""
    gram = np.array([[float(x) for x in row] for row in problem.gram()])
    y, n = np.array([float(x) for x in problem.targets]), len(problem.keys)

    def loss(x):
        beta = x[:n] - x[n:]
        return beta @ gram @ beta / 2 - y @ beta + float(problem.tube) * x.sum()

    constraint = {"type": "eq", "fun": lambda x: x[:n].sum() - x[n:].sum()}
    found = minimize(
        loss,
        np.zeros(2 * n),
        bounds=[(0.0, float(problem.bound))] * (2 * n),
        constraints=[constraint] if problem.intercept else [],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x[:n] - found.x[n:]


@pytest.mark.parametrize("intercept", [True, False])
def test_the_solver_against_a_numerical_one(intercept: bool) -> None:
    for drawn in primal_dual.instances(5):
        problem = replace(drawn, intercept=intercept)
        beta, b = support_vectors.solve(problem)
        assert intercept or b == 0
        assert [float(x) for x in beta] == pytest.approx(by_scipy(problem), abs=2e-4)


def test_two_keys_by_hand() -> None:
    # β = (t, −t): t (K₁₁ + K₂₂ − 2K₁₂) = y₁ − y₂ − 2ε, cut off at C.
    problem = Regression(((0,), (1,)), (Fraction(1), Fraction(0)), Fraction(100), TUBE)
    # κ = ((1, 1), (1, 2)), h = (2, 3).
    curvature = Fraction(1, 4) + Fraction(2, 9) - 2 * Fraction(1, 6)
    t = (1 - 2 * TUBE) / curvature
    assert support_vectors.solve(problem)[0] == (t, -t)
    assert support_vectors.solve(replace(problem, bound=Fraction(1)))[0] == (1, -1)


def test_targets_within_the_tube_need_no_support_vector() -> None:
    problem = Regression(((0,), (1,)), (TUBE / 2, -TUBE / 2), Fraction(1), TUBE)
    assert support_vectors.solve(problem) == ((0, 0), 0)


def test_each_condition_can_fail() -> None:
    problem = next(primal_dual.instances(1, bound=Fraction(100)))
    beta, b = support_vectors.solve(problem)
    assert all(support_vectors.conditions(problem, beta, b).values())

    def failed(x, c=problem):
        return {name for name, kept in support_vectors.conditions(c, x, b).items() if not kept}

    assert "equality" in failed((beta[0] + 1, *beta[1:]))
    assert "box" in failed(beta, replace(problem, bound=max(map(abs, beta)) / 2))
    assert {"complementarity", "no duality gap"} <= failed(tuple(2 * x for x in beta))
    assert failed((Fraction(0),) * 3) >= {"complementarity"}


def test_attention_against_floats() -> None:
    weights = np.exp(np.log(2.0) * np.array([0.0, 1.0, 3.0]))
    expected = weights @ np.array([1.0, 2.0, -1.0]) / weights.sum()
    exact = support_vectors.attention(
        tuple(map(Fraction, (1, 2, 8))), (Fraction(1), Fraction(2), Fraction(-1))
    )
    assert float(exact) == pytest.approx(expected, rel=1e-15)


def test_any_values_have_a_regression() -> None:
    problem = next(primal_dual.instances(1))
    values = (Fraction(1), Fraction(-3), Fraction(1, 2))
    made, beta, b = support_vectors.for_values(problem, values)
    assert support_vectors.solve(made) == (beta, b)
    # Attention's values are v_j again once b, a shift of all values, is added.
    assert tuple(x / made.h(key) + b for x, key in zip(beta, made.keys, strict=True)) == values


def test_the_expansion_by_an_explicit_weight() -> None:
    # Keys 0 and 1, queries 0 … 3: Φ in the span of the keys' features, κ = LLᵀ with L = ((1, 0), (1, 1)).
    problem = Regression(((0,), (1,)), (Fraction(1), Fraction(0)), Fraction(1), TUBE)
    beta, b = support_vectors.solve(problem)
    features = np.array([[1, 0], [1, 1]])
    w = sum(
        x * features[j] / problem.h(key) for j, (x, key) in enumerate(zip(beta, problem.keys, strict=True))
    )
    for j, key in enumerate(problem.keys):
        assert w @ features[j] / problem.h(key) + b == support_vectors.expansion(problem, beta, b, key)


def test_statuses_and_their_opposites() -> None:
    assert primal_dual.expansion_is_attention(2).status == "HOLDS"
    assert primal_dual.solved(3, Fraction(1)).status == "HOLDS"
    assert primal_dual.in_the_dual(5).table["kept"] == [0, 0]
    assert primal_dual.any_values(4).status == "CONDITIONAL"
    assert primal_dual.any_values(4, share=Fraction(2)).status == "HOLDS"


def test_a_solution_that_is_not_optimal_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = support_vectors.solve
    monkeypatch.setattr(primal_dual, "solve", lambda problem: (solve(problem)[0], Fraction(9)))
    assert primal_dual.solved(2).status == "REFUTED"


def test_dropped_keys_by_hand() -> None:
    # Weights 1/2, 1, 2 at q = 1, values ∓2/7: (2 − 1/2)·2/7 over 7/2 with the middle key, over 5/2 without.
    told = primal_dual.dropped_keys(4).counterexample
    assert "is optimal" in told
    assert str(Fraction(3, 7) / Fraction(7, 2)) in told
    assert str(Fraction(3, 7) / Fraction(5, 2)) in told


def test_what_one_function_needs() -> None:
    told = primal_dual.any_values(2).counterexample
    assert "b = 2/5" in told
    assert "(6/5, -6/5)" in told
