"""Claims about linear attention: equal forms, ranks, recall, costs, vanishing normalisers. Theory.md "
"LIN-1 to 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import ClaimFinding
from attnproof.properties.forms import linear
from attnproof.properties.forms.base import Array, difference
from attnproof.properties.forms.numbers import Tally, counted, rationals

__all__ = [
    "LENGTH",
    "Run",
    "compared",
    "costs",
    "equal_forms",
    "equality",
    "findings",
    "full_rank",
    "kernel_of_the_state",
    "recall",
    "row",
    "vanishing",
]

LENGTH = 19
"""Positions of the exact comparisons: chunks of 3 and of 16 have a ragged tail."""

Run = Callable[[str | int, slice, Any], tuple[Array, Any]]
"""A family's form ("recurrent", "parallel", or a chunk's length) over a slice of its inputs, from a state."""

Row = tuple[str, str, int, bool, float]
_SOURCE = "theory.md {}"
_BITS = 1024


def _arrays(result: Any) -> list[Array]:
    """The arrays of a nested tuple of arrays and numbers."""
    if isinstance(result, tuple):
        return [array for part in result for array in _arrays(part)]
    return [np.asarray(result, dtype=object).reshape(-1)]


def compared(variant: str, run: Run, length: int = LENGTH, *, parallel: bool = True) -> list[Row]:
    """Every form against the recurrence, and the state handed over at every split, the empty ones included.

    The second part runs in another form (chunks of 3) than the first. Rows: variant, form, numbers compared,
    whether all are equal, largest difference.
    """
    whole = slice(0, length)
    reference = run("recurrent", whole, None)
    forms: list[str | int] = [*(["parallel"] if parallel else []), 1, 3, 16, length]
    rows = [
        row(variant, form if isinstance(form, str) else f"C = {form}", reference, [run(form, whole, None)])
        for form in forms
    ]
    handed = []
    for split in range(length + 1):
        first, state = run("recurrent", slice(0, split), None)
        second, state = run(3, slice(split, length), state)
        handed.append((np.concatenate([first, second]), state))
    return [*rows, row(variant, "handed over at every split", reference, handed)]


def row(variant: str, form: str, reference: Any, results: Iterable[Any]) -> Row:
    """One comparison: each of ``results`` (nested tuples of arrays) with ``reference``, number by number."""
    pairs = [pair for result in results for pair in zip(_arrays(reference), _arrays(result), strict=True)]
    apart = [difference(x, y) for x, y in pairs]
    return (variant, form, sum(x.size for x, _ in pairs), all(d == 0 for d in apart), float(max(apart)))


def equality(name: str, statement: str, source: str, rows: Sequence[Row]) -> ClaimFinding:
    """HOLDS if every comparison is exactly equal."""
    wrong = [f"{variant}, {form}: {apart:.3g}" for variant, form, _, same, apart in rows if not same]
    variants = list(dict.fromkeys(row[0] for row in rows))
    titles = ("variant", "form", "numbers compared", "equal", "largest difference")
    return ClaimFinding(
        name=name,
        status="REFUTED" if wrong else "HOLDS",
        statement=statement,
        source=source,
        evidence=f"{sum(row[2] for row in rows)} rational numbers of {len(rows)} comparisons over "
        f"{len(variants)} variants: " + ("differs in " + "; ".join(wrong[:5]) if wrong else "no difference"),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
    )


def equal_forms(length: int = LENGTH) -> ClaimFinding:
    """Are the forms of linear attention equal over the rationals, with a normaliser and without?"""
    rng = np.random.default_rng(1)
    q, k, v = (rationals(rng, length, width) for width in (4, 4, 3))
    # One positive channel, or ReLU may leave a row without any weight.
    q[:, 0], k[:, 0] = abs(q[:, 0]) + 1, abs(k[:, 0]) + 1
    rows: list[Row] = []
    for name, normalize in itertools.product(linear.FEATURES, (False, True)):
        mapped = linear.features(q, k, name, root=2)

        def run(form: str | int, piece: slice, state: Any) -> tuple[Array, Any]:
            x, y, z = mapped[0][piece], mapped[1][piece], v[piece]  # noqa: B023
            plain = normalize  # noqa: B023
            if isinstance(form, int):
                return linear.chunkwise(x, y, z, state, chunk=form, normalize=plain)
            one = linear.recurrent if form == "recurrent" else linear.parallel
            return one(x, y, z, state, normalize=plain)

        rows += compared(f"{name}{', normalised' if normalize else ''}", run, length)
    return equality(
        "linear attention: equal forms",
        "Linear attention's recurrent, parallel and chunkwise forms are equal for every chunk length, with a "
        "normaliser and without, and a state handed over anywhere changes nothing.",
        _SOURCE.format("LIN-1, LIN-6"),
        rows,
    )


def full_rank(sizes: Sequence[int] = (8, 12, 16)) -> ClaimFinding:
    """Is the matrix e^(q_i k_j) of full rank for n distinct numbers, and a feature map's not?"""
    rows, wrong = [], []
    for n in sizes:
        points = [flint.fmpq(2 * i - n + 1, n - 1) for i in range(n)]
        with _precision(_BITS):
            entries = [[(flint.arb(x) * flint.arb(y)).exp() for y in points] for x in points]
            determinant = flint.arb_mat(entries).det()
        # q_i = i, k_j = j log 2: an integer matrix.
        whole = flint.fmpz_mat([[flint.fmpz(2) ** (i * j) for j in range(n)] for i in range(n)]).det()
        floats = np.array([[float(x.mid()) for x in row] for row in entries])
        x = np.array([[point] for point in points], dtype=object)
        a, b = linear.features(x, x, "taylor")
        mapped = flint.fmpq_mat([list(map(flint.fmpq, row)) for row in a @ b.T]).rank()
        if not (determinant > 0 and whole > 0 and mapped == a.shape[1]):
            wrong.append(n)
        rows.append((n, float(determinant.mid()), int(np.linalg.matrix_rank(floats)), mapped))
    titles = ("n", "determinant, equispaced in [−1, 1]", "rank by float64", "rank of 1 + x + x²/2")
    misled = [row[0] for row in rows if row[2] < row[0]]
    return ClaimFinding(
        name="linear attention: no finite feature map is softmax's",
        status="REFUTED" if wrong else "HOLDS",
        statement="n distinct numbers give a matrix e^(q_i k_j) of full rank n, so no feature map of a "
        "finite "
        "width has its weights for every n; a map of width F gives rank F at most.",
        source="derived: the kernel e^(xy) is strictly totally positive; " + _SOURCE.format("LIN-3"),
        evidence=f"determinants proved positive in balls of {_BITS} bits, and in integers for q_i = i, "
        f"k_j = j·log 2, at n = {list(sizes)}: smallest {min(row[1] for row in rows):.3g}; float64 takes the "
        f"matrix for rank-deficient at n = {misled}; the Taylor map of width 3 has rank "
        f"{sorted({row[3] for row in rows})}" + (f"; wrong at n = {wrong}" if wrong else ""),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
    )


