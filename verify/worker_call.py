"""One call of a kernel, from described tensors to described results, in whatever process it is asked for.

A worker process runs this, and so does the judge's own with ``isolation="none"``. Nothing a kernel raises or
returns becomes an exception here: results that are no tensors are described, exceptions are turned into text.
"""

from __future__ import annotations

import contextlib
import mmap
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from attnproof.arena import POISON, tensor_over, tensors_of
from attnproof.memory_overlap import Extent, shared_kind
from attnproof.process_state import ProcessState
from attnproof.protocol import (
    BODY_ALIGNMENT,
    Alias,
    Argument,
    Call,
    Difference,
    GradientData,
    Group,
    Node,
    Opaque,
    Plain,
    Reply,
    Segment,
    Sequenced,
    TensorData,
    TensorNode,
    TensorRef,
    Trouble,
    dtype_name,
    raw_bytes,
)

__all__ = ["device_context", "perform", "trouble_of"]

_TEXT_LIMIT: Final = 2000
_TRACEBACK_LIMIT: Final = 16000
_MAX_TENSORS: Final = 64
_MAX_DEPTH: Final = 4
_ALLOCATION_FAILURES: Final = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
)
_EMPTY: Final = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.empty_permuted,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }
)

Buffer = mmap.mmap | memoryview | npt.NDArray[np.uint8]
_clock = time.perf_counter


class _PoisonFresh(TorchFunctionMode):
    """``torch.empty`` and its relatives give memory full of poison: NaN wherever a kernel forgot to write."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY and isinstance(result, torch.Tensor) and result.untyped_storage().nbytes():
            storage = result.untyped_storage()
            raw = torch.tensor([], dtype=torch.uint8, device=result.device)
            raw.set_(storage, 0, (storage.nbytes(),), (1,))
            raw.fill_(POISON)
        return result


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What one run gave: the tree of its value, its tensors (outputs, then gradients), their bytes."""

    tree: Node
    outputs: tuple[torch.Tensor, ...]
    data: tuple[TensorData, ...]
    labels: tuple[str, ...]
    chunks: tuple[bytes, ...]
    gradients: tuple[GradientData, ...] | None
    seconds: float


def device_context(device: str) -> AbstractContextManager[object]:
    """What a kernel for this device must be imported and called in: the emulator's driver, or nothing."""
    if not device.startswith("emulator"):
        return nullcontext()
    from attnproof.emulator import emulate  # the CPU path must not pay for triton

    _, _, target = device.partition(":")
    return emulate(target) if target else emulate()


