"""Claims about attention as the support-vector expansion of a regression.

A regression f(x) = WΦ(x)/h(x) + b is fitted to pairs (k_j, y_j) with an ε-insensitive loss, where
h(x) = Σ_j Φ(x)·Φ(k_j). Its dual has multipliers β_j = α_j − α̃_j in [−C, C], with Σβ_j = 0 where the
intercept b is free. Keys are chosen so that Φ(x)·Φ(y) = 2^(x·y), softmax attention's weight at a scale of
log 2: with integer keys every number is rational, the regression is solved exactly, and so are the conditions
of Karush, Kuhn and Tucker that prove the solution optimal.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import flint

__all__ = [
    "Regression",
    "attention",
    "conditions",
    "expansion",
    "for_values",
    "power_kernel",
    "solve",
    "weighted_mean",
]

Row = tuple[Fraction, ...]
Key = tuple[int, ...]


def power_kernel(x: Key, y: Key) -> Fraction:
    """Φ(x)·Φ(y) = 2^(x·y)."""
    return Fraction(2) ** sum(a * b for a, b in zip(x, y, strict=True))


@dataclass(frozen=True)
class Regression:
    """minimise ½‖W‖² + C Σ(ξ_j + ξ̃_j) subject to −ε − ξ̃_j ≤ y_j − f(k_j) ≤ ε + ξ_j.

    Attributes:
        keys: k_j, n of them, distinct.
        targets: y_j.
        bound: C; tube: ε; intercept: whether b is free, or 0.
        normalised: whether h(x) divides Φ(x); with h = 1 this is ordinary kernel regression.
    """

    keys: tuple[Key, ...]
    targets: Row
    bound: Fraction
    tube: Fraction
    intercept: bool = True
    normalised: bool = True

    def weights(self, query: Key) -> Row:
        """Φ(q)·Φ(k_j)."""
        return tuple(power_kernel(query, key) for key in self.keys)

    def h(self, x: Key) -> Fraction:
        """Σ_j Φ(x)·Φ(k_j)."""
        return sum(self.weights(x), Fraction(0)) if self.normalised else Fraction(1)

    def gram(self) -> list[Row]:
        """Φ(k_i)·Φ(k_j)/(h(k_i) h(k_j))."""
        return [
            tuple(w / (self.h(x) * self.h(y)) for w, y in zip(self.weights(x), self.keys, strict=True))
            for x in self.keys
        ]

    def at_keys(self, beta: Row, b: Fraction) -> Row:
        """f(k_j)."""
        return tuple(_dot(row, beta) + b for row in self.gram())


def _dot(x: Sequence[Fraction], y: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))


def attention(weights: Row, values: Row) -> Fraction:
    """Σ_j w_j v_j / Σ_j w_j: softmax attention where w_j = e^(q·k_j) up to a factor."""
    return _dot(weights, values) / sum(weights, Fraction(0))


def expansion(problem: Regression, beta: Row, b: Fraction, query: Key) -> Fraction:
    """f(q) = Σ_j β_j Φ(q)·Φ(k_j)/(h(q) h(k_j)) + b, the support-vector expansion."""
    terms = (
        beta_j * w / (problem.h(query) * problem.h(key))
        for beta_j, w, key in zip(beta, problem.weights(query), problem.keys, strict=True)
    )
    return sum(terms, Fraction(0)) + b


def weighted_mean(problem: Regression, values: Row) -> Fraction:
    """c = Σ_j h(k_j) v_j / Σ_j h(k_j): values less c satisfy Σ_j h(k_j) v_j = 0."""
    return attention(tuple(problem.h(key) for key in problem.keys), values)


def for_values(
    problem: Regression, values: Row, bound: Fraction | None = None
) -> tuple[Regression, Row, Fraction]:
    """Targets for which attention with ``values`` is the solution, with its multipliers and intercept.

    y_j lies on the tube's edge that the sign of β_j asks for. C is the largest |β_j|, unless given.
    """
    b = weighted_mean(problem, values) if problem.intercept else Fraction(0)
    beta = tuple((v - b) * problem.h(key) for v, key in zip(values, problem.keys, strict=True))
    targets = tuple(
        f + problem.tube * (x > 0) - problem.tube * (x < 0)
        for f, x in zip(problem.at_keys(beta, b), beta, strict=True)
    )
    enough = max(map(abs, beta)) if bound is None else bound
    made = Regression(problem.keys, targets, enough, problem.tube, problem.intercept, problem.normalised)
    return made, beta, b


def conditions(problem: Regression, beta: Row, b: Fraction) -> dict[str, bool]:
    """The conditions of Karush, Kuhn and Tucker, and whether primal and dual value are equal, exactly."""
    c, tube = problem.bound, problem.tube
    residual = [y - f for y, f in zip(problem.targets, problem.at_keys(beta, b), strict=True)]

    def complementary(x: Fraction, r: Fraction) -> bool:
        if x == 0:
            return abs(r) <= tube
        signed = r if x > 0 else -r
        return signed >= tube if abs(x) == c else signed == tube

    quadratic = _dot([_dot(row, beta) for row in problem.gram()], beta)
    loss = sum((max(abs(r) - tube, Fraction(0)) for r in residual), Fraction(0))
    dual = _dot(problem.targets, beta) - tube * sum(map(abs, beta)) - quadratic / 2
    return {
        "box": all(abs(x) <= c for x in beta),
        "equality": not problem.intercept or sum(beta) == 0,
        "complementarity": all(map(complementary, beta, residual)),
        "no duality gap": quadratic / 2 + c * loss == dual,
    }


def solve(problem: Regression) -> tuple[Row, Fraction]:
    """The multipliers and the intercept, by trying every set of active constraints exactly (5ⁿ of them).

    Where no multiplier is strictly between its bounds any b of an interval is optimal: its middle is taken.

    Raises:
        ArithmeticError: no set satisfies the conditions, which cannot be for distinct keys.
    """
    n, c = len(problem.keys), problem.bound
    for states in itertools.product((0, 1, -1, 2, -2), repeat=n):
        fixed = tuple(Fraction(s, 2) * c if abs(s) == 2 else Fraction(0) for s in states)
        if problem.intercept and not any(abs(s) == 1 for s in states):
            found = _between(problem, fixed)
        else:
            found = _with_free(problem, states, fixed)
        if found and all(conditions(problem, *found).values()):
            return found
    raise ArithmeticError("no set of active constraints is optimal; are the keys distinct?")


def _between(problem: Regression, beta: Row) -> tuple[Row, Fraction] | None:
    """``beta`` at its bounds or 0, with the middle of the interval that the conditions leave for b."""
    if sum(beta) != 0:
        return None
    ends = [
        (y - f - problem.tube, y - f + problem.tube, x)
        for y, f, x in zip(problem.targets, problem.at_keys(beta, Fraction(0)), beta, strict=True)
    ]
    low = max(high if x < 0 else low for low, high, x in ends if x <= 0)
    high = min(low if x > 0 else high for low, high, x in ends if x >= 0)
    return (beta, (low + high) / 2) if low <= high else None


def _with_free(problem: Regression, states: Sequence[int], fixed: Row) -> tuple[Row, Fraction] | None:
    """The free multipliers (state ±1) and b, which put their targets on the tube's edge."""
    gram, free = problem.gram(), [j for j, s in enumerate(states) if abs(s) == 1]
    rows = [[*(gram[i][j] for j in free), Fraction(problem.intercept)] for i in free]
    right = [problem.targets[i] - problem.tube * states[i] - _dot(gram[i], fixed) for i in free]
    rows.append([*(Fraction(problem.intercept) for _ in free), Fraction(not problem.intercept)])
    right.append(-sum(fixed, Fraction(0)) if problem.intercept else Fraction(0))
    found = _linear(rows, right)
    if found is None:
        return None
    beta = list(fixed)
    for j, x in zip(free, found, strict=False):
        beta[j] = x
    return (tuple(beta), found[-1]) if all(beta[j] * states[j] > 0 for j in free) else None


def _linear(rows: list[list[Fraction]], right: list[Fraction]) -> list[Fraction] | None:
    """The solution of a square system, or None where it is singular."""

    def exact(x: Fraction) -> flint.fmpq:
        return flint.fmpq(x.numerator, x.denominator)

    matrix = flint.fmpq_mat([[exact(x) for x in row] for row in rows])
    if matrix.det() == 0:
        return None
    solution = matrix.solve(flint.fmpq_mat([[exact(x)] for x in right]))
    return [Fraction(int(solution[i, 0].p), int(solution[i, 0].q)) for i in range(len(right))]
