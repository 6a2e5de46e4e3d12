"""The evaluations from which :mod:`attnproof.properties.budgets.additive_state` makes budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from attnproof.properties.budgets.additive_state import (
    CHUNK,
    GateErrors,
    Runs,
    StepErrors,
    estimate,
)
from attnproof.properties.budgets.float64 import Float64
from attnproof.properties.budgets.propagation import Estimate, wider
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, growth
from attnproof.properties.families.state_blocks import Blocks, Decays, Operands, Whole

if TYPE_CHECKING:
    from attnproof.properties.families.additive_state import AdditiveStateProblem

__all__ = ["StateRuns", "absolute_sizes"]

Kind = Literal["actual", "absolute", "raised", "squares", "crossed", "cancelled"]
KINDS: tuple[Kind, ...] = ("actual", "absolute", "raised", "squares", "crossed", "cancelled")
# To which power a kind takes the operands: 0 leaves them as they are, 1 takes absolute values.
_POWER: dict[Kind, int] = {
    "actual": 0,
    "absolute": 1,
    "raised": 1,
    "squares": 2,
    "crossed": 2,
    "cancelled": 2,
}
_CHANGE: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (torch.clone, torch.abs, torch.square)
# A relative increase of every decay from whose effect the number of positions crossed is read off.
_NUDGE = 1e-7
# Outweighs the roundings of sums of up to 2²⁰ numbers ≥ 0 in float64, and of their decays.
_LOWER = 1.0 - 2.0**-30


@dataclass(frozen=True, eq=False)
class StateRuns:
    """Estimates for a problem's outputs and gradients under roundings ``r``."""

    problem: AdditiveStateProblem
    r: Roundings

    def errors(self, *, backward: bool) -> StepErrors:
        """Relative errors of a term."""
        p = self.problem
        feature = p.feature_error(self.r)
        plain = p.g is None and not feature
        length = p.q.shape[2]
        terms = p.features + (length if p.g is None or p.constant else min(length, CHUNK)) + 8
        stored = self.r.probabilities
        return StepErrors.of(
            self.r,
            gated=p.g is not None and not p.constant,
            rounded=(1 if plain else 2) + int(backward),
            stored=max(stored, self.r.storage("dscores")[0]) if backward else stored,
            feature=2.0 * feature,
            terms=terms,
        )

    def blocks(
        self, part: int | None, kind: Kind, errors: StepErrors
    ) -> Blocks[torch.Tensor] | Whole[torch.Tensor]:
        """The recurrence of one part on changed operands."""
        a, operands = Float64(), self.problem.operands(Float64(), part)
        operands = _changed(operands, _CHANGE[_POWER[kind]])
        if _POWER[kind] == 2 and operands.gates is not None:
            operands = replace(operands, gates=2.0 * operands.gates)
        if not operands.causal:
            # A term crosses as many positions as there are.
            crossed = float(self.problem.q.shape[2]) * {"raised": errors.step, "crossed": _NUDGE}.get(
                kind, 0.0
            )
            return replace(operands, k=operands.k * math.exp(min(crossed, 600.0))).blocks(a)
        if kind in ("raised", "cancelled"):
            return _raised(operands, errors, kind)
        if kind == "crossed":
            nudge = torch.full(operands.resets.shape, _NUDGE).double()
            gates = nudge if operands.gates is None else operands.gates + nudge
            operands = replace(operands, gates=gates)
        return operands.blocks(a)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Evaluations that differ for this problem."""
        sums = self.problem.g is not None and not self.problem.constant
        return KINDS if sums else KINDS[:-1]

    def forward(self) -> tuple[Estimate, Estimate]:
        """What is read, scaled, (B, H, N, E), and the final states (S, H, F, E)."""
        a, p = Float64(), self.problem
        errors = self.errors(backward=False)
        reads, finals = {}, {}
        for kind in self.kinds:
            blocks = [self.blocks(part, kind, errors) for part in p.parts()]
            factor = (p.scale, abs(p.scale), p.scale**2)[_POWER[kind]]
            reads[kind] = factor * p.rows_joined(a, [x.reads() for x in blocks])
            finals[kind] = p.states_joined(a, [x.final for x in blocks])
        of_reads, of_final = (
            estimate(_runs(found), errors, self.r, tiny)
            for found, tiny in zip((reads, finals), self._underflow(), strict=True)
        )
        over = self._overflow()
        lost = over if of_reads.lost is None else of_reads.lost | over
        return replace(of_reads, lost=lost), of_final

    def backward(self, cotangents: Mapping[str, torch.Tensor]) -> dict[str, Estimate]:
        """Every gradient, by its direct sum or, that of the gates, by the closed form too."""
        a, p = Float64(), self.problem
        errors = self.errors(backward=True)
        found: dict[str, dict[Kind, torch.Tensor]] = {}
        asked = p.asked_estimates(self.r, cotangents)
        for kind in self.kinds:
            parts = []
            for part in p.parts():
                pieces = []
                for problem, do, dfinal in asked:
                    blocks = replace(self, problem=problem).blocks(part, kind, errors)
                    final = _CHANGE[_POWER[kind]](problem.states_of(part, dfinal))
                    pieces.append(blocks.gradients(problem.cut(part, _of_kind(do, kind)), final))
                parts.append(pieces)
            for name, x in p.gathered(a, parts, _POWER[kind]).items():
                found.setdefault(name, {})[kind] = x
        tiny = self._gradient_underflow(found)
        result = {name: estimate(_runs(kinds), errors, self.r, tiny[name]) for name, kinds in found.items()}
        if any(do.lost is not None and bool(do.lost.any()) for _, do, _ in asked):
            for name, known in result.items():
                result[name] = replace(known, lost=torch.ones_like(known.value, dtype=torch.bool))
        if "dg" in result:
            result["dg"] = wider(result["dg"], self._closed_form(result, cotangents))
        return result

    def _underflow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What operands, weights and exponentials lose where they are subnormal or flushed: o, and states.

        Each is bounded by its format's smallest numbers times everything else in the term, not decayed.
        """
        a, p, r = Float64(), self.problem, self.r
        reads, finals = [], []
        for part in p.parts():
            x = _changed(p.operands(a, part), torch.abs)
            value = _along(x.v).cumsum(2)
            written = (_along(x.k).sum(-1, keepdim=True) * _along(x.v)).cumsum(2)
            initial = x.initial.sum(2, keepdim=True)
            asked = _along(x.q).sum(-1, keepdim=True)
            lost = max(r.operand_tiny, r.probabilities_tiny) * (written + initial + (1.0 + asked) * value)
            lost = lost + (r.probabilities_tiny + r.accumulate_tiny) * asked * (written + initial)
            reads.append(_back(lost, x.v))
            last = value[:, :, -1:] if value.shape[2] else torch.zeros_like(initial)
            total = written[:, :, -1:] if value.shape[2] else torch.zeros_like(initial)
            bound = r.operand_tiny * last + (r.probabilities_tiny + r.accumulate_tiny) * (total + initial)
            finals.append(bound.expand(x.initial.shape))
        rows = p.rows_joined(a, reads)
        return max(abs(p.scale), 1.0) * rows, p.states_joined(a, finals)

    def _gradient_underflow(self, found: Mapping[str, object]) -> dict[str, torch.Tensor]:
        """The same for gradients, where factors are sums over a whole sequence."""
        p, r = self.problem, self.r
        unit = max(r.operand_tiny, r.probabilities_tiny, r.storage("dscores")[1])
        size = 1.0
        for x in (p.q, p.k, p.v):
            size *= 1.0 + float(x.detach().double().abs().max()) if x.numel() else 1.0
        shapes = {name: p.input_shape(name.removeprefix("d")) for name in found}
        count = float(p.q.shape[2] * p.features)
        if unit < 2.0**-100:
            # Formats with the exponents of float32: nothing of ordinary size comes near.
            count = count * p.q.shape[2]
        return {name: torch.full(shape, unit * size * count).double() for name, shape in shapes.items()}

    def _closed_form(self, found: Mapping[str, Estimate], cotangents: Mapping[str, torch.Tensor]) -> Estimate:
        """dg by GLA-4 in the accumulation's precision: Σ_{s≥t} (q_s∘dq_s − k_s∘dk_s) + Σ_e S_N∘dS_N.

        A kernel sums products of numbers that it has computed with the errors of dq and dk.
        """
        p, u = self.problem, self.r.elementwise
        q, k, dq, dk = p.q.double(), p.k.double(), found["dq"], found["dk"]
        narrow = p.resets.shape[-1] == 1
        terms = 2.0 * p.q.shape[2] * (p.q.shape[3] if narrow else 1) + 4.0
        certain = q.abs() * dq.bound + k.abs() * dk.bound
        certain = certain + growth(terms, self.r.accumulate) * (q.abs() * dq.size + k.abs() * dk.size)
        partial = q * dq.value - k * dk.value
        variance = q.square() * dq.spread + k.square() * dk.spread
        final = torch.zeros(len(p.sequences), p.q.shape[1], p.features)
        bound, spread = final.double(), final.double()
        if bool(cotangents.get("state", torch.zeros(1)).any()):
            state, ds = self.forward()[1], cotangents["state"].double()
            bound = (state.bound * ds.abs() + growth(terms, u) * state.size * ds.abs()).sum(-1)
            spread = (state.spread * ds.square() + (u * state.value * ds).square()).sum(-1)
        sums = []
        for x, last in ((certain, bound), (variance, spread)):
            parts = []
            for s in range(len(p.sequences)):
                here = p.sequences.part(s, x)
                parts.append(here.flip(2).cumsum(2).flip(2) + last[s][None, :, None, :])
            whole = p.sequences.joined(parts, x)
            sums.append(whole.sum(-1, keepdim=True) if narrow else whole)
        shape = p.input_shape("g")
        carried = p.sequences.joined(
            [_partial_sums(p.sequences.part(s, partial)) for s in range(len(p.sequences))], partial
        )
        rounding = MEAN_SQUARE * u**2 * (carried.sum(-1, keepdim=True) if narrow else carried)
        return Estimate(found["dg"].value, sums[0].reshape(shape), (sums[1] + rounding).reshape(shape))

    def _overflow(self) -> torch.Tensor:
        """Elements of o behind a state, or a weight, that its format may not hold; bool (B, H, N, E)."""
        a, p, r = Float64(), self.problem, self.r
        masks = []
        for part in p.parts():
            x = _changed(p.operands(a, part), torch.abs)
            blocks = x.blocks(a)
            inside = x.k.mT @ x.v
            if isinstance(blocks, Blocks):
                inside = inside + blocks.entering
            else:
                inside = blocks.final[:, :, None].expand_as(inside)
            high = (inside >= r.storage("operand")[2] / 2.0).any(-2)
            high = high.cummax(2).values if high.numel() else high
            reach = x.k.square().sum(-1).sqrt().flatten(2)
            reach = reach.amax(-1)[:, :, None, None] if reach.numel() else reach.sum(-1)[:, :, None, None]
            weight = x.q.square().sum(-1).sqrt() * reach * max(abs(p.scale), 1.0)
            over = weight >= r.storage("probabilities")[2] / 2.0
            masks.append((high[:, :, :, None, :] | over[..., None]).double())
        return p.rows_joined(a, masks) > 0


