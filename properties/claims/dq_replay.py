"""Where the error of dQ comes from, replayed: one backward pass, δ computed in several ways.

A flash kernel's backward has float32 registers and stores its narrow operands: P before P·V and dS before
dS·K. It recomputes P from the stored log-sum-exp (float32) and takes δ = Σ dO∘O from the output O that the
forward stored, in the dtype of the inputs (Dao et al. 2022, Algorithm 4; Dao 2023, Algorithm 2). Here all of
that is plain torch, so that nothing changes from one way to the next but δ, and what is done about it.
docs/dq.md tells what comes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from attnproof.properties.arithmetic import EnclosureArithmetic
from attnproof.properties.arithmetic.base import Enclosure
from attnproof.properties.budgets.base import Budget, dtype_name
from attnproof.properties.budgets.rounding import MEAN_SQUARE, Roundings
from attnproof.properties.contract import Contract
from attnproof.properties.families.gradients import GradientProblem
from attnproof.properties.families.softmax import SOFTMAX, SoftmaxProblem
from attnproof.properties.oracle import evaluate

__all__ = [
    "COTANGENTS",
    "FLOOR",
    "VARIANTS",
    "Call",
    "Certified",
    "Means",
    "certify_call",
    "draw",
    "draw_uniform",
    "eager",
    "fudge_factor",
    "once_rounded",
    "replay",
]

VARIANTS = {
    "stored O": "δ = Σ dO∘O from the O that the forward stored, as flash kernels do",
    "float32 O": "the same from the forward's float32 accumulator, before O is rounded",
    "exact O": "the same from the exact output",
    "Σ p dP": "δ = Σ p dP from the recomputed P",
    "stored O, K centred": "δ from the stored O; dQ −= scale · Σ_j dS · mean of K",
    "stored O, row sum undone": "δ from the stored O; dQ −= scale · Σ_j dS · Σ_j p k",
    "stored O, K and V centred before": "the first, on K and V less their means over keys, rounded again",
}
"""How δ is computed, and what is done about it: the row sum of dS is 0 in exact arithmetic."""

COTANGENTS = ("normal", "ones", "aligned")

FLOOR = 1e-5
"""PyTorch's ``_check_equal`` accepts any error up to this (test/test_transformers.py)."""


@dataclass(frozen=True)
class Means:
    """How inputs lie: standard deviations are 1, but for that of Q, which is ``temperature``.

    Attributes:
        keys, values: the mean of each column of K and of V.
        temperature: of the logits, whose standard deviation it is where keys and queries are normal.
    """

    keys: float = 0.0
    values: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class Call:
    """One call and its cotangents: q (B, H, M, D), k (B, H, N, D), v (B, H, N, E), do (B, H, M, E)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return self.q.dtype


@dataclass(frozen=True, eq=False)
class Certified:
    """The exact results of a call.

    Attributes:
        problem, gradients: the call as a problem, and its gradients as one.
        forward: "o"; dq: the gradient by Q.
    """

    call: Call
    problem: SoftmaxProblem
    gradients: GradientProblem
    forward: Mapping[str, Enclosure]
    dq: Enclosure

    def budget(self, contract: Contract | None = None) -> Budget:
        """The budget of dQ for a kernel under ``contract``; one that declares nothing by default."""
        return self.gradients.budgets({"dq": self.dq, **self._zeros()}, contract or Contract("softmax"))["dq"]

    def _zeros(self) -> dict[str, Enclosure]:
        """Stand-ins for dK and dV, whose own values only their own budgets use."""
        shapes = {name: self.gradients.shape(name) for name in self.gradients.outputs if name != "dq"}
        zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        return {name: Enclosure(zero, zero) for name, zero in zeros.items()}

    def error(self, dq: torch.Tensor) -> torch.Tensor:
        """What ``dq`` errs by, float64 (B, H, M, D)."""
        return dq.double() - self.dq.value

    def weights(self) -> torch.Tensor:
        """P in float64, (B, H, M, N)."""
        scores = self.call.q.double() @ self.call.k.double().mT * self.call.scale
        return torch.softmax(scores, -1)

    def mean_key(self) -> torch.Tensor:
        """Σ_j p k in float64, (B, H, M, D)."""
        return self.weights() @ self.call.k.double()

    def delta_deviation(self, contract: Contract | None = None) -> torch.Tensor:
        """Predicted standard deviation of δ from the stored O, (B, H, M, 1): var(δ) = Σ dO² var(O)."""
        budget = self.problem.budgets(self.forward, contract or Contract("softmax"))["o"]
        return (self.call.do.double().square() * budget.probable.square()).sum(-1, keepdim=True).sqrt()

    def delta_effect(self, contract: Contract | None = None) -> torch.Tensor:
        """Predicted standard deviation of δ's part of dQ, (B, H, M, D): deviation of δ · |scale · Σ p k|."""
        return self.delta_deviation(contract) * (self.call.scale * self.mean_key()).abs()

    def amplification(self) -> float:
        """The closed form of δ's part of dQ over one rounding of dQ, both root mean squares.

        √n · rms(Σ p k)/sd K · rms(O)/sd V, n = 1/Σ p² the number of keys that count: dQ is a mean of n
        deviations of V times deviations of K, δ's part an error of O times a whole mean of K. It takes keys,
        values and cotangents for independent of each other and O's rounding for all of δ's error.
        """
        effective = float((1.0 / self.weights().square().sum(-1)).mean())
        keys = _rms(self.mean_key()) / _rms(_deviation(self.call.k))
        values = _rms(self.forward["o"].value) / _rms(_deviation(self.call.v))
        return math.sqrt(effective) * keys * values

    def measured_amplification(self, dq: torch.Tensor, without: torch.Tensor) -> float:
        """Root mean square of ``dq`` − ``without`` over that of one rounding of the exact dQ."""
        unit = Roundings.of(Contract("softmax"), dtype_name(self.call.dtype)).output
        rounding = unit * math.sqrt(MEAN_SQUARE) * _rms(self.dq.value)
        return _rms(dq.double() - without.double()) / rounding


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def _deviation(x: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each column of ``x`` (B, H, N, X)."""
    return x.double().std(-2)


def draw(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], means: Means, cotangents: str, seed: int
) -> Call:
    """Normal inputs with the given means, and cotangents of :data:`COTANGENTS`.

    ``sizes`` are H, M, N and D = E; B is 1. "aligned" is dO = O, where δ is as large as it can be.
    """
    heads, m, n, d = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(1, heads, rows, d, generator=generator)

    q = (means.temperature * normal(m)).to(dtype)
    k, v = (normal(n) + means.keys).to(dtype), (normal(n) + means.values).to(dtype)
    scale = d**-0.5
    do = {"normal": normal(m), "ones": torch.ones_like(q)}.get(cotangents)
    if do is None:
        do = torch.softmax(q.double() @ k.double().mT * scale, -1) @ v.double()
    return Call(q, k, v, do.to(dtype), scale)


def draw_uniform(dtype: torch.dtype, sizes: tuple[int, int, int, int], scale: float, seed: int) -> Call:
    """PyTorch's own law: q, k, v and the upstream gradient uniform in [0, 1)."""
    heads, m, n, d = sizes
    generator = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.rand(1, heads, rows, d, generator=generator).to(dtype) for rows in (m, n, n, m))
    return Call(q, k, v, do, scale)


