"""State space duality (Mamba-2): a state that decays by one number a head and position, in three forms.

    h_t = exp(dt_t A) h_{t−1} + dt_t B_t x_tᵀ,   y_t = C_tᵀ h_t + D x_t

(Dao and Gu, "Transformers are SSMs", arXiv 2405.21060; theory SSD-1 to SSD-4.) :func:`recurrent` takes one
position after the other, :func:`parallel` all pairs of positions, :func:`attention` chunks: a walk over the
states between them, then all chunks at the same time. All have the gradients of
:mod:`attnproof.kernels.ssd_backward`, from states that are computed again and not kept.

The heads of a group share B and C, which no kernel copies. It is gated linear attention with q = C, k = B,
v = dt x and the gate dt A.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_floating
from attnproof.kernels.gated_linear import strided, triton_dtype
from attnproof.kernels.ssd_backward import group_gradient_kernel, head_gradient_kernel
from attnproof.kernels.ssd_chunks import output_kernel, states_kernel
from attnproof.kernels.ssd_parallel import pairs_kernel
from attnproof.kernels.ssd_recurrence import recurrent_kernel
from attnproof.kernels.states import Chunks, Sequences, check_initial_state, register_limit, sequences_of
from attnproof.kernels.tiles import memory_layout, padded_width
from attnproof.properties.contract import Contract, ContractError, Supports, promises

__all__ = ["SSD", "attention", "parallel", "recurrent"]

SSD = Contract(
    family="ssd",
    options=("initial_state", "cu_seqlens", "return_state"),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
)

Form = Literal["attention", "recurrent", "parallel"]


class Inputs(NamedTuple):
    """The tensors of a call, checked; those that may be None are."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    initial_state: torch.Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """H, heads a group, N, D and E, as kernels take them."""
        heads, length, value_width = self.x.shape[1:]
        groups, _, width = self.B.shape[1:]
        return heads, heads // groups, length, width, value_width

    def state(self, count: int) -> torch.Tensor:
        """Room for ``count`` states a head."""
        shape = (count, self.x.shape[1], self.B.shape[3], self.x.shape[3])
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)


class ChunkTile(NamedTuple):
    """The shape of a launch: positions and the most channels of D and E a tile, and warps.

    Measured by compiling for sm_80, sm_90, sm_100 and gfx942: see tests/quality/spills.py.
    """

    chunk: int
    width: int
    warps: int

    def keywords(self, *widths: int) -> dict[str, Any]:
        """Of the launch, for D and E."""
        block_d, block_e = (min(padded_width(width), self.width) for width in widths)
        return {
            "C": self.chunk, "BD": block_d, "BE": block_e, "num_warps": self.warps, "num_stages": 1,
            "enable_fp_fusion": False, **register_limit(self.warps),
        }  # fmt: skip


CHUNK = 64
STATES_TILE = ChunkTile(CHUNK, 32, 8)
GRADIENT_TILE = ChunkTile(CHUNK, 16, 8)


def output_tile(dtype: torch.dtype) -> ChunkTile:
    """Of the kernels of outputs. Exact float32 products run without matrix instructions on NVIDIA and keep
    all their operands in registers: 344 bytes of them are spilled on sm_90 where tiles are 32 channels wide.
    """
    return ChunkTile(CHUNK, 16 if dtype == torch.float32 else 32, 8)


def chunk_states(
    inputs: Inputs,
    sequences: Sequences,
    chunks: Chunks,
    dy: torch.Tensor | None,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before all chunks (T,H,D,E) and the last ones (S,H,D,E); with dy, for which time runs
    backwards, the gradients of the states after all chunks and of the initial ones.
    """
    heads, _, _, width, value_width = inputs.sizes
    y, z = (inputs.B, inputs.x) if dy is None else (inputs.C, dy)
    start = None if start is None else start.contiguous()
    states, end = inputs.state(chunks.count), inputs.state(sequences.count)
    if end.numel():
        tile = STATES_TILE.keywords(width, value_width)
        layout = memory_layout(y, z)
        grid = (
            sequences.count * heads,
            triton.cdiv(width, tile["BD"]),
            triton.cdiv(value_width, tile["BE"]),
        )
        states_kernel[grid](
            y, z, inputs.dt, inputs.A.contiguous(), start, states, end, sequences.cu_seqlens, chunks.first,
            *strided(layout, y, z), *inputs.dt.stride(), chunks.each, *inputs.sizes,
            REVERSE=dy is not None, LAYOUT=layout, DTYPE=triton_dtype(y), **tile,
        )  # fmt: skip
    return states, end


