"""Prefix scan attention: the definition, its gradients and budgets, against scalar loops over the formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families import decayed_softmax
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.prefix_scan import PREFIX_SCAN
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences
from tests.properties.test_sigmoid_family import HALF, OWN_ERROR, drawn, exact, judged

INPUTS = ("q", "k", "v")
CONTRACT = Contract(family="prefix_scan")
ARITHMETICS = (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic(60))
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """q, k, v and do for B, H, N, D, E."""
    b, h, n, d, e = sizes
    return drawn({"q": (h, d), "k": (b, h, n, d), "v": (b, h, n, e), "do": (b, h, n, e)}, dtype, seed)


def initial_state(sizes: tuple[int, ...], seed: int) -> State:
    """Normal exponents, masses from 1/4 on; the state of the last head is neutral."""
    b, h, _, _, e = sizes
    t = drawn({"m": (b, h), "u": (b, h), "w": (b, h, e)}, torch.float32, seed)
    m, u, w = t["m"], t["u"].abs() + 0.25, t["w"]
    m[:, -1], u[:, -1], w[:, -1] = -torch.inf, 0.0, 0.0
    return m, u, w


def naive(t: Mapping[str, Any], scale: float, state: Any = None) -> dict[str, Any]:
    """o, m, u and w by loops: every row sums over all positions up to it."""
    q, k, v = t["q"], t["k"], t["v"]
    batch, heads, length, width = k.shape
    zero = mpmath.mpf(0)
    found = {"o": np.full(v.shape, zero, dtype=object)}
    found |= {name: np.full((batch, heads), zero, dtype=object) for name in ("m", "u")}
    found["w"] = np.full((batch, heads, v.shape[3]), zero, dtype=object)
    for b, h in np.ndindex(batch, heads):
        logits, values = [], []
        if state is not None and state[0][b, h] != -mpmath.inf:
            logits, values = [state[0][b, h]], [(state[1][b, h], state[2][b, h])]
        for t_ in range(length):
            s = sum((q[h, d] * k[b, h, t_, d] for d in range(width)), zero) * mpmath.mpf(scale)
            logits.append(s)
            values.append((mpmath.mpf(1), v[b, h, t_]))
            weights = [mpmath.exp(x) for x in logits]
            total = sum((e * u for e, (u, _) in zip(weights, values, strict=True)), zero)
            for c in range(v.shape[3]):
                found["o"][b, h, t_, c] = (
                    sum((e * w[c] for e, (_, w) in zip(weights, values, strict=True)), zero) / total
                )
        found["m"][b, h] = max(logits, default=-mpmath.inf)
        for s, (u, w) in zip(logits, values, strict=True):
            e = mpmath.exp(s - found["m"][b, h])
            found["u"][b, h] += e * u
            for c in range(v.shape[3]):
                found["w"][b, h, c] += e * w[c]
    return found


def assert_definition(
    t: Mapping[str, torch.Tensor], scale: float, state: State | None = None, radius: float = 1e-9
) -> None:
    problem = PREFIX_SCAN.problem(
        *(t[name] for name in INPUTS), scale=scale, initial_state=state, return_state=True
    )
    with mpmath.workdps(60):
        numbers = None if state is None else [exact(x) for x in state]
        expected = naive({name: exact(x) for name, x in t.items()}, scale, numbers)
    for arithmetic in ARITHMETICS:
        found = evaluate(problem, arithmetic, gauges=True)
        for name, value in expected.items():
            assert tuple(found[name].value.shape) == value.shape == problem.shape(name)
            assert enclosure_contains(found[name], value, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((found[name].radius <= radius).all()), (arithmetic.name, name)


SIZES = [(2, 1, 4, 2, 3), (1, 2, 5, 3, 1), (1, 2, 1, 2, 2), (1, 1, 0, 2, 2), (0, 2, 3, 2, 1)]


@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_states_are_those_of_loops(sizes: tuple[int, ...]) -> None:
    t = inputs(sizes, torch.float32, seed=sum(sizes))
    assert_definition(t, -1.3)
    assert_definition(t, 0.7, initial_state(sizes, seed=sum(sizes)))


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_those_of_numerical_differentiation(sizes: tuple[int, ...]) -> None:
    t = inputs(sizes, torch.float32, seed=sum(sizes))
    cotangent = t.pop("do")
    weights = exact(cotangent)
    expected = central_differences(
        lambda x: (naive(x, 0.9)["o"] * weights).sum() + mpmath.mpf(0),
        {name: exact(x) for name, x in t.items()},
    )
    problem = PREFIX_SCAN.problem(*t.values(), scale=0.9)
    for arithmetic in ARITHMETICS:
        found = evaluate(GradientProblem(problem, {}, {"o": cotangent}), arithmetic)
        for name, value in expected.items():
            assert found[f"d{name}"].value.shape == t[name].shape
            assert enclosure_contains(found[f"d{name}"], value, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((found[f"d{name}"].radius <= 1e-9).all())


@pytest.mark.parametrize("kind", ["rising", "equal", "overflow"])
def test_limits_of_the_logits(kind: str) -> None:
    """Maxima that rise in every step, all logits equal, and logits whose exponentials overflow float32."""
    t = inputs((1, 2, 6, 1, 2), torch.float32, seed=3)
    t["q"] = torch.ones_like(t["q"])
    if kind == "rising":
        t["k"] = torch.linspace(-60.0, 60.0, 6).reshape(1, 1, 6, 1).expand(1, 2, 6, 1).clone()
    elif kind == "equal":
        t["k"] = torch.full_like(t["k"], 7.0)
    else:
        t["k"] = t["k"] * 4000.0
    assert_definition(t, 1.0)
    problem = PREFIX_SCAN.problem(*(t[name] for name in INPUTS), scale=1.0, return_state=True)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budgets = problem.budgets(forward, CONTRACT)
    o, state = kernel(t, 1.0, "recurrent")
    for name, x in zip(("o", "m", "u", "w"), (o, *state), strict=True):
        assert not bool(budgets[name].open.any())
        assert bool(((x.double() - forward[name].value).abs() <= budgets[name].certain).all()), name


def test_blocks_of_rows_and_columns_give_what_autograd_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in blocks of 14, and 520 columns in parts of 64 after rows in blocks."""
    for length, pairs in ((70, 70 * 14), (520, 2**20)):
        monkeypatch.setattr(decayed_softmax, "_PAIRS", pairs)
        t = inputs((1, 1, length, 3, 2), torch.float64, seed=8)
        leaves = [t[name].clone().requires_grad_() for name in INPUTS]
        s = (leaves[0][None, :, None] * leaves[1]).sum(-1) * 0.7
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        o = torch.softmax(s[:, :, None, :].masked_fill(hidden, -torch.inf), -1) @ leaves[2]
        expected = torch.autograd.grad(o, leaves, t["do"])
        problem = PREFIX_SCAN.problem(*(t[name] for name in INPUTS), scale=0.7, return_state=True)
        found = evaluate(problem, EnclosureArithmetic())
        assert (found["o"].value - o).abs().max() <= 1e-13
        assert found["o"].radius.max() <= 1e-12
        assert (found["m"].value - s.amax(-1)).abs().max() <= 1e-14
        gradients = evaluate(GradientProblem(problem, {}, {"o": t["do"]}), EnclosureArithmetic())
        for name, value in zip(INPUTS, expected, strict=True):
            assert (gradients[f"d{name}"].value - value).abs().max() <= 1e-11 * value.abs().max()


