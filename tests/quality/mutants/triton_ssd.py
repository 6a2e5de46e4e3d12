"""Mutants of state space duality: decays, steps, groups, chunks and states."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, NUMERIC, SSD, SSD_PARALLEL, SSD_RECURRENT

__all__ = ["MUTANTS"]

_CHUNKS = "attnproof.kernels.ssd_chunks"
_PAIRS = "attnproof.kernels.ssd_parallel"
_STEPS = "attnproof.kernels.ssd_recurrence"
_WRAPPER = "attnproof.kernels.ssd"

_output = partial(
    Mutant, base=SSD, module=_CHUNKS, mechanism="numerics", bug="", shows=(*NUMERIC, "nonfinite")
)
_pointer = partial(_output, mechanism="pointers")
_pairwise = partial(_output, base=SSD_PARALLEL, module=_PAIRS)
_stepwise = partial(_output, base=SSD_RECURRENT, module=_STEPS)
_wrapper = partial(_output, module=_WRAPPER, mechanism="wrapper")

_TRIGGER = "ssd:float32:normal:B1,H4,G2,N20,D4,E5"
_TWO_CHUNKS = "ssd:float32:normal:B1,H2,G1,N70,D4,E5"
_STRONG = "ssd:float32:strong-decay:B1,H2,G1,N20,D4,E5"

_DECAYED = "b_p * tl.exp(tl.cumsum(b_terms, 0))"
_SUMS = "tl.cumsum(b_g, 0)"
_DIFFERENCE = f"{_SUMS}[:, None] - {_SUMS}[None, :]"
_TAIL = "tl.cumsum(b_next * b_a, 0, reverse=True)"
_NEXT = "m_next = (o_c + 1 < C) & (i_n + o_c + 1 < i_stop)"
_TOTAL = "tl.exp(tl.sum(b_g, 0))"
_STATE = f"b_s = product(tl.trans(b_y), b_z, b_s * {_TOTAL}, DTYPE)"
_OF_STATES = "gates(p_dt, s_tn, b_a, i_n, i_stop, C)\n        # [C, BD], [C, BE]"
_HEADS_RATE = "b_a = tl.load(p_a + i_h).to(tl.float32)\n    i_c0"
_KEPT = "tl.store(p_states + ((i_c0 + i_c) * H + i_h) * D * E + o_s, b_s, mask=m_s)"
_END = "tl.store(p_end + i_area + o_s, b_s, mask=m_s)"
_LAST_STEP = """\
if not REVERSE:
        b_last = tl.load(p_dt + (i_stop - 1) * s_tn, mask=i_stop > i_start, other=0.0)
        b_s *= tl.exp(b_last.to(tl.float32) * b_a)
