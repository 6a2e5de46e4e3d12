"""The formula sheet's identities, against torch, numpy, scipy and numbers worked out by hand."""

from __future__ import annotations

import math

import flint
import numpy as np
import pytest
import torch

from attnproof.properties.claims import (
    formula_sheet,
    formula_sheet_costs,
    formula_sheet_features,
    formula_sheet_states,
)
from attnproof.properties.forms.numbers import rationals


def numbers(*entries: str) -> np.ndarray:
    return np.array([flint.fmpq(*map(int, (entry + "/1").split("/")[:2])) for entry in entries])


def floats(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda entry: float(entry.p) / float(entry.q), otypes=[float])(x)


def test_attention_with_a_rational_weight() -> None:
    q, k, v = numbers("1", "2")[:, None], numbers("1", "0")[:, None], numbers("3", "5")[:, None]
    # Logits 1 and 0, 2 and 0: weights 2 and 1, 5 and 1.
    assert list(formula_sheet.attend(q, k, v)[:, 0]) == [flint.fmpq(11, 3), flint.fmpq(20, 6)]


def test_turns_are_powers_of_a_complex_number() -> None:
    unit = np.array([numbers("3/5", "4/5")])
    for turns in (-2, 0, 1, 3):
        x = formula_sheet.turned(np.array([numbers("1", "2")]), unit, turns)
        due = (1 + 2j) * (0.6 + 0.8j) ** turns
        assert floats(x)[0].tolist() == pytest.approx([due.real, due.imag])


def test_sparsemax_by_a_projection_of_float64() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        s = rationals(rng, 5)
        found = floats(formula_sheet.sparsemax(s))
        assert found.sum() == pytest.approx(1.0)
        # The nearest point of the simplex: no other is nearer.
        distance = ((floats(s) - found) ** 2).sum()
        others = rng.dirichlet(np.full(5, 0.3), 500)
        assert (((floats(s) - others) ** 2).sum(axis=1) >= distance - 1e-12).all()
    assert list(formula_sheet.sparsemax(numbers("1", "1/2", "-1"))) == [flint.fmpq(3, 4), flint.fmpq(1, 4), 0]


def test_random_features_by_sampling() -> None:
    draw = torch.Generator().manual_seed(3)
    q, k = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.1, 0.4]).double()
    w = torch.randn(400_000, 2, generator=draw, dtype=torch.float64)
    products = torch.exp(w @ (q + k) - (q @ q + k @ k) / 2)
    assert float(products.mean()) == pytest.approx(math.exp(q @ k), rel=5e-3)
    relative = float(products.var()) / math.exp(2 * q @ k)
    assert relative == pytest.approx(math.exp((q + k) @ (q + k)) - 1, rel=3e-2)


def test_moments_of_the_normal_distribution() -> None:
    series = formula_sheet_features._mean_exponential(2, 6)
    # E e^(2ωs) = e^(2s²): 2 at s², 2 at s⁴, 4/3 at s⁶, where s = q + k.
    assert [series[0, n] for n in (0, 2, 4, 6)] == [1, 2, 2, flint.fmpq(4, 3)]
    assert series[1, 1] == 4
    assert (1, 0) not in series


def test_conjugate_gradients_against_numpy() -> None:
    a = np.array([numbers("4", "1"), numbers("1", "3")])
    found = formula_sheet_states.conjugate_gradients(a, numbers("1", "2"), 2)
    assert list(found) == [flint.fmpq(1, 11), flint.fmpq(7, 11)]
    np.testing.assert_allclose(floats(found), np.linalg.solve([[4, 1], [1, 3]], [1, 2]))


def test_guarded_steps_by_float64() -> None:
    for size, due in zip((1.0, 2.0**-10), (0, 3), strict=True):
        x, r, p = 0.0, size, size
        for _ in range(30):
            rate = r * r / (p * p + 1e-5)
            x, new = x + rate * p, r - rate * p
            r, p = new, new + new * new / (r * r + 1e-5) * p
        table = formula_sheet_states.guarded_steps().table
        assert table["relative error"][due] == pytest.approx(1 - x / size, rel=1e-6)


def test_levels_of_a_short_sequence() -> None:
    table = [[formula_sheet_states.level(i, j, 2) for j in range(i + 1)] for i in range(4)]
    assert table == [[[0]], [[1], [0]], [[2], [2], [0]], [[2], [2], [1], [0]]]


def test_all_levels_count() -> None:
    assert formula_sheet_states.levels_of_one(6).status == "HOLDS"
    assert formula_sheet_states.levels_of_one(6, first=flint.fmpq(2)).status == "REFUTED"


def test_decays_meet_where_e_to_the_w_is_minus_w() -> None:
    table = formula_sheet_states.decays_of_rwkv7().table
    for w, documented, used in zip(*list(table.values())[:3], strict=True):
        assert documented == pytest.approx(math.exp(-math.exp(w)))
        assert used == pytest.approx(math.exp(w))
        assert (documented > used) == (w < -0.5671)


def test_cosines_beyond_a_right_angle() -> None:
    assert formula_sheet_features.cosine_signs([1, 5]).status == "HOLDS"
    assert "|i − j| = 6: -0.3090" in formula_sheet_features.cosine_signs([5], longer=1).counterexample


def test_work_of_products() -> None:
    work = formula_sheet_costs.Work()
    assert work.product("a", np.ones((2, 3)), np.ones((3, 5))).shape == (2, 5)
    work.product("a", np.ones((1, 3)), np.ones((3, 1)))
    assert work.spent == {"a": 66}


def test_chunks_of_delta_at_other_sizes() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rationals(rng, 6, 2) for _ in range(3))
    o, state, work = formula_sheet_costs.delta_chunks(q, k, v, rationals(rng, 6), 3)
    assert (o.shape, state.shape) == ((6, 2), (2, 2))
    assert work.spent.pop("solve") == 2 * 2 * (1 + 4)
    assert sum(work.spent.values()) == formula_sheet_costs.with_the_state(6, 2, 3) == 360 + 144
    assert formula_sheet_costs.by_parts(6, 2, 3) == 360 + 96


def test_operations_of_mamba() -> None:
    found = formula_sheet_costs.mamba_costs(2, 3, 4).table["an entry and position"]
    assert found == [8 - 1 / 4, 7.0]
