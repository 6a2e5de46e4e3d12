"""Sigmoid attention, forward and backward: o_i = Σ_j σ(scale · q_i·k_j + bias) v_j.

(Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv 2409.04431.) The
bias −log N keeps the norm of o that softmax has at initialisation (theory SIG-3); N counts all keys of the
call, whatever a causal mask hides. The three kernels are those of :mod:`attnproof.kernels.pointwise`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import check_attention_tensors, check_finite
from attnproof.kernels.pointwise import MAX_HEAD_DIM, ScoreFunction, Weighting, pointwise_attention
from attnproof.properties.contract import Contract, Precision, Supports, promises

__all__ = ["SIGMOID", "attention", "offset_of"]


@triton.jit
def sigmoid(b_x):
    """σ of x in bits, 1 / (1 + 2^−x), from t = 2^−|x|, which never overflows.

    Each side keeps all its digits: σ → t for x → −∞ down to the last subnormal. In bits, the score's own
    rounding is the only one in the argument of exp2.
    """
    b_t = tl.exp2(-tl.abs(b_x))
    return tl.where(b_x < 0, b_t, 1.0) / (1.0 + b_t)


@triton.jit
def sigmoid_and_slope(b_x):
    """σ and σ' = t / (1 + t)². σ·(1 − σ) would lose every digit where σ rounds to 1, x > 17 nats (B63)."""
    b_t = tl.exp2(-tl.abs(b_x))
    b_r = 1.0 + b_t
    return tl.where(b_x < 0, b_t, 1.0) / b_r, b_t / (b_r * b_r)


FUNCTION = ScoreFunction(
    weight=sigmoid, weight_and_slope=sigmoid_and_slope, unit=math.log2(math.e), bounded=True
)

# Stricter than the default for half precision: q and k enter their matmul as they are, scaled afterwards.
SIGMOID = Contract(
    family="sigmoid",
    options=("bias", "causal"),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
    precision=Precision(matmul_input="ieee"),
)


def offset_of(bias: float | None, keys: int, kernel: str) -> float:
    """The number added to every score: ``bias``, or −log ``keys`` in its place."""
    if bias is None:
        return -math.log(max(keys, 1))
    check_finite("bias", bias, kernel)
    return float(bias)


@promises(SIGMOID)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    bias: float | None = None,
    causal: bool = False,
    block_m: int | None = None,
    block_n: int | None = None,
) -> torch.Tensor:
    """Sigmoid attention of q (B,H,M,D) over k (B,G,N,D), v (B,G,N,E), differentiable in all three.

    Args:
        q, k, v: float32, float16 or bfloat16, all three alike; any strides; D and E from 1 to 256; H a
            multiple of G.
        scale: factor of q·k.
        bias: added to every scaled score; None stands for −log N.
        causal: query i sees key j when j ≤ i + N − M.
        block_m, block_n: sides of the tile, queries and keys, in place of the kernel's choice.

    Returns:
        o (B,H,M,E) of q's dtype; 0 in a row without keys.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    check_attention_tensors(q, k, v, "attention")
    check_finite("scale", scale, "attention")
    weighting = Weighting(
        function=FUNCTION,
        scale=scale,
        offset=offset_of(bias, k.shape[2], "attention"),
        divisor=1.0,
        causal=causal,
        block_m=block_m,
        block_n=block_n,
    )
    return pointwise_attention(q, k, v, weighting, "attention")
