"""Claims about attention on batch-normalised queries and keys: what centring does and what it leaves alone.

Scores are compared in exact rationals: two that differ by one number along each row have the same softmax.
The oracle's enclosures of the family are held against those of softmax attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final

import flint
import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.oracle import reference

__all__ = [
    "CLAIMS",
    "Draw",
    "agree",
    "apart",
    "as_polynomials",
    "centring",
    "common_shift",
    "draws",
    "outputs",
    "same_softmax",
]

Matrix = Sequence[Sequence[Fraction]]
_SUBJECT = "primal-dual framework"
_SOURCE = "Nguyen et al., arXiv 2406.13781 (ICLR 2023), Attention-BN, from memory"
_SEED = 0
_EPS = 0.25
# Queries, keys (a power of two, so that their mean is a float64 number) and width of the calls compared.
_SIZES = (4, 8, 3)


def agree(a: Enclosure, b: Enclosure) -> bool:
    """Whether both may enclose the same numbers."""
    return bool(((a.value - b.value).abs() <= a.radius + b.radius).all())


def apart(a: Enclosure, b: Enclosure) -> float:
    """What the results differ by at least in one element; 0 where they may be the same."""
    return float(((a.value - b.value).abs() - a.radius - b.radius).max().clamp(min=0.0))


def outputs(family: str, *tensors: torch.Tensor, **options: Any) -> Enclosure:
    """The certified output o of a call."""
    found = reference(family, *tensors, **options)
    assert isinstance(found, Enclosure)
    return found


@dataclass(frozen=True, eq=False)
class Draw:
    """One call: q (1, 1, M, D), k (1, 1, N, D), v (1, 1, N, 2), float64 multiples of 1/8, and β."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: Fraction

    def scores(self, for_queries: Fraction | int, for_keys: Fraction | int) -> Matrix:
        """(q_i − β₁μ)·(k_j − β₂μ) in rationals, (M, N), for the two β given."""
        q, k = ([[Fraction(x) for x in row] for row in t[0, 0].tolist()] for t in (self.q, self.k))
        mean = [sum(column, Fraction(0)) / len(k) for column in zip(*k, strict=True)]

        def moved(row: Sequence[Fraction], beta: Fraction | int) -> list[Fraction]:
            return [x - beta * m for x, m in zip(row, mean, strict=True)]

        return [[_dot(moved(x, for_queries), moved(y, for_keys)) for y in k] for x in q]

    def key_bias(self) -> list[Fraction]:
        """−β μ·k_j, (N)."""
        k = [[Fraction(x) for x in row] for row in self.k[0, 0].tolist()]
        mean = [sum(column, Fraction(0)) / len(k) for column in zip(*k, strict=True)]
        return [-self.beta * _dot(mean, row) for row in k]

    def normalised(self, shift: float = 0.0, *, variance: bool = True) -> Enclosure:
        """The family's output with ``shift`` added to all of q and k."""
        beta = torch.tensor([float(self.beta)], dtype=torch.float64)
        moved = (self.q + shift, self.k + shift, self.v)
        return outputs("batch_normalised", *moved, scale=1.0, eps=_EPS, beta=beta, variance=variance)

    def softmax(self, shift: float = 0.0, bias: torch.Tensor | None = None) -> Enclosure:
        """Softmax attention of the same call."""
        return outputs("softmax", self.q + shift, self.k + shift, self.v, scale=1.0, bias=bias)


def _dot(x: Sequence[Fraction], y: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))


def same_softmax(a: Matrix, b: Matrix) -> bool:
    """Whether scores differ by one number along each row, which is when their softmax is the same."""
    return all(len({x - y for x, y in zip(*rows, strict=True)}) == 1 for rows in zip(a, b, strict=True))


