"""``selective_scan``: definition and gradients against loops over numbers, budgets against torch."""

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
from attnproof.properties.families.selective_scan import SELECTIVE_SCAN, SelectiveScanProblem
from attnproof.properties.families.step_sizes import expm1, softplus
from attnproof.properties.oracle import certify, evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.test_sigmoid_family import exact
from tests.properties.test_ssd import Tensors, compare, gradients_of, ratios, spans

ANY = Contract(family="any")
KEYWORDS = ("z", "delta_bias", "initial_state")


def naive(t: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """y and state by the recurrence, from object arrays by name."""
    batch, heads, length = t["u"].shape
    width, lines = t["A"].shape[1], spans(batch, length, options.get("cu"))
    y = np.full(t["u"].shape, mpmath.mpf(0), dtype=object)
    states = np.full((len(lines), heads, width), mpmath.mpf(0), dtype=object)
    if "initial_state" in t:
        states = states + t["initial_state"]
    for s, (b, start, stop) in enumerate(lines):
        for h in range(heads):
            for i in range(start, stop):
                step = t["delta"][b, h, i] + (t["delta_bias"][h] if "delta_bias" in t else 0)
                if options.get("delta_softplus"):
                    step = mpmath.log1p(mpmath.exp(step))
                for c in range(width):
                    a, weight = t["A"][h, c], step
                    if options.get("discretization") == "zoh" and a != 0:
                        weight = mpmath.expm1(step * a) / a
                    moved = mpmath.exp(step * a) * states[s, h, c]
                    states[s, h, c] = moved + weight * t["B"][b, c, i] * t["u"][b, h, i]
                    y[b, h, i] += t["C"][b, c, i] * states[s, h, c]
                if "D" in t:
                    y[b, h, i] += t["D"][h] * t["u"][b, h, i]
                if "z" in t:
                    y[b, h, i] *= t["z"][b, h, i] / (1 + mpmath.exp(-t["z"][b, h, i]))
    return {"y": y, "state": states}


def drawn(
    sizes: tuple[int, ...],
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    level: float = -2.0,
    decay: float = 4.0,
    smooth: bool = True,
) -> Tensors:
    """Tensors of sizes (B, H, N, D); delta around ``level``, A down to −``decay``; all keywords' tensors."""
    b, h, n, d = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    t = {
        "u": normal(b, h, n),
        "delta": normal(b, h, n) + level if smooth else normal(b, h, n).abs() * 0.3,
        "A": -torch.rand(h, d, generator=generator) * decay,
        "B": normal(b, d, n),
        "C": normal(b, d, n),
        "D": normal(h),
        "z": normal(b, h, n),
        "delta_bias": normal(h) if smooth else normal(h).abs(),
    }
    return {name: x.to(dtype) for name, x in t.items()}


def problem_of(t: Tensors, **options: Any) -> SelectiveScanProblem:
    """The call with its final states."""
    tensors = [x for name, x in t.items() if name not in KEYWORDS]
    keywords = {name: x for name, x in t.items() if name in KEYWORDS}
    if "cu" in options:
        options = dict(options)
        options["cu_seqlens"] = torch.tensor(options.pop("cu"), dtype=torch.int32)
    return SELECTIVE_SCAN.problem(*tensors, **keywords, **options, return_state=True)


SMOOTH = {"delta_softplus": True}
ZOH = {"discretization": "zoh"}
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 2, 3, 2), {**SMOOTH}),
    ((1, 2, 3, 2), {**SMOOTH, **ZOH}),
    ((1, 2, 5, 1), {**ZOH, "cu": [0, 2, 2, 5]}),
    ((1, 1, 4, 2), {}),
    ((1, 1, 19, 2), {**SMOOTH, **ZOH}),
    ((1, 2, 0, 2), {**SMOOTH}),
    ((0, 2, 3, 2), {**ZOH}),
]


