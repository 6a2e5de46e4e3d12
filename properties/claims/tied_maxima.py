"""Biased rounding in bfloat16 where several logits of a row tie for the maximum. arXiv 2510.04212.

Two P = 1 with values of one sign add two bfloat16 numbers of one exponent: half of the sums are ties of
rounding to nearest, which the rest of the row then breaks always in the same direction. All pairs are
enumerated in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.flash_attention import attention, weights
from attnproof.properties.claims.small_formats import BFLOAT16, Floats
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "CLAIMS",
    "adjusted",
    "bias_by_signs",
    "bias_of_pairs",
    "bias_of_rows",
    "invariant",
    "largest_p",
    "mean_error",
    "single_maximum",
    "training",
    "weighted_pairs",
]

_PAPER: Final = "Qiu and Yao, arXiv 2510.04212"
_CODE: Final = "ucker/why-low-precision-training-fails"
_HALF: Final = flint.fmpq(1, 2)


def mean_error(numbers: Sequence[int], step: Callable[[int], int], residual: int) -> flint.fmpq:
    """Mean of (rounded − exact)/step of integers rounded to multiples of ``step``(x), exactly.

    Args:
        residual: sign of an infinitesimal rest that breaks ties; 0 leaves them to the even multiple.
    """
    total = flint.fmpq(0)
    for x in numbers:
        unit = step(x)
        low, rest = divmod(x, unit)
        up = 2 * rest > unit or (2 * rest == unit and (residual > 0 or (residual == 0 and low % 2 == 1)))
        total += flint.fmpq((unit if up else 0) - rest, unit)
    return total / len(numbers)


_NUMBERS: Final = range(128, 256)
"""The bfloat16 numbers of [2, 4), in units of 1/64; of a sum in [4, 8) bfloat16 keeps multiples of 1/32."""


def bias_of_pairs(*, unit: int = 2) -> ClaimFinding:
    """Is the mean error of a + b + rest over all bfloat16 a, b of [2, 4) 1/4 unit times the rest's sign?

    Args:
        unit: of the stored sum, in 1/64: 2 in bfloat16, 1 in a format of one digit more.
    """
    sums = [i + j for i in _NUMBERS for j in _NUMBERS]
    ties = sum(2 * (x % unit) == unit for x in sums)
    by_sign = {r: mean_error(sums, lambda _: unit, r) for r in (-1, 0, 1)}
    wrong = [r for r, mean in by_sign.items() if mean != flint.fmpq(r, 4)]
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"all {len(sums)} pairs, sums stored in multiples of {unit}/64: {ties} sums are ties "
        f"({ties / len(sums):g}); mean error in units of the result "
        + ", ".join(f"{mean} with a rest of sign {r}" for r, mean in by_sign.items()),
        table={"sign of the rest": list(by_sign), "mean error, units": [str(x) for x in by_sign.values()]},
        counterexample=f"with a rest of sign {wrong[0]} the mean is {by_sign[wrong[0]]}: "
        + ("no sum is a tie" if not ties else "a = 128/64, b = 129/64")
        if wrong
        else "",
    )


def bias_by_signs(*, follows: bool = True) -> ClaimFinding:
    """Over (a, b), (−a, −b), (a, −b), (−a, b) with a rest of the sum's opposite sign: 1/4 unit towards zero
    for sums of values of one sign, no error for sums of values of opposite signs?

    Args:
        follows: the rest has the sign opposite to the sum; False makes it negative always.
    """
    rows = []
    for first, second in ((1, 1), (-1, -1), (1, -1), (-1, 1)):
        sums = [first * i + second * j for i in _NUMBERS for j in _NUMBERS]
        rest = -1 if first > 0 or not follows else 1
        # Sums of opposite signs are exact, and an infinitesimal rest of either sign leaves them.
        # Below 4 bfloat16 holds every multiple of 1/64.
        means = {
            r: mean_error(sums, lambda x: 2 if abs(x) >= 256 else 1, r)
            for r in ((rest,) if first == second else (-1, 1))
        }
        due = flint.fmpq(-first, 4) if first == second else flint.fmpq(0)
        rows += [(first, second, r, mean, mean == due) for r, mean in means.items()]
    wrong = [row for row in rows if not row[4]]
    # The four choices weigh the same; of opposite signs both rests are 0 each.
    together = sum((row[3] for row in rows[:2]), flint.fmpq(0)) / 4
    return ClaimFinding(
        status="REFUTED" if wrong or together else "HOLDS",
        evidence=f"{len(_NUMBERS) ** 2} pairs for each choice of signs; mean of (stored − exact)/unit: "
        + "; ".join(f"({a:+d}, {b:+d}), rest {r:+d}: {mean}" for a, b, r, mean, _ in rows)
        + f". All four together: {together}",
        table={
            "signs of a, b": [f"{a:+d}, {b:+d}" for a, b, *_ in rows],
            "sign of the rest": [row[2] for row in rows],
            "mean error, units": [str(row[3]) for row in rows],
        },
        counterexample=(
            "−128/64 − 129/64 = −257/64 with a negative rest goes to −258/64, half a unit away from zero: "
            f"over all pairs of negative values {wrong[0][3]}"
            if wrong
            else ""
        ),
    )


def single_maximum(parts: int = 16, *, tail_counts: bool = True) -> ClaimFinding:
    """With one maximum, is a tail of t < 1/2 unit of the same sign lost, an error of −t for every a?

    Args:
        parts: t = j/(2·parts + 1) units, j = 1 … 2·parts.
        tail_counts: False drops the tail from the exact value too.
    """
    whole = 2 * parts + 1
    rows = []
    for j in range(1, whole):
        # a = i units of the result, i = 128 … 255, so that a + t stays below the next power of two .
        numbers = [i * whole + (j if tail_counts else 0) for i in range(128, 255)]
        due = -flint.fmpq(j, whole) if 2 * j < whole else 1 - flint.fmpq(j, whole)
        rows.append((j, mean_error(numbers, lambda _: whole, 0), due))
    wrong = [row for row in rows if row[1] != row[2]]
    below = [row[1] for row in rows if 2 * row[0] < whole]
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"127 numbers a and {len(rows)} tails: the error is −t for t < 1/2 unit and 1 − t above, "
        f"whatever a is; over tails below 1/2 unit the mean is {sum(below, flint.fmpq(0)) / len(below)} of a "
        "unit, towards zero, without a carry and dependent on the tail",
        counterexample="no tail: error 0 for every a" if wrong else "",
    )


def _row(rng: np.random.Generator, ties: int, sign: str, n: int, count: int) -> tuple[Floats, Floats]:
    """P̄ with ``ties`` ones and small weights behind, and bfloat16 values of |v| in [2, 4); (count, n)."""
    # Far behind: all of them together weigh less than 1/100 of a unit, or they break no tie one way.
    p = np.exp(-rng.uniform(12.0, 16.0, (count, n)))
    p[:, :ties] = 1.0
    p = BFLOAT16.array(p[:, rng.permutation(n)])
    v = rng.integers(128, 256, (count, n)) / 64.0
    return p, -v if sign == "one" else v * rng.choice((-1.0, 1.0), (count, n))


def bias_of_rows(
    count: int,
    n: int = 32,
    *,
    store: Callable[[Floats], Floats] = BFLOAT16.array,
    lengths: Sequence[int] = (32, 8),
) -> ClaimFinding:
    """Is P̄V stored in bfloat16 biased by ties with values of one sign, tiles or none, and not in float32?

    Args:
        store: rounding of the unnormalised P̄V after each tile.
    """
    rng = np.random.default_rng(101)
    rows = []
    for ties, sign in ((2, "one"), (2, "mixed"), (1, "one")):
        p, v = _row(rng, ties, sign, n, count)
        exact = (p * v).sum(axis=1)
        unit = np.ldexp(1.0, np.frexp(exact)[1] - 8)
        for block in lengths:
            held = np.zeros(count)
            for start in range(0, n, block):
                held = store(held + (p[:, start : start + block] * v[:, start : start + block]).sum(axis=1))
            error = (held - exact) / unit
            rows.append((ties, sign, block, float(error.mean()), float(error.std() / math.sqrt(count))))
    tied = [row for row in rows if row[0] == 2 and row[1] == "one"]
    mixed = [row for row in rows if row[1] == "mixed"]
    biased = all(abs(row[3]) > 8 * max(row[4], 1e-9) for row in tied)
    good = biased and all(abs(row[3]) < 5 * row[4] for row in mixed)
    titles = ("maxima", "signs of V", "keys a tile", "mean error, units", "standard error")
    return ClaimFinding(
        status="SUPPORTED" if good else "REFUTED",
        evidence=f"{count} rows of {n} keys, V in ±[2, 4), other weights e^−12 to e^−16; mean error of P̄V "
        "in units: "
        + "; ".join(
            f"{r[0]} maxima, {r[1]} sign{'s' * (r[1] == 'mixed')}, tiles of {r[2]}: {r[3]:+.4f} ± {r[4]:.4f}"
            for r in rows
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=f"stored without rounding the tied rows err by {tied[0][3]:.2g} units"
        if not good
        else "",
        seed=101,
    )


def training() -> ClaimFinding:
    """Loss explosions: not here."""
    return ClaimFinding(
        status="OPEN",
        evidence="the growth of spectral norms and of the loss was observed in training GPT-2 in bfloat16; "
        "needed: their training run to the failure and a repetition with O in float32. The rounding that "
        "they name as its cause is checked as QIU-1a and QIU-2",
    )


def invariant(*, whole: bool = True) -> ClaimFinding:
    """Does O stay the same whatever constant stands for the maximum? Over the rationals, e^m = c.

    Args:
        whole: False changes the constant in P but not in ℓ.
    """
    rng = np.random.default_rng(102)
    w, v = weights(rng, 5, 6), rationals(rng, 6, 2)
    due, wrong = attention(w, v), 0
    for c in (flint.fmpq(1), flint.fmpq(9, 4), flint.fmpq(1, 40), flint.fmpq(1600, 49)):
        p = w / c
        mass = (p if whole else w).sum(axis=1)[:, None]
        wrong += int(((p @ v) / mass != due).sum())
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{4 * due.size} rational outputs with e^m = 1, 9/4, 1/40, 1600/49: {wrong} differ from "
        "softmax(S)V",
        counterexample="S = (0), V = (1), e^m = 2 in P only: O = 1/2" if wrong else "",
        seed=102,
    )


def adjusted(m: float, beta: float = 2.0) -> float:
    """The constant of the fix for a row whose maximum m is reached more than once: βm if m > 0,
    0 if m < 0.
    """
    return beta * m if m > 0 else 0.0 if m < 0 else m


def largest_p(
    maxima: Sequence[float] = (-200.0, -1.0, -0.001, 0.0, 0.001, 0.002, 1.0, 50.0, 103.0, 104.0, 200.0),
) -> ClaimFinding:
    """Is the largest P̄ after the fix strictly between 0 and 1, as bfloat16 and float32 hold it?"""
    one = -(1 - flint.arb(2) ** -9).log()
    none = 150 * flint.arb(2).log()
    rows = []
    for m in maxima:
        gap = flint.arb(adjusted(m)) - flint.arb(m)
        held = "1" if gap < one else "0" if gap > none else "between"
        rows.append((m, adjusted(m), float((-gap).exp().mid()), held))
    wrong = [row for row in rows if row[3] != "between"]
    status = "HOLDS" if not wrong else "CONDITIONAL" if len(wrong) < len(rows) else "REFUTED"
    titles = ("m", "constant", "largest P̄", "as held")
    return ClaimFinding(
        status=status,
        evidence="largest P̄ = e^−|m|: rounds to 1 in bfloat16 for |m| ≤ −ln(1 − 2⁻⁹) = "
        f"{float(one.mid()):.6f} (m = 0 is left as it is) and to 0 in float32 for |m| ≥ 150·ln 2 = "
        f"{float(none.mid()):.3f}; of {len(rows)} maxima {len(rows) - len(wrong)} lie between",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=(
            "m = 0 (queries of zeros): the rule changes nothing and all P̄ at the maximum are 1. m = 104, β "
            "= 2: P̄ = e^−104 < 2⁻¹⁵⁰ is 0 in float32, so ℓ = 0 and O = 0/0; m = −200: the constant 0 gives "
            "e^−200 = 0 likewise"
            if wrong
            else ""
        ),
    )


def weighted_pairs(limit: flint.fmpq = flint.fmpq(1, 10), *, powers: bool = False) -> ClaimFinding:  # noqa: B008
    """Is the bias of p·(a + b) below ``limit`` of a unit for every bfloat16 p of (1/2, 1), over all pairs?

    p = P/256, a + b = s/64: their product P·s has 16 or 17 digits, of which bfloat16 keeps 8. Every tie is
    broken away from zero.

    Args:
        powers: take p = 1/2 instead.
    """
    sums = np.array([i + j for i in range(128, 256) for j in range(128, 256)])
    biases = {}
    for p in (128,) if powers else range(129, 256):
        product = sums * p
        unit = np.where(product < 2**16, 2**8, 2**9)
        rest = product % unit
        # Units are powers of two: over 2⁹ all is in integers.
        error = np.where(2 * rest >= unit, unit - rest, -rest) * (512 // unit)
        biases[p] = flint.fmpq(int(error.sum()), 512 * len(sums))
    worst = max(biases, key=lambda p: abs(biases[p]))
    mean = sum(biases.values(), flint.fmpq(0)) / len(biases)
    good = abs(biases[worst]) < limit
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{len(biases)} weights p, {len(sums)} pairs each: mean bias {float(mean):.5f} of a unit, "
        f"largest {float(biases[worst]):.5f} at p = {worst}/256, against 1/4 at p = 1",
        counterexample=f"p = {worst}/256: {biases[worst]} of a unit" if not good else "",
    )


def _claim(
    number: str,
    title: str,
    statement: str,
    source: str,
    kind: str,
    checks: Sequence[Callable[[], ClaimFinding]],
) -> Claim:
    return Claim(
        id=f"QIU-{number}",
        subject="low precision",
        title=title,
        statement=statement,
        source=source,
        kind=kind,
        check=lambda _: checks[0](),
        control=lambda _: checks[1](),
        covers=(f"QIU-{number[0]}",) if number.endswith("a") else (),
    )


CLAIMS: Final = (
    Claim(
        id="QIU-1a",
        subject="low precision",
        title="tied maxima bias P̄V",
        statement="With two logits tied for the maximum, the others far below and values of one sign, P̄V "
        "stored in bfloat16 has a mean error of one sign; it is there with and without tiles, and neither "
        "for values of mixed sign nor with O in float32.",
        source=f"{_PAPER}, abstract; {_CODE}",
        kind="measurement",
        check=lambda lab: bias_of_rows(lab.choose(4000, 60000)),
        control=lambda _: bias_of_rows(2000, store=lambda x: x),
        covers=("QIU-1",),
    ),
    Claim(
        id="QIU-1b",
        subject="low precision",
        title="the bias makes training fail",
        statement="The biased rounding accumulates along similar low-rank directions until the loss "
        "explodes.",
        source=f"{_PAPER}, abstract",
        kind="none",
        check=lambda _: training(),
        control=None,
    ),
    _claim(
        "2a",
        "a quarter of a unit",
        "Over all pairs of bfloat16 numbers of [2, 4) half of the sums are ties, and a small rest of the "
        "sum's sign makes the mean error exactly 1/4 unit away from zero; of the other sign 1/4 towards it; "
        "without a rest 0.",
        f"derived; {_PAPER}; kexue.fm 11371",
        "exact",
        (bias_of_pairs, lambda: bias_of_pairs(unit=1)),
    ),
    _claim(
        "2b",
        "a quarter of a unit, the rest's sign turned",
        "With a rest of the sign opposite to the sum's the mean error is exactly 1/4 unit towards zero, for "
        "positive and for negative values; sums of one value of either sign are exact, so that values of "
        "both signs, all pairs taken together, have the mean error 0.",
        f"derived; {_PAPER}",
        "exact",
        (bias_by_signs, lambda: bias_by_signs(follows=False)),
    ),
    _claim(
        "2c",
        "a single maximum",
        "With a single maximum a tail of t < 1/2 unit is lost, a bias of −t towards zero without any tie.",
        "derived, exactly",
        "exact",
        (single_maximum, lambda: single_maximum(tail_counts=False)),
    ),
    _claim(
        "3a",
        "another constant than the maximum",
        "Replacing the maximum by any other constant leaves O as it is.",
        f"{_CODE}, the fix",
        "exact",
        (invariant, lambda: invariant(whole=False)),
    ),
    _claim(
        "3b",
        "the fix keeps P̄ below 1",
        "With m ← 2m for m > 0 and m ← 0 for m < 0 the largest P̄ is strictly below 1 (and above 0).",
        f"{_CODE}, the fix",
        "enclosure",
        (largest_p, lambda: largest_p((-50.0, -1.0, 0.5, 3.0, 100.0))),
    ),
    _claim(
        "3c",
        "the fix removes the bias",
        "With p < 1, not a power of two, in place of both ones the bias of p(a + b) falls from 1/4 unit to "
        "below 1/10.",
        f"{_CODE}, the fix; enumerated",
        "exact",
        (weighted_pairs, lambda: weighted_pairs(powers=True)),
    ),
)
