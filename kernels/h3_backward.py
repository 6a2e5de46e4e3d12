"""The Triton kernels of H3: a filter of the keys, attention weighted by lags, and gradients by the weights.

    k'_t = Σ_{i<T} taps_i ∘ k_{t−i} + d_shift ∘ k_t,   o_t = Σ_{s ≤ t} (q_t·k'_s) W_{t−s} v_s

With x_i·y_j for the products of two sequences, :func:`weighted_kernel` forms Σ_j W_{|i−j|} (x_i·y_j) z_j over
j ≤ i or, REVERSE, j ≥ i. Output and gradients are that map four times:

    o of (q, k', v),   dq of (do, v, k'),   dk' of (v, do, q) reversed,   dv of (k', q, do) reversed

dW_i sums (q_t·k'_s)(do_t·v_s) over t − s = i. In a tile whose rows begin j blocks after its columns, the lag
is j·BT + row − column, whatever the tile: :func:`lag_tiles_kernel` adds up all tiles of the same j, entry by
entry, and :func:`lags_kernel` adds what lies on one diagonal. No order depends on the run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnproof.kernels.softmax import isolated
from attnproof.kernels.states import register_limit

__all__ = ["TILE", "filtered", "tap_gradients", "weight_gradients", "weighted"]

# Positions and channels a tile, and a step of the sums over channels.
TILE = 32

RUNTIME = [
    "p_x", "p_y", "p_z", "p_w", "p_do", "p_v", "p_taps", "p_skip", "p_out", "p_tiles",
    "s_xb", "s_xh", "s_xn", "s_xd", "s_yb", "s_yh", "s_yn", "s_yd", "s_zb", "s_zh", "s_zn", "s_ze",
    "s_ob", "s_oh", "s_on", "s_oe", "B", "H", "N", "D", "E", "T", "J",
]  # fmt: skip


@triton.jit
def products(
    p_x, p_y, s_xn, s_xd, s_yn, s_yd, o_x, o_y, N, D, BX: tl.constexpr, BY: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """[BX, BY]: x_i·y_j of rows o_x and o_y over all D channels, BD at a time; 0 beyond N."""
    b_s = tl.zeros([BX, BY], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_x = tl.load(
            p_x + o_x[:, None] * s_xn + o_d[None, :] * s_xd,
            mask=(o_x < N)[:, None] & (o_d < D)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        b_y = tl.load(
            p_y + o_y[None, :] * s_yn + o_d[:, None] * s_yd,
            mask=(o_y < N)[None, :] & (o_d < D)[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        b_s = tl.dot(b_x, b_y, b_s, input_precision="ieee")
    return b_s


@triton.jit(do_not_specialize=RUNTIME)
def filter_kernel(
    p_x, p_taps, p_skip, p_out, s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xd: tl.int64, H, N, D, T,
    REVERSE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out_t = Σ_{i<T} taps_i ∘ x_{t−i} (REVERSE: x_{t+i}) + skip ∘ x_t, in float32; taps (H,D,T)."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_h = i_bh % H
    p_x += i_bh // H * s_xb + i_h * s_xh
    # [BN, 1], [1, BD]
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)[:, None]
    o_d = tl.program_id(2) * BD + tl.arange(0, BD)[None, :]
    m_d = o_d < D
    b_y = tl.zeros([BN, BD], dtype=tl.float32)
    for i_t in range(T):
        o_x = o_n + i_t if REVERSE else o_n - i_t
        m_x = (o_x >= 0) & (o_x < N) & m_d
        b_x = tl.load(p_x + o_x * s_xn + o_d * s_xd, mask=m_x, other=0.0).to(tl.float32)
        b_t = tl.load(p_taps + (i_h * D + o_d) * T + i_t, mask=m_d, other=0.0).to(tl.float32)
        b_y += b_x * b_t
    if p_skip is not None:
        b_x = tl.load(p_x + o_n * s_xn + o_d * s_xd, mask=(o_n < N) & m_d, other=0.0).to(tl.float32)
        b_y += b_x * tl.load(p_skip + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_out + (i_bh * N + o_n) * D + o_d, b_y, mask=(o_n < N) & m_d)


@triton.jit(do_not_specialize=RUNTIME)
def tap_gradient_kernel(
    p_x, p_y, p_out,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xd: tl.int64,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yd: tl.int64, B, H, N, D,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[:, :, i] = Σ_b Σ_t y_t ∘ x_{t−i} of contiguous (H,D,I), one lag i a program."""
    i_h, i_lag = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # [BN, 1], [1, BD]
    o_t, o_d = tl.arange(0, BN)[:, None], tl.program_id(2) * BD + tl.arange(0, BD)[None, :]
    m_d = o_d < D
    b_g = tl.zeros([BN, BD], dtype=tl.float32)
    for i_b in range(B):
        p_xb, p_yb = p_x + i_b * s_xb + i_h * s_xh, p_y + i_b * s_yb + i_h * s_yh
        for i_n in range(i_lag, N, BN):
            o_n = i_n + o_t
            m_n = (o_n < N) & m_d
            b_y = tl.load(p_yb + o_n * s_yn + o_d * s_yd, mask=m_n, other=0.0).to(tl.float32)
            b_g += b_y * tl.load(p_xb + (o_n - i_lag) * s_xn + o_d * s_xd, mask=m_n, other=0.0).to(tl.float32)
    b_g = tl.sum(b_g, 0, keep_dims=True)
    tl.store(p_out + (i_h * D + o_d) * tl.num_programs(1) + i_lag, b_g, mask=m_d)


