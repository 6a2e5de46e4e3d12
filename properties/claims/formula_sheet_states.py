"""Identities of attention's variants with a state: least squares, levels of a Fenwick tree, decays."""

from __future__ import annotations

import math
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.claims.equal_forms import equality, row
from attnproof.properties.claims.formula_sheet import sheet_claim
from attnproof.properties.forms import gated
from attnproof.properties.forms.base import Array, each, filled, segments
from attnproof.properties.forms.numbers import generic

__all__ = [
    "CLAIMS",
    "conjugate_gradients",
    "decays_of_rwkv7",
    "guarded_steps",
    "least_squares",
    "level",
    "levels_of_one",
    "levels_partition",
    "steps_suffice",
]

_SEED: Final = 602


def _solve(a: Array, b: Array) -> Array:
    """a⁻¹b over the rationals."""
    left, right = (flint.fmpq_mat(x.shape[0], x.size // x.shape[0], list(x.flat)) for x in (a, b))
    return filled(b.shape, left.solve(right).entries())


def _diagonal(x: Array) -> Array:
    out = each(lambda _: flint.fmpq(0), np.empty((len(x), len(x)), dtype=object))
    out[np.diag_indices(len(x))] = x
    return out


def least_squares(*, decayed: bool = True) -> ClaimFinding:
    """Is MesaNet's output q times the ridge regression of v on k with the weights β_i Π e^g?

    Args:
        decayed: count the decays in the regression's weights.
    """
    rng = np.random.default_rng(_SEED)
    n, width = 5, 3
    q, k, v, ridge = (
        generic(rng, n, width),
        generic(rng, n, width),
        generic(rng, n, 2),
        generic(rng, width, low=1),
    )
    rows = []
    ones = each(lambda _: flint.fmpq(1), np.empty(n, dtype=object))
    for name, beta, decay in (
        ("β = 1, g = 0", ones, ones),
        ("β, g", generic(rng, n, low=1), generic(rng, n, low=1)),
    ):
        kk, kv = 0 * np.outer(k[0], k[0]), 0 * np.outer(k[0], v[0])
        outputs, duals, gradients = [], [], []
        for t in range(n):
            kk = decay[t] * kk + beta[t] * np.outer(k[t], k[t])
            kv = decay[t] * kv + beta[t] * np.outer(k[t], v[t])
            solved = _solve(kk + _diagonal(ridge), kv)
            outputs.append(q[t] @ solved)
            weights = filled((t + 1,), (beta[i] * math.prod(decay[i + 1 : t + 1]) for i in range(t + 1)))
            weights = weights if decayed else beta[: t + 1]
            keys, values = k[: t + 1], v[: t + 1]
            # Λ⁻¹Kᵀ(KΛ⁻¹Kᵀ + B⁻¹)⁻¹V: the regression by its dual, a system of positions.
            kernel = (keys / ridge) @ keys.T + _diagonal(1 / weights)
            duals.append(q[t] @ ((keys / ridge).T @ _solve(kernel, values)))
            gradients.append(
                _diagonal(ridge) @ solved + (keys * weights[:, None]).T @ (keys @ solved - values)
            )
        rows.append(row(name, "regression by its dual", np.stack(outputs), [np.stack(duals)]))
        rows.append(row(name, "gradient of the loss", np.stack(gradients) * 0, [np.stack(gradients)]))
    return equality(
        rows,
        seed=_SEED,
        example="width 1, k = 1, 1, v = 1, 0, e^g = 1/2, λ = 1: (1/2 + 1 + 1)⁻¹·1/2 = 1/5; without the decay "
        "(1 + 1 + 1)⁻¹·1 = 1/3",
    )


def conjugate_gradients(a: Array, b: Array, steps: int, guard: Any = 0) -> Array:
    """x after ``steps`` of conjugate gradients on a x = b from x = 0, stopped where the residual is 0.

    Args:
        guard: added to both denominators.
    """
    x, r = 0 * b, b
    p, square = r, (r * r).sum()
    for _ in range(steps):
        if square == 0:
            break
        moved = a @ p
        rate = square / ((p * moved).sum() + guard)
        x, r = x + rate * p, r - rate * moved
        square, before = (r * r).sum(), square
        p = r + square / (before + guard) * p
    return x


def steps_suffice(width: int, *, fewer: int = 0) -> ClaimFinding:
    """Do as many steps as the system is wide solve it exactly? ``fewer``: steps left out."""
    rng = np.random.default_rng(_SEED)
    keys, ridge, b = generic(rng, width, width), generic(rng, width, low=1), generic(rng, width)
    a = keys.T @ keys + _diagonal(ridge)
    found = conjugate_gradients(a, b, width - fewer)
    return equality(
        [row(f"width {width}", f"{width - fewer} steps", b, [a @ found])],
        seed=_SEED,
        example="diag(1, 2)x = (1, 1) after one step: x = (2/3, 2/3)",
    )


_GUARD: Final = flint.fmpq(1, 10**5)


def guarded_steps(steps: int = 30, guard: flint.fmpq = _GUARD) -> ClaimFinding:
    """Do ``steps`` solve x = b, a system of width 1, to within 2⁻²⁴ of b, for b of several sizes?

    Enclosed at 256 bits.

    Args:
        guard: added to the denominators, 10⁻⁵ as shipped.
    """
    one, rows = filled((1, 1), [flint.arb(1)]), []
    bound = flint.arb(2) ** -24
    with _precision(256):
        for size in (flint.fmpq(1, 2**e) for e in (0, 3, 7, 10)):
            x = conjugate_gradients(one, filled((1,), [flint.arb(size)]), steps, flint.arb(guard))[0]
            error = abs(1 - x / flint.arb(size))
            rows.append((str(size), float(error.mid()), error > bound, error < bound))
    status = "REFUTED" if any(r[2] for r in rows) else "HOLDS" if all(r[3] for r in rows) else "OPEN"
    titles = ("b", "relative error", "above 2⁻²⁴")
    return ClaimFinding(
        status=status,
        evidence=f"1·x = b, {steps} steps from x = 0, {float(guard):g} in the denominators, enclosed: "
        "relative "
        "error " + ", ".join(f"{r[1]:.3g} (b = {r[0]})" for r in rows),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample="width 1, H + λ = 1, q = 1: the first step goes 1/(1 + 10⁻⁵) of the way, and leaves r "
        "≈ 10⁻⁵. Then r² = 10⁻¹⁰ stands over r² + 10⁻⁵ ≈ 10⁻⁵: each further step goes 10⁻⁵ of what is left. "
        f"After {steps} steps the error is {rows[0][1]:.4g}; for q = 1/1024, whose r² < 10⁻⁶ is below the "
        f"guard from the start, {rows[-1][1]:.3g} of q"
        if status == "REFUTED"
        else "",
    )


def level(i: int, j: int, levels: int, *, wide: bool = False) -> list[int]:
    """The levels ℓ to which j ≤ i belongs: 0 for j = i; else i mod 2^ℓ ≥ 2^(ℓ−1), and j in the block of
    2^(ℓ−1) before i − (i mod 2^(ℓ−1)).

    Args:
        wide: a block twice as long.
    """
    found = [0] if i == j else []
    for number in range(1, levels + 1):
        half = 1 << (number - 1)
        first = i - i % half
        if i % (2 * half) >= half and first - half * (2 if wide else 1) <= j < first:
            found.append(number)
    return found


def levels_partition(length: int, *, wide: bool = False) -> ClaimFinding:
    """Does every pair j ≤ i belong to one level of 0 … ⌈log₂ T⌉?"""
    levels = math.ceil(math.log2(length))
    pairs = [(i, j) for i in range(length) for j in range(i + 1)]
    wrong = [(i, j, found) for i, j in pairs if len(found := level(i, j, levels, wide=wide)) != 1]
    bits = sum(level(i, j, levels) != [(i ^ j).bit_length()] for i, j in pairs)
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(pairs)} pairs of T = {length}, {levels + 1} levels: {len(wrong)} in none or in "
        f"several; {bits} whose level is not the length of i xor j in bits. For every T: the condition on i "
        "says that its bit ℓ − 1 is 1, that on j that ⌊j/2^(ℓ−1)⌋ = ⌊i/2^(ℓ−1)⌋ − 1, so i and j agree above "
        "bit ℓ − 1 and differ there: ℓ is the number of the highest bit in which they differ, of which there "
        "is one",
        counterexample=f"i = {wrong[0][0]}, j = {wrong[0][1]}: levels {wrong[0][2] or 'none'}"
        if wrong
        else "",
    )


