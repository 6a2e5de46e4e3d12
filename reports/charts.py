"""Charts of the HTML report, as Vega-Lite specifications that Altair builds and checks.

A specification names its data ("cells", "points", one name a series of a finding); the page holds each
data set once, in columns, and hands every chart its rows. Text and axes take ``currentColor`` from the page,
so that one drawing serves light, dark and print. Ratios are drawn on log axes within the bounds below; the
tooltip holds the true figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from attnproof.reports.tables import Cell, Summary
from attnproof.reports.wording import log10_clipped, ratio, worst

__all__ = [
    "ALL_DTYPES",
    "CONFIG",
    "DTYPE_COLOURS",
    "Columns",
    "cells_data",
    "dtype_order",
    "log_axis",
    "points_data",
    "specification",
    "specifications",
]

Columns = dict[str, list[Any]]
Layered = alt.LayerChart | alt.FacetChart

SHADE_DECADES = 3.0
"""Heat maps are fully shaded three decades from 1: most healthy kernels lie within 1e-3 and 1 (design.md)."""

RATIO_LOW, RATIO_HIGH = 1e-4, 1e6
"""Bounds of the ratio axes: an exact result is drawn at the bottom, NaN and infinity at the top."""

ALL_DTYPES = "all"

DTYPE_COLOURS = {
    "float16": "#d0782c",
    "bfloat16": "#2a9d78",
    "float32": "#4a86c8",
    "float64": "#a071c0",
}
"""Told apart under colour deficiencies (after Okabe & Ito), at least 3:1 against white and near-black."""

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
                (kernel.index, kernel.name, regime, dtype, shade(value), ratio(value, digits=2))
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
    figures = ("N", "logit", "certain", "row", "certain_text", "row_text")
    return _columns(("kernel", "example", "regime", "dtype", *figures, "case"), rows)


def specifications(summary: Summary) -> dict[str, dict[str, Any]]:
    """The charts that every report has, by name: "overview", "kernel", "length", "logit"."""
    dtypes = sorted({point.dtype for point in summary.points}, key=dtype_order)
    return {
        "overview": specification(_overview()),
        "kernel": specification(_heat_map("dtype:N", f"datum.dtype != '{ALL_DTYPES}'")),
        "length": specification(_scatter("N", "sequence length N (log scale)", dtypes)),
        "logit": specification(_scatter("logit", "largest |logit| (log scale)", dtypes)),
    }


def _overview() -> Layered:
    """Kernels down, regimes across, for the dtype that a control of the page chooses."""
    shown = alt.param(name="shown", value=ALL_DTYPES)
    return _heat_map("kernel:N", "datum.dtype == shown").add_params(shown)


def _heat_map(y: str, rows: str) -> Layered:
    """Regime across, ``y`` down, of the ``rows`` that an expression keeps, in the order of the record.

    Blue is within the certain budget, orange beyond it; the opacity of these two hues grows with the distance
    from 1, so that 1 itself is as pale as the page in either colour scheme.
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
    return shaded(base).transform_filter(rows).properties(width={"step": 46}, height={"step": 22})


def shaded(base: alt.Chart) -> Layered:
    """Rectangles coloured by the column "shade" (:func:`shade`), each with its "label"."""
    opacity = alt.Scale(domain=[0, SHADE_DECADES], range=[0.06, 0.75])
    rectangle = base.mark_rect(stroke="currentColor", strokeOpacity=0.15).encode(
        color=alt.condition("datum.shade > 0", alt.value(BEYOND), alt.value(WITHIN)),
        fillOpacity=alt.FillOpacity("strength:Q", legend=None, scale=opacity),
    )
    label = base.mark_text(fontSize=10).encode(text="label:N")
    layered: Layered = alt.layer(rectangle, label).transform_calculate(strength="abs(datum.shade)")
    return layered


def _scatter(x: str, title: str, dtypes: Sequence[str]) -> Layered:
    """Worst ratio of every case against ``x``; a control of the page switches between the two budgets."""
    budget = alt.param(name="budget", value="certain")
    colours = [DTYPE_COLOURS.get(dtype, CATEGORY[4]) for dtype in dtypes]
    base = alt.Chart(alt.NamedData("points")).transform_filter(f"isValid(datum.{x})")
    points = base.mark_point(filled=True, size=28, opacity=0.55).encode(
        x=alt.X(
            f"{x}:Q",
            title=title,
            scale=alt.Scale(type="log", nice=False, padding=8),
            axis=log_axis(4 if x == "N" else 10, grid=False),
        ),
        y=alt.Y(
            "ratio:Q",
            title="error / budget (log scale)",
            scale=alt.Scale(type="log", nice=False, padding=8),
            axis=log_axis(),
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


def log_axis(base: int = 10, grid: bool = True) -> alt.Axis:
    """Ticks at the powers of ``base``, written as numbers (left to itself Vega writes 200m for 0.2)."""
    powers = range(-15, 16) if base == 10 else range(16)
    values = [float(base) ** power for power in powers]
    return alt.Axis(values=values, labelExpr=NUMBER_LABEL, labelOverlap=True, grid=grid)


def _finite_positive(value: float | None) -> float | None:
    return float(f"{value:.3g}") if value is not None and math.isfinite(value) and value > 0 else None


def _bounded(value: float) -> float:
    """``value`` within the bounds of the ratio axes, to three digits."""
    return float(f"{10 ** log10_clipped(value, math.log10(RATIO_LOW), math.log10(RATIO_HIGH)):.3g}")


def shade(value: float | None) -> float:
    """log10 of a ratio, clipped: 0 for 1 and for None, beyond it positive."""
    return 0.0 if value is None else round(log10_clipped(value, -SHADE_DECADES, SHADE_DECADES), 3)


def dtype_order(dtype: str) -> tuple[int, str]:
    """Sort key: float16, bfloat16, float32, float64, then the rest by name."""
    order = list(DTYPE_COLOURS)
    return (order.index(dtype) if dtype in order else len(order), dtype)


def _columns(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Columns:
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def specification(chart: Layered) -> dict[str, Any]:
    """The specification as plain data; Altair has checked it against the Vega-Lite schema."""
    spec: dict[str, Any] = chart.to_dict()
    for key in ("$schema", "config"):
        spec.pop(key, None)
    return spec
