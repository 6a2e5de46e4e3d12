"""The delta rule: its definition and gradients against loops, and norm-wise enclosures of long sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flint
import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.arithmetic.normwise import Recurrence, transition_bound
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.delta import DELTA
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences
from tests.properties.test_sigmoid_family import OWN_ERROR, drawn, exact

GATES = ("none", "scalar", "channels")
NAMES = ("q", "k", "v", "beta", "g")


def call(
    sizes: tuple[int, int, int, int, int], gate: str, dtype: torch.dtype, seed: int = 0, norm: float = 0.99
) -> dict[str, Any]:
    """q, k, v, beta in [0, 2], g or None; keys of length ``norm``."""
    b, h, n, d, e = sizes
    t = drawn({"q": (b, h, n, d), "k": (b, h, n, d), "v": (b, h, n, e)}, torch.float64, seed)
    t["k"] = norm * t["k"] / t["k"].norm(dim=-1, keepdim=True).clamp(min=1e-3)
    t["q"] = t["q"] / t["q"].norm(dim=-1, keepdim=True).clamp(min=1e-3)
    generator = torch.Generator().manual_seed(seed)
    t["beta"] = 2.0 * torch.rand(b, h, n, generator=generator, dtype=torch.float64)
    shape = {"none": None, "scalar": (b, h, n), "channels": (b, h, n, d)}[gate]
    made: dict[str, Any] = {name: x.to(dtype) for name, x in t.items()}
    made["g"] = None
    if shape is not None:
        made["g"] = -0.3 * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return made


def naive(
    t: Mapping[str, Any],
    scale: float,
    number: Callable[[float], Any],
    exp: Callable[[Any], Any],
    ends: list[int] | None = None,
) -> tuple[Any, Any]:
    """o (B, H, N, E) and states (S, H, D, E) by scalar loops, in the type of ``number``."""
    b_size, heads, length, width = t["v"].shape
    depth = t["k"].shape[3]
    spans = [(b, 0, length) for b in range(b_size)]
    if ends is not None:
        spans = [(0, start, stop) for start, stop in zip(ends, ends[1:], strict=False)]
    o = np.full(t["v"].shape, number(0.0), dtype=object)
    states = np.full((len(spans), heads, depth, width), number(0.0), dtype=object)
    for s, (b, start, stop) in enumerate(spans):
        for h in range(heads):
            state = states[s, h]
            for d, e in np.ndindex(depth, width):
                state[d, e] = t["initial_state"][s, h, d, e] + number(0.0)
            for i in range(start, stop):
                for d in range(depth):
                    gate = t["g"][b, h, i] if "g" in t else None
                    gate = gate[d] if isinstance(gate, np.ndarray) else gate
                    for e in range(width):
                        state[d, e] *= number(1.0) if gate is None else exp(gate)
                for e in range(width):
                    read = t["v"][b, h, i, e]
                    for d in range(depth):
                        read -= t["k"][b, h, i, d] * state[d, e]
                    for d in range(depth):
                        state[d, e] += t["beta"][b, h, i] * t["k"][b, h, i, d] * read
                    for d in range(depth):
                        o[b, h, i, e] += number(scale) * t["q"][b, h, i, d] * state[d, e]
    return o, states


CASES = [
    ((2, 1, 3, 2, 3), "none", None),
    ((1, 2, 4, 3, 2), "scalar", None),
    ((2, 1, 3, 2, 1), "channels", None),
    ((1, 2, 5, 2, 2), "channels", [0, 2, 2, 5]),
    ((1, 1, 5, 1, 2), "scalar", [0, 1, 5]),
    ((1, 2, 0, 2, 2), "scalar", None),
    ((0, 2, 3, 2, 2), "none", None),
    ((1, 1, 0, 2, 2), "none", [0, 0, 0]),
]


@pytest.mark.parametrize(("sizes", "gate", "ends"), CASES)
def test_definition_and_gradients_hold_against_loops_and_differentiation(
    sizes: tuple[int, int, int, int, int], gate: str, ends: list[int] | None
) -> None:
    tensors = call(sizes, gate, torch.float32, seed=sum(sizes))
    count = sizes[0] if ends is None else len(ends) - 1
    more = drawn({"s": (count, sizes[1], *sizes[3:]), "ds": (count, sizes[1], *sizes[3:])}, torch.float32, 7)
    cotangents = {**drawn({"o": (*sizes[:3], sizes[4])}, torch.float32, 5), "state": more["ds"]}
    packed = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    problem = DELTA.problem(
        *tensors.values(), scale=0.7, initial_state=more["s"], cu_seqlens=packed, return_state=True
    )
    arrays = {name: exact(x) for name, x in tensors.items() if x is not None}
    arrays["initial_state"] = exact(more["s"])
    weights = {name: exact(x) for name, x in cotangents.items()}

    def loss(t: Mapping[str, Any]) -> Any:
        o, state = naive(t, 0.7, mpmath.mpf, mpmath.exp, ends)
        return (o * weights["o"]).sum() + (state * weights["state"]).sum() + mpmath.mpf(0)

    numerical = central_differences(loss, arrays)
    assert set(problem.differentiated) == set(numerical)
    with mpmath.workdps(60):
        outputs = dict(zip(("o", "state"), naive(arrays, 0.7, mpmath.mpf, mpmath.exp, ends), strict=True))
    for arithmetic in (EnclosureArithmetic(), ArbArithmetic(192), MpmathArithmetic(60)):
        forward = evaluate(problem, arithmetic, gauges=True)
        for name, expected in outputs.items():
            assert enclosure_contains(forward[name], expected, OWN_ERROR).all(), (arithmetic.name, name)
            assert bool((problem.gauge(name, forward) >= forward[name].value.abs() * (1.0 - 1e-9)).all())
        found = evaluate(GradientProblem(problem, forward, cotangents), arithmetic)
        for name, expected in numerical.items():
            assert enclosure_contains(found[f"d{name}"], expected, OWN_ERROR).all(), (arithmetic.name, name)
            radius = found[f"d{name}"].radius
            assert not radius.numel() or float(radius.max()) < 1e-11


def test_rational_decays_give_rational_outputs_and_gates_of_minus_infinity_forget() -> None:
    t = call((1, 2, 6, 3, 2), "channels", torch.float16)
    powers = torch.randint(0, 3, (1, 2, 6, 3), generator=torch.Generator().manual_seed(1))
    t["g"] = powers.double() * -torch.tensor(2.0, dtype=torch.float64).log()
    t["g"][0, 0, 3, 1] = t["g"][0, 1, 2] = -torch.inf
    # exp of a float64 multiple of log 2 errs by 10^−16; the rationals take 2^−n.
    decays = np.array([0 if x == -torch.inf else 1 for x in t["g"].flatten().tolist()], dtype=object)
    decays = decays.reshape(t["g"].shape)
    rationals = {}
    for name in ("q", "k", "v", "beta"):
        ratios = [flint.fmpq(*float(x).as_integer_ratio()) for x in t[name].flatten()]
        rationals[name] = np.array(ratios, dtype=object).reshape(t[name].shape)
    for place in np.ndindex(*decays.shape):
        decays[place] = flint.fmpq(int(decays[place]), 2 ** int(powers[place]))
    rationals["g"] = decays
    rationals["initial_state"] = np.full((1, 2, 3, 2), flint.fmpq(1, 2), dtype=object)
    o, state = naive(rationals, 0.5, lambda x: flint.fmpq(*float(x).as_integer_ratio()), lambda x: x)
    problem = DELTA.problem(
        *(t[n].double() for n in NAMES),
        scale=0.5,
        initial_state=torch.full((1, 2, 3, 2), 0.5).double(),
        return_state=True,
    )
    found = evaluate(problem, EnclosureArithmetic())
    for name, expected in (("o", o), ("state", state)):
        numbers = torch.tensor([float(x.p) / float(x.q) for x in expected.flatten()]).reshape(expected.shape)
        assert torch.allclose(found[name].value, numbers.double(), rtol=1e-6, atol=1e-6)
        exactly = torch.tensor([float(x.p) / float(x.q) for x in expected.flatten()], dtype=torch.float64)
        distance = (found[name].value.flatten() - exactly).abs()
        assert bool((distance <= found[name].radius.flatten() + 1e-15).all())
    gradients = evaluate(
        GradientProblem(problem, found, {"o": torch.ones(1, 2, 6, 2)}), EnclosureArithmetic()
    )
    closed = ~t["g"].isfinite()
    assert not bool(gradients["dg"].value[closed].any()) and not bool(gradients["dg"].radius[closed].any())


def test_the_transition_is_a_contraction_where_the_lemma_says_so() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        k = torch.randn(5, generator=generator, dtype=torch.float64)
        beta = 3.0 * torch.rand((), generator=generator, dtype=torch.float64)
        gates = -torch.rand(5, generator=generator, dtype=torch.float64)
        matrix = (torch.eye(5).double() - beta * torch.outer(k, k)) @ torch.diag(gates.exp())
        bound = float(transition_bound(k, beta)) * float(gates.exp().max())
        assert float(torch.linalg.matrix_norm(matrix, 2)) <= bound * (1.0 + 1e-12)
        if float(beta * k.square().sum()) <= 2.0 - 1e-9:
            assert float(transition_bound(k, beta)) == 1.0
        else:
            # Outside the range the bound is attained, by k itself.
            factor = torch.eye(5).double() - beta * torch.outer(k, k)
            assert float(torch.linalg.matrix_norm(factor, 2)) == pytest.approx(
                float(transition_bound(k, beta))
            )


@pytest.mark.parametrize("gate", GATES)
def test_norm_wise_radii_hold_far_from_the_first_step(gate: str) -> None:
    t = call((1, 1, 150, 6, 3), gate, torch.bfloat16, seed=2)
    problem = DELTA.problem(*t.values(), scale=1.0, return_state=True)
    cotangents = {"o": torch.ones(1, 1, 150, 3)}
    forward, exactly = (evaluate(problem, a) for a in (EnclosureArithmetic(), ArbArithmetic(256)))
    gradients = GradientProblem(problem, forward, cotangents)
    found = {**forward, **evaluate(gradients, EnclosureArithmetic())}
    for name, expected in {**exactly, **evaluate(gradients, ArbArithmetic(256))}.items():
        distance = (found[name].value - expected.value).abs()
        assert bool((distance <= found[name].radius + expected.radius).all()), name
        assert float(found[name].radius.max()) <= 1e-9, name


def test_radii_stay_small_after_4096_steps() -> None:
    t = call((1, 1, 4096, 64, 2), "none", torch.bfloat16, seed=4)
    t["beta"] = t["beta"].clamp(max=1.9)
    found = evaluate(DELTA.problem(*t.values(), scale=1.0, return_state=True), EnclosureArithmetic())
    assert all(float(x.radius.max()) < 1e-9 for x in found.values())


def test_keys_outside_the_range_grow_in_radius_too() -> None:
    t = call((1, 1, 40, 4, 2), "none", torch.float32, norm=2.0)
    run = Recurrence(*(t[n].double().flatten(0, 1) for n in NAMES[1:4]), None, torch.zeros(1, 4, 2))
    assert float(run.bound.max()) > 2.0
    problem = DELTA.problem(*t.values(), scale=1.0)
    found, exactly = (evaluate(problem, a)["o"] for a in (EnclosureArithmetic(), ArbArithmetic(512)))
    assert bool(((found.value - exactly.value).abs() <= found.radius + exactly.radius).all())


def test_a_bad_input_closes_what_sees_it() -> None:
    t = call((1, 2, 6, 2, 2), "scalar", torch.float32)
    ends = torch.tensor([0, 3, 6], dtype=torch.int32)
    t["q"][0, 0, 1, 0] = torch.nan
    t["beta"][0, 1, 4] = torch.inf
    problem = DELTA.problem(*t.values(), scale=1.0, cu_seqlens=ends, return_state=True)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budgets = problem.budgets(forward, Contract(family="delta"))
    rows = budgets["o"].open.any(-1)[0]
    assert rows.tolist() == [[False, True] + 4 * [False], 4 * [False] + 2 * [True]]
    assert budgets["state"].open.flatten(2).any(-1).tolist() == [[False, False], [False, True]]
    assert problem.nonfinite and not bool(problem.undetermined().any())


def test_cases_that_tell_nothing_are_vacuous_and_rows_are_explained() -> None:
    t = call((1, 1, 5, 2, 2), "scalar", torch.float32)
    problem = DELTA.problem(*t.values(), scale=1.0)
    forward = evaluate(problem, EnclosureArithmetic(), gauges=True)
    assert problem.vacuity(forward, problem.budgets(forward, Contract(family="delta"))) == []
    assert "decay" in problem.explain_row("o", (0, 0, 1))
    t["beta"] = torch.zeros_like(t["beta"])
    still = DELTA.problem(*t.values(), scale=1.0)
    forward = evaluate(still, EnclosureArithmetic(), gauges=True)
    assert "zero" in still.vacuity(forward, still.budgets(forward, Contract(family="delta")))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": torch.ones(1, 1, 4)}, "beta has shape"),
        ({"g": torch.ones(1, 1, 5)}, "log decay"),
        ({"initial_state": torch.ones(1, 1, 2, 3)}, "initial_state has"),
        ({"causal": True}, "no option 'causal'"),
        ({"scale": None}, "needs scale"),
        ({"return_state": 1}, "return_state=1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    t = call((1, 1, 5, 2, 2), "scalar", torch.float32)
    t.update({name: change.pop(name) for name in list(change) if name in NAMES})
    with pytest.raises(ContractError, match=message):
        DELTA.problem(*t.values(), **{"scale": 1.0, **change})
