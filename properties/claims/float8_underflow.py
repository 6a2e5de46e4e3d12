"""Probabilities in float8: which vanish, what a scale of 2⁸ and the order of the keys change.

arXiv 2606.06521 (abstract). The format is enumerated; the fractions and errors are simulated with Gaussian
logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.small_formats import E4M3, E5M2, Floats, Format

__all__ = ["CLAIMS", "errors", "forward", "fractions", "gap", "normal", "powers_as_scales", "threshold"]

_SOURCE: Final = "arXiv 2606.06521, abstract"
_SINKS: Final = 4
_BLOCK: Final = 64
# Expectation of the largest of four standard normal numbers.
_LARGEST_OF_FOUR: Final = 1.0294
# The formula takes the mean of the largest sink for all rows. Its spread of 0.7 flattens the curve by up to
# 0.04 at the heights tried, and moves the mean of 48 rows by 0.04 (one standard deviation at the steepest).
_APART: Final = 0.08
# With every row's own largest sink in the formula, what is left is the spread of 1020 logits a row and the
# running maximum of the first block, which Gaussian logits raise above a low sink.
_APART_BY_ROW: Final = 0.02


def gap(scale: int = 1) -> flint.arb:
    """ln(2¹⁰·scale), the gap below the maximum from which on P·scale vanishes, as a ball."""
    return (flint.arb(2) ** 10 * scale).log()


def threshold(form: Format = E4M3, least: flint.fmpq = flint.fmpq(1, 1024)) -> ClaimFinding:  # noqa: B008
    """Does rounding to ``form`` give 0 exactly for |x| ≤ ``least``?"""
    tiny = flint.fmpq(1, 2**60)
    numbers = form.positives()
    vectors = {
        "least": form.nearest(least) == 0,
        "least·(1 + 2⁻⁶⁰)": form.nearest(least * (1 + tiny)) == 2 * least == numbers[0],
        "2·least": form.nearest(2 * least) == 2 * least,
        "500": form.nearest(500) == 448,
    }
    kept = all(form.nearest(x) == x for x in numbers)
    good = all(vectors.values()) and kept
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"{form.name}: {len(numbers)} positive numbers, smallest {numbers[0]}, largest "
        f"{numbers[-1]}; rounding is monotone, {least} is rounded to {form.nearest(least)} (a tie, to even) "
        f"and what is larger to {form.nearest(least * (1 + tiny))}; 500 saturates to {form.nearest(500)}; ln "
        f"2¹⁰ = {float(gap().mid()):.6f}",
        table={"rounded": list(vectors), "as claimed": list(vectors.values())},
        counterexample="" if good else f"{form.name}({least}) = {form.nearest(least)}, smallest {numbers[0]}",
    )


def powers_as_scales(scale: int = 256) -> ClaimFinding:
    """Is ``scale`` the largest power of two that saturates nothing of [0, 1], and does it round as 1 does?"""
    quarters = [flint.fmpq(j, 512) for j in range(32, 513)]
    changed = [x for x in quarters if E4M3.nearest(x * scale) / scale != E4M3.nearest(x)]
    saturated = E4M3.nearest(scale) != scale
    larger = [k for k in range(12) if E4M3.nearest(flint.fmpq(2) ** k) == flint.fmpq(2) ** k]
    good = not changed and not saturated and scale == 2 ** max(larger)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"P = 32/512 … 1, scale {scale}: {len(changed)} of {len(quarters)} round otherwise than "
        f"unscaled, P = 1 {'saturates' if saturated else 'is exact'}; the largest power of two that is exact "
        f"is 2^{max(larger)}. P·{scale} vanishes from a gap of ln(2¹⁰·{scale}) = "
        f"{float(gap(scale).mid()):.4f} on, without a scale from {float(gap().mid()):.4f}",
        counterexample=(
            f"scale {scale}, P = {changed[-1]}: {E4M3.nearest(changed[-1] * scale)}/{scale} = "
            f"{E4M3.nearest(changed[-1] * scale) / scale}, unscaled {E4M3.nearest(changed[-1])}"
            if changed
            else ""
        ),
    )


def normal(x: float) -> float:
    """Φ(x)."""
    return math.erfc(-x / math.sqrt(2)) / 2


def forward(
    s: Floats, v: Floats, scale: int, *, reverse: bool, block: int = _BLOCK
) -> tuple[Floats, float, float]:
    """O, the share of all P that vanish and the share that vanish outside the first block of keys.

    Of rows of logits s and values v, (R, n), P·scale rounded to e4m3. Keys are visited in blocks, from the
    first or from the last.
    """
    rows, n = s.shape
    top, out, mass = np.full((rows, 1), -np.inf), np.zeros(rows), np.zeros(rows)
    lost, elsewhere, starts = 0, 0, range(0, n, block)
    for start in reversed(starts) if reverse else starts:
        x = s[:, start : start + block]
        higher = np.maximum(top, x.max(axis=1, keepdims=True))
        p, drop = np.exp(x - higher), np.exp(top - higher)[:, 0]
        held = E4M3.array(p * scale) / scale
        vanished = int((held == 0).sum())
        lost, elsewhere = lost + vanished, elsewhere + (vanished if start else 0)
        out = out * drop + (held * v[:, start : start + block]).sum(axis=1)
        mass, top = mass * drop + p.sum(axis=1), higher
    return out / mass, lost / s.size, elsewhere / s.size


def _drawn(rows: int, n: int, height: float) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(81)
    s, v = rng.standard_normal((2, rows, n))
    s[:, :_SINKS] += height
    return s, v


def fractions(
    rows: int, n: int = 1024, *, shift: float = 0.0, heights: Sequence[float] = (2, 4, 5, 6, 8, 10)
) -> ClaimFinding:
    """Is the share of vanishing P Φ(Δ + δ − ln 2¹⁰ − ln S) with δ ≈ 1 for four sinks, and 0 in reverse with
    S = 2⁸ but in the sinks' block?

    Args:
        shift: added to the threshold, 0 as claimed.
    """
    names = ("Δ", "S", "share", "formula", "formula, each row's sink", "in reverse", "in reverse, elsewhere")
    table: dict[str, list[float]] = {name: [] for name in names}
    for height in heights:
        s, v = _drawn(rows, n, height)
        for scale in (1, 256):
            below = float(gap(scale).mid()) + shift
            share = forward(s, v, scale, reverse=False)[1]
            due = normal(height + _LARGEST_OF_FOUR - below)
            by_row = float(np.mean([normal(x - below) for x in s[:, :_SINKS].max(axis=1)]))
            values = (height, float(scale), share, due, by_row, *forward(s, v, scale, reverse=True)[1:])
            for column, value in zip(table.values(), values, strict=True):
                column.append(float(value))
    apart, by_rows = (
        max(abs(a - b) for a, b in zip(table["share"], table[name], strict=True)) for name in names[3:5]
    )
    scaled = [i for i, scale in enumerate(table["S"]) if scale > 1]
    last, elsewhere = (max(table[name][i] for i in scaled) for name in names[5:])
    good = apart < _APART and by_rows < _APART_BY_ROW and elsewhere == 0
    return ClaimFinding(
        status="SUPPORTED" if good else "REFUTED",
        evidence=f"{rows} rows of {n} Gaussian logits, 4 sinks raised by Δ = {list(heights)}: share and "
        f"formula at most {apart:.3f} apart (accepted: {_APART}), {by_rows:.3f} with each row's own largest "
        f"sink in place of Δ + δ (accepted: {_APART_BY_ROW}); in reverse with S = 2⁸ a share of at most "
        f"{last:.2g} vanishes, all in the block of {_BLOCK} keys that holds the sinks: elsewhere "
        f"{elsewhere:.2g}",
        table=table,
        plots=(
            Plot(
                "Share of P that vanishes in e4m3",
                "line",
                {
                    "Δ": table["Δ"] * 2,
                    "share": table["share"] + table["formula"],
                    "line": [f"S = {s:g}" for s in table["S"]] + [f"formula, S = {s:g}" for s in table["S"]],
                },
                "Δ",
                "share",
                "line",
            ),
        ),
        counterexample=""
        if good
        else f"largest difference {apart:.3f}, by row {by_rows:.3f}; in reverse, elsewhere {elsewhere:.2g}",
        seed=81,
    )


def errors(rows: int, n: int = 1024, heights: Sequence[float] = (0, 2, 4, 6, 8)) -> ClaimFinding:
    """Is the mean square error of O 3 to 10 times smaller in reverse with S = 2⁸?

    With Gaussian values throughout, and with values 0 at the sinks.
    """
    table: dict[str, list[float]] = {"Δ": [], "gain": [], "gain, values 0 at the sinks": []}
    for height in heights:
        s, v = _drawn(rows, n, height)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        table["Δ"].append(float(height))
        for name in list(table)[1:]:
            if name != "gain":
                v[:, :_SINKS] = 0.0
            due = (p * v).sum(axis=1) / p.sum(axis=1)
            before, after = (
                float(((forward(s, v, scale, reverse=back)[0] - due) ** 2).mean())
                for scale, back in ((1, False), (256, True))
            )
            table[name].append(before / after)
    gains = [gain for column in list(table.values())[1:] for gain in column]
    less, more = sum(g < 3 for g in gains), sum(g > 10 for g in gains)
    inside = len(gains) - less - more
    status = "REFUTED" if less == len(gains) else "CONDITIONAL" if less or more else "SUPPORTED"
    told = "; ".join(
        f"{name}: " + ", ".join(f"{g:.3g} at Δ = {h:g}" for h, g in zip(heights, table[name], strict=True))
        for name in list(table)[1:]
    )
    return ClaimFinding(
        status=status,
        evidence=f"{rows} rows of {n} logits, mean square error forward with S = 1 over that in reverse with "
        f"S = 2⁸; {told}. Of {len(gains)} settings {inside} lie in 3 to 10, {less} below, {more} above",
        table=table,
        counterexample=(
            "without sinks (Δ = 0) the logits lie within about 6.9 of their maximum: nothing vanishes with S "
            f"= 1 either, and the gain is {table['gain'][0]:.2f}. With high sinks the rounding of the sinks' "
            "own P times their values decides, and the gain is near 1, unless these values are 0, as they "
            "nearly are in trained models: then all that counts had vanished, and the gain has no bound"
            if status != "SUPPORTED"
            else ""
        ),
        seed=81,
    )


CLAIMS: Final = (
    Claim(
        id="FP8-1a",
        subject="low precision",
        title="what vanishes in e4m3",
        statement="Rounding to e4m3 (to nearest, ties to even) gives 0 exactly for P ≤ 2⁻¹⁰: a gap of ln 2¹⁰ "
        "= 6.93 below the maximum.",
        source=_SOURCE,
        kind="exact",
        check=lambda _: threshold(),
        control=lambda _: threshold(E5M2),
        covers=("FP8-1",),
    ),
    Claim(
        id="FP8-1b",
        subject="low precision",
        title="the scale 2⁸",
        statement="S = 2⁸ is the largest power of two by which P of [0, 1] can be scaled in e4m3 without "
        "saturation; it changes no rounding of normal numbers, as S = 448 does, and moves the threshold by "
        "ln S.",
        source=_SOURCE,
        kind="exact",
        check=lambda _: powers_as_scales(),
        control=lambda _: powers_as_scales(448),
    ),
    Claim(
        id="FP8-1c",
        subject="low precision",
        title="share of P that vanishes behind a sink",
        statement="With sinks of height Δ ≤ 10 at the start a share Φ(Δ + δ − 6.93 − ln S) of Gaussian "
        "logits vanishes, to within 0.08, δ ≈ 1 for four sinks; with keys in reverse and S = 2⁸ none but in "
        "the block of keys that holds the sinks.",
        source=_SOURCE,
        kind="measurement",
        check=lambda lab: fractions(lab.choose(48, 400)),
        control=lambda _: fractions(24, shift=1.0),
    ),
    Claim(
        id="FP8-1d",
        subject="low precision",
        title="gain of the reverse order",
        statement="Keys in reverse and S = 2⁸ lower the mean square error of O 3 to 10 times.",
        source=_SOURCE,
        kind="measurement",
        check=lambda lab: errors(lab.choose(64, 512)),
        control=lambda _: errors(32, heights=(0, 1)),
    ),
)
