"""Windows of softmax attention on the sphere against quadrature, drawn points and closed forms."""

from __future__ import annotations

import flint
import mpmath
import numpy as np
import pytest
from scipy import integrate, special

from attnproof.properties.claims import in_context, in_context_limits, window_exponents
from attnproof.properties.forms import kernel_window


def average(d: int, w: float, f) -> float:
    """Mean of f(t), t = x·q, under weights e^(w t) on the sphere, by quadrature."""

    def density(t: float) -> float:
        return (1 - t * t) ** ((d - 3) / 2) * np.exp(w * (t - 1))

    return integrate.quad(lambda t: f(t) * density(t), -1, 1)[0] / integrate.quad(density, -1, 1)[0]


@pytest.mark.parametrize("d", [3, 4, 7])
@pytest.mark.parametrize("w", [1.0, 12.0])
def test_bias_and_noise_by_quadrature(d, w) -> None:
    assert kernel_window.mean_direction(d, w) == pytest.approx(average(d, w, lambda t: t), rel=1e-9)
    plain = [average(d, 0, lambda t, k=k: np.exp(k * w * (t - 1))) for k in (1, 2)]
    assert kernel_window.variance_factor(d, w) == pytest.approx(plain[1] / plain[0] ** 2, rel=1e-9)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_harmonics_of_the_rectified_class(d) -> None:
    power = kernel_window.rectified_spectrum(d, 400)
    assert power.sum() == pytest.approx(1 / (2 * d), rel=1e-5)
    # Degree 4 by quadrature of its Gegenbauer (on the circle: Chebyshev) polynomial, of value 1 at 1.
    if d == 2:
        zonal, count = special.chebyt(4), 2
    else:
        raw = special.gegenbauer(4, (d - 2) / 2)
        zonal, count = raw / raw(1), 9 if d == 3 else 55
    theta = (np.arange(20000) + 0.5) * np.pi / 20000
    t, weight = np.cos(theta), np.sin(theta) ** (d - 2)
    coefficient = (np.maximum(t, 0) * zonal(t) * weight).sum() / weight.sum()
    assert power[4] == pytest.approx(coefficient**2 * count, rel=1e-3)


def test_bias_of_the_rectified_class_against_drawn_points() -> None:
    rng = np.random.default_rng(1)
    d, w = 3, 8.0
    x, q = kernel_window.sphere(rng, 100_000, d), np.array([0.0, 0.0, 1.0])
    p = np.exp(w * (x @ q - 1))
    p /= p.sum()
    squares = []
    for a in kernel_window.sphere(rng, 150, d):
        squares.append((p @ np.maximum(x @ a, 0) - max(q @ a, 0)) ** 2)
    mean, error = np.mean(squares), np.std(squares) / len(squares) ** 0.5
    assert abs(kernel_window.rectified(d, w) - mean) < 4 * error + 3e-4


def test_bias_of_the_cone() -> None:
    def integral(f):
        return mpmath.quad(lambda u: f(u) * u * (2 - u) * mpmath.exp(-300 * u), [0, 0.01, 0.05, 0.2, 2])

    ratio = integral(lambda u: mpmath.sqrt(2 * u)) / integral(lambda u: 1)
    assert kernel_window.cone(5, 300.0) == pytest.approx(float(ratio**2), rel=1e-12)
    assert kernel_window.cone(3, 300.0) == pytest.approx(np.pi / 600, rel=1e-12)
    with pytest.raises(ValueError, match="beyond the sphere"):
        kernel_window.cone(5, 20.0)


def test_width_formula_and_minimum() -> None:
    # In d = 3 the formula is exact up to e^(−2w).
    assert kernel_window.optimal_width(kernel_window.affine, 3, 1e6, 0.5) == pytest.approx(
        kernel_window.width_formula(3, 1e6, 0.5), rel=1e-5
    )
    x = np.linspace(-1, 1, 9)
    assert kernel_window.best_log_width(x, np.exp((x - 0.3) ** 2)) == pytest.approx(0.3, abs=1e-9)


