"""Claims about the HiPPO matrices: normal plus low rank, diagonalisation by lemma 3.2. Theory.md S4-3.

Statements about matrices with square roots are checked in coordinates where they are rational
(:mod:`attnproof.properties.forms.hippo`), those of the printed LegS itself in balls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.state_space import S4
from attnproof.properties.forms import hippo, state_space
from attnproof.properties.forms.base import Array

__all__ = [
    "CLAIMS",
    "diagonalised",
    "float_diagonalisation",
    "inverse_coefficients",
    "largest_against",
    "normal_plus_low_rank",
    "row_sums",
]

_BITS = 256
# Tables show every tenth size.
_EVERY = 10


def _is_semidefinite(symmetric: flint.fmpq_mat) -> bool:
    """All eigenvalues are real; they are ≥ 0 where the characteristic polynomial's signs alternate."""
    size = symmetric.nrows()
    return all((-1) ** (size - i) * c >= 0 for i, c in enumerate(symmetric.charpoly().coeffs()))


def normal_plus_low_rank(sizes: Sequence[int] = (1, 2, 3, 5, 8), diagonal: int = 0) -> ClaimFinding:
    """Is A = −c·I + skew − PPᵀ with P of rank 1 or 2, for each HiPPO matrix?

    Args:
        sizes: N.
        diagonal: added to every diagonal entry's coefficient, which breaks the statement.
    """
    rows, example = [], ""
    for name, (matrix, shift, rooted, rank) in hippo.CONGRUENT.items():
        for size in sizes:
            M = matrix(size)
            for n in range(size):
                # c·I is c·D⁻² where A is D·M·D.
                M[n, n] = M[n, n] - diagonal + (shift / (2 * n + 1) if rooted else shift)
            negative = flint.fmpq_mat([list(row) for row in -(M + M.T) / flint.fmpq(2)])
            good = _is_semidefinite(negative) and negative.rank() == min(rank, size)
            rows.append((name, size, str(shift), negative.rank(), bool(good)))
            if not good and not example:
                example = (
                    f"{name}, N = {size}: −(A + Aᵀ)/2 − {shift}·I, divided by the square roots on both "
                    f"sides, is {negative.tolist()}, of rank {negative.rank()}"
                )
    titles = ("matrix", "N", "c", "rank of the symmetric part", "normal plus low rank")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"symmetric parts over the rationals, N = {list(sizes)}: ranks "
        + ", ".join(f"{name} {max(row[3] for row in rows if row[0] == name)}" for name in hippo.CONGRUENT)
        + f"; semidefinite and of the stated rank in {sum(row[4] for row in rows)} of {len(rows)}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
    )


def diagonalised(matrix: Callable[[int], Array], sizes: Sequence[int] = (2, 3, 8)) -> ClaimFinding:
    """Is V⁻¹AV diagonal for the V of binomial coefficients? In the numbers that ``matrix`` gives."""
    rows, example = [], ""
    with _precision(_BITS):
        for size in sizes:
            V, A = hippo.eigenvectors(size), matrix(size)
            found = state_space.solve(V, A @ V)
            off = [abs(found[i, j]) for i, j in np.ndindex(size, size) if i != j]
            proved = sum(bool(x > 0) for x in off)
            eigenvalues = all(found[i, i] == i + 1 for i in range(size))
            rows.append((size, proved, bool(all(x == 0 for x in off)), bool(eigenvalues)))
            if proved and not example:
                example = (
                    f"N = {size}: V = {V.tolist()}, A = ({_shown(A)}), V⁻¹AV = ({_shown(found)}), whose "
                    "entry below the diagonal is not 0"
                )
    good = all(row[2] for row in rows)
    titles = ("N", "entries off the diagonal that are not 0", "diagonal", "eigenvalues are 1, …, N")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS" if good else "OPEN",
        evidence=f"V⁻¹AV at N = {list(sizes)}: {sum(row[1] for row in rows)} entries off the diagonal are "
        f"not 0; eigenvalues 1, …, N at {sum(row[3] for row in rows)} of {len(rows)} sizes",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
    )


