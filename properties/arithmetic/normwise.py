"""Norm-wise enclosures of the delta rule's recurrence and of its adjoint, in float64.

Componentwise radii of S_t = S' + β k (v − S'ᵀk)ᵀ, S' = e^g ∘ S_{t−1}, multiply by |I − βkkᵀ| at every step
and explode (β = 1, D = 64: 5·10⁹⁰ after 512 steps). The 2-norm of a column's error does not: the trajectory
Ŝ_t is computed in plain float64, each step's rounding residual R_t is bounded, and

    ‖E_t‖ ≤ ‖T_t‖·‖E_{t−1}‖ + ‖R_t‖,  E = S − Ŝ, column by column, T_t = (I − βkkᵀ)·diag(e^g).

Lemma. ‖T_t‖₂ ≤ max_c e^{g_c} · max(1, |1 − β‖k‖²|), which is ≤ 1 for g ≤ 0 and 0 ≤ β‖k‖² ≤ 2.
Proof. I − βkkᵀ is symmetric, k is an eigenvector of eigenvalue 1 − β‖k‖² and every vector orthogonal to k
one of eigenvalue 1, so that its 2-norm is the larger of 1 (if D > 1) and |1 − β‖k‖²|; diag(e^g) has the
2-norm max_c e^{g_c}; norms of products are at most products of norms. ∎ The adjoint recurrence has the
transitions T_tᵀ, of the same norm.

Notation: L lanes (a sequence and a head each), N steps, D key width, E value width; "norm" is that of a
column over D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attnproof.properties.arithmetic.enclosures import (
    EPSILON,
    SLACK,
    SMALLEST_NORMAL,
    Ball,
    EnclosureArithmetic,
)

__all__ = ["Adjoint", "Recurrence", "Stretch", "transition_bound"]

# Steps whose states are held at once: 64 states of 64 by 64 are 2 MiB.
STRETCH = 64
# Covers every underflow of one step: fewer than 2^20 products, each lost below the smallest normal number.
_UNDERFLOW = 2.0**20 * SMALLEST_NORMAL


def transition_bound(k: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """An upper bound of max(1, |1 − β‖k‖²|), rounding included; k float64 (…, D), beta (…)."""
    size = beta * k.square().sum(-1)
    error = (size.abs() * ((k.shape[-1] + 4) * EPSILON)).add_(_UNDERFLOW)
    return torch.maximum(size + error - 1.0, 1.0 - size + error).mul_(SLACK).clamp_(min=1.0)


@dataclass(frozen=True, eq=False)
class Stretch:
    """Some consecutive steps of the trajectory with the bounds of its errors; float64.

    Attributes:
        start, stop: the steps.
        decayed: S' (L, n, D, E), before the read; states: S_t; read: v − S'ᵀk (L, n, E); written: β times it.
        decayed_error, error: (L, n, E), norms of the errors of S' and S_t.
        read_error: (L, n, E), of ``read``.
    """

    start: int
    stop: int
    decayed: torch.Tensor
    states: torch.Tensor
    read: torch.Tensor
    written: torch.Tensor
    decayed_error: torch.Tensor
    error: torch.Tensor
    read_error: torch.Tensor

    @property
    def norms(self) -> torch.Tensor:
        """‖S_t‖ by column, (L, n, E)."""
        return _norm(self.states)


@dataclass(frozen=True, eq=False)
class Adjoint:
    """The same steps of the adjoint recurrence; A_t is the gradient by S_t, dS' that by S'.

    Attributes:
        start, stop: the steps.
        total: A_t (L, n, D, E); decayed: dS'; seen: u = A_tᵀk (L, n, E).
        total_error, decayed_error: (L, n, E), norms of the errors of A_t and dS'; seen_error: (L, n, E).
    """

    start: int
    stop: int
    total: torch.Tensor
    decayed: torch.Tensor
    seen: torch.Tensor
    total_error: torch.Tensor
    decayed_error: torch.Tensor
    seen_error: torch.Tensor


def growth(n: int) -> float:
    """An upper bound of γ_n in float64."""
    return (n + 2) * EPSILON


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Upper bounds of the columns' 2-norms over the axis before the last."""
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-2)
    return norm * (1.0 + growth(x.shape[-2])) + _UNDERFLOW


