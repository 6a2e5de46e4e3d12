"""Symmetries of softmax attention (theory.md EXA-4, EXA-5), and what a call must leave as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Contract
from attnproof.properties.families.softmax import SOFTMAX
from attnproof.properties.invariants.base import (
    LOG_2,
    Balance,
    Bounds,
    Call,
    Merge,
    Plan,
    Recipe,
    Relation,
    Term,
    anything,
    generator,
    grid_step,
    other_view,
    relaid,
    same,
)
from attnproof.properties.invariants.calls import (
    affordable,
    all_same,
    as_it_is,
    attention_call,
    changed,
    choice,
    outputs_of,
    pieces,
    positional,
    positions_as_bias,
    positions_may_go,
)

__all__ = ["SYMMETRIES"]

# Elements of (rows, N, E) that the hull of V is computed over at a time.
_CHUNK = 2**22


def _order(length: int, parts: list[tuple[int, int]], case: Case, name: str) -> torch.Tensor:
    """A permutation of 0…length − 1 that leaves each part in its place."""
    random = generator(case, name)
    order = torch.arange(length)
    for start, stop in parts:
        order[start:stop] = start + torch.randperm(stop - start, generator=random)
    return order


def _permutation_fits(case: Case, contract: Contract) -> bool:
    return "bias" in contract.options or not positional(case)


def _key_permutation_fits(case: Case, contract: Contract) -> bool:
    return case["N"] > 1 and _permutation_fits(case, contract)


def _key_permutation(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    free = positions_as_bias(case, inputs, contract) if positional(case) else inputs
    order = _order(case["N"], pieces(free), case, "key-permutation")
    bias = free.options.get("bias")
    if bias is not None and bias.shape[3] > 1:
        bias = bias[..., order]
    _, k, v = free.tensors.values()
    moved = changed(free, k=k[:, :, order], v=v[:, :, order], bias=bias)
    return Plan((as_it_is(case, inputs), attention_call(case, "its keys permuted", moved)), all_same(inputs))


def _query_permutation_fits(case: Case, contract: Contract) -> bool:
    return case["M"] > 1 and _permutation_fits(case, contract)


def _query_permutation(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    free = positions_as_bias(case, inputs, contract) if positional(case) else inputs
    packed = pieces(free) if "cu_seqlens" in free.options else [(0, case["M"])]
    order = _order(case["M"], packed, case, "query-permutation")
    bias = free.options.get("bias")
    if bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, order]
    moved = changed(free, q=free.tensors["q"][:, :, order], bias=bias)
    variant = attention_call(case, "its queries permuted", moved)
    return Plan((as_it_is(case, inputs), variant), all_same(inputs, lambda y: y[:, :, order]))


def _score_shift_fits(case: Case, contract: Contract) -> bool:
    by_key = not case.option("softcap")
    return not case.option("sinks") and (by_key or "bias" in contract.options)


def _score_shift(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    by_bias = "bias" in contract.options and bool(case.option("softcap") or case.seed % 2)
    shifted = (_shift_by_bias if by_bias else _shift_by_keys)(case, inputs)
    if shifted is None:
        return None
    rounded, moved, constant, radius = shifted
    calls = (
        attention_call(case, "the case on a coarse grid", rounded, familiar=False),
        attention_call(case, "a constant added to the scores of each row of it", moved, familiar=False),
    )
    relations: list[Relation] = [same("o")]
    if "lse" in outputs_of(inputs):
        relations.append(same("lse", constant=constant, radius=radius))
    return Plan(calls, tuple(relations))


Shifted = tuple[Inputs, Inputs, torch.Tensor, torch.Tensor | float]


def _shift_by_bias(case: Case, inputs: Inputs) -> Shifted | None:
    """Inputs on a grid, with c_i added to the bias of row i, and the constant c_i (B, H, M) or alike."""
    q, bias = inputs.tensors["q"], inputs.options.get("bias")
    base = inputs
    start = torch.zeros(1, 1, q.shape[2], 1, dtype=q.dtype)
    step = 0.25
    if bias is not None:
        found = grid_step(bias)
        if found is None:
            return None
        step = found
        start = ((bias.double() / step).round() * step).to(bias.dtype)
        base = changed(inputs, bias=start)
    shape = (*start.shape[:3], 1)
    draw = torch.randint(-64, 65, shape, generator=generator(case, "score-shift"))
    shift = draw.double() * step
    moved = changed(inputs, bias=(start.double() + shift).to(start.dtype))
    return base, moved, shift[..., 0], 0.0


def _shift_by_keys(case: Case, inputs: Inputs) -> Shifted | None:
    """Inputs with k on a grid, and with μ added to every key: scores of row i move by scale · q_i·μ."""
    q, k, _ = inputs.tensors.values()
    step = grid_step(k)
    if step is None:
        return None
    rounded = (k.double() / step).round() * step
    draw = torch.randint(-64, 65, (k.shape[3],), generator=generator(case, "score-shift"))
    mu, scale = draw.double() * step, float(inputs.options["scale"])
    base = changed(inputs, k=rounded.to(k.dtype))
    moved = changed(inputs, k=(rounded + mu).to(k.dtype))
    finite = torch.where(q.isfinite(), q, torch.zeros((), dtype=q.dtype)).double()
    # Products of 24 and 7 bits are exact in float64; each of the D sums and the scaling rounds once.
    unit = (k.shape[3] + 2.0) * 2.0**-52
    return base, moved, scale * (finite @ mu), unit * abs(scale) * (finite.abs() @ mu.abs())


def _cut(case: Case, contract: Contract) -> int | None:
    """Where the keys are cut in two, a multiple of what the kernel asks; None if they cannot be."""
    multiple = contract.supports.multiple_of
    places = (case["N"] - 1) // multiple
    return multiple * choice(case, "split-merge", 1, places + 1) if places >= 1 else None


def _split_merge_fits(case: Case, contract: Contract) -> bool:
    able = "return_lse" in contract.options and positions_may_go(case, contract)
    return able and (case["N"] - 1) // contract.supports.multiple_of >= 1


def _split_merge(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    cut = _cut(case, contract)
    if cut is None:
        return None
    free = positions_as_bias(case, inputs, contract)
    bias = free.options.get("bias")
    _, k, v = free.tensors.values()
    calls = [attention_call(case, "the case with its log-sum-exp", changed(inputs, return_lse=True))]
    for words, keys in ((f"its first {cut} keys", slice(cut)), ("its other keys", slice(cut, None))):
        cut_bias = bias[..., keys] if bias is not None and bias.shape[3] > 1 else bias
        part = changed(free, k=k[:, :, keys], v=v[:, :, keys], bias=cut_bias, return_lse=True)
        # A sink enters the normaliser once.
        part = part if keys.start is None else changed(part, sinks=None)
        calls.append(attention_call(case, words, part))
    return Plan(tuple(calls), (Merge(0, (1, 2)),))


def _duplication_fits(case: Case, contract: Contract) -> bool:
    return positions_may_go(case, contract) and not case.option("sinks") and affordable(case, 2)


def _key_duplication(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    free = positions_as_bias(case, inputs, contract)
    bias = free.options.get("bias")
    if bias is not None and bias.shape[3] > 1:
        bias = torch.cat([bias, bias], 3)
    _, k, v = free.tensors.values()
    twice = changed(free, k=torch.cat([k, k], 2), v=torch.cat([v, v], 2), bias=bias)
    calls = (as_it_is(case, inputs), attention_call(case, "each key and value twice", twice, familiar=False))
    relations = [same("o")]
    if "lse" in outputs_of(inputs):
        relations.append(same("lse", constant=LOG_2[0], radius=LOG_2[1]))
    return Plan(calls, tuple(relations))


def _value_linearity(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    v = inputs.tensors["v"]
    calls = (
        as_it_is(case, inputs),
        attention_call(case, "the positive part of v", changed(inputs, v=v.clamp(min=0)), familiar=False),
        attention_call(case, "the negative part of v", changed(inputs, v=(-v).clamp(min=0)), familiar=False),
    )
    parts = (Term(0, "o"), Term(1, "o", -1.0), Term(2, "o"))
    weights = [same("lse", call=call) for call in (1, 2)] if "lse" in outputs_of(inputs) else []
    return Plan(calls, (Balance(parts), *weights))


def _convex_hull(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    problem = SOFTMAX.problem(
        *inputs.tensors.values(), **inputs.options, causal_alignment=contract.causal_alignment
    )
    values = problem.values().double()
    lower, upper = (torch.empty(problem.shape("o"), dtype=torch.float64) for _ in range(2))
    rows = max(1, _CHUNK // max(1, values.shape[2] * values.shape[3]))
    for b, h in torch.cartesian_prod(torch.arange(case["B"]), torch.arange(case["H"])).tolist():
        for start in range(0, case["M"], rows):
            unseen = ~problem.seen[b, h, start : start + rows, :, None]
            lower[b, h, start : start + rows] = values[b, h].masked_fill(unseen, torch.inf).amin(1)
            upper[b, h, start : start + rows] = values[b, h].masked_fill(unseen, -torch.inf).amax(1)
    if problem.sinks is not None:
        # A sink is one more key, of value 0.
        lower, upper = lower.clamp(max=0.0), upper.clamp(min=0.0)
    return Plan((as_it_is(case, inputs),), (Bounds(0, "o", lower, upper),))


def _without_sinks(case: Case, contract: Contract) -> bool:
    return not case.option("sinks")


def _ones(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    v = torch.ones_like(inputs.tensors["v"])
    call = attention_call(case, "every value 1", changed(inputs, v=v), familiar=False)
    return Plan((call,), (Balance((Term(0, "o"),), constant=1.0),))


def _deterministic(case: Case, contract: Contract) -> bool:
    return contract.deterministic


def _determinism(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    opposite = changed(inputs, v=-inputs.tensors["v"])
    calls = (
        replace(as_it_is(case, inputs), repeat=True),
        attention_call(case, "v of the opposite sign", opposite),
        Call("the case once more, after a call with other values", case, inputs),
    )
    negated = Balance((Term(1, "o"), Term(0, "o", 1.0)))
    return Plan(calls, (*all_same(inputs, call=2, bitwise=True), negated))


def _inputs_unmodified(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """q, k and v in one piece of memory with NaN between them, as slices of one projection have it."""
    gap = 16
    sizes = [tensor.numel() for tensor in inputs.tensors.values()]
    starts = [gap]
    for size in sizes:
        starts.append(starts[-1] + size + gap + -size % gap)
    memory = torch.full((starts[-1],), torch.nan, dtype=case.torch_dtype)
    tensors = {}
    for (name, tensor), start, size in zip(inputs.tensors.items(), starts, sizes, strict=False):
        tensors[name] = memory[start : start + size].view(tensor.shape).copy_(tensor)
    options = {
        name: relaid(value, "sliced", name)
        if isinstance(value, torch.Tensor) and name != "cu_seqlens"
        else value
        for name, value in inputs.options.items()
    }
    # Under a view other than "contiguous" tensors are handed over as they are, whatever the layout.
    shared = Call("q, k and v in one storage", replace(case, view="sliced"), Inputs(tensors, options))
    return Plan((as_it_is(case, inputs), shared), all_same(inputs))


def _strides(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    view = other_view(case, inputs, contract)
    variant = attention_call(case, f"its values laid out {view}", inputs, view=view)
    return Plan((as_it_is(case, inputs), variant), all_same(inputs))


SYMMETRIES: Mapping[str, Recipe] = {
    "key-permutation": Recipe(_key_permutation_fits, _key_permutation),
    "query-permutation": Recipe(_query_permutation_fits, _query_permutation),
    "score-shift": Recipe(_score_shift_fits, _score_shift),
    "split-merge": Recipe(_split_merge_fits, _split_merge),
    "key-duplication": Recipe(_duplication_fits, _key_duplication),
    "value-linearity": Recipe(anything, _value_linearity),
    "convex-hull": Recipe(anything, _convex_hull),
    "ones": Recipe(_without_sinks, _ones),
    "determinism": Recipe(_deterministic, _determinism),
    "inputs-unmodified": Recipe(anything, _inputs_unmodified),
    "strides": Recipe(anything, _strides),
}
"""By name of the invariant, how it is tried on softmax attention."""
