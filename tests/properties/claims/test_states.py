"""Claims about linear, gated and delta-rule attention: as found, and in a world in which each is false."""

from __future__ import annotations

import time
from dataclasses import replace

import flint
import numpy as np
import pytest

from attnproof.properties.claims import delta, gated_linear, linear, state_errors
from attnproof.properties.forms import base, gated, gradients, growth
from attnproof.properties.forms import delta as delta_forms
from attnproof.properties.forms import linear as linear_forms
from attnproof.properties.forms import mlstm as mlstm_forms
from attnproof.properties.forms import parameterisations as table
from attnproof.properties.forms.numbers import Gaussian

MODULES = (linear, gated_linear, delta, state_errors)
EXPECTED = {
    "mLSTM: a floor of 1 in the stabilised form": "REFUTED",
    "gated linear attention: Mamba's gate as an outer product": "REFUTED",
    "delta rule: Gated DeltaNet's chunk formula as printed": "REFUTED",
    "linear attention: error of recall": "SUPPORTED",
    "state: error of the forms against N": "CONDITIONAL",
    "state: error within the recurrence's bound": "SUPPORTED",
}


def test_every_run_can_afford_all_of_them() -> None:
    began = time.process_time()
    found = [finding for module in MODULES for finding in module.findings()]
    assert time.process_time() - began < 20.0
    assert len({finding.name for finding in found}) == len(found)
    for finding in found:
        assert finding.status == EXPECTED.get(finding.name, "HOLDS"), finding
        assert len({len(column) for column in finding.table.values()}) == 1
        plain = (bool, int, float, str)
        assert all(isinstance(x, plain) for column in finding.table.values() for x in column)


def shifted_after(factors):
    """Γ with the position's own decay in it."""
    return base.products_after(factors) * factors


@pytest.mark.parametrize(
    ("module", "name", "check"),
    [
        (gated, "products_after", gated_linear.equal_forms),
        (delta_forms, "products_after", delta.equal_forms),
        (mlstm_forms, "products_after", gated_linear.stabilised),
    ],
)
def test_a_wrong_decay_to_the_end_of_a_chunk_is_found(monkeypatch, module, name, check) -> None:
    monkeypatch.setattr(module, name, shifted_after)
    finding = check(7)
    assert finding.status == "REFUTED"
    assert "C = 3" in finding.evidence


def test_a_wrong_mask_of_linear_attention_is_found(monkeypatch) -> None:
    honest = linear_forms.parallel
    monkeypatch.setattr(
        linear_forms, "parallel", lambda q, k, *rest, **more: honest(q, k[::-1], *rest, **more)
    )
    assert linear.equal_forms(7).status == "REFUTED"


def test_a_state_that_is_not_handed_over_is_found(monkeypatch) -> None:
    honest = delta_forms.chunkwise
    monkeypatch.setattr(delta_forms, "chunkwise", lambda *part, **more: honest(*part[:5], None, **more))
    rows = delta.equal_forms(7).table
    wrong = [form for form, equal in zip(rows["form"], rows["equal"], strict=True) if not equal]
    assert set(wrong) == {"handed over at every split"}


def test_a_decay_of_the_wrong_direction_in_retention_is_found(monkeypatch) -> None:
    honest = gated.retention_parallel
    monkeypatch.setattr(gated, "retention_parallel", lambda q, k, v, gamma: honest(q, k, v, 1 / gamma))
    assert gated_linear.retention(7).status == "REFUTED"


def test_complex_gates_need_their_imaginary_part(monkeypatch) -> None:
    honest = base.products_after
    monkeypatch.setattr(
        gated, "products_after", lambda x: base.each(lambda y: replace(Gaussian.of(y), im=0), honest(x))
    )
    assert gated_linear.complex_gates(7).status == "REFUTED"


def test_the_printed_formula_is_right_only_without_decay() -> None:
    # With γ = 1 the mask is Γ: the misprint shows itself through the gates alone.
    q, k, v, beta, alpha = delta.inputs(9)
    ones = alpha[:, :1] * 0 + 1
    exact = delta_forms.recurrent(q, k, v, beta, ones)[0]
    assert base.difference(exact, delta_forms.printed(q, k, v, beta, ones, chunk=4, mask_only=True)[0]) == 0


