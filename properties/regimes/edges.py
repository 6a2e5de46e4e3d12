"""Regimes at the edges of the contract: masks, non-finite and subnormal entries, representable results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from attnproof.properties.draw import Draw, Float64
from attnproof.properties.regimes.attention import normal
from attnproof.properties.regimes.regime import ATTENTION_FAMILIES, Regime
from attnproof.properties.regimes.visibility import seen_keys

__all__ = ["EDGES"]

_MOST_CLASSES = 32
_MOST_TIED = 16  # 16 values of at most 7 add up to 112 < 2^7, so that their mean is exact even in bfloat16
_LEVEL = 256.0  # exp(-256) = 7e-112 is 0 in float32 and float16, and nothing beside 1 in float64
_BIAS_LEVEL = -1024.0


def masked(draw: Draw) -> dict[str, Any]:
    """A normal bias of which 2/5 is −inf, with some rows (batch entries, heads) wholly so."""
    bias = draw.normal("bias", *draw.bias_shape)
    hidden = draw.uniform("hidden", *bias.shape) < 0.4
    hidden |= _whole_rows(draw, bias.shape, 0.15)
    return {**normal(draw), "bias": np.where(hidden, -np.inf, bias)}


def sentinel(draw: Draw) -> dict[str, Any]:
    """A normal bias with −max or −max/4 of the dtype in 2/5 of the entries of some rows, in all of others."""
    bias = draw.normal("bias", *draw.bias_shape)
    hidden = draw.uniform("hidden", *bias.shape) < 0.4
    hidden |= _whole_rows(draw, bias.shape, 0.15)
    kind = draw.integers("kind", 0, 3, *bias.shape[:3], 1)
    lowest = float(draw.finfo.min) * np.where(kind == 1, 1.0, 0.25)
    return {**normal(draw), "bias": np.where(hidden & (kind > 0), lowest, bias)}


def unseen_nonfinite(draw: Draw) -> dict[str, Any]:
    """NaN and ±inf in k and v where no row, or at most half of the rows, sees the key."""
    values = normal(draw)
    if draw.family == "softmax" and "bias" in draw.options:
        bias = draw.normal("bias", *draw.bias_shape)
        columns = draw.permutations("columns", bias.shape[3]) < bias.shape[3] // 4
        values["bias"] = np.where(columns, -np.inf, bias)
    bad = _rarely_seen(draw, seen_keys(draw.sizes, draw.options, values.get("bias")))
    for name in ("k", "v"):
        values[name] = np.where(bad[..., None], _nonfinite(draw, name, *bad.shape, 1), values[name])
    return values


def seen_nonfinite(draw: Draw) -> dict[str, Any]:
    """NaN or ±inf in one entry of about an eighth of the queries."""
    values = normal(draw)
    rows = math.prod(draw.queries)
    if rows > 1:
        bad = draw.uniform("bad", rows) < 0.125
        order = draw.permutations("order", rows)
        bad[order[0]], bad[order[1]] = True, False
        column = np.arange(draw["D"]) == draw.integers("column", 0, draw["D"], *draw.queries, 1)
        hit = bad.reshape(draw.queries)[..., None] & column
        values["q"] = np.where(hit, _nonfinite(draw, "q", *draw.queries, 1), values["q"])
    return values


def representable(draw: Draw) -> dict[str, Any]:
    """Every logit is exactly 0 or at most −256; outputs are means of few integers from −7 to 7.

    Keys belong to classes of 1, 2, 4, 8 or 16 members, or to none; a row aims at one class, by preference one
    of which it sees a power-of-two number. All products and sums are exact in every dtype, tf32 included: q
    holds powers of two and small integers, each key one power of two besides a pair of axes whose products
    cancel exactly.
    """
    width, keys = draw["D"], draw["N"]
    level = 2.0 ** math.ceil(math.log2(_LEVEL / draw.scale))
    classes = min(width - 1, max(1, -(-keys // 6)), _MOST_CLASSES)
    label = _labels(draw, max(1, classes))  # (B, G, N), −1: of no class
    bias = _exact_bias(draw) if "bias" in draw.options else None
    q = np.full((*draw.queries, width), level)
    k = np.zeros((*draw.keys, width))
    k[..., 0] = np.where(label < 0, -1.0, 0.0)
    if classes:
        weight = np.exp2(draw.integers("weight", 0, 2, *draw.keys, 1))
        k[..., 1 : classes + 1] = -weight * (label[..., None] == np.arange(classes))
        aim = _aims(draw, label, classes, bias)
        np.put_along_axis(q, aim[..., None] + 1, 0.0, axis=3)
        _fill_spare(draw, q, k, classes + 1)
    values: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": draw.integers("v", -7, 8, *draw.keys, draw["E"]).astype(np.float64),
    }
    if bias is not None:
        values["bias"] = bias
    if "sinks" in draw.options:
        values["sinks"] = np.where(np.arange(draw["H"]) % 2 == 0, 0.0, _BIAS_LEVEL)
    return values


def subnormal_queries(draw: Draw) -> dict[str, Any]:
    """Queries subnormal in the dtype, k so large that logits have a standard deviation of about 2."""
    # tiny = 2^e: |q| in 2^e·[1/4, 1), |k| in 2^-e·[1/2, 1), so that q·k is of order √D.
    exponent = round(math.log2(draw.finfo.tiny))
    q = draw.signs("q sign", *draw.queries, draw["D"]) * (
        0.25 + 0.75 * draw.uniform("q", *draw.queries, draw["D"])
    )
    k = draw.signs("k sign", *draw.keys, draw["D"]) * (0.5 + 0.5 * draw.uniform("k", *draw.keys, draw["D"]))
    # A draw just below 1 must not be rounded up to a normal number.
    q = np.minimum(np.abs(q), 0.96875) * np.sign(q)
    return {
        "q": q * 2.0**exponent,
        "k": k * 2.0**-exponent,
        "v": draw.normal("v", *draw.keys, draw["E"]),
        "scale": 4.0 * draw.scale,
    }


def subnormal_values(draw: Draw) -> dict[str, Any]:
    """Values subnormal in the dtype: N(0, 1)/8 times the smallest normal number."""
    values = normal(draw)
    return {**values, "v": values["v"] * float(draw.finfo.tiny) / 8.0}


def _whole_rows(draw: Draw, shape: tuple[int, ...], share: float) -> npt.NDArray[np.bool_]:
    """(b, h, m, 1): a share of the rows of a bias, and at least one of several but never all."""
    rows = math.prod(shape[:3])
    chosen = draw.uniform("whole rows", rows) < share
    if rows > 1:
        order = draw.permutations("whole row order", rows)
        chosen[order[0]], chosen[order[1]] = True, False
    else:
        chosen[:] = False
    return chosen.reshape(*shape[:3], 1)


def _nonfinite(draw: Draw, name: str, *shape: int) -> Float64:
    return np.array([np.nan, np.inf, -np.inf])[draw.integers(f"{name} nonfinite", 0, 3, *shape)]


def _rarely_seen(draw: Draw, seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(B, G, N) or (1, 1, N): keys that no row sees, and up to N/8 more that at most half of the rows see."""
    batch, heads, rows, keys = seen.shape
    groups = draw["G"]
    by_head = seen.reshape(batch, groups, heads // groups * rows, keys)
    if draw.shared:
        by_head = by_head.reshape(1, 1, batch * heads * rows, keys)
    counts = by_head.sum(axis=2)
    bad: npt.NDArray[np.bool_] = counts == 0
    for b, g in np.ndindex(counts.shape[:2]):
        rare = [j for j in np.argsort(counts[b, g], kind="stable") if counts[b, g, j]][: max(1, keys // 8)]
        touched = np.zeros(by_head.shape[2], dtype=bool)
        for j in rare:
            touched |= by_head[b, g, :, j]
            if 2 * touched.sum() > touched.size:
                break
            bad[b, g, j] = True
    return bad


def _labels(draw: Draw, classes: int) -> npt.NDArray[np.int64]:
    """The class of each key, (B, G, N): class sizes are powers of two, the rest has −1; random order."""
    keys = draw["N"]
    label = np.full(keys, -1, dtype=np.int64)
    start = 0
    for index, exponent in enumerate(draw.integers("class size", 0, _MOST_TIED.bit_length(), classes)):
        size = 2 ** int(exponent)
        while size > keys - start:
            size //= 2
        label[start : start + size] = index
        start += size
    shuffled: npt.NDArray[np.int64] = label[draw.permutations("order", *draw.keys)]
    return shuffled


def _exact_bias(draw: Draw) -> Float64:
    """0 for most entries, −1024 or −inf for some."""
    choice = draw.integers("bias", 0, 8, *draw.bias_shape)
    return np.array([0.0] * 6 + [_BIAS_LEVEL, -np.inf])[choice]


def _aims(
    draw: Draw, label: npt.NDArray[np.int64], classes: int, bias: Float64 | None
) -> npt.NDArray[np.int64]:
    """The class at which each row aims, (B, H, M): one with a power-of-two number of seen keys if it can."""
    seen = seen_keys(draw.sizes, draw.options, bias)
    if bias is not None:
        seen = seen & (bias == 0.0)
    member = draw.per_head(label)[..., None] == np.arange(classes)  # (B, H, N, C)
    counts = np.matmul(seen.astype(np.float64), member.astype(np.float64)).astype(np.int64)
    powers = (counts > 0) & (counts & (counts - 1) == 0)
    preference: Float64 = powers.astype(np.float64) + (counts > 0) + 0.5 * draw.uniform("aim", *counts.shape)
    aims: npt.NDArray[np.int64] = np.argmax(preference, axis=3)
    return aims


def _fill_spare(draw: Draw, q: Float64, k: Float64, start: int) -> None:
    """Pairs of equal entries in q against opposite ones in k, from axis ``start``; an odd last is 0 in k."""
    pairs = (q.shape[3] - start) // 2
    a = draw.integers("spare q", -4, 5, *q.shape[:3], pairs)
    b = draw.integers("spare k", -4, 5, *k.shape[:3], pairs)
    q[..., start : start + 2 * pairs] = np.repeat(a, 2, axis=3)
    k[..., start : start + 2 * pairs] = np.stack([b, -b], axis=4).reshape(*b.shape[:3], 2 * pairs)


EDGES = (
    Regime(
        "masked",
        "-inf in the bias, rows that see no key: a maximum of -inf less itself is NaN (bugs B03, B24)",
        "plain",
        {"softmax": masked},
        needs=("bias",),
    ),
    Regime(
        "finite-sentinel",
        "masks of -max of the dtype: finite by the contract, so a row of nothing else still has weights",
        "extreme",
        {"softmax": sentinel},
        needs=("bias",),
        excludes=("softcap",),
    ),
    Regime(
        "unseen-nonfinite",
        "NaN and inf in keys that a row does not see: 0·NaN in the second product leaks them (bugs B21, B27)",
        "nonfinite",
        dict.fromkeys(("softmax", "sigmoid", "relu", "differential"), unseen_nonfinite),
        needs=("bias", "causal", "window", "cu_seqlens", "band"),
    ),
    Regime(
        "seen-nonfinite",
        "rows that see a NaN or inf beside rows that do not: nothing may spread from row to row of a tile",
        "nonfinite",
        dict.fromkeys(("softmax", "sigmoid", "relu", "differential", "scaled_head"), seen_nonfinite),
    ),
    Regime(
        "representable",
        "logits exactly 0 or far below, values small integers: no rounding for a defect to hide behind",
        "exact",
        {"softmax": representable},
        excludes=("softcap",),
    ),
    Regime(
        "subnormal-queries",
        "q below the smallest normal number against large k: flushed to zero, all weights become equal",
        "extreme",
        dict.fromkeys(("softmax", "sigmoid", "relu", "differential", "scaled_head"), subnormal_queries),
        excludes=("softcap",),
    ),
    Regime(
        "subnormal-values",
        "v below the smallest normal number: outputs are subnormal, with errors in units of the smallest",
        "extreme",
        dict.fromkeys(ATTENTION_FAMILIES, subnormal_values),
    ),
)
