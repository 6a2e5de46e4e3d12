"""Forms of a family against each other: near one another as they are, told apart where one is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnproof import equivalence
from attnproof.equivalence import FORMS, Distance, distances
from attnproof.properties.case import Case

FAMILY = "retention"


@pytest.fixture(scope="module")
def found() -> list[Distance]:
    return distances(FAMILY, "float16")


def test_every_pair_and_part_is_there(found: list[Distance]) -> None:
    count = len(FORMS[FAMILY])
    assert count == 5
    assert len(found) == 2 * count * (count + 1) // 2
    assert {d.part for d in found} == {"forward", "gradients"}


def test_forms_are_within_two_budgets_and_not_all_alike(found: list[Distance]) -> None:
    assert all(d.worst <= 2.0 for d in found)
    apart = [d.worst for d in found if d.forms[0] != d.forms[1] and d.part == "forward"]
    assert min(apart) > 0.0, "two forms gave the same bits: are they the same code?"
    assert equivalence._finding(FAMILY, found, 0).verdict == "SUPPORTED"


def test_the_gradients_of_autograd_are_not_those_of_the_kernels(found: list[Distance]) -> None:
    wanted = {"recurrent", "torch by steps"}
    assert [d.worst > 0.0 for d in found if set(d.forms) == wanted and d.part == "gradients"] == [True]


def test_a_wrong_form_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes heads for positions: all four sizes agree, so that nothing else betrays it."""
    wrong = {**FORMS[FAMILY], "wrong": "made below"}
    pair = {name: wrong[name] for name in ("recurrent", "wrong")}
    monkeypatch.setattr(equivalence, "FORMS", {FAMILY: pair})
    contract = equivalence._subject(FORMS[FAMILY]["recurrent"]).contract
    subject = equivalence._subject

    def declared(target: str) -> equivalence.Subject:
        known = FORMS[FAMILY]["recurrent"]
        made = subject(known)
        source = equivalence.Importable("attnproof.healthy_states:recurrent_retention")
        turned = replace(contract, layout="bnhd")
        return made if target == known else replace(made, source=source, contract=turned, device="cpu")

    monkeypatch.setattr(equivalence, "_subject", declared)
    monkeypatch.setattr(
        equivalence,
        "_case",
        lambda family, dtype, seed: Case(
            family,
            dtype,
            {"B": 1, "H": 4, "N": 4, "D": 4, "E": 4},
            "normal",
            {"return_state": True},
            seed=seed,
        ),
    )
    found = distances(FAMILY, "float32")
    apart = next(d for d in found if d.forms == ("recurrent", "wrong"))
    assert apart.worst > 2.0
    finding = equivalence._finding(FAMILY, found, 0)
    assert finding.verdict == "REFUTED"
    assert "recurrent and wrong" in finding.evidence


def test_cells_are_symmetric_and_in_order(found: list[Distance]) -> None:
    series = equivalence._series(FAMILY, "forward", found)
    forms = series.columns["form"]
    assert forms[: len(FORMS[FAMILY])] == list(FORMS[FAMILY])
    rows = [label.partition(" ")[2] for label in series.columns["dtype and form"]]
    cells = dict(zip(zip(rows, forms, strict=True), series.columns["worst distance/certain"], strict=True))
    assert all(cells[a, b] == cells[b, a] for a, b in cells)
