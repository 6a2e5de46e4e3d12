"""A GPU made of software: Triton kernels on CPU tensors, with their IR's arithmetic and checked memory."""

from attnproof.emulator.compilation import CompiledKernel, compile_launches
from attnproof.emulator.driver import EmulatorDriver, emulate
from attnproof.emulator.errors import EmulationError, MemoryFault, RaceFault
from attnproof.emulator.targets import TARGETS, Target

__all__ = [
    "TARGETS",
    "CompiledKernel",
    "EmulationError",
    "EmulatorDriver",
    "MemoryFault",
    "RaceFault",
    "Target",
    "compile_launches",
    "emulate",
]
