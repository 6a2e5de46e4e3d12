"""e^{x_i} / Σ_j e^{x_j} over the last axis (contract.md, "Calls"; −∞ entries are masked, "The edges")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mpmath

__all__ = ["softmax_row"]

MINUS_INFINITY = float("-inf")


def softmax_row(x: Sequence[float], digits: int = 60) -> list[Any]:
    """The softmax of one row, mpmath numbers; 0 at masked entries, and throughout where all are masked."""
    mp = mpmath.MPContext()
    mp.dps = digits
    exponentials = [mp.mpf(0) if logit == MINUS_INFINITY else mp.exp(mp.mpf(logit)) for logit in x]
    total = mp.mpf(0)
    for exponential in exponentials:
        total += exponential
    return [exponential / total if total > 0 else mp.mpf(0) for exponential in exponentials]
