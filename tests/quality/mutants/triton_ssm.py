"""Mutants of diagonal state spaces: recurrence, scan, convolution and Fourier transform."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import (
    FAULT,
    NUMERIC,
    SSM_CONVOLUTION,
    SSM_FFT,
    SSM_RECURRENT,
    SSM_SCAN,
)

__all__ = ["MUTANTS"]

_WRAPPER = "attnproof.kernels.ssm"
_RECURRENCE = "attnproof.kernels.ssm_recurrence"
_SCAN = "attnproof.kernels.ssm_scan"
_KERNELS = "attnproof.kernels.ssm_convolution"

_wrong = partial(Mutant, mechanism="numerics", bug="", shows=(*NUMERIC, "nonfinite"))
_stepwise = partial(_wrong, base=SSM_RECURRENT, module=_RECURRENCE)
_scanned = partial(_wrong, base=SSM_SCAN, module=_SCAN)
_convolved = partial(_wrong, base=SSM_CONVOLUTION, module=_KERNELS)
_wrapper = partial(_wrong, module=_WRAPPER)

_TRIGGER = "ssm:float32:normal:B1,H2,N20,D4"

_WRITE_AND_READ = """\
        b_xr += b_br * b_u
        b_y = b_cr * b_xr
        if COMPLEX:
            b_xi += b_bi * b_u
            b_y -= b_ci * b_xi
"""
_READ_AND_WRITE = """\
        b_y = b_cr * b_xr
        if COMPLEX:
            b_y -= b_ci * b_xi
            b_xi += b_bi * b_u
        b_xr += b_br * b_u
"""
_STEP = "        tl.store(p_out + i_n, b_y.to(p_out.dtype.element_ty))\n"
_ROUNDED_STATE = """\
        b_xr = b_xr.to(p_out.dtype.element_ty).to(tl.float32)
        b_xi = b_xi.to(p_out.dtype.element_ty).to(tl.float32)
