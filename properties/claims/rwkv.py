"""Claims about RWKV: version 4 as a softmax, version 6's read before the decay, version 7's transition.

Peng et al., arXiv 2305.13048, 2404.05892, 2503.14456. Exponentials are given as numbers, so that equality is
over the rationals.
"""

from __future__ import annotations

from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.equal_forms import LENGTH, Row, compared, equality, row
from attnproof.properties.claims.gated_linear import gated_run, gates
from attnproof.properties.forms import delta, gated
from attnproof.properties.forms.base import Array, start
from attnproof.properties.forms.numbers import generic

__all__ = [
    "CLAIMS",
    "as_delta_rule",
    "as_gla",
    "as_softmax",
    "bonus_forms",
    "finite_in_float32",
    "one_decay_off",
    "rwkv4_recurrent",
    "rwkv4_weights",
    "rwkv7_recurrent",
    "rwkv7_transition",
]


def rwkv4_recurrent(k: Array, v: Array, w: Any, u: Any) -> Array:
    """RWKV-4's stabilised recurrence of one channel, with exponentials as numbers. o (N,).

    State a/E, b/E and E = e^ε: τ = max(u + k, ε) becomes T = max(UK, E), ε' = max(w + ε, k) E' = max(WE, K).

    Args:
        k: K = e^k > 0, (N,); v: (N,); w: W = e^w, the decay; u: U = e^u, the bonus.
    """
    a, b, E, o = 0 * v[0], 0 * v[0], 0 * k[0], np.empty_like(v)
    for t in range(len(v)):
        T = max(u * k[t], E)
        old, own = E / T, u * k[t] / T
        o[t] = (old * a + own * v[t]) / (old * b + own)
        after = max(w * E, k[t])
        kept, added = w * E / after, k[t] / after
        a, b, E = kept * a + added * v[t], kept * b + added, after
    return o


def rwkv4_weights(k: Array, w: Any, u: Any, *, late: int = 0) -> Array:
    """Softmax over the logits k_s + (t − 1 − s)w of s < t and k_t + u, (N, N), exponentials as above.

    Args:
        late: decays too many on the past.
    """
    n = len(k)
    weights = np.zeros((n, n), dtype=object)
    for t in range(n):
        for s in range(t):
            weights[t, s] = k[s] * w ** (t - 1 - s + late)
        weights[t, t] = u * k[t]
    table: Array = weights / weights.sum(axis=1)[:, None]
    return table


def as_softmax(length: int = LENGTH, *, late: int = 0) -> ClaimFinding:
    """The stabilised recurrence against explicit softmax weights, for several decays and bonuses."""
    rng, rows = np.random.default_rng(31), list[Row]()
    for name, w, u in (
        ("e^w below 1", gates(rng, 1)[0], generic(rng, 1, low=1, high=80)[0]),
        ("e^w above 1", 1 / gates(rng, 1)[0], gates(rng, 1)[0]),
        ("e^w = e^u = 1", flint.fmpq(1), flint.fmpq(1)),
    ):
        k, v = generic(rng, length, low=1, high=80), generic(rng, length)
        found = rwkv4_recurrent(k, v, w, u)
        rows.append(row(name, "softmax weights", rwkv4_weights(k, w, u, late=late) @ v, [found]))
        sums = rwkv4_weights(k, w, u, late=late).sum(axis=1)
        rows.append(row(name, "sums of rows against 1", 0 * sums + 1, [sums]))
    return equality(
        rows,
        seed=31,
        example="N = 2, e^k = 1, u = 0, e^w = 1/2: o_2 = (v_1 + v_2)/2, since the weight of position t − 1 "
        "is not decayed; with one decay more it would be (v_1/2 + v_2)/(3/2).",
        remark="; E and T, which are maxima, cancel from every quotient whichever of the two they are",
    )


def _float_recurrent(k: Array, v: Array, w: Any, u: Any) -> Array:
    """RWKV-4 as shipped in float32: ε from −1e38, logarithms. k, v (N, channels)."""
    a, b, eps, o = np.zeros_like(v[0]), np.zeros_like(v[0]), np.full_like(v[0], -1e38), np.empty_like(v)
    for t in range(len(v)):
        tau = np.maximum(u + k[t], eps)
        old, own = np.exp(eps - tau), np.exp(u + k[t] - tau)
        o[t] = (old * a + own * v[t]) / (old * b + own)
        after = np.maximum(w + eps, k[t])
        kept, added = np.exp(w + eps - after), np.exp(k[t] - after)
        a, b, eps = kept * a + added * v[t], kept * b + added, after
    return o


