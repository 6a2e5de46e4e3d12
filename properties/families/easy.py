"""Easy attention: o_bhi = Σ_j α_hij v_bhj over |i − j| ≤ band, the scores α learned and not computed.

    dα_hij = Σ_b dO_bhi·v_bhj (0 outside the band),   dV_bhj = Σ_i α_hij dO_bhi

Source: Sanchis-Agudo et al., arXiv 2308.12874; theory EASY-1. One score matrix a head serves the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.stored import with_edges
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask

__all__ = ["EASY", "EasyProblem"]


@dataclass(frozen=True, eq=False)
class EasyProblem(Problem):
    """Finite inputs of one call, and what each position sees.

    Attributes:
        alpha: (H, M, N), the call's (H, N, N) or some of its rows and columns; non-finite entries are 0.
        v: (B, H, N, E); non-finite entries are 0.
        seen: bool (H, M, N), the band.
        poisoned: bool (B, H, M), rows that see a non-finite input.
        tainted: bool (B, H), heads with a non-finite score or value, seen or not.
        banded: whether the call has a band.
    """

    alpha: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor
    poisoned: torch.Tensor
    tainted: torch.Tensor
    banded: bool

    outputs = ("o",)
    differentiated = ("alpha", "v")

    @property
    def row_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(B, H, N)."""
        return (*self.v.shape[:2], self.alpha.shape[1])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the call's tensors."""
        return self.v.dtype

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite, seen or not."""
        return bool(self.tainted.any())

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of alpha or v."""
        return tuple(getattr(self, name).shape)

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, N, E)."""
        return (*self.row_shape, self.v.shape[3])

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o by the definition; with ``gauges`` also Σ |α||v|."""
        a, alpha = arithmetic, self._visible_scores()
        result = {"o": a.matmul(a.exact(alpha), a.exact(self.v))}
        if gauges:
            result["gauge:o"] = a.matmul(a.exact(alpha.abs()), a.exact(self.v.abs()))
        return result

    def _visible_scores(self) -> torch.Tensor:
        """(1, H, M, N), 0 outside the band."""
        return torch.where(self.seen, self.alpha, torch.zeros_like(self.alpha))[None]

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ o·cotangent by alpha, summed over the batch, and v."""
        a = arithmetic
        do, v = a.exact(cotangents["o"]), a.exact(self.v)
        batch, heads, _, width = self.v.shape

        def together(x: V) -> V:
            """(B, H, N, E) as (H, N, B·E)."""
            return a.reshape(a.permute(x, (1, 2, 0, 3)), (heads, a.shape(x)[2], batch * width))

        dalpha = a.matmul(together(do), a.transpose(together(v)))
        dv = a.matmul(a.transpose(a.exact(self._visible_scores())), do)
        return {"dalpha": a.masked(dalpha, self.seen), "dv": dv}

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """One problem for each (batch, head) that has chosen rows, without positions that none sees."""
        parts: list[tuple[Problem, torch.Tensor]] = []
        batch, heads, length = self.row_shape
        for b in range(batch):
            for h in range(heads):
                chosen = rows[b, h].nonzero().flatten()
                if not len(chosen):
                    continue
                used = self.seen[h, chosen].any(0)
                part = replace(
                    self,
                    alpha=self.alpha[h, chosen][:, used][None],
                    v=self.v[b, h, used][None, None],
                    seen=self.seen[h, chosen][:, used][None],
                    poisoned=self.poisoned[b, h, chosen][None, None],
                    tainted=self.tainted[b, h][None, None],
                )
                parts.append((part, (b * heads + h) * length + chosen))
        return parts

    def keyless(self) -> torch.Tensor:
        """Rows that see no position, bool (B, H, N): none in a whole call, whose band holds the diagonal."""
        return (~self.seen.any(-1)).expand(self.row_shape)

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """o is exactly 0 where no position is seen."""
        return {0.0: broadcast_mask(self.keyless(), self.shape("o"))}

    def undetermined(self) -> torch.Tensor:
        """Rows that see a non-finite score or value."""
        return self.poisoned

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """Σ |α||v|."""
        bound = reference.get("gauge:o", reference["o"])
        return (bound.value.abs() - bound.radius).clamp(min=0.0)

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """The definition over the arithmetic of budgets, stored once."""
        budget = super().budgets(reference, contract)["o"]
        return {"o": with_edges(budget, contract, self.poisoned, self.tainted, self.keyless())}

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zeros would pass, or a mean of V that the sum of the scores scales, or no band at all."""
        budget, o = budgets["o"], reference["o"].value
        judged = ~budget.open
        if not judged.any():
            return ["accuracy: nothing to judge"]
        reasons = []
        alpha, seen = self._visible_scores().double(), self.seen[None].double()
        mean = (seen / seen.sum(-1, keepdim=True).clamp(min=1.0)) @ self.v.double()
        scaled = alpha.sum(-1, keepdim=True) * mean
        for other, what in (
            (torch.zeros_like(o), "zero"),
            (scaled, "the mean of V, times the sum of the scores,"),
        ):
            if bool((((o - other).abs() <= budget.certain) | ~judged).all()):
                reasons.append(f"accuracy: {what} is within the budget of every row")
        if self.banded and bool(self.seen.all()):
            reasons.append("mask: the band holds every score")
        return reasons

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Positions seen, and the three with the largest scores."""
        b, h, i = row
        seen = self.seen[h, i]
        where = f"row (batch {b}, head {h}, position {i})"
        count = int(seen.sum())
        if not count:
            return f"{where} sees no position"
        sizes = self.alpha[h, i].double().abs().masked_fill(~seen, -torch.inf)
        places = sizes.topk(min(3, count)).indices.tolist()
        listed = ", ".join(f"position {j} (score {float(self.alpha[h, i, j]):.3g})" for j in places)
        return f"{where} sees {count} of {len(seen)} positions; largest scores: {listed}"


class EasyFamily(Family):
    """``easy``: f(alpha, v, *, band=None)."""

    name = "easy"
    inputs = ("alpha", "v")
    required = ()
    options = ("band",)
    sequence = ("v", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",)."""
        return ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype."""
        return dtype

    def problem(self, *tensors: torch.Tensor, **options: Any) -> EasyProblem:
        """Check the call and build the band; v in layout bhnd.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        alpha, v = _checked_scores(tensors)
        length = v.shape[2]
        band = options.get("band")
        if band is not None and (isinstance(band, bool) or not isinstance(band, int) or band < 0):
            raise ContractError(f"band={band!r}; the contract asks for an int ≥ 0, or None")
        places = torch.arange(length)
        distance = (places[:, None] - places[None, :]).abs()
        seen = distance <= (length if band is None else band)
        seen = seen.expand(alpha.shape)
        bad_scores, bad_values = ~alpha.isfinite(), ~v.isfinite().all(-1)
        poisoned = (seen & bad_scores).any(-1) | (seen & bad_values[:, :, None, :]).any(-1)
        return EasyProblem(
            alpha=finite(alpha),
            v=finite(v),
            seen=seen,
            poisoned=poisoned,
            tainted=bad_scores.flatten(1).any(-1) | bad_values.any(-1),
            banded=band is not None,
        )


def _checked_scores(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha (H, N, N) and v (B, H, N, E) of one dtype."""
    if len(tensors) != 2:
        raise ContractError(f"easy takes two tensors alpha, v; got {len(tensors)}")
    for name, tensor, axes in (("alpha", tensors[0], "(H, N, N)"), ("v", tensors[1], "(B, H, N, E)")):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != axes.count(",") + 1:
            got = (
                f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise ContractError(f"{name} has {got}; the contract asks for a tensor of axes {axes}")
        dtype_name(tensor.dtype, name)
    alpha, v = tensors
    if alpha.dtype != v.dtype:
        raise ContractError(f"alpha has dtype {alpha.dtype} and v {v.dtype}; the contract asks for one dtype")
    asked = (v.shape[1], v.shape[2], v.shape[2])
    if tuple(alpha.shape) != asked:
        raise ContractError(
            f"alpha has shape {tuple(alpha.shape)} and v {tuple(v.shape)}; one score a head, row and column "
            f"is asked, shape {asked}"
        )
    return alpha, v


EASY = EasyFamily()
