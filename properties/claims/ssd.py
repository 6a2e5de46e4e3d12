"""Claims about state space duality: semiseparable ranks, equal forms, costs. Theory.md SSD-1 to SSD-3.

Ranks are computed over the rationals; costs by running the forms on numbers that count operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.equal_forms import SCHWARTZ_ZIPPEL
from attnproof.properties.forms import gated, ssd
from attnproof.properties.forms.base import Array, difference
from attnproof.properties.forms.numbers import Tally, counted, generic, rationals

__all__ = [
    "CLAIMS",
    "bounded_recurrence",
    "equal_forms",
    "generation_cost",
    "ranks",
    "realisation",
    "training_cost",
]

SEED: Final = 71
SSD: Final = "Dao and Gu, Transformers are SSMs, arXiv 2405.21060"

_RANK_PROOF: Final = (
    "For all: M_ts = (C_tᵀA_t⋯A_{i+1})(A_i⋯A_{s+1}B_s) for s ≤ i ≤ t, where the empty product is I: the "
    "block "
    "is a product of a matrix with N columns and one with N rows"
)
_REALISATION_PROOF: Final = (
    "For all: let H_t = M[t:, :t+1] have rank r_t ≤ N, and U_t be r_t independent columns that span it. "
    "Row t "
    "left out, the columns of H_t lie in those of H_{t+1}, so U_t without its first row is "
    "U_{t+1}A_{t+1}; the "
    "last column of H_t is U_tB_t; C_tᵀ is the first row of U_t. Then M_ts = C_tᵀA_t⋯A_{s+1}B_s"
)
_RECURRENCE_PROOF: Final = (
    "For all: (y_t, …, y_{t−k+1}) is a state of k numbers, from which and later inputs later outputs follow, "
    "so that L's blocks have rank k at most, as in SSD-1a"
)

Matrix = Callable[[np.random.Generator, int, int], Array]
"""A lower triangular matrix by its length and the order that it is said to have."""


def from_model(rng: np.random.Generator, length: int, order: int) -> Array:
    """M of a random time-varying SSM with a state of ``order`` numbers and full transitions."""
    return ssd.materialised(
        (
            [rationals(rng, order, order) for _ in range(length)],
            [rationals(rng, order) for _ in range(length)],
            [rationals(rng, order) for _ in range(length)],
        )
    )


def from_softmax(rng: np.random.Generator, length: int, order: int) -> Array:
    """Causal softmax attention's unnormalised weights e^(q_i k_j) at q_i = i, k_j = j·log 2: integers."""
    return np.array(
        [[flint.fmpq(2 ** (i * j) if j <= i else 0) for j in range(length)] for i in range(length)],
        dtype=object,
    )


def from_inverse(rng: np.random.Generator, length: int, order: int) -> Array:
    """The inverse of a lower triangular matrix with ``order`` diagonals below the main one."""
    banded = flint.fmpq_mat(
        [
            [
                flint.fmpq(int(rng.integers(1, 9)), 3) if i - order <= j <= i else flint.fmpq(0)
                for j in range(length)
            ]
            for i in range(length)
        ]
    )
    return np.array(banded.inv().tolist(), dtype=object)


def _shown(M: Array) -> str:
    return "; ".join(", ".join(map(str, row)) for row in M)


def ranks(
    sizes: Sequence[tuple[int, int]] = ((8, 1), (8, 2), (10, 3)), matrix: Matrix = from_model
) -> ClaimFinding:
    """Has every submatrix on or below the diagonal of an SSM's matrix rank N at most?

    Args:
        sizes: T and N.
        matrix: :func:`from_model`, or one that is no SSM's.
    """
    rng = np.random.default_rng(SEED)
    rows, example = [], ""
    for length, order in sizes:
        M = matrix(rng, length, order)
        found = ssd.block_ranks(M)
        rows.append((length, order, max(found), found.count(order)))
        if max(found) > order and not example:
            i = next(i for i, rank in enumerate(found) if rank > order)
            # The smallest square at the corner of that block that has full rank beyond N.
            block = M[i : i + order + 1, i - order : i + 1]
            example = (
                f"T = {length}, N = {order}: rows {i + 1} to {i + len(block)} and columns {i - order + 1} "
                f"to {i + 1} are ({_shown(block)}); all rows from there on have rank {found[i]}"
            )
    titles = ("T", "N", "largest rank", "blocks of rank N")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence="ranks over the rationals of M[i:, :i+1] for all i, which hold every submatrix on or "
        "below the "
        "diagonal: "
        + ", ".join(f"T = {t}, N = {n}: {most} at most" for t, n, most, _ in rows)
        + ("" if example else f". {_RANK_PROOF}"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED,
    )


