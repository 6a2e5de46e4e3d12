"""Softmax over rows in two forms that theory calls wrong in some regimes: examples that must be found out."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import check_rows
from attnproof.kernels.logsumexp import COLUMNS, ROWS, logsumexp
from attnproof.properties.contract import Contract, promises

__all__ = ["division_free_softmax_rows", "unshifted_softmax_rows"]

INF: tl.constexpr = tl.constexpr(math.inf)


@triton.jit(do_not_specialize=["s_xr", "s_xn", "R", "N"])
def unshifted_kernel(p_x, p_y, s_xr: tl.int64, s_xn: tl.int64, R, N, BR: tl.constexpr, BN: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    p_x += o_r * s_xr
    b_sum = tl.zeros([BR], dtype=tl.float32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_x = (o_r < R)[:, None] & (o_n < N)[None, :]
        b_x = tl.load(p_x[:, None] + (o_n.to(tl.int64) * s_xn)[None, :], mask=m_x, other=-INF).to(tl.float32)
        b_sum += tl.sum(tl.exp(b_x), 1)
    b_total = tl.where(b_sum == 0, 1.0, b_sum)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_x = (o_r < R)[:, None] & (o_n < N)[None, :]
        b_x = tl.load(p_x[:, None] + (o_n.to(tl.int64) * s_xn)[None, :], mask=m_x, other=-INF).to(tl.float32)
        b_y = tl.exp(b_x) / b_total[:, None]
        tl.store(p_y + (o_r * N)[:, None] + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["s_xr", "s_xn", "R", "N"])
def division_free_kernel(
    p_x, p_norm, p_y, s_xr: tl.int64, s_xn: tl.int64, R, N, BR: tl.constexpr, BN: tl.constexpr
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    p_x += o_r * s_xr
    b_norm = tl.load(p_norm + o_r, mask=o_r < R, other=0.0).to(tl.float32)
    b_norm = tl.where(b_norm == -INF, 0.0, b_norm)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_x = (o_r < R)[:, None] & (o_n < N)[None, :]
        b_x = tl.load(p_x[:, None] + (o_n.to(tl.int64) * s_xn)[None, :], mask=m_x, other=-INF).to(tl.float32)
        b_y = tl.exp(b_x - b_norm[:, None])
        tl.store(p_y + (o_r * N)[:, None] + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_x)


@promises(Contract(family="softmax_rows"))
def unshifted_softmax_rows(x: torch.Tensor) -> torch.Tensor:
    """exp x_j / Σ_k exp x_k over the last axis, with no maximum subtracted.

    Fails, by theory LSE-4, for an x above 88.7 (inf/inf) and where a whole row lies below −87 (0/0, here 0).
    Right, and as accurate as the shifted form, in between.

    Args:
        x: (…, N) float32, float16 or bfloat16.

    Returns:
        (…, N) of x's dtype.
    """
    rows = check_rows(x, "unshifted_softmax_rows")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        unshifted_kernel[(triton.cdiv(rows.shape[0], ROWS),)](
            rows, y, *rows.stride(), *rows.shape, BR=ROWS, BN=COLUMNS
        )
    return y


@promises(Contract(family="softmax_rows"))
def division_free_softmax_rows(x: torch.Tensor) -> torch.Tensor:
    """exp(x_j − y) with y = log Σ_k exp x_k stored in the dtype of x: no division, and no accuracy for large
    y.

    By theory LSE-5 and LSE-7 the rounding of y, u·|y|, becomes a relative error of every entry: x = (1000,
    1000) in float16 gives 0.6064 where 0.5 is right. Fails in float16 and bfloat16 where |y| is a few units
    or more, and in float32 at logits of millions.

    Args:
        x: (…, N) float32, float16 or bfloat16.

    Returns:
        (…, N) of x's dtype.
    """
    rows = check_rows(x, "division_free_softmax_rows")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        division_free_kernel[(triton.cdiv(rows.shape[0], ROWS),)](
            rows, logsumexp(rows), y, *rows.stride(), *rows.shape, BR=ROWS, BN=COLUMNS
        )
    return y
