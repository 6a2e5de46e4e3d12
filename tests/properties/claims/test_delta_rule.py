"""Claims about the delta rule: naive oracles, counterexamples by hand, worlds in which each is false."""

from __future__ import annotations

from fractions import Fraction

import flint
import mpmath
import numpy as np
import pytest

from attnproof.properties.claims import delta, delta_chunks, delta_orders
from attnproof.properties.forms import base
from attnproof.properties.forms import delta as forms


def exact(x) -> np.ndarray:
    return base.each(
        lambda n: flint.fmpq(Fraction(n).numerator, Fraction(n).denominator), np.array(x, dtype=object)
    )


def test_a_wrong_decay_to_the_end_of_a_chunk_is_found(monkeypatch) -> None:
    honest = base.products_after
    monkeypatch.setattr(forms, "products_after", lambda x: honest(x) * x)
    finding = delta_chunks.equal_forms(7)
    assert finding.status == "REFUTED"
    assert "C = 3" in finding.evidence


def test_a_state_that_is_not_handed_over_is_found(monkeypatch) -> None:
    honest = forms.chunkwise
    monkeypatch.setattr(forms, "chunkwise", lambda *part, **more: honest(*part[:5], None, **more))
    rows = delta_chunks.equal_forms(7).table
    wrong = [form for form, equal in zip(rows["form"], rows["equal"], strict=True) if not equal]
    assert set(wrong) == {"handed over at every split"}


def test_the_printed_formula_is_right_only_without_decay() -> None:
    # With γ = 1 the mask is Γ: the misprint shows itself through the gates alone.
    q, k, v, beta, alpha = delta_chunks.inputs(9)
    ones = alpha[:, :1] * 0 + 1
    right = forms.recurrent(q, k, v, beta, ones)[0]
    assert base.difference(right, forms.printed(q, k, v, beta, ones, chunk=4, mask_only=True)[0]) == 0


def test_the_misprint_by_hand() -> None:
    one, k, alpha = exact([[1], [1]]), exact([[1], [0]]), exact([[1], [Fraction(1, 2)]])
    right = forms.recurrent(one, k, one, one[:, 0], alpha)[0]
    outputs = [
        forms.printed(one, k, one, one[:, 0], alpha, chunk=2, mask_only=mask)[0][1, 0]
        for mask in (True, False)
    ]
    assert [str(x) for x in (right[1, 0], *outputs)] == ["1/2", "1", "1/2"]


def test_published_against_naive_steps() -> None:
    q, k, v, beta, _ = delta_chunks.inputs(5)
    state = [[Fraction(0)] * 2 for _ in range(3)]

    def plain(x) -> Fraction:
        return Fraction(int(x.p), int(x.q))

    for t in range(5):
        key, value, b = [plain(x) for x in k[t]], [plain(x) for x in v[t]], plain(beta[t])
        held = [sum(key[c] * state[c][e] for c in range(3)) for e in range(2)]
        state = [[state[c][e] + b * key[c] * (value[e] - held[e]) for e in range(2)] for c in range(3)]
    due = [sum(plain(q[4, c]) * state[c][e] for c in range(3)) for e in range(2)]
    found = delta_chunks.as_published(q, k, v, beta, chunk=2)[0][4]
    assert [str(x) for x in found] == [str(x) for x in due]


def test_condition_numbers_against_numpy() -> None:
    table = delta_chunks.conditioning((4,), trials=1).table
    assert table["condition number"] == table["(2C − 1)²"] == [49.0]
    matrix = np.eye(4) + 2 * np.tril(np.ones((4, 4)), -1)
    assert np.linalg.cond(matrix, np.inf) == pytest.approx(49.0)
    steep = np.linalg.cond(np.eye(8) + 3 * np.tril(np.ones((8, 8)), -1), np.inf)
    assert steep == pytest.approx(max(delta_chunks.conditioning((8,), 3, 1).table["condition number"]))
    assert steep > 15**2


def test_derivatives_of_a_form_that_forgets_a_path(monkeypatch) -> None:
    honest = forms.solve

    def constant(lower, right):
        plain = base.each(lambda x: x.value if hasattr(x, "value") else x, lower)
        return honest(plain, right)

    monkeypatch.setattr(forms, "solve", constant)
    finding = delta_chunks.derivatives(5)
    wrong = {
        form for form, equal in zip(finding.table["form"], finding.table["equal"], strict=True) if not equal
    }
    assert wrong == {"C = 4", "C = 5"}


def test_gates_move_out_of_w_by_hand() -> None:
    assert delta_chunks.moved_gates(2).table["equal"] == [True, True]
    assert delta_chunks.moved_gates(2, ratio=False).table["equal"] == [True, False]


