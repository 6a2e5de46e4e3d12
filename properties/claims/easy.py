"""Claims about easy attention, whose scores are learned and not computed from queries and keys.

Scores and values are small integers, so that the oracle's results are exact and are compared bit for bit;
ranks are exact or proved in Arb.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import flint
import torch

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.batch_normalised import agree, apart, outputs

__all__ = [
    "CLAIMS",
    "frozen_softmax",
    "generators",
    "linearity",
    "permutations",
    "product_ranks",
    "rank",
    "ranks",
    "stack",
]

Map = Callable[[torch.Tensor], torch.Tensor]

_BITS = 256
_SEED = 1


def _integers(*shape: int, seed: int) -> torch.Tensor:
    """Integers from −4 to 4 in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).double()


def _easy(alpha: torch.Tensor, v: torch.Tensor, band: int | None = None) -> torch.Tensor:
    """The family's output for α (H, S, S) and v (B, H, S, E), where it is an exact float64 number."""
    found = outputs("easy", alpha, v, band=band, arithmetic="arb")
    if bool(found.radius.any()):
        raise ArithmeticError("easy attention of small integers is not exact; choose smaller ones")
    return found.value


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def linearity(length: int = 8, after: Map = _unchanged) -> ClaimFinding:
    """Is the output linear in V, and in α, with no term that mixes them otherwise?

    Args:
        length: S.
        after: applied to the output; a ReLU breaks superposition.
    """
    alpha, other = (_integers(2, length, length, seed=seed) for seed in (1, 2))
    v, w = (_integers(1, 2, length, 3, seed=seed) for seed in (3, 4))

    def of(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return after(_easy(a, x, band))

    rows = []
    for band in (None, 1):
        by_values = 2 * of(alpha, v) - 3 * of(alpha, w)
        by_scores = 2 * of(alpha, v) - 3 * of(other, v)
        rows.append((str(band), "V", torch.equal(of(alpha, 2 * v - 3 * w), by_values)))
        rows.append((str(band), "α", torch.equal(of(2 * alpha - 3 * other, v), by_scores)))
    good = all(row[2] for row in rows)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"f(2x − 3y) = 2f(x) − 3f(y) bit for bit in {sum(row[2] for row in rows)} of {len(rows)} "
        "exact comparisons of integers",
        table={title: [row[i] for row in rows] for i, title in enumerate(("band", "linear in", "exact"))},
        counterexample="" if good else "f(2x − 3y) differs from 2f(x) − 3f(y) in " + str(rows),
        seed=_SEED,
    )


def frozen_softmax(length: int = 8, width: int = 4, *, other: bool = False) -> ClaimFinding:
    """Does α = P give softmax attention? Within what P's own enclosure leaves open.

    Args:
        length: S; width: D.
        other: freeze the P of other inputs, the same queries in reverse order.
    """
    q, k = (_integers(1, 1, length, width, seed=seed) for seed in (5, 6))
    v = _integers(1, 1, length, 3, seed=7)
    scale = 1.0 / width
    frozen = q.flip(2) if other else q
    p = outputs("softmax_rows", frozen @ k.mT * scale)
    easy, softmax = outputs("easy", p.value[0], v), outputs("softmax", q, k, v, scale=scale)
    widened = Enclosure(easy.value, easy.radius + p.radius @ v.abs())
    reverse = outputs("softmax", q.flip(2), k, v, scale=scale)
    good = agree(widened, softmax)
    radius = float((widened.radius + softmax.radius).max())
    gap = apart(widened, softmax)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=("enclosures agree" if good else f"enclosures are apart by {gap:.3g}")
        + f" to {radius:.1g}; with the queries in reverse order softmax attention differs from the same α by "
        f"{apart(widened, reverse):.3g}",
        table={"row": list(range(length)), "largest radius": widened.radius.amax(-1).flatten().tolist()},
        counterexample="" if good else f"an output differs by {gap:.6g} at least",
        seed=_SEED,
    )


def generators(length: int) -> tuple[torch.Tensor, ...]:
    """A swap of two tokens and a cycle of all of them, which generate every permutation."""
    swap = torch.arange(length)
    swap[:2] = torch.tensor([1, 0])
    return swap, torch.arange(length).roll(1)


