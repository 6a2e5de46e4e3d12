"""How a call is made smaller or plainer: fewer options, rows and keys, another layout, rounder values.

Functions here make candidates; whether one still fails is for a probe to say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Supports
from attnproof.properties.views import lay_out, unit_last_stride

__all__ = [
    "RANK",
    "ROUNDINGS",
    "assembled",
    "extents",
    "kept",
    "recast",
    "resized",
    "supported",
    "tensors_of",
    "with_option",
]

_AXES = {"q": "BHMD", "k": "BGND", "v": "BGNE", "bias": "BHMN", "sinks": "H", "x": "RN"}
RANK = "H/G"
"""The axis of query heads that share one key/value head."""


def tensors_of(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Every floating tensor of a call by name: the positional ones, then ``bias`` and ``sinks``."""
    named = {name: inputs.options.get(name) for name in ("bias", "sinks")}
    return {**inputs.tensors, **{name: t for name, t in named.items() if isinstance(t, torch.Tensor)}}


def assembled(case: Case, tensors: Mapping[str, torch.Tensor], scale: float | None) -> Inputs:
    """The inputs of ``case`` with these values, in its dtype and memory layout.

    Args:
        case: decides which options the call has; ``bias`` and ``sinks`` are taken from ``tensors``.
        tensors: by name, of the shapes of ``case``; values are rounded to its dtype.
        scale: the factor of q·k; None for a family that has none.
    """
    laid = {name: lay_out(tensor.to(case.torch_dtype), case.view, name) for name, tensor in tensors.items()}
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    for name, value in case.options:
        if name in ("bias", "sinks"):
            options[name] = laid[name]
        elif name == "cu_seqlens":
            options[name] = torch.tensor([0, *itertools.accumulate(value)], dtype=torch.int32)
        elif name != "causal_alignment":
            options[name] = value
    return Inputs({name: laid[name] for name in tensors if name not in ("bias", "sinks")}, options)


def recast(case: Case, inputs: Inputs) -> Inputs:
    """``inputs`` under a case of the same shape with fewer options, another layout, dtype or window."""
    return assembled(case, tensors_of(inputs), inputs.options.get("scale"))


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
        shape["M"] = shape["N"] = sum(lengths)
    options = tuple((n, lengths if n == "cu_seqlens" else value) for n, value in case.options)
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
    axes = 4 if widths else 2
    if supports.last_stride_one and not unit_last_stride(case.view, axes):
        return False
    return sizes["N"] % supports.multiple_of == 0


def extents(case: Case) -> dict[str, int]:
    """The axes along which a call can be cut, with their sizes.

    Query heads are counted within their group, and a packed call has one axis for queries and keys.
    """
    sizes = case.sizes
    if "G" not in sizes:
        return sizes
    found = {"B": sizes["B"], "G": sizes["G"], RANK: sizes["H"] // sizes["G"]}
    if case.option("cu_seqlens") is None:
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
    if lengths is not None:
        index["M"] = index["N"]
        bounds = itertools.pairwise([0, *itertools.accumulate(lengths)])
        pieces = [sum(a <= i < b for i in index["N"]) for a, b in bounds]
        options["cu_seqlens"] = tuple(pieces)
    tensors = {}
    for name, tensor in tensors_of(inputs).items():
        for axis, symbol in enumerate(_AXES[name]):
            # A bias of extent 1 is broadcast along that axis.
            if tensor.shape[axis] == case[symbol]:
                tensor = tensor.index_select(axis, torch.tensor(index[symbol], dtype=torch.int64))
        tensors[name] = tensor
    shape = {symbol: len(index[symbol]) for symbol in case.sizes}
    smaller = replace(case, shape=tuple(shape.items()), options=tuple(options.items()))
    return smaller, assembled(smaller, tensors, inputs.options.get("scale"))


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
