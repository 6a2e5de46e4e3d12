"""FlashAttention-2: operations counted, and the formulas that are printed wrong beside the right ones.

arXiv 2307.08691. Logits enter as their exponentials, positive rationals, so that every step is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.flash_attention import attention, weights
from attnproof.properties.forms.base import Array
from attnproof.properties.forms.numbers import Tally, counted, rationals

__all__ = [
    "CLAIMS",
    "RULES",
    "accumulated",
    "length_of_delta",
    "matrix_products",
    "rescaling",
    "second_block",
    "speeds",
    "two_blocks",
    "unmasked_blocks",
]

_PAPER: Final = "Dao, FlashAttention-2, arXiv 2307.08691"
Factor = Callable[[flint.fmpq], flint.fmpq]
Check = Callable[[], ClaimFinding]


def matrix_products(n: int = 6, d: int = 4, *, recomputes: bool = True) -> ClaimFinding:
    """Operations of the matrix products forward and backward, counted on (n, d) operands without values.

    Args:
        recomputes: whether the backward forms S = QKᵀ again.
    """
    forward, backward = Tally(), Tally()
    q, k, v = (counted(forward, n, d) for _ in range(3))
    (q @ k.T) @ v
    q, k, v, do = (counted(backward, n, d) for _ in range(4))
    p = q @ k.T if recomputes else counted(backward, n, n)
    ds = do @ v.T
    _ = (p.T @ do, ds @ k, ds.T @ q)
    good = forward.products * 2 == 4 * n * n * d and 2 * backward.products == 5 * forward.products
    blocks = [(t, t * (t + 1) // 2, t * t) for t in (1, 2, 8, 64, 1024)]
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"n = {n}, d = {d}: {forward.products} multiply-adds forward (2n²d = {2 * n * n * d}), "
        f"{backward.products} backward, {backward.products / forward.products:g} times as many; with blocks "
        "above the diagonal skipped the share is (1 + 1/T)/2 of T×T blocks: "
        + ", ".join(f"{some / whole:.4g} at T = {t}" for t, some, whole in blocks)
        + f". 312 TFLOP/s of matrix products over 19.5 of others on an A100: {312 / 19.5:g}",
        counterexample=""
        if good
        else f"n = {n}, d = {d}: {backward.products} multiply-adds backward, {forward.products} forward",
    )


def speeds() -> ClaimFinding:
    """Measured speeds: not here."""
    return ClaimFinding(
        status="OPEN",
        evidence="speeds on an A100 (from memory: up to 230 TFLOP/s forward, 225 TFLOP/s per GPU end to "
        "end), of which there is none here; their parts that can be counted are FA2-1a",
    )


def accumulated(w: Array, v: Array, columns: int, carry: Factor) -> Array:
    """Algorithm 1 of FlashAttention-2: O unnormalised until the end, the old O times carry(e^(m_old −
    m_new)).

    Args:
        w: e^S, (N, n), positive rationals; v: (n, d).
    """
    result = np.empty((len(w), v.shape[1]), dtype=object)
    for i, row in enumerate(w):
        top = max(row[:columns])
        mass, out = sum(row[:columns] / top), (row[:columns] / top) @ v[:columns]
        for start in range(columns, len(v), columns):
            block = row[start : start + columns]
            higher = max(top, *block)
            mass = mass * (top / higher) + sum(block / higher)
            out = carry(top / higher) * out + (block / higher) @ v[start : start + columns]
            top = higher
        result[i] = out / mass
    return result


def rescaling(carry: Factor, length: int = 7) -> ClaimFinding:
    """Is O right for every block length if the old O is multiplied by carry(e^(m_old − m_new))?"""
    rng = np.random.default_rng(21)
    w, v = weights(rng, length, length), rationals(rng, length, 2)
    exact = attention(w, v)
    found = {columns: accumulated(w, v, columns, carry) for columns in range(1, length + 1)}
    wrong = {
        columns: float(max(abs(out - exact).flat)) for columns, out in found.items() if (out != exact).any()
    }
    two, values = np.array([[flint.fmpq(1), flint.fmpq(2)]]), np.array([[flint.fmpq(1)], [flint.fmpq(0)]])
    small = accumulated(two, values, 1, carry)[0, 0]
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{exact.size} rational outputs for block lengths 1 to {length}: "
        + (
            f"wrong at {sorted(wrong)}, by up to {max(wrong.values()):.3g}"
            if wrong
            else "all equal to softmax(S)V"
        ),
        counterexample=(
            "one row, S = (0, ln 2), V = (1, 0), blocks of one column: m_old = 0, m_new = ln 2, ℓ = 3/2, the "
            f"factor is {carry(flint.fmpq(1, 2))}, O = {small}; softmax(S)V = 1/3, and no average of 1 and 0 "
            "exceeds 1"
            if wrong
            else ""
        ),
        seed=21,
    )


Formula = Callable[[flint.fmpq, flint.fmpq, flint.fmpq], tuple[flint.fmpq, bool]]
"""From ℓ1, ℓ2 and e^(m1 − m2): the factor of the normalised (or unnormalised) O of the first block, and
whether the sum is to be divided by ℓ2 afterwards (False: the second block's part is divided by ℓ2)."""


def two_blocks(
    w: Sequence[flint.fmpq], v: Sequence[flint.fmpq], formula: Formula, *, raw: bool
) -> flint.fmpq:
    """O of one row of two keys, a block each, by the formula of Section 3.1.1.

    Args:
        raw: the factor multiplies the unnormalised O of the first block, not the normalised one.
    """
    first, second = max(w[:1]), max(w)
    drop = first / second
    mass = flint.fmpq(1)
    total = drop * mass + w[1] / second
    factor, divides = formula(mass, total, drop)
    before = v[0] if raw else v[0] / mass
    part = w[1] / second * v[1]
    return (factor * before + part) / total if divides else factor * before + part / total


def second_block(formula: Formula, *, raw: bool, length: int = 5) -> ClaimFinding:
    """Does the two-block example give attention, for all e^S of 1 … ``length`` and V of (1, 0) and (0, 1)?"""
    wrong, compared = [], 0
    for a, b in itertools.product(range(1, length + 1), repeat=2):
        w = (flint.fmpq(a), flint.fmpq(b))
        for v in ((1, 0), (0, 1)):
            values = (flint.fmpq(v[0]), flint.fmpq(v[1]))
            exact = (w[0] * values[0] + w[1] * values[1]) / (w[0] + w[1])
            found = two_blocks(w, values, formula, raw=raw)
            compared += 1
            if found != exact:
                wrong.append(((a, b), v, found, exact))
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{compared} pairs of blocks of one key: {compared - len(wrong)} give softmax(S)V exactly"
        + (f", {sum(x[0][0] == x[0][1] for x in wrong)} of the wrong ones with m1 = m2" if wrong else ""),
        counterexample=(
            "e^S = {}, V = {}: O = {}, softmax(S)V = {}".format(
                *next((x for x in wrong if x[0] == (1, 2)), wrong[0])
            )
            if wrong
            else ""
        ),
    )


