"""Claims about rows of sigmoid attention: its definition, a bias of mass 1, causal rows.

In exact rationals and against the oracle, as in :mod:`attnproof.properties.claims.sigmoid`. SIG-1, SIG-4;
Ramapuram et al., arXiv 2409.04431.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Final

import flint
import torch

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.sigmoid import PAPER, SUBJECT, Weight, contains, weight
from attnproof.properties.oracle import reference

__all__ = [
    "CLAIMS",
    "causal_rows",
    "definition",
    "normal_rows",
    "row_normalising_bias",
    "without_scale_and_bias",
]

_BITS = 128

Mass = Callable[[Sequence[flint.arb], flint.arb], flint.arb]


def _logarithms(n: int) -> tuple[torch.Tensor, torch.Tensor, list[Fraction]]:
    """Keys whose logits are multiples of log 2, integer values, and the integers e^z, of n positions.

    Width 4: q = (log 2, 0, 0, 0), k = (2·p, 0, 0, 0), so that q·k/√4 = p·log 2.
    """
    powers = [j % 5 - 2 for j in range(n)]
    k, v = torch.zeros(1, 1, n, 4, dtype=torch.float64), torch.ones(1, 1, n, 1, dtype=torch.float64)
    k[0, 0, :, 0] = 2.0 * torch.tensor(powers, dtype=torch.float64)
    v[0, 0, :, 0] = torch.tensor([float(j % 3 - 1) for j in range(n)], dtype=torch.float64)
    return k, v, [Fraction(2) ** p for p in powers]


def definition(
    lengths: Sequence[int] = (1, 2, 7, 64), bias: Callable[[int], float] | None = None
) -> ClaimFinding:
    """Is the suite's family the published formula, scaled by 1/√d, or by d^−¼ on q and on k, bias −log n?

    q holds log 2 rounded to float64, a relative 2⁻⁵³ off, which moves no output by more than 2·2⁻⁵³ n
    (|z| ≤ 2·log 2, |σ'| ≤ ¼, |v| ≤ 1): the exact rational must lie within the oracle's radius and this.

    Args:
        lengths: n; bias: what the oracle is given as bias, by default nothing, which stands for −log n.
    """
    columns: dict[str, list[float]] = {
        "n": [],
        "exact": [],
        "oracle, scale ½": [],
        "oracle, d^−¼ on both": [],
    }
    apart = []
    for n in lengths:
        k, v, weights = _logarithms(n)
        q = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
        q[..., 0] = math.log(2.0)
        exact = sum(
            (weight(w, n) * Fraction(float(x)) for w, x in zip(weights, v.flatten(), strict=True)), Fraction()
        )
        given = None if bias is None else bias(n)
        # d^−¼ = 1/√2 is irrational, but its square is not: (2q)/√2 and k/√2 are q and k once more.
        results = [
            reference("sigmoid", q, k, v, scale=0.5, bias=given),
            reference("sigmoid", q * 0.5, k * 0.5, v, scale=2.0, bias=given),
        ]
        values = []
        for found in results:
            assert isinstance(found, Enclosure)
            slack = float(found.radius) + n * 2.0**-52
            values.append(float(found.value))
            if abs(Fraction(values[-1]) - exact) > Fraction(slack):
                apart.append((n, float(exact), values[-1]))
        for column, number in zip(columns.values(), (n, float(exact), *values), strict=True):
            column.append(number)
    return ClaimFinding(
        status="REFUTED" if apart else "HOLDS",
        evidence=f"{len(lengths)} rows of logits p·log 2, p = −2 … 2, where σ(z − log n) = 2^p/(2^p + n): "
        + (
            f"{len(apart)} outputs differ"
            if apart
            else "all outputs of the oracle enclose the rational number"
        ),
        table=dict(columns),
        counterexample="; ".join(f"n = {n}: {due!r} in rationals, {got!r}" for n, due, got in apart[:1]),
    )


def without_scale_and_bias(score: Callable[[int, int], Fraction] | None = None) -> ClaimFinding:
    """Is σ(q·k) without 1/√d and without −log n the published weight? Weights at integer powers of 2.

    Args:
        score: weight of a key by its logit's power of 2 (q·k/√d = p·log 2) and n; by default σ(q·k), with
            q·k = 2p·log 2 at d = 4: 4^p/(4^p + 1).
    """
    summary = (lambda p, n: weight(Fraction(4) ** p, 1)) if score is None else score
    cases = [(p, n) for n in (1, 2, 4, 64) for p in (0, 1, -1)]
    rows = [(p, n, summary(p, n), weight(Fraction(2) ** p, n)) for p, n in cases]
    different = [row for row in rows if row[2] != row[3]]
    titles = ("power of 2 in e^z", "n", "weight of the summary", "weight of the paper")
    return ClaimFinding(
        status="REFUTED" if different else "HOLDS",
        evidence=f"{len(different)} of {len(rows)} weights differ at width 4, exactly",
        table={title: [float(row[i]) for row in rows] for i, title in enumerate(titles)},
        counterexample="; ".join(
            f"d = 4, n = {n}, q·k/√d = {p}·log 2: {short} in place of {due}"
            for p, n, short, due in different[:1]
        ),
    )


def normal_rows(
    lengths: Sequence[int] = (2, 3, 17, 256), deviations: Sequence[float] = (0.1, 1.0, 5.0), each: int = 4
) -> list[torch.Tensor]:
    """Rows of normal logits, float64 (n,), and one row of equal logits for each length. Seed 0."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.full((n,), 0.75, dtype=torch.float64) for n in lengths]
    for n in lengths:
        for s in deviations:
            rows += [s * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(each)]
    return rows


def _mass(weights: Sequence[flint.arb], factor: flint.arb) -> flint.arb:
    """Σ σ(z + b) for weights e^z and the factor e^b."""
    return sum((1 - 1 / (1 + w * factor) for w in weights), flint.arb(0))


def _exponentials(weights: Sequence[flint.arb], factor: flint.arb) -> flint.arb:
    """Σ e^(z + b): exponentials, as softmax has them, in σ's place."""
    return sum((w * factor for w in weights), flint.arb(0))


def _root(z: torch.Tensor) -> float:
    """b with Σ σ(z + b) = 1 by bisection in float64: where to look, not a proof."""
    low, high = _around(z)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.sigmoid(z + middle).sum()) < 1 else (low, middle)
    return (low + high) / 2


