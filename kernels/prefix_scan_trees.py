"""Prefix attention by trees of logarithmic depth; every round is a launch, and so a barrier.

Hillis–Steele: in round r each prefix that ends at position t takes in the one that ends at t − 2^r.
O(N log N) work, and the fewest rounds, ⌈log₂ N⌉ (Hillis & Steele, "Data parallel algorithms", 1986). Rounds
read one copy of all triples and write another.

Blelloch: of the triples of blocks of positions, going up, each node takes in its left child; going down, from
the state before the sequence at the root, each hands its own prefix to its left child, and that prefix joined
with the left child's triple to its right child (Blelloch, "Prefix sums and their applications", 1990). O(N)
work. What comes out is the state before every block, whose positions are then scanned within a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attnproof.kernels.prefix_scan_blocks import (
    COLUMNS,
    POSITIONS,
    WARPS,
    Call,
    State,
    begin,
    joined_rows,
    logits,
    neutral,
    scanned,
)

__all__ = ["by_doubling", "by_sweeps"]

# Positions of a leaf of Blelloch's tree.
LEAF = 16
# Nodes a program.
NODES = 16
INF: tl.constexpr = tl.constexpr(math.inf)

TRIPLES = ["p_m", "p_u", "p_w", "p_m2", "p_u2", "p_w2", "p_m0", "p_u0", "p_w0", "p_o", "p_rows"]


@triton.jit(do_not_specialize=[*TRIPLES, "N", "E", "distance"])
def doubling_kernel(
    p_m, p_u, p_w, p_m2, p_u2, p_w2, N, E, distance, BN: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """One round: the triple of t joined with that of t − distance, from the first three to the others."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    o_e = tl.program_id(2) * BE + tl.arange(0, BE)
    m_n, m_e = o_n < N, o_e < E
    m_left = m_n & (o_n >= distance)
    o_row, o_left = i_bh * N + o_n, i_bh * N + o_n - distance
    # [BN], [BN, BE]
    b_m = tl.load(p_m + o_row, mask=m_n, other=-INF)
    b_u = tl.load(p_u + o_row, mask=m_n, other=0.0)
    o_w = (o_row * E)[:, None] + o_e[None, :]
    b_w = tl.load(p_w + o_w, mask=m_n[:, None] & m_e[None, :], other=0.0)
    b_lm = tl.load(p_m + o_left, mask=m_left, other=-INF)
    b_lu = tl.load(p_u + o_left, mask=m_left, other=0.0)
    b_lw = tl.load(p_w + o_w - distance * E, mask=m_left[:, None] & m_e[None, :], other=0.0)
    b_m, b_u, b_w = joined_rows(b_lm, b_lu, b_lw, b_m, b_u, b_w)
    if tl.program_id(2) == 0:
        tl.store(p_m2 + o_row, b_m, mask=m_n)
        tl.store(p_u2 + o_row, b_u, mask=m_n)
    tl.store(p_w2 + o_w, b_w, mask=m_n[:, None] & m_e[None, :])


