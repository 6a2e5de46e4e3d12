"""What kernels of families with a state check before they launch, and where their sequences and chunks lie.

A batch is a number of sequences: the B entries of a batch, or P pieces of one packed row (``cu_seqlens``).
Every sequence has a state of its own, and is cut into chunks from its own beginning; the last may be ragged.
Kernels that work on chunks number them through all sequences: sequence s owns chunks first[s] to
first[s + 1] − 1. :func:`sequence_bounds` and :func:`chunk_bounds` find their rows inside a kernel.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attnproof.kernels.arguments import check_attention_tensors, check_cu_seqlens, check_floating
from attnproof.properties.contract import ContractError

__all__ = [
    "Chunks",
    "Sequences",
    "check_gate",
    "check_head_vector",
    "check_initial_state",
    "check_state_tensors",
    "chunk_bounds",
    "register_limit",
    "sequence_bounds",
    "sequences_of",
]


# Of a multiprocessor (sm_80 to sm_100), and the most that an instruction can name.
REGISTERS = 65536
MOST_REGISTERS = 255
THREADS_A_WARP = 32


def register_limit(num_warps: int) -> dict[str, int]:
    """Keyword of a launch with ``num_warps``: that a thread may have all the registers there are for it.

    Unasked, ptxas spills some bytes of a kernel wherever another program then fits on a multiprocessor: of
    linear attention in float32 at D = 128, 24 bytes at 96 registers a thread that 167 hold without spills.
    AMD's compiler does nothing of that kind and has no such option. Measured by tests/quality/spills.py.
    """
    if triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": min(MOST_REGISTERS, REGISTERS // (THREADS_A_WARP * num_warps))}


def check_state_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str) -> None:
    """Raise unless q, k (B,H,N,D) and v (B,H,N,E) agree in dtype, device, B, H and N, and D, E ≤ 256."""
    check_attention_tensors(q, k, v, kernel)
    if q.shape[:3] != k.shape[:3]:
        raise ContractError(
            f"{kernel}: q {tuple(q.shape)}, k {tuple(k.shape)}: a family with a state has as many queries as "
            "keys, and as many query heads as key heads"
        )


def check_beside(name: str, x: torch.Tensor, q: torch.Tensor, kernel: str) -> None:
    """Raise unless ``x`` is on q's device, of q's dtype or float32."""
    check_floating(name, x, kernel)
    if x.dtype not in (q.dtype, torch.float32):
        raise ContractError(
            f"{kernel}: {name} is {x.dtype} while q is {q.dtype}: expected q's dtype or float32"
        )
    if x.device != q.device:
        raise ContractError(f"{kernel}: {name} is on {x.device} while q is on {q.device}: move it there")


def check_gate(
    name: str, x: torch.Tensor, q: torch.Tensor, kernel: str, *, scalar: bool = True, vector: bool = True
) -> None:
    """Raise unless ``x`` has one number a position, (B,H,N), where ``scalar`` allows that, or one a key
    channel, (B,H,N,D), where ``vector`` does; in q's dtype or float32.
    """
    check_beside(name, x, q, kernel)
    allowed = ([tuple(q.shape[:3])] if scalar else []) + ([tuple(q.shape)] if vector else [])
    if tuple(x.shape) not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ContractError(f"{kernel}: {name} has shape {tuple(x.shape)}: expected {expected}")


def check_head_vector(name: str, x: torch.Tensor, q: torch.Tensor, kernel: str) -> None:
    """Raise unless ``x`` holds one number a head and key channel, (H,D), in q's dtype."""
    check_beside(name, x, q, kernel)
    if x.dtype != q.dtype:
        raise ContractError(f"{kernel}: {name} is {x.dtype} while q is {q.dtype}: cast it")
    if tuple(x.shape) != (q.shape[1], q.shape[3]):
        raise ContractError(
            f"{kernel}: {name} has shape {tuple(x.shape)}: expected (H, D) = {(q.shape[1], q.shape[3])}"
        )


