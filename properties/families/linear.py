"""Linear attention: o_i = φ(q_i)ᵀ S_i, S_i = S_0 + Σ_{j≤i} φ(k_j) v_jᵀ, with or without a normaliser.

With ``normalize``, o_i is divided by φ(q_i)ᵀ z_i, z_i = z_0 + Σ_{j≤i} φ(k_j): the same recurrence with values
1, so that its gradients are those of two recurrences, with cotangents dO/den and −(dO·o)/den. Without
``causal`` every row reads the last state. Katharopoulos et al., arXiv 2006.16236; theory LIN-1, LIN-6, LIN-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.contract import ContractError
from attnproof.properties.families.additive_state import AdditiveStateFamily, AdditiveStateProblem
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.feature_maps import feature_error, feature_width, mapped, pulled
from attnproof.properties.families.sequences import checked_state, checked_state_call, flag
from attnproof.properties.families.state_blocks import StateGradients
from attnproof.properties.families.state_layout import unknown
from attnproof.properties.families.state_runs import StateRuns, absolute_sizes

__all__ = ["LINEAR", "LinearProblem"]

# A normaliser this small beside the sum of its terms' sizes is 0 to any kernel, and to float64.
_SINGULAR = 2.0**-45


@dataclass(frozen=True, eq=False)
class LinearProblem(AdditiveStateProblem):
    """An :class:`AdditiveStateProblem` without gates, with a feature map.

    Attributes:
        feature_map: its name.
        initial_z: (S, H, F) or None; normalize: whether o is divided by the normaliser.
        singular: bool (B, H, N, 1), rows whose normaliser is 0; forward_only: the call's ``causal``.
    """

    feature_map: str
    normalize: bool
    initial_z: torch.Tensor | None
    singular: torch.Tensor
    forward_only: bool

    @property
    def causal(self) -> bool:
        """Whether a position reads only what is written up to it."""
        return self.forward_only

    @property
    def features(self) -> int:
        """F."""
        return feature_width(self.feature_map, self.q.shape[3])

    def mapped(self, a: Arithmetic[V], x: V) -> V:
        """φ(x)."""
        return mapped(a, self.feature_map, x)

    def pulled(self, a: Arithmetic[V], x: V, gradient: V, power: int = 0) -> V:
        """The gradient by x of a gradient by φ(x)."""
        return pulled(a, self.feature_map, x, gradient, power)

    def feature_error(self, r: Roundings) -> float:
        """Relative error of a feature."""
        largest = max(
            (float(x.detach().double().abs().max()) for x in (self.q, self.k) if x.numel()), default=0.0
        )
        return feature_error(self.feature_map, largest, r.exp, r.elementwise)

    def normaliser(self) -> LinearProblem:
        """The recurrence of z: values 1, and no division."""
        z = self.initial_z
        return replace(
            self,
            v=torch.ones_like(self.v[..., :1]) if self.v.shape[3] else self.v.new_ones(*self.v.shape[:3], 1),
            initial_state=None if z is None else z[..., None],
            normalize=False,
            initial_z=None,
            returned=("o", "state"),
        )

    def _own(self) -> LinearProblem:
        """The recurrence of S, not divided."""
        return replace(self, normalize=False, returned=("o", "state"))

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """O, S and z; with ``gauges`` lower bounds of Σ|φ(q)||φ(k)||v|, divided like o."""
        a = arithmetic
        found = self.unnormalised(a)
        if self.normalize:
            below = self.normaliser().unnormalised(a)
            found["o"] = self._divided(a, found["o"], below["o"])
            found["z"] = a.reshape(below["state"], self.shape("z"))
        found["o"] = unknown(a, found["o"], self.rows)
        result = {name: found[name] for name in self.outputs}
        if gauges:
            for name, size in self._sizes().items():
                result[f"gauge:{name}"] = a.exact(size)
        return result

    def unnormalised(self, a: Arithmetic[V]) -> dict[str, V]:
        """What is read, and the final state."""
        blocks = [self.operands(a, part).blocks(a) for part in self.parts()]
        reads = self.rows_joined(a, [x.reads() for x in blocks])
        return {"o": reads, "state": self.states_joined(a, [x.final for x in blocks])}

    def _divided(self, a: Arithmetic[V], reads: V, below: V) -> V:
        """Reads over their normaliser, 0 where that is 0."""
        return a.div(a.masked(reads, ~self.singular), a.masked(below, ~self.singular, 1.0))

    def _sizes(self) -> dict[str, torch.Tensor]:
        """Lower bounds of the scales of accuracy."""
        reads, final = absolute_sizes(self._own())
        sizes = {"o": reads, "state": final}
        if self.normalize:
            a, normaliser = EnclosureArithmetic(), self.normaliser()
            below = a.enclosure(normaliser.unnormalised(a)["o"])
            largest = torch.where(self.singular, 1.0, below.value.abs() + below.radius)
            sizes["o"] = torch.where(self.singular, 0.0, reads / largest.clamp(min=1e-300))
            sizes["z"] = absolute_sizes(normaliser)[1][..., 0]
        return {name: sizes[name] for name in self.outputs}

    def asked(
        self, a: Arithmetic[V], part: int | None, cotangents: Mapping[str, torch.Tensor]
    ) -> list[tuple[AdditiveStateProblem, V, V]]:
        """The recurrences of S and z with their cotangents."""
        own = self._own()
        found = super().asked(a, part, cotangents)
        if not self.normalize:
            return found
        do, dfinal = found[0][1:]
        normaliser = self.normaliser()
        keep = ~self.cut(part, self.singular) & self.real(part)
        reads = own.operands(a, part).blocks(a).reads()
        below = a.masked(normaliser.operands(a, part).blocks(a).reads(), keep, 1.0)
        do = a.masked(a.div(do, below), keep)
        o = a.div(a.masked(reads, keep), below)
        dbelow = a.scaled(a.sum(a.mul(do, o)), -1.0)
        dz = cotangents.get("z", torch.zeros(self.shape("z")))
        return [
            (own, do, dfinal),
            (normaliser, dbelow, a.exact(self.states_of(part, dz)[..., None])),
        ]

    def asked_estimates(
        self, r: Roundings, cotangents: Mapping[str, torch.Tensor]
    ) -> list[tuple[AdditiveStateProblem, Estimate, torch.Tensor]]:
        """The same for all parts, with the errors of the normaliser and of o."""
        own = self._own()
        found = super().asked_estimates(r, cotangents)
        if not self.normalize:
            return found
        a, (_, do, dfinal), normaliser = Propagation(r), found[0], self.normaliser()
        reads, below = StateRuns(own, r).forward()[0], StateRuns(normaliser, r).forward()[0]
        o = self._divided(a, reads, below)
        do = self._divided(a, do, below)
        if bool(self.singular.any()):
            # 0/0 there, whose gradient is NaN and reaches every key before it.
            lost = self.singular.expand(do.value.shape)
            do = replace(do, lost=lost if do.lost is None else do.lost | lost)
        dbelow = a.scaled(a.sum(a.mul(do, o)), -1.0)
        dz = cotangents.get("z", torch.zeros(self.shape("z"))).double()[..., None]
        return [(own, do, dfinal), (normaliser, dbelow, dz)]

    def estimates(self, r: Roundings) -> dict[str, Estimate]:
        """Errors of both recurrences, and of the division; open where the normaliser may be 0."""
        a = Propagation(r)
        reads, final = StateRuns(self._own(), r).forward()
        found = {"o": reads, "state": final}
        if self.normalize:
            below, z = StateRuns(self.normaliser(), r).forward()
            found["o"] = self._divided(a, reads, below)
            singular = self.singular.expand(found["o"].value.shape)
            lost = singular if found["o"].lost is None else found["o"].lost | singular
            found["o"] = replace(found["o"], lost=lost)
            found["z"] = a.reshape(z, self.shape("z"))
        return {name: found[name] for name in self.outputs}

    def gathered(
        self, a: Arithmetic[V], found: list[list[StateGradients[V]]], power: int = 0
    ) -> dict[str, V]:
        """Gradients by the inputs; by z from the recurrence of the normaliser."""
        result = super().gathered(a, found, power)
        if "initial_z" in self.given:
            z = self.states_joined(a, [pieces[1].initial for pieces in found])
            result["dinitial_z"] = a.reshape(z, self.shape("z"))
        return result


class LinearFamily(AdditiveStateFamily):
    """``linear``: f(q, k, v, *, feature_map, normalize, causal=True, initial_state=None, …)."""

    name = "linear"
    inputs = ("q", "k", "v")
    required = ("feature_map", "normalize")
    options = ("causal", "initial_state", "cu_seqlens", "return_state")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",), ("o", "state") or, with ``normalize``, ("o", "state", "z")."""
        states = ("state", "z") if options.get("normalize", False) else ("state",)
        return ("o", *states) if options.get("return_state", False) else ("o",)

    def problem(self, *tensors: torch.Tensor, **options: Any) -> LinearProblem:
        """Check the call; tensors in layout bhnd.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        call = checked_state_call(self.name, tensors, self.inputs, options.get("cu_seqlens"))
        normalize = flag("normalize", options["normalize"])
        causal = flag("causal", options.get("causal", True))
        flag("return_state", options.get("return_state", False))
        width = feature_width(options["feature_map"], call.q.shape[3])
        initial, z = _initial_states(options.get("initial_state"), normalize=normalize)
        checked_state("initial_state", initial, call, (width, call.v.shape[3]))
        checked_state("initial_state's z", z, call, (width,))
        given: tuple[str, ...] = ("q", "k", "v")
        given += () if initial is None else ("initial_state",)
        given += () if z is None else ("initial_z",)
        both = initial if z is None or initial is None else torch.cat((initial, z[..., None]), -1)
        fields = self.fields(call, options, initial=both, causal=causal)
        problem = LinearProblem(
            **(fields | {"initial_state": None if initial is None else finite(initial)}),
            scale=1.0,
            gate_shape=None,
            given=given,
            feature_map=options["feature_map"],
            normalize=normalize,
            initial_z=None if z is None else finite(z),
            singular=torch.zeros(*call.rows, 1, dtype=torch.bool),
            forward_only=causal,
        )
        return replace(problem, singular=_singular(problem)) if normalize else problem


def _initial_states(given: Any, *, normalize: bool) -> tuple[Any, Any]:
    """S and z of the call's ``initial_state``."""
    if given is None or not normalize:
        return given, None
    if not isinstance(given, (tuple, list)) or len(given) != 2 or any(x is None for x in given):
        raise ContractError(
            f"initial_state is {type(given).__name__}; with normalize the contract asks for the pair (S, z)"
        )
    return given[0], given[1]


def _singular(problem: LinearProblem) -> torch.Tensor:
    """Rows whose normaliser is 0 as far as float64 can tell, bool (B, H, N, 1)."""
    a, normaliser = EnclosureArithmetic(), problem.normaliser()
    value = a.midpoint(normaliser.unnormalised(a)["o"])
    return value.abs() <= _SINGULAR * absolute_sizes(normaliser)[0]


LINEAR = LinearFamily()
