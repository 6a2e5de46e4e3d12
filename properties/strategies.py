"""Hypothesis strategies for cases.

They shrink towards float32, regime "normal", no options, contiguous memory, seed 0 and small sizes, so that a
minimal failing case reads as a description of the defect.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from attnproof.properties.case import OPTIONS, SYMBOLS, Case, CaseError
from attnproof.properties.contract import Supports
from attnproof.properties.regimes import REGIMES, SIZES
from attnproof.properties.regimes.planning import GROUPS, PAIRED_FEATURES, WIDTHS
from attnproof.properties.signatures import COTANGENTS, FEATURE_MAPS, SIGNATURES
from attnproof.properties.views import VIEWS, unit_last_stride

__all__ = ["cases"]

_PATTERNS = ("1111", "11mn", "b11n", "1h1n", "1hmn", "b1mn", "bhmn", "bh1n", "1hm1")
_TILE_EDGES = tuple(size for name in ("below-tile", "tile", "above-tile", "prime") for size in SIZES[name])


def cases(
    family: str,
    *,
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16"),
    options: Sequence[str] = (),
    regimes: Sequence[str] | None = None,
    supports: Supports = Supports(),  # noqa: B008  (immutable)
    causal_alignment: str = "bottom-right",
    most: int = 200,
) -> SearchStrategy[Case]:
    """Cases of ``family`` that a kernel with these declarations accepts.

    Args:
        family: a family with regimes.
        dtypes: names of dtypes.
        options: the keywords that the kernel supports.
        regimes: names of regimes to draw from, or None for all that are available.
        supports: sizes and strides that the kernel accepts.
        causal_alignment: the kernel's declaration.
        most: the largest M and N.

    Raises:
        CaseError: for a family or a regime that does not exist.
    """
    if family not in SYMBOLS:
        raise CaseError(f"family={family!r}: expected one of {', '.join(SYMBOLS)}")
    unknown = [name for name in regimes or () if name not in REGIMES]
    if unknown:
        raise CaseError(f"regimes={unknown[0]!r}: no such regime; there are {', '.join(REGIMES)}")
    names = [name for name in REGIMES if regimes is None or name in regimes]
    names = [name for name in names if family in REGIMES[name].families and REGIMES[name].available]
    return _case(
        family,
        sorted(dtypes, key=lambda dtype: dtype != "float32"),
        [name for name in OPTIONS[family] if name in options],
        names,
        supports,
        causal_alignment,
        most,
    )


@st.composite
def _case(
    draw: DrawFn,
    family: str,
    dtypes: list[str],
    options: list[str],
    names: list[str],
    supports: Supports,
    causal_alignment: str,
    most: int,
) -> Case:
    dtype = draw(st.sampled_from(dtypes))
    chosen = [name for name in options if draw(st.booleans())]
    usable = [name for name in names if REGIMES[name].declines(family, dtype, chosen) is None]
    if not usable:
        # Every regime asked for needs an option that was not drawn, or is undone by one that was.
        chosen = [o for o in options if any(o in REGIMES[n].needs for n in names)][:1]
        usable = [name for name in names if REGIMES[name].declines(family, dtype, chosen) is None]
    regime = draw(st.sampled_from(usable))
    form = SIGNATURES[family]
    views = [v for v in VIEWS if not supports.last_stride_one or unit_last_stride(v, form.axes)]
    values: dict[str, Any] = dict.fromkeys(chosen, True)
    if form.attention:
        sizes = _attention_sizes(draw, values, supports, most)
    elif family == "easy":
        sizes = _easy_sizes(draw, supports, most)
    elif form.stateful:
        sizes = _state_sizes(draw, form.symbols, values, supports, most)
    else:
        sizes = _row_sizes(draw, supports, most)
    _fill_in(draw, family, values, sizes)
    if "causal" in values and causal_alignment == "top-left":
        values["causal_alignment"] = "top-left"
    view = draw(st.sampled_from(views))
    return Case(family, dtype, sizes, regime, values, view, draw(st.integers(0, 999)))  # type: ignore[arg-type]


def _fill_in(draw: DrawFn, family: str, values: dict[str, Any], sizes: dict[str, int]) -> None:
    """Values of options that are neither flags nor decide sizes."""
    choices: dict[str, SearchStrategy[Any]] = {
        "cotangents": st.sampled_from(COTANGENTS),
        "normalizer": st.just(float(max(sizes["N"], 1))),
        "power": st.just(2),
        "variance": st.just("off"),
        "band": st.integers(0, max(1, sizes["N"])),
    }
    form = SIGNATURES[family]
    if form.stateful:
        choices |= {"causal": st.just("off"), "gate": st.sampled_from(("head", "channel"))}
        choices["discretization"] = st.just("zoh")
    if "feature_map" in form.required:
        maps = (
            FEATURE_MAPS if sizes["D"] <= 16 else tuple(m for m in FEATURE_MAPS if m not in PAIRED_FEATURES)
        )
        values |= {"feature_map": draw(st.sampled_from(maps)), "normalize": draw(st.booleans())}
    if family == "sigmoid":
        choices["bias"] = st.sampled_from((0.0, -2.5, 1.0))
    if "pool" in form.required:
        heads = sizes["H"]
        windows = st.lists(st.sampled_from((1, 2, 3, 4, 7)), min_size=heads, max_size=heads)
        values["pool"] = tuple(draw(windows))
    for name in sorted(choices.keys() & values.keys()):
        values[name] = draw(choices[name])


def _easy_sizes(draw: DrawFn, supports: Supports, most: int) -> dict[str, int]:
    least = int(supports.nonempty)
    sizes = {"B": draw(st.integers(least, 2)), "H": draw(st.integers(1, 3))}
    return {**sizes, "N": draw(_lengths(supports, most)), "E": draw(_widths(supports))}


def _state_sizes(
    draw: DrawFn, symbols: tuple[str, ...], values: dict[str, Any], supports: Supports, most: int
) -> dict[str, int]:
    """Sizes of the family's ``symbols``."""
    least = int(supports.nonempty)
    length = draw(_lengths(supports, most))
    sizes = {"B": draw(st.integers(least, 2)), "H": draw(st.integers(1, 3)), "N": length}
    if "cu_seqlens" in values:
        values["cu_seqlens"], sizes["B"] = draw(_packed(length)), 1
    # A state has D·E entries.
    narrow = st.sampled_from((1, 3, 5, 16, 32)) if supports.head_dims is None else _widths(supports)
    widths = {"D": narrow, "E": narrow, "T": st.integers(1, 5), "P": st.sampled_from((1, 2, 5))}
    if "G" in symbols:
        sizes["G"] = draw(st.sampled_from([g for g in (1, 2, 3) if sizes["H"] % g == 0]))
    return {**sizes, **{symbol: draw(width) for symbol, width in widths.items() if symbol in symbols}}


