"""Mutants of linear attention: feature maps, chunks, states, sequences and the normaliser."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, LINEAR, LINEAR_RECURRENT, NUMERIC

__all__ = ["MUTANTS"]

_FEATURE_MAPS = "attnproof.kernels.feature_maps"
_CHUNKS = "attnproof.kernels.linear_chunks"
_RECURRENT = "attnproof.kernels.linear_recurrent"
_BACKWARD = "attnproof.kernels.linear_backward"

_call = partial(Mutant, base=LINEAR, mechanism="numerics", bug="", shows=(*NUMERIC, "nonfinite"))
_chunks = partial(_call, module=_CHUNKS)
_features = partial(_call, module=_FEATURE_MAPS)
_one_by_one = partial(_call, base=LINEAR_RECURRENT, module=_RECURRENT)
_inaccurate = partial(_call, mechanism="accuracy", accuracy_only=True, shows=NUMERIC)

_BLOCK = "return tl.where(m_x, b_x, tl.zeros_like(b_x))"
_STATE_MASK = "mask=(o_k < K)[:, None] & (o_v < V)[None, :]"
_EARLIER_Z = "b_den += tl.sum(b_x.to(tl.float32) * b_z[None, :], 1)"
_STATE_OF = "i_state = ((i_c if PER_CHUNK else i_s).to(tl.int64)) * H + i_h"
_FIRST_STATE = "b_s += tl.load(p_s0 + i_sh.to(tl.int64) * K * V + o_s, mask=m_s, other=0.0)"
_FIRST_Z = "b_z += tl.load(p_z0 + i_sh.to(tl.int64) * K + o_k, mask=o_k < K, other=0.0)"
_ROWS_OF_STATE = "for i_n in range(((i_stop - i_start).to(tl.int32) + BT - 1) // BT):"
_ISOLATED = """\
            if CAUSAL and SIDE == 0:
                b_v, b_nan = isolated(b_v, m_p, b_nan)
"""
_HALF_PRODUCT = """\
        if b_a.dtype == tl.float16 and b_b.dtype == tl.float16:
            return tl.dot(b_a, b_b, b_c, input_precision="ieee")
        return tl.dot(tf32_rounded(b_a), tf32_rounded(b_b), b_c, input_precision="tf32")
