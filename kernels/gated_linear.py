"""Gated linear attention: a state that decays, by one gate a position or one a key channel.

    S_t = exp(g_t)[:, None] ∘ S_{t−1} + k_t v_tᵀ,   o_t = scale · q_tᵀ S_t

(Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv 2312.06635;
theory GLA-1 to GLA-3.) :func:`recurrent` takes one position after the other. :func:`attention`, and
:func:`with_chunk` for chunks of another size, first walk over a sequence for the states between its chunks,
then compute all chunks at the same time, in secondary chunks of 16 rows; see
:mod:`attnproof.kernels.gated_linear_chunks`. Both have the gradients of
:mod:`attnproof.kernels.gated_linear_backward`, from states that are computed again and not kept.

A gate of −inf empties the state: what came before adds exactly 0, and the gradient of such a gate is 0.
Retention and RWKV-6 are the same kernels with other gates and another read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_finite
from attnproof.kernels.gated_linear_backward import gradient_kernel
from attnproof.kernels.gated_linear_chunks import ROWS, recurrent_kernel, states_kernel, walk_kernel
from attnproof.kernels.states import (
    Chunks,
    Sequences,
    check_gate,
    check_initial_state,
    check_state_tensors,
    register_limit,
    sequences_of,
)
from attnproof.kernels.tiles import ALIGNED, memory_layout, padded_width
from attnproof.properties.contract import Contract, ContractError, Supports, promises

__all__ = ["CHUNK", "GATED_LINEAR", "Recurrence", "attended", "attention", "recurrent", "with_chunk"]

CHUNK = 64
CHUNKS = (16, 32, 64, 128)

GATED_LINEAR = Contract(
    family="gated_linear",
    options=("initial_state", "cu_seqlens", "return_state"),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
)


class Recurrence(NamedTuple):
    """How one call runs.

    Attributes:
        scale: factor of q·S.
        sequences: where its sequences lie.
        chunk: positions a chunk; the backward pass works in chunks whatever the forward pass does.
        stepwise: the forward pass takes one position after the other.
        exclusive: o_t reads S_{t−1} and its own key through the bonus u (RWKV-6).
        factors: exp(g) where the caller has it without rounding, for a stepwise forward pass.
    """

    scale: float
    sequences: Sequences
    chunk: int = CHUNK
    stepwise: bool = False
    exclusive: bool = False
    factors: torch.Tensor | None = None


Tensors = tuple[torch.Tensor, ...]


def strided(layout: int, *tensors: torch.Tensor) -> list[int]:
    """The strides of ``tensors`` as ``attnproof.kernels.pointwise.strides`` expects them."""
    unit = 16 if layout == ALIGNED else 1
    return [s // unit if axis < 3 else s for x in tensors for axis, s in enumerate(x.stride())]


def triton_dtype(x: torch.Tensor) -> tl.dtype:
    """The dtype of ``x`` in Triton's terms."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]


class ChunkTile(NamedTuple):
    """The shape of a launch: key and value channels a program, warps, and whether reads go row by row.

    Measured by compiling for sm_80, sm_90, sm_100 and gfx942: see tests/quality/spills.py.
    """

    block_d: int
    block_e: int
    num_warps: int
    by_row: bool


def states_tile(dtype: torch.dtype, width: int, value_width: int) -> ChunkTile:
    """Of the kernel of states, which reads none."""
    warps = 8 if dtype == torch.float32 else 4
    return ChunkTile(min(padded_width(width), 32), min(padded_width(value_width), 32), warps, False)


