"""Error budgets of the delta rule's gradients: norm-wise, looser than those of the outputs.

Within a chunk, with the notation of ``budgets.delta`` and X the gradient by the state at its end,

    dc_s = K̃_sᵀX + scale·Σ_{t≥s} (q_tᵀΓk_s) do_t,   y = Mᵀ dc (the gradient by the right-hand sides),
    dq_t = scale·(γ_t S_0 do_t + Σ_{s≤t} Γ k_s (c_s·do_t)),   dv = β y,
    dk_t = Γ_end,t X c_t + scale·Σ_{s≥t} Γ q_s (do_s·c_t) − Σ_{i>t} β_i Γ k_i (y_i·c_t)
           − β_t Σ_{j<t} Γ k_j (y_t·c_j) − β_t γ_t S_0 y_t,
    dβ_t = y_t·(v_t − (γ_t k_t)ᵀS_0) − Σ_{j<t} (k_tᵀΓk_j)(y_t·c_j),
    dS_0 = γX + Σ γ_t q_t do_tᵀ − Σ β γ_t k_t y_tᵀ,

and dg_t the sum over s ≥ t of q_s∘dq_s − k_s∘dk_s without their parts that no decay reaches, and of S∘X at
the end. Every product errs by κ, the declared roundings of its factors and sums, relative to the product of
their absolute values; M and Mᵀ appear as |M|, so that gradients of L through Mᵀ(dM)Mᵀ are covered. States
carry the norms of their columns' errors from chunk to chunk with the 2-norm of the chunk's transition, in
variances with the mean square of its singular values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnproof.properties.budgets.rounding import MEAN_SQUARE, growth

if TYPE_CHECKING:
    from attnproof.properties.budgets.delta_chunks import Chunks
    from attnproof.properties.budgets.rounding import Roundings

__all__ = ["ChunkGradients"]

# Factors of one product that may each be rounded to the operand format: both operands, a gate multiplied into
# each, and one stored factor.
_FACTORS = 4
_LARGEST_EXPONENT = 700.0


class ChunkGradients:
    """Errors of all gradients by one chunk size, as sizes (power 1) or variances (power 2).

    Args:
        x: the chunks, with sums of this power; r: roundings; do: (L, N, E); last: (L, D, E), the final
            state's cotangent.
    """

    def __init__(self, x: Chunks, r: Roundings, power: int, do: torch.Tensor, last: torch.Tensor) -> None:
        self.x, self.r, self.power, self.lanes = x, r, power, x.lanes
        self.scale = abs(self.lanes.scale) ** power
        self.depth = self.lanes.k.shape[-1]
        exact, behind = x.cut(do), [last]
        for c in reversed(range(x.count)):
            read = x.pulled[:, c].mT @ exact[:, c] * self.lanes.scale
            behind.append(x.transition[:, c].mT @ behind[-1] + read)
        found = torch.stack(behind[-2::-1], 1) if x.count else last[:, None][:, :0]
        by_written = x.decayed.mT @ found + x.plain.mT @ exact * self.lanes.scale
        sz = self._sz
        self.do, self.behind, self.dc = sz(exact), sz(found), sz(by_written)
        self.y, self.c = sz(x.inverse.mT @ by_written), sz(x.written)
        self.start, self.inverse, self.weights = sz(x.starts), sz(x.inverse), sz(x.weights)
        self.k, self.q = sz(x.cut(self.lanes.k)), sz(x.cut(self.lanes.q))
        self.beta, self.v = sz(x.cut(self.lanes.beta[..., None])), sz(x.cut(self.lanes.v))
        self.since, self.kappa, self.gamma = sz(x.since), self._kappa(), self._decays()
        # What M, stored and rounded, is multiplied with, where the terms cancel.
        self.wide_c, self.wide_y = self.inverse @ sz(x.right), self.inverse.mT @ self.dc

    def _sz(self, y: torch.Tensor) -> torch.Tensor:
        return y.abs() if self.power == 1 else y.square()

    def _norm(self, y: torch.Tensor) -> torch.Tensor:
        """Of columns (…, D, X): the norm of bounds, or the sum of variances (…, X)."""
        return torch.linalg.vector_norm(y, dim=-2) if self.power == 1 else y.sum(-2)

    def _pull(self, error: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Errors (…, E) of vectorᵀS for states whose columns err by ``error`` (norms, or mean variances)."""
        return self._norm(self._sz(vectors).mT)[..., None] * error

    def _gates(self, reach: torch.Tensor, steps: int) -> torch.Tensor:
        """Relative error of a decay over at most ``steps`` gates that sum to ``reach``."""
        u, r = self.r.elementwise, self.r
        if self.lanes.g is None:
            return torch.zeros_like(reach)
        if self.power == 1:
            return torch.expm1((r.exp + (2.0 * steps + 6.0) * u * reach).clamp(max=_LARGEST_EXPONENT))
        return (r.exp**2 + (4.0 * u * reach).square()) / 3.0

    def _kappa(self) -> torch.Tensor:
        """Relative error of one product or sum of a chunk, (L, n, 1, 1)."""
        r, size = self.r, self.x.size
        wide = max(self.depth, self.lanes.v.shape[-1])
        gates = self._gates(self.x.reach[:, :, -1:], size)
        if self.power == 1:
            operands = (1.0 + r.operand) ** _FACTORS * (1.0 + r.input) ** 2 - 1.0
            return gates + operands + float(growth(size + wide + 4, r.accumulate)) + 8.0 * r.elementwise
        operands = 2.0 * (r.operand**2 + r.input**2) * MEAN_SQUARE
        return gates + operands + (wide / 2.0 + 4.0) * MEAN_SQUARE * r.accumulate**2

    def _stepwise(self) -> torch.Tensor:
        """Relative error of a state that is decayed, added to and stored at every step of a chunk."""
        r, size = self.r, self.x.size
        if self.power == 1:
            rounded = size * (4.0 * r.elementwise + r.storage("state")[0])
        else:
            rounded = size * (2.0 * r.elementwise**2 + r.storage("state")[0] ** 2) * MEAN_SQUARE
        return rounded + size * self._gates(self.x.reach[:, :, -1:] / size, 1)

    def _decays(self) -> torch.Tensor:
        """Bounds of the decay from s to t ≥ s (L, n, size, size), to the power; 0 for t < s."""
        gates = self.x.cut(self.lanes.gates.amax(-1, keepdim=True))
        closed = (~gates.isfinite()).long().cumsum(2)
        total = gates.where(gates.isfinite(), 0.0).cumsum(2)
        seen = (closed == closed.mT) & torch.ones(self.x.size, self.x.size).tril().bool()
        return torch.where(seen, (self.power * (total - total.mT)).clamp(max=0.0), -torch.inf).exp()

    def _carry(self, local: torch.Tensor, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors of the states before each chunk (after it if ``backward``), and past the last."""
        phi = self.x.transition
        if self.power == 1:
            factor = torch.linalg.matrix_norm(phi.nan_to_num(0.0, 0.0, 0.0), 2)
        else:
            factor = phi.square().sum((-2, -1)) / self.depth
        order = range(self.x.count)
        held, current = [], torch.zeros_like(local[:, 0])
        for c in reversed(order) if backward else order:
            held.append(current)
            current = factor[:, c, None] * current + local[:, c]
        return torch.stack(held[::-1] if backward else held, 1), current

    def errors(self) -> dict[str, torch.Tensor]:
        """By gradient, (L, N, ·); "dinitial_state" (L, D, E)."""
        x, kappa, p, sz = self.x, self.kappa, self.power, self._sz
        keys, queries, mean = sz(x.keys), sz(x.queries), 1.0 if p == 1 else 1.0 / self.depth
        by_start = keys @ self.start
        fed = kappa * (sz(x.values) + by_start) + self._of_lower(kappa)
        direct = kappa * (self.wide_c + self.c + self.weights @ self.start)
        own_c = self.inverse @ fed + direct
        into = sz(x.decayed).mT @ self.behind + x.plain_sums[p].mT @ self.do * self.scale
        into = kappa * (into + self.dc + x.lower_sums[p].mT @ self.y)
        written = kappa * (self.wide_y + self.y)
        own_y = self.inverse.mT @ into + written
        rounded = kappa[..., 0] + self._stepwise()[..., 0]
        ends = sz(x.ends)
        moved = self._norm(ends * self.start + sz(x.decayed) @ self.c)
        local = self._pull_sum(x.response.mT, fed) + self._pull_sum(x.decayed.mT, direct) + rounded * moved
        before, _ = self._carry(local * mean, backward=False)
        moved = ends * self.behind + keys.mT @ self.y + self.weights.mT @ self.dc
        moved = self._norm(moved + queries.mT @ self.do * self.scale)
        local = self._pull_sum(x.keys, written) + self._pull_sum(x.weights, into) + rounded * moved
        after, first = self._carry(local * mean, backward=True)
        before, after = before[:, :, None], after[:, :, None]
        error_c = own_c + self._pull(before, x.weights)
        error_y = own_y + self._pull(after, x.response.mT)
        found = self._products(before, after, error_c, error_y, own_y)
        result = {name: x.joined(y) for name, y in found.items()}
        return result | {"dinitial_state": first[:, None].expand_as(self.lanes.initial)}

    def _of_lower(self, kappa: torch.Tensor) -> torch.Tensor:
        """Errors of L times c; a rounding of β k_i, if of nothing else, is one for the whole row."""
        r, sums = self.r, self.x.lower_sums[self.power] @ self.c
        if self.lanes.wide:
            return kappa * sums
        fine = kappa - (0.0 if self.power == 1 else MEAN_SQUARE * r.operand**2)
        if self.power == 1:
            fine = fine - ((1.0 + r.operand) ** _FACTORS - 1.0) * (1.0 + r.input) ** 2
            one = (1.0 + r.operand) * (1.0 + r.input) ** 2 - (1.0 + r.input) ** 2
        else:
            fine, one = fine - MEAN_SQUARE * r.operand**2, MEAN_SQUARE * r.operand**2
        return fine.clamp(min=0.0) * sums + one * self.x.near[self.power][0]

    def _pull_sum(self, vectors: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
        """Norms (L, n, E) of Σ_s vector_s error_sᵀ."""
        return (self._norm(self._sz(vectors).mT)[..., None] * errors).sum(2)

    def _products(
        self,
        before: torch.Tensor,
        after: torch.Tensor,
        error_c: torch.Tensor,
        error_y: torch.Tensor,
        own_y: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Gradients from the errors of states (L, n, 1, E), of c and of y (L, n, size, E)."""
        x, kappa, gamma, c, y, do = self.x, self.kappa, self.gamma, self.c, self.y, self.do

        def total(z: torch.Tensor) -> torch.Tensor:
            return z.sum(-1, keepdim=True)

        ends = gamma[:, :, -1:].mT
        read = gamma * (do @ (kappa * c + error_c).mT)
        lower = kappa * (self.wide_y @ self.wide_c.mT) + y @ error_c.mT + error_y @ c.mT
        lower = (gamma * lower).tril(-1)
        reached = self.since * (do @ self.start.mT)
        dq = self.scale * (kappa * reached + total(before * do) + read @ self.k)
        dk = ends * ((kappa * c + error_c) @ self.behind.mT + total(after * c))
        dk = dk + self.scale * (read.mT @ self.q) + lower.mT @ (self.beta * self.k)
        dk = dk + self.beta * (lower @ self.k + total(before * y))
        dk = dk + self.beta * self.since * ((kappa * y + error_y) @ self.start.mT)
        right = self.v + (self.since * self.k) @ self.start
        dbeta = total(y * (kappa * right + self._pull(before, x.cut(self.lanes.k))))
        dbeta = dbeta + total(own_y * right) + total(error_y * self._sz(self._read()))
        dbeta = dbeta + total(lower * (self.k @ self.k.mT))
        found = {"dq": dq, "dk": dk, "dv": self.beta * (error_y + kappa * y), "dbeta": dbeta}
        if self.lanes.g is not None:
            found["dg"] = self._of_gates(dq, dk, before, after)
        return found

    def _read(self) -> torch.Tensor:
        """v − S'ᵀk, (L, n, size, E); 0 where β is."""
        beta = self.x.cut(self.lanes.beta[..., None])
        return torch.where(beta == 0, 0.0, self.x.written / torch.where(beta == 0, 1.0, beta))

    def _of_gates(
        self, dq: torch.Tensor, dk: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        """A sum, from the chunk's end, of q∘dq and k∘dk, whose own roundings are within their errors."""
        x = self.x
        states = self._sz(x.ends) * self.start + self._sz(x.decayed) @ self.c
        ending = self.kappa * (states * self.behind) + states * after + self.behind * before
        rows = 2.0 * (self.q * dq + self.k * dk)
        if not self.lanes.wide:
            rows, ending = rows.sum(-1, keepdim=True), ending.sum(-2, keepdim=True)
        return rows.flip(2).cumsum(2).flip(2) + ending.sum(-1)[:, :, None]
