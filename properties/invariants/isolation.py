"""Invariants of attention that say what a result does not depend on (contract.md, "The edges").

Other batch entries, heads and rows; keys that a row does not see, in the future or in the padding. What holds
for a result holds for its gradient, but that sums over heads, rows or the batch are made of their parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Contract
from attnproof.properties.families.visibility import visible
from attnproof.properties.invariants.base import (
    Balance,
    Plan,
    Recipe,
    Select,
    Term,
    far_values,
    rows_from,
)
from attnproof.properties.invariants.calls import (
    Selects,
    affordable,
    all_same,
    as_it_is,
    attention_call,
    base_call,
    changed,
    choice,
    cotangents_by,
    differentiated,
    every_gradient,
    hides_appended,
    length_given,
    pieces,
    positional,
    same_gradients,
    sliced,
    takes_masks,
    with_appended,
)

__all__ = ["ISOLATION"]

# Keys appended under a mask where the kernel takes any number of them: no multiple of any tile.
_FEW = 5
# The largest tile side in common use: lengths padded to it have no partial tile in any kernel.
_TILE = 128


def _padding_fits(case: Case, contract: Contract) -> bool:
    return (hides_appended(case, contract) or takes_masks(contract)) and _length_free(case, contract)


def _length_free(case: Case, contract: Contract) -> bool:
    """Whether the number of keys may change: sigmoid's default bias depends on it."""
    return case.family != "sigmoid" or case.option("bias") is not None or "bias" in contract.options


def _unseen_by_all(case: Case, contract: Contract) -> bool:
    """Whether appended queries do not see the appended keys either, whose values are far from the others."""
    return not hides_appended(case, contract)


def _kept_gradients(case: Case, own: Inputs, more: Inputs, *, call: int = 1) -> tuple[Balance, ...]:
    """Gradients by what the case has, in a call with more keys and queries, are the base's; others are 0."""
    m, n = case["M"], case["N"]
    selects: dict[str, Selects] = {
        **every_gradient(case, own),
        "q": (None, rows_from(0, m, 2)),
        "k": (None, rows_from(0, n, 2)),
        "v": (None, rows_from(0, n, 2)),
    }
    bias, longer = own.options.get("bias"), more.options.get("bias")
    if isinstance(bias, torch.Tensor):
        assert longer is not None
        selects["bias"] = (None, lambda x: x[:, :, : bias.shape[2], : bias.shape[3]])
        if bias.shape[3] == 1 < longer.shape[3]:
            # One entry for all keys became one for each, to hide the new ones.
            del selects["bias"]
    rest = more.tensors["k"].shape[2] - n
    kept = same_gradients(
        case, more, {name: selects[name] for name in differentiated(case, own) if name in selects}, call=call
    )
    if not rest or not more.cotangents:
        return kept
    return (*kept, *(Balance((Term(call, name, 1.0, rows_from(n, n + rest, 2)),)) for name in ("dk", "dv")))


