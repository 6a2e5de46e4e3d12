"""Scaled-head attention: definition, gradients, what pooling leaves unchanged, and budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from attnproof.properties.arithmetic import ArbArithmetic
from attnproof.properties.contract import ContractError
from attnproof.properties.families.scaled_head import SCALED_HEAD
from attnproof.properties.families.softmax import SOFTMAX
from attnproof.properties.oracle import evaluate
from tests.properties.test_batch_normalised_family import (
    DTYPES,
    Call,
    Numbers,
    check_budgets,
    check_definition,
    exceeds,
    gradient_values,
    largest_difference,
    stored,
)


def transcription(tensors: Mapping[str, Any], *, scale: float, pool: tuple[int, ...]) -> Any:
    """o (B, H, M, E) as an object array, from q, k, v of mpf, by scalar loops (theory.md PD-3)."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    (batch, heads, m, width), (_, groups, n, _), value_width = q.shape, k.shape, v.shape[3]
    o = np.empty((batch, heads, m, value_width), dtype=object)
    o[...] = mpmath.mpf(0)
    for b, h, i in np.ndindex(batch, heads, m):
        g = h // (heads // groups)
        total, sums = mpmath.mpf(0), [mpmath.mpf(0)] * value_width
        start = 0
        while start < n:
            inside = range(start, min(start + pool[h], n))
            score = mpmath.mpf(0)
            for d in range(width):
                score += scale * q[b, h, i, d] * sum(k[b, g, j, d] for j in inside) / len(inside)
            weight = mpmath.exp(score)
            total += weight
            for e in range(value_width):
                sums[e] += weight * sum(v[b, g, j, e] for j in inside) / len(inside)
            start += pool[h]
        for e in range(value_width):
            o[b, h, i, e] = sums[e] / total if n else mpmath.mpf(0)
    return o


