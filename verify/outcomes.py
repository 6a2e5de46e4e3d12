"""A call of a kernel in a worker, and every way in which it can end, as plain data.

A :class:`CallRequest` goes in; exactly one of the outcomes comes out. Whatever a kernel does, asking for an
outcome does not raise: exceptions are the judge's own mistakes (an argument that cannot be sent, a pool that
is closed).
"""

from __future__ import annotations

import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from attnproof.protocol import Alias, Difference
from attnproof.targets import KernelSource

__all__ = [
    "Alias",
    "CallRequest",
    "CapturedOutput",
    "Crashed",
    "Declined",
    "Difference",
    "Flooded",
    "Isolation",
    "Mutation",
    "NotATensor",
    "Observed",
    "OutOfMemory",
    "Outcome",
    "Output",
    "Phase",
    "Raised",
    "Returned",
    "ReturnedValue",
    "TimedOut",
    "Value",
]

Value = torch.Tensor | None | bool | int | float | str | tuple["Value", ...]
Isolation = Literal["process", "none"]
Phase = Literal["start", "import", "forward", "backward"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CallRequest:
    """One call of one kernel.

    Tensors are CPU tensors with the shape, strides, storage offset, aliasing and alignment that the kernel
    shall see: whole storages are copied into shared memory, so a view arrives as the view that it is.

    Attributes:
        kernel: what :func:`attnproof.targets.describe` gives.
        device: "cpu", "cuda", "cuda:1", "emulator" or "emulator:sm_90".
        arguments: positional arguments: tensors, plain values, None, and tuples of these.
        keywords: keyword arguments, likewise.
        names: names of the positional arguments in messages; "argument 0" and so on where missing.
        repeats: how often the same tensors are handed over; more than 1 compares the results bit for bit.
        poison_outputs: whether ``torch.empty`` and its relatives return NaN bytes during the call.
        differentiate: names of the tensor arguments whose gradients are wanted (a keyword's name, or one of
            ``names``; members of a tuple are "name[0]").
        cotangents: one for each returned tensor in order, None to leave an output out of the loss.
        timeout: seconds, in place of the pool's.
    """

    kernel: KernelSource = field(kw_only=False)
    device: str = "cpu"
    arguments: tuple[Value, ...] = ()
    keywords: Mapping[str, Value] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    repeats: int = 1
    poison_outputs: bool = False
    differentiate: tuple[str, ...] = ()
    cotangents: tuple[torch.Tensor | None, ...] = ()
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}: a call is made at least once")
        if self.differentiate and not any(cotangent is not None for cotangent in self.cotangents):
            raise ValueError(
                f"differentiate names {self.differentiate}, and no cotangent is given: pass cotangents"
            )


@dataclass(frozen=True, slots=True)
class CapturedOutput:
    """What a worker wrote to stdout and stderr since the outcome before.

    Attributes:
        tail: the last part of it as text, by default 64 KiB.
        size: bytes written in all.
    """

    tail: str = ""
    size: int = 0


@dataclass(frozen=True, slots=True)
class Mutation:
    """Shared memory that the call changed, found by the judge against its own copy.

    Attributes:
        where: "element" of a tensor; "storage" for bytes of its storage that belong to no tensor of the call;
            "guard before" or "guard after" for the poison around the storage.
        tensor: name of the tensor; where storages are shared, of each tensor concerned.
        index: first changed element's index in the tensor ("element"), else its distance in bytes: from the
            storage's start, or from the storage's edge into the guard, each counted from 0.
        count: changed elements of the tensor, else changed bytes.
        before: first changed element as it was, as text; empty unless "element".
        after: the same as it became.
    """

    where: Literal["element", "storage", "guard before", "guard after"]
    tensor: str
    index: tuple[int, ...]
    count: int
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        if self.where == "element":
            at = f"{self.tensor}[{', '.join(map(str, self.index))}]" if self.index else self.tensor
            change = f"{at} changed from {self.before} to {self.after}"
            return f"{change}; elements of {self.tensor} changed: {self.count}"
        place = {"storage": "inside the storage of", "guard before": "before", "guard after": "after"}[
            self.where
        ]
        return f"{self.count} bytes {place} {self.tensor} were overwritten, first at distance {self.index[0]}"


