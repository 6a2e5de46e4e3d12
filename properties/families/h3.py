"""H3: o_t = Σ_{s≤t} (q_t·k'_s)(K_{t−s} + [s = t] d_diag) v_s, masked attention with a Toeplitz mask.

    k'_t = Σ_{i<T} taps_i ∘ k_{t−i} + d_shift ∘ k_t,     K_i = Re Σ_r c_r a_rⁱ b_r

Fu et al., arXiv 2212.14052, section 3: SSM_shift on k, its outer product with v through SSM_diag, read by q;
theory H3-1. With P = q k'ᵀ, dP = dO vᵀ and T the mask: dq = (dP∘T) k', dk' = (dP∘T)ᵀ q, dv = (P∘T)ᵀ dO,
dK_i = Σ_t (dP∘P)_{t,t−i}, of which the gradients by a, b and c follow as in :mod:`state_kernel`;
dk_s = Σ_i taps_i ∘ dk'_{s+i} + d_shift ∘ dk'_s, dtaps_i = Σ_s dk'_s ∘ k_{s−i}. Of more than ``LONGEST``
positions a sample is judged, forward only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.stored import sampled_budget, with_leaks
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask
from attnproof.properties.families.h3_response import Operands, Response
from attnproof.properties.families.h3_runs import H3Runs
from attnproof.properties.families.sequences import Sequences, checked_state_call, checked_vector
from attnproof.properties.families.ssm import checked_modes, modes_not_finite
from attnproof.properties.families.state_kernel import Modes
from attnproof.properties.families.state_layout import sampled_rows, scattered, unknown, unsampled

__all__ = ["H3", "H3Problem"]


@dataclass(frozen=True, eq=False)
class H3Problem(Problem):
    """Finite inputs of one call.

    Attributes:
        tensors: by name; d_shift and d_diag only where they are given.
        modes: a, b, c.
        closed: bool (B, H, N), rows that see a non-finite input; tainted: bool (B, H), heads that have one.
        rows: int64, the positions of long calls that are judged; None where all are.
    """

    tensors: Mapping[str, torch.Tensor]
    modes: Modes
    closed: torch.Tensor
    tainted: torch.Tensor
    rows: torch.Tensor | None

    outputs = ("o",)
    row_shape = (1,)

    @property
    def differentiated(self) -> tuple[str, ...]:  # type: ignore[override]
        """The tensors of this call; none of a long one, which is judged forward only."""
        return tuple(self.tensors) if self.rows is None else ()

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the call's tensors."""
        return self.tensors["q"].dtype

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite."""
        return bool(self.tainted.any())

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, N, D, E."""
        batch, heads, length, width = self.tensors["q"].shape
        return batch, heads, length, width, self.tensors["v"].shape[3]

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input."""
        return tuple(self.tensors[name].shape)

    def row_axes(self, output: str) -> int:
        """All axes but the last."""
        return 3

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, N, E)."""
        return tuple(self.tensors["v"].shape)

    @property
    def operands(self) -> Operands:
        """What the formulas work on."""
        t = self.tensors
        rows = torch.arange(self.sizes[2]) if self.rows is None else self.rows
        return Operands(
            t["q"], t["k"], t["v"], t["taps"], self.modes, t.get("d_shift"), t.get("d_diag"), rows
        )

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o; with ``gauges`` a lower bound of Σ|q||k'||K||v|."""
        a, length = arithmetic, self.sizes[2]
        o = scattered(a, Response(a, self.operands).reads(), self.rows, length)
        result = {"o": unknown(a, o, self.rows)}
        if gauges:
            result["gauge:o"] = a.exact(H3Runs(self).absolute_size())
        return result

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients by the formulas above."""
        return Response(arithmetic, self.operands).gradients(cotangents["o"])

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """The whole problem, which is one unit."""
        return [(self, torch.zeros(1, dtype=torch.int64))]

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """No output is a limit that the formulas leave out."""
        return {}

    def undetermined(self) -> torch.Tensor:
        """Nothing: what sees a non-finite input is closed element by element, in the budgets."""
        return torch.zeros(1, dtype=torch.bool)

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """Σ|q||k'||K||v|, ∞ in rows that are not judged."""
        bound = reference.get("gauge:o", reference["o"])
        gauge = (bound.value.abs() - bound.radius).clamp(min=0.0)
        return torch.where(unsampled(self.rows, self.sizes[2]), torch.inf, gauge)

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """See :mod:`attnproof.properties.budgets.ssm`."""
        dtype, exact = dtype_name(self.dtype), reference["o"].value
        known = H3Runs(self).output(Roundings.of(contract, dtype), fourier=contract.causality == "budget")
        closed = broadcast_mask(self.closed, self.shape("o"))
        left = unsampled(self.rows, self.sizes[2])
        budget = sampled_budget(known, exact, contract, dtype, closed, left.expand(exact.shape))
        return {"o": with_leaks(budget, contract, broadcast_mask(self.tainted, self.shape("o")))}

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """The gradients' errors by the same rules."""
        return H3Runs(self).gradients(Roundings.of(contract, dtype_name(self.dtype)), cotangents["o"])

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zeros would pass, or the values themselves."""
        budget, o = budgets["o"], reference["o"].value
        judged = ~budget.open
        if not bool(judged.any()):
            return ["accuracy: nothing to judge"]
        return [
            f"accuracy: {what} is within the budget of every element"
            for other, what in ((torch.zeros_like(o), "zero"), (self.tensors["v"].double(), "v itself"))
            if bool((((o - other).abs() <= budget.certain) | ~judged).all())
        ]

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Which position, and how far taps reach."""
        b, head, i = row
        return (
            f"row (batch {b}, head {head}, position {i}) reads {i + 1} positions through "
            f"{self.tensors['taps'].shape[2]} taps and {self.modes.a.shape[1]} modes"
        )


