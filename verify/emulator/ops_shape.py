"""tt.* operations that move elements about without computing, and program ids."""

from __future__ import annotations

import torch
from torch import Tensor

from attnproof.emulator.lowering import Lowering, Run, prepares
from attnproof.emulator.machine import Context
from attnproof.emulator.syntax import Op
from attnproof.emulator.types import Type
from attnproof.emulator.values import Value, broadcast, full, map_tensors

_AXES = {"x": 0, "y": 1, "z": 2}


@prepares("tt.get_program_id", pure=False)
def _program_id(op: Op, low: Lowering) -> Run:
    axis = _AXES[op.attributes["words"].split()[0]]
    return lambda context: context.program_id(axis)


@prepares("tt.get_num_programs", pure=False)
def _num_programs(op: Op, low: Lowering) -> Run:
    axis = _AXES[op.attributes["words"].split()[0]]
    return lambda context: torch.tensor([context.grid[axis]], dtype=torch.int32)


@prepares("tt.make_range")
def _make_range(op: Op, low: Lowering) -> Run:
    values = torch.arange(
        int(op.attributes["start"]), int(op.attributes["end"]), dtype=torch.int32
    ).unsqueeze(0)
    return lambda _: values


@prepares("tt.splat")
def _splat(op: Op, low: Lowering) -> Run:
    shape = (-1,) + (1,) * len(op.result_types[0].shape)
    return lambda _, a: map_tensors(a, lambda t: t.view(shape))


@prepares("tt.unsplat")
def _unsplat(op: Op, low: Lowering) -> Run:
    return lambda _, a: map_tensors(a, lambda t: t.reshape(t.shape[0]))


@prepares("tt.broadcast")
def _broadcast(op: Op, low: Lowering) -> Run:
    return lambda _, a: a


@prepares("tt.expand_dims")
def _expand_dims(op: Op, low: Lowering) -> Run:
    axis = int(op.attributes["axis"]) + 1
    return lambda _, a: map_tensors(a, lambda t: t.unsqueeze(axis))


@prepares("tt.trans")
def _trans(op: Op, low: Lowering) -> Run:
    order = [int(i) + 1 for i in op.attributes["order"].removeprefix("array<i32:").strip("[]> ").split(",")]
    return lambda _, a: map_tensors(a, lambda t: t.permute(0, *order))


@prepares("tt.reshape")
def _reshape(op: Op, low: Lowering) -> Run:
    before, after = op.operand_types[0].shape, op.result_types[0].shape
    ones = (1,) * len(after)

    def move(t: Tensor) -> Tensor:
        if t[0].numel() == 1:
            return t.view(-1, *ones)
        return full(t, before).reshape(t.shape[0], *after)

    return lambda _, a: map_tensors(a, move)


@prepares("tt.join")
def _join(op: Op, low: Lowering) -> Run:
    def run(_: Context, a: Value, b: Value) -> Tensor:
        return torch.stack(broadcast(full(a, kind.shape), full(b, kind.shape)), dim=-1)

    kind = op.operand_types[0]
    return run


@prepares("tt.split")
def _split(op: Op, low: Lowering) -> Run:
    shape = op.operand_types[0].shape

    def run(_: Context, a: Tensor) -> tuple[Tensor, Tensor]:
        a = full(a, shape)
        return a[..., 0], a[..., 1]

    return run


@prepares("tt.cat")
def _cat(op: Op, low: Lowering) -> Run:
    kind: Type = op.operand_types[0]

    def run(_: Context, a: Value, b: Value) -> Tensor:
        return torch.cat(broadcast(full(a, kind.shape), full(b, kind.shape)), dim=1)

    return run


@prepares("tt.gather")
def _gather(op: Op, low: Lowering) -> Run:
    axis = int(op.attributes["axis"]) + 1
    source, where = op.operand_types[0].shape, op.operand_types[1].shape

    def run(_: Context, a: Tensor, index: Tensor) -> Tensor:
        a, index = full(a, source), full(index, where).to(torch.int64)
        programs = max(a.shape[0], index.shape[0])
        return torch.gather(a.expand(programs, *source), axis, index.expand(programs, *where))

    return run


@prepares("tt.histogram")
def _histogram(op: Op, low: Lowering) -> Run:
    bins = op.result_types[0].shape[0]
    shape = op.operand_types[0].shape

    def run(_: Context, a: Tensor, mask: Tensor | None = None) -> Tensor:
        values = full(a, shape).to(torch.int64)
        counted = torch.ones_like(values) if mask is None else full(mask, shape).to(torch.int64)
        programs = max(values.shape[0], counted.shape[0])
        values, counted = values.expand(programs, *shape), counted.expand(programs, *shape)
        inside = (values >= 0) & (values < bins)
        counts = torch.zeros(programs, bins, dtype=torch.int64)
        return counts.scatter_add_(1, values.clamp(0, bins - 1), counted * inside).to(torch.int32)

    return run