def combined(left: State, right: State, broken: str = "") -> State:
    """The monoid's product, of float32 tensors; (−inf, 0, 0) is neutral without NaN."""
    m = torch.maximum(left[0], right[0])
    shift = torch.where(m.isfinite(), m, 0.0)
    a, b = torch.exp(left[0] - shift), torch.exp(right[0] - shift)
    if broken == "one side rescaled":
        a = torch.ones_like(a)
    return m, a * left[1] + b * right[1], a[..., None] * left[2] + b[..., None] * right[2]


def kernel(
    t: Mapping[str, torch.Tensor], scale: float, form: str, state: State | None = None, broken: str = ""
) -> tuple[torch.Tensor, State]:
    """o and the last state, with float32 inside."""
    q, k, v = (t[name].float() for name in INPUTS)
    batch, heads, length, width = v.shape
    query = q[None, :, None]
    if broken == "query of the position":
        query = torch.cat(
            (query.expand(batch, heads, 1, -1), 1.1 * query.expand(batch, heads, length - 1, -1)), 2
        )
    s = (query * k).sum(-1) * scale
    neutral = (
        torch.full((batch, heads), -torch.inf),
        torch.zeros(batch, heads),
        torch.zeros(batch, heads, width),
    )
    last: State = neutral if state is None else state
    if form == "two-pass":
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = s[:, :, None, :].masked_fill(hidden, -torch.inf)
        m = x.amax(-1, keepdim=True)
        p = torch.exp(x - m)
        return (p @ v / p.sum(-1, keepdim=True)).to(t["v"].dtype), last
    leaves = (s, torch.ones_like(s), v)
    if form == "recurrent":
        rows = []
        for j in range(length):
            new = combined(last, (leaves[0][..., j], leaves[1][..., j], leaves[2][:, :, j]), broken)
            last = new if broken != "maximum not carried" else (leaves[0][..., j], new[1], new[2])
            rows.append(last[2] / last[1][..., None])
        return torch.stack(rows, 2).to(t["v"].dtype), last
    # Hillis and Steele: after a step of d every element holds 2d positions.
    held, step = leaves, 1
    while step < length:
        before = (held[0][..., :-step], held[1][..., :-step], held[2][:, :, :-step])
        after = (held[0][..., step:], held[1][..., step:], held[2][:, :, step:])
        m, u, w = combined(before, after, broken)
        held = (
            torch.cat((held[0][..., :step], m), -1),
            torch.cat((held[1][..., :step], u), -1),
            torch.cat((held[2][:, :, :step], w), 2),
        )
        step *= 2
    start = tuple(x[:, :, None].expand(y.shape) for x, y in zip(last, held, strict=True))
    whole = combined((start[0], start[1], start[2]), held, broken)
    ends = (whole[0][:, :, -1], whole[1][:, :, -1], whole[2][:, :, -1])
    return (whole[2] / whole[1][..., None]).to(t["v"].dtype), ends


