"""Budgets of the delta rule against healthy algorithms in several precisions, and against wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.contract import Contract
from attnproof.properties.families.delta import DELTA, DeltaProblem
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.oracle import evaluate
from tests.properties.test_delta_family import GATES, NAMES, call

ANY = Contract(family="delta")
SCALE = 0.7
Tensors = dict[str, Any]
HALF = (torch.float16, torch.bfloat16)


def recurrent(t: Tensors, state: torch.dtype | None = None, read_first: bool = False) -> Any:
    """Step by step in float32; ``state`` to round it to at each step, ``read_first`` the wrong order."""
    q, k, v, beta = (t[name].float() for name in ("q", "k", "v", "beta"))
    s, rows = t["initial"], []
    for i in range(q.shape[2]):
        key = k[:, :, i, :, None]
        early = (key * s).sum(-2)
        if t["g"] is not None:
            decay = t["g"][:, :, i].float().exp()
            s = s * (decay[..., None, None] if decay.dim() == 2 else decay[..., None])
        read = early if read_first else (key * s).sum(-2)
        s = s + key * (beta[:, :, i, None] * (v[:, :, i] - read))[:, :, None]
        s = s if state is None else s.to(state).float()
        rows.append(SCALE * (q[:, :, i, :, None] * s).sum(-2))
    return torch.stack(rows, 2), s


def chunkwise(t: Tensors, size: int, broken: str = "") -> Any:
    """WY form with a triangular solve in float32; operands rounded to the inputs' dtype where it is half."""
    half = t["q"].dtype

    def low(x: torch.Tensor) -> torch.Tensor:
        return x.to(half).float()

    s, rows = t["initial"], []
    for start in range(0, t["q"].shape[2], size):
        span = slice(start, start + size)
        q, k, v, beta = (t[name][:, :, span].float() for name in ("q", "k", "v", "beta"))
        n, beta = q.shape[2], beta[..., None]
        gates = torch.zeros(*beta.shape[:3], 1) if t["g"] is None else t["g"][:, :, span].float()
        gates = gates.reshape(*beta.shape[:3], gates.shape[-1] if gates.dim() == 4 else 1).cumsum(2)
        below = torch.ones(n, n).tril().bool()
        decay = (gates[:, :, :, None] - gates[:, :, None]).masked_fill(~below[..., None], -torch.inf).exp()
        if gates.shape[-1] == 1:
            decay = decay[..., 0]
            lower = (low(beta * k) @ k.mT * decay).tril(-1)
            scores = q @ k.mT * (below if broken == "mask" else decay)
        else:
            lower = (low(beta * k)[:, :, :, None] * low(decay * k[:, :, None])).sum(-1).tril(-1)
            scores = (q[:, :, :, None] * low(decay * k[:, :, None])).sum(-1)
        eye = torch.eye(n).expand_as(lower)
        inverse = low(torch.linalg.solve_triangular(lower + eye, eye, upper=False, unitriangular=True))
        weights = (1.0 if broken == "beta" else beta) * k * gates.exp()
        new = low(inverse @ low(beta * v)) - low(inverse @ low(weights)) @ low(s)
        end = gates[:, :, -1:]
        if gates.shape[-1] == 1:
            first = (q @ low(s)) * gates.exp()
            s = s * end.exp() + k.mT @ low(new * (end - gates).exp())
        else:
            first = low(q * gates.exp()) @ low(s)
            s = s * end.exp().mT + low(k * (end - gates).exp()).mT @ low(new)
        rows.append(SCALE * (first + low(scores) @ low(new)))
    return torch.cat(rows, 2), s