class H3Family(Family):
    """``h3``: f(q, k, v, taps, a, b, c, d_shift=None, d_diag=None)."""

    name = "h3"
    inputs = ("q", "k", "v", "taps", "a", "b", "c", "d_shift", "d_diag")
    required = ()
    options = ()
    sequence = ("q", "k", "v", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",)."""
        return ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype."""
        return dtype

    def problem(self, *tensors: torch.Tensor, **options: Any) -> H3Problem:
        """Check the call.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        if len(tensors) not in (7, 8, 9):
            raise ContractError(f"h3 takes 7 to 9 tensors {', '.join(self.inputs)}; got {len(tensors)}")
        call = checked_state_call(self.name, tensors[:3])
        batch, heads, length, width = call.q.shape
        dtype, taps = call.q.dtype, tensors[3]
        count = taps.shape[-1] if isinstance(taps, torch.Tensor) and taps.dim() else 0
        checked_vector("taps", taps, (heads, width, count), dtype)
        checked_modes(self.name, tensors[4:7], heads, dtype)
        given = dict(zip(self.inputs, tensors, strict=False))
        given = {name: x for name, x in given.items() if x is not None}
        for name, shape in (("d_shift", (heads, width)), ("d_diag", (heads,))):
            if name in given:
                checked_vector(name, given[name], shape, dtype)
        wrong = torch.zeros(heads, dtype=torch.bool)
        for name, x in given.items():
            if name not in ("q", "k", "v"):
                wrong = wrong | modes_not_finite(x.reshape(heads, -1))
        rows = Sequences.of(batch, length).closed(call.bad_writes) | call.bad_queries | wrong[:, None]
        finite_ones = {name: finite(x) for name, x in given.items()}
        return H3Problem(
            tensors=finite_ones,
            modes=Modes(*(finite_ones[name] for name in ("a", "b", "c"))),
            closed=rows,
            tainted=rows.any(-1) | wrong,
            rows=sampled_rows(length, ((0, 0, length),)),
        )


H3 = H3Family()
