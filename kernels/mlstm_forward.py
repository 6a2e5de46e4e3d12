"""mLSTM, forward: the outputs chunk by chunk, from the states between chunks, and position by position."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.mlstm_chunks import (
    RUNTIME,
    Call,
    State,
    chunk_of,
    denominator,
    gate_tile,
    log_sigmoid,
    states,
    within,
)
from attnproof.kernels.softmax import INF_BITS, isolated
from attnproof.kernels.softmax_backward import stored
from attnproof.kernels.states import register_limit, sequence_bounds

__all__ = ["by_chunks", "by_steps"]

INF: tl.constexpr = tl.constexpr(math.inf)


@triton.jit(do_not_specialize=[*RUNTIME, "p_o", "p_rows"])
def output_kernel(
    p_q, p_k, p_v, p_i, p_f, p_state, p_n, p_bound, p_o, p_rows, p_cu, p_first, p_owner,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ib: tl.int64, s_ih: tl.int64, s_in: tl.int64, s_fb: tl.int64, s_fh: tl.int64, s_fn: tl.int64,
    B, H, N, D, E, each, scale,
    UNIT: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """o of one chunk, and for the backward pass m, 1/denominator and its slope of every row."""
    i_slot, i_b, i_h, i_first, i_stop = chunk_of(p_cu, p_first, p_owner, each, H, N, C)
    if UNIT:
        s_qd, s_kd, s_ve = 1, 1, 1
    o_c = tl.arange(0, C)
    o_n = i_first + o_c
    m_n = o_n < i_stop
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_i += i_b * s_ib + i_h * s_ih
    p_f += i_b * s_fb + i_h * s_fh
    b_i, b_f = gate_tile(p_i, p_f, o_n, s_in, s_fn, i_stop)
    b_log_f = log_sigmoid(b_f)
    b_before = tl.load(p_bound + i_slot)
    # [C, C]
    m_s = o_c[:, None] >= o_c[None, :]
    b_d = within(b_log_f, b_i, C)
    b_head = tl.cumsum(b_log_f, 0)
    # [C]
    b_m = tl.maximum(b_head + b_before, tl.max(b_d, 1))
    b_e = tl.exp(b_d - b_m[:, None])
    b_kept = tl.exp(b_head + b_before - b_m)
    b_s = tl.zeros([C, C], dtype=tl.float32)
    b_den = tl.zeros([C], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = m_n[:, None] & (o_d < D)[None, :]
        b_q = tl.load(p_q + (o_n * s_qm)[:, None] + (o_d * s_qd)[None, :], mask=m_d, other=0.0)
        b_k = tl.load(p_k + (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :], mask=m_d, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
        b_n = tl.load(p_n + i_slot * D + o_d, mask=o_d < D, other=0.0)
        b_den += tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)
    b_p = tl.where(m_s, b_s * scale * b_e, 0.0)
    b_kept = b_kept * scale
    b_den = tl.sum(b_p, 1) + b_den * b_kept
    b_factor, b_slope = denominator(b_den, b_m)
    o_row = (i_b * H + i_h) * N + o_n
    if p_rows is not None:
        o_all = (B * H).to(tl.int64) * N
        tl.store(p_rows + o_row, b_m, mask=m_n)
        tl.store(p_rows + o_all + o_row, b_factor, mask=m_n)
        tl.store(p_rows + 2 * o_all + o_row, b_slope, mask=m_n)
    dtype: tl.constexpr = p_q.dtype.element_ty
    # rows with a non-finite weight must not set the range of the others
    b_bits = b_p.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_bad = tl.where(tl.max(b_bits, 1) >= INF_BITS, float("nan"), 0.0)
    b_p, b_up = stored(tl.where(b_bits < INF_BITS, b_p, 0.0), dtype)
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = m_n[:, None] & (o_e < E)[None, :]
        b_v = tl.load(p_v + (o_n * s_vn)[:, None] + (o_e * s_ve)[None, :], mask=m_e, other=0.0)
        b_v, b_nan = isolated(b_v, m_s, b_bad)
        # [C, BE]
        b_o = tl.dot(b_p, b_v, input_precision="ieee") * b_up
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            m_d = m_n[:, None] & (o_d < D)[None, :]
            b_q = tl.load(p_q + (o_n * s_qm)[:, None] + (o_d * s_qd)[None, :], mask=m_d, other=0.0)
            m_de = (o_d < D)[:, None] & (o_e < E)[None, :]
            b_c = tl.load(p_state + (i_slot * D + o_d)[:, None] * E + o_e[None, :], mask=m_de, other=0.0)
            b_c, b_up_c = stored(b_c, dtype)
            b_o += tl.dot(b_q, b_c, input_precision="ieee") * (b_up_c * b_kept[:, None])
        b_o = b_o * b_factor[:, None] + b_nan[:, None]
        tl.store(p_o + (o_row * E)[:, None] + o_e[None, :], b_o.to(dtype), mask=m_e)


@triton.jit(do_not_specialize=[*RUNTIME, "p_o", "p_rows"])
def recurrent_kernel(
    p_q, p_k, p_v, p_i, p_f, p_c0, p_n0, p_m0, p_c1, p_n1, p_m1, p_o, p_rows, p_cu,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ib: tl.int64, s_ih: tl.int64, s_in: tl.int64, s_fb: tl.int64, s_fh: tl.int64, s_fn: tl.int64,
    B, H, N, D, E, scale, UNIT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """All rows of one sequence one after the other, for a slice of E, from one state to another."""
    i_sh = tl.program_id(0).to(tl.int64)
    i_s, i_h = i_sh // H, i_sh % H
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    if UNIT:
        s_qd, s_kd, s_ve = 1, 1, 1
    o_d, o_e = tl.arange(0, BD), tl.program_id(1) * BE + tl.arange(0, BE)
    m_d, m_e = o_d < D, o_e < E
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_i += i_b * s_ib + i_h * s_ih
    p_f += i_b * s_fb + i_h * s_fh
    # [BD, BE]
    b_c = tl.zeros([BD, BE], dtype=tl.float32)
    b_n = tl.zeros([BD], dtype=tl.float32)
    b_m = -INF
    o_state = (i_sh * D + o_d)[:, None] * E + o_e[None, :]
    if p_m0 is not None:
        b_c = tl.load(p_c0 + o_state, mask=m_d[:, None] & m_e[None, :], other=0.0)
        b_n = tl.load(p_n0 + i_sh * D + o_d, mask=m_d, other=0.0)
        b_m = tl.load(p_m0 + i_sh)
    i_all = (B * H).to(tl.int64) * N
    for i_t in range((i_stop - i_start).to(tl.int32)):
        i_n = i_start + i_t
        b_i = tl.load(p_i + i_n * s_in).to(tl.float32)
        b_log_f = log_sigmoid(tl.load(p_f + i_n * s_fn).to(tl.float32))
        b_new = tl.maximum(b_log_f + b_m, b_i, propagate_nan=tl.PropagateNan.ALL)
        b_kept, b_written = tl.exp(b_log_f + b_m - b_new), tl.exp(b_i - b_new)
        b_m = b_new
        b_k = tl.load(p_k + i_n * s_kn + o_d * s_kd, mask=m_d, other=0.0).to(tl.float32) * b_written
        b_v = tl.load(p_v + i_n * s_vn + o_e * s_ve, mask=m_e, other=0.0).to(tl.float32)
        b_c = b_c * b_kept + b_k[:, None] * b_v[None, :]
        b_n = b_n * b_kept + b_k
        b_q = tl.load(p_q + i_n * s_qm + o_d * s_qd, mask=m_d, other=0.0).to(tl.float32) * scale
        b_factor, b_slope = denominator(tl.sum(b_q * b_n, 0), b_m)
        b_o = tl.sum(b_q[:, None] * b_c, 0) * b_factor
        i_row = (i_b * H + i_h) * N + i_n
        tl.store(p_o + i_row * E + o_e, b_o.to(p_o.dtype.element_ty), mask=m_e)
        if p_rows is not None:
            if tl.program_id(1) == 0:
                tl.store(p_rows + i_row, b_m)
                tl.store(p_rows + i_all + i_row, b_factor)
                tl.store(p_rows + 2 * i_all + i_row, b_slope)
    tl.store(p_c1 + o_state, b_c, mask=m_d[:, None] & m_e[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_n1 + i_sh * D + o_d, b_n, mask=m_d)
        tl.store(p_m1 + i_sh, b_m)


def by_chunks(call: Call, rows: torch.Tensor | None) -> tuple[torch.Tensor, State]:
    """o and the final states by chunks; m, 1/denominator and its slope go to ``rows`` (3,B,H,N)."""
    before, end = states(call)
    o = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    if o.numel():
        chunks = call.chunks
        output_kernel[(chunks.count * call.heads,)](
            *call.inputs, *before, o, rows, call.sequences.cu_seqlens, chunks.first, chunks.owner,
            *call.strides, *call.sizes, chunks.each, call.scale,
            UNIT=call.unit, **call.tiles, **register_limit(call.tiles["num_warps"]),
        )  # fmt: skip
    return o, end


def by_steps(call: Call, rows: torch.Tensor | None) -> tuple[torch.Tensor, State]:
    """o and the final states by the recurrence; m, 1/denominator and its slope go to ``rows`` (3,B,H,N)."""
    o = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    end = call.new_states(call.sequences.count)
    block = triton.next_power_of_2(call.width)
    narrow = max(8, min(triton.next_power_of_2(call.value_width), 4096 // block))
    if end.m.numel():
        recurrent_kernel[(end.m.numel(), triton.cdiv(call.value_width, narrow))](
            *call.inputs, *call.start, *end, o, rows, call.sequences.cu_seqlens, *call.strides, *call.sizes,
            call.scale, UNIT=call.unit, BD=block, BE=narrow, num_warps=4, num_stages=1,
            enable_fp_fusion=False, **register_limit(4),
        )  # fmt: skip
    return o, end
