"""Claims about retention, gated states, RWKV and mLSTM: oracles, and worlds in which each is false."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import flint
import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.claims import (
    delta,
    delta_chunks,
    delta_orders,
    equal_forms,
    gate_gradients,
    gate_table,
    gated_linear,
    linear,
    linear_capacity,
    linear_kernel,
    mlstm,
    retention,
    rwkv,
    state_costs,
    state_errors,
)
from attnproof.properties.forms import base, gated, gradients, growth
from attnproof.properties.forms import mlstm as mlstm_forms
from attnproof.properties.forms import parameterisations as table
from attnproof.properties.forms.numbers import Gaussian

MODULES = (
    *(linear, linear_kernel, linear_capacity, state_costs, retention, gated_linear, gate_table),
    *(gate_gradients, state_errors, rwkv, mlstm, delta, delta_chunks, delta_orders),
)
EXPECTED = {
    "CONDITIONAL": "LIN-1c LIN-1d LIN-3b LIN-4d RET-1b RET-1d GLA-1d GLA-3c GLA-5a RWK-3b",
    "REFUTED": "LIN-2a LIN-2b LIN-3c LIN-6b LIN-7 GLA-1b GLA-4c RWK-2b MLSTM-1b DN-1e DN-3a",
    "SUPPORTED": "LIN-4b GLA-5b RWK-1b",
    "OPEN": "DN-4f",
}


class Quick:
    """As much of a laboratory as these claims use."""

    effort = "quick"

    def choose(self, quick, default, thorough=None):
        return quick


def test_what_is_found_today() -> None:
    status = {name: key for key, names in EXPECTED.items() for name in names.split()}
    found = {claim.id: claim.check(Quick()).status for module in MODULES for claim in module.CLAIMS}
    assert found == {name: status.get(name, "HOLDS") for name in found}
    assert set(status) <= set(found)


def test_equality_names_what_differs() -> None:
    one, two = np.array([flint.fmpq(1)], dtype=object), np.array([flint.fmpq(3, 2)], dtype=object)
    rows = [
        equal_forms.row("a", "x", one, [one]),
        equal_forms.row("b", "y", (one, two), [(one, one), (two, two)]),
    ]
    assert rows[0] == ("a", "x", 1, True, 0.0)
    assert rows[1] == ("b", "y", 4, False, 0.5)
    finding = equal_forms.equality(rows, example="by hand")
    assert finding.status == "REFUTED"
    assert finding.evidence.endswith("differs in b, y: 0.5")
    assert finding.counterexample == "by hand"
    right = equal_forms.equality(rows[:1], example="by hand", remark="; as drawn")
    assert right.counterexample == ""
    assert right.evidence.endswith("a false one passes with probability below 2^-80; as drawn)")


def shifted_after(factors):
    """Γ with the position's own decay in it."""
    return base.products_after(factors) * factors


@pytest.mark.parametrize(
    ("module", "check"),
    [
        (gated, gated_linear.chunkwise_form),
        (gated, rwkv.bonus_forms),
        (mlstm_forms, mlstm.stabilised_forms),
    ],
)
def test_a_wrong_decay_to_the_end_of_a_chunk_is_found(monkeypatch, module, check) -> None:
    monkeypatch.setattr(module, "products_after", shifted_after)
    finding = check(7)
    assert finding.status == "REFUTED"
    assert False in finding.table["equal"]


def test_retention_by_naive_powers() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.integers(-3, 4, (3, 5, 2))
    gamma = Fraction(31, 32)
    due = [
        [sum(int(q[i] @ k[j]) * gamma ** (i - j) * int(v[j, e]) for j in range(i + 1)) for e in range(2)]
        for i in range(5)
    ]
    x, y, z = (base.each(lambda n: flint.fmpq(int(n)), part) for part in (q, k, v))
    found = gated.retention_chunkwise(x, y, z, flint.fmpq(31, 32), chunk=3)[0]
    assert [[str(n) for n in line] for line in found] == [[str(n) for n in line] for line in due]


def test_the_norm_by_hand() -> None:
    f = flint.fmpq
    o = np.array([[f(3, 1000), f(4, 1000)]], dtype=object)
    same = retention.normed(o, 0 * o + 1, f(1, 10**5), 1)
    scaled = retention.normed(o, 0 * o + f(1, 64), f(1, 10**5), 1)
    assert [str(x) for x in same[0]] == ["2/5", "32/45"]
    assert str(scaled[0, 0]) == str(f(4, 290))
    heads = np.array([[f(1), f(1)]], dtype=object)
    halved = np.array([[f(1), f(1, 4)]], dtype=object)
    assert str(retention.normed(heads, halved, 0, 1)[0, 1]) == "2/5"
    assert str(retention.normed(heads, halved, 0, 2)[0, 1]) == "1"
    # Signs are kept.
    assert retention.normed(-o, 0 * o + 1, 0, 1)[0, 0] == -retention.normed(o, 0 * o + 1, 0, 1)[0, 0]


