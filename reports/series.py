"""Charts of findings: any series of a record as a Vega-Lite specification, where its numbers can be drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from attnproof.reports.charts import (
    DTYPE_COLOURS,
    Columns,
    dtype_order,
    log_axis,
    shade,
    shaded,
    specification,
)
from attnproof.reports.record import Series
from attnproof.reports.wording import ratio

__all__ = ["series_chart"]

HISTOGRAM_BINS = 40

DECADES_WITH_TICKS = 2
"""An axis that spans fewer decades keeps Vega's own ticks: powers of ten alone would be too few."""


def series_chart(series: Series, name: str) -> tuple[dict[str, Any], Columns] | None:
    """The chart of ``series`` and its rows under ``name``; None for tables and series without numbers.

    Columns become c0, c1, … (names of a record may hold what Vega-Lite reads as syntax). A "histogram" whose
    ``y`` is no column is counted here; its column "threshold", if it has one, is drawn as vertical rules.
    """
    if series.chart == "table" or series.x not in series.columns:
        return None
    if series.chart == "matrix":
        return _matrix(series, name)
    counted = series.chart == "histogram" and series.y not in series.columns
    columns = _histogram(series) if counted else series.columns
    if series.y not in columns or not any(map(_is_number, columns[series.y])):
        return None
    rows = _drawable(columns, [axis for axis in (series.x, series.y) if axis in series.log])
    field = {column: f"c{place}" for place, column in enumerate(columns)}
    encoding = _positions(series, field, rows)
    if series.color in columns:
        encoding["color"] = _colour(series.color, field[series.color], columns[series.color])
    base = alt.Chart(alt.NamedData(name))
    layers = [_marks(base, series, counted, rows[field[series.x]]).encode(**encoding)]
    if "threshold" in columns and series.chart == "histogram":
        layers.append(_thresholds(base, field, series))
    return specification(alt.layer(*layers).properties(width="container", height=240)), rows


def _matrix(series: Series, name: str) -> tuple[dict[str, Any], Columns] | None:
    """Cells named by two columns, shaded by the distance of the third from 1 as heat maps are."""
    if not {series.y, series.color} <= series.columns.keys():
        return None
    figures = series.columns[series.color]
    rows = _drawable(series.columns, [])
    rows["shade"] = [shade(value) if _is_number(value) else None for value in figures]
    rows["label"] = [ratio(value, digits=2) if _is_number(value) else "" for value in figures]
    field = {column: f"c{place}" for place, column in enumerate(series.columns)}
    plain = alt.Axis(grid=False)
    base = alt.Chart(alt.NamedData(name)).encode(
        x=alt.X(f"{field[series.x]}:N", title=None, sort=None, axis=alt.Axis(orient="top", labelAngle=0)),
        y=alt.Y(f"{field[series.y]}:N", title=None, sort=None, axis=plain),
        tooltip=[alt.Tooltip(place, type="nominal", title=column) for column, place in field.items()],
    )
    return specification(shaded(base).properties(width={"step": 96}, height={"step": 22})), rows


def _positions(series: Series, field: dict[str, str], rows: Columns) -> dict[str, Any]:
    """The position channels and the tooltip; columns with text are laid out by name."""
    x, y = field[series.x], field[series.y]
    numeric = all(_is_number(value) or value is None for value in rows[x])
    across = _axis(series.x in series.log, rows[x]) if numeric else {}
    upward = _axis(series.y in series.log, rows[y], zero=series.chart == "histogram")
    return {
        "x": alt.X(f"{x}:{'Q' if numeric else 'N'}", title=series.x, **across),
        "y": alt.Y(f"{y}:Q", title=series.y, stack=None, **upward),
        "tooltip": [alt.Tooltip(name, type="nominal", title=column) for column, name in field.items()],
    }


