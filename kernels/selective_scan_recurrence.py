"""The selective scan step by step: what its kernels are given, one step of it, and the recurrence.

    h_t = exp(δ_t A) ∘ h_{t−1} + w_t B_t u_t,   y_t = (C_t·h_t + D u_t) silu(z_t)

with δ = delta + delta_bias, through softplus where asked, and w = δ ("euler", as Mamba is shipped) or
(exp(δA) − 1)/A ("zoh"; Gu and Dao, arXiv 2312.00752, section 2; theory MAM-1, MAM-2). Everything is computed
in float32. Channels never meet in the forward pass: a program owns some channels of one sequence, and their
whole state; D, the width of the state, is padded to a power of two by states that stay 0.

A position beyond the end of its sequence has a step of exactly 0, whatever the bias (bugs B43, B44): it
decays nothing and adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from attnproof.kernels.activations import SERIES_END, expm1_ratio_series, silu, softplus
from attnproof.kernels.states import Sequences, register_limit, sequence_bounds

__all__ = ["ScanInputs", "channel_values", "run_recurrence", "step_sizes", "transitions"]

# Numbers of state a program, and its warps.
AREA = 1024
WARPS = 4

RUNTIME = [
    "p_u", "p_delta", "p_a", "p_b", "p_c", "p_d", "p_z", "p_bias", "p_start", "p_cu", "p_y", "p_end",
    "s_ub", "s_uh", "s_un", "s_eb", "s_eh", "s_en", "s_zb", "s_zh", "s_zn", "s_bb", "s_bd", "s_bn",
    "s_cb", "s_cd", "s_cn", "H", "N", "D",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ScanInputs:
    """The inputs of one call, checked.

    Attributes:
        u, delta: (B,H,N); A: (H,D), contiguous; B, C: (B,D,N).
        D, delta_bias: (H), contiguous, or None; z: (B,H,N) or None.
        initial_state: float32 (S,H,D), contiguous, S the number of sequences; or None for zeros.
        softplus: the step is softplus(delta + delta_bias).
        zoh: discretised by a zero-order hold instead of Euler's rule.
        sequences: where they begin and end.
    """

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    initial_state: torch.Tensor | None
    softplus: bool
    zoh: bool
    sequences: Sequences

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(S, H, D)."""
        return (self.sequences.count, *self.A.shape)

    @property
    def pointers(self) -> list[torch.Tensor | None]:
        """The tensors from u to the initial state and cu_seqlens, in the order of every kernel."""
        return [
            *(self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias),
            *(self.initial_state, self.sequences.cu_seqlens),
        ]

    @property
    def strides(self) -> list[int]:
        """The strides of u, delta, z, B and C, in the order of every kernel."""
        gate = (0, 0, 0) if self.z is None else self.z.stride()
        return [*self.u.stride(), *self.delta.stride(), *gate, *self.B.stride(), *self.C.stride()]