def attention(
    leaves: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    scale: float,
    pool: tuple[int, ...],
    store: bool = False,
    broken: str = "",
) -> torch.Tensor:
    """A torch kernel; ``store``: pooled keys and values in the inputs' dtype; ``broken`` names a mistake."""
    q = leaves["q"]
    k, v = (leaves[name].repeat_interleave(q.shape[1] // leaves[name].shape[1], 1) for name in "kv")

    def pooled(x: torch.Tensor, p: int) -> torch.Tensor:
        windows = x.split(p, 1)
        if broken == "full pool":
            means = [w.sum(1) / p for w in windows]
        elif broken == "tail dropped" and x.shape[1] > p:
            means = [w.mean(1) for w in windows if w.shape[1] == p]
        elif broken == "gradient not divided":
            means = [w.sum(1) - (w.sum(1) - w.mean(1)).detach() for w in windows]
        else:
            means = [w.mean(1) for w in windows]
        return stored(torch.stack(means, 1), dtype, store)

    outputs = []
    for h, p in enumerate(pool):
        weights = torch.softmax(scale * q[:, h] @ pooled(k[:, h], p).mT, -1)
        outputs.append(weights @ pooled(v[:, h], p))
    return torch.stack(outputs, 1)


def call(seed: int, dtype: torch.dtype, *, small: bool = False, **given: Any) -> Call:
    """A random call with a pool of its own for each head."""
    x = Numbers(seed)
    groups, batch = x.integer(1, 2), x.integer(1, 2)
    heads = groups * x.integer(1, 2 if small else 3)
    m, n = (x.integer(1, 2), x.integer(1, 7)) if small else (x.integer(1, 30), x.integer(2, 90))
    width, value_width = (x.integer(1, 2), x.integer(1, 3)) if small else (x.integer(1, 20), x.integer(1, 12))
    m, n = given.get("m", m), given.get("n", n)
    pool = tuple(x.integer(1, 4 if small else 9) for _ in range(heads))
    if "pool" in given:
        pool = (given["pool"],) * heads
    common = 3.0 * x.normal(1, 1, 1, width) * x.integer(0, 1)
    tensors = {
        "q": x.normal(batch, heads, m, width),
        "k": x.normal(batch, groups, n, width) + common,
        "v": x.normal(batch, groups, n, value_width),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    options = {"scale": width**-0.5, "pool": pool}
    return Call(SCALED_HEAD, tensors, options, x.normal(batch, heads, m, value_width).to(dtype))


@pytest.mark.parametrize("seed", range(8))
def test_definition_and_gradients_agree_with_the_transcription(seed: int) -> None:
    check_definition(call(seed, DTYPES[seed % 3], small=True), transcription)


@pytest.mark.parametrize(("m", "n", "pool"), [(2, 0, 2), (2, 1, 3), (0, 3, 2), (2, 5, 10**9)])
def test_degenerate_sizes(m: int, n: int, pool: int) -> None:
    example = call(1, torch.float32, small=True, m=m, n=n, pool=pool)
    check_definition(example, transcription)
    if n:
        assert not exceeds([example], attention)


@pytest.mark.parametrize(
    ("dtype", "store"),
    [
        (torch.float32, False),
        (torch.float16, False),
        (torch.float16, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ],
)
def test_healthy_kernels_are_within_budget(dtype: torch.dtype, store: bool) -> None:
    check_budgets([call(seed, dtype) for seed in range(5)], attention, store=store)


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        ("full pool", {"o", "dq", "dk", "dv"}),
        ("tail dropped", {"o", "dk", "dv"}),
        ("gradient not divided", {"dk", "dv"}),
    ],
)
def test_broken_kernels_exceed_the_budget(broken: str, caught: set[str]) -> None:
    for dtype in DTYPES:
        calls = [call(1, dtype, m=8, n=22, pool=4)]
        assert not exceeds(calls, attention, store=True)
        assert caught <= exceeds(calls, attention, store=True, broken=broken)


def test_a_pool_of_one_is_softmax() -> None:
    example = call(5, torch.float32, pool=1, n=11)
    plain = SOFTMAX.problem(*example.tensors.values(), scale=example.options["scale"])
    assert largest_difference(example.problem, plain) < 1e-40
    do = {"o": example.cotangent}
    for name, found in gradient_values(example.problem, do).items():
        assert torch.equal(found.value, gradient_values(plain, do)[name].value)


def test_keys_and_values_that_are_constant_on_windows_are_as_good_as_one_each() -> None:
    x = Numbers(1)
    q, k, v = (x.normal(2, heads, n, 3) for heads, n in ((4, 3), (2, 5), (2, 5)))
    k, v = (y.repeat_interleave(6, 2) for y in (k, v))
    plain = SOFTMAX.problem(q, k, v, scale=0.8)
    for pool in ((1, 2, 3, 6), (6, 6, 6, 6)):
        assert largest_difference(SCALED_HEAD.problem(q, k, v, scale=0.8, pool=pool), plain) < 1e-40
    ragged = SCALED_HEAD.problem(q, k, v, scale=0.8, pool=(4, 4, 4, 4))
    assert largest_difference(ragged, plain) > 1e-3


def test_parts_keep_all_positions() -> None:
    problem = call(4, torch.float32, small=True, n=7).problem
    whole = evaluate(problem, ArbArithmetic(128))["o"].value.flatten(0, 2)
    seen = 0
    for part, index in problem.split(torch.ones(problem.row_shape, dtype=torch.bool)):
        assert torch.equal(evaluate(part, ArbArithmetic(128))["o"].value.flatten(0, 2), whole[index])
        seen += len(index)
    assert seen == len(whole)


def test_a_row_is_explained_by_its_windows() -> None:
    q, k = torch.ones(1, 2, 1, 1), torch.tensor([1.0, 1.0, 9.0, 9.0, 2.0]).reshape(1, 1, 5, 1)
    problem = SCALED_HEAD.problem(q, k, k, scale=1.0, pool=(1, 2))
    told = problem.explain_row("o", (0, 1, 0))
    assert told.startswith("row (batch 0, head 1, query 0) sees 3 of 3 keys")
    assert "key 1 (p = 0.999)" in told
    assert told.endswith("the mean of a window of 2 positions")


@pytest.mark.parametrize("pool", [None, 2, (2,), (0, 1), (1, 2.0), (True, 1), (1, 1, 1)])
def test_errors_name_the_pool(pool: Any) -> None:
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ContractError, match=r"pool=.* a tuple of 2 ints ≥ 1"):
        SCALED_HEAD.problem(q, q, q, scale=1.0, pool=pool)
