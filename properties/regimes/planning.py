"""The cases that a run goes through by default, and an endless supply of further ones.

Regimes, dtypes, options, views and sizes cannot all be crossed. A plan holds every regime in every dtype,
every option alone, every two options together, every option with every view and dtype, and every size class;
what else a case has is drawn at random.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar, overload

from attnproof.properties.case import OPTIONS, Case
from attnproof.properties.contract import Supports
from attnproof.properties.regimes import REGIMES
from attnproof.properties.regimes.regime import Regime
from attnproof.properties.signatures import COTANGENTS, FEATURE_MAPS, SIGNATURES
from attnproof.properties.views import VIEWS, unit_last_stride

__all__ = ["SIZES", "WIDTHS", "plan"]

SIZES: dict[str, tuple[int, ...]] = {
    "empty": (0,),
    "one": (1,),
    "two": (2,),
    "below-tile": (15, 31, 63, 127),
    "tile": (16, 32, 64, 128),
    "above-tile": (17, 33, 65, 129),
    "prime": (7, 53, 101, 197),
    "long": (512, 1000),
}
"""Lengths (M, N) by class; kernels are most often wrong at and beside multiples of a tile."""

GROUPS = (1, 2, 3, 7)
"""Query heads per key/value head; 3 and 7 are no powers of two (bug B18)."""

WIDTHS = (
    (64, 64),
    (16, 16),
    (128, 128),
    (40, 40),
    (64, 32),
    (5, 1),
    (72, 72),
    (1, 5),
    (32, 32),
    (256, 64),
    (64, 256),
    (192, 128),
)
"""(D, E) in the order in which they are tried."""

STATE_WIDTHS = ((16, 16), (64, 64), (32, 64), (5, 3), (64, 32), (16, 40), (128, 128), (1, 5))
"""(D, E) of families with a state, whose work grows with their product."""

_POOLS = (2, 1, 3, 4, 7)
# Taps of H3's short convolution, and poles of its diagonal state space.
_OWN_SIZES = {"T": (4, 1, 3, 40), "P": (16, 4, 1, 7)}
# Features of pairs of columns: D² of them.
PAIRED_FEATURES = ("taylor", "squared")
_WIDEST_PAIRED = 16
RELATIONS = ("square", "fewer-queries", "square", "more-queries", "decode")

# A regime whose cases are vacuous, and sizes that leave no choice, are kept below this share of a plan: a
# verdict needs 80 % of cases that could have shown a defect, and some others turn out vacuous only when they
# are computed.
VACUOUS_SHARE = 0.12
_DEGENERATE_SHARE = 1 / 12
# Of the cases that the options' turns leave without gradients, how many get them all the same.
GRADIENT_SHARE = 0.3
# B·H·M·N·(D + E): a few milliseconds of float64. However narrow heads are, each score has a cost of its own.
_MOST_WORK = 2**24
_LEAST_WIDTH = 48
_CANDIDATES = 24

# Each class in proportion to how often kernels are wrong there; long ones are slow.
_COMMON = ("tile", "above-tile", "below-tile", "prime")
_CLASSES = (*_COMMON, "two", *_COMMON, *_COMMON, *_COMMON, "long")

T = TypeVar("T")
Requirement = tuple[str, ...]


@overload
def plan(
    family: str,
    *,
    dtypes: Sequence[str],
    options: Sequence[str] = ...,
    supports: Supports = ...,
    budget: int,
    seed: int = ...,
    causal_alignment: str = ...,
    thorough: Literal[False] = ...,
) -> list[Case]: ...
@overload
def plan(
    family: str,
    *,
    dtypes: Sequence[str],
    options: Sequence[str] = ...,
    supports: Supports = ...,
    budget: int,
    seed: int = ...,
    causal_alignment: str = ...,
    thorough: Literal[True],
) -> Iterator[Case]: ...
@overload
def plan(
    family: str,
    *,
    dtypes: Sequence[str],
    options: Sequence[str] = ...,
    supports: Supports = ...,
    budget: int,
    seed: int = ...,
    causal_alignment: str = ...,
    thorough: bool,
) -> list[Case] | Iterator[Case]: ...
def plan(
    family: str,
    *,
    dtypes: Sequence[str],
    options: Sequence[str] = (),
    supports: Supports = Supports(),  # noqa: B008  (immutable)
    budget: int,
    seed: int = 0,
    causal_alignment: str = "bottom-right",
    thorough: bool = False,
) -> list[Case] | Iterator[Case]:
    """Cases for a kernel of ``family``: degenerate sizes, then every regime, then what is left to cover.

    Args:
        family: a family with regimes.
        dtypes: names of dtypes, of which each regime is tried in all that it has values for.
        options: the keywords that the kernel supports; any other name is ignored.
        supports: sizes and strides that the kernel accepts.
        budget: number of cases (about 150 hold all that a softmax kernel with all options in three dtypes
            needs); a smaller plan is the beginning of a larger one's coverage, not of its list.
        seed: other seeds give other values and other random parts.
        causal_alignment: the kernel's declaration, which decides what causal cases mean.
        thorough: after the plan, an endless stream of random and larger cases, as an iterator.

    Raises:
        ValueError: for a family without regimes.
    """
    regimes = [r for r in REGIMES.values() if family in r.families and r.available]
    if not regimes:
        raise ValueError(f"family={family!r}: no regime of inputs is defined for it")
    known = [name for name in OPTIONS[family] if name in options]
    planner = _Planner(family, list(dtypes), known, supports, seed, causal_alignment, regimes)
    cases = planner.default(budget)
    return itertools.chain(cases, planner.endless()) if thorough else cases


class _Planner:
    """The state of one plan: what is still to be covered, and how often each value was used."""

    def __init__(
        self,
        family: str,
        dtypes: list[str],
        options: list[str],
        supports: Supports,
        seed: int,
        causal_alignment: str,
        regimes: list[Regime],
    ) -> None:
        self.family, self.dtypes, self.options, self.supports = family, dtypes, options, supports
        self.seed, self.causal_alignment, self.regimes = seed, causal_alignment, regimes
        self.random = random.Random(f"plan {seed}")
        self.views = [v for v in VIEWS if not supports.last_stride_one or unit_last_stride(v, self._axes)]
        self.made = 0
        self.turns: dict[str, int] = {}
        self.open: set[Requirement] = self._requirements()

    @property
    def _axes(self) -> int:
        return SIGNATURES[self.family].axes

    def _requirements(self) -> set[Requirement]:
        options = self.options
        found: set[Requirement] = {("alone", option) for option in options}
        found |= {tuple(sorted(pair)) for pair in itertools.combinations(options, 2)}
        found |= {(option, part) for option in options for part in (*self.views, *self.dtypes)}
        found |= {(view, dtype) for view in self.views for dtype in self.dtypes}
        return found

    def default(self, budget: int) -> list[Case]:
        """The plan of ``budget`` cases."""
        cases = self._degenerate()[: max(2, int(budget * _DEGENERATE_SHARE))]
        rounds = range(len(self.dtypes))
        jobs = [
            (regime, self.dtypes[(index + turn) % len(self.dtypes)])
            for turn in rounds
            for index, regime in enumerate(self.regimes)
        ]
        jobs = [(r, d) for r, d in jobs if d in r.dtypes and r.served(self.family, self.options)]
        vacuous = len(cases)
        waiting: list[tuple[Regime, str]] = []
        substance = itertools.cycle([r for r in self.regimes if not r.vacuous and r.served(self.family, ())])
        turn = itertools.cycle(self.dtypes)
        while len(cases) < budget:
            due = waiting and vacuous + 1 <= VACUOUS_SHARE * (len(cases) + 1)
            if due:
                regime, dtype = waiting.pop(0)
            elif jobs:
                regime, dtype = jobs.pop(0)
                if regime.vacuous:
                    waiting.append((regime, dtype))
                    continue
            else:
                regime, dtype = next(substance), next(turn)
                if dtype not in regime.dtypes:
                    continue
            vacuous += regime.vacuous
            cases.append(self._case(regime, dtype))
        return cases[:budget]

    def endless(self) -> Iterator[Case]:
        """Random cases without end, up to four times the work of the plan's."""
        regimes = [r for r in self.regimes if r.served(self.family, self.options)]
        while True:
            regime = self._pick(regimes)
            usable = [d for d in self.dtypes if d in regime.dtypes]
            if usable and (not regime.vacuous or self.random.random() < VACUOUS_SHARE):
                yield self._case(regime, self._pick(usable), larger=True)

    def _case(self, regime: Regime, dtype: str, *, larger: bool = False) -> Case:
        chosen, view = self._choose(regime, dtype)
        if (
            "cotangents" in self.options
            and "cotangents" not in chosen
            and self.random.random() < GRADIENT_SHARE
        ):
            chosen = (*chosen, "cotangents")
        self.open -= _covered(chosen, view, dtype)
        sizes = self._sizes(regime, chosen, larger)
        return self._make(dtype, sizes, regime.name, self._values(chosen, sizes), view)

    def _make(
        self,
        dtype: str,
        sizes: dict[str, int],
        regime: str = "normal",
        options: Any = (),
        view: str = "contiguous",
    ) -> Case:
        self.made += 1
        return Case(self.family, dtype, sizes, regime, options, view, self.seed * 100_000 + self.made)  # type: ignore[arg-type]

    def _choose(self, regime: Regime, dtype: str) -> tuple[tuple[str, ...], str]:
        """Options and view that cover most of what is open, from random ones and those that it asks for."""
        allowed = [o for o in self.options if o not in regime.excludes]
        needed = [o for o in allowed if o in regime.needs]
        candidates = []
        for wanted in [
            *sorted(self.open)[:: max(1, len(self.open) // _CANDIDATES)],
            *[()] * (_CANDIDATES // 2),
        ]:
            parts = [o for o in wanted if o in allowed] or self._subset(allowed)
            if needed and not set(parts) & set(needed):
                parts.append(self._pick(needed))
            view = next((part for part in wanted if part in self.views), None) or self._pick(self.views)
            candidates.append((tuple(sorted(set(parts))), view))

        def gain(candidate: tuple[tuple[str, ...], str]) -> float:
            crowd = max(0, len(candidate[0]) - 2)
            return len(_covered(*candidate, dtype) & self.open) - 0.5 * crowd + 0.25 * self.random.random()

        return max(candidates, key=gain)

    def _subset(self, allowed: list[str]) -> list[str]:
        """None, one, two or three of the options."""
        shuffled = sorted(allowed, key=lambda _: self.random.random())
        return shuffled[: int(4 * self.random.random())]

    def _values(self, chosen: tuple[str, ...], sizes: dict[str, int]) -> dict[str, Any]:
        """A value for each chosen option, in turn."""
        length = sizes.get("N", 0)
        windows = ((3, None), (length // 4 + 1, 0), (2, 5), (None, 1), (0, 2), (length, length))
        third = length // 3
        packings = ((third, 0, length - third), (1, third, length - 1 - third) if length else (0,), (length,))
        patterns = ("bhmn", "b11n", "11mn", "1hmn", "b1mn", "1h1n", "bh1n", "11m1")
        values: dict[str, Callable[[], Any]] = {
            "window": lambda: self._turn("window", windows),
            "softcap": lambda: self._turn("softcap", (2.0, 30.0, 0.7, 50.0)),
            "bias": lambda: self._turn("bias", (-2.5, 1.0, 0.0) if self.family == "sigmoid" else patterns),
            "cu_seqlens": lambda: self._turn("cu_seqlens", packings),
            "normalizer": lambda: float(max(length, 1)),
            "power": lambda: 2,
            "variance": lambda: "off",
            "band": lambda: self._turn("band", (length // 4, 0, 17, length)),
            "cotangents": lambda: self._turn("cotangents", COTANGENTS),
            "pool": lambda: self._pools(sizes["H"]),
            "feature_map": lambda: self._feature_map(sizes),
            "normalize": lambda: self._turn("normalize", (True, True, None)),
            "gate": lambda: self._turn("gate", ("head", "channel")),
            "discretization": lambda: "zoh",
        }
        form = SIGNATURES[self.family]
        if form.stateful:
            values["causal"] = lambda: "off"
        required = [name for name in ("pool", "feature_map", "normalize") if name in form.required]
        names = dict.fromkeys((*chosen, *required))
        result: dict[str, Any] = {name: values[name]() if name in values else True for name in names}
        if self.causal_alignment == "top-left" and "causal" in chosen:
            result["causal_alignment"] = "top-left"
        return result

    def _pools(self, heads: int) -> tuple[int, ...]:
        """A window for each head: some that divide a length, some that leave a ragged tail."""
        first = self._turn("pool", range(len(_POOLS)))
        return tuple(_POOLS[(first + head) % len(_POOLS)] for head in range(heads))

    def _feature_map(self, sizes: dict[str, int]) -> str:
        """The next map, of those that make features of pairs only where D is small."""
        narrow = sizes["D"] <= _WIDEST_PAIRED
        maps = FEATURE_MAPS if narrow else tuple(m for m in FEATURE_MAPS if m not in PAIRED_FEATURES)
        return self._turn(f"feature map {narrow}", maps)

    def _sizes(self, regime: Regime, chosen: tuple[str, ...], larger: bool) -> dict[str, int]:
        name = self._turn("class", _CLASSES)
        length = self._rounded(self._turn(name, SIZES[name]) * (self._pick((1, 1, 2, 3)) if larger else 1))
        work = _MOST_WORK * (4 if larger else 1)
        if self.family == "easy":
            batch, heads = self._turn("batch", (2, 1, 3)), self._turn("heads", (1, 2, 3))
            value = self._width(regime)[1]
            while batch * heads * length * length * value > work and batch > 1:
                batch -= 1
            length = min(length, self._rounded(math.isqrt(work // (heads * value))))
            return {"B": batch, "H": heads, "N": length, "E": value}
        if SIGNATURES[self.family].stateful:
            return self._state_sizes(regime, chosen, length, work)
        if not SIGNATURES[self.family].attention:
            rows = self._turn("rows", (5, 1, 16, 33, 8))
            return {"R": max(1, min(rows, work // (64 * max(1, length)))), "N": length}
        width, value = self._width(regime)
        group = self._turn("group", (1, 2, 3, 1, 7, 2))
        batch = 1 if "cu_seqlens" in chosen or group > 2 else self._turn("batch", (2, 1, 3))
        heads = group * (1 if group == 7 else self._turn("kv heads", (1, 2)))
        relation = "square" if "cu_seqlens" in chosen else self._turn("relation", RELATIONS)
        rows = {
            "square": length,
            "fewer-queries": length // 3 + 1,
            "more-queries": length + length // 2 + 1,
            "decode": 1,
        }[relation]
        columns = max(width + value, _LEAST_WIDTH)
        while batch * heads * rows * length * columns > work and (batch > 1 or heads > group):
            batch, heads = (batch - 1, heads) if batch > 1 else (batch, heads - group)
        if batch * heads * rows * length * columns > work:
            if "cu_seqlens" in chosen:
                rows = length = self._rounded(math.isqrt(work // (heads * columns)))
            else:
                rows = max(1, work // (batch * heads * length * columns))
        return {"B": batch, "H": heads, "G": heads // group, "M": rows, "N": length, "D": width, "E": value}

    def _state_sizes(self, regime: Regime, chosen: tuple[str, ...], length: int, work: int) -> dict[str, int]:
        """Sizes with B·H·N·D·E and B·H·N²·D below ``work``."""
        symbols = SIGNATURES[self.family].symbols
        width, value = self._turn("state width", STATE_WIDTHS) if self._unlimited else self._width(regime)
        if "E" not in symbols:
            value = 1
        batch = 1 if "cu_seqlens" in chosen else self._turn("batch", (2, 1, 3))
        heads = self._turn("heads", (1, 2, 3))

        def too_much() -> bool:
            return batch * heads * length * max(width * value, length * width) > work

        while too_much() and (batch > 1 or heads > 1):
            batch, heads = (batch - 1, heads) if batch > 1 else (batch, heads - 1)
        while too_much():
            length = self._rounded(length // 2)
        return self._complete({"B": batch, "H": heads, "N": length, "D": width, "E": value})

    def _complete(self, sizes: dict[str, int]) -> dict[str, int]:
        """The sizes that the family has, with those that are its own."""
        symbols = SIGNATURES[self.family].symbols
        own = {
            symbol: self._turn(symbol, values) for symbol, values in _OWN_SIZES.items() if symbol in symbols
        }
        if "G" in symbols:
            groups = [g for g in range(1, sizes["H"] + 1) if sizes["H"] % g == 0]
            own["G"] = self._turn(f"groups of {sizes['H']}", groups)
        return {symbol: {**sizes, **own}[symbol] for symbol in symbols}

    @property
    def _unlimited(self) -> bool:
        return self.supports.head_dims is None and self.supports.max_head_dim is None

    def _width(self, regime: Regime) -> tuple[int, int]:
        if regime.regime_class == "real" and self._accepts(32):
            return 32, 32
        widths = [pair for pair in WIDTHS if all(map(self._accepts, pair))]
        if self.supports.head_dims:
            widths = [(d, d) for d in self.supports.head_dims if self._accepts(d)]
        return self._turn("width", widths or [(self.supports.max_head_dim or 1,) * 2])

    def _accepts(self, width: int) -> bool:
        most, only = self.supports.max_head_dim, self.supports.head_dims
        return (most is None or width <= most) and (only is None or width in only)

    def _rounded(self, length: int) -> int:
        multiple = self.supports.multiple_of
        return -(-length // multiple) * multiple

    def _degenerate(self) -> list[Case]:
        """Sizes 0 and 1, smallest first, and rows that see no key; each in the next dtype."""
        one = self._rounded(1)
        if self.family == "easy":
            value = self._width(REGIMES["normal"])[1]
            few = ((1, 1, one), (1, 2, 0), (0, 2, 2), (2, 3, one), (1, 1, 2))
            shapes = [{"B": b, "H": h, "N": n, "E": value} for b, h, n in few]
        elif SIGNATURES[self.family].stateful:
            width, value = (16, 32) if self._unlimited else self._width(REGIMES["normal"])
            rest = {"D": width, "E": value}
            few = ((1, 1, one), (1, 2, 0), (0, 2, 2), (2, 3, one), (1, 1, 2))
            shapes = [self._complete({"B": b, "H": h, "N": n, **rest}) for b, h, n in few]
        elif not SIGNATURES[self.family].attention:
            shapes = [{"R": r, "N": n} for r, n in ((1, one), (2, 0), (0, 3), (3, one), (1, 2))]
        else:
            width, value = self._width(REGIMES["normal"])
            rest = {"H": 2, "G": 1, "D": width, "E": value}
            lengths = ((1, 1, one), (1, 3, 0), (1, 0, 2), (0, 2, 2), (2, 3, one), (1, 1, 2))
            shapes = [{"B": b, **rest, "M": m, "N": n} for b, m, n in lengths]
        shapes = [{**shape, "N": self._rounded(shape["N"])} for shape in shapes]
        if self.supports.nonempty:
            shapes = [shape for shape in shapes if all(shape.values())]
        cases = []
        for number, shape in enumerate(shapes):
            chosen = ("cotangents",) if "cotangents" in self.options and number % 2 == 0 else ()
            options = self._values(chosen, shape)
            cases.append(self._make(self._turn("first dtype", self.dtypes), shape, options=options))
        if "initial_state" in self.options:
            wide = self._complete({"B": 1, "H": 2, "N": self._rounded(70), **rest})
            cases.insert(
                1, self._make(self._turn("first dtype", self.dtypes), wide, options=self._carried(wide))
            )
        if "causal" in self.options and SIGNATURES[self.family].attention:
            wide = {"B": 1, **rest, "M": self._rounded(8) + 5, "N": self._rounded(8)}
            options = self._values(("causal",), wide)
            cases.insert(1, self._make(self._turn("first dtype", self.dtypes), wide, options=options))
        return cases

    def _carried(self, sizes: dict[str, int]) -> dict[str, Any]:
        """States in and out of packed sequences, one of them empty, with gates in float32 and gradients."""
        packed = (1, sizes["N"] - 30, 0, 29)
        values = {"initial_state": True, "cu_seqlens": packed, "return_state": True, "wide_gates": True}
        values |= {"gate": "channel", "cotangents": "normal"}
        required = self._values((), sizes)
        return {**required, **{name: value for name, value in values.items() if name in self.options}}

    def _turn(self, name: str, values: Sequence[T]) -> T:
        """The next of ``values``, in turn, for the purpose ``name``."""
        turn = self.turns.get(name, 0)
        self.turns[name] = turn + 1
        return values[turn % len(values)]

    def _pick(self, values: Sequence[T]) -> T:
        return values[int(self.random.random() * len(values))]


def _covered(chosen: tuple[str, ...], view: str, dtype: str) -> set[Requirement]:
    """The requirements that a case with these options fulfils."""
    found: set[Requirement] = {tuple(sorted(pair)) for pair in itertools.combinations(chosen, 2)}
    found |= {(option, part) for option in chosen for part in (view, dtype)} | {(view, dtype)}
    return found | ({("alone", chosen[0])} if len(chosen) == 1 else set())
