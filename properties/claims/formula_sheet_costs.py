"""Operations of DeltaNet's chunks and of Mamba's scan, counted while they run; training runs, left open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.formula_sheet import SUBJECT
from attnproof.properties.forms import delta
from attnproof.properties.forms.base import Array, chunks, difference, each, filled
from attnproof.properties.forms.numbers import Counted, Tally, counted, generic

__all__ = ["CLAIMS", "Work", "by_parts", "delta_chunks", "delta_costs", "mamba_costs", "with_the_state"]

_SEED: Final = 603


@dataclass
class Work:
    """Operations of matrix products so far, 2·M·K·N for (M, K) by (K, N), by what they are for."""

    spent: dict[str, int] = field(default_factory=dict)

    def product(self, name: str, a: Array, b: Array) -> Array:
        """a @ b, counted."""
        self.spent[name] = self.spent.get(name, 0) + 2 * len(a) * a.shape[1] * b.shape[1]
        product: Array = a @ b
        return product


def delta_chunks(
    q: Array, k: Array, v: Array, beta: Array, chunk: int, *, rule: bool = True
) -> tuple[Array, Array, Work]:
    """o, the last state and the work of DeltaNet in chunks as kernels compute it: all matrices in full.

    q, k (N, D), v (N, E), β (N,) of rationals. T = (I + strictLower(diag(β)KKᵀ))⁻¹ row by row, W = T(βK), U =
    T(βV), new = U − WS, O = QS + lower(QKᵀ)·new, S' = S + Kᵀ·new. Yang et al., arXiv 2406.06484, section 3.

    Args:
        rule: False is linear attention in chunks, new = V.
    """
    work, o = Work(), np.empty_like(v)
    state = each(lambda _: flint.fmpq(0), np.empty((k.shape[1], v.shape[1]), dtype=object))
    for piece in chunks(len(v), chunk):
        Q, K, new, b = q[piece], k[piece], v[piece], beta[piece, None]
        if rule:
            lower = b * work.product("KKᵀ", K, K.T)
            inverse = filled(lower.shape, (flint.fmpq(int(i == j)) for i, j in np.ndindex(*lower.shape)))
            for i in range(1, len(K)):
                inverse[i, :i] = -work.product("solve", lower[i : i + 1, :i], inverse[:i, :i])[0]
            W, U = work.product("W", inverse, b * K), work.product("U", inverse, b * new)
            new = U - work.product("WS", W, state)
        weights = np.tril(work.product("QKᵀ", Q, K.T))
        o[piece] = work.product("QS", Q, state) + work.product("P·new", weights, new)
        state = state + work.product("Kᵀ·new", K.T, new)
    return o, state, work


def by_parts(length: int, width: int, chunk: int) -> int:
    """Linear attention in chunks, 4NCd + 4Nd², and 2NCd for KKᵀ, 4NCd for W and U; without the solve."""
    return 10 * length * chunk * width + 4 * length * width**2


def with_the_state(length: int, width: int, chunk: int) -> int:
    """:func:`by_parts` and 2Nd² for WS, by which the state's own answer leaves the values."""
    return by_parts(length, width, chunk) + 2 * length * width**2


def delta_costs(formula: Callable[[int, int, int], int], *, rule: bool = True) -> ClaimFinding:
    """Are the matrix products of DeltaNet's chunks the formula's, and the solve's work at most NC²?

    Args:
        formula: operations from N, d and C, the solve's left out.
        rule: False counts linear attention in chunks.
    """
    rng = np.random.default_rng(_SEED)
    rows, wrong = [], []
    for length, width, chunk in ((8, 3, 4), (12, 6, 4), (12, 2, 6)):
        q, k, v, beta = (
            generic(rng, length, width),
            generic(rng, length, width),
            generic(rng, length, width),
            generic(rng, length),
        )
        o, state, work = delta_chunks(q, k, v, beta, chunk, rule=rule)
        if rule:
            due = delta.recurrent(q, k, v, beta)
            right = difference(o, due[0]) == 0 and difference(state, due[1]) == 0
        else:
            right = difference(o, np.tril(q @ k.T) @ v) == 0
        solve = work.spent.pop("solve", 0)
        total, claimed = sum(work.spent.values()), formula(length, width, chunk)
        rows.append((length, width, chunk, total, claimed, solve, length * chunk**2, right))
        if total != claimed or solve > length * chunk**2 or not right:
            wrong.append(
                f"N = {length}, d = {width}, C = {chunk}: {claimed} claimed, {total} counted: "
                + ", ".join(f"{name} {count}" for name, count in work.spent.items())
            )
    titles = (
        "N",
        "d",
        "C",
        "operations of products",
        "claimed",
        "of the solve",
        "NC²",
        "equals the recurrence",
    )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="operations of matrix products, counted while the chunks run on rationals and give exactly "
        "the recurrence's outputs: "
        + "; ".join(
            f"{r[3]} of {r[4]} claimed (N = {r[0]}, d = {r[1]}, C = {r[2]}), the solve {r[5]}, NC² = {r[6]}"
            for r in rows
        )
        + ". Each product's count is a multiple of NCd or of Nd², as its shapes say, and the three settings "
        "fix both coefficients of the total",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=wrong[0] if wrong else "",
        seed=_SEED,
    )


