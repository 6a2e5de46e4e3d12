"""mLSTM, forward: a matrix memory with exponential input gates, step by step and chunk by chunk.

    C_t = σ(f_t) C_{t−1} + e^{i_t} k_t v_tᵀ,   n_t = σ(f_t) n_{t−1} + e^{i_t} k_t
    o_t = scale · C_tᵀ q_t / max(|scale · n_tᵀ q_t|, 1)

(Beck et al., "xLSTM", arXiv 2405.04517.) With the running maximum m_t = max(log σ(f_t) + m_{t−1}, i_t) and
C' = C e^{−m}, n' = n e^{−m} no exponential has a positive argument; the bound of the denominator becomes
e^{−m} (theory 2.10: a bound that stays 1 is another function). A chunk of rows sees the state before it and
its own scores:

    o_i ∝ e^{F_i + m₀ − m_i} · scale q_iᵀ C₀ + Σ_j scale (q_i·k_j) e^{D_ij − m_i} v_j,  D_ij = F_i − F_j + i_j

with F the sum of log σ(f) inside the chunk and m₀ of the state before it.

What is kept on purpose:

* F_i − F_j is the sum of the gates between, not a difference of two sums, which loses what a gate of −1000
  leaves to the 24 bits of float32, and is NaN after a gate of −∞.
* log σ(f) = min(f, 0) − log(1 + t), t = e^−|f|, takes the logarithm from its series in t/(2 + t): with slow
  gates an error of 2⁻²⁴ for 1 + t adds up over thousands of positions.
* Where m < 0, e^{−m} may overflow: numerator, denominator and bound are multiplied by e^{min(m, 0)}.
* float16 operands that were computed (P, decayed keys, the state) are brought to the format's range first
  (:func:`attnproof.kernels.softmax_backward.stored`).
* m has no gradient: o does not depend on it. The gradient of max(|x|, 1) at |x| = 1 is shared, one half each,
  as torch.maximum does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_block, check_finite
from attnproof.kernels.mlstm_backward import chunk_gradients
from attnproof.kernels.mlstm_chunks import (
    CHUNK,
    RUNTIME,
    Call,
    denominator,
    gate_tile,
    log_sigmoid,
    start_of,
    states,
    within,
)
from attnproof.kernels.softmax import INF_BITS, isolated
from attnproof.kernels.softmax_backward import stored
from attnproof.kernels.states import check_gate, check_state_tensors, register_limit
from attnproof.properties.contract import Contract, Precision, Supports, promises

__all__ = ["attention", "attention_recurrent", "chunkwise"]

INF: tl.constexpr = tl.constexpr(float("inf"))
Entry = Callable[..., Any]


@triton.jit(do_not_specialize=[*RUNTIME, "p_o", "p_rows"])
def output_kernel(
    p_q, p_k, p_v, p_i, p_f, p_state, p_n, p_bound, p_o, p_rows,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ib: tl.int64, s_ih: tl.int64, s_in: tl.int64, s_fb: tl.int64, s_fh: tl.int64, s_fn: tl.int64,
    B, H, N, D, E, CHUNKS, scale,
    UNIT: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """o of one chunk, and for the backward pass m, 1/denominator and its slope of every row."""
    i_bh, i_c, i_b, i_h = start_of(H, CHUNKS)
    if UNIT:
        s_qd, s_kd, s_ve = 1, 1, 1
    o_c = tl.arange(0, C)
    o_n = i_c.to(tl.int64) * C + o_c
    m_n = o_n < N
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    b_i, b_f = gate_tile(p_i + i_b * s_ib + i_h * s_ih, p_f + i_b * s_fb + i_h * s_fh, o_n, s_in, s_fn, N)
    b_log_f = log_sigmoid(b_f)
    i_slot = i_bh * (CHUNKS + 1) + i_c
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
    o_row = i_bh * N + o_n
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
    p_q, p_k, p_v, p_i, p_f, p_state, p_n, p_bound, p_o, p_rows,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ib: tl.int64, s_ih: tl.int64, s_in: tl.int64, s_fb: tl.int64, s_fh: tl.int64, s_fn: tl.int64,
    B, H, N, D, E, CHUNKS, scale,
    UNIT: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """All rows one after the other, for a slice of E; the final state goes to p_state, p_n and p_bound."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
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
    i_all = (B * H).to(tl.int64) * N
    for i_t in range(N):
        i_n = tl.zeros([], dtype=tl.int64) + i_t
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
        i_row = i_bh * N + i_n
        tl.store(p_o + i_row * E + o_e, b_o.to(p_o.dtype.element_ty), mask=m_e)
        if p_rows is not None:
            if tl.program_id(1) == 0:
                tl.store(p_rows + i_row, b_m)
                tl.store(p_rows + i_all + i_row, b_factor)
                tl.store(p_rows + 2 * i_all + i_row, b_slope)
    if p_state is not None:
        o_state = (i_bh * D + o_d)[:, None] * E + o_e[None, :]
        tl.store(p_state + o_state, b_c, mask=m_d[:, None] & m_e[None, :])
        if tl.program_id(1) == 0:
            tl.store(p_n + i_bh * D + o_d, b_n, mask=m_d)
            tl.store(p_bound + i_bh, b_m)


