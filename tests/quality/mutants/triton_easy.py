"""Mutants of easy attention: bands, the sum over the batch, the transposed scores, addresses and storage."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, NUMERIC

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base="attnproof.kernels.easy:attention", bug="", shows=NUMERIC)

_MASK = "m_a = m_a & (tl.abs(o_m[:, None] - o_n[None, :]) <= band)"
_PRODUCT = 'b_o = tl.dot(b_a, b_v, b_o, input_precision="ieee")'
_DALPHA = 'b_da = tl.dot(b_do, b_v, b_da, input_precision="ieee")'
_CONTIGUOUS = "        if TRANSPOSED:\n            s_am = 1\n"
_LOST = "nonfinite"

MUTANTS = (
    _mutant(
        name="triton_easy_band_without_its_edge",
        mechanism="masking",
        edits=((_MASK, _MASK.replace("<= band", "< band")),),
        story="Positions at the band's very edge are left out.",
        trigger="easy:float16:normal:B2,H2,N40,E16:band=7:contiguous:1",
    ),
    _mutant(
        name="triton_easy_band_on_one_side",
        mechanism="masking",
        edits=((_MASK, _MASK.replace("tl.abs(o_m[:, None] - o_n[None, :])", "o_m[:, None] - o_n[None, :]")),),
        story="The band has no limit on the right.",
        trigger="easy:float32:normal:B1,H1,N40,E16:band=7:contiguous:2",
        shows=(*NUMERIC, _LOST),
    ),
    _mutant(
        name="triton_easy_band_by_tile",
        mechanism="masking",
        edits=((_MASK, "m_a = m_a & (o_m >= 0)[:, None]"),),
        bug="B59",
        story="The band hides whole tiles of scores, and nothing within a tile that it crosses.",
        trigger="easy:float16:normal:B1,H1,N70,E16:band=17:contiguous:3",
        shows=(*NUMERIC, _LOST),
    ),
    _mutant(
        name="triton_easy_band_of_the_first_row",
        mechanism="masking",
        edits=(("tl.minimum(i_m + BM + band, N)", "tl.minimum(i_m + 1 + band, N)"),),
        bug="B59",
        story="The last tile of scores is that of a tile's first row; later rows lose some.",
        trigger="easy:float16:normal:B1,H1,N70,E16:band=17:contiguous:4",
    ),
    _mutant(
        name="triton_easy_band_of_zero_is_none",
        mechanism="wrapper",
        edits=(("BANDED=band is not None, TRANSPOSED", "BANDED=bool(band), TRANSPOSED"),),
        story="A band of 0 is taken for no band.",
        trigger="easy:float16:normal:B1,H1,N40,E16:band=0:contiguous:5",
        shows=(*NUMERIC, _LOST),
    ),
    _mutant(
        name="triton_easy_last_position_repeated",
        mechanism="masking",
        edits=(
            ("o_n = i_t * BN + tl.arange(0, BN)", "o_n = tl.minimum(i_t * BN + tl.arange(0, BN), N - 1)"),
        ),
        bug="B25",
        story="Lanes beyond the last position repeat it.",
        trigger="easy:bfloat16:normal:B1,H1,N33,E16:-:contiguous:6",
    ),
    _mutant(
        name="triton_easy_scores_of_the_first_head",
        mechanism="pointers",
        edits=(("p_a += i_h * s_ah", "p_a += 0 * s_ah"),),
        bug="B50",
        story="Every head mixes by the scores of the first one.",
        trigger="easy:float16:normal:B1,H2,N33,E16:-:contiguous:7",
        shows=(*NUMERIC, _LOST),
    ),
    _mutant(
        name="triton_easy_products_in_tf32",
        mechanism="accuracy",
        edits=((_PRODUCT, _PRODUCT.replace("ieee", "tf32")),),
        story="float32 matmuls round their operands to tf32, where ieee is declared.",
        trigger="easy:float32:normal:B1,H1,N33,E16:-:contiguous:8",
    ),
    _mutant(
        name="triton_easy_accumulator_narrow",
        mechanism="accuracy",
        accuracy_only=True,
        edits=((_PRODUCT, f"{_PRODUCT}.to(b_v.dtype).to(tl.float32)"),),
        story="The accumulator is rounded to the inputs' dtype after each tile.",
        trigger="easy:bfloat16:normal:B1,H1,N300,E16:-:contiguous:9",
    ),
    _mutant(
        name="triton_easy_scores_gradient_of_the_first_entry",
        mechanism="gradient",
        edits=(("for i_b in range(pieces):", "for i_b in range(tl.minimum(pieces, 1)):"),),
        bug="B51",
        story="dα is that of the first batch entry.",
        trigger="easy:float16:normal:B2,H1,N33,E16:cotangents=normal:contiguous:10",
    ),
    _mutant(
        name="triton_easy_scores_gradient_averaged",
        mechanism="gradient",
        edits=(("tl.store(p_da + (o_row * N)", "b_da = b_da / B\n    tl.store(p_da + (o_row * N)"),),
        story="dα is the batch's mean, not its sum.",
        trigger="easy:float32:normal:B2,H1,N33,E16:cotangents=normal:contiguous:11",
    ),
    _mutant(
        name="triton_easy_scores_gradient_of_the_first_values",
        mechanism="gradient",
        edits=(("tl.load(p_v + i_b * s_vb + o_v, mask", "tl.load(p_v + o_v, mask"),),
        bug="B49",
        story="dα takes every batch entry's values from the first one.",
        trigger="easy:float16:normal:B2,H1,N33,E16:cotangents=normal:contiguous:12",
    ),
    _mutant(
        name="triton_easy_scores_gradient_outside_the_band",
        mechanism="gradient",
        edits=(("b_da = tl.where(m_b, b_da, 0.0)", "b_da += 0.0"),),
        story="dα is not 0 outside the band, in tiles that the band crosses.",
        trigger="easy:float16:normal:B2,H1,N33,E16:band=3,cotangents=normal:contiguous:13",
    ),
    _mutant(
        name="triton_easy_band_forgotten_in_backward",
        mechanism="gradient",
        edits=(("ctx.band, ctx.tiles = band, tiles", "ctx.band, ctx.tiles = None, tiles"),),
        story="The backward pass knows of no band.",
        trigger="easy:float16:normal:B2,H1,N33,E16:band=3,cotangents=normal:contiguous:14",
    ),
    _mutant(
        name="triton_easy_values_gradient_not_transposed",
        mechanism="gradient",
        edits=(("ctx.band, ctx.tiles, transposed=True)", "ctx.band, ctx.tiles, transposed=False)"),),
        story="dV is α dO in place of αᵀ dO.",
        trigger="easy:float16:normal:B1,H2,N33,E16:cotangents=normal:contiguous:15",
    ),
    _mutant(
        name="triton_easy_transposed_rows_contiguous",
        mechanism="gradient",
        edits=(
            (
                "        if TRANSPOSED:\n            s_am = 1\n",
                "        if TRANSPOSED:\n            s_an = 1\n",
            ),
        ),
        story="The scores, transposed for dV, are read as if their rows were contiguous.",
        trigger="easy:float16:normal:B1,H2,N33,E16:cotangents=normal:contiguous:16",
        shows=(*NUMERIC, *FAULT, _LOST),
    ),
    _mutant(
        name="triton_easy_cotangent_assumed_contiguous",
        mechanism="gradient",
        edits=(("*scaled_strides(do, layout)", "*scaled_strides(do.contiguous(), layout)"),),
        bug="B56",
        story="dα reads the cotangent as if it were contiguous.",
        trigger="easy:float16:normal:B1,H2,N33,E16:cotangents=normal:transposed:17",
        shows=(*NUMERIC, *FAULT, _LOST),
    ),
    _mutant(
        name="triton_easy_scores_gradient_in_bfloat16",
        mechanism="accuracy",
        accuracy_only=True,
        edits=((_DALPHA, f"{_DALPHA}.to(tl.bfloat16).to(tl.float32)"),),
        story="dα is rounded to bfloat16 after each batch entry, in every dtype.",
        trigger="easy:float16:normal:B2,H1,N40,E16:cotangents=normal:contiguous:18",
    ),
)
