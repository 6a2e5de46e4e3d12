"""Mamba's selective scan: a diagonal state of each channel, driven by steps that the input chooses.

    δ_t = delta_t + bias, through softplus if asked,   h_t = exp(δ_t A) ∘ h_{t−1} + w_t B_t u_t,
    y_t = (C_t·h_t + D u_t) · silu(z_t)

with w = δ ("euler", what the released code computes) or (exp(δ A) − 1)/A, δ where A = 0 ("zoh", the paper's
equation 4). Gu and Dao, arXiv 2312.00752, section 2 and 3.5; theory MAM-1 and MAM-2. It is gated linear
attention whose heads are the channels, with values of width 1, q = C and k = w B, v = u, one log decay δ A
for each state, no scale. With dq, dk, dv, dg of that recurrence, ∂w/∂δ = 1 or exp(δ A), and ∂w/∂A = 0 or
(δ A exp(δ A) − (exp(δ A) − 1))/A², δ²/2 where A = 0:

    du = dv + D dy silu(z),   dδ = Σ_s (dg A + dk B ∂w/∂δ),   dA = Σ_t (dg δ + dk B ∂w/∂A),
    dB = Σ_channels w dk,   dC = Σ_channels dq,   ddelta = softplus'(delta + bias) dδ, softplus' = σ

Near A = 0 the last formula cancels, by a factor 1/|δA|: exact arithmetics then take more bits.

Budgets: healthy kernels work in float32 and round once, so that probable errors (error/probable 1.0 in half
precision, 0.1 to 0.4 in float32) know no operand of a matrix product; certain ones cover kernels that write
each channel's matrix down in the inputs' dtype. They are looser than the worst error of a healthy scan, at
N = 64, 512 and 4096, 17, 38 and 35 times in float16, 20, 36 and 18 times in bfloat16 (largest certain budget
over largest error; B, H, D = 1, 2, 16, δ = softplus(N(−3, 1) + N(0, 1)), A from −4 to 0), and by up to
3500 times in float32, where they allow cumulative sums of gates over 128 positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from attnproof.properties.arithmetic.base import Arithmetic, V
from attnproof.properties.budgets.additive_state import ComputedErrors
from attnproof.properties.budgets.float64 import Float64
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.selective_scan import StepSizeErrors
from attnproof.properties.contract import ContractError
from attnproof.properties.families.arguments import finite
from attnproof.properties.families.discretised import (
    DiscretisedFamily,
    DiscretisedProblem,
    checked_shapes,
    spread_over,
)
from attnproof.properties.families.gradients import reduced
from attnproof.properties.families.sequences import Sequences, StateCall, checked_state, flag
from attnproof.properties.families.state_blocks import StateGradients, Writes
from attnproof.properties.families.step_sizes import Discretisation

__all__ = ["SELECTIVE_SCAN", "SelectiveScanProblem"]

METHODS = ("euler", "zoh")


@dataclass(frozen=True, eq=False)
class SelectiveScanProblem(DiscretisedProblem):
    """Finite inputs of one call.

    Attributes:
        discretisation: of its steps.
        errors: the relative errors with which a kernel computes them, in a problem of its budget.
        power: of which its operands and factors are taken; 0 for the call itself.
    """

    discretisation: Discretisation
    errors: StepSizeErrors | None = None
    driven: ClassVar[str] = "u"

    def shape(self, output: str) -> tuple[int, ...]:
        """Y (B, H, N), state (S, H, D)."""
        return super().shape(output)[:-1]

    def unjudged(self) -> torch.Tensor:
        """Positions of long calls that are not judged, bool (N)."""
        return super().unjudged()[:, 0]

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Which channel, or which channel's state."""
        if output != self.read:
            return super().explain_row(output, row)
        batch, channel = row
        length = self.q.shape[2]
        return f"channel {channel} of batch {batch}, {length} positions in {len(self.sequences)} sequences"

    def _cut_steps(self, part: int | None, *, far: bool = False) -> torch.Tensor:
        return self.cut(part, self.inputs["delta"][..., None], far=far)

    def _keys(self) -> torch.Tensor:
        """B for every channel, (B, H, N, D)."""
        return _shared(self.inputs["B"], self.q.shape[1])

    def _writes(self, a: Arithmetic[V], part: int | None, *, far: bool) -> Writes[V]:
        """w B, u and δ A in blocks."""
        approximate = isinstance(a, Float64)
        if approximate:
            # Operands that a budget may have changed.
            assert self.g is not None
            k, gates = (a.exact(self.cut(part, x, far=far)) for x in (self.k, self.g))
        else:
            here, real = self.discretisation, self.real(part, far=far)
            steps = a.masked(here.steps(a, self._cut_steps(part, far=far)), real)
            gates = here.gates(a, steps)
            k = a.mul(here.weights(a, steps), a.exact(self.cut(part, self._keys(), far=far)))
        return Writes(
            k=k,
            v=a.exact(self.cut(part, self.v, far=far)),
            gates=gates,
            resets=self.cut(part, self.resets, far=far),
        )

    # Budgets.

    def _errors(self, r: Roundings) -> StepSizeErrors:
        bias = self.inputs.get("delta_bias")
        raw = self.inputs["delta"].double()[..., None]
        if bias is not None:
            raw = raw + bias.double()[:, None, None]
        here = self.discretisation
        return StepSizeErrors.of(
            r, raw, here.A[:, :, 0].double(), biased=bias is not None, smooth=here.smooth, zoh=here.zoh
        )

    def widened(self, r: Roundings, power: int) -> SelectiveScanProblem:
        """Weights and gates as large as a kernel may have them."""
        errors = self._errors(r)
        if power == 2:
            return replace(self, errors=errors)
        assert self.g is not None
        keys = self._keys().double().abs()
        return replace(
            self,
            k=self.k.abs() * (1.0 + errors.weights) + keys * errors.tiny,
            g=self.g
            + self.g.abs() * errors.gates
            + self.discretisation.A[:, :, 0].double().abs() * errors.tiny,
            errors=errors,
        )

    def computed(self, r: Roundings) -> ComputedErrors:
        """Those of step sizes, weights and gates, where they carry weight."""
        found = self._errors(r)
        assert self.g is not None
        return found.computed(self.k.abs(), self.g, factor=(1.0 + r.elementwise) ** 6)

    def healthy(self, r: Roundings) -> Roundings:
        """No matrix product: each channel has a matrix of decays of its own, and nothing is an operand.

        Certain errors are also those of kernels that write that matrix down and multiply by it.
        """
        u = r.elementwise
        return replace(
            r,
            operand=0.0,
            input=0.0,
            operand_tiny=0.0,
            operand_lean=0.0,
            probabilities=u,
            probabilities_tiny=2.0**-126 if u > 2.0**-40 else r.probabilities_tiny,
            formats={
                **r.formats,
                "operand": (0.0, 0.0, r.largest),
                "dscores": (u, r.accumulate_tiny, r.largest),
            },
        )

    def underflow_factor(self, gradient: str) -> float:
        """Products with B, A and δ, and sums over channels, states and positions."""

        def largest(x: torch.Tensor) -> float:
            return float(x.double().abs().max()) if x.numel() else 0.0

        batch, heads, length, width = self.q.shape
        assert self.g is not None
        steps = largest(self.g / self.discretisation.A[:, :, 0].double().clamp(max=-1e-30))
        steps = max(steps, largest(self.k)) + 1.0
        within = 1.0 + largest(self.inputs["A"]) + largest(self.inputs["B"])
        return {
            "ddelta": width * within,
            "ddelta_bias": width * within * batch * length,
            "dA": within * steps**2 * batch * length,
            "dB": heads * steps,
            "dC": float(heads),
        }.get(gradient, 1.0)

    # Gradients.

    def gathered(
        self, a: Arithmetic[V], found: list[list[StateGradients[V]]], power: int = 0
    ) -> dict[str, V]:
        """Gradients by the inputs, of those by q, k, v and the gates."""
        rows: dict[str, list[V]] = {name: [] for name in ("u", "delta", "A", "B", "q", "k", "g")}
        for part, (piece,) in zip(self.parts(), found, strict=True):
            assert piece.gates is not None
            f = self._factors(a, part, power)
            written = a.mul(f["B"], piece.k)
            by_step = a.mul(written, f["growth"]) if "growth" in f else written
            by_step = a.sum(a.add(a.mul(f["A"], piece.gates), by_step))
            by_decay = a.mul(f["steps"], piece.gates)
            if "curve" in f:
                by_decay = a.add(by_decay, a.mul(written, f["curve"]))
            for name, x in (
                ("u", piece.v),
                ("delta", a.mul(f["slope"], by_step) if "slope" in f else by_step),
                ("A", by_decay),
                ("B", a.mul(f["weights"], piece.k)),
                ("q", piece.q),
                ("k", piece.k),
                ("g", piece.gates),
            ):
                rows[name].append(x)
        joined = {name: self.rows_joined(a, parts) for name, parts in rows.items()}
        (batch, heads, length, width), more = self.q.shape, 1.0 if self.errors is None else self.errors.summed
        over_channels = (batch, 1, length, width)
        result = {
            "du": joined["u"],
            "ddelta": a.reshape(joined["delta"], (batch, heads, length)),
            "dA": a.reshape(a.scaled(reduced(a, joined["A"], (1, heads, 1, width)), more), (heads, width)),
            "dq": joined["q"],
            "dk": joined["k"],
            "dg": joined["g"],
        }
        for name, x in (("dB", joined["B"]), ("dC", joined["q"])):
            shared = a.scaled(reduced(a, x, over_channels), more)
            result[name] = a.transpose(a.reshape(shared, (batch, length, width)))
        if "delta_bias" in self.inputs:
            summed = a.scaled(reduced(a, joined["delta"], (1, heads, 1, 1)), more)
            result["ddelta_bias"] = a.reshape(summed, (heads,))
        if "initial_state" in self.given:
            result["dinitial_state"] = self.states_joined(a, [piece.initial for (piece,) in found])
        return {name: self._as_given(a, name, x) for name, x in result.items()}

    def _as_given(self, a: Arithmetic[V], gradient: str, x: V) -> V:
        return a.reshape(x, self.input_shape(gradient.removeprefix("d")))

    def _factors(self, a: Arithmetic[V], part: int | None, power: int) -> dict[str, V]:
        """What gradients are multiplied with, by its name; with ``power`` as a budget has it."""
        here, delta = self.discretisation, self._cut_steps(part)
        steps = a.masked(here.steps(a, delta), self.real(part))
        found = {
            "steps": steps,
            "weights": here.weights(a, steps),
            "growth": here.weights_by_steps(a, steps),
            "curve": here.weights_by_decays(a, steps),
            "slope": here.slope(a, delta),
            "A": a.exact(here.A),
            "B": a.exact(self.cut(part, self._keys())),
        }
        factors = {name: x for name, x in found.items() if x is not None}
        if not power:
            return factors
        return {name: self._sized(a, part, name, x, power) for name, x in factors.items()}

    def _sized(self, a: Arithmetic[V], part: int | None, name: str, x: V, power: int) -> V:
        """A factor's size, with its errors where this problem has them, to a power; in float64."""
        size = a.midpoint(x).abs()
        if self.errors is not None:
            size = self.errors.sized(name, size, lambda tensor: self.cut(part, tensor), power)
        return a.exact(size**power)

    def chained_gates(self, g: torch.Tensor, power: int) -> dict[str, torch.Tensor]:
        """Σ_s A dg times σ, and Σ δ dg."""
        a, here = Float64(), self.discretisation
        delta = self.inputs["delta"][:, :, None, :, None]
        steps, slope = here.steps(a, delta)[:, :, 0], here.slope(a, delta)
        by_step = (here.A[:, :, 0].double().abs() ** power * g).sum(-1)
        by_step = by_step if slope is None else by_step * slope[:, :, 0, :, 0] ** power
        result = {"ddelta": by_step, "dA": (steps**power * g).sum((0, 2))}
        return result | ({"ddelta_bias": by_step.sum((0, 2))} if "delta_bias" in self.inputs else {})


