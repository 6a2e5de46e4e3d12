"""Log-sum-exp and softmax as algorithms: exact results, errors counted, the worst rows in formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from attnproof.properties.claims.correct_rounding import (
    FORMATS,
    FP16,
    Floats,
    Format,
    Operations,
    Rounded,
    summed,
)
from attnproof.properties.claims.rounding_counts import Counting, Form, Traced

__all__ = [
    "ALGORITHMS",
    "SEED",
    "Attack",
    "Bound",
    "attacked",
    "count",
    "exact",
    "logits",
    "ratios",
    "run",
    "sized",
]

V = TypeVar("V")
Bound = Callable[[int], Form]
"""The claimed bound at n logits in units of u: relative for weights, absolute for a logarithm."""

ALGORITHMS: Final = (
    "log",
    "division",
    "division-free",
    "shifted log",
    "1 + s",
    "shifted",
    "shifted, division-free",
)
SEED: Final = 20
"""Of the rows drawn."""

# Where a row's own first-order error is at most this, higher orders add at most twice that part of it.
_SMALL = 0.125


def run(algorithm: str, x: Sequence[V], one: V, r: Operations[V]) -> list[V]:
    """What an algorithm of :data:`ALGORITHMS` returns for logits x, the largest first: one number or n.

    Args:
        algorithm: "log" is log Σ e^x; "division" is e^x_j / Σ e^x, "division-free" is e^(x_j − log).
            "Shifted" is Algorithm 4.1: w_i = e^(x_i − x_max), s = Σ_{i ≠ max} w_i, log = x_max + log1p(s),
            weights w_i / (1 + s).
        x: n ≥ 2 logits.
        one: the number 1.
        r: operations.
    """
    if "1 + s" not in algorithm and "shifted" not in algorithm:
        w = [r.exp(a) for a in x]
        total = summed(w, r)
        if algorithm == "division":
            return [r.div(a, total) for a in w]
        y = r.log(total)
    else:
        w = [one, *(r.exp(r.sub(a, x[0])) for a in x[1:])]
        s = summed(w[1:], r)
        if algorithm in {"1 + s", "shifted"}:
            total = r.add(one, s)
            return [total] if algorithm == "1 + s" else [r.div(a, total) for a in w]
        y = r.add(x[0], r.log1p(s))
    return [y] if algorithm in {"log", "shifted log"} else [r.exp(r.sub(a, y)) for a in x]


def exact(algorithm: str, x: Floats) -> Floats:
    """The same in float64 for rows x (rows, n), (rows, 1 or n): correct to a few units of 2^-53."""
    top = x.max(axis=1, keepdims=True)
    w = np.exp(x - top)
    if algorithm == "1 + s":
        return np.asarray(w.sum(axis=1, keepdims=True))
    if algorithm in {"log", "shifted log"}:
        rest = np.sort(w, axis=1)[:, :-1].sum(axis=1, keepdims=True)
        return np.asarray(top + np.log1p(rest))
    return np.asarray(w / w.sum(axis=1, keepdims=True))


def count(algorithm: str, n: int) -> Form:
    """The largest first-order error over all rows of n logits, of the worst output."""
    entry, one = Traced("entry"), Traced("weight")
    worst = Form()
    for result in run(algorithm, [entry] * n, one, Counting()):
        worst = worst.join(result.error)
    return worst


def sized(form: Form, x: Floats) -> Floats:
    """A form's value at rows x (rows, n)."""
    y = exact("shifted log", x)[:, 0]
    top, bottom = x.max(axis=1), x.min(axis=1)
    off = np.maximum(y - bottom, np.abs(top - y))
    return np.asarray(
        form.one + form.spread * (top - bottom) + form.log * (y - top) + form.value * abs(y) + form.off * off
    )


