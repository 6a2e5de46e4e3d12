"""The count of false alarms on gradients: what it counts, and how a family is counted again."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from attnproof import gradient_alarms
from attnproof.gradient_alarms import FAMILIES, gradient_cases, main, subjects


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_implementations_and_small_cases_with_cotangents(family: str) -> None:
    found = subjects(family)
    assert len(found) == (1 if family == "mlstm" else 2)
    assert all(subject.gradients and subject.contract.family == family for subject in found)
    cases = list(itertools.islice(gradient_cases(found[0].contract, seed=1), 8))
    assert all(case.option("cotangents") for case in cases)
    assert len({case.id for case in cases}) == len(cases)


def test_right_implementations_are_not_accused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["easy", "--cases", "8", "--jobs", "1"]) == 0
    assert "SUPPORTED: 0 alarms in 8 cases" in capsys.readouterr().out


def test_an_alarm_is_counted_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ReLU attention, taken for sigmoid attention."""
    wrong, contract = subjects("relu")[0], subjects("sigmoid")[0].contract
    monkeypatch.setattr(gradient_alarms, "subjects", lambda family: [replace(wrong, contract=contract)])
    assert main(["sigmoid", "--cases", "6", "--jobs", "1"]) == 1
    output = capsys.readouterr().out
    assert "REFUTED" in output
    assert "autograd_relu\n  sigmoid:" in output


def test_a_family_counted_again_replaces_its_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "alarms.json"
    assert gradient_alarms._stored(path) == {}
    rows = {
        "softmax": Counter({"cases": 10_000, "FAIL": 0, "UNVERIFIED": 0}),
        "easy": Counter({"cases": 10_000, "FAIL": 2, "UNVERIFIED": 1}),
    }
    path.write_bytes(msgspec.json.encode(gradient_alarms._finding(rows, 7)))
    stored = gradient_alarms._stored(path)
    assert {family: dict(row) for family, row in stored.items()} == {f: dict(r) for f, r in rows.items()}
    merged = gradient_alarms._finding({**stored, "easy": Counter({"cases": 12_000})}, 7)
    assert merged.verdict == "SUPPORTED"
    assert "0 alarms in 22000 cases with gradients, at least 10000 of each family" in merged.evidence
