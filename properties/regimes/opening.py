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

from attnproof.properties.case import SYMBOLS, Case
from attnproof.properties.contract import Supports
from attnproof.properties.regimes import REGIMES
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
    attention = "D" in SYMBOLS[family]
    every, once = (_ATTENTION_EVERY, _ATTENTION_ONCE) if attention else (_ROWS_EVERY, _ROWS_ONCE)
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
    kinds = _ATTENTION_LARGER if "D" in SYMBOLS[family] else _ROWS_LARGER
    return kernel.cases(list(zip(kinds, itertools.cycle(dtypes), strict=False)))


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
            options = {name: value for name, value in wanted.items() if name in self.options}
            lost = wanted and not options
            if sizes is None or lost or regime not in REGIMES:
                continue
            if self.supports.last_stride_one and not unit_last_stride(view, 4 if "D" in sizes else 2):
                view = "contiguous"
            if "return_lse" in self.options:
                options["return_lse"] = True
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
