"""Diagonal state spaces as a convolution: kernels from powers, causal Toeplitz products, correlations.

    y_t = Σ_{i ≤ t} K_i u_{t−i} + Re Σ_s (c a x_0)_s a_s^t + d u_t,   K_i = Re Σ_s (c b)_s a_s^i

(theory S4-1). Three linear maps make up the whole, each with its gradient, and torch's autograd puts them
together: :func:`responses` Re Σ_s w_s a_s^i of weights w, :func:`moments` Σ_i f_i a_s^i of a sequence f (the
final state is b times those of the inputs run backwards), and :func:`toeplitz`. The first two are each
other's transposes; the kernel's gradient is the correlation of the inputs and the outputs' cotangents.

Everything is float32, complex numbers are pairs on the last axis, and a gradient by a pair is the pair of
gradients by its parts. Powers are those of :mod:`attnproof.kernels.ssm_scan`: of 0 too, without logarithms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.ssm_recurrence import StateTiles, load_pair, store_pair
from attnproof.kernels.ssm_scan import BITS, BLOCK, powers, wide_times
from attnproof.kernels.states import register_limit

__all__ = ["conjugate", "moments", "product", "responses", "toeplitz"]

# Inputs a step of a Toeplitz product, and outputs or lags a program.
STEP = 32
# Powers are four tiles of which sm_100 spills registers with fewer warps.
WARPS = 8

RUNTIME = ["p_a", "p_w", "p_f", "p_out", "p_m0", "p_m1", "s_fx", "s_fh", "s_fn", "bits", "H", "N", "D"]
RUNTIME_PRODUCTS = [
    "p_k", "p_x", "p_y", "p_out", "s_xb", "s_xh", "s_xn", "s_yb", "s_yh", "s_yn", "B", "H", "N", "L",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def responses_kernel(
    p_a, p_w, p_out, bits, H, N, D,
    COMPLEX: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Re Σ_s w_s a_s^i for BT of the i < N: a (H,D), w (X,H,D), out (X,H,N)."""
    i_xh, i_t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_h = i_xh % H
    # [1, BT]
    o_t = tl.arange(0, BT)[None, :]
    b_y = tl.zeros([1, BT], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = (i_d + tl.arange(0, BD))[:, None]
        m_d = o_d < D
        b_ar, b_ai = load_pair(p_a, i_h * D + o_d, m_d, COMPLEX)
        b_wr, b_wi = load_pair(p_w, i_xh * D + o_d, m_d, COMPLEX)
        # [BD, 1] and [BD, BT]
        b_fr, b_fi, b_er, b_ei = powers(
            b_ar, b_ai, tl.zeros([1, 1], dtype=tl.int32) + i_t * BT, bits, COMPLEX
        )
        b_pr, b_pi, b_sr, b_si = powers(b_ar, b_ai, o_t, BITS, COMPLEX)
        b_pr, b_pi, _, _ = wide_times(b_pr, b_pi, b_sr, b_si, b_fr, b_fi, b_er, b_ei, COMPLEX)
        b_part = b_wr * b_pr
        if COMPLEX:
            b_part -= b_wi * b_pi
        b_y += tl.sum(b_part, 0, keep_dims=True)
    o_n = i_t * BT + o_t
    tl.store(p_out + i_xh * N + o_n, b_y, mask=o_n < N)


@triton.jit(do_not_specialize=RUNTIME)
def moments_kernel(
    p_a, p_f, p_m0, p_m1, s_fx: tl.int64, s_fh: tl.int64, s_fn: tl.int64, H, N, D,
    COMPLEX: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Σ_i f_i a^i and Σ_i i f_i a^(i−1), each (X,H,D), of f (X,H,N); of one of them if the other is None."""
    i_xh, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_h = i_xh % H
    p_f += i_xh // H * s_fx + i_h * s_fh
    # [BD, 1], [1, BT]
    o_d, o_t = (i_d * BD + tl.arange(0, BD))[:, None], tl.arange(0, BT)[None, :]
    m_d = o_d < D
    b_ar, b_ai = load_pair(p_a, i_h * D + o_d, m_d, COMPLEX)
    b_pr, b_pi, b_er, b_ei = powers(b_ar, b_ai, o_t, BITS, COMPLEX)
    b_or, b_oi, b_ur, b_ui = powers(b_ar, b_ai, tl.full([1, 1], BT, dtype=tl.int32), BITS, COMPLEX)
    b_fr, b_fi = tl.full([BD, 1], 1.0, dtype=tl.float32), tl.zeros([BD, 1], dtype=tl.float32)
    b_sr, b_si = tl.zeros([BD, 1], dtype=tl.float32), tl.zeros([BD, 1], dtype=tl.float32)
    b_m0r, b_m0i, b_m1r, b_m1i = b_fi, b_fi, b_fi, b_fi
    for i_n in range(0, N, BT):
        o_n = i_n + o_t
        b_qr, b_qi, _, _ = wide_times(b_pr, b_pi, b_er, b_ei, b_fr, b_fi, b_sr, b_si, COMPLEX)
        if p_m0 is not None:
            b_f = tl.load(p_f + o_n * s_fn, mask=o_n < N, other=0.0).to(tl.float32)
            b_m0r += tl.sum(b_qr * b_f, 1, keep_dims=True)
            b_m0i += tl.sum(b_qi * b_f, 1, keep_dims=True)
        if p_m1 is not None:
            # i a^(i−1), by the power that belongs to it: nothing is divided by a
            b_f = tl.load(p_f + (o_n + 1) * s_fn, mask=o_n + 1 < N, other=0.0).to(tl.float32)
            b_f *= (o_n + 1).to(tl.float32)
            b_m1r += tl.sum(b_qr * b_f, 1, keep_dims=True)
            b_m1i += tl.sum(b_qi * b_f, 1, keep_dims=True)
        b_fr, b_fi, b_sr, b_si = wide_times(b_fr, b_fi, b_sr, b_si, b_or, b_oi, b_ur, b_ui, COMPLEX)
    if p_m0 is not None:
        store_pair(p_m0, i_xh * D + o_d, b_m0r, b_m0i, m_d, COMPLEX)
    if p_m1 is not None:
        store_pair(p_m1, i_xh * D + o_d, b_m1r, b_m1i, m_d, COMPLEX)


@triton.jit(do_not_specialize=RUNTIME_PRODUCTS)
def toeplitz_kernel(
    p_k, p_x, p_out, s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, H, N, L,
    REVERSE: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out_t = Σ_{0 ≤ t−s < L} k_{t−s} x_s (REVERSE: s − t), k (H,L), x and out (B,H,N), BT of the t.

    Terms that are not in the sum are taken out after the product, not by a weight of 0: a position before an
    infinite x does not become NaN.
    """
    i_bh, i_t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_h = i_bh % H
    p_x += i_bh // H * s_xb + i_h * s_xh
    p_k += i_h * L
    # [BT, 1], [1, BS]
    o_t, o_s = i_t * BT + tl.arange(0, BT)[:, None], tl.arange(0, BS)[None, :]
    if REVERSE:
        i_first, i_stop = i_t * BT, tl.minimum(N, i_t * BT + BT + L - 1)
    else:
        i_first, i_stop = tl.maximum(0, i_t * BT - L + 1), tl.minimum(N, i_t * BT + BT)
    b_y = tl.zeros([BT, 1], dtype=tl.float32)
    for i_s in range(i_first, i_stop, BS):
        o_x = i_s + o_s
        o_lag = o_x - o_t if REVERSE else o_t - o_x
        m_lag = (o_lag >= 0) & (o_lag < L) & (o_x < N)
        b_x = tl.load(p_x + o_x * s_xn, mask=o_x < N, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_lag, mask=m_lag, other=0.0)
        b_y += tl.sum(tl.where(m_lag, b_k * b_x, 0.0), 1, keep_dims=True)
    tl.store(p_out + i_bh * N + o_t, b_y, mask=o_t < N)


@triton.jit(do_not_specialize=RUNTIME_PRODUCTS)
def correlation_kernel(
    p_x, p_y, p_out, s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, B, H, N, L,
    BL: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_b Σ_t y_t x_{t−i}, (H,L), of x and y (B,H,N): BL of the lags i."""
    i_h, i_l = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # [BL, 1], [1, BT]
    o_l, o_t = i_l * BL + tl.arange(0, BL)[:, None], tl.arange(0, BT)[None, :]
    b_k = tl.zeros([BL, 1], dtype=tl.float32)
    for i_b in range(B):
        p_xb, p_yb = p_x + i_b * s_xb + i_h * s_xh, p_y + i_b * s_yb + i_h * s_yh
        for i_t in range(i_l * BL, N, BT):
            o_y = i_t + o_t
            o_x = o_y - o_l
            b_y = tl.load(p_yb + o_y * s_yn, mask=o_y < N, other=0.0).to(tl.float32)
            b_x = tl.load(p_xb + o_x * s_xn, mask=(o_x >= 0) & (o_y < N), other=0.0).to(tl.float32)
            b_k += tl.sum(b_y * b_x, 1, keep_dims=True)
    tl.store(p_out + i_h * L + o_l, b_k, mask=o_l < L)


def conjugate(x: torch.Tensor) -> torch.Tensor:
    """The conjugates of pairs (…, 2)."""
    return torch.stack((x[..., 0], -x[..., 1]), -1)


def product(x: torch.Tensor, y: torch.Tensor, *, pairs: bool) -> torch.Tensor:
    """x ∘ y of numbers, or of pairs (…, 2)."""
    if not pairs:
        return x * y
    (xr, xi), (yr, yi) = x.unbind(-1), y.unbind(-1)
    return torch.stack((xr * yr - xi * yi, xr * yi + xi * yr), -1)


def responses_of(a: torch.Tensor, w: torch.Tensor, length: int) -> torch.Tensor:
    """The kernel behind :func:`responses`, without a gradient."""
    out = torch.empty((*w.shape[:2], length), dtype=torch.float32, device=a.device)
    if out.numel():
        tiles = StateTiles.of(a.shape[1])
        responses_kernel[(out.shape[0] * out.shape[1], triton.cdiv(length, BLOCK))](
            a.contiguous(), w.contiguous(), out, length.bit_length(), a.shape[0], length, a.shape[1],
            COMPLEX=a.ndim == 3, BD=tiles.size, BT=BLOCK, BITS=BITS, num_warps=WARPS, enable_fp_fusion=False,
            **register_limit(WARPS),
        )  # fmt: skip
    return out


def moments_of(
    a: torch.Tensor, f: torch.Tensor, *, zeroth: bool, first: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Σ_i f_i a^i and Σ_i i f_i a^(i−1), (X, *a.shape) each, of f (X,H,N); None for one that is not asked."""
    shape = (f.shape[0], *a.shape)
    m0, m1 = (
        torch.empty(shape, dtype=torch.float32, device=a.device) if asked else None
        for asked in (zeroth, first)
    )
    if f.shape[0] * a.shape[0]:
        tiles = StateTiles.of(a.shape[1])
        moments_kernel[(f.shape[0] * a.shape[0], tiles.number)](
            a.contiguous(), f, m0, m1, *f.stride(), a.shape[0], f.shape[2], a.shape[1],
            COMPLEX=a.ndim == 3, BD=tiles.size, BT=BLOCK, BITS=BITS, num_warps=WARPS, enable_fp_fusion=False,
            **register_limit(WARPS),
        )  # fmt: skip
    return m0, m1


class Responses(torch.autograd.Function):
    """a (H,D), w (X,H,D), or pairs, to Re Σ_s w_s a_s^i (X,H,N)."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, w: torch.Tensor, length: int) -> torch.Tensor:
        ctx.save_for_backward(a, w)
        return responses_of(a, w, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, w = ctx.saved_tensors
        pairs = a.ndim == 3
        need_a, need_w, _ = ctx.needs_input_grad
        dw, powered = moments_of(a, dy, zeroth=need_w, first=need_a)
        da = None if powered is None else product(w, powered, pairs=pairs).sum(0)
        if pairs:
            da, dw = (None if x is None else conjugate(x) for x in (da, dw))
        return da, dw, None


class Moments(torch.autograd.Function):
    """a (H,D) or pairs, f (X,H,N) to Σ_i f_i a^i (X,H,D) or pairs."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, f)
        total, _ = moments_of(a, f, zeroth=True, first=False)
        assert total is not None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dm: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, f = ctx.saved_tensors
        pairs = a.ndim == 3
        da = df = None
        if ctx.needs_input_grad[0]:
            _, powered = moments_of(a, f, zeroth=False, first=True)
            assert powered is not None
            da = product(conjugate(powered) if pairs else powered, dm, pairs=pairs).sum(0)
        if ctx.needs_input_grad[1]:
            df = responses_of(a, conjugate(dm) if pairs else dm, f.shape[2])
        return da, df


def toeplitz_of(k: torch.Tensor, x: torch.Tensor, *, reverse: bool) -> torch.Tensor:
    """The kernel behind :func:`toeplitz`, without a gradient; ``reverse`` for its transpose."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    batch, heads, length = x.shape
    if out.numel():
        toeplitz_kernel[(batch * heads, triton.cdiv(length, STEP))](
            k.contiguous(), x, out, *x.stride(), heads, length, k.shape[1], REVERSE=reverse, BT=STEP, BS=STEP,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


class Toeplitz(torch.autograd.Function):
    """k (H,L) and x (B,H,N) to Σ_{i < L} k_i x_{t−i} (B,H,N)."""

    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(k, x)
        return toeplitz_of(k, x, reverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        k, x = ctx.saved_tensors
        dk = dx = None
        if ctx.needs_input_grad[0]:
            dk = torch.empty(k.shape, dtype=torch.float32, device=k.device)
            if dk.numel():
                correlation_kernel[(k.shape[0], triton.cdiv(k.shape[1], STEP))](
                    x, dy, dk, *x.stride(), *dy.stride(), *x.shape, k.shape[1], BL=STEP, BT=STEP,
                    num_warps=4, enable_fp_fusion=False,
                )  # fmt: skip
        if ctx.needs_input_grad[1]:
            dx = toeplitz_of(k, dy, reverse=True)
        return dk, dx


def responses(a: torch.Tensor, w: torch.Tensor, length: int) -> torch.Tensor:
    """Re Σ_s w_s a_s^i for i < ``length``, float32 (X,H,length); differentiable once in both tensors.

    Args:
        a: (H,D), or (H,D,2) pairs; float32.
        w: (X,H,D), or (X,H,D,2); float32.
        length: 0 or more.
    """
    out: torch.Tensor = Responses.apply(a, w, length)  # type: ignore[no-untyped-call]
    return out


def moments(a: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Σ_i f_i a^i, float32 (X,H,D) or (X,H,D,2), of f (X,H,N) float32; differentiable once in both."""
    out: torch.Tensor = Moments.apply(a, f)  # type: ignore[no-untyped-call]
    return out


def toeplitz(k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Σ_{i < L} k_i x_{t−i}, float32 (B,H,N), of k (H,L) and x (B,H,N) float32; differentiable once."""
    out: torch.Tensor = Toeplitz.apply(k, x)  # type: ignore[no-untyped-call]
    return out
