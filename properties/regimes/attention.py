"""Regimes of attention that differ in the magnitudes and the arrangement of q, k and v."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnproof.properties.contract import DTYPES
from attnproof.properties.draw import Draw, Float64
from attnproof.properties.regimes.regime import ATTENTION_FAMILIES, Builder, Regime

__all__ = ["ATTENTION"]

_ONE_HOT_MARGIN = (
    40.0  # exp(-40) = 4e-18: below half an ulp of 1 in float64 for up to 20 keys, far below in float32
)
_STEP = 0.5  # between consecutive scores in the ordered regimes: each tile of 16 raises the maximum by 8
_HUGE = 133120.0  # 2^17 + 2^11, exact in bfloat16; its square times log2(e) is no longer near any float32


def normal(draw: Draw) -> dict[str, Any]:
    """Entries of q, k, v ~ N(0, 1)."""
    return {
        "q": draw.normal("q", *draw.queries, draw["D"]),
        "k": draw.normal("k", *draw.keys, draw["D"]),
        "v": draw.normal("v", *draw.keys, draw["E"]),
    }


def uniform(draw: Draw) -> dict[str, Any]:
    """Entries of q, k, v uniform in [0, 1), scores scaled by 4/√D, or rows would be nearly uniform too."""
    return {
        "scale": 4.0 * draw.scale,
        "q": draw.uniform("q", *draw.queries, draw["D"]),
        "k": draw.uniform("k", *draw.keys, draw["D"]),
        "v": draw.uniform("v", *draw.keys, draw["E"]),
    }


def near_uniform(draw: Draw) -> dict[str, Any]:
    """Logits ~ N(0, 2⁻¹⁶)."""
    values = normal(draw)
    return {**values, "q": values["q"] * 2.0**-8}


def zero_queries(draw: Draw) -> dict[str, Any]:
    """All queries are 0."""
    values = normal(draw)
    return {**values, "q": np.zeros_like(values["q"])}


def equal_keys(draw: Draw) -> dict[str, Any]:
    """All keys of a head are its first one."""
    values = normal(draw)
    return {**values, "k": np.broadcast_to(values["k"][:, :, :1], values["k"].shape)}


def tied(draw: Draw) -> dict[str, Any]:
    """Each key occurs at least four times (all of them are one where N < 8), in random order."""
    values = normal(draw)
    keys = draw["N"]
    if keys:
        original = draw.permutations("order", *draw.keys) % max(1, keys // 4)
        values["k"] = np.take_along_axis(values["k"], original[..., None], axis=2)
    return values


def tied_one_sign(draw: Draw) -> dict[str, Any]:
    """Tied maxima with −v uniform in [1, 2) in even columns of v, v in odd ones."""
    values = tied(draw)
    return {**values, "v": (1.0 + draw.uniform("v", *draw.keys, draw["E"])) * _column_signs(draw["E"])}


def one_hot(draw: Draw) -> dict[str, Any]:
    """One of a few special keys, ±4 on one axis, beats every other key by at least 40 in each row."""
    width, keys = draw["D"], draw["N"]
    special = min(2 * width, keys)
    k = draw.uniform("k", *draw.keys, width) - 0.5
    q = (draw.uniform("q", *draw.queries, width) - 0.5) / 4
    if keys:
        axis, sign = np.arange(special) // 2, 1.0 - 2.0 * (np.arange(special) % 2)
        block = np.zeros((special, width))
        block[np.arange(special), axis] = 4.0 * sign
        k[:, :, :special] = block
        k = np.take_along_axis(k, draw.permutations("order", *draw.keys)[..., None], axis=2)
        # The rest of q adds at most D/8·1/2 to a score, and 4·1/8 to a special one, on either side.
        reach = (_ONE_HOT_MARGIN / draw.scale + width / 8 + 1.0) / 3.5
        aim = draw.integers("aim", 0, special, *draw.queries)
        np.put_along_axis(q, axis[aim][..., None], (reach * sign[aim])[..., None], axis=3)
    return {"q": q, "k": k, "v": draw.normal("v", *draw.keys, draw["E"])}


def offset(logit: float) -> Builder:
    """Logits with normal spread around a value at least as far from 0 as ``logit``, and of its sign."""

    def build(draw: Draw) -> dict[str, Any]:
        return _around(draw, logit / draw.scale)

    return build


def raw_offset(score: float) -> Builder:
    """As :func:`offset`, for q·k before scaling."""

    def build(draw: Draw) -> dict[str, Any]:
        return _around(draw, score)

    return build


def _around(draw: Draw, score: float) -> dict[str, Any]:
    """Scores q·k around ``score`` or up to four times it: offset c², c a power of two."""
    values = normal(draw)
    c = 2.0 ** math.ceil(math.log2(abs(score)) / 2)
    values["q"][..., 0] = c
    values["k"][..., 0] = math.copysign(c, score) * (1.0 + values["k"][..., 0] / (draw.scale * c * c))
    return values


def large_logits(draw: Draw) -> dict[str, Any]:
    """Logits ~ N(0, 100²), of either sign."""
    values = normal(draw)
    return {**values, "q": 10.0 * values["q"], "k": 10.0 * values["k"]}


def identical_huge(draw: Draw) -> dict[str, Any]:
    """Every entry of q and k is 133120, of v ±133120."""
    return {
        "q": np.full((*draw.queries, draw["D"]), _HUGE),
        "k": np.full((*draw.keys, draw["D"]), _HUGE),
        "v": _HUGE * draw.signs("v", *draw.keys, draw["E"]),
    }


def ordered(direction: float) -> Builder:
    """Scores that rise (+1) or fall (−1) by about 0.5 from each key to the next, in every row."""

    def build(draw: Draw) -> dict[str, Any]:
        width, keys = draw["D"], draw["N"]
        # Other axes add at most a quarter of a step to a score on either side, so the order is strict.
        q = 2.0 * draw.uniform("q", *draw.queries, width) - 1.0
        k = (2.0 * draw.uniform("k", *draw.keys, width) - 1.0) * _STEP / (4.0 * draw.scale * width)
        q[..., 0] = 4.0
        k[..., 0] = direction * (np.arange(keys) - keys // 2) * _STEP / (4.0 * draw.scale)
        return {"q": q, "k": k, "v": draw.normal("v", *draw.keys, draw["E"])}

    return build


def outlier_key(draw: Draw) -> dict[str, Any]:
    """One key of each head is 30 times as long as the others."""
    values = normal(draw)
    batch, groups, keys = draw.keys
    if keys:
        which = draw.integers("which", 0, keys, batch, groups, 1, 1)
        values["k"] = np.where(np.arange(keys)[:, None] == which, 30.0 * values["k"], values["k"])
    return values


def attention_sink(draw: Draw) -> dict[str, Any]:
    """The first key draws a logit of about 10 in every row, and its value is small."""
    values = normal(draw)
    values["q"][..., 0] = 4.0
    values["k"][..., 0] /= 4.0
    values["k"][:, :, :1, 0] = 10.0 / (4.0 * draw.scale)
    values["v"][:, :, :1] /= 64.0
    return values


def outliers(draw: Draw) -> dict[str, Any]:
    """Every entry ~ N(0, 1) + N(0, 100)·Bernoulli(0.001)."""
    values = normal(draw)
    for name, base in values.items():
        hit = draw.uniform(f"{name} hit", *base.shape) < 0.001
        values[name] = base + 10.0 * draw.normal(f"{name} outlier", *base.shape) * hit
    return values


def correlated(draw: Draw) -> dict[str, Any]:
    """q, v ~ N(1, 1), k = v + N(0, 1/4) on the columns that both have."""
    values = normal(draw)
    common = min(draw["D"], draw["E"])
    v = 1.0 + values["v"]
    k = 1.0 + values["k"]
    k[..., :common] = v[..., :common] + 0.5 * values["k"][..., :common]
    return {"q": 1.0 + values["q"], "k": k, "v": v}


def cancelling_values(draw: Draw) -> dict[str, Any]:
    """Keys come in equal pairs, values +64 and −64 plus N(0, 1/16): outputs are 1/1000 of their terms."""
    values = normal(draw)
    keys = draw["N"]
    first = np.arange(keys) // 2 * 2
    mean = np.where(np.arange(keys) % 2 == 0, 64.0, -64.0)
    if keys % 2:
        mean[-1] = 0.0
    return {**values, "k": values["k"][:, :, first], "v": mean[:, None] + 0.25 * values["v"]}


def one_sign_values(draw: Draw) -> dict[str, Any]:
    """Each column of v has one sign, magnitudes uniform in [1, 2)."""
    v = (1.0 + draw.uniform("v", *draw.keys, draw["E"])) * _column_signs(draw["E"])
    return {**normal(draw), "v": v}


def wide_values(draw: Draw) -> dict[str, Any]:
    """Entries of v over 20 octaves, whole columns apart by another 8."""
    values = normal(draw)
    octave = draw.integers("octave", -6, 7, *draw.keys, 1) + draw.integers("column", -4, 5, draw["E"])
    return {**values, "v": values["v"] * np.exp2(octave)}


def large_values(draw: Draw) -> dict[str, Any]:
    """|v| from 1/8 to 1/4 of the largest power of two, less a factor N where sums have no wider range."""
    top = math.floor(math.log2(draw.finfo.max))
    if draw.dtype != "float16":
        top -= math.ceil(math.log2(max(1, draw["N"])))
    v = draw.signs("sign", *draw.keys, draw["E"]) * (1.0 + draw.uniform("v", *draw.keys, draw["E"]))
    return {**normal(draw), "v": v * 2.0 ** (top - 3)}


def _column_signs(width: int) -> Float64:
    return np.where(np.arange(width) % 2 == 0, -1.0, 1.0)


def _every(builder: Builder) -> dict[str, Builder]:
    return dict.fromkeys(ATTENTION_FAMILIES, builder)


_UNCAPPED = ("softcap",)  # tanh would flatten such logits to ±the cap

ATTENTION = (
    Regime("normal", "the common case; logits ~ N(0, 1)", "plain", _every(normal)),
    Regime(
        "uniform",
        "entries in [0, 1): one sign everywhere, so that errors of one sign add up instead of averaging out",
        "plain",
        _every(uniform),
    ),
    Regime(
        "near-uniform",
        "all weights nearly 1/N, as at initialisation: tests elsewhere often see only this, and little shows",
        "tied",
        _every(near_uniform),
        vacuous=True,
    ),
    Regime(
        "zero-queries",
        "all logits exactly 0: a padding lane that joins the normaliser changes every output (bug B16)",
        "tied",
        _every(zero_queries),
        vacuous=True,
    ),
    Regime(
        "equal-keys",
        "every key is the maximum: P is exactly 1 before normalisation and the sum exactly N",
        "tied",
        _every(equal_keys),
        vacuous=True,
    ),
    Regime(
        "tied",
        "repeated maxima: P is exactly 1 for several keys, and gradients must not favour one of them",
        "tied",
        _every(tied),
    ),
    Regime(
        "tied-one-sign",
        "repeated maxima, columns of v of one sign: roundings of P·V in bfloat16 all fall one way (bug B33)",
        "tied",
        _every(tied_one_sign),
    ),
    Regime(
        "one-hot",
        "margin of at least 40 over all other keys: confident rows, where derivatives cancel (bug B64)",
        "plain",
        _every(one_hot),
        excludes=_UNCAPPED,
    ),
    Regime(
        "exp-overflow",
        "all logits above 88.73, ln of float32's largest number: naively exp overflows",
        "extreme",
        _every(offset(110.0)),
        excludes=_UNCAPPED,
    ),
    Regime(
        "exp-underflow",
        "all logits below -103.98, ln of half float32's smallest number: naively 0/0",
        "extreme",
        _every(offset(-120.0)),
        excludes=_UNCAPPED,
    ),
    Regime(
        "score-overflow",
        "q·k above 65504, float16's largest number, q and k small: scores stored in float16 overflow",
        "extreme",
        _every(raw_offset(1.2e5)),
        excludes=_UNCAPPED,
    ),
    Regime(
        "below-sentinel",
        "all q·k below -50000: a finite stand-in for -inf is taken for the maximum (bug B06)",
        "extreme",
        _every(raw_offset(-6e4)),
        excludes=_UNCAPPED,
    ),
    Regime(
        "offset-1e3",
        "logits of about 1000 with normal spread: the shift by the maximum cancels 10 bits",
        "extreme",
        _every(offset(1e3)),
        excludes=_UNCAPPED,
    ),
    Regime(
        "offset-1e4",
        "logits of about 10000 with normal spread: the shift by the maximum cancels 13 bits",
        "extreme",
        _every(offset(1e4)),
        excludes=_UNCAPPED,
    ),
    Regime(
        "large-logits",
        "logits of standard deviation 100: weights over the whole range of exp, most of them underflow",
        "extreme",
        _every(large_logits),
        excludes=_UNCAPPED,
    ),
    Regime(
        "identical-huge",
        "q = k = 133120: a product fused with subtracting a rounded maximum leaves a residual (bug B07)",
        "extreme",
        _every(identical_huge),
        excludes=_UNCAPPED,
        dtypes=tuple(d for d in DTYPES if d != "float16"),
        vacuous=True,
    ),
    Regime(
        "ascending",
        "scores rise from key to key: every tile of an online softmax raises the maximum and rescales",
        "plain",
        _every(ordered(1.0)),
    ),
    Regime(
        "descending",
        "scores fall from key to key: later tiles contribute ever less, and must not rescale",
        "plain",
        _every(ordered(-1.0)),
    ),
    Regime(
        "outlier-key",
        "one key 30 times as long: one-hot for half of the rows, unseen for the others",
        "plain",
        _every(outlier_key),
    ),
    Regime(
        "attention-sink",
        "the first key takes most of the weight and has a small value, as in trained models",
        "plain",
        _every(attention_sink),
    ),
    Regime(
        "outliers",
        "N(0, 1) + N(0, 100)·Bernoulli(0.001): FlashAttention-3's model of outliers in trained networks",
        "plain",
        _every(outliers),
    ),
    Regime(
        "correlated",
        "k = v + noise, all means 1: weights and values are not independent, so errors of P show",
        "plain",
        _every(correlated),
    ),
    Regime(
        "cancelling-values",
        "large values that cancel in the sum: the error must be small against Σ p|v|, not against the output",
        "plain",
        _every(cancelling_values),
    ),
    Regime(
        "one-sign-values",
        "columns of v of one sign: a bias of the roundings of P adds up",
        "plain",
        _every(one_sign_values),
    ),
    Regime(
        "wide-values",
        "values over 20 octaves: small columns must not be judged, or computed, by the scale of large ones",
        "plain",
        _every(wide_values),
    ),
    Regime(
        "large-values",
        "values near the largest number: outputs are finite, P·V in storage precision before division is not",
        "extreme",
        _every(large_values),
    ),
)
