r"""Softmax attention: o_i = Σ_j p_ij v_j, p_ij = e^{s_ij} / (Σ_j e^{s_ij} + e^{sink}), lse_i = log of it.

s_ij = scale · q_i·k_j, then softcap · tanh(s_ij / softcap), then + bias_ij, over the keys j that query i sees
(causal, window, packed sequences, bias of −∞). Query head h reads key and value head h // (H/G). The maximum
that is subtracted before exp is any number near the largest score: the quotient does not depend on it.
Source: contract.md, "Calls" and "The edges"; the formula is that of Vaswani et al. 2017 with the usual
options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.base import EXP_OVERFLOW, EXP_UNDERFLOW
from attnproof.properties.budgets.propagation import Estimate
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.softmax import attention_budgets
from attnproof.properties.budgets.softmax_gradients import attention_gradient_estimates
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import (
    checked_alibi_slopes,
    checked_bias,
    checked_cu_seqlens,
    checked_sinks,
    checked_tensors,
    checked_window,
    finite,
    number,
)
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask
from attnproof.properties.families.gradients import heads_together, reduced
from attnproof.properties.families.visibility import visible

__all__ = ["SOFTMAX", "SoftmaxProblem"]


@dataclass(frozen=True, eq=False)
class SoftmaxProblem(Problem):
    """Finite inputs of one call, and what each query sees.

    Attributes:
        q: (B, H, M, D); k: (B, G, N, D); v: (B, G, N, E); non-finite entries replaced by 0.
        seen: bool (B, H, M, N), whether query i sees key j.
        bias: (B, H, M, N), or None; −inf entries are unseen and hold 0 here; bias_shape as it was given.
        alibi: float64 (1, H, M, N), −slope·|i + N − M − j|, or None.
        sinks: (H,) or None; a sink of −inf is absent from ``sink_present`` (bool, (H,)).
        poisoned: bool (B, H, M), rows that see a non-finite input.
        tainted: bool (B, H), heads in which some key or value is non-finite, seen or not.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor
    scale: float
    softcap: float | None
    bias: torch.Tensor | None
    alibi: torch.Tensor | None
    sinks: torch.Tensor | None
    sink_present: torch.Tensor | None
    poisoned: torch.Tensor
    tainted: torch.Tensor
    masked: bool
    bias_shape: tuple[int, ...] = ()
    outputs: tuple[str, ...] = ("o",)

    @property
    def row_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(B, H, M)."""
        return tuple(self.q.shape[:3])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the call's tensors."""
        return self.q.dtype

    @property
    def differentiated(self) -> tuple[str, ...]:  # type: ignore[override]
        """q, k, v, and bias and sinks where they are given."""
        given = [name for name in ("bias", "sinks") if getattr(self, name) is not None]
        return ("q", "k", "v", *given)

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a differentiated input, as it was given."""
        return self.bias_shape if name == "bias" else tuple(getattr(self, name).shape)

    @property
    def nonfinite(self) -> bool:
        """Whether an input is NaN or infinite, seen or not."""
        return bool(self.poisoned.any() | self.tainted.any())

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.q.shape[1] // max(self.k.shape[1], 1)

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, M, E) for "o", (B, H, M) for "lse"."""
        return (*self.row_shape, self.v.shape[3]) if output == "o" else self.row_shape

    def queries(self) -> torch.Tensor:
        """q, (B, H, M, D)."""
        return self.q

    def keys(self) -> torch.Tensor:
        """k with one entry for each query head, (B, H, N, D)."""
        return self.k.repeat_interleave(self.group, 1)

    def values(self) -> torch.Tensor:
        """v with one entry for each query head, (B, H, N, E)."""
        return self.v.repeat_interleave(self.group, 1)

    def operands(self, arithmetic: Arithmetic[V]) -> tuple[V, V, V]:
        """q (B, H, M, D), k (B, H, N, D) and v (B, H, N, E), as the matrix products take them."""
        a = arithmetic
        return a.exact(self.q), a.exact(self.keys()), a.exact(self.values())

    def computed(self, r: Roundings) -> tuple[Estimate, Estimate, Estimate] | None:
        """Errors of q, k and v where a kernel computes them itself before the scores; here it does not."""
        return None

    def scores(self, arithmetic: Arithmetic[V]) -> V:
        """s, (B, H, M, N), of all pairs, seen or not."""
        q, k, _ = self.operands(arithmetic)
        return self._scores(arithmetic, q, k)[0]

    def _scores(self, a: Arithmetic[V], q: V, k: V) -> tuple[V, V | None]:
        """s, and tanh(scale q·k / softcap) where there is a soft cap."""
        s = a.scaled(a.matmul(a.store(q, "operand"), a.transpose(a.store(k, "operand"))), self.scale)
        tanh = None
        if self.softcap is not None:
            cap = a.exact(torch.tensor(self.softcap, dtype=torch.float64))
            tanh = a.tanh(a.div(s, cap))
            s = a.mul(cap, tanh)
        for addend in (self.bias, self.alibi):
            if addend is not None:
                s = a.add(s, a.exact(addend))
        return a.store(s, "scores"), tanh

    def capped(self, arithmetic: Arithmetic[V], q: V, k: V) -> V | None:
        """tanh(scale q·k / softcap), (B, H, M, N), where there is a soft cap."""
        return None if self.softcap is None else self._scores(arithmetic, q, k)[1]

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o (B, H, M, E), and lse (B, H, M, 1) if asked for; 0 for a row whose normaliser is empty."""
        a = arithmetic
        q, k, v = self.operands(a)
        w, total, m, empty, _ = self._weights(a, self._scores(a, q, k)[0])
        result = {"o": a.div(a.matmul(w, v), total)}
        if gauges:
            size = a.exact(a.midpoint(v).abs())
            result["gauge:o"] = a.div(a.matmul(w, size), total)
        if "lse" in self.outputs:
            result["lse"] = a.masked(a.add(m, a.log(total)), ~empty)
        return result

    def _weights(self, a: Arithmetic[V], s: V) -> tuple[V, V, V, torch.Tensor, V | None]:
        """Weights e^{s − m} (B, H, M, N), their sum, m, which sums are empty, and the sink's weight."""
        shift = self._shift(a.midpoint(s))
        m = a.exact(shift)
        if bool(self.seen.all()):
            w = a.exp(a.sub(s, m))
        else:
            w = a.masked(a.exp(a.masked(a.sub(s, m), self.seen)), self.seen)
        total = a.sum(w)
        empty = ~self.seen.any(-1, keepdim=True)
        sunk: V | None = None
        if self.sinks is not None and self.sink_present is not None:
            present = self.sink_present.reshape(1, -1, 1, 1).expand(empty.shape)
            sink = a.sub(a.exact(self.sinks.reshape(1, -1, 1, 1).expand(empty.shape)), m)
            sunk = a.masked(a.exp(a.masked(sink, present)), present)
            total = a.add(total, sunk)
            empty = empty & ~present
        total = a.masked(total, ~empty, fill=1.0)
        return w, total, m, empty, sunk

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ outputs·cotangents by q, k, v, bias and sinks (Dao et al. 2022, Algorithm 4).

        With dP = dO Vᵀ and δ = Σ_j p dP − dlse: dS = p (dP − δ), and −p_sink δ for the sink.
        """
        a = arithmetic
        q, k, v = self.operands(a)
        s, tanh = self._scores(a, q, k)
        w, total, _, _, sunk = self._weights(a, s)
        p = a.div(w, total)
        do = a.exact(cotangents["o"])
        dp = a.matmul(do, a.transpose(v))
        delta = a.sum(a.mul(p, dp))
        if "lse" in cotangents:
            delta = a.sub(delta, a.exact(cotangents["lse"].unsqueeze(-1)))
        sink = None if sunk is None else a.div(sunk, total)
        found = self.backward(a, (q, k), p, a.mul(p, a.sub(dp, delta)), do, tanh)
        if sink is not None:
            found["dsinks"] = self.sink_gradient(a, sink, delta)
        return found

    def backward(
        self, a: Arithmetic[V], operands: tuple[V, V], p: V, ds: V, do: V, tanh: V | None
    ) -> dict[str, V]:
        """Gradients from dS (B, H, M, N); those of k and v are summed over the heads that share them."""
        q, k = operands
        result = {}
        if self.bias is not None:
            result["dbias"] = reduced(a, a.store(ds, "dscores"), self.bias_shape)
        if tanh is not None:
            one = a.exact(torch.ones((), dtype=torch.float64))
            ds = a.mul(ds, a.sub(one, a.mul(tanh, tanh)))
        ds = a.store(ds, "dscores")
        groups = self.k.shape[1]
        result["dq"] = a.scaled(a.matmul(ds, a.store(k, "operand")), self.scale)
        stacked = a.transpose(heads_together(a, ds, groups))
        dk = a.matmul(stacked, heads_together(a, a.store(q, "operand"), groups))
        result["dk"] = a.scaled(dk, self.scale)
        weights = a.transpose(heads_together(a, a.store(p, "probabilities"), groups))
        result["dv"] = a.matmul(weights, heads_together(a, do, groups))
        return result

    def sink_gradient(self, a: Arithmetic[V], sink: V, delta: V) -> V:
        """(H,): −Σ p_sink δ over batch entries and queries."""
        product = a.permute(a.mul(sink, delta), (1, 0, 2, 3))
        heads, batch, rows, _ = a.shape(product)
        return a.scaled(a.reshape(a.sum(a.reshape(product, (heads, batch * rows))), (heads,)), -1.0)

    def _shift(self, s: torch.Tensor) -> torch.Tensor:
        """The largest seen score or sink of each row, (B, H, M, 1), as far as float64 knows it.

        0 if there is none.
        """
        if s.shape[-1]:
            m = (s if bool(self.seen.all()) else s.masked_fill(~self.seen, -torch.inf)).amax(-1, keepdim=True)
        else:
            m = s.new_full((*s.shape[:-1], 1), -torch.inf)
        if self.sinks is not None and self.sink_present is not None:
            sink = self.sinks.double().masked_fill(~self.sink_present, -torch.inf)
            m = torch.maximum(m, sink.reshape(1, -1, 1, 1))
        return torch.where(m.isfinite(), m, 0.0)

    def split(self, rows: torch.Tensor) -> list[tuple[Problem, torch.Tensor]]:
        """One problem for each (batch, head) that has chosen rows.

        Keys that none of them sees are left out.
        """
        parts: list[tuple[Problem, torch.Tensor]] = []
        batch, heads, m = self.row_shape
        for b in range(batch):
            for h in range(heads):
                chosen = rows[b, h].nonzero().flatten()
                if not len(chosen):
                    continue
                used = self.seen[b, h, chosen].any(0)
                part = self._part(b, h, chosen, used)
                parts.append((part, (b * heads + h) * m + chosen))
        return parts

    def _part(self, b: int, h: int, chosen: torch.Tensor, used: torch.Tensor) -> SoftmaxProblem:
        g = h // self.group
        return replace(
            self,
            q=self.q[b, h, chosen][None, None],
            k=self.k[b, g, used][None, None],
            v=self.v[b, g, used][None, None],
            seen=self.seen[b, h, chosen][:, used][None, None],
            bias=None if self.bias is None else self.bias[b, h, chosen][:, used][None, None],
            alibi=None if self.alibi is None else self.alibi[0, h, chosen][:, used][None, None],
            sinks=None if self.sinks is None else self.sinks[h : h + 1],
            sink_present=None if self.sink_present is None else self.sink_present[h : h + 1],
            poisoned=self.poisoned[b, h, chosen][None, None],
            tainted=self.tainted[b, h][None, None],
        )

    def fixed(self, output: str) -> dict[float, torch.Tensor]:
        """o is exactly 0 where no key is seen, lse is −inf where the normaliser is empty."""
        if output == "o":
            return {0.0: broadcast_mask(self.keyless(), self.shape("o"))}
        empty = self.keyless()
        if self.sink_present is not None:
            empty = empty & ~self.sink_present.reshape(1, -1, 1)
        return {-torch.inf: empty}

    def keyless(self) -> torch.Tensor:
        """Rows that see no key, bool (B, H, M)."""
        return ~self.seen.any(-1)

    def undetermined(self) -> torch.Tensor:
        """Rows that see a non-finite input."""
        return self.poisoned

    def gauge(self, output: str, reference: Mapping[str, Enclosure]) -> torch.Tensor:
        """Σ p|v| for o, |lse| + 1 for lse."""
        if output == "lse":
            return reference["lse"].value.abs().nan_to_num(posinf=0.0) + 1.0
        bound = reference.get("gauge:o", reference["o"])
        return (bound.value.abs() - bound.radius).clamp(min=0.0)

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """See ``attnproof.properties.budgets.softmax``."""
        return attention_budgets(self, reference, contract)

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """See ``attnproof.properties.budgets.softmax_gradients``."""
        return attention_gradient_estimates(self, reference, contract, cotangents)

    def vacuity(self, reference: Mapping[str, Enclosure], budgets: Mapping[str, Budget]) -> list[str]:
        """Whether the mean of V would pass, and whether the mask changes anything."""
        budget, o = budgets["o"], reference["o"].value
        judged = ~budget.open
        if not judged.any():
            return ["accuracy: nothing to judge"]
        reasons = []
        weights = self.seen.double()
        mean = (weights / weights.sum(-1, keepdim=True).clamp(min=1.0)) @ self.values().double()
        if bool((((o - mean).abs() <= budget.certain) | ~judged).all()):
            what = "weights" if self._needs_shift(judged.any(-1)) else "accuracy"
            reasons.append(f"{what}: the mean of the values seen is within the budget of every row")
        if self.masked and bool(self.seen.all()):
            reasons.append("mask: every query sees every key")
        return reasons

    def _needs_shift(self, rows: torch.Tensor) -> bool:
        """Whether unshifted exponentials overflow float32, or all underflow, in one of ``rows`` (B, H, M).

        Such a case tells kernels that do not subtract the maximum, even where it cannot tell weights apart.
        """
        if not self.seen.shape[-1]:
            return False
        arithmetic = EnclosureArithmetic()
        s = arithmetic.midpoint(self.scores(arithmetic)).masked_fill(~self.seen, -torch.inf)
        largest = s.amax(-1)[rows & ~self.keyless()]
        return bool(((largest > EXP_OVERFLOW) | (largest < EXP_UNDERFLOW)).any())

    def explain_row(self, output: str, row: tuple[int, ...]) -> str:
        """Keys seen, and the three with the largest weights."""
        b, h, i = row
        seen = self.seen[b, h, i]
        count = int(seen.sum())
        if not count:
            return f"row (batch {b}, head {h}, query {i}) sees no key"
        part = self._part(b, h, torch.tensor([i]), torch.ones_like(seen))
        arithmetic = EnclosureArithmetic()
        s = arithmetic.midpoint(part.scores(arithmetic)).flatten().masked_fill(~seen, -torch.inf)
        p = torch.softmax(s, -1)
        weights, places = p.topk(min(3, count))
        listed = ", ".join(
            f"key {j} (p = {w:.3g})" for w, j in zip(weights.tolist(), places.tolist(), strict=True)
        )
        positions = seen.nonzero().flatten()
        span = f"keys {int(positions[0])}…{int(positions[-1])}" if count > 1 else f"key {int(positions[0])}"
        where = f"row (batch {b}, head {h}, query {i})"
        return f"{where} sees {count} of {len(seen)} keys ({span}); most weight: {listed}"


class SoftmaxFamily(Family):
    """``softmax`` of the contract."""

    name = "softmax"
    inputs = ("q", "k", "v")
    required = ("scale",)
    options = ("causal", "window", "softcap", "bias", "alibi_slopes", "sinks", "cu_seqlens", "return_lse")
    sequence = ("q", "k", "v", "o", "lse")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",), or ("o", "lse") with ``return_lse``."""
        return ("o", "lse") if options.get("return_lse") else ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype for o; float32 (float64 for float64 inputs) for lse."""
        if output == "lse":
            return "float64" if dtype == "float64" else "float32"
        return dtype

    def problem(self, *tensors: torch.Tensor, **options: Any) -> SoftmaxProblem:
        """Check the call and build the masks; q, k, v in layout bhnd."""
        self.check_keywords(options)
        q, k, v = checked_tensors("softmax", tensors)
        b, heads, m, _ = q.shape
        n = k.shape[2]
        scale = number("scale", options["scale"])
        softcap = options.get("softcap")
        if softcap is not None and number("softcap", softcap) <= 0:
            raise ContractError(f"softcap={softcap!r}; the contract asks for a positive float, or None")
        cu_seqlens = checked_cu_seqlens(options.get("cu_seqlens"), b, m, n)
        alignment = options.get("causal_alignment", "bottom-right")
        if alignment not in ("bottom-right", "top-left"):
            raise ContractError(f"causal_alignment={alignment!r}; expected 'bottom-right' or 'top-left'")
        window = checked_window(options.get("window"))
        causal = bool(options.get("causal", False))
        seen = visible(m, n, causal=causal, window=window, cu_seqlens=cu_seqlens, causal_alignment=alignment)
        seen = seen.expand(b, heads, m, n)
        bias = checked_bias(options.get("bias"), (b, heads, m, n))
        sinks = checked_sinks(options.get("sinks"), heads)
        slopes = checked_alibi_slopes(options.get("alibi_slopes"), heads)
        bad = torch.zeros(b, heads, m, dtype=torch.bool)
        if bias is not None:
            seen = seen & (bias != -torch.inf)
            bad |= (seen & ~bias.isfinite()).any(-1)
        if sinks is not None:
            bad |= (sinks.isnan() | (sinks == torch.inf)).reshape(1, -1, 1)
        group = heads // max(k.shape[1], 1)
        tainted = ~(k.isfinite().all(-1) & v.isfinite().all(-1)).repeat_interleave(group, 1)
        bad |= ~q.isfinite().all(-1) | (seen & tainted[:, :, None, :]).any(-1)
        return SoftmaxProblem(
            q=finite(q),
            k=finite(k),
            v=finite(v),
            seen=seen,
            scale=scale,
            softcap=None if softcap is None else float(softcap),
            bias=None if bias is None else finite(bias),
            alibi=None if slopes is None else _alibi(slopes, m, n),
            sinks=None if sinks is None else finite(sinks),
            sink_present=None if sinks is None else sinks != -torch.inf,
            poisoned=bad,
            tainted=tainted.any(-1),
            masked=causal or window is not None or cu_seqlens is not None or bias is not None,
            bias_shape=() if bias is None else tuple(options["bias"].shape),
            outputs=self.problem_outputs(options),
        )


def _alibi(slopes: torch.Tensor, m: int, n: int) -> torch.Tensor:
    """−slope·|i + N − M − j|, float64 (1, H, M, N), exact for float32 slopes (Press et al. 2022)."""
    distance = (torch.arange(m)[:, None] + n - m - torch.arange(n)[None, :]).abs().double()
    return -slopes.double().reshape(1, -1, 1, 1) * distance


SOFTMAX = SoftmaxFamily()
