"""Claims about gated linear attention and mLSTM: equal forms, the table of gates, gradients of gates.

Theory.md GLA-1 to GLA-4, RET-1, RWK-2, 2.10. Equality is over the rationals.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import flint
import numpy as np
import torch

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.claims.linear import LENGTH, Row, Run, compared, equality, row
from attnproof.properties.forms import gated, gradients, mlstm
from attnproof.properties.forms.base import Array, difference, each
from attnproof.properties.forms.numbers import Gaussian, rationals
from attnproof.properties.forms.parameterisations import ROWS, Activations, Balls

__all__ = [
    "complex_gates",
    "elementwise_gates_do_not_factor",
    "equal_forms",
    "findings",
    "gate_gradients",
    "keeping_one",
    "retention",
    "stabilised",
    "table_of_gates",
]

_SOURCE = "theory.md {}"
_BITS = 192
GAMMA = flint.fmpq(31, 32)


def _gates(rng: np.random.Generator, *shape: int) -> Array:
    """Factors k/9, 0 < k < 9."""
    return rationals(rng, *shape, low=1, high=8, denominator=9)


def _run(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    beta: Array | None,
    bonus: Array | None = None,
    block: int | None = None,
) -> Run:
    def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
        x, y, z, a = q[piece], k[piece], v[piece], alpha[piece]
        b = None if beta is None else beta[piece]
        if form == "recurrent":
            return gated.recurrent(x, y, z, gated.gates(a, b), state, bonus=bonus)
        if isinstance(form, int):
            return gated.chunkwise(x, y, z, a, b, state, chunk=form, bonus=bonus, block=block)
        return gated.parallel(x, y, z, a, b, state, bonus=bonus)

    return run


def equal_forms(length: int = LENGTH) -> ClaimFinding:
    """Are the forms equal for gates of every shape, of 0 and of 1, and for RWKV-6's read before the decay?"""
    rng = np.random.default_rng(11)
    q, k, v = (rationals(rng, length, width) for width in (4, 4, 3))
    vector, values, bonus = _gates(rng, length, 4), _gates(rng, length, 3), rationals(rng, 4)
    alternating = vector.copy()
    alternating[::2], alternating[1::2] = flint.fmpq(0), flint.fmpq(1)
    rows: list[Row] = []
    for variant, alpha, beta, u, block in (
        ("vector", vector, None, None, None),
        ("vector, secondary chunks of 4", vector, None, None, 4),
        ("scalar", vector[:, :1], None, None, None),
        ("α βᵀ", vector, values, None, None),
        ("alternating 0 and 1", alternating, None, None, 4),
        ("RWKV-6", vector, None, bonus, None),
        ("RWKV-6, alternating 0 and 1", alternating, None, bonus, 4),
    ):
        rows += compared(variant, _run(q, k, v, alpha, beta, u, block), length)
    for variant, beta in (("vector", None), ("α βᵀ", values)):
        reference = gated.recurrent(q, k, v, gated.gates(vector, beta))[0]
        rows.append(row(variant, "GLA-2, factored", reference, [gated.factored(q, k, v, vector, beta)]))
    return equality(
        "gated linear attention: equal forms",
        "The recurrence S_t = G_t ∘ S_{t−1} + k_t v_tᵀ with G_t = α_t β_tᵀ equals its parallel and chunkwise "
        "forms, with and without secondary chunks, also with RWKV-6's read before the decay and its bonus.",
        _SOURCE.format("GLA-2, GLA-3, RWK-2"),
        rows,
    )


def retention(length: int = 37) -> ClaimFinding:
    """RET-1 at γ = 31/32, head 0's."""
    rng = np.random.default_rng(12)
    q, k, v = (rationals(rng, length, width) for width in (4, 4, 3))
    constant = np.full((length, 1), GAMMA, dtype=object)

    def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
        x, y, z = q[piece], k[piece], v[piece]
        if isinstance(form, int):
            return gated.retention_chunkwise(x, y, z, GAMMA, state, chunk=form)
        return gated.recurrent(x, y, z, gated.gates(constant[piece]), state)

    rows = compared("γ = 31/32", run, length, parallel=False)
    reference = gated.recurrent(q, k, v, gated.gates(constant))[0]
    rows.append(row("γ = 31/32", "parallel", reference, [gated.retention_parallel(q, k, v, GAMMA)]))
    return equality(
        "retention: equal forms",
        "RetNet's recurrence, its parallel form with γ^(i−j) and its chunkwise form are equal.",
        _SOURCE.format("RET-1"),
        rows,
    )


