"""Calls of a family made from other calls: other tensors, options and cotangents, and their case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from attnproof.properties.case import Case, Inputs, case_states
from attnproof.properties.contract import Contract
from attnproof.properties.families.visibility import visible
from attnproof.properties.invariants.base import (
    Balance,
    Call,
    Select,
    far_values,
    generator,
    relaid,
    same,
)
from attnproof.properties.signatures import SIGNATURES

__all__ = [
    "Selects",
    "affordable",
    "all_same",
    "as_it_is",
    "attention_call",
    "base_call",
    "changed",
    "choice",
    "cotangents_by",
    "differentiated",
    "every_gradient",
    "hides_appended",
    "length_given",
    "outputs_of",
    "pieces",
    "positional",
    "positions_as_bias",
    "positions_may_go",
    "same_gradients",
    "sliced",
    "takes_masks",
    "with_appended",
]

Selects = tuple[Select | None, Select | None]
"""Which elements of the base's gradient take part, and which of the variant's; None for all."""


# Options that are tensors of the inputs' dtype, which have a gradient.
_PARAMETERS = ("bias", "sinks", "beta", "z", "delta_bias")
_LAID_OUT = (*_PARAMETERS, "alibi_slopes")
# Longer calls than this (B·H·M·N·(D + E) multiplications) are not made longer still: twice what a planned
# case takes at most.
_MOST_WORK = 2**25


def changed(inputs: Inputs, **changes: Any) -> Inputs:
    """``inputs`` with tensors, options or ``cotangents`` replaced.

    None takes an option away, or all cotangents; they are kept as they are unless others are given.
    """
    cotangents = changes.pop("cotangents", inputs.cotangents)
    tensors = {name: changes.pop(name, tensor) for name, tensor in inputs.tensors.items()}
    options = {name: value for name, value in {**inputs.options, **changes}.items() if value is not None}
    return Inputs(tensors, options, dict(cotangents or {}))


def cotangents_by(inputs: Inputs, function: Select) -> dict[str, torch.Tensor]:
    """Every cotangent put through ``function``, which sees axes (B, H, M, …)."""
    return {name: function(tensor) for name, tensor in inputs.cotangents.items()}


def attention_call(
    case: Case,
    words: str,
    inputs: Inputs,
    *,
    familiar: bool = True,
    view: str | None = None,
) -> Call:
    """A call with ``inputs`` in fresh memory laid out as the case's view, or ``view``, says."""
    view = view or case.view
    tensors = {name: relaid(tensor, view, name) for name, tensor in inputs.tensors.items()}
    options = {
        name: relaid(value, view, name) if name in _LAID_OUT and isinstance(value, torch.Tensor) else value
        for name, value in inputs.options.items()
    }
    cotangents = {name: relaid(tensor, view, f"d{name}") for name, tensor in inputs.cotangents.items()}
    made = Inputs(tensors, options, cotangents)
    return Call(words, case_of(case, made, view), made, familiar)


def case_of(case: Case, inputs: Inputs, view: str) -> Case:
    """``case`` with the shape and the options of ``inputs``."""
    form = SIGNATURES[case.family]
    sizes: dict[str, int] = {}
    for name, tensor in inputs.tensors.items():
        for axis, size in zip(case.axes_of(name) or (), tensor.shape, strict=True):
            if axis == "2":
                continue
            sizes[axis.removeprefix("2")] = size // 2 if axis.startswith("2") else size
    options = {name: _as_option(inputs.options.get(name)) for name in form.options}
    for name in ("sinks", "beta", "alibi_slopes", "initial_state", *form.keywords):
        if options.get(name) is not None:
            options[name] = True
    if form.stateful:
        for name in ("gate", "complex", "skip", "wide_gates"):
            options[name] = case.option(name) if name in form.options else None
        options["delta_softplus"] = inputs.options.get("delta_softplus") or None
        options["causal"] = "off" if inputs.options.get("causal") is False else None
        options["normalize"] = inputs.options.get("normalize") or None
    if options.get("pool") == (1,) * sizes.get("H", 0) and case.option("pool") is None:
        options["pool"] = None
    if inputs.options.get("variance") is False:
        options["variance"] = "off"
    packed = inputs.options.get("cu_seqlens")
    options["cu_seqlens"] = None if packed is None else tuple(packed.diff().tolist())
    options["causal_alignment"] = case.option("causal_alignment") if options.get("causal") else None
    options["cotangents"] = case.option("cotangents") if inputs.cotangents else None
    given = tuple((name, options[name]) for name in form.options if options.get(name) is not None)
    return replace(case, shape=tuple(sizes.items()), options=given, view=view)


