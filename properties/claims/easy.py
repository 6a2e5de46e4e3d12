"""Claims about easy attention, whose scores are learned and not computed. Theory.md EASY-1 to EASY-3.

Scores and values are small integers, so that the oracle's results are exact and are compared bit for bit;
ranks are exact or proved in Arb.
"""

from __future__ import annotations

import flint
import torch

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.claims.batch_normalised import agree, apart, outputs

__all__ = ["findings", "frozen_softmax", "linearity", "permutations", "rank", "ranks"]

_SOURCE = "Sanchis-Agudo et al. 2023, arXiv 2308.12874 (theory.md {})"
_BITS = 256


def _integers(*shape: int, seed: int) -> torch.Tensor:
    """Integers from −4 to 4 in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


def _easy(alpha: torch.Tensor, v: torch.Tensor, band: int | None) -> torch.Tensor:
    """The family's output, where it is an exact float64 number."""
    found = outputs("easy", alpha, v, band=band, arithmetic="arb")
    if bool(found.radius.any()):
        raise ArithmeticError("easy attention of small integers is not exact; choose smaller ones")
    return found.value


def linearity(length: int = 8) -> ClaimFinding:
    """Is the output linear in V, and in α, with no term that mixes them otherwise?"""
    alpha, other = (_integers(2, length, length, seed=seed) for seed in (1, 2))
    v, w = (_integers(1, 2, length, 3, seed=seed) for seed in (3, 4))
    rows = []
    for band in (None, 1):
        by_values = 2 * _easy(alpha, v, band) - 3 * _easy(alpha, w, band)
        by_scores = 2 * _easy(alpha, v, band) - 3 * _easy(other, v, band)
        rows.append((str(band), "V", torch.equal(_easy(alpha, 2 * v - 3 * w, band), by_values)))
        rows.append((str(band), "α", torch.equal(_easy(2 * alpha - 3 * other, v, band), by_scores)))
    good = all(row[2] for row in rows)
    return ClaimFinding(
        name="easy attention: superposition",
        status="HOLDS" if good else "REFUTED",
        statement="Easy attention is linear in its values and in its scores, dense or banded: superposition "
        "is exact.",
        source=_SOURCE.format("EASY-2"),
        evidence=f"f(2x − 3y) = 2f(x) − 3f(y) bit for bit in {sum(row[2] for row in rows)} of {len(rows)} "
        "exact comparisons",
        table={title: [row[i] for row in rows] for i, title in enumerate(("band", "linear in", "exact"))},
    )


def frozen_softmax(length: int = 8, width: int = 4) -> ClaimFinding:
    """Does α = P give softmax attention? Within what P's own enclosure leaves open."""
    q, k = (_integers(1, 1, length, width, seed=seed) for seed in (5, 6))
    v = _integers(1, 1, length, 3, seed=7)
    scale = 1.0 / width
    p = outputs("softmax_rows", q @ k.mT * scale)
    easy, softmax = outputs("easy", p.value[0], v), outputs("softmax", q, k, v, scale=scale)
    widened = Enclosure(easy.value, easy.radius + p.radius @ v.abs())
    other = outputs("softmax", q.flip(2), k, v, scale=scale)
    good = agree(widened, softmax)
    radius = float((widened.radius + softmax.radius).max())
    return ClaimFinding(
        name="easy attention: a frozen softmax",
        status="HOLDS" if good else "REFUTED",
        statement="Softmax attention with its weights P held fixed is easy attention with α = P; other "
        "inputs have another P, which α does not follow.",
        source=_SOURCE.format("EASY-2"),
        evidence=("enclosures agree" if good else "enclosures are apart")
        + f" to {radius:.1g}; with the queries in reverse order softmax attention differs from the same α by "
        f"{apart(widened, other):.3g}",
        table={"row": list(range(length)), "largest radius": widened.radius.amax(-1).flatten().tolist()},
    )


