"""Claims about the Pierce–Birkhoff conjecture: a proposed counterexample in 30 variables, step by step.

The function: on pairs X, Y of symmetric 5 × 5 matrices let P = XY and h the minimum of the 40 forms
P_ii ± 4 P_ij, i ≠ j; f = h where h > 0 and det X > 0, else 0. Manuscript of Lai, Lim and Ren (github
7pocheR/Pierce-Birkhoff), a preprint with Lean files that were not at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np
from numpy.typing import NDArray

from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory

__all__ = [
    "CLAIMS",
    "conjecture",
    "continuity",
    "determinants",
    "perturbation",
    "proposed",
    "quadrics_on_the_orbit",
]

SIZE: Final = 5
PRIME: Final = 2**31 - 1
_D: Final = (1, 1, 0, 0, 0)
_E: Final = (0, 0, 1, 1, 0)
_PAIRS: Final = tuple(itertools.combinations_with_replacement(range(SIZE), 2))
_SOURCE: Final = "Lai, Lim, Ren, manuscript (github 7pocheR/Pierce-Birkhoff), "
Integers = NDArray[np.int64]


def determinants(matrices: Integers) -> Integers:
    """Determinants (count,) of integer matrices (count, n, n) by expansion: exact while they fit 64 bits."""
    if matrices.shape[-1] == 1:
        return matrices[:, 0, 0]
    total = np.zeros(len(matrices), dtype=np.int64)
    for j in range(matrices.shape[-1]):
        minor = np.delete(matrices[:, 1:], j, axis=2)
        total += (-1) ** j * matrices[:, 0, j] * determinants(minor)
    return total


def _corners(factor: int) -> Integers:
    """Matrices (2^16, 5, 5) with ``factor`` on the diagonal and ±1 elsewhere, +1 in the first row.

    A change of sign of row and column i together changes no determinant, so the first row may be fixed.
    """
    places = [(i, j) for i in range(1, SIZE) for j in range(SIZE) if i != j]
    bits = np.arange(2 ** len(places))[:, None] >> np.arange(len(places)) & 1
    out = np.ones((len(bits), SIZE, SIZE), dtype=np.int64)
    for place, (i, j) in enumerate(places):
        out[:, i, j] = 1 - 2 * bits[:, place]
    out[:, range(SIZE), range(SIZE)] = factor
    return out


def continuity(factor: int = 4) -> ClaimFinding:
    """Is P invertible wherever all P_ii ± factor·P_ij are positive, so that f has no jump?

    Divide row i by P_ii: the other entries fill an open box, |P_ij| < 1/factor. The determinant is affine in
    each of them, so its least value on the closed box is at a corner; if that is ≥ 0, a zero inside would be
    a minimum inside, the determinant constant along every entry, and det I = 0.
    """
    corners = _corners(factor)
    values = determinants(corners)
    least = int(values.min())
    corner = corners[int(values.argmin())]
    singular = flint.fmpq(1, SIZE - 1)
    rows = [[flint.fmpq(int(i == j)) - (i != j) * singular for j in range(SIZE)] for i in range(SIZE)]
    jump = ""
    if least < 0:
        vanishing, h = flint.fmpq_mat(rows).det(), 1 - factor * singular
        jump = (
            f"X = matrix with 1 on the diagonal and −{singular} elsewhere, Y = I: h = {h} > 0, det X = "
            f"{vanishing}; X ± ηI has determinants of both signs near it, so f jumps from 0 to {h}"
        )
    return ClaimFinding(
        status="REFUTED" if least < 0 else "HOLDS",
        evidence=f"exact determinants of all {len(values)} corners of the box (signs up to conjugation), "
        f"{factor} on the diagonal and ±1 elsewhere: least {least}, largest {int(values.max())}; so det P "
        f"{'can vanish' if least < 0 else 'is positive'} on the open box, where h > 0. Then det X det Y = "
        "det P "
        "is not 0 there, the sign of det X cannot change inside {h > 0}, and f tends to 0 with h at its "
        "boundary",
        table={
            "off-diagonal entries of the corner of the least": [
                " ".join(str(x) for i, x in enumerate(corner.flat) if i % (SIZE + 1))
            ],
            "determinant": [least],
        },
        counterexample=jump,
    )


def _invertible(rng: np.random.Generator) -> tuple[Any, Any]:
    """U (entries −9 … 9) and its inverse modulo the prime."""
    while True:
        U = flint.nmod_mat(SIZE, SIZE, rng.integers(-9, 10, SIZE * SIZE).tolist(), PRIME)
        if int(U.det()) != 0:
            return U, U.inv()


def _orbit_row(rng: np.random.Generator, D: Sequence[int], E: Sequence[int]) -> tuple[list[int], bool]:
    """All 496 monomials of degree ≤ 2 at a random point of the orbit modulo the prime; is XY = 0 there?"""
    U, inverse = _invertible(rng)
    diagonal = [flint.nmod_mat(SIZE, SIZE, np.diag(values).ravel().tolist(), PRIME) for values in (D, E)]
    X = U * diagonal[0] * U.transpose()
    Y = inverse.transpose() * diagonal[1] * inverse
    z = np.array([1, *(int(m[i, j]) for m in (X, Y) for i, j in _PAIRS)], dtype=np.int64)
    upper = np.triu_indices(len(z))
    product = X * Y
    zero = all(int(product[i, j]) == 0 for i in range(SIZE) for j in range(SIZE))
    return (z[upper[0]] * z[upper[1]] % PRIME).tolist(), zero


def _products_rank() -> int:
    """Rank over ℚ of the 25 entries of XY as quadratic forms in the 30 variables."""
    names = {("X", pair): i for i, pair in enumerate(_PAIRS)}
    names |= {("Y", pair): len(_PAIRS) + i for i, pair in enumerate(_PAIRS)}
    width = len(names)
    rows = []
    for a, b in itertools.product(range(SIZE), repeat=2):
        row = [0] * width**2
        for k in range(SIZE):
            x, y = (min(a, k), max(a, k)), (min(k, b), max(k, b))
            row[names["X", x] * width + names["Y", y]] += 1
        rows.append(row)
    return int(flint.fmpz_mat(rows).rank())


def quadrics_on_the_orbit(points: int = 520, E: Sequence[int] = _E, seed: int = 41) -> ClaimFinding:
    """Which polynomials of degree ≤ 2 vanish on {(UDUᵀ, U⁻ᵀEU⁻¹)}?

    The rank of their values at points modulo a prime is at most the rank over ℚ, and that is at most 496 less
    the number of independent polynomials that vanish: if both bounds meet, the dimension is proved.

    Args:
        points: of the orbit, U with random integer entries.
        E: diagonal of the second factor; that of the first is (1, 1, 0, 0, 0).
        seed: of U.
    """
    rng = np.random.default_rng(seed)
    rows, zero = zip(*(_orbit_row(rng, _D, E) for _ in range(points)), strict=True)
    rank = int(flint.nmod_mat(points, len(rows[0]), list(itertools.chain.from_iterable(rows)), PRIME).rank())
    vanishing = _products_rank() if all(zero) and all(d * e == 0 for d, e in zip(_D, E, strict=True)) else 0
    monomials = len(rows[0])
    proved = vanishing == SIZE**2 and rank == monomials - vanishing
    return ClaimFinding(
        status="HOLDS" if proved else "REFUTED",
        evidence=f"values of {monomials} monomials at {points} points of the orbit (seed {seed}) have rank "
        f"{rank} "
        f"modulo 2³¹ − 1; independent entries of XY that vanish on it (DE = 0, rank over ℚ): {vanishing}; "
        + (
            f"{rank} + {vanishing} = {monomials}, so the dimension over ℚ is proved"
            if proved
            else f"{rank} + {vanishing} is not {monomials}"
        ),
        table={
            "monomials": [monomials],
            "points": [points],
            "rank": [rank],
            "vanishing, independent": [vanishing],
        },
        counterexample=""
        if proved
        else f"U = I: DE = diag{tuple(d * e for d, e in zip(_D, E, strict=True))}",
        seed=seed,
    )


def proposed(X: Any, Y: Any, *, by_sign: bool = True) -> tuple[Any, Any, Any]:
    """f, h and det X of rational symmetric matrices (fmpq_mat), by the definition.

    Args:
        X, Y: 5 × 5.
        by_sign: with the condition det X > 0; without it f = max(h, 0) is a max–min polynomial.
    """
    P = X * Y
    forms = (P[i, i] + s * 4 * P[i, j] for i in range(SIZE) for j in range(SIZE) if i != j for s in (1, -1))
    h = min(forms)
    determinant = X.det()
    return (h if h > 0 and (determinant > 0 or not by_sign) else flint.fmpq(0)), h, determinant


def _pair(U: Any, epsilon: Any, eta: int, second: int) -> tuple[Any, Any]:
    """U D_X Uᵀ and U⁻ᵀ D_Y U⁻¹ with D_X = diag(1, 1, ε², ε², ηε), D_Y = diag(ε², ε², 1, 1, second·ε)."""
    square = epsilon * epsilon
    diagonals = ((1, 1, square, square, eta * epsilon), (square, square, 1, 1, second * epsilon))
    DX, DY = (
        flint.fmpq_mat([[values[i] if i == j else 0 for j in range(SIZE)] for i in range(SIZE)])
        for values in diagonals
    )
    inverse = U.inv()
    return U * DX * U.transpose(), inverse.transpose() * DY * inverse


def _matrices(count: int, seed: int) -> list[tuple[str, Any]]:
    """The identity, a unit triangular matrix, and random integer matrices of determinant ≠ 0."""
    rng = np.random.default_rng(seed)
    triangle = [[int(j <= i) for j in range(SIZE)] for i in range(SIZE)]
    found = [
        ("identity", flint.fmpq_mat([[int(i == j) for j in range(SIZE)] for i in range(SIZE)])),
        ("lower triangle of ones", flint.fmpq_mat(triangle)),
    ]
    while len(found) < count + 2:
        U = flint.fmpq_mat(rng.integers(-3, 4, (SIZE, SIZE)).tolist())
        if U.det() != 0:
            found.append((f"random {len(found) - 1}", U))
    return found


def perturbation(
    count: int = 3, *, inverse: bool = True, by_sign: bool = True, seed: int = 42
) -> ClaimFinding:
    """Do two points near the orbit have the same XY = ε²I, and f = ε² at one and 0 at the other?

    Args:
        count: random integer U besides two plain ones, each with ε = 1/7, 1/70 and 1/700.
        inverse: Y's last eigenvalue is ηε, so that it matches X's; ε otherwise.
        by_sign: see :func:`proposed`.
        seed: of U.
    """
    rows, wrong = [], ""
    for name, U in _matrices(count, seed):
        for scale in (7, 70, 700):
            e = flint.fmpq(1, scale)
            values = []
            for eta in (1, -1):
                X, Y = _pair(U, e, eta, eta if inverse else 1)
                f, h, determinant = proposed(X, Y, by_sign=by_sign)
                expected = e * e if eta > 0 else flint.fmpq(0)
                multiple = flint.fmpq_mat([[e * e * (i == j) for j in range(SIZE)] for i in range(SIZE)])
                scalar = bool(multiple == X * Y)
                right = scalar and f == expected and determinant == eta * U.det() ** 2 * e**5
                values += [str(h), str(f)]
                if not right:
                    at = f"U = {name}, ε = {e}, η = {eta}"
                    wrong = wrong or f"{at}: XY = ε²I is {scalar}, h = {h}, f = {f}"
            rows.append((name, str(e), str(U.det()), *values))
    titles = ("U", "ε", "det U", "h at η = 1", "f at η = 1", "h at η = −1", "f at η = −1")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(rows)} choices of U and ε (seed {seed}), rational arithmetic: "
        + (
            wrong
            or "XY = ε²I and det X = η (det U)² ε⁵ at both points, f = ε² at η = 1 and 0 at η = −1 (at ε = "
            "1/7: "
            "1/49 and 0)"
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=wrong,
        seed=seed,
    )


_ARGUMENT: Final = (
    "If f = max_i min_j g_ij, then at any t > 0 some g = g_ij has g(ta) ≥ f(ta) = t²ε² at a = (X₊, Y₊) and "
    "g(tb) ≤ f(tb) = 0 at b = (X₋, Y₋). There are finitely many g, so one serves for t → 0, then ε → 0, and "
    "U in "
    "a Zariski-dense set. Order by order in t: the constant term is ≥ 0 and ≤ 0, so 0; the linear part is ≥ "
    "0 at "
    "a and ≤ 0 at b, which meet on the orbit as ε → 0, so it vanishes there, so it is 0 (step 3); the "
    "quadratic "
    "part is ≥ ε² at a and ≤ 0 at b, so it vanishes on the orbit and is linear in XY (step 3); but XY is "
    "the same "
    "at a and b (step 4), so ε² ≤ 0."
)


def conjecture(points: int = 520, *, by_sign: bool = True) -> ClaimFinding:
    """Do the steps that refute the conjecture in 30 variables hold?

    Args:
        points: see :func:`quadrics_on_the_orbit`.
        by_sign: with the condition det X > 0; without it the function is a max–min polynomial.
    """
    steps = (
        ("1: f is continuous", continuity()),
        ("3: degree ≤ 2 on the orbit: only XY", quadrics_on_the_orbit(points)),
        ("4: equal XY, different f", perturbation(by_sign=by_sign)),
    )
    missing = [name for name, finding in steps if finding.status != "HOLDS"]
    return ClaimFinding(
        status="OPEN" if missing else "REFUTED",
        evidence=(
            f"steps that do not hold for this function: {', '.join(missing)}"
            if missing
            else "steps 1, 3 and 4 hold exactly (SPL-9a, SPL-9b, SPL-9c); the argument that joins them is "
            "written "
            "out here and was checked by two readers by hand, not by machine: "
            + _ARGUMENT
            + " The manuscript is a preprint."
        ),
        table={
            "step": [name for name, _ in steps],
            "status": [finding.status for _, finding in steps],
        },
        counterexample=""
        if missing
        else "P = XY for symmetric 5 × 5 matrices X, Y; h = min over i ≠ j of P_ii ± 4 P_ij;\n"
        "f = h where h > 0 and det X > 0, else 0. Continuous: where h > 0 P is strictly diagonally "
        "dominant.\n"
        "D_X = diag(1, 1, ε², ε², ηε), D_Y = diag(ε², ε², 1, 1, ηε), η = ±1, X = U D_X Uᵀ, Y = U⁻ᵀ D_Y U⁻¹:\n"
        "XY = ε²I for both η, f = ε² for η = 1 and 0 for η = −1.\n"
        "Polynomials of degree ≤ 2 that vanish as ε → 0 for all U: linear in XY only (rank 471 = 496 − 25).\n"
        "A max–min form of f needs one that is ≥ ε² at the first and ≤ 0 at the second.",
    )


def _elsewhere(lab: Laboratory) -> ClaimFinding:
    return ClaimFinding(
        status="OPEN",
        evidence="needs the manuscript's definitions of these functions and its Lean files, which were not "
        "at "
        "hand; of the case of 30 variables the steps are checked in SPL-9a to SPL-9d",
    )


CLAIMS: Final = (
    Claim(
        id="SPL-9a",
        subject="splines",
        title="Pierce–Birkhoff, step 1: the function is continuous",
        statement="Where all P_ii ± 4 P_ij > 0 (P = XY, 5 × 5) the matrix P is strictly diagonally "
        "dominant, so "
        "det X ≠ 0 there, and f (= h where h > 0 and det X > 0, else 0) is continuous.",
        source=_SOURCE + "step 1",
        kind="exact",
        check=lambda lab: continuity(),
        control=lambda lab: continuity(3),
    ),
    Claim(
        id="SPL-9b",
        subject="splines",
        title="Pierce–Birkhoff, step 3: quadrics through the orbit",
        statement="On the orbit of pairs (UDUᵀ, U⁻ᵀEU⁻¹), D = diag(1, 1, 0, 0, 0), E = diag(0, 0, 1, 1, 0), "
        "the "
        "polynomials of degree ≤ 2 that vanish are exactly the linear combinations of the 25 entries of XY: "
        "of "
        "496 monomials the values have rank 471.",
        source=_SOURCE + "step 3",
        kind="exact",
        check=lambda lab: quadrics_on_the_orbit(lab.choose(500, 560, 1000)),
        control=lambda lab: quadrics_on_the_orbit(500, (0, 1, 1, 0, 0)),
    ),
    Claim(
        id="SPL-9c",
        subject="splines",
        title="Pierce–Birkhoff, step 4: two points with equal XY",
        statement="With D_X = diag(1, 1, ε², ε², ηε) and D_Y = diag(ε², ε², 1, 1, ηε) both signs η give XY "
        "= ε²I, "
        "while det X = η (det U)² ε⁵, so f is ε² at one and 0 at the other.",
        source=_SOURCE + "step 4",
        kind="exact",
        check=lambda lab: perturbation(lab.choose(3, 20, 100)),
        control=lambda lab: perturbation(1, inverse=False),
    ),
    Claim(
        id="SPL-9d",
        subject="splines",
        title="the Pierce–Birkhoff conjecture",
        statement="Every continuous function that is piecewise polynomial on a semialgebraic partition of "
        "ℝⁿ is "
        "max_i min_j of finitely many polynomials (Pierce–Birkhoff); with SPL-8, every spline is a ReLU "
        "encoder.",
        source="Birkhoff and Pierce 1956; assumed in the abstract of Lai, Lim, Liu, arXiv 2408.09624; "
        + _SOURCE
        + "n = 30",
        kind="exact",
        check=lambda lab: conjecture(lab.choose(500, 560, 1000)),
        control=lambda lab: conjecture(500, by_sign=False),
        covers=("SEED3-6",),
    ),
    Claim(
        id="SPL-9f",
        subject="splines",
        title="Pierce–Birkhoff: the other counterexamples",
        statement="Counterexamples (n, d, k) = (5, 4, 3), (6, 3, 2), (7, 3, 2), (8, 2, 2), (72, 6, 2): n "
        "variables, conditions of degree ≤ d, pieces of degree k.",
        source=_SOURCE + "under review",
        kind="none",
        check=_elsewhere,
        control=None,
    ),
)