@triton.jit(do_not_specialize=RUNTIME)
def weighted_kernel(
    p_x, p_y, p_z, p_w, p_out,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xd: tl.int64,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yd: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_ze: tl.int64, H, N, D, E,
    REVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_j W_{|i−j|} (x_i·y_j) z_j for BM rows and BE channels; w (H,N), out contiguous (B,H,N,E)."""
    i_bh, i_m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    p_x += i_b * s_xb + i_h * s_xh
    p_y += i_b * s_yb + i_h * s_yh
    p_z += i_b * s_zb + i_h * s_zh
    p_w += i_h * N
    o_m, o_e = i_m * BM + tl.arange(0, BM), tl.program_id(2) * BE + tl.arange(0, BE)
    m_e = o_e < E
    if REVERSE:
        i_first, i_stop = i_m * BM, N
    else:
        i_first, i_stop = 0, tl.minimum(N, i_m * BM + BM)
    b_o, b_nan = tl.zeros([BM, BE], dtype=tl.float32), tl.zeros([BM], dtype=tl.float32)
    for i_n in range(i_first, i_stop, BN):
        o_n = i_n + tl.arange(0, BN)
        # [BM, BN]
        b_s = products(p_x, p_y, s_xn, s_xd, s_yn, s_yd, o_m, o_n, N, D, BM, BN, BD)
        o_lag = o_n[None, :] - o_m[:, None] if REVERSE else o_m[:, None] - o_n[None, :]
        m_s = (o_lag >= 0) & (o_m < N)[:, None] & (o_n < N)[None, :]
        b_s = tl.where(m_s, b_s * tl.load(p_w + o_lag, mask=m_s, other=0.0), 0.0)
        # [BN, BE]: what a row does not see reaches it neither as 0·inf
        b_z = tl.load(
            p_z + o_n[:, None] * s_zn + o_e[None, :] * s_ze, mask=(o_n < N)[:, None] & m_e[None, :], other=0.0
        ).to(tl.float32)
        b_z, b_nan = isolated(b_z, m_s, b_nan)
        b_o = tl.dot(b_s, b_z, b_o, input_precision="ieee")
    o_o = (i_bh * N + o_m[:, None]) * E + o_e[None, :]
    b_o += b_nan[:, None]
    tl.store(p_out + o_o, b_o.to(p_out.dtype.element_ty), mask=(o_m < N)[:, None] & m_e[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def lag_tiles_kernel(
    p_x, p_y, p_do, p_v, p_tiles,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xd: tl.int64,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yd: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_on: tl.int64, s_oe: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_ze: tl.int64, H, N, D, E,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """tiles[b, h, j] = Σ over tiles, j blocks below the diagonal, of (x_t·y_s)(do_t·v_s): [BT, BT]."""
    i_bh, i_j, n_j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i_b, i_h = i_bh // H, i_bh % H
    p_x += i_b * s_xb + i_h * s_xh
    p_y += i_b * s_yb + i_h * s_yh
    p_do += i_b * s_ob + i_h * s_oh
    p_v += i_b * s_zb + i_h * s_zh
    o_t = tl.arange(0, BT)
    b_g = tl.zeros([BT, BT], dtype=tl.float32)
    for i_m in range(i_j, n_j):
        o_m, o_n = i_m * BT + o_t, (i_m - i_j) * BT + o_t
        b_s = products(p_x, p_y, s_xn, s_xd, s_yn, s_yd, o_m, o_n, N, D, BT, BT, BD)
        b_g += b_s * products(p_do, p_v, s_on, s_oe, s_zn, s_ze, o_m, o_n, N, E, BT, BT, BD)
    tl.store(p_tiles + ((i_bh * n_j + i_j) * BT + o_t[:, None]) * BT + o_t[None, :], b_g)


@triton.jit(do_not_specialize=RUNTIME)
def lags_kernel(p_tiles, p_out, B, H, N, BT: tl.constexpr):
    """out (H,N): entry j·BT + i sums tiles[b, h, j] on diagonal i, and tiles[b, h, j + 1] on i − BT."""
    i_h, i_j, n_j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    # [BT, 1] lags, [1, BT] columns: each lag has one row in each column, in the one tile or the other
    o_i, o_c = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    o_r = o_i + o_c
    m_next = o_r >= BT
    b_k = tl.zeros([BT, BT], dtype=tl.float32)
    for i_b in range(B):
        p_area = p_tiles + ((i_b * H + i_h) * n_j + i_j) * BT * BT
        # row BT + r of one tile is row r of the next
        b_k += tl.load(p_area + o_r * BT + o_c, mask=(i_j + 1 < n_j) | ~m_next, other=0.0)
    b_k = tl.sum(b_k, 1, keep_dims=True)
    o_n = i_j * BT + o_i
    tl.store(p_out + i_h * N + o_n, b_k, mask=o_n < N)


def filtered(
    x: torch.Tensor, taps: torch.Tensor, skip: torch.Tensor | None, *, reverse: bool
) -> torch.Tensor:
    """Σ_i taps_i ∘ x_{t−i} + skip ∘ x_t of x (B,H,N,D), taps (H,D,T) and skip (H,D), contiguous, in float32;
    ``reverse`` for the transpose, x_{t+i}.
    """
    batch, heads, length, width = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if out.numel():
        grid = (batch * heads, triton.cdiv(length, TILE), triton.cdiv(width, TILE))
        filter_kernel[grid](
            x, taps, skip, out, *x.stride(), heads, length, width, taps.shape[2], REVERSE=reverse, BN=TILE,
            BD=TILE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def tap_gradients(x: torch.Tensor, dy: torch.Tensor, lags: int) -> torch.Tensor:
    """Σ_b Σ_t dy_t ∘ x_{t−i} for i < ``lags``, float32 (H,D,lags), of x and dy (B,H,N,D)."""
    batch, heads, length, width = x.shape
    out = torch.empty((heads, width, lags), dtype=torch.float32, device=x.device)
    if out.numel():
        tap_gradient_kernel[(heads, lags, triton.cdiv(width, TILE))](
            x, dy, out, *x.stride(), *dy.stride(), batch, heads, length, width, BN=TILE, BD=TILE, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def weighted(
    x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, w: torch.Tensor, like: torch.Tensor, *, reverse: bool
) -> torch.Tensor:
    """Σ_j W_{|i−j|} (x_i·y_j) z_j of x, y (B,H,N,D), z (B,H,N,E) and w (H,N), in the dtype of ``like``."""
    batch, heads, length, width = x.shape
    out = torch.empty(z.shape, dtype=like.dtype, device=z.device)
    if out.numel():
        grid = (batch * heads, triton.cdiv(length, TILE), triton.cdiv(z.shape[3], TILE))
        weighted_kernel[grid](
            x, y, z, w, out, *x.stride(), *y.stride(), *z.stride(), heads, length, width, z.shape[3],
            REVERSE=reverse, BM=TILE, BN=TILE, BD=TILE, BE=TILE, num_warps=4, num_stages=1,
            enable_fp_fusion=False, **register_limit(4),
        )  # fmt: skip
    return out


def weight_gradients(x: torch.Tensor, y: torch.Tensor, do: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Σ (x_t·y_s)(do_t·v_s) over the batch and t − s = i, float32 (H,N)."""
    batch, heads, length, width = x.shape
    out = torch.zeros((heads, length), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(length, TILE)
    if batch and out.numel():
        tiles = torch.empty((batch, heads, blocks, TILE, TILE), dtype=torch.float32, device=x.device)
        lag_tiles_kernel[(batch * heads, blocks)](
            x, y, do, v, tiles, *x.stride(), *y.stride(), *do.stride(), *v.stride(), heads, length, width,
            v.shape[3], BT=TILE, BD=TILE, num_warps=4, num_stages=1, enable_fp_fusion=False,
            **register_limit(4),
        )  # fmt: skip
        lags_kernel[(heads, blocks)](
            tiles, out, batch, heads, length, BT=TILE, num_warps=4, enable_fp_fusion=False
        )
    return out
