"""Mutants of retention and RWKV-6, which share the kernels of gated linear attention."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import (
    NUMERIC,
    RETENTION,
    RETENTION_PARALLEL,
    RWKV6,
    RWKV6_RECURRENT,
)

__all__ = ["MUTANTS"]

_CHUNKS = "attnproof.kernels.gated_linear_chunks"
_BACKWARD = "attnproof.kernels.gated_linear_backward"
_WRAPPER = "attnproof.kernels.gated_linear"

_retention = partial(Mutant, base=RETENTION, mechanism="numerics", bug="RET-1", shows=(*NUMERIC, "nonfinite"))
_parallel = partial(_retention, base=RETENTION_PARALLEL)
_rwkv6 = partial(_retention, base=RWKV6, module=_CHUNKS, bug="RWK-2")
_rwkv6_gradient = partial(_rwkv6, module=_BACKWARD, mechanism="gradient")

_RETENTION = "retention:float32:normal:B1,H3,N20,D4,E5"
_RWKV6 = "rwkv6:float32:normal:B1,H2,N20,D4,E5"

_SHIFTED = "b_step = tile(p_g, s_gn, s_gd, i_n + o_r - 1, m_r & (o_r > 0), o_d, m_d)"
_DK = "dk = paired(run, bits, (v, do, q), after, state_scale=1.0, reverse=True)"
_BONUS = "b_u = tl.load(p_u + i_h * D + o_d, mask=m_d, other=0.0).to(tl.float32)\n    n_rows"

MUTANTS = (
    _retention(
        name="triton_retention_heads_from_one",
        edits=(("-5.0 - torch.arange(q.shape[1],", "-5.0 - torch.arange(1, q.shape[1] + 1,"),),
        story="γ is 1 − 2^(−5−h) of heads that are counted from 1.",
        trigger=f"{_RETENTION}:-:contiguous:1",
    ),
    _retention(
        name="triton_retention_one_decay_for_all_heads",
        edits=(("values.float()[None, :, None, None]", "values.float()[:1][None, :, None, None]"),),
        story="Every head has the decay of head 0.",
        trigger=f"{_RETENTION}:return_state:contiguous:2",
    ),
    _retention(
        name="triton_retention_decay_in_bfloat16",
        edits=(("constant(torch.log1p(-rate), q)", "constant(torch.log1p(-rate).bfloat16(), q)"),),
        story="log γ is rounded to bfloat16.",
        trigger=f"{_RETENTION}:initial_state,return_state:contiguous:3",
    ),
    _parallel(
        name="triton_retention_state_one_decay_short",
        edits=(("REVERSE else o_m + 1", "REVERSE else o_m"),),
        story="The initial state reaches row i with γ to the i, not to the i + 1.",
        trigger=f"{_RETENTION}:initial_state:contiguous:4",
    ),
    _parallel(
        name="triton_retention_packed_tiles_of_the_first_sequence",
        edits=(("p_y += i_b * s_yb + i_h * s_yh + i_start * s_yn", "p_y += i_b * s_yb + i_h * s_yh"),),
        mechanism="pointers",
        bug="B50",
        story="Keys are read from the beginning of the packed row, whatever the sequence.",
        trigger=f"{_RETENTION}:cu_seqlens=7+0+13:contiguous:5",
    ),
    _parallel(
        name="triton_retention_keys_without_the_final_state",
        edits=((_DK, _DK.replace("after,", "None,")),),
        mechanism="gradient",
        bug="",
        story="dk lacks the cotangent of the final state.",
        trigger=f"{_RETENTION}:return_state,cotangents=normal:contiguous:6",
    ),
    _parallel(
        name="triton_retention_values_one_decay_long",
        edits=(("b_age = n_rows - 1 - o_m if REVERSE", "b_age = n_rows - o_m if REVERSE"),),
        mechanism="gradient",
        story="dk and dv get the final state's cotangent with one γ too many.",
        trigger=f"{_RETENTION}:return_state,cotangents=normal:contiguous:7",
    ),
    _rwkv6(
        name="triton_rwkv6_read_after_the_decay",
        base=RWKV6_RECURRENT,
        edits=(("b_read = b_s + (b_u * b_k)", "b_read = b_decayed + (b_u * b_k)"),),
        story="Rows read the state after their gate has decayed it, as in gated linear attention.",
        trigger=f"{_RWKV6}:-:contiguous:8",
    ),
    _rwkv6(
        name="triton_rwkv6_bonus_added_to_one",
        base=RWKV6_RECURRENT,
        edits=(("b_read = b_s + (b_u * b_k)", "b_read = b_s + ((1.0 + b_u) * b_k)"),),
        story="A key's own weight is 1 + u.",
        trigger=f"{_RWKV6}:-:contiguous:9",
    ),
    _rwkv6(
        name="triton_rwkv6_bonus_kept_in_the_state",
        base=RWKV6_RECURRENT,
        edits=(
            ("        b_s = b_new\n", "        b_s = b_decayed + b_read - b_s if EXCLUSIVE else b_new\n"),
        ),
        story="The state takes keys with their bonus.",
        trigger=f"{_RWKV6}:return_state:contiguous:10",
    ),
    _rwkv6(
        name="triton_rwkv6_gate_twice_at_the_first_row",
        edits=((_SHIFTED, _SHIFTED.replace("(o_r > 0)", "(i_n + o_r > 0)")),),
        bug="B42",
        story="The first of 16 rows decays the state by the gate before it, which it has seen already.",
        trigger=f"{_RWKV6}:-:contiguous:11",
    ),
    _rwkv6(
        name="triton_rwkv6_bonus_of_the_first_head",
        edits=((_BONUS, _BONUS.replace("i_h * D + ", "")),),
        mechanism="pointers",
        bug="B50",
        story="Every head has the bonus of head 0.",
        trigger=f"{_RWKV6}:-:contiguous:12",
    ),
    _rwkv6_gradient(
        name="triton_rwkv6_bonus_gradient_of_the_last_chunk",
        module=_WRAPPER,
        edits=(("du.sum(0)", "(du[-1] if du.shape[0] else du.sum(0))"),),
        bug="B47",
        story="du is that of the last chunk.",
        trigger="rwkv6:float32:normal:B2,H2,N20,D4,E5:cotangents=normal:contiguous:13",
    ),
    _rwkv6_gradient(
        name="triton_rwkv6_gates_with_their_own_row",
        edits=(("m_reads = o_r[None, :] > o_r[:, None] if", "m_reads = o_r[None, :] >= o_r[:, None] if"),),
        bug="GLA-4",
        story="dg counts what the row of its own position reads, which that gate does not decay.",
        trigger=f"{_RWKV6}:initial_state,cotangents=normal:contiguous:14",
    ),
    _rwkv6_gradient(
        name="triton_rwkv6_keys_without_the_bonus",
        edits=(("b_pj[:, None] * b_u[None, :], 0.0)", "b_pj[:, None], 0.0)"),),
        story="dq and dk take a key's own weight as 1.",
        trigger=f"{_RWKV6}:cotangents=normal:contiguous:15",
    ),
)
