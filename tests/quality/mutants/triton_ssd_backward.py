"""Mutants of the gradients of state space duality: steps, rates, groups, states and their cotangents."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, NUMERIC, SSD, SSD_PARALLEL, SSD_RECURRENT

__all__ = ["MUTANTS"]

_BACKWARD = "attnproof.kernels.ssd_backward"
_WRAPPER = "attnproof.kernels.ssd"

_gradient = partial(
    Mutant, base=SSD, module=_BACKWARD, mechanism="gradient", bug="", shows=(*NUMERIC, "nonfinite")
)
_call = partial(_gradient, module=_WRAPPER)

_TRIGGER = "ssd:float32:normal:B1,H4,G2,N20,D4,E5"
_STRONG = "ssd:float32:strong-decay:B1,H2,G1,N20,D4,E5"

_WEIGHTS = "b_p = decayed(scores(p_c, s_cn, s_cd, o_n, m_n, p_b, s_bn, s_bd, o_n, m_n, D, BD), b_g, C)"
_BEYOND = """\
b_c = tl.where(m_n, tl.cumsum(b_dt * b_a, 0), 0.0)
    b_p = scores(p_c, s_cn, s_cd, o_n, m_n, p_b, s_bn, s_bd, o_n, m_n, D, BD)
    m_p = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    b_p = tl.where(m_p, b_p * tl.exp(b_c[:, None] - b_c[None, :]), 0.0)"""
_OF_A_HEAD = "gates(p_dt, s_tn, b_a, i_n, i_stop, C)"
_GATES = "b_dg = crossing(b_pairs, b_rows, b_columns, C) + tl.sum(b_across, 0)"
_BY_SUMS = """\
b_row = tl.sum(b_pairs, 1) + b_rows - tl.sum(b_pairs, 0) - b_columns
    b_dg = tl.cumsum(b_row, 0, reverse=True) + tl.sum(b_columns, 0) + tl.sum(b_across, 0)"""
_STEPS = "(b_ddt + b_a * b_dg)"
_OF_THE_GROUP = "i_h = i_g * GROUP + i_r"
_DSTATES = "dstates, dstart = chunk_states(inputs, sequences, chunks, dy, dend)"
_FOUND = "found = (dx, ddt, dA.sum(0).to(A.dtype), dB, dC, whole_dD, dstart)"
_RECOMPUTED = "states, _ = chunk_states(inputs, sequences, chunks, None, start)"

MUTANTS = (
    _gradient(
        name="triton_ssd_exponents_beyond_the_chunk",
        edits=((_WEIGHTS, _BEYOND),),
        bug="B35",
        story="exp(bᵢ − bⱼ) for rows i beyond the end is inf, times a C of 0 there: dx is NaN.",
        trigger=f"{_STRONG}:cotangents=normal:contiguous:1",
    ),
    _gradient(
        name="triton_ssd_gradient_precedence_of_start_and_stride",
        edits=((_OF_A_HEAD, _OF_A_HEAD.replace("p_dt", "p_dt + i_n * (1 - s_tn)")),),
        bug="B36",
        story="dx and ddt read dt at start + offset·stride, the stride left out of the start.",
        trigger="ssd:float32:normal:B1,H2,G1,N70,D4,E5:cotangents=normal:columns:2",
    ),
    _gradient(
        name="triton_ssd_packed_db_without_the_exponential",
        edits=(
            (
                "b_db += b_columns * tl.exp(b_tail)",
                "b_db += b_columns * (tl.exp(b_tail) if p_cu is None else tl.minimum(b_tail, 0.0))",
            ),
        ),
        bug="B37",
        story="In packed sequences dB is scaled by the logarithm of the decay to the end of the chunk.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,return_state,cotangents=normal:contiguous:3",
    ),
    _gradient(
        name="triton_ssd_gradients_of_interleaved_groups",
        edits=((_OF_THE_GROUP, "i_h = i_r * G + i_g"),),
        story="dB and dC of group g are summed over the heads h with h % G = g.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:4",
    ),
    _gradient(
        name="triton_ssd_gradients_of_the_last_head_of_a_group",
        edits=(
            ("b_dc += b_rows * tl.exp(b_head)[:, None]", "b_dc = b_rows * tl.exp(b_head)[:, None]"),
            ("b_db += b_columns * tl.exp(b_tail)[:, None]", "b_db = b_columns * tl.exp(b_tail)[:, None]"),
        ),
        story="dB and dC of a group are those of its last head, not the sum.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:5",
    ),
    _gradient(
        name="triton_ssd_db_with_the_first_heads_rate",
        edits=(("        b_a = tl.load(p_a + i_h)", "        b_a = tl.load(p_a + i_g * GROUP)"),),
        bug="B50",
        story="All heads of a group decay at the rate of its first in dB and dC.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:6",
    ),
    _gradient(
        name="triton_ssd_db_of_the_state_without_steps",
        edits=(
            (
                "b_v = values(p_xh, s_xn, s_xe, b_dt, o_n, m_n, o_e, m_e)",
                "b_v = tile(p_xh, s_xn, s_xe, o_n, m_n, o_e, m_e)",
            ),
        ),
        story="What dB takes of the gradient of the state lacks dt.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:7",
    ),
    _gradient(
        name="triton_ssd_dc_of_the_undecayed_state",
        edits=(("b_dc += b_rows * tl.exp(b_head)[:, None]", "b_dc += b_rows"),),
        story="dC reads the state before the chunk without the decay up to its row.",
        trigger=f"{_TRIGGER}:initial_state,cotangents=normal:contiguous:8",
    ),
    _gradient(
        name="triton_ssd_rate_without_steps",
        edits=(("tl.store(p_da + i_ch, tl.sum(b_dt * b_dg, 0))", "tl.store(p_da + i_ch, tl.sum(b_dg, 0))"),),
        story="dA is the sum of dg, not of dt dg.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:9",
    ),
    _gradient(
        name="triton_ssd_steps_of_the_gates_alone",
        edits=((_STEPS, "(b_a * b_dg)"),),
        story="ddt lacks its part through dt x.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:10",
    ),
    _gradient(
        name="triton_ssd_steps_of_the_values_alone",
        edits=((_STEPS, "b_ddt"),),
        story="ddt lacks its part through the decay.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:11",
    ),
    _gradient(
        name="triton_ssd_steps_with_the_skip",
        edits=(("b_ddt += tl.sum(b_dv * b_x, 1)", "b_ddt += tl.sum((b_dv + b_skip * b_do) * b_x, 1)"),),
        story="ddt counts the skip term, as if it were D dt x.",
        trigger=f"{_TRIGGER}:skip,cotangents=normal:contiguous:12",
    ),
    _gradient(
        name="triton_ssd_dx_with_the_skip_times_steps",
        edits=(("b_dx += b_skip * b_do", "b_dx += b_skip * b_do * b_dt[:, None]"),),
        story="The skip term of dx is D dt dy.",
        trigger=f"{_TRIGGER}:skip,cotangents=normal:contiguous:13",
    ),
    _gradient(
        name="triton_ssd_gates_with_their_own_write",
        edits=(("m_before = o_c[:, None] > o_c[None, :]", "m_before = o_c[:, None] >= o_c[None, :]"),),
        story="dg counts pairs whose column is its own position, and leaves out that row's own state.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:14",
    ),
    _gradient(
        name="triton_ssd_gates_without_what_passes_through",
        edits=((_GATES, _GATES.replace(" + tl.sum(b_across, 0)", "")),),
        bug="GLA-4",
        story="dg lacks S∘dS, what comes from before a chunk and is read behind it.",
        trigger=f"{_TRIGGER}:initial_state,return_state,cotangents=normal:contiguous:15",
    ),
    _gradient(
        name="triton_ssd_passing_state_undecayed",
        edits=(("b_across += tl.sum(b_s * b_total * b_ds, 1)", "b_across += tl.sum(b_s * b_ds, 1)"),),
        story="In dg the product S∘dS lacks the decay over the chunk.",
        trigger=f"{_TRIGGER}:initial_state,return_state,cotangents=normal:contiguous:16",
    ),
    _gradient(
        name="triton_ssd_gates_by_a_reverse_sum",
        edits=((_GATES, _BY_SUMS),),
        bug="B46",
        story="dg is the reverse sum of C·dC − B·dB: large pairs that do not cross t are taken off again.",
        trigger=f"{_STRONG}:cotangents=normal:contiguous:17",
        unseen="Budgets of ddt and dA hold for reverse sums of C·dC − B·dB, as chunkwise kernels have them.",
    ),
    _gradient(
        name="triton_ssd_dx_undecayed_to_the_end",
        edits=(("        b_dv *= b_tail[:, None]\n", ""),),
        story="dx takes the gradient of the state behind a chunk without the decay to its end.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:18",
    ),
    _call(
        name="triton_ssd_final_cotangent_dropped",
        base=SSD_PARALLEL,
        edits=((_DSTATES, _DSTATES.replace("dend)", "None)")),),
        story="The cotangent of the final state is ignored.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:19",
    ),
    _call(
        name="triton_ssd_initial_state_without_gradient",
        base=SSD_RECURRENT,
        edits=((_FOUND, _FOUND.replace("dstart", "None")),),
        bug="B57",
        story="The initial state gets no gradient.",
        trigger=f"{_TRIGGER}:initial_state,cotangents=normal:contiguous:20",
        shows=("gradient",),
    ),
    _call(
        name="triton_ssd_initial_state_gradient_of_a_later_state",
        edits=((_FOUND, f"dstart = dstates[:: chunks.each] if chunks.each else dstart\n    {_FOUND}"),),
        bug="B57",
        story="The initial state gets the gradient of the state behind the first chunk.",
        trigger=f"{_TRIGGER}:initial_state,return_state,cotangents=normal:contiguous:21",
    ),
    _call(
        name="triton_ssd_recomputed_states_from_zeros",
        base=SSD_RECURRENT,
        edits=((_RECOMPUTED, _RECOMPUTED.replace("start)", "None)")),),
        story="The states that gradients are computed from begin with zeros, not with the initial state.",
        trigger=f"{_TRIGGER}:initial_state,cotangents=normal:contiguous:22",
    ),
    _call(
        name="triton_ssd_rate_of_the_first_batch_entry",
        edits=((_FOUND, _FOUND.replace("dA.sum", "dA[: chunks.each or chunks.count].sum")),),
        bug="B51",
        story="dA is summed over the chunks of the first batch entry alone.",
        trigger=_TRIGGER.replace("B1", "B2") + ":cotangents=normal:contiguous:23",
    ),
    _call(
        name="triton_ssd_skip_of_the_last_chunk",
        edits=(("dD.sum(0).to(D.dtype)", "dD[-1].to(D.dtype)"),),
        bug="B47",
        story="dD is that of the last chunk, not the sum over chunks.",
        trigger=_TRIGGER.replace("B1", "B2") + ":skip,cotangents=normal:contiguous:24",
    ),
    _call(
        name="triton_ssd_cotangent_assumed_contiguous",
        edits=(
            (
                "steps = (*strided(layout, x, B, C, dy), *dt.stride())",
                'steps = (*strided(layout, x, B, C, torch.empty(dy.shape, device="meta")), *dt.stride())',
            ),
        ),
        bug="B56",
        story="All gradients but the initial state's read the cotangent as if it were contiguous.",
        trigger=f"{_TRIGGER}:cotangents=normal:transposed:25",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
)