def _runs(kinds: Mapping[Kind, torch.Tensor]) -> Runs:
    return Runs(
        actual=kinds["actual"],
        absolute=kinds["absolute"],
        raised=kinds["raised"],
        squares=kinds["squares"],
        crossed=((kinds["crossed"] - kinds["squares"]) / _NUDGE).clamp(min=0.0),
        cancelled=kinds.get("cancelled", torch.zeros_like(kinds["actual"])),
    )


def _of_kind(x: Estimate, kind: Kind) -> torch.Tensor:
    """Cotangents, which may have errors of their own, for a kind of evaluation; 0 where they are lost."""
    if kind == "actual":
        found = x.value
    elif _POWER[kind] == 1:
        found = x.value.abs() + (x.bound if kind == "raised" else 0.0)
    else:
        found = x.value.square() + x.spread
    return found if x.lost is None else torch.where(x.lost, 0.0, found)


def absolute_sizes(problem: AdditiveStateProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ of |terms| of what is read, scaled, (B, H, N, E), and of the final states; a little too small."""
    a, found = Float64(), []
    for part in problem.parts():
        found.append(_changed(problem.operands(a, part), torch.abs).blocks(a))
    reads = abs(problem.scale) * problem.rows_joined(a, [x.reads() for x in found])
    return reads * _LOWER, problem.states_joined(a, [x.final for x in found]) * _LOWER


def _changed(
    x: Operands[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]
) -> Operands[torch.Tensor]:
    """Operands with all but the gates changed, element by element."""
    bonus = None if x.bonus is None else change(x.bonus)
    return replace(x, q=change(x.q), k=change(x.k), v=change(x.v), initial=change(x.initial), bonus=bonus)


def _along(x: torch.Tensor) -> torch.Tensor:
    """(B, H, C, n, X) as (B, H, C·n, X)."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])


def _back(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, H, C·n, X) in the blocks of ``like``."""
    return x.reshape(*like.shape[:4], x.shape[-1])


def _partial_sums(x: torch.Tensor) -> torch.Tensor:
    """Σ_{s≥t} (Σ_{r≥s} x_r)² + x_s², what the roundings of a reverse cumulative sum are relative to."""
    sums = x.flip(2).cumsum(2)
    return (sums.square() + x.flip(2).square()).cumsum(2).flip(2)


def _raised(operands: Operands[torch.Tensor], errors: StepErrors, kind: Kind) -> Blocks[torch.Tensor]:
    """The recurrence with every decay as large as a kernel may have it.

    For kind "cancelled", of squares and with the weights that :class:`Runs` names.
    """
    a, like = Float64(), operands.resets
    gates = torch.zeros(like.shape).double() if operands.gates is None else operands.gates.expand(like.shape)
    worse = GateErrors.of(_along(gates), errors)
    exclusive = operands.bonus is not None
    own = 1.0
    if kind == "cancelled":
        # Gates are doubled here, and with them their sums.
        worse, own = replace(worse, raised=_along(gates), before=(worse.sums / 2.0).square()), 0.0
    decays = Decays.of(a, _back(worse.raised, like), like, exclusive=exclusive)
    before = _back(worse.before, like)
    crossing = ~torch.eye(like.shape[3], dtype=torch.bool)[:, :, None]
    pairs = decays.pairs * torch.where(crossing, before[:, :, :, None], own)
    decays = replace(decays, pairs=pairs, suffix=decays.suffix * before)
    initial = operands.initial * own
    return Blocks(a, operands.q, operands.k, operands.v, decays, initial, operands.bonus)
