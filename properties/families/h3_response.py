"""Outputs, gradients and budgets' evaluations of an ``h3`` call over an arithmetic; formulas in :mod:`h3`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.families.state_kernel import (
    Modes,
    Numbers,
    StateKernel,
    blocks_of_rows,
    contracted,
    joined,
    over_batch,
    rearranged,
)

__all__ = ["Operands", "Response"]


@dataclass(frozen=True, eq=False)
class Operands:
    """What a call works on; finite.

    Attributes:
        q, k: (B, H, N, D); v: (B, H, N, E); taps: (H, D, T); d_shift: (H, D) or None; d_diag: (H) or None.
        modes: a, b, c.
        rows: int64, the positions that are evaluated.
        kernel: float64 (H, size), and keys: float64 (B, H, N, D), used in place of K and k'; for budgets.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    taps: torch.Tensor
    modes: Modes
    d_shift: torch.Tensor | None
    d_diag: torch.Tensor | None
    rows: torch.Tensor
    kernel: torch.Tensor | None = None
    keys: torch.Tensor | None = None


def earlier(x: torch.Tensor, steps: int) -> torch.Tensor:
    """x_{t − steps} for (B, H, N, X), 0 before the start."""
    length = x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, min(steps, length), 0))[:, :, :length]


def _positions(index: Any) -> Callable[[Any], Any]:
    """What takes some positions of (B, H, N, X)."""
    return lambda x: x[:, :, index]


