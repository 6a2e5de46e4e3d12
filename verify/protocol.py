"""What judge and worker say to each other: typed frames over a pair of pipes.

A frame is a 16-byte prefix (magic, header length, body length), a msgpack header that must decode to one of
the structs below, and raw bytes. Nothing from a worker is ever unpickled or evaluated. Every length is
checked against a limit before memory is set aside for it, and every claim of a header (dtype, shape, place
in the body) against the body, so a worker that writes garbage costs its judge a :class:`ProtocolError` and
nothing else.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from typing import Final, Generic, TypeVar

import msgspec
import torch

__all__ = [
    "DTYPES",
    "MAX_HEADER",
    "Alias",
    "Argument",
    "Bind",
    "Bound",
    "Call",
    "Difference",
    "FrameReader",
    "FromWorker",
    "GradientData",
    "Group",
    "Node",
    "Opaque",
    "PeerClosed",
    "Plain",
    "ProtocolError",
    "Reply",
    "Segment",
    "Sequenced",
    "TensorData",
    "TensorNode",
    "TensorRef",
    "ToWorker",
    "Trouble",
    "Warm",
    "check_reply",
    "dtype_name",
    "encode_frame",
    "raw_bytes",
    "read_frame",
    "write_all",
]

_PREFIX: Final = struct.Struct("<4sIQ")
_MAGIC: Final = b"APf1"
MAX_HEADER: Final = 1 << 20
"""Bytes of a header: descriptions of tensors and a shortened traceback, never data."""

_MAX_RANK: Final = 16
_MAX_LENGTH: Final = 1 << 40
BODY_ALIGNMENT: Final = 64
"""Tensors start at multiples of this in a body, so that the judge can read them in place."""

_NAMES: Final = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)
DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)
}
"""Every dtype that may cross the pipe, by its name in torch."""

_DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The values of a CPU tensor in the order of its indices, as they lie in memory."""
    flat = tensor.contiguous().reshape(-1)
    if flat.numel() < 2:  # contiguous with whatever stride, which a view of bytes refuses
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class ProtocolError(RuntimeError):
    """The other side sent something that is no frame, no known message, or contradicts itself."""


class PeerClosed(EOFError):
    """The other side closed its end of the pipe."""


class Segment(msgspec.Struct, frozen=True):
    """One storage in the shared file: its first byte and its length in bytes."""

    start: int
    size: int


class TensorRef(msgspec.Struct, frozen=True, tag="tensor"):
    """A tensor over a segment: strides and storage offset count elements, as in torch."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    segment: int


class Plain(msgspec.Struct, frozen=True, tag="plain"):
    """An argument that is no tensor."""

    value: bool | int | float | str | None


class Group(msgspec.Struct, frozen=True, tag="tuple"):
    """A tuple of arguments, such as a pair of states or a window."""

    items: tuple[Argument, ...]


Argument = TensorRef | Plain | Group


class Bind(msgspec.Struct, frozen=True, tag="bind"):
    """To a worker: the one kernel that it serves. With an empty target, the body is its cloudpickle bytes."""

    target: str
    device: str
    path: tuple[str, ...]
    directory: str
    headroom: int | None
    result_limit: int


class Call(msgspec.Struct, frozen=True, tag="call"):
    """To a worker: one call. ``number`` comes back in the reply; ``shared_bytes`` is the file's size."""

    number: int
    shared_bytes: int
    segments: tuple[Segment, ...]
    arguments: tuple[Argument, ...]
    keywords: dict[str, Argument]
    repeats: int
    poison: bool
    differentiate: tuple[str, ...]
    cotangents: tuple[Argument, ...]


class Warm(msgspec.Struct, frozen=True, tag="warm"):
    """From a worker: torch is imported, a kernel can be bound."""

    pid: int


class Trouble(msgspec.Struct, frozen=True):
    """An exception, as text. ``kind`` is raised, declined (NotImplementedError) or memory."""

    kind: str
    phase: str
    type: str
    message: str
    traceback: str


class Bound(msgspec.Struct, frozen=True, tag="bound"):
    """From a worker: the kernel is imported, or could not be; ``effects`` tells what its import changed."""

    seconds: float
    effects: tuple[str, ...]
    trouble: Trouble | None


class TensorNode(msgspec.Struct, frozen=True, tag="tensor"):
    """A tensor in the returned value, by its place in ``Reply.tensors``."""

    index: int


class Opaque(msgspec.Struct, frozen=True, tag="opaque"):
    """Something returned that is no dense tensor: its type's name, and a limited text of it."""

    kind: str
    text: str


class Sequenced(msgspec.Struct, frozen=True, tag="sequence"):
    """A returned tuple or list; ``container`` is its type's name."""

    container: str
    items: tuple[Node, ...]


Node = TensorNode | Opaque | Sequenced


