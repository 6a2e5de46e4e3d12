"""Gradients of the delta rule: its recurrence run backwards, from states kept before each chunk.

With dS the cotangent of S_t, S' = e^{g_t} ∘ S_{t−1}, r = v_t − S'ᵀ k_t and u = β_t r:

    dS += scale · q_t do_tᵀ,   dq_t = scale · S_t do_t,   du = dSᵀ k_t,   dr = β_t du
    dv_t = dr,   dβ_t = du·r,   dk_t = dS u − S' dr,   dS' = dS − k_t drᵀ
    dg_t = Σ_e S' ∘ dS' (over all channels for a scalar gate),   dS_{t−1} = e^{g_t} ∘ dS'

* A program owns columns of the state, as in the forward pass. It walks over chunks from the last to the
  first: once forwards, leaving S' of every step in its own memory, once backwards.
* dq, dk, dβ and dg are sums over columns: every program writes its part, and torch adds the parts in one
  order. No atomics, and two runs agree bit for bit.
* dg is a product with S' itself, not a running difference of q∘dq and k∘dk (theory GLA-4), which cancels:
  under strong decay it stays small and exact, and a gate of −inf gets exactly 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnproof.kernels.delta_recurrence import RUNTIME, DeltaInputs, run_recurrence
from attnproof.kernels.pointwise import strides
from attnproof.kernels.states import register_limit, sequence_bounds
from attnproof.kernels.tiles import padded_width

__all__ = ["Gradients", "gradients"]

# States are kept once a chunk, D·E numbers each, and the S' of one chunk at a time for each program: both
# together are least near the square root of a usual length.
STEPS_KEPT = 32
# Two states and what becomes of them: of four warps each thread spills 8 bytes on sm_80.
WARPS = 8


@triton.jit(do_not_specialize=[
    *RUNTIME, "p_do", "p_dstate", "p_path", "p_dq", "p_dk", "p_dv", "p_dbeta", "p_dg", "p_dstate0",
    "s_ob", "s_oh", "s_on", "s_oe", "rows",
])  # fmt: skip
def backward_kernel(
    p_q, p_k, p_v, p_do, p_beta, p_g, p_cu, p_first, p_saved, p_dstate, p_path,
    p_dq, p_dk, p_dv, p_dbeta, p_dg, p_dstate0,
    s_qb: tl.int64, s_qh: tl.int64, s_qn: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_on: tl.int64, s_oe: tl.int64,
    s_bb: tl.int64, s_bh: tl.int64, s_bn: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gd: tl.int64,
    H, N, D, E, each, rows, scale,
    GATE: tl.constexpr, LAYOUT: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """BE columns of one sequence and head; ``rows`` is B·H·N, the rows of one part."""
    i_sh, i_e = tl.program_id(0), tl.program_id(1)
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    n = (i_stop - i_start).to(tl.int32)
    s_qb, s_qh, s_qn, s_qd = strides(s_qb, s_qh, s_qn, s_qd, LAYOUT)
    s_kb, s_kh, s_kn, s_kd = strides(s_kb, s_kh, s_kn, s_kd, LAYOUT)
    s_vb, s_vh, s_vn, s_ve = strides(s_vb, s_vh, s_vn, s_ve, LAYOUT)
    s_ob, s_oh, s_on, s_oe = strides(s_ob, s_oh, s_on, s_oe, LAYOUT)
    o_d, o_e = tl.arange(0, BD), i_e * BE + tl.arange(0, BE)
    m_d, m_e = o_d < D, o_e < E
    p_q += i_b * s_qb + i_h * s_qh + i_start * s_qn + o_d * s_qd
    p_k += i_b * s_kb + i_h * s_kh + i_start * s_kn + o_d * s_kd
    p_v += i_b * s_vb + i_h * s_vh + i_start * s_vn + o_e * s_ve
    p_do += i_b * s_ob + i_h * s_oh + i_start * s_on + o_e * s_oe
    p_beta += i_b * s_bb + i_h * s_bh + i_start * s_bn
    if p_g is not None:
        p_g += i_b * s_gb + i_h * s_gh + i_start * s_gn
    # this program's part of what is summed over columns, and its rows of dv
    i_row = (i_b * H + i_h) * N + i_start
    i_part = i_e.to(tl.int64) * rows + i_row
    p_dq += i_part * D + o_d
    p_dk += i_part * D + o_d
    p_dv += i_row * E + o_e
    p_dbeta += i_part
    if GATE == 1:
        p_dg += i_part
    if GATE == 2:
        p_dg += i_part * D + o_d
    # [BD, BE]
    m_s = m_d[:, None] & m_e[None, :]
    o_s = (o_d * E)[:, None] + o_e[None, :]
    o_path = (o_d * BE)[:, None] + tl.arange(0, BE)[None, :]
    p_path += (i_sh.to(tl.int64) * tl.num_programs(1) + i_e) * (C * BD * BE)
    i_state = i_sh.to(tl.int64) * D * E
    b_ds = tl.load(p_dstate + i_state + o_s, mask=m_s, other=0.0)
    i_chunk = (i_s * each).to(tl.int64)
    if p_first is not None:
        i_chunk = tl.load(p_first + i_s).to(tl.int64)

    chunks = (n + C - 1) // C
    for i_c in range(chunks):
        i_n = (chunks - 1 - i_c) * C
        steps = tl.minimum(C, n - i_n)
        o_saved = ((i_chunk + i_n // C) * H + i_h) * D * E
        b_s = tl.load(p_saved + o_saved + o_s, mask=m_s, other=0.0)
        for i_j in range(steps):
            i_t = (i_n + i_j).to(tl.int64)
            b_k = tl.load(p_k + i_t * s_kn, mask=m_d, other=0.0).to(tl.float32)
            b_v = tl.load(p_v + i_t * s_vn, mask=m_e, other=0.0).to(tl.float32)
            b_beta = tl.load(p_beta + i_t * s_bn).to(tl.float32)
            if GATE == 1:
                b_s *= tl.exp(tl.load(p_g + i_t * s_gn).to(tl.float32))
            if GATE == 2:
                b_g = tl.load(p_g + i_t * s_gn + o_d * s_gd, mask=m_d, other=0.0).to(tl.float32)
                b_s *= tl.exp(b_g)[:, None]
            tl.store(p_path + i_j * (BD * BE) + o_path, b_s)
            b_u = b_beta * (b_v - tl.sum(b_s * b_k[:, None], 0))
            b_s += b_k[:, None] * b_u[None, :]
        tl.debug_barrier()  # the path is read by other threads than those that wrote it
        for i_r in range(steps):
            i_j = steps - 1 - i_r
            i_t = (i_n + i_j).to(tl.int64)
            b_q = tl.load(p_q + i_t * s_qn, mask=m_d, other=0.0).to(tl.float32)
            b_k = tl.load(p_k + i_t * s_kn, mask=m_d, other=0.0).to(tl.float32)
            b_v = tl.load(p_v + i_t * s_vn, mask=m_e, other=0.0).to(tl.float32)
            b_do = tl.load(p_do + i_t * s_on, mask=m_e, other=0.0).to(tl.float32) * scale
            b_beta = tl.load(p_beta + i_t * s_bn).to(tl.float32)
            # S', r and u again, as the forward pass rounds them
            b_s = tl.load(p_path + i_j * (BD * BE) + o_path)
            b_r = b_v - tl.sum(b_s * b_k[:, None], 0)
            b_u = b_beta * b_r
            b_ds += b_q[:, None] * b_do[None, :]
            b_dq = tl.sum((b_s + b_k[:, None] * b_u[None, :]) * b_do[None, :], 1)
            b_du = tl.sum(b_ds * b_k[:, None], 0)
            b_dr = b_beta * b_du
            b_dk = tl.sum(b_ds * b_u[None, :] - b_s * b_dr[None, :], 1)
            b_ds -= b_k[:, None] * b_dr[None, :]
            tl.store(p_dq + i_t * D, b_dq, mask=m_d)
            tl.store(p_dk + i_t * D, b_dk, mask=m_d)
            tl.store(p_dv + i_t * E, b_dr.to(p_dv.dtype.element_ty), mask=m_e)
            tl.store(p_dbeta + i_t, tl.sum(b_du * b_r, 0))
            if GATE == 1:
                tl.store(p_dg + i_t, tl.sum(tl.sum(b_s * b_ds, 1), 0))
                b_ds *= tl.exp(tl.load(p_g + i_t * s_gn).to(tl.float32))
            if GATE == 2:
                tl.store(p_dg + i_t * D, tl.sum(b_s * b_ds, 1), mask=m_d)
                b_g = tl.load(p_g + i_t * s_gn + o_d * s_gd, mask=m_d, other=0.0).to(tl.float32)
                b_ds *= tl.exp(b_g)[:, None]
        tl.debug_barrier()  # the next chunk overwrites the path
    if p_dstate0 is not None:
        tl.store(p_dstate0 + i_state + o_s, b_ds, mask=m_s)


class Gradients(NamedTuple):
    """Gradients of the inputs, each of its dtype; None for an input that is not there."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor | None
    initial_state: torch.Tensor | None


