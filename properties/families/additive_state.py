"""Problems of the families whose state only adds: linear, gated linear and RWKV-6 attention, and RetNet.

The formulas are those of :mod:`attnproof.properties.families.state_blocks`; what is here turns a call into
blocks, sequence by sequence, and blocks into outputs, gradients and budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.additive_state import ComputedErrors
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.stored import sampled_budget, stored_budget, with_leaks
from attnproof.properties.contract import Contract
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask
from attnproof.properties.families.sequences import Sequences, StateCall, state_dtype
from attnproof.properties.families.state_blocks import Operands, StateGradients, Writes
from attnproof.properties.families.state_layout import (
    Layout,
    block_length,
    sampled_rows,
    scattered,
    unknown,
    unsampled,
)
from attnproof.properties.families.state_runs import StateRuns, absolute_sizes

__all__ = ["AdditiveStateFamily", "AdditiveStateProblem"]


@dataclass(frozen=True, eq=False)
class AdditiveStateProblem(Problem):
    """Finite inputs of one call.

    Attributes:
        q, k: (B, H, N, D); v: (B, H, N, E); non-finite entries are 0.
        g: (B, H, N, W) log decays, 0 where ``resets`` (bool, that shape) holds; None where all decays are 1.
        initial_state: (S, H, F, E) or None; u: (H, D) or None.
        sequences: where the sequences lie.
        closed: bool (B, H, N), rows that see a non-finite input; closed_states: bool (S, H).
        bad: whether some input is not finite.
        rows: int64, the positions of long calls that are judged; None where all are.
        returned: names of the outputs; given: names of the inputs that have a gradient.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    resets: torch.Tensor
    initial_state: torch.Tensor | None
    u: torch.Tensor | None
    scale: float
    sequences: Sequences
    closed: torch.Tensor
    closed_states: torch.Tensor
    bad: bool
    rows: torch.Tensor | None
    gate_shape: tuple[int, ...] | None
    returned: tuple[str, ...]
    given: tuple[str, ...]

    row_shape = (1,)
    read: ClassVar[str] = "o"
    """The name of what positions read."""

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What is read, and the final states where they are returned."""
        return self.returned

    @property
    def differentiated(self) -> tuple[str, ...]:  # type: ignore[override]
        """The inputs of this call that have a gradient; none of a long call, which is judged forward only."""
        return self.given if self.rows is None else ()

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of q, k and v."""
        return self.q.dtype

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite; a log decay of −∞ is finite."""
        return self.bad

    def row_axes(self, output: str) -> int:
        """All axes but the last."""
        return len(self.shape(output)) - 1

    def input_dtype(self, name: str) -> torch.dtype:
        """Gates and states may be float32 beside half-precision inputs."""
        dtype: torch.dtype = getattr(self, name).dtype
        return dtype

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input, as it was given."""
        if name == "g":
            assert self.gate_shape is not None
            return self.gate_shape
        return tuple(getattr(self, name).shape)

    @property
    def causal(self) -> bool:
        """Whether a position reads only what is written up to it."""
        return True

    @property
    def constant(self) -> bool:
        """Whether decays are powers of a constant rather than exponentials of gates."""
        return False

    @property
    def features(self) -> int:
        """F, the width of the state's rows."""
        return self.q.shape[3]

    def shape(self, output: str) -> tuple[int, ...]:
        """O (B, H, N, E), state (S, H, F, E), z (S, H, F)."""
        if output == self.read:
            return (*self.q.shape[:3], self.v.shape[3])
        states = (len(self.sequences), self.q.shape[1], self.features)
        return states if output == "z" else (*states, self.v.shape[3])

    # What a family may say otherwise.

    def mapped(self, a: Arithmetic[V], x: V) -> V:
        """The feature map, (…, D) to (…, F)."""
        return x

    def log_decays(self, a: Arithmetic[V], g: torch.Tensor) -> V:
        """The gates (B, H, C, n, W) of positions whose ``g`` has that shape."""
        return a.exact(g)

    def widened(self, r: Roundings, power: int) -> AdditiveStateProblem:
        """The problem with computed operands and gates as large as a kernel may have them.

        ``power`` 1 is for sums of absolute values with all errors, 2 for sums of squares.
        """
        return self

    def computed(self, r: Roundings) -> ComputedErrors:
        """What a kernel adds to the errors of a term by computing operands that are no inputs."""
        return ComputedErrors()

    def healthy(self, r: Roundings) -> Roundings:
        """The roundings that healthy kernels make use of, for probable errors; certain ones are of ``r``."""
        return r

    def value_sizes(self) -> torch.Tensor:
        """The largest numbers that meet rounded weights in place of v, float64 (B, H, N, E)."""
        return self.v.double().abs()

    def underflow_factor(self, gradient: str) -> float:
        """By how much more than the largest q, k and v a gradient may magnify what underflows."""
        return 1.0

    # Parts: the whole batch, or one packed sequence.

    def parts(self) -> list[int | None]:
        """Sequences that are taken one by one, or None for the whole batch."""
        return list(range(len(self.sequences))) if self.sequences.packed else [None]

    def part_of(self, part: int | None, tensor: torch.Tensor) -> torch.Tensor:
        """(B, H, N, X) of one part."""
        return tensor if part is None else self.sequences.part(part, tensor)

    def layout(self, part: int | None) -> Layout:
        """The blocks of one part."""
        length = self.q.shape[2]
        start, stop = (0, length) if part is None else self.sequences.segments[part][1:]
        if self.rows is None:
            return Layout.whole(stop - start, block_length(stop - start, self.resets.shape[-1]))
        return Layout.sampled(stop - start, self.rows[(self.rows >= start) & (self.rows < stop)] - start)

    def cut(self, part: int | None, tensor: torch.Tensor, *, far: bool = False) -> torch.Tensor:
        """(B, H, N, X) in blocks of reads, or with ``far`` of writes, (B, H, C, n, X), of one part."""
        return self.layout(part).cut(self.part_of(part, tensor), far=far)

    def real(self, part: int | None, *, far: bool = False) -> torch.Tensor:
        """Positions that are not after the end of their block, bool (B, H, C, n, 1)."""
        return self.cut(part, torch.ones_like(self.q[..., :1], dtype=torch.bool), far=far)

    def states_of(self, part: int | None, states: torch.Tensor) -> torch.Tensor:
        """The states (S, H, …) of one part."""
        return states if part is None else states[part : part + 1]

    def operands(self, a: Arithmetic[V], part: int | None) -> Operands[V]:
        """What the recurrence works on."""
        count = (self.q.shape[0] if part is None else 1, self.q.shape[1], self.features, self.v.shape[3])
        initial, near = self.initial_state, self._writes(a, part, far=False)
        return Operands(
            q=self._mapped_blocks(a, part, self.q, far=False),
            near=near,
            far=near if self.rows is None else self._writes(a, part, far=True),
            initial=a.exact(torch.zeros(count) if initial is None else self.states_of(part, initial)),
            bonus=None if self.u is None else a.exact(self.u),
            chosen=self.layout(part).chosen,
            causal=self.causal,
        )

    def _mapped_blocks(self, a: Arithmetic[V], part: int | None, x: torch.Tensor, *, far: bool) -> V:
        """φ(x) in blocks, 0 after their ends."""
        return a.masked(self.mapped(a, a.exact(self.cut(part, x, far=far))), self.real(part, far=far))

    def _writes(self, a: Arithmetic[V], part: int | None, *, far: bool) -> Writes[V]:
        """Keys, values and gates in blocks."""
        gates = None
        if self.g is not None:
            # Nothing decays after the end: the final state is that of the last position.
            gates = a.masked(self.log_decays(a, self.cut(part, self.g, far=far)), self.real(part, far=far))
        return Writes(
            k=self._mapped_blocks(a, part, self.k, far=far),
            v=a.exact(self.cut(part, self.v, far=far)),
            gates=gates,
            resets=self.cut(part, self.resets, far=far),
        )

    def rows_joined(self, a: Arithmetic[V], parts: list[V]) -> V:
        """(B, H, R, m, X) of every part as (B, H, N, X), 0 in rows that are not judged."""
        length, joined = self.q.shape[2], None
        rows = torch.arange(length) if self.rows is None else self.rows
        for part, x in zip(self.parts(), parts, strict=True):
            batch, heads, count, size, width = a.shape(x)
            x = a.reshape(x, (batch, heads, count * size, width))
            start, stop = (0, length) if part is None else self.sequences.segments[part][1:]
            if self.rows is None and (start, stop, count * size) == (0, length, length):
                return x
            mine = torch.where((rows >= start) & (rows < stop), rows - start, -2)
            x = a.matmul(a.exact(self.layout(part).picked(mine)), x)
            joined = x if joined is None else a.add(joined, x)
        assert joined is not None
        return scattered(a, joined, self.rows, length)

    def states_joined(self, a: Arithmetic[V], parts: list[V]) -> V:
        """(1, H, …) of every part as (S, H, …)."""
        if len(parts) == 1:
            return parts[0]
        joined = None
        for s, x in enumerate(parts):
            here = torch.zeros(len(parts), *(1,) * (len(a.shape(x)) - 1))
            here[s] = 1.0
            x = a.mul(a.exact(here), x)
            joined = x if joined is None else a.add(joined, x)
        assert joined is not None
        return joined

    # The definition.

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """O and the final states; with ``gauges`` lower bounds of Σ|q||k|e^Δ|v|, channel by channel."""
        a = arithmetic
        blocks = [self.operands(a, part).blocks(a) for part in self.parts()]
        reads = self.rows_joined(a, [a.scaled(x.reads(), self.scale) for x in blocks])
        result = self.results(
            a, unknown(a, reads, self.rows), self.states_joined(a, [x.final for x in blocks])
        )
        if gauges:
            for name, size in zip((self.read, "state"), absolute_sizes(self), strict=True):
                if name in self.outputs:
                    result[f"gauge:{name}"] = a.exact(size.nan_to_num(0.0, 0.0))
        return result

    def results(self, a: Arithmetic[V], reads: V, final: V) -> dict[str, V]:
        """The outputs by name, of what is read (scaled) and the final states."""
        return {self.read: reads} | ({"state": final} if "state" in self.outputs else {})

    def pulled(self, a: Arithmetic[V], x: V, gradient: V, power: int = 0) -> V:
        """The gradient by x of a gradient by the mapped x.

        ``power`` 1 or 2 says that ``gradient`` holds sums of absolute values or of squares.
        """
        return gradient

    def asked(
        self, a: Arithmetic[V], part: int | None, cotangents: Mapping[str, torch.Tensor]
    ) -> list[tuple[AdditiveStateProblem, V, V]]:
        """Recurrences of one part with the cotangents of their reads (B, H, C, n, E) and final states."""
        do = cotangents.get(self.read, torch.zeros(self.shape(self.read)))
        dfinal = cotangents.get("state", torch.zeros(self.shape("state")))
        reads = a.scaled(a.exact(self.cut(part, do)), self.scale)
        return [(self, reads, a.exact(self.states_of(part, dfinal)))]

    def asked_estimates(
        self, r: Roundings, cotangents: Mapping[str, torch.Tensor]
    ) -> list[tuple[AdditiveStateProblem, Estimate, torch.Tensor]]:
        """The same for all parts, reads' cotangents with the errors that a kernel makes in them."""
        do = cotangents.get(self.read, torch.zeros(self.shape(self.read))).double() * self.scale
        return [(self, Estimate(do), cotangents.get("state", torch.zeros(self.shape("state"))).double())]

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ outputs·cotangents by the inputs that have one."""
        a, found = arithmetic, []
        for part in self.parts():
            pieces = []
            for problem, do, dfinal in self.asked(a, part, cotangents):
                pieces.append(problem.operands(a, part).blocks(a).gradients(do, dfinal))
            found.append(pieces)
        return self.gathered(a, found)

    def gathered(
        self, a: Arithmetic[V], found: list[list[StateGradients[V]]], power: int = 0
    ) -> dict[str, V]:
        """Gradients by the inputs, of those by the operands of each part and recurrence."""

        def total(pieces: Iterable[V | None]) -> V:
            return reduce(a.add, (x for x in pieces if x is not None))

        result = {}
        for name, x in (("q", self.q), ("k", self.k)):
            gradients = []
            for part, pieces in zip(self.parts(), found, strict=True):
                mapped = total(getattr(piece, name) for piece in pieces)
                gradients.append(self.pulled(a, a.exact(self.cut(part, x)), mapped, power))
            result[f"d{name}"] = self.rows_joined(a, gradients)
        result["dv"] = self.rows_joined(a, [pieces[0].v for pieces in found])
        if "g" in self.given:
            gates = self.rows_joined(a, [total(piece.gates for piece in pieces) for pieces in found])
            result["dg"] = a.reshape(a.masked(gates, ~self.resets), self.input_shape("g"))
        if "u" in self.given:
            result["du"] = total(piece.bonus for pieces in found for piece in pieces)
        if "initial_state" in self.given:
            result["dinitial_state"] = self.states_joined(a, [pieces[0].initial for pieces in found])
        return result

    # One unit.

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
        """Σ|q||k|e^Δ|v|, channel by channel; of o, scaled, and ∞ in rows that are not judged."""
        bound = reference.get(f"gauge:{output}", reference[output])
        gauge = (bound.value.abs() - bound.radius).clamp(min=0.0)
        return gauge if output != self.read else torch.where(self.unjudged(), torch.inf, gauge)

    def unjudged(self) -> torch.Tensor:
        """Positions of long calls that are not judged, bool, broadcastable to what is read."""
        return unsampled(self.rows, self.q.shape[2])

    def closed_elements(self, output: str) -> torch.Tensor:
        """Elements of an output that see a non-finite input."""
        return broadcast_mask(self.closed if output == self.read else self.closed_states, self.shape(output))

    def estimates(self, r: Roundings) -> dict[str, Estimate]:
        """What a kernel with roundings ``r`` may make of the outputs, before they are stored."""
        reads, final = StateRuns(self, r).forward()
        return self.results(Propagation(r), reads, final)

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """Budgets by the rules of :mod:`attnproof.properties.budgets.additive_state`, stored once."""
        dtype = dtype_name(self.dtype)
        precision = contract.precision.resolved(dtype)
        # A final state is stored in its own dtype, once more.
        held = replace(contract, precision=replace(precision, output=str(precision.state)))
        budgets = {}
        for name, estimate in self.estimates(Roundings.of(contract, dtype)).items():
            exact, closed = reference[name].value, self.closed_elements(name)
            if name == self.read:
                budget = sampled_budget(estimate, exact, contract, dtype, closed, self.unjudged())
                tainted = self.sequences.rows_of_states(self.closed_states)
                budgets[name] = with_leaks(budget, contract, broadcast_mask(tainted, self.shape(name)))
            else:
                wide = dtype_name(state_dtype(self.dtype))
                budgets[name] = stored_budget(estimate, exact, held, wide, closed)
        return budgets

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """The gradients' errors by the same rules."""
        return StateRuns(self, Roundings.of(contract, dtype_name(self.dtype))).backward(cotangents)

    def feature_error(self, r: Roundings) -> float:
        """Relative error of one feature of a query or key as a kernel computes it; 0 for the input itself."""
        return 0.0

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zeros would pass, or in every row the mean of the values seen so far."""
        budget, o = budgets[self.read], reference[self.read].value
        judged = ~budget.open
        if not judged.any():
            return ["accuracy: nothing to judge"]
        means = []
        for part in range(len(self.sequences)):
            v = self.sequences.part(part, self.v).double()
            counts = torch.arange(1, v.shape[2] + 1, dtype=torch.float64)[:, None]
            means.append(v.cumsum(2) / counts)
        mean = self.sequences.joined(means, self.v.double()).reshape(o.shape)
        return [
            f"accuracy: {what} is within the budget of every element"
            for other, what in ((torch.zeros_like(o), "zero"), (mean, "the mean of the values so far"))
            if bool((((o - other).abs() <= budget.certain) | ~judged).all())
        ]

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Which position of which sequence, or which row of which state."""
        if output != self.read:
            s, head, *rest = row
            of = f", key channel {rest[0]}" if rest else ""
            start, stop = self.sequences.segments[s][1:]
            return f"the final {output} of sequence {s} ({stop - start} positions), head {head}{of}"
        b, head, i = row
        for s, (batch, start, stop) in enumerate(self.sequences.segments):
            if batch == b and start <= i < stop:
                which = f" of packed sequence {s}" if self.sequences.packed else ""
                where = f"row (batch {b}, head {head}, position {i - start}{which})"
                return f"{where} reads {i - start + 1} of {stop - start} positions"
        return f"row (batch {b}, head {head}, position {i})"