def _shared(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, D, N) of all channels as (B, H, N, D)."""
    return spread_over(x.mT[:, None], heads)


class SelectiveScanFamily(DiscretisedFamily):
    """``selective_scan``: f(u, delta, A, B, C, D=None, *, z=None, delta_bias=None, …)."""

    name = "selective_scan"
    inputs = ("u", "delta", "A", "B", "C", "D")
    required = ()
    options = (
        "z",
        "delta_bias",
        "delta_softplus",
        "discretization",
        "initial_state",
        "cu_seqlens",
        "return_state",
    )
    sequence = ("u", "delta", "B", "C", "z", "y")

    def problem(self, *tensors: Any, **options: Any) -> SelectiveScanProblem:
        """Check the call; tensors in layout bhnd, D None or left out where there is no skip.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        given = _checked(tensors, options)
        batch, heads, length = given["u"].shape
        sequences = Sequences.of(batch, length, options.get("cu_seqlens"))
        initial, smooth = (
            options.get("initial_state"),
            flag("delta_softplus", options.get("delta_softplus", False)),
        )
        flag("return_state", options.get("return_state", False))
        clean = {name: finite(tensor) for name, tensor in given.items()}
        bias = clean.get("delta_bias")
        discretisation = Discretisation(
            A=clean["A"][None, :, None, None],
            bias=None if bias is None else bias.reshape(1, -1, 1, 1, 1),
            smooth=smooth,
            zoh=options.get("discretization", "euler") == "zoh",
        )
        a = Float64()
        steps = discretisation.steps(a, clean["delta"][:, :, None, :, None])
        if bool((steps < 0).any()):
            raise ContractError(
                f"delta (with delta_bias) holds {float(steps.min())}; the contract asks for steps ≥ 0"
            )
        weights = discretisation.weights(a, steps)[:, :, 0] * _shared(clean["B"], heads).double()
        queries, gates = _shared(clean["C"], heads), discretisation.gates(a, steps)[:, :, 0]
        call = StateCall(queries, weights, clean["u"].double()[..., None], sequences)
        checked_state("initial_state", initial, call, (gates.shape[3],))
        if initial is not None:
            clean["initial_state"] = finite(initial)
        start = None if initial is None else initial[..., None]
        return SelectiveScanProblem(
            **self.prepared(call, options, gates, start, _bad(given)),
            given=tuple(clean),
            inputs=clean,
            discretisation=discretisation,
        )


