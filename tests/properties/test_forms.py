"""The equal forms over exact numbers: equal to the definitions written out, and over every kind of number."""

from __future__ import annotations

from fractions import Fraction

import flint
import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.claims.equal_forms import DEGREE_BITS, LENGTH
from attnproof.properties.forms import delta, gated, gradients, growth, linear, mlstm, parameterisations
from attnproof.properties.forms.base import (
    chunks,
    difference,
    each,
    products_after,
    products_up_to,
    segments,
)
from attnproof.properties.forms.numbers import (
    GENERIC_BITS,
    Counted,
    Degree,
    Dual,
    Gaussian,
    Tally,
    counted,
    generic,
    rationals,
    slopes,
)

N, D, E = 11, 3, 2
RNG = np.random.default_rng(5)
Q, K, V = (rationals(RNG, N, width) for width in (D, D, E))
ALPHA = rationals(RNG, N, D, low=1, high=8, denominator=9)
BETA = rationals(RNG, N, low=0, high=18, denominator=9)
STATE = rationals(RNG, D, E)


def test_products_and_segments() -> None:
    factors = np.array([[2], [3], [0], [5]], dtype=object)
    assert products_up_to(factors)[:, 0].tolist() == [2, 6, 0, 0]
    assert products_after(factors)[:, 0].tolist() == [0, 0, 5, 1]
    assert segments(factors)[:, :, 0].tolist() == [[1, 0, 0, 0], [3, 1, 0, 0], [0, 0, 1, 0], [0, 0, 5, 1]]
    assert [(x.start, x.stop) for x in chunks(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert list(chunks(0, 3)) == []
    with pytest.raises(ValueError, match="chunk=0 holds no position"):
        list(chunks(3, 0))
    with pytest.raises(ValueError, match="cannot be compared"):
        difference(Q, V)


# Against the definitions by indices


def test_gated_weights_are_sums_over_channels() -> None:
    for block in (None, 1, 4):
        w = gated.weights(Q, K, ALPHA, block=block)
        for i in range(N):
            for j in range(N):
                due = 0
                for c in range(D):
                    term = Q[i, c] * K[j, c]
                    for r in range(j + 1, i + 1):
                        term *= ALPHA[r, c]
                    due += term if j <= i else 0
                assert w[i, j] == due


def test_rwkv6_decays_exclude_the_reading_position() -> None:
    bonus = rationals(RNG, D)
    o, _ = gated.chunkwise(Q, K, V, ALPHA, chunk=4, bonus=bonus)
    for t in range(N):
        for e in range(E):
            due = sum(Q[t, c] * bonus[c] * K[t, c] * V[t, e] for c in range(D))
            for s in range(t):
                for c in range(D):
                    term = Q[t, c] * K[s, c] * V[s, e]
                    for r in range(s + 1, t):
                        term *= ALPHA[r, c]
                    due += term
            assert o[t, e] == due
    inclusive, _ = gated.chunkwise(Q, K, V, ALPHA, chunk=4)
    assert difference(o, inclusive) > 0


def test_linear_features_have_the_weights_of_their_maps() -> None:
    x = Q @ K.T
    for name, due in (
        ("identity", x),
        ("squared", x * x),
        ("taylor", 1 + x / 3 + x * x / 18),
        ("relu", np.maximum(Q, 0) @ np.maximum(K, 0).T),
    ):
        a, b = linear.features(Q, K, name, root=3)
        assert difference(a @ b.T, due) == 0
    with pytest.raises(ValueError, match="no rational feature map"):
        linear.features(Q, K, "elu1")


def test_normalised_linear_attention_by_sums() -> None:
    q, k = abs(Q) + 1, abs(K) + 1
    o, (S, z) = linear.chunkwise(q, k, V, chunk=4, normalize=True)
    for i in range(N):
        w = [q[i] @ k[j] for j in range(i + 1)]
        for e in range(E):
            assert o[i, e] == sum(w[j] * V[j, e] for j in range(i + 1)) / sum(w)
    assert difference(S, k.T @ V) == 0
    assert difference(z, k.sum(axis=0)) == 0
    assert (
        difference(linear.quadratic(q, k, V, by_state=True), linear.quadratic(q, k, V, by_state=False)) == 0
    )


def test_the_delta_rule_is_a_step_of_gradient_descent() -> None:
    # DN-1: S − β ∂/∂S ½‖Sᵀk − v‖² by an exact difference: the loss has degree 2 in each entry.
    def loss(state):
        off = K[0] @ state - V[0]
        return off @ off / 2

    slope = np.empty_like(STATE)
    for index in np.ndindex(STATE.shape):
        up, down = STATE.copy(), STATE.copy()
        up[index] += 1
        down[index] -= 1
        slope[index] = (loss(up) - loss(down)) / 2
    _, after = delta.step(Q[0], K[0], V[0], BETA[3], np.ones(1, dtype=object), STATE)
    assert difference(after, STATE - BETA[3] * slope) == 0
    moved = delta.transition(K[0], BETA[3]) @ STATE + BETA[3] * np.outer(K[0], V[0])
    assert difference(after, moved) == 0


def test_orders_of_decay_in_the_delta_rule() -> None:
    keep = {
        order: delta.step(Q[0], K[0], V[0], BETA[3], ALPHA[0], STATE, order=order)[1]
        for order in delta.ORDERS
    }
    decay = np.diag(ALPHA[0])
    write, erase = BETA[3] * np.outer(K[0], V[0]), delta.transition(K[0], BETA[3])
    for order, moved in zip(
        delta.ORDERS, (erase @ decay, decay - BETA[3] * np.outer(K[0], K[0]), decay @ erase), strict=True
    ):
        assert difference(keep[order], moved @ STATE + write) == 0
    with pytest.raises(ValueError, match="order='none' is unknown"):
        delta.step(Q[0], K[0], V[0], BETA[3], ALPHA[0], STATE, order="none")


def test_solve_inverts_the_unit_lower_triangle() -> None:
    lower = np.tril(rationals(RNG, N, N), -1)
    x = delta.solve(lower, V)
    assert difference(x + lower @ x, V) == 0


def test_mlstm_by_the_definition_and_its_largest_decay() -> None:
    i, f = rationals(RNG, N, low=1, high=90), ALPHA[:, 0]
    o, (C, n, M) = mlstm.chunkwise(Q, K, V, i, f, chunk=4)
    for t in range(N):
        decay = [i[j] for j in range(t + 1)]
        for j in range(t + 1):
            for r in range(j + 1, t + 1):
                decay[j] *= f[r]
        w = [decay[j] * (Q[t] @ K[j]) for j in range(t + 1)]
        for e in range(E):
            assert o[t, e] == sum(w[j] * V[j, e] for j in range(t + 1)) / max(abs(sum(w)), 1)
    assert max(decay) == M
    assert difference(M * n, sum((decay[j] * K[j] for j in range(N)), 0 * K[0])) == 0
    assert difference(M * C, sum(decay[j] * np.outer(K[j], V[j]) for j in range(N))) == 0


# Kinds of numbers


@pytest.mark.parametrize("kind", ["fraction", "mpf", "float32", "gaussian", "dual"])
def test_every_form_takes_every_kind_of_number(kind: str) -> None:
    make = {
        "fraction": lambda x: Fraction(int(x.p), int(x.q)),
        "mpf": lambda x: mpmath.mpf(int(x.p)) / int(x.q),
        "float32": lambda x: np.float32(float(int(x.p) / int(x.q))),
        "gaussian": lambda x: Gaussian(x, x / 2),
        "dual": lambda x: Dual(x, x / 3),
    }[kind]
    q, k, v, alpha, beta, state = (each(make, x) for x in (Q, K / 2, V, ALPHA, BETA, STATE))
    if kind == "float32":
        q, k, v, alpha, beta, state = (x.astype(np.float32) for x in (q, k, v, alpha, beta, state))
    near = {"float32": 1e-3, "mpf": 1e-10}.get(kind, 0)

    def close(x, y) -> bool:
        apart = difference(x[0], y[0]), difference(x[1], y[1])
        return all((d.value if isinstance(d, Dual) else d) <= near for d in apart)

    reference = gated.recurrent(q, k, v, gated.gates(alpha), state)
    assert reference[0].dtype == (np.float32 if kind == "float32" else object)
    assert close(reference, gated.parallel(q, k, v, alpha, state=state))
    assert close(reference, gated.chunkwise(q, k, v, alpha, state=state, chunk=4, block=2))
    reference = delta.recurrent(q, k, v, beta, alpha, state)
    assert close(reference, delta.parallel(q, k, v, beta, alpha, state))
    assert close(reference, delta.chunkwise(q, k, v, beta, alpha, state, chunk=4))
    assert close((linear.recurrent(q, k, v)[0], state), (linear.chunkwise(q, k, v, chunk=4)[0], state))


@pytest.mark.parametrize("length", [0, 1])
def test_short_sequences_keep_the_state(length: int) -> None:
    q, k, v, a, b = Q[:length], K[:length], V[:length], ALPHA[:length], BETA[:length]
    values = rationals(RNG, length, E)
    expected = gated.recurrent(q, k, v, gated.gates(a, values), STATE)
    for o, last in (
        gated.parallel(q, k, v, a, values, STATE),
        gated.chunkwise(q, k, v, a, values, STATE, chunk=3),
    ):
        assert o.shape == (length, E)
        assert difference(last, expected[1]) == 0
    expected = delta.recurrent(q, k, v, b, a, STATE)
    for _, last in (delta.parallel(q, k, v, b, a, STATE), delta.chunkwise(q, k, v, b, a, STATE, chunk=3)):
        assert difference(last, expected[1]) == 0
    if length == 0:
        assert difference(expected[1], STATE) == 0


def test_the_inputs_are_left_alone() -> None:
    kept = [x.copy() for x in (Q, K, V, ALPHA, BETA, STATE)]
    delta.parallel(Q, K, V, BETA, ALPHA, STATE)
    delta.chunkwise(Q, K, V, BETA, ALPHA, STATE, chunk=4)
    gated.chunkwise(Q, K, V, ALPHA, state=STATE, chunk=4, bonus=BETA[:D])
    for before, after in zip(kept, (Q, K, V, ALPHA, BETA, STATE), strict=True):
        assert difference(before, after) == 0


def test_gaussian_and_dual_numbers() -> None:
    a, b = Gaussian(Fraction(3), Fraction(4)), Gaussian(Fraction(1, 2), Fraction(-2))
    assert a * b / b == a
    assert a - a == Gaussian(0, 0)
    assert (2 - a) + a == Gaussian(2, 0)
    assert Gaussian(0, 1) * Gaussian(0, 1) == Gaussian(-1, 0)
    x = Dual(Fraction(3), Fraction(1))
    assert (x * x / (1 + x)).slope == Fraction(15, 16)
    assert (1 / x - x).slope == -Fraction(1, 9) - 1
    assert (abs(-x)).slope == 1
    assert max(x, 1) is x
    # Entry by entry, not an array inside a number.
    assert slopes(x * np.array([x, 2], dtype=object)).tolist() == [6, 2]


def test_operations_are_counted() -> None:
    tally = Tally()
    a, b = counted(tally, 3, 4), counted(tally, 4, 5)
    product = a @ b
    assert (tally.products, tally.sums) == (3 * 4 * 5, 3 * 3 * 5)
    product + 1
    assert tally.sums == 3 * 3 * 5 + 15
    assert isinstance(product[0, 0], Counted)


def test_elementary_functions_of_balls_and_of_floats_agree() -> None:
    def activations(make):
        def draw(*shape):
            return each(lambda x: make(int(x.p)) / int(x.q), rationals(np.random.default_rng(3), *shape))

        return parameterisations.Activations(
            draw(2, 3), draw(2, 3), draw(2, 1), draw(2, 3), draw(3, 3), make(1) / 3, make(31) / 32, draw(3)
        )

    for row in parameterisations.ROWS:
        balls = row.factors(parameterisations.Balls(), activations(flint.arb))
        numbers = row.factors(mpmath.mp, activations(mpmath.mpf))
        for x, y in zip(balls, numbers, strict=True):
            for ball, number in zip(x.flat, y.flat, strict=True):
                pair = (ball.re, number.re) if isinstance(ball, Gaussian) else (ball, number)
                assert float(pair[0].mid()) == pytest.approx(float(pair[1]), rel=1e-12)


def test_the_gate_gradient_agrees_with_autograd() -> None:
    def floats(x):
        return torch.tensor([[float(y) for y in row] for row in x], dtype=torch.float64)

    w = rationals(np.random.default_rng(8), N, E)
    q, k, v, state, cotangent = (floats(x) for x in (Q, K, V, STATE, w))
    g = floats(ALPHA).log().requires_grad_()
    total, last = torch.zeros(()), state
    for t in range(N):
        last = g[t].exp()[:, None] * last + torch.outer(k[t], v[t])
        total = total + (q[t] @ last) @ cotangent[t]
    total.backward()
    loss, inputs = gradients.GatedLoss(w), (Q, K, V, ALPHA, None, STATE)
    dq, dk = (gradients.derivative(loss, inputs, place) for place in range(2))
    closed = gradients.gate_gradient(Q, dq, K, dk, None, None)
    assert g.grad is not None
    torch.testing.assert_close(floats(closed), g.grad, rtol=1e-10, atol=1e-10)


def test_growth_measures_an_error_that_was_put_in() -> None:
    lengths, tried = (16, 32), (1, 16)
    found = growth.measure(lengths, tried)
    assert len(found) == len(growth.FAMILIES) * len(lengths) * (len(tried) + 1)
    assert all(0 < m.error < 1e-5 for m in found)
    assert all(0 < m.share < 1 for m in found if m.share == m.share)


def test_decays_by_logarithms_are_the_gated_form() -> None:
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((50, 3)) for _ in range(3))
    g = -rng.random((50, 3))
    exact = gated.recurrent(q, k, v, gated.gates(np.exp(g)))[0]
    for chunk in (1, 7, 20, 50):
        assert abs(growth.by_logarithms(q, k, v, g, chunk=chunk) - exact).max() < 1e-13


def test_generic_numbers_stay_in_their_range_and_differ() -> None:
    x = generic(np.random.default_rng(1), 40, 5, low=1, high=8, denominator=9)
    assert all(flint.fmpq(1, 9) <= entry < flint.fmpq(8, 9) for entry in x.flat)
    assert len(set(x.flat)) == x.size
    assert all((entry * 9 * 2**GENERIC_BITS).q == 1 for entry in x.flat)
    # Numerators of all sizes: their lowest bits are as random as their highest.
    assert 60 < sum(int((entry * 9 * 2**GENERIC_BITS).p) % 2 for entry in x.flat) < 140
    assert (generic(np.random.default_rng(1), 3) == generic(np.random.default_rng(1), 3)).all()


def test_degrees_by_hand_and_against_polynomials() -> None:
    x = Degree(1)
    assert 3 * x * x - x / 2 + 1 == Degree(2)
    assert x / (x + 1) + 1 / x == Degree(2, 2)
    t = flint.fmpq_poly([0, 1])
    assert (t * (t + 1) * t).degree() == (x * (x + 1) * x).numerator


def _of_degree_one(*shape: int):
    return each(lambda _: Degree(1), np.empty(shape, dtype=object))


def test_degrees_of_the_compared_forms() -> None:
    """Forms a/b and c/d differ by (ad − cb)/(bd), of a degree that the ledger says is below 2^16."""
    q, k, v, alpha, beta = (_of_degree_one(LENGTH, width) for width in (2, 2, 2, 2, 1))
    state = _of_degree_one(2, 2)
    found = [
        linear.recurrent(q, k, v, normalize=True)[0],
        gated.recurrent(q, k, v, gated.gates(alpha), state)[0],
        gated.chunkwise(q, k, v, alpha, alpha, state, chunk=16, block=4)[0],
        gated.factored(q, k, v, alpha, alpha),
        delta.recurrent(q, k, v, beta[:, 0], alpha, state)[0],
        delta.chunkwise(q, k, v, beta[:, 0], alpha, state, chunk=16)[0],
        delta.chunkwise(q, k, v, beta[:, 0], None, state, chunk=LENGTH)[0],
        delta.parallel(q, k, v, beta[:, 0], alpha, state)[0],
    ]
    sizes = [max(x.numerator for x in o.flat) + max(x.denominator for x in o.flat) for o in found]
    # qᵀΣkvᵀ over qᵀΣk; a gate a position, with the state and the query.
    assert sizes[:2] == [3 + 2, LENGTH + 2]
    assert 2 * max(sizes) < 2**DEGREE_BITS, sizes
