"""The naive forms fail where theory says so, and only there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.kernels import softmax
from attnproof.kernels.examples import softmax as naive
from attnproof.kernels.examples.logsumexp import unshifted_logsumexp
from attnproof.kernels.examples.softmax_rows import division_free_softmax_rows, unshifted_softmax_rows
from attnproof.kernels.logsumexp import logsumexp
from attnproof.kernels.softmax_rows import softmax_rows
from attnproof.properties.contract import contract_of

pytestmark = pytest.mark.usefixtures("emulated")

# what they return depends on return_lse, which their types do not say
attention: Any = softmax.attention
unshifted_attention: Any = naive.unshifted_attention
three_pass_attention: Any = naive.three_pass_attention


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    s = q.double() @ k.double().mT
    if causal:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        s = s.masked_fill(j > i + k.shape[2] - q.shape[2], -math.inf)
    return torch.softmax(s, -1).nan_to_num(0.0) @ v.double()


def error(o: Tensor, want: Tensor) -> float:
    return (o.double() - want).abs().max().item()


def attention_inputs(dtype: torch.dtype, logit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Every logit near ``logit``, spread by about one."""
    q, k = torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 50, 16)
    q[..., 0], k[..., 0] = math.sqrt(abs(logit)), math.copysign(math.sqrt(abs(logit)), logit)
    q[..., 1:] = torch.randn(1, 2, 40, 15) / 4
    k[..., 1:] = torch.randn(1, 2, 50, 15)
    return q.to(dtype), k.to(dtype), torch.randn(1, 2, 50, 16).to(dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("example", [unshifted_attention, three_pass_attention])
def test_attention_examples_are_right_at_small_logits(example: Any, causal: bool) -> None:
    q, k, v = attention_inputs(torch.float32, 1.0)
    want = exact(q, k, v, causal)
    # scores below 10, 50 keys: (16 + 8)·u·10 for scores twice and 2·50·u for sums, on averages of |v| below 4
    assert error(example(q, k, v, scale=1.0, causal=causal), want) < 4 * (480 + 100) * 2**-24
    o, lse = example(q, k, v, scale=1.0, causal=causal, return_lse=True)
    assert torch.allclose(lse, attention(q, k, v, scale=1.0, causal=causal, return_lse=True)[1], atol=1e-5)
    assert not o.isnan().any()


def test_unshifted_attention_overflows_beyond_88() -> None:
    for logit, finite in [(80.0, True), (100.0, False)]:
        q, k, v = attention_inputs(torch.float32, logit)
        assert bool(unshifted_attention(q, k, v, scale=1.0).isfinite().all()) is finite
        assert error(attention(q, k, v, scale=1.0), exact(q, k, v)) < 1e-3
    q, k, v = attention_inputs(torch.float16, 20.0)  # P beyond 65504
    assert not unshifted_attention(q, k, v, scale=1.0).isfinite().all()
    q, k, v = attention_inputs(torch.float32, -120.0)  # every exp underflows
    assert error(unshifted_attention(q, k, v, scale=1.0), exact(q, k, v)) > 0.1
    assert error(attention(q, k, v, scale=1.0), exact(q, k, v)) < 1e-3


@pytest.mark.parametrize(("dtype", "logit"), [(torch.float16, 400.0), (torch.bfloat16, 60.0)], ids=str)
def test_three_pass_attention_loses_the_normaliser(dtype: torch.dtype, logit: float) -> None:
    """LSE-7: L is stored with a relative error u, so every output is off by a factor near 1 ± u·|L|."""
    q, k, v = attention_inputs(dtype, logit)
    want = exact(q, k, v)
    off, healthy = (
        error(three_pass_attention(q, k, v, scale=1.0), want),
        error(attention(q, k, v, scale=1.0), want),
    )
    assert off > 5 * healthy
    q, k, v = attention_inputs(torch.float32, logit)
    want = exact(q, k, v)
    # in float32 the same L costs u·|L|: comparable to the rounding of the scores themselves
    off, healthy = (
        error(three_pass_attention(q, k, v, scale=1.0), want),
        error(attention(q, k, v, scale=1.0), want),
    )
    assert off < 5 * max(healthy, logit * 2**-24)


def test_three_pass_rows_without_keys() -> None:
    q, k, v = attention_inputs(torch.float32, 1.0)
    o, lse = three_pass_attention(q, k[:, :, :3], v[:, :, :3], scale=1.0, causal=True, return_lse=True)
    assert not o[:, :, :37].any()
    assert (lse[:, :, :37] == -math.inf).all()


def test_unshifted_logsumexp() -> None:
    x = torch.randn(5, 300)
    assert torch.allclose(unshifted_logsumexp(x).double(), x.double().logsumexp(-1), atol=310 * 2**-24)
    assert (unshifted_logsumexp(x + 100) == math.inf).all()
    assert (unshifted_logsumexp(x - 150) == -math.inf).all()
    assert logsumexp(x + 100).isfinite().all()
    assert logsumexp(x - 150).isfinite().all()
    assert (unshifted_logsumexp(torch.full((2, 3), -math.inf)) == -math.inf).all()


def test_unshifted_softmax_rows() -> None:
    x = torch.randn(5, 300)
    want = torch.softmax(x.double(), -1)
    assert torch.allclose(unshifted_softmax_rows(x).double(), want, rtol=320 * 2**-24)
    assert unshifted_softmax_rows(x + 100).isnan().any()
    assert not unshifted_softmax_rows(x - 150).any()
    assert torch.allclose(softmax_rows(x + 100).double(), torch.softmax((x + 100).double(), -1), rtol=1e-4)


def test_division_free_softmax_rows() -> None:
    """LSE-7's counter-example: (1000, 1000) in float16 gives exp(1000 − 1000.5) = 0.6064 in place of 0.5."""
    x = torch.full((1, 2), 1000.0)
    assert division_free_softmax_rows(x.half())[0, 0].item() == pytest.approx(math.exp(-0.5), rel=2**-11)
    assert torch.equal(softmax_rows(x.half()), torch.full((1, 2), 0.5, dtype=torch.float16))
    assert division_free_softmax_rows(x)[0, 0].item() == pytest.approx(0.5, rel=2 * 1000 * 2**-24)
    small = torch.randn(4, 300)
    assert torch.allclose(
        division_free_softmax_rows(small).double(), torch.softmax(small.double(), -1), rtol=330 * 2**-24
    )
    assert not division_free_softmax_rows(torch.full((2, 3), -math.inf)).any()


def test_contracts() -> None:
    families = {
        unshifted_attention: "softmax",
        three_pass_attention: "softmax",
        unshifted_logsumexp: "logsumexp",
        unshifted_softmax_rows: "softmax_rows",
        division_free_softmax_rows: "softmax_rows",
    }
    for example, family in families.items():
        contract = contract_of(example)
        assert contract is not None
        assert contract.family == family


def test_examples_decline_what_they_do_not_support() -> None:
    wide = torch.randn(1, 1, 4, 129)
    for example in (unshifted_attention, three_pass_attention):
        with pytest.raises(NotImplementedError, match="up to 128"):
            example(wide, wide, wide, scale=1.0)
