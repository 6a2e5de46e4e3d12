"""Claims about linear attention: equal forms, weights that sum to one, normalisers that vanish.

Katharopoulos et al., arXiv 2006.16236; Based's and ReBased's maps as flash-linear-attention's plain code has
them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final

import flint
import numpy as np
import torch

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.equal_forms import LENGTH, Row, compared, equality, row
from attnproof.properties.forms import linear
from attnproof.properties.forms.base import Array
from attnproof.properties.forms.numbers import generic, rationals

__all__ = [
    "CLAIMS",
    "associativity",
    "averages",
    "equal_forms",
    "feature_widths",
    "lower_bound",
    "positive_in_float32",
    "vanishing",
    "weights_sum_to_one",
]

# What fast-transformers adds to the denominator.
EPSILON = flint.fmpq(1, 10**6)


def _inputs(length: int, seed: int) -> tuple[Array, Array, Array]:
    """q, k (N, 4), v (N, 3); one channel is positive, or ReLU may leave a row without any weight."""
    rng = np.random.default_rng(seed)
    q, k, v = (generic(rng, length, width) for width in (4, 4, 3))
    q[:, 0], k[:, 0] = abs(q[:, 0]) + 1, abs(k[:, 0]) + 1
    return q, k, v


def _ahead(q: Array, k: Array, v: Array, *, normalize: bool) -> tuple[Array, Any]:
    """The parallel form with a mask that lets a row see one position ahead."""
    weights = np.tril(q @ k.T, 1)
    o = weights @ v
    return (o / weights.sum(axis=1)[:, None] if normalize else o), (k.T @ v, k.sum(axis=0))


def equal_forms(length: int = LENGTH, *, ahead: bool = False) -> ClaimFinding:
    """Are the forms of linear attention equal over the rationals, with a normaliser and without?

    Args:
        ahead: give the parallel form a wrong mask.
    """
    q, k, v = _inputs(length, 1)
    rows: list[Row] = []
    for name, normalize in itertools.product(linear.FEATURES, (False, True)):
        mapped = linear.features(q, k, name, root=2)

        def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
            x, y, z = mapped[0][piece], mapped[1][piece], v[piece]  # noqa: B023
            plain = normalize  # noqa: B023
            if isinstance(form, int):
                return linear.chunkwise(x, y, z, state, chunk=form, normalize=plain)
            if ahead and form == "parallel":
                return _ahead(x, y, z, normalize=plain)
            one = linear.recurrent if form == "recurrent" else linear.parallel
            return one(x, y, z, state, normalize=plain)

        rows += compared(f"{name}{', normalised' if normalize else ''}", run, length)
    return equality(rows, seed=1)


def associativity(length: int = 9, *, causal: bool = False) -> ClaimFinding:
    """(QKᵀ)V against Q(KᵀV) for every rational feature map.

    Args:
        causal: mask the weights of the first, which no regrouping by the whole KᵀV respects.
    """
    q, k, v = _inputs(length, 2)
    rows: list[Row] = []
    for name in linear.FEATURES:
        x, y = linear.features(q, k, name, root=2)
        pairs = np.tril(x @ y.T) @ v if causal else linear.quadratic(x, y, v, by_state=False)
        rows.append(row(name, "Q(KᵀV)", pairs, [linear.quadratic(x, y, v, by_state=True)]))
    return equality(rows, seed=2)


def weights_sum_to_one(epsilon: Any = EPSILON) -> ClaimFinding:
    """With v = 1 everywhere, is the output 1? One query, one key, φ(q) = φ(k) = 10^(−j), j = 0 … 5.

    Args:
        epsilon: added to the denominator.
    """
    one, rows = np.array([[flint.fmpq(1)]], dtype=object), []
    for j in range(6):
        phi = one * flint.fmpq(1, 10**j)
        exact = linear.recurrent(phi, phi, one, normalize=True)[0][0, 0]
        mass = (phi @ phi.T)[0, 0]
        rows.append((phi[0, 0], mass, exact, linear.recurrent(phi, phi, one)[0][0, 0] / (mass + epsilon)))
    plain, shipped = all(r[2] == 1 for r in rows), all(r[3] == 1 for r in rows)
    at = rows[3]
    titles = ("φ(q) = φ(k)", "denominator", "output without ε", "output with ε")
    return ClaimFinding(
        status="HOLDS" if plain and shipped else "CONDITIONAL" if plain else "REFUTED",
        evidence=f"v = 1, ε = {epsilon}: the output is D/(D + ε), "
        + ", ".join(f"{float(r[3]):.6g} at D = {float(r[1]):g}" for r in rows)
        + f"; without ε it is 1 in {sum(r[2] == 1 for r in rows)} of {len(rows)}",
        table={title: [float(r[i]) for r in rows] for i, title in enumerate(titles)},
        counterexample=""
        if shipped
        else f"One position with φ(q) = φ(k) = {at[0]} (elu + 1 at −3 ln 10) and v = 1: D = {at[1]}, "
        f"S = {at[0]}, output {at[1]}/({at[1]} + {epsilon}) = {at[3]}. Condition: ε = 0, or D far above ε.",
    )


def _shipped(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.elu(x) + 1


def _by_cases(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def positive_in_float32(phi: Callable[[torch.Tensor], torch.Tensor] = _shipped) -> ClaimFinding:
    """Is φ(x) above 0 in float32 at every multiple of 1/64 in [−80, 0]? It is e^x > 0 over the reals."""
    x = torch.arange(-80 * 64, 1, dtype=torch.float64).div(64).float()
    y = phi(x)
    zero = x[y <= 0]
    worst = (y.double() / x.double().exp() - 1).abs()
    shown = range(0, len(x), 320)
    highest = float(zero.max()) if len(zero) else 0.0
    return ClaimFinding(
        status="CONDITIONAL" if len(zero) else "SUPPORTED",
        evidence=f"{len(x)} arguments in [−80, 0]: φ is 0 at {len(zero)} of them"
        + (
            f", all those up to x = {highest:g}; written by cases, e^x for x ≤ 0, it is not"
            if len(zero)
            else ""
        )
        + f"; largest relative error {float(worst.max()):.2g}",
        table={
            "x": [float(x[i]) for i in shown],
            "φ(x) in float32": [float(y[i]) for i in shown],
            "e^x": [float(x[i].double().exp()) for i in shown],
        },
        counterexample=""
        if not len(zero)
        else "x = −18: e^x = 1.52e-8 is below 2^-25 = 2.98e-8, half the spacing of float32 below 1. So "
        "elu(x) = e^x − 1 rounds to −1, and −1 + 1 = 0. A row whose keys are all there divides 0 by 0, or by "
        "ε.",
    )


def lower_bound(coefficients: tuple[Any, Any, Any] = (1, 1, flint.fmpq(1, 2))) -> ClaimFinding:
    """Is c_0 + c_1 x + c_2 x² at least 1/2, as a polynomial: 1/2 + (x + 1)²/2?"""
    weight = flint.fmpq_poly(list(coefficients))
    half, shifted = flint.fmpq(1, 2), flint.fmpq_poly([1, 1])
    square = shifted * shifted * half + half
    _, c1, c2 = weight.coeffs()
    place = -c1 / (2 * c2)
    least = weight(place)
    rng, low = np.random.default_rng(3), 0
    for keys in range(1, 9):
        rows = [sum(map(weight, rationals(rng, keys)), start=flint.fmpq(0)) for _ in range(20)]
        low += sum(mass < flint.fmpq(keys, 2) for mass in rows)
    good = weight == square and least == half and not low
    return ClaimFinding(
        status="HOLDS" if good else "REFUTED",
        evidence=f"the weight {weight} has its minimum {least} at x = {place}; it is "
        f"{'' if weight == square else 'not '}the polynomial 1/2 + (x + 1)²/2; of 160 random rows of 1 "
        f"to 8 keys {low} have a normaliser below i/2; at x = −1 row i has i·{weight(flint.fmpq(-1))}",
        counterexample="" if good else f"x = {place} for each of i keys: the normaliser is i·{least}.",
        seed=3,
    )


def feature_widths(
    claimed: Callable[[int], int] = lambda d: 1 + d + d * (d + 1) // 2, widths: tuple[int, ...] = (1, 2, 3)
) -> ClaimFinding:
    """Rank over the rationals of the weights 1 + x + x²/2, x = q·k: the least width of features."""
    rng, rows = np.random.default_rng(4), []
    for d in widths:
        points = 1 + d + d * d + 2
        q, k = (rationals(rng, points, d) for _ in range(2))
        x, y = linear.features(q, k, "taylor")
        weights = x @ y.T
        direct = 1 + q @ k.T + (q @ k.T) * (q @ k.T) / 2
        rank = flint.fmpq_mat([list(map(flint.fmpq, line)) for line in weights]).rank()
        rows.append((d, points, x.shape[1], rank, claimed(d), bool((weights == direct).all())))
    wrong = [r for r in rows if r[3] != r[4] or not r[5]]
    titles = ("d", "points", "width as shipped", "rank", "claimed", "weights are 1 + x + x²/2")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="rank of the weights at random rational queries and keys, against the shipped width 1 + d + "
        "d²: " + ", ".join(f"{r[3]} of {r[2]} at d = {r[0]}" for r in rows),
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=f"d = {wrong[0][0]}: rank {wrong[0][3]}, claimed {wrong[0][4]}" if wrong else "",
        seed=4,
    )


def _normalisers(name: str) -> list[tuple[Array, Array, Any, Any]]:
    """q, k, normaliser and output (None at 0) of one query and two keys of {−1, 0, 1}², v = 1, 2."""
    line = [np.array(pair, dtype=object) * flint.fmpq(1) for pair in itertools.product((-1, 0, 1), repeat=2)]
    v, rows = np.array([flint.fmpq(1), flint.fmpq(2)], dtype=object), []
    for q, first, second in itertools.product(line, repeat=3):
        x, y = linear.features(np.array([q, q]), np.array([first, second]), name)
        weights = (x @ y.T)[0]
        mass = weights[0] + weights[1]
        rows.append((q, np.array([first, second]), mass, (weights @ v) / mass if mass != 0 else None))
    return rows


def _texts(q: Array, k: Array) -> str:
    def one(x: Array) -> str:
        return "(" + ", ".join(map(str, x)) + ")"

    return f"q = {one(q)}, keys {one(k[0])} and {one(k[1])}"


def vanishing(name: str) -> ClaimFinding:
    """Is the normaliser ever exactly 0 for this map? All queries and pairs of keys of {−1, 0, 1}²."""
    rows = _normalisers(name)
    # The telling ones: neither the query nor a key is 0.
    zero = [r for r in rows if r[2] == 0]
    telling = [r for r in zero if any(r[0]) and all(any(key) for key in r[1])]
    return ClaimFinding(
        status="REFUTED" if zero else "SUPPORTED",
        evidence=f"{name}: normaliser 0 in {len(zero)} of {len(rows)} cases, {len(telling)} of them with no "
        f"query or key 0; least normaliser {min(r[2] for r in rows)}",
        table={"cases": [len(rows)], "normaliser 0": [len(zero)], "no operand 0": [len(telling)]},
        counterexample=""
        if not zero
        else f"{_texts(*telling[0][:2])}: both weights are 0, the normaliser 0 + 0. With 1e-6 added the "
        "output is 0/1e-6 = 0, which is no mean of the values 1 and 2.",
    )


def averages(name: str) -> ClaimFinding:
    """Does the output stay between the values 1 and 2? All queries and pairs of keys of {−1, 0, 1}²."""
    rows = _normalisers(name)
    zero = [r for r in rows if r[3] is None]
    negative = [r for r in rows if r[2] < 0]
    outside = [r for r in rows if r[3] is not None and not 1 <= r[3] <= 2]
    text = ""
    if zero and outside:
        text = (
            f"Values 1 and 2. {_texts(*outside[0][:2])}: normaliser {outside[0][2]}, output {outside[0][3]}. "
            f"{_texts(*next(r for r in zero if any(r[0]) and any(r[1][0]))[:2])}: q·(k_1 + k_2) = 0, "
            "division by 0, or by 1e-10 where that is added."
        )
    return ClaimFinding(
        status="REFUTED" if zero or outside else "SUPPORTED",
        evidence=f"{name}: of {len(rows)} cases the normaliser is 0 in {len(zero)}, negative in "
        f"{len(negative)}, and the output leaves [1, 2] in {len(outside)} of the others",
        table={
            "cases": [len(rows)],
            "normaliser 0": [len(zero)],
            "negative": [len(negative)],
            "outside": [len(outside)],
        },
        counterexample=text,
    )


_KATHAROPOULOS = "Katharopoulos et al. 2020, arXiv 2006.16236, section 3"
_FLA = "flash-linear-attention, plain code of Based and ReBased (arXiv 2402.18668, 2402.10644)"

CLAIMS: Final = (
    Claim(
        id="LIN-1a",
        subject="linear attention",
        title="equal forms",
        statement="The recurrence S_i = S_{i−1} + φ(k_i)v_iᵀ, z_i = z_{i−1} + φ(k_i), o_i = S_iᵀφ(q_i) (over "
        "φ(q_i)·z_i where normalised), its masked parallel form and its chunkwise form are equal for every "
        "chunk length, and a state handed over anywhere changes nothing.",
        source=f"{_KATHAROPOULOS}, equations 8 to 12",
        kind="exact",
        check=lambda lab: equal_forms(lab.choose(7, LENGTH)),
        control=lambda lab: equal_forms(7, ahead=True),
    ),
    Claim(
        id="LIN-1b",
        subject="linear attention",
        title="associativity",
        statement="Without a mask (φ(Q)φ(K)ᵀ)V = φ(Q)(φ(K)ᵀV). (The control masks: then it is false, and "
        "causal linear attention needs the recurrence.)",
        source=f"{_KATHAROPOULOS}, equation 6",
        kind="exact",
        check=lambda lab: associativity(lab.choose(9, 30)),
        control=lambda lab: associativity(9, causal=True),
    ),
    Claim(
        id="LIN-1c",
        subject="linear attention",
        title="weights sum to one",
        statement="Normalised linear attention, as shipped with ε = 1e-6 added to its denominators, takes a "
        "mean of the values: its weights sum to one.",
        source="fast-transformers, causal and full linear attention; the paper's definition has no ε",
        kind="exact",
        check=lambda lab: weights_sum_to_one(),
        control=lambda lab: weights_sum_to_one(flint.fmpq(0)),
    ),
    Claim(
        id="LIN-1d",
        subject="linear attention",
        title="elu + 1 is positive",
        statement="φ(x) = elu(x) + 1 is positive, so that no normaliser vanishes (float32, as shipped).",
        source=f"{_KATHAROPOULOS}.2.1; fast-transformers",
        kind="search",
        check=lambda lab: positive_in_float32(),
        control=lambda lab: positive_in_float32(_by_cases),
    ),
    Claim(
        id="LIN-6a",
        subject="linear attention",
        title="Based's normaliser",
        statement="Based's weight 1 + x + x²/2 = 1/2 + (x + 1)²/2 is at least 1/2, attained at x = −1, so "
        "the normaliser of row i is at least i/2.",
        source=f"{_FLA}; the bound is derived",
        kind="exact",
        check=lambda lab: lower_bound(),
        control=lambda lab: lower_bound((1, 1, flint.fmpq(1, 4))),
    ),
    Claim(
        id="LIN-6b",
        subject="linear attention",
        title="ReBased's normaliser",
        statement="ReBased's weights (q·k)² are squares, so its normaliser does not vanish.",
        source=_FLA,
        kind="search",
        check=lambda lab: vanishing("squared"),
        control=lambda lab: vanishing("taylor"),
    ),
    Claim(
        id="LIN-6c",
        subject="linear attention",
        title="width of Based's features",
        statement="Weights 1 + x + x²/2 need features of width 1 + d + d(d + 1)/2 and no more (shipped code "
        "takes 1 + d + d², every mixed product twice).",
        source=_FLA,
        kind="exact",
        check=lambda lab: feature_widths(widths=lab.choose((1, 2, 3), (1, 2, 3, 4, 5))),
        control=lambda lab: feature_widths(lambda d: 1 + d + d * d),
    ),
    Claim(
        id="LIN-7",
        subject="linear attention",
        title="normalisation without positive features",
        statement="Dividing by q·z + 1e-10 makes the output a weighted mean of the values whatever the "
        "feature map, the identity included.",
        source="flash-linear-attention, optional normalisation of plain linear attention",
        kind="search",
        check=lambda lab: averages("identity"),
        control=lambda lab: averages("taylor"),
    ),
)
