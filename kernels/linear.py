"""Linear attention, forward and backward, in its three equal forms: chunkwise, recurrent and parallel.

    o_i = φ(q_i)ᵀ S_i [/ φ(q_i)ᵀ z_i],   S_i = S_0 + Σ_{j ≤ i} φ(k_j) v_jᵀ,   z_i = z_0 + Σ_{j ≤ i} φ(k_j)

(Katharopoulos et al., arXiv 2006.16236; theory LIN-1.) Every form is a kernel of its own to the suite, with
the same call: :data:`attention` (chunks of 64), :data:`recurrent`, :data:`parallel`, and chunks of any length
from :func:`with_chunk`. One step of decoding is ``recurrent`` with N = 1, state in and state out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from attnproof.kernels.arguments import check_choice
from attnproof.kernels.feature_maps import FEATURE_MAPS, FeatureMap
from attnproof.kernels.linear_backward import Call, LinearAttention
from attnproof.kernels.states import Sequences, check_initial_state, check_state_tensors, sequences_of
from attnproof.properties.contract import Contract, ContractError, Supports, promises

__all__ = ["attention", "parallel", "recurrent", "with_chunk"]

CHUNK = 64
MAX_HEAD_DIM = 256

CHUNKWISE = Contract(
    family="linear",
    options=("causal", "initial_state", "cu_seqlens", "return_state"),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
)
Kernel = Callable[..., Any]


def checked_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str,
    initial_state: Any,
    cu_seqlens: torch.Tensor | None,
    *,
    normalize: bool,
) -> tuple[FeatureMap, Sequences, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The feature map, the sequences, and the initial S and z; raises where the contract is not kept."""
    check_state_tensors(q, k, v, "attention")
    check_choice("feature_map", feature_map, tuple(FEATURE_MAPS), "attention")
    chosen = FEATURE_MAPS[feature_map]
    if chosen.max_head_dim is not None and q.shape[3] > chosen.max_head_dim:
        raise NotImplementedError(
            f"attention: feature_map={feature_map!r} with D = {q.shape[3]}: its features are products of two "
            f"entries, and this kernel takes them up to D = {chosen.max_head_dim}"
        )
    sequences = sequences_of(cu_seqlens, q, k, "attention")
    if initial_state is None:
        return chosen, sequences, (None, None)
    if normalize and (not isinstance(initial_state, tuple | list) or len(initial_state) != 2):
        raise ContractError(
            f"attention: initial_state is a {type(initial_state).__name__}: with normalize=True it is a pair "
            "(S, z) of shapes (B, H, F, E) and (B, H, F)"
        )
    state, z = initial_state if normalize else (initial_state, None)
    shape = (sequences.count, q.shape[1], chosen.width(q.shape[3]))
    for name, part, expected in (
        ("initial_state", state, (*shape, v.shape[3])),
        ("initial_state[1]", z, shape),
    ):
        if part is None and normalize:
            raise ContractError(f"attention: {name} is None: with normalize=True pass S and z, or neither")
        check_initial_state(name, part, expected, q, "attention")
    return chosen, sequences, (state, z)


def form(name: str, chunk: float | None, contract: Contract) -> Kernel:
    """The kernel ``name`` with chunks of ``chunk`` positions; None for the recurrent form, inf for one."""

    @promises(contract)
    def kernel(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        feature_map: str,
        normalize: bool,
        causal: bool = True,
        initial_state: Any = None,
        cu_seqlens: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        chosen, sequences, (state, z) = checked_call(
            q, k, v, feature_map, initial_state, cu_seqlens, normalize=normalize
        )
        tensors = [x for x in (q, k, v, state, z) if x is not None]
        call = Call(
            feature_map=chosen,
            normalize=bool(normalize),
            causal=bool(causal),
            sequences=sequences,
            chunk=None if chunk is None else int(max(min(chunk, sequences.longest), 1)),
            final=bool(return_state),
            differentiated=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        )
        o, *final = LinearAttention.apply(q, k, v, state, z, call)  # type: ignore[no-untyped-call]
        return (o, *final[: 2 if normalize else 1]) if return_state else o

    kernel.__name__ = kernel.__qualname__ = name
    kernel.__doc__ = DOCUMENTATION
    return kernel


DOCUMENTATION = """Linear attention of q, k (B,H,N,D) and v (B,H,N,E), differentiable in all of its tensors.

Args:
    q, k, v: float32, float16 or bfloat16, all three alike; any strides; D and E from 1 to 256.
    feature_map: φ: 'elu1', 'relu', 'exp', 'identity', of width F = D; 'taylor' (F = 1 + D + D²) and 'squared'
        (F = D²) for D up to 16.
    normalize: divide o_i by φ(q_i)·z_i.
    causal: sum over j ≤ i; over all j otherwise.
    initial_state: S (B,H,F,E) float32, with normalize the pair (S, z), z (B,H,F); None for zeros.
    cu_seqlens: (P+1,) int32 with B = 1: P sequences one after the other, each with a state of its own.
    return_state: return the final state as well.

Returns:
    o (B,H,N,E) of q's dtype; with return_state (o, S) or (o, S, z), states float32 with P in place of B where
    sequences are packed.

Raises:
    ContractError: for arguments that the contract does not allow.
    NotImplementedError: for float64, D or E above 256, and D above 16 with 'taylor' and 'squared'.
"""


def with_chunk(chunk: int) -> Kernel:
    """The chunkwise form with chunks of ``chunk`` positions, any positive number of them.

    Raises:
        ContractError: for anything but a positive integer.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ContractError(f"with_chunk: chunk={chunk!r}: expected a positive integer")
    return form(f"chunks_of_{chunk}", chunk, CHUNKWISE)


attention = form("attention", CHUNK, CHUNKWISE)
parallel = form("parallel", math.inf, CHUNKWISE)
recurrent = form("recurrent", None, CHUNKWISE)
