"""Mutants of gated linear attention: decays, chunks, states, and their gradients."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import (
    FAULT,
    GATED_LINEAR,
    GATED_LINEAR_RECURRENT,
    NUMERIC,
    STATES,
)

__all__ = ["MUTANTS"]

_CHUNKS = "attnproof.kernels.gated_linear_chunks"
_BACKWARD = "attnproof.kernels.gated_linear_backward"
_WRAPPER = "attnproof.kernels.gated_linear"

_output = partial(
    Mutant, base=GATED_LINEAR, module=_CHUNKS, mechanism="numerics", bug="", shows=(*NUMERIC, "nonfinite")
)
_stepwise = partial(_output, base=GATED_LINEAR_RECURRENT)
_pointer = partial(_output, mechanism="pointers")
_wrapper = partial(_output, module=_WRAPPER, mechanism="wrapper")
_gradient = partial(_output, module=_BACKWARD, mechanism="gradient")
_backward = partial(_gradient, module=_WRAPPER)

_TRIGGER = "gated_linear:float32:normal:B1,H2,N20,D4,E5"

_PAIR = "            b_w = tl.exp(segment(b_step, b_next, o_r, i_j, REVERSE, EXCLUSIVE))\n"
_GRADIENT_PAIR = "b_w = tl.exp(segment(b_step, b_next, o_r, i_j, False, EXCLUSIVE))"
_SUMS = "b_c = tl.cumsum(b_step, 0)"
_AT_J = "tl.sum(tl.where(o_r[:, None] == i_j, b_c, 0.0), 0)[None, :]"

_FACTORED = f"""{_PAIR}\
            if not REVERSE:
                {_SUMS}
                b_w = tl.exp(b_c) * tl.exp(-{_AT_J})
"""
_DIFFERENCES = f"""{_PAIR}\
            if not REVERSE:
                {_SUMS}
                b_w = tl.exp(b_c - {_AT_J})
