"""Regimes of what is stabilised by a running maximum: exponents far apart, and levels of initial states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnproof.properties.draw import Draw, Float64
from attnproof.properties.regimes.regime import Builder, Regime
from attnproof.properties.regimes.scans import fixed_rate, scans, shared_axes
from attnproof.properties.regimes.states import states
from attnproof.properties.signatures import SIGNATURES

__all__ = ["LEVELS"]

_MAXIMA = ("prefix_scan", "rwkv4")


def _logits(draw: Draw, made: Callable[[Draw, tuple[int, ...]], Float64]) -> dict[str, Any]:
    """Keys whose products with the query, scaled, are what ``made`` says; of RWKV-4 the keys themselves."""
    if draw.family == "rwkv4":
        return {"k": made(draw, shared_axes(draw, "B", "H", "N"))}
    shape = (1, 1, draw["N"]) if draw.shared else (draw["B"], draw["H"], draw["N"])
    q = draw.signs("q", draw["H"], draw["D"]) if not draw.shared else np.ones((draw["H"], draw["D"]))
    # Every key is a multiple of one vector of signs: q·k/√D is D times the multiple over √D.
    signs = np.ones((1, 1, 1, draw["D"])) if draw.shared else q[None, :, None, :]
    return {"q": q, "k": made(draw, shape)[..., None] * signs / draw["D"], "scale": 1.0}


def _rising(draw: Draw, shape: tuple[int, ...]) -> Float64:
    """A new maximum at every step."""
    return np.broadcast_to(np.arange(shape[-1]) * (64.0 / max(shape[-1], 1)) - 32.0, shape)


def _falling(draw: Draw, shape: tuple[int, ...]) -> Float64:
    return -_rising(draw, shape)


def _equal(draw: Draw, shape: tuple[int, ...]) -> Float64:
    return np.full(shape, 0.5)


def _wide(draw: Draw, shape: tuple[int, ...]) -> Float64:
    """From −200 to 200: e^s leaves float32 on both sides."""
    return 200.0 * (2.0 * draw.uniform("logits", *shape) - 1.0)


def _low(draw: Draw, shape: tuple[int, ...]) -> Float64:
    """About −6·10⁴: still numbers of float16."""
    return draw.normal("logits", *shape) - 6e4


def _with_logits(
    made: Callable[[Draw, tuple[int, ...]], Float64], decay: Callable[[Draw], Float64] | None = None
) -> Builder:
    """The usual inputs with exponents of one's own."""
    usual = scans(decay=decay)
    return lambda draw: {**usual(draw), **_logits(draw, made)}


def _neutral(draw: Draw) -> dict[str, Any]:
    """Initial states that nothing was written to in every second head, at level −∞."""
    form = SIGNATURES[draw.family]
    found = states()(draw) if draw.family == "mlstm" else scans()(draw)
    written = np.arange(draw["H"]) % 2 == 1
    for name, axes in form.states.items():
        # Without the number of sequences: all of them begin alike.
        shape = (1, *(draw[axis] for axis in axes[1:]))
        drawn = np.abs(draw.normal(f"initial {name}", *shape)) + 1.0
        kept = written.reshape(1, -1, *(1,) * (len(shape) - 2))
        found[f"initial_{name}"] = np.where(kept, drawn, -np.inf if name in form.levels else 0.0)
    return found


def _all(builder: Builder, *families: str) -> dict[str, Builder]:
    return dict.fromkeys(families, builder)


LEVELS = (
    Regime(
        "rising-maxima",
        "a new maximum at every position: all that was summed is scaled down each time",
        "plain",
        _all(_with_logits(_rising, decay=fixed_rate(0.0)), *_MAXIMA),
    ),
    Regime(
        "falling-maxima",
        "the first position stays the maximum",
        "plain",
        _all(_with_logits(_falling, decay=fixed_rate(0.0)), *_MAXIMA),
    ),
    Regime(
        "equal-maxima",
        "all exponents equal: every weight is 1/t",
        "tied",
        _all(_with_logits(_equal, decay=fixed_rate(0.0)), *_MAXIMA),
        vacuous=True,
    ),
    Regime(
        "wide-maxima",
        "exponents from -200 to 200: e^s leaves float32 on both sides",
        "extreme",
        _all(_with_logits(_wide), *_MAXIMA),
    ),
    Regime("below-sentinel", "", "extreme", _all(_with_logits(_low), *_MAXIMA)),
    Regime(
        "neutral-state",
        "initial states of level -inf, to which nothing was written: exp(-inf - (-inf)) must not come up",
        "plain",
        _all(_neutral, "mlstm", *_MAXIMA),
        needs=("initial_state",),
    ),
)
"""Regimes by their families; texts of those that other families have as well stand there."""
