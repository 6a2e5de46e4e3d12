"""Turns parsed TTIR into steps: slots instead of names, constants folded, dead values released.

Each operation has a *preparer*, registered by name in one of the `ops_*` modules. It looks at types and
attributes once and returns the function that is called at run time with the operands' values. An operation
with regions has a *control* preparer, whose step reads and writes the registers itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnproof.emulator.errors import EmulationError
from attnproof.emulator.machine import BlockCode, Context, FunctionCode, RegionCode, Registers, Step
from attnproof.emulator.syntax import Block, Function, Op, Region
from attnproof.emulator.types import Type
from attnproof.emulator.values import Value

Run = Callable[..., Any]
ControlRun = Callable[[Context, Registers, list[Value]], list[Value]]
Preparer = Callable[[Op, "Lowering"], Run]
Control = Callable[[Op, "Lowering"], ControlRun]

PREPARERS: dict[str, Preparer] = {}
CONTROLS: dict[str, Control] = {}
# Operations whose result depends on their operands alone: folded when these are constants.
FOLDABLE: set[str] = set()

TERMINATORS = frozenset(
    {
        "tt.return", "tt.reduce.return", "tt.scan.return", "tt.map_elementwise.return",
        "scf.yield", "scf.condition", "cf.br", "cf.cond_br",
    }
)  # fmt: skip


def prepares(*names: str, pure: bool = True) -> Callable[[Preparer], Preparer]:
    """Register a preparer for operations without regions; `pure` ones do not read memory or the context."""

    def register(preparer: Preparer) -> Preparer:
        for name in names:
            PREPARERS[name] = preparer
            if pure:
                FOLDABLE.add(name)
        return preparer

    return register


def controls(*names: str) -> Callable[[Control], Control]:
    """Register a control preparer."""

    def register(control: Control) -> Control:
        for name in names:
            CONTROLS[name] = control
        return control

    return register


@dataclass(frozen=True)
class Pending:
    """A lowered operation: the slots it reads and writes (regions included), what lives in its regions."""

    op: Op
    step: Step
    uses: set[int]
    outs: list[int]
    inner_bytes: int = 0


class Lowering:
    """Lowers one function; nested scopes share its registers."""

    def __init__(
        self, function: Function, module: dict[str, Function], cache: dict[str, FunctionCode], kernel: str
    ) -> None:
        self.function = function
        self.module = module
        self.cache = cache
        self.kernel = kernel
        self.template: list[Any] = []
        self.types: list[Type] = []
        self.scopes: list[dict[str, int]] = []
        # For each region being lowered: the first slot that it owns, and the outer slots read so far.
        self.captured: list[tuple[int, set[int]]] = []
        self.peak_bytes = 0

    def lower(self) -> FunctionCode:
        """The function's code."""
        body = self.region(self.function.body)
        types: list[object] = [kind for _, kind in self.function.arguments]
        return FunctionCode(
            self.function.name, types, self.function.argument_names, body, self.template, self.peak_bytes
        )

    def callee(self, name: str) -> FunctionCode:
        """The code of another function of the module, lowered on first use."""
        if name not in self.cache:
            self.cache[name] = Lowering(self.module[name], self.module, self.cache, self.kernel).lower()
        self.peak_bytes = max(self.peak_bytes, self.cache[name].peak_bytes)
        return self.cache[name]

    def unsupported(self, op: Op, why: str) -> EmulationError:
        """An error that names the operation, the kernel and the source line."""
        return EmulationError(
            f"the emulator does not execute {op.name} in kernel {self.kernel} at {op.location}: "
            f"{why}\n    {op.text}"
        )

    # Names and slots

    def define(self, name: str, kind: Type) -> int:
        """A fresh slot for an SSA name in the innermost scope."""
        slot = len(self.template)
        self.template.append(None)
        self.types.append(kind)
        self.scopes[-1][name] = slot
        return slot

    def slot(self, name: str) -> int:
        """The slot of a visible SSA name; noted as a capture by every region that does not own it."""
        for scope in reversed(self.scopes):
            if name in scope:
                slot = scope[name]
                if self.template[slot] is None:
                    for first, outer in self.captured:
                        if slot < first:
                            outer.add(slot)
                return slot
        raise EmulationError(f"kernel {self.kernel}: the TTIR uses {name} before it is defined")

    def constant(self, name: str) -> Value | None:
        """The folded value of a name, or None where it is known only at run time."""
        value: Value | None = self.template[self.slot(name)]
        return value

    # Regions and blocks

    def region(self, region: Region) -> RegionCode:
        """Lower a region in a scope of its own."""
        self.scopes.append({})
        outer: set[int] = set()
        self.captured.append((len(self.template), outer))
        codes: dict[str, BlockCode] = {}
        # Forward branches name arguments of later blocks: all of them get slots first.
        for block in region.blocks:
            codes[block.label] = BlockCode([self.define(name, kind) for name, kind in block.arguments])
        for block in region.blocks:
            self._block(block, codes[block.label], single=len(region.blocks) == 1)
        self.captured.pop()
        self.scopes.pop()
        return RegionCode(codes, sorted(outer))

    def _block(self, block: Block, code: BlockCode, *, single: bool) -> None:
        body = list(block.ops)
        last = body.pop() if body and body[-1].name in TERMINATORS else None
        pending: list[Pending] = []
        for op in body:
            lowered = self._op(op)
            if lowered is not None:
                pending.append(lowered)
        kept: set[int] = set()
        if last is not None:
            code.terminator = last.name
            code.returns = [self.slot(name) for name in last.operands]
            code.successors = [(label, [self.slot(n) for n in names]) for label, names in last.successors]
            kept = set(code.returns) | {slot for _, slots in code.successors for slot in slots}
        self._release(pending, code, kept, owned=single)

    def _release(
        self,
        pending: list[Pending],
        code: BlockCode,
        kept: set[int],
        *,
        owned: bool,
    ) -> None:
        """Append the steps, each followed by the release of the values that it was the last to read."""
        mine = {slot for one in pending for slot in one.outs}
        last_use = {slot: i for i, one in enumerate(pending) for slot in (*one.outs, *one.uses)}
        alive = 0
        for i, one in enumerate(pending):
            alive += sum(self._bytes(slot) for slot in one.outs)
            self.peak_bytes = max(self.peak_bytes, alive + one.inner_bytes)
            touched = {*one.uses, *one.outs}
            dead = [s for s in touched if owned and s in mine and s not in kept and last_use[s] == i]
            alive -= sum(self._bytes(slot) for slot in dead)
            code.steps.append(_releasing(one.step, dead) if dead else one.step)
            code.ops.append(one.op)

    def _bytes(self, slot: int) -> int:
        kind = self.types[slot]
        size = 1
        for axis in kind.shape:
            size *= axis
        try:
            return size * kind.size
        except KeyError:
            return size * 8

    def _op(self, op: Op) -> Pending | None:
        """Lower one operation; None where it was folded into a constant."""
        if op.name in CONTROLS:
            ins = [self.slot(name) for name in op.operands]
            first = len(self.template)
            outer: set[int] = set()
            self.captured.append((first, outer))
            outer_peak, self.peak_bytes = self.peak_bytes, 0
            step = CONTROLS[op.name](op, self)
            inner, self.peak_bytes = self.peak_bytes, outer_peak
            self.captured.pop()
            outs = [self.define(name, kind) for name, kind in zip(op.results, op.result_types, strict=True)]
            return Pending(op, _control_step(step, ins, outs), outer | set(ins), outs, inner)
        preparer = PREPARERS.get(op.name)
        if preparer is None:
            raise self.unsupported(op, "it is not implemented; please report it with the line below")
        try:
            run = preparer(op, self)
        except EmulationError:
            raise
        except KeyError as error:
            raise self.unsupported(op, f"unknown type or attribute {error}") from error
        ins = [self.slot(name) for name in op.operands]
        constants = [self.template[slot] for slot in ins]
        outs = [self.define(name, kind) for name, kind in zip(op.results, op.result_types, strict=True)]
        if op.name in FOLDABLE and all(value is not None for value in constants):
            # A pure preparer's function ignores the context.
            values = run(None, *constants)
            for slot, value in zip(outs, values if len(outs) > 1 else [values], strict=True):
                self.template[slot] = value
            return None
        return Pending(op, _plain_step(run, ins, outs), set(ins), outs)


