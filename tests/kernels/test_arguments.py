"""Errors of the attention entry points: they name the argument, what it was, and what the contract asks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.kernels.softmax import attention, attention_split
from attnproof.properties.contract import ContractError

ENTRIES: list[Any] = [attention, attention_split]


def packed(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 2, 37, 16), torch.randn(1, 2, 53, 16), torch.randn(1, 2, 53, 16)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.randn(2, 3, 4)}, r"q has shape \(2, 3, 4\): expected 4 axes"),
    ({"k": torch.randn(1, 2, 53, 16).half()}, "k is torch.float16 while q is torch.float32"),
    ({"k": torch.randn(3, 2, 53, 16)}, "the batch"),
    ({"k": torch.randn(1, 2, 52, 16)}, "k and v must agree in heads and length"),
    ({"k": torch.randn(1, 2, 53, 17)}, "q and k must agree in the last axis"),
    ({"q": torch.randn(1, 3, 37, 16)}, "3 query heads must be a positive multiple of 2 key heads"),
    ({"q": torch.randn(1, 2, 37, 0), "k": torch.randn(1, 2, 53, 0)}, "width D is 0"),
    ({"v": torch.zeros(1, 2, 53, 16, dtype=torch.int32)}, "v has dtype torch.int32"),
    ({"v": [1.0]}, "v is a list"),
    ({"k": torch.randn(1, 2, 53, 16, device="meta")}, "k is on meta while q is on"),
    ({"scale": math.nan}, "scale=nan: expected a finite Python number"),
    ({"softcap": 0.0}, "softcap=0.0: expected a finite number above 0"),
    ({"softcap": -1.0}, "softcap=-1.0"),
    ({"window": 3}, r"window=3: expected a pair"),
    ({"window": (-1, 0)}, r"window=\(-1, 0\): each side is a number of keys ≥ 0"),
    ({"window": (1.5, None)}, "window"),
    ({"bias": torch.zeros(5)}, r"bias has shape \(5,\): it must broadcast to .* = \(1, 2, 37, 53\)"),
    ({"bias": torch.zeros(53).half()}, "bias is torch.float16 while q is torch.float32"),
    ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\): expected one a query head, \(2,\)"),
    ({"causal_alignment": "left"}, "causal_alignment='left': expected one of 'bottom-right', 'top-left'"),
    ({"input_precision": "bf16"}, "input_precision='bf16'"),
    ({"block_m": 24}, "block_m=24: expected a power of two"),
    ({"cu_seqlens": packed(0, 53)}, "it asks for B = 1 and M = N"),
    ({"q": torch.randn(1, 2, 53, 16), "cu_seqlens": packed(0, 50)}, "to rise from 0 to the length 53"),
    ({"q": torch.randn(1, 2, 53, 16), "cu_seqlens": packed(0, 30, 20, 53)}, "expected to rise"),
    ({"q": torch.randn(1, 2, 53, 16), "cu_seqlens": packed(0, 53).long()}, "cu_seqlens is torch.int64"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    q, k, v = tensors()
    call: dict[str, Any] = {"q": q, "k": k, "v": v, "scale": 0.25} | change
    with pytest.raises(ContractError, match=message):
        attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


def test_declined() -> None:
    q, k, v = tensors()
    for entry in ENTRIES:
        with pytest.raises(NotImplementedError, match="q is float64"):
            entry(q.double(), k.double(), v.double(), scale=0.25)
        wide = torch.randn(1, 2, 5, 257)
        with pytest.raises(NotImplementedError, match="width D is 257"):
            entry(wide, wide, wide, scale=0.25)


@pytest.mark.parametrize("splits", [0, -1, 1.5, True])
def test_splits_must_be_positive(splits: Any) -> None:
    with pytest.raises(ContractError, match="splits="):
        attention_split(*tensors(), scale=0.25, splits=splits)
