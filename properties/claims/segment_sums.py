"""Claims about sums of log decays over segments in float32, by differences or not. Theory.md SSD-4.

Every float32 number is exact in a ball, so that the error of a sum, d, is known exactly and that of its
exponential is e^d − 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.ssd import SSD
from attnproof.properties.forms import ssd
from attnproof.properties.forms.base import Array

__all__ = ["CLAIMS", "boundaries", "growth", "within_segments"]

SEED: Final = 81
_BITS = 256
_ROUNDOFF = flint.fmpq(1, 2**24)
# Positions at the end of a long sequence whose pairs are looked at.
_TAIL = 8


def _inputs(length: int) -> Iterator[tuple[str, Array]]:
    """Log decays in float32: two made to lose everything, ordinary ones, strong ones, weak ones."""
    rng = np.random.default_rng(SEED)
    yield "−2²⁴ and −1", np.array([-(2.0**24), -1.0], np.float32)
    yield "−1000, then −2⁻²⁰", np.array([-1000.0] + [-(2.0**-20)] * 7, np.float32)
    for name, mean in (("mean −0.1", 0.1), ("mean −10", 10.0)):
        yield name, (-rng.exponential(mean, length)).astype(np.float32)


def _errors(g: Array, *, difference: bool) -> Iterator[tuple[int, int, flint.arb, flint.arb]]:
    """i, j < i, the error of the sum over j < r ≤ i and its bound γ_{m−1} Σ|g| by m summands, exactly."""
    table = ssd.segment_sums(g, difference=difference)
    prefix = [flint.arb(0)]
    for x in g:
        prefix.append(prefix[-1] + flint.arb(float(x)))
    for i in range(len(g)):
        for j in range(i):
            exact = prefix[i + 1] - prefix[j + 1]
            m = i - j - 1
            bound = m * _ROUNDOFF / (1 - m * _ROUNDOFF) * abs(exact)
            yield i, j, flint.arb(float(table[i, j])) - exact, bound


def within_segments(length: int = 96, *, difference: bool) -> ClaimFinding:
    """Is a segment's sum as exact as adding its own m numbers, |d| ≤ γ_{m−1} Σ|g| (g of one sign)?"""
    rows, examples = [], []
    with _precision(_BITS):
        for name, g in _inputs(length):
            beyond, worst, pairs = 0, flint.arb(0), 0
            for i, j, error, bound in _errors(g, difference=difference):
                pairs += 1
                worst = worst.max(abs(error.expm1()))
                if abs(error) > bound:
                    beyond += 1
                    if len(g) == 2:
                        total = np.add.accumulate(g)
                        examples.append(
                            f"g = ({g[0]:.0f}, {g[1]:.0f}) in float32: cumulative sums {total[0]:.0f} and "
                            f"{total[1]:.0f}, as {float(g[0]) + float(g[1]):.0f} is no float32 number; the "
                            f"segment ({j + 1}, {i + 1}] is {g[1]:.0f}, the difference "
                            f"{total[1] - total[0]:.0f}: the decay e^{g[1]:.0f} becomes 1"
                        )
            rows.append((name, len(g), pairs, beyond, float(worst.upper())))
    bad = sum(row[3] for row in rows)
    titles = ("log decays", "T", "segments", "beyond the bound", "largest relative error of the decay")
    return ClaimFinding(
        status="REFUTED" if bad else "SUPPORTED",
        evidence=f"float32, {sum(row[2] for row in rows)} segments of {len(rows)} inputs, errors exact: "
        f"{bad} beyond "
        "γ_{m−1}·Σ|g| of their own m numbers; largest relative error of a decay "
        + ", ".join(f"{row[4]:.2g} ({row[0]})" for row in rows),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=examples[0] if examples else "",
        seed=SEED,
    )


