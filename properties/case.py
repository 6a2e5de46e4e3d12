"""A case: one call of a kernel, in a line of text from which its inputs come again, bit for bit, anywhere.

    softmax:float16:one-hot:B1,H2,G1,M16,N33,D64,E64:causal,window=3..:transposed:7

names family, dtype, regime, shape, options ("-" for none), view and seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from attnproof.properties.contract import DTYPES
from attnproof.properties.draw import Draw
from attnproof.properties.signatures import COTANGENTS, FEATURE_MAPS, SIGNATURES
from attnproof.properties.views import VIEWS, lay_out

__all__ = [
    "APART",
    "OPTIONS",
    "SYMBOLS",
    "TENSORS",
    "Case",
    "CaseError",
    "Inputs",
    "case_states",
    "make_inputs",
]

SYMBOLS: dict[str, tuple[str, ...]] = {name: form.symbols for name, form in SIGNATURES.items()}
"""By family, the symbols of a case's shape, in the order of its text."""

TENSORS: dict[str, tuple[str, ...]] = {name: tuple(form.tensors) for name, form in SIGNATURES.items()}
"""By family, the positional tensors of the canonical call, in order."""

OPTIONS: dict[str, tuple[str, ...]] = {name: form.options for name, form in SIGNATURES.items()}
"""By family, the options that a case may have, in the order of its text."""

_FLAGS = (
    "causal",
    "sinks",
    "alibi_slopes",
    "beta",
    "return_lse",
    "normalize",
    "initial_state",
    "return_state",
    "complex",
    "skip",
    "z",
    "delta_bias",
    "delta_softplus",
    "wide_gates",
)
# Options of a case that are no keyword of the call.
APART = ("causal_alignment", "cotangents", "gate", "complex", "skip", "wide_gates")
"""Options of a case that decide about tensors of the call, and are no keyword of it."""

# Parameters that are pairs of a real and an imaginary part where the case is complex.
_PAIRS = ("a", "b", "c", "state")
# Options that are "off" where they are given, and then False in the call.
_SWITCHED_OFF = ("variance",)
_EPS = 2.0**-10
_NORMALISERS = (("linear", "z"), ("prefix_scan", "u"), ("rwkv4", "b"))
_BIAS = re.compile("[b1][h1][m1][n1]")


