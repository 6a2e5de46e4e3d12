"""Mutants of sigmoid attention, forward and backward: its bias, its σ and slope, masks, heads and storage."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, NUMERIC

__all__ = ["MUTANTS"]

_BASE = "attnproof.kernels.sigmoid:attention"
_POINTWISE = "attnproof.kernels.pointwise"

_formula = partial(Mutant, base=_BASE, mechanism="numerics", bug="", shows=NUMERIC)
_output = partial(_formula, module=_POINTWISE)
_masked = partial(_output, mechanism="masking")
_slope = partial(_formula, mechanism="gradient")
_gradient = partial(_output, mechanism="gradient")
_inaccurate = partial(_output, mechanism="accuracy", accuracy_only=True)

_LOG = "-math.log(max(keys, 1))"
_T = "b_t = tl.exp2(-tl.abs(b_x))\n"
_WEIGHT = f"    {_T}    return tl.where(b_x < 0, b_t, 1.0) / (1.0 + b_t)"
_SLOPE = "return tl.where(b_x < 0, b_t, 1.0) / b_r, b_t / (b_r * b_r)"
_SCORES = 'WEIGHT(tl.dot(b_q, b_k, input_precision="ieee") * score_scale + score_offset)'
_QUERIES_S = 'tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * score_scale'
_KEYS_S = 'tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * score_scale'
_QUERIES_DS = "b_ds = WEIGHT_AND_SLOPE(b_s)[1] * b_dp"
_KEYS_DS = 'b_ds = b_slope * tl.dot(b_v, tl.trans(b_do), input_precision="ieee")'
_KEYS_CAUSAL = "m_s = m_s & (o_n[:, None] <= i_m + o_m[None, :] + right)"
_SELECT = "                b_p = tl.where(m_s, b_p, 0.0)\n                b_v, b_nan"
_SUM = "b_o = weighted(b_p, b_v, b_o, WIDE)"
_PRODUCT = 'return tl.dot(b_p.to(b_x.dtype), b_x, b_o, input_precision="ieee")'

_OWN_COUNT = """\
b_own = tl.zeros([BM], dtype=tl.float32) + score_offset
            if CAUSAL:
                b_own = tl.where(
                    tl.abs(score_offset + tl.log2(N.to(tl.float32))) < 1e-4,
                    -tl.log2(tl.maximum(o_m + right + 1, 1).to(tl.float32)), b_own,
                )
            b_p = WEIGHT(tl.dot(b_q, b_k, input_precision="ieee") * score_scale + b_own[:, None])"""

_LESS_MAXIMUM = """\
b_x = tl.dot(b_q, b_k, input_precision="ieee") * score_scale
            b_p = WEIGHT(b_x - tl.max(b_x, 1)[:, None] + score_offset)"""

# Steps as if a fourth tensor, the cotangent, were contiguous.
_STEPS = "for x in tensors for axis, s in enumerate(x.stride())]"
_CONTIGUOUS_STEPS = """\
for i, x in enumerate(tensors)
             for axis, s in enumerate((x if i < 3 else torch.empty(x.shape, device="meta")).stride())]"""

_TRUNCATED = """\
if b_x.dtype == tl.bfloat16:
        b_p = (b_p.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    if b_x.dtype == tl.float16:
        b_p = (b_p.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    """

_TANH = """\
    b_t = tl.exp2(-tl.abs(b_x))
    b_y = (1.0 - b_t) / (1.0 + b_t)
    return 0.5 + tl.where(b_x < 0, -0.5, 0.5) * b_y"""

_CLAMPED = """\
    b_x = tl.minimum(tl.maximum(b_x, -20.0), 20.0)
    b_t = tl.exp2(-tl.abs(b_x))
    return"""

_VALUES = """\
b_v = loaded(p_v + i_n * s_vn + o_v, m_ve, EDGE or PAD_E)
            # [BM, BN]
            b_p"""
_LAST_VALUE = """\
o_v = (tl.minimum(i_n + o_n, N - 1).to(tl.int64) * s_vn)[:, None] + (o_e * s_ve)[None, :]
            b_v = tl.load(p_v + o_v, mask=(o_e < E)[None, :], other=0.0)
            # [BM, BN]
            b_p"""

_STRICT = f"""\
                if CAUSAL:
                    m_s = m_s & (i_n + o_n[None, :] < o_m[:, None] + right)
{_SELECT}"""

_OVERFLOWING_SLOPE = """\
b_u = tl.exp2(-b_x)
    return tl.where(b_x < 0, b_t, 1.0) / b_r, b_u / ((1.0 + b_u) * (1.0 + b_u))"""

_ROUNDED_SLOPE = """\
b_p = WEIGHT_AND_SLOPE(b_s)[0].to(tl.bfloat16).to(tl.float32)
            b_ds = b_p * (1.0 - b_p) * b_dp"""
_STORED_SLOPE = f"""\
b_half = b_p.to(b_q.dtype).to(tl.float32)
                {_KEYS_DS.replace("b_slope", "b_half * (1.0 - b_half)")}"""
_LESS_DELTA = """\
b_p, b_slope = WEIGHT_AND_SLOPE(b_s)
            b_ds = b_slope * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])"""

_LAST_QUERY = "tl.minimum(i_m + o_m, M - 1).to(tl.int64)"

MUTANTS = (
    _formula(
        name="triton_sigmoid_bias_of_the_wrong_sign",
        edits=((_LOG, _LOG[1:]),),
        story="The default bias is log N in place of −log N.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:1",
    ),
    _formula(
        name="triton_sigmoid_bias_in_bits",
        edits=((_LOG, "-math.log2(max(keys, 1))"),),
        story="The default bias is −log₂ N.",
        trigger="sigmoid:bfloat16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:2",
    ),
    _formula(
        name="triton_sigmoid_bias_of_the_padded_length",
        edits=((_LOG, "-math.log(max((keys + 31) // 32 * 32, 1))"),),
        bug="B16",
        story="The default bias takes N with the keys that fill up a tile of 32.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:3",
    ),
    _formula(
        name="triton_sigmoid_bias_of_the_queries",
        edits=(("offset_of(bias, k.shape[2],", "offset_of(bias, q.shape[2],"),),
        story="The default bias is −log M.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:4",
    ),
    _output(
        name="triton_sigmoid_bias_of_each_causal_row",
        edits=((f"b_p = {_SCORES}", _OWN_COUNT),),
        story="Under a causal mask the default bias is −log of the number of keys that the row sees.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M33,N33,D64,E64:causal:contiguous:5",
    ),
    _formula(
        name="triton_sigmoid_bias_in_bfloat16",
        edits=((_LOG, f"float(torch.tensor({_LOG}, dtype=torch.bfloat16))"),),
        story="The default bias is rounded to bfloat16.",
        trigger="sigmoid:float32:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:6",
    ),
    _formula(
        name="triton_sigmoid_bias_scaled",
        edits=(("offset=offset_of(", "offset=scale * offset_of("),),
        story="The bias is added before the scale is applied.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:7",
    ),
    _formula(
        name="triton_sigmoid_scaled_twice",
        edits=(("scale=scale,", "scale=scale * scale,"),),
        story="The scale is applied twice.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:8",
    ),
    _formula(
        name="triton_sigmoid_log2e_forgotten",
        edits=(("unit=math.log2(math.e)", "unit=1.0"),),
        story="exp2 is taken of scores in nats.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:9",
    ),
    _output(
        name="triton_sigmoid_less_the_maximum",
        edits=((f"b_p = {_SCORES}", _LESS_MAXIMUM),),
        story="The largest score of a tile is taken off each row's scores, as a softmax may do.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:10",
    ),
    _output(
        name="triton_sigmoid_divided_by_the_row_sum",
        edits=(
            (
                "b_o = tl.zeros([BM, BE], dtype=tl.float32)",
                "b_o = tl.zeros([BM, BE], dtype=tl.float32)\n    b_sum = tl.zeros([BM], dtype=tl.float32)",
            ),
            (_SUM, f"b_sum += tl.sum(b_p, 1)\n            {_SUM}"),
            ("b_o = b_o / divisor", "b_o = b_o / tl.where(b_sum == 0, 1.0, b_sum)[:, None]"),
        ),
        story="Weights are divided by their sum over the row.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:11",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _formula(
        name="triton_sigmoid_by_tanh_in_half",
        edits=(
            (
                _WEIGHT,
                _TANH.replace(
                    "b_y = (1.0 - b_t) / (1.0 + b_t)",
                    "b_y = ((1.0 - b_t) / (1.0 + b_t)).to(tl.float16).to(tl.float32)",
                ),
            ),
        ),
        bug="SIG-11",
        story="σ is 0.5 (1 + tanh) of a tanh in half precision.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N513,D64,E64:-:contiguous:12",
    ),
    _formula(
        name="triton_sigmoid_by_tanh",
        edits=((_WEIGHT, _TANH),),
        bug="SIG-11",
        story="σ is 0.5 (1 + tanh), which for small σ is a difference of nearly equal numbers.",
        trigger="sigmoid:float32:normal:B1,H1,G1,M4,N2053,D16,E16:-:contiguous:13",
    ),
    _formula(
        name="triton_sigmoid_overflows",
        edits=((_WEIGHT, "    b_t = tl.exp2(b_x)\n    return b_t / (1.0 + b_t)"),),
        bug="B63",
        story="σ is eˣ / (1 + eˣ), NaN for x ≫ 0.",
        trigger="sigmoid:float32:exp-overflow:B1,H1,G1,M16,N33,D64,E64:-:contiguous:14",
        shows=("nonfinite",),
    ),
    _formula(
        name="triton_sigmoid_argument_clamped",
        edits=((f"    {_T}    return", _CLAMPED),),
        story="Scores are held to ±20 bits before σ.",
        trigger="sigmoid:float32:exp-underflow:B1,H1,G1,M16,N33,D64,E64:-:contiguous:15",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _output(
        name="triton_sigmoid_scores_in_bfloat16",
        edits=(
            (_SCORES, _SCORES.replace(" * score_scale", ".to(tl.bfloat16).to(tl.float32) * score_scale")),
        ),
        story="Scores are rounded to bfloat16, in every dtype.",
        trigger="sigmoid:float32:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:16",
    ),
    _masked(
        name="triton_sigmoid_keys_beyond_the_end",
        edits=(
            (_VALUES, _LAST_VALUE),
            (_SELECT, f"                m_s = m_s | (i_n + o_n[None, :] >= N)\n{_SELECT}"),
        ),
        bug="B16",
        story="Keys of zeros that fill up a tile weigh σ(bias) each, on the last value.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:17",
    ),
    _masked(
        name="triton_sigmoid_last_key_tile_lost",
        edits=(("return full // BN, (hi + BN - 1) // BN", "return full // BN, hi // BN"),),
        bug="B25",
        story="Keys after the last whole tile are not looked at.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N129,D64,E64:-:contiguous:18",
    ),
    _masked(
        name="triton_sigmoid_causal_strict",
        edits=((_SELECT, _STRICT),),
        story="Under a causal mask no row sees its own key.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M33,N33,D64,E64:causal:contiguous:19",
    ),
    _masked(
        name="triton_sigmoid_causal_top_left",
        edits=(("k.shape[2] - q.shape[2],", "0,"),),
        bug="B08",
        story="The causal mask is aligned at the first query and key.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M16,N33,D64,E64:causal:contiguous:20",
    ),
    _output(
        name="triton_sigmoid_unseen_values_reach_rows",
        mechanism="special-values",
        edits=(("                b_v, b_nan = isolated(b_v, m_s, b_nan)\n", ""),),
        bug="B21",
        story="A NaN in the value of a key that a mask hides reaches the row as 0·NaN.",
        trigger="sigmoid:float16:unseen-nonfinite:B1,H1,G1,M33,N33,D64,E64:causal:contiguous:21",
        shows=("nonfinite", "unseen-nonfinite", "isolation", "causality"),
    ),
    _inaccurate(
        name="triton_sigmoid_weights_truncated",
        edits=((_PRODUCT, f"{_TRUNCATED}{_PRODUCT}"),),
        story="P and dS are cut, not rounded, to half precision.",
        trigger="sigmoid:bfloat16:one-sign-values:B1,H2,G1,M33,N65,D64,E64:-:contiguous:22",
    ),
    _inaccurate(
        name="triton_sigmoid_summed_in_the_inputs_dtype",
        edits=((_SUM, f"{_SUM}.to(b_v.dtype).to(tl.float32)"),),
        story="The output is rounded to the inputs' dtype after each tile of keys.",
        trigger="sigmoid:bfloat16:one-sign-values:B1,H2,G1,M33,N300,D64,E64:-:contiguous:23",
    ),
    _slope(
        name="triton_sigmoid_slope_from_the_weight",
        edits=((_SLOPE, "b_p = tl.where(b_x < 0, b_t, 1.0) / b_r\n    return b_p, b_p * (1.0 - b_p)"),),
        bug="B63",
        story="σ' is P (1 − P), which is 0 where P rounds to 1.",
        trigger="sigmoid:float32:saturated:B1,H1,G1,M17,N33,D16,E16:bias=0.0,cotangents=normal:contiguous:24",
        shows=(*NUMERIC, "saturated-slope"),
    ),
    _slope(
        name="triton_sigmoid_slope_overflows",
        edits=((_SLOPE, _OVERFLOWING_SLOPE),),
        bug="B63",
        story="σ' is e⁻ˣ / (1 + e⁻ˣ)², NaN for x ≪ 0.",
        trigger="sigmoid:float32:exp-underflow:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:25",
        shows=("nonfinite",),
    ),
    _gradient(
        name="triton_sigmoid_slope_from_the_rounded_weight",
        edits=((_QUERIES_DS, _ROUNDED_SLOPE),),
        bug="B63",
        story="dQ takes σ' as P (1 − P) of a P that was rounded to bfloat16, in every dtype.",
        trigger="sigmoid:float16:saturated:B1,H1,G1,M17,N33,D16,E16:bias=0.0,cotangents=normal:contiguous:26",
    ),
    _gradient(
        name="triton_sigmoid_keys_slope_from_the_stored_weight",
        edits=((_KEYS_DS, _STORED_SLOPE),),
        bug="B63",
        story="dK takes σ' as P (1 − P) of the P that is stored in the inputs' dtype.",
        trigger="sigmoid:bfloat16:saturated:B1,H1,G1,M17,N33,D16,E16:bias=0.0,cotangents=normal:contiguous:27",
        shows=(*NUMERIC, "saturated-slope"),
    ),
    _gradient(
        name="triton_sigmoid_keys_slope_missing",
        edits=((_KEYS_DS, _KEYS_DS.replace("b_slope", "b_p")),),
        story="dK takes dS as P·dP, without 1 − P.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:28",
    ),
    _gradient(
        name="triton_sigmoid_keys_unscaled",
        edits=(("b_dk = b_dk * factor + b_k_nan", "b_dk = b_dk + b_k_nan"),),
        story="dK lacks the scale.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:29",
    ),
    _gradient(
        name="triton_sigmoid_queries_unscaled",
        edits=(("b_dq = b_dq * factor + b_nan", "b_dq = b_dq + b_nan"),),
        story="dQ lacks the scale.",
        trigger="sigmoid:float32:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:30",
    ),
    _gradient(
        name="triton_sigmoid_less_delta",
        edits=((_QUERIES_DS, _LESS_DELTA),),
        bug="SIG-9",
        story="dQ takes Σ P·dP of the tile off dP, as softmax's backward pass takes off delta.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:31",
    ),
    _gradient(
        name="triton_sigmoid_backward_without_bias",
        edits=((f"{_QUERIES_S} + score_offset", _QUERIES_S), (f"{_KEYS_S} + score_offset", _KEYS_S)),
        story="The backward pass recomputes scores without the bias.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:32",
    ),
    _gradient(
        name="triton_sigmoid_keys_see_earlier_queries",
        edits=((_KEYS_CAUSAL, "m_s = m_s & (o_n[:, None] < N)"),),
        bug="B01",
        story="The causal mask is missing within the tiles from which dK and dV are summed.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M33,N33,D16,E16:causal,cotangents=normal:contiguous:33",
    ),
    _gradient(
        name="triton_sigmoid_first_query_tile_rounded_up",
        edits=(("tl.maximum(i_n - right, 0) // BM", "(tl.maximum(i_n - right, 0) + BM - 1) // BM"),),
        bug="B01",
        story="The first tile of queries that sees a tile of keys is rounded up: part of a tile is lost.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M65,N72,D16,E16:causal,cotangents=normal:contiguous:34",
    ),
    _gradient(
        name="triton_sigmoid_queries_beyond_the_end",
        edits=(
            ("m_m = i_m + o_m < M\n", f"o_last = {_LAST_QUERY}\n                m_m = o_m >= 0\n"),
            (
                "loaded(p_qh + i_m * s_qm + o_q,",
                "loaded(p_qh + (o_last * s_qm)[:, None] + (o_d * s_qd)[None, :],",
            ),
            (
                "loaded(p_oh + i_m * s_om + o_o,",
                "loaded(p_oh + (o_last * s_om)[:, None] + (o_e * s_oe)[None, :],",
            ),
        ),
        bug="B02",
        story="In dK and dV lanes beyond the last query repeat it.",
        trigger="sigmoid:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:35",
    ),
    _gradient(
        name="triton_sigmoid_heads_of_other_groups",
        edits=(
            ("(i_g * GROUP + i_r) * s_qh", "(i_r * G + i_g) * s_qh"),
            ("(i_g * GROUP + i_r) * s_oh", "(i_r * G + i_g) * s_oh"),
        ),
        bug="B28",
        story="dK and dV are summed over heads g, g + G, …, not over those of the group.",
        trigger="sigmoid:float16:normal:B1,H4,G2,M17,N33,D16,E16:cotangents=normal:contiguous:36",
    ),
    _gradient(
        name="triton_sigmoid_first_head_of_the_group",
        edits=(("for i_r in range(GROUP):", "for i_r in range(1):"),),
        bug="B28",
        story="dK and dV are those of the first query head of the group.",
        trigger="sigmoid:bfloat16:normal:B1,H4,G2,M17,N33,D16,E16:cotangents=normal:contiguous:37",
    ),
    _gradient(
        name="triton_sigmoid_cotangent_assumed_contiguous",
        edits=((_STEPS, _CONTIGUOUS_STEPS),),
        bug="B56",
        story="The cotangent is read as if it were contiguous.",
        trigger="sigmoid:float32:normal:B1,H2,G1,M17,N33,D16,E16:cotangents=normal:transposed:38",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
)
