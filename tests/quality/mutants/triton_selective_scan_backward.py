"""Mutants of the selective scan's backward pass: steps, gates, parameters, blocks and states."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import (
    FAULT,
    NUMERIC,
    SELECTIVE_SCAN,
    SELECTIVE_SCAN_RECURRENT,
)

__all__ = ["MUTANTS"]

_gradient = partial(
    Mutant,
    base=SELECTIVE_SCAN,
    module="attnproof.kernels.selective_scan_backward",
    mechanism="gradient",
    bug="",
    shows=(*NUMERIC, "nonfinite"),
)
_stepwise = partial(_gradient, base=SELECTIVE_SCAN_RECURRENT)

_TRIGGER = "selective_scan:float32:normal:B1,H2,N20,D4"
# Blocks of 32 positions.
_BLOCKS = "selective_scan:float32:normal:B1,H2,N40,D3"
# One channel a block.
_WIDE = "selective_scan:float32:normal:B1,H2,N6,D33"

_SLOPE = """\
            if SOFTPLUS:
                b_ddelta *= sigmoid(b_raw)
"""
_BIAS = """\
            b_dbias += tl.sum(tl.where(m_x, b_ddelta, 0.0), 1)
"""
_TYPED = """\
            if SOFTPLUS:
                b_ddelta = tl.where(b_raw > 20.0, b_step, b_ddelta * sigmoid(b_raw))
