"""Attention on batch-normalised queries and keys: definition, gradients, invariances and budgets.

The transcription below is the formula of Nguyen et al. 2023 as scalar loops; kernels are torch in float32,
rounded once at the end, and as far as said where they store q' and k'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic, EnclosureArithmetic, MpmathArithmetic
from attnproof.properties.budgets.base import Budget
from attnproof.properties.contract import Contract, ContractError
from attnproof.properties.families.base import Family, Problem
from attnproof.properties.families.batch_normalised import BATCH_NORMALISED
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.softmax import SOFTMAX
from attnproof.properties.oracle import evaluate
from tests.properties.arithmetic.containment import enclosure_contains
from tests.properties.naive_gradients import central_differences

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Tensors = Mapping[str, Any]
Kernel = Callable[..., torch.Tensor]
# Of numbers of order 1: the transcriptions at 60 digits, and their numerical derivatives.
OWN_ERROR, OWN_DERIVATIVE_ERROR = 1e-40, 1e-25


@dataclass(frozen=True)
class Call:
    """A call of a family: its positional tensors and keywords by name, and a cotangent of o."""

    family: Family
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    cotangent: torch.Tensor

    @property
    def problem(self) -> Problem:
        return self.family.problem(*self.tensors.values(), **self.options)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Every tensor that has a gradient, those passed by keyword included."""
        keywords = {name: x for name, x in self.options.items() if isinstance(x, torch.Tensor)}
        return {**self.tensors, **keywords}

    @property
    def constants(self) -> dict[str, Any]:
        return {name: x for name, x in self.options.items() if not isinstance(x, torch.Tensor)}


class Numbers:
    """A stream of random numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def check_definition(call: Call, transcription: Callable[..., Any]) -> None:
    """Outputs and gradients in every arithmetic contain the transcription's, and are accurate."""
    tensors = {name: x.double().numpy().astype(object) for name, x in call.parameters.items()}
    for name, x in tensors.items():
        tensors[name] = np.array([mpmath.mpf(v) for v in x.ravel()], dtype=object).reshape(x.shape)
    cotangent = call.cotangent.double().numpy()

    def loss(moved: Tensors) -> Any:
        o = transcription(moved, **call.constants)
        pairs = zip(o.ravel(), cotangent.ravel(), strict=True)
        return mpmath.fsum(x * mpmath.mpf(float(c)) for x, c in pairs)

    with mpmath.workdps(60):
        exact = transcription(tensors, **call.constants)
    gradients = central_differences(loss, tensors)
    for arithmetic in (EnclosureArithmetic(), ArbArithmetic(128), MpmathArithmetic(50)):
        # Division by a small s leaves float64 enclosures fewer digits.
        accuracy = 1e-6 if isinstance(arithmetic, EnclosureArithmetic) else 1e-12
        found = evaluate(call.problem, arithmetic)
        assert bool(enclosure_contains(found["o"], exact, OWN_ERROR).all())
        assert float(found["o"].radius.max() if exact.size else 0.0) < accuracy
        problem = GradientProblem(call.problem, found, {"o": call.cotangent})
        assert set(problem.outputs) == {f"d{name}" for name in tensors}
        for name, enclosure in evaluate(problem, arithmetic).items():
            numbers = gradients[name.removeprefix("d")]
            assert enclosure.value.shape == numbers.shape, name
            assert bool(enclosure_contains(enclosure, numbers, OWN_DERIVATIVE_ERROR).all()), name
            assert float(enclosure.radius.max() if numbers.size else 0.0) < accuracy, name


def judged(call: Call, kernel: Kernel, **variant: Any) -> Iterator[tuple[str, torch.Tensor, Budget]]:
    """(name, error, budget) of o and of every gradient of a torch kernel with float32 leaves.

    Errors are 0 where the budget is open.
    """
    leaves = {name: x.float().clone().requires_grad_() for name, x in call.parameters.items()}
    dtype = call.tensors["q"].dtype
    o = kernel(leaves, dtype, **call.constants, **variant)
    (o * call.cotangent.float()).sum().backward()
    got = {"o": o.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}
    contract = Contract(family=call.family.name)
    problem = call.problem
    reference = evaluate(problem, EnclosureArithmetic(), gauges=True)
    gradients = GradientProblem(problem, reference, {"o": call.cotangent})
    references = {**reference, **evaluate(gradients, EnclosureArithmetic())}
    budgets = {**problem.budgets(reference, contract), **gradients.budgets(references, contract)}
    for name, budget in budgets.items():
        assert got[name] is not None
        error = (got[name].to(dtype).double() - references[name].value).abs() - references[name].radius
        assert not bool((budget.certain.isnan() | budget.probable.isnan()).any())
        yield name, torch.where(budget.open, 0.0, error.clamp(min=0.0)), budget


