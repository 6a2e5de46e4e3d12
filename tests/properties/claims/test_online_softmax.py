"""Claims about online softmax: naive sums, numbers of groupings and partitions, accesses by hand."""

from __future__ import annotations

import math

import flint
import numpy as np
import pytest

from attnproof.laboratory import Bench
from attnproof.properties.claims import online_softmax, partial_outputs, softmax_accesses
from attnproof.properties.claims.correct_rounding import FP32, Rounded

EXPECTED = {
    "ONL-1b": "CONDITIONAL",
    "ONL-2b": "REFUTED",
    "ONL-2c": "CONDITIONAL",
    "ONL-3b": "OPEN",
    "ONL-4b": "CONDITIONAL",
}
ALL = [*online_softmax.CLAIMS, *partial_outputs.CLAIMS, *softmax_accesses.CLAIMS]


@pytest.mark.parametrize("claim", ALL, ids=lambda claim: claim.id)
def test_status(claim) -> None:
    finding = claim.check(Bench("quick"))
    assert finding.status == EXPECTED.get(claim.id, "HOLDS"), finding
    assert len({len(column) for column in finding.table.values()}) <= 1


def test_recurrence_against_exponentials() -> None:
    x = [0.5, -1.0, 2.0, 1.75, 3.0]
    w = [flint.fmpq(*math.exp(a).as_integer_ratio()) for a in x]
    for j, (m, d) in enumerate(online_softmax.recurrence(w), start=1):
        assert math.log(float(m.p) / float(m.q)) == pytest.approx(max(x[:j]), abs=1e-14)
        due = sum(math.exp(a - max(x[:j])) for a in x[:j])
        assert float(flint.arb(d).mid()) == pytest.approx(due, rel=1e-14)


def test_theorem_sees_a_wrong_start(monkeypatch) -> None:
    monkeypatch.setattr(online_softmax, "NEUTRAL", (flint.fmpq(1), flint.fmpq(1)))
    assert online_softmax.theorem(3, 3, 5).status == "REFUTED"


def test_numbers_of_groupings_and_partitions() -> None:
    assert [len(list(online_softmax.groupings(n))) for n in range(1, 7)] == [1, 1, 2, 5, 14, 42]
    assert [len(list(partial_outputs.partitions(range(n)))) for n in range(6)] == [1, 1, 2, 5, 15, 52]


def test_combination_in_fp32_as_numpy_computes_it() -> None:
    f = np.float32
    a, b = (f(-1.5), f(1.25)), (f(0.75), f(3.0))
    scale = f(np.exp(np.float64(f(a[0] - b[0]))))
    due = f(f(a[1] * scale) + b[1])
    arrays = [(np.array([float(m)]), np.array([float(d)])) for m, d in (a, b)]
    m, d = online_softmax.combined_rounded(*arrays, Rounded(FP32))
    assert (m[0], d[0]) == (0.75, float(due))


def test_storage_stops_at_twice_the_inverse_of_the_roundoff() -> None:
    table = online_softmax.storage().table
    assert dict(zip(table["format"], table["d"], strict=True)) == {"fp16": 2048.0, "bf16": 256.0}


def test_the_least_grouping_in_float16() -> None:
    """(0, 0, −2): 1 + 1 + e^−2, and 1 + (1 + e^−2)."""
    h = np.float16
    tail = h(np.exp(-2.0))
    left, right = float(h(2.0) + tail), float(h(1.0) + h(h(1.0) + tail))
    text = online_softmax.rounding_of_groups(4, 3).counterexample
    assert repr(left) in text
    assert repr(right) in text
    assert left != right


def test_a_neutral_element_that_weighs_is_told(monkeypatch) -> None:
    honest = online_softmax._literal
    monkeypatch.setattr(
        online_softmax,
        "_literal",
        lambda a, b, guarded: (honest(a, b, guarded=guarded)[0], a[1] + b[1] + 1.0),
    )
    assert online_softmax.neutral().status == "REFUTED"


def test_merge_by_hand() -> None:
    q = flint.fmpq
    assert partial_outputs.merged((q(1), q(4)), (q(3), q(8))) == (q(4), q(7))
    assert partial_outputs.merged((q(0), q(9)), (q(0), q(5))) == (q(0), q(9))


def test_triples_that_forget_to_rescale_are_told(monkeypatch) -> None:
    monkeypatch.setattr(partial_outputs, "_triples", lambda blocks: sum(b for _, b in blocks) / len(blocks))
    assert partial_outputs.merges(3).status == "REFUTED"


def test_accesses_by_hand() -> None:
    """V = 2, k = 1: naive 2 + 2 loads and 2 stores; one pass 2 loads and 1 store."""
    table = softmax_accesses.accesses((2,), k=1).table
    counts = dict(zip(table["algorithm"], zip(table["loads"], table["stores"], strict=True), strict=True))
    assert counts["naive softmax"] == (4, 2)
    assert counts["safe softmax"] == (6, 2)
    assert counts["online softmax"] == (4, 2)
    assert counts["safe softmax, then top-k"] == (8, 3)
    assert counts["online softmax and top-k in one pass"] == (2, 1)


def test_wrong_results_do_not_count() -> None:
    def lazy(x, y, out, k):
        for i in range(len(x)):
            y[i] = x[i] * 0 + x[i]

    finding = softmax_accesses.accesses((8,), algorithms={"naive softmax": lazy})
    assert finding.status == "REFUTED"
