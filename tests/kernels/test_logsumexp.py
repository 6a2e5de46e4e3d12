"""Log-sum-exp over rows against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnproof.kernels.logsumexp import COLUMNS, logsumexp
from attnproof.properties.contract import ContractError, contract_of

pytestmark = pytest.mark.usefixtures("emulated")

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_exact(x: Tensor) -> None:
    """Within the rounding of the result, of the sum of N terms, and of exp and its argument (HW-2)."""
    want = x.double().logsumexp(-1)
    y = logsumexp(x)
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    empty = want == -math.inf
    assert torch.equal(y == -math.inf, empty)
    # terms more than 20 below the maximum weigh e^-20: the argument's rounding counts for 20 units at most
    u32 = 2.0**-24
    tolerance = (ROUNDOFF[x.dtype] + 3 * u32) * want.abs() + (x.shape[-1] + 2 * 20 + 8) * u32
    assert ((y.double() - want).abs() <= tolerance)[~empty].all()


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1,), (7,), (1, 1), (3, 5), (5, 2), (2, 2, 0), (0, 5),
        (2, 3, COLUMNS - 1), (4, COLUMNS), (6, COLUMNS + 1), (3, 4 * COLUMNS + 13),
    ],
)  # fmt: skip
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if shape[-1]:
        assert_exact((3 * torch.randn(shape)).to(dtype))
    else:
        assert torch.equal(
            logsumexp(torch.empty(shape, dtype=dtype)), torch.full(shape[:-1], -math.inf, dtype=dtype)
        )


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_masked_entries(dtype: torch.dtype) -> None:
    x = torch.randn(8, 3 * COLUMNS).to(dtype)
    x[0] = -math.inf
    x[1, :-1] = -math.inf
    x[2, 1:] = -math.inf
    x[3, : 2 * COLUMNS] = -math.inf
    x[4, ::2] = -math.inf
    assert_exact(x)


@pytest.mark.parametrize("level", [1e4, -1e4, 3e38, -3e38])
def test_no_level_overflows(level: float) -> None:
    assert_exact(torch.full((3, 40), level) + torch.randn(3, 40))
    x = torch.randn(3, 40)
    x[:, 7] = level
    x[:, 9] = -level
    assert_exact(x)


def test_strides() -> None:
    assert_exact(torch.randn(300, 6).mT)
    assert_exact(torch.randn(5, 600)[:, ::2])
    assert_exact(torch.randn(1, 9).expand(4, 9))
    assert_exact(torch.randn(4, 1).expand(4, 300))
    assert_exact(torch.randn(3, 4, 5, 7).permute(2, 0, 3, 1))


def test_memory_beyond_the_row_does_not_leak() -> None:
    x = torch.full((6, 300), math.nan)
    x[:, :270].normal_()
    assert_exact(x[:, :270])


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 10)
    x[2, 3] = math.nan
    y = logsumexp(x)
    assert torch.equal(y[[0, 1, 3]], logsumexp(x[[0, 1, 3]]))
    assert y[2].isnan()


def test_contract_and_errors() -> None:
    contract = contract_of(logsumexp)
    assert contract is not None
    assert contract.family == "logsumexp"
    with pytest.raises(ContractError, match="x is a scalar"):
        logsumexp(torch.tensor(1.0))
    with pytest.raises(ContractError, match=r"logsumexp: x has dtype torch\.int64"):
        logsumexp(torch.tensor([1]))
    with pytest.raises(NotImplementedError, match="float64"):
        logsumexp(torch.randn(3, dtype=torch.float64))
