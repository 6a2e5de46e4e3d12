"""The delta rule step by step: what its kernels are given, and the recurrence, its states in registers.

    S' = e^{g_t} ∘ S_{t−1},   u_t = β_t (v_t − S'ᵀ k_t),   S_t = S' + k_t u_tᵀ,   o_t = scale · S_tᵀ q_t

(Yang et al., arXiv 2406.06484 and 2412.06464; Kimi Linear's KDA decays every key channel on its own; theory
DN-1, DN-4.) Columns of the state never meet, so a program keeps some of them, for one sequence and head.
Everything is computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from attnproof.kernels.pointwise import strides
from attnproof.kernels.states import Chunks, Sequences, register_limit, sequence_bounds
from attnproof.kernels.tiles import ALIGNED, memory_layout, padded_width

__all__ = ["NO_GATE", "RUNTIME", "SCALAR_GATE", "VECTOR_GATE", "DeltaInputs", "run_recurrence"]

NO_GATE, SCALAR_GATE, VECTOR_GATE = 0, 1, 2

# Sizes and strides are run-time values: what depends on them is told to the compiler by LAYOUT alone.
RUNTIME = [
    "p_beta", "p_g", "p_state0", "p_cu", "p_first", "p_owner", "p_o", "p_state", "p_saved", "s_qb", "s_qh",
    "s_qn", "s_qd", "s_kb", "s_kh", "s_kn", "s_kd", "s_vb", "s_vh", "s_vn", "s_ve", "s_bb", "s_bh", "s_bn",
    "s_gb", "s_gh", "s_gn", "s_gd", "H", "N", "D", "E", "each",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """The inputs of one call, checked.

    Attributes:
        q, k: (B,H,N,D); v: (B,H,N,E); beta: (B,H,N).
        g: log decay (B,H,N), (B,H,N,D), or None.
        initial_state: float32 (S,H,D,E), contiguous, S the number of sequences; or None for zeros.
        scale: factor of o.
        sequences: where they begin and end.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor | None
    initial_state: torch.Tensor | None
    scale: float
    sequences: Sequences

    @property
    def gate(self) -> int:
        """NO_GATE, SCALAR_GATE or VECTOR_GATE."""
        return NO_GATE if self.g is None else self.g.ndim - 2

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """(S, H, D, E)."""
        return (self.sequences.count, self.q.shape[1], self.q.shape[3], self.v.shape[3])

    def tensor_strides(self, *further: torch.Tensor) -> tuple[int, list[int]]:
        """LAYOUT, and the strides of q, k, v and ``further`` tensors of width E, as it wants them."""
        tensors = (self.q, self.k, self.v, *further)
        layout = memory_layout(*tensors)
        unit = 16 if layout == ALIGNED else 1
        return layout, [s // unit if axis < 3 else s for x in tensors for axis, s in enumerate(x.stride())]

    def scalar_strides(self) -> list[int]:
        """The strides of beta (3) and of g (4), which has stride 0 along an axis that it lacks."""
        gate = [0, 0, 0, 0] if self.g is None else [*self.g.stride(), 0][:4]
        return [*self.beta.stride(), *gate]


@triton.jit(do_not_specialize=RUNTIME)
def recurrence_kernel(
    p_q, p_k, p_v, p_beta, p_g, p_state0, p_cu, p_first, p_o, p_state, p_saved,
    s_qb: tl.int64, s_qh: tl.int64, s_qn: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bn: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gd: tl.int64,
    H, N, D, E, each, scale,
    GATE: tl.constexpr, LAYOUT: tl.constexpr, SAVE: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """BE columns of the state of one sequence and head; the state before every SAVE-th step is kept."""
    i_sh, o_e = tl.program_id(0), tl.program_id(1) * BE + tl.arange(0, BE)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    s_qb, s_qh, s_qn, s_qd = strides(s_qb, s_qh, s_qn, s_qd, LAYOUT)
    s_kb, s_kh, s_kn, s_kd = strides(s_kb, s_kh, s_kn, s_kd, LAYOUT)
    s_vb, s_vh, s_vn, s_ve = strides(s_vb, s_vh, s_vn, s_ve, LAYOUT)
    o_d = tl.arange(0, BD)
    m_d, m_e = o_d < D, o_e < E
    p_q += i_b * s_qb + i_h * s_qh + i_start * s_qn + o_d * s_qd
    p_k += i_b * s_kb + i_h * s_kh + i_start * s_kn + o_d * s_kd
    p_v += i_b * s_vb + i_h * s_vh + i_start * s_vn + o_e * s_ve
    p_beta += i_b * s_bb + i_h * s_bh + i_start * s_bn
    if p_g is not None:
        p_g += i_b * s_gb + i_h * s_gh + i_start * s_gn
    if p_o is not None:
        p_o += ((i_b * H + i_h) * N + i_start) * E + o_e
    # [BD, BE]
    m_s = m_d[:, None] & m_e[None, :]
    o_s = (o_d * E)[:, None] + o_e[None, :]
    i_state = i_sh.to(tl.int64) * D * E
    b_s = tl.zeros([BD, BE], dtype=tl.float32)
    if p_state0 is not None:
        b_s = tl.load(p_state0 + i_state + o_s, mask=m_s, other=0.0)
    i_chunk = (i_s * each).to(tl.int64)
    if SAVE > 0 and p_first is not None:
        i_chunk = tl.load(p_first + i_s).to(tl.int64)

    for i_n in range((i_stop - i_start).to(tl.int32)):
        if SAVE > 0:
            o_saved = ((i_chunk + i_n // SAVE) * H + i_h) * D * E
            tl.store(p_saved + o_saved + o_s, b_s, mask=m_s & (i_n % SAVE == 0))
        i_t = tl.cast(i_n, tl.int64)
        b_k = tl.load(p_k + i_t * s_kn, mask=m_d, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + i_t * s_vn, mask=m_e, other=0.0).to(tl.float32)
        b_beta = tl.load(p_beta + i_t * s_bn).to(tl.float32)
        if GATE == 1:
            b_s *= tl.exp(tl.load(p_g + i_t * s_gn).to(tl.float32))
        if GATE == 2:
            b_g = tl.load(p_g + i_t * s_gn + o_d * s_gd, mask=m_d, other=0.0).to(tl.float32)
            b_s *= tl.exp(b_g)[:, None]
        b_u = b_beta * (b_v - tl.sum(b_s * b_k[:, None], 0))
        b_s += b_k[:, None] * b_u[None, :]
        if p_o is not None:
            b_q = tl.load(p_q + i_t * s_qn, mask=m_d, other=0.0).to(tl.float32)
            b_o = tl.sum(b_s * b_q[:, None], 0) * scale
            tl.store(p_o + i_t * E, b_o.to(p_o.dtype.element_ty), mask=m_e)
    if p_state is not None:
        tl.store(p_state + i_state + o_s, b_s, mask=m_s)


def run_recurrence(
    x: DeltaInputs,
    *,
    o: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    saved: tuple[Chunks, torch.Tensor] | None = None,
) -> None:
    """Fill those of ``o`` (B,H,N,E), the final ``state`` (S,H,D,E) and the states before each chunk,
    ``saved`` (chunks, H, D, E), that are given.
    """
    layout, tensor_strides = x.tensor_strides()
    length, width, value_width = x.q.shape[2], x.q.shape[3], x.v.shape[3]
    block = min(padded_width(value_width), 16 if padded_width(width) > 64 else 32)
    chunks, states = saved if saved is not None else (None, None)
    grid = (x.sequences.count * x.q.shape[1], triton.cdiv(value_width, block))
    launch: Any = recurrence_kernel[grid]
    launch(
        x.q, x.k, x.v, x.beta, x.g, x.initial_state, x.sequences.cu_seqlens,
        None if chunks is None else chunks.first, o, state, states,
        *tensor_strides, *x.scalar_strides(),
        x.q.shape[1], length, width, value_width, 0 if chunks is None else chunks.each, x.scale,
        GATE=x.gate, LAYOUT=layout, SAVE=0 if chunks is None else chunks.size,
        BD=padded_width(width), BE=block, num_warps=4, num_stages=1, enable_fp_fusion=False,
        **register_limit(4),
    )  # fmt: skip
