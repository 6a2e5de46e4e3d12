"""First-order rounding errors, counted: the same algorithms over numbers that carry only a bound.

In the model fl(a op b) = (a op b)(1 + δ), |δ| ≤ u, exponentials and logarithms included, the largest error of
a result to first order in u is a linear form in four sizes of a row of logits. A bound of the literature is
then a linear form too, and holds for *every* row of that length if it is no smaller in any coefficient.
Higham, Accuracy and Stability of Numerical Algorithms, 2002, sections 2.2 and 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnproof.properties.claims.correct_rounding import Operations

__all__ = ["Counting", "Form", "Traced"]


@dataclass(frozen=True)
class Form:
    """one + spread·(x_max − x_min) + log·(y − x_max) + value·|y| + off·max_j |x_j − y|."""

    one: int = 0
    spread: int = 0
    log: int = 0
    value: int = 0
    off: int = 0

    def _parts(self) -> tuple[int, ...]:
        return self.one, self.spread, self.log, self.value, self.off

    def __add__(self, other: Form) -> Form:
        return Form(*(a + b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def join(self, other: Form) -> Form:
        """The larger in every coefficient: at least either form."""
        return Form(*(max(a, b) for a, b in zip(self._parts(), other._parts(), strict=True)))

    def resolved(self) -> Form:
        """max_j |x_j − y| = (y − x_max) + (x_max − x_min), because y ≥ x_max: without ``off``."""
        return Form(self.one, self.spread + self.off, self.log + self.off, self.value)

    def within(self, bound: Form) -> bool:
        """Is this at most ``bound`` at every row of logits, coefficient by coefficient?"""
        mine, other = self.resolved(), bound.resolved()
        return all(a <= b for a, b in zip(mine._parts(), other._parts(), strict=True))

    def __str__(self) -> str:
        names = ("", "(x_max − x_min)", "(y − x_max)", "|y|", "max_j |x_j − y|")
        told = [
            f"{a}{name}" if a != 1 or not name else name
            for a, name in zip(self._parts(), names, strict=True)
            if a
        ]
        return " + ".join(told) or "0"


@dataclass(frozen=True)
class Traced:
    """A number known by its kind and its error in units of u.

    Attributes:
        kind: "entry" (a logit, exact), "weight" (positive; its error is relative), "difference" or "value"
            (their error is absolute).
        error: to first order.
    """

    kind: str
    error: Form = Form()


_ROUNDING = Form(one=1)


class Counting(Operations[Traced]):
    """:class:`Operations` on :class:`Traced`: how each operation passes errors on, and the one it adds.

    Raises:
        TypeError: an operation on kinds that none of the algorithms combines.
    """

    def add(self, a: Traced, b: Traced) -> Traced:
        if a.kind == b.kind == "weight":
            # Positive terms: the sum's relative error is a mean of theirs, and at most the larger.
            return Traced("weight", a.error.join(b.error) + _ROUNDING)
        if (a.kind, b.kind) == ("entry", "difference"):
            return Traced("value", b.error + Form(value=1))
        raise TypeError(f"no rule for {a.kind} + {b.kind}")

    def sub(self, a: Traced, b: Traced) -> Traced:
        if a.kind == b.kind == "entry":
            return Traced("difference", Form(spread=1))
        if (a.kind, b.kind) == ("entry", "value"):
            return Traced("difference", b.error + Form(off=1))
        raise TypeError(f"no rule for {a.kind} − {b.kind}")

    def div(self, a: Traced, b: Traced) -> Traced:
        if a.kind == b.kind == "weight":
            return Traced("weight", a.error + b.error + _ROUNDING)
        raise TypeError(f"no rule for {a.kind} / {b.kind}")

    def exp(self, a: Traced) -> Traced:
        if a.kind in {"entry", "difference"}:
            return Traced("weight", a.error + _ROUNDING)
        raise TypeError(f"no rule for the exponential of a {a.kind}")

    def log(self, a: Traced) -> Traced:
        if a.kind == "weight":
            return Traced("value", a.error + Form(value=1))
        raise TypeError(f"no rule for the logarithm of a {a.kind}")

    def log1p(self, a: Traced) -> Traced:
        if a.kind == "weight":
            # d log(1 + s) = s/(1 + s) · ds/s, and s/(1 + s) < 1; the logarithm itself is y − x_max.
            return Traced("difference", a.error + Form(log=1))
        raise TypeError(f"no rule for log1p of a {a.kind}")
