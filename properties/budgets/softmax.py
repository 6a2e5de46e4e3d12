"""Budgets of softmax attention, term by term.

The kernel's weights are e^{s_j + e_j} with logit errors bounded by E_j: rounding of scaled operands, D-term
dot products, scaling, soft cap, bias, storage of scores, the argument and value of the exponential, and one
more exponential for each time an online algorithm rescales what it has of the key (at most once for each key
with a larger logit, ``rows.overtaking``). These are common to numerator and normaliser, so only the spread of
V about o counts (``rows.Spread``). What is not common is relative to Σ p|v|: storage of P, the sum, a
division-free form's log-sum-exp; the normaliser's own sum, which scales all of a row, only to |o|. One
rounding of the output is last.

Every algorithm whose roundings are among the declared ones is covered: online, two-pass, split over keys and
merged, divided before or after the second matmul, in any tiling and any order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.budgets.base import ASKED, Budget, broadcast_mask, dtype_name
from attnproof.properties.budgets.propagation import alike_terms, equal_terms
from attnproof.properties.budgets.rounding import LARGEST, MEAN_SQUARE, Roundings, growth, half_spacing
from attnproof.properties.budgets.rows import (
    Row,
    Spread,
    normaliser_rounding,
    normaliser_shift,
    overtaking,
    second_moment,
)
from attnproof.properties.contract import Contract

if TYPE_CHECKING:
    from attnproof.properties.budgets.propagation import Estimate
    from attnproof.properties.families.softmax import SoftmaxProblem

__all__ = ["PROBES", "Weighing", "attention_budgets", "query_rounding", "upheaved_weights", "weighing"]

_LARGEST_SQUARE = 1e300
# Slack for the float64 evaluation of the budget itself; its own relative error is below 1e-9 for N ≤ 65,536.
_SLACK = 1.0 + 1e-6
# Errors of one sign that a declaration allows without asking for them count this many times their mean: a
# kernel that truncates operands to tf32 then has a mean error/probable of 0.4, below every threshold of bias.
_LEAN = 2.5
_LARGE_LOGIT_VARIANCE = 2.0**-4
# Random signs with which the response to rounded operands is sampled: the estimated standard deviation is
# itself accurate to 1/√(2·probes), 18 %.
PROBES = 16


@dataclass(frozen=True, eq=False)
class _Logits:
    """Scores of a problem in float64, and the magnitudes that their errors are relative to; all (B, H, M, N).

    Attributes:
        q, k: (B, H, M, D), (B, H, N, D).
        product: Σ q k; absolute: Σ|q||k|; square: Σ q²k².
        scaled, capped, biased: the score after each step.
        bias: magnitude of the bias.
    """

    q: torch.Tensor
    k: torch.Tensor
    product: torch.Tensor
    absolute: torch.Tensor
    square: torch.Tensor
    scaled: torch.Tensor
    capped: torch.Tensor
    biased: torch.Tensor
    bias: torch.Tensor


def _logits(problem: SoftmaxProblem) -> _Logits:
    q, k = problem.queries().double(), problem.keys().double()
    kt = k.transpose(-1, -2)
    product = q @ kt
    scaled = product * problem.scale
    capped = scaled
    if problem.softcap is not None:
        capped = problem.softcap * torch.tanh(scaled / problem.softcap)
    bias, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for addend in (problem.bias, problem.alibi):
        if addend is not None:
            bias, size = bias + addend.double(), size + addend.double().abs()
    return _Logits(
        q=q,
        k=k,
        product=product,
        absolute=q.abs() @ kt.abs(),
        # float64 inputs may be so large and so small that 0·∞ would come out.
        square=q.square() @ kt.square().clamp(max=_LARGEST_SQUARE),
        scaled=scaled,
        capped=capped,
        biased=capped + bias,
        bias=size,
    )


@dataclass(frozen=True, eq=False)
class Weighing:
    """What a kernel's roundings make of the weights: the part of a budget that all outputs share.

    Attributes:
        logits: scores and their magnitudes.
        row: exact weights, a sink last where there is one; v: (B, H, N, E), with a row of 0 for the sink.
        certain: bound on the errors of the logits, (B, H, M, N); variance: of a healthy kernel's.
        exact: (B, H, M, 1), rows whose logits come out exactly.
    """

    logits: _Logits
    row: Row
    v: torch.Tensor
    certain: torch.Tensor
    variance: torch.Tensor
    exact: torch.Tensor


def weighing(problem: SoftmaxProblem, r: Roundings) -> Weighing:
    """The weights of a problem and their errors in a kernel with roundings ``r``."""
    logits = _logits(problem)
    x = logits.biased.masked_fill(~problem.seen, -torch.inf)
    v = problem.values().double()
    certain_e = _certain_logit_errors(problem, logits, r)
    variance_e = _logit_variances(problem, logits, r)
    computed, inherited = problem.computed(r), torch.zeros_like(certain_e)
    if computed is not None:
        inherited, added = _operand_errors(problem, logits, computed)
        certain_e, variance_e = certain_e + inherited, variance_e + added
    if problem.sinks is not None and problem.sink_present is not None:
        x, v, certain_e, variance_e = _with_sink(problem, x, v, certain_e, variance_e, r)
    elif not x.shape[-1]:
        x, v = x.new_full((*x.shape[:-1], 1), -torch.inf), v.new_zeros((*v.shape[:-2], 1, v.shape[-1]))
        certain_e = variance_e = torch.zeros_like(x)
    row = Row.of(x)
    argument = 2.0 * r.elementwise * (2.0 * row.distance + row.largest.abs())
    # Its own exponential, those of the rescalings, and two more of a sink and of the merge of parts.
    rescales = (overtaking(row, certain_e) + 3.0) * r.exp
    certain_e = torch.where(row.x > -torch.inf, certain_e + argument + rescales, 0.0)
    exact, exact_e = _exact_rows(problem, row, v, r, certain_e)
    # Logits of operands that a kernel computes come out exactly only where those do.
    exact = exact & ~(inherited > 0).any(-1, keepdim=True)
    certain_e = torch.where(exact, exact_e, certain_e)
    variance_e = variance_e + ((2.0 * row.distance * r.elementwise) ** 2 + r.exp**2) / 3.0
    return Weighing(logits, row, v, certain_e, variance_e, exact)


def _operand_errors(
    problem: SoftmaxProblem, t: _Logits, computed: tuple[Estimate, Estimate, Estimate]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bound and variance of what errors of q and k, that a kernel computes itself, add to the logits."""
    q, k, _ = computed
    kt = t.k.transpose(-1, -2)
    certain = q.bound @ (kt.abs() + k.bound.mT) + t.q.abs() @ k.bound.mT
    variance = q.spread @ kt.square() + t.q.square() @ k.spread.mT
    return abs(problem.scale) * certain, problem.scale**2 * variance