def realisation(
    sizes: Sequence[tuple[int, int]] = ((7, 1), (8, 2), (9, 3)), *, surplus: int = 0
) -> ClaimFinding:
    """Has every N-semiseparable matrix an SSM with a state of N? Built from ranks, then multiplied out.

    Args:
        sizes: T and N.
        surplus: the matrices have this many diagonals more than the order claimed.
    """
    rng = np.random.default_rng(SEED + 1)
    rows, example = [], ""
    for length, order in sizes:
        for name, matrix in (("inverse of a banded matrix", from_inverse), ("another SSM", from_model)):
            M = matrix(rng, length, order + surplus)
            parts = ssd.realised(M)
            widest = max(len(b) for b in parts[1])
            apart = difference(ssd.materialised(parts), M)
            rows.append((name, length, order, widest, bool(apart == 0)))
            if (apart != 0 or widest > order) and not example:
                example = (
                    f"{name}, T = {length}, N = {order}: the state needs {widest} numbers, M = ({_shown(M)})"
                )
                example = example if length <= 4 else example[: example.index(", M =")]
    titles = ("matrix", "T", "N", "widest state", "equal")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"{len(rows)} matrices over the rationals: reproduced exactly in "
        f"{sum(row[4] for row in rows)}, by a state of at most N in {sum(row[3] <= row[2] for row in rows)}"
        + ("" if example else f". {_REALISATION_PROOF}"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED + 1,
    )


def equal_forms(length: int = 11, *, strict: bool = False) -> ClaimFinding:
    """Are the recurrence, the quadratic form (L ∘ CBᵀ)X and the block decomposition equal?

    Args:
        length: T.
        strict: True puts one decay too many into L, Π_{j≤r≤i} in place of Π_{j<r≤i}.
    """
    rng = np.random.default_rng(SEED + 2)
    x, a = generic(rng, length, 3), generic(rng, length)
    B, C = generic(rng, length, 2), generic(rng, length, 2)
    # A decay of 0 forgets all: the forms must not divide by products of decays.
    reset = a.copy()
    reset[length // 2] = reset[length // 2] * 0
    rows = []
    for decays, told in ((a, ""), (reset, ", one decay 0")):
        due, state = gated.recurrent(C, B, x, decays[:, None, None])
        quadratic = ssd.quadratic(x, decays, B * decays[:, None] if strict else B, C)
        apart = difference(due, quadratic)
        rows.append((f"quadratic{told}", bool(apart == 0), float(apart)))
        for chunk in (1, 3, 4, length):
            y, last = ssd.blocks(x, decays, B, C, chunk=chunk)
            apart = max(difference(due, y), difference(state, last))
            rows.append((f"blocks of {chunk}{told}", bool(apart == 0), float(apart)))
    wrong = [row[0] for row in rows if not row[1]]
    titles = ("form", "equal", "largest difference")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"T = {length}, N = 2, P = 3, rational, and with one decay of 0: {len(rows) - len(wrong)} "
        f"of {len(rows)} forms equal the recurrence ({SCHWARTZ_ZIPPEL})",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="T = 1, x = B = C = 1, a_1 = 1/2: the recurrence from 0 gives 1; with Π_{j≤r≤i} "
        "a_r in "
        f"L the quadratic form gives 1/2. Different here: {', '.join(wrong)}"
        if wrong
        else "",
        seed=SEED + 2,
    )


def _interpolated(points: Sequence[int], values: Sequence[int]) -> flint.fmpq_poly:
    """The polynomial of lowest degree through all points."""
    total = flint.fmpq_poly([0])
    for i, (x, y) in enumerate(zip(points, values, strict=True)):
        term = flint.fmpq_poly([y])
        for j, other in enumerate(points):
            if j != i:
                term = term * flint.fmpq_poly([-other, 1]) / (x - other)
        total = total + term
    return total


def _generation(tokens: int, order: int, width: int) -> int:
    """Operations of ``tokens`` steps of a head."""
    tally = Tally()
    state = counted(tally, order, width)
    for _ in range(tokens):
        x, a, B, C = (counted(tally, *s) for s in ((width,), (1,), (order,), (order,)))
        _, state = ssd.step(x, a[0], B, C, state)
    return tally.products + tally.sums