def _packed(length: int) -> SearchStrategy[tuple[int, ...]]:
    """Lengths that a packed length is cut into; two cuts at one place make a sequence of length zero."""
    cuts = st.lists(st.integers(0, length), max_size=12).map(lambda x: [0, *sorted(x), length])
    return cuts.map(lambda x: tuple(b - a for a, b in itertools.pairwise(x)))


def _row_sizes(draw: DrawFn, supports: Supports, most: int) -> dict[str, int]:
    return {"R": draw(st.integers(int(supports.nonempty), 9)), "N": draw(_lengths(supports, most))}


def _attention_sizes(draw: DrawFn, values: dict[str, Any], supports: Supports, most: int) -> dict[str, int]:
    """Sizes, with ``values`` of the options filled in where they are no flags."""
    least = int(supports.nonempty)
    group = draw(st.sampled_from(GROUPS))
    heads = draw(st.integers(1, 2))
    width = draw(_widths(supports))
    value = draw(st.one_of(st.just(width), _widths(supports)))
    length = draw(_lengths(supports, most))
    batch, rows = draw(st.integers(least, 2)), length
    if "cu_seqlens" in values:
        values["cu_seqlens"] = draw(_packed(length))
        batch = 1
    elif draw(st.booleans()):
        rows = draw(_lengths(Supports(nonempty=supports.nonempty), most))
    side = st.one_of(st.none(), st.integers(0, max(1, length)))
    if "window" in values:
        values["window"] = draw(st.tuples(side, side))
    if "softcap" in values:
        values["softcap"] = draw(st.sampled_from((2.0, 30.0, 0.7, 50.0)))
    if "bias" in values:
        values["bias"] = draw(st.sampled_from(_PATTERNS))  # of sigmoid, replaced by a number afterwards
    return {"B": batch, "H": group * heads, "G": heads, "M": rows, "N": length, "D": width, "E": value}


def _lengths(supports: Supports, most: int) -> SearchStrategy[int]:
    """Small lengths and those beside tiles, one ordered choice: any length shrinks to any smaller one."""
    step, least = supports.multiple_of, int(supports.nonempty)
    small = range(least * step, max(least, min(20, most // step)) * step + 1, step)
    edges = [size for size in _TILE_EDGES if size <= most and size % step == 0]
    return st.sampled_from(sorted({*small, *edges}))


def _widths(supports: Supports) -> SearchStrategy[int]:
    if supports.head_dims:
        return st.sampled_from(sorted(supports.head_dims))
    known = sorted({width for pair in WIDTHS for width in pair} | {2, 3})
    return st.sampled_from([w for w in known if w <= (supports.max_head_dim or w)] or [1])
