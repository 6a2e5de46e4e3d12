"""Mutants of diagonal state spaces, backward: conjugates, blocks, states and sums."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import (
    FAULT,
    NUMERIC,
    SSM_CONVOLUTION,
    SSM_RECURRENT,
    SSM_SCAN,
)

__all__ = ["MUTANTS"]

_STATES = "attnproof.kernels.ssm_backward"
_WRAPPER = "attnproof.kernels.ssm"
_KERNELS = "attnproof.kernels.ssm_convolution"

_wrong = partial(Mutant, mechanism="gradient", bug="", shows=(*NUMERIC, "nonfinite"))
_through_states = partial(_wrong, base=SSM_SCAN, module=_STATES)
_wrapper = partial(_wrong, base=SSM_RECURRENT, module=_WRAPPER)
_through_kernel = partial(_wrong, base=SSM_CONVOLUTION, module=_KERNELS)

_TRIGGER = "ssm:float32:normal:B1,H2,N20,D4"

_FIRST_POWERS = """\
            b_f = tl.load(p_f + (o_n + 1) * s_fn, mask=o_n + 1 < N, other=0.0).to(tl.float32)
            b_f *= (o_n + 1).to(tl.float32)
"""
_POWERS_TO_DIVIDE = """\
            b_f = tl.load(p_f + o_n * s_fn, mask=o_n < N, other=0.0).to(tl.float32)
            b_f *= o_n.to(tl.float32)
"""
_STORE_FIRST = "        store_pair(p_m1, i_xh * D + o_d, b_m1r, b_m1i, m_d, COMPLEX)\n"
_DIVIDE_AND_STORE = """\
        b_square = b_ar * b_ar + b_ai * b_ai
        b_dividedr = (b_m1r * b_ar + b_m1i * b_ai) / b_square
        b_dividedi = (b_m1i * b_ar - b_m1r * b_ai) / b_square
        store_pair(p_m1, i_xh * D + o_d, b_dividedr, b_dividedi, m_d, COMPLEX)