def test_norms_that_see_the_scores_are_told(monkeypatch) -> None:
    found = retention.invariance(5)
    changed = {
        (way, epsilon)
        for way, epsilon, change in zip(
            *list(found.table.values())[:2], found.table["largest change of a square"], strict=True
        )
        if change
    }
    assert ("each head", "0") not in changed
    assert ("each head", "1/100000") in changed
    assert ("all heads at once", "0") in changed
    monkeypatch.setattr(retention, "normed", lambda o, square, epsilon, groups: o * o * square)
    assert retention.invariance(5).status == "REFUTED"


@pytest.mark.parametrize(("name", "first"), [("float16", 7), ("bfloat16", 4)])
def test_decays_that_round_to_one(name: str, first: int) -> None:
    finding = retention.decays_below_one((name,))
    assert finding.table["first head with γ = 1"] == [first]
    # Half the spacing below 1 is a tie, and goes to the even 1.
    half = torch.finfo(getattr(torch, name)).eps / 4
    assert 2.0 ** (-5 - first) == half
    # One head alone at 1, with no other's decay.
    assert retention.decays_below_one((name,), first + 1).status == "REFUTED"
    assert retention.decays_below_one((name,), first).status == "HOLDS"


def test_complex_gates_need_their_imaginary_part(monkeypatch) -> None:
    honest = base.products_after
    monkeypatch.setattr(
        gated, "products_after", lambda x: base.each(lambda y: replace(Gaussian.of(y), im=0), honest(x))
    )
    finding = gated_linear.complex_gates(7)
    wrong = {
        form for form, same in zip(finding.table["form"], finding.table["equal"], strict=True) if not same
    }
    assert wrong
    assert "factored" not in wrong


def test_a_row_of_the_table_beyond_its_range_or_its_recurrence() -> None:
    rows = table.ROWS
    growing = replace(rows[2], factors=lambda e, p: (1 + 0 * rows[2].factors(e, p)[0],))
    finding = gate_table.table_of_gates((growing,))
    assert finding.status == "REFUTED"
    assert (finding.table["reduces exactly"], finding.table["in (0, 1)"]) == ([True], [False])
    # A gate of each entry's own put through the recurrence of outer products.
    finding = gate_table.table_of_gates((replace(rows[0], own=rows[1].own),))
    assert (finding.table["reduces exactly"], finding.table["in (0, 1)"]) == ([False], [True])


def test_gates_at_thirty_against_mpmath() -> None:
    with mpmath.workdps(60):
        logistic = 1 / (1 + mpmath.exp(-30))
        due = {
            "mLSTM": (1 - logistic, logistic),
            "GLA": ((1 - logistic) ** (mpmath.mpf(1) / 16), logistic ** (mpmath.mpf(1) / 16)),
            "RWKV-6": (mpmath.exp(-mpmath.exp(30)), mpmath.exp(-mpmath.exp(-30))),
        }
        finding = gate_table.inside_in_floats().table
        for name, ends in due.items():
            at = finding["model"].index(name)
            found = (finding["least in float32"][at], finding["largest in float32"][at])
            assert found == tuple(float(torch.tensor(float(x)).float()) for x in ends)
        assert float(1 - due["GLA"][1]) == pytest.approx(5.85e-15, rel=1e-2)
        assert float(mpmath.exp(30) / mpmath.log(10)) == pytest.approx(4.64e12, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("gate_gradient", gate_gradients.of_keys),
        ("shifted_gate_gradient", gate_gradients.rwkv6),
        ("value_gate_gradient", gate_gradients.of_values),
    ],
)
def test_gate_gradients_that_are_off(monkeypatch, name, check) -> None:
    honest = getattr(gradients, name)
    monkeypatch.setattr(gradients, name, lambda *x: honest(*x) + flint.fmpq(1, 1000))
    assert check(3).status == "REFUTED"


def test_gate_gradient_against_differences_in_floats() -> None:
    rng = np.random.default_rng(1)
    q, k, v, w = (rng.standard_normal((5, width)) for width in (3, 3, 2, 2))
    alpha, state = rng.uniform(0.2, 0.9, (5, 3)), rng.standard_normal((3, 2))

    def loss(q, k, alpha):
        total, S = 0.0, state
        for t in range(5):
            S = alpha[t][:, None] * S + np.outer(k[t], v[t])
            total += w[t] @ (q[t] @ S)
        return total

    def slope(x, at):
        found = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[index] = 1e-5
            found[index] = (at(x + step) - at(x - step)) / 2e-5
        return found

    dq = slope(q, lambda x: loss(x, k, alpha))
    dk = slope(k, lambda x: loss(q, x, alpha))
    exact = alpha * slope(alpha, lambda x: loss(q, k, x))
    assert np.allclose(gradients.gate_gradient(q, dq, k, dk, None, None), exact, atol=1e-7)


