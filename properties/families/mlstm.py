"""mLSTM: a matrix memory with an exponential input gate and a sigmoid forget gate.

    C_t = σ(f_t) C_{t−1} + e^{i_t} k_t v_tᵀ,   n_t = σ(f_t) n_{t−1} + e^{i_t} k_t,   C_0 = 0, n_0 = 0
    o_t = scale · C_tᵀ q_t / max(|scale · n_tᵀ q_t|, 1)

Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", arXiv 2405.04517; theory 2.10. Kernels compute
it with the running maximum m_t = max(log σ(f_t) + m_{t−1}, i_t), m_0 = −∞, in terms of C' = C e^{−m} and
n' = n e^{−m}; the stabilised denominator is max(|scale · n'ᵀ q|, e^{−m}). The definition here is the
quadratic form: with D_ij = Σ_{j<t≤i} log σ(f_t) + i_j and m_i = max_j D_ij,

    P_ij = scale · q_i·k_j · e^{D_ij − m_i},   o_i = Σ_j P_ij v_j / max(|Σ_j P_ij|, e^{−m_i}).

Gradients, with N_i the denominator, G_ij = dO_i·v_j / N_i + δ_i and δ_i = −(dO_i·o_i)/N_i · sign(Σ P) · κ_i:

    dv_j = Σ_i P_ij dO_i / N_i,   dq_i = scale Σ_j e^{D_ij − m_i} G_ij k_j,   dk_j the same over i with q_i,
    di_j = Σ_i P_ij G_ij,   df_t = σ(−f_t) Σ_{j<t≤i} P_ij G_ij.

κ_i is 1 where |Σ P| > e^{−m}, 0 where it is less and 1/2 where both are equal: what torch.maximum hands to
each of two equal arguments. The sum for df is the one that does not cancel; a kernel may take the difference
of reverse cumulative sums of q·dq − k·dk (theory GLA-4). Only o is differentiated: C', n' and m are outputs
without cotangents, and m alone, of which o does not depend, has the gradient 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import broadcast_mask, dtype_name
from attnproof.properties.budgets.mlstm import output_budgets
from attnproof.properties.budgets.mlstm_gradients import gradient_estimates
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.stored import with_leaks
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import finite, number
from attnproof.properties.families.base import Budget, Family, Problem
from attnproof.properties.families.mlstm_gradients import gradients
from attnproof.properties.families.mlstm_rows import Rows, final_state, magnitude, placed
from attnproof.properties.families.mlstm_weights import BLOCK, Gates, blocks
from attnproof.properties.families.sequences import checked_gate, checked_state_call, flag
from attnproof.properties.families.state_layout import sampled_rows, scattered, unknown, unsampled

__all__ = ["MLSTM", "MLSTMProblem"]


@dataclass(frozen=True, eq=False)
class MLSTMProblem(Problem):
    """Finite inputs of one call.

    Attributes:
        q, k: (B, H, N, D); v: (B, H, N, E); non-finite entries are 0.
        gates: of the call; non-finite pre-activations are 0, but a forget gate of −∞ is kept as a cut.
        scale: of the scores.
        poisoned: bool (B, H, N), rows that see a non-finite input.
        tainted: bool (B, H), states that do.
        with_state: whether the call returns the final state.
        sample: int64, the positions of long calls that are judged; None where all are.
        block: rows of a block, of class Rows.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: Gates
    scale: float
    poisoned: torch.Tensor
    tainted: torch.Tensor
    with_state: bool
    sample: torch.Tensor | None

    row_shape = (1,)
    block = BLOCK

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """("o",), or with the final state (o, C', n', m)."""
        return ("o", "state", "n", "m") if self.with_state else ("o",)

    @property
    def differentiated(self) -> tuple[str, ...]:  # type: ignore[override]
        """All inputs; none of a long call, which is judged forward only."""
        return ("q", "k", "v", "i", "f") if self.sample is None else ()

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of q, k, v."""
        return self.q.dtype

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite, a forget gate of −∞ apart."""
        return bool(self.poisoned.any() | self.tainted.any())

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, N, D, E."""
        batch, heads, length, width = self.q.shape
        return batch, heads, length, width, self.v.shape[3]

    def row_axes(self, output: str) -> int:
        """All but the last; the only one that a vector of heads has is a row."""
        return len(self.shape(output)) - 1

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of q, k, v, i or f."""
        return tuple((self.gates.i if name in ("i", "f") else getattr(self, name)).shape)

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, N, E), (B, H, D, E), (B, H, D) and (B, H)."""
        batch, heads, length, width, value_width = self.sizes
        return {
            "o": (batch, heads, length, value_width),
            "state": (batch, heads, width, value_width),
            "n": (batch, heads, width),
            "m": (batch, heads),
        }[output]

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o, and the final state; with ``gauges`` Σ|P||v|/N and the like for the state."""
        a, (batch, heads, length, _, width), done = arithmetic, self.sizes, 0
        count = length if self.sample is None else len(self.sample)
        o = a.exact(torch.zeros(batch, heads, count, width, dtype=torch.float64))
        result = {"o": o}
        if gauges:
            result["gauge:o"] = o
        for first, stop in self.runs():
            rows = self.rows(a, first, stop)
            result["o"] = a.add(result["o"], placed(a, rows.output(a), done, count))
            if gauges:
                sizes = placed(a, rows.absolute_output(a), done, count)
                result["gauge:o"] = a.add(result["gauge:o"], sizes)
            done += stop - first
        for name, x in result.items():
            result[name] = unknown(a, scattered(a, x, self.sample, length), self.sample)
        if self.with_state:
            result |= final_state(a, self)
            if gauges:
                result |= {f"gauge:{name}": x for name, x in final_state(a, self, absolute=True).items()}
        return result

    @property
    def unsampled(self) -> torch.Tensor:
        """Positions that are not judged, bool (N, 1)."""
        return unsampled(self.sample, self.sizes[2])

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first row, end) of the rows that are evaluated, block by block."""
        return blocks(self.sizes[2], self.sample)

    def rows(self, arithmetic: Arithmetic[V], first: int, stop: int) -> Rows[V]:
        """The weights of rows that lie in one block."""
        return Rows.of(arithmetic, self, first, stop)

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ o·cotangent by q, k, v, i and f.

        Raises:
            ContractError: a cotangent of the final state, which the call does not differentiate.
        """
        if any(bool(c.any()) for name, c in cotangents.items() if name != "o"):
            raise ContractError("mlstm: only o is differentiated; the final state takes no cotangent")
        return gradients(arithmetic, self, cotangents["o"])

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """See ``attnproof.properties.budgets.mlstm``."""
        return gradient_estimates(self, contract, cotangents["o"])

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """The whole problem, which is one unit."""
        return [(self, torch.zeros(1, dtype=torch.int64))]

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """The maximum of no position is −∞."""
        if output == "m" and not self.sizes[2]:
            return {-torch.inf: torch.ones(self.shape("m"), dtype=torch.bool)}
        return {}

    def undetermined(self) -> torch.Tensor:
        """No unit; what sees a non-finite input is closed element by element in :meth:`budgets`."""
        return torch.tensor([False])

    def closed(self, output: str) -> torch.Tensor:
        """Elements that see a non-finite input, bool of the output's shape."""
        mask = self.poisoned if output == "o" else self.tainted
        shape = self.shape(output)
        return mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim())).expand(shape)

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """Σ|P||v| / N, Σ|k||v| e^{D − m}, Σ|k| e^{D − m}, and 1 + |m|; ∞ in rows that are not judged."""
        if output == "m":
            return reference["m"].value.abs().nan_to_num(posinf=0.0) + 1.0
        bound = reference.get(f"gauge:{output}", reference[output])
        gauge = (bound.value.abs() - bound.radius).clamp(min=0.0)
        if output != "o":
            return gauge
        return torch.where(self.unsampled, torch.inf, gauge)

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """See ``attnproof.properties.budgets.mlstm``."""
        budgets = output_budgets(self, reference, contract)
        tainted = broadcast_mask(self.tainted, self.shape("o"))
        return {**budgets, "o": with_leaks(budgets["o"], contract, tainted)}

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zeros would pass, or the mean of the values seen so far."""
        budget, o = budgets["o"], reference["o"].value
        judged = ~budget.open
        if not judged.any():
            return ["accuracy: nothing to judge"]
        count = torch.arange(1, self.sizes[2] + 1, dtype=torch.float64)[:, None]
        mean = self.v.double().cumsum(2) / count
        return [
            f"accuracy: {what} is within the budget of every row"
            for other, what in ((torch.zeros_like(o), "zero"), (mean, "the mean of the values so far"))
            if bool((((o - other).abs() <= budget.certain) | ~judged).all())
        ]

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """The positions of the largest weights, the denominator and its bound; for states the gates."""
        if output != "o":
            where = ", ".join(map(str, row))
            return f"row ({where}) of the final {output} after {self.sizes[2]} positions"
        b, h = row[:2]
        place = row[2]
        d, p, den = magnitude(self, b, h, place)
        listed = ", ".join(
            f"{j} (D {float(d[j]):.4g}, weight {float(p[j]):.3g})"
            for j in p.abs().topk(min(3, place + 1)).indices.tolist()
        )
        shift = float(d.max())
        return (
            f"row (batch {b}, head {h}, position {place}) sees {place + 1} positions, m = {shift:.5g}; the "
            f"denominator is the larger of |{den:.4g}| and e^{-shift:.4g}; largest weights at {listed}"
        )


class MLSTMFamily(Family):
    """``mlstm``: f(q, k, v, i, f, *, scale, return_state=False)."""

    name = "mlstm"
    inputs = ("q", "k", "v", "i", "f")
    required = ("scale",)
    options = ("return_state",)
    sequence = ("q", "k", "v", "i", "f", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",), or ("o", "state", "n", "m") with ``return_state``."""
        return ("o", "state", "n", "m") if options.get("return_state") else ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype for o; float32 for the state (float64 if the inputs are)."""
        return dtype if output == "o" or dtype == "float64" else "float32"

    def problem(self, *tensors: torch.Tensor, **options: Any) -> MLSTMProblem:
        """Check the call; in layout bhnd.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        call = checked_state_call(self.name, tensors, self.inputs)
        i, f = tensors[3:]
        for name, gate in (("i", i), ("f", f)):
            checked_gate(name, gate, call, wide=False, decay=False)
        dtype_name(call.q.dtype)
        cut = f == -torch.inf
        bad_write = call.bad_writes | ~i.isfinite() | (~f.isfinite() & ~cut)
        return MLSTMProblem(
            q=finite(call.q),
            k=finite(call.k),
            v=finite(call.v),
            gates=Gates(finite(i), finite(f), cut),
            scale=number("scale", options["scale"]),
            poisoned=call.sequences.closed(bad_write) | call.bad_queries,
            tainted=call.sequences.closed_states(bad_write),
            with_state=flag("return_state", options.get("return_state", False)),
            sample=sampled_rows(call.sequences.length, ((0, 0, call.sequences.length),)),
        )


MLSTM = MLSTMFamily()
