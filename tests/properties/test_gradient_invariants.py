"""Invariants of gradients and of every family, put to kernels in plain torch.

Right ones pass all of them, each defect is found by the invariant meant for it. The right ones compute in
float32, differentiate by autograd and round once at the boundary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from attnproof.interface import make_subject
from attnproof.invariance import INVARIANTS, invariants_for, judge_invariant
from attnproof.properties.case import Case
from attnproof.properties.contract import Contract
from attnproof.reports.record import CaseJudged
from attnproof.workers import WorkerPool

Tensor = torch.Tensor
Change = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Defects:
    """What is done to float32 copies of the inputs, to weights and to gradients on their way back."""

    q: Change = unchanged
    k: Change = unchanged
    v: Change = unchanged
    weights: Change = unchanged
    dq: Change = unchanged
    dk: Change = unchanged
    dv: Change = unchanged
    ds: Change = unchanged


def hooked(x: Tensor, change: Change) -> Tensor:
    """``x``, whose gradient is changed."""
    x = x * 1.0
    if x.requires_grad and change is not unchanged:
        x.register_hook(change)
    return x


def opened(q: Tensor, k: Tensor, v: Tensor, d: Defects) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 copies, one key head for each query head."""
    group = q.shape[1] // k.shape[1]
    q, k, v = d.q(hooked(q, d.dq).float()), d.k(hooked(k, d.dk).float()), d.v(hooked(v, d.dv).float())
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def seen_by(s: Tensor, causal: bool) -> Tensor:
    m, n = s.shape[-2:]
    seen = torch.ones(m, n, dtype=torch.bool)
    return (seen.tril(n - m) if causal else seen).expand(s.shape)


