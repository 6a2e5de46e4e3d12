"""The HTML page as text: well formed, small, complete, with nothing of the record read as markup."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnproof.reports import html
from attnproof.reports.record import CaseJudged, Event, Finding, RunFinished, Series
from attnproof.reports.series import series_chart
from tests.reports.event_strategies import events as any_event
from tests.reports.synthetic import HOSTILE, build_events

MEGABYTE = 1_000_000
VOID = {"meta", "link", "input", "wbr", "br", "hr", "img"}


class Page(HTMLParser):
    """The elements of a page: balance, attributes, text outside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.unbalanced: list[str] = []
        self.text: list[str] = []
        self.json = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.json = self.json or data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = html.render(build_events(600), tmp_path_factory.mktemp("page") / "new" / "index.html")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_elements_are_balanced_and_names_unique(page: Page) -> None:
    assert page.unbalanced == [] and page.open == []
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    targets = {a["href"] for tag, a in page.elements if tag == "a"}
    assert {f"#{name}" for name in names} >= targets


def test_text_of_the_record_is_never_markup(page: Page) -> None:
    assert page.count("script") == 3
    assert any(HOSTILE in text for text in page.text)
    handlers = [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert handlers == []


def test_names_in_chart_data_are_never_markup(tmp_path: Path) -> None:
    event = next(event for event in build_events(60) if isinstance(event, CaseJudged) and event.outputs)
    hostile = msgspec.structs.replace(
        event, kernel=HOSTILE, case=msgspec.structs.replace(event.case, regime=HOSTILE, id=HOSTILE)
    )
    page = Page(html.render([hostile], tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.unbalanced == [] and page.count("script") == 3
    assert json.loads(page.json)["data"]["cells"]["kernel"] == [HOSTILE] * 2


def test_nothing_is_fetched(page: Page) -> None:
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    policy = next(
        a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert len(re.findall(r"'sha256-[\w+/=]{44}'", policy)) == 2


def test_tables_are_whole_and_figures_are_there(page: Page, source: str) -> None:
    rows = re.findall(
        r"<tr[ >].*?</tr>", source.split('<script type="application/json"', maxsplit=1)[0], re.DOTALL
    )
    widths = Counter(len(re.findall(r"<t[hd][ >]", row)) for row in rows)
    # A table has rows of one width: kernels and cells 12, remarks 5 or 6, figures of findings 2 or 3.
    assert set(widths) == {12, 5, 6, 2, 3}
    assert ">inf</td>" in source
    assert source.count('class="kernel"') == 18


def test_the_summary_comes_first(page: Page) -> None:
    text = " ".join(" ".join(page.text).split())
    # What the navigation names comes a second time, as a heading.
    places = [text.index("FAIL"), text.index("attnproof verify --jobs 2")]
    places += [
        text.rindex(words) for words in ("Failures that were not expected", "Kernel by kernel softmax")
    ]
    assert places == sorted(places)
    assert "did not" in text and "incomplete" not in text.split("How to read it")[0].lower()


def test_listed_failures_stand_apart(source: str) -> None:
    unexpected = source.split('id="failures"')[1].split("</section>", maxsplit=1)[0]
    listed = source.split('id="listed"')[1].split("</section>", maxsplit=1)[0]
    assert "delta.chunked" in unexpected and "examples." not in unexpected
    assert "examples.no_max" in listed and "delta.chunked" not in listed


def test_a_record_without_its_end_says_so(tmp_path: Path) -> None:
    source = html.render(list(build_events(60))[:9], tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.unbalanced == []
    assert any("The record is incomplete" in text for text in page.text)
    assert 'data-verdict="INCOMPLETE"' in source.split("<main>")[0]


def test_an_empty_record_is_rendered(tmp_path: Path) -> None:
    page = Page(html.render([], tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.unbalanced == [] and any("No kernel was judged" in text for text in page.text)


def test_three_thousand_cases_stay_below_five_megabytes(tmp_path: Path) -> None:
    assert html.render(build_events(3000), tmp_path / "index.html").stat().st_size < 5 * MEGABYTE


def test_the_page_does_not_grow_with_the_cases(tmp_path: Path) -> None:
    sizes = [html.render(build_events(n), tmp_path / f"{n}.html").stat().st_size for n in (6_000, 18_000)]
    assert sizes[1] < 1.2 * sizes[0] < 5 * MEGABYTE


def test_chart_data_is_strict_json(page: Page) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    held = json.loads(page.json, parse_constant=refuse)
    assert set(held["specs"]) >= {"overview", "kernel", "length", "logit"}
    for columns in held["data"].values():
        assert len({len(values) for values in columns.values()}) == 1
    drawn = {a["data-spec"] for _, a in page.elements if "data-spec" in a}
    assert drawn == set(held["specs"])
    assert {a["data-source"] for _, a in page.elements if "data-source" in a} == set(held["data"])


def test_a_series_is_drawn_on_the_axes_that_it_asks_for() -> None:
    columns: dict[str, list[Any]] = {"x": [0.0, 1.0, 1000.0], "y": [1.0, 2.0, 3.0], "g": ["a", "b", "b"]}
    chart = series_chart(Series("s", "line", columns, "x", "y", "g", ("x",)), "series0")
    assert chart is not None
    spec, rows = chart
    encoding = spec["layer"][0]["encoding"]
    assert encoding["x"]["scale"]["type"] == "log" and "type" not in encoding["y"]["scale"]
    assert [encoding[name]["field"] for name in ("x", "y", "color")] == ["c0", "c1", "c2"]
    assert rows == {"c0": [None, 1.0, 1000.0], "c1": [1.0, 2.0, 3.0], "c2": ["a", "b", "b"]}


def test_a_histogram_counts_every_finite_value_once_and_keeps_its_thresholds() -> None:
    values = [0.1, 0.2, 0.2, 0.9, math.nan, math.inf]
    columns: dict[str, list[Any]] = {
        "x": values,
        "g": ["a", "a", "b", "b", "b", "b"],
        "threshold": [2.0, 2.0, 3.0, 3.0, 3.0, 4.0],
    }
    chart = series_chart(Series("s", "histogram", columns, "x", "cases", "g"), "series0")
    assert chart is not None
    rows = chart[1]
    counts = {
        group: sum(n for n, g in zip(rows["c1"], rows["c2"], strict=True) if g == group) for group in "ab"
    }
    assert counts == {"a": 2, "b": 2}
    held = {(g, t) for g, t in zip(rows["c2"], rows["c3"], strict=True) if t is not None}
    assert held == {("a", 2.0), ("b", 3.0), ("b", 4.0)}


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(record=st.lists(any_event, max_size=12))
def test_any_events_give_a_whole_page(record: list[Event], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = html.render(record, tmp_path_factory.getbasetemp() / "any.html")
    before, _, after = path.read_text(encoding="utf-8").partition('<script type="application/json"')
    page = Page(before)
    assert page.unbalanced == [] and page.open == ["html", "body"] and page.count("script") == 0
    assert after.count("</script>") == 3


@pytest.mark.parametrize(
    "columns",
    [
        {"x": [1, 2.5, math.inf, math.nan, -1.0, 0.0], "y": [3, 4, 5, 6, 7, 8], "g": list("aabbcc")},
        {"x": [1.0, 2.0, 3.0, 4.0], "g": ["float16"] * 4, "threshold": [2.5, 2.5, 3.5, None]},
        {"x": ["one", "two"], "y": [1.0, 2.0]},
        {"x": [1.0], "y": [1.0, 2.0, 3.0], "g": []},
        {"x": [-1e308, 1e308, 1.0], "y": [None, None, 1e-320]},
        {"x": [], "y": []},
        {"other": [1]},
        {},
    ],
    ids=["nonfinite", "counted", "text", "ragged", "huge", "empty", "no-x", "nothing"],
)
def test_any_series_is_shown(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    series = tuple(
        Series(f"{chart} {log}", chart, columns, "x", "y", "g", log)
        for chart in ("line", "scatter", "histogram", "table", "matrix", "of a later version")
        for log in ((), ("x", "y"))
    )
    record: list[Event] = [Finding("f", "held up", "s", "", "", series), RunFinished("PASS", 0, 1.0)]
    page = Page(html.render(record, tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.unbalanced == [] and page.count("figure") == len(series)


def test_a_matrix_has_a_shaded_cell_for_each_pair() -> None:
    columns: dict[str, list[Any]] = {"a": ["p", "q", "p"], "b": ["r", "r", "s"], "far": [0.1, 2.0, None]}
    chart = series_chart(Series("s", "matrix", columns, "a", "b", "far"), "series0")
    assert chart is not None
    specification, rows = chart
    assert rows["shade"] == [-1.0, pytest.approx(math.log10(2.0), abs=1e-3), None]
    assert rows["label"] == ["0.10", "2.0", ""]
    assert [layer["mark"]["type"] for layer in specification["layer"]] == ["rect", "text"]


def claim(name: str, subject: str, verdict: str) -> Finding:
    words = {
        "statement": f"statement of {name}",
        "source": "paper & section",
        "evidence": f"evidence of {name}",
    }
    more = {"id": name, "subject": subject, "kind": "exact", "command": f"attnproof claims {name}"}
    return Finding(name=f"title of {name}", verdict=verdict, counterexample="x < 1 & y", **words, **more)


def test_a_ledger_is_shown_by_subject_and_without_kernels(tmp_path: Path) -> None:
    events: list[Event] = [
        claim("AAA-1", "splines", "HOLDS"),
        claim("BBB-2a", "FlashAttention", "REFUTED"),
        claim("BBB-2b", "FlashAttention", "HOLDS"),
        RunFinished("PASS", 0, 1.0),
    ]
    page = Page(html.render(events, tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.unbalanced == []
    ids = [attributes.get("id") for _, attributes in page.elements]
    assert [name for name in ids if name and name.startswith("claim-")] == [
        "claim-AAA-1",
        "claim-BBB-2a",
        "claim-BBB-2b",
    ]
    assert "kernels" not in ids and "reading" not in ids
    text = " ".join(" ".join(page.text).split())
    assert "3 claims of the theory ledger: every verdict is the recorded one" in text
    assert "x < 1 & y" in text and "Splines" in text and "FlashAttention" in text
    assert "attnproof claims BBB-2a" in text
