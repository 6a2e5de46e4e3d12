"""The ledger as a run: verdicts held against the record, checks that fail or hang, the command line."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnproof import ledger
from attnproof.cli import app
from attnproof.ledger import LockError, check, chosen, differences, read_lock, run, write_lock
from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory, Plot
from attnproof.reports.record import Finding, decode_event, encode_event


def good(laboratory: Laboratory) -> ClaimFinding:
    plot = Plot("growth", "line", {"n": [1, 2], "error": [0.5, 1.0]}, "n", "error")
    size = laboratory.choose(1, 10, 100)
    return ClaimFinding("HOLDS", f"size {size}", {"n": [size]}, (plot,), seed=3)


def bad(laboratory: Laboratory) -> ClaimFinding:
    raise ZeroDivisionError("1/0")


def slow(laboratory: Laboratory) -> ClaimFinding:
    time.sleep(30.0)
    return good(laboratory)


def refuted(laboratory: Laboratory) -> ClaimFinding:
    return replace(good(laboratory), status="REFUTED", counterexample="x = 2")


GOOD = Claim("AAA-1", "letters", "good", "It is good.", "nobody 2026", "exact", good, refuted, ("SEED9-1",))
CLAIMS = {
    claim.id: claim
    for claim in (
        GOOD,
        replace(GOOD, id="AAA-2a", check=bad, covers=()),
        replace(GOOD, id="AAA-2b", check=slow, covers=()),
        replace(GOOD, id="BBB-1", subject="more letters", check=refuted, control=refuted, covers=()),
    )
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "ledger", lambda: CLAIMS)


def finding(name: str, verdict: str) -> Finding:
    return Finding("title", verdict, "statement", "source", "evidence", id=name)


def test_a_finding_carries_all_that_the_claim_and_the_check_say() -> None:
    found = check("AAA-1", "quick")
    assert (found.verdict, found.evidence, found.seed) == ("HOLDS", "size 1", 3)
    assert (found.id, found.subject, found.kind, found.covers) == ("AAA-1", "letters", "exact", ("SEED9-1",))
    assert found.command == "attnproof claims AAA-1 --quick"
    assert [series.chart for series in found.series] == ["line", "table"]
    assert check("AAA-1", "thorough").evidence == "size 100"
    assert check("AAA-1", "quick", control=True).counterexample == "x = 2"
    assert decode_event(encode_event(found)) == found


def test_a_check_that_raises_is_unverified() -> None:
    found = check("AAA-2a", "quick")
    assert found.verdict == "UNVERIFIED"
    assert "ZeroDivisionError: 1/0" in found.evidence


def test_a_check_that_hangs_is_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SECONDS", {"quick": 0.1})
    found = check("AAA-2b", "quick")
    assert found.verdict == "UNVERIFIED"
    assert "not done after" in found.evidence
    assert found.seconds < 10.0


def test_claims_are_chosen_by_id_letter_subject_and_what_they_cover() -> None:
    def names(*ids: str, subject: str | None = None) -> list[str]:
        return [claim.id for claim in chosen(ids, subject)]

    assert names() == list(CLAIMS)
    assert names("AAA-2") == ["AAA-2a", "AAA-2b"]
    assert names("SEED9-1") == ["AAA-1"]
    assert names(subject="more letters") == ["BBB-1"]
    with pytest.raises(ValueError, match="no claim 'CCC-1'"):
        chosen(["CCC-1"], None)
    with pytest.raises(ValueError, match="must be one of letters, more letters"):
        chosen([], "numbers")


def test_differences_name_what_changed() -> None:
    lock = {"AAA-1": "HOLDS", "BBB-1": "HOLDS", "CCC-1": "OPEN"}
    found = [finding("AAA-1", "HOLDS"), finding("BBB-1", "REFUTED"), finding("DDD-1", "OPEN")]
    told = differences(found, lock, whole=False)
    assert told == ["BBB-1: REFUTED, recorded as HOLDS", "DDD-1: OPEN, not in the recorded ledger"]
    assert differences(found, lock, whole=True)[2:] == ["CCC-1: recorded as OPEN, not in the ledger"]
    assert not differences([finding("AAA-1", "UNVERIFIED")], lock, whole=False)


def test_a_lock_is_written_whole_or_in_part(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    write_lock([finding("BBB-1", "REFUTED"), finding("AAA-1", "OPEN")], path, whole=True)
    assert list(read_lock(path)) == ["AAA-1", "BBB-1"]
    write_lock([finding("AAA-1", "HOLDS")], path, whole=False)
    assert read_lock(path) == {"AAA-1": "HOLDS", "BBB-1": "REFUTED"}
    with pytest.raises(LockError, match="AAA-1 could not be checked"):
        write_lock([finding("AAA-1", "UNVERIFIED")], path, whole=True)
    path.write_text("[]")
    with pytest.raises(LockError, match="write it again with --update"):
        read_lock(path)
    with pytest.raises(LockError, match="no recorded ledger"):
        read_lock(tmp_path / "none.json")


def test_the_command_line_refuses_what_it_does_not_know() -> None:
    for arguments in (["CCC-1"], ["--subject", "numbers"], ["--quick", "--thorough"]):
        result = CliRunner().invoke(app, ["claims", *arguments])
        assert type(result.exception).__name__ == "UsageError", arguments


def test_the_list_needs_no_check() -> None:
    result = CliRunner().invoke(app, ["claims", "--list"])
    assert result.exit_code == 0
    assert "AAA-2b" in result.output


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Checks that need no process, and a lock of the test's own."""
    path = tmp_path / "lock.json"
    monkeypatch.setattr(ledger, "run", lambda claims, effort, jobs: (check(c.id, effort) for c in claims))
    read, write = ledger.read_lock, ledger.write_lock
    monkeypatch.setattr(ledger, "read_lock", lambda: read(path))
    monkeypatch.setattr(ledger, "write_lock", lambda found, whole: write(found, path, whole=whole))
    return path


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["claims", "--no-progress", *arguments])
    return result.exit_code, result.output + result.stderr


