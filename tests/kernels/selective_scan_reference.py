"""The selective scan step by step in float64, and how far a kernel may be from it.

Every output and every gradient is a sum of monomials in the inputs, steps, decays and weights. The same loop
on absolute values, with derivatives of absolute values, sums the monomials' magnitudes: M. Run once more,
with every step, decay, weight and gate at the upper end of its own error, it gives M' ≥ M. What remains are
single roundings: at most ``steps`` of them act on a monomial (two a position each way, the sums over D and H,
and those of its factors). So a kernel in float32 may be off by M'(1 + steps·u) − M with u = 2^-24, and its
result by one rounding to the output's dtype. The relative errors in M' are SLACK·(1 + |x|) for a function of
x = delta + delta_bias under softplus, z or δA: its exponential of 2 ulp, the roundings of the argument, and
those of :mod:`attnproof.kernels.activations`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

U = 2.0**-24
ROUNDOFF = {torch.float32: U, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
HALF_SUBNORMAL = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
SLACK = 16 * U
SMALLEST_NORMAL = 2.0**-126
LEAVES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@dataclass(frozen=True)
class Call:
    """One call: its tensors by name, None for those not given, and its options."""

    tensors: dict[str, Tensor | None]
    softplus: bool = True
    zoh: bool = False
    cu_seqlens: tuple[int, ...] | None = None

    def changed(self, **tensors: Tensor) -> Call:
        return replace(self, tensors={**self.tensors, **tensors})

    def sequences(self) -> list[tuple[int, int, int]]:
        """(batch entry, first position, end) of each."""
        batch, _, length = self.tensors["u"].shape
        if self.cu_seqlens is None:
            return [(b, 0, length) for b in range(batch)]
        return [(0, *ends) for ends in itertools.pairwise(self.cu_seqlens)]


def inputs(
    dtype: torch.dtype = torch.float32, *, b: int = 1, h: int = 5, n: int = 70, d: int = 12,
    full: bool = True, cu_seqlens: tuple[int, ...] | None = None, zoh: bool = False,
) -> Call:  # fmt: skip
    """Normal numbers, A between −1 and 0; with every option or none but an initial state."""
    given = {
        "u": torch.randn(b, h, n), "delta": torch.randn(b, h, n), "A": -torch.rand(h, d),
        "B": torch.randn(b, d, n), "C": torch.randn(b, d, n), "D": torch.randn(h),
        "z": torch.randn(b, h, n), "delta_bias": torch.randn(h),
    }  # fmt: skip
    tensors: dict[str, Tensor | None] = {name: x.to(dtype) for name, x in given.items()}
    if not full:
        tensors |= {"delta": given["delta"].abs().to(dtype), "D": None, "z": None, "delta_bias": None}
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    tensors["initial_state"] = torch.randn(sequences, h, d)
    return Call(tensors, softplus=full, zoh=zoh, cu_seqlens=cu_seqlens)


def ratio(x: Tensor) -> Tensor:
    """(eˣ − 1)/x, by its series near 0."""
    near = x.abs() < 1
    inside, outside = torch.where(near, x, 0.0), torch.where(near, 1.0, x)
    series = sum(inside**k / math.factorial(k + 1) for k in range(20))
    return torch.where(near, series, torch.expm1(outside) / outside)


def ratio_slope(x: Tensor) -> Tensor:
    near = x.abs() < 1
    inside, outside = torch.where(near, x, 0.0), torch.where(near, 1.0, x)
    series = sum(inside**k / (math.factorial(k) * (k + 2)) for k in range(20))
    return torch.where(near, series, (outside.exp() * (outside - 1) + 1) / outside**2)


def softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p((-x.abs()).exp())


class Exact:
    """The functions of a step, of float64 tensors."""

    def step(self, raw: Tensor, apply: bool) -> tuple[Tensor, Tensor]:
        step = softplus(raw) if apply else raw
        return step, step

    def decay(self, steps: tuple[Tensor, Tensor], A: Tensor) -> Tensor:
        return (steps[0] * A).exp()

    def weight(self, steps: tuple[Tensor, Tensor], A: Tensor, zoh: bool) -> Tensor:
        return steps[1] * ratio(steps[1] * A) if zoh else steps[1]

    def gate(self, z: Tensor) -> Tensor:
        return z * z.sigmoid()


def stand_in(value: Tensor, *slopes: tuple[Tensor, Tensor]) -> Tensor:
    """``value`` with the given derivatives, (slope, variable)."""
    return value.detach() + sum(slope.detach() * (x - x.detach()) for slope, x in slopes)


class Magnitude:
    """Upper ends of the magnitudes of the same functions and of their derivatives; A is |A| here."""

    def __init__(self, slack: float) -> None:
        self.slack = slack
        self.floor = SMALLEST_NORMAL if slack else 0.0

    def step(self, raw: Tensor, apply: bool) -> tuple[Tensor, Tensor]:
        """A step's lower and upper end."""
        off = self.slack * (1 + raw.abs() if apply else torch.ones_like(raw))
        value, slope = (softplus(raw), raw.sigmoid()) if apply else (raw, torch.ones_like(raw))
        slope = slope * (1 + off) + self.floor
        low, high = value * (1 - off), value * (1 + off) + self.floor
        return stand_in(low, (slope, raw)), stand_in(high, (slope, raw))

    def decay(self, steps: tuple[Tensor, Tensor], A: Tensor) -> Tensor:
        x = steps[0] * A
        value = (-x * (1 - self.slack)).exp() * (1 + self.slack) + self.floor
        return stand_in(value, (A * value, steps[0]), (steps[1] * value, A))

    def weight(self, steps: tuple[Tensor, Tensor], A: Tensor, zoh: bool) -> Tensor:
        low, high = steps
        if not zoh:
            return high
        # an error of x·u in eˣ is one of (eˣ − 1)/x of at most u, as |x| eˣ ≤ 1 − eˣ
        x, up = -low * A, 1 + 2 * self.slack
        slopes = (self.decay(steps, A) * up, high), (high**2 * ratio_slope(x) * up, A)
        return stand_in(high * ratio(x) * up, *slopes)

    def gate(self, z: Tensor) -> Tensor:
        sigmoid = z.sigmoid() * (1 + self.slack * (1 + z.abs())) + self.floor
        slope = sigmoid * (1 + z.abs() * (-z).sigmoid() * (1 + self.slack * (1 + z.abs())))
        return stand_in(z.abs() * sigmoid, (slope, z))


