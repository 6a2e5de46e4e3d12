"""Claims about S4D, which keeps the diagonal of S4's normal-plus-low-rank matrix. Theory.md S4-4.

LegS in the coordinates in which it is rational (its B is all ones there). S4D keeps the normal part A^N = A +
½ppᵀ and halves B. Gu, Gupta, Goel and Ré, arXiv 2206.11893, as recalled by theory.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory, Plot
from attnproof.properties.forms import hippo, state_space
from attnproof.properties.forms.base import Array, filled
from attnproof.properties.forms.numbers import Gaussian, rationals

__all__ = ["CLAIMS", "conjugate_pairs", "eigenvalue_law", "limit", "same_kernel", "transfer_ratio"]

SEED: Final = 44
_S4D = (
    "Gu, Gupta, Goel and Ré, On the Parameterization and Initialization of Diagonal State Space Models, "
    "arXiv 2206.11893 (recalled)"
)
_BITS = 256
# Points s at which transfer functions are compared: at integers below N both agree exactly.
_POINTS = (flint.fmpq(0), flint.fmpq(1, 2), flint.fmpq(1), flint.fmpq(3, 2), flint.fmpq(7, 3))


def _ones(size: int) -> Array:
    return filled((size,), [flint.fmpq(1)] * size)


def same_kernel(sizes: Sequence[int] = (1, 2, 3), length: int = 4, *, keep: bool = False) -> ClaimFinding:
    """Is S4D's kernel S4's at finite N, with B or with B/2? By the bilinear rule at Δ = 1, C = e_0.

    Args:
        sizes: N.
        length: of the kernels.
        keep: True keeps the rank-1 term.
    """
    rows, example = [], ""
    for size in sizes:
        C = filled((size,), [flint.fmpq(int(n == 0)) for n in range(size)])
        full = state_space.kernel(
            *state_space.bilinear(hippo.legs(size), _ones(size), flint.fmpq(1)), C, length
        )
        normal = hippo.legs(size) if keep else hippo.legs_normal(size)
        for name, factor in (("B", 1), *(() if keep else (("B/2", 2),))):
            found = state_space.kernel(
                *state_space.bilinear(normal, _ones(size) / flint.fmpq(factor), flint.fmpq(1)), C, length
            )
            equal = int((found == full).sum())
            rows.append((size, name, equal, length))
            if equal < length and not example:
                example = (
                    f"N = {size}, Δ = 1, A = {hippo.legs(size).tolist()}, A^N = {normal.tolist()}, {name}, "
                    f"C = e_0: S4's kernel starts {full[0]}, {full[1]}, S4D's {found[0]}, {found[1]}"
                )
    titles = ("N", "input", "taps equal", "taps")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"rational kernels of {length} taps, N = {list(sizes)}: {sum(row[2] for row in rows)} of "
        f"{sum(row[3] for row in rows)} taps equal",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
    )


def _defect(size: int, s: flint.fmpq) -> flint.fmpq:
    """q_N(s) = Π_{k=1}^{N} (s − k + 1)/(s + k): 1 minus LegS's own transfer function pᵀ(s − A)⁻¹p."""
    out = flint.fmpq(1)
    for k in range(1, size + 1):
        out = out * (s - k + 1) / (s + k)
    return out


def _transfers(size: int, s: flint.fmpq, divisor: int) -> tuple[Array, Array]:
    """(s − A)⁻¹B of S4 and of S4D, whose B is divided by ``divisor``."""
    one = state_space.identity(hippo.legs(size))
    full = state_space.solve(one * s - hippo.legs(size), _ones(size))
    return full, state_space.solve(one * s - hippo.legs_normal(size), _ones(size) / flint.fmpq(divisor))


def transfer_ratio(sizes: Sequence[int] = (1, 2, 3, 6), divisor: int = 2) -> ClaimFinding:
    """Is S4D's transfer function S4's divided by 1 + q_N(s), for every C?"""
    rows, example = [], ""
    for size in sizes:
        for s in _POINTS:
            full, kept = _transfers(size, s, divisor)
            due = full / (1 + _defect(size, s))
            equal = bool((kept == due).all())
            rows.append((size, str(s), str(_defect(size, s)), equal, bool((kept == full).all())))
            if not equal and not example:
                example = f"N = {size}, s = {s}: S4D's first entry is {kept[0]}, S4's over 1 + q is {due[0]}"
    titles = ("N", "s", "q_N(s)", "ratio is 1/(1 + q)", "S4D equals S4 at s")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"vectors (s − A)⁻¹B over the rationals, N = {list(sizes)}, s = "
        f"{', '.join(map(str, _POINTS))}: ratio as stated in {sum(row[3] for row in rows)} of {len(rows)}, "
        f"S4D equal to S4 in {sum(row[4] for row in rows)}, at integers s < N",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
    )