"""
_START = "b_s = tl.load(p_start + i_area + o_s, mask=m_s, other=0.0)"
_SKIP = "b_y += tl.load(p_skip + i_h).to(tl.float32) * b_x"
_CLEAN = "b_v, b_nan = isolated(b_x * b_dt[:, None], m_s, tl.zeros([C], dtype=tl.float32))"
_GROUP_OF_STATES = "p_y += i_b * s_yb + (i_h // GROUP) * s_yh"
_UPDATE = "b_s = b_s * tl.exp(b_dt * b_a) + b_b[:, None] * (b_dt * b_x)[None, :]"
_READ = "b_y = tl.sum(b_c[:, None] * b_s, 0)"
_BETWEEN = "        b_between += tl.sum(b_g, 0)\n"
_PAIR = "        b_decay = tl.exp("
_ENTERING = "b_y += b_read * tl.exp(b_head + b_between)[:, None]"
_CONTIGUOUS = "start = None if start is None else start.contiguous()\n    "

MUTANTS = (
    _output(
        name="triton_ssd_decay_factored",
        edits=((_DECAYED, f"b_p * tl.exp({_SUMS})[:, None] * tl.exp(-{_SUMS})[None, :]"),),
        bug="B45",
        story="The decay of a pair is exp(bᵢ)·exp(−bⱼ), 0·inf where steps are long.",
        trigger=f"{_STRONG}:-:contiguous:1",
    ),
    _output(
        name="triton_ssd_segments_by_differences",
        edits=((_DECAYED, f"b_p * tl.exp({_DIFFERENCE})"),),
        bug="SSD-4",
        story="The decay of a pair is exp(bᵢ − bⱼ) of sums from the beginning of the chunk.",
        trigger="ssd:float32:strong-decay:B1,H4,G1,N64,D4,E5:-:contiguous:2",
        unseen="Cumulative sums of gates over a chunk are within the budget, as chunkwise kernels have them.",
    ),
    _output(
        name="triton_ssd_mask_by_a_product",
        edits=(
            (
                "tl.where(o_c[:, None] >= o_c[None, :], b_p * tl.exp(tl.cumsum(b_terms, 0)), 0.0)",
                f"b_p * tl.exp({_DIFFERENCE}) * (o_c[:, None] >= o_c[None, :]).to(tl.float32)",
            ),
        ),
        mechanism="masking",
        bug="B35",
        story="Later keys are masked by a factor of 0 on exp(bᵢ − bⱼ), which is inf where steps are long.",
        trigger=f"{_STRONG}:-:contiguous:3",
    ),
    _output(
        name="triton_ssd_write_decayed_by_its_own_step",
        edits=((_TAIL, "tl.cumsum(b_g, 0, reverse=True)"),),
        story="What a position writes enters the state after its chunk decayed by its own step as well.",
        trigger=f"{_TRIGGER}:return_state:contiguous:4",
    ),
    _output(
        name="triton_ssd_ragged_chunk_leaves_the_state_whole",
        edits=(
            (
                _STATE,
                _STATE.replace(_TOTAL, f"tl.where(i_n + C > i_stop, 1.0, {_TOTAL})"),
            ),
        ),
        mechanism="masking",
        story="The state does not decay over a chunk that is not full.",
        trigger=f"{_TRIGGER}:initial_state,return_state:contiguous:5",
    ),
    _output(
        name="triton_ssd_state_decays_once_too_often",
        edits=((_END, f"{_LAST_STEP}    {_END}"),),
        story="The final state decays once more by the last step.",
        trigger=f"{_TRIGGER}:return_state:contiguous:6",
    ),
    _output(
        name="triton_ssd_values_without_steps",
        edits=((_CLEAN, _CLEAN.replace("b_x * b_dt[:, None]", "b_x")),),
        story="Within a chunk values are x, not dt x.",
        trigger=f"{_TRIGGER}:-:contiguous:7",
    ),
    _output(
        name="triton_ssd_states_without_steps",
        edits=(("        if not REVERSE:\n            b_z *= b_dt[:, None]\n", ""),),
        story="x enters the states between chunks, not dt x.",
        trigger=f"{_TRIGGER}:return_state:contiguous:8",
    ),
    _output(
        name="triton_ssd_skip_times_steps",
        edits=((_SKIP, f"{_SKIP} * b_dt[:, None]"),),
        story="The skip term is D dt x.",
        trigger=f"{_TRIGGER}:skip:contiguous:9",
    ),
    _output(
        name="triton_ssd_kept_states_in_bfloat16",
        edits=((_KEPT, _KEPT.replace("b_s, mask", "b_s.to(tl.bfloat16).to(tl.float32), mask")),),
        bug="B60",
        story="The states between chunks are kept in bfloat16.",
        trigger=f"{_TRIGGER}:initial_state:contiguous:10",
    ),
    _output(
        name="triton_ssd_scores_in_tf32",
        edits=(('b_s, input_precision="ieee")', 'b_s, input_precision="tf32")'),),
        bug="B30",
        story="The products C·B of float32 round their operands to tf32.",
        trigger=f"{_TRIGGER}:-:contiguous:11",
    ),
    _output(
        name="triton_ssd_gates_in_bfloat16",
        edits=(("b_g = b_dt * b_a\n", "b_g = (b_dt * b_a).to(tl.bfloat16).to(tl.float32)\n"),),
        story="The log decays dt A are rounded to bfloat16, in every dtype.",
        trigger=f"{_TRIGGER}:-:contiguous:12",
    ),
    _output(
        name="triton_ssd_unseen_values_reach_rows",
        edits=((_CLEAN, "b_v, b_nan = b_x * b_dt[:, None], tl.zeros([C], dtype=tl.float32)"),),
        mechanism="special-values",
        bug="B21",
        story="A NaN in a later x of the same chunk reaches a row as 0·NaN.",
        trigger="ssd:float32:future-nonfinite:B1,H2,G1,N20,D4,E5:-:contiguous:13",
        shows=("nonfinite", "unseen-nonfinite", "isolation", "causality"),
    ),
    _pointer(
        name="triton_ssd_tail_of_the_next_chunk",
        edits=((_NEXT, "m_next = i_n + o_c + 1 < i_stop"),),
        story="What decays writes to the end of a chunk takes in the first step of the next one.",
        trigger=f"{_TWO_CHUNKS}:return_state:contiguous:14",
    ),
    _pointer(
        name="triton_ssd_steps_of_the_next_sequence",
        edits=((_OF_STATES, _OF_STATES.replace("i_stop", "N")),),
        bug="B43",
        story="The state at the end of a sequence decays by the first steps of the next one.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,return_state:contiguous:15",
    ),
    _pointer(
        name="triton_ssd_groups_interleaved",
        edits=tuple(
            (f"p_{x} += i_b * s_{x}b + (i_h // GROUP)", f"p_{x} += i_b * s_{x}b + (i_h % (H // GROUP))")
            for x in "bc"
        ),
        story="Within a chunk head h reads group h % G of B and C, not h // (H/G).",
        trigger=f"{_TRIGGER}:-:contiguous:16",
    ),
    _pointer(
        name="triton_ssd_states_of_interleaved_groups",
        edits=((_GROUP_OF_STATES, _GROUP_OF_STATES.replace("i_h // GROUP", "i_h % (H // GROUP)")),),
        story="The states of head h take group h % G of B, not h // (H/G).",
        trigger=f"{_TRIGGER}:return_state:contiguous:17",
    ),
    _pointer(
        name="triton_ssd_states_with_the_first_heads_rate",
        edits=((_HEADS_RATE, _HEADS_RATE.replace("p_a + i_h", "p_a")),),
        bug="B50",
        story="In every head the states between chunks decay at the rate of head 0.",
        trigger=f"{_TRIGGER}:return_state:contiguous:18",
    ),
    _pointer(
        name="triton_ssd_precedence_of_start_and_stride",
        edits=(
            ("p_dt + (i_n + o_c) * s_tn", "p_dt + i_n + o_c * s_tn"),
            ("p_dt + (i_n + o_c + 1) * s_tn", "p_dt + i_n + (o_c + 1) * s_tn"),
        ),
        bug="B36",
        story="dt is read at start + offset·stride, the stride left out of the start.",
        trigger=f"{_TWO_CHUNKS}:return_state:columns:19",
    ),
    _pointer(
        name="triton_ssd_one_initial_state_for_all",
        edits=((_START, _START.replace("i_area", "i_h * D * E")),),
        story="Every sequence begins with the initial state of the first.",
        trigger=f"{_TRIGGER}:initial_state,cu_seqlens=7+0+13:contiguous:20",
    ),
    _pairwise(
        name="triton_ssd_initial_state_in_the_first_tile_alone",
        edits=((_ENTERING, f"if i_m == 0:\n            {_ENTERING}"),),
        story="Only the first 64 rows read the initial state.",
        trigger=f"{_TWO_CHUNKS.replace('normal', 'slow-decay')}:initial_state:contiguous:21",
    ),
    _pairwise(
        name="triton_ssd_initial_state_decays_within_a_tile",
        edits=((_ENTERING, _ENTERING.replace(" + b_between", "")),),
        story="What a row reads of the initial state decayed from the beginning of its tile alone.",
        trigger=f"{_TWO_CHUNKS}:initial_state:contiguous:22",
    ),
    _pairwise(
        name="triton_ssd_tile_of_columns_decays_twice",
        edits=((_BETWEEN, ""), (_PAIR, f"{_BETWEEN}{_PAIR}")),
        story="The gates between tiles take in those of the tile of columns, which decay its own writes too.",
        trigger=f"{_TWO_CHUNKS.replace('normal', 'slow-decay')}:-:contiguous:23",
    ),
    _pairwise(
        name="triton_ssd_only_the_nearest_tile_between",
        edits=((_BETWEEN, _BETWEEN.replace("+=", "=")),),
        story="Of the tiles between columns and rows only the nearest to the columns decays them.",
        trigger="ssd:float32:slow-decay:B1,H2,G1,N200,D2,E2:-:contiguous:24",
    ),
    _pairwise(
        name="triton_ssd_rows_beyond_the_end_stored",
        edits=(("mask=m_m[:, None] & m_e[None, :])", "mask=m_e[None, :])"),),
        mechanism="masking",
        bug="B44",
        story="The last tile of rows is stored whole, over what follows.",
        trigger=f"{_TRIGGER}:-:contiguous:25",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _pairwise(
        name="triton_ssd_final_state_without_the_initial_one",
        module=_WRAPPER,
        edits=(
            (
                "None, start)\n    if not y",
                'None, None if form == "parallel" else start)\n    if not y',
            ),
        ),
        mechanism="wrapper",
        story="The final state of the quadratic form lacks what is left of the initial one.",
        trigger=f"{_TRIGGER}:initial_state,return_state:contiguous:26",
    ),
    _stepwise(
        name="triton_ssd_own_write_decayed",
        edits=((_UPDATE, "b_s = (b_s + b_b[:, None] * (b_dt * b_x)[None, :]) * tl.exp(b_dt * b_a)"),),
        story="The step of a position decays what it writes as well.",
        trigger=f"{_TRIGGER}:-:contiguous:27",
    ),
    _stepwise(
        name="triton_ssd_read_before_the_write",
        edits=((f"{_UPDATE}\n        {_READ}", f"{_READ}\n        {_UPDATE}"),),
        story="Rows read the state before their own position decays it and writes to it.",
        trigger=f"{_TRIGGER}:-:contiguous:28",
    ),
    _stepwise(
        name="triton_ssd_state_in_the_inputs_dtype",
        edits=((_READ, f"b_s = b_s.to(p_out.dtype.element_ty).to(tl.float32)\n        {_READ}"),),
        bug="B60",
        story="The state is rounded to the inputs' dtype after each step.",
        trigger="ssd:bfloat16:slow-decay:B1,H2,G1,N40,D4,E5:return_state:contiguous:29",
    ),
    _stepwise(
        name="triton_ssd_growth_for_decay",
        edits=((_UPDATE, _UPDATE.replace("tl.exp(b_dt * b_a)", "tl.exp(-b_dt * b_a)")),),
        bug="B58",
        story="A sign turns the decay into growth.",
        trigger=f"{_TRIGGER}:-:contiguous:30",
    ),
    _wrapper(
        name="triton_ssd_initial_state_assumed_contiguous",
        edits=(
            (f"{_CONTIGUOUS}states, end = inputs", "states, end = inputs"),
            (f"{_CONTIGUOUS}layout = memory_layout(x, B, C)", "layout = memory_layout(x, B, C)"),
        ),
        bug="B56",
        story="The initial state is read as if it were contiguous.",
        trigger=f"{_TRIGGER}:initial_state:transposed:31",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _wrapper(
        name="triton_ssd_final_state_over_the_initial_one",
        base=SSD_RECURRENT,
        edits=(
            (
                "        end = inputs.state(sequences.count)\n        block_d",
                "        end = inputs.state(sequences.count) if start is None else start\n        block_d",
            ),
        ),
        story="The final state is written over the initial one.",
        trigger=f"{_TRIGGER}:initial_state,return_state:contiguous:32",
        shows=("mutation", "aliasing", "gradient", "exception"),
    ),
)
