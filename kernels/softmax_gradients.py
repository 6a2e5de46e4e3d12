"""Launches of softmax attention's backward kernels: gradients of o and lse in q, k, v, bias and sinks.

The kernels and their formulas are in :mod:`attnproof.kernels.softmax_backward`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from attnproof.kernels.arguments import key_band, padded_bias
from attnproof.kernels.softmax import Call
from attnproof.kernels.softmax_backward import bias_kernel, delta_kernel, keys_kernel, queries_kernel
from attnproof.kernels.tiles import ALIGNED, backward_tiles_for, memory_layout, padded_width

__all__ = ["Saved", "gradients"]

LOG2E = math.log2(math.e)
DELTA_ROWS = 16


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass.

    Attributes:
        q, k, v, bias, sinks, alibi_slopes, cu_seqlens: the arguments of the call.
        o: its result (B,H,M,E), contiguous, as it was rounded.
        row_max: (B,H,M) float32: the largest score of a row, in bits without a bias and in nats with one; 0
            for a row without keys.
        row_scale: (B,H,M) float32: 1/Σ_j exp(s_ij − m_i), 0 for a row without keys.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    o: torch.Tensor
    row_max: torch.Tensor
    row_scale: torch.Tensor


def gradients(
    saved: Saved,
    call: Call,
    longest: int,
    do: torch.Tensor | None,
    dlse: torch.Tensor | None,
    needed: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of Σ o·do + Σ lse·dlse in q, k, v, bias and sinks.

    Args:
        saved: what the forward pass left.
        call: its options; with ``atomic`` the parts of dQ are added up in float32 as they come.
        longest: its longest sequence.
        do: (B,H,M,E) of q's dtype, any strides; None means zeros.
        dlse: (B,H,M) float32, any strides; None means zeros.
        needed: which of q, k, v, bias and sinks ask for a gradient.

    Returns:
        for each of the five its gradient, contiguous, of its shape and dtype, or None. A row without keys has
        and gives no gradient.
    """
    q, k, v = saved[:3]
    need_q, need_k, need_v, need_bias, need_sinks = needed
    if do is None:
        do = q.new_zeros(1).expand(saved.o.shape)
    delta, dsinks = row_sums(saved, do, dlse, need_sinks)
    if saved.o.numel() == 0 or k.shape[2] == 0:
        inputs = (saved.q, k, v, saved.bias)
        return [
            None if x is None or not on else torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            for x, on in zip(inputs, needed, strict=False)
        ] + [dsinks]
    pieces = q.shape[0] if saved.cu_seqlens is None else saved.cu_seqlens.shape[0] - 1
    longest_keys = k.shape[2] if saved.cu_seqlens is None else longest
    common = launch_arguments(saved, call, do, delta)
    dq = dk = dv = dbias = None
    if need_k or need_v or (need_q and call.atomic):
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        sums = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if need_q and call.atomic else None
        grid = (pieces * k.shape[1], triton.cdiv(longest_keys, common["BN"]))
        keys_kernel[grid](p_dk=dk, p_dv=dv, p_dq=sums, **common)
        dq = None if sums is None else sums.to(q.dtype)
    if need_q and not call.atomic:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        queries_kernel[(pieces * q.shape[1], triton.cdiv(longest, common["BM"]))](p_dq=dq, **common)
    if need_bias:
        dbias = bias_gradient(saved, pieces, longest, longest_keys, common)
    return [dq, dk if need_k else None, dv if need_v else None, dbias, dsinks]


