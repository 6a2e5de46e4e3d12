"""Attention on batch-normalised queries and keys (Nguyen et al. 2023, "A primal-dual framework for
transformers and neural networks", Attention-BN), forward and backward: statistics and normalisation here,
softmax attention from :mod:`attnproof.kernels.softmax`.

    o_i = softmax_j(scale · q'_i·k'_j) v_j,   q' = (q − β_h μ)/s,   k' = (k − β_h μ)/s,
    μ_d = mean_j k_jd,   s_d = √(var_j k_jd + eps)   over the N keys of a batch entry and key/value head

Three choices make it accurate where keys share a large offset:

* The softmax does not see what all keys have in common (theory PD-2), so keys are centred whole, whatever β:
  k' = (k − μ)/s. Scores change by one number a row; k' has the size of the spread of the keys rather than of
  their offset, and one k' serves all query heads of a group.
* The mean is taken in two steps, Σ k / N and then the mean of what it leaves, and both parts are kept: k − μ
  is right to a few units in *its own* last place. The variance is the mean square of the centred keys, less
  the square of the second step (Chan, Golub & LeVeque, Am. Stat. 37 (1983), eq. 1.7: corrected two-pass).
* The backward formulas use Σ_j dk'_j = 0, which holds because every row of dS sums to 0. Of the two ways in
  which μ enters a score only that through q' is left; with K_d = Σ_j dk'_jd k'_jd = Σ_{h,i} dq'_hid q'_hid

    dq = dq'/s,   dμ = −Σ_h β_h Σ_i dq_hi,   dk_j = (dk'_j − (2/N) K∘k'_j)/s + dμ/N,
    dβ_h = −Σ_b Σ_d μ_d Σ_i dq_hid

  where K takes the keys' side, whose factors are bounded by √N, and not the queries', which the offset makes
  large. Sums are float32, each by one program in one order.

In float16 a power of two moves from q' to k' (exactly: scores keep their value) where s is small: with eps =
1e-5 and constant keys, q − μ = 208 would otherwise overflow in q' and meet k' = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from attnproof.kernels import softmax
from attnproof.kernels.arguments import ContractError, check_attention_tensors, check_floating
from attnproof.kernels.tiles import padded_width
from attnproof.properties.contract import Contract, Supports, promises

__all__ = ["attention"]

KERNEL = "batch-normalised attention"
# A tile of the walks over a whole sequence, and of the pass that only divides.
COLUMNS, CHANNELS, ROWS = 64, 16, 32
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # eps as a normal float32
ROOM = 8  # the power of two that may move from q' to k': k' ≤ 2**8 √N stays below 65504 up to N = 65475


@triton.jit(do_not_specialize=["s_xb", "s_xh", "s_xn", "s_xd", "G", "N", "D"])
def statistics_kernel(
    p_x, p_mean, p_rest, p_over_q, p_over_k,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xd: tl.int64, G, N, D, eps, room,
    VARIANCE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of keys (B,G,N,D), each (B,G,D) float32: the mean in two parts, and what q' and k' are divided by."""
    i_bg = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    p_x += i_bg // G * s_xb + i_bg % G * s_xh
    total = tl.maximum(N, 1).to(tl.float32)
    # [BN, BD]: each lane sums its own keys, the lanes are added at the end
    b_sum = tl.zeros([BN, BD], dtype=tl.float32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_x = (o_n < N)[:, None] & m_d[None, :]
        b_sum += tl.load(p_x + (o_n * s_xn)[:, None] + (o_d * s_xd)[None, :], mask=m_x, other=0.0).to(
            tl.float32
        )
    # [BD]
    b_mean = tl.div_rn(tl.sum(b_sum, 0), total)
    b_sum = tl.zeros([BN, BD], dtype=tl.float32)
    b_square = tl.zeros([BN, BD], dtype=tl.float32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_x = (o_n < N)[:, None] & m_d[None, :]
        b_x = tl.load(p_x + (o_n * s_xn)[:, None] + (o_d * s_xd)[None, :], mask=m_x, other=0.0)
        b_x = tl.where(m_x, b_x.to(tl.float32) - b_mean[None, :], 0.0)
        b_sum += b_x
        b_square += b_x * b_x
    b_rest = tl.div_rn(tl.sum(b_sum, 0), total)
    b_s = tl.full([BD], 1.0, dtype=tl.float32)
    b_two = tl.full([BD], 1.0, dtype=tl.float32)
    if VARIANCE:
        b_variance = tl.maximum(tl.div_rn(tl.sum(b_square, 0), total) - b_rest * b_rest, 0.0)
        b_s = tl.sqrt_rn(b_variance + eps)
        # the power of two in s, taken out of its bits; 1/s of it moves, as far as there is room
        b_power = (b_s.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        b_two = tl.minimum(tl.maximum(tl.div_rn(b_two, b_power), 1.0), room)
    o_y = i_bg * D + o_d
    tl.store(p_mean + o_y, b_mean, mask=m_d)
    tl.store(p_rest + o_y, b_rest, mask=m_d)
    tl.store(p_over_q + o_y, b_s * b_two, mask=m_d)
    tl.store(p_over_k + o_y, tl.div_rn(b_s, b_two), mask=m_d)


@triton.jit(do_not_specialize=["s_xb", "s_xh", "s_xm", "s_xd", "s_beta", "H", "GROUP", "M", "D"])
def normalised_kernel(
    p_x, p_mean, p_rest, p_over, p_beta, p_y,
    s_xb: tl.int64, s_xh: tl.int64, s_xm: tl.int64, s_xd: tl.int64, s_beta: tl.int64, H, GROUP, M, D,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y = (x − β_h μ)/over for x (B,H,M,D), with the statistics of the keys that each head reads."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_x = (o_m < M)[:, None] & m_d[None, :]
    o_s = i_bh // GROUP * D + o_d  # (b·H + h) // GROUP = b·G + g
    b_mean = tl.load(p_mean + o_s, mask=m_d, other=0.0)
    b_rest = tl.load(p_rest + o_s, mask=m_d, other=0.0)
    b_over = tl.load(p_over + o_s, mask=m_d, other=1.0)
    if p_beta is not None:
        b_beta = tl.load(p_beta + i_bh % H * s_beta).to(tl.float32)
        b_mean = b_mean * b_beta
        b_rest = b_rest * b_beta
    # [BM, BD]
    p_x += i_bh // H * s_xb + i_bh % H * s_xh
    b_x = tl.load(p_x + (o_m * s_xm)[:, None] + (o_d * s_xd)[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_y = tl.div_rn((b_x - b_mean[None, :]) - b_rest[None, :], tl.zeros_like(b_x) + b_over[None, :])
    o_y = ((i_bh * M + o_m) * D)[:, None] + o_d[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["s_gb", "s_gh", "s_gm", "s_gd", "H", "GROUP", "M", "D"])
def query_gradient_kernel(
    p_g, p_over, p_dq, p_sum,
    s_gb: tl.int64, s_gh: tl.int64, s_gm: tl.int64, s_gd: tl.int64, H, GROUP, M, D,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq = dq'/s (B,H,M,D) and its sum over the queries (B,H,D) float32."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_over = tl.load(p_over + i_bh // GROUP * D + o_d, mask=m_d, other=1.0)
    p_g += i_bh // H * s_gb + i_bh % H * s_gh
    b_sum = tl.zeros([BM, BD], dtype=tl.float32)
    for i_m in range(0, M, BM):
        o_m = i_m + tl.arange(0, BM)
        m_g = (o_m < M)[:, None] & m_d[None, :]
        b_g = tl.load(p_g + (o_m * s_gm)[:, None] + (o_d * s_gd)[None, :], mask=m_g, other=0.0).to(tl.float32)
        b_dq = tl.div_rn(b_g, tl.zeros_like(b_g) + b_over[None, :])
        b_sum += b_dq
        o_q = ((i_bh * M + o_m) * D)[:, None] + o_d[None, :]
        tl.store(p_dq + o_q, b_dq.to(p_dq.dtype.element_ty), mask=m_g)
    tl.store(p_sum + i_bh * D + o_d, tl.sum(b_sum, 0), mask=m_d)


@triton.jit(
    do_not_specialize=[
        *(f"s_{x}{axis}" for x in "kg" for axis in "bhnd"), "s_beta", "G", "GROUP", "N", "D",
    ]
)  # fmt: skip
def key_gradient_kernel(
    p_k, p_g, p_mean, p_rest, p_over_q, p_over_k, p_beta, p_sum, p_dk,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gd: tl.int64, s_beta: tl.int64, G, GROUP, N, D,
    VARIANCE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dk (B,G,N,D) from dk', the sums of dq of the group's heads, and the keys."""
    i_bg = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    total = tl.maximum(N, 1).to(tl.float32)
    o_s = i_bg * D + o_d
    b_mean = tl.load(p_mean + o_s, mask=m_d, other=0.0)
    b_rest = tl.load(p_rest + o_s, mask=m_d, other=0.0)
    b_over_q = tl.load(p_over_q + o_s, mask=m_d, other=1.0)
    b_over_k = tl.load(p_over_k + o_s, mask=m_d, other=1.0)
    # [BD]: dμ
    b_dmean = tl.zeros([BD], dtype=tl.float32)
    for i_group in range(GROUP):
        b_sum = tl.load(p_sum + (i_bg * GROUP + i_group) * D + o_d, mask=m_d, other=0.0)
        if p_beta is not None:
            b_sum = b_sum * tl.load(p_beta + (i_bg % G * GROUP + i_group) * s_beta).to(tl.float32)
        b_dmean -= b_sum
    p_k += i_bg // G * s_kb + i_bg % G * s_kh
    p_g += i_bg // G * s_gb + i_bg % G * s_gh
    # [BN, BD]: K = Σ_j dk'_j k'_j
    b_sum = tl.zeros([BN, BD], dtype=tl.float32)
    for SWEEP in tl.static_range(0 if VARIANCE else 1, 2):
        b_slope = tl.div_rn(-2 * tl.sum(b_sum, 0), total)
        for i_n in range(0, N, BN):
            o_n = i_n + tl.arange(0, BN)
            m_k = (o_n < N)[:, None] & m_d[None, :]
            b_k = tl.load(p_k + (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :], mask=m_k, other=0.0)
            b_g = tl.load(p_g + (o_n * s_gn)[:, None] + (o_d * s_gd)[None, :], mask=m_k, other=0.0)
            b_g = b_g.to(tl.float32)
            b_c = tl.where(m_k, (b_k.to(tl.float32) - b_mean[None, :]) - b_rest[None, :], 0.0)
            b_c = tl.div_rn(b_c, tl.zeros_like(b_c) + b_over_k[None, :])
            if SWEEP == 0:
                b_sum += b_g * b_c
            else:
                b_dk = tl.div_rn(b_g, tl.zeros_like(b_g) + b_over_k[None, :]) + (b_dmean / total)[None, :]
                if VARIANCE:
                    # k' as the scores see it is b_c less the power of two that was moved to it
                    b_dk += tl.div_rn(b_c * b_slope[None, :], tl.zeros_like(b_c) + b_over_q[None, :])
                o_k = ((i_bg * N + o_n) * D)[:, None] + o_d[None, :]
                tl.store(p_dk + o_k, b_dk.to(p_dk.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["B", "H", "GROUP", "D"])
def beta_gradient_kernel(p_mean, p_rest, p_sum, p_dbeta, B, H, GROUP, D, BD: tl.constexpr):
    """dβ_h = −Σ_b Σ_d μ_d Σ_i dq_hid."""
    i_h = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for i_b in range(B):
        o_s = (i_b * H + i_h) // GROUP * D + o_d
        b_mean = tl.load(p_mean + o_s, mask=m_d, other=0.0) + tl.load(p_rest + o_s, mask=m_d, other=0.0)
        b_sum -= b_mean * tl.load(p_sum + (i_b * H + i_h) * D + o_d, mask=m_d, other=0.0)
    tl.store(p_dbeta + i_h, tl.sum(b_sum, 0).to(p_dbeta.dtype.element_ty))


class Normalisation(torch.autograd.Function):
    """q', k' from q, k and β; the gradients that come back are those of scores in q'·k'."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, beta: torch.Tensor | None, eps: float, variance: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q' (B,H,M,D) and k' (B,G,N,D), contiguous, of q's dtype."""
        batch, groups, keys, width = k.shape
        mean, rest, over_q, over_k = torch.empty(
            (4, batch, groups, width), dtype=torch.float32, device=k.device
        )
        if mean.numel():
            statistics_kernel[(batch * groups, triton.cdiv(width, CHANNELS))](
                k, mean, rest, over_q, over_k, *k.stride(), groups, keys, width, eps,
                2.0**ROOM if q.dtype == torch.float16 and keys < 2 ** (2 * ROOM) - 100 else 1.0,
                VARIANCE=variance, BN=COLUMNS, BD=CHANNELS, enable_fp_fusion=False,
            )  # fmt: skip
        outputs = []
        for x, over, shift in ((q, over_q, beta), (k, over_k, None)):
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            if y.numel():
                heads, rows = x.shape[1:3]
                normalised_kernel[(batch * heads, triton.cdiv(rows, ROWS))](
                    x, mean, rest, over, shift, y, *x.stride(), 0 if shift is None else shift.stride(0),
                    heads, heads // groups, rows, width, BM=ROWS, BD=padded_width(width),
                    enable_fp_fusion=False,
                )  # fmt: skip
            outputs.append(y)
        ctx.save_for_backward(k, beta, mean, rest, over_q, over_k)
        ctx.variance = variance
        return outputs[0], outputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, query_cotangent: torch.Tensor, key_cotangent: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """dq, dk, dβ from dq' (B,H,M,D) and dk' (B,G,N,D), any strides."""
        k, beta, mean, rest, over_q, over_k = ctx.saved_tensors
        batch, heads, queries, width = query_cotangent.shape
        groups, keys = k.shape[1:3]
        group = heads // groups
        dq = torch.empty(query_cotangent.shape, dtype=k.dtype, device=k.device)
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        sums = torch.empty((batch, heads, width), dtype=torch.float32, device=k.device)
        if sums.numel():
            query_gradient_kernel[(batch * heads, triton.cdiv(width, CHANNELS))](
                query_cotangent, over_q, dq, sums, *query_cotangent.stride(), heads, group, queries, width,
                BM=COLUMNS, BD=CHANNELS, enable_fp_fusion=False,
            )  # fmt: skip
        if dk.numel():
            key_gradient_kernel[(batch * groups, triton.cdiv(width, CHANNELS))](
                k, key_cotangent, mean, rest, over_q, over_k, beta, sums, dk,
                *k.stride(), *key_cotangent.stride(), 0 if beta is None else beta.stride(0),
                groups, group, keys, width,
                VARIANCE=ctx.variance, BN=COLUMNS, BD=CHANNELS, enable_fp_fusion=False,
            )  # fmt: skip
        if beta is None:
            return dq, dk, None, None, None
        dbeta = torch.empty(beta.shape, dtype=beta.dtype, device=beta.device)
        beta_gradient_kernel[(heads,)](
            mean, rest, sums, dbeta, batch, heads, group, width,
            BD=padded_width(width), enable_fp_fusion=False,
        )  # fmt: skip
        return dq, dk, dbeta, None, None


def check_normalisation(q: torch.Tensor, beta: torch.Tensor | None, eps: float, variance: bool) -> None:
    """Raise unless eps is a number above 0 that float32 holds, beta (H,) of q's dtype, variance a bool."""
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise ContractError(f"{KERNEL}: eps={eps!r}: expected a finite Python number above 0")
    if not SMALLEST <= eps <= LARGEST:
        raise NotImplementedError(
            f"{KERNEL}: eps={eps!r}: this kernel computes in float32 and takes 2**-126 to 2**127"
        )
    if not isinstance(variance, bool):
        raise ContractError(f"{KERNEL}: variance={variance!r}: expected True, or False for s = 1")
    if beta is not None:
        check_floating("beta", beta, KERNEL)
        if tuple(beta.shape) != (q.shape[1],) or beta.dtype != q.dtype or beta.device != q.device:
            raise ContractError(
                f"{KERNEL}: beta is {beta.dtype} of shape {tuple(beta.shape)} on {beta.device}: expected one "
                f"a query head, ({q.shape[1]},), of q's dtype {q.dtype}, on {q.device}"
            )


# By default half-precision operands may be rounded to the inputs' dtype before a matmul: here q' and k' are.
@promises(
    Contract(family="batch_normalised", options=("beta", "variance"), supports=Supports(max_head_dim=256))
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    eps: float,
    beta: torch.Tensor | None = None,
    variance: bool = True,
) -> torch.Tensor:
    """Softmax attention of (q − βμ)/s over (k − βμ)/s, differentiable once in q, k, v and beta.

    Args:
        q, k, v: (B,H,M,D), (B,G,N,D), (B,G,N,E) float32, float16 or bfloat16, all alike; any strides; D and E
            from 1 to 256; H a multiple of G.
        scale: factor of q'·k'.
        eps: added to the variance of the keys (biased, 1/N) under the root; 2**-126 to 2**127.
        beta: (H,) how much of the mean each query head takes off, of q's dtype; None means 1.
        variance: False divides by 1 in place of s.

    Returns:
        o (B,H,M,E) of q's dtype; 0 where there are no keys.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64, for D or E above 256, for an eps that float32 does not hold.
    """
    check_attention_tensors(q, k, v, KERNEL)
    check_normalisation(q, beta, eps, variance)
    normal_q, normal_k = Normalisation.apply(q, k, beta, eps, variance)  # type: ignore[no-untyped-call]
    o = softmax.attention(normal_q, normal_k, v, scale=scale)
    assert isinstance(o, torch.Tensor)
    return o
