"""What was done to an output: a factor, an offset, a narrower storage; NaN, and what led there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence

import torch

from attnproof.judge import Trial
from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.budgets.base import EXP_OVERFLOW
from attnproof.properties.families.softmax import SoftmaxProblem
from attnproof.search.alterations import TILES, explains, with_score_factor
from attnproof.statistics import deviation
from attnproof.trials import JudgedCall

__all__ = ["distortions", "wrong_elements"]

# Fewer elements than this tell no pattern of rounding.
_PATTERN = 16
# Share of errors of one sign from which rounding is called one-sided: 16 signs agree by chance in 2^-15.
_ONE_SIDED = 0.98
_NARROWER = {
    "float32": ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"),
    "float16": ("float8_e4m3fn", "float8_e5m2"),
    "bfloat16": ("float8_e4m3fn", "float8_e5m2"),
}
_FACTORS = {"log2 e": 1 / math.log(2.0), "log 2": math.log(2.0), "2": 2.0, "1/2": 0.5, "−1": -1.0}


def wrong_elements(judged: JudgedCall, name: str) -> torch.Tensor:
    """Elements of an output beyond their certain budget, or not finite, or without their literal value."""
    trial = judged.trial
    assert trial is not None
    got = judged.outputs[name]
    rows = trial.row_axes(name)
    found = deviation(got, trial.reference.outputs[name], trial.budgets[name], rows)
    return ((found.certain > 1.0) | found.nonfinite | found.misplaced).reshape(got.shape)


def distortions(witnesses: Sequence[JudgedCall]) -> Iterator[str]:
    """In words, each distortion that all failing witnesses show.

    Args:
        witnesses: calls with outputs, largest first; the words are those for the first that fails.
    """
    failing = [judged for judged in witnesses if judged.event.verdict == "FAIL"]
    for distortion in _DISTORTIONS:
        found = [distortion(judged) for judged in failing]
        told = [words for words in found if words]
        if told and len(told) == len(found) and len({re.sub(r"[\d.e+-]+", "#", w) for w in told}) == 1:
            yield told[0]
            return
    if failing:
        yield from filter(None, (_narrow(failing[0]), _one_sided(failing[0])))
    shared = {_explanation(judged) for judged in failing}
    for words in shared if len(shared) == 1 else ():
        if words:
            yield f"the errors are consistent with {words}"


def _explanation(judged: JudgedCall) -> str:
    """The weaker declaration that the judge found to explain the errors, "" if none."""
    found = [re.search(r"consistent with ([^:]*):", failure.reason) for failure in judged.event.failures]
    return next((match[1] for match in found if match), "")


def _pairs(judged: JudgedCall) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Name, got, exact and certain of each output with a wrong element, over its judged finite elements."""
    trial = judged.trial
    assert trial is not None
    for name, got in judged.outputs.items():
        if wrong_elements(judged, name).any():
            exact, budget = trial.reference.outputs[name].value, trial.budgets[name]
            use = ~budget.open & exact.isfinite()
            yield name, got.double()[use], exact[use], budget.certain[use]


def _constant(judged: JudgedCall) -> str:
    """All zero, or never written."""
    for name, got, exact, _ in _pairs(judged):
        if bool((got == 0).all()) and bool((exact != 0).any()):
            return f"{name} is 0 everywhere"
        if bool(got.isnan().all()):
            return f"{name} is NaN everywhere, as memory that was never written to"
    return ""


def _factor(judged: JudgedCall) -> str:
    """The output is the exact one times a constant."""
    for name, got, exact, certain in _pairs(judged):
        if not bool(got.isfinite().all()) or not float(exact.square().sum()):
            continue
        factor = float((got * exact).sum() / exact.square().sum())
        if bool(((got - factor * exact).abs() <= max(1.0, abs(factor)) * certain).all()):
            known = next((f" ({n})" for n, f in _FACTORS.items() if abs(factor / f - 1) < 1e-3), "")
            return f"{name} is {factor:.4g}{known} times the exact result"
    return ""