def _as_option(value: Any) -> Any:
    """The value of a keyword as a case names it; of a tensor with four axes how it broadcasts."""
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        return "".join("1" if size == 1 else axis for axis, size in zip("bhmn", value.shape, strict=True))
    return value


def differentiated(case: Case, inputs: Inputs) -> tuple[str, ...]:
    """Names of the inputs that have a gradient, of which the levels of an initial state are none."""
    given = inputs.options
    states = case_states(case) if given.get("initial_state") is not None else ()
    initial = (f"initial_{name}" for name in states if name not in SIGNATURES[case.family].levels)
    parameters = (name for name in _PARAMETERS if isinstance(given.get(name), torch.Tensor))
    return (*inputs.tensors, *parameters, *initial)


def takes_masks(contract: Contract) -> bool:
    """Whether any mask can be handed to the kernel, as a bias of −inf."""
    return contract.family == "softmax" and "bias" in contract.options


def positional(case: Case) -> bool:
    """Whether a score or what a query sees depends on its distance to the key."""
    return bool(case.option("causal") or case.option("alibi_slopes")) or case.option("window") is not None


def positions_may_go(case: Case, contract: Contract) -> bool:
    """Whether nothing of the case depends on positions, or all that does can be a bias of 0 and −inf."""
    if case.option("alibi_slopes"):
        return False
    return takes_masks(contract) or not (positional(case) or case.option("cu_seqlens"))


def positions_as_bias(case: Case, inputs: Inputs, contract: Contract) -> Inputs:
    """The same call with causal mask, window and packing written as −inf in the bias; all are gone then.

    Not for cases with ALiBi, whose slopes are no such bias.
    """
    given = inputs.options
    if not positional(case) and given.get("cu_seqlens") is None:
        return inputs
    q = inputs.tensors["q"]
    seen = visible(
        case["M"],
        case["N"],
        causal=bool(given.get("causal")),
        window=given.get("window"),
        cu_seqlens=given.get("cu_seqlens"),
        causal_alignment=contract.causal_alignment,
    )
    bias = torch.zeros(1, 1, 1, 1, dtype=q.dtype) if given.get("bias") is None else given["bias"]
    masked = torch.where(seen, bias, torch.tensor(-torch.inf, dtype=bias.dtype))
    return changed(inputs, bias=masked, causal=None, window=None, cu_seqlens=None)


def pieces(inputs: Inputs) -> list[tuple[int, int]]:
    """Start and stop of each packed sequence; of all keys where nothing is packed."""
    packed = inputs.options.get("cu_seqlens")
    if packed is None:
        return [(0, inputs.tensors["k"].shape[2])]
    ends = packed.tolist()
    return list(zip(ends, ends[1:], strict=False))


def hides_appended(case: Case, contract: Contract) -> bool:
    """Whether as many keys as queries, appended, are unseen by the queries before them without any bias."""
    if case.option("cu_seqlens"):
        return True
    aligned = contract.causal_alignment == "bottom-right" or case["M"] <= case["N"]
    return bool(case.option("causal")) and aligned


def with_appended(
    case: Case, inputs: Inputs, contract: Contract, count: int, rows: int, filler: torch.Tensor | None = None
) -> Inputs:
    """``count`` keys and ``rows`` queries appended, the keys unseen by the case's own queries.

    A packed batch gets one more sequence, under a causal mask appended keys lie in the future, else the bias
    is −inf for them. ``count`` and ``rows`` are equal where positions matter, or queries would move against
    keys.

    Args:
        filler: (…) values that all appended keys and values take in turn; None for finite ones, far from the
            others. Gradients are asked for in calls with finite ones only; the appended queries' cotangents
            are 0.
    """
    q, k, v = (inputs.tensors[name] for name in "qkv")
    hidden = hides_appended(case, contract)
    more_q = q[:, :, torch.arange(rows) % q.shape[2]]
    places = torch.arange(count) % k.shape[2]
    more_k, more_v = -k[:, :, places], far_values(v[:, :, places])
    if filler is not None:
        cycle = filler.to(k.dtype)[torch.arange(count) % len(filler)].reshape(-1, 1)
        more_k, more_v = cycle.expand_as(more_k), cycle.flip(0).expand_as(more_v)
    changes: dict[str, Any] = {
        "q": torch.cat([q, more_q], 2),
        "k": torch.cat([k, more_k], 2),
        "v": torch.cat([v, more_v], 2),
        "cotangents": {} if filler is not None else cotangents_by(inputs, lambda x: _rows_of_zeros(x, rows)),
    }
    # Of sigmoid attention it is a number, which stays.
    bias = inputs.options.get("bias") if case.family == "softmax" else None
    if inputs.options.get("cu_seqlens") is not None:
        ends = inputs.options["cu_seqlens"]
        changes["cu_seqlens"] = torch.cat([ends, ends[-1:] + count])
    if bias is not None or (count and not hidden):
        bias = torch.zeros(1, 1, 1, 1, dtype=q.dtype) if bias is None else bias
        changes["bias"] = _grown(bias, k.shape[2], count, rows, 0.0 if hidden else -torch.inf)
    return changed(inputs, **changes)


