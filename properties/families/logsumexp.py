"""Log-sum-exp of rows: y = log Σ_j e^{x_j}; −∞ entries are masked, and an empty row gives −∞.

Source: contract.md, "Calls" and "The edges". :class:`RowsProblem` serves ``softmax_rows`` as well, whose rows
are the weights e^{x_j − y}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import EXP_OVERFLOW, EXP_UNDERFLOW
from attnproof.properties.budgets.logsumexp import logsumexp_budget, weights_budget
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.base import Budget, Family, Problem, dtype_name

__all__ = ["LOGSUMEXP", "RowsFamily", "RowsProblem"]


@dataclass(frozen=True, eq=False)
class RowsProblem(Problem):
    """Rows of logits.

    Attributes:
        x: (…, N), entries that are not finite replaced by 0.
        seen: bool (…, N), False where x was −inf.
        poisoned: bool (…), rows with +inf or NaN.
        kind: "logsumexp" or "softmax_rows".
    """

    x: torch.Tensor
    seen: torch.Tensor
    poisoned: torch.Tensor
    kind: str
    outputs: tuple[str, ...] = ("y",)

    @property
    def row_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The leading axes of x."""
        return tuple(self.x.shape[:-1])

    def shape(self, output: str) -> tuple[int, ...]:
        """(…) for a log-sum-exp, (…, N) for weights."""
        return self.row_shape if self.kind == "logsumexp" else tuple(self.x.shape)

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """y, (…, 1) or (…, N); 0 in rows without entries."""
        a = arithmetic
        x = a.exact(self.x)
        if self.x.shape[-1]:
            shift = self.x.double().masked_fill(~self.seen, -torch.inf).amax(-1, keepdim=True)
        else:
            shift = torch.zeros((*self.row_shape, 1), dtype=torch.float64)
        m = a.exact(torch.where(shift.isfinite(), shift, 0.0))
        empty = ~self.seen.any(-1, keepdim=True)
        w = a.masked(a.exp(a.masked(a.sub(x, m), self.seen)), self.seen)
        total = a.masked(a.sum(w), ~empty, fill=1.0)
        if self.kind == "logsumexp":
            return {"y": a.masked(a.add(m, a.log(total)), ~empty)}
        return {"y": a.div(w, total)}

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """One problem with the chosen rows."""
        index = rows.flatten().nonzero().flatten()
        if not len(index):
            return []
        width = self.x.shape[-1]
        part = replace(
            self,
            x=self.x.reshape(-1, width)[index],
            seen=self.seen.reshape(-1, width)[index],
            poisoned=self.poisoned.flatten()[index],
        )
        return [(part, index)]

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """−inf for the log of an empty sum."""
        return {-torch.inf: ~self.seen.any(-1)} if self.kind == "logsumexp" else {}

    def undetermined(self) -> torch.Tensor:
        """Rows with +inf or NaN."""
        return self.poisoned

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """|y| + 1 for a log-sum-exp, y for weights."""
        y = reference["y"]
        size = (y.value.abs() - y.radius).clamp(min=0.0).nan_to_num(nan=0.0, posinf=0.0)
        return size + 1.0 if self.kind == "logsumexp" else size

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """See ``attnproof.properties.budgets.logsumexp``."""
        budget = logsumexp_budget if self.kind == "logsumexp" else weights_budget
        return {"y": budget(self, reference["y"], contract)}

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether the maximum (or, for weights, equal weights) would pass."""
        budget, y = budgets["y"], reference["y"].value
        judged = ~budget.open
        if not judged.any():
            return ["accuracy: nothing to judge"]
        x = self.x.double().masked_fill(~self.seen, -torch.inf)
        if self.kind == "logsumexp":
            guess = x.amax(-1) if x.shape[-1] else torch.full(self.row_shape, -torch.inf, dtype=torch.float64)
            name = "the largest entry"
        else:
            guess = self.seen.double() / self.seen.sum(-1, keepdim=True).clamp(min=1)
            name = "equal weights"
        near = (y == guess) | ((y - guess).abs() <= budget.certain)
        if bool((near | ~judged).all()):
            largest = x.amax(-1)[self.seen.any(-1) & ~self.poisoned] if x.shape[-1] else x.new_zeros(0)
            shifted = bool(((largest > EXP_OVERFLOW) | (largest < EXP_UNDERFLOW)).any())
            return [f"{'weights' if shifted else 'accuracy'}: {name} would be within the budget of every row"]
        return []

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Entries in the row, and the largest of them."""
        x, seen = self.x[row].double(), self.seen[row]
        count = int(seen.sum())
        if not count:
            return f"row {row} has no entry above −inf"
        top = int(x.masked_fill(~seen, -torch.inf).argmax())
        largest = f"the largest is x[{top}] = {float(x[top]):.6g}"
        return f"row {row} has {count} of {len(seen)} entries above −inf; {largest}"


class RowsFamily(Family):
    """``logsumexp`` and ``softmax_rows`` of the contract."""

    inputs = ("x",)
    required = ()
    options = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("y",)."""
        return ("y",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The input's dtype."""
        return dtype

    def problem(self, *tensors: torch.Tensor, **options: Any) -> RowsProblem:
        """Check the call; x (…, N) with at least one axis."""
        self.check_keywords({key: value for key, value in options.items() if key != "causal_alignment"})
        if len(tensors) != 1 or not isinstance(tensors[0], torch.Tensor):
            raise ContractError(f"{self.name} takes one tensor x; got {len(tensors)} arguments")
        (x,) = tensors
        dtype_name(x.dtype, "x")
        if x.dim() < 1:
            raise ContractError("x is a scalar; the contract asks for (…, N), at least one axis")
        bad = x.isnan() | (x == torch.inf)
        seen = x != -torch.inf
        return RowsProblem(
            x=torch.where(x.isfinite(), x, torch.zeros((), dtype=x.dtype)),
            seen=seen,
            poisoned=bad.any(-1),
            kind=self.name,
        )


LOGSUMEXP = RowsFamily("logsumexp")
