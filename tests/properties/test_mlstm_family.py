"""mLSTM: the definition, its gradients and budgets, against scalar loops of the unstabilised formula."""

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
from attnproof.properties.families.base import Problem
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.mlstm import MLSTM
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences
from tests.properties.test_sigmoid_family import HALF, OWN_ERROR, drawn, exact, judged

INPUTS = ("q", "k", "v", "i", "f")
CONTRACT = Contract(family="mlstm")
CASES = [
    ((2, 1, 4, 2, 3), 0.7),
    ((1, 2, 5, 3, 1), -1.3),
    ((1, 1, 3, 1, 2), 4.0),
    ((1, 2, 1, 2, 2), 0.5),
    ((1, 1, 0, 2, 2), 0.5),
    ((0, 2, 3, 2, 1), 0.5),
]


def shapes(sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of q, k, v, i, f and do for B, H, N, D, E."""
    b, h, n, d, e = sizes
    keys, values, gates = (b, h, n, d), (b, h, n, e), (b, h, n)
    return {"q": keys, "k": keys, "v": values, "i": gates, "f": gates, "do": values}


def inputs(sizes: tuple[int, ...], dtype: torch.dtype, seed: int, forget: float = 0.0) -> dict[str, Any]:
    """Normal numbers, the forget gate moved by ``forget``."""
    t = drawn(shapes(sizes), torch.float64, seed)
    t["f"] = t["f"] + forget
    return {name: x.to(dtype) for name, x in t.items()}


def naive(t: Mapping[str, Any], scale: float) -> tuple[Any, Any, Any]:
    """o, C and n by the recurrence as printed, without a maximum."""
    q, k, v = t["q"], t["k"], t["v"]
    batch, heads, length, width = q.shape
    o = np.full(v.shape, mpmath.mpf(0), dtype=object)
    state = np.full((batch, heads, width, v.shape[3]), mpmath.mpf(0), dtype=object)
    n = np.full((batch, heads, width), mpmath.mpf(0), dtype=object)
    for b, h, step in np.ndindex(batch, heads, length):
        forget = 1 / (1 + mpmath.exp(-t["f"][b, h, step]))
        write = mpmath.exp(t["i"][b, h, step])
        for d in range(width):
            n[b, h, d] = forget * n[b, h, d] + write * k[b, h, step, d]
            for e in range(v.shape[3]):
                state[b, h, d, e] = forget * state[b, h, d, e] + write * k[b, h, step, d] * v[b, h, step, e]
        scaled = [mpmath.mpf(scale) * q[b, h, step, d] for d in range(width)]
        normaliser = max(abs(sum(scaled[d] * n[b, h, d] for d in range(width))), mpmath.mpf(1))
        for e in range(v.shape[3]):
            total = sum((scaled[d] * state[b, h, d, e] for d in range(width)), mpmath.mpf(0))
            o[b, h, step, e] = total / normaliser
    return o, state, n


def maxima(t: Mapping[str, Any]) -> Any:
    """m after the last position, by its recurrence."""
    batch, heads, length = t["i"].shape
    m = np.full((batch, heads), mpmath.mpf("-inf"), dtype=object)
    for b, h, step in np.ndindex(batch, heads, length):
        log_forget = -mpmath.log(1 + mpmath.exp(-t["f"][b, h, step]))
        m[b, h] = max(log_forget + m[b, h], t["i"][b, h, step])
    return m


def assert_definition(t: Mapping[str, torch.Tensor], scale: float, arithmetics: Any, digits: int) -> None:
    problem = MLSTM.problem(*(t[name] for name in INPUTS), scale=scale, return_state=True)
    arrays = {name: exact(x) for name, x in t.items()}
    with mpmath.workdps(digits):
        o, state, n = naive(arrays, scale)
        m = maxima(arrays)
        down = np.frompyfunc(mpmath.exp, 1, 1)(-m)
        expected = {"o": o, "state": state * down[..., None, None], "n": n * down[..., None], "m": m}
    for arithmetic in arithmetics:
        forward = evaluate(problem, arithmetic, gauges=True)
        for name, value in expected.items():
            assert tuple(forward[name].value.shape) == value.shape == problem.shape(name)
            assert enclosure_contains(forward[name], value, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((forward[name].radius <= 1e-9).all())


@pytest.mark.parametrize(("sizes", "scale"), CASES)
def test_definition_and_gradients_hold_against_loops_and_numerical_differentiation(
    sizes: tuple[int, ...], scale: float
) -> None:
    t = inputs(sizes, torch.float32, seed=sum(sizes))
    cotangent = t.pop("do")
    arithmetics = (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic(60))
    if sizes[2]:
        assert_definition(t, scale, arithmetics, 60)
    problem = MLSTM.problem(*t.values(), scale=scale)
    weights = exact(cotangent)
    gradients = central_differences(
        lambda x: (naive(x, scale)[0] * weights).sum() + mpmath.mpf(0),
        {name: exact(x) for name, x in t.items()},
    )
    for arithmetic in arithmetics:
        forward = evaluate(problem, arithmetic, gauges=True)
        found = evaluate(GradientProblem(problem, forward, {"o": cotangent}), arithmetic)
        for name, expected in gradients.items():
            assert found[f"d{name}"].value.shape == t[name].shape
            assert enclosure_contains(found[f"d{name}"], expected, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((found[f"d{name}"].radius <= 1e-9).all())


def extreme_gates(sizes: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """Input gates up to ±100, forget gates from −1000 to 1000."""
    t = inputs(sizes, torch.float32, seed)
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([-1000.0, -104.0, -20.0, 0.0, 6.0, 30.0, 1000.0])
    t["f"] = choices[torch.randint(0, len(choices), t["f"].shape, generator=generator)]
    t["i"] = (torch.rand(t["i"].shape, generator=generator) * 2.0 - 1.0) * 100.0
    return t


@pytest.mark.parametrize("seed", range(4))
def test_extreme_gates(seed: int) -> None:
    t = extreme_gates((1, 2, 6, 2, 2), seed)
    assert_definition(t, 0.6, (EnclosureArithmetic(), ArbArithmetic(128)), 600)


def test_gates_beyond_a_block_and_equal_maxima() -> None:
    """70 positions are three blocks; with σ(40) ≈ 1 and equal i all weights are within 70·e⁻⁴⁰ of another."""
    t = inputs((1, 1, 70, 2, 1), torch.float32, seed=3)
    assert_definition(t, 0.6, (EnclosureArithmetic(), ArbArithmetic(192)), 60)
    t["f"], t["i"] = torch.full_like(t["f"], 40.0), torch.full_like(t["i"], 5.0)
    assert_definition(t, 0.6, (EnclosureArithmetic(), ArbArithmetic(192)), 60)
    del t["do"]


def stabilised(q: Any, k: Any, v: Any, i: Any, f: Any, scale: float, bound: float | None = None) -> Any:
    """o by torch, float64; with ``bound`` in place of e^−m, a misprint that theory 2.10 warns of."""
    length = q.shape[2]
    log_f = torch.nn.functional.logsigmoid(f)
    places = torch.arange(length)
    between = (places <= places[:, None, None]) & (places > places[None, :, None])
    d = (log_f[:, :, None, None, :] * between).sum(-1) + i[:, :, None, :]
    d = d.masked_fill(places[None, :] > places[:, None], -torch.inf)
    m = d.amax(-1, keepdim=True).detach()
    p = scale * (q @ k.mT) * torch.exp(d - m)
    least = torch.exp(-m) if bound is None else torch.full_like(m, bound)
    return p @ v / torch.maximum(p.sum(-1, keepdim=True).abs(), least)


def test_gradients_of_many_blocks_are_those_of_autograd() -> None:
    t = inputs((2, 2, 75, 5, 3), torch.float64, seed=8, forget=4.0)
    leaves = [t[name].clone().requires_grad_() for name in INPUTS]
    expected = torch.autograd.grad(stabilised(*leaves, scale=0.5), leaves, t["do"])
    problem = MLSTM.problem(*(t[name] for name in INPUTS), scale=0.5)
    found = evaluate(GradientProblem(problem, {}, {"o": t["do"]}), EnclosureArithmetic())
    for name, value in zip(INPUTS, expected, strict=True):
        assert (found[f"d{name}"].value - value).abs().max() <= 1e-11 * value.abs().max()


def test_a_tie_of_the_denominator_is_shared() -> None:
    """q·k = 1 and i = 0: |Σ P| is exactly 1. torch.maximum hands one half to each of two equal arguments."""
    t = {name: torch.full(shape, 1.0) for name, shape in shapes((1, 1, 1, 1, 1)).items()}
    t["i"], t["v"] = torch.zeros(1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    problem = MLSTM.problem(*(t[name] for name in INPUTS), scale=1.0)
    leaves = [t[name].double().requires_grad_() for name in INPUTS]
    expected = torch.autograd.grad(stabilised(*leaves, scale=1.0), leaves, t["do"].double())
    assert expected[0].item() == 1.5
    for arithmetic in (ArbArithmetic(128), MpmathArithmetic(60)):
        found = evaluate(GradientProblem(problem, {}, {"o": t["do"]}), arithmetic)
        for name, value in zip(INPUTS, expected, strict=True):
            assert torch.equal(found[f"d{name}"].value, value)
    both = evaluate(GradientProblem(problem, {}, {"o": t["do"]}), EnclosureArithmetic())["dq"]
    assert abs(both.value.item() - 1.5) + 1.4 <= both.radius.item() <= 2.0
    budget = GradientProblem(problem, {}, {"o": t["do"]}).budgets({"dq": both, **_empty(problem)}, CONTRACT)
    assert budget["dq"].certain.item() >= 1.4


def _empty(problem: Problem) -> dict[str, Any]:
    found = evaluate(
        GradientProblem(problem, {}, {"o": torch.ones(problem.shape("o"))}), EnclosureArithmetic()
    )
    return {name: value for name, value in found.items() if name != "dq"}


def test_a_forget_gate_of_minus_infinity_forgets_everything() -> None:
    t = inputs((1, 2, 40, 3, 2), torch.float32, seed=4, forget=3.0)
    t["f"][:, :, 35] = -torch.inf
    whole = MLSTM.problem(*(t[name] for name in INPUTS), scale=0.6, return_state=True)
    tail = MLSTM.problem(*(t[name][:, :, 35:] for name in INPUTS), scale=0.6, return_state=True)
    assert not whole.nonfinite
    found, expected = (evaluate(problem, EnclosureArithmetic()) for problem in (whole, tail))
    assert (found["o"].value[:, :, 35:] - expected["o"].value).abs().max() <= 1e-13
    for name in ("state", "n", "m"):
        assert (found[name].value - expected[name].value).abs().max() <= 1e-13
    gradients = evaluate(GradientProblem(whole, {}, {"o": t["do"]}), EnclosureArithmetic())
    assert not bool(gradients["df"].value[:, :, 35].any())
    assert not bool(whole.budgets(found, CONTRACT)["o"].open.any())


@pytest.mark.parametrize(
    ("name", "value"), [("q", math.nan), ("v", math.inf), ("i", -math.inf), ("f", math.inf)]
)
def test_what_sees_a_bad_input_is_closed(name: str, value: float) -> None:
    t = inputs((2, 2, 6, 2, 2), torch.float32, seed=4)
    t[name][1, 0, 3] = value
    problem = MLSTM.problem(*(t[name] for name in INPUTS), scale=0.6, return_state=True)
    budgets = problem.budgets(evaluate(problem, EnclosureArithmetic(), gauges=True), CONTRACT)
    expected = torch.zeros(2, 2, 6, dtype=torch.bool)
    expected[1, 0, 3 : 4 if name == "q" else None] = True
    assert torch.equal(budgets["o"].open.all(-1), expected)
    assert torch.equal(budgets["o"].open.any(-1), expected)
    for output in ("state", "n", "m"):
        closed = budgets[output].open.reshape(2, 2, -1)
        assert bool(closed[1, 0].all()) is (name != "q")
        assert not bool(closed[0].any() | closed[1, 1].any())
    assert problem.nonfinite


def kernel(t: Mapping[str, torch.Tensor], broken: str = "") -> dict[str, torch.Tensor]:
    """Recurrence in float32 with autograd's gradients, rounded once."""
    dtype = t["q"].dtype
    q, k, v, i, f = (t[name].float().requires_grad_() for name in INPUTS)
    log_f = torch.nn.functional.logsigmoid(f)
    m = torch.full(i.shape[:2], -torch.inf)
    c, n = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3]), torch.zeros(*q.shape[:2], q.shape[3])
    rows = []
    for s in range(q.shape[2]):
        new = torch.maximum(log_f[..., s] + m, i[..., s])
        new = new.detach()
        kept, written = torch.exp(log_f[..., s] + m - new)[..., None], torch.exp(i[..., s] - new)[..., None]
        m = new if broken != "maximum kept" else torch.maximum(new, m)
        c = kept[..., None] * c + (written * k[:, :, s])[..., None] * v[:, :, s, None]
        n = (kept if broken != "sum of keys" else 1.0) * n + written * k[:, :, s]
        x = q[:, :, s] * 0.4
        least = torch.exp(-m) if broken != "bound of one" else torch.ones_like(m)
        total = (x * n).sum(-1)
        size = total.abs() if broken != "sign" else total
        rows.append((x[..., None] * c).sum(-2) / torch.maximum(size, least)[..., None])
    o = torch.stack(rows, 2)
    gradients = torch.autograd.grad(o, (q, k, v, i, f), t["do"].float())
    found = {"o": o, **{f"d{name}": x for name, x in zip(INPUTS, gradients, strict=True)}}
    if broken == "gate shifted":
        found["df"] = found["df"].roll(1, -1)
    return {name: x.detach().to(dtype) for name, x in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_healthy_kernels_stay_within_the_certain_budget_and_near_the_probable_one(dtype: torch.dtype) -> None:
    squares: dict[str, list[float]] = {}
    for seed, sizes in enumerate([(2, 2, 33, 8, 5), (1, 2, 70, 16, 9)]):
        for forget in (0.0, 5.0):
            t = inputs(sizes, dtype, seed, forget)
            problem = MLSTM.problem(*(t[name] for name in INPUTS), scale=0.4)
            for name, (worst, square) in judged(problem, t["do"], kernel(t)).items():
                assert worst <= 1.0, (name, sizes, forget)
                squares.setdefault(name, []).append(square)
    for name, values in squares.items():
        assert 0.05 <= math.sqrt(sum(values) / len(values)) <= 1.5, name


@pytest.mark.parametrize("seed", range(3))
def test_extreme_gates_stay_within_the_budget(seed: int) -> None:
    t = extreme_gates((1, 2, 40, 8, 3), seed)
    problem = MLSTM.problem(*(t[name] for name in INPUTS), scale=0.4)
    for name, (worst, _) in judged(problem, t["do"], kernel(t)).items():
        assert worst <= 1.0, name


@pytest.mark.parametrize(
    ("broken", "output"),
    [
        ("bound of one", "o"),
        ("maximum kept", "o"),
        ("sign", "o"),
        ("sum of keys", "dk"),
        ("gate shifted", "df"),
    ],
)
@pytest.mark.parametrize("dtype", HALF)
def test_broken_kernels_exceed_the_certain_budget(broken: str, output: str, dtype: torch.dtype) -> None:
    t = inputs((2, 2, 20, 8, 5), dtype, seed=3, forget=2.0)
    problem = MLSTM.problem(*(t[name] for name in INPUTS), scale=0.4)
    assert judged(problem, t["do"], kernel(t, broken))[output][0] > 1.0


def test_cases_that_tell_nothing_are_vacuous() -> None:
    t = inputs((1, 2, 5, 4, 2), torch.float32, seed=5)

    def reasons(**change: torch.Tensor) -> list[str]:
        problem = MLSTM.problem(*({**t, **change}[name] for name in INPUTS), scale=0.5)
        forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
        return problem.vacuity(forward, problem.budgets(forward, CONTRACT))

    assert reasons() == []
    assert "zero" in reasons(v=torch.zeros_like(t["v"]))[0]
    same = {"k": torch.ones_like(t["k"]), "q": 9.0 * torch.ones_like(t["q"]), "i": torch.zeros_like(t["i"])}
    assert "mean of the values" in reasons(**same, f=torch.full_like(t["f"], 1000.0))[0]


def test_a_row_is_explained_by_its_weights() -> None:
    t = inputs((1, 2, 40, 4, 2), torch.float32, seed=5)
    problem = MLSTM.problem(*(t[name] for name in INPUTS), scale=0.5, return_state=True)
    assert "sees 34 positions" in problem.explain_row("o", (0, 1, 33))
    assert "after 40 positions" in problem.explain_row("state", (0, 1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, "needs scale"),
        ({"causal": True}, "no option 'causal'"),
        ({"return_state": 1}, "return_state=1"),
        ({"i": torch.ones(2, 5, 1)}, r"i has shape \(2, 5, 1\)"),
        ({"f": torch.ones(1, 2, 5).double()}, "f has dtype torch.float64"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    t = inputs((1, 2, 5, 4, 2), torch.float32, seed=5)
    tensors = [change.get(name, t[name]) for name in INPUTS]
    options = {"scale": 0.5, **{key: value for key, value in change.items() if key not in INPUTS}}
    with pytest.raises(ContractError, match=message):
        MLSTM.problem(*tensors, **options)


def test_the_level_takes_no_cotangent() -> None:
    t = inputs((1, 1, 3, 2, 2), torch.float32, seed=5)
    problem = MLSTM.problem(*(t[name] for name in INPUTS), scale=0.5, return_state=True)
    with pytest.raises(ContractError, match="level m is held constant"):
        problem.differentiate(EnclosureArithmetic(), {"o": t["do"], "m": torch.ones(1, 1)})
