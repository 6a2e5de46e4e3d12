"""Long sums in tensor cores: their bias, their error with few bits, and what promotion to float32 changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.small_formats import E4M3, Floats
from attnproof.properties.claims.tensor_cores import FLOAT8, MODEL, Unit

__all__ = ["CLAIMS", "bias_of_truncation", "long_sums", "sums"]


def sums(products: Floats, unit: Unit, promote: int = 0) -> Floats:
    """:func:`~attnproof.properties.claims.tensor_cores.dot` of rows of products of normalised operands, in
    float64: exact for few bits.

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
        error = sums(np.concatenate([first, products], axis=1), unit) - 1.0 - products.sum(axis=1)
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


_REPORTED: Final = 0.02
# "Of the order of per cent", for what the report leaves open: an order of magnitude below 1 % and above.
_PER_CENT: Final = (0.001, 0.1)


def long_sums(rows: int, *, bits: int = 13, length: int = 4096) -> ClaimFinding:
    """Is the largest relative error at K = ``length`` of the order of per cent with ``bits`` bits, around the
    reported one, and less with promotion (4 times for one sign)?

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
            error = abs(sums(products, unit, promote) - exact) / size
            values = (sign, length, promote, float(error.max()), float(error.mean()))
            for column, value in zip(table.values(), values, strict=True):
                column.append(value)
    plain, promoted, mixed, mixed_promoted = table["largest error"]
    low, high = _PER_CENT
    ordered = low < mixed < _REPORTED < plain < high
    good = ordered and promoted < plain / 4 and mixed_promoted < mixed
    return ClaimFinding(
        status="SUPPORTED" if good else "REFUTED",
        evidence=f"{rows} sums of {length} products of e4m3 numbers, {bits} fractional bits, 32 at once: "
        f"largest relative error {plain:.2%} for products of one sign, {promoted:.2%} with promotion every "
        f"128; of both signs, relative to the root of the sum of squares, {mixed:.2%} and "
        f"{mixed_promoted:.2%}. Reported: about {_REPORTED:.0%}, of which matrices is not said"
        + (": it lies between the two" if mixed < _REPORTED < plain else ""),
        table=table,
        counterexample=""
        if good
        else f"largest error {plain:.3g} (one sign) and {mixed:.3g} (both), with promotion {promoted:.3g} "
        f"and {mixed_promoted:.3g}",
        seed=42,
    )


CLAIMS: Final = (
    Claim(
        id="HW-3e",
        subject="hardware",
        title="truncation is biased",
        statement="Cutting biases sums towards zero: the error of a sum of K terms grows as K, not as √K.",
        source=f"derived from {MODEL}",
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
        "is of the order of per cent (reported: about 2 %), less for products of both signs and more for "
        "those of one; adding to float32 outside every 128 products makes it smaller, for one sign 4 times "
        "and more.",
        source="DeepSeek-V3 technical report, arXiv 2412.19437, Section 3.3.2",
        kind="measurement",
        check=lambda lab: long_sums(lab.choose(64, 1024)),
        control=lambda _: long_sums(32, bits=25),
    ),
)
