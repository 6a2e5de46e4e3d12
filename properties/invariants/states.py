"""Invariants of families that carry a state along the sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from attnproof.properties.case import Case, Inputs, case_states
from attnproof.properties.contract import Contract
from attnproof.properties.invariants.base import (
    Balance,
    Call,
    Plan,
    Recipe,
    Select,
    Term,
    far_values,
    rows_from,
    same,
)
from attnproof.properties.invariants.calls import (
    Selects,
    affordable,
    all_same,
    as_it_is,
    attention_call,
    changed,
    choice,
    differentiated,
    every_gradient,
    outputs_of,
    pieces,
    same_gradients,
)
from attnproof.properties.signatures import SIGNATURES

__all__ = ["STATES"]

_TILE = 128
_LINEAR_STATES: Mapping[str, tuple[str, ...]] = {"prefix_scan": ("w",), "rwkv4": ("a",)}
Change = Callable[[torch.Tensor, int], torch.Tensor]


def _axes(case: Case, name: str) -> tuple[str, ...]:
    """The symbols of the axes of an input or an output, of the gradient of an input, or of a cotangent."""
    form, states = SIGNATURES[case.family], case_states(case)
    state = name.removeprefix("initial_")
    if state in states:
        return states[state]
    return form.outputs[name] if name in form.outputs else case.axes_of(name) or ()


def _along(case: Case, inputs: Inputs, symbols: str, change: Change) -> Inputs:
    """Every tensor of a call, states and cotangents included, changed along an axis of ``symbols``."""

    def apply(name: str, tensor: torch.Tensor) -> torch.Tensor:
        places = [axis for axis, symbol in enumerate(_axes(case, name)) if symbol in symbols]
        return change(tensor, places[0]) if places else tensor

    states = inputs.options.get("initial_state")
    changes: dict[str, Any] = {name: apply(name, x) for name, x in inputs.tensors.items()}
    if isinstance(states, tuple):
        named = zip(case_states(case), states, strict=True)
        changes["initial_state"] = tuple(apply(f"initial_{name}", x) for name, x in named)
    elif states is not None:
        changes["initial_state"] = apply("initial_state", states)
    for name in SIGNATURES[case.family].keywords:
        if inputs.options.get(name) is not None:
            changes[name] = apply(name, inputs.options[name])
    cotangents = {name: apply(name, x) for name, x in inputs.cotangents.items()}
    return changed(inputs, **changes, cotangents=cotangents)


def _selects(case: Case, inputs: Inputs, symbols: str, start: int, stop: int) -> dict[str, Selects]:
    """For each gradient, the slice of the base's along ``symbols`` against the variant's whole."""
    found: dict[str, Selects] = {}
    for name in differentiated(case, inputs):
        places = [axis for axis, symbol in enumerate(_axes(case, name)) if symbol in symbols]
        found[name] = (rows_from(start, stop, places[0]) if places else None, None)
    return found


def _outputs(case: Case, inputs: Inputs, symbols: str, start: int, stop: int) -> list[Balance]:
    """For each output, the slice of the base's along ``symbols`` against the variant's whole."""
    relations = []
    for name in outputs_of(case, inputs):
        places = [axis for axis, symbol in enumerate(_axes(case, name)) if symbol in symbols]
        relations.append(same(name, rows_from(start, stop, places[0]) if places else None))
    return relations


def _alone(symbols: str, words: str) -> Recipe:
    """One index of an axis that calls are independent over, alone."""
    symbol = symbols[0]

    def fits(case: Case, contract: Contract) -> bool:
        grouped = symbol == "H" and "G" in case.sizes
        return case[symbol] > 1 and not grouped and not (symbol == "B" and case.option("cu_seqlens"))

    def build(case: Case, inputs: Inputs, contract: Contract) -> Plan:
        index = choice(case, f"{words}-independence", 0, case[symbol])
        part = _along(case, inputs, symbols, lambda x, axis: x.narrow(axis, index, 1))
        calls = (as_it_is(case, inputs), attention_call(case, f"its {words} {index} alone", part))
        # A parameter that all batch entries share has the sum of their gradients.
        selects = {
            name: select
            for name, select in _selects(case, inputs, symbols, index, index + 1).items()
            if select[0] is not None
        }
        relations = _outputs(case, inputs, symbols, index, index + 1)
        return Plan(calls, (*relations, *same_gradients(case, inputs, selects)))

    return Recipe(fits, build)


def _packed(case: Case, contract: Contract) -> bool:
    return bool(case.option("cu_seqlens"))


def _packed_separate(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """The longest packed sequence as a call of its own."""
    bounds = pieces(inputs)
    index = max(range(len(bounds)), key=lambda i: bounds[i][1] - bounds[i][0])
    start, stop = bounds[index]
    multiple = contract.supports.multiple_of
    if stop == start or (stop - start) % multiple:
        return None
    own = _along(case, inputs, "N", lambda x, axis: x.narrow(axis, start, stop - start))
    own = _along(case, own, "S", lambda x, axis: x.narrow(axis, index, 1))
    own = changed(own, cu_seqlens=None)
    calls = (as_it_is(case, inputs), attention_call(case, f"its sequence {index} alone", own))
    relations: list[Balance] = []
    selects: dict[str, Selects] = {}
    for name in outputs_of(case, inputs):
        whole = _axes(case, name)
        axis, first, last = (2, start, stop) if "N" in whole else (0, index, index + 1)
        relations.append(same(name, rows_from(first, last, axis)))
    for name in differentiated(case, inputs):
        symbols = _axes(case, name)
        if "N" in symbols:
            selects[name] = (rows_from(start, stop, symbols.index("N")), None)
        elif "S" in symbols:
            selects[name] = (rows_from(index, index + 1, 0), None)
    return Plan(calls, (*relations, *same_gradients(case, inputs, selects)))


def _causal(case: Case, contract: Contract) -> bool:
    return case.option("causal") != "off" and case["N"] > 1


def _causal_future(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Everything from a position on is replaced: nothing before may move, by value."""
    r = choice(case, "causal-future", 1, case["N"])
    later: dict[str, Any] = {}
    for name, tensor in inputs.tensors.items():
        axes = _axes(case, name)
        if "N" not in axes or name == "g":
            continue
        free = name in (*"qkv", _linear_input(case))
        other = far_values(tensor) if free else tensor.flip(axes.index("N"))
        place = (torch.arange(case["N"]) >= r).reshape([-1 if s == "N" else 1 for s in axes])
        later[name] = torch.where(place, other, tensor)
    without = changed(inputs, cotangents={})
    moved = changed(without, **later)
    calls = (
        attention_call(case, "the case, without gradients", without),
        attention_call(case, f"other values from position {r} on", moved, familiar=False),
    )
    before = rows_from(0, r, 2)
    exact = contract.causality == "exact"
    names = SIGNATURES[case.family].outputs
    return Plan(calls, tuple(same(name, before, before, bitwise=exact) for name in names))


