"""Claims about what softmax attention cannot do to its values: convex hull, shifts, copies.

Exactly: logits are logarithms of rational weights w (queries, keys), and attention is (w / Σw) V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.forms.base import Array, each
from attnproof.properties.forms.numbers import rationals

__all__ = ["CLAIMS", "PROOFS", "PROPERTIES", "attention", "held", "sigmoid"]

_SEED = 28
_Q = flint.fmpq
Attention = Callable[[Array, Array], Array]
"""Outputs (N, E) of weights e^s (N, M) and values (M, E)."""


def attention(w: Array, v: Array) -> Array:
    """Softmax attention."""
    return np.asarray((w @ v) / w.sum(axis=1)[:, None])


def sigmoid(w: Array, v: Array) -> Array:
    """Sigmoid attention without a bias: σ(s) = e^s/(1 + e^s)."""
    return each(lambda x: x / (1 + x), w) @ v


def _causal(w: Array, v: Array) -> Array:
    """Softmax over the keys up to the query's own place."""
    return attention(np.tril(w), v)


def _normalised_values(w: Array, v: Array) -> Array:
    """Softmax attention over values divided by their largest: not linear in them."""
    return attention(w, v / max(abs(x) for x in v.flat))


def _hull(f: Attention, w: Array, v: Array) -> bool:
    o = f(w, v)
    return all(min(v[:, c]) <= o[i, c] <= max(v[:, c]) for i in range(o.shape[0]) for c in range(o.shape[1]))


def _shifts(f: Attention, w: Array, v: Array) -> bool:
    factors = each(lambda i: _Q(int(i) + 2, 3), np.arange(len(w)))
    return bool((f(w * factors[:, None], v) == f(w, v)).all())


def _permutes(f: Attention, w: Array, v: Array) -> bool:
    order, rows = np.roll(np.arange(len(v)), 1), np.roll(np.arange(len(w)), 1)
    o = f(w, v)
    return bool((f(w[:, order], v[order]) == o).all() and (f(w[rows], v) == o[rows]).all())


def _linear(f: Attention, w: Array, v: Array) -> bool:
    other = v[::-1]
    return bool((f(w, 3 * v - 2 * other) == 3 * f(w, v) - 2 * f(w, other)).all())


def _mean(f: Attention, w: Array, v: Array) -> bool:
    equal = w * 0 + _Q(5, 3)
    return bool((f(equal, v) == v.sum(axis=0) / len(v)).all())


def _doubles(f: Attention, w: Array, v: Array) -> bool:
    return bool((f(np.concatenate([w, w], axis=1), np.concatenate([v, v])) == f(w, v)).all())


def _translates(f: Attention, w: Array, v: Array) -> bool:
    c = each(lambda i: _Q(int(i) - 1, 2), np.arange(v.shape[1]))
    return bool((f(w, v + c) == f(w, v) + c).all())


def _rows_of_gradient(f: Attention, w: Array, v: Array) -> bool:
    """Rows of dS sum to 0: the derivative of f along a common shift of a row's logits, for any dO.

    Logits s + t·1 multiply the row's weights by e^t: the derivative at t = 0 is that of f along w itself,
    exact over dual numbers a + bε.
    """
    tangent = each(lambda x: _Dual(x, x), w)
    o = f(tangent, each(_Dual, v))
    return all(x.slope == 0 for x in o.flat)


class _Dual:
    """a + bε with ε² = 0, for the operations of attention."""

    def __init__(self, value: Any, slope: Any = 0) -> None:
        self.value, self.slope = value, slope

    @classmethod
    def of(cls, x: Any) -> Any:
        """x, or the constant x."""
        return x if isinstance(x, cls) else cls(x)

    def __add__(self, other: Any) -> Any:
        b = self.of(other)
        return _Dual(self.value + b.value, self.slope + b.slope)

    def __mul__(self, other: Any) -> Any:
        b = self.of(other)
        return _Dual(self.value * b.value, self.value * b.slope + self.slope * b.value)

    def __truediv__(self, other: Any) -> Any:
        b = self.of(other)
        quotient = self.value / b.value
        return _Dual(quotient, (self.slope - quotient * b.slope) / b.value)

    __radd__, __rmul__ = __add__, __mul__


