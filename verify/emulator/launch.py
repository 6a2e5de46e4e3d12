"""One launch: arguments bound to the kernel's IR, the grid cut into batches that fit in memory and caches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnproof.emulator import (  # noqa: F401  (importing these registers their operations)
    ops_arith,
    ops_atomic,
    ops_control,
    ops_descriptor,
    ops_dot,
    ops_foreign,
    ops_math,
    ops_memory,
    ops_reduce,
    ops_shape,
)
from attnproof.emulator.errors import EmulationError
from attnproof.emulator.lowering import Lowering
from attnproof.emulator.machine import Context, FunctionCode, Settings, run_region
from attnproof.emulator.memory import AddressSpace
from attnproof.emulator.syntax import Function, parse
from attnproof.emulator.types import Type
from attnproof.emulator.values import Descriptor, Pointer, Value

# Live values of one batch are kept to about this many bytes, so that they stay within a core's caches.
_BATCH_BYTES = 8 << 20


@lru_cache(maxsize=512)
def lower_kernel(ttir: bytes, name: str) -> FunctionCode:
    """Parse and lower a kernel's TTIR; cached, so that a repeated launch pays nothing.

    Bytes remember their hash, so that looking up the same object again costs next to nothing.

    Raises EmulationError for operations that the emulator does not execute.
    """
    functions = {function.name: function for function in parse(ttir.decode())}
    return Lowering(entry_point(functions, name), functions, {}, name).lower()


def entry_point(functions: dict[str, Function], name: str) -> Function:
    """The public function of a module."""
    if name in functions:
        return functions[name]
    public = [function for function in functions.values() if function.public]
    if len(public) != 1:
        raise EmulationError(f"the TTIR of {name} has {len(public)} public functions, one was expected")
    return public[0]


def scalar(value: Any, kind: Type) -> Tensor:
    """A Python number as a program-independent scalar of an IR type."""
    if kind.is_float:
        return torch.tensor([float(value)], dtype=torch.float64).to(kind.dtype)
    whole = int(value)
    if kind.element == "i1":
        return torch.tensor([bool(whole)])
    bits = kind.bits
    whole &= (1 << bits) - 1
    return torch.tensor([whole - (1 << bits) if whole >= 1 << (bits - 1) else whole], dtype=kind.dtype)


def launch(
    code: FunctionCode, grid: tuple[int, int, int], arguments: Sequence[Any], settings: Settings
) -> None:
    """Execute a kernel over a grid.

    `arguments` are those that survive in the IR (no constexprs), in its order: CPU tensors for pointers,
    numbers for scalars. Raises MemoryFault, RaceFault, EmulationError.
    """
    programs = grid[0] * grid[1] * grid[2]
    if programs <= 0:
        return
    memory = AddressSpace()
    values = bind(code, arguments, memory)
    batch = max(1, min(programs, min(_BATCH_BYTES, settings.memory_limit) // max(code.peak_bytes, 1)))
    # A poisoning mode of the caller must not see the executor's own tensors.
    with torch.inference_mode(), torch._C.DisableTorchFunction():
        for start in range(0, programs, batch):
            stop = min(start + batch, programs)
            context = Context(torch.arange(start, stop), grid, memory, code.name, settings)
            run_region(code.body, context, code.template.copy(), list(values))


def bind(code: FunctionCode, arguments: Sequence[Any], memory: AddressSpace) -> list[Value]:
    """The kernel's arguments as values; tensors are entered into the address space."""
    kinds = [kind for kind in code.argument_types if isinstance(kind, Type)]
    raw: list[Any] = []
    for argument in arguments:
        raw += _descriptor_fields(argument, kinds[len(raw) :])
    if len(kinds) != len(raw):
        raise EmulationError(
            f"kernel {code.name} takes {len(kinds)} run-time arguments ({', '.join(code.argument_names)}), "
            f"the launch passes {len(raw)}"
        )
    return [
        _value(code, name, kind, argument, memory)
        for name, kind, argument in zip(code.argument_names, kinds, raw, strict=True)
    ]


def _descriptor_fields(argument: Any, kinds: Sequence[Type]) -> list[Any]:
    """A host-side TensorDescriptor as the IR's arguments: whole where it has such a type, else taken apart.

    Triton passes shape and strides beside a whole descriptor (GPUs with a tensor memory accelerator);
    elsewhere base, shape, strides, padding and rounding flags, and then shape and strides again
    (triton/backends/driver.py).
    """
    if not (hasattr(argument, "base") and hasattr(argument, "block_shape")):
        return [argument]
    sizes = [*argument.shape, *argument.strides]
    if kinds and kinds[0].is_descriptor:
        return [argument, *sizes]
    # Triton 3.6 has no rounding flag.
    flags = [bool(argument.round_f32_to_tf32)] if hasattr(argument, "round_f32_to_tf32") else []
    return [argument.base, *sizes, argument.padding == "nan", *flags, *sizes]


def _value(code: FunctionCode, name: str, kind: Type, argument: Any, memory: AddressSpace) -> Value:
    if kind.is_descriptor:
        size, stride = (
            [torch.tensor([n]) for n in numbers] for numbers in (argument.shape, argument.strides)
        )
        base = _pointer(code, name, argument.base, memory)
        return Descriptor(base, tuple(size), tuple(stride), kind.pointee.shape, argument.padding == "nan")
    return _pointer(code, name, argument, memory) if kind.is_pointer else scalar(argument, kind)


def _pointer(code: FunctionCode, name: str, argument: Any, memory: AddressSpace) -> Pointer:
    if argument is None:
        return Pointer((torch.zeros(1, dtype=torch.int64),), 16)
    if isinstance(argument, int):
        return Pointer((torch.tensor([argument]),), 1)
    # triton.reinterpret wraps a tensor to give it another element type.
    tensor = argument if isinstance(argument, Tensor) else getattr(argument, "base", argument)
    if not isinstance(tensor, Tensor):
        raise EmulationError(
            f"argument {name!r} of kernel {code.name} must be a torch tensor, got {type(argument).__name__}"
        )
    if tensor.device.type != "cpu":
        raise EmulationError(
            f"argument {name!r} of kernel {code.name} is on {tensor.device}: the emulator takes CPU tensors. "
            "Move it with .cpu(), or launch outside emulate()"
        )
    return memory.add(name, tensor)
