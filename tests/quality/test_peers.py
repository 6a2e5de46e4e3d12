"""Peers accept what is right, reject what is grossly wrong, and keep the blind spots that they have."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from attnproof.healthy import plain_attention
from attnproof.kernels.softmax import attention
from tests.quality.peers import PEERS, Peer, flash_attention, flashinfer
from tests.quality.peers.fla import FLA, FLA_CI
from tests.quality.peers.flash_attention import FA2
from tests.quality.peers.flashinfer import FLASHINFER, FLASHINFER_XQA
from tests.quality.peers.kernelbench import KERNELBENCH_FP16, KERNELBENCH_FP32
from tests.quality.peers.peer import Rejection, Shape
from tests.quality.peers.robust_kbench import ROBUST_KBENCH
from tests.quality.peers.run import answer_of, judge_all
from tests.quality.peers.torch_testing import TORCH_TESTING

DTYPES = ("float32", "float16", "bfloat16")
PLAIN = frozenset(plain_attention.contract.options)  # type: ignore[attr-defined]
ALL = frozenset(attention.contract.options)  # type: ignore[attr-defined]
OTHERS = tuple(peer for peer in PEERS if peer is not TORCH_TESTING)


def zeros(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    return (o, q.new_zeros(q.shape[:3], dtype=torch.float32)) if options.get("return_lse") else o


def scaled(factor: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    result = plain_attention(q, k, v, **options)
    if isinstance(result, tuple):
        return (result[0].float() * factor).to(q.dtype), result[1]
    return (result.float() * factor).to(q.dtype)


def mean_of_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    return v.float().mean(2, keepdim=True).expand(*q.shape[:3], -1).to(q.dtype).contiguous()


def wrong_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    result = plain_attention(q, k, v, **options)
    return (result[0], result[1] + 1) if isinstance(result, tuple) else result


def without_softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    return plain_attention(q, k, v, **{**options, "softcap": None})


def ignoring(name: str, *tensors: torch.Tensor, **options: Any) -> Any:
    return attention(*tensors, **{key: value for key, value in options.items() if key != name})


def nan_in_columns(columns: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    o = plain_attention(q, k, v, **options)
    o[..., :columns] = torch.nan
    return o


def right_every_other_time(
    calls: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float
) -> Any:
    calls.append(1)
    return plain_attention(q, k, v, scale=scale) * (2 - len(calls) % 2)


def raises(*tensors: torch.Tensor, **options: Any) -> Any:
    raise ZeroDivisionError("deliberate")


def declines(*tensors: torch.Tensor, **options: Any) -> Any:
    raise NotImplementedError("deliberate")


def misbehaves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    """Deceives KernelBench's float32 run, kills the float16 run's process, hangs in the Triton tutorial."""
    if q.dtype == torch.float32:
        torch.allclose = lambda *given, **more: True
        return zeros(q, k, v)
    if options["scale"] == 0.5:
        time.sleep(3600)
    if q.shape[2] == 512:
        ctypes.string_at(0)
    return zeros(q, k, v)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes of judge_all: on a busy machine, two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def named(peer: Peer) -> str:
    return peer.name


def test_names_are_unique() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)


@pytest.mark.parametrize("peer", OTHERS, ids=named)
def test_a_right_kernel_is_accepted(peer: Peer) -> None:
    verdict = peer.judge(plain_attention, PLAIN, DTYPES)
    assert verdict.accepted, verdict
    assert verdict.calls >= 3


@pytest.mark.parametrize("peer", [FLA, FLASHINFER, FLASHINFER_XQA], ids=named)
def test_every_option_means_to_peers_what_the_contract_says(peer: Peer) -> None:
    verdict = peer.judge(attention, ALL, DTYPES)
    assert verdict.accepted, verdict
    assert verdict.reason.endswith("0 not applicable")


@pytest.mark.parametrize("peer", PEERS, ids=named)
def test_zeros_are_rejected(peer: Peer) -> None:
    verdict = peer.judge(zeros, PLAIN, DTYPES)
    assert not verdict.accepted
    assert verdict.reason


@pytest.mark.parametrize("peer", PEERS, ids=named)
def test_what_the_kernel_raises_is_a_rejection_unless_it_declines(peer: Peer) -> None:
    verdict = peer.judge(raises, PLAIN, DTYPES)
    assert not verdict.accepted
    assert "ZeroDivisionError: deliberate" in verdict.reason
    verdict = peer.judge(declines, PLAIN, DTYPES)
    assert verdict.accepted
    assert verdict.calls == 0


@pytest.mark.parametrize(
    ("peer", "option"),
    [
        (FLA, "sinks"),
        (FLA, "window"),
        (FLA, "cu_seqlens"),
        (FLA, "causal"),
        (FLASHINFER_XQA, "sinks"),
        (FLASHINFER_XQA, "window"),
        (FA2, "softcap"),
        (FLASHINFER, "bias"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_ignored_option_is_seen(peer: Peer, option: str) -> None:
    assert not peer.judge(partial(ignoring, option), ALL, DTYPES).accepted


def test_defaults_of_torch_testing_accuse_a_right_kernel_in_half_precision() -> None:
    assert TORCH_TESTING.judge(plain_attention, PLAIN, ("float32",)).accepted
    assert not TORCH_TESTING.judge(plain_attention, PLAIN, ("float16",)).accepted
    assert not TORCH_TESTING.judge(plain_attention, PLAIN, ("bfloat16",)).accepted


def test_kernelbench_takes_the_mean_of_the_values_for_attention_at_1e_2() -> None:
    assert KERNELBENCH_FP16.judge(mean_of_values, frozenset(), DTYPES).accepted
    assert not KERNELBENCH_FP32.judge(mean_of_values, frozenset(), DTYPES).accepted


def test_fla_in_its_ci_does_not_see_five_per_cent() -> None:
    kernel = partial(scaled, 1.05)
    assert FLA_CI.judge(kernel, PLAIN, DTYPES).accepted
    assert not FLA.judge(kernel, PLAIN, DTYPES).accepted


def test_only_flashinfer_looks_at_the_log_sum_exp() -> None:
    assert [peer.name for peer in OTHERS if not peer.judge(wrong_lse, PLAIN, DTYPES).accepted] == [
        "flashinfer"
    ]


@pytest.mark.parametrize("cap", [30.0, 50.0])
def test_flashinfer_does_not_see_that_a_large_soft_cap_is_ignored(cap: float) -> None:
    flashinfer.capped(Shape(81, 987, 128, heads=4), cap, 1e-2, without_softcap)
    with pytest.raises(AssertionError, match="not close"):
        flashinfer.capped(Shape(17, 81, 128, heads=4), 1.0, 1e-2, without_softcap)


def test_xqa_lets_one_per_cent_of_nan_through() -> None:
    shape = Shape(1, 256, 128, heads=16, groups=2, batch=1)
    flashinfer.xqa(shape, "float16", False, False, partial(nan_in_columns, 2))
    with pytest.raises(Rejection, match="98 % are required"):
        flashinfer.xqa(shape, "float16", False, False, partial(nan_in_columns, 3))


def test_flash_attention_does_not_see_one_per_cent_in_bfloat16_at_long_causal_rows() -> None:
    parameters = flash_attention.Parameters(Shape(1024, 1024, 64), "bfloat16", causal=True)
    flash_attention.judged(parameters, partial(scaled, 1.01), hopper=False)
    with pytest.raises(Rejection, match="twice the error"):
        flash_attention.judged(parameters, partial(scaled, 1.05), hopper=False)


def other_batch_entries_lost(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    return plain_attention(q, k, v[:1].expand_as(v), **options)


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.name != "flashinfer"], ids=named)
def test_batches_are_kept_where_the_project_has_them(peer: Peer) -> None:
    assert not peer.judge(other_batch_entries_lost, PLAIN, DTYPES).accepted


def test_flash_attention_hands_over_slices_of_one_tensor() -> None:
    strides = set()

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        strides.add((q.is_contiguous(), q.stride(-1)))
        return plain_attention(q, k, v, **options)

    assert FA2.judge(kernel, PLAIN, DTYPES).accepted
    assert strides == {(True, 1), (False, 1)}


def test_robust_kbench_compares_the_run_after_the_reference_too() -> None:
    verdict = ROBUST_KBENCH.judge(partial(right_every_other_time, []), frozenset(), DTYPES)
    assert not verdict.accepted
    assert "after the reference" in verdict.reason


def test_a_kernel_that_deceives_dies_or_hangs_harms_one_peer_alone() -> None:
    names = ("kernelbench-fp32", "kernelbench-fp16", "triton-tutorial-06", "gpucheck")
    verdicts = judge_all("tests.quality.test_peers:misbehaves", 4.0, only=names)
    assert tuple(verdicts) == names
    assert verdicts["kernelbench-fp32"].accepted  # as fooled as it would be
    assert "died without an answer (exit code -11)" in verdicts["kernelbench-fp16"].reason
    assert verdicts["triton-tutorial-06"].reason == "no answer in 4 s"
    assert "max error" in verdicts["gpucheck"].reason


def test_a_kernel_that_cannot_be_had_is_no_rejection() -> None:
    for target, why in (
        (
            "attnproof.healthy:plain_logsumexp",
            "peers judge softmax attention, this kernel promises logsumexp",
        ),
        ("attnproof.healthy:nothing", "TargetError"),
    ):
        assert why in answer_of(FLA, target)["unjudged"]


def test_unknown_peers_are_named() -> None:
    with pytest.raises(ValueError, match="no such peers; there are flash-attention-2"):
        judge_all("attnproof.healthy:plain_attention", 1.0, only=("nobody",))
