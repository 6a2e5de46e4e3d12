"""Claims about linear attention, its kernel and what its state holds: oracles, counterexamples by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import flint
import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.claims import linear, linear_capacity, linear_kernel
from attnproof.properties.forms import linear as forms


def test_equal_forms_name_the_form_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = linear.equal_forms(7, ahead=True)
    wrong = {
        form for form, same in zip(finding.table["form"], finding.table["equal"], strict=True) if not same
    }
    assert finding.status == "REFUTED"
    assert wrong == {"parallel"}
    honest = forms.parallel
    monkeypatch.setattr(forms, "parallel", lambda q, k, *rest, **more: honest(q, k[::-1], *rest, **more))
    # Chunks are made of the parallel form too.
    assert "C = 3" in linear.equal_forms(7).evidence


def test_outputs_with_epsilon_by_hand() -> None:
    finding = linear.weights_sum_to_one()
    for phi, output in zip(finding.table["φ(q) = φ(k)"], finding.table["output with ε"], strict=True):
        assert output == pytest.approx(phi * phi / (phi * phi + 1e-6), rel=1e-12)
    assert finding.table["output without ε"] == [1.0] * 6


def test_where_elu_plus_one_is_zero() -> None:
    finding = linear.positive_in_float32()
    zero = [x for x, y in zip(finding.table["x"], finding.table["φ(x) in float32"], strict=True) if y == 0]
    assert -18.0 > max(zero) > -21.0
    x = torch.tensor(-18.0)
    assert float(torch.nn.functional.elu(x) + 1) == 0.0
    assert float(torch.nn.functional.elu(x)) == -1.0
    # A map that is 0 nowhere but 1e-30 too small would not be refuted: only zeros count.
    assert linear.positive_in_float32(lambda x: x.exp() * 0.5).status == "SUPPORTED"


def test_based_by_naive_sums() -> None:
    weight = [1 + Fraction(n, 7) + Fraction(n, 7) ** 2 / 2 for n in range(-60, 61)]
    assert min(weight) == Fraction(1, 2)
    assert linear.lower_bound((2, 1, flint.fmpq(1, 2))).status == "REFUTED"
    assert "minimum 0 at x = -2" in linear.lower_bound((1, 1, flint.fmpq(1, 4))).evidence


def test_widths_of_features_against_numpy() -> None:
    finding = linear.feature_widths()
    rng = np.random.default_rng(0)
    for d, rank in zip(finding.table["d"], finding.table["rank"], strict=True):
        q, k = rng.standard_normal((2, 40, d))
        x = q @ k.T
        assert np.linalg.matrix_rank(1 + x + x * x / 2) == rank
    assert linear.feature_widths(lambda d: 3).status == "REFUTED"


@pytest.mark.parametrize(
    ("name", "vanishes", "leaves"), [("identity", 1, 1), ("squared", 1, 0), ("taylor", 0, 0)]
)
def test_normalisers_by_naive_weights(name: str, vanishes: int, leaves: int) -> None:
    weight = {
        "identity": lambda x: x,
        "squared": lambda x: x * x,
        "taylor": lambda x: 1 + x + Fraction(x * x, 2),
    }
    points = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    zero = outside = 0
    for q in points:
        for one in points:
            for other in points:
                w = [Fraction(weight[name](q[0] * k[0] + q[1] * k[1])) for k in (one, other)]
                zero += sum(w) == 0
                outside += sum(w) != 0 and not 1 <= (w[0] + 2 * w[1]) / sum(w) <= 2
    assert (zero > 0, outside > 0) == (bool(vanishes), bool(leaves))
    assert linear.vanishing(name).table["normaliser 0"] == [zero]
    assert linear.averages(name).table["outside"] == [outside]


def test_counterexamples_of_normalisers_by_hand() -> None:
    assert linear.averages("identity").counterexample.startswith(
        "Values 1 and 2. q = (-1, -1), keys (-1, -1) and (0, 1): normaliser 1, output 0. q = (-1, -1), "
        "keys (-1, -1) and (1, 1)"
    )
    first, second = 2, -1
    assert (first + second, first * 1 + second * 2) == (1, 0)


def test_ratios_against_mpmath() -> None:
    finding = linear_kernel.ratios(linear_kernel.elu_weight)
    assert finding.table["at (t, −t)"][1] == 0.5
    for t, at, mirrored in zip(
        *(finding.table[name] for name in ("radius t", "at (t, t)", "at (t, −t)")), strict=True
    ):
        t = mpmath.mpf(t)
        assert at == pytest.approx(float(mpmath.exp(t * t) / (1 + t) ** 2), rel=1e-12)
        assert mirrored == pytest.approx(float(mpmath.exp(-t * t) / ((1 + t) * mpmath.exp(-t))), rel=1e-12)


def test_a_rescaled_exponential_approximates_it() -> None:
    assert linear_kernel.ratios(lambda q, k: 7 * linear_kernel.series(q, k)).status == "SUPPORTED"
    assert linear_kernel.ratios(lambda q, k: (q * k * 2).exp()).status == "REFUTED"


def test_a_row_of_elu_plus_one_does_not_see_its_query() -> None:
    def phi(x: float) -> float:
        return x + 1 if x > 0 else math.exp(x)

    for b in (0.3, 1.0, 3.0):
        rows = [[phi(q) * phi(b * k) for k in (1, -1)] for q in (-2.0, 0.5, 7.0)]
        assert len({round(row[0] / sum(row), 12) for row in rows}) == 1
    finding = linear_kernel.row_distance(linear_kernel.elu_weight)
    assert min(finding.table["distance of the worse row"]) > math.tanh(1) / 2


def test_determinants_by_a_theorem() -> None:
    # Vandermonde: Π_{i<j} (2^j − 2^i) for q_i = i, k_j = j log 2.
    n = 5
    exact = flint.fmpz_mat([[flint.fmpz(2) ** (i * j) for j in range(n)] for i in range(n)]).det()
    assert int(exact) == math.prod(2**j - 2**i for j in range(n) for i in range(j))
    with mpmath.workdps(200):
        points = [mpmath.mpf(2 * i - 7) / 7 for i in range(8)]
        due = mpmath.det(mpmath.matrix([[mpmath.exp(x * y) for y in points] for x in points]))
        assert linear_kernel.full_rank((8,)).table["determinant"][0] == pytest.approx(float(due), rel=1e-10)


def test_a_kernel_without_either_map_is_told_apart() -> None:
    # Of full rank, but not the exponential series.
    other = linear_kernel.separable(lambda q, k: (2 * q * k).exp())
    assert other.status == "SUPPORTED"
    assert linear_kernel.separable(linear_kernel.exponential).table["largest distance"][-1] < 1e-34


def test_recall_of_signs_by_naive_enumeration() -> None:
    # n = 2: the error is (k_1·k_2)² v_2: the mean of (Σ s/4)² over signs s is 1/4.
    total = Fraction(0)
    for bits in range(16):
        total += Fraction(sum(1 if bits >> i & 1 else -1 for i in range(4)), 4) ** 2
    assert total / 16 == Fraction(1, 4)
    assert linear_capacity.exact_recall_error(2) == flint.fmpq(1, 4)
    assert linear_capacity.exact_recall_error(2, tied=True) == flint.fmpq(3, 8)


def test_recall_and_the_kernel_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = forms.parallel
    monkeypatch.setattr(forms, "parallel", lambda q, k, v: honest(q, 2 * k, v))
    assert linear_capacity.recall_of_signs((2,)).status == "REFUTED"
    monkeypatch.setattr(forms, "parallel", lambda q, k, v: honest(q, 0 * k, v))
    assert linear_capacity.values_lost().status == "REFUTED"
    assert linear_capacity.recallable().status == "REFUTED"


def test_numbers_lost_against_numpy() -> None:
    k = np.array([[flint.fmpq(x) for x in row] for row in ((1, 2), (2, 4), (0, 1), (3, 5))], dtype=object)
    # V → KᵀV is Kᵀ ⊗ I: rank 2·3, of 4·3 numbers.
    assert linear_capacity.numbers_lost(k, 3) == 12 - np.linalg.matrix_rank(
        np.kron(k.astype(float).T, np.eye(3))
    )


def test_the_seed_count_by_hand() -> None:
    finding = linear_capacity.recall_of_seed()
    assert (finding.table["rank of K"], finding.table["lost"]) == ([2, 1], [76, 78])
    assert finding.table["claimed"] == [76, 76]


def test_two_prefixes_of_one_state_by_hand() -> None:
    # Keys (1, 0), (0, 1), (1, 1): S rows are v_1 + v_3 and v_2 + v_3.
    before, after = (3, 5, 7), (4, 6, 6)
    assert [before[0] + before[2], before[1] + before[2]] == [after[0] + after[2], after[1] + after[2]]
    assert "leaves the state as it is" in linear_capacity.recallable().evidence
