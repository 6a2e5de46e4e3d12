"""Regimes for state spaces, selective scans and prefix scans: decays and steps at their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from attnproof.properties.draw import Draw, Float64
from attnproof.properties.regimes.regime import Builder, Regime
from attnproof.properties.signatures import SIGNATURES

__all__ = ["SCANS", "fixed_rate", "scans", "shared_axes"]

_SPACES = ("ssm", "h3")
_STEPPED = ("selective_scan", "ssd")
_FAMILIES = (*_SPACES, *_STEPPED, "prefix_scan", "rwkv4")
# ln(e^x − 1) at the centre of the usual steps: softplus of it is 0.05.
_USUAL_STEP = math.log(math.expm1(0.05))

Values = Callable[[Draw, str, tuple[int, ...]], Float64]
# Magnitude and angle of the poles a, of (H, states).
Poles = Callable[[Draw, tuple[int, int]], tuple[Float64, Float64]]
# Steps δ ≥ 0 and rates A ≤ 0.
Steps = Callable[[Draw], tuple[Float64, Float64]]


def _normal(size: float = 1.0, mean: float = 0.0) -> Values:
    return lambda draw, name, shape: size * draw.normal(name, *shape) + mean


def _standard(draw: Draw, name: str, shape: tuple[int, ...]) -> Float64:
    return draw.normal(name, *shape)


def _uniform(draw: Draw, name: str, shape: tuple[int, ...]) -> Float64:
    return draw.uniform(name, *shape)


def _subnormal(draw: Draw, name: str, shape: tuple[int, ...]) -> Float64:
    return float(draw.finfo.tiny) / 8.0 * draw.normal(name, *shape)


def shared_axes(draw: Draw, *axes: str) -> tuple[int, ...]:
    """The sizes of axes, 1 for those but the last two where the view "broadcast" makes their strides 0."""
    sizes = tuple(draw[axis] for axis in axes)
    return (*(1,) * (len(sizes) - 2), *sizes[-2:]) if draw.shared else sizes


def _states(draw: Draw) -> tuple[int, int]:
    """(H, D), or (H, P) of H3's diagonal state space."""
    return draw["H"], draw["P" if draw.family == "h3" else "D"]


# ---- poles


def _usual_poles(draw: Draw, shape: tuple[int, int]) -> tuple[Float64, Float64]:
    """S4D-Lin under steps from 0.01 to 0.1: a = exp(Δ(−1/2 + iπn)) (Gu et al., arXiv 2206.11893)."""
    step = 10.0 ** (draw.uniform("step", shape[0], 1) - 2.0)
    number = np.arange(shape[1], dtype=np.float64)
    rate = 0.5 if draw.options.get("complex") else 0.5 + number
    return np.exp(-step * rate) * np.ones(shape), step * math.pi * number


def _fixed_poles(magnitude: float, angle: float = 0.0) -> Poles:
    return lambda draw, shape: (np.full(shape, magnitude), np.full(shape, angle))


def _unit_poles(draw: Draw, shape: tuple[int, int]) -> tuple[Float64, Float64]:
    """1, and where it is complex i, −1 and −i: nothing is forgotten, exactly."""
    quarters = np.broadcast_to(np.arange(shape[1], dtype=np.float64) % 4.0, shape)
    angle: Float64 = np.multiply(quarters, math.pi / 2.0, dtype=np.float64)
    return np.ones(shape), angle if draw.options.get("complex") else np.zeros(shape)


def _slow_poles(draw: Draw, shape: tuple[int, int]) -> tuple[Float64, Float64]:
    """1 − 2^(−5 − h) for head h, at small angles."""
    decay = 1.0 - 2.0 ** -(5.0 + np.arange(shape[0], dtype=np.float64))
    return np.broadcast_to(decay[:, None], shape), 0.125 * draw.uniform("angle", *shape)


def _fast_poles(draw: Draw, shape: tuple[int, int]) -> tuple[Float64, Float64]:
    """Angles within 2^−8 of π: signs that alternate at every step."""
    return np.full(shape, 1.0 - 2.0**-6), math.pi - 2.0**-8 * draw.uniform("angle", *shape)


