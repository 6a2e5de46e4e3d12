"""Claims about the cost of sigmoid attention: operations counted by running the formulas on counting numbers.

Counts over n positions of width d are polynomials: they are found by exact interpolation and confirmed at
further n. An exponential, a hyperbolic tangent, a comparison and a quotient count as one operation each.
SIG-2, SIG-12, SIG-13, SIG-15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding, Laboratory, Plot
from attnproof.properties.claims.sigmoid import PAPER, SUBJECT
from attnproof.properties.forms import linear
from attnproof.properties.forms.base import Array, each
from attnproof.properties.forms.numbers import Tally, counted, rationals

__all__ = [
    "CLAIMS",
    "doubling_and_cost",
    "linear_time",
    "more_than_softmax",
    "operations",
    "polynomial",
    "same_order",
    "sigmoid",
    "softmax",
    "state",
]

Form = Callable[[Array, Array, Array], Array]
"""A formula of attention over q (M, d), k (n, d), v (n, d), run on counting numbers."""

# Lengths through which a polynomial is laid, and further ones at which it must agree.
_FITTED, _CONFIRMED = (1, 2, 3, 4), (5, 6, 8, 11)


def _one(x: Any) -> Any:
    """A function of one number, as one operation."""
    return x * x


def sigmoid(q: Array, k: Array, v: Array) -> Array:
    """σ(q kᵀ + b)v with σ = 1/(1 + e^−x): bias, exponential, sum, quotient; the sign and 1/√d are in q."""
    return each(lambda x: x / (x + _one(x + x)), q @ k.T) @ v


def _sign_apart(q: Array, k: Array, v: Array) -> Array:
    """The same, its sign taken score by score."""
    return each(lambda x: x / (x + _one(_one(x + x))), q @ k.T) @ v


def sigmoid_by_tanh(q: Array, k: Array, v: Array) -> Array:
    """½ + ½·tanh(x/2) as bias, tanh, and a product and a sum; the half of x is in q and the bias."""
    return each(lambda x: _one(x + x) * x + x, q @ k.T) @ v


def sigmoid_by_fma(q: Array, k: Array, v: Array) -> Array:
    """The same, its product and sum fused into one operation."""
    return each(lambda x: _one(x + x) * x, q @ k.T) @ v


def softmax(q: Array, k: Array, v: Array) -> Array:
    """Maximum, difference, exponential and sum of each row; outputs divided by the sum."""
    return _row_wise(q @ k.T, lambda weights, total: (weights @ v) / total)


def softmax_of_weights(q: Array, k: Array, v: Array) -> Array:
    """The same with every weight divided by the sum, before it meets v."""
    return _row_wise(q @ k.T, lambda weights, total: (weights / total) @ v)


def _row_wise(scores: Array, finish: Callable[[Array, Array], Array]) -> Array:
    """Rows shifted by their maximum (n − 1 comparisons, counted as sums), their exponentials and sums."""
    largest = scores.sum(axis=1, keepdims=True)
    weights = each(_one, scores - largest)
    return finish(weights, weights.sum(axis=1, keepdims=True))


def state(q: Array, k: Array, v: Array) -> Array:
    """Linear attention by its state, q(kᵀv)."""
    return linear.quadratic(q, k, v, by_state=True)


def operations(form: Form, n: int, d: int, queries: int | None = None) -> int:
    """Operations of a form over n keys of width d and as many queries, or ``queries``."""
    tally = Tally()
    m = n if queries is None else queries
    form(counted(tally, m, d), counted(tally, n, d), counted(tally, n, d))
    return tally.products + tally.sums


def polynomial(form: Form, d: int, queries: int | None = None) -> flint.fmpq_poly:
    """The polynomial in n that gives the operations of a form at width d.

    Raises:
        ArithmeticError: no polynomial of degree ≤ 3 gives the counts at the further lengths.
    """
    n = flint.fmpq_poly([0, 1])
    found = flint.fmpq_poly([0])
    for at in _FITTED:
        basis = flint.fmpq_poly([operations(form, at, d, queries)])
        for other in _FITTED:
            if other != at:
                basis *= (n - other) / (at - other)
        found += basis
    wrong = [at for at in _CONFIRMED if found(at) != operations(form, at, d, queries)]
    if wrong:
        raise ArithmeticError(f"operations at d={d}, n={wrong} are not those of the polynomial {found}")
    return found


def linear_time(form: Form = sigmoid, widths: Sequence[int] = (1, 2, 4), last: int = 32) -> ClaimFinding:
    """Does the cost grow linearly in n? By the degree of the exact count, and counts per doubling of n.

    Args:
        form: whose operations are counted; widths: d; last: largest n of the table, a power of 2.
    """
    degrees = {d: polynomial(form, d) for d in widths}
    steep = {d: found for d, found in degrees.items() if found.degree() > 1}
    lengths = [2**power for power in range(last.bit_length())]
    d = widths[0]
    counts = [int(degrees[d](n).numer()) for n in lengths]
    assert counts == [operations(form, n, d) for n in lengths]
    ratios = [1.0, *(after / before for before, after in zip(counts, counts[1:], strict=False))]
    table = {"n": lengths, "operations": counts, "over those of n/2": ratios}
    return ClaimFinding(
        status="REFUTED" if steep else "HOLDS",
        evidence="operations, counted exactly: "
        + "; ".join(f"d = {d}: {_told(found)}" for d, found in degrees.items())
        + f". The last doubling, to n = {last}, multiplies them by {ratios[-1]:.4f}",
        table=dict(table),
        plots=(
            Plot("operations against n", "line", dict(table), "n", "operations", log=("n", "operations")),
        ),
        counterexample=f"d = {d}, n = 1, 2, 4, 8, …: {', '.join(map(str, counts))} operations, "
        f"{_told(steep[d])}; {ratios[-1]:.2f} times as many for twice the length, where linear growth "
        "doubles them"
        if steep
        else "",
    )


def _told(found: flint.fmpq_poly) -> str:
    """A polynomial in n, highest power first."""
    terms = [
        f"{c}{('', '·n')[min(i, 1)]}{('', '', '²', '³')[i]}" for i, c in enumerate(found.coeffs()) if c != 0
    ]
    return " + ".join(reversed(terms)).replace("+ -", "− ") or "0"


def same_order(
    form: Form = sigmoid, other: Form = softmax, widths: Sequence[int] = (1, 2, 3, 5)
) -> ClaimFinding:
    """Are both costs 4n²d and lower terms, and O(n) for one query?

    Args:
        form, other: whose operations are counted; widths: d.
    """
    rows, wrong = [], []
    for name, one in (("sigmoid", form), ("softmax", other)):
        leading = [polynomial(one, d)[2] for d in widths]
        slopes = [
            (b - a) / (wider - d)
            for a, b, d, wider in zip(leading, leading[1:], widths, widths[1:], strict=False)
        ]
        single = max(polynomial(one, d, 1).degree() for d in widths)
        rows.append((name, float(leading[0] - widths[0] * slopes[0]), float(slopes[0]), int(single)))
        if set(slopes) != {flint.fmpq(4)} or single != 1:
            wrong.append(rows[-1])
    titles = ("family", "coefficient of n²", "coefficient of n²d", "degree in n for one query")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="; ".join(
            f"{name}: {c:g}·n² + {s:g}·n²d + lower, degree {p} for one query" for name, c, s, p in rows
        )
        + f"; d = {list(widths)}, n to {_CONFIRMED[-1]}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="; ".join(
            f"{row[0]}: {row[2]:g}·n²d, degree {row[3]} for one query" for row in wrong[:1]
        ),
    )


def _scaled(q: Array, k: Array, v: Array) -> Array:
    """n⁻¹Σ_j σ(z_j)v_j for e^z = (q·k)² + 1, over the rationals."""
    found: Array = each(lambda x: (x * x + 1) / (x * x + 2), q @ k.T) @ v / flint.fmpq(len(k))
    return found


def _scaled_state(q: Array, k: Array, v: Array) -> Array:
    """n⁻¹ q(kᵀv) over the rationals."""
    found: Array = state(q, k, v) / flint.fmpq(len(k))
    return found


def doubling_and_cost(form: Form = sigmoid, exact: Form = _scaled, width: int = 2) -> ClaimFinding:
    """Is the cost of a form linear that keeps its output when the sequence is written twice?

    Args:
        form: whose operations are counted; exact: the same form, normalised, over the rationals; width: d.
    """
    rng = np.random.default_rng(6)
    q, k, v = (rationals(rng, 4, width) for _ in range(3))
    once, twice = exact(q, k, v), exact(q, np.concatenate([k, k]), np.concatenate([v, v]))
    kept = bool((once == twice).all())
    cost = polynomial(form, width)
    lengths = (1, 2, 4, 8)
    counts = [operations(form, n, width) for n in lengths]
    status = "OPEN"
    if kept:
        status = "REFUTED" if cost.degree() > 1 else "SUPPORTED"
    return ClaimFinding(
        status=status,
        evidence=f"written twice, 4 keys (seed 6) give {'the same' if kept else 'other'} outputs exactly; "
        f"operations at d = {width}: {_told(cost)}",
        table={"n": list(lengths), "operations": counts},
        counterexample="n⁻¹Σσ(z_j)v_j keeps its outputs when the sequence is written twice, and costs "
        f"{', '.join(map(str, counts))} operations at n = {', '.join(map(str, lengths))}, d = {width}"
        if status == "REFUTED"
        else "",
        seed=6,
    )


_SIGMOIDS: Final[Mapping[str, Form]] = {
    "1/(1 + e^−x)": sigmoid,
    "1/(1 + e^−x), its sign apart": _sign_apart,
    "tanh, product and sum": sigmoid_by_tanh,
    "tanh, fused": sigmoid_by_fma,
}
_SOFTMAXES: Final[Mapping[str, Form]] = {"outputs divided": softmax, "weights divided": softmax_of_weights}


def more_than_softmax(
    sigmoids: Mapping[str, Form] = _SIGMOIDS, softmaxes: Mapping[str, Form] = _SOFTMAXES, width: int = 16
) -> ClaimFinding:
    """Has sigmoid attention more operations than softmax attention, in every way to write either?

    Args:
        sigmoids, softmaxes: ways to write each; width: d.
    """
    rows: list[tuple[str, str, int, int, str, bool]] = []
    n = 64
    for name, one in sigmoids.items():
        for other_name, other in softmaxes.items():
            first, second = polynomial(one, width), polynomial(other, width)
            more = first - second
            # Long sequences are what is asked about: the highest power decides.
            above = more.degree() >= 0 and more.coeffs()[-1] > 0
            counts = int(first(n).numer()), int(second(n).numer())
            rows.append((name, other_name, *counts, _told(more), above))
    fewer = [row for row in rows if not row[-1]]
    status = "CONDITIONAL" if fewer else "HOLDS"
    if len(fewer) == len(rows):
        status = "REFUTED"
    titles = ("sigmoid", "softmax", f"operations at n = {n}", "of softmax", "difference", "more for long n")
    return ClaimFinding(
        status=status,
        evidence=f"difference of operations at d = {width}: "
        + "; ".join(f"{name} against {other}: {more}" for name, other, _, _, more, _ in rows),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample="; ".join(
            f"n = {n}, d = {width}: {a} operations of sigmoid attention ({name}), {b} of softmax attention "
            f"({other})"
            for name, other, a, b, _, _ in fewer[:1]
        )
        + (
            ". Per score bias, exponential, sum, quotient against maximum, difference, exponential, sum"
            if fewer
            else ""
        ),
    )


def _open(reason: str) -> Callable[[Laboratory], ClaimFinding]:
    return lambda lab: ClaimFinding(status="OPEN", evidence=reason)


CLAIMS: Final = (
    Claim(
        id="SIG-2a",
        subject=SUBJECT,
        title="linear time",
        statement="The time of sigmoid attention is O(n) in the length n of the sequence, where softmax "
        "attention's is O(n²).",
        source=f"summary of {PAPER} among the source articles",
        kind="count",
        check=lambda lab: linear_time(last=lab.choose(32, 128)),
        control=lambda lab: linear_time(state),
        covers=("SEED2-1",),
    ),
    Claim(
        id="SIG-2b",
        subject=SUBJECT,
        title="order of the cost",
        statement="Sigmoid attention costs Θ(n²d) operations as softmax attention does, 4n²d in the "
        "products of matrices; one query costs O(n) in both.",
        source="counted",
        kind="count",
        check=lambda lab: same_order(),
        control=lambda lab: same_order(state, widths=(1, 2, 3)),
    ),
    Claim(
        id="SIG-2e",
        subject=SUBJECT,
        title="doubling as an argument about cost",
        statement="The sequence-doubling argument shows that the computation of sigmoid attention scales "
        "linearly.",
        source=f"summary of {PAPER} among the source articles",
        kind="count",
        check=lambda lab: doubling_and_cost(),
        control=lambda lab: doubling_and_cost(state, _scaled_state),
        covers=("SEED2-2",),
    ),
    Claim(
        id="SIG-12a",
        subject=SUBJECT,
        title="speed of FlashSigmoid",
        statement="FlashSigmoid is faster than FlashAttention-2 on H100: forward by 17.39 % (full) and "
        "18.76 % (causal), backward by 2.7 % and 6.2 %.",
        source=f"{PAPER}, abstract; README of apple/ml-sigmoid-attention",
        kind="none",
        check=_open(
            "a timing of two CUDA kernels on one H100: needed are that GPU, both kernels built for it, and "
            "timings over lengths and widths. Counted here are operations (SIG-2b, SIG-12b) and the "
            "reductions that sigmoid attention does without (SIG-9a, SIG-9b)"
        ),
        control=None,
        covers=("SIG-12", "SEED2-6"),
    ),
    Claim(
        id="SIG-12b",
        subject=SUBJECT,
        title="operations against softmax",
        statement="Sigmoid attention has slightly more floating-point operations than softmax attention.",
        source=f"{PAPER}, on FlashSigmoid (recalled)",
        kind="count",
        check=lambda lab: more_than_softmax(),
        # Only the form that spends an operation on the sign of σ's argument.
        control=lambda lab: more_than_softmax({"sign apart": _sign_apart}, {"outputs divided": softmax}),
    ),
    Claim(
        id="SIG-13",
        subject=SUBJECT,
        title="stabilisers of training",
        statement="Training with sigmoid attention at 1B parameters and n = 4096 is stable with b = −log "
        "n, QK-norm, LayerScale or a norm after attention, and not without.",
        source=f"{PAPER}, experiments",
        kind="none",
        check=_open(
            "training runs of 10⁹ parameters: needed are their code, data and GPUs. What the bias does to "
            "norms is SIG-3a to SIG-3c, to Jacobians SIG-5b"
        ),
        control=None,
    ),
    Claim(
        id="SIG-15",
        subject=SUBJECT,
        title="loss and downstream tasks",
        statement="At 1.2B and 3B parameters two changes of attention reach within 2 to 3 % of the "
        "baseline's validation loss and lose 6 to 16 points downstream; sigmoid attention is said to be "
        "one of them.",
        source="arXiv 2605.20798, abstract; a comment in third-party code",
        kind="none",
        check=_open(
            "training runs and downstream tasks of a paper of which the abstract alone was at hand, and "
            "which does not name sigmoid attention there: needed are the text, its models and its evaluation"
        ),
        control=None,
    ),
)
