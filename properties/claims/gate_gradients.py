"""Claims about closed forms of the gradient of the gates, against exact derivatives over the rationals."""

from __future__ import annotations

from typing import Final

import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.equal_forms import Row, equality, row
from attnproof.properties.claims.gated_linear import gates
from attnproof.properties.forms import gated, gradients
from attnproof.properties.forms.base import Array
from attnproof.properties.forms.numbers import generic

__all__ = ["CLAIMS", "of_keys", "of_values", "rwkv6"]

_SEED = 16


def _inputs(length: int) -> dict[str, Array]:
    """q, k (N, 3), v and the cotangent w (N, 2), α (N, 3), β (N, 2), state and W (3, 2), bonus (3,)."""
    rng = np.random.default_rng(_SEED)
    q, k, v, w = (generic(rng, length, width) for width in (3, 3, 2, 2))
    alpha, values = gates(rng, length, 3), gates(rng, length, 2)
    state, W, bonus = generic(rng, 3, 2), generic(rng, 3, 2), generic(rng, 3)
    return {
        "q": q,
        "k": k,
        "v": v,
        "w": w,
        "alpha": alpha,
        "beta": values,
        "state": state,
        "W": W,
        "bonus": bonus,
    }


def of_keys(length: int = 7, *, omit_last: bool = False) -> ClaimFinding:
    """d log α_t = Σ_{s≥t} (q_s∘dq_s − k_s∘dk_s) + Σ_e S_N∘dS_N against exact derivatives.

    Args:
        omit_last: leave out the last state's term where its cotangent is not 0.
    """
    x, rows = _inputs(length), []
    q, k, v, alpha, state = (x[name] for name in ("q", "k", "v", "alpha", "state"))
    for variant, beta, W in (
        ("α 1ᵀ", None, None),
        ("α 1ᵀ, final state", None, x["W"]),
        ("α βᵀ", x["beta"], x["W"]),
    ):
        loss, inputs = gradients.GatedLoss(x["w"], W), (q, k, v, alpha, beta, state)
        dq, dk, dalpha = (gradients.derivative(loss, inputs, place) for place in (0, 1, 3))
        last = gated.recurrent(q, k, v, gated.gates(alpha, beta), state)[1]
        closed = gradients.gate_gradient(q, dq, k, dk, last, None if omit_last else W)
        rows.append(row(variant, "d log α", alpha * dalpha, [closed]))
    return equality(
        rows,
        seed=_SEED,
        example="N = 1, k = 0, S_0 = 1, loss S_1 = α: d log α = α, and S_1·dS_1 = α; without that term 0.",
    )


def of_values(length: int = 7, *, off_by_one: bool = False) -> ClaimFinding:
    """d log β_t = Σ_{s≥t} (o_s∘do_s − v_s∘dv_s) + Σ_c S_N∘dS_N of G = α βᵀ.

    Args:
        off_by_one: the sum from s > t.
    """
    x = _inputs(length)
    inputs = (x["q"], x["k"], x["v"], x["alpha"], x["beta"], x["state"])
    loss = gradients.GatedLoss(x["w"], x["W"])
    o, last = gated.recurrent(*inputs[:3], gated.gates(x["alpha"], x["beta"]), x["state"])
    dv = gradients.derivative(loss, inputs, 2)
    closed = gradients.value_gate_gradient(o, x["w"], x["v"], dv, last, x["W"])
    if off_by_one:
        closed = closed - (o * x["w"] - x["v"] * dv)
    exact = x["beta"] * gradients.derivative(loss, inputs, 4)
    return equality(
        [row("α βᵀ", "d log β", exact, [closed])],
        seed=_SEED,
        example="N = 1, q = k = 1, v = 0, S_0 = 1, α = 1, loss o_1 = β: d log β = β = o_1·do_1; from s > t: "
        "0.",
    )


def rwkv6(length: int = 7, *, shifted: bool = True) -> ClaimFinding:
    """RWKV-6: Σ_{s>t} q_s∘dq_s − Σ_{t≤s≤N−2} k_s∘dk_s, s from 0, or GLA's form, against exact derivatives.

    Args:
        shifted: the first; else Σ_{s≥t} (q_s∘dq_s − k_s∘dk_s). Both leave the bonus out of dq and dk.
    """
    x, rows = _inputs(length), list[Row]()
    q, k, alpha = x["q"], x["k"], x["alpha"]
    inputs = (q, k, x["v"], alpha, None, x["state"])
    exact = alpha * gradients.derivative(gradients.GatedLoss(x["w"], bonus=x["bonus"]), inputs, 3)
    without = gradients.GatedLoss(x["w"], bonus=0 * x["bonus"])
    dq, dk = (gradients.derivative(without, inputs, place) for place in range(2))
    if shifted:
        rows.append(row("RWKV-6", "shifted", exact, [gradients.shifted_gate_gradient(q, dq, k, dk)]))
    else:
        rows.append(row("RWKV-6", "GLA's", exact, [gradients.gate_gradient(q, dq, k, dk, None, None)]))
    return equality(
        rows,
        seed=_SEED,
        example="N = 1, q = S_0 = 1, k = 0: o_1 = q S_0 = 1 is read before the decay, so d log α_1 = 0. "
        "GLA's form says q_1·dq_1 − k_1·dk_1 = 1.",
    )


_SOURCE = "Yang et al. 2023, arXiv 2312.06635, section 4 and appendix"

CLAIMS: Final = (
    Claim(
        id="GLA-4a",
        subject="gated linear attention",
        title="gradient of the gates",
        statement="d log α_t = Σ_{s≥t}(q_s∘dq_s − k_s∘dk_s), plus Σ_e S_N∘dS_N where the final state "
        "receives a gradient; with an initial state, and with G = α βᵀ too.",
        source=_SOURCE,
        kind="exact",
        check=lambda lab: of_keys(lab.choose(4, 7)),
        control=lambda lab: of_keys(3, omit_last=True),
    ),
    Claim(
        id="GLA-4b",
        subject="gated linear attention",
        title="gradient of gates on values",
        statement="For G = α βᵀ, d log β_t = Σ_{s≥t}(o_s∘do_s − v_s∘dv_s), plus Σ_c S_N∘dS_N.",
        source=f"{_SOURCE}; this form derived",
        kind="exact",
        check=lambda lab: of_values(lab.choose(4, 7)),
        control=lambda lab: of_values(3, off_by_one=True),
    ),
    Claim(
        id="GLA-4c",
        subject="gated linear attention",
        title="the same for RWKV-6",
        statement="RWKV-6's gates have the gradient of GLA's, Σ_{s≥t}(q_s∘dq_s − k_s∘dk_s), with the bonus "
        "left out.",
        source=f"{_SOURCE}, if applied to RWKV-6's row of table 1",
        kind="exact",
        check=lambda lab: rwkv6(lab.choose(4, 7), shifted=False),
        control=lambda lab: rwkv6(3),
    ),
    Claim(
        id="GLA-4d",
        subject="gated linear attention",
        title="RWKV-6's gradient, shifted",
        statement="RWKV-6's gates have the gradient Σ_{s>t} q_s∘dq_s − Σ_{t≤s≤N−2} k_s∘dk_s (s from 0), with "
        "the bonus left out of dq and dk.",
        source="flash-linear-attention, plain RWKV-6 backward (arXiv 2404.05892)",
        kind="exact",
        check=lambda lab: rwkv6(lab.choose(4, 7)),
        control=lambda lab: rwkv6(3, shifted=False),
    ),
)
