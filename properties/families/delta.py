"""The delta rule, with scalar decays (Gated DeltaNet), decays of channels (Kimi's KDA) or none (DeltaNet).

    S' = e^{g_t} ∘ S_{t−1},   S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ,   o_t = scale · q_tᵀ S_t

Sources: Schlag et al., arXiv 2102.11174; Yang et al., arXiv 2406.06484 and 2412.06464; theory DN-1 to DN-4
(the decay comes first, then the read). Gradients, from the last step to the first, with r = v_t − S'ᵀk_t:

    dS_t += scale·q_t do_tᵀ,   u = dS_tᵀ k_t,   dβ = r·u,   dv = β u,   dk = β dS_t r − S' dv,
    dS' = dS_t − k dvᵀ,   dg = Σ S' ∘ dS' over the axes that g lacks,   dS_{t−1} = e^{g_t} ∘ dS',

and dq_t = scale·S_t do_t. Multiprecision arithmetics take these steps literally. Float64 enclosures are
norm-wise (``arithmetic.normwise``), since componentwise ones explode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import Ball, EnclosureArithmetic
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.delta import DeltaErrors
from attnproof.properties.budgets.delta_chunks import DeltaLanes
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.stored import sampled_budget, with_leaks
from attnproof.properties.contract import Contract
from attnproof.properties.families.arguments import finite, number
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask
from attnproof.properties.families.delta_steps import (
    gradients,
    joined,
    norm_wise,
    norm_wise_gradients,
    steps_of,
)
from attnproof.properties.families.sequences import (
    Sequences,
    checked_gate,
    checked_state,
    checked_state_call,
    flag,
    state_dtype,
)
from attnproof.properties.families.state_layout import sampled_rows, unsampled

__all__ = ["DELTA", "DeltaProblem"]


@dataclass(frozen=True, eq=False)
class DeltaProblem(Problem):
    """Finite inputs of one call; non-finite entries are 0, gates of −inf apart.

    Attributes:
        q, k: (B, H, N, D); v: (B, H, N, E); beta: (B, H, N); g: (B, H, N), (B, H, N, D) or None.
        initial_state: (S, H, D, E) for S sequences, or None.
        scale: of the read.
        sequences: which positions belong together.
        with_state: whether the final states are an output.
        closed_rows: bool (B, H, N), rows that see a non-finite input; closed_states: bool (S, H).
        spoiled: whether any input holds NaN or an infinity that is no gate of −inf.
        rows: int64, the positions of long calls that are judged; None where all are.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor | None
    initial_state: torch.Tensor | None
    scale: float
    sequences: Sequences
    with_state: bool
    closed_rows: torch.Tensor
    closed_states: torch.Tensor
    spoiled: bool
    rows: torch.Tensor | None

    row_shape = (1,)

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """("o",) or ("o", "state")."""
        return ("o", "state") if self.with_state else ("o",)

    @property
    def differentiated(self) -> tuple[str, ...]:  # type: ignore[override]
        """Inputs that were given; none of a long call, which is judged forward only."""
        if self.rows is not None:
            return ()
        names = ("q", "k", "v", "beta", "g", "initial_state")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of q, k and v."""
        return self.q.dtype

    @property
    def nonfinite(self) -> bool:
        """Whether any input holds NaN or an infinity that is no gate of −inf."""
        return self.spoiled

    def row_axes(self, output: str) -> int:
        """All but the last."""
        return 3

    def input_dtype(self, name: str) -> torch.dtype:
        """Gates and states may be float32 beside half-precision inputs."""
        dtype: torch.dtype = getattr(self, name).dtype
        return dtype

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a differentiated input."""
        return tuple(getattr(self, name).shape)

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, N, E), or (S, H, D, E) of the state."""
        if output == "o":
            return tuple(self.v.shape)
        return (len(self.sequences), self.q.shape[1], self.q.shape[3], self.v.shape[3])

    def lanes(self) -> DeltaLanes:
        """The call with one lane a sequence and head; steps after a sequence's end change nothing."""
        state = self.initial_state
        if state is None:
            state = torch.zeros(self.shape("state"))
        return DeltaLanes(
            q=self._lanes(self.q),
            k=self._lanes(self.k),
            v=self._lanes(self.v),
            beta=self._lanes(self.beta),
            g=None if self.g is None else self._lanes(self.g),
            initial=state.detach().double().flatten(0, 1),
            scale=self.scale,
            rows=self._judged_offsets(),
        )

    def _judged_offsets(self) -> torch.Tensor | None:
        """Offsets in their sequences of the rows that are judged."""
        if self.rows is None or not self.sequences.packed:
            return self.rows
        offset = torch.tensor(self._places()[1], dtype=torch.int64)
        return torch.tensor(sorted(set(offset[self.rows].tolist())), dtype=torch.int64)

    def _lanes(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, N, …) as (S·H, longest sequence, …), float64, zeros after the ends."""
        if not self.sequences.packed:
            return x.detach().double().flatten(0, 1)
        longest = max(stop - start for _, start, stop in self.sequences.segments)
        wide = x.new_zeros((len(self.sequences), x.shape[1], longest, *x.shape[3:]), dtype=torch.float64)
        for s, (_, start, stop) in enumerate(self.sequences.segments):
            wide[s, :, : stop - start] = x[0, :, start:stop].detach()
        return wide.flatten(0, 1)

    def _places(self) -> tuple[list[int], list[int]]:
        """Sequence, and offset in it, of every position of a packed call."""
        spans = [(s, stop - start) for s, (_, start, stop) in enumerate(self.sequences.segments)]
        return [s for s, n in spans for _ in range(n)], [i for _, n in spans for i in range(n)]

    def _unpacked(self, x: Any) -> Any:
        """The inverse of :meth:`_lanes`, of a tensor or an array of multiprecision numbers."""
        heads = self.q.shape[1]
        if not self.sequences.packed:
            return x.reshape((self.sequences.batch, heads, *x.shape[1:]))
        x = x.reshape((len(self.sequences), heads, *x.shape[1:]))
        which, offset = self._places()
        # Two index lists with an axis between them: their common axis comes first.
        return x[which, :, offset].swapaxes(0, 1)[None]

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o and the final states; with ``gauges`` also a lower bound of Σ_s |w_ts||v_s| of each."""
        lanes = self.lanes()
        if isinstance(arithmetic, EnclosureArithmetic):
            found = cast("dict[str, V]", norm_wise(lanes))
        else:
            steps = steps_of(arithmetic, lanes)
            rows = [
                arithmetic.scaled(
                    arithmetic.matmul(arithmetic.exact(lanes.q[:, t, None]), step.state), lanes.scale
                )
                for t, step in enumerate(steps)
            ]
            final = steps[-1].state if steps else arithmetic.exact(lanes.initial)
            found = {"o": joined(rows, arithmetic.exact(lanes.v[:, :0])), "state": final}
        result = {"o": self._rows_of(found["o"])}
        if self.with_state:
            result["state"] = arithmetic.reshape(found["state"], self.shape("state"))
        if gauges:
            o, state = lanes.gauges()
            result["gauge:o"] = arithmetic.exact(self._unpacked(o))
            if self.with_state:
                result["gauge:state"] = arithmetic.exact(state.reshape(self.shape("state")))
        return result

    def _rows_of(self, x: V) -> V:
        """Per-step values of lanes as (B, H, N, …)."""
        if isinstance(x, Ball):
            assert x.radius is not None
            return cast("V", Ball(self._unpacked(x.value), self._unpacked(x.radius)))
        return cast("V", self._unpacked(x))

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients by the formulas above; the final state's cotangent is the first dS."""
        lanes = self.lanes()
        do, last = self.cotangents(cotangents)
        if isinstance(arithmetic, EnclosureArithmetic):
            found = cast("dict[str, V]", norm_wise_gradients(lanes, do, last))
        else:
            found = gradients(arithmetic, lanes, do, last)
        return self.in_place(arithmetic, found)

    def in_place(self, arithmetic: Arithmetic[V], found: Mapping[str, V]) -> dict[str, V]:
        """Gradients of lanes in the shapes of the inputs."""
        result = {}
        for name in self.differentiated:
            x = found[f"d{name}"]
            if name != "initial_state":
                x = self._rows_of(x)
            result[f"d{name}"] = arithmetic.reshape(x, self.input_shape(name))
        return result

    def cotangents(self, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cotangents of o (L, N, E) and of the final state (L, D, E); zeros for those not given."""
        do = given.get("o")
        last = given.get("state")
        do = torch.zeros(self.shape("o")) if do is None else do
        last = torch.zeros(self.shape("state")) if last is None else last
        return self._lanes(do), last.detach().double().flatten(0, 1)

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """The whole problem, which has one unit."""
        return [(self, torch.zeros(1, dtype=torch.int64))]

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """No element is a limit that the recurrence leaves out."""
        return {}

    def undetermined(self) -> torch.Tensor:
        """Never the whole unit: rows that see a non-finite input are open in the budgets."""
        return torch.zeros(1, dtype=torch.bool)

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """A lower bound of Σ_s |w_ts||v_s|, the initial state's part included; ∞ in rows not judged."""
        bound = reference.get(f"gauge:{output}", reference[output])
        gauge = (bound.value.abs() - bound.radius).clamp(min=0.0)
        if output != "o":
            return gauge
        return torch.where(unsampled(self.rows, self.q.shape[2]), torch.inf, gauge)

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """Of o and the final states; see ``budgets.delta``."""
        dtype = dtype_name(self.dtype)
        found = DeltaErrors(self.lanes(), Roundings.of(contract, dtype)).outputs()
        estimates = {"o": _each(found["o"], self._unpacked)}
        if self.with_state:
            estimates["state"] = _each(found["state"], lambda x: x.reshape(self.shape("state")))
        stored = {"o": dtype, "state": dtype_name(state_dtype(self.dtype))}
        budgets = {}
        for name, estimate in estimates.items():
            closed = broadcast_mask(self.closed_rows if name == "o" else self.closed_states, self.shape(name))
            exact = reference[name].value
            left = unsampled(self.rows, self.q.shape[2])
            left = left if name == "o" else torch.zeros(1, dtype=torch.bool)
            budgets[name] = sampled_budget(estimate, exact, contract, stored[name], closed, left)
        tainted = broadcast_mask(self.sequences.rows_of_states(self.closed_states), self.shape("o"))
        return {**budgets, "o": with_leaks(budgets["o"], contract, tainted)}

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """Of every gradient; see ``budgets.delta``."""
        errors = DeltaErrors(self.lanes(), Roundings.of(contract, dtype_name(self.dtype)))
        found = errors.gradients(*self.cotangents(cotangents))
        result = {}
        for name in self.differentiated:
            x = found[f"d{name}"]
            x = x if name == "initial_state" else _each(x, self._unpacked)
            shape = self.input_shape(name)
            result[f"d{name}"] = _each(x, lambda y, shape=shape: y.reshape(shape))
        return result

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zeros would pass, or the mean of the values so far."""
        budget, o = budgets["o"], reference["o"].value
        judged = ~budget.open
        if not bool(judged.any()):
            return ["accuracy: nothing to judge"]
        lanes = self._lanes(self.v)
        count = torch.arange(1, lanes.shape[1] + 1, dtype=torch.float64)[:, None]
        mean = self._unpacked(lanes.cumsum(1) / count)
        reasons = []
        for other, what in ((torch.zeros_like(o), "zero"), (mean, "the mean of the values so far")):
            if bool((((o - other).abs() <= budget.certain) | ~judged).all()):
                reasons.append(f"accuracy: {what} is within the budget of every row")
        return reasons

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Position, β‖k‖² and decay of a row; sequence, head and key channel of a state's row."""
        if output != "o":
            return "state of sequence {}, head {}, key channel {}".format(*row)
        b, h, i = row
        key = float(self.beta[b, h, i].double() * self.k[b, h, i].double().square().sum())
        text = f"row (batch {b}, head {h}, position {i}) writes with beta·|k|² = {key:.3g}"
        if self.g is None:
            return text
        gate = self.g[b, h, i].double().exp()
        return f"{text}, decay {float(gate.min()):.3g} to {float(gate.max()):.3g}"


def _each(x: Estimate, change: Any) -> Estimate:
    parts = {f.name: getattr(x, f.name) for f in fields(x)}
    return replace(x, **{n: change(p) for n, p in parts.items() if isinstance(p, torch.Tensor)})


class DeltaFamily(Family):
    """``delta``: f(q, k, v, beta, g, *, scale, initial_state=None, cu_seqlens=None, return_state=False)."""

    name = "delta"
    inputs = ("q", "k", "v", "beta", "g")
    required = ("scale",)
    options = ("initial_state", "cu_seqlens", "return_state")
    sequence = ("q", "k", "v", "beta", "g", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",), or ("o", "state") with return_state."""
        return ("o", "state") if options.get("return_state") else ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype for o, float32 (float64) for the state."""
        if output == "o":
            return dtype
        return "float64" if dtype == "float64" else "float32"

    def problem(self, *tensors: torch.Tensor, **options: Any) -> DeltaProblem:
        """Check the call; q, k (B, H, N, D), v (B, H, N, E), beta (B, H, N), g (B, H, N[, D]) or None.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        if len(tensors) == len(self.inputs) - 1:
            tensors = (*tensors, cast("torch.Tensor", None))
        call = checked_state_call(self.name, tensors, self.inputs, options.get("cu_seqlens"))
        beta, g = tensors[3], cast("torch.Tensor | None", tensors[4])
        checked_gate("beta", beta, call, wide=False, decay=False)
        if g is not None:
            checked_gate("g", g, call)
        initial = options.get("initial_state")
        checked_state("initial_state", initial, call, (call.k.shape[-1], call.v.shape[-1]))
        bad = call.bad_writes | ~beta.isfinite()
        if g is not None:
            wrong = g.isnan() | (g == torch.inf)
            bad = bad | (wrong if wrong.dim() == 3 else wrong.any(-1))
            g = g.masked_fill(wrong, 0.0)
        sequences = call.sequences
        poor = torch.zeros(len(sequences), call.q.shape[1], dtype=torch.bool)
        if initial is not None:
            poor = ~initial.isfinite().flatten(2).all(-1)
        closed = call.bad_queries | sequences.closed(bad) | sequences.rows_of_states(poor)
        states = sequences.closed_states(bad) | poor
        return DeltaProblem(
            q=finite(call.q),
            k=finite(call.k),
            v=finite(call.v),
            beta=finite(beta),
            g=g,
            initial_state=None if initial is None else finite(initial),
            scale=number("scale", options["scale"]),
            sequences=sequences,
            with_state=flag("return_state", options.get("return_state", False)),
            closed_rows=closed,
            closed_states=states,
            spoiled=bool(closed.any() | states.any()),
            rows=sampled_rows(sequences.length, sequences.segments),
        )


DELTA = DeltaFamily()
