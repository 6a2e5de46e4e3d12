"""The delta rule in float64, with gradients by autograd, and how far a kernel that rounds as ours may be off.

Errors of the delta rule do not stay in their component: they are bounded in Frobenius norms, ‖·‖, for one
sequence and head. u = 2^-24; h is the roundoff of matmul operands, 0 for float32 and step by step; one matmul
of n terms, with its decays (2 ulp an exponential; 2|g| for a gate's own rounding, once a position of the
segment, and |g|e^g ≤ 1/e) and scalings is off by w_n = 2h + (n + 3C + 16)·u of the sum of its sizes.

*Forward*, a chunk of C positions (C = 1: the recurrence). What the kernel holds as U solves
(I + L) U = β ∘ (V − (K ∘ e^b) S) − ρ for some ρ: it is an exact recurrence whose step t also adds −k_t ρ_tᵀ,

    ρ ≤ β ∘ (w_D (|K ∘ e^b||S| + |V|)) + w_(D+C) (I + |L|)|T| |β ∘ R|,   |L| from |k_t||k_i|,

the first term R's own error, the second that of L and of forward substitution ((I + L) T̂ = I + Δ with
|Δ| ≤ w (I + |L|)|T̂|), of T and β ∘ R as operands, and of their product. Steps carry errors on by
(I − βkkᵀ) diag(e^g), whose norm is at most λ_t = max(1, |1 − β‖k‖²|). Reading and writing the state adds
w (|Q ∘ e^b||S| + |P||U|) to o and w (|S| + |K ∘ e^{b_C − b}|ᵀ|U|) to S.

*Backward*, step by step in float32: the same, for S' (error e), the cotangent of S (error f), and each of
the products of delta_backward.py.

Products of errors are left out: all bounds are widened by 1/8 in half precision, where w reaches 2^-7 and
|T̂| may exceed |T| by C·w, and by 1 % in float32.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

U32 = 2.0**-24
ROUNDOFF = {torch.float32: U32, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 2.0**-126, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}
NAMES = ("q", "k", "v", "beta", "g", "initial_state")


@dataclass(frozen=True)
class Call:
    """One call: inputs by name, as a kernel gets them, cotangents, and the cuts of a packed row."""

    inputs: dict[str, Tensor | None]
    do: Tensor
    dstate: Tensor
    scale: float = 0.5
    cu_seqlens: Tensor | None = None

    def run(self, entry: Any) -> dict[str, Tensor]:
        """o, the final state and all gradients by ``entry``."""
        leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in self.inputs.items()}
        s0 = leaves["initial_state"]
        o, state = entry(
            *(leaves[name] for name in NAMES[:5]),
            scale=self.scale, initial_state=s0, cu_seqlens=self.cu_seqlens, return_state=True,
        )  # fmt: skip
        there = {name: x for name, x in leaves.items() if x is not None}
        found = torch.autograd.grad([o, state], list(there.values()), [self.do, self.dstate])
        return {"o": o.detach(), "state": state.detach(), **dict(zip(there, found, strict=True))}

    def pieces(self) -> list[tuple[int, slice]]:
        """(batch entry, positions) of each sequence."""
        if self.cu_seqlens is None:
            return [(b, slice(0, self.do.shape[2])) for b in range(self.do.shape[0])]
        return [(0, slice(a, b)) for a, b in itertools.pairwise(self.cu_seqlens.tolist())]


def norm(x: Tensor, axes: int = 2) -> Tensor:
    return x.flatten(-axes).norm(dim=-1)


class Sequence:
    """The recurrence of one sequence, heads first: q, k (H,N,D), v (H,N,E), beta (H,N), a decay (H,N,D)."""

    def __init__(self, call: Call, number: int, chunk: int, half: float) -> None:
        entry, rows = call.pieces()[number]
        inputs = {n: x for n, x in call.inputs.items() if x is not None}
        self.leaves = {
            n: (x[number] if n == "initial_state" else x[entry, :, rows]).detach().double().requires_grad_()
            for n, x in inputs.items()
        }
        self.q, self.k, self.v, self.beta = (self.leaves[n] for n in ("q", "k", "v", "beta"))
        g = self.leaves.get("g")
        # the gradient of exp at −inf is 0·0
        a = torch.ones_like(self.k) if g is None else g.exp()
        self.a = a if a.ndim == 3 else a[..., None].expand(self.k.shape)
        self.heads, self.length, self.width = self.k.shape
        self.value_width, self.scale = self.v.shape[2], call.scale
        self.do, self.dstate = call.do[entry, :, rows].double(), call.dstate[number].double()
        self.chunk, self.half = chunk, half
        self.widened = 1.125 if half else 1.01

    def forward(self) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(self.heads, self.width, self.value_width, dtype=torch.float64, requires_grad=True)
        s = self.leaves.get("initial_state", zeros)
        self.start, self.decayed, self.states, self.read = s, [], [], []
        rows = [torch.zeros_like(self.v[:, :0])]
        for t in range(self.length):
            decayed = self.a[:, t, :, None] * s
            r = self.v[:, t] - (decayed * self.k[:, t, :, None]).sum(1)
            s = decayed + self.beta[:, t, None, None] * self.k[:, t, :, None] * r[:, None]
            rows.append(self.scale * (s * self.q[:, t, :, None]).sum(1)[:, None])
            for x, kept in ((decayed, self.decayed), (s, self.states), (r, self.read)):
                x.retain_grad()
                kept.append(x)
        return torch.cat(rows, 1), s

    def gradients(self) -> dict[str, Tensor]:
        o, s = self.forward()
        ((o * self.do).sum() + (s * self.dstate).sum()).backward()
        return {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in self.leaves.items()}

    def roundoff(self, terms: int) -> float:
        return 2 * self.half + (terms + 3 * self.chunk + 16) * U32

    def forward_errors(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Bounds of o (H,N,E) without its last rounding, of the final state (H,), and of S before each step,
        which the chunks of size 1 of a backward pass need."""
        o_errors, before = [torch.zeros_like(self.v[:, :0])], []
        e = torch.zeros(self.heads, dtype=torch.float64)
        states = [self.start, *self.states]
        for i in range(0, self.length, self.chunk):
            before.append(e)
            o_error, e = self.chunk_errors(slice(i, min(i + self.chunk, self.length)), states[i].abs(), e)
            o_errors.append(o_error)
        return self.widened * torch.cat(o_errors, 1).detach(), self.widened * e, before

    def chunk_errors(self, rows: slice, s: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, a = (x[:, rows].detach() for x in (self.q, self.k, self.v, self.a))
        beta = self.beta[:, rows].detach()
        n = k.shape[1]
        # decays (H,n,n,D) from position i to position t ≥ i, and since the chunk's beginning
        pair = torch.zeros(self.heads, n, n, self.width, dtype=torch.float64)
        for t in range(n):
            pair[:, t, :t] = pair[:, t - 1, :t] * a[:, t, None] if t else 0.0
            pair[:, t, t] = 1.0
        since = a.cumprod(1)
        lower = beta[..., None] * torch.einsum("htc,hic,htic->hti", k, k, pair).tril(-1)
        sizes = beta[..., None] * torch.einsum("htc,hic,htic->hti", k.abs(), k.abs(), pair).tril(-1)
        scores = abs(self.scale) * torch.einsum("htc,hic,htic->hti", q.abs(), k.abs(), pair).tril()
        eye = torch.eye(n, dtype=torch.float64)
        inverse = torch.linalg.inv(eye + lower).abs()
        u = torch.stack([self.beta[:, t, None] * self.read[t] for t in range(rows.start, rows.stop)], 1)
        u = u.detach()
        recalled = (since * k).abs() @ s
        residual = (eye + lower) @ u  # β ∘ R
        rho = beta[..., None] * self.roundoff(self.width) * (recalled + v.abs())
        rho = rho + self.roundoff(self.width + n) * (eye + sizes) @ inverse @ residual.abs()
        growth = (1 - beta * k.square().sum(-1)).abs().clamp(min=1).cumprod(1)
        carried = growth * (e[:, None] + (k.norm(dim=-1) * rho.norm(dim=-1)).cumsum(1))
        held = u.abs() + rho + (beta * k.norm(dim=-1) * carried)[..., None]
        w = self.roundoff(self.width + n)
        o_error = abs(self.scale) * (q.norm(dim=-1) * carried)[..., None]
        o_error = o_error + w * (abs(self.scale) * (since * q).abs() @ s + scores @ held)
        written = since[:, -1, :, None] * s + (pair[:, -1] * k).abs().mT @ held
        return o_error, carried[:, -1] + w * norm(written)

    def backward_errors(self) -> dict[str, Tensor]:
        """Bounds of the gradients, each without its last rounding, of a float32 recurrence (chunk 1)."""
        _, end, before = self.forward_errors()
        after = [*before[1:], end]
        errors: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "beta", "g")}
        u, size = U32, abs(self.scale)
        f = torch.zeros(self.heads, dtype=torch.float64)
        for t in range(self.length - 1, -1, -1):
            s, ds, dsp = norm(self.decayed[t]), norm(self.states[t].grad), norm(self.decayed[t].grad)
            k, v, do = (norm(x[:, t], 1) for x in (self.k, self.v, self.do))
            beta, r = self.beta[:, t], norm(self.read[t], 1)
            # S' is S_{t−1} decayed, with e^g rounded
            e = before[t] + 6 * u * norm(self.states[t - 1] if t else self.start)
            du = norm((self.states[t].grad * self.k[:, t, :, None]).sum(1), 1)
            f = f + 4 * u * (size * norm(self.q[:, t], 1) * do + ds)
            r_error = k * e + (self.width + 2) * u * (s * k + v)
            du_error = k * f + (self.width + 2) * u * ds * k
            errors["q"].append(
                size * do * (after[t] + (self.value_width + 8) * u * (norm(self.states[t]) + k * beta * r))
            )
            errors["k"].append(
                f * beta * r + ds * beta * r_error + e * beta * du + s * beta * du_error
                + (self.value_width + 12) * u * (ds * beta * r + s * beta * du)
            )  # fmt: skip
            errors["v"].append(beta * du_error + 2 * u * beta * du)
            errors["beta"].append(du_error * r + du * r_error + (self.value_width + 8) * u * du * r)
            growth = (1 - beta * k**2).abs().clamp(min=1)
            f = growth * f + beta * k**2 * (self.width + 6) * u * ds + 4 * u * (ds + k * beta * du)
            errors["g"].append(e * dsp + f * s + (self.width + self.value_width + 12) * u * s * dsp)
            f = self.a[:, t].amax(-1) * f + 6 * u * dsp
        stacked = {
            n: torch.stack(x[::-1], 1).detach() if x else torch.zeros(self.heads, 0)
            for n, x in errors.items()
        }
        return {
            **{n: self.widened * x for n, x in stacked.items()},
            "initial_state": self.widened * f.detach(),
        }