class _Inputs:
    """The call's tensors over the shared buffer, built anew for each run: changed metadata does not last."""

    def __init__(self, call: Call, buffer: Buffer, device: str) -> None:
        self._call, self._buffer = call, buffer
        self._on_cuda = device if device.startswith("cuda") else None
        self._cuda: torch.Tensor | None = None
        self.built: dict[str, tuple[torch.Tensor, TensorRef]] = {}

    def load(self) -> None:
        """Copy the whole buffer to the GPU, guards included; nothing to do elsewhere."""
        if self._on_cuda:
            self._cuda = self._host().to(self._on_cuda)

    def store(self) -> None:
        """Bring back what the kernel did to it, for the judge to see."""
        if self._cuda is not None:
            self._host().copy_(self._cuda)

    def _host(self) -> torch.Tensor:
        whole: torch.Tensor = torch.frombuffer(self._buffer, dtype=torch.uint8)
        return whole

    def arguments(self) -> tuple[list[Any], dict[str, Any], list[Any]]:
        """Positional arguments, keyword arguments and cotangents as Python values."""
        self.built = {}
        positional = [self._build(argument) for argument in self._call.arguments]
        keywords = {name: self._build(argument) for name, argument in self._call.keywords.items()}
        wanted = set(self._call.differentiate)
        for name, (tensor, _) in self.built.items():
            if name in wanted:
                tensor.requires_grad_(True)
        return positional, keywords, [self._build(argument) for argument in self._call.cotangents]

    def _build(self, argument: Argument) -> Any:
        if isinstance(argument, Plain):
            return argument.value
        if isinstance(argument, Group):
            return tuple(self._build(item) for item in argument.items)
        tensor = self._tensor(argument, self._call.segments[argument.segment])
        self.built[argument.name] = (tensor, argument)
        return tensor

    def _tensor(self, ref: TensorRef, segment: Segment) -> torch.Tensor:
        if self._cuda is None or segment.size == 0:
            tensor = tensor_over(self._buffer, ref, segment)
            return tensor if self._cuda is None else tensor.to(self._cuda.device)
        tensor = torch.empty(0, dtype=getattr(torch, ref.dtype), device=self._cuda.device)
        first, rest = divmod(segment.start, tensor.element_size())
        if rest:
            raise ValueError(f"{ref.name} begins within an element of {ref.dtype}, which CUDA cannot address")
        tensor.set_(self._cuda.untyped_storage(), first + ref.offset, ref.shape, ref.strides)
        return tensor

    def reshaped(self) -> list[str]:
        """Inputs whose own shape, strides or memory the last run changed."""
        found: list[str] = []
        for name, (tensor, ref) in self.built.items():
            if tuple(tensor.shape) != ref.shape or (tensor.numel() and tensor.stride() != ref.strides):
                found.append(f"{name} was changed in place from shape {ref.shape} to {tuple(tensor.shape)}")
        return found

    def extents(self) -> list[tuple[str, Extent]]:
        """Where each tensor of the call lies, then the shared buffer as a whole."""
        whole = self._cuda if self._cuda is not None else self._host()
        found = [
            (
                f"input {ref.name}",
                Extent.of_reference(ref, whole.data_ptr() + self._call.segments[ref.segment].start),
            )
            for ref in tensors_of(
                (*self._call.arguments, *self._call.keywords.values(), *self._call.cotangents)
            )
        ]
        return [*found, ("the shared buffer", Extent.of_tensor(whole))]


def perform(
    function: Callable[..., Any],
    call: Call,
    buffer: Buffer,
    device: str,
    result_limit: int,
    state: ProcessState,
    limits: Callable[[], AbstractContextManager[object]] = nullcontext,
    propagate: tuple[type[BaseException], ...] = (),
) -> tuple[Reply, list[bytes]]:
    """Call a kernel as a request says and describe what happened.

    Args:
        function: the kernel.
        call: the request.
        buffer: the shared buffer, at least up to the last guard.
        device: device of the request.
        result_limit: bytes of results that may be sent back.
        state: process state, settled after the call.
        limits: context in which the kernel itself runs (the memory limit).
        propagate: exceptions that are not the kernel's (Ctrl-C in the judge's own process).

    Returns:
        The reply, and the chunks of its body.
    """
    inputs = _Inputs(call, buffer, device)
    runs: list[_Run] = []
    differences: list[Difference] = []
    aliases: tuple[Alias, ...] = ()
    trouble: Trouble | None = None
    phase = ["forward"]
    effects: list[str] = []

    def unpatch() -> None:
        effects.extend(state.unpatch())

    _seed()
    try:
        inputs.load()
        with limits(), device_context(device):
            for number in range(call.repeats):
                run = _run_once(function, call, inputs, result_limit, phase, unpatch)
                if not runs:
                    aliases = _aliases(run, inputs, None)
                elif number:
                    differences.extend(_compare(runs[0], run, number))
                    aliases += _aliases(run, None, runs[0]) if number == 1 else ()
                runs.append(run if not runs else replace(run, outputs=(), chunks=()))
                effects.extend(text for text in inputs.reshaped() if text not in effects)
    except propagate:
        raise
    except BaseException as error:
        trouble = trouble_of(error, phase[0])
    with contextlib.suppress(
        RuntimeError
    ):  # if the kernel broke the CUDA context, the outcome tells it already
        inputs.store()
    changed, residue = state.settle()
    seconds = tuple(run.seconds for run in runs)
    if trouble is not None:
        return Reply(call.number, seconds, trouble, effects=(*effects, *changed), residue=residue), []
    first = runs[0]
    reply = Reply(
        call.number,
        seconds,
        value=first.tree,
        tensors=first.data,
        aliases=aliases,
        differences=tuple(differences),
        gradients=first.gradients,
        effects=(*effects, *changed),
        residue=residue,
    )
    return reply, list(first.chunks)


