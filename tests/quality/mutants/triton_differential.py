"""Mutants of differential attention: λ, the two halves and their softmaxes, and the gradients of each."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, NUMERIC

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base="attnproof.kernels.differential:attention", bug="", shows=NUMERIC)
_backward = partial(_mutant, module="attnproof.kernels.differential_backward", mechanism="gradient")

_DIFFERENCE = "b_o = (b_o1 - b_lam * b_o2) + b_nan[:, None]"
_SECOND = "b_max2, b_sum2, b_o2 = absorbed(b_s2, b_max2, b_sum2, b_o2, b_v, EDGE, PRECISION)"
_FIRST_TILE = "first = tl.maximum(i_t * BN - right, 0) // BM * BM"
_DELTA2 = "tl.load(p_delta + s_p + o_r, mask=m_q, other=0.0)\n            b_ds"
_DS1 = "stored(b_p * (b_dp - b_delta1[:, None]), b_k1.dtype)"

MUTANTS = (
    _mutant(
        name="triton_differential_sum_in_place_of_difference",
        mechanism="numerics",
        edits=((_DIFFERENCE, _DIFFERENCE.replace("b_o1 - b_lam", "b_o1 + b_lam")),),
        story="The second attention is added.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:-:contiguous:1",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_differential_normalised_by_lambda",
        mechanism="numerics",
        edits=((_DIFFERENCE, f"{_DIFFERENCE}\n    b_o = b_o * (1 - b_lam)"),),
        story="The difference is multiplied by 1 − λ, which is the model's business.",
        trigger="differential:float32:normal:B1,H2,G1,M16,N33,D16,E16:-:contiguous:2",
    ),
    _mutant(
        name="triton_differential_lambda_of_the_first_head",
        mechanism="pointers",
        edits=(("tl.load(p_lam + i_h * s_lam)", "tl.load(p_lam)"),),
        bug="B50",
        story="Every head subtracts by the first one's λ.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:-:contiguous:3",
    ),
    _mutant(
        name="triton_differential_lambda_of_the_key_head",
        mechanism="pointers",
        edits=(("tl.load(p_lam + i_h * s_lam)", "tl.load(p_lam + i_g * s_lam)"),),
        bug="B28",
        story="A query head takes the λ that has the number of its key head.",
        trigger="differential:bfloat16:normal:B1,H4,G2,M16,N33,D16,E16:-:contiguous:4",
    ),
    _mutant(
        name="triton_differential_halves_at_the_padded_width",
        mechanism="pointers",
        edits=(("HALF = D if PAD_D else BD", "HALF = BD"),),
        bug="B13",
        story="The second halves of q and k are looked for at the padded width.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D40,E16:-:contiguous:5",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _mutant(
        name="triton_differential_second_mask_missing",
        mechanism="masking",
        edits=(("b_s2 = tl.where(m_s, b_s2, -INF)", "b_s2 = tl.where(m_n[None, :], b_s2, -INF)"),),
        bug="B26",
        story="The causal mask is applied to the first scores alone.",
        trigger="differential:float16:normal:B1,H2,G1,M33,N33,D16,E16:causal:contiguous:6",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_differential_second_by_the_first_sum",
        mechanism="numerics",
        edits=(("b_o2 = b_o2 / b_sum2[:, None]", "b_o2 = b_o2 / b_sum1[:, None]"),),
        story="Both attentions are divided by the first one's normaliser.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:-:contiguous:7",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_differential_second_rescaled_by_the_first",
        mechanism="numerics",
        edits=((_SECOND, _SECOND.replace("b_s2, b_max2, b_sum2", "b_s2, b_max1, b_sum2")),),
        bug="B17",
        story="The second softmax is rescaled from the first one's maximum.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N65,D16,E16:-:contiguous:8",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_differential_parts_rounded_to_bfloat16",
        mechanism="accuracy",
        accuracy_only=True,
        edits=(
            (
                "b_o2 = b_o2 / b_sum2[:, None]",
                "b_o2 = (b_o2 / b_sum2[:, None]).to(tl.bfloat16).to(tl.float32)",
            ),
        ),
        story="The second attention is rounded to bfloat16 before it is subtracted, in every dtype.",
        trigger="differential:float16:normal:B1,H2,G1,M65,N65,D16,E32:-:contiguous:9",
    ),
    _mutant(
        name="triton_differential_second_sum_kept_in_nats",
        mechanism="gradient",
        edits=(
            (
                "tl.store(p_row + 3 * s_p + o_r, tl.log2(b_sum2)",
                "tl.store(p_row + 3 * s_p + o_r, tl.log(b_sum2)",
            ),
        ),
        story="The second normaliser is kept for the backward pass as a natural logarithm.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:10",
    ),
    _backward(
        name="triton_differential_lambda_gradient_of_the_wrong_sign",
        edits=(("(-tl.sum(b_sum, 0))", "(tl.sum(b_sum, 0))"),),
        story="dλ has the wrong sign.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:11",
    ),
    _backward(
        name="triton_differential_lambda_gradient_of_the_first_entry",
        edits=(("for i_b in range(B):", "for i_b in range(1):"),),
        bug="B51",
        story="dλ is that of the first batch entry.",
        trigger="differential:float16:normal:B2,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:12",
    ),
    _backward(
        name="triton_differential_lambda_gradient_of_the_first_output",
        edits=(("o_r = (tl.cast(B, tl.int64) + i_b) * H * M", "o_r = (tl.cast(0, tl.int64) + i_b) * H * M"),),
        story="dλ is −Σ dO·o¹, of the first attention.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:13",
    ),
    _backward(
        name="triton_differential_queries_without_lambda",
        edits=(("(b_dq2 * scale * -b_lam)", "(b_dq2 * -scale)"),),
        story="dq² lacks λ.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:14",
    ),
    _backward(
        name="triton_differential_second_weights_added",
        edits=(("b_p2 = b_p2 * -b_lam", "b_p2 = b_p2 * b_lam"),),
        story="dv and dk² take the second attention with the wrong sign.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:15",
    ),
    _backward(
        name="triton_differential_values_from_the_first",
        edits=(("stored(b_p1 + b_p2, b_g.dtype)", "stored(b_p1, b_g.dtype)"),),
        story="dv has the first attention's weights alone.",
        trigger="differential:bfloat16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:16",
    ),
    _backward(
        name="triton_differential_one_delta_for_both_queries",
        edits=(("b_p * (b_dp - b_delta2[:, None])", "b_p * (b_dp - b_delta1[:, None])"),),
        bug="B30",
        story="dq² subtracts the first attention's δ.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:17",
    ),
    _backward(
        name="triton_differential_one_delta_for_both_keys",
        edits=(
            (
                "tl.load(p_delta + s_p + o_r, mask=m_q, other=0.0)\n            b_ds",
                "b_delta\n            b_ds",
            ),
        ),
        bug="B30",
        story="dk² subtracts the first attention's δ.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:18",
    ),
    _backward(
        name="triton_differential_first_query_tile_rounded_up",
        edits=((_FIRST_TILE, "first = (tl.maximum(i_t * BN - right, 0) + BM - 1) // BM * BM"),),
        bug="B01",
        story="The first tile of queries that sees a tile of keys is rounded up: part of a tile is lost.",
        trigger="differential:float16:normal:B1,H1,G1,M65,N65,D16,E16:causal,cotangents=normal:contiguous:19",
    ),
    _backward(
        name="triton_differential_keys_of_the_first_query",
        edits=(("tl.minimum((i_m + 1) * BM, M) + right", "i_m * BM + 1 + right"),),
        bug="B59",
        story="dq sums over the keys that the tile's first query sees, by tiles of keys.",
        trigger="differential:float16:normal:B1,H1,G1,M65,N65,D16,E16:causal,cotangents=normal:contiguous:20",
    ),
    _backward(
        name="triton_differential_first_head_of_the_group",
        edits=(("for i_group in range(GROUP):", "for i_group in range(1):"),),
        bug="B28",
        story="dk and dv are those of the first query head of the group.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:21",
    ),
    _backward(
        name="triton_differential_halves_of_keys_swapped",
        edits=(
            ("tl.store(p_dk, (b_dk1 * scale)", "tl.store(p_dk, (b_dk2 * scale)"),
            ("tl.store(p_dk + D, (b_dk2 * scale)", "tl.store(p_dk + D, (b_dk1 * scale)"),
        ),
        story="The halves of dk are swapped.",
        trigger="differential:float32:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:22",
    ),
    _backward(
        name="triton_differential_cotangent_assumed_contiguous",
        edits=(("shared = (*strides(q, k, v, g),", "shared = (*strides(q, k, v, partial[0]),"),),
        bug="B56",
        story="The cotangent is read by the strides of the output.",
        trigger="differential:float16:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:transposed:23",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _backward(
        name="triton_differential_backward_in_tf32",
        mechanism="accuracy",
        edits=(("**blocks(q, v, tiles)}", '**blocks(q, v, tiles), "PRECISION": "tf32"}'),),
        story="The backward pass rounds the operands of float32 matmuls to tf32, where ieee is declared.",
        trigger="differential:float32:normal:B1,H2,G1,M16,N33,D16,E16:cotangents=normal:contiguous:24",
    ),
    _backward(
        name="triton_differential_score_gradients_in_bfloat16",
        mechanism="accuracy",
        accuracy_only=True,
        edits=((_DS1, f"{_DS1}\n        b_ds = b_ds.to(tl.bfloat16).to(b_k1.dtype)"),),
        story="dS¹ is rounded to bfloat16 for dq, in every dtype.",
        trigger="differential:float16:normal:B1,H2,G1,M65,N65,D16,E16:cotangents=normal:contiguous:25",
    ),
)
