"""Mamba-2's state space duality: one decay a head and position, keys and queries shared by groups of heads.

    h_t = exp(dt_t A) h_{t−1} + dt_t B_t x_tᵀ,   y_t = C_tᵀ h_t + D x_t

Dao and Gu, arXiv 2405.21060, sections 5 and 6 and listing 1; theory SSD-2 and SSD-4. It is gated linear
attention with q = C, k = B, v = dt x and log decays dt A, no scale; head h reads group h // (H/G) of B and C.
With dv, dk, dq and dg of that recurrence:

    dx = dt dv + D dy,   ddt = x·dv + A dg,   dA = Σ dt dg,   dB = Σ_heads dk,   dC = Σ_heads dq

Certain budgets of y are looser than the worst error of a healthy chunkwise kernel, at N = 64, 512 and 4096,
28, 33 and 25 times in float16, 28, 37 and 32 times in bfloat16 (largest certain budget over largest error, in
chunks of 64; B, H, G, D, E = 1, 2, 1, 32, 32, dt up to 0.1, A from −2 to 0), and by up to 3700 times in
float32, where they allow cumulative sums of gates over 128 positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.budgets.additive_state import ComputedErrors
from attnproof.properties.budgets.float64 import Float64
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth
from attnproof.properties.contract import ContractError
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.discretised import (
    DiscretisedFamily,
    DiscretisedProblem,
    checked_shapes,
    grouped,
    spread_over,
)
from attnproof.properties.families.gradients import reduced
from attnproof.properties.families.sequences import Sequences, StateCall, checked_state, flag
from attnproof.properties.families.state_blocks import StateGradients, Writes

__all__ = ["SSD", "SsdProblem"]


@dataclass(frozen=True, eq=False)
class SsdProblem(DiscretisedProblem):
    """Finite inputs of one call; ``summed`` is 1 + the relative error of sums over heads and positions."""

    summed: float = 1.0
    driven: ClassVar[str] = "x"

    def _steps(self) -> torch.Tensor:
        """Dt as (B, H, N, 1)."""
        return self.inputs["dt"][..., None]

    def _decay(self) -> torch.Tensor:
        """A as (1, H, 1, 1, 1)."""
        return self.inputs["A"].reshape(1, -1, 1, 1, 1)

    def _writes(self, a: Arithmetic[V], part: int | None, *, far: bool) -> Writes[V]:
        """B, dt x and dt A in blocks."""
        dt = a.exact(self.cut(part, self._steps(), far=far))
        approximate = isinstance(a, Float64)
        if approximate:
            # Operands that a budget may have changed.
            v, gates = (a.exact(self.cut(part, x, far=far)) for x in (self.v, self._gates()))
        else:
            v = a.mul(dt, a.exact(self.cut(part, self.inputs["x"], far=far)))
            gates = a.mul(dt, a.exact(self._decay()))
        k = a.exact(self.cut(part, self.k, far=far))
        return Writes(k=k, v=v, gates=gates, resets=self.cut(part, self.resets, far=far))

    def _gates(self) -> torch.Tensor:
        assert self.g is not None
        return self.g

    # Budgets.

    def widened(self, r: Roundings, power: int) -> SsdProblem:
        """Products as large as a kernel may have them, rounded to an operand's format too.

        Below the smallest normal number of that format a rounding errs as it does at that number.
        """
        tiny = r.storage("operand")[1]
        present = (self.v != 0).double()
        if power == 2:
            smallest = tiny / (r.operand * math.sqrt(3.0 * MEAN_SQUARE)) if r.operand else 0.0
            return replace(self, v=(self.v.square() + smallest**2 * present).sqrt())
        gates = self._gates()
        more = 2.0 * r.elementwise * gates.abs() + r.accumulate_tiny * (gates != 0).double()
        terms = float(self.q.shape[0] * self.q.shape[2] * self.v.shape[3] + self.q.shape[1])
        return replace(
            self,
            v=self.v.abs() + (tiny + r.accumulate_tiny) * present,
            g=gates + more,
            summed=1.0 + float(growth(terms, r.accumulate)),
        )

    def computed(self, r: Roundings) -> ComputedErrors:
        """dt x is a rounded operand; dt may be multiplied to anything in the term, with a rounding or two."""
        u = r.elementwise
        sizes = self._gates().clamp(min=-1.0)
        gates = float(sizes.square().mean()) if sizes.numel() else 0.0
        return ComputedErrors(
            rounded=1,
            factor=(1.0 + u) ** 6,
            fixed=MEAN_SQUARE * (r.operand**2 + 3.0 * u**2),
            moving=MEAN_SQUARE * u**2 * gates,
        )

    def value_sizes(self) -> torch.Tensor:
        """The larger of dt |x| and |x|, where dt is part of the weights."""
        return torch.maximum(self.v.abs(), self.inputs["x"].double().abs())

    def underflow_factor(self, gradient: str) -> float:
        """Products with x, dt and A, and sums over heads and positions."""

        def largest(name: str) -> float:
            x = self.inputs[name]
            return float(x.double().abs().max()) if x.numel() else 0.0

        batch, heads, length = self.q.shape[:3]
        return {
            "dx": 1.0 + largest("dt"),
            "ddt": 1.0 + largest("x") * self.v.shape[3] + largest("A"),
            "dA": 1.0 + largest("dt") * batch * length,
            "dB": float(heads),
            "dC": float(heads),
        }.get(gradient, 1.0)

    # Gradients.

    def gathered(
        self, a: Arithmetic[V], found: list[list[StateGradients[V]]], power: int = 0
    ) -> dict[str, V]:
        """Gradients by the inputs, of those by q, k, v and the gates."""

        def factor(tensor: torch.Tensor) -> V:
            return a.exact(tensor.double().abs() ** power if power else tensor)

        decay = factor(self._decay())
        inputs, steps, sums = [], [], []
        for part, (piece,) in zip(self.parts(), found, strict=True):
            assert piece.gates is not None
            dt, x = factor(self.cut(part, self._steps())), factor(self.cut(part, self.inputs["x"]))
            inputs.append(a.mul(dt, piece.v))
            steps.append(a.add(a.sum(a.mul(x, piece.v)), a.mul(decay, piece.gates)))
            sums.append(a.mul(dt, piece.gates))
        dq, dk = (self.rows_joined(a, [getattr(piece, x) for (piece,) in found]) for x in ("q", "k"))
        groups = self.inputs["B"].shape[1]
        summed = {
            "dA": reduced(a, self.rows_joined(a, sums), (1, self.q.shape[1], 1, 1)),
            "dB": grouped(a, dk, groups),
            "dC": grouped(a, dq, groups),
        }
        result = {name: a.scaled(x, self.summed) for name, x in summed.items()}
        result |= {"dx": self.rows_joined(a, inputs), "ddt": self.rows_joined(a, steps)}
        result["ddt"] = a.reshape(result["ddt"], self.input_shape("dt"))
        result["dA"] = a.reshape(result["dA"], self.input_shape("A"))
        gates = self.rows_joined(a, [_present(piece.gates) for (piece,) in found])
        result |= {"dq": dq, "dk": dk, "dg": gates}
        if "initial_state" in self.given:
            result["dinitial_state"] = self.states_joined(a, [piece.initial for (piece,) in found])
        return result

    def chained_gates(self, g: torch.Tensor, power: int) -> dict[str, torch.Tensor]:
        """A dg and Σ dt dg."""
        decay = self.inputs["A"].double().abs()[None, :, None] ** power
        dt = self.inputs["dt"].double() ** power
        return {"ddt": decay * g[..., 0], "dA": (dt * g[..., 0]).sum((0, 2))}


def _present(x: V | None) -> V:
    assert x is not None
    return x


class SsdFamily(DiscretisedFamily):
    """``ssd``: f(x, dt, A, B, C, D=None, *, initial_state=None, cu_seqlens=None, return_state=False)."""

    name = "ssd"
    inputs = ("x", "dt", "A", "B", "C", "D")
    required = ()
    options = ("initial_state", "cu_seqlens", "return_state")
    sequence = ("x", "dt", "B", "C", "y")

    def problem(self, *tensors: Any, **options: Any) -> SsdProblem:
        """Check the call; tensors in layout bhnd, D None or left out where there is no skip.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        given = _checked(tensors)
        batch, heads, length, values = given["x"].shape
        sequences = Sequences.of(batch, length, options.get("cu_seqlens"))
        initial = options.get("initial_state")
        flag("return_state", options.get("return_state", False))
        clean = {name: finite(tensor) for name, tensor in given.items()}
        steps = clean["dt"].double()[..., None]
        call = StateCall(
            spread_over(clean["C"], heads),
            spread_over(clean["B"], heads),
            steps * clean["x"].double(),
            sequences,
        )
        checked_state("initial_state", initial, call, (given["B"].shape[3], values))
        wrong = {name: ~tensor.isfinite() for name, tensor in given.items()}
        none = torch.zeros(heads, dtype=torch.bool)
        bad = {
            "writes": wrong["x"].any(-1) | wrong["dt"] | spread_over(wrong["B"], heads).any(-1),
            "reads": spread_over(wrong["C"], heads).any(-1),
            "heads": wrong["A"],
            "skips": wrong.get("D", none),
        }
        gates = steps * clean["A"].double()[None, :, None, None]
        if initial is not None:
            clean["initial_state"] = finite(initial)
        return SsdProblem(
            **self.prepared(call, options, gates, initial, bad), given=tuple(clean), inputs=clean
        )


