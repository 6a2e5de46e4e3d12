"""What a peer is: how another project decides that an attention kernel is right, as a judge.

A peer is three things at once: an acceptance rule, a distribution of inputs, and a list of shapes and
options. Each module of this package re-expresses one project's forward tests of softmax attention from its
sources, with sizes reduced to what the emulator runs in a second. Nothing is made stricter or laxer: blind
spots are kept.

Where this machine differs from the GPU that the peers test on:

* A product of two half-precision matrices is accumulated in float32 and rounded once, as cuBLAS does;
  :func:`product` says so explicitly, since the CPU's own half matmul is slower and rounds otherwise.
* The emulator checks memory accesses. A GPU seldom faults on a read that strays, so a rejection whose reason
  names MemoryFault is the emulator's finding and not the peer's.
* ``torch.empty`` is not poisoned, except by the one project that poisons it itself.
* Kernels get contiguous tensors in their own layout, as these projects hand them over; FlashAttention's
  qkv-packed tests, which hand over slices of one tensor, are the exception.

A kernel may go wrong beyond some size: where a project's sizes are reduced, one case or more keeps its
largest batch × heads, lengths and widths as far as a second allows; what does not is named in each module.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from attnproof.emulator import emulate

__all__ = ["Kernel", "Peer", "PeerTest", "PeerVerdict", "Rejection", "Shape", "SuitePeer", "product"]

Kernel = Callable[..., Any]


class Rejection(AssertionError):
    """A peer's rule does not accept an output; the message gives the figures."""


class KernelDeclined(Exception):
    """The kernel raised NotImplementedError: the test is skipped."""


class KernelRaised(Exception):
    """The kernel raised anything else."""


@dataclass(frozen=True)
class PeerVerdict:
    """What a peer says of one kernel.

    Attributes:
        accepted: whether every test that applies accepts; also True where none applies (``calls`` is 0 then).
        seconds: time taken.
        reason: of a rejection, the first test that fails and why; else how many tests ran, and how many could
            not.
        calls: calls of the kernel that came back.
    """

    accepted: bool
    seconds: float
    reason: str
    calls: int


class Peer(Protocol):
    """One project's way to accept a kernel."""

    @property
    def name(self) -> str:
        """Short name, unique among peers."""

    @property
    def source(self) -> str:
        """Repository, file and commit, or package and version, that the rule was read from."""

    def judge(self, kernel: Kernel, options: frozenset[str], dtypes: tuple[str, ...]) -> PeerVerdict:
        """Run the peer's tests that need no more than ``options`` and ``dtypes``, until one fails.

        Args:
            kernel: ``f(q, k, v, *, scale, …)`` as the contract's softmax family has it, layout bhnd.
            options: keywords that it takes beyond ``scale``.
            dtypes: names of dtypes that it takes.
        """


@dataclass(frozen=True)
class Shape:
    """Sizes of a call: q (batch, heads, queries, width), k (batch, groups, keys, width), v likewise.

    ``groups`` 0 means as many as heads, ``value_width`` 0 the same as ``width``.
    """

    queries: int
    keys: int
    width: int
    heads: int = 2
    groups: int = 0
    batch: int = 2
    value_width: int = 0

    def draw(
        self, generate: Callable[..., torch.Tensor], dtype: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of ``generate(shape, dtype=…)``, such as torch.randn, from torch's global generator."""
        kind = getattr(torch, dtype)
        groups, value_width = self.groups or self.heads, self.value_width or self.width
        q = generate((self.batch, self.heads, self.queries, self.width), dtype=kind)
        k = generate((self.batch, groups, self.keys, self.width), dtype=kind)
        v = generate((self.batch, groups, self.keys, value_width), dtype=kind)
        return q, k, v

    def __str__(self) -> str:
        return (
            f"B{self.batch},H{self.heads},G{self.groups or self.heads},M{self.queries},N{self.keys},"
            f"D{self.width},E{self.value_width or self.width}"
        )


@dataclass(frozen=True)
class PeerTest:
    """One test of a peer's suite.

    Attributes:
        label: its parameters, for the reason of a rejection.
        dtype: dtype of the inputs.
        options: keywords that the kernel must take for this test to apply.
        body: calls the kernel and raises where the rule does not accept.
    """

    label: str
    dtype: str
    options: frozenset[str]
    body: Callable[[Kernel], None]


@dataclass(frozen=True)
class SuitePeer:
    """A peer that is a list of tests, each of which must accept: see :class:`Peer`.

    ``poisoned`` says whether the project fills fresh ``torch.empty`` tensors with NaN while it tests.
    """

    name: str
    source: str
    tests: tuple[PeerTest, ...]
    poisoned: bool = False

    def judge(self, kernel: Kernel, options: frozenset[str], dtypes: tuple[str, ...]) -> PeerVerdict:
        """See :meth:`Peer.judge`."""
        started = time.perf_counter()
        counted = CountedKernel(kernel)
        ran = declined = missing = 0
        with emulate("sm_90", poison=self.poisoned):
            for test in self.tests:
                if not test.options <= options or test.dtype not in dtypes:
                    missing += 1
                    continue
                try:
                    test.body(counted)
                    ran += 1
                except KernelDeclined:
                    declined += 1
                except Exception as error:
                    reason = f"{test.dtype} {test.label}: {_told(error)}"
                    return PeerVerdict(False, time.perf_counter() - started, reason, counted.calls)
        reason = f"{ran} tests ran, {declined} declined by the kernel, {missing} not applicable"
        return PeerVerdict(True, time.perf_counter() - started, reason, counted.calls)


class CountedKernel:
    """A kernel whose calls are counted and whose exceptions are told apart from those of a test."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.calls = 0

    def __call__(self, *tensors: torch.Tensor, **options: Any) -> Any:
        try:
            result = self.kernel(*tensors, **options)
        except NotImplementedError as error:
            raise KernelDeclined(str(error)) from error
        except Exception as error:
            raise KernelRaised(f"the kernel raised {type(error).__name__}: {error}") from error
        self.calls += 1
        return result


def product(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``einsum(equation, a, b)`` accumulated in float32 and rounded once to the dtype of the operands."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.einsum(equation, a.float(), b.float()).to(a.dtype)
    return torch.einsum(equation, a, b)


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KernelRaised):
        return text[:300]
    return f"{text[:300]}" if isinstance(error, AssertionError) else f"{type(error).__name__}: {text[:300]}"
