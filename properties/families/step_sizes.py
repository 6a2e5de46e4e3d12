"""Step sizes, decays and weights of a selective scan, over any arithmetic.

Theory MAM-1 and MAM-2; formulas as in :mod:`attnproof.properties.families.selective_scan`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V

__all__ = ["Discretisation", "expm1", "softplus"]


def softplus(a: Arithmetic[V], x: V) -> V:
    """log(1 + e^x) = max(x, 0) + log(1 + e^−|x|), to relative accuracy on both sides of 0."""
    above = a.relu(x)
    below = a.relu(a.scaled(x, -1.0))
    return a.add(above, a.log1p(a.exp(a.scaled(a.add(above, below), -1.0))))


def expm1(a: Arithmetic[V], x: V) -> V:
    """e^x − 1 = 2 t / (1 − t), t = tanh(x/2), for x ≤ 0, where 1 − t does not cancel."""
    t = a.tanh(a.scaled(x, 0.5))
    one = a.exact(torch.ones(1, dtype=torch.float64))
    return a.div(a.scaled(t, 2.0), a.sub(one, t))


@dataclass(frozen=True, eq=False)
class Discretisation:
    """From step sizes to decays and weights, over any arithmetic; tensors (B, H, C, n, ·) in blocks.

    Attributes:
        A: (1, H, 1, 1, D); bias: (1, H, 1, 1, 1) or None.
        smooth: whether steps go through softplus; zoh: whether weights are those of a zero-order hold.
    """

    A: torch.Tensor
    bias: torch.Tensor | None
    smooth: bool
    zoh: bool

    def raw(self, a: Arithmetic[V], delta: torch.Tensor) -> V:
        """delta + bias, (…, 1)."""
        x = a.exact(delta)
        return x if self.bias is None else a.add(x, a.exact(self.bias))

    def steps(self, a: Arithmetic[V], delta: torch.Tensor) -> V:
        """The effective δ, (…, 1)."""
        x = self.raw(a, delta)
        return softplus(a, x) if self.smooth else x

    def slope(self, a: Arithmetic[V], delta: torch.Tensor) -> V | None:
        """∂δ/∂delta, None where it is 1."""
        return a.sigmoid(self.raw(a, delta)) if self.smooth else None

    def gates(self, a: Arithmetic[V], steps: V) -> V:
        """δ A, (…, D)."""
        return a.mul(steps, a.exact(self.A))

    def _divided(self, a: Arithmetic[V], x: V, limit: V, power: int) -> V:
        """x / A^power, ``limit`` where A = 0."""
        still = self.A == 0
        below = a.exact(torch.where(still, 1.0, self.A.double()))
        if power == 2:
            below = a.mul(below, below)
        quotient = a.div(x, below)
        if not bool(still.any()):
            return quotient
        return a.add(a.masked(quotient, ~still), a.mul(limit, a.exact(still.double())))

    def weights(self, a: Arithmetic[V], steps: V) -> V:
        """W, (…, 1) or (…, D)."""
        return self._divided(a, expm1(a, self.gates(a, steps)), steps, 1) if self.zoh else steps

    def weights_by_steps(self, a: Arithmetic[V], steps: V) -> V | None:
        """∂w/∂δ (…, D), None where it is 1."""
        return a.exp(self.gates(a, steps)) if self.zoh else None

    def weights_by_decays(self, a: Arithmetic[V], steps: V) -> V | None:
        """∂w/∂A (…, D), None where it is 0."""
        if not self.zoh:
            return None
        gates = self.gates(a, steps)
        above = a.sub(a.mul(gates, a.exp(gates)), expm1(a, gates))
        return self._divided(a, above, a.scaled(a.mul(steps, steps), 0.5), 2)