_QUOTED: Final = 9
# Of nine operations quoted, how many a frugal order of the same products saves.
_SAVED: Final = 2


def _exponentials(tally: Tally, x: Array) -> Array:
    """e^x of every entry, each counted as one operation."""
    tally.products += x.size
    return x


def mamba_costs(length: int, channels: int, size: int, *, discretised: bool = False) -> ClaimFinding:
    """Does Mamba's scan take 7 to 9 operations an entry of the state and position?

    As the repository's plain code: e^(ΔA), Δ·B·x, a·h + b, and C·h summed; and with (Δ·x)·B.

    Args:
        discretised: take e^(ΔA) and ΔBx as given.
    """
    rows = []
    for order in ("(Δ·B)·x", "(Δ·x)·B"):
        tally = Tally()
        A, h = counted(tally, channels, size), counted(tally, channels, size)
        for _ in range(length):
            step, x = counted(tally, channels, 1), counted(tally, channels, 1)
            B, C = counted(tally, 1, size), counted(tally, 1, size)
            if discretised:
                decay, new = counted(tally, channels, size), counted(tally, channels, size)
            else:
                decay = _exponentials(tally, step * A)
                new = (step * B) * x if order == "(Δ·B)·x" else (step * x) * B
            h = decay * h + new
            _summed(h * C)
        each_entry = (tally.products + tally.sums) / (length * channels * size)
        rows.append((order, tally.products, tally.sums, each_entry))
    good = all(_QUOTED - _SAVED <= row[3] <= _QUOTED for row in rows)
    titles = ("order", "products and exponentials", "sums", "an entry and position")
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{length} positions, {channels} channels, states of {size}: "
        + ", ".join(f"{row[3]:.4f} operations an entry and position by {row[0]}" for row in rows)
        + f"; quoted {_QUOTED}. An entry takes ΔA, e^(·), ΔB, ·x, a·h, + b, C·h and a sum: 8, less 1/N_state "
        "as the first summand needs no sum, whatever the sizes; by (Δ·x)·B exactly 7",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="" if good else f"{rows[0][3]:.4f} operations an entry and position",
    )


def _summed(x: Array) -> list[Any]:
    """Sums of rows without a zero to start from: one addition less than entries."""
    totals = []
    for channel in x:
        total: Counted = channel[0]
        for entry in channel[1:]:
            total = total + entry
        totals.append(total)
    return totals


def _wasserstein() -> ClaimFinding:
    return ClaimFinding(
        status="OPEN",
        evidence="the bound compares weights of two training runs of a model, in low precision and with "
        "FlashAttention against without. Needed: those runs, or weights of the same steps of both. The error "
        "of the isolated forward pass, the other half of the abstract, is checked as GOL-1",
    )


CLAIMS: Final = (
    Claim(
        id="SHEET-11a",
        subject=SUBJECT,
        title="DeltaNet's chunks, by parts",
        statement="DeltaNet in chunks takes linear attention's 4NCd + 4Nd² operations, and besides 2NCd for "
        "KKᵀ, 4NCd for W and U and about NC² for the triangular solve.",
        source="a tally by parts of Yang et al., arXiv 2406.06484, section 3",
        kind="count",
        check=lambda _: delta_costs(by_parts),
        control=lambda _: delta_costs(lambda n, d, c: 4 * n * c * d + 4 * n * d**2, rule=False),
    ),
    Claim(
        id="SHEET-11b",
        subject=SUBJECT,
        title="DeltaNet's chunks, with the state",
        statement="DeltaNet in chunks takes 10NCd + 6Nd² operations in matrix products, WS (2Nd²) included, "
        "and at most NC² in the solve.",
        source="counted; Yang et al., arXiv 2406.06484, section 3",
        kind="count",
        check=lambda _: delta_costs(with_the_state),
        control=lambda _: delta_costs(with_the_state, rule=False),
    ),
    Claim(
        id="SHEET-11c",
        subject=SUBJECT,
        title="Mamba's nine operations",
        statement="Mamba's selective scan takes 7 to 9 operations an entry of the state and position, the "
        "discretisation included; 9 are quoted.",
        source="state-spaces/mamba, issue 110, as VMamba counts it; selective_scan_ref",
        kind="count",
        check=lambda _: mamba_costs(6, 4, 16),
        control=lambda _: mamba_costs(6, 4, 16, discretised=True),
    ),
    Claim(
        id="SHEET-12",
        subject=SUBJECT,
        title="FlashAttention's deviation below that of training",
        statement="By a bound on the Wasserstein distance of weights, FlashAttention's numeric deviation in "
        "bfloat16 is 2 to 5 times less significant than that of training in low precision.",
        source="Golden et al., arXiv 2405.02803, abstract",
        kind="none",
        check=lambda _: _wasserstein(),
        control=None,
        covers=("GOL-1",),
    ),
)