def _strong_poles(draw: Draw, shape: tuple[int, int]) -> tuple[Float64, Float64]:
    """Magnitudes down to 2^−20, whose powers soon underflow."""
    return 2.0 ** (-20.0 * draw.uniform("magnitude", *shape)), math.pi * draw.uniform("angle", *shape)


def _pairs(draw: Draw, magnitude: Float64, angle: Float64) -> Float64:
    """Numbers as the case has them: pairs (…, 2), or reals, negative where the angle is past π/2."""
    if draw.options.get("complex"):
        # Quarter turns are exact.
        real = np.where(angle % math.pi == math.pi / 2.0, 0.0, np.cos(angle))
        imaginary = np.where(angle % math.pi == 0.0, 0.0, np.sin(angle))
        return np.stack([magnitude * real, magnitude * imaginary], -1)
    return magnitude * np.where(angle > math.pi / 2.0, -1.0, 1.0)


def _space(draw: Draw, poles: Poles) -> dict[str, Any]:
    """a, b, c and the skip terms of a state space."""
    shape = _states(draw)
    magnitude, angle = poles(draw, shape)
    pair = (2,) if draw.options.get("complex") else ()
    found: dict[str, Any] = {"a": _pairs(draw, np.asarray(magnitude), np.asarray(angle))}
    for name in "bc":
        found[name] = draw.normal(name, *shape, *pair) / math.sqrt(math.sqrt(shape[1]))
    if draw.family == "ssm":
        return {**found, "d": draw.normal("d", draw["H"])}
    taps = draw.normal("taps", draw["H"], draw["D"], draw["T"])
    skips = {
        "d_shift": draw.normal("d_shift", draw["H"], draw["D"]),
        "d_diag": draw.normal("d_diag", draw["H"]),
    }
    return {**found, "taps": taps, **skips}


# ---- steps


def _usual_steps(draw: Draw) -> tuple[Float64, Float64]:
    """Softplus of normal numbers about that of 0.05; A = −1, −2, … as Mamba begins with, or by head."""
    delta = np.log1p(np.exp(draw.normal("delta", draw["B"], draw["H"], draw["N"]) + _USUAL_STEP))
    return delta, _usual_rates(draw)


def _usual_rates(draw: Draw) -> Float64:
    if draw.family == "ssd":
        return -(1.0 + np.arange(draw["H"], dtype=np.float64) % 16)
    return np.broadcast_to(-(1.0 + np.arange(draw["D"], dtype=np.float64)), (draw["H"], draw["D"]))


def _steps(low: float, high: float) -> Steps:
    """Steps between two powers of ten, log-uniform."""

    def build(draw: Draw) -> tuple[Float64, Float64]:
        exponent = low + (high - low) * draw.uniform("delta", draw["B"], draw["H"], draw["N"])
        return 10.0**exponent, _usual_rates(draw)

    return build


def _rates(rate: float) -> Steps:
    def build(draw: Draw) -> tuple[Float64, Float64]:
        delta, rates = _usual_steps(draw)
        return delta, np.full(rates.shape, rate)

    return build


def _uneven_rates(draw: Draw) -> tuple[Float64, Float64]:
    """Rates of every channel's own; the usual ones are the same for all channels."""
    return _usual_steps(draw)[0], -np.exp(draw.normal("A", draw["H"], draw["D"]))


def _infinite(draw: Draw) -> tuple[Float64, Float64]:
    """Steps and rates of 2^66 and more, whose product is −∞ in float32."""
    delta = 2.0 ** (66.0 + draw.uniform("delta", draw["B"], draw["H"], draw["N"]))
    return delta, -(2.0**66) * np.ones_like(_usual_rates(draw))


def _no_steps(draw: Draw) -> tuple[Float64, Float64]:
    """Steps of exactly 0 two times in three: nothing decays and nothing is written."""
    delta, rates = _usual_steps(draw)
    return np.where(np.arange(draw["N"]) % 3 == 0, delta, 0.0), rates


def _tails(draw: Draw) -> tuple[Float64, Float64]:
    """Before softplus from −100 to 100: it is e^x on one side and x on the other."""
    return 100.0 * (2.0 * draw.uniform("delta", draw["B"], draw["H"], draw["N"]) - 1.0), _usual_rates(draw)


