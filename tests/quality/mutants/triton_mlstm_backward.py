"""Mutants of the mLSTM's backward pass: the denominator's gradient, gates, chunks and cotangents, and the
gradients of initial states and from final ones.
"""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, MLSTM, MLSTM_RECURRENT, NUMERIC

__all__ = ["MUTANTS"]

_gradient = partial(
    Mutant,
    base=MLSTM,
    module="attnproof.kernels.mlstm_backward",
    mechanism="gradient",
    bug="",
    shows=(*NUMERIC, "nonfinite"),
)
# Its backward pass works on chunks of 16: three of them in 40 positions.
_third = partial(_gradient, base=MLSTM_RECURRENT)
_slope = partial(_gradient, module="attnproof.kernels.mlstm_chunks")

_TRIGGER = "mlstm:float32:normal:B1,H2,N20,D4,E5:cotangents=normal:contiguous"
_CHUNKED = "mlstm:float32:normal:B1,H2,N40,D4,E5:cotangents=normal:contiguous"
_RARE = "mlstm:float32:small-input-gates:B1,H2,N20,D4,E5:cotangents=normal:contiguous"
_STARTED = "mlstm:float32:normal:B1,H2,N20,D4,E5:initial_state"
_RETURNED = "mlstm:float32:normal:B1,H2,N20,D4,E5:return_state"
_EXTREME = "mlstm:float32:extreme-gates:B1,H2,N40,D4,E5:cotangents=normal:contiguous"

_DELTA = "tl.where(b_slope == 0, 0.0, -b_slope * b_sum)"
_SIGNED = "tl.where(b_den < 0, -b_share, b_share)"
_SHARE = "b_share = tl.where(b_size > b_least, 1.0, tl.where(b_size == b_least, 0.5, 0.0))"
_PAIRS = "b_dd = b_p * b_g\n"
_THROUGH_THE_MAXIMUM = f"""{_PAIRS}\
    b_top = within(log_sigmoid(b_f), b_i, C) == b_m[:, None]
    b_dd -= tl.where(b_top, tl.sum(b_dd, 1)[:, None], 0.0)
"""
_WEIGHTS = "b_e = tl.exp(tl.minimum(within(log_sigmoid(b_f), b_i, C) - b_m[:, None], 0.0))"
_FACTORED = "b_e = tl.exp(b_head - b_m)[:, None] * tl.exp(b_i - b_head)[None, :]"
_MASKED = f"{_FACTORED}\n    b_e = tl.where(o_c[:, None] >= o_c[None, :], b_e, 0.0)"
_STATE_GRADIENT = "b_dc = b_dc * b_decay + tl.dot("
_TO_DQ = "(b_dq * b_inverse[:, None] + b_delta[:, None] * b_n[None, :])"
_TO_DK = "(b_dk + b_dn[None, :])"
_BEFORE = "m_before = o_c[:, None] > o_c[None, :]"
_END = "b_dc = tl.load(p_dc1 + o_state"
_END_N = "b_dn = tl.load(p_dn1 + i_sh * D + o_d, mask=o_d < D, other=0.0)"
_START = "tl.store(p_dc0 + o_state, b_dc, mask=m_de)"
_START_N = "tl.store(p_dn0 + i_sh * D + o_d, b_dn, mask=o_d < D)"
_STATES = "before, _ = states(call)"