def permutations(length: int = 6, alpha: torch.Tensor | None = None) -> ClaimFinding:
    """Do permuted tokens give permuted outputs? Where α = aI + b·11ᵀ only.

    Args:
        length: S.
        alpha: scores (1, S, S) that take the place of learned ones.
    """
    learned = _integers(1, length, length, seed=10) if alpha is None else alpha
    v, q = _integers(1, 1, length, 3, seed=9), _integers(1, 1, length, 4, seed=11)
    symmetric = 3 * torch.eye(length, dtype=torch.float64)[None] + 2
    found: dict[str, list[bool]] = {}
    for order in generators(length):
        moved = v[:, :, order]
        relabelled = learned[:, order][:, :, order]
        expected = _easy(learned, v)[:, :, order]
        before = outputs("softmax", q, q, v, scale=0.25)
        after = outputs("softmax", q[:, :, order], q[:, :, order], moved, scale=0.25)
        permuted = Enclosure(before.value[:, :, order], before.radius[:, :, order])
        for name, same in (
            ("α learned", torch.equal(_easy(learned, moved), expected)),
            ("α permuted alike", torch.equal(_easy(relabelled, moved), expected)),
            ("α = 3I + 2·11ᵀ", torch.equal(_easy(symmetric, moved), _easy(symmetric, v)[:, :, order])),
            ("softmax attention", agree(permuted, after)),
        ):
            found.setdefault(name, []).append(same)
    rows = [(name, all(same)) for name, same in found.items()]
    return ClaimFinding(
        status="HOLDS" if rows[0][1] else "REFUTED",
        evidence="a swap and a cycle, which generate all permutations of the tokens, permute the output: "
        + ", ".join(f"{name} {'yes' if same else 'no'}" for name, same in rows)
        + f". α belongs to positions, and to one length, {length} here",
        table={"scores": [row[0] for row in rows], "equivariant": [row[1] for row in rows]},
        counterexample="" if rows[0][1] else _two_tokens(),
        seed=_SEED,
    )


def _two_tokens() -> str:
    alpha = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    v = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 1, 2, 1)
    before, after = (_easy(alpha, x).flatten().int().tolist() for x in (v, v.flip(2)))
    return (
        f"α = ((1, 0), (0, 0)): tokens (1, 2) give {tuple(before)}; swapped, (2, 1), they give "
        f"{tuple(after)}, "
        f"where equivariance asks for {tuple(before[::-1])}."
    )


def stack(length: int = 5, between: Map = _unchanged) -> ClaimFinding:
    """Are layers without a feed-forward network one matrix for each head?

    Args:
        length: S.
        between: applied between layers; a ReLU keeps two layers from being one.
    """
    first, second, third = (_integers(2, length, length, seed=seed) for seed in (15, 16, 17))
    v = _integers(1, 2, length, 3, seed=18)
    eye = torch.eye(length, dtype=torch.float64)
    rows = []
    for residual in (False, True):
        x = v
        for alpha in (first, second, third):
            x = between(_easy(alpha + eye if residual else alpha, x))
        one, two, three = (alpha + eye if residual else alpha for alpha in (first, second, third))
        rows.append((residual, torch.equal(x, _easy(three @ two @ one, v))))
    good = all(same for _, same in rows)
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"three layers of two heads, S = {length}, against one layer with the product of their "
        "matrices: "
        + ", ".join(
            f"{'with' if r else 'without'} residual {'equal' if s else 'different'}" for r, s in rows
        ),
        table={"residual": [r for r, _ in rows], "equal": [s for _, s in rows]},
        counterexample="" if good else "three layers differ from the layer of the product: " + str(rows),
        seed=_SEED,
    )


def rank(matrix: torch.Tensor) -> int:
    """Rank of an integer matrix (M, N), exactly."""
    return int(flint.fmpz_mat([[int(x) for x in row] for row in matrix.tolist()]).rank())


def _exponential(x: flint.arb) -> flint.arb:
    return x.exp()


def ranks(
    length: int = 24, width: int = 4, weight: Callable[[flint.arb], flint.arb] = _exponential
) -> ClaimFinding:
    """May α have full rank where QKᵀ has rank ≤ d_k? It stands where P does, of full rank too.

    Args:
        length: S; width: d_k.
        weight: of a score, before rows are divided by their sums; the identity has no more rank than QKᵀ.
    """
    q, k = (_integers(length, width, seed=seed) for seed in (12, 13))
    scores = q @ k.T
    alpha = _integers(length, length, seed=14)
    low, learned = rank(scores), rank(alpha)
    with _precision(_BITS):
        # P is weight(scores) with rows divided by positive numbers.
        determinant = flint.arb_mat(
            [[weight(flint.arb(x / width)) for x in row] for row in scores.tolist()]
        ).det()
        full = not determinant.contains(0)
    if low > width or learned < length:
        status = "REFUTED"
    else:
        status = "CONDITIONAL" if full else "SUPPORTED"
    return ClaimFinding(
        status=status,
        evidence=f"S = {length}, d_k = {width}: rank QKᵀ = {low}, rank α = {learned}, both exact. But α "
        "takes the place of P and not of QKᵀ, and "
        + (
            f"P = softmax(QKᵀ/{width}) has full rank here too: its determinant is proved not to be 0"
            if full
            else "the determinant of the matrix of weights could not be told from 0"
        ),
        table={
            "matrix": ["QKᵀ", "α", *(["P"] if full else [])],
            "rank": [low, learned, *([length] if full else [])],
        },
        counterexample=_rank_two() if full else "",
        seed=_SEED,
    )


