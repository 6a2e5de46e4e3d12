"""Claims about one step of the delta rule: descent, recall, eigenvalues, contraction, parity.

S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀk_t)ᵀ with states (D, E), the transpose of the papers': Schlag et al.,
arXiv 2102.11174; Yang et al., arXiv 2406.06484. Over the rationals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.equal_forms import SCHWARTZ_ZIPPEL, Row, equality, row
from attnproof.properties.forms import delta
from attnproof.properties.forms.base import Array, difference
from attnproof.properties.forms.numbers import generic, rationals

__all__ = [
    "CLAIMS",
    "contraction",
    "descent",
    "eigenvalues",
    "exact_recall",
    "float_contraction",
    "parity",
    "square_gap",
]

_ONE = np.ones(1, dtype=object)


def descent(trials: int = 6, *, factor: Any = flint.fmpq(1, 2)) -> ClaimFinding:  # noqa: B008
    """A step of the delta rule against one step of size β down the gradient of factor·‖Sᵀk − v‖².

    The loss has degree 2 in every entry of S: half the difference of its values one apart on either side is
    its derivative, exactly.
    """
    rng, rows = np.random.default_rng(25), list[Row]()
    for trial in range(trials):
        k, v, state = generic(rng, 3), generic(rng, 2), generic(rng, 3, 2)
        beta = generic(rng, 1, low=1, high=8, denominator=5)[0]
        gradient = np.empty_like(state)
        for index in np.ndindex(state.shape):
            ends = []
            for move in (1, -1):
                moved = state.copy()
                moved[index] = moved[index] + move
                off = k @ moved - v
                ends.append(factor * (off @ off))
            gradient[index] = (ends[0] - ends[1]) / 2
        _, after = delta.step(k, k, v, beta, _ONE, state)
        rows.append(row("descent", f"draw {trial}", after, [state - beta * gradient]))
    return equality(
        rows, seed=25, example="d = 1, S = 0, k = v = β = 1: the rule gives 1, the gradient of S² − 2S 2."
    )


def exact_recall(betas: Sequence[tuple[int, int]] = ((1, 1),)) -> ClaimFinding:
    """A unit key over a full state: is Sᵀk = v exactly after a step with each β = a/b?"""
    rng, rows = np.random.default_rng(24), []
    units = [
        np.array([flint.fmpq(x, d) for x in (a, b)], dtype=object)
        for a, b, d in ((3, 4, 5), (-5, 12, 13), (8, 15, 17))
    ]
    shrinks = True
    for k, (a, b) in itertools.product(units, betas):
        v, state, beta = rationals(rng, 3), rationals(rng, 2, 3), flint.fmpq(a, b)
        _, after = delta.step(k, k, v, beta, _ONE, state)
        error, before = k @ after - v, k @ state - v
        shrinks = shrinks and difference(error, (1 - beta) * before) == 0
        rows.append((str(k[0]), float(beta), float(max(abs(error))), float(max(abs(before)))))
    wrong = [r for r in rows if r[2] != 0]
    titles = ("k_1", "β", "largest |Sᵀk − v| after", "before")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"keys (3/5, 4/5), (−5/13, 12/13), (8/17, 15/17) over full states: exact in "
        f"{len(rows) - len(wrong)} of {len(rows)} cases; the error is 1 − β times the one before in "
        f"{'all' if shrinks else 'not all'}"
        + (
            ""
            if wrong
            else ". For all: kᵀ(S + βk(v − Sᵀk)ᵀ) = kᵀS + β‖k‖²(v − Sᵀk)ᵀ, which is vᵀ at β‖k‖² = 1"
        ),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample="" if not wrong else f"key {wrong[0][0]}, β = {wrong[0][1]}: error {wrong[0][2]}",
        seed=24,
    )


def eigenvalues(widths: Sequence[int] = (1, 2, 3, 4), *, sign: int = 1) -> ClaimFinding:
    """Is the characteristic polynomial of I − βkkᵀ (x − 1)^(d−1) (x − 1 + sign·β‖k‖²)?"""
    rng, rows, x = np.random.default_rng(26), [], flint.fmpq_poly([0, 1])
    for d, trial in itertools.product(widths, range(5)):
        k, beta = generic(rng, d), generic(rng, 1, low=0, high=18, denominator=9)[0]
        found = flint.fmpq_mat(delta.transition(k, beta).tolist()).charpoly()
        due = (x - 1) ** (d - 1) * (x - 1 + sign * beta * (k @ k))
        rows.append((d, trial, float(1 - beta * (k @ k)), bool(found == due)))
    wrong = [r for r in rows if not r[3]]
    titles = ("d", "draw", "1 − β‖k‖²", "as claimed")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"characteristic polynomials over the rationals, {len(rows)} random keys and β in (0, 2), d "
        f"in {list(widths)}: as claimed in {len(rows) - len(wrong)} (the coefficients are "
        f"{SCHWARTZ_ZIPPEL}). "
        "For every d: I − βkkᵀ leaves each x with k·x = 0 as it is, and maps k to (1 − β‖k‖²)k",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample="" if not wrong else "d = 1, k = β = 1: I − βkkᵀ = 0, whose eigenvalue is 0 = 1 − 1.",
        seed=26,
    )


def square_gap(k: Array, beta: Any) -> tuple[Array, Any]:
    """I − (I − βkkᵀ)² and the number c = β(2 − β‖k‖²) of which it is the multiple ckkᵀ."""
    one = delta.transition(k, 0)
    step = delta.transition(k, beta)
    return one - step @ step, beta * (2 - beta * (k @ k))


def contraction(trials: int = 40, upper: int = 2) -> ClaimFinding:
    """Is ‖I − βkkᵀ‖ ≤ 1 exactly where 0 ≤ β‖k‖² ≤ upper? By the proof's identity, at random rational keys."""
    rng, rows, wrong = np.random.default_rng(23), [], []
    for _ in range(trials):
        k = generic(rng, 3, low=1)
        ratio = flint.fmpq(int(rng.integers(-4, 18)), 5)
        gap, c = square_gap(k, ratio / (k @ k))
        stretched = delta.transition(k, ratio / (k @ k)) @ k
        growth = (stretched @ stretched) / (k @ k)
        # I − A² = c·kkᵀ is positive semidefinite iff c ≥ 0; k itself is stretched otherwise.
        proved = difference(gap, c * np.outer(k, k)) == 0 and (growth > 1) is (c < 0)
        if not proved or (c < 0) is (0 <= ratio <= upper):
            wrong.append(str(ratio))
        rows.append((float(ratio), float(c), float(growth)))
    rows.sort()
    titles = ("β‖k‖²", "β(2 − β‖k‖²)", "‖(I − βkkᵀ)k‖²/‖k‖²")
    table = {title: [r[i] for r in rows] for i, title in enumerate(titles)}
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="the identity ‖x‖² − ‖(I − βkkᵀ)x‖² = β(2 − β‖k‖²)(k·x)² and the claim are exact at "
        f"{trials - len(wrong)} of {trials} rational keys, β‖k‖² from {rows[0][0]:g} to {rows[-1][0]:g}. The "
        "identity is (I − βkkᵀ)² = I − β(2 − β‖k‖²)kkᵀ, multiplied out; its factor β(2 − β‖k‖²) is at "
        "least 0 "
        "exactly where 0 ≤ β‖k‖² ≤ 2, and at x = k it decides",
        table=table,
        plots=(
            Plot(
                title="‖(I − βkkᵀ)k‖²/‖k‖² against β‖k‖²",
                chart="line",
                columns={"β‖k‖²": table[titles[0]], "growth": table[titles[2]]},
                x="β‖k‖²",
                y="growth",
            ),
        ),
        counterexample="" if not wrong else f"β‖k‖² = {wrong[0]}: I − βkkᵀ multiplies k by 1 − {wrong[0]}",
        seed=23,
    )