def _stepped(draw: Draw, steps: Steps, *, raw: bool = False) -> dict[str, Any]:
    """Everything of a selective scan but what it is linear in.

    With ``raw``, steps are what softplus is put to where the case has it, or else their absolute values.
    """
    delta, rates = steps(draw)
    found: dict[str, Any] = {"A": rates, "D": draw.normal("D", draw["H"])}
    if draw.family == "ssd":
        grouped = (draw["B"], draw["G"], draw["N"], draw["D"])
        return {**found, "dt": np.abs(delta), **{name: draw.normal(name, *grouped) for name in "BC"}}
    shape = (draw["B"], draw["D"], draw["N"])
    found |= {name: draw.normal(name, *shape) for name in "BC"}
    bias = 0.5 * np.abs(draw.normal("delta_bias", draw["H"]))
    if draw.options.get("delta_softplus") and not raw:
        # What softplus takes back to these steps.
        delta = np.log(np.maximum(np.expm1(np.minimum(delta, 30.0)), 1e-30)) + np.maximum(delta - 30.0, 0.0)
    elif not draw.options.get("delta_softplus"):
        delta = np.abs(delta)
    return {**found, "delta": delta, "delta_bias": bias}


# ---- prefix scans


def _scanned(draw: Draw, *, decay: Callable[[Draw], Float64] | None = None) -> dict[str, Any]:
    """Queries, keys and parameters of a prefix scan."""
    if draw.family == "prefix_scan":
        keys = (1, 1, draw["N"]) if draw.shared else (draw["B"], draw["H"], draw["N"])
        return {"q": draw.normal("q", draw["H"], draw["D"]), "k": draw.normal("k", *keys, draw["D"])}
    rate = -np.exp(draw.normal("w", draw["H"]) - 2.0) if decay is None else decay(draw)
    return {
        "w": rate,
        "u": draw.normal("u", draw["H"]),
        "k": draw.normal("k", *shared_axes(draw, "B", "H", "N")),
    }


# ---- whole calls


def _written(draw: Draw, values: Values) -> dict[str, Any]:
    """What the family is linear in."""
    name = SIGNATURES[draw.family].values
    axes = SIGNATURES[draw.family].tensors[name]
    shape = tuple(draw[axis] for axis in axes)
    if draw.shared and name in "kvx":
        # The view lays all but the last two axes out with strides of 0.
        shape = (*(1,) * (len(axes) - 2), *shape[-2:])
    return {name: values(draw, name, shape)}


def scans(
    values: Values = _standard,
    *,
    poles: Poles = _usual_poles,
    steps: Steps = _usual_steps,
    raw: bool = False,
    decay: Callable[[Draw], Float64] | None = None,
    gate: float = 1.0,
) -> Builder:
    """Inputs of all these families; each takes what it has a use for."""

    def build(draw: Draw) -> dict[str, Any]:
        found = _written(draw, values)
        if draw.family in _SPACES:
            found |= _space(draw, poles)
            if draw.family == "h3":
                keys = (1, 1, draw["N"]) if draw.shared else (draw["B"], draw["H"], draw["N"])
                found["q"] = draw.normal("q", draw["B"], draw["H"], draw["N"], draw["D"])
                found["k"] = draw.normal("k", *keys, draw["D"])
        elif draw.family in _STEPPED:
            found |= _stepped(draw, steps, raw=raw)
            if draw.family == "selective_scan":
                found["z"] = gate * draw.normal("z", draw["B"], draw["H"], draw["N"])
        else:
            found |= _scanned(draw, decay=decay)
        return found

    return build


def _without_memory(draw: Draw) -> dict[str, Any]:
    """Log decays of −∞, beside B so small that what is written is of order 1."""
    found = scans(steps=_infinite)(draw)
    return {**found, "B": found["B"] * 2.0**-66, "delta_bias": 0.0 * draw.normal("delta_bias", draw["H"])}


def _last_nonfinite(draw: Draw) -> dict[str, Any]:
    """A NaN in what is written at the last position, which no earlier one sees."""
    found = scans()(draw)
    name = SIGNATURES[draw.family].values
    values = found[name].copy()
    if draw["N"]:
        values[:, :, -1] = np.nan
    return {**found, name: values}


