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
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.small_formats import E4M3, FLOAT32, Floats, exponent

__all__ = [
    "AMPERE",
    "CLAIMS",
    "FLOAT8",
    "HOPPER",
    "VECTORS",
    "VOLTA",
    "Unit",
    "bias_of_truncation",
    "blocks_commute",
    "dot",
    "long_sums",
    "monotone",
    "order_within",
    "vectors",
]

_MODEL: Final = "Fasi et al., PeerJ CS 7:e330; arXiv 2512.07004; arXiv 2511.10909"
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
"""Documented results: unit, c, how many products of 2^e, e, and what c + their sum gives."""


def vectors(*, nearest: bool = False) -> ClaimFinding:
    """Does the model give the published results? ``nearest`` rounds where it should cut."""
    rows, wrong = [], []
    for unit, c, count, power, due in VECTORS:
        model = Unit(unit.name, unit.bits, unit.length, nearest)
        found = model.fused(c, [(_TWO**power, flint.fmpq(1))] * count)
        exact = c + count * _TWO**power
        rows.append((unit.name, f"{c} + {count}·2^{power}", str(found - exact), found == due))
        if found != due:
            wrong.append(f"{unit.name}, c = {c}, {count} products of 2^{power}: {found}, documented {due}")
    titles = ("unit", "sum", "error", "as documented")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{len(rows) - len(wrong)} of {len(rows)} sums as documented, in exact rationals",
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


def blocks_commute() -> ClaimFinding:
    """Is the sum the same for every order of the blocks?"""
    blocks = [[(x, flint.fmpq(1))] * 4 for x in (flint.fmpq(1), _TWO**-24, -flint.fmpq(1), _TWO**-25)]
    found: dict[str, list[str]] = {}
    for order in itertools.permutations(range(len(blocks))):
        pairs = [pair for i in order for pair in blocks[i]]
        found.setdefault(str(dot(VOLTA, pairs)), []).append(str(order))
    return ClaimFinding(
        status="HOLDS" if len(found) == 1 else "REFUTED",
        evidence=f"24 orders of 4 blocks of 4 products 1, 2⁻²⁴, −1, 2⁻²⁵ on Volta: {len(found)} different "
        "results",
        counterexample="; ".join(f"order {orders[0]}: {value}" for value, orders in list(found.items())[:2])
        if len(found) > 1
        else "",
    )


def _sums(products: Floats, unit: Unit, promote: int = 0) -> Floats:
    """:func:`dot` of rows of products of normalised operands in float64: exact for few bits.

    ``products``: (R, K), whose exponents are taken as they are, one bit more than a product's unnormalised
    one at most.
    """
    total, inner = np.zeros(len(products)), np.zeros(len(products))
    for start in range(0, products.shape[1], unit.length):
        block = np.concatenate([inner[:, None], products[:, start : start + unit.length]], axis=1)
        largest = np.frexp(abs(block).max(axis=1, keepdims=True))[1] - 1
        step = np.ldexp(1.0, largest - unit.bits)
        cut = np.trunc(block / step + (np.sign(block) / 2 if unit.nearest else 0)) * step
        inner = cut.sum(axis=1)
        if not unit.nearest:
            # What the accumulator keeps is float32, cut.
            grain = np.ldexp(1.0, np.frexp(inner)[1] - 24)
            inner = np.trunc(inner / grain) * grain
        if promote and (start + unit.length) % promote == 0:
            total, inner = (total + inner).astype(np.float32).astype(float), np.zeros(len(products))
    return total + inner


def bias_of_truncation(*, nearest: bool = False, lengths: Sequence[int] = (256, 1024, 4096)) -> ClaimFinding:
    """Is a long sum's error towards zero, and does it grow as K rather than √K?

    Args:
        nearest: products are rounded to the last bit kept instead of cut.
        lengths: K up to 4096: beyond, products of 1/(2K) are below the last bit kept and vanish whole.
    """
    rng = np.random.default_rng(41)
    unit = Unit("Hopper, float8", FLOAT8.bits, FLOAT8.length, nearest)
    rows = []
    for length in lengths:
        # c stays in [1, 2): every product is cut at the same place, and what is lost adds up.
        products = rng.uniform(0.25, 0.75, (64, length)) / length
        first = np.full((64, FLOAT8.length), 1.0 / FLOAT8.length)
        error = _sums(np.concatenate([first, products], axis=1), unit) - 1.0 - products.sum(axis=1)
        # In units of the last bit kept.
        error = error * 2.0**unit.bits
        rows.append((length, float(error.mean()), float(error.std()), float((error < 0).mean())))
    slope = float(np.polyfit(np.log([r[0] for r in rows]), np.log([abs(r[1]) for r in rows]), 1)[0])
    good = all(row[3] == 1 for row in rows) and 0.85 < slope < 1.15
    titles = ("K", "mean error, last bits kept", "its spread", "share towards zero")
    return ClaimFinding(
        status="SUPPORTED" if good else "REFUTED",
        evidence=f"64 sums of K positive products of total 1/2 onto 1, {unit.bits} bits, mean error in last "
        "bits kept: "
        + ", ".join(f"{row[1]:.1f} at K = {row[0]}" for row in rows)
        + f"; towards zero in {min(row[3] for row in rows):.0%}; grows as K^{slope:.2f}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        plots=(
            Plot(
                "Bias of truncated sums",
                "line",
                {"K": [row[0] for row in rows], "|mean error|": [abs(row[1]) for row in rows]},
                "K",
                "|mean error|",
                log=("K", "|mean error|"),
            ),
        ),
        counterexample=f"K = {rows[-1][0]}: mean {rows[-1][1]:.2f}, spread {rows[-1][2]:.2f}, exponent "
        f"{slope:.2f}"
        if not good
        else "",
        seed=41,
    )