def _exact_recall_error(n: int, width: int = 4) -> flint.fmpq:
    """Mean of ‖Sᵀk_1 − v_1‖² over all keys ±1/√width (a rational root), v of norm 1."""
    root = flint.fmpq(int(width**0.5))
    values = [[flint.fmpq(a, 5), flint.fmpq(b, 5)] for a, b in ((3, 4), (5, 0), (-4, 3), (0, -5))]
    v = np.array([values[j % 4] for j in range(n)], dtype=object)
    signs = list(itertools.product((1, -1), repeat=width))
    total, count = flint.fmpq(0), 0
    # The first key is all ones: turning signs of a channel in all keys changes no product.
    for others in itertools.product(signs, repeat=n - 1):
        k = np.array([(1,) * width, *others], dtype=object) / root
        _, (state, _) = linear.parallel(k, k, v)
        off = k[0] @ state - v[0]
        total, count = total + off @ off, count + 1
    return total / count


def recall(lengths: Sequence[int] = (16, 64, 256), width: int = 64, trials: int = 24) -> ClaimFinding:
    """Is the mean square error of recall (n − 1)/d for random unit keys? Exactly for signs, sampled else."""
    exact = {n: _exact_recall_error(n) == flint.fmpq(n - 1, 4) for n in (1, 2, 3)}
    rng = np.random.default_rng(2)
    rows, outside = [], []
    for n in lengths:
        found = []
        for _ in range(trials):
            k = rng.standard_normal((n, width))
            k /= np.sqrt((k * k).sum(axis=1, keepdims=True))
            v = rng.choice((-1.0, 1.0), (n, width))
            found.append(float(((k @ (k.T @ v) - v) ** 2).mean()))
        mean, deviation = float(np.mean(found)), float(np.std(found) / trials**0.5)
        if abs(mean - (n - 1) / width) > 5 * deviation:
            outside.append(n)
        rows.append((n, mean, deviation, (n - 1) / width))
    told = "; ".join(f"n = {n}: {mean:.4f} ± {s:.4f} for {due:.4f}" for n, mean, s, due in rows)
    titles = ("n", "mean square error of recall", "standard error", "(n − 1)/d")
    return ClaimFinding(
        name="linear attention: error of recall",
        status="REFUTED" if outside or not all(exact.values()) else "SUPPORTED",
        statement="Reading the unnormalised state with one of n random unit keys of width d gives its value "
        "with a mean square error of (n − 1)/d of the value's.",
        source="derived: E(k·k')² = 1/d; " + _SOURCE.format("LIN-4"),
        evidence="exactly (n − 1)/4 over all keys of signs of width 4 for n in "
        f"{[n for n in exact if exact[n]]}; "
        f"sampled on the sphere of width {width}, {trials} draws: {told}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
    )