def test_the_exit_code_is_1_only_where_the_record_differs(in_this_process: Path, tmp_path: Path) -> None:
    lines = tmp_path / "claims.jsonl"
    assert invoke("AAA-1", "BBB-1", "--update", "--quick", "--json", str(lines))[0] == 0
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(t["id"], t["verdict"]) for t in told] == [("AAA-1", "HOLDS"), ("BBB-1", "REFUTED")]
    assert all({"evidence", "seconds"} <= set(t) for t in told)
    assert invoke("AAA-1", "BBB-1")[0] == 0
    in_this_process.write_text(json.dumps({"AAA-1": "REFUTED", "BBB-1": "REFUTED"}))
    code, output = invoke("AAA-1")
    assert code == 1
    assert "AAA-1: HOLDS, recorded as REFUTED" in output
    assert invoke("AAA-2a")[0] == 1  # not recorded
    in_this_process.write_text(json.dumps({"AAA-2a": "HOLDS"}))
    assert invoke("AAA-2a")[0] == 3  # could not be checked


def test_the_page_unfolds_each_claim(in_this_process: Path, tmp_path: Path) -> None:
    page = tmp_path / "claims.html"
    assert invoke("AAA-1", "BBB-1", "--update", "--html", str(page))[0] == 0
    text = page.read_text()
    for part in (
        'id="claim-AAA-1"',
        "It is good.",
        "nobody 2026",
        "x = 2",
        "attnproof claims BBB-1",
        "SEED9-1",
    ):
        assert part in text


def test_real_claims_run_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    wanted = chosen(["LIN-5", "SPL-7"], None)
    found = {finding.id: finding for finding in run(wanted, "quick", jobs=1)}
    assert set(found) == {claim.id for claim in wanted}
    recorded = read_lock()
    assert {name: finding.verdict for name, finding in found.items()} == {n: recorded[n] for n in found}


def test_a_control_that_changes_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        """Runs at once what is submitted."""

        @staticmethod
        def submit(function, *arguments, **keywords):
            value = function(*arguments, **keywords)
            return type("Done", (), {"result": staticmethod(lambda: value)})

    monkeypatch.setattr(ledger.processes, "pool", lambda jobs: contextlib.nullcontext(Here))
    claims = [CLAIMS["AAA-1"], CLAIMS["BBB-1"]]
    told = ledger.idle_controls([finding("AAA-1", "HOLDS"), finding("BBB-1", "REFUTED")], claims, "quick")
    assert told == ["BBB-1: REFUTED, and its control is, too: the check tells nothing"]
