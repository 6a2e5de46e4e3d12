"""RWKV-4: the definition, its gradients and budgets, against scalar loops over the formula."""

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
from attnproof.properties.families.rwkv4 import RWKV4
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences
from tests.properties.test_sigmoid_family import HALF, OWN_ERROR, drawn, exact, judged

INPUTS = ("w", "u", "k", "v")
CONTRACT = Contract(family="rwkv4")
ARITHMETICS = (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic(60))
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(sizes: tuple[int, int, int], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """w ≤ 0, u, k, v and do for B, H, N."""
    b, h, n = sizes
    t = drawn({"w": (h,), "u": (h,), "k": (b, h, n), "v": (b, h, n), "do": (b, h, n)}, torch.float64, seed)
    t["w"] = -0.3 * t["w"].abs()
    return {name: x.to(dtype) for name, x in t.items()}


def initial_state(sizes: tuple[int, int, int], seed: int) -> State:
    """(a, b, p) with normal exponents, masses from 1/4 on; the state of the last channel is neutral."""
    t = drawn(dict.fromkeys(("a", "b", "p"), sizes[:2]), torch.float32, seed)
    a, b, p = t["a"], t["b"].abs() + 0.25, t["p"]
    a[:, -1], b[:, -1], p[:, -1] = 0.0, 0.0, -torch.inf
    return a, b, p


def naive(t: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """o, a, b and p by loops: every row sums over all positions up to it."""
    k, v = t["k"], t["v"]
    batch, heads, length = k.shape
    zero = mpmath.mpf(0)
    found = {"o": np.full(k.shape, zero, dtype=object)}
    found |= {name: np.full((batch, heads), zero, dtype=object) for name in ("a", "b", "p")}
    for b, h in np.ndindex(batch, heads):
        w, u = t["w"][h], t["u"][h]
        known = state is not None and state[2][b, h] != -mpmath.inf
        for step in range(length):
            num = den = zero
            if known:
                first = mpmath.exp(state[2][b, h] + step * w)
                num, den = num + first * state[0][b, h], den + first * state[1][b, h]
            for s in range(step):
                weight = mpmath.exp((step - 1 - s) * w + k[b, h, s])
                num, den = num + weight * v[b, h, s], den + weight
            weight = mpmath.exp(u + k[b, h, step])
            found["o"][b, h, step] = (num + weight * v[b, h, step]) / (den + weight)
        exponents = [(length - 1 - s) * w + k[b, h, s] for s in range(length)]
        terms = [(x, mpmath.mpf(1), v[b, h, s]) for s, x in enumerate(exponents)]
        if known:
            terms.append((state[2][b, h] + length * w, state[1][b, h], state[0][b, h]))
        p = found["p"][b, h] = max((x for x, _, _ in terms), default=-mpmath.inf)
        for x, mass, value in terms:
            found["b"][b, h] += mpmath.exp(x - p) * mass
            found["a"][b, h] += mpmath.exp(x - p) * value
    return found


def assert_definition(t: Mapping[str, torch.Tensor], state: State | None = None) -> None:
    problem = RWKV4.problem(*(t[name] for name in INPUTS), initial_state=state, return_state=True)
    assert problem.outputs == ("o", "a", "b", "p")
    with mpmath.workdps(60):
        expected = naive(
            {name: exact(x) for name, x in t.items()}, None if state is None else [exact(x) for x in state]
        )
    for arithmetic in ARITHMETICS:
        found = evaluate(problem, arithmetic, gauges=True)
        for name, value in expected.items():
            assert tuple(found[name].value.shape) == value.shape == problem.shape(name)
            assert enclosure_contains(found[name], value, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((found[name].radius <= 1e-9).all()), (arithmetic.name, name)


SIZES = [(2, 1, 5), (1, 3, 4), (1, 2, 1), (1, 2, 0), (0, 2, 3)]


@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_states_are_those_of_loops(sizes: tuple[int, int, int]) -> None:
    t = inputs(sizes, torch.float32, seed=sum(sizes))
    assert_definition(t)
    assert_definition(t, initial_state(sizes, seed=sum(sizes)))


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_those_of_numerical_differentiation(sizes: tuple[int, int, int]) -> None:
    t = inputs(sizes, torch.float32, seed=sum(sizes))
    cotangent = t.pop("do")
    weights = exact(cotangent)
    expected = central_differences(
        lambda x: (naive(x)["o"] * weights).sum() + mpmath.mpf(0), {name: exact(x) for name, x in t.items()}
    )
    problem = RWKV4.problem(*t.values())
    for arithmetic in ARITHMETICS:
        found = evaluate(GradientProblem(problem, {}, {"o": cotangent}), arithmetic)
        for name, value in expected.items():
            assert found[f"d{name}"].value.shape == t[name].shape
            assert enclosure_contains(found[f"d{name}"], value, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((found[f"d{name}"].radius <= 1e-9).all())


def limit(kind: str, sizes: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Inputs at the edge of what kernels hold."""
    t = inputs(sizes, torch.float32, seed=9)
    n = sizes[2]
    if kind == "no decay":
        t["w"] = torch.zeros_like(t["w"])
    elif kind == "decay underflows":
        t["w"] = torch.full_like(t["w"], -1000.0)
    elif kind == "rising":
        t["k"] = torch.linspace(-60.0, 60.0, n).expand(sizes).clone()
    elif kind == "equal":
        t["k"], t["w"], t["u"] = torch.ones_like(t["k"]), t["w"] * 0.0, t["u"] * 0.0
    elif kind == "far apart":
        t["k"] = torch.where(t["k"] > 0, 70.0, -70.0)
    elif kind == "overflow":
        t["k"], t["u"] = t["k"] * 3000.0, t["u"] * 400.0
    return t


KINDS = ("no decay", "decay underflows", "rising", "equal", "far apart", "overflow")


@pytest.mark.parametrize("kind", KINDS)
def test_limits(kind: str) -> None:
    assert_definition(limit(kind, (1, 2, 6)))
    assert_definition(limit(kind, (1, 2, 4)), initial_state((1, 2, 4), seed=2))
    t = limit(kind, (1, 2, 40))
    problem = RWKV4.problem(*(t[name] for name in INPUTS), return_state=True)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budgets = problem.budgets(forward, CONTRACT)
    for name, x in zip(("o", "a", "b", "p"), recurrent(t), strict=True):
        assert not bool(budgets[name].open.any())
        assert bool(((x.double() - forward[name].value).abs() <= budgets[name].certain).all()), name
    assert bool(((direct(t).double() - forward["o"].value).abs() <= budgets["o"].certain).all())


def test_gradients_in_the_limits_stay_within_the_budget() -> None:
    for kind in KINDS:
        t = limit(kind, (1, 2, 24))
        problem = RWKV4.problem(*(t[name] for name in INPUTS))
        for name, (worst, _) in judged(problem, t["do"], with_gradients(t, "recurrent")).items():
            assert worst <= 1.0, (name, kind)


def direct(t: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """o from all weights at once, after the maximum of each row."""
    w, u, k, v = (t[name] for name in INPUTS)
    places = torch.arange(k.shape[-1])
    age = (places[:, None] - 1 - places[None, :]).clamp(min=0)
    d = k[:, :, None, :] + age * w[:, None, None] + torch.eye(len(places), dtype=k.dtype) * u[:, None, None]
    d = d.masked_fill(places[None, :] > places[:, None], -torch.inf)
    e = torch.exp(d - d.amax(-1, keepdim=True))
    return (e @ v[..., None])[..., 0] / e.sum(-1)


def recurrent(
    t: Mapping[str, torch.Tensor], state: State | None = None, broken: str = ""
) -> tuple[torch.Tensor, ...]:
    """o, a, b, p by the recurrence, with float32 inside."""
    w, u, k, v = (t[name].float() for name in INPUTS)
    zero = torch.zeros(k.shape[:2])
    a, b, p = (zero, zero, zero - torch.inf) if state is None else state
    rows = []
    for s in range(k.shape[2]):
        k_t, v_t = k[..., s], v[..., s]
        before = w + p if broken == "decay before reading" else p
        now = k_t + (w + u if broken == "current key decays" else u)
        top = torch.maximum(now, before)
        kept, own = torch.exp(before - top), torch.exp(now - top)
        rows.append((kept * a + own * v_t) / (kept * b + own))
        written = u + k_t if broken == "bonus in the state" else k_t
        p_next = torch.maximum(w + p, written)
        kept, own = torch.exp(w + p - p_next), torch.exp(written - p_next)
        a, b = kept * a + own * v_t, kept * b + own
        p = written if broken == "maximum not carried" else p_next
    return torch.stack(rows, -1).to(t["v"].dtype), a, b, p


def doubling(t: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """o by a tree over (number of steps, p, a, b), with float32 inside."""
    w, u, k, v = (t[name].float() for name in INPUTS)
    n, p, a, b = torch.ones(k.shape[-1]), k, v, torch.ones_like(k)
    step = 1
    while step < k.shape[-1]:
        decayed = p[..., :-step] + n[step:] * w[:, None]
        top = torch.maximum(decayed, p[..., step:])
        left, right = torch.exp(decayed - top), torch.exp(p[..., step:] - top)
        a = torch.cat((a[..., :step], left * a[..., :-step] + right * a[..., step:]), -1)
        b = torch.cat((b[..., :step], left * b[..., :-step] + right * b[..., step:]), -1)
        p = torch.cat((p[..., :step], top), -1)
        n = torch.cat((n[:step], n[:-step] + n[step:]))
        step *= 2
    a, b = (torch.nn.functional.pad(x, (1, 0))[..., :-1] for x in (a, b))
    p = torch.nn.functional.pad(p, (1, 0), value=-torch.inf)[..., :-1]
    now = u[:, None] + k
    top = torch.maximum(now, p)
    kept, own = torch.exp(p - top), torch.exp(now - top)
    return ((kept * a + own * v) / (kept * b + own)).to(t["v"].dtype)


def with_gradients(t: Mapping[str, torch.Tensor], form: str) -> dict[str, torch.Tensor]:
    """o and autograd's gradients, through the maximum as well."""
    leaves = {name: t[name].float().requires_grad_() for name in INPUTS}
    o = {"recurrent": lambda x: recurrent(x)[0], "doubling": doubling, "two-pass": direct}[form](leaves)
    gradients = torch.autograd.grad(o, tuple(leaves.values()), t["do"].float())
    found = {"o": o.detach(), **{f"d{name}": x for name, x in zip(INPUTS, gradients, strict=True)}}
    return {name: x.to(t["v"].dtype) for name, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_healthy_kernels_stay_within_the_certain_budget_and_near_the_probable_one(dtype: torch.dtype) -> None:
    squares: dict[str, list[float]] = {}
    for seed, form in enumerate(("recurrent", "doubling", "two-pass")):
        t = inputs((2, 6, 40), dtype, seed)
        problem = RWKV4.problem(*(t[name] for name in INPUTS))
        for name, (worst, square) in judged(problem, t["do"], with_gradients(t, form)).items():
            assert worst <= 1.0, (name, form)
            squares.setdefault(name, []).append(square)
    for name, values in squares.items():
        assert 0.04 <= math.sqrt(sum(values) / len(values)) <= 1.5, name


def test_the_drift_of_a_slow_decay_is_probable() -> None:
    """Adding one w to exponents of one binade rounds alike in every step: errors grow as the steps."""
    t = inputs((1, 8, 400), torch.float32, seed=1)
    t["w"] = -torch.linspace(0.003, 0.05, 8)
    problem = RWKV4.problem(*(t[name] for name in INPUTS))
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(forward, CONTRACT)["o"]
    error = recurrent(t)[0].double() - forward["o"].value
    assert bool((error.abs() <= budget.certain).all())
    assert 0.2 <= (error / budget.probable).square().mean().sqrt() <= 1.5


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_states_of_kernels(dtype: torch.dtype) -> None:
    sizes = (2, 4, 40)
    t, state = inputs(sizes, dtype, seed=5), initial_state(sizes, seed=6)
    problem = RWKV4.problem(*(t[name] for name in INPUTS), initial_state=state, return_state=True)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budgets = problem.budgets(forward, CONTRACT)

    def excess(broken: str) -> dict[str, float]:
        found = recurrent(t, state, broken)
        return {
            name: float(((x.double() - forward[name].value).abs() / budgets[name].certain).max())
            for name, x in zip(("o", "a", "b", "p"), found, strict=True)
        }

    assert not any(bool(budget.open.any()) for budget in budgets.values())
    assert max(excess("").values()) <= 1.0
    # A bonus in the state moves p alone where all weights but an early one's have it.
    assert excess("bonus in the state")["p"] > 1.0
    wrong = excess("maximum not carried")
    assert min(wrong["a"], wrong["b"], wrong["p"]) > 1.0


BROKEN = ("decay before reading", "current key decays", "bonus in the state", "maximum not carried")


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_broken_kernels_exceed_the_certain_budget(broken: str, dtype: torch.dtype) -> None:
    """The first has the exponents (t − s) w in place of (t − 1 − s) w."""
    t = inputs((1, 4, 30), dtype, seed=3)
    problem = RWKV4.problem(*(t[name] for name in INPUTS))
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(forward, CONTRACT)["o"]
    wrong = recurrent(t, broken=broken)[0]
    assert bool(((wrong.double() - forward["o"].value).abs() > budget.certain).any())


def test_blocks_of_rows_and_columns_give_what_autograd_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """520 columns in parts of 64, rows in blocks of 28."""
    monkeypatch.setattr(decayed_softmax, "_PAIRS", 2 * 576 * 28)
    t = inputs((1, 2, 520), torch.float64, seed=8)
    leaves = {name: t[name].clone().requires_grad_() for name in INPUTS}
    o = direct(leaves)
    expected = torch.autograd.grad(o, tuple(leaves.values()), t["do"])
    problem = RWKV4.problem(*(t[name] for name in INPUTS))
    found = evaluate(problem, EnclosureArithmetic())
    assert (found["o"].value - o).abs().max() <= 1e-13
    assert found["o"].radius.max() <= 1e-12
    gradients = evaluate(GradientProblem(problem, {}, {"o": t["do"]}), EnclosureArithmetic())
    for name, value in zip(INPUTS, expected, strict=True):
        assert (gradients[f"d{name}"].value - value).abs().max() <= 1e-11 * value.abs().max()


@pytest.mark.parametrize(
    ("name", "value"), [("w", math.nan), ("u", math.inf), ("k", -math.inf), ("v", math.nan), ("p", math.nan)]
)
def test_what_sees_a_bad_input_is_closed(name: str, value: float) -> None:
    sizes = (2, 2, 6)
    t, state = inputs(sizes, torch.float32, seed=4), initial_state(sizes, seed=4)
    expected, ends = torch.zeros(sizes, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    if name in ("k", "v"):
        t[name][1, 0, 3] = value
        expected[1, 0, 3:] = ends[1, 0] = True
    elif name == "p":
        state[2][1, 0] = value
        expected[1, 0] = ends[1, 0] = True
    else:
        t[name][1] = value
        expected[:, 1] = True
        ends[:, 1] = name == "w"
    problem = RWKV4.problem(*(t[x] for x in INPUTS), initial_state=state, return_state=True)
    budgets = problem.budgets(evaluate(problem, EnclosureArithmetic(), gauges=True), CONTRACT)
    assert problem.nonfinite
    assert torch.equal(budgets["o"].open, expected)
    for output in ("a", "b", "p"):
        assert torch.equal(budgets[output].open, ends)


def test_long_calls_are_judged_at_sampled_positions() -> None:
    t = inputs((1, 1, 4200), torch.bfloat16, seed=5)
    problem = RWKV4.problem(*(t[name] for name in INPUTS))
    assert problem.differentiated == ()
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(forward, CONTRACT)["o"]
    assert 30 <= int((~budget.open).sum()) <= 96
    o = doubling(t)
    error = (o.double() - forward["o"].value).abs()
    assert bool((error <= budget.certain)[~budget.open].all())
    assert float(budget.certain[~budget.open].max()) <= 0.1


def test_cases_that_tell_nothing_are_vacuous_and_rows_are_explained() -> None:
    t = inputs((1, 2, 5), torch.float32, seed=5)

    def reasons(**change: torch.Tensor) -> list[str]:
        problem = RWKV4.problem(*({**t, **change}[name] for name in INPUTS))
        forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
        return problem.vacuity(forward, problem.budgets(forward, CONTRACT))

    assert reasons() == []
    assert "zero" in reasons(v=torch.zeros_like(t["v"]))[0]
    same = {name: torch.zeros_like(t[name]) for name in ("w", "u", "k")}
    assert "mean of the values" in reasons(**same)[0]
    problem = RWKV4.problem(*(t[name] for name in INPUTS), initial_state=initial_state((1, 2, 5), seed=1))
    assert "initial state enters" in problem.explain_row("o", (0, 1))
    assert "after 5 positions" in problem.explain_row("a", (0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 1.0}, "no option 'scale'"),
        ({"return_state": 0}, "return_state=0"),
        ({"k": torch.ones(2, 5)}, r"k has shape \(2, 5\); rwkv4 asks for 3 axes"),
        ({"w": torch.ones(2)}, "w holds 1.0; a log decay is ≤ 0"),
        ({"u": torch.ones(3)}, r"u has shape \(3,\)"),
        ({"v": torch.ones(1, 2, 5).half()}, "v has .* torch.float16"),
        (
            {"initial_state": torch.ones(1, 2)},
            r"initial_state is Tensor; rwkv4 asks for the tuple \(a, b, p\)",
        ),
        (
            {"initial_state": (torch.ones(1, 2, 1), torch.ones(1, 2), torch.ones(1, 2))},
            r"initial_state's a has shape \(1, 2, 1\)",
        ),
        (
            {"initial_state": (torch.ones(1, 2), -torch.ones(1, 2), torch.ones(1, 2))},
            "initial_state's b holds -1.0",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    t = inputs((1, 2, 5), torch.float32, seed=5)
    tensors = [change.get(name, t[name]) for name in INPUTS]
    options = {key: value for key, value in change.items() if key not in INPUTS}
    with pytest.raises(ContractError, match=message):
        RWKV4.problem(*tensors, **options)
