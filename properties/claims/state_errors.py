"""Claims about states in floating point: range of the factored form, error against N. Theory.md GLA-2, "
"GLA-5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flint
import numpy as np
import torch

from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.forms import gated, growth

__all__ = ["CHUNKS", "LENGTHS", "bounded_growth", "findings", "forms_against_length", "overflow"]

LENGTHS, CHUNKS = (64, 256, 1024, 4096), (1, 16, 64)
_SOURCE = "theory.md {}"


def overflow() -> ClaimFinding:
    """At which t does K⊘B leave the range at α = 1/2, and does the form with logarithms not?"""
    rows = []
    for dtype, n in ((torch.float32, 160), (torch.float16, 40)):
        q = k = torch.ones(n, 1, dtype=dtype)
        v = (torch.arange(n) % 3 + 1).to(dtype)[:, None]
        b = torch.full((n, 1), 0.5, dtype=dtype).cumprod(0)
        naive = (((q * b) @ (k / b).T).tril()) @ v
        log = -torch.arange(1, n + 1, dtype=torch.float32).mul(torch.tensor(2.0).log())[:, None]
        decays = (log - log.T).tril().exp().tril().to(dtype)
        stable = ((q @ k.T) * decays) @ v
        half = np.full((n, 1), flint.fmpq(1, 2), dtype=object)
        whole = np.array([[flint.fmpq(int(x))] for x in v[:, 0]], dtype=object)
        one = np.full((n, 1), flint.fmpq(1), dtype=object)
        exact = [float(x) for x in gated.recurrent(one, one, whole, gated.gates(half))[0][:, 0]]
        first = int((k / b).isinf().int().argmax()) + 1 if bool((k / b).isinf().any()) else 0
        error = max(abs(float(x) / e - 1) for x, e in zip(stable[:, 0], exact, strict=True))
        name = str(dtype).removeprefix("torch.")
        rows.append((name, first, int((~naive.isfinite()).sum()), int((~stable.isfinite()).sum()), error))
    good = all(not r[3] and r[2] for r in rows) and [r[1] for r in rows] == [128, 16]
    told = "; ".join(f"{r[0]}: infinite from t = {r[1]}, {r[2]} outputs lost" for r in rows)
    titles = (
        "dtype",
        "first t with 1/b infinite",
        "outputs lost, factored",
        "by logarithms",
        "its relative error",
    )
    return ClaimFinding(
        name="gated linear attention: K⊘B overflows",
        status="HOLDS" if good else "REFUTED",
        statement="At α = 1/2 the factored form (Q∘B)(K⊘B)ᵀ overflows at t = 128 in float32 and t = 16 in "
        "float16; "
        "exp(log b_i − log b_j) does not.",
        source=_SOURCE.format("GLA-2"),
        evidence=f"{told}; by logarithms none, relative error at most {max(r[4] for r in rows):.2g}",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
    )


def forms_against_length(measured: Sequence[growth.Measured] | None = None) -> ClaimFinding:
    """GLA-5: is a chunkwise form no less accurate than the recurrence in float32? As measured.

    The table is a series for a chart: x "N", y "relative error", colour "form", both axes logarithmic.
    """
    found = growth.measure(LENGTHS, CHUNKS) if measured is None else measured
    recurrent = {(m.family, m.length): m.error for m in found if m.chunk == "1"}
    ratios = {
        (m.family, m.chunk, m.length): m.error / recurrent[m.family, m.length]
        for m in found
        if m.chunk != "1"
    }
    worse = {key: ratio for key, ratio in ratios.items() if ratio > 1}
    longest = max(m.length for m in found)
    told = []
    for family in dict.fromkeys(m.family for m in found):
        ends = {m.chunk: m.error for m in found if m.family == family and m.length == longest}
        first = {m.chunk: m.error for m in found if m.family == family and m.length == min(LENGTHS)}
        told.append(f"{family}: " + ", ".join(f"C = {c} {first[c]:.2g} to {ends[c]:.2g}" for c in ends))
    most = max(ratios, key=lambda key: ratios[key])
    return ClaimFinding(
        name="state: error of the forms against N",
        status="SUPPORTED" if not worse else "CONDITIONAL" if len(worse) < len(ratios) else "REFUTED",
        statement="In the same precision a chunkwise form is at most as far from the exact result as the "
        "recurrence.",
        source=_SOURCE.format("GLA-5"),
        evidence=f"float32, relative root mean square error from N = {min(LENGTHS)} to {longest}: "
        + "; ".join(told)
        + f". Larger than the recurrence's in {len(worse)} of {len(ratios)} places, most "
        f"{ratios[most]:.3g} times "
        f"({most[0]}, C = {most[1]}, N = {most[2]})",
        table={
            "N": [m.length for m in found],
            "relative error": [m.error for m in found],
            "form": [f"{m.family}, C = {m.chunk}" for m in found],
        },
    )


def bounded_growth(measured: Sequence[growth.Measured] | None = None) -> ClaimFinding:
    """GLA-5: does the error of any form stay below γ_K Σ|w||v|, K = 2t + D + …? And how far below?"""
    found = growth.measure(LENGTHS, CHUNKS) if measured is None else measured
    found = [m for m in found if not math.isnan(m.share)]
    beyond = [m for m in found if not m.share <= 1]
    low, high = min(m.length for m in found), max(m.length for m in found)
    ends = {(m.family, m.chunk, m.length): m.error for m in found}
    grown = [error / ends[family, chunk, low] for (family, chunk, n), error in ends.items() if n == high]
    fastest = math.log(max(grown)) / math.log(high / low)
    told = ", ".join(
        f"N = {n}: {max(m.share for m in found if m.length == n):.2g}"
        for n in dict.fromkeys(m.length for m in found)
    )
    return ClaimFinding(
        name="state: error within the recurrence's bound",
        status="REFUTED" if beyond else "SUPPORTED",
        statement="With gates of at most 1 the float32 error at position t is at most γ_K Σ|w||v|, K = "
        "2(t + 1) + D + 4, "
        "in the recurrence and in chunks of any length (twice that over a normaliser).",
        source="derived in properties/forms/growth.py; " + _SOURCE.format("GLA-5"),
        evidence=f"largest share of the bound in the last quarter of rows, {told}: the worst case grows "
        f"as N, the error between N = {low} and {high} at most as N^{fastest:.2f}"
        + (f"; beyond it: {[(m.family, m.chunk, m.length) for m in beyond]}" if beyond else ""),
        table={
            "N": [m.length for m in found],
            "share of the bound": [m.share for m in found],
            "form": [f"{m.family}, C = {m.chunk}" for m in found],
        },
    )


def findings() -> list[ClaimFinding]:
    """All of them, as every run shows them."""
    measured = growth.measure(LENGTHS, CHUNKS)
    return [overflow(), forms_against_length(measured), bounded_growth(measured)]