def outputs(inputs: Inputs, sequences: Sequences, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B,H,N,E) and the final states."""
    x, dt, A, B, C, D, start = inputs
    heads, _, _, width, value_width = inputs.sizes
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    A, D = A.contiguous(), None if D is None else D.contiguous()
    start = None if start is None else start.contiguous()
    layout = memory_layout(x, B, C)
    steps = (*strided(layout, x, B, C), *dt.stride())
    cu_seqlens = sequences.cu_seqlens
    tile = output_tile(x.dtype).keywords(width, value_width)
    if form == "recurrent":
        end = inputs.state(sequences.count)
        block_d = padded_width(width)
        block_e = min(padded_width(value_width), max(16, 4096 // block_d))
        if end.numel():
            recurrent_kernel[(sequences.count * heads, triton.cdiv(value_width, block_e))](
                x, B, C, dt, A, D, start, y, end, cu_seqlens, *steps, *inputs.sizes,
                LAYOUT=layout, BD=block_d, BE=block_e,
                num_warps=4, num_stages=1, enable_fp_fusion=False, **register_limit(4),
            )  # fmt: skip
        return y, end
    chunks = sequences.chunks(CHUNK)
    states, end = chunk_states(inputs, sequences, chunks, None, start)
    if not y.numel():
        return y, end
    if form == "parallel":
        rows = triton.cdiv(sequences.longest, CHUNK)
        pairs_kernel[(sequences.count * heads, rows, triton.cdiv(value_width, tile["BE"]))](
            x, B, C, dt, A, D, start, y, cu_seqlens, *steps, *inputs.sizes,
            LAYOUT=layout, DTYPE=triton_dtype(x), **tile,
        )  # fmt: skip
    else:
        output_kernel[(chunks.count * heads,)](
            x, B, C, dt, A, D, states, y, cu_seqlens, chunks.first, chunks.owner, *steps,
            chunks.each, *inputs.sizes, LAYOUT=layout, DTYPE=triton_dtype(x), **tile,
        )  # fmt: skip
    return y, end


def gradients(
    inputs: Inputs,
    sequences: Sequences,
    dy: torch.Tensor,
    dend: torch.Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the tensors of ``inputs``, None for those without need."""
    x, dt, A, B, C, D, start = inputs
    heads, *sizes = inputs.sizes
    groups, widths = B.shape[1], sizes[-2:]
    chunks = sequences.chunks(CHUNK)
    dstates, dstart = chunk_states(inputs, sequences, chunks, dy, dend)
    dx, ddt, dB, dC = (torch.empty(z.shape, dtype=z.dtype, device=x.device) for z in (x, dt, B, C))
    dA, dD = torch.zeros(2, chunks.count, heads, dtype=torch.float32, device=x.device)
    if chunks.count and any(needs[:-1]):
        A, skip = A.contiguous(), None if D is None else D.contiguous()
        states, _ = chunk_states(inputs, sequences, chunks, None, start)
        tile = GRADIENT_TILE.keywords(*widths)
        layout = memory_layout(x, B, C, dy)
        steps = (*strided(layout, x, B, C, dy), *dt.stride())
        places = (sequences.cu_seqlens, chunks.first, chunks.owner)
        if any(needs[i] for i in (0, 1, 2, 5)):
            head_gradient_kernel[(chunks.count * heads,)](
                x, B, C, dy, dt, A, skip, states, dstates, dx, ddt, dA, dD, *places, *steps,
                chunks.each, heads, *sizes, LAYOUT=layout, DTYPE=triton_dtype(x), **tile,
            )  # fmt: skip
        if needs[3] or needs[4]:
            group_gradient_kernel[(chunks.count * groups, triton.cdiv(widths[0], tile["BD"]))](
                x, B, C, dy, dt, A, states, dstates, dB, dC, *places, *steps,
                chunks.each, groups, *sizes, LAYOUT=layout, DTYPE=triton_dtype(x), **tile,
            )  # fmt: skip
    whole_dD = None if D is None else dD.sum(0).to(D.dtype)
    found = (dx, ddt, dA.sum(0).to(A.dtype), dB, dC, whole_dD, dstart)
    return tuple(z if need else None for z, need in zip(found, needs, strict=True))


class StateSpaceDuality(torch.autograd.Function):
    """(y, final state) of x, dt, A, B, C, D or None and the initial state or None."""

    @staticmethod
    def forward(ctx: Any, form: Form, sequences: Sequences, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.sequences = sequences
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        return outputs(Inputs(*given), sequences, form)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor | None, dend: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        inputs = Inputs(*ctx.saved_tensors)
        if dy is None:
            dy = inputs.x.new_zeros(()).expand(inputs.x.shape)
        return None, None, *gradients(inputs, ctx.sequences, dy, dend, ctx.needs_input_grad[2:])


def check_like(
    name: str, z: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...], kernel: str, *, wide: bool = False
) -> None:
    """Raise unless ``z`` has ``shape``, x's device, and x's dtype or, with ``wide``, float32."""
    check_floating(name, z, kernel)
    if z.dtype != x.dtype and not (wide and z.dtype == torch.float32):
        expected = "x's dtype or float32" if wide else "x's dtype"
        raise ContractError(f"{kernel}: {name} is {z.dtype} while x is {x.dtype}: expected {expected}")
    if tuple(z.shape) != shape:
        raise ContractError(
            f"{kernel}: {name} has shape {tuple(z.shape)} while x has {tuple(x.shape)}: expected {shape}"
        )
    if z.device != x.device:
        raise ContractError(f"{kernel}: {name} is on {z.device} while x is on {x.device}: move it there")