def walk_tile(dtype: torch.dtype, width: int, value_width: int) -> ChunkTile:
    """Of the kernel of outputs, which needs all key channels at once; beyond 64 of them operands in tf32,
    those of float16, are too wide for it, and it reads the state row by row as in float32.
    """
    block_d = padded_width(width)
    block_e = min(padded_width(value_width), max(ROWS.value, 4096 // block_d))
    warps = 8 if block_d > 32 else 4
    by_row = dtype == torch.float32 or (dtype == torch.float16 and block_d > 64)
    return ChunkTile(block_d, block_e, warps, by_row)


def gradient_tile(dtype: torch.dtype, width: int, value_width: int) -> ChunkTile:
    """Of the kernel of gradients, which needs all value channels at once, of two states; beyond 64 of them
    operands in tf32, those of float16, are too wide for it as well.
    """
    block_e = padded_width(value_width)
    area = 1024 if dtype == torch.float16 else 2048
    block_d = min(padded_width(width), max(ROWS.value, area // block_e))
    # at 32 value channels the area would hold more key channels than registers do
    if dtype != torch.float32 and block_e == 32:
        block_d = ROWS.value
    by_row = dtype == torch.float32 or (dtype == torch.float16 and block_e > 64)
    warps = 8 if block_e > (16 if dtype == torch.float32 else 64) else 4
    return ChunkTile(block_d, block_e, warps, by_row)


def chunk_states(
    run: Recurrence,
    chunks: Chunks,
    y: torch.Tensor,
    z: torch.Tensor,
    g: torch.Tensor,
    start: torch.Tensor | None,
    *,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before all chunks (T,H,D,E), and the last ones (S,H,D,E); of k and v, or, with time
    reversed, the gradients of the states after all chunks and of the initial ones, of q and do.
    """
    heads, length, width = y.shape[1:]
    value_width = z.shape[3]
    states = torch.empty((chunks.count, heads, width, value_width), dtype=torch.float32, device=y.device)
    end = torch.empty((run.sequences.count, heads, width, value_width), dtype=torch.float32, device=y.device)
    if end.numel():
        block_d, block_e, warps, _ = states_tile(y.dtype, width, value_width)
        layout = memory_layout(y, z)
        grid = (run.sequences.count * heads, triton.cdiv(width, block_d), triton.cdiv(value_width, block_e))
        states_kernel[grid](
            y, z, g, None if start is None else start.contiguous(), states, end, run.sequences.cu_seqlens,
            chunks.first, *strided(layout, y, z), *g.stride(),
            chunks.each, heads, length, width, value_width, run.scale if reverse else 1.0,
            REVERSE=reverse, EXCLUSIVE=run.exclusive, LAYOUT=layout, DTYPE=triton_dtype(y),
            C=chunks.size, R=ROWS, BD=block_d, BE=block_e,
            num_warps=warps, num_stages=1, enable_fp_fusion=False, **register_limit(warps),
        )  # fmt: skip
    return states, end


def walked(
    run: Recurrence,
    chunks: Chunks,
    tensors: Tensors,
    g: torch.Tensor,
    u: torch.Tensor | None,
    states: torch.Tensor,
    *,
    reverse: bool,
) -> torch.Tensor:
    """o of (q, k, v) and the states before all chunks; or dv of (k, q, do) and the gradients after them."""
    x, y, z = tensors
    heads, length, width = x.shape[1:]
    value_width = z.shape[3]
    out = torch.empty((*x.shape[:3], value_width), dtype=x.dtype, device=x.device)
    if out.numel():
        block_d, block_e, warps, by_row = walk_tile(x.dtype, width, value_width)
        layout = memory_layout(*tensors)
        walk_kernel[(chunks.count * heads, triton.cdiv(value_width, block_e))](
            x, y, z, g, u, states, out, run.sequences.cu_seqlens, chunks.first, chunks.owner,
            *strided(layout, x, y, z), *g.stride(), chunks.each, heads, length, width, value_width,
            1.0 if reverse else run.scale, run.scale if reverse else 1.0,
            REVERSE=reverse, EXCLUSIVE=run.exclusive, LAYOUT=layout, DTYPE=triton_dtype(x),
            C=chunks.size, R=ROWS, BD=block_d, BE=block_e, BY_ROW=by_row,
            num_warps=warps, num_stages=1, enable_fp_fusion=False, **register_limit(warps),
        )  # fmt: skip
    return out


def stepped(
    run: Recurrence,
    tensors: Tensors,
    g: torch.Tensor,
    u: torch.Tensor | None,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, final state) of (q, k, v), position by position."""
    q, _, v = tensors
    heads, length, width = q.shape[1:]
    value_width = v.shape[3]
    o = torch.empty((*q.shape[:3], value_width), dtype=q.dtype, device=q.device)
    end = torch.empty((run.sequences.count, heads, width, value_width), dtype=torch.float32, device=q.device)
    gates = g if run.factors is None else run.factors
    if end.numel():
        block_d = padded_width(width)
        block_e = min(padded_width(value_width), max(ROWS.value, 4096 // block_d))
        layout = memory_layout(*tensors)
        recurrent_kernel[(run.sequences.count * heads, triton.cdiv(value_width, block_e))](
            *tensors, gates, u, None if start is None else start.contiguous(), o, end,
            run.sequences.cu_seqlens, *strided(layout, *tensors), *gates.stride(),
            heads, length, width, value_width, run.scale,
            FACTORS=run.factors is not None, EXCLUSIVE=run.exclusive, LAYOUT=layout,
            BD=block_d, BE=block_e,
            num_warps=4, num_stages=1, enable_fp_fusion=False, **register_limit(4),
        )  # fmt: skip
    return o, end


def gradients(
    run: Recurrence,
    chunks: Chunks,
    tensors: Tensors,
    do: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor | None,
    states: torch.Tensor,
    dstates: torch.Tensor,
) -> Tensors:
    """dq and dk of their dtype, dg (B,H,N,D) and du (H,D) in float32; du is empty without u."""
    q, k, v = tensors
    heads, length, width = q.shape[1:]
    value_width = v.shape[3]
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dg = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    du = torch.empty(
        (chunks.count if u is not None else 0, heads, width), dtype=torch.float32, device=q.device
    )
    if q.numel():
        block_d, block_e, warps, by_row = gradient_tile(q.dtype, width, value_width)
        layout = memory_layout(q, k, v, do)
        gradient_kernel[(chunks.count * heads, triton.cdiv(width, block_d))](
            q, k, v, do, g, u, states, dstates, dq, dk, dg, du, run.sequences.cu_seqlens, chunks.first,
            chunks.owner, *strided(layout, q, k, v, do), *g.stride(),
            chunks.each, heads, length, width, value_width, run.scale,
            EXCLUSIVE=run.exclusive, LAYOUT=layout, DTYPE=triton_dtype(q),
            C=chunks.size, R=ROWS, BD=block_d, BE=block_e, BY_ROW=by_row,
            num_warps=warps, num_stages=1, enable_fp_fusion=False, **register_limit(warps),
        )  # fmt: skip
    return dq, dk, dg, du.sum(0)


class GatedLinearAttention(torch.autograd.Function):
    """(o, final state) of q, k, v, g (B,H,N,D), u (H,D) or None and the initial state or None."""

    @staticmethod
    def forward(ctx: Any, run: Recurrence, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, g, u, start = given
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        if run.stepwise:
            return stepped(run, (q, k, v), g, u, start)
        chunks = run.sequences.chunks(run.chunk)
        states, end = chunk_states(run, chunks, k, v, g, start, reverse=False)
        return walked(run, chunks, (q, k, v), g, u, states, reverse=False), end

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dend: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        run: Recurrence = ctx.run
        q, k, v, g, u, start = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if do is None:
            do = q.new_zeros(()).expand(*q.shape[:3], v.shape[3])
        chunks = run.sequences.chunks(run.chunk)
        dstates, dstart = chunk_states(run, chunks, q, do, g, dend, reverse=True)
        dq = dk = dg = du = dv = None
        if needs[0] or needs[1] or needs[3] or needs[4]:
            states, _ = chunk_states(run, chunks, k, v, g, start, reverse=False)
            dq, dk, dg, du = gradients(run, chunks, (q, k, v), do, g, u, states, dstates)
            dg = dg.to(g.dtype)
            du = None if u is None else du.to(u.dtype)
        if needs[2]:
            dv = walked(run, chunks, (k, q, do), g, u, dstates, reverse=True)
        found = (dq, dk, dv, dg, du, dstart)
        return (None, *(x if need else None for x, need in zip(found, needs, strict=True)))


def attended(
    run: Recurrence,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, final state) of checked tensors; checks the scale and the initial state in the name of ``kernel``.

    A gate for each position (B,H,N) is one for each key channel that does not differ between them.
    """
    check_finite("scale", run.scale, kernel)
    shape = (run.sequences.count, q.shape[1], q.shape[3], v.shape[3])
    check_initial_state("initial_state", initial_state, shape, q, kernel)
    u = None if u is None else u.contiguous()
    if g.ndim == 3:
        g = g.float().unsqueeze(-1).expand(q.shape)
    o, end = GatedLinearAttention.apply(run, q, k, v, g, u, initial_state)  # type: ignore[no-untyped-call]
    return o, end


def called(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
    kernel: str,
    chunk: int = CHUNK,
    stepwise: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The call of every entry point below."""
    check_state_tensors(q, k, v, kernel)
    check_gate("g", g, q, kernel)
    run = Recurrence(scale, sequences_of(cu_seqlens, q, k, kernel), chunk, stepwise)
    o, state = attended(run, q, k, v, g, None, initial_state, kernel)
    return (o, state) if return_state else o


@promises(GATED_LINEAR)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Gated linear attention of q, k (B,H,N,D), v (B,H,N,E) in chunks; differentiable once in every tensor.

    Args:
        q, k, v: float32, float16 or bfloat16, all three alike; any strides; D and E from 1 to 256.
        g: log decays ≤ 0, −inf included, (B,H,N,D) or (B,H,N); q's dtype or float32.
        scale: factor of q·S.
        initial_state: (B,H,D,E) float32, or None for zeros; (P,H,D,E) with ``cu_seqlens``.
        cu_seqlens: (P+1,) int32, for B = 1: P sequences one after the other.
        return_state: also return the final state, of the initial state's shape.

    Returns:
        o (B,H,N,E) of q's dtype, or (o, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return called(
        q, k, v, g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        return_state=return_state, kernel="attention",
    )  # fmt: skip


@promises(GATED_LINEAR)
def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention`, one position after the other; nothing is rounded below float32 but o.

    Args:
        q, k, v, g, scale, initial_state, cu_seqlens, return_state: as there.

    Returns:
        o (B,H,N,E) of q's dtype, or (o, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return called(
        q, k, v, g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        return_state=return_state, kernel="recurrent", stepwise=True,
    )  # fmt: skip


def with_chunk(chunk: int) -> Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
    """:func:`attention` in chunks of ``chunk`` positions: 16, 32, 64 or 128.

    Raises:
        ContractError: for another number.
    """
    if chunk not in CHUNKS:
        raise ContractError(f"with_chunk: chunk={chunk!r}: expected one of {', '.join(map(str, CHUNKS))}")
    entry: Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
    entry = promises(GATED_LINEAR)(functools.partial(called, kernel="with_chunk", chunk=chunk))
    return entry
