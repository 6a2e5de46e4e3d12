"""The evaluations from which :mod:`attnproof.properties.budgets.ssm` makes budgets of ``ssm``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from attnproof.properties.budgets.additive_state import estimate
from attnproof.properties.budgets.float64 import Float64
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.ssm import (
    FLUSHED,
    KINDS,
    LOWER,
    Kind,
    ModeErrors,
    agreeing_kernel,
    changed,
    changed_modes,
    fourier_error,
    fourier_sizes,
    largest_powers,
    moduli,
    runs_of,
)
from attnproof.properties.families.ssm_response import Operands, Response
from attnproof.properties.families.state_kernel import StateKernel, padded

if TYPE_CHECKING:
    from attnproof.properties.families.ssm import SSMProblem

__all__ = ["SSMRuns"]

_READ = ("y", "du", "dd")


@dataclass(frozen=True, eq=False)
class SSMRuns:
    """Estimates for a problem's outputs and gradients."""

    problem: SSMProblem

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Evaluations that differ for this problem: real modes have no other part."""
        return tuple(kind for kind in KINDS if kind != "turned" or self.problem.modes.complex)

    def errors(self, r: Roundings, *, backward: bool) -> ModeErrors:
        """Of the problem's terms."""
        p = self.problem
        terms = p.u.shape[0] * p.u.shape[2] if backward else 0
        return ModeErrors.of(p.modes, r, p.u.shape[2], backward=backward, terms=terms)

    def operands(self, part: int | None, kind: Kind, errors: ModeErrors | None) -> Operands:
        """Those of one part, changed, with the kernel of agreeing modes for squares."""
        x = self.problem.operands(part)
        modes, initial, kernel = changed_modes(x.modes, kind, errors), x.initial, None
        if initial is not None and kind not in ("actual", "turned"):
            initial = changed(moduli(initial, x.modes), kind)
        if kind in ("squares", "crossed"):
            of = (x.modes, modes, changed_modes(x.modes, "squares", None))
            kernel = agreeing_kernel(*(self._kernel(each, x.u.shape[2]) for each in of))
        d = None if x.d is None else changed(x.d, kind) * float(kind != "turned")
        return replace(x, modes=modes, u=changed(x.u, kind), d=d, initial=initial, kernel=kernel)

    @staticmethod
    def _kernel(modes: object, length: int) -> torch.Tensor:
        return StateKernel(Float64(), modes, length).kernel()  # type: ignore[arg-type]

    def response(self, part: int | None, kind: Kind, errors: ModeErrors | None) -> Response[torch.Tensor]:
        """The part's response in plain float64."""
        return Response(Float64(), self.operands(part, kind, errors))

    def results(self, kind: Kind, errors: ModeErrors | None) -> dict[str, torch.Tensor]:
        """y (B, H, N), 0 in rows that are not judged, and the final states, of one kind."""
        p, a = self.problem, Float64()
        found = [self.response(part, kind, errors) for part in p.parts()]
        result = {"y": p.placed(a, [x.reads() for x in found])}
        if "state" in p.outputs:
            states = [x.x.modes.stacked(a, x.final()) for x in found]
            result["state"] = torch.cat(states, 0)
        return {name: self._shaped(name, kind, x) for name, x in result.items()}

    def _shaped(self, name: str, kind: Kind, x: torch.Tensor) -> torch.Tensor:
        """Results of real runs in place of both parts of a complex one."""
        pairs = self.problem.modes.complex and name not in _READ
        return x[..., None] if pairs and kind not in ("actual", "turned") else x

    def estimate_of(
        self,
        name: str,
        found: Mapping[Kind, torch.Tensor],
        errors: ModeErrors,
        r: Roundings,
        tiny: torch.Tensor,
    ) -> Estimate:
        """From all kinds of one output or gradient."""
        actual = found["actual"]
        held = dict(found)
        if self.problem.modes.complex and name not in _READ:
            held["turned"] = actual.flip(-1)
        elif name == "dd":
            held.pop("turned", None)
        held = {kind: x.expand(actual.shape)[..., None] for kind, x in held.items()}
        known = estimate(runs_of(held), errors.terms, r, tiny.expand(actual.shape)[..., None])
        assert known.lost is not None
        return Estimate(actual, known.bound[..., 0], known.spread[..., 0], known.lost[..., 0])

    def absolute_sizes(self) -> dict[str, torch.Tensor]:
        """Σ|terms| of the outputs, a little too small."""
        found = self.results("absolute", None)
        return {
            name: (x * LOWER).nan_to_num(0.0, 0.0).expand(self.problem.shape(name))
            for name, x in found.items()
        }

    def outputs(self, r: Roundings) -> dict[str, Estimate]:
        """What a kernel may make of the outputs, before they are stored."""
        errors = self.errors(r, backward=False)
        found: dict[str, dict[Kind, torch.Tensor]] = {}
        for kind in self.kinds:
            for name, x in self.results(kind, errors).items():
                found.setdefault(name, {})[kind] = x
        tiny, over = self._underflow(r), self._overflow(r)
        result = {}
        for name, kinds in found.items():
            known = self.estimate_of(name, kinds, errors, r, tiny[name])
            lost = over if name == "y" else self.problem.sequences.closed_states(over)
            shape = known.value.shape
            lost = lost.reshape(lost.shape + (1,) * (len(shape) - lost.dim())).expand(shape)
            result[name] = replace(known, lost=lost if known.lost is None else lost | known.lost)
        return result

    def gradients(
        self, r: Roundings, cotangents: Mapping[str, torch.Tensor], *, fourier: bool
    ) -> dict[str, Estimate]:
        """Every gradient; with ``fourier`` also of kernels that convolve by transforms."""
        p, errors = self.problem, self.errors(r, backward=True)
        found: dict[str, dict[Kind, torch.Tensor]] = {}
        for kind in self.kinds:
            parts = []
            for part in p.parts():
                dy, dfinal = p.cotangents(part, cotangents)
                if dfinal is not None and kind not in ("actual", "turned"):
                    dfinal = changed(moduli(dfinal, p.modes), kind)
                response = self.response(part, kind, errors)
                parts.append(response.gradients(changed(dy, kind), dfinal))
            for name, x in self._gathered(parts).items():
                found.setdefault(name, {})[kind] = self._shaped(name, kind, x)
        tiny = self._gradient_underflow(r, cotangents)
        extra = self._fourier_gradients(r, cotangents) if fourier else {}
        result = {}
        for name, kinds in found.items():
            known = self.estimate_of(name, kinds, errors, r, torch.tensor(tiny, dtype=torch.float64))
            if name in extra:
                certain, variance = (x.expand(known.value.shape) for x in extra[name])
                known = replace(known, certain=known.bound + certain, variance=known.spread + variance)
            result[name] = known
        return result

    def _gathered(self, parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Gradients of every part as those of the call."""
        result = {}
        for name in self.problem.given:
            pieces = [x[f"d{name}"] for x in parts]
            if name == "u":
                result["du"] = torch.cat(pieces, -1)
            elif name == "initial_state":
                result["dinitial_state"] = torch.cat(pieces, 0)
            else:
                result[f"d{name}"] = torch.stack(pieces).sum(0)
        return result

    def fourier_sizes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """What the error of a convolution by transforms is measured by; of calls that are not packed."""
        p = self.problem
        kernel = self._kernel(p.modes, p.u.shape[2])[:, : p.u.shape[2]]
        return fourier_sizes(kernel[None], p.u.double())

    def _fourier_gradients(
        self, r: Roundings, cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Errors of du as a correlation with K, and of dK as one of dy and u, carried on to a, b and c."""
        p, length = self.problem, self.problem.u.shape[2]
        dy = p.cotangents(None, cotangents)[0].double()
        kernel = self._kernel(p.modes, length)[:, :length]
        certain, variance = fourier_error(fourier_sizes(kernel[None], dy.flip(-1)), r)
        result = {"du": (certain[..., None], variance[..., None])}
        certain, variance = fourier_error(fourier_sizes(dy.flip(-1), p.u.double()), r)
        of_kernel, spread = certain.sum(0)[:, None], variance.sum(0)[:, None]
        a, b, c = (moduli(x, p.modes) for x in (p.modes.a, p.modes.b, p.modes.c))
        powers = a[..., None] ** torch.arange(max(length, 1), dtype=torch.float64)
        slopes = padded(powers[..., :-1], length) if length else powers * 0.0
        slopes = slopes.roll(1, -1) * torch.arange(max(length, 1), dtype=torch.float64)
        for name, other, weights in (("da", b * c, slopes), ("db", c, powers), ("dc", b, powers)):
            size = other * weights.sum(-1) * of_kernel
            square = other.square() * weights.square().sum(-1) * spread
            pairs = p.modes.complex
            result[name] = (size[..., None], square[..., None]) if pairs else (size, square)
        return result

    def _underflow(self, r: Roundings) -> dict[str, torch.Tensor]:
        """What products, powers and operands lose where they are subnormal or flushed.

        Each position's state may lose a few smallest numbers, which c reads for as long as they last; a
        kernel's powers and products lose them times what they are multiplied by; operands of products
        likewise in their own format.
        """
        p = self.problem
        b, c = (moduli(x, p.modes).sum(-1)[:, None] for x in (p.modes.b, p.modes.c))
        both = (moduli(p.modes.b, p.modes) * moduli(p.modes.c, p.modes)).sum(-1)[:, None]
        unit = max(r.accumulate_tiny, FLUSHED if r.elementwise > 2.0**-30 else 0.0)
        held = r.operand_tiny
        width = float(p.modes.a.shape[1])
        reads, finals = [], []
        for part in p.parts():
            u = p.part_of_rows(part, p.u).double().abs().cumsum(-1)
            count = torch.arange(1, u.shape[-1] + 1, dtype=torch.float64)
            start = p.part_of_states(part, p.initial_state)
            if start is not None:
                u = u + moduli(start, p.modes).sum(-1)[..., None]
            grown = largest_powers(p.modes, u.shape[-1])
            lost = 8.0 * unit * ((1.0 + c) * count * (1.0 + width) + (1.0 + b + c + both + width) * u)
            lost = lost + held * (4.0 + c + (1.0 + b + c) * u)
            reads.append(lost * grown)
            last = 8.0 * unit * (count * 2.0 + (1.0 + b) * u) + held * (1.0 + b) * u
            last = (last * grown)[..., -1] if u.shape[-1] else torch.zeros(u.shape[:-1], dtype=torch.float64)
            finals.append(last)
        y = p.sequences.joined(reads, p.u.double()) if p.sequences.packed else reads[0]
        state = torch.cat(finals, 0)[..., None]
        return {"y": y, "state": state[..., None] if p.modes.complex else state}

    def _gradient_underflow(self, r: Roundings, cotangents: Mapping[str, torch.Tensor]) -> float:
        """The same for gradients, where factors are sums over a whole sequence."""
        p = self.problem
        unit = max(r.operand_tiny, r.accumulate_tiny, FLUSHED if r.elementwise > 2.0**-30 else 0.0)
        size = 1.0
        for x in (p.u, p.modes.b, p.modes.c, *cotangents.values()):
            size *= 1.0 + (float(x.detach().double().abs().max()) if x.numel() else 0.0)
        count = float(p.u.shape[2] * p.modes.a.shape[1] + 1)
        if unit < 2.0**-100:
            count = count * float(p.u.shape[2] * max(p.u.shape[0], 1) + 1)
        grown = largest_powers(p.modes, p.u.shape[2])
        return unit * size * count * (float(grown.max()) if grown.numel() else 1.0)

    def _overflow(self, r: Roundings) -> torch.Tensor:
        """Positions from which a state, a power of a or the kernel may not be held; bool (B, H, N)."""
        p = self.problem
        masks = []
        limit = min(r.storage("operand")[2], r.largest) / 2.0
        for part in p.parts():
            x = self.operands(part, "absolute", None)
            length = x.u.shape[2]
            unread = replace(x.modes, c=torch.ones_like(x.modes.c))
            every = replace(x, modes=unread, rows=x.rows)
            high = Response(Float64(), every).reads() >= limit
            kernel = self._kernel(x.modes, length)[:, :length]
            over = (kernel >= limit) | (largest_powers(p.modes, length) >= r.largest / 2.0)
            whole = torch.zeros(x.u.shape, dtype=torch.bool)
            whole[..., x.rows] = high
            masks.append(whole | over[None])
        found = p.sequences.joined(masks, p.u.bool()) if p.sequences.packed else masks[0]
        return p.sequences.closed(found)