def growth(lengths: Sequence[int] = (64, 256, 1024), *, difference: bool = True) -> ClaimFinding:
    """Does the relative error of near decays at a sequence's end grow as u·|cumulative sum|? Mean decay −10.

    Of pairs at most :data:`_TAIL` positions before the end, the largest error. A segment's own sum is formed
    for these positions only; it needs no others.
    """
    rng = np.random.default_rng(SEED + 1)
    rows = []
    with _precision(_BITS):
        for length in lengths:
            g = (-10.0 - rng.standard_normal(length)).astype(np.float32)
            tail, near = np.add.accumulate(g)[-_TAIL:], g[-_TAIL:]
            own = ssd.segment_sums(near, difference=False)
            worst = flint.arb(0)
            for i in range(_TAIL):
                exact = flint.arb(0)
                for j in range(i - 1, -1, -1):
                    exact = exact + flint.arb(float(near[j + 1]))
                    found = tail[i] - tail[j] if difference else own[i, j]
                    worst = worst.max(abs((flint.arb(float(found)) - exact).expm1()))
            size = abs(float(tail[-1]))
            rows.append((length, size, float(worst.upper()), size * float(_ROUNDOFF)))
    # Each sum between two positions rounds by u·|c| at most. Below u·|c|/8 the errors would not follow it.
    near_law = all(row[3] / 8 <= row[2] <= (_TAIL - 1) * row[3] * (1 + row[2]) for row in rows)
    titles = ("T", "|cumulative sum|", "largest relative error", "u·|cumulative sum|")
    table = {title: [row[i] for row in rows] for i, title in enumerate(titles)}
    return ClaimFinding(
        status="SUPPORTED" if near_law else "REFUTED",
        evidence=f"float32, decays of mean −10, segments within the last {_TAIL} positions, errors exact: "
        + ", ".join(f"T = {row[0]}: {row[2]:.2g} (u·|c| = {row[3]:.2g})" for row in rows),
        table=table,
        plots=(
            Plot(
                "relative error of near decays",
                "line",
                table,
                x="T",
                y="largest relative error",
                log=("T", "largest relative error"),
            ),
        ),
        counterexample=""
        if near_law
        else f"T = {rows[-1][0]}: error {rows[-1][2]:.2g}, u·|c| = {rows[-1][3]:.2g}",
        seed=SEED + 1,
    )


def boundaries(length: int = 6, *, difference: bool = False) -> ClaimFinding:
    """Is a log decay of −∞, which forgets everything before it, exact: e^sum 0 across it, right inside?"""
    rows, example = [], ""
    for place in range(length):
        g = np.full(length, -0.5, np.float32)
        g[place] = -np.inf
        table = ssd.segment_sums(g, difference=difference)
        for i in range(length):
            for j in range(i + 1):
                due = -np.inf if j < place <= i else 0.5 * (j - i)
                rows.append(bool(table[i, j] == due))
                if not rows[-1] and not example:
                    example = (
                        f"g = ({', '.join(map(str, g[: i + 1]))}): the segment ({j + 1}, {i + 1}] sums to "
                        f"{due}, the form gives {table[i, j]}"
                    )
    wrong = rows.count(False)
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"T = {length}, −∞ at each place in turn among decays of −1/2 (all sums exact): {wrong} "
        f"of {len(rows)} segments wrong",
        table={"segments": [len(rows)], "wrong": [wrong]},
        counterexample=example,
    )


CLAIMS: Final = (
    Claim(
        id="SSD-4a",
        subject="state space models",
        title="segments by differences of cumulative sums",
        statement="In float32 c_i − c_j with cumulative sums c of log decays is as good as the segment's "
        "own sum.",
        source=f"the form that {SSD}, listing 1, calls unstable and others use",
        kind="search",
        check=lambda lab: within_segments(lab.choose(64, 256), difference=True),
        control=lambda lab: within_segments(32, difference=False),
        covers=("SSD-4",),
    ),
    Claim(
        id="SSD-4b",
        subject="state space models",
        title="segments by their own sums",
        statement="Summing each segment by itself errs by at most γ_{m−1}·Σ|g| of its own m log decays, "
        "whatever comes before.",
        source=f"{SSD}, listing 1 (segsum)",
        kind="search",
        check=lambda lab: within_segments(lab.choose(64, 256), difference=False),
        control=lambda lab: within_segments(32, difference=True),
    ),
    Claim(
        id="SSD-4c",
        subject="state space models",
        title="decays of −∞",
        statement="With segments summed by themselves a log decay of −∞ (a boundary between documents) is "
        "exact; differences give −∞ − (−∞).",
        source=f"{SSD}, listing 1 (segsum)",
        kind="exact",
        check=lambda lab: boundaries(lab.choose(6, 24)),
        control=lambda lab: boundaries(3, difference=True),
    ),
    Claim(
        id="SSD-4d",
        subject="state space models",
        title="how differences lose accuracy",
        statement="By differences of cumulative sums the relative error of a decay between near positions "
        "grows with the length, as u·|c| for cumulative sums c.",
        source="derived; on the form in " + SSD + ", listing 1",
        kind="measurement",
        check=lambda lab: growth(lab.choose((64, 256, 1024), (64, 256, 1024, 4096, 16384))),
        control=lambda lab: growth((256, 1024), difference=False),
    ),
)
