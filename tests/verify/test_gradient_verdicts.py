"""Verdicts on backward passes: what is missing is named, and rounding every operation must be declared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from attnproof.healthy_gradients import stored_attention
from attnproof.in_process import InProcess
from attnproof.properties.case import Case
from attnproof.properties.contract import Contract, Precision, contract_of
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
    assert (rules[0], rules[-1]) == ("certain", "gradient")


def test_a_soft_cap_that_makes_ds_overflow_on_the_way_leaves_its_row_unjudged() -> None:
    """Autograd multiplies dS of 10^37 by the cap 50 before it divides by it: inf, then NaN."""
    shape = "B1,H7,G1,M2,N2,D16,E16:softcap=50.0,cu_seqlens=0+0+2,cotangents=normal"
    case = Case.parse(f"softmax:bfloat16:large-values:{shape}:transposed:700105664")
    contract = contract_of(stored_attention)
    assert contract is not None
    target = Importable("attnproof.healthy_gradients:stored_attention")
    event = judge_case(Subject("stored", target, contract, "cpu", gradients=True), case, InProcess().call)
    assert event.verdict == "PASS", event.failures
    assert event.unjudged["an intermediate may overflow"]


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