def _rows_of_zeros(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``x`` (B, H, M, …) with rows of 0 appended."""
    return torch.cat([x, x.new_zeros(*x.shape[:2], rows, *x.shape[3:])], 2)


def _grown(bias: torch.Tensor, keys: int, count: int, rows: int, filler: float) -> torch.Tensor:
    """``bias`` for appended keys, which get ``filler``, and queries, which get 0 beside the old keys."""
    if rows and bias.shape[2] > 1:
        bias = torch.nn.functional.pad(bias, (0, 0, 0, rows))
    if bias.shape[3] == 1 and filler != 0.0:
        bias = bias.expand(*bias.shape[:3], keys)
    if bias.shape[3] > 1 or filler != 0.0:
        bias = torch.nn.functional.pad(bias, (0, count), value=filler)
    return bias


def as_it_is(case: Case, inputs: Inputs) -> Call:
    """The case with its own inputs."""
    return Call("the case itself", case, inputs)


def length_given(case: Case, inputs: Inputs, contract: Contract) -> Inputs | None:
    """Inputs whose meaning does not change with the number of keys: −log N is handed over as sigmoid's bias.

    None where the kernel takes no bias.
    """
    if case.family != "sigmoid" or inputs.options.get("bias") is not None:
        return inputs
    return changed(inputs, bias=-math.log(case["N"])) if "bias" in contract.options else None


def base_call(case: Case, inputs: Inputs, own: Inputs) -> Call:
    """The case itself, or with a bias of −log N that :func:`length_given` made of it."""
    return as_it_is(case, inputs) if own is inputs else attention_call(case, "the case, its bias given", own)


def outputs_of(case: Case, inputs: Inputs) -> tuple[str, ...]:
    """Names of the outputs that a call returns, without gradients."""
    names = SIGNATURES[case.family].outputs
    states = tuple(case_states(case)) if inputs.options.get("return_state") else ()
    return (*(name for name in names if name != "lse" or inputs.options.get("return_lse")), *states)


def all_same(
    case: Case, inputs: Inputs, base: Select | None = None, variant: Select | None = None, **how: Any
) -> tuple[Balance, ...]:
    """Every output of the variant, without gradients, is the base's; see :func:`same`."""
    return tuple(same(output, base, variant, **how) for output in outputs_of(case, inputs))


def same_gradients(
    case: Case, inputs: Inputs, selects: Mapping[str, Selects], *, call: int = 1, bitwise: bool = False
) -> tuple[Balance, ...]:
    """The gradients of the inputs that ``selects`` names are the base's, for those that have one.

    Args:
        inputs: of the base; without cotangents there is no relation.
        selects: by name of the input, which elements of the base's gradient and of the variant's.
        call, bitwise: as for :func:`same`.
    """
    names = differentiated(case, inputs) if inputs.cotangents else ()
    return tuple(
        same(f"d{name}", *selects[name], call=call, bitwise=bitwise) for name in names if name in selects
    )


def every_gradient(case: Case, inputs: Inputs) -> dict[str, Selects]:
    """All gradients, whole."""
    return dict.fromkeys(differentiated(case, inputs), (None, None))


def choice(case: Case, name: str, low: int, high: int) -> int:
    """A number from low to high − 1, the same each time."""
    return int(torch.randint(low, high, (), generator=generator(case, name)))


def affordable(case: Case, factor: int = 1) -> bool:
    """Whether a call of ``factor`` times the case's work is quick."""
    sizes = case.sizes
    rows = sizes.get("M", sizes["N"])
    work = sizes["B"] * sizes["H"] * rows * sizes["N"] * (sizes.get("D", 0) + sizes.get("E", 1))
    return bool(work * factor <= _MOST_WORK)


def sliced(value: Any, axis: int, start: int, stop: int) -> Any:
    """The slice of an axis of a tensor, whole where it broadcasts; what is no tensor as it is."""
    if not isinstance(value, torch.Tensor) or value.shape[axis] == 1:
        return value
    return value.narrow(axis, start, stop - start)
