"""Mutants of attention on batch-normalised queries and keys: statistics, β, and the paths of gradients."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, NUMERIC

__all__ = ["MUTANTS"]

_formula = partial(
    Mutant, base="attnproof.kernels.batch_normalised:attention", mechanism="numerics", bug="", shows=NUMERIC
)
_gradient = partial(_formula, mechanism="gradient")

_LENGTH = "total = tl.maximum(N, 1).to(tl.float32)\n    # [BN, BD]: each lane"
_CENTRED = "        b_x = tl.where(m_x, b_x.to(tl.float32) - b_mean[None, :], 0.0)\n"
_SQUARES = "b_square += b_x * b_x"
_VARIANCE = "tl.div_rn(tl.sum(b_square, 0), total) - b_rest * b_rest"
_KEYS = "p_x += i_bg // G * s_xb + i_bg % G * s_xh"
_ROOT = "b_s = tl.sqrt_rn(b_variance + eps)"
_MEAN = "tl.store(p_mean + o_y, b_mean, mask=m_d)"
_BETA = "b_beta = tl.load(p_beta + i_bh % H * s_beta)"
_MEAN_PATH = " + (b_dmean / total)[None, :]"
_VARIANCE_PATH = "b_dk += tl.div_rn(b_c * b_slope[None, :], tl.zeros_like(b_c) + b_over_q[None, :])"
_GROUP_BETA = "b_sum = b_sum * tl.load(p_beta + (i_bg % G * GROUP + i_group) * s_beta).to(tl.float32)"
_QUERY_DIVISION = "b_dq = tl.div_rn(b_g, tl.zeros_like(b_g) + b_over[None, :])"
_OPERANDS = "((q, over_q, beta), (k, over_k, None))"

_ONE_VARIANCE = """\
b_count = tl.sum(m_d.to(tl.float32), 0)
        b_variance = b_variance * 0 + tl.sum(tl.where(m_d, b_variance, 0.0), 0) / b_count
