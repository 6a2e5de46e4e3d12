"""Softmax over the last axis in two sweeps: the normaliser online, then the quotient.

    y_j = exp(x_j − m) / Σ_k exp(x_k − m),   m = max x

The first sweep is that of :mod:`attnproof.kernels.logsumexp` (Milakov & Gimelshein, arXiv 1805.02867,
Algorithm 3: three memory accesses an element where the three-pass form makes four). Dividing keeps every y to
a few units in the last place; the division-free exp(x − log Σ exp x) does not (Blanchard, Higham & Higham
2021, Theorem 3.4).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import check_rows
from attnproof.kernels.logsumexp import COLUMNS, ROWS, running_sum
from attnproof.properties.contract import Contract, promises

__all__ = ["softmax_rows"]

INF: tl.constexpr = tl.constexpr(math.inf)


@triton.jit(do_not_specialize=["s_xr", "s_xn", "R", "N"])
def softmax_rows_kernel(p_x, p_y, s_xr: tl.int64, s_xn: tl.int64, R, N, BR: tl.constexpr, BN: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < R
    p_x += o_r * s_xr
    b_max, b_sum = running_sum(p_x, s_xn, m_r, N, BR, BN)
    # a wholly masked row has the maximum −inf and the sum 0: it becomes 0 / 1
    b_shift = tl.where(b_max == -INF, 0.0, b_max)
    b_total = tl.where(b_sum == 0, 1.0, b_sum)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        # [BR, BN]
        m_x = m_r[:, None] & (o_n < N)[None, :]
        b_x = tl.load(p_x[:, None] + (o_n.to(tl.int64) * s_xn)[None, :], mask=m_x, other=-INF).to(tl.float32)
        b_y = tl.exp(b_x - b_shift[:, None]) / b_total[:, None]
        tl.store(p_y + (o_r * N)[:, None] + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_x)


@promises(Contract(family="softmax_rows"))
def softmax_rows(x: torch.Tensor) -> torch.Tensor:
    """exp x_j / Σ_k exp x_k over the last axis.

    Args:
        x: (…, N) float32, float16 or bfloat16, any strides (a copy is made only where the leading axes cannot
            be seen as one). −inf entries are masked.

    Returns:
        (…, N) of x's dtype, computed in float32; zeros for a row that is wholly masked.

    Raises:
        ContractError: if x has no axis, or a dtype that is not floating.
        NotImplementedError: for float64.
    """
    rows = check_rows(x, "softmax_rows")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        softmax_rows_kernel[(triton.cdiv(rows.shape[0], ROWS),)](
            rows, y, *rows.stride(), *rows.shape, BR=ROWS, BN=COLUMNS, enable_fp_fusion=False
        )
    return y
