"""The torch flash attention is right: it passes the suite's plans, and keeps the edges of the contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attnproof
from attnproof import healthy_flash
from attnproof.properties.case import Case, make_inputs
from attnproof.properties.contract import Contract, ContractError, contract_of
from attnproof.properties.families import family_of

TARGET = "attnproof.healthy_flash:tiled_attention"

# What it returns depends on return_lse, which its type does not say.
tiled_attention: Any = healthy_flash.tiled_attention


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(m: int, n: int, *, batch: int = 1, heads: int = 2, groups: int = 1) -> list[torch.Tensor]:
    return [
        drawn(batch, heads, m, 16, seed=1),
        drawn(batch, groups, n, 16, seed=2),
        drawn(batch, groups, n, 8, seed=3),
    ]


@pytest.mark.parametrize("seed", [11, 13])
def test_it_passes_a_plan_of_every_regime_dtype_option_and_view(seed: int) -> None:
    result = attnproof.verify(TARGET, "softmax", device="cpu", examples=150, seed=seed, jobs=1)
    assert result.verdict == "PASS", result
    assert len(result.results) == 150


def test_it_promises_more_than_the_defaults() -> None:
    contract = contract_of(tiled_attention)
    assert contract is not None
    assert {*contract.options, "alibi_slopes"} == set(family_of("softmax").options)
    assert contract.precision.matmul_input == "ieee"
    loosest = Contract(
        "softmax", options=contract.options, precision=contract.precision, differentiable=False
    )
    assert contract == loosest, "every other declaration is the contract's strictest"


@pytest.mark.parametrize(
    "text",
    [
        # Several tiles of queries and keys, with every option that decides which of them meet.
        "softmax:float32:normal:B2,H4,G2,M129,N193,D16,E8:causal,window=70..3,return_lse:columns:1",
        "softmax:float16:normal:B1,H7,G1,M130,N65,D40,E16:window=..66,sinks,return_lse:sliced:2",
        "softmax:bfloat16:masked:B1,H2,G2,M65,N129,D5,E1:causal,softcap=2.0,bias=bhmn:unaligned:3",
        "softmax:float32:ascending:B1,H2,G1,M3,N1000,D64,E64:return_lse:contiguous:4",
        "softmax:float16:normal:B1,H2,G1,M200,N200,D16,E8:causal,bias=11mn,cu_seqlens=70+0+130:contiguous:5",
        "softmax:float16:unseen-nonfinite:B1,H2,G1,M129,N65,D16,E8:causal,return_lse:contiguous:6",
    ],
)
def test_it_stays_within_the_budgets_where_tiles_meet(text: str) -> None:
    result = attnproof.check(TARGET, text, device="cpu")
    assert result.verdict == "PASS", result


@pytest.mark.parametrize(("batch", "m", "n"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_sizes(batch: int, m: int, n: int) -> None:
    o, lse = tiled_attention(*inputs(m, n, batch=batch), scale=0.25, causal=True, return_lse=True)
    assert o.shape == (batch, 2, m, 8)
    assert lse.shape == (batch, 2, m)
    assert bool((o == 0).all()), "with no keys every output is 0"
    assert bool((lse == -math.inf).all())


def test_rows_without_keys_are_zero_and_leave_the_others_alone() -> None:
    q, k, v = inputs(70, 5)
    o, lse = tiled_attention(q, k, v, scale=0.25, causal=True, return_lse=True)
    assert bool((o[:, :, :65] == 0).all())
    assert bool((lse[:, :, :65] == -math.inf).all())
    alone = tiled_attention(q[:, :, 65:], k, v, scale=0.25, causal=True)
    torch.testing.assert_close(o[:, :, 65:], alone)


def test_values_that_are_not_finite_reach_only_the_rows_that_see_them() -> None:
    q, k, v = inputs(67, 67)
    clean = tiled_attention(q, k, v, scale=0.25, causal=True)
    v[0, 0, 65, 3], v[0, 0, 66, 5], k[0, 0, 66] = math.nan, math.inf, math.nan
    o = tiled_attention(q, k, v, scale=0.25, causal=True)
    assert torch.equal(o[:, :, :65], clean[:, :, :65])
    assert bool(o[:, :, 65:].isnan().all())


def test_an_absent_sink_changes_nothing() -> None:
    q, k, v = inputs(3, 70)
    o, lse = tiled_attention(q, k, v, scale=0.25, return_lse=True)
    sinks = torch.tensor([-math.inf, 1.0])
    with_sinks, lse_with = tiled_attention(q, k, v, scale=0.25, sinks=sinks, return_lse=True)
    assert torch.equal(o[:, 0], with_sinks[:, 0])
    torch.testing.assert_close(lse_with[:, 1], torch.logaddexp(lse[:, 1], sinks[1]))


def test_packed_sequences_are_those_that_stand_alone() -> None:
    q, k, v = inputs(80, 80, heads=4, groups=2)
    ends = torch.tensor([0, 7, 7, 80], dtype=torch.int32)
    o, lse = tiled_attention(q, k, v, scale=0.25, causal=True, cu_seqlens=ends, return_lse=True)
    for start, stop in ((0, 7), (7, 80)):
        part = [x[:, :, start:stop] for x in (q, k, v)]
        alone, lse_alone = tiled_attention(*part, scale=0.25, causal=True, return_lse=True)
        torch.testing.assert_close(o[:, :, start:stop], alone)
        torch.testing.assert_close(lse[:, :, start:stop], lse_alone)


def test_the_largest_weight_is_exactly_one() -> None:
    case = Case.parse("softmax:bfloat16:identical-huge:B1,H1,G1,M3,N4,D40,E8:-:contiguous:1")
    made = make_inputs(case)
    o = tiled_attention(*made.tensors.values(), **made.options)
    mean = made.tensors["v"].double().mean(2, keepdim=True).expand(o.shape)
    assert torch.equal(o.double(), mean), "scores of 1e11 are tied, and 4 values of 2^17 have an exact mean"


def test_inputs_of_another_kind_are_refused_by_name() -> None:
    q, k, v = inputs(3, 5)
    with pytest.raises(NotImplementedError, match="float64"):
        tiled_attention(q.double(), k.double(), v.double(), scale=0.25)
    with pytest.raises(ContractError, match="one dtype"):
        tiled_attention(q, k.half(), v.half(), scale=0.25)
    with pytest.raises(ContractError, match=r"\(1, 2, 3, 16\).*multiple of G"):
        tiled_attention(q, drawn(1, 3, 5, 16, seed=1), drawn(1, 3, 5, 8, seed=1), scale=0.25)
