"""Every claim of the ledger, quickly: its recorded verdict, and a control whose verdict differs."""

from __future__ import annotations

from importlib import resources

import msgspec
import pytest

from attnproof.laboratory import Bench
from attnproof.properties.claims import ledger
from attnproof.properties.claims.base import STATUSES, Claim, ClaimFinding

CLAIMS = ledger()
LOCK = msgspec.json.decode(resources.files("attnproof.data").joinpath("claims.lock.json").read_bytes())
_LINES = 20
_SUBJECTS = 8


def well_formed(claim: Claim, found: ClaimFinding) -> None:
    assert found.status in STATUSES
    assert len(found.evidence) > 20
    for columns in (found.table, *(plot.columns for plot in found.plots)):
        assert len({len(column) for column in columns.values()}) <= 1
        cells = [cell for column in columns.values() for cell in column]
        assert all(isinstance(cell, (bool, int, float, str)) or cell is None for cell in cells)
    for plot in found.plots:
        assert {plot.x, plot.y, *plot.log} <= plot.columns.keys()
    if found.status in ("REFUTED", "CONDITIONAL"):
        assert found.counterexample, "a reader wants to redo it"
        assert len(found.counterexample.splitlines()) <= _LINES
    assert (found.status == "OPEN") == (claim.kind == "none")


@pytest.mark.parametrize("name", CLAIMS)
def test_a_check_says_something_about_its_claim(name: str) -> None:
    claim, laboratory = CLAIMS[name], Bench("quick")
    found = claim.check(laboratory)
    well_formed(claim, found)
    assert found.status == LOCK[name], "record it with attnproof claims --update if that is right"
    if claim.control is not None:
        control = claim.control(laboratory)
        assert control.status in STATUSES
        assert control.status != found.status


def test_the_ledger_is_large_and_recorded_whole() -> None:
    assert len(CLAIMS) >= 90
    assert set(LOCK) == set(CLAIMS)
    assert len({claim.subject for claim in CLAIMS.values()}) >= _SUBJECTS
    assert all(claim.statement.strip() and claim.source.strip() and claim.title for claim in CLAIMS.values())
