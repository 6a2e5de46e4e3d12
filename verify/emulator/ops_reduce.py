"""tt.reduce, tt.scan, tt.map_elementwise: the combine region over whole tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnproof.emulator.lowering import ControlRun, Lowering, controls
from attnproof.emulator.machine import Context, Registers, run_region
from attnproof.emulator.syntax import Op
from attnproof.emulator.values import Value, broadcast, common_shape, full

Combine = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
Reduction = Callable[[Tensor, int], Tensor]


def _sum(x: Tensor, axis: int) -> Tensor:
    return torch.sum(x, axis, dtype=x.dtype)


def _dropping_nan(reduce: Reduction, replacement: float) -> Reduction:
    """Amax and amin keep a NaN; maxnumf and minnumf drop it unless there is nothing else."""

    def run(x: Tensor, axis: int) -> Tensor:
        result = reduce(x, axis)
        if bool(torch.isnan(result).any()):
            nan = torch.isnan(x)
            result = reduce(x.masked_fill(nan, replacement), axis)
            result = result.masked_fill(nan.all(axis), float("nan"))
        return result

    return run


# Regions of one operation on their two arguments. Sums of float16 and bfloat16 are not among them: each step
# rounds.
_FAST: dict[tuple[str, str], Reduction] = {
    **{("arith.addf", kind): _sum for kind in ("f32", "f64")},
    **{("arith.addi", kind): _sum for kind in ("i8", "i16", "i32", "i64")},
    **{("arith.maximumf", kind): torch.amax for kind in ("f16", "bf16", "f32", "f64")},
    **{("arith.minimumf", kind): torch.amin for kind in ("f16", "bf16", "f32", "f64")},
    **{
        ("arith.maxnumf", kind): _dropping_nan(torch.amax, float("-inf"))
        for kind in ("f16", "bf16", "f32", "f64")
    },
    **{
        ("arith.minnumf", kind): _dropping_nan(torch.amin, float("inf"))
        for kind in ("f16", "bf16", "f32", "f64")
    },
    **{("arith.maxsi", kind): torch.amax for kind in ("i8", "i16", "i32", "i64")},
    **{("arith.minsi", kind): torch.amin for kind in ("i8", "i16", "i32", "i64")},
}


def _fast(op: Op) -> Reduction | None:
    block = op.regions[0].blocks[0]
    if len(op.operands) == 1 and len(block.ops) == 2:
        first, last = block.ops
        if set(first.operands) == {name for name, _ in block.arguments} and last.operands == first.results:
            return _FAST.get((first.name, op.operand_types[0].element))
    return None


def _combiner(op: Op, low: Lowering) -> Callable[[Context, Registers], Combine]:
    region = low.region(op.regions[0])

    def bind(context: Context, registers: Registers) -> Combine:
        def combine(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
            values = run_region(region, context, registers, [*left, *right])
            shape = common_shape(*(t.shape for t in (*left, *right)))
            return [value.expand(shape) for value in values if isinstance(value, Tensor)]

        return combine

    return bind


def _even(x: Tensor, axis: int, start: int) -> Tensor:
    index = [slice(None)] * x.dim()
    index[axis] = slice(start, None, 2)
    return x[tuple(index)]


@controls("tt.reduce")
def _reduce(op: Op, low: Lowering) -> ControlRun:
    axis = int(op.attributes["axis"]) + 1
    shape = op.operand_types[0].shape
    fast = _fast(op)
    bind = _combiner(op, low)
    length = shape[axis - 1]
    additive = op.regions[0].blocks[0].ops[0].name in ("arith.addf", "arith.addi")

    def run(context: Context, registers: Registers, inputs: list[Value]) -> list[Value]:
        if fast is not None:
            (x,) = inputs
            assert isinstance(x, Tensor)
            if x.shape[axis] != length:
                # Constant along the axis: max and min are the value itself; a sum still needs its terms.
                x = x.expand([length if i == axis else n for i, n in enumerate(x.shape)]) if additive else x
            return [fast(x, axis)]
        combine = bind(context, registers)
        parts = broadcast(*(full(value, shape) for value in inputs))
        while parts[0].shape[axis] > 1:
            if parts[0].shape[axis] % 2:
                odd = [part.narrow(axis, part.shape[axis] - 1, 1) for part in parts]
                parts = [part.narrow(axis, 0, part.shape[axis] - 1) for part in parts]
                head = combine([_even(p, axis, 0) for p in parts], [_even(p, axis, 1) for p in parts])
                parts = [torch.cat([a, b], dim=axis) for a, b in zip(head, odd, strict=True)]
            else:
                parts = combine([_even(p, axis, 0) for p in parts], [_even(p, axis, 1) for p in parts])
        return [part.squeeze(axis) for part in parts]

    return run


@controls("tt.scan")
def _scan(op: Op, low: Lowering) -> ControlRun:
    axis = int(op.attributes["axis"]) + 1
    reverse = op.attributes.get("reverse", "false") == "true"
    shape = op.operand_types[0].shape
    bind = _combiner(op, low)

    def run(context: Context, registers: Registers, inputs: list[Value]) -> list[Value]:
        combine = bind(context, registers)
        parts = broadcast(*(full(value, shape) for value in inputs))
        if reverse:
            parts = [part.flip(axis) for part in parts]
        length, step = shape[axis - 1], 1
        # Hillis and Steele: after k rounds every element holds the combination of the 2^k up to it.
        while step < length:
            earlier = [part.narrow(axis, 0, length - step) for part in parts]
            later = [part.narrow(axis, step, length - step) for part in parts]
            combined = combine(earlier, later)
            parts = [
                torch.cat([part.narrow(axis, 0, step), new], dim=axis)
                for part, new in zip(parts, combined, strict=True)
            ]
            step *= 2
        return [part.flip(axis) if reverse else part for part in parts]

    return run


@controls("tt.map_elementwise")
def _map_elementwise(op: Op, low: Lowering) -> ControlRun:
    region = low.region(op.regions[0])
    pack = int(op.attributes.get("pack", "1"))
    if pack != 1:
        raise low.unsupported(op, f"pack = {pack}; only 1 is executed")
    if len(region.blocks) > 1:
        raise low.unsupported(op, "a body with branches")
    return lambda context, registers, inputs: run_region(region, context, registers, inputs)