@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_definition_and_gradients_hold_against_the_recurrence(
    sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    t = drawn(sizes, sum(sizes), smooth="delta_softplus" in options)
    generator = torch.Generator().manual_seed(1)
    states = len(spans(sizes[0], sizes[2], options.get("cu")))
    t["initial_state"] = torch.randn(states, sizes[1], sizes[3], generator=generator)
    compare(problem_of(t, **options), t, lambda x: naive(x, options), 5, smooth=math.prod(sizes) < 30)


def test_steps_and_decays_of_zero_are_limits() -> None:
    """A = 0 keeps the state and, under zoh, writes δ; δ = 0 does nothing; gradients do not notice."""
    t = drawn((1, 1, 3, 3), 0, smooth=False)
    t["A"] = torch.tensor([[0.0, -1.0, -(2.0**-30)]])
    del t["delta_bias"], t["z"], t["D"]
    for options in ({}, ZOH):
        problem = problem_of(t, **options)
        near = {name: exact(x) for name, x in t.items()}

        def shifted(x: Mapping[str, Any], options: dict[str, Any] = options) -> dict[str, Any]:
            # The quotient of the naive transcription at A = 0 is a limit: 0 is replaced by 10⁻¹⁰⁰.
            A = np.vectorize(lambda a: a if a != 0 else -(mpmath.mpf(10) ** -30), otypes=[object])(x["A"])
            return naive({**x, "A": A}, options)

        with mpmath.workdps(60):
            expected = shifted(near)
        forward = evaluate(problem, ArbArithmetic(256))
        for name in ("y", "state"):
            assert enclosure_contains(forward[name], expected[name], 1e-28).all()
    t["delta"][0, 0, 1] = 0.0
    compare(problem_of(t), t, lambda x: naive(x, {}), 3, smooth=False)


def test_softplus_and_expm1_lose_nothing() -> None:
    x = torch.tensor([-700.0, -100.0, -30.0, -1.0, -1e-12, 0.0, 1e-12, 0.5, 20.0, 100.0], dtype=torch.float64)
    with mpmath.workdps(400):
        plus = np.array([mpmath.log1p(mpmath.exp(mpmath.mpf(y))) for y in x.tolist()], dtype=object)
        minus = np.array([mpmath.expm1(-abs(mpmath.mpf(y))) for y in x.tolist()], dtype=object)
    for a in (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic(60)):
        for found, numbers in (
            (softplus(a, a.exact(x)), plus),
            (expm1(a, a.exact(-x.abs())), minus),
        ):
            enclosure = a.enclosure(found)
            assert enclosure_contains(enclosure, numbers).all(), a.name
            allowed = 1e-14 * (1.0 + x.abs()) * enclosure.value.abs() + 1e-300
            assert bool((enclosure.radius <= allowed).all()), a.name


def test_log1p_encloses_and_knows_its_domain() -> None:
    x = torch.tensor([-0.999999, -0.5, 0.0, 1e-300, 1e-9, 3.0, 1e300], dtype=torch.float64)
    with mpmath.workdps(700):
        numbers = np.array([mpmath.log1p(mpmath.mpf(y)) for y in x.tolist()], dtype=object)
        moved = np.array([mpmath.log1p(mpmath.mpf(y) * (1 + mpmath.mpf(2) ** -52)) for y in x.tolist()])
    for a in (EnclosureArithmetic(), ArbArithmetic(64), MpmathArithmetic(60)):
        assert enclosure_contains(a.enclosure(a.log1p(a.exact(x))), numbers).all()
        outside = a.enclosure(a.log1p(a.exact(torch.tensor([-1.0, -2.0], dtype=torch.float64))))
        assert not bool(outside.radius.isfinite().any()) or bool(outside.value.isnan().all())
    ball = EnclosureArithmetic()
    wide = ball.scaled(ball.exact(x), 1.0)
    assert enclosure_contains(ball.enclosure(ball.log1p(wide)), moved).all()


def recurrent(
    t: Tensors, options: Mapping[str, Any], *, broken: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position by position in float32."""
    f = {name: x.float() for name, x in t.items()}
    step = f["delta"]
    if broken == "argument":
        step = torch.nn.functional.softplus(step) + f["delta_bias"][:, None]
    else:
        step = step + f["delta_bias"][:, None]
        step = torch.nn.functional.softplus(step) if options.get("delta_softplus") else step
    decays, writes = _steps(f, step, zoh=options.get("discretization") == "zoh" and broken != "euler")
    s, ys = torch.zeros(writes.shape[:2] + writes.shape[3:]), []
    for i in range(step.shape[2]):
        s = (
            decays[:, :, i] * (s + writes[:, :, i])
            if broken == "decay"
            else decays[:, :, i] * s + writes[:, :, i]
        )
        ys.append((s * f["C"][:, None, :, i]).sum(-1))
    return _finished(f, torch.stack(ys, 2), skip=broken != "skip"), s


def _steps(f: Tensors, step: torch.Tensor, *, zoh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Decays and writes, (B, H, N, D)."""
    gates = step[..., None] * f["A"][:, None]
    weights = torch.expm1(gates) / f["A"][:, None] if zoh else step[..., None]
    return gates.exp(), weights * f["B"].mT[:, None] * f["u"][..., None]


def _finished(f: Tensors, y: torch.Tensor, *, skip: bool = True) -> torch.Tensor:
    y = y + f["D"][:, None] * f["u"] if skip else y
    return y * torch.nn.functional.silu(f["z"])


def scanned(t: Tensors, options: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """By doubling: pairs (a, b) combined over distances 1, 2, 4, …"""
    f = {name: x.float() for name, x in t.items()}
    step = f["delta"] + f["delta_bias"][:, None]
    step = torch.nn.functional.softplus(step) if options.get("delta_softplus") else step
    a, b = _steps(f, step, zoh=options.get("discretization") == "zoh")
    reach = 1
    while reach < a.shape[2]:
        earlier_a = torch.nn.functional.pad(a, (0, 0, reach, 0), value=1.0)[:, :, : a.shape[2]]
        earlier_b = torch.nn.functional.pad(b, (0, 0, reach, 0))[:, :, : a.shape[2]]
        a, b = a * earlier_a, a * earlier_b + b
        reach *= 2
    return _finished(f, (b * f["C"].mT[:, None]).sum(-1)), b[:, :, -1]


def quadratic(
    t: Tensors, options: Mapping[str, Any], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix of each channel, stored in ``dtype``, times u."""
    f = {name: x.float() for name, x in t.items()}
    step = f["delta"] + f["delta_bias"][:, None]
    step = torch.nn.functional.softplus(step) if options.get("delta_softplus") else step
    gates = step[..., None] * f["A"][:, None]
    b, n = gates.cumsum(2), step.shape[2]
    seen = torch.ones(n, n).tril().bool()[..., None]
    gaps = (b[:, :, :, None] - b[:, :, None]).masked_fill(~seen, -torch.inf).exp()
    _, gains = _steps({**f, "u": torch.ones_like(f["u"])}, step, zoh=options.get("discretization") == "zoh")
    weights = (f["C"].mT[:, None, :, None] * gaps * gains[:, :, None]).sum(-1).to(dtype).float()
    state = ((b[:, :, -1:] - b).exp() * gains * f["u"][..., None]).sum(2)
    return _finished(f, (weights @ f["u"][..., None])[..., 0]), state


OPTIONS: list[dict[str, Any]] = [SMOOTH, {**SMOOTH, **ZOH}]
STRENGTHS = ((100, -3.0, 4.0), (40, 0.0, 4.0), (30, 2.0, 200.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=["euler", "zoh"])
def test_healthy_algorithms_stay_within_the_certain_budget_and_near_the_probable_one(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The matrix of a channel, stored in half precision, is only within the certain budget."""
    spread = []
    for length, level, decay in STRENGTHS:
        t = drawn((1, 3, length, 8), 3, dtype, level=level, decay=decay)
        problem = problem_of(t, **options)
        forward = evaluate(problem, EnclosureArithmetic())
        budgets = problem.budgets(forward, ANY)
        for name, (y, s) in (
            ("recurrent", recurrent(t, options)),
            ("scan", scanned(t, options)),
            ("matrix", quadratic(t, options, torch.float32)),
            ("rounded matrix", quadratic(t, options, dtype)),
        ):
            worst, rms = ratios(y.to(dtype), forward["y"].value, budgets["y"])
            assert worst <= 1.0, name
            if name != "rounded matrix":
                spread.append(rms)
            assert ratios(s, forward["state"].value, budgets["state"])[0] <= 1.0
    assert max(spread) < 3.0
    assert max(spread) > 0.1
    t = drawn((1, 3, 40, 8), 3, dtype, level=0.0)
    problem = problem_of(t, **options)
    forward = evaluate(problem, EnclosureArithmetic())
    budget = problem.budgets(forward, ANY)["y"]
    for broken in ("skip", "argument", "decay", *(["euler"] if "discretization" in options else [])):
        y, _ = recurrent(t, options, broken=broken)
        assert ratios(y.to(dtype), forward["y"].value, budget)[0] > 1.0, broken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=["euler", "zoh"])
def test_gradients_of_healthy_algorithms_stay_within_budget(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    for length, level in ((40, -3.0), (20, 1.0)):
        t = drawn((2, 2, length, 3), 4, dtype, level=level)
        problem = problem_of(t, **options)
        forward = evaluate(problem, EnclosureArithmetic())
        for algorithm in (recurrent, scanned):
            _, exact_ones, budgets, found = gradients_of(
                problem, forward, t, lambda y, f=algorithm: f(y, options), dtype, 1
            )
            for name, y in found.items():
                worst, rms = ratios(y.to(dtype), exact_ones[f"d{name}"].value, budgets[f"d{name}"])
                assert worst <= 1.0, (name, worst)
                assert rms <= 2.0, (name, rms)
        _, _, _, other = gradients_of(
            problem, forward, t, lambda y: recurrent(y, options, broken="argument"), dtype, 1
        )
        assert ratios(other["delta"], exact_ones["ddelta"].value, budgets["ddelta"])[0] > 1.0
        for name in ("du", "ddelta", "dC", "dz"):
            zero = torch.zeros_like(exact_ones[name].value)
            assert ratios(zero, exact_ones[name].value, budgets[name])[0] > 1.0, name


def test_steps_far_from_zero_are_certified_and_judged() -> None:
    t = drawn((1, 2, 12, 3), 5)
    t["delta"] = torch.tensor([-100.0, 100.0, -50.0, 0.0]).repeat(1, 2, 3)
    for options in OPTIONS:
        problem = problem_of(t, **options)
        reference = certify(
            problem, lambda found: {n: 2.0**-30 * problem.gauge(n, found) for n in problem.outputs}
        )
        budgets = problem.budgets(reference.outputs, ANY)
        for y, s in (recurrent(t, options), scanned(t, options)):
            assert ratios(y, reference.outputs["y"].value, budgets["y"])[0] <= 1.0
            assert ratios(s, reference.outputs["state"].value, budgets["state"])[0] <= 1.0
    t["delta"] = torch.full_like(t["delta"], -100.0)
    t["B"] = t["B"] * 1e30
    problem = problem_of(t, **SMOOTH)
    reference = certify(
        problem, lambda found: {n: 2.0**-40 * problem.gauge(n, found) for n in problem.outputs}
    )
    assert float(reference.outputs["state"].value.abs().max()) > 0.0
    assert set(reference.arithmetic) == {"float64"}


def test_a_sample_of_a_long_call_is_judged() -> None:
    t = drawn((1, 2, 8192, 4), 9, torch.float16)
    problem = problem_of(t, **SMOOTH)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(forward, ANY)["y"]
    assert problem.differentiated == ()
    judged = ~budget.open
    assert 0 < int(judged[0, 0].sum()) <= 96
    assert bool(problem.gauge("y", forward)[~judged].isinf().all())
    y, s = scanned(t, SMOOTH)
    error = (y.to(torch.float16).double() - forward["y"].value).abs()
    assert bool((error <= budget.certain)[judged].all())
    assert not bool((forward["y"].value.abs() <= budget.certain)[judged].all())
    assert bool(((s - forward["state"].value).abs() <= problem.budgets(forward, ANY)["state"].certain).all())


def test_bad_inputs_close_what_sees_them_and_nothing_else() -> None:
    clean, every = drawn((1, 3, 6, 2), 1), {0, 1, 2}
    cases: dict[str, tuple[tuple[int, ...], set[int], set[int], bool]] = {
        "u": ((0, 1, 1), {1}, {1, 2}, True),
        "delta": ((0, 2, 4), {2}, {4, 5}, True),
        "B": ((0, 1, 4), every, {4, 5}, True),
        "C": ((0, 0, 4), every, {4}, False),
        "z": ((0, 1, 0), {1}, {0}, False),
        "A": ((2, 0), {2}, set(range(6)), True),
        "delta_bias": ((0,), {0}, set(range(6)), True),
        "D": ((2,), {2}, set(range(6)), False),
    }
    for name, (place, channels, rows, reaches) in cases.items():
        t = {key: x.clone() for key, x in clean.items()}
        t[name][place] = torch.inf
        problem = problem_of(t, delta_softplus=True, cu=[0, 3, 6])
        assert problem.nonfinite
        budgets = problem.budgets(evaluate(problem, EnclosureArithmetic()), ANY)
        expected = torch.zeros(1, 3, 6, dtype=torch.bool)
        for h in channels:
            expected[0, h, sorted(rows)] = True
        assert torch.equal(budgets["y"].open, expected), name
        states = {(s, h) for s in range(2) for h in channels if rows & set(range(3 * s, 3 * s + 3))}
        closed = budgets["state"].open.all(-1)
        assert {tuple(x) for x in closed.nonzero().tolist()} == (states if reaches else set()), name


def test_calls_that_the_contract_does_not_have_are_refused_by_name() -> None:
    t = {name: x for name, x in drawn((1, 3, 4, 2), 0, torch.bfloat16).items() if name not in KEYWORDS}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"A": -t["A"]}, {}, "A holds .*A ≤ 0"),
        ({"delta": -t["delta"].abs()}, {}, "steps ≥ 0"),
        ({"delta": t["delta"].float()}, SMOOTH, "delta has dtype"),
        ({"u": t["u"][0]}, {}, "u has shape"),
        ({"C": t["C"].mT}, {}, "C has shape"),
        ({}, {"z": t["u"][:, :2]}, "z has shape"),
        ({}, {"delta_bias": t["D"].tolist()}, "delta_bias has type list"),
        ({}, {"discretization": "bilinear"}, "discretization='bilinear'"),
        ({}, {"delta_softplus": 1}, "delta_softplus=1"),
        ({}, {"initial_state": torch.zeros(1, 3, 2).bfloat16(), **SMOOTH}, "initial_state has shape"),
        ({}, {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}, "offsets must rise"),
    ]
    for changed, options, message in cases:
        with pytest.raises(ContractError, match=message):
            SELECTIVE_SCAN.problem(*(t | changed).values(), **options)
    with pytest.raises(ContractError, match="takes 5 or 6 tensors"):
        SELECTIVE_SCAN.problem(*list(t.values())[:3])
    problem = problem_of(t | {"z": t["u"]}, delta_softplus=True)
    assert "channel 2 of batch 0" in problem.explain_row("y", (0, 2))
    assert problem.differentiated == ("u", "delta", "A", "B", "C", "D", "z")
