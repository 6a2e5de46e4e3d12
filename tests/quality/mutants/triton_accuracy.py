"""Mutants of the Triton kernels that lose a few bits: errors 2 to 8 times those of the right kernel.

Where float32 would lose all of its digits the edit asks for the dtype, at compile time. None of them touches
scores or sums in a way that the log-sum-exp, always kept in float32, would give away at once.
"""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import MERGE, NUMERIC, SOFTMAX, THREE, WHOLE

__all__ = ["MUTANTS"]

_slight = partial(Mutant, base=WHOLE, mechanism="accuracy", bug="", shows=NUMERIC, accuracy_only=True)

_HALF = "if p_q.dtype.element_ty != tl.float32:"
_FLOAT16 = "if p_q.dtype.element_ty == tl.float16:"
_WEIGHTS = "            b_p = tl.exp2((b_s - b_shift[:, None]) * UNIT)\n"
_RESCALED = "            b_o = b_o * b_alpha[:, None]\n"
_PRODUCT = "            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)\n"
_DIVISION = "    b_o = b_o / b_total[:, None] + b_nan[:, None]\n"
# The mantissa bits of float32 that the half precisions do not have.
_CUT = "-8192 if p_q.dtype.element_ty == tl.float16 else -65536"


def _cut(name: str, bits: str) -> str:
    """An expression: the float32 block ``name`` with its lowest bits cut off by the mask ``bits``."""
    return f"({name}.to(tl.int32, bitcast=True) & ({bits})).to(tl.float32, bitcast=True)"


def _through(name: str, dtype: str) -> str:
    """An expression: the float32 block ``name`` rounded to ``dtype`` and back."""
    return f"{name}.to({dtype}).to(tl.float32)"


