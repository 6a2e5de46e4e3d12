"""Log-sum-exp without the shift: an example that must be found out."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import check_rows
from attnproof.kernels.logsumexp import COLUMNS, ROWS
from attnproof.properties.contract import Contract, promises

__all__ = ["unshifted_logsumexp"]

INF: tl.constexpr = tl.constexpr(math.inf)


@triton.jit(do_not_specialize=["s_xr", "s_xn", "R", "N"])
def unshifted_kernel(p_x, p_y, s_xr: tl.int64, s_xn: tl.int64, R, N, BR: tl.constexpr, BN: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < R
    b_sum = tl.zeros([BR], dtype=tl.float32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_x = m_r[:, None] & (o_n < N)[None, :]
        b_x = tl.load(p_x + (o_r * s_xr)[:, None] + (o_n.to(tl.int64) * s_xn)[None, :], mask=m_x, other=-INF)
        b_sum += tl.sum(tl.exp(b_x.to(tl.float32)), 1)
    tl.store(p_y + o_r, tl.log(b_sum).to(p_y.dtype.element_ty), mask=m_r)


@promises(Contract(family="logsumexp"))
def unshifted_logsumexp(x: torch.Tensor) -> torch.Tensor:
    """log Σ_j exp x_j over the last axis, with no maximum subtracted.

    Fails, by theory LSE-3 and LSE-4, where Σ exp x leaves the range of float32: +inf for an x above 88.7,
    −inf where all x lie below −104 (and few digits from −87 on, where exp is subnormal). Right, and as
    accurate as the shifted form, in between.

    Args:
        x: (…, N) float32, float16 or bfloat16.

    Returns:
        (…) of x's dtype.
    """
    rows = check_rows(x, "unshifted_logsumexp")
    y = torch.empty(x.shape[:-1], dtype=x.dtype, device=x.device)
    if y.numel():
        unshifted_kernel[(triton.cdiv(rows.shape[0], ROWS),)](
            rows, y, *rows.stride(), *rows.shape, BR=ROWS, BN=COLUMNS
        )
    return y
