"""Differential attention, forward: the difference of two softmax attentions on the same values.

    o_i = Σ_j (p¹_ij − λ_h p²_ij) v_j,   p^t_ij = exp(s^t_ij − L^t_i),   s^t_ij = scale · q^t_i·k^t_j

with q¹, q² and k¹, k² the halves of the last axis of q and k (Ye et al., "Differential Transformer", arXiv
2410.05258, eq. 1; the normalisation of heads and the form of λ are the model's business). One walk over the
keys keeps both online softmaxes (:mod:`attnproof.kernels.softmax`), so that V is read once and both partial
outputs stay in float32 until they are subtracted: at λ near 1 and q¹, k¹ near q², k² the outputs cancel, and
two results rounded to half precision would leave only their rounding.

Gradients are the work of :mod:`attnproof.kernels.differential_backward`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import (
    ContractError,
    check_attention_tensors,
    check_finite,
    check_floating,
    key_band,
)
from attnproof.kernels.softmax import isolated, loaded, tile_range
from attnproof.kernels.tiles import ALIGNED, Tiles, memory_layout, padded_width
from attnproof.properties.contract import Contract, Precision, Supports, promises

__all__ = ["attention"]

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
INF: tl.constexpr = tl.constexpr(math.inf)

# Run-time values, which the compiler is told nothing about.
SIZES = ["s_lam", "H", "GROUP", "M", "N", "D", "E", "B"]
STRIDES = [f"s_{x}{axis}" for x, axes in (("q", "bhmd"), ("k", "bhnd"), ("v", "bhne")) for axis in axes]


@triton.jit
def absorbed(b_s, b_max, b_sum, b_o, b_v, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """One more tile of scores in an online softmax; a row whose every score is −inf subtracts 0."""
    # [BM]
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_shift = tl.where(b_new == -INF, 0.0, b_new) if EDGE else b_new
    b_alpha = tl.exp2(b_max - b_shift)
    # [BM, BN]
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_alpha[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_o


@triton.jit(do_not_specialize=["p_partial", "p_row", *SIZES, *STRIDES, "right"])
def forward_kernel(
    p_q, p_k, p_v, p_lam, p_o, p_partial, p_row,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_lam: tl.int64, B, H, GROUP, M, N, D, E, right, score_scale,
    CAUSAL: tl.constexpr, PAD_D: tl.constexpr, PAD_E: tl.constexpr, LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    i_bh, i_m = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_g = (i_bh % H // GROUP).to(tl.int64)
    if LAYOUT > 0:
        s_qd, s_kd, s_ve = 1, 1, 1
    if LAYOUT > 1:  # strides come divided by 16, as in attnproof.kernels.softmax
        s_qb, s_qh, s_qm = s_qb * 16, s_qh * 16, s_qm * 16
        s_kb, s_kh, s_kn = s_kb * 16, s_kh * 16, s_kn * 16
        s_vb, s_vh, s_vn = s_vb * 16, s_vh * 16, s_vn * 16
    HALF = D if PAD_D else BD
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_g * s_kh
    p_v += i_b * s_vb + i_g * s_vh

    o_m = i_m * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_q = o_m < M
    # [BM, BD]
    m_qd = m_q[:, None] & (o_d < D)[None, :]
    o_q = (o_m * s_qm)[:, None] + (o_d * s_qd)[None, :]
    b_q1 = tl.load(p_q + o_q, mask=m_qd, other=0.0)
    b_q2 = tl.load(p_q + HALF * s_qd + o_q, mask=m_qd, other=0.0)
    # [BD, BN], [BN, BE]
    o_k = (o_n.to(tl.int64) * s_kn)[None, :] + (o_d * s_kd)[:, None]
    o_v = (o_n.to(tl.int64) * s_vn)[:, None] + (o_e * s_ve)[None, :]

    # [BM]: running maximum and Σ exp2(score − maximum) of each half, NaN in rows that saw a non-finite value
    b_max1 = tl.full([BM], -INF, dtype=tl.float32)
    b_max2 = tl.full([BM], -INF, dtype=tl.float32)
    b_sum1 = tl.zeros([BM], dtype=tl.float32)
    b_sum2 = tl.zeros([BM], dtype=tl.float32)
    b_nan = tl.zeros([BM], dtype=tl.float32)
    # [BM, BE]
    b_o1 = tl.zeros([BM, BE], dtype=tl.float32)
    b_o2 = tl.zeros([BM, BE], dtype=tl.float32)

    # tiles that every row sees whole come first, then those on the edge of the mask, which lie to their right
    _, t1, _, f1 = tile_range(i_m, 0, M, N, 0, right, (N + BN - 1) // BN, False, CAUSAL, BM, BN)
    for EDGE in tl.static_range(2):
        for i_t in range(f1 if EDGE else 0, t1 if EDGE else f1):
            i_n = i_t * BN
            m_n = i_n + o_n < N
            m_kd = (o_d < D)[:, None] & m_n[None, :] if PAD_D else m_n[None, :]
            m_ve = (o_e < E)[None, :] & m_n[:, None] if PAD_E else m_n[:, None]
            b_k1 = loaded(p_k + i_n * s_kn + o_k, m_kd, EDGE or PAD_D)
            b_k2 = loaded(p_k + HALF * s_kd + i_n * s_kn + o_k, m_kd, EDGE or PAD_D)
            b_v = loaded(p_v + i_n * s_vn + o_v, m_ve, EDGE or PAD_E)
            # [BM, BN], in bits
            b_s1 = tl.dot(b_q1, b_k1, input_precision=PRECISION) * score_scale
            b_s2 = tl.dot(b_q2, b_k2, input_precision=PRECISION) * score_scale
            if EDGE:
                m_s = m_n[None, :]
                if CAUSAL:
                    m_s = m_s & (i_n + o_n[None, :] <= o_m[:, None] + right)
                b_s1 = tl.where(m_s, b_s1, -INF)
                b_s2 = tl.where(m_s, b_s2, -INF)
                b_v, b_nan = isolated(b_v, m_s, b_nan)
            b_max1, b_sum1, b_o1 = absorbed(b_s1, b_max1, b_sum1, b_o1, b_v, EDGE, PRECISION)
            b_max2, b_sum2, b_o2 = absorbed(b_s2, b_max2, b_sum2, b_o2, b_v, EDGE, PRECISION)

    # a row that saw no key has sums and outputs 0
    b_sum1 = tl.where(b_sum1 == 0, 1.0, b_sum1)
    b_sum2 = tl.where(b_sum2 == 0, 1.0, b_sum2)
    b_o1 = b_o1 / b_sum1[:, None]
    b_o2 = b_o2 / b_sum2[:, None]
    b_lam = tl.load(p_lam + i_h * s_lam).to(tl.float32)
    b_o = (b_o1 - b_lam * b_o2) + b_nan[:, None]
    o_r = i_bh.to(tl.int64) * M + o_m
    o_oe = (o_r * E)[:, None] + o_e[None, :]
    m_oe = m_q[:, None] & (o_e < E)[None, :]
    tl.store(p_o + o_oe, b_o.to(p_o.dtype.element_ty), mask=m_oe)
    if p_partial is not None:
        s_p = tl.cast(B, tl.int64) * H * M
        tl.store(p_partial + o_oe, b_o1, mask=m_oe)
        tl.store(p_partial + s_p * E + o_oe, b_o2, mask=m_oe)
        tl.store(p_row + o_r, tl.where(b_max1 == -INF, 0.0, b_max1), mask=m_q)
        tl.store(p_row + s_p + o_r, tl.where(b_max2 == -INF, 0.0, b_max2), mask=m_q)
        tl.store(p_row + 2 * s_p + o_r, tl.log2(b_sum1), mask=m_q)
        tl.store(p_row + 3 * s_p + o_r, tl.log2(b_sum2), mask=m_q)


class DifferentialAttention(torch.autograd.Function):
    """The two passes for autograd; between them stay both partial outputs and rows' maxima and log-sums."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lam: torch.Tensor,
        scale: float,
        causal: bool,
        keep: bool,
    ) -> torch.Tensor:
        """Fill o (B,H,M,E), and with ``keep`` partial outputs (2,B,H,M,E) and row statistics (4,B,H,M)."""
        o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
        partial = row = None
        if keep:
            partial = torch.empty((2, *o.shape), dtype=torch.float32, device=q.device)
            row = torch.empty((4, *o.shape[:3]), dtype=torch.float32, device=q.device)
            ctx.save_for_backward(q, k, v, lam, partial, row)
        ctx.scale, ctx.causal = scale, causal
        if o.numel():
            tiles = forward_tiles(q.dtype, q.shape[3] // 2, v.shape[3])
            layout = memory_layout(q, k, v)
            forward_kernel[(o.shape[0] * o.shape[1], triton.cdiv(o.shape[2], tiles.block_m))](
                q, k, v, lam, o, partial, row, *strides(q, k, v, unit=16 if layout == ALIGNED else 1),
                lam.stride(0), *sizes(q, k, v), diagonal(q, k, causal), scale * LOG2E.value,
                CAUSAL=causal, PAD_D=padded_width(q.shape[3] // 2) * 2 != q.shape[3],
                PAD_E=padded_width(v.shape[3]) != v.shape[3], LAYOUT=layout, **blocks(q, v, tiles),
            )  # fmt: skip
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dq, dk, dv, dλ from the cotangent g (B,H,M,E), any strides."""
        from attnproof.kernels.differential_backward import gradients  # which is built on this module

        q, k, v, lam, partial, row = ctx.saved_tensors
        found = gradients(q, k, v, lam, partial, row, g, scale=ctx.scale, causal=ctx.causal)
        return (*found, None, None, None)


def strides(*tensors: torch.Tensor, unit: int = 1) -> list[int]:
    """Strides as the kernels take them: all but the last of each tensor in units of ``unit`` elements."""
    return [s for x in tensors for s in (*(outer // unit for outer in x.stride()[:-1]), x.stride(-1))]


def sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    """(B, H, GROUP, M, N, D, E), with D the width of one half."""
    batch, heads, queries, width = q.shape
    return batch, heads, heads // k.shape[1], queries, k.shape[2], width // 2, v.shape[3]


def diagonal(q: torch.Tensor, k: torch.Tensor, causal: bool) -> int:
    """Query i sees keys up to i plus this, where ``causal``: aligned bottom right."""
    band = key_band(
        q.shape[2], k.shape[2], causal=causal, window=None, causal_alignment="bottom-right",
        kernel="differential attention",
    )  # fmt: skip
    return band.right or 0


def blocks(q: torch.Tensor, v: torch.Tensor, tiles: Tiles) -> dict[str, Any]:
    """The compile-time arguments that all launches share."""
    return {
        "PRECISION": "ieee",
        "BM": tiles.block_m,
        "BN": tiles.block_n,
        "BD": padded_width(q.shape[3] // 2),
        "BE": padded_width(v.shape[3]),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": False,
    }


def forward_tiles(dtype: torch.dtype, width: int, value_width: int) -> Tiles:
    """The tile of the forward kernel, which holds two tiles of queries and two of outputs.

    Measured as in :func:`attnproof.kernels.tiles.tiles_for`: no register is spilled up to a width of 128.
    """
    wide = max(padded_width(width), padded_width(value_width)) > 64
    exact = dtype == torch.float32
    rows = 16 if exact else 32 if wide else 64
    return Tiles(rows, 32, num_warps=8 if wide or not exact else 4, num_stages=1)


def check_halves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lam: torch.Tensor) -> None:
    """Raise unless q (B,H,M,2D), k (B,G,N,2D), v (B,G,N,E) and lam (H,) fit together, with D, E ≤ 256."""
    kernel = "differential attention"
    for name, x in (("q", q), ("k", k)):
        check_floating(name, x, kernel)
        if x.ndim != 4 or x.shape[3] % 2:
            raise ContractError(
                f"{kernel}: {name} has shape {tuple(x.shape)}: expected (batch, heads, length, 2D), two "
                "halves of one width on the last axis"
            )
    if q.shape[3] != k.shape[3]:
        raise ContractError(
            f"{kernel}: q {tuple(q.shape)}, k {tuple(k.shape)}: q and k must agree in the last axis, 2D"
        )
    half = q.shape[3] // 2
    check_attention_tensors(q[..., :half], k[..., :half], v, kernel)
    check_floating("lam", lam, kernel)
    if tuple(lam.shape) != (q.shape[1],) or lam.dtype != q.dtype or lam.device != q.device:
        raise ContractError(
            f"{kernel}: lam is {lam.dtype} of shape {tuple(lam.shape)} on {lam.device}: expected one a query "
            f"head, ({q.shape[1]},), of q's dtype {q.dtype}, on {q.device}"
        )


@promises(
    Contract(
        family="differential",
        precision=Precision(matmul_input="ieee"),  # q, k and v enter their matmuls as they are
        options=("causal",),
        supports=Supports(max_head_dim=256),
    )
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lam: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(scale·q¹k¹ᵀ) v − λ_h softmax(scale·q²k²ᵀ) v, differentiable once in q, k, v and lam.

    Args:
        q, k, v: (B,H,M,2D), (B,G,N,2D), (B,G,N,E) float32, float16 or bfloat16, all alike; any strides; D and
            E from 1 to 256; H a multiple of G. The halves of the last axis of q and k are q¹, q² and k¹, k².
        lam: (H,) λ of each query head, of q's dtype.
        scale: factor of q^t·k^t.
        causal: query i sees key j when j ≤ i + N − M.

    Returns:
        o (B,H,M,E) of q's dtype, the difference rounded once; 0 in a row without keys.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    check_halves(q, k, v, lam)
    check_finite("scale", scale, "differential attention")
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, lam))
    o: torch.Tensor = DifferentialAttention.apply(q, k, v, lam, scale, causal, keep)  # type: ignore[no-untyped-call]
    return o
