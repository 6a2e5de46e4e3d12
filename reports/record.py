"""The record of a run: one JSON line an event, in a versioned schema that every report is rendered from.

A record begins with :class:`RunStarted`; it is complete when it ends with :class:`RunFinished`. Lines are
written whole and flushed, so that an interrupted run stays readable up to its last event. Numbers that are
not finite are written as the strings "nan", "inf", "-inf" (JSON has no others).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

__all__ = [
    "SCHEMA_VERSION",
    "CaseJudged",
    "CaseRecord",
    "Counterexample",
    "Event",
    "Failure",
    "Finding",
    "KernelJudged",
    "KernelStarted",
    "OutputStatistics",
    "RecordError",
    "RecordWriter",
    "RunFinished",
    "RunStarted",
    "Series",
    "decode_event",
    "encode_event",
    "read_record",
]

SCHEMA_VERSION = 3


class RecordError(ValueError):
    """A record that cannot be read: the message names the file, the line and the field."""


class CaseRecord(msgspec.Struct, frozen=True):
    """A case, by which its inputs can be made again.

    Attributes:
        id: the canonical text, parsed by ``attnproof.properties.case.Case.parse``.
        regime_class: class of the regime for thresholds ("plain", "tied", "extreme", "exact", ...).
        shape: sizes by symbol, such as {"B": 1, "H": 2, "M": 128, "N": 128, "D": 64}.
        options: optional keywords, as plain values.
        view: how the inputs lie in memory ("contiguous", "sliced", "transposed", "broadcast").
    """

    id: str
    family: str
    dtype: str
    regime: str
    regime_class: str
    shape: dict[str, int]
    options: dict[str, Any]
    view: str
    seed: int


class OutputStatistics(msgspec.Struct, frozen=True):
    """How far one output ("o", "lse", ...) was from the certified reference, as dimensionless ratios.

    Attributes:
        elements, judged: number of elements, and of those that the contract lets be judged.
        worst_certain: largest error/certain; above 1 proves a defect.
        worst_probable: largest error/probable of one element.
        row_probable: largest row rms of error/probable; rms_probable: rms over the whole output.
        bias: mean signed error/probable, away from zero positive.
        certain_reach: largest certain budget over gauge, what this case could at best reveal.
        worst_threshold: largest statistic over the threshold that healthy kernels stay below; above 1 fails.
        logit_magnitude: largest |logit| that entered, None where the family has none.
        arithmetic: rows by the arithmetic that certified them ("float64", "arb-128", ...).
    """

    elements: int
    judged: int
    worst_certain: float
    worst_probable: float
    row_probable: float
    rms_probable: float
    bias: float
    certain_reach: float
    worst_threshold: float = 0.0
    logit_magnitude: float | None = None
    arithmetic: dict[str, int] = {}


class Failure(msgspec.Struct, frozen=True):
    """One broken rule in one case.

    Attributes:
        rule: "certain", "probable-row", "probable-output", "bias", "nonfinite", "empty-row", "shape",
            "mutation", "aliasing", "determinism", "exception", "crash", "timeout", "memory", "output-flood",
            ...
        reason: in words: row, key positions that matter, expected value with radius, got, error over budget.
        output: the output concerned, or "".
        index: its position in that output, or empty.
        expected, radius, got, ratio: of the worst element, where there is one.
        detail: longer text: traceback, captured output.
        script: a stand-alone script that shows the failure.
    """

    rule: str
    reason: str
    output: str = ""
    index: tuple[int, ...] = ()
    expected: float | None = None
    radius: float | None = None
    got: float | None = None
    ratio: float | None = None
    detail: str = ""
    script: str = ""


class RunStarted(msgspec.Struct, frozen=True, tag="run-started"):
    """First event: what was run, where, with which versions."""

    schema: int
    command: str
    version: str
    started: str
    seed: int
    platform: dict[str, str]


class KernelStarted(msgspec.Struct, frozen=True, tag="kernel-started"):
    """A kernel comes under judgement; an ``example`` is a naive variant that must be found out."""

    kernel: str
    target: str
    family: str
    device: str
    contract: dict[str, Any]
    example: bool
    planned: int


class CaseJudged(msgspec.Struct, frozen=True, tag="case-judged"):
    """The verdict on one case. ``expected`` is the verdict that the suite lists for it, PASS unless listed.

    Attributes:
        verdict: PASS, FAIL, UNVERIFIED or DECLINED (the kernel raised NotImplementedError).
        vacuous: properties that this case cannot tell a wrong kernel by, each with the reason.
        unjudged: elements that the contract leaves open, by reason.
        invariant: name of the invariant that was put to the kernel at this case, "" for the case itself.
    """

    kernel: str
    case: CaseRecord
    verdict: str
    expected: str
    failures: tuple[Failure, ...] = ()
    vacuous: tuple[str, ...] = ()
    unjudged: dict[str, int] = {}
    outputs: dict[str, OutputStatistics] = {}
    seconds: float = 0.0
    kernel_seconds: float = 0.0
    invariant: str = ""


class KernelJudged(msgspec.Struct, frozen=True, tag="kernel-judged"):
    """The verdict on a kernel over all its cases.

    ``as_expected`` says whether every case came out as listed.
    """

    kernel: str
    verdict: str
    as_expected: bool
    reason: str
    cases: int
    failed: int
    vacuous: int
    declined: int
    unverified: int
    seconds: float


class Series(msgspec.Struct, frozen=True):
    """Numbers for a plot: columns of equal length. ``chart`` is "line", "scatter", "histogram" or "table".

    ``x``, ``y`` and ``color`` name columns, ``log`` those drawn on log axes. A histogram whose ``y`` names no
    column is counted by the report; its column "threshold", if it has one, is drawn as vertical lines.
    """

    title: str
    chart: str
    columns: dict[str, list[Any]]
    x: str
    y: str
    color: str = ""
    log: tuple[str, ...] = ()


class Counterexample(msgspec.Struct, frozen=True, tag="counterexample"):
    """A failure made small by a search, with what is wrong in words.

    Attributes:
        found: the case in which the failure was found; case: the smallest in which it still shows.
        verdict: the judged smallest case.
        sentences: what is wrong, most specific first.
        script: a stand-alone script that shows it.
        tensors: the inputs in words where they are not the case's own, such as "q: 1 of 4 entries is not 0".
        phase: "replay", "opening", "plan", "larger", "invariants", "random" or "climbing".
        invariant: name of the invariant that is broken, or "".
        cases: judged before and with the failing one; seconds: from the start to the failure;
            shrinking_seconds: from there to the smallest case.
    """

    kernel: str
    found: CaseRecord
    case: CaseRecord
    verdict: CaseJudged
    sentences: tuple[str, ...]
    script: str
    tensors: tuple[str, ...] = ()
    phase: str = ""
    invariant: str = ""
    cases: int = 0
    seconds: float = 0.0
    shrinking_seconds: float = 0.0


class Finding(msgspec.Struct, frozen=True, tag="finding"):
    """A fact established by the run that is not about one kernel: a claim checked, a calibration.

    Attributes:
        verdict: HOLDS, SUPPORTED, REFUTED, CONDITIONAL or OPEN; UNVERIFIED where the check itself failed.
        id: of a claim of the ledger, such as "SPL-6"; empty for other findings, as all that follows.
        subject: heading of the ledger; kind: of evidence; covers: other ids that it settles.
        counterexample: of a refuted or conditional claim, in lines.
        command: that computes the finding again; seconds: that this took.
        seed: of what was drawn at random.
    """

    name: str
    verdict: str
    statement: str
    source: str
    evidence: str
    series: tuple[Series, ...] = ()
    id: str = ""
    subject: str = ""
    kind: str = ""
    covers: tuple[str, ...] = ()
    counterexample: str = ""
    command: str = ""
    seconds: float = 0.0
    seed: int | None = None


class RunFinished(msgspec.Struct, frozen=True, tag="run-finished"):
    """Last event: verdict and exit code of the run (0 PASS, 1 FAIL or DRIFT, 2 usage, 3 UNVERIFIED)."""

    verdict: str
    exit_code: int
    seconds: float
    reason: str = ""


Event = RunStarted | KernelStarted | CaseJudged | KernelJudged | Counterexample | Finding | RunFinished

_decoder = msgspec.json.Decoder(Event)


def _plain(value: Any) -> Any:
    """``value`` as builtins, with non-finite floats as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def encode_event(event: Event) -> bytes:
    """One JSON line, newline included."""
    return msgspec.json.encode(_plain(msgspec.to_builtins(event))) + b"\n"


