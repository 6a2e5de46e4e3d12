"""The tables and plots of docs/dq.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

__all__ = ["Table", "compared", "plots", "read", "written"]

Cell = str | float

TOLERANCE = 0.1
"""Largest relative difference of a figure of the page from the one measured.

Two digits are printed, so that up to 5 % are lost there; one rounding of dQ that falls the other way may move
the largest of 10⁴ errors by as much again.
"""

_SMALLEST = 0.001
"""Figures below this are printed as such: no statement of the page rests on them."""

_COLOURS = ["#d0602c", "#a071c0", "#4a86c8", "#2a9d78", "#8a8a3c", "#c75c7c", "#8c7466"]
_INK = "#333333"
_CONFIG: dict[str, Any] = {
    "background": "white",
    "font": "Liberation Sans, Arial, sans-serif",
    "axis": {"labelColor": _INK, "titleColor": _INK, "titleFontWeight": "normal", "gridColor": "#e6e6e6"},
    "legend": {"labelColor": _INK, "titleColor": _INK, "labelLimit": 300, "orient": "bottom", "columns": 4},
    "header": {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 12},
    "view": {"stroke": None},
    "range": {"category": _COLOURS},
}


@dataclass(frozen=True)
class Table:
    """Rows under columns; ``name`` is that of the markers between which a page shows it."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def only(self, columns: Sequence[str], **where: Sequence[Cell]) -> Table:
        """The rows in which each column of ``where`` has one of the values; ``_`` stands for a blank."""
        chosen = {self.columns.index(name.replace("_", " ")): values for name, values in where.items()}
        places = [self.columns.index(name) for name in columns]
        kept = [row for row in self.rows if all(row[place] in values for place, values in chosen.items())]
        return Table(self.name, tuple(columns), tuple(tuple(row[place] for place in places) for row in kept))

    def records(self) -> list[dict[str, Cell]]:
        """One mapping a row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def figure(cell: Cell) -> str:
    """Two digits; text as it is."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return str(cell)
    if 0 < abs(cell) < _SMALLEST:
        return f"<{_SMALLEST:g}"
    return f"{float(f'{cell:.2g}'):g}"


