"""Attention as a recurrent network (Aaren): one learned query a head, all prefixes by a scan.

    s_j = scale · q·k_j,   o_t = Σ_{j ≤ t} e^{s_j} v_j / Σ_{j ≤ t} e^{s_j}

(Feng et al., "Attention as an RNN", arXiv 2405.13956; theory 4.2.) The query does not depend on the position,
so that prefixes are built from each other: with m the largest logit so far, u = Σ e^{s_j − m} and
w = Σ e^{s_j − m} v_j, o = w/u, and the triples (m, u, w) form a monoid (:mod:`.prefix_scan_blocks`). The same
outputs come from

* :func:`attention`: block by block, each by ``tl.associative_scan``, then joined with the state before it;
* :func:`recurrent`: position by position, in constant memory beside the outputs;
* :func:`hillis_steele` and :func:`blelloch`: trees of logarithmic depth (:mod:`.prefix_scan_trees`);
* :func:`update`: the state alone, by the tokens of one call: many-to-one.

Everything is float32 but the stored o. No exponential has a positive argument, and u ≥ 1: nothing overflows
that the weighted sum of values does not. The backward pass is that of :mod:`.prefix_scan_backward` for all,
and goes through states: u and w have gradients, m has none, for it only says in what units the two are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from attnproof.kernels.arguments import MAX_HEAD_DIM, check_finite, check_floating
from attnproof.kernels.prefix_scan_backward import gradients
from attnproof.kernels.prefix_scan_blocks import (
    POSITIONS,
    WARPS,
    Call,
    State,
    begin,
    logits,
    neutral,
    scanned,
)
from attnproof.kernels.prefix_scan_trees import by_doubling, by_sweeps
from attnproof.kernels.states import check_initial_state
from attnproof.properties.contract import Contract, ContractError, Precision, Supports, promises

__all__ = ["PREFIX_SCAN", "State", "attention", "blelloch", "hillis_steele", "recurrent", "update"]

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Answer = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Found = tuple[torch.Tensor, State, torch.Tensor, torch.Tensor | None]

PREFIX_SCAN = Contract(
    family="prefix_scan",
    options=("initial_state", "return_state"),
    supports=Supports(max_head_dim=MAX_HEAD_DIM),
    # Everything is held in float32, whatever the inputs are.
    precision=Precision(matmul_input="ieee", probabilities="float32", dscores="float32"),
)


@triton.jit(
    do_not_specialize=[
        *("p_u", "p_w", "p_s", "p_o", "p_rows", "s_qh", "s_qd", "s_kb", "s_kh", "s_kn", "s_kd"),
        *("s_vb", "s_vh", "s_vn", "s_ve", "B", "H", "N", "D", "E"),
    ]
)  # fmt: skip
def recurrent_kernel(
    p_q, p_k, p_v, p_m, p_u, p_w, p_s, p_o, p_rows, s_qh: tl.int64, s_qd: tl.int64,
    s_kb: tl.int64, s_kh: tl.int64, s_kn: tl.int64, s_kd: tl.int64,
    s_vb: tl.int64, s_vh: tl.int64, s_vn: tl.int64, s_ve: tl.int64, B, H, N, D, E, scale,
    BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """All positions of one head; the state in p_m, p_u, p_w is replaced. The rest may be None."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_d, o_e = tl.arange(0, BD), tl.arange(0, BE)
    m_d, m_e = o_d < D, o_e < E
    b_q = tl.load(p_q + i_h * s_qh + o_d * s_qd, mask=m_d, other=0.0).to(tl.float32)
    b_m, b_u = tl.load(p_m + i_bh), tl.load(p_u + i_bh)
    b_w = tl.load(p_w + i_bh * E + o_e, mask=m_e, other=0.0)
    for i_t in range(N):
        i_n = tl.zeros([], dtype=tl.int64) + i_t
        o_k = i_b * s_kb + i_h * s_kh + i_n * s_kn + o_d * s_kd
        o_v = i_b * s_vb + i_h * s_vh + i_n * s_vn + o_e * s_ve
        b_s = tl.sum(b_q * tl.load(p_k + o_k, mask=m_d, other=0.0).to(tl.float32), 0) * scale
        b_v = tl.load(p_v + o_v, mask=m_e, other=0.0).to(tl.float32)
        # the logit is finite, and so is the new maximum
        b_new = tl.maximum(b_m, b_s, propagate_nan=tl.PropagateNan.ALL)
        b_kept, b_taken = tl.exp(b_m - b_new), tl.exp(b_s - b_new)
        b_m, b_u, b_w = b_new, b_u * b_kept + b_taken, b_w * b_kept + b_v * b_taken
        i_row = i_bh * N + i_n
        if p_o is not None:
            tl.store(p_o + i_row * E + o_e, (b_w / b_u).to(p_o.dtype.element_ty), mask=m_e)
        if p_rows is not None:
            tl.store(p_s + i_row, b_s)
            tl.store(p_rows + i_row, b_m)
            tl.store(p_rows + (B * H).to(tl.int64) * N + i_row, b_u)
    tl.store(p_m + i_bh, b_m)
    tl.store(p_u + i_bh, b_u)
    tl.store(p_w + i_bh * E + o_e, b_w, mask=m_e)


