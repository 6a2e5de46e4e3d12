"""State space models: the exact forms against other computations, and each check against a broken form."""

from __future__ import annotations

import cmath
import importlib
import math

import flint
import numpy as np
import pytest
from scipy.linalg import expm

from attnproof.properties.claims import generating_functions, hippo, s4d, state_space
from attnproof.properties.forms import base
from attnproof.properties.forms import hippo as matrices
from attnproof.properties.forms import state_space as forms
from attnproof.properties.forms.numbers import Gaussian, rationals

MODULES = (
    "state_space",
    "generating_functions",
    "hippo",
    "s4d",
    "h3",
    "mamba",
    "scans",
    "ssd",
    "segment_sums",
)


class Quick:
    """The least work."""

    effort = "quick"

    def choose(self, quick, default, thorough=None):
        return quick


@pytest.mark.parametrize("name", MODULES)
def test_findings_are_plain_data(name) -> None:
    claims = importlib.import_module(f"attnproof.properties.claims.{name}").CLAIMS
    assert claims
    for claim in claims:
        finding = claim.check(Quick())
        assert len({len(column) for column in finding.table.values()}) <= 1, claim.id
        cells = [x for column in finding.table.values() for x in column]
        assert all(type(x) in (bool, int, float, str) for x in cells), claim.id
        for plot in finding.plots:
            axes = {plot.x, plot.y} | ({plot.color} if plot.color else set()) | set(plot.log)
            assert axes <= set(plot.columns), claim.id
            assert len({len(column) for column in plot.columns.values()}) == 1
            assert max(len(column) for column in plot.columns.values()) <= 400


def system(size: int = 3):
    rng = np.random.default_rng(5)
    return rationals(rng, size, size), rationals(rng, size), rationals(rng, size), flint.fmpq(2, 7)


def test_solving_is_flints() -> None:
    A, B, _, _ = system(4)
    due = flint.fmpq_mat([list(row) for row in A]).solve(flint.fmpq_mat([[x] for x in B]))
    assert list(forms.solve(A, B)) == due.entries()
    A[0, 0] = A[0, 0] * 0  # a pivot further down
    assert base.difference(A @ forms.solve(A, B), B) == 0
    A[3] = A[0] + A[1]
    with pytest.raises(ZeroDivisionError, match="no pivot in column 3"):
        forms.solve(A, B)


def test_the_bilinear_rule_is_the_trapezoidal_one() -> None:
    A, B, _, delta = system()
    discrete, gain = forms.bilinear(A, B, delta)
    x, u = B * 3 + 1, flint.fmpq(5, 2)
    after = discrete @ x + gain * u
    # x' = Ax + Bu, by the mean of both ends.
    assert base.difference(after - x, delta / 2 * (A @ x + A @ after) + delta * B * u) == 0


def test_convolutions_are_products_of_polynomials() -> None:
    rng = np.random.default_rng(6)
    taps, u = rationals(rng, 5), rationals(rng, 5)
    product = (flint.fmpq_poly(list(taps)) * flint.fmpq_poly(list(u))).coeffs()
    product += [flint.fmpq(0)] * (10 - len(product))
    assert list(forms.convolved(taps, u)) == product[:5]
    assert list(forms.wrapped(taps, u)) == [product[i] + product[i + 5] for i in range(5)]
    assert list(forms.convolved(taps[:2], u)) == [taps[0] * u[0], *(taps[0] * u[1:] + taps[1] * u[:-1])]


def test_the_kernel_is_the_answer_to_an_impulse_and_its_sum_a_value_of_its_polynomial() -> None:
    A, B, C, delta = system()
    discrete = forms.bilinear(A, B, delta)
    impulse = np.array([flint.fmpq(int(t == 0)) for t in range(6)], dtype=object)
    taps = forms.kernel(*discrete, C, 6)
    assert list(forms.recurrent(*discrete, C, impulse)[0]) == list(taps)
    z = flint.fmpq(3, 5)
    assert forms.generating(taps, z) == flint.fmpq_poly(list(taps))(z)


def test_a_state_carries_a_sequence_on() -> None:
    A, B, C, delta = system()
    discrete, u = forms.bilinear(A, B, delta), rationals(np.random.default_rng(7), 8)
    whole, last = forms.recurrent(*discrete, C, u)
    first, half = forms.recurrent(*discrete, C, u[:3])
    second, end = forms.recurrent(*discrete, C, u[3:], half)
    assert list(whole) == [*first, *second]
    assert list(last) == list(end)


