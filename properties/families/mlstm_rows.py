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
from attnproof.properties.families.state_layout import LONGEST

if TYPE_CHECKING:
    from attnproof.properties.families.mlstm import MLSTMProblem

__all__ = ["Rows", "Tile", "final_state", "magnitude", "placed", "summed"]


@dataclass(frozen=True, eq=False)
class Tile(Generic[V]):
    """Rows by the columns ``start:stop``.

    Attributes:
        e: e^{D − m}, 0 where a column is not seen; (B, H, rows, columns).
        p: scale · q·k · e.
    """

    start: int
    stop: int
    e: V
    p: V


@dataclass(frozen=True, eq=False)
class Rows(Generic[V]):
    """The rows ``first:stop`` of a problem.

    Attributes:
        tiles: the columns that they see.
        shift: float64 (B, H, rows, 1), m up to its rounding: any shift gives the same o.
    """

    problem: MLSTMProblem
    first: int
    stop: int
    tiles: tuple[Tile[V], ...]
    shift: torch.Tensor

    @classmethod
    def of(cls, a: Arithmetic[V], problem: MLSTMProblem, first: int, stop: int) -> Rows[V]:
        """The weights of rows that lie in one block."""
        parts = log_weights(a, problem.gates, first, stop)
        shift = _largest(a, parts)
        q = a.exact(problem.q[:, :, first:stop])
        tiles = []
        for part in parts:
            e = a.masked(a.exp(a.masked(a.sub(part.d, a.exact(shift)), part.seen)), part.seen)
            k = a.exact(problem.k[:, :, part.start : part.stop])
            scores = a.scaled(a.matmul(q, a.transpose(k)), problem.scale)
            tiles.append(Tile(part.start, part.stop, e, a.mul(scores, e)))
        return cls(problem, first, stop, tuple(tiles), shift)

    def values(self, a: Arithmetic[V], tile: Tile[V]) -> V:
        """v of a tile's columns."""
        return a.exact(self.problem.v[:, :, tile.start : tile.stop])

    def sums(self, a: Arithmetic[V]) -> tuple[V, V]:
        """Σ P v and Σ P."""
        return (
            summed(a, [_product(a, tile.p, self.values(a, tile)) for tile in self.tiles]),
            summed(a, [_total(a, tile.p) for tile in self.tiles]),
        )

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
        sizes = [
            _product(a, _absolute(a, tile.p), a.exact(self.problem.v[:, :, tile.start : tile.stop].abs()))
            for tile in self.tiles
        ]
        total = self.sums(a)[1]
        return a.div(a.mul(summed(a, sizes), self.bound(a)[0]), self.denominator(a, total)[0])


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
    """C' = Σ_j e^{D_j − m} k_j v_jᵀ, n' and m after the last position.

    With ``absolute`` Σ e^{D_j − m} |k_j||v_j|, of n' likewise, and m as it is.
    """
    length = problem.sizes[2]
    if not length:
        return {
            name: a.exact(torch.zeros(problem.shape(name), dtype=torch.float64))
            for name in ("state", "n", "m")
        }
    parts = log_weights(a, problem.gates, length - 1, length)
    m = _maximum(a, parts)
    states, keys = [], []
    for part in parts:
        # (B, H, 1, columns)
        e = a.masked(a.exp(a.masked(a.sub(part.d, m), part.seen)), part.seen)
        k, v = (x[:, :, part.start : part.stop] for x in (problem.k, problem.v))
        k, v = (k.abs(), v.abs()) if absolute else (k, v)
        written = a.mul(a.transpose(a.exact(k)), e)
        states.append(_product(a, written, a.exact(v)))
        keys.append(_total(a, written))
    return {
        "state": summed(a, states),
        "n": a.reshape(summed(a, keys), problem.shape("n")),
        "m": a.reshape(m, problem.shape("m")),
    }


def _maximum(a: Arithmetic[V], parts: Sequence[Part[V]]) -> V:
    """max_j D_j of one row, (B, H, 1, 1).

    D of the column j* whose float64 approximation is largest, and Σ_j max(D_j − D_j*, 0): it is 0 if j* is
    the right one, and where columns are as near as float64 resolves the enclosure of the sum reaches from 0
    to more than the largest of its terms. In finer arithmetics the differences choose again.
    """
    sizes = [a.midpoint(part.d) for part in parts]
    best = _chosen(a, parts, sizes)
    rises = [a.relu(a.masked(a.sub(part.d, best), part.seen)) for part in parts]
    heights = [a.midpoint(rise) for rise in rises]
    wrong = torch.cat(heights, -1).amax(-1, keepdim=True) > 0
    if bool(wrong.any()):
        finer = [torch.where(wrong, x, y) for x, y in zip(heights, sizes, strict=True)]
        best = _chosen(a, parts, finer)
        rises = [a.relu(a.masked(a.sub(part.d, best), part.seen)) for part in parts]
    return a.add(best, summed(a, [a.sum(rise) for rise in rises]))


def _chosen(a: Arithmetic[V], parts: Sequence[Part[V]], sizes: Sequence[torch.Tensor]) -> V:
    """D of the column with the largest size, (B, H, 1, 1)."""
    hidden = [size.masked_fill(~part.seen, -math.inf) for part, size in zip(parts, sizes, strict=True)]
    whole = torch.cat(hidden, -1)
    here = torch.arange(whole.shape[-1]) == whole.argmax(-1, keepdim=True)
    return summed(a, [a.sum(a.masked(part.d, here[..., part.start : part.stop])) for part in parts])


def _largest(a: Arithmetic[V], parts: Sequence[Part[V]]) -> torch.Tensor:
    """A float64 number near the largest D of each row."""
    hidden = [a.midpoint(part.d).masked_fill(~part.seen, -math.inf) for part in parts]
    return torch.cat(hidden, -1).amax(-1, keepdim=True)


def _absolute(a: Arithmetic[V], x: V) -> V:
    return a.add(a.relu(x), a.relu(a.scaled(x, -1.0)))


def magnitude(
    problem: MLSTMProblem, batch: int, head: int, place: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """D and P of one row over the positions up to it, float64, and Σ P: for words, not for proofs."""
    a = EnclosureArithmetic()
    rows = Rows.of(a, problem, place // BLOCK * BLOCK, place + 1)
    p = torch.cat([tile.p.value for tile in rows.tiles], -1)[batch, head, -1]
    parts = log_weights(a, problem.gates, place, place + 1)
    d = torch.cat([part.d.value.masked_fill(~part.seen, -math.inf) for part in parts], -1)
    return d[batch, head, 0], p, float(p.sum())
