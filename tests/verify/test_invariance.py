"""Invariants put to kernels: correct ones are never accused, each defect is found by its invariant.

Every defect is also put to the judge without the invariant where only the invariant sees it: with the check
switched off, those tests fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from attnproof.healthy import plain_attention
from attnproof.interface import make_subject
from attnproof.invariance import INVARIANTS, invariants_for, judge_invariant
from attnproof.judge import Trial, prepare
from attnproof.kernels.softmax import attention, attention_split
from attnproof.properties.case import Case
from attnproof.properties.contract import Contract, contract_of
from attnproof.properties.invariants import Balance, Call, Plan, Term
from attnproof.properties.regimes import plan
from attnproof.relations import broken, results_of
from attnproof.reports.record import CaseJudged
from attnproof.statistics import thresholds_for
from attnproof.trials import JudgedCall, Subject, judge_case
from attnproof.workers import WorkerPool

Kernel = Callable[..., Any]
OPTIONS = ("causal", "softcap", "bias", "return_lse")
BASE = Case.parse("softmax:float16:normal:B2,H4,G2,M24,N40,D16,E8:return_lse:contiguous:2")
CAUSAL = Case.parse("softmax:float16:normal:B2,H4,G2,M24,N40,D16,E8:causal,return_lse:contiguous:2")


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(jobs=1, spares=0, isolation="none") as made:
        yield made


def subject_of(kernel: Kernel, device: str = "cpu", **declare: Any) -> Subject:
    contract = contract_of(kernel) or Contract("softmax", options=OPTIONS, unseen_nonfinite="may-leak")
    return make_subject(kernel, contract.family, None, None, contract, device, declare)


def put(pool: WorkerPool, kernel: Kernel, name: str, case: Case = BASE, **declare: Any) -> CaseJudged:
    return judge_invariant(subject_of(kernel, **declare), INVARIANTS[name], case, pool.call)


def computed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool = False,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    hidden: float = -torch.inf,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, weights and values in float32, one entry a query head."""
    group = q.shape[1] // k.shape[1]
    s = (q.float() @ k.float().repeat_interleave(group, 1).mT) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.float().clamp(min=hidden)
    if causal:
        m, n = s.shape[-2:]
        s = s.masked_fill(torch.arange(n)[None] > torch.arange(m)[:, None] + n - m, hidden)
    return s, torch.softmax(s, -1).nan_to_num(0.0), v.float().repeat_interleave(group, 1)


def returned(o: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, return_lse: bool) -> Any:
    return (o.to(q.dtype), lse) if return_lse else o.to(q.dtype)