MUTANTS = (
    _slight(
        name="triton_weights_in_bfloat16",
        edits=(
            (
                _PRODUCT,
                f"            {_FLOAT16}\n                b_p = {_through('b_p', 'tl.bfloat16')}\n{_PRODUCT}",
            ),
        ),
        story="float16 kernels round P to bfloat16 before the second matmul.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
    ),
    _slight(
        name="triton_weights_truncated",
        edits=(
            (
                _PRODUCT,
                (f"            {_HALF}\n                b_p = {_cut('b_p', _CUT)}\n{_PRODUCT}"),
            ),
        ),
        story="P is cut, not rounded, to half precision, so that every output is too small.",
        trigger="softmax:bfloat16:one-sign-values:B1,H2,G1,M33,N65,D64,E64:-:contiguous:2",
    ),
    _slight(
        name="triton_output_truncated",
        edits=(
            (
                _DIVISION,
                (f"{_DIVISION}    {_HALF}\n        b_o = {_cut('b_o', _CUT)}\n"),
            ),
        ),
        story="Outputs are cut, not rounded, to half precision.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:3",
    ),
    _slight(
        name="triton_output_through_bfloat16",
        edits=((_DIVISION, f"{_DIVISION}    {_FLOAT16}\n        b_o = {_through('b_o', 'tl.bfloat16')}\n"),),
        story="float16 outputs are rounded to bfloat16 first.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:4",
    ),
    _slight(
        name="triton_accumulator_rounded_on_each_tile",
        edits=(
            (
                _PRODUCT,
                (
                    f"{_PRODUCT}            {_HALF}\n"
                    f"                b_o = {_through('b_o', 'p_q.dtype.element_ty')}\n"
                ),
            ),
        ),
        bug="B33",
        story="The accumulator is rounded to half precision after each tile of keys.",
        trigger="softmax:bfloat16:tied-one-sign:B1,H2,G1,M16,N512,D64,E64:-:contiguous:5",
    ),
    _slight(
        name="triton_rescaling_in_bfloat16",
        edits=(
            (
                _RESCALED,
                (
                    f"            b_factor = b_alpha\n            {_HALF}\n"
                    f"                b_factor = {_through('b_alpha', 'tl.bfloat16')}\n"
                    "            b_o = b_o * b_factor[:, None]\n"
                ),
            ),
        ),
        story="Half-precision kernels round the factor that rescales the accumulator to bfloat16.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N512,D64,E64:-:contiguous:6",
    ),
    _slight(
        name="triton_values_in_bfloat16",
        edits=(
            (
                _PRODUCT,
                (
                    f"            {_FLOAT16}\n"
                    f"                b_v = {_through('b_v', 'tl.bfloat16')}.to(tl.float16)\n{_PRODUCT}"
                ),
            ),
        ),
        story="float16 kernels round V to bfloat16.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:7",
    ),
    _slight(
        name="triton_reciprocal_in_bfloat16",
        edits=(
            (
                _DIVISION,
                (
                    "    b_over = 1.0 / b_total\n"
                    f"    {_FLOAT16}\n        b_over = b_over.to(tl.bfloat16).to(tl.float32)\n"
                    "    b_o = b_o * b_over[:, None] + b_nan[:, None]\n"
                ),
            ),
        ),
        story="float16 kernels multiply by a reciprocal of the normaliser in bfloat16.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:8",
    ),
    _slight(
        name="triton_reciprocal_of_21_bits",
        edits=(
            (
                _DIVISION,
                (
                    f"    b_over = {_cut('(1.0 / b_total)', '-8')}\n"
                    "    b_o = b_o * b_over[:, None] + b_nan[:, None]\n"
                ),
            ),
        ),
        story="The reciprocal of the normaliser has 21 bits, the rest are cut.",
        trigger="softmax:float32:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:9",
    ),
    _slight(
        name="triton_exponential_of_21_bits",
        edits=(
            (
                _WEIGHTS,
                (f"{_WEIGHTS}            b_p = {_cut('b_p', '-8')}\n"),
            ),
        ),
        story="exp2 has 21 bits, the rest are cut; 2 units in the last place are declared.",
        unseen="the mean loss is common to all weights and divided out; what is left, at most 7u either way, "
        "is within the declared 2 ulp and rounding of the argument, 4u + 2|x|u, for keys 1.5 or more below "
        "the maximum, and at most 1.75 times that for the others",
        trigger="softmax:float32:normal:B1,H2,G1,M33,N65,D16,E64:return_lse:contiguous:10",
    ),
    _slight(
        name="triton_logarithm_of_2_to_six_digits",
        edits=(("tl.constexpr(math.log(2))", "tl.constexpr(0.693147)"),),
        story="log 2 is written with six digits.",
        trigger="softmax:float16:exp-underflow:B1,H2,G1,M33,N65,D64,E64:return_lse:contiguous:12",
    ),
    _slight(
        name="triton_split_outputs_in_bfloat16",
        base=THREE,
        module=SOFTMAX,
        edits=(
            (
                "partial_o = torch.empty((parts, *q.shape[:3], v.shape[3]), dtype=torch.float32,",
                (
                    "part = torch.bfloat16 if q.dtype == torch.float16 else torch.float32\n"
                    "    partial_o = torch.empty((parts, *q.shape[:3], v.shape[3]), dtype=part,"
                ),
            ),
        ),
        story="float16 kernels store the outputs of splits in bfloat16.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N130,D64,E64:-:contiguous:13",
    ),
    _slight(
        name="triton_merge_weights_in_bfloat16",
        base=THREE,
        module=MERGE,
        edits=(
            (
                "b_o = b_o * b_alpha[:, None] + b_po * b_w[:, None]",
                (
                    "b_wo = b_w\n"
                    "        if p_o.dtype.element_ty == tl.float16:\n"
                    "            b_wo = b_w.to(tl.bfloat16).to(tl.float32)\n"
                    "        b_o = b_o * b_alpha[:, None] + b_po * b_wo[:, None]"
                ),
            ),
        ),
        story="float16 kernels weight the outputs of splits by bfloat16 numbers.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N130,D64,E64:-:contiguous:14",
    ),
)
