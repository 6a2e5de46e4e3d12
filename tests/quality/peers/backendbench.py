"""BackendBench: assert_close at 1e-2 with NaN equal to NaN, floats from [0, 1).

Source: meta-pytorch/BackendBench, BackendBench/eval.py at 015f5cb1 (``_allclose``,
``eval_correctness_test``), BackendBench/utils.py at 0609b8e2 (``_deserialize_tensor``). The reference
operator runs first, then the candidate, on the same tensors; torch.testing.assert_close(reference, candidate,
atol=1e-2, rtol=1e-2, equal_nan=True), so dtypes and shapes must agree. An operator's score is the fraction of
its tests that pass; accepted is a score of 1.

Kept: rule, order, floats of the TorchBench traces drawn from [0, 1), traces of half precision mostly; one
sample of torch's OpInfo for this operator (batch 4, 4 heads, 3 queries, 6 keys, head dimension 8,
make_tensor's default range [−9, 9), bfloat16). Not available: the trace file; shapes here are those of BERT
and GPT-2 layers (head dimension 64, lengths 512 and 128) with batch 2 and 2 heads, once 12. is_causal only
with equal lengths.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close, make_tensor

from tests.quality.peers.peer import Kernel, PeerTest, Shape, SuitePeer

__all__ = ["BACKENDBENCH"]

TOLERANCE = 1e-2


def judged(shape: Shape, dtype: str, low: float, high: float, causal: bool, kernel: Kernel) -> None:
    """One test: draw, reference, call, compare."""
    torch.manual_seed(0)
    q, k, v = shape.draw(partial(make_tensor, device="cpu", low=low, high=high), dtype)
    reference = scaled_dot_product_attention(q, k, v, is_causal=causal)
    options: dict[str, Any] = {"causal": True} if causal else {}
    out = kernel(q, k, v, scale=shape.width**-0.5, **options)
    assert_close(reference, out, equal_nan=True, atol=TOLERANCE, rtol=TOLERANCE)


def trace(shape: Shape, dtype: str, *, causal: bool = False, low: float = 0.0, high: float = 1.0) -> PeerTest:
    """One traced call."""
    options = frozenset({"causal"} if causal else ())
    body = partial(judged, shape, dtype, low, high, causal)
    return PeerTest(f"{shape} {' '.join(options)}", dtype, options, body)


BACKENDBENCH = SuitePeer(
    "backendbench",
    "meta-pytorch/BackendBench BackendBench/eval.py 015f5cb135a8e04bd452c2a0c3799f87af6e7813",
    (
        trace(Shape(128, 128, 64), "float16"),
        trace(Shape(512, 512, 64, heads=12, batch=1), "float16"),
        trace(Shape(512, 512, 64), "float16", causal=True),
        trace(Shape(128, 128, 64), "bfloat16", causal=True),
        trace(Shape(128, 512, 64), "float32"),
        trace(Shape(3, 6, 8, heads=4, batch=4), "bfloat16", low=-9.0, high=9.0),
    ),
)