def gradients(x: DeltaInputs, do: torch.Tensor, dstate: torch.Tensor) -> Gradients:
    """The gradients that belong to cotangents do (B,H,N,E), any strides, and dstate (S,H,D,E), contiguous."""
    device = x.q.device
    batch, heads, length, width = x.q.shape
    value_width = x.v.shape[3]
    block = min(padded_width(value_width), 16 if padded_width(width) > 64 else 32)
    parts, programs = triton.cdiv(value_width, block), x.sequences.count * heads
    chunks = x.sequences.chunks(STEPS_KEPT)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    dq, dk = empty(parts, *x.q.shape), empty(parts, *x.q.shape)
    dbeta = empty(parts, *x.beta.shape)
    dg = None if x.g is None else empty(parts, *x.g.shape)
    dv = torch.empty(x.v.shape, dtype=x.v.dtype, device=device)
    dstate0 = None if x.initial_state is None else torch.empty_like(x.initial_state)
    saved = empty(chunks.count, heads, width, value_width)
    if x.q.numel():
        run_recurrence(x, saved=(chunks, saved))
        layout, tensor_strides = x.tensor_strides(do)
        path = empty(programs * parts * STEPS_KEPT * padded_width(width) * block)
        launch: Any = backward_kernel[(programs, parts)]
        launch(
            x.q, x.k, x.v, do, x.beta, x.g, x.sequences.cu_seqlens, chunks.first, saved, dstate, path,
            dq, dk, dv, dbeta, dg, dstate0, *tensor_strides, *x.scalar_strides(),
            heads, length, width, value_width, chunks.each, batch * heads * length, x.scale,
            GATE=x.gate, LAYOUT=layout, C=STEPS_KEPT, BD=padded_width(width), BE=block,
            num_warps=WARPS, num_stages=1, enable_fp_fusion=False, **register_limit(WARPS),
        )  # fmt: skip
    elif dstate0 is not None:
        dstate0.copy_(dstate)
    return Gradients(
        dq.sum(0).to(x.q.dtype),
        dk.sum(0).to(x.k.dtype),
        dv,
        dbeta.sum(0).to(x.beta.dtype),
        None if x.g is None or dg is None else dg.sum(0).to(x.g.dtype),
        dstate0,
    )