def generation_cost(orders: Sequence[int] = (1, 2, 3, 4, 5, 6), *, wide: bool = True) -> ClaimFinding:
    """Do T generated tokens take O(T·N) operations? The degree in N of the count, at P = N or P = 1."""
    counts = [_generation(1, n, n if wide else 1) for n in orders]
    polynomial = _interpolated(orders, counts)
    linear = all(
        _generation(t, n, n if wide else 1) == t * c
        for t in (2, 5)
        for n, c in zip(orders[:3], counts[:3], strict=True)
    )
    degree = polynomial.degree()
    ratio = [str(Fraction(c, n)) for n, c in zip(orders, counts, strict=True)]
    width = "N" if wide else "1"
    return ClaimFinding(
        status="HOLDS" if linear and degree <= 1 else "REFUTED",
        evidence=f"counted at N = {list(orders)}, P = {width}: a token costs {polynomial} operations in x "
        f"= N, and T tokens T times that ({linear}), with a state of {'N²' if wide else 'N'} numbers",
        table={"N": list(orders), "operations a token": counts, "over N": ratio},
        counterexample=""
        if linear and degree <= 1
        else f"P = N, one token: {counts[0]} operations at N = {orders[0]}, {counts[-1]} at N = "
        f"{orders[-1]}: every one of the N·P = N² numbers of the state is decayed, written and read. Per "
        f"token {polynomial}, which no c·N bounds (quotients by N: {', '.join(ratio)})",
    )


def _training(chunks: int, order: int, *, quadratic: bool) -> int:
    tally = Tally()
    length = chunks * order
    x, B, C = (counted(tally, length, order) for _ in range(3))
    a = counted(tally, length)
    if quadratic:
        ssd.quadratic(x, a, B, C)
    else:
        ssd.blocks(x, a, B, C, chunk=order)
    return tally.products + tally.sums


def training_cost(orders: Sequence[int] = (2, 3, 4, 5, 6), *, quadratic: bool = False) -> ClaimFinding:
    """Does the block decomposition take O(T·N²) operations, nearly all in matrix products? P = N = chunk."""
    table = {m: [_training(m, n, quadratic=quadratic) for n in orders] for m in (2, 3, 4)}
    polynomials = {m: _interpolated(orders, values) for m, values in table.items()}
    # T = mN: T·N² is m·N³. Linear in m, the number of chunks, at every N.
    linear = all(a + c == 2 * b for a, b, c in zip(*table.values(), strict=True))
    degrees = [polynomial.degree() for polynomial in polynomials.values()]
    # Four products of N × N matrices a chunk: CBᵀ, (L ∘ CBᵀ)X, BᵀX and C·state, 2N³ operations each.
    rest = [polynomials[m] - flint.fmpq_poly([0, 0, 0, 8 * m]) for m in polynomials]
    good = linear and max(degrees) <= 3 and max(p.degree() for p in rest) <= 2
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"counted at N = {list(orders)}, T = 2N, 3N, 4N: at T = 2N {polynomials[2]} operations in "
        f"x = N; linear in T/N: {linear}; apart from 8·T·N² in four matrix products a chunk, degree "
        f"{max(p.degree() for p in rest)} in N",
        table={
            "N": list(orders),
            **{f"operations, T = {m}N": values for m, values in table.items()},
        },
        counterexample=""
        if good
        else f"N = {orders[0]}: "
        f"{', '.join(f'{table[m][0]} operations at T = {m * orders[0]}' for m in table)}: not linear in T",
    )