def length_of_delta(length: Callable[[int, int], int]) -> ClaimFinding:
    """Has D = rowsum(dO∘O) ``length(N, d)`` numbers, and does it need them?"""
    rng = np.random.default_rng(22)
    rows = []
    for n, d in ((1, 1), (2, 1), (3, 3), (2, 5), (7, 2)):
        o, do = rationals(rng, n, d), rationals(rng, n, d)
        delta = (do * o).sum(axis=1)
        rows.append((n, d, len(delta), len(set(delta)), length(n, d)))
    wrong = [row for row in rows if row[2] != row[4]]
    titles = ("N", "d", "numbers of D", "different ones", "declared")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(rows)} shapes; the declared length is right at {len(rows) - len(wrong)}, and D's "
        "numbers differ",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="N = 2, d = 1, O = (1, 2)ᵀ, dO = (1, 1)ᵀ: D = (1, 2), two numbers that a D of R^1 "
        "cannot hold"
        if wrong
        else "",
        seed=22,
    )


Rule = Callable[[range, range], bool]
RULES: Final[dict[str, Rule]] = {
    "printed": lambda rows, columns: max(rows) < min(columns),
    "corrected": lambda rows, columns: max(columns) <= min(rows),
}
"""When a block of S needs no causal mask, from its row and column indices."""


def unmasked_blocks(rule: Rule, largest: int = 4, blocks: int = 5) -> ClaimFinding:
    """Is every block that ``rule`` leaves unmasked wholly visible, and every visible one left unmasked?"""
    wrong, missed, found = [], 0, 0
    for rows, columns in itertools.product(range(1, largest + 1), repeat=2):
        for i, j in itertools.product(range(blocks), repeat=2):
            r, c = range(i * rows, (i + 1) * rows), range(j * columns, (j + 1) * columns)
            visible = all(y <= x for x in r for y in c)
            found += rule(r, c)
            missed += visible and not rule(r, c)
            if rule(r, c) and not visible:
                wrong.append((rows, columns, i, j))
    return ClaimFinding(
        status="REFUTED" if wrong or missed else "HOLDS",
        evidence=f"{largest**2} sizes of block, {blocks}×{blocks} blocks each: {found} left unmasked, "
        f"{len(wrong)} of them with a key in the future, {missed} wholly visible blocks masked needlessly",
        counterexample=(
            "blocks of one row and one column: row 0, column 1 has its row index below its column index, so "
            "no mask is applied, and query 0 sees key 1 of its future"
            if wrong
            else "a wholly visible block is masked"
            if missed
            else ""
        ),
    )


def _claim(number: str, title: str, statement: str, where: str, check: tuple[Check, Check]) -> Claim:
    return Claim(
        id=f"FA2-2{number}",
        subject="FlashAttention",
        title=title,
        statement=statement,
        source=f"{_PAPER}, {where}",
        kind="exact",
        check=lambda _: check[0](),
        control=lambda _: check[1](),
        covers=("FA2-2",) if number == "a" else (),
    )


