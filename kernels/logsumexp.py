"""Log-sum-exp over the last axis, in one pass: a running maximum m and a running sum l of exp(x − m).

    y = log Σ_j exp x_j = m + log l

A tile of the row at a time: m' = max(m, max x), l' = l·exp(m − m') + Σ exp(x − m') (Milakov & Gimelshein,
arXiv 1805.02867, Algorithm 3; the form with the maximum subtracted is Blanchard, Higham & Higham, IMA J.
Numer. Anal. 41 (2021), Algorithm 4.1). The sum lies in [1, N], so neither exp nor the sum can overflow.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import check_rows
from attnproof.properties.contract import Contract, promises

__all__ = ["logsumexp"]

INF: tl.constexpr = tl.constexpr(math.inf)
ROWS, COLUMNS = 4, 256  # a tile: eight elements a thread at four warps, one row a warp


@triton.jit
def running_sum(p_x, s_xn, m_r, N, BR: tl.constexpr, BN: tl.constexpr):
    """(m, l) of the rows that start at p_x [BR]: m = max x, l = Σ exp(x − m); (−inf, 0) where all is −inf."""
    b_max = tl.full([BR], -INF, dtype=tl.float32)
    b_sum = tl.zeros([BR], dtype=tl.float32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        # [BR, BN]
        m_x = m_r[:, None] & (o_n < N)[None, :]
        b_x = tl.load(p_x[:, None] + (o_n.to(tl.int64) * s_xn)[None, :], mask=m_x, other=-INF).to(tl.float32)
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        # a row whose every entry so far is −inf subtracts 0: −inf − −inf would be NaN
        b_shift = tl.where(b_new == -INF, 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_x - b_shift[:, None]), 1)
        b_max = b_new
    return b_max, b_sum


@triton.jit(do_not_specialize=["s_xr", "s_xn", "R", "N"])
def logsumexp_kernel(p_x, p_y, s_xr: tl.int64, s_xn: tl.int64, R, N, BR: tl.constexpr, BN: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < R
    b_max, b_sum = running_sum(p_x + o_r * s_xr, s_xn, m_r, N, BR, BN)
    b_y = b_max + tl.log(tl.where(b_sum == 0, 1.0, b_sum))
    tl.store(p_y + o_r, b_y.to(p_y.dtype.element_ty), mask=m_r)


@promises(Contract(family="logsumexp"))
def logsumexp(x: torch.Tensor) -> torch.Tensor:
    """log Σ_j exp x_j over the last axis.

    Args:
        x: (…, N) float32, float16 or bfloat16, any strides (a copy is made only where the leading axes cannot
            be seen as one). −inf entries are masked.

    Returns:
        (…) of x's dtype, computed in float32; −inf for a row that is empty or wholly masked.

    Raises:
        ContractError: if x has no axis, or a dtype that is not floating.
        NotImplementedError: for float64.
    """
    rows = check_rows(x, "logsumexp")
    y = torch.empty(x.shape[:-1], dtype=x.dtype, device=x.device)
    if y.numel():
        logsumexp_kernel[(triton.cdiv(rows.shape[0], ROWS),)](
            rows, y, *rows.stride(), *rows.shape, BR=ROWS, BN=COLUMNS, enable_fp_fusion=False
        )
    return y
