"""Claims about the parallel scan behind Mamba: operator, prefixes, rounding. Theory.md MAM-3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.mamba import MAMBA
from attnproof.properties.forms import mamba
from attnproof.properties.forms.numbers import rationals

__all__ = ["CLAIMS", "Scanned", "associativity", "measured", "prefixes", "rounding"]

SEED: Final = 63
_BITS = 256
_ROUNDOFF = 2.0**-24
# Roundings a level of the scan may add to a sum: its product, its sum, and one of the decay's own.
_A_LEVEL = 3
_INPUTS: Final = {
    "impulse": "1 at the first and 0 at all others (so h_T = a^(T−1))",
    "random input": f"random in [1/2, 1), seed {SEED}",
}
# Errors of a chart on logarithmic axes, which has no 0: none is drawn lower.
_DRAWN = 0.01

_SCANS: Final = {"in sequence": mamba.sequential, "doubling": mamba.doubling, "tree": mamba.tree}


def _sums_first(first: Any, second: Any) -> Any:
    """A wrong operator: (a'a, b + a'b'), which decays the new input and not the old state."""
    return second[0] * first[0], first[1] + second[0] * second[1]


def associativity(operator: mamba.Combine = mamba.combine) -> ClaimFinding:
    """Is the operator associative, with (1, 0) neutral? As polynomials in its six numbers."""
    ring = flint.fmpq_mpoly_ctx.get(("a", "b", "c", "d", "e", "f"), "lex")
    a, b, c, d, e, f = ring.gens()
    x, y, z = (a, b), (c, d), (e, f)
    left, right = operator(operator(x, y), z), operator(x, operator(y, z))
    neutral = (operator((1, 0), x), operator(x, (1, 0)))
    gap = right[1] - left[1]
    associative = left[0] == right[0] and gap == 0
    unit = all(side[0] == a and side[1] == b for side in neutral)
    commutes = operator(x, y)[1] == operator(y, x)[1]
    ones = [operator(operator((2, 1), (2, 1)), (2, 1)), operator((2, 1), operator((2, 1), (2, 1)))]
    return ClaimFinding(
        status="HOLDS" if associative and unit else "REFUTED",
        evidence=f"polynomials over the rationals: associative {associative}, (1, 0) neutral {unit}, "
        f"commutative {commutes}; (x∘y)∘z has b = {left[1]}",
        table={"associative": [bool(associative)], "(1, 0) neutral": [unit], "commutative": [bool(commutes)]},
        counterexample=""
        if associative and unit
        else f"x∘(y∘z) − (x∘y)∘z = {gap} in b, for x = (a, b), y = (c, d), z = (e, f); with all three (2, "
        f"1): {ones[0]} and {ones[1]}",
    )


def prefixes(
    lengths: Sequence[int] = (1, 2, 3, 5, 8, 13), operator: mamba.Combine = mamba.combine
) -> ClaimFinding:
    """Do the scans by doubling and by a tree give every prefix, at lengths that are no powers of 2 too?"""
    rng = np.random.default_rng(SEED)
    rows, example = [], ""
    for length in lengths:
        a, b = rationals(rng, length), rationals(rng, length)
        pairs, h, due = list(zip(a, b, strict=True)), flint.fmpq(0), []
        for decay, added in pairs:
            h = decay * h + added
            due.append(h)
        for name, scan in (("doubling", mamba.doubling), ("tree", mamba.tree)):
            calls = [0]

            def counting(x: Any, y: Any, calls: list[int] = calls) -> Any:
                calls[0] += 1
                return operator(x, y)

            found = [pair[1] for pair in scan(pairs, counting)]
            rows.append((name, length, found == due, calls[0]))
            if found != due and not example:
                wrong = next(i for i, (x, y) in enumerate(zip(found, due, strict=True)) if x != y)
                example = (
                    f"{name}, T = {length}, a = {', '.join(map(str, a))}, b = {', '.join(map(str, b))}: "
                    f"h_{wrong} is {due[wrong]}, the scan gives {found[wrong]}"
                )
    within = all(calls < 2 * n for name, n, _, calls in rows if name == "tree")
    titles = ("scan", "T", "equal", "operations")
    return ClaimFinding(
        status="REFUTED" if example or not within else "HOLDS",
        evidence=f"rational prefixes at T = {list(lengths)}: equal to h_t = a_t h_{{t−1}} + b_t in "
        f"{sum(row[2] for row in rows)} of {len(rows)}; the tree takes fewer than 2T operations: {within}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED,
    )


@dataclass(frozen=True)
class Scanned:
    """The float32 errors of one scan.

    Attributes:
        decays: name of the decays.
        scan: name of the scan.
        length: positions T.
        error: largest relative error over all positions, in units of 2^−24.
        last: the last state.
        exact: its exact value, rounded to float64.
    """

    decays: str
    scan: str
    length: int
    error: float
    last: float
    exact: float


def measured(decay: float, length: int, *, impulse: bool) -> list[Scanned]:
    """Each scan in float32 with one decay at all positions, held against balls of 256 bits.

    Args:
        decay: a number of float32.
        length: positions.
        impulse: the input is 1 at the first position only; else random in [1/2, 1), so that nothing cancels.
    """
    rng = np.random.default_rng(SEED)
    b = np.zeros(length, np.float32)
    b[0] = 1
    if not impulse:
        b = rng.uniform(0.5, 1.0, length).astype(np.float32)
    pairs = [(np.float32(decay), x) for x in b]
    found = []
    with _precision(_BITS):
        h, due = flint.arb(0), []
        for x in b:
            h = flint.arb(decay) * h + flint.arb(float(x))
            due.append(h)
        for name, scan in _SCANS.items():
            out = [float(pair[1]) for pair in scan(pairs)]
            gaps = [abs(flint.arb(x) / y - 1) for x, y in zip(out, due, strict=True)]
            errors = [float(gap.upper()) / _ROUNDOFF for gap in gaps]
            label = f"{decay!r}, {'impulse' if impulse else 'random input'}"
            found.append(Scanned(label, name, length, max(errors), out[-1], float(due[-1].mid())))
    return found


def _series(found: Sequence[Scanned], decays: str, scan: str) -> str:
    """Errors by length, in words."""
    return ", ".join(f"{x.error:.3g} (T = {x.length})" for x in found if (x.decays, x.scan) == (decays, scan))


def rounding(
    lengths: Sequence[int] = (64, 256, 1024), decays: Sequence[float] = (1.0, 0.5, 1.0 - 2.0**-13)
) -> ClaimFinding:
    """Do float32 errors of the parallel scans stay within 3⌈log₂ T⌉ roundings, for decays of any size?"""
    found = [
        one
        for decay in decays
        for impulse in (False, True)
        for length in lengths
        # An impulse decayed by 1/2 underflows.
        if not (impulse and decay**length < 2.0**-120)
        for one in measured(decay, length, impulse=impulse)
    ]
    parallel = [one for one in found if one.scan != "in sequence"]
    limits = {n: _A_LEVEL * math.ceil(math.log2(n)) for n in lengths}
    beyond = [one for one in parallel if one.error > limits[one.length]]
    status = "SUPPORTED" if not beyond else "CONDITIONAL" if len(beyond) < len(parallel) else "REFUTED"
    kinds = {one.decays for one in beyond}
    growth = [f"{kind}, {name}: {_series(found, kind, name)}" for kind in sorted(kinds) for name in _SCANS]
    example = ""
    if beyond:
        first = min(beyond, key=lambda one: (one.length, "impulse" not in one.decays))
        decay, _, kind = first.decays.partition(", ")
        example = (
            f"T = {first.length}, decay a = {decay} at all positions, input {_INPUTS.get(kind, kind)}: the "
            f"scan by {first.scan} gives {first.last!r} in float32, the exact last state is "
            f"{first.exact!r}; the largest relative error is {first.error:.3g}·2^−24, more than "
            f"{limits[first.length]}. (1 − 2^−13)² = 1 − 2^−12 "
            "+ 2^−26 rounds to 1 − 2^−12, and every squaring after it doubles the relative error: a "
            "product of T decays holds T − 1 roundings in any order; only the sums have log₂ T levels."
        )
    table: dict[str, list[Any]] = {
        "decay and input": [one.decays for one in found],
        "scan": [one.scan for one in found],
        "T": [one.length for one in found],
        "largest relative error, 2^−24": [one.error for one in found],
        "3·log₂ T": [limits[one.length] for one in found],
    }
    picture: dict[str, list[Any]] = {
        "T": [one.length for one in found],
        "error": [max(one.error, _DRAWN) for one in found],
        "series": [f"{one.decays}, {one.scan}" for one in found],
    }
    return ClaimFinding(
        status=status,
        evidence=f"float32 against balls of {_BITS} bits, T = {list(lengths)}, {len(decays)} decays, input "
        f"random in [1/2, 1) or an impulse: {len(parallel) - len(beyond)} of {len(parallel)} parallel scans "
        "within 3·log₂ T roundings" + (f"; in units of 2^−24: {'; '.join(growth)}" if beyond else ""),
        table=table,
        plots=(
            Plot(
                f"error of scans over T, 2^−24 (below {_DRAWN}: drawn there)",
                "line",
                picture,
                "T",
                "error",
                "series",
                ("T", "error"),
            ),
        ),
        counterexample=example,
        seed=SEED,
    )


CLAIMS: Final = (
    Claim(
        id="MAM-3a",
        subject="state space models",
        title="the scan operator is associative",
        statement="(a, b)∘(a', b') = (a'a, a'b + b') is associative with (1, 0) neutral.",
        source=f"{MAMBA}, section 3.3.2; Blelloch 1990",
        kind="exact",
        check=lambda lab: associativity(),
        control=lambda lab: associativity(_sums_first),
        covers=("MAM-3",),
    ),
    Claim(
        id="MAM-3b",
        subject="state space models",
        title="parallel scans give every prefix",
        statement="Scans by doubling and by a tree give all states h_t at every length, the tree in fewer "
        "than 2T operations.",
        source=f"{MAMBA}, section 3.3.2; Blelloch 1990; Hillis and Steele 1986",
        kind="exact",
        check=lambda lab: prefixes(lab.choose((1, 2, 3, 5, 8, 13), (1, 2, 3, 5, 8, 13, 31, 64, 100))),
        # The operands in the other order.
        control=lambda lab: prefixes((3,), lambda x, y: mamba.combine(y, x)),
    ),
    Claim(
        id="MAM-3c",
        subject="state space models",
        title="rounding of a parallel scan",
        statement="In float32 the rounding of a parallel scan over T positions grows as its log₂ T levels.",
        source="folklore of pairwise summation, carried over to scans with decays",
        kind="measurement",
        check=lambda lab: rounding(lab.choose((64, 256, 1024), (64, 256, 1024, 4096))),
        # Without decays the scan is pairwise summation.
        control=lambda lab: rounding((64, 256), (1.0,)),
    ),
)
