"""RWKV-4's time mixing: per channel, softmax over logits that decay with their distance.

    o_t = (Σ_{s<t} e^{(t−1−s) w + k_s} v_s + e^{u + k_t} v_t) / (Σ_{s<t} e^{(t−1−s) w + k_s} + e^{u + k_t})

(Peng et al., "RWKV", arXiv 2305.13048; theory RWK-1.) The sums over s < t are a scan. A set of positions is
the logit r = k_i of largest exponent, its position i, and b = Σ e^x, a = Σ e^x v with x the exponents less
that largest one. It is the monoid of :mod:`attnproof.kernels.prefix_scan_blocks` with decays: two sets are
compared by (r − r') + (i' − i) w, the difference of their exponents at any one time.

What is kept on purpose:

* The recurrence p' = max(w + p, k) rounds p at every step: at p = 100 a decay of 10⁻⁶ is lost each time, and
  after N steps the weight of k is wrong by N w. Here a set keeps a logit and a position, which are exact, and
  p = r + (t − 1 − i) w is rounded once, where the state is returned.
* Neither (t − 1) w + k nor k − s w is formed: at w = −10³ they have no digits left for k after 10⁴ positions.
* The neutral set has r = −∞ and a = b = 0. Neither −∞ − (−∞) nor, at w = −∞, −∞·0 is formed.

Everything is float32 but the stored o. Both forms share :mod:`attnproof.kernels.rwkv4_backward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import check_floating
from attnproof.kernels.rwkv4_backward import CHANNELS, gradients, lead
from attnproof.kernels.states import check_initial_state
from attnproof.properties.contract import Contract, ContractError, Precision, promises

__all__ = ["RWKV4", "State", "attention", "recurrent"]

INF: tl.constexpr = tl.constexpr(math.inf)
# A tile of the scan, whose five operands are two registers a thread each.
TILE_CHANNELS, TILE_POSITIONS, TILE_WARPS = 4, 64, 4

RWKV4 = Contract(
    family="rwkv4",
    options=("initial_state", "return_state"),
    # Everything is held in float32, whatever the inputs are.
    precision=Precision(matmul_input="ieee", probabilities="float32", dscores="float32"),
)

RUNTIME = [
    *("p_a", "p_b", "p_p", "p_o", "p_rows", "p_places", "s_w", "s_u", "s_kb", "s_kh", "s_kn", "s_vb", "s_vh"),
    *("s_vn", "B", "H", "N"),
]


class State(NamedTuple):
    """Sums a, b scaled by e^−p, and p the largest exponent so far; (B,H) float32 each."""

    a: torch.Tensor
    b: torch.Tensor
    p: torch.Tensor


@triton.jit
def joined(b_r, i_r, b_w, b_b, b_a, b_r2, i_r2, b_w2, b_b2, b_a2):
    """The union of an earlier and a later set; both carry their channel's w."""
    b_lead = lead(b_r, i_r, b_r2, i_r2, b_w2)
    b_c, b_c2 = tl.exp(tl.minimum(b_lead, 0.0)), tl.exp(tl.minimum(-b_lead, 0.0))
    b_top, i_top = tl.where(b_lead >= 0, b_r, b_r2), tl.where(b_lead >= 0, i_r, i_r2)
    return b_top, i_top, b_w2, b_b * b_c + b_b2 * b_c2, b_a * b_c + b_a2 * b_c2


@triton.jit
def outputs(b_r, i_r, b_b, b_a, b_k, b_v, b_w, b_u, i_n):
    """o at position i_n after the set (r, i, b, a), c of the backward pass and the position's own weight."""
    # the set's largest exponent over u + k
    b_lead = lead(b_r, i_r, b_k, i_n - 1, b_w) - b_u
    b_c, b_own = tl.exp(tl.minimum(b_lead, 0.0)), tl.exp(tl.minimum(-b_lead, 0.0))
    b_z = b_b * b_c + b_own
    return (b_a * b_c + b_v * b_own) / b_z, b_c / b_z, b_own / b_z


@triton.jit
def kept_rows(p_rows, p_places, o_row, i_all, m_row, b_r, i_r, b_c, b_own):
    """What the backward pass reads of positions at o_row."""
    tl.store(p_rows + o_row, b_r, mask=m_row)
    tl.store(p_rows + i_all + o_row, b_c, mask=m_row)
    tl.store(p_rows + 2 * i_all + o_row, b_own, mask=m_row)
    tl.store(p_places + o_row, i_r, mask=m_row)


