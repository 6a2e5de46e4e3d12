"""Delta-rule attention: DeltaNet, Gated DeltaNet and Kimi's KDA, by chunks or step by step, with gradients.

    S' = e^{g_t} ∘ S_{t−1},   S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ,   o_t = scale · S_tᵀ q_t

The decay comes first, then the delta rule reads what it left (theory DN-4). :mod:`~.delta_chunks` computes o
by matmuls, :mod:`~.delta_recurrence` one position after the other, :mod:`~.delta_backward` the gradients of
both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_finite
from attnproof.kernels.delta_backward import gradients
from attnproof.kernels.delta_chunks import default_chunk, run_chunks
from attnproof.kernels.delta_recurrence import DeltaInputs, run_recurrence
from attnproof.kernels.states import check_gate, check_initial_state, check_state_tensors, sequences_of
from attnproof.properties.contract import Contract, ContractError, Supports, promises

__all__ = ["attention", "recurrent", "with_chunk"]

# A recurrence has chunks of no position.
STEPWISE = 0
CHUNKS = (16, 32, 64, 128)
CONTRACT = Contract(
    family="delta",
    options=("initial_state", "cu_seqlens", "return_state"),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
)


class DeltaAttention(torch.autograd.Function):
    """The tensors of a call to o and the final state; gradients by the recurrence run backwards."""

    @staticmethod
    def forward(
        ctx: Any, x: DeltaInputs, chunk: int, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x.q, x.k, x.v, x.beta, x.g, x.initial_state)
        ctx.scale, ctx.sequences = x.scale, x.sequences
        o = torch.empty(x.v.shape, dtype=x.q.dtype, device=x.q.device)
        state = torch.empty(x.state_shape, dtype=torch.float32, device=x.q.device)
        if not x.q.numel():
            state.zero_() if x.initial_state is None else state.copy_(x.initial_state)
        elif chunk == STEPWISE:
            run_recurrence(x, o=o, state=state)
        else:
            run_chunks(x, chunk, o, state)
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor, dstate: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, beta, g, initial_state = ctx.saved_tensors
        x = DeltaInputs(q, k, v, beta, g, initial_state, scale=ctx.scale, sequences=ctx.sequences)
        found = gradients(x, do, dstate.contiguous())
        needed = ctx.needs_input_grad[2:]
        return None, None, *(dx if need else None for dx, need in zip(found, needed, strict=True))


def computed(
    chunk: int | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    *,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    return_state: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o, or (o, state), by chunks of ``chunk`` positions, the default's if it is None, or step by step."""
    kernel = "recurrent" if chunk == STEPWISE else "attention"
    check_state_tensors(q, k, v, kernel)
    check_gate("beta", beta, q, kernel, vector=False)
    if g is not None:
        check_gate("g", g, q, kernel)
    check_finite("scale", scale, kernel)
    sequences = sequences_of(cu_seqlens, q, k, kernel)
    shape = (sequences.count, q.shape[1], q.shape[3], v.shape[3])
    check_initial_state("initial_state", initial_state, shape, q, kernel)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    x = DeltaInputs(q, k, v, beta, g, initial_state, float(scale), sequences)
    chunk = default_chunk(q.dtype) if chunk is None else chunk
    o, state = DeltaAttention.apply(x, chunk, q, k, v, beta, g, initial_state)  # type: ignore[no-untyped-call]
    return (o, state) if return_state else o


@promises(CONTRACT)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Delta-rule attention by chunks, differentiable in every tensor.

    Args:
        q, k: (B,H,N,D); v: (B,H,N,E): float32, float16 or bfloat16, all three alike; any strides; D and E
            from 1 to 256.
        beta: (B,H,N), in [0, 2], of q's dtype or float32. The rule contracts where beta·‖k‖² ≤ 2.
        g: log decay ≤ 0 of q's dtype or float32: (B,H,N) (Gated DeltaNet), (B,H,N,D) (KDA), or None
            (DeltaNet). −inf forgets everything; its gradient is 0.
        scale: factor of o.
        initial_state: float32 (B,H,D,E), (P,H,D,E) for packed sequences; None for zeros.
        cu_seqlens: int32 (P+1,) with B = 1: P sequences one after the other.
        return_state: return the final state as well.

    Returns:
        o (B,H,N,E) of q's dtype, or (o, state), the state float32 of initial_state's shape.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return computed(
        None, q, k, v, beta, g,
        scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, return_state=return_state,
    )  # fmt: skip


@promises(CONTRACT)
def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Delta-rule attention step by step, all in float32: :func:`attention` for decoding and short sequences.

    Arguments, results and errors are those of :func:`attention`.
    """
    return computed(
        STEPWISE, q, k, v, beta, g,
        scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, return_state=return_state,
    )  # fmt: skip


def with_chunk(chunk: int) -> Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
    """:func:`attention` by chunks of ``chunk`` positions, 16, 32, 64 or 128, in place of the kernel's choice.

    Raises:
        ContractError: for another size.
    """
    if chunk not in CHUNKS:
        raise ContractError(f"with_chunk: chunk={chunk!r}: expected one of {', '.join(map(str, CHUNKS))}")

    @promises(CONTRACT)
    def chunked(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        g: torch.Tensor | None = None,
        *,
        scale: float,
        initial_state: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return computed(
            chunk, q, k, v, beta, g,
            scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, return_state=return_state,
        )  # fmt: skip

    return chunked
