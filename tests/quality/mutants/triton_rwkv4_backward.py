"""Mutants of the backward pass of RWKV-4's time mixing: moments of dw, bonus, sums, cotangents, states."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, NUMERIC, RWKV4, RWKV4_RECURRENT

__all__ = ["MUTANTS"]

_gradient = partial(
    Mutant,
    base=RWKV4,
    module="attnproof.kernels.rwkv4_backward",
    mechanism="gradient",
    bug="theory RWK-1",
    shows=(*NUMERIC, "nonfinite"),
)
_stepwise = partial(_gradient, base=RWKV4_RECURRENT)

_SHORT = "rwkv4:float32:normal:B1,H3,N20:cotangents=normal:contiguous"

_MOMENTS = "b_f, b_fo = b_kept * (b_f + b_g), b_kept * (b_fo + b_go)\n"
_SUMS = "        b_g, b_go = b_kept * b_g + b_c, b_kept * b_go + b_c * b_o\n"
_TO_DK = "b_dk = b_weight * (b_v * b_g - b_go) + b_own * (b_v - b_o)"
_WEIGHT = "b_weight = tl.exp(tl.minimum(lead(b_k, i_s, b_r, i_r, b_w), 0.0))"
_FACTORED = (
    "b_weight = tl.exp(b_k - b_r) * (tl.exp(-i_s.to(tl.float32) * b_w) * tl.exp(i_r.to(tl.float32) * b_w))"
)
_FROM_A = "b_g = tl.load(p_da1 + o_end, mask=m_h, other=0.0)"
_NO_MOMENTS = "b_f, b_fo = tl.zeros([BH], dtype=tl.float32), tl.zeros([BH], dtype=tl.float32)"
_OF_THE_FIRST_STATE = "        b_dw += b_weight * (b_a0 * b_f - b_b0 * b_fo)\n"
_RETURNED = "    dstart = (da, db) if start else (None, None)"
_THROUGH_THE_LEVEL = f"""\
    x = k + w[:, None] * (length - 1 - torch.arange(length, device=k.device))
    largest = x.amax(-1, keepdim=True)
    sums = ((x - largest).exp() * v).sum(-1)
    dk -= (dend[0] * sums)[..., None] * (x == largest)
{_RETURNED}"""

_RETURNING = "rwkv4:float32:normal:B1,H3,N20:return_state,cotangents=normal:contiguous"
_CARRIED = _RETURNING.replace("return", "initial_state,return")

MUTANTS = (
    _gradient(
        name="triton_rwkv4_dw_without_distances",
        edits=((_MOMENTS, "b_f, b_fo = b_kept * b_g, b_kept * b_go\n"),),
        story="dw counts one decay for every key that decayed, however often it did.",
        trigger=f"{_SHORT}:501",
    ),
    _stepwise(
        name="triton_rwkv4_dw_counts_from_the_key",
        edits=(
            (
                f"{_MOMENTS}{_SUMS}",
                f"{_SUMS.lstrip()}        b_f, b_fo = b_kept * b_f + b_g, b_kept * b_fo + b_go\n",
            ),
        ),
        story="dw counts t − s decays in place of t − 1 − s.",
        trigger=f"{_SHORT}:502",
    ),
    _gradient(
        name="triton_rwkv4_dw_without_the_normaliser",
        edits=(
            (
                "b_dw += b_weight * (b_v * b_f - b_fo)\n        b_du",
                "b_dw += b_weight * b_v * b_f\n        b_du",
            ),
        ),
        bug="B54",
        story="dw leaves out the sum of weights.",
        trigger=f"{_SHORT}:503",
    ),
    _gradient(
        name="triton_rwkv4_du_without_the_normaliser",
        edits=(("b_du += b_own * (b_v - b_o)", "b_du += b_own * b_v"),),
        bug="B54",
        story="du leaves out the sum of weights.",
        trigger=f"{_SHORT}:504",
    ),
    _stepwise(
        name="triton_rwkv4_bonus_has_no_gradient",
        edits=(("        b_du += b_own * (b_v - b_o)\n", ""),),
        story="du is 0.",
        trigger=f"{_SHORT}:505",
    ),
    _gradient(
        name="triton_rwkv4_dk_without_its_own_position",
        edits=((_TO_DK, "b_dk = b_weight * (b_v * b_g - b_go)"),),
        story="dk counts later rows alone, and not the key's own with the bonus.",
        trigger=f"{_SHORT}:506",
    ),
    _stepwise(
        name="triton_rwkv4_suffix_sums_not_rescaled",
        edits=((_SUMS, _SUMS.replace("b_kept * b_g +", "b_g +")),),
        story="Where the reference changes, the sum of cotangents is not rescaled, and that with o is.",
        trigger=f"{_SHORT}:507",
    ),
    _gradient(
        name="triton_rwkv4_backward_weights_factored",
        edits=((_WEIGHT, _FACTORED),),
        bug="B45",
        story="The backward pass takes weights as e^(−s w)·e^(i w): one overflows, the other underflows.",
        trigger="rwkv4:float32:strong-decay:B1,H3,N20:cotangents=normal:contiguous:508",
    ),
    _gradient(
        name="triton_rwkv4_dw_of_the_first_batch_entry",
        edits=(("column_sums(parts[0], w)", "column_sums(parts[0][:1], w)"),),
        bug="B51",
        story="The decay, which all batch entries share, has the gradient of the first alone.",
        trigger="rwkv4:float32:normal:B2,H3,N20:cotangents=normal:contiguous:509",
    ),
    _stepwise(
        name="triton_rwkv4_cotangent_assumed_contiguous",
        edits=(("*do.stride(), heads", "*o.stride(), heads"),),
        bug="B56",
        story="The cotangent is read as if it were contiguous.",
        trigger="rwkv4:float32:normal:B2,H3,N20:cotangents=normal:columns:510",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _gradient(
        name="triton_rwkv4_final_values_have_no_cotangent",
        edits=((_FROM_A, "b_g = tl.zeros([BH], dtype=tl.float32)"),),
        story="The cotangent of the final a is ignored.",
        trigger=f"{_CARRIED}:511",
    ),
    _stepwise(
        name="triton_rwkv4_final_sum_taken_for_a_normaliser",
        edits=(("b_go = -tl.load(p_db1", "b_go = tl.load(p_db1"),),
        story="The cotangent of the final b has the sign that o, which is divided by b, would give it.",
        trigger=f"{_RETURNING}:512",
    ),
    _gradient(
        name="triton_rwkv4_final_state_decays_once_more_in_dw",
        edits=((_NO_MOMENTS, "b_f, b_fo = b_g, b_go"),),
        story="For the final state dw counts N − s decays in place of N − 1 − s.",
        trigger=f"{_RETURNING}:513",
    ),
    _stepwise(
        name="triton_rwkv4_final_cotangents_in_the_units_of_the_last_output",
        edits=(("lead(b_r, i_r, b_k, N - 1, b_w) >= 0", "b_r == b_r"),),
        story="Cotangents of the final state are in units of what the last position reads, without its key.",
        trigger=f"{_CARRIED.replace('N20', 'N2').replace('H3', 'H8')}:514",
    ),
    _gradient(
        name="triton_rwkv4_final_level_differentiated_as_a_maximum",
        edits=((_RETURNED, _THROUGH_THE_LEVEL),),
        story="The largest key is charged with the final p by way of a.",
        trigger=f"{_RETURNING}:515",
    ),
    _gradient(
        name="triton_rwkv4_dw_without_the_initial_state",
        edits=((_OF_THE_FIRST_STATE, ""),),
        story="dw leaves out the decays of the initial state, which are those of all N positions.",
        trigger=f"{_CARRIED}:516",
    ),
    _stepwise(
        name="triton_rwkv4_initial_sum_gradient_of_the_wrong_sign",
        edits=(("p_db0 + o_end, -b_weight", "p_db0 + o_end, b_weight"),),
        story="The initial b has the gradient of a value, and not of a normaliser.",
        trigger=f"{_CARRIED}:517",
    ),
    _stepwise(
        name="triton_rwkv4_no_gradient_without_positions",
        edits=(("*(dend if start", "*((x * 0.0 for x in dend) if start"),),
        bug="B47",
        story="A call without positions hands the state on, and not its cotangents.",
        trigger=f"{_CARRIED.replace('N20', 'N0')}:518",
    ),
)
