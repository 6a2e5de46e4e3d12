"""Semiseparable matrices, Mamba-2's forms, counted costs, segment sums: against naive computations."""

from __future__ import annotations

import math

import flint
import numpy as np
import pytest

from attnproof.properties.claims import segment_sums, ssd
from attnproof.properties.forms import base, gated
from attnproof.properties.forms import ssd as forms
from attnproof.properties.forms.numbers import rationals


def model(length: int = 6, order: int = 2):
    rng = np.random.default_rng(2)
    return (
        [rationals(rng, order, order) for _ in range(length)],
        [rationals(rng, order) for _ in range(length)],
        [rationals(rng, order) for _ in range(length)],
    )


def integers(rows):
    return base.each(lambda x: flint.fmpq(int(x)), np.array(rows))


def test_a_models_matrix_is_its_recurrence() -> None:
    parts, x = model(), rationals(np.random.default_rng(3), 6)
    M = forms.materialised(parts)
    assert list(M @ x) == list(forms.run(parts, x))
    A, B, C = parts
    assert M[4, 1] == C[4] @ A[4] @ A[3] @ A[2] @ B[1]
    assert M[1, 4] == 0


def test_ranks_by_a_matrix_whose_ranks_are_known() -> None:
    assert forms.block_ranks(np.array([[flint.fmpq(1)] * 3] * 3, dtype=object)) == [1, 1, 1]
    assert forms.block_ranks(integers(np.eye(4, dtype=int))) == [1, 1, 1, 1]
    assert forms.block_ranks(ssd.from_softmax(np.random.default_rng(0), 5, 1)) == [1, 2, 3, 2, 1]


def test_a_realisation_is_as_narrow_as_the_ranks() -> None:
    M = ssd.from_inverse(np.random.default_rng(4), 7, 2)
    A, B, C = forms.realised(M)
    assert [len(b) for b in B] == forms.block_ranks(M)
    x = rationals(np.random.default_rng(5), 7)
    assert list(forms.run((A, B, C), x)) == list(M @ x)


def test_a_realisation_of_a_matrix_with_a_gap() -> None:
    # Nothing is handed over at the second position: a state of no numbers.
    M = integers([[2, 0, 0], [0, 0, 0], [0, 5, 3]])
    parts = forms.realised(M)
    assert base.difference(forms.materialised(parts), M) == 0


def test_the_blocks_are_the_gated_recurrence() -> None:
    rng = np.random.default_rng(6)
    x, a, B, C = rationals(rng, 7, 2), rationals(rng, 7), rationals(rng, 7, 3), rationals(rng, 7, 3)
    state, due = np.zeros((3, 2), dtype=object), np.empty_like(x)
    for t in range(7):
        due[t], state = forms.step(x[t], a[t], B[t], C[t], state)
    assert base.difference(due, gated.parallel(C, B, x, a[:, None])[0]) == 0
    found, last = forms.blocks(x, a, B, C, chunk=3)
    assert base.difference(due, found) == 0
    assert base.difference(state, last) == 0


@pytest.mark.parametrize(
    ("name", "forms_off"), [("products_after", "blocks of 3"), ("segments", "quadratic")]
)
def test_forms_that_are_off_are_found(monkeypatch, name, forms_off) -> None:
    honest = getattr(forms, name)
    monkeypatch.setattr(forms, name, lambda x: honest(x) * 2)
    table = ssd.equal_forms(7).table
    assert not table["equal"][table["form"].index(forms_off)]


def test_counts_by_hand() -> None:
    # 2·2 decays, 2·2 products and sums to write, 2·2 products and 2 sums to read.
    assert ssd._generation(1, 2, 2) == 4 + 4 + 4 + 4 + 2
    assert ssd._generation(3, 2, 2) == 3 * 18
    assert ssd.generation_cost().table["operations a token"] == [5 * n * n - n for n in range(1, 7)]
    assert ssd.generation_cost(wide=False).table["operations a token"] == [5 * n - 1 for n in range(1, 7)]


