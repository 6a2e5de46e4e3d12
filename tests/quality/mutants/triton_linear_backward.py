"""Mutants of the gradients of linear attention: normaliser, states and their cotangents, slopes, layouts."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, LINEAR, LINEAR_RECURRENT, NUMERIC

__all__ = ["MUTANTS"]

_FEATURE_MAPS = "attnproof.kernels.feature_maps"
_CHUNKS = "attnproof.kernels.linear_chunks"
_RECURRENT = "attnproof.kernels.linear_recurrent"
_BACKWARD = "attnproof.kernels.linear_backward"

_gradient = partial(Mutant, base=LINEAR, mechanism="gradient", bug="", shows=(*NUMERIC, "nonfinite"))
_call = partial(_gradient, module=_BACKWARD)
_chunks = partial(_gradient, module=_CHUNKS)
_slope = partial(_gradient, module=_FEATURE_MAPS)

_FINAL = "final = final_cotangents(dstate, dz, q, v, ctx.call)"
_EVERY = "every = (dq, dk, dv, *dinitial, None)"
_OF_K = "of_k = Output(reverse=True, side=COLUMN, transposed=True, d=d, r=r,"
_CAUSAL = """\
                dtype=q.dtype, causal=call.causal, within=call.causal or call.single_chunk,"""
_OTHER_FACTOR = """\
        b_df += tl.load(p_dfd + (first + i_d * D + o_d)[None, :], mask=m_d, other=0.0)