class TensorData(msgspec.Struct, frozen=True):
    """A tensor that came back: ``start`` is where its contiguous bytes begin, ``strides`` those it had."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str
    type: str
    requires_grad: bool
    start: int


class Alias(msgspec.Struct, frozen=True):
    """An output that lies in memory which is not its own.

    Attributes:
        output: place among the output tensors.
        other: "input q", "output 1", "output 0 of the run before", "guard of k", "the shared buffer".
        shares: "memory" if at least one byte belongs to both, "storage" if only the allocation does.
    """

    output: int
    other: str
    shares: str


class Difference(msgspec.Struct, frozen=True):
    """A repeated call whose result was not bit for bit that of the first.

    Attributes:
        run: which repeat, from 1.
        what: "output 0", "gradient of q", or "structure" if types, shapes or dtypes differ.
        index: first differing element; empty for "structure" and for scalars.
        count: differing elements.
    """

    run: int
    what: str
    index: tuple[int, ...]
    count: int


class GradientData(msgspec.Struct, frozen=True):
    """The gradient of an input: its place in ``Reply.tensors``, or None where no path led to it."""

    name: str
    index: int | None


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    """From a worker: how a call ended. ``tensors`` holds the outputs in order, then the gradients."""

    number: int
    seconds: tuple[float, ...]
    trouble: Trouble | None = None
    value: Node | None = None
    tensors: tuple[TensorData, ...] = ()
    aliases: tuple[Alias, ...] = ()
    differences: tuple[Difference, ...] = ()
    gradients: tuple[GradientData, ...] | None = None
    effects: tuple[str, ...] = ()
    residue: tuple[str, ...] = ()


ToWorker = Bind | Call
FromWorker = Warm | Bound | Reply
M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()


def dtype_name(dtype: torch.dtype) -> str | None:
    """The name under which a dtype crosses the pipe, None if it may not."""
    return _DTYPE_NAMES.get(dtype)


def encode_frame(message: ToWorker | FromWorker, body_size: int = 0) -> bytes:
    """Prefix and header of a frame; the caller sends ``body_size`` raw bytes after it.

    Raises:
        ProtocolError: the header is longer than ``MAX_HEADER``.
    """
    header = _encoder.encode(message)
    if len(header) > MAX_HEADER:
        raise ProtocolError(f"a header of {len(header)} bytes exceeds the limit of {MAX_HEADER}")
    return _PREFIX.pack(_MAGIC, len(header), body_size) + header


class FrameReader(Generic[M]):
    """Takes frames off a pipe, as they arrive.

    Args:
        kind: the union of messages that may come.
        body_limit: bytes of the longest body accepted.
    """

    def __init__(self, kind: type[M], body_limit: int) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._body_limit = body_limit
        self._begin()

    def _begin(self) -> None:
        self._stage = "prefix"
        self._expect(_PREFIX.size)

    def _expect(self, size: int) -> None:
        self._buffer = bytearray(size)
        self._filled = 0

    def advance(self, descriptor: int) -> tuple[M, bytearray] | None:
        """Read what is there; return a message and its body once both are complete, None while they are not.

        Raises:
            PeerClosed: the pipe's other end was closed.
            ProtocolError: what came is no frame.
        """
        while True:
            while self._filled < len(self._buffer):
                try:
                    got = os.readv(descriptor, [memoryview(self._buffer)[self._filled :]])
                except BlockingIOError:
                    return None
                if got == 0:
                    raise PeerClosed("the pipe was closed" + (" within a frame" if self._is_within() else ""))
                self._filled += got
            done = self._next_stage()
            if done is not None:
                return done

    def _is_within(self) -> bool:
        return self._filled > 0 or self._stage != "prefix"

    def _next_stage(self) -> tuple[M, bytearray] | None:
        if self._stage == "prefix":
            magic, header_size, self._body_size = _PREFIX.unpack(self._buffer)
            if magic != _MAGIC:
                raise ProtocolError(f"expected a frame, found the bytes {bytes(self._buffer)!r}")
            if header_size > MAX_HEADER or self._body_size > self._body_limit:
                raise ProtocolError(
                    f"a frame of {header_size} + {self._body_size} bytes exceeds the limits "
                    f"of {MAX_HEADER} + {self._body_limit}"
                )
            self._stage = "header"
            self._expect(header_size)
            return None
        if self._stage == "header":
            try:
                self._message = self._decoder.decode(self._buffer)
            except msgspec.MsgspecError as error:
                raise ProtocolError(f"a header that is no known message: {error}") from error
            self._stage = "body"
            self._expect(self._body_size)
            return None
        complete = (self._message, self._buffer)
        self._begin()
        return complete


def read_frame(descriptor: int, reader: FrameReader[M]) -> tuple[M, bytearray]:
    """Wait on a blocking descriptor for one frame; raises as :meth:`FrameReader.advance` does."""
    while True:
        frame = reader.advance(descriptor)
        if frame is not None:
            return frame


def write_all(descriptor: int, chunks: Sequence[bytes | memoryview]) -> None:
    """Write every byte of the chunks to a blocking descriptor."""
    for chunk in chunks:
        rest = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def check_reply(reply: Reply, body_size: int, number: int) -> None:
    """Hold a reply's claims against its body.

    Raises:
        ProtocolError: another call's number, an unknown dtype, a shape or a place that the body cannot
            contain, or a value that refers to a tensor that was not sent.
    """
    if reply.number != number:
        raise ProtocolError(f"a reply to call {reply.number}, call {number} was made")
    for tensor in reply.tensors:
        if tensor.dtype not in DTYPES:
            raise ProtocolError(f"a tensor of unknown dtype {tensor.dtype!r}")
        if len(tensor.shape) > _MAX_RANK or any(not 0 <= length <= _MAX_LENGTH for length in tensor.shape):
            raise ProtocolError(f"a tensor of shape {tensor.shape}")
        end = tensor.start + math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        if tensor.start < 0 or tensor.start % BODY_ALIGNMENT or end > body_size:
            raise ProtocolError(f"a tensor at bytes {tensor.start} to {end} of a body of {body_size}")
    used = [gradient.index for gradient in reply.gradients or () if gradient.index is not None]
    nodes: list[Node] = [reply.value] if reply.value is not None else []
    while nodes:
        node = nodes.pop()
        if isinstance(node, Sequenced):
            nodes.extend(node.items)
        elif isinstance(node, TensorNode):
            used.append(node.index)
    if any(not 0 <= index < len(reply.tensors) for index in used):
        raise ProtocolError(f"a result names tensors {sorted(used)}, and {len(reply.tensors)} were sent")
    if reply.trouble is None and reply.value is None:
        raise ProtocolError("a reply with neither a value nor an exception")