def levels_of_one(length: int, first: Any = 1) -> ClaimFinding:
    """Is log-linear attention with all λ = 1 the gated linear attention of one decay a position?

    Args:
        first: λ of level 1.
    """
    rng = np.random.default_rng(_SEED)
    q, k, v, decay = (
        generic(rng, length, 2),
        generic(rng, length, 2),
        generic(rng, length, 2),
        generic(rng, length, 1),
    )
    levels = math.ceil(math.log2(length))

    def scale(i: int, j: int) -> Any:
        found = level(i, j, levels) if j <= i else []
        return sum((flint.fmpq(first) if number == 1 else flint.fmpq(1) for number in found), flint.fmpq(0))

    mask = filled((length, length), (scale(i, j) for i in range(length) for j in range(length)))
    found = ((q @ k.T) * segments(decay)[:, :, 0] * mask) @ v
    due = gated.recurrent(q, k, v, np.repeat(decay, 2, axis=1))[0]
    return equality(
        [row(f"T = {length}", "levels", due, [found])],
        seed=_SEED,
        example="T = 2, all of q, k, v and decays 1: o₂ = 1 + λ₁",
    )


def decays_of_rwkv7(*, logarithm: bool = False) -> ClaimFinding:
    """Is the decay of a w passed on as its own logarithm, e^w, the documented e^(−e^w)?

    Args:
        logarithm: pass −e^w on.
    """
    rows = []
    for w in (flint.fmpq(j, 2) for j in range(-12, 5)):
        documented = (-flint.arb(w).exp()).exp()
        used = (-flint.arb(w).exp() if logarithm else flint.arb(w)).exp()
        rows.append((float(w), float(documented.mid()), float(used.mid()), not documented.overlaps(used)))
    apart = [r for r in rows if r[3]]
    growing = [r for r in rows if r[2] > 1]
    titles = ("w", "e^(−e^w)", "decay used", "apart")
    return ClaimFinding(
        status="REFUTED" if apart else "HOLDS",
        evidence=f"{len(rows)} values of w: enclosures of the two decays are apart at {len(apart)}; the "
        f"decay used exceeds 1 at {len(growing)}. They meet only where e^w = −w, at w = −0.5671…",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample="w = −6: e^(−e^−6) = 0.9975 as documented, e^−6 = 0.0025 as used; w = 1: 0.066 and "
        "2.718, a state that grows"
        if apart
        else "",
    )


