"""Mutants of the torch flash attention: masks, tiles that are skipped, packed sequences, heads, arguments."""

from __future__ import annotations

from tests.quality.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_BASE = "attnproof.healthy_flash:tiled_attention"
_NUMERIC = ("certain", "probable-row", "probable-output", "bias")
# Rows that see too many or too few keys may see none, or one that is not finite.
_MASK = (*_NUMERIC, "nonfinite", "empty-row")
_TALL = "B1,H2,G1,M33,N65,D64,E64"


def _masking(name: str, old: str, new: str, story: str, trigger: str, bug: str = "") -> Mutant:
    return Mutant(name, _BASE, ((old, new),), "masking", bug, story, trigger, _MASK)


def _wrapper(
    name: str, old: str, new: str, story: str, trigger: str, bug: str = "", shows: tuple[str, ...] = _MASK
) -> Mutant:
    return Mutant(name, _BASE, ((old, new),), "wrapper", bug, story, trigger, shows)


MUTANTS: tuple[Mutant, ...] = (
    _masking(
        "torch_last_tile_of_later_rows",
        "min(rows.stop + self.right, length)",
        "min(rows.start + self.right + 1, length)",
        "The last key tile is taken from the first row of a query tile; what only later rows see is skipped.",
        f"softmax:float16:normal:{_TALL}:causal:contiguous:7",
        "B20",
    ),
    _masking(
        "torch_first_tile_of_later_rows",
        "max(rows.start + self.left, 0)",
        "max(rows.stop - 1 + self.left, 0)",
        "The first key tile under a window is taken from the last row of a query tile.",
        "softmax:bfloat16:normal:B1,H1,G1,M129,N129,D32,E32:window=33..:contiguous:3",
        "B20",
    ),
    _masking(
        "torch_causal_top_left",
        "high = shift if high is None else min(high, shift)",
        "high = 0 if high is None else min(high, 0)",
        "Causal masking is aligned with the top left corner.",
        f"softmax:float32:normal:{_TALL}:causal:contiguous:1",
        "B08",
    ),
    _masking(
        "torch_causal_lost_under_window",
        "if causal:",
        "if causal and window is None:",
        "A window replaces the causal mask instead of narrowing it.",
        "softmax:float16:normal:B1,H2,G2,M65,N65,D64,E64:causal,window=2..5:contiguous:2",
        "B26",
    ),
    _masking(
        "torch_window_left_short",
        "(j >= i + self.left)",
        "(j > i + self.left)",
        "The window's left end is one key short.",
        "softmax:float32:normal:B2,H1,G1,M31,N31,D16,E16:window=3..:contiguous:5",
    ),
    _masking(
        "torch_window_from_the_row",
        "low = None if left is None else shift - left",
        "low = None if left is None else -left",
        "The window's left end counts from the row's index, not from its position M - N rows later.",
        f"softmax:float16:normal:{_TALL}:window=3..:contiguous:4",
        "B08",
    ),
    _masking(
        "torch_window_right_zero_is_none",
        "high = None if right is None else shift + right",
        "high = None if not right else shift + right",
        "A window that ends at the query itself, right = 0, is read as no limit.",
        "softmax:bfloat16:normal:B1,H1,G1,M33,N33,D16,E16:window=9..0:contiguous:6",
    ),
    _masking(
        "torch_packed_causal_unbounded",
        "if cu_seqlens is None:",
        "if cu_seqlens is None or whole.band.right == 0:",
        "Under a causal mask the boundaries of packed sequences are ignored.",
        "softmax:float16:normal:B1,H2,G1,M65,N65,D64,E64:causal,cu_seqlens=21+0+44:contiguous:7",
    ),
    _masking(
        "torch_empty_sequence_ends_the_batch",
        "        piece = slice(start, stop)\n",
        "        if start == stop:\n            return\n        piece = slice(start, stop)\n",
        "A packed sequence of length 0 is taken for the end: the rows of later ones are never written.",
        "softmax:float32:normal:B1,H1,G1,M33,N33,D16,E16:cu_seqlens=11+0+22:contiguous:8",
        "B20",
    ),
    _masking(
        "torch_straddling_tile_unmasked",
        "if self.right is not None:\n            seen = seen &",
        "if self.right is not None and columns.start >= rows.start + self.right:\n            seen = seen &",
        "The causal mask is applied to tiles that start past the diagonal, not to those that it crosses.",
        f"softmax:float16:normal:{_TALL}:causal:contiguous:9",
        "B59",
    ),
    _masking(
        "torch_single_last_key_dropped",
        "high = length if self.right is None",
        "high = length - (length % _TILE_N == 1 and length > 1) if self.right is None",
        "A last tile with one key in it is not visited.",
        "softmax:bfloat16:normal:B1,H2,G1,M5,N65,D64,E64:-:contiguous:3",
        "B22",
    ),
    _masking(
        "torch_packed_bias_from_the_start",
        "whole.bias[:, :, piece, piece]",
        "whole.bias[:, :, : stop - start, : stop - start]",
        "Every packed sequence takes the bias of the first positions of the packed row.",
        "softmax:float32:normal:B1,H1,G1,M33,N33,D16,E16:bias=11mn,cu_seqlens=11+0+22:contiguous:2",
    ),
    _masking(
        "torch_bias_of_the_first_query_tile",
        "t.bias[:, :, rows.start : rows.stop, columns.start : columns.stop]",
        "t.bias[:, :, : len(rows), columns.start : columns.stop]",
        "The offset of the query tile is missing where the bias is read: rows from 64 on get that of row 0.",
        "softmax:float16:normal:B1,H1,G1,M65,N33,D16,E16:bias=bhmn:contiguous:1",
    ),
    _wrapper(
        "torch_heads_modulo_groups",
        "device=q.device) // group",
        "device=q.device) % k.shape[1]",
        "Query head h reads key head h mod G instead of h // (H/G).",
        "softmax:float16:normal:B1,H4,G2,M17,N33,D16,E16:-:contiguous:1",
        "B28",
    ),
    _wrapper(
        "torch_group_by_shift",
        "device=q.device) // group",
        "device=q.device).bitwise_right_shift(group.bit_length() - 1).clamp(max=k.shape[1] - 1)",
        "The group is divided by with a shift, which is right for powers of two only.",
        "softmax:float32:normal:B1,H6,G2,M17,N33,D16,E16:-:contiguous:1",
        "B18",
    ),
    _wrapper(
        "torch_bias_of_the_groups_first_head",
        "bias = bias.expand(batch, heads, queries, keys)",
        "bias = bias.expand(batch, heads, queries, keys)[:, head * group]",
        "All query heads of a group get the bias of its first head.",
        "softmax:bfloat16:normal:B1,H4,G2,M17,N33,D16,E16:bias=bhmn:contiguous:1",
        "B50",
    ),
    _wrapper(
        "torch_sinks_by_key_head",
        "sinks.float(),",
        "sinks.float()[head],",
        "Sinks are indexed by the key/value head.",
        "softmax:float16:normal:B1,H4,G2,M17,N5,D16,E16:sinks:contiguous:1",
        "B50",
    ),
    _wrapper(
        "torch_packed_lse_at_local_rows",
        "lse[:, :, into] = lse_tile",
        "lse[:, :, rows.start : rows.stop] = lse_tile",
        "The log-sum-exp of packed sequences is written at rows counted from each sequence's own start.",
        "softmax:float16:normal:B1,H2,G1,M33,N33,D16,E16:cu_seqlens=11+0+22,return_lse:contiguous:4",
        "B32",
    ),
    _wrapper(
        "torch_scale_from_the_width",
        "        scale=scale,",
        "        scale=q.shape[3] ** -0.5,",
        "The scale that is passed is ignored in favour of 1/sqrt(D).",
        "softmax:float32:uniform:B1,H2,G1,M33,N65,D64,E64:-:contiguous:5",
        "B38",
    ),
    _wrapper(
        "torch_wide_values_unwritten",
        "o[:, :, into] = o_tile.to(q.dtype)",
        "o[:, :, into, :128] = o_tile.to(q.dtype)[..., :128]",
        "Values wider than 128 columns need a second pass, which is never made.",
        "softmax:float16:normal:B1,H1,G1,M5,N33,D64,E256:-:contiguous:2",
        "B32",
    ),
    _wrapper(
        "torch_lse_in_bits",
        "lse = m + torch.log(total)",
        "lse = m + torch.log2(total)",
        "The logarithm of the sum is taken to base 2 while the maximum is in nats.",
        "softmax:bfloat16:normal:B1,H1,G1,M17,N33,D16,E16:return_lse:contiguous:2",
        "",
        _NUMERIC,
    ),
    _wrapper(
        "torch_lse_without_the_sink",
        "lse = m + torch.log(total)",
        "lse = m + torch.log(total if t.sinks is None else total - torch.exp(t.sinks[:, None] - m))",
        "The sink is part of the normaliser but missing from the log-sum-exp that is returned.",
        "softmax:float32:normal:B1,H2,G1,M17,N9,D16,E16:sinks,return_lse:contiguous:2",
        "B15",
        (*_NUMERIC, "nonfinite"),
    ),
)