def _around(z: torch.Tensor) -> tuple[float, float]:
    """The bracket of b*, and 1 more on either side."""
    low, high = (-math.log(len(z) - 1) - float(end) for end in (z.max(), z.min()))
    return low - 1.0, high + 1.0


def _root_in_balls(z: torch.Tensor, weights: Sequence[flint.arb], mass: Mass) -> float:
    """The same in balls, for rows whose sum hardly changes over the bracket and drowns in float64."""
    low, high = _around(z)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(weights, flint.arb(middle).exp()) < 1 else (low, middle)
    return (low + high) / 2


def _crosses(weights: Sequence[flint.arb], root: float, mass: Mass) -> bool:
    """Whether the mass is proved below 1 at 2⁻³⁰ before ``root``, and above 1 at as much behind it."""
    before, behind = (mass(weights, flint.arb(root + step).exp()) for step in (-(2.0**-30), 2.0**-30))
    return bool(before < 1) and bool(behind > 1)


def row_normalising_bias(rows: Sequence[torch.Tensor] | None = None, mass: Mass = _mass) -> ClaimFinding:
    """Does the bias b* of mass 1 lie in the bracket, and above −LSE? Signs of Σ σ(z + b) − 1, proved in Arb.

    The sum increases in b, so b* is where it crosses 1; a strict bracket is asked of rows that are not equal,
    both of its ends at b* of rows that are.

    Args:
        rows: logits, float64 (n,); mass: what is taken for Σ σ(z + b), of e^z and e^b.
    """
    chosen = normal_rows() if rows is None else rows
    columns: dict[str, list[float]] = {key: [] for key in ("n", "lower end", "−LSE", "b*", "upper end")}
    broken, undecided = [], []
    for place, z in enumerate(chosen):
        n, equal, root = len(z), bool((z == z[0]).all()), _root(z)
        with _precision(_BITS):
            weights = [flint.arb(x).exp() for x in z.tolist()]
            ends = [1 / ((n - 1) * flint.arb(float(x)).exp()) for x in (z.max(), z.min())]
            total = sum(weights, flint.arb(0))
            below, above = (mass(weights, end) for end in ends)
            lse = mass(weights, 1 / total)
            if not _crosses(weights, root, mass):
                root = _root_in_balls(z, weights, mass)
            if below > 1 or above < 1 or lse > 1 or (equal and not (1 in below and 1 in above)):
                broken.append(place)
            elif not (lse < 1 and (equal or (below < 1 and above > 1)) and _crosses(weights, root, mass)):
                undecided.append(place)
            values = (
                n,
                float(ends[0].log().mid()),
                -float(total.log().mid()),
                root,
                float(ends[1].log().mid()),
            )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    gaps = [b - lse for b, lse in zip(columns["b*"], columns["−LSE"], strict=True)]
    shortest = min(broken, key=lambda place: len(chosen[place]), default=0)
    return ClaimFinding(
        status="REFUTED" if broken else ("OPEN" if undecided else "SUPPORTED"),
        evidence=f"signs proved on {len(chosen) - len(undecided)} of {len(chosen)} rows of 2 to "
        f"{max(map(len, chosen))} logits, equal ones and normal ones (seed 0), b* to 2^-30; b* + LSE "
        f"between {min(gaps):.3g} and {max(gaps):.3g}"
        + (f"; broken by {len(broken)} rows" if broken else ""),
        table=dict(columns),
        counterexample=f"logits {chosen[shortest].tolist()[:8]}" if broken else "",
        seed=0,
    )


