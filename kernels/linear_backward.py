"""Linear attention as a differentiable function of q, k, v and the initial state, in any of its forms.

With dN_i = dO_i / d_i and r_i = −dO_i·o_i / d_i, the cotangents of numerator and normaliser (1·dO_i and none
without a normaliser), and R_j = dS_N + Σ_{i ≥ j} φ(q_i) dN_iᵀ, ρ_j = dz_N + Σ_{i ≥ j} r_i φ(q_i):

    dφ(q_i) = S_i dN_i + r_i z_i,   dφ(k_j) = R_j v_j + ρ_j,   dv_j = R_jᵀ φ(k_j),
    dS_0 = R_0,   dz_0 = ρ_0

(the transposed recurrence; theory LIN-1, and bugs B54 for the part of z). Each is a sum of the same form as o
is: see :mod:`attnproof.kernels.linear_operands`. Every element has one owner and one order: no atomics. r is
formed from o in float32, which is kept for that where a normaliser and a gradient are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.feature_maps import FeatureMap, product_features, product_features_backward
from attnproof.kernels.linear_chunks import chunk_outputs, chunk_states
from attnproof.kernels.linear_operands import COLUMN, ROW, Operand, Output, States
from attnproof.kernels.linear_recurrent import recurrent_outputs
from attnproof.kernels.states import Sequences

__all__ = ["Call", "LinearAttention"]

DELTA_ROWS = 16


@dataclass(frozen=True, slots=True)
class Call:
    """One call: its options and how it is cut.

    Attributes:
        feature_map: φ.
        normalize, causal: as in the contract.
        sequences: where sequences lie.
        chunk: positions a chunk; None for the recurrent form.
        final: the final state is asked for.
        differentiated: a gradient may be asked for, so that what it needs is kept.
    """

    feature_map: FeatureMap
    normalize: bool
    causal: bool
    sequences: Sequences
    chunk: int | None
    final: bool
    differentiated: bool

    @property
    def single_chunk(self) -> bool:
        """Whether no sequence has more than one chunk, so that only the initial state enters from outside."""
        return self.chunk is not None and self.chunk >= self.sequences.longest


@triton.jit(do_not_specialize=["p_d", "p_r", "s_b", "s_h", "s_n", "s_e", "H", "N", "E"])
def normaliser_cotangent_kernel(
    p_o, p_do, p_d, p_r, s_b: tl.int64, s_h: tl.int64, s_n: tl.int64, s_e: tl.int64,
    H, N, E, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """r = −dO·o / d of a tile of rows, o float32 and contiguous."""
    i_bh = tl.program_id(0)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_n, o_e = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BE)
    m_n = o_n < N
    m_o = m_n[:, None] & (o_e < E)[None, :]
    o_row = i_bh.to(tl.int64) * N + o_n
    # [BN, BE]
    b_o = tl.load(p_o + (o_row * E)[:, None] + o_e[None, :], mask=m_o, other=0.0)
    o_do = i_b * s_b + i_h * s_h + (o_n.to(tl.int64) * s_n)[:, None] + (o_e * s_e)[None, :]
    b_do = tl.load(p_do + o_do, mask=m_o, other=0.0).to(tl.float32)
    b_d = tl.load(p_d + o_row, mask=m_n, other=1.0)
    tl.store(p_r + o_row, -tl.sum(b_o * b_do, 1) / b_d, mask=m_n)


def normaliser_cotangent(o: torch.Tensor, do: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """r (B,H,N) float32."""
    batch, heads, length, width = o.shape
    r = torch.empty_like(d)
    if r.numel():
        normaliser_cotangent_kernel[(batch * heads, triton.cdiv(length, DELTA_ROWS))](
            o, do, d, r, *do.stride(), heads, length, width, BN=DELTA_ROWS,
            BE=max(16, triton.next_power_of_2(width)), enable_fp_fusion=False,
        )  # fmt: skip
    return r


def features(x: torch.Tensor, call: Call) -> Operand:
    """φ(x) as an operand: written out for a map of products, else applied where x is loaded."""
    if call.feature_map.is_product:
        return Operand(product_features(x, call.feature_map))
    return Operand(x, call.feature_map.value)


def empty_states(call: Call, heads: int, width: int, value_width: int, device: torch.device) -> States:
    """Room for a final state."""
    shape = (call.sequences.count, heads, width)
    z = torch.empty(shape, dtype=torch.float32, device=device) if call.normalize else None
    return States(torch.empty((*shape, value_width), dtype=torch.float32, device=device), z)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, initial: States, call: Call
) -> tuple[torch.Tensor, torch.Tensor | None, States]:
    """o, the normalisers d (B,H,N) float32 or None, and the final state, None where it is not asked for.

    o is float32 where the backward pass needs it so.
    """
    x, y = features(q, call), features(k, call)
    wide = call.normalize and call.differentiated
    o = torch.empty(v.shape, dtype=torch.float32 if wide else q.dtype, device=q.device)
    d = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if call.normalize else None
    output = Output(normaliser=d)
    if call.chunk is None:
        final = States(None, None)
        if call.final:
            final = empty_states(call, q.shape[1], y.tensor.shape[3], v.shape[3], q.device)
        recurrent_outputs(
            x, y, Operand(v), initial, call.sequences, o, output, causal=call.causal, final=final
        )
        return o, d, final
    chunks = call.sequences.chunks(call.chunk)
    borders, final = borders_of(y, v, initial, call, q.dtype, wanted=call.final)
    chunk_outputs(
        x, y, Operand(v), borders, call.sequences, chunks, o, output, dtype=q.dtype, causal=call.causal,
        within=call.causal or call.single_chunk, per_chunk=call.causal and not call.single_chunk,
    )  # fmt: skip
    return o, d, final if call.final else States(None, None)


def borders_of(
    y: Operand,
    v: torch.Tensor,
    initial: States,
    call: Call,
    dtype: torch.dtype,
    *,
    wanted: bool,
    reverse: bool = False,
    d: torch.Tensor | None = None,
    r: torch.Tensor | None = None,
) -> tuple[States, States]:
    """The states that chunks read, and the final ones, which may be absent unless ``wanted``.

    Without causal every row reads the final state; a single chunk reads nothing but the initial one.
    """
    assert call.chunk is not None
    if call.single_chunk and not wanted:
        return initial, States(None, None)
    stored = call.causal and not call.single_chunk
    borders, final = chunk_states(
        y, v, initial, call.sequences, call.sequences.chunks(call.chunk), dtype=dtype,
        normalize=call.normalize, reverse=reverse, stored=stored, d=d, r=r,
    )  # fmt: skip
    if call.single_chunk:
        return initial, final
    return borders if stored else final, final


@dataclass(frozen=True, slots=True)
class Cotangents:
    """What the backward pass starts from: dO, d and r (None without a normaliser), and dS_N, dz_N."""

    do: torch.Tensor
    d: torch.Tensor | None
    r: torch.Tensor | None
    final: States


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, initial: States, cotangents: Cotangents, call: Call
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, States]:
    """dq, dk, dv, and the gradient of the initial state."""
    x, y = features(q, call), features(k, call)
    do, d, r = cotangents.do, cotangents.d, cotangents.r
    feature_map = call.feature_map
    out_dtype = torch.float32 if feature_map.is_product else q.dtype
    dx, dy = (torch.empty(op.tensor.shape, dtype=out_dtype, device=q.device) for op in (x, y))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    slope = feature_map.slope
    gates = (None, None) if slope is None else (Operand(q, slope), Operand(k, slope))
    of_q = Output(side=ROW, transposed=True, d=d, r=r, gate=gates[0])
    of_k = Output(reverse=True, side=COLUMN, transposed=True, d=d, r=r, gate=gates[1])
    of_v = Output(reverse=True, side=COLUMN, d=d)
    # (x_i, y_j, v_j, result, its output); see the table
    rows = (
        (Operand(do), Operand(v), y, dx, of_q),
        (Operand(v), Operand(do), x, dy, of_k),
        (y, x, Operand(do), dv, of_v),
    )
    if call.chunk is None:
        dinitial = empty_states(call, q.shape[1], x.tensor.shape[3], v.shape[3], q.device)
        finals = (States(None, None), States(None, dinitial.z), States(dinitial.state, None))
        starts = (initial, cotangents.final, States(cotangents.final.state, None))
        for (a, b, c, out, output), start, final in zip(rows, starts, finals, strict=True):
            recurrent_outputs(a, b, c, start, call.sequences, out, output, causal=call.causal, final=final)
    else:
        before, _ = borders_of(y, v, initial, call, q.dtype, wanted=False)
        after, dinitial = borders_of(
            x, do, cotangents.final, call, q.dtype, wanted=True, reverse=True, d=d, r=r
        )
        states = (before, after, States(after.state, None))
        for (a, b, c, out, output), state in zip(rows, states, strict=True):
            chunk_outputs(
                a, b, c, state, call.sequences, call.sequences.chunks(call.chunk), out, output,
                dtype=q.dtype, causal=call.causal, within=call.causal or call.single_chunk,
                per_chunk=call.causal and not call.single_chunk,
            )  # fmt: skip
    if feature_map.is_product:
        dx, dy = (product_features_backward(a, da, feature_map) for a, da in ((q, dx), (k, dy)))
    return dx, dy, dv, dinitial


def final_cotangents(
    dstate: torch.Tensor | None, dz: torch.Tensor | None, q: torch.Tensor, v: torch.Tensor, call: Call
) -> States:
    """Cotangents of the final state as kernels read them: contiguous, and both parts or neither."""
    if dstate is None and dz is None:
        return States(None, None)
    shape = (call.sequences.count, q.shape[1], call.feature_map.width(q.shape[3]))
    if dstate is None:
        dstate = torch.zeros((*shape, v.shape[3]), dtype=torch.float32, device=q.device)
    if dz is None and call.normalize:
        dz = torch.zeros(shape, dtype=torch.float32, device=q.device)
    return States(dstate.contiguous(), None if dz is None else dz.contiguous())


class LinearAttention(torch.autograd.Function):
    """q, k, v, S_0, z_0 and a :class:`Call` to o, S_N and z_N, the last two None where not asked for.

    Gradients are recomputed from the inputs, d and o.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: torch.Tensor | None,
        z: torch.Tensor | None,
        call: Call,
    ) -> tuple[torch.Tensor | None, ...]:
        initial = States(*(None if x is None else x.contiguous() for x in (state, z)))
        o, d, final = forward(q, k, v, initial, call)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *initial, d, o if call.normalize and call.differentiated else None)
        return o.to(q.dtype), *final

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dstate: torch.Tensor | None, dz: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, state, z, d, o = ctx.saved_tensors
        if do is None:
            do = v.new_zeros(1).expand(v.shape)
        final = final_cotangents(dstate, dz, q, v, ctx.call)
        r = None if d is None else normaliser_cotangent(o, do, d)
        dq, dk, dv, dinitial = gradients(q, k, v, States(state, z), Cotangents(do, d, r, final), ctx.call)
        every = (dq, dk, dv, *dinitial, None)
        return tuple(x if need else None for x, need in zip(every, ctx.needs_input_grad, strict=True))