def bounded_recurrence(
    sizes: Sequence[tuple[int, int]] = ((7, 1), (8, 2), (9, 3)), *, full: bool = False
) -> ClaimFinding:
    """Is a mask L whose product is an autoregression of order k semiseparable of order k?

    y_t = Σ_{i≤k} μ_ti y_{t−i} + ν_t x_t is run on every unit vector.

    Args:
        sizes: T and k.
        full: True takes L_ij = 1/(i + j + 1) for j ≤ i in its place, which has no such recurrence.
    """
    rng = np.random.default_rng(SEED + 3)
    rows, example = [], ""
    for length, order in sizes:
        mu, nu = rationals(rng, length, order), rationals(rng, length)
        L = np.zeros((length, length), dtype=object)
        for t in range(length):
            L[t, t] = flint.fmpq(0) + nu[t]
            for i in range(min(order, t)):
                L[t] = L[t] + mu[t, i] * L[t - 1 - i]
            if full:
                L[t] = [flint.fmpq(int(j <= t), t + j + 1) for j in range(length)]
        found = ssd.block_ranks(L)
        rows.append((length, order, max(found)))
        if max(found) > order and not example:
            i = next(i for i, rank in enumerate(found) if rank > order)
            block = L[i : i + order + 1, i - order : i + 1]
            example = f"T = {length}, k = {order}: L has the block ({_shown(block)}) of rank {order + 1}"
    titles = ("T", "k", "largest rank")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence="ranks over the rationals of L[i:, :i+1] for all i: "
        + ", ".join(f"T = {t}, k = {k}: {most} at most" for t, k, most in rows)
        + ("" if example else f". {_RECURRENCE_PROOF}"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED + 3,
    )


CLAIMS: Final = (
    Claim(
        id="SSD-1a",
        subject="state space models",
        title="an SSM's matrix is semiseparable",
        statement="In M_ji = C_jᵀA_j…A_{i+1}B_i every submatrix on or below the diagonal has rank N at most.",
        source=f"{SSD}, theorem 3.5",
        kind="exact",
        check=lambda lab: ranks(lab.choose(((8, 1), (8, 2), (10, 3)), ((12, 1), (16, 2), (20, 4)))),
        control=lambda lab: ranks(((4, 1),), from_softmax),
        covers=("SSD-1",),
    ),
    Claim(
        id="SSD-1b",
        subject="state space models",
        title="a semiseparable matrix is an SSM's",
        statement="Every lower triangular matrix whose submatrices on or below the diagonal have rank N "
        "at most is that of a time-varying SSM with a state of N numbers.",
        source=f"{SSD}, proposition 3.3",
        kind="exact",
        check=lambda lab: realisation(lab.choose(((7, 1), (8, 2), (9, 3)), ((10, 1), (14, 2), (16, 4)))),
        control=lambda lab: realisation(((4, 1),), surplus=1),
    ),
    Claim(
        id="SSD-2a",
        subject="state space models",
        title="linear and quadratic form",
        statement="For A_t = a_t·I the recurrence, Y = (L ∘ CBᵀ)X with L_ij = Π_{j<r≤i} a_r, and the block "
        "decomposition at every chunk length are equal.",
        source=f"{SSD}, section 5.1, theorem 6.1, listing 1",
        kind="exact",
        check=lambda lab: equal_forms(lab.choose(11, 32)),
        control=lambda lab: equal_forms(4, strict=True),
        covers=("SSD-2",),
    ),
    Claim(
        id="SSD-2b",
        subject="state space models",
        title="operations to generate T tokens",
        statement="With head width P = N, generating T tokens takes O(T·N) operations.",
        source=f"{SSD}, theorem 6.1 (inference FLOPs)",
        kind="count",
        check=lambda lab: generation_cost(lab.choose((1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 8, 12))),
        # At P = 1, per channel, the printed figure is right.
        control=lambda lab: generation_cost(wide=False),
    ),
    Claim(
        id="SSD-2c",
        subject="state space models",
        title="operations in training",
        statement="With P = N and chunks of N the block decomposition takes O(T·N²) operations, all but a "
        "vanishing share in matrix products.",
        source=f"{SSD}, theorem 6.1 (training FLOPs)",
        kind="count",
        check=lambda lab: training_cost(lab.choose((2, 3, 4, 5, 6), (2, 3, 4, 5, 6, 7, 8))),
        control=lambda lab: training_cost((2, 3, 4, 5), quadratic=True),
    ),
    Claim(
        id="SSD-3",
        subject="state space models",
        title="bounded autoregression needs semiseparable masks",
        statement="If the product with a mask L is an autoregression of order k, L is semiseparable of "
        "order k at most (one direction: efficient generation by bounded recurrences implies it).",
        source=f"{SSD}, theorem 5.2",
        kind="exact",
        check=lambda lab: bounded_recurrence(
            lab.choose(((7, 1), (8, 2), (9, 3)), ((12, 1), (16, 2), (18, 4)))
        ),
        control=lambda lab: bounded_recurrence(((5, 1),), full=True),
    ),
)
