"""Mutants of the Triton kernels that store or compute something in a precision which they do not declare."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import NUMERIC, SOFTMAX, THREE, WHOLE

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base=WHOLE, mechanism="accuracy", bug="", shows=NUMERIC)

_SCORES = "b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * score_scale\n"
_WEIGHTS = "b_p = tl.exp2((b_s - b_shift[:, None]) * UNIT)"
_PRODUCT = "b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)"
_DIVISION = "b_o = b_o / b_total[:, None] + b_nan[:, None]"
_SUM = "b_sum = b_sum * b_alpha + tl.sum(b_p, 1)"
_LSE = "tl.store(p_lse + o_row, b_lse, mask=m_q)"

# 2^x for x ≤ 0 by a polynomial on [−1/2, 1/2], least squares of the relative error at Chebyshev points:
# it errs by at most 2^-9.1 (degree 2) and 2^-13.7 (degree 3, as in FlashAttention-4).
_QUICK_EXP2 = """\
@triton.jit
def quick_exp2(b_x, DEGREE: tl.constexpr):
    b_x = tl.maximum(b_x, -125.0)
    b_i = tl.floor(b_x + 0.5)
    b_f = b_x - b_i
    if DEGREE == 2:
        b_y = (0.2378304 * b_f + 0.7033965) * b_f + 1.0005137
    else:
        b_y = ((0.05508868 * b_f + 0.24260405) * b_f + 0.69327624) * b_f + 0.99992894
    return b_y * tl.exp2(b_i)


