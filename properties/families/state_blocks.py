"""The recurrence that linear, gated linear and RWKV-6 attention and RetNet share, in blocks.

With decays a_t = exp(g_t), states S_t = a_t ∘ S_{t−1} + k_t v_tᵀ from S_0, and reads o_t = scale · q_tᵀ S_t:

    o_i = scale (Σ_j Σ_c q_ic k_jc e^{Δ_ijc} v_j + Σ_c q_ic e^{Δ_i0c} S_0c),    Δ_ij = Σ_{j<r≤i} g_r ≤ 0

(theory GLA-2; RWKV-6 reads before the decay of its own position: Δ_ij = Σ_{j<r<i} g_r over j < i, and a bonus
Σ_c q_ic u_c k_ic v_i, theory RWK-2). Positions are taken in blocks of a few: inside a block pair by pair,
from block to block through the state that each block writes, again pair by pair (theory GLA-3). Every
exponent is a sum of gates over exactly the positions between, never a difference of two cumulative sums, so
that none is positive and none cancels; a decay of 0 (g = −∞) is a mask.

Gradients of Σ o·dO + Σ S_N·dS_N, with D_j the cotangent of S_j, D_j = Σ_{i≥j} e^{Δ_ij} scale q_i dO_iᵀ +
e^{Δ_Nj} dS_N:

    dq_i = scale S_i dO_i,   dk_j = D_j v_j,   dv_j = D_jᵀ k_j,   dg_t = Σ_e (a_t S_{t−1} ∘ D_t)_e,

where dg_t is taken as the sum over all (j, i) with t between them: the definition behind the closed form
GLA-4, without its cancellation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V

__all__ = ["Blocks", "Decays", "Operands", "StateGradients", "Whole", "block_length", "in_blocks"]

# Positions in a block: with a decay for each channel it costs n² exponentials a channel, else one matrix.
# Few long blocks make fewer pairs of blocks where there are many positions.
CHANNEL_BLOCK, HEAD_BLOCK = 16, 64
LONG, LONG_BLOCK = 1024, 32


def block_length(length: int, width: int) -> int:
    """Positions in a block for N = ``length`` and ``width`` decays a position."""
    if width == 1:
        return max(min(length, HEAD_BLOCK), 1)
    return LONG_BLOCK if length >= LONG else max(min(length, CHANNEL_BLOCK), 1)


def in_blocks(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, N, X) as (B, H, C, n, X), n = ``size``, with zeros after the end."""
    batch, heads, length, width = tensor.shape
    count = -(-length // size)
    padded = tensor.new_zeros(batch, heads, count * size, width)
    padded[:, :, :length] = tensor
    return padded.reshape(batch, heads, count, size, width)


@dataclass(frozen=True, eq=False)
class Decays(Generic[V]):
    """The decays of one call; W is 1 or one for each channel of the key.

    Attributes:
        prefix, suffix: (B, H, C, n, W), from the start of the block to the read of a position, and from its
            write to the block's end.
        pairs: (B, H, C, n, n, W), from the write of the second position to the read of the first; 0 where
            the first does not see the second.
        block: (B, H, C, 1, W), from the start of a block to its end.
        between: (B, H, W, C, C), from the end of the second block to the start of the first; 0 from later
            ones.
        first, last: (B, H, W, C, 1), from the initial state to each block's start, from each block's end
            to the final state; whole: (B, H, W, 1, 1), from the initial state to the final one.
    """

    prefix: V
    suffix: V
    pairs: V
    block: V
    between: V
    first: V
    last: V
    whole: V
    gated: bool

    @classmethod
    def of(
        cls, a: Arithmetic[V], gates: V | None, resets: torch.Tensor, *, exclusive: bool = False
    ) -> Decays[V]:
        """The decays of log decays ``gates`` (B, H, C, n, W), finite and ≤ 0; None where all are 0.

        Args:
            a: the arithmetic.
            gates: log decays, 0 where ``resets`` holds.
            resets: bool (B, H, C, n, W), positions whose decay is 0.
            exclusive: whether a read comes before its own position's decay.
        """
        batch, heads, count, size, width = resets.shape
        t = torch.arange(size)
        own = t[None] < t[:, None] if exclusive else t[None] <= t[:, None]
        after = t[None] > t[:, None]
        # [i, j, r]: gate r lies between the write of j and the read of i.
        crossed = (own[:, None, :] & after[None, :, :]).reshape(size * size, size)
        seen = t[None] < t[:, None] if exclusive else t[None] <= t[:, None]
        zero = resets.double()

        def decayed(gate: V | None, reset: torch.Tensor, chosen: torch.Tensor, keep: torch.Tensor) -> V:
            """e to the sum of the chosen gates, (…, R, r) over the axis before the last; (…, R, W)."""
            select = chosen.double()
            keep = keep & (select @ reset == 0)
            if gate is None:
                return a.exact(keep.double())
            exponents = a.matmul(a.exact(select), gate)
            return a.masked(a.exp(a.masked(exponents, keep)), keep)

        every = torch.ones(1, 1, dtype=torch.bool)
        c = torch.arange(count)
        total = None if gates is None else a.permute(gates, (0, 1, 2, 4, 3))
        total = None if total is None else a.reshape(a.sum(total), (batch, heads, count, width))
        spent = zero.sum(3)  # how many decays of 0 a block has
        blocks = ((c[None] < c[:, None])[:, None, :] & (c[None] > c[:, None])[None, :, :]).reshape(
            count * count, count
        )
        before = (c[None] < c[:, None]).reshape(count * count, 1)

        def by_channel(x: V, rows: int, columns: int) -> V:
            """(B, H, R·C', W) as (B, H, W, R, C')."""
            return a.permute(a.reshape(x, (batch, heads, rows, columns, width)), (0, 1, 4, 2, 3))

        pairs = decayed(gates, zero, crossed, seen.reshape(size * size, 1))
        return cls(
            prefix=decayed(gates, zero, own, every),
            suffix=decayed(gates, zero, after, every),
            pairs=a.reshape(pairs, (batch, heads, count, size, size, width)),
            block=decayed(gates, zero, t[None] >= 0, every),
            between=by_channel(decayed(total, spent, blocks, before), count, count),
            first=by_channel(decayed(total, spent, c[None] < c[:, None], every), count, 1),
            last=by_channel(decayed(total, spent, c[None] > c[:, None], every), count, 1),
            whole=by_channel(decayed(total, spent, c[None] >= 0, every), 1, 1),
            gated=gates is not None,
        )


@dataclass(frozen=True, eq=False)
class StateGradients(Generic[V]):
    """Gradients by what :class:`Blocks` holds; of the same shapes, gates (B, H, C, n, W), u (H, D)."""

    q: V
    k: V
    v: V
    gates: V | None
    initial: V
    bonus: V | None


class Blocks(Generic[V]):
    """One call in blocks: sequences of one length, each with its own initial state.

    Args:
        a: the arithmetic.
        q, k: (B, H, C, n, D), 0 after the end of the sequence; v: (B, H, C, n, E).
        decays: between positions.
        initial: (B, H, D, E).
        bonus: (H, D), the weight of a position's own key and value, which are then not part of the state
            that it reads; None where a position reads its own write.
    """

    def __init__(
        self, a: Arithmetic[V], q: V, k: V, v: V, decays: Decays[V], initial: V, bonus: V | None = None
    ) -> None:
        self.a, self.q, self.k, self.v = a, q, k, v
        self.decays, self.initial = decays, initial
        self.batch, self.heads, self.count, self.size, self.width = a.shape(q)
        self.values = a.shape(v)[-1]
        self.channels = a.shape(decays.prefix)[-1]
        self.bonus = None if bonus is None else a.reshape(bonus, (1, self.heads, 1, 1, self.width))
        self.written = a.matmul(a.transpose(a.mul(k, decays.suffix)), v)  # (B, H, C, D, E)
        blocks = self._by_channel(self.written)
        kept = a.mul(decays.first, self._alone(initial))
        entering = a.add(a.matmul(decays.between, blocks), kept)
        self.entering = a.permute(entering, (0, 1, 3, 2, 4))  # (B, H, C, D, E)
        final = a.add(a.matmul(a.transpose(decays.last), blocks), a.mul(decays.whole, self._alone(initial)))
        self.final = a.reshape(final, (self.batch, self.heads, self.width, self.values))

    def _by_channel(self, states: V) -> V:
        """(B, H, C, D, E) as (B, H, D, C, E)."""
        return self.a.permute(states, (0, 1, 3, 2, 4))

    def _alone(self, state: V) -> V:
        """(B, H, D, E) as (B, H, D, 1, E)."""
        return self.a.reshape(state, (self.batch, self.heads, self.width, 1, self.values))

    def _shaped(self, x: V, *tail: int) -> V:
        return self.a.reshape(x, (self.batch, self.heads, self.count, *tail))

    def _facing(self) -> tuple[V, V]:
        """q as (…, n, 1, D) and k as (…, 1, n, D)."""
        n, d = self.size, self.width
        return self._shaped(self.q, n, 1, d), self._shaped(self.k, 1, n, d)

    def _pairs(self) -> V:
        """The decays of pairs as a matrix (…, n, n), where they are the same for all channels."""
        return self._shaped(self.decays.pairs, self.size, self.size)

    def weights(self) -> V:
        """w_ij inside the blocks, (B, H, C, n, n), the bonus not included."""
        a = self.a
        if self.channels == 1:
            return a.mul(a.matmul(self.q, a.transpose(self.k)), self._pairs())
        q, k = self._facing()
        return self._shaped(a.sum(a.mul(a.mul(q, k), self.decays.pairs)), self.size, self.size)

    def reads(self) -> V:
        """What the positions read, (B, H, C, n, E), before the scale."""
        a = self.a
        o = a.add(
            a.matmul(a.mul(self.q, self.decays.prefix), self.entering), a.matmul(self.weights(), self.v)
        )
        if self.bonus is not None:
            o = a.add(o, a.mul(a.sum(a.mul(a.mul(self.q, self.bonus), self.k)), self.v))
        return o

    def gradients(self, do: V, dfinal: V) -> StateGradients[V]:
        """Gradients of Σ reads·do + Σ final·dfinal; do (B, H, C, n, E), dfinal (B, H, D, E)."""
        a, decays = self.a, self.decays
        asked = a.matmul(a.transpose(a.mul(self.q, decays.prefix)), do)  # (B, H, C, D, E), of entering states
        blocks, last = self._by_channel(asked), self._alone(dfinal)
        after = a.add(a.matmul(a.transpose(decays.between), blocks), a.mul(decays.last, last))
        leaving = a.permute(after, (0, 1, 3, 2, 4))  # cotangents of the states at the blocks' ends
        initial = a.add(a.matmul(a.transpose(decays.first), blocks), a.mul(decays.whole, last))
        inner = a.matmul(do, a.transpose(self.v))  # (B, H, C, n, n), dO_i·v_j
        far_q = a.mul(decays.prefix, a.matmul(do, a.transpose(self.entering)))
        far_k = a.mul(decays.suffix, a.matmul(self.v, a.transpose(leaving)))
        near_q, near_k, crossing = self._near(inner)
        dq, dk = a.add(far_q, near_q), a.add(far_k, near_k)
        dv = a.add(a.matmul(a.mul(self.k, decays.suffix), leaving), a.matmul(a.transpose(self.weights()), do))
        dbonus = None
        if self.bonus is not None:
            own = a.sum(a.mul(do, self.v))
            dq = a.add(dq, a.mul(a.mul(self.bonus, self.k), own))
            dk = a.add(dk, a.mul(a.mul(self.bonus, self.q), own))
            dv = a.add(dv, a.mul(a.sum(a.mul(a.mul(self.q, self.bonus), self.k)), do))
            terms = a.mul(a.mul(self.q, self.k), own)
            rows = self.batch * self.count * self.size
            together = a.reshape(a.permute(terms, (1, 4, 0, 2, 3)), (self.heads, self.width, rows))
            dbonus = a.reshape(a.sum(together), (self.heads, self.width))
        gates = None
        if decays.gated:
            gates = self._gates(a.mul(self.q, far_q), a.mul(self.k, far_k), crossing, leaving)
        shape = (self.batch, self.heads, self.width, self.values)
        return StateGradients(dq, dk, dv, gates, a.reshape(initial, shape), dbonus)

    def _near(self, inner: V) -> tuple[V, V, V]:
        """The parts of dq and dk from inside the blocks, and q_ic k_jc e^Δ dO_i·v_j (…, n·n, W)."""
        a, n, d = self.a, self.size, self.width
        if self.channels == 1:
            held = a.mul(inner, self._pairs())
            crossing = self._shaped(a.mul(held, a.matmul(self.q, a.transpose(self.k))), n * n, 1)
            return a.matmul(held, self.k), a.matmul(a.transpose(held), self.q), crossing
        q, k = self._facing()
        held = a.mul(self._shaped(inner, n, n, 1), self.decays.pairs)
        by_key, by_query = a.mul(held, k), a.mul(held, q)
        near_q = a.sum(a.permute(by_key, (0, 1, 2, 3, 5, 4)))
        near_k = a.sum(a.permute(by_query, (0, 1, 2, 4, 5, 3)))
        crossing = self._shaped(a.mul(by_key, q), n * n, d)
        return self._shaped(near_q, n, d), self._shaped(near_k, n, d), crossing

    def _gates(self, far_q: V, far_k: V, crossing: V, leaving: V) -> V:
        """dg_t: everything that is written before position t and read at or after it."""
        a, n = self.a, self.size
        t = torch.arange(n)
        exclusive = self.bonus is not None
        reads = t[None] > t[:, None] if exclusive else t[None] >= t[:, None]  # [t, i]
        writes = t[None] < t[:, None]  # [t, j]
        both = (reads[:, :, None] & writes[:, None, :]).reshape(n, n * n)
        if self.channels == 1:
            far_q, far_k = a.sum(far_q), a.sum(far_k)
        total = a.matmul(a.exact(both.double()), crossing)
        total = a.add(total, a.matmul(a.exact(reads.double()), far_q))
        total = a.add(total, a.matmul(a.exact(writes.double()), far_k))
        # From the state that enters the block to the one that leaves it.
        kept = a.sum(a.mul(self.entering, leaving))  # (B, H, C, D, 1)
        through = self.decays.block  # (B, H, C, 1, W)
        if self.channels == 1:
            return a.add(total, a.mul(self._shaped(a.sum(a.transpose(kept)), 1, 1), through))
        return a.add(total, a.mul(self._shaped(kept, 1, self.width), through))


class Whole(Generic[V]):
    """Reads of one state after everything is written: linear attention that is not causal.

    Arguments, and what the methods give, as for :class:`Blocks`.
    """

    def __init__(self, a: Arithmetic[V], q: V, k: V, v: V, initial: V) -> None:
        self.a, self.shape = a, a.shape(q)
        self.q, self.k, self.v = (self._rows(x) for x in (q, k, v))
        self.final = a.add(a.matmul(a.transpose(self.k), self.v), initial)

    def _rows(self, x: V) -> V:
        """(B, H, C, n, X) as (B, H, C·n, X)."""
        batch, heads, count, size, width = self.a.shape(x)
        return self.a.reshape(x, (batch, heads, count * size, width))

    def _blocks(self, x: V) -> V:
        return self.a.reshape(x, (*self.shape[:4], self.a.shape(x)[-1]))

    def reads(self) -> V:
        """Φ(q_i)ᵀ S_N."""
        return self._blocks(self.a.matmul(self.q, self.final))

    def gradients(self, do: V, dfinal: V) -> StateGradients[V]:
        """Gradients of Σ reads·do + Σ final·dfinal."""
        a, do = self.a, self._rows(do)
        state = a.add(a.matmul(a.transpose(self.q), do), dfinal)
        return StateGradients(
            q=self._blocks(a.matmul(do, a.transpose(self.final))),
            k=self._blocks(a.matmul(self.v, a.transpose(state))),
            v=self._blocks(a.matmul(self.k, state)),
            gates=None,
            initial=state,
            bonus=None,
        )


@dataclass(frozen=True, eq=False)
class Operands(Generic[V]):
    """What the recurrence of one part of a call works on.

    Attributes:
        q, k: (B, H, C, n, F), after the feature map; v: (B, H, C, n, E); 0 after the end.
        gates: (B, H, C, n, W) or None; resets: bool, where the decay is 0.
        initial: (B, H, F, E); bonus: (H, F) or None.
        causal: whether a position reads what is written up to it, or everything.
    """

    q: V
    k: V
    v: V
    gates: V | None
    resets: torch.Tensor
    initial: V
    bonus: V | None
    causal: bool = True

    def blocks(self, a: Arithmetic[V]) -> Blocks[V] | Whole[V]:
        """The recurrence over ``a``."""
        if not self.causal:
            return Whole(a, self.q, self.k, self.v, self.initial)
        decays = Decays.of(a, self.gates, self.resets, exclusive=self.bonus is not None)
        return Blocks(a, self.q, self.k, self.v, decays, self.initial, self.bonus)
