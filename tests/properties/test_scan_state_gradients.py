"""Gradients through the states of ``prefix_scan`` and ``rwkv4``, with the levels of states held constant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.budgets.decayed_softmax import RowErrors
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families import decayed_softmax
from attnproof.properties.families.decayed_softmax import DecayedSoftmax
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.prefix_scan import PREFIX_SCAN
from attnproof.properties.families.rwkv4 import RWKV4
from attnproof.properties.oracle import evaluate
from tests.properties import test_prefix_scan, test_rwkv4
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences
from tests.properties.test_sigmoid_family import HALF, OWN_ERROR, drawn, exact

SCALE = 0.7
FAMILIES = ("prefix_scan", "rwkv4")
ARITHMETICS = (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic(60))
INPUTS = {"prefix_scan": test_prefix_scan.INPUTS, "rwkv4": test_rwkv4.INPUTS}
# Level, mass and sums of a state, and all three in the order of the call.
NAMES = {"prefix_scan": ("m", "u", "w"), "rwkv4": ("p", "b", "a")}
ORDER = {"prefix_scan": ("m", "u", "w"), "rwkv4": ("a", "b", "p")}
Tensors = dict[str, torch.Tensor]


def inputs(
    family: str, sizes: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> tuple[Tensors, Tensors]:
    """Tensors, and the initial state by "initial_" + its name, for B, H, N; that of the last head neutral."""
    if family == "rwkv4":
        t = test_rwkv4.inputs(sizes, dtype, seed)
        state = test_rwkv4.initial_state(sizes, seed + 1)
    else:
        full = (*sizes, 2, 3)
        t = test_prefix_scan.inputs(full, dtype, seed)
        state = test_prefix_scan.initial_state(full, seed + 1)
    del t["do"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return t, {f"initial_{n}": x.to(wide) for n, x in zip(ORDER[family], state, strict=True)}


def called(family: str, t: Tensors, state: Tensors | None) -> DecayedSoftmax:
    """The problem of the call, its final state returned."""
    tensors = [t[name] for name in INPUTS[family]]
    given = None if state is None else tuple(state[f"initial_{name}"] for name in ORDER[family])
    options: dict[str, Any] = {"initial_state": given, "return_state": True}
    return (
        RWKV4.problem(*tensors, **options)
        if family == "rwkv4"
        else PREFIX_SCAN.problem(*tensors, scale=SCALE, **options)
    )


def cotangents(problem: DecayedSoftmax, seed: int) -> Tensors:
    """Normal ones of all outputs but the level."""
    level = problem.state_names[0]
    made = drawn({n: problem.shape(n) for n in problem.outputs if n != level}, torch.float64, seed)
    narrow = torch.float64 if problem.dtype == torch.float64 else torch.float32
    return {n: x.to(problem.dtype if n == "o" else narrow) for n, x in made.items()}


def scan(
    family: str, t: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], broken: str = ""
) -> Tensors:
    """The outputs by a recurrence; the levels are constant as they are made."""
    level, mass, sums = (state[f"initial_{name}"] for name in NAMES[family])
    if family == "rwkv4":
        s, v = t["k"].to(mass.dtype), t["v"].to(mass.dtype)[..., None]
        decay, bonus, sums = t["w"].to(mass.dtype), t["u"].to(mass.dtype), sums[..., None]
    else:
        s, v = (
            SCALE * (t["q"].to(mass.dtype)[None, :, None] * t["k"].to(mass.dtype)).sum(-1),
            t["v"].to(mass.dtype),
        )
        decay = bonus = torch.zeros(s.shape[1], dtype=mass.dtype)
    if broken == "constant state":
        mass, sums = mass.detach(), sums.detach()
    rows = []
    for step in range(s.shape[2]):
        now = s[..., step] + bonus
        top = torch.maximum(level, now).detach()
        kept, own = torch.exp(level - top), torch.exp(now - top)
        total = kept[..., None] * sums + own[..., None] * v[:, :, step]
        rows.append(total / (kept * mass + own)[..., None])
        faded = level + (decay.detach() if broken == "decay of the state constant" else decay)
        new = torch.maximum(faded, s[..., step])
        new = new if broken == "level not constant" else new.detach()
        kept, own = torch.exp(faded - new), torch.exp(s[..., step] - new)
        mass, sums = kept * mass + own, kept[..., None] * sums + own[..., None] * v[:, :, step]
        level = new
    o = torch.stack(rows, 2) if rows else v
    shaped = (lambda x: x[..., 0]) if family == "rwkv4" else (lambda x: x)
    return {
        "o": shaped(o).to(t["v"].dtype),
        **dict(zip(NAMES[family], (level, mass, shaped(sums)), strict=True)),
    }


def by_autograd(family: str, t: Tensors, state: Tensors, given: Tensors, broken: str = "") -> Tensors:
    """Outputs and gradients of :func:`scan`."""
    leaves = {name: x.clone().requires_grad_() for name, x in {**t, **state}.items()}
    found = scan(family, leaves, leaves, broken)
    loss = sum((found[name].to(c.dtype) * c).sum() for name, c in given.items())
    assert isinstance(loss, torch.Tensor)
    gradients = torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True)
    named = {
        f"d{name}": torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(leaves.items(), gradients, strict=True)
    }
    return {**{name: x.detach() for name, x in found.items()}, **named}


@pytest.mark.parametrize("sizes", [(1, 2, 3), (2, 2, 1), (1, 2, 0), (0, 2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_numerical_differentiation(family: str, sizes: tuple[int, int, int]) -> None:
    """Of a loss in which e^m, as it would be undisturbed, multiplies what a final state holds."""
    t, state = inputs(family, sizes, torch.float32, seed=sum(sizes))
    if not sizes[2]:
        # Where nothing is written to a neutral state its level stays −∞.
        state = {name: x[:, :1].expand(x.shape).clone() for name, x in state.items()}
    problem = called(family, t, state)
    given = cotangents(problem, seed=3)
    level, mass, sums = NAMES[family]
    order = [f"initial_{name}" for name in ORDER[family]]

    def outputs(x: Mapping[str, Any]) -> dict[str, Any]:
        found = [x[name] for name in order]
        if family == "rwkv4":
            return test_rwkv4.naive(x, found)
        return test_prefix_scan.naive(x, SCALE, found)

    with mpmath.workdps(60):
        tensors = {name: exact(x) for name, x in {**t, **state}.items()}
        weights = {name: exact(c) for name, c in given.items()}
        fixed = outputs(tensors)[level]

    def loss(x: Mapping[str, Any]) -> Any:
        found = outputs({**x, f"initial_{level}": tensors[f"initial_{level}"]})
        total = (found["o"] * weights["o"]).sum() + mpmath.mpf(0)
        for place in np.ndindex(sizes[:2]):
            moved = mpmath.exp(found[level][place] - fixed[place])
            total += sum(moved * np.sum(found[name][place] * weights[name][place]) for name in (mass, sums))
        return total

    expected = central_differences(loss, {n: x for n, x in tensors.items() if n != f"initial_{level}"})
    for arithmetic in ARITHMETICS:
        found = evaluate(GradientProblem(problem, {}, given), arithmetic)
        assert set(found) == {f"d{name}" for name in expected}
        for name, value in expected.items():
            assert found[f"d{name}"].value.shape == {**t, **state}[name].shape
            assert enclosure_contains(found[f"d{name}"], value, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((found[f"d{name}"].radius <= 1e-9).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_hand_over_in_two_parts_gives_the_gradients_of_the_whole(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chain rule: what the second part has for its initial state is the first part's cotangent."""
    monkeypatch.setattr(decayed_softmax, "_PAIRS", 2**12)
    t, state = inputs(family, (2, 3, 90), torch.float64, seed=4)
    problem, cut = called(family, t, state), 37
    given = cotangents(problem, seed=5)
    expected = by_autograd(family, t, state, given)

    def gradients(part: Tensors, carried: Tensors, asked: Tensors) -> Tensors:
        found = evaluate(GradientProblem(called(family, part, carried), {}, asked), EnclosureArithmetic())
        return {name: x.value for name, x in found.items()}

    first, second = (
        {name: x[:, :, piece] if name in "kv" else x for name, x in t.items()}
        for piece in (slice(None, cut), slice(cut, None))
    )
    handed = evaluate(called(family, first, state), EnclosureArithmetic())
    late = gradients(
        second,
        {f"initial_{name}": handed[name].value for name in ORDER[family]},
        {**given, "o": given["o"][:, :, cut:]},
    )
    passed = {name: late[f"dinitial_{name}"] for name in NAMES[family][1:]}
    early = gradients(first, state, {**passed, "o": given["o"][:, :, :cut]})
    whole = gradients(t, state, given)
    for name in whole:
        plain = name.removeprefix("d")
        if plain in "kv":
            joined = torch.cat((early[name], late[name]), 2)
        else:
            joined = early[name] if plain in state else early[name] + late[name]
        for found in (whole[name], joined):
            assert (found - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max(), name


def ratios(
    problem: DecayedSoftmax, given: Tensors, found: Tensors, contract: Contract
) -> dict[str, tuple[float, float]]:
    """By gradient: the largest error/certain, and the rms of error/probable, of what is judged."""
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    gradients = GradientProblem(problem, forward, given)
    reference = evaluate(gradients, EnclosureArithmetic())
    measured = {}
    for name, budget in gradients.budgets(reference, contract).items():
        error = (found[name].double() - reference[name].value)[~budget.open]
        worst = torch.where(error == 0, 0.0, error.abs() / budget.certain[~budget.open])
        square = torch.where(error == 0, 0.0, error / budget.probable[~budget.open]).square()
        measured[name] = (float(worst.max()), float(square.mean().sqrt())) if len(error) else (0.0, math.nan)
    return measured


def measured(
    family: str, dtype: torch.dtype, seed: int = 6, broken: str = "", kind: str = ""
) -> dict[str, tuple[float, float]]:
    """Of :func:`scan` in float32 on 60 positions."""
    t, state = inputs(family, (2, 3, 60), dtype, seed)
    level = f"initial_{NAMES[family][0]}"
    if kind == "wide":
        t["k"] = (t["k"].double() * 60.0).to(dtype)
    elif kind == "high state":
        state[level][:, 0] += 60.0
    elif kind == "heavy state":
        for name in state:
            state[name] = state[name] * (1.0 if name == level else 1e6)
    problem = called(family, t, state)
    given = cotangents(problem, seed)
    return ratios(problem, given, by_autograd(family, t, state, given, broken), Contract(family=family))


@pytest.mark.parametrize("kind", ["", "wide", "high state", "heavy state"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("family", FAMILIES)
def test_recurrences_stay_within_the_budgets(family: str, dtype: torch.dtype, kind: str) -> None:
    for name, (worst, rms) in measured(family, dtype, kind=kind).items():
        assert worst <= 1.0, name
        # Where nothing is rounded to half precision, states and their gradients are nearly exact.
        least = 0.05 if dtype == torch.float32 and not kind else 0.0
        assert least <= rms <= 2.0, (name, rms)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_gradients_exceed_the_certain_budget(family: str, dtype: torch.dtype) -> None:
    """Levels with gradients of their own, initial states that are constants, decays of what is carried."""
    moved = measured(family, dtype, broken="level not constant")
    assert moved["dk"][0] > 1.0
    constant = measured(family, dtype, broken="constant state")
    _, mass, sums = NAMES[family]
    assert min(constant[f"dinitial_{mass}"][0], constant[f"dinitial_{sums}"][0]) > 1.0
    assert max(worst for name, (worst, _) in constant.items() if "initial" not in name) <= 1.0
    if family == "rwkv4":
        still = measured(family, dtype, broken="decay of the state constant")
        assert still["dw"][0] > 1.0
        assert max(worst for name, (worst, _) in still.items() if name != "dw") <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_are_near_the_gradients_own_size(family: str, dtype: torch.dtype) -> None:
    """A gradient that is wrong by a hundredth is seen in float32, and by a third in bfloat16."""
    t, state = inputs(family, (1, 3, 40), dtype, seed=7)
    problem = called(family, t, state)
    given = cotangents(problem, seed=8)
    gradients = GradientProblem(problem, evaluate(problem, EnclosureArithmetic(), gauges=True), given)
    reference = evaluate(gradients, EnclosureArithmetic())
    part = 0.01 if dtype == torch.float32 else 0.34
    for name, budget in gradients.budgets(reference, Contract(family=family)).items():
        if name.startswith("dinitial_"):
            seen = reference[name].value.abs() * part > budget.certain
            assert bool(seen[:, :-1].any()), name
            assert bool((budget.certain[:, -1] <= 1e-30).all()), "the last head's state is neutral"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_positions_cotangents_pass(family: str) -> None:
    t, state = inputs(family, (2, 2, 0), torch.float16, seed=4)
    problem = called(family, t, state)
    given = cotangents(problem, seed=5)
    found = evaluate(GradientProblem(problem, {}, given), EnclosureArithmetic())
    budgets = GradientProblem(problem, {}, given).budgets(found, Contract(family=family))
    for name in NAMES[family][1:]:
        assert torch.equal(found[f"dinitial_{name}"].value, given[name].double())
        certain = budgets[f"dinitial_{name}"].certain
        assert bool((certain[:, 0] <= 1e-6).all())
        # Of a neutral state 0 is as right: e^−∞ multiplies whatever its parts are.
        assert bool((certain[:, 1] >= given[name][:, 1].double().abs()).all())
    assert not bool(budgets["dk"].open.any())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_level_without_mass_has_gradients_until_it_drowns_the_row(family: str) -> None:
    """u₀ = 0: gradients by u₀ and w₀ are those of any other state; 1000 above all logits nothing is asked."""
    t, state = inputs(family, (1, 3, 4), torch.float32, seed=3)
    level, mass, sums = (f"initial_{name}" for name in NAMES[family])
    state[mass][:], state[sums][:] = 0.0, 0.0
    state[level][:] = torch.tensor([[1.0, 40.0, 1000.0]])
    problem = called(family, t, state)
    given = cotangents(problem, seed=5)
    found = ratios(problem, given, by_autograd(family, t, state, given), Contract(family=family))
    assert max(worst for worst, _ in found.values()) <= 1.0
    double = [{name: x.double() for name, x in part.items()} for part in (t, state, given)]
    expected = by_autograd(family, *double)
    gradients = GradientProblem(problem, evaluate(problem, EnclosureArithmetic()), given)
    reference = evaluate(gradients, EnclosureArithmetic())
    for name, budget in gradients.budgets(reference, Contract(family=family)).items():
        if name.startswith("dinitial_"):
            assert bool(budget.open[:, 2].all())
            assert not bool(budget.open[:, :2].any())
            error = (reference[name].value - expected[name])[:, :2].abs()
            assert bool((error <= 1e-12 * expected[name][:, :2].abs()).all())
    wide, high = ({name: x.double() for name, x in part.items()} for part in (t, state))
    high[level][:] = torch.tensor([[1.0, 500.0, 650.0]])
    problem = called(family, wide, high)
    gradients = GradientProblem(
        problem, evaluate(problem, EnclosureArithmetic()), cotangents(problem, seed=5)
    )
    reference = evaluate(gradients, EnclosureArithmetic())
    is_open = gradients.budgets(reference, Contract(family=family))[f"d{mass}"].open
    assert is_open.tolist() == [[False, False, True]]


def test_rescalings_are_counted_by_the_level_of_an_initial_state() -> None:
    """Of mass e^20 it outweighs all logits up to 10, and is scaled down at each of them."""
    t, state = inputs("prefix_scan", (1, 1, 50), torch.float32, seed=3)
    t["q"], t["k"] = torch.ones(1, 2), torch.linspace(0.0, 10.0, 50)[None, None, :, None].expand(1, 1, 50, 2)
    state = {name: torch.full_like(x, math.exp(20.0)) for name, x in state.items()}
    state["initial_m"] = torch.zeros(1, 1)
    errors = RowErrors(called("prefix_scan", t, state), Contract(family="prefix_scan"))
    found = errors.weighed(torch.tensor([49]))
    assert float(found.rescales[..., -1]) >= 49 * errors.r.exp
    assert found.start is not None
    assert float(found.start.certain) >= 49 * errors.r.exp
    assert float(found.rescales[..., -2]) <= 8 * errors.r.exp


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_differentiated(family: str) -> None:
    t, state = inputs(family, (1, 2, 5), torch.bfloat16, seed=5)
    level, *others = NAMES[family]
    names = [f"initial_{name}" for name in ORDER[family] if name != level]
    problem = called(family, t, state)
    assert problem.differentiated == (*INPUTS[family], *names)
    assert {problem.input_dtype(name) for name in names} == {torch.float32}
    assert problem.input_dtype("k") == torch.bfloat16
    assert called(family, t, None).differentiated == INPUTS[family]
    long = {
        name: x[:, :, :1].expand(1, 2, 4200, *x.shape[3:]) if name in "kv" else x for name, x in t.items()
    }
    assert called(family, long, state).differentiated == ()
    zero = {level: torch.zeros(1, 2), others[0]: torch.ones(1, 2)}
    assert problem.differentiate(EnclosureArithmetic(), zero)
    with pytest.raises(
        ContractError, match=f"{family}: a cotangent of the final state's {level} holds"
    ) as raised:
        problem.differentiate(EnclosureArithmetic(), {level: torch.ones(1, 2)})
    assert f"give cotangents of {others[0]} and {others[1]}" in str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_of_equal_terms_round_alike(family: str) -> None:
    """All cotangents 1, and the first position outweighs the rest: a recurrence adds one number 300 times."""
    t, state = inputs(family, (1, 6, 300), torch.float32, seed=7)
    t["k"] = (
        (4.0 - 0.1 * torch.arange(300.0)).reshape(1, 1, 300, *(1,) * (t["k"].dim() - 3)).expand_as(t["k"])
    )
    for name in ("q", "w", "u"):
        if name in t:
            t[name] = torch.full_like(t[name], 0.0 if family == "rwkv4" else 1.0)
    state[f"initial_{NAMES[family][0]}"] -= 30.0
    problem = called(family, t, state)
    given = {name: torch.ones_like(c) for name, c in cotangents(problem, 8).items()}
    found = ratios(problem, given, by_autograd(family, t, state, given), Contract(family=family))
    assert max(worst for worst, _ in found.values()) <= 1.0
    assert max(rms for name, (_, rms) in found.items() if name != "dw") <= 1.5
    assert min(found["dk"][1], found["dv"][1]) >= 0.1
