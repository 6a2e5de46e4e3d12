"""Calls of softmax attention made from other calls: other tensors and options, and their case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Contract
from attnproof.properties.families.softmax import SOFTMAX
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

__all__ = [
    "affordable",
    "all_same",
    "as_it_is",
    "attention_call",
    "changed",
    "choice",
    "hides_appended",
    "outputs_of",
    "pieces",
    "positional",
    "positions_as_bias",
    "positions_may_go",
    "sliced",
    "with_appended",
]

_LAID_OUT = ("bias", "sinks")
# Longer calls than this (B·H·M·N·(D + E) multiplications) are not made longer still: twice what a planned
# case takes at most.
_MOST_WORK = 2**25


def changed(inputs: Inputs, **changes: Any) -> Inputs:
    """``inputs`` with tensors q, k, v or options replaced; None takes an option away."""
    tensors = {name: changes.pop(name, tensor) for name, tensor in inputs.tensors.items()}
    options = {name: value for name, value in {**inputs.options, **changes}.items() if value is not None}
    return Inputs(tensors, options)


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
        name: relaid(value, view, name) if name in _LAID_OUT else value
        for name, value in inputs.options.items()
    }
    return Call(words, case_of(case, Inputs(tensors, options), view), Inputs(tensors, options), familiar)


def case_of(case: Case, inputs: Inputs, view: str) -> Case:
    """``case`` with the shape and the options of ``inputs``."""
    q, k, v = inputs.tensors.values()
    sizes = {"B": q.shape[0], "H": q.shape[1], "G": k.shape[1], "M": q.shape[2], "N": k.shape[2]}
    sizes |= {"D": q.shape[3], "E": v.shape[3]}
    given = inputs.options
    options = {name: given.get(name) for name in ("causal", "window", "softcap", "return_lse")}
    if given.get("causal"):
        options["causal_alignment"] = case.option("causal_alignment")
    if given.get("bias") is not None:
        axes = zip("bhmn", given["bias"].shape, strict=True)
        options["bias"] = "".join("1" if size == 1 else axis for axis, size in axes)
    options["sinks"] = given.get("sinks") is not None
    if given.get("cu_seqlens") is not None:
        options["cu_seqlens"] = tuple(given["cu_seqlens"].diff().tolist())
    return replace(case, shape=tuple(sizes.items()), options=tuple(options.items()), view=view)


def positional(case: Case) -> bool:
    """Whether what a query sees depends on its distance to the key."""
    return bool(case.option("causal")) or case.option("window") is not None


def positions_may_go(case: Case, contract: Contract) -> bool:
    """Whether the case has no mask by position, or the kernel takes one as a bias."""
    return "bias" in contract.options or not (positional(case) or case.option("cu_seqlens"))


def positions_as_bias(case: Case, inputs: Inputs, contract: Contract) -> Inputs:
    """The same call with causal mask, window and packing written as −inf in the bias; all are gone then."""
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
            others.
    """
    q, k, v = inputs.tensors.values()
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
    }
    bias = inputs.options.get("bias")
    if inputs.options.get("cu_seqlens") is not None:
        ends = inputs.options["cu_seqlens"]
        changes["cu_seqlens"] = torch.cat([ends, ends[-1:] + count])
    if bias is not None or (count and not hidden):
        bias = torch.zeros(1, 1, 1, 1, dtype=q.dtype) if bias is None else bias
        changes["bias"] = _grown(bias, k.shape[2], count, rows, 0.0 if hidden else -torch.inf)
    return changed(inputs, **changes)


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


def outputs_of(inputs: Inputs) -> tuple[str, ...]:
    """Names of the outputs that a call returns."""
    return SOFTMAX.problem_outputs(inputs.options)


def all_same(
    inputs: Inputs, base: Select | None = None, variant: Select | None = None, **how: Any
) -> tuple[Balance, ...]:
    """Every output of the variant is the base's; see :func:`same`."""
    return tuple(same(output, base, variant, **how) for output in outputs_of(inputs))


def choice(case: Case, name: str, low: int, high: int) -> int:
    """A number from low to high − 1, the same each time."""
    return int(torch.randint(low, high, (), generator=generator(case, name)))


def affordable(case: Case, factor: int = 1) -> bool:
    """Whether a call of ``factor`` times the case's work is quick."""
    sizes = case.sizes
    work = sizes["B"] * sizes["H"] * sizes["M"] * sizes["N"] * (sizes["D"] + sizes["E"])
    return work * factor <= _MOST_WORK


def sliced(tensor: torch.Tensor | None, axis: int, start: int, stop: int) -> torch.Tensor | None:
    """The slice of an axis, whole where it broadcasts."""
    if tensor is None or tensor.shape[axis] == 1:
        return tensor
    return tensor.narrow(axis, start, stop - start)
