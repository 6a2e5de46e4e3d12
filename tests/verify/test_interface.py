"""attnproof.check and attnproof.verify on callables of every kind, with what they declare."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnproof
from attnproof.properties.contract import Contract, ContractError

CASE = attnproof.Case.parse("softmax:float16:normal:B1,H4,G2,M9,N33,D16,E8:causal:contiguous:5")


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool = False
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).float(), v.repeat_interleave(group, 1).float()
    s = q.float() @ k.mT * scale
    if causal:
        m, n = s.shape[-2:]
        s = s.masked_fill(torch.arange(n)[None] > torch.arange(m)[:, None] + n - m, -torch.inf)
    p = torch.softmax(s, -1).nan_to_num(0.0)
    return (p @ v).to(q.dtype)


def checked(fn: object, case: attnproof.Case = CASE, **declared: object) -> attnproof.CheckResult:
    return attnproof.check(fn, case, device="cpu", **declared)  # type: ignore[arg-type]


def test_functions_closures_and_lambdas_are_judged() -> None:
    assert checked(attention).verdict == "PASS"
    assert (
        checked(lambda q, k, v, scale, causal: attention(q, k, v, scale=scale, causal=causal)).verdict
        == "PASS"
    )
    factor = 1.05
    wrong = checked(lambda q, k, v, scale, causal: attention(q, k, v, scale=scale * factor, causal=causal))
    assert wrong.verdict == "FAIL"
    assert not wrong
    assert "certain" in str(wrong)


def test_layout_bnhd() -> None:
    def swapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        o = attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)  # type: ignore[arg-type]
        return o.transpose(1, 2)

    assert checked(swapped, layout="bnhd").verdict == "PASS"
    assert checked(swapped).verdict == "FAIL"
    assert {failure.rule for failure in checked(swapped).failures} <= {"shape", "exception"}


def test_top_left_causal_must_be_declared() -> None:
    def top_left(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, causal: bool
    ) -> torch.Tensor:
        n = q.shape[2]
        return attention(q, k[..., :n, :], v[..., :n, :], scale=scale, causal=causal)

    assert checked(top_left).verdict == "FAIL"
    assert checked(top_left, causal_alignment="top-left").verdict == "PASS"


def test_mutated_inputs_aliases_and_nondeterminism_are_found() -> None:
    def mutates(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        o = attention(q, k, v, **options)  # type: ignore[arg-type]
        q[0, 0, 0, 0] += 1.0
        return o

    def noisy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        o = attention(q, k, v, **options)  # type: ignore[arg-type]
        noisy.calls = getattr(noisy, "calls", 0) + 1  # type: ignore[attr-defined]
        o[0, 0, 0, 0] = torch.nextafter(o[0, 0, 0, 0], o.new_tensor(9.0 * (-1) ** noisy.calls))  # type: ignore[attr-defined]
        return o

    assert "mutation" in {failure.rule for failure in checked(mutates).failures}
    repeated = [attnproof.Case.parse(CASE.id.rsplit(":", 1)[0] + f":{seed}") for seed in range(5, 8)]
    rules = {failure.rule for case in repeated for failure in checked(noisy, case).failures}
    assert "determinism" in rules
    assert all(checked(noisy, case, deterministic=False).verdict == "PASS" for case in repeated)


def test_a_kernel_may_decline() -> None:
    def declines(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        raise NotImplementedError("not today")

    result = checked(declines)
    assert result.verdict == "DECLINED"
    assert result.failures[0].reason == "not today"


def test_isolation_none_judges_the_same() -> None:
    assert checked(attention, isolation="none").verdict == "PASS"


def test_verify_judges_a_plan() -> None:
    result = attnproof.verify(attention, "softmax", dtypes=["float32"], options=["causal"], device="cpu",
                              examples=24, jobs=1, unseen_nonfinite="may-leak")  # fmt: skip
    assert result.verdict == "PASS", result
    assert len(result.results) == 24
    assert result.failures == ()


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is twice what it should be."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dx: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2.0 * dx


def test_verify_asks_for_gradients_too() -> None:
    """A kernel that is wrong in nothing but dq."""

    def doubled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
        return attention(Doubled.apply(q), k, v, scale=scale)

    def verdict(**declared: object) -> attnproof.VerifyResult:
        return attnproof.verify(doubled, "softmax", dtypes=["float32"], device="cpu", examples=16, jobs=1,
                                unseen_nonfinite="may-leak", **declared)  # type: ignore[arg-type]  # fmt: skip

    found = verdict()
    assert found.verdict == "FAIL"
    assert {failure.output for failure in found.failures} == {"dq"}
    assert verdict(differentiable=False).verdict == "PASS"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attnproof.verify(attention, "sofmax"), "sofmax"),
        (lambda: attnproof.verify(attention, "softmax", dtypes=["float31"]), "float31"),
        (lambda: attnproof.verify(attention, "softmax", options=["casual"]), "casual"),
        (lambda: attnproof.verify(attention, "softmax", examples=0), "examples=0"),
        (lambda: attnproof.check(attention, CASE, isolation="some"), "isolation='some'"),
        (lambda: attnproof.check(attention, CASE, contract=Contract("logsumexp")), "logsumexp"),
        (lambda: attnproof.check(attention, CASE, colour="red"), "colour"),
    ],
)
def test_bad_arguments_are_named(call: object, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        call()  # type: ignore[operator]


def test_a_case_that_is_none_is_refused() -> None:
    with pytest.raises(attnproof.CaseError, match="expected FAMILY"):
        attnproof.check(attention, "softmax:float16")
    with pytest.raises(attnproof.CaseError, match="int"):
        attnproof.check(attention, 3)  # type: ignore[arg-type]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="reference"):
        attnproof.refrence  # type: ignore[attr-defined]  # noqa: B018


def test_a_script_without_a_guard_may_call_it(tmp_path: Path) -> None:
    """Judge processes must not run the script again, each starting further ones."""
    script = tmp_path / "script.py"
    script.write_text(
        "import attnproof\n"
        "print('begun')\n"
        "result = attnproof.verify('attnproof.healthy:plain_logsumexp', 'logsumexp', examples=4)\n"
        "print(len(result.results), [f.rule for f in result.failures])\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.splitlines() == ["begun", "4 []"]
