"""The regime of real activations: what a trained transformer computes on English text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnproof.properties.activations import HEADS, INSTALL, LAYERS, WIDTH, activations, available
from attnproof.properties.draw import Draw, Float64
from attnproof.properties.regimes.regime import ATTENTION_FAMILIES, Regime

__all__ = ["REAL"]

_SEGMENT = 256
_ROLL = 17  # tokens by which the query heads of one key/value head are apart


def attention(draw: Draw) -> dict[str, Any]:
    """q, k, v of one layer a batch entry and one head of the model a key/value head.

    D and E above 32 take columns of the following heads too, below 32 the head's first ones. Queries are the
    last M of the N tokens; texts shorter than that start again.
    """
    real = activations()
    batch, groups, keys = draw.keys
    first = _SEGMENT * int(draw.integers("segment", 0, real.tokens // _SEGMENT))
    key_tokens = first + np.arange(keys)
    k = np.empty((batch, groups, keys, draw["D"]))
    v = np.empty((batch, groups, keys, draw["E"]))
    for b, g in np.ndindex(batch, groups):
        layer, column = _place(draw, b, g)
        k[b, g] = _take(real.k[layer], key_tokens, column, draw["D"])
        v[b, g] = _take(real.v[layer], key_tokens, column, draw["E"])
    q = np.empty((*draw.queries, draw["D"]))
    for b, h in np.ndindex(draw["B"], draw["H"]):
        group = draw["H"] // draw["G"]
        layer, column = _place(draw, 0, 0) if draw.shared else _place(draw, b, h // group)
        shift = _ROLL * (h if draw.shared else h % group)
        tokens = first + keys - draw["M"] + np.arange(draw["M"]) - shift
        q[b, h] = _take(real.q[layer], tokens, column, draw["D"])
    return {"q": q, "k": k, "v": v}


def rows(draw: Draw) -> dict[str, Any]:
    """Scaled scores of the last R of N tokens in one head, rounded to multiples of 2⁻²⁰."""
    real = activations()
    count, keys = draw.rows
    layer, column = _place(draw, 0, 0)
    first = _SEGMENT * int(draw.integers("segment", 0, real.tokens // _SEGMENT))
    q = _take(real.q[layer], first + keys - count + np.arange(count), column, WIDTH)
    k = _take(real.k[layer], first + np.arange(keys), column, WIDTH)
    return {"x": np.round(q @ k.T / math.sqrt(WIDTH) * 2.0**20) * 2.0**-20}


def _place(draw: Draw, b: int, g: int) -> tuple[int, int]:
    """Layer and first column for a batch entry and a key/value head."""
    heads = -(-draw.sizes.get("D", WIDTH) // WIDTH)
    return (draw.seed + b) % LAYERS, WIDTH * ((draw.seed // LAYERS + g * heads) % HEADS)


def _take(source: Float64, tokens: np.ndarray[Any, Any], column: int, width: int) -> Float64:
    columns = (column + np.arange(width)) % source.shape[1]
    taken: Float64 = source[(tokens % len(source))[:, None], columns]
    return taken


REAL = (
    Regime(
        "real-activations",
        "attention of a trained model on English text: sinks, outlier channels, correlated keys (bug B14)",
        "real",
        {
            **dict.fromkeys((f for f in ATTENTION_FAMILIES if f != "differential"), attention),
            "logsumexp": rows,
            "softmax_rows": rows,
        },
        requires=(available, INSTALL),
    ),
)