"""
_DSTEP = "b_ddelta = tl.sum(b_g * (b_a3 * b_h + b_dstep * b_bu), 2)"
_DRATE = "b_da += tl.sum(b_g * (b_step[:, :, None] * b_h + b_dweight * b_bu), 1)"
_Y = "b_y = tl.sum((b_h + b_wu * b_b) * b_c, 2) + b_skip[:, None] * b_u"
_DSKIP = "b_dskip += tl.sum(b_p * b_u, 1)"
_DC = "tl.sum(b_p[:, :, None] * (b_h + b_wu * b_b), 0)"
_SUMMED = "(found.sum(0) if i in summed else found)"
_LAST = "b_dlast = tl.sum(tl.where((o_t == 0)[None, :, None], b_decay * b_g, 0.0), 1)"
_NEAR = "tl.where(tl.abs(b_x) < SERIES_END, b_near, b_far)"
_START = """\
        parts(count, heads, width) if needs[8] else None,
    ]"""
_BEFORE = "m_before = (o_t > 0) & (o_n - 1 < i_stop)"
_BEHIND = "m_behind = (o_t < BT - 1) & (o_n + 1 < i_stop)"

MUTANTS = (
    _gradient(
        name="triton_selective_step_in_place_of_its_gradient",
        edits=((_SLOPE, _TYPED),),
        bug="B39",
        story="Where softplus is the identity, the gradient of delta is the step itself: dt for ddt.",
        trigger="selective_scan:float32:softplus-tails:B1,H2,N20,D4:delta_softplus,cotangents=normal:contiguous:101",
    ),
    _gradient(
        name="triton_selective_bias_without_the_slope",
        edits=((_SLOPE + _BIAS, _BIAS + _SLOPE),),
        story="The bias's gradient is summed before the slope of softplus is taken in.",
        trigger=f"{_TRIGGER}:delta_bias,delta_softplus,cotangents=normal:contiguous:102",
    ),
    _gradient(
        name="triton_selective_slope_at_the_step",
        edits=((_SLOPE, _SLOPE.replace("sigmoid(b_raw)", "sigmoid(b_step)")),),
        story="The slope of softplus is taken at softplus(x), not at x.",
        trigger=f"{_TRIGGER}:delta_softplus,cotangents=normal:contiguous:103",
    ),
    _gradient(
        name="triton_selective_slope_without_the_bias",
        edits=((_SLOPE, _SLOPE.replace("sigmoid(b_raw)", "sigmoid(b_raw - b_bias[:, None])")),),
        story="The slope of softplus is taken at delta, without the bias.",
        trigger=f"{_TRIGGER}:delta_bias,delta_softplus,cotangents=normal:contiguous:104",
    ),
    _gradient(
        name="triton_selective_steps_without_their_decay",
        edits=((_DSTEP, _DSTEP.replace("b_a3 * b_h + ", "")),),
        story="The gradient of a step leaves out the decay that it sets.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:105",
    ),
    _gradient(
        name="triton_selective_steps_without_their_write",
        edits=((_DSTEP, _DSTEP.replace(" + b_dstep * b_bu", "")),),
        story="The gradient of a step leaves out the weight of what it writes.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:106",
    ),
    _stepwise(
        name="triton_selective_steps_decay_their_own_write",
        edits=((_DSTEP, _DSTEP.replace("b_a3 * b_h", "b_a3 * (b_h + b_wu * b_b)")),),
        story="The decay's part of a step's gradient takes the state behind the position.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:107",
    ),
    _gradient(
        name="triton_selective_hold_with_slopes_of_euler",
        edits=(("return b_decay, tl.where(", "return tl.full(b_decay.shape, 1.0, tl.float32), tl.where("),),
        bug="MAM-2",
        story="Under the zero-order hold, the weight's slope in δ is Euler's 1, not exp(δA).",
        trigger=f"{_TRIGGER}:discretization=zoh,cotangents=normal:contiguous:108",
    ),
    _gradient(
        name="triton_selective_rates_without_the_hold",
        edits=((_DRATE, _DRATE.replace(" + b_dweight * b_bu", "")),),
        bug="MAM-2",
        story="Under the zero-order hold, dA leaves out that weights depend on A.",
        trigger=f"{_TRIGGER}:discretization=zoh,cotangents=normal:contiguous:109",
    ),
    _gradient(
        name="triton_selective_slope_of_the_hold_by_subtraction",
        edits=((_NEAR, "tl.where(b_a != 0.0, b_far, b_near)"),),
        story="∂w/∂A is (1 − (1 − x)eˣ)/A² as it stands where x is small, and its digits cancel.",
        trigger="selective_scan:float32:small-steps:B1,H2,N20,D4:"
        "discretization=zoh,cotangents=normal:contiguous:110",
    ),
    _gradient(
        name="triton_selective_rates_of_the_first_batch_entry",
        edits=((_SUMMED, "(found[0] if i == 2 else found.sum(0) if i in summed else found)"),),
        bug="B51",
        story="dA is that of the first sequence, not the sum over sequences.",
        trigger="selective_scan:float32:normal:B2,H2,N12,D4:cotangents=normal:contiguous:111",
    ),
    _gradient(
        name="triton_selective_inputs_of_the_last_channels",
        edits=((_SUMMED, "(found[-1] if i == 3 else found.sum(0) if i in summed else found)"),),
        bug="B30",
        story="dB is that of the last block of channels, not the sum over blocks.",
        trigger=f"{_WIDE}:cotangents=normal:contiguous:112",
    ),
    _gradient(
        name="triton_selective_channels_summed_in_the_inputs_dtype",
        edits=(
            (
                "*(parts(blocks, batch, width, length) if",
                "*(parts(blocks, batch, width, length).to(x.u.dtype) if",
            ),
        ),
        bug="B30",
        story="dB and dC of a block of channels are rounded to the inputs' dtype before they are summed.",
        trigger="selective_scan:bfloat16:normal:B1,H12,N20,D33:cotangents=normal:contiguous:113",
        accuracy_only=True,
    ),
    _gradient(
        name="triton_selective_gate_without_its_curve",
        edits=(("silu_slope(b_z)", "sigmoid(b_z)"),),
        story="The slope of silu is σ(z), without z σ(z) σ(−z).",
        trigger=f"{_TRIGGER}:z,cotangents=normal:contiguous:114",
    ),
    _gradient(
        name="triton_selective_gate_without_the_skip",
        edits=((_Y, _Y.removesuffix(" + b_skip[:, None] * b_u")),),
        story="dz leaves out D u, which passes the gate as well.",
        trigger=f"{_TRIGGER}:skip,z,cotangents=normal:contiguous:115",
    ),
    _gradient(
        name="triton_selective_skip_without_the_gate",
        edits=((_DSKIP, _DSKIP.replace("b_p", "sequence_tile(p_dy, s_yh, s_yn, o_c, m_c, o_n, m_n)")),),
        story="dD takes the cotangent of y, without the gate.",
        trigger=f"{_TRIGGER}:skip,z,cotangents=normal:contiguous:116",
    ),
    _stepwise(
        name="triton_selective_inputs_without_the_skip",
        edits=(
            (
                "b_du = tl.sum(b_weight * b_b * b_g, 2) + b_skip[:, None] * b_p",
                "b_du = tl.sum(b_weight * b_b * b_g, 2)",
            ),
        ),
        story="du leaves out the skip term.",
        trigger=f"{_TRIGGER}:skip,cotangents=normal:contiguous:117",
    ),
    _gradient(
        name="triton_selective_reads_without_their_own_write",
        edits=((_DC, _DC.replace("(b_h + b_wu * b_b)", "b_h")),),
        story="dC takes the state before the position's own write.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:118",
    ),
    _gradient(
        name="triton_selective_blocks_without_the_first_decay",
        edits=((_LAST, _LAST.replace("b_decay * b_g", "b_g")),),
        story="The gradient of the state enters the block before without the first position's decay.",
        trigger=f"{_BLOCKS}:cotangents=normal:contiguous:119",
    ),
    _gradient(
        name="triton_selective_first_step_of_a_block_twice",
        edits=((_BEFORE, "m_before = (o_n > i_start) & (o_n - 1 < i_stop)"),),
        story="A block computes its states from the state before it, with the step before it once more.",
        trigger=f"{_BLOCKS}:cotangents=normal:contiguous:120",
    ),
    _stepwise(
        name="triton_selective_next_sequence_decays",
        edits=((_BEHIND, _BEHIND.replace("i_stop", "N")),),
        bug="B37",
        story="The gradient of a packed sequence's final state is decayed by the step of the next one.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,return_state,cotangents=normal:contiguous:121",
    ),
    _gradient(
        name="triton_selective_final_cotangent_dropped",
        edits=(("None if dend is None else dend.contiguous(), *each", "None, *each"),),
        story="The cotangent of the final state is ignored.",
        trigger=f"{_TRIGGER}:return_state,cotangents=normal:contiguous:122",
    ),
    _gradient(
        name="triton_selective_initial_state_without_gradient",
        edits=((_START, "        None,\n    ]"),),
        bug="B57",
        story="The initial state gets no gradient.",
        trigger=f"{_TRIGGER}:initial_state,cotangents=normal:contiguous:123",
        shows=("gradient",),
    ),
    _gradient(
        name="triton_selective_cotangent_assumed_contiguous",
        edits=(("*dy.stride()", "*torch.empty_like(dy, memory_format=torch.contiguous_format).stride()"),),
        bug="B56",
        story="The cotangent of y is read as if it were contiguous.",
        trigger=f"{_TRIGGER}:cotangents=normal:columns:124",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _gradient(
        name="triton_selective_padding_decays_the_gradient",
        edits=(
            (
                "b_step2 = step_sizes(b_raw2, 0.0, m_behind[None, :], SOFTPLUS)",
                "b_step2 = step_sizes(b_raw2, 0.0, (o_t < BT - 1)[None, :], SOFTPLUS)",
            ),
        ),
        bug="B43",
        story="Steps beyond the end are softplus(bias) and decay the gradient of the final state.",
        trigger=f"{_TRIGGER}:delta_softplus,return_state,cotangents=normal:contiguous:125",
    ),
)
