"""Mutants of the Triton kernels that go wrong at infinities, NaN, rows without keys and extreme logits."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import MERGE, NUMERIC, SOFTMAX, THREE, WHOLE

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base=WHOLE, mechanism="special-values", bug="", shows=(*NUMERIC, "nonfinite"))

_SHIFT = "b_shift = tl.where(b_new == -INF, 0.0, b_new) if EDGE else b_new"
_LSE = "b_lse = b_max * (LN2 * UNIT) + tl.log2(b_total) * LN2"
_SELECT = "b_s = tl.where(m_s, b_s, -INF)"
_ISOLATED = "b_v, b_nan = isolated(b_v, m_s, b_nan)"

_FUSED = """\
            if EDGE or SOFTCAP:
                b_p = tl.exp2((b_s - b_shift[:, None]) * UNIT)
            else:
                b_zero = tl.zeros_like(b_raw)
                b_p = tl.exp2(tl.fma(b_raw, b_zero + score_scale, b_zero - b_shift[:, None]))
"""

_LATE_SINK = """\
if p_sinks is not None:
        b_sum += tl.exp2(b_sink - b_max * UNIT)
    b_total = tl.where(b_sum == 0, 1.0, b_sum)"""

_SPREAD = """\
b_hit = tl.max(tl.where(m_s, b_top[None, :], 0), 1)
        b_hit = tl.zeros_like(b_hit) + tl.max(b_hit, 0)"""

MUTANTS = (
    _mutant(
        name="triton_no_maximum_subtracted",
        edits=(
            (_SHIFT, "b_shift = tl.zeros_like(b_new)"),
            ("b_alpha = tl.exp2((b_max - b_shift) * UNIT)", "b_alpha = tl.full([BM], 1.0, dtype=tl.float32)"),
            ("b_sum += 1.0  # exp2(0)", "b_sum += tl.exp2(b_max * UNIT)  # exp2(0)"),
            (_LSE, "b_lse = tl.log2(b_sum) * LN2"),
        ),
        story="No maximum is subtracted before the exponential.",
        trigger="softmax:float32:exp-overflow:B1,H1,G1,M17,N33,D64,E64:-:contiguous:1",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_masked_maximum_subtracted",
        edits=((_SHIFT, "b_shift = b_new"),),
        bug="B03",
        story="A row whose keys so far are all masked subtracts −inf from −inf.",
        trigger="softmax:float16:masked:B1,H2,G1,M17,N33,D64,E64:bias=b1mn:contiguous:2",
        shows=("nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_finite_first_maximum",
        edits=(
            (
                "b_max = tl.full([BM], -INF, dtype=tl.float32)",
                "b_max = tl.full([BM], -5e4, dtype=tl.float32)",
            ),
        ),
        bug="B06",
        story="The running maximum begins at −50000 bits, which logits below it never raise.",
        trigger="softmax:float32:below-sentinel:B1,H1,G1,M17,N33,D1,E5:-:contiguous:3",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_masked_score_is_finite",
        edits=((_SELECT, "b_s = tl.where(m_s, b_s, -10000.0)"),),
        bug="B06",
        story="Masked scores are −10000 bits, more than logits below that; rows without keys have weights.",
        trigger="softmax:bfloat16:below-sentinel:B1,H1,G1,M17,N33,D64,E64:causal:contiguous:4",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_mask_added",
        edits=((_SELECT, "b_s += tl.where(m_s, 0.0, -INF)"),),
        bug="B21",
        story="−inf is added to masked scores, where +inf and NaN in an unseen key survive.",
        trigger="softmax:float16:unseen-nonfinite:B1,H2,G1,M33,N33,D64,E64:causal:contiguous:5",
        shows=("nonfinite", "certain", "empty-row"),
    ),
    _mutant(
        name="triton_unseen_values_multiplied",
        edits=((_ISOLATED, "b_v = b_v"),),
        bug="B21",
        story="0·NaN: a NaN or an infinity in the value of a masked key reaches the row.",
        trigger="softmax:float16:unseen-nonfinite:B1,H2,G1,M33,N33,D64,E64:causal:contiguous:6",
        shows=("nonfinite", "certain", "empty-row"),
    ),
    _mutant(
        name="triton_values_under_the_bias_leak",
        edits=(("m_s = m_s & (b_b != -INF)\n", "b_b = b_b\n"),),
        bug="B24",
        story="A key that a bias of −inf masks counts as seen where non-finite values are looked for.",
        trigger="softmax:bfloat16:unseen-nonfinite:B1,H1,G1,M17,N33,D64,E64:bias=11mn:contiguous:7",
        shows=("nonfinite", "certain", "empty-row"),
    ),
    _mutant(
        name="triton_poison_spreads_over_the_tile",
        edits=(
            (
                "b_hit = tl.max(tl.where(m_s, b_top[None, :], 0), 1)",
                _SPREAD,
            ),
        ),
        story="One row that sees a NaN in V makes all rows of its tile NaN.",
        trigger="softmax:float16:unseen-nonfinite:B1,H2,G1,M33,N33,D64,E64:causal:contiguous:8",
        shows=("nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_no_keys_is_nan",
        edits=(("b_total = tl.where(b_sum == 0, 1.0, b_sum)", "b_total = b_sum"),),
        bug="B08",
        story="A row that sees no key is 0/0.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N17,D64,E64:causal:contiguous:9",
        shows=("empty-row", "nonfinite"),
    ),
    _mutant(
        name="triton_no_keys_has_a_finite_lse",
        edits=(
            (_LSE, "b_lse = tl.where(b_max == -INF, 0.0, b_max) * (LN2 * UNIT) + tl.log2(b_total) * LN2"),
        ),
        bug="B05",
        story="The log-sum-exp of a row without keys is 0 instead of −inf.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N17,D64,E64:causal,return_lse:contiguous:10",
        shows=("empty-row", "nonfinite", "certain"),
    ),
    _mutant(
        name="triton_empty_split_has_a_finite_lse",
        base=THREE,
        module=SOFTMAX,
        edits=(
            (_LSE, "b_lse = tl.where(b_max == -INF, 0.0, b_max) * (LN2 * UNIT) + tl.log2(b_total) * LN2"),
        ),
        bug="B05",
        story="A split without keys has log-sum-exp 0, so that zeros are merged in with weight.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N130,D64,E64:window=20..:contiguous:11",
        shows=(*NUMERIC, "empty-row", "nonfinite"),
    ),
    _mutant(
        name="triton_merge_of_empty_splits_is_nan",
        base=THREE,
        module=MERGE,
        edits=(("b_shift = tl.where(b_new == -INF, 0.0, b_new)", "b_shift = b_new"),),
        bug="B03",
        story="The merge subtracts −inf from −inf where no split so far has keys.",
        trigger="softmax:float16:masked:B1,H1,G1,M17,N130,D64,E64:bias=b1mn:contiguous:12",
        shows=("nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_merge_without_a_maximum",
        base=THREE,
        module=MERGE,
        edits=(
            ("b_shift = tl.where(b_new == -INF, 0.0, b_new)", "b_shift = tl.zeros_like(b_new)"),
            (
                "b_alpha = tl.exp2((b_max - b_shift) * LOG2E)",
                "b_alpha = tl.full([BM], 1.0, dtype=tl.float32)",
            ),
            ("b_sum += 1.0  # exp2(0)", "b_sum += tl.exp2(b_max * LOG2E)  # exp2(0)"),
            ("b_max + tl.log2(b_total) * LN2", "tl.log2(b_sum) * LN2"),
        ),
        bug="B04",
        story="The merge takes the exponential of the log-sum-exps as they are.",
        trigger="softmax:float16:exp-overflow:B1,H1,G1,M16,N130,D64,E64:-:contiguous:13",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_sink_without_the_maximum",
        edits=(
            (
                "b_max = tl.zeros_like(b_max) + tl.load(p_sinks + i_h * s_sink).to(tl.float32) *",
                "b_sink = UNIT * tl.load(p_sinks + i_h * s_sink).to(tl.float32) *",
            ),
            ("        b_sum += 1.0  # exp2(0); where the sink is −inf the first key scales it away\n", ""),
            (
                "b_total = tl.where(b_sum == 0, 1.0, b_sum)",
                _LATE_SINK,
            ),
        ),
        story="The sink is added to the sum at the end, relative to a maximum that does not take part of it.",
        trigger="softmax:float32:exp-underflow:B1,H2,G1,M17,N33,D64,E64:sinks,return_lse:contiguous:14",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_maximum_of_the_first_tile",
        edits=(
            (
                "b_new = tl.maximum(b_max, tl.max(b_s, 1))",
                "b_new = tl.where(b_max == -INF, tl.max(b_s, 1), b_max)",
            ),
        ),
        story="The maximum of the first tile with keys is kept for all others, whose weights may overflow.",
        trigger="softmax:float16:large-logits:B1,H1,G1,M16,N129,D64,E64:-:contiguous:15",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_fused_scale_and_maximum",
        edits=(
            (
                "b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * score_scale",
                "b_raw = tl.dot(b_q, b_k, input_precision=PRECISION)\n            b_s = b_raw * score_scale",
            ),
            (
                "            b_p = tl.exp2((b_s - b_shift[:, None]) * UNIT)\n",
                _FUSED,
            ),
        ),
        bug="B07",
        story="The product of score and scale is fused with subtracting a maximum that was rounded.",
        trigger="softmax:bfloat16:identical-huge:B1,H1,G1,M1,N64,D64,E64:-:contiguous:16",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_scores_stored_in_float16",
        edits=(
            (
                "input_precision=PRECISION) * score_scale",
                "input_precision=PRECISION).to(tl.float16).to(tl.float32) * score_scale",
            ),
        ),
        story="Products q·k are stored in float16 before they are scaled: above 65504 they are infinite.",
        trigger="softmax:float16:score-overflow:B1,H1,G1,M16,N33,D64,E64:-:contiguous:17",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_lowest_bias_is_a_mask",
        edits=(("m_s = m_s & (b_b != -INF)\n", "m_s = m_s & (b_b > -30000.0)\n"),),
        story="A finite bias below −30000 masks, as if it were −inf.",
        trigger="softmax:float16:finite-sentinel:B1,H2,G1,M33,N33,D64,E64:bias=bhmn:contiguous:18",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
)
