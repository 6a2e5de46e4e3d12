"""docs/dq.md tells what ``python -m attnproof.dq`` measures; a part of it is measured again here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from attnproof import dq
from attnproof.dq_page import Table, agree, compared, figure, read, shown, written
from attnproof.properties.claims.dq_budget import SOURCES
from attnproof.properties.claims.dq_replay import VARIANTS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "dq.md").read_text()

HALF = (torch.float16,)
PARTS: dict[str, tuple[Callable[[], Table], int]] = {
    "peers": (lambda: dq.peers(lengths=(127,)), 2),
    "sweep": (lambda: dq.sweep(HALF, ("normal",), (4.0,), (0.0, 4.0, 16.0)), 3),
    "cotangents": (lambda: dq.sweep(cotangents=("ones",), value_means=(4.0,), key_means=(4.0,)), 4),
    "budgets": (lambda: dq.budgets(value_means=(4.0,), key_means=(4.0,)), 4),
    "shares": (lambda: dq.shares(value_means=(4.0,), key_means=(1.0,), cotangents=("ones",)), 3),
    "closed": (lambda: dq.closed_form(lengths=(512,), means=(4.0, 16.0)), 3),
}
"""By table: what measures some of its rows again, and how many columns say which row it is."""


@pytest.mark.parametrize("name", PARTS)
def test_figures_on_the_page_are_the_measured_ones(name: str) -> None:
    measure, places = PARTS[name]
    table = measure()
    table = shown({table.name: table})[name]
    head, *told = read(PAGE, name)
    assert head == list(table.columns)
    by_place = {tuple(row[:places]): row for row in told}
    assert len(by_place) == len(told), "the first columns say which row it is"
    assert table.rows
    for row in table.rows:
        cells = [figure(cell) for cell in row]
        other = by_place[tuple(cells[:places])]
        assert all(map(agree, other, cells)), (other, cells)


def test_the_strongest_of_the_search_is_found_again() -> None:
    head, *told = read(PAGE, "search")
    table = dq.search(lengths=(512,), temperatures=(0.01,), shown=1)
    assert head == list(table.columns)
    assert all(map(agree, told[0], map(figure, table.rows[0])))


def test_a_wrong_figure_is_found() -> None:
    table = Table("closed", ("dtype", "N", "measured"), (("float16", 512, 240.0), ("bfloat16", 512, 12.0)))
    page = written("<!-- closed -->\n<!-- end -->\n", {"closed": table})
    assert compared(page, {"closed": table}) == []
    assert written(page, {"closed": table}) == page
    assert compared(page.replace("240", "250"), {"closed": table}) == []
    (found,) = compared(page.replace("240", "280"), {"closed": table})
    assert "280 on the page, 240 measured" in found
    (found,) = compared(page.replace("| bfloat16 | 512 | 12 |\n", ""), {"closed": table})
    assert "2 rows on the page, 3 measured" in found


def test_a_page_without_the_place_of_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="0 places <!-- closed -->"):
        written("# no markers\n", {"closed": Table("closed", ("N",), ((1,),))})


def test_a_missing_page_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        dq.main(["--page", str(tmp_path / "none.md")])
    assert stopped.value.code == 2
    assert "no such file" in capsys.readouterr().err


DRAWN = {"dq-factor": tuple(VARIANTS), "dq-budget": tuple(SOURCES)}


@pytest.mark.parametrize(("name", "words"), DRAWN.items())
def test_plots_are_drawn_and_shown(name: str, words: tuple[str, ...]) -> None:
    assert f"({name}.svg)" in PAGE
    root = ElementTree.parse(DOCS / f"{name}.svg").getroot()
    drawn = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert drawn >= set(words)
