"""Invariants of log-sum-exp and of the softmax of rows: x (R, N), one output y."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Contract
from attnproof.properties.invariants.base import (
    LOG_2,
    Balance,
    Bounds,
    Call,
    Plan,
    Recipe,
    Select,
    Term,
    anything,
    far_values,
    generator,
    grid_step,
    other_view,
    relaid,
    rows_from,
    same,
)

__all__ = ["ROWS"]

# Entries appended under a mask where the kernel takes any number of them: no multiple of any vector.
_FEW = 5


def _call(case: Case, words: str, x: torch.Tensor, *, familiar: bool = True, view: str | None = None) -> Call:
    view = view or case.view
    shaped = replace(case, shape=(("R", x.shape[0]), ("N", x.shape[1])), view=view)
    return Call(words, shaped, Inputs({"x": relaid(x, view, "x")}, {}), familiar)


def _base(case: Case, inputs: Inputs) -> Call:
    return Call("the case itself", case, inputs)


def _weights(case: Case) -> bool:
    """Whether y has the entries' axis."""
    return case.family == "softmax_rows"


def _several_rows(case: Case, contract: Contract) -> bool:
    return case["R"] > 1


def _several_entries(case: Case, contract: Contract) -> bool:
    return case["N"] > 1


def _entries(case: Case, select: Select) -> Select | None:
    """``select`` on the entries' axis of y, where y has one."""
    return select if _weights(case) else None


def _key_permutation(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    x = inputs.tensors["x"]
    order = torch.randperm(x.shape[1], generator=generator(case, "key-permutation"))
    calls = (_base(case, inputs), _call(case, "its entries permuted", x[:, order]))
    return Plan(calls, (same("y", _entries(case, lambda y: y[:, order])),))


def _query_permutation(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    x = inputs.tensors["x"]
    order = torch.randperm(x.shape[0], generator=generator(case, "query-permutation"))
    calls = (_base(case, inputs), _call(case, "its rows permuted", x[order]))
    return Plan(calls, (same("y", lambda y: y[order]),))


def _score_shift(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    x = inputs.tensors["x"]
    step = grid_step(x)
    if step is None:
        return None
    rounded = (x.double() / step).round() * step
    draw = torch.randint(-64, 65, (x.shape[0], 1), generator=generator(case, "score-shift"))
    shift = draw.double() * step
    calls = (
        _call(case, "its entries on a coarse grid", rounded.to(x.dtype), familiar=False),
        _call(case, "a constant added to each row of them", (rounded + shift).to(x.dtype), familiar=False),
    )
    constant: torch.Tensor | float = 0.0 if _weights(case) else shift.flatten()
    return Plan(calls, (same("y", constant=constant),))


def _key_duplication(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    x = inputs.tensors["x"]
    calls = (_base(case, inputs), _call(case, "each entry twice", torch.cat([x, x], 1), familiar=False))
    if not _weights(case):
        return Plan(calls, (same("y", constant=LOG_2[0], radius=LOG_2[1]),))
    n = x.shape[1]
    halves = [Term(1, "y", 2.0, rows_from(start, start + n, 1)) for start in (0, n)]
    return Plan(calls, tuple(Balance((half, Term(0, "y", -1.0))) for half in halves))


def _masked_padding(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    x, n = inputs.tensors["x"], case["N"]
    multiple = contract.supports.multiple_of
    padding = x.new_full((x.shape[0], multiple if multiple > 1 else _FEW), -torch.inf)
    calls = (_base(case, inputs), _call(case, "entries of −inf appended", torch.cat([x, padding], 1)))
    relations = [same("y", None, _entries(case, rows_from(0, n, 1)))]
    if _weights(case):
        relations.append(Balance((Term(1, "y", 1.0, rows_from(n, n + padding.shape[1], 1)),)))
    return Plan(calls, tuple(relations))


def _row_independence(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    x = inputs.tensors["x"]
    rows = x.shape[0]
    start = 1 + int(torch.randint(rows - 1, (), generator=generator(case, "row-independence")))
    calls = (_base(case, inputs), _call(case, f"its rows from {start} on alone", x[start:]))
    return Plan(calls, (same("y", rows_from(start, rows, 0), bitwise=contract.row_invariant),))


def _determinism(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    first = replace(_base(case, inputs), repeat=True)
    between = _call(case, "other values in between", far_values(inputs.tensors["x"]), familiar=False)
    again = Call("the case once more, after a call with other values", case, inputs)
    return Plan((first, between, again), (same("y", call=2, bitwise=True),))


def _strides(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    view = other_view(case, inputs, contract)
    return Plan(
        (_base(case, inputs), _call(case, f"its values laid out {view}", inputs.tensors["x"], view=view)),
        (same("y"),),
    )


def _hull(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """0 ≤ weight ≤ 1; max x ≤ log Σ e^x ≤ max x + log N (theory.md LSE-1), 2⁻⁴⁰ left for the logarithm."""
    x = inputs.tensors["x"].double()
    if _weights(case):
        lower, upper = torch.zeros_like(x), torch.ones_like(x)
    else:
        lower = x.amax(1)
        upper = lower + torch.log((x > -torch.inf).sum(1).clamp(min=1).double()) * (1.0 + 2.0**-40)
    return Plan((_base(case, inputs),), (Bounds(0, "y", lower, upper),))


def _deterministic(case: Case, contract: Contract) -> bool:
    return contract.deterministic


ROWS: Mapping[str, Recipe] = {
    "key-permutation": Recipe(_several_entries, _key_permutation),
    "query-permutation": Recipe(_several_rows, _query_permutation),
    "score-shift": Recipe(anything, _score_shift),
    "masked-padding": Recipe(anything, _masked_padding),
    "key-duplication": Recipe(anything, _key_duplication),
    "row-independence": Recipe(_several_rows, _row_independence),
    "convex-hull": Recipe(anything, _hull),
    "determinism": Recipe(_deterministic, _determinism),
    "strides": Recipe(anything, _strides),
}
"""By name of the invariant, how it is tried on rows of logits."""