def test_orders_that_agree_are_told(monkeypatch) -> None:
    honest = forms.recurrent
    assert delta_orders.three_orders(gate="scalar gate").status == "CONDITIONAL"
    monkeypatch.setattr(forms, "recurrent", lambda *x, order: honest(*x, order=forms.ORDERS[0]))
    assert delta_orders.three_orders().status == "REFUTED"


def test_orders_by_hand() -> None:
    one, alpha = exact([[1], [1]]), exact([[1], [Fraction(1, 2)]])
    found = [
        str(forms.recurrent(one, one, one, one[:, 0], alpha, order=order)[0][1, 0]) for order in forms.ORDERS
    ]
    assert found == ["1", "1/2", "1"]
    k, decay = exact([1, 1]), exact([Fraction(1, 2), 1])
    step, start = forms.transition(k, flint.fmpq(1, 2)), exact([1, 0])
    assert [str(x) for x in step @ (decay * start)] == ["1/4", "-1/4"]
    assert [str(x) for x in decay * (step @ start)] == ["1/4", "-1/2"]


def test_products_of_two_reflections_turn() -> None:
    # Two steps with β = 2 and unit keys at an angle θ rotate by 2θ: here cos θ = 4/5.
    first, second = exact([1, 0]), exact([Fraction(4, 5), Fraction(3, 5)])
    turn = forms.transition(second, flint.fmpq(2)) @ forms.transition(first, flint.fmpq(2))
    assert [str(x) for x in turn.flat] == ["7/25", "-24/25", "24/25", "7/25"]
    assert delta_orders.product(3, 3).status == "HOLDS"


def test_reads_by_other_vectors() -> None:
    q, k, v, _, alpha = delta_chunks.inputs(4)
    # Reading nothing is gated linear attention.
    found = delta_orders.read_by(q, k, v, 0 * k, 0 * v + 1, alpha[:, :1])
    state, due = 0, []
    for t in range(4):
        state = alpha[t, 0] * state + np.outer(k[t], v[t])
        due.append(q[t] @ state)
    assert base.difference(found, np.array(due)) == 0


def test_a_wrong_transition_breaks_contraction_and_eigenvalues(monkeypatch) -> None:
    honest = forms.transition
    monkeypatch.setattr(forms, "transition", lambda k, beta: honest(k, 2 * beta))
    assert delta.contraction(10).status == "REFUTED"
    assert delta.eigenvalues((2,)).status == "REFUTED"


def test_recall_and_descent_need_the_difference(monkeypatch) -> None:
    def additive(q, k, v, beta, alpha, state):
        after = state + beta * np.outer(k, v)
        return q @ after, after

    monkeypatch.setattr(forms, "step", additive)
    assert delta.exact_recall().status == "REFUTED"
    assert delta.descent(2).status == "REFUTED"


def test_a_float32_key_that_is_too_long_by_hand() -> None:
    x, y = Fraction(16276291, 67108864), Fraction(16276291, 16777216)
    norm = np.sqrt(np.float32(17))
    assert (Fraction(float(np.float32(1) / norm)), Fraction(float(np.float32(4) / norm))) == (x, y)
    assert x * x + y * y > 1
    told = delta.float_contraction().counterexample
    assert f"({x}, {y})" in told
    # Rounded once, from more digits than a float64 has, the key is too short.
    with mpmath.workdps(40):
        scale = 2**26
        once = [Fraction(c * int(mpmath.nint(scale / mpmath.sqrt(17))), scale) for c in (1, 4)]
    assert once[0] == x - Fraction(1, 2**26)
    assert once[0] ** 2 + once[1] ** 2 < 1
    assert f"({once[0]}, {once[1]})" in told


def test_condition_numbers_of_equal_keys_by_the_proof() -> None:
    n = 5
    matrix = np.eye(n) + 2 * np.tril(np.ones((n, n)), -1)
    inverse = np.linalg.inv(matrix)
    assert abs(inverse[np.tril_indices(n, -1)]) == pytest.approx(2)
    assert np.linalg.cond(matrix, np.inf) == pytest.approx((2 * n - 1) ** 2)


def test_eigenvalues_against_numpy() -> None:
    k = np.array([1.0, 2.0, -1.0])
    found = np.sort(np.linalg.eigvalsh(np.eye(3) - 0.7 * np.outer(k, k)))
    assert found == pytest.approx([1 - 0.7 * 6, 1, 1])
    assert delta.parity(5, 1).table == {"strings": [32], "wrong": [31]}
