"""KernelBench, level 1 task 97: one shape of uniform inputs, allclose.

Source: ScalingIntelligence/KernelBench 423217d (2026-03-05, v0.2), src/kernelbench/eval.py
(``get_tolerance_for_precision``, ``run_and_check_correctness``) and
KernelBench/level1/97_ScaledDotProductAttention.py. The reference model runs first, then the candidate, on the
same tensors; shapes must agree; torch.allclose(reference, candidate) with atol = rtol = 1e-4 in float32, 1e-2
in float16 and bfloat16. Trial seeds come from seed 42; its scripts ask for 5 trials (the function's own
default is 1).

Kept: torch.rand inputs, 512 keys and queries, no mask, torch's attention as the reference, tolerances, seeds,
order of the calls. One peer a precision, as a run evaluates one; "fp32" is the project's default. Reduced: 32
× 32 heads → 3 × 4, head dimension 1024 → 128 (kernels here take up to 256): scores stay as uniform, since
their spread over keys is 1/6 whatever D is. Left out: the static checker of sources, the timing, the flag on
excessive speedups.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.quality.peers.peer import Kernel, PeerTest, Rejection, Shape, SuitePeer

__all__ = ["KERNELBENCH_FP16", "KERNELBENCH_FP32", "compare_outputs", "trial_seeds"]

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}
TRIALS = 5


def trial_seeds(trials: int) -> list[int]:
    """The seeds of the trials, drawn from seed 42; robust-kbench draws the same."""
    torch.manual_seed(42)
    return [int(torch.randint(0, 2**32 - 1, (1,)).item()) for _ in range(trials)]


def compare_outputs(reference: torch.Tensor, out: torch.Tensor, tolerance: float) -> None:
    """KernelBench's comparison of one output."""
    if not isinstance(out, torch.Tensor) or out.shape != reference.shape:
        raise Rejection(f"shape or type mismatch: {getattr(out, 'shape', type(out).__name__)}")
    if not torch.allclose(reference.float(), out.float(), atol=tolerance, rtol=tolerance):
        error = float((reference.float() - out.float()).abs().max())
        raise Rejection(f"allclose at {tolerance} fails, max error {error:.3g}")


def judged(dtype: str, shape: Shape, kernel: Kernel) -> None:
    """All trials of one precision."""
    with torch.no_grad():
        for seed in trial_seeds(TRIALS):
            torch.manual_seed(seed)
            q, k, v = (x.to(getattr(torch, dtype)) for x in shape.draw(torch.rand, "float32"))
            torch.manual_seed((seed + 1) % 2**32)
            reference = scaled_dot_product_attention(q, k, v)
            torch.manual_seed((seed + 1) % 2**32)
            compare_outputs(reference, kernel(q, k, v, scale=shape.width**-0.5), TOLERANCE[dtype])


def peer(name: str, dtype: str) -> SuitePeer:
    """The peer of one precision."""
    shape = Shape(512, 512, 128, heads=4, batch=3)
    test = PeerTest(f"{shape}, {TRIALS} trials", dtype, frozenset(), partial(judged, dtype, shape))
    source = "ScalingIntelligence/KernelBench src/kernelbench/eval.py 423217d (v0.2), level1/97"
    return SuitePeer(name, source, (test,))


KERNELBENCH_FP32 = peer("kernelbench-fp32", "float32")
KERNELBENCH_FP16 = peer("kernelbench-fp16", "float16")