def _offset(judged: JudgedCall) -> str:
    """A log-sum-exp is off by a constant."""
    for name, got, exact, certain in _pairs(judged):
        if name == "o" or not bool(got.isfinite().all()) or not len(got):
            continue
        offset = float((got - exact).mean())
        if bool(((got - exact - offset).abs() <= certain).all()):
            known = " (log 2)" if abs(abs(offset) / math.log(2.0) - 1) < 1e-3 else ""
            return f"{name} is the exact result plus {offset:.4g}{known}"
    return ""


def _score_factor(judged: JudgedCall) -> str:
    """The scores are off by a factor: a golden-section search for the one that fits best."""
    trial = judged.trial
    assert trial is not None
    if not isinstance(trial.problem, SoftmaxProblem) or "o" not in judged.outputs:
        return ""
    problem, got = trial.problem, judged.outputs["o"].double()
    weight = torch.where(trial.budgets["o"].open, 0.0, 1.0 / trial.budgets["o"].certain.clamp(min=1e-30))
    if not bool(got.isfinite().all()):
        return ""
    logits = problem.q.double() @ problem.keys().double().mT * problem.scale
    v = problem.values().double()

    def misfit(log_factor: float) -> float:
        s = logits * math.exp(log_factor)
        if problem.softcap is not None:
            s = problem.softcap * torch.tanh(s / problem.softcap)
        s = s if problem.bias is None else s + problem.bias.double()
        p = torch.softmax(s.masked_fill(~problem.seen, -torch.inf), -1).nan_to_num(0.0)
        return float(((p @ v - got) * weight).square().sum())

    if problem.sinks is not None:
        return ""
    factor = math.exp(_minimum(misfit, [k / 8.0 for k in range(-16, 17)]))
    if abs(factor - 1.0) < 1e-6 or explains(with_score_factor(problem, factor), judged) is not True:
        return ""
    return f"the scores are {factor:.4g} times what they should be"


