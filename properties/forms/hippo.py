"""The HiPPO matrices that S4 starts from, in coordinates in which they are rational.

LegS has the entries A_nk = −√(2n+1)√(2k+1) below the diagonal, −(n+1) on it and 0 above. With
D = diag(√(2n+1)) it is A = D·M·D with M rational, and D⁻¹AD is rational. A congruence by D keeps symmetry and
rank, a similarity keeps eigenvalues and kernels: each statement is checked in the form that it allows. Gu et
al., arXiv 2111.00396, equation (2), theorem 1, lemma 3.2; appendix C.1 for the other two matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flint
import numpy as np

from attnproof.properties.forms.base import Array

__all__ = [
    "CONGRUENT",
    "alternating",
    "balls",
    "eigenvectors",
    "lagt",
    "largest_entry",
    "legs",
    "legs_normal",
    "legs_scaled",
    "legt",
    "table",
]


def table(size: int, entry: Callable[[int, int], Any]) -> Array:
    """entry(n, k) of fmpq at every place of a square of ``size``."""
    out = np.empty((size, size), dtype=object)
    for n, k in np.ndindex(size, size):
        out[n, k] = flint.fmpq(entry(n, k))
    return out


def legs_scaled(size: int) -> Array:
    """M with A_nk = M_nk·√(2n+1)√(2k+1) of LegS: −1 below the diagonal, −(n+1)/(2n+1) on it."""
    return table(size, lambda n, k: -1 if n > k else flint.fmpq(-n - 1, 2 * n + 1) if n == k else 0)


def legt(size: int) -> Array:
    """M with A_nk = M_nk·√(2n+1)√(2k+1) of LegT: −1 on and below the diagonal, −(−1)^(n−k) above."""
    return table(size, lambda n, k: -1 if n >= k else -((-1) ** (k - n)))


def lagt(size: int) -> Array:
    """LagT itself: −1 below the diagonal, −1/2 on it; its D is the identity."""
    return table(size, lambda n, k: -1 if n > k else flint.fmpq(-1, 2) if n == k else 0)


CONGRUENT: dict[str, tuple[Callable[[int], Array], flint.fmpq, bool, int]] = {
    "LegS": (legs_scaled, flint.fmpq(1, 2), True, 1),
    "LegT": (legt, flint.fmpq(0), True, 2),
    "LagT": (lagt, flint.fmpq(0), False, 1),
}
"""By name: M with A = D·M·D, the shift c for which A + PPᵀ + c·I is skew, whether D is diag(√(2n+1)) or the
identity, and the rank of PPᵀ (theorem 1: 1 or 2)."""


def legs(size: int) -> Array:
    """D⁻¹AD of LegS: −(2k+1) below the diagonal, −(n+1) on it. Its B is all ones."""
    return table(size, lambda n, k: -(2 * k + 1) if n > k else -(n + 1) if n == k else 0)


def legs_normal(size: int) -> Array:
    """D⁻¹(A + ½ppᵀ)D with p_n = √(2n+1): the normal part, which S4D keeps."""
    return legs(size) + table(size, lambda n, k: flint.fmpq(2 * k + 1, 2))


def alternating(size: int) -> Array:
    """Q⁻¹(−A)Q with Q = diag((−1)ⁿ√(2n+1)): (−1)^(n−k)(2k+1) below the diagonal, n + 1 on it."""
    return table(size, lambda n, k: (-1) ** (n - k) * (2 * k + 1) if n > k else n + 1 if n == k else 0)


def eigenvectors(size: int) -> Array:
    """Lemma 3.2's V_ij = C(i + j, i − j), lower triangular with ones on the diagonal."""
    return table(size, lambda i, j: math.comb(i + j, i - j) if i >= j else 0)


def largest_entry(size: int) -> int:
    """The largest entry of V at this size: it stands in the last row, at j = 0 … size − 1."""
    # C(n+j+1, n−j−1) = C(n+j, n−j)·(n+j+1)(n−j)/((2j+1)(2j+2)).
    n, term, most = size - 1, 1, 1
    for j in range(n):
        term = term * (n + j + 1) * (n - j) // ((2 * j + 1) * (2 * j + 2))
        most = max(most, term)
    return most


def balls(size: int) -> Array:
    """LegS itself, as printed, in balls of the precision in force: arb (N, N)."""
    roots = [flint.arb(2 * n + 1).sqrt() for n in range(size)]
    out = np.empty((size, size), dtype=object)
    for n, k in np.ndindex(size, size):
        out[n, k] = -roots[n] * roots[k] if n > k else flint.arb(-(n + 1) if n == k else 0)
    return out
