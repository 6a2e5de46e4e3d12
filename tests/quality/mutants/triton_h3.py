"""Mutants of H3: the filter of the keys, weights by lag, skip terms, and their gradients."""

from __future__ import annotations

from functools import partial

from tests.quality.mutants.mutant import Mutant
from tests.quality.mutants.triton_bases import FAULT, H3, H3_COMPOSED, NUMERIC

__all__ = ["MUTANTS"]

_KERNELS = "attnproof.kernels.h3_backward"
_WRAPPER = "attnproof.kernels.h3"
_CONVOLUTION = "attnproof.kernels.ssm_convolution"

_output = partial(
    Mutant, base=H3, module=_KERNELS, mechanism="numerics", bug="", shows=(*NUMERIC, "nonfinite")
)
_gradient = partial(_output, mechanism="gradient")
_wrapper = partial(_output, module=_WRAPPER, mechanism="wrapper")
_backward = partial(_gradient, module=_WRAPPER)

_TRIGGER = "h3:float32:normal:B1,H2,N20,D4,E5,T3,P4"
_LONG = "h3:float32:normal:B1,H2,N40,D4,E5,T3,P4"

_LAGGED = "o_x = o_n + i_t if REVERSE else o_n - i_t"
_ROWS = "i_first, i_stop = i_m * BM, N"
_DIAGONAL = "w = torch.cat((w[:, :1] + d_diag.float()[:, None], w[:, 1:]), 1)"
_KEYS = "filtered_keys = Filter.apply(k, taps.contiguous(), skip)"
_AS_IF_CONTIGUOUS = "heads * length * do.shape[3], length * do.shape[3], do.shape[3], 1"
_EACH = "x.float()[:, None].expand(heads, channels, *x.shape[1:]).flatten(0, 1)"

