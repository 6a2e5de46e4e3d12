"""State spaces whose operands a call computes: step sizes, their products with inputs and decays, skips.

The recurrence is that of :mod:`attnproof.properties.families.state_blocks` with q = C, k and v from B and the
input, and log decays δ A; what it reads is y before the skip D x and the gate silu(z):

    y = (reads + D x) · silu(z),   d(reads) = dy silu(z),   dz = dy (reads + D x) silu'(z)

with silu(z) = z σ(z) and silu'(z) = σ(z) + z σ'(z). Each family chains the gradients of the recurrence's
operands to its inputs. Everything is evaluated from the inputs over the abstract arithmetic; the operands
that :class:`AdditiveStateProblem` holds as tensors are float64 approximations, from which only sizes of
errors are computed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.additive_state import AdditiveStateFamily, AdditiveStateProblem
from attnproof.properties.families.gradients import reduced
from attnproof.properties.families.sequences import StateCall
from attnproof.properties.families.state_blocks import StateGradients
from attnproof.properties.families.state_runs import StateRuns, absolute_sizes

__all__ = [
    "DiscretisedFamily",
    "DiscretisedProblem",
    "checked_shapes",
    "grouped",
    "silu",
    "silu_slope",
    "spread_over",
]


def silu(a: Arithmetic[V], z: V) -> V:
    """Z σ(z)."""
    return a.mul(z, a.sigmoid(z))


def silu_slope(a: Arithmetic[V], z: V) -> V:
    """σ(z) + z σ'(z)."""
    return a.add(a.sigmoid(z), a.mul(z, a.sigmoid_slope(z)))


