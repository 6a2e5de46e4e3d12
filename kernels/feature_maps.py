"""Feature maps of linear attention and their derivatives, and how wide a head becomes under them.

Four maps act on each entry: elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236), relu, exp and the
identity. Kernels apply them to what they have loaded. Two are products of entries: 'taylor' (Based, Arora et
al., arXiv 2402.18668: φ(q)·φ(k) = 1 + x + x²/2 with x = q·k/√D) and 'squared' (ReBased, Aksenov et al., arXiv
2402.10644, without its learned affine map: φ(q)·φ(k) = (q·k)²). Their features, of widths 1 + D + D² and D²,
are written out in float32 once and then attended to as they are; this is sensible for narrow heads only, so D
ends at 16.

* elu(x) + 1 is exp(x) itself for x ≤ 0: expm1(x) + 1 would lose everything below 2⁻²⁴.
* Slopes at the kinks: relu 0, elu + 1 one.
* Comparisons are such that a NaN stays one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["FEATURE_MAPS", "FeatureMap", "identity", "product_features", "product_features_backward"]

PRODUCT_HEAD_DIM = 16
ROWS = 32

RUNTIME = ["p_x", "p_f", "p_df", "p_dx", "s_b", "s_h", "s_n", "s_d", "H", "N", "D", "F", "first"]


@triton.jit
def identity(b_x):
    return b_x


@triton.jit
def one(b_x):
    return tl.full(b_x.shape, 1.0, tl.float32)


@triton.jit
def relu(b_x):
    return tl.where(b_x <= 0, tl.zeros_like(b_x), b_x)


@triton.jit
def relu_slope(b_x):
    return tl.where(b_x <= 0, 0.0, 1.0)


@triton.jit
def exp(b_x):
    return tl.exp(b_x.to(tl.float32))


@triton.jit
def elu1(b_x):
    b_x = b_x.to(tl.float32)
    # exp of a large positive x overflows, and is not used
    return tl.where(b_x > 0, b_x + 1.0, tl.exp(b_x))


@triton.jit
def elu1_slope(b_x):
    b_x = b_x.to(tl.float32)
    return tl.where(b_x > 0, 1.0, tl.exp(b_x))


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A feature map φ as kernels use it.

    Attributes:
        value: x ↦ φ(x) of a block, or the identity where features are written out beforehand.
        slope: x ↦ φ'(x) of a block, float32, or None where it is not applied inside a kernel.
        first: -1 for a map of single entries; else how many features come before the products x_a x_b.
        max_head_dim: the widest head, or None for no limit of its own.
    """

    value: Any
    slope: Any
    first: int
    max_head_dim: int | None

    @property
    def is_product(self) -> bool:
        """Whether features are products of two entries."""
        return self.first >= 0

    def offset(self, width: int) -> int:
        """Number of features before the products, for heads of ``width``."""
        return 1 + width if self.first > 0 else 0

    def width(self, width: int) -> int:
        """F, the number of features of a head of ``width``."""
        return self.offset(width) + width * width if self.is_product else width


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu1": FeatureMap(elu1, elu1_slope, -1, None),
    "relu": FeatureMap(relu, relu_slope, -1, None),
    "exp": FeatureMap(exp, exp, -1, None),
    "identity": FeatureMap(identity, None, -1, None),
    "taylor": FeatureMap(identity, None, 1, PRODUCT_HEAD_DIM),
    "squared": FeatureMap(identity, None, 0, PRODUCT_HEAD_DIM),
}