def test_the_cauchy_form_is_the_resolvents() -> None:
    rng = np.random.default_rng(8)
    poles, P, Q, B, row = (rationals(rng, 3) for _ in range(5))
    A, delta, z = np.diag(poles) - np.outer(P, Q), flint.fmpq(1, 3), flint.fmpq(1, 5)
    found = forms.cauchy_form(poles, P, Q, B, row, delta, z)
    assert found == forms.resolvent_form(A, B, row, delta, z)
    alone = forms.cauchy_form(poles, P, Q, B, row, delta, z, keep=False)
    assert alone == forms.resolvent_form(np.diag(poles), B, row, delta, z) != found


def test_printed_legs_and_its_rational_coordinates() -> None:
    size = 5
    roots = np.sqrt(2 * np.arange(size) + 1.0)
    printed = np.tril(-np.outer(roots, roots), -1) - np.diag(np.arange(size) + 1.0)
    scaled, similar = matrices.legs_scaled(size).astype(float), matrices.legs(size).astype(float)
    assert np.allclose(roots[:, None] * scaled * roots, printed)
    assert np.allclose(roots[:, None] * similar / roots, printed)
    assert np.allclose([[float(x.mid()) for x in row] for row in matrices.balls(size)], printed)
    normal = printed + 0.5 * np.outer(roots, roots)
    assert np.allclose(normal + normal.T, -np.eye(size))
    assert np.allclose(roots[:, None] * matrices.legs_normal(size).astype(float) / roots, normal)


def test_binomial_eigenvectors() -> None:
    V = matrices.eigenvectors(9)
    assert all(V[i, j] == (math.comb(i + j, i - j) if j <= i else 0) for i, j in np.ndindex(9, 9))
    assert [matrices.largest_entry(n) for n in range(1, 10)] == [int(max(V[n])) for n in range(9)]
    # 95 is the smallest size with an entry above 2^(4N/3), by Python's own binomials.
    above = [
        n for n in range(1, 100) if max(math.comb(n - 1 + j, n - 1 - j) for j in range(n)) ** 3 > 2 ** (4 * n)
    ]
    assert above[0] == 95
    assert "exceeded from N = 95 on" in hippo.largest_against(4, 3, range(1, 100)).evidence


def test_s4ds_transfer_function_in_floating_point() -> None:
    size, s = 6, 0.5 + 2j
    roots = np.sqrt(2 * np.arange(size) + 1.0)
    printed = np.tril(-np.outer(roots, roots), -1) - np.diag(np.arange(size) + 1.0)
    full = np.linalg.solve(s * np.eye(size) - printed, roots)
    kept = np.linalg.solve(s * np.eye(size) - printed - 0.5 * np.outer(roots, roots), roots / 2)
    q = np.prod([(s - k + 1) / (s + k) for k in range(1, size + 1)])
    assert np.allclose(kept, full / (1 + q))
    assert s4d._defect(2, flint.fmpq(1, 2)) == flint.fmpq(1, 3) * flint.fmpq(-1, 5)


def test_kernels_at_a_time_are_scipys() -> None:
    with state_space._precision(256):
        full, kept = s4d._kernel_at(5, flint.fmpq(1, 2), 2)
    assert float(full.mid()) == pytest.approx(expm(matrices.legs(5).astype(float) / 2)[0].sum())
    assert float(kept.mid()) == pytest.approx(expm(matrices.legs_normal(5).astype(float) / 2)[0].sum() / 2)


def test_conjugate_pairs_by_complex_numbers() -> None:
    poles, B, C = [0.5 + 0.25j], [1 - 2j], [3 + 1j]
    full = sum(c * p**4 * b for p, b, c in zip(poles, B, C, strict=True))
    both = full + sum(
        c.conjugate() * p.conjugate() ** 4 * b.conjugate() for p, b, c in zip(poles, B, C, strict=True)
    )
    assert cmath.isclose(both, 2 * full.real)
    assert s4d._conjugate(Gaussian(flint.fmpq(2), flint.fmpq(3))) == Gaussian(flint.fmpq(2), flint.fmpq(-3))


def test_an_error_of_a_transform_is_measured_and_not_bounded_away() -> None:
    finding = state_space.transform_error((64,))
    assert 1e-4 < finding.table["share of the bound"][0] < 1
    assert state_space.transform_error((64,), padded=False).table["share of the bound"][0] > 1e6


def test_a_zero_order_hold_is_told_from_eulers_gain() -> None:
    assert state_space.sampling(((1, 2),)).status == "HOLDS"
    found = state_space.sampling(((1, 2),), hold=False)
    assert found.table["apart"] == [True, True]
    assert found.counterexample.startswith("LegS of N = 2")