def check_budgets(calls: list[Call], kernel: Kernel, **variant: Any) -> None:
    """All errors are within ``certain``, and of the order of ``probable``."""
    squares: dict[str, list[torch.Tensor]] = {}
    for call in calls:
        for name, error, budget in judged(call, kernel, **variant):
            worst = (error / budget.certain.clamp(min=1e-300)).max() if error.numel() else 0.0
            assert float(worst) <= 1.0, (name, float(worst), call)
            ratio = (error / budget.probable.clamp(min=1e-300))[~budget.open & (error < math.inf)]
            squares.setdefault(name, []).append(ratio.flatten())
    for name, parts in squares.items():
        ratios = torch.cat(parts)
        rms = float(ratios.square().mean().sqrt())
        assert rms < 1.3, (name, rms)
        # The few numbers of a gradient with one element a head may all come out well.
        assert rms > 0.1 or len(ratios) < 100, (name, rms)


def exceeds(calls: list[Call], kernel: Kernel, **variant: Any) -> set[str]:
    """The outputs in which some error is above ``certain``."""
    return {
        name
        for call in calls
        for name, error, budget in judged(call, kernel, **variant)
        if bool((error > budget.certain).any())
    }


def largest_difference(first: Problem, second: Problem) -> float:
    """A bound on |o − o'| of two problems, by balls of 256 bits."""
    a = ArbArithmetic(256)
    difference = a.enclosure(a.sub(first.evaluate(a)["o"], second.evaluate(a)["o"]))
    return float((difference.value.abs() + difference.radius).max())


def stored(x: torch.Tensor, dtype: torch.dtype, store: bool) -> torch.Tensor:
    """x as it comes back from memory; its gradient is stored alike."""
    return x.to(dtype).float() if store else x


def transcription(tensors: Tensors, *, scale: float, eps: float, variance: bool = True) -> Any:
    """o (B, H, M, E) as an object array; tensors q, k, v and beta (or none) of mpf."""
    q, k, v, beta = tensors["q"], tensors["k"], tensors["v"], tensors.get("beta")
    (batch, heads, m, width), (_, groups, n, _), value_width = q.shape, k.shape, v.shape[3]
    o = np.empty((batch, heads, m, value_width), dtype=object)
    o[...] = mpmath.mpf(0)
    if not n:
        return o
    for b, h, i in np.ndindex(batch, heads, m):
        g = h // (heads // groups)
        weight = mpmath.mpf(1) if beta is None else beta[h]
        scores = [mpmath.mpf(0)] * n
        for d in range(width):
            mean = sum(k[b, g, j, d] for j in range(n)) / n
            spread = mpmath.mpf(1)
            if variance:
                spread = mpmath.sqrt(sum((k[b, g, j, d] - mean) ** 2 for j in range(n)) / n + eps)
            for j in range(n):
                normal = (q[b, h, i, d] - weight * mean) / spread * ((k[b, g, j, d] - weight * mean) / spread)
                scores[j] += scale * normal
        total = sum(mpmath.exp(s) for s in scores)
        for e in range(value_width):
            o[b, h, i, e] = sum(mpmath.exp(s) * v[b, g, j, e] for j, s in enumerate(scores)) / total
    return o


def attention(
    leaves: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    scale: float,
    eps: float,
    variance: bool = True,
    store: bool = False,
    whole: bool = False,
    broken: str = "",
) -> torch.Tensor:
    """A torch kernel; ``whole`` centres keys whatever beta is, ``broken`` names a mistake."""
    q, k, v, beta = leaves["q"], leaves["k"], leaves["v"], leaves.get("beta")
    group = q.shape[1] // k.shape[1]
    mean = k.mean(2, keepdim=True)
    if broken == "no mean path":
        mean = mean.detach()
    square = (k - mean).square().mean(2, keepdim=True)
    if broken == "raw moments":
        square = (k.square().mean(2, keepdim=True) - mean.square()).clamp(min=0.0)
    if broken == "unbiased":
        square = square * (k.shape[2] / (k.shape[2] - 1))
    if broken == "no variance path":
        square = square.detach()
    s = square.sqrt() + eps if broken == "eps outside" else (square + eps).sqrt()
    s = s if variance else torch.ones_like(s)
    mean, s, k, v = (x.repeat_interleave(group, 1) for x in (mean, s, k, v))
    shift = mean if beta is None else beta.reshape(1, -1, 1, 1) * mean
    if broken == "keys only":
        q = q + shift
    queries = stored((q - shift) / s, dtype, store)
    keys = stored((k - (mean if whole else shift)) / s, dtype, store)
    return torch.softmax(scale * queries @ keys.mT, -1) @ v


