r"""Softmax attention: o_i = Σ_j p_ij v_j, p_ij = e^{s_ij} / (Σ_j e^{s_ij} + e^{sink}), lse_i = log of it.

s_ij = scale · q_i·k_j, then softcap · tanh(s_ij / softcap), then + bias_ij, over the keys j that query i sees
(causal, window, packed sequences, bias of −∞). Query head h reads key and value head h // (H/G). The maximum
that is subtracted before exp is any number near the largest score: the quotient does not depend on it.
Source: contract.md, "Calls" and "The edges"; the formula is that of Vaswani et al. 2017 with the usual
options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.base import EXP_OVERFLOW, EXP_UNDERFLOW
from attnproof.properties.budgets.softmax import attention_budgets
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.base import Budget, Family, Problem, broadcast_mask, dtype_name

__all__ = ["SOFTMAX", "SoftmaxProblem", "visible"]


@dataclass(frozen=True, eq=False)
class SoftmaxProblem(Problem):
    """Finite inputs of one call, and what each query sees.

    Attributes:
        q: (B, H, M, D); k: (B, G, N, D); v: (B, G, N, E); non-finite entries replaced by 0.
        seen: bool (B, H, M, N), whether query i sees key j.
        bias: (B, H, M, N), or None; −inf entries are unseen and hold 0 here.
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
    sinks: torch.Tensor | None
    sink_present: torch.Tensor | None
    poisoned: torch.Tensor
    tainted: torch.Tensor
    masked: bool
    outputs: tuple[str, ...] = ("o",)

    @property
    def row_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """(B, H, M)."""
        return tuple(self.q.shape[:3])

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.q.shape[1] // max(self.k.shape[1], 1)

    def shape(self, output: str) -> tuple[int, ...]:
        """(B, H, M, E) for "o", (B, H, M) for "lse"."""
        return (*self.row_shape, self.v.shape[3]) if output == "o" else self.row_shape

    def keys(self) -> torch.Tensor:
        """k with one entry for each query head, (B, H, N, D)."""
        return self.k.repeat_interleave(self.group, 1)

    def values(self) -> torch.Tensor:
        """v with one entry for each query head, (B, H, N, E)."""
        return self.v.repeat_interleave(self.group, 1)

    def scores(self, arithmetic: Arithmetic[V]) -> V:
        """s, (B, H, M, N), of all pairs, seen or not."""
        a = arithmetic
        s = a.scaled(a.matmul(a.exact(self.q), a.transpose(a.exact(self.keys()))), self.scale)
        if self.softcap is not None:
            cap = a.exact(torch.tensor(self.softcap, dtype=torch.float64))
            s = a.mul(cap, a.tanh(a.div(s, cap)))
        if self.bias is not None:
            s = a.add(s, a.exact(self.bias))
        return s

    def evaluate(self, arithmetic: Arithmetic[V], gauges: bool = False) -> dict[str, V]:
        """o (B, H, M, E), and lse (B, H, M, 1) if asked for; 0 for a row whose normaliser is empty."""
        a = arithmetic
        s = self.scores(a)
        shift = self._shift(a.midpoint(s))
        m = a.exact(shift)
        if bool(self.seen.all()):
            w = a.exp(a.sub(s, m))
        else:
            w = a.masked(a.exp(a.masked(a.sub(s, m), self.seen)), self.seen)
        total = a.sum(w)
        empty = ~self.seen.any(-1, keepdim=True)
        if self.sinks is not None and self.sink_present is not None:
            present = self.sink_present.reshape(1, -1, 1, 1).expand(empty.shape)
            sink = a.sub(a.exact(self.sinks.reshape(1, -1, 1, 1).expand(empty.shape)), m)
            total = a.add(total, a.masked(a.exp(a.masked(sink, present)), present))
            empty = empty & ~present
        total = a.masked(total, ~empty, fill=1.0)
        v = self.values()
        result = {"o": a.div(a.matmul(w, a.exact(v)), total)}
        if gauges:
            result["gauge:o"] = a.div(a.matmul(w, a.exact(v.abs())), total)
        if "lse" in self.outputs:
            result["lse"] = a.masked(a.add(m, a.log(total)), ~empty)
        return result

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


def visible(
    m: int,
    n: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: torch.Tensor | None = None,
    causal_alignment: str = "bottom-right",
) -> torch.Tensor:
    """Which keys a query may see by position, bool (M, N); contract.md, "The edges"."""
    i = torch.arange(m)[:, None]
    j = torch.arange(n)[None, :]
    seen = torch.ones(m, n, dtype=torch.bool)
    if causal:
        seen &= j <= (i if causal_alignment == "top-left" else i + n - m)
    if window is not None:
        left, right = window
        position = i + n - m
        if left is not None:
            seen &= j >= position - left
        if right is not None:
            seen &= j <= position + right
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].to(torch.int64)
        seen &= torch.searchsorted(ends, i.flatten(), right=True)[:, None] == torch.searchsorted(
            ends, j.flatten(), right=True
        )
    return seen


