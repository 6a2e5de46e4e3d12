"""Mutants of RWKV-4's time mixing: bonus, decays, the running maximum, tiles and states."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import NUMERIC, RWKV4, RWKV4_RECURRENT

__all__ = ["MUTANTS"]

_BACKWARD = "attnproof.kernels.rwkv4_backward"

_tiled = partial(
    Mutant, base=RWKV4, mechanism="numerics", bug="theory RWK-1", shows=(*NUMERIC, "nonfinite", "zero-state")
)
_stepwise = partial(_tiled, base=RWKV4_RECURRENT)

_SHORT = "rwkv4:float32:normal:B1,H3,N20"
_LONG = "rwkv4:float32:normal:B1,H3,N70"

_UNION = "return b_top, i_top, b_w2, b_b * b_c + b_b2 * b_c2, b_a * b_c + b_a2 * b_c2"
_TOP = "tl.where(b_lead >= 0, b_r, b_r2), tl.where(b_lead >= 0, i_r, i_r2)"
_BONUS = "b_lead = lead(b_r, i_r, b_k, i_n - 1, b_w) - b_u"
_WRITE = "joined(b_r, i_r, b_w, b_b, b_a, b_k, i_here, b_w, 1.0, b_v)"
_NEUTRAL = "torch.full_like(zero, -math.inf)"
_LEAD = "return b_gap + tl.where(i_steps == 0, 0.0, i_steps.to(tl.float32) * b_w)"

MUTANTS = (
    _stepwise(
        name="triton_rwkv4_bonus_kept_in_the_state",
        edits=((_WRITE, _WRITE.replace("b_k,", "b_k + b_u,")),),
        story="Later positions see the current key with its bonus.",
        trigger=f"{_SHORT}:-:contiguous:401",
    ),
    _tiled(
        name="triton_rwkv4_decay_once_too_often",
        edits=((_BONUS, _BONUS.replace("i_n - 1", "i_n")),),
        story="The weight of s in row t is e^((t − s)w + k).",
        trigger=f"{_SHORT}:-:contiguous:402",
    ),
    _stepwise(
        name="triton_rwkv4_current_key_decays",
        edits=((_WRITE, _WRITE.replace("b_k,", "b_k + b_w,")),),
        story="A key decays on its way into the state, and once more at every later position.",
        trigger=f"{_SHORT}:-:contiguous:403",
    ),
    _stepwise(
        name="triton_rwkv4_without_bonus",
        edits=((_BONUS, _BONUS.replace(" - b_u", "")),),
        story="The bonus is left out.",
        trigger=f"{_SHORT}:-:contiguous:404",
    ),
    _tiled(
        name="triton_rwkv4_bonus_of_the_first_channel",
        edits=(
            (
                "p_u + o_h * s_u, mask=m_h, other=0.0).to(tl.float32)[:, None]",
                "p_u + o_h * 0, mask=m_h, other=0.0).to(tl.float32)[:, None]",
            ),
        ),
        mechanism="pointers",
        bug="B50",
        story="All channels have the bonus of the first.",
        trigger=f"{_SHORT}:-:contiguous:405",
    ),
    _tiled(
        name="triton_rwkv4_sum_not_rescaled",
        edits=((_UNION, _UNION.replace("b_b * b_c +", "b_b +")),),
        story="Of two sets the earlier one's sum of weights is not scaled to the common maximum.",
        trigger=f"{_SHORT}:-:contiguous:406",
    ),
    _tiled(
        name="triton_rwkv4_position_of_the_wrong_maximum",
        edits=((_TOP, "tl.where(b_lead >= 0, b_r, b_r2), i_r2"),),
        story="The largest logit is kept with the position of the last one, from which it decays anew.",
        trigger=f"{_SHORT}:-:contiguous:407",
    ),
    _tiled(
        name="triton_rwkv4_smaller_of_two_maxima",
        edits=((_TOP, _TOP.replace(">= 0", "< 0")),),
        story="A union is labelled with the maximum of the smaller set.",
        trigger=f"{_SHORT}:-:contiguous:408",
    ),
    _stepwise(
        name="triton_rwkv4_empty_set_has_exponent_zero",
        edits=((_NEUTRAL, "zero.clone()"),),
        mechanism="special-values",
        bug="B06",
        story="The neutral state has p = 0, so that what lies far below it underflows.",
        trigger="rwkv4:float32:wide-maxima:B1,H8,N4:-:contiguous:409",
    ),
    _tiled(
        name="triton_rwkv4_empty_set_has_a_sentinel",
        edits=((_NEUTRAL, "torch.full_like(zero, -1e4)"),),
        mechanism="special-values",
        bug="B06",
        story="The neutral state has p = −10⁴, which keys may be below.",
        trigger="rwkv4:float32:below-sentinel:B1,H3,N20:-:contiguous:410",
    ),
    _tiled(
        name="triton_rwkv4_exponents_by_difference",
        edits=((_LEAD, "return (b_gap - i_r.to(tl.float32) * b_w) - -i_r2.to(tl.float32) * b_w"),),
        module=_BACKWARD,
        bug="B46",
        story="Exponents are differences of k − s w, which has no digits left for k where decays are strong.",
        trigger="rwkv4:float32:strong-decay:B1,H3,N70:-:contiguous:411",
    ),
    _tiled(
        name="triton_rwkv4_final_exponent_not_decayed",
        edits=(
            (
                "tl.store(p_p + o_last, b_cr + lead(0.0, i_cr, 0.0, N - 1, b_w1),",
                "tl.store(p_p + o_last, b_cr,",
            ),
        ),
        mechanism="wrapper",
        story="The state's p is the logit itself, without its decay up to the end.",
        trigger=f"{_SHORT}:return_state:contiguous:412",
    ),
    _stepwise(
        name="triton_rwkv4_final_exponent_decays_once_more",
        edits=(("b_r + lead(0.0, i_r, 0.0, N - 1, b_w)", "b_r + lead(0.0, i_r, 0.0, N, b_w)"),),
        mechanism="wrapper",
        story="The state's p decays once too often.",
        trigger=f"{_SHORT}:return_state:contiguous:413",
    ),
    _tiled(
        name="triton_rwkv4_last_key_of_full_tiles_unwritten",
        edits=(("for i_t in range(0, N + 1, BN):", "for i_t in range(0, N, BN):"),),
        mechanism="masking",
        bug="B59",
        story="Where tiles end with the sequence, the final state lacks the last position.",
        trigger="rwkv4:float32:normal:B1,H3,N64:return_state:contiguous:414",
    ),
    _tiled(
        name="triton_rwkv4_initial_state_at_the_first_position",
        edits=(("i_cr = tl.zeros([BH, 1], dtype=tl.int32) - 1", "i_cr = tl.zeros([BH, 1], dtype=tl.int32)"),),
        mechanism="wrapper",
        story="The initial state decays once too seldom.",
        trigger=f"{_SHORT}:initial_state:contiguous:415",
    ),
    _stepwise(
        name="triton_rwkv4_initial_state_overwritten",
        edits=(("return State(*(x.clone() for x in start))", "return State(*start)"),),
        mechanism="wrapper",
        story="The final state is written over the initial one.",
        trigger=f"{_SHORT}:initial_state,return_state:contiguous:416",
        shows=(*NUMERIC, "mutation", "nonfinite", "zero-state"),
    ),
    _tiled(
        name="triton_rwkv4_sum_of_earlier_tiles_lost",
        edits=(
            (
                "joined(b_cr, i_cr, b_w1, b_cb, b_ca,",
                "joined(b_cr, i_cr, b_w1, b_cb * 0.0, b_ca,",
            ),
        ),
        bug="B55",
        story="The sum of weights begins anew in every tile.",
        trigger=f"{_LONG}:-:contiguous:417",
    ),
    _stepwise(
        name="triton_rwkv4_sums_in_the_inputs_dtype",
        edits=((f"= {_WRITE}", f"= {_WRITE}\n        b_a = b_a.to(p_v.dtype.element_ty).to(tl.float32)"),),
        mechanism="accuracy",
        bug="B60",
        story="From position to position a is handed on in the inputs' dtype.",
        trigger="rwkv4:float16:slow-decay:B2,H8,N70:-:contiguous:418",
        accuracy_only=True,
    ),
)
