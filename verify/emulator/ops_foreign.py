"""Code from outside the dialects: libdevice functions, inline PTX, assertions, prints, hints."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnproof.emulator.lowering import Lowering, Run, prepares
from attnproof.emulator.machine import Context
from attnproof.emulator.numerics import fused_multiply_add, square_root
from attnproof.emulator.ops_arith import signless, unsigned
from attnproof.emulator.syntax import Op
from attnproof.emulator.values import Pointer, full

# libdevice and OCML names without their prefix and type suffix. The `fast_` variants are evaluated
# accurately: their documented errors are a property of the hardware's approximations, not of the IR.
LIBRARY: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs,
    "fabs": torch.abs,
    "acos": torch.acos,
    "acosh": torch.acosh,
    "asin": torch.asin,
    "asinh": torch.asinh,
    "atan": torch.atan,
    "atan2": torch.atan2,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "copysign": torch.copysign,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "div_rn": torch.div,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfinv": torch.erfinv,
    "exp": torch.exp,
    "exp10": lambda x: torch.pow(10.0, x),
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "fdim": lambda a, b: torch.clamp(a - b, min=0),
    "fdividef": torch.div,
    "fast_div": torch.div,
    "floor": torch.floor,
    "fma": fused_multiply_add,
    "fma_rn": fused_multiply_add,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "fmod": torch.fmod,
    "hypot": torch.hypot,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinited": torch.isfinite,
    "finite": torch.isfinite,
    "lgamma": torch.lgamma,
    "log": torch.log,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "max": torch.maximum,
    "min": torch.minimum,
    "nearbyint": torch.round,
    "pow": torch.pow,
    "rcp_rn": torch.reciprocal,
    "rint": torch.round,
    "llrint": torch.round,
    "rsqrt": torch.rsqrt,
    "rsqrt_rn": torch.rsqrt,
    "saturate": lambda x: torch.nan_to_num(x, nan=0.0).clamp(0, 1),
    "signbit": torch.signbit,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": square_root,
    "sqrt_rn": square_root,
    "tan": torch.tan,
    "tanh": torch.tanh,
    "tgamma": lambda x: torch.exp(torch.lgamma(x)),
    "trunc": torch.trunc,
    "round": lambda x: torch.trunc(x + torch.copysign(torch.full_like(x, 0.5), x)),
}

_SYMBOL = re.compile(r"^(?:__nv_|__ocml_|__triton_hip_)?(?:fast_)?(.*?)(?:_f16|_f32|_f64)?$")


def library_function(symbol: str) -> Callable[..., Tensor] | None:
    """The function behind an external symbol, such as `__nv_fast_expf`, `__nv_tanh` or `__ocml_exp2_f32`."""
    match = _SYMBOL.match(symbol)
    assert match is not None
    stem = match.group(1)
    for name in (stem, stem.removesuffix("f"), stem.removesuffix("d"), stem.removesuffix("l")):
        if name in LIBRARY:
            return LIBRARY[name]
    return None


@prepares("tt.extern_elementwise")
def _extern(op: Op, low: Lowering) -> Run:
    symbol = op.attributes.get("symbol", "").strip('"')
    f = library_function(symbol)
    if f is None:
        known = ", ".join(sorted(LIBRARY))
        raise low.unsupported(
            op, f"the library function {symbol!r} has no counterpart here (known stems: {known})"
        )
    dtype = op.result_types[0].dtype
    return lambda _, *values: f(*values).to(dtype)


def _saturating_add(a: Tensor, b: Tensor) -> Tensor:
    return torch.clamp(a + b, 0.0, 1.0)


def _shift_left(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((b >= 0) & (b < 32), a << (b & 31), 0).to(a.dtype)


def _shift_right(a: Tensor, b: Tensor) -> Tensor:
    return signless(unsigned(a) >> unsigned(b.clamp(0, 31)), a.dtype)


# PTX instructions without their type suffixes and modifiers (`approx`, `ftz`, `rn`), by the operation they
# compute. bfloat16 and float16 variants round their result to the IR type afterwards.
PTX: dict[str, Callable[..., Tensor]] = {
    "ex2": torch.exp2,
    "lg2": torch.log2,
    "tanh": torch.tanh,
    "rcp": torch.reciprocal,
    "rsqrt": torch.rsqrt,
    "sqrt": square_root,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
    "neg": torch.neg,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "fma": fused_multiply_add,
    "max": torch.fmax,
    "min": torch.fmin,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "not": torch.bitwise_not,
    "shl": _shift_left,
    "shr": _shift_right,
    "mov": lambda x: x,
}
_MODIFIERS = frozenset(
    {
        "approx",
        "ftz",
        "rn",
        "full",
        "sat",
        "lo",
        "f32",
        "f64",
        "f16",
        "bf16",
        "s32",
        "u32",
        "b32",
        "s64",
        "u64",
        "b64",
    }
)
_ROUND = {"rni": torch.round, "rzi": torch.trunc, "rmi": torch.floor, "rpi": torch.ceil}


def _hardware_tanh(x: Tensor) -> Tensor:
    """tanh.approx.f32, within the relative error 2⁻¹¹ that PTX documents: the result has 11 bits.

    The hardware is usually better; a kernel that needs more than the documented bound is exposed here.
    """
    mantissa, exponent = torch.frexp(torch.tanh(x.double()))
    return torch.ldexp(torch.round(mantissa * 2.0**11) * 2.0**-11, exponent).to(x.dtype)


def _flushing(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``f`` with .ftz: float32 operands and results that are subnormal become zeros of their sign."""

    def flushed(x: Tensor) -> Tensor:
        small = x.abs() < torch.finfo(torch.float32).tiny
        return (
            torch.where(small, torch.copysign(torch.zeros_like(x), x), x) if x.dtype == torch.float32 else x
        )

    return lambda *values: flushed(f(*map(flushed, values)))


