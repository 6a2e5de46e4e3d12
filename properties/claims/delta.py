"""Claims about the delta rule: equal forms, a misprint, orders of decay, contraction, recall. Theory.md "
"DN-1 to 4.
"""

from __future__ import annotations

import itertools
from typing import Any

import flint
import numpy as np

from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.claims.linear import LENGTH, Row, Run, compared, equality, row
from attnproof.properties.forms import delta
from attnproof.properties.forms.base import Array, difference, filled
from attnproof.properties.forms.numbers import Dual, rationals, slopes

__all__ = [
    "contraction",
    "derivatives",
    "equal_forms",
    "exact_recall",
    "findings",
    "inputs",
    "orders",
    "printed_formula",
    "square_gap",
]

_SOURCE = "theory.md {}"
_GATES = ("no gate", "scalar gate", "gate per channel")


def inputs(length: int, seed: int = 21) -> tuple[Array, Array, Array, Array, Array]:
    """q, k (N, 3), v (N, 2), β (N,) in [0, 2], α (N, 3) in (0, 1), rational; some keys of norm 1."""
    rng = np.random.default_rng(seed)
    q, k, v = (rationals(rng, length, width) for width in (3, 3, 2))
    k = k / 2
    beta = rationals(rng, length, low=0, high=18, denominator=9)
    k[1::3] = np.array([flint.fmpq(2, 3), flint.fmpq(-1, 3), flint.fmpq(2, 3)], dtype=object)
    beta[1::3] = flint.fmpq(2)
    return q, k, v, beta, rationals(rng, length, 3, low=1, high=8, denominator=9)


def _gate(alpha: Array, name: str) -> Array | None:
    return {"no gate": None, "scalar gate": alpha[:, :1], "gate per channel": alpha}[name]


def _run(q: Array, k: Array, v: Array, beta: Array, alpha: Array | None, block: int | None = None) -> Run:
    def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
        gate = None if alpha is None else alpha[piece]
        part = (q[piece], k[piece], v[piece], beta[piece], gate, state)
        if isinstance(form, int):
            return delta.chunkwise(*part, chunk=form, block=block)
        return delta.recurrent(*part) if form == "recurrent" else delta.parallel(*part)

    return run


def equal_forms(length: int = LENGTH) -> ClaimFinding:
    """Recurrence = products of transitions = WY/UT in chunks, with every kind of gate."""
    q, k, v, beta, alpha = inputs(length)
    rows: list[Row] = []
    for name in _GATES:
        rows += compared(name, _run(q, k, v, beta, _gate(alpha, name)), length)
    rows += compared("gate per channel, secondary chunks of 4", _run(q, k, v, beta, alpha, 4), length)
    reset = alpha.copy()
    reset[::4], reset[2::4] = flint.fmpq(0), flint.fmpq(1)
    rows += compared("gates of 0 and 1", _run(q, k, v, beta, reset), length)
    return equality(
        "delta rule: equal forms",
        "The delta rule's recurrence equals the product of its transitions and the chunkwise WY/UT form "
        "for every "
        "chunk length, without a gate (DeltaNet), with one (Gated DeltaNet) and with one per channel (KDA).",
        _SOURCE.format("DN-1 to DN-4"),
        rows,
    )


def derivatives(length: int = 9) -> ClaimFinding:
    """Have all forms the same derivative, along a random direction in all inputs and the initial state?"""
    rng = np.random.default_rng(22)

    def moving(x: Array) -> Array:
        return filled(x.shape, map(Dual, x.flat, rationals(rng, *x.shape).flat))

    q, k, v, beta, alpha = (moving(x) for x in inputs(length))
    state = moving(rationals(rng, 3, 2))
    rows: list[Row] = []
    for name in _GATES:
        part = (q, k, v, beta, _gate(alpha, name), state)
        found = {
            "recurrent": delta.recurrent(*part),
            "parallel": delta.parallel(*part),
            **{f"C = {c}": delta.chunkwise(*part, chunk=c) for c in (1, 4, length)},
        }
        held = {form: (slopes(o), slopes(last)) for form, (o, last) in found.items()}
        rows += [row(name, form, held["recurrent"], [held[form]]) for form in found if form != "recurrent"]
    return equality(
        "delta rule: equal derivatives",
        "All forms of the delta rule have the same derivative with respect to all inputs and the initial "
        "state.",
        "derived: forward differentiation by dual numbers of rationals",
        rows,
    )