@triton.jit(do_not_specialize=RUNTIME)
def product_features_kernel(
    p_x, p_f, s_b: tl.int64, s_h: tl.int64, s_n: tl.int64, s_d: tl.int64,
    H, N, D, F, first, linear, square, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Features 1, linear·x_d, square·x_a x_b of a tile of rows; the first two only if ``first`` is not 0."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_f = tl.program_id(2) * BF + tl.arange(0, BF)
    m_n = o_n < N
    p_row = p_x + i_b * s_b + i_h * s_h + (o_n.to(tl.int64) * s_n)[:, None]
    m_product = m_n[:, None] & ((o_f >= first) & (o_f < F))[None, :]
    # [BN, BF]
    o_ab = tl.maximum(o_f - first, 0)
    b_a = tl.load(p_row + ((o_ab // D) * s_d)[None, :], mask=m_product, other=0.0).to(tl.float32)
    b_b = tl.load(p_row + ((o_ab % D) * s_d)[None, :], mask=m_product, other=0.0).to(tl.float32)
    m_linear = m_n[:, None] & ((o_f > 0) & (o_f < first))[None, :]
    b_x = tl.load(p_row + (tl.maximum(o_f - 1, 0) * s_d)[None, :], mask=m_linear, other=0.0).to(tl.float32)
    b_f = b_a * b_b * square + b_x * linear
    b_f = tl.where(((o_f == 0) & (first > 0))[None, :], 1.0, b_f)
    o_row = (i_bh.to(tl.int64) * N + o_n) * F
    tl.store(p_f + o_row[:, None] + o_f[None, :], b_f, mask=m_n[:, None] & (o_f < F)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def product_features_backward_kernel(
    p_x, p_df, p_dx, s_b: tl.int64, s_h: tl.int64, s_n: tl.int64, s_d: tl.int64,
    H, N, D, F, first, linear, square, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx_a = linear·dφ_a + square·Σ_b (dφ_ab + dφ_ba) x_b of a tile of rows."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_n, o_d = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_n = o_n < N
    m_d = m_n[:, None] & (o_d < D)[None, :]
    p_row = p_x + i_b * s_b + i_h * s_h + o_n.to(tl.int64) * s_n
    o_row = i_bh.to(tl.int64) * N + o_n
    p_dfd = p_df + (o_row * F)[:, None]
    # [BN, BD]
    b_dx = tl.load(p_dfd + (1 + o_d)[None, :], mask=m_d & (first > 0), other=0.0) * linear
    for i_d in range(D):
        b_x = tl.load(p_row + i_d * s_d, mask=m_n, other=0.0).to(tl.float32)
        b_df = tl.load(p_dfd + (first + o_d * D + i_d)[None, :], mask=m_d, other=0.0)
        b_df += tl.load(p_dfd + (first + i_d * D + o_d)[None, :], mask=m_d, other=0.0)
        b_dx += b_df * (b_x * square)[:, None]
    tl.store(p_dx + (o_row * D)[:, None] + o_d[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_d)


def factors(feature_map: FeatureMap, width: int) -> tuple[float, float]:
    """The factors of x_a and of x_a x_b: D^(−1/4) and (2D)^(−1/2) for 'taylor', 0 and 1 for 'squared'."""
    return (float(width**-0.25), float((2 * width) ** -0.5)) if feature_map.first > 0 else (0.0, 1.0)


def product_features(x: torch.Tensor, feature_map: FeatureMap) -> torch.Tensor:
    """φ(x) (B,H,N,F) in float32, for x (B,H,N,D) of any dtype and strides and a map of products."""
    batch, heads, length, width = x.shape
    wide = feature_map.width(width)
    features = torch.empty((batch, heads, length, wide), dtype=torch.float32, device=x.device)
    if features.numel():
        block = 32  # of 64 sm_80 spills 32 bytes in float16
        grid = (batch * heads, triton.cdiv(length, ROWS), triton.cdiv(wide, block))
        product_features_kernel[grid](
            x, features, *x.stride(), heads, length, width, wide, feature_map.offset(width),
            *factors(feature_map, width), BN=ROWS, BF=block, enable_fp_fusion=False,
        )  # fmt: skip
    return features


def product_features_backward(x: torch.Tensor, df: torch.Tensor, feature_map: FeatureMap) -> torch.Tensor:
    """dx, of x's shape and dtype, from dφ ``df`` (B,H,N,F) float32, contiguous."""
    batch, heads, length, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        product_features_backward_kernel[(batch * heads, triton.cdiv(length, ROWS))](
            x, df, dx, *x.stride(), heads, length, width, feature_map.width(width),
            feature_map.offset(width), *factors(feature_map, width), BN=ROWS,
            BD=max(16, triton.next_power_of_2(width)), enable_fp_fusion=False,
        )  # fmt: skip
    return dx
