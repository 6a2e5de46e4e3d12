"""Mutants of the Triton kernels that read or write other elements than they should, and of their wrapper."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, MERGE, NUMERIC, SOFTMAX, THREE, TILES, WHOLE

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base=WHOLE, mechanism="pointers", bug="", shows=(*NUMERIC, *FAULT, "nonfinite"))
_wrapper = partial(Mutant, base=WHOLE, mechanism="wrapper", bug="", shows=NUMERIC)

_GROUP = "i_g = (i_bh % H // GROUP).to(tl.int64)"
_CAP_CHECK = '    check_positive("softcap", softcap, kernel)\n'
_BIAS = "p_bias + i_b * s_bb + i_h * s_bh + o_b"

MUTANTS = (
    _mutant(
        name="triton_heads_modulo_groups",
        edits=((_GROUP, "i_g = (i_bh % H % (H // GROUP)).to(tl.int64)"),),
        bug="B28",
        story="Query head h reads key head h mod G and not h // (H/G).",
        trigger="softmax:float16:normal:B1,H4,G2,M9,N17,D64,E64:-:contiguous:1",
    ),
    _mutant(
        name="triton_group_taken_as_a_power_of_two",
        edits=(
            (
                "heads, heads // k.shape[1], queries",
                "heads, 1 << ((heads // k.shape[1]).bit_length() - 1), queries",
            ),
        ),
        bug="B18",
        story="Groups of query heads are divided by shifting, as if their size were a power of two.",
        trigger="softmax:float16:normal:B1,H14,G2,M5,N17,D64,E64:-:contiguous:2",
    ),
    _mutant(
        name="triton_bias_batch_stride_ignored",
        edits=((_BIAS, "p_bias + i_h * s_bh + o_b"),),
        story="Every batch entry takes the bias of the first.",
        trigger="softmax:float16:normal:B2,H2,G1,M9,N17,D64,E64:bias=bhmn:contiguous:3",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_bias_of_the_key_head",
        edits=((_BIAS, "p_bias + i_b * s_bb + i_g * s_bh + o_b"),),
        story="The bias is that of the key head's index.",
        trigger="softmax:float16:normal:B1,H4,G2,M9,N17,D64,E64:bias=1hmn:contiguous:4",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_bias_row_of_the_tile",
        edits=(
            ("o_b = ((i_bos + o_m) * s_bm)[:, None]", "o_b = ((i_bos + o_m - i_m * BM) * s_bm)[:, None]"),
        ),
        story="Every tile of queries takes the bias of the first.",
        trigger="softmax:float16:normal:B1,H1,G1,M80,N33,D16,E16:bias=11mn:contiguous:5",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_sink_of_the_key_head",
        edits=(("tl.load(p_sinks + i_h * s_sink)", "tl.load(p_sinks + i_g * s_sink)"),),
        story="The sink is that of the key head's index.",
        trigger="softmax:float16:normal:B1,H4,G2,M9,N17,D64,E64:sinks:contiguous:6",
        shows=(*NUMERIC, "empty-row"),
    ),
    _mutant(
        name="triton_merge_sink_by_row",
        base=THREE,
        module=MERGE,
        edits=(("(o_r // M) % H * s_sink", "o_r % H * s_sink"),),
        story="The merge takes the sink of the row's number and not of its head.",
        trigger="softmax:float16:normal:B1,H4,G2,M9,N130,D64,E64:sinks:contiguous:7",
        shows=(*NUMERIC, "empty-row"),
    ),
    _mutant(
        name="triton_values_by_the_strides_of_keys",
        edits=(
            (
                "p_v += i_b * s_vb + i_g * s_vh + i_bos * s_vn",
                "p_v += i_b * s_kb + i_g * s_kh + i_bos * s_kn",
            ),
        ),
        bug="B28",
        story="The head of v is found by the strides of k, which differ where D and E do.",
        trigger="softmax:float16:normal:B2,H2,G2,M9,N17,D64,E32:-:contiguous:8",
    ),
    _mutant(
        name="triton_last_stride_assumed",
        module=TILES,
        edits=(("return ANY", "return UNIT"),),
        bug="B12",
        story="The last axis is taken for contiguous whatever its stride.",
        trigger="softmax:float16:normal:B1,H2,G1,M9,N17,D64,E64:-:columns:9",
    ),
    _mutant(
        name="triton_aligned_rows_assumed",
        module=TILES,
        edits=(("if rows_aligned and bases_aligned else UNIT", "if bases_aligned else UNIT"),),
        bug="B12",
        story="Strides are rounded down to multiples of 16 elements, which those of a width of 40 are not.",
        trigger="softmax:float16:normal:B1,H2,G1,M9,N17,D40,E40:-:contiguous:10",
    ),
    _mutant(
        name="triton_broadcast_heads_taken_as_dense",
        edits=(
            (
                "b, h, row, column = (0, 0, 0, 0) if x is None else x.stride()\n",
                (
                    "b, h, row, column = (0, 0, 0, 0) if x is None else x.stride()\n"
                    "        h = h or (row * keys if x is k or x is v else 0)\n"
                ),
            ),
        ),
        bug="B22",
        story="A stride of 0 between the heads of k and v is replaced by that of a dense tensor.",
        trigger="softmax:float16:normal:B1,H2,G2,M9,N17,D64,E64:-:broadcast:11",
    ),
    _mutant(
        name="triton_width_of_keys_unmasked",
        edits=(
            (
                "m_kd = (o_d < D)[:, None] & m_n[None, :] if PAD_D else m_n[None, :]",
                "m_kd = (o_d >= 0)[:, None] & m_n[None, :] if PAD_D else m_n[None, :]",
            ),
        ),
        bug="B48",
        story="Columns of k beyond D are read and multiplied by 0, NaN and infinities too.",
        trigger="softmax:float16:normal:B1,H2,G1,M9,N17,D40,E40:-:sliced:12",
    ),
    _mutant(
        name="triton_width_of_values_stored_unmasked",
        edits=(
            (
                "m_oe = m_q[:, None] & (o_e < E)[None, :] if PAD_E else m_q[:, None]",
                "m_oe = m_q[:, None] & (o_e >= 0)[None, :] if PAD_E else m_q[:, None]",
            ),
        ),
        bug="B13",
        story="Columns of the padded tile beyond E are stored over what follows.",
        trigger="softmax:float16:normal:B1,H2,G1,M9,N17,D40,E40:-:contiguous:13",
        shows=(*NUMERIC, *FAULT),
    ),
    _mutant(
        name="triton_rows_beyond_the_last_stored",
        edits=(("tl.store(p_lse + o_row, b_lse, mask=m_q)", "tl.store(p_lse + o_row, b_lse)"),),
        story="The log-sum-exp of padding rows is stored over those of the next head.",
        trigger="softmax:float16:normal:B1,H2,G1,M9,N17,D64,E64:return_lse:contiguous:14",
        shows=(*NUMERIC, *FAULT, "empty-row"),
    ),
    _mutant(
        name="triton_packed_rows_stored_from_the_start",
        edits=(("        i_row = i_h * M + i_bos\n", "        i_row = i_h * M\n"),),
        story="Every packed sequence stores its rows at the beginning of the packed row.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:cu_seqlens=11+22:contiguous:15",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_splits_overlap_between_batches",
        base=THREE,
        module=SOFTMAX,
        mechanism="race",
        edits=(
            (
                "0 if sinks is None else sinks.stride(0), batch * heads * queries,",
                "0 if sinks is None else sinks.stride(0), heads * queries,",
            ),
        ),
        story="The partial results of a split lie where those of the next batch entry do; the last one wins.",
        trigger="softmax:float16:normal:B2,H1,G1,M9,N130,D64,E64:-:contiguous:16",
        shows=(*NUMERIC, "nonfinite", "empty-row", "determinism"),
    ),
    _wrapper(
        name="triton_scale_from_the_width",
        edits=(
            (
                "score_scale=scale * bits if softcap is None",
                "score_scale=width**-0.5 * bits if softcap is None",
            ),
        ),
        story="The scale is always 1/√D, whatever is asked.",
        trigger="softmax:float16:uniform:B1,H1,G1,M9,N17,D64,E64:-:contiguous:17",
    ),
    _wrapper(
        name="triton_scale_for_the_value_width",
        edits=(
            (
                "score_scale=scale * bits if softcap is None",
                "score_scale=scale * (width / value_width) ** 0.5 * bits if softcap is None",
            ),
        ),
        story="The scale is corrected from D to the width of the values.",
        trigger="softmax:float16:normal:B1,H1,G1,M9,N17,D64,E32:-:contiguous:18",
    ),
    _wrapper(
        name="triton_softcap_lost_with_a_bias",
        edits=(
            (
                _CAP_CHECK,
                _CAP_CHECK + "    softcap = softcap if bias is None else None\n",
            ),
        ),
        story="With a bias the soft cap has no effect.",
        trigger="softmax:float16:normal:B1,H1,G1,M9,N17,D64,E64:softcap=2.0,bias=11mn:contiguous:19",
    ),
    _wrapper(
        name="triton_no_keys_unwritten",
        edits=(
            (
                "if o.numel() == 0 or longest == 0 or pieces == 0:",
                "if o.numel() == 0 or longest == 0 or pieces == 0 or keys == 0:",
            ),
        ),
        bug="B20",
        story="With no keys at all the output is memory that nobody wrote.",
        trigger="softmax:float16:normal:B1,H2,G1,M9,N0,D64,E64:-:contiguous:20",
        shows=("empty-row", "nonfinite"),
    ),
    _wrapper(
        name="triton_tiles_without_keys_unwritten",
        edits=(
            (
                "    m_q = o_m < n_q\n",
                (
                    "    m_q = o_m < n_q\n"
                    "    if RIGHT:\n"
                    "        m_q = m_q & (tl.minimum(i_m * BM + BM, n_q) + right > 0)\n"
                ),
            ),
        ),
        bug="B20",
        story="A tile of queries that sees no key leaves its rows unwritten.",
        trigger="softmax:float16:normal:B1,H1,G1,M80,N9,D16,E16:causal:contiguous:21",
        shows=("empty-row", "nonfinite"),
    ),
    _wrapper(
        name="triton_values_cleaned_in_place",
        edits=(
            (
                '    check_attention_tensors(q, k, v, "attention")\n',
                '    check_attention_tensors(q, k, v, "attention")\n    torch.nan_to_num_(v)\n',
            ),
        ),
        story="NaN and infinities are taken out of the caller's values.",
        trigger="softmax:float16:unseen-nonfinite:B1,H2,G1,M33,N33,D64,E64:causal:contiguous:22",
        shows=("mutation",),
    ),
    _wrapper(
        name="triton_strides_taken_before_contiguous",
        edits=(
            (
                "q, k, v, bias, sinks, cu_seqlens, o, lse, *strides,",
                "q, k.contiguous(), v.contiguous(), bias, sinks, cu_seqlens, o, lse, *strides,",
            ),
        ),
        story="k and v are made contiguous after their strides were taken.",
        trigger="softmax:float16:normal:B1,H2,G2,M9,N17,D64,E64:-:transposed:23",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
)