class CaseError(ValueError):
    """A case that the contract has no call for, or a text that describes no case."""


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """One call of a kernel; ``shape`` and ``options`` may be given as mappings.

    Attributes:
        family: a family that :data:`SYMBOLS` has.
        dtype: name of the inputs' dtype.
        shape: (symbol, size) for each symbol of the family; H is a multiple of G.
        regime: name of a regime of inputs.
        options: (keyword, value) for each keyword passed: ``causal`` True, ``causal_alignment`` "top-left"
            (not a keyword, but decides which keys are seen), ``window`` (left, right) with None for no limit,
            ``softcap`` > 0, ``bias`` the pattern by which it broadcasts such as "bhmn" or "b11n" (of sigmoid
            a float), ``sinks``, ``alibi_slopes``, ``beta`` True, ``cu_seqlens`` the lengths of packed
            sequences, ``return_lse`` True, ``normalizer`` > 0, ``power`` 2, ``variance`` "off", ``pool`` a
            window for each head, ``band`` ≥ 0, ``feature_map`` one of
            :data:`attnproof.properties.signatures.FEATURE_MAPS`, ``normalize`` True, ``causal`` of linear
            attention "off", ``gate`` the shape of g, "head" (B, H, N) or "channel" (B, H, N, D),
            ``initial_state`` and ``return_state`` True, ``complex`` True where the parameters of a state
            space are pairs of a real and an imaginary part, ``skip`` True where its skip terms are handed
            over, ``z``, ``delta_bias`` and ``delta_softplus`` True, ``discretization`` "zoh", ``wide_gates``
            True where gates are float32 beside half-precision inputs, ``cotangents`` the kind of those that
            gradients are asked for (one of :data:`attnproof.properties.signatures.COTANGENTS`). Options that
            are False or None are left out.
        view: a memory layout of :data:`attnproof.properties.views.VIEWS`.
        seed: ≥ 0.

    Raises:
        CaseError: where a field is none of that.
    """

    family: str
    dtype: str
    shape: tuple[tuple[str, int], ...]
    regime: str = "normal"
    options: tuple[tuple[str, Any], ...] = ()
    view: str = "contiguous"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("family", self.family, SYMBOLS),
            ("dtype", self.dtype, DTYPES),
            ("view", self.view, VIEWS),
        ):
            if value not in known:
                raise CaseError(f"{name}={value!r}: expected one of {', '.join(known)}")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.regime):
            raise CaseError(f"regime={self.regime!r}: expected lower-case words joined by hyphens")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise CaseError(f"seed={self.seed!r}: expected an integer ≥ 0")
        object.__setattr__(self, "shape", _canonical_shape(self.family, self.shape))
        object.__setattr__(self, "options", _canonical_options(self.family, self.options, dict(self.shape)))

    def __getitem__(self, symbol: str) -> int:
        """The size of ``symbol``."""
        return dict(self.shape)[symbol]

    @property
    def sizes(self) -> dict[str, int]:
        """Symbol to size."""
        return dict(self.shape)

    def option(self, name: str, default: Any = None) -> Any:
        """The plain value of an option, or ``default``."""
        return dict(self.options).get(name, default)

    @property
    def all_sizes(self) -> dict[str, int]:
        """Symbol to size, with those that follow from options: F of features, S of sequences."""
        lengths = self.option("cu_seqlens")
        found = (
            {**self.sizes, "S": self["B"] if lengths is None else len(lengths)} if "B" in self.sizes else {}
        )
        if "D" in self.sizes:
            width = self["D"]
            features = {"taylor": 1 + width + width * width, "squared": width * width}
            found["F"] = features.get(self.option("feature_map"), width)
        return {**self.sizes, **found}

    def axes_of(self, name: str) -> tuple[str, ...] | None:
        """The axes of a positional tensor; None for one that the case does not hand over."""
        form = SIGNATURES[self.family]
        gate = self.option("gate")
        if name in form.optional and self.option(form.optional[name]) is None:
            return None
        if name == "g" and gate is not None:
            return ("B", "H", "N", "D") if gate == "channel" else ("B", "H", "N")
        axes = form.keywords[name] if name in form.keywords else form.tensors[name]
        return (*axes, "2") if name in _PAIRS and self.option("complex") else axes

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a positional tensor: float32 at least of gates where the case has ``wide_gates``."""
        wide = self.option("wide_gates") and name in SIGNATURES[self.family].wide
        return torch.promote_types(self.torch_dtype, torch.float32) if wide else self.torch_dtype

    @property
    def id(self) -> str:
        """The case as one line of text without spaces; :meth:`parse` is its inverse."""
        shape = ",".join(f"{symbol}{size}" for symbol, size in self.shape)
        options = ",".join(_option_text(name, value) for name, value in self.options) or "-"
        return ":".join((self.family, self.dtype, self.regime, shape, options, self.view, str(self.seed)))

    def __str__(self) -> str:
        return self.id

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that ``text`` (an :attr:`id`) describes.

        Raises:
            CaseError: naming the part of the text that is wrong and what belongs there.
        """
        parts = text.strip().split(":")
        if len(parts) != 7:
            raise CaseError(
                f"case {text!r}: found {len(parts)} parts, "
                "expected FAMILY:DTYPE:REGIME:SHAPE:OPTIONS:VIEW:SEED"
            )
        family, dtype, regime, shape_text, options_text, view, seed = parts
        shape = []
        for item in filter(None, shape_text.split(",")):
            found = re.fullmatch(r"([A-Z])([0-9]+)", item)
            if not found:
                raise CaseError(f"case {text!r}: shape item {item!r}: write it as in N64")
            shape.append((found[1], int(found[2])))
        if not seed.isdecimal():
            raise CaseError(f"case {text!r}: seed {seed!r}: expected an integer ≥ 0")
        options = [] if options_text == "-" else [_parse_option(item) for item in options_text.split(",")]
        return cls(family, dtype, tuple(shape), regime, tuple(options), view, int(seed))


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The arguments of one canonical call.

    Attributes:
        tensors: positional tensors by name, in call order, in the layout (B, H, M, D).
        options: keywords of the call: ``scale`` where the family has one, and those that the case has.
        cotangents: by output, in its dtype and layout (B, H, M, …); empty where no gradient is asked for.
    """

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    cotangents: dict[str, torch.Tensor] = field(default_factory=dict)


def make_inputs(case: Case) -> Inputs:
    """The inputs of ``case``: the same values on every platform, in fresh memory laid out as its view says.

    Values are made in float64, rounded to float32 and then to the dtype, and depend only on regime, shape and
    seed (on options where the regime needs them; in view "broadcast" all heads of k and v are one).

    Raises:
        CaseError: for a regime that does not exist, or has no inputs for this family, dtype or options.
    """
    # Regimes are imported here because the planner beside them is written in terms of cases.
    from attnproof.properties.regimes import REGIMES

    regime = REGIMES.get(case.regime)
    if regime is None:
        raise CaseError(f"regime={case.regime!r}: no such regime; there are {', '.join(REGIMES)}")
    objection = regime.declines(case.family, case.dtype, [name for name, _ in case.options])
    if objection:
        raise CaseError(f"case {case.id}: regime {regime.name!r}: {objection}")
    form = SIGNATURES[case.family]
    doubled = any(axis == "2D" for axes in form.tensors.values() for axis in axes)
    sizes = {**case.sizes, "D": 2 * case["D"]} if doubled else case.sizes
    draw = Draw(
        family=case.family,
        dtype=case.dtype,
        regime=case.regime,
        sizes=sizes,
        options=dict(case.options),
        seed=case.seed,
        shared=case.view == "broadcast",
    )
    values = regime.build(draw)
    tensors = {}
    for name in form.tensors:
        axes = case.axes_of(name)
        if axes is None:
            continue
        shape = form.shape(axes, case.sizes)
        if name in form.parameters and name not in values:
            centre, deviation = form.parameters[name]
            values[name] = centre + deviation * draw.normal(name, *shape)
        full = np.broadcast_to(values.pop(name), shape)
        tensors[name] = lay_out(_stored(full, case.dtype_of(name)), case.view, name)
    return Inputs(tensors, _keywords(case, draw, values), _cotangents(case, draw, tensors))


def _keywords(case: Case, draw: Draw, values: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the call; what the regime left open is drawn here."""
    keywords: dict[str, Any] = {}
    required = SIGNATURES[case.family].required
    if "scale" in required:
        keywords["scale"] = float(values.get("scale", draw.scale))
    if "eps" in required:
        keywords["eps"] = float(values.get("eps", _EPS))
    if "pool" in required:
        keywords["pool"] = (1,) * case["H"]
    if "feature_map" in required:
        keywords["feature_map"] = case.option("feature_map", FEATURE_MAPS[0])
        keywords["normalize"] = bool(case.option("normalize"))
    for name, value in case.options:
        if name == "initial_state":
            keywords[name] = _initial_states(case, draw, values)
        elif name in ("sinks", "beta") or (name == "bias" and isinstance(value, str)):
            keywords[name] = _parameter(name, case, draw, values)
        elif name in SIGNATURES[case.family].keywords:
            keywords[name] = _keyword_tensor(name, case, draw, values)
        elif name == "alibi_slopes":
            # 2^(−8h/H) for head h = 1 … H (Press et al. 2022).
            powers = np.arange(1, case["H"] + 1) * (-8.0 / case["H"])
            keywords[name] = torch.from_numpy(np.exp2(powers)).to(torch.float32)
        elif name == "cu_seqlens":
            keywords[name] = torch.tensor([0, *np.cumsum(value)], dtype=torch.int32)
        elif value == "off":
            keywords[name] = False
        elif name not in APART:
            keywords[name] = value
    return keywords


