"""The search as a whole: what it finds, in which phase, and what it says of kernels that are right."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis.database import InMemoryExampleDatabase

import attnproof
from attnproof.campaign import Limits
from attnproof.interface import make_subject
from attnproof.properties.case import Case
from attnproof.properties.contract import Contract
from attnproof.reports.record import CaseJudged, Counterexample, Event, KernelJudged, RunFinished
from attnproof.search.climbing import Stopped, climb, nearness
from attnproof.search.engine import Search
from attnproof.targets import TargetError
from tests.verify.search.failing_kernels import BUGS, MEMO, OPTIONS, RIGHT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules workers find."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def module(folder: Path, name: str, text: str) -> str:
    """``text`` as a module in ``folder``; the target of its kernel."""
    (folder / f"{name}.py").write_text(text)
    return f"{name}:attention"


def search(target: str, **settings: object) -> Search:
    contract = Contract("softmax", options=OPTIONS, unseen_nonfinite="may-leak", differentiable=False)
    subject = make_subject(target, "softmax", None, None, contract, "cpu", {})
    return Search(subject, **{"minimise": False, **settings})  # type: ignore[arg-type]


def _nothing(x: object) -> object:
    """A kernel that is never called."""
    return x


def ended(events: list[Event]) -> tuple[KernelJudged, RunFinished, Counterexample | None]:
    verdict, finished = events[-2], events[-1]
    assert isinstance(verdict, KernelJudged)
    assert isinstance(finished, RunFinished)
    found = [event for event in events if isinstance(event, Counterexample)]
    assert len(found) <= 1
    return verdict, finished, found[0] if found else None


def test_a_right_kernel_passes_through_every_phase(folder: Path) -> None:
    events = list(search(module(folder, "right", RIGHT), examples=260, seconds=None).run())
    verdict, finished, found = ended(events)
    assert (verdict.verdict, finished.exit_code, found) == ("PASS", 0, None), verdict.reason
    assert sum(isinstance(event, CaseJudged) for event in events) == 260


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_each_wrong_kernel_is_found_before_chance_takes_over(bug: str, folder: Path) -> None:
    text = RIGHT
    for old, new in BUGS[bug]:
        text = text.replace(old, new)
    assert text != RIGHT
    verdict, finished, found = ended(list(search(module(folder, f"wrong_{bug}", text), examples=150).run()))
    assert (verdict.verdict, finished.exit_code) == ("FAIL", 1)
    assert found is not None
    assert found.phase in ("opening", "plan", "larger", "invariants")
    assert found.verdict.failures


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Settings with time to shrink on a machine that does other things as well."""
    monkeypatch.setattr("attnproof.search.engine._LONGEST_SHRINKING", 90.0)
    return {"minimise": True, "seconds": None, "examples": 150, "jobs": 1}


def test_a_failure_is_replayed_first_and_forgotten_once_it_is_mended(
    folder: Path, unhurried: dict[str, object]
) -> None:
    database = InMemoryExampleDatabase()
    target = module(folder, "mended", RIGHT.replace(*BUGS["causal"][0]))
    first = ended(list(search(target, database=database, **unhurried).run()))[2]
    assert first is not None
    assert first.sentences
    again = ended(list(search(target, database=database, jobs=1).run()))[2]
    assert again is not None
    assert (again.phase, again.cases) == ("replay", 1)
    assert again.found.id == first.case.id
    module(folder, "mended", RIGHT)
    verdict, _, found = ended(list(search(target, database=database, examples=3, seconds=None).run()))
    assert (verdict.verdict, found) == ("PASS", None)
    assert not any(database.data.values())


def test_a_kernel_that_remembers_is_found_with_the_calls_that_it_takes(
    folder: Path, unhurried: dict[str, object]
) -> None:
    text = MEMO.replace("_memo[key].clone()", "__import__('copy').deepcopy(_memo[key])")
    found = ended(list(search(module(folder, "memo", text), **unhurried).run()))[2]
    assert found is not None
    assert any("earlier" in sentence for sentence in found.sentences), found.sentences


