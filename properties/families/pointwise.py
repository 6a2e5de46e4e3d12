"""Attention whose weights depend on each score alone: o_i = Σ_j w(s_ij) v_j / c, s_ij = scale · q_i·k_j + b.

The gradients of Σ o·dO, with P = w(S) over the keys that a query sees and dP = dO Vᵀ (Ramapuram et al. 2024,
arXiv 2409.04431; theory SIG-9, no row reduction):

    dS = w'(S) ∘ dP,   dQ = scale · dS K / c,   dK = scale · dSᵀ Q / c,   dV = Pᵀ dO / c,

those of K and V summed over the query heads that share them. What w, b and c are, a family says.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.budgets.pointwise import SharedErrors
from attnproof.properties.budgets.propagation import Estimate, ScaledOperands, coincidence, wider
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.stored import stored_budget, with_edges
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import checked_tensors, finite, number
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask
from attnproof.properties.families.gradients import heads_together
from attnproof.properties.families.visibility import visible

__all__ = ["PointwiseFamily", "PointwiseProblem"]


@dataclass(frozen=True, eq=False)
class PointwiseProblem(Problem):
    """Finite inputs of one call, and what each query sees.

    Attributes:
        q: (B, H, M, D); k: (B, G, N, D); v: (B, G, N, E); non-finite entries replaced by 0.
        seen: bool (B, H, M, N), whether query i sees key j.
        poisoned: bool (B, H, M), rows that see a non-finite input.
        tainted: bool (B, H), heads in which some key or value is non-finite, seen or not.
        masked: whether the call has a mask.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor
    scale: float
    poisoned: torch.Tensor
    tainted: torch.Tensor
    masked: bool

    outputs = ("o",)
    differentiated = ("q", "k", "v")

    @abstractmethod
    def weights(self, a: Arithmetic[V], s: V) -> V:
        """w(s), element by element."""

    @abstractmethod
    def slopes(self, a: Arithmetic[V], s: V) -> V:
        """w'(s), element by element."""

    def shifted(self, a: Arithmetic[V], s: V) -> V:
        """s with what the family adds to a scaled score."""
        return s

    @property
    def divisor(self) -> float:
        """c, a positive number that divides the sum over keys."""
        return 1.0

    @property
    def row_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(B, H, M)."""
        return tuple(self.q.shape[:3])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the call's tensors."""
        return self.q.dtype

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite, seen or not."""
        return bool(self.poisoned.any() | self.tainted.any())

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.q.shape[1] // max(self.k.shape[1], 1)

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of q, k or v."""
        return tuple(getattr(self, name).shape)

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, M, E)."""
        return (*self.row_shape, self.v.shape[3])

    def keys(self) -> torch.Tensor:
        """k with one entry for each query head, (B, H, N, D)."""
        return self.k.repeat_interleave(self.group, 1)

    def values(self) -> torch.Tensor:
        """v with one entry for each query head, (B, H, N, E)."""
        return self.v.repeat_interleave(self.group, 1)

    def scores(self, a: Arithmetic[V]) -> V:
        """s, (B, H, M, N), of all pairs, seen or not."""
        q, k = a.store(a.exact(self.q), "operand"), a.store(a.exact(self.keys()), "operand")
        return a.store(self.shifted(a, a.scaled(a.matmul(q, a.transpose(k)), self.scale)), "scores")

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o by the definition; with ``gauges`` also Σ w|v| / c."""
        a = arithmetic
        p = a.masked(self.weights(a, self.scores(a)), self.seen)
        result = {"o": self._output(a, p, self.values(), early=False)}
        if gauges:
            result["gauge:o"] = self._output(a, p, self.values().abs(), early=False)
        return result

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ o·cotangent by q, k and v."""
        do = arithmetic.exact(cotangents["o"])
        return self._gradients(arithmetic, self._pieces(arithmetic, do), do, divided="late")

    def _output(self, a: Arithmetic[V], p: V, v: torch.Tensor, *, early: bool) -> V:
        """P V / c; ``early`` divides P before it is stored."""
        if early:
            return a.matmul(a.store(self._divided(a, p), "probabilities"), a.exact(v))
        return self._divided(a, a.matmul(a.store(p, "probabilities"), a.exact(v)))

    def _pieces(self, a: Arithmetic[V], do: V) -> tuple[V, V, V]:
        """P and w'(S), 0 where nothing is seen, and dP as it is stored; all (B, H, M, N)."""
        s = self.scores(a)
        p, slope = a.masked(self.weights(a, s), self.seen), a.masked(self.slopes(a, s), self.seen)
        dp = a.matmul(do, a.transpose(a.exact(self.values())))
        return p, slope, a.store(dp, "dscores")

    def _gradients(self, a: Arithmetic[V], pieces: tuple[V, V, V], do: V, *, divided: str) -> dict[str, V]:
        """dq, dk, dv from P, w'(S) and dP.

        ``divided``: where 1/c comes in: "first" into dO, which is so already, "early" into P and dS before
        they are stored, with the scale, or "late" into the results.
        """
        p, slope, dp = pieces
        groups = self.k.shape[1]
        ds = a.mul(slope, dp)
        if divided == "early":
            p, ds = self._divided(a, p), a.scaled(self._divided(a, ds), self.scale)
        p, ds = a.store(p, "probabilities"), a.store(ds, "dscores")
        dq = a.matmul(ds, a.store(a.exact(self.keys()), "operand"))
        q = heads_together(a, a.store(a.exact(self.q), "operand"), groups)
        dk = a.matmul(a.transpose(heads_together(a, ds, groups)), q)
        dv = a.matmul(a.transpose(heads_together(a, p, groups)), heads_together(a, do, groups))
        if divided == "late":
            dq, dk, dv = (self._divided(a, x) for x in (dq, dk, dv))
        if divided != "early":
            dq, dk = (a.scaled(x, self.scale) for x in (dq, dk))
        return {"dq": dq, "dk": dk, "dv": dv}

    def _divided(self, a: Arithmetic[V], x: V) -> V:
        if self.divisor == 1.0:
            return x
        return a.div(x, a.exact(torch.tensor(self.divisor, dtype=torch.float64)))

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """One problem for each (batch, head) that has chosen rows, without keys that none of them sees."""
        parts: list[tuple[Problem, torch.Tensor]] = []
        batch, heads, m = self.row_shape
        for b in range(batch):
            for h in range(heads):
                chosen = rows[b, h].nonzero().flatten()
                if len(chosen):
                    used = self.seen[b, h, chosen].any(0)
                    parts.append((self._part(b, h, chosen, used), (b * heads + h) * m + chosen))
        return parts

    def _part(self, b: int, h: int, chosen: torch.Tensor, used: torch.Tensor) -> Self:
        g = h // self.group
        return replace(
            self,
            q=self.q[b, h, chosen][None, None],
            k=self.k[b, g, used][None, None],
            v=self.v[b, g, used][None, None],
            seen=self.seen[b, h, chosen][:, used][None, None],
            poisoned=self.poisoned[b, h, chosen][None, None],
            tainted=self.tainted[b, h][None, None],
        )

    def keyless(self) -> torch.Tensor:
        """Rows that see no key, bool (B, H, M)."""
        return ~self.seen.any(-1)

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """o is exactly 0 where no key is seen."""
        return {0.0: broadcast_mask(self.keyless(), self.shape("o"))}

    def undetermined(self) -> torch.Tensor:
        """Rows that see a non-finite input."""
        return self.poisoned

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """Σ w|v| / c."""
        bound = reference.get("gauge:o", reference["o"])
        return (bound.value.abs() - bound.radius).clamp(min=0.0)

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """The definition over the arithmetic of budgets, divided before or after the product, stored once."""
        dtype = dtype_name(self.dtype)
        a = ScaledOperands(Roundings.of(contract, dtype), self.scale)
        p = a.masked(self.weights(a, self.scores(a)), self.seen)
        estimate = self._output(a, p, self.values(), early=False)
        if self.divisor != 1.0:
            estimate = wider(estimate, self._output(a, p, self.values(), early=True))
        shared = SharedErrors(self, a).of_output()
        # Equal keys have equal errors: a sum over them does not average these out.
        alike = 3.0 * coincidence(p.value, 2.0**-24) if p.value.numel() else 0.0
        shared = shared + alike * (p.spread.sqrt() @ self.values().double() / self.divisor).square()
        estimate = replace(estimate, variance=estimate.spread + shared)
        closed = broadcast_mask(self.undetermined(), self.shape("o"))
        budget = stored_budget(estimate, reference["o"].value, contract, dtype, closed)
        return {"o": with_edges(budget, contract, self.poisoned, self.tainted, self.keyless())}

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """The formulas over the arithmetic of budgets, scale and 1/c wherever a kernel may apply them."""
        a = ScaledOperands(Roundings.of(contract, dtype_name(self.dtype)), self.scale)
        do = a.exact(cotangents["o"])
        pieces = self._pieces(a, do)
        ways = [self._gradients(a, pieces, do, divided=divided) for divided in ("late", "early")]
        if self.divisor != 1.0:
            scaled = a.store(self._divided(a, do), "operand")
            ways.append(self._gradients(a, self._pieces(a, scaled), scaled, divided="first"))
        shared = SharedErrors(self, a).of_gradients(pieces, cotangents["o"])
        found = {}
        for name in ways[0]:
            estimate = functools.reduce(wider, (way[name] for way in ways))
            found[name] = replace(estimate, variance=estimate.spread + shared[name])
        return found

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether zeros would pass, or a mean of V that the sum of the weights scales, or no mask at all."""
        budget, o = budgets["o"], reference["o"].value
        judged = ~budget.open
        if not judged.any():
            return ["accuracy: nothing to judge"]
        reasons = []
        a = EnclosureArithmetic()
        mass = a.midpoint(a.masked(self.weights(a, self.scores(a)), self.seen)).sum(-1, keepdim=True)
        seen = self.seen.double()
        mean = (seen / seen.sum(-1, keepdim=True).clamp(min=1.0)) @ self.values().double()
        for other, what in ((torch.zeros_like(o), "zero"), (mass / self.divisor * mean, "the mean of V")):
            if bool((((o - other).abs() <= budget.certain) | ~judged).all()):
                scaled = "" if what == "zero" else ", times the sum of the weights,"
                reasons.append(f"accuracy: {what}{scaled} is within the budget of every row")
        if self.masked and bool(self.seen.all()):
            reasons.append("mask: every query sees every key")
        return reasons

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Keys seen, and the three with the largest weights."""
        b, h, i = row
        seen = self.seen[b, h, i]
        where = f"row (batch {b}, head {h}, query {i})"
        count = int(seen.sum())
        if not count:
            return f"{where} sees no key"
        a = EnclosureArithmetic()
        part = self._part(b, h, torch.tensor([i]), torch.ones_like(seen))
        w = a.midpoint(part.weights(a, part.scores(a))).flatten() / self.divisor
        largest, places = w.masked_fill(~seen, -torch.inf).topk(min(3, count))
        listed = ", ".join(
            f"key {j} (weight {x:.3g})" for x, j in zip(largest.tolist(), places.tolist(), strict=True)
        )
        total = float(w.masked_fill(~seen, 0.0).sum())
        return f"{where} sees {count} of {len(seen)} keys; sum of weights {total:.3g}; most weight: {listed}"


