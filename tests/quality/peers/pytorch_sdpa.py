"""PyTorch's own tests of scaled dot product attention: four times the error of the math backend.

Source: pytorch/pytorch, test/test_transformers.py, ``_check_equal``,
``test_flash_attention_vs_math_ref_grads`` and ``test_mem_efficient_attention[_attn_mask]_vs_math_ref_grads``,
as the public code index holds them (2026). Fail where max|golden − out| exceeds max(1e-5, 4·max|golden −
low|), or where the output has a NaN and ``low`` has none. golden is the math backend in float32 (float64 for
float32 inputs), low the math backend in the inputs' dtype, which since torch 2.5 computes in float32 and
rounds its result.

Kept: uniform [0, 1) inputs, fudge factor 4 of the forward output, lengths 4, 143, 127, 64, 128, 312, 408,
head dimensions 8, 203, 16, 32, 64, 72, 128, scale None and 1/D, GQA, is_causal with equal lengths, a dense
mask uniform in [0, 1) and of shape (queries, keys) as bias.

Reduced, but for one case of each in full: batch 8 → 1 or 2, lengths 2048 and 579 → 512, heads 4 → 2, GQA 10:2
→ 5:1, a few of the products. Left out: dropout, gradients (whose fudge factors reach 1550), is_causal with
unequal lengths, which torch aligns top left where the contract's default is bottom right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.quality.peers.peer import Kernel, PeerTest, Rejection, Shape, SuitePeer

__all__ = ["PYTORCH_SDPA", "check_equal"]

FUDGE = 4.0
FLOOR = 1e-5


def check_equal(golden: torch.Tensor, low: torch.Tensor, out: torch.Tensor) -> None:
    """PyTorch's rule for the forward output."""
    error = (golden - out).abs().max()
    allowed_error = (golden - low).abs().max()
    if torch.isnan(error).any() and not torch.isnan(allowed_error).any():
        raise Rejection("NaN in the output and none in the reference")
    threshold = max(FLOOR, float(allowed_error) * FUDGE)
    if error > threshold:
        raise Rejection(f"max error {float(error):.3g} exceeds {threshold:.3g}")


@dataclass(frozen=True)
class Parameters:
    """One combination; ``flat`` scales by 1/D in place of 1/√D, ``masked`` adds a dense mask."""

    shape: Shape
    dtype: str
    causal: bool = False
    flat: bool = False
    masked: bool = False

    @property
    def options(self) -> frozenset[str]:
        """Keywords that the kernel must take."""
        asked = {"causal": self.causal, "bias": self.masked}
        return frozenset(name for name, needed in asked.items() if needed)


def judged(parameters: Parameters, kernel: Kernel) -> None:
    """One test: draw, call, compare."""
    torch.manual_seed(0)
    shape = parameters.shape
    q, k, v = shape.draw(torch.rand, parameters.dtype)
    mask = torch.rand(shape.queries, shape.keys, dtype=q.dtype) if parameters.masked else None
    scale = 1 / shape.width if parameters.flat else shape.width**-0.5
    given: dict[str, Any] = {"causal": parameters.causal, "bias": mask}
    out = kernel(q, k, v, scale=scale, **{name: given[name] for name in parameters.options})
    high = torch.float64 if q.dtype == torch.float32 else torch.float32
    results = []
    with sdpa_kernel(SDPBackend.MATH):
        for kind in (high, q.dtype):
            results.append(
                scaled_dot_product_attention(
                    q.to(kind),
                    k.to(kind),
                    v.to(kind),
                    None if mask is None else mask.to(kind),
                    is_causal=parameters.causal,
                    scale=scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            )
    check_equal(results[0], results[1], out)


H, B, F = "float16", "bfloat16", "float32"

PARAMETERS = (
    # flash
    Parameters(Shape(4, 4, 8, batch=1), H, causal=True),
    Parameters(Shape(143, 127, 203), H),
    Parameters(Shape(143, 127, 8, heads=4, batch=8), B),
    Parameters(Shape(4, 2048, 64, heads=4), H),
    Parameters(Shape(143, 512, 8, batch=1), B, flat=True),
    Parameters(Shape(512, 127, 64), B),
    Parameters(Shape(512, 512, 203, heads=1), H, causal=True),
    Parameters(Shape(4, 512, 256, batch=1), B),
    Parameters(Shape(143, 127, 64, heads=16, groups=8), H, flat=True),
    Parameters(Shape(143, 143, 64, heads=5, groups=1), B, causal=True),
    # memory-efficient
    Parameters(Shape(8, 65, 16), F),
    Parameters(Shape(64, 408, 72), F, flat=True),
    Parameters(Shape(312, 256, 128, batch=1), H),
    Parameters(Shape(128, 128, 32), F, causal=True),
    Parameters(Shape(512, 512, 64), F, causal=True),
    # memory-efficient with a mask
    Parameters(Shape(4, 8, 16), F, masked=True),
    Parameters(Shape(64, 65, 32), H, masked=True),
    Parameters(Shape(312, 408, 72), H, masked=True, flat=True),
    Parameters(Shape(128, 512, 64, batch=1), F, masked=True),
)

PYTORCH_SDPA = SuitePeer(
    "pytorch-sdpa",
    "pytorch/pytorch test/test_transformers.py (public code index, 2026)",
    tuple(
        PeerTest(
            f"{p.shape} {'1/D ' if p.flat else ''}{' '.join(sorted(p.options))}",
            p.dtype,
            p.options,
            partial(judged, p),
        )
        for p in PARAMETERS
    ),
)