def complex_gates(length: int = LENGTH) -> ClaimFinding:
    """GateLoop: gates r·(3 + 4i)/5 and its powers, over Gaussian rationals."""
    rng = np.random.default_rng(13)
    q, k, v = (rationals(rng, length, width) for width in (3, 3, 2))
    modulus, turn = _gates(rng, length, 3), Gaussian(flint.fmpq(3, 5), flint.fmpq(4, 5))
    alpha = np.empty_like(modulus)
    for index in np.ndindex(alpha.shape):
        alpha[index] = modulus[index] * turn if sum(index) % 2 else modulus[index] * turn * turn
    real = Gaussian(flint.fmpq(1))
    run = _run(q * real, k * real, v * real, alpha, None)
    rows = compared("α = r·e^(iθ)", run, length)
    reference = run("recurrent", slice(None), None)[0]
    rows.append(row("α = r·e^(iθ)", "GLA-2, factored", reference, [gated.factored(q, k, v, alpha)]))
    return equality(
        "gated linear attention: complex gates",
        "With complex gates (GateLoop) the forms are equal too, in their real and imaginary parts.",
        _SOURCE.format("GLA-1"),
        rows,
    )


def _mlstm_inputs(length: int) -> tuple[Any, ...]:
    """q, k (N, 3), v (N, 2), i, f (N,): gates for which the floor decides some rows and others not."""
    rng = np.random.default_rng(14)
    q, k, v = (rationals(rng, length, width, high=12) for width in (3, 3, 2))
    i = rationals(rng, length, low=1, high=400, denominator=80) * rationals(rng, length, low=1, high=80)
    return q / 4, k / 4, v, i, _gates(rng, length, 1)[:, 0]


def stabilised(length: int = LENGTH) -> ClaimFinding:
    """mLSTM: do the stabilised forms, with the floor e^(−m), equal the definition and one another?"""
    inputs = _mlstm_inputs(length)

    def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
        part: tuple[Any, ...] = (*(x[piece] for x in inputs), state)
        if isinstance(form, int):
            return mlstm.chunkwise(*part, chunk=form)
        one = mlstm.stabilised if form == "recurrent" else mlstm.stabilised_parallel
        return one(*part)

    rows = compared("floor e^(−m)", run, length)
    o, (C, n, M) = run("recurrent", slice(None), None)
    rows.append(row("no stabiliser", "recurrent", (o, C * M, n * M), [mlstm.recurrent(*inputs)]))
    rows.append(row("no stabiliser", "parallel", o, [mlstm.parallel(*inputs)]))
    return equality(
        "mLSTM: the stabilised forms",
        "With the denominator max(|n'·q|, e^(−m)) mLSTM's stabilised recurrent, parallel and chunkwise "
        "forms equal "
        "the definition.",
        _SOURCE.format("2.10"),
        rows,
    )


def keeping_one(length: int = LENGTH) -> ClaimFinding:
    """Is max(|n'·q|, 1) in the stabilised form the same function? By an example."""
    inputs = _mlstm_inputs(length)
    right, _ = mlstm.stabilised(*inputs)
    masses = [abs(inputs[0][t] @ mlstm.recurrent(*(x[: t + 1] for x in inputs))[1][1]) for t in range(length)]
    wrong, _ = mlstm.stabilised(*inputs, keep_one=True)
    off = [difference(right[t], wrong[t]) for t in range(length)]
    worst = max(range(length), key=lambda t: off[t])
    changed = sum(d != 0 for d in off)
    return ClaimFinding(
        name="mLSTM: a floor of 1 in the stabilised form",
        status="REFUTED" if changed else "SUPPORTED",
        statement="mLSTM's stabilised form may keep the floor max(|n'·q|, 1) of the definition.",
        source=_SOURCE.format("2.10"),
        evidence=f"rational example of {length} rows: {changed} differ, most in row {worst}: "
        f"{float(wrong[worst, 0]):.4g} for {float(right[worst, 0]):.4g}; the definition's floor decides "
        f"{sum(mass < 1 for mass in masses)} rows, and belongs at e^(−m)",
        table={"row": list(range(length)), "largest difference": [float(d) for d in off]},
    )


