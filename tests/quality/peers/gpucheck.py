"""gpucheck 0.1.0: one table of tolerances by dtype.

Source: the wheel gpucheck 0.1.0 on PyPI, gpucheck/assertions/{close,tolerances}.py,
gpucheck/fuzzing/{inputs,shapes}.py. |actual − expected| ≤ atol + rtol·|expected| in float64, with atol = rtol
= 1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16; shapes must agree; any NaN refuses; infinities must
stand at the same places with the same signs.

Kept: that rule with its defaults (no k_dim, no baseline_2x: both only widen it), inputs normal (drawn in
float32, then cast), uniform [0, 1) and constant (zeros, ones, −1), lengths from its corpus of shapes:
degenerate (0 keys and queries, 1), around tiles and powers of two, primes. Not available: a test of attention
by that project, so the choice of sizes from the corpus, head dimension 64 and torch's own attention as
``expected`` are ours. Its edge inputs near overflow and with NaN are left out: ``expected`` has NaN there,
which refuses every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.quality.peers.peer import Kernel, PeerTest, Rejection, Shape, SuitePeer

__all__ = ["GPUCHECK", "assert_close"]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Generate = Callable[..., torch.Tensor]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """gpucheck's rule with its defaults; dtypes without an entry are judged as float32."""
    tolerance = TOLERANCE.get(actual.dtype, 1e-4)
    a, b = (x.detach().float().numpy().astype(np.float64) for x in (actual, expected))
    if a.shape != b.shape:
        raise Rejection(f"shape mismatch: {a.shape} vs {b.shape}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise Rejection("NaN in actual or expected")
    if (np.isinf(a) != np.isinf(b)).any() or (np.sign(a[np.isinf(a)]) != np.sign(b[np.isinf(b)])).any():
        raise Rejection("infinities at other places or of other signs")
    finite = ~np.isinf(a)
    error = np.abs(a[finite] - b[finite])
    if (error > tolerance + tolerance * np.abs(b[finite])).any():
        raise Rejection(f"max error {error.max():.3g} at atol = rtol = {tolerance}")


def normal(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """N(0, 1), drawn in float32 and cast."""
    return torch.randn(shape, dtype=torch.float32).to(dtype)


def uniform(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """[0, 1), drawn in float32 and cast."""
    return torch.rand(shape, dtype=torch.float32).to(dtype)


def constant(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One value everywhere."""
    return torch.full(shape, value, dtype=dtype)


def judged(shape: Shape, dtype: str, generate: Generate, causal: bool, kernel: Kernel) -> None:
    """One test: draw, call, compare."""
    torch.manual_seed(0)
    q, k, v = shape.draw(generate, dtype)
    options: dict[str, Any] = {"causal": True} if causal else {}
    out = kernel(q, k, v, scale=shape.width**-0.5, **options)
    assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=causal))


def square(length: int, width: int = 64) -> Shape:
    """As many keys as queries."""
    return Shape(length, length, width)


H, B, F = "float16", "bfloat16", "float32"

CASES: tuple[tuple[str, Shape, str, Generate, bool], ...] = (
    ("empty normal", Shape(0, 0, 16), H, normal, False),
    ("normal", square(1), H, normal, False),
    ("normal", square(7), B, normal, False),
    ("normal", square(31), F, normal, True),
    ("uniform", square(33), H, uniform, False),
    ("normal", square(127), H, normal, True),
    ("normal", square(128), F, normal, False),
    ("normal", Shape(129, 129, 128, heads=7, batch=3), B, normal, True),
    ("uniform", square(257), F, uniform, False),
    ("normal", square(512), H, normal, False),
    ("normal", Shape(127, 512, 64), F, normal, False),
    ("uniform", Shape(7, 256, 128), B, uniform, False),
    ("zeros", square(67), H, partial(constant, 0.0), False),
    ("ones", square(67), F, partial(constant, 1.0), False),
    ("neg_ones", square(67), B, partial(constant, -1.0), False),
)

GPUCHECK = SuitePeer(
    "gpucheck",
    "gpucheck 0.1.0 (PyPI), gpucheck/assertions/close.py and tolerances.py",
    tuple(
        PeerTest(
            f"{name} {shape}{' causal' if causal else ''}",
            dtype,
            frozenset({"causal"} if causal else ()),
            partial(judged, shape, dtype, generate, causal),
        )
        for name, shape, dtype, generate, causal in CASES
    ),
)
