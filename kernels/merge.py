"""One result from the attention of one query over several sets of keys: split-KV decoding, cascades, rings.

    lse = log Σ_s exp lse_s,   o = Σ_s exp(lse_s − lse)·o_s

(theory ONL-4). A set without keys has lse_s = −inf and counts nothing, also where every set is empty (bugs
B03, B04).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.tiles import padded_width

__all__ = ["merged"]

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))
INF: tl.constexpr = tl.constexpr(math.inf)
ROWS = 16


@triton.jit(
    do_not_specialize=["p_po", "p_plse", "p_sinks", "p_o", "p_lse", "s_sink", "ROWS", "M", "H", "E", "SPLITS"]
)
def merge_kernel(
    p_po,
    p_plse,
    p_sinks,
    p_o,
    p_lse,
    s_sink: tl.int64,
    ROWS,
    M,
    H,
    E,
    SPLITS,
    BM: tl.constexpr,
    BE: tl.constexpr,
):
    """(o, lse) of SPLITS sets of keys as one: lse = log Σ_s exp lse_s, o = Σ_s exp(lse_s − lse)·o_s."""
    o_r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_e = tl.arange(0, BE)
    m_r = o_r < ROWS
    m_re = m_r[:, None] & (o_e < E)[None, :]
    b_max = tl.full([BM], -INF, dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_o = tl.zeros([BM, BE], dtype=tl.float32)
    if p_sinks is not None:
        b_max = tl.load(p_sinks + (o_r // M) % H * s_sink, mask=m_r, other=0.0).to(tl.float32)
        b_sum += 1.0  # exp2(0); where the sink is −inf the first set with keys scales it away
    for i_s in range(SPLITS):
        o_s = i_s * tl.cast(ROWS, tl.int64) + o_r
        b_lse = tl.load(p_plse + o_s, mask=m_r, other=-INF)
        # [BM, BE]
        b_po = tl.load(p_po + (o_s * E)[:, None] + o_e[None, :], mask=m_re, other=0.0)
        b_new = tl.maximum(b_max, b_lse)
        # an empty split has lse −inf and weight 0, also when every split so far is empty
        b_shift = tl.where(b_new == -INF, 0.0, b_new)
        b_w = tl.exp2((b_lse - b_shift) * LOG2E)
        b_alpha = tl.exp2((b_max - b_shift) * LOG2E)
        b_o = b_o * b_alpha[:, None] + b_po * b_w[:, None]
        b_sum = b_sum * b_alpha + b_w
        b_max = b_new
    b_total = tl.where(b_sum == 0, 1.0, b_sum)
    b_o = b_o / b_total[:, None]
    tl.store(p_o + (o_r * E)[:, None] + o_e[None, :], b_o.to(p_o.dtype.element_ty), mask=m_re)
    tl.store(p_lse + o_r, b_max + tl.log2(b_total) * LN2, mask=m_r)


def merged(
    partial_o: torch.Tensor,
    partial_lse: torch.Tensor,
    dtype: torch.dtype,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) over the union of S disjoint sets of keys.

    Args:
        partial_o: (S,B,H,M,E) float32, contiguous, each normalised over its own set.
        partial_lse: (S,B,H,M) float32, contiguous; −inf for a set without keys, whose o must be finite.
        dtype: of the result o.
        sinks: (H,) one more logit in each row's normaliser, without a value.

    Returns:
        o (B,H,M,E) of ``dtype``, lse (B,H,M) float32; zeros and −inf for a row without keys.
    """
    splits, batch, heads, queries, width = partial_o.shape
    o = torch.empty((batch, heads, queries, width), dtype=dtype, device=partial_o.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=partial_o.device)
    if lse.numel():
        merge_kernel[(triton.cdiv(lse.numel(), ROWS),)](
            partial_o, partial_lse, sinks, o, lse, 0 if sinks is None else sinks.stride(0),
            lse.numel(), queries, heads, width, splits,
            BM=ROWS, BE=padded_width(width), enable_fp_fusion=False,
        )  # fmt: skip
    return o, lse
