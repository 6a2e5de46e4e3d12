"""The judge on outputs made by hand: each rule fires where it must, and only there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attnproof.judge import Trial, prepare
from attnproof.properties.case import Case
from attnproof.properties.contract import Contract, Precision

SHAPE = {"B": 1, "H": 2, "G": 1, "M": 12, "N": 20, "D": 16, "E": 8}
CAUSAL = (("causal", True), ("return_lse", True))


def trial(
    regime: str = "normal", dtype: str = "float16", contract: Contract | None = None, **shape: int
) -> Trial:
    case = Case("softmax", dtype, SHAPE | shape, regime, CAUSAL)
    return prepare(case, contract or Contract("softmax", options=("causal", "return_lse")))


def rounded(found: Trial) -> dict[str, torch.Tensor]:
    """The exact outputs, rounded once."""
    dtypes = {"o": found.case.torch_dtype, "lse": torch.float32}
    return {
        name: exact.value.to(dtypes[name])
        for name, exact in found.reference.outputs.items()
        if name in dtypes
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_exact_outputs_rounded_once_pass(dtype: str) -> None:
    found = trial(dtype=dtype)
    judgement = found.judge(rounded(found))
    assert judgement.verdict == "PASS", judgement.failures
    assert judgement.vacuous == ()
    assert judgement.outputs["o"].worst_certain < 1.0


def test_one_wrong_row_among_many_is_found_and_named() -> None:
    found = trial()
    outputs = rounded(found)
    outputs["o"][0, 1, 5] *= 1.05
    (failure, *_) = found.judge(outputs).failures
    assert failure.rule in ("certain", "probable-row")
    assert failure.index[:3] == (0, 1, 5)
    assert "query 5" in failure.reason
    assert "sees 14 of 20 keys (keys 0…13)" in failure.reason
    assert f"expected {failure.expected:.9g} ±" in failure.reason


def test_a_nan_is_never_right_where_a_number_is_asked() -> None:
    found = trial()
    outputs = rounded(found)
    outputs["o"][0, 0, 3, 2] = torch.nan
    (failure,) = found.judge(outputs).failures
    assert failure.rule == "nonfinite"
    assert failure.index == (0, 0, 3, 2)
    assert found.judge(outputs).outputs["o"].worst_certain == torch.inf


def test_rows_without_keys_must_be_exactly_what_is_declared() -> None:
    found = trial(M=30)
    outputs = rounded(found)
    assert found.judge(outputs).verdict == "PASS"
    assert bool((outputs["lse"][..., :10] == -torch.inf).all())
    outputs["o"][0, 0, 0, 0] = 1e-7
    assert [failure.rule for failure in found.judge(outputs).failures] == ["empty-row"]
    declared = Contract("softmax", options=("causal", "return_lse"), empty_row="nan", empty_lse="+inf")
    other = trial(M=30, contract=declared)
    assert {failure.rule for failure in other.judge(rounded(other)).failures} == {"empty-row"}
    outputs = rounded(other)
    outputs["o"][..., :10, :] = torch.nan
    outputs["lse"][..., :10] = torch.inf
    assert other.judge(outputs).verdict == "PASS"


def test_rows_that_see_a_nan_are_unjudged_and_counted() -> None:
    found = trial("seen-nonfinite")
    judgement = found.judge(rounded(found))
    assert judgement.verdict == "PASS", judgement.failures
    assert judgement.unjudged["the row sees a non-finite input"] > 0
    outputs = rounded(found)
    outputs["o"][found.budgets["o"].open] = 1234.0
    assert found.judge(outputs).verdict == "PASS"
    outputs["o"][~found.budgets["o"].open] = 1234.0
    assert found.judge(outputs).verdict == "FAIL"


def test_a_leak_from_an_unseen_nan_is_a_failure_unless_declared() -> None:
    found = trial("unseen-nonfinite")
    outputs = rounded(found)
    assert found.judge(outputs).verdict == "PASS"
    outputs["o"][0, 0, 0] = torch.nan
    assert {failure.rule for failure in found.judge(outputs).failures} == {"nonfinite"}
    leaky = Contract("softmax", options=("causal", "return_lse"), unseen_nonfinite="may-leak")
    assert trial("unseen-nonfinite", contract=leaky).judge(outputs).verdict == "PASS"


def test_lse_is_judged() -> None:
    found = trial()
    outputs = rounded(found)
    outputs["lse"] += 0.3
    assert {failure.output for failure in found.judge(outputs).failures} == {"lse"}


def test_the_weakest_declaration_that_explains_an_error_is_named() -> None:
    found = trial(dtype="float32")
    inputs = found.inputs

    def cut(x: torch.Tensor) -> torch.Tensor:
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    q, k, v = (cut(tensor) for tensor in inputs.tensors.values())
    s = (q @ k.mT * inputs.options["scale"]).masked_fill(~found.problem.seen, -torch.inf)  # type: ignore[attr-defined]
    outputs = {"o": cut(torch.softmax(s, -1)) @ v, "lse": torch.logsumexp(s, -1)}
    failures = found.judge(outputs).failures
    assert any("matmul_input=tf32" in failure.reason for failure in failures if failure.output == "o")
    declared = dataclasses.replace(found.contract, precision=Precision(matmul_input="tf32"))
    assert prepare(found.case, declared).judge(outputs).verdict == "PASS"


def test_the_mean_of_v_passes_only_where_the_case_says_that_it_is_vacuous() -> None:
    for regime in ("normal", "zero-queries", "one-hot"):
        found = trial(regime)
        seen = found.problem.seen.double()  # type: ignore[attr-defined]
        values = found.problem.values().double()  # type: ignore[attr-defined]
        outputs = rounded(found)
        outputs["o"] = ((seen / seen.sum(-1, keepdim=True)) @ values).half()
        judgement = found.judge({"o": outputs["o"]})
        assert (judgement.verdict == "PASS") == any(r.startswith("accuracy") for r in judgement.vacuous), (
            regime
        )


def test_overflow_of_the_output_is_asked_for_and_nothing_else() -> None:
    case = Case("logsumexp", "float16", {"R": 4, "N": 8}, "normal")
    found = prepare(case, Contract("logsumexp"))
    budget = found.budgets["y"]
    exact = found.reference.outputs["y"]
    exact.value[0] = 1e6
    forced = dataclasses.replace(budget, overflow=torch.tensor([True, False, False, False]))
    changed = dataclasses.replace(found, budgets={"y": forced})
    got = exact.value.to(torch.float16)
    assert got[0] == torch.inf
    assert changed.judge({"y": got}).verdict == "PASS"
    got[0] = 65504.0
    assert [failure.rule for failure in changed.judge({"y": got}).failures] == ["nonfinite"]


def test_results_that_coincide_and_are_rounded_alike_have_no_bias() -> None:
    case = Case.parse("softmax_rows:float16:subnormal:R8,N11:-:sliced:1000020")
    found = prepare(case, Contract("softmax_rows"))
    nearest = found.reference.outputs["y"].value.to(torch.float16)
    judgement = found.judge({"y": nearest})
    assert judgement.verdict == "PASS", judgement.failures
    # All of them are rounded down by nearly half a spacing: about the exact results the mean is large.
    assert abs(judgement.outputs["y"].bias) > 1.0


def test_one_rounding_that_all_rows_share_is_no_bias() -> None:
    """The queries' dominant entry is one number, so that rounding q·scale moves every lse by the same."""
    case = Case.parse("softmax:float16:descending:B1,H2,G2,M6,N16,D192,E128:return_lse:transposed:700114246")
    found = prepare(case, Contract("softmax", options=("return_lse",)))
    q, k, v = (tensor.float() for tensor in found.inputs.tensors.values())
    s = (q * found.inputs.options["scale"]).half().float() @ k.mT
    judgement = found.judge({"o": (torch.softmax(s, -1) @ v).half(), "lse": torch.logsumexp(s, -1)})
    assert judgement.verdict == "PASS", judgement.failures
    assert abs(judgement.outputs["lse"].bias) > 1.4


def test_an_output_that_is_always_truncated_is_biased() -> None:
    case = Case.parse("softmax:bfloat16:one-sign-values:B1,H2,G1,M64,N33,D16,E64:-:contiguous:3")
    found = prepare(case, Contract("softmax", dtypes=("bfloat16",)))
    exact = found.reference.outputs["o"].value.to(torch.float32)
    truncated = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
    assert "bias" in {failure.rule for failure in found.judge({"o": truncated}).failures}
