"""The finding that every report shows of a calibration: distributions against thresholds, and false alarms.

Implementations that were used in the fit and those that were held out are shown apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from attnproof.reports.record import Finding, Series
from attnproof.statistics import Thresholds

__all__ = ["Placed", "calibration_finding"]

_WORDS = {"row": "largest row rms", "output": "output rms", "bias": "mean signed"}
# Bars of a histogram in decades of statistic over threshold, and the smallest that is told apart.
_BAR, _SMALLEST = 0.1, 1e-3


@dataclass(frozen=True)
class Placed:
    """One output of one case: its statistics over their thresholds, under the key of these."""

    kernel: str
    key: str
    shares: Mapping[str, float]


def calibration_finding(
    placed: Sequence[Placed],
    held: Collection[str],
    thresholds: Mapping[str, Thresholds],
    counted: Mapping[str, tuple[int, int]],
    seed: int,
    reach: Sequence[Series] = (),
) -> Finding:
    """The finding.

    Args:
        placed: every output of every case.
        held: implementations that took no part in the fit, drawn with ``seed``.
        thresholds: by key; counted: (cases, alarms) by implementation.
        reach: series of the certain budget's reach.
    """
    total = sum(cases for cases, _ in counted.values())
    false = sum(alarms for _, alarms in counted.values())
    outside = sum(cases for name, (cases, _) in counted.items() if name in held)
    fitted = [p for p in placed if p.kernel not in held]
    validated = [p for p in placed if p.kernel in held]
    histograms = [
        _histogram(group, statistic, label, place, who)
        for statistic in ("output", "row")
        for label, place in (("dtype", 2), ("class of regime", 3))
        for group, who in ((fitted, "used in the fit"), (validated, "held out"))
        if group
    ]
    return Finding(
        name="calibration of the probable budget",
        verdict="SUPPORTED" if not false else "REFUTED",
        statement="No healthy implementation exceeds a threshold: estimated at most 1e-6 a case.",
        source="nox -s calibrate; record in verify/data/calibration.jsonl.gz",
        evidence=(
            f"{false} alarms in {total} cases of {len(counted)} implementations, {outside} of them by "
            f"{sum(name in held for name in counted)} that were held out (drawn with seed {seed})"
        ),
        series=(*histograms, _alarm_table(counted, held), _threshold_table(thresholds), *reach),
    )


def _histogram(group: Sequence[Placed], statistic: str, label: str, place: int, who: str) -> Series:
    """Cases by statistic over threshold (log10), coloured by one part of the key."""
    counts: Counter[tuple[float, str]] = Counter()
    for p in group:
        if statistic in p.shares:
            bar = math.log10(max(p.shares[statistic], _SMALLEST))
            counts[round(round(bar / _BAR) * _BAR, 3), p.key.split("/")[place]] += 1
    x = f"{_WORDS[statistic]} / threshold, log10"
    return Series(
        f"{_WORDS[statistic].capitalize()} of error/probable over its threshold, implementations {who}",
        "histogram",
        {
            x: [bar for bar, _ in sorted(counts)],
            "cases": [counts[key] for key in sorted(counts)],
            label: [group for _, group in sorted(counts)],
        },
        x,
        "cases",
        label,
    )


def _alarm_table(counted: Mapping[str, tuple[int, int]], held: Collection[str]) -> Series:
    return Series(
        "False alarms by implementation",
        "table",
        {
            "implementation": list(counted),
            "used for": ["validation" if name in held else "fit" for name in counted],
            "cases": [cases for cases, _ in counted.values()],
            "alarms": [alarms for _, alarms in counted.values()],
        },
        "implementation",
        "alarms",
    )


def _threshold_table(thresholds: Mapping[str, Thresholds]) -> Series:
    """Every threshold with the interval of its estimate and the largest value seen."""
    rows = [(key, name, t) for key, t in sorted(thresholds.items()) for name in t.intervals]
    ends = [t.intervals[name] for _, name, t in rows]
    return Series(
        "Thresholds: 95 % interval of the value that one healthy case in a million passes",
        "table",
        {
            "family/output/dtype/class/width": [key for key, _, _ in rows],
            "statistic": [name for _, name, _ in rows],
            "threshold": [getattr(t, name) for _, name, t in rows],
            "from": [low for low, _, _ in ends],
            "to": [high for _, high, _ in ends],
            "largest seen": [largest for _, _, largest in ends],
            "cases": [t.cases for _, _, t in rows],
        },
        "statistic",
        "threshold",
    )
