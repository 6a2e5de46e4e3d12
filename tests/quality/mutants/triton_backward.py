"""Mutants of softmax attention's backward pass that compute another formula, or over other rows and keys."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import BACKWARD, GRADIENTS, NUMERIC, SOFTMAX, WHOLE

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base=WHOLE, module=BACKWARD, mechanism="gradient", bug="", shows=NUMERIC)

_DELTA = "b_delta = tl.sum(b_o * b_do, 1)"
_DO_MASK = "    m_oe = m_m[:, None] & (o_e < E)[None, :]\n    # [BM, BE]\n    b_o = tl.load("
_QUERIES_DS = "b_ds = b_p * (b_dp - b_delta[:, None])"
_KEYS_DS = "b_ds = b_p * (b_dp - b_delta[None, :])"
_KEYS_WEIGHTS = "s_bm, s_bn, n_q, n_k, left, right, cap, LEFT, RIGHT, SOFTCAP, EDGE, UNIT"
_KEYS_CALL = f"o_m[None, :], o_n[:, None], i_bos,\n                    {_KEYS_WEIGHTS}"
_KEYS_RANGE = "= tile_range(i_t, 0, n_k, n_q, -right, -left, EVERY_TILE, RIGHT, LEFT, BN, BM)\n"
_ROUNDED_UP = """\
    if RIGHT:
        t0 = tl.minimum((tl.maximum(i_t * BN - right, 0) + BM - 1) // BM, f0)
"""
_TWICE = """\
b_twice = tl.where(o_e >= (E - 1) // 16 * 16, 2.0, 1.0)
    b_delta = tl.sum(b_o * b_do * b_twice[None, :], 1)"""
_SLOPE = "return 4 * b_t / ((1 + b_t) * (1 + b_t))"

MUTANTS = (
    _mutant(
        name="triton_backward_keys_unscaled",
        edits=(("(b_dk * scale).to(", "b_dk.to("),),
        story="dK lacks the scale.",
        trigger="softmax:float32:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:1",
    ),
    _mutant(
        name="triton_backward_queries_unscaled",
        edits=(("(b_dq * scale).to(", "b_dq.to("),),
        story="dQ lacks the scale.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:2",
    ),
    _mutant(
        name="triton_backward_without_delta",
        edits=((_DELTA, "b_delta = 0.0 * tl.sum(b_o * b_do, 1)"),),
        story="Δ is missing: dS is P·dP.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:3",
    ),
    _mutant(
        name="triton_backward_delta_once_per_value_tile",
        edits=(
            (
                "b_delta = tl.where(b_scale == 0, 0.0, b_delta)",
                "b_delta = tl.where(b_scale == 0, 0.0, b_delta * ((E + 63) // 64))",
            ),
        ),
        bug="B31",
        story="Δ is subtracted once for each 64 columns of V.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E72:cotangents=normal:contiguous:4",
    ),
    _mutant(
        name="triton_backward_delta_of_the_first_columns",
        edits=((_DO_MASK, _DO_MASK.replace("(o_e < E)", "(o_e < tl.minimum(E, 64))")),),
        bug="B30",
        story="Δ is summed over the first 64 columns of O alone.",
        trigger="softmax:bfloat16:normal:B1,H1,G1,M17,N33,D16,E72:cotangents=normal:contiguous:5",
    ),
    _mutant(
        name="triton_backward_delta_counts_the_last_columns_twice",
        edits=(
            (
                _DELTA,
                _TWICE,
            ),
        ),
        story="The last 16 columns of O are counted in Δ twice.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E64:cotangents=normal:contiguous:6",
    ),
    _mutant(
        name="triton_backward_delta_of_one_key_tile",
        edits=((_QUERIES_DS, "b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])"),),
        bug="B30",
        story="Δ of dQ is Σ P·dP over the tile of keys at hand, not over all keys.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N65,D16,E16:cotangents=normal:contiguous:7",
    ),
    _mutant(
        name="triton_backward_through_the_maximum",
        edits=(
            (_QUERIES_DS, "b_ds = b_p * b_dp - tl.where(b_p == b_scale[:, None], b_delta[:, None], 0.0)"),
        ),
        story="Δ is taken off the row's largest score alone: its maximum is differentiated, its sum is not.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:8",
    ),
    _mutant(
        name="triton_backward_lse_ignored",
        module=GRADIENTS,
        edits=(
            (
                "row_sums(saved, do, dlse, need_sinks)\n    if",
                "row_sums(saved, do, None, need_sinks)\n    if",
            ),
        ),
        story="The cotangent of the log-sum-exp is ignored.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:return_lse,cotangents=normal:contiguous:9",
    ),
    _mutant(
        name="triton_backward_lse_of_the_wrong_sign",
        edits=(("b_delta -= tl.load(p_dlse", "b_delta += tl.load(p_dlse"),),
        story="The cotangent of the log-sum-exp enters Δ with the wrong sign.",
        trigger="softmax:float32:normal:B1,H1,G1,M17,N33,D16,E16:return_lse,cotangents=normal:contiguous:10",
    ),
    _mutant(
        name="triton_backward_softcap_without_slope",
        edits=((_SLOPE, "return 0 * b_t + 1"),),
        bug="B10",
        story="The derivative of the soft cap is missing.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:softcap=2.0,cotangents=normal:contiguous:11",
    ),
    _mutant(
        name="triton_backward_softcap_slope_missing_in_keys",
        edits=(
            (
                "b_ds = b_ds * slope_of_cap(b_x)\n                b_ds, b_factor = stored(b_ds, b_q.dtype)",
                "b_ds = b_ds * 1.0\n                b_ds, b_factor = stored(b_ds, b_q.dtype)",
            ),
        ),
        bug="B10",
        story="dK lacks the derivative of the soft cap, which dQ has.",
        trigger="softmax:bfloat16:normal:B1,H1,G1,M17,N33,D16,E16:softcap=2.0,cotangents=normal:contiguous:12",
    ),
    _mutant(
        name="triton_backward_softcap_slope_of_the_score",
        edits=((_SLOPE, "return 1 - b_x * b_x"),),
        bug="B10",
        story="The derivative of the soft cap is 1 − (s/c)², of the score before the cap.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:softcap=2.0,cotangents=normal:contiguous:13",
    ),
    _mutant(
        name="triton_backward_first_head_of_the_group",
        edits=(("for i_r in range(GROUP):", "for i_r in range(1):"),),
        bug="B28",
        story="dK and dV are those of the first query head of the group.",
        trigger="softmax:float16:normal:B1,H4,G2,M17,N33,D16,E16:cotangents=normal:contiguous:14",
    ),
    _mutant(
        name="triton_backward_heads_of_other_groups",
        edits=(("i_h = i_g * GROUP + i_r\n", "i_h = i_r * G + i_g\n"),),
        bug="B28",
        story="dK and dV are summed over heads g, g + G, …, not over those of the group.",
        trigger="softmax:float16:normal:B1,H4,G2,M17,N33,D16,E16:cotangents=normal:contiguous:15",
    ),
    _mutant(
        name="triton_backward_bias_of_the_first_entry",
        module=GRADIENTS,
        edits=(("SUM_B=inner_b", "SUM_B=1"),),
        story="The gradient of a bias that batch entries share is that of the first one.",
        trigger="softmax:float16:normal:B2,H2,G1,M17,N33,D16,E16:bias=1hmn,cotangents=normal:contiguous:16",
    ),
    _mutant(
        name="triton_backward_bias_of_the_first_head",
        module=GRADIENTS,
        edits=(("SUM_H=inner_h", "SUM_H=1"),),
        story="The gradient of a bias that heads share is that of the first one.",
        trigger="softmax:float16:normal:B2,H2,G1,M17,N33,D16,E16:bias=b1mn,cotangents=normal:contiguous:17",
    ),
    _mutant(
        name="triton_backward_bias_averaged",
        module=GRADIENTS,
        edits=(("sums.sum(axes, keepdim=True)", "sums.mean(axes, keepdim=True)"),),
        story="The gradient of a bias of few values is averaged over tiles, not summed.",
        trigger="softmax:float32:normal:B2,H2,G1,M17,N33,D16,E16:bias=1h1n,cotangents=normal:contiguous:18",
    ),
    _mutant(
        name="triton_backward_bias_scaled",
        edits=(
            (
                "b_sum += b_p * (b_dp - b_delta[:, None])",
                "b_sum += scale * b_p * (b_dp - b_delta[:, None])",
            ),
        ),
        story="The gradient of the bias is scaled like those of the scores' factors.",
        trigger="softmax:bfloat16:normal:B1,H2,G1,M17,N33,D16,E16:bias=bhmn,cotangents=normal:contiguous:19",
    ),
    _mutant(
        name="triton_backward_sinks_of_the_wrong_sign",
        edits=(("tl.where(m_m, -b_p * b_delta, 0.0)", "tl.where(m_m, b_p * b_delta, 0.0)"),),
        story="The gradient of the sinks has the wrong sign.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N33,D16,E16:sinks,cotangents=normal:contiguous:20",
    ),
    _mutant(
        name="triton_backward_sinks_without_delta",
        edits=(("tl.where(m_m, -b_p * b_delta, 0.0)", "tl.where(m_m, -b_p, 0.0)"),),
        story="The gradient of the sinks is −Σ p, without Δ.",
        trigger="softmax:float32:normal:B1,H2,G1,M17,N33,D16,E16:sinks,cotangents=normal:contiguous:21",
    ),
    _mutant(
        name="triton_backward_keys_see_earlier_queries",
        edits=((_KEYS_CALL, _KEYS_CALL.replace("RIGHT,", "False,")),),
        bug="B01",
        story="The causal mask is missing within the tiles from which dK and dV are summed.",
        trigger="softmax:float16:normal:B1,H1,G1,M33,N33,D16,E16:causal,cotangents=normal:contiguous:22",
    ),
    _mutant(
        name="triton_backward_first_query_tile_rounded_up",
        edits=(
            (
                _KEYS_RANGE,
                f"{_KEYS_RANGE}{_ROUNDED_UP}",
            ),
        ),
        bug="B01",
        story="The first tile of queries that sees a tile of keys is rounded up: part of a tile is lost.",
        trigger="softmax:float16:normal:B1,H1,G1,M65,N72,D16,E16:causal,cotangents=normal:contiguous:23",
    ),
    _mutant(
        name="triton_backward_queries_beyond_the_end",
        edits=(
            (
                "m_m = o_m < n_q\n                m_qd",
                "o_m = tl.minimum(o_m, n_q - 1)\n                m_m = o_m < n_q\n                m_qd",
            ),
        ),
        bug="B02",
        story="In dK and dV lanes beyond the last query repeat it.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:24",
    ),
    _mutant(
        name="triton_backward_keys_beyond_the_end",
        edits=(
            (
                "m_n = o_n < n_k\n            m_kd",
                "o_n = tl.minimum(o_n, n_k - 1)\n            m_n = o_n < n_k\n            m_kd",
            ),
        ),
        bug="B27",
        story="In dQ lanes beyond the last key repeat it.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:25",
    ),
    _mutant(
        name="triton_backward_window_left_ignored",
        module=GRADIENTS,
        edits=(('"LEFT": band.left is not None,', '"LEFT": False,'),),
        story="The backward pass ignores the window's left side.",
        trigger="softmax:float16:normal:B1,H1,G1,M33,N33,D16,E16:window=3..,cotangents=normal:contiguous:26",
    ),
    _mutant(
        name="triton_backward_packed_rows_enter",
        edits=(
            (
                "n_k = n_q\n        i_rows = i_bos",
                "n_k = n_q\n        n_q = (M - i_bos).to(tl.int32)\n        i_rows = i_bos",
            ),
        ),
        bug="B37",
        story="In dK and dV the queries of all later sequences of a packed row see a sequence's keys.",
        trigger="softmax:float16:normal:B1,H1,G1,M33,N33,D16,E16:cu_seqlens=11+22,cotangents=normal:contiguous:27",
    ),
    _mutant(
        name="triton_backward_alibi_ignored",
        module=GRADIENTS,
        edits=(('"p_alibi": saved.alibi_slopes,', '"p_alibi": None,'),),
        story="The backward pass recomputes scores without ALiBi.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N33,D16,E16:alibi_slopes,cotangents=normal:contiguous:28",
    ),
    _mutant(
        name="triton_backward_alibi_from_the_top_left",
        edits=(("tl.abs(o_i + (n_k - n_q) - o_j)", "tl.abs(o_i - o_j)"),),
        bug="B08",
        story="The backward pass takes ALiBi's distances as if the first query were at the first key.",
        trigger="softmax:float16:normal:B1,H2,G1,M17,N33,D16,E16:alibi_slopes,cotangents=normal:contiguous:29",
    ),
    _mutant(
        name="triton_backward_log2e_forgotten",
        module=GRADIENTS,
        edits=(('"score_scale": call.scale * bits if', '"score_scale": call.scale if'),),
        story="The backward pass takes exp2 of scores in nats, except with a bias or a soft cap.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:30",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_backward_unit_forgotten",
        edits=(
            (
                "tl.exp2(tl.minimum((b_s - b_max) * UNIT, 0.0)) * b_scale\n\n",
                "tl.exp2(tl.minimum(b_s - b_max, 0.0)) * b_scale\n\n",
            ),
        ),
        story="With a bias, whose scores are in nats, the backward pass takes exp2 of them.",
        trigger="softmax:float16:normal:B1,H1,G1,M17,N33,D16,E16:bias=11mn,cotangents=normal:contiguous:31",
    ),
    _mutant(
        name="triton_backward_empty_rows_divide_by_zero",
        module=SOFTMAX,
        edits=(("tl.where(b_max == -INF, 0.0, 1.0 / b_total)", "1.0 / b_sum"),),
        bug="B24",
        story="A row without keys keeps 1/0, and 0·inf makes every gradient of its keys NaN.",
        trigger="softmax:float16:normal:B1,H1,G1,M33,N17,D16,E16:causal,cotangents=normal:contiguous:32",
        shows=("nonfinite",),
    ),
)