def _bad(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What holds a non-finite input, as :meth:`DiscretisedFamily.prepared` asks for it."""
    wrong, none = {name: ~x.isfinite() for name, x in given.items()}, torch.zeros(given["u"].shape[1]).bool()
    reads = wrong["C"].any(1)[:, None] | wrong.get("z", torch.zeros_like(wrong["u"]))
    return {
        "writes": wrong["u"] | wrong["delta"] | wrong["B"].any(1)[:, None],
        "reads": reads,
        "heads": wrong["A"].any(-1) | wrong.get("delta_bias", none),
        "skips": wrong.get("D", none),
    }


def _checked(tensors: tuple[Any, ...], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call by name, without those that are None."""
    names = SelectiveScanFamily.inputs
    if len(tensors) not in (5, 6):
        raise ContractError(f"selective_scan takes 5 or 6 tensors {', '.join(names)}; got {len(tensors)}")
    method = options.get("discretization", "euler")
    if method not in METHODS:
        raise ContractError(f"discretization={method!r}; the contract asks for one of {', '.join(METHODS)}")
    given = dict(zip(names, tensors, strict=False)) | {x: options.get(x) for x in ("z", "delta_bias")}
    given = {name: x for name, x in given.items() if x is not None or name not in ("D", "z", "delta_bias")}
    for name, axes, count in (("u", "(B, H, N)", 3), ("A", "(H, D)", 2)):
        x = given[name]
        if not isinstance(x, torch.Tensor) or x.dim() != count:
            got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"type {type(x).__name__}"
            raise ContractError(f"{name} has {got}; selective_scan asks for {count} axes {axes}")
    (batch, heads, length), width = given["u"].shape, given["A"].shape[1]
    sequence = (batch, heads, length)
    asked = {
        "u": sequence,
        "delta": sequence,
        "A": (heads, width),
        "B": (batch, width, length),
        "C": (batch, width, length),
        "D": (heads,),
        "z": sequence,
        "delta_bias": (heads,),
    }
    checked_shapes("selective_scan", given, asked)
    wrong = given["A"][given["A"].isfinite() & (given["A"] > 0)]
    if wrong.numel():
        raise ContractError(f"A holds {float(wrong[0])}; the contract asks for A ≤ 0: no state may grow")
    return given


SELECTIVE_SCAN = SelectiveScanFamily()