def _shown(matrix: Array) -> str:
    """Rows separated by semicolons; balls to 8 digits."""
    return "; ".join(
        ", ".join(str(x.str(8, radius=False) if isinstance(x, flint.arb) else x) for x in row)
        for row in matrix
    )


def corrected(
    sizes: Sequence[int] = (2, 8, 24), matrix: Callable[[int], Array] = hippo.alternating
) -> ClaimFinding:
    """The same for Q⁻¹(−A)Q with Q = diag((−1)ⁿ√(2n+1)), which must first be what A' is said to be."""
    similar = True
    for size in sizes:
        signs = np.array([(-1) ** n for n in range(size)], dtype=object)
        conjugated = -hippo.legs(size) * signs[:, None] * signs[None]
        similar = similar and bool((conjugated == matrix(size)).all())
    finding = diagonalised(matrix, sizes)
    return ClaimFinding(
        status=finding.status if similar or finding.status != "HOLDS" else "REFUTED",
        evidence=finding.evidence + f"; it is Q⁻¹(−A)Q of LegS: {similar}",
        table=finding.table,
        counterexample=finding.counterexample,
    )


def largest_against(numerator: int, denominator: int, sizes: Sequence[int] = range(1, 201)) -> ClaimFinding:
    """Are V's entries at most 2^(pN/q) at every size N? In integers: largest^q ≤ 2^(pN)."""
    entries = [hippo.largest_entry(size) for size in sizes]
    above = [size for size, x in zip(sizes, entries, strict=True) if x**denominator > 2 ** (numerator * size)]
    rates = [x.bit_length() / size for size, x in zip(sizes, entries, strict=True)]
    example = ""
    if above:
        size = above[0]
        most = hippo.largest_entry(size)
        j = _last_row(size).index(most)
        example = (
            f"N = {size}: C({size - 1 + j}, {size - 1 - j}) = {most}, about 2^{_log2(most):.3f}, and "
            f"2^({numerator}·{size}/{denominator}) is about 2^{numerator * size / denominator:.3f}"
        )
    return ClaimFinding(
        status="REFUTED" if above else "HOLDS",
        evidence=f"integers, N = {sizes[0]} to {sizes[-1]}: "
        + (f"exceeded from N = {above[0]} on, at {len(above)} sizes" if above else "never exceeded")
        + f"; log₂ of the largest entry is {_log2(entries[-1]) / sizes[-1]:.4f}·N at N = {sizes[-1]}, and "
        "2·log₂ φ = 1.3885 is its limit",
        table={
            "N": list(sizes)[::_EVERY],
            "bits of the largest entry": [x.bit_length() for x in entries][::_EVERY],
        },
        plots=(
            Plot(
                title="bits of the largest entry of V over N",
                chart="line",
                columns={"N": list(sizes), "bits over N": rates},
                x="N",
                y="bits over N",
            ),
        ),
        counterexample=example,
    )


def _log2(x: int) -> float:
    """log₂ of a positive integer of any size."""
    return float(flint.arb(x).log() / flint.arb(2).log())


def row_sums(sizes: Sequence[int] = range(1, 121), offset: int = 1) -> ClaimFinding:
    """Is Σ_j C(n+j, n−j) the Fibonacci number F_{2n+1}, so that V's largest entry grows as φ^(2N)?"""
    wrong, outside = [], []
    for size in sizes:
        n = size - 1
        total = sum(_last_row(size))
        due = int(flint.fmpz.fib_ui(flint.fmpz(2 * n + offset)))
        if total != due:
            wrong.append((size, total, due))
        if not due <= size * hippo.largest_entry(size) <= size * due:
            outside.append(size)
    first = next(size for size in range(1, 200) if hippo.largest_entry(size) > 2**53)
    return ClaimFinding(
        status="REFUTED" if wrong or outside else "HOLDS",
        evidence=f"integers, N = {sizes[0]} to {sizes[-1]}: {len(wrong)} sums differ, {len(outside)} "
        f"largest entries are outside [F/N, F]; an entry of V exceeds 2^53 from N = {first} on",
        table={
            "N": list(sizes)[::_EVERY],
            "largest entry, bits": [hippo.largest_entry(s).bit_length() for s in sizes[::_EVERY]],
        },
        counterexample=f"N = {wrong[0][0]}: the last row of V sums to {wrong[0][1]}, not {wrong[0][2]}"
        if wrong
        else "",
    )


