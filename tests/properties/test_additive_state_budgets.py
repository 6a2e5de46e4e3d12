"""Budgets of linear, gated linear and RWKV-6 attention and RetNet, against healthy and worse algorithms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.budgets.base import Budget
from attnproof.properties.contract import Contract, ContractError, Precision
from attnproof.properties.families.additive_state import AdditiveStateProblem
from attnproof.properties.families.gated_linear import GATED_LINEAR
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.linear import LINEAR
from attnproof.properties.families.retention import RETENTION
from attnproof.properties.families.rwkv6 import RWKV6
from attnproof.properties.oracle import evaluate

ANY = Contract(family="any")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = DTYPES[1:]


@dataclass(frozen=True)
class Inputs:
    """Operands of the common recurrence in the inputs' dtype; g (B, H, N, D) float32 log decays."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    u: torch.Tensor | None
    initial: torch.Tensor
    scale: float = 0.7


def recurrent(
    x: Inputs, *, state: torch.dtype = torch.float32, twice: bool = False, early: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position by position in float32; broken by decaying twice, or by decaying the new write too."""
    q, k, v, s, outputs = x.q.float(), x.k.float(), x.v.float(), x.initial, []
    for t in range(q.shape[2]):
        write = k[:, :, t, :, None] * v[:, :, t, None, :]
        a = x.g[:, :, t].exp()[..., None]
        bonus = None if x.u is None else x.u.float()[None, :, :, None] * write
        before = s
        s = a * (s + write) if early else a * (a if twice else 1.0) * s + write
        s = s.to(state).float()
        outputs.append(x.scale * (q[:, :, t, None, :] @ (s if bonus is None else before + bonus))[:, :, 0])
    return torch.stack(outputs, 2), s


def chunkwise(x: Inputs, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of ``size`` in log space, operands and weights rounded to ``dtype``."""

    def rounded(y: torch.Tensor) -> torch.Tensor:
        return y.to(dtype).float()

    q, k, v, s, outputs = x.q.float(), x.k.float(), x.v.float(), x.initial, []
    for start in range(0, q.shape[2], size):
        cq, ck, cv, g = (y[:, :, start : start + size] for y in (q, k, v, x.g))
        b = g.cumsum(2)
        n, read = g.shape[2], b if x.u is None else b - g
        weights = torch.zeros(*g.shape[:2], n, n)
        for i in range(n):
            seen = slice(0, i + (x.u is None))
            decay = (read[:, :, i, None] - b[:, :, seen]).exp()
            weights[:, :, i, seen] = (cq[:, :, i, None] * ck[:, :, seen] * decay).sum(-1)
        if x.u is not None:
            weights += torch.diag_embed((cq * ck * x.u.float()[None, :, None]).sum(-1))
        o = rounded(cq * read.exp()) @ rounded(s) + rounded(weights) @ cv
        outputs.append(x.scale * o)
        last = b[:, :, -1:]
        s = last.exp().mT * s + rounded(ck * (last - b).exp()).mT @ cv
    return torch.cat(outputs, 2), s


def closed_form(x: Inputs, dq: torch.Tensor, dk: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The gates' gradient by GLA-4, by a reverse cumulative sum in float32."""
    terms = x.q.float() * dq - x.k.float() * dk
    return terms.flip(2).cumsum(2).flip(2) + last[:, :, None]


def drawn(
    family: str, dtype: torch.dtype, length: int, strength: float, seed: int = 0
) -> tuple[Inputs, AdditiveStateProblem]:
    """Normal operands, and gates between 0 and −strength."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (normal(1, 2, length, width).to(dtype) for width in (24, 24, 16))
    initial, u = normal(1, 2, 24, 16), normal(2, 24).to(dtype)
    g = -torch.rand(q.shape, generator=generator) * strength
    options: dict[str, Any] = {"scale": 0.7, "initial_state": initial, "return_state": True}
    if family == "scalar":
        g = g[..., 0]
    if family == "retention":
        gamma = torch.log1p(-torch.exp2(-5.0 - torch.arange(2)))
        g = gamma[None, :, None].expand(1, 2, length)
        problem = RETENTION.problem(q, k, v, **options)
    elif family == "rwkv6":
        problem = RWKV6.problem(q, k, v, g, u, **options)
    else:
        problem = GATED_LINEAR.problem(q, k, v, g, **options)
    g = g if g.dim() == 4 else g[..., None].expand(q.shape)
    return Inputs(q, k, v, g, u if family == "rwkv6" else None, initial), problem


def ratios(got: torch.Tensor, exact: torch.Tensor, budget: Budget) -> tuple[float, float]:
    """Worst error/certain and root mean square of error/probable."""
    assert not bool(budget.open.any())
    error = (got.detach().double() - exact).abs()
    return float((error / budget.certain).max()), float((error / budget.probable).square().mean().sqrt())


FAMILIES = ("gated_linear", "scalar", "retention", "rwkv6")
STRENGTHS = ((140, 0.05), (40, 5.0), (20, 200.0))
CHUNKS = (16, 64, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_healthy_algorithms_stay_within_the_certain_budget_and_near_the_probable_one(
    family: str, dtype: torch.dtype
) -> None:
    spread = []
    for length, strength in STRENGTHS:
        x, problem = drawn(family, dtype, length, strength)
        forward = evaluate(problem, EnclosureArithmetic())
        budgets = problem.budgets(forward, ANY)
        algorithms = [
            recurrent(x),
            *(chunkwise(x, size, dtype) for size in CHUNKS),
            chunkwise(x, length, dtype),
        ]
        for o, state in algorithms[: 4 if length > 128 and family != "retention" else 5]:
            worst, rms = ratios(o.to(dtype), forward["o"].value, budgets["o"])
            assert worst <= 1.0
            spread.append(rms)
            assert ratios(state, forward["state"].value, budgets["state"])[0] <= 1.0
        if dtype in HALF and strength < 1.0:
            error = max(float((o.to(dtype) - forward["o"].value).abs().max()) for o, _ in algorithms)
            assert float(budgets["o"].certain.max()) <= 50.0 * error
    assert max(spread) < 3.0
    assert max(spread) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_worse_and_wrong_algorithms_do_not(family: str, dtype: torch.dtype) -> None:
    x, problem = drawn(family, dtype, 70, 0.05)
    forward = evaluate(problem, EnclosureArithmetic())
    budgets = problem.budgets(forward, ANY)
    healthy = max(
        ratios(o.to(dtype), forward["o"].value, budgets["o"])[1]
        for o in (recurrent(x)[0], chunkwise(x, 64, dtype)[0])
    )
    wrong: dict[str, Callable[[], torch.Tensor]] = {
        "decay applied twice": lambda: recurrent(x, twice=True)[0],
        "a state of the neighbouring precision": lambda: recurrent(x, state=torch.bfloat16)[0],
    }
    if family == "rwkv6":
        wrong["read after the decay"] = lambda: recurrent(replace(x, g=x.g.roll(-1, 2)))[0]
    else:
        wrong["decay off by one"] = lambda: recurrent(x, early=True)[0]
    for name, algorithm in wrong.items():
        worst, rms = ratios(algorithm().to(dtype), forward["o"].value, budgets["o"])
        if name.startswith("a state"):
            assert rms > 2.0 * healthy, (name, rms)
            declared = replace(ANY, precision=Precision(state="bfloat16"))
            allowed = problem.budgets(forward, declared)["o"]
            assert ratios(algorithm().to(dtype), forward["o"].value, allowed)[0] <= 1.0
        else:
            assert worst > 1.0 or rms > 5.0 * healthy, (name, worst, rms)
    assert dtype != torch.float32 or worst > 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_healthy_algorithms_stay_within_budget(family: str, dtype: torch.dtype) -> None:
    for length, strength in ((80, 0.05), (30, 5.0)):
        x, problem = drawn(family, dtype, length, strength, seed=2)
        forward = evaluate(problem, EnclosureArithmetic())
        generator = torch.Generator().manual_seed(1)
        do = torch.randn(problem.shape("o"), generator=generator).to(dtype)
        ds = torch.randn(problem.shape("state"), generator=generator)
        gradients = GradientProblem(problem, forward, {"o": do, "state": ds})
        exact = evaluate(gradients, EnclosureArithmetic())
        budgets = gradients.budgets(exact, ANY)
        names = ["q", "k", "v", "g", "initial", *(["u"] if x.u is not None else [])]
        for algorithm in (recurrent, lambda y: chunkwise(y, 64, torch.float32)):
            inputs = {name: getattr(x, name).float().clone().requires_grad_() for name in names}
            o, state = algorithm(replace(x, **inputs))
            found = dict(
                zip(
                    names,
                    torch.autograd.grad((o * do.float()).sum() + (state * ds).sum(), list(inputs.values())),
                    strict=True,
                )
            )
            if x.u is None:
                found["g4"] = closed_form(x, found["q"], found["k"], (state * ds).sum(-1))
            if family == "retention":
                found = {name: y for name, y in found.items() if name not in ("g", "g4")}
            for name, y in found.items():
                output = {"initial": "dinitial_state", "g4": "dg"}.get(name, f"d{name}")
                y = y.sum(-1) if y.dim() > len(problem.input_shape(output[1:])) else y
                y = y.to(dtype) if name in ("q", "k", "v", "u") else y
                worst, rms = ratios(y, exact[output].value, budgets[output])
                assert worst <= 1.0, (name, worst)
                assert rms <= 2.0, (name, rms)
        wrong = exact["dk"].value.roll(1, 2)
        assert ratios(wrong, exact["dk"].value, budgets["dk"])[0] > 1.0


def linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str,
    normalize: bool,
    causal: bool,
    dtype: torch.dtype,
    parallel: bool,
    broken: str = "",
) -> torch.Tensor:
    """Linear attention in float32 with features, weights and states rounded to ``dtype``."""

    def rounded(y: torch.Tensor) -> torch.Tensor:
        return y.to(dtype).float()

    def phi(x: torch.Tensor) -> torch.Tensor:
        x, width = x.float(), x.shape[-1]
        squares = (x[..., :, None] * x[..., None, :]).flatten(-2)
        found = {
            "identity": x,
            "relu": x.relu(),
            "exp": x.exp(),
            "elu1": torch.nn.functional.elu(x) + 1.0,
            "squared": squares,
            "taylor": torch.cat(
                [torch.ones_like(x[..., :1]), x * width**-0.25, squares * (2 * width) ** -0.5], -1
            ),
        }
        return found[feature_map]

    fq, fk, v = phi(q), phi(k), v.float()
    if parallel:
        w = fq @ fk.mT
        w = w.tril(-1 if broken == "diagonal" else 0) if causal else w
        o = rounded(w) @ v
    elif causal:
        states = (rounded(fk)[..., :, None] * v[..., None, :]).cumsum(2)
        o = (rounded(fq)[..., None, :] @ rounded(states))[..., 0, :]
    else:
        o = rounded(fq) @ rounded(rounded(fk).mT @ v)
    if normalize:
        z = fk.cumsum(2) if causal else fk.sum(2, keepdim=True)
        o = o / ((fq * z).sum(-1, keepdim=True) + (1e-2 if broken == "epsilon" else 0.0))
    return o


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature_map", ["identity", "relu", "exp", "elu1", "taylor", "squared"])
def test_linear_attention_stays_within_its_budget(feature_map: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, 90, width, generator=generator).to(dtype) for width in (8, 8, 12))
    normalized = (False,) if feature_map == "identity" else (False, True)
    for normalize, causal in ((n, c) for n in normalized for c in (True, False)):
        options: dict[str, Any] = {"feature_map": feature_map, "normalize": normalize, "causal": causal}
        problem = LINEAR.problem(q, k, v, **options, return_state=True)
        forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
        budget = problem.budgets(forward, ANY)["o"]
        judged = ~budget.open
        assert float(judged.double().mean()) > 0.9
        for parallel in (True, False):
            o = linear(q, k, v, **options, dtype=dtype, parallel=parallel).to(dtype).double()
            error = torch.where(judged, (o - forward["o"].value).abs(), 0.0)
            assert bool((error <= budget.certain).all())
            assert float((error / budget.probable.clamp(min=1e-300)).square().mean().sqrt()) < 3.0
        for broken in ("diagonal", *(["epsilon"] if normalize and causal and dtype == torch.float32 else [])):
            if broken == "diagonal" and not causal:
                continue
            o = linear(q, k, v, **options, dtype=dtype, parallel=True, broken=broken).to(dtype).double()
            assert bool(((o - forward["o"].value).abs() > budget.certain)[judged].any()), broken


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_linear_attention_stay_within_budget(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    q, k, v, do = (torch.randn(1, 2, 40, width, generator=generator).to(dtype) for width in (6, 6, 8, 8))
    for feature_map in ("elu1", "taylor"):
        for normalize, causal in ((True, True), (False, True), (True, False)):
            options: dict[str, Any] = {"feature_map": feature_map, "normalize": normalize, "causal": causal}
            problem = LINEAR.problem(q, k, v, **options)
            gradients = GradientProblem(problem, evaluate(problem, EnclosureArithmetic()), {"o": do})
            exact = evaluate(gradients, EnclosureArithmetic())
            budgets = gradients.budgets(exact, ANY)
            inputs = [y.float().clone().requires_grad_() for y in (q, k, v)]
            o = linear(*inputs, **options, dtype=torch.float32, parallel=True)
            for name, y in zip(("dq", "dk", "dv"), torch.autograd.grad(o, inputs, do.float()), strict=True):
                worst, rms = ratios(y.to(dtype), exact[name].value, budgets[name])
                assert worst <= 1.0, (feature_map, normalize, name, worst)
                assert rms <= 3.0


def test_a_normaliser_that_vanishes_leaves_its_row_open() -> None:
    q, k, v = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2)
    k[0, 0, 0] = torch.tensor([1.0, -1.0])
    problem = LINEAR.problem(q, k, v, feature_map="identity", normalize=True)
    forward = evaluate(problem, EnclosureArithmetic())
    assert bool(forward["o"].value.isfinite().all())
    budget = problem.budgets(forward, ANY)["o"]
    assert budget.open[0, 0, :, 0].tolist() == [True, False, False]


def test_bad_inputs_close_what_sees_them_and_nothing_else() -> None:
    x, _ = drawn("gated_linear", torch.float32, 6, 0.5)
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    initial = x.initial.expand(2, 2, 24, 16).clone()
    for name, place, rows in (("q", 1, [1]), ("k", 1, [1, 2]), ("v", 4, [4, 5]), ("g", 3, [3, 4, 5])):
        tensors = {key: getattr(x, key).clone() for key in ("q", "k", "v", "g")}
        tensors[name][0, 0, place, 0] = torch.nan
        problem = GATED_LINEAR.problem(
            *tensors.values(), scale=1.0, cu_seqlens=cu, initial_state=initial, return_state=True
        )
        assert problem.nonfinite
        budgets = problem.budgets(evaluate(problem, EnclosureArithmetic()), ANY)
        expected = torch.zeros(1, 2, 6, 16, dtype=torch.bool)
        expected[0, 0, rows] = True
        assert torch.equal(budgets["o"].open, expected)
        closed = [bool(budgets["state"].open[s, 0].all()) for s in range(2)]
        assert closed == [name == "k", name in ("v", "g")]
    initial[1, 0, 0, 0] = torch.inf
    problem = GATED_LINEAR.problem(x.q, x.k, x.v, x.g, scale=1.0, cu_seqlens=cu, initial_state=initial)
    budget = problem.budgets(evaluate(problem, EnclosureArithmetic()), ANY)["o"]
    assert budget.open.any(-1)[0].tolist() == [[False] * 3 + [True] * 3, [False] * 6]


def test_calls_that_the_contract_does_not_have_are_refused_by_name() -> None:
    x, _ = drawn("gated_linear", torch.bfloat16, 4, 0.5)
    good = (x.q, x.k, x.v, x.g)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (good[:3], {}, "takes 4 tensors"),
        ((*good[:3], -x.g), {}, "log decay is ≤ 0"),
        ((*good[:3], x.g[:, :1]), {}, "g has shape"),
        ((*good[:3], x.g.half()), {}, "g has dtype"),
        ((x.q, x.k[..., :2], x.v, x.g), {}, "q, k, v have shapes"),
        (good, {"initial_state": x.initial.bfloat16()}, "initial_state has shape"),
        (good, {"initial_state": x.initial[:, :1]}, "initial_state has shape"),
        (good, {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}, "offsets must rise"),
        (good, {"return_state": 1}, "return_state=1"),
    ]
    for tensors, options, message in cases:
        with pytest.raises(ContractError, match=message):
            GATED_LINEAR.problem(*tensors, scale=1.0, **options)
    with pytest.raises(ContractError, match="feature_map='sigmoid'"):
        LINEAR.problem(*good[:3], feature_map="sigmoid", normalize=False)
    with pytest.raises(ContractError, match="pair"):
        LINEAR.problem(*good[:3], feature_map="exp", normalize=True, initial_state=x.initial)


def test_problems_name_what_would_make_them_vacuous() -> None:
    x, problem = drawn("gated_linear", torch.bfloat16, 9, 0.5)
    forward = evaluate(problem, EnclosureArithmetic())
    assert problem.vacuity(forward, problem.budgets(forward, ANY)) == []
    empty = GATED_LINEAR.problem(x.q * 0.0, x.k, x.v, x.g, scale=1.0)
    forward = evaluate(empty, EnclosureArithmetic())
    assert "zero" in " ".join(empty.vacuity(forward, empty.budgets(forward, ANY)))
    assert "position 4" in problem.explain_row("o", (0, 1, 4))
