"""Mutants of Mamba's selective scan: steps, discretisation, gates, blocks and sequences."""

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

_output = partial(
    Mutant,
    base=SELECTIVE_SCAN,
    module="attnproof.kernels.selective_scan_associative",
    mechanism="numerics",
    bug="",
    shows=(*NUMERIC, "nonfinite"),
)
_stepwise = partial(
    _output, base=SELECTIVE_SCAN_RECURRENT, module="attnproof.kernels.selective_scan_recurrence"
)
_step = partial(_output, module="attnproof.kernels.selective_scan_recurrence")
_activation = partial(_output, module="attnproof.kernels.activations")
_wrapper = partial(_output, module="attnproof.kernels.selective_scan", mechanism="wrapper")

_TRIGGER = "selective_scan:float32:normal:B1,H2,N20,D4"
_BLOCKS = "selective_scan:float32:normal:B1,H2,N70,D3"

_SOFTPLUS = "return tl.maximum(b_x, 0.0) + 2.0 * b_s * b_sum"
_SILU = "return b_x * sigmoid(b_x)"
_BIASED = """\
    b_step = b_delta + b_bias
    if SOFTPLUS:
        b_step = softplus(b_step)
"""
_BIASED_LATER = """\
    b_step = b_delta
    if SOFTPLUS:
        b_step = softplus(b_step)
    b_step += b_bias
"""
_WEIGHT = "tl.where(tl.abs(b_x) < SERIES_END, b_step * expm1_ratio_series(b_x), (b_decay - 1.0) / b_a)"
_SKIPPED = """\
        if p_d is not None:
            b_y += b_skip * b_u
"""
_GATED = """\
        if p_z is not None:
            b_y *= silu(tl.load(p_z + i_t * s_zn, mask=m_c, other=0.0).to(tl.float32))
"""
_STEPS = "b_step = step_sizes(b_delta, b_bias[:, None], m_n[None, :], SOFTPLUS)"
_SCANNED = "b_decay, b_h = tl.associative_scan((b_decay, b_x), 1, composed)"
_LAST = "b_last = tl.sum(tl.where((o_t == BT - 1)[None, :, None], b_h, 0.0), 1)"
_STATE = "b_h = b_decay * b_h + b_weight * b_u[:, None] * b_b[None, :]"
_RATES = "b_a = tl.load(p_a + o_h, mask=m_h, other=0.0).to(tl.float32)"
_START = "b_last = tl.load(p_start + i_state + o_h, mask=m_h, other=0.0)"
_HOW = 'stepwise, bool(delta_softplus), discretization == "zoh", sequences,'