@triton.jit
def channel_values(p_x, o_c, m_c):
    """[BC] float32 numbers of the channels ``o_c``; zeros where p_x is None."""
    b_x = tl.full(o_c.shape, 0.0, tl.float32)
    if p_x is not None:
        b_x = tl.load(p_x + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def step_sizes(b_delta, b_bias, m_step, SOFTPLUS: tl.constexpr):
    """The effective steps δ of a block of delta, 0 where ``m_step`` is not set."""
    b_step = b_delta + b_bias
    if SOFTPLUS:
        b_step = softplus(b_step)
    return tl.where(m_step, b_step, 0.0)


@triton.jit
def transitions(b_step, b_a, ZOH: tl.constexpr):
    """(exp(δA), w) of steps and A that broadcast; w has the shape of the steps without ZOH.

    (exp(δA) − 1)/A is formed as it stands where |δA| is large, so that it is −1/A for the largest steps; and
    near 0 as δ·(exp(x) − 1)/x, x = δA, which is δ where A is 0.
    """
    b_x = b_step * b_a
    b_decay = tl.exp(b_x)
    if ZOH:
        b_weight = tl.where(tl.abs(b_x) < SERIES_END, b_step * expm1_ratio_series(b_x), (b_decay - 1.0) / b_a)
    else:
        b_weight = b_step
    return b_decay, b_weight


@triton.jit(do_not_specialize=RUNTIME)
def recurrence_kernel(
    p_u, p_delta, p_a, p_b, p_c, p_d, p_z, p_bias, p_start, p_cu, p_y, p_end,
    s_ub: tl.int64, s_uh: tl.int64, s_un: tl.int64, s_eb: tl.int64, s_eh: tl.int64, s_en: tl.int64,
    s_zb: tl.int64, s_zh: tl.int64, s_zn: tl.int64, s_bb: tl.int64, s_bd: tl.int64, s_bn: tl.int64,
    s_cb: tl.int64, s_cd: tl.int64, s_cn: tl.int64, H, N, D,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BC channels of one sequence, position after position."""
    i_s = tl.program_id(0)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    o_c, o_d = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64), tl.arange(0, BD)
    m_c, m_d = o_c < H, o_d < D
    p_u += i_b * s_ub + o_c * s_uh
    p_delta += i_b * s_eb + o_c * s_eh
    p_b += i_b * s_bb + o_d * s_bd
    p_c += i_b * s_cb + o_d * s_cd
    p_y += (i_b * H + o_c) * N
    if p_z is not None:
        p_z += i_b * s_zb + o_c * s_zh
    # [BC]
    b_skip, b_bias = channel_values(p_d, o_c, m_c), channel_values(p_bias, o_c, m_c)
    # [BC, BD]
    m_h = m_c[:, None] & m_d[None, :]
    o_h = (o_c * D)[:, None] + o_d[None, :]
    i_state = i_s.to(tl.int64) * H * D
    b_a = tl.load(p_a + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_h = tl.zeros([BC, BD], dtype=tl.float32)
    if p_start is not None:
        b_h = tl.load(p_start + i_state + o_h, mask=m_h, other=0.0)

    for i_n in range((i_stop - i_start).to(tl.int32)):
        i_t = i_start + i_n
        b_u = tl.load(p_u + i_t * s_un, mask=m_c, other=0.0).to(tl.float32)
        b_delta = tl.load(p_delta + i_t * s_en, mask=m_c, other=0.0).to(tl.float32)
        b_b = tl.load(p_b + i_t * s_bn, mask=m_d, other=0.0).to(tl.float32)
        b_c = tl.load(p_c + i_t * s_cn, mask=m_d, other=0.0).to(tl.float32)
        b_step = step_sizes(b_delta, b_bias, m_c, SOFTPLUS)
        b_decay, b_weight = transitions(b_step[:, None], b_a, ZOH)
        b_h = b_decay * b_h + b_weight * b_u[:, None] * b_b[None, :]
        b_y = tl.sum(b_h * b_c[None, :], 1)
        if p_d is not None:
            b_y += b_skip * b_u
        if p_z is not None:
            b_y *= silu(tl.load(p_z + i_t * s_zn, mask=m_c, other=0.0).to(tl.float32))
        tl.store(p_y + i_t, b_y.to(p_y.dtype.element_ty), mask=m_c)
    tl.store(p_end + i_state + o_h, b_h, mask=m_h)


def run_recurrence(x: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B,H,N) of u's dtype and the final state (S,H,D) float32."""
    y = torch.empty(x.u.shape, dtype=x.u.dtype, device=x.u.device)
    end = torch.empty(x.state_shape, dtype=torch.float32, device=x.u.device)
    if end.numel():
        heads, width = x.A.shape
        block_d = triton.next_power_of_2(width)
        block_c = min(triton.next_power_of_2(heads), AREA // block_d)
        launch: Any = recurrence_kernel[(x.sequences.count, triton.cdiv(heads, block_c))]
        launch(
            *x.pointers, y, end, *x.strides, heads, x.u.shape[2], width,
            SOFTPLUS=x.softplus, ZOH=x.zoh, BC=block_c, BD=block_d,
            num_warps=WARPS, num_stages=1, enable_fp_fusion=False, **register_limit(WARPS),
        )  # fmt: skip
    return y, end
