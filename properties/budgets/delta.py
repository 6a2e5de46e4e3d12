"""Error budgets of the delta rule.

S' = e^g ∘ S_{t−1}, S_t = S' + k c_tᵀ, c_t = β (v − S'ᵀk), o_t = scale·q_tᵀ S_t.

An error δ of c_s that the recurrence goes on from moves o_t by exactly scale·q_tᵀΦ(t, s)k_s·δ, Φ(t, s) the
product of the transitions (I − βkkᵀ)diag(e^g) after s: the delta rule's own attention matrix. A chunkwise
kernel computes c = M·rhs within a chunk, with M = (I + L)⁻¹, L_ij = β_i k_iᵀ(Γ_ij k_j) and rhs_j =
β_j (v_j − (γ_j k_j)ᵀS_0). M_ij is −β_i k_iᵀΦ(i, j)k_j, the delta rule again, so that |M_ij| ≤ β_i‖k_i‖‖k_j‖
while 0 ≤ β‖k‖² ≤ 2 (``arithmetic.normwise``). Its errors are of three kinds:

* *fed back*: of L (a solve is backward stable: an error of M is −M ΔL M) and of the right-hand side; they
  reach o_t by Φ;
* *direct*: of M, U, W and c as stored; nothing else in the chunk feels them, and they reach o_t by the plain
  q_tᵀ Γ k_s inside the chunk and by Φ of later chunks;
* *of the state*: matrices, rounded or decayed, bounded by the norms of their columns.

The read adds its own. First-order terms are added (``power`` 1, worst cases) or in squares (``power`` 2,
variances). Certain is the largest of the recurrent form and of chunks of 16, 64 and 128 that start at the
sequence's start; products of errors are covered by a factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnproof.properties.arithmetic.normwise import Recurrence
from attnproof.properties.budgets.delta_chunks import GAUGED, Chunks, DeltaLanes
from attnproof.properties.budgets.delta_gradients import ChunkGradients
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth

__all__ = ["DeltaErrors"]

# Chunk sizes whose kernels are analysed; 64 is the usual one, of which the probable error is taken.
CHUNKS = (16, 64, 128)
USUAL = 64
# A query pulled back so far has forgotten everything that is larger than no float32 number.
_FORGOTTEN = 2.0**-300
# Operands up to this multiple of a format's smallest normal number make products that may be subnormal.
_NEAR_SUBNORMAL = 2.0**8
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, eq=False)
class _Source:
    """Errors of one form of the recurrence, by chunk, as sizes (power 1) or variances (power 2).

    Attributes:
        fed, direct: of c, (L, n, size, E); state: of the state at the chunk's end, by column (L, n, E): the
            norm, or the mean over the rows of the variance.
        read: of q_tᵀS_t itself (L, n, size, E).
    """

    fed: torch.Tensor
    direct: torch.Tensor | None
    state: torch.Tensor
    read: torch.Tensor
    power: int


class DeltaErrors:
    """What a kernel with roundings ``r`` may make of a call."""

    def __init__(self, lanes: DeltaLanes, r: Roundings) -> None:
        self.lanes, self.r = lanes, r

    def outputs(self) -> dict[str, Estimate]:
        """Of o (L, N, E) and of the final state (L, D, E), before they are stored.

        Of a call with ``rows`` that of o is meant for those rows alone.

        Looseness, for N(0, 1) values, unit queries and keys, β uniform in [0, 1], D = E = 64: the largest
        certain bound of o is 55 times a chunkwise bfloat16 kernel's worst error at N = 256 and 72 times at
        N = 4096 without decay, 10 and 11 times with −g uniform in [0, 0.2]; in float32 a few thousand times.
        Errors are 0.7 to 0.8 of the probable ones in bfloat16. Shown again, on smaller calls, by
        tests/properties/test_delta_budgets.py.
        """
        lanes = self.lanes
        if not lanes.k.shape[1]:
            return {"o": Estimate(torch.zeros_like(lanes.v)), "state": Estimate(lanes.initial)}
        o_bound, state_bound = torch.zeros_like(lanes.v), torch.zeros_like(lanes.initial)
        spread = (o_bound, state_bound)
        for size in CHUNKS:
            powers = (1, 2) if size == USUAL else (1,)
            chunks = Chunks(lanes, size, powers)
            sources = [self._chunkwise(chunks, p) for p in powers]
            if size == GAUGED:
                sources.append(self._recurrent(chunks, 1))
            more = 1.0 + self._products(chunks)
            for source, (o, state) in zip(sources, _carried(chunks, sources), strict=True):
                o = chunks.joined(o) * abs(lanes.scale) ** source.power
                if source.power == 2:
                    spread = (o, state)
                else:
                    o_bound = torch.maximum(o_bound, o * more)
                    state_bound = torch.maximum(state_bound, state * more)
        lost_rows, lost_state = self._lost()
        value = torch.zeros_like(lanes.v)
        tiny = self._subnormal()
        of_o, of_state = spread[0] + tiny**2 / 12.0, spread[1] + tiny**2 / 12.0
        return {
            "o": _estimate(value, o_bound + tiny, of_o, lost_rows),
            "state": _estimate(torch.zeros_like(lanes.initial), state_bound + tiny, of_state, lost_state),
        }

    def gradients(self, do: torch.Tensor, last: torch.Tensor) -> dict[str, Estimate]:
        """Of every gradient, (L, N, ·) and (L, D, E), from the cotangents of o and the state."""
        lanes = self.lanes
        shapes = {"dq": lanes.q, "dk": lanes.k, "dv": lanes.v, "dbeta": lanes.beta[..., None]}
        if lanes.g is not None:
            shapes["dg"] = lanes.gates
        shapes["dinitial_state"] = lanes.initial
        bounds = {name: torch.zeros_like(like) for name, like in shapes.items()}
        spreads = dict(bounds)
        if not lanes.k.shape[1]:
            return {name: Estimate(zero) for name, zero in bounds.items()}
        for size in CHUNKS:
            chunks = Chunks(lanes, size, (1, 2) if size == USUAL else (1,))
            more = 1.0 + self._products(chunks)
            found = ChunkGradients(chunks, self.r, 1, do, last).errors()
            for name, bound in found.items():
                bounds[name] = torch.maximum(bounds[name], bound * more)
            if size == USUAL:
                spreads = ChunkGradients(chunks, self.r, 2, do, last).errors()
        lost = self._lost()[0][:, -1, 0]
        tiny = self._subnormal(do, last)
        return {
            name: _estimate(
                torch.zeros_like(like),
                bounds[name] + tiny,
                spreads[name] + tiny**2 / 12.0,
                lost.reshape(-1, *[1] * (like.dim() - 1)).expand_as(like),
            )
            for name, like in shapes.items()
        }

    def _subnormal(self, *cotangents: torch.Tensor) -> float:
        """What is lost where operands, or products of theirs, are subnormal; 0 where none can be.

        Every product may lose the smallest number of its format, whatever its factors are, and each loss is
        read through the others: t·N·(D + 8)·Π(1 + ‖x‖₁) over the operands. Crude, and only charged where all
        of one operand is so small that rounding errors relative to it say nothing.
        """
        lanes, r = self.lanes, self.r
        values = torch.cat([lanes.v, lanes.initial], 1)
        groups = [x for x in (lanes.q, lanes.k, values, *cotangents[:1]) if x.numel()]
        pairs = [(r.accumulate_tiny, r.elementwise), (r.operand_tiny, r.operand), r.storage("state")[1::-1]]
        t, u = max((t, u) for t, u in pairs if u)
        if not groups or min(float(x.abs().max()) for x in groups) > _NEAR_SUBNORMAL * t / u:
            return 0.0
        factor = float(lanes.k.shape[1] * (lanes.k.shape[2] + 8))
        for x in (*groups, *(y for y in cotangents[1:] if y.numel())):
            factor *= 1.0 + float(x.abs().sum(-1).max())
        return t * factor * max(abs(lanes.scale), 1.0) * (1.0 + float(lanes.beta.abs().max()))

    def _products(self, chunks: Chunks) -> torch.Tensor:
        """Products of errors, over the first-order terms: each passes once more through M (L, 1, 1)."""
        unit = self.r.operand + self.r.input + chunks.size * self.r.accumulate
        return 3.0 * unit * chunks.inverse.abs().sum(-1).amax((1, 2))[:, None, None]

    def _unit(self, power: int, unit: float, times: int = 1) -> float:
        """``times`` roundings of relative error ``unit``."""
        return (1.0 + unit) ** times - 1.0 if power == 1 else times * unit * unit * MEAN_SQUARE

    def _sum(self, power: int, n: int) -> float:
        """The rounding of a sum of n terms, of the terms' sizes or of their squares."""
        u = self.r.accumulate
        if power == 1:
            return float(growth(n, u))
        # In random order half the partial sums' squares are there on average; truncation errs to one side.
        return n * n * u * u / 16.0 if self.r.truncated else n * u * u * MEAN_SQUARE / 2.0

    def _decay(self, power: int, reach: torch.Tensor, steps: int) -> torch.Tensor | float:
        """Relative error of e^(b_i − b_j), b a cumulative sum of ``steps`` gates that add up to ``reach``."""
        if self.lanes.g is None:
            return 0.0
        u = self.r.elementwise
        if power == 1:
            return torch.expm1((self.r.exp + (2.0 * steps + 6.0) * u * reach).clamp(max=_LARGEST_EXPONENT))
        return (self.r.exp**2 + (4.0 * u * reach).square()) / 3.0

    def _chunkwise(self, x: Chunks, power: int) -> _Source:
        """The WY form with chunks of x.size."""
        r, depth, size = self.r, self.lanes.k.shape[-1], x.size

        def sz(y: torch.Tensor) -> torch.Tensor:
            return y.abs() if power == 1 else y.square()

        def given(times: int) -> float:
            return self._unit(power, r.input, times)

        def computed(times: int) -> float:
            return self._unit(power, r.operand, times)

        u = self._unit(power, r.elementwise, 4)
        # Decays of channels are multiplied into both sides of a product, key by key.
        pairs = computed(3 if self.lanes.wide else 0) + given(2)
        shared = computed(0 if self.lanes.wide else 1)
        gated = 0 if self.lanes.g is None else 1
        decay = self._decay(power, x.reach, size)
        dots, sums = self._sum(power, depth + 4), self._sum(power, size + 3)
        tiny = (r.operand_tiny if r.operand else 0.0) ** power
        beta = sz(x.cut(self.lanes.beta[..., None]))
        start, c, right = sz(x.starts), sz(x.written), sz(x.right)
        ones, total = start.sum(-2, keepdim=True), c.sum(-2, keepdim=True)
        keys = sz(x.cut(self.lanes.k)).sum(-1, keepdim=True)
        queries = sz(x.cut(self.lanes.q)).sum(-1, keepdim=True)
        by_start = sz(x.keys) @ start
        fed = (pairs + dots + u + decay + sums) * (x.lower_sums[power] @ c)
        fed = fed + shared * x.near[power][0] + (computed(1) + given(1) + u) * sz(x.values)
        fed = fed + (computed(2) + given(2) + u + decay) * by_start
        fed = fed + tiny * beta * ((keys + 1.0) * total + ones)
        inverse, weights = sz(x.inverse), sz(x.weights)
        seen = weights @ start
        direct = computed(1) * (inverse @ right + sz(x.inverse @ x.values))
        direct = direct + (computed(1) + self._sum(power, depth + 3)) * seen + (computed(1 + gated) + u) * c
        direct = direct + sums * (inverse @ (sz(x.values) + by_start))
        direct = direct + tiny * (right.sum(-2, keepdim=True) + ones + weights.sum(-1, keepdim=True) + 2.0)
        narrow = self._unit(power, r.storage("state")[0])
        end = self._decay(power, x.reach[:, :, -1:], size)
        moved = (computed(gated) + given(1) + sums + end + u) * (sz(x.decayed) @ c)
        moved = moved + (end + u + narrow) * sz(x.ends * x.starts) + narrow * (sz(x.decayed) @ c)
        state = _columns(moved + tiny * total, power)
        factor = tiny / min(abs(self.lanes.scale) or 1.0, 1.0) ** power
        read = (computed(2 + gated) + given(2) + u + decay + dots) * (sz(x.queries) @ start)
        read = read + (pairs + u + decay + dots) * (x.plain_sums[power] @ c) + shared * x.near[power][1]
        read = read + (computed(1) + sums) * (sz(x.plain) @ c)
        read = read + factor * (ones + (queries + keys + 1.0) * total + queries)
        return _Source(fed, direct, state, read, power)

    def _recurrent(self, x: Chunks, power: int) -> _Source:
        """Step by step, the state held and stored in its declared format."""
        r, lanes, depth = self.r, self.lanes, self.lanes.k.shape[-1]
        run = Recurrence(lanes.k, lanes.v, lanes.beta, lanes.g, lanes.initial)
        parts = [(part.norms, _norms(part.decayed), part.written) for part in run.forward()]
        after, before, written = (x.cut(torch.cat(group, 1)) for group in zip(*parts, strict=True))
        key, query = (_norms(x.cut(y).mT)[..., None] for y in (lanes.k, lanes.q))
        u, beta = r.elementwise, x.cut(lanes.beta[..., None]).abs()
        dots = self._sum(1, depth + 3)
        read = x.cut(lanes.v).abs() + key * before
        fed = beta * (dots * key * before + 3.0 * u * read) + 3.0 * u * written.abs()
        gates = lanes.gates
        gates = x.cut(-gates.where(gates.isfinite(), 0.0).amin(-1, keepdim=True))
        lost = self._decay(1, gates, 1)
        lost = lost + 2.0 * u + self._unit(1, r.storage("state")[0])
        lost = lost * torch.maximum(after, before)
        bound = x.cut((run.bound * run.decay_bound)[..., None])
        reached, held = torch.zeros_like(lost[:, :, 0]), []
        for i in range(x.size):
            reached = bound[:, :, i] * reached + lost[:, :, i]
            held.append(reached)
        near = query * torch.stack(held, 2)
        return _Source(fed, None, reached, near + dots * query * after, power)

    def _lost(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (L, N, E) and states (L, D, E) that may come from a number near the formats' largest."""
        lanes = self.lanes
        largest = min(self.r.largest, self.r.storage("operand")[2], self.r.storage("state")[2]) / 2.0
        run = Recurrence(lanes.k, lanes.v, lanes.beta, lanes.g, lanes.initial)
        sizes = [torch.maximum(part.norms, part.written.abs()).amax(-1) for part in run.forward()]
        over = ~(torch.cat(sizes, 1) < largest)
        over = over | ~(lanes.initial.abs().amax((1, 2)) < largest)[:, None]
        rows = over.long().cumsum(1) > 0
        return rows[..., None].expand_as(lanes.v), rows[:, -1, None, None].expand_as(lanes.initial)


def _estimate(
    value: torch.Tensor, certain: torch.Tensor, variance: torch.Tensor, lost: torch.Tensor
) -> Estimate:
    certain, variance = certain.nan_to_num(torch.inf, torch.inf), variance.nan_to_num(1e300, 1e300)
    return Estimate(value, certain, variance, lost if bool(lost.any()) else None)


def _norms(x: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-2)
    return norm


def _columns(x: torch.Tensor, power: int) -> torch.Tensor:
    """The norm of a column of bounds, or the mean of one of variances."""
    return _norms(x) if power == 1 else x.mean(-2)


def _carried(chunks: Chunks, sources: list[_Source]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the sources' errors make of q_tᵀS_t (L, n, size, E) and of the final state (L, D, E)."""
    totals = []
    for source in sources:
        p = source.power
        total = source.read + (chunks.attention.abs() ** p) @ source.fed
        if source.direct is not None:
            total = total + (chunks.plain.abs() ** p) @ source.direct
        totals.append(total)
    count = chunks.count
    if chunks.lanes.rows is not None:
        _add_earlier(chunks, sources, totals, chunks.lanes.rows)
    pulled = chunks.pulled
    for lag in range(1, count if chunks.lanes.rows is None else 1):
        pulled = pulled[:, 1:]
        earlier = slice(0, count - lag)
        for total, seen in zip(totals, _received(chunks, sources, pulled, earlier), strict=True):
            total[:, lag:] += seen
        pulled = pulled @ chunks.transition[:, earlier]
        if not bool((pulled.abs() > _FORGOTTEN).any()):
            break
    depth = chunks.transition.shape[-1]
    pulled = torch.eye(depth).double().expand(len(chunks.pulled), 1, depth, depth)
    states = [torch.zeros(1).double() for _ in sources]
    for c in reversed(range(count)):
        span = slice(c, c + 1)
        found = _received(chunks, sources, pulled, span)
        states = [state + x[:, 0] for state, x in zip(states, found, strict=True)]
        pulled = pulled @ chunks.transition[:, span]
    return list(zip(totals, states, strict=True))


def _add_earlier(
    chunks: Chunks, sources: list[_Source], totals: list[torch.Tensor], rows: torch.Tensor
) -> None:
    """Add what ``rows`` receive from earlier chunks to ``totals``, on one way back that each row joins."""
    places, inside = rows // chunks.size, rows % chunks.size
    asked = chunks.pulled[:, places, inside]
    joined, found = len(rows), [torch.zeros_like(t[:, places, inside]) for t in totals]
    # From the first row that has joined to the last.
    for c in reversed(range(int(places.max()) if len(rows) else 0)):
        while joined and int(places[joined - 1]) > c:
            joined -= 1
        span, here = slice(c, c + 1), asked[:, None, joined:]
        for total, seen in zip(found, _received(chunks, sources, here, span), strict=True):
            total[:, joined:] += seen[:, 0]
        asked[:, joined:] = (here @ chunks.transition[:, span])[:, 0]
    for total, more in zip(totals, found, strict=True):
        total[:, places, inside] += more


def _received(
    chunks: Chunks, sources: list[_Source], pulled: torch.Tensor, span: slice
) -> list[torch.Tensor]:
    """Errors that queries, pulled back to the ends of the chunks in ``span``, see of those chunks."""
    fed, plain = pulled @ chunks.response[:, span], pulled @ chunks.decayed[:, span]
    size = pulled.square().sum(-1, keepdim=True)
    found = []
    for source in sources:
        p = source.power
        total = (fed.abs() ** p) @ source.fed[:, span]
        if source.direct is not None:
            total = total + (plain.abs() ** p) @ source.direct[:, span]
        norm = size.sqrt() if p == 1 else size
        found.append(total + norm * source.state[:, span, None])
    return found
