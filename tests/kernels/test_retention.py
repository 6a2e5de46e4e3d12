"""The three forms of retention, and their gradients, against the recurrence in float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnproof.kernels.arguments import ContractError
from attnproof.kernels.retention import attention, parallel, recurrent
from tests.kernels.gated_linear_reference import NAMES, Inputs, assert_within, exact, inputs, results

pytestmark = pytest.mark.usefixtures("emulated")

SCALE = 0.3
FACES = {"attention": attention, "parallel": parallel, "recurrent": recurrent}


def call(entry: Any, given: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v, _, _, initial, _, _, cu_seqlens = given
    o, state = entry(q, k, v, scale=SCALE, initial_state=initial, cu_seqlens=cu_seqlens, return_state=True)
    return o, state


def assert_exact(given: Inputs, entry: Any) -> None:
    """Retention is gated linear attention whose gates are log(1 − 2^(−5−h)), in float64 here.

    The kernels round log γ once, and the parallel form an exponent t·log₂γ twice more: within the 36 u that
    the bounds grant to sums of gates.
    """
    heads = torch.arange(given.q.shape[1], dtype=torch.float64)
    gates = torch.log1p(-torch.exp2(-5 - heads))[None, :, None].expand(given.q.shape[:3])
    got = results(functools.partial(call, entry), given._replace(g=None))
    bounds = exact(given._replace(g=gates), SCALE, given.q.dtype)
    del bounds[NAMES.index("dg")]
    assert_within(got, bounds, names=tuple(name for name in NAMES if name != "dg"))


@pytest.mark.parametrize("n", [0, 1, 33, 130])
@pytest.mark.parametrize("face", FACES)
def test_lengths(face: str, n: int) -> None:
    assert_exact(inputs(n=n), FACES[face])


@pytest.mark.parametrize(
    ("face", "dtype"),
    [("attention", torch.float16), ("parallel", torch.float16), ("parallel", torch.bfloat16)],
    ids=str,
)
def test_half_precision(face: str, dtype: torch.dtype) -> None:
    assert_exact(inputs(dtype, n=70), FACES[face])


@pytest.mark.parametrize("face", FACES)
def test_packed_sequences(face: str) -> None:
    assert_exact(inputs(n=60, cu_seqlens=[0, 0, 17, 18, 60]), FACES[face])


def test_many_heads() -> None:
    """Every head has its own rate, down to 1 − 2^−16."""
    given = inputs(h=12, n=40, d=2, e=2)
    assert_exact(given, attention)
    assert_exact(given, parallel)


def test_layouts() -> None:
    given = inputs(b=2, n=37, d=16, e=16)
    q, k, v = (x.mT.contiguous().mT for x in given[:3])
    do = torch.randn(1, 2, 1, 1).expand(2, 2, 37, 16)
    assert_exact(given._replace(q=q, k=k, v=v, initial=given.initial.mT, do=do), parallel)


@pytest.mark.parametrize("face", FACES)
def test_values_that_a_row_does_not_see(face: str) -> None:
    given = inputs(n=40)
    clean, _ = call(FACES[face], given)
    for name in ("q", "k", "v"):
        spoilt = getattr(given, name).clone()
        spoilt[:, 1, 20, 3] = math.nan
        o, _ = call(FACES[face], given._replace(**{name: spoilt}))
        assert torch.equal(o[:, 0], clean[:, 0])
        assert torch.equal(o[:, 1, :20], clean[:, 1, :20])


def test_exact_decay_step_by_step() -> None:
    """γ itself is a float32 number: what the first position leaves is its exact product, 96 times rounded."""
    q, k, v = torch.ones(1, 2, 97, 1), torch.zeros(1, 2, 97, 1), torch.ones(1, 2, 97, 1)
    k[:, :, 0] = 1
    o = recurrent(q, k, v, scale=1.0)
    want = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6], dtype=torch.float64) ** 96
    assert ((o[0, :, 96, 0].double() - want).abs() <= 97 * 2.0**-24 * want).all()


def test_arguments() -> None:
    given = inputs()
    for face in FACES.values():
        with pytest.raises(ContractError, match="initial_state has shape"):
            call(face, given._replace(initial=torch.zeros(1, 2, 12, 20)))
        with pytest.raises(ContractError, match="scale=nan"):
            face(*given[:3], scale=math.nan)
