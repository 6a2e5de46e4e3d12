"""Invariants of easy attention (theory.md EASY-2): linear in its values and in its learned scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Contract
from attnproof.properties.invariants.base import (
    Balance,
    Plan,
    Recipe,
    Select,
    Term,
    anything,
    far_values,
    rows_from,
    same,
)
from attnproof.properties.invariants.calls import (
    affordable,
    all_same,
    as_it_is,
    attention_call,
    changed,
    choice,
    cotangents_by,
    same_gradients,
)

__all__ = ["EASY"]

_TILE = 128


def _parts(case: Case, inputs: Inputs, name: str, other: str) -> Plan:
    """``name`` is its positive part less its negative; the gradient by ``other`` is linear in it as well."""
    x = inputs.tensors[name]
    calls = (
        as_it_is(case, inputs),
        attention_call(
            case, f"the positive part of {name}", changed(inputs, **{name: x.clamp(min=0)}), familiar=False
        ),
        attention_call(
            case, f"the negative part of {name}", changed(inputs, **{name: (-x).clamp(min=0)}), familiar=False
        ),
    )
    linear = ("o", f"d{other}") if inputs.cotangents else ("o",)
    relations = [Balance((Term(0, y), Term(1, y, -1.0), Term(2, y))) for y in linear]
    for call in (1, 2) if inputs.cotangents else ():
        relations.append(same(f"d{name}", call=call))
    return Plan(calls, tuple(relations))


def _value_linearity(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    return _parts(case, inputs, "v", "alpha")


def _score_linearity(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    return _parts(case, inputs, "alpha", "v")


def _several(symbol: str) -> Any:
    return lambda case, contract: case[symbol] > 1


def _batch_independence(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    b = choice(case, "batch-independence", 0, case["B"])
    select = rows_from(b, b + 1, 0)
    alone = changed(inputs, v=select(inputs.tensors["v"]), cotangents=cotangents_by(inputs, select))
    calls = (as_it_is(case, inputs), attention_call(case, f"its batch entry {b} alone", alone))
    relations = all_same(case, inputs, select, bitwise=contract.batch_invariant)
    return Plan(calls, (*relations, *same_gradients(case, inputs, {"v": (select, None)})))


def _head_independence(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    h = choice(case, "head-independence", 0, case["H"])
    select, first = rows_from(h, h + 1, 1), rows_from(h, h + 1, 0)
    alone = changed(
        inputs,
        alpha=first(inputs.tensors["alpha"]),
        v=select(inputs.tensors["v"]),
        cotangents=cotangents_by(inputs, select),
    )
    calls = (as_it_is(case, inputs), attention_call(case, f"its head {h} alone", alone))
    selects = {"alpha": (first, None), "v": (select, None)}
    return Plan(calls, (*all_same(case, inputs, select), *same_gradients(case, inputs, selects)))


def _padding_fits(case: Case, contract: Contract) -> bool:
    longer = case["N"] + _TILE
    return affordable(case, -(-longer * longer // case["N"] ** 2))


def _length_padding(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Positions up to a whole tile whose scores are 0; their own cotangents are 0 as well."""
    n, multiple = case["N"], contract.supports.multiple_of
    more = -n % _TILE or _TILE
    more += -(n + more) % multiple
    alpha, v = inputs.tensors["alpha"], inputs.tensors["v"]
    longer = changed(
        inputs,
        alpha=torch.nn.functional.pad(alpha, (0, more, 0, more)),
        v=torch.cat([v, far_values(v[:, :, torch.arange(more) % n])], 2),
        cotangents=cotangents_by(inputs, lambda x: torch.nn.functional.pad(x, (0, 0, 0, more))),
    )
    own = rows_from(0, n, 2)
    corner: Select = lambda x: x[:, :n, :n]  # noqa: E731
    calls = (
        as_it_is(case, inputs),
        attention_call(case, f"{more} positions appended with scores of 0", longer, familiar=False),
    )
    selects = {"alpha": (None, corner), "v": (None, own)}
    return Plan(calls, (*all_same(case, inputs, variant=own), *same_gradients(case, inputs, selects)))


EASY: Mapping[str, Recipe] = {
    "value-linearity": Recipe(anything, _value_linearity),
    "score-linearity": Recipe(anything, _score_linearity),
    "batch-independence": Recipe(_several("B"), _batch_independence),
    "head-independence": Recipe(_several("H"), _head_independence),
    "length-padding": Recipe(_padding_fits, _length_padding),
}
"""By name of the invariant, how it is tried."""