def by_chunks(call: Call, rows: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """o, C', n' and m by chunks; m, 1/denominator and slope go to ``rows`` (3,B,H,N)."""
    state, n, bound = states(call)
    o = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    if o.numel():
        output_kernel[(call.chunks, call.batch * call.heads)](
            *call.inputs, state, n, bound, o, rows, *call.strides, *call.sizes, call.chunks, call.scale,
            UNIT=call.unit, **call.tiles, **register_limit(call.tiles["num_warps"]),
        )  # fmt: skip
    return o, state[:, :, -1].clone(), n[:, :, -1].clone(), bound[:, :, -1].clone()


def by_steps(call: Call, rows: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """o, C', n' and m by the recurrence; m, 1/denominator and slope go to ``rows`` (3,B,H,N)."""
    batch, heads, _, width, value_width = call.sizes
    o = torch.empty_like(call.v, memory_format=torch.contiguous_format)
    state = call.new(batch, heads, width, value_width)
    n, bound = call.new(batch, heads, width), call.new(batch, heads)
    block = triton.next_power_of_2(width)
    narrow = max(8, min(triton.next_power_of_2(value_width), 4096 // block))
    if batch * heads:
        recurrent_kernel[(batch * heads, triton.cdiv(value_width, narrow))](
            *call.inputs, state, n, bound, o, rows, *call.strides, *call.sizes, 1, call.scale,
            UNIT=call.unit, C=1, BD=block, BE=narrow, num_warps=4, num_stages=1, enable_fp_fusion=False,
            **register_limit(4),
        )  # fmt: skip
    return o, state, n, bound


FORMS = {"chunkwise": by_chunks, "recurrent": by_steps}


class MLSTMAttention(torch.autograd.Function):
    """q, k, v, i, f to o, C', n', m; only o is differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        i: torch.Tensor,
        f: torch.Tensor,
        scale: float,
        chunk: int,
        form: str,
    ) -> tuple[torch.Tensor, ...]:
        call = Call((q, k, v, i, f), scale, chunk)
        rows = call.new(3, *q.shape[:3]) if any(ctx.needs_input_grad) else None
        o, state, n, bound = FORMS[form](call, rows)
        if rows is not None:
            ctx.save_for_backward(q, k, v, i, f, o, rows)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.mark_non_differentiable(state, n, bound)
        return o, state, n, bound

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, i, f, o, rows = ctx.saved_tensors
        found = chunk_gradients(Call((q, k, v, i, f), ctx.scale, ctx.chunk), o, rows, do)
        needed = (x if need else None for x, need in zip(found, ctx.needs_input_grad[:5], strict=True))
        return *needed, None, None, None


def run(
    tensors: tuple[torch.Tensor, ...], scale: float, return_state: bool, chunk: int, form: str
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Check a call and compute it in one of :data:`FORMS`."""
    q, k, v, i, f = tensors
    check_state_tensors(q, k, v, "mlstm")
    for name, gate in (("i", i), ("f", f)):
        check_gate(name, gate, q, "mlstm", vector=False)
    check_finite("scale", scale, "mlstm")
    found: tuple[torch.Tensor, ...] = MLSTMAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, i, f, float(scale), chunk, form
    )
    return found if return_state else found[0]


CONTRACT = Contract(
    family="mlstm",
    options=("return_state",),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
    precision=Precision(),
)


def chunkwise(chunk: int = CHUNK) -> Entry:
    """A kernel that works on chunks of ``chunk`` positions.

    Args:
        chunk: a power of two from 16 on. Larger chunks store fewer states and compute more scores.

    Returns:
        The function ``attention`` with that chunk.

    Raises:
        ContractError: ``chunk`` is not such a number.
    """
    check_block("chunk", chunk, "mlstm")

    @promises(CONTRACT)
    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        i: torch.Tensor,
        f: torch.Tensor,
        *,
        scale: float,
        return_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The mLSTM of q, k (B,H,N,D) and v (B,H,N,E), differentiable in all five tensors.

        Args:
            q, k, v: float32, float16 or bfloat16, all alike; any strides; D and E from 1 to 256.
            i, f: (B,H,N) pre-activations of the input gate, e^i, and of the forget gate, σ(f); of q's dtype
                or float32. f may be −∞: everything before is forgotten.
            scale: of the scores.
            return_state: whether the final state is returned. It has no gradient.

        Returns:
            o (B,H,N,E) of q's dtype; with ``return_state`` also C' (B,H,D,E), n' (B,H,D) and m (B,H) float32:
            the state is C' e^m and n' e^m. m of no position is −∞.

        Raises:
            ContractError: for arguments that the contract does not allow.
            NotImplementedError: for float64 and for widths above 256.
        """
        return run((q, k, v, i, f), scale, return_state, chunk, "chunkwise")

    return attention


attention = chunkwise()


@promises(CONTRACT)
def attention_recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    f: torch.Tensor,
    *,
    scale: float,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """As :func:`attention`, position by position in float32; the backward pass works on chunks of 16."""
    return run((q, k, v, i, f), scale, return_state, 16, "recurrent")
