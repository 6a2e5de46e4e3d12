"""Claims about mLSTM's stabilised form: where the floor of its denominator belongs.

Beck et al., arXiv 2405.04517. Gates are numbers, not logarithms, and so is the stabiliser M = e^m: all of it
is rational.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.equal_forms import LENGTH, compared, equality, row
from attnproof.properties.claims.gated_linear import gates
from attnproof.properties.forms import mlstm
from attnproof.properties.forms.base import Array, difference
from attnproof.properties.forms.numbers import generic

__all__ = ["CLAIMS", "any_stabiliser", "floor_of_one", "inputs", "stabilised_forms"]

_SEED = 14
_PIECES: Final = (
    "; maxima make these functions piecewise: M_t cancels from M·C' and M·n' whatever it is, and max(|n'·q|, "
    "1/M) is max(|n·q|, 1)/M because M > 0, so that no piece differs from the ones drawn"
)
_EXAMPLE = (
    "N = 1, q = k = v = 1, i = 1/4: the definition gives C = n = 1/4 and (1/4)/max(1/4, 1) = 1/4. "
    "Stabilised, M = e^m = 1/4, C' = n' = 1: 1/max(1, e^(−m)) = 1/max(1, 4) = 1/4, but 1/max(1, 1) = 1."
)


def inputs(length: int) -> tuple[Any, ...]:
    """q, k (N, 3), v (N, 2), i, f (N,): gates for which the floor decides some rows and others not."""
    rng = np.random.default_rng(_SEED)
    q, k, v = (generic(rng, length, width) for width in (3, 3, 2))
    i = generic(rng, length, low=1, high=400, denominator=80) * generic(rng, length, low=1, high=80)
    return q / 4, k / 4, v, i, gates(rng, length, 1)[:, 0]


def stabilised_forms(length: int = LENGTH, *, keep_one: bool = False) -> ClaimFinding:
    """Do the stabilised recurrence, parallel form and chunks equal the definition and one another?

    Args:
        keep_one: the stabilised recurrence with max(|n'·q|, 1).
    """
    parts = inputs(length)

    def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
        part: tuple[Any, ...] = (*(x[piece] for x in parts), state)
        if isinstance(form, int):
            return mlstm.chunkwise(*part, chunk=form)
        if form == "recurrent":
            return mlstm.stabilised(*part, keep_one=keep_one)
        return mlstm.stabilised_parallel(*part)

    rows = compared("floor e^(−m)", run, length)
    o, (C, n, M) = run("recurrent", slice(None), None)
    rows.append(row("no stabiliser", "recurrent", (o, C * M, n * M), [mlstm.recurrent(*parts)]))
    rows.append(row("no stabiliser", "parallel", o, [mlstm.parallel(*parts)]))
    return equality(rows, seed=_SEED, example=_EXAMPLE, remark=_PIECES)


def floor_of_one(length: int = LENGTH, *, keep_one: bool = True) -> ClaimFinding:
    """Is the stabilised form with max(|n'·q|, 1) the definition? Row by row.

    Args:
        keep_one: that floor; else e^(−m).
    """
    parts = inputs(length)
    right, _ = mlstm.recurrent(*parts)
    masses = [abs(parts[0][t] @ mlstm.recurrent(*(x[: t + 1] for x in parts))[1][1]) for t in range(length)]
    found, _ = mlstm.stabilised(*parts, keep_one=keep_one)
    off = [difference(right[t], found[t]) for t in range(length)]
    worst = max(range(length), key=lambda t: off[t])
    changed = sum(d != 0 for d in off)
    return ClaimFinding(
        status="REFUTED" if changed else "HOLDS",
        evidence=f"rational example of {length} rows: {changed} differ, most in row {worst}: "
        f"{float(found[worst, 0]):.4g} for {float(right[worst, 0]):.4g}; the definition's floor decides "
        f"{sum(mass < 1 for mass in masses)} rows",
        table={
            "row": list(range(length)),
            "|n·q|": [float(m) for m in masses],
            "largest difference": [float(d) for d in off],
        },
        counterexample=_EXAMPLE if changed else "",
        seed=_SEED,
    )


def any_stabiliser(length: int = LENGTH, *, keep_one: bool = False) -> ClaimFinding:
    """Does the output depend on the stabiliser? M_t = e^(m_t) drawn at random in place of the maximum.

    Args:
        keep_one: with the floor 1, which depends on it.
    """
    q, k, v, i, f = inputs(length)
    right, _ = mlstm.recurrent(q, k, v, i, f)
    rng, rows = np.random.default_rng(19), []
    for trial in range(3):
        M = generic(rng, length, low=1, high=40, denominator=8)
        C, n, before, o = np.zeros((3, 2), dtype=object), np.zeros(3, dtype=object), M[0], np.empty_like(v)
        for t in range(length):
            forget, write, before = f[t] * before / M[t], i[t] / M[t], M[t]
            C, n = forget * C + write * np.outer(k[t], v[t]), forget * n + write * k[t]
            o[t] = (q[t] @ C) / max(abs(q[t] @ n), 1 if keep_one else 1 / M[t])
        rows.append(row("random M_t", f"draw {trial}", right, [o]))
    return equality(rows, seed=19, example=_EXAMPLE, remark=_PIECES)


_SOURCE = "Beck et al. 2024, arXiv 2405.04517, section 2.3 and appendix A.2 (recalled)"

CLAIMS: Final = (
    Claim(
        id="MLSTM-1a",
        subject="mLSTM",
        title="the stabilised forms",
        statement="With the denominator max(|n'·q|, e^(−m)) mLSTM's stabilised recurrent, parallel and "
        "chunkwise forms equal the definition C_t = f_t C_{t−1} + i_t k_t v_tᵀ, n_t = f_t n_{t−1} + i_t k_t, "
        "o_t = C_tᵀq_t/max(|n_t·q_t|, 1).",
        source=_SOURCE,
        kind="exact",
        check=lambda lab: stabilised_forms(lab.choose(11, LENGTH)),
        control=lambda lab: stabilised_forms(9, keep_one=True),
    ),
    Claim(
        id="MLSTM-1b",
        subject="mLSTM",
        title="a floor of 1 in the stabilised form",
        statement="mLSTM's stabilised form may keep the definition's floor, max(|n'·q|, 1).",
        source="implementations of xLSTM that do so (recalled)",
        kind="exact",
        check=lambda lab: floor_of_one(),
        control=lambda lab: floor_of_one(keep_one=False),
    ),
    Claim(
        id="MLSTM-1c",
        subject="mLSTM",
        title="the stabiliser does not matter",
        statement="The stabilised output, with the floor e^(−m_t), is the same for every choice of the "
        "stabilisers m_t.",
        source=_SOURCE,
        kind="exact",
        check=lambda lab: any_stabiliser(),
        control=lambda lab: any_stabiliser(keep_one=True),
    ),
)
