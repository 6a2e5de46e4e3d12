"""Mutants of scaled-head attention: windows and their ragged tails, packing of heads, and the shares of a
window's gradient.
"""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, NUMERIC

__all__ = ["MUTANTS"]

_mutant = partial(Mutant, base="attnproof.kernels.scaled_head:attention", bug="", shows=NUMERIC)

_COUNT = "tl.where(m_w, tl.minimum(pool, N - tl.where(m_w, o_w, 0) * pool), 1)"
_MEAN = "b_y = tl.div_rn(b_sum, tl.zeros_like(b_sum) + b_count[:, None])"
_SHARE = "b_dx += tl.div_rn(b_g, tl.zeros_like(b_g) + b_count[:, None])"
_POSITION = "o_n = tl.where(m_w, o_w, 0) * pool + i_r "

MUTANTS = (
    _mutant(
        name="triton_scaled_head_ragged_window_by_pool",
        mechanism="masking",
        edits=((_COUNT, "tl.where(m_w, pool, 1)"),),
        bug="B25",
        story="The last, shorter window is divided by the width of a whole one.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+4:contiguous:1",
    ),
    _mutant(
        name="triton_scaled_head_ragged_window_left_out",
        mechanism="masking",
        edits=(("tuple(-(-keys // p) for p in pools)", "tuple(keys // p for p in pools)"),),
        bug="B25",
        story="The last, shorter window is left out.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+4:contiguous:2",
        shows=(*NUMERIC, *FAULT, "nonfinite", "determinism"),
    ),
    _mutant(
        name="triton_scaled_head_sums_in_place_of_means",
        mechanism="numerics",
        edits=((_MEAN, "b_y = b_sum + 0.0 * b_count[:, None]"),),
        story="Windows are summed, not averaged.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+3:contiguous:3",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _mutant(
        name="triton_scaled_head_first_of_each_window",
        mechanism="numerics",
        edits=(("for i_r in range(pool):", "for i_r in range(1):"), (_COUNT, "tl.where(m_w, 1, 1)")),
        story="The first key and value of a window stand for all of it.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+3:contiguous:4",
    ),
    _mutant(
        name="triton_scaled_head_windows_shifted",
        mechanism="masking",
        edits=((_POSITION, "o_n = tl.where(m_w, o_w, 0) * pool + i_r + 1 "),),
        story="Windows begin one position late.",
        trigger="scaled_head:bfloat16:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+3:contiguous:5",
    ),
    _mutant(
        name="triton_scaled_head_heads_in_order_of_pools",
        mechanism="wrapper",
        edits=(("[outputs[h] for h in range(len(pool))]", "list(outputs.values())"),),
        bug="B28",
        story="Heads come back in the order of their windows' widths.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M16,N33,D16,E16:pool=3+2:contiguous:6",
    ),
    _mutant(
        name="triton_scaled_head_batches_overlap",
        mechanism="race",
        edits=(("((i_b * T + tl.load(p_start + i_h) + o_w) * D)", "((tl.load(p_start + i_h) + o_w) * D)"),),
        bug="B49",
        story="The windows of all batch entries are stored where those of the first belong.",
        trigger="scaled_head:float16:normal:B2,H2,G1,M16,N33,D16,E16:pool=2+3:contiguous:7",
        shows=(*NUMERIC, "nonfinite", "determinism"),
    ),
    _mutant(
        name="triton_scaled_head_pool_of_the_key_head",
        mechanism="pointers",
        edits=(("tl.load(p_pool + i_h)\n    o_w", "tl.load(p_pool + i_h // GROUP)\n    o_w"),),
        bug="B28",
        story="Query heads pool by the width that belongs to the number of their key head.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+3:contiguous:8",
        shows=(*NUMERIC, *FAULT, "nonfinite", "determinism"),
    ),
    _mutant(
        name="triton_scaled_head_means_in_bfloat16",
        mechanism="accuracy",
        accuracy_only=True,
        edits=(("tl.store(p_y + o_y, b_y.to(", "tl.store(p_y + o_y, b_y.to(tl.bfloat16).to("),),
        story="Averages are rounded to bfloat16, in every dtype.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M65,N65,D32,E32:pool=2+3:contiguous:9",
    ),
    _mutant(
        name="triton_scaled_head_gradient_not_shared",
        mechanism="gradient",
        edits=((_SHARE, "b_dx += b_g"),),
        story="Every position gets the whole gradient of its window's mean.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+3,cotangents=normal:contiguous:10",
    ),
    _mutant(
        name="triton_scaled_head_ragged_gradient_by_pool",
        mechanism="gradient",
        edits=(("tl.where(m_n, tl.minimum(pool, N - o_w * pool), 1)", "tl.where(m_n, pool, 1)"),),
        bug="B47",
        story="The gradient of the last, shorter window is shared as if it were whole.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+4,cotangents=normal:contiguous:11",
    ),
    _mutant(
        name="triton_scaled_head_gradient_of_the_first_head",
        mechanism="gradient",
        edits=(("for i_group in range(GROUP):", "for i_group in range(1):"),),
        bug="B28",
        story="dK and dV are those of the first query head of the group.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+3,cotangents=normal:contiguous:12",
    ),
    _mutant(
        name="triton_scaled_head_gradient_of_other_groups",
        mechanism="gradient",
        edits=(("i_h = i_bg % G * GROUP + i_group", "i_h = i_group * G + i_bg % G"),),
        bug="B28",
        story="dK and dV are summed over heads g, g + G, …, not over those of the group.",
        trigger="scaled_head:float16:normal:B1,H4,G2,M16,N33,D16,E16:pool=2+2+1+1,cotangents=normal:contiguous:13",
    ),
    _mutant(
        name="triton_scaled_head_gradient_to_the_first_position",
        mechanism="gradient",
        edits=((_SHARE, "b_dx += tl.where((o_n % pool == 0)[:, None], b_g, 0.0)"),),
        story="A window's first position gets all of its gradient.",
        trigger="scaled_head:float32:normal:B1,H2,G1,M16,N33,D16,E16:pool=2+3,cotangents=normal:contiguous:14",
    ),
    _mutant(
        name="triton_scaled_head_gradient_of_the_first_entry",
        mechanism="gradient",
        edits=(("p_g += i_bg // G * s_gb", "p_g += 0 * s_gb"),),
        bug="B49",
        story="Every batch entry takes the gradients of the first one's windows.",
        trigger="scaled_head:float16:normal:B2,H2,G1,M16,N33,D16,E16:pool=2+3,cotangents=normal:contiguous:15",
    ),
    _mutant(
        name="triton_scaled_head_shares_in_bfloat16",
        mechanism="accuracy",
        accuracy_only=True,
        edits=((_SHARE, f"{_SHARE}\n        b_dx = b_dx.to(tl.bfloat16).to(tl.float32)"),),
        story="Shares of a gradient are rounded to bfloat16 head by head, in every dtype.",
        trigger="scaled_head:float16:normal:B1,H2,G1,M65,N65,D32,E32:pool=2+3,cotangents=normal:contiguous:16",
    ),
)
