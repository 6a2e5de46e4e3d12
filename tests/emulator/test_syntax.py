"""The reader of TTIR: forms that the kernels of the other tests do not print."""

from __future__ import annotations

import pytest
import torch

from attnproof.emulator.errors import EmulationError
from attnproof.emulator.launch import lower_kernel
from attnproof.emulator.syntax import Op, parse, split_top
from attnproof.emulator.types import Type, parse_type


def module(body: str) -> str:
    """A kernel around some lines, with locations."""
    return f"""#loc = loc("k.py":1:0)
module {{
  tt.func public @k(%p: !tt.ptr<f32> {{tt.divisibility = 16 : i32}} loc("p"(#loc)), %n: i32 loc("n"(#loc))) {{
{body}
    tt.return loc(#loc1)
  }} loc(#loc)
}} loc(#loc)
#loc1 = loc("k.py":7:4)
#loc2 = loc(callsite("/x/triton/language/standard.py":3:1 at #loc1))
#loc3 = loc("name"(#loc2))
"""


def first_op(line: str) -> Op:
    """The parsed form of one line."""
    return parse(module(line))[0].body.blocks[0].ops[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("i32", Type("i32")),
        ("tensor<64x32xbf16>", Type("bf16", (64, 32))),
        ("tensor<8x!tt.ptr<f16>>", Type("!tt.ptr<f16>", (8,))),
        ("!tt.tensordesc<tensor<4x8xf32>>", Type("!tt.tensordesc<tensor<4x8xf32>>")),
    ],
)
def test_types(text: str, expected: Type) -> None:
    assert parse_type(text) == expected


def test_pointees() -> None:
    assert parse_type("tensor<8x!tt.ptr<f8E5M2>>").pointee.dtype == torch.float8_e5m2
    assert parse_type("!tt.ptr<i1, 3>").pointee.size == 1
    assert parse_type("!tt.tensordesc<tensor<4x8xf32>>").pointee == Type("f32", (4, 8))
    assert parse_type("!tt.tensordesc<4x8xf32>").pointee == Type("f32", (4, 8))


def test_functions_know_their_arguments() -> None:
    (function,) = parse(module(""))
    assert function.public
    assert function.argument_names == ["p", "n"]
    assert [kind.element for _, kind in function.arguments] == ["!tt.ptr<f32>", "i32"]


@pytest.mark.parametrize(
    ("location", "expected"),
    [("#loc1", "k.py:7"), ("#loc3", "k.py:7"), ("unknown", "unknown"), ('"a.py":9:2', "a.py:9")],
)
def test_locations_lead_to_the_kernels_own_line(location: str, expected: str) -> None:
    assert first_op(f"    %a = arith.addi %n, %n : i32 loc({location})").location == expected


def test_operands_and_attributes() -> None:
    op = first_op(
        '    %a = tt.load %p, %m, %o {cachePolicy = #tt.x<a = b>, flag} : !tt.ptr<f32> loc("x, y": 1:2)'
    )
    assert op.operands == ["%p", "%m", "%o"]
    assert op.attributes["flag"] == "true"
    op = first_op(
        "    %b = tt.dot %x, %y, %z, inputPrecision = tf32 : "
        "tensor<2x4xf32> * tensor<4x2xf32> -> tensor<2x2xf32>"
    )
    assert op.attributes["inputPrecision"] == "tf32"
    assert [kind.shape for kind in (*op.operand_types, *op.result_types)] == [(2, 4), (4, 2), (2, 2)]
    op = first_op('    tt.assert %c, "a : b, {c}" : tensor<4xi1>')
    assert (op.operands, op.attributes["string0"]) == (["%c"], "a : b, {c}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense<0xFF800000> : tensor<4xf32>", float("-inf")),
        ("0x7F80 : bf16", float("inf")),
        ("-1.500000e+00 : f16", -1.5),
        ("true", 1.0),
        ("-7 : i64", -7.0),
        ("dense<-1> : tensor<2xi8>", -1.0),
    ],
)
def test_constants(text: str, expected: float) -> None:
    code = lower_kernel(module(f"    %c = arith.constant {text}").encode(), "k")
    values = [value for value in code.template if isinstance(value, torch.Tensor)]
    assert [float(value.reshape(-1)[0]) for value in values] == [expected]


def test_split_respects_brackets_and_strings() -> None:
    assert split_top('a, <b, c>, "d, e", (f, [g, h])') == ["a", "<b, c>", '"d, e"', "(f, [g, h])"]


def test_unknown_operations_are_named_with_their_line() -> None:
    with pytest.raises(EmulationError, match=r"tt\.teleport in kernel k at k\.py:7"):
        lower_kernel(module("    %a = tt.teleport %n : i32 loc(#loc1)").encode(), "k")


def test_unknown_types_are_named() -> None:
    with pytest.raises(EmulationError, match=r"arith\.extf .*f4E2M1FN"):
        lower_kernel(module("    %a = arith.extf %n : f32 to f4E2M1FN loc(#loc1)").encode(), "k")
