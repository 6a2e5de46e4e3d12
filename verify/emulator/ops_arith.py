"""arith.*: element by element, each result rounded to its IR type.

float16 and bfloat16 sums, products and quotients are computed in float32 by torch and rounded once: float32
has more than 2p + 2 bits, so that this is the correctly rounded result (Figueroa, "When is double rounding
innocuous?", 1995).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnproof.emulator.lowering import Lowering, Run, prepares
from attnproof.emulator.machine import Context
from attnproof.emulator.numerics import to_float8, truncate
from attnproof.emulator.syntax import Op, split_top
from attnproof.emulator.types import Type
from attnproof.emulator.values import Pointer, Value

Binary = Callable[[Tensor, Tensor], Tensor]


def _literal(text: str, kind: Type) -> float | int | bool:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    if not kind.is_float:
        value = int(text, 0)
        # An unsigned spelling of a signed number.
        return value - (1 << kind.bits) if kind.bits > 1 and value >= 1 << (kind.bits - 1) else value
    if text.lower().startswith("0x"):
        return _from_bits(int(text, 16), kind)
    return float(text)


def _from_bits(bits: int, kind: Type) -> float:
    if kind.element == "f64":
        return float(struct.unpack("<d", bits.to_bytes(8, "little"))[0])
    raw = torch.tensor(list(bits.to_bytes(kind.size, "little")), dtype=torch.uint8)
    return float(raw.view(kind.dtype).double()[0])


@prepares("arith.constant")
def _constant(op: Op, low: Lowering) -> Run:
    kind, text = op.type, op.attributes["value"]
    ones = (1,) * (1 + len(kind.shape))
    if text.startswith("dense<"):
        text = text[len("dense<") : -1]
    if text.startswith("["):
        values = [_literal(t, kind) for t in split_top(text.replace("[", "").replace("]", ""))]
        tensor = (
            torch.tensor(values, dtype=torch.float64 if kind.is_float else None)
            .to(kind.dtype)
            .view(1, *kind.shape)
        )
    else:
        value = _literal(text, kind)
        wide = torch.float64 if kind.is_float else torch.bool if kind.element == "i1" else torch.int64
        tensor = torch.full(ones, value, dtype=wide).to(kind.dtype)
    return lambda _: tensor


def _register_binary(name: str, f: Binary) -> None:
    @prepares(name)
    def prepare(op: Op, low: Lowering) -> Run:
        return lambda _, a, b: f(a, b)


def _boolean_or(f: Binary, on_booleans: Binary) -> Binary:
    """Arithmetic modulo two for one-bit integers, which torch's booleans do not have."""
    return lambda a, b: on_booleans(a, b) if a.dtype == torch.bool else f(a, b)


_BINARY: dict[str, Binary] = {
    "arith.addf": torch.add,
    "arith.subf": torch.sub,
    "arith.mulf": torch.mul,
    "arith.divf": torch.div,
    "tt.precise_divf": torch.div,
    "tt.approx_divf": torch.div,
    "arith.remf": torch.fmod,
    "arith.addi": _boolean_or(torch.add, torch.logical_xor),
    "arith.subi": _boolean_or(torch.sub, torch.logical_xor),
    "arith.muli": _boolean_or(torch.mul, torch.logical_and),
    "arith.andi": torch.bitwise_and,
    "arith.ori": torch.bitwise_or,
    "arith.xori": torch.bitwise_xor,
    "arith.maxsi": torch.maximum,
    "arith.minsi": torch.minimum,
    # maxnumf and minnumf drop a NaN, maximumf and minimumf keep it.
    "arith.maxnumf": torch.fmax,
    "arith.minnumf": torch.fmin,
    "arith.maximumf": torch.maximum,
    "arith.minimumf": torch.minimum,
}
for _name, _f in _BINARY.items():
    _register_binary(_name, _f)


_UNSIGNED: dict[torch.dtype, Any] = {
    torch.bool: np.bool_,
    torch.int8: np.uint8,
    torch.int16: np.uint16,
    torch.int32: np.uint32,
    torch.int64: np.uint64,
}


def unsigned(x: Tensor) -> Any:
    """The same bits as a numpy array of unsigned integers."""
    return x.detach().numpy().view(_UNSIGNED[x.dtype])


def signless(x: Any, dtype: torch.dtype) -> Tensor:
    """A numpy array of unsigned integers as the torch tensor of its bits."""
    array = np.ascontiguousarray(x)
    if dtype == torch.bool:
        return torch.from_numpy(array.astype(np.bool_))
    return torch.from_numpy(array.astype(_UNSIGNED[dtype], copy=False).view(np.dtype(f"i{dtype.itemsize}")))


