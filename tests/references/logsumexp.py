"""log Σ_j e^{x_j} over the last axis (contract.md, "Calls"; −∞ entries are masked, "The edges")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mpmath

__all__ = ["logsumexp"]

MINUS_INFINITY = float("-inf")


def logsumexp(x: Sequence[float], digits: int = 60) -> Any:
    """The log-sum-exp of one row, an mpmath number; −inf for a row that is empty or masked throughout."""
    mp = mpmath.MPContext()
    mp.dps = digits
    total = mp.mpf(0)
    for logit in x:
        if logit != MINUS_INFINITY:
            total += mp.exp(mp.mpf(logit))
    return mp.log(total) if total > 0 else mp.mpf("-inf")
