"""Rows of the mLSTM's quadratic form over any arithmetic, and its final state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.families.mlstm_weights import BLOCK, Part, log_weights
from attnproof.properties.families.scan_states import largest
from attnproof.properties.families.state_layout import LONGEST

if TYPE_CHECKING:
    from attnproof.properties.families.mlstm import MLSTMProblem

__all__ = ["Rows", "Tile", "final_state", "magnitude", "placed", "summed"]


@dataclass(frozen=True, eq=False)
class Tile(Generic[V]):
    """Rows by the columns ``start:stop``, or by the D channels of the initial state.

    Attributes:
        e: e^{D − m}, 0 where a column is not seen; (B, H, rows, columns), of all final rows and of all
            channels of the initial state only one.
        p: scale · q·k · e; e for the initial state, whose channels are columns with unit vectors as keys.
        initial: whether it is the initial state's.
    """

    start: int
    stop: int
    e: V
    p: V
    initial: bool


@dataclass(frozen=True, eq=False)
class Rows(Generic[V]):
    """The rows ``first:stop`` of a problem, or the D rows of its final state.

    What is read of C is a sum over columns of P v; the final C' is what D queries read of it at the last
    position, each a unit vector, without scale and denominator.

    Attributes:
        tiles: the columns that they see: before the rows' block, if there are any; in it; the initial state.
        q: (B, H, rows, D), of which ``scale`` is the scale; None for the final state.
        shift: float64 (B, H, rows, 1), m up to its rounding: any shift gives the same o.
    """

    problem: MLSTMProblem
    first: int
    stop: int
    tiles: tuple[Tile[V], ...]
    q: V | None
    scale: float
    shift: torch.Tensor

    @classmethod
    def of(cls, a: Arithmetic[V], problem: MLSTMProblem, first: int, stop: int) -> Rows[V]:
        """The weights of rows that lie in one block."""
        parts = log_weights(a, problem.gates, first, stop, problem.initial)
        shift = _largest(a, parts)
        q, m = a.exact(problem.q[:, :, first:stop]), a.exact(shift)
        tiles = tuple(_tile(a, problem, part, m, q) for part in parts)
        return cls(problem, first, stop, tiles, q, problem.scale, shift)

    @classmethod
    def final(cls, a: Arithmetic[V], problem: MLSTMProblem) -> tuple[Rows[V], V]:
        """Those of the final state, after one or more positions, and m (B, H, 1, 1)."""
        batch, heads, length = problem.sizes[:3]
        parts = log_weights(a, problem.gates, length - 1, length, problem.initial)
        m = largest(a, [(part.d, part.seen) for part in parts], (batch, heads, 1, 1))
        tiles = tuple(_tile(a, problem, part, m, None) for part in parts)
        return cls(problem, length - 1, length, tiles, None, 1.0, a.midpoint(m)), m

    def values(self, a: Arithmetic[V], tile: Tile[V], *, absolute: bool = False) -> V:
        """v of a tile's columns, or its size."""
        initial = self.problem.initial
        if tile.initial and initial is not None:
            return a.exact(initial.state.abs() if absolute else initial.state)
        v = self.problem.v[:, :, tile.start : tile.stop]
        return a.exact(v.abs() if absolute else v)

    def normaliser(self, a: Arithmetic[V], *, absolute: bool = False) -> V | None:
        """What stands for v in the sum of n: the initial n (B, H, D, 1); None for the ones of positions."""
        initial = self.problem.initial
        if initial is None:
            return None
        return a.exact((initial.n.abs() if absolute else initial.n)[..., None])

    def sums(self, a: Arithmetic[V], *, absolute: bool = False) -> tuple[V, V]:
        """Σ P v and Σ P; with ``absolute`` of the terms' sizes."""
        numerator, denominator, n = [], [], self.normaliser(a, absolute=absolute)
        for tile in self.tiles:
            p = _absolute(a, tile.p) if absolute else tile.p
            numerator.append(_product(a, p, self.values(a, tile, absolute=absolute)))
            denominator.append(a.matmul(p, n) if tile.initial and n is not None else _total(a, p))
        return summed(a, numerator), summed(a, denominator)

    def bound(self, a: Arithmetic[V]) -> tuple[V, V]:
        """e^{min(m, 0)} and e^{−max(m, 0)}: numerator and denominator times the first do not overflow."""
        return a.exp(a.exact(self.shift.clamp(max=0.0))), a.exp(a.exact(-self.shift.clamp(min=0.0)))

    def denominator(self, a: Arithmetic[V], total: V) -> tuple[V, V]:
        """max(|Σ P|, e^{−m}) times e^{min(m, 0)}, and by how much the first argument is the larger."""
        factor, least = self.bound(a)
        excess = a.sub(a.mul(_absolute(a, total), factor), least)
        return a.add(least, a.relu(excess)), excess

    def output(self, a: Arithmetic[V]) -> V:
        """o of these rows."""
        values, total = self.sums(a)
        return a.div(a.mul(values, self.bound(a)[0]), self.denominator(a, total)[0])

    def absolute_output(self, a: Arithmetic[V]) -> V:
        """Σ |P||v| over the denominator."""
        sizes, total = self.sums(a, absolute=True)[0], self.sums(a)[1]
        return a.div(a.mul(sizes, self.bound(a)[0]), self.denominator(a, total)[0])