def causal_rows(n: int = 64, weigh: Weight = weight) -> ClaimFinding:
    """Do causal rows at zero logits have the mass (i + 1)/(n + 1), where the bias is −log n for all?

    Args:
        n: positions; weigh: what is taken for the weight of a key, of e^z and n.
    """
    shape = (1, 1, n, 1)
    q, ones = torch.zeros(shape), torch.ones(shape)
    found = reference("sigmoid", q, ones, ones, scale=1.0, causal=True)
    assert isinstance(found, Enclosure)
    exact = [(i + 1) * weigh(1, n) for i in range(n)]
    good = contains(found, exact)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"n = {n}: from {exact[0]} to {exact[-1]}, a factor {exact[-1] / exact[0]}; the oracle's "
        + (f"{n} enclosures hold these numbers" if good else "enclosures do not hold these numbers"),
        table={"row": list(range(n)), "mass": [float(x) for x in exact]},
        counterexample=""
        if good
        else f"n = {n}, row 0: {exact[0]}, the oracle {float(found.value[0, 0, 0, 0])}",
    )


CLAIMS: Final = (
    Claim(
        id="SIG-1a",
        subject=SUBJECT,
        title="definition",
        statement="Sigmoid attention is o_i = Σ_j σ(q_i·k_j/√d − log n) v_j: weights e^z/(e^z + n) for "
        "logits z = q·k/√d, however the scale is divided between q and k.",
        source=f"{PAPER}; code of apple/ml-sigmoid-attention",
        kind="enclosure",
        check=lambda lab: definition(lab.choose((1, 2, 7, 64), (1, 2, 7, 64, 1000))),
        # The base-two logarithm in place of the natural one.
        control=lambda lab: definition((2, 7), lambda n: -math.log2(n)),
    ),
    Claim(
        id="SIG-1b",
        subject=SUBJECT,
        title="weights of the summary",
        statement="Sigmoid attention weighs key j by σ(q·k_j), without 1/√d and without a bias (as a "
        "summary of the paper has it); these are the paper's weights.",
        source=f"summary of {PAPER} among the source articles",
        kind="exact",
        check=lambda lab: without_scale_and_bias(),
        control=lambda lab: without_scale_and_bias(lambda p, n: weight(Fraction(2) ** p, n)),
        covers=("SEED2-5",),
    ),
    Claim(
        id="SIG-1c",
        subject=SUBJECT,
        title="causal rows under a fixed −log n",
        statement="With one bias −log n for all rows of a causal call the mass of row i at zero logits is "
        "(i + 1)/(n + 1): it grows from 1/(n + 1) to n/(n + 1).",
        source="derived; code of apple/ml-sigmoid-attention, which keeps −log n of the whole length",
        kind="enclosure",
        check=lambda lab: causal_rows(),
        # The bias −log(n − 1).
        control=lambda lab: causal_rows(8, lambda w, n: weight(w, n - 1)),
    ),
    Claim(
        id="SIG-4",
        subject=SUBJECT,
        title="bias that normalises a row",
        statement="Σ_j σ(z_j + b) = 1 has one root b*, with −log(n−1) − max z ≤ b* ≤ −log(n−1) − min z, "
        "equality only where all z are equal, and b* > −LSE(z).",
        source=f"{PAPER}, Appendix C (recalled); b* > −LSE derived from σ(t) < e^t",
        kind="search",
        check=lambda lab: row_normalising_bias(
            lab.choose(normal_rows(), normal_rows((2, 3, 17, 256, 1000), (0.1, 1.0, 5.0, 20.0), 8))
        ),
        control=lambda lab: row_normalising_bias(normal_rows((2, 17), (1.0,), 2), _exponentials),
    ),
)