class SoftmaxFamily(Family):
    """``softmax`` of the contract."""

    name = "softmax"
    inputs = ("q", "k", "v")
    required = ("scale",)
    options = ("causal", "window", "softcap", "bias", "sinks", "cu_seqlens", "return_lse")
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
        q, k, v = _checked_tensors(tensors)
        b, heads, m, _ = q.shape
        n = k.shape[2]
        scale = _number("scale", options["scale"])
        softcap = options.get("softcap")
        if softcap is not None and _number("softcap", softcap) <= 0:
            raise ContractError(f"softcap={softcap!r}; the contract asks for a positive float, or None")
        cu_seqlens = _checked_cu_seqlens(options.get("cu_seqlens"), b, m, n)
        alignment = options.get("causal_alignment", "bottom-right")
        if alignment not in ("bottom-right", "top-left"):
            raise ContractError(f"causal_alignment={alignment!r}; expected 'bottom-right' or 'top-left'")
        window = _checked_window(options.get("window"))
        causal = bool(options.get("causal", False))
        seen = visible(m, n, causal=causal, window=window, cu_seqlens=cu_seqlens, causal_alignment=alignment)
        seen = seen.expand(b, heads, m, n)
        bias = _checked_bias(options.get("bias"), (b, heads, m, n))
        sinks = _checked_sinks(options.get("sinks"), heads)
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
            q=_finite(q),
            k=_finite(k),
            v=_finite(v),
            seen=seen,
            scale=scale,
            softcap=None if softcap is None else float(softcap),
            bias=None if bias is None else _finite(bias),
            sinks=None if sinks is None else _finite(sinks),
            sink_present=None if sinks is None else sinks != -torch.inf,
            poisoned=bad,
            tainted=tainted.any(-1),
            masked=causal or window is not None or cu_seqlens is not None or bias is not None,
            outputs=self.problem_outputs(options),
        )


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(tensor.isfinite(), tensor, torch.zeros((), dtype=tensor.dtype))


def _number(argument: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or math.isnan(value)
        or abs(value) == float("inf")
    ):
        raise ContractError(f"{argument}={value!r}; the contract asks for a finite Python float")
    return float(value)


def _checked_tensors(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if len(tensors) != 3:
        raise ContractError(f"softmax takes three tensors q, k, v; got {len(tensors)}")
    for name, tensor in zip("qkv", tensors, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            got = (
                f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise ContractError(
                f"{name} has {got}; the contract asks for a tensor of 4 axes (batch, heads, length, width)"
            )
        dtype_name(tensor.dtype, name)
    q, k, v = tensors
    if not q.dtype == k.dtype == v.dtype:
        raise ContractError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; the contract asks for one dtype"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ContractError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; batch, heads and length must be the same"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ContractError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; batch and width must be the same"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ContractError(f"q has {q.shape[1]} heads and k {k.shape[1]}; H must be a multiple of G")
    return q, k, v


def _checked_window(window: Any) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ContractError(f"window={window!r}; the contract asks for (left, right), each an int or None")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
            raise ContractError(f"window={window!r}; each side is an int or None")
    return window[0], window[1]


def _checked_bias(bias: Any, shape: tuple[int, ...]) -> torch.Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor):
        raise ContractError(
            f"bias is {type(bias).__name__}; the contract asks for a tensor broadcastable to {shape}"
        )
    dtype_name(bias.dtype, "bias")
    try:
        return bias.expand(shape)
    except RuntimeError:
        raise ContractError(
            f"bias has shape {tuple(bias.shape)}; it must broadcast to (B, H, M, N) = {shape}"
        ) from None


def _checked_sinks(sinks: Any, heads: int) -> torch.Tensor | None:
    if sinks is None:
        return None
    if not isinstance(sinks, torch.Tensor) or tuple(sinks.shape) != (heads,):
        got = f"shape {tuple(sinks.shape)}" if isinstance(sinks, torch.Tensor) else type(sinks).__name__
        raise ContractError(
            f"sinks has {got}; the contract asks for one logit a query head, shape ({heads},)"
        )
    dtype_name(sinks.dtype, "sinks")
    return sinks


def _checked_cu_seqlens(cu: Any, b: int, m: int, n: int) -> torch.Tensor | None:
    if cu is None:
        return None
    if not isinstance(cu, torch.Tensor) or cu.dim() != 1 or cu.dtype != torch.int32 or cu.numel() < 2:
        raise ContractError("cu_seqlens: the contract asks for an int32 tensor of P + 1 offsets, P ≥ 1")
    ends = cu.tolist()
    if b != 1 or m != n:
        raise ContractError(f"cu_seqlens with B = {b}, M = {m}, N = {n}; packed batches have B = 1 and M = N")
    if ends[0] != 0 or ends[-1] != n or any(x > y for x, y in zip(ends, ends[1:], strict=False)):
        raise ContractError(f"cu_seqlens={ends}; offsets must rise from 0 to N = {n}")
    return cu


SOFTMAX = SoftmaxFamily()