def _last_row(size: int) -> list[int]:
    n, term = size - 1, 1
    out = [1]
    for j in range(n):
        term = term * (n + j + 1) * (n - j) // ((2 * j + 1) * (2 * j + 2))
        out.append(term)
    return out


def float_diagonalisation(sizes: Sequence[int] = (8, 16, 24, 32), *, normal: bool = False) -> ClaimFinding:
    """Does float64 diagonalisation lose LegS (or, with ``normal``, its normal part)? By VΛV⁻¹."""
    rows = []
    for size in sizes:
        roots = np.sqrt(2 * np.arange(size) + 1.0)
        A = np.tril(-np.outer(roots, roots), -1) - np.diag(np.arange(size) + 1.0)
        if normal:
            A = A + 0.5 * np.outer(roots, roots)
        poles, V = np.linalg.eig(A)
        again = (V * poles) @ np.linalg.inv(V)
        rows.append((size, float(abs(again - A).max() / abs(A).max()), float(np.linalg.cond(V))))
    lost = [size for size, error, _ in rows if error > 0.1]
    titles = ("N", "relative error", "condition of V")
    table = {title: [row[i] for row in rows] for i, title in enumerate(titles)}
    return ClaimFinding(
        status="SUPPORTED" if lost else "REFUTED",
        evidence="numpy's float64 eigenvectors, of norm 1; relative error of VΛV⁻¹: "
        + ", ".join(f"N = {size}: {error:.2g} (condition {kappa:.2g})" for size, error, kappa in rows)
        + (f"; no correct digit from N = {lost[0]} on" if lost else "; nothing is lost"),
        table=table,
        plots=(
            Plot(
                "error of VΛV⁻¹ in float64", "line", table, x="N", y="relative error", log=("relative error",)
            ),
        ),
        counterexample="" if lost else f"N = {rows[-1][0]}: relative error {rows[-1][1]:.2g}",
    )