def _minimum(function: Callable[[float], float], grid: Sequence[float]) -> float:
    """Where ``function`` is least: the best point of ``grid``, refined between its neighbours."""
    best = min(range(len(grid)), key=lambda k: function(grid[k]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(48):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if function(a) < function(b) else (a, high)
    return (low + high) / 2.0


def _row_factors(judged: JudgedCall) -> str:
    """Each row of o is the exact one times a factor of its own."""
    trial = judged.trial
    assert trial is not None
    if "o" not in judged.outputs or judged.outputs["o"].shape[-1] < 2:
        return ""
    got, exact = judged.outputs["o"].double(), trial.reference.outputs["o"].value
    budget = trial.budgets["o"]
    if not bool(got.isfinite().all()) or not wrong_elements(judged, "o").any():
        return ""
    norm = exact.square().sum(-1, keepdim=True)
    factor = torch.where(norm > 0, (got * exact).sum(-1, keepdim=True) / norm.clamp(min=1e-300), 1.0)
    fits = (got - factor * exact).abs() <= factor.abs().clamp(min=1.0) * budget.certain
    if not bool((fits | budget.open).all()):
        return ""
    low, high = float(factor.min()), float(factor.max())
    return f"each row of o is off by a factor of its own ({low:.4g} to {high:.4g}): its normaliser is wrong"


def _unrescaled(judged: JudgedCall) -> str:
    """Tiles of keys are weighed against their own running maximum, and never rescaled to the last one."""
    trial = judged.trial
    assert trial is not None
    if not isinstance(trial.problem, SoftmaxProblem) or not wrong_elements(judged, "o").any():
        return ""
    problem, budget = trial.problem, trial.budgets["o"]
    s = problem.scores(EnclosureArithmetic()).value.masked_fill(~problem.seen, -torch.inf)
    n = s.shape[-1]
    if problem.sinks is not None or not n:
        return ""
    lse = torch.logsumexp(s, -1, keepdim=True)
    for tile in TILES:
        running = s.cummax(-1).values
        ends = [min((j // tile + 1) * tile, n) - 1 for j in range(n)]
        weights = torch.exp(s - running[..., ends]).nan_to_num(0.0)
        total = torch.exp(lse - running[..., -1:]).clamp(min=1e-300)
        expected = (weights / total) @ problem.values().double()
        growth = (weights.sum(-1, keepdim=True) / total).clamp(min=1.0)
        near = (judged.outputs["o"].double() - expected).abs() <= 2.0 * growth * budget.certain
        if bool((near | budget.open).all()):
            return f"the accumulator is not rescaled when a tile of {tile} keys raises the maximum"
    return ""


def _nonfinite(judged: JudgedCall) -> str:
    """Which magnitudes lead to a NaN or an infinity."""
    trial = judged.trial
    assert trial is not None
    if "nonfinite" not in [failure.rule for failure in judged.event.failures]:
        return ""
    return _overflow_words(trial, judged)


def _overflow_words(trial: Trial, judged: JudgedCall) -> str:
    problem = trial.problem
    bad = [~got.isfinite() & ~trial.budgets[name].open for name, got in judged.outputs.items()]
    rows = [b.flatten(len(problem.row_shape)).any(-1) if b.dim() > len(problem.row_shape) else b for b in bad]
    row = torch.stack(rows).any(0)
    if not bool(row.any()) or not isinstance(problem, SoftmaxProblem):
        return ""
    s = problem.q.double() @ problem.keys().double().mT * problem.scale
    seen = s.masked_fill(~problem.seen, -torch.inf)[row]
    first = problem.seen[row].double().argmax(-1) if seen.shape[-1] else torch.zeros(0)
    product = float((s / problem.scale)[row].abs().max()) if seen.numel() and problem.scale else 0.0
    empty = ~problem.seen[row].any(-1)
    if bool(empty.all()):
        return "only rows that see no key are not finite: −inf − (−inf), or 0/0"
    if float(seen.amax(-1).min()) > EXP_OVERFLOW:
        words = f"every row that is not finite has a score above {EXP_OVERFLOW:.4g}, where exp overflows"
        return f"{words} float32: the maximum is not subtracted"
    if product > torch.finfo(torch.float16).max and trial.case.dtype == "float16":
        return f"q·k reaches {product:.4g}, beyond float16: it is stored in float16 before the scale"
    if int(first.min()) >= _PATTERN:
        return (
            f"every row that is not finite sees no key before key {int(first.min())}: −inf − (−inf) in a tile"
        )
    return ""


def _narrow(judged: JudgedCall) -> str:
    """Outputs that a narrower format holds exactly."""
    trial = judged.trial
    assert trial is not None
    for name, got, _, _ in _pairs(judged):
        found = got[got.isfinite() & (got != 0)]
        for narrow in _NARROWER.get(trial.family.output_dtype(name, trial.case.dtype), ()):
            dtype = getattr(torch, narrow)
            if len(found) >= _PATTERN and torch.equal(found.to(torch.float32).to(dtype).double(), found):
                return f"every element of {name} is a number of {narrow}: it was stored so on the way"
    return ""


def _one_sided(judged: JudgedCall) -> str:
    """Errors that all point toward zero."""
    for name, got, exact, _ in _pairs(judged):
        error = ((got - exact) * exact.sign())[(got != exact) & (exact != 0)]
        if len(error) >= _PATTERN and float((error < 0).double().mean()) >= _ONE_SIDED:
            return f"every error of {name} is toward zero: something is truncated that should be rounded"
    return ""


_DISTORTIONS: tuple[Callable[[JudgedCall], str], ...] = (
    _nonfinite,
    _constant,
    _factor,
    _offset,
    _score_factor,
    _unrescaled,
    _row_factors,
)
