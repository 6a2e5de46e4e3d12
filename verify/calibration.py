"""Thresholds of the probable budget, fitted to correct implementations and validated on others.

``python -m attnproof.calibration`` (nox session ``calibrate``) judges thousands of cases, fits the upper tail
of each statistic and writes three files of package data: the record, the thresholds, and what the report
plots. A threshold is where an exponential tail, fitted above the 80 % quantile with a scale two standard
errors too large, leaves one case in a million. Implementations marked for validation take no part in the fit:
they are counted. ``--refit`` fits the stored record again without judging anything.
"""

from __future__ import annotations

import argparse
import gzip
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import msgspec

from attnproof.campaign import Campaign
from attnproof.properties.case import Case
from attnproof.properties.contract import contract_of
from attnproof.properties.regimes import plan
from attnproof.reports.record import CaseJudged, Finding, Series, decode_event, encode_event
from attnproof.statistics import ANY_CLASS, Thresholds, stored_thresholds, threshold_key
from attnproof.suite import default_device
from attnproof.targets import Importable, resolve
from attnproof.trials import Subject

__all__ = ["FIT", "VALIDATION", "Alarms", "alarms", "fit", "plans", "tail_threshold"]

FIT = (
    "attnproof.kernels.softmax:attention",
    "attnproof.kernels.softmax:attention_split",
    "attnproof.kernels.logsumexp:logsumexp",
    "attnproof.kernels.softmax_rows:softmax_rows",
    "attnproof.healthy:plain_attention",
    "attnproof.healthy:plain_logsumexp",
    "attnproof.healthy:plain_softmax_rows",
)
VALIDATION = ("attnproof.healthy:sdpa_math", "attnproof.healthy:sdpa_flash")

_PER_CASE = 1e-6
_QUANTILE = 0.8
# Fewer cases than this say nothing of a tail; statistics of such keys are judged by certain budgets alone.
_FEWEST = 24
_RECORD = "calibration.jsonl.gz"
# (row, output, bias) below which no threshold goes, however accurate the implementations of the sample were:
# a kernel that makes every declared rounding has an rms of 1 by construction of the budget, and the largest
# of some thousand rows of one element reaches 5.
_LEAST = {"wide": (3.0, 2.0, 1.0), "narrow": (5.5, 2.0, 1.0)}


@dataclass(frozen=True)
class Alarms:
    """Cases of one implementation that thresholds would have failed: ``alarms`` of ``cases``."""

    cases: int
    alarms: int


def tail_threshold(values: Sequence[float]) -> float:
    """Where a healthy statistic is estimated to be in one case of a million, from non-negative samples."""
    ordered = sorted(values)
    base = ordered[int(_QUANTILE * (len(ordered) - 1))]
    excess = [value - base for value in ordered if value > base]
    scale = sum(excess) / len(excess) if excess else 0.0
    scale *= 1.0 + 2.0 / math.sqrt(max(len(excess), 1))
    estimate = base + scale * math.log((1.0 - _QUANTILE) / _PER_CASE)
    # A tail that looks light in the sample may not be: at least a factor 1.5 above everything seen.
    return max(estimate, 1.5 * ordered[-1])


def fit(events: Iterable[CaseJudged]) -> dict[str, Thresholds]:
    """Thresholds by key from judged cases of healthy implementations."""
    samples: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for event in events:
        for key, statistics in _statistics(event):
            samples[key].append(statistics)
            samples[_pooled(key)].append(statistics)
    fitted = {}
    for key, found in sorted(samples.items()):
        if len(found) >= _FEWEST:
            tails = (tail_threshold(column) for column in zip(*found, strict=True))
            least = _LEAST[key.rpartition("/")[2]]
            row, output, bias = (max(pair) for pair in zip(tails, least, strict=True))
            fitted[key] = Thresholds(row=row, output=output, bias=bias, cases=len(found))
    return fitted


