"""Claims about H3: unnormalised linear attention in a special case, and nothing that forgets by content.

Theory.md H3-1. Rational inputs of one head; forms are equal or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.forms import gated, h3, linear
from attnproof.properties.forms.base import Array, difference
from attnproof.properties.forms.numbers import rationals

__all__ = ["CLAIMS", "as_linear_attention", "fixed_memory", "settings", "special_case", "taps"]

SEED: Final = 51
_H3 = "Fu, Dao et al., Hungry Hungry Hippos, arXiv 2212.14052"
_ONE, _HALF = flint.fmpq(1), flint.fmpq(1, 2)
_IDENTITY = h3.Shift((1,))
_SUM = h3.Diagonal((1,), (1,), (1,))
SPECIAL: Final = "shift = identity, memory = sum"

Run = Callable[[Array, Array, Array], Array]


def _inputs(length: int, width: int, value: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(SEED)
    return rationals(rng, length, width), rationals(rng, length, width), rationals(rng, length, value)


def settings() -> dict[str, tuple[h3.Shift, h3.Diagonal]]:
    """H3's parameters by name: the special case, and each of its conditions broken by itself."""
    return {
        SPECIAL: (_IDENTITY, _SUM),
        "a tap on the key before": (h3.Shift((1, _HALF)), _SUM),
        "a shift by one": (h3.Shift((0, 1)), _SUM),
        "a skip term in the shift": (h3.Shift((1,), _ONE), _SUM),
        "a decay of 1/2": (_IDENTITY, h3.Diagonal((_HALF,), (1,), (1,))),
        "a skip term in the memory": (_IDENTITY, h3.Diagonal((1,), (1,), (1,), _ONE)),
    }


def _smallest(name: str, reference: Run) -> tuple[int, str]:
    """The shortest input of ones at which a setting differs, with numbers."""
    shift, diagonal = settings()[name]
    for length in (1, 2, 3):
        ones = np.full((length, 1), _ONE, dtype=object)
        found, due = h3.recurrent(ones, ones, ones, shift, diagonal), reference(ones, ones, ones)
        if found[-1, 0] != due[-1, 0]:
            return length, f"{name}, T = {length}, q = k = v = 1: o_T = {found[-1, 0]}, not {due[-1, 0]}"
    return 0, ""


def _sum_attention(q: Array, k: Array, v: Array) -> Array:
    return linear.recurrent(q, k, v)[0]


def _normalised(q: Array, k: Array, v: Array) -> Array:
    return linear.recurrent(abs(q) + 1, abs(k) + 1, v, normalize=True)[0]


def special_case(
    length: int = 7, names: tuple[str, ...] = (SPECIAL,), reference: Run = _sum_attention
) -> ClaimFinding:
    """Is H3 in these settings the ``reference``, for heads of width 1 and wider?"""
    rows, example = [], ""
    for name in names:
        for width, value in ((1, 1), (2, 2), (3, 2)):
            q, k, v = _inputs(length, width, value)
            if reference is _normalised:
                q, k = abs(q) + 1, abs(k) + 1
            found, due = h3.recurrent(q, k, v, *settings()[name]), reference(q, k, v)
            apart = difference(found, due)
            rows.append((name, width, value, found.size, bool(apart == 0), float(apart)))
        if not all(row[4] for row in rows if row[0] == name) and not example:
            example = _smallest(name, reference)[1]
    titles = ("setting", "key width", "value width", "numbers", "equal", "largest difference")
    return ClaimFinding(
        status="HOLDS" if all(row[4] for row in rows) else "REFUTED",
        evidence=f"{sum(row[3] for row in rows)} rational outputs of {length} positions: equal in "
        f"{sum(row[4] for row in rows)} of {len(rows)} comparisons",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED,
    )


def as_linear_attention(length: int = 6, names: tuple[str, ...] | None = None) -> ClaimFinding:
    """Is H3 linear attention in general? In the special case, and with each condition broken."""
    q, k, v = _inputs(length, 2, 2)
    rows, told = [], []
    for name in names or tuple(settings()):
        equal = difference(h3.recurrent(q, k, v, *settings()[name]), _sum_attention(q, k, v)) == 0
        shortest, example = _smallest(name, _sum_attention)
        rows.append((name, bool(equal), shortest))
        told += [] if equal else [example]
    same = [row[0] for row in rows if row[1]]
    titles = ("setting", "equal to Σ v_j (k_j·q_i)", "shortest input that differs")
    return ClaimFinding(
        status="HOLDS" if len(same) == len(rows) else "CONDITIONAL" if same else "REFUTED",
        evidence=f"{length} positions, width 2, {len(rows)} settings: equal to unnormalised linear "
        f"attention in {same or 'none'}; a normaliser, which H3 has nowhere, would divide by q_i·Σk_j",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="\n".join(told),
        seed=SEED,
    )