def _seed() -> None:
    """The same random numbers in each call, whatever ran before; repeats within a call draw on."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed looks at every backend: 50 times slower
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)
    random.seed(0)
    np.random.seed(0)


def _run_once(
    function: Callable[..., Any],
    call: Call,
    inputs: _Inputs,
    result_limit: int,
    phase: list[str],
    unpatch: Callable[[], None],
) -> _Run:
    phase[0] = "forward"
    positional, keywords, cotangents = inputs.arguments()
    with _PoisonFresh() if call.poison else nullcontext():
        begin = _clock()
        value = function(*positional, **keywords)
        unpatch()
        outputs: list[torch.Tensor] = []
        tree = _describe(value, outputs, result_limit)
        gradients: tuple[torch.Tensor | None, ...] | None = None
        if call.differentiate:
            phase[0] = "backward"
            sources = [inputs.built[name][0] for name in call.differentiate]
            gradients = _backward(outputs, cotangents, sources)
        if any(output.is_cuda for output in outputs):
            torch.cuda.synchronize()
        seconds = _clock() - begin
    tensors = [*outputs]
    named: list[GradientData] = []
    for name, gradient in zip(call.differentiate, gradients or (), strict=False):
        named.append(GradientData(name, len(tensors) if gradient is not None else None))
        if gradient is not None:
            tensors.append(gradient)
    labels = [f"output {i}" for i in range(len(outputs))]
    labels += [f"gradient of {entry.name}" for entry in named if entry.index is not None]
    data, chunks = _serialise(tensors)
    wanted = tuple(named) if call.differentiate else None
    return _Run(tree, tuple(outputs), data, tuple(labels), chunks, wanted, seconds)


def _backward(
    outputs: Sequence[torch.Tensor], cotangents: Sequence[Any], sources: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of Σ outputs · cotangents, over outputs that autograd tracks and that have a cotangent."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=False)
        if output.requires_grad and cotangent is not None
    ]
    if not pairs:
        return (None,) * len(sources)
    tracked, weights = zip(*pairs, strict=True)
    loss = _Loss.apply(weights, *tracked)  # type: ignore[no-untyped-call]
    # torch.autograd.grad would take the modes that poison fresh memory off the stack while it runs.
    found: tuple[torch.Tensor | None, ...] = _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, tuple(sources), allow_unreachable=True
    )
    return found


class _Loss(torch.autograd.Function):
    """Σ outputs · cotangents, of which only the gradient is wanted: the cotangents as they lie in memory.

    Given to ``torch.autograd.grad`` directly they would be checked by symbolic shapes, and the first call of
    a process would import sympy for two seconds.
    """

    @staticmethod
    def forward(ctx: Any, weights: tuple[torch.Tensor, ...], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.weights = weights
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *ctx.weights)


def _describe(value: Any, tensors: list[torch.Tensor], limit: int, depth: int = 0) -> Node:
    """The shape of a returned value; its dense tensors are appended to ``tensors``."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        if not _is_dense(value):
            return Opaque(
                kind, _text(value, lambda t: f"{t.layout} {t.dtype} on {t.device}, shape {tuple(t.shape)}")
            )
        size = sum(t.numel() * t.element_size() for t in (*tensors, value))
        if size > limit or len(tensors) >= _MAX_TENSORS:
            why = f"{len(tensors) + 1} tensors of {size} bytes, limits {_MAX_TENSORS} and {limit}"
            return Opaque(kind, f"{value.dtype}, shape {tuple(value.shape)}: {why}")
        tensors.append(value)
        return TensorNode(len(tensors) - 1)
    if isinstance(value, (tuple, list)) and depth < _MAX_DEPTH and len(value) <= _MAX_TENSORS:
        return Sequenced(kind, tuple(_describe(item, tensors, limit, depth + 1) for item in value))
    return Opaque(kind, _text(value, repr))


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has bytes of its own to send; wrappers and sparse tensors have not."""
    try:
        tensor.data_ptr()
        plain = tensor.layout is torch.strided and tensor.device.type != "meta" and not tensor.is_quantized
    except (RuntimeError, NotImplementedError):
        return False
    return plain and dtype_name(tensor.dtype) is not None


def _serialise(tensors: Sequence[torch.Tensor]) -> tuple[tuple[TensorData, ...], tuple[bytes, ...]]:
    data: list[TensorData] = []
    chunks: list[bytes] = []
    end = 0
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        for tensor in tensors:
            content = raw_bytes(tensor.detach().resolve_conj().resolve_neg().to("cpu"))
            name = dtype_name(tensor.dtype) or ""
            shape, device, kind = tuple(tensor.shape), str(tensor.device), type(tensor).__name__
            data.append(TensorData(name, shape, tensor.stride(), device, kind, tensor.requires_grad, end))
            padding = -len(content) % BODY_ALIGNMENT
            chunks.append(content + bytes(padding) if padding else content)
            end += len(content) + padding
    return tuple(data), tuple(chunks)


def _aliases(run: _Run, inputs: _Inputs | None, earlier: _Run | None) -> tuple[Alias, ...]:
    """Outputs of a run in memory of its inputs, of each other, or of the results of the run before."""
    mine = [Extent.of_tensor(output) for output in run.outputs]
    found: list[Alias] = []
    for i, extent in enumerate(mine):
        others = [(f"output {j}", other) for j, other in enumerate(mine[:i])] if inputs is not None else []
        if earlier is not None:
            others += [
                (f"output {j} of the run before", Extent.of_tensor(t)) for j, t in enumerate(earlier.outputs)
            ]
        shared = inputs.extents() if inputs is not None and extent.size else []
        hits = [
            (name, kind) for name, other in (*others, *shared[:-1]) if (kind := shared_kind(extent, other))
        ]
        if not hits and shared and shared_kind(extent, shared[-1][1]):
            hits = [(shared[-1][0], "memory")]
        found.extend(Alias(i, name, kind) for name, kind in hits)
    return tuple(found)


def _compare(first: _Run, again: _Run, number: int) -> Iterator[Difference]:
    same = first.tree == again.tree and first.labels == again.labels
    if not same or [(t.dtype, t.shape) for t in first.data] != [(t.dtype, t.shape) for t in again.data]:
        yield Difference(number, "structure", (), 0)
        return
    for label, data, a, b in zip(first.labels, first.data, first.chunks, again.chunks, strict=True):
        if a == b:
            continue
        size = getattr(torch, data.dtype).itemsize
        differs = np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)
        elements = differs[: differs.size // size * size].reshape(-1, size).any(axis=1)
        where = np.unravel_index(int(elements.argmax()), data.shape) if data.shape else ()
        yield Difference(number, label, tuple(int(i) for i in where), int(elements.sum()))


def trouble_of(error: BaseException, phase: str) -> Trouble:
    """An exception as limited text; asking it for that text cannot raise."""
    message = _text(error, str)
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in message for words in _ALLOCATION_FAILURES)
    )
    kind = "memory" if memory else "declined" if isinstance(error, NotImplementedError) else "raised"
    text = _text(error, lambda e: "".join(traceback.format_exception(e)), _TRACEBACK_LIMIT)
    return Trouble(kind, phase, type(error).__qualname__[:_TEXT_LIMIT], message, text)


def _text(value: Any, write: Callable[[Any], str], limit: int = _TEXT_LIMIT) -> str:
    try:
        text = write(value)
    except BaseException as error:
        return f"({type(value).__name__} whose text cannot be had: {type(error).__name__})"
    half = limit // 2
    text = text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot cross the pipe
    return text if len(text) <= limit else f"{text[:half]} … {text[-half:]}"
