"""Jacobians of self-attention against finite differences and torch, bounds against what breaks them."""

from __future__ import annotations

import math
from fractions import Fraction

import flint
import numpy as np
import pytest
import torch

from attnproof.properties.claims import jacobian_norms, sigmoid_jacobian, softmax_jacobian
from attnproof.properties.claims.jacobian_norms import Instance, two_groups

WEIGHTINGS = ("sigmoid", "softmax")


def dense(x, a, w, weighting: str) -> np.ndarray:
    """The Jacobian by torch's own differentiation."""
    a, w, tokens = (torch.as_tensor(y, dtype=torch.float64) for y in (a, w, x))

    def attend(tokens: torch.Tensor) -> torch.Tensor:
        scores = tokens @ a @ tokens.T
        p = (
            torch.softmax(scores, 1)
            if weighting == "softmax"
            else torch.sigmoid(scores - math.log(len(tokens)))
        )
        return p @ tokens @ w.T

    size = tokens.numel()
    return torch.autograd.functional.jacobian(attend, tokens).reshape(size, size).numpy()


def instance(n: int, d: int, seed: int = 0) -> Instance:
    rng = np.random.default_rng(seed)
    return Instance(rng.standard_normal((n, d)), rng.standard_normal((d, d)), rng.standard_normal((d, d)))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (4, 1), (3, 2), (2, 3)])
def test_the_jacobian(n: int, d: int, weighting) -> None:
    case = instance(n, d)
    expected = dense(case.x, case.a, case.w, weighting)
    found, *_ = jacobian_norms.jacobian(case, weighting)
    np.testing.assert_allclose(found.astype(float), expected, rtol=1e-12, atol=1e-13)
    in_balls, *_ = jacobian_norms.jacobian(case.in_balls(), weighting)
    assert all(
        abs(float(ball.mid()) - y) < 1e-12 for ball, y in zip(in_balls.flat, expected.flat, strict=True)
    )


def test_an_enclosure_of_a_norm_holds_it_and_is_narrow() -> None:
    # Singular values 5 and 1 by construction: rotations by 3-4-5 angles, and eigenvalues that are equal.
    c, s = flint.arb(3) / 5, flint.arb(4) / 5
    turn = np.array([[c, -s], [s, c]], dtype=object)
    matrix = (
        turn @ np.array([[flint.arb(5), flint.arb(0)], [flint.arb(0), flint.arb(1)]], dtype=object) @ turn
    )
    found = jacobian_norms.spectral_norm(matrix)
    assert 5 in found
    assert float(found.rad()) < 1e-12
    assert 1 in jacobian_norms.spectral_norm(turn)


def test_a_norm_of_a_matrix_without_a_rank() -> None:
    zero = np.array([[flint.arb(0)] * 2] * 2, dtype=object)
    assert float(jacobian_norms.spectral_norm(zero)) == 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("factor", [1, -1])