def by_blocks(call: Call) -> Found:
    """o, the final state, logits, and m and u of every position if they are kept: block after block."""
    s, o, rows = logits(call), call.outputs(), call.rows()
    end = neutral(call)
    if s.numel():
        scanned(call, s, call.start, end, o, rows, runs=1, block=POSITIONS)
    else:
        end = begin(call)
    return o, end, s, rows


def by_steps(call: Call) -> Found:
    """As :func:`by_blocks`, position after position; logits are stored only if they are kept."""
    batch, heads, length, width, value_width = call.sizes
    o, rows = call.outputs(), call.rows()
    s = call.new(batch, heads, length if call.kept else 0)
    end = begin(call)
    if o.numel():
        recurrent_kernel[(batch * heads,)](
            call.q, call.k, call.v, *end, s, o, rows, *call.q.stride(), *call.k.stride(), *call.v.stride(),
            *call.sizes, call.scale, BD=triton.next_power_of_2(width), BE=triton.next_power_of_2(value_width),
            num_warps=WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return o, end, s, rows


class PrefixScan(torch.autograd.Function):
    """q, k, v and a state before them to o and the state behind; the states' m have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        m: torch.Tensor | None,
        u: torch.Tensor | None,
        w: torch.Tensor | None,
        scale: float,
        form: Callable[[Call], Found],
    ) -> tuple[torch.Tensor, ...]:
        kept = any(ctx.needs_input_grad)
        start = None if m is None or u is None or w is None else State(m, u, w)
        exact, end, s, rows = form(Call(q, k, v, scale, start, kept))
        if kept:
            ctx.save_for_backward(q, k, v, m, s, rows, exact)
        ctx.scale = scale
        ctx.mark_non_differentiable(end.m)
        return exact.to(v.dtype, copy=kept), *end

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor, _: Any, du: torch.Tensor, dw: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        # cotangents of outputs that nobody used come as zeros
        q, k, v, m, s, rows, o = ctx.saved_tensors
        dq, dk, dv, *dstart = gradients((q, k, v), ctx.scale, s, rows, o, do, (du, dw), m)
        found = (dq, dk, dv, None, *dstart, None, None)
        return tuple(x if need else None for x, need in zip(found, ctx.needs_input_grad, strict=True))


def check_sequences(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str) -> None:
    """Raise unless q (H,D), k (B,H,N,D) and v (B,H,N,E) fit together and D, E ≤ 256."""
    for name, x, axes in (("q", q, "(H, D)"), ("k", k, "(B, H, N, D)"), ("v", v, "(B, H, N, E)")):
        check_floating(name, x, kernel)
        if x.ndim != axes.count(",") + 1:
            raise ContractError(f"{kernel}: {name} has shape {tuple(x.shape)}: expected axes {axes}")
        if x.dtype != k.dtype or x.device != k.device:
            raise ContractError(
                f"{kernel}: {name} is {x.dtype} on {x.device} while k is {k.dtype} on {k.device}: "
                "bring all three to one dtype and device"
            )
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape[:3] != v.shape[:3]:
        raise ContractError(f"{kernel}: {shapes}: k and v must agree in batch, heads and length")
    if q.shape != (k.shape[1], k.shape[3]):
        raise ContractError(
            f"{kernel}: {shapes}: q has one query a head of k, (H, D) = {(k.shape[1], k.shape[3])}"
        )
    for name, width in (("H", q.shape[0]), ("D", q.shape[1]), ("E", v.shape[3])):
        if width < 1:
            raise ContractError(f"{kernel}: {shapes}: {name} is 0: expected at least 1")
        if name != "H" and width > MAX_HEAD_DIM:
            raise NotImplementedError(
                f"{kernel}: {shapes}: width {name} is {width}: this kernel goes up to {MAX_HEAD_DIM}"
            )


def checked_state(
    name: str, state: Given | None, k: torch.Tensor, v: torch.Tensor, kernel: str
) -> State | None:
    """``state``, made contiguous, m a constant; raise unless it is None or (m, u, w) for k and v."""
    if state is None:
        return None
    if not isinstance(state, tuple) or len(state) != 3:
        raise ContractError(
            f"{kernel}: {name} is a {type(state).__name__}: expected a tuple (m, u, w), or None"
        )
    shapes = {"m": k.shape[:2], "u": k.shape[:2], "w": (*k.shape[:2], v.shape[3])}
    for x, (part, shape) in zip(state, shapes.items(), strict=True):
        label = f"{part} of {name}"
        if x is None:
            raise ContractError(f"{kernel}: {label} is None: expected float32 of shape {tuple(shape)}")
        check_initial_state(label, x, tuple(shape), k, kernel)
    m, u, w = (x.contiguous() for x in state)
    return State(m.detach(), u, w)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    initial_state: Given | None,
    return_state: bool,
    form: Callable[[Call], Found],
    kernel: str,
) -> Answer:
    """Check a call and compute it by ``form``."""
    check_sequences(q, k, v, kernel)
    check_finite("scale", scale, kernel)
    start = checked_state("initial_state", initial_state, k, v, kernel)
    before = start or (None, None, None)
    o, m, u, w = PrefixScan.apply(q, k, v, *before, float(scale), form)  # type: ignore[no-untyped-call]
    return (o, m, u, w) if return_state else o


@promises(PREFIX_SCAN)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    initial_state: Given | None = None,
    return_state: bool = False,
) -> Answer:
    """Attention of one query a head to every prefix of k and v; differentiable once, through states too.

    Args:
        q: (H,D), the query of every position.
        k, v: (B,H,N,D) and (B,H,N,E); float32, float16 or bfloat16, as q; any strides; D and E from 1 to 256.
        scale: of the logits.
        initial_state: (m, u, w), float32 (B,H), (B,H), (B,H,E): what was seen before the first position; m
            may be −∞ where u and w are 0, which is what None stands for. u and w have gradients, m none.
        return_state: also return the state behind the last position; u and w take cotangents, m none.

    Returns:
        o (B,H,N,E) of v's dtype, or the flat tuple (o, m, u, w).

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return run(q, k, v, scale, initial_state, return_state, by_blocks, "attention")


@promises(PREFIX_SCAN)
def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    initial_state: Given | None = None,
    return_state: bool = False,
) -> Answer:
    """:func:`attention`, one position after the other: its own memory does not grow with N.

    Args:
        q, k, v, scale, initial_state, return_state: as there.

    Returns:
        o (B,H,N,E) of v's dtype, or the flat tuple (o, m, u, w).

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return run(q, k, v, scale, initial_state, return_state, by_steps, "recurrent")


@promises(PREFIX_SCAN)
def hillis_steele(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    initial_state: Given | None = None,
    return_state: bool = False,
) -> Answer:
    """:func:`attention` by Hillis and Steele's scan of all positions: ⌈log₂ N⌉ launches, O(N log N) work.

    Args:
        q, k, v, scale, initial_state, return_state: as there.

    Returns:
        o (B,H,N,E) of v's dtype, or the flat tuple (o, m, u, w).

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return run(q, k, v, scale, initial_state, return_state, by_doubling, "hillis_steele")