def printed_formula(length: int = LENGTH, chunk: int = 16) -> ClaimFinding:
    """DN-3: is Gated DeltaNet's chunk formula right as printed, with the mask M, and with Γ?"""
    q, k, v, beta, alpha = inputs(length)
    exact = delta.recurrent(q, k, v, beta, alpha[:, :1])
    rows = []
    for name, mask_only in (("Γ_ij = γ_i/γ_j", False), ("M, as printed", True)):
        o, last = delta.printed(q, k, v, beta, alpha[:, :1], chunk=chunk, mask_only=mask_only)
        first = next((t for t in range(length) if difference(o[t], exact[0][t]) != 0), length)
        size = max(abs(x) for x in exact[0].flat)
        off = difference(o, exact[0])
        rows.append((name, float(off), float(off / size), first, float(difference(last, exact[1]))))
    (_, right, _, _, right_state), (_, wrong, share, first, _) = rows
    titles = (
        "factor of QKᵀ",
        "largest error of o",
        "over the largest |o|",
        "first wrong row",
        "of the state",
    )
    broken = right or right_state
    return ClaimFinding(
        name="delta rule: Gated DeltaNet's chunk formula as printed",
        status="OPEN" if broken else "REFUTED" if wrong else "HOLDS",
        statement="O = (γ∘Q)Sᵀ + (QKᵀ ∘ M)(Ũ − (γ∘W)Sᵀ), with the mask M, is Gated DeltaNet's output of a "
        "chunk.",
        source="Yang et al. 2024, arXiv 2412.06464 (theory.md DN-3)",
        evidence=f"rational example of {length} rows, C = {chunk}: with M wrong by up to {wrong:.3g} "
        f"({share:.2g} of the "
        f"largest output) from row {first} on; with Γ_ij = γ_i/γ_j in its place "
        + (f"by {right:.3g} too" if broken else "output and state are exact"),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
    )


def orders(length: int = 7) -> ClaimFinding:
    """DN-4: does the order of decay, read and write matter? All three, with each kind of gate."""
    q, k, v, beta, alpha = inputs(length)
    rows = []
    for name in _GATES:
        found = {o: delta.recurrent(q, k, v, beta, _gate(alpha, name), order=o)[0] for o in delta.ORDERS}
        for one, other in itertools.combinations(delta.ORDERS, 2):
            rows.append((name, one, other, float(difference(found[one], found[other]))))
    apart = {r[:3]: r[3] for r in rows}
    first, _, last = delta.ORDERS
    # A number commutes with I − βkkᵀ: only there may two orders agree.
    due = {key: key[0] != "no gate" and key != ("scalar gate", first, last) for key in apart}
    wrong = [key for key in apart if (apart[key] != 0) is not due[key]]
    told = ", ".join(f"{r[1]} / {r[2]} {r[3]:.3g}" for r in rows if r[0] == "gate per channel")
    titles = ("gate", "order", "other order", "largest difference")
    return ClaimFinding(
        name="delta rule: order of decay and read",
        status="REFUTED" if wrong else "HOLDS",
        statement="Decay before read (Gated DeltaNet, KDA), read before decay (RWKV-7) and erase before "
        "decay are "
        "three functions with a gate per channel; a scalar gate makes the first and the last equal, no "
        "gate all.",
        source=_SOURCE.format("DN-4"),
        evidence=f"rational example of {length} rows, largest differences with a gate per channel: {told}"
        + (f"; otherwise than stated: {wrong}" if wrong else ""),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
    )


def square_gap(k: Array, beta: Any) -> tuple[Array, Any]:
    """I − (I − βkkᵀ)² and the number c = β(2 − β‖k‖²) of which it is the multiple ckkᵀ."""
    one = delta.transition(k, 0)
    step = delta.transition(k, beta)
    return one - step @ step, beta * (2 - beta * (k @ k))