MUTANTS = (
    _gradient(
        name="triton_mlstm_denominator_without_gradient",
        edits=((_DELTA, "b_sum * 0.0"),),
        bug="B54",
        story="The denominator is taken for a constant.",
        trigger=f"{_TRIGGER}:101",
    ),
    _slope(
        name="triton_mlstm_slope_of_the_absolute_value_left_out",
        edits=((_SIGNED, "b_share"),),
        story="The gradient of |nᵀq| has no sign.",
        trigger=f"{_TRIGGER}:102",
    ),
    _slope(
        name="triton_mlstm_gradient_of_a_bound_that_counts",
        edits=((_SHARE, "b_share = tl.where(b_size >= 0, 1.0, 0.0)"),),
        bug="theory 2.10",
        story="The denominator has a gradient by nᵀq where it is its bound.",
        trigger=f"{_RARE}:103",
    ),
    _gradient(
        name="triton_mlstm_gradient_through_the_maximum",
        edits=((_PAIRS, _THROUGH_THE_MAXIMUM),),
        bug="theory 2.10",
        story="i and f have a gradient by way of the m in the weights, but not by that in the bound.",
        trigger=f"{_RARE}:104",
    ),
    _gradient(
        name="triton_mlstm_dk_without_the_denominator_of_later_chunks",
        edits=((_TO_DK, "b_dk"),),
        bug="B54",
        story="dk lacks what denominators of later chunks ask of it.",
        trigger=f"{_CHUNKED}:105",
    ),
    _gradient(
        name="triton_mlstm_dq_without_the_denominator_of_earlier_chunks",
        edits=((_TO_DQ, "(b_dq * b_inverse[:, None])"),),
        bug="B54",
        story="dq lacks what n of earlier chunks adds through the denominator.",
        trigger=f"{_CHUNKED}:106",
    ),
    _gradient(
        name="triton_mlstm_scores_gradient_unscaled",
        edits=(("b_s * b_e, b_g * b_e", "b_s * b_e, b_g * (b_e / scale)"),),
        story="Inside a chunk dq and dk lack the scale.",
        trigger=f"{_TRIGGER}:107",
    ),
    _third(
        name="triton_mlstm_gates_without_pairs_across_the_chunk",
        edits=((" + b_pairs * b_across", ""),),
        bug="GLA-4",
        story="df leaves out keys before the chunk that rows behind it see.",
        trigger=f"{_CHUNKED}:108",
    ),
    _gradient(
        name="triton_mlstm_gates_with_their_own_key",
        edits=((_BEFORE, _BEFORE.replace(">", ">=")),),
        story="df counts the key of its own position, which its gate does not decay.",
        trigger=f"{_TRIGGER}:109",
    ),
    _gradient(
        name="triton_mlstm_gates_without_their_own_row",
        edits=(("o_c[:, None] <= o_c[None, :], b_rows", "o_c[:, None] < o_c[None, :], b_rows"),),
        story="df leaves out what its own row reads of the state before the chunk.",
        trigger=f"{_CHUNKED}:110",
    ),
    _gradient(
        name="triton_mlstm_slope_of_the_gate_reversed",
        edits=(("tl.where(b_f > 0, b_t, 1.0)", "tl.where(b_f > 0, 1.0, b_t)"),),
        story="The derivative of log σ(f) is σ(f) in place of σ(−f).",
        trigger=f"{_TRIGGER}:111",
    ),
    _gradient(
        name="triton_mlstm_input_gates_of_the_chunk_alone",
        edits=(("(tl.sum(b_dd, 0) + b_columns)", "tl.sum(b_dd, 0)"),),
        bug="B47",
        story="di counts only the rows of its own chunk.",
        trigger=f"{_CHUNKED}:112",
    ),
    _third(
        name="triton_mlstm_gradient_of_the_state_not_decayed",
        edits=((_STATE_GRADIENT, "b_dc = b_dc + tl.dot("),),
        story="The gradient of the state passes a chunk without its decay.",
        trigger=f"{_CHUNKED}:113",
    ),
    _third(
        name="triton_mlstm_gradient_of_n_not_decayed",
        edits=(("b_dn = b_dn * b_decay + tl.sum(", "b_dn = b_dn + tl.sum("),),
        story="The gradient of n passes a chunk without its decay.",
        trigger=f"{_CHUNKED}:114",
    ),
    _gradient(
        name="triton_mlstm_gradient_decay_factored",
        edits=((_WEIGHTS, _MASKED),),
        bug="B45",
        story="The backward pass takes weights as exp(Fᵢ − mᵢ)·exp(iⱼ − Fⱼ).",
        trigger=f"{_EXTREME}:115",
    ),
    _gradient(
        name="triton_mlstm_gradient_of_the_state_without_denominators",
        edits=(("stored(b_do * b_inverse[:, None], b_q.dtype)", "stored(b_do, b_q.dtype)"),),
        story="dC adds up q·dOᵀ without the rows' denominators.",
        trigger=f"{_CHUNKED}:116",
    ),
    _gradient(
        name="triton_mlstm_cotangent_assumed_contiguous",
        edits=(("do, o, rows, delta, *do.stride(),", "do, o, rows, delta, *o.stride(),"),),
        bug="B56",
        story="dO·o reads the cotangent as if it were contiguous.",
        trigger=f"{_TRIGGER.replace(':contiguous', ':transposed')}:117",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _gradient(
        name="triton_mlstm_initial_state_has_no_gradient",
        edits=((_START, "tl.store(p_dc0 + o_state, b_dc * 0.0, mask=m_de)"),),
        story="The gradient of the initial C is 0.",
        trigger=f"{_STARTED},cotangents=normal:contiguous:118",
    ),
    _gradient(
        name="triton_mlstm_gradient_of_the_initial_state_without_the_first_chunk",
        edits=((_STATE_GRADIENT, _STATE_GRADIENT.replace("b_decay", "tl.where(i_c == 0, 1.0, b_decay)")),),
        story="The gradient of the initial C passes the first chunk without its decay.",
        trigger=f"{_STARTED},return_state,cotangents=normal:contiguous:119",
    ),
    _gradient(
        name="triton_mlstm_initial_normaliser_without_the_denominators",
        edits=(
            (
                "+ tl.sum(b_w * b_delta[:, None], 0)",
                "+ tl.where(i_c == 0, 0.0, tl.sum(b_w * b_delta[:, None], 0))",
            ),
        ),
        bug="B54",
        story="The gradient of the initial n lacks what denominators of the first chunk ask of it.",
        trigger=f"{_STARTED},cotangents=normal:contiguous:120",
    ),
    _gradient(
        name="triton_mlstm_cotangent_of_the_final_state_ignored",
        edits=((_END, "b_dc = 0.0 * tl.load(p_dc1 + o_state"),),
        story="What is asked of the final C reaches nothing.",
        trigger=f"{_RETURNED},cotangents=normal:contiguous:121",
    ),
    _gradient(
        name="triton_mlstm_cotangent_of_the_final_normaliser_ignored",
        edits=((_END_N, f"{_END_N} * 0.0"),),
        story="What is asked of the final n reaches nothing.",
        trigger=f"{_RETURNED},cotangents=normal:contiguous:122",
    ),
    _gradient(
        name="triton_mlstm_one_final_cotangent_for_all",
        edits=((_END, f"{_END} - i_s * H * D * E"),),
        story="Every packed sequence takes the cotangent of the first one's final C.",
        trigger=f"{_RETURNED},cu_seqlens=7+0+13,cotangents=normal:contiguous:123",
    ),
    _gradient(
        name="triton_mlstm_empty_sequences_hand_no_gradient_on",
        edits=((_START_N, _START_N.replace("b_dn,", "tl.where(n_chunks > 0, b_dn, 0.0),")),),
        story="A sequence without positions keeps the cotangent of its n from the initial one.",
        trigger=f"{_STARTED},cu_seqlens=7+0+13,return_state,cotangents=normal:contiguous:124",
    ),
    _gradient(
        name="triton_mlstm_backward_begins_without_the_initial_state",
        edits=((_STATES, f"call.start = (None, None, None)\n    {_STATES}"),),
        story="The backward pass computes the states between chunks again, from nothing.",
        trigger=f"{_STARTED},cotangents=normal:contiguous:125",
    ),
)