def test_curves_are_the_error_of_the_prediction() -> None:
    widths = np.array([1.0, 6.0])
    biases, variances = kernel_window.window_curves(np.random.default_rng(2), 3, 5, widths, 1)
    x = kernel_window.sphere(np.random.default_rng(2), 5, 3)
    for i, w in enumerate(widths):
        p = special.softmax(w * x[:, 0])
        assert variances[0, i] == pytest.approx((p**2).sum())
        # Mean over directions a, of |a| = 1: the three axes stand for all.
        assert biases[0, i] == pytest.approx(np.mean([(p @ x[:, j] - (j == 0)) ** 2 for j in range(3)]))


def test_every_wrong_exponent_is_refuted() -> None:
    for name in ("affine", "rectified", "cone at the query"):
        for offset in {1, 2, 3} - {window_exponents._EXPONENTS[name]}:
            assert window_exponents.exponents((3,), (1e4, 1e5), {name: offset}).status == "REFUTED"


def test_intervals_exclude_other_exponents() -> None:
    few = ((3, (1000, 8000), (40, 20)),)
    assert in_context.measured_exponent(few).status == "SUPPORTED"
    for offset in (2, 4):
        assert in_context.measured_exponent(few, offset).status == "REFUTED"


def test_mismatch_is_one_on_the_diagonal() -> None:
    table = in_context.mismatch(20, 200).table
    same = [
        r
        for a, b, r in zip(
            *(table[c] for c in ("trained at L", "tested at L", "ratio of errors")), strict=True
        )
        if a == b
    ]
    assert same == [1.0] * 4


def test_the_floor_is_below_the_least_error_and_near_it() -> None:
    floor, other = in_context_limits.langevin_floor()
    rho = (np.arange(4000) + 0.5) / 4000
    errors = [np.mean((1 / np.tanh(w * rho) - 1 / (w * rho) - rho) ** 2) for w in np.linspace(0.3, 60, 800)]
    assert 0.7 * min(errors) < floor < min(errors)
    assert (1 - 1 / np.tanh(32) + 1 / 32) ** 2 / 3 <= other


def test_losses_of_the_full_matrix_by_a_plain_loop() -> None:
    found = in_context_limits.projection_losses("sphere", 4, 2, 6, 1, 9, noise=0.5)
    rng = np.random.default_rng(9)
    x, q = kernel_window.sphere(rng, 6, 4), kernel_window.sphere(rng, 4)
    p = special.softmax(2 * x @ q)
    error = sum((p @ x[:, j] - q[j]) ** 2 for j in range(2)) / 2 + 0.25 * (p**2).sum()
    assert found[0, -1, 0] == pytest.approx(error)
    M = np.diag([1, 1, 0, 0])
    p = special.softmax(2 * x @ M @ q)
    error = sum((p @ x[:, j] - q[j]) ** 2 for j in range(2)) / 2 + 0.25 * (p**2).sum()
    assert found[0, 0, 0] == pytest.approx(error)


def test_the_exact_noise_factor_in_three_dimensions() -> None:
    for w in (1.0, 30.0):
        assert kernel_window.variance_factor(3, w / 2) == pytest.approx(w / 2 / np.tanh(w / 2), rel=1e-12)


def test_points_on_the_sphere_are_on_it() -> None:
    rows = in_context_limits._on_the_sphere(np.array([[flint.fmpq(1, 3), flint.fmpq(-2)]], dtype=object))
    assert sum(x * x for x in rows[0]) == 1


def test_a_prediction_that_is_not_odd_is_found(monkeypatch) -> None:
    honest = in_context_limits._linear
    monkeypatch.setattr(in_context_limits, "_linear", lambda x, y, M, q: abs(honest(x, y, M, q)))
    assert in_context_limits.even_functions(6).status == "REFUTED"
