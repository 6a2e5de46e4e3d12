"""Mutants of the delta rule's gradients: cotangents of states, decays, packing, parts and addresses."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import DELTA, FAULT, NUMERIC

__all__ = ["MUTANTS"]

_gradient = partial(
    Mutant,
    base=DELTA,
    module="attnproof.kernels.delta_backward",
    mechanism="gradient",
    bug="",
    shows=NUMERIC,
)

_LAST = "b_ds = tl.load(p_dstate + i_state + o_s, mask=m_s, other=0.0)"
_READ_ONLY = "b_ds -= b_k[:, None] * b_dr[None, :]"
_DK = "b_dk = tl.sum(b_ds * b_u[None, :] - b_s * b_dr[None, :], 1)"
_DBETA = "tl.sum(b_du * b_r, 0)"
_DG = "tl.store(p_dg + i_t, tl.sum(tl.sum(b_s * b_ds, 1), 0))"
_WIDE_DG = "tl.store(p_dg + i_t * D, tl.sum(b_s * b_ds, 1), mask=m_d)"
_GATE = "b_ds *= tl.exp(tl.load(p_g + i_t * s_gn).to(tl.float32))"
_DO = "b_ds += b_q[:, None] * b_do[None, :]"
_SAVED = "tl.store(p_saved + o_saved + o_s, b_s, mask=m_s & (i_n % SAVE == 0))"
_WRITE = "b_s += b_k[:, None] * b_u[None, :]"
_STORED_DS = "tl.store(p_dstate0 + i_state + o_s, b_ds, mask=m_s)"

# A final state's share of dg, which the recurrence backwards has already.
_TWICE = """\
b_end = tl.load(p_dstate + i_state + o_s, mask=m_s, other=0.0)
                b_end = tl.where(i_t == n - 1, tl.sum(tl.sum(b_s * b_end, 1), 0), 0.0)
                tl.store(p_dg + i_t, tl.sum(tl.sum(b_s * b_ds, 1), 0) + b_end)"""

MUTANTS = (
    _gradient(
        name="triton_delta_final_cotangent_dropped",
        edits=((_LAST, _LAST.replace("b_ds = ", "b_ds = 0.0 * ")),),
        story="The cotangent of the final state is left out.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:return_state,cotangents=normal:contiguous:1",
    ),
    _gradient(
        name="triton_delta_initial_state_has_no_gradient",
        edits=((_STORED_DS, _STORED_DS.replace("b_ds, mask", "0.0 * b_ds, mask")),),
        bug="B57",
        story="The initial state's gradient is 0.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:initial_state,cotangents=normal:contiguous:2",
    ),
    _gradient(
        name="triton_delta_first_gate_missing_in_the_initial_states_gradient",
        edits=((_GATE, f"b_ds *= tl.where(i_t == 0, 1.0, {_GATE[8:]})"),),
        story="The initial state's gradient lacks the decay of the first step.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:gate=head,initial_state,cotangents=normal:contiguous:3",
    ),
    _gradient(
        name="triton_delta_keys_gradient_without_their_read",
        edits=(
            (_DK, f"{_DK}\n            if GATE == 0:\n                b_dk = tl.sum(b_ds * b_u[None, :], 1)"),
        ),
        bug="B53",
        story="Without a gate dk lacks what the key read from the state.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:cotangents=normal:contiguous:4",
    ),
    _gradient(
        name="triton_delta_betas_gradient_of_the_value",
        edits=((_DBETA, "tl.sum(b_du * b_v, 0)"),),
        story="dβ is du·v in place of du·(v − S'ᵀ k).",
        trigger="delta:float16:normal:B1,H1,N20,D8,E8:cotangents=normal:contiguous:5",
    ),
    _gradient(
        name="triton_delta_gates_gradient_of_the_written_state",
        edits=((_DG, _DG.replace("b_s * b_ds", "(b_s + b_k[:, None] * b_u[None, :]) * b_ds")),),
        story="dg is a product with the state after the write.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:gate=head,cotangents=normal:contiguous:6",
    ),
    _gradient(
        name="triton_delta_gates_gradient_without_the_read",
        edits=(
            (_READ_ONLY, f"b_dall = b_ds\n            {_READ_ONLY}"),
            (_WIDE_DG, _WIDE_DG.replace("b_s * b_ds", "b_s * b_dall")),
        ),
        story="dg of a channel leaves out that the key's read decays as well.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:gate=channel,cotangents=normal:contiguous:7",
    ),
    _gradient(
        name="triton_delta_gates_gradient_counts_the_final_state_twice",
        edits=((_DG, _TWICE),),
        bug="B51",
        story="dg of the last position counts the final state's cotangent twice.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:gate=head,return_state,cotangents=normal:contiguous:8",
    ),
    _gradient(
        name="triton_delta_gates_gradient_divides_by_the_decay",
        edits=(
            (
                _DG,
                f"b_e = {_GATE[8:]}\n                {_DG.replace('b_s * b_ds', 'b_s / b_e * (b_e * b_ds)')}",
            ),
        ),
        story="dg takes the state before the decay as S' e^{−g}, 0/0 where the decay is 0.",
        trigger="delta:float32:strong-decay:B1,H1,N20,D8,E8:gate=head,cotangents=normal:contiguous:9",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _gradient(
        name="triton_delta_queries_gradient_scaled_twice",
        edits=(
            ("tl.store(p_dq + i_t * D, b_dq, mask=m_d)", "tl.store(p_dq + i_t * D, b_dq * scale, mask=m_d)"),
        ),
        story="dq has the scale twice.",
        trigger="delta:bfloat16:normal:B1,H1,N20,D8,E8:cotangents=normal:contiguous:10",
    ),
    _gradient(
        name="triton_delta_states_gradient_unscaled",
        edits=((_DO, _DO.replace("b_do[None, :]", "(b_do / scale)[None, :]")),),
        story="All gradients but dq lack the scale.",
        trigger="delta:float16:normal:B1,H1,N20,D8,E8:cotangents=normal:contiguous:11",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _gradient(
        name="triton_delta_values_gradient_without_beta",
        edits=(("b_dr.to(p_dv.dtype.element_ty)", "b_du.to(p_dv.dtype.element_ty)"),),
        story="dv lacks β.",
        trigger="delta:float16:normal:B1,H1,N20,D8,E8:cotangents=normal:contiguous:12",
    ),
    _gradient(
        name="triton_delta_states_kept_after_the_step",
        module="attnproof.kernels.delta_recurrence",
        edits=(
            (_SAVED, "pass"),
            (_WRITE, f"{_WRITE}\n        if SAVE > 0:\n            {_SAVED}"),
        ),
        story="The states that the backward pass starts its chunks from are those after their first step.",
        trigger="delta:float32:normal:B1,H1,N40,D8,E8:cotangents=normal:contiguous:13",
    ),
    _gradient(
        name="triton_delta_kept_states_by_position_in_the_row",
        edits=(("i_chunk = tl.load(p_first + i_s).to(tl.int64)", "i_chunk = i_start // C"),),
        story="Kept states of packed sequences are looked up as if the row were cut into chunks.",
        trigger="delta:float32:normal:B1,H1,N40,D8,E8:initial_state,cu_seqlens=9+31,cotangents=normal:contiguous:14",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _gradient(
        name="triton_delta_cotangent_assumed_contiguous",
        edits=(("x.tensor_strides(do)", "x.tensor_strides(torch.empty(do.shape, dtype=do.dtype))"),),
        bug="B56",
        story="The cotangent of o is read as if it were contiguous.",
        trigger="delta:float32:normal:B1,H2,N20,D8,E8:cotangents=normal:transposed:15",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _gradient(
        name="triton_delta_betas_gradient_of_the_first_columns",
        edits=(("dbeta.sum(0).to(x.beta.dtype)", "dbeta[0].to(x.beta.dtype)"),),
        story="dβ is summed over the first 32 value columns only.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E40:cotangents=normal:contiguous:16",
    ),
    _gradient(
        name="triton_delta_gates_gradient_of_the_first_columns",
        edits=(("dg.sum(0).to(x.g.dtype)", "dg[0].to(x.g.dtype)"),),
        story="dg is summed over the first 32 value columns only.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E40:gate=head,cotangents=normal:contiguous:17",
    ),
    _gradient(
        name="triton_delta_keys_gradient_in_bfloat16",
        edits=(
            (
                "tl.store(p_dk + i_t * D, b_dk, mask=m_d)",
                "tl.store(p_dk + i_t * D, b_dk.to(tl.bfloat16).to(tl.float32), mask=m_d)",
            ),
        ),
        story="Parts of dk are rounded to bfloat16, in every dtype.",
        trigger="delta:float32:normal:B1,H1,N20,D8,E8:cotangents=normal:contiguous:18",
    ),
)