@triton.jit(do_not_specialize=RUNTIME)
def scan_kernel(
    p_w, p_u, p_k, p_v, p_a, p_b, p_p, p_o, p_rows, p_places, s_w: tl.int64, s_u: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, B, H, N,
    BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All positions of a block of channels, a tile at a time; the state in p_a, p_b, p_p is replaced.

    Row t of the scan holds position t − 1, so that what it finds is the set that position t reads, and row N
    the final state.
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
    o_c = tl.arange(0, BN)
    m_h = o_h < H
    o_end = i_b * H + o_h
    # [BH, 1]
    b_w1 = tl.load(p_w + o_h * s_w, mask=m_h, other=0.0).to(tl.float32)[:, None]
    b_u = tl.load(p_u + o_h * s_u, mask=m_h, other=0.0).to(tl.float32)[:, None]
    b_cr = tl.load(p_p + o_end, mask=m_h, other=-INF)[:, None]
    b_cb = tl.load(p_b + o_end, mask=m_h, other=0.0)[:, None]
    b_ca = tl.load(p_a + o_end, mask=m_h, other=0.0)[:, None]
    i_cr = tl.zeros([BH, 1], dtype=tl.int32) - 1
    # [BH, BN]
    b_w = tl.broadcast_to(b_w1, [BH, BN])
    p_k += i_b * s_kb + o_h[:, None] * s_kh
    p_v += i_b * s_vb + o_h[:, None] * s_vh
    for i_t in range(0, N + 1, BN):
        o_t = i_t + o_c
        o_n = o_t.to(tl.int64)[None, :]
        m_past = m_h[:, None] & ((o_t > 0) & (o_t <= N))[None, :]
        m_n = m_h[:, None] & (o_t < N)[None, :]
        b_kp = tl.load(p_k + (o_n - 1) * s_kn, mask=m_past, other=-INF).to(tl.float32)
        b_vp = tl.load(p_v + (o_n - 1) * s_vn, mask=m_past, other=0.0).to(tl.float32)
        b_one = tl.where(m_past, 1.0, 0.0)
        i_past = tl.zeros([BH, BN], dtype=tl.int32) + (o_t - 1)[None, :]
        b_r, i_r, b_w, b_b, b_a = tl.associative_scan((b_kp, i_past, b_w, b_one, b_vp), 1, joined)
        b_r, i_r, b_w, b_b, b_a = joined(b_cr, i_cr, b_w1, b_cb, b_ca, b_r, i_r, b_w, b_b, b_a)
        b_k = tl.load(p_k + o_n * s_kn, mask=m_n, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_n * s_vn, mask=m_n, other=0.0).to(tl.float32)
        b_o, b_c, b_own = outputs(b_r, i_r, b_b, b_a, b_k, b_v, b_w, b_u, o_t[None, :])
        o_row = o_end[:, None] * N + o_n
        tl.store(p_o + o_row, b_o.to(p_o.dtype.element_ty), mask=m_n)
        if p_rows is not None:
            kept_rows(p_rows, p_places, o_row, (B * H).to(tl.int64) * N, m_n, b_r, i_r, b_c, b_own)
        # the last row, or row N, which is the final state
        m_last = (o_t == tl.minimum(i_t + BN - 1, N))[None, :]
        b_cr = tl.sum(tl.where(m_last, b_r, 0.0), 1, keep_dims=True)
        i_cr = tl.sum(tl.where(m_last, i_r, 0), 1, keep_dims=True)
        b_cb = tl.sum(tl.where(m_last, b_b, 0.0), 1, keep_dims=True)
        b_ca = tl.sum(tl.where(m_last, b_a, 0.0), 1, keep_dims=True)
    o_last = o_end[:, None]
    tl.store(p_a + o_last, b_ca, mask=m_h[:, None])
    tl.store(p_b + o_last, b_cb, mask=m_h[:, None])
    tl.store(p_p + o_last, b_cr + lead(0.0, i_cr, 0.0, N - 1, b_w1), mask=m_h[:, None])


@triton.jit(do_not_specialize=RUNTIME)
def recurrent_kernel(
    p_w, p_u, p_k, p_v, p_a, p_b, p_p, p_o, p_rows, p_places, s_w: tl.int64, s_u: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, B, H, N,
    BH: tl.constexpr,
):  # fmt: skip
    """As scan_kernel, one position after the other."""
    i_b = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)
    m_h = o_h < H
    o_end = i_b * H + o_h
    # [BH]
    b_w = tl.load(p_w + o_h * s_w, mask=m_h, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + o_h * s_u, mask=m_h, other=0.0).to(tl.float32)
    b_r = tl.load(p_p + o_end, mask=m_h, other=-INF)
    b_b = tl.load(p_b + o_end, mask=m_h, other=0.0)
    b_a = tl.load(p_a + o_end, mask=m_h, other=0.0)
    i_r = tl.zeros([BH], dtype=tl.int32) - 1
    for i_t in range(N):
        i_n = tl.zeros([], dtype=tl.int64) + i_t
        b_k = tl.load(p_k + i_b * s_kb + o_h * s_kh + i_n * s_kn, mask=m_h, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + i_b * s_vb + o_h * s_vh + i_n * s_vn, mask=m_h, other=0.0).to(tl.float32)
        b_o, b_c, b_own = outputs(b_r, i_r, b_b, b_a, b_k, b_v, b_w, b_u, i_t)
        o_row = o_end * N + i_n
        tl.store(p_o + o_row, b_o.to(p_o.dtype.element_ty), mask=m_h)
        if p_rows is not None:
            kept_rows(p_rows, p_places, o_row, (B * H).to(tl.int64) * N, m_h, b_r, i_r, b_c, b_own)
        i_here = tl.zeros([BH], dtype=tl.int32) + i_t
        b_r, i_r, b_w, b_b, b_a = joined(b_r, i_r, b_w, b_b, b_a, b_k, i_here, b_w, 1.0, b_v)
    tl.store(p_a + o_end, b_a, mask=m_h)
    tl.store(p_b + o_end, b_b, mask=m_h)
    tl.store(p_p + o_end, b_r + lead(0.0, i_r, 0.0, N - 1, b_w), mask=m_h)