def _tile(a: Arithmetic[V], problem: MLSTMProblem, part: Part[V], m: V, q: V | None) -> Tile[V]:
    """e^{D − m} and P of some columns; ``q`` None is for the final state's rows."""
    e = a.masked(a.exp(a.masked(a.sub(part.d, m), part.seen)), part.seen)
    k = problem.k[:, :, part.start : part.stop]
    if part.initial:
        scores = a.exact(torch.eye(problem.sizes[3], dtype=torch.float64)) if q is None else q
    else:
        scores = a.exact(k.mT) if q is None else a.matmul(q, a.transpose(a.exact(k)))
    scores = scores if q is None else a.scaled(scores, problem.scale)
    return Tile(part.start, part.stop, e, a.mul(scores, e), part.initial)


def summed(a: Arithmetic[V], terms: Sequence[V]) -> V:
    """The sum of one or more values."""
    total = terms[0]
    for term in terms[1:]:
        total = a.add(total, term)
    return total


def _product(a: Arithmetic[V], left: V, right: V) -> V:
    """(…, R, C) × (…, C, X); many columns in blocks, so that the radius does not grow with their number."""
    batch, heads, rows, columns = a.shape(left)
    if columns <= LONGEST:
        return a.matmul(left, right)
    count, width = columns // BLOCK, a.shape(right)[-1]
    left = a.permute(a.reshape(left, (batch, heads, rows, count, BLOCK)), (0, 1, 3, 2, 4))
    terms = a.matmul(left, a.reshape(right, (batch, heads, count, BLOCK, width)))
    return a.reshape(a.sum(a.permute(terms, (0, 1, 3, 4, 2))), (batch, heads, rows, width))


def _total(a: Arithmetic[V], x: V) -> V:
    """The sum over the last axis, likewise."""
    *shape, columns = a.shape(x)
    if columns <= LONGEST:
        return a.sum(x)
    parts = a.reshape(a.sum(a.reshape(x, (*shape, columns // BLOCK, BLOCK))), (*shape, columns // BLOCK))
    return a.sum(parts)


def placed(a: Arithmetic[V], x: V, first: int, length: int) -> V:
    """Rows (…, r, X) at the positions ``first`` onwards of ``length`` rows that are otherwise 0."""
    rows = a.shape(x)[-2]
    if rows == length:
        return x
    select = (torch.arange(length)[:, None] == torch.arange(first, first + rows)[None, :]).double()
    return a.matmul(a.exact(select), x)


def final_state(a: Arithmetic[V], problem: MLSTMProblem, *, absolute: bool = False) -> dict[str, V]:
    """C' = e^{F + m₀ − m} C'₀ + Σ_j e^{D_j − m} k_j v_jᵀ, n' and m after the last position.

    Without positions the initial state, with 0 for a level of −∞. With ``absolute`` sums of the terms' sizes,
    and m as it is.
    """
    if problem.sizes[2]:
        rows, m = Rows.final(a, problem)
        state, n = rows.sums(a, absolute=absolute)
        found = {"state": state, "n": n, "m": m}
    elif problem.initial is not None:
        begun = problem.initial
        sizes = [x.abs() if absolute else x for x in (begun.state, begun.n)]
        found = {"state": a.exact(sizes[0]), "n": a.exact(sizes[1]), "m": a.exact(begun.m)}
    else:
        return {name: a.exact(torch.zeros(problem.shape(name)).double()) for name in ("state", "n", "m")}
    return {name: a.reshape(x, problem.shape(name)) for name, x in found.items()}


def _largest(a: Arithmetic[V], parts: Sequence[Part[V]]) -> torch.Tensor:
    """A float64 number near the largest D of each row."""
    hidden = [a.midpoint(part.d).masked_fill(~part.seen, -math.inf) for part in parts]
    return torch.cat(hidden, -1).amax(-1, keepdim=True)


def _absolute(a: Arithmetic[V], x: V) -> V:
    return a.add(a.relu(x), a.relu(a.scaled(x, -1.0)))


def magnitude(
    problem: MLSTMProblem, batch: int, head: int, place: int
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """D and P of one row over the positions up to it, Z and m with the initial state's: for words only."""
    a = EnclosureArithmetic()
    rows = Rows.of(a, problem, place // BLOCK * BLOCK, place + 1)
    p = torch.cat([tile.p.value for tile in rows.tiles if not tile.initial], -1)[batch, head, -1]
    parts = log_weights(a, problem.gates, place, place + 1)
    d = torch.cat([part.d.value.masked_fill(~part.seen, -math.inf) for part in parts], -1)
    total, m = rows.sums(a)[1].value, rows.shift
    return d[batch, head, 0], p, float(total[batch, head, -1, 0]), float(m[batch, head, -1, 0])
