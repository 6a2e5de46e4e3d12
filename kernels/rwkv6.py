"""RWKV-6's time mixing: gated linear attention that reads before it decays, with a bonus for its own key.

    o_t = scale · q_tᵀ (S_{t−1} + diag(u) k_t v_tᵀ),   S_t = exp(g_t)[:, None] ∘ S_{t−1} + k_t v_tᵀ

(Peng et al., "Eagle and Finch", arXiv 2404.05892; theory RWK-2.) A key that came before position t weighs
exp of the gates strictly between the two: one gate fewer than in gated linear attention. The kernels are
those of :mod:`attnproof.kernels.gated_linear`, with sums of gates that end one position earlier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from attnproof.kernels.arguments import MAX_HEAD_DIM
from attnproof.kernels.gated_linear import CHUNK, CHUNKS, Recurrence, attended
from attnproof.kernels.states import check_gate, check_head_vector, check_state_tensors, sequences_of
from attnproof.properties.contract import Contract, ContractError, Supports, promises

__all__ = ["RWKV6", "attention", "recurrent", "with_chunk"]

RWKV6 = Contract(
    family="rwkv6",
    options=("initial_state", "cu_seqlens", "return_state"),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
)


def called(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor,
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
    check_gate("g", g, q, kernel, scalar=False)
    check_head_vector("u", u, q, kernel)
    run = Recurrence(scale, sequences_of(cu_seqlens, q, k, kernel), chunk, stepwise, exclusive=True)
    o, state = attended(run, q, k, v, g, u, initial_state, kernel)
    return (o, state) if return_state else o


@promises(RWKV6)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RWKV-6's attention of q, k (B,H,N,D), v (B,H,N,E) in chunks; differentiable once in every tensor.

    Args:
        q, k, v: float32, float16 or bfloat16, all three alike; any strides; D and E from 1 to 256.
        g: log decays ≤ 0, −inf included, (B,H,N,D); q's dtype or float32.
        u: (H,D) weight of a position's own key, of q's dtype.
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
        q, k, v, g, u, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        return_state=return_state, kernel="attention",
    )  # fmt: skip


@promises(RWKV6)
def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention`, one position after the other; nothing is rounded below float32 but o.

    Args:
        q, k, v, g, u, scale, initial_state, cu_seqlens, return_state: as there.

    Returns:
        o (B,H,N,E) of q's dtype, or (o, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return called(
        q, k, v, g, u, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
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
    entry = promises(RWKV6)(functools.partial(called, kernel="with_chunk", chunk=chunk))
    return entry
