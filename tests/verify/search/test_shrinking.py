"""Failing calls shrink to ones that a person can work out on paper, and still fail in the same way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from attnproof.properties.case import Case, Inputs
from attnproof.properties.contract import Supports
from attnproof.search.descent import same_failure
from attnproof.search.evidence import Evidence
from attnproof.search.shrinking import shrink
from attnproof.search.smaller_calls import extents, kept, recast, tensors_of
from attnproof.trials import JudgedCall
from tests.verify.search.failing_kernels import BUGS, CountingProbe, subject_of, written

# By bug: a failing case, and the largest M, N, H, D and number of nonzero entries to be left of it.
FOUND = {
    "causal": ("float16:normal:B1,H2,G1,M33,N65,D64,E64:causal,window=30..:transposed:7", (1, 2, 1, 1, 2)),
    "padding": ("float16:normal:B2,H2,G1,M33,N65,D64,E64:causal:contiguous:7", (1, 2, 1, 1, 2)),
    "scale": ("float32:normal:B1,H2,G1,M33,N65,D64,E64:causal,return_lse:contiguous:7", (1, 2, 1, 1, 4)),
    "groups": ("bfloat16:normal:B2,H4,G2,M17,N33,D40,E16:softcap=30.0:sliced:7", (1, 2, 4, 1, 4)),
    "truncated": ("float32:normal:B1,H2,G1,M33,N65,D64,E64:-:contiguous:7", (1, 1, 1, 1, 1)),
    "mutation": ("float32:normal:B1,H2,G1,M33,N65,D64,E64:-:unaligned:7", (1, 1, 1, 1, 1)),
    "tail": ("float16:normal:B1,H2,G1,M33,N129,D64,E64:bias=11mn:contiguous:7", (1, 65, 1, 1, 2)),
    "exception": ("float16:normal:B1,H2,G1,M33,N129,D64,E64:bias=11mn:contiguous:7", (1, 40, 1, 1, 0)),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def found(folder: Path, bug: str) -> tuple[CountingProbe, Evidence]:
    probe = CountingProbe(subject_of(written(folder, bug)))
    case = Case.parse(f"softmax:{FOUND[bug][0]}")
    probe(case)  # imports and warms up, so that the second call takes as long as later ones
    judged = probe(case)
    assert judged.event.verdict == "FAIL", judged.event
    probe.calls = 0
    return probe, Evidence(judged)


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def nonzero(evidence: Evidence) -> int:
    tensors = tensors_of(evidence.case, evidence.inputs)
    return sum(int((tensor != 0).sum()) for tensor in tensors.values())


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_shrinks_to_a_call_that_fits_on_a_line(bug: str, folder: Path) -> None:
    probe, evidence = found(folder, bug)
    steps: list[Evidence] = []
    small = shrink(evidence, probe, deadline=soon(), supports=Supports(), on_progress=steps.append)
    m, n, h, d, entries = FOUND[bug][1]
    sizes = small.case.sizes
    assert sizes["M"] <= m and sizes["N"] <= n and sizes["H"] <= h and sizes["D"] <= d, small.case
    assert nonzero(small) <= entries
    assert small.case.view == "contiguous"
    assert {name for name, _ in small.case.options} <= {"causal"}
    assert small.kind == evidence.kind
    assert probe.calls <= 150
    assert steps[-1] is small
    assert same_failure(evidence, probe(small.case, small.judged.inputs)), "it does not fail again"


def test_nothing_is_tried_after_the_deadline(folder: Path) -> None:
    probe, evidence = found(folder, "causal")
    small = shrink(evidence, probe, deadline=time.monotonic() - 1.0, supports=Supports())
    assert small is evidence
    assert probe.calls == 0


def test_it_ends_in_time_with_the_best_so_far(folder: Path) -> None:
    probe, evidence = found(folder, "groups")
    cost = 0.2

    def slow(case: Case, inputs: Inputs | None = None, **named: object) -> JudgedCall:
        time.sleep(cost)
        return probe(case, inputs, **named)  # type: ignore[arg-type]

    begun = time.monotonic()
    small = shrink(evidence, slow, deadline=begun + 4.0, supports=Supports())
    assert time.monotonic() - begun < 8.0
    assert small is not evidence
    assert probe.calls < 40, "the whole way takes 45"


def test_only_sizes_that_the_kernel_has_are_tried(folder: Path) -> None:
    probe, evidence = found(folder, "scale")
    supports = Supports(head_dims=(16, 64), multiple_of=16, nonempty=True, last_stride_one=True)
    evidence = Evidence(
        probe(Case.parse("softmax:float32:normal:B1,H2,G1,M33,N64,D64,E64:causal:contiguous:7"))
    )
    tried: list[Case] = []

    def watched(case: Case, inputs: Inputs | None = None, **named: object) -> JudgedCall:
        tried.append(case)
        return probe(case, inputs, **named)  # type: ignore[arg-type]

    small = shrink(evidence, watched, deadline=soon(), supports=supports)
    assert small.case["N"] == 16
    assert small.case["D"] == small.case["E"] == 16
    for case in tried:
        assert case["N"] % 16 == 0 and {case["D"], case["E"]} <= {16, 64} and min(case.sizes.values()) >= 1


def as_statistic(judged: JudgedCall) -> JudgedCall:
    """The call with its proof taken for a statistic."""
    event = judged.event
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    failures = []
    for failure in event.failures:
        values = {name: getattr(failure, name) for name in failure.__struct_fields__}
        failures.append(type(failure)(**{**values, "rule": "probable-row"}))
    return dataclasses.replace(judged, event=type(event)(**{**fields, "failures": tuple(failures)}))


def test_a_proof_is_never_traded_for_a_statistic(folder: Path) -> None:
    probe, evidence = found(folder, "causal")
    weaker = as_statistic(evidence.judged)
    assert not same_failure(evidence, weaker)
    assert same_failure(Evidence(weaker), evidence.judged)

    def statistics_only(case: Case, inputs: Inputs | None = None, **named: object) -> JudgedCall:
        judged = probe(case, inputs, **named)  # type: ignore[arg-type]
        return judged if case == evidence.case and inputs is None else as_statistic(judged)

    # Nothing smaller is found, so that all of the time is spent.
    assert shrink(evidence, statistics_only, deadline=soon(6.0), supports=Supports()) is evidence


def test_a_statistical_failure_keeps_the_values_of_its_regime(folder: Path) -> None:
    probe, evidence = found(folder, "causal")
    statistical = Evidence(as_statistic(evidence.judged))

    def statistics_only(case: Case, inputs: Inputs | None = None, **named: object) -> JudgedCall:
        return as_statistic(probe(case, inputs, **named))  # type: ignore[arg-type]

    small = shrink(statistical, statistics_only, deadline=soon(), supports=Supports())
    assert small is not statistical
    assert small.judged.inputs is None


def test_a_result_that_depends_on_earlier_calls_comes_with_the_call_that_must_be_made_first(
    folder: Path,
) -> None:
    probe = CountingProbe(subject_of(written(folder, "memo", memo=True)), isolated=True)
    first = Case.parse("softmax:float32:normal:B1,H2,G1,M5,N9,D8,E8:-:contiguous:3")
    assert probe(first).event.verdict == "PASS"
    evidence = Evidence(probe(dataclasses.replace(first, seed=4)))
    assert evidence.kind == "numeric"
    small = shrink(evidence, probe, deadline=soon(), supports=Supports(), recent=[first])
    assert len(small.history) == 1
    assert small.history[0].shape == small.case.shape
    assert small.case["M"] == 1
    again = probe(small.case, small.judged.inputs, history=small.history)
    assert same_failure(evidence, again)
    assert probe(small.case, small.judged.inputs, fresh=True).event.verdict == "PASS"
    probe.pool.close()


def test_a_failure_that_does_not_come_again_is_left_as_it_was(folder: Path) -> None:
    _, evidence = found(folder, "causal")
    right = CountingProbe(subject_of(written(folder, "right")))
    assert shrink(evidence, right, deadline=soon(), supports=Supports(), recent=[evidence.case]) is evidence


def test_inputs_from_a_search_over_values_are_shrunk_too(folder: Path) -> None:
    """The bug shows at one value alone, which no regime draws."""
    text = (folder / "needs.py").write_text
    text(
        "from kernel_right import attention as right\n\n"
        "def attention(q, k, v, *, scale):\n"
        "    return right(q, k, v, scale=scale) + (v == 3.25).any().to(q.dtype)\n"
    )
    written(folder, "right")
    probe = CountingProbe(subject_of("needs:attention", ()))
    case = Case.parse("softmax:float32:normal:B2,H2,G1,M7,N9,D8,E4:-:transposed:0")
    inputs = recast(case, Evidence(probe(case)).inputs)
    inputs.tensors["v"][1, 0, 4, 2] = 3.25
    evidence = Evidence(probe(case, inputs))
    assert evidence.kind == "numeric"
    small = shrink(evidence, probe, deadline=soon(), supports=Supports())
    v = small.inputs.tensors["v"]
    assert v.flatten().tolist() == [3.25]
    assert nonzero(small) == 1


@pytest.mark.parametrize("axis", ["B", "G", "H/G", "M", "N", "D", "E"])
def test_a_cut_call_has_the_values_of_the_rows_that_were_kept(axis: str) -> None:
    case = Case.parse("softmax:float32:normal:B2,H6,G3,M4,N5,D4,E3:bias=b1mn,sinks:sliced:1")
    inputs = Evidence(JudgedCall(case, None, None, None, {}, None)).inputs  # type: ignore[arg-type]
    last = extents(case)[axis] - 1
    smaller, cut = kept(case, inputs, {axis: [last]})
    assert extents(smaller) == {**extents(case), axis: 1}
    q = {
        "B": inputs.tensors["q"][last:],
        "M": inputs.tensors["q"][:, :, last:],
        "D": inputs.tensors["q"][..., last:],
    }
    heads = {"G": [4, 5], "H/G": [1, 3, 5]}.get(axis, range(6))
    expected = q.get(axis, inputs.tensors["q"][:, list(heads)])
    assert torch.equal(cut.tensors["q"], expected)
    assert cut.tensors["k"].shape == (smaller["B"], smaller["G"], smaller["N"], smaller["D"])
    assert cut.options["sinks"].tolist() == inputs.options["sinks"][list(heads)].tolist()
    assert cut.options["bias"].shape == (smaller["B"], 1, smaller["M"], smaller["N"])
    assert not cut.tensors["q"].is_contiguous() or min(cut.tensors["q"].shape) == 1


def test_a_cut_of_packed_sequences_keeps_each_key_in_its_sequence() -> None:
    case = Case.parse("softmax:float32:normal:B1,H1,G1,M6,N6,D2,E2:cu_seqlens=2+0+4:contiguous:1")
    inputs = Evidence(JudgedCall(case, None, None, None, {}, None)).inputs  # type: ignore[arg-type]
    keep: Sequence[int] = [1, 3, 5]
    smaller, cut = kept(case, inputs, {"N": keep})
    assert smaller.option("cu_seqlens") == (1, 0, 2)
    assert cut.options["cu_seqlens"].tolist() == [0, 1, 1, 3]
    assert torch.equal(cut.tensors["v"], inputs.tensors["v"][:, :, list(keep)])