class RecordWriter:
    """Appends events to a file, each line flushed when written. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("wb")

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(self, event: Event) -> None:
        """Append one event."""
        self._file.write(encode_event(event))
        self._file.flush()


def decode_event(line: bytes, where: str = "record") -> Event:
    """The event of one JSON line.

    Raises:
        RecordError: with the place ``where`` and the field that does not fit the schema.
    """
    try:
        return _decode(line)
    except msgspec.DecodeError as error:
        raise RecordError(f"{where}: {error}") from None


_FLOAT_TEXT = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _decode(line: bytes) -> Event:
    if b'"nan"' in line or b'inf"' in line:
        revived: Event = msgspec.convert(_revive(msgspec.json.decode(line)), Event)
        return revived
    event: Event = _decoder.decode(line)
    return event


def _revive(value: Any, key: str = "") -> Any:
    """Non-finite floats back from text, in the numeric fields only."""
    if isinstance(value, str) and value in _FLOAT_TEXT and key in _NUMERIC:
        return _FLOAT_TEXT[value]
    if isinstance(value, dict):
        inside = "columns" if key == "columns" else ""
        return {name: _revive(item, inside or name) for name, item in value.items()}
    if isinstance(value, list):
        return [_revive(item, key) for item in value]
    return value


_NUMERIC = frozenset(
    (
        *("worst_certain", "worst_probable", "row_probable", "rms_probable", "bias", "certain_reach"),
        *("worst_threshold", "logit_magnitude", "expected", "radius", "got", "ratio"),
        *("seconds", "kernel_seconds", "shrinking_seconds"),
        *("columns", "scale", "softcap"),
    )
)


def read_record(path: Path) -> Iterator[Event]:
    """The events of a record file, in order. A last line cut off by an interruption is passed over.

    Raises:
        RecordError: if a complete line does not fit the schema, or the schema's version is another one.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            event = decode_event(line, f"{path}:{number}")
            if isinstance(event, RunStarted) and event.schema != SCHEMA_VERSION:
                raise RecordError(
                    f"{path}:{number}: schema {event.schema}, this attnproof reads {SCHEMA_VERSION}; "
                    "render the record with the version that wrote it"
                )
            yield event
