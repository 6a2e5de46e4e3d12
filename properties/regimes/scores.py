"""Regimes in which gradients, score functions other than softmax, or masks of practice go wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnproof.properties.draw import Draw, Float64
from attnproof.properties.regimes.attention import normal
from attnproof.properties.regimes.regime import ATTENTION_FAMILIES, Builder, Regime

__all__ = ["SCORES"]

_KEY_OFFSET = 4.0
_VALUE_OFFSET = 8.0
_FAR_OFFSET = 256.0


def negative_scale(draw: Draw) -> dict[str, Any]:
    """Normal inputs with the scale −1/√D."""
    return {**normal(draw), "scale": -draw.scale}


def off_centre(draw: Draw) -> dict[str, Any]:
    """k and v are N(0, 1) about a mean of 4 and 8 in every column; queries are half as large."""
    values = normal(draw)
    return {
        "q": 0.5 * values["q"],
        "k": values["k"] + _KEY_OFFSET,
        "v": values["v"] + _VALUE_OFFSET,
    }


def saturated(draw: Draw) -> dict[str, Any]:
    """Logits of ±17 to ±40, by halves of the keys."""
    width, keys = draw["D"], draw["N"]
    level = 17.0 + 23.0 * draw.uniform("level", *draw.keys, 1)
    side = draw.signs("side", *draw.keys, 1)
    k = np.zeros((*draw.keys, width))
    k[..., :1] = np.round(level * 4.0) / 4.0 * side
    q = 0.0625 * draw.normal("q", *draw.queries, width)
    q[..., 0] = 1.0
    if width > 1 and keys:
        k[..., 1:] = draw.normal("k", *draw.keys, width - 1) * 0.25
    return {"q": q, "k": k, "v": draw.normal("v", *draw.keys, draw["E"]), "scale": 1.0}


def kinks(draw: Draw) -> dict[str, Any]:
    """q and k of −1, 0 and 1 with so few entries that many scores are exactly 0; v of small integers."""
    width = draw["D"]
    held = min(width, 4)

    def few(name: str, *shape: int) -> Float64:
        entries = np.zeros((*shape, width))
        entries[..., :held] = draw.integers(name, -1, 2, *shape, held)
        return entries

    return {
        "q": few("q", *draw.queries),
        "k": few("k", *draw.keys),
        "v": draw.integers("v", -7, 8, *draw.keys, draw["E"]).astype(np.float64),
    }


def far_keys(draw: Draw) -> dict[str, Any]:
    """Keys 256 standard deviations from 0, with queries about the same mean."""
    values = normal(draw)
    mean = _FAR_OFFSET * draw.signs("mean", 1, 1, 1, draw["D"])
    return {**values, "q": values["q"] + mean, "k": values["k"] + mean}


def constant_columns(draw: Draw) -> dict[str, Any]:
    """Every other column of k is one number, the same for all keys of a head."""
    values = normal(draw)
    first = values["k"][:, :, :1] if draw["N"] else values["k"]
    held = np.arange(draw["D"]) % 2 == 0
    return {**values, "k": np.where(held, np.broadcast_to(first, values["k"].shape), values["k"])}


def prefix(draw: Draw) -> dict[str, Any]:
    """The mask of a prefix language model as a bias: the first third seen by all, the rest causally."""
    rows, keys = draw["M"], draw["N"]
    position = np.arange(rows)[:, None] + (keys - rows)
    seen = (np.arange(keys)[None, :] <= position) | (np.arange(keys)[None, :] < keys // 3)
    return {**normal(draw), "bias": _masking(draw, seen)}


def documents(draw: Draw) -> dict[str, Any]:
    """A bias that keeps queries to the keys of their own document, of three in a row."""
    rows, keys = draw["M"], draw["N"]
    of_key = np.arange(keys) * 3 // max(keys, 1)
    position = np.clip(np.arange(rows) + (keys - rows), 0, max(keys - 1, 0))
    of_row = position * 3 // max(keys, 1)
    return {**normal(draw), "bias": _masking(draw, of_row[:, None] == of_key[None, :])}


def _masking(draw: Draw, seen: Any) -> Float64:
    """0 and −inf in a bias with axes for queries and keys; a normal one where its pattern has them not."""
    shape = draw.bias_shape
    if shape[2:] != (draw["M"], draw["N"]):
        return draw.normal("bias", *shape)
    return np.broadcast_to(np.where(seen, 0.0, -np.inf), shape).copy()


def softmax_one(draw: Draw) -> dict[str, Any]:
    """Sinks of exactly 0: one more in the normaliser."""
    return {**normal(draw), "sinks": np.zeros(draw["H"])}


def easy(scale: float, value: float, *, one_sign: bool = False) -> Builder:
    """Learned scores N(0, 1/N) times ``scale``, values N(0, 1) times ``value``."""

    def build(draw: Draw) -> dict[str, Any]:
        keys = draw["N"]
        alpha = draw.normal("alpha", draw["H"], keys, keys) * (scale / math.sqrt(max(keys, 1)))
        v = _values(draw) * value
        if one_sign:
            alpha, v = np.abs(alpha), np.abs(v) + value
        return {"alpha": alpha, "v": v}

    return build


def _values(draw: Draw) -> Float64:
    batch = (1, 1) if draw.shared else (draw["B"], draw["H"])
    return draw.normal("v", *batch, draw["N"], draw["E"])


def easy_rotation(draw: Draw) -> dict[str, Any]:
    """Learned scores are a permutation matrix for each head: outputs are values, moved."""
    order = draw.permutations("order", draw["H"], draw["N"])
    alpha = (order[..., None] == np.arange(draw["N"])).astype(np.float64)
    return {"alpha": alpha, "v": _values(draw)}


def easy_cancelling(draw: Draw) -> dict[str, Any]:
    """Scores of both signs against values that hardly differ: sums cancel to a small rest."""
    keys = draw["N"]
    alpha = draw.signs("alpha", draw["H"], keys, keys)
    return {"alpha": alpha, "v": 8.0 + 2.0**-4 * _values(draw)}


def easy_subnormal(draw: Draw) -> dict[str, Any]:
    """Values below the dtype's smallest normal number."""
    built = easy(4.0, 1.0)(draw)
    return {**built, "v": built["v"] * float(draw.finfo.tiny) / 8.0}