MUTANTS = (
    _output(
        name="triton_h3_taps_reversed",
        edits=(("* T + i_t, mask=m_d", "* T + (T - 1 - i_t), mask=m_d"),),
        story="The first tap belongs to the earliest key, as a convolution of torch has it.",
        trigger=f"{_TRIGGER}:skip:contiguous:1",
    ),
    _output(
        name="triton_h3_taps_one_key_early",
        edits=((_LAGGED, "o_x = o_n + i_t + 1 if REVERSE else o_n - i_t - 1"),),
        story="The first tap belongs to the key before.",
        trigger=f"{_TRIGGER}:skip:contiguous:2",
    ),
    _output(
        name="triton_h3_taps_beyond_the_eighth",
        edits=(("    for i_t in range(T):\n", "    for i_t in range(tl.minimum(T, 8)):\n"),),
        mechanism="masking",
        bug="B57",
        story="Of a longer filter only the first 8 taps are used.",
        trigger="h3:float32:normal:B1,H2,N20,D4,E5,T9,P4:-:contiguous:3",
    ),
    _output(
        name="triton_h3_channels_beyond_the_first_tile",
        edits=(("for i_d in range(0, D, BD):", "for i_d in range(0, BD, BD):"),),
        mechanism="masking",
        bug="B32",
        story="Scores sum over the first 32 channels.",
        trigger="h3:float32:normal:B1,H1,N10,D33,E2,T2,P2:-:contiguous:4",
    ),
    _output(
        name="triton_h3_unseen_values_reach_rows",
        edits=(("        b_z, b_nan = isolated(b_z, m_s, b_nan)\n", ""),),
        mechanism="special-values",
        bug="B21",
        story="A NaN in a later value of the same tile reaches a row as 0·NaN.",
        trigger="h3:float32:future-nonfinite:B1,H2,N20,D4,E5,T3,P4:-:contiguous:5",
        shows=("nonfinite", "unseen-nonfinite", "isolation", "causality"),
    ),
    _output(
        name="triton_h3_scores_in_tf32",
        edits=(
            (
                'b_s = tl.dot(b_x, b_y, b_s, input_precision="ieee")',
                'b_s = tl.dot(b_x, b_y, b_s, input_precision="tf32")',
            ),
        ),
        bug="B30",
        story="Scores of float32 round their operands to tf32.",
        trigger=f"{_TRIGGER}:-:contiguous:6",
    ),
    _output(
        name="triton_h3_weights_in_float16",
        edits=(
            (
                "b_s * tl.load(p_w + o_lag, mask=m_s, other=0.0)",
                "b_s * tl.load(p_w + o_lag, mask=m_s, other=0.0).to(tl.float16).to(tl.float32)",
            ),
        ),
        story="Weights of the lags are kept in float16.",
        trigger=f"{_TRIGGER}:complex:contiguous:7",
    ),
    _output(
        name="triton_h3_heads_share_the_first_weights",
        edits=(("    p_w += i_h * N\n", ""),),
        mechanism="pointers",
        bug="B50",
        story="Every head weights its lags as the first one does.",
        trigger=f"{_TRIGGER}:-:contiguous:8",
    ),
    _wrapper(
        name="triton_h3_diagonal_skip_at_all_lags",
        edits=((_DIAGONAL, "w = w + d_diag.float()[:, None]"),),
        mechanism="masking",
        story="The skip weight of the state space is added at all lags.",
        trigger=f"{_TRIGGER}:skip:contiguous:9",
    ),
    _wrapper(
        name="triton_h3_keys_filtered_in_the_inputs_dtype",
        edits=((_KEYS, "filtered_keys = Filter.apply(k, taps.contiguous(), skip).to(k.dtype)"),),
        mechanism="accuracy",
        story="The filtered keys are rounded to the inputs' dtype.",
        trigger="h3:bfloat16:normal:B1,H2,N40,D2,E8,T4,P4:skip:contiguous:10",
        accuracy_only=True,
    ),
    _wrapper(
        name="triton_h3_channels_first_in_the_parameters",
        base=H3_COMPOSED,
        edits=((_EACH, "x.float()[None].expand(channels, *x.shape).flatten(0, 1)"),),
        mechanism="pointers",
        bug="B28",
        story="Heads take the state space of other heads: channels and heads change places.",
        trigger=f"{_TRIGGER}:complex,skip:contiguous:11",
    ),
    _output(
        name="triton_h3_taps_of_the_next_channel",
        base=H3_COMPOSED,
        module=_CONVOLUTION,
        edits=(("m_lag = (o_lag >= 0) & (o_lag < L) & (o_x < N)", "m_lag = (o_lag >= 0) & (o_x < N)"),),
        mechanism="pointers",
        bug="B48",
        story="Lags beyond the filter read the taps of the next channels.",
        trigger=f"{_TRIGGER}:-:contiguous:12",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _backward(
        name="triton_h3_dk_without_the_shift_skip",
        edits=(("filtered(dy, taps, skip, reverse=True)", "filtered(dy, taps, None, reverse=True)"),),
        story="dk lacks what passes by the filter.",
        trigger=f"{_TRIGGER}:skip,cotangents=normal:contiguous:13",
    ),
    _backward(
        name="triton_h3_dk_filtered_forwards",
        edits=(("filtered(dy, taps, skip, reverse=True)", "filtered(dy, taps, skip, reverse=False)"),),
        story="dk goes through the filter as keys do, from the past.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:14",
    ),
    _backward(
        name="triton_h3_shift_skip_has_the_last_taps_gradient",
        edits=(("lags[..., 0].to(skip.dtype)", "lags[..., -1].to(skip.dtype)"),),
        story="The skip weight of the filter has the gradient of the last tap.",
        trigger=f"{_TRIGGER}:skip,cotangents=normal:contiguous:15",
    ),
    _gradient(
        name="triton_h3_whole_tiles_in_dk_and_dv",
        edits=((_ROWS, "i_first, i_stop = i_m * BM, tl.maximum(N // BN * BN, i_m * BM + 1)"),),
        bug="B01",
        story="dk' and dv leave out rows after the last whole tile, but for their own.",
        trigger=f"{_LONG}:cotangents=normal:contiguous:16",
    ),
    _gradient(
        name="triton_h3_weights_gradient_of_whole_tiles",
        edits=(("mask=(i_j + 1 < n_j) | ~m_next, other=0.0)", "mask=~m_next, other=0.0)"),),
        story="The weights' gradient lacks lags that lie in the tile below.",
        trigger=f"{_LONG}:cotangents=normal:contiguous:17",
    ),
    _gradient(
        name="triton_h3_weights_gradient_without_the_diagonal_tile",
        edits=(("for i_m in range(i_j, n_j):", "for i_m in range(i_j + 1, n_j):"),),
        bug="B02",
        story="The weights' gradient lacks the first tile of every lag.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:18",
    ),
    _gradient(
        name="triton_h3_taps_gradient_across_the_beginning",
        edits=(
            ("for i_n in range(i_lag, N, BN):", "for i_n in range(0, N, BN):"),
            (
                "tl.load(p_xb + (o_n - i_lag) * s_xn + o_d * s_xd, mask=m_n, other=0.0)",
                "tl.load(p_xb + (o_n + N - i_lag) % N * s_xn + o_d * s_xd, mask=m_n, other=0.0)",
            ),
        ),
        story="dtaps pairs the first rows with the last keys, as a circular convolution does.",
        trigger=f"{_TRIGGER}:cotangents=normal:contiguous:19",
    ),
    _gradient(
        name="triton_h3_cotangent_assumed_contiguous",
        edits=(
            (
                "*y.stride(), *do.stride(), *v.stride(), heads",
                f"*y.stride(), {_AS_IF_CONTIGUOUS}, *v.stride(), heads",
            ),
        ),
        bug="B56",
        story="The weights' gradient reads the cotangent as if it were contiguous.",
        trigger=f"{_TRIGGER}:cotangents=normal:transposed:20",
        shows=(*NUMERIC, *FAULT, "nonfinite"),
    ),
    _gradient(
        name="triton_h3_dk_in_the_inputs_dtype_before_the_filter",
        module=_WRAPPER,
        edits=(
            (
                "weighted(v, do, q, w, k, reverse=True) if need_k",
                "weighted(v, do, q, w, q, reverse=True).float() if need_k",
            ),
        ),
        story="The gradient of filtered keys is rounded to the inputs' dtype before the filter.",
        trigger="h3:bfloat16:normal:B1,H2,N40,D2,E8,T4,P4:skip,cotangents=normal:contiguous:21",
        accuracy_only=True,
    ),
)