def call(seed: int, dtype: torch.dtype, *, small: bool = False, offset: float = 0.0, **given: Any) -> Call:
    """A random call; ``offset`` is the size of what all queries and keys have in common."""
    x = Numbers(seed)
    groups, batch = x.integer(1, 2), x.integer(1, 2)
    heads = groups * x.integer(1, 2 if small else 3)
    m, n = (x.integer(1, 2), x.integer(1, 4)) if small else (x.integer(1, 30), x.integer(2, 90))
    width, value_width = (x.integer(1, 2), x.integer(1, 3)) if small else (x.integer(1, 20), x.integer(1, 12))
    m, n = given.pop("m", m), given.pop("n", n)
    common = offset * x.normal(1, 1, 1, width)
    options = {"scale": width**-0.5, "eps": (2.0**-10, 1e-5, 0.5)[x.integer(0, 2)]}
    if x.integer(0, 1):
        options["beta"] = (1.0 + 0.5 * x.normal(heads)).to(dtype)
    if x.integer(0, 2) == 0:
        options["variance"] = False
    options |= given
    tensors = {
        "q": x.normal(batch, heads, m, width) + common,
        "k": x.normal(batch, groups, n, width) + common,
        "v": x.normal(batch, groups, n, value_width) + (3.0 if x.integer(0, 3) == 0 else 0.0),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    options = {name: option for name, option in options.items() if option is not None}
    return Call(BATCH_NORMALISED, tensors, options, x.normal(batch, heads, m, value_width).to(dtype))


@pytest.mark.parametrize("seed", range(8))
def test_definition_and_gradients_agree_with_the_transcription(seed: int) -> None:
    check_definition(call(seed, DTYPES[seed % 3], small=True, offset=3.0 * (seed % 2)), transcription)


@pytest.mark.parametrize(("m", "n"), [(2, 0), (2, 1), (0, 3)])
def test_degenerate_sizes(m: int, n: int) -> None:
    for seed in range(2):
        example = call(seed, torch.float32, small=True, m=m, n=n)
        check_definition(example, transcription)
        if n:
            assert not exceeds([example], attention)


@pytest.mark.parametrize(
    ("dtype", "store", "whole"),
    [
        (torch.float32, False, False),
        (torch.float32, False, True),
        (torch.float16, False, False),
        (torch.float16, True, True),
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),
    ],
)
def test_healthy_kernels_are_within_budget(dtype: torch.dtype, store: bool, whole: bool) -> None:
    calls = [call(seed, dtype) for seed in range(5)]
    check_budgets(calls, attention, store=store, whole=whole)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1e4), (torch.float16, 200.0)])
def test_healthy_kernels_are_within_budget_at_a_large_offset(dtype: torch.dtype, offset: float) -> None:
    for seed in range(4):
        assert not exceeds([call(seed, dtype, offset=offset)], attention, store=True, whole=bool(seed % 2))


@pytest.mark.parametrize(
    ("broken", "caught", "offset"),
    [
        ("raw moments", {"o"}, 1e4),
        ("unbiased", {"o"}, 0.0),
        ("eps outside", {"o"}, 0.0),
        ("keys only", {"o"}, 3.0),
        ("no mean path", {"dk"}, 3.0),
        ("no variance path", {"dk"}, 0.0),
    ],
)
def test_broken_kernels_exceed_the_budget(broken: str, caught: set[str], offset: float) -> None:
    given = {"n": 24, "eps": 2.0**-6, "variance": True, "beta": None}
    calls = [call(seed, torch.float32, offset=offset, **given) for seed in range(2)]
    assert not exceeds(calls, attention)
    assert caught <= exceeds(calls, attention, broken=broken)


def test_centring_keys_alone_changes_nothing() -> None:
    example = call(1, torch.float32, small=True, n=4, beta=torch.tensor([0.3, -1.5]), variance=True)
    example = replace(
        example, tensors={**example.tensors, "q": example.tensors["q"][:, :1].repeat(1, 2, 1, 1)}
    )
    problem = BATCH_NORMALISED.problem(
        example.tensors["q"], example.tensors["k"][:, :1], example.tensors["v"][:, :1], **example.options
    )
    assert largest_difference(problem, replace(problem, centred=True)) < 1e-40
    k = (example.tensors["k"].double() * 64).round() / 64
    q, v = example.tensors["q"].double(), example.tensors["v"].double()
    moved = k - torch.tensor(2.375, dtype=torch.float64)
    plain, centred = (SOFTMAX.problem(q, keys[:, :1], v[:, :1], scale=0.7) for keys in (k, moved))
    assert largest_difference(plain, centred) < 1e-40