def spread_over(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, G, N, D) of groups as (B, H, N, D): head h reads group h // (H/G)."""
    batch, groups, length, width = x.shape
    each = x[:, :, None].expand(batch, groups, heads // groups, length, width)
    return each.reshape(batch, heads, length, width)


def grouped(a: Arithmetic[V], x: V, groups: int) -> V:
    """The transpose of :func:`spread_over`: sums over the heads of each group, (B, G, N, D)."""
    batch, heads, length, width = a.shape(x)
    split = a.reshape(x, (batch, groups, heads // groups, length, width))
    summed = a.sum(a.permute(split, (0, 1, 3, 4, 2)))
    return a.reshape(summed, (batch, groups, length, width))


@dataclass(frozen=True, eq=False)
class DiscretisedProblem(AdditiveStateProblem):
    """An :class:`AdditiveStateProblem` with computed operands.

    Attributes:
        inputs: the tensors of the call by name, non-finite entries 0.
        q: C for every head; k, v, g: float64 approximations of what the recurrence works on.
    """

    inputs: Mapping[str, torch.Tensor]

    read: ClassVar[str] = "y"
    driven: ClassVar[str]
    """The name of the input that drives the state and that the skip adds."""

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the call."""
        return self.inputs[self.driven].dtype

    def input_dtype(self, name: str) -> torch.dtype:
        """Step sizes, decays and states may be float32 beside half-precision inputs."""
        return self.inputs[name].dtype

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input as it was given, or of q, k, v and g, the recurrence's operands."""
        if name in self.inputs:
            return tuple(self.inputs[name].shape)
        tensor = getattr(self, name)
        assert isinstance(tensor, torch.Tensor)
        return tuple(tensor.shape)

    def _over_positions(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, H, N) or (B, H, N, E) as the latter."""
        return tensor if tensor.dim() == 4 else tensor[..., None]

    def _over_heads(self, name: str) -> torch.Tensor:
        """A tensor (H) of the call, to be multiplied with the output."""
        return self.inputs[name].reshape(1, -1, *(1,) * (len(self.shape(self.read)) - 2))

    # The skip and the gate.

    def results(self, a: Arithmetic[V], reads: V, final: V) -> dict[str, V]:
        """Y and the final states, of what is read."""
        y = self._ungated(a, reads)
        if "z" in self.inputs:
            y = a.mul(y, silu(a, a.exact(self.inputs["z"])))
        result = {self.read: y}
        return result | ({"state": a.reshape(final, self.shape("state"))} if "state" in self.outputs else {})

    def _ungated(self, a: Arithmetic[V], reads: V) -> V:
        """What is read, with the skip."""
        y = a.reshape(reads, self.shape(self.read))
        if "D" in self.inputs:
            y = a.add(y, a.mul(a.exact(self._over_heads("D")), a.exact(self.inputs[self.driven])))
        return y

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """Y and the final states; with ``gauges`` lower bounds of the sums of their terms' sizes."""
        result = super().evaluate(arithmetic)
        if gauges:
            reads, final = (x.nan_to_num(0.0, 0.0) for x in absolute_sizes(self))
            y = reads.reshape(self.shape(self.read))
            if "D" in self.inputs:
                y = y + (self._over_heads("D").double() * self.inputs[self.driven].double()).abs()
            if "z" in self.inputs:
                z = self.inputs["z"].double()
                # Rounded twice or thrice, which the certificate's own accuracy does not notice.
                y = y * (z * torch.sigmoid(z)).abs() * (1.0 - 2.0**-40)
            result[f"gauge:{self.read}"] = arithmetic.exact(y)
            if "state" in self.outputs:
                result["gauge:state"] = arithmetic.exact(final.reshape(self.shape("state")))
        return result

    def _cotangent(self, cotangents: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        """The cotangent of an output, 0 where none is given."""
        return cotangents.get(name, torch.zeros(self.shape(name)))

    def asked(
        self, a: Arithmetic[V], part: int | None, cotangents: Mapping[str, torch.Tensor]
    ) -> list[tuple[AdditiveStateProblem, V, V]]:
        """The recurrence of one part with the cotangents of its reads and final states."""
        do = a.exact(self.cut(part, self._over_positions(self._cotangent(cotangents, self.read))))
        if "z" in self.inputs:
            z = self.cut(part, self._over_positions(self.inputs["z"]))
            do = a.mul(do, silu(a, a.exact(z)))
        return [(self, do, a.exact(self.states_of(part, self._final(cotangents))))]

    def _final(self, cotangents: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The cotangent of the final states, (S, H, D, E)."""
        dfinal = self._cotangent(cotangents, "state")
        return dfinal.reshape(*dfinal.shape[:3], -1 if dfinal.numel() else self.v.shape[3])

    def asked_estimates(
        self, r: Roundings, cotangents: Mapping[str, torch.Tensor]
    ) -> list[tuple[AdditiveStateProblem, Estimate, torch.Tensor]]:
        """The same for all parts, reads' cotangents with the errors that a kernel makes in them."""
        do = self._gated(Propagation(r), cotangents)
        positions = Propagation(r).reshape(do, tuple(self.v.shape))
        return [(self, positions, self._final(cotangents).double())]

    def _gated(self, a: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]) -> V:
        """dy silu(z), of the output's shape."""
        do = a.exact(self._cotangent(cotangents, self.read))
        return a.mul(do, silu(a, a.exact(self.inputs["z"]))) if "z" in self.inputs else do

    # Gradients.

    @abstractmethod
    def gathered(
        self, a: Arithmetic[V], found: list[list[StateGradients[V]]], power: int = 0
    ) -> dict[str, V]:
        """Gradients by the inputs, the skip and the gate left out, and by the operands q, k and g."""

    @abstractmethod
    def chained_gates(self, g: torch.Tensor, power: int) -> dict[str, torch.Tensor]:
        """What errors of dg make of gradients, by their names.

        Args:
            g: float64 (B, H, N, W), bounds of the errors or, with ``power`` 2, their variances.
            power: of the factors that they are multiplied with.
        """

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ outputs·cotangents by the inputs that have one."""
        a = arithmetic
        found = super().differentiate(a, cotangents)

        def reads() -> V:
            return self.rows_joined(a, [self.operands(a, part).blocks(a).reads() for part in self.parts()])

        return self._with_skip(a, found, reads, cotangents)

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """The gradients' errors, with dg by its direct sum or by the closed form GLA-4."""
        r = Roundings.of(contract, dtype_name(self.dtype))
        runs = StateRuns(self, r)
        found = runs.backward(cotangents)
        closed = runs.closed_form(found, cotangents)
        more = self.chained_gates((closed.bound - found["dg"].bound).clamp(min=0.0), 1)
        wide = self.chained_gates((closed.spread - found["dg"].spread).clamp(min=0.0), 2)
        for name, excess in more.items():
            direct = found[name]
            found[name] = Estimate(
                direct.value, direct.bound + excess, direct.spread + wide[name], direct.lost
            )
        return self._with_skip(Propagation(r), found, lambda: runs.forward()[0], cotangents)

    def _with_skip(
        self,
        a: Arithmetic[V],
        found: dict[str, V],
        reads: Callable[[], V],
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, V]:
        """All gradients by the inputs, of those through the recurrence."""
        result, driven = dict(found), self.driven
        if "D" in self.inputs:
            do, x = self._gated(a, cotangents), a.exact(self.inputs[driven])
            through = a.mul(a.exact(self._over_heads("D")), do)
            result[f"d{driven}"] = a.add(a.reshape(found[f"d{driven}"], self.input_shape(driven)), through)
            result["dD"] = reduced(a, a.mul(do, x), tuple(self._over_heads("D").shape))
        if "z" in self.inputs:
            slope = silu_slope(a, a.exact(self.inputs["z"]))
            dy = a.exact(self._cotangent(cotangents, self.read))
            result["dz"] = a.mul(a.mul(dy, self._ungated(a, reads())), slope)
        return {f"d{name}": a.reshape(result[f"d{name}"], self.input_shape(name)) for name in self.given}


class DiscretisedFamily(AdditiveStateFamily):
    """What the families have in common as calls."""

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("y",) or, with ``return_state``, ("y", "state")."""
        return ("y", "state") if options.get("return_state", False) else ("y",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype for y; states are float32, float64 for float64."""
        return dtype if output == "y" or dtype == "float64" else "float32"

    def prepared(
        self,
        call: StateCall,
        options: Mapping[str, Any],
        gates: torch.Tensor,
        initial: torch.Tensor | None,
        bad: Mapping[str, torch.Tensor],
    ) -> dict[str, Any]:
        """The fields of the problem.

        Args:
            call: q, and approximations of k and v, finite; gates: of the gates, (B, H, N, W) float64.
            options: keywords of the call.
            initial: (S, H, D, E) as it was given, or None.
            bad: bool masks that say what holds a non-finite input: "writes" and "reads" (B, H, N), "heads"
                (H) of parameters that reach the state, and "skips" (H) of those that do not.
        """
        sequences = call.sequences
        fields = self.fields(call, options, gate=gates, initial=initial)
        writes = bad["writes"] | bad["heads"][None, :, None]
        closed = fields["closed"] | sequences.closed(writes) | bad["reads"] | bad["skips"][None, :, None]
        states = fields["closed_states"] | sequences.closed_states(writes) | bad["heads"]
        return fields | {
            "closed": closed,
            "closed_states": states,
            "bad": fields["bad"] or any(bool(mask.any()) for mask in bad.values()),
            "u": None,
            "scale": 1.0,
            "gate_shape": None,
        }


def checked_shapes(
    family: str, tensors: Mapping[str, Any], asked: Mapping[str, tuple[int, ...]], wide: tuple[str, ...] = ()
) -> None:
    """Tensors of the shapes that are asked, all of the first one's dtype.

    Args:
        family: for messages.
        tensors: by name; asked: their shapes; wide: those that may be float32 instead.

    Raises:
        ContractError: anything else, by the argument's name.
    """
    dtype = next(iter(tensors.values())).dtype
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ContractError(f"{name} has type {type(tensor).__name__}; {family} asks for a tensor")
        dtype_name(tensor.dtype, name)
        if tuple(tensor.shape) != asked[name]:
            raise ContractError(
                f"{name} has shape {tuple(tensor.shape)}; {family} asks for {asked[name]} beside the others"
            )
        if tensor.dtype != dtype and not (name in wide and tensor.dtype == torch.float32):
            also = " or float32" if name in wide else ""
            raise ContractError(f"{name} has dtype {tensor.dtype}; the contract asks for {dtype}{also}")
