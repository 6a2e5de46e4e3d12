"""Linear attention one position at a time: the recurrent form, which is also one step of decoding (N = 1).

    S ← S + y_t v_tᵀ,   out_t = x_t S

with the operands of the table in :mod:`attnproof.kernels.linear_operands` (Katharopoulos et al., arXiv
2006.16236, section 3.3.1). The state never leaves a program's registers: a program owns all keys of a few
columns of values. Everything is float32; nothing is rounded but the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnproof.kernels.feature_maps import identity
from attnproof.kernels.linear_chunks import RUNTIME, SIDE_COLUMN, SIDE_ROW
from attnproof.kernels.linear_operands import Operand, Output, States
from attnproof.kernels.states import Sequences, register_limit, sequence_bounds

__all__ = ["recurrent_outputs"]

# Values a program, warps: the state of 256 keys and 8 values is 16 registers a thread. A wider block would
# read q and k less often, and leave fewer programs to a machine that waits for one position after the other.
VALUES = 8
WARPS = 4


@triton.jit
def entries(p_x, i_n, o_c, s_n, s_c, C, MAP: tl.constexpr):
    """MAP of row i_n of x, float32, 0 beyond its width."""
    b_x = MAP(tl.load(p_x + i_n * s_n + o_c * s_c, mask=o_c < C, other=0.0))
    return tl.where(o_c < C, b_x.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=RUNTIME)
def recurrent_kernel(
    p_x, p_y, p_v, p_gate, p_d, p_r, p_s0, p_z0, p_sn, p_zn, p_cu, p_o, p_den,
    s_xb: tl.int64, s_xh: tl.int64, s_xn: tl.int64, s_xc: tl.int64,
    s_yb: tl.int64, s_yh: tl.int64, s_yn: tl.int64, s_yc: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_vc: tl.int64,
    s_gb: tl.int64, s_gh: tl.int64, s_gn: tl.int64, s_gc: tl.int64,
    s_sk: tl.int64, s_sv: tl.int64, H, N, K, V,
    X_MAP: tl.constexpr, Y_MAP: tl.constexpr, V_MAP: tl.constexpr, SLOPE: tl.constexpr,
    CAUSAL: tl.constexpr, REVERSE: tl.constexpr, SIDE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All rows of one sequence and head, columns of one block; arguments as those of chunk_kernel.

    z has K entries where the row is divided by its normaliser, V entries where r is given.
    """
    i_sh = tl.program_id(0)
    i_h, i_v = (i_sh % H).to(tl.int64), tl.program_id(1) * BV
    i_b, i_bos, i_eos = sequence_bounds(p_cu, i_sh // H, N)
    p_x += i_b * s_xb + i_h * s_xh
    p_y += i_b * s_yb + i_h * s_yh
    p_v += i_b * s_vb + i_h * s_vh
    p_gate = None if p_gate is None else p_gate + i_b * s_gb + i_h * s_gh
    i_row = (i_b * H + i_h) * N
    o_k, o_v = tl.arange(0, BK), i_v + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    # [BK, BV], [BK], [BV]
    o_s = i_sh.to(tl.int64) * K * V + (o_k * s_sk)[:, None] + (o_v * s_sv)[None, :]
    b_s = tl.zeros([BK, BV], dtype=tl.float32)
    b_zk = tl.zeros([BK], dtype=tl.float32)
    b_zv = tl.zeros([BV], dtype=tl.float32)
    if p_s0 is not None:
        b_s += tl.load(p_s0 + o_s, mask=m_s, other=0.0)
    if p_z0 is not None:
        if p_den is not None:
            b_zk += tl.load(p_z0 + i_sh.to(tl.int64) * K + o_k, mask=o_k < K, other=0.0)
        else:
            b_zv += tl.load(p_z0 + i_sh.to(tl.int64) * V + o_v, mask=o_v < V, other=0.0)
    # without causal, a first pass collects the state that every row of the second one reads
    for PASS in tl.static_range(1 if CAUSAL else 0, 2):
        for i_t in range((i_eos - i_bos).to(tl.int32)):
            i_n = i_eos - 1 - i_t if REVERSE else i_bos + i_t
            b_d, b_r = 1.0, 1.0
            if p_d is not None:
                b_d = tl.load(p_d + i_row + i_n)
            if p_r is not None:
                b_r = tl.load(p_r + i_row + i_n)
            if CAUSAL or PASS == 0:
                b_y = entries(p_y, i_n, o_k, s_yn, s_yc, K, Y_MAP)
                b_v = entries(p_v, i_n, o_v, s_vn, s_vc, V, V_MAP)
                b_zk += b_y
                if SIDE == SIDE_COLUMN:
                    b_y = b_y / b_d
                    b_zv += b_v * b_r
                else:
                    b_zv += b_v
                b_s += b_y[:, None] * b_v[None, :]
            if PASS == 1:
                b_x = entries(p_x, i_n, o_k, s_xn, s_xc, K, X_MAP)
                b_o = tl.sum(b_x[:, None] * b_s, 0)
                if SIDE == SIDE_ROW:
                    b_o = b_o / b_d
                if p_r is not None:
                    b_o += (b_r if SIDE == SIDE_ROW else 1.0) * b_zv
                if p_den is not None:
                    b_den = tl.sum(b_x * b_zk, 0)
                    b_o = b_o / b_den
                    tl.store(p_den + i_row + i_n, b_den, mask=i_v == 0)
                if p_gate is not None:
                    b_o *= SLOPE(entries(p_gate, i_n, o_v, s_gn, s_gc, V, identity))
                tl.store(p_o + (i_row + i_n) * V + o_v, b_o.to(p_o.dtype.element_ty), mask=o_v < V)
    if p_sn is not None:
        tl.store(p_sn + o_s, b_s, mask=m_s)
    if p_zn is not None:
        if p_den is not None:
            tl.store(p_zn + i_sh.to(tl.int64) * K + o_k, b_zk, mask=(o_k < K) & (i_v == 0))
        else:
            tl.store(p_zn + i_sh.to(tl.int64) * V + o_v, b_zv, mask=o_v < V)


def recurrent_outputs(
    x: Operand,
    y: Operand,
    v: Operand,
    initial: States,
    sequences: Sequences,
    out: torch.Tensor,
    output: Output,
    *,
    causal: bool,
    final: States,
) -> torch.Tensor:
    """``out`` (B,H,N,V), contiguous, filled with the row of the table that ``output`` describes; ``initial``
    is where the first position to be read begins, (P,H,K,V), or (P,H,V,K) with ``output.transposed``, and
    ``final`` is filled with what lies behind the last.
    """
    heads, length, width = x.tensor.shape[1:]
    value_width = v.tensor.shape[3]
    gate = output.gate
    tensors = (x.tensor, y.tensor, v.tensor)
    if sequences.count * heads:
        recurrent_kernel[(sequences.count * heads, triton.cdiv(value_width, VALUES))](
            *tensors, None if gate is None else gate.tensor, output.d, output.r, *initial, *final,
            sequences.cu_seqlens, out, output.normaliser,
            *(s for tensor in tensors for s in tensor.stride()),
            *((0,) * 4 if gate is None else gate.tensor.stride()),
            *((1, width) if output.transposed else (value_width, 1)),
            heads, length, width, value_width,
            X_MAP=x.map, Y_MAP=y.map, V_MAP=v.map, SLOPE=identity if gate is None else gate.map,
            CAUSAL=causal, REVERSE=output.reverse, SIDE=output.side,
            BK=max(16, triton.next_power_of_2(width)), BV=VALUES, num_warps=WARPS, enable_fp_fusion=False,
            **register_limit(WARPS),
        )  # fmt: skip
    return out