def taps(length: int = 9, *, reverse: bool = False) -> ClaimFinding:
    """Is SSM_shift, run as a recurrence, the filter with its output row as taps?"""
    rng = np.random.default_rng(SEED)
    rows, example = [], ""
    for order in (1, 2, 4, length + 2):
        weights, u = tuple(rationals(rng, order)), rationals(rng, length, 2)
        found = h3.shifted(u, h3.Shift(weights))
        due = h3.filtered(u, weights[::-1] if reverse else weights)
        equal = bool(difference(found, due) == 0)
        rows.append((order, length, equal))
        if not equal and not example:
            example = (
                f"taps {', '.join(map(str, weights))}, inputs {', '.join(map(str, u[:2, 0]))}: the "
                f"recurrence gives {', '.join(map(str, found[:2, 0]))}, the filter "
                f"{', '.join(map(str, due[:2, 0]))}"
            )
    titles = ("taps", "T", "equal")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"{sum(row[2] for row in rows)} of {len(rows)} filters equal over {length} rational inputs",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED,
    )


def _weight(model: str, q: Array, k: Array, v: Array) -> Array:
    """What the first value contributes to the last output: o_T less o_T with v_1 = 0."""
    other = v.copy()
    other[0] = other[0] * 0
    share: Array = _model(model, q, k, v)[-1] - _model(model, q, k, other)[-1]
    return share


def _model(model: str, q: Array, k: Array, v: Array) -> Array:
    if model == "H3":
        shift = h3.Shift((_ONE,))
        memory = h3.Diagonal((_HALF, flint.fmpq(2, 3)), (1, 2), (1, _ONE), _ONE)
        return h3.recurrent(q, k, v, shift, memory)
    # A gate in (0, 1) of the token's own key, as in gated linear attention with a rational sigmoid.
    alpha = np.array([[1 / (1 + x * x) for x in row] for row in k], dtype=object)
    return gated.recurrent(q, k, v, gated.gates(alpha))[0]


def fixed_memory(length: int = 5, model: str = "H3") -> ClaimFinding:
    """Can the content of a token between change how much of the first one is read at the end?"""
    q, k, v = _inputs(length, 2, 2)
    before = _weight(model, q, k, v)
    rows: list[tuple[int, bool, float]] = []
    example = ""
    for place in range(1, length - 1):
        for factor in (0, 3):
            keys = k.copy()
            keys[place] = keys[place] * factor
            after = _weight(model, q, keys, v)
            apart: Any = difference(before, after)
            rows.append((place, bool(apart == 0), float(apart)))
            if apart != 0 and not example:
                example = (
                    f"T = {length}: with key {place + 1} multiplied by {factor} the first value's share of "
                    f"the last output changes from ({', '.join(map(str, before))}) to "
                    f"({', '.join(map(str, after))})"
                )
    titles = ("token changed", "share of token 1 unchanged", "change")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"{model}, {length} positions, {len(rows)} changes of a key in between: the first value's "
        f"share of the last output is unchanged in {sum(row[1] for row in rows)}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED,
    )


CLAIMS: Final = (
    Claim(
        id="H3-1a",
        subject="state space models",
        title="H3 as linear attention",
        statement="With SSM_shift = identity (C = e_1, D = 0) and SSM_diag a plain sum (Ā = 1), H3 is "
        "causal "
        "linear attention without a normaliser, o_i = Σ_{j≤i} v_j (k_j·q_i), at every head width.",
        source=f"{_H3}, section 3.1",
        kind="exact",
        check=lambda lab: special_case(lab.choose(7, 24)),
        # The same against linear attention with its normaliser.
        control=lambda lab: special_case(4, reference=_normalised),
        covers=("H3-1",),
    ),
    Claim(
        id="H3-1b",
        subject="state space models",
        title="H3 imitates linear attention",
        statement="The H3 layer is linear attention.",
        source=f"the reading of {_H3}, section 3, in popular texts",
        kind="exact",
        check=lambda lab: as_linear_attention(lab.choose(6, 16)),
        control=lambda lab: as_linear_attention(4, (SPECIAL,)),
        covers=("SEED1-5",),
    ),
    Claim(
        id="H3-1c",
        subject="state space models",
        title="the shift SSM is a finite filter",
        statement="SSM_shift (A the sub-diagonal shift, B = e_1) is the finite impulse response filter "
        "with taps C.",
        source=f"{_H3}, section 3.1",
        kind="exact",
        check=lambda lab: taps(lab.choose(9, 24)),
        control=lambda lab: taps(4, reverse=True),
    ),
    Claim(
        id="H3-1d",
        subject="state space models",
        title="H3 does not forget by content",
        statement="Both SSMs of H3 are time-invariant: no token in between changes how much of an earlier "
        "value is read later (with SSM_shift = identity), which a data-dependent gate does.",
        source=f"derived; {_H3}, section 3, against Yang et al., arXiv 2312.06635, section 4",
        kind="exact",
        check=lambda lab: fixed_memory(lab.choose(5, 10)),
        control=lambda lab: fixed_memory(3, "gated linear attention"),
    ),
)