class PointwiseFamily(Family):
    """What sigmoid and ReLU attention share of a call."""

    inputs = ("q", "k", "v")
    required = ("scale",)
    sequence = ("q", "k", "v", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",)."""
        return ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype."""
        return dtype

    def checked(self, tensors: tuple[torch.Tensor, ...], options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a :class:`PointwiseProblem`.

        Raises:
            ContractError: naming the argument, what it was and what the contract asks.
        """
        self.check_keywords(options)
        q, k, v = checked_tensors(self.name, tensors)
        scale = number("scale", options["scale"])
        alignment = options.get("causal_alignment", "bottom-right")
        if alignment not in ("bottom-right", "top-left"):
            raise ContractError(f"causal_alignment={alignment!r}; expected 'bottom-right' or 'top-left'")
        causal = bool(options.get("causal", False))
        b, heads, m, _ = q.shape
        seen = visible(m, k.shape[2], causal=causal, causal_alignment=alignment)
        seen = seen.expand(b, heads, m, k.shape[2])
        finite_keys = k.isfinite().all(-1) & v.isfinite().all(-1)
        tainted = ~finite_keys.repeat_interleave(heads // k.shape[1], 1)
        return {
            "q": finite(q),
            "k": finite(k),
            "v": finite(v),
            "seen": seen,
            "scale": scale,
            "poisoned": ~q.isfinite().all(-1) | (seen & tainted[:, :, None, :]).any(-1),
            "tainted": tainted.any(-1),
            "masked": causal,
        }
