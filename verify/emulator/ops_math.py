"""math.*, tt.dot and friends: correctly rounded where torch is, else within an ulp of float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnproof.emulator.lowering import Lowering, Run, prepares
from attnproof.emulator.machine import Context
from attnproof.emulator.numerics import fused_multiply_add, square_root
from attnproof.emulator.syntax import Op

# 2 to this power is the smallest normal number of float32.
_LEAST_EXPONENT = -126.0

Unary = Callable[[Tensor], Tensor]

UNARY: dict[str, Unary] = {
    "math.exp": torch.exp,
    "math.expm1": torch.expm1,
    "math.log": torch.log,
    "math.log2": torch.log2,
    "math.log10": torch.log10,
    "math.log1p": torch.log1p,
    "math.sqrt": square_root,
    "math.rsqrt": lambda x: (1.0 / x.double().sqrt()).to(x.dtype),
    "math.tanh": torch.tanh,
    "math.sin": torch.sin,
    "math.cos": torch.cos,
    "math.erf": torch.erf,
    "math.absf": torch.abs,
    "math.absi": torch.abs,
    "math.floor": torch.floor,
    "math.ceil": torch.ceil,
    "math.trunc": torch.trunc,
    "math.roundeven": torch.round,
    "tt.precise_sqrt": square_root,
}


def _register_unary(name: str, f: Unary) -> None:
    @prepares(name)
    def prepare(op: Op, low: Lowering) -> Run:
        return lambda _, a: f(a)


for _name, _f in UNARY.items():
    _register_unary(_name, _f)


@prepares("math.exp2", pure=False)
def _exp2(op: Op, low: Lowering) -> Run:
    """Triton makes ex2.approx.ftz.f32 of it for CUDA, but of tl.exp ex2.approx.f32, which does not flush."""
    if op.operand_types[0].element != "f32":
        return lambda _, a: torch.exp2(a)

    def run(context: Context, a: Tensor) -> Tensor:
        result = torch.exp2(a)
        if context.settings.target.startswith("sm_"):
            result = torch.where(a < _LEAST_EXPONENT, 0.0, result)
        return result

    return run


@prepares("math.fma")
def _fma(op: Op, low: Lowering) -> Run:
    return lambda _, a, b, c: fused_multiply_add(a, b, c)


@prepares("math.copysign")
def _copysign(op: Op, low: Lowering) -> Run:
    return lambda _, a, b: torch.copysign(a, b)


@prepares("math.powf")
def _powf(op: Op, low: Lowering) -> Run:
    return lambda _, a, b: torch.pow(a, b)
