"""Sums in tensor cores: products aligned to the largest exponent, cut to F fractional bits, added in fixed
point.

The model of Fasi, Higham, Mikaitis and Pranesh, PeerJ CS 7:e330 (2021), in exact rationals, with the
numbers of bits of MATLAB-tensor-core, arXiv 2512.07004, and MMA-Sim, arXiv 2511.10909.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import flint

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.small_formats import FLOAT32, exponent

__all__ = [
    "AMPERE",
    "CLAIMS",
    "FLOAT8",
    "HOPPER",
    "MODEL",
    "VECTORS",
    "VOLTA",
    "Unit",
    "blocks_commute",
    "dot",
    "monotone",
    "order_within",
    "vectors",
]

MODEL: Final = "Fasi et al., PeerJ CS 7:e330; arXiv 2512.07004; arXiv 2511.10909"
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Unit:
    """A tensor core: fractional bits kept, products added at once.

    Attributes:
        nearest: rounds each product to the last bit kept instead of cutting it, for controls.
    """

    name: str
    bits: int
    length: int
    nearest: bool = False

    def fused(self, c: Any, pairs: Sequence[Pair]) -> flint.fmpq:
        """c + Σ a·b of one block, float32: everything cut at the largest exponent minus ``bits``, then
        summed.

        An operand's exponent is taken before multiplication, so a product's is not normalised.
        """
        held = flint.fmpq(c)
        pairs = [(flint.fmpq(a), flint.fmpq(b)) for a, b in pairs]
        exponents = [exponent(a) + exponent(b) for a, b in pairs if a and b]
        exponents += [exponent(held)] if held else []
        if not exponents:
            return held
        step = flint.fmpq(2) ** (max(exponents) - self.bits)
        total = sum((self._cut(a * b, step) for a, b in pairs), self._cut(held, step))
        return FLOAT32.truncated(total)

    def _cut(self, x: flint.fmpq, step: flint.fmpq) -> flint.fmpq:
        steps = abs(x) / step + (flint.fmpq(1, 2) if self.nearest else 0)
        size = steps.floor() * step
        return size if x >= 0 else -size


VOLTA: Final = Unit("Volta", 23, 4)
AMPERE: Final = Unit("Ampere", 24, 8)
HOPPER: Final = Unit("Hopper", 25, 16)
FLOAT8: Final = Unit("Hopper, float8", 13, 32)

_TWO: Final = flint.fmpq(2)
_UNIT: Final = _TWO**-23
_ONE: Final = flint.fmpq(1)
VECTORS: Final[tuple[tuple[Unit, flint.fmpq, int, int, flint.fmpq], ...]] = (
    (VOLTA, flint.fmpq(1), 4, -24, flint.fmpq(1)),
    (AMPERE, flint.fmpq(1), 4, -24, 1 + 2 * _UNIT),
    (HOPPER, flint.fmpq(1), 4, -24, 1 + 2 * _UNIT),
    (VOLTA, flint.fmpq(1), 4, -25, flint.fmpq(1)),
    (AMPERE, flint.fmpq(1), 4, -25, flint.fmpq(1)),
    (HOPPER, flint.fmpq(1), 4, -25, 1 + _UNIT),
    (VOLTA, flint.fmpq(1), 4, -26, flint.fmpq(1)),
    (AMPERE, flint.fmpq(1), 4, -26, flint.fmpq(1)),
    (HOPPER, flint.fmpq(1), 4, -26, flint.fmpq(1)),
    (FLOAT8, flint.fmpq(1), 32, -14, flint.fmpq(1)),
    (AMPERE, _TWO**-24 - 1, 1, 0, _TWO**-24),
    (VOLTA, _TWO**-24 - 1, 1, 0, _TWO**-23),
)
"""Unit, c, how many products of 2^e, e, and what c + their sum gives, by hand.

The largest exponent is 0 in all of them, so all is cut to multiples of 2^−F, and the result to float32's 2⁻²³
above 1. With c = 1:

