"""tt.dot: products exact, sums in float32, operands first rounded as `inputPrecision` says."""

from __future__ import annotations

import torch
from torch import Tensor

from attnproof.emulator.lowering import Lowering, Run, prepares
from attnproof.emulator.machine import Context
from attnproof.emulator.numerics import round_to_tf32, split
from attnproof.emulator.syntax import Op
from attnproof.emulator.values import full, remembered

# Which pairs of pieces are multiplied, smallest products first (Triton's F32DotTC pass).
_SPLITS: dict[str, tuple[str, int, list[tuple[int, int]]]] = {
    "tf32x3": ("tf32", 2, [(0, 1), (1, 0), (0, 0)]),
    "bf16x3": ("bf16", 2, [(0, 1), (1, 0), (0, 0)]),
    "bf16x6": ("bf16", 3, [(1, 1), (0, 2), (2, 0), (0, 1), (1, 0), (0, 0)]),
}


@prepares("tt.dot")
def _dot(op: Op, low: Lowering) -> Run:
    kind_a, kind_b = op.operand_types[:2]
    kind_c = op.result_types[0]
    precision = op.attributes.get("inputPrecision", "ieee") if kind_a.element == "f32" else "ieee"
    zero = low.constant(op.operands[2])
    no_addend = isinstance(zero, Tensor) and zero.numel() == 1 and not bool(zero != 0)
    # Integers of up to 16 bits: float64 holds products and sums exactly, and is much faster than torch's
    # integers.
    wide = torch.float64 if kind_c.element in ("f64", "i32", "i64") else torch.float32

    def prepared(x: Tensor) -> Tensor:
        return round_to_tf32(x) if precision == "tf32" else x.to(wide)

    def run(_: Context, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        # An operand that the loop does not change (a query tile) is widened and rounded once.
        a, b = (remembered(x, f"wide{precision}", prepared) for x in (a, b))
        a, b, c = full(a, kind_a.shape), full(b, kind_b.shape), full(c, kind_c.shape)
        if precision in _SPLITS:
            form, pieces, pairs = _SPLITS[precision]
            parts_a, parts_b = split(a, form, pieces), split(b, form, pieces)
            total = c
            for i, j in pairs:
                total = _accumulate(parts_a[i], parts_b[j], total, no_addend=False)
            return total.to(kind_c.dtype)
        addend = c.to(wide) if c.dtype != wide else c
        result = _accumulate(a, b, addend, no_addend=no_addend)
        return result if result.dtype == kind_c.dtype else _narrow(result, kind_c.dtype)

    return run


def _narrow(result: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return result.to(dtype)
    return result.to(torch.int64).to(dtype)


def _accumulate(a: Tensor, b: Tensor, c: Tensor, *, no_addend: bool) -> Tensor:
    """a·b + c over `[P | 1, M, K]`, `[P | 1, K, N]`, `[P | 1, M, N]`, or with one batch axis more."""
    if no_addend:
        return torch.matmul(a, b)
    if a.dim() == 3:
        programs = max(a.shape[0], b.shape[0], c.shape[0])
        a, b, c = (t.expand(programs, *t.shape[1:]) for t in (a, b, c))
        return torch.baddbmm(c, a, b)
    return torch.matmul(a, b) + c
