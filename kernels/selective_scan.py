"""The selective scan of Mamba: a diagonal state whose step, input and output depend on the position.

    h_t = exp(δ_t A) ∘ h_{t−1} + w_t B_t u_t,   y_t = C_t·h_t + D u_t,   times silu(z_t) where z is given

(Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2; theory MAM-1 to MAM-3.) δ = delta + delta_bias, through
softplus if asked; w = δ under ``discretization="euler"``, as the authors' code ships it, or (exp(δA) − 1)/A,
δ where A = 0, under "zoh", as the paper's theorem 1 has it. :func:`scan` composes the steps of a block of
positions by an associative scan; :func:`recurrent` takes one after the other. Both have the gradients of
:mod:`attnproof.kernels.selective_scan_backward`, from states that are computed again and not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_choice, check_floating
from attnproof.kernels.selective_scan_associative import run_scan
from attnproof.kernels.selective_scan_backward import gradients
from attnproof.kernels.selective_scan_recurrence import ScanInputs, run_recurrence
from attnproof.kernels.states import Sequences, check_initial_state, sequences_of
from attnproof.properties.contract import Contract, ContractError, Precision, Supports, promises

__all__ = ["DISCRETIZATIONS", "SELECTIVE_SCAN", "recurrent", "scan"]

DISCRETIZATIONS = ("euler", "zoh")

SELECTIVE_SCAN = Contract(
    family="selective_scan",
    options=(
        *("z", "delta_bias", "delta_softplus", "discretization"),
        *("initial_state", "cu_seqlens", "return_state"),
    ),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
    # Everything is held in float32, whatever the inputs are.
    precision=Precision(matmul_input="ieee", probabilities="float32", dscores="float32"),
)

Tensors = tuple[torch.Tensor | None, ...]


class SelectiveScan(torch.autograd.Function):
    """(y, final state) of u, delta, A, B, C, D, z, delta_bias and the initial state, checked."""

    @staticmethod
    def forward(
        ctx: Any, stepwise: bool, softplus: bool, zoh: bool, sequences: Sequences, *given: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.how = (softplus, zoh, sequences)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        x = prepared(given, *ctx.how)
        if stepwise:
            return run_recurrence(x)
        y = torch.empty(x.u.shape, dtype=x.u.dtype, device=x.u.device)
        end = torch.empty(x.state_shape, dtype=torch.float32, device=x.u.device)
        run_scan(x, y=y, end=end)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dend: torch.Tensor | None) -> Tensors:
        x = prepared(ctx.saved_tensors, *ctx.how)
        if dy is None:
            dy = x.u.new_zeros(()).expand(x.u.shape)
        return (None, None, None, None, *gradients(x, dy, dend, ctx.needs_input_grad[4:]))


def prepared(given: Sequence[Any], softplus: bool, zoh: bool, sequences: Sequences) -> ScanInputs:
    """The inputs as kernels take them: those without positions contiguous."""
    u, delta, a, b, c, d, z, bias, start = given
    d, bias, start = (None if x is None else x.contiguous() for x in (d, bias, start))
    return ScanInputs(u, delta, a.contiguous(), b, c, d, z, bias, start, softplus, zoh, sequences)


def check_beside(name: str, x: torch.Tensor, shape: tuple[int, ...], u: torch.Tensor, kernel: str) -> None:
    """Raise unless ``x`` is a tensor of ``shape`` that agrees with u in dtype and device."""
    check_floating(name, x, kernel)
    if x.dtype != u.dtype:
        raise ContractError(f"{kernel}: {name} is {x.dtype} while u is {u.dtype}: cast all to one dtype")
    if x.device != u.device:
        raise ContractError(
            f"{kernel}: {name} is on {x.device} while u is on {u.device}: move all to one device"
        )
    if tuple(x.shape) != shape:
        raise ContractError(f"{kernel}: {name} has shape {tuple(x.shape)}: expected {shape} beside u and A")


def check_sizes(u: torch.Tensor, A: torch.Tensor, kernel: str) -> tuple[int, int, int, int]:
    """(B, H, N, D) of u (B,H,N) and A (H,D); raises unless they fit together and D ≤ 256."""
    for name, x, axes in (("u", u, ("B", "H", "N")), ("A", A, ("H", "D"))):
        check_floating(name, x, kernel)
        if x.ndim != len(axes):
            raise ContractError(
                f"{kernel}: {name} has shape {tuple(x.shape)}: expected {len(axes)} axes ({', '.join(axes)})"
            )
    sizes = (*u.shape, A.shape[1])
    if u.shape[1] < 1 or A.shape[1] < 1 or A.shape[0] != u.shape[1]:
        raise ContractError(
            f"{kernel}: u {tuple(u.shape)}, A {tuple(A.shape)}: expected (B, H, N) and (H, D), one row of A "
            "a channel, at least one channel, and at least one number of state"
        )
    if A.shape[1] > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"{kernel}: A {tuple(A.shape)}: width D is {A.shape[1]}: this kernel goes up to {MAX_HEAD_DIM}"
        )
    batch, heads, length, width = sizes
    return batch, heads, length, width


def called(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    discretization: str,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    return_state: bool,
    *,
    kernel: str,
    stepwise: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The call of both entry points below."""
    batch, heads, length, width = check_sizes(u, A, kernel)
    check_beside("A", A, (heads, width), u, kernel)
    check_beside("delta", delta, (batch, heads, length), u, kernel)
    for name, x in (("B", B), ("C", C)):
        check_beside(name, x, (batch, width, length), u, kernel)
    for name, option, shape in (
        ("D", D, (heads,)), ("z", z, (batch, heads, length)), ("delta_bias", delta_bias, (heads,))
    ):  # fmt: skip
        if option is not None:
            check_beside(name, option, shape, u, kernel)
    check_choice("discretization", discretization, DISCRETIZATIONS, kernel)
    if cu_seqlens is not None and u.shape[0] != 1:
        raise ContractError(f"{kernel}: cu_seqlens with u {tuple(u.shape)}: it asks for B = 1")
    sequences = sequences_of(cu_seqlens, u, u, kernel)
    check_initial_state("initial_state", initial_state, (sequences.count, heads, width), u, kernel)
    y, end = SelectiveScan.apply(  # type: ignore[no-untyped-call]
        stepwise, bool(delta_softplus), discretization == "zoh", sequences,
        u, delta, A, B, C, D, z, delta_bias, initial_state,
    )  # fmt: skip
    return (y, end) if return_state else y


