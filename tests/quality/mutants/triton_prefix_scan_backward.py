"""Mutants of prefix attention's backward pass: suffix sums, Δ, scale, slices, batch entries and states."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import (
    FAULT,
    NUMERIC,
    PREFIX_SCAN,
    PREFIX_SCAN_DOUBLING,
    PREFIX_SCAN_RECURRENT,
    PREFIX_SCAN_SWEEPS,
)

__all__ = ["MUTANTS"]

_gradient = partial(
    Mutant,
    base=PREFIX_SCAN,
    module="attnproof.kernels.prefix_scan_backward",
    mechanism="gradient",
    bug="",
    shows=(*NUMERIC, "nonfinite"),
)

_SHORT = "prefix_scan:float32:normal:B1,H2,N20,D4,E5:cotangents=normal:contiguous"
_LONG = "prefix_scan:float32:normal:B1,H2,N40,D4,E5:cotangents=normal:contiguous"

_TO_DS = "b_ds = tl.sum(b_dv * b_v.to(tl.float32), 1) - b_su * b_own"
_SUFFIX = "b_sm, b_su, b_sw = block_scan(-b_m, tl.sum(b_do * b_o, 1), b_do, True)"
_UNSCALED = f"""b_do = b_do * tl.exp(-b_m)[:, None]
        {_SUFFIX.replace("-b_m", "tl.where(m_n, 0.0, -INF)")}"""
_OWN = "b_own = tl.exp(tl.minimum(b_s + b_sm, 0.0, propagate_nan=tl.PropagateNan.ALL))"
_PARTS = "    parts = s.new_empty(batch * blocks, heads, width)"
_THROUGH_THE_MAXIMUM = f"""\
    top = rows[0][:, :, :, None] == s[:, :, None, :]
    ds[0] -= ((do.float() * o).sum(-1)[..., None] * top).sum(2)
{_PARTS}"""
_SAVED = "ctx.save_for_backward(q, k, v, m, s, rows, exact)"
_FROM_U = "tl.where(i_e == 0, -tl.load(p_du1 + i_bh + o_one), 0.0)"
_THROUGH_THE_LEVEL = f"""\
    inner = du + (dw * o[:, :, -1]).sum(-1)
    ds[0] -= (inner * rows[1][:, :, -1])[..., None] * (s == rows[0][:, :, -1:])
{_PARTS}"""

_CARRIED = (
    "prefix_scan:float32:normal:B2,H2,N20,D4,E5:initial_state,return_state,cotangents=normal:contiguous"
)
_WIDE = "prefix_scan:float32:normal:B1,H2,N4,D4,E40:initial_state,return_state,cotangents=normal:contiguous"

MUTANTS = (
    _gradient(
        name="triton_prefix_dk_unscaled",
        edits=(("b_dk = (b_ds * scale)[:, None]", "b_dk = b_ds[:, None]"),),
        story="dk lacks the scale.",
        trigger=f"{_SHORT}:301",
    ),
    _gradient(
        name="triton_prefix_dq_scaled_twice",
        edits=(("b_k, 0) * scale, mask", "b_k, 0) * scale * scale, mask"),),
        base=PREFIX_SCAN_RECURRENT,
        story="dq is scaled twice.",
        trigger=f"{_SHORT}:302",
    ),
    _gradient(
        name="triton_prefix_dq_of_the_first_batch_entry",
        edits=(("return column_sums(parts, q)", "return column_sums(parts[:blocks], q)"),),
        base=PREFIX_SCAN_SWEEPS,
        bug="B51",
        story="The query, which all batch entries share, has the gradient of the first alone.",
        trigger="prefix_scan:float32:normal:B2,H2,N20,D4,E5:cotangents=normal:contiguous:303",
    ),
    _gradient(
        name="triton_prefix_dq_of_the_first_block",
        edits=(("for i_r in range(R):", "for i_r in range(1):"),),
        bug="B47",
        story="dq adds up one block of positions.",
        trigger=f"{_LONG}:304",
    ),
    _gradient(
        name="triton_prefix_normaliser_without_gradient",
        edits=((_TO_DS, "b_ds = tl.sum(b_dv * b_v.to(tl.float32), 1)"),),
        bug="B54",
        story="u is taken for a constant: ds lacks Δ.",
        trigger=f"{_SHORT}:305",
    ),
    _gradient(
        name="triton_prefix_own_delta_alone",
        edits=(
            (
                _TO_DS,
                "b_ds = tl.sum(b_dv * b_v.to(tl.float32), 1) - tl.sum(b_do * b_o, 1) * tl.exp(b_s - b_m)",
            ),
        ),
        base=PREFIX_SCAN_RECURRENT,
        story="Each key is charged with Δ of its own row, and not with those of all later rows.",
        trigger=f"{_SHORT}:306",
    ),
    _gradient(
        name="triton_prefix_gradient_of_the_first_slice",
        edits=(("for i_e in range(SLICES):", "for i_e in range(1):"),),
        bug="B30",
        story="Where values are wider than a tile, ds counts the first slice alone.",
        trigger="prefix_scan:float32:normal:B1,H1,N20,D4,E40:cotangents=normal:contiguous:307",
    ),
    _gradient(
        name="triton_prefix_suffix_sums_unscaled",
        edits=((_SUFFIX, _UNSCALED), (_OWN, "b_own = tl.exp(b_s)")),
        base=PREFIX_SCAN_DOUBLING,
        mechanism="gradient",
        bug="B45",
        story="Suffix sums are of e^−m, and multiplied by e^s: both leave float32.",
        trigger="prefix_scan:float32:wide-maxima:B1,H2,N20,D4,E5:cotangents=normal:contiguous:308",
    ),
    _gradient(
        name="triton_prefix_delta_of_later_blocks_lost",
        edits=(("b_cu = tl.sum(tl.where(o_r == 0, b_su, 0.0), 0, keep_dims=True)", "b_cu = b_cu * 0.0"),),
        bug="B47",
        story="Δ of rows behind the block is not charged.",
        trigger=f"{_LONG}:309",
    ),
    _gradient(
        name="triton_prefix_carry_of_the_wrong_end",
        edits=(
            (
                "b_cw = tl.sum(tl.where((o_r == 0)[:, None], b_sw",
                "b_cw = tl.sum(tl.where((o_r == BN - 1)[:, None], b_sw",
            ),
        ),
        base=PREFIX_SCAN_SWEEPS,
        story="The reverse scan hands on the last row of a block, which holds no more than itself.",
        trigger="prefix_scan:float32:normal:B1,H2,N70,D4,E5:cotangents=normal:contiguous:310",
    ),
    _gradient(
        name="triton_prefix_gradient_through_the_maximum",
        edits=((_PARTS, _THROUGH_THE_MAXIMUM),),
        bug="theory AAR-5",
        story="m has a gradient by way of w, and none by way of u.",
        trigger=f"{_SHORT}:311",
    ),
    _gradient(
        name="triton_prefix_cotangent_assumed_contiguous",
        edits=(("columns, *v.stride(), *do.stride()", "columns, *v.stride(), *o.stride()"),),
        bug="B56",
        story="The cotangent is read as if it were contiguous.",
        trigger=f"{_SHORT.replace(':contiguous', ':transposed')}:312",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _gradient(
        name="triton_prefix_delta_of_the_rounded_output",
        edits=(
            (
                _SAVED,
                _SAVED.replace("exact", "exact.to(v.dtype).float()"),
            ),
        ),
        module="",
        story="Δ is formed from o as it was stored.",
        unseen="budgets let dO·o be formed of the stored output, as FlashAttention does",
        trigger="prefix_scan:bfloat16:one-sign-values:B1,H4,N130,D4,E8:cotangents=aligned:contiguous:313",
        accuracy_only=True,
    ),
    _gradient(
        name="triton_prefix_final_values_have_no_cotangent",
        edits=(
            (
                "b_cw = tl.load(p_dw1 + i_bh * E + o_e, mask=m_e, other=0.0)[None, :]",
                "b_cw = tl.zeros([1, BE], dtype=tl.float32)",
            ),
        ),
        bug="theory AAR-5",
        story="The cotangent of the final w is ignored.",
        trigger=f"{_CARRIED}:314",
    ),
    _gradient(
        name="triton_prefix_final_sum_taken_for_a_normaliser",
        edits=((_FROM_U, _FROM_U.replace("-tl.load", "tl.load")),),
        base=PREFIX_SCAN_RECURRENT,
        bug="theory AAR-5",
        story="The cotangent of the final u has the sign that o, which is divided by u, would give it.",
        trigger=f"{_CARRIED}:315",
    ),
    _gradient(
        name="triton_prefix_final_sum_counted_by_every_slice",
        edits=((_FROM_U, _FROM_U.replace("i_e == 0", "i_e >= 0")),),
        base=PREFIX_SCAN_DOUBLING,
        bug="B30",
        story="Where values are wider than a tile, the cotangent of u counts once for each slice.",
        trigger=f"{_WIDE}:316",
    ),
    _gradient(
        name="triton_prefix_final_cotangents_in_the_first_maximums_units",
        edits=(("p_m + i_bh * N + (N - 1) + o_one", "p_m + i_bh * N + o_one"),),
        base=PREFIX_SCAN_SWEEPS,
        bug="theory AAR-5",
        story="Cotangents of the final state are scaled by e^−m of the first position.",
        trigger=f"{_CARRIED}:317",
    ),
    _gradient(
        name="triton_prefix_final_level_differentiated_as_a_maximum",
        edits=((_PARTS, _THROUGH_THE_LEVEL),),
        bug="theory AAR-5",
        story="The key of the largest logit is charged with the final m by way of u and w.",
        trigger=f"{_CARRIED}:318",
    ),
    _gradient(
        name="triton_prefix_initial_sum_gradient_unscaled",
        edits=(("i_bh + o_one, -b_cu * b_own)", "i_bh + o_one, -b_cu)"),),
        base=PREFIX_SCAN_SWEEPS,
        bug="theory AAR-5",
        story="The gradient of the initial u lacks e^(m₀ − m).",
        trigger=f"{_CARRIED}:319",
    ),
    _gradient(
        name="triton_prefix_initial_sum_gradient_of_the_first_slice",
        edits=(("column_sums(shares, level)", "column_sums(shares[:1], level)"),),
        base=PREFIX_SCAN_RECURRENT,
        bug="B30",
        story="Where values are wider than a tile, the gradient of the initial u is the first slice's.",
        trigger=f"{_WIDE}:320",
    ),
    _gradient(
        name="triton_prefix_delta_without_the_initial_state",
        edits=((_SAVED, _SAVED.replace("exact", "form(Call(q, k, v, scale, None, kept))[0]")),),
        base=PREFIX_SCAN_DOUBLING,
        module="",
        bug="theory AAR-5",
        story="Δ is formed from the outputs of this call's positions alone.",
        trigger=f"{_CARRIED}:321",
    ),
    _gradient(
        name="triton_prefix_no_gradient_without_positions",
        edits=(
            (
                "*(dend if level is not None else (None, None))",
                "*((x * 0.0 for x in dend) if level is not None else (None, None))",
            ),
        ),
        bug="B47",
        story="A call without positions hands the state on, and not its cotangents.",
        trigger=f"{_CARRIED.replace('N20', 'N0')}:322",
    ),
)
