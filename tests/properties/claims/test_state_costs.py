"""Costs of the forms of linear attention: by hand, and where the claims about them turn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnproof.properties.claims import state_costs


def test_bytes_and_matmuls() -> None:
    finding = state_costs.bytes_and_matmuls()
    moved = dict(zip(finding.table["form"], finding.table["MB moved"], strict=True))
    assert moved["registers, 64 columns a program"] < moved["chunks of 64"]
    assert moved["chunks of 64"] < moved["registers, 8 columns a program"] < moved["a call a position"]
    shares = finding.table["share of operations in matmuls"]
    assert shares[0] > 0.95
    assert not any(shares[1:])
    assert f"{4 * 4096 * 64 * 2} bytes" in finding.counterexample
    assert f"{64 * (6 * 64 * 64 * 2 + 64 * 64 * 4 + 64 * 64 * 2 + 64 * 64 * 4) + 64 * 64 * 4} bytes" in (
        finding.counterexample
    )


def test_status_follows_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    costly = state_costs.Costs(read=10**9, elsewhere=1)
    monkeypatch.setattr(state_costs, "recurrent", lambda *_: replace(costly))
    assert state_costs.bytes_and_matmuls().status == "HOLDS"
    monkeypatch.setattr(state_costs.Costs, "matmul_share", property(lambda _: 0.5))
    assert state_costs.bytes_and_matmuls().status == "REFUTED"


def test_by_hand() -> None:
    """Two positions of width 1 in chunks of 1, numbers of 2 bytes."""
    costs = state_costs.chunkwise(2, 1, 1, 2)
    assert costs.read == 2 * (6 * 2 + 4)
    assert costs.written == 2 * (2 + 4) + 4
    assert costs.in_matmuls == 2 * 4 * 2
    steps = state_costs.stepwise(2, 1, 2)
    assert (steps.read, steps.written) == (2 * (3 * 2 + 4), 2 * (2 + 4))


def test_break_even_by_naive_loops() -> None:
    """Products and sums of both orders, counted in loops over matrices."""

    def product(rows: int, inner: int, columns: int) -> int:
        return sum(2 * inner - 1 for _ in range(rows) for _ in range(columns))

    table = state_costs.break_even((2, 3)).table
    assert table["N"] == [1, 2, 3, 4, 8, 1, 2, 3, 4, 6, 12]
    for d, n, state, pairs in zip(*table.values(), strict=True):
        assert state == product(d, n, d) + product(n, d, d)
        assert pairs == product(n, d, n) + product(n, n, d)


def test_break_even_moves_with_the_width_of_values() -> None:
    # d = 3, d_v = 6: about 4N·18 against 2N²·9, even at N = 4.
    table = state_costs.break_even((3,), 2).table
    at = table["N"].index(4)
    assert table["operations by the state"][at] == 18 * 7 + 24 * 5
    assert table["by the matrix of weights"][at] == 16 * 5 + 24 * 7


def test_a_step_by_hand() -> None:
    # d = 1: k v, S + kv, z + k, q S, q z, a quotient.
    assert state_costs.decoding(d=1).table == {
        "position": [1, 4, 16, 64],
        "operations": [6] * 4,
        "numbers kept": [2] * 4,
    }
    assert (
        state_costs.decoding(lambda d, n: (4 * d * d + 3 * d - 1, d * d + d + (n > 16))).status == "REFUTED"
    )


def test_chunks_double_and_the_whole_does_not() -> None:
    assert set(state_costs.chunk_costs((2,)).table["over those at L/2"]) == {2.0}
    whole = state_costs.chunk_costs((None,)).table["over those at L/2"]
    assert 3.0 < whole[-1] < 4.0
