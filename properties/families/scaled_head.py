r"""Attention whose heads read keys and values at scales of their own (Attention-SH).

o_h = softmax(scale · q_h k̄_hᵀ) v̄_h with k̄_hw the mean of k_j over the window w·p ≤ j < min((w + 1)·p, N),
p = pool[h], and v̄ alike: the last window averages what is left. pool = 1 is softmax attention. No masks.
Source: Nguyen et al. 2023, "A primal-dual framework for transformers and neural networks", Attention-SH;
theory.md PD-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.softmax_gradients import attention_gradient_estimates
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import checked_tensors
from attnproof.properties.families.base import Family, dtype_name
from attnproof.properties.families.batch_normalised import per_key_head
from attnproof.properties.families.softmax import SOFTMAX, SoftmaxProblem

__all__ = ["SCALED_HEAD", "ScaledHeadProblem"]


@dataclass(frozen=True, eq=False)
class ScaledHeadProblem(SoftmaxProblem):
    """Softmax attention over windows; k and v hold one copy for each query head, (B, H, N, ·).

    ``seen`` is (B, H, M, W), with W the windows of the head that has most; windows that another head has not
    are unseen there.

    Attributes:
        groups: G, key/value heads of the call.
        pool: positions of a window, for each query head.
    """

    groups: int = 1
    pool: tuple[int, ...] = ()

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a differentiated input, as it was given."""
        shape = tuple(getattr(self, name).shape)
        return (shape[0], self.groups, *shape[2:]) if name in ("k", "v") else shape

    @cached_property
    def _positions(self) -> torch.Tensor:
        """Positions of each window, int64 (H, W, R), R the longest; N or more where a window has no more."""
        n = self.k.shape[2]
        width = torch.tensor([min(p, max(n, 1)) for p in self.pool]).reshape(-1, 1, 1)
        longest = int(width.max()) if len(self.pool) else 1
        inside = torch.arange(longest).reshape(1, 1, -1)
        starts = torch.arange(self.seen.shape[-1]).reshape(1, -1, 1) * width
        return torch.where(inside < width, starts + inside, n)

    @property
    def counts(self) -> torch.Tensor:
        """How many positions each window has, float64 (H, W, 1); 1 for a window that a head has not."""
        return (self._positions < self.k.shape[2]).sum(-1, keepdim=True).clamp(min=1).double()

    def _pooled(self, a: Arithmetic[V], x: torch.Tensor) -> V:
        """Means of x (B, H, N, X) over windows, (B, H, W, X), as a kernel may store them."""
        # One more position, which holds 0, for those that a window has not.
        padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
        positions = self._positions.clamp(max=x.shape[2])
        gathered = padded[:, torch.arange(len(self.pool)).reshape(-1, 1, 1), positions]
        total = a.sum(a.exact(gathered.transpose(-1, -2)))
        mean = a.div(a.reshape(total, a.shape(total)[:-1]), a.exact(self.counts))
        return a.store(mean, "operand")

    def operands(self, arithmetic: Arithmetic[V]) -> tuple[V, V, V]:
        """q (B, H, M, D), k̄ (B, H, W, D) and v̄ (B, H, W, E)."""
        a = arithmetic
        return a.exact(self.q), self._pooled(a, self.k), self._pooled(a, self.v)

    @cached_property
    def _midpoints(self) -> tuple[torch.Tensor, torch.Tensor]:
        a = EnclosureArithmetic()
        _, k, v = self.operands(a)
        return a.midpoint(k), a.midpoint(v)

    def keys(self) -> torch.Tensor:
        """k̄ in float64, (B, H, W, D)."""
        return self._midpoints[0]

    def values(self) -> torch.Tensor:
        """v̄ in float64, (B, H, W, E)."""
        return self._midpoints[1]

    def computed(self, r: Roundings) -> tuple[Estimate, Estimate, Estimate] | None:
        """q, k̄ and v̄ with the errors of a kernel that pools; a window of one position has none."""
        if not self.k.shape[2]:
            return None
        q, k, v = self.operands(Propagation(r))
        rounded = (self.counts > 1).double()
        k, v = (replace(x, certain=x.bound * rounded, variance=x.spread * rounded) for x in (k, v))
        return q, k, v

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ o·cotangent by q, k and v: those of softmax attention, spread over the windows."""
        return self._through(arithmetic, super().differentiate(arithmetic, cotangents))

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """Errors of softmax attention's gradients by k̄ and v̄, spread over the windows."""
        a = Propagation(Roundings.of(contract, dtype_name(self.dtype)))
        return self._through(a, attention_gradient_estimates(self, reference, contract, cotangents))

    def _through(self, a: Arithmetic[V], found: Mapping[str, V]) -> dict[str, V]:
        """From gradients by k̄, v̄ (B, H, W, ·) to dk_j = Σ_h dk̄_h,w(j)/count_w(j) and dv alike."""
        n = self.k.shape[2]
        # (H, N, W): whether position j is in window w.
        holds = torch.zeros(len(self.pool), n + 1, self.seen.shape[-1], dtype=torch.float64)
        holds.scatter_(1, self._positions.clamp(max=n).transpose(-1, -2), 1.0)
        holds = holds[:, :n]
        spread, counts = a.exact(holds), a.exact(holds @ self.counts)
        result = {"dq": found["dq"]}
        for name in ("dk", "dv"):
            each = a.div(a.matmul(spread, a.store(found[name], "output")), counts)
            result[name] = per_key_head(a, each, self.groups)
        return result

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Windows seen, and the three with the largest weights."""
        b, h, i = row
        part = self._part(b, h, torch.tensor([i]), torch.empty(0))
        seen = SoftmaxProblem.explain_row(part, output, (0, 0, 0)).partition(") ")[2]
        where = f"row (batch {b}, head {h}, query {i})"
        return f"{where} {seen}; a key here is the mean of a window of {self.pool[h]} positions"

    def _part(self, b: int, h: int, chosen: torch.Tensor, used: torch.Tensor) -> ScaledHeadProblem:
        """Chosen rows of one head, with all of its positions."""
        windows = _windows(self.k.shape[2], self.pool[h])
        return replace(
            self,
            q=self.q[b, h, chosen][None, None],
            k=self.k[b, h][None, None],
            v=self.v[b, h][None, None],
            seen=self.seen[b, h, chosen][:, :windows][None, None],
            poisoned=self.poisoned[b, h, chosen][None, None],
            tainted=self.tainted[b, h][None, None],
            groups=1,
            pool=self.pool[h : h + 1],
        )


def _windows(n: int, pool: int) -> int:
    """Windows of ``pool`` positions that cover n, the last one ragged."""
    return (n + pool - 1) // pool


class ScaledHeadFamily(Family):
    """``scaled_head`` of the contract."""

    name = "scaled_head"
    inputs = ("q", "k", "v")
    required = ("scale", "pool")
    options = ()
    sequence = ("q", "k", "v", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",)."""
        return ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype."""
        return dtype

    def problem(self, *tensors: torch.Tensor, **options: Any) -> ScaledHeadProblem:
        """Check the call; q (B, H, M, D), k (B, G, N, D), v (B, G, N, E) in layout bhnd."""
        q, k, v = checked_tensors(self.name, tensors)
        pool = _checked_pool(options.get("pool"), q.shape[1])
        self.check_keywords(options)
        base = SOFTMAX.problem(q, k, v, scale=options["scale"])
        windows = torch.tensor([_windows(k.shape[2], p) for p in pool], dtype=torch.int64)
        most = int(windows.max()) if len(pool) else 0
        seen = (torch.arange(most) < windows.unsqueeze(-1)).reshape(1, len(pool), 1, most)
        base = replace(base, k=base.keys(), v=base.values(), seen=seen.expand(*base.row_shape, most))
        return ScaledHeadProblem(
            **{field.name: getattr(base, field.name) for field in fields(base)},
            groups=k.shape[1],
            pool=pool,
        )


def _checked_pool(pool: Any, heads: int) -> tuple[int, ...]:
    """One window width a query head."""
    fits = isinstance(pool, (tuple, list)) and len(pool) == heads
    if not fits or any(isinstance(p, bool) or not isinstance(p, int) or p < 1 for p in pool):
        raise ContractError(
            f"pool={pool!r}; the contract asks for a tuple of {heads} ints ≥ 1, one window width a query head"
        )
    return tuple(pool)


SCALED_HEAD = ScaledHeadFamily()
