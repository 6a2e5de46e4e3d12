"""Claims about what the state S = KᵀV of linear attention holds of the values: error of recall, ranks.

All but one sampled figure over the rationals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final

import flint
import numpy as np

from attnproof.properties.claims.base import Check, Claim, ClaimFinding
from attnproof.properties.forms import linear
from attnproof.properties.forms.base import Array, difference
from attnproof.properties.forms.numbers import rationals

__all__ = [
    "CLAIMS",
    "exact_recall_error",
    "numbers_lost",
    "recall_of_random_keys",
    "recall_of_signs",
    "recallable",
    "values_lost",
]


def exact_recall_error(n: int, width: int = 4, *, tied: bool = False) -> flint.fmpq:
    """Mean of ‖Sᵀk_1 − v_1‖² over all keys ±1/√width (a rational root), v of norm 1.

    Args:
        tied: only keys whose first two entries agree, so that keys are not spread evenly.
    """
    root = flint.fmpq(int(width**0.5))
    values = [[flint.fmpq(a, 5), flint.fmpq(b, 5)] for a, b in ((3, 4), (5, 0), (-4, 3), (0, -5))]
    v = np.array([values[j % 4] for j in range(n)], dtype=object)
    signs = [s for s in itertools.product((1, -1), repeat=width) if not tied or s[0] == s[1]]
    total, count = flint.fmpq(0), 0
    # The first key is all ones: turning signs of a channel in all keys changes no product.
    for others in itertools.product(signs, repeat=n - 1):
        k = np.array([(1,) * width, *others], dtype=object) / root
        _, (state, _) = linear.parallel(k, k, v)
        off = k[0] @ state - v[0]
        total, count = total + off @ off, count + 1
    return total / count


def recall_of_signs(lengths: Sequence[int] = (1, 2, 3), *, tied: bool = False) -> ClaimFinding:
    """(n − 1)/d exactly, over all keys of signs of width 4?"""
    found = {n: exact_recall_error(n, tied=tied) for n in lengths}
    wrong = {n: x for n, x in found.items() if x != flint.fmpq(n - 1, 4)}
    told = ", ".join(f"{x} at n = {n}" for n, x in found.items())
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"mean over all keys of {{−1/2, 1/2}}⁴, d = 4, values of norm 1: {told}",
        table={"n": list(found), "mean square error": [float(x) for x in found.values()]},
        counterexample=f"n, mean square error: {told}, where (n − 1)/4 is due" if wrong else "",
    )


def recall_of_random_keys(
    lengths: Sequence[int] = (16, 64, 256), width: int = 64, trials: int = 24, *, orthonormal: bool = False
) -> ClaimFinding:
    """The mean square error of recall of random unit keys, within 5 standard errors of (n − 1)/d?

    Args:
        orthonormal: take orthonormal keys (n ≤ width) instead, which recall exactly.
    """
    rng, rows, outside = np.random.default_rng(2), [], []
    for n in lengths:
        found = []
        for _ in range(trials):
            k = rng.standard_normal((n, width))
            k = np.linalg.qr(k.T)[0].T if orthonormal else k / np.sqrt((k * k).sum(axis=1, keepdims=True))
            v = rng.choice((-1.0, 1.0), (n, width))
            found.append(float(((k @ (k.T @ v) - v) ** 2).mean()))
        mean, deviation = float(np.mean(found)), float(np.std(found) / trials**0.5)
        if abs(mean - (n - 1) / width) > 5 * deviation:
            outside.append(n)
        rows.append((n, mean, deviation, (n - 1) / width))
    told = "; ".join(f"n = {n}: {mean:.4f} ± {s:.4f} for {due:.4f}" for n, mean, s, due in rows)
    titles = ("n", "mean square error of recall", "standard error", "(n − 1)/d")
    return ClaimFinding(
        status="REFUTED" if outside else "SUPPORTED",
        evidence=f"keys on the sphere of width {width}, float64, {trials} draws a length: {told}",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=f"n = {outside}: {told}" if outside else "",
        seed=2,
    )


def numbers_lost(k: Array, width: int) -> int:
    """Dimensions of V (n, width) that S = KᵀV loses for these keys (n, d): nullity of V → S over ℚ."""
    n, columns = len(k), []
    for place in range(n * width):
        v = np.zeros(n * width, dtype=object)
        v[place] = flint.fmpq(1)
        _, (state, _) = linear.parallel(k, k, v.reshape(n, width))
        columns.append([flint.fmpq(x) for x in state.flat])
    return n * width - int(flint.fmpq_mat(columns).rank())


def _rank(k: Array) -> int:
    return int(flint.fmpq_mat([list(row) for row in k]).rank())


def _by_rank(n: int, d: int, rank: int) -> int:
    return n - rank


def _by_width(n: int, d: int, rank: int) -> int:
    return max(n - d, 0)


def values_lost(
    shapes: Sequence[tuple[int, int, int]] = ((3, 4, 2), (6, 3, 2), (9, 2, 3)),
    claimed: Callable[[int, int, int], int] = _by_rank,
) -> ClaimFinding:
    """Dimensions lost at each (n, d_k, d_v) against claimed(n, d_k, rank)·d_v, keys independent or not."""
    rng, rows = np.random.default_rng(3), []
    for n, d, e in shapes:
        for dependent in (False, True):
            k = rationals(rng, n, d)
            if dependent:
                k[:, -1] = 2 * k[:, 0]
            rank = _rank(k)
            rows.append((n, d, e, rank, numbers_lost(k, e), claimed(n, d, rank) * e))
    wrong = [row for row in rows if row[4] != row[5]]
    titles = ("n", "d_k", "d_v", "rank of K", "dimensions of V lost", "claimed")
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"ranks over the rationals of {len(rows)} maps V → S, lost: "
        + ", ".join(f"{row[4]} of {row[0] * row[2]}" for row in rows),
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=""
        if not wrong
        else "n, d_k, d_v = {}, {}, {}, keys of rank {}: {} dimensions lost, {} claimed".format(*wrong[0]),
        seed=3,
    )


def recallable(criterion: str = "rank") -> ClaimFinding:
    """For which keys can all values be read from the state, and for which by reading with the keys?

    Args:
        criterion: "rank" for rank K = n, "width" for n ≤ d_k: when recall is claimed to be possible.
    """
    f = flint.fmpq
    cases = {
        "orthonormal": [[f(3, 5), f(4, 5)], [f(-4, 5), f(3, 5)]],
        "independent": [[f(1), f(0)], [f(1), f(1)]],
        "dependent, n ≤ d": [[f(1), f(2), f(0)], [f(2), f(4), f(0)]],
        "n = d + 1": [[f(1), f(0)], [f(0), f(1)], [f(1), f(1)]],
    }
    rng, rows, pair = np.random.default_rng(5), [], ""
    for place in range(12):
        shape = (int(rng.integers(1, 5)), int(rng.integers(1, 5)))
        cases[f"random {place}"] = rationals(rng, *shape, low=-1, high=1, denominator=1).tolist()
    for name, entries in cases.items():
        k = np.array(entries, dtype=object)
        n, d = k.shape
        v = rationals(rng, n, 2)
        _, (state, _) = linear.parallel(k, k, v)
        keys = flint.fmpq_mat(k.tolist())
        possible, gram = numbers_lost(k, 2) == 0, keys * keys.transpose()
        read = difference(k @ state, v) == 0
        if possible:
            # Reading with the dual keys (KKᵀ)⁻¹K, as least squares or converged delta steps do.
            dual = np.array((gram.inv() * keys).tolist(), dtype=object)
            possible = difference(dual @ state, v) == 0
        due = _rank(k) == n if criterion == "rank" else n <= d
        unit = gram == flint.fmpq_mat([[int(i == j) for j in range(n)] for i in range(n)])
        rows.append((name, n, d, possible, due, read, bool(unit)))
        if name == "n = d + 1":
            # k_3 = k_1 + k_2: values (1, 1, −1) write k_1 + k_2 − k_3 = 0.
            moved = v.copy()
            moved[:, 0] = moved[:, 0] + np.array([f(1), f(1), f(-1)], dtype=object)
            same = difference(linear.parallel(k, k, moved)[1][0], state) == 0
            pair = "adding 1, 1, −1 to the values of keys (1, 0), (0, 1), (1, 1) " + (
                "leaves the state as it is" if same else "changes the state"
            )
    wrong = [r for r in rows if r[3] is not r[4] or r[5] is not r[6]]
    titles = (
        "keys",
        "n",
        "d_k",
        "all values can be read",
        "claimed",
        "by the keys themselves",
        "orthonormal",
    )
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence="; ".join(
            f"{r[0]}: {'every value' if r[3] else 'not every value'} can be read"
            + (", with the keys themselves" if r[5] else "")
            for r in rows[:4]
        )
        + f"; {len(rows) - 4} random cases, {sum(r[3] for r in rows[4:])} of them readable. Two prefixes "
        f"with one state: {pair}",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=f"{wrong[0][0]}: keys (1, 2, 0) and (2, 4, 0) write v_1 + 2v_2 along one direction "
        "only"
        if wrong
        else "",
        seed=5,
    )


def recall_of_seed(factor: int = 20, width: int = 2) -> ClaimFinding:
    """n = factor·d keys of width d: are exactly 19 d² of the values' numbers lost?

    Once with keys of full rank, once with keys on a hyperplane.
    """
    rng, rows = np.random.default_rng(6), []
    for dependent in (False, True):
        k = rationals(rng, factor * width, width)
        if dependent:
            k[:, -1] = 2 * k[:, 0]
        rows.append((_rank(k), factor * width * width, numbers_lost(k, width), 19 * width * width))
    equal = [r[2] == r[3] for r in rows]
    titles = ("rank of K", "numbers of V", "lost", "claimed")
    return ClaimFinding(
        status="HOLDS" if all(equal) else "CONDITIONAL" if any(equal) else "REFUTED",
        evidence=f"d = {width}, n = {factor * width}: "
        + "; ".join(f"keys of rank {r[0]}: {r[2]} of {r[1]} numbers lost, {r[3]} claimed" for r in rows)
        + f"; with its normaliser z the state has {width * width + width} numbers, not {width * width}",
        table={title: [r[i] for r in rows] for i, title in enumerate(titles)},
        counterexample=""
        if all(equal)
        else f"d = {width}, n = {factor * width}, keys (x_j, 2x_j): S = (s, 2s) with s = Σ x_j v_j, so it "
        f"holds {width} numbers of the values and loses {rows[1][2]} of {rows[1][1]}, not {rows[1][3]}. "
        "Condition: n = 20 d, keys of rank d, and only the values counted, as a linear map for given keys.",
        seed=6,
    )


_DERIVED = "derived from S = KᵀV (Katharopoulos et al. 2020, arXiv 2006.16236)"


def _claim(
    name: str,
    title: str,
    statement: str,
    source: str,
    kind: str,
    *,
    check: Check,
    control: Check,
    covers: tuple[str, ...] = (),
) -> Claim:
    return Claim(name, "linear attention", title, statement, source, kind, check, control, covers)


CLAIMS: Final = (
    _claim(
        "LIN-4a",
        "error of recall, exactly",
        "Reading the unnormalised state with one of n keys gives its value with a mean square error of (n − "
        "1)/d of the value's, on average over all keys of signs ±1/√d (here d = 4): E(k·k')² = 1/d.",
        _DERIVED,
        "exact",
        check=lambda lab: recall_of_signs(lab.choose((1, 2, 3), (1, 2, 3, 4))),
        control=lambda lab: recall_of_signs((2,), tied=True),
    ),
    _claim(
        "LIN-4b",
        "error of recall, sampled",
        "Reading the unnormalised state with one of n random unit keys of width d gives its value with a "
        "mean square error of (n − 1)/d of the value's.",
        _DERIVED,
        "measurement",
        check=lambda lab: recall_of_random_keys(trials=lab.choose(12, 48)),
        control=lambda lab: recall_of_random_keys((16, 64), trials=4, orthonormal=True),
    ),
    _claim(
        "LIN-4c",
        "what the state forgets",
        "For given keys the state KᵀV loses exactly (n − rank K)·d_v of the n·d_v dimensions of V.",
        _DERIVED,
        "exact",
        check=lambda lab: values_lost(),
        control=lambda lab: values_lost(claimed=_by_width),
    ),
    _claim(
        "LIN-4d",
        "20 d² numbers in d²",
        "Of the 20 d² numbers of 20 d values a state of d² numbers loses 19 d².",
        "seed article on linear attention",
        "exact",
        check=lambda lab: recall_of_seed(width=lab.choose(2, 3)),
        control=lambda lab: recall_of_seed(10),
        covers=("SEED1-3",),
    ),
    _claim(
        "LIN-4e",
        "which keys recall exactly",
        "All n values can be read from KᵀV, by some queries, exactly where the keys are linearly independent "
        "(so n ≤ d_k); by the keys themselves exactly where they are orthonormal.",
        _DERIVED,
        "exact",
        check=lambda lab: recallable(),
        control=lambda lab: recallable("width"),
    ),
)