def _pooled(key: str) -> str:
    """The key of all classes of regimes together."""
    family, output, dtype, _, width = key.split("/")
    return "/".join((family, output, dtype, ANY_CLASS, width))


def _statistics(event: CaseJudged) -> list[tuple[str, tuple[float, float, float]]]:
    """Key and (row, output, |bias|) of each output of which anything was compared."""
    found = []
    case = event.case
    for name, numbers in event.outputs.items():
        if numbers.judged and numbers.rms_probable > 0.0:
            key = threshold_key(
                case.family, name, case.dtype, case.regime_class, _width(case.shape, name, case.family)
            )
            found.append((key, (numbers.row_probable, numbers.rms_probable, abs(numbers.bias))))
    return found


def _width(shape: Mapping[str, int], output: str, family: str) -> int:
    """Elements in a row of an output."""
    if family == "softmax":
        return shape["E"] if output == "o" else 1
    return shape["N"] if family == "softmax_rows" else 1


def alarms(events: Iterable[CaseJudged], thresholds: Mapping[str, Thresholds]) -> dict[str, Alarms]:
    """By implementation, cases and those beyond a threshold or a certain budget (bias by size alone)."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for event in events:
        if event.verdict == "DECLINED":
            continue
        beyond = event.verdict == "UNVERIFIED" or any(n.worst_certain > 1.0 for n in event.outputs.values())
        for key, statistics in _statistics(event):
            limits = thresholds.get(key) or thresholds.get(_pooled(key))
            if limits is not None:
                bounds = (limits.row, limits.output, limits.bias)
                beyond |= any(value > bound for value, bound in zip(statistics, bounds, strict=True))
        counts[event.kernel][0] += 1
        counts[event.kernel][1] += beyond
    return {kernel: Alarms(*pair) for kernel, pair in sorted(counts.items())}


def plans(targets: Sequence[str], cases: int, seed: int) -> list[tuple[Subject, list[Case]]]:
    """``cases`` for each implementation, over several seeds of the default plan."""
    planned = []
    for target in targets:
        contract = contract_of(resolve(target))
        assert contract is not None
        device = "cpu" if target.startswith("attnproof.healthy") else default_device()
        subject = Subject(target.partition(":")[2], Importable(target), replace(contract), device)
        chosen: list[Case] = []
        batch = 0
        while len(chosen) < cases:
            chosen += plan(
                contract.family,
                dtypes=contract.dtypes,
                options=contract.options,
                supports=contract.supports,
                causal_alignment=contract.causal_alignment,
                budget=min(cases, 200),
                seed=seed + batch,
            )
            batch += 1
        planned.append((subject, chosen[:cases]))
    return planned


def summary(
    fit_events: Sequence[CaseJudged], held_out: Sequence[CaseJudged], thresholds: Mapping[str, Thresholds]
) -> Finding:
    """The finding that every report shows: how far healthy implementations are from the thresholds."""
    counted = alarms([*fit_events, *held_out], thresholds)
    held = {event.kernel for event in held_out}
    bins: dict[tuple[str, float], int] = defaultdict(int)
    for event in [*fit_events, *held_out]:
        for key, (row, _, _) in _statistics(event):
            limits = thresholds.get(key) or thresholds.get(_pooled(key))
            if limits is not None:
                bins[event.case.dtype, round(math.log10(max(row / limits.row, 1e-4)) * 5.0) / 5.0] += 1
    total = sum(c.cases for c in counted.values())
    false = sum(c.alarms for c in counted.values())
    histogram = Series(
        "Healthy implementations: largest row rms of error/probable in a case, over its threshold (log10)",
        "histogram",
        {
            "row rms / threshold, log10": [place for _, place in sorted(bins)],
            "cases": [bins[key] for key in sorted(bins)],
            "dtype": [dtype for dtype, _ in sorted(bins)],
        },
        "row rms / threshold, log10",
        "cases",
        "dtype",
    )
    table = Series(
        "False alarms by implementation",
        "table",
        {
            "implementation": list(counted),
            "used for": ["validation" if name in held else "fit" for name in counted],
            "cases": [c.cases for c in counted.values()],
            "alarms": [c.alarms for c in counted.values()],
        },
        "implementation",
        "alarms",
    )
    validation = sum(c.cases for name, c in counted.items() if name in held)
    return Finding(
        name="calibration of the probable budget",
        status="SUPPORTED" if false == 0 else "REFUTED",
        statement="No healthy implementation exceeds a threshold: estimated at most 1e-6 a case.",
        source="nox -s calibrate; record in verify/data/calibration.jsonl.gz",
        evidence=f"{false} alarms in {total} cases, {validation} of them by implementations not in the fit",
        series=(histogram, table),
    )


def stored_finding() -> Finding | None:
    """The finding of the committed calibration, or None before the first."""
    path = resources.files("attnproof.data").joinpath("calibration.json")
    return msgspec.json.decode(path.read_bytes(), type=Finding) if path.is_file() else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calibration; exit code 1 if a healthy implementation would be accused."""
    parser = argparse.ArgumentParser(prog="python -m attnproof.calibration", description=__doc__)
    parser.add_argument("--cases", type=int, default=400, help="cases for each implementation")
    parser.add_argument(
        "--seed", type=int, default=1000, help="first seed; apart from those of ordinary runs"
    )
    parser.add_argument("--jobs", type=int, default=2, help="judge processes")
    parser.add_argument(
        "--into", type=Path, default=Path(__file__).parent / "data", help="folder of the results"
    )
    parser.add_argument(
        "--check", action="store_true", help="hold the stored thresholds against new cases; write nothing"
    )
    parser.add_argument("--refit", action="store_true", help="fit the stored record again")
    chosen = parser.parse_args(arguments)
    events = _stored(chosen.into) if chosen.refit else _judged(chosen.cases, chosen.seed, chosen.jobs)
    held = {target.partition(":")[2] for target in VALIDATION}
    fit_events = [event for event in events if event.kernel not in held]
    held_out = [event for event in events if event.kernel in held]
    thresholds = stored_thresholds() if chosen.check else fit(fit_events)
    finding = summary(fit_events, held_out, thresholds)
    if not chosen.check:
        _write(chosen.into, thresholds, finding, events)
    for event in events:
        if event.verdict in ("FAIL", "UNVERIFIED"):
            reasons = (failure.reason for failure in event.failures[:1])
            print(event.kernel, event.case.id, *reasons, sep="\n  ")
    print(f"{finding.status}: {finding.evidence}; {len(thresholds)} thresholds")
    return 0 if finding.status == "SUPPORTED" else 1


