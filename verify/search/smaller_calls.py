"""How a call is made smaller or plainer: fewer options, rows and keys, another layout, rounder values.

Functions here make candidates; whether one still fails is for a probe to say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from attnproof.properties.case import APART, Case, Inputs, case_states
from attnproof.properties.contract import Supports
from attnproof.properties.regimes.planning import PAIRED_FEATURES
from attnproof.properties.signatures import FEATURE_MAPS, SIGNATURES
from attnproof.properties.views import lay_out, unit_last_stride

__all__ = [
    "RANK",
    "ROUNDINGS",
    "assembled",
    "extents",
    "kept",
    "numbers_of",
    "recast",
    "resized",
    "supported",
    "tensors_of",
    "with_option",
]

_BY_KEYWORD = {
    "bias": ("B", "H", "M", "N"),
    "sinks": ("H",),
    "beta": ("H",),
    "alibi_slopes": ("H",),
}
_FULL_PRECISION = ("alibi_slopes", "dlse")
# Keywords that are numbers, and every call is given.
_NUMBERS = ("scale", "eps")
RANK = "H/G"
"""The axis of query heads that share one key/value head."""


def tensors_of(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Every floating tensor of a call by name: positional, passed by keyword, cotangents as "do"."""
    keywords = (*_BY_KEYWORD, *SIGNATURES[case.family].keywords)
    named = {name: inputs.options.get(name) for name in keywords}
    cotangents = {f"d{name}": tensor for name, tensor in inputs.cotangents.items()}
    given = {name: t for name, t in named.items() if isinstance(t, torch.Tensor)}
    return {**inputs.tensors, **given, **_initial_states(case, inputs), **cotangents}


