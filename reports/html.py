"""The HTML report: one file that needs no network, readable without JavaScript except for the charts.

The page carries Vega, Vega-Lite and vega-embed (vl-convert bundles them, 0.9 MB), the data of its charts, and
a Content-Security-Policy that lets nothing be fetched and no script run but those two whose hashes it names.
All text of the record is escaped by Jinja; data reaches the scripts as JSON in which no markup can begin.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup, escape

from attnproof.reports import charts, wording
from attnproof.reports.record import Event, Finding, Series
from attnproof.reports.series import series_chart
from attnproof.reports.summary import summarize
from attnproof.reports.tables import KernelSummary, Summary

__all__ = ["render"]

DETAIL_LIMIT = 6000
"""Characters of a failure's detail (traceback, output) that a page shows; the record holds all of it."""

TABLE_ROWS_LIMIT = 400
"""Rows of a finding's series that a page shows as a table."""

OPEN_ROWS = 30
"""Rows of a table that is shown unfolded where there is no chart above it."""

BUNDLE_ENTRY = "window.vegaEmbed = vegaEmbed;"


@dataclass(frozen=True, slots=True)
class FindingView:
    """A finding with its series, each with the name of its chart, or None where it is only a table."""

    finding: Finding
    series: tuple[tuple[Series, str | None], ...]


def render(events: Iterable[Event], path: Path) -> Path:
    """Write the report of ``events`` to the file ``path`` (its folder is made) and return the path.

    The events are read once. A record without its end is rendered too, and the page says so.
    """
    summary = summarize(events)
    specs, data = charts.specifications(summary), {}
    data["cells"], data["points"] = charts.cells_data(summary), charts.points_data(summary)
    findings = tuple(_finding_view(finding, specs, data) for finding in summary.findings)
    libraries, page = _libraries(), _template_text("page.js")
    stream = (
        _environment()
        .get_template("report.html.j2")
        .stream(
            summary=summary,
            findings=findings,
            claims=_by_subject(findings),
            title=_title(summary),
            kernels_drawn=frozenset(data["cells"]["index"]),
            point_groups=sorted({point.example for point in summary.points}),
            dtypes=_dtypes(summary.kernels),
            chart_data=_json({"config": charts.CONFIG, "specs": specs, "data": data}),
            style=Markup(_template_text("style.css")),
            scripts=(Markup(libraries), Markup(page)),
            script_hashes=(_hash(libraries), _hash(page)),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(stream)
    return path


def _title(summary: Summary) -> str:
    started = [run.started.started for run in summary.runs if run.started]
    return " · ".join(["attnproof", summary.verdict, *started[:1]])


def _dtypes(kernels: tuple[KernelSummary, ...]) -> list[str]:
    return sorted({cell.dtype for kernel in kernels for cell in kernel.cells})


def _by_subject(findings: Iterable[FindingView]) -> list[list[FindingView]]:
    """Claims of the ledger by subject, in the order in which subjects come up."""
    groups: dict[str, list[FindingView]] = {}
    for view in findings:
        if view.finding.id:
            groups.setdefault(view.finding.subject, []).append(view)
    return list(groups.values())


def _finding_view(finding: Finding, specs: dict[str, Any], data: dict[str, Any]) -> FindingView:
    """The finding, its charts added to ``specs`` and ``data``."""
    views: list[tuple[Series, str | None]] = []
    for series in finding.series:
        name = f"series{len(data)}"
        chart = series_chart(series, name)
        if chart:
            specs[name], data[name] = chart
        views.append((series, name if chart else None))
    return FindingView(finding, tuple(views))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attnproof.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        ratio=wording.ratio,
        count=wording.count,
        duration=wording.duration,
        shape=wording.shape_text,
        plain=_plain_text,
        sentence=lambda text: text[:1].upper() + text[1:],
        breakable=_breakable,
        clipped=_clipped,
        rows=_series_rows,
        titles=_series_titles,
    )
    environment.globals["counted"] = wording.counted
    environment.globals["OPEN_ROWS"] = OPEN_ROWS
    environment.globals["TABLE_ROWS_LIMIT"] = TABLE_ROWS_LIMIT
    return environment


def _plain_text(value: Any) -> str:
    """A value of the record as a reader would write it: numbers as ratios are written, the rest as it is."""
    if value is None:
        return wording.ABSENT
    if isinstance(value, float):
        return wording.ratio(value)
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, default=str)
    return str(value)


def _breakable(name: str) -> Markup:
    """A dotted name that a narrow column may break after its dots and underscores, and nowhere else."""
    return Markup(re.sub(r"([._:])", r"\1<wbr>", str(escape(name))))


def _clipped(text: str) -> str:
    """``text`` cut to :data:`DETAIL_LIMIT` characters, both ends kept: a traceback's end says the most."""
    if len(text) <= DETAIL_LIMIT:
        return text
    half = DETAIL_LIMIT // 2
    return f"{text[:half]}\n… {wording.count(len(text) - 2 * half)} characters left out …\n{text[-half:]}"


def _series_rows(series: Series) -> list[tuple[str, ...]]:
    """The first rows of a series as text; columns of unequal length are filled up with dashes."""
    length = min(TABLE_ROWS_LIMIT, max(map(len, series.columns.values()), default=0))
    columns = [[_plain_text(value) for value in values[:length]] for values in series.columns.values()]
    return list(zip(*(column + [wording.ABSENT] * (length - len(column)) for column in columns), strict=True))


def _series_titles(series: Series) -> list[tuple[str, str]]:
    """The columns of a series with the way in which each is sorted: as numbers, if it holds nothing else."""
    return [
        (
            name,
            "number" if all(isinstance(value, (int, float)) or value is None for value in values) else "text",
        )
        for name, values in series.columns.items()
    ]


def _json(value: Any) -> Markup:
    """``value`` as JSON for a script element, free of "<", ">" and "&", so that no tag can begin."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def _libraries() -> str:
    """Vega, Vega-Lite and vega-embed as one script, its names kept to itself but for ``vegaEmbed``."""
    bundle = vl_convert.javascript_bundle(BUNDLE_ENTRY)
    if "</script" in bundle.lower() or "<!--" in bundle:
        raise ValueError(
            f"the Vega bundle of vl-convert {version('vl-convert-python')} holds markup that would end its "
            "script element; use another version of vl-convert-python"
        )
    return f"(() => {{{bundle}\n}})();"


def _template_text(name: str) -> str:
    return resources.files("attnproof.reports.templates").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The script's name in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
