"""FlashAttention's recurrence and gradients, exactly: logits enter as their exponentials, positive rationals.

With w = e^S every e^(m − m') is a quotient of weights, so that Algorithm 1 of arXiv 2205.14135 runs over the
rationals. The gradients are proved as identities of polynomials, for every row of the stated length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.forms.base import Array
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "CLAIMS",
    "algorithm_1",
    "attention",
    "block_sizes",
    "fits",
    "gradients_of_a_row",
    "on_chip",
    "partial_sums",
    "weights",
]

_PAPER: Final = "Dao et al., FlashAttention, arXiv 2205.14135"


def weights(rng: np.random.Generator, *shape: int) -> Array:
    """Random positive fmpq, e^S: 1/7 … 40/7, with ties."""
    return rationals(rng, *shape, low=1, high=40)


def attention(w: Array, v: Array) -> Array:
    """softmax(S)·V from the weights w = e^S, (N, n), and v, (n, d)."""
    product: Array = (w @ v) / w.sum(axis=1)[:, None]
    return product


def algorithm_1(
    w: Array, v: Array, rows: int, columns: int, *, keeps_normaliser: bool = True
) -> Iterator[tuple[int, Array]]:
    """Algorithm 1 in blocks of ``rows`` by ``columns``: after each block of columns, how many are done, and
    O.

    Args:
        w: e^S, (N, n), positive rationals; v: (n, d).
        keeps_normaliser: False leaves out diag(ℓ), by which the old O is multiplied.
    """
    zero = flint.fmpq(0)
    count, width = len(w), v.shape[1]
    top, mass = [zero] * count, [zero] * count
    out = np.full((count, width), zero, dtype=object)
    for start in range(0, len(v), columns):
        block = slice(start, start + columns)
        for first in range(0, count, rows):
            for i in range(first, min(first + rows, count)):
                peak = max(w[i, block])
                p = w[i, block] / peak
                higher = max(top[i], peak)
                old, new = top[i] / higher, peak / higher
                total = old * mass[i] + new * p.sum()
                kept = old * (mass[i] if keeps_normaliser else 1) * out[i]
                out[i] = (kept + new * (p @ v[block])) / total
                top[i], mass[i] = higher, total
        yield min(start + columns, len(v)), out.copy()


def partial_sums(length: int = 7, *, keeps_normaliser: bool = True) -> ClaimFinding:
    """Is O after each block of columns the attention over the columns done, for every size of tile?"""
    rng = np.random.default_rng(11)
    w, v = weights(rng, length - 1, length), rationals(rng, length, 2)
    compared, wrong = 0, []
    for rows in range(1, length):
        for columns in range(1, length + 1):
            for done, out in algorithm_1(w, v, rows, columns, keeps_normaliser=keeps_normaliser):
                exact = attention(w[:, :done], v[:done])
                compared += exact.size
                if (out != exact).any():
                    wrong.append((rows, columns, done))
    counterexample = ""
    if wrong:
        two, values = np.array([[flint.fmpq(2), flint.fmpq(1)]]), np.array([[flint.fmpq(1)], [flint.fmpq(0)]])
        *_, (_, out) = algorithm_1(two, values, 1, 1, keeps_normaliser=keeps_normaliser)
        counterexample = (
            f"one row, e^S = (2, 1), V = (1, 0), blocks of one column: O = {out[0, 0]}, softmax(S)V = "
            f"{attention(two, values)[0, 0]}; in the drawn matrices first at (B_r, B_c, columns done) = "
            f"{wrong[0]}"
        )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{compared} rational entries of O, after each block of columns, for all "
        f"{(length - 1) * length} sizes of tile of {length - 1} queries and {length} keys: "
        + (f"{len(wrong)} states differ" if wrong else "all equal to the attention over the columns done"),
        counterexample=counterexample,
        seed=11,
    )


def block_sizes(size: int, d: int) -> tuple[int, int]:
    """(B_r, B_c) of Algorithm 1 for ``size`` numbers of on-chip memory."""
    columns = -(-size // (4 * d))
    return min(columns, d), columns


def on_chip(size: int, d: int) -> int:
    """Numbers that Algorithm 1 holds at once with its own block sizes: Q, O, K, V, one tile of S, ℓ and m."""
    rows, columns = block_sizes(size, d)
    return 2 * (rows + columns) * d + rows * columns + 2 * rows


def fits(
    factor: flint.fmpq, widths: tuple[int, ...] = (1, 2, 3, 8, 32, 64, 128), steps: int = 400
) -> ClaimFinding:
    """Do the tiles of Algorithm 1 fit into ``factor``·M, for M from d on?"""
    ratios = []
    for d in widths:
        sizes = {d + i for i in range(steps)} | {d * 2**i + j for i in range(14) for j in (0, 1)}
        ratios += [(flint.fmpq(on_chip(size, d), size), d, size) for size in sorted(sizes)]
    wrong = [entry for entry in ratios if entry[0] > factor]
    largest, far = max(ratios), min(ratios)
    counterexample = ""
    if wrong:
        _, d, size = next((entry for entry in wrong if entry[1] == 64 and entry[2] >= 4096), wrong[0])
        rows, columns = block_sizes(size, d)
        counterexample = (
            f"d = {d}, M = {size}: B_c = ⌈M/(4d)⌉ = {columns}, B_r = min(B_c, d) = {rows}; Q and O take "
            f"2·{rows}·{d}, K and V 2·{columns}·{d}, S {rows}·{columns}, ℓ and m 2·{rows}: "
            f"{on_chip(size, d)} numbers, {on_chip(size, d) - size} more than M"
        )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"numbers held over M, {len(ratios)} pairs (d, M) with M ≥ d: from {float(far[0]):.3f} to "
        f"{float(largest[0]):.3f} (d = {largest[1]}, M = {largest[2]}); above {factor} in {len(wrong)}. For "
        "all M ≥ d: B_c·d < M/4 + d ≤ 5M/4 and B_r ≤ d ≤ M, so 4·5M/4 for the operands, 5M/4 for S and 2M "
        "for ℓ and m, 33M/4 together",
        counterexample=counterexample,
    )


def _row(length: int, width: int) -> tuple[list[Any], list[list[Any]], list[Any]]:
    """Indeterminates w, V and dO of one row."""
    ring = flint.fmpq_mpoly_ctx.get(
        [*(f"w{j}" for j in range(length)), *(f"x{i}" for i in range((length + 1) * width))],
        flint.Ordering.lex,
    )
    symbols = ring.gens()
    v = [list(symbols[length + j * width : length + (j + 1) * width]) for j in range(length)]
    return list(symbols[:length]), v, list(symbols[length + length * width :])


def gradients_of_a_row(length: int = 4, width: int = 2, *, subtracts: str = "D") -> ClaimFinding:
    """Are δ = Σ_c dO_c O_c, dS = P∘(dP − δ) and Σ_j dS_j = 0 identities, and is dS the derivative?

    P_j = w_j/ℓ with w = e^S, so ∂/∂S_j = w_j ∂/∂w_j; everything is multiplied by powers of ℓ.

    Args:
        subtracts: "D", or "mean" to subtract the mean of dP instead, which is wrong.
    """
    w, v, do = _row(length, width)
    mass = sum(w[1:], w[0])
    dp = [sum((a * b for a, b in zip(row, do, strict=True)), 0 * mass) for row in v]
    # ℓ·O, ℓ·Σ_c dO_c O_c and ℓ·Σ_j P_j dP_j.
    out = [sum((w[j] * v[j][c] for j in range(length)), 0 * mass) for c in range(width)]
    loss = sum((do[c] * out[c] for c in range(width)), 0 * mass)
    expected = sum((w[j] * dp[j] for j in range(length)), 0 * mass)
    mean = sum(dp, 0 * mass) * mass * flint.fmpq(1, length)
    shift = loss if subtracts == "D" else mean
    # ℓ²·dS.
    ds = [w[j] * (mass * dp[j] - shift) for j in range(length)]
    derivative = [w[j] * (loss.derivative(j) * mass - loss * mass.derivative(j)) for j in range(length)]
    found = {
        "δ = Σ_c dO_c O_c = Σ_j P_j dP_j": loss == expected,
        "dS = P∘(dP − δ) is ∂(dO·O)/∂S": all(a == b for a, b in zip(ds, derivative, strict=True)),
        "Σ_j dS_j = 0": sum(ds[1:], ds[0]) == 0,
        "dV_j = P_j dO": all(
            loss.derivative(length + j * width + c) == w[j] * do[c]
            for j in range(length)
            for c in range(width)
        ),
    }
    false = [name for name, good in found.items() if not good]
    return ClaimFinding(
        status="REFUTED" if false else "HOLDS",
        evidence=f"polynomials in {length * (width + 1) + width} indeterminates (w = e^S, V, dO of one row, "
        f"n = {length}, d = {width}), up to {len(list(ds[0].monoms()))} terms: "
        + ("not identities: " + "; ".join(false) if false else "all are identities"),
        table={"identity": list(found), "holds": list(found.values())},
        counterexample=(
            "e^S = (1, 1), V = (1, 0), dO = 1 and mean(dP) = 1/2 agree with δ; at e^S = (1, 3): δ = 1/4, dS "
            "= (1/4)(1 − 1/4) = 3/16, but (1/4)(1 − 1/2) = 1/8"
            if false
            else ""
        ),
    )


CLAIMS: Final = (
    Claim(
        id="FA1-1a",
        subject="FlashAttention",
        title="each block of columns leaves the attention so far",
        statement="After each outer iteration of Algorithm 1 O is the attention over the columns done: O_i ← "
        "diag(ℓ_new)⁻¹(diag(ℓ)e^(m − m_new)O_i + e^(m̃ − m_new)P̃V_j) ends at softmax(QKᵀ)V for every size "
        "of tile.",
        source=f"{_PAPER}, Algorithm 1 and Theorem 1",
        kind="exact",
        check=lambda lab: partial_sums(lab.choose(6, 9)),
        control=lambda _: partial_sums(4, keeps_normaliser=False),
        covers=("FA1-1",),
    ),
    Claim(
        id="FA1-1b",
        subject="FlashAttention",
        title="the tiles fit on chip, literally",
        statement="With B_c = ⌈M/(4d)⌉ and B_r = min(⌈M/(4d)⌉, d) what Algorithm 1 holds at once (tiles of "
        "Q, K, V, O, S, and ℓ, m) fits into an on-chip memory of M numbers.",
        source=f"{_PAPER}, Algorithm 1, line 1, read literally",
        kind="count",
        check=lambda _: fits(flint.fmpq(1)),
        control=lambda _: fits(flint.fmpq(33, 4)),
    ),
    Claim(
        id="FA1-1c",
        subject="FlashAttention",
        title="the tiles fit on chip, up to a factor",
        statement="What Algorithm 1 holds at once is O(M): at most 33M/4 numbers for every M ≥ d.",
        source=f"{_PAPER}, proof of Theorem 2 (block sizes); the constant is ours",
        kind="count",
        check=lambda _: fits(flint.fmpq(33, 4)),
        control=lambda _: fits(flint.fmpq(2)),
    ),
    Claim(
        id="FA1-5",
        subject="FlashAttention",
        title="δ = rowsum(dO∘O), dS = P∘(dP − δ)",
        statement="With P = softmax(S): δ_i = Σ_c dO_ic O_ic = Σ_j P_ij dP_ij, dS = P∘(dP − δ) is the "
        "gradient of ⟨dO, O⟩, its rows sum to 0, and dV = PᵀdO.",
        source=f"{_PAPER}, Appendix B.4 and Algorithm 4",
        kind="exact",
        check=lambda lab: gradients_of_a_row(*lab.choose((3, 2), (5, 3))),
        control=lambda _: gradients_of_a_row(3, 2, subtracts="mean"),
    ),
)
