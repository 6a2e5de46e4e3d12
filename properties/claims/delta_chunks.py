"""Claims about the delta rule in chunks: the WY/UT form, its conditioning, and Gated DeltaNet's misprint.

Yang et al., arXiv 2406.06484 (DeltaNet), 2412.06464 (Gated DeltaNet). Over the rationals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.equal_forms import LENGTH, Row, Run, compared, equality, row
from attnproof.properties.forms import delta
from attnproof.properties.forms.base import Array, chunks, difference, each, filled, products_up_to, start
from attnproof.properties.forms.numbers import Dual, generic, rationals, slopes

__all__ = [
    "CLAIMS",
    "GATES",
    "as_published",
    "conditioning",
    "derivatives",
    "equal_forms",
    "gated_by",
    "inputs",
    "moved_gates",
    "printed_formula",
    "published",
]

GATES: Final = ("no gate", "scalar gate", "gate per channel")
_SEED = 21


def inputs(length: int, seed: int = _SEED) -> tuple[Array, Array, Array, Array, Array]:
    """q, k (N, 3), v (N, 2), β (N,) in [0, 2), α (N, 3) in (0, 1): a generic point."""
    rng = np.random.default_rng(seed)
    q, k, v = (generic(rng, length, width) for width in (3, 3, 2))
    beta = generic(rng, length, low=0, high=18, denominator=9)
    return q, k / 2, v, beta, generic(rng, length, 3, low=1, high=8, denominator=9)


def gated_by(alpha: Array, name: str) -> Array | None:
    """The decays of one of :data:`GATES`, from those per channel."""
    return {"no gate": None, "scalar gate": alpha[:, :1], "gate per channel": alpha}[name]


def _run(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    alpha: Array | None,
    block: int | None = None,
    *,
    late: bool = False,
) -> Run:
    # Late: the forms other than the recurrence get every β one position late.
    others = np.concatenate([beta[:1], beta[:-1]]) if late else beta

    def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
        gate = None if alpha is None else alpha[piece]
        if form == "recurrent":
            return delta.recurrent(q[piece], k[piece], v[piece], beta[piece], gate, state)
        part = (q[piece], k[piece], v[piece], others[piece], gate, state)
        return (
            delta.chunkwise(*part, chunk=form, block=block)
            if isinstance(form, int)
            else delta.parallel(*part)
        )

    return run


def equal_forms(length: int = LENGTH, *, late: bool = False) -> ClaimFinding:
    """Recurrence = products of transitions = WY/UT in chunks, with every kind of gate.

    Args:
        late: the other forms get every β one position late.
    """
    q, k, v, beta, alpha = inputs(length)
    rows: list[Row] = []
    for name in GATES:
        rows += compared(name, _run(q, k, v, beta, gated_by(alpha, name), late=late), length)
    rows += compared(
        "gate per channel, secondary chunks of 4", _run(q, k, v, beta, alpha, 4, late=late), length
    )
    reset = alpha.copy()
    reset[::4], reset[2::4] = flint.fmpq(0), flint.fmpq(1)
    rows += compared("gates of 0 and 1", _run(q, k, v, beta, reset, late=late), length)
    return equality(
        rows,
        seed=_SEED,
        example="N = 2, q = k = v = 1, β = (0, 1): o_2 = 1; with β one position late, (0, 0): o_2 = 0.",
    )


def as_published(
    q: Array, k: Array, v: Array, beta: Array, *, chunk: int, diagonal: bool = False
) -> tuple[Array, Array]:
    """DeltaNet's chunk as the paper writes it, with T, W and U in full; states (D, E).

    T = [I + strictLower(diag(β)KKᵀ)]⁻¹diag(β), W = TK, U = TV, O = QS + (QKᵀ ∘ M)(U − WS),
    S' = S + Kᵀ(U − WS).

    Args:
        diagonal: the diagonal of diag(β)KKᵀ inside the inverse too.
    """
    state, o = start(None, k.shape[1], v.shape[1], like=v), np.empty_like(v)
    for piece in chunks(len(v), chunk):
        Q, K, V, b = q[piece], k[piece], v[piece], beta[piece, None]
        unit = each(flint.fmpq, np.eye(len(V), dtype=int).astype(object))
        inverse = flint.fmpq_mat((unit + np.tril(b * (K @ K.T), 0 if diagonal else -1)).tolist()).inv()
        T = np.array(inverse.tolist(), dtype=object) * b.T
        new = T @ V - T @ K @ state
        o[piece] = Q @ state + np.tril(Q @ K.T) @ new
        state = state + K.T @ new
    return o, state


def published(length: int = LENGTH, *, diagonal: bool = False) -> ClaimFinding:
    """The recurrence without gates against :func:`as_published` in chunks of 1, 3, 16 and N."""
    q, k, v, beta, _ = inputs(length)
    reference = delta.recurrent(q, k, v, beta)
    rows = [
        row("DeltaNet", f"C = {c}", reference, [as_published(q, k, v, beta, chunk=c, diagonal=diagonal)])
        for c in (1, 3, 16, length)
    ]
    return equality(
        rows,
        seed=_SEED,
        example="N = 1, q = k = v = β = 1: S_1 = 1; with the diagonal T = 1/(1 + 1) and S_1 = 1/2.",
    )


def derivatives(length: int = 9, *, constant_keys: bool = False) -> ClaimFinding:
    """Have all forms the same derivative, along a random direction in all inputs and the initial state?

    Args:
        constant_keys: the chunkwise form takes its keys for constants, as if detached.
    """
    rng = np.random.default_rng(22)

    def moving(x: Array) -> Array:
        return filled(x.shape, map(Dual, x.flat, generic(rng, *x.shape).flat))

    q, k, v, beta, alpha = (moving(x) for x in inputs(length))
    state = moving(generic(rng, 3, 2))
    held = each(lambda x: Dual(x.value), k) if constant_keys else k
    rows: list[Row] = []
    for name in GATES:
        rest = (v, beta, gated_by(alpha, name), state)
        o, last = delta.recurrent(q, k, *rest)
        reference = (slopes(o), slopes(last))
        found = {
            "parallel": delta.parallel(q, k, *rest),
            **{f"C = {c}": delta.chunkwise(q, held, *rest, chunk=c) for c in (1, 4, length)},
        }
        rows += [row(name, form, reference, [tuple(map(slopes, got))]) for form, got in found.items()]
    return equality(
        rows,
        seed=22,
        example="N = 1, q = v = β = 1, S_0 = 0: o = k, whose derivative in k is 1, and 0 if detached.",
    )


_CONDITION_PROOF: Final = (
    "For all: below the diagonal the matrix has β_i k_i·k_j, at most 2 in size, and its inverse "
    "−β_i k_iᵀA_{i−1}⋯A_{j+1}k_j with A = I − βkkᵀ, a contraction as 0 ≤ β‖k‖² ≤ 2 (DN-1d), so at most "
    "2 too: a "
    "row of either sums in size to at most 1 + 2(C − 1). Equal unit keys at β = 2 have 2 and ±2 everywhere"
)


def conditioning(lengths: Sequence[int] = (2, 4, 8, 16), ratio: int = 2, trials: int = 4) -> ClaimFinding:
    """κ_∞ of I + strictLower(diag(β)KKᵀ) for 0 ≤ β ≤ ratio, ‖k‖ ≤ 1: is it at most (1 + 2(C − 1))²?

    Unit keys that are all equal, with β = ratio, and random ones (of norm at most 1, β at most ratio).
    """
    rng, rows = np.random.default_rng(28), []
    for n in lengths:
        for trial in range(trials):
            if trial:
                k = rationals(rng, n, 2, low=-4, high=4)
                beta = rationals(rng, n, low=0, high=9 * ratio, denominator=9)
            else:
                k, beta = (
                    np.full((n, 1), flint.fmpq(1), dtype=object),
                    np.full(n, flint.fmpq(ratio), dtype=object),
                )
            unit = each(flint.fmpq, np.eye(n, dtype=int).astype(object))
            matrix = unit + np.tril(beta[:, None] * (k @ k.T), -1)
            inverse = np.array(flint.fmpq_mat(matrix.tolist()).inv().tolist(), dtype=object)
            norms = [max(abs(m).sum(axis=1)) for m in (matrix, inverse)]
            rows.append(("random" if trial else "equal", n, norms[0] * norms[1], (2 * n - 1) ** 2))
    wrong = [r for r in rows if r[2] > r[3]]
    equal = [r for r in rows if r[0] == "equal"]
    titles = ("keys", "C", "condition number", "(2C − 1)²")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"condition numbers in the ∞-norm, β ≤ {ratio}, ‖k‖ ≤ 1, equal keys: "
        + ", ".join(f"{float(r[2]):.6g} at C = {r[1]} for {r[3]}" for r in equal)
        + f"; {len(rows) - len(equal)} random chunks, {len(wrong)} of all beyond"
        + ("" if wrong else f". {_CONDITION_PROOF}"),
        table={title: [float(r[i]) if i == 2 else r[i] for r in rows] for i, title in enumerate(titles)},
        plots=(
            Plot(
                title="condition number of I + strictLower(diag(β)KKᵀ), equal keys",
                chart="line",
                columns={"C": [r[1] for r in equal], "condition number": [float(r[2]) for r in equal]},
                x="C",
                y="condition number",
                log=("C", "condition number"),
            ),
        ),
        counterexample=""
        if not wrong
        else f"Equal unit keys, β = {ratio}: below the diagonal of the inverse −β(1 − β)^(i−j−1), at C = "
        f"{wrong[0][1]} a condition number of {wrong[0][2]} > {wrong[0][3]}.",
        seed=28,
    )


def printed_formula(length: int = LENGTH, chunk: int = 16, *, mask_only: bool = True) -> ClaimFinding:
    """Is Gated DeltaNet's chunk formula right as printed, with the mask M, or with Γ?

    Args:
        mask_only: M; else Γ_ij = γ_i/γ_j.
    """
    q, k, v, beta, alpha = inputs(length)
    exact = delta.recurrent(q, k, v, beta, alpha[:, :1])
    o, last = delta.printed(q, k, v, beta, alpha[:, :1], chunk=chunk, mask_only=mask_only)
    off = [float(difference(o[t], exact[0][t])) for t in range(length)]
    size, state = float(max(abs(x) for x in exact[0].flat)), float(difference(last, exact[1]))
    wrong = [t for t in range(length) if off[t]]
    name = "the mask M" if mask_only else "Γ_ij = γ_i/γ_j"
    return ClaimFinding(
        status="REFUTED" if wrong or state else "HOLDS",
        evidence=f"rational example of {length} rows, C = {chunk}, with {name}: "
        + (
            f"wrong by up to {max(off):.3g} ({max(off) / size:.2g} of the largest output) from row "
            f"{wrong[0]} on, "
            if wrong
            else "every output exact, "
        )
        + f"the last state {f'wrong by {state:.3g}' if state else 'exact'}",
        table={"row": list(range(length)), "error of o": off},
        counterexample=""
        if not wrong
        else "C = 2, d = 1, q = v = β = 1, k = (1, 0), α = (1, 1/2): S_1 = 1, S_2 = α_2 S_1 = 1/2, o_2 = "
        "1/2. Formula: S = 0, Ũ = (1, 1), QKᵀ = (1, 0; 1, 0). With M: o_2 = 1·1 + 0·1 = 1. With Γ_21 = "
        "γ_2/γ_1 = 1/2: o_2 = 1/2.",
        seed=_SEED,
    )


def moved_gates(length: int = 7, *, ratio: bool = True) -> ClaimFinding:
    """Gated T·(γ∘K) against γ∘(T·K) without gates, for chunks of every length up to N.

    Args:
        ratio: Γ inside the gated inverse; else its mask only, so that nothing is gated there.
    """
    _, k, _, beta, alpha = inputs(length)
    rows = []
    for n in range(1, length + 1):
        K, b, gamma = k[:n], beta[:n, None], products_up_to(alpha[:n, :1])
        keys = K @ K.T
        decays = np.tril(gamma / gamma.T) if ratio else np.tril(0 * keys + 1)
        gated = delta.solve(np.tril(b * keys * decays, -1), b * (gamma * K))
        rows.append(row("W", f"C = {n}", gamma * delta.solve(np.tril(b * keys, -1), b * K), [gated]))
    return equality(
        rows,
        seed=_SEED,
        example="C = 2, k = β = 1, γ = (1, 1/2): γ_2 (1 − 1) = 0; without Γ 1/2 − 1·1 = −1/2.",
    )


_DELTANET = "Yang et al. 2024, arXiv 2406.06484, section 3"
_GATED = "Yang et al. 2024, arXiv 2412.06464, section 3.3"


def _claim(name: str, title: str, statement: str, source: str, check: Any, control: Any) -> Claim:
    return Claim(name, "delta rule", title, statement, source, "exact", check, control)


CLAIMS: Final = (
    _claim(
        "DN-2a",
        "equal forms",
        "The delta rule's recurrence equals the product of its transitions and the chunkwise WY/UT form for "
        "every chunk length, without a gate (DeltaNet), with one (Gated DeltaNet) and with one per channel "
        "(KDA), and with a state handed over anywhere.",
        f"{_DELTANET}; {_GATED}; KDA: arXiv 2510.26692",
        lambda lab: equal_forms(lab.choose(9, LENGTH)),
        lambda lab: equal_forms(5, late=True),
    ),
    _claim(
        "DN-2b",
        "DeltaNet's chunk as published",
        "T = [I + strictLower(diag(β)KKᵀ)]⁻¹diag(β), W = TK, U = TV give O = QS + (QKᵀ ∘ M)(U − WS) and "
        "S' = S + Kᵀ(U − WS).",
        _DELTANET,
        lambda lab: published(lab.choose(11, LENGTH)),
        lambda lab: published(5, diagonal=True),
    ),
    _claim(
        "DN-2c",
        "equal derivatives",
        "All forms of the delta rule have the same derivative with respect to all inputs and the initial "
        "state.",
        "derived: forward differentiation by dual numbers of rationals",
        lambda lab: derivatives(lab.choose(5, 9)),
        lambda lab: derivatives(4, constant_keys=True),
    ),
    _claim(
        "DN-2d",
        "conditioning of the WY form",
        "For 0 ≤ β ≤ 2 and keys of norm at most 1 the matrix I + strictLower(diag(β)KKᵀ) has a condition "
        "number of at most (2C − 1)² in the ∞-norm, attained by equal unit keys at β = 2: nearly parallel "
        "keys make it grow with C, but not exponentially.",
        "derived: the inverse's entries are −β_i k_iᵀA_{i−1}⋯A_{j+1}k_j with contractions A",
        lambda lab: conditioning(lab.choose((2, 4, 8), (2, 4, 8, 16))),
        lambda lab: conditioning((4, 8), 3),
    ),
    _claim(
        "DN-3a",
        "Gated DeltaNet's chunk formula as printed",
        "O = (γ∘Q)Sᵀ + (QKᵀ ∘ M)(Ũ − (γ∘W)Sᵀ), with the mask M, is Gated DeltaNet's output of a chunk.",
        f"{_GATED}, as printed in the ICLR version",
        lambda lab: printed_formula(lab.choose(9, LENGTH), lab.choose(4, 16)),
        lambda lab: printed_formula(9, 4, mask_only=False),
    ),
    _claim(
        "DN-3b",
        "Gated DeltaNet's chunk formula, corrected",
        "O = (γ∘Q)Sᵀ + (QKᵀ ∘ Γ)(Ũ − (γ∘W)Sᵀ) with Γ_ij = γ_i/γ_j for i ≥ j is Gated DeltaNet's output of a "
        "chunk, and S' = γ_C S + (Ũ − (γ∘W)Sᵀ)ᵀ((γ_C/γ)∘K) its state.",
        f"{_GATED}, with Γ as in flash-linear-attention's code",
        lambda lab: printed_formula(lab.choose(9, LENGTH), lab.choose(4, 16), mask_only=False),
        lambda lab: printed_formula(9, 4),
    ),
    _claim(
        "DN-3c",
        "gates move out of W",
        "[I + strictLower(diag(β)(Γ∘KKᵀ))]⁻¹diag(β)(γ∘K) = γ∘W with W of the delta rule without gates.",
        "derived: diag(γ) conjugates one matrix into the other",
        lambda lab: moved_gates(),
        lambda lab: moved_gates(4, ratio=False),
    ),
)