def _exact(x: Any) -> flint.fmpq:
    return flint.fmpq(*float(x).as_integer_ratio())


def _in_float32(a: int, b: int) -> list[flint.fmpq]:
    """(a, b) over its norm in float32: the root of a² + b² rounded, then both quotients rounded."""
    x, y = np.float32(a), np.float32(b)
    norm = np.sqrt(x * x + y * y)
    return [_exact(x / norm), _exact(y / norm)]


def float_contraction(beta: int = 2, number: int = 512, width: int = 16) -> ClaimFinding:
    """Keys normalised in float32: is |1 − β‖k‖²| ≤ 1, with ‖k‖² of the stored keys exactly?"""
    rng = np.random.default_rng(27)
    keys = rng.standard_normal((number, width)).astype(np.float32)
    keys /= np.sqrt((keys * keys).sum(axis=1, keepdims=True))
    factors = [1 - beta * sum((_exact(x) ** 2 for x in key), start=flint.fmpq(0)) for key in keys]
    grown = sum(abs(factor) > 1 for factor in factors)
    most = float(max(map(abs, factors)) - 1)
    text = ""
    if grown:
        # A pair small enough to be redone by hand.
        a, b = next(
            (a, b)
            for a, b in itertools.product(range(1, 40), repeat=2)
            if sum(x * x for x in _in_float32(a, b)) > 1
        )
        x, y = _in_float32(a, b)
        square = a * a + b * b
        root, once = (
            np.float32(math.sqrt(square)),
            [_exact(np.float32(c / math.sqrt(square))) for c in (a, b)],
        )
        norm = float(once[0] ** 2 + once[1] ** 2 - 1)
        text = (
            f"k = ({a}, {b}). In float32 fl(√{square}) = {_exact(root)}, and ({a}, {b}) divided by that "
            f"number, "
            f"each quotient rounded, is (x, y) = ({x}, {y}), x² + y² = 1 + "
            f"{float(x * x + y * y - 1):.3g} > 1; "
            "with β = 2 a step multiplies along it by 1 − 2(x² + y²) < −1.\n"
            f"(({a}, {b})/√{square} rounded once would be ({once[0]}, {once[1]}), of square norm 1 "
            f"{'+' if norm > 0 else '−'} {abs(norm):.3g}: it is the rounded root that makes this key "
            f"too long.)"
        )
    return ClaimFinding(
        status="REFUTED" if grown else "SUPPORTED",
        evidence=f"{number} random keys of width {width} normalised in float32, β = {beta}, squares exactly: "
        f"{grown} steps grow; the largest |1 − β‖k‖²| is 1 {'+' if most > 0 else '−'} {abs(most):.2g}",
        table={"keys": [number], "steps that grow": [grown], "largest |1 − β‖k‖²| less 1": [most]},
        counterexample=text,
        seed=27,
    )