def with_gradients(t: Mapping[str, torch.Tensor], scale: float, form: str) -> dict[str, torch.Tensor]:
    """o and autograd's gradients, through the maximum as well."""
    leaves = {name: t[name].float().requires_grad_() for name in INPUTS}
    o, _ = kernel(leaves, scale, form)
    gradients = torch.autograd.grad(o, tuple(leaves.values()), t["do"].float())
    found = {"o": o.detach(), **{f"d{name}": x for name, x in zip(INPUTS, gradients, strict=True)}}
    return {name: x.to(t["v"].dtype) for name, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_healthy_kernels_stay_within_the_certain_budget_and_near_the_probable_one(dtype: torch.dtype) -> None:
    squares: dict[str, list[float]] = {}
    for seed, form in enumerate(("recurrent", "doubling", "two-pass")):
        t = inputs((2, 2, 50, 16, 6), dtype, seed)
        problem = PREFIX_SCAN.problem(*(t[name] for name in INPUTS), scale=0.25)
        for name, (worst, square) in judged(problem, t["do"], with_gradients(t, 0.25, form)).items():
            assert worst <= 1.0, (name, form)
            squares.setdefault(name, []).append(square)
    for name, values in squares.items():
        assert 0.04 <= math.sqrt(sum(values) / len(values)) <= 1.5, name


@pytest.mark.parametrize("form", ["recurrent", "doubling"])
def test_maxima_that_rise_in_every_step(form: str) -> None:
    """One factor e^−0.004 in each of 300 steps rounds alike each time; a tree multiplies nine times."""
    t = inputs((1, 2, 300, 1, 4), torch.float32, seed=1)
    t["q"], t["k"] = (
        torch.ones(2, 1),
        (0.004 * torch.arange(300.0)).reshape(1, 1, 300, 1).expand(1, 2, 300, 1),
    )
    problem = PREFIX_SCAN.problem(*(t[name] for name in INPUTS), scale=1.0)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(forward, CONTRACT)["o"]
    error = kernel(t, 1.0, form)[0].double() - forward["o"].value
    assert bool((error.abs() <= budget.certain).all())
    assert (error / budget.probable).square().mean().sqrt() <= 1.5


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("form", ["recurrent", "doubling"])
def test_states_of_healthy_kernels(dtype: torch.dtype, form: str) -> None:
    sizes = (2, 3, 40, 8, 5)
    t, state = inputs(sizes, dtype, seed=5), initial_state(sizes, seed=6)
    problem = PREFIX_SCAN.problem(
        *(t[name] for name in INPUTS), scale=1.0, initial_state=state, return_state=True
    )
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budgets = problem.budgets(forward, CONTRACT)

    def excess(broken: str) -> dict[str, float]:
        o, last = kernel(t, 1.0, form, state, broken)
        return {
            name: float(((x.double() - forward[name].value).abs() / budgets[name].certain).max())
            for name, x in zip(("o", "m", "u", "w"), (o, *last), strict=True)
        }

    assert not any(bool(budgets[name].open.any()) for name in budgets)
    assert max(excess("").values()) <= 1.0
    wrong = excess("one side rescaled")
    assert wrong["m"] <= 1.0
    assert min(wrong["o"], wrong["u"], wrong["w"]) > 1.0


@pytest.mark.parametrize("broken", ["query of the position", "maximum not carried", "one side rescaled"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_broken_kernels_exceed_the_certain_budget(broken: str, dtype: torch.dtype) -> None:
    t = inputs((1, 2, 30, 16, 5), dtype, seed=3)
    problem = PREFIX_SCAN.problem(*(t[name] for name in INPUTS), scale=0.5)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(forward, CONTRACT)["o"]
    o, _ = kernel(t, 0.5, "recurrent", broken=broken)
    assert bool(((o.double() - forward["o"].value).abs() > budget.certain).any())


def test_an_initial_exponent_without_mass_leaves_open_what_it_drowns() -> None:
    """m₀ = 1000 and u₀ = 0: a kernel's weights e^{s − 1000} are all 0, and 0/0 is not held against it."""
    sizes = (1, 2, 3, 2, 2)
    t = inputs(sizes, torch.float32, seed=4)
    m, u, w = torch.tensor([[1000.0, 3.0]]), torch.zeros(1, 2), torch.zeros(1, 2, 2)
    assert_definition(t, 1.0, (m, u, w))
    problem = PREFIX_SCAN.problem(*(t[name] for name in INPUTS), scale=1.0, initial_state=(m, u, w))
    budget = problem.budgets(evaluate(problem, EnclosureArithmetic()), CONTRACT)["o"]
    assert bool(budget.open[0, 0].all())
    assert not bool(budget.open[0, 1].any())


def test_no_positions_return_the_initial_state() -> None:
    sizes = (2, 3, 0, 2, 2)
    t, state = inputs(sizes, torch.float16, seed=4), initial_state(sizes, seed=4)
    for given in (None, state):
        problem = PREFIX_SCAN.problem(
            *(t[name] for name in INPUTS), scale=1.0, initial_state=given, return_state=True
        )
        found = evaluate(problem, EnclosureArithmetic(), gauges=True)
        budgets = problem.budgets(found, CONTRACT)
        empty = torch.ones(2, 3, dtype=torch.bool) if given is None else state[0] == -torch.inf
        assert torch.equal(found["m"].value == -torch.inf, empty)
        assert torch.equal(budgets["m"].literal[-math.inf], empty)
        assert torch.equal(
            found["w"].value, torch.zeros(2, 3, 2).double() if given is None else state[2].double()
        )
        assert budgets["w"].certain.max() <= 1e-6


@pytest.mark.parametrize(
    ("name", "value"), [("q", math.nan), ("k", math.inf), ("v", -math.inf), ("m", math.inf), ("w", math.nan)]
)
def test_what_sees_a_bad_input_is_closed(name: str, value: float) -> None:
    sizes = (2, 2, 6, 2, 3)
    t, state = inputs(sizes, torch.float32, seed=4), initial_state(sizes, seed=4)
    expected, ends = torch.zeros(2, 2, 6, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    if name in ("k", "v"):
        t[name][1, 0, 3, 1] = value
        expected[1, 0, 3:] = ends[1, 0] = True
    elif name == "q":
        t["q"][1, 0] = value
        expected[:, 1] = ends[:, 1] = True
    else:
        {"m": state[0], "w": state[2]}[name][1, 0] = value
        expected[1, 0] = ends[1, 0] = True
    problem = PREFIX_SCAN.problem(*(t[x] for x in INPUTS), scale=0.6, initial_state=state, return_state=True)
    budgets = problem.budgets(evaluate(problem, EnclosureArithmetic(), gauges=True), CONTRACT)
    assert problem.nonfinite
    assert torch.equal(budgets["o"].open, expected[..., None].expand(2, 2, 6, 3))
    for output in ("m", "u", "w"):
        assert torch.equal(budgets[output].open.reshape(2, 2, -1).all(-1), ends)
        assert torch.equal(budgets[output].open.reshape(2, 2, -1).any(-1), ends)


def test_long_calls_are_judged_at_sampled_positions() -> None:
    t = inputs((1, 1, 4500, 2, 1), torch.bfloat16, seed=5)
    problem = PREFIX_SCAN.problem(*(t[name] for name in INPUTS), scale=0.7)
    assert problem.differentiated == ()
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(forward, CONTRACT)["o"]
    judged_rows = ~budget.open[0, 0, :, 0]
    assert 30 <= int(judged_rows.sum()) <= 96
    s = (t["q"].double()[None, :, None] * t["k"].double()).sum(-1) * 0.7
    e = torch.exp(s - s.max())
    o = ((e[..., None] * t["v"].double()).cumsum(2) / e.cumsum(-1)[..., None])[0, 0, :, 0]
    error = (o.bfloat16().double() - forward["o"].value[0, 0, :, 0]).abs()
    assert bool((error <= budget.certain[0, 0, :, 0])[judged_rows].all())
    assert (o - forward["o"].value[0, 0, :, 0])[judged_rows].abs().max() <= 1e-12


def test_cases_that_tell_nothing_are_vacuous_and_rows_are_explained() -> None:
    t = inputs((1, 2, 5, 4, 2), torch.float32, seed=5)

    def reasons(**change: torch.Tensor) -> list[str]:
        problem = PREFIX_SCAN.problem(*({**t, **change}[name] for name in INPUTS), scale=0.5)
        forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
        return problem.vacuity(forward, problem.budgets(forward, CONTRACT))

    assert reasons() == []
    assert "zero" in reasons(v=torch.zeros_like(t["v"]))[0]
    assert "mean of the values" in reasons(q=torch.zeros_like(t["q"]))[0]
    state = initial_state((1, 2, 5, 4, 2), seed=1)
    problem = PREFIX_SCAN.problem(*(t[name] for name in INPUTS), scale=0.5, initial_state=state)
    words = problem.explain_row("o", (0, 1, 3))
    assert "sees 4 positions" in words
    assert "initial state enters" in words
    assert "after 5 positions" in problem.explain_row("w", (0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, "needs scale"),
        ({"causal": True}, "no option 'causal'"),
        ({"return_state": 1}, "return_state=1"),
        ({"q": torch.ones(1, 2, 5, 4)}, r"q has shape \(1, 2, 5, 4\); prefix_scan asks for 2 axes"),
        ({"q": torch.ones(2, 3)}, r"q, k, v have shapes \(2, 3\)"),
        ({"v": torch.ones(1, 2, 5, 2).half()}, "the contract asks for one dtype"),
        ({"initial_state": torch.ones(1, 2)}, r"initial_state is Tensor; prefix_scan asks for the tuple"),
        (
            {"initial_state": (torch.ones(1, 2), torch.ones(2), torch.ones(1, 2, 2))},
            r"initial_state's u has shape \(2,\)",
        ),
        (
            {"initial_state": (torch.ones(1, 2), -torch.ones(1, 2), torch.ones(1, 2, 2))},
            r"initial_state's u holds -1.0; a sum of exponentials",
        ),
        (
            {"initial_state": (torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2, 2))},
            r"at \(batch, head\) = \(0, 0\) has m = 1.0, u = 0.0 and the largest \|w\| = 1.0",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    t = inputs((1, 2, 5, 4, 2), torch.float32, seed=5)
    tensors = [change.get(name, t[name]) for name in INPUTS]
    options = {"scale": 0.5, **{key: value for key, value in change.items() if key not in INPUTS}}
    with pytest.raises(ContractError, match=message):
        PREFIX_SCAN.problem(*tensors, **options)