"""
_CONJUGATED = "            da, dw = (None if x is None else conjugate(x) for x in (da, dw))\n"

MUTANTS = (
    _through_states(
        name="triton_ssm_cotangents_decay_unconjugated",
        edits=(
            (
                "scanned(b_ar, -b_ai, b_zr, b_zi, True, COMPLEX)",
                "scanned(b_ar, b_ai, b_zr, b_zi, True, COMPLEX)",
            ),
        ),
        story="Gradients of the states go back by a inside a block, not by its conjugate.",
        trigger=f"{_TRIGGER}:complex,cotangents=normal:contiguous:101",
    ),
    _through_states(
        name="triton_ssm_block_left_unconjugated",
        edits=(
            (
                "powers(b_ar, -b_ai, tl.full([1, 1], BT, dtype=tl.int32), BITS, COMPLEX)",
                "powers(b_ar, b_ai, tl.full([1, 1], BT, dtype=tl.int32), BITS, COMPLEX)",
            ),
        ),
        story="The gradient of a state crosses a block by a^64, not by its conjugate.",
        trigger="ssm:float32:slow-decay:B1,H1,N135,D2:complex,cotangents=normal:contiguous:102",
    ),
    _through_states(
        name="triton_ssm_da_of_the_later_state",
        edits=(
            ("b_lr * b_wr + b_li * b_wi, 1", "b_lr * b_xr + b_li * b_xi, 1"),
            ("b_li * b_wr - b_lr * b_wi, 1", "b_li * b_xr - b_lr * b_xi, 1"),
            ("tl.sum(b_lr * b_wr, 1", "tl.sum(b_lr * b_xr, 1"),
        ),
        story="da pairs the gradient of a state with that state, not with the one before it.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:103",
    ),
    _through_states(
        name="triton_ssm_da_without_the_earlier_blocks",
        edits=(
            (
                "        b_wr += b_xr\n        b_wi += b_xi\n        b_xr, b_xi = times(b_wr, b_wi",
                "        b_xr, b_xi = times(b_wr, b_wi",
            ),
        ),
        story="da and dc take the states of a block without what came before it.",
        trigger=f"{_TRIGGER}:initial_state,cotangents=normal:contiguous:104",
    ),
    _through_states(
        name="triton_ssm_previous_input_of_the_previous_block",
        edits=(("mask=m_n & (o_t > 0), other=0.0)", "mask=m_n & (o_n > i_start), other=0.0)"),),
        mechanism="gradient",
        story="The input before a block is counted in its states, and again in the state that enters it.",
        trigger="ssm:float32:normal:B1,H1,N70,D2:cotangents=normal:contiguous:105",
    ),
    _through_states(
        name="triton_ssm_previous_input_of_the_previous_sequence",
        edits=(
            (
                "mask=m_n & (o_t > 0), other=0.0)",
                "mask=m_n & ((o_t > 0) | (o_n == i_start) & (i_start > 0)), other=0.0)",
            ),
        ),
        bug="B44",
        story="da of a packed sequence counts the last input of the sequence before it.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,cotangents=normal:contiguous:106",
    ),
    _through_states(
        name="triton_ssm_final_cotangent_at_the_end_of_the_block",
        edits=(("m_end = o_n == i_stop - 1", "m_end = o_t == BT - 1"),),
        bug="B47",
        story="The final state's cotangent enters at the end of a block, wherever the sequence ends.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:107",
    ),
    _through_states(
        name="triton_ssm_empty_sequence_loses_the_cotangent",
        edits=(("b_nextr + b_endr, b_nexti + b_endi", "b_nextr, b_nexti"),),
        bug="B57",
        story="The initial state of a sequence without positions has no gradient.",
        trigger=f"{_TRIGGER}:initial_state,return_state,cu_seqlens=7+0+13,cotangents=normal:contiguous:108",
    ),
    _through_states(
        name="triton_ssm_blocks_numbered_from_the_beginning_of_the_row",
        module="attnproof.kernels.ssm_scan",
        edits=(("tl.load(p_first + i_s)", "i_start // BT"),),
        bug="B57",
        story="States before the blocks of packed sequences are kept where blocks of the whole row would be.",
        trigger=f"{_TRIGGER}:initial_state,cu_seqlens=7+0+13,cotangents=normal:contiguous:121",
    ),
    _wrapper(
        name="triton_ssm_final_cotangent_dropped",
        edits=(("        dend = None if dend is None else dend.contiguous()\n", "        dend = None\n"),),
        story="The cotangent of the final state is ignored.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:109",
    ),
    _through_states(
        name="triton_ssm_du_without_the_skip",
        edits=(("            b_du += b_skip * b_dy\n", ""),),
        story="du lacks what passes by the states.",
        trigger=f"{_TRIGGER}:skip,cotangents=normal:contiguous:110",
    ),
    _through_states(
        name="triton_ssm_du_skips_by_every_tile_of_states",
        edits=(
            (
                "        if p_d is not None and i_d == 0:\n            b_du",
                "        if p_d is not None:\n            b_du",
            ),
        ),
        bug="B31",
        story="du counts what passes by the states once for each 16 states.",
        trigger="ssm:float32:normal:B1,H2,N20,D20:skip,cotangents=normal:contiguous:111",
    ),
    _through_states(
        name="triton_ssm_dd_of_one_block",
        edits=(("            b_dd += b_dy * b_u\n", "            b_dd = b_dy * b_u\n"),),
        story="dd is that of the first 64 positions.",
        trigger="ssm:float32:normal:B1,H1,N70,D2:skip,cotangents=normal:contiguous:112",
    ),
    _through_states(
        name="triton_ssm_du_of_real_parts",
        edits=(("            b_du += b_bi * b_li\n", ""),),
        story="du takes the real parts of b and of the gradient of the state.",
        trigger=f"{_TRIGGER}:complex,cotangents=normal:contiguous:113",
    ),
    _through_states(
        name="triton_ssm_cotangent_assumed_contiguous",
        edits=(
            (
                "chunks.first, *u.stride(), *dy.stride(),",
                "chunks.first, *u.stride(), heads * length, length, 1,",
            ),
        ),
        bug="B56",
        story="The cotangent is read as if it were contiguous.",
        trigger=f"{_TRIGGER}:cotangents=normal:columns:114",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _through_states(
        name="triton_ssm_parameters_of_the_first_sequence",
        edits=(
            ("da, db, dc = (x.sum(0) for x in sums[:3])", "da, db, dc = (x[:1].sum(0) for x in sums[:3])"),
        ),
        story="Parameters have the gradient of the first sequence.",
        trigger="ssm:float32:normal:B2,H2,N20,D4:cotangents=normal:contiguous:115",
    ),
    _through_kernel(
        name="triton_ssm_da_divided_by_a",
        edits=((_FIRST_POWERS, _POWERS_TO_DIVIDE), (_STORE_FIRST, _DIVIDE_AND_STORE)),
        story="da is a sum of i aⁱ divided by a: NaN where a is 0.",
        trigger="ssm:float32:closed-gates:B1,H2,N20,D4:cotangents=normal:contiguous:116",
    ),
    _through_kernel(
        name="triton_ssm_da_of_the_lag_before",
        edits=(("b_f *= (o_n + 1).to(tl.float32)", "b_f *= o_n.to(tl.float32)"),),
        story="da has (i − 1) a^(i−1) for i a^(i−1).",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:117",
    ),
    _through_kernel(
        name="triton_ssm_kernel_gradient_unconjugated",
        edits=(
            (_CONJUGATED, ""),
            ("        if pairs:\n        return da, dw, None", "        return da, dw, None"),
        ),
        story="Gradients by a and by c b are those of holomorphic functions, not their conjugates.",
        trigger=f"{_TRIGGER}:complex,cotangents=normal:contiguous:118",
    ),
    _through_kernel(
        name="triton_ssm_kernel_gradient_without_its_first_tile",
        edits=(("for i_t in range(i_l * BL, N, BT):", "for i_t in range((i_l + 1) * BL, N, BT):"),),
        bug="B02",
        story="The kernel's gradient leaves out the tile on the diagonal.",
        trigger="ssm:float32:normal:B1,H2,N40,D4:cotangents=normal:contiguous:119",
    ),
    _through_kernel(
        name="triton_ssm_kernel_gradient_of_the_first_batch_entry",
        edits=(("    for i_b in range(B):\n", "    for i_b in range(1):\n"),),
        story="The kernel's gradient is that of the first batch entry.",
        trigger="ssm:float32:normal:B2,H2,N20,D4:cotangents=normal:contiguous:120",
    ),
)