def loop(call: Call, given: dict[str, Tensor], rule: Exact | Magnitude) -> tuple[Tensor, Tensor]:
    """(y, final states) position by position."""
    raw = given["delta"]
    if "delta_bias" in given:
        raw = raw + given["delta_bias"][:, None]
    y = [[] for _ in range(len(given["u"]))]
    ends = []
    for h, (b, start, stop) in zip(given["initial_state"], call.sequences(), strict=True):
        for t in range(start, stop):
            u, steps = given["u"][b, :, t], rule.step(raw[b, :, t, None], call.softplus)
            added = rule.weight(steps, given["A"], call.zoh) * u[:, None] * given["B"][b, :, t]
            h = rule.decay(steps, given["A"]) * h + added
            row = h @ given["C"][b, :, t] + (given["D"] * u if "D" in given else 0)
            y[b].append(row * rule.gate(given["z"][b, :, t]) if "z" in given else row)
        ends.append(h)
    rows = [torch.stack(x, 1) if x else given["u"][0] for x in y]
    return torch.stack(rows) if rows else given["u"] * 1, torch.stack(ends)


Results = dict[str, Tensor]


def results(
    function: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]], tensors: Results, cotangents: list[Tensor]
) -> Results:
    """The outputs and all gradients of ``function``."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y, state = function(leaves)
    found = torch.autograd.grad([y, state], list(leaves.values()), cotangents, allow_unused=True)
    grads = {f"d{name}": g for name, g in zip(leaves, found, strict=True) if g is not None}
    return {"y": y.detach(), "state": state.detach(), **grads}


def run(entry: Any, call: Call, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``entry`` called as the contract says."""
    words = ("u", "delta", "A", "B", "C", "D")
    cu = None if call.cu_seqlens is None else torch.tensor(call.cu_seqlens, dtype=torch.int32)
    return entry(
        *(leaves.get(name) for name in words),
        **{name: leaves[name] for name in LEAVES if name in leaves and name not in words},
        delta_softplus=call.softplus, discretization="zoh" if call.zoh else "euler",
        cu_seqlens=cu, return_state=True,
    )  # fmt: skip


def assert_exact(call: Call, entry: Any) -> Results:
    """Every output and gradient of ``entry`` is within its bound; returns them."""
    given = {name: x for name in LEAVES if (x := call.tensors[name]) is not None}
    dtype = given["u"].dtype
    cotangents = [torch.randn(given["u"].shape).to(dtype), torch.randn(given["initial_state"].shape)]
    got = results(lambda x: run(entry, call, x), given, cotangents)

    double = {name: x.double() for name, x in given.items()}
    exact = results(lambda x: loop(call, x, Exact()), double, [x.double() for x in cotangents])
    signed = ("delta", "delta_bias", "z")
    sizes = {name: x if name in signed else x.abs() for name, x in double.items()}
    both = [x.double().abs() for x in cotangents]
    least, most = (results(lambda x, s=s: loop(call, x, Magnitude(s)), sizes, both) for s in (0.0, SLACK))
    _, heads, length = given["u"].shape
    steps = 4 * length + call.tensors["A"].shape[1] + heads + 30
    for name, reference in exact.items():
        output = given["u"] if name == "y" else given.get(name[1:], given["initial_state"])
        assert got[name].dtype == output.dtype, name
        assert got[name].shape == reference.shape, name
        u = ROUNDOFF[output.dtype]
        bound = (most[name] * (1 + steps * U) - least[name]) * (1 + u)
        bound = bound + u * reference.abs() + HALF_SUBNORMAL[output.dtype]
        off = (got[name].double() - reference).abs()
        assert bool((off <= bound).all()), f"{name} off by {(off / bound).max():.3g} bounds"
    return got
