r"""Attention on batch-normalised queries and keys (Attention-BN).

o_i = Σ_j p_ij v_j, p_ij ∝ exp(scale · q'_i·k'_j), q' = (q − β_h μ)/s, k' = (k − β_h μ)/s, with the mean
μ_d = mean_j k_jd and s_d = √(var_j k_jd + eps) over the N keys of a batch entry and key/value head (biased
variance, 1/N); s = 1 with ``variance=False``. β belongs to the query head. No masks: statistics over all keys
would leak the future.
Source: Nguyen et al. 2023, "A primal-dual framework for transformers and neural networks", Attention-BN;
theory.md PD-2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from attnproof.properties.arithmetic.base import Arithmetic, Enclosure, V
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.propagation import Estimate, Propagation
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.budgets.softmax import attention_budgets
from attnproof.properties.budgets.softmax_gradients import attention_gradient_errors
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.arguments import checked_tensors, finite, number
from attnproof.properties.families.base import Budget, Family, broadcast_mask, dtype_name
from attnproof.properties.families.gradients import reduced
from attnproof.properties.families.softmax import SOFTMAX, SoftmaxProblem

__all__ = ["BATCH_NORMALISED", "BatchNormalisedProblem", "per_key_head", "widest"]

# How much of ds, which is the same sum over queries and over keys, a kernel may take from each.
_SIDES = ((1.0, 1.0), (2.0, 0.0), (0.0, 2.0))


def per_key_head(a: Arithmetic[V], x: V, groups: int) -> V:
    """Σ of x (B, H, N, X) over the query heads that share a key/value head, (B, G, N, X)."""
    batch, heads, keys, width = a.shape(x)
    apart = a.reshape(x, (batch, groups, heads // groups, keys, width))
    return a.reshape(reduced(a, apart, (batch, groups, 1, keys, width)), (batch, groups, keys, width))


def widest(found: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Of estimates of the same numbers by several algorithms, the largest errors of each element."""
    result = dict(found[0])
    for other in found[1:]:
        for name, estimate in other.items():
            known = result[name]
            marks = [x.lost for x in (known, estimate) if x.lost is not None]
            result[name] = replace(
                known,
                certain=torch.maximum(known.bound, estimate.bound),
                variance=torch.maximum(known.spread, estimate.spread),
                lost=torch.stack(marks).any(0) if marks else None,
            )
    return result