def draws(count: int = 4) -> Iterator[Draw]:
    """Calls with keys off centre, β = 1, 1/2, −3/4, 2, and again."""
    generator = torch.Generator().manual_seed(_SEED)
    m, n, d = _SIZES

    def multiples(rows: int, width: int) -> torch.Tensor:
        return torch.randint(-8, 9, (1, 1, rows, width), generator=generator).double() / 8.0

    betas = itertools.cycle((Fraction(1), Fraction(1, 2), Fraction(-3, 4), Fraction(2)))
    for beta in itertools.islice(betas, count):
        yield Draw(multiples(m, d), multiples(n, d) + 0.5, multiples(n, 2), beta)


def as_polynomials(keys: int, sign: int = 1) -> bool:
    """Whether both identities hold as polynomials in q, k_1 … k_N and β, over the rationals.

    Scores are sums over coordinates, so one coordinate proves any number of them.

    Args:
        keys: N.
        sign: of the key bias −β μ k_j; −1 breaks the formula.
    """
    names = ("q", "beta", *(f"k{j}" for j in range(keys)))
    q, beta, *k = flint.fmpq_mpoly_ctx.get(names, "lex").gens()
    mean = sum(k[1:], k[0]) * flint.fmpq(1, keys)
    alone = {str(q * (x - beta * mean) - q * x) for x in k}
    biased = {str((q - beta * mean) * (x - beta * mean) - (q * x - sign * beta * mean * x)) for x in k}
    return len(alone) == 1 and len(biased) == 1


def centring(chosen: Sequence[Draw] | None = None, sign: int = 1) -> ClaimFinding:
    """Is centring keys alone without effect, and Attention-BN without variance softmax with a key bias?

    Args:
        chosen: calls; :func:`draws` if left out.
        sign: of the key bias −βμ·k_j; −1 breaks the formula.
    """
    tried = list(draws()) if chosen is None else chosen
    names = ("keys centred alone", "key bias −βμ·k_j", "oracle, key bias")
    holds = dict.fromkeys(names, 0)
    effects, radius = [], 0.0
    for draw in tried:
        plain, both = draw.scores(0, 0), draw.scores(draw.beta, draw.beta)
        key_bias = [sign * x for x in draw.key_bias()]
        biased = [[x + y for x, y in zip(row, key_bias, strict=True)] for row in plain]
        found = draw.normalised(variance=False)
        bias = torch.tensor([float(x) for x in key_bias], dtype=torch.float64).reshape(1, 1, 1, -1)
        same = draw.softmax(bias=bias)
        outcomes = (
            same_softmax(draw.scores(0, draw.beta), plain),
            same_softmax(both, biased),
            agree(found, same),
        )
        for name, outcome in zip(names, outcomes, strict=True):
            holds[name] += outcome
        radius = max(radius, float((found.radius + same.radius).max()))
        effects.append(apart(found, draw.softmax()))
    proved = [n for n in (1, 2, 3, 4) if as_polynomials(n, sign)]
    good = len(proved) == 4 and all(count == len(tried) for count in holds.values())
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence="as polynomials in q, k_j and β the scores differ by one number along a row for N in "
        f"{proved}, "
        f"of 1 to 4; of {len(tried)} calls: "
        + ", ".join(f"{name} {count}" for name, count in holds.items())
        + f"; scores in exact rationals, outputs enclosed to {radius:.1g}. Without that bias outputs differ "
        f"by {min(effects):.3g} to {max(effects):.3g} at least",
        table={
            "β": [str(draw.beta) for draw in tried],
            "largest difference from softmax attention, at least": effects,
        },
        counterexample="" if good else _first_difference(tried[0], sign),
        seed=_SEED,
    )


def _first_difference(draw: Draw, sign: int) -> str:
    """The first row's scores, centred and biased, whose differences are not one number."""
    both = draw.scores(draw.beta, draw.beta)[0]
    biased = [x + sign * y for x, y in zip(draw.scores(0, 0)[0], draw.key_bias(), strict=True)]
    apart_by = ", ".join(str(x - y) for x, y in zip(both, biased, strict=True))
    return f"β = {draw.beta}, first query: centred scores less biased ones are {apart_by}: not one number"


