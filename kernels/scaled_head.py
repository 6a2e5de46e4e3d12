"""Scaled-head attention (Nguyen et al. 2023, "A primal-dual framework for transformers and neural networks",
Attention-SH; theory PD-3), forward and backward: pooling here, softmax attention from
:mod:`attnproof.kernels.softmax`.

    o_h = softmax(scale · q_h k̄_hᵀ) v̄_h,   k̄_hw = mean of k_j over w·p ≤ j < min((w + 1)·p, N),   p = pool[h]

and v̄ alike; the last window averages what is left. Averages are float32, rounded once to the inputs' dtype.

Pooled keys of all heads lie in one buffer, (B, T, D) with T = Σ_h ⌈N / pool[h]⌉, heads of equal pool side by
side, so that one launch pools and one spreads gradients; each set of equal pools is a view of it and takes
one softmax attention. Every query head has a pooled copy of its own, also where heads share keys.

Backward: k_j is in one window of each head, so dk_j = Σ_h dk̄_h,w(j) / count_w(j), summed over the heads of
the group by one program, in float32 and in one order, and rounded once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from attnproof.kernels import softmax
from attnproof.kernels.arguments import ContractError, check_attention_tensors
from attnproof.kernels.tiles import padded_width
from attnproof.properties.contract import Contract, Supports, promises

__all__ = ["attention"]

KERNEL = "scaled-head attention"
ROWS = 32  # windows, or positions, a program


@triton.jit(do_not_specialize=["s_xb", "s_xh", "s_xn", "s_xd", "H", "GROUP", "N", "D", "T"])
def pooling_kernel(
    p_x, p_pool, p_start, p_y, s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xd: tl.int64,
    H, GROUP, N, D, T, BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Means of x (B,G,N,D) over the windows of every query head, into y (B,T,D)."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    pool = tl.load(p_pool + i_h)
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)
    o_d = tl.arange(0, BD)
    m_w = o_w < (N + pool - 1) // pool
    m_d = o_d < D
    p_x += i_b * s_xb + i_h // GROUP * s_xh
    # [BW, BD]
    b_sum = tl.zeros([BW, BD], dtype=tl.float32)
    for i_r in range(pool):
        o_n = tl.where(m_w, o_w, 0) * pool + i_r  # a window that does not exist must not overflow int32
        m_x = (m_w & (o_n < N))[:, None] & m_d[None, :]
        b_sum += tl.load(p_x + (o_n * s_xn)[:, None] + (o_d * s_xd)[None, :], mask=m_x, other=0.0).to(
            tl.float32
        )
    b_count = tl.where(m_w, tl.minimum(pool, N - tl.where(m_w, o_w, 0) * pool), 1).to(tl.float32)
    b_y = tl.div_rn(b_sum, tl.zeros_like(b_sum) + b_count[:, None])
    o_y = ((i_b * T + tl.load(p_start + i_h) + o_w) * D)[:, None] + o_d[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_w[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["s_gb", "s_gt", "s_gd", "G", "GROUP", "N", "D"])
def spreading_kernel(
    p_g, p_pool, p_start, p_dx, s_gb: tl.int64, s_gt: tl.int64, s_gd: tl.int64, G, GROUP, N, D,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx (B,G,N,D): each position's share of the gradient of its window, over the heads of its group."""
    i_bg = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n = o_n < N
    m_x = m_n[:, None] & (o_d < D)[None, :]
    p_g += i_bg // G * s_gb
    # [BN, BD]
    b_dx = tl.zeros([BN, BD], dtype=tl.float32)
    for i_group in range(GROUP):
        i_h = i_bg % G * GROUP + i_group
        pool = tl.load(p_pool + i_h)
        o_w = o_n // pool
        b_count = tl.where(m_n, tl.minimum(pool, N - o_w * pool), 1).to(tl.float32)
        o_g = ((tl.load(p_start + i_h) + o_w) * s_gt)[:, None] + (o_d * s_gd)[None, :]
        b_g = tl.load(p_g + o_g, mask=m_x, other=0.0).to(tl.float32)
        b_dx += tl.div_rn(b_g, tl.zeros_like(b_g) + b_count[:, None])
    o_x = ((i_bg * N + o_n) * D)[:, None] + o_d[None, :]
    tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each head's windows lie in the buffer of all pooled rows.

    Attributes:
        pools: (H,) widths of windows, none above max(N, 1): a wider window is one of N.
        sets: heads of equal pool, in the order in which their windows lie.
        starts: (H,) first row of each head.
        windows: (H,) number of rows of each head.
    """

    pools: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    windows: tuple[int, ...]

    @classmethod
    def of(cls, pool: tuple[int, ...], keys: int) -> Packing:
        """The packing of N = ``keys`` positions under ``pool``."""
        pools = tuple(min(p, max(keys, 1)) for p in pool)
        windows = tuple(-(-keys // p) for p in pools)
        order = sorted(range(len(pools)), key=pools.__getitem__)
        ends = itertools.accumulate(windows[h] for h in order)
        starts = {h: end - windows[h] for h, end in zip(order, ends, strict=True)}
        sets = tuple(tuple(heads) for _, heads in itertools.groupby(order, key=pools.__getitem__))
        return cls(pools, sets, tuple(starts[h] for h in range(len(pools))), windows)


class Pooling(torch.autograd.Function):
    """Means over windows, packed; the gradient of a mean is shared by its window."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """(B,T,D) of x's dtype from x (B,G,N,D)."""
        batch, groups, length, width = x.shape
        heads, total = len(packing.pools), sum(packing.windows)
        table = torch.tensor([packing.pools, packing.starts], dtype=torch.int32, device=x.device)
        y = torch.empty((batch, total, width), dtype=x.dtype, device=x.device)
        if y.numel():
            pooling_kernel[(batch * heads, triton.cdiv(max(packing.windows), ROWS))](
                x, table[0], table[1], y, *x.stride(), heads, heads // groups, length, width, total,
                BW=ROWS, BD=padded_width(width), enable_fp_fusion=False,
            )  # fmt: skip
        ctx.table, ctx.shape = table, x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        """dx (B,G,N,D) from the cotangent g (B,T,D), any strides."""
        batch, groups, length, width = ctx.shape
        dx = torch.empty(ctx.shape, dtype=g.dtype, device=g.device)
        if dx.numel():
            spreading_kernel[(batch * groups, triton.cdiv(length, ROWS))](
                g, ctx.table[0], ctx.table[1], dx, *g.stride(), groups, ctx.table.shape[1] // groups, length,
                width, BN=ROWS, BD=padded_width(width), enable_fp_fusion=False,
            )  # fmt: skip
        return dx, None


