"""Mutants of ReLU and ReLU² attention, forward and backward: the kink, the power, the normaliser, storage."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import NUMERIC

__all__ = ["MUTANTS"]

_BASE = "attnproof.kernels.relu:attention"
_POINTWISE = "attnproof.kernels.pointwise"

_formula = partial(Mutant, base=_BASE, mechanism="numerics", bug="", shows=NUMERIC)
_slope = partial(_formula, mechanism="gradient")
_gradient = partial(_slope, module=_POINTWISE)

_STEP = "tl.where(b_x <= 0, 0.0, 1.0)"
_SQUARE = "    return b_r * b_r\n"
_SQUARE_SLOPE = "return b_r * b_r, 2.0 * b_r"
_RELU = "def relu(b_x):\n    return tl.where(b_x <= 0, 0.0, b_x)"
_NORMALIZER = "1.0 if normalizer is None else float(normalizer)"

_SEEN_KEYS = """\
b_count = tl.zeros([BM], dtype=tl.float32) + divisor
    if CAUSAL:
        b_seen = tl.minimum(tl.maximum(o_m + right + 1, 1), N).to(tl.float32)
        b_count = tl.where(b_count == 1.0, b_count, b_seen)
    b_o = b_o / b_count[:, None]"""

MUTANTS = (
    _slope(
        name="triton_relu_step_at_zero_is_one",
        edits=((_STEP, _STEP.replace("<=", "<")),),
        story="The derivative of relu at 0 is 1.",
        trigger="relu:float32:exact-kinks:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:1",
    ),
    _slope(
        name="triton_relu_step_at_zero_is_a_half",
        edits=((_STEP, "tl.where(b_x < 0, 0.0, tl.where(b_x == 0, 0.5, 1.0))"),),
        story="The derivative of relu at 0 is 1/2.",
        trigger="relu:float16:exact-kinks:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:2",
    ),
    _slope(
        name="triton_relu_leaky_slope",
        edits=((_STEP, "tl.where(b_x <= 0, 0.01, 1.0)"),),
        story="The derivative of relu below 0 is 0.01.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:3",
    ),
    _slope(
        name="triton_relu_dead_in_float8",
        edits=((_STEP, "tl.where(b_x <= 0.0009765625, 0.0, 1.0)"),),
        story="A key counts as dead where its score is 0 in float8 (e4m3), up to 2⁻¹⁰.",
        trigger="relu:float32:near-uniform:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:4",
    ),
    _slope(
        name="triton_relu_square_slope_without_two",
        edits=((_SQUARE_SLOPE, "return b_r * b_r, b_r"),),
        story="The derivative of relu² lacks the factor 2.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:power=2,cotangents=normal:contiguous:5",
    ),
    _slope(
        name="triton_relu_square_slope_is_a_step",
        edits=((_SQUARE_SLOPE, "return b_r * b_r, tl.where(b_x <= 0, 0.0, 2.0)"),),
        story="The derivative of relu² is that of 2·relu.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:power=2,cotangents=normal:contiguous:6",
    ),
    _slope(
        name="triton_relu_square_slope_without_relu",
        edits=((_SQUARE_SLOPE, "return b_r * b_r, 2.0 * b_x"),),
        story="The derivative of relu² is 2·s also where s is negative.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:power=2,cotangents=normal:contiguous:7",
    ),
    _gradient(
        name="triton_relu_normalizer_missing_in_queries_and_keys",
        edits=(("factor = weighting.scale / weighting.divisor", "factor = weighting.scale"),),
        story="dQ and dK are not divided by the normaliser.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:normalizer=33.0,cotangents=normal:contiguous:8",
    ),
    _gradient(
        name="triton_relu_normalizer_missing_in_values",
        edits=(("b_dv = b_dv / divisor + b_v_nan", "b_dv = b_dv + b_v_nan"),),
        story="dV is not divided by the normaliser.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:normalizer=33.0,cotangents=normal:contiguous:9",
    ),
    _gradient(
        name="triton_relu_keys_unscaled",
        edits=(("b_dk = b_dk * factor + b_k_nan", "b_dk = b_dk / divisor + b_k_nan"),),
        story="dK lacks the scale.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:10",
    ),
    _gradient(
        name="triton_relu_value_gradient_of_the_step",
        edits=(
            (
                "b_dv = weighted(b_p, b_do, b_dv, WIDE)",
                "b_dv = weighted(b_slope * (b_p > 0), b_do, b_dv, WIDE)",
            ),
        ),
        story="dV sums dO over the keys that are alive, without their weights.",
        trigger="relu:bfloat16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:11",
    ),
    _formula(
        name="triton_relu_normalizer_of_the_padded_length",
        edits=((_NORMALIZER, "1.0 if normalizer is None else float(-(-normalizer // 16) * 16)"),),
        story="The normaliser is rounded up to a multiple of 16, as N would be by padding.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:normalizer=33.0:contiguous:12",
    ),
    _formula(
        name="triton_relu_normalizer_squared_with_the_power",
        edits=((_NORMALIZER, "1.0 if normalizer is None else float(normalizer) ** power"),),
        story="relu² is divided by the normaliser's square.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:normalizer=33.0,power=2:contiguous:13",
    ),
    _formula(
        name="triton_relu_normalizer_counts_seen_keys",
        module=_POINTWISE,
        edits=(("b_o = b_o / divisor", _SEEN_KEYS),),
        story="Under a causal mask a row is divided by the number of keys that it sees.",
        trigger="relu:float16:normal:B1,H1,G1,M33,N33,D16,E16:causal,normalizer=33.0:contiguous:14",
    ),
    _formula(
        name="triton_relu_square_keeps_the_sign",
        edits=((_SQUARE, "    return b_x * tl.abs(b_x)\n"),),
        story="relu² is s·|s|, which is negative for negative scores.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:power=2:contiguous:15",
    ),
    _formula(
        name="triton_relu_square_of_all_scores",
        edits=((_SQUARE, "    return b_x * b_x\n"),),
        story="relu² is s², also where s is negative.",
        trigger="relu:bfloat16:normal:B1,H1,G1,M17,N33,D16,E16:power=2:contiguous:16",
    ),
    _formula(
        name="triton_relu_scale_outside_the_square",
        edits=(("scale=scale,", "scale=scale if power == 1 else abs(scale) ** 0.5,"),),
        story="With power 2 the scale multiplies relu(q·k)², and is not squared with it.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D16,E16:power=2:contiguous:17",
    ),
    _formula(
        name="triton_relu_clipped_at_six",
        edits=((_RELU, "def relu(b_x):\n    return tl.where(b_x <= 0, 0.0, tl.where(b_x > 6, 6.0, b_x))"),),
        story="Weights end at 6.",
        trigger="relu:float16:large-logits:B1,H1,G1,M17,N33,D16,E16:-:contiguous:18",
    ),
    _formula(
        name="triton_relu_scores_in_half_before_the_square",
        edits=((_SQUARE, "    b_r = b_r.to(tl.float16).to(tl.float32)\n    return b_r * b_r\n"),),
        story="Scores are rounded to float16 before they are squared, in every dtype.",
        trigger="relu:float32:normal:B1,H1,G1,M17,N33,D16,E16:power=2:contiguous:19",
    ),
    _formula(
        name="triton_relu_dead_keys_of_the_tile",
        edits=(
            (_RELU, "def relu(b_x):\n    return tl.where(b_x <= 0.1 * tl.max(b_x, 1)[:, None], 0.0, b_x)"),
        ),
        bug="Skip Softmax (BLASST)",
        story="Weights below a tenth of the row's largest in a tile are dropped.",
        trigger="relu:float16:normal:B1,H1,G1,M17,N33,D64,E64:-:contiguous:20",
    ),
)
