"""Budgets of softmax attention's gradients, from the structure that backward kernels share.

A kernel recomputes P = exp(S − L) from a stored log-sum-exp L, so that P errs by its logits and by L; it
takes δ = Σ dO∘O from the *stored* output O, or Σ p dP; dP and dS are stored in the declared ``dscores``
format. All else is the family's own backward formula over the arithmetic of budgets (``propagation``).

Two errors are common to a row and do not average out over its keys: that of δ moves dQ by Σ p k, the mean of
K, and that of L moves it along dQ itself. They are added to the variance of dQ as such.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.budgets.base import Budget, dtype_name
from attnproof.properties.budgets.propagation import Estimate, Propagation, ScaledOperands, coincidence
from attnproof.properties.budgets.rounding import Roundings, growth
from attnproof.properties.budgets.rows import normaliser_rounding, normaliser_shift
from attnproof.properties.budgets.softmax import (
    PROBES,
    Weighing,
    query_rounding,
    upheaved_weights,
    weighing,
)
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.families.softmax import SoftmaxProblem

__all__ = ["attention_gradient_errors", "attention_gradient_estimates"]

_LARGEST_EXPONENT = 700.0
# Variances of δ by two ways that differ by less are not told apart.
_APART = 4.0
# Numbers that agree to this are rounded alike in every format.
_SAME = 2.0**-24


def attention_gradient_estimates(
    problem: SoftmaxProblem,
    reference: Mapping[str, Enclosure],
    contract: Contract,
    cotangents: Mapping[str, torch.Tensor],
) -> dict[str, Estimate]:
    """Gradients "dq", "dk", … with the errors of a kernel under ``contract``, before they are stored."""
    return attention_gradient_errors(problem, reference, contract, cotangents)[0]


def attention_gradient_errors(
    problem: SoftmaxProblem,
    reference: Mapping[str, Enclosure],
    contract: Contract,
    cotangents: Mapping[str, torch.Tensor],
) -> tuple[dict[str, Estimate], torch.Tensor]:
    """The same, and the variance (B, H, M, 1) of the error of dP − δ that all keys of a row share.

    Whoever sums dK over keys needs the latter: such errors add up there.
    """
    r = Roundings.of(contract, dtype_name(problem.dtype))
    a = ScaledOperands(r, problem.scale)
    q, k, v = problem.computed(r) or problem.operands(a)
    do = a.exact(cotangents["o"])
    w = weighing(problem, r)
    keys = problem.seen.shape[-1]
    budget = problem.budgets(reference, contract)["o"]
    p, common = _weights(w, r)
    threatened = budget.open.any(-1, keepdim=True)
    if bool(threatened.any()):
        p = replace(p, lost=threatened.expand(p.value.shape) if p.lost is None else p.lost | threatened)
    tanh = problem.capped(a, q, k)
    dp = a.store(a.matmul(do, a.transpose(v)), "dscores")
    delta = _delta(problem, reference, budget, a, p, dp, cotangents)
    own = p.columns(0, keys)
    whole = a.mul(own, a.sub(dp, delta))
    # A kernel that divides dP by the normaliser early underflows in every term of a row, and multiplies what
    # is lost by weights of up to 1.
    terms = torch.where(dp.size.amax(-1, keepdim=True) > 0, w.row.count + 4.0, 0.0) if keys else w.row.count
    lost = r.accumulate_tiny * terms
    whole = replace(whole, certain=whole.bound + lost, variance=whole.spread + lost.square() / 3.0)
    if problem.softcap is not None:
        # softcap · tanh(s / softcap) differentiated step by step multiplies dS by the cap first.
        over = whole.size * max(problem.softcap, 1.0) >= r.largest / 2.0
        whole = replace(whole, lost=over if whole.lost is None else whole.lost | over)
    # Where dP overflows, 0·inf of a key that is not seen makes a NaN as well.
    ds = replace(a.masked(whole, problem.seen), lost=whole.lost)
    independent = replace(ds, variance=ds.spread + ds.value.square() * common)
    found = problem.backward(a, (q, k), a.masked(_raised(own, common), problem.seen), independent, do, tanh)
    if abs(problem.scale) > 1.0:
        # dS may be scaled before it meets K and Q.
        early = a.scaled(ds, problem.scale)
        grouped = [a.reshape(x, _together(problem, x.value).shape) for x in (early, q)]
        early_dq, early_dk = a.matmul(early, k), a.matmul(a.transpose(grouped[0]), grouped[1])
        for name, x in (("dq", early_dq), ("dk", early_dk)):
            if x.lost is not None:
                known = found[name].lost
                found[name] = replace(found[name], lost=x.lost if known is None else x.lost | known)
    shift = delta.spread + alike_in_row(own.value, dp)
    found["dq"] = _with_common_errors(problem, found["dq"], own, shift, common)
    whole_p = _raised(own, common)
    for name, more in _alike_in_column(problem, whole_p, dp, dp.value - delta.value, do.value).items():
        found[name] = replace(found[name], variance=found[name].spread + more)
    if max(r.operand, r.input) > 2.0**-20:
        _add_operand_response(problem, r, w, own.value, dp.value, do.value, found)
    computed = problem.computed(r)
    if computed is not None:
        _add_common_response(problem, computed[0].spread, own.value, dp.value, do.value, found)
    if problem.sinks is not None:
        sink = _raised(p.columns(keys, None), common)
        found["dsinks"] = problem.sink_gradient(a, sink, delta)
    return found, shift


def _weights(w: Weighing, r: Roundings) -> tuple[Estimate, torch.Tensor]:
    """P recomputed from L, (B, H, M, N + sink), with what errs key by key in its variance.

    Also the variance, relative to P and (B, H, M, 1), of what errs for all keys of a row alike.
    """
    row = w.row
    size = row.lse.abs() + 1.0
    _, shift = normaliser_shift(row, w.certain)
    normaliser = shift + growth(2.0 * row.count + 8.0, r.accumulate)
    stored = (8.0 * r.elementwise + 2.0 * r.lse) * size
    argument = 2.0 * r.elementwise * torch.where(row.x > -torch.inf, row.x.abs(), 0.0)
    error = torch.where(row.x > -torch.inf, w.certain + normaliser + stored + argument, 0.0)
    certain = row.p * torch.expm1(error.clamp(max=_LARGEST_EXPONENT))
    certain = torch.where(row.x > -torch.inf, certain + r.probabilities_tiny, 0.0)
    lost = (row.log_p + error > 80.0) & (row.x > -torch.inf)
    variance = row.p.square() * w.variance + upheaved_weights(row, w.variance)
    # Hardware exponentials flush subnormal results to zero.
    variance = variance + torch.where(row.p < r.probabilities_tiny, row.p.square(), 0.0)
    common = (row.p.square() * w.variance).sum(-1, keepdim=True)
    common = common + ((2.0 * r.elementwise + r.lse) * size).square() / 3.0
    common = common + normaliser_rounding(row, r)
    return Estimate(row.p, certain, variance, lost if bool(lost.any()) else None), common


def _raised(p: Estimate, common: torch.Tensor) -> Estimate:
    """P with the common errors of its row counted as its own, for sums over queries."""
    return replace(p, variance=p.spread + p.value.square() * common)


def _delta(
    problem: SoftmaxProblem,
    reference: Mapping[str, Enclosure],
    budget: Budget,
    a: Propagation,
    p: Estimate,
    dp: Estimate,
    cotangents: Mapping[str, torch.Tensor],
) -> Estimate:
    """δ (B, H, M, 1), less dlse; from the stored O, or by Σ p dP if that is worse."""
    o = reference["o"].value.nan_to_num(0.0)
    known = budget.certain.isfinite() & ~budget.open
    stored = Estimate(
        o,
        torch.where(known, budget.certain, 0.0),
        torch.where(known, budget.probable.square(), 0.0),
        None if bool(known.all()) else ~known,
    )
    delta = a.sum(a.mul(a.exact(cotangents["o"]), stored))
    keys = dp.value.shape[-1]
    own = p.columns(0, keys)
    direct = a.sum(replace(a.masked(a.mul(own, dp), problem.seen), lost=dp.lost))
    marks = [x for x in (delta.lost, direct.lost) if x is not None]
    lost = None if not marks else torch.stack(marks).any(0)
    # Σ p dP errs by the storage of dP as well: told apart where that is more than thresholds leave room for.
    worse = direct.spread > _APART * delta.spread
    delta = replace(
        delta,
        certain=torch.maximum(delta.bound, direct.bound),
        variance=torch.where(worse, direct.spread, delta.spread),
        lost=lost,
    )
    if "lse" in cotangents:
        delta = a.sub(delta, a.exact(cotangents["lse"].unsqueeze(-1)))
    return delta


def alike_in_row(p: torch.Tensor, dp: Estimate) -> torch.Tensor:
    """Variance, (B, H, M, 1), of the rounding of dP that is one for all keys of a row: like an error of δ.

    Equal numbers are rounded alike: V that hardly differs from key to key gives such dP.
    """
    if not dp.value.numel():
        return p.new_zeros((*p.shape[:-1], 1))
    total = (p * dp.spread.sqrt()).sum(-1, keepdim=True).square()
    # The mean square of an error that is uniform is a third of its bound's.
    return 3.0 * coincidence(p * dp.value, _SAME) * total


def _alike_in_column(
    problem: SoftmaxProblem, p: Estimate, dp: Estimate, centred: torch.Tensor, do: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Variance of dk and dv from errors that are one for all queries of a key.

    Of dP where cotangents do not differ from query to query, of P where queries do not; ``centred``: dP − δ.
    """
    if not dp.value.numel():
        return {}
    batch, heads, m, _ = p.value.shape
    groups = problem.k.shape[1]
    rows = heads // max(groups, 1) * m

    def together(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(batch, groups, rows, x.shape[-1])

    q = together(problem.queries().double()) * problem.scale
    error_p, error_dp = p.spread.sqrt(), dp.spread.sqrt()
    same_dp = 3.0 * coincidence(together(dp.value).mT, _SAME)
    same_p = 3.0 * coincidence(together(p.value).mT, _SAME)
    by_dp = together(p.value * error_dp * dp.value.sign()).mT @ q
    by_p = together(error_p * centred).mT @ q
    return {
        "dk": same_dp * by_dp.square() + same_p * by_p.square(),
        "dv": same_p * (together(error_p).mT @ together(do)).square(),
    }


def _with_common_errors(
    problem: SoftmaxProblem, dq: Estimate, p: Estimate, shift: torch.Tensor, common: torch.Tensor
) -> Estimate:
    """dq with the errors that all keys of a row share: those of dP − δ move it by Σ p k, L's along itself.

    ``shift`` and ``common`` are their variances, the latter relative to P; (B, H, M, 1). Under a soft cap
    each dS is multiplied by 1 − tanh².
    """
    keys, weights = problem.keys().double(), p.value
    if problem.softcap is not None:
        scores = problem.queries().double() @ keys.mT * problem.scale
        weights = weights * (1.0 - torch.tanh(scores / problem.softcap).square())
    mean = weights @ keys
    shared = shift * (problem.scale * mean).square() + common * dq.value.square()
    return replace(dq, variance=dq.spread + shared)


def _add_operand_response(
    problem: SoftmaxProblem,
    r: Roundings,
    w: Weighing,
    p: torch.Tensor,
    dp: torch.Tensor,
    do: torch.Tensor,
    found: dict[str, Estimate],
) -> None:
    """Adds the response of dq, dk and dv to rounded queries and keys, sampled with random signs.

    P' = p (t − t̄) and dS' = P' (dP − δ) − p Σ P' dP for a change t of the logits.
    """
    generator = torch.Generator().manual_seed(0)
    keys, queries = problem.keys().double(), problem.queries().double()
    by_query, by_key = _operand_errors(problem, r, w)
    total = {name: torch.zeros_like(found[name].value) for name in ("dq", "dk", "dv")}

    def together(x: torch.Tensor) -> torch.Tensor:
        return _together(problem, x)

    def response(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _response(t, p, dp, problem.scale)

    for _ in range(PROBES // 4):
        signs = torch.randint(0, 2, (queries.shape[-1],), generator=generator).double() * 2.0 - 1.0
        weights, moved = response((by_query * signs) @ keys.mT)
        total["dq"] += (moved @ keys).square()
        total["dk"] += together(moved).mT.square() @ together(queries).square()
        total["dv"] += together(weights).mT.square() @ together(do).square()
        # A key's error is one for all queries of its column, and another for each key of a row.
        signs = torch.randint(0, 2, keys.shape[-2:], generator=generator).double() * 2.0 - 1.0
        weights, moved = response(queries @ (by_key * signs).mT)
        total["dq"] += (moved @ keys).square()
        total["dk"] += (together(moved).mT @ together(queries)).square()
        total["dv"] += (together(weights).mT @ together(do)).square()
    for name, more in total.items():
        estimate = found[name]
        found[name] = replace(estimate, variance=estimate.spread + more / (PROBES // 4))


def _add_common_response(
    problem: SoftmaxProblem,
    spread: torch.Tensor,
    p: torch.Tensor,
    dp: torch.Tensor,
    do: torch.Tensor,
    found: dict[str, Estimate],
) -> None:
    """Adds the response to an error that all queries of a head share, such as that of a mean taken off them.

    ``spread``: variance of computed queries, (B, H, M, D), all of which may be such an error.
    """
    if not spread.numel() or not p.numel():
        return
    generator = torch.Generator().manual_seed(0)
    keys, queries = problem.keys().double(), problem.queries().double()
    common = problem.scale * spread.mean(2, keepdim=True).sqrt()
    together = functools.partial(_together, problem)
    total = {name: torch.zeros_like(found[name].value) for name in ("dq", "dk", "dv")}
    for _ in range(PROBES // 4):
        signs = torch.randint(0, 2, (keys.shape[-1],), generator=generator).double() * 2.0 - 1.0
        weights, moved = _response((common * signs) @ keys.mT, p, dp, problem.scale)
        total["dq"] += (moved @ keys).square()
        total["dk"] += (together(moved).mT @ together(queries)).square()
        total["dv"] += (together(weights).mT @ together(do)).square()
    for name, more in total.items():
        found[name] = replace(found[name], variance=found[name].spread + more / (PROBES // 4))


def _response(
    t: torch.Tensor, p: torch.Tensor, dp: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How P, and scale · dS, move with logits that move by t; all (B, H, M, N)."""
    centred = dp - (p * dp).sum(-1, keepdim=True)
    weights = p * (t - (p * t).sum(-1, keepdim=True))
    moved = weights * centred
    return weights, (moved - p * moved.sum(-1, keepdim=True)) * scale


def _together(problem: SoftmaxProblem, x: torch.Tensor) -> torch.Tensor:
    """The rows of all query heads that share a key/value head, (B, G, H/G·M, ·)."""
    groups = problem.k.shape[1]
    return x.reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2], x.shape[3])


def _operand_errors(problem: SoftmaxProblem, r: Roundings, w: Weighing) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard deviations of scale·q (B, H, M, D) and scale·k (B, H, N, D) as a kernel holds them."""
    queries, keys = query_rounding(problem, r, w.logits.q), query_rounding(problem, r, w.logits.k)
    computed = problem.computed(r)
    if computed is None:
        return queries, keys
    scale = abs(problem.scale)
    return (
        torch.maximum(queries, scale * computed[0].spread.sqrt()),
        torch.maximum(keys, scale * computed[1].spread.sqrt()),
    )