def ptx_function(instruction: str) -> Callable[..., Tensor] | None:
    """The function of an opcode such as `ex2.approx.ftz.f32`; None where it is not element by element."""
    name, *modifiers = instruction.split(".")
    if name == "cvt" and modifiers and modifiers[0] in _ROUND:
        return _ROUND[modifiers[0]]
    if name not in PTX or not set(modifiers) <= _MODIFIERS:
        return None
    f = PTX[name]
    if name == "tanh" and modifiers[:2] == ["approx", "f32"]:
        f = _hardware_tanh
    if name in ("max", "min") and modifiers[-1] in ("s32", "s64"):
        f = torch.maximum if name == "max" else torch.minimum
    if "ftz" in modifiers:
        f = _flushing(f)
    if "sat" in modifiers:
        return lambda *values: torch.nan_to_num(f(*values), nan=0.0).clamp(0, 1)
    return f


@prepares("tt.elementwise_inline_asm")
def _inline_asm(op: Op, low: Lowering) -> Run:
    """Straight-line assembly of element-wise instructions over the operands and PTX registers."""
    source = op.attributes.get("string0", "")
    cleaned = re.sub(r"\\0A|\\09|\\n|\\t", " ", source)
    cleaned = re.sub(r"//[^;]*|/\*.*?\*/", " ", cleaned)
    statements = [s.strip() for s in cleaned.replace("{", ";").replace("}", ";").split(";") if s.strip()]
    pack = int(op.attributes.get("packed_element", "1"))
    program: list[tuple[str, Callable[..., Tensor], list[str]]] = []
    supported = pack == 1 and all(kind.size >= 2 for kind in op.operand_types)
    for statement in statements:
        if statement.startswith(".reg"):
            continue
        opcode, _, rest = statement.partition(" ")
        names = [name.strip() for name in rest.split(",")]
        f = ptx_function(opcode)
        supported = supported and f is not None and len(names) >= 2
        if f is None or not supported:
            break
        program.append((names[0], f, names[1:]))
    if not supported or not program:
        known = ", ".join(sorted(PTX))
        raise low.unsupported(
            op,
            f"the inline assembly {source!r} is not a sequence of plain element-wise PTX instructions "
            f"({known}; pack 1)",
        )
    outputs = [kind.dtype for kind in op.result_types]

    def run(_: Context, *inputs: Tensor) -> Any:
        values: dict[str, Tensor] = {f"${len(outputs) + i}": value for i, value in enumerate(inputs)}
        for target, f, names in program:
            values[target] = f(*[values[n] if n in values else _immediate(n) for n in names])
        results = tuple(values[f"${i}"].to(dtype) for i, dtype in enumerate(outputs))
        return results if len(results) > 1 else results[0]

    return run


def _immediate(text: str) -> Tensor:
    """A PTX literal: `0f3F800000` is a float by its bits."""
    if text.lower().startswith("0f"):
        bits = int(text.lower().removeprefix("0f"), 16)
        return torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32)
    if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", text):
        return torch.tensor([int(text, 0)], dtype=torch.int32)
    return torch.tensor([float(text)])


@prepares("tt.assert", pure=False)
def _assert(op: Op, low: Lowering) -> Run:
    message = op.attributes.get("string0", "")
    shape = op.operand_types[0].shape

    def run(context: Context, condition: Tensor, *_: Tensor) -> tuple[()]:
        if not bool(condition.all()):
            first = (~full(condition, shape)).nonzero()[0].tolist()
            where = context.coordinates(first[0])
            raise AssertionError(
                f"device_assert in kernel {context.kernel} at {op.location}, program {where}, "
                f"element {tuple(first[1:])}: {message}"
            )
        return ()

    return run


@prepares("tt.print", pure=False)
def _print(op: Op, low: Lowering) -> Run:
    prefix = op.attributes.get("string0", "")

    def run(context: Context, *values: Any) -> tuple[()]:
        for position in range(context.count):
            shown = [v.addresses() if isinstance(v, Pointer) else v for v in values]
            text = ", ".join(str(v[position if v.shape[0] > 1 else 0].tolist()) for v in shown)
            print(f"pid {context.coordinates(position)}{prefix}{text}")
        return ()

    return run


@prepares(
    "ttg.barrier",
    "gpu.barrier",
    "tt.debug_barrier",
    "ttg.local_barrier",
    "llvm.intr.assume",
    "tt.grid_dependency_wait",
    "tt.grid_dependency_launch_dependents",
    "ttng.fence",
    pure=False,
)
def _nothing(op: Op, low: Lowering) -> Run:
    """Barriers within a program, and hints to the optimiser: nothing to do in lock step."""
    return lambda *_: ()


@prepares("ub.poison")
def _undefined(op: Op, low: Lowering) -> Run:
    value = torch.zeros((1,) * (1 + len(op.type.shape)), dtype=op.type.dtype)
    return lambda _: value
