"""Kinds of cases with which a search of kernels of state spaces and prefix scans begins, and ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SCAN_KINDS"]

_Kind = tuple[Mapping[str, int], str, str, Mapping[str, Any]]
_Kinds = tuple[tuple[_Kind, ...], tuple[_Kind, ...], tuple[_Kind, ...]]

_GIVEN = {"initial_state": True, "return_state": True}
_PACKED = {"cu_seqlens": (17, 0, 33, 20)}
_NORMAL = {"cotangents": "normal"}


def _channels(b: int, h: int, n: int, d: int) -> dict[str, int]:
    return {"B": b, "H": h, "N": n, "D": d}


_SSM = _channels(1, 3, 70, 16)
_SPACE: _Kinds = (
    (
        (_channels(2, 3, 130, 16), "normal", "contiguous", {"skip": True}),
        (_SSM, "normal", "columns", {"complex": True, "skip": True, **_NORMAL}),
        (_SSM, "normal", "contiguous", {"complex": True, **_GIVEN}),
    ),
    (
        (_SSM, "fast-oscillation", "contiguous", {"complex": True, **_NORMAL}),
        (_SSM, "open-gates", "contiguous", {"complex": True, **_NORMAL}),
        (_SSM, "strong-decay", "contiguous", {"complex": True, "cotangents": "ones"}),
        (_SSM, "closed-gates", "contiguous", {"skip": True, **_NORMAL}),
        (_SSM, "slow-decay", "contiguous", {"return_state": True, **_NORMAL}),
        (_SSM, "normal", "contiguous", {**_GIVEN, **_NORMAL}),
        (_SSM, "normal", "contiguous", {"complex": True, **_PACKED, **_GIVEN, **_NORMAL}),
        (_SSM, "normal", "columns", {**_PACKED, **_NORMAL}),
        (_channels(1, 1, 300, 64), "open-gates", "contiguous", {"return_state": True}),
        (_channels(1, 2, 300, 5), "normal", "sliced", {"complex": True, "cotangents": "one-hot"}),
        (_channels(1, 5, 1, 16), "normal", "contiguous", {**_GIVEN, **_NORMAL}),
        (_SSM, "large-values", "contiguous", _NORMAL),
        (_SSM, "future-nonfinite", "contiguous", {"complex": True}),
        (_channels(1, 3, 70, 33), "uniform", "unaligned", {"skip": True, "cotangents": "ones"}),
    ),
    (
        (_channels(1, 1, 2053, 16), "slow-decay", "contiguous", {"complex": True}),
        (_channels(1, 17, 70, 33), "normal", "contiguous", _NORMAL),
        (_channels(9, 5, 33, 16), "normal", "contiguous", {}),
        (_channels(1, 1, 1030, 128), "normal", "contiguous", {}),
    ),
)


def _h3(b: int, h: int, n: int, d: int, e: int, t: int, p: int) -> dict[str, int]:
    return {"B": b, "H": h, "N": n, "D": d, "E": e, "T": t, "P": p}


_HEADS, _SINGLE = _h3(1, 2, 70, 8, 16, 4, 6), _h3(2, 3, 70, 1, 1, 4, 16)
_H3: _Kinds = (
    (
        (_HEADS, "normal", "contiguous", {"complex": True, "skip": True}),
        (_HEADS, "normal", "transposed", {"skip": True, **_NORMAL}),
        (_SINGLE, "normal", "contiguous", {"complex": True, **_NORMAL}),
    ),
    (
        (_HEADS, "open-gates", "contiguous", {"complex": True, "skip": True, **_NORMAL}),
        (_HEADS, "fast-oscillation", "contiguous", {"complex": True, **_NORMAL}),
        (_HEADS, "closed-gates", "contiguous", {"skip": True, "cotangents": "ones"}),
        (_HEADS, "strong-decay", "contiguous", {"complex": True, **_NORMAL}),
        (_h3(1, 1, 3, 4, 4, 7, 2), "normal", "contiguous", {"skip": True, **_NORMAL}),
        (_h3(1, 2, 150, 16, 24, 2, 3), "slow-decay", "contiguous", {"skip": True}),
        (_h3(2, 1, 65, 5, 3, 40, 1), "normal", "sliced", {"cotangents": "one-hot"}),
        (_HEADS, "large-values", "contiguous", {"skip": True, **_NORMAL}),
        (_HEADS, "future-nonfinite", "contiguous", {}),
        (_HEADS, "uniform", "broadcast", {"skip": True, "cotangents": "aligned"}),
    ),
    (
        (_h3(1, 1, 1030, 16, 16, 4, 8), "normal", "contiguous", {"complex": True}),
        (_h3(1, 2, 70, 64, 64, 4, 16), "normal", "contiguous", _NORMAL),
        (_h3(9, 5, 33, 8, 8, 4, 4), "normal", "contiguous", {}),
    ),
)

_MAMBA = _channels(1, 3, 70, 16)
_WHOLE = {"skip": True, "z": True, "delta_bias": True, "delta_softplus": True}
_SELECTIVE: _Kinds = (
    (
        (_channels(2, 5, 130, 16), "normal", "contiguous", _WHOLE),
        (_MAMBA, "normal", "columns", {**_WHOLE, **_NORMAL}),
        (_MAMBA, "normal", "contiguous", {"skip": True, **_GIVEN}),
    ),
    (
        (_channels(1, 5, 70, 16), "uneven-rates", "contiguous", {**_WHOLE, **_GIVEN, **_NORMAL}),
        (_MAMBA, "softplus-tails", "contiguous", {"delta_softplus": True, **_NORMAL}),
        (_MAMBA, "saturated-gates", "contiguous", {"z": True, **_NORMAL}),
        (_MAMBA, "small-steps", "contiguous", {"discretization": "zoh", **_NORMAL}),
        (_MAMBA, "normal", "contiguous", {"discretization": "zoh", **_NORMAL}),
        (_MAMBA, "open-gates", "contiguous", {"discretization": "zoh", **_NORMAL}),
        (_MAMBA, "strong-decay", "contiguous", {"skip": True, **_NORMAL}),
        (_MAMBA, "no-steps", "contiguous", {"delta_bias": True, "cotangents": "ones"}),
        (_MAMBA, "infinite-decay", "contiguous", {"return_state": True, **_NORMAL}),
        (_MAMBA, "normal", "contiguous", {**_GIVEN, **_NORMAL}),
        (_MAMBA, "normal", "contiguous", {"z": True, "skip": True, **_PACKED, **_GIVEN, **_NORMAL}),
        (_MAMBA, "normal", "columns", {"delta_bias": True, "delta_softplus": True, **_PACKED, **_NORMAL}),
        (_channels(1, 2, 300, 5), "slow-decay", "sliced", {"return_state": True, "cotangents": "one-hot"}),
        (_channels(1, 4, 1, 16), "normal", "contiguous", {**_GIVEN, **_NORMAL}),
        (_MAMBA, "large-values", "contiguous", {"z": True, **_NORMAL}),
        (_MAMBA, "future-nonfinite", "contiguous", {"skip": True}),
        (_MAMBA, "uniform", "unaligned", {"delta_softplus": True, "cotangents": "ones"}),
    ),
    (
        (_channels(1, 1, 2053, 16), "slow-decay", "contiguous", {}),
        (_channels(1, 33, 70, 16), "normal", "contiguous", {**_WHOLE, **_NORMAL}),
        (_channels(9, 5, 33, 64), "normal", "contiguous", {}),
    ),
)


def _grouped(b: int, h: int, g: int, n: int, d: int, e: int) -> dict[str, int]:
    return {"B": b, "H": h, "G": g, "N": n, "D": d, "E": e}


_DUAL = _grouped(1, 4, 2, 70, 16, 24)
_SSD: _Kinds = (
    (
        (_grouped(2, 4, 2, 130, 16, 32), "normal", "contiguous", {"skip": True}),
        (_DUAL, "normal", "transposed", {"skip": True, **_NORMAL}),
        (_DUAL, "normal", "contiguous", _GIVEN),
    ),
    (
        (_DUAL, "strong-decay", "contiguous", _NORMAL),
        (_DUAL, "slow-decay", "contiguous", {"return_state": True, **_NORMAL}),
        (_DUAL, "open-gates", "contiguous", _NORMAL),
        (_DUAL, "normal", "contiguous", {"wide_gates": True, "return_state": True, **_NORMAL}),
        (_DUAL, "infinite-decay", "contiguous", {"return_state": True, **_NORMAL}),
        (_grouped(2, 2, 1, 70, 16, 24), "normal", "transposed", {**_GIVEN, **_NORMAL}),
        (_DUAL, "no-steps", "contiguous", {"cotangents": "ones"}),
        (_DUAL, "normal", "columns", {**_PACKED, **_NORMAL}),
        (_DUAL, "normal", "contiguous", {"skip": True, **_PACKED, **_GIVEN, **_NORMAL}),
        (_grouped(1, 3, 1, 300, 64, 64), "slow-decay", "contiguous", {"return_state": True}),
        (_grouped(1, 3, 3, 65, 5, 3), "normal", "sliced", {"cotangents": "one-hot"}),
        (_grouped(1, 2, 1, 1, 32, 32), "normal", "contiguous", {**_GIVEN, **_NORMAL}),
        (_DUAL, "large-values", "contiguous", {"skip": True, **_NORMAL}),
        (_DUAL, "future-nonfinite", "contiguous", {}),
        (_grouped(1, 6, 2, 40, 16, 16), "uniform", "broadcast", {"skip": True, "cotangents": "ones"}),
    ),
    (
        (_grouped(1, 1, 1, 2053, 16, 16), "slow-decay", "contiguous", {}),
        (_grouped(1, 2, 1, 300, 128, 64), "normal", "contiguous", _NORMAL),
        (_grouped(9, 6, 2, 33, 16, 16), "normal", "contiguous", {}),
    ),
)


def _keyed(b: int, h: int, n: int, d: int, e: int) -> dict[str, int]:
    return {"B": b, "H": h, "N": n, "D": d, "E": e}


_PREFIX = _keyed(1, 2, 70, 16, 24)
_PREFIX_SCAN: _Kinds = (
    (
        (_keyed(2, 2, 130, 16, 32), "normal", "contiguous", {}),
        (_PREFIX, "normal", "transposed", _NORMAL),
        (_PREFIX, "normal", "contiguous", _GIVEN),
    ),
    (
        (_PREFIX, "rising-maxima", "contiguous", _NORMAL),
        (_PREFIX, "wide-maxima", "contiguous", _NORMAL),
        (_PREFIX, "falling-maxima", "contiguous", {"cotangents": "ones"}),
        (_PREFIX, "equal-maxima", "contiguous", _NORMAL),
        (_PREFIX, "wide-maxima", "contiguous", _GIVEN),
        (_PREFIX, "normal", "contiguous", {"return_state": True, **_NORMAL}),
        (_PREFIX, "normal", "contiguous", {"initial_state": True, "cotangents": "ones"}),
        (_PREFIX, "neutral-state", "contiguous", {**_GIVEN, **_NORMAL}),
        (_keyed(2, 1, 0, 16, 16), "normal", "contiguous", {**_GIVEN, **_NORMAL}),
        (_keyed(1, 1, 300, 64, 64), "normal", "contiguous", {}),
        (_keyed(3, 2, 65, 5, 3), "normal", "sliced", {"cotangents": "one-hot"}),
        (_keyed(2, 1, 1, 32, 32), "normal", "contiguous", _GIVEN),
        (_PREFIX, "below-sentinel", "contiguous", _NORMAL),
        (_keyed(2, 1, 40, 8, 40), "large-values", "contiguous", _NORMAL),
        (_PREFIX, "future-nonfinite", "contiguous", {}),
        (_PREFIX, "uniform", "broadcast", {"cotangents": "aligned"}),
    ),
    (
        (_keyed(1, 1, 2053, 16, 16), "normal", "contiguous", {}),
        (_keyed(1, 2, 513, 64, 64), "normal", "contiguous", _NORMAL),
        (_keyed(9, 5, 33, 16, 16), "normal", "contiguous", {}),
    ),
)


def _plain(b: int, h: int, n: int) -> dict[str, int]:
    return {"B": b, "H": h, "N": n}


_RWKV = _plain(2, 3, 70)
_RWKV4: _Kinds = (
    (
        (_plain(2, 5, 130), "normal", "contiguous", {}),
        (_RWKV, "normal", "columns", _NORMAL),
        (_RWKV, "normal", "contiguous", _GIVEN),
    ),
    (
        (_RWKV, "strong-decay", "contiguous", _NORMAL),
        (_RWKV, "open-gates", "contiguous", _NORMAL),
        (_RWKV, "wide-maxima", "contiguous", _NORMAL),
        (_RWKV, "rising-maxima", "contiguous", {"cotangents": "ones"}),
        (_RWKV, "slow-decay", "contiguous", {"return_state": True, **_NORMAL}),
        (_RWKV, "normal", "contiguous", {"initial_state": True, "cotangents": "ones"}),
        (_RWKV, "falling-maxima", "contiguous", {**_GIVEN, **_NORMAL}),
        (_RWKV, "neutral-state", "contiguous", {**_GIVEN, **_NORMAL}),
        (_plain(2, 3, 0), "normal", "contiguous", {**_GIVEN, **_NORMAL}),
        (_RWKV, "below-sentinel", "contiguous", _NORMAL),
        (_plain(1, 2, 64), "normal", "contiguous", _GIVEN),
        (_plain(1, 1, 300), "normal", "sliced", {"cotangents": "one-hot"}),
        (_plain(2, 3, 1), "normal", "contiguous", _GIVEN),
        (_RWKV, "large-values", "contiguous", _NORMAL),
        (_RWKV, "future-nonfinite", "contiguous", {}),
        (_RWKV, "uniform", "unaligned", {"cotangents": "ones"}),
    ),
    (
        (_plain(1, 1, 2053), "slow-decay", "contiguous", {}),
        (_plain(1, 65, 70), "normal", "contiguous", _NORMAL),
        (_plain(9, 5, 33), "normal", "contiguous", {}),
    ),
)

SCAN_KINDS: Mapping[str, _Kinds] = {
    "ssm": _SPACE,
    "h3": _H3,
    "selective_scan": _SELECTIVE,
    "ssd": _SSD,
    "prefix_scan": _PREFIX_SCAN,
    "rwkv4": _RWKV4,
}
"""By family, kinds tried in every dtype, in one each, and the larger ones."""
