"""Outputs and gradients of one part of an ``ssm`` call over an arithmetic; formulas in :mod:`ssm`."""

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
    Pair,
    StateKernel,
    blocks_of_rows,
    contracted,
    joined,
    over_batch,
    padded,
    rearranged,
)

__all__ = ["Operands", "Response"]


@dataclass(frozen=True, eq=False)
class Operands:
    """What one part of a call works on, the whole batch or one packed sequence; finite.

    Attributes:
        modes: the parameters; u: (B, H, n); d: (H) or None; initial: (B, H, D) or (B, H, D, 2), or None.
        rows: int64, the positions that are evaluated.
        kernel: float64 (H, size), used in place of that of ``modes`` for what is read; for budgets.
    """

    modes: Modes
    u: torch.Tensor
    d: torch.Tensor | None
    initial: torch.Tensor | None
    rows: torch.Tensor
    kernel: torch.Tensor | None = None


class Response(Generic[V]):
    """Outputs and gradients of one part over an arithmetic."""

    def __init__(self, a: Arithmetic[V], x: Operands) -> None:
        self.a, self.x, self.numbers = a, x, Numbers(a)
        self.length = x.u.shape[2]
        self.state = StateKernel(a, x.modes, self.length)
        self.kernel = self.state.kernel() if x.kernel is None else a.exact(x.kernel)
        self.initial = None if x.initial is None else x.modes.pair(a, x.initial)

    def convolved(self, u: torch.Tensor, rows: torch.Tensor) -> V:
        """Σ_{s≤t} K_{t−s} u_s for t in ``rows``, (B, H, R)."""
        a, state, parts = self.a, self.state, []
        batch, heads = u.shape[:2]
        wide = padded(u, state.size)
        if len(rows) == self.length:
            # The last block of rows holds every lag: the others read it from u moved by whole blocks.
            matrix = state.toeplitz(self.kernel, state.first + torch.arange(state.block), state.size)
            moved = torch.nn.functional.pad(wide, (state.first, 0)).unfold(-1, state.size, state.block)
            found = a.transpose(contracted(a, matrix, a.exact(moved.mT)))
            return rearranged(found, lambda y: y.reshape(batch, heads, state.size)[..., : self.length])
        for run in blocks_of_rows(rows, state.size, heads):
            columns = state.columns(run)
            matrix = state.toeplitz(self.kernel, run, columns)
            found = contracted(a, matrix, a.exact(wide[:, :, :columns, None]))
            parts.append(a.reshape(found, (batch, heads, len(run))))
        return joined(parts, -1) if parts else a.exact(u[..., :0])

    def reads(self) -> V:
        """y at the rows, (B, H, R)."""
        a, numbers, x = self.a, self.numbers, self.x
        y = self.convolved(x.u, x.rows)
        if self.initial is not None:
            y = a.add(y, self.weighted(numbers.mul(self.initial, self.state.c), self.state.power(x.rows + 1)))
        if x.d is not None:
            y = a.add(y, a.mul(a.exact(x.d[:, None]), a.exact(x.u[..., x.rows])))
        return y

    def weighted(self, weights: Pair[V], powers: Pair[V]) -> V:
        """Re Σ_s weights (B, H, D) · powers (H, D, R), (B, H, R)."""
        found = self.numbers.real_product(self.numbers.axis(weights, -2), powers)
        batch, heads, _, rows = self.a.shape(found)
        return self.a.reshape(found, (batch, heads, rows))

    @property
    def last(self) -> Pair[V]:
        """a^N, (H, D)."""
        a = self.a
        power = self.state.power(torch.tensor([self.length]))
        return self.numbers.each(power, lambda x: a.reshape(x, a.shape(x)[:2]))

    def final(self) -> Pair[V]:
        """The final state, (B, H, D)."""
        numbers = self.numbers
        state = self.state.written(padded(self.x.u.flip(-1), self.state.size))
        state = numbers.mul(state, self.state.b)
        if self.initial is not None:
            state = numbers.add(state, numbers.mul(self.initial, self.last))
        return state

    def gradients(self, dy: torch.Tensor, dfinal: torch.Tensor | None) -> dict[str, V]:
        """Gradients by u, a, b, c, d and initial_state, of calls in which every row is read."""
        a, numbers, state, x = self.a, self.numbers, self.state, self.x
        powers = state.powers()
        asked = None if dfinal is None else x.modes.pair(a, dfinal)
        extra = None if dfinal is None else self._of_final(dfinal)
        da, db, dc = state.gradients(self._correlation(dy), extra, powers)
        index = np.arange(self.length - 1, -1, -1)
        du = rearranged(self.convolved(dy.flip(-1), x.rows), lambda y: y[..., index])
        if asked is not None:
            weights = numbers.mul(numbers.conj(asked), state.b)
            du = a.add(du, self.weighted(weights, numbers.each(powers, lambda y: rearranged(y, _at(index)))))
        result = {}
        if x.d is not None:
            du = a.add(du, a.mul(a.exact(x.d[:, None]), a.exact(dy)))
            total = over_batch(a, a.sum(a.mul(a.exact(dy), a.exact(x.u))))
            result["dd"] = a.reshape(total, tuple(x.d.shape))
        if self.initial is not None:
            by_initial, more_a, more_c = self._initial(dy, asked, powers)
            da, dc = numbers.add(da, more_a), numbers.add(dc, more_c)
            result["dinitial_state"] = x.modes.stacked(a, by_initial)
        for name, pair in (("da", da), ("db", db), ("dc", dc)):
            result[name] = x.modes.stacked(a, pair)
        return result | {"du": du}

    def _correlation(self, dy: torch.Tensor) -> V:
        """dK_i = Σ_t dy_t u_{t−i}, summed over the batch, (H, size); in blocks, as the convolution."""
        a, size, state = self.a, self.state.size, self.state
        heads = dy.shape[1]
        u = torch.nn.functional.pad(padded(self.x.u, size), (state.block - 1, 0)).unfold(-1, size, 1)
        later = torch.nn.functional.pad(padded(dy, size), (0, state.first)).unfold(-1, size, state.block)
        found = contracted(a, a.exact(u[:, :, torch.arange(state.block - 1, -1, -1)]), a.exact(later.mT))
        return a.reshape(over_batch(a, a.transpose(found)), (heads, size))

    def _of_final(self, dfinal: torch.Tensor) -> Pair[V]:
        """Σ_batch F u_{N−1−i}, (H, D, size)."""
        a = self.a
        u = a.exact(padded(self.x.u.flip(-1), self.state.size).transpose(0, 1))
        by_batch = self.x.modes.pair(a, dfinal.movedim(0, 2))
        return self.numbers.each(by_batch, lambda f: a.matmul(f, u))

    def _initial(
        self, dy: torch.Tensor, asked: Pair[V] | None, powers: Pair[V]
    ) -> tuple[Pair[V], Pair[V], Pair[V]]:
        """dx_0 (B, H, D), and the initial state's parts of da and dc."""
        a, numbers, state = self.a, self.numbers, self.state
        assert self.initial is not None
        later = padded(torch.nn.functional.pad(dy, (1, 0)), state.size)
        slopes, column = state.slopes(powers), a.exact(later[..., None])
        turned = numbers.conj(self.initial)

        def read(part: V) -> V:
            found = contracted(a, part, column)
            return a.reshape(found, a.shape(found)[:-1])

        response = numbers.conj(state.written(later))
        by_a = numbers.mul(numbers.conj(state.c), numbers.conj(numbers.each(slopes, read)))
        by_initial = numbers.mul(numbers.conj(state.c), response)
        if asked is not None:
            by_initial = numbers.add(by_initial, numbers.mul(numbers.conj(self.last), asked))
            at_last = numbers.each(slopes, lambda y: rearranged(y, lambda z: z[..., self.length]))
            by_a = numbers.add(by_a, numbers.mul(numbers.conj(at_last), asked))
        more = [
            numbers.each(numbers.mul(turned, y), lambda part: over_batch(a, part)) for y in (by_a, response)
        ]
        return by_initial, more[0], more[1]


def _at(index: Any) -> Callable[[Any], Any]:
    return lambda x: x[..., index]