def test_rwkv4_against_mpmath() -> None:
    rng = np.random.default_rng(2)
    k, v, w, u = rng.uniform(-9, 9, 8), rng.standard_normal(8), -0.3, 0.7
    with mpmath.workdps(40):
        got = rwkv.rwkv4_recurrent(
            np.array([mpmath.exp(x) for x in k], dtype=object),
            np.array([mpmath.mpf(x) for x in v], dtype=object),
            mpmath.exp(w),
            mpmath.exp(u),
        )
    for t in range(8):
        logits = np.array([k[s] + (t - 1 - s) * w for s in range(t)] + [k[t] + u])
        weights = np.exp(logits - logits.max())
        assert float(got[t]) == pytest.approx(weights @ v[: t + 1] / weights.sum(), rel=1e-12)
    assert np.allclose(rwkv._float_recurrent(k[:, None], v[:, None], w, u)[:, 0], np.array(got, dtype=float))


def test_counterexamples_of_rwkv_by_hand() -> None:
    one, half = (
        np.array([[flint.fmpq(1)]] * 2, dtype=object),
        np.array([[flint.fmpq(1, 2)]] * 2, dtype=object),
    )
    read = gated.recurrent(one, one, one, gated.gates(half), bonus=one[0])[0]
    assert (read[1, 0], gated.recurrent(one, one, one, gated.gates(half))[0][1, 0]) == (2, flint.fmpq(3, 2))
    third = rwkv.rwkv7_recurrent(one, one, one, half, one, one)
    assert third[1, 0] == flint.fmpq(1, 2)


def test_a_wrong_read_of_rwkv7_is_found(monkeypatch) -> None:
    honest = rwkv.rwkv7_recurrent
    monkeypatch.setattr(
        rwkv, "rwkv7_recurrent", lambda q, k, v, d, kappa, eta: honest(q, k, v, d, -kappa, eta * 2)
    )
    assert rwkv.rwkv7_transition().status == "REFUTED"
    assert rwkv.as_delta_rule().status == "REFUTED"


def test_mlstm_against_its_definition_in_logarithms() -> None:
    with mpmath.workdps(30):
        q, k, v, i, f = (base.each(lambda x: mpmath.mpf(int(x.p)) / int(x.q), x) for x in mlstm.inputs(9))
        C, n, m = np.zeros((3, 2), dtype=object), np.zeros(3, dtype=object), -mpmath.inf
        for t in range(9):
            highest = max(mpmath.log(f[t]) + m, mpmath.log(i[t]))
            forget, write = mpmath.exp(mpmath.log(f[t]) + m - highest), mpmath.exp(mpmath.log(i[t]) - highest)
            C, n, m = forget * C + write * np.outer(k[t], v[t]), forget * n + write * k[t], highest
        due = (q[8] @ C) / max(abs(q[8] @ n), mpmath.exp(-m))
        found = mlstm_forms.recurrent(*mlstm.inputs(9))[0][8]
        assert [float(x) for x in found] == pytest.approx([float(x) for x in due], rel=1e-20)


def test_a_floor_that_is_no_change_would_hold(monkeypatch) -> None:
    monkeypatch.setattr(mlstm_forms, "_floor", lambda M, keep_one: 1 / M)
    assert mlstm.floor_of_one().status == "HOLDS"


def test_what_measuring_says_is_what_was_measured() -> None:
    def at(chunk: str, length: int, error: float, share: float = 0.5) -> growth.Measured:
        return growth.Measured("family", chunk, length, error, share)

    even = [at(c, n, 1e-7) for c in ("1", "N") for n in (64, 4096)]
    assert state_errors.forms_against_length(even).status == "SUPPORTED"
    mixed = [*even[:3], at("N", 4096, 3e-7)]
    finding = state_errors.forms_against_length(mixed)
    assert finding.status == "CONDITIONAL"
    assert "in 1 of 2 places, most 3 times (family, C = N, N = 4096)" in finding.evidence
    worse = [*even[:2], at("N", 64, 2e-7), at("N", 4096, 2e-7)]
    assert state_errors.forms_against_length(worse).status == "REFUTED"
    assert state_errors.bounded_growth(even).status == "SUPPORTED"
    assert state_errors.bounded_growth([*even[:3], at("N", 4096, 3e-7, 1.5)]).status == "REFUTED"
    finding = state_errors.bounded_growth([*even[:3], at("N", 4096, 64e-7)])
    assert finding.evidence.endswith("at most as N^1.00")


def test_a_logarithm_lost_in_a_sum_by_hand() -> None:
    """The counterexample of GLA-5a, run in float32."""
    one = np.ones((2, 1), dtype=np.float32)
    k, g = np.array([[1], [0]], dtype=np.float32), np.array([[-16], [-(2.0**-21)]], dtype=np.float32)
    assert growth.by_logarithms(one, k, one, g, chunk=2)[1, 0] == 1.0
    stepped = gated.recurrent(one, k, one, gated.gates(np.exp(g)))[0][1, 0]
    assert abs(float(stepped) - np.exp(-(2.0**-21))) <= 2.0**-25


def test_overflow_by_the_formats() -> None:
    table = state_errors.overflow().table
    assert table["by exact powers"] == [128, 16]
    assert float(torch.finfo(torch.float32).max) < 2.0**128
    # A gate of 1/4 leaves the range twice as early: not what is claimed.
    finding = state_errors.overflow((1, 4))
    assert finding.table["by exact powers"] == [64, 8]
    assert finding.status == "REFUTED"
