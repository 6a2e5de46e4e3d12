"""What leaves sigmoid attention as it is and what does not: doubled sequences, shifted scores, ALiBi.

All in exact rationals: with w = e^z the weight of a key is w/(w + n) at the bias −log n, w/(w + 1) without.
SIG-2, SIG-10; Ramapuram et al., arXiv 2409.04431.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Final

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.sigmoid import PAPER, SUBJECT, Weight, weight, zero_logits
from attnproof.properties.oracle import reference

__all__ = ["CLAIMS", "Weights", "alibi", "doubling", "doubling_exponent", "shift", "sigmoid", "softmax"]

Weights = Callable[[Sequence[Fraction]], list[Fraction]]
"""From the numbers e^z of a row to the weights of its keys."""


def sigmoid(row: Sequence[Fraction]) -> list[Fraction]:
    """σ(z − log n) for a row of e^z."""
    return [weight(w, len(row)) for w in row]


def softmax(row: Sequence[Fraction]) -> list[Fraction]:
    """e^z/Σe^z for a row of e^z."""
    return [w / sum(row) for w in row]


_EXPONENTS: Final = tuple(Fraction(i, 2) for i in range(5))


def _plain(w: Fraction | int, n: int) -> Fraction:
    """σ(z), which knows no length."""
    return weight(w, 1)


def _divided(w: Fraction | int, n: int) -> Fraction:
    """n⁻¹σ(z)."""
    return weight(w, 1) / n


def doubling(
    lengths: Sequence[int] = (1, 4, 64, 4096),
    weights: Sequence[Fraction] = (Fraction(1), Fraction(20)),
    weigh: Weight = weight,
) -> ClaimFinding:
    """Does writing every key and value twice leave the output as it is? In exact rationals.

    A key of weight w = e^z has weight σ(z − log n) = w/(w + n) once, and 2w/(w + 2n) as a pair.

    Args:
        lengths: n; weights: w; weigh: what is taken for the weight of a key.
    """
    rows = [(w, n, 2 * weigh(w, 2 * n) / weigh(w, n)) for w in weights for n in lengths]
    changed = [row for row in rows if row[2] != 1]
    # n⁻¹σ(z), of which the length enters as a factor, and a bias that knows no length.
    scaled = {2 * _divided(w, 2 * n) / _divided(w, n) for w, n, _ in rows}
    fixed = {2 * _plain(w, 2 * n) / _plain(w, n) for w, n, _ in rows}
    words = "; ".join(f"w = {float(w):g}, n = {n}: {float(ratio):.6g}" for w, n, ratio in rows)
    return ClaimFinding(
        status="REFUTED" if changed else "HOLDS",
        evidence="the weight of a key e^z = w grows by (1 + n/w)/(1/2 + n/w), which tends to 1 only where "
        f"n is much larger than w: {words}. n⁻¹σ(z) keeps it (factor {', '.join(map(str, scaled))}), a "
        f"fixed bias doubles it (factor {', '.join(map(str, fixed))})",
        table={
            "e^z": [float(w) for w, _, _ in rows],
            "n": [n for _, n, _ in rows],
            "weight of the pair over the key's": [float(ratio) for _, _, ratio in rows],
        },
        counterexample="; ".join(
            f"n = {n} key of e^z = {w}: weight {weigh(w, n)} once, 2·{weigh(w, 2 * n)} = "
            f"{2 * weigh(w, 2 * n)} written twice"
            for w, n, _ in changed[:1]
        ),
    )


def doubling_exponent(
    exponents: Sequence[Fraction] = _EXPONENTS,
    lengths: Sequence[int] = (1, 3, 64),
    weigh: Weight = _plain,
) -> ClaimFinding:
    """By what does doubling multiply n^(−α) Σ_j σ(z_j) v_j? Exactly, by its q-th power for α = p/q.

    Args:
        exponents: α; lengths: n; weigh: weight of a key before the factor n^(−α), of e^z and n.
    """
    rows, wrong = [], []
    for alpha in exponents:
        p, q = alpha.numerator, alpha.denominator
        # rows of e^z = 1, 3, 5, …: the sum over the doubled row is twice the sum over the row
        powers = set()
        for n in lengths:
            one, two = (sum(weigh(2 * j + 1, length) for j in range(n)) for length in (n, 2 * n))
            powers.add((2 * two / one) ** q * Fraction(1, 2**p))
        factors = sorted(float(power) ** (1 / q) for power in powers)
        if powers != {Fraction(2) ** (q - p)} or (powers == {Fraction(1)}) is not (alpha == 1):
            wrong.append((alpha, factors))
        rows.append((float(alpha), factors[0], factors[-1], 2.0 ** float(1 - alpha)))
    titles = ("α", "smallest factor", "largest factor", "2^(1 − α)")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"factor of [X, X] over X at n = {list(lengths)}, exact: "
        + "; ".join(
            f"α = {a:g}: {low:.6g}" + ("" if low == high else f" to {high:.6g}") for a, low, high, _ in rows
        )
        + (
            ""
            if wrong
            else ". 2^(1 − α) decreases in α and is 1 at α = 1 alone; it is the factor by which the norm "
            "of a row of n equal tokens grows with every doubling of n, so that the norm goes to infinity "
            "for α < 1 and to 0 for α > 1"
        ),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="; ".join(
            f"α = {a}: factors {found}, not {2.0 ** float(1 - a)}" for a, found in wrong[:1]
        ),
    )


def shift(n: int = 4, weights: Weights = sigmoid, family: str = "sigmoid") -> ClaimFinding:
    """Does adding one number to a row's scores leave its output unchanged? A counterexample, in rationals.

    Scores are 0, then log 2 for the last key; the number is log 2; values are 1 for the last key and 0 for
    the others. The oracle of the family is held against both.

    Args:
        n: keys; weights: of a row of e^z; family: whose oracle is asked.
    """
    row = [Fraction(1)] * (n - 1) + [Fraction(2)]
    before, after = weights(row)[-1], weights([2 * w for w in row])[-1]
    q, k, v = (x.double() for x in zero_logits(n))
    q[:], k[:], v[:] = 1.0, 0.0, 0.0
    v[0, 0, -1] = 1.0
    told = []
    for added, exact in ((0.0, before), (math.log(2.0), after)):
        k[0, 0, :, 0] = added
        k[0, 0, -1, 0] += math.log(2.0)
        found = reference(family, q, k, v, scale=1.0)
        assert isinstance(found, Enclosure)
        # log 2 is held to 2^-54 or so, and σ and softmax change by at most ¼ of what a logit does.
        told.append(abs(Fraction(float(found.value)) - exact) <= Fraction(float(found.radius) + 2.0**-52))
    status = "REFUTED" if before != after else "HOLDS"
    return ClaimFinding(
        status=status if all(told) else "OPEN",
        evidence=f"scores 0 and once log 2, n = {n}: the last key's weight is {before}, and {after} with "
        "log 2 added to all scores; "
        + ("the oracle agrees" if all(told) else "the oracle has other numbers"),
        table={"added": ["0", "log 2"], "weight": [float(before), float(after)], "oracle agrees": told},
        counterexample=f"{n} keys of e^z = {', '.join(map(str, row))}: last weight {before}; of twice "
        f"these {after}"
        if before != after
        else "",
    )


def alibi(lengths: Sequence[int] = (2, 3, 8), weights: Weights = sigmoid) -> ClaimFinding:
    """Are −slope·(i − j) and +slope·j the same in causal rows? At slope log 2, exactly.

    The first makes e^z = 2^(j − i), the second 2^j.

    Args:
        lengths: keys 0 … i that query i = n − 1 sees; weights: of a row of e^z.
    """
    rows = []
    for n in lengths:
        true, short = (weights([Fraction(2) ** (j - s) for j in range(n)]) for s in (n - 1, 0))
        rows.append((n, true, short))
    different = [row for row in rows if row[1] != row[2]]
    return ClaimFinding(
        status="REFUTED" if different else "HOLDS",
        evidence=f"slope log 2, q·k = 0: rows differ at n = {[row[0] for row in different]} of "
        f"{list(lengths)}; mass "
        + "; ".join(f"n = {n}: {float(sum(a)):.4f} and {float(sum(b)):.4f}" for n, a, b in rows),
        table={
            "n": [row[0] for row in rows],
            "mass by −slope·(i − j)": [float(sum(row[1])) for row in rows],
            "mass by +slope·j": [float(sum(row[2])) for row in rows],
        },
        counterexample="; ".join(
            f"slope log 2, n = {n}, query {n - 1}, q·k = 0: weights {', '.join(map(str, a))} by −slope·(i "
            f"− j), {', '.join(map(str, b))} by +slope·j"
            for n, a, b in different[:1]
        ),
    )


CLAIMS: Final = (
    Claim(
        id="SIG-2c",
        subject=SUBJECT,
        title="exponent of the doubling argument",
        statement="Asking of n^(−α) Σ_j σ(z_j) v_j that a sequence written twice keeps its outputs leaves "
        "the one exponent α = 1: the factor is 2^(1 − α).",
        source=f"{PAPER}, a note rendered in the HTML of version 2",
        kind="exact",
        check=lambda lab: doubling_exponent(),
        # The bias −log n in place of no bias.
        control=lambda lab: doubling_exponent(weigh=weight),
        covers=("SIG-2",),
    ),
    Claim(
        id="SIG-2d",
        subject=SUBJECT,
        title="doubling the sequence under −log n",
        statement="With the bias −log n sigmoid attention is unchanged when every key is written twice, as "
        "softmax attention is.",
        source=f"{PAPER}: b = −log n in the place of the factor n⁻¹",
        kind="exact",
        check=lambda lab: doubling(),
        control=lambda lab: doubling(weigh=_divided),
    ),
    Claim(
        id="SIG-10a",
        subject=SUBJECT,
        title="adding a number to a row's scores",
        statement="Adding one number to all scores of a row leaves the output of sigmoid attention as it "
        "is, as it does softmax attention's.",
        source=f"derived, for the weights of {PAPER}",
        kind="exact",
        check=lambda lab: shift(2),
        control=lambda lab: shift(2, softmax, "softmax"),
        covers=("SIG-10",),
    ),
    Claim(
        id="SIG-10b",
        subject=SUBJECT,
        title="ALiBi's offset",
        statement="ALiBi's −slope·(i − j) may be computed as +slope·j in sigmoid attention, as softmax "
        "kernels do.",
        source="code of apple/ml-sigmoid-attention, which has the true offset",
        kind="exact",
        check=lambda lab: alibi(),
        control=lambda lab: alibi(weights=softmax),
    ),
)
