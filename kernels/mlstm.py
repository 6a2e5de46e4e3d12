"""mLSTM: a matrix memory with exponential input gates, step by step and chunk by chunk.

    C_t = σ(f_t) C_{t−1} + e^{i_t} k_t v_tᵀ,   n_t = σ(f_t) n_{t−1} + e^{i_t} k_t
    o_t = scale · C_tᵀ q_t / max(|scale · n_tᵀ q_t|, 1)

(Beck et al., "xLSTM", arXiv 2405.04517.) With the running maximum m_t = max(log σ(f_t) + m_{t−1}, i_t) and
C' = C e^{−m}, n' = n e^{−m} no exponential has a positive argument; the bound of the denominator becomes
e^{−m} (theory 2.10: a bound that stays 1 is another function). A chunk of rows sees the state before it and
its own scores:

    o_i ∝ e^{F_i + m₀ − m_i} · scale q_iᵀ C₀ + Σ_j scale (q_i·k_j) e^{D_ij − m_i} v_j,  D_ij = F_i − F_j + i_j

with F the sum of log σ(f) inside the chunk and m₀ of the state before it. The state before the first chunk of
a sequence is the initial one, (C', n', m) as a call returned it, or (0, 0, −∞).

What is kept on purpose:

* F_i − F_j is the sum of the gates between, not a difference of two sums, which loses what a gate of −1000
  leaves to the 24 bits of float32, and is NaN after a gate of −∞.
* log σ(f) = min(f, 0) − log(1 + t), t = e^−|f|, takes the logarithm from its series in t/(2 + t): with slow
  gates an error of 2⁻²⁴ for 1 + t adds up over thousands of positions.
* Where m < 0, e^{−m} may overflow: numerator, denominator and bound are multiplied by e^{min(m, 0)}.
* float16 operands that were computed (P, decayed keys, the state) are brought to the format's range first
  (:func:`attnproof.kernels.softmax_backward.stored`).
* m is a constant of all gradients: o does not depend on it. C' and n' do, but who goes on from them, in a
  later call or otherwise, by C' e^m and n' e^m, does not: with every level held, the initial ones included,
  gradients through a hand-over are those of one call.
* The gradient of max(|x|, 1) at |x| = 1 is shared, one half each, as torch.maximum does.

The kernels are those of :mod:`attnproof.kernels.mlstm_chunks` (states between chunks),
:mod:`attnproof.kernels.mlstm_forward` and :mod:`attnproof.kernels.mlstm_backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_block, check_finite
from attnproof.kernels.mlstm_backward import chunk_gradients
from attnproof.kernels.mlstm_chunks import CHUNK, Call, State
from attnproof.kernels.mlstm_forward import by_chunks, by_steps
from attnproof.kernels.states import (
    Sequences,
    check_gate,
    check_initial_state,
    check_state_tensors,
    sequences_of,
)
from attnproof.properties.contract import Contract, ContractError, Precision, Supports, promises

__all__ = ["attention", "attention_recurrent", "chunkwise"]

Entry = Callable[..., Any]
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FORMS = {"chunkwise": by_chunks, "recurrent": by_steps}


class Run(NamedTuple):
    """How one call runs.

    Attributes:
        scale: of the scores.
        chunk: positions a chunk; the backward pass works in chunks whatever the forward pass does.
        form: of :data:`FORMS`.
        sequences: where they lie.
    """

    scale: float
    chunk: int
    form: str
    sequences: Sequences


class MLSTMAttention(torch.autograd.Function):
    """q, k, v, i, f and the initial C', n', m, or None, to o and the final C', n', m; no m has a gradient."""

    @staticmethod
    def forward(ctx: Any, run: Run, *given: Any) -> tuple[torch.Tensor, ...]:
        call = Call(given[:5], given_state(given[5:]), run.scale, run.chunk, run.sequences)
        rows = call.new(3, *call.sizes[:3]) if any(ctx.needs_input_grad) else None
        o, end = FORMS[run.form](call, rows)
        if rows is not None:
            ctx.save_for_backward(*given, o, rows)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(end.m)
        return o, *end

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        do: torch.Tensor | None,
        dstate: torch.Tensor | None,
        dn: torch.Tensor | None,
        _: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        run: Run = ctx.run
        *given, o, rows = ctx.saved_tensors
        call = Call(tuple(given[:5]), given_state(given[5:]), run.scale, run.chunk, run.sequences)
        found = chunk_gradients(call, o, rows, do, (dstate, dn))
        needed = (x if need else None for x, need in zip(found, ctx.needs_input_grad[1:8], strict=True))
        return None, *needed, None


def given_state(parts: Any) -> State | None:
    """The initial state as kernels read it, or None."""
    return None if parts[0] is None else State(*(x.contiguous() for x in parts))


def checked_state(
    state: Given | None, sequences: Sequences, q: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """C', n' and m of ``initial_state``, or three times None; raises where it is neither."""
    if state is None:
        return None, None, None
    if not isinstance(state, tuple) or len(state) != 3:
        raise ContractError(
            f"mlstm: initial_state is a {type(state).__name__}: expected a tuple (state, n, m), or None"
        )
    slots = (sequences.count, q.shape[1])
    shapes = {"state": (*slots, q.shape[3], v.shape[3]), "n": (*slots, q.shape[3]), "m": slots}
    for x, (part, shape) in zip(state, shapes.items(), strict=True):
        label = f"{part} of initial_state"
        if x is None:
            raise ContractError(f"mlstm: {label} is None: expected float32 of shape {shape}")
        check_initial_state(label, x, shape, q, "mlstm")
    return state[0], state[1], state[2].detach()


def run(
    tensors: tuple[torch.Tensor, ...],
    scale: float,
    initial_state: Given | None,
    cu_seqlens: torch.Tensor | None,
    return_state: bool,
    chunk: int,
    form: str,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Check a call and compute it in one of :data:`FORMS`."""
    q, k, v, i, f = tensors
    check_state_tensors(q, k, v, "mlstm")
    for name, gate in (("i", i), ("f", f)):
        check_gate(name, gate, q, "mlstm", vector=False)
    check_finite("scale", scale, "mlstm")
    sequences = sequences_of(cu_seqlens, q, k, "mlstm")
    start = checked_state(initial_state, sequences, q, v)
    found: tuple[torch.Tensor, ...] = MLSTMAttention.apply(  # type: ignore[no-untyped-call]
        Run(float(scale), chunk, form, sequences), q, k, v, i, f, *start
    )
    return found if return_state else found[0]


