"""mLSTM: a matrix memory with an exponential input gate and a sigmoid forget gate.

    C_t = σ(f_t) C_{t−1} + e^{i_t} k_t v_tᵀ,   n_t = σ(f_t) n_{t−1} + e^{i_t} k_t
    o_t = scale · C_tᵀ q_t / max(|scale · n_tᵀ q_t|, 1)

Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", arXiv 2405.04517; theory 2.10. Kernels compute
it with the running maximum m_t = max(log σ(f_t) + m_{t−1}, i_t) in terms of C' = C e^{−m} and n' = n e^{−m};
the stabilised denominator is max(|scale · n'ᵀ q|, e^{−m}). The definition here is the quadratic form: with
F_i = Σ_{t≤i} log σ(f_t), D_ij = Σ_{j<t≤i} log σ(f_t) + i_j, a state (C'₀, n'₀, m₀) to begin with and
m_i = max(F_i + m₀, max_j D_ij),

    P_ij = scale · q_i·k_j · e^{D_ij − m_i},   z_i = scale · e^{F_i + m₀ − m_i} q_i,
    Z_i = z_iᵀ n'₀ + Σ_j P_ij,   o_i = (C'₀ᵀ z_i + Σ_j P_ij v_j) / max(|Z_i|, e^{−m_i}).

Without an initial state m₀ = −∞, C'₀ = 0 and n'₀ = 0, the neutral element. The final state after N positions
is C' = e^{F_N + m₀ − m_N} C'₀ + Σ_j e^{D_Nj − m_N} k_j v_jᵀ, n' likewise, and m_N; of no position it is the
initial one. A forget gate of −∞ cuts off what is before it.

The initial state is D columns more, with unit vectors as keys, log weights F_i + m₀, the rows of C'₀ in place
of v and the entries of n'₀ in place of the ones that Σ P sums; the final state is what D unit queries read.

Gradients, with N_i the denominator, G_ij = dO_i·v_j / N_i + δ_i and δ_i = −(dO_i·o_i)/N_i · sign(Z_i) · κ_i:

    dv_j = Σ_i P_ij dO_i / N_i,   dq_i = scale Σ_j e^{D_ij − m_i} G_ij k_j,   dk_j the same over i with q_i,
    di_j = Σ_i P_ij G_ij,   df_t = σ(−f_t) Σ_{j<t≤i} P_ij G_ij,
    dC'₀ = Σ_i z_i dO_iᵀ / N_i,   dn'₀ = Σ_i z_i δ_i,

with the initial state's columns among the j of dq and, being before all gates, of df. Cotangents of the final
C' and n' add to these as D rows more at position N do, with k_j e^{D_Nj − m_N} in place of P_ij and their
rows in place of dO_i / N_i and of δ_i.

κ_i is 1 where |Z_i| > e^{−m_i}, 0 where it is less and 1/2 where both are equal: what torch.maximum hands to
each of two equal arguments. The sum for df is the one that does not cancel; a kernel may take the difference
of reverse cumulative sums of q·dq − k·dk (theory GLA-4). o depends on no level, and on an initial state only
through e^m₀ C'₀ and e^m₀ n'₀, as does whatever reads a final one. So levels are held constant: the final one
takes no cotangent, the initial one has no gradient, and derivatives through a hand-over are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import broadcast_mask, dtype_name
from attnproof.properties.budgets.mlstm_gradients import gradient_estimates
from attnproof.properties.budgets.mlstm_outputs import output_budgets
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.stored import with_leaks
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import finite, number
from attnproof.properties.families.base import Budget, Family, Problem
from attnproof.properties.families.mlstm_gradients import gradients
from attnproof.properties.families.mlstm_rows import Rows, final_state, magnitude, placed
from attnproof.properties.families.mlstm_states import Initial, checked_initial, joined
from attnproof.properties.families.mlstm_weights import BLOCK, Gates, blocks
from attnproof.properties.families.sequences import Sequences, checked_gate, checked_state_call, flag
from attnproof.properties.families.state_layout import sampled_rows, scattered, unknown, unsampled

__all__ = ["MLSTM", "MLSTMProblem"]


@dataclass(frozen=True, eq=False)
class MLSTMProblem(Problem):
    """Finite inputs of one call.

    Attributes:
        q, k: (B, H, N, D); v: (B, H, N, E); non-finite entries are 0.
        gates: of the call; non-finite pre-activations are 0, but a forget gate of −∞ is kept as a cut.
        scale: of the scores.
        initial: the state to begin with, or None.
        sequences: where the sequences lie.
        poisoned: bool (B, H, N), rows that see a non-finite input.
        tainted: bool (S, H), states that do.
        with_state: whether the call returns the final state.
        sample: int64, the positions of long calls that are judged; None where all are.
        block: rows of a block, of class Rows.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: Gates
    scale: float
    initial: Initial | None
    sequences: Sequences
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
        """All inputs but levels; none of a long call, which is judged forward only."""
        if self.sample is not None:
            return ()
        states = () if self.initial is None else ("initial_state", "initial_n")
        return ("q", "k", "v", "i", "f", *states)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of q, k, v."""
        return self.q.dtype

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite, a forget gate or an initial level of −∞ apart."""
        return bool(self.poisoned.any() | self.tainted.any())

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, N, D, E."""
        batch, heads, length, width = self.q.shape
        return batch, heads, length, width, self.v.shape[3]

    def row_axes(self, output: str) -> int:
        """All but the last; the only one that a vector of heads has is a row."""
        return len(self.shape(output)) - 1

    @property
    def widths(self) -> dict[str, int]:
        """Widths of the positions' gradients."""
        width, value_width = self.sizes[3:]
        return {"dq": width, "dk": width, "dv": value_width, "di": 1, "df": 1}

    def _input(self, name: str) -> torch.Tensor:
        """A differentiated input."""
        if name in ("i", "f"):
            return self.gates.i if name == "i" else self.gates.f
        if self.initial is not None and name.startswith("initial_"):
            return self.initial.state if name == "initial_state" else self.initial.n
        tensor: torch.Tensor = getattr(self, name)
        return tensor

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of q, k, v, i, f, initial_state or initial_n."""
        return tuple(self._input(name).shape)

    def input_dtype(self, name: str) -> torch.dtype:
        """Gates and states may be float32 beside half-precision inputs."""
        return self._input(name).dtype

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, N, E), (S, H, D, E), (S, H, D) and (S, H)."""
        batch, heads, length, width, value_width = self.sizes
        states = (len(self.sequences), heads)
        return {
            "o": (batch, heads, length, value_width),
            "state": (*states, width, value_width),
            "n": (*states, width),
            "m": states,
        }[output]

    def parts(self) -> list[tuple[int, MLSTMProblem]]:
        """(first position, problem) of what is evaluated apart: packed sequences, or the whole batch."""
        if not self.sequences.packed:
            return [(0, self)]
        found = []
        for s, (_, start, stop) in enumerate(self.sequences.segments):
            gates = (self.sequences.part(s, x) for x in (self.gates.i, self.gates.f, self.gates.cut))
            sample = self.sample
            if sample is not None:
                sample = sample[(sample >= start) & (sample < stop)] - start
            q, k, v, poisoned = (self.sequences.part(s, x) for x in (self.q, self.k, self.v, self.poisoned))
            part = replace(
                self,
                q=q,
                k=k,
                v=v,
                gates=Gates(*gates),
                initial=None if self.initial is None else self.initial.of_sequence(s),
                sequences=Sequences.of(1, stop - start),
                poisoned=poisoned,
                tainted=self.tainted[s : s + 1],
                sample=sample,
            )
            found.append((start, part))
        return found

    def part_cotangents(self, s: int, cotangents: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cotangents of o, state and n for the part s of :meth:`parts`; 0 of outputs without one."""
        found = {
            name: cotangents.get(name, torch.zeros(self.shape(name), dtype=torch.float64))
            for name in ("o", "state", "n")
        }
        if not self.sequences.packed:
            return found
        o = self.sequences.part(s, found.pop("o"))
        return {"o": o, **{name: x[s : s + 1] for name, x in found.items()}}

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o, and the final state; with ``gauges`` Σ|P||v|/N and the like for the state."""
        a, (batch, heads, length, _, width), done = arithmetic, self.sizes, 0
        count = length if self.sample is None else len(self.sample)
        o = a.exact(torch.zeros(batch, heads, count, width, dtype=torch.float64))
        result = {"o": o, "gauge:o": o} if gauges else {"o": o}
        parts = [part for _, part in self.parts()]
        for part in parts:
            for first, stop in part.runs():
                rows = part.rows(a, first, stop)
                result["o"] = a.add(result["o"], placed(a, rows.output(a), done, count))
                if gauges:
                    sizes = placed(a, rows.absolute_output(a), done, count)
                    result["gauge:o"] = a.add(result["gauge:o"], sizes)
                done += stop - first
        for name, x in result.items():
            result[name] = unknown(a, scattered(a, x, self.sample, length), self.sample)
        if self.with_state:
            for absolute in (False, True) if gauges else (False,):
                found = [final_state(a, part, absolute=absolute) for part in parts]
                for name in ("state", "n", "m"):
                    states = joined(a, [x[name] for x in found])
                    result[f"gauge:{name}" if absolute else name] = states
        return result

    @property
    def unsampled(self) -> torch.Tensor:
        """Positions that are not judged, bool (N, 1)."""
        return unsampled(self.sample, self.sizes[2])

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first row, end) of the rows that are evaluated, block by block."""
        return blocks(self.sizes[2], self.sample)

    def rows(self, arithmetic: Arithmetic[V], first: int, stop: int) -> Rows[V]:
        """The weights of rows that lie in one block, of one part."""
        return Rows.of(arithmetic, self, first, stop)

    def final_rows(self, arithmetic: Arithmetic[V]) -> Rows[V]:
        """Those of the final state of one part, after one or more positions."""
        return Rows.final(arithmetic, self)[0]

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ outputs·cotangents by the inputs; of the outputs o, state and n.

        Raises:
            ContractError: a cotangent of the level m, which is held constant.
        """
        level = cotangents.get("m")
        if level is not None and bool(level.any()):
            raise ContractError("mlstm: the final level m is held constant and takes no cotangent")
        return gradients(arithmetic, self, cotangents)

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """See ``attnproof.properties.budgets.mlstm``."""
        return gradient_estimates(self, contract, cotangents)

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """The whole problem, which is one unit."""
        return [(self, torch.zeros(1, dtype=torch.int64))]

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """The level of a sequence without positions is −∞, unless its initial state has one."""
        empty = self.empty
        return {-torch.inf: empty} if output == "m" and bool(empty.any()) else {}

    @property
    def empty(self) -> torch.Tensor:
        """States of nothing, bool (S, H): without positions, and the initial one neutral or none."""
        lengths = torch.tensor([stop - start for _, start, stop in self.sequences.segments])
        empty = (lengths == 0).reshape(-1, 1).expand(self.shape("m"))
        return empty if self.initial is None else empty & ~self.initial.present

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
        tainted = broadcast_mask(self.sequences.rows_of_states(self.tainted), self.shape("o"))
        return {**budgets, "o": with_leaks(budgets["o"], contract, tainted)}

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zeros would pass, or the mean of the values seen so far."""
        budget, o = budgets["o"], reference["o"].value
        judged = ~budget.open
        if not judged.any():
            return ["accuracy: nothing to judge"]
        means = []
        for s in range(len(self.sequences)):
            v = self.sequences.part(s, self.v).double()
            means.append(v.cumsum(2) / torch.arange(1, v.shape[2] + 1, dtype=torch.float64)[:, None])
        mean = self.sequences.joined(means, self.v.double())
        return [
            f"accuracy: {what} is within the budget of every row"
            for other, what in ((torch.zeros_like(o), "zero"), (mean, "the mean of the values so far"))
            if bool((((o - other).abs() <= budget.certain) | ~judged).all())
        ]

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """The positions of the largest weights, the denominator and its bound; for states the gates."""
        if output != "o":
            where = ", ".join(map(str, row))
            start, stop = self.sequences.segments[row[0]][1:]
            return f"row ({where}) of the final {output} after {stop - start} positions"
        b, h, i = row[:3]
        s = next(
            s for s, (at, start, stop) in enumerate(self.sequences.segments) if at == b and start <= i < stop
        )
        start, part = self.parts()[s] if self.sequences.packed else (0, self)
        place = i - start
        d, p, den, m = magnitude(part, 0 if self.sequences.packed else b, h, place)
        listed = ", ".join(
            f"{j} (D {float(d[j]):.4g}, weight {float(p[j]):.3g})"
            for j in p.abs().topk(min(3, place + 1)).indices.tolist()
        )
        which = f" of packed sequence {s}" if self.sequences.packed else ""
        begun = self.initial is not None and bool(self.initial.present[s, h])
        return (
            f"row (batch {b}, head {h}, position {place}{which}) sees {place + 1} positions"
            f"{' and an initial state' if begun else ''}, m = {m:.5g}; the denominator is the larger of "
            f"|{den:.4g}| and e^{-m:.4g}; largest weights at {listed}"
        )


class MLSTMFamily(Family):
    """``mlstm``: f(q, k, v, i, f, *, scale, initial_state=None, cu_seqlens=None, return_state=False)."""

    name = "mlstm"
    inputs = ("q", "k", "v", "i", "f")
    required = ("scale",)
    options = ("initial_state", "cu_seqlens", "return_state")
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
        call = checked_state_call(self.name, tensors, self.inputs, options.get("cu_seqlens"))
        i, f = tensors[3:]
        for name, gate in (("i", i), ("f", f)):
            checked_gate(name, gate, call, wide=False, decay=False)
        dtype_name(call.q.dtype)
        initial, bad_state = checked_initial(options.get("initial_state"), call)
        cut, sequences = f == -torch.inf, call.sequences
        bad_write = call.bad_writes | ~i.isfinite() | (~f.isfinite() & ~cut)
        poisoned = sequences.closed(bad_write) | call.bad_queries | sequences.rows_of_states(bad_state)
        whole = ((0, 0, sequences.length),)
        return MLSTMProblem(
            q=finite(call.q),
            k=finite(call.k),
            v=finite(call.v),
            gates=Gates(finite(i), finite(f), cut),
            scale=number("scale", options["scale"]),
            initial=initial,
            sequences=sequences,
            poisoned=poisoned,
            tainted=sequences.closed_states(bad_write) | bad_state,
            with_state=flag("return_state", options.get("return_state", False)),
            sample=sampled_rows(sequences.length, sequences.segments if sequences.packed else whole),
        )


MLSTM = MLSTMFamily()