def certify_call(call: Call) -> Certified:
    """The exact output and dQ of a call."""
    problem = SOFTMAX.problem(call.q, call.k, call.v, scale=call.scale)
    forward = evaluate(problem, EnclosureArithmetic())
    gradients = GradientProblem(problem, forward, {"o": call.do})
    return Certified(call, problem, gradients, forward, evaluate(gradients, EnclosureArithmetic())["dq"])


def replay(certified: Certified) -> dict[str, torch.Tensor]:
    """dQ (B, H, M, D) in the call's dtype, by :data:`VARIANTS`."""
    call = certified.call
    found = _backward(call, certified.forward["o"].value)
    k, v = ((x.float() - x.float().mean(-2, keepdim=True)).to(call.dtype) for x in (call.k, call.v))
    centred = replace(call, k=k, v=v)
    # dQ needs nothing of the output but δ, and the mean of V that the caller adds to O leaves it as it is.
    found["stored O, K and V centred before"] = _backward(centred, certified.forward["o"].value)["stored O"]
    return {name: found[name].to(call.dtype) for name in VARIANTS}


def _backward(call: Call, exact: torch.Tensor) -> dict[str, torch.Tensor]:
    """dQ in float32, by variant; ``exact`` is the exact output."""
    q, k, v, do = (x.float() for x in (call.q, call.k, call.v, call.do))

    def stored(x: torch.Tensor) -> torch.Tensor:
        return x.to(call.dtype).float()

    s = q @ k.mT * call.scale
    largest = s.amax(-1, keepdim=True)
    unnormalised = torch.exp(s - largest)
    total = unnormalised.sum(-1, keepdim=True)
    o = stored(unnormalised) @ v / total
    p = torch.exp(s - (largest + torch.log(total)))
    dp = do @ v.mT
    outputs = {"stored O": stored(o), "float32 O": o, "exact O": exact.float()}
    delta = {name: (do * x).sum(-1, keepdim=True) for name, x in outputs.items()}
    delta["Σ p dP"] = (p * dp).sum(-1, keepdim=True)
    ds = {name: stored(p * (dp - shift)) for name, shift in delta.items()}
    dq = {name: x @ k * call.scale for name, x in ds.items()}
    usual, left = dq["stored O"], ds["stored O"].sum(-1, keepdim=True) * call.scale
    dq["stored O, K centred"] = usual - left * k.mean(-2, keepdim=True)
    dq["stored O, row sum undone"] = usual - left * (p @ k)
    return dq


def eager(call: Call) -> torch.Tensor:
    """dQ by autograd through matmul, softmax, matmul, each of which rounds its result to the dtype."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (call.q, call.k, call.v))
    o = torch.softmax(q @ k.mT * call.scale, -1) @ v
    (dq,) = torch.autograd.grad(o, (q,), call.do)
    return dq


def once_rounded(certified: Certified) -> torch.Tensor:
    """The exact dQ, rounded once: what PyTorch's math backend returns since 2.5, to a few per cent."""
    return certified.dq.value.to(certified.call.dtype)


def fudge_factor(certified: Certified, dq: torch.Tensor, baseline: torch.Tensor) -> float:
    """The smallest fudge factor with which PyTorch's rule accepts ``dq``.

    The rule: max|golden − dq| ≤ max(1e-5, factor · max|golden − baseline|). 0 where the floor suffices.
    """
    error = float(certified.error(dq).abs().max())
    allowed = float(certified.error(baseline).abs().max())
    if error <= FLOOR:
        return 0.0
    return error / allowed if allowed else math.inf