def logits(form: Format, n: int, rows: int, rng: np.random.Generator, *, shifted: bool) -> Floats:
    """Rows (rows, n) of a format that neither overflow nor underflow, the largest first.

    Spread evenly, few distinct values, all equal, and with a logarithm near 0; under a shift also with a
    common offset.
    """
    depth = 4.5 if form.lowest == FP16.lowest else 40.0
    kinds = [
        rng.uniform(-depth, depth, (rows, n)),
        rng.choice(rng.uniform(-1.0, 1.0, 3), (rows, n)),
        np.repeat(rng.uniform(-depth, depth, (rows, 1)), n, axis=1),
        rng.normal(-np.log(n), 0.02, (rows, n)),
        rng.exponential(0.5, (rows, n)) * -1.0,
    ]
    x = np.stack(kinds)[rng.integers(0, len(kinds), rows), np.arange(rows)]
    if shifted:
        x = x + np.where(rng.random((rows, 1)) < 0.5, 2.0 ** rng.uniform(0.0, 7.0, (rows, 1)), 0.0)
    return _largest_first(form.rounded(x))


def _largest_first(x: Floats) -> Floats:
    x = x.copy()
    rows, top = np.arange(len(x)), x.argmax(axis=1)
    first = x[:, 0].copy()
    x[:, 0] = x[rows, top]
    x[rows, top] = first
    return x


def ratios(algorithm: str, bound: Form, form: Format, x: Floats) -> Floats:
    """error / (bound·(1 + higher orders)) of rows x; 0 where a row is outside the first-order domain."""
    r = Rounded(form)
    columns = run(algorithm, [x[:, i] for i in range(x.shape[1])], np.ones(len(x)), r)
    due = exact(algorithm, x)
    error = np.nan_to_num(np.abs(np.stack(columns, axis=1) - due).max(axis=1), nan=np.inf)
    if algorithm not in {"log", "shifted log"}:
        error = error / due.max(axis=1)
    own = count(algorithm, x.shape[1])
    if algorithm in {"log", "shifted log"}:
        # The last rounding of a logarithm is no part of what higher orders come from.
        own = Form(own.one, own.spread, own.log, 0, own.off)
    small = sized(own, x) * form.u
    limit = sized(bound, x) * form.u * (1.0 + 2.0 * small)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        by_limit = np.where(error > 0, error / limit, 0.0)
    return np.asarray(np.where(small <= _SMALL, by_limit, 0.0))


@dataclass(frozen=True)
class Attack:
    """The worst of a search: format, number of logits, rows tried, error by bound, and the row."""

    form: Format
    n: int
    rows: int
    ratio: float
    row: tuple[float, ...]


def attacked(
    algorithm: str, bound: Bound, lengths: Sequence[int], rows: int, rounds: int
) -> Iterator[Attack]:
    """Rows of random logits, then ``rounds`` times the best half with some entries drawn anew."""
    shifted = "shifted" in algorithm or algorithm == "1 + s"
    for form in FORMATS:
        for n in lengths:
            rng = np.random.default_rng((SEED, form.precision, n))
            x = logits(form, n, rows, rng, shifted=shifted)
            found = ratios(algorithm, bound(n), form, x)
            for _ in range(rounds):
                parents = x[np.argsort(-found)[: (rows + 1) // 2]]
                other = logits(form, n, len(parents), rng, shifted=shifted)
                moved = form.rounded(parents * (1.0 + rng.normal(0.0, 0.02, parents.shape)))
                some = rng.random(parents.shape)
                children = np.where(some < 0.15, other, np.where(some < 0.5, moved, parents))
                pool = np.concatenate([x, _largest_first(children)])
                all_ratios = np.concatenate([found, ratios(algorithm, bound(n), form, pool[len(x) :])])
                best = np.argsort(-all_ratios)[:rows]
                x, found = pool[best], all_ratios[best]
            yield Attack(form, n, rows * (2 + rounds) // 2, float(found[0]), tuple(x[0].tolist()))