def _judged(cases: int, seed: int, jobs: int) -> list[CaseJudged]:
    """Judge every implementation, with progress on stderr."""
    planned = plans((*FIT, *VALIDATION), cases, seed)
    total = sum(len(chosen) for _, chosen in planned)
    events = []
    for event in Campaign(planned, "attnproof.calibration", seed=seed, jobs=jobs).run():
        if isinstance(event, CaseJudged):
            events.append(event)
            if len(events) % 100 == 0:
                print(f"{len(events)} of {total} cases", file=sys.stderr, flush=True)
    return events


def _stored(folder: Path) -> list[CaseJudged]:
    """The judged cases of the record in ``folder``."""
    with gzip.open(folder / _RECORD) as file:
        events = [decode_event(line, f"{folder / _RECORD}:{number}") for number, line in enumerate(file, 1)]
    return [event for event in events if isinstance(event, CaseJudged)]


def _write(
    folder: Path, thresholds: Mapping[str, Thresholds], finding: Finding, events: Sequence[CaseJudged]
) -> None:
    """The three files of a calibration."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("thresholds.json", thresholds), ("calibration.json", finding)):
        (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    with gzip.GzipFile(folder / _RECORD, "wb", mtime=0) as file:
        file.writelines(encode_event(event) for event in events)


if __name__ == "__main__":
    sys.exit(main())
