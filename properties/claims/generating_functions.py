"""Claims about S4's kernel by its generating function at roots of unity. Theory.md S4-2.

Over the Gaussian rationals, which hold the roots of unity of orders 1, 2 and 4, a formula is the generating
function or is not; at other orders both are enclosed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import flint
import numpy as np

from attnproof.properties.arithmetic.balls import _precision
from attnproof.properties.claims.base import Claim, ClaimFinding
from attnproof.properties.claims.state_space import S4, systems
from attnproof.properties.forms import state_space
from attnproof.properties.forms.base import each, filled
from attnproof.properties.forms.numbers import Gaussian, rationals

__all__ = ["CLAIMS", "generating_function", "literal_formula", "woodbury"]

SEED: Final = 42
_BITS = 256
# At most this far from each other may the ends of an enclosure of 0 be at 256 bits.
_NARROW = 1e-50


@dataclass(frozen=True)
class _Value:
    """A system's generating function at a root of unity: the sum, and what the formula gives, if anything.

    Its parts A, B, C and Δ are in words.
    """

    system: str
    length: int
    z: Any
    due: Any
    found: Any
    parts: str = ""

    @property
    def apart(self) -> float:
        """How far the two are from each other at most."""
        gap = abs(self.found - self.due)
        return float(gap.upper() if isinstance(gap, flint.arb) else gap)

    @property
    def equal(self) -> bool:
        """Exactly, or within a narrow enclosure."""
        return self.found is not None and self.apart <= (_NARROW if isinstance(self.due, flint.acb) else 0.0)


def _roots(length: int) -> list[Any]:
    """The roots of z^L = 1: as Gaussian rationals for L = 1, 2, 4, else as balls."""
    one, zero = flint.fmpq(1), flint.fmpq(0)
    every = [Gaussian(one, zero), Gaussian(-one, zero), Gaussian(zero, one), Gaussian(zero, -one)]
    if length in (1, 2, 4):
        return every[:length]
    return [flint.acb(flint.fmpq(2 * k, length)).exp_pi_i() for k in range(length)]


def _values(length: int, *, truncated: bool = True) -> Iterator[_Value]:
    """Every system at every root."""
    for name, A, B, C, delta in systems(np.random.default_rng(SEED)):
        discrete = state_space.bilinear(A, B, delta)
        taps = state_space.kernel(*discrete, C, length)
        row = state_space.corrected_row(discrete[0], C, length) if truncated else C
        rows = "; ".join(", ".join(map(str, line)) for line in A)
        parts = f"A = ({rows}), B = ({', '.join(map(str, B))}), C = ({', '.join(map(str, C))}), Δ = {delta}"
        for z in _roots(length):
            lift = flint.acb if isinstance(z, flint.acb) else _gaussian
            try:
                found = state_space.resolvent_form(each(lift, A), each(lift, B), each(lift, row), delta, z)
            except ZeroDivisionError:
                found = None
            yield _Value(name, length, z, state_space.generating(each(lift, taps), z), found, parts)


def _gaussian(x: flint.fmpq) -> Gaussian:
    return Gaussian(x, flint.fmpq(0))


def _told(z: Any) -> str:
    return f"{z.re} + {z.im}i" if isinstance(z, Gaussian) else str(z.str(12))


def _table(values: list[_Value]) -> dict[str, list[Any]]:
    return {
        "system": [value.system for value in values],
        "L": [value.length for value in values],
        "z": [_told(value.z) for value in values],
        "formula is defined": [value.found is not None for value in values],
        "equal": [value.equal for value in values],
        "sum of K̄_i zⁱ": [_told(value.due) for value in values],
    }


def generating_function(lengths: tuple[int, ...] = (1, 2, 4), *, truncated: bool = True) -> ClaimFinding:
    """Is Σ_{i<L} K̄_i zⁱ the formula with C̃ at the roots of unity other than −1?"""
    with _precision(_BITS):
        values = [value for length in lengths for value in _values(length, truncated=truncated)]
        values = [value for value in values if not _is_minus_one(value.z)]
        wrong = [value for value in values if not value.equal]
        widest = max((value.apart for value in values if value.found is not None), default=0.0)
        rational = sum(isinstance(value.z, Gaussian) for value in values)
        example = ""
        if wrong:
            first = wrong[0]
            example = (
                f"{first.system}, {first.parts}, L = {first.length}, z = {_told(first.z)}: the sum is "
                f"{_told(first.due)}, "
                f"the formula gives {_told(first.found)}"
            )
        table = _table(values)
    return ClaimFinding(
        status="REFUTED" if wrong else "HOLDS",
        evidence=f"L = {list(lengths)}: {len(values) - len(wrong)} of {len(values)} values equal, {rational} "
        f"of all over the Gaussian rationals, the others in balls of {_BITS} bits; largest difference "
        f"{widest:.2g}",
        table=table,
        counterexample=example,
        seed=SEED,
    )


def _is_minus_one(z: Any) -> bool:
    return bool(abs(z + 1) == 0 if isinstance(z, Gaussian) else (z + 1).contains(0))


def literal_formula(lengths: tuple[int, ...] = (2, 4)) -> ClaimFinding:
    """Does the formula give the generating function at *every* root of unity, z = −1 of even L included?

    Args:
        lengths: of :func:`_roots`'s exact ones.
    """
    values = [value for length in lengths for value in _values(length)]
    undefined = [value for value in values if value.found is None]
    wrong = [value for value in values if value.found is not None and not value.equal]
    limits = _limits_hold(lengths)
    example = ""
    if undefined or wrong:
        first = (wrong or undefined)[0]
        example = (
            f"{first.system}, {first.parts}, L = {first.length}, z = {_told(first.z)}: 2/(1 + z) and g "
            f"= (2/Δ)(1 − z)/"
            f"(1 + z) divide by 0, where the sum is {_told(first.due)}. The limit is (Δ/2)·C̃B, "
            "which equals the sum in every system here."
        )
    return ClaimFinding(
        status="REFUTED" if wrong or not limits else "CONDITIONAL" if undefined else "HOLDS",
        evidence=f"L = {list(lengths)}, {len(values)} values: the formula is undefined at {len(undefined)}, "
        f"of which {sum(_is_minus_one(value.z) for value in undefined)} are z = −1; elsewhere {len(wrong)} "
        f"differ; (Δ/2)·C̃B is the sum at z = −1 wherever L is even: {limits}",
        table=_table(values),
        counterexample=example,
        seed=SEED,
    )


def _limits_hold(lengths: tuple[int, ...]) -> bool:
    """Is Σ K̄_i (−1)ⁱ equal to (Δ/2)·C̃B for every system and even L?"""
    for length in lengths:
        for _, A, B, C, delta in systems(np.random.default_rng(SEED)):
            if length % 2:
                continue
            discrete = state_space.bilinear(A, B, delta)
            due = state_space.generating(state_space.kernel(*discrete, C, length), flint.fmpq(-1))
            if delta / 2 * (state_space.corrected_row(discrete[0], C, length) @ B) != due:
                return False
    return True


def woodbury(systems: int = 3, *, keep: bool = True) -> ClaimFinding:
    """For A = Λ − PQᵀ: is the formula by four Cauchy sums the generating function? At z = 1, i, −i, L = 4."""
    rng = np.random.default_rng(SEED + 1)
    rows, example = [], ""
    for index in range(systems):
        size = index + 1
        poles, P, Q, B, C = (
            filled((size,), map(Gaussian, rationals(rng, size), rationals(rng, size))) for _ in range(5)
        )
        delta = flint.fmpq(1, 3)
        A = -np.outer(P, Q)
        for n in range(size):
            A[n, n] = A[n, n] + poles[n]
        discrete = state_space.bilinear(A, B, delta)
        taps, row = state_space.kernel(*discrete, C, 4), state_space.corrected_row(discrete[0], C, 4)
        for z in (z for z in _roots(4) if z.re != -1):
            due = state_space.generating(taps, z)
            found = state_space.cauchy_form(poles, P, Q, B, row, delta, z, keep=keep)
            rows.append((size, _told(z), bool(abs(found - due) == 0)))
            if abs(found - due) != 0 and not example:
                example = (
                    f"N = {size}, L = 4, Δ = 1/3, first entries λ = {_told(poles[0])}, P = {_told(P[0])}, "
                    f"Q = {_told(Q[0])}, B = {_told(B[0])}, C = {_told(C[0])}, z = {_told(z)}: the sum is "
                    f"{_told(due)}, the formula gives {_told(found)}"
                )
    titles = ("N", "z", "equal")
    return ClaimFinding(
        status="REFUTED" if example else "HOLDS",
        evidence=f"{sum(row[2] for row in rows)} of {len(rows)} values equal over the Gaussian rationals",
        table={title: [row[i] for row in rows] for i, title in enumerate(titles)},
        counterexample=example,
        seed=SEED + 1,
    )


CLAIMS: Final = (
    Claim(
        id="S4-2a",
        subject="state space models",
        title="truncated generating function",
        statement="At z with z^L = 1, z ≠ −1: Σ_{i<L} K̄_i zⁱ = (2/(1+z))·C̃[(2/Δ)(1−z)/(1+z)·I − A]⁻¹B with "
        "C̃ = C(I − Ā^L).",
        source=f"{S4}, section 3.2 and lemma C.3",
        kind="exact",
        check=lambda lab: generating_function(lab.choose((1, 2, 4, 5), (1, 2, 4, 5, 8, 16))),
        control=lambda lab: generating_function((2,), truncated=False),
        covers=("S4-2",),
    ),
    Claim(
        id="S4-2b",
        subject="state space models",
        title="the formula at every root of unity",
        statement="The formula of S4-2a gives the generating function at all L-th roots of unity, from which "
        "an inverse FFT recovers the kernel.",
        source=f"{S4}, algorithm 1 and lemma C.3",
        kind="exact",
        check=lambda lab: literal_formula(),
        # L = 1 has the root 1 only.
        control=lambda lab: literal_formula((1,)),
    ),
    Claim(
        id="S4-2c",
        subject="state space models",
        title="four Cauchy sums",
        statement="For A = Λ − PQ* the resolvent in S4-2a is k(C̃,B) − k(C̃,P)(1 + k(Q,P))⁻¹k(Q,B) with "
        "k(x,y) = Σ x̄_j y_j/(g − λ_j).",
        source=f"{S4}, algorithm 1 and appendix C.3",
        kind="exact",
        check=lambda lab: woodbury(lab.choose(3, 4)),
        control=lambda lab: woodbury(1, keep=False),
    ),
)
