"""From a request to a message, and from a reply to an outcome; no process is involved."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final

import torch

from attnproof import arena
from attnproof.outcomes import (
    CallRequest,
    CapturedOutput,
    Declined,
    Isolation,
    Mutation,
    NotATensor,
    Observed,
    OutOfMemory,
    Output,
    Raised,
    Returned,
    ReturnedValue,
)
from attnproof.protocol import (
    DTYPES,
    Call,
    Node,
    Opaque,
    Reply,
    Sequenced,
    TensorData,
    Trouble,
)

__all__ = ["Circumstances", "check_device", "message_for", "outcome_of_reply", "outcome_of_trouble"]

_DEVICE: Final = re.compile(r"cpu|cuda(:\d+)?|emulator(:\w+)?")


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What every outcome of a call tells, whichever it is."""

    output: CapturedOutput
    mutations: tuple[Mutation, ...]
    elapsed: float
    pid: int
    isolation: Isolation
    residue: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()

    @classmethod
    def of(cls, outcome: Observed) -> Circumstances:
        """Those of an outcome that is there already."""
        return cls(**{entry.name: getattr(outcome, entry.name) for entry in fields(cls)})

    def fields(self) -> dict[str, Any]:
        """As keyword arguments of an outcome."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def check_device(device: str) -> None:
    """Raise ValueError for a device that no worker knows."""
    if not _DEVICE.fullmatch(device):
        raise ValueError(f"device is {device!r}: write cpu, cuda, cuda:1, emulator or emulator:sm_90")


def message_for(request: CallRequest, packed: arena.Packed, number: int, shared_bytes: int) -> Call:
    """A request as the message that is sent."""
    return Call(
        number=number,
        shared_bytes=shared_bytes,
        segments=packed.segments,
        arguments=packed.arguments,
        keywords=packed.keywords,
        repeats=request.repeats,
        poison=request.poison_outputs,
        differentiate=request.differentiate,
        cotangents=packed.cotangents,
    )


def outcome_of_trouble(
    trouble: Trouble, circumstances: Circumstances, memory_limit: int
) -> Raised | Declined | OutOfMemory:
    """The outcome of a call, or an import, that raised."""
    told = circumstances.fields()
    phase: Any = trouble.phase
    if trouble.kind == "declined" and phase != "import":
        return Declined(message=trouble.message, **told)
    if trouble.kind == "memory":
        message = f"{trouble.type}: {trouble.message}"
        return OutOfMemory(limit=memory_limit, resident=None, phase=phase, message=message, **told)
    return Raised(
        type=trouble.type, message=trouble.message, traceback=trouble.traceback, phase=phase, **told
    )


def outcome_of_reply(reply: Reply, body: bytearray, circumstances: Mapping[str, Any]) -> Returned:
    """The outcome that a checked reply describes; its tensors own their memory."""
    tensors = [_tensor(data, body) for data in reply.tensors]
    order: list[int] = []
    value = _value(reply.value, tensors, order)
    gradients = None
    if reply.gradients is not None:
        named = {
            entry.name: None if entry.index is None else tensors[entry.index] for entry in reply.gradients
        }
        gradients = MappingProxyType(named)
    return Returned(
        value=value,
        container=_container(reply.value),
        outputs=tuple(_output(tensors[i], reply.tensors[i]) for i in order),
        aliases=reply.aliases,
        differences=reply.differences,
        gradients=gradients,
        seconds=reply.seconds,
        **circumstances,
    )


def _tensor(data: TensorData, body: bytearray) -> torch.Tensor:
    dtype = DTYPES[data.dtype]
    count = math.prod(data.shape)
    if not count:
        return torch.empty(data.shape, dtype=dtype)
    return torch.frombuffer(body, dtype=dtype, count=count, offset=data.start).reshape(data.shape)


def _output(tensor: torch.Tensor, data: TensorData) -> Output:
    return Output(tensor, data.strides, data.device, data.type, data.requires_grad)


def _value(node: Node | None, tensors: list[torch.Tensor], order: list[int]) -> ReturnedValue:
    if isinstance(node, Sequenced):
        return tuple(_value(item, tensors, order) for item in node.items)
    if isinstance(node, Opaque):
        return NotATensor(node.kind, node.text)
    assert node is not None, "check_reply lets no reply without a value pass"
    order.append(node.index)
    return tensors[node.index]


def _container(node: Node | None) -> str:
    if isinstance(node, Sequenced):
        return node.container
    return node.kind if isinstance(node, Opaque) else "tensor"