@dataclass(frozen=True, eq=False)
class BatchNormalisedProblem(SoftmaxProblem):
    """Softmax attention of q' and k'; k and v hold one copy for each query head, (B, H, N, ·).

    Attributes:
        groups: G, key/value heads of the call.
        beta: (H,), finite, or None for 1.
        eps, variance: as in the call.
        centred: k' is (k − μ)/s whatever β is. The result is the same, since all scores of a row move by the
            same number, but its roundings are not: kernels may do either.
    """

    groups: int = 1
    beta: torch.Tensor | None = None
    eps: float = 0.0
    variance: bool = True
    centred: bool = False

    @property
    def differentiated(self) -> tuple[str, ...]:  # type: ignore[override]
        """q, k, v, and beta where it is given."""
        return ("q", "k", "v") if self.beta is None else ("q", "k", "v", "beta")

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a differentiated input, as it was given."""
        shape = tuple(getattr(self, name).shape)
        return (shape[0], self.groups, *shape[2:]) if name in ("k", "v") else shape

    def statistics(self, a: Arithmetic[V]) -> tuple[V, V]:
        """μ (B, H, 1, D) and k − μ (B, H, N, D)."""
        k = a.exact(self.k)
        mean = a.div(_over_rows(a, k), self._count(a))
        return mean, a.sub(k, mean)

    def deviation(self, a: Arithmetic[V], centred: V) -> V:
        """s (B, H, 1, D), from k − μ."""
        square = a.div(_over_rows(a, a.mul(centred, centred)), self._count(a))
        # eps is a constant that a kernel rounds to its own format, hence no exact input.
        eps = a.scaled(a.exact(torch.ones((), dtype=torch.float64)), self.eps)
        return a.sqrt(a.add(square, eps))

    def _count(self, a: Arithmetic[V]) -> V:
        """N; 1 where there are no keys."""
        return a.exact(torch.tensor(float(max(self.k.shape[2], 1)), dtype=torch.float64))

    def _times_beta(self, a: Arithmetic[V], x: V) -> V:
        """β_h x for x (B, H, ·, ·)."""
        return x if self.beta is None else a.mul(a.exact(self.beta.reshape(1, -1, 1, 1)), x)

    def operands(self, arithmetic: Arithmetic[V]) -> tuple[V, V, V]:
        """q' (B, H, M, D), k' (B, H, N, D) and v (B, H, N, E)."""
        a = arithmetic
        mean, centred = self.statistics(a)
        shift = self._times_beta(a, mean)
        q = a.sub(a.exact(self.q), shift)
        k = centred if self.centred or self.beta is None else a.sub(a.exact(self.k), shift)
        if self.variance:
            s = self.deviation(a, centred)
            q, k = a.div(q, s), a.div(k, s)
        return a.store(q, "operand"), a.store(k, "operand"), a.exact(self.v)

    @cached_property
    def _midpoints(self) -> tuple[torch.Tensor, torch.Tensor]:
        a = EnclosureArithmetic()
        q, k, _ = self.operands(a)
        return a.midpoint(q), a.midpoint(k)

    def queries(self) -> torch.Tensor:
        """q' in float64, (B, H, M, D)."""
        return self._midpoints[0]

    def keys(self) -> torch.Tensor:
        """k' in float64, (B, H, N, D)."""
        return self._midpoints[1]

    def computed(self, r: Roundings) -> tuple[Estimate, Estimate, Estimate] | None:
        """q', k' and v with the errors of a kernel that computes mean, variance and quotients itself."""
        if not self.k.shape[2]:
            return None
        a = Propagation(r)
        q, k, v = self.operands(a)
        return self._moved(a, q), self._moved(a, k), v

    def _moved(self, a: Propagation, x: Estimate) -> Estimate:
        """x with what is lost where a kernel keeps it times s, to spare a half-precision format's range.

        A power of two may move from q' to k', which leaves the scores as they are; what then is subnormal
        errs by as much more once it is divided by s.
        """
        if not self.variance or not a.r.operand_tiny:
            return x
        s = a.midpoint(self.deviation(a, self.statistics(a)[1]))
        return replace(x, certain=x.bound + a.r.operand_tiny * (1.0 / s - 1.0).clamp(min=0.0))

    def _forms(self) -> tuple[BatchNormalisedProblem, ...]:
        """The same attention with the keys as the definition shifts them, and centred."""
        if self.centred or self.beta is None:
            return (self,)
        return self, replace(self, centred=True)

    def _overflowing(self, contract: Contract) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B, H, M) whose q', and heads (B, H) in which some k', may overflow where it is stored."""
        q, k, _ = self.operands(Propagation(Roundings.of(contract, dtype_name(self.dtype))))
        rows, heads = (torch.zeros(shape, dtype=torch.bool) for shape in (self.row_shape, self.row_shape[:2]))
        if q.lost is not None:
            rows = q.lost.any(-1)
        if k.lost is not None:
            heads = k.lost.any(-1).any(-1)
        return rows, heads

    def budgets(self, reference: Mapping[str, Enclosure], contract: Contract) -> dict[str, Budget]:
        """Those of softmax attention with q' and k' computed, at their largest over both forms of k'."""
        budget, *others = (attention_budgets(form, reference, contract)["o"] for form in self._forms())
        for other in others:
            budget = replace(
                budget,
                certain=torch.maximum(budget.certain, other.certain),
                probable=torch.maximum(budget.probable, other.probable),
                open=budget.open | other.open,
                overflow=budget.overflow & other.overflow,
                either=budget.either | other.either,
                reasons={**other.reasons, **budget.reasons},
            )
        rows, heads = self._overflowing(contract)
        lost = broadcast_mask(rows | heads.unsqueeze(-1), self.shape("o")) & ~budget.open
        if bool(lost.any()):
            reason = "an intermediate may overflow"
            reasons = {**budget.reasons, reason: budget.reasons.get(reason, 0) + int(lost.sum())}
            budget = replace(budget, open=budget.open | lost, reasons=reasons)
        return {"o": budget}

    def differentiate(
        self, arithmetic: Arithmetic[V], cotangents: Mapping[str, torch.Tensor]
    ) -> dict[str, V]:
        """Gradients of Σ o·cotangent by q, k, v and beta: those of softmax attention, through q' and k'."""
        return self._through(arithmetic, super().differentiate(arithmetic, cotangents))

    def _through(
        self, a: Arithmetic[V], found: Mapping[str, V], sides: tuple[float, float] = (1.0, 1.0)
    ) -> dict[str, V]:
        """From dq' (B, H, M, D), dk' (B, H, N, D) and dv of each query head to the gradients of the call.

        dq = dq'/s; dμ = −Σ_h β_h (Σ_i dq'_hi + Σ_j dk'_hj)/s; ds = −(Σ_hi dq'q' + Σ_hj dk'k')/s; dk_j = Σ_h
        dk'_hj/s + dμ/N + ds (k_j − μ)/(N s); dβ_h = −Σ_bd μ (Σ_i dq' + Σ_j dk')/s.

        Args:
            a, found: the arithmetic, and "dq", "dk", "dv" by q', k' and v.
            sides: factors of the two sums of ds, which are equal.
        """
        mean, centred = self.statistics(a)
        dq, dk = a.store(found["dq"], "output"), a.store(found["dk"], "output")
        through_s: V | None = None
        if self.variance:
            s = self.deviation(a, centred)
            through_s = self._through_deviation(a, dq, dk, centred, s, sides)
            dq, dk = a.div(dq, s), a.div(dk, s)
        from_queries, from_keys = _over_rows(a, dq), _over_rows(a, dk)
        both = a.add(from_queries, from_keys)
        shared = self._times_beta(a, both)
        if self.centred:
            shared = a.add(self._times_beta(a, from_queries), from_keys)
        dk = a.sub(dk, a.div(shared, self._count(a)))
        if through_s is not None:
            dk = a.sub(dk, through_s)
        result = {"dq": dq, "dk": per_key_head(a, dk, self.groups)}
        result["dv"] = per_key_head(a, found["dv"], self.groups)
        if self.beta is not None:
            heads = len(self.beta)
            product = a.scaled(a.mul(mean, from_queries if self.centred else both), -1.0)
            result["dbeta"] = a.reshape(reduced(a, product, (1, heads, 1, 1)), (heads,))
        return result

    def _through_deviation(
        self, a: Arithmetic[V], dq: V, dk: V, centred: V, s: V, sides: tuple[float, float]
    ) -> V:
        """−ds (k_j − μ)/(N s), (B, H, N, D), from dq' and dk'."""
        q, k, _ = self.operands(a)
        by_queries = a.scaled(_over_rows(a, a.mul(dq, q)), sides[0])
        by_keys = a.scaled(_over_rows(a, a.mul(dk, k)), sides[1])
        ds = a.div(a.add(by_queries, by_keys), s)
        # ds/s is twice the gradient of the variance, which a kernel may form: it must not overflow.
        return a.div(a.mul(a.div(ds, s), a.store(centred, "operand")), self._count(a))

    def gradient_estimates(
        self,
        reference: Mapping[str, Enclosure],
        contract: Contract,
        cotangents: Mapping[str, torch.Tensor],
    ) -> dict[str, Estimate]:
        """The largest errors over both forms of k', and over the sums from which ds may be taken."""
        a = Propagation(Roundings.of(contract, dtype_name(self.dtype)))
        estimates = []
        for form in self._forms():
            found, shift = attention_gradient_errors(form, reference, contract, cotangents)
            rows, heads = form._overflowing(contract)
            lost = (heads | rows.any(-1)).reshape(*heads.shape, 1, 1)
            found = {name: _with_lost(x, lost) for name, x in found.items()}
            for sides in _SIDES if self.variance else _SIDES[:1]:
                estimate = form._through(a, found, sides)
                for name, more in form._shared_errors(a, shift, cotangents["o"]).items():
                    shared = estimate[name].spread + more.expand(estimate[name].value.shape)
                    estimate[name] = replace(estimate[name], variance=shared)
                estimates.append(estimate)
        return widest(estimates)

    def _shared_errors(
        self, r: Propagation, shift: torch.Tensor, cotangent: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Variance of dk (B, G, N, D) and dbeta (H,) from errors that a sum over keys or queries meets often.

        An error ε of dP − δ, one for all keys of row i, moves Σ_i dq' + Σ_j dk', which reach the mean, by
        scale · ε (Σ_j p k' + q'). An error of q' that comes with the mean is one for all queries: it moves
        dk'_j by scale · ε Σ_i dS_ij.

        Args:
            r: the arithmetic of budgets; shift: variance of the first ε, (B, H, M, 1).
            cotangent: of o, (B, H, M, E).
        """
        if not self.k.shape[2] or not self.q.shape[2]:
            return {}
        a = EnclosureArithmetic()
        average, centred = self.statistics(a)
        mean = a.midpoint(average)
        s = a.midpoint(self.deviation(a, centred)) if self.variance else torch.ones(())
        p = torch.softmax(self.queries() @ self.keys().mT * self.scale, -1)
        both = self.scale * (p @ self.keys() + (0.0 if self.centred else 1.0) * self.queries()) / s
        beta = torch.ones(()) if self.beta is None else self.beta.double().reshape(1, -1, 1, 1)
        moved = (shift * (beta * both).square()).sum(2, keepdim=True) / self.k.shape[2] ** 2
        dp = cotangent.double() @ self.v.double().mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        common = self.operands(r)[0].spread.mean(2, keepdim=True)
        moved = moved + common * (self.scale * ds.sum(2).unsqueeze(-1) / s).square()
        batch, heads, keys, width = moved.shape
        found = {"dk": moved.reshape(batch, self.groups, heads // self.groups, keys, width).sum(2)}
        if self.beta is not None:
            found["dbeta"] = (shift * (both * mean).sum(-1, keepdim=True).square()).sum((0, 2, 3))
        return found

    def _part(self, b: int, h: int, chosen: torch.Tensor, used: torch.Tensor) -> BatchNormalisedProblem:
        """Chosen rows of one head, with all of its keys: the statistics need them."""
        part = super()._part(b, h, chosen, torch.ones_like(used))
        assert isinstance(part, BatchNormalisedProblem)
        return replace(part, groups=1, beta=None if self.beta is None else self.beta[h : h + 1])


def _over_rows(a: Arithmetic[V], x: V) -> V:
    """Σ of x (B, H, N, D) over its rows, (B, H, 1, D)."""
    return a.transpose(a.sum(a.transpose(x)))


def _with_lost(x: Estimate, lost: torch.Tensor) -> Estimate:
    """x, lost also where ``lost`` says so."""
    if not bool(lost.any()):
        return x
    lost = lost.expand(x.value.shape)
    return replace(x, lost=lost if x.lost is None else lost | x.lost)


class BatchNormalisedFamily(Family):
    """``batch_normalised`` of the contract."""

    name = "batch_normalised"
    inputs = ("q", "k", "v")
    required = ("scale", "eps")
    options = ("beta", "variance")
    sequence = ("q", "k", "v", "o")

    def problem_outputs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """("o",)."""
        return ("o",)

    def output_dtype(self, output: str, dtype: str) -> str:
        """The inputs' dtype."""
        return dtype

    def problem(self, *tensors: torch.Tensor, **options: Any) -> BatchNormalisedProblem:
        """Check the call; q (B, H, M, D), k (B, G, N, D), v (B, G, N, E) in layout bhnd."""
        self.check_keywords(options)
        q, k, v = checked_tensors(self.name, tensors)
        eps = number("eps", options["eps"])
        if eps <= 0:
            raise ContractError(f"eps={eps!r}; the contract asks for a positive Python float")
        variance = options.get("variance", True)
        if not isinstance(variance, bool):
            raise ContractError(f"variance={variance!r}; the contract asks for True, or False for s = 1")
        beta = _checked_beta(options.get("beta"), q)
        base = SOFTMAX.problem(q, k, v, scale=options["scale"])
        base = replace(base, k=base.keys(), v=base.values())
        if beta is not None:
            unknown = ~beta.isfinite().unsqueeze(0)
            poisoned, tainted = base.poisoned | unknown.unsqueeze(-1), base.tainted | unknown
            base = replace(base, poisoned=poisoned, tainted=tainted)
        return BatchNormalisedProblem(
            **{field.name: getattr(base, field.name) for field in fields(base)},
            groups=k.shape[1],
            beta=None if beta is None else finite(beta),
            eps=eps,
            variance=variance,
        )


def _checked_beta(beta: Any, q: torch.Tensor) -> torch.Tensor | None:
    """One number a query head in q's dtype, or None."""
    if beta is None:
        return None
    heads = q.shape[1]
    if not isinstance(beta, torch.Tensor) or tuple(beta.shape) != (heads,) or beta.dtype != q.dtype:
        got = (
            f"{beta.dtype} of shape {tuple(beta.shape)}"
            if isinstance(beta, torch.Tensor)
            else type(beta).__name__
        )
        raise ContractError(
            f"beta is {got}; the contract asks for one number a query head, shape ({heads},), of q's dtype "
            f"{q.dtype}"
        )
    return beta


BATCH_NORMALISED = BatchNormalisedFamily()
