"""Softmax attention, one scalar at a time (contract.md, "Calls" and "The edges"; Vaswani et al. 2017).

    s_j  = scale · Σ_d q_d k_jd,   then softcap · tanh(s_j / softcap),   then + bias_j
    Z    = Σ_{j seen} e^{s_j} + e^{sink}          (the last term with sinks only)
    o_e  = Σ_{j seen} (e^{s_j} / Z) · v_je,       lse = log Z

The exponentials are taken as they are, with no maximum subtracted: mpmath's exponents have no bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import mpmath

__all__ = ["softmax_attention"]

Numbers4: TypeAlias = Sequence[Sequence[Sequence[Sequence[float]]]]
MINUS_INFINITY = float("-inf")


def softmax_attention(
    q: Numbers4,
    k: Numbers4,
    v: Numbers4,
    *,
    scale: float,
    value_width: int,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: Numbers4 | None = None,
    sinks: Sequence[float] | None = None,
    cu_seqlens: Sequence[int] | None = None,
    causal_alignment: str = "bottom-right",
    digits: int = 60,
) -> tuple[list[list[list[list[Any]]]], list[list[list[Any]]]]:
    """Attention of every query.

    Args:
        q: (B, H, M, D).
        k: (B, G, N, D), H a multiple of G.
        v: (B, G, N, E).
        scale: factor of the scores.
        value_width: E, which an empty ``v`` does not show.
        causal: whether later keys are hidden.
        window: keys to the left and right of the query's position that it sees; None is no limit.
        softcap: bound of the scores' magnitude.
        bias: (B, H, M, N), added to the scores; −inf hides a key.
        sinks: (H,), a further logit of each row.
        cu_seqlens: (P + 1,), where packed sequences begin and end.
        causal_alignment: "bottom-right" or "top-left".
        digits: decimal digits of every operation.

    Returns:
        o (B, H, M, E) and lse (B, H, M), as nested lists of mpmath numbers.
    """
    mp = mpmath.MPContext()
    mp.dps = digits
    place: dict[str, Any] = {
        "causal": causal,
        "causal_alignment": causal_alignment,
        "window": window,
        "cu_seqlens": cu_seqlens,
    }
    output, logs = [], []
    for b in range(len(q)):
        output_heads, log_heads = [], []
        for h in range(len(q[b])):
            group = h // (len(q[b]) // len(k[b]))
            keys, values = k[b][group], v[b][group]
            m, n = len(q[b][h]), len(keys)
            output_rows, log_rows = [], []
            for i in range(m):
                total = mp.mpf(0)
                weighted = [mp.mpf(0) for _ in range(value_width)]
                for j in range(n):
                    if not sees(i, j, m, n, **place):
                        continue
                    offset = 0.0 if bias is None else bias[b][h][i][j]
                    if offset == MINUS_INFINITY:
                        continue
                    score = mp.mpf(0)
                    for d in range(len(keys[j])):
                        score += mp.mpf(q[b][h][i][d]) * mp.mpf(keys[j][d])
                    score = mp.mpf(scale) * score
                    if softcap is not None:
                        score = mp.mpf(softcap) * mp.tanh(score / mp.mpf(softcap))
                    weight = mp.exp(score + mp.mpf(offset))
                    total += weight
                    for e in range(value_width):
                        weighted[e] += weight * mp.mpf(values[j][e])
                if sinks is not None and sinks[h] != MINUS_INFINITY:
                    total += mp.exp(mp.mpf(sinks[h]))
                output_rows.append([x / total if total > 0 else mp.mpf(0) for x in weighted])
                log_rows.append(mp.log(total) if total > 0 else mp.mpf("-inf"))
            output_heads.append(output_rows)
            log_heads.append(log_rows)
        output.append(output_heads)
        logs.append(log_heads)
    return output, logs


def sees(
    i: int,
    j: int,
    m: int,
    n: int,
    *,
    causal: bool,
    causal_alignment: str,
    window: tuple[int | None, int | None] | None,
    cu_seqlens: Sequence[int] | None,
) -> bool:
    """Whether query i of m sees key j of n by its place (contract.md, "causal_alignment" and "The edges")."""
    position = i + n - m
    if causal and causal_alignment == "bottom-right" and j > position:
        return False
    if causal and causal_alignment == "top-left" and j > i:
        return False
    if window is not None:
        left, right = window
        if left is not None and j < position - left:
            return False
        if right is not None and j > position + right:
            return False
    if cu_seqlens is not None:
        for start, end in pairwise(cu_seqlens):
            if (start <= i < end) != (start <= j < end):
                return False
    return True
