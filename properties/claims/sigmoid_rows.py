"""Claims about rows of sigmoid attention: a bias of mass 1, doubled keys, shifted scores, causal rows.

In exact rationals and against the oracle, as in :mod:`attnproof.properties.claims.sigmoid`. Theory.md SIG-1,
SIG-2, SIG-4, SIG-10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import flint
import torch

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.claims.sigmoid import SOURCE, contains, weight, zero_logits
from attnproof.properties.oracle import reference

__all__ = ["causal_rows", "doubling", "findings", "normal_rows", "row_normalising_bias", "shift"]

_BITS = 128


def normal_rows(
    lengths: Sequence[int] = (2, 3, 17, 256), deviations: Sequence[float] = (0.1, 1.0, 5.0), each: int = 4
) -> list[torch.Tensor]:
    """Rows of normal logits, float64 (n,), and one row of equal logits for each length."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.full((n,), 0.75, dtype=torch.float64) for n in lengths]
    for n in lengths:
        for s in deviations:
            rows += [s * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(each)]
    return rows


def _mass(weights: Sequence[flint.arb], factor: flint.arb) -> flint.arb:
    """Σ σ(z + b) for weights e^z and the factor e^b."""
    return sum((1 - 1 / (1 + w * factor) for w in weights), flint.arb(0))


def _root(z: torch.Tensor) -> float:
    """b with Σ σ(z + b) = 1 by bisection in float64: where to look, not a proof."""
    low, high = (-math.log(len(z) - 1) - float(end) for end in (z.max(), z.min()))
    low, high = low - 1.0, high + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.sigmoid(z + middle).sum()) < 1 else (low, middle)
    return (low + high) / 2


def row_normalising_bias(rows: Sequence[torch.Tensor] | None = None) -> ClaimFinding:
    """Does the bias b* of mass 1 lie in the bracket, and above −LSE? Signs of Σ σ(z + b) − 1, proved in Arb.

    The sum increases in b, so b* is where it crosses 1; a strict bracket is asked of rows that are not equal,
    both of its ends at b* of rows that are.
    """
    chosen = normal_rows() if rows is None else rows
    columns: dict[str, list[float]] = {key: [] for key in ("n", "lower end", "−LSE", "b*", "upper end")}
    broken = []
    for place, z in enumerate(chosen):
        n, equal, root = len(z), bool((z == z[0]).all()), _root(z)
        with _precision(_BITS):
            weights = [flint.arb(x).exp() for x in z.tolist()]
            ends = [1 / ((n - 1) * flint.arb(float(x)).exp()) for x in (z.max(), z.min())]
            total = sum(weights, flint.arb(0))
            below, above = (_mass(weights, end) for end in ends)
            bracket = (1 in below and 1 in above) if equal else bool(below < 1) and bool(above > 1)
            near = [_mass(weights, flint.arb(root + step).exp()) for step in (-(2.0**-30), 2.0**-30)]
            enclosed = bool(near[0] < 1) and bool(near[1] > 1)
            if not (bracket and enclosed and bool(_mass(weights, 1 / total) < 1)):
                broken.append(place)
            values = (
                n,
                float(ends[0].log().mid()),
                -float(total.log().mid()),
                root,
                float(ends[1].log().mid()),
            )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    gaps = [b - lse for b, lse in zip(columns["b*"], columns["−LSE"], strict=True)]
    return ClaimFinding(
        name="sigmoid: bias that normalises a row",
        status="REFUTED" if broken else "SUPPORTED",
        statement="Σ_j σ(z_j + b) = 1 has one root b*, with −log(n−1) − max z ≤ b* ≤ −log(n−1) − min z, "
        "equality only where all z are equal, and b* > −LSE(z).",
        source=SOURCE.format("SIG-4"),
        evidence=f"signs proved on {len(chosen)} rows of 2 to {max(map(len, chosen))} logits, b* to 2^-30; "
        f"b* + LSE between {min(gaps):.3g} and {max(gaps):.3g}"
        + (f"; broken by rows {broken[:5]}" if broken else ""),
        table=dict(columns),
    )


