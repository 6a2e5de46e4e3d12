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
from attnproof.properties.families.state_layout import grouping
from attnproof.properties.families.state_scan import Scan, decayed

__all__ = ["Blocks", "Decays", "Operands", "StateGradients", "Whole", "Writes"]


@dataclass(frozen=True, eq=False)
class Writes(Generic[V]):
    """What is written, in blocks.

    Attributes:
        k: (B, H, C, n, F), after the feature map; v: (B, H, C, n, E); 0 after the end of a block.
        gates: (B, H, C, n, W) log decays, finite and ≤ 0; None where all are 0.
        resets: bool (B, H, C, n, W), positions whose decay is 0, where the gates are 0.
    """

    k: V
    v: V
    gates: V | None
    resets: torch.Tensor


@dataclass(frozen=True, eq=False)
class Decays(Generic[V]):
    """The decays of one call; W is 1 or one for each channel of the key.

    Attributes:
        prefix: (B, H, R, m, W), from the start of a block of reads to the read of a position.
        pairs: (B, H, R, m, m, W), from the write of the second position to the read of the first; 0 where
            the first does not see the second.
        suffix: (B, H, C, n, W), from the write of a position to the end of its block of writes.
        block: (B, H, C, 1, W), from the start of such a block to its end.
        scan: from block to block.
    """

    prefix: V
    pairs: V
    suffix: V
    block: V
    scan: Scan[V]
    gated: bool

    @classmethod
    def of(cls, a: Arithmetic[V], near: Writes[V], far: Writes[V], *, exclusive: bool = False) -> Decays[V]:
        """The decays between positions.

        Args:
            a: the arithmetic.
            near: of the blocks whose rows are read.
            far: of the blocks that carry the state.
            exclusive: whether a read comes before its own position's decay.
        """
        batch, heads, blocks, size, width = near.resets.shape
        t = torch.arange(size)
        seen = t[None] < t[:, None] if exclusive else t[None] <= t[:, None]
        after = t[None] > t[:, None]
        # [i, j, r]: gate r lies between the write of j and the read of i.
        crossed = (seen[:, None, :] & after[None, :, :]).reshape(size * size, size)
        every = torch.ones(1, 1, dtype=torch.bool)
        zero = near.resets.double()
        pairs = decayed(a, near.gates, zero, crossed, seen.reshape(size * size, 1))
        t, spent = torch.arange(far.resets.shape[3]), far.resets.double()
        count, totals = far.resets.shape[2], None
        if far.gates is not None:
            totals = a.reshape(a.sum(a.permute(far.gates, (0, 1, 2, 4, 3))), (batch, heads, count, width))
        return cls(
            prefix=decayed(a, near.gates, zero, seen, every),
            pairs=a.reshape(pairs, (batch, heads, blocks, size, size, width)),
            suffix=decayed(a, far.gates, spent, t[None] > t[:, None], every),
            block=decayed(a, far.gates, spent, t[None] >= 0, every),
            scan=Scan.of(a, totals, spent.sum(3), grouping(count)),
            gated=far.gates is not None,
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
        x: what the recurrence works on.
        decays: between positions.
    """

    def __init__(self, a: Arithmetic[V], x: Operands[V], decays: Decays[V]) -> None:
        self.a, self.q, self.k, self.v = a, x.q, x.near.k, x.near.v
        self.decays, self.chosen = decays, x.chosen
        self.batch, self.heads, self.count, self.size, self.width = a.shape(self.q)
        self.values = a.shape(self.v)[-1]
        self.channels = a.shape(decays.prefix)[-1]
        self.bonus = None if x.bonus is None else a.reshape(x.bonus, (1, self.heads, 1, 1, self.width))
        written = a.matmul(a.transpose(a.mul(x.far.k, decays.suffix)), x.far.v)
        # (B, H, C, D, E), states before each block of writes, and (B, H, D, E)
        self.carried, self.final = decays.scan.entering(written, x.initial)
        self.entering = self._before_reads(self.carried)

    def _before_reads(self, states: V) -> V:
        """Of states before blocks of writes those that blocks of reads begin with, (B, H, R, D, E)."""
        if self.chosen is None:
            return states
        a, d, e = self.a, self.width, self.values
        flat = a.reshape(states, (self.batch, self.heads, self.chosen.shape[1], d * e))
        return self._shaped(a.matmul(a.exact(self.chosen), flat), d, e)

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
        """Gradients of Σ reads·do + Σ final·dfinal; do (B, H, C, n, E), dfinal (B, H, D, E).

        Of calls in which every row is read.
        """
        assert self.chosen is None
        a, decays = self.a, self.decays
        asked = a.matmul(a.transpose(a.mul(self.q, decays.prefix)), do)  # (B, H, C, D, E), of entering states
        leaving, initial = decays.scan.leaving(asked, dfinal)
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
        return StateGradients(dq, dk, dv, gates, initial, dbonus)

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

    def __init__(self, a: Arithmetic[V], x: Operands[V]) -> None:
        self.a, self.shape = a, a.shape(x.q)
        self.q, self.k, self.v = (self._rows(t) for t in (x.q, x.far.k, x.far.v))
        written = a.matmul(a.transpose(x.far.k), x.far.v)  # (B, H, C, D, E)
        # Block by block, so that no radius grows with the number of positions.
        total = a.sum(a.permute(written, (0, 1, 3, 4, 2)))
        self.final = a.add(a.reshape(total, a.shape(x.initial)), x.initial)

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
        q: (B, H, R, m, F), after the feature map; 0 after the end.
        near, far: what is written in the blocks that are read, and in those that carry the state.
        initial: (B, H, F, E); bonus: (H, F), the weight of a position's own key and value, which are then not
            part of the state that it reads; None where a position reads its own write.
        chosen: float64 (R, C), with which block of ``far`` each of ``near`` begins; None where they are the
            same.
        causal: whether a position reads what is written up to it, or everything.
    """

    q: V
    near: Writes[V]
    far: Writes[V]
    initial: V
    bonus: V | None
    chosen: torch.Tensor | None
    causal: bool = True

    def blocks(self, a: Arithmetic[V]) -> Blocks[V] | Whole[V]:
        """The recurrence over ``a``."""
        if not self.causal:
            return Whole(a, self)
        return Blocks(a, self, Decays.of(a, self.near, self.far, exclusive=self.bonus is not None))