"""

_GATES = "b_g = tile(p_g, s_gn, s_gd, i_n + o_r, m_r, o_d, m_d)"
_ENTERING = "b_prefix, b_suffix = tl.cumsum(b_step, 0), tl.cumsum(b_next, 0, reverse=True)"
_TO_THE_END = "b_decay = tl.exp(tl.cumsum(b_step, 0) if REVERSE else tl.cumsum(b_next, 0, reverse=True))"
_STATE = "b_s = product(tl.trans(b_y * b_decay), b_z, b_s * tl.exp(b_total)[:, None], DTYPE)"
_WHOLE_CHUNKS = f"""\
b_all = {_STATE.removeprefix("b_s = ")}
            b_s = b_all if REVERSE else tl.where(i_start + (i_c + 1) * C <= i_stop, b_all, b_s)"""
_KEPT = "tl.store(p_states + ((i_c0 + i_c) * H + i_h) * D * E + o_s, b_s, mask=m_s)"
_START = "b_s = tl.load(p_start + i_area + o_s, mask=m_s, other=0.0)"
_HEADS_GATE = "p_g += i_b * s_gb + i_h * s_gh\n    i_c0"
_STATES_DECAYS = """\
decays(p_g, s_gn, s_gd, i_n, i_stop, o_d, m_d, R, EXCLUSIVE)
            b_decay"""

_NEW = "b_new = b_decayed + b_k[:, None] * b_v[None, :]"
_GRADIENTS = "dq, dk, dg, du = gradients(run, chunks, (q, k, v), do, g, u, states, dstates)"
# From gradients that are not rounded to the inputs' dtype: the closed form as kernels have it.
_CLOSED_FORM = f"""\
{_GRADIENTS}
            wide = [x.float() for x in (q, k, v, do)]
            wide_dq, wide_dk, _, _ = gradients(run, chunks, tuple(wide[:3]), wide[3], g, u, states, dstates)
            dg = (wide[0] * wide_dq - wide[1] * wide_dk).flip(2).cumsum(2).flip(2)"""
_EVERYWHERE = f"""\
{_CLOSED_FORM}
            if dend is not None:
                end = chunk_states(run, chunks, k, v, g, start, reverse=False)[1]
                dg = dg + (end * dend).sum((0, 1, 3))"""
_EACH_SEQUENCE = """
                if run.sequences.cu_seqlens is not None:
                    lengths = run.sequences.cu_seqlens.diff().long()
                    dg = dg + (end * dend).sum(3).repeat_interleave(lengths, 0).transpose(0, 1)[None]
                else:
                    dg = dg + (end * dend).sum(3)[:, :, None]"""
_ACROSS_SEQUENCES = _EVERYWHERE.replace(
    "\n                dg = dg + (end * dend).sum((0, 1, 3))", _EACH_SEQUENCE
)
_ALL_GRADIENTS = "found = (dq, dk, dv, dg, du, dstart)"
_DSTATES = "dstates, dstart = chunk_states(run, chunks, q, do, g, dend, reverse=True)"
_SPREAD = "g = g.float().unsqueeze(-1).expand(q.shape)"

MUTANTS = (
    _stepwise(
        name="triton_gated_own_key_decayed",
        edits=((_NEW, "b_new = (b_s + b_k[:, None] * b_v[None, :]) * tl.exp(b_g)[:, None]"),),
        story="The gate of a position decays the key of that position as well.",
        trigger=f"{_TRIGGER}:-:contiguous:1",
    ),
    _stepwise(
        name="triton_gated_read_before_the_decay",
        edits=(("b_read = b_new", "b_read = b_s + b_k[:, None] * b_v[None, :]"),),
        bug="RWK-2",
        story="Rows read the state before their gate decays it, as in RWKV-6.",
        trigger=f"{_TRIGGER}:-:contiguous:2",
    ),
    _stepwise(
        name="triton_gated_state_in_the_inputs_dtype",
        edits=(("b_s = b_new\n", "b_s = b_new.to(p_out.dtype.element_ty).to(tl.float32)\n"),),
        bug="B60",
        story="The state is rounded to the inputs' dtype after each step.",
        trigger="gated_linear:bfloat16:slow-decay:B1,H2,N40,D4,E5:return_state:contiguous:3",
    ),
    _output(
        name="triton_gated_pairs_decay_once_too_often",
        edits=(("m_r = o_r > i_j + (1 if EXCLUSIVE else 0)", "m_r = o_r >= i_j + (1 if EXCLUSIVE else 0)"),),
        story="Within 16 rows a key is decayed by its own gate.",
        trigger=f"{_TRIGGER}:-:contiguous:4",
    ),
    _output(
        name="triton_gated_state_enters_undecayed",
        edits=((_ENTERING, _ENTERING.replace("tl.cumsum(b_step, 0),", "tl.cumsum(b_step, 0) - b_step,")),),
        story="A row reads the state that enters its 16 rows without the row's own gate.",
        trigger=f"{_TRIGGER}:initial_state:contiguous:5",
    ),
    _output(
        name="triton_gated_decay_factored",
        edits=((_PAIR, _FACTORED),),
        bug="B45",
        story="The decay of a pair is exp(bᵢ)·exp(−bⱼ), 0·inf where gates are strong.",
        trigger="gated_linear:float32:strong-decay:B1,H2,N20,D4,E5:-:contiguous:6",
    ),
    _output(
        name="triton_gated_difference_of_sums",
        edits=((_PAIR, _DIFFERENCES),),
        mechanism="special-values",
        story="The decay of a pair is exp(bᵢ − bⱼ), and −inf − (−inf) where a gate is −inf.",
        trigger="gated_linear:float32:alternating-gates:B1,H2,N20,D4,E5:-:contiguous:7",
    ),
    _output(
        name="triton_gated_suffix_as_a_difference",
        edits=(
            (
                _TO_THE_END,
                _TO_THE_END.replace(
                    "tl.cumsum(b_next, 0, reverse=True)", "b_total[None, :] - tl.cumsum(b_step, 0)"
                ),
            ),
        ),
        bug="B46",
        story="What decays a key to the end of its chunk is the total less the sum so far.",
        trigger="gated_linear:float32:strong-decay:B1,H2,N20,D4,E5:return_state:contiguous:8",
    ),
    _output(
        name="triton_gated_gates_clamped",
        edits=((_GATES, f"{_GATES}\n    b_g = tl.maximum(b_g, -10.0)"),),
        mechanism="special-values",
        story="Gates are held above −10, so that no gate empties the state.",
        trigger="gated_linear:float32:closed-gates:B1,H2,N20,D4,E5:initial_state,return_state:contiguous:9",
    ),
    _output(
        name="triton_gated_gates_in_bfloat16",
        edits=((_GATES, f"{_GATES}.to(tl.bfloat16).to(tl.float32)"),),
        story="Gates are rounded to bfloat16, in every dtype.",
        trigger=f"{_TRIGGER}:return_state:contiguous:10",
    ),
    _output(
        name="triton_gated_products_in_tf32",
        edits=(('b_o, input_precision="ieee")', 'b_o, input_precision="tf32")'),),
        bug="B30",
        story="Matmuls of float32 round their operands to tf32.",
        trigger=f"{_TRIGGER}:return_state:contiguous:11",
    ),
    _output(
        name="triton_gated_kept_states_in_bfloat16",
        edits=((_KEPT, _KEPT.replace("b_s, mask", "b_s.to(tl.bfloat16).to(tl.float32), mask")),),
        bug="B60",
        story="The states between chunks are kept in bfloat16.",
        trigger=f"{_TRIGGER}:initial_state:contiguous:12",
    ),
    _output(
        name="triton_gated_ragged_chunk_left_out_of_the_state",
        edits=((_STATE, _WHOLE_CHUNKS),),
        mechanism="masking",
        bug="B47",
        story="The final state lacks what comes after the last whole chunk.",
        trigger=f"{_TRIGGER}:initial_state,return_state:contiguous:13",
    ),
    _output(
        name="triton_gated_own_key_unseen",
        edits=(
            ("m_j = o_r <= i_j if REVERSE else o_r >= i_j", "m_j = o_r <= i_j if REVERSE else o_r > i_j"),
        ),
        mechanism="masking",
        story="No row sees its own key.",
        trigger=f"{_TRIGGER}:-:contiguous:14",
    ),
    _output(
        name="triton_gated_unseen_values_reach_rows",
        edits=(
            (
                "b_clean, b_nan = isolated(b_z, m_seen, tl.zeros([R], dtype=tl.float32))",
                "b_clean, b_nan = b_z, tl.zeros([R], dtype=tl.float32)",
            ),
        ),
        mechanism="special-values",
        bug="B21",
        story="A NaN in a later value of the same 16 rows reaches a row as 0·NaN.",
        trigger="gated_linear:float32:future-nonfinite:B1,H2,N20,D4,E5:-:contiguous:15",
        shows=("nonfinite", "unseen-nonfinite", "isolation", "causality"),
    ),
    _pointer(
        name="triton_gated_gates_of_the_next_sequence",
        edits=((_STATES_DECAYS, _STATES_DECAYS.replace("i_stop,", "N,")),),
        bug="B43",
        story="Rows that fill up a sequence's last chunk take the gates of the next sequence into the state.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,return_state:contiguous:16",
    ),
    _pointer(
        name="triton_gated_one_initial_state_for_all",
        edits=((_START, _START.replace("i_area", "i_h * D * E")),),
        story="Every sequence begins with the initial state of the first.",
        trigger=f"{_TRIGGER}:initial_state,cu_seqlens=7+0+13:contiguous:17",
    ),
    _pointer(
        name="triton_gated_initial_state_transposed",
        edits=((_START, _START.replace("o_s,", "o_d[:, None] + o_e.to(tl.int64)[None, :] * D,")),),
        bug="B52",
        story="The initial state is read as values by keys.",
        trigger="gated_linear:float32:normal:B1,H2,N20,D4,E4:initial_state:contiguous:18",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _pointer(
        name="triton_gated_states_with_the_first_heads_gates",
        edits=((_HEADS_GATE, _HEADS_GATE.replace(" + i_h * s_gh", "")),),
        bug="B50",
        story="In every head the states between chunks decay with the gates of head 0.",
        trigger=f"{_TRIGGER}:return_state:contiguous:19",
    ),
    _pointer(
        name="triton_gated_ragged_chunks_of_packed_sequences",
        module=STATES,
        edits=(("numbers = [-(-(stop - start) // size)", "numbers = [max(stop - start, 0) // size"),),
        story="Of packed sequences only whole chunks are computed.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13:contiguous:20",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _wrapper(
        name="triton_gated_initial_state_assumed_contiguous",
        edits=(("y, z, g, None if start is None else start.contiguous(), states", "y, z, g, start, states"),),
        bug="B56",
        story="The initial state is read as if it were contiguous.",
        trigger=f"{_TRIGGER}:initial_state:transposed:21",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _wrapper(
        name="triton_gated_final_state_over_the_initial_one",
        base=GATED_LINEAR_RECURRENT,
        edits=(
            (
                "    gates = g if run.factors",
                "    end = end if start is None else start\n    gates = g if run.factors",
            ),
        ),
        story="The final state is written over the initial one.",
        trigger=f"{_TRIGGER}:initial_state,return_state:contiguous:22",
        shows=("mutation", "aliasing", "gradient", "exception"),
    ),
    _gradient(
        name="triton_gated_keys_scaled_twice",
        edits=(("b_dk.to(p_dk", "(b_dk * scale).to(p_dk"),),
        story="dk has the scale squared.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:23",
    ),
    _gradient(
        name="triton_gated_queries_unscaled",
        edits=(("(b_dq * scale).to(p_dq", "b_dq.to(p_dq"),),
        story="dq lacks the scale.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:24",
    ),
    _gradient(
        name="triton_gated_queries_of_the_undecayed_state",
        edits=(
            ("read(b_do, tl.trans(b_s), DTYPE, BY_ROW) * b_in", "read(b_do, tl.trans(b_s), DTYPE, BY_ROW)"),
        ),
        story="dq reads the state that enters 16 rows without the gates up to its row.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:25",
    ),
    _gradient(
        name="triton_gated_state_recomputed_without_decay",
        edits=(("            b_k *= tl.exp(tl.cumsum(b_next, 0, reverse=True))\n", ""),),
        story="Keys enter the recomputed state without the gates that come after them in their 16 rows.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:26",
    ),
    _gradient(
        name="triton_gated_gates_without_what_passes_through",
        edits=(
            (
                "b_dg = (b_total * tl.sum(b_s * b_ds, 1))[None, :]",
                "b_dg = tl.zeros([R, BD], dtype=tl.float32)",
            ),
        ),
        bug="GLA-4",
        story="dg lacks pairs with one end before these 16 rows and the other behind them.",
        trigger=f"{_TRIGGER}:initial_state,return_state,cotangents=normal:contiguous:27",
    ),
    _gradient(
        name="triton_gated_gates_with_their_own_key",
        edits=(("(o_r[None, :] < o_r[:, None]).to", "(o_r[None, :] <= o_r[:, None]).to"),),
        story="dg counts the pairs of the key of its own position with rows behind these 16.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:28",
    ),
    _gradient(
        name="triton_gated_gradient_by_difference_of_sums",
        edits=((_GRADIENT_PAIR, f"{_SUMS}\n            b_w = tl.exp(b_c - {_AT_J})"),),
        bug="B42",
        story="The backward pass takes decays as exp(bᵢ − bⱼ): NaN where a gate is −inf.",
        trigger="gated_linear:float32:mixed-gates:B1,H2,N20,D4,E5:cotangents=normal:contiguous:29",
    ),
    _gradient(
        name="triton_gated_gradient_with_the_first_heads_gates",
        edits=(("p_g += i_b * s_gb + i_h * s_gh", "p_g += i_b * s_gb"),),
        bug="B50",
        story="dq, dk and dg of every head are computed with the gates of head 0.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:30",
    ),
    _gradient(
        name="triton_gated_dv_decays_from_the_wrong_end",
        module=_CHUNKS,
        edits=(("(b_suffix, b_prefix) if REVERSE else", "(b_prefix, b_suffix) if REVERSE else"),),
        story="dv reads the gradient of the state behind 16 rows with the gates before its row.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:31",
    ),
    _backward(
        name="triton_gated_final_cotangent_dropped",
        edits=((_DSTATES, _DSTATES.replace("dend,", "None,")),),
        story="The cotangent of the final state is ignored.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:32",
    ),
    _backward(
        name="triton_gated_initial_state_without_gradient",
        edits=((_ALL_GRADIENTS, _ALL_GRADIENTS.replace("dstart", "None")),),
        bug="B57",
        story="The initial state gets no gradient.",
        trigger=f"{_TRIGGER}:initial_state,cotangents=normal:contiguous:33",
        shows=("gradient",),
    ),
    _backward(
        name="triton_gated_initial_state_gradient_of_a_later_state",
        edits=(
            (
                _ALL_GRADIENTS,
                f"dstart = dstates[:: chunks.each] if chunks.each else dstart\n        {_ALL_GRADIENTS}",
            ),
        ),
        bug="B57",
        story="The initial state gets the gradient of the state behind the first chunk.",
        trigger=f"{_TRIGGER}:initial_state,return_state,cotangents=normal:contiguous:34",
    ),
    _backward(
        name="triton_gated_gates_without_the_final_state",
        edits=((_GRADIENTS, _CLOSED_FORM),),
        bug="GLA-4",
        story="dg is the reverse sum of q∘dq − k∘dk alone, without S∘dS of the final state.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:35",
    ),
    _backward(
        name="triton_gated_final_state_of_all_heads_in_the_gates",
        edits=((_GRADIENTS, _EVERYWHERE),),
        bug="B51",
        story="In dg the final state's S∘dS is summed over batch and heads.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:36",
    ),
    _backward(
        name="triton_gated_gates_across_sequences",
        edits=((_GRADIENTS, _ACROSS_SEQUENCES),),
        story="The reverse sum of dg runs on from the end of a packed sequence into the one before it.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,return_state,cotangents=normal:contiguous:37",
    ),
    _backward(
        name="triton_gated_head_gate_averaged",
        edits=(
            (
                _SPREAD,
                f"{_SPREAD}\n        _ = g.requires_grad and g.register_hook(lambda x: x / x.shape[-1])",
            ),
        ),
        story="The gradient of a gate of a whole head is the mean over key channels, not the sum.",
        trigger=f"{_TRIGGER}:gate=head,cotangents=normal:contiguous:38",
    ),
    _backward(
        name="triton_gated_cotangent_assumed_contiguous",
        edits=(
            (
                "chunks.owner, *strided(layout, q, k, v, do), *g.stride(),",
                'chunks.owner, *strided(layout, q, k, v, torch.empty(do.shape, device="meta")), *g.stride(),',
            ),
        ),
        bug="B56",
        story="dq, dk and dg read the cotangent as if it were contiguous.",
        trigger=f"{_TRIGGER}:cotangents=normal:transposed:39",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
)
