"""Attention whose weights depend on each score alone: o_i = Σ_j w(s_ij) v_j / c, s_ij = scale · q_i·k_j + b.

The gradients of Σ o·dO, with P = w(S) over the keys that a query sees and dP = dO Vᵀ (Ramapuram et al. 2024,
arXiv 2409.04431; theory SIG-9, no row reduction):

    dS = w'(S) ∘ dP,   dQ = scale · dS K / c,   dK = scale · dSᵀ Q / c,   dV = Pᵀ dO / c,

those of K and V summed over the query heads that share them. What w, b and c are, a family says.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.base import ASKED, dtype_name
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings, half_spacing
from attnproof.properties.budgets.stored import stored_budget
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import checked_tensors, finite, number
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask
from attnproof.properties.families.gradients import heads_together
from attnproof.properties.families.visibility import visible

__all__ = ["PointwiseFamily", "PointwiseProblem", "with_edges"]

# Random signs with which responses to rounded operands are sampled: the standard deviation that comes out is
# itself accurate to 1/√(2·probes), 35 %, of a part of the budget.
_PROBES = 4


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
        return self._gradients(
            arithmetic, self._pieces(arithmetic, cotangents["o"]), cotangents["o"], early=False
        )

    def _output(self, a: Arithmetic[V], p: V, v: torch.Tensor, *, early: bool) -> V:
        """P V / c; ``early`` divides P before it is stored."""
        if early:
            return a.matmul(a.store(self._divided(a, p), "probabilities"), a.exact(v))
        return self._divided(a, a.matmul(a.store(p, "probabilities"), a.exact(v)))

    def _pieces(self, a: Arithmetic[V], cotangent: torch.Tensor) -> tuple[V, V, V]:
        """P and w'(S), 0 where nothing is seen, and dP as it is stored; all (B, H, M, N)."""
        s = self.scores(a)
        p, slope = a.masked(self.weights(a, s), self.seen), a.masked(self.slopes(a, s), self.seen)
        dp = a.matmul(a.exact(cotangent), a.transpose(a.exact(self.values())))
        return p, slope, a.store(dp, "dscores")

    def _gradients(
        self, a: Arithmetic[V], pieces: tuple[V, V, V], cotangent: torch.Tensor, *, early: bool
    ) -> dict[str, V]:
        """dq, dk, dv; ``early`` applies scale and 1/c to dS and P before they are stored."""
        p, slope, dp = pieces
        groups = self.k.shape[1]
        ds = a.mul(slope, dp)
        if early:
            p, ds = self._divided(a, p), a.scaled(self._divided(a, ds), self.scale)
        p, ds = a.store(p, "probabilities"), a.store(ds, "dscores")
        dq = a.matmul(ds, a.store(a.exact(self.keys()), "operand"))
        q = heads_together(a, a.store(a.exact(self.q), "operand"), groups)
        dk = a.matmul(a.transpose(heads_together(a, ds, groups)), q)
        do = heads_together(a, a.exact(cotangent), groups)
        dv = a.matmul(a.transpose(heads_together(a, p, groups)), do)
        if not early:
            dq, dk = (a.scaled(self._divided(a, x), self.scale) for x in (dq, dk))
            dv = self._divided(a, dv)
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
        a = _ScaledOperands(Roundings.of(contract, dtype), self.scale)
        p = a.masked(self.weights(a, self.scores(a)), self.seen)
        estimate = self._output(a, p, self.values(), early=False)
        if self.divisor != 1.0:
            estimate = _wider(estimate, self._output(a, p, self.values(), early=True))
        shared = _Shared(self, a).of_output()
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
        """The formulas over the arithmetic of budgets, with scale and 1/c before or after the products."""
        a = _ScaledOperands(Roundings.of(contract, dtype_name(self.dtype)), self.scale)
        cotangent = cotangents["o"]
        pieces = self._pieces(a, cotangent)
        early, late = (self._gradients(a, pieces, cotangent, early=early) for early in (True, False))
        shared = _Shared(self, a).of_gradients(pieces, cotangent)
        found = {}
        for name in late:
            estimate = _wider(early[name], late[name])
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