def test_a_printed_formula_that_is_right_would_be_told(monkeypatch) -> None:
    honest = delta_forms.printed
    monkeypatch.setattr(
        delta_forms, "printed", lambda *x, mask_only, **more: honest(*x, mask_only=False, **more)
    )
    assert delta.printed_formula().status == "HOLDS"
    monkeypatch.setattr(
        delta_forms, "printed", lambda *x, mask_only, **more: honest(*x, mask_only=True, **more)
    )
    assert delta.printed_formula().status == "OPEN"


def test_orders_that_agree_are_told(monkeypatch) -> None:
    honest = delta_forms.recurrent
    monkeypatch.setattr(delta_forms, "recurrent", lambda *x, order: honest(*x, order=delta_forms.ORDERS[0]))
    assert delta.orders().status == "REFUTED"


def test_a_wrong_transition_breaks_contraction(monkeypatch) -> None:
    honest = delta_forms.transition
    monkeypatch.setattr(delta_forms, "transition", lambda k, beta: honest(k, 2 * beta))
    assert delta.contraction(10).status == "REFUTED"


def test_recall_needs_the_difference(monkeypatch) -> None:
    def additive(q, k, v, beta, alpha, state):
        after = state + beta * np.outer(k, v)
        return q @ after, after

    monkeypatch.setattr(delta_forms, "step", additive)
    assert delta.exact_recall().status == "REFUTED"


def test_derivatives_of_a_form_that_forgets_a_path(monkeypatch) -> None:
    honest = delta_forms.solve

    def constant(lower, right):
        plain = base.each(lambda x: x.value if hasattr(x, "value") else x, lower)
        return honest(plain, right)

    monkeypatch.setattr(delta_forms, "solve", constant)
    assert delta.derivatives(5).status == "REFUTED"


def test_a_floor_that_is_no_change_would_be_supported(monkeypatch) -> None:
    monkeypatch.setattr(mlstm_forms, "_floor", lambda M, keep_one: 1 / M)
    assert gated_linear.keeping_one().status == "SUPPORTED"


def test_a_row_of_the_table_beyond_its_range_or_its_recurrence(monkeypatch) -> None:
    rows = table.ROWS
    growing = replace(rows[2], factors=lambda e, p: (1 + 0 * rows[2].factors(e, p)[0],))
    monkeypatch.setattr(gated_linear, "ROWS", (growing,))
    finding = gated_linear.table_of_gates()
    assert finding.status == "REFUTED"
    assert "RetNet" in finding.evidence
    # A gate of each entry's own put through the recurrence of outer products.
    monkeypatch.setattr(gated_linear, "ROWS", (replace(rows[0], own=rows[1].own),))
    assert gated_linear.table_of_gates().table["reduces exactly"] == [False]


@pytest.mark.parametrize("name", ["gate_gradient", "shifted_gate_gradient", "value_gate_gradient"])
def test_gate_gradients_that_are_off(monkeypatch, name) -> None:
    honest = getattr(gradients, name)
    monkeypatch.setattr(gradients, name, lambda *x: honest(*x) + flint.fmpq(1, 1000))
    assert gated_linear.gate_gradients(4).status == "REFUTED"


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
    assert state_errors.bounded_growth([*even[:3], at("N", 4096, 64e-7)]).evidence.endswith(
        "at most as N^1.00"
    )


def test_ranks_and_costs_can_be_refuted(monkeypatch) -> None:
    honest = linear_forms.features
    # Equal keys: rank 1.
    monkeypatch.setattr(linear_forms, "features", lambda q, k, name, root=1: honest(q, 0 * k, name, root))
    assert linear.full_rank((8,)).status == "REFUTED"
    monkeypatch.undo()
    monkeypatch.setattr(linear_forms, "quadratic", lambda q, k, v, by_state: q @ (k.T @ v))
    assert linear.costs((2,)).status == "REFUTED"


def test_recall_and_the_kernel_can_be_refuted(monkeypatch) -> None:
    honest = linear_forms.parallel
    monkeypatch.setattr(linear_forms, "parallel", lambda q, k, v: honest(q, 2 * k, v))
    assert linear.recall((16,), trials=4).status == "REFUTED"
    monkeypatch.undo()
    monkeypatch.setattr(linear_forms, "parallel", lambda q, k, v: honest(q, 0 * k, v))
    assert linear.kernel_of_the_state().status == "REFUTED"
