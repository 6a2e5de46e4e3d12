r"""Differential attention: o = softmax(scale q₁k₁ᵀ) v − λ_h softmax(scale q₂k₂ᵀ) v.

q₁, q₂ and k₁, k₂ are the halves of the last axis of q and k. Query i sees key j when j ≤ i + N − M under
``causal``. Query head h reads key and value head h // (H/G).
Source: Ye et al. 2024, "Differential Transformer", arXiv 2410.05258, equation 1; the normalisation of heads
and the form of λ are the model's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.propagation import Estimate, Propagation, wider
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.softmax_gradients import attention_gradient_estimates
from attnproof.properties.budgets.stored import stored_budget
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import checked_tensors, finite
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask, dtype_name
from attnproof.properties.families.batch_normalised import per_key_head
from attnproof.properties.families.gradients import reduced
from attnproof.properties.families.softmax import SOFTMAX, SoftmaxProblem

__all__ = ["DIFFERENTIAL", "DifferentialProblem"]


@dataclass(frozen=True, eq=False)
class DifferentialProblem(Problem):
    """Two softmax attentions on the same values.

    Attributes:
        first, second: of the halves of q and k; k and v hold one copy for each query head, (B, H, N, ·).
        lam: (H,), finite.
        groups: G, key/value heads of the call.
    """

    first: SoftmaxProblem
    second: SoftmaxProblem
    lam: torch.Tensor
    groups: int
    outputs: tuple[str, ...] = ("o",)
    differentiated: tuple[str, ...] = ("q", "k", "v", "lam")

    @property
    def parts(self) -> tuple[SoftmaxProblem, SoftmaxProblem]:
        """Both attentions."""
        return self.first, self.second

    @property
    def row_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(B, H, M)."""
        return self.first.row_shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the call's tensors."""
        return self.first.dtype

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite, seen or not."""
        return self.first.nonfinite

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a differentiated input, as it was given."""
        if name == "lam":
            return tuple(self.lam.shape)
        batch, heads, length, width = getattr(self.first, name).shape
        return (
            batch,
            heads if name == "q" else self.groups,
            length,
            width if name == "v" else 2 * width,
        )

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, M, E)."""
        return self.first.shape("o")

    def _times_lam(self, a: Arithmetic[V], x: V, lam: torch.Tensor | None = None) -> V:
        """λ_h x for x (B, H, ·, ·)."""
        return a.mul(a.exact((self.lam if lam is None else lam).reshape(1, -1, 1, 1)), x)

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o (B, H, M, E); with ``gauges`` also Σ p|v| of both parts together, and o of each part."""
        a = arithmetic
        first, second = (part.evaluate(a, gauges) for part in self.parts)
        result = {"o": a.sub(first["o"], self._times_lam(a, second["o"]))}
        if gauges:
            size = self._times_lam(a, second["gauge:o"], self.lam.abs())
            result["gauge:o"] = a.add(first["gauge:o"], size)
            result["gauge:first"], result["gauge:second"] = first["o"], second["o"]
        return result

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """One problem for each (batch, head) that has chosen rows.

        Keys that none of them sees are left out.
        """
        heads, m = self.row_shape[1:]
        parts: list[tuple[Problem, torch.Tensor]] = []
        for (first, index), (second, _) in zip(self.first.split(rows), self.second.split(rows), strict=True):
            assert isinstance(first, SoftmaxProblem)
            assert isinstance(second, SoftmaxProblem)
            h = int(index[0]) // m % heads
            part = replace(self, first=first, second=second, lam=self.lam[h : h + 1], groups=1)
            parts.append((part, index))
        return parts

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """o is exactly 0 where no key is seen."""
        return self.first.fixed("o")

    def undetermined(self) -> torch.Tensor:
        """Rows that see a non-finite input."""
        return self.first.undetermined()

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """Σ p₁|v| + |λ| Σ p₂|v|."""
        return self.first.gauge("o", reference)

    @cached_property
    def _own(self) -> tuple[Enclosure, Enclosure]:
        """o of each part by float64 enclosures."""
        a = EnclosureArithmetic()
        first, second = (a.enclosure(part.evaluate(a)["o"]) for part in self.parts)
        return first, second

    def _part_references(self, reference: Mapping[str, Enclosure]) -> list[dict[str, Enclosure]]:
        """The outputs of the parts; the certified ones where the reference was asked for gauges."""
        names = ("gauge:first", "gauge:second")
        own = [reference[name] for name in names] if names[0] in reference else self._own
        return [{"o": enclosure} for enclosure in own]

    def _part_budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> list[Budget]:
        """The budgets of o of each part under ``contract``."""
        references = self._part_references(reference)
        return [
            part.budgets(known, contract)["o"] for part, known in zip(self.parts, references, strict=True)
        ]

    def _part_estimates(
        self, reference: Mapping[str, Enclosure], budgets: Sequence[Budget]
    ) -> tuple[Estimate, Estimate]:
        """o of each part with its errors, (B, H, M, E), from its budgets."""
        first, second = (
            _estimated(known["o"], budget)
            for known, budget in zip(self._part_references(reference), budgets, strict=True)
        )
        return first, second

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """The parts' budgets with outputs kept in float32, λ times, one difference and one rounding."""
        dtype = dtype_name(self.dtype)
        wide = "float64" if dtype == "float64" else "float32"
        inner = replace(contract, precision=replace(contract.precision, output=wide))
        found = self._part_budgets(reference, inner)
        first, second = self._part_estimates(reference, found)
        a = Propagation(Roundings.of(contract, dtype))
        closed = broadcast_mask(self.undetermined(), self.shape("o"))
        difference = a.sub(first, self._times_lam(a, second))
        budget = stored_budget(difference, reference["o"].value, contract, dtype, closed)
        reasons = {**budget.reasons, **found[1].reasons, **found[0].reasons}
        return {"o": replace(budget, literal=found[0].literal, reasons=reasons)}

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ o·cotangent by q, k, v and lam; dλ_h = −Σ dO·o₂."""
        a = arithmetic
        first, second = (part.differentiate(a, cotangents) for part in self.parts)
        moved = {name: self._times_lam(a, x, -self.lam) for name, x in second.items()}
        return self._through(a, first, moved, self.second.evaluate(a)["o"], cotangents["o"])

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """The parts' estimates, put together; a kernel may keep o₁ and o₂ in the output's format for them.

        −λ may come in before dP and dS are stored, as autograd has it, or after: what underflows is another.
        """
        a = Propagation(Roundings.of(contract, dtype_name(self.dtype)))
        references = self._part_references(reference)
        before = {"o": -self.lam.double().reshape(1, -1, 1, 1) * cotangents["o"]}
        first, second, early = (
            attention_gradient_estimates(part, known, contract, given)
            for part, known, given in (
                (self.first, references[0], cotangents),
                (self.second, references[1], cotangents),
                (self.second, references[1], before),
            )
        )
        moved = {name: wider(self._times_lam(a, x, -self.lam), early[name]) for name, x in second.items()}
        o = self._part_estimates(reference, self._part_budgets(reference, contract))[1]
        return self._through(a, first, moved, o, cotangents["o"])

    def _through(
        self, a: Arithmetic[V], first: Mapping[str, V], moved: Mapping[str, V], o: V, cotangent: torch.Tensor
    ) -> dict[str, V]:
        """The call's gradients from the first part's, −λ times the second's, by query head, and o₂."""
        heads = len(self.lam)
        product = a.scaled(a.mul(a.exact(cotangent), o), -1.0)
        return {
            "dq": _halves(a, first["dq"], moved["dq"]),
            "dk": per_key_head(a, _halves(a, first["dk"], moved["dk"]), self.groups),
            "dv": per_key_head(a, a.add(first["dv"], moved["dv"]), self.groups),
            "dlam": a.reshape(reduced(a, product, (1, heads, 1, 1)), (heads,)),
        }

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether the mean of V in both parts would pass, whether λ matters, and the mask."""
        budget, o = budgets["o"], reference["o"].value
        judged = ~budget.open
        if not judged.any():
            return ["accuracy: nothing to judge"]

        def passes(other: torch.Tensor) -> bool:
            return bool((((o - other).abs() <= budget.certain) | ~judged).all())

        reasons = []
        weights = self.first.seen.double()
        mean = (weights / weights.sum(-1, keepdim=True).clamp(min=1.0)) @ self.first.values().double()
        lam = self.lam.double().reshape(1, -1, 1, 1)
        if passes(mean * (1.0 - lam)):
            rows = judged.any(-1)
            what = "weights" if any(part._needs_shift(rows) for part in self.parts) else "accuracy"
            reasons.append(f"{what}: the mean of the values seen is within the budget of every row")
        if passes(self._part_references(reference)[0]["o"].value):
            reasons.append("second part: the first part alone is within the budget of every row")
        if self.first.masked and bool(self.first.seen.all()):
            reasons.append("mask: every query sees every key")
        return reasons

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Keys seen, and the three with the largest weights in each part."""
        first, second = (part.explain_row("o", row) for part in self.parts)
        lam = float(self.lam[row[1]])
        return f"first part: {first}; second part, λ = {lam:.6g}: {second}"