def inverse_coefficients(sizes: Sequence[int] = (2, 4, 8, 16, 32), *, central: bool = True) -> ClaimFinding:
    """Has 1/(1 − x)^N, modulo x^N, the largest coefficient C(2(N−1), N−1)?

    Args:
        sizes: N.
        central: False claims C(N, ⌊N/2⌋) instead.
    """
    rows, example = [], ""
    for size in sizes:
        # 1 − x has a power series inverse; a power of it by repeated products modulo x^N.
        inverse = flint.fmpz_poly([1])
        for _ in range(size):
            inverse = flint.fmpz_poly((inverse * flint.fmpz_poly([1] * size)).coeffs()[:size])
        most = int(max(inverse.coeffs()))
        m = size - 1
        due = int(flint.fmpz.bin_uiui(2 * m, m) if central else flint.fmpz.bin_uiui(size, size // 2))
        # 4^m/(2√m) ≤ C(2m, m) ≤ 4^m/√(3m + 1).
        bracket = 16**m <= 4 * m * most**2 and (3 * m + 1) * most**2 <= 16**m
        rows.append((size, most.bit_length(), most == due, bool(bracket)))
        if most != due and not example:
            example = f"N = {size}: the largest coefficient is {most}, not {due}: {inverse}"
    titles = (
        "N",
        "bits of the largest coefficient",
        "as claimed",
        "within 4^m/(2√m) and 4^m/√(3m+1), m = N−1",
    )
    return ClaimFinding(
        status="REFUTED" if example or not all(row[3] for row in rows) else "HOLDS",
        evidence=f"integer power series at N = {list(sizes)}: largest coefficient as claimed at "
        f"{sum(row[2] for row in rows)} sizes, within the bracket at {sum(row[3] for row in rows)}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
    )


CLAIMS: Final = (
    Claim(
        id="S4-3a",
        subject="state space models",
        title="HiPPO is normal plus low rank",
        statement="LegS, LegT and LagT are −c·I plus a skew matrix minus PPᵀ with P of rank 1, 2 and 1; "
        "for LegS A + ½ppᵀ = −½I + skew with p_n = √(2n+1).",
        source=f"{S4}, theorem 1 and appendix C.1",
        kind="exact",
        check=lambda lab: normal_plus_low_rank(lab.choose((1, 2, 3, 5, 8), (1, 2, 3, 5, 8, 16, 32))),
        control=lambda lab: normal_plus_low_rank((2,), diagonal=1),
        covers=("S4-3",),
    ),
    Claim(
        id="S4-3b",
        subject="state space models",
        title="lemma 3.2 as printed",
        statement="The HiPPO matrix A (LegS) is diagonalised by V_ij = C(i+j, i−j).",
        source=f"{S4}, lemma 3.2",
        kind="enclosure",
        check=lambda lab: diagonalised(hippo.balls),
        control=lambda lab: diagonalised(hippo.alternating),
    ),
    Claim(
        id="S4-3c",
        subject="state space models",
        title="lemma 3.2 up to signs and scaling",
        statement="V_ij = C(i+j, i−j) diagonalises Q⁻¹(−A)Q, Q = diag((−1)ⁿ√(2n+1)), whose entries are "
        "(−1)^(n−k)(2k+1) below the diagonal and n + 1 on it, with eigenvalues 1, …, N.",
        source=f"derived; corrects {S4}, lemma 3.2",
        kind="exact",
        check=lambda lab: corrected(lab.choose((2, 8, 16), (2, 8, 16, 32, 48))),
        # Without the alternating signs.
        control=lambda lab: corrected((2,), lambda size: -hippo.legs(size)),
    ),
    Claim(
        id="S4-3d",
        subject="state space models",
        title="entries of V up to 2^(4N/3)",
        statement="The entries of V are of magnitude at most 2^(4N/3).",
        source=f"{S4}, lemma 3.2",
        kind="exact",
        check=lambda lab: largest_against(4, 3, range(1, lab.choose(121, 401))),
        control=lambda lab: largest_against(7, 5, range(1, 121)),
    ),
    Claim(
        id="S4-3e",
        subject="state space models",
        title="entries of V grow as φ^(2N)",
        statement="The last row of V, Σ_j C(n+j, n−j), n = N − 1, sums to the Fibonacci number F_{2n+1}: "
        "the "
        "largest entry is between F_{2n+1}/N and F_{2n+1}, about 2^(1.388N).",
        source=f"derived; corrects {S4}, lemma 3.2",
        kind="exact",
        check=lambda lab: row_sums(range(1, lab.choose(61, 241))),
        control=lambda lab: row_sums(range(1, 5), offset=2),
    ),
    Claim(
        id="S4-3f",
        subject="state space models",
        title="diagonalising LegS in float64",
        statement="Diagonalising LegS is numerically infeasible: in float64 VΛV⁻¹ loses every digit of A "
        "at sizes far below those used (N = 64 and more), which its normal part does not.",
        source=f"{S4}, section 3.1",
        kind="measurement",
        check=lambda lab: float_diagonalisation(lab.choose((8, 16, 24, 32), (8, 16, 24, 32, 48, 64))),
        control=lambda lab: float_diagonalisation((8, 16, 24, 32), normal=True),
    ),
    Claim(
        id="S4-4e",
        subject="state space models",
        title="coefficients of an inverse characteristic polynomial",
        statement="Already for A = I the kernel's fast algorithm by the inverse of (1 − x)^N modulo x^N "
        "meets coefficients up to C(2(N−1), N−1), about 4^(N−1)/√(π(N−1)).",
        source=f"{S4}, appendix B.1 (recalled)",
        kind="exact",
        check=lambda lab: inverse_coefficients(),
        control=lambda lab: inverse_coefficients((2, 4), central=False),
        covers=("S4-4",),
    ),
)