def launch_scan(batch: int, heads: int, *arguments: Any) -> None:
    """Tiles of channels and positions."""
    scan_kernel[(batch, triton.cdiv(heads, TILE_CHANNELS))](
        *arguments, BH=TILE_CHANNELS, BN=TILE_POSITIONS, num_warps=TILE_WARPS, num_stages=1,
        enable_fp_fusion=False,
    )  # fmt: skip


def launch_recurrent(batch: int, heads: int, *arguments: Any) -> None:
    """One channel a thread."""
    recurrent_kernel[(batch, triton.cdiv(heads, CHANNELS))](
        *arguments, BH=CHANNELS, num_warps=1, num_stages=1, enable_fp_fusion=False
    )


@dataclass(frozen=True, slots=True)
class Form:
    """A way to the outputs, and the name by which errors call it."""

    name: str
    launch: Callable[..., None]


class TimeMixing(torch.autograd.Function):
    """w, u, k, v and a state before them to o and the state behind; the states' p have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        w: torch.Tensor,
        u: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        p: torch.Tensor | None,
        form: Form,
    ) -> tuple[torch.Tensor, ...]:
        batch, heads, length = k.shape
        kept = any(ctx.needs_input_grad)
        end = begin(None if a is None or b is None or p is None else State(a, b, p), k)
        o = torch.empty(k.shape, dtype=torch.float32 if kept else k.dtype, device=k.device)
        rows = places = None
        if kept:
            rows = torch.empty((3, *k.shape), dtype=torch.float32, device=k.device)
            places = torch.empty(k.shape, dtype=torch.int32, device=k.device)
        if o.numel():
            form.launch(
                batch, heads, w, u, k, v, *end, o, rows, places, w.stride(0), u.stride(0), *k.stride(),
                *v.stride(), batch, heads, length,
            )  # fmt: skip
        if kept:
            ctx.save_for_backward(w, u, k, v, o, rows, places, a, b, p)
        ctx.mark_non_differentiable(end.p)
        return o.to(k.dtype, copy=kept), *end

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor, da: torch.Tensor, db: torch.Tensor, _: Any
    ) -> tuple[torch.Tensor | None, ...]:
        # cotangents of outputs that nobody used come as zeros
        *tensors, o, rows, places, a, b, p = ctx.saved_tensors
        start = None if p is None else (a, b, p)
        found = (*gradients(tuple(tensors), start, o, rows, places, do, (da, db)), None, None)
        return tuple(x if need else None for x, need in zip(found, ctx.needs_input_grad, strict=True))


def begin(start: State | None, k: torch.Tensor) -> State:
    """A copy of ``start``, or the neutral state, in memory of its own."""
    if start is not None:
        return State(*(x.clone() for x in start))
    zero = torch.zeros(k.shape[:2], dtype=torch.float32, device=k.device)
    return State(zero, zero.clone(), torch.full_like(zero, -math.inf))


def check_channels(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str) -> None:
    """Raise unless w, u (H) and k, v (B,H,N) fit together."""
    for name, x, axes in (("w", w, "(H)"), ("u", u, "(H)"), ("k", k, "(B, H, N)"), ("v", v, "(B, H, N)")):
        check_floating(name, x, kernel)
        if x.ndim != axes.count(",") + 1:
            raise ContractError(f"{kernel}: {name} has shape {tuple(x.shape)}: expected axes {axes}")
        if x.dtype != w.dtype or x.device != w.device:
            raise ContractError(
                f"{kernel}: {name} is {x.dtype} on {x.device} while w is {w.dtype} on {w.device}: "
                "bring all four to one dtype and device"
            )
    if k.shape != v.shape:
        raise ContractError(f"{kernel}: k {tuple(k.shape)}, v {tuple(v.shape)}: expected one shape")
    for name, x in (("w", w), ("u", u)):
        if x.shape != k.shape[1:2]:
            raise ContractError(
                f"{kernel}: {name} has shape {tuple(x.shape)} with k {tuple(k.shape)}: expected one number a "
                f"channel, (H,) = {tuple(k.shape[1:2])}"
            )


Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Answer = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def checked_state(state: Given | None, k: torch.Tensor, kernel: str) -> State | None:
    """``state`` with contiguous tensors, p a constant; raise unless it is None or (a, b, p) (B,H)."""
    if state is None:
        return None
    if not isinstance(state, tuple) or len(state) != 3:
        raise ContractError(
            f"{kernel}: initial_state is a {type(state).__name__}: expected a tuple (a, b, p), or None"
        )
    for x, part in zip(state, State._fields, strict=True):
        label = f"{part} of initial_state"
        if x is None:
            raise ContractError(f"{kernel}: {label} is None: expected float32 of shape {tuple(k.shape[:2])}")
        check_initial_state(label, x, tuple(k.shape[:2]), k, kernel)
    a, b, p = (x.contiguous() for x in state)
    return State(a, b, p.detach())


def run(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    initial_state: Given | None,
    return_state: bool,
    form: Form,
) -> Answer:
    """Check a call and compute it by ``form``."""
    check_channels(*tensors, form.name)
    start = checked_state(initial_state, tensors[2], form.name)
    before = start or (None, None, None)
    o, a, b, p = TimeMixing.apply(*tensors, *before, form)  # type: ignore[no-untyped-call]
    return (o, a, b, p) if return_state else o


@promises(RWKV4)
def attention(
    w: torch.Tensor,
    u: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    initial_state: Given | None = None,
    return_state: bool = False,
) -> Answer:
    """RWKV-4's time mixing of k and v by scans of tiles; differentiable once, through states too.

    Args:
        w: (H,) log decays ≤ 0, −inf included.
        u: (H,) what is added to a position's own logit.
        k, v: (B,H,N); float32, float16 or bfloat16, as w and u; any strides.
        initial_state: (a, b, p), float32 (B,H): sums scaled by e^−p, and the largest exponent so far, as the
            first position reads it; p may be −∞ where a and b are 0, which is what None stands for. a and b
            have gradients, p none.
        return_state: also return the state behind the last position; a and b take cotangents, p none.

    Returns:
        o (B,H,N) of w's dtype, or the flat tuple (o, a, b, p).

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64.
    """
    return run((w, u, k, v), initial_state, return_state, Form("attention", launch_scan))


@promises(RWKV4)
def recurrent(
    w: torch.Tensor,
    u: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    initial_state: Given | None = None,
    return_state: bool = False,
) -> Answer:
    """:func:`attention`, one position after the other.

    Args:
        w, u, k, v, initial_state, return_state: as there.

    Returns:
        o (B,H,N) of w's dtype, or the flat tuple (o, a, b, p).

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64.
    """
    return run((w, u, k, v), initial_state, return_state, Form("recurrent", launch_recurrent))