def check_pool(pool: tuple[int, ...], heads: int) -> None:
    """Raise unless ``pool`` holds one window width ≥ 1 for each query head."""
    if not isinstance(pool, tuple | list) or len(pool) != heads:
        raise ContractError(
            f"{KERNEL}: pool={pool!r}: expected one window width a query head, {heads} of them"
        )
    for width in pool:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ContractError(f"{KERNEL}: pool={pool!r}: each window is a number of positions ≥ 1")


# By default half-precision operands may be rounded to the inputs' dtype before a matmul: here k̄ and v̄ are.
@promises(Contract(family="scaled_head", supports=Supports(max_head_dim=256)))
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, pool: tuple[int, ...]
) -> torch.Tensor:
    """Softmax attention of head h over keys and values averaged in windows of pool[h] positions.

    Differentiable once in q, k and v.

    Args:
        q, k, v: (B,H,M,D), (B,G,N,D), (B,G,N,E) float32, float16 or bfloat16, all alike; any strides; D and E
            from 1 to 256; H a multiple of G.
        scale: factor of q·k̄.
        pool: H window widths ≥ 1; 1 is softmax attention.

    Returns:
        o (B,H,M,E) of q's dtype; 0 where there are no keys.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    check_attention_tensors(q, k, v, KERNEL)
    check_pool(pool, q.shape[1])
    packing = Packing.of(tuple(pool), k.shape[2])
    rows = [len(heads) * packing.windows[heads[0]] for heads in packing.sets]
    queries = torch.split(q, 1, 1)
    outputs: dict[int, torch.Tensor] = {}
    pooled = (torch.split(Pooling.apply(x, packing), rows, 1) for x in (k, v))  # type: ignore[no-untyped-call]
    for heads, k_set, v_set in zip(packing.sets, *pooled, strict=True):
        shape = (len(heads), packing.windows[heads[0]])
        o = softmax.attention(
            torch.cat([queries[h] for h in heads], 1),
            k_set.unflatten(1, shape),
            v_set.unflatten(1, shape),
            scale=scale,
        )
        assert isinstance(o, torch.Tensor)
        outputs.update(zip(heads, torch.split(o, 1, 1), strict=True))
    return torch.cat([outputs[h] for h in range(len(pool))], 1)
