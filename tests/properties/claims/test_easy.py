"""Easy attention's claims against other computations, and in worlds in which each is false."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations as orders

import mpmath
import pytest
import torch

from attnproof.properties.claims import easy, easy_layer


def test_easy_attention_superposes() -> None:
    assert easy.linearity().status == "HOLDS"


def test_superposition_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = easy._easy
    monkeypatch.setattr(easy, "_easy", lambda alpha, v, band=None: outputs(alpha, v, band).clamp(min=0.0))
    assert easy.linearity().status == "REFUTED"


def test_a_frozen_softmax_is_easy_attention() -> None:
    assert easy.frozen_softmax().status == "HOLDS"


def test_a_frozen_softmax_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = easy.outputs

    def other(family, *tensors, **options):
        found = outputs(family, *tensors, **options)
        return replace(found, value=found.value + 1e-9) if family == "easy" else found

    monkeypatch.setattr(easy, "outputs", other)
    assert easy.frozen_softmax().status == "REFUTED"


def test_easy_attention_belongs_to_positions() -> None:
    finding = easy.permutations()
    assert finding.status == "REFUTED"
    assert finding.table["equivariant"] == [False, True, True, True]


def test_only_a_constant_off_the_diagonal_commutes_with_all_permutations() -> None:
    # The commutant of all permutation matrices of 4 tokens: dimension 2, spanned by I and 11ᵀ.
    conditions = []
    for order in orders(range(4)):
        p = torch.eye(4, dtype=torch.float64)[list(order)]
        conditions.append(
            torch.kron(p, torch.eye(4).double()) - torch.kron(torch.eye(4).double(), p.T.contiguous())
        )
    assert 16 - int(torch.linalg.matrix_rank(torch.cat(conditions))) == 2


def test_permuted_tokens_are_permuted_by_a_symmetric_alpha() -> None:
    symmetric = torch.eye(6, dtype=torch.float64)[None] * 5 - 1
    assert easy.permutations(alpha=symmetric).status == "HOLDS"
    # A circulant α commutes with the cycle but not with the swap: both generators are needed.
    circulant = torch.stack([torch.arange(6.0, dtype=torch.float64).roll(i) for i in range(6)])[None]
    assert easy.permutations(alpha=circulant).status == "REFUTED"


def test_a_swap_and_a_cycle_generate_every_permutation() -> None:
    swap, cycle = (tuple(order.tolist()) for order in easy.generators(4))
    found = {(0, 1, 2, 3)}
    while True:
        more = found | {tuple(p[i] for i in g) for p in found for g in (swap, cycle)}
        if more == found:
            break
        found = more
    assert found == set(orders(range(4)))


def test_ranks() -> None:
    finding = easy.ranks()
    assert finding.status == "CONDITIONAL"
    assert finding.table == {"matrix": ["QKᵀ", "α", "P"], "rank": [4, 24, 24]}
    q, k = (easy._integers(24, 4, seed=seed) for seed in (12, 13))
    assert int(torch.linalg.matrix_rank(q @ k.T)) == 4
    with mpmath.workdps(60):
        p = mpmath.matrix((q @ k.T / 4).tolist()).apply(mpmath.exp)
        assert abs(mpmath.det(p)) > 1e-30


def test_ranks_can_be_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(easy, "_integers", lambda *shape, seed: torch.ones(shape).double())
    assert easy.ranks().status == "REFUTED"


def test_a_stack_is_one_matrix_a_head() -> None:
    assert easy.stack(4).status == "HOLDS"
    assert easy.stack(4, between=torch.relu).status == "REFUTED"


def test_rank_of_products() -> None:
    assert easy.product_ranks().table["rank"] == [1, 2, 4]
    # Entries squared are products of width d(d + 1)/2.
    assert easy.product_ranks(square=True).table["rank"] == [1, 3, 10]


def test_the_smallest_softmax_of_more_rank_than_its_scores() -> None:
    e = mpmath.e
    p = mpmath.matrix([[0.5, 0.5], [1 / (1 + e), e / (1 + e)]])
    told = float(mpmath.det(p))
    assert told == pytest.approx(float((e - 1) / (2 * (1 + e))))
    assert f"{told:.6f}" in easy.ranks().counterexample


# The layer


def test_the_layer_against_loops() -> None:
    x, w = easy_layer._integers(4, 4, seed=1), easy_layer._integers(4, 4, seed=2)
    alpha = easy_layer._integers(2, 4, 4, seed=3)
    found = easy_layer.layer(x, w, alpha)
    for i in range(4):
        for c in range(4):
            head = c // 2
            direct = sum(
                int(alpha[head, i, s]) * int(w[s, r]) * int(x[r, c]) for s in range(4) for r in range(4)
            )
            assert int(found[i, c]) == direct


def test_the_projection_mixes_tokens() -> None:
    finding = easy_layer.rows_of_values()
    assert finding.status == "REFUTED"
    assert "W_V·x = [[3, 4], [1, 2]]" in finding.counterexample
    assert easy_layer.rows_of_values(side="right").table["its value changes with token 0"] == [
        True,
        False,
        False,
        False,
    ]


def test_one_matrix_a_head_from_the_left_only() -> None:
    assert easy_layer.one_matrix().status == "HOLDS"
    assert easy_layer.one_matrix(side="right").status == "REFUTED"


def test_only_square_inputs_run() -> None:
    finding = easy_layer.shapes(((64, 64), (72, 64)))
    assert finding.table["runs"] == [True, False]
    assert easy_layer.shapes(((5, 5),)).status == "HOLDS"


def test_parameters_are_those_of_modules() -> None:
    s, d, h = 7, 5, 3
    easy_count, softmax_count = easy_layer.parameters(s, d, h)
    projection = torch.nn.Linear(s, d, bias=False)
    assert easy_count == torch.nn.Bilinear(s, s, h, bias=False).weight.numel() + projection.weight.numel()
    assert softmax_count == torch.nn.MultiheadAttention(d, 1, bias=False).in_proj_weight.numel()


def test_fewer_parameters_for_short_sequences_only() -> None:
    assert easy_layer.sizes(((8, 64, 4),)).status == "HOLDS"
    assert easy_layer.sizes(((64, 64, 4),)).status == "REFUTED"
    assert easy_layer.sizes(((8, 64, 4), (64, 64, 4))).status == "CONDITIONAL"