def _seen_nonfinite(draw: Draw) -> dict[str, Any]:
    """A NaN in what is written in the middle, which all later positions see."""
    found = scans()(draw)
    name = SIGNATURES[draw.family].values
    values = found[name].copy()
    if draw["N"]:
        values[:, :, draw["N"] // 2] = np.nan
    return {**found, name: values}


def _all(builder: Builder, *families: str) -> dict[str, Builder]:
    return dict.fromkeys(families or _FAMILIES, builder)


def fixed_rate(value: float) -> Callable[[Draw], Float64]:
    """The same log decay in every head."""
    return lambda draw: np.full(draw["H"], value)


def _slow_rates(draw: Draw) -> Float64:
    rates: Float64 = np.log1p(-(2.0 ** -(5.0 + np.arange(draw["H"]))))
    return rates


SCANS = (
    Regime("normal", "", "plain", _all(scans())),
    Regime("uniform", "", "plain", _all(scans(_uniform))),
    Regime("large-values", "", "extreme", _all(scans(_normal(1024.0)))),
    Regime("subnormal-values", "", "extreme", _all(scans(_subnormal))),
    Regime("one-sign-values", "", "plain", _all(scans(_normal(1.0, 4.0)))),
    Regime("future-nonfinite", "", "nonfinite", _all(_last_nonfinite)),
    Regime("past-nonfinite", "", "nonfinite", _all(_seen_nonfinite)),
    Regime(
        "open-gates",
        "",
        "plain",
        {
            **_all(scans(poles=_unit_poles), *_SPACES),
            **_all(scans(steps=_rates(0.0)), *_STEPPED),
            **_all(scans(decay=fixed_rate(0.0)), "rwkv4"),
        },
    ),
    Regime("closed-gates", "", "extreme", _all(scans(poles=_fixed_poles(0.0)), *_SPACES)),
    Regime(
        "slow-decay",
        "",
        "plain",
        {
            **_all(scans(poles=_slow_poles), *_SPACES),
            **_all(scans(steps=_rates(-(2.0**-6))), *_STEPPED),
            **_all(scans(decay=_slow_rates), "rwkv4"),
        },
    ),
    Regime(
        "strong-decay",
        "",
        "extreme",
        {
            **_all(scans(poles=_strong_poles), *_SPACES),
            **_all(scans(steps=_steps(-1.0, 2.0)), *_STEPPED),
            **_all(scans(decay=fixed_rate(-1000.0)), "rwkv4"),
        },
    ),
    Regime(
        "infinite-decay",
        "products of step and rate that are -inf in float32: their differences are NaN",
        "extreme",
        _all(_without_memory, *_STEPPED),
        excludes=("delta_softplus",),
        dtypes=("float32", "bfloat16", "float64"),
    ),
    Regime(
        "fast-oscillation",
        "poles within 2^-8 of -1 on a circle of radius 1 - 2^-6: terms alternate, and sums nearly cancel",
        "plain",
        _all(scans(poles=_fast_poles), *_SPACES),
    ),
    Regime(
        "uneven-rates",
        "rates that differ between channels, as training makes them: a channel must decay by its own",
        "plain",
        _all(scans(steps=_uneven_rates), "selective_scan"),
    ),
    Regime(
        "no-steps",
        "steps of exactly 0: nothing decays and nothing is written, and (e^x - 1)/x is 1",
        "plain",
        _all(scans(steps=_no_steps), *_STEPPED),
    ),
    Regime(
        "small-steps",
        "steps down to 10^-6: e^x - 1 cancels unless it is computed as such",
        "plain",
        _all(scans(steps=_steps(-6.0, -3.0)), *_STEPPED),
    ),
    Regime(
        "softplus-tails",
        "softplus of numbers from -100 to 100: log(1 + e^x) overflows, or rounds to 0 (bug B39)",
        "extreme",
        _all(scans(steps=_tails, raw=True), "selective_scan"),
        needs=("delta_softplus",),
    ),
    Regime(
        "saturated-gates",
        "silu far on both sides: x, and x e^x",
        "extreme",
        _all(scans(gate=30.0), "selective_scan"),
        needs=("z",),
    ),
)
"""Regimes by their families; texts of those that other families have as well stand there."""