@pytest.mark.parametrize(
    ("a", "b", "copies"), [(0.5, 1.5, (3, 1)), (2.0, -2.0, (7, 5)), (1.25, 1.0, (4, 0)), (1, 2, (1, 1))]
)
def test_groups_of_equal_tokens_against_the_whole_matrix(a, b, copies, factor, weighting) -> None:
    x = np.array([[a]] * copies[0] + [[b]] * copies[1], dtype=float)
    matrix = dense(x, [[factor]], [[1.0]], weighting)
    norm, entry = two_groups(flint.arb(a), flint.arb(b), copies, weighting, factor)
    assert float(norm.mid()) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-12)
    if copies[1]:
        assert float(entry.mid()) == pytest.approx(matrix[0, -1], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("bound", [sigmoid_jacobian.attained, sigmoid_jacobian.without_length])
def test_bounds_of_sigmoid_by_hand(bound) -> None:
    # One token x: ‖J‖ = w(σ + 2σ'ax²); the bound with n is equal to it.
    case = Instance(np.array([[1.5]]), np.array([[0.75]]), np.array([[-2.0]]))
    s = 1 / (1 + math.exp(-0.75 * 2.25))
    norm = 2 * (s + 2 * s * (1 - s) * 0.75 * 2.25)
    limit = norm if bound is sigmoid_jacobian.attained else 2 * math.exp(0.75 * 2.25) * (1 + 2 * 0.75 * 2.25)
    assert float(jacobian_norms.enclosed_ratio(case, "sigmoid", bound).mid()) == pytest.approx(
        norm / limit, rel=1e-12
    )


def test_climbs_climb_and_repeat() -> None:
    bound = sigmoid_jacobian.without_length
    starts = list(jacobian_norms.climbed("sigmoid", bound, 4, 0, 1))
    ends = list(jacobian_norms.climbed("sigmoid", bound, 4, 20, 1))
    before, after = (
        [float(jacobian_norms.enclosed_ratio(case, "sigmoid", bound).mid()) for case in cases]
        for cases in (starts, ends)
    )
    assert after[0] > before[0]
    again = list(jacobian_norms.climbed("sigmoid", bound, 4, 20, 1))
    assert all(np.array_equal(x.x, y.x) for x, y in zip(ends, again, strict=True))


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_a_bound_a_little_lower_is_broken(share: float) -> None:
    # At one token of width 1 the bound is attained.
    finding = sigmoid_jacobian.bounded(lambda q: share * sigmoid_jacobian.attained(q), starts=3, steps=2)
    assert finding.status == ("REFUTED" if share < 1 else "SUPPORTED")
    assert bool(finding.counterexample) == (share < 1)


def test_the_entry_that_no_constant_bounds() -> None:
    finding = sigmoid_jacobian.globally_lipschitz(radii=(1, 7, 100))
    for r, entry in zip(*finding.table.values(), strict=True):
        assert entry == pytest.approx(
            dense([[0.0], [float(r)]], [[1.0]], [[1.0]], "sigmoid")[0, 0], rel=1e-12
        )


def test_the_bound_of_softmax_from_below() -> None:
    finding = sigmoid_jacobian.lower_bound(radii=(2, 4))
    assert finding.status == "HOLDS"
    tokens = [[2.0]] * math.ceil(math.exp(4)) + [[4.0]]
    norm = np.linalg.norm(dense(tokens, [[1.0]], [[1.0]], "softmax"), 2)
    assert finding.table["norm of the Jacobian"][1] == pytest.approx(norm, rel=1e-10)
    assert finding.table["bound"][1] == pytest.approx(1.5 * math.exp(2), rel=1e-14)


@pytest.mark.parametrize(("factor", "proved"), [(Fraction(99, 100), True), (Fraction(101, 100), False)])
def test_polynomials_of_the_tail_decide_sharply(factor: Fraction, proved: bool) -> None:
    assert sigmoid_jacobian._tail_is_positive(factor) is proved


def test_bernstein_coefficients() -> None:
    # x² − x + 1 = 1·B0 + ½·B1 + 1·B2 of degree 2.
    assert sigmoid_jacobian._bernstein(flint.fmpq_poly([1, -1, 1])) == [1, flint.fmpq(1, 2), 1]


def test_equal_tokens_of_sigmoid() -> None:
    finding = sigmoid_jacobian.exponential_growth((2, 16, 20))
    for r, n, sigmoid, softmax in zip(*finding.table.values(), strict=True):
        tokens = [[r]] * int(n)
        assert np.linalg.norm(dense(tokens, [[1.0]], [[1.0]], "sigmoid"), 2) == pytest.approx(
            sigmoid, rel=1e-12
        )
        assert softmax == pytest.approx(1.0)


def test_a_formula_that_is_wrong_does_not_refute(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = two_groups
    monkeypatch.setattr(sigmoid_jacobian, "two_groups", lambda *x: tuple(y / 1024 for y in honest(*x)))
    assert sigmoid_jacobian.exponential_growth().status == "SUPPORTED"
    assert sigmoid_jacobian.lower_bound().status == "REFUTED"


def test_neither_jacobian_is_always_the_smaller() -> None:
    finding = sigmoid_jacobian.smaller_than_softmax()
    assert finding.status == "CONDITIONAL"
    assert finding.table["norm, sigmoid"][0] == pytest.approx(0.8 + 0.32 * math.log(4), rel=1e-12)
    x = [[2.0]] * 63 + [[-2.0]]
    for weighting in WEIGHTINGS:
        expected = np.linalg.norm(dense(x, [[1.0]], [[1.0]], weighting), 2)
        assert finding.table[f"norm, {weighting}"][1] == pytest.approx(expected, rel=1e-10)
    assert sigmoid_jacobian.smaller_than_softmax(Fraction(100000)).status == "REFUTED"


def test_bounds_of_softmax_by_hand() -> None:
    # A = 0: J = 11ᵀ/n, of norm 1, and the bounds are √(3n) and 1.
    case = Instance(np.array([[0.5], [-1.0], [2.0]]), np.array([[0.0]]), np.array([[1.0]]))
    ratios = [
        float(jacobian_norms.enclosed_ratio(case, "softmax", bound).mid())
        for bound in (softmax_jacobian.of_tokens, softmax_jacobian.mean_field)
    ]
    assert ratios == pytest.approx([1 / 3, 1.0], rel=1e-12)
    case = Instance(np.array([[1.5]]), np.array([[2.0]]), np.array([[3.0]]))
    ratios = [
        float(jacobian_norms.enclosed_ratio(case, "softmax", bound).mid())
        for bound in (softmax_jacobian.of_tokens, softmax_jacobian.mean_field)
    ]
    r = 1.5
    assert ratios == pytest.approx(
        [1 / math.sqrt(3 * (4 * r**4 * 5 + 1)), 1 / ((1 + 3 * 2 * r**2) * math.exp(4 * r**2))], rel=1e-12
    )


@pytest.mark.parametrize("bound", [softmax_jacobian.of_tokens, softmax_jacobian.mean_field])
def test_a_crowd_or_a_climb_breaks_a_lower_bound(bound) -> None:
    assert softmax_jacobian.kept(bound, 2, 2).status == "SUPPORTED"
    assert softmax_jacobian.kept(lambda q: bound(q) / 1000, 2, 2).status == "REFUTED"
