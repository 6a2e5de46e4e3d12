"""Runs lowered TTIR: a register list, a list of steps, and the set of programs that execute them together.

Divergence is handled by splitting the programs: where a branch or a trip count differs between them, each
group runs by itself on its own, smaller program axis, and the results are put together again. No operation
ever sees a program that would not have executed it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnproof.emulator.errors import EmulationError, MemoryFault, RaceFault
from attnproof.emulator.values import Value, join_programs, take_programs

if TYPE_CHECKING:
    from attnproof.emulator.memory import AddressSpace
    from attnproof.emulator.syntax import Op

Registers = list[Value]


@dataclass(frozen=True)
class Settings:
    """How a launch is executed, beyond what its IR says (see `emulate`)."""

    target: str = "sm_90"
    undefined_is_nan: bool = False
    memory_limit: int = 512 << 20
    races: str = "ignore"


class Context:
    """The programs that execute together: their linear numbers in the grid, and the launch they belong to."""

    __slots__ = ("_ids", "grid", "kernel", "memory", "programs", "settings")

    def __init__(
        self,
        programs: Tensor,
        grid: tuple[int, int, int],
        memory: AddressSpace,
        kernel: str,
        settings: Settings,
    ) -> None:
        self.programs = programs
        self.grid = grid
        self.memory = memory
        self.kernel = kernel
        self.settings = settings
        self._ids: dict[int, Tensor] = {}

    @property
    def count(self) -> int:
        """Number of programs."""
        return self.programs.shape[0]

    def program_id(self, axis: int) -> Tensor:
        """Program ids along one grid axis, int32 `[P]`, or `[1]` where the axis has one program."""
        if axis not in self._ids:
            x, y, _ = self.grid
            if self.grid[axis] == 1:
                ids = torch.zeros(1, dtype=torch.int32)
            else:
                linear = self.programs
                ids = (linear % x, linear // x % y, linear // (x * y))[axis].to(torch.int32)
            self._ids[axis] = ids
        return self._ids[axis]

    def coordinates(self, position: int) -> tuple[int, int, int]:
        """Grid coordinates of the program at a position of the program axis."""
        x, y, _ = self.grid
        linear = int(self.programs[min(position, self.count - 1)])
        return linear % x, linear // x % y, linear // (x * y)

    def subset(self, index: Tensor) -> Context:
        """The same launch, seen by the programs at `index`."""
        return Context(
            self.programs.index_select(0, index), self.grid, self.memory, self.kernel, self.settings
        )

    def first(self, count: int) -> Context:
        """The same launch, seen by the first `count` programs."""
        return Context(self.programs[:count], self.grid, self.memory, self.kernel, self.settings)


Step = Callable[[Context, Registers], None]


@dataclass(eq=False)
class BlockCode:
    """A lowered block: where its arguments go, its steps with the operations they came from, how it ends."""

    arguments: list[int]
    steps: list[Step] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    terminator: str = ""
    returns: list[int] = field(default_factory=list)
    successors: list[tuple[str, list[int]]] = field(default_factory=list)


@dataclass(eq=False)
class RegionCode:
    """Lowered blocks by label (entry first), and the outer registers that they read."""

    blocks: dict[str, BlockCode]
    captures: list[int]

    @property
    def entry(self) -> BlockCode:
        """The first block."""
        return next(iter(self.blocks.values()))


@dataclass(eq=False)
class FunctionCode:
    """A lowered function; `template` holds the constants, copied for each call."""

    name: str
    argument_types: list[object]
    argument_names: list[str]
    body: RegionCode
    template: Registers
    peak_bytes: int = 0


def run_block(block: BlockCode, context: Context, registers: Registers) -> list[Value]:
    """Execute the steps of a block and return the values that its terminator names."""
    done = 0
    try:
        for step in block.steps:
            step(context, registers)
            done += 1
    except (EmulationError, MemoryFault, RaceFault, AssertionError):
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        op = block.ops[done]
        raise EmulationError(
            f"{op.name} failed in kernel {context.kernel} at {op.location}: {type(error).__name__}: {error}\n"
            f"    {op.text}\n"
            "This is a defect of the emulator, or a form of the operation that it does not know."
        ) from error
    return [registers[slot] for slot in block.returns]


def run_region(
    region: RegionCode, context: Context, registers: Registers, arguments: list[Value]
) -> list[Value]:
    """Execute a region: straight through for one block, following branches for several.

    Programs that branch apart run to the region's end separately; they do not meet again before it.
    """
    block = region.entry
    for slot, value in zip(block.arguments, arguments, strict=True):
        registers[slot] = value
    if len(region.blocks) == 1:
        return run_block(block, context, registers)
    return _follow(region, block, context, registers)


def _follow(region: RegionCode, block: BlockCode, context: Context, registers: Registers) -> list[Value]:
    while True:
        values = run_block(block, context, registers)
        if block.terminator == "cf.br":
            block = _enter(region, block.successors[0], registers)
        elif block.terminator == "cf.cond_br":
            condition = values[0]
            assert isinstance(condition, Tensor)
            if bool(condition.all()):
                block = _enter(region, block.successors[0], registers)
            elif not bool(condition.any()):
                block = _enter(region, block.successors[1], registers)
            else:
                break
        else:
            return values

    def side(taken: int) -> Callable[[Context, Registers], list[Value]]:
        def run(inner: Context, own: Registers) -> list[Value]:
            return _follow(region, _enter(region, block.successors[taken], own), inner, own)

        return run

    live = [i for i, value in enumerate(registers) if value is not None]
    return run_split(condition, context, registers, live, side(0), side(1))


def _enter(region: RegionCode, successor: tuple[str, list[int]], registers: Registers) -> BlockCode:
    label, slots = successor
    block = region.blocks[label]
    for slot, value in zip(block.arguments, [registers[s] for s in slots], strict=True):
        registers[slot] = value
    return block


def run_split(
    condition: Tensor,
    context: Context,
    registers: Registers,
    captures: list[int],
    then: Callable[[Context, Registers], list[Value]],
    otherwise: Callable[[Context, Registers], list[Value]],
) -> list[Value]:
    """Run one side for the programs where `condition` (`[P]`, mixed) holds, the other for the rest."""
    groups = [condition.nonzero().flatten(), (~condition).nonzero().flatten()]
    results = []
    for index, side in zip(groups, (then, otherwise), strict=True):
        own = restrict(registers, captures, index)
        results.append(side(context.subset(index), own))
    order = torch.argsort(torch.cat(groups))
    counts = [index.shape[0] for index in groups]
    return [join_programs([a, b], counts, order) for a, b in zip(*results, strict=True)]


def restrict(registers: Registers, captures: list[int], index: Tensor) -> Registers:
    """A copy of the registers in which the captured values are those of the programs at `index`."""
    own = registers.copy()
    for slot in captures:
        own[slot] = take_programs(registers[slot], index)
    return own
