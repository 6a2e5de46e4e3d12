"""Replays of dQ and the split of its budget: formulas, the peers' rule, and that the parts make the whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend

from attnproof.dq import torch_gradient
from attnproof.properties.claims.dq_budget import SOURCES, source_variance, split, whole_variance
from attnproof.properties.claims.dq_replay import (
    COTANGENTS,
    VARIANTS,
    Means,
    certify_call,
    draw,
    draw_uniform,
    fudge_factor,
    once_rounded,
    replay,
)
from tests.quality.peers.peer import Rejection
from tests.quality.peers.pytorch_sdpa import FUDGE, check_equal

SMALL = (2, 24, 96, 16)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("cotangents", COTANGENTS)
def test_every_variant_is_dq(cotangents: str) -> None:
    certified = certify_call(draw(torch.float32, SMALL, Means(2.0, 2.0), cotangents, seed=1))
    for name, dq in replay(certified).items():
        assert rms(certified.error(dq)) < 1e-4 * rms(certified.dq.value), name


@pytest.mark.parametrize(("share", "accepted"), [(0.9, True), (1.1, False)])
def test_the_factor_is_that_of_pytorchs_rule(share: float, accepted: bool) -> None:
    certified = certify_call(draw(torch.float16, SMALL, Means(), "normal", seed=2))
    golden, baseline = certified.dq.value, once_rounded(certified)
    dq = golden + share * FUDGE * (baseline.double() - golden)
    assert fudge_factor(certified, dq, baseline) == pytest.approx(share * FUDGE)
    if accepted:
        check_equal(golden, baseline, dq)
    else:
        with pytest.raises(Rejection):
            check_equal(golden, baseline, dq)


def test_errors_below_the_floor_need_no_factor() -> None:
    certified = certify_call(draw(torch.float16, SMALL, Means(), "normal", seed=2))
    assert fudge_factor(certified, certified.dq.value + 0.9e-5, certified.dq.value) == 0.0
    assert fudge_factor(certified, certified.dq.value + 1.1e-5, certified.dq.value) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torchs_flash_needs_what_the_replay_needs(dtype: torch.dtype) -> None:
    call = draw_uniform(dtype, (4, 16, 1024, 16), scale=0.25, seed=0)
    certified = certify_call(call)
    baseline = torch_gradient(call, SDPBackend.MATH)
    theirs = fudge_factor(certified, torch_gradient(call, SDPBackend.FLASH_ATTENTION), baseline)
    ours = {name: fudge_factor(certified, dq, baseline) for name, dq in replay(certified).items()}
    assert theirs > 20.0
    assert ours["stored O"] == pytest.approx(theirs, rel=0.5)
    for name in ("exact O", "Σ p dP", "stored O, row sum undone", "stored O, K and V centred before"):
        assert ours[name] < 5.0, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [2.0, 16.0])
def test_deltas_error_moves_dq_by_the_mean_key(dtype: torch.dtype, mean: float) -> None:
    # 128 rows have an error of δ each: their root mean square is known to 1/√256, 6 %.
    certified = certify_call(draw(dtype, (2, 64, 256, 32), Means(mean, mean), "normal", seed=3))
    results = replay(certified)
    moved = rms(results["stored O"].double() - results["exact O"].double())
    assert moved == pytest.approx(rms(certified.delta_effect()), rel=0.25)
    assert moved > 2.0 * rms(certified.error(results["exact O"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("means", [Means(), Means(keys=4.0), Means(4.0, 4.0)], ids=str)
def test_the_sources_make_the_whole_budget(dtype: torch.dtype, means: Means) -> None:
    certified = certify_call(draw(dtype, SMALL, means, "normal", seed=4))
    parts, whole = split(certified), whole_variance(certified)
    assert list(parts) == list(SOURCES)
    total = torch.stack(list(parts.values())).sum(0)
    torch.testing.assert_close(total, whole, rtol=2e-3, atol=0.0)
    largest = max(parts, key=lambda name: float((parts[name] / whole).mean()))
    if dtype != torch.float32:
        assert (largest == "δ") == (means.keys > 0.0)
        assert not torch.allclose(total - parts[largest], whole, rtol=0.1)


def test_shares_do_not_depend_on_the_dtype() -> None:
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        # The same numbers, which both dtypes hold, in both.
        drawn = draw(torch.bfloat16, SMALL, Means(4.0, 1.0), "normal", seed=5)
        call = type(drawn)(*(x.to(dtype) for x in (drawn.q, drawn.k, drawn.v, drawn.do)), drawn.scale)
        certified = certify_call(call)
        whole = whole_variance(certified)
        found.append([float((source_variance(certified, name) / whole).mean()) for name in ("P", "δ", "dS")])
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_variants_are_those_that_the_page_names() -> None:
    certified = certify_call(draw(torch.float16, SMALL, Means(), "normal", seed=6))
    assert list(replay(certified)) == list(VARIANTS)
