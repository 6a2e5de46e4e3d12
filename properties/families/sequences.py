"""Calls of families with a state: packed sequences, checks of states and gates, what a bad input closes.

A call holds S sequences: one for each batch entry, or P packed ones on the sequence axis of B = 1, given by
``cu_seqlens``. Sequence s is the triple (batch, start, stop), and state s belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnproof.properties.budgets.base import dtype_name
from attnproof.properties.contract import ContractError
from attnproof.properties.families.arguments import checked_cu_seqlens

__all__ = [
    "Sequences",
    "StateCall",
    "checked_gate",
    "checked_state",
    "checked_state_call",
    "checked_vector",
    "flag",
    "state_dtype",
]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the sequences of a call lie.

    Attributes:
        batch, length: B and N of the call's tensors.
        segments: (batch, start, stop) of every sequence, in the order of their states; zero-length ones
            included.
        packed: whether the call gave ``cu_seqlens``.
    """

    batch: int
    length: int
    segments: tuple[tuple[int, int, int], ...]
    packed: bool

    @classmethod
    def of(cls, batch: int, length: int, cu_seqlens: Any = None) -> Sequences:
        """The sequences of a call of B = ``batch`` and N = ``length``.

        Raises:
            ContractError: ``cu_seqlens`` is no int32 tensor of offsets that rise from 0 to N, or B is not 1.
        """
        cu = checked_cu_seqlens(cu_seqlens, batch, length, length)
        if cu is None:
            return cls(batch, length, tuple((b, 0, length) for b in range(batch)), packed=False)
        ends = cu.tolist()
        spans = zip(ends, ends[1:], strict=False)
        return cls(batch, length, tuple((0, start, stop) for start, stop in spans), packed=True)

    def __len__(self) -> int:
        """How many sequences, and states, there are."""
        return len(self.segments)

    def part(self, s: int, tensor: torch.Tensor) -> torch.Tensor:
        """Sequence s of a tensor (B, H, N, …), as (1, H, n, …)."""
        b, start, stop = self.segments[s]
        return tensor[b : b + 1, :, start:stop]

    def joined(self, parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`part`: what every sequence gives, (1, H, n, …), as (B, H, N, …).

        ``like`` has the shape of the result, which matters where there is no sequence.
        """
        if not parts:
            return torch.zeros_like(like)
        return torch.cat(tuple(parts), 2 if self.packed else 0)

    def closed(self, bad: torch.Tensor, *, causal: bool = True) -> torch.Tensor:
        """Rows that see a position of ``bad`` (bool (B, H, N)): those not before it in its own sequence.

        Without ``causal``, all rows of its sequence.
        """
        seen = torch.zeros_like(bad)
        for b, start, stop in self.segments:
            span = bad[b, :, start:stop]
            seen[b, :, start:stop] = (
                span.cummax(-1).values if causal and stop > start else span.any(-1, keepdim=True)
            )
        return seen

    def closed_states(self, bad: torch.Tensor) -> torch.Tensor:
        """States that see a position of ``bad`` (bool (B, H, N)): bool (S, H)."""
        states = torch.zeros(len(self), bad.shape[1], dtype=torch.bool)
        for s, (b, start, stop) in enumerate(self.segments):
            states[s] = bad[b, :, start:stop].any(-1)
        return states

    def rows_of_states(self, states: torch.Tensor) -> torch.Tensor:
        """A mask of states (S, H) given to every row of their sequences: bool (B, H, N)."""
        rows = torch.zeros(self.batch, states.shape[1], self.length, dtype=torch.bool)
        for s, (b, start, stop) in enumerate(self.segments):
            rows[b, :, start:stop] = states[s][:, None]
        return rows


@dataclass(frozen=True, eq=False)
class StateCall:
    """The checked tensors that every family with a state has.

    Attributes:
        q, k: (B, H, N, D); v: (B, H, N, E); as they were handed over, non-finite entries included.
        sequences: which positions belong together.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sequences: Sequences

    @property
    def rows(self) -> tuple[int, int, int]:
        """(B, H, N)."""
        batch, heads, length = self.q.shape[:3]
        return batch, heads, length

    @property
    def bad_queries(self) -> torch.Tensor:
        """Positions whose query is not finite, bool (B, H, N)."""
        return ~self.q.isfinite().all(-1)

    @property
    def bad_writes(self) -> torch.Tensor:
        """Positions whose key or value is not finite, bool (B, H, N)."""
        return ~self.k.isfinite().all(-1) | ~self.v.isfinite().all(-1)


def _got(tensor: Any) -> str:
    """A wrong argument in words."""
    if isinstance(tensor, torch.Tensor):
        return f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
    return f"type {type(tensor).__name__}"


def checked_state_call(
    family: str, tensors: Sequence[Any], names: Sequence[str] = ("q", "k", "v"), cu_seqlens: Any = None
) -> StateCall:
    """q, k, v and the sequences of a call.

    Args:
        family: the family's name, for messages.
        tensors: all positional tensors of the call, q, k, v first.
        names: of the positional tensors, one each.
        cu_seqlens: int32 (P + 1), or None.

    Raises:
        ContractError: another number of tensors, or q, k, v not of one dtype and (B, H, N, ·), q and k of one
            width; ``cu_seqlens`` wrong.
    """
    if len(tensors) != len(names):
        raise ContractError(f"{family} takes {len(names)} tensors {', '.join(names)}; got {len(tensors)}")
    q, k, v = tensors[:3]
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            raise ContractError(
                f"{name} has {_got(tensor)}; {family} asks for 4 axes (batch, heads, length, width)"
            )
        dtype_name(tensor.dtype, name)
    if not q.dtype == k.dtype == v.dtype:
        raise ContractError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; the contract asks for one dtype"
        )
    if q.shape != k.shape or k.shape[:3] != v.shape[:3]:
        raise ContractError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; {family} asks for "
            "(B, H, N, D) twice and (B, H, N, E)"
        )
    return StateCall(q, k, v, Sequences.of(q.shape[0], q.shape[2], cu_seqlens))


