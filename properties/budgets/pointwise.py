"""Errors of pointwise attention that the arithmetic of budgets, which knows terms only, cannot see.

They are common to many terms of one sum and do not average out: of the constants, of a query or key that is
rounded for all its scores, of dP that coincide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import MEAN_SQUARE

if TYPE_CHECKING:
    from attnproof.properties.families.pointwise import PointwiseProblem

__all__ = ["SharedErrors"]

# Random signs with which responses to rounded operands are sampled: the standard deviation that comes out is
# itself accurate to 1/√(2·probes), 35 %, of a part of the budget.
_PROBES = 4


@dataclass(frozen=True, eq=False)
class SharedErrors:
    """Errors that many terms of one sum have in common, and that do not average out: variances, to be added.

    * Rounded constants: b moves all scores alike, scale stretches them.
    * A query that is rounded (scaled, or to a narrower format) moves all scores of its row, a key those of
      its column: sampled with random signs, as E (Σ_d r_d c_d)² = Σ_d c_d².
    * Equal dP, as of ones for a cotangent or constant values, are rounded by the same amount; of equal
      operands of a product ``Propagation`` takes care.
    """

    problem: PointwiseProblem
    a: Propagation

    def of_output(self) -> torch.Tensor:
        """For o (B, H, M, E)."""
        c, v = self.problem.divisor, self.problem.values().double()

        def output(s: torch.Tensor) -> torch.Tensor:
            return self._local(s)[0] @ v / c

        s = self._scores()
        exact = output(s)
        total = torch.zeros_like(exact)
        for t in self._constants(s):
            total += (output(s + t) - exact).square()
        for t, _ in self._probes(_PROBES):
            total += (output(s + t) - exact).square() / _PROBES
        return total

    def of_gradients(
        self, pieces: tuple[Estimate, Estimate, Estimate], cotangent: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """For dq, dk, dv, from P, w'(S) and dP."""
        p, slope, dp = pieces
        problem, factor = self.problem, self.problem.scale / self.problem.divisor
        k, q, do = (
            problem.keys().double(),
            self._columns(problem.q.double()),
            self._columns(cotangent.double()),
        )

        def gradients(w: torch.Tensor, ds: torch.Tensor) -> dict[str, torch.Tensor]:
            dk, dv = self._columns(ds).mT @ q, self._columns(w).mT @ do
            return {"dq": ds @ k * factor, "dk": dk * factor, "dv": dv / problem.divisor}

        def moved(s: torch.Tensor) -> dict[str, torch.Tensor]:
            w, w1 = self._local(s)
            return gradients(w, w1 * dp.value)

        s = self._scores()
        exact = moved(s)
        total = {name: torch.zeros_like(x) for name, x in exact.items()}
        for t in self._constants(s):
            for name, x in moved(s + t).items():
                total[name] += (x - exact[name]).square()
        for by_query, by_key in self._probes(_PROBES):
            rows, columns = moved(s + by_query), moved(s + by_key)
            for name, found in (("dq", rows), ("dk", columns), ("dv", columns)):
                total[name] += (found[name] - exact[name]).square() / _PROBES
        ds, size = slope.value * dp.value, dp.value.abs()
        together = gradients(p.value, slope.value * dp.spread.sqrt() * dp.value.sign())
        # The mean square of an error that is uniform is a third of its bound's.
        total["dq"] += 3.0 * self._coincidence(ds, size) * together["dq"].square()
        by_column = self._coincidence(self._columns(ds).mT, self._columns(size).mT)
        total["dk"] += 3.0 * by_column * together["dk"].square()
        return total

    def _columns(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, M, X) as (B, G, H/G·M, X)."""
        return x.reshape(x.shape[0], self.problem.k.shape[1], self.problem.group * x.shape[2], x.shape[3])

    def _local(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P and w' of scores s, float64 (B, H, M, N)."""
        a, seen = EnclosureArithmetic(), self.problem.seen
        p, slope = self.problem.weights(a, a.exact(s)), self.problem.slopes(a, a.exact(s))
        return a.midpoint(a.masked(p, seen)), a.midpoint(a.masked(slope, seen))

    def _scores(self) -> torch.Tensor:
        a = EnclosureArithmetic()
        return a.midpoint(self.problem.scores(a))

    def _constants(self, s: torch.Tensor) -> list[torch.Tensor]:
        """What a standard deviation of the rounding of b and of scale adds to the scores."""
        a, u = EnclosureArithmetic(), 2.0 * self.a.r.elementwise / math.sqrt(3.0)
        b = a.midpoint(self.problem.shifted(a, a.exact(torch.zeros_like(s))))
        stretched = u * (s - b)
        return [stretched, u * b] if bool(b.any()) else [stretched]

    def _probes(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What rounded queries, and rounded keys, add to the scores, under random signs."""
        r, scale = self.a.r, self.problem.scale
        unit = max(r.operand, r.input)
        if not unit:
            return []
        generator = torch.Generator().manual_seed(0)
        q, k = self.problem.q.double(), self.problem.keys().double()
        factors = ((q * scale, k), (k * scale, q))
        moved = []
        for _ in range(count):
            signs = torch.randint(0, 2, (q.shape[-1],), generator=generator).double() * 2.0 - 1.0
            rows, columns = (
                torch.where(x == 0, 0.0, (unit * math.sqrt(MEAN_SQUARE) * x.abs()).clamp(min=r.operand_tiny))
                * signs
                @ other.mT
                for x, other in factors
            )
            moved.append((rows, columns.mT))
        return moved

    def _coincidence(self, mass: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Chance (…, 1) that two terms of a row, drawn by |mass|, are not one but agree in |size| to u/4.

        u is that of the format in which dP is stored.
        """
        mass, size = mass.abs(), size.abs()
        if not mass.shape[-1]:
            return mass.new_zeros((*mass.shape[:-1], 1))
        near = max(self.a.r.storage("dscores")[0], self.a.r.operand) / 4.0
        logs, order = size.clamp(min=1e-300).log().contiguous().sort(-1)
        ordered = mass.gather(-1, order)
        below = torch.nn.functional.pad(ordered.cumsum(-1), (1, 0))
        high = below.gather(-1, torch.searchsorted(logs, logs + near, right=True))
        low = below.gather(-1, torch.searchsorted(logs, logs - near, right=False))
        pairs = (ordered * (high - low - ordered)).sum(-1, keepdim=True).clamp(min=0.0)
        return pairs / below[..., -1:].square().clamp(min=1e-300)
