"""Counts, blocks, norms and the gadget of sigmoid attention against plain loops and torch."""

from __future__ import annotations

import math
from fractions import Fraction

import flint
import numpy as np
import pytest
import torch

from attnproof.properties.claims import sigmoid_blocks, sigmoid_costs, sigmoid_frobenius, sigmoid_gadget
from attnproof.properties.forms.numbers import Counted, Tally, counted


def by_loops(n: int, m: int, d: int, *, softmax: bool) -> int:
    """Operations of attention, one by one."""
    total = 0
    for _ in range(m):
        for _ in range(n):
            total += d + (d - 1)  # q·k
            total += 4 if not softmax else 2  # bias, exponential, sum, quotient; difference, exponential
        if softmax:
            total += (n - 1) + (n - 1)  # maximum, sum
            total += d  # the output is divided
        total += d * (n + (n - 1))  # Σ p v
    return total


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (3, 3, 2), (5, 1, 4), (7, 2, 3)])
def test_operations_one_by_one(n: int, m: int, d: int) -> None:
    assert sigmoid_costs.operations(sigmoid_costs.sigmoid, n, d, m) == by_loops(n, m, d, softmax=False)
    assert sigmoid_costs.operations(sigmoid_costs.softmax, n, d, m) == by_loops(n, m, d, softmax=True)


def test_the_polynomial_of_a_count() -> None:
    assert sigmoid_costs.polynomial(sigmoid_costs.sigmoid, 2) == flint.fmpq_poly([0, -2, 11])
    assert sigmoid_costs._told(flint.fmpq_poly([3, -2, 11])) == "11·n² − 2·n + 3"
    assert sigmoid_costs._told(flint.fmpq_poly([0])) == "0"


def test_a_count_that_is_no_polynomial_is_told() -> None:
    def powers(q, k, v):
        return [counted(k[0, 0].tally, 2)[0] + 1 for _ in range(2 ** len(k))]

    with pytest.raises(ArithmeticError, match="not those of the polynomial"):
        sigmoid_costs.polynomial(powers, 1)


def test_linear_growth_would_be_told() -> None:
    finding = sigmoid_costs.linear_time()
    assert finding.status == "REFUTED"
    assert finding.table["over those of n/2"][-1] == pytest.approx(4, rel=0.01)
    # Cubic growth is not linear either, and a window of one key is.
    cubic = lambda q, k, v: (q @ k.T) @ (k @ q.T) @ (q @ k.T)
    assert sigmoid_costs.linear_time(cubic).status == "REFUTED"
    assert sigmoid_costs.linear_time(lambda q, k, v: (q * k).sum(axis=1)[:, None] * v).status == "HOLDS"


def test_the_order_of_the_cost_by_a_family_of_another() -> None:
    finding = sigmoid_costs.same_order()
    assert finding.table["coefficient of n²d"] == [4.0, 4.0]
    # Scores computed twice.
    twice = lambda q, k, v: (q @ k.T) @ v + sigmoid_costs.sigmoid(q, k, v)
    assert sigmoid_costs.same_order(twice).status == "REFUTED"


def test_a_form_that_doubling_changes_says_nothing() -> None:
    plain = lambda q, k, v: (q @ k.T) @ v
    assert sigmoid_costs.doubling_and_cost(exact=plain).status == "OPEN"


def test_counting_numbers_count_a_function_once() -> None:
    tally = Tally()
    sigmoid_costs._one(Counted(tally))
    assert (tally.products, tally.sums) == (1, 0)


def test_which_has_more_operations() -> None:
    # Long sequences decide, not the term of n.
    finding = sigmoid_costs.more_than_softmax()
    more = dict(
        zip(
            zip(finding.table["sigmoid"], finding.table["softmax"], strict=True),
            finding.table["more for long n"],
            strict=True,
        )
    )
    assert more["1/(1 + e^−x), its sign apart", "outputs divided"] is True
    assert more["tanh, fused", "outputs divided"] is False
    fewer = {"tanh, fused": sigmoid_costs.sigmoid_by_fma}
    assert sigmoid_costs.more_than_softmax(fewer).status == "REFUTED"
    assert finding.table["operations at n = 64"][0] == by_loops(64, 64, 16, softmax=False)


# Blocks


def test_weights_of_blocks_against_torch() -> None:
    w, v, do = sigmoid_blocks._inputs(4)
    z = torch.tensor(
        [[math.log(float(x)) for x in row] for row in w], dtype=torch.float64, requires_grad=True
    )
    values, up = (torch.tensor([[float(x) for x in row] for row in y], dtype=torch.float64) for y in (v, do))
    p = torch.sigmoid(z - math.log(w.shape[1]))
    found = sigmoid_blocks.sigmoid(w, w.shape[1])
    assert np.allclose(found.astype(float), p.detach().numpy(), atol=1e-15)
    (p @ values * up).sum().backward()
    fused = sigmoid_blocks._fused(found, do @ v.T)
    assert np.allclose(fused.astype(float), z.grad.numpy(), atol=1e-14)


