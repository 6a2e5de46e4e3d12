"""Claims about Mamba: equal forms, theorem 1 under both discretisations. Theory.md MAM-1, MAM-2.

Theorem 1 speaks of e^z only: with E = e^z > 0 it is a statement about rational functions of E and, in the
shipped form, of log(1 + E).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.equal_forms import SCHWARTZ_ZIPPEL
from attnproof.properties.forms import mamba, state_space
from attnproof.properties.forms.base import difference, filled
from attnproof.properties.forms.numbers import generic, rationals

__all__ = ["CLAIMS", "MAMBA", "equal_forms", "gate_theorem", "input_gain", "time_invariance"]

SEED: Final = 61
MAMBA: Final = "Gu and Dao, Mamba, arXiv 2312.00752"
_BITS = 256
# At most this far apart may enclosures of one number reach at 256 bits.
_NARROW = 1e-50
_POINTS = tuple(flint.fmpq(z, 10) for z in (-300, -100, -20, -7, 0, 7, 20, 100, 300))


def equal_forms(length: int = 9, *, late: bool = False) -> ClaimFinding:
    """Are recurrence, chunks, scans and the matrix of the selective SSM equal?

    Args:
        length: positions.
        late: True applies each decay one position too late, which breaks the equality.
    """
    rng = np.random.default_rng(SEED)
    a, gains, C = (generic(rng, length, 3) for _ in range(3))
    x = generic(rng, length)
    b = gains * x[:, None]
    due, state = mamba.recurrent(a, b, C)
    moved = np.roll(a, 1, axis=0) if late else a
    pairs = [(moved[t], b[t]) for t in range(length)]
    found = {
        "matrix M x": mamba.matrix(moved, gains, C) @ x,
        **{f"chunks of {c}": mamba.chunkwise(moved, b, C, chunk=c)[0] for c in (1, 2, 4, length)},
        **{
            f"scan {name}": np.array([C[t] @ h for t, (_, h) in enumerate(scan(pairs))], dtype=object)
            for name, scan in (
                ("in sequence", mamba.sequential),
                ("by doubling", mamba.doubling),
                ("by a tree", mamba.tree),
            )
        },
    }
    handed = []
    for split in range(1, length):
        first, half = mamba.recurrent(moved[:split], b[:split], C[:split])
        second, last = mamba.chunkwise(moved[split:], b[split:], C[split:], half, chunk=2)
        handed.append(np.concatenate([first, second, last - state]))
    for index, joined in enumerate(handed):
        found[f"handed over after {index + 1}"] = joined[:length] + sum(abs(gap) for gap in joined[length:])
    rows = [(name, bool(difference(due, y) == 0), float(difference(due, y))) for name, y in found.items()]
    wrong = [row for row in rows if not row[1]]
    titles = ("form", "equal", "largest difference")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{length} rational outputs, state 3, in {len(rows)} forms: {len(rows) - len(wrong)} "
        f"equal the recurrence ({SCHWARTZ_ZIPPEL})",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=f"{wrong[0][0]}, T = {length}, seed {SEED}: the first two outputs are "
        f"{float(due[0]):.6g} and {float(due[1]):.6g}, not {float(found[wrong[0][0]][0]):.6g} and "
        f"{float(found[wrong[0][0]][1]):.6g}"
        if wrong
        else "",
        seed=SEED,
    )


def _is_toeplitz(M: Any) -> bool:
    return all(M[i + 1, j + 1] == M[i, j] for i, j in np.ndindex(len(M) - 1, len(M) - 1))


def time_invariance(length: int = 6, *, selective: bool = True) -> ClaimFinding:
    """Is the selective SSM no convolution, while the one with constant Δ, B, C is that of S4?"""
    rng = np.random.default_rng(SEED + 1)
    rows = []
    for varying in ("none", "decay (Δ)", "B", "C") if selective else ("none", "none, as decay", "none, as B"):
        a, gains, C = (np.repeat(rationals(rng, 1, 2), length, axis=0) for _ in range(3))
        a, gains, C = (
            rationals(rng, length, 2) if varying == name else part
            for name, part in (("decay (Δ)", a), ("B", gains), ("C", C))
        )
        M = mamba.matrix(a, gains, C)
        u = rationals(rng, length)
        taps = state_space.kernel(np.diag(a[0]), gains[0], C[0], length)
        rows.append((varying, _is_toeplitz(M), bool(difference(M @ u, state_space.convolved(taps, u)) == 0)))
    constant, changing = [row for row in rows if row[0] == "none"], [row for row in rows if row[0] != "none"]
    good = all(row[1] and row[2] for row in constant) and not any(row[1] or row[2] for row in changing)
    titles = ("varying in time", "matrix is Toeplitz", "equals the convolution by CĀⁱB̄")
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"rational matrices of {length} positions: Toeplitz with "
        + (", ".join(f"varying {row[0]}" for row in rows if row[1]) or "nothing"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="" if good else f"{changing[0][0]}: the matrix is Toeplitz, a convolution",
        seed=SEED + 1,
    )


def _gain(hold: bool, z: flint.arb) -> flint.arb:
    """B̄ at A = −1, B = 1, Δ = softplus(z): 1 − e^(−Δ) by zero-order hold, Δ in the shipped code."""
    delta = z.exp().log1p()
    return -(-delta).expm1() if hold else delta


def _is_identity() -> tuple[bool, bool]:
    """Are e^(−softplus(z)) and 1 − σ(z), and 1 less either, equal as rational functions of E = e^z?"""
    E, one = flint.fmpq_poly([0, 1]), flint.fmpq_poly([1])
    decay = (one, one + E)  # e^(−log(1 + E))
    gate = (E, one + E)  # σ(z)
    keep = decay[0] * gate[1] == (gate[1] - gate[0]) * decay[1]
    write = (decay[1] - decay[0]) * gate[1] == gate[0] * decay[1]
    return keep, write


def gate_theorem(points: Sequence[flint.fmpq] = _POINTS, *, hold: bool = True) -> ClaimFinding:
    """Is the SSM with N = 1, A = −1, B = 1, Δ = softplus(z) the gated RNN h = (1 − g)h + g·x, g = σ(z)?"""
    keep, write = _is_identity()
    rows, apart, example = [], [], ""
    with _precision(_BITS):
        h, x = flint.arb(0), flint.arb(1)
        # The smallest example first: z = 0, h = 0, x = 1.
        for point in sorted(points, key=abs):
            z = flint.arb(point)
            gate = 1 / (1 + (-z).exp())
            ssm = (-(z.exp().log1p())).exp() * h + _gain(hold, z) * x
            rnn = (1 - gate) * h + gate * x
            gap = ssm - rnn
            rows.append((str(point), float(rnn.mid()), float(ssm.mid()), float(gap.abs_upper())))
            if not gap.contains(0):
                apart.append(point)
                example = example or (
                    f"z = {point}, h = {_plain(h)}, x = {_plain(x)}: the theorem gives "
                    f"{rnn.str(8, radius=False)}, the SSM {ssm.str(8, radius=False)} (e^−softplus(z) = 1 − "
                    f"σ(z), but softplus(z) = {z.exp().log1p().str(8, radius=False)} is not σ(z) = "
                    f"{gate.str(8, radius=False)})"
                )
            h, x = flint.arb(flint.fmpq(2, 5)), flint.arb(flint.fmpq(13, 10))
    close = max(row[3] for row in rows) < _NARROW
    proved = keep and write and hold and close
    titles = ("z", "h by the theorem", "h by the SSM", "difference at most")
    return ClaimFinding(
        status="REFUTED" if apart else "HOLDS" if proved else "OPEN",
        evidence=f"as rational functions of E = e^z: e^(−softplus(z)) = 1 − σ(z) {keep}, 1 − "
        f"e^(−softplus(z)) = σ(z) {write}; B̄ = {'1 − e^(−Δ)' if hold else 'Δ'} in balls of {_BITS} bits "
        f"at {len(rows)} z from {min(points)} to {max(points)} (h = 2/5, x = 13/10 but at z = 0): apart at "
        f"{len(apart)}, at most {max(row[3] for row in rows):.3g}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
    )


def _plain(x: flint.arb) -> str:
    return str(x.str(6, radius=False))


def input_gain(points: Sequence[flint.fmpq] = _POINTS, *, hold: bool = False) -> ClaimFinding:
    """Does the shipped gain exceed the gate and z for all z, tend to the gate at −∞, and have no bound?

    With E = e^z: log(1 + E) − E/(1 + E) is 0 at E = 0 and has the derivative E/(1 + E)² > 0; and log(1 + E) >
    log E = z.
    """
    E, one = flint.fmpq_poly([0, 1]), flint.fmpq_poly([1])
    # d/dE log(1+E) = 1/(1+E) and d/dE E/(1+E) = ((1+E) − E)/(1+E)²; the difference over (1+E)².
    slope = (one + E) - ((one + E) - E)
    proved = slope == E and not hold
    rows = []
    with _precision(_BITS):
        for point in sorted(points):
            z = flint.arb(point)
            gate, gain = 1 / (1 + (-z).exp()), _gain(hold, z)
            rows.append(
                (
                    float(z.mid()),
                    float(gate.mid()),
                    float(gain.mid()),
                    float((gain / gate).mid()),
                    bool(gain > gate and gain > z),
                )
            )
    above = all(row[4] for row in rows)
    titles = ("z", "σ(z)", "input gain", "gain over σ(z)", "above σ(z) and z")
    table = {title: [row[i] for row in rows] for i, title in enumerate(titles)}
    low = rows[0]
    return ClaimFinding(
        status="HOLDS" if proved and above else "REFUTED",
        evidence="the derivative of log(1+E) − E/(1+E) is E/(1+E)² as a rational function: "
        f"{bool(slope == E)}; in balls at {len(rows)} z the gain is above both in "
        f"{sum(row[4] for row in rows)}: {rows[-1][2]:.6g} at z = {rows[-1][0]:g}; its ratio to σ(z) is 1 "
        f"+ {low[3] - 1:.2g} at z = {low[0]:g}",
        table=table,
        plots=(Plot("input gain over z", "line", table, x="z", y="input gain"),),
        counterexample=""
        if proved and above
        else f"z = {rows[-1][0]:g}: the gain is {rows[-1][2]:.8g}, at most 1",
    )


def constant_input(points: Sequence[flint.fmpq] = _POINTS, *, hold: bool = False) -> ClaimFinding:
    """Does the state stay within the range of its inputs? The fixed point under x = 1 is gain/(1 − decay)."""
    rows = []
    with _precision(_BITS):
        for point in sorted(points):
            z = flint.arb(point)
            fixed = _gain(hold, z) / -(-(z.exp().log1p())).expm1()
            rows.append((float(z.mid()), float(fixed.mid()), bool(fixed - 1 > _NARROW)))
    beyond = [row for row in rows if row[2]]
    table = {"z": [row[0] for row in rows], "fixed point under x = 1": [row[1] for row in rows]}
    smallest = min(beyond, key=lambda row: abs(row[0])) if beyond else None
    return ClaimFinding(
        status="REFUTED" if beyond else "HOLDS",
        evidence=f"A = −1, B = 1, constant input 1, {len(rows)} gates z: the state's fixed point exceeds 1 "
        f"in {len(beyond)}, largest {max(row[1] for row in rows):.4g}",
        table=table,
        counterexample=f"z = {smallest[0]:g}, x = 1 for ever: h tends to softplus(z)/σ(z) = {smallest[1]:.8g}"
        if smallest
        else "",
    )


def exponential_decay(length: int = 5, *, doubled: bool = False) -> ClaimFinding:
    """Is Π e^(Δ_t A) over a segment e^(A·ΣΔ_t), and in (0, 1) for A = −e^(A_log)? In balls."""
    rng = np.random.default_rng(SEED + 2)
    rows, example = [], ""
    with _precision(_BITS):
        for _ in range(length):
            steps = filled((4,), (flint.arb(z).exp().log1p() for z in rationals(rng, 4)))
            rate = -flint.arb(rationals(rng, 1)[0]).exp()
            product = flint.arb(1)
            for step in steps:
                product = product * (step * rate).exp()
            whole = (sum(steps, flint.arb(0)) * rate * (2 if doubled else 1)).exp()
            inside = bool(product > 0) and bool(product < 1)
            rows.append((float(product.mid()), bool((product - whole).contains(0)), inside))
            if not rows[-1][1] and not example:
                example = (
                    f"A = {_plain(rate)}, Δ = {', '.join(_plain(s) for s in steps)}: the product is "
                    f"{_plain(product)}, claimed {_plain(whole)}"
                )
    titles = ("product of decays", "is e^(A·ΣΔ)", "inside (0, 1)")
    return ClaimFinding(
        status="HOLDS" if all(row[1] and row[2] for row in rows) else "REFUTED",
        evidence=f"{len(rows)} segments of 4 steps in balls of {_BITS} bits: {sum(row[1] for row in rows)} "
        "agree",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED + 2,
    )


CLAIMS: Final = (
    Claim(
        id="MAM-1a",
        subject="state space models",
        title="selective scan: equal forms",
        statement="h_t = a_t ∘ h_{t−1} + b_t, y_t = C_t·h_t by recurrence, chunks, parallel scans and as a "
        "matrix "
        "M_ts = Σ_n C_tn (Π_{s<r≤t} a_rn) B̄_sn are equal.",
        source=f"{MAMBA}, sections 3.2 and 3.3.2",
        kind="exact",
        check=lambda lab: equal_forms(lab.choose(9, 20)),
        control=lambda lab: equal_forms(4, late=True),
        covers=("MAM-1",),
    ),
    Claim(
        id="MAM-1b",
        subject="state space models",
        title="selection is no convolution",
        statement="With Δ, B or C from the input the SSM is no convolution; with all constant it is S4D's.",
        source=f"{MAMBA}, section 3.2",
        kind="exact",
        check=lambda lab: time_invariance(lab.choose(6, 12)),
        control=lambda lab: time_invariance(4, selective=False),
    ),
    Claim(
        id="MAM-1c",
        subject="state space models",
        title="decays multiply by their steps",
        statement="With A = −e^(A_log) and Δ = softplus every decay e^(ΔA) is in (0, 1), and over a "
        "segment they multiply to e^(A·ΣΔ).",
        source=f"{MAMBA}, section 3.6, and the shipped code",
        kind="enclosure",
        check=lambda lab: exponential_decay(lab.choose(5, 40)),
        control=lambda lab: exponential_decay(2, doubled=True),
    ),
    Claim(
        id="MAM-2a",
        subject="state space models",
        title="theorem 1 with a zero-order hold",
        statement="For N = 1, A = −1, B = 1, Δ = softplus(z) the SSM is h_t = (1 − g)h_{t−1} + g·x_t with "
        "g = σ(z), discretised by zero-order hold.",
        source=f"{MAMBA}, theorem 1 and appendix C",
        kind="enclosure",
        check=lambda lab: gate_theorem(),
        control=lambda lab: gate_theorem(hold=False),
        covers=("MAM-2",),
    ),
    Claim(
        id="MAM-2b",
        subject="state space models",
        title="theorem 1 as Mamba is shipped",
        statement="Mamba's selective SSM as shipped (B̄ = ΔB) is the gated RNN of theorem 1.",
        source=f"{MAMBA}, theorem 1, read with the code of state-spaces/mamba",
        kind="enclosure",
        check=lambda lab: gate_theorem(hold=False),
        control=lambda lab: gate_theorem(hold=True),
        covers=("SEED1-6",),
    ),
    Claim(
        id="MAM-2c",
        subject="state space models",
        title="the shipped input gain",
        statement="The shipped form is h_t = (1 − g)h_{t−1} + softplus(z)·x_t, whose gain is above σ(z) "
        "and above z for all z: near σ(z) for z → −∞, without a bound for z → ∞.",
        source="derived from the code of state-spaces/mamba",
        kind="enclosure",
        check=lambda lab: input_gain(),
        control=lambda lab: input_gain(hold=True),
    ),
    Claim(
        id="MAM-2d",
        subject="state space models",
        title="the state as an average of inputs",
        statement="The state is a weighted average of its inputs and stays within their range, as shipped "
        "too.",
        source=f"a consequence of {MAMBA}, theorem 1, read with the code of state-spaces/mamba",
        kind="enclosure",
        check=lambda lab: constant_input(),
        control=lambda lab: constant_input(hold=True),
    ),
)
