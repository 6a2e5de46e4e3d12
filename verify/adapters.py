"""Calls of the suite's kernels with parameters that the contract does not have, as kernels of their own."""

from __future__ import annotations

from typing import Any

import torch

from attnproof.kernels.softmax import attention_split
from attnproof.properties.contract import contract_of, promises

__all__ = ["attention_split_in_three"]

_SPLIT = contract_of(attention_split)
assert _SPLIT is not None


@promises(_SPLIT)
def attention_split_in_three(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``attention_split`` with three splits however few keys there are, so that small cases merge too."""
    return attention_split(q, k, v, splits=3, **options)