- products of 2⁻²⁴: F = 23 cuts each to 0; F = 24 and 25 keep 4·2⁻²⁴ = 2·2⁻²³;
- products of 2⁻²⁵: F = 23 and 24 cut each to 0; F = 25 keeps 4·2⁻²⁵ = 2⁻²³;
- products of 2⁻²⁶: all cut each to 0;
- float8, F = 13: 32 products of 2⁻¹⁴ are each cut to 0, where the exact sum is 1 + 2⁻⁹.

c = −(1 − 2⁻²⁴) = −(2²⁴ − 1)·2⁻²⁴ and one product 1: F = 24 keeps c, and the sum is 2⁻²⁴; F = 23 cuts it
towards zero to −(2²³ − 1)·2⁻²³, and the sum is 2⁻²³.
"""


def vectors(*, nearest: bool = False) -> ClaimFinding:
    """Does the model give the results worked out by hand? ``nearest`` rounds where it should cut."""
    rows, wrong = [], []
    for unit, c, count, power, due in VECTORS:
        model = Unit(unit.name, unit.bits, unit.length, nearest)
        found = model.fused(c, [(_TWO**power, flint.fmpq(1))] * count)
        exact = c + count * _TWO**power
        rows.append((unit.name, f"{c} + {count}·2^{power}", str(found - exact), found == due))
        if found != due:
            wrong.append(f"{unit.name}, c = {c}, {count} products of 2^{power}: {found}, by hand {due}")
    titles = ("unit", "sum", "error", "as by hand")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(rows) - len(wrong)} of {len(rows)} sums as worked out by hand from the rule, in "
        "exact rationals. No chip was asked: that it follows the rule is the cited papers' finding",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="\n".join(wrong[:3]),
    )


def monotone(units: Sequence[Unit] = (VOLTA, AMPERE, HOPPER)) -> ClaimFinding:
    """Does the result never fall as c grows? Around 1, with products of 2^−e up to the unit's length."""
    broken, tried = [], 0
    for unit in units:
        for power in range(-28, -22):
            pairs = [(_TWO**power, flint.fmpq(1))] * unit.length
            steps = [1 - j * _TWO**-24 for j in (2, 1)] + [1 + j * _UNIT for j in range(2)]
            found = [unit.fused(c, pairs) for c in steps]
            tried += len(found) - 1
            broken += [
                (unit, power, low, high, a, b)
                for low, high, a, b in zip(steps, steps[1:], found, found[1:], strict=False)
                if b < a
            ]
    return ClaimFinding(
        status="REFUTED" if broken else "SUPPORTED",
        evidence=f"{tried} pairs of neighbouring c at {[unit.name for unit in units]}: the result falls in "
        f"{len(broken)}",
        table={
            "unit": [x[0].name for x in broken],
            "products": [f"{x[0].length} of 2^{x[1]}" for x in broken],
        },
        counterexample=(
            "{0.name}, {0.length} products of 2^{1}: c = {2} gives {4}, the larger c = {3} gives {5}".format(
                *broken[0]
            )
            if broken
            else ""
        ),
    )


def _single(a: int, b: int) -> flint.fmpq:
    return flint.fmpq(a, 8) * _TWO**b


def order_within(*, blocks: bool = False) -> ClaimFinding:
    """Is a block's sum the same for every order of its products? ``blocks`` makes the products one block
    each.
    """
    products = [_single(9, -24), _single(13, -3), _single(-11, -22), _single(15, -13), _single(-9, -25)]
    unit = Unit("Ampere", 24, 1) if blocks else AMPERE
    found: dict[str, list[str]] = {}
    for order in itertools.permutations(range(len(products))):
        value = dot(unit, [(products[i], flint.fmpq(1)) for i in order], flint.fmpq(1))
        found.setdefault(str(value), []).append(str(order))
    return ClaimFinding(
        status="HOLDS" if len(found) == 1 else "REFUTED",
        evidence=f"{math.factorial(len(products))} orders of {len(products)} products, {unit.length} at "
        f"once, c = 1: {len(found)} different results",
        counterexample=""
        if len(found) == 1
        else "Ampere, one product at a time, c = 1: orders "
        + "; ".join(f"{orders[0]} gives {value}" for value, orders in list(found.items())[:2])
        + f" of the products {', '.join(str(x) for x in products)}",
    )