def test_forms_that_are_off_are_found(monkeypatch) -> None:
    honest = forms.corrected_row
    monkeypatch.setattr(forms, "corrected_row", lambda A, C, length: honest(A, C, length - 1))
    assert generating_functions.generating_function((2,)).status == "REFUTED"
    assert generating_functions.literal_formula((2,)).status == "REFUTED"
    assert generating_functions.woodbury(1).status == "REFUTED"
    monkeypatch.undo()
    other = forms.kernel
    monkeypatch.setattr(forms, "kernel", lambda A, B, C, length: other(A, A @ B, C, length))
    assert state_space.recurrence_is_convolution(4).status == "REFUTED"


def test_balls_at_other_roots_find_a_formula_that_is_off(monkeypatch) -> None:
    assert generating_functions.generating_function((3,)).status == "HOLDS"
    honest = forms.resolvent_form
    tiny = flint.fmpq(1, 10**40)
    monkeypatch.setattr(forms, "resolvent_form", lambda *x: honest(*x) + tiny)
    assert generating_functions.generating_function((3,)).status == "REFUTED"


def test_matrices_that_are_not_hippos_are_found(monkeypatch) -> None:
    honest = matrices.legs_normal
    monkeypatch.setattr(
        matrices, "legs_normal", lambda size: honest(size) + matrices.table(size, lambda n, k: 1)
    )
    assert s4d.transfer_ratio((2,)).status == "REFUTED"
    monkeypatch.undo()
    wrong = {"LegS": (matrices.legs_scaled, flint.fmpq(1, 3), True, 1)}
    monkeypatch.setattr(matrices, "CONGRUENT", wrong)
    assert hippo.normal_plus_low_rank((3,)).status == "REFUTED"


def test_the_literal_lemma_fails_by_its_signs_too() -> None:
    # Without the roots, in rational coordinates: V does not diagonalise these either.
    assert hippo.diagonalised(matrices.legs, (2,)).status == "REFUTED"
    assert hippo.corrected((3,)).status == "HOLDS"


def test_semidefiniteness() -> None:
    assert hippo._is_semidefinite(flint.fmpq_mat([[1, 1], [1, 1]]))
    assert not hippo._is_semidefinite(flint.fmpq_mat([[1, 2], [2, 1]]))
    assert not hippo._is_semidefinite(flint.fmpq_mat([[-1, 0], [0, -1]]))


def test_a_limit_that_is_reached_everywhere_would_be_supported(monkeypatch) -> None:
    assert s4d.limit((4, 8)).status == "CONDITIONAL"
    monkeypatch.setattr(s4d, "_kernel_at", lambda size, t, divisor: (flint.arb(1), 1 + flint.arb(2) ** -size))
    assert s4d.limit((4, 8)).status == "SUPPORTED"


def test_sums_of_the_last_row() -> None:
    assert [sum(hippo._last_row(n)) for n in range(1, 8)] == [1, 2, 5, 13, 34, 89, 233]


def test_inverse_coefficients_are_binomials() -> None:
    finding = hippo.inverse_coefficients((5,))
    assert finding.table["bits of the largest coefficient"] == [math.comb(8, 4).bit_length()]
    assert math.comb(8, 4) == max(math.comb(4 + i, i) for i in range(5))


def test_the_law_of_eigenvalues_by_numpys_general_solver() -> None:
    finding = s4d.eigenvalue_law((16,))
    found = np.linalg.eigvals(matrices.legs_normal(16).astype(float))
    assert np.allclose(found.real, -0.5)
    assert finding.table["largest Im λ"] == pytest.approx([math.sqrt(3) / 2, found.imag.max()])
    assert finding.table["by the law"][0] == pytest.approx(2 / math.pi)
    both = s4d.eigenvalue_law((16, 64))
    assert both.status == "CONDITIONAL"
    assert f"N = 16, n = 3: {np.sort(found.imag)[::-1][3]:.6g}, " in both.counterexample


def test_the_sum_at_minus_one_by_hand() -> None:
    A, B, C = np.array([[-1.0, 0.0], [-1.0, -2.0]]), np.ones(2), np.array([4.0, -2.0]) / 7
    told = generating_functions.literal_formula((2,)).counterexample
    assert "A = (-1, 0; -1, -2), B = (1, 1), C = (4/7, -2/7), Δ = 1, L = 2" in told
    left = np.linalg.inv(np.eye(2) - A / 2)
    step, gain = left @ (np.eye(2) + A / 2), left @ B
    assert C @ gain - C @ step @ gain == pytest.approx(2 / 21)
    assert "the sum is 2/21" in told
