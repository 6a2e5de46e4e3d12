"""A plain flash-attention forward, small enough to read: for the emulator's tests and its benchmark."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def flash_kernel(p_q, p_k, p_v, p_o, N, scale, D: tl.constexpr, B: tl.constexpr, CAUSAL: tl.constexpr):
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    o_m, o_d = i_m * B + tl.arange(0, B), tl.arange(0, D)
    base = i_h.to(tl.int64) * N * D
    # [B, D]
    b_q = tl.load(p_q + base + o_m[:, None] * D + o_d[None, :], mask=o_m[:, None] < N, other=0.0)
    b_m = tl.full([B], float("-inf"), tl.float32)
    b_l = tl.zeros([B], tl.float32)
    b_o = tl.zeros([B, D], tl.float32)
    end = tl.minimum(N, (i_m + 1) * B) if CAUSAL else N
    for i_n in range(0, end, B):
        o_n = i_n + tl.arange(0, B)
        # [D, B], [B, D]
        b_k = tl.load(p_k + base + o_n[None, :] * D + o_d[:, None], mask=o_n[None, :] < N, other=0.0)
        b_v = tl.load(p_v + base + o_n[:, None] * D + o_d[None, :], mask=o_n[:, None] < N, other=0.0)
        seen = o_n[None, :] < N
        if CAUSAL:
            seen = seen & (o_n[None, :] <= o_m[:, None])
        b_s = tl.where(seen, tl.dot(b_q, b_k) * scale, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_r = tl.exp2(b_m - b_new)
        b_l = b_l * b_r + tl.sum(b_p, 1)
        b_o = b_o * b_r[:, None] + tl.dot(b_p.to(b_v.dtype), b_v)
        b_m = b_new
    b_o = (b_o / b_l[:, None]).to(p_o.dtype.element_ty)
    tl.store(p_o + base + o_m[:, None] * D + o_d[None, :], b_o, mask=o_m[:, None] < N)


def flash(q: Tensor, k: Tensor, v: Tensor, *, tile: int = 64, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √D) v for `[H, N, D]` tensors."""
    heads, length, dim = q.shape
    out = torch.empty_like(q)
    scale = math.log2(math.e) / math.sqrt(dim)
    flash_kernel[(triton.cdiv(length, tile), heads)](q, k, v, out, length, scale, dim, tile, causal)
    return out