def row_sums(
    saved: Saved, do: torch.Tensor, dlse: torch.Tensor | None, need_sinks: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Δ (B,H,M) float32, and the gradient of the sinks if it is asked for."""
    batch, heads, queries, width = saved.o.shape
    sinks = saved.sinks
    delta = torch.empty_like(saved.row_max)
    tiles = triton.cdiv(queries, DELTA_ROWS)
    parts = torch.empty((batch, heads, tiles), dtype=torch.float32, device=do.device) if need_sinks else None
    if delta.numel():
        unit = 1.0 if saved.bias is None else LOG2E
        delta_kernel[(batch * heads, tiles)](
            do, dlse, sinks, saved.o, saved.row_max, saved.row_scale, delta, parts, *do.stride(),
            *((0, 0, 0) if dlse is None else dlse.stride()), 0 if sinks is None else sinks.stride(0),
            heads, queries, width, SINK_UNIT=LOG2E / unit, UNIT=unit, BM=DELTA_ROWS,
            BE=padded_width(width), enable_fp_fusion=False,
        )  # fmt: skip
    if parts is None or sinks is None:
        return delta, None
    return delta, parts.sum((0, 2)).to(sinks.dtype)


def launch_arguments(saved: Saved, call: Call, do: torch.Tensor, delta: torch.Tensor) -> dict[str, Any]:
    """The arguments that the kernels of keys, queries and bias have in common, by name."""
    q, k, v = saved.q, saved.k, saved.v
    heads, queries, width = q.shape[1:]
    keys, value_width = v.shape[2:]
    bias = padded_bias(saved.bias, q, keys, "attention")
    layout = memory_layout(q, k, v, do)
    tiles = backward_tiles_for(q.dtype, width, value_width, call.input_precision)
    band = key_band(
        queries, keys, causal=call.causal, window=call.window, causal_alignment=call.causal_alignment,
        kernel="attention",
    )  # fmt: skip
    strides: dict[str, int] = {}
    for x, names in ((q, "bhmd"), (k, "bhnd"), (v, "bhne"), (do, "bhme"), (bias, "bhmn")):
        owner = "b" if x is bias else {"bhmd": "q", "bhnd": "k", "bhne": "v", "bhme": "o"}[names]
        unit = 16 if layout == ALIGNED and x is not bias else 1
        for axis, name in enumerate(names):
            stride = 0 if x is None or (name == "b" and saved.cu_seqlens is not None) else x.stride(axis)
            strides[f"s_{owner}{name}"] = stride // (unit if axis < 3 else 1)
    bits = LOG2E if bias is None else 1.0
    return {
        "p_q": q, "p_k": k, "p_v": v, "p_do": do, "p_bias": bias, "p_alibi": saved.alibi_slopes,
        "p_cu": saved.cu_seqlens, "p_max": saved.row_max, "p_scale": saved.row_scale, "p_delta": delta,
        **strides,
        "H": heads, "GROUP": heads // k.shape[1], "M": queries, "N": keys, "D": width, "E": value_width,
        "left": band.left or 0, "right": band.right or 0, "scale": call.scale,
        "score_scale": call.scale * bits if call.softcap is None else call.scale / call.softcap,
        "cap": (call.softcap or 1.0) * bits, "LEFT": band.left is not None, "RIGHT": band.right is not None,
        "SOFTCAP": call.softcap is not None, "UNIT": 1.0 if bias is None else LOG2E,
        "PAD_D": width != padded_width(width), "PAD_E": value_width != padded_width(value_width),
        "LAYOUT": layout, "PRECISION": call.input_precision, "BM": call.block_m or tiles.block_m,
        "BN": call.block_n or tiles.block_n, "BD": padded_width(width), "BE": padded_width(value_width),
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": False,
    }  # fmt: skip


def bias_gradient(
    saved: Saved, pieces: int, longest: int, longest_keys: int, common: dict[str, Any]
) -> torch.Tensor:
    """dS summed over the axes along which the bias is broadcast, in float32, and rounded once.

    Where the bias has both queries and keys, a tile's program adds up batch entries and heads itself. Where
    it lacks one of them, programs sum over their tile and torch adds the tiles, so that few values of a bias
    do not leave the machine to few programs; what lies in between is a tile's length smaller than dS.
    """
    bias = saved.bias
    assert bias is not None
    batch, heads, queries = saved.q.shape[:3]
    keys = saved.k.shape[2]
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    sum_b, sum_h, sum_m, sum_n = (side == 1 for side in shape)
    whole = not (sum_m or sum_n)
    tiles_m, tiles_n = triton.cdiv(longest, common["BM"]), triton.cdiv(longest_keys, common["BN"])
    packed = saved.cu_seqlens is not None
    # sequences of a packed row have places of their own in it, and share its batch entry but for their sums
    entries = 1 if packed and not (sum_m and sum_n) else pieces
    parts = torch.zeros if packed else torch.empty
    sums = parts(
        1 if whole and sum_b else entries, 1 if whole and sum_h else heads, tiles_m if sum_m else queries,
        tiles_n if sum_n else keys, dtype=torch.float32, device=bias.device,
    )  # fmt: skip
    strides = list(sums.stride())
    if entries == 1:
        strides[0] = 0
    inner_b = batch if whole and sum_b else 1
    inner_h = heads if whole and sum_h else 1
    bias_kernel[(pieces // inner_b * (heads // inner_h), tiles_m, tiles_n)](
        p_dbias=sums, **dict(zip(("s_wb", "s_wh", "s_wm", "s_wn"), strides, strict=True)),
        HEADS=heads // inner_h, SUM_B=inner_b, SUM_H=inner_h, SUM_M=sum_m, SUM_N=sum_n, **common,
    )  # fmt: skip
    axes = [axis for axis in range(4) if shape[axis] == 1 and sums.shape[axis] != 1]
    return (sums.sum(axes, keepdim=True) if axes else sums).reshape(bias.shape).to(bias.dtype)