def kernel_of_the_state(
    shapes: Sequence[tuple[int, int, int]] = ((3, 4, 2), (6, 3, 2), (9, 2, 3)),
) -> ClaimFinding:
    """How many dimensions of V does the state lose? The rank of V → S over the rationals, (n, d_k, d_v)."""
    rng, rows = np.random.default_rng(3), []
    for n, d, e in shapes:
        for dependent in (False, True):
            k = rationals(rng, n, d)
            if dependent:
                k[:, -1] = 2 * k[:, 0]
            columns = []
            for place in range(n * e):
                v = np.zeros(n * e, dtype=object)
                v[place] = flint.fmpq(1)
                _, (state, _) = linear.parallel(k, k, v.reshape(n, e))
                columns.append([flint.fmpq(x) for x in state.flat])
            rank_of_keys = flint.fmpq_mat([list(row) for row in k]).rank()
            lost = n * e - flint.fmpq_mat(columns).rank()
            rows.append((n, d, e, rank_of_keys, lost, (n - rank_of_keys) * e))
    wrong = [row for row in rows if row[4] != row[5]]
    titles = ("n", "d_k", "d_v", "rank of K", "dimensions of V lost", "(n − rank K)·d_v")
    return ClaimFinding(
        name="linear attention: what the state forgets",
        status="REFUTED" if wrong else "HOLDS",
        statement="For given keys the state KᵀV loses exactly (n − rank K)·d_v dimensions of the n·d_v of V.",
        source="derived; " + _SOURCE.format("LIN-4"),
        evidence=f"ranks over the rationals of {len(rows)} maps V → S, lost: "
        + ", ".join(f"{row[4]} of {row[0] * row[2]}" for row in rows),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
    )


def _operations(n: int, d: int, *, by_state: bool) -> int:
    tally = Tally()
    linear.quadratic(*(counted(tally, n, d) for _ in range(3)), by_state=by_state)
    return tally.products + tally.sums


