"""Costs of the forms of linear attention: by hand, and where the claim about them turns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnproof.properties.claims import state_costs


def test_finding() -> None:
    (finding,) = state_costs.findings()
    assert finding.status == "CONDITIONAL"
    assert len({len(column) for column in finding.table.values()}) == 1
    moved = dict(zip(finding.table["form"], finding.table["MB moved"], strict=True))
    assert moved["registers, 64 columns a program"] < moved["chunks of 64"]
    assert moved["chunks of 64"] < moved["registers, 8 columns a program"] < moved["a call a position"]
    shares = finding.table["share of operations in matmuls"]
    assert shares[0] > 0.95
    assert not any(shares[1:])


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
