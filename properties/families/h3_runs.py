"""The evaluations from which :mod:`attnproof.properties.budgets.ssm` makes budgets of ``h3``."""

from __future__ import annotations

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
from attnproof.properties.families.h3_response import Operands, Response
from attnproof.properties.families.state_kernel import Modes, StateKernel
from attnproof.properties.families.state_layout import scattered

if TYPE_CHECKING:
    from attnproof.properties.families.h3 import H3Problem

__all__ = ["H3Runs"]

_OF_MODES = ("da", "db", "dc")


@dataclass(frozen=True, eq=False)
class H3Runs:
    """Estimates for a problem's output and gradients."""

    problem: H3Problem

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Evaluations that differ for this problem: real modes have no other part."""
        return tuple(kind for kind in KINDS if kind != "turned" or self.problem.modes.complex)

    def errors(self, r: Roundings, *, backward: bool) -> ModeErrors:
        """Of the problem's terms: q, k' and the state, or K, are rounded operands."""
        batch, _, length, width, values = self.problem.sizes
        terms = width + self.problem.tensors["taps"].shape[2]
        if backward:
            terms = width + values + batch * (length + self.problem.tensors["taps"].shape[2])
        return ModeErrors.of(self.problem.modes, r, length, backward=backward, rounded=3, terms=terms)

    def _kernel(self, modes: Modes) -> torch.Tensor:
        return StateKernel(Float64(), modes, self.problem.sizes[2]).kernel()

    def operands(self, kind: Kind, errors: ModeErrors | None) -> Operands:
        """Changed, with the kernel and the keys of agreeing terms for squares."""
        x = self.problem.operands
        modes, kernel, keys = changed_modes(x.modes, kind, errors), None, None
        if kind in ("squares", "crossed"):
            of = (x.modes, modes, changed_modes(x.modes, "squares", None))
            kernel = agreeing_kernel(*(self._kernel(each) for each in of))
            actual = Response(Float64(), self._changed(x, "actual", x.modes)).keys
            squares = Response(Float64(), self._changed(x, kind, modes)).keys
            keys = (actual.square() + squares)[:, :, : x.k.shape[2]]
        return replace(self._changed(x, kind, modes), kernel=kernel, keys=keys)

    @staticmethod
    def _changed(x: Operands, kind: Kind, modes: Modes) -> Operands:
        """Every tensor but the kernel and the keys."""
        diagonal = None if x.d_diag is None else changed(x.d_diag, kind) * float(kind != "turned")
        return replace(
            x,
            q=changed(x.q, kind),
            k=changed(x.k, kind),
            v=changed(x.v, kind),
            taps=changed(x.taps, kind),
            modes=modes,
            d_shift=None if x.d_shift is None else changed(x.d_shift, kind),
            d_diag=diagonal,
        )

    def read(self, kind: Kind, errors: ModeErrors | None) -> torch.Tensor:
        """o of one kind, 0 in rows that are not judged."""
        reads = Response(Float64(), self.operands(kind, errors)).reads()
        return scattered(Float64(), reads, self.problem.rows, self.problem.sizes[2])

    def absolute_size(self) -> torch.Tensor:
        """Σ|terms|, a little too small."""
        return (self.read("absolute", None) * LOWER).nan_to_num(0.0, 0.0)

    def output(self, r: Roundings, *, fourier: bool) -> Estimate:
        """What a kernel may make of o, before it is stored."""
        errors = self.errors(r, backward=False)
        found = {kind: self.read(kind, errors) for kind in self.kinds}
        known = estimate(runs_of(found), errors.terms, r, self._underflow(r))
        assert known.lost is not None
        known = replace(known, value=found["actual"], lost=known.lost | self._overflow(r))
        if fourier:
            certain, variance = self._fourier(r)
            known = replace(known, certain=known.bound + certain, variance=known.spread + variance)
        return known

    def gradients(self, r: Roundings, do: torch.Tensor) -> dict[str, Estimate]:
        """Every gradient."""
        p, errors = self.problem, self.errors(r, backward=True)
        found: dict[str, dict[Kind, torch.Tensor]] = {}
        for kind in self.kinds:
            response = Response(Float64(), self.operands(kind, errors))
            for name, x in response.gradients(changed(do, kind)).items():
                pairs = p.modes.complex and name in _OF_MODES
                real = pairs and kind not in ("actual", "turned")
                found.setdefault(name, {})[kind] = x[..., None] if real else x
        tiny = self._gradient_underflow(r, do)
        result = {}
        for name, kinds in found.items():
            actual = kinds["actual"]
            if p.modes.complex and name in _OF_MODES:
                kinds["turned"] = actual.flip(-1)
            shaped = {kind: x.expand(actual.shape)[..., None] for kind, x in kinds.items()}
            known = estimate(runs_of(shaped), errors.terms, r, tiny)
            assert known.lost is not None
            result[name] = Estimate(actual, known.bound[..., 0], known.spread[..., 0], known.lost[..., 0])
        return result

    def _fourier(self, r: Roundings) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors of a kernel that convolves every k'_d v_e with K by transforms, read by q."""
        p, x = self.problem, self.problem.operands
        keys = Response(Float64(), self._changed(x, "actual", x.modes)).keys[:, :, : p.sizes[2]]
        kernel = self._kernel(x.modes)[None, :, : p.sizes[2]]
        certain, variance = (torch.zeros(p.shape("o"), dtype=torch.float64) for _ in range(2))
        for d in range(p.sizes[3]):
            written = (keys[..., d, None] * x.v.double()).mT  # (B, H, E, N)
            error, square = fourier_error(fourier_sizes(kernel[:, :, None], written), r)
            q = x.q[..., d, None].double()
            certain = certain + q.abs() * error[:, :, None]
            variance = variance + q.square() * square[:, :, None]
        return certain, variance

    def _sizes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """‖q‖₁ (B, H, N, 1), the largest |k'| of a position (B, H, N, 1), and Σ|c||a|ⁱ|b| (H, N)."""
        p = self.problem
        x = self.operands("absolute", None)
        keys = Response(Float64(), x).keys[:, :, : p.sizes[2]]
        largest = keys.amax(-1, keepdim=True) if keys.shape[-1] else keys.sum(-1, keepdim=True)
        kernel = self._kernel(x.modes)[:, : p.sizes[2]]
        return x.q.sum(-1, keepdim=True), largest, kernel

    def _underflow(self, r: Roundings) -> torch.Tensor:
        """What operands, weights, powers and products lose where they are subnormal or flushed."""
        p = self.problem
        asked, keys, kernel = self._sizes()
        most = kernel.cummax(-1).values if kernel.shape[-1] else kernel
        if "d_diag" in p.tensors:
            most = most + p.tensors["d_diag"].double().abs()[:, None]
        most = most[None, ..., None]
        v = p.tensors["v"].double().abs()
        held = max(r.operand_tiny, r.storage("probabilities")[1])
        written = (keys * v).cumsum(2)
        lost = held * (v.cumsum(2) * (1.0 + asked * (1.0 + most)) + asked * (1.0 + written))
        unit = max(r.accumulate_tiny, FLUSHED if r.elementwise > 2.0**-30 else 0.0)
        c = moduli(p.modes.c, p.modes).sum(-1)[:, None, None]
        b = moduli(p.modes.b, p.modes).sum(-1)[:, None, None]
        count = float(sum(p.sizes[3:]) + p.modes.a.shape[1] + p.tensors["taps"].shape[2])
        factor = (1.0 + asked) * (1.0 + most + b + c) * ((1.0 + keys) * (1.0 + v)).cumsum(2)
        grown = largest_powers(p.modes, p.sizes[2])[..., None]
        return (lost + 8.0 * unit * count * factor) * grown

    def _gradient_underflow(self, r: Roundings, do: torch.Tensor) -> float:
        """The same for gradients, where factors are sums over a whole sequence."""
        p = self.problem
        unit = max(r.operand_tiny, r.probabilities_tiny, r.storage("dscores")[1])
        size = 1.0
        for name, x in (*p.tensors.items(), ("do", do)):
            if name != "a":
                size *= 1.0 + (float(x.detach().double().abs().max()) if x.numel() else 0.0)
        count = float(p.sizes[2] * (p.sizes[3] + p.sizes[4]) + 1)
        if unit < 2.0**-100:
            count = count * float(p.sizes[2] * max(p.sizes[0], 1) * (p.modes.a.shape[1] + 1) + 1)
        grown = largest_powers(p.modes, p.sizes[2])
        return unit * size * count * (float(grown.max()) if grown.numel() else 1.0)

    def _overflow(self, r: Roundings) -> torch.Tensor:
        """Elements of o behind a state, a weight or a key that its format may not hold; bool (B, H, N, E)."""
        p = self.problem
        asked, keys, kernel = self._sizes()
        limit = min(r.storage("operand")[2], r.storage("probabilities")[2], r.largest) / 2.0
        x = self.operands("absolute", None)
        states = replace(
            x,
            q=torch.ones_like(keys),
            k=keys,
            keys=keys,
            taps=torch.zeros(p.sizes[1], 1, 0, dtype=torch.float64),
            d_shift=None,
            modes=replace(x.modes, c=torch.ones_like(x.modes.c)),
        )
        high = scattered(Float64(), Response(Float64(), states).reads(), p.rows, p.sizes[2]) >= limit
        over = (kernel >= limit) | (largest_powers(p.modes, p.sizes[2]) >= r.largest / 2.0)
        heads = over[None, ..., None] | (keys >= limit)
        found = high | heads.expand(high.shape)
        if p.sizes[2]:
            found = found.long().cummax(2).values > 0
            reach = keys.cummax(2).values * asked
            # A weight is at most its score times the largest of the mask.
            most = kernel.cummax(-1).values
            if "d_diag" in p.tensors:
                most = most + p.tensors["d_diag"].double().abs()[:, None]
            found = found | (reach * most.clamp(min=1.0)[None, ..., None] >= limit)
        return found
