"""Charts of the HTML report, as Vega-Lite specifications that Altair builds and checks.

A specification names its data ("cells", "points", one name a series of a finding); the page holds each data set once,
in columns, and hands every chart its rows. Text and axes take ``currentColor`` from the page, so that one drawing
serves light, dark and print. Ratios are drawn on log axes within the bounds below; the tooltip holds the true figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from attnproof.reports.record import Series
from attnproof.reports.tables import Cell, Summary
from attnproof.reports.wording import log10_clipped, ratio, worst

__all__ = ["ALL_DTYPES", "CONFIG", "cells_data", "points_data", "series_chart", "specifications"]

Columns = dict[str, list[Any]]

SHADE_DECADES = 3.0
"""Heat maps are fully shaded three decades from 1: healthy kernels lie within 1e-3 and 1 (measured, design.md)."""

RATIO_LOW, RATIO_HIGH = 1e-4, 1e6
"""Bounds of the ratio axes: an exact result is drawn at the bottom, NaN and infinity at the top."""

HISTOGRAM_BINS = 40

ALL_DTYPES = "all"

DTYPE_COLOURS = {
    "float16": "#d0782c",
    "bfloat16": "#2a9d78",
    "float32": "#4a86c8",
    "float64": "#a071c0",
}
"""Told apart under the common colour deficiencies (after Okabe & Ito) and at least 3:1 against white and near-black."""

CATEGORY = ["#4a86c8", "#d0782c", "#2a9d78", "#a071c0", "#c75c7c", "#8a8a3c", "#5aa5b5", "#8c7466"]
WITHIN, BEYOND = "#4a86c8", "#d0602c"

NUMBER_LABEL = (
    "datum.value >= 1e4 || datum.value < 1e-3 ? format(datum.value, '.0e') : format(datum.value, '~g')"
)

CONFIG: dict[str, Any] = {
    "background": "transparent",
    # Named, not inherited: Vega measures its labels by this name before they are on the page.
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif",
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "titleFontWeight": "normal",
        "titleOpacity": 0.75,
        "titlePadding": 8,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "gridColor": "currentColor",
        "gridOpacity": 0.1,
        "domainColor": "currentColor",
        "domainOpacity": 0.3,
        "tickColor": "currentColor",
        "tickOpacity": 0.3,
        "labelLimit": 260,
    },
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "orient": "top",
    },
    "view": {"stroke": None},
    "text": {"color": "currentColor"},
    "rule": {"color": "currentColor"},
    "range": {"category": CATEGORY},
}


def cells_data(summary: Summary) -> Columns:
    """Rows of the heat maps: one for each kernel, regime and dtype in which something was judged.

    Each kernel and regime has one more row, of dtype :data:`ALL_DTYPES`: the worst of its dtypes.
    """
    rows = []
    for kernel in summary.kernels:
        by_regime: dict[str, list[Cell]] = {}
        for cell in kernel.cells:
            if cell.worst_certain is not None:
                by_regime.setdefault(cell.regime, []).append(cell)
        for regime, cells in by_regime.items():
            figures = [(cell.dtype, cell.worst_certain) for cell in cells]
            figures.append((ALL_DTYPES, worst(cell.worst_certain for cell in cells)))
            rows += [
                (kernel.index, kernel.name, regime, dtype, _shade(value), ratio(value, digits=2))
                for dtype, value in figures
                if value is not None
            ]
    return _columns(("index", "kernel", "regime", "dtype", "shade", "label"), rows)


def points_data(summary: Summary) -> Columns:
    """Rows of the scatter plots: one a case."""
    rows = [
        (
            point.kernel,
            int(point.example),
            point.regime,
            point.dtype,
            # The axes are logarithmic: what has no place there (N = 0, no logits) is left out of that chart.
            point.length or None,
            _finite_positive(point.logit),
            _bounded(point.certain),
            _bounded(point.row),
            ratio(point.certain),
            ratio(point.row),
            point.case_id,
        )
        for point in summary.points
    ]
    names = [
        "kernel",
        "example",
        "regime",
        "dtype",
        "N",
        "logit",
        "certain",
        "row",
        "certain_text",
        "row_text",
        "case",
    ]
    return _columns(tuple(names), rows)


def specifications(summary: Summary) -> dict[str, dict[str, Any]]:
    """The charts that every report has, by name: "overview", "kernel", "length", "logit"."""
    dtypes = sorted({point.dtype for point in summary.points}, key=_dtype_order)
    return {
        "overview": _spec(_overview()),
        "kernel": _spec(_heat_map("dtype:N", f"datum.dtype != '{ALL_DTYPES}'")),
        "length": _spec(_scatter("N", "sequence length N (log scale)", dtypes)),
        "logit": _spec(_scatter("logit", "largest |logit| (log scale)", dtypes)),
    }


def _overview() -> alt.LayerChart:
    """Kernels down, regimes across, for the dtype that a control of the page chooses."""
    shown = alt.param(name="shown", value=ALL_DTYPES)
    return _heat_map("kernel:N", "datum.dtype == shown").add_params(shown)


def _heat_map(y: str, rows: str) -> alt.LayerChart:
    """Regime across, ``y`` down, of the ``rows`` that an expression keeps: blue within the certain budget, orange beyond it, the more the deeper.

    The colour is split at 1 into two hues whose opacity grows with the distance, so that 1 itself is as pale as the
    page in either colour scheme. The order is that of the record.
    """
    base = alt.Chart(alt.NamedData("cells")).encode(
        x=alt.X("regime:N", title=None, sort=None, axis=alt.Axis(orient="top", labelAngle=-40, grid=False)),
        y=alt.Y(y, title=None, sort=None, axis=alt.Axis(grid=False)),
        tooltip=[
            alt.Tooltip("kernel:N", title="kernel"),
            alt.Tooltip("regime:N", title="regime"),
            alt.Tooltip("dtype:N", title="dtype"),
            alt.Tooltip("label:N", title="worst error/certain"),
        ],
    )
    opacity = alt.Scale(domain=[0, SHADE_DECADES], range=[0.06, 0.75])
    rectangle = base.mark_rect(stroke="currentColor", strokeOpacity=0.15).encode(
        color=alt.condition("datum.shade > 0", alt.value(BEYOND), alt.value(WITHIN)),
        fillOpacity=alt.FillOpacity("strength:Q", legend=None, scale=opacity),
    )
    label = base.mark_text(fontSize=10).encode(text="label:N")
    layered = (
        alt.layer(rectangle, label).transform_filter(rows).transform_calculate(strength="abs(datum.shade)")
    )
    return layered.properties(width={"step": 46}, height={"step": 22})


def _scatter(x: str, title: str, dtypes: Sequence[str]) -> alt.LayerChart:
    """Worst ratio of every case against ``x``; a control of the page switches between the two budgets."""
    budget = alt.param(name="budget", value="certain")
    colours = [DTYPE_COLOURS.get(dtype, CATEGORY[4]) for dtype in dtypes]
    base = alt.Chart(alt.NamedData("points")).transform_filter(f"isValid(datum.{x})")
    points = base.mark_point(filled=True, size=28, opacity=0.55).encode(
        x=alt.X(
            f"{x}:Q",
            title=title,
            scale=alt.Scale(type="log", nice=False, padding=8),
            axis=_log_axis(grid=False),
        ),
        y=alt.Y(
            "ratio:Q",
            title="error / budget (log scale)",
            scale=alt.Scale(type="log", nice=False, padding=8),
            axis=_log_axis(),
        ),
        color=alt.Color("dtype:N", title=None, scale=alt.Scale(domain=list(dtypes), range=colours)),
        shape=alt.Shape("dtype:N", title=None, scale=alt.Scale(domain=list(dtypes))),
        tooltip=[
            alt.Tooltip("kernel:N", title="kernel"),
            alt.Tooltip("regime:N", title="regime"),
            alt.Tooltip("dtype:N", title="dtype"),
            alt.Tooltip(f"{x}:Q", title="N" if x == "N" else "largest |logit|"),
            alt.Tooltip("certain_text:N", title="error/certain"),
            alt.Tooltip("row_text:N", title="row rms of error/probable"),
            alt.Tooltip("case:N", title="case"),
        ],
    )
    one = base.mark_rule(strokeDash=[4, 4], opacity=0.6).encode(y=alt.datum(1))
    layered = alt.layer(one, points.transform_calculate(ratio="datum[budget]")).add_params(budget)
    return layered.properties(width="container", height=280)


def series_chart(series: Series, name: str) -> tuple[dict[str, Any], Columns] | None:
    """The chart of a finding's series and its rows under ``name``; None for tables and for series without numbers.

    Columns become c0, c1, … (names of a record may hold what Vega-Lite reads as syntax). A "histogram" whose ``y`` is
    no column is counted here; its column "threshold", if it has one, is drawn as vertical rules.
    """
    if series.chart == "table" or series.x not in series.columns:
        return None
    columns = (
        _histogram(series)
        if series.chart == "histogram" and series.y not in series.columns
        else series.columns
    )
    x, y = series.x, series.y
    if y not in columns or not any(_is_number(value) for value in columns[y]):
        return None
    rows = _drawable(columns, [axis for axis in (x, y) if axis in series.log])
    field = {column: f"c{place}" for place, column in enumerate(columns)}
    numeric = all(_is_number(value) or value is None for value in rows[field[x]])
    across = _axis(x in series.log) if numeric else {}
    encoding: dict[str, Any] = {
        "x": alt.X(f"{field[x]}:{'Q' if numeric else 'N'}", title=x, **across),
        "y": alt.Y(
            f"{field[y]}:Q", title=y, stack=None, **_axis(y in series.log, zero=series.chart == "histogram")
        ),
        "tooltip": [alt.Tooltip(f"{field[column]}", type="nominal", title=column) for column in columns],
    }
    if series.color in columns:
        encoding["color"] = _colour(series.color, field[series.color], columns[series.color])
    base = alt.Chart(alt.NamedData(name))
    layers: list[alt.Chart] = [
        _marks(base, series.chart, len(set(map(str, rows[field[x]])))).encode(**encoding)
    ]
    if "threshold" in columns and series.chart == "histogram":
        layers.append(_thresholds(base, field, series))
    return _spec(alt.layer(*layers).properties(width="container", height=240)), rows


def _marks(base: alt.Chart, chart: str, distinct: int) -> alt.Chart:
    """The mark of a series: lines with points, points, or bars (thinner the more there are)."""
    if chart == "line":
        return base.mark_line(point=True)
    if chart == "histogram":
        return base.mark_bar(opacity=0.5, size=max(3, min(24, 480 // max(1, distinct))))
    return base.mark_point(filled=True, size=36, opacity=0.65)


def _thresholds(base: alt.Chart, field: dict[str, str], series: Series) -> alt.Chart:
    """Vertical rules at the distinct values of the column "threshold", in the colour of their group."""
    keys = [field["threshold"], *([field[series.color]] if series.color in field else [])]
    encoding: dict[str, Any] = {
        "x": alt.X(f"{field['threshold']}:Q"),
        "tooltip": [alt.Tooltip(f"{field['threshold']}:Q", title="threshold")],
    }
    if series.color in field:
        encoding["color"] = alt.Color(f"{field[series.color]}:N")
    grouped = base.transform_aggregate(groupby=keys).transform_filter(f"isValid(datum.{keys[0]})")
    return grouped.mark_rule(strokeDash=[5, 4], strokeWidth=2).encode(**encoding)


def _histogram(series: Series) -> Columns:
    """Counts of the finite values of column ``x`` in equal bins (of the logarithm on a log axis), by colour."""
    logarithmic = series.x in series.log
    colours = series.columns.get(series.color, [""] * len(series.columns[series.x]))
    thresholds = dict(zip(colours, series.columns.get("threshold", []), strict=False))
    values = [
        (colour, math.log10(value) if logarithmic else float(value))
        for colour, value in zip(colours, series.columns[series.x], strict=False)
        if _is_number(value) and (value > 0 or not logarithmic)
    ]
    low, high = min((v for _, v in values), default=0.0), max((v for _, v in values), default=1.0)
    width = (high - low) / HISTOGRAM_BINS or 1.0
    counts: dict[tuple[Any, int], int] = {}
    for colour, value in values:
        place = min(HISTOGRAM_BINS - 1, int((value - low) / width))
        counts[colour, place] = counts.get((colour, place), 0) + 1
    centres = [low + (place + 0.5) * width for _, place in counts]
    columns: Columns = {
        series.x: [float(f"{10**centre if logarithmic else centre:.4g}") for centre in centres],
        series.y: list(counts.values()),
    }
    if series.color:
        columns[series.color] = [colour for colour, _ in counts]
    if thresholds:
        columns["threshold"] = [thresholds.get(colour) for colour, _ in counts]
    return columns


def _drawable(columns: Columns, positive: Sequence[str]) -> Columns:
    """``columns`` as c0, c1, … of equal length; numbers that an axis has no place for become null."""
    length = max(map(len, columns.values()), default=0)
    drawn: Columns = {}
    for place, (name, values) in enumerate(columns.items()):
        padded = [*values, *[None] * (length - len(values))]
        drawn[f"c{place}"] = [
            None
            if (isinstance(v, float) and not math.isfinite(v))
            or (name in positive and _is_number(v) and v <= 0)
            else v
            for v in padded
        ]
    return drawn


def _log_axis(grid: bool = True) -> alt.Axis:
    """Few ticks, written as numbers (Vega would write 200m for 0.2)."""
    return alt.Axis(tickCount=6, labelExpr=NUMBER_LABEL, labelOverlap=True, grid=grid)


def _axis(logarithmic: bool, zero: bool = False) -> dict[str, Any]:
    """Scale and axis of one direction; with ``zero`` it begins at 0 (bars)."""
    if logarithmic:
        return {"scale": alt.Scale(type="log", nice=False, padding=8), "axis": _log_axis()}
    return {"scale": alt.Scale(zero=True) if zero else alt.Scale(zero=False, padding=8)}


def _colour(title: str, field: str, values: Sequence[Any]) -> alt.Color:
    """The colour channel; dtypes keep the colours that they have everywhere on the page."""
    distinct = {str(value) for value in values}
    if not distinct <= DTYPE_COLOURS.keys():
        return alt.Color(f"{field}:N", title=title)
    domain = sorted(distinct, key=_dtype_order)
    return alt.Color(
        f"{field}:N", title=None, scale=alt.Scale(domain=domain, range=[DTYPE_COLOURS[d] for d in domain])
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _finite_positive(value: float | None) -> float | None:
    return float(f"{value:.3g}") if value is not None and math.isfinite(value) and value > 0 else None


def _bounded(value: float) -> float:
    """``value`` within the bounds of the ratio axes, to three digits."""
    return float(f"{10 ** log10_clipped(value, math.log10(RATIO_LOW), math.log10(RATIO_HIGH)):.3g}")


def _shade(value: float | None) -> float:
    return 0.0 if value is None else round(log10_clipped(value, -SHADE_DECADES, SHADE_DECADES), 3)


def _dtype_order(dtype: str) -> tuple[int, str]:
    order = list(DTYPE_COLOURS)
    return (order.index(dtype) if dtype in order else len(order), dtype)


def _columns(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Columns:
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def _spec(chart: alt.LayerChart) -> dict[str, Any]:
    """The specification as plain data; Altair has checked it against the Vega-Lite schema."""
    spec: dict[str, Any] = chart.to_dict()
    for key in ("$schema", "config"):
        spec.pop(key, None)
    return spec
