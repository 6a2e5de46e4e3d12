"""Selective scans and theorem 1: exact forms against naive sums, checks against broken forms."""

from __future__ import annotations

import math

import flint
import numpy as np
import pytest

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims import mamba, scans
from attnproof.properties.forms import mamba as forms
from attnproof.properties.forms.numbers import rationals


def test_the_matrix_of_a_scan_is_its_sum_over_paths() -> None:
    rng = np.random.default_rng(1)
    a, b, C = (rationals(rng, 5, 2) for _ in range(3))
    M = forms.matrix(a, b, C)
    for t in range(5):
        for s in range(5):
            due = flint.fmpq(0)
            if s <= t:
                for n in range(2):
                    product = flint.fmpq(1)
                    for r in range(s + 1, t + 1):
                        product = product * a[r, n]
                    due = due + C[t, n] * product * b[s, n]
            assert M[t, s] == due


def test_scans_take_as_many_rounds_as_they_should() -> None:
    depth = forms.doubling([1] * 9, lambda x, y: max(x, y) + 1)
    assert max(depth) == 1 + math.ceil(math.log2(9))
    assert max(forms.tree([1] * 64, lambda x, y: max(x, y) + 1)) <= 2 * 6 + 1
    assert forms.sequential([1] * 9, lambda x, y: max(x, y) + 1)[-1] == 9


def test_scans_keep_the_order_of_their_operands() -> None:
    letters = list("abcdefghijk")
    due = ["abcdefghijk"[: i + 1] for i in range(11)]
    for scan in (forms.sequential, forms.doubling, forms.tree):
        assert scan(letters, lambda x, y: x + y) == due
        assert scan(letters[:1], lambda x, y: x + y) == ["a"]


def test_the_numbers_of_the_theorem_by_python() -> None:
    finding = mamba.gate_theorem(hold=False)
    row = finding.table["z"].index("7/10")
    g, h, x = 1 / (1 + math.exp(-0.7)), 0.4, 1.3
    assert finding.table["h by the theorem"][row] == pytest.approx((1 - g) * h + g * x)
    assert finding.table["h by the SSM"][row] == pytest.approx((1 - g) * h + math.log1p(math.exp(0.7)) * x)
    assert finding.status == "REFUTED"
    assert "the theorem gives 0.50000000, the SSM 0.69314718" in finding.counterexample


def test_the_gain_of_either_discretisation() -> None:
    with _precision(128):
        for z in (-3.0, 0.5, 40.0):
            held, shipped = (mamba._gain(hold, flint.arb(z)) for hold in (True, False))
            assert float(held.mid()) == pytest.approx(1 / (1 + math.exp(-z)), rel=1e-14)
            assert float(shipped.mid()) == pytest.approx(math.log1p(math.exp(z)), rel=1e-14)


def test_theorem_1_needs_its_discretisation(monkeypatch) -> None:
    assert mamba.gate_theorem().status == "HOLDS"
    honest = mamba._gain
    monkeypatch.setattr(mamba, "_gain", lambda hold, z: honest(hold, z) * (1 + flint.arb(2) ** -200))
    assert mamba.gate_theorem().status == "REFUTED"
    monkeypatch.undo()
    monkeypatch.setattr(mamba, "_is_identity", lambda: (True, False))
    assert mamba.gate_theorem().status == "OPEN"


def test_wide_balls_prove_nothing(monkeypatch) -> None:
    honest = mamba._gain
    monkeypatch.setattr(mamba, "_gain", lambda hold, z: honest(hold, z) + flint.arb(0, 1e-20))
    assert mamba.gate_theorem().status == "OPEN"


def test_forms_of_the_scan_that_are_off(monkeypatch) -> None:
    honest = forms.products_up_to
    monkeypatch.setattr(forms, "products_up_to", lambda x: honest(x) * 2)
    finding = mamba.equal_forms(5)
    wrong = [f for f, same in zip(finding.table["form"], finding.table["equal"], strict=True) if not same]
    # A single chunk has no state before it.
    assert finding.status == "REFUTED"
    assert "chunks of 1" in wrong
    assert "chunks of 5" not in wrong
    assert any("handed" in name for name in wrong)


def test_a_convolution_is_a_toeplitz_matrix() -> None:
    assert mamba._is_toeplitz(np.array([[1, 0], [2, 1]]))
    assert not mamba._is_toeplitz(np.array([[1, 0], [2, 3]]))
    finding = mamba.time_invariance(4)
    assert finding.table["matrix is Toeplitz"] == [True, False, False, False]


def test_decays_of_the_wrong_sign_are_found(monkeypatch) -> None:
    monkeypatch.setattr(flint.ctx, "prec", 64)
    assert mamba.exponential_decay(2).status == "HOLDS"
    assert mamba.exponential_decay(2, doubled=True).status == "REFUTED"


def test_operators_that_look_alike() -> None:
    def dual(x, y):
        return x[0] * y[0], x[0] * y[1] + y[0] * x[1]

    assert scans.associativity().status == "HOLDS"
    # Dual numbers: associative with the same neutral element, but another product.
    assert scans.associativity(dual).status == "HOLDS"
    assert scans.prefixes((3,), dual).status == "REFUTED"
    assert scans.associativity(lambda x, y: (x[0] * y[0], x[1] - y[1])).status == "REFUTED"


def test_squaring_a_decay_doubles_its_error() -> None:
    once = np.float32(1 - 2.0**-13)
    assert float(once * once) == 1 - 2.0**-12
    by_tree = {
        one.length: one.error
        for n in (65, 257)
        for one in scans.measured(float(once), n, impulse=True)
        if one.scan == "tree"
    }
    # 2^k squarings of a relative error 2^−26: in units of 2^−24, T/8.
    assert by_tree[65] == pytest.approx(8, rel=0.1)
    assert by_tree[257] == pytest.approx(32, rel=0.1)


def test_measured_errors_are_those_of_fractions() -> None:
    found = scans.measured(0.75, 8, impulse=True)
    assert {one.scan for one in found} == {"in sequence", "doubling", "tree"}
    assert all(one.error == 0 and one.last == one.exact == 0.75**7 for one in found)


def test_statuses_of_rounding_follow_the_errors(monkeypatch) -> None:
    def at(error):
        return lambda decay, length, impulse: [scans.Scanned(str(decay), "tree", length, error, 1.0, 1.0)]

    for error, status in ((1.0, "SUPPORTED"), (1e3, "REFUTED")):
        monkeypatch.setattr(scans, "measured", at(error))
        assert scans.rounding((64,)).status == status
    monkeypatch.undo()
    assert scans.rounding((512,)).status == "CONDITIONAL"
