"""Claims about softmax's kernel e^(q·k) and maps of finite width: elu + 1, ranks, the infinite map.

Arb's balls over the d = 1 and d > 1 cases; ranks over the rationals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot

__all__ = [
    "CLAIMS",
    "Kernel",
    "elu_weight",
    "float_rank",
    "full_rank",
    "ratios",
    "row_distance",
    "separable",
    "series",
    "taylor_weight",
]

Kernel = Callable[[flint.arb, flint.arb], flint.arb]
"""The weight of a query and a key of width 1."""

_BITS = 256
_DETERMINANT_BITS = 1024
# Terms of the exponential series: for |q·k| ≤ 16 the tail is below 1e-20 of e^(q·k).
_TERMS = 96


def _elu(x: flint.arb) -> flint.arb:
    return x + 1 if x > 0 else x.exp()


def elu_weight(q: flint.arb, k: flint.arb) -> flint.arb:
    """φ(q)φ(k) of φ = elu + 1."""
    return _elu(q) * _elu(k)


def series(q: flint.arb, k: flint.arb) -> flint.arb:
    """The features x^m/√m!, m ≤ 96, of softmax's own map, cut off: Σ (qk)^m/m!."""
    total, term = flint.arb(0), flint.arb(1)
    for m in range(_TERMS + 1):
        total, term = total + term, term * q * k / (m + 1)
    return total


def taylor_weight(q: flint.arb, k: flint.arb) -> flint.arb:
    """Based's 1 + x + x²/2, x = qk."""
    return 1 + q * k + (q * k) ** 2 / 2


def exponential(q: flint.arb, k: flint.arb) -> flint.arb:
    """e^(qk)."""
    return (q * k).exp()


def ratios(kernel: Kernel, radii: Sequence[str] = ("1/2", "1", "2", "4"), limit: float = 1.1) -> ClaimFinding:
    """e^(qk) over the kernel at (0, 0), (t, t) and (t, −t): how far from one constant?

    The largest over the smallest of them is what no rescaling of the kernel changes; SUPPORTED if it stays
    below ``limit`` at every radius t.
    """
    rows = []
    with _precision(_BITS):
        for text in radii:
            t = flint.arb(flint.fmpq(*map(int, text.split("/"))))
            found = [(x * y).exp() / kernel(x, y) for x, y in ((t * 0, t * 0), (t, t), (t, -t))]
            pairs = [a / b for a, b in itertools.permutations(found, 2)]
            spread = max(float(pair.lower()) for pair in pairs)
            rows.append((float(t), *(float(x.mid()) for x in found), spread))
    far = [r for r in rows if r[4] > limit]
    titles = ("radius t", "at (0, 0)", "at (t, t)", "at (t, −t)", "largest over smallest")
    table = {title: [r[i] for r in rows] for i, title in enumerate(titles)}
    return ClaimFinding(
        status="REFUTED" if far else "SUPPORTED",
        evidence=f"enclosed in balls of {_BITS} bits: e^(qk) over the kernel varies by a factor of "
        + ", ".join(f"{r[4]:.4g} at t = {r[0]:g}" for r in rows),
        table=table,
        plots=(
            Plot(
                title="e^(qk) over the kernel: largest over smallest value at radius t",
                chart="line",
                columns={"t": table[titles[0]], "factor": table[titles[4]]},
                x="t",
                y="factor",
                log=("factor",),
            ),
        ),
        counterexample=""
        if not far
        else "d = 1. At q = k = 0 both are 1: φ(0)² = 1 = e^0. At q = 1, k = −1: φ(1)φ(−1) = 2e^(−1), twice "
        "e^(qk) = e^(−1). So no constant c makes c·φ(q)φ(k) closer than a factor √2 at both. At q = k = t: "
        f"e^(t²)/(1 + t)² grows without bound, {rows[-1][2]:.4g} at t = {rows[-1][0]:g}.",
    )