def permutations(length: int = 6) -> ClaimFinding:
    """Do permuted tokens give permuted outputs? Where α = aI + b·11ᵀ only."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(8))
    v, alpha = _integers(1, 1, length, 3, seed=9), _integers(1, length, length, seed=10)
    symmetric = 3 * torch.eye(length, dtype=torch.float64)[None] + 2
    relabelled = alpha[:, order][:, :, order]
    rows = [
        ("α learned", torch.equal(_easy(alpha, v[:, :, order], None), _easy(alpha, v, None)[:, :, order])),
        (
            "α permuted alike",
            torch.equal(_easy(relabelled, v[:, :, order], None), _easy(alpha, v, None)[:, :, order]),
        ),
        (
            "α = 3I + 2·11ᵀ",
            torch.equal(_easy(symmetric, v[:, :, order], None), _easy(symmetric, v, None)[:, :, order]),
        ),
    ]
    q = _integers(1, 1, length, 4, seed=11)
    before = outputs("softmax", q, q, v, scale=0.25)
    after = outputs("softmax", q[:, :, order], q[:, :, order], v[:, :, order], scale=0.25)
    permuted = Enclosure(before.value[:, :, order], before.radius[:, :, order])
    rows.append(("softmax attention", agree(permuted, after)))
    expected = [False, True, True, True]
    return ClaimFinding(
        name="easy attention: permuted tokens",
        status="REFUTED" if [row[1] for row in rows] == expected else "OPEN",
        statement="Easy attention is permutation-equivariant, as softmax attention without positions is.",
        source=_SOURCE.format("EASY-2"),
        evidence="a permutation of the tokens permutes the output: "
        + ", ".join(f"{name} {'yes' if same else 'no'}" for name, same in rows)
        + f". α belongs to positions, and to one length, {length} here",
        table={"scores": [row[0] for row in rows], "equivariant": [row[1] for row in rows]},
    )


def rank(matrix: torch.Tensor) -> int:
    """Rank of an integer matrix (M, N), exactly."""
    return int(flint.fmpz_mat([[int(x) for x in row] for row in matrix.tolist()]).rank())


def ranks(length: int = 24, width: int = 4) -> ClaimFinding:
    """May α have full rank where QKᵀ has rank ≤ d_k? It stands where P does, of full rank too."""
    q, k = (_integers(length, width, seed=seed) for seed in (12, 13))
    scores = q @ k.T
    alpha = _integers(length, length, seed=14)
    low, learned = rank(scores), rank(alpha)
    with _precision(_BITS):
        # P is exp(scores) with rows divided by positive numbers.
        determinant = flint.arb_mat(
            [[flint.arb(x / width).exp() for x in row] for row in scores.tolist()]
        ).det()
        full = not determinant.contains(0)
    if low > width or learned < length:
        status = "REFUTED"
    else:
        status = "CONDITIONAL" if full else "SUPPORTED"
    return ClaimFinding(
        name="easy attention: rank of the scores",
        status=status,
        statement="Learned scores may have any rank up to S, where those of softmax attention have rank d_k "
        "at most.",
        source=_SOURCE.format("EASY-2, EASY-3"),
        evidence=f"S = {length}, d_k = {width}: rank QKᵀ = {low}, rank α = {learned}, both exact. But α "
        "takes the place of P and not of QKᵀ, and "
        + (
            f"P = softmax(QKᵀ/{width}) has full rank here too: its determinant is proved not to be 0"
            if full
            else f"the determinant of softmax(QKᵀ/{width}) could not be told from 0"
        ),
        table={
            "matrix": ["QKᵀ", "α", *(["P"] if full else [])],
            "rank": [low, learned, *([length] if full else [])],
        },
    )


def findings() -> list[ClaimFinding]:
    """All findings, as every run shows them."""
    return [linearity(), frozen_softmax(), permutations(), ranks()]
