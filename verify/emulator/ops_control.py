"""scf.*, tt.call: loops and branches over many programs at once."""

from __future__ import annotations

import torch
from torch import Tensor

from attnproof.emulator.errors import EmulationError
from attnproof.emulator.lowering import ControlRun, Lowering, controls
from attnproof.emulator.machine import Context, RegionCode, Registers, restrict, run_region, run_split
from attnproof.emulator.syntax import Block, Op, Region
from attnproof.emulator.values import Value, first_programs, join_programs, last_programs, take_programs

# A loop that goes on for longer than this over one batch of programs is taken for one that never ends.
_MAX_WHILE_STEPS = 1 << 20


def _tensor(value: Value) -> Tensor:
    assert isinstance(value, Tensor)
    return value


@controls("scf.if")
def _if(op: Op, low: Lowering) -> ControlRun:
    then = low.region(op.regions[0])
    otherwise = low.region(op.regions[1] if len(op.regions) > 1 else Region([Block("", [])]))
    captures = sorted({*then.captures, *otherwise.captures})

    def run(context: Context, registers: Registers, inputs: list[Value]) -> list[Value]:
        condition = _tensor(inputs[0])
        if bool(condition.all()):
            return run_region(then, context, registers, [])
        if not bool(condition.any()):
            return run_region(otherwise, context, registers, [])
        return run_split(
            condition,
            context,
            registers,
            captures,
            lambda inner, own: run_region(then, inner, own, []),
            lambda inner, own: run_region(otherwise, inner, own, []),
        )

    return run


@controls("scf.for")
def _for(op: Op, low: Lowering) -> ControlRun:
    unsigned = op.text.startswith("scf.for unsigned")
    body = low.region(op.regions[0])

    def run(context: Context, registers: Registers, inputs: list[Value]) -> list[Value]:
        lower, upper, step = (_tensor(value) for value in inputs[:3])
        trips = _trip_counts(lower, upper, step, unsigned=unsigned)
        most = int(trips.amax())
        if trips.numel() == 1 or most == int(trips.amin()):
            return _uniform(body, context, registers, inputs[3:], lower, step, most)
        return _divergent(body, context, registers, inputs[3:], lower, step, trips)

    return run


def _trip_counts(lower: Tensor, upper: Tensor, step: Tensor, *, unsigned: bool) -> Tensor:
    low, high, by = lower.to(torch.int64), upper.to(torch.int64), step.to(torch.int64)
    if unsigned and lower.dtype == torch.int32:
        low, high, by = low & 0xFFFFFFFF, high & 0xFFFFFFFF, by & 0xFFFFFFFF
    if bool((by <= 0).any()):
        raise EmulationError(f"scf.for with a step of {int(by.amin())}: steps must be positive")
    return torch.clamp((high - low + by - 1).div(by, rounding_mode="floor"), min=0)


def _uniform(
    body: RegionCode,
    context: Context,
    registers: Registers,
    carried: list[Value],
    lower: Tensor,
    step: Tensor,
    trips: int,
) -> list[Value]:
    variable = lower
    for _ in range(trips):
        carried = run_region(body, context, registers, [variable, *carried])
        variable = variable + step
    return carried


def _divergent(
    body: RegionCode,
    context: Context,
    registers: Registers,
    carried: list[Value],
    lower: Tensor,
    step: Tensor,
    trips: Tensor,
) -> list[Value]:
    """Order programs by falling trip count: those still running are the first, and shrinking is a view."""
    trips, order = torch.sort(trips, descending=True, stable=True)
    context = context.subset(order)
    registers = restrict(registers, body.captures, order)
    carried = [take_programs(value, order) for value in carried]
    variable, step = (_tensor(take_programs(value, order)) for value in (lower, step))
    bounds = trips.tolist()
    running = len(bounds)
    finished: list[list[Value]] = []
    counts: list[int] = []
    for done in range(bounds[0] + 1):
        still = running
        while still and bounds[still - 1] <= done:
            still -= 1
        if still < running:
            finished.append([last_programs(value, still) for value in carried])
            counts.append(running - still)
            if not still:
                break
            carried = [first_programs(value, still) for value in carried]
            variable, step = (_tensor(first_programs(value, still)) for value in (variable, step))
            registers = registers.copy()
            for slot in body.captures:
                registers[slot] = first_programs(registers[slot], still)
            context = context.first(still)
            running = still
        carried = run_region(body, context, registers, [variable, *carried])
        variable = variable + step
    inverse = torch.argsort(order)
    columns = zip(*reversed(finished), strict=True)
    return [join_programs(list(column), counts[::-1], inverse) for column in columns]


@controls("scf.while")
def _while(op: Op, low: Lowering) -> ControlRun:
    before, after = (low.region(region) for region in op.regions)
    captures = sorted({*before.captures, *after.captures})

    def run(context: Context, registers: Registers, inputs: list[Value]) -> list[Value]:
        carried = inputs
        active = torch.arange(context.count)
        finished: list[list[Value]] = []
        groups: list[Tensor] = []
        for _ in range(_MAX_WHILE_STEPS):
            going, *passed = run_region(before, context, registers, carried)
            condition = _tensor(going)
            if not bool(condition.all()):
                condition = condition.expand(context.count)
                stop, go = (~condition).nonzero().flatten(), condition.nonzero().flatten()
                finished.append([take_programs(value, stop) for value in passed])
                groups.append(active[stop])
                if not go.numel():
                    break
                active, context = active[go], context.subset(go)
                registers = restrict(registers, captures, go)
                passed = [take_programs(value, go) for value in passed]
            carried = run_region(after, context, registers, passed)
        else:
            raise EmulationError(
                f"scf.while in kernel {context.kernel} at {op.location} did not end in {_MAX_WHILE_STEPS} "
                "steps: a loop that waits for another program (a lock, a grid barrier) cannot be emulated, "
                "because programs run in lock step"
            )
        order = torch.argsort(torch.cat(groups))
        counts = [group.numel() for group in groups]
        return [join_programs(list(column), counts, order) for column in zip(*finished, strict=True)]

    return run


@controls("scf.execute_region")
def _execute_region(op: Op, low: Lowering) -> ControlRun:
    body = low.region(op.regions[0])
    return lambda context, registers, inputs: run_region(body, context, registers, [])


@controls("tt.call")
def _call(op: Op, low: Lowering) -> ControlRun:
    code = low.callee(op.attributes["callee"])
    return lambda context, registers, inputs: run_region(code.body, context, code.template.copy(), inputs)
