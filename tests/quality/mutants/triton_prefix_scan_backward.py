"""Mutants of prefix attention's backward pass: suffix sums, Δ, the scale, slices and batch entries."""

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
_PARTS = "    parts = torch.empty((batch * blocks, heads, width)"
_THROUGH_THE_MAXIMUM = f"""\
    top = rows[0][:, :, :, None] == s[:, :, None, :]
    ds[0] -= ((do.float() * o).sum(-1)[..., None] * top).sum(2)
{_PARTS}"""

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
        edits=(("*v.stride(), *do.stride(), batch", "*v.stride(), *o.stride(), batch"),),
        bug="B56",
        story="The cotangent is read as if it were contiguous.",
        trigger=f"{_SHORT.replace(':contiguous', ':transposed')}:312",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _gradient(
        name="triton_prefix_delta_of_the_rounded_output",
        edits=(
            (
                "ctx.save_for_backward(q, k, v, s, rows, exact)",
                "ctx.save_for_backward(q, k, v, s, rows, exact.to(v.dtype).float())",
            ),
        ),
        module="",
        story="Δ is formed from o as it was stored.",
        unseen="budgets let dO·o be formed of the stored output, as FlashAttention does",
        trigger="prefix_scan:bfloat16:one-sign-values:B1,H4,N130,D4,E8:cotangents=aligned:contiguous:313",
        accuracy_only=True,
    ),
)
