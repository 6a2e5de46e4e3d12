"""Mutants of the Triton kernels whose rows see other keys than they should."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import ARGUMENTS, FAULT, NUMERIC, SOFTMAX, THREE, WHOLE

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base=WHOLE, mechanism="masking", bug="", shows=NUMERIC)

_CAUSAL = "m_s = m_s & (i_n + o_n[None, :] <= o_m[:, None] + right)"

MUTANTS = (
    _mutant(
        name="triton_padding_joins_the_sum",
        edits=(("m_s = m_n[None, :]\n", "m_s = (o_n >= 0)[None, :]\n"),),
        bug="B16",
        story="Lanes beyond the last key have score 0 and join the normaliser.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:1",
        shows=(*NUMERIC, *FAULT, "empty-row"),
    ),
    _mutant(
        name="triton_padding_joins_unless_masked",
        edits=(
            (
                "m_s = m_n[None, :]\n",
                "m_s = m_n[None, :] if (LEFT or RIGHT or p_bias is not None) else (o_n >= 0)[None, :]\n",
            ),
        ),
        bug="B27",
        story="Lanes beyond the last key are masked with a causal mask, a window or a bias, and not without.",
        trigger="softmax:bfloat16:normal:B1,H2,G1,M17,N33,D64,E64:-:contiguous:2",
    ),
    _mutant(
        name="triton_keys_loaded_unmasked",
        edits=(
            (
                "b_k = loaded(p_k + i_n * s_kn + o_k, m_kd, EDGE or PAD_D)",
                "b_k = tl.load(p_k + i_n * s_kn + o_k)",
            ),
        ),
        bug="B09",
        story="Keys are loaded without a mask: what lies beyond the last one is read and thrown away.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N33,D64,E64:-:contiguous:3",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _mutant(
        name="triton_causal_hides_the_diagonal",
        edits=((_CAUSAL, "m_s = m_s & (i_n + o_n[None, :] < o_m[:, None] + right)"),),
        story="A causal query does not see the key at its own position.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:causal:contiguous:4",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_causal_sees_one_more",
        edits=((_CAUSAL, "m_s = m_s & (i_n + o_n[None, :] <= o_m[:, None] + right + 1)"),),
        story="A causal query sees the key after its own position, except at the end of a tile.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:causal:contiguous:5",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_causal_by_tile",
        edits=((_CAUSAL, "m_s = m_s & (i_n + 0 * o_n[None, :] <= o_m[:, None] + right)"),),
        bug="B59",
        story="A tile of keys is hidden only where it begins past the diagonal, not where it straddles it.",
        trigger="softmax:bfloat16:normal:B1,H1,G1,M48,N48,D64,E64:causal:contiguous:6",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_causal_top_left",
        module=ARGUMENTS,
        edits=(('diagonal = shift if causal_alignment == "bottom-right" else 0', "diagonal = 0"),),
        bug="B08",
        story="The causal diagonal starts at the top left whatever the lengths are.",
        trigger="softmax:float16:normal:B1,H2,G1,M12,N33,D64,E64:causal:contiguous:7",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_causal_row_within_its_tile",
        edits=((_CAUSAL, "m_s = m_s & (i_n + o_n[None, :] <= (o_m - i_m * BM)[:, None] + right)"),),
        story="The causal mask takes a query's place in its tile for its place in the sequence.",
        trigger="softmax:float16:normal:B1,H1,G1,M80,N80,D16,E16:causal:contiguous:8",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_causal_lost_under_window",
        module=ARGUMENTS,
        edits=(("    if causal:\n", "    if causal and window is None:\n"),),
        bug="B26",
        story="With a window the causal flag has no effect.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:causal,window=9..:contiguous:9",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_window_left_short",
        module=ARGUMENTS,
        edits=(("shift - window[0]", "shift - window[0] + 1"),),
        story="The window ends one key early on the left.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:window=17..:contiguous:10",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_window_right_long",
        module=ARGUMENTS,
        edits=(("shift + window[1]", "shift + window[1] + 1"),),
        story="The window ends one key late on the right.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:window=..8:contiguous:11",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_window_without_offset",
        module=ARGUMENTS,
        edits=(("shift - window[0]", "-window[0]"), ("shift + window[1]", "window[1]")),
        story="The window is centred on the query's index and not on its position i + N − M.",
        trigger="softmax:float16:normal:B1,H2,G1,M11,N33,D64,E64:window=17..2:contiguous:12",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_window_right_wins_over_causal",
        module=ARGUMENTS,
        edits=(
            (
                "right = diagonal if right is None else min(right, diagonal)",
                "right = diagonal if right is None else right",
            ),
        ),
        story="Where a window has a right side, a causal query sees that far into the future.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:causal,window=9..4:contiguous:13",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_last_key_tile_skipped",
        edits=(("(hi + BN - 1) // BN", "tl.maximum(hi // BN, 1)"),),
        bug="B25",
        story="The number of key tiles is rounded down: the last, partial tile is skipped.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N97,D64,E64:-:contiguous:14",
    ),
    _mutant(
        name="triton_diagonal_tile_taken_as_whole",
        edits=(
            (
                "full_hi = tl.minimum(tl.maximum(i_first + right + 1, 0), n_k)",
                "full_hi = tl.minimum(tl.maximum(i_first + right + 1, 0) + BN - 1, n_k)",
            ),
        ),
        bug="B02",
        story="The first tile on the causal diagonal is taken for one that every row sees whole.",
        trigger="softmax:float16:normal:B1,H1,G1,M64,N64,D32,E32:causal:contiguous:15",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_window_edge_tile_taken_as_whole",
        edits=(
            (
                "f0 = tl.minimum(tl.maximum((full_lo + BN - 1) // BN, t0), t1)",
                "f0 = tl.minimum(tl.maximum(full_lo // BN, t0), t1)",
            ),
        ),
        bug="B01",
        story="The tile on the left edge of a window is taken for one that every row sees whole.",
        trigger="softmax:float16:normal:B1,H1,G1,M70,N140,D16,E16:window=90..:contiguous:16",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_causal_range_of_a_middle_row",
        edits=(
            (
                "hi = tl.minimum(tl.maximum(i_last + right + 1, 0), n_k)",
                "hi = tl.minimum(tl.maximum(i_first + BM // 2 + right + 1, 0), n_k)",
            ),
        ),
        story="Range of key tiles is that of a row in the middle of the query tile; later rows lose keys.",
        trigger="softmax:float32:normal:B1,H1,G1,M40,N50,D64,E64:causal:contiguous:17",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_packed_sees_what_follows",
        edits=(("        n_k = n_q\n", "        n_k = (M - i_bos).to(tl.int32)\n"),),
        story="A packed sequence sees the keys of the sequences after it, unless a causal mask hides them.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:cu_seqlens=11+22:contiguous:18",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_packed_keys_from_the_start",
        edits=(("p_k += i_b * s_kb + i_g * s_kh + i_bos * s_kn", "p_k += i_b * s_kb + i_g * s_kh"),),
        story="Every packed sequence takes the keys of the row's beginning.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:causal,cu_seqlens=11+22:contiguous:19",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_packed_bias_at_local_positions",
        edits=(
            (
                "o_b = ((i_bos + o_m) * s_bm)[:, None] + ((i_bos + i_n + o_n) * s_bn)[None, :]",
                "o_b = (o_m * s_bm)[:, None] + ((i_n + o_n) * s_bn)[None, :]",
            ),
        ),
        story="A packed sequence takes the bias of the first one.",
        trigger="softmax:float16:normal:B1,H2,G1,M33,N33,D64,E64:bias=11mn,cu_seqlens=11+22:contiguous:20",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_bias_lost_on_whole_tiles",
        edits=(
            ("f1 = f0  # a bias may mask anywhere", "f1 = f1"),
            (
                "for EDGE in tl.static_range(0 if p_bias is None else 1, 2):",
                "for EDGE in tl.static_range(2):",
            ),
        ),
        story="A bias is added on tiles under a mask only, not on those that all rows see.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N65,D64,E64:bias=11mn:contiguous:21",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_bias_infinity_is_finite",
        edits=(
            (
                "                    m_s = m_s & (b_b != -INF)\n                    b_s += b_b",
                "                    b_s += tl.maximum(b_b, -8.0)",
            ),
        ),
        story="A bias is clamped from below, so that −inf only makes a key unlikely.",
        trigger="softmax:bfloat16:masked:B1,H2,G1,M17,N33,D64,E64:bias=b1mn:contiguous:22",
        shows=(*NUMERIC, "nonfinite", "empty-row"),
    ),
    _mutant(
        name="triton_split_loses_a_tile",
        base=THREE,
        module=SOFTMAX,
        edits=(
            (
                "(i_s + 1) * split_tiles), t0)",
                "(i_s + 1) * split_tiles - (split_tiles > 1).to(tl.int32)), t0)",
            ),
        ),
        story="A split of several tiles of keys stops one tile before the next split begins.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N330,D64,E64:-:contiguous:23",
        shows=(*NUMERIC, "empty-row"),
    ),
    _mutant(
        name="triton_split_count_rounded_down",
        base=THREE,
        module=SOFTMAX,
        edits=(
            (
                "parts = max(1, triton.cdiv(k.shape[2], tiles.block_n * split_tiles))",
                "parts = max(1, k.shape[2] // (tiles.block_n * split_tiles))",
            ),
        ),
        bug="B25",
        story="The number of splits is rounded down: the keys of the last, shorter one are left out.",
        trigger="softmax:float16:normal:B1,H1,G1,M16,N150,D64,E64:-:contiguous:24",
    ),
)
