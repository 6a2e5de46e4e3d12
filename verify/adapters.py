"""Calls of the suite's kernels with parameters that the contract does not have, as kernels of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from attnproof.kernels import (
    delta,
    gated_linear,
    linear,
    mlstm,
    prefix_scan,
    retention,
    rwkv4,
    rwkv6,
    selective_scan,
    ssd,
    ssm,
)
from attnproof.kernels.softmax import attention_split
from attnproof.properties.contract import contract_of, promises
from attnproof.properties.signatures import SIGNATURES

__all__ = [
    "HANDED_OVER",
    "attention_split_in_three",
    "delta_handed_over",
    "gated_linear_handed_over",
    "linear_handed_over",
    "mlstm_handed_over",
    "prefix_scan_handed_over",
    "retention_handed_over",
    "rwkv4_handed_over",
    "rwkv6_handed_over",
    "selective_scan_handed_over",
    "ssd_handed_over",
    "ssm_handed_over",
]

_SPLIT = contract_of(attention_split)
assert _SPLIT is not None


@promises(_SPLIT)
def attention_split_in_three(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``attention_split`` with three splits however few keys there are, so that small cases merge too."""
    return attention_split(q, k, v, splits=3, **options)


# The gradient of a parameter is rounded to its dtype once in each of the four calls, which no kernel's budget
# allows for.
_WITH_PARAMETERS = ("ssm", "selective_scan", "ssd", "prefix_scan", "rwkv4")


def _along_the_sequence(family: str, tensors: tuple[Any, ...]) -> list[bool]:
    """Which positional tensors have positions, on axis 2: no parameters, and no tensor that is left out."""
    axes = SIGNATURES[family].tensors.values()
    return [x is not None and "N" in symbols for x, symbols in zip(tensors, axes, strict=False)]


def _handed_over(first: Callable[..., Any], later: Callable[..., Any]) -> Callable[..., Any]:
    """A sequence in four calls, of ``first`` and ``later`` in turn, each from the state of the one before.

    The second of them and the last get no positions at all: an empty part must hand over what it was given.
    """
    declared = contract_of(first)
    assert declared is not None
    options = tuple(name for name in declared.options if name not in ("cu_seqlens", "causal"))
    contract = replace(declared, options=options)
    if contract.family in _WITH_PARAMETERS:
        contract = replace(contract, differentiable=False)

    @promises(contract)
    @functools.wraps(first)
    def handed_over(
        *tensors: Any, initial_state: Any = None, return_state: bool = False, **keywords: Any
    ) -> Any:
        sliced = _along_the_sequence(contract.family, tensors)
        length = next(x.shape[2] for x, along in zip(tensors, sliced, strict=True) if along)
        state, outputs, gate = initial_state, [], keywords.pop("z", None)
        cuts = (0, length // 3, length // 3, length, length)
        for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            part = [x[:, :, start:stop] if along else x for x, along in zip(tensors, sliced, strict=True)]
            kernel = later if number % 2 else first
            if gate is not None:
                keywords["z"] = gate[:, :, start:stop]
            o, *states = kernel(*part, initial_state=state, return_state=True, **keywords)
            state = tuple(states) if len(states) > 1 else states[0]
            outputs.append(o)
        o = torch.cat(outputs, 2)
        if not return_state:
            return o
        return (o, *state) if isinstance(state, tuple) else (o, state)

    return handed_over


linear_handed_over = _handed_over(linear.attention, linear.recurrent)
gated_linear_handed_over = _handed_over(gated_linear.attention, gated_linear.recurrent)
retention_handed_over = _handed_over(retention.recurrent, retention.attention)
rwkv6_handed_over = _handed_over(rwkv6.attention, rwkv6.recurrent)
mlstm_handed_over = _handed_over(mlstm.attention_recurrent, mlstm.attention)
delta_handed_over = _handed_over(delta.recurrent, delta.attention)
ssm_handed_over = _handed_over(ssm.convolution, ssm.scan)
selective_scan_handed_over = _handed_over(selective_scan.scan, selective_scan.recurrent)
ssd_handed_over = _handed_over(ssd.attention, ssd.recurrent)
prefix_scan_handed_over = _handed_over(prefix_scan.attention, prefix_scan.blelloch)
rwkv4_handed_over = _handed_over(rwkv4.recurrent, rwkv4.attention)

HANDED_OVER = tuple(name for name in __all__ if name.endswith("handed_over"))
"""Names of the adapters that split a sequence and hand its state over."""