@dataclass(frozen=True, eq=False)
class _Shared:
    """Errors that many terms of one sum have in common, and that do not average out: variances, to be added.

    * Rounded constants: b moves all scores alike, scale stretches them.
    * A query that is rounded (scaled, or to a narrower format) moves all scores of its row, a key those of
      its column: sampled with random signs, as E (Σ_d r_d c_d)² = Σ_d c_d².
    * Equal dP, as of ones for a cotangent or constant values, are rounded by the same amount; of equal
      operands of a product ``Propagation`` takes care.
    """

    problem: PointwiseProblem
    a: Propagation

    def of_output(self) -> torch.Tensor:
        """For o (B, H, M, E)."""
        c, v = self.problem.divisor, self.problem.values().double()

        def output(s: torch.Tensor) -> torch.Tensor:
            return self._local(s)[0] @ v / c

        s = self._scores()
        exact = output(s)
        total = torch.zeros_like(exact)
        for t in self._constants(s):
            total += (output(s + t) - exact).square()
        for t, _ in self._probes(_PROBES):
            total += (output(s + t) - exact).square() / _PROBES
        return total

    def of_gradients(
        self, pieces: tuple[Estimate, Estimate, Estimate], cotangent: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """For dq, dk, dv, from P, w'(S) and dP."""
        p, slope, dp = pieces
        problem, factor = self.problem, self.problem.scale / self.problem.divisor
        k, q, do = (
            problem.keys().double(),
            self._columns(problem.q.double()),
            self._columns(cotangent.double()),
        )

        def gradients(w: torch.Tensor, ds: torch.Tensor) -> dict[str, torch.Tensor]:
            dk, dv = self._columns(ds).mT @ q, self._columns(w).mT @ do
            return {"dq": ds @ k * factor, "dk": dk * factor, "dv": dv / problem.divisor}

        def moved(s: torch.Tensor) -> dict[str, torch.Tensor]:
            w, w1 = self._local(s)
            return gradients(w, w1 * dp.value)

        s = self._scores()
        exact = moved(s)
        total = {name: torch.zeros_like(x) for name, x in exact.items()}
        for t in self._constants(s):
            for name, x in moved(s + t).items():
                total[name] += (x - exact[name]).square()
        for by_query, by_key in self._probes(_PROBES):
            rows, columns = moved(s + by_query), moved(s + by_key)
            for name, found in (("dq", rows), ("dk", columns), ("dv", columns)):
                total[name] += (found[name] - exact[name]).square() / _PROBES
        ds, size = slope.value * dp.value, dp.value.abs()
        together = gradients(p.value, slope.value * dp.spread.sqrt() * dp.value.sign())
        # The mean square of an error that is uniform is a third of its bound's.
        total["dq"] += 3.0 * self._coincidence(ds, size) * together["dq"].square()
        by_column = self._coincidence(self._columns(ds).mT, self._columns(size).mT)
        total["dk"] += 3.0 * by_column * together["dk"].square()
        return total

    def _columns(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, M, X) as (B, G, H/G·M, X)."""
        return x.reshape(x.shape[0], self.problem.k.shape[1], self.problem.group * x.shape[2], x.shape[3])

    def _local(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """P and w' of scores s, float64 (B, H, M, N)."""
        a, seen = EnclosureArithmetic(), self.problem.seen
        p, slope = self.problem.weights(a, a.exact(s)), self.problem.slopes(a, a.exact(s))
        return a.midpoint(a.masked(p, seen)), a.midpoint(a.masked(slope, seen))

    def _scores(self) -> torch.Tensor:
        a = EnclosureArithmetic()
        return a.midpoint(self.problem.scores(a))

    def _constants(self, s: torch.Tensor) -> list[torch.Tensor]:
        """What a standard deviation of the rounding of b and of scale adds to the scores."""
        a, u = EnclosureArithmetic(), 2.0 * self.a.r.elementwise / math.sqrt(3.0)
        b = a.midpoint(self.problem.shifted(a, a.exact(torch.zeros_like(s))))
        stretched = u * (s - b)
        return [stretched, u * b] if bool(b.any()) else [stretched]

    def _probes(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What rounded queries, and rounded keys, add to the scores, under random signs."""
        r, scale = self.a.r, self.problem.scale
        unit = max(r.operand, r.input)
        if not unit:
            return []
        generator = torch.Generator().manual_seed(0)
        q, k = self.problem.q.double(), self.problem.keys().double()
        factors = ((q * scale, k), (k * scale, q))
        moved = []
        for _ in range(count):
            signs = torch.randint(0, 2, (q.shape[-1],), generator=generator).double() * 2.0 - 1.0
            rows, columns = (
                torch.where(x == 0, 0.0, (unit * math.sqrt(MEAN_SQUARE) * x.abs()).clamp(min=r.operand_tiny))
                * signs
                @ other.mT
                for x, other in factors
            )
            moved.append((rows, columns.mT))
        return moved

    def _coincidence(self, mass: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Chance (…, 1) that two terms of a row, drawn by |mass|, are not one but agree in |size| to u/4.

        u is that of the format in which dP is stored.
        """
        mass, size = mass.abs(), size.abs()
        if not mass.shape[-1]:
            return mass.new_zeros((*mass.shape[:-1], 1))
        near = max(self.a.r.storage("dscores")[0], self.a.r.operand) / 4.0
        logs, order = size.clamp(min=1e-300).log().contiguous().sort(-1)
        ordered = mass.gather(-1, order)
        below = torch.nn.functional.pad(ordered.cumsum(-1), (1, 0))
        high = below.gather(-1, torch.searchsorted(logs, logs + near, right=True))
        low = below.gather(-1, torch.searchsorted(logs, logs - near, right=False))
        pairs = (ordered * (high - low - ordered)).sum(-1, keepdim=True).clamp(min=0.0)
        return pairs / below[..., -1:].square().clamp(min=1e-300)


class _ScaledOperands(Propagation):
    """Budgets in which a stored operand may have been scaled before, and be subnormal by that."""

    def __init__(self, r: Roundings, scale: float) -> None:
        super().__init__(r)
        self.factor = min(abs(scale), 1.0)

    def store(self, a: Estimate, kind: str) -> Estimate:
        stored = super().store(a, kind)
        tiny = self.r.operand_tiny
        if kind != "operand" or not tiny or not self.factor:
            return stored
        present = (a.value != 0).double() / self.factor
        spacing = half_spacing(a.value * self.factor, self.r.operand, tiny) * present
        return replace(
            stored,
            certain=torch.maximum(stored.bound, tiny * present),
            variance=torch.maximum(stored.spread, spacing.square() / 3.0),
        )


def _wider(a: Estimate, b: Estimate) -> Estimate:
    """The errors of a kernel that may compute the same numbers in either of two orders."""
    marks = [x for x in (a.lost, b.lost) if x is not None]
    lost = torch.stack([x.expand(a.value.shape) for x in marks]).any(0) if marks else None
    return Estimate(a.value, torch.maximum(a.bound, b.bound), torch.maximum(a.spread, b.spread), lost)


def with_edges(
    budget: Budget, contract: Contract, poisoned: torch.Tensor, tainted: torch.Tensor, keyless: torch.Tensor
) -> Budget:
    """What contract.md's edges leave open or ask literally, put into the budget of an output (B, H, M, E).

    Args:
        poisoned, keyless: bool (B, H, M), rows that see a non-finite input, or no key.
        tainted: bool (B, H), heads that hold a non-finite input, seen or not.
    """
    shape = tuple(budget.certain.shape)
    seen_bad = broadcast_mask(poisoned, shape)
    empty = broadcast_mask(keyless, shape) & ~seen_bad
    leaking = torch.zeros_like(empty)
    if contract.unseen_nonfinite == "may-leak":
        leaking = broadcast_mask(tainted, shape) & ~seen_bad
    asked = contract.empty_row
    undefined = empty & (asked == "undefined")
    reasons = {
        **budget.reasons,
        "an unseen key is non-finite and the kernel declares that it may leak": int(leaking.sum()),
        "the contract leaves rows without keys open": int(undefined.sum()),
    }
    return replace(
        budget,
        open=budget.open | leaking | undefined,
        literal={} if asked == "undefined" else {ASKED[asked]: empty & ~leaking},
        reasons={reason: count for reason, count in reasons.items() if count},
    )


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