_MESA: Final = "MesaNet, arXiv 2506.05233; flash-linear-attention, fla/ops/mesa_net/naive.py"
_LEVELS: Final = (
    "log-linear attention, arXiv 2506.04761; flash-linear-attention, fla/ops/log_linear_attn/naive.py"
)
CLAIMS: Final = (
    sheet_claim(
        "SHEET-8a",
        "MesaNet is a regression",
        "o_t = [(H_kk + Λ)⁻¹q_t]ᵀH_kv is q_t times the ridge regression of v on k with the weights β_i Π "
        "e^g; with β = 1, g = 0 the ordinary one.",
        _MESA,
        "exact",
        (least_squares, lambda: least_squares(decayed=False)),
    ),
    sheet_claim(
        "SHEET-8b",
        "conjugate gradients end",
        "Without rounding and without guards, conjugate gradients solve MesaNet's system of width d in d "
        "steps.",
        "Hestenes and Stiefel 1952, theorem 6:1",
        "exact",
        (lambda: steps_suffice(4), lambda: steps_suffice(4, fewer=1)),
    ),
    sheet_claim(
        "SHEET-8c",
        "30 guarded steps",
        "Thirty steps with 10⁻⁵ added to the denominators, as shipped, solve MesaNet's system to a relative "
        "2⁻²⁴.",
        f"{_MESA}, naive_mesa_net_CG",
        "enclosure",
        (guarded_steps, lambda: guarded_steps(guard=flint.fmpq(0))),
    ),
    sheet_claim(
        "SHEET-9a",
        "levels of a Fenwick tree",
        "Every pair j ≤ i belongs to exactly one of the 1 + ⌈log₂ T⌉ levels of log-linear attention.",
        _LEVELS,
        "exact",
        (lambda: levels_partition(96), lambda: levels_partition(32, wide=True)),
    ),
    sheet_claim(
        "SHEET-9b",
        "log-linear attention with λ = 1",
        "With all λ = 1 log-linear attention is gated linear attention with one decay a position.",
        _LEVELS,
        "exact",
        (lambda: levels_of_one(19), lambda: levels_of_one(7, first=flint.fmpq(1, 2))),
    ),
    sheet_claim(
        "SHEET-10",
        "RWKV-7's decay as documented and as used",
        "Passing RWKV-7's w, documented to decay by e^(−e^w), to a kernel that takes the decay's logarithm "
        "computes the documented decay.",
        "flash-linear-attention, fla/ops/rwkv7/chunk.py at 1eeaa32: −e^w is computed and w is passed on",
        "enclosure",
        (decays_of_rwkv7, lambda: decays_of_rwkv7(logarithm=True)),
        ("DN-4",),
    ),
)
