"""Hypothesis strategies for events of a record: any text, any number, finite or not."""

from __future__ import annotations

from hypothesis import strategies as st

from attnproof.reports.record import (
    SCHEMA_VERSION,
    CaseJudged,
    CaseRecord,
    Counterexample,
    Failure,
    Finding,
    KernelJudged,
    KernelStarted,
    OutputStatistics,
    RunFinished,
    RunStarted,
    Series,
)

__all__ = ["events"]

# Values of free fields, as JSON has them; integers as large as JSON readers keep exactly.
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WHOLE = st.integers(-(2**53), 2**53)
PLAIN = st.none() | st.booleans() | WHOLE | WORDS.filter(lambda text: text not in ("nan", "inf", "-inf"))
TABLES = st.dictionaries(WORDS, PLAIN, max_size=3)
RATIOS = st.floats()
OPTIONS = st.fixed_dictionaries(
    {}, optional={"causal": st.booleans(), "scale": st.floats(), "softcap": st.floats()}
)

cases = st.builds(
    CaseRecord,
    shape=st.dictionaries(st.sampled_from("BHMND"), st.integers(0, 4096)),
    options=OPTIONS,
    seed=WHOLE,
)
statistics = st.builds(
    OutputStatistics,
    elements=st.integers(0, 2**40),
    judged=st.integers(0, 2**40),
    worst_certain=RATIOS,
    worst_probable=RATIOS,
    row_probable=RATIOS,
    rms_probable=RATIOS,
    bias=RATIOS,
    certain_reach=RATIOS,
    worst_threshold=RATIOS,
    logit_magnitude=st.none() | RATIOS,
    arithmetic=st.dictionaries(WORDS, st.integers(0, 2**40), max_size=2),
)
failures = st.builds(
    Failure,
    reason=WORDS,
    index=st.lists(st.integers(0, 4096), max_size=4).map(tuple),
    expected=st.none() | RATIOS,
    radius=st.none() | RATIOS,
    got=st.none() | RATIOS,
    ratio=st.none() | RATIOS,
    detail=WORDS,
    script=WORDS,
)
COLUMNS = st.dictionaries(WORDS, st.lists(RATIOS | WHOLE, max_size=5), max_size=3)
series = st.builds(Series, columns=COLUMNS)
judged = st.builds(
    CaseJudged,
    case=cases,
    verdict=st.sampled_from(["PASS", "FAIL", "UNVERIFIED", "DECLINED"]),
    expected=st.sampled_from(["PASS", "FAIL"]),
    failures=st.lists(failures, max_size=2).map(tuple),
    vacuous=st.lists(WORDS, max_size=2).map(tuple),
    unjudged=st.dictionaries(WORDS, st.integers(0, 2**40), max_size=2),
    outputs=st.dictionaries(st.sampled_from(["o", "lse"]), statistics),
    seconds=RATIOS,
    kernel_seconds=RATIOS,
)
events = st.one_of(
    st.builds(RunStarted, schema=st.just(SCHEMA_VERSION), seed=WHOLE),
    st.builds(KernelStarted, contract=TABLES, planned=WHOLE),
    judged,
    st.builds(
        KernelJudged,
        cases=WHOLE,
        failed=WHOLE,
        vacuous=WHOLE,
        declined=WHOLE,
        unverified=WHOLE,
        seconds=RATIOS,
    ),
    st.builds(
        Counterexample,
        found=cases,
        case=cases,
        verdict=judged,
        sentences=st.lists(WORDS, max_size=2).map(tuple),
        tensors=st.lists(WORDS, max_size=2).map(tuple),
        cases=WHOLE,
        seconds=RATIOS,
        shrinking_seconds=RATIOS,
    ),
    st.builds(Finding, series=st.lists(series, max_size=2).map(tuple)),
    st.builds(RunFinished, exit_code=st.integers(0, 3), seconds=RATIOS),
)
