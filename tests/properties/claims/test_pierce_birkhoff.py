"""The steps of the counterexample to Pierce–Birkhoff against independent computations."""

from __future__ import annotations

import itertools
from fractions import Fraction

import flint
import numpy as np
import pytest

from attnproof.properties.claims import pierce_birkhoff
from attnproof.properties.claims.base import ClaimFinding


def test_determinants_by_expansion() -> None:
    matrices = np.random.default_rng(0).integers(-4, 5, (20, 5, 5))
    exact = [int(flint.fmpz_mat(m.tolist()).det()) for m in matrices]
    assert pierce_birkhoff.determinants(matrices).tolist() == exact


def test_corners_are_all_corners_up_to_conjugation() -> None:
    values = pierce_birkhoff.determinants(pierce_birkhoff._corners(4))
    rng = np.random.default_rng(1)
    matrices = rng.choice([-1, 1], (500, 5, 5))
    matrices[:, range(5), range(5)] = 4
    assert set(pierce_birkhoff.determinants(matrices).tolist()) <= set(values.tolist())
    assert values.min() == 0


@pytest.mark.parametrize(("factor", "status"), [(5, "HOLDS"), (4, "HOLDS"), (3, "REFUTED")])
def test_four_is_the_least_integer_factor(factor, status) -> None:
    assert pierce_birkhoff.continuity(factor).status == status


def test_h_and_f_by_loops() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        X, Y = (m + m.T for m in rng.integers(-3, 4, (2, 5, 5)))
        X, Y = X + 20 * np.eye(5, dtype=int), Y + 15 * np.eye(5, dtype=int)
        P = X @ Y
        h = min(P[i, i] + s * 4 * P[i, j] for i, j in itertools.permutations(range(5), 2) for s in (1, -1))
        det = int(flint.fmpz_mat(X.tolist()).det())
        f = int(h) if h > 0 and det > 0 else 0
        found = pierce_birkhoff.proposed(flint.fmpq_mat(X.tolist()), flint.fmpq_mat(Y.tolist()))
        assert found == (f, int(h), det)


def test_rank_by_elimination_of_rationals_in_a_smaller_case(monkeypatch) -> None:
    # Size 3 and D, E of rank 1, where all points are rational and the elimination is over ℚ.
    monkeypatch.setattr(pierce_birkhoff, "SIZE", 3)
    monkeypatch.setattr(
        pierce_birkhoff, "_PAIRS", tuple(itertools.combinations_with_replacement(range(3), 2))
    )
    rng = np.random.default_rng(3)
    rows = [pierce_birkhoff._orbit_row(rng, (1, 0, 0), (0, 1, 0)) for _ in range(120)]
    assert all(zero for _, zero in rows)
    prime = flint.nmod_mat(120, 91, [x for row, _ in rows for x in row], pierce_birkhoff.PRIME).rank()
    rng, exact = np.random.default_rng(4), []
    while len(exact) < 120:
        U = flint.fmpq_mat(rng.integers(-9, 10, (3, 3)).tolist())
        if U.det() == 0:
            continue
        V = U.inv()
        u, v = [U[i, 0] for i in range(3)], [V[1, i] for i in range(3)]
        pairs = list(itertools.combinations_with_replacement(range(3), 2))
        z = [flint.fmpq(1), *(u[i] * u[j] for i, j in pairs), *(v[i] * v[j] for i, j in pairs)]
        exact.append([z[i] * z[j] for i, j in itertools.combinations_with_replacement(range(13), 2)])
    assert flint.fmpq_mat(exact).rank() == prime


def test_points_off_the_orbit_do_not_count(monkeypatch) -> None:
    honest = pierce_birkhoff._orbit_row

    def shifted(*x):
        row, zero = honest(*x)
        return [(y * y + i) % pierce_birkhoff.PRIME for i, y in enumerate(row)], zero

    monkeypatch.setattr(pierce_birkhoff, "_orbit_row", shifted)
    assert pierce_birkhoff.quadrics_on_the_orbit(500).status == "REFUTED"


def test_too_few_points_prove_nothing() -> None:
    assert pierce_birkhoff.quadrics_on_the_orbit(470).status == "REFUTED"


def test_the_pair_at_one_seventh() -> None:
    U = flint.fmpq_mat([[int(j <= i) for j in range(5)] for i in range(5)])
    for eta, value in ((1, Fraction(1, 49)), (-1, Fraction(0))):
        X, Y = pierce_birkhoff._pair(U, flint.fmpq(1, 7), eta, eta)
        f, h, determinant = pierce_birkhoff.proposed(X, Y)
        assert Fraction(int(f.p), int(f.q)) == value
        assert h == flint.fmpq(1, 49)
        assert determinant == flint.fmpq(eta, 7**5)
        assert (X - X.transpose()).rank() == (Y - Y.transpose()).rank() == 0


@pytest.mark.parametrize("step", ["continuity", "perturbation", "quadrics_on_the_orbit"])
def test_the_conjecture_falls_only_with_every_step(monkeypatch, step) -> None:
    for name in ("continuity", "perturbation", "quadrics_on_the_orbit"):
        monkeypatch.setattr(
            pierce_birkhoff, name, lambda *x, **more: ClaimFinding("HOLDS", "as it should be")
        )
    assert pierce_birkhoff.conjecture().status == "REFUTED"
    monkeypatch.setattr(pierce_birkhoff, step, lambda *x, **more: ClaimFinding("REFUTED", "broken"))
    assert pierce_birkhoff.conjecture().status == "OPEN"