def test_a_search_without_time_for_its_plan_is_unverified(folder: Path) -> None:
    slow = RIGHT.replace("    h, g, m, n =", "    import time; time.sleep(0.5)\n    h, g, m, n =")
    verdict, finished, _ = ended(list(search(module(folder, "slow", slow), seconds=8.0).run()))
    assert (verdict.verdict, finished.exit_code) == ("UNVERIFIED", 3)
    assert "--time" in verdict.reason


def test_a_hanging_kernel_fails_and_ends_the_search(folder: Path) -> None:
    hangs = RIGHT.replace("    i, j =", "    while n > 100: pass\n    i, j =")
    settings = {"limits": Limits(timeout=3.0), "seconds": 40.0}
    verdict, _, found = ended(list(search(module(folder, "hangs", hangs), **settings).run()))
    assert verdict.verdict == "FAIL"
    assert found is not None
    assert {failure.rule for failure in found.verdict.failures} == {"timeout"}


def test_a_target_that_cannot_be_imported_is_no_verdict(folder: Path) -> None:
    with pytest.raises(TargetError, match="no_such_module"):
        list(search("no_such_module:f").run())


def test_the_public_function_gives_the_smallest_input_in_words(folder: Path) -> None:
    target = module(folder, "public", RIGHT.replace(*BUGS["causal"][0]))
    result = attnproof.fuzz(
        target, "softmax", dtypes=["float16"], options=["causal"], device="cpu", seconds=30
    )
    assert not result
    assert result.verdict == "FAIL"
    assert result.counterexample is not None
    case = Case.parse(result.counterexample.case.id)
    assert max(case["M"], case["N"]) <= 4
    assert result.counterexample.sentences[0] in str(result)


def test_the_climb_goes_up() -> None:
    """Told that cases come nearer to failing with N, Hypothesis draws longer ones in the second half."""
    lengths: list[int] = []

    def judge(case: Case) -> CaseJudged:
        if len(lengths) >= 120:
            raise Stopped
        lengths.append(case["N"])
        return _event(case, near=10.0 ** (case["N"] / 50.0 - 4.0))

    with pytest.raises(Stopped):
        climb(make_subject(_nothing, "logsumexp", None, None, None, "cpu", {}), 3, judge)
    first, second = lengths[:30], lengths[30:60]
    assert sum(second) / len(second) > sum(first) / len(first)
    assert max(second) > 100


def _event(case: Case, near: float) -> CaseJudged:
    from attnproof.reports.record import OutputStatistics
    from attnproof.trials import case_record

    statistics = OutputStatistics(1, 1, near, 0.0, 0.0, 0.0, 0.0, 1.0)
    return CaseJudged("k", case_record(case), "PASS", "PASS", outputs={"y": statistics})


def test_nearness_is_the_largest_of_budgets_and_thresholds() -> None:
    case = Case.parse("logsumexp:float32:normal:R1,N3:-:contiguous:0")
    assert nearness(_event(case, 0.4)) == 0.4
    assert nearness(CaseJudged("k", _event(case, 0.1).case, "PASS", "PASS")) == 0.0


def test_the_same_seed_plans_the_same_cases(folder: Path) -> None:
    target = module(folder, "again", RIGHT)
    runs = []
    for _ in range(2):
        events = search(target, examples=20, seconds=None, jobs=1).run()
        runs.append(
            [event.case.id for event in itertools.islice(events, 30) if isinstance(event, CaseJudged)]
        )
    assert runs[0] == runs[1]


def test_a_failure_of_the_diagnosis_itself_loses_no_verdict(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> tuple[str, ...]:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr("attnproof.search.engine.diagnose", broken)
    target = module(folder, "undiagnosed", RIGHT.replace(*BUGS["causal"][0]))
    verdict, finished, found = ended(list(search(target, minimise=True).run()))
    assert (verdict.verdict, finished.exit_code) == ("FAIL", 1)
    assert found is not None
    assert "ZeroDivisionError" in found.sentences[0]
    assert found.script
