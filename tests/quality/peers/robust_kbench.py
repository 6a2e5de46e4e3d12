"""robust-kbench: KernelBench tightened to 1e-5, the candidate run before and after the reference.

Source: SakanaAI/robust-kbench 078f5ba (2025-11-22), robust_kbench/sandbox/correct_forward_fn.py and
robust_kbench/primitives/forward/cuda_correct.py (read in the fork LeoXinhaoLee/robust-kbench-fork, b84c1746).
Five seeds drawn from seed 42; candidate, reference and candidate again on the same tensors; both results must
be torch.allclose(reference, candidate) at atol = rtol = 1e-5; float32 alone (its tasks are float32).

Kept: all of that, and several input settings. Not available: an attention task of that project; its task
filters (standard deviation of outputs above 0.01 in all and along each axis) rule out KernelBench's uniform
inputs, so inputs are randn, in three settings chosen here. Left out: the LLM that looks for redundancy in
tasks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.quality.peers.kernelbench import trial_seeds
from tests.quality.peers.peer import Kernel, PeerTest, Rejection, Shape, SuitePeer

__all__ = ["ROBUST_KBENCH"]

TOLERANCE = 1e-5
TRIALS = 5


def judged(shape: Shape, kernel: Kernel) -> None:
    """All seeds of one input setting."""
    with torch.no_grad():
        for seed in trial_seeds(TRIALS):
            torch.manual_seed(seed)
            q, k, v = shape.draw(torch.randn, "float32")
            before = kernel(q, k, v, scale=shape.width**-0.5)
            reference = scaled_dot_product_attention(q, k, v)
            after = kernel(q, k, v, scale=shape.width**-0.5)
            for moment, out in (("before", before), ("after", after)):
                if not torch.allclose(reference, out, atol=TOLERANCE, rtol=TOLERANCE):
                    error = float((reference - out).abs().max())
                    raise Rejection(
                        f"run {moment} the reference: allclose at 1e-5 fails, max error {error:.3g}"
                    )


ROBUST_KBENCH = SuitePeer(
    "robust-kbench",
    "SakanaAI/robust-kbench robust_kbench/sandbox/correct_forward_fn.py 078f5ba",
    tuple(
        PeerTest(f"{shape}, {TRIALS} seeds", "float32", frozenset(), partial(judged, shape))
        for shape in (Shape(64, 64, 128, heads=4, batch=4), Shape(256, 256, 64), Shape(128, 512, 32))
    ),
)
