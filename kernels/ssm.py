"""Diagonal linear state spaces (S4D), already discretised, in four forms, and two discretisations.

    x_t = a ∘ x_{t−1} + b u_t,   y_t = Re Σ_s c_s x_ts + d u_t

(Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", arXiv 2206.11893;
theory S4-1.) :func:`recurrent` goes step by step, :func:`scan` combines positions associatively inside
blocks, :func:`convolution` multiplies by the Toeplitz matrix of the kernel K_i = Re Σ c aⁱ b, and
:func:`fft` convolves with it through a Fourier transform padded with zeros. The first two share gradients
that walk back through the states; the others go back by correlation. All computes in float32 whatever the
inputs' dtype, and rounds results once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import check_floating
from attnproof.kernels.ssm_backward import gradients
from attnproof.kernels.ssm_convolution import moments, product, responses, toeplitz
from attnproof.kernels.ssm_discretisation import discretize_bilinear, discretize_zoh
from attnproof.kernels.ssm_recurrence import stepped
from attnproof.kernels.ssm_scan import scanned_states
from attnproof.kernels.states import Sequences, check_initial_state, sequences_of
from attnproof.properties.contract import Contract, ContractError, Precision, promises

__all__ = [
    "check_diagonal",
    "convolution",
    "discretize_bilinear",
    "discretize_zoh",
    "fft",
    "recurrent",
    "scan",
    "step",
]

# Everything is held in float32, whatever the inputs are.
FLOAT32 = Precision(matmul_input="ieee", probabilities="float32", dscores="float32")
SSM = Contract(family="ssm", options=("initial_state", "cu_seqlens", "return_state"), precision=FLOAT32)
SSM_CONVOLUTION = Contract(family="ssm", options=("initial_state", "return_state"), precision=FLOAT32)
# A transform mixes all positions of a row: what follows a position reaches it as rounding, and as NaN.
SSM_FFT = Contract(
    family="ssm",
    options=("initial_state", "return_state"),
    causality="budget",
    unseen_nonfinite="may-leak",
    precision=FLOAT32,
)

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def check_like(
    name: str, x: object, shapes: tuple[tuple[int, ...], ...], u: torch.Tensor, kernel: str
) -> None:
    """Raise unless ``x`` has u's dtype and device, and one of ``shapes``."""
    check_floating(name, x, kernel)
    assert isinstance(x, torch.Tensor)
    if x.dtype != u.dtype:
        raise ContractError(f"{kernel}: {name} is {x.dtype} while the input is {u.dtype}: cast it")
    if x.device != u.device:
        raise ContractError(f"{kernel}: {name} is on {x.device} while the input is on {u.device}: move it")
    if tuple(x.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ContractError(f"{kernel}: {name} has shape {tuple(x.shape)}: expected {expected}")


def check_diagonal(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, u: torch.Tensor, heads: int, kernel: str
) -> None:
    """Raise unless a, b, c are all (H,D), or all (H,D,2) pairs of real and imaginary part, of u's dtype."""
    check_floating("a", a, kernel)
    width = a.shape[1] if a.ndim > 1 else 0
    check_like("a", a, ((heads, width), (heads, width, 2)), u, kernel)
    for name, x in (("b", b), ("c", c)):
        check_like(name, x, (tuple(a.shape),), u, kernel)


def check_arguments(
    u: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    d: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    sequences: int | None,
    kernel: str,
) -> None:
    """Raise unless the arguments of a call fit together; ``sequences`` None stands for the batch."""
    check_floating("u", u, kernel)
    if u.ndim != 3:
        raise ContractError(f"{kernel}: u has shape {tuple(u.shape)}: expected 3 axes (batch, heads, length)")
    check_diagonal(*parameters, u, u.shape[1], kernel)
    if d is not None:
        check_like("d", d, ((u.shape[1],),), u, kernel)
    count = u.shape[0] if sequences is None else sequences
    check_initial_state("initial_state", initial_state, (count, *parameters[0].shape), u, kernel)


class Run(NamedTuple):
    """Where the sequences of a call lie, and whether it goes step by step."""

    sequences: Sequences
    stepwise: bool


class StateSpace(torch.autograd.Function):
    """u, a, b, c, and d and the initial states or None, to y and the final states."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        u: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor | None,
        start: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, a, b, c, d, start)
        if run.stepwise:
            return stepped(run.sequences, u, (a, b, c), d, start)
        return scanned_states(run.sequences, u, (a, b, c), d, start, boundaries=False)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor | None, dend: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        u, a, b, c, d, start = ctx.saved_tensors
        if dy is None:
            dy = u.new_zeros(()).expand(u.shape)
        dend = None if dend is None else dend.contiguous()
        found = gradients(ctx.run.sequences, u, (a, b, c), d, start, (dy, dend))
        given = zip(found, (u, a, b, c, d, start), ctx.needs_input_grad[1:], strict=True)
        return (None, *(x.to(like.dtype) if need else None for x, like, need in given))


def through_states(
    u: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    d: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    stepwise: bool,
    return_state: bool,
    kernel: str,
) -> Result:
    """The call of :func:`recurrent` and :func:`scan`."""
    check_floating("u", u, kernel)
    sequences = sequences_of(cu_seqlens, u, u, kernel) if u.ndim == 3 else Sequences(0, 0, None)
    check_arguments(u, parameters, d, initial_state, sequences.count, kernel)
    given = (*parameters, d, initial_state)
    y, end = StateSpace.apply(  # type: ignore[no-untyped-call]
        Run(sequences, stepwise), u, *(None if x is None else x.contiguous() for x in given)
    )
    return (y, end) if return_state else y


def through_kernel(
    convolve: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    u: torch.Tensor,
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    d: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    *,
    return_state: bool,
    kernel: str,
) -> Result:
    """The call of :func:`convolution` and :func:`fft`, which differ in ``convolve``, (H,N) and (B,H,N) to
    (B,H,N). Casts come first, so that a gradient of several parts is rounded once.
    """
    check_arguments(u, parameters, d, initial_state, None, kernel)
    pairs, length = parameters[0].ndim == 3, u.shape[2]
    f = u.float()
    a, b, c = (x.float() for x in parameters)
    y = convolve(responses(a, product(c, b, pairs=pairs)[None], length)[0], f)
    if initial_state is not None:
        y = y + responses(a, product(product(c, a, pairs=pairs), initial_state, pairs=pairs), length)
    if d is not None:
        y = y + d.float()[:, None] * f
    y = y.to(u.dtype)
    if not return_state:
        return y
    reached = moments(a, f.flip(2))
    end = product(b.expand(reached.shape), reached, pairs=pairs)
    if initial_state is not None:
        last = torch.zeros(length + 1, device=u.device)
        last[length] = 1.0
        power = moments(a, last.expand(1, a.shape[0], length + 1))
        end = end + product(power.expand(initial_state.shape), initial_state, pairs=pairs)
    return y, end


@promises(SSM)
def recurrent(
    u: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> Result:
    """A diagonal state space, one position after the other; differentiable once in every tensor.

    Args:
        u: inputs (B,H,N), float32, float16 or bfloat16; any strides.
        a, b, c: decays, input and output weights, all (H,D), or all (H,D,2): pairs of real and imaginary
            part; u's dtype. A gradient by a pair is the pair of gradients by its parts.
        d: skip weights (H), u's dtype, or None.
        initial_state: (B,H,D) or (B,H,D,2) float32, or None for zeros; (P,…) with ``cu_seqlens``.
        cu_seqlens: (P+1,) int32, for B = 1: P sequences one after the other.
        return_state: also return the final state, of the initial state's shape.

    Returns:
        y (B,H,N) of u's dtype, or (y, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64.
    """
    return through_states(
        u, (a, b, c), d, initial_state, cu_seqlens, stepwise=True, return_state=return_state,
        kernel="recurrent",
    )  # fmt: skip


@promises(SSM)
def scan(
    u: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> Result:
    """:func:`recurrent` as an associative scan inside blocks of positions, a state carried between them.

    Args:
        u, a, b, c, d, initial_state, cu_seqlens, return_state: as there.

    Returns:
        y (B,H,N) of u's dtype, or (y, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64.
    """
    return through_states(
        u, (a, b, c), d, initial_state, cu_seqlens, stepwise=False, return_state=return_state, kernel="scan"
    )


@promises(SSM_CONVOLUTION)
def convolution(
    u: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> Result:
    """:func:`recurrent` as a product with the lower triangular Toeplitz matrix of K_i = Re Σ_s c_s a_sⁱ b_s.

    N² multiplications a channel; the initial state's response is added to it.

    Args:
        u, a, b, c, d, initial_state, return_state: as there.

    Returns:
        y (B,H,N) of u's dtype, or (y, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64.
    """
    return through_kernel(
        toeplitz, u, (a, b, c), d, initial_state, return_state=return_state, kernel="convolution"
    )


def transformed(k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The causal convolution of k (H,N) and x (B,H,N) by transforms long enough for no wrap-around."""
    length = x.shape[2]
    if not x.numel():
        return x * 1.0
    size = 1 << (2 * length - 1).bit_length()
    spectrum = torch.fft.rfft(k, n=size) * torch.fft.rfft(x, n=size)
    y: torch.Tensor = torch.fft.irfft(spectrum, n=size)[..., :length]
    return y


@promises(SSM_FFT)
def fft(
    u: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> Result:
    """:func:`convolution` by Fourier transforms of at least 2N points, through torch, in float32.

    Its error is about u log₂N ‖K‖ ‖u‖ in every output: a small output has no relative accuracy, and inputs
    after a position reach it as rounding.

    Args:
        u, a, b, c, d, initial_state, return_state: as there.

    Returns:
        y (B,H,N) of u's dtype, or (y, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64.
    """
    return through_kernel(
        transformed, u, (a, b, c), d, initial_state, return_state=return_state, kernel="fft"
    )


def step(
    u: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One position of decoding: u (B,H) and the state before it to y (B,H) and the state after it.

    Args:
        u: inputs of one position, (B,H).
        a, b, c, d: as for :func:`recurrent`.
        state: (B,H,D) or (B,H,D,2) float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64.
    """
    check_floating("u", u, "step")
    if u.ndim != 2:
        raise ContractError(f"step: u has shape {tuple(u.shape)}: expected 2 axes (batch, heads)")
    result = through_states(
        u.unsqueeze(2), (a, b, c), d, state, None, stepwise=True, return_state=True, kernel="step"
    )
    return result[0].squeeze(2), result[1]