def dot(unit: Unit, pairs: Sequence[Pair], c: Any = 0, promote: int = 0) -> flint.fmpq:
    """Σ a·b + c, block after block; ``promote`` adds every so many products to a float32 sum outside
    (rounded).
    """
    total, inner = flint.fmpq(c), flint.fmpq(0)
    if not promote:
        for start in range(0, len(pairs), unit.length):
            total = unit.fused(total, pairs[start : start + unit.length])
        return total
    for start in range(0, len(pairs), unit.length):
        inner = unit.fused(inner, pairs[start : start + unit.length])
        if (start + unit.length) % promote == 0 or start + unit.length >= len(pairs):
            total, inner = FLOAT32.nearest(total + inner), flint.fmpq(0)
    return total


def blocks_commute(unit: Unit = VOLTA) -> ClaimFinding:
    """Is the sum the same for every order of the blocks?

    Every partial sum, ±4 + 2⁻²¹ + 2⁻²⁰ at most, is a float32: what depends on the order is cut inside the
    unit, not when its result is stored.
    """
    blocks = [[(x, _ONE)] * 4 for x in (_ONE, _TWO**-23, -_ONE, _TWO**-22)]
    found: dict[str, list[str]] = {}
    for order in itertools.permutations(range(len(blocks))):
        pairs = [pair for i in order for pair in blocks[i]]
        found.setdefault(str(dot(unit, pairs)), []).append(str(order))
    return ClaimFinding(
        status="HOLDS" if len(found) == 1 else "REFUTED",
        evidence=f"24 orders of 4 blocks of 4 products each, 1, 2⁻²³, −1, 2⁻²² in turn, {unit.bits} "
        f"fractional bits ({unit.name}): {len(found)} different results",
        counterexample="four products of x a block, x = 1, 2⁻²³, −1, 2⁻²² (blocks 0 to 3); "
        + "; ".join(f"order {orders[0]}: {value}" for value, orders in list(found.items())[:2])
        + "; exact: 2⁻²¹ + 2⁻²⁰ = 3/2097152"
        if len(found) > 1
        else "",
    )


CLAIMS: Final = (
    Claim(
        id="HW-3a",
        subject="hardware",
        title="the model of tensor cores at its edges",
        statement="Products and c aligned to the largest exponent, cut to F bits (Volta 23, Ampere 24, "
        "Hopper 25, float8 13), added in fixed point and cut to float32 give the results that the rule gives "
        "by hand where a product is just kept or just lost.",
        source=MODEL,
        kind="exact",
        check=lambda _: vectors(),
        control=lambda _: vectors(nearest=True),
        covers=("HW-3",),
    ),
    Claim(
        id="HW-3b",
        subject="hardware",
        title="sums are monotone in c",
        statement="A tensor core's c + Σ a·b does not fall when c grows.",
        source=f"an expectation that {MODEL} refutes",
        kind="exact",
        check=lambda _: monotone(),
        control=lambda _: monotone((Unit("a wide unit", 60, 4),)),
    ),
    Claim(
        id="HW-3c",
        subject="hardware",
        title="order within a block",
        statement="The order of the products within a block does not change the result.",
        source=MODEL,
        kind="exact",
        check=lambda _: order_within(),
        control=lambda _: order_within(blocks=True),
    ),
    Claim(
        id="HW-3d",
        subject="hardware",
        title="order of the blocks",
        statement="The order of the blocks of a long sum does not change the result.",
        source=f"an expectation that {MODEL} refutes",
        kind="exact",
        check=lambda _: blocks_commute(),
        control=lambda _: blocks_commute(Unit("a wide unit", 60, 4)),
    ),
)
