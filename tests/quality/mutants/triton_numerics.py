"""Mutants of the Triton kernels that compute another formula: rescaling, units, soft caps, biases, merges."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import MERGE, NUMERIC, SOFTMAX, THREE, WHOLE

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base=WHOLE, mechanism="numerics", bug="", shows=NUMERIC)

_CAPPED = "            if SOFTCAP:\n                b_s = capped(b_s) * cap\n"
_SELECT = "                b_s = tl.where(m_s, b_s, -INF)\n"
_MERGE = "b_o = b_o * b_alpha[:, None] + b_po * b_w[:, None]"
_SUM = "b_sum = b_sum * b_alpha + tl.sum(b_p, 1)"
_RESCALE = "b_o = b_o * b_alpha[:, None]\n            b_o = tl.dot"

_NEIGHBOUR = """\
o_row = tl.arange(0, BM)
            b_swap = tl.where((o_row[:, None] ^ 1) == o_row[None, :], b_alpha[None, :], 0.0)
            b_o = b_o * tl.sum(b_swap, 1)[:, None]
            b_o = tl.dot"""

_WITHOUT_SINK = """\
b_seen = b_total
    if p_sinks is not None:
        b_sink = tl.load(p_sinks + i_h * s_sink).to(tl.float32) * (LOG2E / UNIT)
        b_seen -= tl.exp2((b_sink - b_max) * UNIT)
    b_lse = b_max * (LN2 * UNIT) + tl.log2(b_seen) * LN2"""

MUTANTS = (
    _mutant(
        name="triton_accumulator_not_rescaled",
        edits=((_RESCALE, "b_o = tl.dot"),),
        story="The accumulator is not rescaled when the maximum rises.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N129,D64,E64:-:contiguous:1",
    ),
    _mutant(
        name="triton_sum_not_rescaled",
        edits=(("b_sum = b_sum * b_alpha + tl.sum(b_p, 1)", "b_sum = b_sum + tl.sum(b_p, 1)"),),
        story="The normaliser is not rescaled when the maximum rises.",
        trigger="softmax:bfloat16:normal:B1,H1,G1,M16,N129,D64,E64:-:contiguous:2",
    ),
    _mutant(
        name="triton_rescaled_on_masked_tiles_only",
        edits=(
            (_RESCALE, "if EDGE:\n                b_o = b_o * b_alpha[:, None]\n            b_o = tl.dot"),
        ),
        story="The accumulator is rescaled on tiles under a mask, and not on those that all rows see.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N128,D64,E64:-:contiguous:3",
    ),
    _mutant(
        name="triton_one_rescaling_for_the_tile",
        edits=((_RESCALE, "b_o = b_o * tl.min(b_alpha, 0)\n            b_o = tl.dot"),),
        bug="B17",
        story="All rows of a tile rescale their accumulators by the factor of one of them.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N129,D64,E64:-:contiguous:4",
    ),
    _mutant(
        name="triton_rescaled_by_the_neighbour",
        edits=(
            (
                _RESCALE,
                _NEIGHBOUR,
            ),
        ),
        bug="B17",
        story="Each row rescales its accumulator by the factor of the row beside it.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N129,D64,E64:-:contiguous:5",
    ),
    _mutant(
        name="triton_small_rises_not_rescaled",
        edits=(
            (
                _RESCALE,
                _RESCALE.replace("b_alpha", "tl.where(b_alpha > 0.75, 1.0, b_alpha)"),
            ),
        ),
        bug="FlashAttention-4",
        story="Conditional rescaling gone wrong: a small rise of the maximum rescales the sum alone.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N257,D64,E64:-:contiguous:6",
    ),
    _mutant(
        name="triton_log2e_forgotten",
        edits=(("score_scale=scale * bits if softcap is None", "score_scale=scale if softcap is None"),),
        story="exp2 is taken of scores in nats, except with a bias or a soft cap.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:7",
    ),
    _mutant(
        name="triton_log2e_forgotten_after_the_cap",
        edits=(("cap=(softcap or 1.0) * bits", "cap=softcap or 1.0"),),
        story="exp2 is taken of capped scores in nats.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N33,D64,E64:softcap=30.0:contiguous:8",
    ),
    _mutant(
        name="triton_softcap_times_the_score",
        edits=((_CAPPED, "            if SOFTCAP:\n                b_s = b_s * cap * capped(b_s)\n"),),
        bug="B10",
        story="The cap is score·tanh(score / cap).",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N33,D64,E64:softcap=2.0:contiguous:9",
    ),
    _mutant(
        name="triton_softcap_after_the_mask",
        edits=(
            (_CAPPED, "            if SOFTCAP and not EDGE:\n                b_s = capped(b_s) * cap\n"),
            (_SELECT, f"{_SELECT}                if SOFTCAP:\n                    b_s = capped(b_s) * cap\n"),
        ),
        story="The cap is applied after the mask and turns −inf into −cap.",
        trigger="softmax:float16:normal:B1,H1,G1,M33,N33,D64,E64:causal,softcap=2.0:contiguous:10",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_softcap_after_the_bias",
        edits=(
            (
                _CAPPED,
                "            if SOFTCAP and p_bias is None:\n                b_s = capped(b_s) * cap\n",
            ),
            (
                "                    b_s += b_b\n",
                "                    b_s += b_b / cap if SOFTCAP else b_b\n",
            ),
            (
                _SELECT,
                (
                    "                if SOFTCAP and p_bias is not None:\n"
                    f"                    b_s = capped(b_s) * cap\n{_SELECT}"
                ),
            ),
        ),
        story="The bias is added before the cap.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N33,D64,E64:softcap=2.0,bias=11mn:contiguous:11",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_bias_scaled",
        edits=(("b_s += b_b", "b_s += b_b * score_scale"),),
        story="The bias is scaled like the scores.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N33,D64,E64:bias=11mn:contiguous:12",
    ),
    _mutant(
        name="triton_softcap_polynomial_too_far",
        edits=(("tl.abs(b_x) < 0.625, b_small", "tl.abs(b_x) < 1.25, b_small"),),
        story="The polynomial of tanh is used where it no longer holds.",
        trigger="softmax:float32:normal:B1,H1,G1,M16,N33,D64,E64:softcap=2.0:contiguous:13",
    ),
    _mutant(
        name="triton_lse_in_bits",
        edits=(
            (
                "b_lse = b_max * (LN2 * UNIT) + tl.log2(b_total) * LN2",
                "b_lse = b_max * (LN2 * UNIT) + tl.log2(b_total)",
            ),
        ),
        story="The logarithm of the sum is returned to base 2.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N33,D64,E64:return_lse:contiguous:14",
    ),
    _mutant(
        name="triton_lse_without_the_sink",
        edits=(
            (
                "b_lse = b_max * (LN2 * UNIT) + tl.log2(b_total) * LN2",
                _WITHOUT_SINK,
            ),
        ),
        story="The log-sum-exp leaves the sink out, which the output has.",
        trigger="softmax:float16:normal:B1,H2,G1,M16,N33,D64,E64:sinks,return_lse:contiguous:15",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_sink_in_each_split",
        base=THREE,
        module=SOFTMAX,
        edits=(
            (
                "q, k, v, bias, None, None, partial_o",
                "q, k, v, bias, sinks, None, partial_o",
            ),
        ),
        story="The sink is counted once in each split and once more in the merge.",
        trigger="softmax:float16:normal:B1,H2,G1,M16,N130,D64,E64:sinks:contiguous:16",
        shows=(*NUMERIC, "empty-row"),
    ),
    _mutant(
        name="triton_sink_scaled",
        edits=(
            (
                "tl.load(p_sinks + i_h * s_sink).to(tl.float32) * (LOG2E / UNIT)",
                "tl.load(p_sinks + i_h * s_sink).to(tl.float32) * score_scale",
            ),
        ),
        story="The sink is scaled like a score.",
        trigger="softmax:float16:normal:B1,H2,G1,M16,N7,D64,E64:sinks:contiguous:17",
        shows=(*NUMERIC, "empty-row"),
    ),
    _mutant(
        name="triton_merge_weights_swapped",
        base=THREE,
        module=MERGE,
        edits=(
            (
                _MERGE,
                "b_o = b_o * b_w[:, None] + b_po * b_alpha[:, None]",
            ),
        ),
        story="The merge weights what it has by the new split's weight, and the other way round.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N130,D64,E64:-:contiguous:18",
    ),
    _mutant(
        name="triton_merge_lse_in_bits",
        base=THREE,
        module=MERGE,
        edits=(("b_max + tl.log2(b_total) * LN2", "b_max + tl.log2(b_total)"),),
        story="The merge returns the logarithm of its sum to base 2.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N130,D64,E64:return_lse:contiguous:19",
        shows=(*NUMERIC, "empty-row"),
    ),
    _mutant(
        name="triton_merge_weights_in_base_2",
        base=THREE,
        module=MERGE,
        edits=(
            ("b_w = tl.exp2((b_lse - b_shift) * LOG2E)", "b_w = tl.exp2(b_lse - b_shift)"),
            ("b_alpha = tl.exp2((b_max - b_shift) * LOG2E)", "b_alpha = tl.exp2(b_max - b_shift)"),
        ),
        story="The merge takes exp2 of log-sum-exps in nats.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N130,D64,E64:-:contiguous:20",
    ),
    _mutant(
        name="triton_small_weights_dropped",
        edits=(
            (
                _SUM,
                f"b_p = tl.where(b_p < 0.0009765625, 0.0, b_p)\n            {_SUM}",
            ),
        ),
        bug="Skip Softmax (BLASST)",
        story="Weights below 2⁻¹⁰ of the running maximum are dropped.",
        trigger="softmax:float16:attention-sink:B1,H1,G1,M16,N129,D64,E64:-:contiguous:21",
    ),
    _mutant(
        name="triton_epsilon_in_the_normaliser",
        edits=(
            (
                "b_total = tl.where(b_sum == 0, 1.0, b_sum)",
                "b_total = tl.where(b_sum == 0, 1.0, b_sum + 1e-2)",
            ),
        ),
        story="A small number is added to the normaliser against division by zero.",
        trigger="softmax:float16:descending:B1,H1,G1,M16,N33,D64,E64:-:contiguous:22",
        shows=(*NUMERIC, "empty-row"),
    ),
)