def row_distance(kernel: Kernel, steps: int = 4, limit: float = 0.01) -> ClaimFinding:
    """Total variation between the kernel's row and softmax's, at the best rescaling of queries and keys.

    d = 1, queries 1 and −1, keys 1 and −1: softmax's rows are (σ(2), σ(−2)) and its mirror image. The worse
    row counts; q and k are multiplied by powers of √2 from 2^(−steps/2) to 2^(steps/2).
    """
    best, rows = 1.0, []
    with _precision(_BITS):
        high = 1 / (1 + flint.arb(-2).exp())
        root = flint.arb(2).sqrt()
        for a, b in itertools.product(range(-steps, steps + 1), repeat=2):
            distances = []
            for sign in (1, -1):
                q, keys = sign * root**a, (root**b, -(root**b))
                w = [kernel(flint.arb(q), flint.arb(k)) for k in keys]
                due = high if sign > 0 else 1 - high
                distances.append(abs(w[0] / (w[0] + w[1]) - due))
            worse = max(0.0, *(float(d.lower()) for d in distances))
            best = min(best, worse)
            rows.append((2.0 ** (a / 2), 2.0 ** (b / 2), worse))
    titles = ("q times", "k times", "distance of the worse row")
    return ClaimFinding(
        status="REFUTED" if best > limit else "SUPPORTED",
        evidence=f"{len(rows)} rescalings, enclosed: the least total variation of the worse row is "
        f"{best:.4g}; for weights that do not depend on the query it is at least tanh(1)/2 = "
        f"{math.tanh(1) / 2:.4g}",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=""
        if best <= limit
        else "d = 1, keys 1 and −1. The row φ(aq)φ(bk_j)/Σφ(aq)φ(bk_j) = φ(bk_j)/Σφ(bk_j) is the same for "
        "every query, whatever a and b. Softmax's rows for q = 1 and q = −1 are (σ(2), σ(−2)) and (σ(−2), "
        "σ(2)), tanh(1) = 0.7616 apart, so one of them is at least 0.3808 from the common row.",
    )


def _points(n: int) -> list[flint.fmpq]:
    return [flint.fmpq(2 * i - n + 1, n - 1) for i in range(n)]


def _matrix(kernel: Kernel, n: int) -> list[list[flint.arb]]:
    return [[kernel(flint.arb(x), flint.arb(y)) for y in _points(n)] for x in _points(n)]


def full_rank(sizes: Sequence[int] = (8, 12, 16), kernel: Kernel = exponential) -> ClaimFinding:
    """Is the determinant of the kernel at n equispaced points of [−1, 1] proved not to be 0?"""
    rows = []
    with _precision(_DETERMINANT_BITS):
        for n in sizes:
            determinant = flint.arb_mat(_matrix(kernel, n)).det()
            # q_i = i, k_j = j log 2: an integer matrix.
            whole = flint.fmpz_mat([[flint.fmpz(2) ** (i * j) for j in range(n)] for i in range(n)]).det()
            rows.append((n, float(determinant.mid()), bool(determinant > 0), bool(whole > 0)))
    wrong = [r[0] for r in rows if not (r[2] and r[3])]
    titles = (
        "n",
        "determinant",
        "proved positive",
        "integer determinant for q_i = i, k_j = j·log 2 positive",
    )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"balls of {_DETERMINANT_BITS} bits, q and k at n equispaced points of [−1, 1]: "
        "determinants "
        + ", ".join(f"{r[1]:.3g} at n = {r[0]}" for r in rows)
        + (f"; not proved positive at n = {wrong}" if wrong else "; all proved positive"),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=f"n = {wrong[0]}: no positive determinant" if wrong else "",
    )


def separable(kernel: Kernel, sizes: Sequence[int] = (4, 8, 12)) -> ClaimFinding:
    """Has the kernel a feature map φ(q)·φ(k)? One of finite width, of infinite width, or none that is found.

    Of finite width none, if the rank at n points is n for each n tried; of infinite width, if the partial
    sums of φ(x) = (x^m/√m!) come as close to the kernel as their tail's bound says.
    """
    rows, whole = [], True
    with _precision(_DETERMINANT_BITS):
        for n in sizes:
            rows.append((n, bool(flint.arb_mat(_matrix(kernel, n)).det() != 0)))
        gaps = []
        for terms in (2, 4, 8, 16, 32):
            largest = flint.arb(0)
            for x, y in itertools.product(_points(5), repeat=2):
                z = flint.arb(x * y)
                partial = sum((z**m / math.factorial(m) for m in range(terms)), start=flint.arb(0))
                gap = abs(kernel(flint.arb(x), flint.arb(y)) - partial)
                # |z| ≤ 1: the tail is at most e/terms!.
                whole = whole and bool(gap <= flint.arb(1).exp() / math.factorial(terms))
                largest = max(largest, gap.upper())
            gaps.append((terms, float(largest)))
    finite = not all(r[1] for r in rows)
    told = ", ".join(f"{gap:.2g} with {terms}" for terms, gap in gaps)
    return ClaimFinding(
        status="REFUTED" if finite else "CONDITIONAL" if whole else "SUPPORTED",
        evidence="proved of full rank n for "
        + (", ".join(f"n = {r[0]}" for r in rows if r[1]) or "no n tried")
        + f"; distance to the sum of x^m y^m/m! over |x|, |y| ≤ 1 by number of terms: {told}"
        + ("; within the bound of its tail everywhere" if whole else ""),
        table={"terms": [g[0] for g in gaps], "largest distance": [g[1] for g in gaps]},
        counterexample="A feature map of finite width exists: the rank stays bounded."
        if finite
        else "e^(qk) = Σ_m (q^m/√m!)(k^m/√m!): infinitely many features reproduce it exactly (in d > 1 the "
        "tensor powers of x). Condition: finite width D, where n = D + 1 distinct points have rank n > D; "
        "for D = 1 q, k in {0, log 2}: the matrix (1, 1; 1, 2^(log 2)) has determinant 2^(log 2) − 1 > 0.",
    )


