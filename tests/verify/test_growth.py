"""Errors against the length of a sequence: what is measured, and what is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnproof import growth
from attnproof.growth import Growth, exponent, finding, long_finding, main, measure


def grown(form: str, power: float, worst: float = 0.1, verdict: str = "PASS") -> list[Growth]:
    """Errors that grow as N^power, below a budget that grows as N."""
    return [
        Growth("ssm", form, "float32", n, 1e-7 * n**power, 1e-6 * n, worst, verdict) for n in (64, 256, 1024)
    ]


def test_exponents_are_those_of_powers() -> None:
    assert exponent(3.0, 3.0 * 64.0**0.5) == pytest.approx(0.5)
    assert exponent(1.0, 16.0, (10, 100, 160)) == pytest.approx(1.0)
    assert exponent(0.0, 1.0) == 0.0


def test_a_form_that_grows_faster_than_its_budget_is_named() -> None:
    assert finding([*grown("scan", 0.5), *grown("recurrent", 1.0)]).verdict == "SUPPORTED"
    found = finding([*grown("scan", 0.5), *grown("recurrent", 1.4)])
    assert found.verdict == "REFUTED"
    assert "faster: ssm.recurrent in float32: N^1.40 against N^1.00" in found.evidence


def test_a_failure_is_no_support() -> None:
    assert finding(grown("scan", 0.5, 3.0, "FAIL")).verdict == "REFUTED"


def test_every_form_has_a_line_beside_its_budget() -> None:
    found = finding([*grown("scan", 0.5), *grown("recurrent", 1.0)])
    plot, table = found.series
    assert set(plot.columns["form"]) == {"scan", "recurrent", "certain budget"}
    assert table.columns["error grows as N to the"] == [0.5, 1.0]


def test_a_form_is_measured_at_every_length() -> None:
    found = measure("rwkv4", "attention", "float32", (16, 64))
    assert [g.length for g in found] == [16, 64]
    assert all(g.verdict == "PASS" and 0.0 < g.error < g.budget and g.worst < 1.0 for g in found)


def test_what_is_written_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(growth, "LENGTHS", (8, 16))
    monkeypatch.setattr(growth, "measure", lambda *task: grown(task[1], 0.5)[-len(task[3]) :])
    monkeypatch.setattr(growth, "__file__", str(tmp_path / "growth.py"))
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(growth.processes, "pool", InThisProcess)
    assert main(["rwkv4", "--write"]) == 0
    assert b"SUPPORTED" in (tmp_path / "data" / "growth.json").read_bytes()
    assert main(["rwkv4", "--long", "--write"]) == 0
    assert b"65536" in (tmp_path / "data" / "long.json").read_bytes()


def test_a_form_that_fails_on_a_long_sequence_is_named() -> None:
    assert long_finding(grown("scan", 0.5)).verdict == "SUPPORTED"
    found = long_finding([*grown("scan", 0.5), *grown("recurrent", 0.5, 3.0, "FAIL")])
    assert found.verdict == "REFUTED"
    assert "not: ssm.recurrent in float32 (FAIL)" in found.evidence


class InThisProcess:
    """A pool that is none."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)
