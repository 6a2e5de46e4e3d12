"""Identities of attention's variants with a softmax: grouped heads, latent keys, rotations, sinks, sparsemax.

Exact: over the rationals a positive function of a logit, 1 + s², stands for e^s where an identity uses of e^s
only that it is a function of the logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.equal_forms import equality, row
from attnproof.properties.forms.base import Array, each, filled
from attnproof.properties.forms.numbers import Dual, generic, rationals, slopes

__all__ = [
    "CLAIMS",
    "SUBJECT",
    "attend",
    "grouped",
    "grouped_gradient",
    "latent",
    "piecewise_linear",
    "projection",
    "rotations",
    "sheet_claim",
    "sinks",
    "sparsemax",
    "turned",
]

SUBJECT: Final = "formula sheet"
_SEED: Final = 601


def attend(q: Array, k: Array, v: Array, *more: tuple[Array, Array]) -> Array:
    """Rows of attention (M, E) of q (M, D), k (N, D), v (N, E), 1 + s² in place of e^s.

    Args:
        more: further pairs of queries and keys whose products add to the logits.
    """
    logits = sum((a @ b.T for a, b in more), q @ k.T)
    weights = logits * logits + 1
    o: Array = (weights @ v) / weights.sum(axis=1)[:, None]
    return o


def grouped(queries: int = 6, keys: int = 2, *, interleaved: bool = False) -> ClaimFinding:
    """Is a group's queries packed against its own key head the same as every head with repeated K and V?

    Args:
        queries: heads of queries; keys: heads of keys and values.
        interleaved: take key head h mod H_kv in place of ⌊h/G⌋ in the repetition.
    """
    rng = np.random.default_rng(_SEED)
    n, group = 4, queries // keys
    q, k, v = generic(rng, queries, n, 3), generic(rng, keys, n, 3), generic(rng, keys, n, 2)
    repeated = [
        attend(q[h], *((x[h % keys if interleaved else h // group]) for x in (k, v))) for h in range(queries)
    ]
    packed = [
        attend(q[g * group : (g + 1) * group].reshape(group * n, 3), k[g], v[g]).reshape(group, n, 2)
        for g in range(keys)
    ]
    return equality(
        [row(f"{queries} heads on {keys}", "packed", np.stack(repeated), [np.concatenate(packed)])],
        seed=_SEED,
        example="H_q = 4, H_kv = 2: head 1 reads key head ⌊1/2⌋ = 0, and not 1 mod 2 = 1",
    )


def grouped_gradient(queries: int = 4, keys: int = 2, *, first_only: bool = False) -> ClaimFinding:
    """Is the derivative by a shared K or V the sum over its group's heads of those by their own copies?

    Args:
        first_only: count the first head of every group alone.
    """
    rng = np.random.default_rng(_SEED)
    n, group, rows = 3, queries // keys, []
    q, k, v = generic(rng, queries, n, 2), generic(rng, keys, n, 2), generic(rng, keys, n, 2)
    along, upstream = generic(rng, keys, n, 2), generic(rng, queries, n, 2)

    def slope(head: int, name: str) -> Any:
        """Derivative of the head's part of the loss along its own copy's direction."""
        g = head // group
        moved = filled((n, 2), map(Dual, {"K": k, "V": v}[name][g].flat, along[g].flat))
        o = attend(q[head], *((moved, v[g]) if name == "K" else (k[g], moved)))
        return (upstream[head] * slopes(o)).sum()

    for name, shared in (("K", k), ("V", v)):
        both = each(lambda pair: Dual(*pair), filled(shared.shape, zip(shared.flat, along.flat, strict=True)))
        total = sum(
            (upstream[h] * slopes(attend(q[h], *pair))).sum()
            for h in range(queries)
            for pair in [
                (both[h // group], v[h // group]) if name == "K" else (k[h // group], both[h // group])
            ]
        )
        copies = sum(slope(h, name) for h in range(queries) if not first_only or h % group == 0)
        rows.append(row(f"derivative by {name}", "sum over the group", total, [copies]))
    return equality(
        rows,
        seed=_SEED,
        example="one key head, two equal query heads: the derivative by K is twice one head's",
    )


def turned(x: Array, units: Array, turns: int) -> Array:
    """Pairs x (…, P, 2) turned ``turns`` times, back if < 0, by rotations ``units`` (P, 2), (cos, sin)."""
    out = x
    for _ in range(abs(turns)):
        a, b, c, s = out[..., 0], out[..., 1], units[:, 0], units[:, 1] * (1 if turns > 0 else -1)
        out = np.stack([a * c - b * s, a * s + b * c], axis=-1)
    return out


def _units(rng: np.random.Generator, count: int) -> Array:
    """Rational points ((1 − t²)/(1 + t²), 2t/(1 + t²)) of the circle (count, 2): (3 + 4i)/5 for t = 1/2."""
    t = generic(rng, count)
    return np.stack([(1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)], axis=-1)


def latent(*, rotated: bool = False) -> ClaimFinding:
    """Is attention on the latents themselves, with W_UK moved to the query and W_UV behind P, the same?

    Args:
        rotated: turn the keys made from the latents by their positions, in place of a key of their own.
    """
    rng = np.random.default_rng(_SEED)
    n, rank, width, own = 5, 3, 4, 2
    c, up_k, up_v = generic(rng, n, rank), generic(rng, rank, width), generic(rng, rank, 3)
    q, q_own, k_own = generic(rng, n, width), generic(rng, n, own), generic(rng, n, own)
    keys = c @ up_k
    if rotated:
        units = _units(rng, width // 2)
        keys = np.stack([turned(x.reshape(-1, 2), units, j).reshape(-1) for j, x in enumerate(keys)])
    plain = attend(q, keys, c @ up_v, (q_own, k_own))
    absorbed = attend(q @ up_k.T, c, c, (q_own, k_own)) @ up_v
    return equality(
        [row(f"rank {rank}, width {width} + {own}", "absorbed", plain, [absorbed])],
        seed=_SEED,
        example="a rotation of c·W_UK by the key's position stands between W_UK and the query: no product of "
        "the two that is the same for all keys takes its place",
    )


def rotations(*, keys_back: bool = False) -> ClaimFinding:
    """Do logits of queries and keys turned by their positions depend on i − j only?

    Args:
        keys_back: turn keys the other way.
    """
    rng = np.random.default_rng(_SEED)
    q, k, units = generic(rng, 2, 2), generic(rng, 2, 2), _units(rng, 2)

    def logit(i: int, j: int) -> Any:
        return (turned(q, units, i) * turned(k, units, -j if keys_back else j)).sum()

    pairs = [(i, j) for i in range(4) for j in range(4)]
    due = filled((len(pairs),), (logit(i, j) for i, j in pairs))
    moved = [filled((len(pairs),), (logit(i + t, j + t) for i, j in pairs)) for t in (1, 2, 3)]
    turn = filled((len(pairs),), ((turned(q, units, i - j) * k).sum() for i, j in pairs))
    return equality(
        [
            row("two rotated pairs", "both positions later", due, moved),
            row("", "q turned by i − j", due, [turn]),
        ],
        seed=_SEED,
        example="q = k = (1, 0), angle (3 + 4i)/5, keys turned back: (i, j) = (0, 0) gives 1, (1, 1) gives "
        "(3/5)² − (4/5)² = −7/25",
    )


def sinks(*, shifted: bool = True) -> ClaimFinding:
    """Is a sink's weight in the denominator one more key with the value 0, whatever constant is subtracted?

    Args:
        shifted: the sink's weight is divided by e^c as the others are; False leaves it.
    """
    rng = np.random.default_rng(_SEED)
    w, v = generic(rng, 4, 5, low=1, high=12), generic(rng, 5, 2)
    rows = []
    for name, sink in (
        ("a sink of its own", generic(rng, 1, low=1)[0]),
        ("off by one: e^0 = 1", flint.fmpq(1)),
    ):
        extra = np.concatenate([w, filled((4, 1), [sink] * 4)], axis=1)
        with_key = extra @ np.concatenate([v, v[:1] * 0]) / extra.sum(axis=1)[:, None]
        constants = generic(rng, 3, low=1)
        found = [
            (w / c @ v) / ((w / c).sum(axis=1) + (sink / c if shifted else sink))[:, None] for c in constants
        ]
        rows.append(row(name, "e^c subtracted", with_key, found))
        missing = 1 - (w / (w.sum(axis=1) + sink)[:, None]).sum(axis=1)
        rows.append(row(name, "what a row lacks of 1", sink / (w.sum(axis=1) + sink), [missing]))
    return equality(
        rows,
        seed=_SEED,
        example="one key of logit m = ln 2, v = 1, sink 0: 2/(2 + 1) = 2/3. After subtracting m with the 1 "
        "left as it is: 1/(1 + 1) = 1/2",
    )


def sparsemax(s: Array) -> Array:
    """[s − τ]₊ of one row with Σ = 1: τ from the largest entries, by sorting."""
    ordered = sorted(s, reverse=True)
    total, tau = flint.fmpq(0), flint.fmpq(0)
    for count, x in enumerate(ordered, 1):
        total += x
        if 1 + count * x > total:
            tau = (total - 1) / count
    return each(lambda x: max(x - tau, flint.fmpq(0)), s)


def _everywhere(s: Array) -> Array:
    """The threshold as if no entry were cut off."""
    tau = (s.sum() - 1) / len(s)
    return each(lambda x: max(x - tau, flint.fmpq(0)), s)


def _shares(s: Array) -> Array:
    """s₊/Σs₊: sparse too, and no linear function on any piece."""
    kept = each(lambda x: max(x, flint.fmpq(0)), s)
    shares: Array = kept / (kept.sum() or flint.fmpq(1))
    return shares


def projection(rows: int, probabilities: Callable[[Array], Array] = sparsemax) -> ClaimFinding:
    """Do the rows meet the conditions of the point of the simplex nearest to s?"""
    rng = np.random.default_rng(_SEED)
    wrong, zeros = [], 0
    for index in range(rows):
        s = rationals(rng, int(rng.integers(1, 7)), low=-9, high=9, denominator=5)
        p = probabilities(s)
        taus = {x - y for x, y in zip(s, p, strict=True) if y > 0}
        least = min(taus, default=flint.fmpq(0))
        below = all(x <= least for x, y in zip(s, p, strict=True) if y == 0)
        zeros += int((p == 0).sum())
        if sum(p) != 1 or len(taus) != 1 or not below or min(p) < 0:
            wrong.append((index, s, p))
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{rows} rational rows of 1 to 6 logits, {zeros} probabilities exactly 0: sum 1, s − p = τ "
        f"where p > 0 and s ≤ τ where p = 0 in all but {len(wrong)}. These are the conditions of Karush, "
        "Kuhn and Tucker for the least ‖p − s‖² over the simplex, sufficient as it is convex. And sorting "
        "finds τ: Σ[s − τ]₊ falls from ∞ to 0 strictly while positive, so one τ gives 1, and with k entries "
        "above it τ is (their sum − 1)/k; 1 + k·s₍ₖ₎ > s₍₁₎ + … + s₍ₖ₎ says that the k-th is above the τ of "
        "the first k, which holds up to that k and not beyond",
        counterexample=f"s = ({', '.join(map(str, wrong[0][1]))}) gives p = "
        f"({', '.join(map(str, wrong[0][2]))}), sum {sum(wrong[0][2])}"
        if wrong
        else "",
        seed=_SEED,
    )


def piecewise_linear(rows: int, probabilities: Callable[[Array], Array] = sparsemax) -> ClaimFinding:
    """Do second differences vanish along random lines inside a piece of constant support?"""
    rng = np.random.default_rng(_SEED)
    supports, wrong = set(), []
    for _ in range(rows):
        s, d = generic(rng, 4, low=-9, high=9, denominator=5), generic(rng, 4)
        step = flint.fmpq(1, 2**20)
        points = [probabilities(s + d * (j * step)) for j in range(3)]
        support = [tuple(bool(x > 0) for x in p) for p in points]
        if len(set(support)) > 1:
            continue
        supports.add(support[0])
        bend = points[0] - 2 * points[1] + points[2]
        if any(bend):
            wrong.append((s, bend))
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{rows} lines through rational points, {len(supports)} supports met: a second difference "
        f"other than 0 on {len(wrong)}. On the piece where the entries of a set A are above τ, τ = (Σ_A s − "
        "1)/|A| is linear in s, and so is p; pieces meet where an entry equals τ",
        counterexample="s = (1, 1) + h·(1, 0), s₊/Σs₊: first entry (1 + h)/(2 + h), not linear in h"
        if wrong
        else "",
        seed=_SEED,
    )


def sheet_claim(
    name: str,
    title: str,
    statement: str,
    source: str,
    kind: str,
    checks: Sequence[Callable[[], ClaimFinding]],
    covers: tuple[str, ...] = (),
) -> Claim:
    """A claim of the formula sheet, its check and its control, which take no laboratory."""
    return Claim(
        id=name,
        subject=SUBJECT,
        title=title,
        statement=statement,
        source=source,
        kind=kind,
        check=lambda _: checks[0](),
        control=lambda _: checks[1](),
        covers=covers,
    )


CLAIMS: Final = (
    sheet_claim(
        "SHEET-1a",
        "heads that share keys",
        "Grouped-query attention, query head h on key head ⌊h/G⌋, equals attention of as many heads with K "
        "and V repeated G times.",
        "Ainslie et al., arXiv 2305.13245, section 2.2",
        "exact",
        (grouped, lambda: grouped(interleaved=True)),
    ),
    sheet_claim(
        "SHEET-1b",
        "gradients of shared keys",
        "dK and dV of a shared head are the sums over its G query heads of those of the repeated copies.",
        "derived from arXiv 2305.13245, section 2.2",
        "exact",
        (grouped_gradient, lambda: grouped_gradient(first_only=True)),
    ),
    sheet_claim(
        "SHEET-2",
        "latent keys absorbed",
        "Multi-head latent attention with q·W_UKᵀ against the latents c, and W_UV after the weighted sum of "
        "c, equals attention on k = cW_UK and v = cW_UV; the rotated key is one of its own beside them.",
        "DeepSeek-V2, arXiv 2405.04434, section 2.1.2 (recalled)",
        "exact",
        (latent, lambda: latent(rotated=True)),
    ),
    sheet_claim(
        "SHEET-3",
        "rotary positions",
        "With pairs of q_i turned by iθ and of k_j by jθ the logit depends on i − j only.",
        "Su et al., arXiv 2104.09864, section 3.2",
        "exact",
        (rotations, lambda: rotations(keys_back=True)),
    ),
    sheet_claim(
        "SHEET-4",
        "a sink is one more key",
        "e^sink added to the denominator equals one more key with that logit and the value 0, with any "
        "constant subtracted from all logits, the sink's too; the row then sums to 1 less the sink's weight, "
        "and sink = 0 is softmax off by one.",
        "gpt-oss and FlashAttention's learnable sink; Xiao et al., arXiv 2309.17453, section 3.3",
        "exact",
        (sinks, lambda: sinks(shifted=False)),
    ),
    sheet_claim(
        "SHEET-5a",
        "sparsemax is a projection",
        "Sparsemax, [s − τ]₊ with τ by sorting, is the point of the simplex nearest to s.",
        "Martins and Astudillo, arXiv 1602.02068, section 2.1 (recalled)",
        "exact",
        (lambda: projection(200), lambda: projection(50, _everywhere)),
    ),
    sheet_claim(
        "SHEET-5b",
        "sparsemax is piecewise linear",
        "Sparsemax is linear in s wherever the set of its entries above 0 stays the same.",
        "Martins and Astudillo, arXiv 1602.02068, section 2.2 (recalled)",
        "exact",
        (lambda: piecewise_linear(60), lambda: piecewise_linear(20, _shares)),
    ),
)
