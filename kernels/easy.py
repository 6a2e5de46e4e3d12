"""Easy attention, forward and backward: o_bhi = Σ_j α_hij v_bhj, the scores α learned and not computed.

    dV_bhj = Σ_i α_hij dO_bhi,   dα_hij = Σ_b dO_bhi·v_bhj

(Sanchis-Agudo et al., "Easy attention: A simple attention mechanism for temporal predictions with
transformers", arXiv 2308.12874; theory EASY-1.) One score matrix a head serves the whole batch. Only scores
with |i − j| ≤ band are used where a band is given: tiles outside it are skipped, scores outside it are never
read. The band is symmetric, so dV is the forward kernel on α transposed. The sum over the batch in dα has one
owner and one order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_block, check_floating
from attnproof.kernels.softmax import isolated
from attnproof.kernels.tiles import ALIGNED, ANY, Tiles, memory_layout, padded_width, tiles_for
from attnproof.properties.contract import Contract, ContractError, Precision, Supports, promises

__all__ = ["attention"]

# Sizes and strides are run-time values: what depends on them is told to the compiler by LAYOUT alone.
RUNTIME = [
    "p_o", "p_da", "s_ah", "s_am", "s_an", "s_vb", "s_vh", "s_vn", "s_ve", "s_ob", "s_oh", "s_om", "s_oe",
    "B", "H", "N", "E", "band",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def mixture_kernel(
    p_a, p_v, p_o,
    s_ah: tl.int64, s_am: tl.int64, s_an: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    H, N, E, band,
    BANDED: tl.constexpr, TRANSPOSED: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    i_bh, i_m = tl.program_id(0), tl.program_id(1) * BM
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    if LAYOUT > 0:
        s_ve = 1
        if TRANSPOSED:
            s_am = 1
        else:
            s_an = 1
    if LAYOUT > 1:  # strides come divided by 16: the multiplication tells the compiler that rows are aligned
        s_ah, s_vb, s_vh, s_vn = s_ah * 16, s_vb * 16, s_vh * 16, s_vn * 16
        if TRANSPOSED:
            s_an = s_an * 16
        else:
            s_am = s_am * 16
    p_a += i_h * s_ah
    p_v += i_b * s_vb + i_h * s_vh
    o_m, o_e = i_m + tl.arange(0, BM), tl.arange(0, BE)

    t0, t1 = 0, (N + BN - 1) // BN
    if BANDED:
        t0 = tl.maximum(i_m - band, 0) // BN
        t1 = (tl.minimum(i_m + BM + band, N) + BN - 1) // BN
    # [BM]: NaN in rows that saw a non-finite value
    b_nan = tl.zeros([BM], dtype=tl.float32)
    # [BM, BE]
    b_o = tl.zeros([BM, BE], dtype=tl.float32)
    for i_t in range(t0, t1):
        o_n = i_t * BN + tl.arange(0, BN)
        m_a = (o_m < N)[:, None] & (o_n < N)[None, :]
        if BANDED:
            m_a = m_a & (tl.abs(o_m[:, None] - o_n[None, :]) <= band)
        m_v = (o_e < E)[None, :] & (o_n < N)[:, None] if PAD_E else (o_n < N)[:, None]
        # [BM, BN], [BN, BE]
        o_a = (o_m.to(tl.int64) * s_am)[:, None] + (o_n.to(tl.int64) * s_an)[None, :]
        b_a = tl.load(p_a + o_a, mask=m_a, other=0.0)
        o_v = (o_n.to(tl.int64) * s_vn)[:, None] + (o_e * s_ve)[None, :]
        b_v = tl.load(p_v + o_v, mask=m_v, other=0.0)
        if BANDED:
            b_v, b_nan = isolated(b_v, m_a, b_nan)
        b_o = tl.dot(b_a, b_v, b_o, input_precision="ieee")

    b_o += b_nan[:, None]
    m_o = (o_m < N)[:, None] & (o_e < E)[None, :]
    o_row = i_bh.to(tl.int64) * N + o_m
    tl.store(p_o + (o_row * E)[:, None] + o_e[None, :], b_o.to(p_o.dtype.element_ty), mask=m_o)


@triton.jit(do_not_specialize=RUNTIME)
def score_gradient_kernel(
    p_v, p_do, p_da,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    B, N, E, band,
    BANDED: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0).to(tl.int64)
    i_m, i_n = tl.program_id(1) * BM, tl.program_id(2) * BN
    if LAYOUT > 0:
        s_ve, s_oe = 1, 1
    if LAYOUT > 1:
        s_vb, s_vh, s_vn = s_vb * 16, s_vh * 16, s_vn * 16
        s_ob, s_oh, s_om = s_ob * 16, s_oh * 16, s_om * 16
    o_m, o_n, o_e = i_m + tl.arange(0, BM), i_n + tl.arange(0, BN), tl.arange(0, BE)
    # [BM, BE], [BE, BN]
    m_o = (o_m < N)[:, None] & (o_e < E)[None, :] if PAD_E else (o_m < N)[:, None]
    m_v = (o_n < N)[None, :] & (o_e < E)[:, None] if PAD_E else (o_n < N)[None, :]
    o_o = i_h * s_oh + (o_m.to(tl.int64) * s_om)[:, None] + (o_e * s_oe)[None, :]
    o_v = i_h * s_vh + (o_n.to(tl.int64) * s_vn)[None, :] + (o_e * s_ve)[:, None]

    m_a = (o_m < N)[:, None] & (o_n < N)[None, :]
    pieces = B
    if BANDED:
        m_b = tl.abs(o_m[:, None] - o_n[None, :]) <= band
        # a tile outside the band gets its zeros without a product
        pieces = B * ((i_m - band < i_n + BN) & (i_n - band < i_m + BM)).to(tl.int32)
    # [BM, BN]
    b_da = tl.zeros([BM, BN], dtype=tl.float32)
    for i_b in range(pieces):
        b_do = tl.load(p_do + i_b * s_ob + o_o, mask=m_o, other=0.0)
        b_v = tl.load(p_v + i_b * s_vb + o_v, mask=m_v, other=0.0)
        b_da = tl.dot(b_do, b_v, b_da, input_precision="ieee")
    if BANDED:
        b_da = tl.where(m_b, b_da, 0.0)
    o_row = i_h * N + o_m
    tl.store(p_da + (o_row * N)[:, None] + o_n[None, :], b_da.to(p_da.dtype.element_ty), mask=m_a)


def scaled_strides(x: torch.Tensor, layout: int) -> list[int]:
    """Strides of ``x``, all but that of the last axis in units of 16 elements where ``layout`` is ALIGNED."""
    unit = 16 if layout == ALIGNED else 1
    return [s // unit for s in x.stride()[:-1]] + [x.stride(-1)]


def mix(alpha: torch.Tensor, x: torch.Tensor, band: int | None, tiles: Tiles, *, transposed: bool) -> Any:
    """Σ_j α_hij x_bhj, or with α transposed Σ_i α_hij x_bhi, as a new tensor of x's shape (B,H,N,E)."""
    batch, heads, length, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    layout = memory_layout(alpha, x)
    by_head, by_row, by_column = scaled_strides(alpha, layout)
    mixture_kernel[(batch * heads, triton.cdiv(length, tiles.block_m))](
        alpha, x, out, by_head, *((by_column, by_row) if transposed else (by_row, by_column)),
        *scaled_strides(x, layout), heads, length, width, band or 0,
        BANDED=band is not None, TRANSPOSED=transposed, PAD_E=width != padded_width(width), LAYOUT=layout,
        BM=tiles.block_m, BN=tiles.block_n, BE=padded_width(width),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def score_gradient(v: torch.Tensor, do: torch.Tensor, band: int | None, tiles: Tiles) -> Any:
    """dα (H,N,N) = Σ_b dO_b V_bᵀ, summed over the batch in float32, 0 outside the band."""
    batch, heads, length, width = v.shape
    dalpha = torch.empty((heads, length, length), dtype=v.dtype, device=v.device)
    if dalpha.numel() == 0:
        return dalpha
    layout = memory_layout(v, do)
    grid = (heads, triton.cdiv(length, tiles.block_m), triton.cdiv(length, tiles.block_n))
    score_gradient_kernel[grid](
        v, do, dalpha, *scaled_strides(v, layout), *scaled_strides(do, layout), batch, length, width,
        band or 0, BANDED=band is not None, PAD_E=width != padded_width(width), LAYOUT=layout,
        BM=tiles.block_m, BN=tiles.block_n, BE=padded_width(width),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return dalpha


class EasyAttention(torch.autograd.Function):
    """α and v to o."""

    @staticmethod
    def forward(
        ctx: Any, alpha: torch.Tensor, v: torch.Tensor, band: int | None, tiles: Tiles
    ) -> torch.Tensor:
        ctx.save_for_backward(alpha, v)
        ctx.band, ctx.tiles = band, tiles
        o: torch.Tensor = mix(alpha, v, band, tiles, transposed=False)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        alpha, v = ctx.saved_tensors
        need_alpha, need_v, *_ = ctx.needs_input_grad
        dalpha = score_gradient(v, do, ctx.band, ctx.tiles) if need_alpha else None
        dv = mix(alpha, do, ctx.band, ctx.tiles, transposed=True) if need_v else None
        return dalpha, dv, None, None


def check_scores(alpha: torch.Tensor, v: torch.Tensor, band: int | None) -> None:
    """Raise unless alpha (H,N,N) and v (B,H,N,E) fit together, E ≤ 256, and the band is a width or None."""
    for name, x, axes in (("alpha", alpha, "(H, N, N)"), ("v", v, "(B, H, N, E)")):
        check_floating(name, x, "attention")
        if x.ndim != axes.count(",") + 1:
            raise ContractError(f"attention: {name} has shape {tuple(x.shape)}: expected axes {axes}")
    if alpha.dtype != v.dtype or alpha.device != v.device:
        raise ContractError(
            f"attention: alpha is {alpha.dtype} on {alpha.device} while v is {v.dtype} on {v.device}: "
            "bring both to one dtype and device"
        )
    heads, length, width = v.shape[1:]
    if tuple(alpha.shape) != (heads, length, length):
        raise ContractError(
            f"attention: alpha has shape {tuple(alpha.shape)} with v {tuple(v.shape)}: expected one score "
            f"a head, row and column, (H, N, N) = {(heads, length, length)}"
        )
    if width < 1:
        raise ContractError(f"attention: v {tuple(v.shape)}: width E is 0: expected 1 to {MAX_HEAD_DIM}")
    if width > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"attention: v {tuple(v.shape)}: width E is {width}: this kernel goes up to {MAX_HEAD_DIM}"
        )
    if band is not None and (isinstance(band, bool) or not isinstance(band, int) or band < 0):
        raise ContractError(
            f"attention: band={band!r}: expected a number of positions ≥ 0, or None for all scores"
        )


@promises(
    Contract(
        family="easy",
        options=("band",),
        supports=Supports(max_head_dim=MAX_HEAD_DIM),
        precision=Precision(matmul_input="ieee"),
    )
)
def attention(
    alpha: torch.Tensor,
    v: torch.Tensor,
    *,
    band: int | None = None,
    block_m: int | None = None,
    block_n: int | None = None,
) -> torch.Tensor:
    """Values v (B,H,N,E) mixed by learned scores alpha (H,N,N), differentiable in both.

    Args:
        alpha, v: float32, float16 or bfloat16, both alike; any strides; E from 1 to 256.
        band: only scores with |i − j| ≤ band count; None uses all.
        block_m, block_n: sides of the tile of scores in place of the kernel's choice.

    Returns:
        o (B,H,N,E) of v's dtype. The gradient of alpha is 0 outside the band.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for E above 256.
    """
    check_scores(alpha, v, band)
    scattered = memory_layout(alpha, v) == ANY
    tiles = tiles_for(v.dtype, 16, v.shape[3], "ieee", scattered=scattered)
    tiles = tiles._replace(block_m=block_m or 32, block_n=block_n or 32)
    check_block("block_m", tiles.block_m, "attention")
    check_block("block_n", tiles.block_n, "attention")
    # a band as wide as the matrix masks nothing, and a caller's 2**40 would not fit the kernel's positions
    if band is not None and band >= v.shape[2]:
        band = None
    o: torch.Tensor = EasyAttention.apply(alpha, v, band, tiles)  # type: ignore[no-untyped-call]
    return o
