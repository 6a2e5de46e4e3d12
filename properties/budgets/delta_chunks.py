"""Sequences of the delta rule cut into chunks, with what a chunkwise kernel computes of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["GAUGED", "Chunks", "DeltaLanes"]

# The size of the chunks in which sums of absolute values are taken.
GAUGED = 16


@dataclass(frozen=True, eq=False)
class DeltaLanes:
    """A call with one lane a sequence and head; float64.

    Attributes:
        q, k: (L, N, D); v: (L, N, E); beta: (L, N); g: (L, N), (L, N, D) or None; initial: (L, D, E).
        scale: of the read.
        rows: offsets whose o is judged, rising; None for all.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor | None
    initial: torch.Tensor
    scale: float
    rows: torch.Tensor | None = None

    @property
    def gates(self) -> torch.Tensor:
        """Log decays (L, N, 1 or D); zeros where there are none."""
        if self.g is None:
            return torch.zeros_like(self.beta)[..., None]
        return self.g if self.wide else self.g[..., None]

    @property
    def wide(self) -> bool:
        """Whether channels decay by themselves."""
        return self.g is not None and self.g.dim() == 3

    def gauges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower bounds of Σ_s |w_ts||v_s| for o (L, N, E) and the final state (L, D, E).

        The terms of the position's own chunk of 16, and the size of the sum of all before it.
        """
        if not self.k.shape[1]:
            return torch.zeros_like(self.v), self.initial.abs()
        chunks = Chunks(self, GAUGED)
        written = chunks.cut(self.beta[..., None] * self.v).abs()
        earlier = (chunks.pulled @ chunks.starts).abs()
        o = chunks.joined(earlier + chunks.attention.abs() @ written) * abs(self.scale)
        last = chunks.transition[:, -1] @ chunks.starts[:, -1]
        return o, last.abs() + chunks.response[:, -1].abs() @ written[:, -1]


class Chunks:
    """The delta rule inside chunks of ``size`` steps, all chunks at once; (L, n, size, ·) for n chunks.

    Attributes:
        pulled: Φ(t, start)ᵀ q_t (…, D); attention: q_tᵀΦ(t, s)k_s, s ≤ t (…, size).
        plain: q_tᵀ Γ_ts k_s; plain_sums: by power p, Σ_c |q_tc Γ k_sc|^p.
        lower: L; lower_sums: likewise for L; inverse: M; weights: W (…, D), β k_iᵀΦ pulled to the start.
        since: γ_t (…, D), the decay since the start; keys, queries: β γ_t k_t and γ_t q_t (…, D).
        transition: Φ of the chunk (L, n, D, D); response: Φ(end, s)k_s, and decayed: Γ(end, s)k_s, both
            (L, n, D, size); ends: the whole chunk's decay (L, n, D, 1).
        starts: S before each chunk (L, n, D, E); right: the right-hand sides; written: c (…, E).
        near: by power, what one rounding of β k_t, or of q_t, makes of its products with all keys of the
            chunk: it is the same for all, so that they count by their sum, S − Γ S_0 (…, E).
        reach: the sum of −g since the chunk's start, of the channel where it is largest (…, 1).
    """

    def __init__(self, lanes: DeltaLanes, size: int, powers: tuple[int, ...] = ()) -> None:
        self.lanes, self.size = lanes, size
        q, k, beta = self.cut(lanes.q), self.cut(lanes.k), self.cut(lanes.beta[..., None])
        gates = self.cut(lanes.gates)
        decay = gates.exp()
        count, depth = q.shape[:2], q.shape[-1]
        self.count = count[1]
        empty = torch.zeros(*count, depth, size, dtype=torch.float64)
        held = torch.cat((torch.eye(depth).double().expand(*count, depth, depth), empty, empty), -1)
        since = torch.ones(*count, depth, dtype=torch.float64)
        reads, rows, writes = [], [], []
        sums: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {p: [] for p in powers}
        for i in range(size):
            held = held * decay[:, :, i, :, None]
            since = since * decay[:, :, i]
            key, b = k[:, :, i, None], beta[:, :, i, None]
            read = b * (key @ held)
            split = depth + size
            for p in powers:
                sums[p].append((((b * key).abs() ** p) @ (held[..., split:].abs() ** p), since))
            held[..., :split] -= key.mT * read[..., :split]
            held[..., depth + i] += k[:, :, i]
            held[..., split + i] = k[:, :, i]
            query = q[:, :, i, None]
            reads.append(read)
            rows.append(query @ held)
            for p in powers:
                seen = (query.abs() ** p) @ (held[..., split:].abs() ** p)
                sums[p][i] = (sums[p][i][0], seen)
            writes.append(since)
        read, row = torch.cat(reads, 2), torch.cat(rows, 2)
        self.weights, inverse, self.lower = torch.split(read, [depth, size, size], -1)
        self.inverse = torch.eye(size).double() - inverse
        self.pulled, self.attention, self.plain = torch.split(row, [depth, size, size], -1)
        self.transition, self.response, self.decayed = torch.split(held, [depth, size, size], -1)
        self.lower_sums = {p: torch.cat([x for x, _ in pairs], 2) for p, pairs in sums.items()}
        self.plain_sums = {p: torch.cat([x for _, x in pairs], 2) for p, pairs in sums.items()}
        passed = torch.stack(writes, 2)
        self.since, self.ends = passed, since[..., None]
        self.keys, self.queries = passed * k * beta, passed * q
        self.reach = -gates.where(gates.isfinite(), 0.0).cumsum(2).amin(-1, keepdim=True)
        self.values = beta * self.cut(lanes.v)
        starts = [lanes.initial]
        for c in range(self.count):
            starts.append(self.transition[:, c] @ starts[-1] + self.response[:, c] @ self.values[:, c])
        self.starts = torch.stack(starts[:-1], 1)
        self.right = self.values - self.keys @ self.starts
        self.written = self.inverse @ self.right
        self.near = {p: self._near(p, beta * k, q, k, decay) for p in powers}

    def _near(
        self, power: int, left: torch.Tensor, q: torch.Tensor, k: torch.Tensor, decay: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ_c |β k_tc X_ce|^p before the write and Σ_c |q_tc X_ce|^p after it, X = S − Γ S_0."""
        grown, before, after = torch.zeros_like(self.starts), [], []
        for i in range(self.size):
            grown = grown * decay[:, :, i, :, None]
            before.append((left[:, :, i, None].abs() ** power) @ (grown.abs() ** power))
            grown = grown + k[:, :, i, :, None] * self.written[:, :, i, None]
            after.append((q[:, :, i, None].abs() ** power) @ (grown.abs() ** power))
        return torch.cat(before, 2), torch.cat(after, 2)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """(L, N, X) as (L, n, size, X), zeros after the end: steps that change nothing."""
        lacking = -x.shape[1] % self.size
        wide = torch.nn.functional.pad(x, (0, 0, 0, lacking))
        return wide.reshape(len(x), wide.shape[1] // self.size, self.size, x.shape[-1])

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`cut`."""
        return x.flatten(1, 2)[:, : self.lanes.k.shape[1]]