def test_a_common_shift_changes_nothing_unlike_in_softmax() -> None:
    x = Numbers(3)
    q, k, v = ((x.normal(1, 2, n, 3) * 64).round() / 64 for n in (3, 5, 5))
    c = torch.tensor([1.5, -2.25, 100.0], dtype=torch.float64)
    for variance in (True, False):
        options = {"scale": 0.5, "eps": 1e-3, "variance": variance}
        before, after = (BATCH_NORMALISED.problem(q + d, k + d, v, **options) for d in (0.0 * c, c))
        assert largest_difference(before, after) < 1e-40
        do = {"o": x.normal(1, 2, 3, 3)}
        found = {name: y.value for name, y in gradient_values(before, do).items()}
        # Hence the gradients of the two sum to 0, key by value head.
        assert float((found["dq"].sum(2) + found["dk"].sum(2)).abs().max()) < 1e-13
        assert float(found["dk"].abs().max()) > 1e-3
    first, second = (SOFTMAX.problem(q + d, k + d, v, scale=0.5) for d in (0.0 * c, c))
    assert largest_difference(first, second) > 0.1


def gradient_values(problem: Problem, cotangents: dict[str, torch.Tensor]) -> dict[str, Any]:
    a = ArbArithmetic(128)
    return evaluate(GradientProblem(problem, evaluate(problem, a), cotangents), a)


def test_without_variance_it_is_softmax_with_a_key_bias() -> None:
    x = Numbers(4)
    q, k, v = ((x.normal(2, heads, n, 3) * 64).round() / 64 for heads, n in ((4, 3), (2, 8), (2, 8)))
    # N is a power of two and all numbers are multiples of 2⁻⁶, so that the bias is exact.
    bias = -0.5 * (k.mean(2, keepdim=True) * k).sum(-1).repeat_interleave(2, 1).unsqueeze(2)
    problem = BATCH_NORMALISED.problem(q, k, v, scale=0.5, eps=1.0, variance=False)
    assert largest_difference(problem, SOFTMAX.problem(q, k, v, scale=0.5, bias=bias)) < 1e-40
    assert largest_difference(problem, SOFTMAX.problem(q, k, v, scale=0.5)) > 1e-3


def test_parts_keep_all_keys() -> None:
    example = call(2, torch.float32, small=True, n=4)
    problem = example.problem
    whole = evaluate(problem, ArbArithmetic(128), gauges=True)["o"].value.flatten(0, 2)
    rows = torch.ones(problem.row_shape, dtype=torch.bool)
    rows[0, 0, 0] = False
    count = 0
    for part, index in problem.split(rows):
        found = evaluate(part, ArbArithmetic(128))["o"]
        assert torch.equal(found.value.flatten(0, 2), whole[index])
        count += len(index)
    assert count == int(rows.sum())


def test_what_overflows_its_storage_is_open() -> None:
    q = torch.full((1, 1, 2, 1), 300.0, dtype=torch.float16)
    k = torch.zeros(1, 1, 3, 1, dtype=torch.float16)
    v = torch.tensor([[[[1.0], [2.0], [4.0]]]], dtype=torch.float16)
    problem = BATCH_NORMALISED.problem(q, k, v, scale=1.0, eps=1e-5)
    reference = evaluate(problem, EnclosureArithmetic(), gauges=True)
    budget = problem.budgets(reference, Contract(family="batch_normalised"))["o"]
    # (300 − 0)/√1e-5 = 94868 is beyond float16.
    assert bool(budget.open.all())
    assert budget.reasons == {"an intermediate may overflow": 2}


def test_nonfinite_numbers_poison_the_rows_that_see_them() -> None:
    example = call(1, torch.float32, small=True, m=2, n=3)
    q, k, v = (x.clone() for x in example.tensors.values())
    q[0, 0, 1, 0] = math.nan
    problem = BATCH_NORMALISED.problem(q, k, v, scale=1.0, eps=0.1)
    assert problem.undetermined().nonzero().tolist() == [[0, 0, 1]]
    beta = torch.ones(q.shape[1])
    beta[-1] = math.inf
    problem = BATCH_NORMALISED.problem(*example.tensors.values(), scale=1.0, eps=0.1, beta=beta)
    assert bool(problem.undetermined()[:, -1].all())
    assert problem.nonfinite


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": None}, "needs eps"),
        ({"eps": math.nan}, "eps=nan"),
        ({"variance": 1}, "variance=1"),
        ({"beta": torch.ones(3)}, r"beta is torch.float32 of shape \(3,\)"),
        ({"beta": torch.ones(2, dtype=torch.float16)}, "beta is torch.float16"),
        ({"beta": 1.0}, "beta is float"),
        ({"causal": True}, "no option 'causal'"),
    ],
)
def test_errors_name_the_argument(changed: dict[str, Any], words: str) -> None:
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ContractError, match=words):
        BATCH_NORMALISED.problem(q, q, q, **{"scale": 1.0, "eps": 0.1, **changed})
