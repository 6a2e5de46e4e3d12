"""The evaluations from which :mod:`attnproof.properties.budgets.additive_state` makes budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from attnproof.properties.families.state_blocks import Blocks, Decays, Operands, Whole, Writes

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
# How many times the variance of a term's own roundings is in the budget of a gradient in any case.
_OWN = 16.0
# Outweighs the roundings of sums of up to 2²⁰ numbers ≥ 0 in float64, and of their decays.
_LOWER = 1.0 - 2.0**-30


@dataclass(frozen=True, eq=False)
class StateRuns:
    """Estimates for a problem's outputs and gradients under roundings ``r``."""

    problem: AdditiveStateProblem
    r: Roundings

    def errors(self, *, backward: bool) -> StepErrors:
        """Relative errors of a term."""
        found, r = self._errors(self.r, backward=backward), self.problem.healthy(self.r)
        if r is self.r:
            return found
        lean = self._errors(r, backward=backward)
        return replace(found, fixed=lean.fixed, moving=lean.moving, shared=lean.shared)

    def _errors(self, r: Roundings, *, backward: bool) -> StepErrors:
        p, computed = self.problem, self.problem.computed(r)
        feature = p.feature_error(r)
        plain = p.g is None and not feature
        length = p.q.shape[2]
        terms = p.features + (length if p.g is None or p.constant else min(length, CHUNK)) + 8
        stored = r.probabilities
        errors = StepErrors.of(
            r,
            gated=p.g is not None and not p.constant,
            rounded=(1 if plain else 2) + int(backward) + computed.rounded,
            stored=max(stored, r.storage("dscores")[0]) if backward else stored,
            feature=2.0 * feature,
            terms=terms,
        )
        return replace(
            errors,
            factor=errors.factor * computed.factor,
            fixed=errors.fixed + computed.fixed,
            moving=errors.moving + computed.moving,
        )

    def _problem(self, kind: Kind) -> AdditiveStateProblem:
        """The problem whose operands a kind of evaluation takes."""
        wide = _POWER[kind] == 2 or kind == "raised"
        return self.problem.widened(self.r, _POWER[kind]) if wide else self.problem

    def blocks(
        self, part: int | None, kind: Kind, errors: StepErrors
    ) -> Blocks[torch.Tensor] | Whole[torch.Tensor]:
        """The recurrence of one part on changed operands."""
        a, p = Float64(), self._problem(kind)
        operands = p.operands(a, part)
        operands = _changed(operands, _CHANGE[_POWER[kind]])
        if _POWER[kind] == 2:
            operands = _each_write(operands, _with_doubled_gates)
        if not operands.causal:
            # A term crosses as many positions as there are.
            nudge = {"raised": errors.step, "crossed": _NUDGE}.get(kind, 0.0)
            factor = math.exp(min(float(p.q.shape[2]) * nudge, 600.0))
            return _each_write(operands, lambda x, _: replace(x, k=x.k * factor)).blocks(a)
        if kind in ("raised", "cancelled"):
            return _raised(p, part, operands, errors, kind)
        if kind == "crossed":

            def nudged(x: Writes[torch.Tensor], far: bool) -> Writes[torch.Tensor]:
                more = _NUDGE * p.real(part, far=far).double().expand(x.resets.shape)
                return replace(x, gates=more if x.gates is None else x.gates + more)

            operands = _each_write(operands, nudged)
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
        tiny, r = self._underflow(), p.healthy(self.r)
        lean = tiny if r is self.r else replace(self, r=r)._underflow()
        of_reads, of_final = (
            estimate(_runs(found), errors, self.r, *lost)
            for found, *lost in zip((reads, finals), tiny, lean, strict=True)
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
            for name, x in self._problem(kind).gathered(a, parts, _POWER[kind]).items():
                found.setdefault(name, {})[kind] = x
        tiny = self._gradient_underflow(found)
        lean = replace(self, r=p.healthy(self.r))._gradient_underflow(found)
        result = {
            name: estimate(_runs(kinds), errors, self.r, tiny[name], lean[name])
            for name, kinds in found.items()
        }
        for name, x in self._inherited(asked, errors).items():
            result[name] = replace(result[name], variance=result[name].spread + x)
        if any(do.lost is not None and bool(do.lost.any()) for _, do, _ in asked):
            for name, known in result.items():
                result[name] = replace(known, lost=torch.ones_like(known.value, dtype=torch.bool))
        if "g" in p.given:
            result["dg"] = wider(result["dg"], self.closed_form(result, cotangents))
        return result

    def _inherited(
        self, asked: Sequence[tuple[AdditiveStateProblem, Estimate, torch.Tensor]], errors: StepErrors
    ) -> dict[str, torch.Tensor]:
        """Variances of gradients by cotangents that err by more than the roundings of a term.

        Those of a row were divided by one normaliser, which errs by much where its terms cancel: its error is
        that of all values of the row, and adds up over them.
        """
        spreads, parts = [], []
        for _, do, _ in asked:
            own = _OWN * errors.fixed * do.value.square()
            spread = (do.spread - own).clamp(min=0.0) * float(self.problem.v.shape[3])
            spreads.append(spread if do.lost is None else spread.masked_fill(do.lost, 0.0))
        if not any(bool(spread.any()) for spread in spreads):
            return {}
        for part in self.problem.parts():
            pieces = []
            for (problem, _, dfinal), spread in zip(asked, spreads, strict=True):
                blocks = replace(self, problem=problem).blocks(part, "squares", errors)
                final = torch.zeros_like(problem.states_of(part, dfinal))
                pieces.append(blocks.gradients(problem.cut(part, spread), final))
            parts.append(pieces)
        return self._problem("squares").gathered(Float64(), parts, _POWER["squares"])

    def _underflow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What operands, weights and exponentials lose where they are subnormal or flushed: o, and states.

        Each is bounded by its format's smallest numbers times everything else in the term, not decayed. Where
        products themselves are subnormal, each loses up to half the smallest number whatever its factors are:
        those of keys and values, of states and decays at every position (all of them read by q), of q and the
        state, of weights and values, and the scale.
        """
        a, p, r = Float64(), self.problem, self.r
        held = max(r.operand_tiny, r.storage("state")[1])
        reads, finals = [], []
        for part in p.parts():
            q, k, v = (p.part_of(part, x).double() for x in (p.q, p.k, p.v))
            asked = p.mapped(a, q).abs().sum(-1, keepdim=True)
            value = p.part_of(part, p.value_sizes()).cumsum(2)
            written = (p.mapped(a, k).abs().sum(-1, keepdim=True) * v.abs()).cumsum(2)
            start = self._initial(part).abs()
            initial = start.sum(2, keepdim=True)
            last, total = (
                x[:, :, -1:] if x.shape[2] else torch.zeros_like(initial) for x in (value, written)
            )
            if not p.causal:
                value, written = last.expand(value.shape), total.expand(value.shape)
            length = v.shape[2]
            steps = torch.arange(1.0, length + 1.0, dtype=torch.float64)[:, None]
            steps = 2.0 * (steps if p.causal else torch.full_like(steps, length)) + 2.0
            lost = max(r.operand_tiny, r.probabilities_tiny) * (written + initial + (1.0 + asked) * value)
            lost = lost + held * asked + r.accumulate_tiny * ((1.0 + asked) * steps + p.features)
            reads.append(lost + (r.probabilities_tiny + r.accumulate_tiny) * asked * (written + initial))
            bound = r.operand_tiny * last + (r.probabilities_tiny + r.accumulate_tiny) * (total + initial)
            bound = bound + r.accumulate_tiny * (2.0 * length + 2.0)
            finals.append(bound.expand(start.shape))
        rows = p.sequences.joined(reads, p.v.double()) if p.sequences.packed else reads[0]
        return max(abs(p.scale), 1.0) * rows, p.states_joined(a, finals)

    def _initial(self, part: int | None) -> torch.Tensor:
        """The state before a part, (B, H, F, E)."""
        p = self.problem
        if p.initial_state is not None:
            return p.states_of(part, p.initial_state).double()
        batch, heads = p.q.shape[:2]
        shape = (batch if part is None else 1, heads, p.features, p.v.shape[3])
        return torch.zeros(shape, dtype=torch.float64)

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
        return {
            name: torch.full(shape, unit * size * count * p.underflow_factor(name)).double()
            for name, shape in shapes.items()
        }

    def closed_form(self, found: Mapping[str, Estimate], cotangents: Mapping[str, torch.Tensor]) -> Estimate:
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
            state = self.forward()[1]
            ds = cotangents["state"].double().reshape(state.value.shape)
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
            x, layout = _changed(p.operands(a, part), torch.abs), p.layout(part)
            blocks, limit = x.blocks(a), r.storage("operand")[2] / 2.0
            if isinstance(blocks, Blocks):
                inside = x.far.k.mT @ x.far.v + blocks.carried
                high = (inside >= limit).any(-2).double()
                high = high.cummax(2).values if high.numel() else high
                rows = layout.along(high[:, :, :, None].expand(x.far.v.shape)) > 0
            else:
                rows = (blocks.final >= limit).any(-2)[:, :, None].expand(p.part_of(part, p.v).shape)
            reach = x.far.k.square().sum(-1).sqrt().flatten(2)
            reach = reach.amax(-1, keepdim=True) if reach.shape[2] else reach.sum(-1, keepdim=True)
            asked = p.mapped(a, p.part_of(part, p.q).double()).square().sum(-1).sqrt()
            over = asked * reach * max(abs(p.scale), 1.0) >= r.storage("probabilities")[2] / 2.0
            masks.append(rows | over[..., None])
        return p.sequences.joined(masks, p.v.bool()) if p.sequences.packed else masks[0]


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
    x = replace(x, q=change(x.q), initial=change(x.initial), bonus=bonus)
    return _each_write(x, lambda writes, _: replace(writes, k=change(writes.k), v=change(writes.v)))


def _each_write(
    x: Operands[torch.Tensor], change: Callable[[Writes[torch.Tensor], bool], Writes[torch.Tensor]]
) -> Operands[torch.Tensor]:
    """Operands with what is written changed, in blocks that are read and that carry the state."""
    near = change(x.near, False)
    return replace(x, near=near, far=near if x.chosen is None else change(x.far, True))


def _with_doubled_gates(x: Writes[torch.Tensor], _: bool) -> Writes[torch.Tensor]:
    return x if x.gates is None else replace(x, gates=2.0 * x.gates)


def _partial_sums(x: torch.Tensor) -> torch.Tensor:
    """Σ_{s≥t} (Σ_{r≥s} x_r)² + x_s², what the roundings of a reverse cumulative sum are relative to."""
    sums = x.flip(2).cumsum(2)
    return (sums.square() + x.flip(2).square()).cumsum(2).flip(2)


def _raised(
    p: AdditiveStateProblem,
    part: int | None,
    operands: Operands[torch.Tensor],
    errors: StepErrors,
    kind: Kind,
) -> Blocks[torch.Tensor]:
    """The recurrence with every decay as large as a kernel may have it.

    For kind "cancelled", of squares and with the weights that :class:`Runs` names.
    """
    a, layout = Float64(), p.layout(part)
    gates = torch.zeros(p.part_of(part, p.resets).shape, dtype=torch.float64)
    if p.g is not None:
        gates = gates + p.log_decays(a, p.part_of(part, p.g)[:, :, None])[:, :, 0]
    own, power = 1.0, _POWER[kind]
    worse = GateErrors.of(power * gates, errors)
    if kind == "cancelled":
        # Gates are doubled here, and with them their sums.
        worse, own = replace(worse, raised=power * gates, before=(worse.sums / power).square()), 0.0

    # What is written last reaches the final state and its own read without crossing a position.
    before = torch.cat([worse.before[:, :, :-1], torch.full_like(worse.before[:, :, -1:], own)], 2)

    def raised(x: Writes[torch.Tensor], far: bool) -> Writes[torch.Tensor]:
        return replace(x, gates=layout.cut(worse.raised, far=far).masked_fill(x.resets, 0.0))

    x = _each_write(operands, raised)
    decays = Decays.of(a, x.near, x.far, exclusive=x.bonus is not None)
    crossing = ~torch.eye(x.near.resets.shape[3], dtype=torch.bool)[:, :, None]
    pairs = decays.pairs * torch.where(crossing, layout.cut(before)[:, :, :, None], own)
    decays = replace(decays, pairs=pairs, suffix=decays.suffix * layout.cut(before, far=True))
    return Blocks(a, replace(x, initial=x.initial * own), decays)
