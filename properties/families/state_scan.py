"""States carried from block to block: what each block writes, decayed to the start of every later one.

Blocks are taken in groups of at most 16, in which each sees each before it; what a group writes is carried
from group to group in the same way. Every exponent is a sum of log decays over exactly the blocks between,
and a state goes through three or four products in place of one for each block, so that neither roundings nor
radii grow with the number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V

__all__ = ["Scan", "decayed"]


def decayed(
    a: Arithmetic[V], gates: V | None, resets: torch.Tensor, chosen: torch.Tensor, keep: torch.Tensor
) -> V:
    """e to the sums of the chosen gates, (…, R, W).

    Args:
        a: the arithmetic.
        gates: (…, r, W) finite log decays, 0 where there are resets; None where all are 0.
        resets: float64 (…, r, W), how many decays of 0 there are.
        chosen: bool (R, r), the gates of each sum.
        keep: bool (R, 1), what is not 0.
    """
    select = chosen.double()
    if bool(resets.any()):
        keep = keep & (select @ resets == 0)
    if gates is None:
        return a.exact(keep.expand(*resets.shape[:-2], len(chosen), resets.shape[-1]).double())
    return a.masked(a.exp(a.matmul(a.exact(select), gates)), keep)


@dataclass(frozen=True, eq=False)
class Scan(Generic[V]):
    """Decays between blocks (B, H, C, …) in G groups of c; W is 1 or one for each channel of the key.

    Attributes:
        between: (B, H, G, W, c, c), from the end of the second block to the start of the first; 0 from later
            ones.
        first, last: (B, H, G, W, c, 1), from the start of the group to each block's start, and from each
            block's end to the end of the group; whole: (B, H, G, W, 1, 1), from its start to its end.
        groups: between the groups; None where there is one.
    """

    a: Arithmetic[V]
    between: V
    first: V
    last: V
    whole: V
    groups: Scan[V] | None

    @classmethod
    def of(cls, a: Arithmetic[V], totals: V | None, resets: torch.Tensor, sizes: tuple[int, ...]) -> Scan[V]:
        """The decays of blocks with log decays ``totals`` (B, H, C, W) and ``resets`` decays of 0.

        Args:
            a: the arithmetic.
            totals: finite log decays, None where all are 0.
            resets: float64 (B, H, C, W).
            sizes: of groups, groups of groups and so on, whose product is C.
        """
        batch, heads, count, width = resets.shape
        size = sizes[0]
        number = count // size if size else 1
        zero = resets.reshape(batch, heads, number, size, width)
        gates = None if totals is None else a.reshape(totals, tuple(zero.shape))
        c, every = torch.arange(size), torch.ones(1, 1, dtype=torch.bool)
        inside = (c[None] < c[:, None])[:, None, :] & (c[None] > c[:, None])[None, :, :]
        before = (c[None] < c[:, None]).reshape(size * size, 1)

        def by_channel(chosen: torch.Tensor, keep: torch.Tensor, *shape: int) -> V:
            """Sums of the chosen gates, (B, H, G, R·C', W) as (B, H, G, W, R, C')."""
            x = a.reshape(decayed(a, gates, zero, chosen, keep), (batch, heads, number, *shape, width))
            return a.permute(x, (0, 1, 2, 5, 3, 4))

        groups = None
        if len(sizes) > 1:
            above = None
            if gates is not None:
                above = a.reshape(a.sum(a.permute(gates, (0, 1, 2, 4, 3))), (batch, heads, number, width))
            groups = cls.of(a, above, zero.sum(3), sizes[1:])
        return cls(
            a,
            between=by_channel(inside.reshape(size * size, size), before, size, size),
            first=by_channel(c[None] < c[:, None], every, size, 1),
            last=by_channel(c[None] > c[:, None], every, size, 1),
            whole=by_channel(torch.ones(1, size, dtype=torch.bool), every, 1, 1),
            groups=groups,
        )

    def entering(self, written: V, initial: V) -> tuple[V, V]:
        """States at the blocks' starts (B, H, C, D, E), and after them all.

        Args:
            written: (B, H, C, D, E), what each block adds by its end.
            initial: (B, H, D, E).
        """
        return self._carried(written, initial, back=False)

    def leaving(self, asked: V, final: V) -> tuple[V, V]:
        """The transpose: cotangents of the states at the blocks' ends, and of the initial state.

        Args:
            asked: (B, H, C, D, E), cotangents of the states at the blocks' starts by what they read.
            final: (B, H, D, E), of the final state.
        """
        return self._carried(asked, final, back=True)

    def _carried(self, blocks: V, end: V, *, back: bool) -> tuple[V, V]:
        a = self.a
        batch, heads, count, d, e = a.shape(blocks)
        number, width, size = a.shape(self.between)[2:5]
        row = e if width == d else d * e
        ways = (self.last, self.first, self.between)
        out, into, between = (self.first, self.last, a.transpose(self.between)) if back else ways
        x = a.permute(a.reshape(blocks, (batch, heads, number, size, width, row)), (0, 1, 2, 4, 3, 5))
        grouped = a.matmul(a.transpose(out), x)  # (B, H, G, W, 1, X)
        if self.groups is None:
            entering = a.reshape(end, (batch, heads, 1, width, 1, row))
            last = a.reshape(a.add(a.mul(self.whole, entering), grouped), (batch, heads, d, e))
        else:
            states, last = self.groups._carried(
                a.reshape(grouped, (batch, heads, number, d, e)), end, back=back
            )
            entering = a.reshape(states, (batch, heads, number, width, 1, row))
        found = a.permute(a.add(a.matmul(between, x), a.mul(into, entering)), (0, 1, 2, 4, 3, 5))
        return a.reshape(found, (batch, heads, count, d, e)), last
