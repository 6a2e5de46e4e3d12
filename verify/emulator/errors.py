"""The two ways in which an emulated launch fails by itself, apart from what Triton's front end raises."""


class EmulationError(RuntimeError):
    """An operation that the emulator does not execute.

    The message names the operation, the kernel and the source line, and says what to do instead.
    """


class MemoryFault(RuntimeError):
    """A load, store or atomic operation reached memory that no tensor of the launch owns.

    The message names the kernel, the source line, the operation, the program, the nearest tensor argument
    and by how many elements the address misses it. A misaligned address is a fault too.
    """


class RaceFault(RuntimeError):
    """Two programs of one launch stored different values to one address (`emulate(races="raise")`)."""