PROPERTIES: Final[dict[str, Callable[[Attention, Array, Array], bool]]] = {
    "a": _hull,
    "b": _shifts,
    "c": _permutes,
    "d": _linear,
    "e": _mean,
    "f": _doubles,
    "g": _translates,
    "h": _rows_of_gradient,
}


PROOFS: Final[dict[str, str]] = {
    "a": "w/Σw is positive and sums to 1, and a mean with such weights lies between the least and the "
    "largest",
    "b": "the shift multiplies a row's weights by e^c, which cancels from w/Σw",
    "c": "Σ_j w_ij v_j and Σ_j w_ij are sums over j, in any order, and row i has only its own weights",
    "d": "the output is w/Σw times V, and w/Σw does not depend on V",
    "e": "equal weights over their sum are 1/m each",
    "f": "Σ_j w_ij v_j and Σ_j w_ij both double",
    "g": "Σ_j w_ij (v_j + c) = Σ_j w_ij v_j + cΣ_j w_ij",
    "h": "the sum of a row of dS is the derivative along a common shift of the row's logits, which changes "
    "nothing (EXA-5b)",
}
"""Why softmax attention has each of :data:`PROPERTIES`, for every size."""


def held(letter: str, f: Attention, draws: int) -> ClaimFinding:
    """Does attention f have the property, exactly, for random rational weights and values?

    The draws are few and small, to be redone by hand; what they cannot say about all others is proved in
    :data:`PROOFS`, for softmax attention.
    """
    rng, holds = np.random.default_rng(_SEED), PROPERTIES[letter]
    wrong = ""
    for i in range(draws):
        n, m, e = 2 + i % 3, 2 + i % 4, 1 + i % 3
        # Square, for masks by place.
        m = n if f is _causal else m
        w, v = rationals(rng, n, m, low=1, high=40), rationals(rng, m, e)
        if not any(v.flat):
            continue
        if not holds(f, w, v) and not wrong:
            wrong = f"e^s = {_rows(w)}, V = {_rows(v)}: O = {_rows(f(w, v))}"
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"{draws} random rational weights and values (seed {_SEED}), 2 to 4 queries, 2 to 5 keys, "
        "compared exactly"
        + (f"; not so: {wrong}" if wrong else ": no difference")
        + (f". For all: {PROOFS[letter]}" if f is attention and not wrong else ""),
        counterexample=wrong,
        seed=_SEED,
    )


def _rows(x: Array) -> str:
    return "[" + "; ".join(", ".join(map(str, row)) for row in x) + "]"


def _claim(letter: str, title: str, statement: str, broken: Attention, covers: tuple[str, ...] = ()) -> Claim:
    return Claim(
        id=f"EXA-5{letter}",
        subject="exact oracles",
        title=title,
        statement=statement,
        source="derived",
        kind="exact",
        check=lambda lab: held(letter, attention, lab.choose(24, 200, 1000)),
        control=lambda lab: held(letter, broken, 24),
        covers=covers,
    )


CLAIMS: Final = (
    _claim(
        "a",
        "convex hull",
        "Outputs of softmax attention lie between the least and largest value of each channel.",
        sigmoid,
    ),
    _claim(
        "b",
        "shifts of a row",
        "A constant added to a row of logits leaves softmax attention's output as it is.",
        sigmoid,
    ),
    _claim(
        "c",
        "permutations",
        "Permuting keys and values together changes nothing; permuting queries permutes outputs.",
        _causal,
    ),
    _claim("d", "linear in V", "Softmax attention is linear in its values.", _normalised_values),
    _claim("e", "equal logits", "Equal logits give the mean of the values.", sigmoid),
    _claim(
        "f",
        "every key twice",
        "Repeating every key and value leaves softmax attention as it is (not sigmoid attention).",
        sigmoid,
        ("SEED2-2",),
    ),
    _claim(
        "g", "translated values", "A row added to all values is added to every output.", sigmoid, ("SEED0-2",)
    ),
    _claim(
        "h",
        "rows of the logits' gradient",
        "Rows of the gradient with respect to the logits sum to 0.",
        sigmoid,
    ),
)