"""

MUTANTS = (
    _call(
        name="triton_linear_dk_without_the_normaliser",
        edits=((_OF_K, _OF_K.replace("r=r", "r=None")),),
        bug="B54",
        story="dK lacks the part that reaches it through the normaliser.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1,normalize,cotangents=normal:contiguous:1",
    ),
    _chunks(
        name="triton_linear_dq_without_the_normaliser_of_its_chunk",
        edits=(("b_p = b_p / b_d[:, None] + b_r[:, None]", "b_p = b_p / b_d[:, None]"),),
        bug="B54",
        story="dQ lacks the part through the normaliser of its own chunk.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1,normalize,cotangents=normal:contiguous:2",
    ),
    _chunks(
        name="triton_linear_earlier_normaliser_without_its_cotangent",
        edits=(("b_o += b_r[:, None] * b_z[None, :]", "b_o += b_z[None, :]"),),
        bug="B54",
        story="dQ takes z of the chunks before with weight 1.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:"
        "feature_map=elu1,normalize,initial_state,cotangents=normal:contiguous:3",
    ),
    _chunks(
        name="triton_linear_later_cotangents_not_divided",
        edits=(("b_v.to(tl.float32) / b_d[:, None], b_s, DTYPE", "b_v, b_s, DTYPE"),),
        story="Cotangents of later chunks are not divided by their normalisers.",
        trigger="linear:float16:normal:B1,H1,N70,D8,E8:feature_map=elu1,normalize,cotangents=normal:contiguous:4",
    ),
    _call(
        name="triton_linear_dv_not_divided",
        edits=(
            ("of_v = Output(reverse=True, side=COLUMN, d=d)", "of_v = Output(reverse=True, side=COLUMN)"),
        ),
        story="Weights of dV within a chunk are not divided by the normaliser.",
        trigger="linear:bfloat16:normal:B1,H1,N20,D8,E8:feature_map=elu1,normalize,cotangents=normal:contiguous:5",
    ),
    _chunks(
        name="triton_linear_gradient_strictly_causal",
        edits=(("o_n[None, :] >= o_m[:, None] if REVERSE", "o_n[None, :] > o_m[:, None] if REVERSE"),),
        story="dK and dV lack a position's own query.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1,cotangents=normal:contiguous:6",
    ),
    _call(
        name="triton_linear_final_state_has_no_cotangent",
        edits=((_FINAL, _FINAL.replace("dstate,", "None,")),),
        bug="B57",
        story="The cotangent of the final state is dropped.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:"
        "feature_map=elu1,return_state,cotangents=normal:contiguous:7",
    ),
    _call(
        name="triton_linear_final_normaliser_has_no_cotangent",
        edits=((_FINAL, _FINAL.replace("dz,", "None,")),),
        bug="B57",
        story="The cotangent of the final normaliser is dropped.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:"
        "feature_map=elu1,normalize,return_state,cotangents=normal:contiguous:8",
    ),
    _call(
        name="triton_linear_initial_state_has_no_gradient",
        edits=((_EVERY, f"dinitial = [x if x is None else x * 0.0 for x in dinitial]\n        {_EVERY}"),),
        bug="B57",
        story="The gradients of the initial state are zeros.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:"
        "feature_map=elu1,initial_state,cotangents=normal:contiguous:9",
    ),
    _call(
        name="triton_linear_without_order_has_causal_gradients",
        edits=((_CAUSAL, _CAUSAL.replace("causal=call.causal, within", "causal=True, within")),),
        story="Without causal, gradients within a single chunk are those of causal attention.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1,causal=off,cotangents=normal:contiguous:10",
    ),
    _call(
        name="triton_linear_slope_of_k_at_q",
        edits=(("(Operand(q, slope), Operand(k, slope))", "(Operand(q, slope), Operand(q, slope))"),),
        story="The slope of the feature map that dK is multiplied by is taken at q.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1,cotangents=normal:contiguous:11",
    ),
    _slope(
        name="triton_linear_elu_has_the_slope_of_relu",
        edits=(("return tl.where(b_x > 0, 1.0, tl.exp(b_x))", "return tl.where(b_x > 0, 1.0, 0.0)"),),
        story="The slope of elu + 1 is 0 at negative x.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1,cotangents=normal:contiguous:12",
    ),
    _slope(
        name="triton_linear_exp_has_slope_one",
        edits=(('"exp": FeatureMap(exp, exp, -1, None)', '"exp": FeatureMap(exp, one, -1, None)'),),
        story="Gradients by the features of exp are handed on as they are.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=exp,cotangents=normal:contiguous:13",
    ),
    _slope(
        name="triton_linear_products_have_one_factor",
        edits=((_OTHER_FACTOR, ""),),
        bug="LIN-6",
        story="The gradient of a product x_a x_b reaches only one of its factors.",
        trigger="linear:float16:normal:B1,H1,N20,D4,E8:feature_map=squared,cotangents=normal:contiguous:14",
    ),
    _slope(
        name="triton_linear_taylor_gradient_without_the_linear_term",
        edits=(("other=0.0) * linear\n    for i_d", "other=0.0) * 0.0\n    for i_d"),),
        bug="LIN-6",
        story="The gradient of the Taylor map lacks its linear term.",
        trigger="linear:float32:normal:B1,H1,N20,D4,E8:feature_map=taylor,cotangents=normal:contiguous:15",
    ),
    _call(
        name="triton_linear_cotangent_assumed_contiguous",
        edits=(("o, do, d, r, *do.stride(),", "o, do, d, r, *o.stride(),"),),
        bug="B56",
        story="The normaliser's cotangent reads dO as if it were contiguous.",
        trigger="linear:float16:normal:B1,H2,N20,D8,E8:feature_map=elu1,normalize,cotangents=ones:contiguous:16",
        shows=(*NUMERIC, "nonfinite", *FAULT),
    ),
    _call(
        name="triton_linear_cotangent_of_the_rounded_output",
        edits=(("wide = call.normalize and call.differentiated", "wide = False"),),
        story="dO·o is taken of the output as it was stored.",
        accuracy_only=True,
        trigger="linear:bfloat16:one-sign-values:B1,H2,N40,D8,E8:"
        "feature_map=elu1,normalize,cotangents=aligned:contiguous:17",
        unseen="budgets let dO·o be formed of the stored output, as FlashAttention does",
    ),
    _chunks(
        name="triton_linear_gradient_of_the_state_unordered",
        edits=(("i_c = i_chunks - 1 - i_t if REVERSE else i_t", "i_c = i_t"),),
        story="The gradient of the state is summed from the first chunk on.",
        trigger="linear:bfloat16:normal:B1,H1,N70,D8,E8:feature_map=elu1,cotangents=normal:contiguous:18",
    ),
    _gradient(
        name="triton_linear_recurrent_dk_without_the_normaliser",
        base=LINEAR_RECURRENT,
        module=_RECURRENT,
        edits=(
            (
                "b_o += (b_r if SIDE == SIDE_ROW else 1.0) * b_zv",
                "b_o += (b_r if SIDE == SIDE_ROW else 0.0) * b_zv",
            ),
        ),
        bug="B54",
        story="dK lacks the part that reaches it through the normaliser, in the recurrent form.",
        trigger="linear:float32:normal:B1,H1,N20,D8,E8:feature_map=elu1,normalize,cotangents=normal:contiguous:19",
    ),
    _gradient(
        name="triton_linear_recurrent_later_normaliser_unweighted",
        base=LINEAR_RECURRENT,
        module=_RECURRENT,
        edits=(("b_zv += b_v * b_r", "b_zv += b_v"),),
        bug="B54",
        story="Later queries enter the gradient through the normaliser with weight 1.",
        trigger="linear:float32:normal:B1,H1,N20,D8,E8:"
        "feature_map=elu1,normalize,initial_state,cotangents=normal:contiguous:20",
    ),
)