def two_keys(beta: Fraction) -> Draw:
    """q = 0 and keys 0 and 2, of width 1: the smallest call that a common shift of 2 can change."""
    q, k, v = (
        torch.tensor(x, dtype=torch.float64).reshape(1, 1, -1, 1) for x in ([0.0], [0.0, 2.0], [0.0, 1.0])
    )
    return Draw(q, k, v, beta)


def _shifted_scores(beta: Fraction) -> str:
    before = two_keys(beta)
    after = Draw(before.q + 2, before.k + 2, before.v, beta)
    told = [[str(x) for x in draw.scores(beta, beta)[0]] for draw in (before, after)]
    return (
        f"β = {beta}, without variance, width 1, scale 1: q = 0, keys 0 and 2, μ = 1: scores "
        f"(q − βμ)(k − βμ) = {', '.join(told[0])}.\nAll of them raised by 2: q = 2, keys 2 and 4, μ = 3: "
        "scores "
        f"{', '.join(told[1])}.\nThe second score less the first changes, and the weights with it."
    )


def common_shift(chosen: Sequence[Draw] | None = None, shift: float = 2.0) -> ClaimFinding:
    """Does adding one vector to all queries and keys leave Attention-BN as it is? For β = 1 only."""
    tried = list(draws()) if chosen is None else chosen
    rows = []
    for draw in tried:
        for variance in (False, True):
            beta = float(draw.beta)
            before, after = (draw.normalised(c, variance=variance) for c in (0.0, shift))
            rows.append((beta, variance, agree(before, after), apart(before, after)))
    softmax = [apart(draw.softmax(), draw.softmax(shift)) for draw in tried]
    kept = {same for beta, _, same, _ in rows if beta == 1.0}
    otherwise = {same for beta, _, same, _ in rows if beta != 1.0}
    if kept != {True}:
        status = "REFUTED"
    else:
        status = "HOLDS" if otherwise <= {True} else "CONDITIONAL"
    moved = [difference for beta, _, _, difference in rows if beta != 1.0]
    learned = next((draw.beta for draw in tried if draw.beta != 1), Fraction(1))
    return ClaimFinding(
        status=status,
        evidence="with β = 1, q − μ and k − μ do not know of the shift: "
        + ("enclosures agree" if kept == {True} else "but enclosures are apart")
        + ", with and without variance. With a learned β ≠ 1 the query keeps (1 − β) of it"
        + (f": outputs move by {min(moved):.3g} or more" if moved else "")
        + f"; those of softmax attention by {min(softmax):.3g} or more",
        table={
            title: [row[i] for row in rows]
            for i, title in enumerate(("β", "variance", "unchanged", "difference, at least"))
        },
        counterexample="" if status == "HOLDS" else _shifted_scores(learned),
        seed=_SEED,
    )


def _beta_one() -> list[Draw]:
    return [replace(draw, beta=Fraction(1)) for draw in draws()]


CLAIMS: Final = (
    Claim(
        id="PD-2a",
        subject=_SUBJECT,
        title="what centring does",
        statement="Centring the keys alone changes nothing, since the scores of a row all move by β q·μ. "
        "Attention-BN without variance, softmax_j((q − βμ)·(k_j − βμ)) v_j with μ the mean key, is softmax "
        "attention with the key bias −β μ·k_j, which centring the queries adds.",
        source=_SOURCE,
        kind="exact",
        check=lambda lab: centring(list(draws(lab.choose(4, 12)))),
        control=lambda _: centring(sign=-1),
    ),
    Claim(
        id="PD-2b",
        subject=_SUBJECT,
        title="a common shift of queries and keys",
        statement="Attention-BN is unchanged when one vector is added to all queries and keys; softmax "
        "attention is not.",
        source=_SOURCE,
        kind="enclosure",
        check=lambda lab: common_shift(list(draws(lab.choose(4, 12)))),
        control=lambda _: common_shift(_beta_one()),
    ),
)