def float_rank(sizes: Sequence[int] = (4, 8, 12, 16), kernel: Kernel = exponential) -> ClaimFinding:
    """Does numpy's matrix_rank in float64 find the proved rank of the kernel's matrix?"""
    rows = []
    with _precision(_DETERMINANT_BITS):
        for n in sizes:
            entries = _matrix(kernel, n)
            full = bool(flint.arb_mat(entries).det() > 0)
            floats = np.array([[float(x.mid()) for x in line] for line in entries])
            values = np.linalg.svd(floats, compute_uv=False)
            rows.append((n, n if full else -1, int(np.linalg.matrix_rank(floats)), float(values[-1])))
    wrong = [r for r in rows if r[1] != r[2]]
    titles = ("n", "rank", "rank by float64", "smallest singular value in float64")
    return ClaimFinding(
        status="REFUTED" if wrong else "SUPPORTED",
        evidence="ranks of e^(q_i k_j), equispaced points of [−1, 1]: "
        + ", ".join(f"{r[2]} by float64 for {r[1]}" for r in rows),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=""
        if not wrong
        else f"n = {wrong[0][0]}, q_i = k_i = (2i − n + 1)/(n − 1): numpy.linalg.matrix_rank says "
        f"{wrong[0][2]}; the determinant, enclosed in Arb at 1024 bits, is positive.",
    )


_DERIVED = "derived; the kernel e^(xy) is strictly totally positive (Karlin, Total Positivity, 1968)"

CLAIMS: Final = (
    Claim(
        id="LIN-2a",
        subject="linear attention",
        title="elu + 1 and the exponential",
        statement="The feature map elu + 1 of linear attention approximates softmax's kernel: φ(q)·φ(k) ≈ "
        "c·e^(q·k) for some constant c.",
        source="seed article on linear attention; Katharopoulos et al. 2020, arXiv 2006.16236, motivate φ so",
        kind="enclosure",
        check=lambda lab: ratios(elu_weight),
        control=lambda lab: ratios(series),
        covers=("SEED1-1",),
    ),
    Claim(
        id="LIN-2b",
        subject="linear attention",
        title="rows of elu + 1 attention",
        statement="Some rescaling of queries and keys brings the weights of elu + 1 attention close to "
        "softmax's.",
        source="seed article on linear attention, as a consequence of what it says of φ",
        kind="enclosure",
        check=lambda lab: row_distance(elu_weight, lab.choose(4, 8)),
        control=lambda lab: row_distance(series, 2),
    ),
    Claim(
        id="LIN-3a",
        subject="linear attention",
        title="softmax's kernel has full rank",
        statement="For n distinct numbers the matrix e^(q_i k_j) has full rank n (checked for equispaced "
        "points and for integers at the sizes of the table), so that no feature map of smaller width has "
        "softmax's weights.",
        source=_DERIVED,
        kind="enclosure",
        check=lambda lab: full_rank(lab.choose((8, 12, 16), (8, 12, 16, 24))),
        control=lambda lab: full_rank((8,), taylor_weight),
    ),
    Claim(
        id="LIN-3b",
        subject="linear attention",
        title="softmax is not separable",
        statement="Softmax's kernel has no feature map: e^(q·k) is not of the form φ(q)·φ(k).",
        source="seed article on linear attention",
        kind="enclosure",
        check=lambda lab: separable(exponential),
        control=lambda lab: separable(taylor_weight),
        covers=("SEED1-2",),
    ),
    Claim(
        id="LIN-3c",
        subject="linear attention",
        title="rank by float64",
        statement="The numerical rank of e^(q_i k_j) in float64 is its rank.",
        source="derived: what a plausible numerical check of LIN-3a would take for granted",
        kind="enclosure",
        check=lambda lab: float_rank(),
        control=lambda lab: float_rank((4, 6)),
    ),
)