"""
_PARTS = "dtype = u.dtype if self.number == 1 else torch.float32"
_END = "m_end = o_n == tl.minimum(o_n - o_t + BT, i_stop) - 1"
_POWERS = "    return b_pr, b_pi, b_er, b_ei\n\n\n@triton.jit\ndef after("
_LOGARITHM = "    if not COMPLEX:\n        b_pr = tl.exp(o_e.to(tl.float32) * tl.log(b_ar))\n"
_POWER_OF_THE_LAG = "b_part = b_wr * b_pr"
_REACHED = """\
    end = product(b.expand(reached.shape), reached, pairs=pairs)
    if initial_state is not None"""
_KERNEL = "responses(a, product(c, b, pairs=pairs)[None], length)[0]"

MUTANTS = (
    _stepwise(
        name="triton_ssm_read_before_the_write",
        edits=((_WRITE_AND_READ, _READ_AND_WRITE),),
        story="A row reads the state before its own input is added.",
        trigger=f"{_TRIGGER}:complex:contiguous:1",
    ),
    _stepwise(
        name="triton_ssm_real_part_of_the_state_alone",
        edits=(("            b_y -= b_ci * b_xi\n", ""),),
        story="The real part is taken of c and of the state, not of their product.",
        trigger=f"{_TRIGGER}:complex:contiguous:2",
    ),
    _stepwise(
        name="triton_ssm_state_in_the_inputs_dtype",
        edits=((_STEP, f"{_STEP}{_ROUNDED_STATE}"),),
        bug="B60",
        story="The state is rounded to the inputs' dtype after each step.",
        trigger="ssm:bfloat16:slow-decay:B1,H2,N40,D4:complex,return_state:contiguous:3",
    ),
    _stepwise(
        name="triton_ssm_skip_of_every_tile_of_states",
        edits=(("if p_d is not None and i_d == 0:", "if p_d is not None:"),),
        bug="B31",
        story="The skip term is added once for each 16 states.",
        trigger="ssm:float32:normal:B1,H2,N20,D20:skip:contiguous:4",
    ),
    _stepwise(
        name="triton_ssm_parts_of_an_output_in_the_inputs_dtype",
        edits=((_PARTS, "dtype = u.dtype"),),
        bug="B30",
        story="What each 16 states add to an output is rounded to the inputs' dtype before it is added up.",
        trigger="ssm:bfloat16:normal:B1,H4,N40,D64:-:contiguous:5",
        accuracy_only=True,
    ),
    _stepwise(
        name="triton_ssm_one_initial_state_for_all",
        edits=(("load_pair(p_start, o_s,", "load_pair(p_start, i_h * D + o_d,"),),
        mechanism="pointers",
        story="Every sequence begins with the initial state of the first.",
        trigger=f"{_TRIGGER}:initial_state,cu_seqlens=7+0+13:contiguous:6",
    ),
    _stepwise(
        name="triton_ssm_input_assumed_contiguous",
        edits=(
            (
                "sequences.cu_seqlens, *u.stride(), batch",
                "sequences.cu_seqlens, heads * length, length, 1, batch",
            ),
        ),
        mechanism="pointers",
        bug="B56",
        story="Inputs are read as if they were contiguous.",
        trigger=f"{_TRIGGER}:-:columns:7",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _scanned(
        name="triton_ssm_initial_state_one_power_short",
        edits=(("powers(b_ar, b_ai, o_t + 1, BITS, COMPLEX)", "powers(b_ar, b_ai, o_t, BITS, COMPLEX)"),),
        story="Row t of a block reads the state that enters it times a^t, not a^(t+1).",
        trigger=f"{_TRIGGER}:initial_state:contiguous:8",
    ),
    _scanned(
        name="triton_ssm_state_decays_over_the_padding",
        edits=((_END, "m_end = o_t == BT - 1"),),
        mechanism="masking",
        bug="B47",
        story="The final state is that of the end of its block, also where the sequence ends before.",
        trigger=f"{_TRIGGER}:return_state:contiguous:9",
    ),
    _scanned(
        name="triton_ssm_empty_sequence_ends_in_zeros",
        edits=(("    b_endr, b_endi = b_sr, b_si\n", "    b_endr, b_endi = b_sr * 0.0, b_si * 0.0\n"),),
        mechanism="special-values",
        story="The final state of a sequence without positions is 0, not its initial state.",
        trigger=f"{_TRIGGER}:initial_state,return_state,cu_seqlens=7+0+13:contiguous:10",
    ),
    _scanned(
        name="triton_ssm_state_crosses_a_block_undecayed",
        edits=(
            (
                "tl.full([1, 1], BT, dtype=tl.int32), BITS, COMPLEX)",
                "tl.full([1, 1], 0, dtype=tl.int32), BITS, COMPLEX)",
            ),
        ),
        story="The state before a block is added to that after it as it is.",
        trigger="ssm:float32:normal:B1,H1,N140,D2:complex:contiguous:13",
    ),
    _convolved(
        name="triton_ssm_powers_by_logarithm",
        module=_SCAN,
        edits=((_POWERS, f"{_LOGARITHM}{_POWERS}"),),
        mechanism="special-values",
        story="Powers are exp(i log a): NaN for a = 0, and for a < 0.",
        trigger="ssm:float32:closed-gates:B1,H2,N20,D4:-:contiguous:14",
    ),
    _convolved(
        name="triton_ssm_kernel_decayed_from_the_first_lag",
        edits=(("i_t * BT, bits, COMPLEX", "i_t * BT + 1, bits, COMPLEX"),),
        story="The kernel has a^(i+1) for a^i.",
        trigger=f"{_TRIGGER}:complex:contiguous:15",
    ),
    _convolved(
        name="triton_ssm_powers_in_half",
        edits=(
            (_POWER_OF_THE_LAG, f"b_pr = b_pr.to(tl.float16).to(tl.float32)\n        {_POWER_OF_THE_LAG}"),
        ),
        bug="B60",
        story="Real parts of the powers of a are kept in float16.",
        trigger=f"{_TRIGGER}:-:contiguous:16",
    ),
    _convolved(
        name="triton_ssm_powers_of_seven_bits",
        edits=(
            (
                "a.contiguous(), w.contiguous(), out, length.bit_length(),",
                "a.contiguous(), w.contiguous(), out, BITS,",
            ),
        ),
        story="Powers beyond the 127th lack the bits above the seventh.",
        trigger="ssm:float32:normal:B1,H1,N140,D2:complex:contiguous:17",
    ),
    _convolved(
        name="triton_ssm_kernel_of_the_first_states",
        edits=(("    for i_d in range(0, D, BD):", "    for i_d in range(0, BD, BD):"),),
        mechanism="masking",
        bug="B32",
        story="The kernel sums over the first 16 states.",
        trigger="ssm:float32:normal:B1,H2,N20,D20:-:contiguous:18",
    ),
    _convolved(
        name="triton_ssm_real_part_before_the_product",
        edits=(("            b_part -= b_wi * b_pi\n", "            b_part -= 0.0 * b_pi\n"),),
        story="The kernel is Re(c b) Re(aⁱ).",
        trigger=f"{_TRIGGER}:complex:contiguous:19",
    ),
    _convolved(
        name="triton_ssm_later_inputs_weighted_by_zero",
        edits=(("tl.where(m_lag, b_k * b_x, 0.0)", "b_k * b_x"),),
        mechanism="special-values",
        bug="B21",
        story="A NaN in a later input reaches a row as 0·NaN.",
        trigger="ssm:float32:future-nonfinite:B1,H2,N20,D4:-:contiguous:20",
        shows=("nonfinite", "unseen-nonfinite", "isolation", "causality"),
    ),
    _wrapper(
        name="triton_ssm_initial_response_one_power_short",
        base=SSM_CONVOLUTION,
        edits=(
            (
                "product(product(c, a, pairs=pairs), initial_state, pairs=pairs)",
                "product(c.expand(initial_state.shape), initial_state, pairs=pairs)",
            ),
        ),
        story="The initial state answers at row t with a^t, not a^(t+1).",
        trigger=f"{_TRIGGER}:complex,initial_state:contiguous:21",
    ),
    _wrapper(
        name="triton_ssm_final_state_without_the_initial_one",
        base=SSM_CONVOLUTION,
        edits=(
            (
                f"{_REACHED}:",
                f"{_REACHED} and not length:",
            ),
        ),
        story="The final state lacks what is left of the initial one.",
        trigger="ssm:float32:slow-decay:B1,H2,N20,D4:initial_state,return_state:contiguous:22",
    ),
    _wrapper(
        name="triton_ssm_transform_without_padding",
        base=SSM_FFT,
        edits=(("size = 1 << (2 * length - 1).bit_length()", "size = 1 << (length - 1).bit_length()"),),
        story="The transform is as long as the sequence, and the convolution wraps around.",
        trigger=f"{_TRIGGER}:-:contiguous:23",
    ),
    _wrapper(
        name="triton_ssm_transform_one_point_short",
        base=SSM_FFT,
        edits=(("size = 1 << (2 * length - 1).bit_length()", "size = max(1, 2 * length - 2)"),),
        story="The transform has 2N − 2 points: the last input reaches the first output.",
        trigger="ssm:float32:slow-decay:B1,H2,N20,D4:-:contiguous:24",
    ),
    _wrapper(
        name="triton_ssm_kernel_in_the_inputs_dtype",
        base=SSM_FFT,
        edits=((f"convolve({_KERNEL}, f)", f"convolve({_KERNEL}.to(u.dtype).float(), f)"),),
        story="The kernel is rounded to the inputs' dtype before it is transformed.",
        trigger="ssm:bfloat16:normal:B1,H4,N40,D8:-:contiguous:25",
        mechanism="accuracy",
        accuracy_only=True,
    ),
    _wrapper(
        name="triton_ssm_decay_clamped",
        base=SSM_FFT,
        edits=(
            (
                "    a, b, c = (x.float() for x in parameters)\n",
                "    a, b, c = (x.float() for x in parameters)\n    a = a.clamp(-0.9999, 0.9999)\n",
            ),
        ),
        mechanism="special-values",
        story="Decays are held below 1 in magnitude, so that nothing is kept for ever.",
        trigger="ssm:float32:open-gates:B1,H2,N40,D4:-:contiguous:26",
    ),
)
