"""Claims about states in floating point: range of the factored form, error of the forms against length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import flint
import numpy as np
import torch

from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory, Plot
from attnproof.properties.forms import gated, growth

__all__ = [
    "CHUNKS",
    "CLAIMS",
    "LENGTHS",
    "bounded_growth",
    "forms_against_length",
    "overflow",
    "rounded_inputs",
]

LENGTHS, CHUNKS = (64, 256, 1024, 4096), (1, 16, 64)
_QUICK = (64, 256, 1024)
_SEED = 0


def overflow(alpha: tuple[int, int] = (1, 2)) -> ClaimFinding:
    """At which t does K⊘B leave the range for these gates a/b, and does the form with logarithms not?"""
    rows = []
    for dtype, n in ((torch.float32, 160), (torch.float16, 40)):
        gate, exact_gate = alpha[0] / alpha[1], flint.fmpq(*alpha)
        q = k = torch.ones(n, 1, dtype=dtype)
        v = (torch.arange(n) % 3 + 1).to(dtype)[:, None]
        b = torch.full((n, 1), gate, dtype=dtype).cumprod(0)
        naive = (((q * b) @ (k / b).T).tril()) @ v
        log = torch.arange(1, n + 1, dtype=torch.float32).mul(torch.tensor(gate).log())[:, None]
        decays = (log - log.T).tril().exp().tril().to(dtype)
        stable = ((q @ k.T) * decays) @ v
        whole = np.array([[flint.fmpq(int(x))] for x in v[:, 0]], dtype=object)
        one = np.full((n, 1), flint.fmpq(1), dtype=object)
        exact = [float(x) for x in gated.recurrent(one, one, whole, gated.gates(one * exact_gate))[0][:, 0]]
        first = int((k / b).isinf().int().argmax()) + 1 if bool((k / b).isinf().any()) else 0
        # Of exact numbers: the first power of 1/α above the largest finite one.
        largest = flint.fmpq(int(torch.finfo(dtype).max))
        due = next((t for t in range(1, n + 1) if (1 / exact_gate) ** t > largest), 0)
        error = max(abs(float(x) / e - 1) for x, e in zip(stable[:, 0], exact, strict=True))
        name = str(dtype).removeprefix("torch.")
        lost = [int((~o.isfinite()).sum()) for o in (naive, stable)]
        rows.append((name, first, due, lost[0], lost[1], error))
    good = all(r[1] == r[2] and r[3] and not r[4] for r in rows) and [r[1] for r in rows] == [128, 16]
    told = "; ".join(
        f"{r[0]}: " + (f"infinite from t = {r[1]}, {r[3]} outputs lost" if r[1] else "never infinite")
        for r in rows
    )
    titles = (
        "dtype",
        "first t with 1/b infinite",
        "by exact powers",
        "outputs lost, factored",
        "by logarithms",
        "relative error by logarithms",
    )
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"α = {alpha[0]}/{alpha[1]}: {told}; by logarithms {sum(r[4] for r in rows)} outputs lost, "
        f"relative error at most {max(r[5] for r in rows):.2g}",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=""
        if good
        else f"α = {alpha[0]}/{alpha[1]}: first infinite 1/b at t = {[r[1] for r in rows]}",
    )


def forms_against_length(measured: Sequence[growth.Measured]) -> ClaimFinding:
    """Is a chunkwise form no less accurate than the recurrence in float32? As measured."""
    recurrent = {(m.family, m.length): m.error for m in measured if m.chunk == "1"}
    ratios = {
        (m.family, m.chunk, m.length): m.error / recurrent[m.family, m.length]
        for m in measured
        if m.chunk != "1"
    }
    worse = {key: ratio for key, ratio in ratios.items() if ratio > 1}
    shortest, longest = min(m.length for m in measured), max(m.length for m in measured)
    told = []
    for family in dict.fromkeys(m.family for m in measured):
        ends = {m.chunk: m.error for m in measured if m.family == family and m.length == longest}
        first = {m.chunk: m.error for m in measured if m.family == family and m.length == shortest}
        told.append(f"{family}: " + ", ".join(f"C = {c} {first[c]:.2g} to {ends[c]:.2g}" for c in ends))
    most = max(ratios, key=lambda key: ratios[key])
    table: dict[str, list[Any]] = {
        "N": [m.length for m in measured],
        "relative error": [m.error for m in measured],
        "form": [f"{m.family}, C = {m.chunk}" for m in measured],
    }
    return ClaimFinding(
        status="SUPPORTED" if not worse else "CONDITIONAL" if len(worse) < len(ratios) else "REFUTED",
        evidence=f"float32, relative root mean square error from N = {shortest} to {longest}: "
        + "; ".join(told)
        + f". Larger than the recurrence's in {len(worse)} of {len(ratios)} places, most "
        f"{ratios[most]:.3g} times ({most[0]}, C = {most[1]}, N = {most[2]})",
        table=table,
        plots=(
            Plot(
                title="error in float32 against length, by form",
                chart="line",
                columns=table,
                x="N",
                y="relative error",
                color="form",
                log=("N", "relative error"),
            ),
        ),
        counterexample=""
        if not worse
        else "Decays by logarithms, float32, C = 2, D = 1: log α = (−16, −2^-21), k = (1, 0), v_1 = q_2 = 1, "
        "so o_2 = α_2 = 1 − 4.77e-7. The recurrence multiplies by fl(α_2): error at most 2^-25. The chunk "
        "sums b = (−16, −16 − 2^-21) and rounds the last to −16 (spacing 2^-19 there): o_2 = e^0 = 1, off by "
        "4.77e-7. Condition: sums of logarithms stay small, as with slow decays and short chunks, and no "
        "system is solved.",
        seed=_SEED,
    )


def bounded_growth(measured: Sequence[growth.Measured]) -> ClaimFinding:
    """Does the error of any form stay below γ_K Σ|w||v|, K = 2(t + 1) + D + 4? And how far below?"""
    found = [m for m in measured if not math.isnan(m.share)]
    beyond = [m for m in found if not m.share <= 1]
    low, high = min(m.length for m in found), max(m.length for m in found)
    ends = {(m.family, m.chunk, m.length): m.error for m in found}
    grown = [error / ends[family, chunk, low] for (family, chunk, n), error in ends.items() if n == high]
    fastest = math.log(max(grown)) / math.log(high / low)
    told = ", ".join(
        f"N = {n}: {max(m.share for m in found if m.length == n):.2g}"
        for n in dict.fromkeys(m.length for m in found)
    )
    wrong = [(m.family, m.chunk, m.length, m.share) for m in beyond]
    table: dict[str, list[Any]] = {
        "N": [m.length for m in found],
        "share of the bound": [m.share for m in found],
        "form": [f"{m.family}, C = {m.chunk}" for m in found],
    }
    return ClaimFinding(
        status="REFUTED" if beyond else "SUPPORTED",
        evidence=f"largest share of the bound in the last quarter of rows, {told}: the worst case grows "
        f"as N, the error between N = {low} and {high} at most as N^{fastest:.2f}"
        + (f"; beyond it: {wrong}" if beyond else ""),
        table=table,
        plots=(
            Plot(
                title="largest error over its bound against length",
                chart="line",
                columns=table,
                x="N",
                y="share of the bound",
                color="form",
                log=("N", "share of the bound"),
            ),
        ),
        counterexample=f"family, chunk, N, error over the bound: {wrong[0]}" if wrong else "",
        seed=_SEED,
    )


def rounded_inputs(lengths: Sequence[int]) -> list[growth.Measured]:
    """The recurrences of :func:`.growth.examples` with decays (or values) rounded to bfloat16, as measured.

    Their errors are counted as if float32 arithmetic had made them, which it cannot.
    """
    found = []
    for example in growth.examples(lengths[-1], _SEED):
        bounds = growth._bounds(example)
        if bounds is None:
            continue
        exact = example.run(tuple(x.astype(np.float64) for x in example.inputs), 1)
        last = torch.from_numpy(example.inputs[-1]).bfloat16().float().numpy()
        off = abs(example.run((*example.inputs[:-1], last), 1).astype(np.float64) - exact)
        for n in lengths:
            late = slice(n - n // 4, n)
            error = float(np.sqrt((off[late] ** 2).mean() / (exact[late] ** 2).mean()))
            found.append(
                growth.Measured(example.name, "1", n, error, float((off[late] / bounds[late]).max()))
            )
    return found


def _again(measured: Sequence[growth.Measured]) -> list[growth.Measured]:
    """The recurrences, and once more under another name: forms that cannot be less accurate."""
    recurrences = [m for m in measured if m.chunk == "1"]
    return [*recurrences, *(replace(m, chunk="1, again") for m in recurrences)]


def _measured(lab: Laboratory) -> list[growth.Measured]:
    return growth.measure(lab.choose(_QUICK, LENGTHS), CHUNKS, _SEED)


_SOURCE = "Yang et al. 2023, arXiv 2312.06635, section 4"

CLAIMS: Final = (
    Claim(
        id="GLA-2b",
        subject="gated linear attention",
        title="the factored form overflows",
        statement="At α = 1/2 the factored form (Q∘B)(K⊘B)ᵀ overflows from t = 128 in float32 and t = 16 in "
        "float16; exp(log b_i − log b_j) does not.",
        source=f"{_SOURCE}.1, with figures derived",
        kind="exact",
        check=lambda lab: overflow(),
        control=lambda lab: overflow((31, 32)),
    ),
    Claim(
        id="GLA-5a",
        subject="gated linear attention",
        title="error of the forms against length",
        statement="In the same precision a chunkwise form is at most as far from the exact result as the "
        "recurrence, in linear, retention, gated and delta-rule attention.",
        source="derived expectation: sums of C and L/C terms in place of L",
        kind="measurement",
        check=lambda lab: forms_against_length(_measured(lab)),
        control=lambda lab: forms_against_length(_again(growth.measure((64, 256), (1,), _SEED))),
    ),
    Claim(
        id="GLA-5b",
        subject="gated linear attention",
        title="error within the recurrence's bound",
        statement="With gates of at most 1 the float32 error at position t is at most γ_K Σ|w||v|, K = 2(t + "
        "1) + D + 4, in the recurrence and in chunks of any length (twice that over a normaliser).",
        source="derived: at most t − j products with decays and t − j + 1 sums for a term of position j",
        kind="measurement",
        check=lambda lab: bounded_growth(_measured(lab)),
        control=lambda lab: bounded_growth(rounded_inputs((64, 256))),
    ),
)
