"""Attention as a recurrence: scans, states and derivatives against plain loops."""

from __future__ import annotations

import math

import flint
import numpy as np
import pytest

from attnproof.properties.claims import fixed_query, prefix_scan
from attnproof.properties.claims.prefix_scan import State, combine, leaf, nothing
from attnproof.properties.forms.numbers import Dual


def test_states_against_floats_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(-5, 6, 12).tolist()
    values = rng.integers(-9, 10, 12).tolist()
    states = prefix_scan.running(
        [leaf(s, [flint.fmpq(v)]) for s, v in zip(scores, values, strict=True)], combine
    )
    for t, state in enumerate(states, 1):
        weights = [2.0**s for s in scores[:t]]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert state.m == max(scores[:t])
        assert float(state.output[0].p) / float(state.output[0].q) == pytest.approx(expected, rel=1e-14)
        assert float(state.c.p) / float(state.c.q) == pytest.approx(sum(weights) / 2.0**state.m, rel=1e-14)


def test_the_empty_state_is_neutral_and_empty() -> None:
    one = leaf(3, [flint.fmpq(1), flint.fmpq(2)])
    assert combine(nothing(2), one) == one == combine(one, nothing(2))
    assert combine(nothing(2), nothing(2)) == nothing(2)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 21])
@pytest.mark.parametrize("scan", [prefix_scan.odd_even, prefix_scan.hillis_steele])
def test_scans_give_all_prefixes_in_order(length, scan) -> None:
    # Concatenation is associative and not commutative: it shows a wrong order.
    items = [((i,), 0) for i in range(length)]
    found = scan(items, lambda x, y: (x[0] + y[0], 0))
    assert [x for x, _ in found] == [tuple(range(i + 1)) for i in range(length)]


def test_the_known_counts_of_operations() -> None:
    table = prefix_scan.scans((16, 64)).table
    for i, n in enumerate((16, 64)):
        log = int(math.log2(n))
        assert table["odd–even: operations"][i] == 2 * n - log - 2
        assert table["Hillis–Steele: operations"][i] == n * log - n + 1
        assert table["Hillis–Steele: depth"][i] == log


def test_an_operator_that_takes_the_wrong_maximum_is_found() -> None:
    def lower(x: State, y: State) -> State:
        if x.m is None or y.m is None:
            return combine(x, y)
        return combine(State(x.m + 1, x.c, x.a), y)

    assert prefix_scan.recurrence(9, lower).status == "REFUTED"
    assert prefix_scan.monoid(4, lower).status == "REFUTED"
    assert prefix_scan.block_by_block(7, lower).status == "REFUTED"


def test_an_operator_that_depends_on_the_order_alone_is_found() -> None:
    finding = prefix_scan.monoid(4, lambda x, y: y if x.m is None else x)
    assert finding.table["different"][0] == 0
    assert finding.table["different"][1] > 0
    assert finding.status == "REFUTED"


def test_a_scan_that_is_too_deep_is_found() -> None:
    def sequential(items, by):
        out = items[:1]
        for item in items[1:]:
            out.append(by(out[-1], item))
        return out

    assert prefix_scan.scans((16,), linear=sequential).status == "REFUTED"
    assert prefix_scan.scans((16,), short=sequential).status == "REFUTED"


def test_the_two_prefixes_of_the_counterexample() -> None:
    evidence = fixed_query.changing_query(8).evidence
    assert "2/3 and 1/3" in evidence
    # In floats: values 0, 1 at keys 0, 1 against values 1, 0 swapped in order of keys.
    assert np.average([0, 1], weights=[1, 2]) == pytest.approx(2 / 3)
    assert np.average([0, 1], weights=[2, 1]) == pytest.approx(1 / 3)


def test_other_queries_that_collide_or_not() -> None:
    assert fixed_query.changing_query(8, queries=(0, 5)).status == "CONDITIONAL"
    # At query 1 the two prefixes have different states already: no collision to show.
    assert fixed_query.changing_query(8, queries=(1, 0)).status == "HOLDS"


def test_rank_counts_queries_that_differ() -> None:
    assert fixed_query.memory_for_all_queries((4, 6), queries=3).table["rank"] == [3, 3]


def test_derivatives_against_differences() -> None:
    rng = np.random.default_rng(5)
    s, v = rng.integers(-3, 4, 6).astype(float), rng.normal(size=6).round(3)
    ds, dv = rng.normal(size=6).round(3), rng.normal(size=6).round(3)

    def output(h: float) -> tuple[float, float]:
        x = np.log(2) * s + h * ds
        weights = np.exp(x)
        return float(weights @ (v + h * dv) / weights.sum()), float(np.log(weights.sum()))

    def exact(x: float) -> flint.fmpq:
        return flint.fmpq(round(1000 * x), 1000)

    scores = [Dual(flint.fmpq(int(x)), exact(d)) for x, d in zip(s, ds, strict=True)]
    values = [Dual(exact(x), exact(d)) for x, d in zip(v, dv, strict=True)]
    found = fixed_query._differentiated(scores, values, lambda m: flint.fmpq(0))
    for i, name in enumerate(("o", "L")):
        difference = (output(1e-5)[i] - output(-1e-5)[i]) / 2e-5
        assert float(found[name].p) / float(found[name].q) == pytest.approx(difference, rel=1e-7)


def test_a_maximum_held_constant_in_one_place_only_is_found(monkeypatch) -> None:
    honest, calls = fixed_query._exp, iter(range(10**6))

    def half(s):
        # Every third exponential, the weight of the new token, loses its derivative in m.
        return Dual(honest(s).value, 0) if next(calls) % 3 == 2 else honest(s)

    monkeypatch.setattr(fixed_query, "_exp", half)
    assert fixed_query.gradient(4).status == "REFUTED"


def test_costs_of_a_cache_are_quadratic() -> None:
    table = fixed_query.costs((10, 20)).table
    assert table["scores, with a cache"] == [55, 210]
    assert table["scores, one query"] == [10, 20]
    assert table["numbers cached"] == [50, 100]
