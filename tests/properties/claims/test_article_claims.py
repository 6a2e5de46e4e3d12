"""The source articles' claims against computations by other means, and in worlds in which they are true."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import flint
import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.claims import (
    article_context,
    article_flash,
    article_linear,
    article_sigmoid,
    article_splines,
    article_states,
    source_articles,
)
from attnproof.properties.claims.base import ClaimFinding

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


# Log-sum-exp


@pytest.mark.parametrize("name", DTYPES)
def test_underflow_and_overflow_as_torch_rounds(name: str) -> None:
    for x in (*range(-120, 0), 5, 11, 12, 88, 89):
        rounded = torch.tensor(math.exp(x), dtype=torch.float64).to(DTYPES[name])
        assert article_flash.underflows(x, name) == (float(rounded) == 0.0)
        assert article_flash.overflows(flint.arb(x).exp(), name) == bool(rounded.isinf())


def test_the_first_terms_lost() -> None:
    finding = article_flash.lost_terms(120)
    assert finding.table["first lost"] == [-18, -93, -104]
    assert article_flash.lost_terms(17).status == "HOLDS"


def test_the_shift_is_what_prevents_overflow() -> None:
    assert article_flash.harmless([(1000, 1000), (0, -1)]).status == "HOLDS"
    finding = article_flash.harmless([(0, -1), (89, 0)], shifted=False)
    assert finding.table["overflows"] == ["none", "float16, bfloat16, float32"]


def test_a_loss_that_is_not_small_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(article_flash, "underflows", lambda x, name: x < -2)
    assert article_flash.harmless([(0, -3)]).status == "REFUTED"


# Feature maps, states


def test_similarities_against_torch() -> None:
    for q, k in itertools.product(range(-3, 4), repeat=2):
        phi = [
            float(torch.nn.functional.elu(torch.tensor(float(x), dtype=torch.float64)) + 1) for x in (q, k)
        ]
        assert float(article_linear.elu_similarity(q, k).mid()) == pytest.approx(phi[0] * phi[1], rel=1e-12)
        series = sum((q * k) ** m / math.factorial(m) for m in range(6))
        assert float(article_linear.taylor_similarity(5)(q, k).mid()) == pytest.approx(
            series, rel=1e-12, abs=1e-12
        )


def test_a_short_series_is_no_approximation_far_out() -> None:
    assert article_linear.ratio_spread(article_linear.taylor_similarity(80), 3).status == "HOLDS"
    assert article_linear.ratio_spread(article_linear.taylor_similarity(20), 6).status == "REFUTED"


def test_ranks_of_kernels() -> None:
    assert article_linear.exponential_rank(6, article_linear._power)
    assert not article_linear.exponential_rank(6, lambda i, j: flint.arb(1 + i * j))


def test_dimensions_lost_against_numpy() -> None:
    finding = article_linear.kept([(2, False), (3, True)])
    assert finding.table["dimensions lost"] == [76, 177]
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((40, 2))
    # V ↦ KᵀV on vectors of 80 numbers.
    whole = np.kron(keys.T, np.eye(2))
    assert whole.shape[1] - np.linalg.matrix_rank(whole) == 76


def test_degrees_of_composed_steps() -> None:
    assert article_linear.composed(4, degrees=(1, 2, 3)).table["degree of all steps"] == [1, 16, 81]
    assert article_linear.composed(3, degrees=(1,)).status == "HOLDS"


def test_nearest_neighbours_by_hand() -> None:
    # Weights 8/15, 4/15, 2/15, 1/15 against (1/2, 1/2, 0, 0).
    finding = article_linear.neighbours((1,))
    assert finding.table["closest k"] == [2]
    expected = (Fraction(8, 15) - Fraction(1, 2)) + Fraction(2, 15) + Fraction(1, 15)
    assert finding.table["distance"] == [pytest.approx(float(expected))]


def test_softmax_is_a_gaussian_smoother_in_floats() -> None:
    keys, q = np.array([(3.0, 4.0), (5.0, 0.0), (-4.0, 3.0)]), np.array([1.0, -1.0])
    dots, far = np.exp(keys @ q), np.exp(-((keys - q) ** 2).sum(axis=1) / 2)
    np.testing.assert_allclose(dots / dots.sum(), far / far.sum())
    assert article_linear.smoother().status == "HOLDS"
    assert article_linear.smoother(one_norm=False).status == "REFUTED"


# State space models


def test_filters_against_numpy() -> None:
    taps, u = [Fraction(i + 1, 3) for i in range(5)], [Fraction(2 * i - 3) for i in range(5)]
    f, x = (np.array([float(y) for y in z]) for z in (taps, u))
    assert [float(y) for y in article_states.filtered(taps, u)] == pytest.approx(np.convolve(f, x)[:5])
    wrapped = np.fft.ifft(np.fft.fft(f) * np.fft.fft(x)).real
    assert [float(y) for y in article_states.circular(taps, u)] == pytest.approx(wrapped)


def test_h3_is_linear_attention_in_one_case() -> None:
    finding = article_states.imitation()
    assert finding.table["equal"] == [True, False, False, False, False]
    q, k, v = ([Fraction(x) for x in y] for y in ((1, 2, 3), (1, 1, 2), (3, 0, 1)))
    causal = np.tril(np.outer([1, 2, 3], [1, 1, 2])) @ np.array([3, 0, 1])
    assert article_states.linear_attention(q, k, v) == causal.tolist()


def test_gates_against_mpmath() -> None:
    finding = article_states.gates((-4, 0, 3))
    for z, sigma, gain in zip(finding.table["z"], finding.table["σ(z)"], finding.table["gain"], strict=True):
        assert sigma == pytest.approx(float(1 / (1 + mpmath.exp(-z))))
        assert gain == pytest.approx(float(mpmath.log1p(mpmath.exp(z))))
    assert article_states.gates((-4, 0, 3), held=True).status == "HOLDS"


def test_the_filter_needs_all_taps_and_padding() -> None:
    table = article_states.convolution((2, 3, 5)).table
    assert table["one tap fewer"] == table["circular"] == [False, False, False]
    assert article_states.convolution((2, 3, 5), padded=True).table["circular"] == [True, True, True]


# Sigmoid attention


def test_products_are_those_of_the_formulas() -> None:
    for n, d in ((1, 1), (4, 3), (7, 2)):
        assert article_sigmoid.quadratic_products(n, d) == 2 * n * n * d
        assert article_sigmoid.linear_products(n, d) == 2 * n * d * d


def test_linear_costs_are_told() -> None:
    assert article_sigmoid.linear_time((2, 4), lambda n, d: 5 * n).status == "HOLDS"
    assert article_sigmoid.linear_time((2, 4), lambda n, d: 5 * n + 1).status == "REFUTED"


def test_doubling_by_torch() -> None:
    x = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)).double()
    xx = torch.cat([x, x])
    once, twice = (torch.sigmoid(y @ y.T) @ y / len(y) for y in (x, xx))
    torch.testing.assert_close(torch.cat([once, once]), twice)
    finding = article_sigmoid.doubled((0, 1, 2))
    assert finding.table["output kept"] == [False, True, False]
    assert finding.table["factor 2^(1 − α)"] == [True, True, True]


def test_merging_softmax_against_torch() -> None:
    assert article_sigmoid.in_parallel(3).status == "REFUTED"
    assert article_sigmoid.in_parallel(3, rescaled=False).status == "HOLDS"
    a, b = (1, Fraction(1), Fraction(1)), (3, Fraction(1), Fraction(0))
    _, total, o = article_sigmoid.merged(a, b)
    p = torch.softmax(torch.tensor([1.0, 3.0], dtype=torch.float64) * math.log(2), 0)
    assert float(o / total) == pytest.approx(float(p[0]))


def test_the_whole_formula_against_torch() -> None:
    table = article_sigmoid.formula((16,)).table
    for n, exponential, weight, due in zip(*table.values(), strict=True):
        score = torch.tensor(math.log(Fraction(exponential)), dtype=torch.float64)
        assert float(Fraction(weight)) == pytest.approx(float(torch.sigmoid(score)))
        assert float(Fraction(due)) == pytest.approx(float(torch.sigmoid(score / 2 - math.log(n))))


def test_speed_ups_of_a_step() -> None:
    finding = article_sigmoid.whole_step((Fraction(0), Fraction(1, 2), Fraction(1)), Fraction(2), Fraction(1))
    assert finding.table["faster in percent"] == pytest.approx([100.0, 100.0 / 3, 0.0])
    assert article_sigmoid.whole_step((Fraction(1, 2),), Fraction(2), Fraction(2)).status == "HOLDS"


def test_the_best_affine_look_up_against_least_squares() -> None:
    inputs = [(i, a, b) for i in (1, -1) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    design = np.array([(1, *x) for x in inputs], dtype=float)
    wanted = np.array([a if i == 1 else b for i, a, b in inputs], dtype=float)
    best = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
    told = article_sigmoid.fixed_scores().table["least mean square error"]
    assert told == ["0", "1/3"]
    assert ((best - wanted) ** 2).mean() == pytest.approx(1 / 3)


# Splines


def tokens_at(tokens, t: Fraction) -> list[Fraction]:
    values = [token(flint.fmpq(t.numerator, t.denominator)) for token in tokens]
    return [Fraction(int(x.p), int(x.q)) for x in values]


@pytest.mark.parametrize("t", [Fraction(-1, 1000), Fraction(1, 1000)])
def test_pieces_are_relu_attention(t: Fraction) -> None:
    tokens = article_splines._line((1, 0), (0, 1), (-2, 3), (0, -2))
    x = tokens_at(tokens, t)
    for row in range(4):
        direct = sum(max(x[row] * y, Fraction(0)) * y for y in x)
        piece = article_splines.piece(tokens, row, 1 if t > 0 else -1)[1]
        assert tokens_at([piece], t) == [direct]


def test_one_sided_derivatives_against_differences() -> None:
    tokens = article_splines._line((1, 0), (0, 1))
    assert article_splines.one_sided(tokens, 1, 2) == [(0, 0), (0, 1)]
    h = Fraction(1, 10**9)
    for side, slope in ((1, 1), (-1, 0)):
        x = tokens_at(tokens, side * h)
        o = sum(max(x[1] * y, Fraction(0)) * y for y in x)
        assert abs(o / (side * h) - slope) < Fraction(1, 10**6)


def test_smoothness_by_the_order_of_the_kink() -> None:
    lines = article_splines._line
    assert "C⁰ and no more" in article_splines.smoothness(lines((1, 0), (0, 1)), 1).counterexample
    assert "C¹ and no more" in article_splines.smoothness(lines((1, 0), (0, 1)), 0).counterexample
    assert article_splines.smoothness(lines((0, 1)), 0).status == "HOLDS"


def test_degrees_of_weights_and_output() -> None:
    tokens = article_splines._line((0, 1), (1, 2))
    assert article_splines.degrees(tokens, "weights").status == "REFUTED"
    assert article_splines.degrees(tokens, "output").status == "HOLDS"
    assert article_splines.degrees(article_splines._line((1, 0), (2, 0)), "output").status == "REFUTED"


def test_fourth_differences_against_the_derivative() -> None:
    told = article_splines.fitted("softmax", (10,)).table["fourth difference"][0]
    with mpmath.workdps(40):
        fourth = mpmath.diff(lambda t: 1 / (1 + mpmath.exp(-t)), 1 + mpmath.mpf(2) ** -9, 4)
        assert float(told) == pytest.approx(float(fourth / 2**40), rel=1e-3)


def test_smoothings_against_numpy() -> None:
    s = np.arange(-12, 13) / 4
    for beta in (1, 10):
        soft = np.abs(np.log1p(np.exp(beta * s)) / beta - np.maximum(s, 0)).max()
        assert article_splines.recovered("softplus", (beta,)).table["largest distance from ReLU"] == [
            pytest.approx(soft)
        ]
    assert article_splines.recovered("softmax", (7,)).table["largest distance from ReLU"] == [2.0]


def test_gates() -> None:
    assert article_splines.gates(("softmax", "relu")).status == "CONDITIONAL"
    assert article_splines.gates(("relu",)).status == "REFUTED"


# In context, as a recurrence


def test_the_error_of_the_window_against_quadrature() -> None:
    """First-order error on the sphere of R³, where x·q is uniform on [−1, 1]."""

    def error(w, lipschitz, noise, n):
        first, weight, square = (
            mpmath.quad(f, [-1, 1])
            for f in (
                lambda t: t * mpmath.exp(w * t),
                lambda t: mpmath.exp(w * t),
                lambda t: mpmath.exp(2 * w * t),
            )
        )
        bias = lipschitz**2 * (1 - first / weight) ** 2 / 3
        # Means are halves of the integrals.
        return bias + noise**2 * (square / 2) / (weight / 2) ** 2 / n

    for w in (2, 9):
        slope = article_context._error_slope(flint.arb(w), flint.arb(2), flint.arb(1) / 4, 200)
        told = mpmath.diff(lambda x: error(x, 2, mpmath.mpf("0.25"), 200), w)
        assert float(slope.mid()) == pytest.approx(float(told), rel=1e-6)


def test_windows_follow_the_known_exponent() -> None:
    table = article_context.window("L", 20000).table
    middle = [(a + b) / 2 for a, b in zip(table["w above"], table["w below"], strict=True)]
    slopes = [math.log2(b / a) for a, b in itertools.pairwise(middle)]
    # w ∝ L^(4/(d + 3)) = L^(2/3).
    assert slopes == pytest.approx([2 / 3] * 3, abs=0.01)
    assert article_context.window("noise").status == "REFUTED"


def test_prefixes_by_hand() -> None:
    finding = article_context.prefix()
    assert finding.status == "CONDITIONAL"
    assert finding.table["outputs"] == ["1/2 and 1/2", "2/3 and 1/3"]
    assert article_context.prefix(changing=False).status == "HOLDS"


def test_a_state_that_forgets_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(article_context, "_state", lambda query, pairs: (Fraction(1), Fraction(0)))
    assert article_context.prefix().status == "REFUTED"


# Texts


def test_what_cannot_be_decided_says_what_would_be_needed() -> None:
    for claim in source_articles.CLAIMS:
        if claim.id == "SEED3-6b":
            continue
        finding = claim.check(None)
        assert finding.status == "OPEN"
        assert "Needed: " in finding.evidence or "only a reader" in finding.evidence
        assert claim.control is None
        assert claim.kind == "none"


def test_an_implication_needs_its_second_step_only() -> None:
    good = source_articles.implied(ClaimFinding("HOLDS", "compiled"))
    assert good.status == "HOLDS"
    assert "an encoder by SPL-8b" in good.evidence
    assert "refuted in SPL-9d" in good.evidence
    assert source_articles.implied(ClaimFinding("REFUTED", "differs")).status == "REFUTED"


def test_every_item_of_the_articles_is_there() -> None:
    modules = (
        *(article_flash, article_linear, article_states, article_sigmoid, article_splines, article_context),
        source_articles,
    )
    found = {claim.id.rstrip("ab") for module in modules for claim in module.CLAIMS}
    due = {f"SEED{page}-{i}" for page, last in ((0, 5), (1, 8), (2, 7), (3, 9)) for i in range(1, last + 1)}
    # The worked example has the first three.
    assert due - found == {"SEED0-1", "SEED0-2", "SEED0-3"}