def _plain_step(run: Run, ins: list[int], outs: list[int]) -> Step:
    """Bind a run-time function to its registers; the common arities avoid building lists."""
    if len(outs) == 1:
        out = outs[0]
        if len(ins) == 1:
            a = ins[0]

            def unary(context: Context, registers: Registers) -> None:
                registers[out] = run(context, registers[a])

            return unary
        if len(ins) == 2:
            a, b = ins

            def binary(context: Context, registers: Registers) -> None:
                registers[out] = run(context, registers[a], registers[b])

            return binary

        def single(context: Context, registers: Registers) -> None:
            registers[out] = run(context, *[registers[i] for i in ins])

        return single

    def several(context: Context, registers: Registers) -> None:
        values = run(context, *[registers[i] for i in ins])
        for slot, value in zip(outs, values or (), strict=True):
            registers[slot] = value

    return several


def _control_step(step: Any, ins: list[int], outs: list[int]) -> Step:
    def control(context: Context, registers: Registers) -> None:
        values = step(context, registers, [registers[i] for i in ins])
        for slot, value in zip(outs, values, strict=True):
            registers[slot] = value

    return control


def _releasing(step: Step, dead: list[int]) -> Step:
    def releasing(context: Context, registers: list[Any]) -> None:
        step(context, registers)
        for slot in dead:
            registers[slot] = None

    return releasing
