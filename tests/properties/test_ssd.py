"""``ssd``: definition and gradients against loops over numbers, budgets against algorithms in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.budgets.base import Budget
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.ssd import SSD, SsdProblem
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences
from tests.properties.test_sigmoid_family import OWN_ERROR, exact

ANY = Contract(family="any")
Tensors = dict[str, torch.Tensor]
Algorithm = Callable[[Tensors], tuple[torch.Tensor, torch.Tensor]]


def spans(batch: int, length: int, cu: list[int] | None) -> list[tuple[int, int, int]]:
    """(batch, start, stop) of every sequence."""
    if cu is None:
        return [(b, 0, length) for b in range(batch)]
    return [(0, start, stop) for start, stop in zip(cu, cu[1:], strict=False)]


def naive(t: Mapping[str, Any], cu: list[int] | None) -> dict[str, Any]:
    """y and state by the recurrence, from object arrays by name."""
    batch, heads, length, values = t["x"].shape
    groups, width = t["B"].shape[1], t["B"].shape[3]
    lines = spans(batch, length, cu)
    y = np.full(t["x"].shape, mpmath.mpf(0), dtype=object)
    states = np.full((len(lines), heads, width, values), mpmath.mpf(0), dtype=object)
    if "initial_state" in t:
        states = states + t["initial_state"]
    for s, (b, start, stop) in enumerate(lines):
        for h in range(heads):
            group = h // (heads // groups)
            for i in range(start, stop):
                step = t["dt"][b, h, i]
                decay = mpmath.exp(step * t["A"][h])
                for e in range(values):
                    x = t["x"][b, h, i, e]
                    for c in range(width):
                        old = states[s, h, c, e]
                        states[s, h, c, e] = decay * old + step * t["B"][b, group, i, c] * x
                        y[b, h, i, e] += t["C"][b, group, i, c] * states[s, h, c, e]
                    if "D" in t:
                        y[b, h, i, e] += t["D"][h] * x
    return {"y": y, "state": states}


def compare(
    problem: Any,
    t: Tensors,
    naive_of: Callable[[Mapping[str, Any]], dict[str, Any]],
    seed: int,
    *,
    smooth: bool,
) -> None:
    """Outputs, and where ``smooth`` gradients, of all arithmetics against numbers."""
    generator = torch.Generator().manual_seed(seed)
    cotangents = {name: torch.randn(problem.shape(name), generator=generator) for name in problem.outputs}
    arrays = {name: exact(x) for name, x in t.items()}
    weights = {name: exact(x) for name, x in cotangents.items()}

    def loss(x: Mapping[str, Any]) -> Any:
        found = naive_of(x)
        return sum(((found[name] * w).sum() for name, w in weights.items()), mpmath.mpf(0))

    with mpmath.workdps(60):
        expected = naive_of(arrays)
    gradients = central_differences(loss, arrays) if smooth else {}
    # Of longer calls blocks in float64 only, which are the same formulas.
    small = 0 in problem.q.shape or problem.q.shape[2] < 20
    for arithmetic in (EnclosureArithmetic(), *((ArbArithmetic(128), MpmathArithmetic(60)) if small else ())):
        forward = evaluate(problem, arithmetic, gauges=True)
        for name in problem.outputs:
            assert tuple(forward[name].value.shape) == expected[name].shape
            assert enclosure_contains(forward[name], expected[name], OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((forward[name].radius <= 1e-9).all())
            assert bool((forward[f"gauge:{name}"].value >= forward[name].value.abs() * (1.0 - 1e-8)).all())
        found = evaluate(GradientProblem(problem, forward, cotangents), arithmetic)
        assert tuple(problem.differentiated) == tuple(t)
        for name, numbers in gradients.items():
            assert tuple(found[f"d{name}"].value.shape) == tuple(t[name].shape)
            assert enclosure_contains(found[f"d{name}"], numbers, 1e-28).all(), (arithmetic.name, name)
            assert bool((found[f"d{name}"].radius <= 1e-9).all()), (arithmetic.name, name)


def drawn(
    sizes: tuple[int, ...],
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    step: float = 0.5,
    decay: float = 1.0,
) -> Tensors:
    """Tensors of sizes (B, H, G, N, D, E); steps up to ``step``, A down to −``decay``."""
    b, h, g, n, d, e = sizes
    generator = torch.Generator().manual_seed(seed)
    t = {
        "x": torch.randn(b, h, n, e, generator=generator),
        "dt": torch.rand(b, h, n, generator=generator) * step,
        "A": -torch.rand(h, generator=generator) * decay,
        "B": torch.randn(b, g, n, d, generator=generator),
        "C": torch.randn(b, g, n, d, generator=generator),
        "D": torch.randn(h, generator=generator),
    }
    return {name: x.to(dtype) for name, x in t.items()}


CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 4, 2, 3, 2, 1), {"initial": True}),
    ((2, 2, 1, 2, 1, 2), {"skip": False, "still": True}),
    ((1, 2, 2, 5, 1, 1), {"cu": [0, 2, 2, 5], "initial": True}),
    ((1, 1, 1, 67, 2, 1), {"initial": True, "decay": 2000.0}),
    ((1, 2, 1, 0, 2, 2), {"initial": True}),
    ((0, 2, 1, 3, 2, 2), {}),
]


@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_definition_and_gradients_hold_against_the_recurrence(
    sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    t, cu = drawn(sizes, sum(sizes), decay=options.get("decay", 1.0)), options.get("cu")
    if "skip" in options:
        del t["D"]
    if "still" in options:
        t["A"] = torch.zeros_like(t["A"])
        t["dt"][0, 0, 1] = 0.0
    tensors, keywords = list(t.values()), {"return_state": True}
    if cu is not None:
        keywords["cu_seqlens"] = torch.tensor(cu, dtype=torch.int32)
    if "initial" in options:
        count = len(spans(sizes[0], sizes[3], cu))
        generator = torch.Generator().manual_seed(1)
        t["initial_state"] = torch.randn(count, sizes[1], *sizes[4:], generator=generator)
        keywords["initial_state"] = t["initial_state"]
    problem = SSD.problem(*tensors, **keywords)
    compare(problem, t, lambda x: naive(x, cu), 5, smooth=math.prod(sizes) < 60)


def heads_of(x: torch.Tensor, heads: int) -> torch.Tensor:
    """A tensor of groups for every head, in float32."""
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def recurrent(t: Tensors, *, broken: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Position by position in float32."""
    x, dt, A = t["x"].float(), t["dt"].float(), t["A"].float()
    heads, ys = x.shape[1], []
    k, q = (heads_of(t[name], heads) for name in "BC")
    if broken == "group":
        k, q = (t[name].float().repeat(1, heads // t[name].shape[1], 1, 1) for name in "BC")
    s = torch.zeros(x.shape[0], heads, k.shape[3], x.shape[3])
    for i in range(x.shape[2]):
        step = dt[:, :, i, None, None]
        write = (1.0 if broken == "step" else step) * k[:, :, i, :, None] * x[:, :, i, None]
        a = torch.exp(step * A[:, None, None])
        s = a * (s + write) if broken == "decay" else a * s + write
        ys.append((q[:, :, i, None] @ s)[:, :, 0])
    y = torch.stack(ys, 2)
    return (y if broken == "skip" else y + t["D"].float()[:, None, None] * x), s


def chunkwise(
    t: Tensors, size: int, dtype: torch.dtype, *, scaled: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Listing 1 in chunks, operands rounded to ``dtype``; steps go with x, or not ``scaled``, the weights."""

    def rounded(y: torch.Tensor) -> torch.Tensor:
        return y.to(dtype).float()

    x, dt = t["x"].float(), t["dt"].float()
    heads, ys = x.shape[1], []
    g = dt * t["A"].float()[:, None]
    k, q = (heads_of(t[name], heads) for name in "BC")
    s = torch.zeros(x.shape[0], heads, k.shape[3], x.shape[3])
    for start in range(0, x.shape[2], size):
        cx, cd, ck, cq, cg = (y[:, :, start : start + size] for y in (x, dt, k, q, g))
        b = cg.cumsum(2)
        gaps = (b[:, :, :, None] - b[:, :, None]).masked_fill(
            ~torch.ones(b.shape[2], b.shape[2]).tril().bool(), -torch.inf
        )
        w = (cq @ ck.mT) * gaps.exp()
        value = rounded(cd[..., None] * cx) if scaled else cx
        w = w if scaled else w * cd[:, :, None]
        y = rounded(w) @ value + rounded(cq * b.exp()[..., None]) @ rounded(s)
        last = b[:, :, -1:]
        after = (last - b).exp() if scaled else (last - b).exp() * cd
        s = last.exp()[..., None] * s + rounded(ck * after[..., None]).mT @ value
        ys.append(y)
    return torch.cat(ys, 2) + t["D"].float()[:, None, None] * x, s


def ratios(got: torch.Tensor, exact: torch.Tensor, budget: Budget) -> tuple[float, float]:
    """Worst error/certain and root mean square of error/probable."""
    assert not bool(budget.open.any())
    error = (got.detach().double().reshape(exact.shape) - exact).abs()
    return float((error / budget.certain).max()), float((error / budget.probable).square().mean().sqrt())


def algorithms(length: int, dtype: torch.dtype) -> list[Algorithm]:
    """Healthy ones."""
    return [
        recurrent,
        lambda t: chunkwise(t, 16, dtype),
        lambda t: chunkwise(t, min(64, length), dtype, scaled=False),
        lambda t: chunkwise(t, min(128, length), dtype),
        lambda t: chunkwise(t, 64, torch.float32),
    ]


def forward_of(t: Tensors, **options: Any) -> tuple[SsdProblem, Any, Any]:
    """The problem, its reference and budgets."""
    problem = SSD.problem(*t.values(), return_state=True, **options)
    forward = evaluate(problem, EnclosureArithmetic())
    return problem, forward, problem.budgets(forward, ANY)


def closed_form(t: Tensors, dy: torch.Tensor, ds: torch.Tensor) -> Tensors:
    """ddt and dA in float32 with the gates' gradient by GLA-4, a reverse cumulative sum."""
    heads = t["x"].shape[1]
    x, dt, A = t["x"].float(), t["dt"].float(), t["A"].float()
    k, q = (heads_of(t[name], heads).clone().requires_grad_() for name in "BC")
    v = (dt[..., None] * x).requires_grad_()
    s, ys = torch.zeros(ds.shape), []
    for i in range(x.shape[2]):
        s = torch.exp(dt[:, :, i] * A)[..., None, None] * s + k[:, :, i, :, None] * v[:, :, i, None]
        ys.append((q[:, :, i, None] @ s)[:, :, 0])
    dq, dk, dv = torch.autograd.grad((torch.stack(ys, 2) * dy).sum() + (s * ds).sum(), [q, k, v])
    terms = (q * dq - k * dk).detach().sum(-1)
    dg = terms.flip(2).cumsum(2).flip(2) + (s * ds).detach().sum((2, 3))[..., None]
    return {"dt": (x * dv).sum(-1) + A[:, None] * dg, "A": (dt * dg).sum((0, 2))}


def gradients_of(
    problem: Any, forward: Any, t: Tensors, algorithm: Algorithm, dtype: torch.dtype, seed: int
) -> tuple[GradientProblem, Any, Any, Tensors]:
    """The gradient problem, its reference and budgets, and what autograd makes of an algorithm in float32."""
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(problem.shape("y"), generator=generator).to(dtype)
    ds = torch.randn(problem.shape("state"), generator=generator)
    gradients = GradientProblem(problem, forward, {"y": dy, "state": ds})
    exact_ones = evaluate(gradients, EnclosureArithmetic())
    leaves = {name: x.float().clone().requires_grad_() for name, x in t.items()}
    y, s = algorithm(leaves)
    found = torch.autograd.grad(
        (y * dy.float()).sum() + (s.reshape(ds.shape) * ds).sum(), list(leaves.values())
    )
    return gradients, exact_ones, gradients.budgets(exact_ones, ANY), dict(zip(leaves, found, strict=True))


STRENGTHS = ((130, 0.1, 1.0), (60, 1.0, 30.0), (30, 2.0, 400.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_healthy_algorithms_stay_within_the_certain_budget_and_near_the_probable_one(
    dtype: torch.dtype,
) -> None:
    """Measured: error/probable of y 0.07 to 0.33 in float32, 0.22 to 0.59 in float16 and bfloat16."""
    spread = []
    for length, step, decay in STRENGTHS:
        t = drawn((1, 4, 2, length, 16, 12), 3, dtype, step=step, decay=decay)
        _, forward, budgets = forward_of(t)
        for algorithm in algorithms(length, dtype):
            y, s = algorithm(t)
            worst, rms = ratios(y.to(dtype), forward["y"].value, budgets["y"])
            assert worst <= 1.0
            spread.append(rms)
            assert ratios(s, forward["state"].value, budgets["state"])[0] <= 1.0
    assert max(spread) < 2.0
    assert max(spread) > 0.1
    t = drawn((1, 4, 2, 60, 16, 12), 3, dtype, step=0.3)
    _, forward, budgets = forward_of(t)
    for broken in ("skip", "group", "step", "decay"):
        y, _ = recurrent(t, broken=broken)
        assert ratios(y.to(dtype), forward["y"].value, budgets["y"])[0] > 1.0, broken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_healthy_algorithms_stay_within_budget(dtype: torch.dtype) -> None:
    for length, step, decay in ((70, 0.1, 1.0), (30, 1.0, 30.0)):
        t = drawn((1, 4, 2, length, 5, 3), 4, dtype, step=step, decay=decay)
        problem, forward, _ = forward_of(t)
        for algorithm in (recurrent, lambda y: chunkwise(y, 16, torch.float32)):
            gradients, exact_ones, budgets, found = gradients_of(problem, forward, t, algorithm, dtype, 1)
            for name, y in found.items():
                worst, rms = ratios(y.to(t[name].dtype), exact_ones[f"d{name}"].value, budgets[f"d{name}"])
                assert worst <= 1.0, (name, worst)
                assert rms <= 2.0, (name, rms)
        dy, ds = (gradients.cotangents[name].float() for name in ("y", "state"))
        for name, y in closed_form(t, dy, ds).items():
            worst, rms = ratios(y.to(t[name].dtype), exact_ones[f"d{name}"].value, budgets[f"d{name}"])
            assert worst <= 1.0, (name, worst)
            assert rms <= 2.0, (name, rms)
        _, _, _, other = gradients_of(problem, forward, t, lambda y: recurrent(y, broken="group"), dtype, 1)
        assert ratios(other["B"], exact_ones["dB"].value, budgets["dB"])[0] > 1.0
        for name in ("dx", "ddt", "dC"):
            zero = torch.zeros_like(exact_ones[name].value)
            assert ratios(zero, exact_ones[name].value, budgets[name])[0] > 1.0, name


def test_a_sample_of_a_long_call_is_judged() -> None:
    """Against gates so strong that few positions matter, and in parts of a packed batch."""
    t = drawn((1, 2, 1, 8192, 4, 3), 9, torch.float16, step=0.1)
    cu = torch.tensor([0, 5000, 5000, 8192], dtype=torch.int32)
    problem = SSD.problem(*t.values(), cu_seqlens=cu, return_state=True)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budgets = problem.budgets(forward, ANY)
    assert problem.differentiated == ()
    judged = ~budgets["y"].open
    assert 0 < int(judged.any(-1)[0, 0].sum()) <= 96
    pieces = [
        {name: x if x.dim() == 1 else x[:, :, start:stop] for name, x in t.items()}
        for start, stop in ((0, 5000), (5000, 8192))
    ]
    outputs = [chunkwise(piece, 64, torch.float16) for piece in pieces]
    y = torch.cat([o for o, _ in outputs], 2).to(torch.float16).double()
    error = (y - forward["y"].value).abs()
    assert bool((error <= budgets["y"].certain)[judged].all())
    assert not bool((forward["y"].value.abs() <= budgets["y"].certain)[judged].all())
    for s, place in ((0, 0), (1, 2)):
        error = (outputs[s][1][0] - forward["state"].value[place]).abs()
        assert bool((error <= budgets["state"].certain[place]).all())
    assert bool((forward["state"].value[1] == 0).all())


def test_bad_inputs_close_what_sees_them_and_nothing_else() -> None:
    clean = drawn((1, 4, 2, 6, 3, 2), 1)
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    cases: dict[str, tuple[tuple[int, ...], set[int], set[int], bool]] = {
        "x": ((0, 1, 1, 0), {1}, {1, 2}, True),
        "dt": ((0, 3, 1), {3}, {1, 2}, True),
        "B": ((0, 1, 4, 0), {2, 3}, {4, 5}, True),
        "C": ((0, 0, 4, 0), {0, 1}, {4}, False),
        "A": ((2,), {2}, set(range(6)), True),
        "D": ((2,), {2}, set(range(6)), False),
    }
    for name, (place, heads, rows, reaches) in cases.items():
        t = {key: x.clone() for key, x in clean.items()}
        t[name][place] = torch.nan
        problem = SSD.problem(*t.values(), cu_seqlens=cu, return_state=True)
        assert problem.nonfinite
        budgets = problem.budgets(evaluate(problem, EnclosureArithmetic()), ANY)
        expected = torch.zeros(1, 4, 6, 2, dtype=torch.bool)
        for h in heads:
            expected[0, h, sorted(rows)] = True
        assert torch.equal(budgets["y"].open, expected), name
        states = {(s, h) for s in range(2) for h in heads if rows & set(range(3 * s, 3 * s + 3))}
        closed = budgets["state"].open.flatten(2).all(-1)
        assert {tuple(x) for x in closed.nonzero().tolist()} == (states if reaches else set()), name


def test_calls_that_the_contract_does_not_have_are_refused_by_name() -> None:
    t = drawn((1, 4, 2, 3, 2, 2), 0, torch.bfloat16)
    good = list(t.values())
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"A": -t["A"]}, {}, "A holds .*A ≤ 0"),
        ({"dt": -t["dt"]}, {}, "dt holds .*dt ≥ 0"),
        ({"dt": t["dt"].half()}, {}, "dt has dtype"),
        ({"x": t["x"][0]}, {}, "x has shape"),
        ({"B": t["B"][:, :, :2]}, {}, "B has shape"),
        ({"B": torch.cat([t["B"]] * 2, 1)[:, :3]}, {}, "4 heads and B 3 groups"),
        ({"D": t["D"][:2]}, {}, "D has shape"),
        ({"A": t["A"].tolist()}, {}, "A has type list"),
        ({}, {"initial_state": torch.zeros(1, 4, 2, 2).bfloat16()}, "initial_state has shape"),
        ({}, {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}, "offsets must rise"),
        ({}, {"return_state": 1}, "return_state=1"),
        ({}, {"scale": 1.0}, "no option 'scale'"),
    ]
    for changed, options, message in cases:
        with pytest.raises(ContractError, match=message):
            SSD.problem(*(t | changed).values(), **options)
    with pytest.raises(ContractError, match="takes 5 or 6 tensors"):
        SSD.problem(*good[:4])
    wide = SSD.problem(good[0], good[1].float(), good[2].float(), *good[3:5], None)
    assert wide.differentiated == ("x", "dt", "A", "B", "C")
    assert wide.input_dtype("dt") == torch.float32


def test_problems_name_what_would_make_them_vacuous() -> None:
    t = drawn((1, 2, 1, 9, 3, 2), 0)
    problem, forward, budgets = forward_of(t)
    assert problem.vacuity(forward, budgets) == []
    problem, forward, budgets = forward_of({name: x * float(name in ("dt", "A")) for name, x in t.items()})
    assert "zero" in " ".join(problem.vacuity(forward, budgets))
    assert "position 4" in problem.explain_row("y", (0, 1, 4))
