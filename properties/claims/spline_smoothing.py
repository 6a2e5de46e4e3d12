"""Claims about smooth functions in place of ReLU: SoftPlus converges to it, softmax is another function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding, Plot
from attnproof.properties.claims.spline_networks import (
    RELU,
    Activation,
    Encoder,
    line,
    on,
    row_normalised,
    softmax,
)
from attnproof.properties.claims.spline_pieces import decompose
from attnproof.properties.claims.splines import SOURCE, SUBJECT
from attnproof.properties.forms.base import Array, each, filled
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "CLAIMS",
    "attention_error",
    "hard_attention",
    "rate",
    "softmax_as_limit",
    "softplus",
    "supremum",
]

BITS: Final = 1024
"""Bounds are nearly attained: distances of 10⁻⁴⁶ differ from theirs by 10⁻⁹²."""
_END = 40
"""Errors beyond β|x| = 40 are bounded by (1 + 40)·e⁻⁴⁰ < 2·10⁻¹⁶."""
_CELLS = 640


def softplus(beta: Any) -> Callable[[Array], Array]:
    """ln(1 + e^{βx})/β of rationals or balls, as balls: max(x, 0) + ln(1 + e^{−β|x|})/β."""

    def one(x: Any) -> Any:
        ball, factor = flint.arb(x), flint.arb(beta)
        return ball.max(flint.arb(0)) + (-factor * abs(ball)).exp().log1p() / factor

    return lambda x: each(one, x)


def _softplus_error(u: Any) -> Any:
    """SoftPlus₁ − ReLU at |x| = u: ln(1 + e^{−u}), at most e^{−u}."""
    return (1 + (-u).exp()).log()


def _silu_error(u: Any) -> Any:
    """ReLU − x·σ(x) at |x| = u: u/(1 + e^u), at most u·e^{−u}."""
    return u / (1 + u.exp())


def supremum(error: Callable[[Any], Any] = _softplus_error) -> ClaimFinding:
    """SPL-7a: does an error e(β|x|)/β decrease in |x|, from ln 2/β at x = 0?

    Args:
        error: e as a function of u ≥ 0 on Arb's power series, at most (1 + u)·e^{−u}.
    """
    with _precision(BITS):
        steps, rising, upper, lower = [], 0, flint.arb(0), flint.arb(0)
        for i in range(_CELLS):
            low, high = (flint.fmpq(_END * k, _CELLS) for k in (i, i + 1))
            cell = flint.arb(low).union(flint.arb(high))
            series = error(flint.arb_series([cell, 1], 2))
            rising += not series[1] < 0
            upper = upper.max(series[0].upper())
            lower = lower.max(error(flint.arb_series([flint.arb(low)], 1))[0])
            steps.append(float(low))
        tail = (1 + _END) * flint.arb(-_END).exp()
        at_zero, log2 = error(flint.arb_series([0], 1))[0], flint.arb.const_log2()
        sup = at_zero if rising == 0 and tail < at_zero else lower.union(upper.max(tail))
        exact = rising == 0 and bool(at_zero.overlaps(log2)) and bool((at_zero - log2).abs_upper() < 1e-60)
        t = np.linspace(-4.0, 4.0, 97)
        errors = [
            (float(x), float(error(flint.arb_series([beta * abs(float(x))], 1))[0]) / beta, beta)
            for beta in (1, 4, 16)
            for x in t
        ]
        return ClaimFinding(
            status="HOLDS" if exact else "REFUTED",
            evidence="with u = β|x| the error is e(u)/β for every β > 0; the enclosed derivative of e is "
            f"negative on {_CELLS - rising} of {_CELLS} intervals that cover 0 ≤ u ≤ {_END}, and e(u) ≤ "
            f"{tail.str(3)} beyond; e(0) = {at_zero.str(20)}, ln 2 = {log2.str(20)}; supremum of e: "
            f"{sup.str(10)}",
            table={
                "β": [1, 10, 100],
                "supremum": [float(sup.mid()) / beta for beta in (1, 10, 100)],
                "ln 2/β": [math.log(2) / beta for beta in (1, 10, 100)],
            },
            plots=(
                Plot(
                    "error of the smoothing against x",
                    "line",
                    {
                        "x": [e[0] for e in errors],
                        "error": [e[1] for e in errors],
                        "β": [e[2] for e in errors],
                    },
                    x="x",
                    y="error",
                    color="β",
                ),
            ),
            counterexample="" if exact else f"the supremum of β·error is {sup.str(10)}, and ln 2 = 0.6931…",
        )


def attention_error(trials: int, *, slack: int = 1) -> ClaimFinding:
    """SPL-7b: SoftPlus attention against ReLU attention and Σ_j |v_j| ln 2/β; and where it is attained.

    Args:
        trials: random rational problems of 4 keys for each β; the last has scores 0 and values > 0.
        slack: SoftPlus is taken at β/slack.
    """
    rng, rows, worst = np.random.default_rng(15), [], ""
    with _precision(BITS):
        for beta in (1, 10, 100, 1000):
            shares = []
            for trial in range(trials):
                scores, v = rationals(rng, 4, denominator=7 * beta), rationals(rng, 4)
                if trial == trials - 1:
                    scores, v = scores * flint.fmpq(0), each(abs, v) + flint.fmpq(1)
                smooth = softplus(flint.fmpq(beta, slack))(scores) @ v
                error = abs(smooth - RELU.weigh(scores, np.ones(4, dtype=bool)) @ v)
                most = flint.arb.const_log2() * sum(each(abs, v)) / beta
                shares.append(error / most)
                if error > most and not worst:
                    worst = (
                        f"β = {beta}, scores {', '.join(map(str, scores))}, values "
                        f"{', '.join(map(str, v))}: error {error.str(6)}, bound {most.str(6)}"
                    )
            largest = max(float(share.mid()) for share in shares[:-1])
            inside = sum(bool(share <= 1) for share in shares[:-1])
            rows.append((beta, trials - 1, inside, largest, bool((shares[-1] - 1).contains(0))))
    proved = all(row[1] == row[2] and row[4] for row in rows)
    titles = ("β", "problems", "within the bound", "largest share of it", "attained at scores 0")
    return ClaimFinding(
        status="HOLDS" if proved else "REFUTED" if worst else "OPEN",
        evidence=f"{sum(row[1] for row in rows)} rational problems of 4 keys at 4 values of β, errors in "
        f"balls of {BITS} bits: {sum(row[2] for row in rows)} within the bound, largest share "
        f"{max(row[3] for row in rows):.6g}; at scores 0 and positive values error and bound are the same "
        f"number at {sum(row[4] for row in rows)} of 4",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=worst,
        seed=15,
    )


_ONE_KEY = """One query, one key, value v = 1. Softmax of one score is 1 for every β: the output is 1.
ReLU attention gives relu(s)·1: 1 for the score s = 1 and 2 for s = 2.
A factor c(β) does not help: max(|c − 1|, |c − 2|) ≥ 1/2 for every c.
"""


def softmax_as_limit(weigh: Callable[[Any], Callable[[Array], Array]]) -> ClaimFinding:
    """SPL-7c: two problems of one key, the best common factor c for each β.

    Args:
        weigh: β to a function from the scores (1, 1) to weights.
    """
    betas = [10**k for k in range(5)]
    errors, good = [], True
    with _precision(BITS):
        for beta in betas:
            first, second = (flint.arb(weigh(beta)(filled((1, 1), [flint.fmpq(s)]))[0, 0]) for s in (1, 2))
            # c·first − 1 = 2 − c·second: the errors of the best c are equal.
            error = abs(3 * first / (first + second) - 1)
            errors.append(error)
            good = good and bool(error <= 2 * flint.arb.const_log2() / beta)
    shown = [float(error.mid()) for error in errors]
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence="scores 1 and 2, one key, value 1; least error over all common factors at β = "
        + ", ".join(f"{beta}: {error:.6g}" for beta, error in zip(betas, shown, strict=True)),
        table={"β": betas, "least error": shown},
        plots=(
            Plot("least error against β", "line", {"β": betas, "error": shown}, "β", "error", log=("β",)),
        ),
        counterexample="" if good else _ONE_KEY + f"Computed: {', '.join(f'{x:.6g}' for x in shown)}.",
    )


def _softmax_of(beta: Any) -> Callable[[Array], Array]:
    def weigh(scores: Array) -> Array:
        scaled = each(lambda s: s * flint.fmpq(beta), scores)
        return softmax(scaled, np.ones(scores.shape, dtype=bool))

    return weigh


def _average_of_maxima(scores: Array) -> Array:
    """1/m at each of m largest scores of the only row."""
    largest = [bool(score == max(scores.flat)) for score in scores.flat]
    return filled(scores.shape, [flint.fmpq(int(is_max), sum(largest)) for is_max in largest])


def _proportional(scores: Array) -> Array:
    """ReLU divided by its sum."""
    return row_normalised(scores, np.ones(scores.shape, dtype=bool))


_LIMIT_PROOF: Final = (
    "For all: in units of the largest, weights are 1 at the m maxima and sum to r ≤ (n − m)e^{−βδ} "
    "elsewhere. "
    "The maxima are off by m(1/m − 1/(m + r)) = r/(m + r), the others by r/(m + r): 2r/(m + r) ≤ 2r/m "
    "together"
)


def hard_attention(trials: int, limit: Callable[[Array], Array] = _average_of_maxima) -> ClaimFinding:
    """SPL-7d: Σ|softmax(βs) − limit| against 2(n − m)/m·e^{−βδ}, for n scores with m maxima and gap δ."""
    rng, rows, worst = np.random.default_rng(16), [], ""
    undecided = 0
    with _precision(BITS):
        for beta in (1, 4, 16, 64):
            distances, beyond = [], 0
            for _ in range(trials):
                scores = rationals(rng, 1, 6, low=-4, high=4, denominator=3)
                ordered = sorted(set(scores.flat))
                if len(ordered) < 2:
                    continue
                m = sum(score == ordered[-1] for score in scores.flat)
                gap = flint.arb(ordered[-1] - ordered[-2])
                most = flint.arb(2 * (6 - m)) / m * (-beta * gap).exp()
                apart = _softmax_of(beta)(scores) - limit(scores)
                distance = sum((abs(flint.arb(x)) for x in apart.flat), flint.arb(0))
                distances.append(float(distance.mid()))
                undecided += not (distance <= most or distance > most)
                if distance > most:
                    beyond += 1
                    worst = worst or (
                        f"β = {beta}, scores {', '.join(map(str, scores.flat))}: distance "
                        f"{distance.str(6)}, bound {most.str(6)}"
                    )
            rows.append((beta, max(distances), beyond))
    return ClaimFinding(
        status="REFUTED" if worst else "OPEN" if undecided else "HOLDS",
        evidence=f"{trials} rows of 6 rational scores, ties among them, at each of 4 values of β, in "
        f"balls: {sum(row[2] for row in rows)} beyond the bound; largest distances "
        + ", ".join(f"{row[1]:.3g} at β = {row[0]}" for row in rows)
        + ("" if worst or undecided else f". {_LIMIT_PROOF}"),
        table={title: [row[i] for row in rows] for i, title in enumerate(("β", "distance", "beyond"))},
        counterexample=worst,
        seed=16,
    )


def _smooth_activation(beta: int) -> Activation:
    return Activation(rectify=softplus(beta))


def _softmax_activation(beta: int) -> Activation:
    return Activation(
        rectify=softplus(beta),
        weights=lambda scores, keep: softmax(each(lambda s: s * flint.arb(beta), scores), keep),
    )


def rate(points: int, activation: Callable[[int], Activation] = _smooth_activation) -> ClaimFinding:
    """SPL-7e: largest error of encoders on a random line against β, for one and two blocks.

    Away from breakpoints the error falls exponentially; those within 2^-100 of breakpoints decide.

    Args:
        points: breakpoints of the ReLU encoder in |t| ≤ 2 at most, taken from the left.
        activation: the smooth one for each β.
    """
    betas = [10**k for k in range(3, 8)]
    rows, slopes, found = [], [], []
    with _precision(BITS):
        for layers in (1, 2):
            rng = np.random.default_rng([17, layers])
            network, directions = Encoder.random(rng, 2, layers, wide=3, residual=True), line(rng, 2, 2)
            ends = [piece.right for piece in decompose(network, directions)]
            middles = [(root.low + root.high) / 2 for root in ends if root is not None]
            places = [t for t in middles if abs(t) <= 2][:points]
            found.append(len(places))
            inputs = [on(directions, t) for t in places]
            exact = [network(x, RELU) for x in inputs]
            errors = []
            for beta in betas:
                smooth = [network(x, activation(beta)) for x in inputs]
                balls = [abs(e) for a, b in zip(smooth, exact, strict=True) for e in (a - b).flat]
                errors.append(max(float(ball.abs_upper()) for ball in balls))
            rows += [(layers, beta, error) for beta, error in zip(betas, errors, strict=True)]
            slopes.append(float(np.polyfit(np.log(betas), np.log(errors), 1)[0]))
    good = all(abs(slope + 1) < 0.05 for slope in slopes)
    return ClaimFinding(
        status="SUPPORTED" if good else "REFUTED",
        evidence=f"random encoder blocks (n = d = 2, 3 hidden units, residuals), at {found[0]} and "
        f"{found[1]} breakpoints in |t| ≤ 2, to within 2⁻¹⁰⁰, β = 10³ … 10⁷: largest errors "
        + ", ".join(
            f"{row[2]:.3g} (t = {row[0]}, β = {row[1]})" for row in rows if row[1] in (betas[0], betas[-1])
        )
        + f"; they go as β^{slopes[0]:.3f} and β^{slopes[1]:.3f}",
        table={title: [row[i] for row in rows] for i, title in enumerate(("layers", "β", "largest error"))},
        plots=(
            Plot(
                "largest error of encoders with a smooth activation",
                "line",
                {name: [row[i] for row in rows] for i, name in enumerate(("layers", "β", "error"))},
                x="β",
                y="error",
                color="layers",
                log=("β", "error"),
            ),
        ),
        counterexample=""
        if good
        else f"errors by layers and β: {[(r[0], r[1], float(f'{r[2]:.3g}')) for r in rows]}",
        seed=17,
    )


CLAIMS: Final = (
    Claim(
        id="SPL-7a",
        subject=SUBJECT,
        title="SoftPlus is within ln 2/β of ReLU",
        statement="sup over x of |ln(1 + e^{βx})/β − max(x, 0)| is ln 2/β exactly, attained at x = 0, for "
        "every β.",
        source=SOURCE + "smoothing by SoftPlus (as reported); constant derived",
        kind="enclosure",
        check=lambda lab: supremum(),
        control=lambda lab: supremum(_silu_error),
        covers=("SPL-7",),
    ),
    Claim(
        id="SPL-7b",
        subject=SUBJECT,
        title="SoftPlus attention is within Σ|v_j| ln 2/β of ReLU attention",
        statement="|Σ_j (SoftPlus_β(s_j) − relu(s_j))·v_j| ≤ Σ_j |v_j|·ln 2/β, with equality for scores "
        "0 and values of one sign.",
        source="derived; " + SOURCE + "smoothing",
        kind="enclosure",
        check=lambda lab: attention_error(lab.choose(24, 400)),
        control=lambda lab: attention_error(4, slack=2),
    ),
    Claim(
        id="SPL-7c",
        subject=SUBJECT,
        title="softmax smooths ReLU: a limit recovers the spline",
        statement="Softmax is a smoothing of ReLU: c(β)·softmax(βS)·V tends to relu(S)·V as β → ∞, for "
        "some factor c(β).",
        source=SOURCE + "abstract, read as a limit (fourth source article)",
        kind="enclosure",
        check=lambda lab: softmax_as_limit(_softmax_of),
        control=lambda lab: softmax_as_limit(softplus),
        covers=("SEED3-7",),
    ),
    Claim(
        id="SPL-7d",
        subject=SUBJECT,
        title="the limit of softmax(βS) is the average of the maxima",
        statement="A row of softmax(βs) tends to 1/m at its m largest scores: the sum of absolute "
        "differences is at "
        "most 2(n − m)/m·e^{−βδ}, δ the gap to the next score.",
        source="derived; corrects SPL-7c",
        kind="enclosure",
        check=lambda lab: hard_attention(lab.choose(40, 400)),
        control=lambda lab: hard_attention(10, _proportional),
    ),
    Claim(
        id="SPL-7e",
        subject=SUBJECT,
        title="encoders with SoftPlus converge as 1/β",
        statement="On bounded sets an encoder with SoftPlus_β in place of every ReLU tends to the ReLU "
        "encoder, its error falling as 1/β.",
        source="derived; " + SOURCE + "smoothing",
        kind="measurement",
        check=lambda lab: rate(lab.choose(9, 41)),
        control=lambda lab: rate(3, _softmax_activation),
    ),
)
