"""Symmetries of attention (theory.md EXA-4, EXA-5), and what a call must leave as it is.

Most hold for every family whose scores do not know their place; which, the package's table says.
"""

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
    Select,
    Term,
    anything,
    generator,
    grid_step,
    other_view,
    relaid,
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
    cotangents_by,
    differentiated,
    every_gradient,
    outputs_of,
    pieces,
    positional,
    positions_as_bias,
    positions_may_go,
    same_gradients,
    takes_masks,
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
    return not case.option("alibi_slopes") and (takes_masks(contract) or not positional(case))


def _key_permutation_fits(case: Case, contract: Contract) -> bool:
    return case["N"] > 1 and _permutation_fits(case, contract)


def _key_permutation(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    free = positions_as_bias(case, inputs, contract) if positional(case) else inputs
    order = _order(case["N"], pieces(free), case, "key-permutation")
    bias = free.options.get("bias")
    by_key: Selects = (lambda x: x[:, :, order], None)
    selects = {**every_gradient(case, inputs), "k": by_key, "v": by_key}
    if isinstance(bias, torch.Tensor):
        # A mask written into the bias may have given it axes that the case's own has not.
        own = inputs.options.get("bias")
        if own is None or own.shape != bias.shape:
            selects.pop("bias", None)
        elif bias.shape[3] > 1:
            selects["bias"] = (lambda x: x[..., order], None)
        bias = bias[..., order] if bias.shape[3] > 1 else bias
    k, v = (free.tensors[name][:, :, order] for name in "kv")
    variant = attention_call(case, "its keys permuted", changed(free, k=k, v=v, bias=bias))
    relations = (*all_same(case, inputs), *same_gradients(case, inputs, selects))
    return Plan((as_it_is(case, inputs), variant), relations)


def _query_permutation_fits(case: Case, contract: Contract) -> bool:
    return case["M"] > 1 and _permutation_fits(case, contract)


def _query_permutation(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    free = positions_as_bias(case, inputs, contract) if positional(case) else inputs
    packed = pieces(free) if "cu_seqlens" in free.options else [(0, case["M"])]
    order = _order(case["M"], packed, case, "query-permutation")
    select: Select = lambda x: x[:, :, order]  # noqa: E731
    bias = free.options.get("bias")
    selects = {**every_gradient(case, inputs), "q": (select, None)}
    if isinstance(bias, torch.Tensor):
        own = inputs.options.get("bias")
        if own is None or own.shape != bias.shape:
            selects.pop("bias", None)
        elif bias.shape[2] > 1:
            selects["bias"] = (select, None)
        bias = select(bias) if bias.shape[2] > 1 else bias
    moved = changed(free, q=select(free.tensors["q"]), bias=bias, cotangents=cotangents_by(free, select))
    variant = attention_call(case, "its queries permuted", moved)
    relations = (*all_same(case, inputs, select), *same_gradients(case, inputs, selects))
    return Plan((as_it_is(case, inputs), variant), relations)


def _score_shift_fits(case: Case, contract: Contract) -> bool:
    if case.family == "batch_normalised":
        return "beta" in contract.options
    by_key = not case.option("softcap")
    return not case.option("sinks") and (by_key or takes_masks(contract))


def _score_shift(case: Case, inputs: Inputs, contract: Contract) -> Plan | None:
    """Rows of dS sum to 0: gradients do not see the shift, unless the log-sum-exp is differentiated."""
    if "lse" in inputs.cotangents:
        inputs = changed(inputs, cotangents={"o": inputs.cotangents["o"]})
    if case.family == "batch_normalised":
        # Only queries that are not centred leave a shift of the keys constant over a row.
        inputs = changed(inputs, beta=torch.zeros(case["H"], dtype=case.torch_dtype))
    by_bias = takes_masks(contract) and bool(case.option("softcap") or case.seed % 2)
    shifted = (_shift_by_bias if by_bias else _shift_by_keys)(case, inputs)
    if shifted is None:
        return None
    rounded, moved, constant, radius = shifted
    calls = (
        attention_call(case, "the case on a coarse grid", rounded, familiar=False),
        attention_call(case, "a constant added to the scores of each row of it", moved, familiar=False),
    )
    relations: list[Relation] = [same("o")]
    if "lse" in outputs_of(case, inputs):
        relations.append(same("lse", constant=constant, radius=radius))
    # The gradient by beta sees the keys themselves.
    selects = {name: both for name, both in every_gradient(case, inputs).items() if name != "beta"}
    return Plan(calls, (*relations, *same_gradients(case, inputs, selects)))


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
    q, k = inputs.tensors["q"], inputs.tensors["k"]
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
    inputs = changed(inputs, cotangents=None)
    free = positions_as_bias(case, inputs, contract)
    bias = free.options.get("bias")
    k, v = free.tensors["k"], free.tensors["v"]
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
    """The gradients of both copies of a key add up to that of the key."""
    free = positions_as_bias(case, inputs, contract)
    bias = free.options.get("bias")
    if bias is not None and bias.shape[3] > 1:
        bias = torch.cat([bias, bias], 3)
    k, v = (torch.cat([free.tensors[name]] * 2, 2) for name in "kv")
    twice = changed(free, k=k, v=v, bias=bias)
    calls = (as_it_is(case, inputs), attention_call(case, "each key and value twice", twice, familiar=False))
    relations: list[Relation] = [same("o")]
    if "lse" in outputs_of(case, inputs):
        relations.append(same("lse", constant=LOG_2[0], radius=LOG_2[1]))
    relations += same_gradients(case, inputs, {"q": (None, None), "beta": (None, None), "lam": (None, None)})
    n = case["N"]
    if inputs.cotangents:
        for name in ("dk", "dv"):
            halves = [Term(1, name, 1.0, rows_from(start, start + n, 2)) for start in (0, n)]
            relations.append(Balance((*halves, Term(0, name, -1.0))))
    return Plan(calls, tuple(relations))


def _value_linearity(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """All gradients but dv are linear in v as well, if one part only has the log-sum-exp's cotangent."""
    v = inputs.tensors["v"]
    rest = {name: torch.zeros_like(x) if name == "lse" else x for name, x in inputs.cotangents.items()}
    positive = changed(inputs, v=v.clamp(min=0))
    negative = changed(inputs, v=(-v).clamp(min=0), cotangents=rest)
    calls = (
        as_it_is(case, inputs),
        attention_call(case, "the positive part of v", positive, familiar=False),
        attention_call(case, "the negative part of v", negative, familiar=False),
    )
    linear = ["o"]
    relations: list[Relation] = []
    if "lse" in outputs_of(case, inputs):
        relations += [same("lse", call=call) for call in (1, 2)]
    if inputs.cotangents:
        linear += [f"d{name}" for name in differentiated(case, inputs) if name != "v"]
        relations += [same("dv", call=call) for call in (1, 2)]
    relations += [Balance((Term(0, name), Term(1, name, -1.0), Term(2, name))) for name in linear]
    return Plan(calls, tuple(relations))


def _convex_hull(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    values, seen = _values_seen(case, inputs, contract)
    shape = (*inputs.tensors["q"].shape[:3], values.shape[3])
    lower, upper = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
    rows = max(1, _CHUNK // max(1, values.shape[2] * values.shape[3]))
    for b, h in torch.cartesian_prod(torch.arange(case["B"]), torch.arange(case["H"])).tolist():
        for start in range(0, case["M"], rows):
            unseen = ~seen[b, h, start : start + rows, :, None]
            lower[b, h, start : start + rows] = values[b, h].masked_fill(unseen, torch.inf).amin(1)
            upper[b, h, start : start + rows] = values[b, h].masked_fill(unseen, -torch.inf).amax(1)
    if case.option("sinks"):
        # A sink is one more key, of value 0.
        lower, upper = lower.clamp(max=0.0), upper.clamp(min=0.0)
    return Plan((as_it_is(case, inputs),), (Bounds(0, "o", lower, upper),))


def _values_seen(case: Case, inputs: Inputs, contract: Contract) -> tuple[torch.Tensor, torch.Tensor]:
    """v for each query head, finite, float64, and bool (B, H, M, N) of what each query sees."""
    if case.family == "softmax":
        problem = SOFTMAX.problem(
            *inputs.tensors.values(), **inputs.options, causal_alignment=contract.causal_alignment
        )
        return problem.values().double(), problem.seen
    v = inputs.tensors["v"].repeat_interleave(case["H"] // case["G"], 1).double().nan_to_num(0.0, 0.0, 0.0)
    return v, torch.ones(case["B"], case["H"], case["M"], case["N"], dtype=torch.bool)


def _without_sinks(case: Case, contract: Contract) -> bool:
    return not case.option("sinks")


def _ones(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """Constant values: the output does not depend on scores, so that their gradients are 0."""
    v = torch.ones_like(inputs.tensors["v"])
    inputs = changed(inputs, v=v)
    if "lse" in inputs.cotangents:
        inputs = changed(inputs, cotangents={"o": inputs.cotangents["o"]})
    call = attention_call(case, "every value 1", inputs, familiar=False)
    total: torch.Tensor | float = 1.0
    if case.family == "differential":
        total = (1.0 - inputs.tensors["lam"].double()).reshape(1, -1, 1, 1)
    zeros = [f"d{name}" for name in differentiated(case, inputs) if name not in ("v", "lam")]
    relations = [Balance((Term(0, name),)) for name in (zeros if inputs.cotangents else ())]
    return Plan((call,), (Balance((Term(0, "o"),), constant=total), *relations))


def _deterministic(case: Case, contract: Contract) -> bool:
    return contract.deterministic


def _determinism(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """v of the opposite sign negates every gradient but dv, where that by the log-sum-exp turns as well."""
    turned = {name: -x if name == "lse" else x for name, x in inputs.cotangents.items()}
    opposite = changed(inputs, v=-inputs.tensors["v"], cotangents=turned)
    calls = (
        replace(as_it_is(case, inputs), repeat=True),
        attention_call(case, "v of the opposite sign", opposite),
        Call("the case once more, after a call with other values", case, inputs),
    )
    negated = ["o"]
    if inputs.cotangents:
        negated += [f"d{name}" for name in differentiated(case, inputs) if name != "v"]
    relations = (
        *all_same(case, inputs, call=2, bitwise=True),
        *same_gradients(case, inputs, every_gradient(case, inputs), call=2, bitwise=True),
        *(Balance((Term(1, name), Term(0, name, 1.0))) for name in negated),
    )
    return Plan(calls, relations)


def _inputs_unmodified(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    """The tensors in one piece of memory with NaN between them, as slices of one projection have it.

    Gates that are wider than the rest share a piece of their own.
    """
    gap, tensors = 16, dict(inputs.tensors)
    for dtype in {tensor.dtype: None for tensor in tensors.values()}:
        held = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        starts = [gap]
        for tensor in held.values():
            starts.append(starts[-1] + tensor.numel() + gap + -tensor.numel() % gap)
        memory = torch.full((starts[-1],), torch.nan, dtype=dtype)
        for (name, tensor), start in zip(held.items(), starts, strict=False):
            tensors[name] = memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
    options = {
        name: relaid(value, "sliced", name)
        if isinstance(value, torch.Tensor) and name != "cu_seqlens"
        else value
        for name, value in inputs.options.items()
    }
    cotangents = {name: relaid(x, "sliced", f"d{name}") for name, x in inputs.cotangents.items()}
    # Under a view other than "contiguous" tensors are handed over as they are, whatever the layout.
    made = Inputs(tensors, options, cotangents)
    *first, last = tensors
    words = f"{', '.join(first)} and {last} in one storage"
    shared = Call(words, replace(case, view="sliced"), made)
    relations = (*all_same(case, inputs), *same_gradients(case, inputs, every_gradient(case, inputs)))
    return Plan((as_it_is(case, inputs), shared), relations)


def _strides(case: Case, inputs: Inputs, contract: Contract) -> Plan:
    view = other_view(case, inputs, contract)
    variant = attention_call(case, f"its values laid out {view}", inputs, view=view)
    relations = (*all_same(case, inputs), *same_gradients(case, inputs, every_gradient(case, inputs)))
    return Plan((as_it_is(case, inputs), variant), relations)


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
"""By name of the invariant, how it is tried on attention."""
