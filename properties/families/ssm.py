"""Linear time-invariant state spaces (S4D), discrete: x_t = a x_{t−1} + b u_t, y_t = Re Σ_s c_s x_ts + d u_t.

Gu, Gupta, Goel and Ré, arXiv 2206.11893; theory S4-1. The definition here is the convolution with the kernel
K_i = Re Σ_s c_s a_sⁱ b_s, with the responses of the initial and of the final state:

    y_t = Σ_{s≤t} K_{t−s} u_s + Re Σ c a^(t+1) x_0 + d u_t,     x_N = Σ_s a^(N−1−s) b u_s + a^N x_0

and the gradients of Σ y·dy + Σ x_N·F are, besides those of :mod:`state_kernel`,

    dK_i = Σ_t dy_t u_{t−i},   du_s = Σ_{t≥s} K_{t−s} dy_t + Re Σ conj(F) a^(N−1−s) b + d dy_s,
    dx_0 = conj(c) Σ_t conj(a^(t+1)) dy_t + conj(a^N) F.

Of more than ``LONGEST`` positions a sample is judged, forward only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.ssm import with_fourier
from attnproof.properties.budgets.stored import sampled_budget, stored_budget, with_leaks
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask
from attnproof.properties.families.sequences import Sequences, checked_vector, flag, state_dtype
from attnproof.properties.families.ssm_response import Operands, Response
from attnproof.properties.families.ssm_runs import SSMRuns
from attnproof.properties.families.state_kernel import Modes, joined
from attnproof.properties.families.state_layout import sampled_rows, scattered, unknown, unsampled

__all__ = ["SSM", "SSMProblem", "checked_modes", "modes_not_finite"]


@dataclass(frozen=True, eq=False)
class SSMProblem(Problem):
    """Finite inputs of one call.

    Attributes:
        u: (B, H, N); modes: a, b, c; d: (H) or None; initial_state: (S, H, D) or (S, H, D, 2), or None.
        sequences: where the sequences lie.
        closed: bool (B, H, N), rows that see a non-finite input; closed_states: bool (S, H).
        bad: whether some input is not finite.
        rows: int64, the positions of long calls that are judged; None where all are.
        returned: names of the outputs; given: names of the inputs that have a gradient.
    """

    u: torch.Tensor
    modes: Modes
    d: torch.Tensor | None
    initial_state: torch.Tensor | None
    sequences: Sequences
    closed: torch.Tensor
    closed_states: torch.Tensor
    bad: bool
    rows: torch.Tensor | None
    returned: tuple[str, ...]
    given: tuple[str, ...]

    row_shape = (1,)

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """y, and the final state where it is returned."""
        return self.returned

    @property
    def differentiated(self) -> tuple[str, ...]:  # type: ignore[override]
        """The inputs of this call that have a gradient; none of a long call, which is judged forward only."""
        return self.given if self.rows is None else ()

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the call's tensors."""
        return self.u.dtype

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite."""
        return self.bad

    def _input(self, name: str) -> torch.Tensor:
        found = getattr(self.modes if name in ("a", "b", "c") else self, name)
        assert isinstance(found, torch.Tensor)
        return found

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input."""
        return tuple(self._input(name).shape)

    def input_dtype(self, name: str) -> torch.dtype:
        """States are float32 beside half-precision inputs."""
        return self._input(name).dtype

    def row_axes(self, output: str) -> int:
        """All axes but the last."""
        return len(self.shape(output)) - 1

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, N), and of a state (S, H, D) or (S, H, D, 2)."""
        if output == "y":
            return tuple(self.u.shape)
        return (len(self.sequences), *self.modes.a.shape)

    def parts(self) -> list[int | None]:
        """Packed sequences that are taken one by one, or None for the whole batch."""
        return list(range(len(self.sequences))) if self.sequences.packed else [None]

    def operands(self, part: int | None) -> Operands:
        """What the recurrence of one part works on."""
        u = self.u if part is None else self.sequences.part(part, self.u)
        start = 0 if part is None else self.sequences.segments[part][1]
        rows = torch.arange(u.shape[2])
        if self.rows is not None:
            rows = self.rows[(self.rows >= start) & (self.rows < start + u.shape[2])] - start
        return Operands(self.modes, u, self.d, self.part_of_states(part, self.initial_state), rows)

    def part_of_states(self, part: int | None, states: torch.Tensor | None) -> torch.Tensor | None:
        """The states (S, …) of one part."""
        return states if part is None or states is None else states[part : part + 1]

    def part_of_rows(self, part: int | None, x: torch.Tensor) -> torch.Tensor:
        """(B, H, N) of one part."""
        return x if part is None else self.sequences.part(part, x)

    def placed(self, a: Arithmetic[V], parts: list[V]) -> V:
        """What the judged rows of every part read, as (B, H, N); 0 elsewhere."""
        y = joined(parts, -1)
        shape = a.shape(y)
        wide = scattered(a, a.reshape(y, (*shape, 1)), self.rows, self.u.shape[2])
        return a.reshape(wide, tuple(self.u.shape))

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """y and the final states; with ``gauges`` lower bounds of Σ|c||a|ⁱ|b||u|."""
        a = arithmetic
        found = [Response(a, self.operands(part)) for part in self.parts()]
        y = self.placed(a, [x.reads() for x in found])
        y = a.reshape(unknown(a, a.reshape(y, (*self.u.shape, 1)), self.rows), tuple(self.u.shape))
        result = {"y": y}
        if "state" in self.outputs:
            result["state"] = joined([self.modes.stacked(a, x.final()) for x in found], 0)
        if gauges:
            sizes = SSMRuns(self).absolute_sizes()
            result |= {f"gauge:{name}": a.exact(sizes[name]) for name in self.outputs}
        return result

    def cotangents(
        self, part: int | None, given: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cotangents of the reads, zeros if not given, and of the final states of one part."""
        dy = given.get("y", torch.zeros(self.u.shape, dtype=torch.float64))
        return self.part_of_rows(part, dy), self.part_of_states(part, given.get("state"))

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients by the formulas above."""
        found = [
            Response(arithmetic, self.operands(part)).gradients(*self.cotangents(part, cotangents))
            for part in self.parts()
        ]
        return self.gathered(arithmetic, found)

    def gathered(self, a: Arithmetic[V], found: list[dict[str, V]]) -> dict[str, V]:
        """Gradients of every part as those of the call: rows side by side, parameters summed."""
        result = {}
        for name in self.given:
            parts = [x[f"d{name}"] for x in found]
            if name == "u":
                result["du"] = joined(parts, -1)
            elif name == "initial_state":
                result["dinitial_state"] = joined(parts, 0)
            else:
                shape = self.input_shape(name)
                wide = joined([a.reshape(x, (*shape, 1)) for x in parts], -1)
                result[f"d{name}"] = a.reshape(a.sum(wide), shape)
        return result

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """The whole problem, which is one unit."""
        return [(self, torch.zeros(1, dtype=torch.int64))]

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """No output is a limit that the formulas leave out."""
        return {}

    def undetermined(self) -> torch.Tensor:
        """Nothing: what sees a non-finite input is closed element by element, in the budgets."""
        return torch.zeros(1, dtype=torch.bool)

    @property
    def left(self) -> torch.Tensor:
        """Positions that are not judged, bool (N,)."""
        return unsampled(self.rows, self.u.shape[2])[:, 0]

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """Σ|c||a|ⁱ|b||u|, ∞ in rows that are not judged; of a state the same without c."""
        bound = reference.get(f"gauge:{output}", reference[output])
        gauge = (bound.value.abs() - bound.radius).clamp(min=0.0)
        return torch.where(self.left, torch.inf, gauge) if output == "y" else gauge

    def closed_elements(self, output: str) -> torch.Tensor:
        """Elements of an output that see a non-finite input."""
        return broadcast_mask(self.closed if output == "y" else self.closed_states, self.shape(output))

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """See :mod:`attnproof.properties.budgets.ssm`."""
        dtype = dtype_name(self.dtype)
        r = Roundings.of(contract, dtype)
        precision = contract.precision.resolved(dtype)
        held = replace(contract, precision=replace(precision, output=str(precision.state)))
        runs = SSMRuns(self)
        found, budgets = runs.outputs(r), {}
        if contract.causality == "budget":
            found["y"] = with_fourier(found["y"], runs.fourier_sizes(), r)
        for name, estimate in found.items():
            exact, closed = reference[name].value, self.closed_elements(name)
            if name == "y":
                left = self.left.expand(exact.shape)
                budget = sampled_budget(estimate, exact, contract, dtype, closed, left)
                # A sequence and head with a row that sees a non-finite input, whatever it is.
                tainted = self.sequences.rows_of_states(self.sequences.closed_states(self.closed))
                budgets[name] = with_leaks(budget, contract, tainted)
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
        r = Roundings.of(contract, dtype_name(self.dtype))
        return SSMRuns(self).gradients(r, cotangents, fourier=contract.causality == "budget")

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zeros would pass, or d u alone."""
        budget, y = budgets["y"], reference["y"].value
        judged = ~budget.open
        if not bool(judged.any()):
            return ["accuracy: nothing to judge"]
        skipped = torch.zeros_like(y) if self.d is None else self.d.double()[:, None] * self.u.double()
        return [
            f"accuracy: {what} is within the budget of every element"
            for other, what in ((torch.zeros_like(y), "zero"), (skipped, "the skip term d·u alone"))
            if bool((((y - other).abs() <= budget.certain) | ~judged).all())
        ]

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Which sequence and head, and how slowly its slowest mode decays."""
        head = row[1]
        a = self.modes.a[head].double()
        size = a.square().sum(-1).sqrt() if self.modes.complex else a.abs()
        slowest = f"{float(size.max()):.6g}" if size.numel() else "none"
        what = "y" if output == "y" else f"the final {output}"
        return f"{what} of sequence {row[0]}, head {head}: {size.numel()} modes, largest |a| {slowest}"


def checked_modes(family: str, tensors: tuple[Any, ...], heads: int, dtype: torch.dtype) -> Modes:
    """a, b, c of a call, with non-finite entries as they are.

    Raises:
        ContractError: they are not of one shape (H, D) or (H, D, 2) and of the call's dtype.
    """
    a = tensors[0]
    shape = tuple(a.shape) if isinstance(a, torch.Tensor) else ()
    if len(shape) not in (2, 3) or shape[0] != heads or (len(shape) == 3 and shape[2] != 2):
        raise ContractError(
            f"a has shape {shape}; {family} asks for ({heads}, D), or ({heads}, D, 2) pairs of real and "
            "imaginary parts"
        )
    for name, x in zip("abc", tensors, strict=True):
        checked_vector(name, x, shape, dtype)
    return Modes(*tensors)


def modes_not_finite(x: torch.Tensor) -> torch.Tensor:
    """Heads with a NaN or infinity in a parameter (H, …), bool (H,)."""
    return ~x.isfinite().flatten(1).all(-1)


class SSMFamily(Family):
    """``ssm``: f(u, a, b, c, d=None, *, initial_state=None, cu_seqlens=None, return_state=False)."""

    name = "ssm"
    inputs = ("u", "a", "b", "c", "d")
    required = ()
    options = ("initial_state", "cu_seqlens", "return_state")
    sequence = ("u", "y")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("y",) or, with ``return_state``, ("y", "state")."""
        return ("y", "state") if options.get("return_state", False) else ("y",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype for y; states are float32, float64 for float64."""
        return dtype if output == "y" or dtype == "float64" else "float32"

    def problem(self, *tensors: torch.Tensor, **options: Any) -> SSMProblem:
        """Check the call.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        if len(tensors) not in (4, 5):
            raise ContractError(f"ssm takes 4 or 5 tensors {', '.join(self.inputs)}; got {len(tensors)}")
        u, d = tensors[0], tensors[4] if len(tensors) == 5 else None
        if not isinstance(u, torch.Tensor) or u.dim() != 3:
            got = f"shape {tuple(u.shape)}" if isinstance(u, torch.Tensor) else type(u).__name__
            raise ContractError(f"u has {got}; ssm asks for 3 axes (batch, heads, length)")
        dtype_name(u.dtype, "u")
        batch, heads, length = u.shape
        modes = checked_modes(self.name, tensors[1:4], heads, u.dtype)
        sequences = Sequences.of(batch, length, options.get("cu_seqlens"))
        initial = options.get("initial_state")
        if d is not None:
            checked_vector("d", d, (heads,), u.dtype)
        if initial is not None:
            shape = (len(sequences), *modes.a.shape)
            checked_vector("initial_state", initial, shape, state_dtype(u.dtype))
        flag("return_state", options.get("return_state", False))
        wrong = modes_not_finite(modes.a) | modes_not_finite(modes.b)
        states = sequences.closed_states(~u.isfinite()) | wrong
        rows = sequences.closed(~u.isfinite())
        if initial is not None:
            before = ~initial.isfinite().flatten(2).all(-1)
            states, rows = states | before, rows | sequences.rows_of_states(before)
        wrong = wrong | modes_not_finite(modes.c)
        if d is not None:
            wrong = wrong | ~d.isfinite()
        rows = rows | wrong[:, None]
        optional = (("d", d), ("initial_state", initial))
        return SSMProblem(
            u=finite(u),
            modes=Modes(*(finite(x) for x in (modes.a, modes.b, modes.c))),
            d=None if d is None else finite(d),
            initial_state=None if initial is None else finite(initial),
            sequences=sequences,
            closed=rows,
            closed_states=states,
            bad=bool(wrong.any() | rows.any() | states.any()),
            rows=sampled_rows(length, sequences.segments),
            returned=self.problem_outputs(options),
            given=("u", "a", "b", "c", *(name for name, x in optional if x is not None)),
        )


SSM = SSMFamily()
