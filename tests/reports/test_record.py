"""The record: every event survives the file, and what does not fit the schema is refused with its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given

from attnproof.reports.record import (
    SCHEMA_VERSION,
    CaseJudged,
    CaseRecord,
    Event,
    Failure,
    RecordError,
    RecordWriter,
    RunFinished,
    RunStarted,
    decode_event,
    encode_event,
    read_record,
)
from tests.reports.event_strategies import events
from tests.reports.synthetic import build_events


def written_out(value: Any) -> str:
    """``value`` as text, in which NaN equals NaN, and 1 differs from 1.0."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{written_out(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(written_out, value)) + "]"
    return repr(value)


@given(event=events)
def test_every_event_survives_a_line(event: Event) -> None:
    line = encode_event(event)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    again = decode_event(line)
    assert type(again) is type(event)
    assert written_out(msgspec.to_builtins(again)) == written_out(msgspec.to_builtins(event))


def test_a_written_record_is_read_back_in_order(tmp_path: Path) -> None:
    written = list(build_events(60))
    with RecordWriter(tmp_path / "new" / "run.jsonl") as writer:
        for event in written:
            writer.write(event)
    read = list(read_record(tmp_path / "new" / "run.jsonl"))
    assert [written_out(msgspec.to_builtins(event)) for event in read] == [
        written_out(msgspec.to_builtins(event)) for event in written
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_stay_numbers(value: float) -> None:
    event = RunFinished("FAIL", 1, value)
    line = encode_event(event)
    assert b"NaN" not in line and b"Infinity" not in line
    again = decode_event(line)
    assert isinstance(again, RunFinished) and isinstance(again.seconds, float)
    assert again.seconds == value or (math.isnan(value) and math.isnan(again.seconds))


def test_text_that_looks_like_a_number_stays_text() -> None:
    event = Failure(rule="nan", reason="inf", output="-inf", ratio=math.inf, script="nan")
    judged = CaseJudged(
        "k",
        CaseRecord("inf", "softmax", "float16", "nan", "plain", {}, {}, "sliced", 0),
        "FAIL",
        "PASS",
        (event,),
    )
    assert decode_event(encode_event(judged)) == judged


def test_a_field_of_a_later_version_is_passed_over() -> None:
    line = b'{"type":"run-finished","verdict":"PASS","exit_code":0,"seconds":1.5,"mood":"good"}\n'
    assert decode_event(line) == RunFinished("PASS", 0, 1.5)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"type":"run-finished","verdict":"PASS","exit_code":"0","seconds":1.5}\n', "exit_code"),
        (b'{"type":"run-finished","verdict":"PASS","seconds":1.5}\n', "exit_code"),
        (b'{"type":"run-finished","verdict":"PASS","exit_code":"nan","seconds":"nan"}\n', "exit_code"),
        (b'{"type":"run-begun"}\n', "run-begun"),
        (b'{"type":"run-finished",\n', "2"),
    ],
    ids=["wrong-type", "missing", "text-for-number", "unknown-event", "not-json"],
)
def test_a_line_that_does_not_fit_is_refused_with_its_place(tmp_path: Path, line: bytes, named: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(encode_event(RunStarted(SCHEMA_VERSION, "c", "0", "t", 0, {})) + line)
    with pytest.raises(RecordError) as caught:
        list(read_record(path))
    assert f"{path}:2" in str(caught.value)
    assert named in str(caught.value)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(encode_event(RunStarted(SCHEMA_VERSION + 1, "c", "0", "t", 0, {})))
    with pytest.raises(RecordError, match=f"schema {SCHEMA_VERSION + 1}"):
        list(read_record(path))


def test_a_last_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    started, finished = RunStarted(SCHEMA_VERSION, "c", "0", "t", 0, {}), RunFinished("PASS", 0, 1.0)
    path = tmp_path / "run.jsonl"
    path.write_bytes(encode_event(started) + encode_event(finished)[:-9])
    assert list(read_record(path)) == [started]