class Response(Generic[V]):
    """Outputs and gradients over an arithmetic."""

    def __init__(self, a: Arithmetic[V], x: Operands) -> None:
        self.a, self.x, self.numbers = a, x, Numbers(a)
        self.length = x.q.shape[2]
        self.state = StateKernel(a, x.modes, self.length)
        self.kernel = self.state.kernel() if x.kernel is None else a.exact(x.kernel)
        self.k, self.v = self._long(x.k), self._long(x.v)
        self.keys = self.filtered() if x.keys is None else a.exact(self._long(x.keys))

    def _long(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, N, X) with zeros up to (B, H, size, X)."""
        return torch.nn.functional.pad(x, (0, 0, 0, self.state.size - x.shape[2]))

    def _tap(self, i: int) -> V:
        """taps_i, (H, 1, D)."""
        return self.a.exact(self.x.taps[..., i][:, None])

    def filtered(self) -> V:
        """k' at every position, (B, H, size, D)."""
        a, x = self.a, self.x
        total = a.exact(torch.zeros(self.k.shape, dtype=torch.float64))
        for i in range(x.taps.shape[2]):
            total = a.add(total, a.mul(self._tap(i), a.exact(earlier(self.k, i))))
        if x.d_shift is not None:
            total = a.add(total, a.mul(a.exact(x.d_shift[:, None]), a.exact(self.k)))
        return total

    def mask(self, rows: torch.Tensor, columns: int) -> V:
        """T_ts = K_{t−s}, on the diagonal + d_diag, (H, R, columns)."""
        a, x = self.a, self.x
        found = self.state.toeplitz(self.kernel, rows, columns)
        if x.d_diag is None:
            return found
        own = rows[:, None] == torch.arange(columns)
        return a.add(found, a.exact(x.d_diag.double()[:, None, None] * own))

    def runs(self) -> list[torch.Tensor]:
        """The rows, in runs."""
        batch, heads = self.x.q.shape[:2]
        return blocks_of_rows(self.x.rows, self.state.size, heads * max(batch, 1))

    def reads(self) -> V:
        """o at the rows, (B, H, R, E)."""
        a, x, parts = self.a, self.x, []
        for run in self.runs():
            columns = self.state.columns(run)
            keys = rearranged(self.keys, _positions(slice(columns)))
            scores = a.matmul(a.exact(x.q[:, :, run]), a.transpose(keys))
            weights = a.mul(scores, self.mask(run, columns))
            parts.append(contracted(a, weights, a.exact(self.v[:, :, :columns])))
        return joined(parts, 2) if parts else a.exact(x.v[:, :, :0])

    def gradients(self, do: torch.Tensor) -> dict[str, V]:
        """Gradients by every input, of calls in which every row is read."""
        a, x, state = self.a, self.x, self.state
        size = state.size
        dkeys, dv = (a.exact(torch.zeros(t.shape, dtype=torch.float64)) for t in (self.k, self.v))
        dkernel = a.exact(torch.zeros(x.q.shape[1], size, dtype=torch.float64))
        dq, values = [], a.transpose(a.exact(self.v))
        for run in self.runs():
            q, g, mask = a.exact(x.q[:, :, run]), a.exact(do[:, :, run]), self.mask(run, size)
            scores = a.matmul(q, a.transpose(self.keys))
            by_weight = a.matmul(g, values)
            by_score = a.mul(by_weight, mask)
            dq.append(contracted(a, by_score, self.keys))
            dkeys = a.add(dkeys, a.matmul(a.transpose(by_score), q))
            dv = a.add(dv, a.matmul(a.transpose(a.mul(scores, mask)), g))
            dkernel = a.add(dkernel, self._by_lag(over_batch(a, a.mul(by_weight, scores)), run))
        da, db, dc = state.gradients(dkernel, None, state.powers())
        result = {"dq": joined(dq, 2) if dq else a.exact(x.q), **self._of_keys(dkeys)}
        result["dv"] = rearranged(dv, lambda y: y[:, :, : self.length])
        if x.d_diag is not None:
            result["dd_diag"] = rearranged(dkernel, lambda y: y[:, 0])
        for name, pair in (("da", da), ("db", db), ("dc", dc)):
            result[name] = x.modes.stacked(a, pair)
        return result

    def _by_lag(self, x: V, rows: torch.Tensor) -> V:
        """Σ_t x_{t, t−i} for every lag i, of x (H, R, size): (H, size)."""
        a = self.a
        column = rows[:, None] - torch.arange(self.state.size)
        row, index = np.arange(len(rows))[:, None], column.clamp(min=0).numpy()
        found = a.masked(rearranged(x, lambda y: y[:, row, index]), column >= 0)
        total = a.sum(a.transpose(found))
        return a.reshape(total, a.shape(total)[:2])

    def _of_keys(self, dkeys: V) -> dict[str, V]:
        """dk, dtaps and dd_shift of the gradient by k', (B, H, size, D)."""
        a, x, size = self.a, self.x, self.state.size
        dk = a.exact(torch.zeros(self.k.shape, dtype=torch.float64))
        dtaps = []
        for i in range(x.taps.shape[2]):
            place = torch.arange(size) + i
            index, inside = place.clamp(max=size - 1).numpy(), (place < size)[:, None]
            later = a.masked(rearranged(dkeys, _positions(index)), inside)
            dk = a.add(dk, a.mul(self._tap(i), later))
            dtaps.append(self._over_rows(a.mul(dkeys, a.exact(earlier(self.k, i)))))
        result = {}
        if x.d_shift is not None:
            dk = a.add(dk, a.mul(a.exact(x.d_shift[:, None]), dkeys))
            by_skip = self._over_rows(a.mul(dkeys, a.exact(self.k)))
            result["dd_shift"] = a.reshape(by_skip, tuple(x.d_shift.shape))
        heads, width = x.taps.shape[:2]
        wide = joined(dtaps, -1) if dtaps else a.exact(torch.zeros(heads, width, 0))
        return result | {"dk": rearranged(dk, lambda y: y[:, :, : self.length]), "dtaps": wide}

    def _over_rows(self, x: V) -> V:
        """Σ over batch and positions of (B, H, size, D), (H, D, 1)."""
        a, block = self.a, self.state.block
        batch, heads, size, width = a.shape(x)
        moved = a.reshape(a.permute(x, (1, 3, 0, 2)), (heads, width, batch, size // block, block))
        rows = a.reshape(a.sum(moved), (heads, width, batch * (size // block)))
        return a.sum(rows)