def defect(change: Callable[..., tuple[torch.Tensor, torch.Tensor]], hidden: float = -torch.inf) -> Kernel:
    """A kernel from ``change(s, p, v, q)`` → (o, lse)."""

    def kernel(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
        s, p, values = computed(q, k, v, **options, hidden=hidden)
        return returned(*change(s, p, values, q), q, return_lse)

    return kernel


def lse(s: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(s, -1)


def by_key(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    return (p * torch.linspace(1.0, 1.2, p.shape[-1])) @ v, lse(s)


def by_query(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    return (p @ v) * torch.linspace(1.0, 1.2, p.shape[-2])[:, None], lse(s)


def clipped_scores(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    return torch.softmax(s.clamp(max=1.0), -1) @ v, lse(s)


def bits(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    return p @ v, lse(s) / 0.6931472


def capped_normaliser(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    return p @ v, lse(s).clamp(max=4.3)


def by_head(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    return (p @ v) * torch.linspace(1.0, 1.2, p.shape[1])[:, None, None], lse(s)


def squared(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    return p @ (v + 0.05 * v * v), lse(s)


def enlarged(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    return (p @ v) * 30.0, lse(s)


def scaled(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    return (p @ v) * 1.02, lse(s)


def tail_dropped(s: torch.Tensor, p: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Any:
    if s.shape[-1] % 64:
        p = p * (torch.arange(s.shape[-1]) < s.shape[-1] - 3)
    return p @ v, lse(s)


def interleaved_heads(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
    """Query head h reads key head h mod G."""
    group = q.shape[1] // k.shape[1]
    s, p, values = computed(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), **options)
    return returned(p @ values, lse(s), q, return_lse)


def in_place(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
    s, p, values = computed(q, k, v, **options)
    o = p @ values
    v[0, 0, 0, 0] += 1.0
    return returned(o, lse(s), q, return_lse)


def blind_to_strides(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
    """q's memory read as if it were contiguous."""
    _, h, m, d = q.shape
    s, p, values = computed(q.as_strided(q.shape, (h * m * d, m * d, d, 1)), k, v, **options)
    return returned(p @ values, lse(s), q, return_lse)


@dataclass
class Remembering:
    """One ulp off where the call before had another v: the same call twice in a row shows nothing."""

    last: float | None = None

    def __call__(self, q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
        s, p, values = computed(q, k, v, **options)
        o = (p @ values).to(q.dtype)
        mark = float(v.double().sum())
        if self.last not in (None, mark):
            o = torch.nextafter(o, torch.zeros((), dtype=o.dtype)) if o.dtype == torch.float32 else o * 0.999
        self.last = mark
        return returned(o, lse(s), q, return_lse)


def split_by(axis: int) -> Kernel:
    """Keys in two parts where there is more than one entry on ``axis``: right, in other bits."""

    def kernel(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
        s, p, values = computed(q, k, v, **options)
        half = p.shape[-1] // 2 if q.shape[axis] > 1 else 0
        o = p[..., :half] @ values[..., :half, :] + p[..., half:] @ values[..., half:, :]
        return returned(o, lse(s), q, return_lse)

    return kernel


def scaled_by_the_largest(q: Any, k: Any, v: Any, *, return_lse: bool = False, **options: Any) -> Any:
    """V divided by its largest entry, which lies in the future of most rows: right, in other bits."""
    s, p, values = computed(q, k, v, **options)
    largest = values.abs().amax()
    return returned((p @ (values / largest)) * largest, lse(s), q, return_lse)


F32 = replace(BASE, dtype="float32")
F32_CAUSAL = replace(CAUSAL, dtype="float32")
DEFECTS: dict[str, tuple[Kernel, Case, dict[str, Any]]] = {
    "key-permutation": (defect(by_key), BASE, {}),
    "query-permutation": (defect(by_query), BASE, {}),
    "score-shift": (defect(clipped_scores), BASE, {}),
    "split-merge": (defect(bits), BASE, {}),
    "masked-padding": (defect(lambda s, p, v, q: (p @ v, lse(s)), hidden=-4.0), BASE, {}),
    "key-duplication": (defect(capped_normaliser), BASE, {}),
    "head-independence": (defect(by_head), BASE, {}),
    "grouped-heads": (interleaved_heads, BASE, {}),
    "value-linearity": (defect(squared), BASE, {}),
    "convex-hull": (defect(enlarged), BASE, {}),
    "ones": (defect(scaled), BASE, {}),
    "strides": (blind_to_strides, BASE, {}),
    "length-padding": (defect(tail_dropped), BASE, {}),
}
# Right by every budget: only the bits tell.
BITWISE: dict[str, tuple[Kernel, Case, dict[str, Any]]] = {
    "batch-independence": (split_by(0), F32, {"batch_invariant": True}),
    "row-independence": (split_by(2), replace(F32, seed=3), {"row_invariant": True}),
    "causal-future": (scaled_by_the_largest, F32_CAUSAL, {}),
    "determinism": (Remembering(), F32, {}),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_breaks_the_invariant_meant_for_it(name: str, pool: WorkerPool) -> None:
    kernel, case, declare = DEFECTS[name]
    event = put(pool, kernel, name, case, **declare)
    assert event.verdict == "FAIL"
    (failure,) = [failure for failure in event.failures if failure.rule == name][:1]
    assert failure.ratio is not None
    assert failure.ratio > 1.0
    assert INVARIANTS[name].statement in failure.reason
    assert failure.index
    assert f"INVARIANTS['{name}']" in failure.script
    correct = put(pool, plain_attention, name, case, **declare)
    assert correct.verdict == "PASS", correct.failures


@pytest.mark.parametrize("name", BITWISE)
def test_what_only_bits_tell_is_found_by_the_invariant_alone(name: str, pool: WorkerPool) -> None:
    kernel, case, declare = BITWISE[name]
    subject = subject_of(kernel, **declare)
    assert judge_case(subject, case, pool.call).verdict == "PASS"
    event = judge_invariant(subject, INVARIANTS[name], case, pool.call)
    assert [failure.rule for failure in event.failures] in ([name], [name] * 2), event.failures
    assert "the contract asks for equal values" in event.failures[0].reason


def test_bits_are_asked_only_where_they_are_declared(pool: WorkerPool) -> None:
    for name, declare in (
        ("batch-independence", {}),
        ("row-independence", {}),
        ("causal-future", {"causality": "budget"}),
    ):
        kernel, case, _ = BITWISE[name]
        assert put(pool, kernel, name, case, **declare).verdict == "PASS"
    kernel, case, _ = BITWISE["determinism"]
    assert put(pool, kernel, "determinism", case, deterministic=False).verdict == "DECLINED"


def test_a_mutation_is_told_with_the_invariant(pool: WorkerPool) -> None:
    event = put(pool, in_place, "inputs-unmodified")
    assert event.verdict == "FAIL"
    told = [failure.reason for failure in event.failures if failure.rule == "mutation"]
    assert any(reason.startswith("inputs-unmodified, q, k and v in one storage") for reason in told)


def test_a_leak_is_found_where_it_is_not_declared(pool: WorkerPool) -> None:
    event = put(pool, plain_attention, "masked-padding", CAUSAL, unseen_nonfinite="isolated")
    assert "nonfinite" in {failure.rule for failure in event.failures}
    assert any("NaN and infinite keys appended" in failure.reason for failure in event.failures)
    assert put(pool, plain_attention, "masked-padding", CAUSAL).verdict == "PASS"


def test_a_kernel_that_declines_a_variant_is_not_accused(pool: WorkerPool) -> None:
    def square(q: Any, k: Any, v: Any, **options: Any) -> Any:
        if k.shape[2] != 40:
            raise NotImplementedError("40 keys only")
        return plain_attention(q, k, v, **options)

    event = put(pool, square, "key-duplication")
    assert event.verdict == "DECLINED"
    assert [failure.rule for failure in event.failures] == ["declined"]
    assert "40 keys only" in event.failures[0].reason


def test_what_does_not_apply_is_declined(pool: WorkerPool) -> None:
    event = put(pool, plain_attention, "causal-future")
    assert event.verdict == "DECLINED"
    assert "does not apply" in event.failures[0].reason


def test_a_case_already_judged_is_not_called_again(pool: WorkerPool) -> None:
    from attnproof.trials import judge_call

    subject, calls = subject_of(plain_attention), []

    def counted(request: Any) -> Any:
        calls.append(request)
        return pool.call(request)

    base = judge_call(subject, BASE, counted)
    event = judge_invariant(subject, INVARIANTS["strides"], BASE, counted, base)
    assert event.verdict == "PASS"
    assert len(calls) == 2


HEALTHY = (
    (plain_attention, "cpu", 4),
    (attention, "emulator:sm_90", 3),
    (attention_split, "emulator:sm_90", 2),
)


@pytest.mark.parametrize(
    ("kernel", "device", "count"), HEALTHY, ids=lambda item: getattr(item, "__name__", "")
)
def test_correct_kernels_are_not_accused(kernel: Kernel, device: str, count: int, pool: WorkerPool) -> None:
    subject = subject_of(kernel, device)
    contract = subject.contract
    cases = plan("softmax", dtypes=contract.dtypes, options=contract.options, budget=40, seed=11)
    cases = [case for case in cases if 4 <= case["M"] * case["N"] < 2**12][-count:]
    passed = 0
    for case, invariant in itertools.product(cases, invariants_for("softmax", contract)):
        if invariant.applicable(case, contract):
            event = judge_invariant(subject, invariant, case, pool.call)
            assert event.verdict in ("PASS", "DECLINED"), (invariant.name, case.id, event.failures)
            passed += event.verdict == "PASS"
    assert passed > 10 * count


def judged_with(trial: Trial, outputs: dict[str, torch.Tensor]) -> JudgedCall:
    event = CaseJudged("made by hand", None, "PASS", "PASS")  # type: ignore[arg-type]
    return JudgedCall(trial.case, trial.inputs, event, trial, outputs, None)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_results_that_each_just_pass_cannot_break_a_relation(sign: float) -> None:
    """The worst that two results can do: all rows at their threshold, errors opposed; 2 % more breaks it."""
    case = replace(BASE, options=())
    trial = prepare(case, subject_of(plain_attention).contract)
    contract, budget = trial.contract, trial.budgets["o"]
    assert contract.unseen_nonfinite == "may-leak"
    limits = thresholds_for("softmax", "o", case.dtype, trial.regime_class, case["E"])
    assert limits is not None
    exact = trial.reference.outputs["o"].value
    least = min(limits.row, limits.output)
    plan_of_two = Plan(
        tuple(Call(words, case, trial.inputs) for words in ("one", "two")),
        (Balance((Term(0, "o"), Term(1, "o", -1.0))),),
    )
    for factor, expected in ((0.999, 0), (1.02, 1)):
        error = factor * least * budget.probable
        allowed = bool((error < budget.certain / 2).all())
        assert allowed, "the statistics, not the certain budgets, must be what is tried"
        pair = (exact + error, exact - error)
        results = [
            results_of(call, judged_with(trial, {"o": sign * side + (1 - sign) * exact}))
            for call, side in zip(plan_of_two.calls, pair, strict=True)
        ]
        found = broken(INVARIANTS["strides"], plan_of_two, plan_of_two.relations[0], results)
        assert len(found) == expected