def _rational(x: Any) -> Any:
    """The midpoint of an arb, or of both parts of a Gaussian one."""
    return Gaussian(x.re.mid().fmpq(), x.im.mid().fmpq()) if isinstance(x, Gaussian) else x.mid().fmpq()


def _activations(rng: np.random.Generator, length: int, width: int) -> Activations:
    def draw(*shape: int) -> Array:
        return each(flint.arb, rationals(rng, *shape))

    gamma, floor = flint.arb(GAMMA), each(flint.arb, _gates(rng, width))
    return Activations(
        keys=draw(length, width),
        values=draw(length, width),
        scalar=draw(length, 1),
        phase=draw(length, width),
        A=draw(width, width),
        a=flint.arb(1) / 3,
        gamma=gamma,
        floor=floor,
    )


def _at(x: float, other: float) -> Activations:
    """All pre-activations x, Mamba's logarithms A and a at ``other``."""
    one = np.array([[flint.arb(x)]], dtype=object)
    rate = flint.arb(other)
    floor = np.array([flint.arb(1) / 5], dtype=object)
    return Activations(one, one, one, one, np.array([[rate]], dtype=object), rate, flint.arb(GAMMA), floor)


def _modulus(factors: Sequence[Array]) -> flint.arb:
    """|G| of the one gate that the factors give."""
    g = flint.arb(1)
    for factor in factors:
        x = factor.flat[0]
        g = g * ((x.re * x.re + x.im * x.im).sqrt() if isinstance(x, Gaussian) else x)
    return g


def table_of_gates(length: int = 6, width: int = 3, reach: float = 30.0) -> ClaimFinding:
    """GLA-1, row by row: does each model's own recurrence equal the common one, and are its gates in (0, 1)?

    Gates are computed in balls and their midpoints taken as rationals, over which outputs are compared.
    The gates are monotone in each pre-activation, so that the ends of [−reach, reach] bound them.
    """
    rng = np.random.default_rng(15)
    with _precision(_BITS):
        chosen = _activations(rng, length, width)
        rows, wrong = [], []
        for model in ROWS:
            gate = np.ones((1, 1, 1), dtype=object)
            for factor in model.factors(Balls(), chosen):
                gate = gate * each(_rational, factor)
            q, k, v = (rationals(rng, length, width) for _ in range(3))
            k = model.keys(gate) if model.keys else k
            common = gated.recurrent(q, k, v, gate)[0]
            common = each(lambda x: x.re if isinstance(x, Gaussian) else x, common)
            same = difference(common, model.own(q, k, v, gate)) == 0
            ends = [
                _modulus(model.factors(Balls(), _at(*at)))
                for at in itertools.product((-reach, reach), repeat=2)
            ]
            inside = all(0 < end < 1 for end in ends)
            floats = [float(torch.tensor(float(end.mid())).float()) for end in ends]
            shape = "×".join("d" if n > 1 else "1" for n in gate.shape[1:])
            rows.append((model.model, model.formula, shape, same, inside, min(floats), max(floats)))
            if not (same and inside):
                wrong.append(model.model)
    closed = [f"{r[0]} {r[5]:.3g} to {r[6]:.3g}" for r in rows if r[5] == 0.0 or r[6] == 1.0]
    titles = ("model", "G", "shape", "reduces exactly", "in (0, 1)", "least in float32", "largest")
    return ClaimFinding(
        name="gated linear attention: the table of gates",
        status="REFUTED" if wrong else "HOLDS",
        statement="Every row of table GLA-1 is a gate of (0, 1) (GateLoop's modulus) in the common "
        "recurrence: each "
        "model's own recurrence, written its own way, gives the same output.",
        source="Yang et al., arXiv 2312.06635, table 1 (theory.md GLA-1)",
        evidence=f"{sum(r[3] for r in rows)} of {len(rows)} reduce exactly over rationals, "
        f"{sum(r[4] for r in rows)} "
        f"have gates proved in (0, 1) at pre-activations of ±{reach:g}; in float32 the range closes there: "
        + ", ".join(closed)
        + (f"; not so: {wrong}" if wrong else ""),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
    )


