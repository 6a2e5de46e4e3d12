"""Which keys each row sees, from a case's options alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["seen_keys"]


def seen_keys(
    sizes: Mapping[str, int], options: Mapping[str, Any], bias: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.bool_]:
    """The keys that each row sees, by ``causal``, ``window``, ``cu_seqlens`` and −inf in ``bias``.

    Args:
        sizes: symbol to size (B, H, M, N).
        options: plain values, as a case has them.
        bias: values that broadcast to (B, H, M, N), or None.

    Returns:
        (B, H, M, N), True where the row sees the key (contract.md, the edges).
    """
    rows, keys = sizes["M"], sizes["N"]
    top_left = options.get("causal_alignment") == "top-left"
    key = np.arange(keys)[None, :]
    row = np.arange(rows)[:, None]
    position = row + (keys - rows)
    seen = np.ones((rows, keys), dtype=bool)
    if options.get("causal"):
        seen &= key <= (row if top_left else position)
    if "window" in options:
        left, right = options["window"]
        if left is not None:
            seen &= key >= position - left
        if right is not None:
            seen &= key <= position + right
    if "cu_seqlens" in options:
        sequence = np.repeat(np.arange(len(options["cu_seqlens"])), options["cu_seqlens"])
        seen &= sequence[:, None] == sequence[None, :]
    full = np.broadcast_to(seen, (sizes["B"], sizes["H"], rows, keys))
    return full if bias is None else full & ~np.isneginf(bias)