def _checked(tensors: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a call by name, without D where it is None."""
    names = SsdFamily.inputs
    if len(tensors) not in (5, 6):
        raise ContractError(f"ssd takes 5 or 6 tensors {', '.join(names)}; got {len(tensors)}")
    given = {name: x for name, x in zip(names, tensors, strict=False) if not (name == "D" and x is None)}
    for name, axes in (("x", "(B, H, N, E)"), ("B", "(B, G, N, D)")):
        if not isinstance(given[name], torch.Tensor) or given[name].dim() != 4:
            got = getattr(given[name], "shape", type(given[name]).__name__)
            raise ContractError(
                f"{name} has shape {tuple(got) if not isinstance(got, str) else got}; "
                f"ssd asks for 4 axes {axes}"
            )
    (batch, heads, length, values), (groups, width) = given["x"].shape, given["B"].shape[1::2]
    if groups == 0 or heads % groups:
        raise ContractError(f"x has {heads} heads and B {groups} groups; H must be a multiple of G")
    asked = {
        "x": (batch, heads, length, values),
        "dt": (batch, heads, length),
        "A": (heads,),
        "B": (batch, groups, length, width),
        "C": (batch, groups, length, width),
        "D": (heads,),
    }
    checked_shapes("ssd", given, asked, wide=("dt", "A"))
    for name, sign, words in (("dt", -1.0, "dt ≥ 0"), ("A", 1.0, "A ≤ 0: decays above 1 are not asked for")):
        wrong = given[name][given[name].isfinite() & (sign * given[name] > 0)]
        if wrong.numel():
            raise ContractError(f"{name} holds {float(wrong.flatten()[0])}; the contract asks for {words}")
    return given


SSD = SsdFamily()