@triton.jit(do_not_specialize=[*TRIPLES, "B", "H", "N", "E"])
def read_kernel(
    p_m, p_u, p_w, p_m0, p_u0, p_w0, p_m2, p_u2, p_w2, p_o, p_rows, B, H, N, E,
    BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """o = w/u of a block of prefixes after the first state, and the last prefix as the final state."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    o_e = tl.program_id(2) * BE + tl.arange(0, BE)
    m_n, m_e = o_n < N, o_e < E
    m_w = m_n[:, None] & m_e[None, :]
    o_row = i_bh * N + o_n
    o_w = (o_row * E)[:, None] + o_e[None, :]
    b_m = tl.load(p_m + o_row, mask=m_n, other=-INF)
    b_u = tl.load(p_u + o_row, mask=m_n, other=1.0)
    b_w = tl.load(p_w + o_w, mask=m_w, other=0.0)
    if p_m0 is not None:
        b_m0 = tl.load(p_m0 + i_bh + tl.zeros([1], dtype=tl.int32))
        b_u0 = tl.load(p_u0 + i_bh + tl.zeros([1], dtype=tl.int32))
        b_w0 = tl.load(p_w0 + i_bh * E + o_e, mask=m_e, other=0.0)[None, :]
        b_m, b_u, b_w = joined_rows(b_m0, b_u0, b_w0, b_m, b_u, b_w)
    b_o = b_w / tl.where(m_n, b_u, 1.0)[:, None]
    tl.store(p_o + o_w, b_o.to(p_o.dtype.element_ty), mask=m_w)
    m_last = o_n == N - 1
    tl.store(p_w2 + i_bh * E + tl.zeros([BN], dtype=tl.int32)[:, None] + o_e[None, :], b_w,
             mask=m_last[:, None] & m_e[None, :])  # fmt: skip
    if tl.program_id(2) == 0:
        o_end = i_bh + tl.zeros([BN], dtype=tl.int32)
        tl.store(p_m2 + o_end, b_m, mask=m_last)
        tl.store(p_u2 + o_end, b_u, mask=m_last)
        if p_rows is not None:
            tl.store(p_rows + o_row, b_m, mask=m_n)
            tl.store(p_rows + (B * H).to(tl.int64) * N + o_row, b_u, mask=m_n)


@triton.jit(do_not_specialize=[*TRIPLES, "SLOTS", "E", "span"])
def sweep_kernel(
    p_m, p_u, p_w, SLOTS, E, span, DOWN: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """One level of the tree over SLOTS leaves, in place: nodes of ``span`` leaves, at their last leaf.

    A program has all columns of its nodes, so that nobody else reads what it overwrites.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    o_node = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    m_node = (o_node + 1) * span <= SLOTS
    o_right = i_bh * SLOTS + (o_node + 1) * span - 1
    o_left = o_right - span // 2
    # [BN]
    b_m = tl.load(p_m + o_right, mask=m_node, other=-INF)
    b_u = tl.load(p_u + o_right, mask=m_node, other=0.0)
    b_lm = tl.load(p_m + o_left, mask=m_node, other=-INF)
    b_lu = tl.load(p_u + o_left, mask=m_node, other=0.0)
    b_m2, b_u2 = b_m, b_u
    for i_e in range(0, E, BE):
        o_e = i_e + tl.arange(0, BE)
        m_w = m_node[:, None] & (o_e < E)[None, :]
        # [BN, BE]
        b_w = tl.load(p_w + (o_right * E)[:, None] + o_e[None, :], mask=m_w, other=0.0)
        b_lw = tl.load(p_w + (o_left * E)[:, None] + o_e[None, :], mask=m_w, other=0.0)
        b_m2, b_u2, b_w2 = joined_rows(b_lm, b_lu, b_lw, b_m, b_u, b_w)
        tl.store(p_w + (o_right * E)[:, None] + o_e[None, :], b_w2, mask=m_w)
        if DOWN:
            tl.store(p_w + (o_left * E)[:, None] + o_e[None, :], b_w, mask=m_w)
    tl.store(p_m + o_right, b_m2, mask=m_node)
    tl.store(p_u + o_right, b_u2, mask=m_node)
    if DOWN:
        tl.store(p_m + o_left, b_m, mask=m_node)
        tl.store(p_u + o_left, b_u, mask=m_node)


def by_doubling(call: Call) -> tuple[torch.Tensor, State, torch.Tensor, torch.Tensor | None]:
    """o, the final state, logits, and m and u of every position if they are kept: Hillis–Steele."""
    batch, heads, length, _, value_width = call.sizes
    s, o, rows = logits(call), call.outputs(), call.rows()
    if not s.numel():
        return o, begin(call), s, rows
    here = State(s.clone(), torch.ones_like(s), call.v.to(torch.float32, copy=True).contiguous())
    there = call.states(length)
    grid = (batch * heads, triton.cdiv(length, POSITIONS), triton.cdiv(value_width, COLUMNS))
    launch = {"BN": POSITIONS, "BE": COLUMNS, "num_warps": WARPS, "enable_fp_fusion": False}
    distance = 1
    while distance < length:
        doubling_kernel[grid](*here, *there, length, value_width, distance, **launch)
        here, there = there, here
        distance *= 2
    end = neutral(call)
    read_kernel[grid](
        *here, *(call.start or (None, None, None)), *end, o, rows, batch, heads, length, value_width, **launch
    )
    return o, end, s, rows


def swept(call: Call, leaves: State, count: int) -> None:
    """Turn the triples of ``count`` leaves, a power of two, into the states before each, in place."""
    batch, heads, _, _, value_width = call.sizes

    def level(span: int, *, down: bool) -> None:
        sweep_kernel[(batch * heads, triton.cdiv(count // span, NODES))](
            *leaves, count, value_width, span, DOWN=down, BN=NODES, BE=COLUMNS, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip

    spans = [2**i for i in range(1, count.bit_length())]
    for span in spans:
        level(span, down=False)
    for root, start in zip(leaves, call.start or neutral(call), strict=True):
        root[:, :, -1] = start
    for span in reversed(spans):
        level(span, down=True)


def by_sweeps(call: Call) -> tuple[torch.Tensor, State, torch.Tensor, torch.Tensor | None]:
    """As :func:`by_doubling`, by Blelloch's two sweeps over blocks of :data:`LEAF` positions."""
    s, o, rows = logits(call), call.outputs(), call.rows()
    if not s.numel():
        return o, begin(call), s, rows
    runs = triton.cdiv(call.sizes[2], LEAF)
    count: int = triton.next_power_of_2(runs)
    states = call.states(count)
    states.m.fill_(-math.inf)
    states.u.zero_()
    states.w.zero_()
    scanned(call, s, None, states, None, None, runs=runs, block=LEAF)
    swept(call, states, count)
    ends = call.states(count)
    scanned(call, s, states, ends, o, rows, runs=runs, block=LEAF)
    return o, State(*(x[:, :, runs - 1].clone() for x in ends)), s, rows
