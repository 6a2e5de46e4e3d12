"""The arithmetic of budgets: real float32 and half-precision computations err by no more than it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.budgets.propagation import Estimate, Propagation, coincidence
from attnproof.properties.budgets.rounding import Roundings
from attnproof.properties.contract import Contract

Formula = Callable[[Propagation, Estimate, Estimate], Estimate]
Computed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FORMULAS: dict[str, tuple[Formula, Computed]] = {
    "matmul": (lambda a, x, y: a.matmul(x, a.transpose(y)), lambda x, y: x @ y.mT),
    "two products": (
        lambda a, x, y: a.matmul(a.matmul(x, a.transpose(y)), y),
        lambda x, y: (x @ y.mT) @ y,
    ),
    "difference of products": (
        lambda a, x, y: a.sub(a.mul(x, y), a.mul(x, x)),
        lambda x, y: x * y - x * x,
    ),
    "quotient": (
        lambda a, x, y: a.div(a.exp(x), a.sum(a.exp(x))),
        lambda x, y: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
    ),
    "sigmoid": (
        lambda a, x, y: a.sigmoid(a.scaled(a.matmul(x, a.transpose(y)), 3.0)),
        lambda x, y: torch.sigmoid(x @ y.mT * 3.0),
    ),
    "slope": (
        lambda a, x, y: a.sigmoid_slope(a.matmul(x, a.transpose(y))),
        lambda x, y: torch.sigmoid(x @ y.mT) * (1.0 - torch.sigmoid(x @ y.mT)),
    ),
    "tanh": (lambda a, x, y: a.tanh(a.mul(x, y)), lambda x, y: torch.tanh(x * y)),
    "relu": (lambda a, x, y: a.relu(a.matmul(x, a.transpose(y))), lambda x, y: torch.relu(x @ y.mT)),
    "root": (
        lambda a, x, y: a.sqrt(a.add(a.mul(x, x), a.mul(y, y))),
        lambda x, y: torch.sqrt(x * x + y * y),
    ),
    "logarithm": (
        lambda a, x, y: a.log(a.sum(a.exp(x))),
        lambda x, y: torch.log(torch.exp(x).sum(-1, keepdim=True)),
    ),
}


def operands(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, 65, 40, generator=generator) * 2.0,
        torch.randn(3, 65, 40, generator=generator) + 0.5,
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_float32_errs_by_less_than_the_certain_and_about_the_probable_error(name: str) -> None:
    formula, computed = FORMULAS[name]
    a = Propagation(Roundings.of(Contract("softmax"), "float32"))
    squares, count = 0.0, 0
    for seed in range(4):
        x, y = operands(seed)
        estimate = formula(a, a.exact(x), a.exact(y))
        exact = EnclosureArithmetic()
        value = exact.enclosure(formula(exact, exact.exact(x), exact.exact(y))).value  # type: ignore[arg-type]
        error = (computed(x, y).double() - value).abs()
        assert bool((error <= estimate.bound).all())
        ratio = error / estimate.spread.sqrt().clamp(min=1e-300)
        squares, count = squares + float(ratio.square().sum()), count + ratio.numel()
    assert 0.05 < (squares / count) ** 0.5 < 1.6


def test_a_storage_in_half_precision_is_one_rounding() -> None:
    a = Propagation(Roundings.of(Contract("softmax"), "bfloat16"))
    x, _ = operands(1)
    estimate = a.store(a.mul(a.exact(x), a.exact(x)), "probabilities")
    error = ((x * x).bfloat16().double() - x.double().square()).abs()
    assert bool((error <= estimate.bound).all())
    assert float((error / estimate.bound).max()) > 0.9


def test_what_is_masked_or_zero_has_no_error() -> None:
    a = Propagation(Roundings.of(Contract("softmax"), "float16"))
    x, y = operands(2)
    keep = torch.zeros(65, 65, dtype=torch.bool)
    masked = a.masked(a.exp(a.matmul(a.exact(x), a.transpose(a.exact(y)))), keep)
    product = a.store(a.matmul(masked, a.exact(y)), "output")
    assert float(product.bound.abs().max()) == 0.0
    assert float(product.value.abs().max()) == 0.0


def test_overflow_marks_all_that_comes_from_it() -> None:
    a = Propagation(Roundings.of(Contract("softmax"), "float16"))
    x = torch.tensor([[1.0, 400.0], [1.0, 1.0]])
    stored = a.store(a.mul(a.exact(x), a.exact(x)), "dscores")
    assert stored.lost is not None
    assert stored.lost.tolist() == [[False, True], [False, False]]
    product = a.matmul(stored, a.exact(torch.zeros(2, 3)))
    assert product.lost is not None
    assert product.lost.tolist() == [[True] * 3, [False] * 3]


def test_a_step_is_open_only_where_the_sign_is_in_doubt() -> None:
    a = Propagation(Roundings.of(Contract("relu"), "float32"))
    q = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    k = torch.tensor([[1.0, -1.0], [1.0, 1.0], [0.0, 1.0]])
    steps = a.step(a.matmul(a.exact(q), a.transpose(a.exact(k))))
    assert steps.value.tolist() == [[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    assert steps.bound.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_coincidence_is_the_share_of_others_that_agree() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 4.0, 8.0], [1.0, 1.0, -1.0, 5.0]], dtype=torch.float64)
    found = coincidence(x, 2.0**-8).flatten()
    assert found[0] == pytest.approx(0.75)
    assert found[1] == pytest.approx(0.0)
    assert found[2] == pytest.approx(3 * (1 / 8) * (2 / 8))
