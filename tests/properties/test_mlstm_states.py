"""mLSTM with initial states and packed sequences: scalar loops, hand-overs, and what is asked of a call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.mlstm import MLSTM
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.mlstm_calls import INPUTS, STATES, Bounds, call, cotangents_of, problem_of, spans
from tests.properties.naive_gradients import central_differences
from tests.properties.test_sigmoid_family import OWN_ERROR, exact

CONTRACT = Contract(family="mlstm")
# B, H, N, D, E; offsets of packed sequences or None; the middle of the initial levels.
CASES: list[tuple[tuple[int, ...], Bounds, float]] = [
    ((2, 1, 2, 2, 2), None, 0.0),
    ((1, 1, 4, 2, 1), (0, 0, 1, 4), 1.0),
    ((1, 1, 2, 1, 2), None, -40.0),
    ((1, 1, 2, 2, 1), None, 40.0),
    ((2, 1, 0, 2, 2), None, 0.5),
]


def levels(t: Mapping[str, Any], bounds: Bounds) -> Any:
    """m after the last position of every sequence, by its recurrence."""
    m = np.array(t["initial_m"], dtype=object)
    for s, (b, start, stop) in enumerate(spans(t["q"].shape, bounds)):
        for h, step in np.ndindex(m.shape[1], stop - start):
            forget = -mpmath.log(1 + mpmath.exp(-t["f"][b, h, start + step]))
            m[s, h] = max(forget + m[s, h], t["i"][b, h, start + step])
    return m


def naive(t: Mapping[str, Any], bounds: Bounds, scale: float, m: Any) -> dict[str, Any]:
    """o, C' and n' by the recurrence of C and n as printed, in units of e^m only at the ends."""
    zero = mpmath.mpf(0)
    o = np.full(t["v"].shape, zero, dtype=object)
    memory = np.concatenate((t["initial_state"], t["initial_n"][..., None]), -1)
    memory = memory * np.frompyfunc(mpmath.exp, 1, 1)(t["initial_m"])[..., None, None]
    width, values = t["q"].shape[3], range(t["v"].shape[3])
    for s, (b, start, stop) in enumerate(spans(t["q"].shape, bounds)):
        for h, step in np.ndindex(memory.shape[1], stop - start):
            place = (b, h, start + step)
            forget, write = 1 / (1 + mpmath.exp(-t["f"][place])), mpmath.exp(t["i"][place])
            v = [*t["v"][place], mpmath.mpf(1)]
            for d in range(width):
                for e, x in enumerate(v):
                    memory[s, h, d, e] = forget * memory[s, h, d, e] + write * t["k"][place][d] * x
            read = [mpmath.mpf(scale) * sum(t["q"][place] * memory[s, h, :, e]) for e in range(len(v))]
            for e in values:
                o[place][e] = read[e] / max(abs(read[-1]), mpmath.mpf(1))
    down = np.where(m == mpmath.mpf("-inf"), zero, np.frompyfunc(mpmath.exp, 1, 1)(-m))
    memory = np.where(m[..., None, None] == mpmath.mpf("-inf"), zero, memory * down[..., None, None])
    return {"o": o, "state": memory[..., :-1], "n": memory[..., -1]}


@pytest.mark.parametrize(("sizes", "bounds", "level"), CASES)
def test_definition_and_gradients_hold_against_loops_and_numerical_differentiation(
    sizes: tuple[int, ...], bounds: Bounds, level: float
) -> None:
    """Levels are held constant: the loops' loss has those of the point at which it is differentiated."""
    t, scale = call(sizes, bounds, torch.float32, sum(sizes), level=level), 0.7
    problem, numbers = problem_of(t, bounds, scale), {name: exact(x) for name, x in t.items()}
    with mpmath.workdps(60):
        m = levels(numbers, bounds)
        expected = {**naive(numbers, bounds, scale, m), "m": m}
    cotangents = {"o": t["do"], "state": t["dstate"], "n": t["dn"]}
    inputs = {name: x for name, x in numbers.items() if name in (*INPUTS, *STATES)}

    def loss(x: Mapping[str, Any]) -> Any:
        found = naive({**numbers, **x}, bounds, scale, m)
        return sum((found[name] * exact(c)).sum() for name, c in cotangents.items()) + mpmath.mpf(0)

    gradients = central_differences(loss, inputs)
    for arithmetic in (EnclosureArithmetic(), ArbArithmetic(192), MpmathArithmetic(60)):
        forward = evaluate(problem, arithmetic, gauges=True)
        for name, value in expected.items():
            assert tuple(forward[name].value.shape) == value.shape == problem.shape(name)
            finite = np.array(value, dtype=float) > -math.inf
            assert np.array_equal(forward[name].value.isfinite().numpy(), finite)
            if finite.all():
                assert enclosure_contains(forward[name], value, OWN_ERROR).all(), (arithmetic.name, name)
        found = evaluate(GradientProblem(problem, forward, cotangents), arithmetic)
        for name in (*INPUTS, *STATES):
            assert enclosure_contains(found[f"d{name}"], gradients[name], 1e-25).all(), (
                arithmetic.name,
                name,
            )
            assert bool((found[f"d{name}"].radius <= 1e-8).all())