@dataclass(frozen=True, slots=True)
class NotATensor:
    """A returned object that is no dense tensor: its type's name and a limited text of it."""

    type: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """A returned tensor.

    Attributes:
        tensor: its values, contiguous, on the CPU, owned by the judge.
        strides: strides that it had in the worker, in elements.
        device: device that it was on.
        type: "Tensor", or the subclass that came.
        requires_grad: whether autograd was tracking it.
    """

    tensor: torch.Tensor
    strides: tuple[int, ...]
    device: str
    type: str
    requires_grad: bool


ReturnedValue = torch.Tensor | NotATensor | tuple["ReturnedValue", ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Observed:
    """What every outcome tells.

    Attributes:
        output: what the worker printed.
        mutations: inputs and guards that changed, also by a call that failed afterwards.
        elapsed: seconds on the judge's clock, a process start and an import included where there was one.
        pid: the worker's process id.
        isolation: "none" if the call ran inside the judge's own process.
        residue: what the call left behind that could not be undone (threads, children); the worker was
            replaced.
        effects: what the call changed in its process (default dtype, working directory, a patched torch
            function, an input's metadata); undone before the next call.
    """

    output: CapturedOutput
    mutations: tuple[Mutation, ...]
    elapsed: float
    pid: int
    isolation: Isolation = "process"
    residue: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Returned(Observed):
    """The kernel returned.

    Attributes:
        value: what it returned: a tensor, or nested tuples (lists arrive as tuples) of tensors.
        container: "tensor", or the type's name of what was returned: "tuple", "list", "NoneType", ...
        outputs: the tensors in ``value`` from left to right.
        aliases: outputs in memory that is not theirs.
        differences: repeats that did not give the same bits.
        gradients: by name, None where no path led to that input; None if none were asked for.
        seconds: time of each run in the worker, its backward pass included.
    """

    value: ReturnedValue
    container: str
    outputs: tuple[Output, ...]
    aliases: tuple[Alias, ...] = ()
    differences: tuple[Difference, ...] = ()
    gradients: Mapping[str, torch.Tensor | None] | None = None
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Declined(Observed):
    """The kernel raised NotImplementedError: it does not support this case."""

    message: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Raised(Observed):
    """The kernel, or its import (phase "import"), raised; SystemExit and KeyboardInterrupt included."""

    type: str
    message: str
    traceback: str
    phase: Phase

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Crashed(Observed):
    """The process died, or broke off contact and was killed.

    Attributes:
        signal: number of the signal that killed it, None if it left by itself or the judge killed it.
        exit_code: its exit status, None if a signal ended it.
        reason: one sentence; ``output.tail`` ends with the Python stack where a fault left one.
    """

    signal: int | None
    exit_code: int | None
    phase: Phase
    reason: str

    def __str__(self) -> str:
        if self.signal is None:
            return self.reason
        try:
            return f"{self.reason} ({signals.Signals(self.signal).name})"
        except ValueError:
            return f"{self.reason} (signal {self.signal})"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TimedOut(Observed):
    """No answer within ``limit`` seconds; ``output.tail`` ends with the Python stacks, if there were any."""

    limit: float
    phase: Phase


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OutOfMemory(Observed):
    """The memory limit was reached (rule "memory").

    Attributes:
        limit: bytes allowed beyond those of the idle worker.
        resident: bytes resident when the judge killed it, None if an allocation failed inside.
        message: the allocator's own words, or the judge's.
    """

    limit: int
    resident: int | None
    phase: Phase
    message: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Flooded(Observed):
    """More than ``limit`` bytes went to stdout and stderr; ``ended`` tells how the call ended nonetheless."""

    limit: int
    ended: Returned | Declined | Raised | Crashed | TimedOut | OutOfMemory


Outcome = Returned | Declined | Raised | Crashed | TimedOut | OutOfMemory | Flooded