def attention_budgets(
    problem: SoftmaxProblem, reference: Mapping[str, Enclosure], contract: Contract
) -> dict[str, Budget]:
    """Certain and probable budgets of o and lse for a kernel under ``contract``; shapes as the outputs."""
    dtype = dtype_name(problem.dtype)
    r = Roundings.of(contract, dtype)
    w = weighing(problem, r)
    budgets = {
        "o": _output_budget(
            problem, reference["o"], contract, r, w.row, w.v, w.certain, w.variance, w.logits, w.exact
        )
    }
    if "lse" in reference:
        wide = str(contract.precision.resolved(dtype).lse)
        r_lse = Roundings.of(contract, dtype, output_dtype=wide)
        budgets["lse"] = _lse_budget(
            problem, reference["lse"], contract, r_lse, w.row, w.certain, w.variance, w.logits
        )
    return budgets


def _certain_logit_errors(problem: SoftmaxProblem, t: _Logits, r: Roundings) -> torch.Tensor:
    """E_j before the exponential, (B, H, M, N)."""
    d, scale = t.q.shape[-1], abs(problem.scale)
    operands = (1.0 + max(r.operand, r.input)) ** 2 - 1.0
    dot = operands + growth(d + 2.0, r.accumulate) * (1.0 + operands)
    # A scaled operand may be subnormal in its own format: an absolute error against the other operand.
    # An input that is stored narrower is rounded before the scale.
    tiny = r.operand_tiny * max(1.0, scale if r.input else math.sqrt(scale))
    sizes = t.q.abs().sum(-1, keepdim=True) + t.k.abs().sum(-1).unsqueeze(-2)
    error = torch.where(t.absolute == 0, 0.0, scale * dot * t.absolute)
    error = error + (tiny * sizes if tiny else 0.0)
    error = error + r.accumulate_tiny * (d + 2.0) * (1.0 + scale)
    # The scale, log2 e and their product are rounded constants; scaling is one more rounding.
    error = error + 4.0 * r.elementwise * t.scaled.abs() + 2.0 * r.scores * t.scaled.abs()
    if problem.softcap is not None:
        # tanh through an exponential: 1-Lipschitz in its argument, an absolute error of a few u of its own.
        tanh = problem.softcap * (r.exp + 8.0 * r.elementwise)
        error = error + tanh + (2.0 * r.elementwise + r.scores) * t.capped.abs()
    if problem.bias is not None or problem.alibi is not None:
        error = error + 3.0 * r.elementwise * (t.bias + t.biased.abs())
    return error + 2.0 * r.scores * t.biased.abs() + 4.0 * r.scores_tiny * (1.0 + scale)