def apart(a: Enclosure, b: Enclosure, slack: float = 0.0) -> bool:
    """Whether two enclosures of one number have none in common, ``slack`` of their sizes apart."""
    known = a.value.isfinite()
    assert torch.equal(a.value[~known], b.value[~known])
    distance = torch.where(known, (a.value - b.value).abs(), 0.0)
    return bool((distance > a.radius + b.radius + slack * (1.0 + a.value.abs().nan_to_num(posinf=0.0))).any())


def test_packed_sequences_are_separate_calls() -> None:
    bounds = (0, 3, 3, 41, 75)
    t, a = call((1, 2, 75, 4, 3), bounds, torch.float32, seed=5, f=3.0), EnclosureArithmetic()
    problem = problem_of(t, bounds, 0.4)
    whole = evaluate(problem, a, gauges=True)
    whole |= evaluate(GradientProblem(problem, whole, cotangents_of(t)), a)
    for s, (_, start, stop) in enumerate(spans(t["q"].shape, bounds)):
        part = {
            name: x[:, :, start:stop] if name in (*INPUTS, "do") else x[s : s + 1] for name, x in t.items()
        }
        alone = problem_of(part, None, 0.4)
        found = evaluate(alone, a, gauges=True)
        found |= evaluate(GradientProblem(alone, found, cotangents_of(part)), a)
        assert set(found) == set(whole)
        for name, x in found.items():
            of_positions = name.removeprefix("gauge:") in ("o", *(f"d{y}" for y in INPUTS))
            place = (slice(None), slice(None), slice(start, stop)) if of_positions else (slice(s, s + 1),)
            assert not apart(x, Enclosure(whole[name].value[place], whole[name].radius[place])), (s, name)


@pytest.mark.parametrize("cut", [0, 1, 33, 70])
def test_a_state_may_be_handed_over_anywhere(cut: int) -> None:
    """Outputs, and gradients: those of the second part's initial state are the first part's cotangents.

    The state that is handed over is rounded to float64.
    """
    t, a = call((2, 2, 70, 3, 2), None, torch.float64, seed=6, level=1.0, f=3.0), EnclosureArithmetic()

    def both(x: Mapping[str, torch.Tensor]) -> dict[str, Enclosure]:
        problem = problem_of(x, None, 0.4)
        forward = evaluate(problem, a)
        return {**forward, **evaluate(GradientProblem(problem, forward, cotangents_of(x)), a)}

    whole, sequence = both(t), (*INPUTS, "do")
    first = {name: x[:, :, :cut] if name in sequence else x for name, x in t.items()}
    middle = evaluate(problem_of(first, None, 0.4), a)
    second = {name: x[:, :, cut:] if name in sequence else x for name, x in t.items()}
    for name, state in zip(("initial_state", "initial_n", "initial_m"), ("state", "n", "m"), strict=True):
        second[name] = middle[state].value
    late = both(second)
    early = both({**first, "dstate": late["dinitial_state"].value, "dn": late["dinitial_n"].value})
    for name, x in whole.items():
        if name in ("o", *(f"d{y}" for y in INPUTS)):
            value, radius = (
                torch.cat([getattr(y[name], field) for y in (early, late)], 2)
                for field in ("value", "radius")
            )
            assert not apart(x, Enclosure(value, radius), 1e-13), name
        else:
            assert not apart(x, (early if name.startswith("d") else late)[name], 1e-13), name