def check_inputs(inputs: Inputs, kernel: str) -> None:
    """Raise unless the tensors of a call fit together."""
    x, dt, A, B, C, D, _ = inputs
    for name, z, axes in (("x", x, "(B, H, N, E)"), ("B", B, "(B, G, N, D)")):
        check_floating(name, z, kernel)
        if z.ndim != 4:
            raise ContractError(f"{kernel}: {name} has shape {tuple(z.shape)}: expected 4 axes {axes}")
    batch, heads, length, value_width = x.shape
    groups, width = B.shape[1], B.shape[3]
    if heads < 1 or groups < 1 or heads % groups:
        raise ContractError(
            f"{kernel}: x {tuple(x.shape)}, B {tuple(B.shape)}: {heads} heads must be a positive multiple of "
            f"{groups} groups"
        )
    check_like("B", B, x, (batch, groups, length, width), kernel)
    check_like("C", C, x, (batch, groups, length, width), kernel)
    check_like("dt", dt, x, (batch, heads, length), kernel, wide=True)
    check_like("A", A, x, (heads,), kernel, wide=True)
    if D is not None:
        check_like("D", D, x, (heads,), kernel)
    for name, size, z in (("D", width, B), ("E", value_width, x)):
        where = f"{kernel}: {'B' if z is B else 'x'} has shape {tuple(z.shape)}: width {name} is {size}"
        if size < 1:
            raise ContractError(f"{where}: expected 1 to {MAX_HEAD_DIM}")
        if size > MAX_HEAD_DIM:
            raise NotImplementedError(f"{where}: this kernel goes up to {MAX_HEAD_DIM}")


def called(
    inputs: Inputs, cu_seqlens: torch.Tensor | None, return_state: bool, form: Form
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The call of every entry point below, which ``form`` names."""
    check_inputs(inputs, form)
    x, _, _, B, *_ = inputs
    sequences = sequences_of(cu_seqlens, x, B, form)
    shape = (sequences.count, x.shape[1], B.shape[3], x.shape[3])
    check_initial_state("initial_state", inputs.initial_state, shape, x, form)
    y, state = StateSpaceDuality.apply(form, sequences, *inputs)  # type: ignore[no-untyped-call]
    return (y, state) if return_state else y


@promises(SSD)
def attention(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's state space duality in chunks of 64 positions; differentiable once in every tensor.

    Args:
        x: (B,H,N,E) float32, float16 or bfloat16; any strides; E from 1 to 256.
        dt: (B,H,N) step sizes ≥ 0, of x's dtype or float32.
        A: (H,) rates ≤ 0, of x's dtype or float32: the log decay of a position is dt A.
        B, C: (B,G,N,D) of x's dtype, H a multiple of G: head h reads group h // (H/G); D from 1 to 256.
        D: (H,) factors of x in y, of x's dtype, or None for none.
        initial_state: (B,H,D,E) float32, or None for zeros; (P,H,D,E) with ``cu_seqlens``.
        cu_seqlens: (P+1,) int32, for a batch of 1: P sequences one after the other.
        return_state: also return the final state, of the initial state's shape.

    Returns:
        y (B,H,N,E) of x's dtype, or (y, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return called(Inputs(x, dt, A, B, C, D, initial_state), cu_seqlens, return_state, "attention")


@promises(SSD)
def recurrent(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention`, one position after the other; nothing is rounded below float32 but y.

    Args:
        x, dt, A, B, C, D, initial_state, cu_seqlens, return_state: as there.

    Returns:
        y (B,H,N,E) of x's dtype, or (y, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return called(Inputs(x, dt, A, B, C, D, initial_state), cu_seqlens, return_state, "recurrent")


@promises(SSD)
def parallel(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention`, pair by pair: work that grows as N², and no state between the rows.

    Args:
        x, dt, A, B, C, D, initial_state, cu_seqlens, return_state: as there.

    Returns:
        y (B,H,N,E) of x's dtype, or (y, state) with the state in float32.

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return called(Inputs(x, dt, A, B, C, D, initial_state), cu_seqlens, return_state, "parallel")
