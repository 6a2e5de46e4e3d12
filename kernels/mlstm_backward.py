"""mLSTM, backward: the gradients of a chunk from the state before it and the cotangent of the one after it.

With r_i = 1/denominator, κ_i the slope of the denominator by Σ P (0 where the bound counts, 1/2 where both
are equal) and G_ij = r_i dO_i·v_j + δ_i, δ_i = −r_i κ_i (dO_i·o_i):

    dq_i = scale Σ_j e^{D_ij − m_i} G_ij k_j,   dk_j = scale Σ_i e^{D_ij − m_i} G_ij q_i,
    dv_j = Σ_i P_ij r_i dO_i,   di_j = Σ_i P_ij G_ij,   df_t = σ(−f_t) Σ_{j<t≤i} P_ij G_ij

The sum of df is taken over the pairs that t lies between: pairs inside the chunk, from before it into it,
out of it, and across it, where it is C₀∘dC. The common form, a reverse cumulative sum of q·dq − k·dk over
the whole sequence (theory GLA-4), adds and takes off every pair after t as well, and a large pair leaves its
rounding to small late ones. Every sum has one owner and one order: no atomics.

Levels are constants: o is the same at any level, and so is whatever reads a final state as C' e^m and n' e^m.
The cotangent of a final state is that behind its last chunk, and the gradient of an initial state that before
its first: pairs with what the initial state holds reach f through C₀ and n₀ like any other.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.mlstm_chunks import (
    RUNTIME,
    Call,
    chunk_of,
    decays,
    gate_tile,
    log_sigmoid,
    states,
    within,
)
from attnproof.kernels.softmax_backward import stored
from attnproof.kernels.states import register_limit, sequence_bounds

__all__ = ["chunk_gradients"]

INF: tl.constexpr = tl.constexpr(math.inf)
MORE = [
    "p_do", "p_o", "p_rows", "p_delta", "p_dstate", "p_dn", "p_dc1", "p_dn1", "p_dc0", "p_dn0", "s_ob",
    "s_oh", "s_om", "s_oe",
]  # fmt: skip


@triton.jit(do_not_specialize=["s_ob", "s_oh", "s_om", "s_oe", "p_delta", "B", "H", "N", "E"])
def delta_kernel(
    p_do, p_o, p_rows, p_delta, s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    B, H, N, E, C: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """δ of a chunk of rows."""
    i_c, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_do += (i_bh // H) * s_ob + (i_bh % H) * s_oh
    o_n = i_c.to(tl.int64) * C + tl.arange(0, C)
    m_n = o_n < N
    o_row = i_bh * N + o_n
    b_sum = tl.zeros([C], dtype=tl.float32)
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = m_n[:, None] & (o_e < E)[None, :]
        b_o = tl.load(p_o + (o_row * E)[:, None] + o_e[None, :], mask=m_e, other=0.0).to(tl.float32)
        o_do = (o_n * s_om)[:, None] + (o_e * s_oe)[None, :]
        b_sum += tl.sum(b_o * tl.load(p_do + o_do, mask=m_e, other=0.0).to(tl.float32), 1)
    b_slope = tl.load(p_rows + 2 * (B * H).to(tl.int64) * N + o_row, mask=m_n, other=0.0)
    tl.store(p_delta + o_row, tl.where(b_slope == 0, 0.0, -b_slope * b_sum), mask=m_n)


@triton.jit(do_not_specialize=[*RUNTIME, *MORE])
def state_gradient_kernel(
    p_q, p_k, p_v, p_i, p_f, p_do, p_rows, p_delta, p_bound, p_dstate, p_dn, p_dc1, p_dn1, p_dc0, p_dn0,
    p_cu, p_first,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ib: tl.int64, s_ih: tl.int64, s_in: tl.int64, s_fb: tl.int64, s_fh: tl.int64, s_fn: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    B, H, N, D, E, each, scale,
    UNIT: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A tile of the cotangents of C' and n' after every chunk of one sequence, from the last to the first,
    and of the gradients of its initial state.
    """
    i_sh = tl.program_id(0).to(tl.int64)
    i_s, i_h = i_sh // H, i_sh % H
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    i_first = (i_s * each if p_cu is None else tl.load(p_first + i_s)).to(tl.int64)
    if UNIT:
        s_qd = 1
    o_c = tl.arange(0, C)
    o_d, o_e = tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2) * BE + tl.arange(0, BE)
    p_q += i_b * s_qb + i_h * s_qh
    p_do += i_b * s_ob + i_h * s_oh
    p_i += i_b * s_ib + i_h * s_ih
    p_f += i_b * s_fb + i_h * s_fh
    i_all = (B * H).to(tl.int64) * N
    m_de = (o_d < D)[:, None] & (o_e < E)[None, :]
    o_state = (i_sh * D + o_d)[:, None] * E + o_e[None, :]
    # [BD, BE]
    b_dc = tl.zeros([BD, BE], dtype=tl.float32)
    b_dn = tl.zeros([BD], dtype=tl.float32)
    if p_dc1 is not None:
        b_dc = tl.load(p_dc1 + o_state, mask=m_de, other=0.0)
    if p_dn1 is not None:
        b_dn = tl.load(p_dn1 + i_sh * D + o_d, mask=o_d < D, other=0.0)
    n_chunks = ((i_stop - i_start + C - 1) // C).to(tl.int32)
    for i_t in range(n_chunks):
        i_c = n_chunks - 1 - i_t
        i_slot = (i_first + i_c) * H + i_h
        tl.store(p_dstate + (i_slot * D + o_d)[:, None] * E + o_e[None, :], b_dc, mask=m_de)
        if tl.program_id(2) == 0:
            tl.store(p_dn + i_slot * D + o_d, b_dn, mask=o_d < D)
        o_n = i_start + i_c * C + o_c
        m_n = o_n < i_stop
        o_row = (i_b * H + i_h) * N + o_n
        b_before = tl.load(p_bound + i_slot)
        b_head, b_whole, _, b_after = decays(p_i, p_f, o_n, b_before, s_in, s_fn, i_stop, C)
        b_m = tl.load(p_rows + o_row, mask=m_n, other=0.0)
        b_kept = tl.where(m_n, tl.exp(tl.minimum(b_head + b_before - b_m, 0.0)), 0.0) * scale
        o_q = (o_n * s_qm)[:, None] + (o_d * s_qd)[None, :]
        b_q = tl.load(p_q + o_q, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        o_do = (o_n * s_om)[:, None] + (o_e * s_oe)[None, :]
        b_do = tl.load(p_do + o_do, mask=m_n[:, None] & (o_e < E)[None, :], other=0.0).to(tl.float32)
        b_inverse = tl.load(p_rows + i_all + o_row, mask=m_n, other=0.0)
        b_delta = tl.load(p_delta + o_row, mask=m_n, other=0.0)
        b_w = b_q.to(tl.float32) * b_kept[:, None]
        b_decay = tl.exp(b_whole + b_before - b_after)
        b_dn = b_dn * b_decay + tl.sum(b_w * b_delta[:, None], 0)
        b_w, b_up = stored(b_w, b_q.dtype)
        b_do, b_up_o = stored(b_do * b_inverse[:, None], b_q.dtype)
        b_dc = b_dc * b_decay + tl.dot(tl.trans(b_w), b_do, input_precision="ieee") * b_up * b_up_o
    if p_dc0 is not None:
        tl.store(p_dc0 + o_state, b_dc, mask=m_de)
        if tl.program_id(2) == 0:
            tl.store(p_dn0 + i_sh * D + o_d, b_dn, mask=o_d < D)


@triton.jit(do_not_specialize=[*RUNTIME, *MORE, "p_dq", "p_dk", "p_dv", "p_di", "p_df"])
def gradient_kernel(
    p_q, p_k, p_v, p_i, p_f, p_do, p_rows, p_delta, p_state, p_n, p_bound, p_dstate, p_dn,
    p_dq, p_dk, p_dv, p_di, p_df, p_cu, p_first, p_owner,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ib: tl.int64, s_ih: tl.int64, s_in: tl.int64, s_fb: tl.int64, s_fh: tl.int64, s_fn: tl.int64,
    s_ob: tl.int64, s_oh: tl.int64, s_om: tl.int64, s_oe: tl.int64,
    B, H, N, D, E, each, scale,
    UNIT: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk."""
    i_slot, i_b, i_h, i_first, i_stop = chunk_of(p_cu, p_first, p_owner, each, H, N, C)
    if UNIT:
        s_qd, s_kd, s_ve = 1, 1, 1
    dtype: tl.constexpr = p_q.dtype.element_ty
    o_c = tl.arange(0, C)
    o_n = i_first + o_c
    m_n = o_n < i_stop
    o_row = (i_b * H + i_h) * N + o_n
    i_all = (B * H).to(tl.int64) * N
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_i += i_b * s_ib + i_h * s_ih
    p_f += i_b * s_fb + i_h * s_fh
    p_do += i_b * s_ob + i_h * s_oh
    b_i, b_f = gate_tile(p_i, p_f, o_n, s_in, s_fn, i_stop)
    b_m = tl.load(p_rows + o_row, mask=m_n, other=INF)
    b_inverse = tl.load(p_rows + i_all + o_row, mask=m_n, other=0.0)
    b_delta = tl.load(p_delta + o_row, mask=m_n, other=0.0)
    b_before = tl.load(p_bound + i_slot)
    b_head, b_whole, b_tail, b_after = decays(p_i, p_f, o_n, b_before, s_in, s_fn, i_stop, C)
    # from the state before the chunk to each row, from each position to the state after it, and past both
    b_kept = tl.exp(tl.minimum(b_head + b_before - b_m, 0.0)) * scale
    b_written = tl.exp(b_tail - b_after)
    b_across = tl.exp(b_whole + b_before - b_after)
    # [C, C]
    b_e = tl.exp(tl.minimum(within(log_sigmoid(b_f), b_i, C) - b_m[:, None], 0.0))
    b_s = tl.zeros([C, C], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = m_n[:, None] & (o_d < D)[None, :]
        b_q = tl.load(p_q + (o_n * s_qm)[:, None] + (o_d * s_qd)[None, :], mask=m_d, other=0.0)
        b_k = tl.load(p_k + (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :], mask=m_d, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision="ieee")
    b_g = tl.zeros([C, C], dtype=tl.float32)
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = m_n[:, None] & (o_e < E)[None, :]
        b_v = tl.load(p_v + (o_n * s_vn)[:, None] + (o_e * s_ve)[None, :], mask=m_e, other=0.0)
        b_do = tl.load(p_do + (o_n * s_om)[:, None] + (o_e * s_oe)[None, :], mask=m_e, other=0.0).to(dtype)
        b_g = tl.dot(b_do, tl.trans(b_v), b_g, input_precision="ieee")
    b_g = b_g * b_inverse[:, None] + b_delta[:, None]
    b_e = b_e * scale
    b_p, b_ds = b_s * b_e, b_g * b_e
    b_dd = b_p * b_g
    b_p, b_up_p = stored(b_p, dtype)
    b_ds, b_up_s = stored(b_ds, dtype)

    # what pairs with a position before the chunk add to each row, and pairs with one after it to each column
    b_rows = tl.zeros([C], dtype=tl.float32)
    b_columns = tl.zeros([C], dtype=tl.float32)
    b_pairs = 0.0
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = m_n[:, None] & (o_d < D)[None, :]
        b_q = tl.load(p_q + (o_n * s_qm)[:, None] + (o_d * s_qd)[None, :], mask=m_d, other=0.0)
        b_k = tl.load(p_k + (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :], mask=m_d, other=0.0)
        b_n = tl.load(p_n + i_slot * D + o_d, mask=o_d < D, other=0.0)
        b_dn = tl.load(p_dn + i_slot * D + o_d, mask=o_d < D, other=0.0)
        b_dq = tl.zeros([C, BD], dtype=tl.float32)
        b_dk = tl.zeros([C, BD], dtype=tl.float32)
        b_pairs += tl.sum(b_n * b_dn, 0)
        for i_e in range(0, E, BE):
            o_e = i_e + tl.arange(0, BE)
            m_e = m_n[:, None] & (o_e < E)[None, :]
            m_de = (o_d < D)[:, None] & (o_e < E)[None, :]
            b_v = tl.load(p_v + (o_n * s_vn)[:, None] + (o_e * s_ve)[None, :], mask=m_e, other=0.0)
            b_do = tl.load(p_do + (o_n * s_om)[:, None] + (o_e * s_oe)[None, :], mask=m_e, other=0.0).to(
                dtype
            )
            b_c = tl.load(p_state + (i_slot * D + o_d)[:, None] * E + o_e[None, :], mask=m_de, other=0.0)
            b_dc = tl.load(p_dstate + (i_slot * D + o_d)[:, None] * E + o_e[None, :], mask=m_de, other=0.0)
            b_pairs += tl.sum(tl.sum(b_c * b_dc, 1), 0)
            b_c, b_up = stored(b_c, dtype)
            b_dq += tl.dot(b_do, tl.trans(b_c), input_precision="ieee") * b_up
            b_dc, b_up = stored(b_dc, dtype)
            b_dk += tl.dot(b_v, tl.trans(b_dc), input_precision="ieee") * b_up
        b_dq = (b_dq * b_inverse[:, None] + b_delta[:, None] * b_n[None, :]) * b_kept[:, None]
        b_dk = (b_dk + b_dn[None, :]) * b_written[:, None]
        b_rows += tl.sum(b_dq * b_q.to(tl.float32), 1)
        b_columns += tl.sum(b_dk * b_k.to(tl.float32), 1)
        b_dq += tl.dot(b_ds, b_k, input_precision="ieee") * b_up_s
        b_dk += tl.dot(tl.trans(b_ds), b_q, input_precision="ieee") * b_up_s
        o_out = (o_row * D)[:, None] + o_d[None, :]
        tl.store(p_dq + o_out, b_dq.to(dtype), mask=m_d)
        tl.store(p_dk + o_out, b_dk.to(dtype), mask=m_d)

    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = m_n[:, None] & (o_e < E)[None, :]
        b_do = tl.load(p_do + (o_n * s_om)[:, None] + (o_e * s_oe)[None, :], mask=m_e, other=0.0)
        b_do, b_up_o = stored(b_do.to(tl.float32) * b_inverse[:, None], dtype)
        b_dv = tl.zeros([C, BE], dtype=tl.float32)
        for i_d in range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            m_d = m_n[:, None] & (o_d < D)[None, :]
            m_de = (o_d < D)[:, None] & (o_e < E)[None, :]
            b_k = tl.load(p_k + (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :], mask=m_d, other=0.0)
            b_dc = tl.load(p_dstate + (i_slot * D + o_d)[:, None] * E + o_e[None, :], mask=m_de, other=0.0)
            b_dc, b_up = stored(b_dc, dtype)
            b_dv += tl.dot(b_k, b_dc, input_precision="ieee") * b_up
        b_dv = b_dv * b_written[:, None]
        b_dv += tl.dot(tl.trans(b_p), b_do, input_precision="ieee") * (b_up_p * b_up_o)
        tl.store(p_dv + (o_row * E)[:, None] + o_e[None, :], b_dv.to(dtype), mask=m_e)

    tl.store(p_di + o_row, (tl.sum(b_dd, 0) + b_columns).to(p_di.dtype.element_ty), mask=m_n)
    # [t, j]: Σ_{i ≥ t} dD_ij, of which the columns before t count for its gate
    m_before = o_c[:, None] > o_c[None, :]
    b_inside = tl.sum(tl.where(m_before, tl.cumsum(b_dd, 0, reverse=True), 0.0), 1)
    b_into = tl.sum(tl.where(o_c[:, None] <= o_c[None, :], b_rows[None, :], 0.0), 1)
    b_out = tl.sum(tl.where(m_before, b_columns[None, :], 0.0), 1)
    # σ(−f)
    b_t = tl.exp(-tl.abs(b_f))
    b_slope = tl.where(b_f > 0, b_t, 1.0) / (1.0 + b_t)
    b_df = tl.where(b_f == -INF, 0.0, (b_inside + b_into + b_out + b_pairs * b_across) * b_slope)
    tl.store(p_df + o_row, b_df.to(p_df.dtype.element_ty), mask=m_n)


def chunk_gradients(
    call: Call,
    o: torch.Tensor,
    rows: torch.Tensor,
    do: torch.Tensor | None,
    dend: tuple[torch.Tensor | None, torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv, di, df, like the inputs, and the gradients of the initial C' and n', None without them.

    Args:
        call: the forward pass.
        o, rows: what it computed, and what it kept of every row, (3,B,H,N).
        do: cotangent of o, (B,H,N,E), or None.
        dend: cotangents of the final C' and n', or None.
    """
    found = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in call.inputs)
    dstart = tuple(None if x is None else torch.empty_like(x) for x in call.start[:2])
    batch, heads, length, width, value_width = call.sizes
    count, chunks = call.sequences.count, call.chunks
    if not count * heads:
        return *found, *dstart
    if do is None:
        do = o.new_zeros(()).expand(o.shape)
    before, _ = states(call)
    delta = call.new(batch, heads, length)
    if length:
        delta_kernel[triton.cdiv(length, call.chunk), batch * heads](
            do, o, rows, delta, *do.stride(), batch, heads, length, value_width, C=call.chunk,
            BE=call.tiles["BE"], num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    dstates = call.new_states(chunks.count)[:2]
    sizes = (*call.strides, *do.stride(), *call.sizes, chunks.each, call.scale)
    cu_seqlens = call.sequences.cu_seqlens
    grid = (count * heads, triton.cdiv(width, call.tiles["BD"]), triton.cdiv(value_width, call.tiles["BE"]))
    state_gradient_kernel[grid](
        *call.inputs, do, rows, delta, before.m, *dstates,
        *(None if x is None else x.contiguous() for x in dend), *dstart, cu_seqlens, chunks.first, *sizes,
        UNIT=call.unit, **call.tiles, **register_limit(call.tiles["num_warps"]),
    )  # fmt: skip
    # Two tiles of scores beside six of operands: with four warps, or operands twice as wide, registers are
    # spilled to memory on some target.
    tiles = {**call.tiles, "BD": 16, "BE": 16, "num_warps": 8}
    if length:
        gradient_kernel[(chunks.count * heads,)](
            *call.inputs, do, rows, delta, *before, *dstates, *found, cu_seqlens, chunks.first, chunks.owner,
            *sizes, UNIT=call.unit, **tiles, **register_limit(tiles["num_warps"]),
        )  # fmt: skip
    return *found, *dstart