def parity(length: int = 7, active: int = 2) -> ClaimFinding:
    """From S = 1 with d = 1, k = 1, v = 0, and β = active at a bit 1, else 0: is its sign the parity?"""
    wrong, count, one = [], 0, np.array([flint.fmpq(1)], dtype=object)
    for bits in itertools.product((0, 1), repeat=length):
        state = one[:, None]
        for bit in bits:
            _, state = delta.step(one, one, 0 * one, active * bit, _ONE, state)
        count += 1
        if state[0, 0] != (-1) ** sum(bits):
            wrong.append((bits, str(state[0, 0])))
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"all {count} strings of {length} bits, β = {active} at a 1: the state is (−1)^(number of "
        f"ones) in {count - len(wrong)}",
        table={"strings": [count], "wrong": [len(wrong)]},
        counterexample=""
        if not wrong
        else f"bits {wrong[0][0]}: state {wrong[0][1]}; a factor 1 − β ≥ 0 never changes the sign",
    )


_DELTANET = "Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484, section 2"

CLAIMS: Final = (
    Claim(
        id="DN-1a",
        subject="delta rule",
        title="a step of gradient descent",
        statement="The delta rule's step is one step of size β down the gradient of ½‖Sᵀk − v‖² in S.",
        source=_DELTANET,
        kind="exact",
        check=lambda lab: descent(),
        control=lambda lab: descent(factor=flint.fmpq(1)),
    ),
    Claim(
        id="DN-1b",
        subject="delta rule",
        title="exact recall",
        statement="After a step with β = 1 and a key of norm 1 the state returns the value exactly, Sᵀk = v.",
        source=_DELTANET,
        kind="exact",
        check=lambda lab: exact_recall(),
        control=lambda lab: exact_recall(((1, 2),)),
    ),
    Claim(
        id="DN-1c",
        subject="delta rule",
        title="eigenvalues",
        statement="I − βkkᵀ has the eigenvalue 1 (d − 1 times) and 1 − β‖k‖².",
        source=_DELTANET,
        kind="exact",
        check=lambda lab: eigenvalues(),
        control=lambda lab: eigenvalues((2,), sign=-1),
    ),
    Claim(
        id="DN-1d",
        subject="delta rule",
        title="contraction",
        statement="‖I − βkkᵀ‖ ≤ 1 for 0 ≤ β‖k‖² ≤ 2 and > 1 for any other: keys that are not normalised make "
        "states grow.",
        source="derived: ‖x‖² − ‖(I − βkkᵀ)x‖² = β(2 − β‖k‖²)(k·x)²",
        kind="exact",
        check=lambda lab: contraction(lab.choose(40, 400)),
        control=lambda lab: contraction(40, 3),
    ),
    Claim(
        id="DN-1e",
        subject="delta rule",
        title="contraction in float32",
        statement="With keys normalised in float32 and β = 2 no step grows.",
        source="derived from the contraction of I − βkkᵀ for unit keys",
        kind="search",
        check=lambda lab: float_contraction(number=lab.choose(512, 4096)),
        control=lambda lab: float_contraction(1, 64),
    ),
    Claim(
        id="DN-1f",
        subject="delta rule",
        title="parity by negative eigenvalues",
        statement="With β up to 2 one state of the delta rule tracks parity (with β ≤ 1 its factors 1 − β "
        "are never negative).",
        source="Grazzi et al. 2024, arXiv 2411.12537 (recalled)",
        kind="exact",
        check=lambda lab: parity(lab.choose(7, 12)),
        control=lambda lab: parity(4, 1),
    ),
)