def worst(got: Tensor, exact: Tensor, error: Tensor) -> float:
    """The largest error of ``got`` over what is allowed, its last rounding included."""
    if not got.numel():
        return 0.0
    while error.ndim < exact.ndim:
        error = error[..., None]
    allowed = error + ROUNDOFF[got.dtype] * (exact.abs() + error) + TINY[got.dtype]
    ratio = ((got.double() - exact).abs() / allowed).max().item()
    return ratio if ratio == ratio else float("inf")


def ratios(call: Call, got: dict[str, Tensor], chunk: int) -> dict[str, float]:
    """The worst error over bound of each output and gradient of a kernel with chunks of ``chunk``."""
    dtype = call.do.dtype
    half = ROUNDOFF[dtype] if chunk > 1 and dtype != torch.float32 else 0.0
    result: dict[str, float] = dict.fromkeys(got, 0.0)
    for number, (entry, rows) in enumerate(call.pieces()):
        run, back = Sequence(call, number, chunk, half), Sequence(call, number, 1, 0.0)
        o, state = run.forward()
        o_error, state_error, _ = run.forward_errors()
        checks = {"o": (o, o_error), "state": (state, state_error)}
        wanted = back.gradients()
        errors = back.backward_errors()
        checks |= {name: (x, errors[name]) for name, x in wanted.items()}
        for name, (x, error) in checks.items():
            mine = got[name][number] if "state" in name else got[name][entry, :, rows]
            result[name] = max(result[name], worst(mine, x.detach(), error))
    return result