def test_a_bias_of_the_block_is_found() -> None:
    finding = sigmoid_blocks.blocks_add(lambda block, n: sigmoid_blocks.sigmoid(block, block.shape[1]))
    assert finding.status == "REFUTED"


def test_derivatives_of_softmax_have_row_sums() -> None:
    finding = sigmoid_blocks.gradient(sigmoid_blocks.softmax)
    w, v, do = sigmoid_blocks._inputs(5)
    z = torch.tensor(
        [[math.log(float(x)) for x in row] for row in w], dtype=torch.float64, requires_grad=True
    )
    values, up = (torch.tensor([[float(x) for x in row] for row in y], dtype=torch.float64) for y in (v, do))
    (torch.softmax(z, 1) @ values * up).sum().backward()
    assert finding.table["derivative of Σ do·o by the logit"] == pytest.approx(
        z.grad.flatten().tolist(), abs=1e-14
    )


def test_merging_is_associative_and_rescaling_matters() -> None:
    states = [(s, Fraction(1), Fraction(v)) for s, v in ((3, 1), (-2, 5), (0, -4))]
    a, b, c = states
    assert sigmoid_blocks.merged(sigmoid_blocks.merged(a, b), c) == sigmoid_blocks.merged(
        a, sigmoid_blocks.merged(b, c)
    )
    assert sigmoid_blocks.merged(a, b)[1] == 1 + Fraction(1, 32)
    assert sigmoid_blocks.softmax_in_parts((2, 9), sigmoid_blocks.added).status == "OPEN"
    assert sigmoid_blocks.softmax_in_parts((2, 9)).status == "REFUTED"
    # Means alone do not merge; with their masses, but without the maxima, they do not either.
    for handed in (sigmoid_blocks.output, lambda state: state[1:]):
        assert sigmoid_blocks.softmax_in_parts((2,), handed=handed).status == "HOLDS"
    assert sigmoid_blocks.softmax_in_parts((2,), handed=lambda state: state[:2]).status == "REFUTED"


# Norms


def test_norms_against_torch() -> None:
    finding = sigmoid_frobenius.rows_between((3,))
    i = torch.arange(3)
    matrices = (torch.ones(3, 3), (i[:, None] + i) % 3 + 1.0, torch.tensor([[2.0**60, 1.0, 1.0]] * 3))
    for norm, matrix in zip(finding.table["‖P‖_F"], matrices, strict=True):
        assert norm == pytest.approx(float((matrix / matrix.sum(1, keepdim=True)).norm()), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_identities_of_sums_of_squares(n: int) -> None:
    assert sigmoid_frobenius.identities(n) == (True, True)


def test_a_row_outside_is_found() -> None:
    # Weights that sum to 2 or to 1/2.
    for factor in (Fraction(2), Fraction(1, 2)):
        finding = sigmoid_frobenius.rows_between((2,), lambda row, f=factor: [f * w / sum(row) for w in row])
        assert finding.status == "REFUTED"
    assert sigmoid_frobenius.without_bias((4,), lambda row: [Fraction(1, 2)] * len(row)).status == "REFUTED"


# The gadget


def test_four_heads_against_torch() -> None:
    tokens = torch.tensor([float(z) for z in sigmoid_gadget._TOKENS], dtype=torch.float64)
    found = sigmoid_gadget._outputs(sigmoid_gadget._TOKENS, sigmoid_gadget.FOUR_HEADS, 16)
    low, high, key = tokens, tokens - 1, tokens - 0.75
    heads = [(0.5, low, key), (-0.5, high, key), (0.5, low, key * 0 + 1), (-0.5, high, key * 0 + 1)]
    expected = sum(f * torch.sigmoid(16 * q[:, None] * k) @ tokens for f, q, k in heads)
    assert [float(x) for x in found] == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("missing", range(4))
def test_all_four_heads_are_needed(missing: int) -> None:
    heads = [head for i, head in enumerate(sigmoid_gadget.FOUR_HEADS) if i != missing]
    assert sigmoid_gadget.selective_shift((128,), heads).status == "REFUTED"


def test_the_shift_goes_to_the_tokens_between_the_thresholds() -> None:
    found = sigmoid_gadget._outputs(sigmoid_gadget._TOKENS, sigmoid_gadget.FOUR_HEADS, 4096)
    assert [round(float(x), 6) for x in found] == [0, 0, 3.5, 3.5, 0, 0]