class Recurrence:
    """The trajectory of one call, stretch by stretch, forwards and backwards.

    Args:
        k: (L, N, D); v: (L, N, E); beta: (L, N); initial: (L, D, E); finite, any floating dtype, exact.
        g: log decay (L, N) or (L, N, D), −inf for a decay of 0, or None.
    """

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        g: torch.Tensor | None,
        initial: torch.Tensor,
    ) -> None:
        self.k, self.v, self.beta, self.initial = k.double(), v.double(), beta.double(), initial.double()
        if g is None:
            decay = Ball(torch.ones_like(self.beta)[..., None])
        else:
            arithmetic, wide = EnclosureArithmetic(), (g if g.dim() == 3 else g[..., None]).double()
            kept = wide.isfinite()
            decay = arithmetic.masked(arithmetic.exp(arithmetic.exact(wide.where(kept, 0.0))), kept)
        self.decay = decay.value
        loose = torch.zeros_like(decay.value) if decay.radius is None else decay.radius
        self.decay_radius = loose.amax(-1)
        self.decay_bound = (decay.value + loose).amax(-1) * SLACK
        self.bound = transition_bound(self.k, self.beta)
        self.key_norm = _norm(self.k[..., None])[..., 0]
        self.length = self.k.shape[1]

    def forward(self) -> Iterator[Stretch]:
        """The trajectory from the initial state on."""
        state, error = self.initial, torch.zeros_like(self.initial[:, 0])
        for start in range(0, self.length, STRETCH):
            found = self.advance(start, state, error)
            state, error = found.states[:, -1], found.error[:, -1]
            yield found

    def advance(self, start: int, state: torch.Tensor, error: torch.Tensor) -> Stretch:
        """The stretch that begins at step ``start`` with this state and these norms of its error."""
        stop = min(start + STRETCH, self.length)
        size = (state.shape[0], stop - start, *state.shape[1:])
        decayed, states = state.new_empty(size), state.new_empty(size)
        read, written = (torch.empty_like(decayed[:, :, 0]) for _ in range(2))
        current = state
        for i, t in enumerate(range(start, stop)):
            torch.mul(current, self.decay[:, t, :, None], out=decayed[:, i])
            torch.sub(self.v[:, t], (self.k[:, t, None] @ decayed[:, i])[:, 0], out=read[:, i])
            torch.mul(self.beta[:, t, None], read[:, i], out=written[:, i])
            torch.baddbmm(decayed[:, i], self.k[:, t, :, None], written[:, i, None], out=states[:, i])
            current = states[:, i]
        span, gamma = slice(start, stop), growth(self.k.shape[-1])
        key, beta = self.key_norm[:, span, None], self.beta[:, span, None].abs()
        before, after = _norm(decayed), _norm(states)
        held = torch.cat((_norm(state)[:, None], after[:, :-1]), 1)
        lost = self.decay_radius[:, span, None] * held + EPSILON * before + _UNDERFLOW
        dot = gamma * key * before + EPSILON * read.abs() + _UNDERFLOW
        own = key * (beta * dot + 2.0 * EPSILON * written.abs() + _UNDERFLOW) + EPSILON * after + _UNDERFLOW
        errors = torch.empty_like(lost), torch.empty_like(lost)
        for i, t in enumerate(range(start, stop)):
            errors[0][:, i] = (self.decay_bound[:, t, None] * error + lost[:, i]) * SLACK
            error = (self.bound[:, t, None] * errors[0][:, i] + own[:, i]) * SLACK
            errors[1][:, i] = error
        read_error = (key * errors[0] + dot) * SLACK
        return Stretch(start, stop, decayed, states, read, written, *errors, read_error)

    def backward(
        self, q: torch.Tensor, cotangent: torch.Tensor, last: torch.Tensor
    ) -> Iterator[tuple[Stretch, Adjoint, Ball]]:
        """The adjoint from the last step to the first, each stretch with the trajectory's same steps.

        Args:
            q: (L, N, D), scale included, to one rounding.
            cotangent: (L, N, E) of what the queries read.
            last: (L, D, E) of the final state.

        Yields:
            The stretches from last to first, and the gradient by the state before the stretch.
        """
        marks = [(self.initial, torch.zeros_like(self.initial[:, 0]))]
        for found in self.forward():
            marks.append((found.states[:, -1].clone(), found.error[:, -1].clone()))
        adjoint = Ball(last.double(), torch.zeros_like(last[:, 0], dtype=torch.float64))
        for number in reversed(range(len(marks) - 1)):
            stretch = self.advance(number * STRETCH, *marks[number])
            steps, adjoint = self._retreat(stretch, q.double(), cotangent.double(), adjoint)
            yield stretch, steps, adjoint

    def _retreat(
        self, stretch: Stretch, q: torch.Tensor, cotangent: torch.Tensor, adjoint: Ball
    ) -> tuple[Adjoint, Ball]:
        """The adjoint steps of a stretch; ``adjoint`` is the gradient by its last state, norms for radii."""
        assert adjoint.radius is not None
        count, gamma = stretch.stop - stretch.start, growth(self.k.shape[-1])
        total, decayed = torch.empty_like(stretch.states), torch.empty_like(stretch.states)
        seen = torch.empty_like(stretch.read)
        total_error, decayed_error = torch.empty_like(seen), torch.empty_like(seen)
        current, error = adjoint.value, adjoint.radius
        for i in reversed(range(count)):
            t = stretch.start + i
            k, beta = self.k[:, t], self.beta[:, t, None]
            torch.baddbmm(current, q[:, t, :, None], cotangent[:, t, None], out=total[:, i])
            torch.matmul(k[:, None], total[:, i], out=seen[:, i, None])
            written = beta * seen[:, i]
            torch.baddbmm(total[:, i], -k[:, :, None], written[:, None], out=decayed[:, i])
            current = decayed[:, i] * self.decay[:, t, :, None]
            key, whole, part = self.key_norm[:, t, None], _norm(total[:, i]), _norm(decayed[:, i])
            added = torch.linalg.vector_norm(q[:, t], dim=-1, keepdim=True) * cotangent[:, t].abs()
            error = (error + EPSILON * (4.0 * added + whole) + _UNDERFLOW) * SLACK
            total_error[:, i] = error
            dot = beta.abs() * (gamma * key * whole + _UNDERFLOW) + 2.0 * EPSILON * written.abs()
            error = (self.bound[:, t, None] * error + key * dot + EPSILON * part + _UNDERFLOW) * SLACK
            decayed_error[:, i] = error
            error = self.decay_bound[:, t, None] * error + self.decay_radius[:, t, None] * part
            error = (error + EPSILON * _norm(current) + _UNDERFLOW) * SLACK
        span = slice(stretch.start, stretch.stop)
        key = self.key_norm[:, span, None]
        seen_error = (key * (total_error + gamma * _norm(total)) + _UNDERFLOW) * SLACK
        steps = Adjoint(
            stretch.start, stretch.stop, total, decayed, seen, total_error, decayed_error, seen_error
        )
        return steps, Ball(current, error)