def _float_plain(k: Array, v: Array, w: Any, u: Any) -> Array:
    """The same without a running maximum."""
    a, b, o = np.zeros_like(v[0]), np.zeros_like(v[0]), np.empty_like(v)
    for t in range(len(v)):
        own = np.exp(u + k[t])
        o[t] = (a + own * v[t]) / (b + own)
        a, b = np.exp(w) * a + np.exp(k[t]) * v[t], np.exp(w) * b + np.exp(k[t])
    return o


def finite_in_float32(length: int = 64, *, stabilised: bool = True) -> ClaimFinding:
    """Does RWKV-4 in float32 stay between the values, for keys up to 1, 50, 200 and 10 000 in size?"""
    rng, rows = np.random.default_rng(32), []
    form = _float_recurrent if stabilised else _float_plain
    w, u = np.float32(-0.25), np.float32(0.5)
    for size in (1.0, 50.0, 200.0, 1e4):
        k = (size * (2 * rng.random((length, 32)) - 1)).astype(np.float32)
        v = rng.standard_normal((length, 32)).astype(np.float32)
        with np.errstate(all="ignore"):
            o = form(k, v, w, u)
        low, high = np.minimum.accumulate(v), np.maximum.accumulate(v)
        slack = np.float32(1e-5)
        lost = int((~np.isfinite(o)).sum())
        outside = int(((o < low - slack) | (o > high + slack)).sum())
        rows.append((size, o.size, lost, outside))
    wrong = [r for r in rows if r[2] or r[3]]
    titles = ("largest |k|", "outputs", "not finite", "beyond the values by 1e-5")
    return ClaimFinding(
        status="REFUTED" if wrong else "SUPPORTED",
        evidence="float32, w = −1/4, u = 1/2, ε from −1e38: "
        + "; ".join(f"|k| ≤ {r[0]:g}: {r[2]} of {r[1]} not finite, {r[3]} beyond the values" for r in rows),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample="k = 100, one position: e^100 = 2.7e43 is infinite in float32, and inf/inf is NaN."
        if wrong
        else "",
        seed=32,
    )


def _inputs(length: int) -> tuple[Array, Array, Array, Array, Array]:
    """q, k (N, 4), v (N, 3), gates (N, 4), bonus (4,)."""
    rng = np.random.default_rng(33)
    q, k, v = (generic(rng, length, width) for width in (4, 4, 3))
    return q, k, v, gates(rng, length, 4), generic(rng, 4)


def _bonus(q: Array, k: Array, v: Array, u: Any) -> Array:
    added: Array = (q * u * k).sum(axis=1)[:, None] * v
    return added


def bonus_forms(length: int = LENGTH, *, inclusive: bool = False) -> ClaimFinding:
    """RWKV-6's recurrence against its parallel and chunkwise forms, gates of 0 and 1 too.

    Args:
        inclusive: weights of those forms with the decays up to the query's own position, as GLA's.
    """
    q, k, v, alpha, u = _inputs(length)
    alternating = alpha.copy()
    alternating[::2], alternating[1::2] = flint.fmpq(0), flint.fmpq(1)
    rows: list[Row] = []
    for name, gate in (("gates k/9", alpha), ("alternating 0 and 1", alternating)):
        honest = gated_run(q, k, v, gate, bonus=u)
        plain = gated_run(q, k, v, gate)

        def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
            if form == "recurrent" or not inclusive:
                return honest(form, piece, state)  # noqa: B023
            o, last = plain(form, piece, state)  # noqa: B023
            return o + _bonus(q[piece], k[piece], v[piece], u - 1), last

        rows += compared(name, run, length)
    return equality(
        rows,
        seed=33,
        example="N = 2, q = k = v = u = 1, α = 1/2: o_2 = S_1 + 1 = 2, but inclusive of α_2 it is 1/2 + 1 = "
        "3/2.",
    )