def doubling(
    lengths: Sequence[int] = (4, 64, 4096), weights: Sequence[Fraction] = (Fraction(1), Fraction(20))
) -> ClaimFinding:
    """Does writing every key and value twice leave the output as it is? In exact rationals.

    A key of weight w = e^z has weight σ(z − log n) = w/(w + n) once, and 2w/(w + 2n) as a pair.
    """
    rows = [(w, n, 2 * weight(w, 2 * n) / weight(w, n)) for w in weights for n in lengths]
    changed = [row for row in rows if row[2] != 1]
    # n⁻¹σ(z), of which the length enters as a factor, and a bias that knows no length.
    scaled = {2 * weight(w, 1) / (2 * n) / (weight(w, 1) / n) for w, n, _ in rows}
    fixed = {2 * weight(w, 1) / weight(w, 1) for w, _, _ in rows}
    words = "; ".join(f"w = {float(w):g}, n = {n}: {float(ratio):.6g}" for w, n, ratio in rows)
    return ClaimFinding(
        name="sigmoid: doubling the sequence",
        status="REFUTED" if changed else "HOLDS",
        statement="With the bias −log n sigmoid attention is unchanged when every key is written twice, as "
        "softmax attention is.",
        source=SOURCE.format("SIG-2"),
        evidence=f"the weight of a key e^z = w grows by (1 + n/w)/(1/2 + n/w), which tends to 1 only where "
        f"n is much larger than w: {words}. n⁻¹σ(z) keeps it (factor {', '.join(map(str, scaled))}), a "
        f"fixed bias doubles it (factor {', '.join(map(str, fixed))})",
        table={
            "e^z": [float(w) for w, _, _ in rows],
            "n": [n for _, n, _ in rows],
            "weight of the pair over the key's": [float(ratio) for _, _, ratio in rows],
        },
    )


def shift(n: int = 4) -> ClaimFinding:
    """Does adding one number to a row's scores leave its output unchanged? A counterexample, in rationals.

    Scores are 0, the number is log 2, values are 1, so that outputs are masses. The oracle, whose bias is
    that number, and one row of ALiBi written as +slope·j in place of −slope·(i − j) are told beside.
    """
    before, after = (n * weight(w, n) for w in (1, 2))
    softmax = [Fraction(w * n, w * n) for w in (1, 2)]
    tensors = zero_logits(n)
    ones = torch.ones_like(tensors[2])
    apart = []
    for bias in (None, math.log(2.0 / n)):
        found = reference("sigmoid", *tensors[:2], ones, scale=1.0, bias=bias)
        assert isinstance(found, Enclosure)
        apart.append((float(found.value), float(found.radius)))
    oracle = abs(apart[1][0] - apart[0][0]) > apart[0][1] + apart[1][1]
    # Keys 0 … i of the query i = n − 1 at slope log 2: weights 2^(j − i), and 2^j by the shortcut.
    alibi = [sum((weight(Fraction(2) ** (j - s), n) for j in range(n)), Fraction(0)) for s in (n - 1, 0)]
    moved = before != after and oracle and alibi[0] != alibi[1]
    return ClaimFinding(
        name="sigmoid: adding a number to a row's scores",
        status="REFUTED" if moved else "OPEN",
        statement="Adding one number to all scores of a row leaves the output of sigmoid attention as it is, "
        "as it does softmax attention's.",
        source=SOURCE.format("SIG-10"),
        evidence=f"{n} scores 0 and values 1: the output is {before}, with log 2 added {after} (softmax: "
        f"{softmax[0]} and {softmax[1]}). ALiBi needs its true offset: at slope log 2 query {n - 1} gets "
        f"{float(alibi[0]):.4f} by −slope·(i − j), {float(alibi[1]):.4f} by +slope·j",
        table={
            "scores": ["0", "0 + log 2", "−slope·(i − j)", "+slope·j"],
            "output": [float(x) for x in (before, after, *alibi)],
        },
    )


def causal_rows(n: int = 64) -> ClaimFinding:
    """Do causal rows at zero logits have the mass (i + 1)/(n + 1), where the bias is −log n for all?"""
    shape = (1, 1, n, 1)
    q, ones = torch.zeros(shape), torch.ones(shape)
    found = reference("sigmoid", q, ones, ones, scale=1.0, causal=True)
    assert isinstance(found, Enclosure)
    exact = [(i + 1) * weight(1, n) for i in range(n)]
    good = contains(found, exact)
    return ClaimFinding(
        name="sigmoid: causal rows under a fixed −log n",
        status="HOLDS" if good else "REFUTED",
        statement="With one bias −log n for all rows of a causal call the mass of row i at zero logits is "
        "(i + 1)/(n + 1): it grows from 1/(n + 1) to n/(n + 1).",
        source=SOURCE.format("SIG-1"),
        evidence=f"n = {n}: from {exact[0]} to {exact[-1]}, a factor {exact[-1] / exact[0]}; the oracle's "
        + (f"{n} enclosures hold these numbers" if good else "enclosures do not hold these numbers"),
        table={"row": list(range(n)), "mass": [float(x) for x in exact]},
    )


def findings() -> list[ClaimFinding]:
    """All findings, as every run shows them."""
    return [row_normalising_bias(), doubling(), shift(), causal_rows()]