def elementwise_gates_do_not_factor() -> ClaimFinding:
    """Is Mamba's gate an outer product? With softplus(x) = log w and exp(A) whole, G_de = w_e^(−n_de)."""
    w, n = (flint.fmpq(2), flint.fmpq(3), flint.fmpq(5)), ((1, 2, 1), (1, 1, 3), (2, 1, 1))
    gate = [[1 / w[e] ** n[d][e] for e in range(3)] for d in range(3)]
    full = flint.fmpq_mat(gate).rank()
    shared = flint.fmpq_mat([[1 / w[e] ** n[0][0] for e in range(3)] for _ in range(3)]).rank()
    minor = gate[0][0] * gate[1][1] - gate[0][1] * gate[1][0]
    return ClaimFinding(
        name="gated linear attention: Mamba's gate as an outer product",
        status="REFUTED" if full > 1 and shared == 1 else "OPEN",
        statement="Mamba's gate exp(−(1ᵀα) ∘ exp(A)) is of the form α βᵀ, as the form with matrix "
        "products asks.",
        source=_SOURCE.format("GLA-1"),
        evidence="with softplus = log 2, log 3, log 5 and exp(A) whole numbers its rank over the "
        f"rationals is {full}, a "
        f"minor {minor}; with one exp(A) for all entries it is {shared}",
        table={f"column {e}": [float(gate[d][e]) for d in range(3)] for e in range(3)},
    )


def gate_gradients(length: int = 7) -> ClaimFinding:
    """GLA-4, its version for β, and RWKV-6's shifted one, against exact differences of polynomials."""
    rng = np.random.default_rng(16)
    q, k, v, w = (rationals(rng, length, width) for width in (3, 3, 2, 2))
    alpha, values = _gates(rng, length, 3), _gates(rng, length, 2)
    state, W, bonus = rationals(rng, 3, 2), rationals(rng, 3, 2), rationals(rng, 3)
    rows: list[Row] = []
    for variant, beta, cotangent in (("GLA", None, None), ("GLA, final state", None, W), ("α βᵀ", values, W)):
        loss, inputs = gradients.GatedLoss(w, cotangent), (q, k, v, alpha, beta, state)
        dq, dk, dv, dalpha = (gradients.derivative(loss, inputs, place) for place in range(4))
        o, last = gated.recurrent(q, k, v, gated.gates(alpha, beta), state)
        closed = gradients.gate_gradient(q, dq, k, dk, last, cotangent)
        rows.append(row(variant, "d log α", alpha * dalpha, [closed]))
        if beta is not None:
            exact = beta * gradients.derivative(loss, inputs, 4)
            rows.append(row(variant, "d log β", exact, [gradients.value_gate_gradient(o, w, v, dv, last, W)]))
    inputs = (q, k, v, alpha, None, state)
    exact = alpha * gradients.derivative(gradients.GatedLoss(w, bonus=bonus), inputs, 3)
    without = gradients.GatedLoss(w, bonus=0 * bonus)
    dq, dk = (gradients.derivative(without, inputs, place) for place in range(2))
    rows.append(row("RWKV-6", "d log α, shifted", exact, [gradients.shifted_gate_gradient(q, dq, k, dk)]))
    unshifted = float(difference(exact, gradients.gate_gradient(q, dq, k, dk, None, None)))
    found = equality(
        "gated linear attention: gradient of the gates",
        "d log α_t = Σ_{s≥t}(q_s∘dq_s − k_s∘dk_s), plus Σ_e S_N∘dS_N; RWKV-6's is shifted by one read and "
        "leaves out "
        "the bonus. Both hold with an initial state; with G = α βᵀ the first holds too, and β has its own.",
        _SOURCE.format("GLA-4"),
        rows,
    )
    told = f"{found.evidence}; unshifted, RWKV-6's would be wrong by {unshifted:.3g}"
    return ClaimFinding(found.name, found.status, found.statement, found.source, told, found.table)


def findings() -> list[ClaimFinding]:
    """All of them, as every run shows them."""
    return [
        equal_forms(),
        retention(),
        complex_gates(),
        stabilised(),
        keeping_one(),
        table_of_gates(),
        elementwise_gates_do_not_factor(),
        gate_gradients(),
    ]
