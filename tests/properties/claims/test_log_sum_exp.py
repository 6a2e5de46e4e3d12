"""Claims about log-sum-exp: algorithms and counterexamples redone in float16, Jacobians in mpmath."""

from __future__ import annotations

import flint
import mpmath
import numpy as np
import pytest

from attnproof.laboratory import Bench
from attnproof.properties.claims import log_sum_exp, log_sum_exp_bounds
from attnproof.properties.claims.correct_rounding import BF16, FP16, Rounded
from attnproof.properties.claims.log_sum_exp_algorithms import (
    ALGORITHMS,
    count,
    exact,
    logits,
    ratios,
    run,
    sized,
)
from attnproof.properties.claims.rounding_counts import Form

EXPECTED = {"LSE-7a": "REFUTED", "LSE-7c": "REFUTED", "LSE-8b": "CONDITIONAL"}


@pytest.mark.parametrize(
    "claim", [*log_sum_exp.CLAIMS, *log_sum_exp_bounds.CLAIMS], ids=lambda claim: claim.id
)
def test_status(claim) -> None:
    finding = claim.check(Bench("quick"))
    assert finding.status == EXPECTED.get(claim.id, "HOLDS"), finding
    assert len({len(column) for column in finding.table.values()}) <= 1


def half(x: float) -> float:
    return float(np.float16(x))


@pytest.mark.parametrize("x", [(4.0, 4.0), (100.0, 100.0), (1000.0, 1000.0), (3.5, 1.25)])
def test_shifted_algorithm_step_by_step_in_float16(x) -> None:
    """float64 functions rounded to float16 at every step: none of these is near a tie."""
    a = max(x)
    w = [half(np.exp(half(b - a))) for b in x]
    s = half(w[1])
    y = half(a + half(np.log1p(s)))
    columns = [np.array([b]) for b in x]
    found = {name: run(name, columns, np.ones(1), Rounded(FP16)) for name in ALGORITHMS}
    assert found["shifted log"][0] == y
    assert [b[0] for b in found["shifted, division-free"]] == [half(np.exp(half(b - y))) for b in x]
    assert [b[0] for b in found["shifted"]] == [half(b / half(1 + s)) for b in w]


def test_the_known_counterexample() -> None:
    """x = (1000, 1000) in fp16: y = 1000.5, and e^(x − y) = 0.6064 in place of 1/2."""
    x = [np.array([1000.0])] * 2
    r = Rounded(FP16)
    assert run("shifted log", x, np.ones(1), r)[0] == 1000.5
    assert float(run("shifted, division-free", x, np.ones(1), r)[0][0]) == half(np.exp(-0.5))
    error = abs(1000.5 - (1000 + np.log(2))) / FP16.u
    assert error > sized(Form(one=2, spread=1, log=1), np.full((1, 2), 1000.0))[0]


def test_exact_against_mpmath() -> None:
    x = np.array([[3.0, 2.5, -20.0], [-1.0986, -1.0986, -1.0987]])
    with mpmath.workdps(40):
        for row, y, g in zip(x, exact("log", x), exact("division", x), strict=True):
            total = sum(mpmath.exp(mpmath.mpf(a)) for a in row.tolist())
            assert abs(y[0] - mpmath.log(total)) < 1e-15
            assert max(abs(b - mpmath.exp(a) / total) for a, b in zip(row.tolist(), g, strict=True)) < 1e-15


def test_counts_equal_the_published_coefficients() -> None:
    """Theorem 4.3 is attained by the count, to the last rounding; Theorem 3.3 has one to spare."""
    for n in (2, 7, 30):
        assert count("shifted", n) == Form(one=n + 2, spread=2)
        assert count("division", n) == Form(one=n + 2)
        assert count("1 + s", n) == Form(one=n, spread=1)


def test_rows_have_their_largest_first_and_are_numbers_of_the_format() -> None:
    x = logits(BF16, 5, 200, np.random.default_rng(0), shifted=True)
    assert (x[:, 0] == x.max(axis=1)).all()
    assert (BF16.rounded(x) == x).all()


def test_rows_whose_higher_orders_matter_do_not_count() -> None:
    x = np.array([[1000.0, 1000.0], [16.0, 16.0]])
    found = ratios("shifted, division-free", Form(one=1), FP16, x)
    assert found[0] == 0
    assert found[1] > 1


def test_a_dropped_rounding_is_found(monkeypatch) -> None:
    """With the last addition exact, the printed theorem holds."""
    # Of two logits, that addition is the only one.
    monkeypatch.setattr(Rounded, "add", lambda self, a, b: a + b)
    printed = log_sum_exp_bounds.bounded("shifted log", log_sum_exp_bounds._printed_42, ((2,), 32, 1))
    assert printed.status == "SUPPORTED"


def test_an_underestimated_count_does_not_hold(monkeypatch) -> None:
    """The count alone, without a violation in formats, does not make a claim hold."""
    finding = log_sum_exp_bounds.bounded("division", lambda n: Form(one=n + 1), ((24,), 16, 0))
    assert finding.status == "SUPPORTED"
    assert "counted for n = 2" in finding.evidence


def test_jacobian_against_differences() -> None:
    x = [mpmath.mpf("0.3"), mpmath.mpf("-1.2"), mpmath.mpf("0.9")]
    with mpmath.workdps(50):

        def softmax(x):
            total = sum(map(mpmath.exp, x))
            return [mpmath.exp(a) / total for a in x]

        h = mpmath.mpf(10) ** -20
        g = tuple(softmax(x))
        j = log_sum_exp.jacobian(g)
        for k in range(3):
            up, down = ([a + s * h * (i == k) for i, a in enumerate(x)] for s in (1, -1))
            for i, (a, b) in enumerate(zip(softmax(up), softmax(down), strict=True)):
                assert abs((a - b) / (2 * h) - j[i][k]) < 1e-30


def test_weights_are_all_rows_once() -> None:
    rows = list(log_sum_exp.weights(3, 4, 3))
    assert len(rows) == len(set(rows)) == 20
    assert rows[0] == (4, 4, 4)


def test_power_method_reaches_the_norm_of_two() -> None:
    found = log_sum_exp._searched(2.0, 200)
    assert 0.45 < found < 0.5


def test_a_larger_jacobian_is_told(monkeypatch) -> None:
    honest = log_sum_exp.jacobian
    monkeypatch.setattr(
        log_sum_exp, "jacobian", lambda g: [[flint.fmpq(9, 8) * x for x in row] for row in honest(g)]
    )
    assert log_sum_exp.half_lipschitz(3, 4, 20).status == "REFUTED"
    assert log_sum_exp.softmax_conditioning(3, 4).status == "REFUTED"
    assert log_sum_exp.strictly_half(3, 4).status == "REFUTED"