def test_interpolation() -> None:
    cubic = ssd._interpolated([1, 2, 3, 4, 5], [x**3 - 2 * x + 7 for x in range(1, 6)])
    assert cubic == flint.fmpq_poly([7, -2, 0, 1])


def test_a_cheaper_step_would_hold(monkeypatch) -> None:
    monkeypatch.setattr(forms, "step", lambda x, a, B, C, state: (C * B + x, state))
    assert ssd.generation_cost().status == "HOLDS"
    monkeypatch.setattr(forms, "blocks", lambda x, a, B, C, chunk: forms.quadratic(x, a, B, C))
    assert ssd.training_cost((2, 3, 4, 5)).status == "REFUTED"


def test_wider_states_are_found() -> None:
    assert ssd.ranks(((6, 1),), lambda rng, n, order: ssd.from_model(rng, n, order + 1)).status == "REFUTED"
    assert ssd.realisation(((5, 2),), surplus=1).status == "REFUTED"


def test_counterexamples_of_ranks_are_of_full_rank() -> None:
    found = ssd.ranks(((5, 2),), ssd.from_softmax).counterexample
    block = found[found.index("(") + 1 : found.index(")")]
    rows = [[flint.fmpq(int(x)) for x in row.split(", ")] for row in block.split("; ")]
    assert flint.fmpq_mat(rows).rank() == 3


def test_an_autoregression_is_the_inverse_of_a_band() -> None:
    rng = np.random.default_rng(7)
    assert max(forms.block_ranks(ssd.from_inverse(rng, 9, 3))) == 3
    assert ssd.bounded_recurrence(((6, 2),)).table["largest rank"] == [2]


def test_segment_sums_are_torchs() -> None:
    g = (-np.random.default_rng(8).random(9)).astype(np.float32)
    total = np.cumsum(g)
    by_difference = forms.segment_sums(g, difference=True)
    assert by_difference[7, 2] == total[7] - total[2]
    by_segment = forms.segment_sums(g, difference=False)
    due = np.float32(0)
    for x in g[3:8]:
        due = due + x
    assert by_segment.dtype == np.float32
    assert by_segment[7, 2] == due
    assert by_segment[3, 3] == by_difference[3, 3] == 0
    assert by_segment[2, 7] == by_difference[2, 7] == -math.inf


def test_errors_of_segments_are_exact() -> None:
    g = np.array([-(2.0**24), -1.0, -0.5], np.float32)
    lost = {(i, j): float(error) for i, j, error, _ in segment_sums._errors(g, difference=True)}
    assert lost == {(1, 0): 1.0, (2, 0): 1.5, (2, 1): 0.5}
    kept = [float(error) for *_, error, _ in segment_sums._errors(g, difference=False)]
    assert kept == [0.0, 0.0, 0.0]


def test_bounds_of_segments_are_of_their_own_numbers() -> None:
    g = np.array([-3.0, -1.0, -2.0, -4.0], np.float32)
    bounds = {(i, j): float(bound.mid()) for i, j, _, bound in segment_sums._errors(g, difference=False)}
    assert bounds[1, 0] == 0
    assert bounds[3, 0] == pytest.approx(2 * 2.0**-24 * 7, rel=1e-6)


def test_a_sum_that_is_slightly_off_is_beyond_the_bound(monkeypatch) -> None:
    honest, off = forms.segment_sums, np.float32(1 + 2.0**-12)
    monkeypatch.setattr(forms, "segment_sums", lambda g, difference: honest(g, difference=difference) * off)
    assert segment_sums.within_segments(16, difference=False).status == "REFUTED"


def test_growth_is_told_from_none() -> None:
    grown = segment_sums.growth((256, 4096)).table["largest relative error"]
    assert grown[1] > 4 * grown[0]
    assert segment_sums.growth((256, 4096), difference=False).status == "REFUTED"


def test_boundaries_by_place() -> None:
    assert segment_sums.boundaries(4).table == {"segments": [40], "wrong": [0]}
    assert segment_sums.boundaries(4, difference=True).counterexample.endswith("nan")