@promises(PREFIX_SCAN)
def blelloch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    initial_state: Given | None = None,
    return_state: bool = False,
) -> Answer:
    """:func:`attention` by Blelloch's sweeps over blocks of 16 positions: 2 log₂(N/16) launches, O(N) work.

    Args:
        q, k, v, scale, initial_state, return_state: as there.

    Returns:
        o (B,H,N,E) of v's dtype, or the flat tuple (o, m, u, w).

    Raises:
        ContractError: for arguments that the contract does not allow.
        NotImplementedError: for float64 and for D or E above 256.
    """
    return run(q, k, v, scale, initial_state, return_state, by_sweeps, "blelloch")


def update(state: Given | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> State:
    """The state after further tokens, in constant memory: many-to-one attention is w/u of what comes out.

    Args:
        state: (m, u, w), float32 (B,H), (B,H), (B,H,E), or None for the empty one, (−∞, 0, 0).
        q, k, v: (H,D), (B,H,n,D) and (B,H,n,E) as in :func:`attention`; n may be 1, or any other number.
        scale: of the logits.

    Returns:
        the state of all tokens so far, in new memory and without gradient.

    Raises:
        ContractError: for arguments that the contract does not allow; a state that asks for a gradient too.
        NotImplementedError: for float64 and for D or E above 256.
    """
    check_sequences(q, k, v, "update")
    check_finite("scale", scale, "update")
    given = checked_state("state", state, k, v, "update")
    if given is not None and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ContractError(
            "update: state requires a gradient, and gets none: detach it, or call attention with return_state"
        )
    call = Call(q.detach(), k.detach(), v.detach(), float(scale), given, kept=False)
    batch, heads, length, width, value_width = call.sizes
    end = begin(call)
    if batch * length:
        recurrent_kernel[(batch * heads,)](
            call.q, call.k, call.v, *end, None, None, None, *call.q.stride(), *call.k.stride(),
            *call.v.stride(), *call.sizes, call.scale, BD=triton.next_power_of_2(width),
            BE=triton.next_power_of_2(value_width), num_warps=WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return end
