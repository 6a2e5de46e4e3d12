"""ReLU and ReLU² attention, forward and backward: o_i = Σ_j relu(scale · q_i·k_j)^power v_j / normalizer.

(Wortsman et al., "Replacing softmax with ReLU in Vision Transformers", arXiv 2309.08586, where the normaliser
is the sequence length; squared ReLU after So et al., "Primer", arXiv 2109.08668.) The derivative of relu at 0
is 0, PyTorch's convention. The three kernels are those of :mod:`attnproof.kernels.pointwise`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import check_attention_tensors, check_finite, check_positive
from attnproof.kernels.pointwise import MAX_HEAD_DIM, ScoreFunction, Weighting, pointwise_attention
from attnproof.properties.contract import Contract, ContractError, Precision, Supports, promises

__all__ = ["attention"]


# Comparisons are such that a NaN stays one: max(NaN, 0) is 0 on a GPU.
@triton.jit
def relu(b_x):
    return tl.where(b_x <= 0, 0.0, b_x)


@triton.jit
def relu_and_slope(b_x):
    return tl.where(b_x <= 0, 0.0, b_x), tl.where(b_x <= 0, 0.0, 1.0)


@triton.jit
def squared(b_x):
    b_r = tl.where(b_x <= 0, 0.0, b_x)
    return b_r * b_r


@triton.jit
def squared_and_slope(b_x):
    b_r = tl.where(b_x <= 0, 0.0, b_x)
    return b_r * b_r, 2.0 * b_r


FUNCTIONS = {
    1: ScoreFunction(weight=relu, weight_and_slope=relu_and_slope, unit=1.0, bounded=False),
    2: ScoreFunction(weight=squared, weight_and_slope=squared_and_slope, unit=1.0, bounded=False),
}


# Stricter than the default for half precision: q and k enter their matmul as they are, scaled afterwards.
@promises(
    Contract(
        family="relu",
        options=("causal", "normalizer", "power"),
        supports=Supports(max_head_dim=MAX_HEAD_DIM),
        precision=Precision(matmul_input="ieee"),
    )
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    normalizer: float | None = None,
    power: int = 1,
    block_m: int | None = None,
    block_n: int | None = None,
) -> torch.Tensor:
    """ReLU attention of q (B,H,M,D) over k (B,G,N,D), v (B,G,N,E), differentiable in all three.

    Args:
        q, k, v: float32, float16 or bfloat16, all three alike; any strides; D and E from 1 to 256; H a
            multiple of G.
        scale: factor of q·k.
        causal: query i sees key j when j ≤ i + N − M.
        normalizer: divides the sum over keys; None stands for 1.
        power: 1, or 2 for squared ReLU.
        block_m, block_n: sides of the tile, queries and keys, in place of the kernel's choice.

    Returns:
        o (B,H,M,E) of q's dtype; 0 in a row without keys.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    check_attention_tensors(q, k, v, "attention")
    check_finite("scale", scale, "attention")
    check_positive("normalizer", normalizer, "attention")
    if power not in FUNCTIONS:
        raise ContractError(f"attention: power={power!r}: expected 1, or 2 for squared ReLU")
    weighting = Weighting(
        function=FUNCTIONS[power],
        scale=scale,
        offset=0.0,
        divisor=1.0 if normalizer is None else float(normalizer),
        causal=causal,
        block_m=block_m,
        block_n=block_n,
    )
    return pointwise_attention(q, k, v, weighting, "attention")