def _parameter(name: str, case: Case, draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    """A tensor that is passed by keyword, in the case's dtype and view."""
    shape = draw.bias_shape if name == "bias" else (draw["H"],)
    if name in values:
        drawn = values[name]
    else:
        drawn = draw.normal(name, *shape) * (0.5 if name == "beta" else 1.0) + (
            1.0 if name == "beta" else 0.0
        )
    return lay_out(_stored(np.broadcast_to(drawn, shape), case.torch_dtype), case.view, name)


def _keyword_tensor(name: str, case: Case, draw: Draw, values: dict[str, Any]) -> torch.Tensor:
    """A tensor with axes of its own that is passed by keyword; normal where the regime leaves it open."""
    form = SIGNATURES[case.family]
    shape = form.shape(form.keywords[name], case.sizes)
    drawn = values[name] if name in values else draw.normal(name, *shape)
    return lay_out(_stored(np.broadcast_to(drawn, shape), case.torch_dtype), case.view, name)


def _initial_states(case: Case, draw: Draw, values: dict[str, Any]) -> Any:
    """The state handed to the call, float32 or, with such inputs, float64; a tuple if it has parts."""
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    made = []
    for name, axes in case_states(case).items():
        shape = SIGNATURES[case.family].shape(axes, case.all_sizes)
        drawn = draw.normal(f"initial {name}", *shape)
        # A normaliser is a sum of features or of exponentials, which are positive.
        drawn = np.abs(drawn) + 1.0 if (case.family, name) in _NORMALISERS else drawn
        full = np.broadcast_to(values.get(f"initial_{name}", drawn), shape)
        made.append(lay_out(_stored(full, wide), case.view, f"initial_{name}"))
    return made[0] if len(made) == 1 else tuple(made)


def case_states(case: Case) -> dict[str, tuple[str, ...]]:
    """The states of a call with their axes: linear attention has a second one only with a normaliser."""
    states = SIGNATURES[case.family].states
    if case.family == "linear" and not case.option("normalize"):
        return {name: axes for name, axes in states.items() if name != "z"}
    if case.option("complex"):
        return {name: (*axes, "2") for name, axes in states.items()}
    return dict(states)


def _cotangents(case: Case, draw: Draw, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A cotangent for each output, of the kind that the case names."""
    kind = case.option("cotangents")
    if kind is None:
        return {}
    form = SIGNATURES[case.family]
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    made = {}
    carried = case_states(case) if case.option("return_state") else {}
    states = {name: axes for name, axes in carried.items() if name not in form.levels}
    for name, axes in {**form.outputs, **states}.items():
        if name == "lse" and not case.option("return_lse"):
            continue
        shape = form.shape(axes, case.all_sizes)
        dtype = wide if name == "lse" or name in states else case.torch_dtype
        if kind == "ones":
            made[name] = torch.ones((), dtype=dtype).expand(shape)
            continue
        values = draw.normal(f"d{name}", *shape)
        if kind == "one-hot":
            rows = draw.integers(f"d{name} rows", 0, 3, *shape[:-1], 1) == 0
            column = draw.integers(f"d{name} column", 0, max(shape[-1], 1), *shape[:-1], 1)
            values = np.where(rows & (np.arange(shape[-1]) == column), values, 0.0)
        elif kind == "aligned" and len(axes) == 4 and "v" in tensors and tensors["v"].shape[2]:
            v = tensors["v"].double().nan_to_num(0.0, 0.0, 0.0).numpy()
            mean = np.repeat(v.mean(axis=2, keepdims=True), shape[1] // v.shape[1], axis=1)
            size = np.abs(mean).max(initial=0.0)
            values = (mean / size if size else 1.0) * np.abs(draw.normal("do", *shape[:-1], 1)) + 0.0 * values
        made[name] = lay_out(_stored(np.ascontiguousarray(values), dtype), case.view, f"d{name}")
    return made


def _stored(values: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    wide = torch.from_numpy(np.array(values, dtype=np.float64))
    return wide if dtype == torch.float64 else wide.to(torch.float32).to(dtype)


def _canonical_shape(
    family: str, shape: Mapping[str, int] | Iterable[tuple[str, int]]
) -> tuple[tuple[str, int], ...]:
    pairs = list(shape.items() if isinstance(shape, Mapping) else shape)
    sizes = dict(pairs)
    symbols = SYMBOLS[family]
    if set(sizes) != set(symbols) or len(pairs) != len(symbols):
        raise CaseError(f"shape {sizes}: family {family!r} has the sizes {', '.join(symbols)}, each once")
    for symbol, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise CaseError(f"shape {symbol}={size!r}: expected an integer ≥ 0")
    if SIGNATURES[family].stateful:
        low = [symbol for symbol in symbols if symbol not in "BN" and sizes[symbol] == 0]
        if low or sizes["H"] % sizes.get("G", 1):
            raise CaseError(
                f"shape {sizes}: all but N and B are positive, and H is a multiple of G where there is one"
            )
    elif "G" in sizes:
        low = [symbol for symbol in ("H", "G", "D", "E") if sizes[symbol] == 0]
        if low or sizes["H"] % sizes["G"]:
            raise CaseError(
                f"shape {sizes}: H, G, D and E are positive and H is a multiple of G; M, N, B may be 0"
            )
    return tuple((symbol, sizes[symbol]) for symbol in symbols)


def _canonical_options(
    family: str, options: Mapping[str, Any] | Iterable[tuple[str, Any]], sizes: Mapping[str, int]
) -> tuple[tuple[str, Any], ...]:
    pairs = list(options.items() if isinstance(options, Mapping) else options)
    given = {name: value for name, value in pairs if value is not None and value is not False}
    known = OPTIONS[family]
    for name, value in given.items():
        if name not in known:
            raise CaseError(f"option {name!r}: family {family!r} has {', '.join(known) or 'no options'}")
        given[name] = _checked_option(family, name, value, sizes)
    if given.get("causal_alignment") == "bottom-right":
        del given["causal_alignment"]
    return tuple((name, given[name]) for name in known if given.get(name) is not None)


def _checked_option(family: str, name: str, value: Any, sizes: Mapping[str, int]) -> Any:
    """``value`` in canonical form (tuples for lists, float for int)."""
    expected = ""
    if isinstance(value, list):
        value = tuple(value)
    if name == "causal" and SIGNATURES[family].stateful:
        expected = "" if value == "off" else "'off' (or to be left out: it is causal)"
    elif name in _FLAGS:
        expected = "" if value is True else "True"
    elif name == "feature_map":
        expected = "" if value in FEATURE_MAPS else f"one of {', '.join(FEATURE_MAPS)}"
    elif name == "discretization":
        value = None if value == "euler" else value
        expected = "" if value in (None, "zoh") else "'zoh', or 'euler', which is the default"
    elif name == "gate":
        expected = "" if value in ("head", "channel") else "'head' or 'channel'"
    elif name == "causal_alignment":
        expected = "" if value in ("top-left", "bottom-right") else "'top-left' or 'bottom-right'"
    elif name == "cotangents":
        expected = "" if value in COTANGENTS else f"one of {', '.join(COTANGENTS)}"
    elif name in _SWITCHED_OFF:
        expected = "" if value == "off" else "'off'"
    elif name == "power":
        expected = "" if value == 2 else "2"
    elif name == "band":
        expected = "" if _is_size(value) else "an integer ≥ 0"
    elif name == "pool":
        fits = isinstance(value, tuple) and len(value) == sizes["H"]
        good = fits and all(_is_size(x) and x > 0 for x in value)
        expected = "" if good else f"one integer ≥ 1 for each of the {sizes['H']} heads"
    elif name == "bias" and family == "sigmoid":
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        value, expected = (float(value), "") if good else (value, "a finite number")
    elif name in ("softcap", "normalizer"):
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
        value, expected = (float(value), "") if good else (value, "a positive finite number")
    elif name == "bias":
        good = isinstance(value, str) and _BIAS.fullmatch(value) is not None
        expected = "" if good else "how it broadcasts to (B, H, M, N), such as 'bhmn', '11mn', 'b11n'"
    elif name == "window":
        good = isinstance(value, tuple) and len(value) == 2 and all(x is None or _is_size(x) for x in value)
        expected = "" if good else "(left, right), each an integer ≥ 0 or None"
    elif name == "cu_seqlens":
        good = isinstance(value, tuple) and value != () and all(_is_size(x) for x in value)
        fits = good and sizes["B"] == 1 and sizes.get("M", sizes["N"]) == sizes["N"] == sum(value)
        expected = "" if fits else f"lengths that add up to M = N, with B = 1 (the shape is {dict(sizes)})"
    if expected:
        raise CaseError(f"option {name}={value!r}: expected {expected}")
    return value


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _option_text(name: str, value: Any) -> str:
    if name in _FLAGS and value is True:
        return name
    if name == "window":
        left, right = ("" if side is None else str(side) for side in value)
        return f"{name}={left}..{right}"
    if name in ("cu_seqlens", "pool"):
        return f"{name}={'+'.join(map(str, value))}"
    return f"{name}={value}"


def _parse_option(item: str) -> tuple[str, Any]:
    name, equals, text = item.partition("=")
    try:
        if name in _FLAGS and not equals:
            return name, True
        if name == "window":
            left, right = text.split("..")
            return name, (int(left) if left else None, int(right) if right else None)
        if name in ("cu_seqlens", "pool"):
            return name, tuple(int(length) for length in text.split("+"))
        if name in ("band", "power"):
            return name, int(text)
        if name in ("softcap", "normalizer") or (name == "bias" and not _BIAS.fullmatch(text)):
            return name, float(text)
    except ValueError:
        raise CaseError(
            f"option {item!r}: cannot read its value; write it as in 'window=3..', 'softcap=30.0'"
        ) from None
    if not equals or (name in _FLAGS and item != "causal=off"):
        raise CaseError(f"option {item!r}: expected a flag ({', '.join(_FLAGS)}) or NAME=VALUE")
    return name, text
