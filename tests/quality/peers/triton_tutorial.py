"""The test of Triton's tutorial 06, copied by hundreds of repositories.

Source: triton-lang/triton, python/tutorials/06-fused-attention.py at 003da478 (``test_op``): q, k, v from
N(0, 0.5²), scale 0.5, seed 20, float16, 1024 keys, head dimension 64, causal; torch.allclose(reference,
output, atol=1e-2, rtol=0). The reference multiplies in float16, takes the softmax in float32, rounds it to
float16.

Kept: all of that, batch 1 and 2 heads included; one case without a mask and one with head dimension 128 and
128 keys, batch 4 and 48 heads, from the parametrisation of later versions. Left out: the backward pass, FP8.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.quality.peers.peer import Kernel, PeerTest, Rejection, Shape, SuitePeer, product

__all__ = ["TRITON_TUTORIAL"]

SCALE = 0.5
ATOL = 1e-2


def gaussian(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """N(0, 0.5²)."""
    return torch.empty(shape, dtype=dtype).normal_(mean=0.0, std=0.5)


def judged(shape: Shape, causal: bool, kernel: Kernel) -> None:
    """One test: draw, reference, call, compare."""
    torch.manual_seed(20)
    q, k, v = shape.draw(gaussian, "float16")
    scores = product("bhmd,bhnd->bhmn", q, k) * SCALE
    if causal:
        lower = torch.tril(torch.ones(shape.queries, shape.keys))
        scores[:, :, lower == 0] = float("-inf")
    p = torch.softmax(scores.float(), -1).half()
    reference = product("bhmn,bhne->bhme", p, v)
    options: dict[str, Any] = {"causal": True} if causal else {}
    out = kernel(q, k, v, scale=SCALE, **options).half()
    if not torch.allclose(reference, out, atol=ATOL, rtol=0):
        error = float((reference - out).abs().max())
        raise Rejection(f"allclose at 1e-2 fails, max error {error:.3g}")


TRITON_TUTORIAL = SuitePeer(
    "triton-tutorial-06",
    "triton-lang/triton python/tutorials/06-fused-attention.py 003da478d84f5bb0f51b3988cf0ea0bbe60282b7",
    tuple(
        PeerTest(
            f"{shape}{' causal' if causal else ''}",
            "float16",
            frozenset({"causal"} if causal else ()),
            partial(judged, shape, causal),
        )
        for shape, causal in (
            (Shape(1024, 1024, 64, batch=1), True),
            (Shape(128, 128, 64, heads=48, batch=4), False),
            (Shape(128, 128, 128, batch=4), True),
        )
    ),
)
