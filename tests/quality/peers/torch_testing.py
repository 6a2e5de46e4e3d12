"""torch.testing.assert_close with its defaults, on randn: what many authors write first.

Source: torch.testing of the installed torch (its documentation gives the table): |actual − expected| ≤ atol +
rtol· |expected| with rtol/atol 1e-3/1e-5 in float16, 1.6e-2/1e-5 in bfloat16, 1.3e-6/1e-5 in float32; dtypes
and shapes must agree, NaN is never equal.

No one project's test: shapes, seed and options are chosen here, and the reference is torch's own attention in
the inputs' dtype. These tolerances stand for elementwise operations; that they accuse right attention kernels
is part of the record.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from tests.quality.peers.peer import Kernel, PeerTest, Shape, SuitePeer

__all__ = ["TORCH_TESTING"]


def judged(shape: Shape, dtype: str, causal: bool, kernel: Kernel) -> None:
    """One test: draw, call, compare."""
    torch.manual_seed(0)
    q, k, v = shape.draw(torch.randn, dtype)
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    options: dict[str, Any] = {"causal": True} if causal else {}
    assert_close(kernel(q, k, v, scale=shape.width**-0.5, **options), expected)


SHAPES = (
    (Shape(64, 64, 128, heads=4, batch=4), False),
    (Shape(128, 128, 64), True),
    (Shape(100, 257, 64, heads=4, groups=2), False),
    (Shape(512, 512, 64), True),
)

TORCH_TESTING = SuitePeer(
    "torch-testing-defaults",
    f"torch.testing.assert_close, torch {torch.__version__}",
    tuple(
        PeerTest(
            f"{shape}{' causal' if causal else ''}",
            dtype,
            frozenset({"causal"} if causal else ()),
            partial(judged, shape, dtype, causal),
        )
        for dtype in ("float32", "float16", "bfloat16")
        for shape, causal in SHAPES
    ),
)