"""
_EXACT_PRODUCT = 'return tl.dot(b_a.to(DTYPE), b_b.to(DTYPE), b_c, input_precision="ieee")'
_FINAL = """\
    final = States(
        empty(sequences.count, width, value_width),"""
_IN_PLACE = """\
    final = States(
        empty(sequences.count, width, value_width) if initial.state is None else initial.state,"""
_WRITE = "                b_s += b_y[:, None] * b_v[None, :]\n"
_STORE = "tl.store(p_o + (i_row + i_n) * V + o_v, b_o.to(p_o.dtype.element_ty), mask=o_v < V)\n"
_LATE_WRITE = f"{_STORE}            if CAUSAL or PASS == 0:\n{_WRITE}"
_ELU1 = "return tl.where(b_x > 0, b_x + 1.0, tl.exp(b_x))"

MUTANTS = (
    _chunks(
        name="triton_linear_features_beyond_the_width",
        edits=((_BLOCK, "return tl.where(m_n[:, None], b_x, tl.zeros_like(b_x))"),),
        bug="B48",
        story="Columns that fill up a block of keys have the feature φ(0) = 1.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1:contiguous:1",
    ),
    _chunks(
        name="triton_linear_features_beyond_the_end",
        edits=((_BLOCK, "return tl.where((o_c < C)[None, :], b_x, tl.zeros_like(b_x))"),),
        mechanism="masking",
        bug="B43",
        story="Rows that fill up the last chunk add φ(0) = 1 each to the final normaliser.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1,normalize,return_state:contiguous:2",
    ),
    _chunks(
        name="triton_linear_strictly_causal",
        edits=(("else o_n[None, :] <= o_m[:, None])", "else o_n[None, :] < o_m[:, None])"),),
        mechanism="masking",
        story="A row does not see its own key.",
        trigger="linear:bfloat16:normal:B1,H1,N20,D8,E8:feature_map=elu1:contiguous:3",
    ),
    _chunks(
        name="triton_linear_state_of_the_chunk_before",
        edits=((_STATE_OF, _STATE_OF.replace("i_c if", "tl.maximum(i_c - 1, 0) if")),),
        mechanism="pointers",
        story="A chunk reads the state in which the chunk before it began.",
        trigger="linear:bfloat16:normal:B1,H1,N70,D8,E8:feature_map=elu1:contiguous:4",
    ),
    _chunks(
        name="triton_linear_normaliser_of_its_chunk_alone",
        edits=((_EARLIER_Z, f"{_EARLIER_Z} * 0.0"),),
        bug="B55",
        story="The normaliser leaves out all chunks before a row's own.",
        trigger="linear:float16:normal:B1,H1,N70,D8,E8:feature_map=elu1,normalize:contiguous:5",
    ),
    _chunks(
        name="triton_linear_normaliser_of_the_first_head",
        edits=(("tl.load(p_z + i_state * K + o_k", "tl.load(p_z + (i_state - i_h) * K + o_k"),),
        mechanism="pointers",
        bug="B55",
        story="Every head divides by the earlier keys of head 0.",
        trigger="linear:float16:normal:B1,H2,N70,D8,E8:feature_map=elu1,normalize:contiguous:6",
    ),
    _chunks(
        name="triton_linear_initial_normaliser_forgotten",
        edits=((_FIRST_Z, _FIRST_Z.replace("other=0.0)", "other=0.0) * 0.0")),),
        bug="B57",
        story="z begins at 0 in place of its initial value, unless one chunk is all that there is.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:"
        "feature_map=elu1,normalize,initial_state,return_state:contiguous:7",
    ),
    _call(
        name="triton_linear_one_chunk_begins_with_zeros",
        module=_BACKWARD,
        edits=(("return initial, States(None, None)", "return States(None, None), States(None, None)"),),
        mechanism="wrapper",
        bug="B57",
        story="A sequence of one chunk does not read its initial state, unless its final one is asked for.",
        trigger="linear:float32:normal:B1,H1,N20,D8,E8:feature_map=exp,initial_state:contiguous:8",
    ),
    _chunks(
        name="triton_linear_initial_state_of_the_first_sequence",
        edits=((_FIRST_STATE, _FIRST_STATE.replace("i_sh.to(tl.int64)", "(i_b * H + i_h)")),),
        mechanism="pointers",
        bug="B50",
        story="All sequences of a packed row begin with the state of the first.",
        trigger="linear:float16:normal:B1,H2,N30,D8,E8:"
        "feature_map=elu1,initial_state,cu_seqlens=12+18,return_state:contiguous:9",
    ),
    _chunks(
        name="triton_linear_empty_sequence_ends_in_zeros",
        edits=((_FIRST_STATE, _FIRST_STATE.replace("mask=m_s", "mask=m_s & (i_eos > i_bos)")),),
        mechanism="wrapper",
        bug="B57",
        story="The final state of a sequence of no positions is 0, not its initial state.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:"
        "feature_map=elu1,initial_state,cu_seqlens=8+0+12,return_state:contiguous:10",
    ),
    _chunks(
        name="triton_linear_state_runs_into_the_next_sequence",
        edits=(
            (
                f"i_stop = tl.minimum(i_start + chunk, i_eos)\n        {_ROWS_OF_STATE}",
                f"i_stop = tl.minimum(i_start + chunk, N)\n        {_ROWS_OF_STATE}",
            ),
        ),
        mechanism="masking",
        bug="B59",
        story="The last chunk of a packed sequence takes in what follows it, up to the length of a chunk.",
        trigger="linear:float16:normal:B1,H1,N30,D8,E8:"
        "feature_map=elu1,cu_seqlens=12+18,return_state:contiguous:11",
    ),
    _chunks(
        name="triton_linear_last_rows_not_in_the_state",
        edits=((_ROWS_OF_STATE, "for i_n in range((i_stop - i_start).to(tl.int32) // BT):"),),
        mechanism="masking",
        bug="B44",
        story="Positions after the last whole tile of a chunk do not enter the final state.",
        trigger="linear:float32:normal:B1,H1,N40,D8,E8:feature_map=elu1,return_state:contiguous:12",
    ),
    _chunks(
        name="triton_linear_tiles_of_the_mean_length",
        edits=(
            (
                "min(chunks.size, sequences.longest), tile.rows",
                "min(chunks.size, length // sequences.count if sequences.packed else length), tile.rows",
            ),
        ),
        mechanism="wrapper",
        story="As many tiles a chunk are launched as packed sequences of equal length would need.",
        trigger="linear:float32:normal:B1,H1,N48,D8,E8:feature_map=elu1,cu_seqlens=40+0+8:contiguous:13",
    ),
    _chunks(
        name="triton_linear_normaliser_of_the_last_key_block",
        edits=((_EARLIER_Z, _EARLIER_Z.replace("+=", "=")),),
        mechanism="pointers",
        story="In heads wider than a block only the last block's earlier keys enter the normaliser.",
        trigger="linear:float32:normal:B1,H1,N20,D40,E4:"
        "feature_map=elu1,normalize,initial_state:contiguous:14",
    ),
    _chunks(
        name="triton_linear_state_mask_transposed",
        edits=((_STATE_MASK, "mask=(o_k < V)[:, None] & (o_v < K)[None, :]"),),
        mechanism="pointers",
        bug="B52",
        story="The mask of the state's load has the widths of keys and values exchanged.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E20:feature_map=elu1,initial_state:contiguous:15",
        shows=(*NUMERIC, "nonfinite", *FAULT),
    ),
    _chunks(
        name="triton_linear_final_state_in_place",
        edits=((_FINAL, _IN_PLACE),),
        mechanism="wrapper",
        story="The final state is written over the initial one.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:"
        "feature_map=elu1,initial_state,return_state:contiguous:16",
        shows=("mutation", "aliasing", *NUMERIC),
    ),
    _chunks(
        name="triton_linear_later_values_reach_rows",
        edits=((_ISOLATED, ""),),
        mechanism="special-values",
        bug="B21",
        story="A NaN in the value of a later position reaches the rows of its tile as 0·NaN.",
        trigger="linear:float16:future-nonfinite:B1,H1,N20,D8,E8:feature_map=elu1:contiguous:17",
        shows=("nonfinite",),
    ),
    _chunks(
        name="triton_linear_states_overflow_half",
        edits=((_HALF_PRODUCT, f"        {_EXACT_PRODUCT}\n"),),
        bug="B60",
        story="States, weights and features enter matmuls in float16, which ends at 65504.",
        trigger="linear:float16:large-values:B1,H1,N150,D8,E8:feature_map=exp,normalize:contiguous:18",
        shows=("nonfinite",),
        unseen="operands may be float16 by the contract, so that budgets are open where a state may not fit",
    ),
    _chunks(
        name="triton_linear_float32_in_tf32",
        edits=((_EXACT_PRODUCT, _EXACT_PRODUCT.replace("ieee", "tf32")),),
        story="Matmuls of float32 are done in tf32.",
        trigger="linear:float32:normal:B1,H1,N20,D8,E8:feature_map=elu1:contiguous:19",
    ),
    _inaccurate(
        name="triton_linear_operands_cut_to_tf32",
        module=_CHUNKS,
        edits=(("tf32_rounded(b_a), tf32_rounded(b_b)", "b_a.to(tl.float32), b_b.to(tl.float32)"),),
        story="Features and states of float16 are cut, not rounded, to tf32.",
        trigger="linear:float16:uniform:B1,H2,N70,D8,E8:feature_map=elu1:contiguous:20",
        unseen="operands may be rounded to float16, whose 11 bits make errors half as large as these",
    ),
    _inaccurate(
        name="triton_linear_features_in_bfloat16",
        module=_FEATURE_MAPS,
        edits=((_ELU1, f"{_ELU1}.to(tl.bfloat16).to(tl.float32)"),),
        story="elu + 1 is rounded to bfloat16, in every dtype.",
        trigger="linear:float16:normal:B1,H2,N40,D8,E8:feature_map=elu1:contiguous:21",
    ),
    _one_by_one(
        name="triton_linear_state_in_the_inputs_dtype",
        edits=(
            (
                "b_s += b_y[:, None] * b_v[None, :]",
                "b_s = (b_s + b_y[:, None] * b_v[None, :]).to(p_v.dtype.element_ty).to(tl.float32)",
            ),
        ),
        mechanism="accuracy",
        story="The state is rounded to the inputs' dtype at every step.",
        trigger="linear:bfloat16:one-sign-values:B1,H1,N300,D2,E4:feature_map=elu1:contiguous:22",
        shows=NUMERIC,
    ),
    _one_by_one(
        name="triton_linear_read_before_it_is_written",
        edits=(
            (_WRITE, ""),
            (_STORE, _LATE_WRITE),
        ),
        story="A position reads the state before its own key and value are written.",
        trigger="linear:float32:normal:B1,H1,N20,D8,E8:feature_map=elu1:contiguous:23",
    ),
    _one_by_one(
        name="triton_linear_state_without_the_last_step",
        edits=(
            (
                "b_s += b_y[:, None] * b_v[None, :]\n",
                "b_last = b_s\n                b_s += b_y[:, None] * b_v[None, :]\n",
            ),
            ("    # without causal, a first pass", "    b_last = b_s\n    # without causal, a first pass"),
            ("tl.store(p_sn + o_s, b_s, mask=m_s)", "tl.store(p_sn + o_s, b_last, mask=m_s)"),
        ),
        story="The final state is the one that the last position found.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1,return_state:contiguous:24",
    ),
    _call(
        name="triton_linear_queries_scaled",
        edits=(("LinearAttention.apply(q, k,", "LinearAttention.apply(q * q.shape[3] ** -0.5, k,"),),
        bug="LIN-7",
        story="Queries are multiplied by D^(−1/2), as for a softmax.",
        trigger="linear:float32:normal:B1,H1,N20,D8,E8:feature_map=elu1,normalize:contiguous:25",
    ),
    _chunks(
        name="triton_linear_normaliser_without_its_sign",
        edits=(("b_o = b_o / b_den[:, None]", "b_o = b_o / tl.maximum(tl.abs(b_den), 1e-10)[:, None]"),),
        bug="LIN-7",
        story="Rows are divided by the size of their normaliser, as in the mLSTM.",
        trigger="linear:float32:normal:B1,H1,N20,D8,E8:feature_map=identity,normalize:contiguous:26",
    ),
    _chunks(
        name="triton_linear_normaliser_with_an_epsilon",
        edits=(("b_o = b_o / b_den[:, None]", "b_o = b_o / (b_den + 1e-6)[:, None]"),),
        bug="LIN-7",
        story="10⁻⁶ is added to the normaliser, which relu lets come near 0.",
        trigger="linear:float32:normal:B1,H2,N6,D8,E4:feature_map=relu,normalize:contiguous:75",
    ),
    _features(
        name="triton_linear_taylor_without_the_half",
        edits=(("float((2 * width) ** -0.5)", "float(width**-0.5)"),),
        bug="LIN-6",
        story="The second term of the Taylor map is x², not x²/2.",
        trigger="linear:float32:normal:B1,H1,N20,D4,E8:feature_map=taylor:contiguous:28",
    ),
    _features(
        name="triton_linear_elu_without_the_one",
        edits=((_ELU1, "return tl.where(b_x > 0, b_x, tl.exp(b_x))"),),
        story="A positive x is its own feature: the 1 is added to the exponential branch alone.",
        trigger="linear:float16:normal:B1,H1,N20,D8,E8:feature_map=elu1,normalize:contiguous:29",
    ),
    _one_by_one(
        name="triton_linear_without_order_writes_twice",
        edits=(("if CAUSAL or PASS == 0:", "if PASS >= 0:"),),
        story="Without causal, positions are written a second time while they are read.",
        trigger="linear:float32:normal:B1,H1,N20,D8,E8:feature_map=elu1,causal=off:contiguous:30",
    ),
)
