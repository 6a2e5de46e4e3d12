"""The first and the last planned cases of a search for a kernel's defects.

A plan covers regimes, dtypes and pairs of options; a search wants the likeliest failures first. The opening
holds lengths beside and far beyond a tile in every dtype, one shape again with other values (kernels that
remember), each option alone, both relations of M to N, memory layouts, and regimes of extreme scores. The
larger cases are of sizes above which a kernel may have stopped being tested: many keys, queries, heads or
batch entries, wide heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnproof.properties.case import APART, Case
from attnproof.properties.contract import Supports
from attnproof.properties.regimes import REGIMES
from attnproof.properties.regimes.opening_scans import SCAN_KINDS
from attnproof.properties.signatures import COTANGENTS, FEATURE_MAPS, SIGNATURES
from attnproof.properties.views import unit_last_stride

__all__ = ["larger", "opening"]

# One kind of case: sizes, regime, memory layout and options; tried in one dtype after the other, or in all.
_Kind = tuple[Mapping[str, int], str, str, Mapping[str, Any]]

_EXTREME = ("exp-overflow", "offset-1e3", "large-logits", "exp-underflow", "below-sentinel")
_MASKED = ("masked", "unseen-nonfinite", "finite-sentinel")


def _attention_sizes(b: int, h: int, g: int, m: int, n: int, d: int, e: int) -> dict[str, int]:
    return {"B": b, "H": h, "G": g, "M": m, "N": n, "D": d, "E": e}


_PLAIN = _attention_sizes(2, 4, 2, 65, 129, 64, 64)
_LONG = _attention_sizes(1, 1, 1, 4, 2053, 64, 64)
_POOLS = (2, 1, 3, 4, 7)
_MANY = (9, 1, 0, 17, 3, 0, 5, 16, 2, 11, 0, 8, 18)
_SMALL = _attention_sizes(1, 2, 1, 33, 70, 32, 32)
_PACKED = _attention_sizes(1, 2, 1, 80, 80, 32, 32)

# In every dtype.
_ATTENTION_EVERY: tuple[_Kind, ...] = (
    (_PLAIN, "normal", "contiguous", {}),
    (_attention_sizes(1, 2, 1, 65, 129, 64, 64), "normal", "transposed", {"causal": True}),
    (_LONG, "normal", "contiguous", {}),
    (_attention_sizes(1, 1, 1, 2, 3, 16, 16), "identical-huge", "contiguous", {}),
)
_ALL_OPTIONS: dict[str, Any] = {
    "causal": True,
    "window": (40, 3),
    "softcap": 2.5,
    "bias": "bhmn",
    "sinks": True,
}

# In one dtype each, in turn.
_ATTENTION_ONCE: tuple[_Kind, ...] = (
    (_PLAIN, "normal", "contiguous", {}),
    (_attention_sizes(1, 7, 1, 70, 33, 40, 72), "normal", "sliced", {"causal": True}),
    (_SMALL, "normal", "contiguous", {"window": (3, None)}),
    (_SMALL, "normal", "contiguous", {"bias": "bhmn"}),
    (_SMALL, "normal", "contiguous", {"softcap": 2.0}),
    (_SMALL, "normal", "contiguous", {"sinks": True}),
    (_PACKED, "normal", "contiguous", {"cu_seqlens": (17, 0, 33, 30)}),
    (_attention_sizes(2, 6, 2, 20, 50, 64, 32), "normal", "columns", {}),
    *((_SMALL, regime, "contiguous", {}) for regime in _EXTREME),
    *((_SMALL, regime, "contiguous", {"causal": True, "bias": "bhmn"}) for regime in _MASKED),
    (_SMALL, "normal", "contiguous", {"window": (2, 5), "causal": True}),
    (_PACKED, "normal", "contiguous", {"cu_seqlens": (40, 40), "causal": True}),
    (_attention_sizes(1, 1, 1, 3, 1, 16, 16), "normal", "contiguous", {}),
    (_attention_sizes(2, 2, 2, 17, 40, 72, 40), "normal", "broadcast", {"bias": "b11n"}),
    (_attention_sizes(1, 2, 1, 40, 40, 64, 64), "one-sign-values", "unaligned", {"sinks": True}),
    (_attention_sizes(1, 2, 2, 1, 300, 128, 128), "normal", "contiguous", {}),
    (_attention_sizes(1, 2, 1, 1, 70, 32, 32), "normal", "contiguous", {"causal": True}),
    (_attention_sizes(1, 3, 1, 5, 90, 16, 48), "normal", "contiguous", {"window": (20, 0)}),
    (_attention_sizes(1, 2, 1, 64, 192, 64, 64), "ascending", "contiguous", {}),
    (_attention_sizes(1, 2, 1, 64, 192, 64, 64), "one-hot", "contiguous", {"causal": True}),
    # All options together, and all but one.
    (_SMALL, "normal", "contiguous", _ALL_OPTIONS),
    *(
        (_SMALL, "normal", "contiguous", {n: value for n, value in _ALL_OPTIONS.items() if n != left})
        for left in _ALL_OPTIONS
    ),
    (_attention_sizes(1, 2, 1, 90, 90, 32, 32), "normal", "contiguous", {"cu_seqlens": _MANY}),
    (_attention_sizes(1, 2, 1, 300, 60, 32, 32), "normal", "contiguous", {"window": (20, 4)}),
)  # fmt: skip
_ATTENTION_LARGER: tuple[_Kind, ...] = (
    (_attention_sizes(1, 1, 1, 3, 4099, 32, 32), "normal", "contiguous", {}),
    (_attention_sizes(1, 1, 1, 1030, 257, 16, 16), "normal", "contiguous", {"causal": True}),
    (_attention_sizes(1, 24, 4, 9, 40, 16, 16), "normal", "contiguous", {"causal": True}),
    (_attention_sizes(9, 2, 1, 5, 33, 32, 32), "normal", "contiguous", {"bias": "bhmn"}),
    (_attention_sizes(1, 2, 1, 17, 40, 256, 256), "normal", "contiguous", {}),
    (_attention_sizes(1, 1, 1, 520, 520, 64, 64), "normal", "contiguous", {"window": (100, 0)}),
    (_attention_sizes(1, 1, 1, 2, 8200, 16, 16), "normal", "contiguous", {}),
    (_attention_sizes(33, 3, 3, 2, 5, 8, 8), "normal", "contiguous", {}),
    (_attention_sizes(1, 40, 2, 3, 40, 16, 16), "normal", "contiguous", {}),
    (_attention_sizes(1, 2, 1, 1, 4099, 64, 64), "normal", "contiguous", {"causal": True}),
    (_attention_sizes(1, 2, 1, 9, 70, 192, 128), "normal", "contiguous", {}),
    (_attention_sizes(1, 1, 1, 2, 2048, 32, 32), "normal", "contiguous", {}),
    (_attention_sizes(1, 1, 1, 2, 3500, 32, 32), "normal", "contiguous", {}),
    (_attention_sizes(1, 2, 2, 9, 70, 96, 96), "normal", "contiguous", {"causal": True}),
    (_attention_sizes(1, 1, 1, 3, 4096, 16, 16), "normal", "contiguous", {}),
    (_attention_sizes(1, 1, 1, 2, 1536, 64, 64), "large-logits", "contiguous", {}),
)


_EASY_EVERY: tuple[_Kind, ...] = (
    ({"B": 2, "H": 2, "N": 65, "E": 64}, "normal", "contiguous", {"cotangents": "normal"}),
    ({"B": 1, "H": 2, "N": 129, "E": 16}, "normal", "transposed", {}),
    ({"B": 1, "H": 1, "N": 300, "E": 40}, "normal", "contiguous", {"band": 70, "cotangents": "ones"}),
)
_EASY_ONCE: tuple[_Kind, ...] = (
    ({"B": 3, "H": 2, "N": 33, "E": 72}, "normal", "sliced", {"cotangents": "one-hot"}),
    ({"B": 2, "H": 3, "N": 40, "E": 32}, "normal", "contiguous", {"band": 0}),
    ({"B": 2, "H": 3, "N": 40, "E": 32}, "one-hot", "columns", {"band": 17, "cotangents": "normal"}),
    ({"B": 2, "H": 1, "N": 70, "E": 32}, "cancelling-values", "contiguous", {"cotangents": "aligned"}),
    ({"B": 1, "H": 2, "N": 70, "E": 1}, "one-sign-values", "broadcast", {}),
    ({"B": 1, "H": 2, "N": 64, "E": 128}, "wide-values", "unaligned", {"cotangents": "normal"}),
    ({"B": 2, "H": 2, "N": 65, "E": 64}, "large-values", "contiguous", {}),
)
_EASY_LARGER: tuple[_Kind, ...] = (
    ({"B": 1, "H": 1, "N": 1030, "E": 16}, "normal", "contiguous", {"band": 100}),
    ({"B": 9, "H": 5, "N": 40, "E": 32}, "normal", "contiguous", {}),
    ({"B": 1, "H": 2, "N": 513, "E": 64}, "normal", "contiguous", {}),
)


def _state_sizes(b: int, h: int, n: int, d: int, e: int) -> dict[str, int]:
    return {"B": b, "H": h, "N": n, "D": d, "E": e}


_SEQUENCE = _state_sizes(1, 2, 70, 16, 40)
_STATE_EVERY: tuple[_Kind, ...] = (
    (_state_sizes(2, 2, 130, 16, 32), "normal", "contiguous", {}),
    (_SEQUENCE, "normal", "transposed", {"cotangents": "normal"}),
    (_SEQUENCE, "normal", "contiguous", {"initial_state": True, "return_state": True}),
)
_STATE_ONCE: tuple[_Kind, ...] = (
    (_SEQUENCE, "strong-decay", "contiguous", {"gate": "channel", "cotangents": "normal"}),
    (_SEQUENCE, "alternating-gates", "contiguous", {"gate": "channel", "cotangents": "normal"}),
    (_SEQUENCE, "correlated-keys", "contiguous", {"cotangents": "normal"}),
    (_SEQUENCE, "extreme-gates", "contiguous", {"cotangents": "normal"}),
    (_SEQUENCE, "small-input-gates", "contiguous", {"cotangents": "ones"}),
    (_SEQUENCE, "neutral-state", "contiguous", {"initial_state": True, "cotangents": "normal"}),
    (_SEQUENCE, "exact-recall", "contiguous", {}),
    (
        _state_sizes(2, 1, 0, 16, 16),
        "normal",
        "contiguous",
        {"initial_state": True, "return_state": True, "cotangents": "normal"},
    ),
    # Packed: what decays must belong to its own sequence.
    (
        _SEQUENCE,
        "normal",
        "contiguous",
        {"gate": "channel", "cu_seqlens": (17, 0, 33, 20), "return_state": True, "cotangents": "normal"},
    ),
    (
        _SEQUENCE,
        "normal",
        "contiguous",
        {
            "gate": "head",
            "initial_state": True,
            "return_state": True,
            "cu_seqlens": (1, 40, 0, 29),
            "cotangents": "normal",
        },
    ),
    (_SEQUENCE, "normal", "contiguous", {"gate": "head", "cotangents": "normal"}),
    (
        _SEQUENCE,
        "normal",
        "contiguous",
        {"gate": "channel", "wide_gates": True, "return_state": True, "cotangents": "normal"},
    ),
    (_SEQUENCE, "normal", "contiguous", {"gate": "channel", "return_state": True, "cotangents": "normal"}),
    *((_SEQUENCE, "normal", "contiguous", {"feature_map": m, "normalize": True}) for m in FEATURE_MAPS[:4]),
    (
        _state_sizes(1, 2, 70, 24, 16),
        "normal",
        "contiguous",
        {
            "feature_map": "elu1",
            "normalize": True,
            "initial_state": True,
            "return_state": True,
            "cu_seqlens": (1, 40, 0, 29),
            "cotangents": "normal",
        },
    ),
    (_state_sizes(1, 2, 6, 5, 16), "small-keys", "contiguous", {"feature_map": "relu", "normalize": True}),
    (_SEQUENCE, "negative-keys", "contiguous", {"feature_map": "elu1", "normalize": True}),
    (_SEQUENCE, "exact-kinks", "contiguous", {"feature_map": "relu", "cotangents": "ones"}),
    (_state_sizes(1, 2, 40, 5, 16), "normal", "contiguous", {"feature_map": "taylor", "normalize": True}),
    (_state_sizes(1, 2, 40, 5, 16), "normal", "contiguous", {"feature_map": "squared", "cotangents": "ones"}),
    (_SEQUENCE, "normal", "contiguous", {"causal": "off", "cotangents": "normal"}),
    (_SEQUENCE, "normal", "sliced", {"feature_map": "relu", "cotangents": "one-hot"}),
    (_SEQUENCE, "normal", "contiguous", {"cu_seqlens": (17, 0, 33, 20)}),
    (_SEQUENCE, "mixed-gates", "contiguous", {"gate": "head", "initial_state": True, "cotangents": "ones"}),
    (_state_sizes(1, 1, 300, 64, 64), "slow-decay", "contiguous", {"gate": "head", "return_state": True}),
    (_SEQUENCE, "closed-gates", "columns", {"gate": "channel", "cotangents": "normal"}),
    (_SEQUENCE, "mixed-gates", "contiguous", {"initial_state": True, "return_state": True}),
    (_SEQUENCE, "open-gates", "contiguous", {"gate": "head"}),
    (_SEQUENCE, "growing-state", "contiguous", {}),
    (_SEQUENCE, "no-writing", "contiguous", {"initial_state": True}),
    (_SEQUENCE, "future-nonfinite", "contiguous", {}),
    (_state_sizes(1, 2, 33, 64, 72), "one-sign-values", "unaligned", {"cotangents": "aligned"}),
    (_state_sizes(3, 1, 65, 32, 16), "uniform", "broadcast", {"return_state": True}),
    (_state_sizes(1, 2, 1, 32, 32), "normal", "contiguous", {"initial_state": True, "return_state": True}),
    (_SEQUENCE, "large-values", "contiguous", {"cotangents": "normal"}),
    (_SEQUENCE, "vanishing-normaliser", "contiguous", {"feature_map": "identity", "normalize": True}),
)
_STATE_LARGER: tuple[_Kind, ...] = (
    (_state_sizes(1, 1, 1030, 16, 16), "normal", "contiguous", {}),
    (_state_sizes(1, 2, 70, 128, 128), "normal", "contiguous", {"cotangents": "normal"}),
    (_state_sizes(9, 5, 33, 16, 16), "normal", "contiguous", {}),
    (_state_sizes(1, 1, 2053, 32, 32), "slow-decay", "contiguous", {}),
    (_state_sizes(1, 2, 513, 64, 64), "normal", "contiguous", {"cotangents": "normal"}),
)

# Asked of families that have these options or gradients; in one dtype each, in turn.
_PARTICULAR: tuple[_Kind, ...] = (
    (_SMALL, "off-centre", "contiguous", {"cotangents": "ones"}),
    (_SMALL, "off-centre", "contiguous", {"cotangents": "normal"}),
    (_PLAIN, "normal", "contiguous", {"cotangents": "normal"}),
    (_SMALL, "one-hot", "contiguous", {"cotangents": "normal"}),
    (_SMALL, "large-logits", "contiguous", {"cotangents": "normal"}),
    (_SMALL, "saturated", "contiguous", {"cotangents": "normal"}),
    (_SMALL, "exact-kinks", "contiguous", {"cotangents": "ones"}),
    (_SMALL, "exact-kinks", "contiguous", {"power": 2, "cotangents": "normal"}),
    (_SMALL, "normal", "contiguous", {"power": 2}),
    (_SMALL, "normal", "contiguous", {"normalizer": 70.0, "cotangents": "normal"}),
    (_SMALL, "far-keys", "contiguous", {}),
    (_SMALL, "far-keys", "contiguous", {"cotangents": "normal"}),
    (_SMALL, "constant-columns", "contiguous", {"cotangents": "normal"}),
    (_attention_sizes(2, 4, 2, 33, 40, 32, 32), "normal", "contiguous", {"beta": True, "cotangents": "ones"}),
    (_SMALL, "negative-scale", "contiguous", {"cotangents": "normal"}),
    (_SMALL, "normal", "contiguous", {"beta": True, "variance": "off", "cotangents": "ones"}),
    (_SMALL, "normal", "contiguous", {"alibi_slopes": True, "cotangents": "normal"}),
    (_SMALL, "softmax-one", "contiguous", {"sinks": True, "cotangents": "normal"}),
    (_SMALL, "prefix-lm", "contiguous", {"bias": "11mn", "cotangents": "normal"}),
    (_SMALL, "documents", "contiguous", {"bias": "bhmn", "cotangents": "normal"}),
    (_SMALL, "normal", "transposed", {"causal": True, "cotangents": "one-hot"}),
    (_SMALL, "normal", "contiguous", {"softcap": 2.0, "cotangents": "normal"}),
    (_SMALL, "normal", "contiguous", {"bias": "1h1n", "cotangents": "normal"}),
    (
        _attention_sizes(2, 2, 1, 20, 40, 32, 32),
        "normal",
        "contiguous",
        {"bias": "1hmn", "cotangents": "normal"},
    ),
    (_attention_sizes(1, 8, 1, 300, 33, 64, 64), "normal", "contiguous", {"cotangents": "normal"}),
    (_SMALL, "normal", "contiguous", {"sinks": True, "cotangents": "aligned"}),
    (_SMALL, "normal", "contiguous", {"window": (20, 3), "cotangents": "normal"}),
    (_SMALL, "normal", "contiguous", {"bias": -2.5, "cotangents": "normal"}),
    (
        _attention_sizes(1, 2, 2, 200, 60, 32, 32),
        "normal",
        "contiguous",
        {"causal": True, "cotangents": "normal"},
    ),
    (_attention_sizes(1, 2, 1, 129, 2053, 16, 16), "normal", "contiguous", {"cotangents": "normal"}),
    (_attention_sizes(1, 2, 1, 33, 70, 192, 128), "normal", "contiguous", {"cotangents": "normal"}),
)


def _row_sizes(r: int, n: int) -> dict[str, int]:
    return {"R": r, "N": n}


_ROWS_EVERY: tuple[_Kind, ...] = (
    (_row_sizes(5, 129), "normal", "contiguous", {}),
    (_row_sizes(3, 2053), "normal", "contiguous", {}),
)
_ROWS_ONCE: tuple[_Kind, ...] = (
    (_row_sizes(5, 129), "normal", "contiguous", {}),
    (_row_sizes(33, 7), "normal", "transposed", {}),
    (_row_sizes(4, 65), "normal", "sliced", {}),
    *((_row_sizes(5, 70), regime, "contiguous", {}) for regime in (*_EXTREME, *_MASKED)),
    (_row_sizes(9, 1), "normal", "contiguous", {}),
    (_row_sizes(4, 300), "normal", "broadcast", {}),
)
_ROWS_LARGER: tuple[_Kind, ...] = (
    (_row_sizes(2, 20_000), "normal", "contiguous", {}),
    (_row_sizes(1030, 33), "normal", "contiguous", {}),
)


def opening(
    family: str,
    *,
    dtypes: Sequence[str],
    options: Sequence[str],
    supports: Supports,
    causal_alignment: str = "bottom-right",
    seed: int = 0,
) -> list[Case]:
    """The first cases of a search, the likeliest to fail first; arguments as for ``plan``."""
    top_left = causal_alignment == "top-left"
    kernel = _Kernel(family, dtypes, options, supports, top_left, 100_000 * seed + 50_000)
    every, once, _ = _kinds(family)
    kinds = [(kind, dtype) for kind in every for dtype in dtypes]
    kinds += list(zip(once, itertools.cycle(dtypes), strict=False))
    return kernel.cases(kinds)


def larger(
    family: str,
    *,
    dtypes: Sequence[str],
    options: Sequence[str],
    supports: Supports,
    causal_alignment: str = "bottom-right",
    seed: int = 0,
) -> list[Case]:
    """Sizes beyond those of a plan, one dimension at a time; arguments as for ``plan``."""
    top_left = causal_alignment == "top-left"
    kernel = _Kernel(family, dtypes, options, supports, top_left, 100_000 * seed + 60_000)
    kinds = _kinds(family)[2]
    return kernel.cases(list(zip(kinds, itertools.cycle(dtypes), strict=False)))


def _kinds(family: str) -> tuple[tuple[_Kind, ...], tuple[_Kind, ...], tuple[_Kind, ...]]:
    """Kinds tried in every dtype, in one each, and the larger ones."""
    if family == "easy":
        return _EASY_EVERY, _EASY_ONCE, _EASY_LARGER
    if family in SCAN_KINDS:
        return SCAN_KINDS[family]
    if SIGNATURES[family].stateful:
        return _STATE_EVERY, _STATE_ONCE, _STATE_LARGER
    if not SIGNATURES[family].attention:
        return _ROWS_EVERY, _ROWS_ONCE, _ROWS_LARGER
    # What a family has that others lack comes early, beside what all have.
    alternating = itertools.chain.from_iterable(itertools.zip_longest(_PARTICULAR, _ATTENTION_ONCE))
    return _ATTENTION_EVERY, tuple(kind for kind in alternating if kind is not None), _ATTENTION_LARGER


@dataclass(frozen=True)
class _Kernel:
    """What cases must respect, and the first seed."""

    family: str
    dtypes: Sequence[str]
    options: Sequence[str]
    supports: Supports
    top_left: bool
    first_seed: int

    def cases(self, kinds: Sequence[tuple[_Kind, str]]) -> list[Case]:
        """The cases nearest to these kinds that the kernel accepts, without those that it has none for."""
        return list(self._cases(kinds))

    def _cases(self, kinds: Sequence[tuple[_Kind, str]]) -> Iterator[Case]:
        for number, ((asked, regime, view, wanted), dtype) in enumerate(kinds):
            sizes = self._sizes(asked)
            allowed = {*self.options, *SIGNATURES[self.family].required}
            options = {name: value for name, value in wanted.items() if name in allowed}
            plain = {name for name in wanted if name not in APART}
            lost = (set(wanted) - {"gate"} and not options) or (plain and not plain & set(options))
            if sizes is None or lost or regime not in REGIMES:
                continue
            if self.supports.last_stride_one and not unit_last_stride(view, SIGNATURES[self.family].axes):
                view = "contiguous"
            if "return_lse" in self.options:
                options["return_lse"] = True
            if "cotangents" in self.options and "cotangents" not in wanted and number % 2:
                options["cotangents"] = COTANGENTS[number // 2 % len(COTANGENTS)]
            if "pool" in SIGNATURES[self.family].required:
                options["pool"] = tuple(_POOLS[(number + head) % len(_POOLS)] for head in range(sizes["H"]))
            if "bias" in options and isinstance(options["bias"], str) is (self.family == "sigmoid"):
                continue  # sigmoid's bias is a number, the others' a tensor
            if self.top_left and "causal" in options:
                options["causal_alignment"] = "top-left"
            if "cu_seqlens" in options and sum(options["cu_seqlens"]) != sizes["N"]:
                continue
            if not REGIMES[regime].available or REGIMES[regime].declines(self.family, dtype, options):
                continue
            yield Case(self.family, dtype, sizes, regime, options, view, self.first_seed + number)  # type: ignore[arg-type]

    def _sizes(self, asked: Mapping[str, int]) -> dict[str, int] | None:
        supports, sizes = self.supports, dict(asked)
        sizes["N"] = -(-sizes["N"] // supports.multiple_of) * supports.multiple_of
        for symbol in {"D", "E"} & set(sizes):
            if supports.head_dims:
                wanted = sizes["D"]
                sizes[symbol] = min(supports.head_dims, key=lambda known: abs(known - wanted))
            if supports.max_head_dim and sizes[symbol] > supports.max_head_dim:
                return None
        return sizes
