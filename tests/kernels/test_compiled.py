"""What the kernels become on real targets: matrix instructions where they belong, and no register spilled to
memory.

This is the measurement behind :func:`attnproof.kernels.tiles.tiles_for`; it takes some minutes
of CPU time, because every kernel is compiled to its binary by the assemblers in Triton's wheel.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from attnproof.emulator import compile_launches
from attnproof.kernels import delta, easy, gated_linear, linear, mlstm, relu, retention, rwkv6, sigmoid
from attnproof.kernels.examples.logsumexp import unshifted_logsumexp
from attnproof.kernels.examples.softmax import three_pass_attention, unshifted_attention
from attnproof.kernels.examples.softmax_rows import division_free_softmax_rows, unshifted_softmax_rows
from attnproof.kernels.logsumexp import logsumexp
from attnproof.kernels.softmax import attention, attention_atomic, attention_split
from attnproof.kernels.softmax_rows import softmax_rows
from tests.quality import spills

pytestmark = pytest.mark.emulator

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}
HALVES = (torch.float16, torch.bfloat16)


def inputs(
    dtype: torch.dtype, width: int, queries: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.zeros(1, 2, queries, width, dtype=dtype), torch.zeros(1, 2, 64, width, dtype=dtype)
    return q, k, k.clone()


def every_option(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "causal": True,
        "window": (20, 10),
        "softcap": 5.0,
        "sinks": torch.zeros(2, dtype=dtype),
        "bias": torch.zeros(64, 64, dtype=dtype),
    }


SCANS = (
    ("ssm", "scan, every option", "float16", 16, "gfx942"),
    ("h3", "attention", "float16", 64, "sm_100"),
    ("selective_scan", "scan, every option", "bfloat16", 16, "sm_80"),
    ("ssd", "attention", "float16", 64, "sm_90"),
    ("prefix_scan", "blelloch, every option", "float16", 16, "sm_90"),
    ("rwkv4", "attention, every option", "bfloat16", 16, "gfx942"),
)


@pytest.mark.parametrize(("family", "form", "dtype", "width", "target"), SCANS, ids=str)
def test_scans(family: str, form: str, dtype: str, width: int, target: str) -> None:
    """Forward and backward of one form of each family; all of tests.quality.spills is too long for CI."""
    (chosen,) = (x for x in spills.FAMILIES[family]() if x.name == form)
    result = spills.compiled(family, chosen, dtype, width, target)
    assert not result.faults
    assert len({kernel.kernel for kernel in result.kernels}) >= 2
    if family == "ssd":
        assert any(kernel.matrix_instructions > 0 for kernel in result.kernels)


def assert_no_spills(
    entry: Any, args: tuple[torch.Tensor, ...], options: dict[str, Any], target: str
) -> list[Any]:
    compiled: list[Any] = compile_launches(entry, args, options, [target])
    for kernel in compiled:
        assert kernel.spill_bytes == 0, (
            f"{kernel.kernel} on {target}: {kernel.spill_bytes} bytes spilled: {kernel}"
        )
    return compiled


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.float32, 64),
        (torch.float32, 128),
        (torch.float16, 64),
        (torch.float16, 128),
        (torch.bfloat16, 128),
    ],
    ids=str,
)
def test_attention(dtype: torch.dtype, width: int, target: str) -> None:
    (kernel,) = assert_no_spills(attention, inputs(dtype, width), {"scale": 1.0}, target)
    if dtype in HALVES or target == "gfx942":
        assert kernel.instructions.get(MATRIX[target], 0) > 0
    else:
        assert kernel.matrix_instructions == 0, "exact float32 products must not become tf32"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_with_every_option(dtype: torch.dtype, target: str) -> None:
    assert_no_spills(attention, inputs(dtype, 128), {"scale": 1.0, **every_option(dtype)}, target)


@pytest.mark.parametrize("target", TARGETS)
def test_split_attention(target: str) -> None:
    compiled = assert_no_spills(attention_split, inputs(torch.bfloat16, 128, 1), {"scale": 1.0}, target)
    assert [kernel.kernel for kernel in compiled] == ["attention_kernel", "merge_kernel"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", [logsumexp, softmax_rows])
def test_rows(entry: Any, dtype: torch.dtype, target: str) -> None:
    assert_no_spills(entry, (torch.zeros(8, 1000, dtype=dtype),), {}, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", [unshifted_attention, three_pass_attention])
def test_example_attention(entry: Any, dtype: torch.dtype, target: str) -> None:
    assert_no_spills(entry, inputs(dtype, 128), {"scale": 1.0}, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("entry", [unshifted_logsumexp, unshifted_softmax_rows, division_free_softmax_rows])
def test_example_rows(entry: Any, target: str) -> None:
    assert_no_spills(entry, (torch.zeros(8, 1000, dtype=torch.float16),), {}, target)


def backward(entry: Any, *tensors: torch.Tensor, **options: Any) -> None:
    """One forward and one backward pass, with cotangents of all outputs that have one."""
    leaves = [tensor.requires_grad_() for tensor in tensors]
    outputs = entry(*leaves, **options)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(output) for output in outputs])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["softmax", "softmax atomic", "sigmoid", "relu", "easy"])
def test_backward(name: str, target: str) -> None:
    dtype = torch.float32 if name == "softmax atomic" else torch.float16
    entries = {
        "softmax": attention,
        "softmax atomic": attention_atomic,
        "sigmoid": sigmoid.attention,
        "relu": relu.attention,
        "easy": easy.attention,
    }
    tensors, options = inputs(dtype, 64), {"scale": 1.0}
    if name == "easy":
        tensors, options = (torch.zeros(2, 64, 64, dtype=dtype), torch.zeros(1, 2, 64, 64, dtype=dtype)), {}
    compiled = assert_no_spills(functools.partial(backward, entries[name]), tensors, options, target)
    assert len({kernel.kernel for kernel in compiled}) >= 2


@pytest.mark.parametrize("target", TARGETS)
def test_softmax_backward_with_every_option(target: str) -> None:
    dtype = torch.bfloat16
    options = {"scale": 1.0, **every_option(dtype), "alibi_slopes": torch.zeros(2)}
    assert_no_spills(functools.partial(backward, attention), inputs(dtype, 128), options, target)


# Of mLSTM at D = E = 64, which is the only width here: a state to begin with, of one packed sequence.
CARRIED = {
    "initial_state": (torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64), torch.zeros(1, 2)),
    "cu_seqlens": torch.tensor([0, 64], dtype=torch.int32),
}
# Of the families with a state: an entry point, its options, and what it is given beside q, k and v.
STATEFUL = {
    "linear": (linear.attention, {"feature_map": "elu1", "normalize": True}, ()),
    "gated_linear": (gated_linear.attention, {"scale": 1.0}, ("g",)),
    "rwkv6": (rwkv6.attention, {"scale": 1.0}, ("g", "u")),
    "retention": (retention.parallel, {"scale": 1.0}, ()),
    "delta": (delta.attention, {"scale": 1.0}, ("beta", "g")),
    "mlstm": (mlstm.attention, {"scale": 1.0, **CARRIED}, ("i", "f")),
}
# Their other kernels work channel by channel, or row by row.
MATMULS = {
    *("state_kernel", "states_kernel", "chunk_kernel", "walk_kernel", "gradient_kernel", "pairs_kernel"),
    *("output_kernel", "state_gradient_kernel"),
}


def stateful(name: str, dtype: torch.dtype, width: int) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """The call that returns the state too, and its tensors; gates have one number a key channel."""
    entry, options, further = STATEFUL[name]
    q, k, v = inputs(dtype, width)
    beside = {
        "g": torch.zeros(q.shape),
        "u": torch.zeros(2, width, dtype=dtype),
        **{gate: torch.zeros(q.shape[:3]) for gate in ("beta", "i", "f")},
    }
    tensors = (q, k, v, *(beside[x] for x in further))
    return functools.partial(entry, **options, return_state=True), tensors


COMPILED = {
    ("linear", torch.float16): {"state_kernel", "chunk_kernel", "normaliser_cotangent_kernel"},
    ("gated_linear", torch.float16): {"states_kernel", "walk_kernel", "gradient_kernel"},
    ("rwkv6", torch.bfloat16): {"states_kernel", "walk_kernel", "gradient_kernel"},
    ("retention", torch.float16): {"pairs_kernel", "states_kernel"},
    ("delta", torch.float16): {
        *("scores_kernel", "inverse_kernel", "chunk_kernel", "recurrence_kernel", "backward_kernel"),
    },
    # In float32, whose products NVIDIA's compiler unrolls: its kernels have the same tiles at every width.
    ("mlstm", torch.float32): {
        *("state_kernel", "output_kernel", "delta_kernel", "state_gradient_kernel", "gradient_kernel"),
    },
}
# Each family is compiled for one target here, in turn; tests.quality.spills goes through them all.
ONE = ("gfx942", "sm_100", "sm_90", "sm_80", "gfx942", "sm_80")


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [(*key, target) for key, target in zip(COMPILED, ONE, strict=True)],
    ids=str,
)
def test_states(name: str, dtype: torch.dtype, target: str) -> None:
    """Forward and backward at D = E = 64; all of tests.quality.spills is too long for CI."""
    entry, tensors = stateful(name, dtype, 64)
    compiled = assert_no_spills(functools.partial(backward, entry), tensors, {}, target)
    assert {kernel.kernel for kernel in compiled} == COMPILED[name, dtype]
    if dtype in HALVES or target == "gfx942":
        assert all(kernel.matrix_instructions > 0 for kernel in compiled if kernel.kernel in MATMULS)


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [("retention", torch.float32, "gfx942"), ("delta", torch.bfloat16, "sm_90")],
    ids=str,
)
def test_wide_states(name: str, dtype: torch.dtype, target: str) -> None:
    """Forward alone at D = E = 128."""
    entry, tensors = stateful(name, dtype, 128)
    assert_no_spills(entry, tensors, {}, target)