MUTANTS = (
    _activation(
        name="triton_selective_softplus_without_guard",
        edits=((_SOFTPLUS, "return tl.log(1.0 + tl.exp(b_x))"),),
        mechanism="special-values",
        bug="B39",
        story="softplus is log(1 + eˣ), which is infinite from x = 89 on.",
        trigger="selective_scan:float32:softplus-tails:B1,H4,N40,D2:delta_softplus:contiguous:1",
    ),
    _activation(
        name="triton_selective_softplus_cancels",
        edits=((_SOFTPLUS, "return tl.where(b_x > 20.0, b_x, tl.log(1.0 + tl.exp(b_x)))"),),
        bug="B39",
        story="softplus is log(1 + eˣ) up to 20: small steps have the digits that 1 + eˣ leaves of eˣ.",
        trigger="selective_scan:float32:small-steps:B1,H2,N20,D4:delta_softplus:contiguous:2",
    ),
    _wrapper(
        name="triton_selective_euler_in_place_of_the_hold",
        edits=((_HOW, _HOW.replace('discretization == "zoh"', "False")),),
        bug="MAM-2",
        story="Inputs are weighted by δ, as Mamba is shipped, where the zero-order hold is asked for.",
        trigger=f"{_TRIGGER}:discretization=zoh:contiguous:3",
    ),
    _step(
        name="triton_selective_hold_by_subtraction",
        edits=((_WEIGHT, "tl.where(b_a != 0.0, (b_decay - 1.0) / b_a, b_step)"),),
        story="(exp(δA) − 1)/A is formed as it stands where δA is small, and digits cancel.",
        trigger="selective_scan:float32:small-steps:B1,H2,N20,D4:discretization=zoh:contiguous:4",
    ),
    _step(
        name="triton_selective_hold_divides_by_no_rate",
        edits=((_WEIGHT, "(b_decay - 1.0) / b_a"),),
        mechanism="special-values",
        story="(exp(δA) − 1)/A is 0/0 where A is 0.",
        trigger="selective_scan:float32:open-gates:B1,H2,N20,D4:discretization=zoh:contiguous:5",
    ),
    _step(
        name="triton_selective_bias_after_softplus",
        edits=((_BIASED, _BIASED_LATER),),
        story="The bias of the steps is added to softplus(delta) and not to delta.",
        trigger=f"{_TRIGGER}:delta_bias,delta_softplus:contiguous:6",
    ),
    _stepwise(
        name="triton_selective_skip_after_the_gate",
        edits=((_SKIPPED + _GATED, _GATED + _SKIPPED),),
        story="D u is added behind the gate and does not pass through it.",
        trigger=f"{_TRIGGER}:skip,z:contiguous:7",
    ),
    _step(
        name="triton_selective_decay_grows",
        edits=(("b_decay = tl.exp(b_x)", "b_decay = tl.exp(-tl.minimum(b_x, -1e-4))"),),
        bug="B58",
        story="The sign binds to the bounded product: the state grows where it should decay.",
        trigger=f"{_TRIGGER}:-:contiguous:8",
    ),
    _stepwise(
        name="triton_selective_rates_of_the_first_channel",
        edits=((_RATES, _RATES.replace("p_a + o_h", "p_a + (o_h - o_c[:, None] * D)")),),
        mechanism="pointers",
        bug="B50",
        story="Every channel decays by the rates of channel 0.",
        trigger="selective_scan:float32:uneven-rates:B1,H3,N20,D4:-:contiguous:9",
    ),
    _output(
        name="triton_selective_blocks_by_their_last_decay",
        edits=((_SCANNED, _SCANNED.replace("b_decay, b_h", "_, b_h")),),
        story="The state before a block enters a position with that position's decay alone.",
        trigger=f"{_BLOCKS}:-:contiguous:10",
    ),
    _output(
        name="triton_selective_state_added_to_itself",
        edits=((_LAST, _LAST.replace("b_last =", "b_last +=")),),
        story="The state before a block is added again to the one behind it.",
        trigger=f"{_BLOCKS}:return_state:contiguous:11",
    ),
    _output(
        name="triton_selective_padding_decays",
        edits=((_STEPS, _STEPS.replace("m_n[None, :]", "m_c[:, None]")),),
        mechanism="masking",
        bug="B43",
        story="Positions beyond the end have the step softplus(bias), by which the final state decays.",
        trigger=f"{_TRIGGER}:delta_softplus,return_state:contiguous:12",
    ),
    _output(
        name="triton_selective_last_block_is_full",
        edits=(
            (_LAST, "b_last = tl.sum(tl.where((o_n == i_stop - 1)[None, :, None], b_h, 0.0), 1)"),
            ("o_n = i_start + i_t * BT + o_t\n", "o_n = tl.minimum(i_start + i_t * BT, i_stop - BT) + o_t\n"),
            ("m_n = o_n < i_stop\n", "m_n = o_n >= i_start\n"),
        ),
        mechanism="masking",
        bug="B57",
        story="The last block is moved back to be full, and takes positions of the block before it twice.",
        trigger=f"{_BLOCKS}:-:contiguous:13",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _output(
        name="triton_selective_initial_state_of_the_batch",
        edits=((_START, _START.replace("i_state", "i_b * H * D")),),
        mechanism="pointers",
        bug="B50",
        story="Every packed sequence begins in the initial state of the first one.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,initial_state:contiguous:14",
    ),
    _output(
        name="triton_selective_sequence_runs_on",
        edits=(("m_n = o_n < i_stop\n", "m_n = o_n < N\n"),),
        mechanism="masking",
        bug="B35",
        story="The last block of a packed sequence takes in, and overwrites, positions of the next one.",
        trigger=f"{_TRIGGER}:cu_seqlens=7+0+13,return_state:contiguous:15",
    ),
    _stepwise(
        name="triton_selective_state_in_the_inputs_dtype",
        edits=((_STATE, f"{_STATE}\n        b_h = b_h.to(p_y.dtype.element_ty).to(tl.float32)"),),
        bug="B60",
        story="The state is rounded to the inputs' dtype after each step.",
        trigger="selective_scan:bfloat16:slow-decay:B1,H2,N40,D4:return_state:contiguous:16",
    ),
    _stepwise(
        name="triton_selective_steps_in_the_inputs_dtype",
        edits=(
            (
                "b_step = step_sizes(b_delta, b_bias, m_c, SOFTPLUS)",
                "b_step = step_sizes(b_delta, b_bias, m_c, SOFTPLUS).to(p_y.dtype.element_ty).to(tl.float32)",
            ),
        ),
        mechanism="accuracy",
        bug="B64",
        story="Steps are rounded to the inputs' dtype behind bias and softplus.",
        trigger="selective_scan:bfloat16:normal:B1,H4,N200,D4:delta_bias,delta_softplus:contiguous:17",
        accuracy_only=True,
    ),
    _activation(
        name="triton_selective_silu_overflows",
        edits=((_SILU, "return b_x * tl.exp(b_x) / (1.0 + tl.exp(b_x))"),),
        mechanism="special-values",
        bug="B63",
        story="silu is x eˣ/(1 + eˣ): ∞/∞ from x = 89 on.",
        trigger="selective_scan:float32:saturated-gates:B1,H4,N100,D2:z:contiguous:18",
    ),
)
