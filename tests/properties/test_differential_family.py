"""Differential attention: definition, gradients, its limits and budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.differential import DIFFERENTIAL, DifferentialProblem
from attnproof.properties.families.softmax import SOFTMAX
from attnproof.properties.oracle import certify, evaluate
from tests.properties.test_batch_normalised_family import (
    DTYPES,
    Call,
    Numbers,
    check_budgets,
    check_definition,
    exceeds,
    gradient_values,
    largest_difference,
)


def transcription(tensors: Mapping[str, Any], *, scale: float, causal: bool = False) -> Any:
    """o (B, H, M, E) as an object array, from q, k, v, lam of mpf, by scalar loops (Ye et al. 2024)."""
    q, k, v, lam = (tensors[name] for name in ("q", "k", "v", "lam"))
    (batch, heads, m, width), (_, groups, n, _), value_width = q.shape, k.shape, v.shape[3]
    o = np.empty((batch, heads, m, value_width), dtype=object)
    o[...] = mpmath.mpf(0)
    for b, h, i in np.ndindex(batch, heads, m):
        g = h // (heads // groups)
        seen = [j for j in range(n) if not causal or j <= i + n - m]
        for half, factor in ((0, mpmath.mpf(1)), (width // 2, -lam[h])):
            weights = []
            for j in seen:
                score = mpmath.mpf(0)
                for d in range(width // 2):
                    score += scale * q[b, h, i, half + d] * k[b, g, j, half + d]
                weights.append(mpmath.exp(score))
            total = sum(weights)
            for e in range(value_width):
                for j, weight in zip(seen, weights, strict=True):
                    o[b, h, i, e] += factor * weight / total * v[b, g, j, e]
    return o


def attention(
    leaves: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    scale: float,
    causal: bool = False,
    broken: str = "",
) -> torch.Tensor:
    """A torch kernel that rounds once; ``broken`` names a mistake."""
    q, lam = leaves["q"], leaves["lam"].reshape(1, -1, 1, 1)
    k, v = (leaves[name].repeat_interleave(q.shape[1] // leaves[name].shape[1], 1) for name in "kv")
    m, n = q.shape[2], k.shape[2]
    hidden = torch.ones(m, n, dtype=torch.bool).tril(n - m).logical_not() & causal
    parts = []
    for x, y in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True):
        s = (scale * x @ y.mT).masked_fill(hidden, -1e30)
        p = (torch.exp(s - s.amax(-1, keepdim=True)) if n else s).masked_fill(hidden, 0.0)
        parts.append(p @ v / p.sum(-1, keepdim=True).clamp(min=1e-30))
    if broken == "wrong half":
        return parts[1] - lam * parts[0]
    if broken == "sign":
        return parts[0] + lam * parts[1]
    if broken == "gradient without lam":
        return parts[0] - lam * parts[1].detach() - (parts[1] - parts[1].detach())
    if broken == "first head's lam":
        return parts[0] - lam[:, :1] * parts[1]
    if broken == "stored parts":
        return parts[0].to(dtype).float() - lam * parts[1].to(dtype).float()
    return parts[0] - lam * parts[1]


def call(seed: int, dtype: torch.dtype, *, small: bool = False, **given: Any) -> Call:
    """A random call."""
    x = Numbers(seed)
    groups, batch = x.integer(1, 2), x.integer(1, 2)
    heads = groups * x.integer(1, 2 if small else 3)
    m, n = (x.integer(1, 2), x.integer(1, 4)) if small else (x.integer(1, 30), x.integer(2, 90))
    width, value_width = (x.integer(1, 2), x.integer(1, 3)) if small else (x.integer(1, 20), x.integer(1, 12))
    m, n, heads = given.get("m", m), given.get("n", n), given.get("heads", heads)
    groups = heads if heads % groups else groups
    tensors = {
        "q": x.normal(batch, heads, m, 2 * width),
        "k": x.normal(batch, groups, n, 2 * width) + 2.0 * x.normal(1, 1, 1, 2 * width) * x.integer(0, 1),
        "v": x.normal(batch, groups, n, value_width) + x.integer(0, 1),
        "lam": 0.5 + 0.5 * x.normal(heads),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    options = {"scale": width**-0.5, "causal": given.get("causal", bool(x.integer(0, 1)))}
    return Call(DIFFERENTIAL, tensors, options, x.normal(batch, heads, m, value_width).to(dtype))


@pytest.mark.parametrize("seed", range(8))
def test_definition_and_gradients_agree_with_the_transcription(seed: int) -> None:
    check_definition(call(seed, DTYPES[seed % 3], small=True), transcription)


@pytest.mark.parametrize(("m", "n"), [(2, 0), (2, 1), (0, 3), (4, 2)])
def test_degenerate_sizes(m: int, n: int) -> None:
    example = call(1, torch.float32, small=True, m=m, n=n, causal=True)
    check_definition(example, transcription)
    if n:
        assert not exceeds([example], attention)


@pytest.mark.parametrize("dtype", DTYPES)
def test_healthy_kernels_are_within_budget(dtype: torch.dtype) -> None:
    check_budgets([call(seed, dtype) for seed in range(6)], attention)


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        ("wrong half", {"o", "dq", "dk", "dv"}),
        ("sign", {"o", "dq", "dk", "dv", "dlam"}),
        ("gradient without lam", {"dq", "dk", "dv"}),
        ("first head's lam", {"o", "dq", "dlam"}),
    ],
)
def test_broken_kernels_exceed_the_budget(broken: str, caught: set[str]) -> None:
    for dtype in DTYPES:
        calls = [call(0, dtype, m=16, n=24, heads=4)]
        assert not exceeds(calls, attention)
        assert caught <= exceeds(calls, attention, broken=broken)


def test_parts_that_cancel_must_not_be_rounded_before_they_are_subtracted() -> None:
    example = call(3, torch.float16, m=8, n=12, heads=2, causal=False)
    for name in ("q", "k"):
        first = example.tensors[name].chunk(2, -1)[0]
        example.tensors[name] = torch.cat([first, first * 1.01], -1)
    example.tensors["v"] = example.tensors["v"] + 8.0
    example.tensors["lam"] = torch.ones_like(example.tensors["lam"])
    assert not exceeds([example], attention)
    problem = example.problem
    reference = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(reference, Contract(family="differential"))["o"]
    leaves = {name: x.float() for name, x in example.tensors.items()}
    o = attention(leaves, torch.float16, **example.options, broken="stored parts").half().double()
    ratio = (o - reference["o"].value) / budget.probable
    healthy = attention(leaves, torch.float16, **example.options).half().double()
    assert float(((healthy - reference["o"].value) / budget.probable).square().mean().sqrt()) < 1.3
    assert float(ratio.square().mean().sqrt()) > 1.3


def test_without_lam_it_is_softmax_of_the_first_halves() -> None:
    example = call(2, torch.float32, n=9, causal=True)
    q, k, v, lam = example.tensors.values()
    options = example.options
    plain = SOFTMAX.problem(q.chunk(2, -1)[0], k.chunk(2, -1)[0], v, **options)
    problem = DIFFERENTIAL.problem(q, k, v, torch.zeros_like(lam), **options)
    assert largest_difference(problem, plain) < 1e-40
    do = {"o": example.cotangent}
    found, expected = gradient_values(problem, do), gradient_values(plain, do)
    assert torch.equal(found["dv"].value, expected["dv"].value)
    for name in ("dq", "dk"):
        first, second = found[name].value.chunk(2, -1)
        assert torch.equal(first, expected[name].value)
        assert float(second.abs().max()) == 0.0
    assert float(found["dlam"].value.abs().max()) > 0.1


def test_equal_halves_with_lam_one_cancel() -> None:
    example = call(2, torch.float32, n=9)
    q, k, v, lam = example.tensors.values()
    q, k = (torch.cat([x.chunk(2, -1)[0]] * 2, -1) for x in (q, k))
    problem = DIFFERENTIAL.problem(q, k, v, torch.ones_like(lam), **example.options)
    found = evaluate(problem, ArbArithmetic(256))["o"]
    assert float((found.value.abs() + found.radius).max()) < 1e-60
    dv = gradient_values(problem, {"o": example.cotangent})["dv"]
    assert float((dv.value.abs() + dv.radius).max()) < 1e-30


def test_parts_are_certified_with_the_whole() -> None:
    # Scores near 1e30 are beyond float64 enclosures; Arb decides them, for the parts' outputs as well.
    x = Numbers(1)
    q, k, v = (x.normal(1, 2, n, 4).float() for n in (3, 5, 5))
    problem = DIFFERENTIAL.problem(q * 1e15, k * 1e15, v, torch.tensor([0.5, 2.0]), scale=1.0)
    asked = {"o": torch.full(problem.shape("o"), 1e-9, dtype=torch.float64)}
    reference = certify(problem, lambda found: asked)
    assert reference.arithmetic.keys() != {"float64"}
    lam = problem.lam.double().reshape(1, -1, 1, 1)
    first, second = (reference.outputs[name] for name in ("gauge:first", "gauge:second"))
    together = first.value - lam * second.value
    assert float((together - reference.outputs["o"].value).abs().max()) < 1e-14
    assert float(torch.maximum(first.radius, second.radius).max()) < 1e-9


def test_parts_of_a_problem_have_their_own_lam() -> None:
    problem = call(4, torch.float32, small=True, n=4, m=3, causal=True).problem
    whole = evaluate(problem, ArbArithmetic(128), gauges=True)["o"].value.flatten(0, 2)
    rows = torch.ones(problem.row_shape, dtype=torch.bool)
    rows[0, 0] = False
    count = 0
    for part, index in problem.split(rows):
        assert isinstance(part, DifferentialProblem)
        assert torch.equal(evaluate(part, ArbArithmetic(128))["o"].value.flatten(0, 2), whole[index])
        count += len(index)
    assert count == int(rows.sum())


def test_rows_without_keys_are_zero_or_as_declared() -> None:
    example = call(1, torch.float16, m=6, n=4, causal=True)
    problem = example.problem
    reference = evaluate(problem, EnclosureArithmetic(), gauges=True)
    for asked, literal in (("zero", {0.0}), ("undefined", set())):
        budget = problem.budgets(reference, Contract(family="differential", empty_row=asked))["o"]
        assert set(budget.literal) == literal
        assert bool((budget.open[:, :, :2] == (asked == "undefined")).all())
        assert not bool(budget.open[:, :, 2:].any())
    assert float(reference["o"].value[:, :, :2].abs().max()) == 0.0


def test_nonfinite_numbers_poison_the_rows_that_see_them() -> None:
    example = call(1, torch.float32, m=3, n=3, heads=2, causal=True)
    tensors = {name: x.clone() for name, x in example.tensors.items()}
    tensors["k"][0, 0, 2, -1] = math.inf
    poisoned = DIFFERENTIAL.problem(*tensors.values(), scale=1.0, causal=True).undetermined()
    assert bool(poisoned[0, 0, 2])
    assert not bool(poisoned[0, :, :2].any())
    lam = torch.tensor([1.0, math.nan])
    problem = DIFFERENTIAL.problem(*[*example.tensors.values()][:3], lam, scale=1.0)
    assert bool(problem.undetermined()[:, 1].all())
    assert not bool(problem.undetermined()[:, 0].any())
    assert problem.nonfinite


@pytest.mark.parametrize(
    ("width", "lam", "words"),
    [
        (3, torch.ones(2), r"\(1, 2, 3, 3\).* even width"),
        (4, torch.ones(3), r"lam is torch.float32 of shape \(3,\)"),
        (4, torch.ones(2).half(), "lam is torch.float16"),
        (4, 0.5, "lam is float"),
    ],
)
def test_errors_name_the_argument(width: int, lam: Any, words: str) -> None:
    q = torch.ones(1, 2, 3, width)
    with pytest.raises(ContractError, match=words):
        DIFFERENTIAL.problem(q, q, q, lam, scale=1.0)


def test_lam_is_asked_for() -> None:
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ContractError, match="four tensors q, k, v, lam; got 3"):
        DIFFERENTIAL.problem(q, q, q, scale=1.0)