def one_decay_off(length: int = 9, *, decay: bool = True) -> ClaimFinding:
    """GLA's recurrence with RWKV-6's gates against RWKV-6 with u = 1.

    Args:
        decay: gates of k/9; else all 1.
    """
    q, k, v, alpha, _ = _inputs(length)
    alpha = alpha if decay else 0 * alpha + 1
    one = 0 * alpha[0] + 1
    right = gated.recurrent(q, k, v, gated.gates(alpha), bonus=one)
    found = gated.recurrent(q, k, v, gated.gates(alpha))
    return equality(
        [
            row("u = 1", "output of GLA", right[0], [found[0]]),
            row("u = 1", "last state of GLA", right[1], [found[1]]),
        ],
        seed=33,
        example="N = 2, q = k = v = 1, α = 1/2, u = 1: RWKV-6 reads S_1 = 1 before the decay: o_2 = 1 + 1 = "
        "2. GLA decays first: o_2 = 1/2 + 1 = 3/2. The states are the same.",
    )


def as_gla(length: int = 9, *, moved: bool = True) -> ClaimFinding:
    """RWKV-6 by GLA's recurrence: queries one position earlier, and the bonus term.

    Args:
        moved: move the queries; else leave them, as if only the bonus were different.
    """
    q, k, v, alpha, u = _inputs(length)
    right = gated.recurrent(q, k, v, gated.gates(alpha), bonus=u)[0]
    own = _bonus(q, k, v, u)
    if moved:
        earlier = np.concatenate([q[1:], q[-1:]])
        read = gated.recurrent(earlier, k, v, gated.gates(alpha))[0]
        found = own.copy()
        found[1:] = found[1:] + read[:-1]
    else:
        found = gated.recurrent(q, k, v, gated.gates(alpha))[0] - _bonus(q, k, v, 1) + own
    return equality(
        [row("RWKV-6", "from GLA", right, [found])],
        seed=33,
        example="N = 2, q = k = v = 1, α = 1/2, u = 0: o_2 = S_1 = 1; GLA without its own term has α_2 S_1 = "
        "1/2.",
    )


