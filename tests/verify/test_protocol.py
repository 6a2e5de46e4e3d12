"""Frames: what arrives whole, what is refused, and what a reply may not claim."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import msgspec
import pytest

from attnproof.protocol import (
    MAX_HEADER,
    FrameReader,
    FromWorker,
    GradientData,
    Opaque,
    PeerClosed,
    ProtocolError,
    Reply,
    Sequenced,
    TensorData,
    TensorNode,
    Warm,
    check_reply,
    encode_frame,
)

LIMIT = 1 << 16


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue  # a test closed it


def reader() -> FrameReader[FromWorker]:
    return FrameReader(FromWorker, LIMIT)  # type: ignore[arg-type]


def tensor(shape: tuple[int, ...] = (2, 3), start: int = 0, dtype: str = "float32") -> TensorData:
    return TensorData(dtype, shape, tuple(0 for _ in shape), "cpu", "Tensor", False, start)


def test_frames_arrive_byte_by_byte(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    message = Reply(
        3, (0.5,), value=Sequenced("tuple", (TensorNode(0), Opaque("dict", "{}"))), tensors=(tensor(),)
    )
    data = encode_frame(message, 24) + bytes(range(24)) + encode_frame(Warm(7))
    receiving = reader()
    received = []
    for byte in data:
        os.write(sink, bytes([byte]))
        frame = receiving.advance(source)
        if frame is not None:
            received.append(frame)
    assert received == [(message, bytearray(range(24))), (Warm(7), bytearray())]
    assert receiving.advance(source) is None
    os.close(sink)
    with pytest.raises(PeerClosed, match=r"closed$"):
        receiving.advance(source)


def test_a_frame_that_breaks_off(pipe: tuple[int, int]) -> None:
    source, sink = pipe
    os.write(sink, encode_frame(Warm(7), 5) + b"123")
    os.close(sink)
    with pytest.raises(PeerClosed, match="within a frame"):
        reader().advance(source)


def prefixed(
    header: bytes, magic: bytes = b"APf1", header_size: int | None = None, body_size: int = 0
) -> bytes:
    return (
        struct.pack("<4sIQ", magic, len(header) if header_size is None else header_size, body_size) + header
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello, I am a kernel", "expected a frame"),
        (prefixed(b"", magic=b"APf2"), "expected a frame"),
        (prefixed(b"", header_size=MAX_HEADER + 1), "exceeds the limits"),
        (prefixed(b"", body_size=LIMIT + 1), "exceeds the limits"),
        (prefixed(b"", body_size=2**63), "exceeds the limits"),
        (prefixed(b"\xc1\xc1\xc1"), "no known message"),
        (prefixed(msgspec.msgpack.encode({"type": "bind"})), "no known message"),
        (prefixed(msgspec.msgpack.encode({"type": "warm", "pid": "seven"})), "no known message"),
    ],
)
def test_what_is_no_frame_is_refused(pipe: tuple[int, int], data: bytes, words: str) -> None:
    source, sink = pipe
    os.write(sink, data)
    with pytest.raises(ProtocolError, match=words):
        reader().advance(source)


def test_a_header_that_would_be_refused_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        encode_frame(Reply(1, (), effects=("x" * (MAX_HEADER + 1),)))


def test_a_true_reply_is_accepted() -> None:
    check_reply(Reply(1, (), value=TensorNode(0), tensors=(tensor(), tensor((0, 9), start=64))), 64, 1)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(2, (), value=TensorNode(0), tensors=(tensor(),)), "call 2"),
        (Reply(1, (), value=TensorNode(0), tensors=(tensor((2, 9)),)), "of a body of 64"),
        (Reply(1, (), value=TensorNode(0), tensors=(tensor(start=48),)), "of a body of 64"),
        (Reply(1, (), value=TensorNode(0), tensors=(tensor(start=-64),)), "of a body of 64"),
        (Reply(1, (), value=TensorNode(0), tensors=(tensor(start=4),)), "of a body of 64"),
        (Reply(1, (), value=TensorNode(0), tensors=(tensor((-2, -3)),)), "shape"),
        (Reply(1, (), value=TensorNode(0), tensors=(tensor((0, 1 << 62)),)), "shape"),
        (Reply(1, (), value=TensorNode(0), tensors=(tensor(dtype="object"),)), "unknown dtype"),
        (Reply(1, (), value=TensorNode(1), tensors=(tensor(),)), "1 were sent"),
        (Reply(1, (), value=Sequenced("tuple", (TensorNode(-1),)), tensors=(tensor(),)), "1 were sent"),
        (Reply(1, (), value=Opaque("x", ""), gradients=(GradientData("q", 0),)), "0 were sent"),
        (Reply(1, ()), "neither a value nor an exception"),
    ],
)
def test_a_reply_that_contradicts_itself_is_refused(reply: Reply, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        check_reply(reply, 64, 1)
