"""Sigmoid attention by the hardware's tanh: an example that must be found out."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import check_attention_tensors, check_finite
from attnproof.kernels.pointwise import ScoreFunction, Weighting, pointwise_attention
from attnproof.kernels.sigmoid import SIGMOID, offset_of
from attnproof.properties.contract import promises

__all__ = ["tanh_sigmoid_attention"]


@triton.jit
def sigmoid(b_x):
    b_t = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * b_x], dtype=tl.float32, is_pure=True, pack=1
    )
    return 0.5 * b_t + 0.5


@triton.jit
def sigmoid_and_slope(b_x):
    b_p = sigmoid(b_x)
    return b_p, b_p * (1 - b_p)


FUNCTION = ScoreFunction(weight=sigmoid, weight_and_slope=sigmoid_and_slope, unit=1.0, bounded=True)


# The instruction is NVIDIA's: there is no such kernel for AMD's GPUs.
@promises(dataclasses.replace(SIGMOID, differentiable=False))
def tanh_sigmoid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    bias: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """FlashSigmoid's σ(x) = 0.5·tanh.approx(x / 2) + 0.5, and σ' = σ (1 − σ) from it.

    (Code of apple/ml-sigmoid-attention.)
    Fails where σ is small. tanh.approx.f32 has a relative error of up to 2^-11 (PTX ISA), which near −1 is
    an absolute one, so σ is off by up to 2^-12 whatever its size: at the bias −log N, where σ ≈ 1 / (N + 1),
    by up to 25 % at N = 1024 and 100 % at N = 4096 (theory SIG-11). Even an exact tanh leaves an error of
    2^-25 after the subtraction, N·2^-25 relative. Fine in float16 and bfloat16 for a few dozen keys.

    Args:
        q, k, v, scale, bias, causal: as :func:`attnproof.kernels.sigmoid.attention`.

    Returns:
        o (B,H,M,E) of q's dtype.
    """
    check_attention_tensors(q, k, v, "tanh_sigmoid_attention")
    check_finite("scale", scale, "tanh_sigmoid_attention")
    weighting = Weighting(
        function=FUNCTION,
        scale=scale,
        offset=offset_of(bias, k.shape[2], "tanh_sigmoid_attention"),
        divisor=1.0,
        causal=causal,
        block_m=None,
        block_n=None,
    )
    return pointwise_attention(q, k, v, weighting, "tanh_sigmoid_attention")
