"""Mutants of the delta rule's outputs and states: decay and read, gates, chunks, packing, storage."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import DELTA, DELTA_RECURRENT, FAULT, NUMERIC

__all__ = ["MUTANTS"]

_CHUNKS = "attnproof.kernels.delta_chunks"
_STEPS = "attnproof.kernels.delta_recurrence"

_entry = partial(Mutant, base=DELTA, bug="", shows=NUMERIC)
_chunked = partial(_entry, module=_CHUNKS)
_stepwise = partial(_chunked, base=DELTA_RECURRENT, module=_STEPS)

_BETWEEN = """\
b_decay = tl.exp(b_since[:, None] + b_until[None, :])
                b_l, b_p = b_l * b_decay, b_p * b_decay"""
_WITHIN = "b_decay = tl.exp(tl.cumsum(tl.where(m_before, b_g[:, None], 0.0), 0))"
_DECAYED = f"{_WITHIN}\n            b_l, b_p = b_l * b_decay, b_p * b_decay"
_WRITES = "tl.where(m_before, b_l * b_beta[:, None], 0.0)"
_SEEN = "b_p = tl.where(m_before | (o_i[:, None] == o_i[None, :]), b_p * scale, 0.0)"
_ROW = "b_row = (o_c == i_r).to(tl.float32) - tl.sum(b_l[:, None] * b_t, 0)"
_READ = "b_u = b_beta * (b_v - tl.sum(b_s * b_k[:, None], 0))"
_WRITE = "b_s += b_k[:, None] * b_u[None, :]"
_KEY = "b_k = tl.load(p_k + i_t * s_kn, mask=m_d, other=0.0).to(tl.float32)\n"
_STATE_STORED = "tl.store(p_state + o_s, b_s, mask=m_s)"
_STATE_LOADED = "b_s = tl.load(p_state0 + o_s, mask=m_s, other=0.0)"
_WHOLE = "b_whole = tl.exp(tl.sum(b_g, 0))\n        if"
_SCALAR_GATE = (
    "m_next = (o_c < C - 1) & (o_t + 1 < i_stop)\n            b_g = tl.load(p_gt, mask=m_t, other=0.0)"
)
_GATED = 'check_gate("g", g, q, kernel)'

# (I + L)⁻¹ as a product of 1 + (−L)^(2^j); seven factors are exact for chunks of up to 128 positions.
_SUBSTITUTION = """\
    b_t = (o_r[:, None] == o_c[None, :]).to(tl.float32)
    for i_r in range(1, steps):
        b_l = tl.load(p_lower + i_r * C + o_r, mask=o_r < i_r, other=0.0)
        b_row = (o_c == i_r).to(tl.float32) - tl.sum(b_l[:, None] * b_t, 0)
        b_t = tl.where(o_r[:, None] == i_r, b_row[None, :], b_t)
"""
_POWERS = """\
    b_t = (o_r[:, None] == o_c[None, :]).to(tl.float32)
    m_l = (o_r < steps)[:, None] & (o_c[None, :] < o_r[:, None])
    b_l = -tl.load(p_lower + (o_r * C)[:, None] + o_c[None, :], mask=m_l, other=0.0)
    for _ in range(7):
        b_t += tl.dot(b_t, b_l, input_precision="ieee")
        b_l = tl.dot(b_l, b_l, input_precision="ieee")