def _lines(table: Table) -> list[str]:
    head = "| " + " | ".join(table.columns) + " |"
    rule = "|" + "|".join("---" for _ in table.columns) + "|"
    return [head, rule, *("| " + " | ".join(map(figure, row)) + " |" for row in table.rows)]


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {re.escape(name)} -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def written(text: str, tables: Mapping[str, Table]) -> str:
    """``text`` with every table between its markers.

    Raises:
        ValueError: a table has no pair of markers ``<!-- NAME -->`` and ``<!-- end -->``, or more than one.
    """
    for name, table in shown(tables).items():
        lines = "\n".join(_lines(table))
        text, count = _pattern(name).subn(lambda found, new=lines: f"{found[1]}{new}\n{found[3]}", text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the page has {count} places <!-- {name} --> … <!-- end -->; expected one")
    return text


def read(text: str, name: str) -> list[list[str]]:
    """The rows of a table on the page, as text; the first is that of the column names."""
    found = _pattern(name).search(text)
    if found is None:
        raise ValueError(f"the page has no table {name}")
    lines = [line for line in found[2].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (*lines[:1], *lines[2:])]


def agree(told: str, measured: str) -> bool:
    """Whether two figures of a table are the same within :data:`TOLERANCE`."""
    if told == measured:
        return True
    try:
        a, b = float(told.lstrip("<")), float(measured.lstrip("<"))
    except ValueError:
        return False
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def compared(text: str, tables: Mapping[str, Table]) -> list[str]:
    """What the page tells otherwise than the measured tables, a line each."""
    differences = []
    for name, table in shown(tables).items():
        told = read(text, name)
        rows = [list(table.columns), *([figure(cell) for cell in row] for row in table.rows)]
        if [len(row) for row in told] != [len(row) for row in rows]:
            differences.append(f"{name}: {len(told)} rows on the page, {len(rows)} measured")
            continue
        for ours, theirs in zip(rows, told, strict=True):
            for column, mine, other in zip(table.columns, ours, theirs, strict=True):
                if not agree(other, mine):
                    where = ", ".join(ours[:4])
                    differences.append(f"{name} ({where}), {column}: {other} on the page, {mine} measured")
    return differences


def shown(tables: Mapping[str, Table]) -> dict[str, Table]:
    """What the page prints of the tables: the sweep in part, since the plot has the rest."""
    result = dict(tables)
    if "sweep" in tables:
        sweep = tables["sweep"]
        columns = sweep.columns
        result["sweep"] = sweep.only(
            [c for c in columns if c != "cotangents"], cotangents=["normal"], mean_K=[0.0, 4.0, 16.0]
        )
        result["cotangents"] = sweep.only(columns, mean_K=[4.0], mean_V=[4.0])
        result["cotangents"] = Table("cotangents", result["cotangents"].columns, result["cotangents"].rows)
    if "shares" in tables:
        result["shares"] = tables["shares"].only(
            [c for c in tables["shares"].columns if c != "dtype"], mean_K=[0.0, 1.0, 4.0, 16.0]
        )
    return result


def plots(tables: Mapping[str, Table]) -> dict[str, str]:
    """The page's plots as SVG, by file name."""
    charts = {"dq-factor.svg": _factors(tables["sweep"]), "dq-budget.svg": _shares(tables["shares"])}
    return {name: _svg(chart) for name, chart in charts.items()}


def _svg(chart: alt.FacetChart) -> str:
    spec = json.loads(chart.to_json())
    return str(vl_convert.vegalite_to_svg({**spec, "config": _CONFIG}))


def _factors(sweep: Table) -> alt.FacetChart:
    """The fudge factor against the mean of K, a panel for each mean of V; float16, normal cotangents."""
    variants = [c for c in sweep.columns if c not in ("dtype", "cotangents", "mean V", "mean K")]
    rows = [
        {"mean V": row["mean V"], "mean K": row["mean K"], "variant": name, "factor": row[name]}
        for row in sweep.records()
        for name in variants
        if row["dtype"] == "float16" and row["cotangents"] == "normal"
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("mean K:O", title="mean of K / its deviation", axis=alt.Axis(labelAngle=0)),
        y=alt.Y(
            "factor:Q",
            title="fudge factor that dQ needs (log scale)",
            scale=alt.Scale(type="log", domain=[0.7, 2000], nice=False),
            axis=alt.Axis(values=[1, 10, 100, 1000]),
        ),
    )
    colour = alt.Color("variant:N", title="δ from", scale=alt.Scale(domain=variants))
    lines = base.mark_line(point=alt.OverlayMarkDef(size=25), strokeWidth=1.8).encode(
        color=colour, shape=alt.Shape("variant:N", title="δ from", scale=alt.Scale(domain=variants))
    )
    peers = base.mark_rule(strokeDash=[5, 4], color=_INK).encode(y=alt.datum(180), x=alt.X())
    layered = alt.layer(lines, peers).properties(width=210, height=230)
    title = "mean of V / its deviation (dashed: PyTorch's 180)"
    chart: alt.FacetChart = layered.facet(column=alt.Column("mean V:O", title=title))
    return chart


def _shares(shares: Table) -> alt.FacetChart:
    """Each source's share of the probable variance of dQ; float16, normal cotangents."""
    sources = [c for c in shares.columns if c not in ("dtype", "cotangents", "mean V", "mean K", "sum")]
    rows = [
        {"mean V": row["mean V"], "mean K": row["mean K"], "source": name, "share": row[name], "place": i}
        for row in shares.records()
        for i, name in enumerate(sources)
        if row["cotangents"] == "normal"
    ]
    bars = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("mean K:O", title="mean of K / its deviation", axis=alt.Axis(labelAngle=0)),
            y=alt.Y(
                "share:Q", title="share of the variance in dQ's budget, %", scale=alt.Scale(domain=[0, 100])
            ),
            color=alt.Color("source:N", title="error of", scale=alt.Scale(domain=sources), sort=sources),
            order=alt.Order("place:Q"),
        )
        .properties(width=250, height=200)
    )
    chart: alt.FacetChart = bars.facet(column=alt.Column("mean V:O", title="mean of V / its deviation"))
    return chart
