"""Mutants of prefix attention: the monoid of (m, u, w), its neutral element, blocks, trees and states."""

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

_BLOCKS = "attnproof.kernels.prefix_scan_blocks"
_TREES = "attnproof.kernels.prefix_scan_trees"

_blocks = partial(
    Mutant,
    base=PREFIX_SCAN,
    module=_BLOCKS,
    mechanism="numerics",
    bug="",
    shows=(*NUMERIC, "nonfinite", "zero-state"),
)
_stepwise = partial(_blocks, base=PREFIX_SCAN_RECURRENT, module="")
_doubling = partial(_blocks, base=PREFIX_SCAN_DOUBLING, module=_TREES)
_sweeps = partial(_blocks, base=PREFIX_SCAN_SWEEPS, module=_TREES)

_SHORT = "prefix_scan:float32:normal:B1,H2,N20,D4,E5"
_LONG = "prefix_scan:float32:normal:B1,H2,N40,D4,E5"
_FALLING = "prefix_scan:float32:falling-maxima:B1,H2,N40,D4,E5"
_WIDE = "prefix_scan:float32:wide-maxima:B2,H8,N4,D4,E5"
_LOW = "prefix_scan:float32:below-sentinel:B1,H2,N20,D4,E5"

_UNION = "return b_max, b_u * b_c + b_u2 * b_c2, b_w * b_c[:, None] + b_w2 * b_c2[:, None]"
_OWN_SHIFT = "    b_shift = tl.where(b_max == -INF, 0.0, b_max)\n    return b_max, b_x *"
_GUARDED = "    b_shift = tl.where(b_max == -INF, 0.0, b_max)\n    b_c, b_c2"
_STEP = "b_m, b_u, b_w = b_new, b_u * b_kept + b_taken, b_w * b_kept + b_v * b_taken"
_LOGITS = "b_s = tl.load(p_s + i_bh * N + o_n, mask=m_n, other=-INF)"
_ONE = "b_one = tl.where(m_n, 1.0, 0.0)"
_NEUTRAL = "b_m, b_u = tl.full([1], -INF, dtype=tl.float32), tl.zeros([1], dtype=tl.float32)"
_SCANNED = "b_sm, b_su, b_sw = block_scan(b_s, b_one, b_v.to(tl.float32), False)"
_LAST_W = "b_w = tl.sum(tl.where(m_r[:, None], b_sw, 0.0), 0, keep_dims=True)"
_SWEPT = "b_m2, b_u2, b_w2 = joined_rows(b_lm, b_lu, b_lw, b_m, b_u, b_w)"