def easy_nonfinite(draw: Draw) -> dict[str, Any]:
    """NaN in the values of the last position, which only rows within the band see."""
    built = easy(1.0, 1.0)(draw)
    v = built["v"].copy()
    if draw["N"]:
        v[:, :, -1, 0] = np.nan
    return {**built, "v": v}


def _all(builder: Builder, *families: str) -> dict[str, Builder]:
    return dict.fromkeys(families or ATTENTION_FAMILIES, builder)


SCORES = (
    Regime(
        "off-centre",
        "keys and values about a mean far from 0: errors of delta reach dQ times the mean of K",
        "plain",
        _all(off_centre),
    ),
    Regime(
        "negative-scale",
        "a scale below 0: a kernel that takes it out of the maximum, or of a relu, has the wrong sign",
        "plain",
        _all(negative_scale),
    ),
    Regime(
        "saturated",
        "logits of ±17 to ±40: sigma is 0 or 1 to within rounding, and 1 − sigma must not cancel (bug B63)",
        "extreme",
        _all(saturated, "softmax", "sigmoid", "relu"),
        excludes=("softcap",),
    ),
    Regime(
        "exact-kinks",
        "scores that are exactly 0, where the derivative of relu is PyTorch's 0",
        "exact",
        _all(kinks, "sigmoid", "relu"),
    ),
    Regime(
        "far-keys",
        "keys 256 deviations from 0: a variance by E[x²] − E[x]² has lost its digits",
        "extreme",
        _all(far_keys, "batch_normalised", "scaled_head"),
    ),
    Regime(
        "constant-columns",
        "columns of k without variance: only eps keeps the quotient finite",
        "extreme",
        _all(constant_columns, "batch_normalised"),
    ),
    Regime(
        "prefix-lm",
        "the mask of a prefix language model: the first third seen by all, the rest causally",
        "plain",
        _all(prefix, "softmax"),
        needs=("bias",),
    ),
    Regime(
        "documents",
        "the mask of documents packed into one sequence, as a bias of 0 and -inf",
        "plain",
        _all(documents, "softmax"),
        needs=("bias",),
    ),
    Regime(
        "softmax-one",
        "a sink of logit 0: softmax with one more in the denominator",
        "plain",
        _all(softmax_one, "softmax"),
        needs=("sinks",),
    ),
    Regime("normal", "", "plain", {"easy": easy(1.0, 1.0)}),
    Regime("one-hot", "", "plain", {"easy": easy_rotation}),
    Regime("cancelling-values", "", "plain", {"easy": easy_cancelling}),
    Regime("one-sign-values", "", "plain", {"easy": easy(1.0, 1.0, one_sign=True)}),
    Regime("large-values", "", "extreme", {"easy": easy(1.0, 1024.0)}),
    Regime("wide-values", "", "plain", {"easy": easy(16.0, 2.0**-6)}),
    Regime("subnormal-values", "", "extreme", {"easy": easy_subnormal}),
    Regime("unseen-nonfinite", "", "nonfinite", {"easy": easy_nonfinite}),
)