def _rank_two() -> str:
    with _precision(_BITS):
        e = flint.arb(1).exp()
        determinant = (e - 1) / (2 * (1 + e))
    return (
        "d_k = 1, queries 0 and 1, keys 0 and 1: QKᵀ = ((0, 0), (0, 1)) has rank 1. "
        "P = ((1/2, 1/2), (1/(1 + e), e/(1 + e))) has determinant "
        f"(e − 1)/(2(1 + e)) = {determinant.str(6)}, so rank 2 = S."
    )


def product_ranks(
    length: int = 12, widths: tuple[int, ...] = (1, 2, 4), *, square: bool = False
) -> ClaimFinding:
    """Is rank(QKᵀ) ≤ d_k, exactly?

    Args:
        length: S; widths: d_k.
        square: square each entry, which is no product of matrices of width d_k any more.
    """
    rows = []
    for width in widths:
        q, k = (_integers(length, width, seed=seed) for seed in (19, 20))
        scores = q @ k.T
        rows.append((width, rank(scores * scores if square else scores)))
    over = [row for row in rows if row[1] > row[0]]
    return ClaimFinding(
        status="REFUTED" if over else "HOLDS",
        evidence=f"S = {length}: "
        + ", ".join(f"d_k = {width}: rank {found}" for width, found in rows)
        + ", of integer matrices exactly; a product through d_k dimensions has no more rank than d_k",
        table={"d_k": [row[0] for row in rows], "rank": [row[1] for row in rows]},
        counterexample=f"d_k = {over[0][0]} has rank {over[0][1]}" if over else "",
        seed=_SEED,
    )


_SUBJECT = "easy attention"
_SOURCE = "Sanchis-Agudo et al., arXiv 2308.12874{}"

CLAIMS: Final = (
    Claim(
        id="EASY-2a",
        subject=_SUBJECT,
        title="superposition",
        statement="Easy attention α·V is linear in its values and in its scores, dense or banded: "
        "superposition "
        "is exact.",
        source=_SOURCE.format(", definition"),
        kind="exact",
        check=lambda lab: linearity(lab.choose(8, 24)),
        control=lambda _: linearity(after=torch.relu),
    ),
    Claim(
        id="EASY-2b",
        subject=_SUBJECT,
        title="a frozen softmax",
        statement="Softmax attention with its weights P held fixed is easy attention with α = P and W_V = I; "
        "other inputs have another P, which α does not follow.",
        source=_SOURCE.format(", derived from the definition"),
        kind="enclosure",
        check=lambda lab: frozen_softmax(lab.choose(8, 24)),
        control=lambda _: frozen_softmax(other=True),
    ),
    Claim(
        id="EASY-2c",
        subject=_SUBJECT,
        title="permuted tokens",
        statement="Easy attention is permutation-equivariant, as softmax attention without positions is.",
        source=_SOURCE.format(", where it stands for self-attention"),
        kind="exact",
        check=lambda lab: permutations(lab.choose(6, 12)),
        control=lambda _: permutations(alpha=torch.ones(1, 6, 6, dtype=torch.float64)),
    ),
    Claim(
        id="EASY-2d",
        subject=_SUBJECT,
        title="a stack without feed-forward networks",
        statement="Layers of easy attention with nothing between them, residual connections or not, are one "
        "layer "
        "whose matrix for a head is the product of that head's matrices.",
        source=_SOURCE.format(", derived from the definition"),
        kind="exact",
        check=lambda lab: stack(lab.choose(5, 12)),
        control=lambda _: stack(between=torch.relu),
    ),
    Claim(
        id="EASY-3a",
        subject=_SUBJECT,
        title="rank of QKᵀ",
        statement="The scores QKᵀ of softmax attention have rank d_k at most.",
        source=_SOURCE.format(", singular value decomposition of scores"),
        kind="exact",
        check=lambda lab: product_ranks(lab.choose(12, 32)),
        control=lambda _: product_ranks(square=True),
    ),
    Claim(
        id="EASY-3b",
        subject=_SUBJECT,
        title="rank of the scores that α takes the place of",
        statement="Learned scores α may have any rank up to S, where those of softmax attention have rank "
        "d_k "
        "at most.",
        source=_SOURCE.format(", singular value decomposition of softmax scores"),
        kind="enclosure",
        check=lambda lab: ranks(lab.choose(24, 40)),
        control=lambda _: ranks(weight=lambda x: x),
    ),
)