def normalised(s: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over what is seen, 0 where that is nothing, and its log-sum-exp."""
    top = s.detach().masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    w = (s - top).masked_fill(~seen, -torch.inf).exp()
    total = w.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return w / total, (top + total.log()).masked_fill(empty, -torch.inf)[..., 0]


def softmax(d: Defects = Defects()) -> Any:
    def kernel(
        q: Any,
        k: Any,
        v: Any,
        *,
        scale: float,
        causal: bool = False,
        bias: Any = None,
        return_lse: bool = False,
    ) -> Any:
        dtype = q.dtype
        q, k, v = opened(q, k, v, d)
        s = (q @ k.mT) * scale
        seen = seen_by(s, causal)
        if bias is not None:
            s, seen = s + bias.float(), seen & (bias > -torch.inf)
        s = hooked(s, d.ds)
        p, lse = normalised(s, seen)
        o = (d.weights(p) @ v).to(dtype)
        return (o, lse) if return_lse else o

    return kernel


def sigmoid(d: Defects = Defects(), exact_slope: bool = True, base: float = math.e) -> Any:
    def kernel(q: Any, k: Any, v: Any, *, scale: float, causal: bool = False, bias: Any = None) -> Any:
        dtype, n = q.dtype, k.shape[2]
        q, k, v = opened(q, k, v, d)
        s = hooked((q @ k.mT) * scale, d.ds) + (-math.log(n, base) if bias is None else bias)
        # torch.sigmoid's own backward computes (1 − y)·y.
        p = torch.nn.functional.logsigmoid(s).exp() if exact_slope else torch.sigmoid(s)
        return (d.weights(p.masked_fill(~seen_by(s, causal), 0.0)) @ v).to(dtype)

    return kernel


def relu(d: Defects = Defects()) -> Any:
    def kernel(
        q: Any, k: Any, v: Any, *, scale: float, causal: bool = False, normalizer: Any = None, power: int = 1
    ) -> Any:
        dtype = q.dtype
        q, k, v = opened(q, k, v, d)
        s = hooked((q @ k.mT) * scale, d.ds)
        p = d.weights(torch.relu(s) ** power).masked_fill(~seen_by(s, causal), 0.0)
        return (p @ v / (1.0 if normalizer is None else normalizer)).to(dtype)

    return kernel


def batch_normalised(d: Defects = Defects(), more: int = 0) -> Any:
    def kernel(
        q: Any, k: Any, v: Any, *, scale: float, eps: float, beta: Any = None, variance: bool = True
    ) -> Any:
        dtype = q.dtype
        q, k, v = opened(q, k, v, d)
        mean = k.sum(2, keepdim=True) / (k.shape[2] + more)
        shift = mean if beta is None else beta.float().reshape(1, -1, 1, 1) * mean
        spread = ((k - mean).square().mean(2, keepdim=True) + eps).sqrt() if variance else 1.0
        s = ((q - shift) / spread) @ ((k - shift) / spread).mT * scale
        p, _ = normalised(hooked(s, d.ds), seen_by(s, False))
        return (d.weights(p) @ v).to(dtype)

    return kernel


def windows(x: Tensor, pool: int, summed: bool) -> Tensor:
    parts = x.split(pool, 1)
    return torch.stack([part.sum(1) if summed else part.mean(1) for part in parts], 1)


def scaled_head(d: Defects = Defects(), summed: bool = False) -> Any:
    def kernel(q: Any, k: Any, v: Any, *, scale: float, pool: tuple[int, ...]) -> Any:
        dtype = q.dtype
        q, k, v = opened(q, k, v, d)
        heads = []
        for h, size in enumerate(pool):
            s = q[:, h] @ windows(k[:, h], size, summed).mT * scale
            p, _ = normalised(hooked(s, d.ds), torch.ones_like(s, dtype=torch.bool))
            heads.append(d.weights(p) @ windows(v[:, h], size, summed))
        return torch.stack(heads, 1).to(dtype)

    return kernel


def differential(d: Defects = Defects(), lam_by: Change = unchanged) -> Any:
    def kernel(q: Any, k: Any, v: Any, lam: Any, *, scale: float, causal: bool = False) -> Any:
        dtype = q.dtype
        q, k, v = opened(q, k, v, d)
        parts = []
        for one, other in zip(q.chunk(2, 3), k.chunk(2, 3), strict=True):
            s = hooked((one @ other.mT) * scale, d.ds)
            parts.append(d.weights(normalised(s, seen_by(s, causal))[0]) @ v)
        return (parts[0] - lam_by(lam.float()).reshape(1, -1, 1, 1) * parts[1]).to(dtype)

    return kernel


def easy(alpha_by: Change = unchanged, outside: float = 0.0) -> Any:
    def kernel(alpha: Any, v: Any, *, band: Any = None) -> Any:
        n = v.shape[2]
        a = alpha_by(alpha.float())
        if band is not None:
            apart = (torch.arange(n)[:, None] - torch.arange(n)).abs() > band
            a = a.masked_fill(apart, 0.0) + outside * a * apart
        return (a @ v.float()).to(v.dtype)

    return kernel


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(jobs=1, spares=0, isolation="none") as made:
        yield made


CONTRACTS = {
    "softmax": Contract("softmax", options=("causal", "bias", "return_lse"), unseen_nonfinite="may-leak"),
    "sigmoid": Contract("sigmoid", options=("causal", "bias"), unseen_nonfinite="may-leak"),
    "relu": Contract("relu", options=("causal", "normalizer", "power"), unseen_nonfinite="may-leak"),
    "batch_normalised": Contract("batch_normalised", options=("beta", "variance")),
    "scaled_head": Contract("scaled_head"),
    "differential": Contract("differential", options=("causal",), unseen_nonfinite="may-leak"),
    "easy": Contract("easy", options=("band",), unseen_nonfinite="may-leak"),
}
SOFTMAX = "softmax:float32:normal:B2,H4,G2,M7,N11,D8,E4:return_lse,cotangents=normal:contiguous:2"
CAUSAL = "softmax:float32:normal:B2,H4,G2,M11,N9,D8,E4:causal,cotangents=normal:contiguous:1"
SIGMOID = "sigmoid:float32:normal:B2,H4,G2,M7,N11,D8,E4:cotangents=normal:contiguous:1"
RELU = "relu:float32:normal:B2,H4,G2,M7,N11,D8,E4:power=2,cotangents=normal:contiguous:1"
NORMALISED = "batch_normalised:float32:normal:B2,H4,G2,M7,N11,D8,E4:beta,cotangents=normal:contiguous:1"
SCALED = "scaled_head:float32:normal:B2,H4,G2,M7,N11,D8,E4:pool=1+2+3+2,cotangents=normal:contiguous:1"
DIFFERENTIAL = "differential:float32:normal:B2,H4,G2,M7,N11,D8,E4:cotangents=normal:contiguous:1"
EASY = "easy:float32:normal:B2,H2,N9,E4:band=3,cotangents=normal:contiguous:1"
# Every family, dtype and mask, once.
HEALTHY = (
    (softmax, SOFTMAX.replace("float32:normal", "float16:large-logits")),
    (softmax, CAUSAL),
    (sigmoid, SIGMOID.replace("float32", "bfloat16")),
    (sigmoid, SIGMOID.replace(":cot", ":causal,cot")),
    (relu, RELU.replace("float32", "float16")),
    (relu, RELU.replace(":power=2", ":causal")),
    (batch_normalised, NORMALISED.replace("float32", "bfloat16")),
    (scaled_head, SCALED.replace("float32", "float16")),
    (differential, DIFFERENTIAL.replace(":cot", ":causal,cot")),
    (easy, EASY),
)


def put(pool: WorkerPool, kernel: Any, name: str, text: str, **declare: Any) -> CaseJudged:
    case = Case.parse(text)
    subject = make_subject(kernel, case.family, None, None, CONTRACTS[case.family], "cpu", declare)
    return judge_invariant(subject, INVARIANTS[name], case, pool.call)


@pytest.mark.parametrize(("made", "text"), HEALTHY, ids=lambda item: item if isinstance(item, str) else "")
def test_a_right_kernel_passes_every_invariant(made: Any, text: str, pool: WorkerPool) -> None:
    family = text.partition(":")[0]
    passed = set()
    for invariant in invariants_for(family, CONTRACTS[family]):
        event = put(pool, made(), invariant.name, text)
        assert event.verdict in ("PASS", "DECLINED"), (invariant.name, event.failures)
        if event.verdict == "PASS":
            passed.add(invariant.name)
            assert (
                "dq" in event.outputs
                or "dv" in event.outputs
                or invariant.name in ("split-merge", "bias-norm")
            )
    assert "gradient-linearity" in passed
    assert len(passed) > 7


def by_place(axis: int) -> Change:
    """Multiplied by 1 … 1.2 along an axis."""

    def change(x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[axis] = x.shape[axis]
        return x * torch.linspace(1.0, 1.2, x.shape[axis]).reshape(shape)

    return change


def by_size(axis: int) -> Change:
    """Larger where an axis is longer."""
    return lambda x: x * (1.0 + x.shape[axis] / 16.0)


def first_of_group(x: Tensor) -> Tensor:
    """The gradient of every other head dropped: the sum over a group is over the wrong heads."""
    return x * (torch.arange(x.shape[1]) % 2 == 0)[:, None, None]


def first_heads_only(q: Any, k: Any, v: Any, *, scale: float, return_lse: bool, **options: Any) -> Any:
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    if k.requires_grad and group > 1:
        k.register_hook(first_of_group)
    return softmax()(q, k, v.repeat_interleave(group, 1), scale=scale, return_lse=return_lse, **options)


# A defect of the gradient alone: the forward pass is right.
BACKWARD: dict[str, tuple[Any, str]] = {
    "gradient-linearity": (softmax(Defects(dq=lambda g: g + 0.1 * g * g)), SOFTMAX),
    "score-shift-gradient": (softmax(Defects(ds=lambda g: g + 0.05 * g.abs())), SOFTMAX),
    "unseen-gradient": (softmax(Defects(dk=lambda g: g + 2.0**-100, dq=lambda g: g + 2.0**-100)), CAUSAL),
    "one-hot-value-gradient": (softmax(Defects(dv=lambda g: 1.02 * g)), SOFTMAX),
    "key-permutation": (softmax(Defects(dk=by_place(2))), SOFTMAX),
    "query-permutation": (softmax(Defects(dq=by_place(2))), SOFTMAX),
    "batch-independence": (softmax(Defects(dv=by_size(0))), SOFTMAX),
    "head-independence": (softmax(Defects(dk=by_size(1))), SOFTMAX),
    "row-independence": (softmax(Defects(dq=by_place(2))), SOFTMAX),
    "grouped-heads": (first_heads_only, SOFTMAX),
    "value-linearity": (softmax(Defects(ds=lambda g: g + 0.1 * g * g)), SOFTMAX),
    "masked-padding": (softmax(Defects(dk=lambda g: g + 1e-3)), CAUSAL),
    "length-padding": (softmax(Defects(dk=lambda g: g * (1.0 + g.shape[2] / 64.0))), CAUSAL),
    "score-shift": (softmax(Defects(ds=lambda g: g + 0.05)), SOFTMAX.replace("return_lse,", "")),
    "saturated-slope": (sigmoid(exact_slope=False), SIGMOID),
    "block-additivity": (sigmoid(Defects(dk=by_place(2))), SIGMOID),
    "positive-homogeneity": (relu(Defects(dk=lambda g: g + 0.1 * g * g)), RELU),
}
FORWARD: dict[str, tuple[Any, str]] = {
    "block-additivity": (sigmoid(Defects(weights=by_place(3))), SIGMOID),
    "bias-norm": (sigmoid(base=2.0), SIGMOID),
    "positive-homogeneity": (relu(Defects(weights=lambda p: p.clamp(max=2.0))), RELU),
    "score-linearity": (easy(lambda a: a + 0.05 * a * a), EASY),
    "common-shift": (batch_normalised(more=1), NORMALISED),
    "constant-windows": (scaled_head(summed=True), SCALED),
    "equal-halves": (differential(lam_by=lambda lam: 0.98 * lam), DIFFERENTIAL),
    "lambda-linearity": (differential(lam_by=lambda lam: lam * lam), DIFFERENTIAL),
    "unseen-gradient": (easy(outside=1e-3), EASY),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_a_defect_of_a_gradient_breaks_the_invariant_meant_for_it(name: str, pool: WorkerPool) -> None:
    kernel, text = BACKWARD[name]
    event = put(pool, kernel, name, text)
    broken = {failure.output for failure in event.failures if failure.rule == name}
    assert broken, event.failures
    assert all(output.startswith("d") for output in broken)


@pytest.mark.parametrize("name", FORWARD)
def test_a_defect_of_a_family_breaks_the_invariant_meant_for_it(name: str, pool: WorkerPool) -> None:
    kernel, text = FORWARD[name]
    event = put(pool, kernel, name, text)
    assert name in {failure.rule for failure in event.failures}, event.failures


def test_only_the_slope_sees_that_its_digits_are_gone(pool: WorkerPool) -> None:
    """(1 − y)·y passes every budget (bugs B63); whoever computes it says so in ``without``."""
    event = put(pool, sigmoid(exact_slope=False), "saturated-slope", SIGMOID)
    assert {failure.rule for failure in event.failures} == {"saturated-slope"}
    contract = CONTRACTS["sigmoid"].declare({"without": "saturated-slope"})
    assert "saturated-slope" not in {one.name for one in invariants_for("sigmoid", contract)}


class Forgetful:
    """dq in other bits after a call with another v."""

    def __init__(self) -> None:
        self.last: float | None = None

    def __call__(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        mark = float(v.detach().double().sum())
        factor = 1.0 if self.last in (None, mark) else 1.0 + 2.0**-23
        self.last = mark
        return softmax(Defects(dq=lambda g: g * factor))(q, k, v, **options)


def test_bits_of_gradients_are_those_of_the_same_call(pool: WorkerPool) -> None:
    event = put(pool, Forgetful(), "determinism", SOFTMAX)
    assert [(failure.rule, failure.output) for failure in event.failures] == [("determinism", "dq")]
    assert "the contract asks for equal values" in event.failures[0].reason


def test_a_kernel_without_gradients_is_not_accused(pool: WorkerPool) -> None:
    @torch.no_grad()
    def forward_only(*tensors: Any, **options: Any) -> Any:
        return softmax()(*tensors, **options)

    for invariant in invariants_for("softmax", CONTRACTS["softmax"]):
        event = put(pool, forward_only, invariant.name, SOFTMAX)
        assert event.verdict in ("PASS", "DECLINED"), (invariant.name, event.failures)
    event = put(pool, forward_only, "gradient-linearity", SOFTMAX)
    assert event.verdict == "DECLINED"
    assert "the kernel returned none" in event.failures[0].reason
    assert put(pool, forward_only, "key-permutation", SOFTMAX).verdict == "PASS"
    declared = CONTRACTS["softmax"].declare({"differentiable": "false"})
    assert not INVARIANTS["gradient-linearity"].applicable(Case.parse(SOFTMAX), declared)