class AdditiveStateFamily(Family):
    """What the families have in common as calls."""

    sequence: tuple[str, ...] = ("q", "k", "v", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",) or, with ``return_state``, ("o", "state")."""
        return ("o", "state") if options.get("return_state", False) else ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype for o; states are float32, float64 for float64."""
        return dtype if output == "o" or dtype == "float64" else "float32"

    def fields(
        self,
        call: StateCall,
        options: Mapping[str, Any],
        *,
        gate: torch.Tensor | None = None,
        bonus: torch.Tensor | None = None,
        initial: torch.Tensor | None = None,
        causal: bool = True,
    ) -> dict[str, Any]:
        """The fields of an :class:`AdditiveStateProblem` of checked tensors.

        ``gate`` is (B, H, N, W) with −∞ and non-finite entries, or None.
        """
        sequences, writes = call.sequences, call.bad_writes
        resets = torch.zeros(*call.rows, 1, dtype=torch.bool)
        if gate is not None:
            resets = gate == -torch.inf
            writes = writes | (~gate.isfinite() & ~resets).any(-1)
        states = sequences.closed_states(writes)
        rows = sequences.closed(writes, causal=causal) | call.bad_queries
        if initial is not None:
            wrong = ~initial.isfinite().flatten(2).all(-1)
            states, rows = states | wrong, rows | sequences.rows_of_states(wrong)
        if bonus is not None:
            rows = rows | ~bonus.isfinite().all(-1)[None, :, None]
        return {
            "q": finite(call.q),
            "k": finite(call.k),
            "v": finite(call.v),
            "g": None if gate is None else finite(gate),
            "resets": resets,
            "initial_state": None if initial is None else finite(initial),
            "u": None if bonus is None else finite(bonus),
            "sequences": sequences,
            "closed": rows,
            "closed_states": states,
            "bad": bool(rows.any() | states.any()),
            "rows": sampled_rows(sequences.length, sequences.segments),
            "returned": self.problem_outputs(options),
        }
