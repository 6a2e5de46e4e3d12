"""What the mLSTM's kernels share: gates of a chunk, the states between chunks, how a call is laid out.

A state is (C', n', m): C' e^m and n' e^m are the sums. Its level m is −∞ where nothing was written yet, and
C' and n' are then 0. No −∞ − (−∞) is formed: log σ(f) ≤ 0 is only ever added to a level, and what is
subtracted is the level after a position, which is finite.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnproof.kernels.softmax_backward import stored
from attnproof.kernels.states import Chunks, Sequences, chunk_bounds, register_limit, sequence_bounds

__all__ = [
    "CHUNK",
    "RUNTIME",
    "Call",
    "State",
    "chunk_of",
    "decays",
    "denominator",
    "gate_tile",
    "log_sigmoid",
    "states",
    "within",
]

CHUNK = 32
"""Positions of a chunk where nothing else is asked: the scores of a chunk take CHUNK² registers a program."""

# Widths of a tile of the state.
_WIDTH = 32

INF: tl.constexpr = tl.constexpr(math.inf)

# Sizes and strides are run-time values: what depends on them is told to the compiler by UNIT alone.
RUNTIME = [
    "p_c0", "p_n0", "p_m0", "p_state", "p_n", "p_bound", "p_c1", "p_n1", "p_m1", "p_cu", "p_first", "p_owner",
    "s_qb", "s_qh", "s_qm", "s_qd", "s_kb", "s_kh", "s_kn", "s_kd", "s_vb", "s_vh", "s_vn", "s_ve", "s_ib",
    "s_ih", "s_in", "s_fb", "s_fh", "s_fn", "B", "H", "N", "D", "E", "each",
]  # fmt: skip


class State(NamedTuple):
    """C' (S,H,D,E), n' (S,H,D) and m (S,H), float32, of S sequences: the sums are C' e^m and n' e^m."""

    c: torch.Tensor
    n: torch.Tensor
    m: torch.Tensor


@triton.jit
def chunk_of(p_cu, p_first, p_owner, each, H, N, C: tl.constexpr):
    """(chunk·head, batch, head, first position, end of the sequence) of a program, one a chunk and head."""
    i_slot = tl.program_id(0).to(tl.int64)
    i_b, i_first, i_stop, _ = chunk_bounds(p_cu, p_first, p_owner, tl.program_id(0) // H, each, N, C)
    return i_slot, i_b, i_slot % H, i_first, i_stop


@triton.jit
def log_sigmoid(b_f):
    """log σ(b_f) = min(b_f, 0) − 2 artanh(t/(2 + t)), t = e^−abs(b_f), to a few ulp; −inf for −inf.

    The series in z = t/(2 + t) ≤ 1/3 ends at z¹⁷: what is left out is below 2⁻³² of the first term.
    """
    b_t = tl.exp(-tl.abs(b_f))
    b_z = b_t / (2.0 + b_t)
    b_x = b_z * b_z
    b_sum = 1.0 / 17.0 * b_x + 1.0 / 15.0
    b_sum = b_sum * b_x + 1.0 / 13.0
    b_sum = b_sum * b_x + 1.0 / 11.0
    b_sum = b_sum * b_x + 1.0 / 9.0
    b_sum = b_sum * b_x + 1.0 / 7.0
    b_sum = b_sum * b_x + 1.0 / 5.0
    b_sum = b_sum * b_x + 1.0 / 3.0
    b_log = 2.0 * (b_z + b_z * (b_x * b_sum))
    return tl.where(b_f != b_f, b_f, tl.minimum(b_f, 0.0) - b_log)


@triton.jit
def gate_tile(p_i, p_f, o_n, s_in, s_fn, i_stop):
    """i and f of the positions o_n, float32; from i_stop on nothing is written and nothing forgotten."""
    b_i = tl.load(p_i + o_n * s_in, mask=o_n < i_stop, other=-INF).to(tl.float32)
    b_f = tl.load(p_f + o_n * s_fn, mask=o_n < i_stop, other=INF).to(tl.float32)
    return b_i, b_f


@triton.jit
def within(b_log_f, b_i, C: tl.constexpr):
    """D_ij = Σ_{j<t≤i} log σ(f_t) + i_j for j ≤ i of one chunk, else −inf; [C, C]."""
    o_c = tl.arange(0, C)
    b_terms = tl.where(o_c[:, None] > o_c[None, :], b_log_f[:, None], 0.0)
    b_d = tl.cumsum(b_terms, 0) + b_i[None, :]
    return tl.where(o_c[:, None] >= o_c[None, :], b_d, -INF)


@triton.jit
def decays(p_i, p_f, o_n, b_before, s_in, s_fn, i_stop, C: tl.constexpr):
    """Of the chunk at positions o_n: log σ(f) summed from its start to each row and to its end, log weights
    from each position to its end, and m after it, from m before it.
    """
    o_c = tl.arange(0, C)
    b_i, b_f = gate_tile(p_i, p_f, o_n, s_in, s_fn, i_stop)
    b_head = tl.cumsum(log_sigmoid(b_f), 0)
    m_next = (o_n + 1 < i_stop) & (o_c + 1 < C)
    b_next = log_sigmoid(tl.load(p_f + (o_n + 1) * s_fn, mask=m_next, other=INF).to(tl.float32))
    b_tail = tl.cumsum(b_next, 0, reverse=True) + b_i
    b_whole = tl.sum(tl.where(o_c == C - 1, b_head, 0.0), 0)
    b_after = tl.maximum(b_whole + b_before, tl.max(b_tail, 0))
    return b_head, b_whole, b_tail, b_after


@triton.jit
def denominator(b_den, b_m):
    """1/max(abs(b_den), e^−b_m), and by how much of it, with its sign, abs(b_den) is what counts.

    Numerators of the scale e^−b_m are multiplied by the first. 0/0, where both underflow, is 0.
    """
    b_down, b_least = tl.exp(tl.minimum(b_m, 0.0)), tl.exp(-tl.maximum(b_m, 0.0))
    b_size = tl.abs(b_den) * b_down
    b_inverse = b_down / tl.maximum(b_size, b_least, propagate_nan=tl.PropagateNan.ALL)
    b_inverse = tl.where(tl.maximum(b_size, b_least) == 0, 0.0, b_inverse)
    b_share = tl.where(b_size > b_least, 1.0, tl.where(b_size == b_least, 0.5, 0.0))
    return b_inverse, tl.where(b_den < 0, -b_share, b_share) * b_inverse


@triton.jit(do_not_specialize=RUNTIME)
def state_kernel(
    p_q, p_k, p_v, p_i, p_f, p_c0, p_n0, p_m0, p_state, p_n, p_bound, p_c1, p_n1, p_m1, p_cu, p_first,
    s_qb: tl.int64, s_qh: tl.int64, s_qm: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64,
    s_ib: tl.int64, s_ih: tl.int64, s_in: tl.int64, s_fb: tl.int64, s_fh: tl.int64, s_fn: tl.int64,
    B, H, N, D, E, each, scale,
    UNIT: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A tile of C', and n' and m, before every chunk of one sequence and behind the last."""
    i_sh = tl.program_id(0).to(tl.int64)
    i_s, i_h = i_sh // H, i_sh % H
    i_b, i_start, i_stop = sequence_bounds(p_cu, i_s, N)
    i_first = (i_s * each if p_cu is None else tl.load(p_first + i_s)).to(tl.int64)
    if UNIT:
        s_kd, s_ve = 1, 1
    o_c = tl.arange(0, C)
    o_d, o_e = tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2) * BE + tl.arange(0, BE)
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_i += i_b * s_ib + i_h * s_ih
    p_f += i_b * s_fb + i_h * s_fh
    m_de = (o_d < D)[:, None] & (o_e < E)[None, :]
    # [BD, BE]
    b_c = tl.zeros([BD, BE], dtype=tl.float32)
    b_n = tl.zeros([BD], dtype=tl.float32)
    b_m = -INF
    if p_m0 is not None:
        b_c = tl.load(p_c0 + (i_sh * D + o_d)[:, None] * E + o_e[None, :], mask=m_de, other=0.0)
        b_n = tl.load(p_n0 + i_sh * D + o_d, mask=o_d < D, other=0.0)
        b_m = tl.load(p_m0 + i_sh)
    for i_c in range(((i_stop - i_start + C - 1) // C).to(tl.int32)):
        i_slot = (i_first + i_c) * H + i_h
        tl.store(p_state + (i_slot * D + o_d)[:, None] * E + o_e[None, :], b_c, mask=m_de)
        if tl.program_id(2) == 0:
            tl.store(p_n + i_slot * D + o_d, b_n, mask=o_d < D)
            if tl.program_id(1) == 0:
                tl.store(p_bound + i_slot, b_m)
        o_n = i_start + i_c * C + o_c
        m_n = o_n < i_stop
        _, b_whole, b_tail, b_after = decays(p_i, p_f, o_n, b_m, s_in, s_fn, i_stop, C)
        b_kept, b_written = tl.exp(b_whole + b_m - b_after), tl.exp(b_tail - b_after)
        b_m = b_after
        o_k = (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :]
        b_k = tl.load(p_k + o_k, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        o_v = (o_n * s_vn)[:, None] + (o_e * s_ve)[None, :]
        b_v = tl.load(p_v + o_v, mask=m_n[:, None] & (o_e < E)[None, :], other=0.0)
        b_w = b_k.to(tl.float32) * b_written[:, None]
        b_n = b_n * b_kept + tl.sum(b_w, 0)
        b_w, b_up = stored(b_w, b_k.dtype)
        b_c = b_c * b_kept + tl.dot(tl.trans(b_w), b_v, input_precision="ieee") * b_up
    tl.store(p_c1 + (i_sh * D + o_d)[:, None] * E + o_e[None, :], b_c, mask=m_de)
    if tl.program_id(2) == 0:
        tl.store(p_n1 + i_sh * D + o_d, b_n, mask=o_d < D)
        if tl.program_id(1) == 0:
            tl.store(p_m1 + i_sh, b_m)


class Call:
    """The tensors of one call, and how its kernels are launched.

    Attributes:
        inputs: q, k, v, i, f; strides: theirs, in order.
        start: the initial state as kernels take it, three times None where there is none.
        sizes: B, H, N, D, E; sequences: where they lie; chunk: positions a chunk.
        unit: whether the last axes of q, k and v are contiguous.
        tiles: keywords of every launch.
    """

    def __init__(
        self,
        inputs: tuple[torch.Tensor, ...],
        start: State | None,
        scale: float,
        chunk: int,
        sequences: Sequences,
    ) -> None:
        q, k, v, *_ = inputs
        self.inputs, self.q, self.v, self.scale, self.chunk = inputs, q, v, scale, chunk
        self.start = (None, None, None) if start is None else start
        self.sequences = sequences
        self.batch, self.heads, self.length, self.width = q.shape
        self.value_width = v.shape[3]
        self.sizes = (self.batch, self.heads, self.length, self.width, self.value_width)
        self.strides = tuple(stride for x in inputs for stride in x.stride())
        self.unit = all(x.stride(-1) == 1 for x in (q, k, v))
        self.tiles: dict[str, Any] = {
            "C": chunk, "BD": _WIDTH, "BE": _WIDTH, "num_warps": 4, "num_stages": 1,
            "enable_fp_fusion": False,
        }  # fmt: skip

    @functools.cached_property
    def chunks(self) -> Chunks:
        """The sequences cut into chunks; for packed ones this waits for their ends."""
        return self.sequences.chunks(self.chunk)

    def new(self, *shape: int) -> torch.Tensor:
        """A float32 tensor beside the inputs."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def new_states(self, count: int) -> State:
        """Memory for as many states of every head."""
        slots = (count, self.heads)
        return State(
            self.new(*slots, self.width, self.value_width), self.new(*slots, self.width), self.new(*slots)
        )


def states(call: Call) -> tuple[State, State]:
    """The states before all chunks, one after the other, and those behind the sequences."""
    before, end = call.new_states(call.chunks.count), call.new_states(call.sequences.count)
    if end.m.numel():
        grid = (end.m.numel(), triton.cdiv(call.width, _WIDTH), triton.cdiv(call.value_width, _WIDTH))
        state_kernel[grid](
            *call.inputs, *call.start, *before, *end, call.sequences.cu_seqlens, call.chunks.first,
            *call.strides, *call.sizes, call.chunks.each, call.scale,
            UNIT=call.unit, **call.tiles, **register_limit(call.tiles["num_warps"]),
        )  # fmt: skip
    return before, end
