"""Verdicts on kernels and runs, from judged cases made by hand."""

from __future__ import annotations

import pytest

from attnproof.campaign import judge_kernel, worst_verdict
from attnproof.properties.contract import Contract
from attnproof.reports.record import CaseJudged, CaseRecord
from attnproof.targets import Importable
from attnproof.trials import Subject

KERNEL = Subject("k", Importable("m:f"), Contract("softmax"), "cpu")
EXAMPLE = Subject("k", Importable("m:f"), Contract("softmax"), "cpu", prediction="unshifted")


def case(verdict: str = "PASS", expected: str = "PASS", vacuous: tuple[str, ...] = ()) -> CaseJudged:
    record = CaseRecord("id", "softmax", "float32", "normal", "plain", {}, {}, "contiguous", 0)
    return CaseJudged("k", record, verdict, expected, vacuous=vacuous)


@pytest.mark.parametrize(
    ("cases", "verdict"),
    [
        ([case()] * 5, "PASS"),
        ([case()] * 99 + [case("FAIL")], "FAIL"),
        ([case()] * 9 + [case("UNVERIFIED")], "UNVERIFIED"),
        ([case("UNVERIFIED"), case("FAIL")], "FAIL"),
        ([case()] * 4 + [case("DECLINED")] * 6, "UNVERIFIED"),
        ([case()] * 5 + [case("DECLINED")] * 5, "PASS"),
        ([case()] * 8 + [case(vacuous=("accuracy: x",))] * 2, "PASS"),
        ([case()] * 7 + [case(vacuous=("accuracy: x",))] * 3, "UNVERIFIED"),
        ([case()] * 7 + [case(vacuous=("mask: x",))] * 3, "PASS"),
        ([], "UNVERIFIED"),
    ],
)
def test_verdict_on_a_kernel(cases: list[CaseJudged], verdict: str) -> None:
    result = judge_kernel(KERNEL, cases)
    assert result.verdict == verdict, result.reason
    assert result.as_expected == (verdict == "PASS")


def test_an_example_must_be_found_out_where_theory_says_and_nowhere_else() -> None:
    found = judge_kernel(EXAMPLE, [case(), case("FAIL", "FAIL")])
    assert (found.verdict, found.as_expected) == ("FAIL", True)
    missed = judge_kernel(EXAMPLE, [case("FAIL", "FAIL"), case("PASS", "FAIL")])
    assert not missed.as_expected
    assert "normal/float32 PASS where FAIL is due (1 cases)" in missed.reason
    accused = judge_kernel(EXAMPLE, [case("FAIL", "FAIL"), case("FAIL", "PASS")])
    assert not accused.as_expected
    assert not judge_kernel(EXAMPLE, [case()]).as_expected


def test_fail_outranks_drift_outranks_unverified_outranks_pass() -> None:
    order = ["PASS", "UNVERIFIED", "DRIFT", "FAIL"]
    for high in range(4):
        for low in range(high + 1):
            assert worst_verdict([order[low], order[high]]) == order[high]
    assert worst_verdict([]) == "PASS"