def drawn_call(
    sizes: tuple[int, int, int, int, int], gate: str, dtype: torch.dtype, seed: int = 0
) -> Tensors:
    t = call(sizes, gate, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    b, h, n, d, e = sizes
    t["beta"] = (t["beta"].double() / 2.0).to(dtype)
    t["initial"] = torch.randn(b, h, d, e, generator=generator)
    t["do"] = torch.randn(b, h, n, e, generator=generator).to(dtype)
    return t


def problem_of(t: Tensors) -> DeltaProblem:
    return DELTA.problem(*(t[n] for n in NAMES), scale=SCALE, initial_state=t["initial"], return_state=True)


class Judge:
    """Exact outputs and budgets of one call, against which algorithms are held."""

    def __init__(self, t: Tensors, gradients: bool = True) -> None:
        self.t, self.problem = t, problem_of(t)
        self.exact = dict(evaluate(self.problem, EnclosureArithmetic(), gauges=True))
        self.budgets = dict(self.problem.budgets(self.exact, ANY))
        if gradients:
            cotangents = {"o": t["do"], "state": t["initial"]}
            backward = GradientProblem(self.problem, self.exact, cotangents)
            self.exact |= evaluate(backward, EnclosureArithmetic())
            self.budgets |= backward.budgets(self.exact, ANY)
        assert not any(bool(budget.open.any()) for budget in self.budgets.values())

    def ratios(self, algorithm: Any) -> dict[str, tuple[float, float, float]]:
        """By output: largest error/certain, rms of error/probable, largest certain over largest error."""
        t, dtype = self.t, self.t["q"].dtype
        names = [n for n in self.problem.differentiated if n != "initial_state"]
        leaves = {n: t[n].detach().clone().float().requires_grad_() for n in names}
        initial = t["initial"].clone().requires_grad_()
        held = {n: _Leaf(x, dtype) for n, x in leaves.items()}
        o, state = algorithm({"g": None, **held, "initial": initial})
        found = {"o": o.detach().to(dtype), "state": state.detach()}
        parts = torch.autograd.grad([o, state], [*leaves.values(), initial], [t["do"].float(), t["initial"]])
        for n, x in zip([*names, "initial_state"], parts, strict=True):
            found[f"d{n}"] = x.to(dtype) if n != "initial_state" else x
        return {name: self._ratio(name, found[name].double()) for name in self.budgets}

    def _ratio(self, name: str, x: torch.Tensor) -> tuple[float, float, float]:
        budget, error = self.budgets[name], (x - self.exact[name].value).abs()
        worst = torch.where(error == 0, 0.0, error / budget.certain).max()
        square = torch.where(error == 0, 0.0, error / budget.probable).square().mean()
        return float(worst), float(square.sqrt()), float(budget.certain.max() / error.max())


class _Leaf:
    """A float32 leaf that stands for an input of another dtype: healthy code rounds operands to that."""

    def __init__(self, x: torch.Tensor, dtype: torch.dtype) -> None:
        self.x, self.dtype, self.shape = x, dtype, x.shape

    def dim(self) -> int:
        return self.x.dim()

    def float(self) -> torch.Tensor:
        return self.x

    def __getitem__(self, index: Any) -> _Leaf:
        return _Leaf(self.x[index], self.dtype)


HEALTHY = [
    ("recurrent", recurrent),
    ("chunks of 16", lambda t: chunkwise(t, 16)),
    ("chunks of 48", lambda t: chunkwise(t, 48)),
    ("chunks of 64", lambda t: chunkwise(t, 64)),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("gate", GATES)
def test_healthy_algorithms_stay_within_the_certain_budget(gate: str, dtype: torch.dtype) -> None:
    judge = Judge(drawn_call((1, 1, 133, 20, 12), gate, dtype, seed=1))
    for what, algorithm in HEALTHY:
        for name, (worst, rms, _) in judge.ratios(algorithm).items():
            assert worst <= 1.0, (what, name)
            assert rms <= 1.5, (what, name)
            if dtype != torch.float32 and name in ("o", "state") and what == "chunks of 64":
                assert rms >= 0.3, name


def test_the_certain_budget_of_half_precision_is_no_hundred_times_a_healthy_error() -> None:
    t = drawn_call((1, 1, 256, 32, 16), "none", torch.bfloat16, seed=2)
    ratios = Judge(t, gradients=False).ratios(lambda t: chunkwise(t, 64))
    assert ratios["o"][2] <= 100.0


def test_nearly_parallel_keys_and_large_steps_are_healthy() -> None:
    """Ill-conditioned WY forms: L is nearly constant and M alternates (bugs.md, B61)."""
    t = drawn_call((1, 1, 130, 16, 8), "none", torch.bfloat16, seed=3)
    k = torch.ones(16) + 0.2 * t["k"].float()
    t["k"] = (0.99 * k / k.norm(dim=-1, keepdim=True)).bfloat16()
    t["beta"] = torch.full_like(t["beta"], 1.9)
    judge = Judge(t)
    for what, algorithm in HEALTHY:
        for name, (worst, _, _) in judge.ratios(algorithm).items():
            assert worst <= 1.0, (what, name)


WRONG = [
    ("read before decay", "scalar", lambda t: recurrent(t, read_first=True)),
    ("read before decay", "channels", lambda t: recurrent(t, read_first=True)),
    ("no beta in W", "none", lambda t: chunkwise(t, 64, "beta")),
    ("causal mask for the decay, theory DN-3", "scalar", lambda t: chunkwise(t, 64, "mask")),
    ("bfloat16 state", "none", lambda t: recurrent(t, torch.bfloat16)),
    ("bfloat16 state", "scalar", lambda t: recurrent(t, torch.bfloat16)),
]


@pytest.mark.parametrize(("what", "gate", "algorithm"), WRONG)
def test_wrong_algorithms_exceed_the_budget(what: str, gate: str, algorithm: Any) -> None:
    fine = Judge(drawn_call((1, 1, 133, 20, 12), gate, torch.float32, seed=4), gradients=False)
    assert fine.ratios(algorithm)["o"][0] > 1.0
    if "state" not in what:
        judge = Judge(drawn_call((1, 1, 133, 20, 12), gate, torch.bfloat16, seed=4))
        healthy = judge.ratios(lambda t: chunkwise(t, 64))
        wrong = judge.ratios(algorithm)
        for name in ("o", "dq", "dk", "dv"):
            assert wrong[name][1] > 2.0 * max(healthy[name][1], 0.8), name


def test_a_declared_state_widens_the_budget() -> None:
    t = drawn_call((1, 1, 70, 8, 4), "scalar", torch.float32, seed=5)
    problem = problem_of(t)
    forward = evaluate(problem, EnclosureArithmetic())
    narrow = ANY.declare({"precision": {"state": "bfloat16"}})
    budgets = problem.budgets(forward, narrow)
    o, state = recurrent(t, torch.bfloat16)
    for name, x in (("o", o), ("state", state)):
        assert bool(((x.double() - forward[name].value).abs() <= budgets[name].certain).all()), name


def test_gates_of_minus_infinity_and_strong_decays_have_finite_budgets() -> None:
    t = drawn_call((1, 2, 70, 8, 4), "channels", torch.float16, seed=6)
    t["g"][0, 0, 5] = -torch.inf
    t["g"][0, 0, 9, 2] = -torch.inf
    t["g"][0, 1] = -60.0
    t["g"][0, 1, 3:30] = -1000.0
    for name, (worst, _, _) in Judge(t).ratios(recurrent).items():
        assert worst <= 1.0, name


@pytest.mark.parametrize("sizes", [(1, 2, 0, 3, 2), (0, 2, 3, 3, 2), (2, 1, 1, 1, 1)])
def test_sizes_at_the_edge_have_budgets(sizes: tuple[int, int, int, int, int]) -> None:
    t = drawn_call(sizes, "scalar", torch.bfloat16)
    problem = problem_of(t)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    for name, budget in problem.budgets(forward, ANY).items():
        assert tuple(budget.certain.shape) == problem.shape(name)
    backward = GradientProblem(problem, forward, {"o": t["do"]})
    for name, budget in backward.budgets(evaluate(backward, EnclosureArithmetic()), ANY).items():
        assert tuple(budget.certain.shape) == backward.shape(name)


def test_states_near_the_largest_operand_are_unjudged() -> None:
    t = drawn_call((1, 1, 20, 4, 2), "none", torch.float16, seed=7)
    t["initial"] = torch.full_like(t["initial"], 6e4)
    problem = problem_of(t)
    assert bool(problem.budgets(evaluate(problem, EnclosureArithmetic()), ANY)["o"].open.all())