def test_states_of_nothing_are_the_initial_ones() -> None:
    """Of sequences without positions, exactly; the level of a neutral one is −∞, and gradients pass."""
    bounds = (0, 0, 0, 2, 2)
    t, a = call((1, 2, 2, 2, 2), bounds, torch.float32, seed=7), EnclosureArithmetic()
    t["initial_m"][3, 0], t["initial_state"][3, 0], t["initial_n"][3, 0] = -torch.inf, 0.0, 0.0
    problem = problem_of(t, bounds, 0.4)
    found = evaluate(problem, a, gauges=True)
    budgets = problem.budgets(found, CONTRACT)
    gradients = evaluate(GradientProblem(problem, found, cotangents_of(t)), a)
    for s in (0, 1, 3):
        for name in ("state", "n", "m"):
            initial = "initial_state" if name == "state" else f"initial_{name}"
            assert torch.equal(found[name].value[s], t[initial][s].double())
            assert not bool(budgets[name].open[s].any())
        for name in ("state", "n"):
            assert torch.equal(gradients[f"dinitial_{name}"].value[s], t[f"d{name}"][s].double())
    assert budgets["m"].literal[-math.inf].tolist() == [[0, 0], [1, 0], [0, 0], [1, 0]]
    none = MLSTM.problem(*(t[name][:, :, :0] for name in INPUTS), scale=0.4, return_state=True)
    assert bool((evaluate(none, a)["m"].value == -torch.inf).all())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", math.nan),
        ("f", math.inf),
        ("q", math.nan),
        ("initial_m", math.inf),
        ("initial_n", math.nan),
        ("initial_state", -math.inf),
    ],
)
def test_what_sees_a_bad_input_is_closed(name: str, value: float) -> None:
    """Rows and states of its own sequence and head, and no other."""
    bounds = (0, 3, 3, 7, 9)
    t = call((1, 2, 9, 2, 2), bounds, torch.float32, seed=4)
    t[name][(2, 1) if name.startswith("initial") else (0, 1, 4)] = value
    problem = problem_of(t, bounds, 0.6)
    assert problem.nonfinite
    budgets = problem.budgets(evaluate(problem, EnclosureArithmetic(), gauges=True), CONTRACT)
    rows, states = torch.zeros(1, 2, 9, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.bool)
    first = 3 if name.startswith("initial") else 4
    rows[0, 1, first : 5 if name == "q" else 7] = True
    states[2, 1] = name != "q"
    assert torch.equal(budgets["o"].open.all(-1), rows)
    assert torch.equal(budgets["o"].open.any(-1), rows)
    for output in ("state", "n", "m"):
        assert torch.equal(budgets[output].open.reshape(4, 2, -1).all(-1), states)
        assert torch.equal(budgets[output].open.reshape(4, 2, -1).any(-1), states)
    leaking = Contract(family="mlstm", unseen_nonfinite="may-leak")
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    open_rows = problem.budgets(forward, leaking)["o"].open.all(-1)
    assert open_rows[0, 1].tolist() == (
        [False] * 4 + [True] + [False] * 4 if name == "q" else [False] * 3 + [True] * 4 + [False] * 2
    )


def test_rows_are_explained_by_their_sequence() -> None:
    bounds = (0, 3, 3, 41, 75)
    problem = problem_of(call((1, 2, 75, 4, 3), bounds, torch.float32, seed=5), bounds, 0.4)
    said = problem.explain_row("o", (0, 0, 40))
    assert "position 37 of packed sequence 2) sees 38 positions and an initial state" in said
    assert "after 38 positions" in problem.explain_row("state", (2, 1, 2))
    assert "and an initial state" not in problem.explain_row("o", (0, 1, 40))
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    assert problem.vacuity(forward, problem.budgets(forward, CONTRACT)) == []


STATE = (torch.zeros(2, 1, 3, 2), torch.zeros(2, 1, 3), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        (STATE[0], r"initial_state is Tensor; mlstm asks for the tuple \(state, n, m\)"),
        (STATE[:2], r"initial_state is tuple of 2"),
        ((*STATE[:2], None), "initial_state's m is None"),
        ((STATE[0].mT, *STATE[1:]), r"initial_state's state has shape \(2, 1, 2, 3\)"),
        ((STATE[0], STATE[1].double(), STATE[2]), r"initial_state's n has .* torch.float64"),
        (
            (STATE[0] + 2.0, STATE[1], STATE[2] - torch.inf),
            r"\(sequence, head\) = \(0, 0\) has m = -inf, the largest \|state\| = 2.0 and the largest",
        ),
        ((STATE[0], STATE[1] - 1.0, STATE[2] - torch.inf), r"the largest \|n\| = 1.0; where m is −inf"),
    ],
)
def test_wrong_states_are_named(initial: Any, message: str) -> None:
    t = call((2, 1, 4, 3, 2), None, torch.float32, seed=1)
    with pytest.raises(ContractError, match=message):
        MLSTM.problem(*(t[name] for name in INPUTS), scale=0.5, initial_state=initial)


def test_wrong_offsets_are_named() -> None:
    t = call((1, 1, 4, 3, 2), None, torch.float32, seed=1)
    with pytest.raises(ContractError, match="offsets must rise from 0 to N = 4"):
        problem_of(t, (0, 3), 0.5)