def _marks(base: alt.Chart, series: Series, counted: bool, x: Sequence[Any]) -> alt.Chart:
    """Lines, points or bars; groups of a histogram counted here are stepped areas, which may overlap."""
    marked: alt.Chart
    if series.chart == "line":
        marked = base.mark_line(point=True)
    elif series.chart != "histogram":
        marked = base.mark_point(filled=True, size=36, opacity=0.65)
    elif counted and series.color in series.columns:
        marked = base.mark_area(interpolate="step", line=True, fillOpacity=0.15)
    else:
        marked = base.mark_bar(opacity=0.6, size=max(3, min(24, 480 // max(1, len(set(map(str, x)))))))
    return marked


def _thresholds(base: alt.Chart, field: dict[str, str], series: Series) -> alt.Chart:
    """Vertical rules at the distinct values of the column "threshold", in the colour of their group."""
    keys = [field["threshold"], *([field[series.color]] if series.color in field else [])]
    encoding: dict[str, Any] = {
        "x": alt.X(f"{keys[0]}:Q"),
        "tooltip": [alt.Tooltip(f"{keys[0]}:Q", title="threshold")],
    }
    if series.color in field:
        encoding["color"] = alt.Color(f"{keys[1]}:N")
    grouped = base.transform_aggregate(groupby=list(keys)).transform_filter(f"isValid(datum.{keys[0]})")
    rules: alt.Chart = grouped.mark_rule(strokeDash=[5, 4], strokeWidth=2).encode(**encoding)
    return rules


def _histogram(series: Series) -> Columns:
    """Counts of the finite values of column ``x`` in equal bins (of its logarithm on a log axis), by group.

    Every group has every bin, empty ones too. Where a group has several thresholds its first bins hold them.
    """
    logarithmic = series.x in series.log
    x = series.columns[series.x]
    groups = [str(value) for value in series.columns.get(series.color, [""] * len(x))]
    values = [
        (group, math.log10(value) if logarithmic else float(value))
        for group, value in zip(groups, x, strict=False)
        if _is_number(value) and (value > 0 or not logarithmic)
    ]
    low, high = min((v for _, v in values), default=0.0), max((v for _, v in values), default=1.0)
    width = high / HISTOGRAM_BINS - low / HISTOGRAM_BINS or 1.0
    counts = {group: [0] * HISTOGRAM_BINS for group, _ in values}
    for group, value in values:
        counts[group][min(HISTOGRAM_BINS - 1, int(value / width - low / width))] += 1
    centres = [low + (place + 0.5) * width for place in range(HISTOGRAM_BINS)]
    shown = [float(f"{10**centre if logarithmic else centre:.4g}") for centre in centres]
    columns: Columns = {
        series.x: shown * len(counts),
        series.y: [number for numbers in counts.values() for number in numbers],
    }
    if series.color in series.columns:
        columns[series.color] = [group for group in counts for _ in range(HISTOGRAM_BINS)]
    if "threshold" in series.columns:
        columns["threshold"] = _threshold_column(series, groups, counts)
    return columns


def _threshold_column(series: Series, groups: Sequence[str], counts: dict[str, list[int]]) -> list[Any]:
    """The thresholds of every group, in the first of its bins."""
    distinct: dict[str, dict[Any, None]] = {group: {} for group in counts}
    for group, threshold in zip(groups, series.columns["threshold"], strict=False):
        if group in distinct and _is_number(threshold):
            distinct[group][threshold] = None
    column: list[Any] = []
    for thresholds in distinct.values():
        column += [*thresholds, *[None] * HISTOGRAM_BINS][:HISTOGRAM_BINS]
    return column


def _drawable(columns: Columns, positive: Sequence[str]) -> Columns:
    """``columns`` as c0, c1, … of equal length; numbers that an axis has no place for become null."""
    length = max(map(len, columns.values()), default=0)
    return {
        f"c{place}": [
            None if _has_no_place(value, name in positive) else value
            for value in [*values, *[None] * (length - len(values))]
        ]
        for place, (name, values) in enumerate(columns.items())
    }


def _has_no_place(value: Any, positive: bool) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return True
    return positive and _is_number(value) and value <= 0


def _axis(logarithmic: bool, values: Sequence[Any], zero: bool = False) -> dict[str, Any]:
    """Scale and axis of one direction; with ``zero`` it begins at 0 (bars)."""
    if not logarithmic:
        return {"scale": alt.Scale(zero=True) if zero else alt.Scale(zero=False, padding=8)}
    scale = alt.Scale(type="log", nice=False, padding=8)
    numbers = [value for value in values if _is_number(value)]
    wide = numbers and math.log10(max(numbers)) - math.log10(min(numbers)) >= DECADES_WITH_TICKS
    return {"scale": scale, "axis": log_axis()} if wide else {"scale": scale}


def _colour(title: str, field: str, values: Sequence[Any]) -> alt.Color:
    """The colour channel; dtypes keep the colours that they have everywhere on the page."""
    distinct = {str(value) for value in values}
    if not distinct <= DTYPE_COLOURS.keys():
        return alt.Color(f"{field}:N", title=title)
    domain = sorted(distinct, key=dtype_order)
    colours = [DTYPE_COLOURS[dtype] for dtype in domain]
    return alt.Color(f"{field}:N", title=None, scale=alt.Scale(domain=domain, range=colours))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
