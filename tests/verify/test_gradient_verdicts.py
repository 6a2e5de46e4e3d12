"""Verdicts on backward passes: what is missing is named, and rounding every operation must be declared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from attnproof.in_process import InProcess
from attnproof.properties.case import Case
from attnproof.properties.contract import Contract, Precision
from attnproof.reports.record import CaseJudged
from attnproof.targets import Importable
from attnproof.trials import Subject, judge_case

REGIMES = ("normal", "uniform", "attention-sink", "off-centre")
DTYPES = ("float16", "bfloat16")


def judged(function: str, case: Case, precision: Precision | None = None) -> CaseJudged:
    contract = Contract("softmax", unseen_nonfinite="may-leak", precision=precision or Precision())
    subject = Subject(function, Importable(f"backward_kernels:{function}"), contract, "cpu", gradients=True)
    return judge_case(subject, case, InProcess().call)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.syspath_prepend(str(request.path.parent))


NORMAL = Case.parse("softmax:float32:normal:B1,H2,G1,M5,N9,D8,E4:cotangents=normal:contiguous:1")


def test_a_gradient_that_is_cut_off_is_named() -> None:
    event = judged("keys_cut_off", NORMAL)
    assert event.verdict == "FAIL"
    (failure,) = event.failures
    assert failure.rule == "gradient"
    assert "reaches k;" in failure.reason


def test_a_wrong_output_comes_before_a_missing_gradient() -> None:
    rules = [failure.rule for failure in judged("mean_of_values", NORMAL).failures]
    assert rules == ["certain", "gradient"]


def cases() -> Iterator[Case]:
    for regime, dtype, kind in itertools.product(REGIMES, DTYPES, ("normal", "ones", "aligned")):
        text = f"softmax:{dtype}:{regime}:B1,H2,G2,M16,N128,D32,E32:cotangents={kind}:contiguous:3"
        yield Case.parse(text)


def test_eager_half_precision_passes_only_where_it_is_declared() -> None:
    """Eager torch rounds scores, weights and their gradients: scores are in float32 by default."""
    accused = []
    for case in cases():
        declared = judged("eager", case, Precision(scores=case.dtype))
        assert declared.verdict == "PASS", (case.id, declared.failures)
        accused += [case.dtype for _ in range(judged("eager", case).verdict == "FAIL")]
    assert {*accused} == {*DTYPES}