@triton.jit
def tile_range("""


def _quick(degree: int) -> tuple[tuple[str, str], ...]:
    """Edits that put the polynomial in place of exp2 for P; masked scores keep weight 0."""
    weights = f"b_x = (b_s - b_shift[:, None]) * UNIT\n            b_p = quick_exp2(b_x, {degree})"
    kept = f"{weights}\n            b_p = tl.where(b_x > -125.0, b_p, 0.0)"
    return (("@triton.jit\ndef tile_range(", _QUICK_EXP2), (_WEIGHTS, kept))


MUTANTS = (
    _mutant(
        name="triton_weights_in_e4m3",
        edits=((_PRODUCT, _PRODUCT.replace("b_p.to(b_v.dtype)", "b_p.to(tl.float8e4nv).to(b_v.dtype)")),),
        bug="FlashAttention-3 fp8",
        story="P is rounded to float8 e4m3 before the second matmul.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N65,D64,E64:-:contiguous:1",
    ),
    _mutant(
        name="triton_weights_in_e5m2",
        edits=((_PRODUCT, _PRODUCT.replace("b_p.to(b_v.dtype)", "b_p.to(tl.float8e5).to(b_v.dtype)")),),
        story="P is rounded to float8 e5m2 before the second matmul.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N65,D64,E64:-:contiguous:2",
    ),
    _mutant(
        name="triton_float32_products_in_tf32",
        edits=(("LAYOUT=layout, PRECISION=input_precision,", 'LAYOUT=layout, PRECISION="tf32",'),),
        story="float32 matmuls round their operands to tf32, where ieee is declared.",
        trigger="softmax:float32:normal:B1,H2,G1,M17,N65,D64,E64:-:contiguous:3",
    ),
    _mutant(
        name="triton_float32_values_in_tf32",
        edits=((_PRODUCT, _PRODUCT.replace("input_precision=PRECISION", 'input_precision="tf32"')),),
        story="The second matmul of float32 kernels runs in tf32, the first does not.",
        trigger="softmax:float32:normal:B1,H2,G1,M17,N65,D64,E64:-:contiguous:4",
    ),
    _mutant(
        name="triton_products_in_three_bfloat16_parts",
        edits=(("LAYOUT=layout, PRECISION=input_precision,", 'LAYOUT=layout, PRECISION="bf16x3",'),),
        story="float32 matmuls are made of three bfloat16 products, where ieee is declared.",
        trigger="softmax:float32:normal:B1,H2,G1,M17,N65,D64,E64:-:contiguous:20",
    ),
    _mutant(
        name="triton_exponential_of_degree_2",
        edits=_quick(2),
        story="exp2 is a polynomial of degree 2, good for 9 bits.",
        trigger="softmax:float32:normal:B1,H2,G1,M17,N65,D64,E64:-:contiguous:5",
        shows=(*NUMERIC, "empty-row"),
    ),
    _mutant(
        name="triton_exponential_of_degree_3",
        edits=_quick(3),
        bug="FlashAttention-4",
        story="exp2 is a polynomial of degree 3, good for 13 bits.",
        trigger="softmax:float32:normal:B1,H2,G1,M17,N65,D64,E64:-:contiguous:6",
        shows=(*NUMERIC, "empty-row"),
    ),
    _mutant(
        name="triton_exponent_in_float16",
        edits=(
            (
                _WEIGHTS,
                "b_p = tl.exp2(((b_s - b_shift[:, None]) * UNIT).to(tl.float16).to(tl.float32))",
            ),
        ),
        story="The argument of exp2 is rounded to float16, as the packed half instruction does.",
        trigger="softmax:float16:correlated:B1,H2,G1,M17,N65,D64,E64:return_lse:contiguous:7",
    ),
    _mutant(
        name="triton_scores_stored_narrow",
        edits=((_SCORES, f"{_SCORES}            b_s = b_s.to(p_q.dtype.element_ty).to(tl.float32)\n"),),
        story="Scores are stored in the inputs' dtype.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N65,D64,E64:return_lse:contiguous:8",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_bias_added_narrow",
        edits=(("b_s += b_b\n", "b_s = (b_s + b_b).to(p_q.dtype.element_ty).to(tl.float32)\n"),),
        story="The sum of score and bias is rounded to the inputs' dtype.",
        trigger="softmax:bfloat16:normal:B1,H2,G1,M17,N65,D64,E64:bias=11mn,return_lse:contiguous:9",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_queries_scaled_narrow",
        edits=(
            (
                "b_q = tl.load(p_q + o_q, mask=m_qd, other=0.0)",
                (
                    "b_q = tl.load(p_q + o_q, mask=m_qd, other=0.0)\n"
                    "    b_q = (b_q.to(tl.float32) * score_scale).to(b_q.dtype)"
                ),
            ),
            (_SCORES, _SCORES.replace(" * score_scale", "")),
        ),
        story="Queries are scaled and rounded to the inputs' dtype before the first matmul.",
        trigger="softmax:bfloat16:normal:B1,H2,G1,M17,N65,D64,E64:return_lse:contiguous:10",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_sum_stored_narrow",
        edits=((_SUM, f"{_SUM}\n            b_sum = b_sum.to(p_q.dtype.element_ty).to(tl.float32)"),),
        story="The running sum is rounded to the inputs' dtype after each tile.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N65,D64,E64:return_lse:contiguous:11",
    ),
    _mutant(
        name="triton_sum_of_narrow_weights",
        edits=(
            (
                _SUM,
                "b_sum = b_sum * b_alpha + tl.sum(b_p.to(p_q.dtype.element_ty).to(tl.float32), 1)",
            ),
        ),
        story="The normaliser adds up P as rounded for the second matmul, which the log-sum-exp then has.",
        trigger="softmax:bfloat16:normal:B1,H2,G1,M17,N65,D64,E64:return_lse:contiguous:12",
    ),
    _mutant(
        name="triton_normaliser_half_a_percent_off",
        edits=((_DIVISION, "b_o = b_o / (1.005 * b_total[:, None]) + b_nan[:, None]"),),
        story="Outputs are divided by half a percent too much.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N65,D64,E64:-:contiguous:13",
    ),
    _mutant(
        name="triton_scale_half_a_percent_off",
        edits=(
            (
                "score_scale=scale * bits if softcap is None",
                "score_scale=scale * 1.005 * bits if softcap is None",
            ),
        ),
        story="Scores are half a percent too large.",
        trigger="softmax:float32:normal:B1,H2,G1,M17,N65,D64,E64:-:contiguous:14",
    ),
    _mutant(
        name="triton_log2e_to_five_digits",
        edits=(("tl.constexpr(math.log2(math.e))", "tl.constexpr(1.4427)"),),
        story="log₂ e is written with five digits.",
        trigger="softmax:float32:normal:B1,H2,G1,M17,N65,D64,E64:return_lse:contiguous:15",
    ),
    _mutant(
        name="triton_lse_stored_in_bfloat16",
        edits=((_LSE, _LSE.replace("b_lse,", "b_lse.to(tl.bfloat16).to(tl.float32),")),),
        story="The log-sum-exp is rounded to bfloat16.",
        trigger="softmax:bfloat16:normal:B1,H2,G1,M17,N65,D64,E64:return_lse:contiguous:16",
    ),
    _mutant(
        name="triton_lse_stored_narrow",
        edits=((_LSE, _LSE.replace("b_lse,", "b_lse.to(p_q.dtype.element_ty).to(tl.float32),")),),
        story="The log-sum-exp is rounded to the inputs' dtype.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N65,D64,E64:return_lse:contiguous:17",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_split_lse_in_bfloat16",
        base=THREE,
        module=SOFTMAX,
        edits=(
            (
                "partial_lse = torch.empty((parts, *q.shape[:3]), dtype=torch.float32",
                "partial_lse = torch.empty((parts, *q.shape[:3]), dtype=torch.bfloat16",
            ),
        ),
        story="The log-sum-exps of splits are stored in bfloat16, and their weights err by a percent.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N130,D64,E64:-:contiguous:18",
    ),
    _mutant(
        name="triton_split_lse_narrow",
        base=THREE,
        module=SOFTMAX,
        edits=(
            (
                "partial_lse = torch.empty((parts, *q.shape[:3]), dtype=torch.float32",
                "partial_lse = torch.empty((parts, *q.shape[:3]), dtype=q.dtype",
            ),
        ),
        story="The log-sum-exps of splits are stored in the inputs' dtype.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N130,D64,E64:return_lse:contiguous:19",
        shows=(*NUMERIC, "nonfinite"),
    ),
)