def check_initial_state(
    name: str, state: torch.Tensor | None, shape: tuple[int, ...], q: torch.Tensor, kernel: str
) -> None:
    """Raise unless ``state`` is None or float32 of ``shape``, (B or P, H, …), on q's device."""
    if state is None:
        return
    if not isinstance(state, torch.Tensor):
        raise ContractError(
            f"{kernel}: {name} is a {type(state).__name__}: expected a torch.Tensor of shape {shape}, or None"
        )
    if state.dtype != torch.float32:
        raise ContractError(f"{kernel}: {name} is {state.dtype}: states are float32; pass {name}.float()")
    if tuple(state.shape) != shape:
        raise ContractError(f"{kernel}: {name} has shape {tuple(state.shape)}: expected {shape}")
    if state.device != q.device:
        raise ContractError(f"{kernel}: {name} is on {state.device} while q is on {q.device}: move it there")


@dataclass(frozen=True, slots=True)
class Chunks:
    """All sequences cut into chunks of ``size`` positions.

    Attributes:
        size: positions a chunk; the last of a sequence may have fewer.
        count: chunks of all sequences together.
        each: chunks of every sequence where nothing is packed; 0 otherwise.
        first: (P+1,) int32, the number of each packed sequence's first chunk; None where nothing is packed.
        owner: (count,) int32, the packed sequence of each chunk; None where nothing is packed.
    """

    size: int
    count: int
    each: int
    first: torch.Tensor | None
    owner: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences of one call.

    Attributes:
        count: B, or P where they are packed.
        longest: positions of the longest one.
        cu_seqlens: (P+1,) int32, contiguous, or None.
    """

    count: int
    longest: int
    cu_seqlens: torch.Tensor | None

    @property
    def packed(self) -> bool:
        """Whether the sequences lie one after the other in one row."""
        return self.cu_seqlens is not None

    def chunks(self, size: int) -> Chunks:
        """These sequences cut into chunks of ``size`` positions, each from its own beginning."""
        if self.cu_seqlens is None:
            each = -(-self.longest // size)
            return Chunks(size, self.count * each, each, None, None)
        numbers = [-(-(stop - start) // size) for start, stop in itertools.pairwise(self.cu_seqlens.tolist())]
        device = self.cu_seqlens.device
        first = torch.tensor([0, *itertools.accumulate(numbers)], dtype=torch.int32, device=device)
        owners = [sequence for sequence, number in enumerate(numbers) for _ in range(number)]
        owner = torch.tensor(owners, dtype=torch.int32, device=device)
        return Chunks(size, len(owners), 0, first, owner)


def sequences_of(cu_seqlens: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, kernel: str) -> Sequences:
    """The sequences of q and k (B,H,N,D); raises unless ``cu_seqlens`` is None or cuts one packed row."""
    if cu_seqlens is None:
        return Sequences(q.shape[0], q.shape[2], None)
    longest = check_cu_seqlens(cu_seqlens, q, k, kernel)
    return Sequences(cu_seqlens.shape[0] - 1, longest, cu_seqlens.contiguous())


@triton.jit
def sequence_bounds(p_cu, i_s, N):
    """(batch entry, first position, end) of sequence i_s, all int64; p_cu is None where nothing is packed."""
    if p_cu is None:
        i_b = i_s.to(tl.int64)
        i_start, i_stop = i_b * 0, i_b * 0 + N
    else:
        i_start, i_stop = tl.load(p_cu + i_s).to(tl.int64), tl.load(p_cu + i_s + 1).to(tl.int64)
        i_b = i_start * 0
    return i_b, i_start, i_stop


@triton.jit
def chunk_bounds(p_cu, p_first, p_owner, i_c, each, N, C: tl.constexpr):
    """(batch entry, first position, end of its sequence, sequence) of chunk i_c: it holds positions from the
    first to the lesser of the end and the first + C. ``each`` is Chunks.each.
    """
    if p_cu is None:
        i_s, i_n = i_c // each, i_c % each
    else:
        i_s = tl.load(p_owner + i_c)
        i_n = i_c - tl.load(p_first + i_s)
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    return i_b, i_start + i_n * C, i_stop, i_s