def _estimated(o: Enclosure, budget: Budget) -> Estimate:
    """An output with the errors of its budget; lost where the budget or the reference knows nothing."""
    lost = budget.open | ~budget.certain.isfinite() | ~o.radius.isfinite()
    return Estimate(
        o.value,
        torch.where(lost, 0.0, budget.certain),
        torch.where(lost, 0.0, budget.probable.square()),
        lost if bool(lost.any()) else None,
    )


def _halves(a: Arithmetic[V], x: V, y: V) -> V:
    """x and y (B, H, N, D) side by side, (B, H, N, 2D)."""
    batch, heads, rows, width = a.shape(x)
    place = torch.tensor([[True], [False]])
    apart = (batch, heads, rows, 1, width)
    both = a.add(a.masked(a.reshape(x, apart), place), a.masked(a.reshape(y, apart), ~place))
    return a.reshape(both, (batch, heads, rows, 2 * width))


class DifferentialFamily(Family):
    """``differential`` of the contract."""

    name = "differential"
    inputs = ("q", "k", "v", "lam")
    required = ("scale",)
    options = ("causal",)
    sequence = ("q", "k", "v", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",)."""
        return ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype."""
        return dtype

    def problem(self, *tensors: torch.Tensor, **options: Any) -> DifferentialProblem:
        """Check the call; q (B, H, M, 2D), k (B, G, N, 2D), v (B, G, N, E), lam (H,) in layout bhnd."""
        self.check_keywords(options)
        if len(tensors) != 4:
            raise ContractError(f"{self.name} takes four tensors q, k, v, lam; got {len(tensors)}")
        q, k, v = checked_tensors(self.name, tensors[:3])
        lam = _checked_lam(tensors[3], q)
        if q.shape[3] % 2:
            raise ContractError(
                f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; the contract asks for an even width, "
                "2D, of two halves"
            )
        whole = SOFTMAX.problem(q, k, v, **options)
        unknown = ~lam.isfinite().unsqueeze(0)
        whole = replace(
            whole,
            k=whole.keys(),
            v=whole.values(),
            poisoned=whole.poisoned | unknown.unsqueeze(-1),
            tainted=whole.tainted | unknown,
        )
        half = q.shape[3] // 2
        first, second = (
            replace(whole, q=whole.q[..., here], k=whole.k[..., here])
            for here in (slice(0, half), slice(half, 2 * half))
        )
        return DifferentialProblem(first, second, finite(lam), k.shape[1])


def _checked_lam(lam: Any, q: torch.Tensor) -> torch.Tensor:
    """One number a query head in q's dtype."""
    heads = q.shape[1]
    if not isinstance(lam, torch.Tensor) or tuple(lam.shape) != (heads,) or lam.dtype != q.dtype:
        got = (
            f"{lam.dtype} of shape {tuple(lam.shape)}"
            if isinstance(lam, torch.Tensor)
            else type(lam).__name__
        )
        raise ContractError(
            f"lam is {got}; the contract asks for one number a query head, shape ({heads},), of q's dtype "
            f"{q.dtype}"
        )
    return lam


DIFFERENTIAL = DifferentialFamily()
