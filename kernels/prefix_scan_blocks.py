"""The monoid of prefix attention, its logits, and the scan of blocks of positions from a state before each.

A set A of positions is the triple m_A = max s_j, u_A = Σ e^{s_j − m_A}, w_A = Σ e^{s_j − m_A} v_j, and

    (m, u, w) ⊕ (m', u', w') = (M, u e^{m − M} + u' e^{m' − M}, w e^{m − M} + w' e^{m' − M}),  M = max(m, m')

is that of a union (theory AAR-2). No exponent is above 0. The empty set (−∞, 0, 0) is neutral: where both
maxima are −∞, 0 is subtracted in place of −∞, whose difference is NaN. Positions beyond the end are neutral.

One kernel serves every form that works on blocks: a program goes through a number of blocks, each by
``tl.associative_scan``, from the state that it is given to the state that it leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attnproof.kernels.states import register_limit

__all__ = ["Call", "State", "begin", "block_scan", "joined", "joined_rows", "logits", "neutral", "scanned"]

INF: tl.constexpr = tl.constexpr(math.inf)

# Positions and value columns of a tile, warps: two operands of the scan are 8 registers a thread each.
POSITIONS, COLUMNS, WARPS = 32, 32, 4


class State(NamedTuple):
    """Triples of the monoid, float32: m and u of one shape, w with E further entries."""

    m: torch.Tensor
    u: torch.Tensor
    w: torch.Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """One checked call.

    Attributes:
        q, k, v: (H,D), (B,H,N,D), (B,H,N,E).
        scale: of the logits.
        start: m, u (B,H), w (B,H,E), contiguous, or None for the neutral element.
        kept: whether a backward pass follows: rows and logits are kept, and o is not rounded.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    start: State | None
    kept: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, N, D, E."""
        batch, heads, length, width = self.k.shape
        return batch, heads, length, width, self.v.shape[3]

    @property
    def unit(self) -> bool:
        """Whether the last axes of all three tensors are contiguous."""
        return all(x.stride(-1) == 1 for x in (self.q, self.k, self.v))

    def new(self, *shape: int) -> torch.Tensor:
        """A float32 tensor of that shape beside k, not filled."""
        return torch.empty(shape, dtype=torch.float32, device=self.k.device)

    def states(self, count: int) -> State:
        """``count`` triples a head, (B,H,count) and (B,H,count,E), not filled."""
        batch, heads, _, _, value_width = self.sizes
        return State(
            self.new(batch, heads, count),
            self.new(batch, heads, count),
            self.new(batch, heads, count, value_width),
        )

    def outputs(self) -> torch.Tensor:
        """Room for o (B,H,N,E)."""
        dtype = torch.float32 if self.kept else self.v.dtype
        return torch.empty(self.v.shape, dtype=dtype, device=self.v.device)

    def rows(self) -> torch.Tensor | None:
        """Room for m and u of every prefix, (2,B,H,N), if they are kept."""
        return self.new(2, *self.k.shape[:3]) if self.kept else None


@triton.jit
def joined(b_m, b_x, b_m2, b_x2):
    """(m, x) ⊕ (m2, x2) for x any of the sums u, w."""
    b_max = tl.maximum(b_m, b_m2, propagate_nan=tl.PropagateNan.ALL)
    b_shift = tl.where(b_max == -INF, 0.0, b_max)
    return b_max, b_x * tl.exp(b_m - b_shift) + b_x2 * tl.exp(b_m2 - b_shift)


@triton.jit
def joined_rows(b_m, b_u, b_w, b_m2, b_u2, b_w2):
    """(m, u, w) ⊕ (m2, u2, w2): m and u [R], w [R, C], or the first or second triple without R."""
    b_max = tl.maximum(b_m, b_m2, propagate_nan=tl.PropagateNan.ALL)
    b_shift = tl.where(b_max == -INF, 0.0, b_max)
    b_c, b_c2 = tl.exp(b_m - b_shift), tl.exp(b_m2 - b_shift)
    return b_max, b_u * b_c + b_u2 * b_c2, b_w * b_c[:, None] + b_w2 * b_c2[:, None]


@triton.jit
def block_scan(b_s, b_one, b_x, REVERSE: tl.constexpr):
    """The triples of all prefixes (suffixes) of a block: logits b_s [R], b_one 1 or 0 [R], values b_x [R, C].

    Neutral positions have the logit −∞ and zeros.
    """
    b_m, b_u = tl.associative_scan((b_s, b_one), 0, joined, reverse=REVERSE)
    b_logits = tl.broadcast_to(b_s[:, None], b_x.shape)
    _, b_w = tl.associative_scan((b_logits, b_x), 0, joined, reverse=REVERSE)
    return b_m, b_u, b_w


@triton.jit(do_not_specialize=["s_qh", "s_qd", "s_kb", "s_kh", "s_kn", "s_kd", "H", "N", "D"])
def logit_kernel(
    p_q, p_k, p_s, s_qh: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64, H, N, D, scale,
    UNIT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """s = scale q·k of a block of positions."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    if UNIT:
        s_qd, s_kd = 1, 1
    o_n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    # [BN]
    b_s = tl.zeros([BN], dtype=tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_q = tl.load(p_q + i_h * s_qh + o_d * s_qd, mask=o_d < D, other=0.0).to(tl.float32)
        # [BN, BD]
        o_k = i_b * s_kb + i_h * s_kh + (o_n * s_kn)[:, None] + (o_d * s_kd)[None, :]
        b_k = tl.load(p_k + o_k, mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        b_s += tl.sum(b_q[None, :] * b_k, 1)
    tl.store(p_s + i_bh * N + o_n, b_s * scale, mask=o_n < N)


@triton.jit(
    do_not_specialize=[
        *("p_m0", "p_u0", "p_w0", "p_m1", "p_u1", "p_w1", "p_o", "p_rows", "s_vb", "s_vh", "s_vn", "s_ve"),
        *("SLOTS", "BLOCKS", "B", "H", "N", "E"),
    ]
)  # fmt: skip
def scan_kernel(
    p_s, p_v, p_m0, p_u0, p_w0, p_m1, p_u1, p_w1, p_o, p_rows,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64, SLOTS, BLOCKS, B, H, N, E,
    UNIT: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """``BLOCKS`` blocks of one head and a slice of E, one after the other.

    Run i of a head begins with the triple in slot i of the first three pointers (neutral where they are None)
    and leaves one in slot i of the next three; a head has ``SLOTS``.
    """
    i_bh, i_run = tl.program_id(0).to(tl.int64), tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    if UNIT:
        s_ve = 1
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_e = o_e < E
    p_v += i_b * s_vb + i_h * s_vh
    i_slot = i_bh * SLOTS + i_run
    # [1], [1], [1, BE]
    b_m, b_u = tl.full([1], -INF, dtype=tl.float32), tl.zeros([1], dtype=tl.float32)
    b_w = tl.zeros([1, BE], dtype=tl.float32)
    if p_m0 is not None:
        b_m = tl.maximum(b_m, tl.load(p_m0 + i_slot), propagate_nan=tl.PropagateNan.ALL)
        b_u += tl.load(p_u0 + i_slot)
        b_w += tl.load(p_w0 + i_slot * E + o_e, mask=m_e, other=0.0)[None, :]
    for i_n in range(BLOCKS):
        o_r = tl.arange(0, BN)
        o_n = (i_run * BLOCKS + i_n).to(tl.int64) * BN + o_r
        m_n = o_n < N
        b_s = tl.load(p_s + i_bh * N + o_n, mask=m_n, other=-INF)
        # [BN, BE]
        m_v = m_n[:, None] & m_e[None, :]
        b_v = tl.load(p_v + (o_n * s_vn)[:, None] + (o_e * s_ve)[None, :], mask=m_v, other=0.0)
        b_one = tl.where(m_n, 1.0, 0.0)
        b_sm, b_su, b_sw = block_scan(b_s, b_one, b_v.to(tl.float32), False)
        b_sm, b_su, b_sw = joined_rows(b_m, b_u, b_w, b_sm, b_su, b_sw)
        if p_o is not None:
            o_row = i_bh * N + o_n
            b_o = b_sw / tl.where(m_n, b_su, 1.0)[:, None]
            tl.store(p_o + (o_row * E)[:, None] + o_e[None, :], b_o.to(p_o.dtype.element_ty), mask=m_v)
            if p_rows is not None:
                m_row = m_n & (tl.program_id(1) == 0)
                tl.store(p_rows + o_row, b_sm, mask=m_row)
                tl.store(p_rows + (B * H).to(tl.int64) * N + o_row, b_su, mask=m_row)
        # the last row holds the whole block, for neutral rows change nothing
        m_r = o_r == BN - 1
        b_m = tl.sum(tl.where(m_r, b_sm, 0.0), 0, keep_dims=True)
        b_u = tl.sum(tl.where(m_r, b_su, 0.0), 0, keep_dims=True)
        b_w = tl.sum(tl.where(m_r[:, None], b_sw, 0.0), 0, keep_dims=True)
    if p_m1 is not None:
        if tl.program_id(1) == 0:
            tl.store(p_m1 + i_slot + tl.arange(0, 1), b_m)
            tl.store(p_u1 + i_slot + tl.arange(0, 1), b_u)
        tl.store(p_w1 + i_slot * E + o_e[None, :], b_w, mask=m_e[None, :])


def logits(call: Call) -> torch.Tensor:
    """s (B,H,N) float32."""
    batch, heads, length, width, _ = call.sizes
    s = call.new(batch, heads, length)
    if s.numel():
        logit_kernel[(batch * heads, triton.cdiv(length, POSITIONS))](
            call.q, call.k, s, *call.q.stride(), *call.k.stride(), heads, length, width, call.scale,
            UNIT=call.unit, BN=POSITIONS, BD=COLUMNS, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return s


def scanned(
    call: Call,
    s: torch.Tensor,
    start: State | None,
    end: State | None,
    o: torch.Tensor | None,
    rows: torch.Tensor | None,
    *,
    runs: int,
    block: int,
) -> None:
    """Scan ``runs`` parts of every head, cut at multiples of ``block`` positions, side by side.

    Args:
        call: k and v tell the sizes; its own start is not used.
        s: (B,H,N) logits.
        start: the triple before each part, m (B,H,slots) with at least ``runs`` slots; None if neutral.
        end: filled with the triple behind each part: the part's own, where ``start`` is None.
        o: (B,H,N,E), filled with the outputs, or None.
        rows: (2,B,H,N), filled with m and u of every position, or None; with ``o`` alone.
        runs: parts of a head.
        block: positions of a block, a power of two.
    """
    batch, heads, length, _, value_width = call.sizes
    slots = next((x.m[0, 0].numel() for x in (start, end) if x is not None and x.m.numel()), 1)
    none = (None, None, None)
    scan_kernel[(batch * heads, triton.cdiv(value_width, COLUMNS), runs)](
        s, call.v, *(start or none), *(end or none), o, rows, *call.v.stride(), slots,
        triton.cdiv(triton.cdiv(length, block), runs), batch, heads, length, value_width,
        UNIT=call.unit, BN=block, BE=COLUMNS, num_warps=WARPS, num_stages=1, enable_fp_fusion=False,
        **register_limit(WARPS),
    )  # fmt: skip


def neutral(call: Call) -> State:
    """The triples of the empty set: m, u (B,H) and w (B,H,E)."""
    batch, heads, _, _, value_width = call.sizes
    return State(
        call.new(batch, heads).fill_(-math.inf),
        call.new(batch, heads).zero_(),
        call.new(batch, heads, value_width).zero_(),
    )


def begin(call: Call) -> State:
    """The triples before the first position, in memory of their own."""
    return neutral(call) if call.start is None else State(*(x.clone() for x in call.start))