def _nonzero(divisor: Tensor) -> Tensor:
    """Division by zero is undefined and often masked away later: it must not raise, so divide by one."""
    return divisor if bool(divisor.all()) else torch.where(divisor == 0, 1, divisor)


def _on_unsigned(f: Callable[[Any, Any], Any], *, divides: bool = False) -> Binary:
    def run(a: Tensor, b: Tensor) -> Tensor:
        return signless(f(unsigned(a), unsigned(_nonzero(b) if divides else b)), a.dtype)

    return run


def _floor_division(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, _nonzero(b), rounding_mode="floor")


def _ceil_division(a: Tensor, b: Tensor) -> Tensor:
    return -torch.div(-a, _nonzero(b), rounding_mode="floor")


def _shift_right_unsigned(a: Any, b: Any) -> Any:
    bits = 8 * a.dtype.itemsize
    return np.where(b < bits, a >> np.minimum(b, a.dtype.type(bits - 1)), a.dtype.type(0))


def _multiply_high(a: Any, b: Any) -> Any:
    if a.dtype == np.uint32:
        return ((a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    carry = (middle & low) + a0 * b1
    return a1 * b1 + (middle >> half) + (carry >> half)


_INTEGER: dict[str, Binary] = {
    "arith.divsi": lambda a, b: torch.div(a, _nonzero(b), rounding_mode="trunc"),
    "arith.remsi": lambda a, b: torch.fmod(a, _nonzero(b)),
    "arith.floordivsi": _floor_division,
    "arith.ceildivsi": _ceil_division,
    "arith.divui": _on_unsigned(np.floor_divide, divides=True),
    "arith.remui": _on_unsigned(np.remainder, divides=True),
    "arith.maxui": _on_unsigned(np.maximum),
    "arith.minui": _on_unsigned(np.minimum),
    "arith.shli": lambda a, b: torch.where(
        (b >= 0) & (b < 8 * a.itemsize), a << (b & (8 * a.itemsize - 1)), 0
    ).to(a.dtype),
    "arith.shrsi": lambda a, b: a >> b.clamp(0, 8 * a.itemsize - 1),
    "arith.shrui": _on_unsigned(_shift_right_unsigned),
    "tt.mulhiui": _on_unsigned(_multiply_high),
}
for _name, _f in _INTEGER.items():
    _register_binary(_name, _f)


@prepares("arith.negf")
def _negf(op: Op, low: Lowering) -> Run:
    return lambda _, a: torch.neg(a)


def _ordered_unequal(a: Tensor, b: Tensor) -> Tensor:
    return (a < b) | (a > b)


_FLOAT_PREDICATES: dict[str, Binary] = {
    "oeq": torch.eq,
    "ogt": torch.gt,
    "oge": torch.ge,
    "olt": torch.lt,
    "ole": torch.le,
    "one": _ordered_unequal,
    "ord": lambda a, b: ~(torch.isnan(a) | torch.isnan(b)),
    "uno": lambda a, b: torch.isnan(a) | torch.isnan(b),
    "ueq": lambda a, b: ~_ordered_unequal(a, b),
    "ugt": lambda a, b: ~(a <= b),
    "uge": lambda a, b: ~(a < b),
    "ult": lambda a, b: ~(a >= b),
    "ule": lambda a, b: ~(a > b),
    "une": torch.ne,
}
_SIGNED_PREDICATES: dict[str, Binary] = {
    "eq": torch.eq,
    "ne": torch.ne,
    "slt": torch.lt,
    "sle": torch.le,
    "sgt": torch.gt,
    "sge": torch.ge,
}
_UNSIGNED_PREDICATES: dict[str, Callable[[Any, Any], Any]] = {
    "ult": np.less,
    "ule": np.less_equal,
    "ugt": np.greater,
    "uge": np.greater_equal,
}


def plain(value: Value) -> Tensor:
    """A tensor, with a pointer replaced by its addresses."""
    tensor = value.addresses() if isinstance(value, Pointer) else value
    assert isinstance(tensor, Tensor)
    return tensor


@prepares("arith.cmpf")
def _cmpf(op: Op, low: Lowering) -> Run:
    f = _FLOAT_PREDICATES[op.attributes["words"].split()[0]]
    return lambda _, a, b: f(a, b)


@prepares("arith.cmpi")
def _cmpi(op: Op, low: Lowering) -> Run:
    predicate = op.attributes["words"].split()[0]
    if predicate in _UNSIGNED_PREDICATES:
        compare = _UNSIGNED_PREDICATES[predicate]
        return lambda _, a, b: signless(compare(unsigned(plain(a)), unsigned(plain(b))), torch.bool)
    f = _SIGNED_PREDICATES[predicate]
    if op.operand_types[0].element == "i1" and predicate not in ("eq", "ne"):
        # A set one-bit integer is -1 when read signed.
        return lambda _, a, b: f(-a.to(torch.int8), -b.to(torch.int8))
    return lambda _, a, b: f(plain(a), plain(b))


def _as_wide(condition: Tensor, value: Tensor) -> Tensor:
    """A scalar condition may choose between tensors: give it their axes."""
    missing = value.dim() - condition.dim()
    return condition.view(-1, *(1,) * missing) if condition.dim() == 1 and missing > 0 else condition


@prepares("arith.select")
def _select(op: Op, low: Lowering) -> Run:
    def run(_: Context, condition: Tensor, a: Value, b: Value) -> Value:
        if condition.numel() == 1:
            return a if bool(condition) else b
        if isinstance(a, Pointer) and isinstance(b, Pointer):
            chosen = torch.where(_as_wide(condition, a.parts[0]), a.addresses(), b.addresses())
            return Pointer((chosen,), min(a.alignment, b.alignment))
        first, second = plain(a), plain(b)
        return torch.where(_as_wide(condition, first), first, second)

    return run


# Conversions


@prepares("arith.extf", "arith.extsi", "arith.sitofp", "arith.trunci", "arith.index_cast")
def _convert(op: Op, low: Lowering) -> Run:
    dtype = op.result_types[0].dtype
    if op.operand_types[0].element == "i1" and op.name in ("arith.extsi", "arith.sitofp"):
        return lambda _, a: -a.to(dtype)
    if dtype == torch.bool:
        return lambda _, a: (a & 1).to(torch.bool)
    return lambda _, a: a.to(dtype)


@prepares("arith.extui", "arith.uitofp", "arith.index_castui")
def _convert_unsigned(op: Op, low: Lowering) -> Run:
    dtype, bits = op.result_types[0].dtype, op.operand_types[0].bits
    if bits == 1:
        return lambda _, a: a.to(dtype)
    if bits == 64:
        # numpy rounds correctly to float64; narrower targets take the two-step route through float32's own
        # rule.
        return lambda _, a: torch.from_numpy(
            unsigned(a).astype(np.float32 if dtype != torch.float64 else np.float64)
        ).to(dtype)
    return lambda _, a: (a.to(torch.int64) & ((1 << bits) - 1)).to(dtype)


@prepares("arith.fptosi", "arith.fptoui")
def _to_integer(op: Op, low: Lowering) -> Run:
    kind = op.result_types[0]
    bits, dtype = kind.bits, kind.dtype
    lowest, highest = (
        (0, (1 << bits) - 1) if op.name == "arith.fptoui" else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    )

    def run(_: Context, a: Tensor) -> Tensor:
        # Out of range is undefined in the IR; GPUs saturate and turn NaN into zero (PTX ISA, cvt).
        whole = torch.nan_to_num(a.double().trunc(), nan=0.0, posinf=math.inf, neginf=-math.inf).clamp(
            lowest, highest
        )
        if op.name == "arith.fptoui" and bits == 64:
            array = np.minimum(whole.numpy(), np.nextafter(2.0**64, 0)).astype(np.uint64)
            return signless(array, dtype)
        result = (
            whole.clamp(max=9223372036854774784.0).to(torch.int64) if bits == 64 else whole.to(torch.int64)
        )
        return torch.where(a.double() >= 2.0**63, highest, result) if bits == 64 else result.to(dtype)

    return run


@prepares("arith.truncf", "tt.fp_to_fp")
def _narrow(op: Op, low: Lowering) -> Run:
    dtype = op.result_types[0].dtype
    towards_zero = "rtz" in (op.attributes.get("rounding", ""), *op.attributes.get("words", "").split()) or (
        "toward_zero" in op.attributes.get("words", "")
    )
    if op.operand_types[0].size < op.result_types[0].size:
        return lambda _, a: a.to(dtype)
    if towards_zero:
        return lambda _, a: truncate(a, dtype)
    if dtype.itemsize == 1:
        return lambda _, a: to_float8(a, dtype)
    return lambda _, a: a.to(dtype)


@prepares("arith.bitcast", "tt.bitcast")
def _bitcast(op: Op, low: Lowering) -> Run:
    kind = op.result_types[0]
    if kind.is_pointer:
        return lambda _, a: a
    dtype = kind.dtype
    return lambda _, a: a.contiguous().view(dtype)


@prepares("tt.clampf")
def _clampf(op: Op, low: Lowering) -> Run:
    if "all" in (op.attributes.get("propagateNan", "none"), *op.attributes.get("words", "").split()):
        return lambda _, x, least, most: torch.minimum(torch.maximum(x, least), most)
    return lambda _, x, least, most: torch.fmin(torch.fmax(x, least), most)