def long_sums(rows: int, *, bits: int = 13, length: int = 4096) -> ClaimFinding:
    """Is the largest relative error at K = ``length`` 1 % or more with ``bits`` bits, and 4 times less with
    promotion?

    Products of e4m3 numbers from N(0, 1), one sign (no cancellation) and as drawn.
    """
    rng = np.random.default_rng(42)
    unit = Unit("Hopper, float8", bits, 32)
    table: dict[str, list[Any]] = {
        "products": [],
        "K": [],
        "promoted every": [],
        "largest error": [],
        "mean error": [],
    }
    for sign in ("one sign", "both signs"):
        a, b = (E4M3.array(rng.standard_normal((rows, length))) for _ in range(2))
        products = abs(a * b) if sign == "one sign" else a * b
        exact = products.sum(axis=1)
        # Of both signs: relative to the root of the sum of squares, about the size of a typical result.
        size = exact if sign == "one sign" else np.sqrt((products**2).sum(axis=1))
        for promote in (0, 128):
            error = abs(_sums(products, unit, promote) - exact) / size
            values = (sign, length, promote, float(error.max()), float(error.mean()))
            for column, value in zip(table.values(), values, strict=True):
                column.append(value)
    plain, promoted, mixed, mixed_promoted = table["largest error"]
    good = plain > 0.01 and promoted < plain / 4 and mixed_promoted < mixed
    return ClaimFinding(
        status="SUPPORTED" if good else "REFUTED",
        evidence=f"{rows} sums of {length} products of e4m3 numbers, {bits} fractional bits, 32 at once: "
        f"largest relative error {plain:.2%} for products of one sign, {promoted:.2%} with promotion every "
        f"128; of both signs, relative to the root of the sum of squares, {mixed:.2%} and "
        f"{mixed_promoted:.2%}. Reported: about 2 %, of which matrices is not said",
        table=table,
        counterexample=f"largest error {plain:.3g}, with promotion {promoted:.3g}" if not good else "",
        seed=42,
    )


CLAIMS: Final = (
    Claim(
        id="HW-3a",
        subject="hardware",
        title="published results of tensor cores",
        statement="Products and c aligned to the largest exponent, cut to F bits (Volta 23, Ampere 24, "
        "Hopper 25, float8 13), added in fixed point and cut to float32 give the published results.",
        source=_MODEL,
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
        source=f"an expectation that {_MODEL} refutes",
        kind="exact",
        check=lambda _: monotone(),
        control=lambda _: monotone((Unit("a wide unit", 60, 4),)),
    ),
    Claim(
        id="HW-3c",
        subject="hardware",
        title="order within a block",
        statement="The order of the products within a block does not change the result.",
        source=_MODEL,
        kind="exact",
        check=lambda _: order_within(),
        control=lambda _: order_within(blocks=True),
    ),
    Claim(
        id="HW-3d",
        subject="hardware",
        title="order of the blocks",
        statement="The order of the blocks of a long sum does not change the result.",
        source=f"an expectation that {_MODEL} refutes",
        kind="exact",
        check=lambda _: blocks_commute(),
        control=lambda _: order_within(),
    ),
    Claim(
        id="HW-3e",
        subject="hardware",
        title="truncation is biased",
        statement="Cutting biases sums towards zero: the error of a sum of K terms grows as K, not as √K.",
        source=f"derived from {_MODEL}",
        kind="measurement",
        check=lambda lab: bias_of_truncation(
            lengths=lab.choose((256, 1024, 4096), (256, 512, 1024, 2048, 4096))
        ),
        control=lambda _: bias_of_truncation(nearest=True, lengths=(256, 1024, 4096)),
    ),
    Claim(
        id="HW-4",
        subject="hardware",
        title="float8 sums of 4096 products",
        statement="Hopper's float8 tensor cores keep about 14 bits: at K = 4096 the largest relative error "
        "is about 2 %; adding to float32 outside every 128 products cures it.",
        source="DeepSeek-V3 technical report, arXiv 2412.19437, Section 3.3.2",
        kind="measurement",
        check=lambda lab: long_sums(lab.choose(64, 1024)),
        control=lambda _: long_sums(32, bits=25),
    ),
)