def _without_state(case: Case, contract: Contract) -> bool:
    return not case.option("initial_state")


def _linear_input(case: Case) -> str:
    """The name of the input in which the family is linear, from no state."""
    return SIGNATURES[case.family].values


def _linear_outputs(case: Case, inputs: Inputs) -> list[str]:
    """Outputs and states that are linear in it; the others do not depend on it."""
    linear = (*SIGNATURES[case.family].outputs, "state", *_LINEAR_STATES.get(case.family, ()))
    return [name for name in outputs_of(case, inputs) if name in linear]


def _value_linearity(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Positive less negative values, from no state: outputs and states, but for those that v is not in."""
    name = _linear_input(case)
    v = inputs.tensors[name]
    positive, negative = (
        changed(inputs, **{name: v.clamp(min=0)}),
        changed(inputs, **{name: (-v).clamp(min=0)}),
    )
    calls = (
        as_it_is(case, inputs),
        attention_call(case, f"the positive part of {name}", positive, familiar=False),
        attention_call(case, f"the negative part of {name}", negative, familiar=False),
    )
    linear = _linear_outputs(case, inputs)
    return Plan(calls, tuple(Balance((Term(0, y, -1.0), Term(1, y), Term(2, y, -1.0))) for y in linear))


def _may_begin(case: Case, contract: Contract) -> bool:
    return "initial_state" in contract.options and not case.option("initial_state")


def _zero_state(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """An initial state of 0 is none."""
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    zeros = tuple(
        torch.full(
            SIGNATURES[case.family].shape(axes, case.all_sizes),
            -torch.inf if name in SIGNATURES[case.family].levels else 0.0,
            dtype=wide,
        )
        for name, axes in case_states(case).items()
    )
    given = changed(inputs, initial_state=zeros if len(zeros) > 1 else zeros[0])
    calls = (as_it_is(case, inputs), attention_call(case, "from a state of 0", given))
    return Plan(calls, (*all_same(case, inputs), *same_gradients(case, inputs, every_gradient(case, inputs))))


def _gated(case: Case, contract: Contract) -> bool:
    plain = case.option("gate") is None and case.family == "delta"
    return case["N"] > 2 and not plain and not case.option("cu_seqlens")


def _forgotten(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """A gate of 0 at a position: what comes after is a call of its own, from no state."""
    n, multiple = case["N"], contract.supports.multiple_of
    r = choice(case, "closed-gate", 1, n - 1)
    r = n - max(multiple, (n - r) // multiple * multiple)
    if r < 1:
        return None
    name = "f" if case.family == "mlstm" else "g"
    gates = inputs.tensors[name].clone()
    gates[:, :, r] = -torch.inf
    closed = changed(inputs, cotangents={}, **{name: gates})
    tail = _along(case, closed, "N", lambda x, axis: x.narrow(axis, r, n - r))
    tail = changed(tail, initial_state=None)
    # Of RWKV-6 the position itself still reads the state before its gate.
    first = int(case.family == "rwkv6")
    calls = (
        attention_call(case, f"a gate of 0 at position {r}", closed, familiar=False),
        attention_call(case, f"its positions from {r} on alone", tail, familiar=False),
    )
    relations = [same("o", rows_from(r + first, n, 2), rows_from(first, n - r, 2))]
    relations += [same(name) for name in outputs_of(case, inputs) if name != "o"]
    return Plan(calls, tuple(relations))


def _padding_fits(case: Case, contract: Contract) -> bool:
    longer = case["N"] + _TILE
    return not case.option("cu_seqlens") and affordable(case, -(-longer * longer // case["N"] ** 2))


def _length_padding(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Positions up to a whole tile that write nothing: keys of 0, gates of 1."""
    n, multiple = case["N"], contract.supports.multiple_of
    more = -n % _TILE or _TILE
    more += -(n + more) % multiple
    filler = {"k": 0.0, "g": 0.0, "beta": 0.0, "i": -1.0e4, "f": 1.0e4}

    def appended(name: str, tensor: torch.Tensor) -> torch.Tensor:
        axes = _axes(case, name)
        if "N" not in axes:
            return tensor
        axis = axes.index("N")
        last = tensor.index_select(axis, torch.arange(more) % n)
        free = name in (*"qkv", _linear_input(case))
        held = far_values(last) if free else last
        return torch.cat([tensor, torch.full_like(last, filler[name]) if name in filler else held], axis)

    longer = {name: appended(name, tensor) for name, tensor in inputs.tensors.items()}
    for name in SIGNATURES[case.family].keywords:
        if inputs.options.get(name) is not None:
            longer[name] = appended(name, inputs.options[name])
    plain, longer_inputs = changed(inputs, cotangents={}), changed(inputs, **longer, cotangents={})
    calls = (
        attention_call(case, "the case, without gradients", plain),
        attention_call(case, f"{more} positions appended that write nothing", longer_inputs, familiar=False),
    )
    own = rows_from(0, n, 2)
    # Others forget at every step, write whatever they get, or have a maximum that moves with the gates.
    keeps = case.family in ("linear", "gated_linear", "rwkv6", "delta")
    outputs = SIGNATURES[case.family].outputs
    kept = [y for y in outputs_of(case, inputs) if y in outputs or keeps]
    selects: dict[str, Select | None] = dict.fromkeys(outputs, own)
    return Plan(calls, tuple(same(name, None, selects.get(name)) for name in kept))


def _deterministic(case: Case, contract: Contract) -> bool:
    return contract.deterministic


def _determinism(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """v and the state of the opposite sign negate every output made of them, and gradients but theirs."""
    states, v = inputs.options.get("initial_state"), _linear_input(case)
    opposite: dict[str, Any] = {v: -inputs.tensors[v]}
    linear = ("state", *_LINEAR_STATES.get(case.family, ()))
    if isinstance(states, tuple):
        named = zip(case_states(case), states, strict=True)
        opposite["initial_state"] = tuple(-x if name in linear else x for name, x in named)
    elif states is not None:
        opposite["initial_state"] = -states
    following = (*SIGNATURES[case.family].outputs, *linear)
    turned = {name: x if name in following else -x for name, x in inputs.cotangents.items()}
    calls = (
        replace(as_it_is(case, inputs), repeat=True),
        attention_call(case, f"{v} and the state negated", changed(inputs, **opposite, cotangents=turned)),
        Call("the case once more, after a call with other values", case, inputs),
    )
    kept = (v, *(f"initial_{name}" for name in linear))
    negated = _linear_outputs(case, inputs)
    negated += [f"d{name}" for name in differentiated(case, inputs) if inputs.cotangents and name not in kept]
    relations = (
        *all_same(case, inputs, call=2, bitwise=True),
        *same_gradients(case, inputs, every_gradient(case, inputs), call=2, bitwise=True),
        *(Balance((Term(1, name), Term(0, name, 1.0))) for name in negated),
    )
    return Plan(calls, relations)


STATES: Mapping[str, Recipe] = {
    "batch-independence": _alone("BS", "batch entry"),
    "head-independence": _alone("H", "head"),
    "packed-sequences": Recipe(_packed, _packed_separate),
    "causal-future": Recipe(_causal, _causal_future),
    "value-linearity": Recipe(_without_state, _value_linearity),
    "zero-state": Recipe(_may_begin, _zero_state),
    "closed-gate": Recipe(_gated, _forgotten),
    "length-padding": Recipe(_padding_fits, _length_padding),
    "determinism": Recipe(_deterministic, _determinism),
}
"""By name of the invariant, how it is tried on families with a state."""