def checked_gate(name: str, gate: Any, call: StateCall, *, wide: bool = True, decay: bool = True) -> None:
    """A gate is one number a position, (B, H, N), or with ``wide`` also one a channel, (B, H, N, D).

    Args:
        name: of the argument.
        gate: what was given.
        call: the call's other tensors.
        wide: whether (B, H, N, D) is right too.
        decay: whether the gate is a log decay, of which no entry may be positive; −inf is a decay of 0.

    Raises:
        ContractError: another shape, a dtype that is neither q's nor float32, or a positive log decay.
    """
    shapes = [call.rows, tuple(call.q.shape)] if wide else [call.rows]
    if not isinstance(gate, torch.Tensor) or tuple(gate.shape) not in shapes:
        asked = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ContractError(f"{name} has {_got(gate)}; the contract asks for a tensor of shape {asked}")
    _check_dtype(name, gate, call.q.dtype)
    if decay and bool(((gate > 0) & gate.isfinite()).any()):
        largest = float(torch.where(gate.isfinite(), gate, 0.0).max())
        raise ContractError(f"{name} holds {largest}; a log decay is ≤ 0: decays above 1 are not asked for")


def checked_vector(name: str, vector: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A tensor of exactly this shape and dtype.

    Raises:
        ContractError: anything else.
    """
    if not isinstance(vector, torch.Tensor) or tuple(vector.shape) != shape or vector.dtype != dtype:
        raise ContractError(f"{name} has {_got(vector)}; the contract asks for shape {shape} and {dtype}")


def _check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype not in (dtype, torch.float32):
        raise ContractError(f"{name} has dtype {tensor.dtype}; the contract asks for {dtype} or float32")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states of a call in ``dtype``: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_state(name: str, state: Any, call: StateCall, shape: tuple[int, ...]) -> None:
    """An initial state is None or float32 (float64 for float64) of shape (S, H, *shape).

    Args:
        name: of the argument.
        state: what was given.
        call: the call's other tensors.
        shape: what follows sequences and heads, (D, E) for a matrix state.

    Raises:
        ContractError: another shape or dtype.
    """
    if state is not None:
        full = (len(call.sequences), call.q.shape[1], *shape)
        checked_vector(name, state, full, state_dtype(call.q.dtype))


def flag(name: str, value: Any) -> bool:
    """A Python bool.

    Raises:
        ContractError: anything else.
    """
    if not isinstance(value, bool):
        raise ContractError(f"{name}={value!r}; the contract asks for True or False")
    return value