CONTRACT = Contract(
    family="mlstm",
    options=("initial_state", "cu_seqlens", "return_state"),
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
        initial_state: Given | None = None,
        cu_seqlens: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The mLSTM of q, k (B,H,N,D) and v (B,H,N,E), differentiable in all tensors but levels.

        Args:
            q, k, v: float32, float16 or bfloat16, all alike; any strides; D and E from 1 to 256.
            i, f: (B,H,N) pre-activations of the input gate, e^i, and of the forget gate, σ(f); of q's dtype
                or float32. f may be −∞: everything before is forgotten.
            scale: of the scores.
            initial_state: (C', n', m), float32 (B,H,D,E), (B,H,D), (B,H): what was seen before the first
                position, as an earlier call returned it; None stands for (0, 0, −∞). At m = −∞ nothing is
                read of C' and n'. m gets no gradient.
            cu_seqlens: (P+1,) int32, for B = 1: P sequences one after the other, each with a state of its
                own: states then have P in place of B.
            return_state: whether the final state is returned. Its m has no gradient.

        Returns:
            o (B,H,N,E) of q's dtype; with ``return_state`` also C' (B,H,D,E), n' (B,H,D) and m (B,H) float32:
            the state is C' e^m and n' e^m. Of a sequence without positions it is the initial one.

        Raises:
            ContractError: for arguments that the contract does not allow.
            NotImplementedError: for float64 and for widths above 256.
        """
        return run((q, k, v, i, f), scale, initial_state, cu_seqlens, return_state, chunk, "chunkwise")

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
    initial_state: Given | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """As :func:`attention`, position by position in float32; the backward pass works on chunks of 16."""
    return run((q, k, v, i, f), scale, initial_state, cu_seqlens, return_state, 16, "recurrent")