"""

_DIFFERENCE = """\
b_c = tl.maximum(tl.cumsum(b_g, 0), -1e6)
            b_decay = tl.exp(tl.minimum(b_c[:, None] - b_c[None, :], 0.0))"""

_NEW_STATE = "state = torch.empty(x.state_shape, dtype=torch.float32, device=x.q.device)"
_SAME_STATE = f"{_NEW_STATE} if x.initial_state is None else x.initial_state"

MUTANTS = (
    _chunked(
        name="triton_delta_scores_without_decay",
        mechanism="numerics",
        edits=(
            (_BETWEEN, _BETWEEN.replace("b_l, b_p = b_l * b_decay, b_p * b_decay", "b_l = b_l * b_decay")),
            (_DECAYED, _DECAYED.replace("b_l, b_p = b_l * b_decay, b_p * b_decay", "b_l = b_l * b_decay")),
        ),
        bug="arXiv 2412.06464",
        story="P has a plain causal mask in place of its decays, as printed in the paper (theory DN-3).",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:gate=head:contiguous:1",
    ),
    _stepwise(
        name="triton_delta_read_before_the_decay",
        mechanism="numerics",
        edits=((_KEY, f"{_KEY}        b_before = b_s\n"), (_READ, _READ.replace("b_s *", "b_before *"))),
        bug="DN-4",
        story="The delta rule reads the state before it decays, as RWKV-7 does.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:gate=channel:contiguous:2",
    ),
    _chunked(
        name="triton_delta_query_before_the_write",
        mechanism="masking",
        edits=((_SEEN, "b_p = tl.where(m_before, b_p * scale, 0.0)"),),
        story="Queries read the state before their own position writes to it.",
        trigger="delta:float16:normal:B1,H1,N20,D8,E8:-:contiguous:3",
    ),
    _chunked(
        name="triton_delta_beta_of_the_key",
        mechanism="pointers",
        edits=((_WRITES, _WRITES.replace("b_beta[:, None]", "b_beta[None, :]")),),
        story="Within a block of 16 rows L takes β of the column, not of the row.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:-:contiguous:4",
    ),
    _chunked(
        name="triton_delta_first_order_inverse",
        mechanism="numerics",
        edits=((_ROW, _ROW.replace("b_t, 0)", "(o_r[:, None] == o_c[None, :]).to(tl.float32), 0)")),),
        story="(I + L)⁻¹ is taken as I − L.",
        trigger="delta:bfloat16:normal:B1,H1,N20,D8,E8:-:contiguous:5",
    ),
    _chunked(
        name="triton_delta_inverse_by_powers",
        mechanism="numerics",
        edits=((_SUBSTITUTION, _POWERS),),
        bug="B61",
        story="(I + L)⁻¹ is a product of 1 + (−L)^(2^j), whose terms cancel where keys are correlated.",
        trigger="delta:float32:correlated-keys:B1,H1,N20,D8,E8:-:contiguous:6",
    ),
    _chunked(
        name="triton_delta_decay_taken_apart",
        mechanism="numerics",
        edits=(
            (
                _WITHIN,
                "b_c = tl.cumsum(b_g, 0)\n            b_decay = tl.exp(b_c)[:, None] * tl.exp(-b_c)[None, :]",
            ),
        ),
        bug="B45",
        story="The decay from i to t is e^{b_t}·e^{−b_i}, 0·inf under strong decay.",
        trigger="delta:float32:strong-decay:B1,H1,N20,D8,E8:gate=head:contiguous:7",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _chunked(
        name="triton_delta_decay_by_difference",
        mechanism="numerics",
        edits=(
            (
                _WITHIN,
                _DIFFERENCE,
            ),
        ),
        bug="B46",
        story="The decay from i to t is a difference of sums, which loses small gates after huge ones.",
        trigger="delta:float32:strong-decay:B1,H1,N20,D8,E8:gate=head:contiguous:8",
    ),
    _entry(
        name="triton_delta_gates_held_at_a_floor",
        mechanism="wrapper",
        edits=((_GATED, f"{_GATED}\n        g = g.clamp(min=-5.0)"),),
        story="Log decays below −5 are held there.",
        trigger="delta:float32:strong-decay:B1,H1,N20,D8,E8:gate=channel:contiguous:9",
    ),
    _chunked(
        name="triton_delta_decay_of_the_key_itself",
        mechanism="pointers",
        edits=(
            (
                "p_g + (i_first + i_i + 1) * s_gn, mask=m_d & m_next",
                "p_g + (i_first + i_i) * s_gn, mask=m_d & m_i",
            ),
        ),
        story="The decay of a channel from i to t has the gates i to t − 1 in place of i + 1 to t.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:gate=channel:contiguous:10",
    ),
    _chunked(
        name="triton_delta_write_decayed_by_its_own_gate",
        mechanism="pointers",
        edits=(("tl.load(p_gt + s_gn, mask=m_next", "tl.load(p_gt, mask=m_next"),),
        story="What a chunk writes to the state decays from its own gate on.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:gate=head:contiguous:11",
    ),
    _chunked(
        name="triton_delta_last_gate_of_a_chunk_lost",
        mechanism="numerics",
        edits=((_WHOLE, _WHOLE.replace("tl.sum(b_g, 0)", "tl.sum(tl.where(o_c < C - 1, b_g, 0.0), 0)")),),
        story="The state does not decay by the last gate of a whole chunk.",
        trigger="delta:float32:normal:B1,H1,N40,D8,E8:gate=head:contiguous:12",
    ),
    _chunked(
        name="triton_delta_infinite_gate_is_nan",
        mechanism="special-values",
        edits=(("b_nan += tl.where(b_g == -INF, 0.0, b_g * 0.0)", "b_nan += b_g * 0.0"),),
        story="A gate of −inf is taken for a value that is not finite.",
        trigger="delta:float32:mixed-gates:B1,H1,N20,D8,E8:gate=head:contiguous:13",
        shows=("nonfinite",),
    ),
    _chunked(
        name="triton_delta_state_of_the_chunk_unscaled",
        mechanism="numerics",
        edits=(("b_s_in, input_precision=PRECISION) * scale", "b_s_in, input_precision=PRECISION)"),),
        story="What queries read from the state before their chunk lacks the scale.",
        trigger="delta:float16:normal:B1,H1,N20,D8,E8:-:contiguous:14",
    ),
    _chunked(
        name="triton_delta_initial_state_of_the_first_sequence",
        mechanism="pointers",
        edits=(
            (
                _STATE_LOADED,
                _STATE_LOADED.replace("p_state0 + o_s", "p_state0 + o_s - i_s.to(tl.int64) * H * D * E"),
            ),
        ),
        story="Every sequence starts from the initial state of the first.",
        trigger="delta:float32:normal:B2,H2,N20,D8,E8:initial_state:contiguous:15",
    ),
    _chunked(
        name="triton_delta_state_mask_transposed",
        mechanism="masking",
        edits=(("m_s = m_d[:, None] & m_e[None, :]", "m_s = (o_d < E)[:, None] & (o_e < D)[None, :]"),),
        bug="B52",
        story="The mask of the state has D and E in each other's place.",
        trigger="delta:float32:normal:B1,H2,N20,D16,E12:initial_state:contiguous:16",
    ),
    _entry(
        name="triton_delta_initial_state_overwritten",
        mechanism="wrapper",
        edits=((_NEW_STATE, _SAME_STATE),),
        story="The final state is written over the initial one, as a decoder's cache is.",
        trigger="delta:float32:normal:B1,H2,N20,D8,E8:initial_state,return_state:contiguous:17",
        shows=("mutation",),
    ),
    _entry(
        name="triton_delta_state_of_no_positions_is_zero",
        mechanism="wrapper",
        edits=(
            ("state.zero_() if x.initial_state is None else state.copy_(x.initial_state)", "state.zero_()"),
        ),
        bug="B57",
        story="Where there is no position, the final state is 0, not the initial one.",
        trigger="delta:float32:normal:B2,H1,N0,D8,E8:initial_state,return_state:contiguous:18",
    ),
    _chunked(
        name="triton_delta_state_of_an_empty_sequence_is_zero",
        mechanism="masking",
        edits=((_STATE_STORED, f"b_s = tl.where(i_stop > i_start, b_s, 0.0)\n        {_STATE_STORED}"),),
        bug="B57",
        story="The final state of a packed sequence of length 0 is 0, not its initial state.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:initial_state,cu_seqlens=7+0+13,return_state:contiguous:19",
    ),
    _chunked(
        name="triton_delta_chunks_from_the_beginning_of_the_row",
        mechanism="pointers",
        edits=(("blocks = ((i_first - i_start) % C // SIDE)", "blocks = (i_first % C // SIDE)"),),
        bug="B59",
        story="Blocks of packed sequences are counted in chunks of the row, not of their own sequence.",
        trigger="delta:bfloat16:normal:B1,H1,N60,D8,E8:cu_seqlens=17+43:contiguous:20",
        shows=(*NUMERIC, "nonfinite", "isolation", "determinism"),
    ),
    _chunked(
        name="triton_delta_state_decayed_by_the_next_sequence",
        mechanism="masking",
        edits=((_SCALAR_GATE, _SCALAR_GATE.replace("mask=m_t", "mask=o_t < N")),),
        bug="B43",
        story="A packed sequence's final state decays by gates of the next that fill up its last chunk.",
        trigger="delta:float32:normal:B1,H1,N30,D8,E8:gate=head,initial_state,cu_seqlens=7+23,return_state"
        ":contiguous:21",
    ),
    _chunked(
        name="triton_delta_write_decayed_by_the_next_sequence",
        mechanism="masking",
        edits=(
            ("((o_c < C - 1) & (o_t + 1 < i_stop))[:, None]", "((o_c < C - 1) & (o_t + 1 < N))[:, None]"),
        ),
        bug="B44",
        story="What a packed sequence's last chunk writes decays by gates of the next sequence.",
        trigger="delta:float32:normal:B1,H1,N30,D8,E8:gate=channel,cu_seqlens=7+23,return_state:contiguous:22",
    ),
    _chunked(
        name="triton_delta_gates_of_the_first_head",
        mechanism="pointers",
        edits=(
            (
                "p_g += i_b * s_gb + i_h * s_gh\n        # [16]: decay",
                "p_g += i_b * s_gb\n        # [16]: decay",
            ),
        ),
        bug="B50",
        story="Within a chunk every head decays by the gates of head 0.",
        trigger="delta:float32:normal:B1,H2,N20,D8,E8:gate=head:contiguous:23",
    ),
    _stepwise(
        name="triton_delta_gates_beyond_the_width",
        mechanism="pointers",
        edits=(("o_d * s_gd, mask=m_d, other=0.0)", "o_d * s_gd)"),),
        bug="B48",
        story="Gates are loaded for a padded width.",
        trigger="delta:float32:normal:B1,H1,N8,D5,E8:gate=channel:contiguous:24",
        shows=FAULT,
    ),
    _chunked(
        name="triton_delta_nan_reaches_earlier_rows",
        mechanism="special-values",
        edits=(
            (
                "operand(tl.where(m_finite, (b_v - b_u) * b_beta[:, None], 0.0), dtype)",
                "operand((b_v - b_u) * b_beta[:, None], dtype)",
            ),
        ),
        bug="B21",
        story="A NaN in a value reaches earlier rows of its chunk as 0·NaN.",
        trigger="delta:float32:future-nonfinite:B1,H1,N12,D8,E8:-:contiguous:25",
        shows=("nonfinite", "causality", "future-nonfinite", "isolation"),
    ),
    _chunked(
        name="triton_delta_operands_in_float16",
        mechanism="numerics",
        edits=(("b_x = tl.where((b_bits & 0x7F800000) == 0x7F800000, b_x, b_round)", "b_x = b_x.to(dtype)"),),
        bug="B60",
        story="States and values of float16 inputs enter products as float16, which underflows.",
        trigger="delta:float16:subnormal-values:B1,H2,N40,D8,E8:return_state:contiguous:26",
        unseen="operands may be float16 by the contract, and float16 underflows",
    ),
    _stepwise(
        name="triton_delta_state_in_the_inputs_dtype",
        mechanism="accuracy",
        edits=((_WRITE, f"{_WRITE}\n        b_s = b_s.to(p_k.dtype.element_ty).to(tl.float32)"),),
        bug="B60",
        story="The state is rounded to the inputs' dtype after each step.",
        trigger="delta:bfloat16:slow-decay:B1,H1,N40,D8,E8:gate=head,return_state:contiguous:27",
    ),
    _chunked(
        name="triton_delta_inverse_in_the_inputs_dtype",
        mechanism="accuracy",
        edits=(
            (
                _ROW,
                f"{_ROW}.to(tl.bfloat16).to(tl.float32)".replace("b_row = (", "b_row = ((").replace(
                    "b_t, 0)", "b_t, 0))"
                ),
            ),
        ),
        bug="B61",
        story="Rows of (I + L)⁻¹ are rounded to bfloat16 before later rows are made of them, in every dtype.",
        trigger="delta:float32:correlated-keys:B1,H1,N20,D8,E8:-:contiguous:28",
    ),
)