def rwkv7_recurrent(q: Array, k: Array, v: Array, decay: Array, kappa: Array, eta: Array) -> Array:
    """RWKV-7: S_t = diag(d_t)S_{t−1} + b_t(a_tᵀS_{t−1}) + k_t v_tᵀ, a = −κ̂, b = κ̂∘η, o_t = S_tᵀq_t.

    q, k, κ̂, η, d (N, D), v (N, E).
    """
    state, o = start(None, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for t in range(len(v)):
        a, b = -kappa[t], kappa[t] * eta[t]
        state = decay[t][:, None] * state + np.outer(b, a @ state) + np.outer(k[t], v[t])
        o[t] = q[t] @ state
    return o


def _delta_inputs(length: int) -> tuple[Array, Array, Array, Array, Array]:
    rng = np.random.default_rng(34)
    q, k, v = (generic(rng, length, width) / 3 for width in (3, 3, 2))
    return q, k, v, generic(rng, length, low=1, high=9, denominator=9), gates(rng, length, 3)


def rwkv7_transition(length: int = 9, *, order: str = delta.ORDERS[1]) -> ClaimFinding:
    """RWKV-7 with κ̂ = k, η = β and writes βk against a delta rule with its decay and read in this order."""
    q, k, v, beta, alpha = _delta_inputs(length)
    spread = beta[:, None] * (0 * k + 1)
    right = rwkv7_recurrent(q, beta[:, None] * k, v, alpha, k, spread)
    found = delta.recurrent(q, k, v, beta, alpha, order=order)[0]
    return equality([row("κ̂ = k, η = β", order, right, [found])], seed=34, example=_ORDER)


_ORDER = (
    "N = 2, d = 1, q = k = v = 1, decay 1/2, β = 1: S_1 = 1. RWKV-7 reads the state as it was: S_2 = 1/2 − 1 "
    "+ 1 = 1/2. Gated DeltaNet decays first: S_2 = 1/2 − 1/2 + 1 = 1."
)


def as_delta_rule(length: int = 9, *, decays: tuple[bool, ...] = (False, True)) -> ClaimFinding:
    """RWKV-7's output against Gated DeltaNet's and KDA's, (I − βkkᵀ)D, with decays and without."""
    q, k, v, beta, alpha = _delta_inputs(length)
    spread, found = beta[:, None] * (0 * k + 1), []
    for decayed in decays:
        gate = alpha if decayed else 0 * alpha + 1
        right = rwkv7_recurrent(q, beta[:, None] * k, v, gate, k, spread)
        name = "decays of k/9" if decayed else "no decay"
        found.append(row(name, "(I − βkkᵀ)D", right, [delta.recurrent(q, k, v, beta, gate)[0]]))
    plain = equality(found, seed=34)
    same = [r[3] for r in found]
    status = "HOLDS" if all(same) else "CONDITIONAL" if any(same) else "REFUTED"
    return ClaimFinding(
        status=status,
        evidence=plain.evidence + "; equal for: " + (", ".join(r[0] for r in found if r[3]) or "none"),
        table=plain.table,
        counterexample="" if all(same) else _ORDER + " Condition: no decay, D = 1.",
        seed=34,
    )


_RWKV4 = "Peng et al. 2023, arXiv 2305.13048, section 3 and its code"
_RWKV6 = "Peng et al. 2024, arXiv 2404.05892, and its code"
_RWKV7 = "Peng et al. 2025, arXiv 2503.14456; flash-linear-attention, plain code of RWKV-7"

CLAIMS: Final = (
    Claim(
        id="RWK-1a",
        subject="RWKV",
        title="RWKV-4 is a softmax",
        statement="RWKV-4's stabilised recurrence gives the softmax over the logits k_s + (t − 1 − s)w of s "
        "< t and k_t + u of the position itself: positive weights that sum to 1.",
        source=_RWKV4,
        kind="exact",
        check=lambda lab: as_softmax(lab.choose(11, LENGTH)),
        control=lambda lab: as_softmax(7, late=1),
    ),
    Claim(
        id="RWK-1b",
        subject="RWKV",
        title="RWKV-4 in float32",
        statement="With the running maximum and ε starting at −1e38, RWKV-4 in float32 is finite for keys of "
        "any size and stays between the values.",
        source=_RWKV4,
        kind="search",
        check=lambda lab: finite_in_float32(lab.choose(64, 512)),
        control=lambda lab: finite_in_float32(stabilised=False),
    ),
    Claim(
        id="RWK-2a",
        subject="RWKV",
        title="RWKV-6's forms",
        statement="RWKV-6's recurrence, o_t = (S_{t−1} + diag(u)k_t v_tᵀ)ᵀq_t before S_t = diag(α_t)S_{t−1} "
        "+ k_t v_tᵀ, equals its parallel and chunkwise forms with weights Σ_c q_tc k_sc Π_{s<r<t} α_rc.",
        source=_RWKV6,
        kind="exact",
        check=lambda lab: bonus_forms(lab.choose(11, LENGTH)),
        control=lambda lab: bonus_forms(7, inclusive=True),
    ),
    Claim(
        id="RWK-2b",
        subject="RWKV",
        title="RWKV-6 as a row of the table of gates",
        statement="With RWKV-6's gates, gated linear attention computes RWKV-6 with the bonus u = 1.",
        source="Yang et al. 2023, arXiv 2312.06635, table 1, which lists RWKV-6 by its gate alone",
        kind="exact",
        check=lambda lab: one_decay_off(),
        control=lambda lab: one_decay_off(decay=False),
    ),
    Claim(
        id="RWK-2c",
        subject="RWKV",
        title="RWKV-6 from gated linear attention",
        statement="RWKV-6's output at t is gated linear attention's at t − 1 for the query q_t, plus "
        "(q_t∘u)·k_t v_t.",
        source="derived from RWKV-6's definition, arXiv 2404.05892",
        kind="exact",
        check=lambda lab: as_gla(),
        control=lambda lab: as_gla(moved=False),
    ),
    Claim(
        id="RWK-3a",
        subject="RWKV",
        title="RWKV-7's transition",
        statement="RWKV-7's recurrence with κ̂ = k, η = β and writes βk is the delta rule that reads the "
        "state before its decay, D − βkkᵀ.",
        source=_RWKV7,
        kind="exact",
        check=lambda lab: rwkv7_transition(),
        control=lambda lab: rwkv7_transition(order=delta.ORDERS[0]),
        covers=("DN-4",),
    ),
    Claim(
        id="RWK-3b",
        subject="RWKV",
        title="RWKV-7 and the gated delta rule",
        statement="RWKV-7's transition is that of the gated delta rule, (I − βkkᵀ)D.",
        source=_RWKV7,
        kind="exact",
        check=lambda lab: as_delta_rule(),
        control=lambda lab: as_delta_rule(decays=(False,)),
        covers=("DN-4",),
    ),
)
