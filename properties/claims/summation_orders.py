"""Claims about sums of the same numbers in different orders."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.correct_rounding import BF16, FP16, FP32, Floats, Format
from attnproof.properties.claims.online_softmax import groupings

__all__ = ["CLAIMS", "additions", "order_spread", "ordered_sum", "random_tree"]

_SEED = 29
_Q = flint.fmpq
_SMALL: Final = Format("3 bits", 3, -14, 15)
"""Numbers with so few digits that all short rows can be tried."""

Tolerance = Callable[[int, float, float, float], float]
"""Allowed spread from n, u, Σ|x| and |Σx|."""


def additions(tree: Any) -> int:
    """The most additions that one leaf of a tree of pairs takes part in."""
    return 0 if isinstance(tree, int) else 1 + max(additions(tree[0]), additions(tree[1]))


def ordered_sum(tree: Any, x: Floats, form: Format) -> Floats:
    """Sums of rows x (rows, n) by the tree, every addition rounded."""
    if isinstance(tree, int):
        return x[:, tree]
    return form.rounded(ordered_sum(tree[0], x, form) + ordered_sum(tree[1], x, form))


def random_tree(leaves: list[Any], rng: np.random.Generator) -> Any:
    """Random neighbours joined until one tree is left."""
    leaves = list(leaves)
    while len(leaves) > 1:
        i = int(rng.integers(len(leaves) - 1))
        leaves[i : i + 2] = [(leaves[i], leaves[i + 1])]
    return leaves[0]


def _gamma(n: int, u: float, absolute: float, total: float) -> float:
    """2γ_{n−1}·Σ|x|."""
    return 2.0 * (n - 1) * u / (1.0 - (n - 1) * u) * absolute


def _relative(n: int, u: float, absolute: float, total: float) -> float:
    """A tolerance relative to the sum itself, which cancels."""
    return 2.0 * (n - 1) * u * total


def _share(spread: float, allowed: float) -> float:
    return spread / allowed if allowed else np.inf if spread else 0.0


def _exhaustive(tolerance: Tolerance) -> tuple[float, str, int]:
    """Largest spread by tolerance over all rows of 3 numbers ±1 … ±7/2 of 3 bits, in all three orders."""
    numbers = [s * m * 2.0**e for s in (1, -1) for m in (4, 5, 6, 7) for e in (-2, -1)]
    rows = np.array(list(itertools.combinations_with_replacement(numbers, 3)))
    sums = np.stack([ordered_sum(tree, rows, _SMALL) for tree in (((0, 1), 2), ((0, 2), 1), ((1, 2), 0))])
    spread = sums.max(axis=0) - sums.min(axis=0)
    allowed = [tolerance(3, _SMALL.u, float(abs(row).sum()), float(abs(row.sum()))) for row in rows]
    ratios = np.array([_share(float(s), a) for s, a in zip(spread, allowed, strict=True)])
    worst = int(ratios.argmax())
    told = (
        f"3 significant bits (u = 1/8), x = {tuple(rows[worst].tolist())}: ((x1 + x2) + x3) = "
        f"{float(sums[0][worst])!r}, "
        f"((x1 + x3) + x2) = {float(sums[1][worst])!r}, ((x2 + x3) + x1) = {float(sums[2][worst])!r}; "
        "allowed "
        f"{allowed[worst]:.6g}"
    )
    return float(ratios[worst]), told, len(rows)


def order_spread(trials: int, longest: int, tolerance: Tolerance = _gamma) -> ClaimFinding:
    """Spread of sums over orders against a tolerance: short rows of 3 bits, random rows in three formats."""
    deepest = {n: max(map(additions, groupings(n))) for n in range(2, 9)}
    counted = all(depth == n - 1 for n, depth in deepest.items())
    ratio, told, rows = _exhaustive(tolerance)
    example = told if ratio > 1 else ""
    rng = np.random.default_rng(_SEED)
    table: dict[str, list[Any]] = {"format": [], "n": [], "largest spread / tolerance": []}
    for form, n in itertools.product((FP16, BF16, FP32), (4, 16, longest)):
        worst = 0.0
        for trial in range(trials):
            x = form.rounded(rng.standard_normal((1, n)) * 2.0 ** rng.integers(-4, 5, (1, n)))
            if trial % 2:
                # The second half cancels the first but for the last digits.
                x[:, n // 2 :] = -form.rounded(x[:, : n - n // 2] * (1 + 2 * form.u))
            sums = [
                float(ordered_sum(random_tree(rng.permutation(n).tolist(), rng), x, form)[0])
                for _ in range(6)
            ]
            allowed = tolerance(n, form.u, float(abs(x).sum()), abs(float(x.sum())))
            worst = max(worst, _share(max(sums) - min(sums), allowed))
        for column, entry in zip(table, (form.name, n, worst), strict=True):
            table[column].append(entry)
    found = max(table["largest spread / tolerance"])
    over = ratio > 1 or found > 1
    # Both are homogeneous in the terms: one sum of absolute values, and what may be left of it.
    proved = counted and all(
        tolerance(n, form.u, 1.0, left) >= _gamma(n, form.u, 1.0, left)
        for n, form, left in itertools.product(range(2, longest + 1), (FP16, BF16, FP32), (0.0, 0.5, 1.0))
    )
    return ClaimFinding(
        status="REFUTED" if over else "HOLDS" if proved else "SUPPORTED",
        evidence="in all groupings of n = 2 … 8 terms a term takes part in at most n − 1 additions "
        f"({counted}), so each order is "
        f"within γ_(n−1)·Σ|x| of the sum, two within twice that, which the tolerance "
        f"{'reaches' if proved else 'does not reach'}; all {rows} rows of three numbers with 3 bits, in "
        f"every order: "
        "spread by tolerance up to "
        f"{ratio:.3f}; random trees and permutations of rows up to n = {longest} in fp16, bf16, fp32 (seed "
        f"{_SEED}): up to {found:.3f}",
        table=table,
        counterexample=example,
        seed=_SEED,
    )


CLAIMS: Final = (
    Claim(
        id="HW-6",
        subject="hardware",
        title="orders of a sum",
        statement="Two orders of summing the same n numbers differ by at most 2γ_{n−1}·Σ|x|, γ_k = ku/(1 − "
        "ku): a tolerance for "
        "changes of order in place of one relative to the result.",
        source="Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2; derived",
        kind="exact",
        check=lambda lab: order_spread(*lab.choose((4, 32), (60, 200), (300, 400))),
        control=lambda lab: order_spread(4, 16, _relative),
    ),
)
