"""Regimes of the row-wise families, x (R, N): log-sum-exp and softmax over the last axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from attnproof.properties.draw import Draw
from attnproof.properties.regimes.regime import Builder, Regime, RegimeClass

__all__ = ["ROWS"]

Values = dict[str, Any]

_LEVELS = (100.0, 1000.0, 10000.0, -100.0, -10000.0)


def normal(draw: Draw) -> Values:
    """Entries ~ N(0, 1)."""
    return {"x": draw.normal("x", *draw.rows)}


def uniform(draw: Draw) -> Values:
    """Entries uniform in [0, 1)."""
    return {"x": draw.uniform("x", *draw.rows)}


def near_uniform(draw: Draw) -> Values:
    """Entries ~ N(0, 2⁻²⁰)."""
    return {"x": draw.normal("x", *draw.rows) * 2.0**-10}


def equal_rows(draw: Draw) -> Values:
    """Each row repeats one value ~ N(0, 1), or one of ±100, ±1e4, 1e3."""
    rows, _ = draw.rows
    small = draw.normal("value", rows, 1)
    large = np.array(_LEVELS)[draw.integers("level", 0, len(_LEVELS), rows, 1)]
    value = np.where(draw.integers("kind", 0, 2, rows, 1) == 0, small, large)
    return {"x": np.broadcast_to(value, draw.rows)}


def tied(draw: Draw) -> Values:
    """Multiples of 1/2 ~ N(0, 1), the two largest entries of a row equal."""
    x = np.round(2.0 * draw.normal("x", *draw.rows)) / 2.0
    if draw["N"] > 1:
        order = draw.permutations("order", *draw.rows)
        np.put_along_axis(x, order[:, :2], x.max(axis=1, keepdims=True), axis=1)
    return {"x": x}


def one_hot(draw: Draw) -> Values:
    """One entry of each row is at least 40 above the others."""
    x = draw.normal("x", *draw.rows)
    if draw["N"]:
        rows, keys = draw.rows
        np.put_along_axis(x, draw.integers("which", 0, keys, rows, 1), 60.0, axis=1)
    return {"x": x}


def offset(level: float) -> Builder:
    """Entries ~ N(level, 1), or an ulp of the level for deviation where it is more."""

    def build(draw: Draw) -> Values:
        deviation = max(1.0, abs(level) * float(draw.finfo.eps))
        return {"x": level + deviation * draw.normal("x", *draw.rows)}

    return build


def spread(deviation: float) -> Builder:
    """Entries ~ N(0, deviation²)."""

    def build(draw: Draw) -> Values:
        return {"x": deviation * draw.normal("x", *draw.rows)}

    return build


def ordered(direction: float) -> Builder:
    """Entries that rise (+1) or fall (−1) by 1/4 to 3/4 from each to the next."""

    def build(draw: Draw) -> Values:
        keys = draw["N"]
        ramp = direction * 0.5 * (np.arange(keys) - keys // 2)
        return {"x": ramp + 0.25 * (draw.uniform("x", *draw.rows) - 0.5)}

    return build


def outliers(draw: Draw) -> Values:
    """Entries ~ N(0, 1) + N(0, 100)·Bernoulli(0.01)."""
    hit = draw.uniform("hit", *draw.rows) < 0.01
    return {"x": draw.normal("x", *draw.rows) + 10.0 * draw.normal("outlier", *draw.rows) * hit}


def log_near_zero(draw: Draw) -> Values:
    """Entries log w for weights w that add up to 1 before x is rounded, so that log Σ exp x is about 0."""
    weights = 0.125 + draw.uniform("x", *draw.rows)
    total = weights.sum(axis=1, keepdims=True)
    return {"x": np.log(weights / total)}


def subnormal(draw: Draw) -> Values:
    """Entries subnormal in the dtype, N(0, 1)/8 times the smallest normal number."""
    return {"x": draw.normal("x", *draw.rows) * float(draw.finfo.tiny) / 8.0}


def near_largest(draw: Draw) -> Values:
    """Entries of ±max and ±max/4 of the dtype among normal ones."""
    top = float(draw.finfo.max)
    choice = draw.integers("choice", 0, 8, *draw.rows)
    large = np.array([top, -top, top / 4, -top / 4, 0.0, 0.0, 0.0, 0.0])[choice]
    return {"x": np.where(choice < 4, large, draw.normal("x", *draw.rows))}


def masked(draw: Draw) -> Values:
    """Normal entries, 2/5 of them −inf, with some rows wholly so."""
    rows, _ = draw.rows
    hidden = draw.uniform("hidden", *draw.rows) < 0.4
    hidden |= _some_rows(draw, rows)
    return {"x": np.where(hidden, -np.inf, draw.normal("x", *draw.rows))}


def seen_nonfinite(draw: Draw) -> Values:
    """One NaN or +inf in some rows, normal entries otherwise."""
    rows, keys = draw.rows
    x = draw.normal("x", *draw.rows)
    if keys:
        column = np.arange(keys) == draw.integers("column", 0, keys, rows, 1)
        value = np.array([np.nan, np.inf])[draw.integers("value", 0, 2, rows, 1)]
        x = np.where(_some_rows(draw, rows) & column, value, x)
    return {"x": x}


def representable(draw: Draw) -> Values:
    """A power-of-two number of entries of each row is 0, the others are multiples of 256, at most −256."""
    rows, keys = draw.rows
    x = -256.0 * draw.integers("x", 1, 5, *draw.rows)
    if keys:
        tied = np.exp2(draw.integers("count", 0, keys.bit_length(), rows, 1))
        x = np.where(draw.permutations("order", *draw.rows) < tied, 0.0, x)
    return {"x": x}


def _some_rows(draw: Draw, rows: int) -> npt.NDArray[np.bool_]:
    """(rows, 1) bool: about an eighth of the rows, at least one of several and never all."""
    chosen = draw.uniform("rows", rows) < 0.125
    if rows > 1:
        order = draw.permutations("row order", rows)
        chosen[order[0]], chosen[order[1]] = True, False
    else:
        chosen[:] = False
    return chosen[:, None]


def _regime(
    name: str, reason: str, regime_class: RegimeClass, builder: Builder, *, vacuous: bool = False
) -> Regime:
    builders = {"logsumexp": builder, "softmax_rows": builder}
    return Regime(name, reason, regime_class, builders, vacuous=vacuous)


ROWS = (
    _regime("normal", "the common case", "plain", normal),
    _regime("uniform", "entries in [0, 1): errors of one sign add up", "plain", uniform),
    _regime("near-uniform", "all weights nearly 1/N", "tied", near_uniform, vacuous=True),
    _regime(
        "equal-rows",
        "x = c: log N + c exactly, weights exactly 1/N, c up to 1e4",
        "tied",
        equal_rows,
        vacuous=True,
    ),
    _regime("tied", "repeated maxima: exp(x - max) is exactly 1 for several entries", "tied", tied),
    _regime(
        "one-hot",
        "margin of at least 40: the log of a sum that is 1 in the working precision",
        "plain",
        one_hot,
    ),
    _regime(
        "exp-overflow", "all entries above 88.73 = ln of float32's largest number", "extreme", offset(110.0)
    ),
    _regime(
        "exp-underflow",
        "all entries below -103.98 = ln of half float32's smallest number",
        "extreme",
        offset(-120.0),
    ),
    _regime(
        "offset-1e3",
        "entries of about 1000: the shift by the maximum cancels 10 bits",
        "extreme",
        offset(1e3),
    ),
    _regime(
        "offset-1e4",
        "entries of about 10000: the shift by the maximum cancels 13 bits",
        "extreme",
        offset(1e4),
    ),
    _regime(
        "below-sentinel",
        "entries below -50000: a finite stand-in for -inf is the maximum",
        "extreme",
        offset(-6e4),
    ),
    _regime("large-logits", "standard deviation 100: exp over its whole range", "extreme", spread(100.0)),
    _regime(
        "near-largest",
        "entries of ±the largest number: differences overflow, weights are 0 or 1",
        "extreme",
        near_largest,
    ),
    _regime(
        "ascending", "entries rise: every tile raises the running maximum and rescales", "plain", ordered(1.0)
    ),
    _regime("descending", "entries fall: later tiles contribute ever less", "plain", ordered(-1.0)),
    _regime("outliers", "N(0, 1) + N(0, 100)·Bernoulli(0.01)", "plain", outliers),
    _regime(
        "log-near-zero",
        "the sum is 1 up to rounding: the log cancels, relative to the result",
        "plain",
        log_near_zero,
    ),
    _regime("subnormal", "entries below the smallest normal number", "tied", subnormal, vacuous=True),
    _regime("masked", "-inf entries, and rows of nothing else: -inf less itself is NaN", "plain", masked),
    _regime("seen-nonfinite", "rows with a NaN or +inf beside rows without", "nonfinite", seen_nonfinite),
    _regime(
        "representable",
        "weights exactly 0 or a power of two, log-sum-exp a multiple of ln 2",
        "exact",
        representable,
    ),
)
