"""Claims about retention: equal forms, the rotation, normalised scores under a norm, its decays in floats.

Sun et al., arXiv 2307.08621. Equality is over the rationals, or the Gaussian rationals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np
import torch

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.equal_forms import LENGTH, compared, equality, row
from attnproof.properties.forms import gated
from attnproof.properties.forms.base import Array, each
from attnproof.properties.forms.numbers import Gaussian, generic, rationals

__all__ = ["CLAIMS", "decays_below_one", "equal_forms", "invariance", "normed", "rotation"]

_SOURCE = "Sun et al. 2023, arXiv 2307.08621, section 2"


def equal_forms(length: int = LENGTH, *, late: int = 0) -> ClaimFinding:
    """Recurrence, parallel form and chunks at a random γ in [1/9, 8/9).

    Args:
        late: give the parallel form γ^(i − j + late) in place of γ^(i−j).
    """
    rng = np.random.default_rng(12)
    q, k, v = (generic(rng, length, width) for width in (4, 4, 3))
    gamma = generic(rng, 1, low=1, high=8, denominator=9)[0]
    constant = np.full((length, 1), gamma, dtype=object)

    def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
        x, y, z = q[piece], k[piece], v[piece]
        if isinstance(form, int):
            return gated.retention_chunkwise(x, y, z, gamma, state, chunk=form)
        return gated.recurrent(x, y, z, gated.gates(constant[piece]), state)

    rows = compared("random γ", run, length, parallel=False)
    reference = gated.recurrent(q, k, v, gated.gates(constant))[0]
    weighted = gated.retention_parallel(q, k, v, gamma) * gamma**late
    rows.append(row("random γ", "parallel", reference, [weighted]))
    return equality(rows, seed=12, example="N = 1: o_1 = (q_1·k_1)v_1 has no decay; γ^1 would scale it by γ.")


def rotation(length: int = 9, *, conjugate: bool = True) -> ClaimFinding:
    """The recurrence with γe^(iθ) against rotated queries and keys with γ alone.

    e^(iθ) = (1 − s² + 2si)/(1 + s²) for a random s = tan(θ/2), γ random too.

    Args:
        conjugate: rotate keys the other way than queries, as they must be.
    """
    rng = np.random.default_rng(17)
    s, gamma = generic(rng, 1)[0], generic(rng, 1, low=1, high=8, denominator=9)[0]
    turn = Gaussian((1 - s * s) / (1 + s * s), 2 * s / (1 + s * s))
    back = Gaussian(turn.re, -turn.im) if conjugate else turn
    q, k, v = (each(Gaussian, generic(rng, length, width)) for width in (3, 3, 2))
    one = Gaussian(flint.fmpq(1))
    turned = np.full((length, 1), turn * gamma, dtype=object)
    plain = np.full((length, 1), one * gamma, dtype=object)

    def rotated(x: Array, by: Gaussian) -> Array:
        powers = np.multiply.accumulate(np.full((length, 1), by, dtype=object), axis=0)
        return x * powers

    reference = gated.recurrent(q, k, v, gated.gates(turned))[0]
    found = gated.recurrent(rotated(q, turn), rotated(k, back), v, gated.gates(plain))[0]
    return equality(
        [row("random θ", "rotated queries and keys", reference, [found])],
        seed=17,
        example="q_1 = k_1 = v_1 = 1: o_1 = 1 without a rotation between position 1 and itself; rotating "
        "both by e^(iθ) = (3 + 4i)/5 gives ((3 + 4i)/5)² = (−7 + 24i)/25.",
    )


def normed(o: Array, square: Array, epsilon: Any, groups: int) -> Array:
    """RMSNorm of c·o over ``groups`` equal parts of each row: its squares, with signs, which are rational.

    Args:
        o: (N, E); square: c² > 0, (N, E).
    """
    scaled = (o * o * square).reshape(len(o), groups, -1)
    mean = scaled.sum(axis=2, keepdims=True) / scaled.shape[2]
    signs = each(lambda x: 1 if x > 0 else -1, o)
    found: Array = signs * (scaled / (mean + epsilon)).reshape(o.shape)
    return found


def _retained(length: int, heads: int) -> tuple[Array, dict[str, Array]]:
    """Outputs (N, heads·4), γ = 1 − 2^(−5−h), and for each normalisation its squared scalars, so too."""
    rng, width, one = np.random.default_rng(18), 4, flint.fmpq(1)
    outs: list[Array] = []
    squares: dict[str, list[Array]] = {"1/√d": [], "1/√(ΣD)": [], "1/max(|ΣR|, 1)": []}
    for h in range(heads):
        gamma = 1 - flint.fmpq(1, 2 ** (5 + h))
        q, k, v = (rationals(rng, length, width) / 4 for _ in range(3))
        outs.append(gated.retention_parallel(q, k, v, gamma))
        decay = np.array([[gamma ** abs(i - j) for j in range(length)] for i in range(length)], dtype=object)
        scores, mass = np.tril(q @ k.T * decay), np.tril(decay).sum(axis=1)
        floor = abs(scores.sum(axis=1))
        floor[floor < 1] = one
        squares["1/√d"].append(np.full(length, one / width, dtype=object))
        squares["1/√(ΣD)"].append(one / mass)
        squares["1/max(|ΣR|, 1)"].append(one / (floor * floor))
    return np.concatenate(outs, axis=1), {
        name: np.repeat(np.array(found, dtype=object).T, width, axis=1) for name, found in squares.items()
    }


def invariance(
    length: int = 7, epsilons: Sequence[Any] = (0, flint.fmpq(1, 10**5)), *, across_heads: bool = True
) -> ClaimFinding:
    """Do the three normalisations of scores change the output after RMSNorm? For each ε, a head, all heads.

    Args:
        across_heads: also norm all heads of a row at once, in place of each by itself.
    """
    heads, rows = 2, []
    o, squares = _retained(length, heads)
    ways = {"each head": heads, **({"all heads at once": 1} if across_heads else {})}
    for (way, groups), epsilon in ((pair, e) for pair in ways.items() for e in epsilons):
        for name, square in squares.items():
            plain = normed(o, 0 * o + 1, epsilon, groups)
            found = normed(o, square, epsilon, groups)
            rows.append((way, str(epsilon), name, float(max(abs(found - plain).flat))))
    equal = {(r[0], r[1]): True for r in rows}
    for r in rows:
        equal[r[:2]] = equal[r[:2]] and r[3] == 0.0
    holds = [f"{way}, ε = {epsilon}" for (way, epsilon), same in equal.items() if same]
    fails = [f"{way}, ε = {epsilon}" for (way, epsilon), same in equal.items() if not same]
    titles = ("norm over", "ε", "normalisation", "largest change of a square")
    return ClaimFinding(
        status="HOLDS" if not fails else "CONDITIONAL" if holds else "REFUTED",
        evidence=f"squares of the normed outputs of {length} rows and {heads} heads, exactly: no change for "
        + ("; ".join(holds) or "none")
        + (". Changed for: " + "; ".join(fails) if fails else ""),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=""
        if not fails
        else "ε: o = (0.003, 0.004) has mean square 1.25e-5; with ε = 1e-5 the squares are 9e-6/2.25e-5 = "
        "2/5 and 32/45. Scaled by c = 1/8 (1/√d at d = 64), mean square 1.953125e-7: "
        "1.40625e-7/1.01953125e-5 = 4/290. Heads: o = (1 | 1), head 2 scaled by 1/2: normed over both at "
        "once its square is 1/4 over 5/8 = 2/5, not 1. Condition: ε = 0 (or far below the mean square), each "
        "head normed by itself, scalars positive.",
        seed=18,
    )


def _gamma(h: int) -> torch.Tensor:
    return torch.tensor(1.0 - 2.0 ** (-5 - h), dtype=torch.float64)


def decays_below_one(
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16"), heads: int = 16
) -> ClaimFinding:
    """Is γ_h = 1 − 2^(−5−h) below 1 and different for all heads as stored in these formats?"""
    rows, examples = [], []
    for name in dtypes:
        stored = [float(_gamma(h).to(getattr(torch, name)).double()) for h in range(heads)]
        first = next((h for h, x in enumerate(stored) if x >= 1.0), heads)
        repeated = heads - len(set(stored))
        rows.append((name, first, repeated, first == heads and not repeated))
        if first < heads:
            examples.append(
                f"{name}: head {first}, γ = 1 − 2^-{5 + first}, half-way between 1 and the number below it, "
                "rounds to 1: nothing is forgotten"
            )
    good = [r[0] for r in rows if r[3]]
    titles = ("format", "first head with γ = 1", "heads with another's γ", "as stated")
    return ClaimFinding(
        status="HOLDS" if len(good) == len(rows) else "CONDITIONAL" if good else "REFUTED",
        evidence=f"{heads} heads: "
        + "; ".join(
            f"{r[0]}: " + ("all below 1 and different" if r[3] else f"γ = 1 from head {r[1]} on")
            for r in rows
        ),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample="; ".join(examples),
    )


CLAIMS: Final = (
    Claim(
        id="RET-1a",
        subject="retention",
        title="equal forms",
        statement="RetNet's recurrence S_t = γS_{t−1} + k_t v_tᵀ, its parallel form (QKᵀ ∘ D)V with D_ij = "
        "γ^(i−j) and its chunkwise form, O = (QKᵀ ∘ D)V + diag(γ^(i+1))QS, S ← γ^B S + Kᵀdiag(γ^(B−1−j))V, "
        "are equal.",
        source=_SOURCE + ".1 and 2.3",
        kind="exact",
        check=lambda lab: equal_forms(lab.choose(11, 37)),
        control=lambda lab: equal_forms(7, late=1),
    ),
    Claim(
        id="RET-1b",
        subject="retention",
        title="normalised scores under a norm",
        statement="Dividing the scores by √d, by the roots of D's row sums and by max(|row sum|, 1) does not "
        "change the output after the norm of the heads.",
        source=_SOURCE + ".4",
        kind="exact",
        check=lambda lab: invariance(lab.choose(7, 15)),
        control=lambda lab: invariance(5, (0,), across_heads=False),
    ),
    Claim(
        id="RET-1c",
        subject="retention",
        title="rotation",
        statement="The recurrence with the complex decay γe^(iθ) is retention with γ on queries q_n e^(inθ) "
        "and keys k_m e^(−imθ).",
        source=_SOURCE + ".1, equations 3 to 5",
        kind="exact",
        check=lambda lab: rotation(lab.choose(7, 19)),
        control=lambda lab: rotation(5, conjugate=False),
    ),
    Claim(
        id="RET-1d",
        subject="retention",
        title="decays of the heads in floats",
        statement="The decays γ_h = 1 − 2^(−5−h) of up to 16 heads are different and below 1 (as stored in "
        "the activations' format).",
        source=_SOURCE + ".2; formats derived",
        kind="exact",
        check=lambda lab: decays_below_one(),
        control=lambda lab: decays_below_one(("float64",)),
    ),
)