_RESCALING: Final = (lambda: rescaling(lambda drop: 1 / drop), lambda: rescaling(lambda drop: drop))
_NORMALISED: Final = (
    lambda: second_block(lambda first, second, drop: (second / first, False), raw=False),
    lambda: second_block(lambda first, second, drop: (first * drop / second, False), raw=False),
)
_KEPT: Final = (
    lambda: second_block(lambda first, second, drop: (1 / first, True), raw=True),
    lambda: second_block(lambda first, second, drop: (drop, True), raw=True),
)
_LENGTH: Final = (lambda: length_of_delta(lambda n, d: d), lambda: length_of_delta(lambda n, d: n))
_MASK: Final = (lambda: unmasked_blocks(RULES["printed"]), lambda: unmasked_blocks(RULES["corrected"]))

CLAIMS: Final = (
    Claim(
        id="FA2-1a",
        subject="FlashAttention",
        title="operations forward and backward",
        statement="The matrix products take 4N²d operations a head forward, half of that with a causal mask, "
        "and 2.5 times as many backward; an A100 does 16 times more operations a second in matrix products "
        "than elsewhere.",
        source=f"{_PAPER}, Sections 3.1 and 4.1",
        kind="count",
        check=lambda _: matrix_products(),
        control=lambda _: matrix_products(recomputes=False),
        covers=("FA2-1",),
    ),
    Claim(
        id="FA2-1b",
        subject="FlashAttention",
        title="measured speeds",
        statement="Up to 230 TFLOP/s forward on an A100 (73 % of its peak) and 225 TFLOP/s per GPU in "
        "training.",
        source=f"{_PAPER}, Section 4 (from memory)",
        kind="none",
        check=lambda _: speeds(),
        control=None,
    ),
    _claim(
        "a",
        "rescaling O, as printed",
        "O ← diag(e^(m_old − m_new))⁻¹O + P̃V, divided by ℓ at the end, is softmax(S)V.",
        "Algorithm 1, line 10",
        _RESCALING,
    ),
    _claim(
        "b",
        "rescaling O, corrected",
        "O ← diag(e^(m_old − m_new))O + P̃V, divided by ℓ at the end, is softmax(S)V for every block length.",
        "Algorithm 1, line 10, without the inverse",
        _RESCALING[::-1],
    ),
    _claim(
        "c",
        "two blocks, normalised, as printed",
        "O⁽²⁾ = diag(ℓ⁽¹⁾/ℓ⁽²⁾)⁻¹O⁽¹⁾ + diag(ℓ⁽²⁾)⁻¹e^(S⁽²⁾ − m⁽²⁾)V⁽²⁾ is the attention over both blocks.",
        "Section 3.1.1, first formula",
        _NORMALISED,
    ),
    _claim(
        "d",
        "two blocks, normalised, corrected",
        "O⁽²⁾ = (ℓ⁽¹⁾e^(m⁽¹⁾ − m⁽²⁾)/ℓ⁽²⁾)O⁽¹⁾ + e^(S⁽²⁾ − m⁽²⁾)V⁽²⁾/ℓ⁽²⁾ is the attention over both blocks.",
        "Section 3.1.1, first formula, corrected",
        _NORMALISED[::-1],
    ),
    _claim(
        "e",
        "two blocks, unnormalised, as printed",
        "Õ⁽²⁾ = diag(ℓ⁽¹⁾)⁻¹O⁽¹⁾ + e^(S⁽²⁾ − m⁽²⁾)V⁽²⁾ with the unnormalised O⁽¹⁾ = e^(S⁽¹⁾ − m⁽¹⁾)V⁽¹⁾, "
        "divided by ℓ⁽²⁾, is the attention over both blocks.",
        "Section 3.1.1, first tweak",
        _KEPT,
    ),
    _claim(
        "f",
        "two blocks, unnormalised, corrected",
        "Õ⁽²⁾ = e^(m⁽¹⁾ − m⁽²⁾)Õ⁽¹⁾ + e^(S⁽²⁾ − m⁽²⁾)V⁽²⁾, divided by ℓ⁽²⁾, is the attention over both "
        "blocks.",
        "Section 3.1.1, first tweak, corrected",
        _KEPT[::-1],
    ),
    _claim("g", "the length of D, as printed", "D = rowsum(dO∘O) is in R^d.", "Algorithm 2, line 4", _LENGTH),
    _claim(
        "h",
        "the length of D, corrected",
        "D = rowsum(dO∘O) is in R^N: one number a query.",
        "Algorithm 2, line 4, corrected",
        _LENGTH[::-1],
    ),
    _claim(
        "i",
        "blocks without a mask, as printed",
        "Blocks whose row indices are all strictly less than their column indices need no causal mask.",
        "Section 3.1.1, causal masking, second remark",
        _MASK,
    ),
    _claim(
        "j",
        "blocks without a mask, corrected",
        "Exactly the blocks whose column indices are all at most their row indices need no causal mask.",
        "Section 3.1.1, causal masking, second remark, corrected",
        _MASK[::-1],
    ),
)
