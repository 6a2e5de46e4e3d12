"""Log weights of the mLSTM's quadratic form: D_ij = Σ_{j<t≤i} log σ(f_t) + i_j for j ≤ i.

The initial state has one weight more, Σ_{t≤i} log σ(f_t) + m₀.

A row's own block of columns is summed entry by entry, each decay from its own gates, and columns before it by
way of the block's first position. Nowhere is one long sum taken off another: the weights keep their relative
accuracy after a gate of −1000, and a gate of −∞ makes the weights across it exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.families.mlstm_states import Initial

__all__ = ["BLOCK", "Gates", "Part", "after", "blocks", "log_forget", "log_weights"]

BLOCK = 32
"""Rows of a block; a power of two that keeps BLOCK³ exact additions cheap in every arithmetic."""


@dataclass(frozen=True, eq=False)
class Gates:
    """Pre-activations (B, H, N) of a call.

    Attributes:
        i: of the input gate, finite.
        f: of the forget gate, finite, 0 where it was −∞.
        cut: bool, where the forget gate was −∞ and the state before is forgotten.
    """

    i: torch.Tensor
    f: torch.Tensor
    cut: torch.Tensor


@dataclass(frozen=True, eq=False)
class Part(Generic[V]):
    """Log weights of some rows and of the columns ``start:stop``.

    Attributes:
        d: (B, H, rows, stop − start), any number where ``seen`` is False.
        seen: bool, of d's shape.
        initial: whether these are the weights of the initial state, one a row; ``start`` and ``stop`` are 0.
    """

    start: int
    stop: int
    d: V
    seen: torch.Tensor
    initial: bool = False


def blocks(length: int, rows: torch.Tensor | None = None) -> Iterator[tuple[int, int]]:
    """(first row, end) of every block of rows, or of runs of ``rows`` (int64, rising) inside of blocks."""
    if rows is None:
        for start in range(0, length, BLOCK):
            yield start, min(start + BLOCK, length)
        return
    first = stop = -1
    for row in rows.tolist():
        if row != stop or row % BLOCK == 0:
            if stop >= 0:
                yield first, stop
            first = row
        stop = row + 1
    if stop >= 0:
        yield first, stop


def log_forget(a: Arithmetic[V], f: torch.Tensor) -> V:
    """log σ(f) = min(f, 0) − log(1 + e^−|f|), of finite f."""
    tail = a.exp(a.exact(-f.double().abs()))
    return a.sub(a.exact(f.double().clamp(max=0.0)), a.log(a.add(tail, a.exact(torch.ones_like(f).double()))))


def after(length: int) -> torch.Tensor:
    """[t, j] is 1 where t > j: a row of numbers times it holds the sum of what comes after each."""
    places = torch.arange(length)
    return (places[:, None] > places[None, :]).double()


def log_weights(
    a: Arithmetic[V], gates: Gates, first: int, stop: int, initial: Initial | None = None
) -> list[Part[V]]:
    """D of the rows ``first`` to ``stop`` − 1, of one block.

    Of the columns before the block, if there are any, of those in it, and of the initial state, if there is
    one, in this order.
    """
    start = first // BLOCK * BLOCK
    batch, heads = gates.f.shape[:2]
    width, rows = stop - start, stop - first
    places = torch.arange(start, stop)
    chosen = torch.arange(first, stop)
    own = a.reshape(log_forget(a, gates.f[..., start:stop]), (batch, heads, 1, width))
    between = (places <= chosen[:, None, None]) & (places > places[None, :, None])
    d = a.matmul(own, a.exact(between.double().reshape(rows * width, width).mT))
    d = a.add(a.reshape(d, (batch, heads, rows, width)), _row(a, gates.i[..., start:stop]))
    parts = [Part(start, stop, d, _seen(gates, chosen, start, stop))]
    if not start and initial is None:
        return parts
    head = a.matmul(own, a.exact((places[:, None] <= chosen[None, :]).double()))
    head = a.reshape(head, (batch, heads, rows, 1))
    if start:
        d = a.add(head, _tails(a, gates, start))
        parts.insert(0, Part(0, start, d, _seen(gates, chosen, 0, start)))
    if initial is not None:
        m = a.exact(initial.m.reshape(batch, heads, 1, 1))
        d = a.add(head, a.add(_whole(a, gates, start), m) if start else m)
        seen = (gates.cut.cumsum(-1)[..., chosen] == 0) & initial.present[..., None]
        parts.append(Part(0, 0, d, seen[..., None], initial=True))
    return parts


def _whole(a: Arithmetic[V], gates: Gates, start: int) -> V:
    """Σ_{t<start} log σ(f_t), (B, H, 1, 1)."""
    batch, heads = gates.f.shape[:2]
    blocked = (batch, heads, start // BLOCK, BLOCK)
    totals = a.sum(a.reshape(log_forget(a, gates.f[..., :start]), blocked))
    return a.sum(a.reshape(totals, (batch, heads, 1, start // BLOCK)))


def _tails(a: Arithmetic[V], gates: Gates, start: int) -> V:
    """Σ_{j<t<start} log σ(f_t) + i_j, (B, H, 1, start)."""
    batch, heads = gates.f.shape[:2]
    count = start // BLOCK
    early = a.reshape(log_forget(a, gates.f[..., :start]), (batch, heads, count, BLOCK))
    within = a.matmul(early, a.exact(after(BLOCK)))
    totals = a.reshape(a.sum(early), (batch, heads, 1, count))
    beyond = a.reshape(a.matmul(totals, a.exact(after(count))), (batch, heads, count, 1))
    return a.add(a.reshape(a.add(within, beyond), (batch, heads, 1, start)), _row(a, gates.i[..., :start]))


def _row(a: Arithmetic[V], i: torch.Tensor) -> V:
    return a.exact(i.double()[:, :, None, :])


def _seen(gates: Gates, chosen: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Columns that are not after a row and from which no gate of −∞ separates it."""
    cuts = gates.cut.cumsum(-1)
    same = cuts[:, :, chosen, None] == cuts[:, :, None, start:stop]
    return same & (torch.arange(start, stop)[None, :] <= chosen[:, None])