def _logit_variances(problem: SoftmaxProblem, t: _Logits, r: Roundings) -> torch.Tensor:
    """Variance of errors that differ from key to key independently, (B, H, M, N)."""
    d, scale = t.q.shape[-1], problem.scale
    if r.truncated:
        sums = (2.0**-23 * d / 2.0 * t.absolute) ** 2
    else:
        sums = r.accumulate**2 * _summation_variance(d, t.square, t.product)
    operands = max(r.operand, r.input) ** 2 * MEAN_SQUARE * t.square
    variance = scale**2 * (sums + operands)
    stored = 2.0 * t.scaled.square() + 2.0 * t.biased.square()
    if problem.softcap is not None:
        stored = stored + t.capped.square()
        variance = variance + (2.0 * problem.softcap * r.elementwise) ** 2 / 3.0
    return variance + MEAN_SQUARE * (r.scores**2 * stored + r.elementwise**2 * t.biased.square())


def _summation_variance(n: torch.Tensor | float, square: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Variance, over u², of the rounding of a recursive sum of n terms with Σt² and Σt.

    Each of the n partial sums T_k is rounded once (``MEAN_SQUARE`` T_k²); in random order E Σ T_k² ≈ n (Σt²/2
    + (Σt)²/3).
    """
    return n * (square / 2.0 + total.square() / 3.0) * MEAN_SQUARE


def _with_sink(
    problem: SoftmaxProblem,
    x: torch.Tensor,
    v: torch.Tensor,
    certain_e: torch.Tensor,
    variance_e: torch.Tensor,
    r: Roundings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sink as one more key, last, with value 0; absent sinks are unseen."""
    assert problem.sinks is not None
    assert problem.sink_present is not None
    sink = problem.sinks.double().reshape(1, -1, 1, 1).expand(*x.shape[:-1], 1)
    present = problem.sink_present.reshape(1, -1, 1, 1)
    stored = r.elementwise * 3.0 + r.scores * 2.0
    return (
        torch.cat([x, sink.masked_fill(~present, -torch.inf)], -1),
        torch.cat([v, v.new_zeros((*v.shape[:-2], 1, v.shape[-1]))], -2),
        torch.cat([certain_e, stored * sink.abs()], -1),
        torch.cat([variance_e, (stored * sink).square() * MEAN_SQUARE], -1),
    )


def _exact_rows(
    problem: SoftmaxProblem, row: Row, v: torch.Tensor, r: Roundings, certain_e: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, H, M, 1) whose logits are all exactly 0 or vanishingly low, and the errors of these logits.

    There the exponentials are 1 or 0 in any algorithm that subtracts the maximum, but for what a sum of
    products that cancel may lose; with V on a coarse grid the sums are exact as well, and only P's storage,
    the division and the output round.
    """
    if row.x.shape[-1] != problem.seen.shape[-1] or not problem.seen.shape[-1]:
        return torch.zeros_like(row.count, dtype=torch.bool), torch.zeros_like(row.x)
    q, kt = problem.queries().double(), problem.keys().double().transpose(-1, -2)
    terms = (q != 0).double() @ (kt != 0).double()
    # Two opposite products cancel in any order; more may leave the rounding of a partial sum.
    lost = growth(terms, r.accumulate) * abs(problem.scale) * (q.abs() @ kt.abs())
    zero = (row.x == 0) & _cancels(q, kt)
    vanishing = (row.x + certain_e <= -150.0) & (r.elementwise > 2.0**-53)
    grid = bool((v == v.round()).all()) and float(v.abs().sum(-2).max() if v.numel() else 0.0) < 2.0**24
    exact = (zero | vanishing).all(-1, keepdim=True) & (row.largest == 0) & (row.count > 0) & grid
    # Products of half-precision numbers are exact in float32, so that two opposite ones cancel. Of wider ones
    # a residual is left where one product is rounded and the other fused into the addition.
    harmless = 2.0 if problem.dtype.itemsize == 2 else 0.0
    return exact, torch.where(zero & (terms > harmless), lost, 0.0)


def _cancels(q: torch.Tensor, kt: torch.Tensor) -> torch.Tensor:
    """Pairs (B, H, M, N) whose dot product is 0 however a kernel scales and rounds its operands, sums apart.

    That is: every nonzero product has an opposite with factors of the same magnitudes. A distortion of
        magnitudes that
    has no other symmetry keeps the dot product 0 in just that case.
    """

    def distorted(x: torch.Tensor) -> torch.Tensor:
        return x * (1.5 + 0.5 * torch.sin(x.abs() * 1e3 + 1.0))

    # Queries and keys are scaled apart: (3, 1)·(1, −3) is not 0 once 3c and c are rounded.
    dq, dk = distorted(q), kt * (1.5 + 0.5 * torch.cos(kt.abs() * 7e2 + 2.0))
    return (dq @ dk).abs() <= 1e-13 * (dq.abs() @ dk.abs())


def _output_budget(
    problem: SoftmaxProblem,
    reference: Enclosure,
    contract: Contract,
    r: Roundings,
    row: Row,
    v: torch.Tensor,
    certain_e: torch.Tensor,
    variance_e: torch.Tensor,
    logits: _Logits,
    exact: torch.Tensor,
) -> Budget:
    o = reference.value.nan_to_num(0.0)
    gauge = row.p @ v.abs()
    n = row.count
    # Only weights that are exactly 1 or 0 add up without rounding; 1/3 and exp(−log 3) do not.
    alone = exact & (n_top(row) == 1)
    terms = torch.where(exact, n_top(row).double(), n)
    sums = torch.where(alone, 0.0, growth(2.0 * terms + 8.0, r.accumulate))
    weights = torch.where(alone, 0.0, max(r.probabilities, r.operand))
    size = row.lse.abs() + 1.0
    division_free = torch.expm1((6.0 * r.elementwise + 2.0 * r.lse) * size).clamp(max=1e300)
    relative = sums + r.input + 6.0 * r.elementwise + division_free
    # 1 / (1 + η) − 1 for a normaliser that is off by the η of a sum as long.
    normaliser = torch.where(alone, 0.0, growth(4.0 * terms + 16.0, r.accumulate) / 2.0)
    normaliser = normaliser + torch.where(exact, 0.0, 2.0 * n * r.probabilities_tiny)
    # Perturbed weights can raise Σ p|v|, at most to the largest |v|.
    seen_sum = problem.seen.double() @ v[..., : problem.seen.shape[-1], :].abs()
    tiny = r.probabilities_tiny * seen_sum + r.accumulate_tiny * (2.0 * n + 8.0)
    tiny = torch.where(exact, 0.0, tiny) + (r.operand_tiny if r.input else 0.0)

    spread, sizes = Spread.of(row, v, o), Spread.of(row, v.abs(), gauge)

    def undivided(e: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Error for logit errors ``e`` and errors ``own`` of the numerator's terms, its normaliser exact."""
        inflated = gauge + sizes.shift(e)
        # No error is relative to nothing, even where the growth of rounding errors is unbounded.
        numerator = torch.where((inflated == 0) | (seen_sum == 0), 0.0, own * inflated)
        return spread.shift(e) + numerator + tiny

    before = undivided(certain_e, relative + weights)
    # A normaliser that sums P as stored shares its rounding, which then is one more error of the logits.
    shared = torch.where(row.x > -torch.inf, -torch.log1p(-weights.clamp(max=0.5)), 0.0)
    before = torch.maximum(before, undivided(certain_e + shared, relative))
    computed = problem.computed(r)
    if computed is not None:
        # Values that a kernel computes itself err by their own bounds, under perturbed weights.
        errors = computed[2].bound
        mean = row.p @ errors
        before = before + (mean + Spread.of(row, errors, mean).shift(certain_e)) * (1.0 + relative + weights)
    scaled = o.abs() + before
    before = before + torch.where(scaled == 0, 0.0, normaliser * scaled)
    certain = (before * (1.0 + r.output) + r.output * o.abs() + r.output_tiny) * _SLACK
    probable = _probable_output(problem, r, row, v, o, variance_e, logits)
    return _limits(problem, "o", o, certain, probable, contract, r, row, logits, gauge)


def n_top(row: Row) -> torch.Tensor:
    """How many keys share the largest logit, (…, 1)."""
    return (row.x == row.largest).sum(-1, keepdim=True)


def _probable_output(
    problem: SoftmaxProblem,
    r: Roundings,
    row: Row,
    v: torch.Tensor,
    o: torch.Tensor,
    variance_e: torch.Tensor,
    logits: _Logits,
) -> torch.Tensor:
    """Standard deviation of a healthy kernel's error, (B, H, M, E), from independent contributions."""
    p, n = row.p, row.count
    squares = p.square() @ v.square()
    variance = second_moment(p.square() * variance_e, v, o)
    variance = variance + _upheaval(row, v, o, variance_e)
    # Rounded constants (scale, log2 e) stretch all logits of a row alike.
    stretch = (p * torch.where(p > 0, row.x, 0.0)) @ v - o * (p * torch.where(p > 0, row.x, 0.0)).sum(
        -1, keepdim=True
    )
    variance = variance + (2.0 * r.elementwise * stretch).square() / 3.0
    # E e^δ − 1 = σ²/2: errors of either sign raise their weights, in all rows alike.
    raised = p * variance_e
    lift = (raised @ v - raised.sum(-1, keepdim=True) * o) / 2.0
    variance = variance + (_LEAN * lift).square()
    # Truncated q and k shrink all logits, truncated P and V the numerator.
    variance = variance + (2.0 * _LEAN * r.operand_lean) ** 2 * (stretch.square() + o.square())
    if max(r.operand, r.input) > 2.0**-20:
        variance = variance + _operand_response(problem, r, row, v, o, logits)
    stored = max(r.probabilities, r.operand) ** 2
    coincidence = _coincidence(row, max(r.probabilities, r.operand))
    # Weights that coincide in all rows err alike in all of them: not by chance but by up to u, so that the
    # mean of error/probable is at most 1 even where this is the only error.
    variance = variance + stored * (MEAN_SQUARE * squares + coincidence * o.square())
    variance = variance + r.input**2 * MEAN_SQUARE * squares
    if r.input:
        # Values that are subnormal in the operands' format are rounded to its smallest spacing.
        variance = variance + r.operand_tiny**2 / 3.0 * p.square().sum(-1, keepdim=True)
    variance = variance + r.probabilities_tiny**2 * v.square().sum(-2, keepdim=True) / 3.0
    computed = problem.computed(r)
    if computed is not None:
        variance = variance + p.square() @ computed[2].spread
    if r.truncated:
        variance = variance + (2.0**-23 * n / 2.0 * (p @ v.abs())).square()
    else:
        variance = variance + r.accumulate**2 * _summation_variance(n, squares, o)
        variance = variance + normaliser_rounding(row, r) * o.square()
        # Equal weights of equal values.
        alike = (alike_terms(p, -1, r) + alike_terms(v, -2, r) - 1.0).clamp(min=0.0)
        variance = variance + equal_terms(n * alike, o, r)
    variance = variance + (3.0 * r.elementwise * o).square() / 3.0
    variance = variance + half_spacing(o, r.output, r.output_tiny).square() / 3.0
    return (variance + n * r.accumulate_tiny**2 / 3.0).sqrt()


def query_rounding(problem: SoftmaxProblem, r: Roundings, q: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the rounding of each element of scale·q, (B, H, M, D); absolute if subnormal."""
    relative = max(r.operand, r.input) * math.sqrt(MEAN_SQUARE) * abs(problem.scale) * q.abs()
    return torch.maximum(relative, torch.where(q == 0, 0.0, r.operand_tiny / math.sqrt(3.0)))


def _operand_response(
    problem: SoftmaxProblem, r: Roundings, row: Row, v: torch.Tensor, o: torch.Tensor, logits: _Logits
) -> torch.Tensor:
    """Σ_d (σ_d Cov_p(k_d, v))², (B, H, M, E): o's response to rounded queries, one error for all keys.

    σ_d is the error of scale·q_d. Sampled with random signs r_d: E (Σ_d r_d c_d)² = Σ_d c_d².
    """
    generator = torch.Generator().manual_seed(0)
    extra = row.p.shape[-1] - logits.product.shape[-1]
    total = torch.zeros_like(o)
    sigma = query_rounding(problem, r, logits.q)
    for _ in range(PROBES):
        signs = torch.randint(0, 2, (logits.q.shape[-1],), generator=generator).double() * 2.0 - 1.0
        t = (sigma * signs) @ logits.k.transpose(-1, -2)
        weighted = row.p * torch.nn.functional.pad(t, (0, extra)) if extra else row.p * t
        total += (weighted @ v - weighted.sum(-1, keepdim=True) * o).square()
    return total / PROBES


def _upheaval(row: Row, v: torch.Tensor, o: torch.Tensor, variance_e: torch.Tensor) -> torch.Tensor:
    """Variance, (B, H, M, E), that :func:`upheaved_weights` make of o; 0 where errors of logits are small."""
    moved = upheaved_weights(row, variance_e)
    return second_moment(moved, v, o) if bool(moved.any()) else torch.zeros_like(o)


def upheaved_weights(row: Row, variance_e: torch.Tensor) -> torch.Tensor:
    """Variance of P, (B, H, M, N), where logits err by so much that the order of the keys is open.

    A weight is then not moved by its logit's error times itself: a key far below the largest may take its
    place. Keys count with the weight that they have three standard deviations further up.
    """
    variance = variance_e + variance_e.gather(-1, row.top)
    large = (variance > _LARGE_LOGIT_VARIANCE) & (row.x > -torch.inf)
    raised = torch.where(large, torch.exp((row.log_p + 3.0 * variance.sqrt()).clamp(max=0.0)), 0.0)
    return raised.square() * variance.clamp(max=1.0)


def _coincidence(row: Row, unit: float) -> torch.Tensor:
    """Σ p_j (mass of other keys whose weight agrees with p_j to u/4), (…, 1).

    Weights that agree so closely are rounded by the same amount, so that their errors add up instead of
    averaging out; with all weights equal this is 1 − 1/n. Irrelevant, and left out, where P is stored in
    full.
    """
    if unit < 2.0**-20:
        return torch.zeros_like(row.count)
    ordered, order = row.log_p.sort(-1)
    ordered = ordered.clamp(min=-1e30).contiguous()
    p = row.p.gather(-1, order)
    mass = torch.nn.functional.pad(p.cumsum(-1), (1, 0))
    high = torch.searchsorted(ordered, ordered + unit / 4.0, right=True)
    low = torch.searchsorted(ordered, ordered - unit / 4.0, right=False)
    near = mass.gather(-1, high) - mass.gather(-1, low)
    return (p * (near - p)).sum(-1, keepdim=True).clamp(min=0.0)


def _lse_budget(
    problem: SoftmaxProblem,
    reference: Enclosure,
    contract: Contract,
    r: Roundings,
    row: Row,
    certain_e: torch.Tensor,
    variance_e: torch.Tensor,
    logits: _Logits,
) -> Budget:
    lse = reference.value.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    n = row.count.squeeze(-1)
    m, size = row.largest.squeeze(-1).abs(), lse.abs()
    logarithm = (row.lse - row.largest).squeeze(-1)
    _, shift = normaliser_shift(row, certain_e)
    steps = 8.0 * r.elementwise * (1.0 + logarithm) + 4.0 * r.elementwise * (m + size)
    error = shift.squeeze(-1) + growth(2.0 * n + 8.0, r.accumulate) + steps
    certain = (error * (1.0 + r.output) + r.output * size + r.output_tiny) * _SLACK
    p2 = row.p.square()
    variance = (p2 * variance_e).sum(-1) + normaliser_rounding(row, r).squeeze(-1)
    if max(r.operand, r.input) > 2.0**-20 and logits.k.shape[-2]:
        p = row.p[..., : logits.k.shape[-2]]
        sigma = query_rounding(problem, r, logits.q)
        variance = variance + ((p @ logits.k) * sigma).square().sum(-1)
    stretch = (row.p * torch.where(row.p > 0, row.x, 0.0)).sum(-1)
    variance = variance + (2.0 * r.elementwise * stretch).square() / 3.0
    variance = variance + (2.0 * _LEAN * r.operand_lean * stretch).square()
    variance = variance + (_LEAN * (row.p * variance_e).sum(-1) / 2.0).square()
    variance = variance + (r.elementwise * (1.0 + logarithm)).square() * 4.0 / 3.0
    variance = variance + 2.0 * r.elementwise**2 * (m**2 + size**2) * MEAN_SQUARE
    variance = variance + half_spacing(lse, r.output, r.output_tiny).square() / 3.0
    return _limits(
        problem, "lse", lse, certain, variance.sqrt(), contract, r, row, logits, torch.zeros_like(lse)
    )


def _limits(
    problem: SoftmaxProblem,
    output: str,
    exact: torch.Tensor,
    certain: torch.Tensor,
    probable: torch.Tensor,
    contract: Contract,
    r: Roundings,
    row: Row,
    logits: _Logits,
    gauge: torch.Tensor,
) -> Budget:
    """What contract.md's edges leave open, ask literally, or let overflow."""
    shape = problem.shape(output)
    poisoned = broadcast_mask(problem.undetermined(), shape)
    threatened = broadcast_mask(_may_overflow(problem, r, row, logits, gauge), shape) & ~poisoned
    keyless = broadcast_mask(problem.keyless(), shape) & ~poisoned & ~threatened
    leaking = torch.zeros_like(poisoned)
    if contract.unseen_nonfinite == "may-leak":
        leaking = broadcast_mask(problem.tainted, shape) & ~poisoned
    asked = contract.empty_row if output == "o" else contract.empty_lse
    open_rows = keyless if asked == "undefined" else torch.zeros_like(keyless)
    if output == "lse" and problem.sink_present is not None:
        # The contract gives −inf for a row without keys; the formula gives the sink. Neither is held against
        # a kernel.
        open_rows = keyless & problem.sink_present.reshape(1, -1, 1)
    literal = {}
    if asked != "undefined":
        literal = {ASKED[asked]: keyless & ~open_rows & ~leaking}
    stored = problem.dtype if output == "o" else None
    largest_value = float(problem.v.abs().max()) if problem.v.numel() else 0.0
    largest = LARGEST[dtype_name(stored)] if stored is not None else r.largest
    overflow = exact.abs() - certain > largest
    either = (exact.abs() + certain > largest) & ~overflow
    digitless = (
        (certain > 2.0 * largest_value) & ~poisoned & ~threatened if output == "o" else poisoned & False
    )
    reasons = {
        "the row sees a non-finite input": int(poisoned.sum()),
        "only finiteness is asked: the declared precision leaves no digit": int(digitless.sum()),
        "an intermediate may overflow": int(threatened.sum()),
        "an unseen key is non-finite and the kernel declares that it may leak": int(leaking.sum()),
        "the contract leaves rows without keys open": int(open_rows.sum()),
    }
    return Budget(
        certain=certain,
        probable=probable,
        open=poisoned | threatened | leaking | open_rows,
        overflow=overflow,
        either=either,
        literal=literal,
        reasons={reason: count for reason, count in reasons.items() if count},
    )


def _may_overflow(
    problem: SoftmaxProblem, r: Roundings, row: Row, logits: _Logits, gauge: torch.Tensor
) -> torch.Tensor:
    """Rows (B, H, M) in which some algorithm's intermediate may pass half the largest number.

    q·k before scaling (in any order: Σ|q||k|), scores times log2 e, Σ P|v| with P relative to the row's
    maximum.
    """
    if not logits.product.shape[-1]:
        return torch.zeros(problem.row_shape, dtype=torch.bool)
    log2e = 1.0 / math.log(2.0)
    scores = torch.maximum(logits.scaled.abs(), logits.biased.abs()) * log2e
    if problem.bias is not None or problem.alibi is not None:
        scores = torch.maximum(scores, logits.bias * log2e)
    if problem.sinks is not None:
        scores = torch.maximum(scores, problem.sinks.double().abs().reshape(1, -1, 1, 1) * log2e)
    products = torch.maximum(logits.absolute, logits.absolute * abs(problem.scale) * log2e)
    high = products >= r.largest / 2.0
    high |= torch.maximum(scores, logits.scaled.abs()) >= r.scores_largest / 2.0
    rows = (high & problem.seen).any(-1)
    if gauge.dim() == 4:
        mass = torch.exp((row.lse - row.largest).clamp(max=700.0))
        rows |= ((gauge * mass) >= r.largest / 2.0).any(-1)
    computed = problem.computed(r)
    if computed is not None:
        q, k, v = (estimate.lost for estimate in computed)
        rows |= torch.zeros_like(rows) if q is None else q.any(-1)
        for lost in (k, v):
            if lost is not None:
                rows |= lost.flatten(2).any(-1, keepdim=True)
    return rows