@promises(SELECTIVE_SCAN)
def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    discretization: str = "euler",
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The selective scan by an associative scan in blocks of positions; differentiable once in every tensor.

    Args:
        u, delta: (B,H,N), float32, float16 or bfloat16, all tensors alike; any strides.
        A: (H,D), ≤ 0; D, the width of the state, from 1 to 256.
        B, C: (B,D,N), the same for all channels.
        D: (H), the skip term, or None.
        z: (B,H,N), whose silu multiplies y, or None.
        delta_bias: (H), added to delta, or None.
        delta_softplus: whether the step is softplus(delta + delta_bias); it must be ≥ 0 in either case.
        discretization: "euler" or "zoh", see above.
        initial_state: (B,H,D) float32, or None for zeros; (P,H,D) with ``cu_seqlens``.
        cu_seqlens: (P+1,) int32, for B = 1: P sequences one after the other.
        return_state: also return the final state, of the initial state's shape.

    Returns:
        y (B,H,N) of u's dtype, or (y, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D above 256.
    """
    return called(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization, initial_state, cu_seqlens,
        return_state, kernel="scan", stepwise=False,
    )  # fmt: skip


@promises(SELECTIVE_SCAN)
def recurrent(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    discretization: str = "euler",
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`scan`, one position after the other; also a step of decoding (N = 1).

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization, initial_state, cu_seqlens,
            return_state: as there.

    Returns:
        y (B,H,N) of u's dtype, or (y, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D above 256.
    """
    return called(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization, initial_state, cu_seqlens,
        return_state, kernel="recurrent", stepwise=True,
    )  # fmt: skip