"""

MUTANTS = (
    _formula(
        name="triton_batch_normalised_variance_by_squares",
        edits=(
            (_CENTRED, f"        b_square += b_x.to(tl.float32) * b_x.to(tl.float32)\n{_CENTRED}"),
            (f"        {_SQUARES}\n", ""),
            (_VARIANCE, _VARIANCE.replace("b_rest * b_rest", "(b_mean + b_rest) * (b_mean + b_rest)")),
        ),
        story="The variance is E[k²] − E[k]².",
        trigger="batch_normalised:float32:far-keys:B1,H1,G1,M17,N65,D16,E16:-:contiguous:1",
    ),
    _formula(
        name="triton_batch_normalised_variance_unbiased",
        edits=(
            (_VARIANCE, "tl.div_rn(tl.sum(b_square, 0), tl.maximum(total - 1.0, 1.0)) - b_rest * b_rest"),
        ),
        story="The variance is divided by N − 1.",
        trigger="batch_normalised:float16:normal:B1,H1,G1,M17,N7,D16,E16:-:contiguous:2",
    ),
    _formula(
        name="triton_batch_normalised_eps_outside_the_root",
        edits=((_ROOT, "b_s = tl.sqrt_rn(b_variance) + eps"),),
        story="eps is added to s, not to the variance.",
        trigger="batch_normalised:float32:normal:B1,H1,G1,M17,N33,D16,E16:-:contiguous:3",
    ),
    _formula(
        name="triton_batch_normalised_without_eps",
        edits=((_ROOT, "b_s = tl.maximum(tl.sqrt_rn(b_variance), 1e-12)"),),
        story="s is at least 10⁻¹² in place of eps in the root.",
        trigger="batch_normalised:float32:normal:B1,H1,G1,M17,N33,D16,E16:-:contiguous:4",
        shows=(*NUMERIC, "nonfinite"),
    ),
    _formula(
        name="triton_batch_normalised_by_the_variance",
        edits=((_ROOT, "b_s = b_variance + eps"),),
        story="Queries and keys are divided by the variance, not by its root.",
        trigger="batch_normalised:float16:normal:B1,H1,G1,M17,N33,D16,E16:-:contiguous:5",
    ),
    _formula(
        name="triton_batch_normalised_one_variance_for_channels",
        edits=((_ROOT, f"{_ONE_VARIANCE}        {_ROOT}"),),
        bug="B55",
        story="The variance is averaged over the channels of a tile, 16 of them, as well.",
        trigger="batch_normalised:float16:outliers:B1,H1,G1,M17,N33,D16,E16:-:contiguous:23",
    ),
    _formula(
        name="triton_batch_normalised_mean_in_the_keys_dtype",
        edits=((_MEAN, _MEAN.replace("b_mean,", "b_mean.to(p_x.dtype.element_ty).to(tl.float32),")),),
        story="The mean is stored in the keys' dtype.",
        trigger="batch_normalised:bfloat16:far-keys:B1,H1,G1,M17,N33,D16,E16:-:contiguous:24",
    ),
    _formula(
        name="triton_batch_normalised_mean_of_the_padded_length",
        edits=((_LENGTH, _LENGTH.replace("tl.maximum(N, 1)", "tl.maximum((N + BN - 1) // BN * BN, 1)")),),
        story="Sums over the keys are divided by N filled up to a tile.",
        trigger="batch_normalised:float16:off-centre:B1,H1,G1,M17,N33,D16,E16:-:contiguous:6",
    ),
    _formula(
        name="triton_batch_normalised_variance_of_padded_keys",
        edits=((_CENTRED, _CENTRED.replace("m_x, ", "m_d[None, :], ")),),
        story="Keys of zeros that fill up a tile count in the variance.",
        trigger="batch_normalised:float16:off-centre:B1,H1,G1,M17,N33,D16,E16:-:contiguous:7",
    ),
    _formula(
        name="triton_batch_normalised_statistics_of_the_first_tile",
        edits=((f"    {_LENGTH}", f"    N = tl.minimum(N, BN)\n    {_LENGTH}"),),
        story="Mean and variance are those of the first 64 keys.",
        trigger="batch_normalised:float16:normal:B1,H1,G1,M17,N129,D16,E16:-:contiguous:8",
    ),
    _formula(
        name="triton_batch_normalised_statistics_of_the_first_entry",
        edits=((_KEYS, "p_x += i_bg % G * s_xh"),),
        story="All batch entries take the statistics of the first one.",
        trigger="batch_normalised:float16:normal:B2,H1,G1,M17,N33,D16,E16:-:contiguous:9",
    ),
    _formula(
        name="triton_batch_normalised_statistics_of_the_first_head",
        edits=((_KEYS, "p_x += i_bg // G * s_xb"),),
        story="All heads take the statistics of the first one.",
        trigger="batch_normalised:float16:normal:B1,H2,G2,M17,N33,D16,E16:-:contiguous:10",
    ),
    _formula(
        name="triton_batch_normalised_beta_ignored",
        edits=((_OPERANDS, _OPERANDS.replace("beta", "None")),),
        story="β is taken for 1.",
        trigger="batch_normalised:float16:off-centre:B1,H2,G1,M17,N33,D16,E16:beta:contiguous:11",
    ),
    _formula(
        name="triton_batch_normalised_beta_of_the_group",
        edits=((_BETA, _BETA.replace("i_bh % H", "i_bh % H // GROUP * GROUP")),),
        story="All query heads of a group take β of its first.",
        trigger="batch_normalised:float16:off-centre:B1,H2,G1,M17,N33,D16,E16:beta:contiguous:12",
    ),
    _formula(
        name="triton_batch_normalised_queries_not_centred",
        edits=((_OPERANDS, _OPERANDS.replace("beta", "q.new_zeros(q.shape[1])")),),
        story="Only keys are centred, which changes nothing (theory PD-2): queries are not.",
        trigger="batch_normalised:float16:off-centre:B1,H2,G1,M17,N33,D16,E16:-:contiguous:13",
    ),
    _formula(
        name="triton_batch_normalised_assumes_contiguous",
        mechanism="pointers",
        edits=(("x, mean, rest, over, shift, y, *x.stride()", "x, mean, rest, over, shift, y, *y.stride()"),),
        bug="B12",
        story="Queries and keys are read as if they were contiguous; the statistics are not.",
        trigger="batch_normalised:float16:normal:B1,H2,G1,M17,N33,D16,E16:-:transposed:22",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _gradient(
        name="triton_batch_normalised_keys_without_the_mean",
        edits=((_MEAN_PATH, ""),),
        story="dk lacks the path through the mean.",
        trigger="batch_normalised:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:14",
    ),
    _gradient(
        name="triton_batch_normalised_keys_without_the_variance",
        edits=((_VARIANCE_PATH, f"b_dk += 0.0 * {_VARIANCE_PATH[8:]}"),),
        story="dk lacks the path through the variance.",
        trigger="batch_normalised:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:15",
    ),
    _gradient(
        name="triton_batch_normalised_variance_path_halved",
        edits=(("tl.div_rn(-2 * tl.sum(b_sum, 0), total)", "tl.div_rn(-tl.sum(b_sum, 0), total)"),),
        story="The path of dk through the variance counts the keys' side alone, not the queries'.",
        trigger="batch_normalised:float16:normal:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:16",
    ),
    _gradient(
        name="triton_batch_normalised_mean_path_without_beta",
        edits=((_GROUP_BETA, "b_sum = b_sum * 1.0"),),
        story="The path of dk through the mean lacks β.",
        trigger="batch_normalised:float16:normal:B1,H2,G1,M17,N33,D16,E16:beta,cotangents=normal:contiguous:17",
    ),
    _gradient(
        name="triton_batch_normalised_mean_path_of_the_first_head",
        edits=(("for i_group in range(GROUP):", "for i_group in range(1):"),),
        bug="B28",
        story="The path of dk through the mean holds the queries of the group's first head alone.",
        trigger="batch_normalised:float16:normal:B1,H2,G1,M17,N33,D16,E16:cotangents=normal:contiguous:18",
    ),
    _gradient(
        name="triton_batch_normalised_queries_not_divided",
        edits=((_QUERY_DIVISION, "b_dq = b_g"),),
        story="dq is that of the normalised query: it lacks the division by s.",
        trigger="batch_normalised:float32:off-centre:B1,H1,G1,M17,N33,D16,E16:cotangents=normal:contiguous:19",
    ),
    _gradient(
        name="triton_batch_normalised_beta_of_the_first_entry",
        edits=(("for i_b in range(B):", "for i_b in range(1):"),),
        bug="B51",
        story="dβ is that of the first batch entry.",
        trigger="batch_normalised:float16:off-centre:B2,H2,G1,M17,N33,D16,E16:beta,cotangents=normal:contiguous:20",
    ),
    _gradient(
        name="triton_batch_normalised_beta_of_the_wrong_sign",
        edits=(("b_sum -= b_mean * tl.load(", "b_sum += b_mean * tl.load("),),
        story="dβ has the wrong sign.",
        trigger="batch_normalised:float16:off-centre:B1,H2,G1,M17,N33,D16,E16:beta,cotangents=normal:contiguous:21",
    ),
)
