"""Problems that a kernel may be solving in place of the one it was given.

A key too few, a mask ignored, a scale applied twice.

An alteration *explains* a call when every judged element of its outputs lies within the budget that a right
kernel would have for the altered problem, and the exact result of the problem as given does not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from attnproof.properties.arithmetic.enclosures import EnclosureArithmetic
from attnproof.properties.families.base import Problem
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.logsumexp import RowsProblem
from attnproof.properties.families.softmax import SoftmaxProblem
from attnproof.properties.families.visibility import visible
from attnproof.properties.oracle import evaluate
from attnproof.statistics import deviation
from attnproof.trials import JudgedCall

__all__ = ["TILES", "alterations", "explains", "only_gradients", "with_score_factor"]

TILES = (16, 32, 64, 128, 256)
"""Tiles of keys that kernels are written in."""
# Keys up to so many are left out one at a time.
_SINGLE_KEYS = 40

Altered = Iterator[tuple[str, Problem]]


def explains(problem: Problem, judged: JudgedCall) -> bool | None:
    """Whether ``problem`` explains what came back; None where it cannot be told from the problem as given.

    Args:
        problem: an altered problem with the outputs of the call's own.
        judged: a call with a trial and outputs.
    """
    trial = judged.trial
    assert trial is not None
    found = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budgets = problem.budgets(found, trial.contract)
    rows = dict.fromkeys(problem.outputs, len(problem.row_shape))
    asked = judged.outputs
    if trial.gradients is not None:
        altered = GradientProblem(problem, dict(found), trial.gradients.cotangents)
        found = {**found, **evaluate(altered, EnclosureArithmetic())}
        budgets = {**budgets, **altered.budgets(found, trial.contract)}
        rows |= {name: altered.row_axes(name) for name in altered.outputs}
        if only_gradients(judged):
            asked = {name: asked[name] for name in altered.outputs}

    def within(outputs: Mapping[str, torch.Tensor]) -> bool:
        for name, got in outputs.items():
            vague = ~budgets[name].open & ~(found[name].radius <= budgets[name].certain)
            distance = deviation(got, found[name], budgets[name], rows[name])
            wrong = distance.nonfinite.any() or distance.misplaced.any() or (distance.certain > 1.0).any()
            if bool(wrong) or bool(vague.any()):
                return False
        return True

    if not within(asked):
        return False
    if not bool(problem.seen.any()):  # type: ignore[attr-defined]
        return None  # any cause that leaves nothing looks like this
    exact = {name: trial.reference.outputs[name].value for name in asked}
    return None if within(exact) else True


def only_gradients(judged: JudgedCall) -> bool:
    """Whether the outputs are right and a gradient is not: then only the backward pass is in question."""
    trial = judged.trial
    if trial is None or trial.gradients is None:
        return False
    return not any(failure.output in trial.problem.outputs for failure in judged.event.failures)


def alterations(judged: JudgedCall) -> Altered:
    """Every alteration that the call's problem has, plainest first, each with what it means in words.

    What depends on the call's own sizes stands in brackets at the end: words that are alike up to there name
    one alteration.
    """
    assert judged.trial is not None
    problem, options = judged.trial.problem, judged.trial.inputs.options
    if isinstance(problem, RowsProblem):
        yield from _rows(problem)
    elif isinstance(problem, SoftmaxProblem):
        alignment = judged.trial.contract.causal_alignment
        for family in (_masks, _options, _heads, _scales, _keys):
            yield from family(problem, {**options, "causal_alignment": alignment})


def with_score_factor(problem: SoftmaxProblem, factor: float) -> SoftmaxProblem:
    """The problem with q·k multiplied by ``scale · factor``."""
    return replace(problem, scale=problem.scale * factor)


def _sight(problem: SoftmaxProblem, options: Mapping[str, Any], **changes: Any) -> SoftmaxProblem:
    """The problem with the keys seen by position under changed options; a bias of −inf masks as before."""
    names = ("causal", "window", "cu_seqlens", "causal_alignment")
    given = {name: options[name] for name in names if options.get(name) is not None}
    m, n = problem.seen.shape[-2:]
    before, after = visible(m, n, **given), visible(m, n, **{**given, **changes})
    return _seeing(problem, (problem.seen | ~before) & after)


def _seeing(problem: SoftmaxProblem, seen: torch.Tensor) -> SoftmaxProblem:
    return replace(problem, seen=seen.expand(problem.seen.shape))


def _masks(problem: SoftmaxProblem, options: Mapping[str, Any]) -> Altered:
    """Causal masks and windows shifted, aligned otherwise or ignored; packed sequences run together."""
    m, n = problem.seen.shape[-2:]
    if options.get("causal"):
        top = options["causal_alignment"] == "top-left"
        i, j = torch.arange(m)[:, None] + (0 if top else n - m), torch.arange(n)[None, :]
        free = _sight(problem, options, causal=False)
        yield (
            "each query misses its own key: the causal mask is strict (j < i in place of j ≤ i)",
            _seeing(problem, problem.seen & (j < i)),
        )
        yield (
            "each query sees one key beyond the causal diagonal (j ≤ i + 1)",
            _seeing(problem, free.seen & (j <= i + 1)),
        )
        other = "bottom-right" if top else "top-left"
        words = f"the causal mask is aligned {other}, not {options['causal_alignment']}"
        yield words, _sight(problem, options, causal_alignment=other)
        yield "the causal mask is ignored", free
    window = options.get("window")
    if window is not None:
        yield "the window is ignored", _sight(problem, options, window=None)
        for side, name in enumerate(("left", "right")):
            for change, words in ((-1, "one key too narrow"), (1, "one key too wide")):
                if window[side] is not None:
                    sides = [s if k != side else s + change for k, s in enumerate(window)]
                    yield f"the window's {name} side is {words}", _sight(problem, options, window=sides)
            if window[side] is not None:
                sides = [s if k != side else None for k, s in enumerate(window)]
                yield f"the window's {name} side is ignored", _sight(problem, options, window=sides)
        left, right = (s if s is None else s + shift for s, shift in zip(window, (n - m, m - n), strict=True))
        yield (
            "the window is placed by the row number, not by the position i + N − M",
            _sight(problem, options, window=(left, right)),
        )
    if options.get("cu_seqlens") is not None:
        yield (
            "the packed sequences see one another: cu_seqlens is ignored",
            _sight(problem, options, cu_seqlens=None),
        )


def _options(problem: SoftmaxProblem, options: Mapping[str, Any]) -> Altered:
    """Bias, soft cap and sinks ignored or applied in the wrong place."""
    if problem.bias is not None:
        bias = problem.bias.double()
        unmasked = _sight(replace(problem, bias=None), options)
        everywhere = visible(*problem.seen.shape[-2:], **_positions(options))
        yield "the bias is ignored", replace(unmasked, seen=everywhere.expand(problem.seen.shape))
        yield "the bias is ignored but for its −inf", replace(problem, bias=None)
        yield "the bias is multiplied by the scale", replace(problem, bias=bias * problem.scale)
        yield "the bias is subtracted", replace(problem, bias=-bias)
        first = bias[:1, :1].expand(bias.shape)
        yield "the bias of the first head and batch entry is used for all", replace(problem, bias=first)
        yield "the bias is taken in bits, not in nats", replace(problem, bias=bias * math.log(2.0))
    if problem.softcap is not None:
        yield "the soft cap is ignored", replace(problem, softcap=None)
        if problem.bias is not None:
            s = (problem.q.double() @ problem.keys().double().mT) * problem.scale
            biased = problem.softcap * torch.tanh((s + problem.bias.double()) / problem.softcap)
            late = replace(problem, softcap=None, bias=biased - s)
            yield "the bias is added before the soft cap, not after it", late
    if problem.sinks is not None:
        yield "the sinks are ignored", replace(problem, sinks=None, sink_present=None)
        sinks = problem.sinks.double()
        yield "the sinks are taken in bits, not in nats", replace(problem, sinks=sinks * math.log(2.0))
    if not bool(problem.seen.all()):
        s = problem.scores(EnclosureArithmetic()).value
        old = torch.zeros(()) if problem.bias is None else problem.bias.double()
        zeroed = torch.where(problem.seen, old, old - s).expand(problem.seen.shape)
        everything = _seeing(replace(problem, bias=zeroed), torch.ones_like(problem.seen))
        yield "masked keys enter the softmax with score 0 in place of −inf", everything


def _positions(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("causal", "window", "cu_seqlens", "causal_alignment")
    return {name: options[name] for name in names if options.get(name) is not None}


def _heads(problem: SoftmaxProblem, options: Mapping[str, Any]) -> Altered:
    """Query heads that read another key/value head, batch entries that read another's."""
    heads, groups = problem.q.shape[1], problem.k.shape[1]
    mappings: list[tuple[str, Callable[[int], int]]] = [
        ("query head h reads key/value head h mod G, not that of its group", lambda h: h % groups),
        ("all query heads read key/value head 0", lambda h: 0),
        ("the key/value heads are read in reverse order", lambda h: groups - 1 - h // problem.group),
        ("query head h reads the key/value head min(h, G − 1)", lambda h: min(h, groups - 1)),
    ]
    if groups > 1:
        for words, read in mappings:
            index = [read(h) for h in range(heads)]
            k, v = problem.k[:, index], problem.v[:, index]
            yield words, replace(problem, k=k, v=v)
            yield f"{words}, for keys alone", replace(problem, k=k, v=problem.values())
            yield f"{words}, for values alone", replace(problem, k=problem.keys(), v=v)
    if problem.q.shape[0] > 1:
        first = replace(problem, k=problem.k[:1].expand_as(problem.k), v=problem.v[:1].expand_as(problem.v))
        yield "all batch entries read the keys and values of the first", first


def _scales(problem: SoftmaxProblem, options: Mapping[str, Any]) -> Altered:
    """Scores multiplied by something else than the scale that was given."""
    width, scale = problem.q.shape[-1], problem.scale
    others = (
        ("the scores are ignored: the mean of the values seen is returned", 0.0),
        ("the scale is ignored", 1.0),
        ("the scale is applied twice", scale * scale),
        (f"the scale is 1/D in place of the one given (1/{width})", 1.0 / width),
        (f"the scale is 1/√D in place of the one given (1/√{width})", width**-0.5),
        (
            f"the scale is 1/√E in place of the one given (1/√{problem.v.shape[-1]})",
            problem.v.shape[-1] ** -0.5,
        ),
        ("the softmax is taken to base 2, without the factor log2 e", scale * math.log(2.0)),
        ("the factor log2 e is applied and the exponential is to base e", scale / math.log(2.0)),
        ("the scores have the wrong sign", -scale),
    )
    for words, other in others:
        if other != scale:
            yield words, replace(problem, scale=other)
    best = problem.scores(EnclosureArithmetic()).value.masked_fill(~problem.seen, -torch.inf)
    if best.shape[-1]:
        winner = torch.nn.functional.one_hot(best.argmax(-1), best.shape[-1]).bool()
        words = "each row returns the value of its best key alone, unweighted"
        yield words, _seeing(problem, winner & problem.seen)


def _keys(problem: SoftmaxProblem, options: Mapping[str, Any]) -> Altered:
    """Keys of the tail left out, and padding that is counted."""
    n = problem.seen.shape[-1]
    j = torch.arange(n)
    for tile in TILES:
        rest = n % tile
        if rest:
            words = f"the last, incomplete tile of {tile} keys is left out (keys {n - rest}…{n - 1})"
            yield words, _seeing(problem, problem.seen & (j < n - rest))
            pad = tile - rest
            words = (
                f"padding keys of score 0, up to a multiple of {tile}, join the normaliser ({pad} of them)"
            )
            yield words, _padded(problem, pad)
        if n > tile:
            words = f"only the first tile of {tile} keys is read ({n - tile} keys are left out)"
            yield words, _seeing(problem, problem.seen & (j < tile))
            last = (n - 1) // tile * tile
            words = f"only the last tile of {tile} keys counts ({last} earlier ones are lost)"
            yield words, _seeing(problem, problem.seen & (j >= last))
    for key in range(n) if n <= _SINGLE_KEYS else (0, n - 1):
        name = {0: "the first key", n - 1: "the last key"}.get(key, f"key {key}")
        yield f"{name} is left out", _seeing(problem, problem.seen & (j != key))


def _padded(problem: SoftmaxProblem, count: int) -> SoftmaxProblem:
    """``count`` more keys of score 0 and value 0, which every query sees."""

    def longer(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[axis] = count
        return torch.cat([tensor, tensor.new_zeros(shape)], axis)

    return replace(
        problem,
        k=longer(problem.k, 2),
        v=longer(problem.v, 2),
        seen=torch.nn.functional.pad(problem.seen, (0, count), value=True),
        bias=None if problem.bias is None else longer(problem.bias, 3),
    )


def _rows(problem: RowsProblem) -> Altered:
    """Entries of the tail left out, and padding that is counted."""
    n = problem.x.shape[-1]
    j = torch.arange(n)
    for tile, drop in itertools.product((*TILES, 1024, 4096), (False, True)):
        rest = n % tile
        if drop and rest:
            words = f"the last, incomplete tile of {tile} entries is left out (entries {n - rest}…{n - 1})"
            yield words, replace(problem, seen=problem.seen & (j < n - rest))
        elif rest and problem.kind == "logsumexp":
            pad = tile - rest
            yield (
                f"padding entries of value 0, up to a multiple of {tile}, are counted ({pad} of them)",
                replace(
                    problem,
                    x=torch.nn.functional.pad(problem.x, (0, pad)),
                    seen=torch.nn.functional.pad(problem.seen, (0, pad), value=True),
                ),
            )
    for entry, name in ((0, "first"), (n - 1, "last")):
        if n:
            yield f"the {name} entry is left out", replace(problem, seen=problem.seen & (j != entry))
    yield "entries of −inf are counted as 0", replace(problem, seen=torch.ones_like(problem.seen))
