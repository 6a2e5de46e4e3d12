"""Invariants of softmax attention that say what a result does not depend on (contract.md, "The edges").

Other batch entries, heads and rows; keys that a row does not see, in the future or in the padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Contract
from attnproof.properties.families.visibility import visible
from attnproof.properties.invariants.base import Balance, Plan, Recipe, far_values, rows_from
from attnproof.properties.invariants.calls import (
    affordable,
    all_same,
    as_it_is,
    attention_call,
    changed,
    choice,
    hides_appended,
    pieces,
    positional,
    sliced,
    with_appended,
)

__all__ = ["ISOLATION"]

# Keys appended under a mask where the kernel takes any number of them: no multiple of any tile.
_FEW = 5
# The largest tile side in common use: lengths padded to it have no partial tile in any kernel.
_TILE = 128


def _padding_fits(case: Case, contract: Contract) -> bool:
    return hides_appended(case, contract) or "bias" in contract.options


def _unseen_by_all(case: Case, contract: Contract) -> bool:
    """Whether appended queries do not see the appended keys either, whose values are far from the others."""
    return not hides_appended(case, contract)


def _masked_padding(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    multiple = contract.supports.multiple_of
    count = multiple if multiple > 1 else _FEW
    moves = positional(case) or case.option("cu_seqlens")
    rows = count if moves else 0
    fillers: list[torch.Tensor | None] = [None]
    if contract.unseen_nonfinite == "isolated":
        fillers.append(torch.tensor([torch.nan, torch.inf, -torch.inf]))
    familiar = _unseen_by_all(case, contract)
    calls = [as_it_is(case, inputs)]
    relations: list[Balance] = []
    for number, filler in enumerate(fillers, 1):
        more = with_appended(case, inputs, contract, count, rows, filler)
        kind = "finite" if filler is None else "NaN and infinite"
        words = f"{kind} keys appended that no row of the case sees"
        calls.append(attention_call(case, words, more, familiar=familiar))
        relations += all_same(inputs, variant=rows_from(0, case["M"], 2), call=number)
    return Plan(tuple(calls), tuple(relations))


def _to_tile(length: int, multiple: int) -> int:
    """How many to append for the next multiple of a tile that is one of ``multiple`` as well."""
    more = -length % _TILE or _TILE
    return more + (-(length + more) % multiple)


def _length_padding_fits(case: Case, contract: Contract) -> bool:
    longer = case["M"] + _TILE, case["N"] + _TILE
    growth = -(-longer[0] * longer[1] // (case["M"] * case["N"]))
    moves = positional(case) or case.option("cu_seqlens")
    return affordable(case, growth) and (_padding_fits(case, contract) or not moves)


def _length_padding(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    able = _padding_fits(case, contract)
    count = _to_tile(case["N"], contract.supports.multiple_of) if able else 0
    moves = positional(case) or case.option("cu_seqlens")
    rows = count if moves else _to_tile(case["M"], 1)
    longer = with_appended(case, inputs, contract, count, rows)
    words = f"{count} keys that no row of the case sees and {rows} queries appended"
    familiar = _unseen_by_all(case, contract)
    calls = (as_it_is(case, inputs), attention_call(case, words, longer, familiar=familiar))
    return Plan(calls, all_same(inputs, variant=rows_from(0, case["M"], 2)))


def _batch_fits(case: Case, contract: Contract) -> bool:
    lengths = case.option("cu_seqlens")
    return case["B"] > 1 if lengths is None else bool(_separable(lengths, contract))


def _separable(lengths: tuple[int, ...], contract: Contract) -> list[int]:
    """Which packed sequences can be called alone."""
    several = sum(length > 0 for length in lengths) > 1
    multiple = contract.supports.multiple_of
    return [i for i, length in enumerate(lengths) if several and length and length % multiple == 0]


def _batch_independence(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    bias = inputs.options.get("bias")
    lengths = case.option("cu_seqlens")
    if lengths is None:
        b = choice(case, "batch-independence", 0, case["B"])
        tensors = {name: tensor[b : b + 1] for name, tensor in inputs.tensors.items()}
        alone = changed(inputs, **tensors, bias=sliced(bias, 0, b, b + 1))
        words, select = f"its batch entry {b} alone", rows_from(b, b + 1, 0)
    else:
        able = _separable(lengths, contract)
        i = able[choice(case, "batch-independence", 0, len(able))]
        start, stop = pieces(inputs)[i]
        tensors = {name: tensor[:, :, start:stop] for name, tensor in inputs.tensors.items()}
        ends = torch.tensor([0, stop - start], dtype=torch.int32)
        bias = sliced(sliced(bias, 2, start, stop), 3, start, stop)
        alone = changed(inputs, **tensors, bias=bias, cu_seqlens=ends)
        words, select = f"its packed sequence {i} alone", rows_from(start, stop, 2)
    calls = (as_it_is(case, inputs), attention_call(case, words, alone))
    return Plan(calls, all_same(inputs, select, bitwise=contract.batch_invariant))


def _several_heads(case: Case, contract: Contract) -> bool:
    return case["H"] > 1


def _head_independence(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    h = choice(case, "head-independence", 0, case["H"])
    g = h // (case["H"] // case["G"])
    q, k, v = inputs.tensors.values()
    sinks = inputs.options.get("sinks")
    alone = changed(
        inputs,
        q=q[:, h : h + 1],
        k=k[:, g : g + 1],
        v=v[:, g : g + 1],
        bias=sliced(inputs.options.get("bias"), 1, h, h + 1),
        sinks=None if sinks is None else sinks[h : h + 1],
    )
    calls = (as_it_is(case, inputs), attention_call(case, f"its head {h} alone", alone))
    return Plan(calls, all_same(inputs, rows_from(h, h + 1, 1)))


def _rows_fit(case: Case, contract: Contract) -> bool:
    top_left = contract.causal_alignment == "top-left" and bool(case.option("causal"))
    moves = top_left and case.option("window") is not None
    return case["M"] > 1 and not case.option("cu_seqlens") and not moves


def _row_independence(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """The last queries alone keep their positions, or the first ones where those count from the left."""
    cut = choice(case, "row-independence", 1, case["M"])
    first = contract.causal_alignment == "top-left" and bool(case.option("causal"))
    # Every other time a row alone: where kernels for decoding take over.
    if case.seed % 2:
        cut = 1 if first else case["M"] - 1
    start, stop = (0, cut) if first else (cut, case["M"])
    bias = sliced(inputs.options.get("bias"), 2, start, stop)
    alone = changed(inputs, q=inputs.tensors["q"][:, :, start:stop], bias=bias)
    calls = (as_it_is(case, inputs), attention_call(case, f"its queries {start}…{stop - 1} alone", alone))
    return Plan(calls, all_same(inputs, rows_from(start, stop, 2), bitwise=contract.row_invariant))


def _grouped(case: Case, contract: Contract) -> bool:
    return case["G"] < case["H"]


def _grouped_heads(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    _, k, v = inputs.tensors.values()
    group = case["H"] // case["G"]
    repeated = changed(inputs, k=k.repeat_interleave(group, 1), v=v.repeat_interleave(group, 1))
    calls = (as_it_is(case, inputs), attention_call(case, "each key head repeated for its queries", repeated))
    return Plan(calls, all_same(inputs))


def _causal_fits(case: Case, contract: Contract) -> bool:
    return bool(case.option("causal")) and case["M"] > 1


def _causal_future(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """Rows before row r, and keys that none of them sees; the other rows and these keys get other values."""
    r = choice(case, "causal-future", 1, case["M"])
    given = inputs.options
    masks: dict[str, Any] = {name: given.get(name) for name in ("causal", "window", "cu_seqlens")}
    seen = visible(case["M"], case["N"], **masks, causal_alignment=contract.causal_alignment)
    hidden = ~seen[:r].any(0)
    if bool(hidden.all()):
        return None
    q, k, v = inputs.tensors.values()
    later = torch.arange(case["M"]) >= r
    moved = changed(
        inputs,
        q=torch.where(later[:, None], -q, q),
        k=torch.where(hidden[:, None], -k, k),
        v=torch.where(hidden[:, None], far_values(v), v),
    )
    calls = (
        as_it_is(case, inputs),
        attention_call(case, f"other values where rows before {r} do not see", moved, familiar=False),
    )
    before = rows_from(0, r, 2)
    return Plan(calls, all_same(inputs, before, before, bitwise=contract.causality == "exact"))


ISOLATION: Mapping[str, Recipe] = {
    "masked-padding": Recipe(_padding_fits, _masked_padding),
    "batch-independence": Recipe(_batch_fits, _batch_independence),
    "head-independence": Recipe(_several_heads, _head_independence),
    "row-independence": Recipe(_rows_fit, _row_independence),
    "grouped-heads": Recipe(_grouped, _grouped_heads),
    "causal-future": Recipe(_causal_fits, _causal_future),
    "length-padding": Recipe(_length_padding_fits, _length_padding),
}
"""By name of the invariant, how it is tried on softmax attention."""