def _initial_states(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The tensors "initial_" + state that the call is handed."""
    states = inputs.options.get("initial_state")
    if states is None:
        return {}
    held = states if isinstance(states, tuple) else (states,)
    return {f"initial_{name}": state for name, state in zip(case_states(case), held, strict=True)}


def numbers_of(inputs: Inputs) -> dict[str, float]:
    """The numbers that every call of the family is given, such as ``scale``."""
    return {name: inputs.options[name] for name in _NUMBERS if name in inputs.options}


def assembled(case: Case, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> Inputs:
    """The inputs of ``case`` with these values, in its dtype and memory layout.

    Args:
        case: decides which options and cotangents the call has; their tensors are taken from ``tensors``.
        tensors: by name as :func:`tensors_of` gives them, of the shapes of ``case``; values are rounded to
            its dtype.
        numbers: as :func:`numbers_of` gives them.
    """
    form = SIGNATURES[case.family]
    wide = {*_FULL_PRECISION, *(f"{kind}{name}" for name in form.states for kind in ("initial_", "d"))}
    laid = {
        name: lay_out(tensor if name in wide else tensor.to(case.dtype_of(name)), case.view, name)
        for name, tensor in tensors.items()
    }
    options: dict[str, Any] = dict(numbers)
    if "pool" in form.required:
        options["pool"] = (1,) * case["H"]
    if "feature_map" in form.required:
        options |= {"feature_map": FEATURE_MAPS[0], "normalize": False}
    states = case_states(case)
    for name, value in case.options:
        if (name in _BY_KEYWORD or name in form.keywords) and name in laid:
            options[name] = laid[name]
        elif name == "cu_seqlens":
            options[name] = torch.tensor([0, *itertools.accumulate(value)], dtype=torch.int32)
        elif name == "initial_state":
            held = tuple(laid[f"initial_{state}"] for state in states)
            options[name] = held if len(held) > 1 else held[0]
        elif value == "off":
            options[name] = False
        elif name not in APART:
            options[name] = value
    asked = case.option("cotangents") is not None
    returned = {"lse": "return_lse", **dict.fromkeys(states, "return_state")}
    kept = [
        name
        for name in (*form.outputs, *states)
        if asked and f"d{name}" in laid and (name not in returned or case.option(returned[name]))
    ]
    cotangents = {name: laid[f"d{name}"] for name in kept}
    given = [name for name in form.tensors if case.axes_of(name) is not None]
    return Inputs({name: laid[name] for name in given}, options, cotangents)


def recast(case: Case, inputs: Inputs) -> Inputs:
    """``inputs`` under a case of the same shape with fewer options, another layout, dtype or window."""
    return assembled(case, tensors_of(case, inputs), numbers_of(inputs))


def with_option(case: Case, name: str, value: Any = None) -> Case:
    """``case`` with one option changed, or left out where ``value`` is None."""
    changed = {**dict(case.options), name: value}
    if name == "causal" and value is None:
        changed["causal_alignment"] = None
    return replace(case, options=tuple(changed.items()))


def resized(case: Case, **sizes: int) -> Case:
    """``case`` with other sizes; packed lengths are cut from the end to add up to N."""
    shape = {**case.sizes, **sizes}
    lengths = case.option("cu_seqlens")
    if lengths is not None:
        ends = [min(end, shape["N"]) for end in itertools.accumulate(lengths)]
        lengths = tuple(b - a for a, b in itertools.pairwise([0, *ends]))
        shape["N"] = sum(lengths)
        if "M" in shape:
            shape["M"] = shape["N"]
    changed = {"cu_seqlens": lengths}
    if (pools := case.option("pool")) is not None:
        changed["pool"] = tuple(itertools.islice(itertools.cycle(pools), shape["H"]))
    options = tuple((n, changed.get(n, value)) for n, value in case.options)
    return replace(case, shape=tuple(shape.items()), options=options)


def supported(case: Case, supports: Supports) -> bool:
    """Whether a kernel with these declarations accepts the sizes and strides of ``case``."""
    sizes = case.sizes
    widths = [sizes[symbol] for symbol in ("D", "E") if symbol in sizes]
    if supports.head_dims is not None and not set(widths) <= set(supports.head_dims):
        return False
    if supports.max_head_dim is not None and max(widths, default=0) > supports.max_head_dim:
        return False
    if supports.nonempty and not all(sizes.values()):
        return False
    if supports.last_stride_one and not unit_last_stride(case.view, SIGNATURES[case.family].axes):
        return False
    return sizes["N"] % supports.multiple_of == 0


def extents(case: Case) -> dict[str, int]:
    """The axes along which a call can be cut, with their sizes.

    Query heads are counted within their group, and a packed call has one axis for queries and keys.
    """
    sizes = case.sizes
    if case.option("feature_map") in PAIRED_FEATURES:
        # A state holds a row for each pair of columns, which goes with both.
        return {axis: size for axis, size in sizes.items() if axis != "D"}
    if "G" not in sizes:
        return sizes
    found = {"B": sizes["B"], "G": sizes["G"], RANK: sizes["H"] // sizes["G"]}
    if "M" in sizes and case.option("cu_seqlens") is None:
        found["M"] = sizes["M"]
    return {**found, "N": sizes["N"], "D": sizes["D"], "E": sizes["E"]}


def kept(case: Case, inputs: Inputs, keep: Mapping[str, Sequence[int]]) -> tuple[Case, Inputs]:
    """The call with only these indices of each axis of :func:`extents`; axes not named stay whole."""
    size = extents(case)
    index = {axis: list(keep.get(axis, range(length))) for axis, length in size.items()}
    if "G" in size:
        ranks = size[RANK]
        index["H"] = [g * ranks + r for g in index["G"] for r in index[RANK]]
    options = dict(case.options)
    lengths = options.get("cu_seqlens")
    index["S"] = index.get("B", [])
    index["F"] = index.get("D", list(range(case.all_sizes.get("F", 0))))
    if lengths is not None:
        index["M"], index["S"] = index["N"], list(range(len(lengths)))
        bounds = itertools.pairwise([0, *itertools.accumulate(lengths)])
        pieces = [sum(a <= i < b for i in index["N"]) for a, b in bounds]
        options["cu_seqlens"] = tuple(pieces)
    if "pool" in options:
        options["pool"] = tuple(options["pool"][head] for head in index["H"])
    if "D" in size:
        index["2D"] = [*index["D"], *[size["D"] + place for place in index["D"]]]
    tensors = {}
    for name, tensor in tensors_of(case, inputs).items():
        for axis, symbol in enumerate(_axes(case, name)):
            if symbol == "2":
                continue
            # A bias of extent 1 is broadcast along that axis.
            whole = 2 * case["D"] if symbol == "2D" else case.all_sizes[symbol]
            if tensor.shape[axis] == whole:
                tensor = tensor.index_select(axis, torch.tensor(index[symbol], dtype=torch.int64))
        tensors[name] = tensor
    shape = {symbol: len(index.get(symbol, range(size))) for symbol, size in case.sizes.items()}
    smaller = replace(case, shape=tuple(shape.items()), options=tuple(options.items()))
    return smaller, assembled(smaller, tensors, numbers_of(inputs))


def _axes(case: Case, name: str) -> tuple[str, ...]:
    """The symbols of a tensor's axes."""
    form = SIGNATURES[case.family]
    if name in form.tensors:
        return case.axes_of(name) or ()
    state = name.removeprefix("initial_").removeprefix("d")
    if state in form.states and name != state:
        return case_states(case)[state]
    if name in form.keywords:
        return form.keywords[name]
    return _BY_KEYWORD[name] if name in _BY_KEYWORD else form.outputs[name.removeprefix("d")]


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    return x.sign() * torch.exp2(x.abs().clamp(min=2.0**-1000).log2().round())


def _digits(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([float(f"{value:.{count - 1}e}") for value in x.tolist()], dtype=torch.float64)

    return rounded


ROUNDINGS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    torch.sign,
    torch.round,
    _power_of_two,
    _digits(1),
    _digits(2),
)
"""From plainest to least plain: finite float64 numbers (one axis) to rounder ones."""