def _masked_padding(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    own = length_given(case, inputs, contract)
    if own is None:
        return None
    multiple = contract.supports.multiple_of
    count = multiple if multiple > 1 else _FEW
    moves = positional(case) or case.option("cu_seqlens")
    rows = count if moves else 0
    fillers: list[torch.Tensor | None] = [None]
    if contract.unseen_nonfinite == "isolated":
        fillers.append(torch.tensor([torch.nan, torch.inf, -torch.inf]))
    familiar = _unseen_by_all(case, contract)
    calls = [base_call(case, inputs, own)]
    relations: list[Balance] = []
    for number, filler in enumerate(fillers, 1):
        more = with_appended(case, own, contract, count, rows, filler)
        kind = "finite" if filler is None else "NaN and infinite"
        words = f"{kind} keys appended that no row of the case sees"
        calls.append(attention_call(case, words, more, familiar=familiar))
        relations += all_same(case, inputs, variant=rows_from(0, case["M"], 2), call=number)
        relations += _kept_gradients(case, own, more, call=number)
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


def _length_padding(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    able = _padding_fits(case, contract)
    own = length_given(case, inputs, contract) if able else inputs
    if own is None:
        return None
    count = _to_tile(case["N"], contract.supports.multiple_of) if able else 0
    moves = positional(case) or case.option("cu_seqlens")
    rows = count if moves else _to_tile(case["M"], 1)
    longer = with_appended(case, own, contract, count, rows)
    words = f"{count} keys that no row of the case sees and {rows} queries appended"
    familiar = _unseen_by_all(case, contract)
    calls = (base_call(case, inputs, own), attention_call(case, words, longer, familiar=familiar))
    relations = all_same(case, inputs, variant=rows_from(0, case["M"], 2))
    return Plan(calls, (*relations, *_kept_gradients(case, own, longer)))


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
    own_bias: Select | None = None
    if lengths is None:
        b = choice(case, "batch-independence", 0, case["B"])
        words, select = f"its batch entry {b} alone", rows_from(b, b + 1, 0)
        alone = changed(inputs, bias=sliced(bias, 0, b, b + 1))
        if isinstance(bias, torch.Tensor) and bias.shape[0] > 1:
            own_bias = select
    else:
        able = _separable(lengths, contract)
        i = able[choice(case, "batch-independence", 0, len(able))]
        start, stop = pieces(inputs)[i]
        words, select = f"its packed sequence {i} alone", rows_from(start, stop, 2)
        ends = torch.tensor([0, stop - start], dtype=torch.int32)
        bias = sliced(sliced(bias, 2, start, stop), 3, start, stop)
        alone = changed(inputs, bias=bias, cu_seqlens=ends)
        if isinstance(bias, torch.Tensor) and min(inputs.options["bias"].shape[2:]) > 1:
            own_bias = lambda x: x[:, :, start:stop, start:stop]  # noqa: E731
    cut: dict[str, Any] = {name: select(inputs.tensors[name]) for name in "qkv"}
    alone = changed(alone, **cut, cotangents=cotangents_by(inputs, select))
    selects: dict[str, Selects] = dict.fromkeys("qkv", (select, None))
    if own_bias is not None:
        selects["bias"] = (own_bias, None)
    calls = (as_it_is(case, inputs), attention_call(case, words, alone))
    relations = all_same(case, inputs, select, bitwise=contract.batch_invariant)
    return Plan(calls, (*relations, *same_gradients(case, inputs, selects)))


def _several_heads(case: Case, contract: Contract) -> bool:
    return case["H"] > 1


def _head_independence(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """One query head with its key head; all that share it where there are gradients, which sum over them."""
    group = case["H"] // case["G"]
    h = choice(case, "head-independence", 0, case["H"])
    g = h // group
    whole = bool(inputs.cotangents) and case["G"] > 1
    start, stop = (g * group, (g + 1) * group) if whole else (h, h + 1)
    select, key_select = rows_from(start, stop, 1), rows_from(g, g + 1, 1)
    changes: dict[str, Any] = {name: key_select(inputs.tensors[name]) for name in "kv"}
    changes["q"] = select(inputs.tensors["q"])
    given = {**inputs.tensors, **inputs.options}
    for name in ("sinks", "alibi_slopes", "beta", "lam", "pool"):
        if given.get(name) is not None:
            changes[name] = given[name][start:stop]
    bias = inputs.options.get("bias")
    changes["bias"] = sliced(bias, 1, start, stop)
    alone = changed(inputs, **changes, cotangents=cotangents_by(inputs, select))
    selects: dict[str, Selects] = {"q": (select, None)}
    selects |= dict.fromkeys(("sinks", "beta", "lam"), (rows_from(start, stop, 0), None))
    if whole or group == 1:
        selects |= dict.fromkeys("kv", (key_select, None))
    if isinstance(bias, torch.Tensor) and bias.shape[1] > 1:
        selects["bias"] = (select, None)
    which = f"head {h}" if stop - start == 1 else f"heads {start}…{stop - 1}"
    calls = (as_it_is(case, inputs), attention_call(case, f"its {which} alone", alone))
    return Plan(calls, (*all_same(case, inputs, select), *same_gradients(case, inputs, selects)))


def _rows_fit(case: Case, contract: Contract) -> bool:
    top_left = contract.causal_alignment == "top-left" and bool(case.option("causal"))
    aligned_right = case.option("window") is not None or case.option("alibi_slopes")
    return case["M"] > 1 and not case.option("cu_seqlens") and not (top_left and aligned_right)


def _row_independence(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """The last queries alone keep their positions, or the first ones where those count from the left."""
    cut = choice(case, "row-independence", 1, case["M"])
    first = contract.causal_alignment == "top-left" and bool(case.option("causal"))
    # Every other time a row alone: where kernels for decoding take over.
    if case.seed % 2:
        cut = 1 if first else case["M"] - 1
    start, stop = (0, cut) if first else (cut, case["M"])
    select = rows_from(start, stop, 2)
    bias = inputs.options.get("bias")
    alone = changed(
        inputs,
        q=select(inputs.tensors["q"]),
        bias=sliced(bias, 2, start, stop),
        cotangents=cotangents_by(inputs, select),
    )
    selects: dict[str, Selects] = {"q": (select, None)}
    if isinstance(bias, torch.Tensor) and bias.shape[2] > 1:
        selects["bias"] = (select, None)
    calls = (as_it_is(case, inputs), attention_call(case, f"its queries {start}…{stop - 1} alone", alone))
    relations = all_same(case, inputs, select, bitwise=contract.row_invariant)
    return Plan(calls, (*relations, *same_gradients(case, inputs, selects)))


def _grouped(case: Case, contract: Contract) -> bool:
    return case["G"] < case["H"]


def _grouped_heads(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """The gradients of a shared head are the sums of those of its copies."""
    group = case["H"] // case["G"]
    copies = {name: inputs.tensors[name].repeat_interleave(group, 1) for name in "kv"}
    calls = (
        as_it_is(case, inputs),
        attention_call(case, "each key head repeated for its queries", changed(inputs, **copies)),
    )
    others = {name: select for name, select in every_gradient(case, inputs).items() if name not in ("k", "v")}
    relations = [*all_same(case, inputs), *same_gradients(case, inputs, others)]
    if inputs.cotangents:
        for name in ("dk", "dv"):
            parts = [Term(1, name, 1.0, _each(group, start, 1)) for start in range(group)]
            relations.append(Balance((*parts, Term(0, name, -1.0))))
    return Plan(calls, tuple(relations))


def _each(step: int, start: int, axis: int) -> Select:
    """Select every ``step``-th entry of an axis, from ``start``."""
    return lambda x: x.movedim(axis, 0)[start::step].movedim(0, axis)


def _causal_fits(case: Case, contract: Contract) -> bool:
    return bool(case.option("causal")) and case["M"] > 1


def _causal_future(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """Rows before row r, and keys that none of them sees; the other rows and these keys get other values.

    The other way round, these keys' gradients do not depend on the rows before r.
    """
    r = choice(case, "causal-future", 1, case["M"])
    given = inputs.options
    masks: dict[str, Any] = {name: given.get(name) for name in ("causal", "window", "cu_seqlens")}
    seen = visible(case["M"], case["N"], **masks, causal_alignment=contract.causal_alignment)
    hidden = ~seen[:r].any(0)
    if bool(hidden.all()):
        return None
    q, k, v = (inputs.tensors[name] for name in "qkv")
    later = (torch.arange(case["M"]) >= r)[:, None]
    moved = changed(
        inputs,
        q=torch.where(later, -q, q),
        k=torch.where(hidden[:, None], -k, k),
        v=torch.where(hidden[:, None], far_values(v), v),
    )
    words = f"other values where rows before {r} do not see"
    calls = [as_it_is(case, inputs), attention_call(case, words, moved, familiar=False)]
    before = rows_from(0, r, 2)
    relations = [
        *all_same(case, inputs, before, before, bitwise=contract.causality == "exact"),
        *same_gradients(case, inputs, {"q": (before, before)}),
    ]
    if inputs.cotangents and bool(hidden.any()):
        after = torch.arange(case["M"]) >= r
        other = changed(
            inputs,
            q=torch.where(later, q, -q),
            cotangents=cotangents_by(
                inputs, lambda x: torch.where(after.reshape(-1, *[1] * (x.dim() - 3)), x, -x)
            ),
        )
        calls.append(
            attention_call(case, f"other queries and cotangents before row {r}", other, familiar=False)
        )
        selects: dict[str, Selects] = dict.fromkeys("kv", (lambda x: x[:, :, hidden],) * 2)
        relations += same_gradients(case, inputs, selects, call=2)
    return Plan(tuple(calls), tuple(relations))


ISOLATION: Mapping[str, Recipe] = {
    "masked-padding": Recipe(_padding_fits, _masked_padding),
    "batch-independence": Recipe(_batch_fits, _batch_independence),
    "head-independence": Recipe(_several_heads, _head_independence),
    "row-independence": Recipe(_rows_fit, _row_independence),
    "grouped-heads": Recipe(_grouped, _grouped_heads),
    "causal-future": Recipe(_causal_fits, _causal_future),
    "length-padding": Recipe(_length_padding_fits, _length_padding),
}
"""By name of the invariant, how it is tried on attention."""