MUTANTS = (
    _blocks(
        name="triton_prefix_later_set_not_rescaled",
        edits=((_UNION, "return b_max, b_u * b_c + b_u2, b_w * b_c[:, None] + b_w2"),),
        story="Only the earlier of two sets is scaled to the common maximum.",
        trigger=f"{_FALLING}:-:contiguous:201",
    ),
    _blocks(
        name="triton_prefix_shifted_by_the_later_maximum",
        edits=((_OWN_SHIFT, _OWN_SHIFT.replace("0.0, b_max)\n", "0.0, b_m2)\n")),),
        story="Inside a block two sets are scaled to the later one's maximum, and carry the larger one.",
        trigger=f"{_SHORT}:-:contiguous:202",
    ),
    _stepwise(
        name="triton_prefix_sum_not_rescaled",
        edits=((_STEP, _STEP.replace("b_u * b_kept", "b_u")),),
        story="At a new maximum w is rescaled, and u is not.",
        trigger=f"{_SHORT}:-:contiguous:203",
    ),
    _stepwise(
        name="triton_prefix_maximum_of_the_logit_alone",
        edits=(("tl.exp(b_m - b_new), tl.exp(b_s - b_new)", "tl.exp(b_m - b_s), tl.exp(b_s - b_new)"),),
        story="What was summed is scaled by e^(m − s), also where the maximum stays.",
        trigger=f"{_SHORT}:-:contiguous:204",
    ),
    _blocks(
        name="triton_prefix_empty_set_has_maximum_zero",
        edits=((_NEUTRAL, _NEUTRAL.replace("tl.full([1], -INF", "tl.full([1], 0.0")),),
        mechanism="special-values",
        bug="B06",
        story="The scan begins from the maximum 0, so that what lies far below it underflows.",
        trigger=f"{_WIDE}:-:contiguous:205",
    ),
    _blocks(
        name="triton_prefix_empty_set_has_a_sentinel",
        edits=((_NEUTRAL, _NEUTRAL.replace("tl.full([1], -INF", "tl.full([1], -1e4")),),
        mechanism="special-values",
        bug="B06",
        story="The maximum of no position is −10⁴, which logits may be below.",
        trigger=f"{_LOW}:-:contiguous:206",
    ),
    _blocks(
        name="triton_prefix_difference_of_infinities",
        edits=((_OWN_SHIFT, _OWN_SHIFT.replace("tl.where(b_max == -INF, 0.0, b_max)", "b_max")),),
        mechanism="special-values",
        bug="B04",
        story="Where two empty sets meet, −∞ is taken from −∞: the suffix sums begin beyond the end.",
        trigger=f"{_SHORT}:cotangents=normal:contiguous:207",
    ),
    _blocks(
        name="triton_prefix_sum_of_earlier_blocks_lost",
        edits=((_UNION, _UNION.replace("b_u * b_c + b_u2", "b_u2")),),
        bug="B55",
        story="w goes on from block to block, and u begins anew.",
        trigger=f"{_LONG}:-:contiguous:208",
    ),
    _blocks(
        name="triton_prefix_maximum_of_the_last_block",
        edits=(
            (
                "    if p_m0 is not None:\n        b_m =",
                "    b_top = b_m\n    if p_m0 is not None:\n        b_m =",
            ),
            (_SCANNED, f"{_SCANNED}\n        b_top = tl.max(b_sm, 0, keep_dims=True)"),
            (
                "tl.store(p_m1 + i_slot + tl.arange(0, 1), b_m)",
                "tl.store(p_m1 + i_slot + tl.arange(0, 1), b_top)",
            ),
        ),
        mechanism="wrapper",
        story="The state's m is the largest logit of the last block alone.",
        trigger=f"{_FALLING}:return_state:contiguous:209",
    ),
    _blocks(
        name="triton_prefix_padding_sets_the_maximum",
        edits=((_LOGITS, _LOGITS.replace("-INF", "0.0")),),
        mechanism="masking",
        bug="B16",
        story="Positions beyond the end have the logit 0 and no weight: the state's m is not below 0.",
        trigger="prefix_scan:float32:normal:B2,H8,N2,D4,E5:return_state:contiguous:210",
    ),
    _blocks(
        name="triton_prefix_padding_counted",
        edits=((_LOGITS, _LOGITS.replace("-INF", "0.0")), (_ONE, "b_one = tl.where(m_n, 1.0, 1.0)")),
        mechanism="masking",
        bug="B16",
        story="Positions beyond the end count in the state's u.",
        trigger=f"{_SHORT}:return_state:contiguous:211",
    ),
    _blocks(
        name="triton_prefix_initial_sum_forgotten",
        edits=(("        b_u += tl.load(p_u0 + i_slot)\n", ""),),
        mechanism="wrapper",
        story="Of the initial state m and w are read, and u is not.",
        trigger=f"{_SHORT}:initial_state:contiguous:212",
    ),
    _stepwise(
        name="triton_prefix_sums_in_the_inputs_dtype",
        edits=((_STEP, f"{_STEP}\n        b_w = b_w.to(p_v.dtype.element_ty).to(tl.float32)"),),
        mechanism="accuracy",
        bug="B60",
        story="From position to position w is handed on in the inputs' dtype.",
        trigger="prefix_scan:bfloat16:normal:B1,H4,N130,D4,E8:-:contiguous:213",
        accuracy_only=True,
    ),
    _blocks(
        name="triton_prefix_carried_values_in_the_inputs_dtype",
        edits=((_LAST_W, f"{_LAST_W}.to(p_v.dtype.element_ty).to(tl.float32)"),),
        mechanism="accuracy",
        bug="B60",
        story="From block to block w is handed on in the inputs' dtype.",
        trigger="prefix_scan:float16:normal:B1,H2,N70,D4,E5:return_state:contiguous:225",
    ),
    _blocks(
        name="triton_prefix_logits_in_the_inputs_dtype",
        edits=(("b_s * scale, mask", "(b_s * scale).to(p_k.dtype.element_ty), mask"),),
        mechanism="accuracy",
        story="Logits are rounded to the inputs' dtype before they are stored.",
        trigger="prefix_scan:float16:normal:B1,H2,N20,D4,E5:return_state:contiguous:214",
    ),
    _blocks(
        name="triton_prefix_initial_values_of_another_column",
        edits=(("p_w0 + i_slot * E + o_e", "p_w0 + i_slot * BE + o_e"),),
        mechanism="pointers",
        bug="B32",
        story="The initial w is read with the tile's width in place of its own.",
        trigger="prefix_scan:float32:normal:B1,H2,N20,D4,E5:initial_state:contiguous:215",
        shows=(*NUMERIC, *FAULT, "nonfinite", "zero-state"),
    ),
    _blocks(
        name="triton_prefix_query_assumed_contiguous",
        edits=(("for x in (self.q, self.k, self.v))", "for x in (self.k, self.v))"),),
        mechanism="pointers",
        story="Whether columns lie one behind the other is asked of keys and values, and not of the query.",
        trigger=f"{_SHORT}:-:transposed:218",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _doubling(
        name="triton_prefix_last_level_of_the_tree_left_out",
        edits=(("while distance < length:", "while distance <= length // 2:"),),
        mechanism="masking",
        story="There are ⌊log₂ N⌋ rounds: the last is missing unless N is a power of two.",
        trigger=f"{_LONG}:-:contiguous:216",
    ),
    _doubling(
        name="triton_prefix_first_position_left_out",
        edits=(("o_n >= distance", "o_n > distance"),),
        mechanism="masking",
        story="In every round, the position that should take in the first one does not.",
        trigger=f"{_SHORT}:-:contiguous:217",
    ),
    _doubling(
        name="triton_prefix_initial_state_left_out_of_the_final_one",
        edits=(
            (
                "b_m, b_u, b_w = joined_rows(b_m0, b_u0, b_w0, b_m, b_u, b_w)",
                "b_m1, b_u, b_w = joined_rows(b_m0, b_u0, b_w0, b_m, b_u, b_w)",
            ),
        ),
        mechanism="wrapper",
        story="u and w are joined with the initial state, and m is that of this call's positions.",
        trigger="prefix_scan:float32:normal:B2,H8,N2,D4,E5:initial_state,return_state:contiguous:219",
    ),
    _sweeps(
        name="triton_prefix_left_child_one_leaf_away",
        edits=(("o_left = o_right - span // 2", "o_left = o_right - 1"),),
        mechanism="pointers",
        story="On every level of the tree the left child is the leaf next to the node.",
        trigger=f"{_LONG}:-:contiguous:220",
    ),
    _sweeps(
        name="triton_prefix_left_child_keeps_its_own_sum",
        edits=(("        tl.store(p_u + o_left, b_u, mask=m_node)\n", ""),),
        story="Going down, the left child is handed m and w of its prefix, and keeps its own u.",
        trigger=f"{_LONG}:-:contiguous:221",
    ),
    _sweeps(
        name="triton_prefix_initial_state_not_at_the_root",
        edits=(
            (
                "zip(leaves, call.start or neutral(call), strict=True)",
                "zip(leaves, neutral(call), strict=True)",
            ),
        ),
        mechanism="wrapper",
        story="The tree is swept from the neutral element, whatever the initial state is.",
        trigger=f"{_SHORT}:initial_state:contiguous:222",
    ),
    _sweeps(
        name="triton_prefix_final_state_of_the_last_full_leaf",
        edits=(("x[:, :, runs - 1].clone()", "x[:, :, max(call.sizes[2] // LEAF - 1, 0)].clone()"),),
        mechanism="masking",
        bug="B47",
        story="The final state is that behind the last whole leaf.",
        trigger=f"{_SHORT}:return_state:contiguous:223",
    ),
    _sweeps(
        name="triton_prefix_node_joined_once_for_every_slice",
        edits=((_SWEPT, _SWEPT.replace("b_lw, b_m, b_u, b_w)", "b_lw, b_m2, b_u2, b_w)")),),
        mechanism="pointers",
        bug="B31",
        story="Where values are wider than a tile, a node takes in its left child once for each slice.",
        trigger="prefix_scan:float32:normal:B1,H1,N40,D4,E40:-:contiguous:224",
    ),
)
