"""What surrounds a launch: fresh tensors full of NaN, a torch.cuda that answers as the emulated GPU would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnproof.emulator.targets import Target

# Large, odd, and recognisable in a hexadecimal dump; cut to the width of the dtype.
_SENTINEL = 0x5AD5AD5AD5AD5AD5


def poison(tensor: Tensor) -> Tensor:
    """Fill a fresh CPU tensor with NaN, integers with a large odd number, and return it."""
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return tensor
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
        # No fill kernels for float8: all formats have a NaN at 0x7F (e4m3fn, e5m2) or 0x80 (fnuz).
        tensor.view(torch.uint8).fill_(0x80 if "fnuz" in str(tensor.dtype) else 0x7F)
    elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype != torch.bool and not tensor.dtype.is_signed:
        tensor.fill_(_SENTINEL & ((1 << 8 * tensor.dtype.itemsize) - 1))
    elif tensor.dtype != torch.bool:
        tensor.fill_(_SENTINEL & ((1 << (8 * tensor.dtype.itemsize - 1)) - 1))
    else:
        tensor.fill_(True)
    return tensor


_FRESH: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.empty_permuted,
        Tensor.new_empty,
        Tensor.new_empty_strided,
    }
)


class _PoisonEmpties(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FRESH and isinstance(result, Tensor):
            with torch.no_grad():
                poison(result)
        return result


@contextmanager
def poisoned_empties() -> Iterator[None]:
    """Inside, tensors made by torch.empty and its relatives on the CPU are poisoned."""
    with _PoisonEmpties():
        yield


def device_properties(target: Target) -> SimpleNamespace:
    """What torch.cuda.get_device_properties gives for the target."""
    figures = target.properties
    major, minor = target.capability
    return SimpleNamespace(
        name=f"attnproof emulator ({target.board}, {target.name})",
        major=major,
        minor=minor,
        multi_processor_count=figures["multiprocessor_count"],
        total_memory=80 << 30,
        warp_size=target.warp_size,
        shared_memory_per_block_optin=figures["max_shared_mem"],
        shared_memory_per_block=49152,
        shared_memory_per_multiprocessor=figures["max_shared_mem"] + 1024,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        gcnArchName=str(target.arch) if target.backend == "hip" else "",
    )


@contextmanager
def pretended_device(target: Target) -> Iterator[None]:
    """Answer the questions that kernels' Python wrappers ask of torch.cuda.

    `torch.cuda.is_available()` is left alone: it is asked to choose a device for tensors, and these stay on
    the CPU.
    """
    properties = device_properties(target)
    answers: dict[str, Any] = {
        "device": lambda *_: nullcontext(),
        "device_of": lambda *_: nullcontext(),
        "current_device": lambda: target.device,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: target.capability,
        "get_device_name": lambda *_: properties.name,
        "synchronize": lambda *_: None,
        "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield
