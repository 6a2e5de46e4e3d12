"""Claims about variants of the delta rule: where the decay comes, several steps a position, other reads.

Gated DeltaNet (arXiv 2412.06464), KDA (2510.26692), RWKV-7 (2503.14456), DeltaProduct (2502.10297), Comba
(2506.02475), as flash-linear-attention's plain code has them. Over the rationals.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.delta_chunks import gated_by, inputs
from attnproof.properties.claims.equal_forms import equality, row
from attnproof.properties.forms import delta
from attnproof.properties.forms.base import Array, difference, start

__all__ = ["CLAIMS", "commuting", "other_reads", "product", "read_by", "reductions", "three_orders"]

_SEED = 21
_ORDERS_EXAMPLE = (
    "N = 2, d = 1, q = k = v = 1, β = 1, decay α_2 = 1/2: S_1 = 1. Decay, then read: S_2 = 1/2 − 1/2 + 1 = "
    "1; read, then decay: 1/2 − 1 + 1 = 1/2; erase, then decay: (1 − 1)/2 + 1 = 1."
)


def three_orders(
    length: int = 7, gate: str = "gate per channel", orders: Sequence[str] = delta.ORDERS
) -> ClaimFinding:
    """Are these orders of decay, read and write different functions, each two of them, with this gate?"""
    q, k, v, beta, alpha = inputs(length)
    found = {o: delta.recurrent(q, k, v, beta, gated_by(alpha, gate), order=o)[0] for o in orders}
    rows = [
        (one, other, float(difference(found[one], found[other])))
        for one, other in itertools.combinations(orders, 2)
    ]
    equal = [r for r in rows if r[2] == 0.0]
    titles = ("order", "other order", "largest difference")
    return ClaimFinding(
        status="HOLDS" if not equal else "CONDITIONAL" if len(equal) < len(rows) else "REFUTED",
        evidence=f"rational example of {length} rows, {gate}: "
        + "; ".join(f"{r[0]} / {r[1]}: largest difference {r[2]:.3g}" for r in rows),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample="" if not equal else f"{equal[0][0]} and {equal[0][1]} agree with {gate}",
        seed=_SEED,
    )


def commuting(length: int = 7, gate: str = "scalar gate") -> ClaimFinding:
    """Decay before the erasure against decay after it, with this gate."""
    q, k, v, beta, alpha = inputs(length)
    first, last = (
        delta.recurrent(q, k, v, beta, gated_by(alpha, gate), order=order)
        for order in (delta.ORDERS[0], delta.ORDERS[2])
    )
    return equality(
        [row(gate, f"{delta.ORDERS[2]} against {delta.ORDERS[0]}", first, [last])],
        seed=_SEED,
        example="d = 2, k = (1, 1), β = 1/2, S = (1, 0)ᵀ, D = diag(1/2, 1), v = 0: (I − βkkᵀ)DS = (1/4, "
        "−1/4)ᵀ, but D(I − βkkᵀ)S = (1/4, −1/2)ᵀ.",
    )


def product(length: int = 6, steps: int = 2, *, decays: str = "first") -> ClaimFinding:
    """Gated DeltaProduct: its state against the delta rule's on a sequence ``steps`` times as long.

    One decay and then ``steps`` products by I − β k kᵀ a position; q reads after the last.

    Args:
        decays: "first": the longer sequence decays at the first step of every position; "every": at all.
    """
    _, k, v, beta, alpha = inputs(length * steps)
    q, gate = inputs(length)[0], alpha[:length, :1]
    state, o = start(None, k.shape[1], v.shape[1], like=v), np.empty_like(v[:length])
    for t in range(length):
        state = gate[t] * state
        for j in range(t * steps, (t + 1) * steps):
            state = delta.transition(k[j], beta[j]) @ state + beta[j] * np.outer(k[j], v[j])
        o[t] = q[t] @ state
    spread = np.repeat(gate, steps, axis=0)
    if decays == "first":
        spread[np.arange(len(spread)) % steps != 0] = flint.fmpq(1)
    found, last = delta.recurrent(np.repeat(q, steps, axis=0), k, v, beta, spread)
    return equality(
        [row(f"{steps} steps", "longer delta rule", (o, state), [(found[steps - 1 :: steps], last)])],
        seed=_SEED,
        example="N = 1, 2 steps, k = (1, 0) each, v = 1, β = 0 and S_0 = 1 decayed by 1/2: 1/2, and 1/4 if "
        "at both steps.",
    )


def read_by(
    q: Array, k: Array, v: Array, p: Array, write: Array, gate: Array, *, decayed: bool = True
) -> Array:
    """S' = γ_t S; S_t = S' + k_t(w_t∘v_t − S'ᵀp_t)ᵀ, o_t = S_tᵀq_t: a read vector of its own.

    Args:
        q, k, p: (N, D); v, write: (N, E); gate: (N, 1).
        decayed: read the state after its decay; else before.
    """
    state, o = start(None, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for t in range(len(v)):
        after = gate[t] * state
        state = after + np.outer(k[t], write[t] * v[t] - p[t] @ (after if decayed else state))
        o[t] = q[t] @ state
    return o


def _variants(length: int) -> tuple[Array, dict[str, tuple[Array, Array, Array]]]:
    """Gated DeltaNet's output, and of each variant the k, p, w that make it that."""
    q, k, v, beta, alpha = inputs(length)
    b, one = beta[:, None], 0 * v + 1
    gdn = delta.recurrent(q, k, v, beta, alpha[:, :1])[0]
    return gdn, {
        "Comba, p = k": (b * k, k, one),
        "writes and reads scaled by β (GDN-2, b = w = β)": (k, b * k, b * one),
    }


def reductions(length: int = 7, *, decayed: bool = True) -> ClaimFinding:
    """Do Comba with p = k and GDN-2 with b = w = β reduce to Gated DeltaNet?

    Args:
        decayed: they read after the decay; else before.
    """
    q, _, v, _, alpha = inputs(length)
    gdn, variants = _variants(length)
    rows = [
        row(name, "Gated DeltaNet", gdn, [read_by(q, k, v, p, w, alpha[:, :1], decayed=decayed)])
        for name, (k, p, w) in variants.items()
    ]
    return equality(rows, seed=_SEED, example=_ORDERS_EXAMPLE)


def other_reads(length: int = 7, *, scale: Any = flint.fmpq(1, 2)) -> ClaimFinding:  # noqa: B008
    """Is Comba's read with p = scale·k, or GDN-2's with w ≠ b, another function than Gated DeltaNet?"""
    q, _, v, _, alpha = inputs(length)
    gdn, variants = _variants(length)
    (k, p, one), (keys, read, w) = variants.values()
    found = {
        f"Comba, p = {scale}·k": read_by(q, k, v, scale * p, one, alpha[:, :1]),
        f"GDN-2, w = {scale}·b": read_by(q, keys, v, read, scale * w, alpha[:, :1]),
    }
    apart = {name: float(difference(gdn, o)) for name, o in found.items()}
    equal = [name for name, d in apart.items() if d == 0.0]
    return ClaimFinding(
        status="REFUTED" if equal else "HOLDS",
        evidence=f"rational example of {length} rows, largest difference to Gated DeltaNet: "
        + ", ".join(f"{name} {d:.3g}" for name, d in apart.items()),
        table={"variant": list(apart), "largest difference": list(apart.values())},
        counterexample=f"{', '.join(equal)}: the same output" if equal else "",
        seed=_SEED,
    )


def _references() -> ClaimFinding:
    return ClaimFinding(
        status="OPEN",
        evidence="needs flash-linear-attention's plain code at the revision meant, which is not installed "
        "here: that its gated delta product ignores scale and aliases the initial state, that its TTT-linear "
        "scales q in place, and that its chunked HGRN is valid only for T equal to the chunk. The functions "
        "meant are checked in DN-4a to DN-4d and RWK-3.",
    )


def _claim(name: str, title: str, statement: str, source: str, check: Any, control: Any) -> Claim:
    return Claim(name, "delta rule", title, statement, source, "exact", check, control)


_FLA = "flash-linear-attention, plain code"

CLAIMS: Final = (
    _claim(
        "DN-4a",
        "order of decay and read",
        "Decay before read (Gated DeltaNet, KDA), read before decay (RWKV-7) and erase before decay are "
        "three functions with a gate per channel.",
        f"{_FLA} of KDA and RWKV-7",
        lambda lab: three_orders(),
        lambda lab: three_orders(gate="no gate"),
    ),
    _claim(
        "DN-4b",
        "a scalar decay commutes with the erasure",
        "With one decay a position, (I − βkkᵀ)α = α(I − βkkᵀ): Gated DeltaNet may decay before it erases or "
        "after.",
        "arXiv 2412.06464, section 3; arXiv 2510.26692",
        lambda lab: commuting(),
        lambda lab: commuting(gate="gate per channel"),
    ),
    _claim(
        "DN-4c",
        "several steps a position",
        "Gated DeltaProduct with n_h steps a position is the gated delta rule on a sequence n_h times as "
        "long, decayed at the first of each n_h steps and read after the last.",
        f"arXiv 2502.10297; {_FLA}",
        lambda lab: product(lab.choose(5, 9), lab.choose(2, 3)),
        lambda lab: product(4, decays="every"),
    ),
    _claim(
        "DN-4d",
        "Comba and GDN-2 reduce to Gated DeltaNet",
        "A read by a vector p of its own, S += βk(v − Sᵀp)ᵀ, with p = k, and S += k(w∘v − Sᵀ(b∘k))ᵀ with b = "
        "w = β, both after the decay, are Gated DeltaNet.",
        f"arXiv 2506.02475; {_FLA}",
        lambda lab: reductions(),
        lambda lab: reductions(decayed=False),
    ),
    _claim(
        "DN-4e",
        "Comba and GDN-2 are other functions",
        "With p = k/2 (Comba), or w = b/2 (GDN-2), they are not Gated DeltaNet.",
        f"arXiv 2506.02475; {_FLA}",
        lambda lab: other_reads(),
        lambda lab: other_reads(scale=flint.fmpq(1)),
    ),
    Claim(
        id="DN-4f",
        subject="delta rule",
        title="slips of reference code",
        statement="Several plain reference functions of flash-linear-attention differ from what their "
        "kernels compute: an ignored scale, an aliased initial state, a query scaled in place, a chunk "
        "length that must be the sequence's.",
        source=_FLA,
        kind="none",
        check=lambda lab: _references(),
        control=None,
    ),
)