def _kernel_at(size: int, t: flint.fmpq, divisor: int) -> tuple[flint.arb, flint.arb]:
    """e_0ᵀe^(tA)B of S4 and of S4D in balls."""
    found = []
    for A, factor in ((hippo.legs(size), 1), (hippo.legs_normal(size), divisor)):
        decay = (flint.arb_mat([[flint.arb(x * t) for x in row] for row in A])).exp()
        found.append(sum((decay[0, k] for k in range(size)), flint.arb(0)) / factor)
    return found[0], found[1]


def limit(sizes: Sequence[int] = (4, 8, 16, 32), divisor: int = 2) -> ClaimFinding:
    """Does S4D's kernel tend to S4's as N grows: in its transfer function, and at single times?"""
    s, times = flint.fmpq(1, 2), (flint.fmpq(0), flint.fmpq(1, 2), flint.fmpq(1))
    apart = []
    for size in sizes:
        full, kept = _transfers(size, s, divisor)
        apart.append(float(abs(kept[0] / full[0] - 1)))
    gaps: dict[str, list[float]] = {str(t): [] for t in times}
    with _precision(_BITS):
        for size in sizes:
            for t in times:
                whole, normal = _kernel_at(size, t, divisor)
                gaps[str(t)].append(float(abs(whole - normal).lower()))
    falls = all(later < earlier / 2 for earlier, later in zip(apart, apart[1:], strict=False))
    stays = [t for t, gap in gaps.items() if gap[-1] > gap[0] / 2]
    status = "REFUTED" if not falls else "CONDITIONAL" if stays else "SUPPORTED"
    table: dict[str, list[Any]] = {
        "N": list(sizes),
        "transfer function at s = 1/2, relative": apart,
        **{f"kernel at t = {t}, absolute": gap for t, gap in gaps.items()},
    }
    every = [(n, t, gap) for t, column in gaps.items() for n, gap in zip(sizes, column, strict=True)]
    return ClaimFinding(
        status=status,
        evidence=f"LegS, C = e_0, N = {list(sizes)}: the transfer function at s = 1/2 is apart by "
        + ", ".join(f"{x:.2g}" for x in apart)
        + "; the kernel itself does not come nearer at t = "
        + (", ".join(stays) or "none")
        + f" (exact at 0, enclosed else), by {min(gaps['1']):.2g} to {max(gaps['1']):.2g} at t = 1",
        table=table,
        plots=(
            Plot(
                title="S4D against S4: kernel at a time",
                chart="line",
                columns={
                    "N": [n for n, _, _ in every],
                    "distance": [gap for _, _, gap in every],
                    "t": [t for _, t, _ in every],
                },
                x="N",
                y="distance",
                color="t",
            ),
        ),
        counterexample=""
        if status == "SUPPORTED"
        else "t = 0, any N: S4's kernel is C·B = 1 for C = e_0 (in coordinates in which B is all ones), "
        f"S4D's is C·B/{divisor}. At s = 1/2 the transfer functions differ by a factor of "
        + ", ".join(f"{1 + x:.6g} (N = {n})" for n, x in zip(sizes[:2], apart, strict=False))
        + ".",
    )


def conjugate_pairs(size: int = 3, length: int = 8, *, doubled: bool = True) -> ClaimFinding:
    """Is the kernel of N conjugate pairs twice the real part of that of one of each?"""
    rng = np.random.default_rng(SEED)
    poles, B, C = (
        filled((size,), map(Gaussian, rationals(rng, size), rationals(rng, size))) for _ in range(3)
    )
    wrong, example = 0, ""
    powers = filled((size,), [Gaussian(flint.fmpq(1), flint.fmpq(0))] * size)
    for i in range(length):
        half = (C * powers * B).sum()
        both = half + sum(
            (_conjugate(c) * _conjugate(p) * _conjugate(b) for c, p, b in zip(C, powers, B, strict=True)),
            Gaussian(flint.fmpq(0), flint.fmpq(0)),
        )
        found = Gaussian((2 if doubled else 1) * half.re, flint.fmpq(0))
        if abs(both - found) != 0:
            wrong += 1
            example = example or (
                f"tap {i}: Σ C_n λ_nⁱ B_n over half of the modes is {half.re} + {half.im}i, over all "
                f"{both.re}, claimed {found.re}"
            )
        powers = powers * poles
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{size} conjugate pairs, {length} taps: {wrong} differ",
        table={"pairs": [size], "taps": [length], "differ": [wrong]},
        counterexample=example,
        seed=SEED,
    )


def _conjugate(x: Gaussian) -> Gaussian:
    return Gaussian(x.re, -x.im)