def contraction(trials: int = 40) -> ClaimFinding:
    """‖I − βkkᵀ‖ ≤ 1 exactly where 0 ≤ β‖k‖² ≤ 2: the proof's identity, beyond the end, and float32 at it."""
    rng = np.random.default_rng(23)
    rows, wrong = [], []
    for _ in range(trials):
        k = rationals(rng, 3, low=1)
        ratio = flint.fmpq(int(rng.integers(-4, 14)), 5)
        beta = ratio / (k @ k)
        gap, c = square_gap(k, beta)
        stretched = delta.transition(k, beta) @ k
        # I − A² = c·kkᵀ is positive semidefinite iff c ≥ 0; k itself is stretched otherwise.
        grows = stretched @ stretched > k @ k
        if (
            difference(gap, c * np.outer(k, k)) != 0
            or grows is not (c < 0)
            or (c < 0) is not (not 0 <= ratio <= 2)
        ):
            wrong.append(str(ratio))
        rows.append((float(ratio), float(c), float((stretched @ stretched) / (k @ k))))
    # Keys normalised in float32 miss norm 1 by roundings, which β = 2 then makes steps that grow.
    keys = rng.standard_normal((4096, 16)).astype(np.float32)
    keys /= np.sqrt((keys * keys).sum(axis=1, keepdims=True))
    squares = (keys.astype(np.float64) ** 2).sum(axis=1)
    titles = ("β‖k‖²", "β(2 − β‖k‖²)", "‖(I − βkkᵀ)k‖²/‖k‖²")
    return ClaimFinding(
        name="delta rule: contraction",
        status="REFUTED" if wrong else "HOLDS",
        statement="‖I − βkkᵀ‖ ≤ 1 for 0 ≤ β‖k‖² ≤ 2 and > 1 for any other: ‖x‖² − ‖(I − βkkᵀ)x‖² = β(2 − "
        "β‖k‖²)(k·x)².",
        source="proved in properties/forms/delta.py `transition`; " + _SOURCE.format("DN-1"),
        evidence=f"the identity is exact at {trials - len(wrong)} of {trials} rational keys, β‖k‖² from "
        f"{min(r[0] for r in rows):g} to {max(r[0] for r in rows):g}; of 4096 keys normalised in float32, "
        f"{int((2 * squares > 2).sum())} leave the range at β = 2, by up to "
        f"{float((2 * squares - 2).max()):.2g}",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
    )


def exact_recall() -> ClaimFinding:
    """β = 1 and a unit key: is Sᵀk = v exactly, whatever the state held? And otherwise by how much not?"""
    rng = np.random.default_rng(24)
    units = [
        np.array([flint.fmpq(x, d) for x in (a, b)], dtype=object)
        for a, b, d in ((3, 4, 5), (-5, 12, 13), (8, 15, 17))
    ]
    rows, wrong = [], []
    for k, (a, b) in itertools.product(units, ((1, 1), (1, 2), (3, 2))):
        v, state, beta = rationals(rng, 3), rationals(rng, 2, 3), flint.fmpq(a, b)
        _, after = delta.step(k, k, v, beta, np.ones(1, dtype=object), state)
        error, before = k @ after - v, k @ state - v
        if difference(error, (1 - beta) * before) != 0:
            wrong.append((str(k[0]), str(beta)))
        rows.append((float(k[0]), float(beta), float(max(abs(error))), float(max(abs(before)))))
    kept = sum(r[2] == 0 for r in rows if r[1] == 1)
    titles = ("k_1", "β", "largest |Sᵀk − v| after", "before")
    return ClaimFinding(
        name="delta rule: exact recall",
        status="REFUTED" if wrong or kept != len(units) else "HOLDS",
        statement="After a step with β = 1 and a key of norm 1 the state returns the value exactly, Sᵀk = "
        "v; with another "
        "β the error is 1 − β times the one before.",
        source=_SOURCE.format("DN-1"),
        evidence=f"keys (3/5, 4/5) and others of rational norm 1 over full states: exact for {kept} of "
        f"{len(units)} "
        f"at β = 1, (1 − β) times the error before in {len(rows) - len(wrong)} of {len(rows)} cases",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
    )


def findings() -> list[ClaimFinding]:
    """All of them, as every run shows them."""
    return [equal_forms(), derivatives(), printed_formula(), orders(), contraction(), exact_recall()]
