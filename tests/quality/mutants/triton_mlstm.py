"""Mutants of the mLSTM: its stabilised denominator, running maximum, gates, chunks, states, sequences."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, MLSTM, MLSTM_RECURRENT, NUMERIC

__all__ = ["MUTANTS"]

_CHUNKS = "attnproof.kernels.mlstm_chunks"

_whole = partial(
    Mutant,
    base=MLSTM,
    module="attnproof.kernels.mlstm_forward",
    mechanism="numerics",
    bug="",
    shows=(*NUMERIC, "nonfinite"),
)
_shared = partial(_whole, module=_CHUNKS)
_stepwise = partial(_whole, base=MLSTM_RECURRENT)
_bound = partial(_shared, base=MLSTM_RECURRENT, bug="theory 2.10")
_pointer = partial(_whole, mechanism="pointers", shows=(*NUMERIC, *FAULT, "nonfinite"))
_wrapper = partial(_whole, mechanism="wrapper")
_carried = partial(_pointer, module=_CHUNKS)

_TRIGGER = "mlstm:float32:normal:B1,H2,N20,D4,E5"
_CHUNKED = "mlstm:float32:normal:B1,H2,N40,D4,E5"
_EXTREME = "mlstm:float32:extreme-gates:B1,H2,N40,D4,E5"
_RARE = "mlstm:float32:small-input-gates:B1,H2,N20,D4,E5"

_BOUND = "b_down, b_least = tl.exp(tl.minimum(b_m, 0.0)), tl.exp(-tl.maximum(b_m, 0.0))"
_DIVIDED = "b_inverse = b_down / tl.maximum(b_size, b_least, propagate_nan=tl.PropagateNan.ALL)"
_LOG_SIGMOID = "return tl.where(b_f != b_f, b_f, tl.minimum(b_f, 0.0) - b_log)"
_MAXIMUM = "b_after = tl.maximum(b_whole + b_before, tl.max(b_tail, 0))"
_KEPT = "b_kept, b_written = tl.exp(b_whole + b_m - b_after), tl.exp(b_tail - b_after)"
_FOUND = "before, end = states(call)\n"
_DENOMINATOR = "b_factor, b_slope = denominator(tl.sum(b_q * b_n, 0), b_m)"
_STEP = "b_c = b_c * b_kept + b_k[:, None] * b_v[None, :]"
_OUTPUT_GATES = "p_f += i_b * s_fb + i_h * s_fh\n    b_i, b_f = gate_tile("
_START = "b_c = tl.load(p_c0 + (i_sh * D + o_d)[:, None]"
_START_M = "b_m = tl.load(p_m0 + i_sh)"
_NEUTRAL = "    b_m = -INF\n"
_START_N = "b_n = tl.load(p_n0 + i_sh * D + o_d, mask=o_d < D, other=0.0)"
_STATE_GATES = "decays(p_i, p_f, o_n, b_m, s_in, s_fn, i_stop, C)"
_READ = "b_kept = tl.exp(b_head + b_before - b_m)"

MUTANTS = (
    _bound(
        name="triton_mlstm_bound_of_one",
        edits=((_BOUND, "b_down, b_least = tl.exp(b_m * 0.0), tl.exp(b_m * 0.0)"),),
        story="The stabilised denominator keeps the bound 1 in place of e^−m.",
        trigger=f"{_TRIGGER}:-:contiguous:1",
    ),
    _bound(
        name="triton_mlstm_bound_of_the_wrong_sign",
        edits=((_BOUND, _BOUND.replace("tl.minimum(b_m", "tl.minimum(-b_m").replace("(b_m", "(-b_m")),),
        story="The bound of the denominator is e^m.",
        trigger=f"{_TRIGGER}:-:contiguous:2",
    ),
    _bound(
        name="triton_mlstm_bound_in_base_two",
        edits=((_BOUND, _BOUND.replace("tl.exp", "tl.exp2")),),
        story="The maximum is of natural logarithms, and the bound of the denominator 2^−m.",
        trigger=f"{_TRIGGER}:-:contiguous:3",
    ),
    _bound(
        name="triton_mlstm_bound_of_epsilon",
        edits=((_BOUND, f"{_BOUND}\n    b_least = b_least * 1e-10"),),
        story="Only a division by 0 is kept off: the bound of the denominator is 1e-10·e^−m.",
        trigger=f"{_RARE}:-:contiguous:4",
    ),
    _bound(
        name="triton_mlstm_denominator_signed",
        edits=(("b_size = tl.abs(b_den) * b_down", "b_size = b_den * b_down"),),
        story="The denominator is max(nᵀq, 1), without the absolute value.",
        trigger=f"{_TRIGGER}:-:contiguous:5",
    ),
    _bound(
        name="triton_mlstm_denominator_plus_epsilon",
        edits=(
            (_DIVIDED, f"b_inverse = b_down / ({_DIVIDED.removeprefix('b_inverse = b_down / ')} + 1e-6)"),
        ),
        story="1e-6 is added to the stabilised denominator, as published kernels do.",
        trigger="mlstm:float32:normal:B1,H4,N40,D8,E8:-:contiguous:6",
    ),
    _stepwise(
        name="triton_mlstm_denominator_one_position_late",
        edits=((_DENOMINATOR, _DENOMINATOR.replace("b_q * b_n", "b_q * (b_n - b_k)")),),
        story="The denominator is read before the row's own key is added.",
        trigger=f"{_TRIGGER}:-:contiguous:7",
    ),
    _shared(
        name="triton_mlstm_keys_of_the_denominator_not_decayed",
        edits=(("b_n = b_n * b_kept + tl.sum(b_w, 0)", "b_n = b_n + tl.sum(b_w, 0)"),),
        bug="B55",
        story="n is carried from chunk to chunk without decay.",
        trigger=f"{_CHUNKED}:return_state:contiguous:8",
    ),
    _whole(
        name="triton_mlstm_denominator_of_the_state_unscaled",
        edits=(
            (
                "b_den = tl.sum(b_p, 1) + b_den * b_kept",
                "b_den = tl.sum(b_p, 1) + b_den * (b_kept / scale)",
            ),
        ),
        story="What the state before a chunk adds to the denominator lacks the scale.",
        trigger=f"{_CHUNKED}:-:contiguous:9",
    ),
    _whole(
        name="triton_mlstm_scaled_twice",
        edits=(
            (
                "b_p = tl.where(m_s, b_s * scale * b_e, 0.0)",
                "b_p = tl.where(m_s, b_s * scale * b_e * scale, 0.0)",
            ),
        ),
        story="Scores inside a chunk are scaled twice.",
        trigger=f"{_TRIGGER}:-:contiguous:10",
    ),
    _shared(
        name="triton_mlstm_maximum_does_not_decay",
        edits=((_MAXIMUM, _MAXIMUM.replace("b_whole + b_before", "b_before")),),
        story="The maximum that goes with the state is not moved by the forget gates.",
        trigger=f"{_CHUNKED}:return_state:contiguous:11",
    ),
    _shared(
        name="triton_mlstm_state_not_moved_to_the_new_maximum",
        edits=((_KEPT, _KEPT.replace("b_whole + b_m - b_after", "b_whole")),),
        story="A state is decayed, but not rescaled from the old maximum to the new one.",
        trigger=f"{_CHUNKED}:return_state:contiguous:12",
    ),
    _stepwise(
        name="triton_mlstm_keys_written_unshifted",
        edits=(("tl.exp(b_i - b_new)", "tl.exp(b_i)"),),
        story="A key is written with e^i in place of e^(i − m).",
        trigger=f"{_EXTREME}:-:contiguous:13",
    ),
    _whole(
        name="triton_mlstm_decay_factored",
        edits=(
            (
                "b_e = tl.exp(b_d - b_m[:, None])",
                "b_e = tl.exp(b_head - b_m)[:, None] * tl.exp(b_i - b_head)[None, :]",
            ),
        ),
        bug="B45",
        story="The weight of a pair is exp(Fᵢ − mᵢ)·exp(iⱼ − Fⱼ): 0·inf where gates are strong.",
        trigger=f"{_EXTREME}:-:contiguous:14",
    ),
    _shared(
        name="triton_mlstm_log_of_a_rounded_sigmoid",
        edits=((_LOG_SIGMOID, "return tl.log(1.0 / (1.0 + tl.exp(-b_f)))"),),
        mechanism="special-values",
        story="log σ(f) is the logarithm of a σ in float32, which is 0 below f = −88.",
        trigger="mlstm:float32:extreme-gates:B2,H8,N5,D4,E5:return_state:contiguous:20",
    ),
    _shared(
        name="triton_mlstm_log_of_a_sigmoid_in_bfloat16",
        edits=(
            (
                _LOG_SIGMOID,
                "return tl.log((1.0 / (1.0 + tl.exp(-b_f))).to(tl.bfloat16).to(tl.float32))",
            ),
        ),
        story="log σ(f) is the logarithm of a σ that was rounded to bfloat16.",
        trigger="mlstm:bfloat16:normal:B1,H2,N40,D4,E5:return_state:contiguous:16",
    ),
    _shared(
        name="triton_mlstm_exponential_forget_gate",
        edits=((_LOG_SIGMOID, "return b_f"),),
        story="The forget gate is e^f, the paper's other choice, in place of σ(f).",
        trigger=f"{_TRIGGER}:-:contiguous:17",
    ),
    _shared(
        name="triton_mlstm_own_key_decayed",
        edits=(("o_c[:, None] > o_c[None, :], b_log_f", "o_c[:, None] >= o_c[None, :], b_log_f"),),
        story="Inside a chunk a key is decayed by its own forget gate.",
        trigger=f"{_TRIGGER}:-:contiguous:18",
    ),
    _shared(
        name="triton_mlstm_own_key_decayed_on_the_way_to_the_state",
        edits=(("b_tail = tl.cumsum(b_next, 0", "b_tail = tl.cumsum(log_sigmoid(b_f), 0"),),
        story="On its way into the state a key is decayed by its own forget gate.",
        trigger=f"{_CHUNKED}:-:contiguous:19",
    ),
    _whole(
        name="triton_mlstm_state_enters_undecayed",
        edits=(
            (
                _READ,
                _READ.replace("b_head", "b_head - b_log_f"),
            ),
        ),
        story="A row reads the state before its chunk without the row's own forget gate.",
        trigger=f"{_CHUNKED}:-:contiguous:20",
    ),
    _shared(
        name="triton_mlstm_padding_forgets",
        edits=(
            (
                "b_f = tl.load(p_f + o_n * s_fn, mask=o_n < i_stop, other=INF)",
                "b_f = tl.load(p_f + o_n * s_fn, mask=o_n < i_stop, other=0.0)",
            ),
        ),
        mechanism="masking",
        bug="B43",
        story="Positions behind the end have the forget gate σ(0): a ragged chunk halves the state.",
        trigger=f"{_CHUNKED}:return_state:contiguous:21",
    ),
    _shared(
        name="triton_mlstm_padding_sets_the_maximum",
        edits=(("mask=o_n < i_stop, other=-INF", "mask=o_n < i_stop, other=0.0"),),
        mechanism="masking",
        bug="B43",
        story="Positions behind the end have the input gate e⁰, and the final maximum is at least 0.",
        trigger=f"{_RARE}:return_state:contiguous:22",
    ),
    _stepwise(
        name="triton_mlstm_state_in_the_inputs_dtype",
        edits=((_STEP, f"b_c = ({_STEP.removeprefix('b_c = ')}).to(p_o.dtype.element_ty).to(tl.float32)"),),
        bug="B60",
        story="The state is rounded to the inputs' dtype after each step.",
        trigger="mlstm:bfloat16:normal:B1,H2,N40,D4,E5:return_state:contiguous:23",
    ),
    _pointer(
        name="triton_mlstm_gates_of_the_first_head",
        edits=((_OUTPUT_GATES, _OUTPUT_GATES.replace(" + i_h * s_fh", "")),),
        bug="B50",
        story="Rows of every head decay by the forget gates of head 0.",
        trigger=f"{_TRIGGER}:-:contiguous:24",
    ),
    _pointer(
        name="triton_mlstm_gates_assumed_contiguous",
        module=_CHUNKS,
        edits=(("tl.load(p_i + o_n * s_in,", "tl.load(p_i + o_n,"),),
        story="Input gates are read as if their positions lay one after the other.",
        trigger=f"{_TRIGGER}:-:columns:25",
    ),
    _pointer(
        name="triton_mlstm_denominator_of_the_next_state",
        edits=(
            (
                "b_n = tl.load(p_n + i_slot * D + o_d",
                "b_n = tl.load(p_n + (i_slot + tl.where(i_first + C < i_stop, H, 0)) * D + o_d",
            ),
        ),
        story="Where another chunk follows, the denominator reads n of the state before that, of later keys.",
        trigger=f"{_CHUNKED}:initial_state:contiguous:26",
    ),
    _pointer(
        name="triton_mlstm_state_mask_transposed",
        module=_CHUNKS,
        edits=(
            (
                "m_de = (o_d < D)[:, None] & (o_e < E)[None, :]",
                "m_de = (o_d < E)[:, None] & (o_e < D)[None, :]",
            ),
        ),
        bug="B52",
        story="The state is stored under the mask of its transpose.",
        trigger=f"{_CHUNKED}:return_state:contiguous:27",
    ),
    _wrapper(
        name="triton_mlstm_state_before_the_last_chunk",
        edits=((_FOUND, f"{_FOUND}    end = State(*(x[-1:] for x in before))\n"),),
        story="The final state is that before the last chunk.",
        trigger=f"{_CHUNKED}:return_state:contiguous:28",
    ),
    _wrapper(
        name="triton_mlstm_state_unstabilised",
        edits=((_FOUND, f"{_FOUND}    end = end._replace(c=end.c * end.m.exp()[..., None, None])\n"),),
        story="C is returned in place of C e^−m, beside an n that is divided.",
        trigger=f"{_CHUNKED}:return_state:contiguous:29",
    ),
    _shared(
        name="triton_mlstm_initial_level_ignored",
        edits=((_START_M, "b_m = 0.0"),),
        story="An initial state is taken for one of level 0.",
        trigger=f"{_TRIGGER}:initial_state:contiguous:30",
    ),
    _wrapper(
        name="triton_mlstm_initial_state_unstabilised",
        module="attnproof.kernels.mlstm",
        edits=(
            (
                "return state[0], state[1], state[2].detach()",
                "return state[0] * (-state[2].detach()).exp()[..., None, None], state[1], state[2].detach()",
            ),
        ),
        story="The initial state is taken for C in place of C e^−m, beside an n that is divided.",
        trigger=f"{_TRIGGER}:initial_state:contiguous:31",
    ),
    _stepwise(
        name="triton_mlstm_initial_state_not_moved_to_the_new_maximum",
        edits=((_STEP, _STEP.replace("b_kept", "tl.where(i_t == 0, tl.exp(b_log_f), b_kept)")),),
        story="The first position decays the initial state, but does not rescale it to its own maximum.",
        trigger=f"{_TRIGGER}:initial_state:contiguous:32",
    ),
    _stepwise(
        name="triton_mlstm_initial_state_misses_the_first_gate",
        edits=((_START_M, f"{_START_M} - log_sigmoid(tl.load(p_f + i_start * s_fn))"),),
        story="The first forget gate does not decay the initial state.",
        trigger=f"{_TRIGGER}:initial_state:contiguous:33",
    ),
    _shared(
        name="triton_mlstm_initial_normaliser_left_out",
        edits=((_START_N, "b_n = tl.zeros([BD], dtype=tl.float32)"),),
        bug="B55",
        story="The denominator begins at 0 whatever the initial n is.",
        trigger=f"{_TRIGGER}:initial_state:contiguous:34",
    ),
    _carried(
        name="triton_mlstm_one_initial_state_for_all",
        edits=((_START, _START.replace("i_sh", "i_h")),),
        story="Every packed sequence begins with the first one's C.",
        trigger=f"{_TRIGGER}:initial_state,cu_seqlens=7+0+13:contiguous:35",
    ),
    _carried(
        name="triton_mlstm_initial_state_transposed",
        edits=(
            (
                f"{_START} * E + o_e[None, :]",
                f"{_START.replace('i_sh * D', 'i_sh * D * E')} + (o_e * D)[None, :]",
            ),
        ),
        bug="B52",
        story="The initial C is read as values by keys.",
        trigger=f"{_TRIGGER}:initial_state:contiguous:36",
    ),
    _carried(
        name="triton_mlstm_gates_of_the_next_sequence",
        edits=((_STATE_GATES, _STATE_GATES.replace("i_stop", "N")),),
        bug="B43",
        story="Rows that fill up a sequence's last chunk take the gates of the next sequence into the state.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,return_state:contiguous:37",
    ),
    _carried(
        name="triton_mlstm_empty_sequences_lose_their_state",
        edits=(
            (
                "tl.store(p_n1 + i_sh * D + o_d, b_n, mask=o_d < D)",
                "tl.store(p_n1 + i_sh * D + o_d, tl.where(i_stop > i_start, b_n, 0.0), mask=o_d < D)",
            ),
        ),
        story="Behind a sequence without positions n is 0 in place of the initial one.",
        trigger=f"{_TRIGGER}:initial_state,cu_seqlens=7+0+13,return_state:contiguous:38",
    ),
    _carried(
        name="triton_mlstm_state_of_the_sequence_before",
        base=MLSTM_RECURRENT,
        module="attnproof.kernels.mlstm_forward",
        edits=((_NEUTRAL, f"{_NEUTRAL}    if p_m0 is None:\n        i_start = i_start * 0\n"),),
        bug="B43",
        story="A packed sequence without an initial state runs on from what lies before it.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,return_state:contiguous:39",
    ),
)