def eigenvalue_law(sizes: Sequence[int] = (16, 32, 64), *, law: str = "inverse") -> ClaimFinding:
    """Are Im λ of A^N, largest first, near N/π·(N/(2n+1) − 1)? Or, by the linear law, near π(N/2 − 1 − n)?

    By float64 eigenvalues of the Hermitian i(A^N + ½I). Real parts are −½ exactly (S4-3a).
    """
    rows = []
    for size in (2, *sizes):
        roots = np.sqrt(2 * np.arange(size) + 1.0)
        lower = np.tril(np.outer(roots, roots), -1)
        found = np.sort(np.linalg.eigvalsh(0.5j * (lower.T - lower)))[::-1][: size // 2]
        n = np.arange(size // 2)
        claimed = size / np.pi * (size / (2 * n + 1) - 1) if law == "inverse" else np.pi * (size // 2 - 1 - n)
        apart = abs(claimed / found - 1)
        middle = apart[size // 16 : size // 4 or None]
        place = size // 16 + int(middle.argmax())
        example = f"n = {place}: {found[place]:.6g}, by the law {claimed[place]:.6g}"
        rows.append((size, float(found[0]), float(claimed[0]), float(apart[0]), float(middle.max()), example))
    first, middles = [row[3] for row in rows[1:]], [row[4] for row in rows[1:]]
    reached = all(later < 0.6 * earlier for earlier, later in zip(first, first[1:], strict=False))
    kept = middles[-1] < 0.6 * middles[0]
    status = "REFUTED" if not reached else "SUPPORTED" if kept else "CONDITIONAL"
    titles = (
        "N",
        "largest Im λ",
        "by the law",
        "its relative error",
        "largest relative error, N/16 ≤ n < N/4",
    )
    return ClaimFinding(
        status=status,
        evidence=f"float64 eigenvalues, N = {list(sizes)}: the largest is off by "
        + ", ".join(f"{x:.2g}" for x in first)
        + ", those of N/16 ≤ n < N/4 by up to "
        + ", ".join(f"{x:.2g}" for x in middles),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=""
        if status == "SUPPORTED"
        else "a share of all n, N/16 ≤ n < N/4, stays off the law as N grows (imaginary parts, largest "
        "first, "
        "where off the most): "
        + "; ".join(f"N = {row[0]}, {row[5]}, {row[4]:.2g} off" for row in rows[1:])
        + ". Condition: n fixed while N grows; the largest is off by "
        + ", ".join(f"{row[3]:.2g} (N = {row[0]})" for row in rows[1:])
        + ".",
    )


def _unread(lab: Laboratory) -> ClaimFinding:
    return ClaimFinding(
        status="OPEN",
        evidence="which label the appendix prints above which matrix can only be read there, and its text "
        "is not at hand; that LegT needs a correction of rank 2, and LegS and LagT of rank 1, is S4-3a",
    )


CLAIMS: Final = (
    Claim(
        id="S4-4a",
        subject="state space models",
        title="S4D is S4",
        statement="Dropping the rank-1 term of LegS's normal-plus-low-rank form leaves the kernel as it is.",
        source=f"read into {_S4D}, section 4",
        kind="exact",
        check=lambda lab: same_kernel(),
        control=lambda lab: same_kernel(keep=True),
    ),
    Claim(
        id="S4-4b",
        subject="state space models",
        title="S4D tends to S4",
        statement="As N grows the kernel of the normal part A + ½ppᵀ with B/2 tends to that of LegS.",
        source=f"{_S4D}, theorem 3",
        kind="exact",
        check=lambda lab: limit(lab.choose((4, 8, 16), (4, 8, 16, 32, 64))),
        control=lambda lab: limit((4, 8), divisor=1),
    ),
    Claim(
        id="S4-4c",
        subject="state space models",
        title="S4D's transfer function",
        statement="S4D's transfer function is S4's divided by 1 + q_N(s), q_N(s) = Π_{k≤N} (s − k + 1)/(s "
        "+ k), for every C: equal at s = 0, …, N − 1, and in the limit where Re s > −1/2.",
        source=f"derived; makes {_S4D}, theorem 3, exact",
        kind="exact",
        check=lambda lab: transfer_ratio(lab.choose((1, 2, 3, 6), (1, 2, 3, 6, 12))),
        control=lambda lab: transfer_ratio((1, 2), divisor=1),
    ),
    Claim(
        id="S4-4d",
        subject="state space models",
        title="conjugate pairs",
        statement="The kernel of N/2 conjugate pairs of modes is twice the real part of the kernel of N/2 "
        "modes.",
        source=f"{_S4D}, section 3.3",
        kind="exact",
        check=lambda lab: conjugate_pairs(),
        control=lambda lab: conjugate_pairs(1, doubled=False),
    ),
    Claim(
        id="S4-4g",
        subject="state space models",
        title="S4D-Inv follows LegS's eigenvalues",
        statement="The eigenvalues of LegS's normal part have the imaginary parts N/π·(N/(2n+1) − 1) as N "
        "grows, which S4D-Inv starts from.",
        source=f"{_S4D}, conjecture 5",
        kind="measurement",
        check=lambda lab: eigenvalue_law(lab.choose((16, 32, 64), (16, 32, 64, 128, 256))),
        # S4D-Lin's evenly spaced ones.
        control=lambda lab: eigenvalue_law((16, 32, 64), law="linear"),
    ),
    Claim(
        id="S4-4f",
        subject="state space models",
        title="a mislabelled matrix",
        statement="The appendix of S4 mislabels the LegT matrix.",
        source="Gu, Goel and Ré, arXiv 2111.00396, appendix C.1",
        kind="none",
        check=_unread,
        control=None,
    ),
)