def costs(widths: Sequence[int] = (2, 4, 8)) -> ClaimFinding:
    """From which N on does the state cost fewer operations than the weights? Counted in the forms."""
    rows, wrong = [], []
    for d in widths:
        even = next(
            n
            for n in range(1, 4 * d)
            if _operations(n, d, by_state=True) <= _operations(n, d, by_state=False)
        )
        for n in (even // 2, even, 2 * even, 4 * even):
            state, pairs = (_operations(n, d, by_state=way) for way in (True, False))
            rows.append((d, n, state, pairs))
            if (state < pairs) is not (n > d) or (state == pairs) is not (n == d):
                wrong.append((d, n))
        tally = Tally()
        q, k, v = (counted(tally, d) for _ in range(3))
        linear.step(q, k, v, (counted(tally, d, d), counted(tally, d)), normalize=True)
        rows.append((d, 1, tally.products + tally.sums, 0))
    steps = ", ".join(f"{row[2]} at d = {row[0]}" for row in rows if not row[3])
    titles = ("d", "N", "operations by the state", "by the matrix of weights")
    kept = [row for row in rows if row[3]]
    return ClaimFinding(
        name="linear attention: operations",
        status="REFUTED" if wrong else "HOLDS",
        statement="Q(KᵀV) costs fewer operations than (QKᵀ)V exactly where N > d (d_k = d_v = d, no "
        "mask), and as "
        "many at N = d. A decoding step costs the same at every N, with a state of d² + d numbers.",
        source="counted; " + _SOURCE.format("LIN-5"),
        evidence=f"products and sums of the forms run on counting numbers, {len(kept)} sizes; a decoding "
        "step "
        f"with normaliser: {steps}" + (f"; otherwise at (d, N) = {wrong}" if wrong else ""),
        table={title: [row[i] for row in kept] for i, title in enumerate(titles)},
    )


def _divides(q: Array, k: Array, v: Array) -> bool:
    try:
        linear.recurrent(q, k, v, normalize=True)
    except ZeroDivisionError:
        return False
    return True


def vanishing() -> ClaimFinding:
    """Can the normaliser vanish or turn negative? An example for each map, and Based's lower bound."""
    one = flint.fmpq(1)
    q, k = np.array([[one, -one]] * 2, dtype=object), np.array([[one, one], [2 * one, 5 * one]], dtype=object)
    v = np.array([[one], [2 * one]], dtype=object)
    rows = []
    for name in linear.FEATURES:
        x, y = linear.features(q, k, name, root=2)
        masses = np.tril(x @ y.T).sum(axis=1)
        rows.append((name, float(masses[0]), float(masses[1]), _divides(x, y, v)))
    # x = q·k/√D = −1 at every pair: Based's smallest weight.
    least = linear.features(
        -2 * np.ones((5, 1), dtype=object) * one, np.ones((5, 1), dtype=object) * one, "taylor", 2
    )
    masses = np.tril(least[0] @ least[1].T).sum(axis=1)
    reached = [mass == flint.fmpq(i + 1, 2) for i, mass in enumerate(masses)]
    # Weights 1 and −999/1000: values 1 and 2 are averaged far outside [1, 2].
    near = np.array([[one, 0 * one], [0 * one, flint.fmpq(999, 1000)]], dtype=object)
    outside = linear.recurrent(q, near, v, normalize=True)[0][1, 0]
    vanish, negative = [r[0] for r in rows if not r[3]], [r[0] for r in rows if min(r[1:3]) < 0]
    good = not rows[linear.FEATURES.index("taylor")][1] <= 0 and all(reached)
    titles = ("map", "normaliser of row 1", "of row 2", "can be divided by")
    return ClaimFinding(
        name="linear attention: normalisers that vanish",
        status="HOLDS" if good and {"identity", "squared"} <= set(vanish) else "REFUTED",
        statement="The normaliser can be exactly 0 for the identity and the squared map, and negative for "
        "the "
        "identity; Based's weight 1 + x + x²/2 = ½ + (x + 1)²/2 keeps row i's at i/2 or more.",
        source=_SOURCE.format("LIN-6, LIN-7"),
        evidence=f"q = (1, −1), k = (1, 1), then (2, 5): 0 for {', '.join(vanish)}; negative for "
        f"{', '.join(negative)}; with k = (1, 0), (0, 0.999) the values 1 and 2 are averaged to "
        f"{float(outside):g}; at x = −1 row i of Based's has i/2 exactly in "
        f"{sum(reached)} of {len(reached)} rows",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
    )


def findings() -> list[ClaimFinding]:
    """All of them, as every run shows them."""
    return [equal_forms(), full_rank(), recall(), kernel_of_the_state(), costs(), vanishing()]
